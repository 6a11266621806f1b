"""Language models behind one protocol, and what they cost."""

from bopo_ray.errors import ConfigError
from bopo_ray.models.pricing import price_table
from bopo_ray.models.protocol import ModelPool
from bopo_ray.models.simulated import simulated_pool

__all__ = ["POOLS", "load_pool"]

POOLS = {"simulated": simulated_pool}


def load_pool(name: str) -> ModelPool:
    """The pool called `name`; raises ConfigError for an unknown name."""
    if name not in POOLS:
        raise ConfigError(f"unknown model pool {name!r}; known: {', '.join(POOLS)}; choose one with --models")
    return POOLS[name](price_table())
