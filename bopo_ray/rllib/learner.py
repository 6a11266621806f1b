"""The learners: the losses of `bopo_ray.method.loss` on RLlib's TorchLearner.

A train batch is a table of readings (see `bopo_ray.rllib.batch`), whose steps' weights are fixed for the whole batch.
So losses and gradients add up: over the forward passes of a minibatch, each of readings of similar lengths and of no
more tokens than fit into memory, and over learners.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.policy.sample_batch import MultiAgentBatch
from torch import Tensor

from bopo_ray.method.loss import LossConfig, bopo_loss, bosft_loss
from bopo_ray.rllib.batch import ADVANTAGE, ANCHOR, BEHAVIOUR, LABEL, LENGTH, MASK, OLD_LOGP, REFERENCE, WEIGHT, passes
from bopo_ray.rllib.open_desk import DeskConfig, borrow_environment
from bopo_ray.rllib.router_module import ASKS, RouterModule

__all__ = ["BoPOTorchLearner", "BoSFTTorchLearner", "rate_factor"]


class _RouterLearner(TorchLearner):
    """What both learners share."""

    def build(self) -> None:
        borrow_environment(self.config.env_config.get("desk") or DeskConfig())  # the Hub's key, for a backbone
        if self.config.num_gpus_per_learner == 0:
            torch.set_num_threads(1)
        super().build()
        if _learners() > 1:
            for parameter in self.router.state_dict().values():
                dist.broadcast(parameter, 0)

    def _make_modules_ddp_if_necessary(self) -> None:
        """Not: gradients are summed once per minibatch, here, and not in each of its backward passes."""

    @property
    def router(self) -> RouterModule:
        """The module that learns."""
        module: RouterModule = self.module[DEFAULT_MODULE_ID].unwrapped()
        return module

    def set_reference(self) -> None:
        """Freezes the present policy as the reference of the KL term, and begins the average with it."""
        self.router.set_reference()

    def average_in(self, weight: float) -> None:
        """Moves the average router by `weight` of the way to the present one."""
        self.router.average_in(weight)

    def update(
        self, batch: MultiAgentBatch | None = None, *, progress: tuple[float, float] | None = None, **kwargs: Any
    ) -> Any:
        """As RLlib's.

        Args:
            batch: see `bopo_ray.rllib.batch`.
            progress: how far the training is, in [0, 1], and the share of it that this update is: where the learning
                rate is on its way up and down; None: at its height.
            kwargs: RLlib's.
        """
        training_data = kwargs.get("training_data")
        source = batch if batch is not None else training_data.batch if training_data is not None else None
        if source is not None:
            self._prepare(source.policy_batches[DEFAULT_MODULE_ID])
            steps = len(source.policy_batches[DEFAULT_MODULE_ID]) // kwargs["minibatch_size"] * kwargs["num_epochs"]
            self._rates = iter(self._scheduled(progress, steps))
        return super().update(batch=batch, **kwargs)

    def _prepare(self, rows: Any) -> None:
        """Adds what the loss needs beside what the batch holds."""

    def _scheduled(self, progress: tuple[float, float] | None, steps: int) -> list[float]:
        """The learning rate of each optimizer step of an update."""
        cfg = self.config
        if progress is None:
            return [cfg.lr] * steps
        done, share = progress
        return [cfg.lr * rate_factor(done + share * (i + 1) / steps, cfg.warmup, cfg.lr_end) for i in range(steps)]

    def logits(self, rows: Any, of: str = "policy") -> Tensor:
        """Logits [rows, K, n_models] of the `policy` or the `reference` at each decision, on the CPU."""
        out: Tensor | None = None
        with torch.no_grad():
            for part, index, there in self._parts(rows):
                logits = getattr(self.router, of)(part[Columns.OBS], part.get(ASKS)).cpu()
                out = torch.zeros(*rows[WEIGHT].shape, logits.shape[-1]) if out is None else out
                out[index.unsqueeze(-1).expand_as(there)[there], there.nonzero()[:, 1]] = logits
        assert out is not None
        return out

    def _parts(self, rows: Any) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Forward passes over a table: obs and asks [B, T], other columns [decisions, ...]; the rows' indices [B], and
        which of their K places are decisions [B, K]; the last two on the CPU.
        """
        length_B = np.asarray(torch.as_tensor(rows[LENGTH]).cpu())
        for chosen in passes(length_B, self.config.tokens_per_pass):
            index, T = torch.from_numpy(chosen), int(length_B[chosen].max())
            taken = {k: torch.as_tensor(v)[index].to(self._device) for k, v in rows.items() if k != LENGTH}
            there = taken[WEIGHT] != 0
            part = {k: v[:, :T] if k in (Columns.OBS, ASKS) else v[there] for k, v in taken.items()}
            yield part, index, there.cpu()

    def _uncompiled_update(self, batch: dict[str, Any], **_: Any) -> tuple[Any, Any, Any]:
        """One optimizer step, by as many forward and backward passes as the memory asks for."""
        rate = next(self._rates)
        for optimizer in self._optimizer_parameters:
            optimizer.zero_grad(set_to_none=True)
            self._set_optimizer_lr(optimizer, rate)
        total, self._stats = torch.zeros((), device=self._device), []
        for part, _, _ in self._parts(batch[DEFAULT_MODULE_ID]):
            out = self.router.forward_train(part)
            loss = self.compute_loss_for_module(
                module_id=DEFAULT_MODULE_ID, config=self.config, batch=part, fwd_out=out
            )
            loss.backward()
            total += loss.detach()
        gradients = {k: torch.zeros_like(p) if p.grad is None else p.grad for k, p in self._params.items()
                     if p.requires_grad}  # fmt: skip
        if _learners() > 1:
            for gradient in gradients.values():
                dist.all_reduce(gradient)
        self.apply_gradients(self.postprocess_gradients(gradients))
        self._log()
        return {}, {DEFAULT_MODULE_ID: total}, {}

    def _log(self) -> None:
        """The figures of a minibatch: losses are sums over its passes and learners, others means over decisions."""
        n = sum(count for count, _ in self._stats)
        figures: dict[str, Any] = {}
        for count, stats in self._stats:
            for name, value in stats.items():
                share = _learners() if name.endswith("_loss") else count / n
                figures[name] = figures.get(name, 0.0) + share * value
        self.metrics.log_dict(figures, key=DEFAULT_MODULE_ID, window=32)


class BoSFTTorchLearner(_RouterLearner):
    """Weighted cross-entropy on the expert's choices."""

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        logits = fwd_out[Columns.ACTION_DIST_INPUTS]
        loss = bosft_loss(logits, batch[LABEL], batch[WEIGHT])
        right = (logits.argmax(-1) == batch[LABEL]).float()
        self._stats.append((len(logits), {"sft_loss": loss.detach(), "accuracy": right.mean()}))
        return loss


class BoPOTorchLearner(_RouterLearner):
    """Clipped policy gradient with reference-guided advantages, KL to BoSFT, entropy and anchors."""

    def _prepare(self, rows: Any) -> None:
        """The old policy's and the reference's view of the batch.

        Both are computed here, over the whole batch in one fixed order, and not taken from the runners: the runners'
        batches form by chance of timing, and their last bits would make a run irreproducible. For stale groups alone,
        the old policy is the one that played them, as the runners stored it.
        """
        there = torch.as_tensor(rows[WEIGHT]) != 0
        masked = self.logits(rows).masked_fill(~torch.as_tensor(rows[MASK]) & there.unsqueeze(-1), -torch.inf)
        logp = torch.log_softmax(masked, -1).gather(-1, torch.as_tensor(rows[Columns.ACTIONS]).long().unsqueeze(-1))
        behaviour = np.asarray(rows[BEHAVIOUR])
        rows[OLD_LOGP] = np.where(behaviour > 0, logp.squeeze(-1).numpy(), behaviour)
        rows[REFERENCE] = self.logits(rows, "reference").numpy()

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        cfg = LossConfig(clip=config.clip, kl=config.kl, entropy=config.entropy, anchor=config.anchor)
        loss, stats = bopo_loss(
            fwd_out[Columns.ACTION_DIST_INPUTS], batch[Columns.ACTIONS], batch[OLD_LOGP], batch[ADVANTAGE],
            batch[REFERENCE], batch[ANCHOR], batch[WEIGHT], cfg, batch[MASK],
        )  # fmt: skip
        self._stats.append((len(batch[WEIGHT]), stats))
        return loss


def rate_factor(progress: float, warmup: float, end: float) -> float:
    """What the learning rate is multiplied by: it rises to 1 over the share `warmup`, and then falls to `end`."""
    if progress < warmup:
        return progress / warmup
    return 1 - (1 - end) * (progress - warmup) / max(1 - warmup, 1e-9)


def _learners() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
