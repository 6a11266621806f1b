"""The router's text view as token ids of a fixed length.

Layout: [CLS] task [SEP] budget [SEP] newest history line, then older ones. Newest first, so that what just happened
stands at the same positions at every step, and what does not fit is the oldest. The task and budget lines always fit.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bopo_ray.models.tokens import CLS, PAD, SEP, encode, tokenizer

__all__ = ["TASK_TOKENS", "encode_view"]

TASK_TOKENS, BUDGET_TOKENS, NEWEST_TOKENS, OLDER_TOKENS = 36, 16, 24, 10
"""At most so many tokens of the task, the budget, the newest and each older history line."""


def encode_view(view: str, context: int) -> NDArray[np.int32]:
    """Token ids [context], int32, padded with [PAD]."""
    tok = tokenizer()
    cls, sep, pad = (tok.token_to_id(t) for t in (CLS, SEP, PAD))
    task, budget, *history = view.split("\n")
    ids = [cls, *encode(task)[:TASK_TOKENS], sep, *encode(budget)[:BUDGET_TOKENS], sep]
    for age, line in enumerate(reversed(history)):
        ids += encode(line)[: NEWEST_TOKENS if age == 0 else OLDER_TOKENS]
        if len(ids) >= context:
            break
    out = np.full(context, pad, np.int32)
    out[: min(len(ids), context)] = ids[:context]
    return out
