"""Every error of the package, in two families: the user's mistakes and the machine's failures."""

from __future__ import annotations

from envs.errors import ConfigError, EngineError, UnknownTaskError

__all__ = [
    "AttemptError", "BudgetError", "ConfigError", "EngineError", "GateError", "ModelError", "RefusedError",
    "SpendLimitError", "StoreError", "UnknownTaskError",
]  # fmt: skip


class ModelError(RuntimeError):
    """A language model gave no usable answer: the episode is repeated, never scored."""


class AttemptError(ModelError):
    """One attempt at a call failed."""

    def __init__(
        self, message: str, *, kind: str, retry: bool, billed: bool, retry_after_s: float | None = None,
        cost: int | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            message: what happened, without secrets.
            kind: equal for failures that are the same, e.g. "429", or a status with a digest of its body.
            retry: whether another attempt makes sense.
            billed: whether the provider may charge for this one although no reply was seen.
            retry_after_s: the provider's wish, in seconds.
            cost: micro-dollars of the usage that came all the same; None where none did.
        """
        super().__init__(message)
        self.kind, self.retry, self.billed, self.retry_after_s, self.cost = kind, retry, billed, retry_after_s, cost
        self.queued_s = 0.0
        """Of the attempt's seconds, those in which it waited for its turn."""

    def __reduce__(self) -> tuple[object, ...]:
        return _attempt_error, (str(self), self.kind, self.retry, self.billed, self.retry_after_s, self.cost)


def _attempt_error(
    message: str, kind: str, retry: bool, billed: bool, retry_after_s: float | None, cost: int | None
) -> AttemptError:
    return AttemptError(message, kind=kind, retry=retry, billed=billed, retry_after_s=retry_after_s, cost=cost)


class RefusedError(ConfigError):
    """An endpoint refuses such a call for good, and charged nothing: a wrong key, model or parameter."""


class SpendLimitError(RuntimeError):
    """The run's --max-spend can't pay for another call: the run stops, everything finished is kept."""


class StoreError(ConfigError):
    """A results folder that can't be used: another schema, another price table, another run's settings."""


class GateError(ConfigError):
    """BoSFT left the router with too little probability on LARGE for BoPO to learn from."""


class BudgetError(ConfigError):
    """A budget that could not pay for a single call."""
