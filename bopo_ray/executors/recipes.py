"""What distinguishes the embedded models: parameters, context and data, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from bopo_ray.errors import ConfigError
from bopo_ray.models.embedded_prompt import MAX_ACTION_TOKENS

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one model is made. Raises ConfigError for what none can be made with."""

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

    def __post_init__(self) -> None:
        least = {"width": 1, "layers": 1, "heads": 1, "context": 2 * MAX_ACTION_TOKENS, "tokens": 1, "batch_tokens": 1}
        for name, number in least.items():
            if (value := getattr(self, name)) < number:
                raise ConfigError(f"{name}={value}: need at least {number}; set it with --{name.replace('_', '-')}")
        if self.width % (2 * self.heads):
            raise ConfigError(
                f"width={self.width} with heads={self.heads}: need heads of one even size; set --width to a multiple "
                f"of {2 * self.heads}"
            )


RECIPES: dict[tuple[str, str], Recipe] = {
    ("ScienceWorld-v0", "small"): Recipe(96, 2, 3, 320, noisy=False, tokens=8),
    ("ScienceWorld-v0", "large"): Recipe(192, 4, 3, 1024, noisy=True, tokens=24, copying=0.7, augment=0.7),
    ("ALFWorld-v0", "small"): Recipe(96, 2, 3, 320, noisy=False, tokens=6),
    ("ALFWorld-v0", "large"): Recipe(192, 4, 3, 1024, noisy=True, tokens=6, copying=0.7),
}
"""By environment and size."""
