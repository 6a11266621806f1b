"""The same episode with other names: what a model must copy from its texts, and can't know by heart.

Always true here: a name is changed everywhere in an episode at once, in texts and actions, so that the episode stays
one that the environment could show; names whose meaning decides what to do (which paint mixes to what, which animal
lives longest) stay.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from functools import cache

from bopo_ray.executors.demos import Demo

__all__ = ["augmented"]

COLOURS = ("red", "green", "blue", "orange", "yellow", "purple")
_COLOURED = re.compile(rf"\b({'|'.join(COLOURS)})(?= (?:box|wire|light bulb)\b)")
_LETTERED = re.compile(r"\b((?:unknown substance|inclined plane|substance) )([a-z])\b")
_FOCUS = re.compile(r"focus on (.+)")
_LIST = re.compile(r"(?:^\t[^\t\n].*\n?){2,}", re.MULTILINE)
MEANING = ("chemistry", "lifespan", "identify-life-stages", "power-component", "grow-", "mendelian")
"""Beginnings of the kinds whose objects keep their names."""
LIVING = ("find-living-thing", "find-animal", "find-plant", "find-non-living-thing")
"""Kinds in which a thing may only become another of the same kind's things."""
SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "el", "or", "is"))


def augmented(env_id: str, demo: Demo, rng: random.Random) -> Demo:
    """The demonstration with names permuted; as it is, where the environment has no rule for it."""
    return _scienceworld(demo, rng) if env_id == "ScienceWorld-v0" else demo


def _scienceworld(demo: Demo, rng: random.Random) -> Demo:
    changes: list[Callable[[str], str]] = []
    if "paint" not in demo.kind:
        colours = dict(zip(COLOURS, rng.sample(COLOURS, len(COLOURS)), strict=True))
        changes.append(lambda text: _COLOURED.sub(lambda m: colours[m[1]], text))
    letters = dict(zip("abcdefghijklmnopqrstuvwxyz", rng.sample("abcdefghijklmnopqrstuvwxyz", 26), strict=True))
    changes.append(lambda text: _LETTERED.sub(lambda m: m[1] + letters[m[2]], text))
    if not demo.kind.startswith(MEANING) and rng.random() < 0.7:
        for thing in sorted(_things(demo), key=len, reverse=True)[:2]:
            changes.append(_swap(thing, _other(demo.kind, thing, rng)))

    def change(text: str) -> str:
        text = text.lower()
        for one in changes:
            text = one(text)
        return text

    def shuffled(text: str) -> str:
        return _LIST.sub(lambda m: _shuffled(m[0], rng), change(text))

    return dataclasses.replace(
        demo,
        task_text=change(demo.task_text),
        first_observation=shuffled(demo.first_observation),
        actions=tuple(map(change, demo.actions)),
        observations=tuple(map(shuffled, demo.observations)),
    )


def _things(demo: Demo) -> set[str]:
    """Names of what the task is about: the objects that its expert focuses on."""
    found = (m[1] for a in demo.actions if (m := _FOCUS.fullmatch(a)))
    names = {re.sub(r" (?:in|on) .*| substance .*", "", name).strip() for name in found}
    common = {"thermometer", "substance", "stopwatch", "block", "steam", "box"}
    return {n for n in names if len(n) > 2 and n not in common and not n.startswith(("inclined plane", "unknown"))}


def _swap(one: str, other: str) -> Callable[[str], str]:
    """Exchanges two names, whole words only."""
    pattern = re.compile(rf"\b({re.escape(one)}|{re.escape(other)})\b")
    return lambda text: pattern.sub(lambda m: other if m[1] == one else one, text)


def _other(kind: str, thing: str, rng: random.Random) -> str:
    """Another name for a thing: one of the same sort, or, where its sort says nothing, one that nobody has heard of."""
    if kind in LIVING:
        return rng.choice(_sorts()[kind])
    words = [w for w in _sorts()["any"] if w != thing]
    invented = "".join(rng.choice(SYLLABLES) for _ in range(rng.randrange(2, 4)))
    return rng.choice(words) if rng.random() < 0.5 else invented


@cache
def _sorts() -> dict[str, tuple[str, ...]]:
    animals = (
        "ant", "bee", "beaver", "blue jay", "brown bear", "butterfly", "chameleon", "chipmunk", "crocodile", "dove",
        "dragonfly", "elephant", "frog", "giant tortoise", "hedgehog", "moth", "mouse", "parrot", "rabbit", "spider",
        "toad", "turtle", "wolf",
    )  # fmt: skip
    plants = tuple(f"{p} tree" for p in ("apple", "avocado", "banana", "cherry", "grapefruit", "lemon", "peach"))
    dead = ("axe", "book", "chair", "couch", "desk", "door", "drawer", "finger painting", "fountain", "oven", "picture",
            "shovel", "sink", "stove", "table", "toilet", "wood")  # fmt: skip
    anything = (
        "aluminum foil", "apple juice", "butter", "candle", "ceramic cup", "chocolate", "copper bar", "cotton ball",
        "gallium", "glass cup", "gold ring", "ice cream", "iron block", "lead", "marshmallow", "mercury", "metal fork",
        "metal pot", "orange juice", "paper clip", "plastic cup", "rubber band", "salt", "sodium chloride", "soap",
        "steel table", "tin", "tin cup", "wood cup", "caesium", "paper cup",
    )  # fmt: skip
    return {
        "find-animal": animals, "find-living-thing": animals, "find-plant": plants, "find-non-living-thing": dead,
        "any": anything,
    }  # fmt: skip


def _shuffled(block: str, rng: random.Random) -> str:
    lines = block.splitlines()
    rng.shuffle(lines)
    return "\n".join(lines) + ("\n" if block.endswith("\n") else "")
