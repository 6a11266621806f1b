"""The router as an RLModule: a small encoder over the text view, or a Hugging Face model; one logit per model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from bopo_ray.models.tokens import PAD, tokenizer
from bopo_ray.rllib.backbone import Backbone
from bopo_ray.rllib.memory import Memory

__all__ = ["ASKS", "ROUTER_DEFAULTS", "RouterModule"]

ASKS = "asks"
"""Column beside RLlib's own, see `Reading`."""

ROUTER_DEFAULTS: dict[str, Any] = {
    "width": 64, "layers": 2, "heads": 4, "context": 96,
    "backbone": "", "lora_rank": 0, "lora_targets": "all-linear", "gradient_checkpointing": False,
    "bf16": None,
}  # fmt: skip
"""Hidden size, transformer layers, attention heads, and length of the encoded view in tokens; where `backbone` names a
Hugging Face model, that is the router, of the same length (see `Backbone`)."""


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
            self.policy = Backbone(cfg, int(self.action_space.n))
            self.reference, self.average = (None if self.inference_only else self.policy.copy() for _ in range(2))
            return
        tok = tokenizer()
        self.pad = tok.token_to_id(PAD)
        self.policy = _Router(cfg, tok.get_vocab_size(), int(self.action_space.n), self.pad)
        self.reference = None if self.inference_only else copy.deepcopy(self.policy).requires_grad_(False)
        self.average = copy.deepcopy(self.reference)

    def save_to_path(self, path: Any = None, **kwargs: Any) -> str:
        """As RLlib's; where the router is a Hugging Face model, the folder also holds the average as one."""
        folder: str = super().save_to_path(path, **kwargs)
        if isinstance(self.policy, Backbone):
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
        return Memory(self.policy, most) if isinstance(self.policy, Backbone) and self.policy.remembers else None

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

    def get_non_inference_attributes(self) -> list[str]:
        return ["reference", "average"]

    def _forward(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTION_DIST_INPUTS: self.policy(batch[Columns.OBS], batch.get(ASKS))}


class _Router(nn.Module):
    """Encoder and head: the embedding of [CLS] beside the mean over the view decides."""

    def __init__(self, cfg: dict[str, Any], vocabulary: int, n_models: int, pad: int) -> None:
        super().__init__()
        self.pad = pad
        self.encoder = BertModel(
            BertConfig(
                vocab_size=vocabulary,
                hidden_size=cfg["width"],
                num_hidden_layers=cfg["layers"],
                num_attention_heads=cfg["heads"],
                intermediate_size=2 * cfg["width"],
                max_position_embeddings=cfg["context"],
                pad_token_id=pad,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
        self.head = nn.Linear(2 * cfg["width"], n_models)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids_BT: Tensor, asks_BT: Tensor | None = None) -> Tensor:
        assert asks_BT is None, "one decision for each reading"
        ids_BT = ids_BT.long()
        mask_BT = ids_BT != self.pad
        length = max(1, int(mask_BT.sum(-1).max()))
        ids_BT, mask_BT = ids_BT[:, :length], mask_BT[:, :length]
        hidden_BTD = self.encoder(input_ids=ids_BT, attention_mask=mask_BT.long()).last_hidden_state
        keep_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
        mean_BD = (hidden_BTD * keep_BT1).sum(1) / keep_BT1.sum(1).clamp(min=1)
        logits: Tensor = self.head(torch.cat([hidden_BTD[:, 0], mean_BD], -1))
        return logits.float()
