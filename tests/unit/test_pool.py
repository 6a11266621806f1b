"""Pools of models: what a YAML file and the command line may say, and the one line that names each mistake."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.errors import ConfigError
from bopo_ray.models import build_pool, load_pool
from bopo_ray.models.hf_files import model_path
from bopo_ray.models.pool import OPENAI_URL, OWN_PRICES, ModelSpec, PoolSpec, read_pool, resolve_pool, save_pool
from bopo_ray.models.pricing import Price, PriceTable, price_table
from bopo_ray.models.protocol import Sampling

TABLE = price_table()
FREE = Price(0, 0, 0)
SECRET = "sk-proj-abcdefgh12345678"
PAIR = """
models:
  - {model: "openai:small", price: 0}
  - {model: "openai:large", price: {input: 2, cached_input: 0.5, output: 8}}
"""


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the surroundings."""
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def pool_of(text: str, folder: Path) -> PoolSpec:
    file = folder / "pool.yaml"
    file.write_text(text)
    return resolve_pool(str(file), "", "", TABLE)


# -- what there is ----------------------------------------------------------------------------------------------------


def test_the_simulated_pair_is_priced_by_the_list() -> None:
    pool = resolve_pool("simulated", "", "", TABLE)
    assert [m.label for m in pool.models] == ["simulated:small", "simulated:large"]
    assert [m.price for m in pool.models] == [TABLE.price("gpt-4.1-mini"), TABLE.price("gpt-4.1")]
    assert pool.prices_date == TABLE.date
    assert pool.price_hash == load_pool("simulated").price_hash


def test_the_second_simulated_pair_has_prices_of_its_own() -> None:
    pool = resolve_pool("simulated-llama", "", "", TABLE)
    assert [m.label for m in pool.models] == ["simulated:llama-8b", "simulated:llama-70b"]
    assert [m.price.to_dict()["output"] for m in pool.models] == [0.18, 0.88]
    assert pool.price_hash != load_pool("simulated").price_hash


def test_a_pair_from_the_command_line_wins_over_the_pool() -> None:
    pool = resolve_pool("no/such/file.yaml", "openai:gpt-4.1-mini", "openai:gpt-4.1", TABLE)
    assert pool.models == tuple(
        ModelSpec(f"openai:{name}", TABLE.price(name), base_url=OPENAI_URL) for name in ("gpt-4.1-mini", "gpt-4.1")
    )
    assert pool.models[0].label == "gpt-4.1-mini"
    assert pool.models[0].key_variable == "OPENAI_API_KEY"


def test_a_pool_of_three_with_every_field(tmp_path: Path) -> None:
    pool = pool_of(
        """
        note: Three of ours.
        models:
          - model: hf:./my-models/tiny/
            price: 0
            device: cuda:1
            dtype: bfloat16
            batch_size: 4
          - model: openai:org/middle
            base_url: http://localhost:8000/v1
            key_variable: ""
            price: {input: 0.2, cached_input: 0.05, output: 0.000001}
            headers: {x-team: routing, a: 1}
            query: {api-version: "2026-01-01"}
            extra_body: {top_p: 0.9, stop: ["\\n"]}
            max_tokens_field: max_tokens
            max_concurrency: 64
            requests_per_minute: 5000
            timeout_s: 20
          - model: openai:gpt-4.1
            name: big
            temperature: 0
            max_completion_tokens: 200
            max_prompt_tokens: 4096
        """,
        tmp_path,
    )
    assert pool.note == "Three of ours."
    assert pool.models == (
        ModelSpec("hf:./my-models/tiny/", FREE, device="cuda:1", dtype="bfloat16", batch_size=4),
        ModelSpec(
            "openai:org/middle", Price(200_000, 50_000, 1), base_url="http://localhost:8000/v1", key_variable="",
            headers=(("a", "1"), ("x-team", "routing")), query=(("api-version", "2026-01-01"),),
            extra_body='{"stop": ["\\n"], "top_p": 0.9}', max_tokens_field="max_tokens", max_concurrency=64,
            requests_per_minute=5000, timeout_s=20.0,
        ),
        ModelSpec(
            "openai:gpt-4.1", TABLE.price("gpt-4.1"), name="big", base_url=OPENAI_URL, temperature=0.0,
            max_completion_tokens=200, max_prompt_tokens=4096,
        ),
    )  # fmt: skip
    assert [m.label for m in pool.models] == ["tiny", "middle", "big"]
    assert pool.models[2].sampling == Sampling(0.0, 200, 4096)


def test_a_relative_folder_stays_where_it_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's workers have another working folder; what names the model in results is what the user wrote."""
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "mine").mkdir(parents=True)
    there.mkdir()
    monkeypatch.chdir(here)
    pair = "models: [{model: 'hf:./mine', price: 0}, {model: 'hf:ANY', price: 0}]"
    pool = pool_of(pair.replace("ANY", str(there)), tmp_path)
    monkeypatch.chdir(there)
    sent = pickle.loads(pickle.dumps(pool))
    assert [model_path(m) for m in sent.models] == [str(here / "mine"), str(there)]
    assert sent == pool and [m.model for m in sent.models] == ["hf:./mine", f"hf:{there}"]
    save_pool(sent, there / "pool.yaml")
    assert str(here) not in (there / "pool.yaml").read_text(), "results can move"
    assert read_pool(there / "pool.yaml", TABLE).models[0].folder == there / "mine"
    with pytest.raises(ConfigError, match="unknown key 'base'"):
        pool_of(pair.replace("price", "base: /x, price"), tmp_path)


def test_the_endpoint_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://proxy:4000/v1")
    assert [m.base_url for m in pool_of(PAIR, tmp_path).models] == ["http://proxy:4000/v1"] * 2
    own = PAIR.replace("price: 0", "price: 0, base_url: 'https://mine/v1'")
    assert [m.base_url for m in pool_of(own, tmp_path).models] == ["https://mine/v1", "http://proxy:4000/v1"]
    pair = resolve_pool("simulated", "openai:gpt-4.1-mini", "openai:gpt-4.1", TABLE)
    assert {m.base_url for m in pair.models} == {"http://proxy:4000/v1"}
    monkeypatch.setenv("OPENAI_BASE_URL", "proxy:4000")
    with pytest.raises(ConfigError, match=r"base_url='proxy:4000': need an address that starts with http"):
        pool_of(PAIR, tmp_path)


def test_a_price_moves_the_hash_and_a_limit_does_not(tmp_path: Path) -> None:
    pool = pool_of(PAIR, tmp_path)
    assert pool_of(PAIR.replace("price: 0", "price: 0, timeout_s: 5"), tmp_path).price_hash == pool.price_hash
    for change in (("output: 8", "output: 8.000001"), ("openai:small", "openai:smaller")):
        assert pool_of(PAIR.replace(*change), tmp_path).price_hash != pool.price_hash


def test_prices_of_ones_own_have_no_date_of_the_list(tmp_path: Path) -> None:
    own = pool_of(PAIR, tmp_path)
    assert own.prices_date == OWN_PRICES and "at the prices of the pool file." in build_pool(own).note
    assert pool_of(f"prices_date: 2026-03-04\n{PAIR}", tmp_path).prices_date == "2026-03-04"
    listed = "models:\n- {model: 'openai:a', price: 0}\n- {model: 'openai:gpt-4.1'}\n"
    assert pool_of(listed, tmp_path).prices_date == TABLE.date


def test_the_readmes_example_is_read(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    text = readme.partition("# pool.yaml")[2].partition("```")[0]
    assert [m.provider for m in pool_of(f"#{text}", tmp_path).models] == ["openai", "hf", "openai"]


# -- out and in again -------------------------------------------------------------------------------------------------

MICRO = st.one_of(st.integers(0, 10**9), st.integers(0, 10))
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
PAIRS = st.dictionaries(WORDS, WORDS, max_size=3).map(lambda d: tuple(sorted(d.items())))
BODIES = st.dictionaries(WORDS, st.one_of(st.floats(0, 1), WORDS, st.lists(st.integers())), max_size=3)
PRICES = st.builds(lambda x, y, output: Price(max(x, y), min(x, y), output), MICRO, MICRO, MICRO)
MODELS = st.builds(
    ModelSpec, model=st.sampled_from(("openai:a/b", "hf:./c", "hf:d: e")), price=PRICES,
    name=WORDS.filter(bool), base_url=st.sampled_from(("http://x", "https://y:1/v1?z=ü")),
    key_variable=st.sampled_from(("", "MY_KEY", "NO", "NULL")), headers=PAIRS, query=PAIRS,
    extra_body=BODIES.map(lambda d: json.dumps(d, sort_keys=True)),
    max_tokens_field=st.sampled_from(("", "max_tokens")), max_concurrency=st.integers(1, 10**6),
    requests_per_minute=st.integers(0, 10**6), timeout_s=st.floats(1e-6, 1e9), batch_size=st.integers(1, 100),
    temperature=st.one_of(st.none(), st.floats(0, 2)), max_completion_tokens=st.integers(1, 10**6),
    max_prompt_tokens=st.integers(256, 10**7),
)  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(MODELS, min_size=2, max_size=3, unique_by=lambda m: m.label), WORDS, st.sampled_from(("", "2026-01-01"))
)
def test_what_is_saved_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, models: list[ModelSpec], note: str, date: str
) -> None:
    pool, path = PoolSpec(tuple(models), note, date or TABLE.date), tmp_path_factory.getbasetemp() / "again.yaml"
    save_pool(pool, path)
    again = read_pool(path, TABLE)
    assert again == pool
    assert again.price_hash == pool.price_hash


def test_the_simulated_pair_is_saved_with_its_prices(tmp_path: Path) -> None:
    pool = resolve_pool("simulated", "", "", TABLE)
    save_pool(pool, tmp_path / "pool.yaml")
    assert read_pool(tmp_path / "pool.yaml", PriceTable("", (), ())) == pool


def test_no_key_is_saved_or_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    pool = pool_of(PAIR, tmp_path)
    save_pool(pool, tmp_path / "saved.yaml")
    assert SECRET not in (tmp_path / "saved.yaml").read_text()
    pickled = pickle.dumps(pool)
    assert SECRET.encode() not in pickled and b"OPENAI_API_KEY" in pickled
    assert pickle.loads(pickled) == pool
    assert SECRET not in repr(pool)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def refused(text: str, folder: Path) -> str:
    """The line that names what is wrong with a pool file."""
    with pytest.raises(ConfigError) as caught:
        pool_of(text, folder)
    line = str(caught.value)
    assert "\n" not in line
    assert SECRET[3:] not in line
    return line


def with_model(entry: str) -> str:
    return f"models:\n  - {{model: 'openai:other', price: 0}}\n  - {{{entry}}}\n"


BIG = "model: 'openai:big', price: 0"


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("model: 'azure:gpt', price: 0", ["'azure:gpt'", "PROVIDER:MODEL", "openai, hf, simulated"]),
        ("model: gpt-4.1", ["'gpt-4.1'", "PROVIDER:MODEL", "openai, hf, simulated"]),
        ("model: 'openai:'", ["'openai:'", "PROVIDER:MODEL"]),
        ("model: 4.1", ["with model", "`model: PROVIDER:MODEL`"]),
        (f"name: big, key_variable: {SECRET}", ["with name, key_variable", "`model: PROVIDER:MODEL`"]),
        ("model: 'openai:new-model'", ["no price", "'new-model'", TABLE.date, "add the line 'price:", "'price: 0'"]),
        ("model: 'hf:./folder'", ["no price", "'./folder'", "add the line 'price:", "'price: 0'", "--prices"]),
        ("model: 'openai:big', price: -1", ["'openai:big'", "price -1", "dollars >= 0 per million"]),
        ("model: 'openai:big', price: 5", ["price 5", "cached_input"]),
        ("model: 'openai:big', price: free", ["price 'free'", "or 0 for a model that costs nothing"]),
        ("model: 'openai:big', price: false", ["price False", "or 0"]),
        ("model: 'openai:big', price: {input: 1, cached_input: 2}", ["'input': 1", "output: ..."]),
        (
            "model: 'openai:big', price: {input: 1, cached_input: -0.1, output: 2}",
            ["'cached_input': -0.1", "dollars >= 0"],
        ),
        ("model: 'openai:big', price: {input: .inf, cached_input: 0, output: 2}", ["inf", "dollars >= 0"]),
        ("model: 'openai:big', price: {input: 1.0000001, cached_input: 0, output: 2}", ["1.0000001", "six decimals"]),
        (f"{BIG}, api_key: {SECRET}", ["unknown key 'api_key'", "allowed:", "key_variable"]),
        (
            f"{BIG}, key_variable: {SECRET}",
            ["'openai:big'", "key_variable=(hidden)", "NAME of an environment variable"],
        ),
        (f"{BIG}, key_variable: gsk_{SECRET[3:].replace('-', '_')}", ["key_variable=(hidden)", "in capitals"]),
        (f"{BIG}, key_variable: [{SECRET}]", ["key_variable=(hidden)", "need a text"]),
        (f"{BIG}, key_variable: null", ["key_variable=(hidden)", "need a text"]),
        (f"{BIG}, headers: 'Authorization {SECRET}'", ["headers=(hidden)", "need a mapping"]),
        (f"{BIG}, query: 'api-key={SECRET}'", ["query=(hidden)", "need a mapping"]),
        (f"{BIG}, extra_body: 0.9", ["extra_body=0.9", "need a mapping"]),
        (f"{BIG}, name: null", ["'openai:big'", "name=None", "need a text"]),
        (f"{BIG}, base_url: 'localhost:8000'", ["base_url='localhost:8000'", "http:// or https://"]),
        (f"{BIG}, max_concurrency: 0", ["max_concurrency=0", "at least 1"]),
        (f"{BIG}, max_concurrency: many", ["'openai:big'", "max_concurrency='many'", "need a whole number"]),
        (f"{BIG}, max_concurrency: 1.5", ["max_concurrency=1.5", "need a whole number"]),
        (f"{BIG}, max_concurrency: true", ["max_concurrency=True", "need a whole number"]),
        (f"{BIG}, requests_per_minute: -1", ["requests_per_minute=-1", "0 (no limit) or more"]),
        (f"{BIG}, requests_per_minute: .inf", ["requests_per_minute=inf", "need a whole number"]),
        (f"{BIG}, timeout_s: 0", ["timeout_s=0.0", "seconds > 0"]),
        (f"{BIG}, timeout_s: .nan", ["timeout_s=nan", "need a number"]),
        (f"{BIG}, temperature: hot", ["temperature='hot'", "need a number, or null"]),
        (f"{BIG}, temperature: -0.5", ["temperature=-0.5", "number >= 0"]),
        (f"{BIG}, max_completion_tokens: 0", ["max_completion_tokens=0", "at least 1"]),
        (f"{BIG}, max_prompt_tokens: 100", ["max_prompt_tokens=100", "at least 256"]),
        (f"{BIG}, max_tokens_field: tokens", ["max_tokens_field='tokens'", "max_tokens or max_completion_tokens"]),
        (f"{BIG}, dtype: int8", ["dtype='int8'", "bfloat16"]),
        (f"{BIG}, batch_size: 0", ["batch_size=0", "at least 1"]),
        ("model: 'openai:other', price: 0", ["other, other", "same name", "`name`"]),
        ("model: 'hf:./models/other', price: 0", ["other, other", "same name", "`name`"]),
        ("model: 'simulated:large'", ["simulated and real", "can't be mixed"]),
    ],
)
def test_a_mistake_in_a_model(entry: str, named: list[str], tmp_path: Path) -> None:
    line = refused(with_model(entry), tmp_path)
    for part in named:
        assert part in line


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("models: [", ["can't be read", "line 1"]),
        (f"models:\n  - model: openai:a\n    key_variable: {SECRET}: x\n", ["can't be read", "line 3"]),
        ("models:\n\t- a", ["can't be read", "line 2"]),
        ("", ["need a list under `models:`", "README"]),
        ("- model: openai:a", ["need a list under `models:`"]),
        ("models: {model: openai:a}", ["need a list under `models:`"]),
        ("models:\n- openai:a\n- openai:b", ["'openai:a'", "need a mapping with `model: PROVIDER:MODEL`"]),
        ("models: []", ["pool.yaml: a pool of 0 model(s)", "two or more, smallest first"]),
        ("models:\n- {model: 'openai:a', price: 0}", ["pool.yaml: a pool of 1 model(s)", "smallest first"]),
        (f"model: []\n{PAIR}", ["unknown key 'model'", "allowed: models, note, prices_date"]),
        ("\x00", ["can't be read"]),
    ],
)
def test_a_malformed_file(text: str, named: list[str], tmp_path: Path) -> None:
    line = refused(text, tmp_path)
    for part in named:
        assert part in line


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "pool.yaml").write_bytes(b"\xff\xfe\x00models")
    for path, mend in (
        ("pool.yaml", "mend it there"),
        ("missing.yml", "name another with --models"),
        (".", "--models"),
    ):
        with pytest.raises(ConfigError, match=rf"can't be read: (?!\[Errno)[^\n]*; .*{mend}\Z"):
            read_pool(tmp_path / path, TABLE)


@pytest.mark.parametrize(
    ("models", "small", "large", "named"),
    [
        ("gpt-9", "", "", ["'gpt-9'", "simulated, simulated-llama", "pool file (.yaml)", "--small and --large"]),
        ("simulated", "openai:gpt-4.1-mini", "", ["--small='openai:gpt-4.1-mini'", "without --large", "give both"]),
        ("simulated", "", "openai:gpt-4.1", ["--large='openai:gpt-4.1'", "without --small", "give both"]),
        ("simulated", "gemini:pro", "openai:gpt-4.1", ["'gemini:pro'", "openai, hf, simulated"]),
        ("simulated", "openai:x", "openai:gpt-4.1", ["no price for model 'x'", "add the line 'price:"]),
        ("simulated", "openai:gpt-4.1", "openai:gpt-4.1", ["gpt-4.1, gpt-4.1", "same name"]),
        ("simulated", "simulated:small", "openai:gpt-4.1", ["can't be mixed"]),
        ("simulated", "simulated:tiny", "simulated:large", ["'simulated:tiny'"]),
        ("simulated-lama", "", "", ["'simulated-lama'", "simulated-llama", "--models"]),
    ],
)
def test_a_mistake_on_the_command_line(models: str, small: str, large: str, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pool(models, small, large)
    assert "\n" not in str(caught.value)
    for part in named:
        assert part in str(caught.value)
