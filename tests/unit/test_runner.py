"""GroupEnvRunner in this process, without Ray: what comes back, and what it depends on."""

from __future__ import annotations

import dataclasses
import itertools
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.rllib.core.columns import Columns

from bopo_ray.agent import episode_views
from bopo_ray.errors import AttemptError, ConfigError, ModelError, UnknownTaskError
from bopo_ray.models.calls import CallStore
from bopo_ray.models.desk import Desk
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.recall import Transcripts
from bopo_ray.records import Budget, CostMode, Episode, EpisodeSpec, StopReason
from bopo_ray.rllib import runner as runner_module
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.collect import Fleet
from bopo_ray.rllib.encode import encode_view
from bopo_ray.rllib.runner import ATTEMPTS, Failure, GroupEnvRunner
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL, Moment
from bopo_ray.routing_env import RoutingEnv, Tab
from tests.toy import ID, PLANS, Toy, play, routing_env, scripted_pool, toy_spec

SPECS = [
    toy_spec(f"{kind}/{n}", router, member)
    for kind in ("fetch", "measure", "mix")
    for n in range(2)
    for router in (ALWAYS_SMALL, ALWAYS_LARGE, "random(0.5)", "first-large(2)", "prompted")
    for member in range(2)
]
SPECS += [toy_spec("mix/1", budget=b) for b in (Budget(CostMode.CALLS, 1), Budget(CostMode.USD, 0),
                                                Budget(CostMode.USD, 3000))]  # fmt: skip


SIMULATED = resolve_pool("simulated", "", "", price_table())


def make_runner(lanes: int = 4, scratch: str = "", max_steps: int = 20) -> GroupEnvRunner:
    config = BoPOConfig().environment(
        ID, env_config={"pool": SIMULATED, "env": {"max_steps": max_steps, "scratch": scratch}}
    )
    config.env_runners(num_envs_per_env_runner=lanes)
    return GroupEnvRunner(config=config.router(width=16, layers=1))


@pytest.fixture
def runner() -> Iterator[GroupEnvRunner]:
    made = make_runner()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def weights() -> dict[str, Any]:
    """A small random router that is not quite indifferent."""
    made = make_runner(1)
    torch.manual_seed(3)
    made.make_module()
    with torch.no_grad():
        for name, p in made.module.named_parameters():
            if "head" in name:
                p.normal_(0, 0.2)
    made.stop()
    return dict(made.module.get_state())


def results(specs: Sequence[EpisodeSpec], lanes: int, weights: Any = None) -> dict[str, Episode | Failure]:
    made = make_runner(lanes)
    try:
        found = list(made.stream(specs, weights))
    finally:
        made.stop()
    assert Counter(r.spec.id for r in found) == Counter(s.id for s in specs)  # each once
    return {r.spec.id: r for r in found}


def test_results_depend_on_the_specs_alone() -> None:
    with_ray = ray.is_initialized()  # by another test
    one = results(SPECS, 1)
    assert all(isinstance(r, Episode) and r.spec in SPECS for r in one.values())
    assert results(SPECS, 8) == one
    assert results(random.Random(0).sample(SPECS, len(SPECS)), 3) == one
    assert results(SPECS[5:6], 8) == {SPECS[5].id: one[SPECS[5].id]}
    assert ray.is_initialized() == with_ray, "a runner starts no Ray"


def test_an_episode_is_what_the_environment_played(runner: GroupEnvRunner) -> None:
    large, small = toy_spec("mix/1", ALWAYS_LARGE, 3), toy_spec("mix/1", ALWAYS_SMALL, 3)
    found = {e.spec.policy: e for e in runner.sample([large, small])}
    for spec, p in ((large, 1.0), (small, 0.0)):
        by_hand, views = play(spec, p_large=p)
        assert found[spec.policy] == by_hand and episode_views(found[spec.policy]) == views


def test_a_runner_is_used_again_and_for_nothing_at_all(runner: GroupEnvRunner) -> None:
    first = runner.sample(SPECS[:6])
    assert runner.sample([]) == []
    key = lambda e: e.spec.id  # noqa: E731
    assert sorted(runner.sample(SPECS[:6]), key=key) == sorted(first, key=key)


def test_a_stream_left_in_the_middle_does_no_harm(runner: GroupEnvRunner) -> None:
    stream = runner.stream(SPECS)
    first = next(stream)
    stream.close()
    (again,) = runner.sample([first.spec])
    assert again == first


def test_budgets_hold_and_an_unpayable_episode_has_no_step(runner: GroupEnvRunner) -> None:
    specs = [toy_spec("mix/1", ALWAYS_LARGE, budget=b) for b in (
        Budget(CostMode.CALLS, 2), Budget(CostMode.USD, 0), Budget(CostMode.USD, 4000))]  # fmt: skip
    calls, nothing, usd = sorted(runner.sample(specs), key=lambda e: specs.index(e.spec))
    assert calls.large_calls == 2 and {s.probabilities for s in calls.steps[2:]} == {(1.0, 0.0)}
    assert (nothing.stop, nothing.steps, nothing.success) == (StopReason.BUDGET, (), False)
    assert 0 < usd.cost_microusd <= 4000


def test_a_prompted_router_pays_for_its_questions(runner: GroupEnvRunner) -> None:
    spec = toy_spec("measure/1", "prompted", budget=Budget(CostMode.USD, 10**6))
    (episode,) = runner.sample([spec])
    questions = [s.question for s in episode.steps]
    assert all(q is not None and q.reply in ("SMALL", "LARGE") for q in questions)
    assert [s.model for s in episode.steps] == [int(q.reply == "LARGE") for q in questions]
    assert episode.calls == 2 * len(episode.steps)
    by_hand = sum(s.cost_microusd + s.question.cost_microusd for s in episode.steps)
    assert episode.cost_microusd == by_hand > sum(s.cost_microusd for s in episode.steps)
    left = [float(v.split("\n")[1].partition("$")[2].partition(";")[0]) for v in episode_views(episode)]
    paid = [(s.cost_microusd + s.question.cost_microusd) / 1e6 for s in episode.steps]
    assert left == pytest.approx([1.0 - sum(paid[:t]) for t in range(len(paid))], abs=6e-5)


def test_routers_that_a_name_does_not_make_are_handed_over(runner: GroupEnvRunner) -> None:
    class Every3rd:
        def __call__(self, moment: Moment) -> tuple[float, ...]:
            assert (moment.task, moment.member) == ("long/1", 4)
            return (0.0, 1.0) if moment.step % 3 == 0 else (1.0, 0.0)

    (episode,) = runner.sample([toy_spec("long/1", "mine", 4)], routers={"mine": Every3rd()})
    assert [s.model for s in episode.steps[:7]] == [1, 0, 0, 1, 0, 0, 1]


def test_a_dead_engine_is_a_failure_after_its_attempts_while_the_others_finish(
    runner: GroupEnvRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    resets: Counter[str] = Counter()
    episode = runner._episode

    def counting(session: Any, env: Any, spec: EpisodeSpec, tab: Tab) -> Episode:
        resets[spec.task.name] += 1
        return episode(session, env, spec, tab)

    monkeypatch.setattr(runner, "_episode", counting)
    dead = [toy_spec(f"fault-dead/{i}", "random(1)") for i in range(6)]  # more than there are lanes
    found = runner.sample([dead[0], *SPECS[:8], *dead[1:]])
    failures = [r for r in found if isinstance(r, Failure)]
    assert {f.spec for f in failures} == set(dead) and len(found) == 14
    assert all(f.reason == "EngineError: the toy engine died" for f in failures)
    assert {r.spec.id: r for r in found if isinstance(r, Episode)} == results(SPECS[:8], 1)
    assert ATTEMPTS == 3 and all(resets[s.task.name] == 3 for s in dead)


def test_an_engine_that_died_once_is_tried_again(tmp_path: Path) -> None:
    runner = make_runner(2, str(tmp_path))
    specs = [toy_spec(f"fault-once/{i}", ALWAYS_LARGE) for i in range(3)]
    first = {r.spec.id: r for r in runner.sample(specs)}
    assert all(isinstance(r, Episode) for r in first.values()) and len(list(tmp_path.iterdir())) == 3
    # The lost attempt leaves no trace: the same episodes as on an engine that never died.
    assert {r.spec.id: r for r in runner.sample(specs)} == first
    runner.stop()


def test_an_environment_that_can_not_be_made_fails_its_episodes_only(
    runner: GroupEnvRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = runner._make_env, itertools.count()

    def failing(env_id: str) -> RoutingEnv:
        if next(made) < missed:
            raise ModelError("the store is gone")
        return make(env_id)

    monkeypatch.setattr(runner, "_make_env", failing)
    missed = 10**6
    found = runner.sample(SPECS[:6])
    assert {f.spec for f in found} == set(SPECS[:6])
    assert all(isinstance(f, Failure) and f.reason == "ModelError: the store is gone" for f in found)
    missed, made = ATTEMPTS - 1, itertools.count()
    assert {e.spec.id: e for e in runner.sample(SPECS[:6])} == results(SPECS[:6], 1)


@pytest.mark.parametrize("room", [0, 10**6])
def test_what_failed_tries_lost_counts_against_the_cap(
    room: int, runner: GroupEnvRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    replies = [f"Action: {a}" for a in PLANS["fetch"]]
    pool = scripted_pool(replies, max_completion_tokens=10)
    large = pool.models[1]

    def breaks_off(step: int) -> str:
        if large.calls in (2, 3):
            raise AttemptError("broke off", kind="cut", retry=False, billed=True)
        return replies[step]

    large.reply = breaks_off
    desk = Desk(CallStore(tmp_path / "calls.db"))
    monkeypatch.setattr(runner, "_make_env", lambda _: routing_env(pool, desk=desk))
    free, _ = play(toy_spec(), routing_env(scripted_pool(replies, max_completion_tokens=10)), p_large=1.0)
    worst = 10 * free.steps[1].prompt_tokens + 20 * 10  # $10 per million words in, $20 out
    cap = free.steps[0].cost_microusd + 3 * worst - 1 + room
    (episode,) = runner.sample([toy_spec(router=ALWAYS_LARGE, budget=Budget(CostMode.USD, cap))])
    assert isinstance(episode, Episode) and episode.stop is (StopReason.SUCCESS if room else StopReason.BUDGET)
    assert [s.lost_microusd for s in episode.steps[:2]] == [0, 2 * worst]
    assert sum(s.charged_microusd for s in episode.steps) <= cap
    assert large.calls == (6 if room else 3), "what was answered is in the store"


@pytest.mark.parametrize("instant", [True, False])
def test_an_instant_benchmark_is_played_on_the_lanes_own_thread(
    instant: bool, runner: GroupEnvRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, reset, step = set[str](), Toy.reset, Toy.step

    def noting(method: Any) -> Any:
        def call(env: Toy, *args: Any, **kwargs: Any) -> Any:
            threads.add(threading.current_thread().name)
            return method(env, *args, **kwargs)

        return call

    usual = list(runner.sample(SPECS[:8]))
    monkeypatch.setattr(Toy, "instant", instant, raising=False)
    monkeypatch.setattr(Toy, "reset", noting(reset))
    monkeypatch.setattr(Toy, "step", noting(step))
    monkeypatch.setattr(runner_module, "TRANSCRIPTS", Transcripts())
    other = make_runner()
    found = {e.spec.id: e for e in other.sample(SPECS[:8]) if isinstance(e, Episode)}
    other.stop()
    for e in usual:
        assert isinstance(e, Episode)
        assert [s.observation for s in found[e.spec.id].steps] == [s.observation for s in e.steps]
    assert {name.partition(" ")[0] for name in threads} == {"lanes" if instant else "aside"}


def test_the_users_mistakes_are_raised_not_counted(runner: GroupEnvRunner) -> None:
    with pytest.raises(UnknownTaskError, match="unknown task 'no/1'"):
        runner.sample([*SPECS[:5], toy_spec("no/1")])
    with pytest.raises(ConfigError, match="unknown router 'nobody'"):
        runner.sample([toy_spec(router="nobody")])
    with pytest.raises(ValueError, match="no weights have been given: pass weights"):
        runner.sample([toy_spec(router="learned")])
    assert len(runner.sample(SPECS[:5])) == 5  # and the runner lives on


def learned(member: int = 0, **more: Any) -> EpisodeSpec:
    return dataclasses.replace(toy_spec("mix/1", "learned", member), policy="bopo", **more)


def test_the_learned_router_decides_by_its_weights(weights: dict[str, Any]) -> None:
    runner = make_runner()
    runner.make_module()
    runner.module.set_state(weights)
    specs = [learned(i) for i in range(6)] + [learned(i, greedy=True) for i in range(6)]
    for episode in results(specs, 4, weights).values():
        assert isinstance(episode, Episode)
        ids = torch.from_numpy(np.stack([encode_view(v, 96) for v in episode_views(episode)]))
        with torch.inference_mode():
            p = torch.softmax(runner.module.forward_inference({Columns.OBS: ids})[Columns.ACTION_DIST_INPUTS], -1)
        given = np.array([s.probabilities for s in episode.steps])
        assert given == pytest.approx(p.numpy(), abs=1e-5)
        if episode.spec.greedy:
            assert [s.model for s in episode.steps] == given.argmax(1).tolist()
    runner.stop()


@pytest.mark.parametrize("value", [True, False])
def test_a_small_router_over_the_embedded_pair_does_without_what_takes_long_to_import(value: bool) -> None:
    """Transformers and PyTorch's compiler take each process that Ray starts five seconds of CPU time and 200 MB."""
    code = (
        "import sys; from bopo_ray.models.pool import resolve_pool; from bopo_ray.models.pricing import price_table\n"
        "from bopo_ray.rllib.bopo import BoPOConfig; from bopo_ray.rllib.runner import GroupEnvRunner\n"
        "from tests.toy import ID\n"
        "pool = resolve_pool('embedded:alfworld', '', '', price_table())\n"
        f"config = BoPOConfig().environment(ID, env_config={{'pool': pool}}).router(value={value})\n"
        "GroupEnvRunner(config=config.debugging(seed=1)).make_module()\n"
        "print([m for m in ('torch', 'transformers', 'torch._dynamo', 'aiohttp', 'sklearn') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[-1] == "['torch']"


def test_episodes_that_end_go_together_while_more_wait_and_at_once_otherwise(runner: GroupEnvRunner) -> None:
    specs = [toy_spec("fetch/1", member=m) for m in range(40)]
    first = runner.exchange("s", specs)
    assert len(first) > 1
    left = 40 - len(first)
    while left:
        left -= len(runner.exchange("s"))
    assert runner.exchange("s") == []


def test_episodes_go_on_while_nobody_asks_and_an_abandoned_one_ends(runner: GroupEnvRunner) -> None:
    left = 12 - len(runner.exchange("s", SPECS[:12]))
    mine = runner._session
    until = time.monotonic() + 60
    while mine.ended.qsize() < left and time.monotonic() < until:
        time.sleep(0.01)
    assert mine.ended.qsize() == left
    runner.exchange("s", [toy_spec("long/1", "random(0.5)", m) for m in range(60)])
    (other,) = runner.exchange("t", SPECS[:1])
    assert other.spec == SPECS[0] and mine.over
    while mine.lanes and time.monotonic() < until:
        time.sleep(0.01)
    assert mine.lanes == 0 and mine.waiting  # the rest is never begun


def test_a_fleet_that_has_enough_goes_on_with_the_rest(runner: GroupEnvRunner) -> None:
    arrived: list[str] = []
    group = SimpleNamespace(num_remote_env_runners=lambda: 0, local_env_runner=runner)
    fleet = Fleet(group, lambda result: arrived.append(result.spec.id))  # type: ignore[arg-type]
    fleet.add(SPECS[:20])
    fleet.play((None, 0, None), lambda: len(arrived) >= 5)
    assert 5 <= len(arrived) < 20
    fleet.add(SPECS[20:24])
    fleet.play((None, 0, None))
    assert sorted(arrived) == sorted(s.id for s in SPECS[:24]) and not fleet.due


def test_learned_choices_do_not_depend_on_what_runs_beside_them(weights: dict[str, Any]) -> None:
    specs = [learned(i, greedy=i % 2 == 0) for i in range(16)]
    one, eight = results(specs, 1, weights), results(specs, 8, weights)
    for key, a in one.items():
        b = eight[key]
        assert isinstance(a, Episode) and isinstance(b, Episode)
        # The last bits of the probabilities may differ with the size of the forward pass; nothing else may.
        p_a, p_b = (np.array([s.probabilities for s in e.steps]) for e in (a, b))
        assert p_a == pytest.approx(p_b, abs=1e-5)
        bare = [tuple(dataclasses.replace(s, probabilities=(), router_s=0.0) for s in e.steps) for e in (a, b)]
        assert bare[0] == bare[1] and (a.stop, a.outcome) == (b.stop, b.outcome)


def test_new_weights_are_taken_when_their_version_is_new(weights: dict[str, Any], runner: GroupEnvRunner) -> None:
    other = {k: np.zeros_like(v) if "head" in k else v for k, v in weights.items()}
    first = {s.probabilities for s in runner.sample([learned()], weights, 1)[0].steps}
    assert first == {s.probabilities for s in runner.sample([learned()], other, 1)[0].steps}  # the same version
    assert {s.probabilities for s in runner.sample([learned()], other, 2)[0].steps} == {(0.5, 0.5)}


def test_large_calls_come_at_the_stated_rate(runner: GroupEnvRunner) -> None:
    episodes = runner.sample([toy_spec("long/1", "random(0.3)", i) for i in range(30)])
    chosen = [s.model for e in episodes for s in e.steps]
    assert {s.probabilities for e in episodes for s in e.steps} == {(0.7, 0.3)} and len(chosen) >= 500
    assert np.mean(chosen) == pytest.approx(0.3, abs=3 * (0.21 / len(chosen)) ** 0.5)
    at_step = [np.mean([e.steps[t].model for e in episodes]) for t in range(15)]
    assert len(set(at_step)) > 1 and all(0 < x < 1 for x in at_step)  # independent per step, not per episode


def test_greedy_takes_the_most_probable_model(runner: GroupEnvRunner) -> None:
    for p, model in ((0.49, 0), (0.51, 1)):
        (episode,) = runner.sample([toy_spec(router=f"random({p})", greedy=True)])
        assert {s.model for s in episode.steps} == {model}
