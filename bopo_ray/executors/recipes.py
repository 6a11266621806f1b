"""What distinguishes the embedded models: parameters, context and data, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is made."""

    width: int
    """Hidden size"""
    layers: int
    """Transformer layers"""
    heads: int
    """Attention heads"""
    context: int
    """Tokens read and written at most"""
    noisy: bool
    """Learn from demonstrations with detours, too"""
    tokens: int
    """Tokens trained on, in millions"""
    copying: float = 0.0
    """Tokens of these that teach to copy, at first, in millions; 0 starts from random weights (see `copying`)"""
    augment: float = 0.0
    """Probability that a demonstration's names are permuted when it is read"""
    text_weight: float = 0.2
    """Weight of a token of an observation, beside 1 for one of an action"""
    lr: float = 2e-3
    """Peak learning rate"""
    batch_tokens: int = 2048
    """Tokens per update"""
    seed: int = 0
    """Of weights, order and augmentation"""


RECIPES: dict[tuple[str, str], Recipe] = {
    ("ScienceWorld-v0", "small"): Recipe(96, 2, 3, 320, noisy=False, tokens=8),
    ("ScienceWorld-v0", "large"): Recipe(192, 4, 3, 1024, noisy=True, tokens=24, copying=0.7, augment=0.7),
    ("ALFWorld-v0", "small"): Recipe(96, 2, 3, 320, noisy=False, tokens=6),
    ("ALFWorld-v0", "large"): Recipe(192, 4, 3, 1024, noisy=True, tokens=6, copying=0.7),
}
"""By environment and size."""
