"""Environment steps that other episodes have made before."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray.errors import EngineError
from bopo_ray.lanes import Lanes
from bopo_ray.recall import NODE_BYTES, RecallEnv, Transcripts
from envs.base import text_space


class Walk(gym.Env[str, str]):
    """What was done so far; "end" ends it. Counts what its engine is asked."""

    max_steps = 6
    drift = 0
    """Of a walk that is not the same each time."""

    def __init__(self) -> None:
        self.observation_space = self.action_space = text_space()
        self.resets = self.steps = 0
        self.moves = -1
        self.fails: list[str] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.resets += 1
        self.said, self.moves = f"{(options or {}).get('task')} {seed}", 0
        return self.said, {"task": self.said, "moves": 0}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self.moves < 0:
            raise gym.error.ResetNeeded("first reset")
        if action in self.fails:
            self.fails.remove(action)
            raise EngineError(action)
        self.steps, self.moves = self.steps + 1, self.moves + 1
        self.said += f" {action}{self.drift or ''}"
        return self.said, 1.0, action == "end", self.moves >= self.max_steps, {"moves": self.moves}


def episode(env: gym.Env[str, str], actions: Sequence[str], task: str = "t", seed: int = 0) -> list[Any]:
    """All that is said, up to the end."""
    said: list[Any] = [env.reset(seed=seed, options={"task": task})]
    for action in actions:
        said.append(env.step(action))
        if said[-1][2] or said[-1][3]:
            break
    return said


def test_an_episode_that_repeats_another_asks_its_engine_nothing() -> None:
    known = Transcripts()
    first, second = (RecallEnv(Walk(), known) for _ in range(2))
    assert episode(first, "abc") == episode(second, "abc") == episode(Walk(), "abc")
    assert (first.unwrapped.resets, first.unwrapped.steps) == (1, 3)  # type: ignore[attr-defined]
    assert (second.unwrapped.resets, second.unwrapped.steps) == (0, 0)  # type: ignore[attr-defined]


def test_at_the_first_new_action_the_engine_is_given_what_it_has_missed() -> None:
    known = Transcripts()
    episode(RecallEnv(Walk(), known), "abcd")
    env = RecallEnv(Walk(), known)
    assert episode(env, "abxcd") == episode(Walk(), "abxcd")
    assert (env.unwrapped.resets, env.unwrapped.steps) == (1, 5)  # type: ignore[attr-defined]
    assert episode(env, "abxce") == episode(Walk(), "abxce")  # its own episode before is known as well
    assert (env.unwrapped.resets, env.unwrapped.steps) == (2, 10)  # type: ignore[attr-defined]


@given(st.lists(st.tuples(st.sampled_from("pq"), st.integers(0, 1), st.text("ab.", max_size=8)), max_size=12))
def test_what_is_said_is_what_the_benchmark_says(plans: list[tuple[str, int, str]]) -> None:
    known = Transcripts(most_bytes=6 * NODE_BYTES)
    envs = [RecallEnv(Walk(), known, "walk") for _ in range(2)]
    for i, (task, seed, letters) in enumerate(plans):
        actions = [{".": "end"}.get(a, a) for a in letters]
        assert episode(envs[i % 2], actions, task, seed) == episode(Walk(), actions, task, seed)


def test_episodes_at_the_same_moment_at_once_ask_one_engine() -> None:
    known, start, said = Transcripts(), threading.Barrier(8), []
    envs = [RecallEnv(Walk(), known) for _ in range(8)]

    def play(env: RecallEnv) -> None:
        start.wait()
        said.append(episode(env, ["a", "b", "end"]))

    threads = [threading.Thread(target=play, args=(env,)) for env in envs]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(s == episode(Walk(), ["a", "b", "end"]) for s in said) and len(said) == 8
    new = 4  # the beginning and three steps: what one engine was asked again, it had missed
    asked = [env.unwrapped.resets + env.unwrapped.steps for env in envs]  # type: ignore[attr-defined]
    assert new <= sum(asked) <= sum(range(1, new + 1))


def test_a_lane_has_on_the_spot_what_is_known_and_gives_way_while_its_engine_is_asked() -> None:
    class Seen(Walk):
        """Notes the threads that it was asked on."""

        def __init__(self) -> None:
            super().__init__()
            self.on: list[int] = []

        def reset(self, **asked: Any) -> tuple[str, dict[str, Any]]:
            self.on.append(threading.get_ident())
            return super().reset(**asked)

        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            self.on.append(threading.get_ident())
            return super().step(action)

    known, lanes = Transcripts(), Lanes(workers=1)
    first, second = (RecallEnv(Seen(), known) for _ in range(2))
    own = lanes.ask(threading.get_ident)
    assert lanes.ask(lambda: episode(first, "ab")) == episode(Walk(), "ab")
    assert len(first.unwrapped.on) == 3 and own not in first.unwrapped.on  # type: ignore[attr-defined]
    turns: list[str] = []
    lanes.ask(lambda: [lanes.start(lambda: turns.append("other")), episode(second, "ab"), turns.append("episode")])
    assert turns == ["episode", "other"] and not second.unwrapped.on  # type: ignore[attr-defined]
    unnamed = RecallEnv(Seen(), known)
    lanes.ask(lambda: (unnamed.reset(seed=1), unnamed.step("a")))
    assert len(unnamed.unwrapped.on) == 2 and own not in unnamed.unwrapped.on  # type: ignore[attr-defined]
    assert lanes.close(10)


def test_what_an_engine_that_failed_did_not_say_is_asked_again() -> None:
    known, walk = Transcripts(), Walk()
    walk.fails = ["b"]
    env = RecallEnv(walk, known)
    with pytest.raises(EngineError, match="b"):
        episode(env, "abc")
    assert episode(env, "abc") == episode(Walk(), "abc")
    assert (walk.resets, walk.steps) == (2, 1 + 3), "the engine had to begin again"


def test_a_benchmark_that_is_not_repeatable_is_found_out_and_may_say_so() -> None:
    known, walk = Transcripts(), Walk()
    episode(RecallEnv(Walk(), known, "walk"), "ab")
    walk.drift = 1
    with pytest.raises(EngineError, match=r"walk: .*another text than before.*repeatable = False"):
        episode(RecallEnv(walk, known, "walk"), "ac")
    assert episode(RecallEnv(walk, known, "walk"), "ac")[-1][0] == "t 0 a1 c1", "nothing is known any more"

    walk.repeatable = False  # type: ignore[attr-defined]
    before = walk.steps
    for _ in range(2):
        episode(RecallEnv(walk, known, "walk"), "ac")
    assert walk.steps == before + 4


def test_an_episode_that_is_over_takes_no_step_and_one_without_a_task_is_not_remembered() -> None:
    known = Transcripts()
    for _ in range(2):
        env = RecallEnv(Walk(), known)
        with pytest.raises(gym.error.ResetNeeded):
            env.step("a")
        episode(env, ["end"])
        with pytest.raises(gym.error.ResetNeeded):
            env.step("a")
    for _ in range(2):
        env = RecallEnv(Walk(), known)
        env.reset(seed=1)
        env.step("a")
        assert (env.unwrapped.resets, env.unwrapped.steps) == (1, 1)  # type: ignore[attr-defined]


def test_memory_is_bounded_by_forgetting_whole_tasks() -> None:
    known = Transcripts(most_bytes=10 * (NODE_BYTES + 20))
    for task in "abcdefgh":
        episode(RecallEnv(Walk(), known), "xyz", task)
    fresh, old = RecallEnv(Walk(), known), RecallEnv(Walk(), known)
    episode(fresh, "xyz", "h")
    episode(old, "xyz", "a")
    assert fresh.unwrapped.steps == 0 and old.unwrapped.steps == 3  # type: ignore[attr-defined]
    assert known._all_bytes == sum(known._bytes.values()) <= 10 * (NODE_BYTES + 20)


def test_actions_and_infos_are_counted_as_texts_are() -> None:
    class Wordy(Walk):
        def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
            return ("", *super().step("a")[1:4], {"plan": "p" * 5000})

    known = Transcripts()
    episode(RecallEnv(Wordy(), known), ["b" * 3000])
    assert 2 * NODE_BYTES + 8000 < known._all_bytes < 2 * NODE_BYTES + 8200
