"""How readily a trained router calls the larger models: chosen on dev tasks for each lambda. [ours]

What is chosen is one number, added to the logit of model i of the pool i times. It moves a router along its own
frontier without training: a router says where the large model is worth more, and only then how much of it is wanted.
The router that is evaluated has the number in its weights; it is a folder of its own beside the trained one.

Routers differ in scale, and in how much of the large model they were left with, so the numbers to choose from are each
router's own: those with which it would call a larger model at given shares of the steps that it has met on dev tasks.

A router that draws its decisions calls a larger model with some probability at each step; its shares are the means of
that.

With limits of calls to choose from, too, each number is tried under each limit (Eq. (9)), and so is one with which the
router calls the large model until the limit is reached: a late call is dear in dollars, since prompts grow, and a
router that goes on calling where all is lost pays most on the tasks that nobody wins. A schedule, first-large:K, is
such a point.

By "price" a lambda gets what earns the most at it. Where success costs much the same all along a router's frontier,
each lambda then chooses one end, and what lies between is never played; by "front" the lambdas that a router serves
share the points that have the largest hypervolume together (one that was trained for a lambda of its own is chosen by
price).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from ray.rllib.core.rl_module import RLModule

from bopo_ray.analysis.pareto import pareto_front
from bopo_ray.analysis.tables import ALWAYS_LARGE, ALWAYS_SMALL
from bopo_ray.files import write_json
from bopo_ray.method.reward import CostScale
from bopo_ray.pipeline.baselines import Policy, best_policy, dev_episodes, play_dev, specs
from bopo_ray.pipeline.card import describe_as
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings
from bopo_ray.pipeline.stages import load_policy
from bopo_ray.records import Budget, CostMode, Episode, Phase
from bopo_ray.rllib.router_module import RouterModule
from bopo_ray.store import EpisodeStore
from envs.base import Task

__all__ = [
    "ALL_LARGE", "Tried", "best_schedules", "calibrated", "for_each_lambda", "front_choice", "met_as_it_is",
    "offsets_at", "save_with", "weights_with",
]  # fmt: skip

FILE = "calibration.json"
"""In a run's folder: the number chosen for each policy."""
_BOUNDARIES = (ALWAYS_SMALL, ALWAYS_LARGE)
SCHEDULE_STEPS = {"first-large": (2, 5, 7, 10, 15, 20), "last-large": (2, 5, 10, 20)}
"""K of the schedules among which the best are chosen, beside the limits of large calls: the first-large of each
evaluation and one more; of last-large, which is hardly ever among the best, fewer, as each is played on dev tasks."""
ALL_LARGE = 1e3
"""An offset with which a router calls the large model at every step: the logarithm of the least probability is -708."""
BIAS = "policy.head.bias"
"""Of the acting router's state: what is added to its logits, [n_models]."""


def calibrated(run: Run, policies: Sequence[Policy]) -> list[Policy]:
    """The policies with the offset, and the limit of calls, that suits their lambda best; one that was trained at none,
    or at one of `Settings.train_lambdas`, becomes one for each.

    Plays each on dev tasks as it is, and with the offsets of `Settings.shares`, and with these under each of
    `Settings.call_limits`; by "price" the best mean of u - lambda * C_norm is taken, the first that was tried where
    several are as good, and by "front" what `front_choice` says. The policies as they are, where there are no shares.

    In a run under a budget all that is compared is played under it, like the evaluation, and under no other limit; once
    more without it each router says which offsets there are to choose from.
    """
    s = run.settings
    if not s.shares:
        return list(policies)
    wanted = [q for p in policies for q in for_each_lambda(p, s)]
    file = run.out / FILE
    chosen: dict[str, Tried] = {}
    if file.exists():
        known: dict[str, list[Any] | float] = json.loads(file.read_text())  # a number alone: before there were limits
        chosen = {name: Tried(*own) if isinstance(own, list) else Tried(own) for name, own in known.items()}
    if new := [p for p in wanted if p.name not in chosen]:
        if s.share_rule == "front":  # which all lambdas of a router share
            new = [p for p in wanted if p.folder in {q.folder for q in new}]
        chosen |= _choose(run, new)
        write_json(file, {name: list(own) for name, own in chosen.items()})
    found, folder = [], run.out / "policies"
    for p in wanted:
        own = chosen[p.name]
        name = own.name_of(p.name)
        saved = save_with(folder, p, name, lam=p.lam, offset=own.offset, call_limit=own.calls)
        found.append(dataclasses.replace(p, name=name, folder=saved, calls=own.calls))
    return found


def for_each_lambda(policy: Policy, s: Settings) -> list[Policy]:
    """The policy under the names and lambdas that it is to have an offset for."""
    if policy.lam is not None and not s.train_lambdas:
        return [policy]
    word = "lam" if policy.lam is None else "for"
    return [dataclasses.replace(policy, name=f"{policy.name}_{word}{x:g}", lam=x) for x in s.lambdas]


class Tried(NamedTuple):
    """What a router is tried with."""

    offset: float
    calls: int | None = None
    """Limit of large calls on a task."""

    def name_of(self, router: str) -> str:
        """The name of that router with this."""
        return f"{router}_offset{self.offset:g}" + ("" if self.calls is None else f"_calls{self.calls}")


def _choose(run: Run, wanted: Sequence[Policy]) -> dict[str, Tried]:
    s, greedy = run.settings, run.settings.decide == "greedy"
    tasks, store, tried = play_dev(run, ()), run.store("dev"), dict[Path, list[Tried]]()
    for policy in wanted:
        assert policy.folder is not None
        if policy.folder in tried:
            continue
        _play(run, policy.folder, Tried(0.0), tasks, None)
        met = met_as_it_is(store, policy.folder)
        offsets = dict.fromkeys([0.0, *offsets_at(met, s.shares, greedy)])
        tried[policy.folder] = [Tried(x) for x in sorted(offsets, key=abs)]
        if s.budget is None:
            offsets |= {ALL_LARGE: None}  # what no lambda needs, and a limit may: a schedule
            tried[policy.folder] += [Tried(x, n) for n in s.call_limits for x in sorted(offsets, key=abs)]
        for own in tried[policy.folder]:
            _play(run, policy.folder, own, tasks, s.budget)
    played = dev_episodes(run)
    scale = CostScale(s.cost_scale)
    points = _points(played, run.mode) if s.share_rule == "front" else {}
    chosen = {}
    for folder, each in tried.items():
        names = {own.name_of(folder.name): own for own in each}
        boundaries = [points[b] for b in _BOUNDARIES] if points else []
        shared = front_choice({n: points[n] for n in names}, boundaries, s.lambdas) if points else {}
        for policy in (p for p in wanted if p.folder == folder):
            assert policy.lam is not None
            if points and policy.name != folder.name:
                name = shared[policy.lam]
            else:
                name = best_policy(played, list(names), policy.lam, run.mode, scale)
            chosen[policy.name] = names[name]
    said = ", ".join(
        f"{name} {own.offset:+g}" + (f" (at most {own.calls} calls)" if own.calls else "")
        for name, own in chosen.items()
    )  # fmt: skip
    run.console.print(f"offsets of the larger models' logits, chosen on {len(tasks)} dev tasks: {said}")
    return chosen


def _play(run: Run, folder: Path, own: Tried, tasks: Sequence[Task], budget: Budget | None) -> None:
    """A router's dev episodes with this, under a budget or none, as far as they are not there."""
    tried, store = Policy(own.name_of(folder.name), "", calls=own.calls), run.store("dev")
    todo = [dataclasses.replace(x, phase=Phase.SELECTION) for x in specs(tasks, tried, run.settings, budget)]
    if store.missing(todo):
        run.play(f"calibrating {tried.name}", store, todo, weights_with(run, folder, own.offset))


def best_schedules(run: Run) -> list[Policy]:
    """Per lambda a schedule, chosen on dev tasks, which are played here, by the run's rule for routers."""
    s = run.settings
    lengths = {family: sorted({*steps, *s.call_limits}) for family, steps in SCHEDULE_STEPS.items()}
    names = [f"{family}({k})" for family, own in lengths.items() for k in own if k < s.max_steps]
    play_dev(run, names)
    played = dev_episodes(run)
    if s.shares and s.share_rule == "front":
        points = _points(played, run.mode)
        chosen = front_choice({n: points[n] for n in names}, [points[b] for b in _BOUNDARIES], s.lambdas)
    else:
        scale, among = CostScale(s.cost_scale), sorted((*_BOUNDARIES, *names))
        chosen = {lam: best_policy(played, among, lam, run.mode, scale) for lam in s.lambdas}
    return [Policy(f"best-schedule({lam:g})", "best-schedule", name) for lam, name in chosen.items()]


def weights_with(run: Run, folder: Path, offset: float) -> Any:
    """What a runner needs to act as the saved router with this offset."""
    weights = load_policy(run, folder)
    weights[BIAS] = weights[BIAS] + np.float32(offset) * np.arange(len(weights[BIAS]), dtype=np.float32)
    return weights


def met_as_it_is(dev: EpisodeStore, folder: Path) -> list[tuple[float, ...]]:
    """A saved router's distributions at the steps that it met on dev tasks without an offset.

    And without a budget, whose mask would stand in the place of what the router wants.
    """
    as_it_is = dev.read(Phase.SELECTION, Tried(0.0).name_of(folder.name))
    return [t.probabilities for e in as_it_is if e.spec.budget is None for t in e.steps]


def offsets_at(p_NM: ArrayLike, shares: Sequence[float], greedy: bool = True) -> list[float]:
    """The offsets with which a router calls a model above the smallest on these shares of N steps.

    Rounded to hundredths, so that the last bits of a probability, which vary, say nothing; each once, rising.

    Args:
        p_NM: its distributions over M models.
        shares: in (0, 1).
        greedy: it takes the most probable model; False: it draws, and a share is the mean probability of those above
            the smallest.
    """
    log_p_NM = np.log(np.maximum(np.asarray(p_NM, float), np.finfo(float).tiny))
    behind_NL = log_p_NM[:, :1] - log_p_NM[:, 1:]
    if greedy:
        offsets = np.quantile((behind_NL / np.arange(1, log_p_NM.shape[1])).min(1), shares)
    else:
        offsets = np.array([_drawn_at(behind_NL, share) for share in shares])
    return sorted({round(float(x), 2) + 0.0 for x in offsets})


def _drawn_at(behind_NL: NDArray[np.float64], share: float) -> float:
    """The offset with which models above the smallest have this mean probability, which rises with it: by bisection.

    Args:
        behind_NL: by how much the logits of the L models above the smallest are below that one's, at N steps.
        share: in (0, 1).
    """
    steps_L, low, high = np.arange(1, behind_NL.shape[1] + 1), -ALL_LARGE, ALL_LARGE
    while high - low > 1e-4:
        middle = (low + high) / 2
        logit_N = np.logaddexp.reduce(middle * steps_L - behind_NL, axis=1)
        p_large = float(np.exp(-np.logaddexp(0, -logit_N)).mean())
        low, high = (middle, high) if p_large < share else (low, middle)
    return (low + high) / 2


def front_choice(
    points: Mapping[str, tuple[float, float]], boundaries: Sequence[tuple[float, float]], lambdas: Sequence[float]
) -> dict[float, str]:
    """By lambda, one of the points of which as many as there are lambdas have the largest hypervolume together.

    They stand beside the boundary policies' points, which everyone has; the reference is the dearer of these. The
    smaller the lambda, the dearer its point; where there are fewer points than lambdas, the largest lambdas share the
    cheapest.

    Args:
        points: (cost, success) on dev tasks, by name; of sets that are as good, the first in this order is taken.
        boundaries: of always-small and always-large.
        lambdas: in any order.
    """
    names, size = list(points), min(len(lambdas), len(points))
    front = pareto_front(*zip(*points.values(), strict=True)).tolist()
    if len(front) >= size:
        best = _largest(list(points.values()), front, boundaries, size)
    else:  # what lies behind the front adds nothing, whichever it is
        best = [*front, *[i for i in range(len(names)) if i not in front][: size - len(front)]]
    dearest_first = sorted((names[i] for i in sorted(best)), key=lambda name: points[name], reverse=True)
    return {lam: dearest_first[min(i, len(best) - 1)] for i, lam in enumerate(sorted(lambdas))}


def _largest(
    points: Sequence[tuple[float, float]], front: Sequence[int], boundaries: Sequence[tuple[float, float]], size: int
) -> list[int]:
    """So many of the front's points as have the largest hypervolume together, by dynamic programming.

    Along a front each point counts from its own cost up to that of the next one chosen, so the best sets that begin
    with a point end in the best ones of those behind it. In whole fractions, so that equal sets are equal; of these
    that is taken which has the first point, in the order of `points`, that another lacks.
    """
    limit = Fraction(max(cost for cost, _ in boundaries) or 1.0)  # nothing costs anything: any width will do
    costs = [*(min(Fraction(points[i][0]), limit) for i in front), limit]
    known = [(Fraction(cost), Fraction(success)) for cost, success in boundaries]

    @cache
    def area(i: int, j: int) -> Fraction:
        """What the front's i-th point adds to the boundary policies from its own cost up to that of the j-th."""
        success, total = Fraction(points[front[i]][1]), Fraction(0)
        edges = sorted({costs[i], costs[j], *(cost for cost, _ in known if costs[i] < cost < costs[j])})
        for start, end in pairwise(edges):
            below = max([Fraction(0), *(other for cost, other in known if cost <= start)])
            total += (end - start) * max(success - below, Fraction(0))
        return total

    # of the sets that begin with the front's i-th point: the largest area, and the set in bits, the first the highest
    bits = [1 << (len(points) - 1 - i) for i in front]
    best = [(area(i, len(front)), bit) for i, bit in enumerate(bits)]
    for _ in range(size - 1):
        best = [
            max((area(i, j) + best[j][0], bits[i] | best[j][1]) for j in range(i + 1, len(best)))
            for i in range(len(best) - 1)
        ]
    chosen = max(best)[1]
    return [i for i, bit in zip(front, bits, strict=True) if chosen & bit]


def _points(episodes: Sequence[Episode], mode: CostMode) -> dict[str, tuple[float, float]]:
    """Mean cost, in USD or large calls, and success over tasks, by policy."""
    by: dict[str, dict[str, list[tuple[float, bool]]]] = {}
    unit = 1e6 if mode is CostMode.USD else 1
    for e in episodes:
        by.setdefault(e.spec.policy, {}).setdefault(e.spec.task.name, []).append((e.cost(mode) / unit, e.success))
    means = {name: np.mean([np.mean(own, 0) for own in tasks.values()], 0) for name, tasks in by.items()}
    return {name: (float(cost), float(success)) for name, (cost, success) in means.items()}


def save_with(folder: Path, policy: Policy, name: str, **how: Any) -> Path:
    """The policy's router, saved with how["offset"] under this name in `folder`, with its card."""
    assert policy.folder is not None
    saved = folder / name
    if not saved.exists():
        module: Any = RLModule.from_checkpoint(str(policy.folder.resolve()))
        assert isinstance(module, RouterModule)
        module.add_offset(how["offset"])
        temporary = saved.with_suffix(".tmp").resolve()
        shutil.rmtree(temporary, ignore_errors=True)
        module.save_to_path(str(temporary))
        describe_as(policy.folder, temporary, name, **how)
        temporary.rename(saved)
    return saved
