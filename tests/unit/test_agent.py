"""The harness: replies to actions, histories to prompts and router views."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.agent import (
    DROPPED,
    FEEDBACK,
    MAX_ACTION_CHARS,
    MAX_CODE_CHARS,
    Turn,
    budget_text,
    chat_messages,
    episode_views,
    parse_action,
    parse_code,
    router_view,
)
from bopo_ray.models.protocol import Message
from bopo_ray.records import Budget, CostMode
from tests.toy import play, routing_env, scripted_pool, toy_spec


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("Thought: I look.\nAction: look around", "look around"),
        ("action: look around", "look around"),
        ("ACTION : look around", "look around"),
        ("Action = look around", "look around"),
        ("Action 1: look around", "look around"),
        ("Action1: look around", "look around"),
        ("**Action:** look around", "look around"),
        ("**Action**: look around", "look around"),
        ("**Action: look around**", "look around"),
        ("### Action: look around", "look around"),
        ("> - Action: look around", "look around"),
        ("Action: `look around`", "look around"),
        ('Action: "look around".', "look around"),
        ("Action: look   around\r\n", "look around"),
        ("Action: look around.\r\n", "look around"),
        ("Action:\nlook around", "look around"),
        ("Action:\n```\nlook around\n```", "look around"),
        ("```\nThought: I look.\nAction: look around\n```", "look around"),
        ("```text\nlook around\n```", "look around"),
        ("Action: look\nObservation: a cup\nAction: pick up cup", "pick up cup"),  # several: the last
        ("Action: look\nAction:", "look"),  # cut off after the label: the last that says something
        ("Action:\nAction: look", "look"),
        ("Action: focus on a: b", "focus on a: b"),
        ("look around", "look around"),
        ("\n\n  look around  \n", "look around"),
        ("", ""),
        ("  \n\n", ""),
        ("```\n```", ""),
        ("Action:", ""),
        ("Action:\nThought: I wonder.", ""),
        ("Thought: I only think.", ""),
        ("I think.\nLet me think about it some more.", ""),
        ("Transaction: pay", ""),
        ("Actions: look", ""),
        ("The next\nAction is to look", ""),
    ],
)
def test_actions_are_read_from_what_models_write(reply: str, action: str) -> None:
    assert parse_action(reply) == action


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("Thought: I look.\nAction: print(1)", "print(1)"),
        ('Action: x = "a"', 'x = "a"'),  # quotes and dots at the end stay
        ("Action: x = 1.", "x = 1."),
        ("Action: x = 'a  b'", "x = 'a  b'"),
        ("**Action:** print('a')", "print('a')"),
        ("Action 1: `print(1)`", "print(1)"),
        ("Action: ```print(1)```", "print(1)"),
        ("Action: print('`')", "print('`')"),
        ("Action:\n```python\nfor i in x:\n    print(i)\n```\nThat is it.", "for i in x:\n    print(i)"),
        ("Action: ```python\nprint(1)\n```", "print(1)"),
        ("Action: for i in x:\n    print(i)", "for i in x:\n    print(i)"),
        ("Action:\n    x = 1\n\n    y = 2", "x = 1\ny = 2"),
        ("Thought: so\n```python\nprint(1)\n```", "print(1)"),
        ("```\nprint(1)", "print(1)"),  # cut off
        ("print(1)", "print(1)"),
        ("Action: a()\nObservation: 3\nAction: b()", "b()"),
        ("Action: a()  # c: d\nObservation: 3", "a()  # c: d"),
        ("Action: a()\nThought: and then", "a()"),
        ("Thought: I only think.", ""),
        ("Thought: hm\nAction:", ""),
        ("I think.\nLet me think about it some more.", ""),
        ("", ""),
        ("```\n```", ""),
    ],
)
def test_code_is_read_from_what_models_write(reply: str, code: str) -> None:
    assert parse_code(reply) == code


@given(st.text(max_size=300))
def test_code_is_bounded_whatever_the_reply(reply: str) -> None:
    for text in (reply, f"Action: {reply}", f"```\n{reply}\n```"):
        assert len(parse_code(text)) <= MAX_CODE_CHARS


@given(st.text(max_size=300))
def test_an_action_is_one_short_line_whatever_the_reply(reply: str) -> None:
    for text in (reply, f"Action: {reply}"):
        action = parse_action(text)
        assert len(action) <= MAX_ACTION_CHARS and action == " ".join(action.split(" "))
        assert not action.splitlines()[1:]


@pytest.mark.parametrize(
    "hostile",
    ["\n" * 200_000, "action" + " " * 200_000, "#" * 200_000, "action " * 30_000, "action1" + "1" * 200_000,
     "Action:" + "*" * 200_000, "Action: " + "look " * 40_000, "`" * 200_000, " " * 200_000 + "```", ":\n" * 100_000],
    ids=lambda text: f"{text[:9]!r}...",
)  # fmt: skip
def test_a_hostile_reply_takes_no_time(hostile: str) -> None:
    started = time.process_time()
    assert len(parse_action(hostile)) <= MAX_ACTION_CHARS
    assert time.process_time() - started < 2.0  # a quadratic pattern takes minutes on these


def words(messages: tuple[Message, ...]) -> int:
    return sum(len(m.content.split()) for m in messages)


def test_the_prompt_of_a_short_history() -> None:
    turns = [Turn("Thought: a\nAction: look", "look", "You see a cup.")]
    messages = chat_messages("Find the cup.", "A hall.", turns, "Be brief.", 10_000, words)
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]
    assert "Be brief." in messages[0].content
    assert messages[1].content == "Task: Find the cup.\n\nObservation: A hall."
    assert messages[2].content == turns[0].reply and messages[3].content == "Observation: You see a cup."


def test_the_oldest_observations_go_first() -> None:
    # Each observation message has 11 words ("Observation:" and 10), its replacement 3: dropping one saves 8.
    turns = [Turn(f"Action: a{i}", f"a{i}", " ".join([f"o{i}"] * 10)) for i in range(4)]
    full = words(chat_messages("t", "f", turns, "", 10_000, words))

    def kept(limit: int) -> list[int]:
        observations = chat_messages("t", "f", turns, "", limit, words)[3::2]
        return [i for i, m in enumerate(observations) if m.content != DROPPED]

    assert kept(full) == [0, 1, 2, 3]
    assert kept(full - 1) == kept(full - 8) == [1, 2, 3]
    assert kept(full - 9) == kept(full - 16) == [2, 3]
    assert kept(full - 17) == kept(0) == [3]  # the newest stays even when the limit can't be met


def test_an_observation_shorter_than_its_replacement_stays() -> None:
    turns = [Turn("Action: a", "a", "Ok."), Turn("Action: b", "b", "word " * 20), Turn("Action: c", "c", "Ok.")]
    full = words(chat_messages("t", "f", turns, "", 10_000, words))
    messages = chat_messages("t", "f", turns, "", full - 1, words)
    assert [m.content for m in messages[3::2]] == ["Observation: Ok.", DROPPED, "Observation: Ok."]


@given(st.lists(st.integers(0, 30), max_size=8), st.integers(0, 400))
def test_prompts_fit_when_they_can(lengths: list[int], limit: int) -> None:
    turns = [Turn(f"Action: a{i}", f"a{i}", f"o{i} " * n) for i, n in enumerate(lengths)]
    messages = chat_messages("THE TASK", "first", turns, "", limit, words)
    full = chat_messages("THE TASK", "first", turns, "", 10**6, words)
    assert len(messages) == len(full) and "THE TASK" in messages[1].content
    assert messages[:2] == full[:2] and messages[2::2] == full[2::2] and messages[-1] == full[-1]
    # Observation i is 1 + n words long and 3 when dropped; only those before the newest may go.
    least = words(full) - sum(max(0, 1 + n - 3) for n in lengths[:-1])
    assert words(messages) <= max(limit, least)
    dropped = [m.content == DROPPED for m in messages[3::2]]
    droppable = [i for i, n in enumerate(lengths[:-1]) if 1 + n > 3]
    assert [i for i, d in enumerate(dropped) if d] == droppable[: sum(dropped)]  # oldest first
    if dropped and any(dropped):  # and no more than it takes
        last = droppable[sum(dropped) - 1]
        assert words(messages) + 1 + lengths[last] - 3 > limit


def test_the_layout_of_the_routers_view() -> None:
    turns = [Turn("Thought: x\nAction: look", "look", "You see\n\ta  cup."), Turn("hm", "", FEEDBACK)]
    assert router_view("Find\nthe cup.", "A hall.\n", turns, 18, "unlimited").split("\n") == [
        "task: Find the cup.",
        "budget: unlimited; steps left 18",
        "| A hall.",
        "> look | You see a cup.",
        f"> (no action) | {FEEDBACK}",
    ]


@pytest.mark.parametrize(
    ("budget", "spent", "text"),
    [
        (None, 99, "unlimited"),
        (Budget(CostMode.CALLS, 5), 2, "3 large calls"),
        (Budget(CostMode.CALLS, 5), 5, "0 large calls"),
        (Budget(CostMode.USD, 20_000), 7_660, "$0.0123"),  # 12,340 micro-dollars = $0.01234
        (Budget(CostMode.USD, 1_500_000), 0, "$1.5000"),
    ],
)
def test_the_remaining_budget_in_words(budget: Budget | None, spent: int, text: str) -> None:
    assert budget_text(budget, spent) == text


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["fetch/1", "measure/2", "mix/3"]),
    st.integers(0, 5),
    st.none() | st.builds(Budget, st.just(CostMode.CALLS), st.integers(0, 6))
    | st.builds(Budget, st.just(CostMode.USD), st.integers(0, 30_000)),
)  # fmt: skip
def test_views_are_rebuilt_as_the_router_saw_them(task: str, member: int, budget: Budget | None) -> None:
    episode, seen = play(toy_spec(task, member=member, budget=budget))
    assert episode_views(episode) == seen


def test_views_are_rebuilt_for_replies_without_an_action() -> None:
    env = routing_env(scripted_pool(["Hm.\nHm.", "Action: teleport to kitchen", "Well:\nno"]), max_steps=4)
    episode, seen = play(toy_spec(budget=Budget(CostMode.USD, 10**6)), env)
    assert [s.action for s in episode.steps] == ["", "teleport to kitchen", "", ""]
    assert episode_views(episode) == seen and "(no action)" in seen[-1]
