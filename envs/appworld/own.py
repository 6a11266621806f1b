"""Tasks of our own on AppWorld's engine: built, played once each, and kept.

The usual ones are built once for each version of their sources and lie in the cache folder; `make` writes as many
others as one wants to a folder, for APPWORLD_ROOT. Nothing of them is shipped, since the API documents and databases
that come with them are from AppWorld's protected part.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from envs.appworld import client
from envs.appworld.engine import kinds
from envs.base import Split, Task
from envs.cache import cache_folder
from envs.errors import ConfigError, EngineError

__all__ = [
    "COUNTS", "ENV_ID", "HOW", "SEED", "fingerprint", "listed", "make", "plan", "seed_of", "usual", "usual_tasks",
    "verify",
]  # fmt: skip

ENV_ID = "AppWorld-v0"
HOW = "python -m envs.appworld generate --out FOLDER"
COUNTS = {Split(split): count * len(kinds.KINDS) for split, count in kinds.COUNTS.items()}
"""The usual tasks of each split."""
SEED = 0
"""Theirs."""
VERIFIED = "dacd76a5eef5607f6bc132e49d5024622f5cd37867d3c6a503f50abc24441110"
"""Their fingerprint, when `verify` had played each of them: the same ones need it no more."""
MARK = "own.json"
"""Lies in a folder that `make` wrote, and says from which counts and seed."""
MAKING = ".making-"
"""How the names of folders begin in which tasks are made."""
REPORT = 40
"""So many tasks are played between two lines that say how far it is."""


@functools.cache
def usual_tasks(split: Split) -> tuple[Task, ...]:
    """The usual tasks of a split, whether or not they have been built."""
    counts = list(kinds.COUNTS.values())
    at = list(Split).index(split)
    numbers = range(1 + sum(counts[:at]), 1 + sum(counts[: at + 1]))
    return tuple(Task(ENV_ID, f"{kind}/{number}", split) for kind in kinds.KINDS for number in numbers)


def seed_of(root: Path) -> int | None:
    """The seed of the tasks in a folder that `make` wrote, by which tasks of one name differ; None for another folder.

    Raises:
        ConfigError: the folder's mark is damaged.
    """
    try:
        return int(json.loads((root / MARK).read_text(encoding="utf-8"))["seed"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{root / MARK} can't be read: make the tasks anew, {HOW}") from None


def usual() -> Path:
    """The folder of the usual tasks; built (half a minute) unless it is there. It holds verified tasks only.

    Processes that ask at once wait for the one that builds.
    """
    root = cache_folder("appworld")
    target = root / _version()
    if target.is_dir():
        return target
    client.find_python()
    _nameable(root, "set BOPO_RAY_CACHE to another")
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            print(f"Building AppWorld tasks of our own in {target} (once, half a minute)", file=sys.stderr)
            with _making(root, COUNTS, SEED) as world:
                if fingerprint(world / "data") != VERIFIED:
                    print("They differ from those that were verified, so each is played (minutes)", file=sys.stderr)
                    verify(world / "data", listed(world / "data"))
                os.replace(world, target)
    return target


def make(out: Path, counts: Mapping[Split, int], seed: int) -> None:
    """Writes `out`, with so many tasks of each split, each of them played (a second of a core each).

    Raises:
        ConfigError: `out` is there and not empty, can't be made, or has a name that the engine refuses; or a count is
            no positive multiple of the number of kinds.
        EngineError: a task is wrong.
    """
    size = len(kinds.KINDS)
    for split, count in counts.items():
        if count < size or count % size:
            raise ConfigError(f"--{split} is {count}: it must be a multiple of {size}, the number of kinds")
    client.find_python()
    _nameable(out.resolve(), "name another --out")
    try:
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"--out {out} is not empty: name a folder that is, or a new one")
        out.parent.mkdir(parents=True, exist_ok=True)
        with _making(out.resolve().parent, counts, seed) as world:
            verify(world / "data", listed(world / "data"))
            by_name = {str(split): count for split, count in counts.items()}
            (world / MARK).write_text(json.dumps({"counts": by_name, "seed": seed}) + "\n", encoding="utf-8")
            os.replace(world, out)
    except OSError as error:
        raise ConfigError(f"--out {out} can't be made ({error.strerror}): name a folder that can") from None


def _nameable(folder: Path, mend: str) -> None:
    if "memory" in str(folder):
        raise ConfigError(f"AppWorld takes no folder with 'memory' in its name ({folder}): {mend}")


@contextmanager
def _making(root: Path, counts: Mapping[Split, int], seed: int) -> Iterator[Path]:
    """A folder with the tasks, removed in the end, as are those that killed processes have left."""
    for left in root.glob(f"{MAKING}*"):
        _remove_left(left)
    making = Path(tempfile.mkdtemp(prefix=MAKING, dir=root))
    held = os.open(making, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_SH)
        client.build(making / "world", seed, [counts[split] // len(kinds.KINDS) for split in Split])
        yield making / "world"
    finally:
        shutil.rmtree(making, ignore_errors=True)
        os.close(held)


def _remove_left(making: Path) -> None:
    """Removes the folder, unless a process holds it: that ends with the process."""
    with suppress(OSError):
        fd = os.open(making, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(making, ignore_errors=True)
        finally:
            os.close(fd)


@functools.cache
def _version() -> str:
    digest = hashlib.sha256(f"{client.VERSION} {SEED}".encode())
    for file in ("build.py", "check.py", "kinds.py"):
        digest.update((client.ENGINE / file).read_bytes())
    return digest.hexdigest()[:12]


def fingerprint(data: Path) -> str:
    """SHA-256 over the tasks of a world: what they say, start from and are judged by."""
    digest = hashlib.sha256()
    for file in sorted(file for part in ("datasets", "tasks") for file in (data / part).rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(data)} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def listed(data: Path, *splits: Split) -> list[str]:
    """The tasks of a world, or of these splits of it, as AppWorld names them ("pay-contact_3")."""
    names = [data / "datasets" / ("test_normal.txt" if s is Split.TEST else f"{s}.txt") for s in splits or Split]
    return [i for name in names for i in name.read_text(encoding="utf-8").split()]


def plan(data: Path, task: str, which: str = "right") -> tuple[str, ...]:
    """The right or a wrong solution of a task, action by action."""
    file = data / "tasks" / task / "ground_truth" / "plan.json"
    return tuple(json.loads(file.read_text(encoding="utf-8"))[which])


def verify(data: Path, tasks: Sequence[str]) -> None:
    """Play these tasks on the engine, on as many processes as there are cores, and say how far it is.

    Raises:
        EngineError: a right solution failed, or a wrong one or doing nothing succeeded.
    """
    with closing(client.Server(data)) as server, ThreadPoolExecutor(os.cpu_count()) as pool:
        verdicts = pool.map(lambda task: _verdict(server, data, task), tasks)
        for count, (task, verdict) in enumerate(zip(tasks, verdicts, strict=True), start=1):
            if verdict != (False, True, False):
                raise EngineError(
                    f"our task {task} is wrong: doing nothing, the right and a wrong solution succeed {verdict}"
                )
            if count % REPORT == 0:
                print(f"{count} of {len(tasks)} tasks played", file=sys.stderr, flush=True)


def _verdict(server: client.Server, data: Path, task: str) -> tuple[bool, bool, bool]:
    with closing(client.Session(server, task, 60)) as session:
        nothing = session.evaluate()[0]
        right = _play(session, plan(data, task))
    with closing(client.Session(server, task, 60)) as session:
        return nothing, right, _play(session, plan(data, task, "wrong"))


def _play(session: client.Session, actions: tuple[str, ...]) -> bool:
    completed = [session.execute(line)[1] for line in actions]
    return completed == [False] * (len(actions) - 1) + [True] and session.evaluate()[0]
