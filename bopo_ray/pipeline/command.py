"""How a script is called, and how it ends: exit code 0, or one line that says why not, and 1, 2, 3, 130 or 143."""

from __future__ import annotations

import argparse
import difflib
import errno
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from ray.exceptions import RayTaskError

from bopo_ray.errors import ConfigError, EngineError, ModelError, SpendLimitError

__all__ = ["Terminated", "add_max_spend", "exit_code", "finished_parser", "refused", "script_parser", "whole_numbers"]

_FAILURES = (ConfigError, EngineError, ModelError, SpendLimitError, OSError)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and which option or word was probably meant; so do its commands' parsers."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # argparse says nothing of what was meant
        found, unknown = self.parse_known_args(args, namespace)
        if unknown and unknown[0].startswith("-"):
            name = unknown[0].partition("=")[0]
            self.error(f"unknown option {name!r}{_meant(name, _options(self))}")
        if unknown:
            self.error(f"{unknown[0]!r} is one word too many: options begin with --, and a list is written with commas")
        return found

    def error(self, message: str) -> NoReturn:
        line = message.removeprefix("argument ")
        if choice := re.fullmatch(r"(.+): invalid choice: '?(.*?)'? \(choose from (.*)\)", line):
            name, value, allowed = choice[1], choice[2], choice[3].replace("'", "")
            line = f"{name}={value!r}: need one of {allowed}{_meant(value, allowed.split(', '))}"
        elif kind := re.fullmatch(r"(.+): invalid (int|float) value: (.*)", line):
            line = f"{kind[1]}={kind[3]}: need {'a whole number' if kind[2] == 'int' else 'a number'}"
        self.exit(2, f"error: {' '.join(line.split())}; see {self.prog} --help\n")


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Of a parser and its commands."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which `kill` and schedulers end a process: a run ends as it does with Ctrl-C."""


def script_parser(name: str, doc: str | None, **more: Any) -> argparse.ArgumentParser:
    """Of `python -m experiments.<name>`, whose help begins with the script's own docstring."""
    return _Parser(
        prog=f"python -m experiments.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        **more,
    )  # fmt: skip


def finished_parser(name: str, doc: str | None, several: bool = False) -> argparse.ArgumentParser:
    """Of a script that reads finished runs: `folder`, or `folders` where it takes several, and `--out`."""
    p = script_parser(name, doc)
    if several:
        p.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="finished runs, results/RUN")
    else:
        p.add_argument("folder", type=Path, metavar="FOLDER", help="a finished run, results/RUN")
    p.add_argument("--out", type=Path, help="folder of the files (default: figures/ in the first run's)")
    return p


def add_max_spend(p: argparse.ArgumentParser) -> None:
    """`--max-spend` of a script that plays more on a finished run, as `hard_budget.open_run` takes it."""
    p.add_argument(
        "--max-spend", type=float, metavar="DOLLARS",
        help="that new calls may cost (default: what the finished run and its other studies have left of its own "
        "--max-spend; no limit where it had none)",
    )  # fmt: skip


def whole_numbers(option: str, text: str, least: int) -> list[int]:
    """The different numbers of `text`, "1,2,5", ascending. Raises ConfigError for none, or one below `least`."""
    try:
        numbers = sorted({int(x) for x in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or numbers[0] < least:
        raise ConfigError(f"{option}={text!r}: need whole numbers >= {least} with commas; set them with --{option}")
    return numbers


@contextmanager
def refused(option: str, path: Path) -> Iterator[None]:
    """Has a failure to write there be the user's mistake, in one line that names the option."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{option}={path}: can't be written ({error.strerror or error}); choose another --{option}"
        ) from error


def exit_code(
    work: Callable[[], int], *, spent: Callable[[], str] | None = None, again: str = "run the same command again",
    kept: str = "what is finished is kept; run the same command again to go on",
) -> int:  # fmt: skip
    """What `work` returns; 1 when the machine failed, 2 for the user's mistake, 3 when --max-spend is reached, 130 when
    interrupted, 143 when terminated, each with one line, on stderr.

    Args:
        work: the script.
        spent: says what was spent, where reaching --max-spend is no error but an end like another: told on stdout.
        again: how to go on when the disk was full.
        kept: how to go on when it was interrupted.
    """
    received: list[int] = []
    try:
        with _ended_by_sigterm(received):
            return work()
    except (*_FAILURES, RayTaskError) as error:
        return _ended(error, spent, again)
    except KeyboardInterrupt:
        print(f"{'terminated' if received else 'interrupted'}: {kept}", file=sys.stderr)
        return 128 + (signal.SIGTERM if received else signal.SIGINT)


@contextmanager
def _ended_by_sigterm(received: list[int]) -> Iterator[None]:
    """Has SIGTERM raise `Terminated`, and noted, since Tune makes of it a plain interrupt; in a main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, _: object) -> NoReturn:
        received.append(number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(error: Exception, spent: Callable[[], str] | None, again: str) -> int:
    """A function of its own, as the error and the frame that it passed through would hold each other in memory."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if not isinstance(cause, _FAILURES):
        raise error
    if isinstance(cause, SpendLimitError) and spent:
        print(f"stopped: {spent()}; {cause}. All finished is kept: give a higher --max-spend and --resume")
        return 3
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    mend = f"; free some space and {again}: finished parts are kept" if full else ""
    print(f"error: {' '.join(f'{cause}{mend}'.split())}", file=sys.stderr)
    return 2 if full or isinstance(cause, ConfigError) else 3 if isinstance(cause, SpendLimitError) else 1
