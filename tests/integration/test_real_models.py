"""The main job on models that answer over real HTTP or from weights of their own: its bill, its secrets, its caps."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from bopo_ray.models import build_pool
from bopo_ray.models.desk import Desk
from bopo_ray.models.pool import ModelSpec, PoolSpec
from bopo_ray.models.pricing import Price
from bopo_ray.records import spawn_seed
from tests.endpoint import Ask, Fault, Kind
from tests.integration.conftest import PAIR, PRICES, ROOT, Frontier, Watched, audited, ledger, paid, price
from tests.tiny_lm import make_tiny_lm, serve
from tests.toy import play, routing_env, toy_spec

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

KEY = "planted-Zq8vTn3LrW0xKb7Yd2Mf"
FREE = Price(0, 0, 0)


def everything_written(run: Frontier) -> Iterator[tuple[Path, bytes]]:
    """All files of a run, what it printed, and the logs of its Ray; Parquet pages unpacked."""
    (logs,) = re.findall(r"^Ray's logs: +(\S+)$", run.said("stdout"), re.MULTILINE)
    for folder in (run.folder, Path(logs)):
        for path in folder.rglob("*"):
            if path.is_file():
                yield path, path.read_bytes()
                if path.suffix == ".parquet":
                    yield path, json.dumps(pq.read_table(path).to_pylist()).encode()


@pytest.fixture(scope="session")
def tiny_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two real models: the small one can only fetch."""
    folder = tmp_path_factory.mktemp("pair")
    return make_tiny_lm(folder / "small", ("fetch",)), make_tiny_lm(folder / "large", ("fetch", "measure"))


def passing_faults(ask: Ask) -> Fault | None:
    """One request in fifteen fails, in ways that another attempt mends; some of them are charged for."""
    draw = random.Random(spawn_seed("fault", ask.n))
    kinds = (Kind.RATE, Kind.ERROR, Kind.RESET, Kind.CUT, Kind.TRUNCATED)
    return Fault(draw.choice(kinds), {"Retry-After": "0.05"}) if draw.random() < 1 / 15 else None


def test_openai_models_are_billed_to_the_call_and_the_key_stays_secret(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    table = {name: price(name).to_dict() for name in PRICES}
    prices.write_text(yaml.safe_dump({"date": "2026-02-01", "models": table}))
    with Watched(passing_faults, key=KEY) as endpoint:
        run = Frontier(
            tmp_path,
            (*PAIR, "--small", "openai:toy-small", "--large", "openai:toy-large", "--prices", str(prices),
             "--temperature", "0", "--budget-calls", "2"),
            {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": endpoint.url},
        )  # fmt: skip
        assert run.run() == 0, run.said()

    # The bill: ours is the server's, call by call; what it made and we never saw counts as lost, at its worst case.
    assert endpoint.refusals.total() >= 5 and endpoint.undelivered
    totals = ledger(run).totals().overall
    assert paid(run) == endpoint.delivered
    assert totals.lost_calls == len(endpoint.undelivered)
    assert totals.paid_microusd + totals.lost_microusd >= endpoint.cost_microusd
    assert totals.reserved_microusd == 0
    summary = json.loads((run.out / "summary.json").read_text())
    spend = summary["spend"]
    assert spend["paid_calls"] == totals.paid_calls == len(endpoint.answered)
    assert spend["calls"] > 2 * spend["paid_calls"]
    assert "0 differ" in audited(run)
    # Deterministic models are asked each question once, but for the answers that were lost.
    assert endpoint.delivered.total() == len(endpoint.answered)
    assert endpoint.answered.total() == len(endpoint.answered) + len(endpoint.undelivered)

    # Everything says which models these are.
    assert summary["label"] == "toy-small / toy-large pair"
    page = (run.out / "report.html").read_text()
    for text in (page.lower(), json.dumps(summary).lower(), run.said("stdout").lower()):
        assert "toy-small / toy-large" in text and "simulated" not in text

    # The hard budget.
    episodes = run.rows("evaluation").values()
    assert {e["budget_mode"] for e in episodes} == {"calls"} and {e["budget_cap"] for e in episodes} == {2}
    used = Counter(sum(s["model"] > 0 for s in e["steps"]) for e in episodes if e["policy"] == "always-large")
    assert max(e["large_calls"] for e in episodes) == 2 and used == {2: 4}
    assert all(e["large_calls"] > 2 for e in run.rows("boundary").values() if e["policy"] == "always-large")
    assert "under a hard budget of 2 large calls per task" in page
    assert "hard budget of 2 large calls per task" in " ".join(run.said("stdout").split())

    # The key.
    secrets = [KEY.encode(), KEY[:16].encode(), KEY[-16:].encode()]
    seen = 0
    for path, data in everything_written(run):
        seen += 1
        assert not any(s in data for s in secrets), path
    assert seen > 60


def test_local_models_measure_their_usage_and_share_one_actor_each(
    tiny_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    pool = tmp_path / "pool.yaml"
    models = [{"model": f"hf:{folder}", "price": 0, "max_completion_tokens": 32} for folder in tiny_pair]
    pool.write_text(yaml.safe_dump({"models": models}))
    run = Frontier(tmp_path, (*PAIR, "--models", str(pool), "--temperature", "0", "--ignore-gate"))
    process = run.start()
    hosts: set[int] = set()

    def watch() -> None:
        while process.poll() is None:
            hosts.update(p.pid for p in run.actors("_Host"))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait(600)
    watcher.join()
    assert code == 0, run.said()
    assert len(hosts) == 2, "one process per model, whoever asks, for the whole run"
    rows = [s for store in ("boundary", "policy", "evaluation") for e in run.rows(store).values() for s in e["steps"]]
    assert {s["model"] for s in rows} == {0, 1}
    assert all(s["prompt_tokens"] > 20 and 0 < s["completion_tokens"] <= 32 for s in rows)
    assert all(s["cost_microusd"] == 0 for s in rows)
    successes = Counter(
        (e["policy"], e["task"].partition("/")[0]) for e in run.rows("boundary").values() if e["success"]
    )
    assert successes["always-large", "measure"] > 0 == successes["always-small", "measure"]
    totals = ledger(run).totals()
    assert [m.model for m in totals.models] == ["large", "small"]
    assert all(m.paid_calls and m.prompt_tokens and not m.paid_microusd for m in totals.models)
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["label"] == "small / large pair" and summary["spend"]["paid_usd"] == 0
    audited(run)


LOAD_AT_ONCE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from bopo_ray.models.huggingface import HFModel
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price
from bopo_ray.models.protocol import Message, Request

models = [HFModel(ModelSpec(f"hf:{folder}", Price(0, 0, 0), device="cpu")) for folder in sys.argv[1:] * 2]
together = threading.Barrier(len(models))

def first_call(model):
    together.wait()
    return model.complete(Request((Message("user", "Say something."),), 0, 0.0, 8, task="")).text

with ThreadPoolExecutor(len(models)) as threads:
    replies = list(threads.map(first_call, models))
assert len(set(replies[::2])) == len(set(replies[1::2])) == 1, replies
"""


def test_models_that_are_loaded_at_once_all_get_their_weights(tiny_pair: tuple[Path, Path]) -> None:
    """In a new process: only the first load of a kind of model is in danger."""
    command = [sys.executable, "-c", LOAD_AT_ONCE, *map(str, tiny_pair)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_pool_of_a_local_model_and_one_behind_transformers_serve(tiny_pair: tuple[Path, Path]) -> None:
    small, large = tiny_pair
    with serve(large) as url:
        spec = PoolSpec(
            (
                ModelSpec(f"hf:{small}", FREE, device="cpu", max_completion_tokens=32),
                ModelSpec(f"openai:{large}", FREE, base_url=url, key_variable="", max_completion_tokens=32),
            )
        )
        pool = build_pool(spec)
        for model in pool.models:
            model.check()
        env = routing_env(pool, desk=Desk(), temperature=0.0, max_steps=6)
        got = {}
        for name in ("fetch/203", "measure/201"):
            for policy, p_large in (("small", 0.0), ("large", 1.0)):
                episode, _ = play(toy_spec(name), env, p_large)
                got[name, policy] = episode.success
                assert all(s.prompt_tokens > 20 and s.completion_tokens > 0 for s in episode.steps)
        for model in pool.models:
            model.close()
    assert got == {
        ("fetch/203", "small"): True,
        ("fetch/203", "large"): True,
        ("measure/201", "small"): False,
        ("measure/201", "large"): True,
    }
