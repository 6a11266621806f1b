"""The router's view as the prompt of a Hugging Face model, in token ids.

Always true here: the task and the budget line are whole; what does not fit is the oldest of the history; text of a task
or an environment never becomes a special token. A causal model's prompt is

    instruction, task, history line .. history line | budget line, end

What stands behind the bar is the step's own question; all before it begins the next step's prompt, too. So an episode
is one sequence with a question after each line, which no other token sees; and an actor keeps what it has read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import transformers
from numpy.typing import NDArray

from bopo_ray.errors import ConfigError
from bopo_ray.models.hf_files import find_model, loading, model_path, one_line
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price
from bopo_ray.rllib.reading import NOTHING, Reading

__all__ = ["Prompt", "action_letters", "is_causal", "prompt_of", "spec_of", "windows"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSTRUCTION = (
    "An agent solves a task step by step. Choose the language model that writes its next action: answer with its "
    "letter alone. A is the cheapest model; each later letter is a stronger and dearer one.\n"
)
LONGEST_BUDGETS = ("budget: $1000000.0000; steps left 100000", "budget: 1000000 large calls; steps left 100000")
KEPT = 0.6
"""Share of the room for history that is left filled when the oldest lines are dropped: many at once, so that most steps
only add to what was read before."""
_MARK = "<<view>>"


def spec_of(backbone: str) -> ModelSpec:
    """The backbone, a folder or a name of the Hub, as the other Hugging Face models are described."""
    return ModelSpec(model=f"hf:{backbone}", price=Price(0, 0, 0))


def described(backbone: str) -> tuple[Any, str | None]:
    """Config and Hub revision of a backbone. Raises ConfigError for what is no model."""
    try:
        config, revision, _ = find_model(spec_of(backbone))
    except ConfigError as error:
        raise ConfigError(f"backbone={backbone!r}: {error}; set it with --backbone") from error
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"backbone={backbone!r} is an encoder with a decoder ({config.model_type}); need a causal language model "
            "or an encoder; set it with --backbone"
        )
    return config, revision


def is_causal(config: Any) -> bool:
    """Whether it writes text: then the logits of letters decide, else a head on what an encoder reads."""
    names = config.architectures or []
    if names:
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return bool(getattr(config, "is_decoder", False))


def action_letters(tokenizer: Any, n_models: int, backbone: str, chat: bool) -> tuple[int, ...]:
    """Token ids [n_models] of the letters that stand for the models.

    Raises ConfigError where a letter is not one token of its own.
    """
    if n_models > len(LETTERS):
        raise ConfigError(f"{n_models} models: a backbone decides between {len(LETTERS)} at most; use fewer models")
    forms = ("",) if chat else (" ", "")
    for form in forms:
        pieces = [tokenizer.encode(form + x, add_special_tokens=False) for x in LETTERS[:n_models]]
        ids = tuple(p[0] for p in pieces if len(p) == 1 and p[0] != tokenizer.unk_token_id)
        if len(set(ids)) == n_models:
            return ids
    bad = next(x for x, p in zip(LETTERS, pieces, strict=False) if len(p) != 1 or p[0] == tokenizer.unk_token_id)
    raise ConfigError(
        f"backbone={backbone!r}: its tokenizer has no token for {bad!r} alone; need one for each of "
        f"{', '.join(LETTERS[:n_models])}, one letter per model; choose another --backbone"
    )


def windows(lengths: Sequence[int], room: int) -> list[int]:
    """The first history line that is read at each step of an episode, where step t has the lines 0 to t.

    Args:
        lengths: tokens of each line, each at most half the room.
        room: tokens that there are for them; where they are more, the oldest lines go until `KEPT` of it is filled.
    """
    starts, start, filled = list[int](), 0, 0
    for n in lengths:
        filled += n
        if filled > room:
            while filled > KEPT * room:
                filled -= lengths[start]
                start += 1
        starts.append(start)
    return starts


class Prompt:
    """Views to token ids, by the tokenizer of a backbone and its chat template, where there is one."""

    def __init__(self, backbone: str, context: int) -> None:
        """
        Args:
            backbone: folder or name of the Hub.
            context: the most tokens of a prompt.

        Raises:
            ConfigError: what is no model, has no tokenizer or one that lacks a needed token, or reads less than
                `context` tokens.
        """
        self.backbone, self.context = backbone, context
        config, revision = described(backbone)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and context > longest:
            raise ConfigError(
                f"backbone_context={context}: {backbone!r} reads {longest} tokens at most; set it with "
                "--backbone-context"
            )
        spec = spec_of(backbone)
        with loading(spec):
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                model_path(spec), revision=revision or "main", trust_remote_code=False
            )
        self.causal = is_causal(config)
        self.chat = self.causal and bool(self.tokenizer.chat_template)
        before, after = self._frame()
        self._before = tuple(self.tokenizer.encode(before, add_special_tokens=False))
        self._after = tuple(self.tokenizer.encode(after, add_special_tokens=False))
        if self.causal and not self.chat:
            start = self.tokenizer.bos_token_id
            self._before = (*([] if start is None else [start]), *self._before)
        if not self.causal:
            self._before, self._after = (self._needed("cls_token"),), (self._needed("sep_token"),)
        self._line = functools.lru_cache(maxsize=16_384)(self._tokens)
        self._budget = max(len(self._line("\n" + line)) for line in LONGEST_BUDGETS)

    def ids(self, view: str) -> NDArray[np.int32]:
        """Token ids [context], int32, with `NOTHING` behind the prompt.

        Raises ConfigError where task and budget alone are longer than the context.
        """
        ids = self._sequences([view])[0].ids if self.causal else self._newest(view)
        out = np.full(self.context, NOTHING, np.int32)
        out[: len(ids)] = ids
        return out

    def episode(self, views: Sequence[str]) -> list[Reading]:
        """What is read to decide at each step of an episode, of which these are the views.

        Of a causal model one sequence for the steps that share a window, of an encoder one for each step.
        Raises ConfigError as `ids` does.
        """
        if self.causal:
            return self._sequences(views) if views else []
        return [Reading(np.asarray(self._newest(view), np.int32)) for view in views]

    def _sequences(self, views: Sequence[str]) -> list[Reading]:
        """The sequences of an episode's steps, or of its last one, whose views these are."""
        task, _, *history = views[-1].split("\n")
        head = [*self._before, *self._line(task)]
        room = self._room(self.least(task), task)
        lines = [self._line("\n" + line)[: room // 2] for line in history]
        starts = windows([len(line) for line in lines], room)
        steps = range(len(lines) - len(views), len(lines))
        sequences: list[tuple[list[int], list[int]]] = []
        for i, (t, view) in enumerate(zip(steps, views, strict=True)):
            if not i or starts[t] != starts[t - 1]:
                ids, asks, new = list(head), [0] * len(head), lines[starts[t] : t + 1]
                sequences.append((ids, asks))
            else:
                new = lines[t : t + 1]
            budget = self._line("\n" + view.split("\n", 2)[1])
            if len(budget) > self._budget:
                raise ConfigError(
                    f"the budget line {view.split(chr(10), 2)[1]!r} has {len(budget)} tokens: a prompt has room for "
                    f"{self._budget}; give a budget below 1000000"
                )
            question = [*budget, *self._after]
            for line in new:
                ids += line
                asks += [0] * len(line)
            ids += question
            asks += [max(asks) + 1] * len(question)
        return [Reading(np.asarray(ids, np.int32), np.asarray(asks, np.int32)) for ids, asks in sequences]

    def _newest(self, view: str) -> list[int]:
        """An encoder's prompt: task, budget, and as many of the newest lines as there is room for."""
        task, budget, *history = view.split("\n")
        head = [*self._before, *self._line(task), *self._line("\n" + budget)]
        room = self._room(len(head) + len(self._after), task)
        kept: list[Sequence[int]] = []
        for line in reversed(history):
            tokens = self._line("\n" + line)
            if len(tokens) > room:
                kept += [] if kept else [tokens[:room]]
                break
            kept.append(tokens)
            room -= len(tokens)
        return [*head, *(t for tokens in reversed(kept) for t in tokens), *self._after]

    def least(self, task: str) -> int:
        """Tokens of a prompt without history, for a view whose first line is `task`, under the longest budget."""
        return len(self._before) + len(self._line(task)) + self._budget + len(self._after)

    def _room(self, taken: int, task: str) -> int:
        """Tokens that are left for the history."""
        if taken > self.context:
            raise ConfigError(
                f"backbone_context={self.context}: task and budget alone make a prompt of {taken} tokens "
                f"(task: {task[:40]!r} ...); need at least that; set it with --backbone-context"
            )
        return self.context - taken

    def _needed(self, name: str) -> int:
        """Id of a special token without which an encoder's prompt can't be made."""
        token: int | None = getattr(self.tokenizer, f"{name}_id")
        if token is None:
            raise ConfigError(
                f"backbone={self.backbone!r}: its tokenizer has no {name}; an encoder needs cls_token and sep_token; "
                "choose another --backbone"
            )
        return token

    def letters(self, n_models: int) -> tuple[int, ...]:
        """Token ids [n_models] that stand for the models; see `action_letters`."""
        return action_letters(self.tokenizer, n_models, self.backbone, self.chat)

    def _frame(self) -> tuple[str, str]:
        """What stands before and behind the view."""
        if not self.causal:
            return "", ""
        if not self.chat:
            return INSTRUCTION, "\nAnswer:"
        chat = [{"role": "user", "content": f"{INSTRUCTION}{_MARK}"}]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
        except jinja2.TemplateError as error:
            raise ConfigError(
                f"backbone={self.backbone!r}: its chat template refuses a user message: {one_line(error)}; choose "
                "another --backbone"
            ) from error
        before, mark, after = str(text).partition(_MARK)
        if not mark:
            raise ConfigError(
                f"backbone={self.backbone!r}: its chat template leaves the user's message out; choose another "
                "--backbone"
            )
        return before, after

    def _tokens(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


@functools.cache
def prompt_of(backbone: str, context: int) -> Prompt:
    """The one that this process uses."""
    return Prompt(backbone, context)
