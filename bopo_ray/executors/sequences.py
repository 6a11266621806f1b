"""Demonstrations as training sequences, read through the same windows as at inference.

Always true here: each taught action is learned once per pass, from exactly the tokens that the model would read before
it; nothing is learned from an action that is not the expert's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bopo_ray.executors.demos import Demo, demo_messages
from bopo_ray.models.embedded_prompt import EmbeddedPrompt

__all__ = ["Stretch", "batches", "sequences"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """One stretch of an episode that a model reads in one go."""

    ids: list[int]
    """T tokens."""
    kinds: list[int]
    """T flags: what there is to learn in predicting this token: 0 nothing, 1 text, 2 an action of the expert."""


def sequences(demo: Demo, prompt: EmbeddedPrompt) -> Iterator[Stretch]:
    """The windows of a demonstration, each as far as it stays the same but for what is added."""
    task, steps = prompt.parts(demo_messages(demo))
    ends = [prompt.action_ids(a) for a in demo.actions]
    windows = prompt.windows(len(task), [len(s) for s in steps])[: len(ends)]  # none after the last observation
    at = 0
    while at < len(ends):
        start = windows[at].start
        last = max(i for i in range(at, len(ends)) if windows[i].start == start)
        head = prompt.join(task, steps[: at + 1], start)[:-1]  # all that was read before the first of these actions
        ids, kinds = list(head), [int(at == 0)] * len(head)
        for i in range(at, last + 1):
            ids += ends[i]
            kinds += [0, *[2 * demo.taught[i]] * (len(ends[i]) - 1)]
            if i < last:
                said = steps[i + 1][len(ends[i]) :]
                ids += said
                kinds += [0] + [1] * (len(said) - 1)
        yield Stretch(ids[: prompt.context], kinds[: prompt.context])
        at = last + 1


def batches(items: Sequence[Stretch], tokens: int, rng: random.Random) -> list[list[Stretch]]:
    """Batches of similar lengths, of at most `tokens` tokens each when padded, in random order."""
    ordered = sorted(items, key=lambda s: len(s.ids) + rng.random())
    out: list[list[Stretch]] = []
    batch: list[Stretch] = []
    for item in ordered:
        if batch and (len(batch) + 1) * len(item.ids) > tokens:
            out.append(batch)
            batch = []
        batch.append(item)
    if batch:
        out.append(batch)
    rng.shuffle(out)
    return out
