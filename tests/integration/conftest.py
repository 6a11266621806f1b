"""Shared by the tests of the main job: the command as a process of its own, and one finished run to compare with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from ray.thirdparty_files import psutil

from bopo_ray.models.pricing import Price, Usage
from bopo_ray.models.protocol import Message
from bopo_ray.models.spend import SpendLedger
from tests.endpoint import Ask, Billed, Endpoint, Fault, toy_rule
from tests.toy import ID

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0
"""Until a test gives up waiting for what it waits for; long, because the machine may be busy."""


def wait_for(what: Callable[[], object], process: subprocess.Popen[bytes] | None = None) -> None:
    """Returns when `what()` is true; fails when `process` ended before."""
    until = time.monotonic() + PATIENCE_S
    while not what():
        assert process is None or process.poll() is None, "the run ended too early"
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.05)


@dataclass
class Frontier:
    """`python -m experiments.frontier` on one folder, with a place to hold it up."""

    folder: Path
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    """More variables, e.g. keys."""
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)
    cwd: Path | None = None
    """Where it is called, if not in the repository's root."""

    @property
    def out(self) -> Path:
        """The results."""
        return self.folder / "out"

    @property
    def arguments(self) -> list[str]:
        """Of the command."""
        return [*self.options, "--out", str(self.out)]

    def start(self, *more: str, hold: int | None = None) -> subprocess.Popen[bytes]:
        """Starts it with stdin closed; with `hold`, each process that plays waits after so many episodes."""
        (self.folder / "held").mkdir(exist_ok=True)
        self.release()
        if hold is not None:
            (self.folder / "held" / "hold").write_text(str(hold))
        command = [sys.executable, "-m", "experiments.frontier", *self.arguments, *more]
        environment = os.environ | {"TOY_HOLD": str(self.folder / "held" / "hold"), "COLUMNS": "130"} | self.environment
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
        with (self.folder / "stdout").open("wb") as out, (self.folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                command, cwd=self.cwd or ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores Ctrl-C
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, *more: str) -> int:
        """Runs it to its end; returns the exit code."""
        return self.start(*more).wait(PATIENCE_S)

    def held(self) -> set[int]:
        """Ids of the processes that wait in an episode."""
        names = [p.name for p in (self.folder / "held").iterdir() if p.name.isdigit()]
        return {int(name) for name in names if psutil.pid_exists(int(name))}

    def release(self) -> None:
        """Lets them go on."""
        for path in (self.folder / "held").iterdir():
            path.unlink()

    def said(self, stream: str = "stderr") -> str:
        """What the last run wrote."""
        return (self.folder / stream).read_text()

    def actors(self, name: str) -> list[psutil.Process]:
        """Ray's processes of the last run whose title starts with `ray::<name>`."""
        found = []
        for process in psutil.Process(self.started[-1].pid).children(recursive=True):
            try:
                if "".join(process.cmdline()[:1]).startswith(f"ray::{name}"):  # a process that ends has none
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def rows(self, store: str) -> dict[str, dict[str, Any]]:
        """The stored episodes by id; fails when one is there twice.

        Without the router's probabilities and times: the last bits of the former vary with the batch that a decision
        was made in.
        """
        shards = sorted((self.out / "episodes" / store).rglob("part-*.parquet"))
        rows = [row for shard in shards for row in pq.read_table(shard).to_pylist()]
        for row in rows:
            for step in row["steps"]:
                del step["probabilities"], step["router_s"]
        by_id = {str(r["id"]): r for r in rows}
        assert len(by_id) == len(rows), "an episode is stored twice"
        return by_id


TOY = ("--env", ID, "--scale", "tiny", "--updates", "3", "--tasks-per-update", "4", "--group-size", "4",
       "--strata", "1", "--schedules", "0", "--cpus", "2")  # fmt: skip
"""16 episodes per update and point, 24 boundary episodes, at most 12 stratified ones."""


@pytest.fixture
def frontier(tmp_path: Path) -> Iterator[Frontier]:
    """A run on Toy in a new folder; killed when the test ends."""
    run = Frontier(tmp_path, TOY)
    yield run
    for process in run.started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Frontier:
    """A finished run on Toy. Tests must leave its results as they are."""
    run = Frontier(tmp_path_factory.mktemp("toy_run"), TOY)
    code = run.run()
    assert code == 0, run.said()
    return run


PAIR = ("--env", ID, "--scale", "tiny", "--train-tasks", "6", "--test-tasks", "4", "--k", "2", "--strata", "1",
        "--updates", "1", "--tasks-per-update", "3", "--group-size", "3", "--lambdas", "0.3", "--advantage", "hybrid",
        "--cpus", "2", "--sft-epochs", "10", "--max-steps", "12", "--schedules", "0")  # fmt: skip
"""The main job in miniature, for models that answer over HTTP or from their own weights."""
PRICES = {"toy-small": (0.4, 0.1, 1.6), "toy-large": (2.0, 0.5, 8.0)}
"""Dollars per million tokens: input, cached input, output."""


class Watched(Endpoint):
    """The scripted endpoint, in the test's process; counts how often each question was answered, delivered or not."""

    def __init__(self, faults: Callable[[Ask], Fault | None] | Sequence[Fault | None] = (), **more: Any) -> None:
        self.answered = Counter[tuple[str, tuple[Message, ...]]]()
        super().__init__(self._answer, faults, **more)

    def _answer(self, ask: Ask) -> str:
        with self.lock:
            self.answered[ask.model, ask.messages] += 1
        return toy_rule(ask)

    @property
    def delivered(self) -> Counter[tuple[str, Usage]]:
        """The bill, without what the client never saw."""
        return Counter((line.model, line.usage) for line in self.bill if line.delivered)

    @property
    def undelivered(self) -> list[Billed]:
        """What the client may be charged for without having seen it."""
        return [line for line in self.bill if not line.delivered]

    @property
    def cost_microusd(self) -> int:
        """Of the whole bill."""
        return sum(price(line.model).cost(line.usage) for line in self.bill)


def price(model: str) -> Price:
    """Of a scripted model."""
    return Price(*(round(1e6 * usd) for usd in PRICES[model]))


def write_pool(path: Path, url: str, **fields: object) -> Path:
    """A pool file for the scripted endpoint, which asks for no key."""
    models = [
        {"model": f"openai:{name}", "price": price(name).to_dict(), "base_url": url, "key_variable": ""} | fields
        for name in PRICES
    ]
    path.write_text(yaml.safe_dump({"models": models}))
    return path


def ledger(run: Frontier) -> SpendLedger:
    """What a run has spent."""
    return SpendLedger(run.out / "spend.db", None)


def paid(run: Frontier) -> Counter[tuple[str, Usage]]:
    """The ledger's bill."""
    return Counter((row.model, row.usage) for row in ledger(run).paid_rows())


def audited(run: Frontier) -> str:
    """What the audit says; fails when it finds a difference."""
    command = [sys.executable, "-m", "experiments.audit", str(run.out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
