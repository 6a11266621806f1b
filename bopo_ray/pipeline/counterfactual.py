"""What one decision is worth: the same episode again, with another model at a single step. [ours]

Up to that step the two episodes are one and the same, since a call with the same history and sample index has the same
reply; so the difference is what the model at that step made of it, and chance after it. Played on dev tasks: what is
learned here may guide the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.run import Run
from bopo_ray.records import Episode, EpisodeSpec, Phase
from bopo_ray.routers import Moment, Router, RouterName
from bopo_ray.routers.cascade import failures
from bopo_ray.routers.protocol import one_hot
from envs.base import Split, Task

__all__ = ["Swapped", "play_swaps"]


@dataclass(frozen=True, slots=True)
class Swapped:
    """A schedule with the other boundary model at one step."""

    base: Router
    step: int

    def __call__(self, moment: Moment) -> tuple[float, ...]:
        chosen = self.base(moment)
        if moment.step != self.step:
            return chosen
        return one_hot(0 if chosen[-1] == 1.0 else moment.n_models - 1, moment.n_models)


def play_swaps(run: Run, base: RouterName, steps: Sequence[int], tasks: int, samples: int) -> pd.DataFrame:
    """Plays `base` on dev tasks, and again with the other model at each of `steps`; stored episodes are not repeated.

    Args:
        run: holds the store "counterfactual".
        base: a schedule, which decides by the step alone.
        steps: counted from 0.
        tasks: of the dev split.
        samples: episodes of `base` per task.

    Returns:
        A row per base episode and step that it reached: task, member, step, large (whether `base` has LARGE there),
        after_failure (of the step before), outcome_small, outcome_large, cost_small_usd, cost_large_usd.

    Raises ConfigError for a base that is no schedule.
    """
    if base.family not in ("always-small", "always-large", "first-large", "last-large"):
        raise ConfigError(
            f"base={str(base)!r}: need a schedule: always-small, always-large, first-large:K or last-large:K; set it "
            "with --base"
        )
    schedule, store = base.make(), run.store("counterfactual")
    chosen = run.tasks(Split.DEV, tasks)
    plain = [_spec(t, str(base), str(base), m) for t in chosen for m in range(samples)]
    run.play(f"{base}", store, plain)
    whole = {(e.spec.task.name, e.spec.member): e for e in store.read(policy=str(base))}
    own = [whole[s.task.name, s.member] for s in plain]
    routers: dict[str, Router] = {f"{base} but {t}": Swapped(schedule, t) for t in steps}
    swaps = [
        _spec(e.spec.task, name, name, e.spec.member)
        for e in own
        for name, t in zip(routers, steps, strict=True)
        if t < len(e.steps)
    ]
    run.play(f"{base} with one step swapped", store, swaps, routers=routers)
    other = {(e.spec.policy, e.spec.task.name, e.spec.member): e for e in store.read()}
    rows = []
    for spec in swaps:
        step = steps[list(routers).index(spec.policy)]
        rows.append(_row(whole[spec.task.name, spec.member], other[spec.policy, spec.task.name, spec.member], step))
    return pd.DataFrame(rows)


def _spec(task: Task, policy: str, router: str, member: int) -> EpisodeSpec:
    return EpisodeSpec(task, Phase.SELECTION, policy, 0, member, 0, router=router)


def _row(base: Episode, swapped: Episode, step: int) -> dict[str, object]:
    if [s.reply for s in base.steps[:step]] != [s.reply for s in swapped.steps[:step]]:
        raise ConfigError(
            f"task {base.spec.task.name!r}: the same calls had other replies before step {step}; counterfactuals need "
            "models whose replies are stored or repeatable"
        )
    large = base.steps[step].model > 0
    small, big = (swapped, base) if large else (base, swapped)
    failed = failures(tuple((s.action, s.observation) for s in base.steps[:step]))
    return {
        "task": base.spec.task.name, "member": base.spec.member, "step": step, "large": large,
        "after_failure": bool(failed and failed[-1]), "outcome_small": small.outcome, "outcome_large": big.outcome,
        "cost_small_usd": small.cost_microusd / 1e6, "cost_large_usd": big.cost_microusd / 1e6,
    }  # fmt: skip
