"""ALFWorld games of our own: the floor plans of the alfworld package, furnished anew, with tasks of all six kinds.

A `Layout` says which objects stand where; the furniture is the floor plan's, and `problem` writes both as the PDDL
that the engine plays. `furnish` draws a layout from a random generator, `expert` solves one as a careful person would,
by the texts alone: it knows which furniture may hold what, searches the open places first, and remembers what it saw.
What always holds: at the start no goal is reached, since no object of the wanted kind stands in a wanted place.

The package's own floor plans hold no lamp's place, so that a desk lamp is put on a table; floor lamps are left out.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

from envs.base import Split

__all__ = ["KINDS", "SCENES", "Layout", "domain_and_grammar", "expert", "furnish", "problem", "task_text"]

KINDS = (
    "pick_and_place_simple", "look_at_obj_in_light", "pick_clean_then_place_in_recep", "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep", "pick_two_obj_and_place",
)  # fmt: skip
"""The six kinds of task, as the package names them."""
SCENES = {
    Split.TEST: range(1, 7),
    Split.TRAIN: range(7, 26),
    Split.DEV: range(26, 31),
}
"""Floor plans of each split, to be added to 0 (kitchens), 200 (living rooms), 300 (bedrooms) and 400 (bathrooms): the
test scenes are the package's own, and the dev scenes are taken from its train scenes."""
ROOMS = {
    "pick_and_place_simple": (0, 200, 300, 400),
    "look_at_obj_in_light": (200, 300),
    "pick_clean_then_place_in_recep": (0, 400),
    "pick_heat_then_place_in_recep": (0,),
    "pick_cool_then_place_in_recep": (0,),
    "pick_two_obj_and_place": (0, 200, 300, 400),
}
MAX_FURNITURE = 30
"""Pieces of furniture in a scene; the few with more take long to load."""
LAMP = "DeskLamp"
LAMP_ROOMS = (2, 3)
"""Living rooms and bedrooms."""
TABLES = ("Desk", "SideTable", "Dresser", "Shelf", "DiningTable", "CoffeeTable")
"""Where a desk lamp may stand."""
TOOLS = {"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"}
_ABILITIES = {"Cleanable": "cleanable", "Heatable": "heatable", "Coolable": "coolable", "Sliceable": "sliceable"}


@dataclass(frozen=True, slots=True)
class Layout:
    """A game of our own."""

    kind: str
    """Of task, one of `KINDS`."""
    thing: str
    """The kind of object that the task is about, e.g. "Apple"."""
    place: str
    """The kind of furniture that it belongs to, or "DeskLamp"."""
    scene: int
    """Number of the floor plan."""
    wording: int
    """Which of the package's sentences states the task."""
    things: tuple[tuple[str, int], ...]
    """Every object: its kind, and the number of the piece of furniture that it stands in."""


@functools.cache
def _package() -> Path:
    """Where the alfworld package is. Nothing of it is imported: that would set ALFWORLD_DATA and make folders."""
    spec = find_spec("alfworld")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("no package alfworld")
    return Path(spec.origin).parent


@functools.cache
def _goals() -> dict[str, dict[str, Any]]:
    """Of each kind of task: its goal in PDDL, and the sentences that state it."""
    goals: dict[str, dict[str, Any]] = run_path(str(_package() / "gen/goal_library.py"))["gdict"]
    return goals


@functools.cache
def _constants() -> tuple[dict[str, set[str]], dict[str, set[str]], set[str], set[str]]:
    """What furniture may hold, what may be done to what, what opens, and what is furniture."""
    known = run_path(str(_package() / "gen/constants.py"))
    furniture = known["RECEPTACLES"] - known["MOVABLE_RECEPTACLES_SET"]
    return known["VAL_RECEPTACLE_OBJECTS"], known["VAL_ACTION_OBJECTS"], known["OPENABLE_CLASS_SET"], furniture


@functools.cache
def _furniture(scene: int) -> tuple[tuple[str, str, str], ...]:
    """Of each piece in a scene: its kind, its id in PDDL, and where one stands before it."""
    text = (_package() / f"gen/layouts/FloorPlan{scene}-openable.json").read_text(encoding="utf-8")
    pieces = []
    for name, (x, z, rotation, horizon) in sorted(json.loads(text).items()):
        kind = name.split("|")[0] + ("Basin" if name.endswith("Basin") else "")  # as the engine will call it
        spot = f"loc|{4 * x:.0f}|{4 * z:.0f}|{rotation}|{horizon}"
        pieces.append((kind, _symbol(name), _symbol(spot)))
    return tuple(pieces)


@functools.cache
def _objects(scene: int) -> tuple[str, ...]:
    """Kinds of objects in a scene that can be carried."""
    text = (_package() / f"gen/layouts/FloorPlan{scene}-objects.json").read_text(encoding="utf-8")
    holds, _, _, furniture = _constants()
    carried = set().union(*holds.values()) - furniture
    return tuple(sorted(carried.intersection(json.loads(text))))


def _symbol(name: str) -> str:
    """A name that PDDL admits, as the package writes it."""
    for character, word in zip("-#|+.,", ("_minus_", "-", "_bar_", "_plus_", "_dot_", "_comma_"), strict=True):
        name = name.replace(character, word)
    return name


@functools.cache
def domain_and_grammar() -> tuple[str, str]:
    """The rules and the texts that come with the package."""
    data = _package() / "data"
    return (data / "alfred.pddl").read_text(encoding="utf-8"), (data / "alfred.twl2").read_text(encoding="utf-8")


def task_text(layout: Layout) -> str:
    """The sentence that states the task."""
    thing, place = layout.thing.lower(), layout.place.lower()
    wording: str = _goals()[layout.kind]["templates"][layout.wording]
    return f"Your task is to: {wording.format(obj=thing, recep=place, toggle=place)}."


def problem(layout: Layout) -> str:
    """The layout and its goal as a PDDL problem."""
    goal = str(_goals()[layout.kind]["pddl"]).replace("#", "-")
    goal = goal.format(obj=layout.thing, recep=layout.place, toggle=layout.place)
    declared, facts = "\n".join(sorted(set(_declarations(layout)))), "\n".join(_facts(layout))
    return f"(define (problem own) (:domain alfred)\n(:objects\n{declared})\n(:init\n{facts})\n{goal}"


def _named_things(layout: Layout) -> Iterator[tuple[str, str, int]]:
    """Id, kind and place of every object."""
    for number, (kind, place) in enumerate(layout.things):
        yield f"{kind}_bar_{number:02}", kind, place


def _declarations(layout: Layout) -> Iterator[str]:
    yield from ("agent1 - agent", "loc_bar_start - location")
    for kind, piece, spot in _furniture(layout.scene):
        yield from (f"{piece} - receptacle", f"{spot} - location", f"{kind}Type - rtype")
    for name, kind, _ in _named_things(layout):
        yield from (f"{name} - object", f"{kind}Type - otype")


def _facts(layout: Layout) -> Iterator[str]:
    holds, abilities, opens, _ = _constants()
    pieces = _furniture(layout.scene)
    yield from ("(= (total-cost) 0)", "(atLocation agent1 loc_bar_start)")
    for kind, piece, spot in pieces:
        yield from (f"(receptacleType {piece} {kind}Type)", f"(receptacleAtLocation {piece} {spot})")
        if kind in opens:
            yield f"(openable {piece})"
    kinds = sorted({kind for kind, _ in layout.things})
    for furniture in sorted({kind for kind, _, _ in pieces}):
        yield from (f"(canContain {furniture}Type {kind}Type)" for kind in kinds if kind in holds.get(furniture, ()))
    for name, kind, place in _named_things(layout):
        _, piece, spot = pieces[place]
        yield from (f"(objectType {name} {kind}Type)", f"(inReceptacle {name} {piece})")
        yield f"(objectAtLocation {name} {spot})"
        yield f"({'toggleable' if kind == LAMP else 'pickupable'} {name})"
        yield from (f"({fact} {name})" for ability, fact in _ABILITIES.items() if kind in abilities[ability])


def furnish(kind: str, scene: int, rng: random.Random) -> Layout | None:
    """Draws a task of `kind` and a layout for it; None where the scene has no such task."""
    holds, abilities, _, _ = _constants()
    furniture, objects = [piece for piece, _, _ in _furniture(scene)], _objects(scene)
    verb, copies = kind.split("_")[1], 2 if kind == "pick_two_obj_and_place" else 1
    tables = [at for at, piece in enumerate(furniture) if piece in TABLES]
    if len(furniture) > MAX_FURNITURE or (verb in TOOLS and TOOLS[verb] not in furniture):
        return None
    if verb == "at":
        goals = [(thing, LAMP) for thing in objects if tables]
    else:
        able = abilities[f"{verb.title()}able"] if verb in TOOLS else set(objects)
        places = sorted(set(furniture))
        goals = [(thing, place) for thing in objects if thing in able for place in places if thing in holds[place]]
    if not goals:
        return None
    wanted, goal = rng.choice(goals)
    things = [(LAMP, rng.choice(tables))] if tables and scene // 100 in LAMP_ROOMS else []
    for thing in objects:
        homes = [at for at, p in enumerate(furniture) if thing in holds[p] and (thing != wanted or p != goal)]
        count = max(rng.choice((0, 1, 1, 2)), copies if thing == wanted else 0)
        things += [(thing, rng.choice(homes)) for _ in range(count) if homes]
    if sum(thing == wanted for thing, _ in things) < copies:
        return None
    return Layout(kind, wanted, goal, scene, rng.randrange(2), tuple(things))


def _seen(text: str) -> list[str]:
    """What a text lists, e.g. "apple 1"."""
    return re.findall(r"\ba ([a-z]+ \d+)", text.partition("you see")[2])


def expert(layout: Layout, room: str) -> Generator[str, str, None]:
    """Solves a task: yields actions, is sent what they bring, returns when all is done.

    Args:
        room: the first observation, which names the furniture.
    """
    holds, _, opens, _ = _constants()
    names = {kind.lower(): kind for kind, _, _ in _furniture(layout.scene)}
    places = {name: names[name.split()[0]] for name in sorted(_seen(room), key=lambda name: int(name.split()[1]))}
    thing, goal, verb = layout.thing.lower(), layout.place, layout.kind.split("_")[1]
    contents: dict[str, list[str]] = {}

    def visit(place: str) -> Generator[str, str, None]:
        text = yield f"go to {place}"
        if "is closed" in text:
            text = yield f"open {place}"
        contents[place] = _seen(text)

    def find(wanted: str, where: list[str]) -> Generator[str, str, tuple[str, str]]:
        """Goes to an object of the kind `wanted`; returns it and where it stands."""
        known = [place for place in where if any(name.split()[0] == wanted for name in contents.get(place, ()))]
        for place in known or [place for place in where if place not in contents]:
            yield from visit(place)
            if found := [name for name in contents[place] if name.split()[0] == wanted]:
                contents[place].remove(found[0])
                return found[0], place
        raise LookupError(f"no {wanted} in scene {layout.scene}")

    def likely(kind: str) -> list[str]:
        fitting = [p for p, furniture in places.items() if kind in holds.get(furniture, ()) and furniture != goal]
        return sorted(fitting, key=lambda place: places[place] in opens)

    target = next((place for place, furniture in places.items() if furniture == goal), "")
    for _ in range(2 if verb == "two" else 1):
        name, place = yield from find(thing, likely(layout.thing))
        yield f"take {name} from {place}"
        if verb in TOOLS:
            tool = next(place for place, furniture in places.items() if furniture == TOOLS[verb])
            yield f"go to {tool}"
            yield f"{verb} {name} with {tool}"
        if verb == "at":
            lamp, _ = yield from find(LAMP.lower(), [p for p, furniture in places.items() if furniture in TABLES])
            yield f"use {lamp}"
        else:
            yield from visit(target)
            yield f"move {name} to {target}"
