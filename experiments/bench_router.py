"""How long a router takes for a decision, in a run's own way: from the view's text to probabilities.

    python -m experiments.bench router

The small encoder, and a tiny causal language model that keeps what it has read of each episode (ours) beside one that
reads the whole prompt at each step (naive). Times are of a call that decides for so many episodes at once; the median
and the 95th percentile. One thread of torch, as in a run's runners. The share of the bill is a decision's time at the
price of a CPU, beside a call of GPT-4.1-mini with 1,000 tokens to read and 50 written, at list prices.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from ray.rllib.core.columns import Columns

from bopo_ray.agent import episode_views
from bopo_ray.models.pricing import Usage, price_table
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.memory import Memory
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS, RouterModule
from experiments.bench import Row
from experiments.bench_router_parts import STEPS, episodes, make_backbone, make_module

__all__ = ["run"]

BATCHES, CAUSAL_BATCHES = (1, 8, 64), (1, 8)
"""Episodes that a call decides for: the small encoder, and the language model."""
Decide = Callable[[Sequence[str]], None]
"""Decides the next step of each of a batch of episodes."""


def run(seconds: float = 20.0) -> Sequence[Row]:
    """Measure for about `seconds`."""
    torch.set_num_threads(1)
    views = [episode_views(e) for e in episodes(max(BATCHES))]
    rows, small = [], make_module({}, inference_only=True).eval()
    for batch in BATCHES:
        ours = _times(lambda: _whole(small), views[:batch], seconds / 6)
        rows += _rows("small encoder", batch, ours, None)
    with tempfile.TemporaryDirectory() as folder:
        shape = {"backbone": str(make_backbone(Path(folder), "tiny")), "context": 2048, "lora_rank": 16}
        causal = make_module(shape, inference_only=True).eval()
        for batch in CAUSAL_BATCHES:
            ours = _times(lambda: _remembering(causal), views[:batch], seconds / 8)
            naive = _times(lambda: _whole(causal), views[:batch], seconds / 8)
            rows += _rows("tiny causal LM", batch, ours, naive)
    return rows


def _rows(name: str, batch: int, ours: np.ndarray, naive: np.ndarray | None) -> list[Row]:
    def at(percentile: float) -> tuple[float, float | None]:
        return tuple(None if t is None else float(np.percentile(t, percentile)) * 1e3 for t in (ours, naive))  # type: ignore[return-value]

    rows = [Row(f"{name}, batch {batch}: p{p}", "ms", *at(p), None) for p in (50, 95)]
    rate = [None if t is None else batch / float(t.mean()) for t in (ours, naive)]
    rows.append(Row(f"{name}, batch {batch}", "decisions/s", rate[0] or 0.0, rate[1], None))
    table = price_table()
    call = table.price("gpt-4.1-mini").cost(Usage(1000, 50))
    share = [None if r is None else 100 * table.cpu_hour_microusd / 3600 / r / call for r in rate]
    rows.append(Row(f"{name}, batch {batch}: share of a call's price", "%", share[0] or 0.0, share[1], None))
    return rows


def _times(make: Callable[[], Decide], views: Sequence[Sequence[str]], seconds: float) -> np.ndarray:
    """Seconds of each call, over whole episodes, after one to warm up."""
    times: list[float] = []
    make()([v[0] for v in views])
    end = time.monotonic() + seconds
    while not times or time.monotonic() < end:
        decide = make()
        for step in range(STEPS):
            begin = time.perf_counter()
            decide([v[step] for v in views])
            times.append(time.perf_counter() - begin)
    return np.array(times)


def _whole(module: RouterModule) -> Decide:
    read = Reader.of(ROUTER_DEFAULTS | dict(module.model_config))

    def decide(views: Sequence[str]) -> None:
        with torch.inference_mode():
            ids = torch.from_numpy(np.stack([read(v) for v in views]))
            logits = module.forward_inference({Columns.OBS: ids})[Columns.ACTION_DIST_INPUTS]
        torch.softmax(logits, -1).double().tolist()

    return decide


def _remembering(module: RouterModule) -> Decide:
    read, memory = Reader.of(ROUTER_DEFAULTS | dict(module.model_config)), Memory(module.policy)

    def decide(views: Sequence[str]) -> None:
        torch.softmax(memory.logits([read(v) for v in views], range(len(views))), -1).double().tolist()

    return decide
