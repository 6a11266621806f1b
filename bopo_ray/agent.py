"""The ReAct harness: a history becomes chat messages and the router's view; a reply becomes an action.

Always true here: model output is only ever read as text; the task is never dropped from a prompt, old
observations are.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from bopo_ray.models.protocol import Message
from bopo_ray.records import Budget, CostMode, Episode

__all__ = [
    "FEEDBACK", "SeenView", "Turn", "budget_text", "chat_messages", "episode_views", "parse_action", "parse_code",
    "question_messages", "read_view", "router_view",
]  # fmt: skip

SYSTEM = """You are an agent that solves a task in a text environment, one action at a time.
Every reply has exactly two lines:
Thought: one or two sentences on what the last observation tells you and what to do next.
Action: the single action to take, in the environment's own words.
{guide}
Take no action twice when it did not help. Stop only when the environment says that the task is over."""

FEEDBACK = "Your reply held no action. Answer with a line 'Thought: ...' and a line 'Action: ...'."
DROPPED = "[earlier observation dropped]"
MAX_ACTION_CHARS = 200
MAX_CODE_CHARS = 2000

# Matched line by line, and no two neighbouring runs share a character: linear time on whatever a model writes.
_ACTION = re.compile(r"[\s>*_`#-]*action(?:[ \t]*\d+)?[ \t*_`]*[:=](.*)", re.IGNORECASE | re.DOTALL)
_FENCE = re.compile(r"\s*```\w*\s*")
_AFTER = re.compile(r"[>*_#-]*(?:```|(?:thought|observation)[ \t]*\d*[ \t*_]*:)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished step of the episode."""

    reply: str
    action: str
    """Empty when the reply held none."""
    observation: str


def parse_action(reply: str) -> str:
    """The action in a reply: the last `Action:` line, or a bare one-line reply; empty when there is none.

    An action may stand on the line below its label; the fences of code blocks count as no line.
    """
    lines = [line for line in reply.splitlines() if line.strip() and not _FENCE.fullmatch(line)]
    bare = ["" if ":" in line else _clean(line) for line in lines] + [""]
    found = [_clean(m.group(1)) or bare[i + 1] for i, line in enumerate(lines) if (m := _ACTION.match(line))]
    actions = [action for action in found if action] or (bare[:1] if len(lines) == 1 else [])
    return actions[-1][:MAX_ACTION_CHARS] if actions else ""


def parse_code(reply: str) -> str:
    """The action in a reply where actions are code: what follows the last `Action:`, or else the reply's fenced block
    or its only line; empty when there is none. Code keeps its lines, indentation and quotes.
    """
    lines = [line.rstrip() for line in reply.splitlines() if line.strip()]
    labels = [(i, m) for i, line in enumerate(lines) if (m := _ACTION.match(line))]
    block = lines
    if labels:
        at, label = labels[-1]
        block = [line for line in (label.group(1).strip(" *"), *lines[at + 1 :]) if line]
    fences = [i for i, line in enumerate(block) if _FENCE.fullmatch(line)]
    if fences and (fences[0] == 0 or not labels):
        block = block[fences[0] + 1 : fences[1] if len(fences) > 1 else None]
    elif labels:
        end = next((i for i, line in enumerate(block) if _AFTER.match(line) and (i or line[0] != "`")), None)
        block = block[:end]
    elif len(block) != 1 or _AFTER.match(block[0]):
        return ""
    code = textwrap.dedent("\n".join(block))
    return (code.strip("`") if len(block) == 1 else code)[:MAX_CODE_CHARS]


def chat_messages(
    task_text: str,
    first_observation: str,
    turns: Sequence[Turn],
    guide: str,
    max_tokens: int,
    count: Callable[[tuple[Message, ...]], int],
) -> tuple[Message, ...]:
    """The chat prompt of the next call, of at most `max_tokens` where dropping old observations can achieve it."""
    head = (
        Message("system", SYSTEM.format(guide=guide)),
        Message("user", f"Task: {task_text}\n\nObservation: {first_observation}"),
    )
    pairs = [(Message("assistant", t.reply), Message("user", f"Observation: {t.observation}")) for t in turns]
    messages = head + tuple(m for pair in pairs for m in pair)
    excess = count(messages) - max_tokens
    for i in range(len(pairs) - 1):
        if excess <= 0:
            break
        dropped = Message("user", DROPPED)
        saved = count((pairs[i][1],)) - count((dropped,))
        if saved <= 0:
            continue
        excess -= saved
        pairs[i] = (pairs[i][0], dropped)
        messages = head + tuple(m for pair in pairs for m in pair)
    return messages


def question_messages(
    question: str, view: str, max_tokens: int, count: Callable[[tuple[Message, ...]], int]
) -> tuple[Message, ...]:
    """A router's question about its view, without the oldest history lines where it is longer than `max_tokens`."""
    lines = view.split("\n")
    head, history = lines[:3], lines[3:]
    while True:
        messages = Message("system", question), Message("user", "\n".join([*head, *history]))
        if not history or count(messages) <= max_tokens:
            return messages
        history = history[1:]


def router_view(task_text: str, first_observation: str, turns: Sequence[Turn], steps_left: int, budget: str) -> str:
    """What the router reads: a task line, a budget line, then the history, oldest first.

    Each history entry is one line "> action | observation", so that a reader can drop the oldest.
    """
    lines = [f"task: {_flat(task_text)}", f"budget: {budget}; steps left {steps_left}", f"| {_flat(first_observation)}"]
    lines += [f"> {_flat(t.action) or '(no action)'} | {_flat(t.observation)}" for t in turns]
    return "\n".join(lines)


class SeenView(NamedTuple):
    """A router's view taken apart."""

    task: str
    steps_left: int
    history: tuple[tuple[str, str], ...]
    """(action, observation) of each step so far, oldest first."""


def read_view(view: str) -> SeenView:
    """What `router_view` wrote. An action that holds " | " itself, as code may, ends there for the reader."""
    task, budget, _, *history = view.split("\n")
    pairs = (line.removeprefix("> ").partition(" | ") for line in history)
    left = int(budget.rpartition("steps left ")[2])
    return SeenView(task.removeprefix("task: "), left, tuple((action, said) for action, _, said in pairs))


def budget_text(budget: Budget | None, spent: int) -> str:
    """The remaining budget in words; `spent` is in the unit of the budget."""
    if budget is None:
        return "unlimited"
    left = budget.cap - spent
    return f"{left} large calls" if budget.mode is CostMode.CALLS else f"${left / 1e6:.4f}"


def episode_views(episode: Episode) -> list[str]:
    """What the router saw at each step of a finished episode."""
    views, turns, spent = [], list[Turn](), 0
    budget = episode.spec.budget
    for step in episode.steps:
        left = budget_text(budget, spent)
        views.append(
            router_view(episode.task_text, episode.first_observation, turns, episode.max_steps - len(turns), left)
        )
        turns.append(Turn(step.reply, step.action, step.observation))
        if budget is not None:
            spent += step.charged_microusd if budget.mode is CostMode.USD else int(step.model > 0)
    return views


def _flat(text: str) -> str:
    return " ".join(text.split())


def _clean(text: str) -> str:
    return _flat(text).strip("`*\"' .")
