"""Budget-aware routing of language models; here stands what a trained router is used with.

Importing the package loads nothing: each name comes from its module when it is first used, torch and Ray with the
first `load_router`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bopo_ray.errors import ConfigError, StoreError
    from bopo_ray.inference import History, RoutedEpisode, SavedRouter, load_router
    from bopo_ray.records import Budget, CostMode
    from bopo_ray.routers.decision import Decision

__all__ = [
    "Budget", "ConfigError", "CostMode", "Decision", "History", "RoutedEpisode", "SavedRouter", "StoreError",
    "load_router",
]  # fmt: skip

_HOMES = {
    "errors": ("ConfigError", "StoreError"),
    "inference": ("History", "RoutedEpisode", "SavedRouter", "load_router"),
    "records": ("Budget", "CostMode"),
    "routers.decision": ("Decision",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"bopo_ray.{module}"), name)
    raise AttributeError(f"module 'bopo_ray' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
