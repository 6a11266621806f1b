"""The router as an RLModule, one logit per model: a small encoder over the text view, a small network over the value of
always-small and the step, or a Hugging Face model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor, nn
from torch.nn import functional as F

from bopo_ray.models.tokens import CLS, PAD, tokenizer
from bopo_ray.rllib.backbone import Backbone
from bopo_ray.rllib.memory import Memory
from bopo_ray.rllib.value import BoundaryValue
from bopo_ray.rllib.value_router import ValueRouter

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
            self.policy = Backbone(cfg, int(self.action_space.n))
            self.reference, self.average = (None if self.inference_only else self.policy.copy() for _ in range(2))
            return
        n_models = int(self.action_space.n)
        self.policy = ValueRouter(n_models) if cfg["value"] else _Router(cfg, n_models)
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


class _Router(nn.Module):
    """Encoder and head: the embedding of [CLS] beside the mean over the view decides."""

    def __init__(self, cfg: dict[str, Any], n_models: int) -> None:
        super().__init__()
        self.pad, self.cls = (tokenizer().token_to_id(t) for t in (PAD, CLS))
        self.encoder = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=tokenizer().get_vocab_size(),
                hidden_size=cfg["width"],
                num_hidden_layers=cfg["layers"],
                num_attention_heads=cfg["heads"],
                intermediate_size=2 * cfg["width"],
                max_position_embeddings=cfg["context"],
                pad_token_id=self.pad,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            ),
            add_pooling_layer=False,
        )
        self.head = nn.Linear(2 * cfg["width"], n_models)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids_BT: Tensor, asks_BT: Tensor | None = None) -> Tensor:
        assert asks_BT is None, "one decision for each reading"
        mask_BT = ids_BT != self.pad
        length = max(1, int(mask_BT.sum(-1).max()))
        ids_BT, mask_BT = F.pad(ids_BT[:, 1:length], (1, 0), value=self.cls), mask_BT[:, :length]
        if bool(mask_BT.all()):
            hidden_BTD = self._encoded(ids_BT, None)
            mean_BD = hidden_BTD.sum(1) / length
        else:
            hidden_BTD = self._encoded(ids_BT, mask_BT)
            keep_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
            mean_BD = (hidden_BTD * keep_BT1).sum(1) / keep_BT1.sum(1).clamp(min=1)
        return _dense(torch.cat([hidden_BTD[:, 0], mean_BD], -1), self.head).float()

    def _encoded(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The encoder's last hidden states [B, T, D]; without a mask all tokens are seen.

        As its own forward, without what that looks up and checks for other uses of it, and without calling modules,
        which for a single view takes as long as the arithmetic: a runner decides for whatever is ready, and often that
        is one.
        """
        (B, T), D, heads = ids_BT.shape, self.head.in_features // 2, self.encoder.config.num_attention_heads
        embed = self.encoder.embeddings
        words_BTD = F.embedding(ids_BT, embed.word_embeddings.weight, self.pad)
        placed_BTD = words_BTD + embed.position_embeddings.weight[:T] + embed.token_type_embeddings.weight[0]
        x_BTD = _normed(placed_BTD, embed.LayerNorm)
        seen_B11T = None if mask_BT is None else mask_BT[:, None, None, :]
        for layer in self.encoder.encoder.layer:
            read, write, inner, outer = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
            asks = (read.query, read.key, read.value)
            q, k, v = (_dense(x_BTD, f).view(B, T, heads, -1).transpose(1, 2) for f in asks)
            said_BTD = F.scaled_dot_product_attention(q, k, v, seen_B11T).transpose(1, 2).reshape(B, T, D)
            x_BTD = _normed(_dense(said_BTD, write.dense) + x_BTD, write.LayerNorm)
            x_BTD = _normed(_dense(F.gelu(_dense(x_BTD, inner.dense)), outer.dense) + x_BTD, outer.LayerNorm)
        return x_BTD


def _dense(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
