"""The model card of a saved router: what it says of each kind."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from bopo_ray.analysis.bill import Bill
from bopo_ray.analysis.tables import Settings, frontier, summary
from bopo_ray.files import write_json
from bopo_ray.pipeline.card import CARD, card, describe_as, refresh_cards
from bopo_ray.pipeline.evaluate import print_tables
from bopo_ray.rllib.saved import ROUTER_FILE

TRAINED = {
    "name": "bopo", "env": "ALFWorld-v0", "label": "embedded", "price_hash": "0", "cost": "usd", "beta": 0.5,
    "models": [{"name": n, "input_usd": 1.0, "cached_input_usd": 0.5, "output_usd": 2.0} for n in ("small", "large")],
    "tasks": 3, "max_steps": 30, "taxonomy": {"hard": 2, "easy": 1}, "how": {"lam": 0.1},
}  # fmt: skip
LLM = {"backbone": "me/my-model", "lora_targets": "all-linear", "context": 512, "causal": True}


@pytest.mark.parametrize(
    ("known", "said"),
    [
        ({"trained": TRAINED}, "A small transformer encoder with a tokenizer of its own."),
        ({"trained": TRAINED | {"value": True}}, "how likely the smallest model alone succeeds from here on"),
        ({"trained": TRAINED, "lora_rank": 8} | LLM, "`me/my-model` with LoRA of rank 8 on all-linear"),
        ({"trained": TRAINED, "lora_rank": 0} | LLM, "`me/my-model` with full fine-tuning"),
    ],
)
def test_the_card_says_what_kind_of_router_it_is(known: dict[str, Any], said: str) -> None:
    text = card(known)
    assert said in text and text.count("A small") + text.count("`me/my-model`") == 1
    assert "| 1 | `large` | 1 | 0.5 | 2 |" in text and "Not evaluated by itself." in text
    assert "# of 30 steps\n" in text
    limited = card(known | {"trained": known["trained"] | {"how": {"lam": 0.1, "call_limit": 5}}})
    assert "# of 30 steps, and of at most 5 large calls\n" in limited and "seed" not in limited.partition("##")[0]
    means = {name: [0.5, 0.4, 0.6] for name in ("success", "score", "cost_usd", "large_calls")}
    drawn = card(known | {"evaluation": {"tasks": 9, "decide": "sample"} | means})
    assert '"the first observation", seed=1)' in drawn


def test_the_lambda_that_a_router_was_trained_at_stays_beside_that_which_it_is_chosen_for(tmp_path: Path) -> None:
    source, folder = tmp_path / "x_lam0.3", tmp_path / "x_lam0.3_for0.2"
    for path in (source, folder):
        path.mkdir()
        write_json(path / ROUTER_FILE, {"trained": TRAINED | {"how": {"lam": 0.3, "updates": 2}}})
    for lam, said in (
        (0.2, "lam 0.3, updates 2, offset 1.5, chosen for lam 0.2."),
        (0.3, "lam 0.3, updates 2, offset 1.5."),
    ):
        describe_as(source, folder, folder.name, lam=lam, offset=1.5)
        assert said in (folder / CARD).read_text()
    write_json(source / ROUTER_FILE, {"trained": TRAINED | {"how": {"method": "bosft"}}})
    describe_as(source, folder, folder.name, lam=0.2)
    assert "method bosft, chosen for lam 0.2." in (folder / CARD).read_text()


def test_one_task_has_no_interval(tmp_path: Path) -> None:
    """With --test-tasks 1 the summary's bounds and p are None: the card and the printed tables leave them out."""
    folder = tmp_path / "policies" / "x"
    folder.mkdir(parents=True)
    write_json(folder / ROUTER_FILE, {"trained": TRAINED})
    episodes = pd.DataFrame(
        [{"policy": p, "method": m, "lam": lam, "train_seed": None if lam is None else 0, "task": "t", "success": True,
          "score": 100.0, "cost_usd": cost, "large_calls": 1, "steps": 2}
         for p, m, lam, cost in (("always-small", "always-small", None, 0.01), ("x", "bopo-hybrid", 0.1, 0.02),
                                 ("always-large", "always-large", None, 0.04))]
    )  # fmt: skip
    spend = Bill(*[0] * 10, 0.0, 0).to_dict() | {"sweep_to_one_lambda": 1.0}
    found = summary(episodes, Settings(n=20)) | {"spend": spend}
    said = StringIO()
    run: Any = SimpleNamespace(
        out=tmp_path, settings=SimpleNamespace(decide="greedy", budget=None), test=["t"], pool=SimpleNamespace(
            label="simulated pair", note=""), console=Console(file=said, width=160),
    )  # fmt: skip
    refresh_cards(run, found, "the command")
    text = (folder / CARD).read_text()
    assert "On 1 held-out task, decided by greedy; one task has no interval." in text
    assert "| success | 1 | – |" in text and "the command" in text
    print_tables(run, frontier(episodes, Settings(n=20)), found)
    assert "bopo-hybrid less this" in said.getvalue() and "nan" not in said.getvalue() + text
