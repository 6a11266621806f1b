"""A head start in copying: what an agent must do at every step, and what a small transformer finds by itself very late.

An action names things that stand somewhere in what was read. Finding them takes two attention heads in a row: one that
notes at each token which token came before it, and one that looks for the place that followed the present token earlier
(Olsson et al., "In-context learning and induction heads", 2022). From random weights the first one has no reason to
form before the second, so models of this size learn which actions fit a task long before they can name the right
object: after five million tokens of our demonstrations, the large model still named what was not there. So the first
head is written into the weights, and the second forms on made-up texts that repeat themselves, within half a million
tokens. Nothing else is put in; both are trained on like all other weights.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from bopo_ray.executors.sequences import Stretch
from bopo_ray.models.embedded_prompt import SPECIAL

__all__ = ["copying_batch", "write_previous_token_head"]

CONSTANT = 1.0
"""What the first coordinate of every embedding starts as: something to attend by that does not depend on the token."""
SPREAD = 0.08
"""Standard deviation of the other coordinates."""
SLOWEST = 0.05
"""Radians per token: slower pairs can't tell neighbours apart."""
SHARPNESS = 6.5
"""Of the head's attention: about 98% of it goes to the token before."""
LOUDNESS = 0.15
"""Of what it writes, beside the embedding."""
SHORT, LONG = (24, 32, 48), (48, 64, 96, 128)
"""Lengths of the made-up texts, at first and later on."""


def write_previous_token_head(model: Any, seed: int) -> None:
    """Makes the first head of the first layer attend to the token before, and write what it is into the residual.

    Rotary positions turn pair i of a query by theta_i per token of distance. A query that is turned back by theta_i
    meets a constant key best at distance 1.
    """
    config, generator = model.config, torch.Generator().manual_seed(seed)
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    base = config.rope_parameters["rope_theta"]
    theta = torch.tensor([base ** (-i / (size // 2)) for i in range(size // 2)])
    fast = (theta > SLOWEST).float()
    seen = CONSTANT / math.sqrt((CONSTANT**2 + (width - 1) * SPREAD**2) / width)  # of the constant, after the norm
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.normal_(generator=generator)
        embeddings *= SPREAD * math.sqrt(width) / embeddings.norm(dim=1, keepdim=True)  # one norm: one attention
        embeddings[:, 0] = CONSTANT
        attention = model.model.layers[0].self_attn
        for matrix, pairs in (
            (attention.q_proj.weight, (theta.cos() * fast, -theta.sin() * fast)),
            (attention.k_proj.weight, (fast, torch.zeros_like(theta))),
        ):
            matrix[:size] = 0
            matrix[:size, 0] = torch.cat(pairs) * SHARPNESS / seen
        reads, writes = (torch.linalg.qr(torch.randn(width, width, generator=generator))[0] for _ in range(2))
        reads[:, 0] = 0  # the constant says nothing about the token,
        writes[0] = 0  # and stays one
        attention.v_proj.weight[:size] = reads[:size]
        attention.o_proj.weight[:, :size] = writes[:, :size] * LOUDNESS


def copying_batch(vocabulary: int, tokens: int, progress: float, rng: random.Random) -> list[Stretch]:
    """Texts of random tokens, then pieces of them again; what is learned is how each piece goes on."""
    n = rng.choice(SHORT if progress < 0.5 else LONG)
    return [_text(vocabulary, n, rng) for _ in range(max(1, tokens // n))]


def _text(vocabulary: int, n: int, rng: random.Random) -> Stretch:
    first = rng.randrange(n // 4, n // 2)
    ids = [rng.randrange(len(SPECIAL), vocabulary) for _ in range(first)]
    kinds = [0] * first
    while len(ids) < n:
        at = rng.randrange(first - 3)
        piece = ids[at : min(first, at + rng.randrange(3, 9))]
        ids += piece
        kinds += [0] + [2] * (len(piece) - 1)
    return Stretch(ids[:n], kinds[:n])
