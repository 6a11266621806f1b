"""A Llama of a few million weights, fast on one CPU thread: many texts at once, and caches that outlive a call.

Always true here: what is written depends on (prompt, temperature, seed) alone, up to float32 noise of 1e-6, not on who
else is being answered nor on what a cache held before; memory is bounded by the number of slots; a decoder is used by
one thread, `DecoderThread`'s, and sets no global option of torch.

A plain forward of such a model is mostly the overhead of small operations, and an episode reads its own history again
at each step. So each text has a slot that keeps its keys and values: the next prompt goes on where the longest common
beginning ends. One forward takes the new tokens of all texts in flight, be they a whole prompt or the last token
written: as one matrix for the linear layers, one text after the other for attention, which has no padding then.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from bopo_ray.errors import AttemptError

__all__ = ["DecoderThread", "Job", "KVDecoder"]

SLOTS = 48
"""Texts whose keys and values are kept: 150 MB when all are full, at 512 tokens, 4 layers and a width of 192."""
ROWS = 16
"""Most texts in flight at the same time."""
WASTE = 40
"""A slot that would lose at most so many tokens is taken over in place: what was written there, and is not read on."""
NORM_PAD = 16
"""Columns after each hidden state; the first holds the RMSNorm's epsilon, the number keeps rows aligned."""


class Job(NamedTuple):
    """One text to write."""

    prompt: Sequence[int]
    """Token ids; at least one."""
    max_tokens: int
    """Bound on what is written, the end token included; at least 1."""
    temperature: float = 0.0
    seed: int = 0
    """Of the noise that samples, where temperature > 0."""


@dataclass(slots=True, eq=False)
class _Row:
    """A job in flight."""

    job: Job
    slot: int
    start: int
    """Tokens that the slot holds."""
    new: list[int]
    """Tokens to read in the next forward."""
    written: list[int] = field(default_factory=list)
    noise: torch.Generator | None = None


class _Layer(NamedTuple):
    """The weights of a layer, transposed to [in, out], each with the gain of the norm before it multiplied in."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class KVDecoder:
    """The weights, the slots, and the forward. Not thread-safe."""

    @torch.inference_mode()
    def __init__(self, folder: Path, end: int, slots: int = SLOTS) -> None:
        """
        Args:
            folder: of a LlamaForCausalLM with as many key as query heads and tied embeddings; see `check_embedded`.
            end: id of the token that ends a text.
            slots: see `SLOTS`; also the most jobs in flight.
        """
        config = json.loads((folder / "config.json").read_text())
        weights = {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}
        self.context = int(config["max_position_embeddings"])
        self.end, self.slots = end, slots
        self._width, self._heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        self._size = int(config.get("head_dim") or self._width // self._heads)
        self._read_weights(weights, int(config["num_hidden_layers"]), float(config.get("rms_norm_eps", 1e-6)))
        self._rope_TD = _rope(config, self.context, self._size)
        self._mask_TT = torch.full((self.context, self.context), -torch.inf).triu_(1)
        # Attention reads a head's tokens in one run of memory. What was never written is never read, so that the
        # memory of unused slots is never touched.
        self._kv_LS2HTD = torch.empty(len(self._layers), slots, 2, self._heads, self.context, self._size)
        self._slots = [(kv[:, 0].transpose(2, 3), kv[:, 1]) for kv in self._kv_LS2HTD.unbind(1)]
        self._held_ST: npt.NDArray[np.int32] = np.zeros((slots, self.context), np.int32)
        self.reset()

    def reset(self) -> None:
        """Forgets all slots; needed after an error in `step`."""
        self._length_S = np.zeros(self.slots, np.int64)
        self._used_S = np.zeros(self.slots, np.int64)
        self._busy_S = np.zeros(self.slots, bool)
        self._clock = 0

    def begin(self, job: Job) -> _Row:
        """Finds a slot for `job`, which `step` then answers. Raises ValueError if it can't be read or no slot is free.

        A slot whose tokens are all, or nearly all, the beginning of the prompt is extended; the common beginning with
        any other, a text in flight included, is copied to the free slot that was used longest ago.
        """
        n = len(job.prompt)
        if n < 1 or job.max_tokens < 1 or n + job.max_tokens > self.context:
            raise ValueError(f"{n} tokens to read and {job.max_tokens} to write: need both > 0, sum <= {self.context}")
        free = np.flatnonzero(~self._busy_S)
        if not free.size:
            raise ValueError(f"all {self.slots} slots are in use")
        prompt_N = np.asarray(job.prompt, np.int32)
        # The last token is always read anew: its logits are not kept.
        limit_S = np.minimum(self._length_S, n - 1)
        differ_SN = self._held_ST[:, :n] != prompt_N
        common_S = np.minimum(np.where(differ_SN.any(1), differ_SN.argmax(1), n), limit_S)
        lost_S = self._length_S - common_S
        fit = free[(lost_S[free] <= WASTE) & (common_S[free] > 0)]
        best, kept = int(common_S.argmax()), int(common_S.max())
        if fit.size and common_S[fit].max() == kept:
            slot = int(fit[common_S[fit].argmax()])
        else:
            slot = int(free[self._used_S[free].argmin()])
            if slot != best and kept:
                self._copy(best, slot, kept)
        self._busy_S[slot] = True
        self._length_S[slot] = kept
        self._held_ST[slot, :n] = prompt_N
        noise = torch.Generator().manual_seed(job.seed) if job.temperature > 0 else None
        return _Row(job, slot, kept, list(job.prompt[kept:]), noise=noise)

    @torch.inference_mode()
    def step(self, rows: Sequence[_Row]) -> list[_Row]:
        """One more token for each row; returns those that are done, whose slots are free again."""
        logits_BV = self._forward(rows)
        for i, row in enumerate(rows):
            if row.noise is not None:
                # The largest sum of logits / temperature and Gumbel noise is an exact draw from their softmax.
                waits_V = torch.empty(logits_BV.shape[1]).exponential_(generator=row.noise)
                logits_BV[i].div_(row.job.temperature).sub_(waits_V.clamp_min_(torch.finfo(torch.float32).tiny).log_())
        done = []
        for row, token in zip(rows, logits_BV.argmax(1).tolist(), strict=True):
            row.start += len(row.new)
            self._length_S[row.slot] = row.start
            row.written.append(token)
            if token == self.end or len(row.written) >= row.job.max_tokens:
                self._clock += 1
                self._used_S[row.slot], self._busy_S[row.slot] = self._clock, False
                done.append(row)
            else:
                self._held_ST[row.slot, row.start] = token
                row.new = [token]
        return done

    def generate(self, jobs: Sequence[Job]) -> list[list[int]]:
        """What is written for each of `jobs`, their end tokens included; as many at once as there are slots."""
        waiting, begun, rows = deque(jobs), list[_Row](), list[_Row]()
        while waiting or rows:
            while waiting and len(rows) < min(self.slots, ROWS):
                rows.append(self.begin(waiting.popleft()))
                begun.append(rows[-1])
            done = set(map(id, self.step(rows)))
            rows = [row for row in rows if id(row) not in done]
        return [row.written for row in begun]

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int]) -> Tensor:
        """The logits [V] of the token after `prompt`; leaves a cache like `generate`."""
        row = self.begin(Job(prompt, 1))
        logits_V = self._forward([row])[0]
        self._busy_S[row.slot], self._length_S[row.slot] = False, len(prompt)
        return logits_V

    def _forward(self, rows: Sequence[_Row]) -> Tensor:
        """Reads the new tokens of each row into its slot; returns the logits [B, V] after the last ones."""
        ids, places, slots, sizes, pasts = list[int](), list[int](), list[int](), list[int](), list[_Past]()
        for row in rows:
            n, end = len(row.new), row.start + len(row.new)
            keys, values = self._slots[row.slot]
            mask = self._mask_TT[row.start : end, :end] if n > 1 else None
            pasts.append(_Past(keys.narrow(3, 0, end).unbind(0), values.narrow(2, 0, end).unbind(0), mask))
            ids += row.new
            places += range(row.start, end)
            slots += [row.slot] * n
            sizes.append(n)
        N, H, D = len(ids), self._heads, self._size
        place_N, slot_N = torch.tensor(places), torch.tensor(slots)
        rope_N1D = self._rope_TD.index_select(0, place_N).unsqueeze(1)
        padded = self._embedding.index_select(0, torch.tensor(ids))
        hidden = padded[:, : self._width]  # the residual stream, always changed in place, so that the padding stays
        mixed_NHD = torch.empty(N, H, D)
        mixed_NE = mixed_NHD.view(N, H * D)
        mixed = mixed_NHD.transpose(0, 1).split_with_sizes(sizes, 1)
        for i, layer in enumerate(self._layers):
            qkv_N3HD = torch.mm(_normed(hidden, padded), layer.qkv).view(N, 3, H, D)
            torch.view_as_complex(qkv_N3HD.view(N, 3 * H, D // 2, 2)[:, : 2 * H]).mul_(rope_N1D)
            self._kv_LS2HTD[i][slot_N, :, :, place_N] = qkv_N3HD[:, 1:]
            queries = qkv_N3HD[:, 0].transpose(0, 1).split_with_sizes(sizes, 1)
            for q_HnD, past, mixed_HnD in zip(queries, pasts, mixed, strict=True):
                score_HnT = torch.bmm(q_HnD, past.keys[i])
                if past.mask is not None:
                    score_HnT += past.mask
                torch.bmm(score_HnT.softmax(-1), past.values[i], out=mixed_HnD)
            hidden.addmm_(mixed_NE, layer.out)
            gate, up = torch.mm(_normed(hidden, padded), layer.gate_up).chunk(2, 1)
            hidden.addmm_(torch.nn.functional.silu(gate).mul_(up), layer.down)
        if len(rows) < N:
            padded = padded[torch.tensor(sizes).cumsum(0) - 1]
        return torch.mm(_normed(padded[:, : self._width], padded), self._head)

    @torch.inference_mode()
    def _copy(self, source: int, target: int, length: int) -> None:
        self._kv_LS2HTD[:, target, :, :, :length] = self._kv_LS2HTD[:, source, :, :, :length]

    def _read_weights(self, weights: dict[str, Tensor], layers: int, epsilon: float) -> None:
        root = self._width**0.5
        H, D = self._heads, self._size
        # RoPE turns the pair (i, i + D / 2); side by side the two are one complex number.
        order = torch.arange(D).view(2, D // 2).t().reshape(-1)

        def of(layer: int, name: str) -> Tensor:
            return weights[f"model.layers.{layer}.{name}.weight"]

        def pairs(w: Tensor) -> Tensor:
            return w.view(H, D, -1)[:, order].reshape(H * D, -1)

        self._layers = []
        for i in range(layers):
            q, k, v = (of(i, f"self_attn.{n}_proj") for n in "qkv")
            qkv = torch.cat([pairs(q) * D**-0.5, pairs(k), v]) * (of(i, "input_layernorm") * root)
            gate_up = torch.cat([of(i, "mlp.gate_proj"), of(i, "mlp.up_proj")])
            gate_up = gate_up * (of(i, "post_attention_layernorm") * root)
            parts = (qkv, of(i, "self_attn.o_proj"), gate_up, of(i, "mlp.down_proj"))
            self._layers.append(_Layer(*(w.t().contiguous() for w in parts)))
        embedding = weights["model.embed_tokens.weight"]
        self._head = (embedding * (weights["model.norm.weight"] * root)).t().contiguous()
        # sqrt(sum(x^2) + width * epsilon) is then the length of the padded row: one operation, not five.
        padding = torch.zeros(len(embedding), NORM_PAD)
        padding[:, 0] = (self._width * epsilon) ** 0.5
        self._embedding = torch.cat([embedding, padding], 1)


class _Past(NamedTuple):
    """What the new tokens of a row attend to: its slot up to them."""

    keys: tuple[Tensor, ...]
    """Per layer [H, D, T]"""
    values: tuple[Tensor, ...]
    """Per layer [H, T, D]"""
    mask: Tensor | None
    """[n, T], added to the scores; None for one token, which reads all."""


def _normed(hidden: Tensor, padded: Tensor) -> Tensor:
    """RMSNorm over sqrt(width), which the weights behind it make up for."""
    length_N1: Tensor = torch.linalg.vector_norm(padded, dim=1, keepdim=True)
    return hidden / length_N1


def _rope(config: dict[str, object], context: int, size: int) -> Tensor:
    """The turns [T, D / 2] as complex numbers."""
    parameters = config.get("rope_parameters") or config
    assert isinstance(parameters, dict)
    theta = float(parameters.get("rope_theta", 10_000.0))
    angle = torch.outer(torch.arange(context), theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size))
    return torch.polar(torch.ones_like(angle), angle)


class DecoderThread:
    """Answers the jobs of many threads: a new one joins between two tokens of those in flight.

    An error reaches the jobs in flight, and those after it are answered again.
    """

    def __init__(self, decoder: KVDecoder, name: str = "decoder") -> None:
        """`decoder` is used by no one else from here on."""
        self._decoder = decoder
        self._rows = min(ROWS, decoder.slots)
        self._waiting: deque[tuple[Job, Future[list[int]]]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, job: Job) -> Future[list[int]]:
        """What will be written, the end token included; cancel it to give up waiting. Raises AttemptError if closed."""
        future: Future[list[int]] = Future()
        with self._changed:
            if self._closed:
                raise _closed()
            self._waiting.append((job, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Fails what waits; what is being written still gets its end."""
        with self._changed:
            self._closed = True
            left = [future for _, future in self._waiting if future.set_running_or_notify_cancel()]
            self._waiting.clear()
            self._changed.notify()
        for future in left:
            future.set_exception(_closed())

    def _work(self) -> None:
        flying: list[tuple[_Row, Future[list[int]]]] = []
        while True:
            joining = self._joining(self._rows - len(flying), wait=not flying)
            if not joining and not flying:
                return
            for job, future in joining:
                try:
                    flying.append((self._decoder.begin(job), future))
                except BaseException as error:  # this job's own fault
                    future.set_exception(error)
            if not flying:
                continue
            try:
                done = {id(row) for row in self._decoder.step([row for row, _ in flying])}
            except BaseException as error:  # whoever waits must hear of it, whatever it is
                self._decoder.reset()
                for _, future in flying:
                    future.set_exception(error)
                flying = []
                continue
            for row, future in flying:
                if id(row) in done:
                    future.set_result(row.written)
            flying = [(row, future) for row, future in flying if id(row) not in done]

    def _joining(self, room: int, wait: bool) -> list[tuple[Job, Future[list[int]]]]:
        """Up to `room` jobs; from here on they can't be cancelled. With `wait` none only when closed."""
        jobs: list[tuple[Job, Future[list[int]]]] = []
        with self._changed:
            while True:
                while self._waiting and len(jobs) < room:
                    job, future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        jobs.append((job, future))
                if jobs or not wait or self._closed:
                    return jobs
                self._changed.wait_for(lambda: self._waiting or self._closed)


def _closed() -> AttemptError:
    return AttemptError("the model was closed while a call waited", kind="closed", retry=False, billed=False)
