"""The owner's side of ALFWorld's engines: one process for each environment, killed when it hangs.

What always holds:

* the first engine starts a nursery (see `alfworld_engine`), from which this and the further ones are forked: another
  engine takes milliseconds and 40 MB. The nursery is a process of its own with one thread, so that forking is safe;
* each call has a deadline. An engine that hangs is killed; one that is gone raises `EngineError`, in one line;
* engines and nursery end with their owner, also when it is killed: they wait for the end of sockets whose other ends
  only the owner holds. A forked child never uses its parent's: it closes what it inherited and starts its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import Any, NoReturn

from envs.alfworld_games import require_packages
from envs.errors import EngineError

__all__ = ["MAX_LOADS", "Engine", "shutdown", "start"]

MAX_LOADS = 500
"""Loads after which an engine is replaced, should its memory grow."""
START_TIMEOUT_S = 120.0
"""Seconds that the nursery may take to load TextWorld."""


_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ALFWORLD_DATA": tempfile.gettempdir(),
}
"""Of the nursery: the same order in every set, one thread, and a folder that importing alfworld does not make."""


class Engine:
    """One engine process. Every method raises `EngineError` when it fails."""

    def __init__(self, link: socket.socket, pid: int, timeout_s: float) -> None:
        self.pid, self.owner, self.timeout_s = pid, os.getpid(), timeout_s
        self.loads = 0
        self._link = link
        self._broken = ""

    @property
    def usable(self) -> bool:
        """Whether a new episode may start here."""
        return not self._broken and self.loads < MAX_LOADS

    def load(self, domain: str, grammar: str, problem: str, *, admissible: bool = False) -> dict[str, Any]:
        """Start a game. Return `text`, `won` and, if asked for, `commands`."""
        self.loads += 1
        game = {"domain": domain, "grammar": grammar, "problem": problem}
        return self._call("load", {"load": game, "admissible": admissible})

    def step(self, action: str, *, admissible: bool = False) -> dict[str, Any]:
        """Take an action. Return as `load` does."""
        return self._call("step", {"step": action, "admissible": admissible})

    def _call(self, what: str, request: dict[str, Any]) -> dict[str, Any]:
        if self._broken:
            raise EngineError(self._broken)
        try:
            answer: dict[str, Any] = json.loads(self._exchange(json.dumps(request).encode() + b"\n"))
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self._fail(f"did not answer {what!r} within {self.timeout_s:g} s and was killed")
        except (OSError, ValueError):
            self._fail("died")
        except BaseException:  # KeyboardInterrupt: the answer would be read by the next call
            self.close()
            raise
        if "error" in answer:
            self._fail(f"raised {answer['error']} in {what!r}")
        return answer

    def _exchange(self, request: bytes) -> bytes:
        end, data = time.monotonic() + self.timeout_s, b""
        self._link.settimeout(self.timeout_s)
        self._link.sendall(request)
        while not data.endswith(b"\n"):
            self._link.settimeout(max(1e-3, end - time.monotonic()))
            if not (chunk := self._link.recv(1 << 16)):
                raise ConnectionError
            data += chunk
        return data

    def _fail(self, why: str) -> NoReturn:
        self.close(f"ALFWorld's engine process {self.pid} {why}: reset the environment to go on afresh")
        raise EngineError(self._broken) from None

    def close(self, why: str = "this engine was closed: reset the environment") -> None:
        """End the process. May be called again."""
        self._broken = self._broken or why
        self._link.close()

    def abandon(self) -> None:
        """Make the copy in a forked child unusable, leaving the parent's untouched."""
        self.close(f"this engine belongs to process {self.owner}: reset the environment to start one here")


class _Nursery:
    """The process from which engines are forked."""

    def __init__(self) -> None:
        require_packages()
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_TIMEOUT_S)
        # -P: the current folder may hold an `envs` of its own.
        command = [sys.executable, "-P", "-m", "envs.alfworld_engine", str(theirs.fileno())]
        path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            command,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the owner's to handle
            env=os.environ | _ENVIRONMENT | {"PYTHONPATH": path},
        )
        theirs.close()
        try:
            self._number()
        except OSError:
            self.kill()
            raise EngineError(
                f"ALFWorld's engine did not start within {START_TIMEOUT_S:.0f} s (exit code "
                f"{self.process.returncode}, {sys.executable}): free some memory, or reinstall textworld"
            ) from None

    def _number(self) -> int:
        """The process id that the nursery says next. Raises OSError."""
        data = b""
        while len(data) < 8:
            if not (chunk := self._control.recv(8 - len(data))):
                raise ConnectionError
            data += chunk
        return int(struct.unpack("!q", data)[0])

    def fork(self, timeout_s: float) -> Engine:
        """Another engine. Raises OSError where the nursery is gone."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [b"+"], [theirs.fileno()])
                return Engine(ours, self._number(), timeout_s)
            except BaseException:  # also KeyboardInterrupt: the answer would be read by the next call
                ours.close()
                self.kill()
                raise

    def kill(self) -> None:
        """End it at once; engines that it forked live on."""
        self._control.close()
        self.process.kill()
        self.process.wait()

    def abandon(self) -> None:
        """Close what a forked child inherited; the process belongs to the parent."""
        self._control.close()
        self.process.returncode = 0  # not our child: nothing to wait for


_lock = threading.Lock()
_nursery: _Nursery | None = None
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def start(timeout_s: float = 60.0) -> Engine:
    """An engine of this process.

    Args:
        timeout_s: seconds that any one call of the engine may take.
    """
    global _nursery
    with _lock:
        try:
            _nursery = _nursery or _Nursery()
            engine = _nursery.fork(timeout_s)
        except OSError:  # it was killed: no episode is lost, and another takes its place
            _nursery = _Nursery()
            try:
                engine = _nursery.fork(timeout_s)
            except OSError as error:
                raise EngineError(f"ALFWorld's engine can't be started ({error!r}): reset the environment") from None
        _engines.add(engine)
        return engine


def shutdown() -> None:
    """End the engines of this process now; environments start a fresh one at their next reset."""
    global _nursery
    with _lock:
        for engine in list(_engines):
            engine.close()
        if _nursery is not None:
            _nursery.kill()
            _nursery = None


def _after_fork() -> None:
    global _lock, _nursery
    _lock = threading.Lock()
    for engine in list(_engines):
        engine.abandon()
    _engines.clear()
    if _nursery is not None:
        _nursery.abandon()
        _nursery = None


os.register_at_fork(after_in_child=_after_fork)
atexit.register(shutdown)
