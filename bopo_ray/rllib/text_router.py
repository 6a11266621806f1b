"""A router that reads the text view: a small encoder of BERT's architecture, begun from nothing.

Its parameters have the names and the first values that `transformers.BertModel` would give them (a test compares both),
without the two seconds and 140 MB that each process would need for that: there are many, and they decide most of the
time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bopo_ray.models.tokens import CLS, PAD, tokenizer

__all__ = ["TextRouter"]

EPS = 1e-12
"""Of BERT's normalisations."""
SPREAD = 0.02
"""Standard deviation of its first weights."""


class TextRouter(nn.Module):
    """pi(model | view): float32 logits [B, n_models] of token ids [B, T], as `encode_view` makes them.

    Encoder and head: the embedding of [CLS] beside the mean over the view decides.
    """

    def __init__(self, cfg: dict[str, Any], n_models: int) -> None:
        """`cfg`: `width`, `layers`, `heads` and `context` (tokens); `n_models`: size of the pool."""
        super().__init__()
        self.pad, self.cls = (tokenizer().token_to_id(t) for t in (PAD, CLS))
        self.heads, width = cfg["heads"], cfg["width"]
        self.encoder: Any = nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "word_embeddings": nn.Embedding(tokenizer().get_vocab_size(), width, self.pad),
                "position_embeddings": nn.Embedding(cfg["context"], width),
                "token_type_embeddings": nn.Embedding(2, width),
                "LayerNorm": nn.LayerNorm(width, EPS),
            }),
            "encoder": nn.ModuleDict({"layer": nn.ModuleList(_layer(width) for _ in range(cfg["layers"]))}),
        })  # fmt: skip
        self.encoder.apply(_begin)
        self.head = nn.Linear(2 * width, n_models)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids_BT: Tensor, asks_BT: Tensor | None = None) -> Tensor:
        assert asks_BT is None, "one decision for each reading"
        mask_BT = ids_BT != self.pad
        length = max(1, int(mask_BT.sum(-1).max()))
        ids_BT, mask_BT = F.pad(ids_BT[:, 1:length], (1, 0), value=self.cls), mask_BT[:, :length]
        if bool(mask_BT.all()):
            hidden_BTD = self.encode(ids_BT, None)
            mean_BD = hidden_BTD.sum(1) / length
        else:
            hidden_BTD = self.encode(ids_BT, mask_BT)
            keep_BT1 = mask_BT.unsqueeze(-1).to(hidden_BTD.dtype)
            mean_BD = (hidden_BTD * keep_BT1).sum(1) / keep_BT1.sum(1).clamp(min=1)
        return _dense(torch.cat([hidden_BTD[:, 0], mean_BD], -1), self.head).float()

    def encode(self, ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """The encoder's last hidden states [B, T, D]; without a mask all tokens are seen.

        No module is called, which for a single view would take as long as the arithmetic: a runner decides for whatever
        is ready, and often that is one.
        """
        (B, T), D, embed = ids_BT.shape, self.head.in_features // 2, self.encoder.embeddings
        words_BTD = F.embedding(ids_BT, embed.word_embeddings.weight, self.pad)
        placed_BTD = words_BTD + embed.position_embeddings.weight[:T] + embed.token_type_embeddings.weight[0]
        x_BTD = _normed(placed_BTD, embed.LayerNorm)
        seen_B11T = None if mask_BT is None else mask_BT[:, None, None, :]
        for layer in self.encoder.encoder.layer:
            read, write, inner, outer = layer.attention.self, layer.attention.output, layer.intermediate, layer.output
            asks = (read.query, read.key, read.value)
            q, k, v = (_dense(x_BTD, f).view(B, T, self.heads, -1).transpose(1, 2) for f in asks)
            said_BTD = F.scaled_dot_product_attention(q, k, v, seen_B11T).transpose(1, 2).reshape(B, T, D)
            x_BTD = _normed(_dense(said_BTD, write.dense) + x_BTD, write.LayerNorm)
            x_BTD = _normed(_dense(F.gelu(_dense(x_BTD, inner.dense)), outer.dense) + x_BTD, outer.LayerNorm)
        return x_BTD


def _layer(width: int) -> nn.ModuleDict:
    """A layer of the encoder, with BERT's names."""
    return nn.ModuleDict({
        "attention": nn.ModuleDict({
            "self": nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")}),
            "output": _added(width, width),
        }),
        "intermediate": nn.ModuleDict({"dense": nn.Linear(width, 2 * width)}),
        "output": _added(2 * width, width),
    })  # fmt: skip


def _added(of: int, width: int) -> nn.ModuleDict:
    """What is added to its input and normalised."""
    return nn.ModuleDict({"dense": nn.Linear(of, width), "LayerNorm": nn.LayerNorm(width, EPS)})


def _begin(module: nn.Module) -> None:
    """BERT's first values."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=SPREAD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding) and module.padding_idx is not None:
        nn.init.zeros_(module.weight[module.padding_idx])


def _dense(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
