"""Routers without parameters to learn: the boundary policies and the simple baselines."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from bopo_ray.errors import ConfigError

__all__ = ["ALWAYS_LARGE", "ALWAYS_SMALL", "LEARNED", "Router", "fixed_router"]

ALWAYS_SMALL = "always-small"
ALWAYS_LARGE = "always-large"
LEARNED = "learned"


class Router(Protocol):
    """Chooses a distribution over models for each decision."""

    def __call__(self, view: str, step: int, n_models: int) -> tuple[float, ...]:
        """Probabilities [n_models] given the text view and the number of steps taken so far."""
        ...


def _one_hot(index: int, n: int) -> tuple[float, ...]:
    return tuple(float(i == index) for i in range(n))


def _random(p: float) -> Router:
    """LARGE with probability p, independently per step, else SMALL."""
    return lambda view, step, n: tuple((1 - p) * float(i == 0) + p * float(i == n - 1) for i in range(n))


def _first_large(k: float) -> Router:
    """LARGE for the first k steps, then SMALL."""
    return lambda view, step, n: _one_hot(n - 1 if step < k else 0, n)


_FAMILIES: dict[str, tuple[Callable[[float], Router], Callable[[float], bool], str]] = {
    "random": (_random, lambda p: 0 <= p <= 1, "a probability in [0, 1]"),
    "first-large": (_first_large, lambda k: k >= 0 and k.is_integer(), "a whole number of steps >= 0"),
}


def fixed_router(name: str) -> Router:
    """The router called `name`: always-small, always-large, random(p), first-large(K).

    Raises ConfigError for any other name.
    """
    if name == ALWAYS_SMALL:
        return lambda view, step, n: _one_hot(0, n)
    if name == ALWAYS_LARGE:
        return lambda view, step, n: _one_hot(n - 1, n)
    match = re.fullmatch(r"([a-z-]+)\(([-+.0-9e]+)\)", name)
    if match and match.group(1) in _FAMILIES:
        make, valid, rule = _FAMILIES[match.group(1)]
        try:
            value = float(match.group(2))
        except ValueError:
            value = float("nan")
        if valid(value):
            return make(value)
        raise ConfigError(f"router {name!r}: {match.group(2)} is not {rule}")
    raise ConfigError(f"unknown router {name!r}; known: {ALWAYS_SMALL}, {ALWAYS_LARGE}, random(p), first-large(K)")
