"""What can be known before anything is spent: what would fail, whose the folder is, what is left of a limit."""

from __future__ import annotations

import fcntl
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

from bopo_ray.agent import chat_messages
from bopo_ray.benchmarks import env_class
from bopo_ray.errors import BudgetError, ConfigError, StoreError
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import LanguageModel, ModelPool
from bopo_ray.models.spend import SpendLedger
from bopo_ray.models.tokens import prompt_tokens
from bopo_ray.pipeline.settings import Settings, microusd
from bopo_ray.records import CostMode

__all__ = ["locked", "preflight", "studies", "taken_microusd"]


def preflight(pool: ModelPool, settings: Settings, out: Path) -> None:
    """Raises ConfigError (BudgetError for money) in one line; spends nothing."""
    if settings.replay and not Path(settings.replay).is_file():
        raise ConfigError(f"replay={settings.replay!r}: no such file; make one with python -m experiments.store export")
    if re.fullmatch(r"[\d,]+", settings.calls):
        raise ConfigError(
            f"calls={settings.calls!r}: --calls names a file of stored calls; a cap on large calls is set with "
            "--budget-calls (for a file of this name, put ./ before it)"
        )
    budget = settings.budget
    for what, cap in (
        ("budget_usd", budget.cap if budget and budget.mode is CostMode.USD else None),
        ("max_spend", None if math.isinf(settings.max_spend) else microusd(settings.max_spend)),
    ):
        if cap is None or (what == "max_spend" and (settings.replay or (out / "spend.db").exists())):
            continue
        least, name = min((cheapest_call(m, settings.env), m.name) for m in pool.models)
        if cap < least:
            raise BudgetError(
                f"{what}={getattr(settings, what)!r}: not enough for one call, which may cost ${least / 1e6:.6f} "
                f"({name}); need more, set it with --{what.replace('_', '-')}"
            )
    if not settings.replay:
        for model in pool.models:
            model.check()


def cheapest_call(model: LanguageModel, env_id: str) -> int:
    """Micro-dollars that must be reserved for a call on the shortest prompt that there can be."""
    guide = getattr(env_class(env_id), "action_guide", "")
    messages = chat_messages("", "", (), guide, model.sampling.max_prompt_tokens, prompt_tokens)
    return model.price.cost(Usage(model.bound(messages), model.sampling.max_completion_tokens))


def locked(folder: Path) -> TextIO:
    """The lock of a run's folder, held until the file is closed; the folder is made.

    A study of a finished run holds it, too: both spend under one limit, which each works out when it begins. Raises
    StoreError when another one has it, or the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreError(
            f"{folder} is in use by another run, or by a study of it; wait for its end, or take another folder"
        ) from error
    except OSError as error:
        raise StoreError(f"{folder} can't be written ({error.strerror}); choose another --out") from error
    return lock


def studies(folder: Path) -> list[Path]:
    """Folders of the studies of the run in `folder`: what was played on it after it had finished."""
    return [ledger.parent for ledger in folder.glob("*/spend.db")]


def taken_microusd(folders: Iterable[Path]) -> int:
    """Of the limits of the runs in these folders: what they have spent, and what their calls in flight may cost."""
    ledgers = [path for folder in folders if (path := folder / "spend.db").exists()]
    sums = [SpendLedger(path, None).totals().overall for path in ledgers]
    return sum(s.spent_microusd + s.reserved_microusd for s in sums)
