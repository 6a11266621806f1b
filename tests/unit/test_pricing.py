"""Bills worked by hand, and the mistakes that a price list can hold."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.errors import ConfigError
from bopo_ray.models import load_pool
from bopo_ray.models.pricing import Price, PriceTable, Usage, price_table

MINI, FULL = Price(400_000, 100_000, 1_600_000), Price(2_000_000, 500_000, 8_000_000)


@pytest.mark.parametrize(
    ("price", "usage", "microusd"),
    [
        (MINI, Usage(0, 0), 0),
        (MINI, Usage(1000, 100), 560),  # 1000 x 0.4 + 100 x 1.6 = 400 + 160
        (FULL, Usage(1000, 100), 2800),  # 1000 x 2 + 100 x 8 = 2000 + 800
        (FULL, Usage(1000, 100, 600), 1900),  # 400 x 2 + 600 x 0.5 + 100 x 8 = 800 + 300 + 800
        (MINI, Usage(1000, 0, 1000), 100),  # all cached: 1000 x 0.1
        (MINI, Usage(1, 0), 1),  # 0.4, rounded up
        (MINI, Usage(6, 1), 4),  # 2.4 + 1.6 = 4.0 exactly: not rounded
        (MINI, Usage(7, 1), 5),  # 2.8 + 1.6 = 4.4
        (MINI, Usage(3, 0, 2), 1),  # 0.4 + 0.2 = 0.6: rounded once, not per part (which would be 2)
        (Price(1, 0, 0), Usage(1_000_000, 0), 1),
        (Price(1, 0, 0), Usage(1_000_001, 0), 2),  # exact beyond what a float would tell
    ],
)
def test_a_call_costs_what_the_hand_says(price: Price, usage: Usage, microusd: int) -> None:
    assert price.cost(usage) == microusd


TOKENS, PRICES = st.integers(0, 10**6), st.integers(0, 10**8)


@given(TOKENS, TOKENS, PRICES, PRICES)
def test_a_call_costs_the_exact_ceiling(prompt: int, completion: int, fresh: int, output: int) -> None:
    exact = Fraction(prompt * fresh + completion * output, 1_000_000)
    assert Price(fresh, 0, output).cost(Usage(prompt, completion)) == ceil(exact)


@given(TOKENS, TOKENS, TOKENS)
def test_cached_tokens_never_cost_more_and_cost_is_never_below_the_exact_sum(a: int, b: int, completion: int) -> None:
    cached, prompt = sorted((a, b))
    cost = FULL.cost(Usage(prompt, completion, cached))
    assert cost <= FULL.cost(Usage(prompt, completion))
    exact = (prompt - cached) * 2_000_000 + cached * 500_000 + completion * 8_000_000
    assert exact <= cost * 1_000_000 < exact + 1_000_000


def test_the_shipped_list_has_the_papers_prices() -> None:
    table = price_table()
    assert table.price("gpt-4.1-mini") == table.price("simulated:small") == MINI
    assert table.price("gpt-4.1") == table.price("simulated:large") == FULL


def test_a_model_without_a_price_does_not_run() -> None:
    with pytest.raises(
        ConfigError, match=r"no price for model 'gpt-9'; the list of .* has .*gpt-4\.1-mini, gpt-4\.1.*;"
    ) as e:
        price_table().price("gpt-9")
    assert "\n" not in str(e.value) and "price: {input:" in str(e.value)


def test_the_price_hash_changes_with_each_price() -> None:
    table = price_table()
    (name, price), *others = table.prices
    variants = [
        dataclasses.replace(table, prices=((name, dataclasses.replace(price, **{f: getattr(price, f) + 1})), *others))
        for f in ("input", "cached_input", "output")
    ]
    variants += [
        dataclasses.replace(table, date="2026-02-02"),
        dataclasses.replace(table, prices=(("renamed", price), *others)),
        dataclasses.replace(table, prices=table.prices[:1]),
        dataclasses.replace(table, billed_as=table.billed_as[:1]),
    ]
    hashes = {t.hash for t in (table, *variants)}
    assert len(hashes) == 1 + len(variants) and all(len(h) == 12 for h in hashes)
    assert PriceTable(table.date, table.prices, table.billed_as).hash == table.hash


def test_a_list_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("date: 2026-03-01\nmodels:\n  tiny: {input: 0.0125, cached_input: 0, output: '0.1'}\n")
    table = price_table(path)
    assert table.date == "2026-03-01" and table.price("tiny") == Price(12_500, 0, 100_000)


def test_a_cached_token_costs_what_any_other_does_where_the_list_says_no_more(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("date: 2026-03-01\nmodels:\n  tiny: {input: 0.0125, output: 0.1}\n")
    assert price_table(path).price("tiny") == Price(12_500, 12_500, 100_000)


def test_a_cached_token_that_costs_more_than_another_is_refused(tmp_path: Path) -> None:
    """Budgets reserve for a prompt of which nothing is cached."""
    path = tmp_path / "mine.yaml"
    path.write_text("date: 2026-03-01\nmodels:\n  tiny: {input: 0.4, cached_input: 0.400001, output: 1.6}\n")
    with pytest.raises(
        ConfigError,
        match=r"mine\.yaml: tiny: cached_input: 0\.400001 is above input: 0\.4: need at most that; leave it out",
    ):
        price_table(path)


@pytest.mark.parametrize("text", ["", "- a", "models: {}", "date: 2026-01-01", "tiny: {input: 1, output: 2}"])
def test_a_list_without_its_two_keys_says_which_they_are(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml: needs `date:` and `models:`, and replaces the shipped list$"):
        price_table(path)


@pytest.mark.parametrize(
    "text",
    [
        "", "- a\n- b", "models: {}", "date: 2026-01-01", "date: 2026-01-01\nmodels: [a]",
        "date: 2026-01-01\nmodels: {a: 3}", "date: 2026-01-01\nmodels: {a: {input: 1}}",
        "date: 2026-01-01\nmodels: {a: {input: cheap, cached_input: 0, output: 1}}",
        "date: 2026-01-01\nmodels: {a: {input: .nan, cached_input: 0, output: 1}}",
        "date: 2026-01-01\nmodels: {a: {input: .inf, cached_input: 0, output: 1}}",
        "date: 2026-01-01\nmodels: {}\nbilled_as: [a]", "date: [unclosed", "\udcff",
    ],
)  # fmt: skip
def test_a_malformed_list_is_one_line_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prices.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"^price list .*prices\.yaml( can't be read|: needs|: a: price .*: need)"):
        price_table(path)


def test_a_missing_list_and_a_negative_price(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml can't be read"):
        price_table(tmp_path / "nowhere.yaml")
    path = tmp_path / "negative.yaml"
    path.write_text("date: 2026-01-01\nmodels:\n  a: {input: 1, cached_input: -0.5, output: 1}\n")
    with pytest.raises(ConfigError, match=r"a: price .*: need .* dollars >= 0"):
        price_table(path)


def test_an_unknown_pool_is_one_line() -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown models 'real': need embedded, simulated, simulated-llama, or the path of a pool .*--models",
    ):
        load_pool("real")
