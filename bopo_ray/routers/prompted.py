"""The prompted router: before each step the smallest model is asked who should write it. The episode pays for that."""

from __future__ import annotations

import re

from bopo_ray.routers.protocol import Moment, Router, one_hot

__all__ = ["QUESTION", "prompted"]

QUESTION = """You decide which of two language models writes the next action of an agent in a text environment.
SMALL is cheap and often wrong where a step is difficult; LARGE is several times as dear and more often right.
You are shown the task, the budget and the steps so far, each as "> action | observation". The aim is to finish the
task for as little as possible: choose LARGE where SMALL would probably fail at the next step, and SMALL elsewhere.
Answer with one word, SMALL or LARGE."""


def prompted() -> Router:
    """LARGE where the last of the two words in the reply is LARGE, else SMALL, as where nobody could be paid."""

    def route(moment: Moment) -> tuple[float, ...]:
        words = re.findall(r"\b(small|large)\b", moment.ask(QUESTION).lower())
        return one_hot(moment.n_models - 1 if words[-1:] == ["large"] else 0, moment.n_models)

    return route
