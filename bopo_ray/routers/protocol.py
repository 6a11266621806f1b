"""What a router sees and answers: the same for fixed, trained and asking ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Moment", "Router", "one_hot"]


def _nobody(question: str) -> str:
    raise RuntimeError("this router asks a model, and nobody is there to answer: play it in a GroupEnvRunner")


@dataclass(frozen=True, slots=True)
class Moment:
    """What there is to decide by before one step."""

    view: str
    """The text of `bopo_ray.agent.router_view`; `read_view` takes it apart."""
    step: int
    """Steps taken so far."""
    n_models: int
    """Size of the pool; 0 is SMALL, the last is LARGE."""
    task: str = ""
    """The task's name, for the oracle alone: no other router may know which task this is."""
    member: int = 0
    """The episode's index among those of its task, for the oracle alone."""
    ask: Callable[[str], str] = _nobody
    """The smallest model's reply to a question; the episode pays. Empty when the budget can't."""


class Router(Protocol):
    """Chooses a distribution over models. Without a state of its own: the same moment has the same answer. All episodes
    of a process, and replies of endpoints, wait for it: it answers at once, or asks by `ask`."""

    def __call__(self, moment: Moment) -> tuple[float, ...]:
        """Probabilities [n_models]."""
        ...


def one_hot(index: int, n: int) -> tuple[float, ...]:
    """Certainty."""
    return tuple(float(i == index) for i in range(n))
