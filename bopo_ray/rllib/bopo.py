"""BoPO as an RLlib Algorithm: sample groups, compare them with the boundaries, learn, hand the weights back.

Always true here: a group with a failed episode is filled up, or dropped whole and counted; what a seed decides (which
tasks, which samples, the order of rows) depends on (seed, iteration) alone, so that a restored run continues bit for
bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray.exceptions import RayTaskError
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_LEARNER, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import LEARNER_RESULTS

from bopo_ray.errors import ConfigError, EngineError, SpendLimitError
from bopo_ray.method.advantage import AdvantageMode, Anchor, boundary_anchor, group_advantage
from bopo_ray.method.averaging import averaging_weight
from bopo_ray.method.reward import CostScale, beta_warning, cost_ranges, normalised_cost, reward
from bopo_ray.method.taxonomy import BoundaryStats, boundary_stats, class_shares
from bopo_ray.records import CostMode, Difficulty, Episode, EpisodeSpec, Phase, spawn_seed
from bopo_ray.rllib.batch import Group, bopo_batch
from bopo_ray.rllib.collect import Fleet
from bopo_ray.rllib.config import RouterAlgorithmConfig, ask_learners
from bopo_ray.rllib.learner import BoPOTorchLearner
from bopo_ray.rllib.open_desk import DeskConfig, borrow_environment
from bopo_ray.rllib.overheard import Overheard
from bopo_ray.rllib.placement import trial_request
from bopo_ray.rllib.runner import Failure
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL
from bopo_ray.store import EpisodeStore

__all__ = ["BoPO", "BoPOConfig", "Boundary", "module_state", "read_boundaries"]

log = logging.getLogger(__name__)
REFILLS = 2
"""So often a group whose episodes failed is filled up, before it is dropped."""
GOLDEN = (5**0.5 - 1) / 2
"""The fractions of its multiples fill [0, 1) evenly, however many there are."""


class BoPOConfig(RouterAlgorithmConfig):
    """Settings of BoPO; defaults are the method's."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class or BoPO)
        self.lam = 0.3
        """lambda: price of the normalised cost, in units of success; at least 0."""
        self.beta = 0.5
        """Bonus for success on Hard tasks."""
        self.advantage: str = AdvantageMode.HYBRID
        """How rewards become advantages, see `AdvantageMode`."""
        self.cost_mode: str = CostMode.USD
        """Unit of C(tau)."""
        self.cost_scale: str = CostScale.BOUNDARIES
        """What normalises it, see `CostScale`."""
        self.group_size = 8
        """G: policy episodes per task and update."""
        self.tasks_per_update = 16
        """Groups per update."""
        self.async_share = 1.0
        """An update begins to learn when this share of its groups is back; the next one learns from the rest,
        off-policy. 1: it waits for all of them."""
        self.difficulty_mix: dict[str, float] = {"hard": 2, "easy": 1, "intractable": 1}
        """Weights of the classes among the groups, see `class_shares`."""
        self.easy_at: int | None = None
        """Successes of always-small from which a task is Easy; None: `easy_from` its rollouts, 3 of 5."""
        self.clip, self.kl, self.entropy, self.anchor = 0.2, 0.02, 0.005, 0.5
        """Coefficients of the loss, see `LossConfig`."""
        self.boundary_dir: str | None = None
        """Folder of boundary episodes: the tasks to learn on, their costs and anchors."""
        self.price_hash = ""
        """Price table that they were billed at."""
        self.episode_dir: str | None = None
        """Folder for the policy episodes, one store per trial; None keeps none."""
        self.t_max = 40
        """Step limit of the benchmark."""
        self.total_updates = 0
        """Updates of the whole training, by which the learning rate rises and falls; 0: it stays as it is."""
        self.resume_from: str | None = None
        """Checkpoint folder of an interrupted run to continue."""
        self.lr = 3e-4
        self.num_epochs, self.minibatch_size = 1, 128

    @override(RouterAlgorithmConfig)
    def update_from_dict(self, config_dict: Mapping[str, Any]) -> BoPOConfig:
        """As RLlib's; a key `point` (one cell of a sweep) sets lam, advantage, seed and resume_from together."""
        settings = dict(config_dict)
        settings.update(settings.pop("point", {}))
        return super().update_from_dict(settings)  # type: ignore[no-any-return]

    @override(RouterAlgorithmConfig)
    def get_default_learner_class(self) -> type:
        return BoPOTorchLearner

    @override(RouterAlgorithmConfig)
    def validate(self) -> None:
        super().validate()
        for name, ok, rule in (
            ("lam", self.lam >= 0, "need lambda >= 0"),
            ("beta", self.beta >= 0, "need beta >= 0"),
            ("group_size", self.group_size >= 2, "need at least 2 episodes to compare"),
            ("tasks_per_update", self.tasks_per_update >= 1, "need at least 1"),
            ("async_share", 0 < self.async_share <= 1, "need a share in (0, 1]"),
            (
                "total_updates",
                self.async_share == 1 or self.total_updates > 0,
                "need the number of updates where async_share is below 1: the last one waits for all groups",
            ),
            ("advantage", self.advantage in set(AdvantageMode), f"one of {', '.join(AdvantageMode)}"),
        ):
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)}: {rule}")


@dataclass
class OpenGroup:
    """A group of episodes that is being played."""

    due: dict[str, EpisodeSpec]
    """What has not arrived, by id."""
    results: list[Episode | Failure] = field(default_factory=list)


class BoPO(Algorithm):
    """Boundary-guided policy optimisation, section 4 of the method."""

    config: BoPOConfig

    @classmethod
    @override(Algorithm)
    def default_resource_request(cls, config: Any) -> Any:
        """As RLlib's, with memory, and the learner on the node that has the run's files."""
        request = super().default_resource_request(config)
        settings = cls.get_default_config().update_from_dict(config)
        return trial_request(request, settings.home, settings.memory_per_env_runner, settings.memory_for_main_process)

    @classmethod
    @override(Algorithm)
    def get_default_config(cls) -> BoPOConfig:
        return BoPOConfig()

    @override(Algorithm)
    def setup(self, config: Any) -> None:
        self.updates = 0
        self.refused = ""
        self.overheard = Overheard()
        self.promotions: dict[str, int] = {}
        self.open: dict[int, OpenGroup] = {}
        """Groups that are being played, by `EpisodeSpec.group`."""
        self.fleet: Fleet | None = None
        self.store: EpisodeStore | None = None
        borrow_environment(config["env_config"].get("desk") or DeskConfig())  # a backbone is found by it
        super().setup(config)
        cfg = self.config
        if cfg.boundary_dir is None:
            raise ConfigError("boundary_dir=None: BoPO needs the folder of the boundary episodes")
        self.boundaries = read_boundaries(Path(cfg.boundary_dir), cfg.price_hash, CostMode(cfg.cost_mode))
        stats = {k: b.stats for k, b in self.boundaries.items()}
        self.ranges = cost_ranges(stats, CostMode(cfg.cost_mode), CostScale(cfg.cost_scale))
        doubtful = beta_warning(stats, self.ranges, cfg.beta, cfg.lam, cfg.easy_at)
        if doubtful:
            log.warning(
                "lambda=%g, beta=%g: on %d Hard tasks a success costs more than it earns (first: %s)",
                cfg.lam, cfg.beta, len(doubtful), doubtful[0],
            )  # fmt: skip
        ask_learners(self.learner_group, lambda learner: learner.set_reference())
        if cfg.resume_from:
            self.restore_from_path(cfg.resume_from)

    def difficulty(self, task: str) -> Difficulty:
        """The task's class as of now: a success in training promotes Intractable to Hard."""
        return self.boundaries[task].stats.promoted(self.promotions.get(task, 0)).difficulty(self.config.easy_at)

    @override(Algorithm)
    def training_step(self) -> None:
        cfg = self.config
        tasks = self._choose_tasks()
        policy = f"bopo-{cfg.advantage}(lam={cfg.lam:g},seed={cfg.seed or 0})"
        try:
            played = self._play_groups(tasks, policy)
        except SpendLimitError as error:  # no update: the run stops here and goes on when there is money again
            log.warning("update %d: %s", self.updates, error)
            self.metrics.log_dict({"updates": self.updates, "spend_limit": 1}, window=1)
            return
        except ConfigError as error:  # another attempt would meet the same: it is for the user to mend
            self.refused = str(error.cause if isinstance(error, RayTaskError) else error)
            self.metrics.log_value("updates", self.updates, window=1)
            return
        first = self.updates * cfg.tasks_per_update
        whole = {i: [e for e in group if isinstance(e, Episode)] for i, group in played.items()}
        groups = [self._group(g, stale=i < first) for i, g in whole.items() if len(g) == cfg.group_size]
        if not groups:
            failures = [str(e.reason) for g in played.values() for e in g if not isinstance(e, Episode)]
            raise EngineError(f"no group of update {self.updates} could be played: {failures[0]}")
        if cfg.episode_dir is not None:
            if self.store is None:  # opened once: it reads the ids of all that is there
                self.store = EpisodeStore(Path(cfg.episode_dir) / self._trial_folder(), cfg.price_hash)
            self.store.append([e for g in whole.values() for e in g])
        self._log_rollouts([e for g in groups for e in g.episodes])
        taught = [g for g in groups if np.any(g.advantages) or g.anchors]
        self.metrics.log_dict(
            {
                "skipped_groups": float(len(groups) - len(taught)),
                "dropped_groups": float(len(whole) - len(groups)),
                "open_groups": float(len(self.open)),
                "stale_groups": float(sum(g.stale for g in groups)),
                "stale_share": sum(g.stale for g in groups) / len(groups),
                "staleness": float(max(self.updates - i // cfg.tasks_per_update for i in whole)),
                "anchored_groups": float(sum(bool(g.anchors) for g in groups)),
            },
            key="groups",
            window=1,
        )
        rng = np.random.default_rng(spawn_seed("rows", cfg.seed, self.updates))
        learners = max(1, cfg.num_learners)
        batch = bopo_batch(taught, cfg.t_max, cfg.reader, cfg.minibatch_size, learners, rng) if taught else None
        if batch is not None:
            results = self.learner_group.update(
                batch=batch.data, num_epochs=cfg.num_epochs, minibatch_size=batch.rows, shuffle_batch_per_epoch=False,
                progress=(self.updates / cfg.total_updates, 1 / cfg.total_updates) if cfg.total_updates else None,
            )  # fmt: skip
            self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self.updates += 1
        weight = averaging_weight(self.updates)
        ask_learners(self.learner_group, lambda learner: learner.average_in(weight))
        self.metrics.log_value("updates", self.updates, window=1)

    @override(Algorithm)
    def step(self) -> dict[str, Any]:
        """As RLlib's; `refused` is in the result when a model refuses every call, and says why; `warned`, in lines,
        where something was to be warned of."""
        result: dict[str, Any] = super().step()
        warned = "\n".join(self.overheard.take())
        return result | ({"refused": self.refused} if self.refused else {}) | ({"warned": warned} if warned else {})

    @override(Algorithm)
    def cleanup(self) -> None:
        self.overheard.close()
        super().cleanup()

    def _play_groups(self, tasks: Sequence[str], policy: str) -> dict[int, list[Episode | Failure]]:
        """The groups to learn from now, by index: those that the last update left, and enough of this one's.

        `group_size` episodes of each task; one that failed is replaced by another, twice at most. The members of a
        group share the sample index of the model calls: what a model says to the same history is the same for all of
        them, so that they differ by the router's choices alone (less noise in the advantages), and what they do alike
        is paid once; two groups of one task have two, or the second would be the first again. [ours] Raises
        SpendLimitError, and ConfigError when a model refuses every call; what was played by then is kept.
        """
        cfg = self.config
        first = self.updates * cfg.tasks_per_update
        for i, name in enumerate(tasks):
            index, sample = first + i, self._sample(tasks[:i].count(name))
            if index not in self.open:
                specs = [
                    EpisodeSpec(self.boundaries[name].task, Phase.POLICY, policy, index, member, cfg.seed or 0,
                                sample=sample)
                    for member in range(cfg.group_size)
                ]  # fmt: skip
                self.open[index] = OpenGroup({s.id: s for s in specs})
        last = self.updates + 1 == cfg.total_updates
        wanted = len(tasks) if last else math.ceil(cfg.async_share * len(tasks))

        def enough() -> bool:
            late = any(group.due for index, group in self.open.items() if index < first)
            return not late and sum(not group.due for index, group in self.open.items() if index >= first) >= wanted

        if self.fleet is None:
            self.fleet = Fleet(self.env_runner_group, self._arrived)
        self.fleet.add([s for group in self.open.values() for s in group.due.values() if s.id not in self.fleet.due])
        try:
            self.fleet.play((module_state(self), self.updates + 1, None), enough)
        except BaseException:
            self.fleet = None  # its runners may have given up what they played
            raise
        whole = [index for index, group in sorted(self.open.items()) if not group.due]
        return {i: sorted(self.open.pop(i).results, key=lambda r: r.spec.member) for i in whole}

    def _arrived(self, result: Episode | Failure) -> None:
        """Files a result with its group; a failed episode is replaced there."""
        group, spec, more = self.open[result.spec.group], result.spec, self.config.group_size
        group.results.append(result)
        del group.due[spec.id]
        if isinstance(result, Failure) and spec.member < REFILLS * more:
            again = replace(spec, member=spec.member + more)
            group.due[again.id] = again
            assert self.fleet is not None
            self.fleet.add([again])

    def _sample(self, nth: int = 0) -> int:
        """Sample index of the model calls of this update's `nth` group of a task: the same in all trials of a seed,
        another in each seed, and none of those of the boundary and stratified rollouts, by which a task is Hard."""
        return (1 + (self.config.seed or 0)) * 1_000_000 + nth * 10_000 + self.updates

    def _trial_folder(self) -> str:
        return f"{self.config.advantage}_lam{self.config.lam:g}_seed{self.config.seed or 0}"

    def _choose_tasks(self) -> list[str]:
        """Tasks of this update: classes spread evenly by their shares, each class in turns of its own shuffled list."""
        cfg = self.config
        classes: dict[Difficulty, list[str]] = {}
        for name in sorted(self.boundaries):
            classes.setdefault(self.difficulty(name), []).append(name)
        shares = class_shares(cfg.difficulty_mix, {d: len(names) for d, names in classes.items()})
        if not shares:
            raise ConfigError(f"difficulty_mix={cfg.difficulty_mix}: none of the classes {sorted(classes)} has a share")
        first = self.updates * cfg.tasks_per_update
        spread = np.arange(first + cfg.tasks_per_update) * GOLDEN % 1
        of_group = np.searchsorted(np.cumsum(list(shares.values()))[:-1], spread, side="right")
        chosen = []
        for i, (difficulty, names) in enumerate((d, classes[d]) for d in shares):
            begin, end = (int((of_group[:n] == i).sum()) for n in (first, len(of_group)))
            for k in range(begin, end):
                turn, position = divmod(k, len(names))
                order = np.random.default_rng(spawn_seed("tasks", cfg.seed, difficulty, turn)).permutation(len(names))
                chosen.append(names[order[position]])
        return chosen

    def _group(self, episodes: Sequence[Episode], stale: bool) -> Group:
        """Rewards and advantages of one task's episodes."""
        cfg, name = self.config, episodes[0].spec.task.name
        mode, boundary, cost_range = CostMode(cfg.cost_mode), self.boundaries[name], self.ranges[name]
        successes = sum(e.success for e in episodes)
        if successes and self.difficulty(name) is Difficulty.INTRACTABLE:
            self.promotions[name] = self.promotions.get(name, 0) + successes
        hard = self.difficulty(name) is Difficulty.HARD
        outcomes = np.array([e.outcome for e in episodes])
        cost = normalised_cost([e.cost(mode) for e in episodes], cost_range)
        rewards = reward(outcomes, hard, cost, cfg.lam, cfg.beta)
        imitable = [boundary.imitable(i) for i in range(2)]
        anchors: list[Anchor] = [
            boundary_anchor(
                [e.outcome for e in rollouts], [e.cost(mode) for e in rollouts], hard, cost_range, cfg.lam, cfg.beta,
                bool(imitable[i]),
            )
            for i, rollouts in enumerate((boundary.small, boundary.large))
        ]  # fmt: skip
        advantage = group_advantage(rewards, outcomes, anchors, AdvantageMode(cfg.advantage))
        sample = episodes[0].spec.sample
        again = () if sample == self._sample() else (sample,)  # of several groups of a task each draws its own
        rng = np.random.default_rng(spawn_seed("anchors", cfg.seed, self.updates, name, *again))
        pulls = tuple(
            (imitable[i][int(rng.integers(len(imitable[i])))], float(a))
            for i, a in enumerate(advantage.anchor_advantages)
            if a > 0
        )
        for value in rewards:
            self.metrics.log_value(("rollouts", "reward"), float(value), reduce="mean", clear_on_reduce=True)
        return Group(tuple(episodes), advantage.advantages, pulls, stale)

    def _log_rollouts(self, episodes: Sequence[Episode]) -> None:
        for e in episodes:
            steps = max(1, len(e.steps))
            figures = {
                "success": float(e.success),
                "outcome": e.outcome,
                "cost_usd": e.cost_microusd / 1e6,
                "large_calls": float(e.large_calls),
                "steps": float(len(e.steps)),
                "share_large": e.large_calls / steps,
            }
            for key in ("rollouts", f"rollouts_{self.difficulty(e.spec.task.name)}"):
                for name, value in figures.items():
                    self.metrics.log_value((key, name), value, reduce="mean", clear_on_reduce=True)
        for name, total in (
            ("episodes", len(episodes)),
            ("calls", sum(len(e.steps) for e in episodes)),
            ("spent_microusd", sum(e.cost_microusd for e in episodes)),
        ):
            self.metrics.log_value(("spend", name), total, reduce="lifetime_sum")

    # -- checkpoints ------------------------------------------------------------------------------------------------

    @override(Algorithm)
    def save_checkpoint(self, checkpoint_dir: str) -> Any:
        """As RLlib's; then, last of all, `updates.json`: a checkpoint without it is not whole."""
        result = super().save_checkpoint(checkpoint_dir)
        (Path(checkpoint_dir) / "updates.json").write_text(str(self.updates))
        return result

    @override(Algorithm)
    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        mine = {"updates": self.updates, "promotions": self.promotions, "open": self.open}
        return super().get_state(*args, **kwargs) | {"bopo": mine}

    @override(Algorithm)
    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        if "bopo" in state:
            self.updates, self.promotions = state["bopo"]["updates"], dict(state["bopo"]["promotions"])
            self.open, self.fleet = dict(state["bopo"].get("open", {})), None


class Boundary:
    """The cached boundary rollouts of one task."""

    def __init__(self, small: Sequence[Episode], large: Sequence[Episode], mode: CostMode) -> None:
        self.small, self.large = tuple(small), tuple(large)
        self.task = small[0].spec.task
        self.stats: BoundaryStats = boundary_stats(small, large, mode)

    def imitable(self, boundary: int) -> tuple[Episode, ...]:
        """Rollouts that an anchor term may imitate: of LARGE successes only; of SMALL successes if there are any."""
        rollouts = (self.small, self.large)[boundary]
        successes = tuple(e for e in rollouts if e.success)
        return successes or (() if boundary else rollouts)


def read_boundaries(folder: Path, price_hash: str, mode: CostMode) -> dict[str, Boundary]:
    """The boundary episodes of a folder, by task; raises ConfigError when there is none."""
    by_task: dict[str, dict[str, list[Episode]]] = {}
    for e in EpisodeStore(folder, price_hash).read(Phase.BOUNDARY):
        by_task.setdefault(e.spec.task.name, {ALWAYS_SMALL: [], ALWAYS_LARGE: []})[e.spec.policy].append(e)
    found = {
        name: Boundary(b[ALWAYS_SMALL], b[ALWAYS_LARGE], mode)
        for name, b in sorted(by_task.items())
        if b[ALWAYS_SMALL] and b[ALWAYS_LARGE]
    }
    if not found:
        raise ConfigError(f"{folder} holds no task with boundary rollouts of both models; run the boundary stage first")
    return found


def module_state(algorithm: Algorithm) -> dict[str, Any]:
    """The acting copy of the router's weights, as numpy arrays."""
    state = algorithm.learner_group.get_state(
        components=f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}", inference_only=True
    )
    weights: dict[str, Any] = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
    return weights
