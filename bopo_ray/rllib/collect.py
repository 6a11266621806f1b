"""One queue of episodes over all runners, whatever dies on the way.

Always true here: every spec ends as exactly one episode or one counted failure; a runner that dies or goes silent is
replaced by Ray, and the specs it had not finished go back to the queue.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.rllib.env.env_runner_group import EnvRunnerGroup

from bopo_ray.records import Episode, EpisodeSpec
from bopo_ray.rllib.runner import ATTEMPTS, Failure
from bopo_ray.routers import Router

__all__ = ["collect"]

log = logging.getLogger(__name__)
SILENCE_S = 600.0
"""A runner that yields nothing for so long is killed and replaced."""
PROBE_S = 0.2
"""Between two questions to a runner whether it has been replaced."""


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
        weights, version: the learned router's, see `GroupEnvRunner.stream`.
        on_episode: called in this process as each result arrives.
        silence_s: see `SILENCE_S`.
        routers: those that their names alone don't make, see `GroupEnvRunner.stream`.
    """
    results: dict[str, Episode | Failure] = {}

    def arrived(result: Episode | Failure) -> None:
        if result.spec.id not in results:
            results[result.spec.id] = result
            if on_episode:
                on_episode(result)

    if group.num_remote_env_runners() == 0:
        for result in group.local_env_runner.stream(specs, weights, version, routers):
            arrived(result)
    else:
        _collect_remote(group, specs, weights, version, routers, arrived, silence_s)
    return [results[s.id] for s in specs]


def _collect_remote(
    group: EnvRunnerGroup, specs: Sequence[EpisodeSpec], weights: Any, version: int,
    routers: Mapping[str, Router] | None, arrived: Callable[[Episode | Failure], None], silence_s: float,
) -> None:  # fmt: skip
    runners = dict(group._worker_manager.actors())
    lanes = group._remote_config.num_envs_per_env_runner
    weights_ref = ray.put(weights) if weights is not None else None
    waiting, losses = deque(specs), Counter[str]()
    streams: dict[Any, tuple[int, dict[str, EpisodeSpec]]] = {}
    heard: dict[Any, float] = {}
    probes: dict[Any, int] = {}

    def dispatch(index: int) -> None:
        share = max(lanes, -(-len(waiting) // (2 * len(runners))))
        unit = [waiting.popleft() for _ in range(min(share, len(waiting)))]
        stream = runners[index].stream.options(num_returns="streaming").remote(unit, weights_ref, version, routers)
        streams[stream] = (index, {s.id: s for s in unit})
        heard[stream] = time.monotonic()

    def lost(stream: Any, reason: str) -> None:
        index, unfinished = streams.pop(stream)
        log.warning("env runner %d: %s; %d episodes go back to the queue", index, reason, len(unfinished))
        for spec in unfinished.values():
            losses[spec.id] += 1
            if losses[spec.id] >= ATTEMPTS:
                arrived(Failure(spec, f"lost with its runner {ATTEMPTS} times: {reason}"))
            else:
                waiting.append(spec)
        probe(index)

    def probe(index: int) -> None:
        """Asks a lost runner for a sign of life; it is given work again when it has answered."""
        probes[runners[index].ping.remote()] = index

    def answered(ref: Any) -> None:
        index = probes.pop(ref)
        try:
            ray.get(ref)
        except ActorDiedError as error:
            log.warning("env runner %d is gone for good: %s", index, str(error).splitlines()[0])
            del runners[index]
        except RayError:  # still being replaced
            time.sleep(PROBE_S)
            probe(index)

    while streams or waiting:
        for index in set(runners) - {i for i, _ in streams.values()} - set(probes.values()):
            if waiting:
                dispatch(index)
        if not runners:
            for spec in waiting:
                arrived(Failure(spec, "all env runners are gone"))
            return
        ready, _ = ray.wait([*streams, *probes], num_returns=1, timeout=5.0, fetch_local=True)
        for ref in ready:
            if ref in probes:
                answered(ref)
                continue
            try:
                result = ray.get(next(ref), timeout=silence_s)
            except StopIteration:
                del streams[ref]
                continue
            except RayTaskError:
                raise
            except RayError as error:
                lost(ref, str(error).splitlines()[0])
                continue
            heard[ref] = time.monotonic()
            streams[ref][1].pop(result.spec.id, None)
            arrived(result)
        for stream in [s for s in streams if time.monotonic() - heard[s] > silence_s]:
            ray.kill(runners[streams[stream][0]], no_restart=False)
            lost(stream, f"silent for {silence_s:.0f} s")
