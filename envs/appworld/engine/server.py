"""The process that holds AppWorld's engine: `python -I server.py FD OWNER DATA`, in AppWorld's virtual environment.

It loads the engine once and runs none of a model's code. For each episode, and for each evaluation, it forks: a child
starts in 20 ms with everything loaded, is confined (`jail`), serves one task over a socket pair and is killed. So no
episode meets what the code of another has left behind, evaluations run in a process that never ran a model's code,
and a child that hangs costs nobody else anything. There is no port: who has the socket pair can speak, nobody else.

What always holds: the server ends with its owner, and every child with the server. Messages are JSON, each with its
length in 4 bytes before it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import jail

MAX_OUTPUT = 20_000
"""Characters of an output that are passed on."""
FIRST_UID = 1_650_000_000
"""As root, a child becomes user FIRST_UID + its process id: a user nobody else is."""
NOBODY = 65534
LATE = (
    "IPython.core.completerlib", "_strptime", "anyio._backends._asyncio", "anyio.abc",
    "appworld.apps.api_docs.constants", "concurrent.futures.process", "dateutil.rrule", "dateutil.zoneinfo", "jsonref",
    "libcst.native", "pytest", "unittest.async_case",
)  # fmt: skip
"""What the engine loads when it needs it: then each child would, and it may not be readable any more."""
CHANGES = ("INSERT", "UPDATE", "DELETE", "CREATE", "DROP")
ENVIRONMENT = ("APPWORLD_CACHE", "APPWORLD_ROOT", "HOME", "LANG", "PATH", "PYTHONHASHSEED", "TMPDIR", "TZ")
"""All that is left of the environment."""


def send(channel: socket.socket, message: Any, fds: list[int] | None = None) -> None:
    """Send a message, and the file descriptors that go with it."""
    data = json.dumps(message).encode()
    data = struct.pack("!I", len(data)) + data
    sent = socket.send_fds(channel, [data], fds) if fds else 0
    channel.sendall(data[sent:])


def receive(channel: socket.socket) -> Any:
    """The next message; None at the end."""
    head = _exactly(channel, 4)
    return json.loads(_exactly(channel, struct.unpack("!I", head)[0])) if head else None


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        if not (chunk := channel.recv(size - len(data))):
            return b""
        data += chunk
    return data


class Server:
    """Forks children for its owner."""

    def __init__(self, control: socket.socket, owner: int, data: Path) -> None:
        self.control, self.owner, self.data = control, owner, data.resolve()
        self.run = Path(tempfile.mkdtemp(prefix="bopo_ray-appworld-"))
        self.run.chmod(0o711)
        (self.run / "data").symlink_to(self.data)
        os.chdir(self.run)  # the engine writes "." for this folder in what it prints
        self._alive = self._clean_up_afterwards()
        self.children: dict[int, Path] = {}
        self.count = 0

    def _clean_up_afterwards(self) -> int:
        """Fork a process that removes the folder when this one and its children are gone, however they end.

        Returns the file descriptor that says so when nobody has it any more.
        """
        ended, alive = os.pipe()
        if os.fork():
            os.close(ended)
            return alive
        os.close(alive)
        self.control.close()
        while os.read(ended, 4096):
            pass
        shutil.rmtree(self.run, ignore_errors=True)
        os._exit(0)

    def load(self) -> str:
        """Load the engine; returns its version."""
        import dotenv

        dotenv.load_dotenv = lambda *_, **__: False  # it would take in the owner's .env, with the API keys
        os.environ.update(APPWORLD_ROOT=str(self.run), APPWORLD_CACHE=str(self.run))
        import appworld
        import freezegun
        import sqlalchemy.orm
        from appworld import environment, evaluator, requester  # noqa: F401
        from appworld.apps import build_main_app, get_all_apps
        from appworld.collections.api_docs import ApiDocCollection
        from appworld.common.safety_guard import ALLOWED_MODULE_NAMES

        for name in (*LATE, *sorted(ALLOWED_MODULE_NAMES)):
            importlib.import_module(name)
        requester.build_main_app = functools.cache(build_main_app)  # else each child builds its own
        requester.build_main_app(tuple(sorted(get_all_apps())))
        ApiDocCollection.load(load_apps=tuple(get_all_apps(skip_admin=True)), include_response_schemas=True)
        # Two thirds of a child's start would be what these remember: each module's clocks, and the apps' tables.
        with freezegun.freeze_time():
            pass
        sqlalchemy.orm.configure_mappers()
        for name in set(os.environ) - set(ENVIRONMENT):
            del os.environ[name]
        gc.collect()
        gc.freeze()
        return str(appworld.__version__)

    def serve(self) -> None:
        """Answer the owner until it is gone."""
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        while os.getppid() == self.owner:
            if not poll.poll(1000):
                continue
            if (message := receive(self.control)) is None:
                break
            if message["op"] == "end":
                self._end(message["pid"])
                send(self.control, {})
            else:
                self._start(message)

    def close(self) -> None:
        """End the children."""
        for pid in list(self.children):
            self._end(pid)

    def _start(self, message: dict[str, Any]) -> None:
        self.count += 1
        ours, theirs = socket.socketpair()
        folder = self.run / "experiments" / "outputs" / f"{message['op']}{self.count}"
        folder.mkdir(parents=True)
        parent = os.getpid()
        if pid := os.fork():
            self.children[pid] = folder
            theirs.close()
            send(self.control, {"pid": pid}, [ours.fileno()])
            ours.close()
            return
        try:
            self.control.close()
            ours.close()
            jail.die_with_parent(parent)
            source = self.children.get(message.get("episode", 0))
            self.children.clear()
            os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
            job: Callable[..., None] = self._episode if message["op"] == "episode" else self._evaluation
            job(theirs, message, folder, source)
        except BaseException as error:
            with contextlib.suppress(BaseException):
                send(theirs, {"error": f"{type(error).__name__}: {error}"[:500]})
        finally:
            os._exit(0)

    def _episode(self, channel: socket.socket, message: dict[str, Any], folder: Path, _: Path | None) -> None:
        """Run a model's code: nothing in this process may be trusted from the first line of it on."""
        from appworld.environment import AppWorld

        task, uid = self.data / "tasks" / message["task"], _uid()
        layers = jail.confine(
            [*_python(), *self._world(), task / "dbs", task / "specs.json"], [folder], [task / "ground_truth"]
        )
        # Another user may not reach Python and the data: where files are confined anyway, it keeps the right to read.
        early = layers["landlock"] and layers["seccomp"]
        if early:
            layers["user"] = jail.drop_user(folder, uid, reads=True)
        _fix_chance(message["task"])
        world = AppWorld(
            task_id=message["task"],
            experiment_name=folder.name,
            load_ground_truth=False,
            timeout_seconds=None,  # the client's deadline ends the process: no handler can swallow that
            max_interactions=10_000,
        )
        if not early:
            layers["user"] = jail.drop_user(folder, uid, reads=False)
        send(channel, {"layers": layers, "instruction": world.task.instruction, "supervisor": world.task.supervisor})
        # After each action the engine would write all databases and its logs, half of the action's time; nobody reads
        # them before the verdict.
        save = functools.partial(world._save_state, world.output_db_home_path_on_disk)
        world._save_state = world.save_logs = lambda *_: None
        while (request := receive(channel)) is not None:
            if "code" not in request:
                save()
                send(channel, {})
                continue
            try:
                output = world.execute(request["code"])
            except BaseException as error:  # of the model's making
                output = f"Execution failed. Traceback:\n{type(error).__name__}: {error}"
            try:
                completed = bool(world.task_completed())
            except BaseException:
                completed = False
            output = output.replace(str(folder), "~").replace(str(self.run), "/appworld")  # the same in every run
            send(channel, {"output": output[:MAX_OUTPUT], "length": len(output), "completed": completed})

    def _evaluation(self, channel: socket.socket, message: dict[str, Any], folder: Path, source: Path | None) -> None:
        """Judge what an episode has left in its databases, in a process that has not run its code."""
        from appworld.evaluator import evaluate_task

        task = message["task"]
        if source is None:
            raise ValueError(f"no such episode: {message['episode']}")
        try:
            _copy_changes(source / "tasks" / task / "dbs", folder / "tasks" / task / "dbs")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            send(channel, {"success": False, "passed": 0, "tests": 1, "refused": str(error)[:300]})
            return
        jail.confine([*_python(), *self._world(), self.data / "tasks" / task, Path(__file__)], [folder])
        tracker = evaluate_task(task, folder.name, suppress_errors=True, save_report=False)
        send(channel, {"success": tracker.success, "passed": tracker.pass_count, "tests": tracker.num_tests})

    def _world(self) -> list[Path]:
        return [self.data / name for name in ("api_docs", "base_dbs")]

    def _end(self, pid: int) -> None:
        """Kill a child, if it has not ended by itself: until here its number is not given to another process."""
        if (folder := self.children.pop(pid, None)) is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            shutil.rmtree(folder, ignore_errors=True)


def _python() -> list[Path]:
    """What Python may still want to load."""
    paths = sysconfig.get_paths()
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null")
    return [Path(p) for p in (paths["stdlib"], paths["platstdlib"], sys.prefix, *libraries, "/dev/urandom")]


def _uid() -> int:
    """A user of this process's own, or nobody where user numbers are scarce (in some containers)."""
    uid = FIRST_UID + os.getpid()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/uid_map").read_text().splitlines():
            inside, _, count = map(int, line.split())
            if inside <= uid < inside + count:
                return uid
    return NOBODY


def _fix_chance(task: str) -> None:
    """Make alike in each play what the engine leaves to chance: random bytes, so `uuid` and `secrets`, and the
    process's number."""
    vars(random)["_urandom"] = os.urandom = random.Random(task).randbytes
    os.getpid = lambda: 1


def _copy_changes(source: Path, target: Path) -> None:
    """Copy an episode's databases (lists of SQL statements): plain files of sane size, and changes only.

    Raises:
        ValueError: they hold something that the engine never writes.
    """
    target.mkdir(parents=True)
    for name in sorted(os.listdir(source)):
        fd = os.open(source / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, encoding="utf-8") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_size > jail.FILE_BYTES:
                raise ValueError(f"{name} is not a file of the engine's")
            text = file.read()
        for line in text.splitlines() if name.endswith(".jsonl") else ():
            if not json.loads(line)[0].lstrip().upper().startswith(CHANGES):
                raise ValueError(f"{name} holds a statement that is no change")
        (target / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Load, say hello, serve."""
    control = socket.socket(fileno=int(sys.argv[1]))
    server = Server(control, int(sys.argv[2]), Path(sys.argv[3]))
    try:
        send(control, {"version": server.load(), "folder": str(server.run)})
        server.serve()
    finally:
        server.close()


if __name__ == "__main__":
    main()
