"""What an embedded model reads: chat messages as tokens, and the window of them that fits into its context.

    <task> text <obs> text <act> action <end> <obs> text <act> action <end> ... <obs> text <act>

Always true here: the task is read first, the newest observation last; the window depends on the messages alone, and
grows by what is new until it is full, so that a cache of keys and values can be kept over an episode's steps; training
reads episodes through the same windows. The system prompt is not read: the models know one environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from bopo_ray.models.protocol import Message

__all__ = [
    "ACT", "CHAT_TEMPLATE", "END", "MAX_ACTION_TOKENS", "OBS", "PAD", "SPECIAL", "TASK", "EmbeddedPrompt", "Window",
]  # fmt: skip

PAD, TASK, OBS, ACT, END = SPECIAL = ("<pad>", "<task>", "<obs>", "<act>", "<end>")
MAX_ACTION_TOKENS = 32
"""Room for a reply; the longest action of an expert has fewer."""
KEPT = 0.6
"""Share of the room that is left filled when the oldest steps are dropped from a full window."""

CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m.role == 'assistant' -%}<act>{{ m.content }}<end>"
    "{%- elif m.role == 'user' -%}{%- set parts = m.content.split('Observation: ', 1) -%}"
    "{%- if parts[0].startswith('Task: ') -%}<task>{{ parts[0][6:] }}{%- endif -%}<obs>{{ parts[-1] }}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<act>{%- endif -%}"
)
"""The same tokens for `transformers`, as long as the whole conversation fits."""


class Window(NamedTuple):
    """What is read of an episode before one of its actions."""

    start: int
    """The first step whose observation is read; 0 is the episode's first observation."""
    length: int
    """Tokens, the task and the opening of the action included."""


class EmbeddedPrompt:
    """Messages to tokens, for one tokenizer and context. Thread-safe."""

    def __init__(self, folder: Path, context: int) -> None:
        """
        Args:
            folder: of the model; it holds tokenizer.json.
            context: tokens that the model reads and writes at most.
        """
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.encode_special_tokens = True  # a text that says "<act>" is text
        self.context = context
        vocabulary = self.tokenizer.get_vocab()
        self.task, self.obs, self.act, self.end = (vocabulary[token] for token in SPECIAL[1:])
        self.room = context - MAX_ACTION_TOKENS
        self._encode = lru_cache(maxsize=65_536)(self._encoded)

    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, ids: Sequence[int]) -> str:
        """A reply without its special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def action_ids(self, action: str) -> list[int]:
        """An action as it is written, with its opening and its end."""
        return [self.act, *self._encode(action), self.end]

    def parts(self, messages: Sequence[Message]) -> tuple[list[int], list[list[int]]]:
        """The task's tokens, and of each observation its tokens after those of the action that led to it."""
        task: list[int] = []
        steps: list[list[int]] = []
        opening: list[int] = []
        for m in messages:
            if m.role == "assistant":
                opening = [*opening, *self.action_ids(m.content)]
            elif m.role == "user":
                before, found, after = m.content.partition("Observation: ")
                if before.startswith("Task: "):
                    task = [self.task, *self._encode(before[6:])]
                steps.append([*opening, self.obs, *self._encode(after if found else before)])
                opening = []
        return task, steps

    def window(self, task: int, steps: Sequence[int]) -> Window:
        """What is read before the next action, from token counts: of the task, and of each step so far."""
        return self.windows(task, steps)[-1]

    def windows(self, task: int, steps: Sequence[int]) -> list[Window]:
        """The window at each step of an episode. A full one drops its oldest steps, down to `KEPT` of the room."""
        out, start, filled = [], 0, min(task, self.room // 2) + 1
        for i, n in enumerate(steps):
            filled += n
            if filled > self.room:
                while start < i and filled > KEPT * self.room:
                    filled -= steps[start]
                    start += 1
            out.append(Window(start, min(filled, self.room)))
        return out

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt, with the opening of the action; at most `room` tokens."""
        task, steps = self.parts(messages)
        return self.join(task, steps, self.window(len(task), [len(s) for s in steps]).start)

    def join(self, task: list[int], steps: Sequence[list[int]], start: int) -> list[int]:
        """The tokens of a window. What is too long by itself is cut at its end."""
        head = task[: self.room // 2]
        body = [t for step in steps[start:] for t in step]
        return [*head, *body[: self.room - len(head) - 1], self.act]

    def bound(self, messages: Sequence[Message]) -> int:
        """At least the tokens of the prompt, and all of them while they fit; subadditive, as the protocol wants it."""
        return min(sum(map(self._tokens, messages)) + 1, self.room)

    def _tokens(self, message: Message) -> int:
        if message.role == "assistant":
            return len(self._encode(message.content)) + 2
        if message.role != "user":
            return 0
        before, found, after = message.content.partition("Observation: ")
        task = len(self._encode(before[6:])) + 1 if before.startswith("Task: ") else 0
        return task + len(self._encode(after if found else before)) + 1
