"""What the routing environment asks of a language model, and the ordered pool it chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bopo_ray.models.pricing import Price, Usage

__all__ = ["LanguageModel", "Message", "ModelPool", "Reply", "Request", "Sampling"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a model is asked to write."""

    temperature: float | None = None
    """None: the run's temperature."""
    max_completion_tokens: int = 128
    """Bound on a reply; what a budget reserves for it."""
    max_prompt_tokens: int = 8192
    """Old observations are dropped from a longer prompt."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call."""

    messages: tuple[Message, ...]
    sample: int
    """Sample index: the same request with the same index has the same reply."""
    temperature: float
    max_tokens: int
    """Bound on the completion."""
    task: str
    """The task's name, for simulated models only; a real model sees the messages alone."""
    plan: tuple[str, ...] = ()
    """The expert plan, for simulated models only. The router never sees it."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    text: str
    """Empty when the model said nothing, or its provider's content filter kept it back."""
    usage: Usage
    """As reported by the model."""
    latency_s: float
    """Seconds until it was read, with what this process had to do besides."""


class LanguageModel(Protocol):
    """A model that writes the agent's next action. Thread-safe.

    `complete` is called in a thread of its own, but for a model that has `gives_way = True`: it promises to wait by
    `result` or `finish` of `bopo_ray.lanes` alone, for a bounded time once it has its turn, and to be done with the
    rest at once.
    """

    name: str
    """How results call it."""
    identity: str
    """All that a reply depends on beside the request (provider, endpoint, model, fixed parameters); no secret."""
    price: Price
    sampling: Sampling
    needs_plan: bool
    """Whether `Request.plan` must be filled."""

    def bound(self, messages: tuple[Message, ...]) -> int:
        """At least the prompt tokens that `messages` will be billed for; what a budget reserves for them.

        Additive: bound(a + b) <= bound(a) + bound(b).
        """
        ...

    def check(self) -> None:
        """Raises ConfigError when no call can succeed (no key, nobody answers); spends nothing."""
        ...

    def complete(self, request: Request) -> Reply:
        """One attempt, bounded in time.

        Raises AttemptError when it failed (it says whether another one makes sense and whether this one may have been
        billed), RefusedError when no call of this kind can ever succeed and nothing was charged, another ConfigError
        when the reply can't be billed. Both stop the run.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


@dataclass(frozen=True, slots=True)
class ModelPool:
    """Models in ascending order of capability: index 0 is SMALL, the last is LARGE."""

    models: tuple[LanguageModel, ...]
    label: str
    """How results made with this pool are marked, e.g. "simulated"."""
    note: str
    """One sentence for reports: what these models are."""
    price_hash: str
    """`PriceTable.hash` of the prices in use."""

    def __len__(self) -> int:
        return len(self.models)

    @property
    def needs_plan(self) -> bool:
        """Whether any member follows the expert plan."""
        return any(m.needs_plan for m in self.models)
