"""A router that reads two numbers: how likely SMALL alone wins from here on, and how many steps were taken. [ours]

An encoder that learns to route from some hundred tasks learns their texts by heart; what carries over to other tasks is
in these two, and a policy gradient through a thousand weights has less noise than through a hundred thousand. The value
is fitted before the training, see `bopo_ray.rllib.value`, and stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bopo_ray.models.tokens import CLS, PAD, SEP, tokenizer
from bopo_ray.rllib.value import NEAR, SECTIONS, BoundaryValue

__all__ = ["LEVELS", "STEPS", "ValueRouter"]

LEVELS = tuple(range(-4, 5))
"""An input each tells how far the value, a logit, is above this, so that the router can bend what it makes of it ..."""
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30)
"""... and whether so many steps were taken."""
HIDDEN = 32


class ValueRouter(nn.Module):
    """pi(model | value, step): float32 logits [B, n_models] of token ids [B, T], as `encode_view` makes them."""

    value: Tensor
    bias: Tensor
    levels: Tensor
    steps: Tensor

    def __init__(self, n_models: int) -> None:
        super().__init__()
        self.pad, self.cls, self.sep = (tokenizer().token_to_id(t) for t in (PAD, CLS, SEP))
        self.vocabulary = tokenizer().get_vocab_size()
        self.register_buffer("value", torch.zeros(SECTIONS * self.vocabulary))
        self.register_buffer("bias", torch.zeros(1))
        self.register_buffer("levels", torch.tensor(LEVELS, dtype=torch.float32), persistent=False)
        self.register_buffer("steps", torch.tensor(STEPS), persistent=False)
        self.inner = nn.Linear(len(LEVELS) + len(STEPS), HIDDEN)
        self.head = nn.Linear(HIDDEN, n_models)
        nn.init.zeros_(self.head.bias)

    def set_value(self, value: BoundaryValue) -> None:
        """What is read from now on."""
        self.value.copy_(torch.from_numpy(value.weights))
        self.bias.fill_(value.bias)

    def forward(self, ids_BT: Tensor, asks_BT: Tensor | None = None) -> Tensor:
        assert asks_BT is None, "one decision for each reading"
        step_B1 = ids_BT[:, :1] - self.vocabulary
        seen = [torch.sigmoid(self.value_of(ids_BT) - self.levels), (step_B1 >= self.steps).float()]
        logits: Tensor = self.head(F.gelu(self.inner(torch.cat(seen, -1))))
        return logits.float()

    def value_of(self, ids_BT: Tensor) -> Tensor:
        """logit P(SMALL alone wins from here on), [B, 1]; 0 as long as nothing was set."""
        ids_BT = F.pad(ids_BT[:, 1:], (1, 0), value=self.cls)
        section_BT = (ids_BT == self.sep).cumsum(-1).clamp_max(2)
        start_B1 = (section_BT < 2).sum(-1, keepdim=True)
        place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        newest_BT = (section_BT == 2) & (place_T < start_B1 + NEAR)
        section_BT = section_BT.masked_fill(newest_BT, SECTIONS - 1)
        weights_BT = self.value[section_BT * self.vocabulary + ids_BT]
        return weights_BT.masked_fill(ids_BT == self.pad, 0.0).sum(-1, keepdim=True) + self.bias
