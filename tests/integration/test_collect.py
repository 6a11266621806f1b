"""One queue over all runners: what is played when one of them is killed, hangs, or is slow."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bopo_ray.errors import UnknownTaskError
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.records import Episode, EpisodeSpec
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.collect import collect
from bopo_ray.rllib.placement import RunnerGroup
from bopo_ray.rllib.runner import Failure, GroupEnvRunner
from bopo_ray.routers import ALWAYS_LARGE
from tests.integration.conftest import wait_for
from tests.processes import ask_runners
from tests.toy import ID, toy_spec

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SPECS = [toy_spec(f"{kind}/{n}", member=m) for kind in ("fetch", "measure", "mix") for n in range(4) for m in range(3)]
LANES = 4


def config(folder: Path) -> BoPOConfig:
    pool = resolve_pool("simulated", "", "", price_table())
    made = BoPOConfig().environment(ID, env_config={"pool": pool, "env": {"scratch": str(folder), "hang_s": 60.0}})
    made.env_runners(num_env_runners=2, num_envs_per_env_runner=LANES, num_cpus_per_env_runner=0.5)
    return made.router(width=16, layers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collect")


@pytest.fixture(scope="module")
def group(folder: Path, ray_session: Any) -> Iterator[RunnerGroup]:
    """Two runners."""
    made = RunnerGroup(config=config(folder), local_env_runner=False)
    yield made
    made.stop()


def alone(specs: list[EpisodeSpec], folder: Path) -> list[Episode | Failure]:
    """The same by one runner in this process."""
    runner = GroupEnvRunner(config=config(folder))
    try:
        found = {r.spec.id: r for r in runner.sample(specs)}
        return [found[s.id] for s in specs]
    finally:
        runner.stop()


def players(group: RunnerGroup) -> list[int]:
    """Process ids of the runners."""
    return ask_runners(group, lambda _: os.getpid())


def test_two_runners_play_what_one_does(group: RunnerGroup, folder: Path) -> None:
    arrived: list[str] = []
    found = collect(group, SPECS, on_episode=lambda r: arrived.append(r.spec.id))
    assert found == alone(SPECS, folder)
    assert sorted(arrived) == sorted(s.id for s in SPECS)
    assert collect(group, []) == []


def test_a_task_is_played_where_it_was_played_before(group: RunnerGroup) -> None:
    """A process makes no engine step twice; another one would have to."""
    specs = [toy_spec(f"mix/{n}", member=m) for n in range(300, 340) for m in range(4)]
    for _ in range(2):
        assert all(isinstance(r, Episode) for r in collect(group, specs))
    first, second = ask_runners(group, known_tasks)
    assert len(first | second) == 40 and len(first & second) < 15  # which one took from the other's line


def known_tasks(_: Any) -> set[str]:
    """In a runner: the new tasks whose steps it knows."""
    from bopo_ray.rllib.runner import TRANSCRIPTS

    return {key for key in TRANSCRIPTS._begins if '"mix/3' in key and '"mix/3"' not in key}


def test_a_killed_runner_is_replaced_and_its_episodes_are_played_once(group: RunnerGroup, folder: Path) -> None:
    marked = toy_spec("fault-hang/1", ALWAYS_LARGE)  # its first attempt hangs, and says where
    marker, found = folder / "fault-hang-1", list[Any]()
    arrived: list[str] = []
    before = set(players(group))
    thread = threading.Thread(
        target=lambda: found.extend(collect(group, [marked, *SPECS], on_episode=lambda r: arrived.append(r.spec.id)))
    )
    thread.start()
    wait_for(marker.exists)
    victim = int(marker.read_text())
    os.kill(victim, signal.SIGKILL)
    thread.join(120)
    assert found[1:] == alone(SPECS, folder) and isinstance(found[0], Episode)
    assert sorted(arrived) == sorted(s.id for s in (marked, *SPECS))
    assert victim in before and before - {victim} < set(players(group)) != before


def test_a_silent_runner_is_killed_and_its_episodes_are_played_once(group: RunnerGroup, folder: Path) -> None:
    hanging = [toy_spec(f"fault-hang/{n}", ALWAYS_LARGE) for n in (2, 3)]
    before = set(players(group))
    found = collect(group, [*hanging, *SPECS[:4]], silence_s=2.0)
    assert found[2:] == alone(SPECS[:4], folder) and all(isinstance(r, Episode) for r in found)
    assert len(set(players(group)) & before) < 2


def test_a_runner_at_work_on_a_long_episode_is_not_taken_for_silent(group: RunnerGroup) -> None:
    """Its steps count, and not its episodes alone."""
    before, began = set(players(group)), time.monotonic()
    found = collect(group, [toy_spec(f"mix/{n}-slow", ALWAYS_LARGE) for n in range(2)], silence_s=3.0)
    assert all(isinstance(r, Episode) and len(r.steps) == 6 for r in found)
    assert time.monotonic() - began > 4 and set(players(group)) == before


def test_an_episode_that_takes_long_holds_no_other(group: RunnerGroup, folder: Path) -> None:
    """All others are played while it hangs, also those that came after it in the queue."""
    slow, arrived = toy_spec("fault-hang/4", ALWAYS_LARGE), list[str]()
    many = [toy_spec("fetch/1", member=100 + m) for m in range(60)]
    seen: list[int] = []

    def on_episode(result: Any) -> None:
        arrived.append(result.spec.id)
        if len(arrived) == len(many):
            seen.append(int((folder / "fault-hang-4").read_text()))
            os.kill(seen[0], signal.SIGKILL)

    found = collect(group, [slow, *many], on_episode=on_episode)
    assert isinstance(found[0], Episode) and arrived[-1] == slow.id and len(seen) == 1


def test_the_users_mistake_ends_it_and_the_runners_go_on(group: RunnerGroup, folder: Path) -> None:
    with pytest.raises(UnknownTaskError, match="unknown task 'no/1'"):
        collect(group, [*SPECS[:4], toy_spec("no/1"), *(toy_spec("long/1", member=m) for m in range(200))])
    assert collect(group, SPECS[:6]) == alone(SPECS[:6], folder)
