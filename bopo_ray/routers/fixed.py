"""Schedules, which look at the step alone: the boundary policies, random(p), first-large(K) and last-large(K)."""

from __future__ import annotations

from bopo_ray.agent import read_view
from bopo_ray.routers.protocol import Router, one_hot

__all__ = ["always_large", "always_small", "first_large", "last_large", "random_router"]


def always_small() -> Router:
    """SMALL at each step."""
    return lambda m: one_hot(0, m.n_models)


def always_large() -> Router:
    """LARGE at each step."""
    return lambda m: one_hot(m.n_models - 1, m.n_models)


def random_router(p: float) -> Router:
    """LARGE with probability p, independently per step, else SMALL."""
    return lambda m: tuple((1 - p) * float(i == 0) + p * float(i == m.n_models - 1) for i in range(m.n_models))


def first_large(k: float) -> Router:
    """LARGE for the first k steps, then SMALL."""
    return lambda m: one_hot(m.n_models - 1 if m.step < k else 0, m.n_models)


def last_large(k: float) -> Router:
    """SMALL until k steps are left of the step limit, then LARGE: rescues what the small model did not finish."""
    return lambda m: one_hot(m.n_models - 1 if read_view(m.view).steps_left <= k else 0, m.n_models)
