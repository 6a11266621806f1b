"""ALFWorld's expert: the careful person of `envs.alfworld_layouts`, in games of its own.

It works by the texts alone: it looks for the wanted object in the open places first, then in the closed ones, and
remembers what it saw. Its games are furnished anew, in the floor plans of the train split, from a seed that no shipped
game has: no game of the router's lists is among them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from bopo_ray.executors.demos import Demo
from envs import alfworld_process
from envs.alfworld_layouts import KINDS, ROOMS, SCENES, Layout, domain_and_grammar, expert, furnish, problem, task_text
from envs.base import Split
from envs.errors import EngineError

__all__ = ["demonstrate", "jobs", "shown"]

MAX_STEPS = 30
GAMES = 4800
"""Games shown, all kinds in turn."""
NOISE = 0.15
"""Probability of noise before an action, in a noisy demonstration; every second one is."""


def shown(name: str) -> bool:
    """Whether a task is one that the executors may learn from: no listed one is."""
    return "/executors-" in name


def jobs(limit: int) -> list[str]:
    """Names of the games to show: "<kind>/executors-<n>"."""
    return [f"{KINDS[n % len(KINDS)]}/executors-{n // len(KINDS)}" for n in range(limit or GAMES)]


def demonstrate(names: Sequence[str]) -> Iterator[Demo]:
    """A demonstration in each game whose expert wins within the limit. Raises EngineError when the engine fails at one
    game twice."""
    engine = alfworld_process.start()
    for name in names:
        for last in (False, True):
            rng = random.Random(name)
            layout = _layout(name.rpartition("/")[0], rng)
            if not engine.usable:
                engine.close()
                engine = alfworld_process.start()
            try:
                demo = _show(engine, name, layout, rng, noisy=rng.random() < 0.5)
            except EngineError:
                if last:
                    raise
                continue
            if demo:
                yield demo
            break
    engine.close()


def _layout(kind: str, rng: random.Random) -> Layout:
    scenes = [room + number for room in ROOMS[kind] for number in SCENES[Split.TRAIN]]
    while True:
        if layout := furnish(kind, rng.choice(scenes), rng):
            return layout


def _show(engine: alfworld_process.Engine, name: str, layout: Layout, rng: random.Random, noisy: bool) -> Demo | None:
    answer = engine.load(*domain_and_grammar(), problem(layout))
    first = text = answer["text"]
    play = expert(layout, first)
    places = re.findall(r"\ba ([a-z]+ \d+)", first.partition("you see")[2])
    here = ""
    said: list[tuple[str, bool]] = []
    observations: list[str] = []

    def act(action: str, taught: bool) -> None:
        nonlocal answer
        answer = engine.step(action)
        said.append((action, taught))
        observations.append(answer["text"])

    while not answer["won"] and len(said) < MAX_STEPS:
        try:
            action = play.send(text) if said else next(play)
        except (StopIteration, LookupError):
            return None
        if noisy and rng.random() < NOISE:
            detour = rng.choice(("look", "inventory", *([f"examine {here}", "away", "away"] if here else [])))
            if detour == "away" and action.startswith("go to "):
                continue_from = rng.choice(places)
                act(f"go to {continue_from}", False)
            elif detour == "away":
                act(f"go to {rng.choice([p for p in places if p != here])}", False)
                act(f"go to {here}", True)
            else:
                act(detour, False)
        act(action, True)
        text = observations[-1]
        if action.startswith("go to "):
            here = action.removeprefix("go to ")
    if not answer["won"] or len(said) > MAX_STEPS:
        return None
    actions, taught = zip(*said, strict=True)
    return Demo(name, noisy, task_text(layout), first, actions, tuple(observations), taught)
