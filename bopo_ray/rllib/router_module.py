"""The router as an RLModule, one logit per model: a small encoder over the text view, a small network over the value of
always-small and the step, or a Hugging Face model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch import TorchRLModule

from bopo_ray.rllib.text_router import TextRouter
from bopo_ray.rllib.value import BoundaryValue
from bopo_ray.rllib.value_router import ValueRouter

if TYPE_CHECKING:
    from bopo_ray.rllib.memory import Memory

__all__ = ["ASKS", "ROUTER_DEFAULTS", "RouterModule"]

ASKS = "asks"
"""Column beside RLlib's own, see `Reading`."""

ROUTER_DEFAULTS: dict[str, Any] = {
    "width": 64, "layers": 2, "heads": 4, "context": 96, "value": False,
    "backbone": "", "lora_rank": 0, "lora_targets": "all-linear", "gradient_checkpointing": False,
    "bf16": None,
}  # fmt: skip
"""Hidden size, transformer layers, attention heads, and length of the encoded view in tokens. With `value` it is a
`ValueRouter` of that length instead; where `backbone` names a Hugging Face model, it is that (see `Backbone`)."""


class RouterModule(TorchRLModule, InferenceOnlyAPI):
    """pi(model | view).

    Batch: `Columns.OBS` int [B, context] as made by a `Reader`, or shorter, and `ASKS` where its readings have several
    decisions. Output: `Columns.ACTION_DIST_INPUTS`, float32 logits [decisions, n_models]. `reference` is the frozen
    policy of the KL term (BoSFT), `average` the mean of the policy over its updates, which is what training hands on;
    both are part of the learner's state and of checkpoints, and are left out of the copies that act.
    """

    def setup(self) -> None:
        cfg = ROUTER_DEFAULTS | dict(self.model_config)
        self.policy: Any
        if cfg["backbone"]:
            from bopo_ray.rllib.backbone import Backbone  # with transformers it takes a second, and few routers need it

            self.policy = Backbone(cfg, int(self.action_space.n))
            self.reference, self.average = (None if self.inference_only else self.policy.copy() for _ in range(2))
            return
        n_models = int(self.action_space.n)
        self.policy = ValueRouter(n_models) if cfg["value"] else TextRouter(cfg, n_models)
        self.reference = None if self.inference_only else copy.deepcopy(self.policy).requires_grad_(False)
        self.average = copy.deepcopy(self.reference)

    def save_to_path(self, path: Any = None, **kwargs: Any) -> str:
        """As RLlib's; where the router is a Hugging Face model, the folder also holds the average as one."""
        folder: str = super().save_to_path(path, **kwargs)
        if self._has_backbone:
            present = {k: v.clone() for k, v in self.policy.state_dict().items()}
            if self.average is not None:
                self.policy.load_state_dict(self.average.state_dict())
            try:
                self.policy.save_pretrained(Path(folder))
            finally:
                self.policy.load_state_dict(present)
        return folder

    def memory(self, most: int | None = None) -> Memory | None:
        """To decide at an episode's steps with, as long as the weights stay; None where nothing can be kept.

        `most`: see `Memory`.
        """
        if not (self._has_backbone and self.policy.remembers):
            return None
        from bopo_ray.rllib.memory import Memory

        return Memory(self.policy, most)

    @property
    def _has_backbone(self) -> bool:
        return bool(self.model_config.get("backbone"))

    def set_reference(self) -> None:
        """Freezes the present policy as the reference, and begins the average with it."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())
        self.average_in(1.0)

    def average_in(self, weight: float) -> None:
        """Moves the average by `weight` in (0, 1] of the way to the present policy."""
        if self.average is not None:
            with torch.no_grad():
                for mean, value in zip(self.average.parameters(), self.policy.parameters(), strict=True):
                    mean.lerp_(value, weight)

    def add_offset(self, offset: float) -> None:
        """Adds i times `offset` to the logit of model i, in the policy and in its average."""
        with torch.no_grad():
            for router in (self.policy, self.average):
                if router is not None:
                    router.head.bias += offset * torch.arange(len(router.head.bias), dtype=router.head.bias.dtype)

    def set_value(self, value: BoundaryValue) -> None:
        """What a `ValueRouter` reads of always-small's value from now on; no training changes it."""
        for router in (self.policy, self.reference, self.average):
            if router is not None:
                router.set_value(value)

    def sharpen(self, factor: float) -> None:
        """Multiplies all logits, of the policy and of its average."""
        with torch.no_grad():
            for router in (self.policy, self.average):
                if router is not None:
                    for values in router.head.state_dict().values():
                        values *= factor

    def get_non_inference_attributes(self) -> list[str]:
        return ["reference", "average"]

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.policy(batch[Columns.OBS], batch.get(ASKS))}
