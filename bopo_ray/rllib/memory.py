"""What a causal backbone has read of the episodes in flight: a step's decision reads only what is new.

Always true here: logits are those of a forward pass over the whole prompt, up to rounding, whoever else decides in the
same call; each episode's keys and values are kept until another episode takes its place, or there are too many.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from bopo_ray.rllib.backbone import Backbone
from bopo_ray.rllib.reading import NOTHING

__all__ = ["Memory"]

UNEVEN = 2
"""Prompts of which one has more than so many times the new tokens of another are read one after the other."""
_Layers = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [heads, T, width] of each layer."""


class Memory:
    """Reads prompts with a backbone's present weights; make another when those change. Not thread-safe."""

    def __init__(self, backbone: Backbone, most: int | None = None) -> None:
        """`most`: episodes that are kept, the latest ones; None keeps one for each key."""
        self._backbone, self._most = backbone, most
        self._held: dict[Hashable, tuple[NDArray[np.int32], _Layers]] = {}

    @torch.inference_mode()
    def logits(self, prompts: Sequence[NDArray[np.int32]], keys: Sequence[Hashable]) -> Tensor:
        """Logits [B, n_models] of prompts, `Prompt.ids`; prompts with the same key may begin alike."""
        prompts = [ids[ids != NOTHING] for ids in prompts]
        common = [self._common(ids, key) for ids, key in zip(prompts, keys, strict=True)]
        new = np.array([len(ids) - n for ids, n in zip(prompts, common, strict=True)])
        out = torch.empty(len(prompts), self._backbone.n_models)
        for rows in _alike(new):
            out[torch.from_numpy(rows)] = self._read(
                [prompts[i] for i in rows], [keys[i] for i in rows], [common[i] for i in rows]
            )
        return out

    def _common(self, ids: NDArray[np.int32], key: Hashable) -> int:
        """Tokens of the prompt that are held; its last one is always read anew."""
        held = self._held[key][0] if key in self._held else ids[:0]
        n = min(len(held), len(ids) - 1)
        differ = np.flatnonzero(held[:n] != ids[:n])
        return int(differ[0]) if differ.size else n

    def _read(self, prompts: list[NDArray[np.int32]], keys: list[Hashable], common: list[int]) -> Tensor:
        """What is held stands right-aligned, what is new left-aligned behind it."""
        trunk, device = self._backbone.trunk, next(self._backbone.parameters()).device
        C, N = max(common), max(len(ids) - n for ids, n in zip(prompts, common, strict=True))
        ids_BN = np.zeros((len(prompts), N), np.int64)
        mask_BT = np.zeros((len(prompts), C + N), np.int64)
        for b, (ids, n) in enumerate(zip(prompts, common, strict=True)):
            ids_BN[b, : len(ids) - n] = ids[n:]
            mask_BT[b, C - n : C + len(ids) - n] = 1
        places_BN = torch.tensor(common, device=device).unsqueeze(1) + torch.arange(N, device=device)
        hidden_BND, cache = trunk.read(
            torch.from_numpy(ids_BN).to(device), torch.from_numpy(mask_BT).to(device), self._cache(keys, common),
            position_ids=places_BN,
        )  # fmt: skip
        last_B = torch.tensor([len(ids) - n - 1 for ids, n in zip(prompts, common, strict=True)], device=device)
        for b, (key, ids, n) in enumerate(zip(keys, prompts, common, strict=True)):
            there = slice(C - n, C + len(ids) - n)
            layers = tuple((x.keys[b, :, there].clone(), x.values[b, :, there].clone()) for x in cache.layers)
            self._held.pop(key, None)
            self._held[key] = ids, layers
            if self._most is not None and len(self._held) > self._most:
                del self._held[next(iter(self._held))]
        logits = trunk.choose(hidden_BND[torch.arange(len(keys), device=device), last_B])
        return self._backbone.head(logits).float().cpu()  # type: ignore[no-any-return]

    def _cache(self, keys: list[Hashable], common: list[int]) -> transformers.DynamicCache:
        C = max(common)
        if not C:
            return transformers.DynamicCache()
        rows = [(self._held[key][1] if n else (), n) for key, n in zip(keys, common, strict=True)]
        like = next(layers for layers, _ in rows if layers)

        def joined(layer: int, part: int) -> Tensor:
            heads, _, width = like[layer][part].shape
            out = like[layer][part].new_zeros(len(rows), heads, C, width)
            for b, (layers, n) in enumerate(rows):
                if n:
                    out[b, :, C - n :] = layers[layer][part][:, :n]
            return out

        return transformers.DynamicCache([(joined(i, 0), joined(i, 1)) for i in range(len(like))])


def _alike(lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Indices in groups of similar lengths."""
    order = np.argsort(lengths, kind="stable")
    begin = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or lengths[order[end]] > UNEVEN * lengths[order[begin]]:
            yield order[begin:end]
            begin = end
