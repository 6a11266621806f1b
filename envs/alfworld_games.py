"""Where ALFWorld's games come from: the official ones in `$ALFWORLD_DATA`, or those of our own that ship with us.

`ALFWORLD_DATA` names a folder that `alfworld-download` filled, or one that `python -m envs.alfworld generate` wrote.
Task names are "<kind>/<object>-None-<furniture>-<scene>-<number or trial>". What always holds: a game that is listed
has a plan stored with it, so that nothing plans later; a folder that is not whole is refused, in one line. A game's
grammar holds Python expressions, which TextWorld evaluates: play only games from those whom you trust.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from envs import alfworld_layouts as layouts
from envs.base import Split, Task
from envs.cache import cache_folder, keep
from envs.errors import ConfigError, UnknownTaskError

__all__ = ["ENV_ID", "FILE", "Game", "OfficialGames", "OwnGames", "Source", "encode", "require_packages", "source"]

ENV_ID = "ALFWorld-v0"
FILE = "alfworld_games.json"
"""Games of our own."""
FORMAT = 1
SHIPPED = Path(__file__).parent / "data"
_NAME = re.compile(r"[\w+-]+/[\w+-]+")
_PACKAGES = ("alfworld", "textworld", "fast_downward")
_MADE = "the games come with alfworld-download (export ALFWORLD_DATA=FOLDER; alfworld-download)"


@dataclass(frozen=True, slots=True)
class Game:
    """What the engine and the agent need of a game."""

    task_text: str
    domain: str
    """Rules, in PDDL."""
    grammar: str
    """Texts, with the goal's sentence left out, so that the games share one."""
    problem: str
    """World and goal, in PDDL."""
    plan: tuple[str, ...]
    """Actions that win."""


class Source(Protocol):
    """A set of games."""

    label: str
    """Says in results which games were played."""

    def tasks(self, split: Split) -> tuple[Task, ...]:
        """All games of a split."""
        ...

    def game(self, name: str) -> Game:
        """The game of a task. Raises UnknownTaskError."""
        ...


def source() -> Source:
    """The games that `ALFWORLD_DATA` names, else those that ship with this package. Raises ConfigError."""
    return _source(os.environ.get("ALFWORLD_DATA", ""))


@functools.lru_cache(maxsize=4)
def _source(folder: str) -> Source:
    if not folder:
        return OwnGames(SHIPPED / FILE)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ConfigError(f"ALFWORLD_DATA is {folder!r}, which is no folder: unset it for games of our own, or {_MADE}")
    return OwnGames(path / FILE) if (path / FILE).is_file() else OfficialGames(path)


def require_packages() -> None:
    """Raises ConfigError where the engine is not installed."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise ConfigError(
            f"The environment {ENV_ID} found no package {missing[0]}: make alfworld, or pip install "
            "'bopo_ray[alfworld]' (parts of it are built from source, which needs make, gcc and g++)"
        )


def _unknown(name: object, games: Source) -> UnknownTaskError:
    names = [task.name for split in Split for task in games.tasks(split)]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    return UnknownTaskError(
        f"ALFWorld has no task {name!r} ({games.label}): did you mean {close[0]!r}? (all: ALFWorldEnv.tasks)"
    )


class OwnGames:
    """Games of our own, in one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tasks: dict[Split, tuple[Task, ...]] = {}
        self._records: dict[str, dict[str, Any]] = {}
        try:
            data = path.read_bytes()
            record = json.loads(data)
            self._made_for, known = str(record["alfworld"]), record["format"] == FORMAT
            for split in Split:
                self._records |= record[split]
                self._tasks[split] = tuple(Task(ENV_ID, name, split) for name in record[split])
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path} can't be read ({why}): python -m envs.alfworld generate --out FOLDER") from None
        # Two files may name two games alike: the label tells them apart, in results and when a run is continued.
        other = "" if path.parent == SHIPPED else f" ({hashlib.sha256(data).hexdigest()[:8]})"
        self.label = f"ALFWorld engine, own layouts{other}"
        if not known:
            raise ConfigError(
                f"{path} has format {record['format']}, not {FORMAT}: python -m envs.alfworld generate --out FOLDER"
            )

    def tasks(self, split: Split) -> tuple[Task, ...]:
        """All games of a split, kind after kind."""
        return self._tasks[split]

    def layout(self, name: str) -> layouts.Layout:
        """What stands where in a game."""
        if name not in self._records:
            raise _unknown(name, self)
        kind, _, rest = name.partition("/")
        thing, _, place, scene, _ = rest.split("-")
        record = self._records[name]
        things = [entry.split() for entry in record["things"].split(",")]
        return layouts.Layout(
            kind, thing, place, int(scene), record["wording"], tuple((other, int(at)) for other, at in things)
        )

    def game(self, name: str) -> Game:
        """Builds the game of a task."""
        layout = self.layout(name)
        require_packages()
        if (installed := version("alfworld")) != self._made_for:
            raise ConfigError(
                f"{self._path} was made with alfworld {self._made_for}, and {installed} is installed: "
                f"pip install alfworld=={self._made_for}, or python -m envs.alfworld generate --out FOLDER"
            )
        plan = tuple(self._records[name]["plan"].split(";"))
        return Game(layouts.task_text(layout), *layouts.domain_and_grammar(), layouts.problem(layout), plan)


def encode(games: dict[Split, dict[str, tuple[layouts.Layout, tuple[str, ...]]]]) -> str:
    """The file of `OwnGames`, a game a line."""
    try:
        made_for = version("alfworld")
    except PackageNotFoundError:
        made_for = "none"
    parts = [f'{{"alfworld": "{made_for}", "format": {FORMAT}']
    for split, named in games.items():
        lines = []
        for name, (layout, plan) in named.items():
            things = ",".join(f"{thing} {at}" for thing, at in layout.things)
            record = {"wording": layout.wording, "things": things, "plan": ";".join(plan)}
            lines.append(f'"{name}": {json.dumps(record, separators=(",", ":"))}')
        parts.append(f'"{split}": {{\n' + ",\n".join(lines) + "}")
    return ",\n".join(parts) + "}\n"


class OfficialGames:
    """The published games: `train`, `valid_seen` (our dev) and `valid_unseen` (our test)."""

    FOLDERS = {Split.TRAIN: "train", Split.DEV: "valid_seen", Split.TEST: "valid_unseen"}  # noqa: RUF012
    DATA = "json_2.1.1"
    _SENTENCE = re.compile(r'(?<="Your task is to: )[^"\n]*(?=")')

    def __init__(self, folder: Path) -> None:
        self.label = "ALFWorld engine, official games"
        self._folder, self._root = folder, folder / self.DATA
        if rest := sorted(folder.glob("*.zip")):
            raise ConfigError(f"ALFWORLD_DATA={folder} is half downloaded ({rest[0].name} is there): {_MADE} -f")
        missing = [name for name in self.FOLDERS.values() if not (self._root / name).is_dir()]
        if missing:
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
            raise ConfigError(
                f"ALFWORLD_DATA={folder} has no {self.DATA}/{missing[0]} (it has {found}): {_MADE}, "
                f"and games of our own with python -m envs.alfworld generate --out FOLDER"
            )

    def tasks(self, split: Split) -> tuple[Task, ...]:
        """All solvable games of a split, by name."""
        return self._index[split]

    @functools.cached_property
    def _index(self) -> dict[Split, tuple[Task, ...]]:
        files = {split: list(self._files(split)) for split in Split}
        if empty := [split for split, found in files.items() if not found]:
            raise ConfigError(
                f"{self._root / self.FOLDERS[empty[0]]} holds no game.tw-pddl: the download was not finished; {_MADE}"
            )
        stats = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for f in files.values() for _, path in f]
        stamp = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        kept = cache_folder("alfworld-index") / f"{stamp}.json"
        try:
            names: dict[str, list[str]] = json.loads(kept.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            print(f"Indexing {len(stats)} ALFWorld games in {self._root} (once)", file=sys.stderr, flush=True)
            names = {split: [n for n, path in found if self._read(path)["solvable"]] for split, found in files.items()}
            keep(kept, json.dumps(names).encode())
        return {split: tuple(Task(ENV_ID, name, split) for name in names[split]) for split in Split}

    def _files(self, split: Split) -> Iterator[tuple[str, Path]]:
        """Name and file of each game, sorted."""
        for path in sorted((self._root / self.FOLDERS[split]).glob("*/trial_*/game.tw-pddl")):
            kind, _, rest = path.parents[1].name.partition("-")
            if kind in layouts.KINDS and "Sliced" not in rest:
                yield f"{kind}/{rest}-{path.parent.name}", path

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            grammar = record["grammar"]
            record["solvable"] = bool(record["solvable"] and record["walkthrough"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path} is no whole game ({why}): {_MADE} -f") from None
        if "move {o} to {r}" not in grammar:
            raise ConfigError(
                f"{path} was made by an older alfworld (its agents 'put', since 0.4 they 'move'): {_MADE} -f"
            )
        return record

    def game(self, name: str) -> Game:
        """Reads the game of a task."""
        kind, _, rest = name.partition("/")
        rest, _, trial = rest.rpartition("-trial_")
        inside = f"{kind}-{rest}/trial_{trial}/game.tw-pddl"
        found = [path for folder in self.FOLDERS.values() if (path := self._root / folder / inside).is_file()]
        if not _NAME.fullmatch(name) or not found or not (record := self._read(found[0]))["solvable"]:
            raise _unknown(name, self)
        sentence = self._SENTENCE.search(record["grammar"])
        return Game(
            f"Your task is to: {sentence[0] if sentence else 'see the goal'}",
            record["pddl_domain"],
            self._SENTENCE.sub("UNKNOWN GOAL.", record["grammar"], count=1),
            record["pddl_problem"],
            tuple(record["walkthrough"]),
        )
