"""The model card of a saved router: what it says of each kind."""

from __future__ import annotations

from typing import Any

import pytest

from bopo_ray.pipeline.card import card

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
