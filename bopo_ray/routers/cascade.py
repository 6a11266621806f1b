"""The cascade: SMALL until something goes visibly wrong, then LARGE for a few steps."""

from __future__ import annotations

from bopo_ray.agent import read_view
from bopo_ray.routers.protocol import Moment, Router, one_hot

__all__ = ["ERRORS", "cascade", "failures"]

ERRORS = (
    "ambiguous request", "can't", "cannot", "error:", "exception", "execution failed", "i'm not sure", "invalid",
    "it's not clear", "no known action", "nothing happens", "traceback", "your reply held no action",
)  # fmt: skip
"""What environments answer to an action that did not work, in lower case."""


def failures(history: tuple[tuple[str, str], ...]) -> list[bool]:
    """Whether each step of a history failed: its observation holds an error's text, its action repeats the one before,
    or the same action has had the same answer earlier on (no progress).

    The same answer to another action is no failure: code that works often answers nothing.
    """
    failed, seen = [], set[tuple[str, str]]()
    for i, (action, observation) in enumerate(history):
        said = observation.lower()
        repeats = (i > 0 and action == history[i - 1][0]) or (action, observation) in seen
        failed.append(repeats or any(error in said for error in ERRORS))
        seen.add((action, observation))
    return failed


def cascade(m_steps: float) -> Router:
    """LARGE for the `m_steps` steps after a failed one; a failure of LARGE's own counts, too, and prolongs it."""

    def route(moment: Moment) -> tuple[float, ...]:
        recent = failures(read_view(moment.view).history)[-int(m_steps) :]
        return one_hot(moment.n_models - 1 if any(recent) else 0, moment.n_models)

    return route
