"""BoSFT as an RLlib Algorithm: supervised learning of the cheapest successful routing, section 3 of the method."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.utils.annotations import override
from ray.rllib.utils.metrics import LEARNER_RESULTS

from bopo_ray.agent import episode_views
from bopo_ray.errors import ConfigError
from bopo_ray.method.loss import bosft_loss
from bopo_ray.method.synthesis import Expert, step_weights
from bopo_ray.records import Difficulty, spawn_seed
from bopo_ray.rllib.batch import WEIGHT, readings_table, sft_batch
from bopo_ray.rllib.config import RouterAlgorithmConfig
from bopo_ray.rllib.learner import BoSFTTorchLearner

__all__ = ["BoSFT", "BoSFTConfig"]


class BoSFTConfig(RouterAlgorithmConfig):
    """Settings of BoSFT."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class or BoSFT)
        self.hard_share = 1 / 3
        """Least share of the loss on Hard steps."""
        self.total_epochs = 0
        """Passes of the whole training, by which the learning rate rises and falls; 0: it stays as it is."""
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
        self.experts: tuple[Expert, ...] = ()
        self.epochs = 0
        super().setup(config)

    def set_experts(self, experts: Sequence[Expert]) -> None:
        """What to imitate; raises ConfigError when empty."""
        if not experts:
            raise ConfigError("0 expert trajectories: need at least one task with boundary rollouts")
        self.experts = tuple(experts)

    def fit(
        self, epochs: int, held_out: Sequence[Expert], folder: Path, advance: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """Trains, and saves the router of the epoch with the least loss on `held_out`; of the last one without any.

        A small router knows its tasks by heart after a few epochs, and is then just as certain, and wrong, on others.
        [ours]

        Returns:
            `epoch` (the one kept, from 1), `loss` and `accuracy` (on its own tasks), `validation_loss`; in nats. After
            0 epochs the router is untrained, and there is no accuracy.
        """
        best: dict[str, float] = {}
        if not epochs:
            self.save_router(folder)
            return {"epoch": 0, "loss": self.loss(self.experts), "validation_loss": self.loss(held_out or self.experts)}
        for epoch in range(1, epochs + 1):
            learned = self.train()["learners"][DEFAULT_MODULE_ID]
            validation = self.loss(held_out or self.experts)
            if not best or not held_out or validation < best["validation_loss"]:
                best = {"epoch": epoch, "loss": float(learned["sft_loss"]), "accuracy": float(learned["accuracy"]),
                        "validation_loss": validation}  # fmt: skip
                shutil.rmtree(folder, ignore_errors=True)
                self.save_router(folder)
            advance()
        return best

    @override(Algorithm)
    def training_step(self) -> None:
        cfg = self.config
        steps = [e.difficulty for e in self.experts for _ in e.labels]
        rng = np.random.default_rng(spawn_seed("sft", cfg.seed, self.epochs))
        batch = sft_batch(
            self.experts, step_weights(steps, cfg.hard_share), cfg.reader, cfg.minibatch_size,
            max(1, cfg.num_learners), rng,
        )  # fmt: skip
        results = self.learner_group.update(
            batch=batch.data, num_epochs=1, minibatch_size=batch.rows, shuffle_batch_per_epoch=False,
            progress=(self.epochs / cfg.total_epochs, 1 / cfg.total_epochs) if cfg.total_epochs else None,
        )  # fmt: skip
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self.epochs += 1

    def save_router(self, folder: Path) -> None:
        """Saves the learner's router: `get_module()` is an env runner's copy, which does not follow the training."""

        def save(learner: Any) -> None:
            learner.average_in(1.0)
            learner.module[DEFAULT_MODULE_ID].unwrapped().save_to_path(str(folder))

        self.learner_group.foreach_learner(save)

    def load_router(self, folder: Path) -> None:
        """Puts a saved router in the learner's place."""
        self.learner_group.foreach_learner(
            lambda learner: learner.module[DEFAULT_MODULE_ID].unwrapped().restore_from_path(str(folder))
        )

    def loss(self, experts: Sequence[Expert]) -> float:
        """The training loss on these experts, in nats."""
        cfg = self.config
        labels = torch.from_numpy(np.concatenate([np.asarray(e.labels, np.int64) for e in experts]))
        weights = step_weights([e.difficulty for e in experts for _ in e.labels], cfg.hard_share)
        return float(bosft_loss(self._logits(experts), labels, torch.from_numpy(weights / len(weights))))

    def p_large(self, experts: Sequence[Expert], difficulty: Difficulty | None = None) -> np.ndarray:
        """pi(any model but the smallest) at each step of the experts' trajectories, [steps]."""
        chosen = [e for e in experts if difficulty is None or e.difficulty is difficulty]
        if not chosen:
            return np.zeros(0)
        return torch.softmax(self._logits(chosen), -1)[:, 1:].sum(-1).numpy()

    def _logits(self, experts: Sequence[Expert]) -> torch.Tensor:
        """The learner's logits at each step of the experts' trajectories, [steps, n_models]."""
        read = self.config.reader
        rows = readings_table([r for e in experts for r in read.episode(episode_views(e.episode))], read.padding)
        found = self.learner_group.foreach_learner(lambda learner: learner.logits(rows)).result_or_errors[0].get()
        return found[torch.from_numpy(rows[WEIGHT] != 0)]
