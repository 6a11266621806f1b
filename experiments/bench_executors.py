"""Episodes per minute and tokens per second of the language models that come with the project.

    python -m experiments.bench executors

* ours: `EmbeddedModel`, whose decoder keeps the keys and values of each episode and writes for all of them at once;
* naive: the same folder by plain `transformers`, which reads the whole window again at each call;
* limit: of episodes, the environment alone, replaying the same actions; of tokens, the matrix products of the weights
  alone, without attention or anything between them.

Episodes are greedy boundary rollouts, always-small and always-large in turn, and all ways play the same ones; so many
processes as there are cores play eight at a time each, as the env runners of a run do. One thread of torch in each
process. ScienceWorld's pair, and ALFWorld's where that is installed.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import gymnasium as gym
import torch

from bopo_ray.benchmarks import select_tasks
from bopo_ray.models import build_pool
from bopo_ray.models.embedded import EmbeddedModel
from bopo_ray.models.embedded_prompt import MAX_ACTION_TOKENS
from bopo_ray.models.kv_decoder import Job, KVDecoder
from bopo_ray.models.pool import ModelSpec, PoolSpec, resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.models.protocol import ModelPool
from bopo_ray.routing_env import RoutingEnv
from envs.base import Split
from experiments.bench import Row, interleave

__all__ = ["decoding", "episode_rates", "rows_of", "run"]

SCIENCEWORLD, ALFWORLD = ("ScienceWorld-v0", "embedded:scienceworld"), ("ALFWorld-v0", "embedded:alfworld")
"""Benchmark and the models that come for it."""
AT_ONCE = 8
"""Episodes that a process plays at the same time."""
MAX_STEPS = 30
READ_TOKENS = 300
"""Of each text, before the tokens that are timed."""
CROWDS = (1, 8)
"""Texts at the same time."""


def run(seconds: float = 20.0) -> Sequence[Row]:
    """Measures for about `seconds`, after a warm-up. Raises ConfigError where the models are not installed."""
    pairs = [SCIENCEWORLD, ALFWORLD] if find_spec("fast_downward") else [SCIENCEWORLD]
    return [row for pair in pairs for row in rows_of(*pair, seconds / len(pairs))]


def rows_of(env_id: str, models: str | PoolSpec, seconds: float, max_steps: int = MAX_STEPS) -> Sequence[Row]:
    """Of a pair of embedded models on a benchmark. Raises ConfigError where they are not installed."""
    spec = resolve_pool(models, "", "", price_table()) if isinstance(models, str) else models
    for model in build_pool(spec).models:
        model.check()
    processes = os.cpu_count() or 1
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        parts = [pool.submit(episode_rates, spec, env_id, seconds * 0.7, i, max_steps) for i in range(processes)]
        rates = [part.result() for part in parts]
    ours, naive, limit = (60 * sum(rate[way] for rate in rates) for way in ("ours", "naive", "limit"))
    each = seconds * 0.3 / (len(spec.models) * len(CROWDS))
    return [
        Row(f"{env_id}, boundary rollouts", "episodes/min", ours, naive, limit),
        *(decoding(model, crowd, each) for model in spec.models for crowd in CROWDS),
    ]


def episode_rates(
    spec: PoolSpec, env_id: str, seconds: float, part: int = 0, max_steps: int = MAX_STEPS
) -> dict[str, float]:
    """Episodes per second of each way, in this process.

    Args:
        spec: a pair of embedded models.
        env_id: the benchmark.
        seconds: to measure for; each way plays at least one round.
        part: processes with different numbers play different tasks.
        max_steps: of an episode.
    """
    torch.set_num_threads(1)
    ours = build_pool(spec)
    naive = dataclasses.replace(ours, models=tuple(_Naive(m) for m in spec.models))
    seats = [gym.make(env_id, disable_env_checker=True, max_steps=max_steps) for _ in range(AT_ONCE)]
    tasks = select_tasks(env_id, Split.TRAIN, 10**6, part)
    played: dict[int, tuple[str, list[str]]] = {}

    def round_of(play: Callable[[int, gym.Env[str, str]], None]) -> Callable[[], None]:
        numbers = itertools.count()

        def round_() -> None:  # each one has tasks of its own: no cache may know an episode before it is played
            start = next(numbers) * AT_ONCE
            for _ in threads.map(play, range(start, start + AT_ONCE), seats):
                pass

        return round_

    def by_models(pool: ModelPool) -> Callable[[int, gym.Env[str, str]], None]:
        def play(number: int, env: gym.Env[str, str]) -> None:
            task = tasks[number % len(tasks)].name
            actions = _boundary(RoutingEnv(env, pool, temperature=0.0), task, number % len(pool.models))
            if pool is ours:
                played[number] = task, actions

        return play

    def replay(number: int, env: gym.Env[str, str]) -> None:
        task, actions = played[number]
        env.reset(options={"task": task})
        for action in actions:
            env.step(action)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        warm = len(tasks) // 2  # Java starts and the weights are loaded; those of transformers not by many at once
        by_models(naive)(warm, seats[0])
        for _ in threads.map(by_models(ours), range(warm, warm + AT_ONCE), seats):
            pass
        ways = {"ours": round_of(by_models(ours)), "naive": round_of(by_models(naive)), "limit": round_of(replay)}
        rates = interleave(ways, seconds)
    for closed in (*seats, *ours.models, *naive.models):
        closed.close()
    return {way: rate * AT_ONCE for way, rate in rates.items()}


def decoding(spec: ModelSpec, crowd: int, seconds: float) -> Row:
    """Tokens per second of `crowd` texts that are written at once, each after `READ_TOKENS` (fewer in a small context).

    All ways have read the beginning before, and write as many tokens as an action may have.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = EmbeddedModel(spec)
        decoder = KVDecoder(model.files.folder, end=-1, slots=crowd)
        read = min(READ_TOKENS, model.prompts.room)
        draw = torch.Generator().manual_seed(0)
        vocabulary = model.prompts.tokenizer.get_vocab_size()
        prompts = torch.randint(5, vocabulary, (crowd, read), generator=draw)
        jobs = [Job(prompt, MAX_ACTION_TOKENS) for prompt in prompts.tolist()]

        def ours() -> None:
            decoder.generate(jobs)

        ours()
        ways = {"ours": ours, "naive": _by_transformers(spec, prompts), "limit": _products(decoder, crowd)}
        rates = interleave(ways, seconds)
    finally:
        torch.set_num_threads(threads)
    tokens = crowd * MAX_ACTION_TOKENS
    name = f"{spec.label}, writing {crowd} text{'s' if crowd > 1 else ''} after {read} tokens"
    return Row(name, "tokens/s", *(rates[way] * tokens for way in ("ours", "naive", "limit")))


def _boundary(env: RoutingEnv, task: str, model: int) -> list[str]:
    """The actions of an episode in which `model` writes all of them."""
    env.reset(options={"task": task})
    actions, info = list[str](), dict[str, Any]()
    while "stop" not in info:
        *_, info = env.step(model)
        actions.append(info["action"])
    return [action for action in actions if action]


class _Naive(EmbeddedModel):
    """The same model by `transformers`, without a cache between calls."""

    def _write(self, job: Job) -> list[int]:
        with self._lock:
            if not hasattr(self, "_plain"):
                self._plain = _load(self.spec)
        ids = torch.tensor([job.prompt])
        with torch.inference_mode():
            written = self._plain.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.max_tokens, do_sample=False
            )
        answer: list[int] = written[0, len(job.prompt) :].tolist()
        return answer


def _load(spec: ModelSpec) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(EmbeddedModel(spec).files.folder, dtype=torch.float32).eval()


def _by_transformers(spec: ModelSpec, prompts: torch.Tensor) -> Callable[[], None]:
    from transformers import DynamicCache

    model, cache = _load(spec), DynamicCache()
    with torch.inference_mode():
        model(input_ids=prompts[:, :-1], past_key_values=cache)

    @torch.inference_mode()
    def write() -> None:
        last = prompts[:, -1:]
        for _ in range(MAX_ACTION_TOKENS):
            last = model(input_ids=last, past_key_values=cache).logits[:, -1:].argmax(-1)
        cache.crop(-MAX_ACTION_TOKENS)

    return write


def _products(decoder: KVDecoder, crowd: int) -> Callable[[], None]:
    with torch.inference_mode():
        pairs = [(torch.randn(crowd, len(w)), w) for layer in decoder._layers for w in layer]
        pairs.append((torch.randn(crowd, len(decoder._head)), decoder._head))

    @torch.inference_mode()
    def multiply() -> None:
        for _ in range(MAX_ACTION_TOKENS):
            for x, w in pairs:
                torch.mm(x, w)

    return multiply
