"""Makes ALFWorld games of our own, each verified: its expert plays it on the engine until it is won."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import as_completed

from envs import alfworld_process
from envs.alfworld_layouts import KINDS, ROOMS, SCENES, Layout, domain_and_grammar, expert, furnish, problem
from envs.base import Split
from envs.errors import ConfigError
from envs.workers import process_pool

__all__ = ["COUNTS", "PLAN_STEPS", "make_games", "solve"]

COUNTS = {Split.TRAIN: 240, Split.DEV: 60, Split.TEST: 120}
"""Games of each split, a sixth of each kind."""
PLAN_STEPS = range(5, 25)
"""Plans that are kept: none trivial, all well within the step limit of 30."""
MAX_DRAWS = 100
"""Draws for one game before the generation gives up."""

Named = dict[str, tuple[Layout, tuple[str, ...]]]


def solve(engine: alfworld_process.Engine, layout: Layout) -> tuple[str, ...]:
    """Plays the expert on a layout. Returns its actions up to the one that wins; none when it doesn't."""
    answer = engine.load(*domain_and_grammar(), problem(layout))
    play, plan = expert(layout, answer["text"]), []
    text = None
    while not answer["won"]:
        try:
            plan.append(play.send(text) if text is not None else next(play))
        except (StopIteration, LookupError):
            return ()
        answer = engine.step(plan[-1])
        text = answer["text"]
    return tuple(plan)


def _make(split: Split, kind: str, count: int, seed: int) -> Named:
    """`count` games of one kind, scene after scene."""
    rng = random.Random(f"{seed} {split} {kind}")
    scenes = [room + number for room in ROOMS[kind] for number in SCENES[split]]
    rng.shuffle(scenes)
    engine, games = alfworld_process.start(), Named()
    draws = itertools.islice(itertools.cycle(scenes), MAX_DRAWS * count)
    for scene in draws:
        if len(games) == count:
            break
        layout = furnish(kind, scene, rng)
        if layout is not None and len(plan := solve(engine, layout)) in PLAN_STEPS:
            stem = f"{kind}/{layout.thing}-None-{layout.place}-{scene}"
            number = next(n for n in itertools.count() if f"{stem}-{n}" not in games)
            games[f"{stem}-{number}"] = layout, plan
    engine.close()
    if len(games) < count:
        raise ConfigError(f"only {len(games)} of {count} {kind} games for {split} could be made: ask for fewer")
    return games


def make_games(
    counts: Mapping[Split, int], seed: int, processes: int, report: Callable[[str], None]
) -> dict[Split, Named]:
    """The games of all splits; the same for the same counts and seed, whatever the number of processes."""
    start, jobs = time.monotonic(), [(split, kind) for split in Split for kind in KINDS]
    shares = {split: [counts[split] * (i + 1) // 6 - counts[split] * i // 6 for i in range(6)] for split in Split}
    with process_pool(processes) as pool:
        waiting = {
            pool.submit(_make, split, kind, shares[split][KINDS.index(kind)], seed): (split, kind)
            for split, kind in jobs
        }
        done = {}
        for future in as_completed(waiting):
            split, kind = waiting[future]
            done[split, kind] = future.result()
            made = sum(map(len, done.values()))
            report(f"{time.monotonic() - start:4.0f} s: {made} of {sum(counts.values())} games ({split} {kind})")
    return {split: {name: g for kind in KINDS for name, g in done[split, kind].items()} for split in Split}
