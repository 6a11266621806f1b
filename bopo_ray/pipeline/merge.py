"""One router of several training seeds: the mean of their weights. [ours]

The seeds of a point begin with the same BoSFT and end near it, so the mean of their weights is a router, too, with less
of what each has learned by chance (policies are merged so by Ramé et al. 2024, arXiv 2406.16768). It is the one to
deploy of a run with several seeds: they are different routers, and only their mean is known well.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from ray.rllib.core.rl_module import RLModule

from bopo_ray.pipeline.baselines import Policy
from bopo_ray.pipeline.card import describe
from bopo_ray.pipeline.run import Run
from bopo_ray.rllib.router_module import RouterModule

__all__ = ["MERGED", "mean_router", "merged"]

MERGED = "-merged"
"""Behind the method's name."""


def merged(run: Run, policies: Iterable[Policy]) -> list[Policy]:
    """For each method and lambda the mean of its seeds' routers, saved beside them; made again when seeds are added."""
    points: dict[tuple[str, float | None], list[Policy]] = {}
    for policy in policies:
        if policy.seed is not None:
            points.setdefault((policy.method, policy.lam), []).append(policy)
    return [_of(run, own) for own in points.values() if len(own) > 1]


def _of(run: Run, seeds: Sequence[Policy]) -> Policy:
    first = seeds[0]
    method, numbers = f"{first.method}{MERGED}", sorted(p.seed for p in seeds if p.seed is not None)
    name = f"{method}_lam{first.lam:g}_seeds{'+'.join(map(str, numbers))}"
    folder = run.out / "policies" / name
    if not folder.exists():
        module = mean_router([p.folder for p in seeds if p.folder])
        temporary = folder.with_suffix(".tmp").resolve()
        shutil.rmtree(temporary, ignore_errors=True)
        module.save_to_path(str(temporary))
        describe(run, temporary, name, method=method, lam=first.lam, seeds=", ".join(map(str, numbers)))
        temporary.rename(folder)
    return Policy(name, method, lam=first.lam, folder=folder)


def mean_router(folders: Sequence[Path]) -> RouterModule:
    """The mean of what saved routers of one shape would act with."""
    routers: list[Any] = [RLModule.from_checkpoint(str(folder.resolve())) for folder in folders]
    found = routers[0]
    assert isinstance(found, RouterModule)
    states = [router.average.state_dict() for router in routers]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    for policy in (found.policy, found.average):
        policy.load_state_dict(mean)
    return found
