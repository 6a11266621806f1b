"""Steps and episodes per second of AppWorld, on the same task with the same actions.

    python -m experiments.bench envs

* naive: the appworld package's own environment server, spoken to over HTTP, one connection kept open;
* ours: `AppWorldEnv`, each of whose episodes has a confined process of its own;
* limit: the package's environment in its own process, called directly: no way there and back, nothing confined.

An episode is a reset, one round of the actions and the verdict; with several at once, threads of this process drive
them, as a runner does, and the limit is so many times the rate of one.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from experiments.bench import Row, interleave

__all__ = ["run"]

TASK = "text-contact/9"
ACTIONS = (
    'passwords = {a["account_name"]: a["password"] for a in apis.supervisor.show_account_passwords()}',
    "me = apis.supervisor.show_profile()",
    'phone = apis.phone.login(username=me["phone_number"], password=passwords["phone"])["access_token"]',
    "print(apis.api_docs.show_app_descriptions())",
    'found = apis.phone.search_contacts(query="a", access_token=phone)',
    "print([c['first_name'] for c in found])",
    "print(1 / 0)",
    "print(me)",
)
ENGINE = Path(__file__).parent / "bench_appworld_engine.py"


class _Direct:
    """The package's environment in a process of its own; one line in, one line out, for a whole round."""

    def __init__(self, python: Path, root: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), "-I", str(ENGINE), "direct", str(root), TASK.replace("/", "_")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._ask, self._answer = self._process.stdin, self._process.stdout
        self._answer.readline()

    def do(self, what: str) -> None:
        """reset, evaluate, or a JSON list of actions."""
        print(what, file=self._ask, flush=True)
        if not self._answer.readline():
            raise RuntimeError(f"AppWorld's environment ended (exit code {self._process.wait()})")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


class _Served:
    """The package's environment server."""

    def __init__(self, python: Path, root: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), "-I", str(ENGINE), "serve", str(root)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self._connection = http.client.HTTPConnection("127.0.0.1", int(self._process.stdout.readline()))
        self._task = TASK.replace("/", "_")

    def post(self, path: str, **body: Any) -> None:
        self._connection.request(
            "POST", path, json.dumps({"task_id": self._task, **body}), {"Content-Type": "application/json"}
        )
        response = self._connection.getresponse()
        text = response.read()
        if response.status != 200:
            raise RuntimeError(f"AppWorld's server answers {response.status} to {path}: {text[:200]!r}")

    def reset(self) -> None:
        self.post("/initialize", experiment_name="served", max_interactions=10**9)

    def round(self) -> None:
        for action in ACTIONS:
            self.post("/execute", code=action)

    def episode(self) -> None:
        self.reset()
        self.round()
        self.post("/evaluate", suppress_errors=True)

    def close(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()


def _episode(env: Any) -> None:
    env.reset(options={"task": TASK})
    for action in ACTIONS:
        env.step(action)  # the last one ends the episode


def _together(count: int, seconds: float) -> float:
    """Episodes per second of `count` environments at once."""
    from envs.appworld import AppWorldEnv

    envs = [AppWorldEnv(max_steps=len(ACTIONS)) for _ in range(count)]
    end = time.monotonic() + seconds

    def play(env: AppWorldEnv) -> int:
        episodes = 0
        while time.monotonic() < end:
            _episode(env)
            episodes += 1
        return episodes

    start = time.monotonic()
    with ThreadPoolExecutor(count) as pool:
        episodes = sum(pool.map(play, envs))
    return episodes / (time.monotonic() - start)


def run(seconds: float) -> Sequence[Row]:
    """Measure for about `seconds`, after the engines have started."""
    from envs.appworld import AppWorldEnv, client, data

    python, folder = client.find_python(), data.data_folder()
    with ExitStack() as stack:
        roots = [Path(stack.enter_context(TemporaryDirectory(prefix="bopo_ray-bench-"))) for _ in range(2)]
        for root in roots:
            (root / "data").symlink_to(folder)
        direct, served = _Direct(python, roots[0]), _Served(python, roots[1])
        stack.callback(direct.close)
        stack.callback(served.close)
        ours, whole = AppWorldEnv(max_steps=10**9), AppWorldEnv(max_steps=len(ACTIONS))
        stack.callback(ours.close)
        actions = json.dumps(ACTIONS)
        ours.reset(options={"task": TASK})
        served.reset()
        steps: dict[str, Callable[[], None]] = {
            "ours": lambda: [ours.step(action) for action in ACTIONS] and None,
            "naive": served.round,
            "limit": lambda: direct.do(actions),
        }
        rate = interleave(steps, seconds / 3)
        episodes: dict[str, Callable[[], None]] = {
            "ours": lambda: _episode(whole),
            "naive": served.episode,
            "limit": lambda: [direct.do(what) for what in ("reset", actions, "evaluate")] and None,
        }
        episode = interleave(episodes, seconds / 3)
    cores = os.cpu_count() or 1
    growth = {count: _together(count, seconds / 9) for count in (1, cores, 2 * cores)}
    client.shutdown()
    n = len(ACTIONS)
    return [
        Row("AppWorld", "steps/s", n * rate["ours"], n * rate["naive"], n * rate["limit"]),
        Row(f"AppWorld, {n} steps each", "episodes/s", episode["ours"], episode["naive"], episode["limit"]),
        *(Row(f"AppWorld, {c} at once", "episodes/s", growth[c], None, c * growth[1]) for c in list(growth)[1:]),
    ]
