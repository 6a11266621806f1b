"""What the paper says beside what a reproduction measured: a row per claim, with what it can be held against.

The paper's numbers are those that this project knows; where it knows none, the claim says so. Pure functions of what
finished runs and studies have left; intervals are 95% bootstrap intervals over tasks, and those of the studies'
tables over training seeds, too; see `bopo_ray.analysis.bootstrap`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pandas as pd

from bopo_ray.analysis.bootstrap import Interval, bootstrap_ci, interval_of, resample_weights
from bopo_ray.analysis.studies import N_RESAMPLES, inversion_rates, inversions
from bopo_ray.analysis.tables import ALWAYS_LARGE, BOUNDARY

__all__ = ["Claim", "Results", "Unit", "claims_of", "differences_of", "table_of", "tally"]

BOPO, FIRST_LARGE = "bopo-hybrid", "first-large"
CAP = 15
"""Calls: the cap that the paper's known numbers are for."""
ALPHA = 0.05
"""A difference is called one where Holm's p is below this."""
_HARD_SHARE = 0.522
_BY_CALLS = {
    ("AppWorld-v0", "success, always-large"): 0.667, ("AppWorld-v0", "calls, always-large"): 1.25,
    ("AppWorld-v0", "success, bopo"): 0.665, ("AppWorld-v0", "calls, bopo"): 0.88, ("AppWorld-v0", "fewer"): 0.296,
}  # fmt: skip
"""(Benchmark, quantity) -> the paper's number at a cap of CAP calls."""
_TASKS = {"ALFWorld-v0": (2420, 200, 30), "ScienceWorld-v0": (2120, 200, 40), "AppWorld-v0": (105, 168, 40)}
"""Benchmark -> the paper's training tasks, test tasks and steps."""
_SEEDS = 3
_MODELS = "GPT-4.1-mini and GPT-4.1"
_PAIR = "Llama-3.1 8B and 70B"
FloatArray = npt.NDArray[np.float64]


class Unit(StrEnum):
    """What a claim's number is."""

    SHARE = "share"
    """A part of a whole, shown in percent."""
    POINTS = "points"
    """A difference of two shares, shown in percent of the whole, with its sign."""
    HYPERVOLUME = "hypervolume"
    """A difference of two hypervolumes."""
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class Claim:
    """One statement, in the paper and here."""

    source: str
    """Figure or table of the paper."""
    text: str
    """What the number is."""
    unit: Unit
    ours: Interval
    paper: float | None = None
    """None: not known to this project."""
    p_holm: float | None = None
    """Of a difference that is one of several of its table; None: of one by itself."""

    @property
    def reading(self) -> str:
        """What the interval settles, in words: about the paper's number, or about the sign of a difference."""
        low, high = self.ours.low, self.ours.high
        if math.isnan(self.ours.estimate):
            return "nothing to measure it by"
        if math.isnan(low) and self.unit is not Unit.COUNT:
            return "one task settles nothing"
        if self.paper is not None:
            if self.unit is Unit.COUNT:
                return "the same" if self.ours.estimate == self.paper else "not the same"
            where = "above" if self.paper > high else "below" if self.paper < low else "inside"
            return f"the paper's number is {where} our interval"
        if self.unit in (Unit.POINTS, Unit.HYPERVOLUME):
            if low <= 0 <= high:
                return "not settled: 0 is inside"
            if self.p_holm is not None and self.p_holm >= ALPHA:
                return f"not settled: p, Holm {self.p_holm:.2g}"
            return "above 0" if low > 0 else "below 0"
        return ""


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """What one benchmark's experiments left. Frames as they stand in the studies' CSV files."""

    env: str
    episodes: pd.DataFrame
    """Of the evaluation without caps: columns method, policy, task, success, large_calls."""
    boundaries: pd.DataFrame
    """Of the training tasks."""
    capped: pd.DataFrame
    """Of the evaluation under caps in calls: the same columns and cap, of what was chosen for each method and seed."""
    pairs: pd.DataFrame
    """Of experiments.model_pairs, the run's own pair first."""
    ablation: pd.DataFrame
    allocation: pd.DataFrame
    hard_budget: pd.DataFrame


def claims_of(results: Results) -> list[Claim]:
    """The claims about one benchmark, in the paper's order."""
    own, *others = results.pairs.to_dict("records")
    claims = [_frontier("figure 1", "", own)]
    for row in results.ablation.to_dict("records"):
        if (name := str(row["variant"])) not in (BOPO, BOUNDARY):
            less = Interval(row["less_estimate"], row["less_low"], row["less_high"])
            text = f"hypervolume of BoPO less that of {'BoPO ' * name.startswith('without')}{name}"
            claims.append(Claim("figure 2", text, Unit.HYPERVOLUME, less, p_holm=row["less_p_holm"]))
    hard = results.allocation.set_index(["method", "difficulty"]).loc[(BOPO, "hard")].to_dict()
    claims.append(
        Claim("figure 3", "share of BoPO's dollars that goes to Hard tasks (the paper's benchmark is not known)",
              Unit.SHARE, _interval(hard, "spend_share"), _HARD_SHARE)
    )  # fmt: skip
    claims += [_frontier("figure 4", f"pair {row['pair']}: ", row) for row in others]
    rates = inversion_rates(inversions({results.env: results.boundaries})).iloc[0].to_dict()
    text = "training tasks on which always-small costs more than always-large"
    claims.append(Claim("figure 5", text, Unit.SHARE, _interval(rates, "rate")))
    return [*claims, *_capped(results)]


def _frontier(source: str, prefix: str, row: Mapping[str, object]) -> Claim:
    text = f"{prefix}hypervolume of BoPO less that of the best baseline, {row['best_baseline']}"
    return Claim(source, text, Unit.HYPERVOLUME, _interval(row, "less"), p_holm=float(str(row["less_p_holm"])))


def _capped(results: Results) -> list[Claim]:
    """Table 1: at each cap BoPO and first-large, as chosen on dev tasks, and at CAP the paper's numbers.

    Caps of which the table lacks one of the two are left out: chosen.csv keeps what was for other caps and methods.
    """
    claims, compared = [], results.hard_budget.set_index(["unit", "cap", "method"])
    large = results.episodes[results.episodes["method"] == ALWAYS_LARGE]
    for cap, capped in results.capped[results.capped["method"] == BOPO].groupby("cap", sort=True):
        if not {("calls", cap, method) for method in (BOPO, FIRST_LARGE)} <= set(compared.index):
            continue
        ours, less = (compared.loc[("calls", cap, method)].to_dict() for method in (BOPO, FIRST_LARGE))
        at = f"under a cap of {cap} calls"
        known = {k: v for (env, k), v in _BY_CALLS.items() if env == results.env and cap == CAP}
        claims += [
            Claim("table 1", f"success of BoPO {at}", Unit.SHARE, _interval(ours, "success"),
                  known.get("success, bopo")),
            Claim("table 1", f"share of the cap that BoPO uses {at}", Unit.SHARE, _interval(ours, "cap_used"),
                  known.get("calls, bopo")),
            Claim("table 1", f"success of BoPO less that of first-large {at}", Unit.POINTS,
                  _interval(less, "less"), p_holm=less["p_holm"]),
        ]  # fmt: skip
        if cap == CAP:
            means = large.groupby("task")[["success", "large_calls"]].mean()
            claims += [
                Claim("table 1", "success of always-large without a cap", Unit.SHARE,
                      bootstrap_ci(means["success"].astype(float), n=N_RESAMPLES), known.get("success, always-large")),
                Claim("table 1", f"calls of always-large without a cap, as a share of {CAP}", Unit.SHARE,
                      bootstrap_ci(means["large_calls"] / CAP, n=N_RESAMPLES), known.get("calls, always-large")),
                Claim("table 1", f"fewer large calls of BoPO {at} than of always-large without one", Unit.SHARE,
                      _saved(capped.groupby("task")["large_calls"].mean(), means["large_calls"]), known.get("fewer")),
            ]  # fmt: skip
    over = float(results.hard_budget["overspends"].sum())
    played = int(results.hard_budget["episodes"].sum())
    text = f"episodes that cost more than their cap, of {played:,} that methods have under caps in calls and in dollars"
    return [*claims, Claim("table 1", text, Unit.COUNT, Interval(over, math.nan, math.nan), 0.0)]


def _saved(ours: pd.Series, theirs: pd.Series) -> Interval:
    """One less the ratio of two means over the same tasks."""
    both_T2 = pd.concat([ours, theirs], axis=1, join="inner").to_numpy(dtype=float)
    if len(both_T2) < 2 or not both_T2[:, 1].any():
        return Interval(math.nan, math.nan, math.nan)
    sums_R2: FloatArray = resample_weights(len(both_T2), N_RESAMPLES) @ both_T2
    sums_R2 = sums_R2[sums_R2[:, 1] > 0]
    means = both_T2.mean(axis=0)
    return interval_of(float(1 - means[0] / means[1]), 1 - sums_R2[:, 0] / sums_R2[:, 1])


def _interval(row: Mapping[str, object], name: str) -> Interval:
    return Interval(*(float(str(row[f"{name}{end}"])) for end in ("", "_low", "_high")))


def differences_of(
    env: str, tasks: str, models: str, n_train: int, n_test: int, max_steps: int, seeds: Sequence[int]
) -> list[str]:
    """What differs from the paper's setting, a sentence each.

    Args:
        env: the benchmark's id.
        tasks: the same with whose tasks they are, as `env_label` says it.
        models: what they are, in a sentence.
        n_train, n_test, max_steps, seeds: of the run.
    """
    train, test, steps = _TASKS.get(env, (0, 0, 0))
    same = models.startswith("Language models gpt-4.1-mini / gpt-4.1;")
    found = [] if same else [f"Models: not {_MODELS} (figure 4: {_PAIR}). {models}"]
    if not train:
        found.append(f"Benchmark: {tasks} is not one of the paper's.")
    elif tasks != env:
        found.append(f"Tasks: {tasks}, not the published ones.")
    if train and (n_train, n_test, max_steps) != (train, test, steps):
        found.append(f"Size: {n_train:,} training and {n_test:,} test tasks of at most {max_steps} steps; the paper "
                     f"{train:,} and {test:,} of at most {steps}.")  # fmt: skip
    if len(seeds) != _SEEDS:
        found.append(f"Training seeds: {len(seeds)}; the paper {_SEEDS}.")
    return [*found, "What the paper leaves open, e.g. sizes of the rewards and the form of the reference-guided "
                    "advantage, is this project's; the docstrings of bopo_ray/method mark it."]  # fmt: skip


def tally(claims: Sequence[Claim]) -> str:
    """How many of the claims came out how, in a sentence or two."""
    known, signs = ([c.reading for c in claims if (c.paper is not None) is k] for k in (True, False))
    inside = sum("inside our interval" in r or r == "the same" for r in known)
    words = f"Of {len(known)} numbers of the paper that this project knows, {inside} lie inside our intervals."
    counts = {w: sum(r.startswith(w) for r in signs) for w in ("above 0", "below 0", "not settled")}
    found = ", ".join(f"{n} {word}" for word, n in counts.items())
    return f"{words} Of {sum(counts.values())} differences between BoPO and another policy, {found}."


def table_of(claims: Sequence[Claim]) -> pd.DataFrame:
    """The claims as a page shows them."""
    return pd.DataFrame(
        {
            "where": [c.source for c in claims],
            "claim": [c.text for c in claims],
            "paper": ["not known" if c.paper is None else _shown(c.paper, c.unit) for c in claims],
            "ours": [_with_interval(c) for c in claims],
            "reading": [c.reading or "–" for c in claims],
        }
    )


def _with_interval(claim: Claim) -> str:
    if math.isnan(claim.ours.estimate):
        return "–"
    estimate, low, high = (_shown(x, claim.unit) for x in (claim.ours.estimate, claim.ours.low, claim.ours.high))
    return estimate if math.isnan(claim.ours.low) else f"{estimate} [{low}, {high}]"


def _shown(value: float, unit: Unit) -> str:
    form = {Unit.SHARE: "{:.1%}", Unit.POINTS: "{:+.1%}", Unit.HYPERVOLUME: "{:+.3f}", Unit.COUNT: "{:,.0f}"}[unit]
    return form.format(value)
