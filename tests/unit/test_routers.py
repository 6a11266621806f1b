"""The baselines: schedules by table, the others by small histories and lessons; and every name's one line."""

from __future__ import annotations

import dataclasses
import pickle

import pytest

from bopo_ray.agent import FEEDBACK, Turn, read_view, router_view
from bopo_ray.errors import ConfigError
from bopo_ray.records import CostMode, Difficulty, Episode, EpisodeSpec, Phase, Step, StopReason
from bopo_ray.routers import (
    ALWAYS_LARGE,
    ALWAYS_SMALL,
    Kind,
    Lesson,
    Moment,
    Router,
    RouterName,
    fixed_router,
    oracle,
    parse_router,
)
from bopo_ray.routers.prompted import QUESTION
from envs.base import Split, Task


@pytest.mark.parametrize(
    ("name", "step", "n", "probabilities"),
    [
        (ALWAYS_SMALL, 0, 2, (1, 0)), (ALWAYS_SMALL, 9, 3, (1, 0, 0)),
        (ALWAYS_LARGE, 0, 2, (0, 1)), (ALWAYS_LARGE, 9, 3, (0, 0, 1)),
        ("random(0)", 0, 2, (1, 0)), ("random(1)", 0, 2, (0, 1)), ("random(0.25)", 5, 2, (0.75, 0.25)),
        ("random(2.5e-1)", 0, 3, (0.75, 0, 0.25)),
        ("first-large(0)", 0, 2, (1, 0)),
        ("first-large(3)", 0, 2, (0, 1)), ("first-large(3)", 2, 2, (0, 1)), ("first-large(3)", 3, 2, (1, 0)),
        ("first-large(1)", 0, 3, (0, 0, 1)),
        (ALWAYS_SMALL, 0, 1, (1,)), (ALWAYS_LARGE, 0, 1, (1,)), ("random(0.25)", 0, 1, (1,)),
    ],
)  # fmt: skip
def test_what_each_router_chooses(name: str, step: int, n: int, probabilities: tuple[float, ...]) -> None:
    assert fixed_router(name)(Moment("any view", step, n)) == probabilities


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("random(1.1)", r"'random\(1\.1\)': 1\.1 is not a probability in \[0, 1\]; set it with --router random:p"),
        ("random(-0.1)", r"-0\.1 is not a probability"),
        ("random:1-1", "1-1 is not a probability"),
        ("random:nan", "nan is not a probability"),
        ("random", r"'random' lacks its argument: need random:p with p a probability in \[0, 1\], "
                   "e.g. --router random:0.3"),
        ("random()", r"'random\(\)' lacks its argument: need random:p"),
        ("first-large", "need first-large:K with K a whole number of steps >= 0, e.g. --router first-large:5"),
        ("last-large:", "need last-large:K with K a whole number of steps >= 0, e.g. --router last-large:5"),
        ("cascade:", "'cascade:' lacks its argument: need cascade:m with m a whole number of steps >= 1, "
                     "e.g. --router cascade:3"),
        ("first-large(1.5)", "1.5 is not a whole number of steps >= 0"),
        ("first-large(-1)", "-1 is not a whole number"),
        ("first-large(1e999)", "1e999 is not a whole number"),
        ("last-large:x", "x is not a whole number of steps >= 0; set it with --router last-large:K"),
        ("cascade:0", "0 is not a whole number of steps >= 1; set it with --router cascade:m"),
        ("task-knn:0", "0 is not a whole number of neighbours >= 1"),
        ("oracle:1", "oracle takes no argument; leave '1' out"),
    ],
)  # fmt: skip
def test_a_bad_argument_names_the_rule(name: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as error:
        parse_router(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "small", "Random(0.5)", "learned", "nobody(3)", "random(0.5", "cascade(3)4"])
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ConfigError,
        match=r"unknown router .*; known: always-small, always-large, random:p, first-large:K, .*cascade\[:m\]",
    ):
        parse_router(name)


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        ("cascade:3", "cascade(3)", Kind.FIXED), ("cascade(3)", "cascade(3)", Kind.FIXED),
        ("cascade", "cascade(3)", Kind.FIXED), (" random:2.5e-1 ", "random(0.25)", Kind.FIXED),
        ("task-level", "task-level(0.5)", Kind.TRAINED), ("oracle", "oracle", Kind.CHOSEN),
        ("bosft", "bosft", Kind.POLICY),
    ],
)  # fmt: skip
def test_one_name_however_it_is_written(text: str, name: str, kind: Kind) -> None:
    parsed = parse_router(text)
    assert (str(parsed), parsed.kind) == (name, kind)
    assert parse_router(str(parsed)) == parsed


@pytest.mark.parametrize("name", ["task-level", "task-knn:3", "one-step", "oracle", "best-schedule", "bosft"])
def test_a_name_alone_does_not_make_a_trained_router(name: str) -> None:
    with pytest.raises(ConfigError, match="made by a run's evaluation; ask for it with --router"):
        fixed_router(name)


def moment(*history: tuple[str, str], steps_left: int = 9, task: str = "boil water") -> Moment:
    """After these steps, as the environment words it."""
    turns = [Turn("", action, observation) for action, observation in history]
    return Moment(router_view(task, "a room", turns, steps_left, "unlimited"), len(turns), 2)


def large(router: Router, at: Moment) -> bool:
    probabilities = router(at)
    assert probabilities in ((1.0, 0.0), (0.0, 1.0))
    return probabilities == (0.0, 1.0)


def test_a_view_is_read_back() -> None:
    turns = [Turn("r", "open\n door", "It is  open."), Turn("r", "", FEEDBACK)]
    seen = read_view(router_view("boil\nwater", "a | room", turns, 7, "$0.0100"))
    assert seen == ("boil water", 7, (("open door", "It is open."), ("(no action)", FEEDBACK)))


def test_last_large_waits_for_the_last_steps() -> None:
    router = fixed_router("last-large:3")
    assert [large(router, moment(steps_left=left)) for left in (20, 4, 3, 1)] == [False, False, True, True]
    assert not large(fixed_router("last-large:0"), moment(steps_left=1))


GOOD = [("go north", "You are in a hall."), ("open door", "It is open."), ("go in", "A kitchen.")]


@pytest.mark.parametrize(
    "failed",
    [
        ("fly", "No known action matches that input."), ("take cup", "Nothing happens."), ("", FEEDBACK),
        ("print(x)", "Execution failed. Traceback: NameError"),
        ("go in", "You bump into the cook."),  # the same action again
        ("go north", "You are in a hall."),  # the same action had the same answer before
    ],
)  # fmt: skip
def test_the_cascade_takes_large_for_m_steps_after_a_failure(failed: tuple[str, str]) -> None:
    router = fixed_router("cascade:2")
    assert not large(router, moment()) and not large(router, moment(*GOOD))
    after = [("wait", "Steam."), ("take lid", "You have it.")]
    for n, wanted in ((0, True), (1, True), (2, False)):
        assert large(router, moment(*GOOD, failed, *after[:n])) is wanted


@pytest.mark.parametrize(
    ("reply", "chosen"),
    [
        ("LARGE", True), ("small", False), ("Large.", True), ("SMALL is cheap, but this is hard: LARGE", True),
        ("Not LARGE: SMALL", False), ("", False), ("enlarge", False), ("Action: look around", False),
    ],
)  # fmt: skip
def test_the_prompted_router_reads_the_last_of_the_two_words(reply: str, chosen: bool) -> None:
    asked = []
    at = dataclasses.replace(moment(*GOOD), ask=lambda question: asked.append(question) or reply)
    assert large(fixed_router("prompted"), at) is chosen
    assert asked == [QUESTION] and QUESTION.endswith("Answer with one word, SMALL or LARGE.")
    with pytest.raises(RuntimeError, match="asks a model"):
        fixed_router("prompted")(moment())


def test_the_same_answer_to_another_action_is_no_failure() -> None:
    ran = [(f"x{i} = {i}", "Execution successful.") for i in range(4)]
    assert not large(fixed_router("cascade:3"), moment(*ran))
    assert not large(fixed_router("cascade:3"), moment(*GOOD, ("go north", "You are on a hill.")))


def lesson(text: str, difficulty: Difficulty, small: Episode, large_: Episode) -> Lesson:
    return Lesson(text, difficulty, (small, large_))


def lessons() -> list[Lesson]:
    """Boiling is Hard, looking is Easy; SMALL fails to use the stove, LARGE never fails."""
    found = []
    for i in range(6):
        for text, difficulty in ((f"boil water {i}", Difficulty.HARD), (f"look at stone {i}", Difficulty.EASY)):
            episodes = []
            for model in (0, 1):
                bad = model == 0 and difficulty is Difficulty.HARD
                steps = [
                    step(model, f"walk to stove {i}", "A stove."),
                    step(model, f"use stove {i}", "Nothing happens." if bad else "It is hot."),
                ]
                episodes.append(episode(text, steps))
            found.append(lesson(text, difficulty, *episodes))
    return found


def step(model: int, action: str, observation: str, cost: int = 10) -> Step:
    return Step(model, (1.0, 0.0), (True, True), "r", action, observation, 5, 0, 1, cost, 0, 0.0, 0.0)


def episode(text: str, steps: list[Step], task: str = "t/0", success: bool = True, policy: str = "p") -> Episode:
    spec = EpisodeSpec(Task("E", task, Split.TRAIN), Phase.EVALUATION, policy, 0, 0, 0)
    return Episode(spec, text, "a room", 10, tuple(steps), float(success), success, 0.0, StopReason.STEP_LIMIT)


@pytest.mark.parametrize("name", ["task-level", "task-knn:3"])
def test_the_task_level_routers_decide_once_by_the_tasks_words(name: str) -> None:
    router = parse_router(name).make(lessons())
    for history in ((), GOOD):
        assert large(router, moment(*history, task="boil water 9"))
        assert not large(router, moment(*history, task="look at stone 9"))
    again = pickle.loads(pickle.dumps(router))
    assert large(again, moment(task="boil water 9")), "it travels to the runners"


def test_the_threshold_and_labels_of_one_kind() -> None:
    assert not large(RouterName("task-level", 1.0).make(lessons()), moment(task="boil water 9"))
    assert large(RouterName("task-level", 0.0).make(lessons()), moment(task="look at stone 9"))
    easy = [x for x in lessons() if x.difficulty is Difficulty.EASY]
    for name in ("task-level", "task-knn:50", "one-step"):
        assert not large(parse_router(name).make(easy), moment(task="boil water 9"))


def test_the_one_step_preference_takes_large_where_the_next_small_step_fails() -> None:
    router = parse_router("one-step:0.3").make(lessons())
    assert large(router, moment(("walk to stove 2", "A stove."), task="boil water 2"))
    assert not large(router, moment(task="boil water 2")), "walking there works: what comes later does not count"
    assert not large(router, moment(("walk to stove 2", "A stove."), task="look at stone 2"))


def test_the_oracle_plays_the_cheapest_success_or_else_the_cheapest_failure() -> None:
    def played(task: str, success: bool, *models: int) -> Episode:
        steps = [step(m, "a", "b", 10 + 90 * m) for m in models]
        return episode("x", steps, task, success, policy=f"{models}")

    router = oracle([
        played("t/0", True, 1, 1), played("t/0", True, 0, 1, 0), played("t/0", False, 0), played("t/1", False, 1),
        played("t/1", False, 0, 0, 0),
    ])  # fmt: skip
    assert router.choices == {("t/0", 0): (0, 1, 0), ("t/1", 0): (0, 0, 0)}
    assert router(Moment("", 1, 2, "t/0", 0)) == (0.0, 1.0)
    steps = [step(0, "a", "b", 500)]
    dear = episode("y", steps, "t/0", True, policy="a small model that is dearer here")
    played_0 = [played("t/0", True, 1, 1), dear]
    assert oracle(played_0).choices == {("t/0", 0): (1, 1)}
    assert oracle(played_0, CostMode.CALLS).choices == {("t/0", 0): (0,)}
    assert router(Moment("", 7, 2, "t/0", 0)) == router(Moment("", 0, 2, "t/9", 3)) == (1.0, 0.0)
