"""The tokenizer that ships with the project: a byte-level BPE of 2,048 tokens trained on ScienceWorld's train tasks.

It counts the simulated models' tokens, says when a prompt is long, and feeds the small router. Made by
`python -m experiments.train_tokenizer`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from bopo_ray.models.protocol import Message

__all__ = ["PAD", "SEP", "TOKENIZER_PATH", "count_tokens", "encode", "prompt_tokens", "tokenizer"]

TOKENIZER_PATH = Path(__file__).parent / "data" / "tokenizer.json"
CHAT_OVERHEAD_TOKENS = 4
"""Role markers of one chat message."""
PAD, CLS, SEP = "[PAD]", "[CLS]", "[SEP]"


@cache
def tokenizer() -> Tokenizer:
    """The shipped tokenizer; to it a text that says "[PAD]" is text."""
    shipped = Tokenizer.from_file(str(TOKENIZER_PATH))
    shipped.encode_special_tokens = True  # as text, that is: an environment may print anything
    return shipped


@lru_cache(maxsize=65_536)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of `text`; the cache makes the repeated prefixes of an episode free."""
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


def count_tokens(text: str) -> int:
    """Number of tokens in `text`."""
    return len(encode(text))


def prompt_tokens(messages: tuple[Message, ...]) -> int:
    """Tokens of a chat prompt: exact for simulated models, an estimate on the high side for others."""
    return sum(count_tokens(m.content) + CHAT_OVERHEAD_TOKENS for m in messages)
