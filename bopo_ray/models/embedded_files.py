"""Where the language models of our own lie, and whether a folder holds one. Imports no torch.

    config.json, model.safetensors (tied embeddings), tokenizer.json   what a reply depends on
    executor.json                                                      {"format": 1, "env", "size", "kinds": [...]}

Always true here: what is wrong with a folder is told in one line, before a weight is read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from bopo_ray.errors import ConfigError
from bopo_ray.models.embedded_prompt import MAX_ACTION_TOKENS, SPECIAL

__all__ = ["EmbeddedFiles", "check_weights", "embedded_folder", "embedded_names", "read_embedded"]

SHIPPED = Path(__file__).parent / "data" / "embedded"
FORMAT = 1
"""Of executor.json."""
NEEDED = ("config.json", "executor.json", "model.safetensors", "tokenizer.json")
MEND = "make it anew, or take it whole from where it was made"


@dataclass(frozen=True, slots=True)
class EmbeddedFiles:
    """A folder that holds a model."""

    folder: Path
    env: str
    """Id of the environment that it was trained for, e.g. "ScienceWorld-v0"."""
    size: str
    """As executor.json has it: small or large."""
    context: int
    """Tokens that it reads and writes at most."""
    kinds: frozenset[str]
    """Kinds of task that it was shown."""
    digest: str
    """Sixteen hex digits over all that a reply depends on."""


def embedded_names() -> tuple[str, ...]:
    """The models that come with the project, sorted."""
    return tuple(sorted(path.parent.name for path in SHIPPED.glob("*/config.json")))


def embedded_folder(name_or_path: str, base: str = "") -> Path:
    """The folder of a model that comes with the project, or one's own. Raises ConfigError when there is none.

    `base`: what a relative path is relative to; by default where this process runs.
    """
    if name_or_path in embedded_names():
        return SHIPPED / name_or_path
    folder = Path(base) / Path(name_or_path).expanduser()
    if folder.is_dir():
        return folder
    known = embedded_names()
    close = difflib.get_close_matches(name_or_path, known, 1)
    hint = f"; did you mean embedded:{close[0]}?" if close else ""
    raise ConfigError(
        f"model 'embedded:{name_or_path}': no such model and no such folder{hint}; need one of "
        f"{', '.join(known) or '(none comes with this installation)'}, or embedded:FOLDER"
    )


def read_embedded(folder: Path, model: str) -> EmbeddedFiles:
    """Everything about a folder but its weights, see `check_weights`.

    Args:
        folder: which.
        model: how the user named it, for messages.

    Raises ConfigError when it holds no model that `KVDecoder` can run.
    """
    lacks = [name for name in NEEDED if not (folder / name).is_file()]
    if lacks:
        raise ConfigError(f"model {model!r}: {folder} has no {lacks[0]}; need {', '.join(NEEDED)}: {MEND}")
    executor = _read_json(folder / "executor.json", model)
    wanted = (("env", str), ("size", str), ("kinds", list))
    if executor.get("format") != FORMAT or not all(isinstance(executor.get(k), t) for k, t in wanted):
        shown = {k: executor.get(k) for k in ("format", "env", "size", "kinds")}
        raise ConfigError(
            f"model {model!r}: executor.json says {shown}: need format {FORMAT}, env, size and kinds; {MEND}"
        )
    config = _read_json(folder / "config.json", model)
    _check_architecture(config, model)
    _check_tokenizer(folder, int(config["vocab_size"]), model)
    digest = hashlib.blake2b(digest_size=8)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        content = (folder / name).read_bytes()
        digest.update(f"{name}\x1f{len(content)}\x1e".encode() + content)
    context = int(config["max_position_embeddings"])
    kinds = frozenset(map(str, executor["kinds"]))
    return EmbeddedFiles(folder, executor["env"], executor["size"], context, kinds, digest.hexdigest())


def check_weights(folder: Path, model: str) -> None:
    """Raises ConfigError when a weight is missing, has another shape than config.json says, or is cut off."""
    config, path = _read_json(folder / "config.json", model), folder / "model.safetensors"
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size - 8 - length
            if size < 0:
                raise ValueError(f"a header of {length} bytes")
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        shapes = {name: tuple(tensor["shape"]) for name, tensor in header.items()}
        end = max((int(tensor["data_offsets"][1]) for tensor in header.values()), default=0)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        shown = " ".join(str(error).split())[:200]
        raise ConfigError(f"model {model!r}: {path} is no whole safetensors file ({shown}); {MEND}") from error
    if end != size:
        raise ConfigError(f"model {model!r}: {path} holds {size} bytes of weights, its header says {end}; {MEND}")
    for name, shape in _shapes(config):
        if shapes.get(name) != shape:
            found = f"shape {shapes[name]}" if name in shapes else "no such weight"
            raise ConfigError(f"model {model!r}: {path}: {name}: {found}; config.json needs shape {shape}: {MEND}")


def _check_architecture(config: dict[str, Any], model: str) -> None:
    heads = config.get("num_attention_heads")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wants = (
        ("architectures", config.get("architectures"), ["LlamaForCausalLM"]),
        ("hidden_act", config.get("hidden_act"), "silu"),
        ("num_key_value_heads", config.get("num_key_value_heads", heads), heads),
        ("tie_word_embeddings", config.get("tie_word_embeddings"), True),
        ("attention_bias", config.get("attention_bias", False), False),
        ("mlp_bias", config.get("mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
    )
    for name, found, wanted in wants:
        if found != wanted:
            raise ConfigError(
                f"model {model!r}: config.json: {name}={found!r}: need {wanted!r}; other models run as hf:FOLDER"
            )
    numbers = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
               "num_hidden_layers", "vocab_size")  # fmt: skip
    for name in numbers:
        least = 2 * MAX_ACTION_TOKENS if name == "max_position_embeddings" else 1
        if not isinstance(config.get(name), int) or config[name] < least:
            raise ConfigError(
                f"model {model!r}: config.json: {name}={config.get(name)!r}: need a number >= {least}; {MEND}"
            )
    if _head_size(config) % 2 or (not config.get("head_dim") and config["hidden_size"] % heads):
        raise ConfigError(
            f"model {model!r}: config.json: hidden_size={config['hidden_size']} with {heads} heads: need heads of an "
            f"even size; {MEND}"
        )


def _check_tokenizer(folder: Path, vocabulary: int, model: str) -> None:
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises no narrower one
        shown = " ".join(str(error).split())[:200]
        raise ConfigError(f"model {model!r}: tokenizer.json can't be read ({shown}); {MEND}") from error
    for token in SPECIAL:
        if tokenizer.token_to_id(token) is None:
            raise ConfigError(f"model {model!r}: tokenizer.json has no {token}: need {' '.join(SPECIAL)}; {MEND}")
    if tokenizer.get_vocab_size() != vocabulary:
        raise ConfigError(
            f"model {model!r}: tokenizer.json has {tokenizer.get_vocab_size()} tokens, config.json says vocab_size="
            f"{vocabulary}: need those of one training; {MEND}"
        )


def _head_size(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each weight."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * _head_size(config)
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    yield "model.norm.weight", (width,)
    for i in range(config["num_hidden_layers"]):
        for name, shape in (
            ("input_layernorm", (width,)), ("post_attention_layernorm", (width,)),
            ("self_attn.q_proj", (heads, width)), ("self_attn.k_proj", (heads, width)),
            ("self_attn.v_proj", (heads, width)), ("self_attn.o_proj", (width, heads)),
            ("mlp.gate_proj", (wide, width)), ("mlp.up_proj", (wide, width)), ("mlp.down_proj", (width, wide)),
        ):  # fmt: skip
            yield f"model.layers.{i}.{name}.weight", shape


def _read_json(path: Path, model: str) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text())
        if not isinstance(read, dict):
            raise TypeError(f"a {type(read).__name__}, need an object")
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"model {model!r}: {path} can't be read ({error}); {MEND}") from error
    return read
