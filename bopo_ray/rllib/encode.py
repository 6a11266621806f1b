"""The router's text view as token ids of a fixed length.

Layout: [CLS] task [SEP] budget [SEP] newest history line, then older ones. Newest first, so that what just happened
stands at the same positions at every step, and what does not fit is the oldest. The task and budget lines always fit.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from bopo_ray.models.tokens import CLS, PAD, SEP, encode, tokenizer

__all__ = ["TASK_TOKENS", "encode_view", "visible"]

TASK_TOKENS, BUDGET_TOKENS, NEWEST_TOKENS, OLDER_TOKENS = 36, 16, 24, 10
"""At most so many tokens of the task, the budget, the newest and each older history line."""


def encode_view(view: str, context: int) -> NDArray[np.int32]:
    """Token ids [context], int32, padded with [PAD]."""
    tok = tokenizer()
    cls, sep, pad = (tok.token_to_id(t) for t in (CLS, SEP, PAD))
    (task, _), (budget, _), *history = _lines(view)
    ids = [cls, *task, sep, *budget, sep]
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
    for ids, whole in _lines(view):
        kept = ids[: max(0, room)]
        room -= len(ids)
        if kept:
            cut = not whole or len(kept) < len(ids)
            shown.append(tokenizer().decode(list(kept)).strip() + " …" * cut)
    return "\n".join(shown)


def _lines(view: str) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Task, budget, newest and older history lines as cut token ids, and whether that is the whole line."""
    task, budget, *history = view.split("\n")
    limits = [TASK_TOKENS, BUDGET_TOKENS, NEWEST_TOKENS] + [OLDER_TOKENS] * len(history)
    for line, limit in zip((task, budget, *reversed(history)), limits, strict=False):
        ids = encode(line)
        yield ids[:limit], len(ids) <= limit
