"""Every error of the package, in two families: the user's mistakes and the machine's failures."""

from __future__ import annotations

from envs.errors import ConfigError, EngineError, UnknownTaskError

__all__ = ["BudgetError", "ConfigError", "EngineError", "GateError", "ModelError", "StoreError", "UnknownTaskError"]


class ModelError(RuntimeError):
    """A language model gave no usable answer: the episode is repeated, never scored."""


class StoreError(ConfigError):
    """A results folder that can't be used: another schema, another price table, another run's settings."""


class GateError(ConfigError):
    """BoSFT left the router with too little probability on LARGE for BoPO to learn from."""


class BudgetError(ConfigError):
    """A budget that could not pay for a single call."""
