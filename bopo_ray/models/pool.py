"""Which models a run routes over: from a name, from `--small` and `--large`, or from a YAML file.

Always true here: a spec holds names of key variables, never a key; every model has a price; the pool is ordered,
smallest first.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bopo_ray.errors import ConfigError
from bopo_ray.models.pricing import Price, PriceTable, parse_price
from bopo_ray.models.protocol import Sampling

__all__ = ["PROVIDERS", "ModelSpec", "PoolSpec", "read_pool", "resolve_pool", "save_pool"]

PROVIDERS = ("embedded", "openai", "hf", "simulated")
OPENAI_URL = "https://api.openai.com/v1"
ACCOUNT = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
"""Headers for OpenAI's own address, and the environment variables that they come from."""
HUB = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE")
HUB_KEY = "HF_TOKEN"
"""Variables by which Hugging Face models are found, and the one that holds a key for them."""
OWN_PRICES = "the pool file"
"""Where prices are of, in place of a date, when a pool file has one for each model."""
SIMULATED, EMBEDDED = "simulated", "embedded"
SIMULATED_PAIRS = {SIMULATED: ("small", "large"), f"{SIMULATED}-llama": ("llama-8b", "llama-70b")}
"""What --models calls a simulated pair -> its models."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of a pool."""

    model: str
    """Provider and model: openai:NAME (any OpenAI-compatible endpoint), hf:NAME-or-folder,
    embedded:NAME-or-folder (trained by this project itself), or simulated: small, large, llama-8b, llama-70b"""
    price: Price
    """What its tokens cost"""
    name: str = ""
    """How results call it; by default what stands behind the provider"""
    base_url: str = ""
    """openai: the endpoint; by default OPENAI_BASE_URL, else OpenAI's own"""
    key_variable: str = "OPENAI_API_KEY"
    """openai: environment variable that holds the key, in capitals; empty for an endpoint that asks for none"""
    headers: tuple[tuple[str, str], ...] = ()
    """openai: more HTTP headers; no secrets: this is saved with the results"""
    query: tuple[tuple[str, str], ...] = ()
    """openai: more query parameters, e.g. an api-version"""
    extra_body: str = "{}"
    """openai: more fields of the request, as JSON, e.g. top_p"""
    max_tokens_field: str = ""
    """openai: how the endpoint calls the bound on a reply; by default max_completion_tokens at OpenAI's own endpoint,
    max_tokens elsewhere"""
    max_concurrency: int = 32
    """openai: calls in flight, over all processes; each has one at least"""
    requests_per_minute: int = 0
    """openai: over all processes, for each one at least; 0 sets no limit"""
    timeout_s: float = 60.0
    """openai: seconds for one attempt"""
    device: str = "auto"
    """hf: cpu, cuda, cuda:1...; auto takes a GPU where there is one"""
    dtype: str = "auto"
    """hf: float32, bfloat16, float16; auto takes the saved one on a GPU, float32 on a CPU"""
    batch_size: int = 16
    """hf: most episodes that write at the same time"""
    temperature: float | None = None
    """Sampling temperature; by default the run's"""
    max_completion_tokens: int = 128
    """Bound on a reply"""
    max_prompt_tokens: int = 8192
    """Old observations are dropped from a longer prompt"""
    base: str = dataclasses.field(init=False, default="")
    """hf, embedded: the folder that a relative one lies in: where this was made, as Ray's workers have another one.
    Not saved, so that a folder of results can move"""

    def __post_init__(self) -> None:
        if self.provider in ("hf", EMBEDDED):
            object.__setattr__(self, "base", os.getcwd())
        rules = (
            ("model", self.provider in PROVIDERS and bool(self.target),
             f"need PROVIDER:MODEL with one of the providers {', '.join(PROVIDERS)}"),
            ("max_concurrency", self.max_concurrency >= 1, "need at least 1"),
            ("requests_per_minute", self.requests_per_minute >= 0, "need 0 (no limit) or more"),
            ("timeout_s", 0 < self.timeout_s < math.inf, "need seconds > 0"),
            ("batch_size", self.batch_size >= 1, "need at least 1"),
            ("temperature", self.temperature is None or 0 <= self.temperature < math.inf, "need a number >= 0"),
            ("max_completion_tokens", self.max_completion_tokens >= 1, "need at least 1"),
            ("max_prompt_tokens", self.max_prompt_tokens >= 256, "need at least 256"),
            ("base_url", not self.base_url or bool(re.match(r"https?://[^/\s]+", self.base_url)),
             "need an address that starts with http:// or https://"),
            # In capitals: some providers' keys are made of letters, digits and underscores, too.
            ("key_variable", not self.key_variable or bool(re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_variable)),
             "need the NAME of an environment variable, in capitals, never the key itself"),
            ("max_tokens_field", self.max_tokens_field in ("", "max_tokens", "max_completion_tokens"),
             "need max_tokens or max_completion_tokens"),
            ("dtype", self.dtype in ("auto", "float32", "bfloat16", "float16"),
             "need auto, float32, bfloat16 or float16"),
        )  # fmt: skip
        for field, ok, rule in rules:
            if not ok:
                shown = "(hidden)" if field == "key_variable" else repr(getattr(self, field))
                raise ConfigError(f"model {self.model!r}: {field}={shown}: {rule}")

    @property
    def provider(self) -> str:
        """What stands before the first colon."""
        return self.model.partition(":")[0]

    @property
    def target(self) -> str:
        """What stands behind it: the endpoint's name of the model, or a folder."""
        return self.model.partition(":")[2]

    @property
    def folder(self) -> Path:
        """Where it lies, if it is a folder."""
        return Path(self.base) / Path(self.target).expanduser()

    @property
    def label(self) -> str:
        """How results call it."""
        return self.name or (self.model if self.provider == SIMULATED else _last_part(self.target))

    @property
    def sampling(self) -> Sampling:
        """How it is asked to write."""
        return Sampling(self.temperature, self.max_completion_tokens, self.max_prompt_tokens)


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """Two or more models, smallest first. Pickles, and holds no secret."""

    models: tuple[ModelSpec, ...]
    note: str = ""
    """One sentence for reports."""
    prices_date: str = ""
    """Date of the price list, or OWN_PRICES"""

    def __post_init__(self) -> None:
        if len(self.models) < 2:
            raise ConfigError(f"a pool of {len(self.models)} model(s): need two or more, smallest first")
        labels = [m.label for m in self.models]
        if len(set(labels)) < len(labels):
            raise ConfigError(f"models {', '.join(labels)}: two have the same name; give each its own `name`")
        kinds = {m.provider == SIMULATED for m in self.models}
        if len(kinds) > 1:
            raise ConfigError(f"models {', '.join(labels)}: simulated and real models can't be mixed in one pool")

    @property
    def price_hash(self) -> str:
        """Twelve hex digits that change with any price in use."""
        return PriceTable(self.prices_date, tuple((m.label, m.price) for m in self.models), ()).hash

    def to_dict(self) -> dict[str, Any]:
        """As the pool file has it, all defaults filled in."""
        models = []
        for m in self.models:
            fields = dataclasses.asdict(m)
            del fields["base"]
            fields["price"] = m.price.to_dict()
            fields |= {k: dict(getattr(m, k)) for k in ("headers", "query")} | {"extra_body": json.loads(m.extra_body)}
            models.append(fields)
        return {"note": self.note, "prices_date": self.prices_date, "models": models}


def resolve_pool(models: str, small: str, large: str, prices: PriceTable) -> PoolSpec:
    """The pool that the settings name.

    Args:
        models: one of SIMULATED_PAIRS, a pool file's path, or "embedded:FAMILY": our own FAMILY-small and FAMILY-large.
        small, large: PROVIDER:MODEL of a pair, which wins over `models`; both or none.
        prices: for models whose pool file gives none.

    Raises ConfigError in one line: what, value, allowed, how to mend.
    """
    if small or large:
        if not (small and large):
            given, other = ("--small", "--large") if small else ("--large", "--small")
            raise ConfigError(f"{given}={small or large!r} without {other}: give both, or a pool file with --models")
        return PoolSpec(tuple(_model({"model": m}, prices, f"--{n}") for n, m in (("small", small), ("large", large))),
                        prices_date=prices.date)  # fmt: skip
    if models in SIMULATED_PAIRS:
        pair = tuple(_model({"model": f"{SIMULATED}:{name}"}, prices, models) for name in SIMULATED_PAIRS[models])
        return PoolSpec(pair, prices_date=prices.date)
    if models.startswith(f"{EMBEDDED}:"):
        _check_family(models, prices)
        pair = tuple(_model({"model": f"{models}-{size}"}, prices, models) for size in ("small", "large"))
        return PoolSpec(pair, prices_date=prices.date)
    if not models.endswith((".yaml", ".yml")):
        raise ConfigError(
            f"unknown models {models!r}: need {EMBEDDED}, {', '.join(SIMULATED_PAIRS)}, or the path of a pool file "
            "(.yaml); set it with --models, or give a pair with --small and --large"
        )
    return read_pool(Path(models), prices)


def _check_family(models: str, prices: PriceTable) -> None:
    """Raises ConfigError for a family of our own models that no list of prices, and so no release, has heard of."""
    names = [name for name, _ in (*prices.prices, *prices.billed_as) if name.startswith(f"{EMBEDDED}:")]
    families = sorted({name.removesuffix(f"-{size}") for name in names for size in ("small", "large")} - set(names))
    if models not in families:
        close = difflib.get_close_matches(models, families, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"unknown models {models!r}{hint}; need {' or '.join(families) or 'a family that the price list has'}; set "
            "it with --models, or give a pair of single models, e.g. embedded:FOLDER, with --small and --large"
        )


def read_pool(path: Path, prices: PriceTable) -> PoolSpec:
    """Reads a pool file; raises ConfigError when it is malformed."""
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:  # as a whole it quotes the line, and with that perhaps a key
        where = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"pool file {path} can't be read: {error.problem}{where}; mend it there") from None
    except OSError as error:
        raise ConfigError(f"pool file {path} can't be read: {error.strerror}; name another with --models") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"pool file {path} can't be read: {' '.join(str(error).split())}; mend it there") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("models"), list):
        raise ConfigError(f"pool file {path}: need a list under `models:`, smallest first; see the README's example")
    if unknown := set(raw) - {"models", "note", "prices_date"}:
        raise ConfigError(
            f"pool file {path}: unknown key {min(map(str, unknown))!r}; allowed: models, note, prices_date"
        )
    models = tuple(_model(m, prices, f"pool file {path}") for m in raw["models"])
    usual = OWN_PRICES if all("price" in m for m in raw["models"]) else prices.date
    try:
        return PoolSpec(models, str(raw.get("note") or ""), str(raw.get("prices_date") or usual))
    except ConfigError as error:
        raise ConfigError(f"pool file {path}: {error}") from None


def save_pool(pool: PoolSpec, path: Path) -> None:
    """Writes what `read_pool` reads."""
    path.write_text(yaml.safe_dump(pool.to_dict(), sort_keys=False))


_KINDS = {"str": "a text", "int": "a whole number", "float": "a number", "float | None": "a number, or null"}
"""What a field's type is called."""


def _model(raw: Any, prices: PriceTable, where: str) -> ModelSpec:
    known = {f.name: f for f in dataclasses.fields(ModelSpec) if f.init}
    if not isinstance(raw, Mapping) or not isinstance(raw.get("model"), str):
        shown = f"with {', '.join(map(str, raw))}" if isinstance(raw, Mapping) else repr(raw)
        raise ConfigError(f"{where}: model {shown}: need a mapping with `model: PROVIDER:MODEL`")
    if unknown := set(raw) - set(known):
        raise ConfigError(f"{where}: unknown key {min(map(str, unknown))!r}; allowed: {', '.join(known)}")
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        if name == "price":
            continue
        default: Any = known[name].default
        try:
            if name in ("headers", "query"):
                fields[name] = tuple(sorted((str(k), str(v)) for k, v in dict(value).items()))
            elif name == "extra_body":
                fields[name] = json.dumps(dict(value), sort_keys=True)
            elif name == "temperature":
                fields[name] = None if value is None else float(value)
            elif isinstance(default, int | float) and (isinstance(value, bool) or type(default)(value) != value):
                raise ValueError(value)
            elif isinstance(default, str) and not isinstance(value, str):
                raise TypeError(value)
            else:
                fields[name] = type(default)(value) if name != "model" else value
        except (TypeError, ValueError, OverflowError) as error:
            shown = "(hidden)" if name in ("headers", "query", "key_variable") else repr(value)
            kind = "a mapping" if name in ("headers", "query", "extra_body") else _KINDS[str(known[name].type)]
            raise ConfigError(f"{where}: model {raw['model']!r}: {name}={shown}: need {kind}") from error
    target = raw["model"].partition(":")[2]
    if "price" in raw:
        price = parse_price(raw["price"], f"{where}: model {raw['model']!r}")
    elif raw["model"].partition(":")[0] in PROVIDERS and target:
        price = prices.price(_price_name(raw["model"]))
    else:
        price = Price(0, 0, 0)  # refused below for its name
    if raw["model"].startswith("openai:") and not fields.get("base_url"):
        fields["base_url"] = os.environ.get("OPENAI_BASE_URL") or OPENAI_URL
    return ModelSpec(**fields | {"price": price})


def _price_name(model: str) -> str:
    """How a price list calls a model: one of our own by its last part, wherever its folder lies."""
    provider, _, target = model.partition(":")
    if provider == SIMULATED:
        return model
    return f"{EMBEDDED}:{_last_part(target)}" if provider == EMBEDDED else target


def _last_part(target: str) -> str:
    return target.rstrip("/").rpartition("/")[2]
