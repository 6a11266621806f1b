"""The routers without parameters, by table."""

from __future__ import annotations

import pytest

from bopo_ray.errors import ConfigError
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL, fixed_router


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
    assert fixed_router(name)("any view", step, n) == probabilities


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("random(1.1)", r"'random\(1\.1\)': 1\.1 is not a probability in \[0, 1\]"),
        ("random(-0.1)", r"-0\.1 is not a probability"),
        ("random(1-1)", "1-1 is not a probability"),
        ("first-large(1.5)", "1.5 is not a whole number of steps >= 0"),
        ("first-large(-1)", "-1 is not a whole number"),
        ("first-large(1e999)", "1e999 is not a whole number"),
        ("first-large(..)", r"\.\. is not a whole number"),
    ],
)
def test_a_bad_number_names_the_rule(name: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        fixed_router(name)


@pytest.mark.parametrize(
    "name",
    ["", "small", "random", "random()", "random(p)", "Random(0.5)", "random(0.5) ", "learned", "nobody(3)",
     "random(nan)", "first-large(inf)"],
)  # fmt: skip
def test_an_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown router .*; known: always-small, always-large, random\(p\), first"):
        fixed_router(name)
