"""The router's view as the prompt of a Hugging Face model, in token ids of a fixed length.

Always true here: the task and the budget line are whole; what does not fit is the oldest of the history, then the end
of the newest observation; text of a task or an environment never becomes a special token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from bopo_ray.errors import ConfigError
from bopo_ray.models.hf_files import find_model, loading, model_path, one_line
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price

__all__ = ["NOTHING", "Prompt", "action_letters", "is_causal", "prompt_of", "spec_of"]

NOTHING = -1
"""Stands behind the prompt, up to the fixed length: no token has this id."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSTRUCTION = (
    "An agent solves a task step by step. Choose the language model that writes its next action. A is the cheapest "
    "model; each later letter is a stronger and dearer one.\n"
)
QUESTION = "\nWhich model is needed now? Answer with its letter alone."
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


class Prompt:
    """Views to token ids, by the tokenizer of a backbone and its chat template, where there is one."""

    def __init__(self, backbone: str, context: int) -> None:
        """
        Args:
            backbone: folder or name of the Hub.
            context: length of the prompt, in tokens.

        Raises:
            ConfigError: what is no model, has no tokenizer, or reads less than `context` tokens.
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
            self.tokenizer: Any = AutoTokenizer.from_pretrained(
                model_path(spec), revision=revision or "main", trust_remote_code=False
            )
        self.causal = is_causal(config)
        self.chat = self.causal and bool(self.tokenizer.chat_template)
        before, after = self._frame()
        self._before = tuple(self.tokenizer.encode(before, add_special_tokens=False))
        self._after = tuple(self.tokenizer.encode(after, add_special_tokens=False))
        if not self.chat:
            start, end = self.tokenizer.bos_token_id, None
            if not self.causal:
                start, end = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
            self._before = (*([] if start is None else [start]), *self._before)
            self._after = (*self._after, *([] if end is None else [end]))
        self._line = functools.lru_cache(maxsize=16_384)(self._tokens)

    def ids(self, view: str) -> NDArray[np.int32]:
        """Token ids [context], int32, with `NOTHING` behind the prompt.

        Raises ConfigError where task and budget alone are longer than the context.
        """
        task, budget, *history = view.split("\n")
        head = [*self._line(task), *self._line("\n" + budget)]
        room = self.context - len(self._before) - len(head) - len(self._after)
        if room < 0:
            raise ConfigError(
                f"backbone_context={self.context}: task and budget alone make a prompt of {self.context - room} tokens "
                f"(task: {task[:40]!r} ...); need at least that; set it with --backbone-context"
            )
        kept: list[Sequence[int]] = []
        for line in reversed(history):
            tokens = self._line("\n" + line)
            if len(tokens) > room:
                kept += [] if kept else [tokens[:room]]
                break
            kept.append(tokens)
            room -= len(tokens)
        ids = [*self._before, *head, *(t for tokens in reversed(kept) for t in tokens), *self._after]
        out = np.full(self.context, NOTHING, np.int32)
        out[: len(ids)] = ids
        return out

    def letters(self, n_models: int) -> tuple[int, ...]:
        """Token ids [n_models] that stand for the models; see `action_letters`."""
        return action_letters(self.tokenizer, n_models, self.backbone, self.chat)

    def _frame(self) -> tuple[str, str]:
        """What stands before and behind the view."""
        if not self.causal:
            return "", ""
        if not self.chat:
            return INSTRUCTION, f"{QUESTION}\nAnswer:"
        chat = [{"role": "user", "content": f"{INSTRUCTION}{_MARK}{QUESTION}"}]
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
