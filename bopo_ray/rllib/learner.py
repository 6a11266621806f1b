"""The learners: the losses of `bopo_ray.method.loss` on RLlib's TorchLearner.

A train batch is a flat table of steps (see `bopo_ray.rllib.batch`). Its rows' weights are fixed for the whole batch,
so that losses and gradients add up over minibatches; padding rows have weight 0.
"""

from __future__ import annotations

from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.policy.sample_batch import MultiAgentBatch
from torch import Tensor

from bopo_ray.method.loss import LossConfig, bopo_loss, bosft_loss
from bopo_ray.rllib.batch import ADVANTAGE, ANCHOR, LABEL, MASK, OLD_LOGP, REFERENCE, WEIGHT

__all__ = ["BoPOTorchLearner", "BoSFTTorchLearner"]

_CHUNK = 256
"""Rows per forward pass where no gradient is needed."""


class _RouterLearner(TorchLearner):
    """What both learners share."""

    def build(self) -> None:
        torch.set_num_threads(1)
        super().build()

    def set_reference(self) -> None:
        """Freezes the present policy as the reference of the KL term, and begins the average with it."""
        self.module[DEFAULT_MODULE_ID].unwrapped().set_reference()

    def average_in(self, weight: float) -> None:
        """Moves the average router by `weight` of the way to the present one."""
        self.module[DEFAULT_MODULE_ID].unwrapped().average_in(weight)

    def _log(self, module_id: str, stats: dict[str, Tensor], window: int) -> None:
        self.metrics.log_dict({k: v.detach() for k, v in stats.items()}, key=module_id, window=window)


class BoSFTTorchLearner(_RouterLearner):
    """Weighted cross-entropy on the expert's choices."""

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        logits = fwd_out[Columns.ACTION_DIST_INPUTS]
        loss = bosft_loss(logits, batch[LABEL], batch[WEIGHT])
        right = (logits.argmax(-1) == batch[LABEL]).float()
        self._log(module_id, {"sft_loss": loss, "accuracy": right.mean()}, 32)
        return loss


class BoPOTorchLearner(_RouterLearner):
    """Clipped policy gradient with reference-guided advantages, KL to BoSFT, entropy and anchors."""

    def update(self, batch: MultiAgentBatch | None = None, **kwargs: Any) -> Any:
        """As RLlib's, after adding the old policy's and the reference's view of the batch.

        Both are computed here, over the whole batch in one fixed order, and not taken from the runners: the runners'
        batches form by chance of timing, and their last bits would make a run irreproducible.
        """
        training_data = kwargs.get("training_data")
        source = batch if batch is not None else training_data.batch if training_data is not None else None
        if source is not None:
            self._add_policies(source.policy_batches[DEFAULT_MODULE_ID])
        return super().update(batch=batch, **kwargs)

    def _add_policies(self, rows: Any) -> None:
        module = self.module[DEFAULT_MODULE_ID].unwrapped()
        obs = torch.as_tensor(rows[Columns.OBS])
        with torch.no_grad():
            chunks = [chunk.to(self._device) for chunk in obs.split(_CHUNK)]
            logits = torch.cat([module.policy(c).cpu() for c in chunks])
            reference = torch.cat([module.reference_logits(c).cpu() for c in chunks])
        logits = logits.masked_fill(~torch.as_tensor(rows[MASK]), -torch.inf)
        logp = torch.log_softmax(logits, -1).gather(-1, torch.as_tensor(rows[Columns.ACTIONS]).long().unsqueeze(-1))
        rows[OLD_LOGP] = logp.squeeze(-1).numpy()
        rows[REFERENCE] = reference.numpy()

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
    ) -> Tensor:
        cfg = LossConfig(clip=config.clip, kl=config.kl, entropy=config.entropy, anchor=config.anchor)
        loss, stats = bopo_loss(
            fwd_out[Columns.ACTION_DIST_INPUTS], batch[Columns.ACTIONS], batch[OLD_LOGP], batch[ADVANTAGE],
            batch[REFERENCE], batch[ANCHOR], batch[WEIGHT], cfg, batch[MASK],
        )  # fmt: skip
        self._log(module_id, stats, 32)
        return loss
