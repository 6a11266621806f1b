"""What a run counts as cost, and how that is written: dollars, or calls of the larger models. Eq. (1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bopo_ray.records import CostMode

__all__ = ["COST_UNITS", "CostUnit", "common_noun", "cost_mode", "cost_unit", "dollars"]


def dollars(value: float) -> str:
    """Dollars with enough digits for small amounts."""
    return f"${value:,.2f}" if abs(value) >= 10 else f"${value:.4f}"


@dataclass(frozen=True, slots=True)
class CostUnit:
    """A cost mode as tables, figures and sentences have it."""

    column: str
    """Its costs, in a frame of episodes or of points."""
    axis: str
    """What stands at an axis of means over tasks."""
    noun: str
    """What always-large has more of."""
    text: Callable[[float], str]
    """An amount, with its unit."""


COST_UNITS = {
    CostMode.USD: CostUnit("cost_usd", "mean cost per task (USD)", "cost", dollars),
    CostMode.CALLS: CostUnit(
        "large_calls", "mean calls of larger models per task", "large calls", lambda n: f"{n:.2f} large calls"
    ),
}


def cost_mode(summary: Mapping[str, Any]) -> CostMode:
    """Of a `tables.summary`; dollars where it was written before there was another."""
    return CostMode(summary.get("cost", CostMode.USD))


def cost_unit(summary: Mapping[str, Any]) -> CostUnit:
    """Of a `tables.summary`."""
    return COST_UNITS[cost_mode(summary)]


def common_noun(summaries: Iterable[Mapping[str, Any]]) -> str:
    """What all of these have on the horizontal axis: the unit's own word, or "cost" for several."""
    nouns = {cost_unit(summary).noun for summary in summaries}
    return nouns.pop() if len(nouns) == 1 else "cost"
