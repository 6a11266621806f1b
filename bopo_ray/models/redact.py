"""Endpoints' own words, made fit to show: one short line without secrets.

Always true here: secrets go before anything is cut off, so that no half of one is left.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

__all__ = ["HIDDEN", "Complaint", "complaint", "read_json", "redact"]

HIDDEN = "[hidden]"
MAX_CHARS = 300
MAX_READ_CHARS = 10_000
"""Error pages can be long; the rest of one says nothing more."""
PART_CHARS = 8
"""Endpoints echo keys in part, so that so many characters of one in a row count as the key."""

_WORD = re.compile(r"[^\s\"'`<>,;(){}\[\]]+")
# Keys as providers write them, starred out or not, and whatever an Authorization header carried.
_KEY = re.compile(r"\b(?:(?:sk|gsk|hf|xai|nvapi)[-_]|AIza)[\w*.…-]{6,}|\bbearer\s+[^\s\"',;]{6,}", re.IGNORECASE)


class Complaint(NamedTuple):
    """Why an endpoint refused, in its own words: not yet fit to show."""

    message: str
    codes: tuple[str, ...]
    """Its machine-readable words for it, e.g. "content_filter"."""


def complaint(content: bytes) -> Complaint:
    """Reads all dialects: {"error": {...}}, {"error": "..."}, {"message": ...}, {"detail": ...}, or a page."""
    body = read_json(content)
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        message = error.get("message") or error.get("detail") or json.dumps(error)
        return Complaint(str(message), tuple(str(error.get(k)) for k in ("code", "type")))
    return Complaint(error if isinstance(error, str) else content.decode("utf-8", "replace"), ())


def read_json(content: bytes) -> Any:
    """The body; None where it is no JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` on one line of about 300 characters, without `secrets` or anything that looks like a key."""
    text = text[:MAX_READ_CHARS]
    for secret in secrets:
        if secret:
            text = _hide(text, secret)
    text = " ".join(_KEY.sub(HIDDEN, text).split())
    text = "".join(c for c in text if c.isprintable())
    return text if len(text) <= MAX_CHARS else text[: MAX_CHARS - 3] + "..."


def _hide(text: str, secret: str) -> str:
    text = text.replace(secret, HIDDEN)
    parts = {secret[i : i + PART_CHARS] for i in range(len(secret) - PART_CHARS + 1)}

    def word(match: re.Match[str]) -> str:
        found = match.group()
        windows = (found[i : i + PART_CHARS] for i in range(len(found) - PART_CHARS + 1))
        return HIDDEN if any(w in parts for w in windows) else found

    return _WORD.sub(word, text)
