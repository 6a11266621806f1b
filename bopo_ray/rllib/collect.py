"""The episodes that all runners share, whatever dies on the way.

Always true here: every spec ends as exactly one episode or one counted failure; a runner that dies or goes silent is
replaced by Ray, and the specs it had not finished go back to the queue; a runner gets an episode for each that it
hands in, so that none waits for another's slowest, and none before it has answered once: one on a node that is still
being started holds nothing; the episodes of a task are a runner's own until another has nothing left, since a process
makes no engine step that it has met before (`bopo_ray.recall`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from bopo_ray.records import Episode, EpisodeSpec, spawn_seed
from bopo_ray.rllib.runner import ATTEMPTS, Failure
from bopo_ray.routers import Router

__all__ = ["Fleet", "Lines", "collect"]

log = logging.getLogger(__name__)
SILENCE_S = 600.0
"""A runner that makes no step for so long is killed and replaced."""
PROBE_S = 0.2
"""Between two questions to a runner whether it has been replaced."""
ANSWER_S = 2.0
"""At the start so long is waited for all runners to answer, so that a few episodes don't all go to the first one."""
AHEAD = 8
"""One episode per so many lanes waits in a runner for a free lane."""
NOBODY = -1
"""Whose line it is while there are no runners."""
ALONE_S = 60.0
"""Between two warnings that no runner is there."""
QUESTIONS = 2
"""So many calls wait in a runner: while one answer travels, the next is being worked at."""


def collect(
    group: EnvRunnerGroup,
    specs: Sequence[EpisodeSpec],
    weights: Any = None,
    version: int = 0,
    on_episode: Callable[[Episode | Failure], None] | None = None,
    silence_s: float = SILENCE_S,
    routers: Mapping[str, Router] | None = None,
) -> list[Episode | Failure]:
    """Plays `specs` on the group's runners; results in the order of `specs`.

    Args:
        group: runners (`GroupEnvRunner`), remote ones or the local one.
        specs: what to play, with distinct ids.
        weights, version: the learned router's, see `GroupEnvRunner.exchange`.
        on_episode: called in this process as each result arrives.
        silence_s: see `SILENCE_S`.
        routers: those that their names alone don't make, see `GroupEnvRunner.exchange`.
    """
    results: dict[str, Episode | Failure] = {}

    def arrived(result: Episode | Failure) -> None:
        results[result.spec.id] = result
        if on_episode:
            on_episode(result)

    fleet = Fleet(group, arrived, silence_s)
    fleet.add(specs)
    fleet.play((weights, version, routers))
    return [results[s.id] for s in specs]


class Lines:
    """Episodes that wait, in a line for each runner: a task's all in the same one, also at the next time and after a
    resume. Who has an empty line takes from the end of the longest."""

    def __init__(self) -> None:
        self._lines: dict[int, deque[tuple[int, EpisodeSpec]]] = defaultdict(deque)
        """By runner; with when they came."""
        self._came = 0
        self._runners: tuple[int, ...] = ()
        self._owners: dict[str, int] = {}
        """By task."""

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def extend(self, specs: Iterable[EpisodeSpec]) -> None:
        """They come after those that wait."""
        for spec in specs:
            self._put(self._came, spec)
            self._came += 1

    def share_among(self, runners: Iterable[int]) -> None:
        """Whose lines there are, by index; a task moves only where its runner is gone or a new one is its own."""
        if (now := tuple(sorted(runners))) == self._runners:
            return
        waiting = sorted((item for line in self._lines.values() for item in line), key=lambda item: item[0])
        self._runners, self._owners = now, {}
        self._lines.clear()
        for came, spec in waiting:
            self._put(came, spec)

    def take(self, count: int, runner: int = NOBODY) -> list[EpisodeSpec]:
        """So many for this runner, or as many as there are."""
        taken = []
        for _ in range(min(count, len(self))):
            own = self._lines[runner]
            _, spec = own.popleft() if own else max(self._lines.values(), key=len).pop()
            taken.append(spec)
        return taken

    def owner(self, spec: EpisodeSpec) -> int:
        """Whose line it waits in: by rendezvous hashing, the runner with the largest hash together with the task."""
        task = spec.task.name
        if task not in self._owners:
            self._owners[task] = max(self._runners, key=lambda runner: spawn_seed(task, runner), default=NOBODY)
        return self._owners[task]

    def _put(self, came: int, spec: EpisodeSpec) -> None:
        self._lines[self.owner(spec)].append((came, spec))


@dataclass
class _Seat:
    """A runner, as this process sees it."""

    actor: Any
    session: str = ""
    """Of its present life; empty while it is not known to have one."""
    told: bool = False
    """Whether the router has been sent to it."""
    playing: dict[str, EpisodeSpec] = field(default_factory=dict)
    questions: int = 0
    """Calls that it has not answered."""
    heard: float = 0.0
    """When it last handed something in, or had made a step."""
    steps: int = 0
    """That it has made."""


class Fleet:
    """A group's runners and what they play.

    What is left when `play` returns early goes on at the next call, whose weights decide from then on.
    """

    def __init__(
        self, group: EnvRunnerGroup, arrived: Callable[[Episode | Failure], None], silence_s: float = SILENCE_S
    ) -> None:
        """
        Args:
            group: see `collect`.
            arrived: called in this process with the result of each spec, once.
            silence_s: see `SILENCE_S`.
        """
        remote = group.num_remote_env_runners() > 0
        self.local = None if remote else group.local_env_runner
        self.session = uuid.uuid4().hex
        """Of the local runner."""
        actors: dict[int, Any] = group._worker_manager.actors() if remote else {}
        self.seats = {index: _Seat(actor) for index, actor in actors.items()}
        self.lanes = group._remote_config.num_envs_per_env_runner if remote else 0
        self.arrived, self.silence_s = arrived, silence_s
        self.due: dict[str, EpisodeSpec] = {}
        """All that have not arrived, by id."""
        self.waiting, self.losses = Lines(), Counter[str]()
        self.router: tuple[Any, int, Mapping[str, Router] | None] = (None, 0, None)
        self.calls: dict[Any, int] = {}
        """Unanswered calls, and whose they are."""
        self.probes: dict[Any, int] = {}
        self.accompanied = time.monotonic()
        """When a runner was there last, or its absence was told."""

    def add(self, specs: Sequence[EpisodeSpec]) -> None:
        """More to play, after what waits already."""
        self.due |= {spec.id: spec for spec in specs}
        self.waiting.extend(specs)

    def play(
        self, router: tuple[Any, int, Mapping[str, Router] | None], enough: Callable[[], bool] = lambda: False
    ) -> None:
        """Until every spec has arrived, or there is `enough`.

        Args:
            router: weights, version and routers, see `GroupEnvRunner.exchange`.
            enough: asked whenever something has arrived.
        """
        self.router = router
        if self.local is not None:
            while self.due and not enough():
                unit = self.waiting.take(len(self.waiting))
                for result in self.local.exchange(self.session, unit, *self.router):
                    self._arrive(result)
            return
        weights, version, routers = router
        self.router = (ray.put(weights) if weights is not None else None, version, routers)
        self.accompanied = time.monotonic()
        for index, seat in self.seats.items():
            seat.told, seat.heard = False, time.monotonic()
            if not seat.session and index not in self.probes.values():
                self._probe(index)
        if self.probes and self.due:
            ray.wait(list(self.probes), num_returns=len(self.probes), timeout=ANSWER_S)
        self._feed()
        while self.due and not enough():
            if not self.seats:
                while self.due:
                    self._arrive(Failure(next(iter(self.due.values())), "all env runners are gone"))
                return
            for ref in self._answers():
                if ref in self.probes:
                    self._alive(ref)
                elif ref in self.calls:
                    self._take(ref)
            self._feed()
            self._kill_the_silent()
            self._tell_of_absence()

    def _arrive(self, result: Episode | Failure) -> None:
        if self.due.pop(result.spec.id, None):
            self.arrived(result)

    def _answers(self) -> list[Any]:
        """All that have come; waits for one, or a few seconds."""
        asked = [*self.calls, *self.probes]
        if not ray.wait(asked, num_returns=1, timeout=5.0)[0]:
            return []
        return ray.wait(asked, num_returns=len(asked), timeout=0)[0]

    def _feed(self) -> None:
        """Gives each runner its share of what is left, and enough questions to answer."""
        awake = [(index, seat) for index, seat in self.seats.items() if seat.session]
        left = len(self.waiting) + sum(len(seat.playing) for _, seat in awake)
        share = min(self.lanes + -(-self.lanes // AHEAD), -(-left // max(1, len(awake))))
        self.waiting.share_among(index for index, _ in awake)
        for index, seat in awake:
            if not seat.playing:
                seat.heard = time.monotonic()
            room = max(0, share - len(seat.playing))
            unit = self.waiting.take(room, index)
            seat.playing |= {spec.id: spec for spec in unit}
            while unit or seat.questions < min(QUESTIONS, len(seat.playing)):
                router = (None, 0, None) if seat.told else self.router
                self.calls[seat.actor.hand_in.remote(seat.session, unit, *router)] = index
                seat.questions += 1
                seat.told, unit = True, []

    def _take(self, ref: Any) -> None:
        """What a runner hands in, or that it is lost."""
        index = self.calls.pop(ref)
        seat = self.seats[index]
        seat.questions -= 1
        try:
            results, steps = ray.get(ref)
        except RayTaskError:
            raise
        except RayError as error:
            self._lost(index, str(error).splitlines()[0])
            return
        if results or steps != seat.steps:
            seat.heard, seat.steps = time.monotonic(), steps
        for result in results:
            seat.playing.pop(result.spec.id, None)
            self._arrive(result)

    def _lost(self, index: int, reason: str) -> None:
        seat = self.seats[index]
        log.warning("env runner %d: %s; %d episodes go back to the queue", index, reason, len(seat.playing))
        self.calls = {ref: call for ref, call in self.calls.items() if call != index}
        for spec in seat.playing.values():
            self.losses[spec.id] += 1
            if self.losses[spec.id] >= ATTEMPTS:
                self._arrive(Failure(spec, f"lost with its runner {ATTEMPTS} times: {reason}"))
            else:
                self.waiting.extend([spec])
        self.seats[index] = _Seat(seat.actor)
        self._probe(index)

    def _probe(self, index: int) -> None:
        """Asks a runner for a sign of life; it is given work when it has answered."""
        self.probes[self.seats[index].actor.ping.remote()] = index

    def _alive(self, ref: Any) -> None:
        index = self.probes.pop(ref)
        try:
            ray.get(ref)
        except ActorDiedError as error:
            log.warning("env runner %d is gone for good: %s", index, str(error).splitlines()[0])
            del self.seats[index]
        except RayError:  # still being replaced
            time.sleep(PROBE_S)
            self._probe(index)
        else:
            self.seats[index].session = uuid.uuid4().hex

    def _tell_of_absence(self) -> None:
        """They may be waited for without an end: where a node is gone, or another job has the room."""
        now = time.monotonic()
        if any(seat.session for seat in self.seats.values()):
            self.accompanied = now
        elif now - self.accompanied > ALONE_S:
            self.accompanied = now
            log.warning(
                "no env runner is there, and %d episodes wait: Ray is still looking for CPUs and memory for one "
                "(see `ray status`); stop other jobs, add nodes, or go on later with --resume",
                len(self.due),
            )

    def _kill_the_silent(self) -> None:
        now = time.monotonic()
        for index, seat in list(self.seats.items()):
            if seat.playing and now - seat.heard > self.silence_s:
                ray.kill(seat.actor, no_restart=False)
                self._lost(index, f"no step for {self.silence_s:.0f} s")
