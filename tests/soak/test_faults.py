"""Real kills, full disks and interrupts: a run goes on, or is continued, and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.thirdparty_files import psutil

from bopo_ray.pipeline.card import CARD
from bopo_ray.pipeline.curves import training_curves
from bopo_ray.rllib.saved import ROUTER_FILE
from experiments.frontier import main
from tests.integration.conftest import TOY, Frontier, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

FULL = re.compile("No space left on device|the disk is full")


def kill_run(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver; then all of Ray's processes go by themselves."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert family
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not [p for p in family if alive(p)])


def alive(process: psutil.Process) -> bool:
    """Whether it runs; it may end while it is asked."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def checkpoints(run: Frontier) -> dict[str, list[Path]]:
    """Each point's whole checkpoints, oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(run.out.glob("tune/attempt-*/*/checkpoint_*/contents.json")):
        found.setdefault(path.parents[1].name, []).append(path.parent)
    return found


def ledger(run: Frontier) -> dict[str, dict[str, object]]:
    path = run.out / "ledger.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_a_run_killed_at_every_stage_ends_as_one_that_was_not(
    frontier: Frontier, toy_run: Frontier, capsys: pytest.CaptureFixture[str]
) -> None:
    # 1. Killed outright in the boundary rollouts: who has played 9 episodes waits, the first 16 are on disk.
    process = frontier.start(hold=9)
    wait_for(lambda: frontier.held() and len(frontier.rows("boundary")) >= 16, process)
    assert main([*frontier.arguments, "--resume"]) == 2  # two runs on one folder
    assert "is in use by another run" in capsys.readouterr().err
    kill_run(process)
    first = frontier.rows("boundary")

    # 2. One of two runners killed in mid-episode: another takes its place. Then Ctrl-C.
    process = frontier.start("--resume", hold=1)
    wait_for(lambda: len(frontier.held()) == 2, process)
    victim = min(frontier.held())
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(frontier.held() - {victim}) == 2, process)
    assert frontier.rows("boundary") == first
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert frontier.said().splitlines()[-1].startswith("interrupted: ")
    assert "--resume" in frontier.said().splitlines()[-1]
    second = frontier.rows("boundary")
    assert len(second) > len(first)  # what was finished before Ctrl-C is kept
    assert {k: second[k] for k in first} == first

    # 3. On to the sweep: two points wait in their third update. One loses its process, goes on from its checkpoint.
    process = frontier.start("--resume", hold=33)
    wait_for(lambda: len(frontier.held()) == 2 and [len(c) for c in checkpoints(frontier).values()] == [2, 2], process)
    assert {k: v for k, v in frontier.rows("boundary").items() if k in second} == second
    assert not ledger(frontier)
    for actor in frontier.actors("BoPO")[:1]:
        actor.kill()
    wait_for(lambda: len(ledger(frontier)) == 1, process)
    (done,) = ledger(frontier)
    wait_for(lambda: [len(c) for name, c in checkpoints(frontier).items() if name != done] == [2, 2], process)
    kill_run(process)
    before = weights(frontier, done)
    assert before
    stored = frontier.rows("policy")

    # SIGTERM in the sweep.
    process = frontier.start("--resume", hold=0)
    wait_for(lambda: len(frontier.held()) == 2, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 143
    assert frontier.said().splitlines()[-1].startswith("terminated: ")
    assert "--resume" in frontier.said().splitlines()[-1]
    assert weights(frontier, done) == before

    # 4. The newest checkpoint of one interrupted point is cut short; the older one serves.
    damaged, whole = sorted(set(checkpoints(frontier)) - {done})
    for file in checkpoints(frontier)[damaged][-1].rglob("module_state.pkl"):
        file.write_bytes(file.read_bytes()[:100])
    assert frontier.run("--resume") == 0, frontier.said()
    assert weights(frontier, done) == before
    last = max(frontier.out.glob("tune/attempt-*"))
    updates = {p.parent.name: updates_of(p) for p in last.glob("*/result.json")}
    fresh = set(updates) - {damaged, whole}
    assert updates == {damaged: [2, 3], whole: [3]} | {name: [1, 2, 3] for name in fresh}
    assert {*updates, done} == set(ledger(frontier)) == set(ledger(toy_run)) and len(fresh) == 1

    # As if nothing had happened: the same episodes, each once, and the same results to the last digit.
    for store in ("boundary", "stratified", "policy", "evaluation"):
        rows, wanted = frontier.rows(store), toy_run.rows(store)
        assert rows == wanted
    assert {k: v for k, v in frontier.rows("policy").items() if k in stored} == stored
    assert (frontier.out / "frontier.csv").read_bytes() == (toy_run.out / "frontier.csv").read_bytes()
    curves, wanted = (training_curves(run.out)[["trial", "iteration", "reward"]] for run in (frontier, toy_run))
    assert curves.equals(wanted)  # none is lost with the driver


def weights(run: Frontier, policy: str) -> dict[str, int]:
    """When each file of a router was written, less its card, which gets the figures of the evaluation at the end."""
    files = (run.out / "policies" / policy).glob("*")
    return {p.name: p.stat().st_mtime_ns for p in files if p.name not in (CARD, ROUTER_FILE)}


def updates_of(results: Path) -> list[int]:
    return [json.loads(line)["updates"] for line in results.read_text().splitlines()]


def test_a_run_killed_in_bosft_and_in_the_evaluation_ends_the_same(frontier: Frontier, toy_run: Frontier) -> None:
    ends = ("summary.json", "report.html", "frontier.csv", "frontier.png")
    shutil.copytree(toy_run.out, frontier.out)
    for name in ("policies", "tune", "tensorboard", "episodes/policy", "episodes/evaluation", "episodes/oracle"):
        shutil.rmtree(frontier.out / name)
    for name in (*ends, "ledger.json", "bosft.json"):
        (frontier.out / name).unlink()
    process = frontier.start("--resume")
    while not (frontier.out / "policies" / "bosft").exists():  # the first of its epochs
        assert process.poll() is None, frontier.said()
    process.send_signal(signal.SIGSTOP)  # at once: the other epochs take moments
    kill_run(process)
    assert not (frontier.out / "bosft.json").exists()
    assert frontier.run("--resume") == 0, frontier.said()
    assert (frontier.out / "bosft.json").read_bytes() == (toy_run.out / "bosft.json").read_bytes()
    assert (frontier.out / "frontier.csv").read_bytes() == (toy_run.out / "frontier.csv").read_bytes()

    for name in ("evaluation", "oracle"):
        shutil.rmtree(frontier.out / "episodes" / name)
    for name in ends:
        (frontier.out / name).unlink()
    process = frontier.start("--resume", hold=20)
    wait_for(lambda: frontier.held() and len(frontier.rows("evaluation")) >= 16, process)
    kill_run(process)
    kept = frontier.rows("evaluation")
    assert 16 <= len(kept) < len(toy_run.rows("evaluation"))
    assert frontier.run("--resume") == 0, frontier.said()
    assert frontier.rows("evaluation") == toy_run.rows("evaluation")
    assert (frontier.out / "frontier.csv").read_bytes() == (toy_run.out / "frontier.csv").read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB: the calls of the toy run and their logs take less."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounting a small disk needs root")
    command = [mount, "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk can't be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_loses_nothing(small_disk: Path, frontier: Frontier) -> None:
    shutil.rmtree(frontier.out, ignore_errors=True)
    frontier.out.symlink_to(small_disk, target_is_directory=True)
    frontier.options = (*TOY, "--advantage", "hybrid", "--lambdas", "0.2", "--updates", "1")

    # Full in the boundary rollouts: the first shard is there, the second finds no room.
    process = frontier.start(hold=9)
    wait_for(lambda: frontier.held() and len(frontier.rows("boundary")) >= 16, process)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(64 << 20))
    frontier.release()
    assert process.wait(120) == 2
    last = frontier.said().splitlines()[-1]
    assert last.startswith("error: ") and FULL.search(last) and "--resume" in last
    kept = frontier.rows("boundary")
    assert len(kept) >= 16

    # Then 1 MiB, too little for the router; then 3 MiB, enough for the router and too little for the sweep.
    filler.unlink()
    for room in (1 << 20, 3 << 20):
        size = shutil.disk_usage(small_disk).used + room
        subprocess.run(["mount", "-o", f"remount,size={size}", str(small_disk)], check=True)
        assert frontier.run("--resume") == 2, frontier.said()
        last = frontier.said().splitlines()[-1]
        assert last.startswith("error: ") and FULL.search(last) and "--resume" in last
        assert {k: v for k, v in frontier.rows("boundary").items() if k in kept} == kept

    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert frontier.run("--resume") == 0, frontier.said()
    assert {k: v for k, v in frontier.rows("boundary").items() if k in kept} == kept
    assert len(frontier.rows("boundary")) == 24
    assert (frontier.out / "report.html").exists() and len(ledger(frontier)) == 1
