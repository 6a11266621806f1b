"""Where a Hugging Face model lies, and which one it is: a folder, or a name of the Hub.

Always true here: two models that could answer differently have different versions; what can't be loaded is told in one
line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.utils import logging

from bopo_ray.errors import ConfigError
from bopo_ray.models.pool import ModelSpec
from envs.cache import cache_folder, keep

__all__ = ["find_model", "loading", "model_path", "one_line"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LARGE = 16 << 20
"""Bytes above which a file's hash is kept in the cache."""


def model_path(spec: ModelSpec) -> str:
    """What transformers loads it by."""
    return str(spec.folder) if spec.folder.is_dir() else spec.target


def find_model(spec: ModelSpec) -> tuple[Any, str | None, str]:
    """The config, the Hub's revision (None for a folder) and what tells this version from others."""
    folder = spec.folder
    if folder.is_dir():
        _check_folder(spec, folder)
    elif not _HUB_NAME.fullmatch(spec.target):
        raise ConfigError(f"model {spec.model!r}: no folder {str(folder)!r}; need hf:FOLDER or hf:NAME of the Hub")
    with loading(spec):
        config = AutoConfig.from_pretrained(model_path(spec), trust_remote_code=False)
    if folder.is_dir():
        return config, None, _digest(folder)
    revision = str(getattr(config, "_commit_hash", None) or "main")
    return config, revision, revision


def _check_folder(spec: ModelSpec, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    needed = set()
    for index in (n for n in names if n.endswith(".index.json")):
        with loading(spec):
            needed |= set(json.loads((folder / index).read_text())["weight_map"].values())
    lacks = (
        ("config.json", "config.json" in names),
        ("weights (*.safetensors)", any(n.endswith((".safetensors", ".bin")) for n in names)),
        (f"weights ({min(needed - names, default='')})", needed <= names),
        ("tokenizer (tokenizer.json)", bool(names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"})),
    )
    for what, there in lacks:
        if not there:
            raise ConfigError(
                f"model {spec.model!r}: the folder has no {what}; need one that save_pretrained of a model and of its "
                "tokenizer wrote"
            )


def _digest(folder: Path) -> str:
    """Sixteen hex digits over all that a reply depends on: configuration, tokenizer and weights."""
    digest = hashlib.blake2b(digest_size=8)
    suffixes = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
    for path in sorted(p for p in folder.iterdir() if p.suffix in suffixes):
        size = path.stat().st_size
        digest.update(f"{path.name}\x1f{size}\x1e".encode())
        digest.update(_hash(path) if size > _LARGE else path.read_bytes())
    return digest.hexdigest()


def _hash(path: Path) -> bytes:
    """Of a whole file; kept for the next process until size or time of change are others."""
    found = path.stat()
    name = f"{path.resolve()}\x1f{found.st_size}\x1f{found.st_mtime_ns}"
    kept = cache_folder("hf-hashes") / hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError):
        if len(read := kept.read_bytes()) == hashlib.blake2b().digest_size:
            return read
    with path.open("rb") as file:
        made = hashlib.file_digest(file, "blake2b").digest()
    keep(kept, made)
    return made


@contextlib.contextmanager
def loading(spec: ModelSpec) -> Iterator[None]:
    """What goes wrong in it is a ConfigError; no bars are drawn."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"model {spec.model!r} can't be loaded: {one_line(error)}; need a folder that save_pretrained wrote, or "
            "the name of a model that the Hub or its local cache has"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def one_line(error: BaseException) -> str:
    """An error in one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return " ".join(first.split())[:300].rstrip(".")
