"""What the routing environment asks of a language model, and the ordered pool it chooses from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from bopo_ray.models.pricing import Price, Usage

__all__ = ["LanguageModel", "Message", "ModelPool", "Reply", "Request"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


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
    usage: Usage
    latency_s: float


class LanguageModel(Protocol):
    """A model that writes the agent's next action. Thread-safe."""

    name: str
    price: Price
    needs_plan: bool
    """Whether `Request.plan` must be filled."""

    def count(self, messages: tuple[Message, ...]) -> int:
        """Prompt tokens of `messages`, or an upper bound: it reserves budgets."""
        ...

    def complete(self, request: Request) -> Reply:
        """One call. Raises ModelError when no answer came."""
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
