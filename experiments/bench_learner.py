"""Steps per second of the router's update, beside a plain PyTorch loop on the same model and the same minibatches.

    python -m experiments.bench learner

* ours: `BoPOTorchLearner.update`, by which runs learn: RLlib around it, the old policy's and the reference's
  probabilities first, then minibatches in passes of similar lengths;
* naive: the same mathematics in a loop of a dozen lines, each minibatch padded to its longest row;
* limit: the forward and backward passes' products at the rate that this device multiplies large matrices at.

"one sequence" compares episodes as one sequence each with one forward pass for each step (naive), both by our learner.
On a GPU the causal model has half a billion weights, and rows of tokens per second and of memory are added; the ratio
to the limit is then the MFU, against the rate that was measured.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module import RLModuleSpec
from torch.utils.flop_counter import FlopCounterMode

from bopo_ray.method.loss import LossConfig, bopo_loss
from bopo_ray.rllib.batch import (
    ADVANTAGE,
    ANCHOR,
    LENGTH,
    MASK,
    WEIGHT,
    Group,
    TrainBatch,
    bopo_batch,
)
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.learner import BoPOTorchLearner
from bopo_ray.rllib.reading import Reading
from bopo_ray.rllib.router_module import ASKS, ROUTER_DEFAULTS, RouterModule
from experiments.bench import Row, interleave
from experiments.bench_router_parts import STEPS, episodes, make_backbone

__all__ = ["run"]

GROUP = 8
"""Episodes of a group; a causal model on a CPU has an update of one, others of four."""
MINIBATCH = 128
"""Steps."""


@dataclasses.dataclass(frozen=True)
class _StepByStep:
    """Reads as `Reader` does, but a causal model's episode as one prompt for each step."""

    read: Reader

    @property
    def padding(self) -> int:
        return self.read.padding

    def episode(self, views: Sequence[str]) -> list[Reading]:
        rows = [self.read(view) for view in views]
        return [Reading(ids[ids != self.padding]) for ids in rows]


def run(seconds: float = 20.0) -> Sequence[Row]:
    """Measure for about `seconds`."""
    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    rows = []
    rows += _against_a_loop("small encoder", _Setting({}, 4 * GROUP), seconds / 3)
    with tempfile.TemporaryDirectory() as folder:
        size = "0.5B" if gpu else "tiny"
        shape = {"backbone": str(make_backbone(Path(folder), size)), "context": 2048, "lora_rank": 16}
        count = 4 * GROUP if gpu else GROUP
        causal = _Setting(shape, count, gpu)
        name = f"causal LM ({size}), LoRA"
        rows += _against_a_loop(name, causal, seconds / 3)
        step = _Setting(shape, count, gpu, one_sequence=False)
        rates = interleave({"ours": causal.update, "naive": step.update}, seconds / 3)
        rows.append(Row(f"{name}: one sequence", "steps/s", *(rates[k] * causal.steps for k in rates), None))
    return rows


class _Setting:
    """A learner and a batch for it."""

    def __init__(self, shape: dict[str, Any], n: int, gpu: bool = False, one_sequence: bool = True) -> None:
        shape = ROUTER_DEFAULTS | shape
        read: Any = Reader.of(shape)
        read = read if one_sequence else _StepByStep(read)
        cfg = BoPOConfig().router(**shape)
        cfg.learners(num_gpus_per_learner=1 if gpu else 0)
        cfg.num_epochs, cfg.minibatch_size = 1, MINIBATCH
        ids = gym.spaces.Box(-1, np.iinfo(np.int32).max, (shape["context"],), np.int32)
        spec = RLModuleSpec(
            module_class=RouterModule, model_config=shape, observation_space=ids, action_space=gym.spaces.Discrete(2)
        )
        played = episodes(n)
        groups = [Group(tuple(played[i : i + GROUP]), np.linspace(-1, 1, GROUP), ()) for i in range(0, n, GROUP)]
        self.steps = n * STEPS
        torch.manual_seed(0)
        self.learner = BoPOTorchLearner(config=cfg, module_spec=spec)
        self.learner.build()
        self.learner.set_reference()
        made = bopo_batch(groups, STEPS, read, MINIBATCH, 1, np.random.default_rng(0))
        assert made is not None
        self.batch: TrainBatch = made
        self.tokens = int(made.data.policy_batches[DEFAULT_MODULE_ID][LENGTH].sum())

    def update(self) -> None:
        """Ours."""
        self.learner.update(batch=self.batch.data.copy(), num_epochs=1, minibatch_size=self.batch.rows)
        _finish(self.learner._device)

    def loop(self) -> Callable[[], None]:
        """The plain loop over the same minibatches, on weights of its own optimizer."""
        router, device = self.learner.router, self.learner._device
        optimizer = torch.optim.Adam([p for p in router.policy.parameters() if p.requires_grad], 3e-4)
        table = self.batch.data.policy_batches[DEFAULT_MODULE_ID]
        cfg = LossConfig()

        def minibatches() -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            out = []
            for begin in range(0, len(table[WEIGHT]), self.batch.rows):
                index = np.flatnonzero(table[LENGTH][begin : begin + self.batch.rows]) + begin
                T = int(table[LENGTH][index].max())
                there = torch.as_tensor(table[WEIGHT][index] != 0)
                rows = {k: torch.as_tensor(v[index]) for k, v in table.items() if k != LENGTH}
                part = {k: v[:, :T] if k in (Columns.OBS, ASKS) else v[there] for k, v in rows.items()}
                out.append(({k: v.to(device) for k, v in part.items()}, there))
            return out

        def update() -> None:
            parts = minibatches()
            with torch.no_grad():
                seen = [(router.policy(p[Columns.OBS], p.get(ASKS)), router.reference(p[Columns.OBS], p.get(ASKS)))
                        for p, _ in parts]  # fmt: skip
            for (part, _), (old, reference) in zip(parts, seen, strict=True):
                logp = torch.log_softmax(old, -1).gather(-1, part[Columns.ACTIONS].unsqueeze(-1)).squeeze(-1)
                logits = router.policy(part[Columns.OBS], part.get(ASKS))
                loss, _ = bopo_loss(logits, part[Columns.ACTIONS], logp, part[ADVANTAGE], reference, part[ANCHOR],
                                    part[WEIGHT], cfg, part[MASK])  # fmt: skip
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(router.policy.parameters(), 1.0)
                optimizer.step()
            _finish(device)

        return update


def _against_a_loop(name: str, setting: _Setting, seconds: float) -> list[Row]:
    ways = {"ours": setting.update, "naive": setting.loop()}
    for way in ways.values():
        way()
    with FlopCounterMode(display=False) as counter:
        ways["naive"]()
    device = setting.learner._device
    limit = _products_per_s(device) / max(1, counter.get_total_flops())
    rates = interleave(ways, seconds)
    rows = [Row(f"{name}: update", "steps/s", *(x * setting.steps for x in (rates["ours"], rates["naive"], limit)))]
    if device.type == "cuda":
        card, tokens = torch.cuda.get_device_name(device), setting.tokens
        rows.append(Row(f"{name}: {card}", "tokens/s", *(x * tokens for x in (rates["ours"], rates["naive"], limit))))
        rows.append(Row(f"{name}: memory", "GiB", *(_memory(way) for way in ways.values()), None))
    return rows


def _products_per_s(device: torch.device) -> float:
    """Floating-point operations per second of large matrix products, in the precision that is computed in."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        a @ a
        _finish(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def _memory(way: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    way()
    return torch.cuda.max_memory_allocated() / 2**30


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
