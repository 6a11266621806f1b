"""How scripts end: one line on stderr, and a code that says whose turn it is."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ray.exceptions import RayTaskError
from rich.console import Console

from bopo_ray.analysis.finished import FinishedRun
from bopo_ray.errors import ConfigError, EngineError, ModelError, SpendLimitError, StoreError
from bopo_ray.models.pool import resolve_pool, save_pool
from bopo_ray.models.pricing import Usage, price_table
from bopo_ray.models.spend import SpendLedger
from bopo_ray.pipeline import hard_budget
from bopo_ray.pipeline.command import exit_code, finished_parser
from bopo_ray.pipeline.jobs import end_with, spent_usd
from bopo_ray.pipeline.settings import resolve, save
from experiments import ablation, allocation, bench, cost_inversion, counterfactual, frontier, model_pairs, store
from experiments import hard_budget as script_hard_budget
from experiments.frontier import settings_for


def raising(error: BaseException) -> int:
    raise error


def in_a_task(error: Exception) -> Exception:
    """As it arrives from another process of Ray."""
    return RayTaskError("task", "traceback", error).as_instanceof_cause()  # type: ignore[no-any-return]


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("lambdas=1:\n  need 2"), 2, "error: lambdas=1: need 2"),
        (StoreError("another run"), 2, "error: another run"),
        (in_a_task(ConfigError("no such model")), 2, "error: no such model"),
        (EngineError("the JVM died"), 1, "error: the JVM died"),
        (in_a_task(ModelError("no answer")), 1, "error: no answer"),
        (OSError("odd"), 1, "error: odd"),
        (FULL, 2, "error: [Errno 28] No space left on device; free some space and run the same command again: "
                  "finished parts are kept"),
        (SpendLimitError("limit"), 3, "error: limit"),
        (KeyboardInterrupt(), 130,
         "interrupted: what is finished is kept; run the same command again to go on"),
    ],
)  # fmt: skip
def test_an_end_in_one_line(error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: raising(error)) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{line}\n")


def test_the_main_jobs_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    stopped = exit_code(lambda: raising(in_a_task(SpendLimitError("$1 is reached"))), spent=lambda: "$0.9 spent")
    assert stopped == 3
    said = "stopped: $0.9 spent; $1 is reached. All finished is kept: give a higher --max-spend and --resume\n"
    assert capsys.readouterr() == (said, "")
    assert exit_code(lambda: raising(KeyboardInterrupt()), kept="resume") == 130
    assert capsys.readouterr().err == "interrupted: resume\n"


def test_a_result_is_handed_on_and_a_defect_is_not_hidden() -> None:
    assert exit_code(lambda: 0) == 0 and exit_code(lambda: 7) == 7
    for error in (ZeroDivisionError("1/0"), in_a_task(ZeroDivisionError("1/0"))):
        with pytest.raises(ZeroDivisionError):
            exit_code(lambda error=error: raising(error))  # type: ignore[misc]


def test_scripts_of_finished_runs_take_folders(capsys: pytest.CaptureFixture[str]) -> None:
    one = finished_parser("x", "doc").parse_args(["a", "--out", "b"])
    assert (one.folder, one.out) == (Path("a"), Path("b"))
    assert finished_parser("x", "doc", several=True).parse_args(["a", "b"]).folders == [Path("a"), Path("b")]
    for script in (allocation, cost_inversion):
        with pytest.raises(SystemExit) as ended:
            script.main(["--help"])
        name = script.__name__.rpartition(".")[2]
        assert ended.value.code == 0 and f"python -m experiments.{name} results/RUN" in capsys.readouterr().out


def test_what_a_folder_has_spent(tmp_path: Path) -> None:
    assert spent_usd(tmp_path) == 0.0 and not list(tmp_path.iterdir())
    ledger = SpendLedger(tmp_path / "spend.db", None)
    reservation = ledger.reserve("me", "key", "m", 2_000_000)
    assert reservation is not None
    ledger.settle(reservation, Usage(1, 1), 1_250_000)
    assert spent_usd(tmp_path) == 1.25


def test_a_self_trained_runs_models_are_found_for_its_hard_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolve(None, {"env": "ALFWorld-v0", "scale": "tiny", "max_spend": 7.0})
    assert settings.models == "embedded", "else this test says nothing"
    save(settings, tmp_path / "settings.yaml")
    save_pool(resolve_pool(settings.pool, "", "", price_table()), tmp_path / "pool.yaml")
    monkeypatch.setattr(hard_budget, "Run", lambda own, out, resume, console: nullcontext((own, out)))
    finished = FinishedRun(tmp_path, {}, pd.DataFrame(), pd.DataFrame())
    with hard_budget.open_run(finished, 1.5, 2, Console()) as run:
        own, out = run  # type: ignore[misc]
    assert (own.models, own.max_spend, own.cpus) == ("embedded", 1.5, 2)
    assert (out, own.calls) == (tmp_path / "hard-budget", str(tmp_path / "calls.db"))


@pytest.mark.parametrize("base", ["typo", "first-large", "first-large:x", "always-small:3"])
def test_a_wrong_schedule_is_said_in_words_of_its_own_option(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert counterfactual.main(["nowhere", "--base", base]) == 2
    error = capsys.readouterr().err
    assert repr(base) in error and "--base" in error and "--router" not in error


@pytest.mark.parametrize(
    ("options", "given", "pairs"),
    [
        ([], {}, {"embedded": ("--models", "embedded"), "simulated-llama": ("--models", "simulated-llama")}),
        ([], {"mine": "a.yaml"}, {
            "embedded": ("--models", "embedded"), "simulated-llama": ("--models", "simulated-llama"),
            "mine": ("--models", "a.yaml"),
        }),
        (["--small", "x:a", "--large", "x:b"], {"mine": "a.yaml"}, {
            "x-a-x-b": ("--small", "x:a", "--large", "x:b"),
            "simulated-llama": ("--models", "simulated-llama", "--small=", "--large="),
            "mine": ("--models", "a.yaml", "--small=", "--large="),
        }),
        ([], {"mine": "a.yaml", "other": "b.yaml"}, {"mine": ("--models", "a.yaml"), "other": ("--models", "b.yaml")}),
    ],
)  # fmt: skip
def test_a_single_pair_joins_the_default_ones_and_several_take_their_place(
    options: list[str], given: dict[str, str], pairs: model_pairs.Pairs
) -> None:
    parsed = model_pairs.parse_pairs([f"{name}={spec}" for name, spec in given.items()])
    assert model_pairs.joined(settings_for("model_pairs", options, ()), parsed) == pairs
    with pytest.raises(ConfigError, match=r"simulated-llama=.* a default pair"):
        model_pairs.joined(settings_for("model_pairs", options, ()), {"simulated-llama": ("--models", "a.yaml")})


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        (frontier, "--lamda 0.1", "unknown option '--lamda'; did you mean --lambdas?"),
        (frontier, "--lamda=0.1", "unknown option '--lamda'; did you mean --lambdas?"),
        (frontier, "--zzz", "unknown option '--zzz'"),
        (frontier, "--lambdas 0.1 0.3", "'0.3' is one word too many: options begin with --, and a list is written with "
                                        "commas"),
        (ablation, "--out x --lamda 0.1", "unknown option '--lamda'; did you mean --lambdas?"),
        (bench, "rollout", f"bench='rollout': need one of {', '.join(bench.BENCHES)}; did you mean rollouts?"),
        (store, "stat x", "command='stat': need one of stats, export, prune; did you mean stats?"),
        (store, "prune x --max-m=y", "--max-mb='y': need a number"),
        (store, "prune x --oldr-than 3", "unknown option '--oldr-than'; did you mean --older-than?"),
        (counterfactual, "x --tasks y", "--tasks='y': need a whole number"),
        (script_hard_budget, "x --calls y", "--calls: 'y': need whole numbers with commas, e.g. 5,10"),
        (allocation, "", "the following arguments are required: FOLDER"),
    ],
)  # fmt: skip
def test_a_mistyped_word_is_one_line(
    script: Any, arguments: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        script.main(arguments.split())
    assert ended.value.code == 2
    out, line = capsys.readouterr()
    assert out == "" and line.startswith(f"error: {says}; see python -m experiments.") and line.endswith(" --help\n")
    assert line.count("\n") == 1


CHILD = """
import sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.6)
    print("ended in order", flush=True)
    sys.exit(130)
"""


def test_an_interrupted_run_may_end_in_order() -> None:
    """Python's own subprocess.run would kill it a quarter of a second after Ctrl-C."""
    parent = (
        f"import sys; from bopo_ray.pipeline.jobs import run_process; run_process([sys.executable, '-c', {CHILD!r}])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "ended in order\n" and process.returncode != 0


WORK = """
import sys, time
from bopo_ray.pipeline.command import exit_code
def work():
    print("ready", flush=True)
    time.sleep(60)
sys.exit(exit_code(work, kept="the child's"))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_run_goes_on_without_the_script_that_started_it(how: signal.Signals) -> None:
    parent = f"""
import sys
from concurrent.futures import ThreadPoolExecutor
from bopo_ray.pipeline.command import exit_code
from bopo_ray.pipeline.jobs import run_process
sys.exit(exit_code(lambda: run_process([sys.executable, "-c", {WORK!r}]), kept="the parent's"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(how)  # to the parent alone
    said = process.communicate(timeout=30)[1]  # ends when nobody writes any more
    by_kill = how is signal.SIGKILL
    assert said == "terminated: the child's\n" + ("" if by_kill else "terminated: the parent's\n")
    assert process.returncode == (-how if by_kill else 143)


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux does it")
def test_a_run_whose_script_has_ended_before_it_begins_does_not_begin() -> None:
    begun = [sys.executable, "-c", "print('begun')"]
    for parent, said, code in ((os.getpid(), "begun\n", 0), (os.getpid() + 1, "", 143)):
        process = subprocess.Popen(begun, stdout=subprocess.PIPE, text=True, preexec_fn=partial(end_with, parent))
        assert (process.communicate()[0], process.returncode) == (said, code)


def test_what_sigterm_does_is_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(lambda: 7) == 7 and signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(exit_code, lambda: 7).result() == 7, "and not touched outside of the main thread"
