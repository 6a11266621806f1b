"""What can't work is refused before anything is spent: one line, exit code 2, no folder, no Ray, no call."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import ray
from rich.console import Console

from bopo_ray.errors import BudgetError, StoreError
from bopo_ray.models import load_pool
from bopo_ray.models.pricing import Usage
from bopo_ray.pipeline.preflight import cheapest_call, preflight
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings, resolve
from experiments.frontier import main
from tests.endpoint import Endpoint
from tests.tiny_router import make_qwen
from tests.toy import ID, Scripted, Toy, scripted_pool

TOY = ["--env", ID, "--scale", "tiny"]
REAL = [*TOY, "--small", "openai:gpt-4.1-mini", "--large", "openai:gpt-4.1"]
KEY = "sk-planted-abcdefgh12345678"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working folder, no endpoint, and no Ray: the test fails should one be started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nobody() -> str:
    """The address of a port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}/v1"


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """Runs the command, which must fail with exit code 2 and write nothing; returns the one line on stderr."""
    before = sorted(folder.iterdir())
    assert main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.err.endswith("\n")
    assert sorted(folder.iterdir()) == before
    return said.err


LEAST = cheapest_call(load_pool("simulated").models[0], ID)


@pytest.mark.parametrize("option", ["budget_usd", "max_spend"])
@pytest.mark.parametrize("microusd", [0, 1, LEAST - 1])
def test_money_for_less_than_one_call(
    option: str, microusd: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--{option.replace('_', '-')}"
    line = refused(capsys, tmp_path, *TOY, flag, f"{microusd / 1e6:.6f}")
    for part in (f"{option}={microusd / 1e6!r}", f"${LEAST / 1e6:.6f}", "simulated:small", f"set it with {flag}"):
        assert part in line


def test_less_than_a_micro_dollar_is_told_as_it_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "budget_usd=1e-07: not enough" in refused(capsys, tmp_path, *TOY, "--budget-usd", "0.0000001")


@pytest.mark.parametrize("money", [{"budget_usd": LEAST / 1e6}, {"max_spend": LEAST / 1e6}, {"budget_calls": 0}])
def test_money_for_one_call_is_enough(money: dict[str, float], tmp_path: Path) -> None:
    assert LEAST > 10
    preflight(load_pool("simulated"), resolve(None, {"env": ID, "scale": "tiny", **money}), tmp_path / "none")


@pytest.mark.parametrize("option", ["--budget-usd", "--max-spend", "--budget-calls"])
@pytest.mark.parametrize("value", ["-1", "nan", "much"])
def test_no_amount(option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path, *TOY, option, value)
    assert option in line and f"{option[2:].replace('-', '_')}=" in line and value in line


def test_the_cheapest_model_decides_and_is_named(tmp_path: Path) -> None:
    small, large = scripted_pool(["Action: look"], max_completion_tokens=1000).models
    assert isinstance(small, Scripted)
    small.price, large.price = large.price, small.price  # the small one is the dearer one
    least = cheapest_call(large, ID)
    assert least > large.price.cost(Usage(10, 1000))  # there is always some prompt
    pool = scripted_pool([])
    pool = type(pool)((small, large), pool.label, pool.note, pool.price_hash)
    preflight(pool, Settings(env=ID, budget_usd=least / 1e6), tmp_path)
    with pytest.raises(BudgetError, match=rf"budget_usd=.*\${least / 1e6:.6f} \(scripted:large\)"):
        preflight(pool, Settings(env=ID, budget_usd=(least - 1) / 1e6), tmp_path)


def test_a_run_that_has_spent_goes_on_to_what_is_stored(tmp_path: Path) -> None:
    settings = Settings(env=ID, max_spend=1e-6)
    with pytest.raises(BudgetError, match="max_spend"):
        preflight(load_pool("simulated"), settings, tmp_path)
    (tmp_path / "spend.db").touch()
    preflight(load_pool("simulated"), settings, tmp_path)


def test_a_missing_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path, *REAL)
    for part in ("'gpt-4.1-mini'", "OPENAI_API_KEY is not set", "export OPENAI_API_KEY=", "https://api.openai.com/v1"):
        assert part in line


def test_nobody_answers(
    nobody: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", nobody)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    line = refused(capsys, tmp_path, *REAL)
    assert nobody in line and "base_url" in line
    assert KEY not in line


def test_a_model_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text("models:\n- {model: 'hf:./nothing', price: 0}\n- {model: 'hf:./none', price: 0}\n")
    line = refused(capsys, tmp_path, *TOY, "--models", str(pool))
    assert "./nothing" in line


@pytest.mark.parametrize("name", ["recorded.parquet", "."])
def test_a_recording_that_is_not_there(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path, *TOY, "--replay", name)
    for part in (f"replay='{name}'", "no such file", "python -m experiments.store export"):
        assert part in line


@pytest.mark.parametrize("value", ["10", "5,10"])
def test_a_cap_that_is_meant_for_budget_calls_makes_no_file(
    value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, tmp_path, *TOY, "--calls", value)
    assert f"calls={value!r}: --calls names a file of stored calls" in line and "--budget-calls" in line


def test_a_call_store_that_can_not_be_opened_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, tmp_path, *TOY, "--calls", "/proc/x", "--out", "out")
    assert "/proc/x can't be used" in line
    with Run(resolve(None, {"env": ID, "scale": "tiny"}), tmp_path / "out", False, Console(quiet=True)) as run:
        kept = (run.out / "settings.yaml").read_text()
    assert main([*TOY, "--calls", "/proc/x", "--out", "out", "--resume"]) == 2
    assert (tmp_path / "out" / "settings.yaml").read_text() == kept, "a continuation's typo is not kept either"


def test_a_recording_that_can_not_be_read_leaves_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "calls.parquet").write_text("none")
    for _ in range(2):
        assert main([*TOY, "--replay", "calls.parquet", "--out", "out"]) == 2
        assert "calls.parquet" in capsys.readouterr().err
    assert not (tmp_path / "out" / "settings.yaml").exists()


def test_a_wrong_price_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prices.yaml").write_text("date: 2026-01-01\nmodels: {gpt-4.1: {input: -1}}\n")
    line = refused(capsys, tmp_path, *REAL, "--prices", "prices.yaml")
    assert "price list prices.yaml: gpt-4.1" in line and "'input': -1" in line and "dollars >= 0" in line


def test_looking_at_an_endpoint_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Endpoint() as endpoint:
        (tmp_path / "pool.yaml").write_text(
            f"models:\n- {{model: 'openai:toy-small', price: 0, base_url: '{endpoint.url}', key_variable: ''}}\n"
            f"- {{model: 'openai:toy-large', price: 0, base_url: '{endpoint.url}', key_variable: ''}}\n"
        )
        settings = resolve(None, {"env": ID, "scale": "tiny", "models": str(tmp_path / "pool.yaml")})
        with Run(settings, tmp_path / "out", False, Console(quiet=True)) as run:
            assert run.ledger().totals().models == ()
        assert (tmp_path / "out" / "pool.yaml").exists()
        assert not endpoint.bill


def test_a_run_is_not_continued_on_tasks_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, out, quiet = resolve(None, {"env": ID, "scale": "tiny"}), tmp_path / "out", Console(quiet=True)
    with Run(settings, out, False, quiet) as run:
        first = run.train[0].name
    kept = (out / "tasks.json").read_bytes()
    with Run(settings, out, True, quiet):
        pass
    real = Toy.tasks
    monkeypatch.setattr(Toy, "tasks", lambda split: tuple(t for t in real(split) if t.name != first))
    with pytest.raises(StoreError, match=f"'{first}' is a task of one of them; .* choose another --out"):
        Run(settings, out, True, quiet)
    assert (out / "tasks.json").read_bytes() == kept


def test_a_backbone_without_a_needed_token_stops_before_anything_is_played(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = make_qwen(tmp_path / "backbone", drop="B")
    assert main([*TOY, "--out", "out", "--backbone", str(backbone)]) == 2
    assert "has no token for 'B' alone; need one for each of A, B" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
