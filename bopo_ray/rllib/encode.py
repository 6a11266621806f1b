"""The router's text view as token ids of a fixed length.

Layout: step, task [SEP] budget [SEP] newest history line, then older ones. Newest first, so that what just happened
stands at the same positions at every step, and what does not fit is the oldest. The task and budget lines always fit;
history lines get longer with the context. The step, an id behind those of the vocabulary, says how many were taken: in
the budget line it is digits, which a small encoder hardly learns to read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bopo_ray.models.tokens import PAD, SEP, encode, tokenizer
from bopo_ray.rllib.reading import NOTHING, Reading

__all__ = ["TASK_TOKENS", "Reader", "encode_view", "visible"]

TASK_TOKENS, BUDGET_TOKENS, NEWEST_TOKENS, OLDER_TOKENS = 36, 16, 24, 10
"""At most so many tokens of the task, the budget, the newest and each older history line ..."""
NEWEST_SHARE, OLDER_SHARE = 4, 10
"""... or, where that is more, one in so many of the context's tokens for the newest and each older line."""


@dataclass(frozen=True, slots=True)
class Reader:
    """How a router reads its view."""

    context: int
    """Length of what it reads, in tokens."""
    backbone: str = ""
    """The Hugging Face model that it is; empty for the small encoder."""

    @classmethod
    def of(cls, shape: Mapping[str, Any]) -> Reader:
        """Of a router of this shape, see `ROUTER_DEFAULTS`."""
        return cls(int(shape["context"]), shape.get("backbone", ""))

    def __call__(self, view: str) -> NDArray[np.int32]:
        """Token ids [context], int32. Raises ConfigError when a backbone can't read it."""
        return self._prompt.ids(view) if self.backbone else encode_view(view, self.context)

    def episode(self, views: Sequence[str]) -> list[Reading]:
        """What is read to decide at each step of an episode, of which these are the views: one reading for each step,
        or fewer that have several. Raises ConfigError when a backbone can't read it.
        """
        if self.backbone:
            return self._prompt.episode(views)  # type: ignore[no-any-return]
        rows = [encode_view(view, self.context) for view in views]
        return [Reading(ids[: int((ids != self.padding).sum())]) for ids in rows]

    @property
    def padding(self) -> int:
        """The id that stands behind what is read."""
        return NOTHING if self.backbone else tokenizer().token_to_id(PAD)

    @property
    def _prompt(self) -> Any:
        from bopo_ray.rllib.prompt import prompt_of  # brings transformers and torch, which reports do without

        return prompt_of(self.backbone, self.context)


def encode_view(view: str, context: int) -> NDArray[np.int32]:
    """Token ids [context], int32, padded with [PAD]."""
    tok = tokenizer()
    sep, pad = (tok.token_to_id(t) for t in (SEP, PAD))
    (task, _), (budget, _), *history = _lines(view, context)
    ids = [tok.get_vocab_size() + max(0, len(history) - 1), *task, sep, *budget, sep]
    for line, _ in history:
        ids += line
        if len(ids) >= context:
            break
    out = np.full(context, pad, np.int32)
    out[: min(len(ids), context)] = ids[:context]
    return out


def visible(view: str, context: int) -> str:
    """What `encode_view` keeps of a view, for people: its lines as the router meets them, "…" where one is cut off."""
    room, shown = context - 3, []
    for ids, whole in _lines(view, context):
        kept = ids[: max(0, room)]
        room -= len(ids)
        if kept:
            cut = not whole or len(kept) < len(ids)
            shown.append(tokenizer().decode(list(kept)).strip() + " …" * cut)
    return "\n".join(shown)


def _lines(view: str, context: int) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Task, budget, newest and older history lines as cut token ids, and whether that is the whole line."""
    task, budget, *history = view.split("\n")
    newest, older = max(NEWEST_TOKENS, context // NEWEST_SHARE), max(OLDER_TOKENS, context // OLDER_SHARE)
    limits = [TASK_TOKENS, BUDGET_TOKENS, newest] + [older] * len(history)
    for line, limit in zip((task, budget, *reversed(history)), limits, strict=False):
        ids = encode(line)
        yield ids[:limit], len(ids) <= limit
