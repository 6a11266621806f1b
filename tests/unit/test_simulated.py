"""The simulated executors: what holds whatever their competences are tuned to."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bopo_ray.agent import FEEDBACK, parse_action
from bopo_ray.models import load_pool
from bopo_ray.models.pool import ModelSpec
from bopo_ray.models.pricing import Price
from bopo_ray.models.protocol import Message, Request
from bopo_ray.models.simulated import LARGE, SMALL, SimulatedModel, StepKind, read_progress, step_kind, weaker
from bopo_ray.models.tokens import count_tokens
from bopo_ray.routers.prompted import QUESTION

PLAN = ("teleport to kitchen", "pick up cup", "teleport to workshop", "move cup to table")
OK, FAILED = "You do it.", "No known action matches that input."
POOL = load_pool("simulated")


def messages(
    *turns: tuple[str, str], first: str = "This room is called the hallway. In it: a cup"
) -> tuple[Message, ...]:
    """A prompt with (action, observation) turns; an empty action is a reply that holds none."""
    said = [(f"Thought: hm.\nAction: {a}" if a else "Hm.\nHm.", f"Observation: {o}") for a, o in turns]
    pairs = [Message(role, text) for pair in said for role, text in zip(("assistant", "user"), pair, strict=True)]
    return (Message("system", "s"), Message("user", f"Task: t\n\nObservation: {first}"), *pairs)


def request(history: Sequence[Message] = messages(), sample: int = 0, **more: object) -> Request:
    fields: dict[str, object] = {"temperature": 0.7, "max_tokens": 128, "task": "fetch/0", "plan": PLAN} | more
    return Request(tuple(history), sample, **fields)  # type: ignore[arg-type]


def test_a_routers_question_is_answered_more_doubtfully_after_a_failure() -> None:
    def share(newest: str) -> float:
        asked = (Message("system", QUESTION), Message("user", f"task: t\nbudget: b\n| room\n> go | {newest}"))
        replies = [POOL.models[0].complete(request(asked, i)).text for i in range(600)]
        assert set(replies) == {"SMALL", "LARGE"}
        return replies.count("LARGE") / 600

    assert share(OK) == pytest.approx(SMALL.doubt, abs=0.04)
    assert share(FAILED) == pytest.approx(SMALL.doubt_failed, abs=0.06)


WRONG = ("teleport to bathroom", OK)
STEPS = [(a, OK) for a in PLAN]


@pytest.mark.parametrize(
    ("turns", "next_step", "failures", "last", "away"),
    [
        ((), 0, 0, "", ""),
        (STEPS[:1], 1, 0, PLAN[0], ""),
        (STEPS[:3], 3, 0, PLAN[2], ""),
        (STEPS, 4, 0, PLAN[3], ""),  # the plan is finished
        ([(PLAN[0], FAILED)], 0, 1, PLAN[0], ""),  # the right action failed: it has still to be done
        ([("examine air", OK)], 0, 1, "examine air", ""),  # off the plan
        ([("examine air", OK), ("examine air", OK), STEPS[0]], 1, 0, PLAN[0], ""),  # progress forgets the failures
        ([STEPS[0], WRONG], 1, 1, WRONG[0], "kitchen"),  # the room to return to is where the plan had led
        ([WRONG], 0, 1, WRONG[0], "hallway"),  # or where it all began
        ([STEPS[0], WRONG, STEPS[1]], 1, 2, PLAN[1], "kitchen"),  # away from home nothing counts as progress
        ([STEPS[0], WRONG, ("teleport to kitchen", OK)], 1, 0, "teleport to kitchen", ""),  # back
        ([STEPS[0], WRONG, ("teleport to kitchen", OK), STEPS[1]], 2, 0, PLAN[1], ""),
        ([STEPS[0], WRONG, ("teleport to kitchen", FAILED)], 1, 2, "teleport to kitchen", "kitchen"),
        ([STEPS[0], ("teleport to nowhere", FAILED)], 1, 1, "teleport to nowhere", ""),  # did not get there
        ([("", FEEDBACK)], 0, 0, "", ""),  # nothing to repeat yet
        ([STEPS[0], ("", FEEDBACK)], 1, 1, PLAN[0], ""),
        ([("examine air", OK)] * 5, 0, 5, "examine air", ""),
        ([*STEPS, ("wait1", OK), ("wait1", OK)], 4, 2, "wait1", ""),
    ],
)
def test_progress_is_read_off_the_prompt(
    turns: Sequence[tuple[str, str]], next_step: int, failures: int, last: str, away: str
) -> None:
    assert tuple(read_progress(messages(*turns), PLAN)) == (next_step, failures, last, away)


@pytest.mark.parametrize(
    ("first", "home"),
    [
        ("This room is called the art studio. In it, you see:", "art studio"),
        ("You are in the living room", "living room"),
        ("This outside location is called the outside. Here you see:", "outside"),
        ("It is dark.", "hallway"),
    ],
)
def test_the_first_room_is_read_off_the_first_observation(first: str, home: str) -> None:
    assert read_progress(messages(WRONG, first=first), PLAN).away_from == home


def model(**changes: object) -> SimulatedModel:
    """A model that never errs but for `changes`."""
    sure = dataclasses.replace(
        SMALL, slip=dict.fromkeys(StepKind, 0.0), gap=dict.fromkeys(StepKind, 0.0), stuck=0.0, fixation=0.0,
        fixation_growth=0.0, recovery=1.0,
    )  # fmt: skip
    made = SimulatedModel(ModelSpec("simulated:small", Price(1, 1, 1), name="sim"))
    made.competence = dataclasses.replace(sure, **changes)  # type: ignore[arg-type]
    return made


def test_two_sizes_of_the_same_name_share_no_call() -> None:
    pair = [SimulatedModel(ModelSpec(f"simulated:{size}", Price(1, 1, 1), name="sim")) for size in ("small", "large")]
    assert pair[0].name == pair[1].name and pair[0].identity != pair[1].identity


@pytest.mark.parametrize(
    ("turns", "action"),
    [((), PLAN[0]), (STEPS[:3], PLAN[3]), (STEPS, "wait1"), ([STEPS[0], WRONG], "teleport to kitchen"),
     ([("examine air", OK)], PLAN[0])],
)  # fmt: skip
def test_a_model_that_never_errs_follows_the_plan(turns: Sequence[tuple[str, str]], action: str) -> None:
    for sample in range(20):
        reply = model().complete(request(messages(*turns), sample))
        assert parse_action(reply.text) == action
        assert parse_action(reply.text) == reply.text.rpartition("Action: ")[2]


def test_a_model_that_never_recovers_does_not_go_back() -> None:
    actions = {
        parse_action(model(recovery=0.0).complete(request(messages(STEPS[0], WRONG), i)).text) for i in range(20)
    }
    assert actions == {PLAN[1]}


def test_fixation_grows_with_every_further_failure() -> None:
    fixated = model(fixation=0.2, fixation_growth=0.2)
    share = [
        sum(
            parse_action(fixated.complete(request(messages(*[("examine air", OK)] * n), i)).text) == "examine air"
            for i in range(400)
        )
        / 400
        for n in range(1, 8)
    ]
    assert max(share) < 1  # it may always come to its senses
    # 0.2, 0.4, 0.6, 0.8, then the bound 0.97 (from 1.0 and above); 400 draws: three standard errors are < 0.075.
    assert share == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.97, 0.97, 0.97], abs=0.075)


def test_slips_come_at_the_stated_rate_and_unknown_steps_at_the_stuck_rate() -> None:
    def errors(m: SimulatedModel) -> float:
        return sum(parse_action(m.complete(request(sample=i)).text) != PLAN[0] for i in range(600)) / 600

    assert errors(model(slip=dict.fromkeys(StepKind, 0.3))) == pytest.approx(0.3, abs=0.06)  # three standard errors
    unknown = {"gap": dict.fromkeys(StepKind, 1.0), "stuck": 0.9, "slip": dict.fromkeys(StepKind, 0.1)}
    assert errors(model(**unknown)) == pytest.approx(0.9, abs=0.04)


@pytest.mark.parametrize(
    "step", ["teleport to kitchen", "focus on cup", "pick up cup", "use thermometer on soup", "wait1"]
)
def test_an_error_is_never_the_right_step_and_a_wrong_room_is_another_room(step: str) -> None:
    wrong = model(slip=dict.fromkeys(StepKind, 1.0))
    actions = {parse_action(wrong.complete(request(sample=i, plan=(step,))).text) for i in range(150)}
    assert step not in actions and "" in actions and len(actions) > 2
    if step.startswith("teleport"):
        assert all(a.startswith("teleport to ") for a in actions - {""})


@pytest.mark.parametrize("index", [0, 1])
def test_the_same_call_has_the_same_reply_also_in_another_process(index: int) -> None:
    histories = [messages(), messages(("examine air", OK)), messages(*STEPS[:2])]
    calls = [request(h, sample, task=t) for h in histories for sample in range(4) for t in ("fetch/0", "boil/3")]
    texts = [POOL.models[index].complete(c).text for c in calls]
    assert texts == [POOL.models[index].complete(c).text for c in calls]
    assert len(set(texts)) > 1
    code = (
        "import sys, pickle; from bopo_ray.models import load_pool\n"
        f"m = load_pool('simulated').models[{index}]\n"
        "calls = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(pickle.dumps([m.complete(c) for c in calls]))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(calls), env=os.environ | {"PYTHONHASHSEED": "7"},
        capture_output=True, check=True,
    )  # fmt: skip
    assert [r.text for r in pickle.loads(out.stdout)] == texts


def test_the_sample_index_matters_only_at_a_temperature() -> None:
    erring = model(slip=dict.fromkeys(StepKind, 0.5))
    cold = {erring.complete(request(sample=i, temperature=0.0)).text for i in range(30)}
    warm = {erring.complete(request(sample=i, temperature=0.7)).text for i in range(30)}
    assert len(cold) == 1 and len(warm) > 1


def test_replies_depend_on_the_history_and_the_task() -> None:
    erring = model(slip=dict.fromkeys(StepKind, 0.5))
    assert len({erring.complete(request(task=f"fetch/{i}")).text for i in range(30)}) > 1
    assert len({erring.complete(request(messages(first=f"Room {i}"))).text for i in range(30)}) > 1


ROOM = "You are in the middle of a room. Looking quickly around you, you see a bed 1, a desk 2, a desk 1, and a safe 1."


@pytest.mark.parametrize("step", ["go to desk 1", "take pen 2 from desk 1", "heat mug 1 with microwave 1"])
def test_in_alfworld_an_error_is_an_action_of_alfworld(step: str) -> None:
    wrong = model(slip=dict.fromkeys(StepKind, 1.0))
    history = messages(first=ROOM)
    actions = {parse_action(wrong.complete(request(history, i, plan=(step,))).text) for i in range(200)} - {""}
    places = {"bed 1", "desk 1", "desk 2", "safe 1"}
    verb = step.split()[0]
    allowed = {f"{v} {place}" for v in (verb, "examine") for place in places} | {"look"}
    assert actions == ({f"go to {place}" for place in places - {"desk 1"}} if verb == "go" else allowed)


def test_in_alfworld_a_wrong_way_needs_no_way_back() -> None:
    plan = ("go to desk 1", "take pen 2 from desk 1", "go to safe 1")
    turns = [("go to bed 1", "You arrive at bed 1."), ("go to desk 1", "You arrive at desk 1."),
             ("take pen 2 from bed 1", "Nothing happens.")]  # fmt: skip
    progress = read_progress(messages(*turns, first=ROOM), plan)
    assert (progress.next_step, progress.failures, progress.away_from) == (1, 1, "")


CODE = ("me = apis.supervisor.show_profile()", "things = [x for x in text]", "apis.phone.send(message='hi')")


def test_wrong_code_is_never_the_right_one_and_ends_an_episode_only_where_something_would_change() -> None:
    wrong = model(slip=dict.fromkeys(StepKind, 1.0), fatal=0.5)
    done = [(step, "Execution successful.") for step in CODE]
    for k, step in enumerate(CODE):
        said = {parse_action(wrong.complete(request(messages(*done[:k]), i, plan=CODE)).text) for i in range(60)}
        assert step not in said and len(said) > 2
        assert ("apis.supervisor.complete_task()" in said) == (k == 2)


def test_code_that_failed_has_still_to_be_done() -> None:
    turns = [(CODE[0], "Execution failed. Traceback:\nNameError: name 'apis' is not defined")]
    assert tuple(read_progress(messages(*turns), CODE))[:2] == (0, 1)


@pytest.mark.parametrize(
    ("task", "kind", "small", "large"),
    [
        ("pick_heat_then_place_in_recep/Cup-None-Shelf-1-0", StepKind.OPERATE, 0.92, 0.02),
        ("pick_heat_then_place_in_recep/Cup-None-Shelf-1-0", StepKind.TAKE, 0.92, 0.015),
        ("pick_two_obj_and_place/Pen-None-Desk-301-0", StepKind.TAKE, 0.96, 0.96),
        ("shopping-tasks/3", StepKind.MIX, 0.92, 0.03),
        ("note-total/3", StepKind.MIX, 0.12, 0.03),
    ],
)
def test_where_kinds_are_few_the_gaps_are_listed(task: str, kind: StepKind, small: float, large: float) -> None:
    assert [m.error_rate(task, kind) for m in POOL.models] == [small, large]  # type: ignore[attr-defined]


KINDS = [f"kind-{i}" for i in range(40)]


def test_the_small_models_gaps_include_the_large_ones() -> None:
    small, large = POOL.models
    pairs = [(f"{t}/{v}", kind) for t in KINDS for v in range(5) for kind in StepKind]
    known = [(small.knows(*p), large.knows(*p)) for p in pairs]  # type: ignore[attr-defined]
    assert not any(s and not la for s, la in known)
    assert any(la and not s for s, la in known), "then routing would be no problem"


def test_a_better_competence_is_better_in_every_figure() -> None:
    for kind in StepKind:
        assert LARGE.slip[kind] <= SMALL.slip[kind] and LARGE.gap[kind] <= SMALL.gap[kind]
        assert LARGE.gap[kind] * LARGE.variation_gap <= SMALL.gap[kind] * SMALL.variation_gap
    assert LARGE.fixation <= SMALL.fixation and LARGE.recovery >= SMALL.recovery and LARGE.fatal <= SMALL.fatal


@pytest.mark.parametrize("competence", [SMALL, LARGE], ids=["small", "large"])
def test_competences_are_probabilities(competence: object) -> None:
    for field in dataclasses.fields(SMALL):
        value = getattr(competence, field.name)
        for p in value.values() if isinstance(value, dict) else [value]:
            assert 0 <= p <= 1, field.name
        assert not isinstance(value, dict) or set(value) == set(StepKind)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([*PLAN, "", "examine air", WRONG[0]]), st.sampled_from([OK, FAILED])), max_size=8
    ),
    st.integers(0, 50), st.sampled_from([0, 1]), st.integers(1, 40),
)  # fmt: skip
def test_usage_is_what_was_counted_and_stays_within_the_limit(
    turns: list[tuple[str, str]], sample: int, index: int, limit: int
) -> None:
    history, m = messages(*turns), POOL.models[index]
    reply = m.complete(request(history, sample, max_tokens=limit))
    assert reply.usage.prompt_tokens == m.bound(history) == sum(count_tokens(x.content) + 4 for x in history)
    assert reply.usage.completion_tokens == min(limit, count_tokens(reply.text))
    assert reply.usage.cached_tokens == 0 and reply.latency_s == 0.0
    assert reply.text == m.complete(request(history, sample, max_tokens=128)).text


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        ("go to hallway", StepKind.NAVIGATE), ("teleport to kitchen", StepKind.NAVIGATE),
        ("look around", StepKind.LOOK), ("read book", StepKind.LOOK), ("inventory", StepKind.LOOK),
        ("open door", StepKind.OPEN), ("pick up cup", StepKind.TAKE), ("move a to b", StepKind.TAKE),
        ("focus on cup", StepKind.FOCUS), ("use scale on soup", StepKind.MEASURE), ("pour a into b", StepKind.MIX),
        ("activate stove", StepKind.OPERATE), ("deactivate stove", StepKind.OPERATE),
        ("connect a to b", StepKind.OPERATE), ("heat egg 1 with microwave 1", StepKind.OPERATE),
        ("take pen 1 from desk 1", StepKind.TAKE), ("go to desk 1", StepKind.NAVIGATE),
        ("wait1", StepKind.WAIT), ("0", StepKind.WAIT), ("", StepKind.WAIT),
        ("me = apis.supervisor.show_profile()", StepKind.LOOK),
        ('phone = apis.phone.login(username=me["phone_number"])["access_token"]', StepKind.OPEN),
        ('notes = apis.simple_note.search_notes(query="a = b", access_token=t)', StepKind.MEASURE),
        ('small = [r for r in requests if r["amount"] <= 30]', StepKind.MIX),
        ("for t in urgent: apis.todoist.update_task(task_id=t, is_completed=True)", StepKind.OPERATE),
        ("apis.supervisor.complete_task(answer=answer)", StepKind.FOCUS),
    ],
)  # fmt: skip
def test_the_kind_of_a_step_is_its_verbs(action: str, kind: StepKind) -> None:
    assert step_kind(action) is kind


@pytest.mark.parametrize("name", ["simulated", "simulated-llama"])
def test_the_pools_are_labelled_simulated(name: str) -> None:
    pool = load_pool(name)
    assert pool.label == "simulated" and "Simulated" in pool.note and pool.needs_plan and len(pool) == 2
    assert pool.models[0].price.input < pool.models[1].price.input
    assert ("Llama-3.1-8B / Llama-3.1-70B" if "llama" in name else "GPT-4.1-mini / GPT-4.1") in pool.note


def test_the_second_pair_errs_more_often_and_the_larger_models_gaps_are_among_the_smallers() -> None:
    small, large = POOL.models
    weak_small, weak_large = load_pool("simulated-llama").models
    models = (small, large, weak_small, weak_large)
    assert all(isinstance(m, SimulatedModel) for m in models)
    tasks = [f"{kind}/{i}" for kind in ("boil", "pick_two_obj_and_place", "note-total") for i in range(100)]
    rates = np.array([[m.error_rate(t, k) for t in tasks for k in StepKind] for m in models])  # type: ignore[attr-defined]
    assert (rates[2] >= rates[0]).all() and (rates[3] >= rates[1]).all() and rates.max() <= 1
    assert (rates[2] >= rates[3]).all(), "what the large one can't do the small one can't"
    stuck = (rates >= SMALL.stuck).mean(axis=1)
    assert stuck[2] > stuck[0] + 0.1 and stuck[1] < stuck[3] < stuck[2]


def test_a_weaker_model_by_hand() -> None:
    weak = weaker(SMALL, slips=20, unsure=0.5)
    assert weak.slip[StepKind.LOOK] == 0.4 and weak.slip[StepKind.NAVIGATE] == 1.0  # 20 times 2% and 6%
    assert dataclasses.replace(weak, slip=SMALL.slip, unsure=0.0) == SMALL
