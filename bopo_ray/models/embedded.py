"""Language models that this project trains itself, in this process: for machines without a GPU, an API or the Hub.

Always true here: a reply depends on (messages, temperature, sample) alone, up to float32 noise; usage is measured: the
tokens of the window that was read, and those written, the end token included; all users of a folder in a process share
one decoder and its caches.
"""

from __future__ import annotations

import threading
import time

from bopo_ray.errors import AttemptError, ConfigError, ModelError
from bopo_ray.models.embedded_files import check_weights, embedded_folder, embedded_names, read_embedded
from bopo_ray.models.embedded_prompt import MAX_ACTION_TOKENS, EmbeddedPrompt
from bopo_ray.models.kv_decoder import DecoderThread, Job, KVDecoder
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Usage
from bopo_ray.models.protocol import Message, Reply, Request, Sampling
from bopo_ray.records import spawn_seed

__all__ = ["EmbeddedModel", "embedded_folder", "embedded_names"]

WAIT_S = 600.0
"""Bound on a call, waiting for its turn included."""
ANY_LENGTH = 1_000_000
"""The model chooses its own window of a conversation, so that nobody else shortens it."""


class EmbeddedModel:
    """A model of `embedded_names()`, or in a folder of one's own. Its weights are loaded at the first call."""

    needs_plan = False

    def __init__(self, spec: ModelSpec) -> None:
        """Raises ConfigError when there is no such model, or its folder holds none that can be run."""
        self.spec = spec
        self.name, self.price = spec.label, spec.price
        self.files = read_embedded(embedded_folder(spec.target, spec.base), spec.model)
        self.env = self.files.env
        """Id of the environment that it was trained for; it is of no use in another one."""
        self.kinds = self.files.kinds
        """Kinds of task that it was shown."""
        self.identity = f"embedded|{self.files.digest}"
        self.sampling = Sampling(spec.temperature, min(spec.max_completion_tokens, MAX_ACTION_TOKENS), ANY_LENGTH)
        self.prompts = EmbeddedPrompt(self.files.folder, self.files.context)
        self._lock = threading.Lock()
        self._decoder: _Shared | None = None

    def bound(self, messages: tuple[Message, ...]) -> int:
        """See the protocol."""
        return self.prompts.bound(messages)

    def check(self) -> None:
        """Raises ConfigError when its weights are not whole."""
        check_weights(self.files.folder, self.spec.model)

    def complete(self, request: Request) -> Reply:
        """See the protocol."""
        started = time.perf_counter()
        job = self.job(request)
        answer = self._write(job)
        return Reply(self.prompts.text(answer), Usage(len(job.prompt), len(answer)), time.perf_counter() - started)

    def job(self, request: Request) -> Job:
        """What its decoder is asked."""
        said = [f"{m.role}\x1d{m.content}" for m in request.messages]
        return Job(
            self.prompts.ids(request.messages),
            min(request.max_tokens, MAX_ACTION_TOKENS),
            request.temperature,
            spawn_seed(self.identity, *said, request.sample),
        )

    def close(self) -> None:
        """Lets go of the decoder, which is freed when nobody in this process uses it."""
        with self._lock:
            decoder, self._decoder = self._decoder, None
        if decoder is not None:
            decoder.leave()

    def _write(self, job: Job) -> list[int]:
        try:
            future = self._shared().thread.submit(job)
            try:
                return future.result(WAIT_S)
            except TimeoutError:
                future.cancel()
                raise AttemptError(
                    f"model {self.spec.model!r}: no reply within {WAIT_S:g} s", kind="timeout", retry=True, billed=False
                ) from None
        except (ModelError, ConfigError):
            raise
        except Exception as error:
            raise AttemptError(
                f"model {self.spec.model!r} failed: {' '.join(str(error).split())[:300]}",
                kind=f"embedded {type(error).__name__}", retry=True, billed=False,
            ) from error  # fmt: skip

    def _shared(self) -> _Shared:
        with self._lock:
            if self._decoder is None:
                self.check()
                self._decoder = _Shared.join(self)
            return self._decoder


class _Shared:
    """The decoder of a folder, and how many models of this process use it."""

    _all: dict[str, _Shared] = {}  # noqa: RUF012 (by identity: equal files make equal replies)
    _joining = threading.Lock()

    def __init__(self, model: EmbeddedModel) -> None:
        self._identity, self._users = model.identity, 0
        self.thread = DecoderThread(KVDecoder(model.files.folder, model.prompts.end), f"decoder {model.name}")

    @classmethod
    def join(cls, model: EmbeddedModel) -> _Shared:
        """The one of `model`'s files, loaded if need be."""
        with cls._joining:
            shared = cls._all.get(model.identity)
            if shared is None:
                shared = cls._all[model.identity] = cls(model)
            shared._users += 1
            return shared

    def leave(self) -> None:
        """The last one closes it."""
        with self._joining:
            self._users -= 1
            if self._users:
                return
            del self._all[self._identity]
        self.thread.close()
