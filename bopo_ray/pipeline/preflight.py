"""What can be known to fail before anything is spent."""

from __future__ import annotations

import math
import re
from pathlib import Path

from bopo_ray.agent import chat_messages
from bopo_ray.benchmarks import env_class
from bopo_ray.errors import BudgetError, ConfigError
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import LanguageModel, ModelPool
from bopo_ray.models.tokens import prompt_tokens
from bopo_ray.pipeline.settings import Settings
from bopo_ray.records import CostMode

__all__ = ["preflight"]


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
        ("max_spend", None if math.isinf(settings.max_spend) else math.floor(settings.max_spend * 1_000_000 + 1e-6)),
    ):
        if cap is None or (what == "max_spend" and (settings.replay or (out / "spend.db").exists())):
            continue
        least, name = min((cheapest_call(m, settings.env), m.name) for m in pool.models)
        if cap < least:
            raise BudgetError(
                f"{what}={cap / 1e6:g}: not enough for one call, which may cost ${least / 1e6:.6f} "
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
