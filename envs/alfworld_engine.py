"""The process side of ALFWorld: TextWorld's own engine, one game at a time, asked over a socket.

`python -m envs.alfworld_engine FD` is a nursery: it loads TextWorld once (1-2 s, 65 MB) and forks an engine
for each socket that it is sent over FD. What always holds:

* TextWorld's `PddlState` (on Fast Downward) decides what an action does and whether the goal is reached, and its
  grammar writes every text; what the package computes again and again is kept instead: the translation of a game (in a
  file of the cache), the parsed rules, and the command of each grounded action. Nothing is planned. The tests compare
  the texts with the package's own, one by one;
* a request is one line of JSON: `{"load": {domain, grammar, problem}}` or `{"step": action}`, with `"admissible": true`
  for the commands that would do something; so is the answer: `{"text", "won", "commands"}`, or `{"error"}`;
* an engine ends with the other end of its socket, also while it computes.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import signal
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Mapping
from copy import deepcopy
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NoReturn

from envs.alfworld_layouts import domain_and_grammar
from envs.cache import cache_folder, keep

__all__ = ["NOTHING", "World", "prepare"]

NOTHING = "Nothing happens."
"""TextWorld's answer to a command that does nothing."""


class World:
    """A game in progress."""

    def __init__(self, domain: str, grammar: str, problem: str) -> None:
        from alfworld.agents.utils.misc import Demangler
        from textworld.envs.pddl.logic import PddlState
        from textworld.generator.game import EntityInfo

        self._grammar = _logic(domain, grammar).grammar
        self._state = PddlState(_library(), problem, _logic(domain, grammar))
        variables = {var.name: var for fact in self._state.facts for var in fact.arguments}
        self._entities = {name: EntityInfo(name, var.type) for name, var in variables.items()}
        names = Demangler(game_infos=self._entities)
        for entity in self._entities.values():
            entity.name, entity.definite, entity.indefinite = names.demangle_alfred_name(entity.id), "the", "a"
        self._names: dict[tuple[str, ...], str] = {}
        self._actions: dict[str, Any] = {}
        self._find_actions()

    @property
    def won(self) -> bool:
        """Whether the goal is reached."""
        return bool(self._state.check_goal())

    @property
    def commands(self) -> list[str]:
        """What may be done now, sorted."""
        return sorted(self._actions)

    def intro(self) -> str:
        """The first text: a greeting, what is in the room, and the task, with an empty line between them."""
        return self._say("#intro#", {})

    def step(self, command: str) -> str:
        """Does what `command` says; anything but one of `commands` changes nothing."""
        action = self._actions.get(command.strip())
        if action is None:
            return NOTHING
        self._state.apply(action)
        text = self._say(action.feedback_rule, action.mapping)
        self._find_actions()
        return text

    def _find_actions(self) -> None:
        self._actions = {}
        for action in self._state.all_applicable_actions():
            key = (action.name, *(var.name for var in action.mapping.values()))
            if key not in self._names:  # what a grounded action is called never changes
                template = self._say(action.command_template, action.mapping)
                called = {ph.name: self._entities[var.name].name for ph, var in action.mapping.items()}
                self._names[key] = template.format(**called)
            self._actions.setdefault(self._names[key], action)

    def _say(self, rule: str, mapping: Mapping[Any, Any]) -> str:
        variables = {ph.name: self._entities[var.name] for ph, var in mapping.items()}
        context = {"state": self._state, "facts": [], "mapping": mapping, "variables": variables}
        return str(self._grammar.derive(rule, context | {"entity_infos": self._entities}))


@functools.lru_cache(maxsize=2)
def _logic(domain: str, grammar: str) -> Any:
    from textworld.envs.pddl.logic import GameLogic

    return GameLogic(domain, grammar)


@functools.cache
def _library() -> Any:
    """Fast Downward's library, of this process alone, without the second copy of the game that planning would need."""
    import fast_downward

    library = fast_downward.load_lib()
    library.load_sas_replan = lambda sas: None
    return library


def prepare() -> None:
    """Loads TextWorld and all that the games share, and makes it keep what it would compute again."""
    sys.argv = ["translate.py", "domain", "task"]  # Fast Downward's translator reads its options off it, on import
    import fast_downward
    from fast_downward.translate.pddl_parser import lisp_parser, parsing_functions
    from textworld.envs.pddl import textgen
    from textworld.logic import Rule

    translate = fast_downward.pddl2sas
    folder = cache_folder(f"fast-downward-{version('fast-downward-textworld')}")

    def parsed(text: str) -> Any:
        return lisp_parser.parse_nested_list(text.split("\n"))

    @functools.lru_cache(maxsize=2)
    def task_and_sas(domain: str, problem: str) -> tuple[Any, str]:
        path = folder / f"{hashlib.sha256(f'{domain}{problem}'.encode()).hexdigest()}.z"
        if not (sas := _read(path)):
            keep(path, zlib.compress((sas := str(translate(domain, problem)[1])).encode(), 1))
        return parsing_functions.parse_task(parsed(domain), parsed(problem)), sas

    def copy_context(context: dict[str, Any]) -> dict[str, Any]:
        return context | {"variables": dict(context["variables"]), "mapping": dict(context["mapping"])}

    fast_downward.pddl2sas = lambda domain, problem, **_: task_and_sas(domain, problem)
    textgen.copy_context = copy_context
    parse = functools.cache(textgen._parse_and_convert)
    textgen._parse_and_convert = lambda text, rule_name, **_: deepcopy(parse(text, rule_name=rule_name))
    Rule.parse_conjunctive_query = functools.cache(Rule.parse_conjunctive_query)
    import_module("alfworld.agents.utils.misc")
    _logic(*domain_and_grammar())


def _read(path: Path) -> str:
    try:
        return zlib.decompress(path.read_bytes()).decode()
    except (OSError, ValueError, zlib.error):
        return ""  # none there, or broken: it is made again


def _answer(world: World | None, request: dict[str, Any]) -> tuple[World, dict[str, Any]]:
    if "load" in request:
        world = World(**request["load"])
        text = world.intro().split("\n\n")[1]
    elif world is None:
        raise RuntimeError("no game was loaded")
    else:
        text = world.step(request["step"])
    answer = {"text": text, "won": world.won}
    return world, answer | ({"commands": world.commands} if request.get("admissible") else {})


def _serve(link: socket.socket) -> NoReturn:
    """An engine's life."""
    requests: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        with link.makefile("rb") as lines:
            for line in lines:
                requests.put(line)
        os._exit(0)  # the owner is gone, or wants no more

    threading.Thread(target=read, daemon=True).start()
    world = None
    while True:
        try:
            world, answer = _answer(world, json.loads(requests.get()))
        except (Exception, SystemExit) as error:  # Fast Downward's translator exits on what it can't read
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        link.sendall(json.dumps(answer).encode() + b"\n")


def _nurse(control: socket.socket) -> None:
    """Forks an engine for each socket that arrives; answers with its process id. This process has one thread."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for engines
    control.sendall(struct.pack("!q", os.getpid()))
    while True:
        sign, fds, _, _ = socket.recv_fds(control, 1, 1)
        if not sign:
            return
        pid = os.fork()
        if pid == 0:
            control.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _serve(socket.socket(fileno=fds[0]))
        os.close(fds[0])
        control.sendall(struct.pack("!q", pid))


if __name__ == "__main__":
    _control = socket.socket(fileno=int(sys.argv[1]))
    prepare()
    gc.freeze()  # shared with the engines until they change it
    _nurse(_control)
