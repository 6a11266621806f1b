"""The oracle: plays the cheapest known success of each task again.

It has seen the answers: nobody wins more, or as much for less. It is one point, so a frontier of several may still have
more hypervolume.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bopo_ray.records import CostMode, Episode
from bopo_ray.routers.protocol import Moment, one_hot

__all__ = ["Oracle", "oracle"]


@dataclass(frozen=True, slots=True)
class Oracle:
    """Repeats choices; the same choices lead to the same calls, which are stored, and so to the same episode."""

    choices: Mapping[tuple[str, int], tuple[int, ...]]
    """By task and member: the model of each step."""

    def __call__(self, moment: Moment) -> tuple[float, ...]:
        known = self.choices.get((moment.task, moment.member), ())
        return one_hot(known[moment.step] if moment.step < len(known) else 0, moment.n_models)


def oracle(episodes: Iterable[Episode], mode: CostMode = CostMode.USD) -> Oracle:
    """The cheapest success among a task's episodes; where there is none, the cheapest failure.

    Costs are in the unit of `mode`; ties: fewer steps, then the smaller id. Known is what was played here: more
    policies make a better oracle.
    """
    best: dict[tuple[str, int], tuple[tuple[bool, int, int, str], Episode]] = {}
    for e in episodes:
        key = e.spec.task.name, e.spec.member
        rank = not e.success, e.cost(mode), len(e.steps), e.spec.id
        if key not in best or rank < best[key][0]:
            best[key] = rank, e
    return Oracle({key: tuple(s.model for s in e.steps) for key, (_, e) in best.items()})
