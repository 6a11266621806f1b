"""How readily a trained router calls the larger models: chosen on dev tasks for each lambda. [ours]

What is chosen is one number, added to the logit of model i of the pool i times. It moves a router along its own
frontier without training: a router says where the large model is worth more, and only then how much of it is wanted.
The router that is evaluated has the number in its weights; it is a folder of its own beside the trained one.

Routers differ in scale, and in how much of the large model they were left with, so the numbers to choose from are each
router's own: those with which it would call a larger model at given shares of the steps that it has met on dev tasks.

By "price" a lambda gets the number that earns the most at it. Where success costs much the same all along a router's
frontier, each lambda then chooses one end, and what lies between is never played; by "front" the lambdas that a router
serves share the numbers whose points have the largest hypervolume together (one that was trained for a lambda of its
own is chosen by price).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from ray.rllib.core.rl_module import RLModule

from bopo_ray.analysis.pareto import Reference, hypervolume
from bopo_ray.analysis.tables import ALWAYS_LARGE, ALWAYS_SMALL
from bopo_ray.method.reward import CostScale
from bopo_ray.pipeline.baselines import Policy, best_policy, play_dev, specs
from bopo_ray.pipeline.card import describe_as
from bopo_ray.pipeline.run import Run, write_json
from bopo_ray.pipeline.settings import Settings
from bopo_ray.pipeline.stages import load_policy
from bopo_ray.records import Episode, Phase
from bopo_ray.rllib.router_module import RouterModule
from bopo_ray.store import EpisodeStore
from envs.base import Task

__all__ = [
    "calibrated", "for_each_lambda", "front_choice", "met_as_it_is", "offsets_at", "save_with", "weights_with",
    "with_offset",
]  # fmt: skip

FILE = "calibration.json"
"""In a run's folder: the number chosen for each policy."""
_BOUNDARIES = (ALWAYS_SMALL, ALWAYS_LARGE)
BIAS = "policy.head.bias"
"""Of the acting router's state: what is added to its logits, [n_models]."""


def calibrated(run: Run, policies: Sequence[Policy]) -> list[Policy]:
    """The policies with the offset that suits their lambda best; one that was trained at none, or at one of
    `Settings.train_lambdas`, becomes one for each.

    Plays each on dev tasks as it is, and with the offsets of `Settings.shares`; by "price" the best mean of
    u - lambda * C_norm is taken, the smallest offset where several are as good, and by "front" what `front_choice`
    says. The policies as they are, where there are no shares.
    """
    s = run.settings
    if not s.shares:
        return list(policies)
    wanted = [q for p in policies for q in for_each_lambda(p, s)]
    file = run.out / FILE
    offsets: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    if new := [p for p in wanted if p.name not in offsets]:
        if s.share_rule == "front":  # which all lambdas of a router share
            new = [p for p in wanted if p.folder in {q.folder for q in new}]
        offsets |= _choose(run, new)
        write_json(file, offsets)
    found, folder = [], run.out / "policies"
    for p in wanted:
        offset = offsets[p.name]
        name = f"{p.name}_offset{offset:g}"
        found.append(dataclasses.replace(p, name=name, folder=save_with(folder, p, name, lam=p.lam, offset=offset)))
    return found


def for_each_lambda(policy: Policy, s: Settings) -> list[Policy]:
    """The policy under the names and lambdas that it is to have an offset for."""
    if policy.lam is not None and not s.train_lambdas:
        return [policy]
    word = "lam" if policy.lam is None else "for"
    return [dataclasses.replace(policy, name=f"{policy.name}_{word}{x:g}", lam=x) for x in s.lambdas]


def _choose(run: Run, wanted: Sequence[Policy]) -> dict[str, float]:
    s = run.settings
    tasks, store, tried = play_dev(run, ()), run.store("dev"), dict[Path, list[float]]()
    for policy in wanted:
        assert policy.folder is not None
        if policy.folder in tried:
            continue
        own = tried[policy.folder] = [0.0]
        _play(run, policy.folder, 0.0, tasks)
        own += [x for x in offsets_at(met_as_it_is(store, policy.folder), s.shares) if x]
        for offset in own[1:]:
            _play(run, policy.folder, offset, tasks)
    played = list(store.read(Phase.SELECTION))
    scale = CostScale(s.cost_scale)
    points = _points(played) if s.share_rule == "front" else {}
    chosen = {}
    for policy in wanted:
        assert policy.folder is not None and policy.lam is not None
        names = {with_offset(policy.folder, offset): offset for offset in sorted(tried[policy.folder], key=abs)}
        if points and policy.name != policy.folder.name:
            name = front_choice({n: points[n] for n in names}, [points[b] for b in _BOUNDARIES], s.lambdas)[policy.lam]
        else:
            name = best_policy(played, list(names), policy.lam, run.mode, scale)
        chosen[policy.name] = names[name]
    said = ", ".join(f"{name} {offset:+g}" for name, offset in chosen.items())
    run.console.print(f"offsets of the larger models' logits, chosen on {len(tasks)} dev tasks: {said}")
    return chosen


def _play(run: Run, folder: Path, offset: float, tasks: Sequence[Task]) -> None:
    """A router's dev episodes with this offset, as far as they are not there."""
    tried, store = Policy(with_offset(folder, offset), ""), run.store("dev")
    todo = [dataclasses.replace(x, phase=Phase.SELECTION) for x in specs(tasks, tried, run.settings, None)]
    if store.missing(todo):
        run.play(f"calibrating {tried.name}", store, todo, weights_with(run, folder, offset))


def weights_with(run: Run, folder: Path, offset: float) -> Any:
    """What a runner needs to act as the saved router with this offset."""
    weights = load_policy(run, folder)
    weights[BIAS] = weights[BIAS] + np.float32(offset) * np.arange(len(weights[BIAS]), dtype=np.float32)
    return weights


def met_as_it_is(dev: EpisodeStore, folder: Path) -> list[tuple[float, ...]]:
    """A saved router's distributions at the steps that it met on dev tasks without an offset."""
    return [t.probabilities for e in dev.read(Phase.SELECTION, with_offset(folder, 0.0)) for t in e.steps]


def offsets_at(p_NM: ArrayLike, shares: Sequence[float]) -> list[float]:
    """The offsets with which a greedy router calls a model above the smallest on these shares of N steps.

    Rounded to hundredths, so that the last bits of a probability, which vary, say nothing; each once, rising.

    Args:
        p_NM: its distributions over M models.
        shares: in (0, 1]; 1 is always-large, where the steps are like these.
    """
    log_p_NM = np.log(np.maximum(np.asarray(p_NM, float), np.finfo(float).tiny))
    needed_N = ((log_p_NM[:, :1] - log_p_NM[:, 1:]) / np.arange(1, log_p_NM.shape[1])).min(1)
    return sorted({round(float(x), 2) + 0.0 for x in np.quantile(needed_N, shares)})


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
    reference = Reference(max(cost for cost, _ in boundaries))

    def volume(names: Sequence[str]) -> float:
        return hypervolume(*zip(*boundaries, *(points[n] for n in names), strict=True), reference)

    best = max(combinations(points, min(len(lambdas), len(points))), key=volume)
    dearest_first = sorted(best, key=lambda name: points[name], reverse=True)
    return {lam: dearest_first[min(i, len(best) - 1)] for i, lam in enumerate(sorted(lambdas))}


def _points(episodes: Sequence[Episode]) -> dict[str, tuple[float, float]]:
    """Mean cost in USD and success over tasks, by policy."""
    by: dict[str, dict[str, list[tuple[float, bool]]]] = {}
    for e in episodes:
        by.setdefault(e.spec.policy, {}).setdefault(e.spec.task.name, []).append((e.cost_microusd / 1e6, e.success))
    means = {name: np.mean([np.mean(own, 0) for own in tasks.values()], 0) for name, tasks in by.items()}
    return {name: (float(cost), float(success)) for name, (cost, success) in means.items()}


def with_offset(folder: Path, offset: float) -> str:
    """The name of a saved router with an offset."""
    return f"{folder.name}_offset{offset:g}"


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
