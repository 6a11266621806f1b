"""Local language models: Hugging Face transformers, from a folder or the Hub, batched over the episodes in flight.

Always true here: a reply depends on (messages, temperature, sample) alone, not on who else is in its batch, up to the
rounding of the device (float32 noise of 1e-6; bfloat16 may tip a near tie); temperature is the only sampling setting, a
model's own defaults (top_p, repetition penalty) do not apply; no code that comes with a model is run.

Usage is exact: the prompt without padding; the completion with its end-of-sequence token, as `transformers serve` and
vLLM count it.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList

from bopo_ray.errors import AttemptError, ConfigError, ModelError
from bopo_ray.models.batching import Batcher
from bopo_ray.models.hf_files import find_model, loading, model_path, one_line
from bopo_ray.models.hf_template import ChatTemplate
from bopo_ray.models.pool import HUB, HUB_KEY, ModelSpec
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import LanguageModel, Message, Reply, Request
from bopo_ray.records import spawn_seed

__all__ = ["HFModel", "host", "shared_hf_model"]

WAIT_S = 600.0
"""Bound on a call: waiting for a place in a batch, and at first for the weights, included."""
MIN_PROMPT_TOKENS = 256
"""A context that leaves less than this for a prompt is no use."""
_MAKING, _LOADING = threading.Lock(), threading.Lock()
"""One model is made, and one loaded, at a time: loads of transformers that overlap leave models without weights."""
ACTOR_THREADS = 512
ACTOR_RESTARTS = 3


class _Described:
    """What is known of a model without its weights; shared by the model and by the client of one that lives elsewhere.

    Raises ConfigError when it can't be found.
    """

    needs_plan = False

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.name, self.price = spec.label, spec.price
        self._config, self._revision, version = find_model(spec)
        self._device = _device(spec)
        self._dtype = _dtype(spec, self._config, self._device)
        where = "folder" if self._revision is None else spec.target
        self.identity = f"hf|{where}|{version}|{self._dtype}"
        self._context: int | None = getattr(self._config.get_text_config(), "max_position_embeddings", None)
        # Old observations are dropped in time from a prompt that this model could not read.
        room = spec.max_prompt_tokens if self._context is None else self._context - spec.max_completion_tokens
        longest = max(1, min(spec.max_prompt_tokens, room))
        self.sampling = dataclasses.replace(spec.sampling, max_prompt_tokens=longest)
        self._lock = threading.Lock()
        self._loaded_prompts: ChatTemplate | None = None

    def bound(self, messages: tuple[Message, ...]) -> int:
        """See the protocol: each message's tokens, and what the template can add to it."""
        return self._prompts().bound(messages)

    def check(self) -> None:
        """Raises ConfigError when it can't answer; looks at files, context, device and template, not at the weights."""
        if self.sampling.max_prompt_tokens < MIN_PROMPT_TOKENS:
            raise ConfigError(
                f"model {self.spec.model!r}: max_completion_tokens={self.spec.max_completion_tokens} of a context of "
                f"{self._context} tokens leaves less than {MIN_PROMPT_TOKENS} for a prompt; set it lower"
            )
        may_come = os.environ.get("RAY_ADDRESS", "local") != "local"  # with a node of the cluster
        if self._device.startswith("cuda") and not (_gpus() or may_come):
            raise ConfigError(f"model {self.spec.model!r}: device={self.spec.device!r}: no GPU here; need cpu or auto")
        self._prompts()

    def _prompts(self) -> ChatTemplate:
        with self._lock:
            if self._loaded_prompts is None:
                with loading(self.spec):
                    tokenizer = AutoTokenizer.from_pretrained(
                        model_path(self.spec), revision=self._revision or "main", trust_remote_code=False
                    )
                self._loaded_prompts = ChatTemplate(tokenizer, self.spec.model)
            return self._loaded_prompts


class HFModel(_Described):
    """A model in this process. Its weights are loaded at the first call; `close` frees them until the next one."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec)
        self._writing: _Writer | None = None

    def complete(self, request: Request) -> Reply:
        """See the protocol."""
        started = time.perf_counter()
        prompts, prompt = self._prompts(), self._fitting(request)
        if len(prompt) > prompts.bound(request.messages):
            raise AttemptError(
                f"model {self.spec.model!r}: its chat template made {len(prompt)} tokens, more than the "
                f"{prompts.bound(request.messages)} that were reserved",
                kind="bound", retry=False, billed=False,
            )  # fmt: skip
        said = [f"{m.role}\x1d{m.content}" for m in request.messages]
        row = _Row(prompt, request.max_tokens, request.temperature, spawn_seed(self.identity, *said, request.sample))
        answer = self._write(row)
        text = prompts.text(answer)
        return Reply(text, Usage(len(prompt), len(answer)), time.perf_counter() - started)

    def _fitting(self, request: Request) -> list[int]:
        """The prompt; of an episode too long for the context, although its old observations are dropped, without its
        oldest turns. Raises ConfigError when the task and the newest turn are too long by themselves."""
        messages = request.messages
        while True:
            prompt = self._prompts().ids(messages)
            if self._context is None or len(prompt) + request.max_tokens <= self._context:
                return prompt
            if len(messages) <= 4:
                raise ConfigError(
                    f"model {self.spec.model!r}: a prompt of {len(prompt)} tokens and a reply of {request.max_tokens} "
                    f"do not fit into its context of {self._context}; set max_prompt_tokens or max_completion_tokens "
                    "lower"
                )
            messages = messages[:2] + messages[4:]

    def close(self) -> None:
        """Frees the weights; calls that wait fail."""
        with self._lock:
            writing, self._writing = self._writing, None
        if writing is not None:
            writing.batcher.close()

    def _write(self, row: _Row) -> list[int]:
        try:
            future = self._writer().batcher.submit(row)
            try:
                answer = future.result(WAIT_S)
            except TimeoutError:
                future.cancel()
                raise AttemptError(
                    f"model {self.spec.model!r}: no reply within {WAIT_S:g} s", kind="timeout", retry=True, billed=False
                ) from None
        except (ModelError, ConfigError):
            raise
        except Exception as error:
            raise AttemptError(
                f"model {self.spec.model!r} failed: {one_line(error)}",
                kind=f"hf {type(error).__name__}", retry=True, billed=False,
            ) from error  # fmt: skip
        if isinstance(answer, AttemptError):
            raise answer
        return answer

    def _writer(self) -> _Writer:
        prompts = self._prompts()
        with self._lock:
            if self._writing is None:
                with _LOADING, loading(self.spec):
                    model: Any = AutoModelForCausalLM.from_pretrained(
                        model_path(self.spec), revision=self._revision or "main", trust_remote_code=False,
                        dtype=getattr(torch, self._dtype),
                    )  # fmt: skip
                    model = model.to(self._device).eval()
                self._writing = _Writer(model, prompts.tokenizer, self.spec)
            return self._writing


@dataclass(frozen=True, slots=True)
class _Row:
    """One reply to write."""

    prompt: list[int]
    max_tokens: int
    temperature: float
    seed: int


class _Writer:
    """The weights, and the thread that writes with them."""

    def __init__(self, model: Any, tokenizer: Any, spec: ModelSpec) -> None:
        self.model, self.spec = model, spec
        eos = model.generation_config.eos_token_id
        eos = tokenizer.eos_token_id if eos is None else eos
        self.eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = tokenizer.pad_token_id
        self.pad = pad if pad is not None else self.eos[0] if self.eos else 0
        model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=self.eos or None, pad_token_id=self.pad
        )
        self.batcher: Batcher[_Row, list[int] | AttemptError] = Batcher(self.answer, spec.batch_size, "hf model")

    def answer(self, rows: list[_Row]) -> list[list[int] | AttemptError]:
        """The completions of `rows`; in halves when the GPU's memory does not do for all."""
        try:
            return list(self.generate(rows))
        except torch.OutOfMemoryError:
            pass  # handled below, where the failed batch is no longer held by the error's traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(rows) == 1:
            message = f"model {self.spec.model!r}: out of memory with a prompt of {len(rows[0].prompt)} tokens"
            return [AttemptError(message, kind="out of memory", retry=False, billed=False)]
        half = (len(rows) + 1) // 2
        self.batcher.batch_size = min(self.batcher.batch_size, half)
        return self.answer(rows[:half]) + self.answer(rows[half:])

    @torch.inference_mode()
    def generate(self, rows: Sequence[_Row]) -> list[list[int]]:
        """One batch, padded on the left; each row is cut at its own end."""
        width = max(len(row.prompt) for row in rows)
        ids = torch.tensor([[self.pad] * (width - len(row.prompt)) + row.prompt for row in rows])
        mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows])
        device = self.model.device
        written = self.model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device),
            max_new_tokens=max(row.max_tokens for row in rows),
            logits_processor=LogitsProcessorList([_Noise(rows, device)]),
        )  # fmt: skip
        replies = []
        for row, tokens in zip(rows, written[:, width:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos), len(tokens))
            replies.append(tokens[: min(end, row.max_tokens)])
        return replies


class _Noise(LogitsProcessor):
    """Gumbel noise for each row that samples: the largest sum is an exact draw from softmax(logits / temperature).

    Each row has a generator of its own and takes one draw per token from it, so no row sees its mates.
    """

    def __init__(self, rows: Sequence[_Row], device: torch.device) -> None:
        self._sampled = [
            (i, row.temperature, torch.Generator(device).manual_seed(row.seed))
            for i, row in enumerate(rows)
            if row.temperature > 0
        ]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for i, temperature, generator in self._sampled:
            waits = torch.empty_like(scores[i]).exponential_(generator=generator)
            scores[i] = scores[i] / temperature - waits.clamp_min(torch.finfo(waits.dtype).tiny).log()
        return scores


def shared_hf_model(spec: ModelSpec, models: int = 2) -> LanguageModel:
    """The model that all users share: in one actor per model where Ray runs, else in this process.

    Args:
        spec: which.
        models: how many such models the pool has; they share the cluster's GPUs.

    The actor belongs to the process that asked first and ends with it; whoever asks next makes it anew. So the driver
    does well to `host` it before its runners ask.
    """
    return _SharedHF(spec, models) if ray.is_initialized() else _local(spec)


def host(spec: ModelSpec, models: int = 2) -> None:
    """Starts the actor of a shared model, which then lasts as long as this process is connected to Ray."""
    _SharedHF(spec, models)._actor()


def _local(spec: ModelSpec) -> HFModel:
    """The model of this process: one, also for threads that ask at once."""
    with _MAKING:
        return _made(spec)


@functools.cache
def _made(spec: ModelSpec) -> HFModel:
    return HFModel(spec)


class _Host:
    """The actor. Loads nothing before the first call, whose caller then hears of errors in one line."""

    def __init__(self, spec: ModelSpec, key: str) -> None:
        """`key`: for the Hub, where this node has none."""
        self._spec = spec
        if key:
            os.environ.setdefault(HUB_KEY, key)

    def complete(self, request: Request) -> Reply:
        return _local(self._spec).complete(request)


class _SharedHF(_Described):
    """A model that lives in an actor."""

    def __init__(self, spec: ModelSpec, models: int) -> None:
        super().__init__(spec)
        self._share = _gpu_share(_gpus(), models) if self._device.startswith("cuda") else 0.0
        self._handle: Any = None

    def complete(self, request: Request) -> Reply:
        """See the protocol."""
        try:
            reply: Reply = ray.get(self._actor().complete.remote(request), timeout=WAIT_S)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ModelError | ConfigError):
                raise error.cause from None
            raise self._failed(error.cause) from error
        except ray.exceptions.RayError as error:
            self._handle = None  # a dead actor's name is free again: the next attempt asks by name
            raise self._failed(error) from error
        return reply

    def close(self) -> None:
        """Lets go of it; others may still use it."""
        self._handle = None

    def _actor(self) -> Any:
        with self._lock:
            if self._handle is None:
                name = f"bopo_ray {self.identity}"
                key = (ray.get_runtime_context().get_worker_id(), name)
                options = {
                    "name": name, "get_if_exists": True, "max_concurrency": ACTOR_THREADS,
                    "max_restarts": ACTOR_RESTARTS, "num_cpus": 0, "num_gpus": self._share,
                    # Read as the actor's modules are loaded; the key is not among them, as Ray's dashboard shows these.
                    "runtime_env": {"env_vars": {k: os.environ[k] for k in HUB if k in os.environ}},
                }  # fmt: skip
                # The owner's handle keeps the actor alive, so it outlives this object.
                actor = ray.remote(_Host).options(**options)
                self._handle = _HANDLES[key] = actor.remote(self.spec, os.environ.get(HUB_KEY, ""))
            return self._handle

    def _failed(self, error: BaseException) -> AttemptError:
        message = f"model {self.spec.model!r}: the actor that runs it failed: {one_line(error)}"
        return AttemptError(message, kind="actor", retry=True, billed=False)


_HANDLES: dict[tuple[str, str], Any] = {}
"""By Ray connection and name."""


def _gpu_share(gpus: float, models: int) -> float:
    """GPUs per model, so that all of them find a place: 1, or an equal part of one."""
    return 1.0 if models <= gpus else 1000 // -(-models // max(1, int(gpus))) / 1000


def _gpus() -> float:
    """Of the cluster where Ray runs, else of this machine."""
    if ray.is_initialized():
        return float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
    return float(torch.cuda.device_count())


def _device(spec: ModelSpec) -> str:
    if ray.is_initialized() and spec.device != "cpu":
        return "cuda" if spec.device != "auto" or _gpus() else "cpu"  # Ray says which one
    return ("cuda" if _gpus() else "cpu") if spec.device == "auto" else spec.device


def _dtype(spec: ModelSpec, config: Any, device: str) -> str:
    if spec.dtype != "auto":
        return spec.dtype
    saved = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return "float32" if device == "cpu" else saved
