"""Every router by its name: NAME, NAME:ARGUMENT as the command line takes it, NAME(ARGUMENT) as results call it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bopo_ray.errors import ConfigError
from bopo_ray.routers import fixed, trained
from bopo_ray.routers.cascade import cascade
from bopo_ray.routers.prompted import prompted
from bopo_ray.routers.protocol import Router
from bopo_ray.routers.trained import Lesson

__all__ = [
    "ALWAYS_LARGE",
    "ALWAYS_SMALL",
    "LEARNED",
    "Kind",
    "RouterName",
    "fixed_router",
    "known_routers",
    "parse_router",
]

ALWAYS_SMALL = "always-small"
ALWAYS_LARGE = "always-large"
LEARNED = "learned"
"""The router that the runner holds the weights of; an episode's alone, no name to ask for."""


class Kind(StrEnum):
    """What it takes to make a router."""

    FIXED = "fixed"
    """Its name."""
    TRAINED = "trained"
    """The boundary rollouts of a run."""
    CHOSEN = "chosen"
    """Other episodes of the evaluation, or of dev tasks."""
    POLICY = "policy"
    """The run trains it; it is evaluated in any case."""


@dataclass(frozen=True, slots=True)
class _Argument:
    name: str
    rule: str
    valid: Callable[[float], bool]
    usual: float
    """What it is where it is left out, or an example where it is `needed`."""
    needed: bool = False


@dataclass(frozen=True, slots=True)
class _Family:
    kind: Kind
    make: Callable[..., Router] | None = None
    argument: _Argument | None = None


def _whole(least: int) -> Callable[[float], bool]:
    return lambda x: x >= least and x.is_integer()


_STEPS = _Argument("K", "a whole number of steps >= 0", _whole(0), 5.0, needed=True)
_FAMILIES: dict[str, _Family] = {
    ALWAYS_SMALL: _Family(Kind.FIXED, fixed.always_small),
    ALWAYS_LARGE: _Family(Kind.FIXED, fixed.always_large),
    "random": _Family(
        Kind.FIXED, fixed.random_router, _Argument("p", "a probability in [0, 1]", lambda p: 0 <= p <= 1, 0.3, True)
    ),
    "first-large": _Family(Kind.FIXED, fixed.first_large, _STEPS),
    "last-large": _Family(Kind.FIXED, fixed.last_large, _STEPS),
    "cascade": _Family(Kind.FIXED, cascade, _Argument("m", "a whole number of steps >= 1", _whole(1), 3.0)),
    "prompted": _Family(Kind.FIXED, prompted),
    "task-level": _Family(
        Kind.TRAINED, trained.task_level, _Argument("p", "a probability in [0, 1]", lambda p: 0 <= p <= 1, 0.5)
    ),
    "task-knn": _Family(
        Kind.TRAINED, trained.task_knn, _Argument("k", "a whole number of neighbours >= 1", _whole(1), 5.0)
    ),
    "one-step": _Family(
        Kind.TRAINED, trained.one_step, _Argument("margin", "a gain in [-1, 1]", lambda x: -1 <= x <= 1, 0.2)
    ),
    "best-schedule": _Family(Kind.CHOSEN),
    "oracle": _Family(Kind.CHOSEN),
    "bosft": _Family(Kind.POLICY),
    "grpo-vanilla": _Family(Kind.POLICY),
}


@dataclass(frozen=True, slots=True)
class RouterName:
    """A router's name, understood."""

    family: str
    argument: float | None = None

    @property
    def kind(self) -> Kind:
        """What it takes to make it."""
        return _FAMILIES[self.family].kind

    def __str__(self) -> str:
        """As results call it."""
        return self.family if self.argument is None else f"{self.family}({self.argument:g})"

    def make(self, lessons: Sequence[Lesson] = ()) -> Router:
        """The router; `lessons` are what a trained one learns from.

        Raises ConfigError when it takes something else to make it, or there are no lessons.
        """
        family = _FAMILIES[self.family]
        needed: list[Any] = [lessons] if self.kind is Kind.TRAINED else []
        if family.make is None or (needed and not lessons):
            raise ConfigError(
                f"router {str(self)!r} is made by a run's evaluation; ask for it with --router {self.family}"
            )
        return family.make(*needed, *([] if self.argument is None else [self.argument]))


def known_routers() -> str:
    """All names, with the letter of their argument; in brackets where it may be left out."""
    words = []
    for name, family in _FAMILIES.items():
        a = family.argument
        words.append(name if a is None else f"{name}:{a.name}" if a.needed else f"{name}[:{a.name}]")
    return ", ".join(words)


def parse_router(text: str) -> RouterName:
    """Reads NAME, NAME:ARGUMENT or NAME(ARGUMENT); raises ConfigError in one line."""
    match = re.fullmatch(r"([a-z-]+)(?::([^()]*)|\(([^()]*)\))?", text.strip())
    family = _FAMILIES.get(match.group(1)) if match else None
    if match is None or family is None:
        raise ConfigError(f"unknown router {text!r}; known: {known_routers()}; set it with --router")
    given = match.group(2) if match.group(2) is not None else match.group(3)
    argument = family.argument
    if argument is None:
        if given is not None:
            raise ConfigError(f"router {text!r}: {match.group(1)} takes no argument; leave {given!r} out of --router")
        return RouterName(match.group(1))
    name = match.group(1)
    if given is None and not argument.needed:
        return RouterName(name, argument.usual)
    if not given:
        raise ConfigError(
            f"router {text!r} lacks its argument: need {name}:{argument.name} with {argument.name} {argument.rule}, "
            f"e.g. --router {name}:{argument.usual:g}"
        )
    try:
        value = float(given)
    except ValueError:
        value = float("nan")
    if not argument.valid(value):
        raise ConfigError(
            f"router {text!r}: {given} is not {argument.rule}; set it with --router {name}:{argument.name}"
        )
    return RouterName(name, value)


def fixed_router(name: str) -> Router:
    """The router that its name alone makes; raises ConfigError for any other name."""
    return parse_router(name).make()
