"""The bill: list prices and what a call costs.

Always true here: money is integer micro-dollars, rounded up once per call; a model without a price does not run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from bopo_ray.errors import ConfigError

__all__ = ["Price", "PriceTable", "Usage", "parse_price", "price_table"]

_DEFAULT = Path(__file__).parent / "data" / "prices.yaml"


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, as the model reported them."""

    prompt_tokens: int
    """All input tokens, cached ones included."""
    completion_tokens: int
    cached_tokens: int = 0
    """Part of `prompt_tokens` billed at the cached price."""


@dataclass(frozen=True, slots=True)
class Price:
    """Micro-dollars per million tokens (so $0.40 per million is 400,000)."""

    input: int
    cached_input: int
    output: int

    def cost(self, usage: Usage) -> int:
        """Micro-dollars of one call, rounded up."""
        fresh = usage.prompt_tokens - usage.cached_tokens
        total = fresh * self.input + usage.cached_tokens * self.cached_input + usage.completion_tokens * self.output
        return -(-total // 1_000_000)

    def to_dict(self) -> dict[str, float]:
        """Dollars per million tokens, as price lists have them."""
        return {k: getattr(self, k) / 1_000_000 for k in _KINDS}


_KINDS = ("input", "cached_input", "output")


def parse_price(raw: Any, where: str) -> Price:
    """A price from {input, output, cached_input} in dollars per million tokens, or 0; raises ConfigError.

    Without `cached_input` a cached token costs what any other does.
    """
    free = raw == 0 and not isinstance(raw, bool)
    prices = raw if isinstance(raw, Mapping) else dict.fromkeys(_KINDS, 0) if free else {}
    try:
        prices = {"cached_input": prices["input"], **prices}
        amounts = [Decimal(str(prices[k])) * 1_000_000 for k in _KINDS]
        if set(prices) != set(_KINDS) or not all(a.is_finite() and a >= 0 and a == int(a) for a in amounts):
            raise ValueError(raw)
    except (LookupError, ArithmeticError, ValueError) as error:
        raise ConfigError(
            f"{where}: price {raw!r}: need {{input: ..., output: ...}}, and cached_input: ... where it is another, in "
            "dollars >= 0 per million tokens (six decimals), or 0 for a model that costs nothing per token"
        ) from error
    price = Price(*map(int, amounts))
    if price.cached_input > price.input:  # budgets reserve for a prompt of which nothing is cached
        raise ConfigError(
            f"{where}: cached_input: {prices['cached_input']} is above input: {prices['input']}: need at most that; "
            "leave it out where a cached token costs what any other does"
        )
    return price


@dataclass(frozen=True, slots=True)
class PriceTable:
    """A dated price list."""

    date: str
    prices: tuple[tuple[str, Price], ...]
    billed_as: tuple[tuple[str, str], ...]
    cpu_hour_microusd: int = 0
    """Nominal price of one CPU for an hour: what the router's own compute is charged at."""

    @property
    def hash(self) -> str:
        """Twelve hex digits that change with any price."""
        text = json.dumps([self.date, [(n, p.input, p.cached_input, p.output) for n, p in self.prices], self.billed_as])
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()

    def price(self, model: str) -> Price:
        """The price of `model`; raises ConfigError when the list has none."""
        name = dict(self.billed_as).get(model, model)
        prices = dict(self.prices)
        if name not in prices:
            raise ConfigError(
                f"no price for model {model!r}; the list of {self.date} has {', '.join(prices)}; "
                f"add the line 'price: {{input: ..., cached_input: ..., output: ...}}' (dollars per million tokens; "
                "'price: 0' for a self-hosted model) to the model in a pool file, or "
                f"'{model}: ...' to a price list given with --prices"
            )
        return prices[name]


@cache
def price_table(path: Path = _DEFAULT) -> PriceTable:
    """Reads a price list; raises ConfigError when it is malformed."""
    try:
        raw = yaml.safe_load(path.read_text())
        if not isinstance(raw, dict) or not {"date", "models"} <= set(raw):
            raise ConfigError(f"price list {path}: needs `date:` and `models:`, and replaces the shipped list")
        prices = tuple((str(n), parse_price(p, f"price list {path}: {n}")) for n, p in raw["models"].items())
        cpu = int(Decimal(str(raw.get("cpu_hour", 0))) * 1_000_000)
        table = PriceTable(str(raw["date"]), prices, tuple((raw.get("billed_as") or {}).items()), cpu)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"price list {path} can't be read ({error.strerror}); name another with --prices") from error
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"price list {path} can't be read ({error!r}); see the shipped prices.yaml") from error
    return table
