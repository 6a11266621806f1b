"""The router's view as ids: what is always there, and what goes first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bopo_ray.agent import Turn, budget_text, router_view
from bopo_ray.models.tokens import CLS, PAD, SEP, TOKENIZER_PATH, encode, tokenizer
from bopo_ray.records import Budget, CostMode
from bopo_ray.rllib.encode import BUDGET_TOKENS, NEWEST_TOKENS, OLDER_TOKENS, TASK_TOKENS, encode_view, visible

SEP_ID, PAD_ID = (tokenizer().token_to_id(t) for t in (SEP, PAD))
VOCABULARY = tokenizer().get_vocab_size()
SMALLEST_CONTEXT = 80


def test_the_layout_by_hand() -> None:
    view = "task: boil\nbudget: unlimited; steps left 40\n| A hall.\n> look | A cup.\n> wait1 | Time passes."
    by_hand = [VOCABULARY + 2, *encode("task: boil"), SEP_ID, *encode("budget: unlimited; steps left 40"), SEP_ID]
    by_hand += [*encode("> wait1 | Time passes."), *encode("> look | A cup."), *encode("| A hall.")]  # newest first
    ids = encode_view(view, 96)
    assert ids.dtype == np.int32 and ids.shape == (96,)
    assert ids[: len(by_hand)].tolist() == by_hand
    assert (ids[len(by_hand) :] == PAD_ID).all()


def test_a_text_that_names_a_special_token_is_text() -> None:
    """Else an environment that prints "[PAD]" would hide what it prints, and "[SEP]" begin another section."""
    for name in (PAD, CLS, SEP):
        ids = encode(f"a sign {name} here")
        assert tokenizer().token_to_id(name) not in ids and tokenizer().decode(list(ids)) == f"a sign {name} here"
    ids = encode_view(f"task: say {SEP}\nbudget: none\n| {PAD} {CLS}", 96)
    read = int((ids != PAD_ID).sum())
    assert (ids[:read] != PAD_ID).all() and (ids == SEP_ID).sum() == 2


def test_any_other_text_is_read_as_it_was_when_the_shipped_routers_were_trained() -> None:
    plain = Tokenizer.from_file(str(TOKENIZER_PATH))
    calls = pq.read_table(Path(__file__).parents[1] / "data" / "replay-calls.parquet", columns=["text"])
    texts = {*calls.column("text").to_pylist(), "[pad] [ SEP ] [CLS", "\0 é 😀\t[MASK]"}
    assert len(texts) > 20
    assert all(list(encode(text)) == plain.encode(text, add_special_tokens=False).ids for text in texts)


def test_long_lines_are_cut_at_their_ends() -> None:
    view = f"task: {'boil ' * 200}\nbudget: unlimited; steps left 3\n| {'old ' * 90}\n> {'new ' * 90}"
    ids = encode_view(view, 96).tolist()
    assert ids[1 : 1 + TASK_TOKENS] == list(encode(view.split("\n")[0])[:TASK_TOKENS])
    start = 1 + TASK_TOKENS + 1 + len(encode("budget: unlimited; steps left 3")) + 1
    assert ids[start : start + NEWEST_TOKENS] == list(encode(view.split("\n")[3])[:NEWEST_TOKENS])
    older = ids[start + NEWEST_TOKENS : start + NEWEST_TOKENS + OLDER_TOKENS]
    assert older == list(encode(view.split("\n")[2])[:OLDER_TOKENS])
    assert ids[start + NEWEST_TOKENS + OLDER_TOKENS] == PAD_ID


def test_lines_get_longer_with_the_context() -> None:
    view = f"task: boil\nbudget: none\n| {'old ' * 90}\n> {'new ' * 90}"
    start = 1 + len(encode("task: boil")) + 1 + len(encode("budget: none")) + 1
    ids = encode_view(view, 160).tolist()
    assert ids[start : start + 40] == list(encode(view.split("\n")[3])[:40])
    assert ids[start + 40 : start + 56] == list(encode(view.split("\n")[2])[:16])
    assert ids[start + 56] == PAD_ID
    assert visible(view, 160).count("new") > visible(view, 96).count("new")


def test_the_oldest_lines_are_what_does_not_fit() -> None:
    turns = [Turn("", f"examine page {i}", "You read.") for i in range(60)]
    view = router_view("boil", "A hall.", turns, 1, "unlimited")
    text = tokenizer().decode(encode_view(view, SMALLEST_CONTEXT).tolist())
    assert "page 59" in text and "page 58" in text and "page 3 " not in text and "A hall" not in text
    longer = encode_view(view, 128)
    assert (longer[:SMALLEST_CONTEXT] == encode_view(view, SMALLEST_CONTEXT)).all()


@pytest.mark.parametrize("steps_left", [1, 40, 100])
@pytest.mark.parametrize(
    ("budget", "spent"),
    [(None, 0), (Budget(CostMode.CALLS, 15), 0), (Budget(CostMode.CALLS, 100), 0), (Budget(CostMode.USD, 24_789), 1),
     (Budget(CostMode.USD, 12_345_678), 0), (Budget(CostMode.USD, 987_654_321), 0)],
)  # fmt: skip
def test_the_budget_line_is_never_cut(budget: Budget | None, spent: int, steps_left: int) -> None:
    line = router_view("boil", "", [], steps_left, budget_text(budget, spent)).split("\n")[1]
    assert len(encode(line)) <= BUDGET_TOKENS, line


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=200)


@settings(max_examples=60, deadline=None)
@given(TEXT, st.integers(0, 40), st.lists(TEXT, max_size=12), st.integers(SMALLEST_CONTEXT, 200))
def test_every_view_has_one_length_and_starts_with_task_and_budget(
    task: str, steps_left: int, observations: list[str], context: int
) -> None:
    turns = [Turn("", "look", o) for o in observations]
    view = router_view(task, "A hall.", turns, steps_left, "3 large calls")
    ids = encode_view(view, context)
    assert ids.shape == (context,) and ids.min() >= 0 and ids[1:].max() < VOCABULARY
    lines = view.split("\n")
    task_ids, budget_ids = encode(lines[0])[:TASK_TOKENS], encode(lines[1])
    head = [VOCABULARY + len(observations), *task_ids, SEP_ID, *budget_ids, SEP_ID, *encode(lines[-1])[:NEWEST_TOKENS]]
    assert ids[: len(head)].tolist() == head


@given(st.lists(st.text(alphabet="ab .|>", max_size=120), min_size=2, max_size=12), st.integers(SMALLEST_CONTEXT, 200))
def test_people_are_shown_what_the_router_reads(lines: list[str], context: int) -> None:
    view = "\n".join(lines)
    read = tokenizer().decode(encode_view(view, context).tolist())
    shown = visible(view, context).replace(" …", "")
    assert "".join(shown.split()) == "".join(read.split())


def test_a_line_that_is_cut_ends_with_dots() -> None:
    view = f"task: boil {'water ' * 60}\nbudget: unlimited; steps left 9\n| a kitchen"
    task, budget, newest = visible(view, 96).splitlines()
    assert task.endswith("water …") and [budget, newest] == view.splitlines()[1:]
