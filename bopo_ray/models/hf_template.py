"""Chat messages to tokens, by a model's own chat template, and a bound that needs no whole conversation.

Always true here: `ChatTemplate.bound` is additive and at least the length of the prompt.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Sequence
from typing import Any

import jinja2

from bopo_ray.errors import ConfigError
from bopo_ray.models.hf_files import one_line
from bopo_ray.models.protocol import Message

__all__ = ["ChatTemplate"]

BORDER_TOKENS = 2
"""Reserved per message for what may be split where its text meets the template's: a bound, not an estimate."""


class ChatTemplate:
    """Messages to tokens, by the model's own chat template. Thread-safe."""

    def __init__(self, tokenizer: Any, model: str) -> None:
        self.tokenizer = tokenizer
        self._model = model
        self._lock = threading.Lock()
        self._count = functools.lru_cache(maxsize=65_536)(self._tokens)
        if not tokenizer.chat_template:
            raise ConfigError(
                f"model {model!r} has no chat template: need an instruction-tuned model, or one whose tokenizer's "
                "folder holds a chat_template.jinja"
            )
        self._start, self._added = self._measure()

    def ids(self, messages: Sequence[Message], ask: bool = True) -> list[int]:
        """The prompt, with the opening of the reply when `ask`."""
        chat = [{"role": m.role, "content": m.content} for m in messages]
        try:
            with self._lock:
                return list(
                    self.tokenizer.apply_chat_template(
                        chat, add_generation_prompt=ask, tokenize=True, return_dict=False
                    )
                )
        except jinja2.TemplateError as error:
            roles = ", ".join(m.role for m in messages[:4])
            raise ConfigError(
                f"model {self._model!r}: its chat template refuses a prompt of {roles}: {one_line(error)}; choose a "
                "model whose template takes system, user and assistant messages"
            ) from error

    def text(self, ids: list[int]) -> str:
        """A reply without its special tokens."""
        with self._lock:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def bound(self, messages: Sequence[Message]) -> int:
        """At least `len(ids(messages))`; additive."""
        return self._start + sum(self._count(m.content) + self._added.get(m.role, 0) for m in messages)

    def _tokens(self, text: str) -> int:
        with self._lock:
            return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _measure(self) -> tuple[int, dict[str, int]]:
        """Tokens that the template adds once, and per message by role, probed with conversations of several lengths."""
        probe = "A probe, of no meaning."
        system, user, assistant = (Message(role, probe) for role in ("system", "user", "assistant"))
        n = self._count(probe)
        talks = [(system, user, *(assistant, user) * k) for k in range(4)]
        asked = [len(self.ids(talk)) for talk in talks]
        unasked = [len(self.ids(talk, ask=False)) for talk in talks]
        answered = [len(self.ids((*talk, assistant), ask=False)) for talk in talks]
        per_user = max(0, *(u - a - n for a, u in zip(answered, unasked[1:], strict=False)))
        per_assistant = max(0, *(b - a - 2 * n - per_user for a, b in itertools.pairwise(asked)))
        alone = len(self.ids((user,)))  # may hold a system message of the template's own
        per_system = max(0, asked[0] - alone - n)
        start = max(alone - n - per_user, asked[0] - 2 * n - per_user - per_system, 0)
        added = {"system": per_system, "user": per_user, "assistant": per_assistant}
        return start, {role: tokens + BORDER_TOKENS for role, tokens in added.items()}
