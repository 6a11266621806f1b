"""An episode as one sequence, and what an actor keeps of it: the logits of one forward pass for each step."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bopo_ray import History, load_router
from bopo_ray.agent import Turn, router_view
from bopo_ray.inference import EPISODES
from bopo_ray.method.loss import bosft_loss
from bopo_ray.rllib.batch import passes
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.memory import Memory
from bopo_ray.rllib.prompt import KEPT, windows
from bopo_ray.rllib.reading import NOTHING, Reading
from bopo_ray.rllib.router_module import RouterModule
from bopo_ray.rllib.saved import acting_module
from tests.tiny_router import make_qwen
from tests.unit.test_backbone import made, shape, trained

STEPS = 14


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen(tmp_path_factory.mktemp("sequence") / "chat", dropout=0.5)


def views(steps: int = STEPS, salt: str = "") -> list[str]:
    """Of an episode: lines and budgets of different lengths."""
    turns = [Turn("", f"examine page {'x' * (7 * t % 5)}{t}{salt}", "You read. " * (t % 3)) for t in range(steps)]
    budgets = ["unlimited" if t % 4 else f"${t / 7:.4f}" for t in range(steps)]
    return [router_view("boil water", "A hall.", turns[:t], 20 - t, budgets[t]) for t in range(steps)]


def naive(module: RouterModule, read: Reader, seen: list[str]) -> torch.Tensor:
    """One forward pass for each step."""
    return torch.cat([module.policy(torch.from_numpy(read(v))[None]) for v in seen])


def packed(module: RouterModule, readings: list[Reading]) -> torch.Tensor:
    """One forward pass for all sequences."""
    T = max(len(r.ids) for r in readings)
    ids, asks = np.full((len(readings), T), NOTHING, np.int32), np.zeros((len(readings), T), np.int32)
    for i, r in enumerate(readings):
        assert r.asks is not None
        ids[i, : len(r.ids)], asks[i, : len(r.ids)] = r.ids, r.asks
    return module.policy(torch.from_numpy(ids), torch.from_numpy(asks))


# -- the window -------------------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    # Room 10, so 6 are kept: 4, 8, then 12 > 10 leaves 8, still above 6, then 4; 9; 14 leaves 10 and then 5.
    assert windows([4, 4, 4, 5, 5], 10) == [0, 0, 2, 2, 4]
    assert windows([], 10) == [] and windows([0, 0], 0) == [0, 0]


@given(st.integers(0, 40).flatmap(lambda r: st.tuples(st.just(r), st.lists(st.integers(0, r // 2), max_size=30))))
def test_a_window_fits_and_only_moves_when_it_must(case: tuple[int, list[int]]) -> None:
    room, lengths = case
    starts = windows(lengths, room)
    for t, start in enumerate(starts):
        before = starts[t - 1] if t else 0
        assert before <= start <= t and sum(lengths[start : t + 1]) <= room
        assert starts[: t + 1] == windows(lengths[: t + 1], room), "what comes later changes nothing"
        if start != before:
            assert sum(lengths[before : t + 1]) > room and sum(lengths[start : t + 1]) <= KEPT * room


# -- one sequence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("context", [1024, 260])
def test_a_sequence_has_the_logits_of_one_pass_for_each_step(
    chat: Path, tmp_path: Path, context: int, template: bool
) -> None:
    cfg = shape(chat if template else make_qwen(tmp_path / "plain", template=None), context=context)
    module, read, seen = trained(cfg), Reader.of(cfg), [views(), views(5, "!")]
    readings = [r for v in seen for r in read.episode(v)]
    assert (len(readings) == 2) == (context == 1024), "a short context takes several windows"
    assert sum(r.decisions for r in readings) == STEPS + 5 and all(len(r.ids) > 100 for r in readings)
    with torch.no_grad():
        for part in (module.policy, module.average, module.reference):
            module.policy.load_state_dict(part.state_dict())
            assert torch.allclose(packed(module, readings), naive(module, read, seen[0] + seen[1]), atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_and_its_gradients(chat: Path, checkpointing: bool, recwarn: pytest.WarningsRecorder) -> None:
    cfg = shape(chat, gradient_checkpointing=checkpointing)
    read, labels = Reader.of(cfg), torch.arange(STEPS) % 2
    found: list[list[torch.Tensor]] = []
    for together in (True, False):
        module = trained(cfg, 1)
        module.zero_grad()
        logits = packed(module, read.episode(views())) if together else naive(module, read, views())
        bosft_loss(logits, labels, torch.ones(STEPS)).backward()
        found.append([p.grad for p in module.policy.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 10
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    assert not [w for w in recwarn if "checkpoint" in str(w.message)]


def test_no_question_is_seen_by_what_comes_later(chat: Path) -> None:
    cfg = shape(chat)
    module, read = made(cfg), Reader.of(cfg)
    rich = [v.replace("unlimited", "3 large calls") if t < 6 else v for t, v in enumerate(views())]
    with torch.no_grad():
        a, b = (packed(module, read.episode(v)) for v in (views(), rich))
    assert torch.allclose(a[6:], b[6:], atol=1e-5) and not torch.allclose(a[1:4], b[1:4], atol=1e-4)


def test_half_precision_is_close_and_logits_are_not_halved(chat: Path) -> None:
    full, half = (made(shape(chat, bf16=bf16)) for bf16 in (False, True))
    half.policy.trunk.halve_frozen()
    read = Reader.of(shape(chat))
    assert {p.dtype for p in half.policy.parameters()} == {torch.float32}
    with torch.no_grad():
        a, b = (packed(m, read.episode(views())) for m in (full, half))
    assert b.dtype == torch.float32 and not torch.equal(a, b) and torch.allclose(a, b, atol=0.05 * float(a.abs().max()))
    bosft_loss(packed(half, read.episode(views())), torch.arange(STEPS) % 2, torch.ones(STEPS)).backward()
    assert all(torch.isfinite(p.grad).all() for p in half.policy.parameters() if p.grad is not None)


# -- what an actor keeps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1024, 260])
def test_a_memory_decides_as_whole_prompts_do(chat: Path, context: int) -> None:
    cfg = shape(chat, context=context)
    module, read = trained(cfg), Reader.of(cfg)
    memory = module.memory()
    assert isinstance(memory, Memory)
    episodes = {"a": views(), "b": views(9, "!"), "c": views(4, "?"), "d": views(12, "#")}
    read_tokens: list[int] = []
    reader, original = module.policy.trunk, module.policy.trunk.read
    reader.read = lambda ids, *a, **k: (read_tokens.append(ids.numel()), original(ids, *a, **k))[1]
    rng = np.random.default_rng(0)
    while any(episodes.values()):  # whoever is ready decides: lanes begin, go on and end at different times
        ready = [k for k, left in episodes.items() if left and rng.random() < 0.7]
        seen = [episodes[k].pop(0) for k in ready]
        if not ready:
            continue
        logits = memory.logits([read(v) for v in seen], ready)
        with torch.inference_mode():
            assert torch.allclose(logits, naive(module, read, seen), atol=1e-5)
    whole = sum(int((read(v) != NOTHING).sum()) for v in [*views(), *views(9), *views(4), *views(12)])
    acted = sum(read_tokens[:1000])
    assert acted < whole * 2  # `naive` reads through the same hook: so much is its own
    assert acted - whole < 0.5 * whole


def test_a_lane_that_begins_anew_is_not_mistaken(chat: Path) -> None:
    cfg = shape(chat, gradient_checkpointing=True)  # which keeps nothing while it learns
    module, read = made(cfg).eval(), Reader.of(cfg)
    memory: Any = module.memory()
    for seen in (views()[9], views()[2], views(6, "!")[5], views()[9]):
        with torch.inference_mode():
            assert torch.allclose(memory.logits([read(seen)], [0]), naive(module, read, [seen]), atol=1e-5)


def test_a_saved_router_keeps_what_it_has_read_of_the_latest_episodes(chat: Path, tmp_path: Path) -> None:
    trained(shape(chat, context=400)).save_to_path(str(tmp_path / "router"))
    router, module = load_router(tmp_path / "router"), acting_module(tmp_path / "router")
    copy = pickle.loads(pickle.dumps(router))  # has a memory and a lock of its own
    assert copy.decide(History("boil water", "Porch.", 3)) == router.decide(History("boil water", "Porch.", 3))
    tokens: list[int] = []
    reader, original = router._module.policy.trunk, router._module.policy.trunk.read
    reader.read = lambda ids, *a, **k: (tokens.append(ids.numel()), original(ids, *a, **k))[1]

    def decided(history: History) -> int:
        """Checks the probabilities with another module, which reads all; returns the tokens that were read for them."""
        tokens.clear()
        found = router.decide(history).probabilities
        turns = [Turn("", *step) for step in history.steps]
        view = router_view(history.task, history.first_observation, turns, history.steps_left, "unlimited")
        with torch.inference_mode():
            logits = module.policy(torch.from_numpy(Reader.of(shape(chat, context=400))(view)[None]))
        assert found == pytest.approx(torch.softmax(logits, -1)[0].tolist(), abs=1e-6)
        return sum(tokens)

    begun = [History("boil water", f"Hall {i}.", STEPS) for i in range(EPISODES + 1)]
    first = [decided(h) for h in begun]
    later = [h.after("go on", "You go on.") for h in begun]
    read = [decided(h) for h in reversed(later)]  # the first episode had to make room for the last one
    assert max(read[:-1]) < min(first) / 2 and read[-1] > first[0]
    grown = later[-1]
    for i in range(STEPS - 1):  # the same episode, also where its oldest lines are dropped; and decided twice
        grown = grown.after(f"examine page {i}", "You read it from its beginning to its end.")
        assert decided(grown) >= decided(grown) > 0


# -- forward passes ---------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_passes_cover_each_row_once_and_keep_to_the_tokens(lengths: list[int], tokens: int) -> None:
    parts = list(passes(np.array(lengths, np.int32), tokens))
    assert sorted(i for part in parts for i in part) == [i for i, n in enumerate(lengths) if n]
    for part in parts:
        longest = max(lengths[i] for i in part)
        assert len(part) == 1 or longest * len(part) <= tokens
    order = [lengths[i] for part in parts for i in part]
    assert order == sorted(order, reverse=True), "similar lengths share a pass"
