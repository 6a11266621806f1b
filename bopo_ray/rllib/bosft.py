"""BoSFT as an RLlib Algorithm: supervised learning of the cheapest successful routing, section 3 of the method.

Always true here: experts are read from their file part by part, and of all of them only numbers are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import LEARNER_RESULTS

from bopo_ray.agent import episode_views
from bopo_ray.errors import ConfigError
from bopo_ray.method.calibration import Calibration, calibration
from bopo_ray.method.loss import bosft_loss
from bopo_ray.method.synthesis import Expert, class_weights
from bopo_ray.records import Difficulty, spawn_seed
from bopo_ray.rllib.batch import WEIGHT, readings_table, sft_batch
from bopo_ray.rllib.config import RouterAlgorithmConfig, ask_learners
from bopo_ray.rllib.experts import ExpertFile
from bopo_ray.rllib.learner import BoSFTTorchLearner
from bopo_ray.rllib.value import BoundaryValue

__all__ = ["BoSFT", "BoSFTConfig", "Judgement"]


class Judgement(NamedTuple):
    """What a router makes of N expert steps."""

    loss: float
    """As in training, in nats."""
    p_large_N: NDArray[np.float64]
    """pi(any model but the smallest)."""
    large_N: NDArray[np.bool_]
    """Whether the expert chose such a model."""
    difficulty_N: NDArray[np.str_]

    def of(self, difficulty: Difficulty) -> NDArray[np.float64]:
        """p_large of one class."""
        return self.p_large_N[self.difficulty_N == difficulty]

    def calibration(self) -> dict[str, Calibration]:
        """Of each class that there is."""
        rows = {d: self.difficulty_N == d for d in Difficulty}
        found = {str(d): calibration(self.p_large_N[n], self.large_N[n]) for d, n in rows.items()}
        return {d: c for d, c in found.items() if c is not None}


class BoSFTConfig(RouterAlgorithmConfig):
    """Settings of BoSFT."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class or BoSFT)
        self.hard_share = 1 / 3
        """Least share of the loss on Hard steps."""
        self.total_epochs = 0
        """Passes of the whole training, by which the learning rate rises and falls; 0: it stays as it is."""
        self.part_steps = 1 << 14
        """Steps that are in memory at a time."""
        self.lr = 1e-3
        self.num_epochs, self.minibatch_size = 1, 64
        self.env_runners(num_env_runners=0)

    @override(RouterAlgorithmConfig)
    def get_default_learner_class(self) -> type:
        return BoSFTTorchLearner


class BoSFT(Algorithm):
    """One iteration is one epoch over the experts given to `set_experts`."""

    config: BoSFTConfig

    @classmethod
    @override(Algorithm)
    def get_default_config(cls) -> BoSFTConfig:
        return BoSFTConfig()

    @override(Algorithm)
    def setup(self, config: Any) -> None:
        self.experts: ExpertFile | None = None
        self.epochs = 0
        super().setup(config)

    def set_experts(self, experts: ExpertFile) -> None:
        """What to imitate; raises ConfigError when empty."""
        if not experts.trajectories:
            raise ConfigError("0 expert trajectories: need at least one task with boundary rollouts")
        self.experts = experts

    def fit(
        self, epochs: int, held_out: ExpertFile | None, folder: Path, patience: int = 0,
        advance: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:  # fmt: skip
        """Trains, and saves the router of the epoch with the least loss on `held_out`; of the last one without any.

        A small router knows its tasks by heart after a few epochs, and is then just as certain, and wrong, on others.
        [ours]

        Args:
            epochs: at most so many.
            held_out: of tasks that are not trained on.
            folder: where to save.
            patience: stop after so many epochs in turn that were no better on `held_out`; 0: never.
            advance: called after each epoch.

        Returns:
            `epoch` (the one kept, from 1), `epochs` (all that were made), `loss` and `accuracy` (on its own tasks),
            `validation_loss`; in nats. After 0 epochs the router is untrained, and there is no accuracy.
        """
        assert self.experts is not None
        judges, best, epoch = held_out or self.experts, dict[str, float](), 0
        if not epochs:
            self.save_router(folder)
            return {"epoch": 0, "epochs": 0, "loss": self.judge(self.experts).loss,
                    "validation_loss": self.judge(judges).loss}  # fmt: skip
        for epoch in range(1, epochs + 1):
            learned = self.train()["learners"][DEFAULT_MODULE_ID]
            validation = self.judge(judges).loss
            if not best or held_out is None or validation < best["validation_loss"]:
                best = {"epoch": epoch, "loss": float(learned["sft_loss"]), "accuracy": float(learned["accuracy"]),
                        "validation_loss": validation}  # fmt: skip
                shutil.rmtree(folder, ignore_errors=True)
                self.save_router(folder)
            advance()
            if patience and epoch - best["epoch"] >= patience:
                break
        return best | {"epochs": epoch}

    @override(Algorithm)
    def training_step(self) -> None:
        cfg, experts = self.config, self.experts
        assert experts is not None
        weights, total, done = class_weights(experts.steps, cfg.hard_share), sum(experts.steps.values()), 0
        rng = np.random.default_rng(spawn_seed("sft", cfg.seed, self.epochs))
        for part in experts.parts(cfg.part_steps, rng):
            steps = sum(len(e.labels) for e in part)
            batch = sft_batch(part, weights, cfg.reader, cfg.minibatch_size, max(1, cfg.num_learners), rng)
            at = (self.epochs + done / total) / cfg.total_epochs if cfg.total_epochs else 0.0
            results = self.learner_group.update(
                batch=batch.data, num_epochs=1, minibatch_size=batch.rows, shuffle_batch_per_epoch=False,
                progress=(at, steps / total / cfg.total_epochs) if cfg.total_epochs else None,
            )  # fmt: skip
            self.metrics.aggregate(results, key=LEARNER_RESULTS)
            done += steps
        self.epochs += 1

    def save_router(self, folder: Path) -> None:
        """Saves the learner's router: `get_module()` is an env runner's copy, which does not follow the training."""

        def save(learner: Any) -> None:
            learner.average_in(1.0)
            learner.router.save_to_path(str(folder))

        ask_learners(self.learner_group, save)

    def load_router(self, folder: Path) -> None:
        """Puts a saved router in the learner's place."""
        ask_learners(self.learner_group, lambda learner: learner.router.restore_from_path(str(folder)))

    def set_value(self, value: BoundaryValue) -> None:
        """What the router reads of always-small's value."""
        ask_learners(self.learner_group, lambda learner: learner.router.set_value(value))

    def sharpen(self, factor: float) -> None:
        """Multiplies the router's logits."""
        ask_learners(self.learner_group, lambda learner: learner.router.sharpen(factor))

    def judge(self, experts: ExpertFile) -> Judgement:
        """The learner's view of all expert steps."""
        cfg, loss, found = self.config, 0.0, list[tuple[Any, ...]]()
        weights, total = class_weights(experts.steps, cfg.hard_share), sum(experts.steps.values())
        for part in experts.parts(cfg.part_steps):
            logits = self._logits(part)
            labels = torch.tensor([x for e in part for x in e.labels])
            classes = [str(e.difficulty) for e in part for _ in e.labels]
            weights_N = torch.tensor([weights[e.difficulty] for e in part for _ in e.labels])
            loss += float(bosft_loss(logits, labels, weights_N / total))
            found.append((torch.softmax(logits.double(), -1)[:, 1:].sum(-1).numpy(), (labels > 0).numpy(), classes))
        return Judgement(loss, *(np.concatenate(column) for column in zip(*found, strict=True)))

    def _logits(self, experts: Sequence[Expert]) -> torch.Tensor:
        """The learner's logits at each step of the experts' trajectories, [steps, n_models]."""
        read = self.config.reader
        rows = readings_table([r for e in experts for r in read.episode(episode_views(e.episode))], read.padding)
        (found,) = ask_learners(self.learner_group, lambda learner: learner.logits(rows), first=True)
        return found[torch.from_numpy(rows[WEIGHT] != 0)]
