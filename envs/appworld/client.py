"""AppWorld's engine as seen from here: a server process in a virtual environment of its own, and sessions with it.

One server serves all environments of a process, and forks a child for each episode (see `engine.server`). What always
holds: every answer has a deadline, and a child that misses it is killed; a child's answers are text from a hostile
process, read with a bound and never trusted; the server ends with this process, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import platform
import re
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from envs.errors import ConfigError, EngineError

__all__ = ["VERSION", "Hung", "Server", "Session", "acquire", "build", "find_python", "shutdown"]

VERSION = "0.1.3.post1"
"""Of the package appworld that this was written against."""
START_TIMEOUT_S = 120.0
"""Seconds that the server may take to load the engine."""
MAX_MESSAGE = 1 << 20
ENGINE = Path(__file__).parent / "engine"
_KEPT = ("HOME", "LANG", "PATH", "TMPDIR", "TZ")
"""What the server inherits of this process's environment: no keys, no tokens."""
ENDED = "The code ended its interpreter: too much memory, or a forbidden call."
_ADDRESS = re.compile(r"\b0x[0-9a-f]{6,16}\b")


class Hung(Exception):  # noqa: N818 (not an error of ours: the model's code did it)
    """The child did not answer in time, or ended, while it ran a model's code."""


def find_python() -> Path:
    """Python of AppWorld's virtual environment: BOPO_RAY_APPWORLD, or .venv-appworld here or beside this package.

    Raises:
        ConfigError: there is none, or it holds another version or half of AppWorld.
    """
    named = os.environ.get("BOPO_RAY_APPWORLD")
    places = [Path(named)] if named else [Path.cwd(), Path(__file__).resolve().parents[2]]
    folders = places if named else [place / ".venv-appworld" for place in places]
    folder = next((f for f in folders if (f / "bin" / "python").exists()), None)
    if folder is None:
        raise ConfigError(
            f"AppWorld needs a virtual environment of its own and there is none in {folders[0]}: run `make appworld`, "
            "or set BOPO_RAY_APPWORLD to one"
        )
    found = [p.stem.split("-")[1] for p in folder.glob("lib/python*/site-packages/appworld-*.dist-info")]
    if found != [VERSION]:
        raise ConfigError(
            f"AppWorld's virtual environment {folder} holds appworld {found[0] if found else 'nowhere'}, and {VERSION} "
            "is needed: run `make appworld`"
        )
    if not any(folder.glob("lib/python*/site-packages/appworld/apps/venmo")):
        raise ConfigError(
            f"AppWorld in {folder} is not unpacked: run `make appworld`, or {folder}/bin/appworld install"
        )
    return folder / "bin" / "python"


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | {"PYTHONHASHSEED": "0"}


def build(root: Path, seed: int, counts: Sequence[int]) -> None:
    """Build our own world in `root`, a folder that does not exist yet: so many tasks of each kind in train, dev and
    test (20 s for the usual 15).

    Raises:
        EngineError: the engine failed, or did not end in ten minutes and one more for each task of a kind.
    """
    numbers = [str(number) for number in (seed, *counts)]
    command = [str(find_python()), "-I", str(ENGINE / "build.py"), str(root), *numbers]
    limit_s = 600 + 60 * sum(counts)
    try:
        done = subprocess.run(command, env=_environment(), cwd="/", capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"AppWorld's engine did not build our tasks within {limit_s} s: try again while the machine has less to do"
        ) from None
    if done.returncode != 0:
        raise EngineError(f"AppWorld's engine could not build our tasks: {_last_line(done.stderr)}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1][:300]


class Server:
    """The server process of one data folder.

    Its `folder` holds the episodes' files; it is removed when the server has ended, however it ends.
    """

    def __init__(self, data: Path) -> None:
        if (system := platform.system()) != "Linux":
            raise ConfigError(f"AppWorld-v0 runs on Linux only, and this is {system}: it confines what agents write")
        python = find_python()
        if "memory" in (folder := tempfile.gettempdir()):
            raise ConfigError(f"AppWorld takes no temporary folder with 'memory' in its name ({folder}): set TMPDIR")
        self.data = data
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._failure = ""
        self._control, theirs = socket.socketpair()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        command = [str(python), "-I", str(ENGINE / "server.py"), str(theirs.fileno()), str(self.owner), str(data)]
        # A session of its own: Ctrl-C is the owner's to handle.
        self.process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            env=_environment(),
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,
        )
        theirs.close()
        try:
            self._control.settimeout(START_TIMEOUT_S)
            hello = _message(self._control)
            self.version, self.folder = str(hello["version"]), Path(hello["folder"])
        except (OSError, ValueError, KeyError, TypeError):
            self.kill("did not start")
            self._errors.seek(0)
            why = _last_line(self._errors.read().decode(errors="replace"))
            raise EngineError(f"AppWorld's server did not start ({why}): run `make appworld`") from None

    @property
    def usable(self) -> bool:
        """Whether a new episode may start here."""
        return self.owner == os.getpid() and not self._failure and self.process.poll() is None

    def fork(self, message: dict[str, Any]) -> tuple[int, socket.socket]:
        """Start a child; returns its process id and the channel to it."""
        answer, fds = self._ask(message)
        return int(answer["pid"]), socket.socket(fileno=fds[0])

    def end(self, pid: int) -> None:
        """Kill a child and drop what it left."""
        _close_all(self._ask({"op": "end", "pid": pid})[1])

    def _ask(self, message: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        with self._lock:
            if not self.usable:
                why = self._failure or f"died (exit code {self.process.returncode})"
                raise EngineError(f"AppWorld's server {self.process.pid} {why}: reset the environment to go on afresh")
            try:
                self._control.settimeout(START_TIMEOUT_S)
                _send(self._control, message)
                return _receive(self._control)
            except (OSError, ValueError):
                self.kill("died or hung and was killed")
                raise EngineError(
                    f"AppWorld's server {self.process.pid} {self._failure}: reset the environment to go on afresh"
                ) from None

    def close(self) -> None:
        """End the server and its children."""
        self.kill("was shut down")

    def kill(self, why: str) -> None:
        """End the server; its children end with it."""
        self._failure = self._failure or why
        self._control.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


class Session:
    """One episode: a child that has loaded one task and runs the code of one agent.

    Args:
        timeout_s: seconds that one action may run; then its process is killed.
    """

    def __init__(self, server: Server, task: str, timeout_s: float) -> None:
        self.server, self.task, self.timeout_s = server, task, timeout_s
        self._history: list[str] = []
        self.instruction = ""
        self.layers: dict[str, bool] = {}
        """Layer of confinement -> whether it is in force."""
        self._start()

    def _start(self) -> None:
        message = {"op": "episode", "task": self.task}
        self.pid, self._channel = self.server.fork(message)
        try:
            self._channel.settimeout(START_TIMEOUT_S)
            hello = _message(self._channel)
            self.instruction, self.layers = str(hello["instruction"]), dict(hello["layers"])
        except (OSError, ValueError, KeyError) as error:
            why = _last_line(hello.get("error", "")) if isinstance(error, KeyError) else "its process died or hung"
            self.close()
            raise EngineError(f"AppWorld could not load the task {self.task} ({why}): reset the environment") from None

    def execute(self, code: str) -> tuple[str, bool]:
        """Run a model's code. Returns its output and whether the task was marked complete.

        Code that kills its process, or does not end, is undone: a fresh process repeats the actions before it, which
        do again what they did, unless they drew random bytes from the system itself.
        """
        try:
            output, completed = self._execute(code)
        except Hung as hung:
            self._start_again()
            return f"Execution failed. {hung} Everything that this action did was undone.", False
        self._history.append(code)
        return output, completed

    def _execute(self, code: str) -> tuple[str, bool]:
        answer = self._ask({"code": code})
        try:
            text, length = str(answer["output"]), int(answer["length"])
        except (ValueError, KeyError, TypeError):
            raise Hung(ENDED) from None
        if length > len(text):
            text += f"\n[{length - len(text)} more characters]"
        return _ADDRESS.sub("0x...", text), answer.get("completed") is True

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The child's answer, from a process that a model's code may have made its own."""
        if not self.server.usable:
            self.server.end(self.pid)  # raises what happened to it
        try:
            self._channel.settimeout(self.timeout_s)
            _send(self._channel, message)
            return _message(self._channel)
        except TimeoutError:
            raise Hung(f"The code did not end within {self.timeout_s:g} s.") from None
        except (OSError, ValueError):
            if not self.server.usable:
                self.server.end(self.pid)
            raise Hung(ENDED) from None

    def _start_again(self) -> None:
        self.close()
        self._start()
        try:
            for code in self._history:
                self._execute(code)
        except Hung as hung:
            self.close()
            raise EngineError(
                f"AppWorld could not repeat the episode of {self.task} ({hung}): reset the environment to go on afresh"
            ) from None

    def evaluate(self) -> tuple[bool, int, int]:
        """Judge the episode as it stands: whether it passes, passed tests, tests.

        One whose code has made saving impossible fails.
        """
        try:
            self._ask({"save": True})
        except Hung:
            return False, 0, 1
        pid, channel = self.server.fork({"op": "evaluation", "task": self.task, "episode": self.pid})
        try:
            channel.settimeout(START_TIMEOUT_S)
            answer = _message(channel)
            return bool(answer["success"]), int(answer["passed"]), int(answer["tests"])
        except (OSError, ValueError, KeyError) as error:
            why = _last_line(answer.get("error", "")) if isinstance(error, KeyError) else "its process died or hung"
            raise EngineError(f"AppWorld could not evaluate {self.task} ({why}): reset the environment") from None
        finally:
            channel.close()
            self.server.end(pid)

    def close(self) -> None:
        """End the child. May be called again."""
        self._channel.close()
        if self.server.usable:
            with contextlib.suppress(EngineError):
                self.server.end(self.pid)


def _send(channel: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    channel.sendall(struct.pack("!I", len(data)) + data)


def _message(channel: socket.socket) -> dict[str, Any]:
    """The next message, as `_receive` has it; a file descriptor that came along, unasked, is closed."""
    message, fds = _receive(channel)
    _close_all(fds)
    return message


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and what file descriptors came with it.

    Raises:
        TimeoutError: none came within the channel's timeout, all in all.
        ValueError: it is none of ours, or the other end is gone.
    """
    deadline = time.monotonic() + (channel.gettimeout() or START_TIMEOUT_S)
    head, fds, _, _ = socket.recv_fds(channel, 4, 1)
    try:
        return _rest(channel, head, deadline), fds
    except BaseException:
        _close_all(fds)
        raise


def _rest(channel: socket.socket, head: bytes, deadline: float) -> dict[str, Any]:
    """The message whose first bytes are `head`."""
    size = struct.unpack("!I", head + _exactly(channel, 4 - len(head), deadline))[0]
    if size > MAX_MESSAGE:
        raise ValueError(f"a message of {size} bytes")
    try:
        message = json.loads(_exactly(channel, size, deadline))
    except RecursionError:
        message = None
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def _exactly(channel: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        channel.settimeout(max(0.001, deadline - time.monotonic()))
        if not (chunk := channel.recv(size - len(data))):
            raise ValueError("the other end is gone")
        data += chunk
    return data


_lock = threading.RLock()
_servers: dict[Path, Server] = {}


def acquire(data: Path, task: str, timeout_s: float) -> Session:
    """A session with the server of `data`, which is started when there is none."""
    with _lock:
        server = _servers.get(data)
        if server is None or not server.usable:
            if server is not None:
                server.close()
            server = _servers[data] = Server(data)
    return Session(server, task, timeout_s)


def shutdown() -> None:
    """End the servers of this process now; environments start a fresh one at their next reset."""
    with _lock:
        for server in _servers.values():
            server.close()
        _servers.clear()


def _after_fork() -> None:
    """The servers belong to the parent."""
    global _lock
    _lock = threading.RLock()
    for server in _servers.values():
        server._control.close()
        server.process.returncode = 0  # not our child: nothing to wait for
    _servers.clear()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(shutdown)
