"""What a run found, in a few sentences and figures: the top of the report.

Always true here: a method is called better or worse only where the interval of the difference leaves out 0, and its p
does so corrected for the number of comparisons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bopo_ray.analysis.cost_unit import CostUnit, cost_unit
from bopo_ray.analysis.tables import ALWAYS_LARGE, ALWAYS_SMALL, BOUNDARY, ORACLE, verdict

__all__ = ["Card", "Story", "tell"]

FEW_TASKS = 30
"""With fewer, a comparison says next to nothing."""


@dataclass(frozen=True, slots=True)
class Card:
    """One policy at a glance."""

    name: str
    note: str
    """Which of the method's points this is."""
    point: Mapping[str, Any]
    """Its operating point, as in `tables.summary`."""
    success_bar: float
    """In [0, 1]: its success beside the best of the cards."""
    cost_bar: float
    """In [0, 1]: its cost beside the dearest of the cards."""
    chosen: bool
    """The method that the run is about."""


@dataclass(frozen=True, slots=True)
class Story:
    """The top of the report."""

    sentence: str
    """The headline method against always-large."""
    findings: tuple[str, ...]
    """What the intervals settle, and what they leave open."""
    caution: str
    """Why not to read too much into it; empty where nothing speaks against it."""
    cards: tuple[Card, ...]
    """Cheapest first."""


def tell(summary: Mapping[str, Any]) -> Story:
    """The story of a `tables.summary`."""
    points: Sequence[Mapping[str, Any]] = summary["operating_points"]
    large = next(p for p in points if p["method"] == ALWAYS_LARGE)
    headline, unit = summary["headline"], cost_unit(summary)
    cost = unit.column
    own = [p for p in points if p["method"] == headline]
    best = max(own, key=lambda p: (p["success"], -p[cost])) if own else None
    shown = [p for p in points if p["method"] in (ALWAYS_SMALL, ALWAYS_LARGE)] + ([best] if best else [])
    shown.sort(key=lambda p: p[cost])
    highest = max(p["success"] for p in shown) or 1.0
    dearest = max(p[cost] for p in shown) or 1.0
    n = summary["n_tasks"]
    few = f"Only {n} held-out task{'s' * (n != 1)}: this run shows that everything works, not which method is better."
    cautions = [_collapse(own)] + [few] * (n < FEW_TASKS)
    cards = [
        Card(
            p["method"], _which(p, len(own)) if p is best else "", p, p["success"] / highest,
            p[cost] / dearest, p is best,
        )
        for p in shown
    ]  # fmt: skip
    return Story(
        sentence=_sentence(best, large, unit) if best else "",
        findings=tuple(_findings(summary, str(headline))) if best else (),
        caution=" ".join(filter(None, cautions)),
        cards=tuple(cards),
    )


def _which(point: Mapping[str, Any], n_own: int) -> str:
    lam = [] if point["lam"] is None else [f"λ = {point['lam']:g}"]
    return ", ".join(lam + [f"the most successful of {n_own} points"] * (n_own > 1))


def _collapse(own: Sequence[Mapping[str, Any]]) -> str:
    """Says so where the points of a method all decide alike; empty where they route."""
    shares = {p["share_large"] for p in own}
    for share, steps, like in ((0, "no step", ALWAYS_SMALL), (1, "every step", ALWAYS_LARGE)):
        if shares == {share}:
            return f"{own[0]['method']} calls a large model on {steps} at any λ, just as {like} does."
    return ""


def _sentence(best: Mapping[str, Any], large: Mapping[str, Any], unit: CostUnit) -> str:
    lam = "" if best["lam"] is None else f" at λ = {best['lam']:g}"
    solves = f"{best['method']}{lam} solves {best['success']:.0%} of the tasks"
    share = f"{best[unit.column] / large[unit.column]:.0%}" if large[unit.column] else ""
    if not large["success"]:
        return (
            f"{solves}{f' at {share} of the {unit.noun} of always-large' if share else ''}; always-large solves none."
        )
    kept = f"{best['success'] / large['success']:.0%} of what always-large solves"
    return f"{solves}: {kept}{f', at {share} of its {unit.noun}' if share else ''}."


def _findings(summary: Mapping[str, Any], headline: str) -> list[str]:
    found = []
    saving = next(iter(summary["cost_saved"].get(headline, [])), None)
    if saving and saving["saved"]["estimate"] is not None:
        share = f"{saving['success_share']:.0%} of always-large's success"
        found.append(
            f"No point of {headline} kept {share} for less."
            if saving["policy"] == ALWAYS_LARGE
            else f"The cheapest point of {headline} or the boundary policies that kept {share} saved "
            f"{saving['saved']['estimate']:.0%} of its {cost_unit(summary).noun}: picked on these tasks, so rather too "
            "good."
        )
    verdicts: dict[str, list[str]] = {}
    for method, gap in summary["differences"].items():
        if gap["low"] is not None and method != ORACLE:
            verdicts.setdefault(verdict(gap, summary["bootstrap"]["level"]), []).append(method)
    for said in ("better", "worse"):
        if said in verdicts:
            found.append(f"Its frontier is {said} than that of {_listed(verdicts[said])}.")
    if "open" in verdicts:
        found.append(f"Within the noise of this run: the difference to {_listed(verdicts['open'])}.")
    return found


def _listed(names: Sequence[str]) -> str:
    names = ["the boundary policies alone" if n == BOUNDARY else n for n in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
