"""A saved router outside of a run: what it decides, what it refuses, and what damaged folders come to."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]

import bopo_ray
from bopo_ray import Budget, ConfigError, CostMode, History, SavedRouter, StoreError, load_router
from bopo_ray.agent import episode_views
from bopo_ray.errors import ConfigError as SameConfigError
from bopo_ray.models import load_pool
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.models.protocol import ModelPool
from bopo_ray.pipeline.stages import load_policy
from bopo_ray.records import Episode
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.encode import encode_view
from bopo_ray.rllib.router_module import RouterModule
from bopo_ray.rllib.runner import GroupEnvRunner
from bopo_ray.rllib.saved import ARGUMENTS, METADATA, ROUTER_FILE, WEIGHTS, acting_module
from bopo_ray.routers import LEARNED
from bopo_ray.routers.decision import decide
from tests.replay import agree
from tests.toy import ID, play, toy_spec

HISTORY = History("Boil water.", "A kitchen.", 20, [("look", "A stove."), ("", "No action.")])
CONTEXT = 80


def make_router(n_models: int, context: int = CONTEXT) -> RouterModule:
    """A small one whose policy, average and reference differ, and which is not indifferent."""
    torch.manual_seed(n_models)
    ids = gym.spaces.Box(0, np.iinfo(np.int32).max, (context,), np.int32)
    shape = {"width": 16, "layers": 1, "heads": 2, "context": context}
    module = RouterModule(observation_space=ids, action_space=gym.spaces.Discrete(n_models), model_config=shape)
    with torch.no_grad():
        for part in (module.policy, module.average, module.reference):
            part.head.weight.normal_(0, 0.3)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved router over three models. Tests must leave it as it is."""
    path = tmp_path_factory.mktemp("saved") / "policies" / "bosft"
    make_router(3).save_to_path(str(path))
    return path


@pytest.fixture(scope="module")
def router(folder: Path) -> SavedRouter:
    return load_router(folder)


# -- decisions --------------------------------------------------------------------------------------------------------


def test_it_acts_with_the_averaged_weights(router: SavedRouter) -> None:
    saved = make_router(3)
    episode, _ = play(toy_spec("mix/1"))
    history = History(episode.task_text, episode.first_observation, episode.max_steps)
    views = episode_views(episode)
    assert len(views) > 3
    for view, step in zip(views, episode.steps, strict=True):
        with torch.inference_mode():
            logits = saved.average(torch.from_numpy(encode_view(view, CONTEXT)[None]))
        wanted = torch.softmax(logits, -1)[0].tolist()
        decision = router.decide(history)
        assert decision.probabilities == pytest.approx(wanted, abs=1e-6)
        assert decision.model == int(np.argmax(wanted)) and router.decide(history) == decision
        history = history.after(step.action, step.observation)
    assert router.n_models == 3 and history.steps_left == episode.max_steps - len(views)


@pytest.mark.parametrize(
    ("limit", "calls", "cap"), [(None, None, None), (3, None, 3), (None, 2, 2), (3, 2, 2), (3, 9, 3)]
)
def test_an_episode_counts_its_steps_and_large_calls(
    router: SavedRouter, limit: int | None, calls: int | None, cap: int | None
) -> None:
    """As one who counts by hand: the limit of the router and the cap of the caller, the lesser first."""
    models = [{"name": n} for n in ("tiny", "small", "large")]
    own = SavedRouter(router._module, {"models": models, "max_steps": 20, "how": {"call_limit": limit}})
    assert (own.models, own.max_steps, own.call_limit) == (("tiny", "small", "large"), 20, limit)
    for seed in (None, 7):
        episode, history, left = own.begin("Boil water.", "A kitchen.", calls=calls, seed=seed), None, cap
        history = History("Boil water.", "A kitchen.", 20)
        for i in range(20):
            assert episode.steps_left == 20 - i and (episode.budget and episode.budget.cap) == left
            decision = episode.decide()
            wanted = router.decide(history, None if left is None else Budget(CostMode.CALLS, left), seed=seed)
            assert decision == wanted
            wrote = None if i % 2 else 0 if left == 0 else 2  # every other call is another one's than was decided
            episode.after(f"look {i}", "A stove.", wrote)
            history = history.after(f"look {i}", "A stove.")
            model = decision.model if wrote is None else wrote
            left = left if left is None or model == 0 else left - 1
        with pytest.raises(ConfigError, match="steps_left"):
            episode.after("look", "A cup.", 0)


def test_an_episode_refuses(router: SavedRouter) -> None:
    with pytest.raises(ConfigError, match=r"max_steps=None: .* does not say"):
        router.begin("boil", "")
    with pytest.raises(ConfigError, match=r"calls=-1: need a whole number"):
        router.begin("boil", "", max_steps=3, calls=-1)
    episode = router.begin("boil", "", max_steps=3, calls=0)
    assert router.models == ("0", "1", "2") and episode.decide(mask=(True, False, True)).model == 0
    for wrong in (3, -1, True, "0"):
        with pytest.raises(ConfigError, match=r"model=.*: need one of 0 to 2, or decide\(\) before"):
            episode.after("look", "A cup.", wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model=2: no large call is left"):
        episode.after("look", "A cup.", 2)
    episode.after("look", "A cup.")
    with pytest.raises(ConfigError, match="model=None: need one of"):
        episode.after("look", "A cup.")  # nothing was decided since


def test_it_pickles(router: SavedRouter) -> None:
    assert pickle.loads(pickle.dumps(router)).decide(HISTORY) == router.decide(HISTORY)


def test_what_is_left_of_the_budget_is_seen_and_kept(router: SavedRouter) -> None:
    free, ten, none = (router.decide(HISTORY, b) for b in (None, *(Budget(CostMode.CALLS, n) for n in (10, 0))))
    assert free.probabilities != pytest.approx(ten.probabilities) and all(ten.probabilities)
    assert (none.model, none.probabilities) == (0, (1.0, 0.0, 0.0))
    dollars = router.decide(HISTORY, Budget(CostMode.USD, 0))
    assert all(dollars.probabilities), "only the caller knows what a call may cost"
    assert router.decide(HISTORY, Budget(CostMode.USD, 0), mask=(True, False, False)).model == 0


@settings(deadline=None)
@given(mask=st.lists(st.booleans(), min_size=3, max_size=3).filter(any), seed=st.none() | st.integers(-(2**70), 2**70))
def test_a_masked_model_is_never_chosen(router: SavedRouter, mask: list[bool], seed: int | None) -> None:
    free, decision = router.decide(HISTORY), router.decide(HISTORY, mask=np.array(mask), seed=seed)
    assert mask[decision.model] and sum(decision.probabilities) == pytest.approx(1)
    kept = sum(p for p, allowed in zip(free.probabilities, mask, strict=True) if allowed)
    wanted = [p / kept * allowed for p, allowed in zip(free.probabilities, mask, strict=True)]
    assert decision.probabilities == pytest.approx(wanted)
    if seed is None:
        assert decision.model == int(np.argmax(wanted))


def test_a_seed_samples_each_step_anew_and_again_alike(router: SavedRouter) -> None:
    chosen = [router.decide(HISTORY, seed=seed).model for seed in range(300)]
    assert chosen[:20] == [router.decide(HISTORY, seed=seed).model for seed in range(20)]
    shares = np.bincount(chosen, minlength=3) / 300
    assert shares == pytest.approx(router.decide(HISTORY).probabilities, abs=0.1)
    later = [router.decide(HISTORY.after("wait", "Time passes."), seed=seed).model for seed in range(50)]
    assert later != chosen[:50]


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("budget", [None, Budget(CostMode.CALLS, 2), Budget(CostMode.USD, 6000)])
def test_it_decides_as_a_runner_does(greedy: bool, budget: Budget | None, tmp_path: Path) -> None:
    make_router(2).save_to_path(str(tmp_path / "router"))
    config = BoPOConfig().environment(ID, env_config={"pool": resolve_pool("simulated", "", "", price_table())})
    runner = GroupEnvRunner(config=config.router(width=16, layers=1, heads=2, context=CONTEXT))
    specs = [toy_spec(f"{kind}/1", LEARNED, greedy=greedy, budget=budget) for kind in ("mix", "measure", "fetch")]
    try:
        episodes = runner.sample(specs, acting_module(tmp_path / "router").get_state())
    finally:
        runner.stop()
    assert all(isinstance(e, Episode) for e in episodes)
    played = [e for e in episodes if isinstance(e, Episode)]
    steps = [s for e in played for s in e.steps]
    assert all(all(s.mask) for s in steps) == (budget is None) and {s.model for s in steps} == {0, 1}
    assert sum(agree(load_router(tmp_path / "router"), e) for e in played) == len(steps) > 6


@pytest.mark.parametrize(
    ("probabilities", "mask", "draw", "model", "after"),
    [
        ((0.2, 0.5, 0.3), (True, True, True), None, 1, (0.2, 0.5, 0.3)),
        ((0.2, 0.5, 0.3), (True, False, True), None, 2, (0.4, 0, 0.6)),
        ((0.5, 0.5), (True, True), None, 0, (0.5, 0.5)),
        ((0.25, 0.5, 0.25), (True, True, True), 0.0, 0, (0.25, 0.5, 0.25)),
        ((0.25, 0.5, 0.25), (True, True, True), 0.25, 1, (0.25, 0.5, 0.25)),
        ((0.25, 0.5, 0.25), (True, True, True), 0.75, 2, (0.25, 0.5, 0.25)),
        ((0.25, 0.5, 0.25), (True, True, False), 1.0, 1, (1 / 3, 2 / 3, 0)),
        ((0.0, 1.0), (True, False), None, 0, (1, 0)),
        # what is left has nothing: the largest up to the one that is wanted, else the first, and no coin is tossed
        *(((0.0, 0.0, 1.0), (True, True, False), draw, 1, (0, 1, 0)) for draw in (None, 0.1, 0.9)),
        ((0.0, 0.0, 0.0, 1.0), (True, False, True, False), 0.1, 2, (0, 0, 1, 0)),
        ((0.0, 1.0, 0.0, 0.0), (True, False, False, True), 0.9, 0, (1, 0, 0, 0)),
        ((1.0, 0.0, 0.0), (False, True, True), 0.9, 1, (0, 1, 0)),
        # nothing is known
        ((math.nan, math.nan, math.nan), (True, True, False), 0.9, 1, (0.5, 0.5, 0)),
        ((math.nan, 0.0, 0.0), (False, True, True), 0.9, 2, (0, 0.5, 0.5)),
        ((0.5, 0.5), (False, False), None, 0, (0, 0)),
        ((0.5, 0.5), (False, False), 0.5, 0, (0, 0)),
    ],
)  # fmt: skip
def test_mask_and_choice_by_hand(
    probabilities: tuple[float, ...], mask: tuple[bool, ...], draw: float | None, model: int, after: tuple[float, ...]
) -> None:
    decision = decide(probabilities, mask, draw)
    assert decision.model == model and decision.probabilities == pytest.approx(after)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"history": "task: boil"}, r"history='task: boil': need a History\(task"),
        ({"mask": (True, False)}, r"mask=\(True, False\) has 2 flags: need 3, one for each model"),
        ({"mask": (True,) * 4}, "has 4 flags: need 3"),
        ({"mask": 5}, "mask=5: need True or False for each model"),
        ({"mask": (0, 1, 2)}, r"mask=\(0, 1, 2\): need True or False for each model"),
        ({"mask": (False,) * 3}, r"budget=unlimited leave no model: allow one of the 3, or end the episode"),
        ({"mask": (False, True, True), "budget": Budget(CostMode.CALLS, 0)}, "budget=0 large calls leave no model"),
        ({"budget": 5}, r"budget=5: need None, or what is left as a Budget\("),
        ({"budget": Budget(CostMode.CALLS, -1)}, "need None, or what is left"),
        ({"budget": Budget(CostMode.USD, 0.5)}, "need None, or what is left"),  # type: ignore[arg-type]
        ({"seed": True}, "seed=True: need a whole number"),
        ({"seed": 0.5}, "seed=0.5: need a whole number"),
    ],
)
def test_a_decision_refuses(router: SavedRouter, arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as caught:
        router.decide(**({"history": HISTORY} | arguments))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"task": None}, "task=None: need a text"),
        ({"first_observation": 3}, "first_observation=3: need a text"),
        ({"steps_left": -1}, "steps_left=-1: need a whole number of steps, at least 0"),
        ({"steps_left": 2.0}, r"steps_left=2\.0: need"),
        ({"steps": 5}, "steps=5: need a pair of texts"),
        ({"steps": None}, "steps=None: need a pair of texts"),
        ({"steps": ["ab"]}, "steps hold 'ab': need a pair of texts"),
        ({"steps": [("look",)]}, r"steps hold \('look',\): need a pair"),
        ({"steps": [("look", None)]}, r"steps hold \('look', None\): need a pair"),
    ],
)
def test_a_history_refuses(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        History(**({"task": "boil", "first_observation": "", "steps_left": 3} | fields))
    with pytest.raises(ConfigError, match="steps_left=0: no step is left after 0"):
        History("boil", "", 0).after("look", "A cup.")


# -- another pair -----------------------------------------------------------------------------------------------------


def said_to_be_for(folder: Path, pool: ModelPool, target: Path) -> Path:
    """A copy of the folder that says that it was trained for these models."""
    shutil.copytree(folder, target)
    trained = {"models": [{"name": m.name} for m in pool.models], "price_hash": pool.price_hash}
    (target / ROUTER_FILE).write_text(json.dumps({"trained": trained}))
    return target


def test_a_router_of_another_pair_number_or_price_table_is_refused(tmp_path: Path) -> None:
    simulated, llama = load_pool("simulated"), load_pool("simulated-llama")
    make_router(2).save_to_path(str(tmp_path / "two"))
    own = said_to_be_for(tmp_path / "two", simulated, tmp_path / "own")
    assert load_router(own, simulated).n_models == 2
    names = ", ".join(m.name for m in simulated.models)
    cases = (
        (llama, f"own was trained for the 2 models {names}; here it is to be used for {llama.models[0].name}, "),
        (dataclasses.replace(simulated, models=simulated.models[:1]), "for the 2 models .*; here .*; load a router of"),
        (dataclasses.replace(simulated, price_hash="0123"),
         f"own was trained for the price table {simulated.price_hash}; here it is to be used for 0123; load a router"),
    )  # fmt: skip
    for pool, rule in cases:
        with pytest.raises(StoreError, match=rule) as caught:
            load_router(own, pool)
        assert "\n" not in str(caught.value)
    # As a run that is continued does.
    run = SimpleNamespace(pool=llama)
    with pytest.raises(
        StoreError, match=r"own was trained for .*; put this run's own router back, or remove that fold"
    ):
        load_policy(run, own)  # type: ignore[arg-type]
    assert load_policy(SimpleNamespace(pool=simulated), own).keys()  # type: ignore[arg-type]
    # A folder of an earlier version says nothing; its weights still do.
    with pytest.raises(StoreError, match="two decides between 2 models, the pool has 1: load a router of this pool"):
        load_router(tmp_path / "two", cases[1][0])
    # A limit of calls is a number, wherever the folder comes from.
    trained = json.loads((own / ROUTER_FILE).read_text())["trained"]
    for limit, wrong in ((None, False), (7, False), (-1, True), ("7", True), (True, True), ([7], True)):
        (own / ROUTER_FILE).write_text(json.dumps({"trained": trained | {"how": {"call_limit": limit}}}))
        if wrong:
            with pytest.raises(StoreError, match=r"router.json says call_limit=.*need a whole number"):
                load_router(own, simulated)
        else:
            assert pickle.loads(pickle.dumps(load_router(own, simulated))).call_limit == limit


@pytest.mark.parametrize(
    ("said", "rule"),
    [
        ("[", r"is damaged \(JSONDecodeError\)"),
        ("[" * 100_000, r"is damaged \(RecursionError\)"),
        ("[]", r"is damaged \(TypeError\)"),
        ('{"trained": null}', r"is damaged \(TypeError\)"),
        *((json.dumps({"trained": trained}), r"does not say which models and prices the router was trained for \(")
          for trained in (
              {}, {"models": 5, "price_hash": "x"}, {"models": "ab", "price_hash": "x"},
              {"models": [{}, {}], "price_hash": "x"}, {"models": [{"name": 1}], "price_hash": "x"},
              {"models": [{"name": "two\nlines"}], "price_hash": "x"}, {"models": [{"name": "small"}]},
              {"models": [], "price_hash": None},
          )),
    ],
)  # fmt: skip
def test_what_a_router_says_of_itself_may_be_anything(folder: Path, tmp_path: Path, said: str, rule: str) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    (own / ROUTER_FILE).write_text(said)
    with pytest.raises(StoreError, match=rf"own/{ROUTER_FILE} {rule}.*; copy the folder anew") as caught:
        load_router(own, load_pool("simulated"))
    assert "\n" not in str(caught.value)


# -- folders ----------------------------------------------------------------------------------------------------------


def test_what_is_not_a_routers_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    run = folder.parents[1]
    for path, rule in (
        (tmp_path / "nowhere", "nowhere is not a saved router: there is no such folder; a run saves its own in RUN/"),
        (tmp_path, f"{METADATA} is missing in it; a run saves its own in RUN/policies/NAME$"),
        (run, "of which there are policies/bosft here$"),
        (run / "policies", "of which there are bosft here$"),
        (folder / METADATA, "there is no such folder"),
    ):
        with pytest.raises(StoreError, match=rule):
            load_router(path)


Change = Callable[[Path], Any]


def cut(name: str, share: float) -> Change:
    def change(at: Path) -> None:
        whole = (at / name).read_bytes()
        (at / name).write_bytes(whole[: int(share * len(whole))])

    return change


def pickled(name: str, edit: Callable[[Any], Any]) -> Change:
    """`edit` changes the object in a file, or returns another."""

    def change(at: Path) -> None:
        value = pickle.loads((at / name).read_bytes())
        new = edit(value)
        (at / name).write_bytes(pickle.dumps(value if new is None else new))

    return change


def arguments(saved: Any) -> dict[str, Any]:
    """Of the constructor."""
    found: dict[str, Any] = saved["ctor_args_and_kwargs"][1]
    return found


class Evil:
    """Runs a command when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


class Made(NamedTuple):
    """Is read as what a call returns, in the state that is set then."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    state: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple(self)


def told(part: Any, state: Any) -> Change:
    """In place of the arguments: `part`, of which a state is set once more."""
    raw = pickle.dumps(part, 3)[:-1] + pickle.dumps(state, 3)[2:-1] + pickle.BUILD + pickle.STOP
    return lambda at: (at / ARGUMENTS).write_bytes(raw)


HEAD = "average.head.weight"
OBJECT = (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
"""State of a dtype that takes bytes for the address of an object; those of the tests are zero, which is none."""


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (cut(WEIGHTS, 0), rf"{WEIGHTS} can't be read \(EOFError\); copy the folder anew, or train"),
        (cut(WEIGHTS, 0.5), rf"{WEIGHTS} can't be read \("),
        (cut(WEIGHTS, 0.999), rf"{WEIGHTS} can't be read \("),
        (cut(ARGUMENTS, 0.9), rf"{ARGUMENTS} can't be read \("),
        (cut(METADATA, 0.5), rf"{METADATA} is damaged \(JSONDecodeError\); copy"),
        (lambda at: (at / METADATA).write_bytes(b"\xff"), rf"{METADATA} is damaged \(UnicodeDecodeError\)"),
        (lambda at: (at / METADATA).write_text("[]"), rf"{METADATA} is damaged \(TypeError\)"),
        (lambda at: (at / METADATA).write_text("{}"), rf"{METADATA} is damaged \(KeyError\)"),
        (lambda at: (at / WEIGHTS).unlink(), f"not a saved router: {WEIGHTS} is missing"),
        (lambda at: (at / WEIGHTS).write_bytes(b"no pickle"), rf"{WEIGHTS} can't be read"),
        (pickled(WEIGHTS, lambda s: [1]), "damaged: it holds no weights by name"),
        (pickled(WEIGHTS, lambda s: s.update({HEAD: 1.0})), "damaged: it holds no weights by name"),
        (pickled(WEIGHTS, lambda s: {k: v for k, v in s.items() if "aver" not in k}), "no averaged weights"),
        (pickled(WEIGHTS, lambda s: s.__delitem__(HEAD)), r"1 of \d+ weights missing, policy\.head\.weight"),
        (pickled(WEIGHTS, lambda s: s.update({HEAD: s[HEAD][:2]})), r"1 of \d+ weights of another shape, policy\.head"),
        (pickled(WEIGHTS, lambda s: s.update({"average.more": s[HEAD]})), r"1 of \d+ weights unknown, policy\.more"),
        (pickled(WEIGHTS, lambda s: s[HEAD].put(3, np.nan)), r"1 of \d+ weights not finite, policy\.head\.weight"),
        (pickled(WEIGHTS, lambda s: s.update({HEAD: s[HEAD].astype(int)})), r"1 of \d+ weights not finite"),
        (pickled(ARGUMENTS, lambda a: a.__delitem__("class")), rf"{ARGUMENTS} is damaged: no router .*KeyError"),
        (pickled(ARGUMENTS, lambda a: a.update({"class": OrderedDict})), r"no router can be made of it \(TypeError\)"),
        (pickled(ARGUMENTS, lambda a: arguments(a).update(model_config=3)), "no router can be made"),
        (pickled(ARGUMENTS, lambda a: arguments(a).update(action_space=None)), "no router can be made"),
        (pickled(ARGUMENTS, lambda a: arguments(a)["model_config"].update(width=32)), "of another shape"),
        (pickled(ARGUMENTS, lambda a: Evil()), r"can't be read \(\w+\.system is no part of a router\)"),
        (pickled(WEIGHTS, lambda s: s.update({HEAD: Evil()})), r"can't be read \(\w+\.system is no part of a router\)"),
        (pickled(ARGUMENTS, lambda a: Made(np.dtype, ("V8", False, True), OBJECT)), "an array of such a type is no"),
        (pickled(ARGUMENTS, lambda a: Made(np.ndarray, ((1,), "O", bytes(8)))), "'str' object is not callable"),
        (pickled(WEIGHTS, lambda s: s.update({HEAD: s[HEAD].astype(">f4")})), "such a state of Float32DType is no"),
        (told(np.dtype("f8"), (3, "<", None, None, None, 8, 8, 63)), "such a state of Float64DType is no part"),
        (told(np.ones(3), np.ones(3).__reduce__()[2]), "such a state of ndarray is no part"),  # others may see it
        (told(RouterModule, (None, {"more": 1})), r"such a state of \w+ is no part"),
        (told(_frombuffer, (None, {"more": 1})), "such a state of function is no part"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_line(
    folder: Path, tmp_path: Path, change: Change, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change(copy)
    with pytest.raises(StoreError, match=rule) as caught:
        load_router(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_folder_may_be_written_in_each_way_of_numpy(
    folder: Path, router: SavedRouter, tmp_path: Path, protocol: int
) -> None:
    """By its versions and Python's, an array is written in one of two ways."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in (ARGUMENTS, WEIGHTS):
        (copy / name).write_bytes(pickle.dumps(pickle.loads((copy / name).read_bytes()), protocol))
    assert load_router(copy).decide(HISTORY) == router.decide(HISTORY)


# -- the package ------------------------------------------------------------------------------------------------------


def test_the_package_has_its_names_and_no_others() -> None:
    assert {n for n in dir(bopo_ray) if n in bopo_ray.__all__} == set(bopo_ray.__all__)
    assert all(getattr(bopo_ray, name).__name__ == name for name in bopo_ray.__all__)
    assert ConfigError is SameConfigError
    with pytest.raises(AttributeError, match="module 'bopo_ray' has no attribute 'load_ruoter'"):
        bopo_ray.load_ruoter  # noqa: B018


def test_importing_is_light_and_loading_starts_no_ray(folder: Path) -> None:
    code = (
        "import sys, bopo_ray\n"
        "loaded = lambda *names: [m for m in names if m in sys.modules]\n"
        "print(loaded('numpy', 'gymnasium', 'torch', 'ray'))\n"
        "from bopo_ray import History, load_router\n"
        "print(loaded('torch', 'ray', 'transformers'))\n"
        f"load_router({str(folder)!r}).decide(History('boil', '', 3))\n"
        "import ray; print(ray.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[]\n[]\nFalse\n" and "Deprecat" not in done.stderr
