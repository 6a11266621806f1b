"""ALFWorld: household tasks of six kinds in rooms that one reads about, on TextWorld's engine.

`ALFWorld-v0`. A task's name is "<kind>/<what>", e.g. "pick_heat_then_place_in_recep/Potato-None-CounterTop-4-0". The
score is 1 when the goal is reached, which ends the episode, else 0; outcome and success are the same. Every action
counts as a step, also those that do nothing.

    env = gymnasium.make("ALFWorld-v0")
    text, info = env.reset(options={"task": ALFWorldEnv.tasks(Split.TEST)[0].name})
    text, reward, terminated, truncated, info = env.step("go to countertop 1")

The official games are played where `ALFWORLD_DATA` names their folder: train, valid_seen (our dev) and valid_unseen
(our test). Elsewhere the games are our own, see `alfworld_layouts`; results then say "ALFWorld engine, own layouts".

    export ALFWORLD_DATA=FOLDER; alfworld-download                       # the official games
    python -m envs.alfworld generate --out FOLDER --train 1000 --seed 1  # more of our own; then ALFWORLD_DATA=FOLDER
    python -m envs.alfworld verify                                       # play every stored plan to its end
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.error import ResetNeeded

from envs import alfworld_games as games
from envs import alfworld_process
from envs.base import Split, Task, text_space
from envs.errors import ConfigError

__all__ = ["ALFWorldEnv"]

_OPTIONS = ("task", "admissible", "expert_plan")


class ALFWorldEnv(gymnasium.Env[str, str]):
    """One ALFWorld episode at a time; see `envs.base` for the contract.

    Each environment has an engine process of its own, from its first reset until it is closed.

    Args:
        max_steps: steps until the episode is truncated.
        call_timeout_s: seconds that one call of the engine may take before it counts as hung.
        render_mode: None or "ansi" (`render` returns the last observation).
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"]}  # noqa: RUF012 (gymnasium's own form)

    footprint_mb = (50, 22)
    """See `envs.base`. Measured: the engines and their nursery; 213 MB with 8 episodes in flight, 89 with 2."""
    action_guide = """Actions: look, inventory, go to PLACE, open PLACE, close PLACE, examine X, take X from PLACE,
move X to PLACE, use X (a lamp), heat X with PLACE (a microwave), cool X with PLACE (a fridge), clean X with PLACE (a
sinkbasin), slice X with Y (a knife). One action at a time; X and PLACE are names with their numbers, as in
"take apple 1 from countertop 2". You carry one object at a time, and act only on what is where you are."""
    """How an agent acts here, for its system prompt."""

    def __init__(self, max_steps: int = 30, *, call_timeout_s: float = 60.0, render_mode: str | None = None) -> None:
        if max_steps < 1:
            raise ConfigError(f"max_steps is {max_steps}: it must be at least 1")
        if not call_timeout_s > 0:
            raise ConfigError(f"call_timeout_s is {call_timeout_s}: it must be above 0 seconds")
        if render_mode not in (None, "ansi"):
            raise ConfigError(f"render_mode is {render_mode!r}: it may be None or 'ansi'")
        self.max_steps = max_steps
        self.call_timeout_s = call_timeout_s
        self.render_mode = render_mode
        self.observation_space = text_space()
        self.action_space = text_space()
        self._engine: alfworld_process.Engine | None = None
        self._over = True
        self._text = ""
        self._won = False
        self._moves = 0
        self._admissible = False

    @classmethod
    def tasks(cls, split: Split) -> tuple[Task, ...]:
        """All tasks of a split, kind after kind."""
        return games.source().tasks(Split(split))

    @classmethod
    def ready(cls) -> None:
        """Raises ConfigError where the engine is not installed."""
        games.require_packages()

    @classmethod
    def label(cls) -> str:
        """Which games are played, for results."""
        return games.source().label

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start a task: `options["task"]`, or a training task that the seed picks.

        Raises:
            UnknownTaskError: no such task.
            EngineError: the engine died or hung; call again for a fresh one.
        """
        super().reset(seed=seed)
        options = options or {}
        if wrong := [key for key in options if key not in _OPTIONS]:
            raise ConfigError(f"reset has no option {wrong[0]!r}: it knows {', '.join(_OPTIONS)}")
        name = options.get("task")
        if name is None:
            train = self.tasks(Split.TRAIN)
            name = train[int(self.np_random.integers(len(train)))].name
        game = games.source().game(str(name))
        self._over, self._won, self._moves = True, False, 0
        self._admissible = bool(options.get("admissible"))
        answer = self._fresh_engine().load(game.domain, game.grammar, game.problem, admissible=self._admissible)
        self._text = answer["text"]
        info = {"task": name, "task_text": game.task_text, **self._info(answer)}
        if options.get("expert_plan"):
            info["expert_plan"] = game.plan
        self._over = False
        return self._text, info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take one action. The reward is 1 when it reaches the goal, else 0.

        Raises:
            ResetNeeded: the episode is over, or none was started.
            EngineError: the engine died or hung; the episode is lost.
        """
        if self._over or self._engine is None:
            raise ResetNeeded("The episode is over: call reset() before step().")
        self._over = True  # until the engine has answered
        answer = self._engine.step(action, admissible=self._admissible)
        self._text, self._won = answer["text"], answer["won"]
        self._moves += 1
        truncated = not self._won and self._moves >= self.max_steps
        self._over = self._won or truncated
        return self._text, float(self._won), self._won, truncated, self._info(answer)

    def render(self) -> str | None:  # type: ignore[override]  # gymnasium names no text type
        """The last observation."""
        return self._text if self.render_mode == "ansi" else None

    def close(self) -> None:
        """End the engine."""
        self._over = True
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _info(self, answer: dict[str, Any]) -> dict[str, Any]:
        score = int(self._won)
        info = {"score": score, "success": self._won, "outcome": float(score), "moves": self._moves}
        return info | ({"admissible": tuple(answer["commands"])} if self._admissible else {})

    def _fresh_engine(self) -> alfworld_process.Engine:
        if self._engine is not None and not self._engine.usable:
            self.close()
        if self._engine is None:
            self._engine = alfworld_process.start(self.call_timeout_s)
        return self._engine


def _generate(out: Path, counts: dict[Split, int], seed: int, processes: int) -> None:
    from envs.alfworld_generate import make_games

    if low := [name for name, value in [*counts.items(), ("processes", processes)] if value < 1]:
        raise ConfigError(f"--{low[0]} must be at least 1")
    games.require_packages()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be made ({error.strerror}): name a folder that can") from None
    made = make_games(counts, seed, processes, lambda line: print(line, file=sys.stderr, flush=True))
    (out / games.FILE).write_text(games.encode(made), encoding="utf-8")
    sizes = " / ".join(str(len(made[split])) for split in Split)
    print(f"{out / games.FILE}: train / dev / test = {sizes} games; export ALFWORLD_DATA={out} to play them")


def _verify() -> None:
    env, failed, count = ALFWorldEnv(max_steps=1000), [], 0
    for task in (task for split in Split for task in env.tasks(split)):
        _, info = env.reset(options={"task": task.name, "expert_plan": True})
        for action in info["expert_plan"]:
            *_, over, _, info = env.step(action)
            if over:
                break
        count += 1
        failed += [] if info["success"] else [task.name]
        print(f"\r{count} played, {len(failed)} not won", end="", file=sys.stderr, flush=True)
    env.close()
    print(f"\n{env.label()}: {count} plans played, {len(failed)} not won", *failed, sep="\n  ")
    if failed:
        raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m envs.alfworld generate | verify`."""
    from envs.alfworld_generate import COUNTS

    parser = argparse.ArgumentParser(prog="python -m envs.alfworld", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", help="make games of our own, each verified by playing it")
    generate.add_argument("--out", type=Path, required=True, help=f"folder for {games.FILE}")
    for split, count in COUNTS.items():
        generate.add_argument(f"--{split}", type=int, default=count, help=f"{split} games (default: {count})")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    commands.add_parser("verify", help="play every stored plan to its end")
    args = parser.parse_args(argv)
    try:
        if args.command == "verify":
            _verify()
        else:
            _generate(args.out, {split: getattr(args, split) for split in Split}, args.seed, args.processes)
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
