"""A run: its settings, its folder, its runners and its progress display."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import ray
import torch
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bopo_ray.benchmarks import check_ready, fair_tasks, select_tasks, task_list
from bopo_ray.code import code_version
from bopo_ray.errors import ConfigError, EngineError, StoreError
from bopo_ray.files import put, write_json
from bopo_ray.models import build_pool, host_pool
from bopo_ray.models.calls import CallStore
from bopo_ray.models.pool import PoolSpec, read_pool, resolve_pool, save_pool
from bopo_ray.models.pricing import Usage, price_table
from bopo_ray.models.protocol import LanguageModel
from bopo_ray.models.spend import SpendLedger
from bopo_ray.pipeline.preflight import locked, preflight, studies, taken_microusd
from bopo_ray.pipeline.same import check_same, check_same_models, check_same_tasks, task_lists
from bopo_ray.pipeline.settings import Settings, load_settings, microusd, save
from bopo_ray.records import CostMode, Episode, EpisodeSpec
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.collect import collect
from bopo_ray.rllib.open_desk import DeskConfig, lent_environment, node_id, serve_desk
from bopo_ray.rllib.placement import LEARNER_BYTES, RunnerGroup, fitting, most_memory, resources, runner_bytes
from bopo_ray.rllib.runner import Failure
from bopo_ray.routers import Router
from bopo_ray.store import EpisodeStore
from envs.base import Split, Task

__all__ = ["Run", "crowded"]

log = logging.getLogger(__name__)
LOG_EVERY_S = 20.0
"""Between two lines of progress where the output is not a terminal."""
STOP_S = 5.0
"""A runner has so long to close its environments before it is killed."""
QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else RLlib's way of starting actors prints an error that is none
    "RAY_DEDUP_LOGS": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of runners beside the one whose error ends the run
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_events_max_num_task_in_gcs": "5000",  # else 100,000, for the dashboard: its head process grows with them
    "RAY_TRAIN_V2_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # else a sweep that Ctrl-C stopped looks like one that has ended
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
"""Environment of the Ray processes: less noise, no surprises."""


class Run:
    """One run in one folder. Use as a context manager: it holds the folder's lock and stops its runners."""

    def __init__(self, settings: Settings, out: Path, resume: bool, console: Console) -> None:
        """Opens the folder; raises StoreError when it holds another run, or one and `resume` is not set."""
        code_version()  # what is running; a commit that comes meanwhile is not it
        self.settings, self.out, self.console = settings, out, console
        self.prices = price_table(Path(settings.prices)) if settings.prices else price_table()
        self.models = resolve_pool(settings.pool, settings.small, settings.large, self.prices)
        self.pool = build_pool(self.models)
        check_ready(settings.env)
        self._fair = fair_tasks(settings.env, self.pool)
        listed = [t.name for split in Split for t in task_list(settings.env, split)]
        if unknown := [name for name in settings.without_tasks if name not in listed]:
            like = " or ".join(dict.fromkeys(map(repr, listed[:1] + listed[-1:])))
            raise ConfigError(
                f"without_tasks={unknown[0]!r}: {settings.env} has no such task; names look like {like or 'none'}; "
                "set them with --without-tasks NAME,NAME"
            )
        self.train = self.tasks(Split.TRAIN, settings.train_tasks)
        self.test = self.tasks(Split.TEST, settings.test_tasks)
        left_out = [t for split in Split for t in task_list(settings.env, split) if not self._fair(t)]
        if left_out:
            console.print(
                f"{len(left_out):,} tasks are not asked: the models were not made for their kind, or learned from them"
            )
        for what, asked, there in (
            ("training", settings.train_tasks, self.train), ("test", settings.test_tasks, self.test),
        ):  # fmt: skip
            if len(there) < asked:
                console.print(f"{len(there):,} {what} tasks are there, of {asked:,} that were asked for")
        self._group: EnvRunnerGroup | None = None
        self._versions = count(1)
        """Of the weights given to runners: each play's are new ones to them."""
        path, tasks = out / "settings.yaml", task_lists(settings.env, self.train, self.test)
        if path.exists():
            if not resume:
                raise StoreError(f"{out} holds a run already; continue it with --resume, or choose another --out")
            check_same(load_settings(path), settings, path)
            check_same_models(read_pool(out / "pool.yaml", self.prices), self.models, out)
            check_same_tasks(out / "tasks.json", tasks)
        preflight(self.pool, settings, out)
        if settings.backbone:
            from bopo_ray.rllib.backbone import check_backbone  # with transformers it takes a second

            check_backbone(settings.router_shape, len(self.pool))
        if settings.calls:
            CallStore(self._calls).close()  # refuses what can't be one, before there is a folder
        self._lock = locked(out)
        self._studies = 0 if math.isinf(settings.max_spend) else taken_microusd(studies(out))
        for folder in {shard.parent for shard in self.episodes.rglob("part-*.parquet")}:
            EpisodeStore(folder, self.pool.price_hash)  # refuses another schema or price table
        self.desk = self._open_desk()
        try:
            if not path.exists():
                save_pool(self.models, out / "pool.yaml")
            write_json(out / "tasks.json", tasks)
            save(settings, path.with_suffix(".tmp"))
            put(path.with_suffix(".tmp"), path)
        except OSError as error:
            raise StoreError(f"{out} can't be written ({error.strerror}); choose another --out") from error

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_runners()
        ledger, until = self.ledger(), time.monotonic() + STOP_S
        while ledger.totals().overall.reserved_microusd and time.monotonic() < until:
            self.settle()  # what runners that were stopped in mid-call left open, as soon as they are gone
            time.sleep(0.1)
        self._lock.close()

    def tasks(self, split: Split, count: int) -> tuple[Task, ...]:
        """The tasks of a split that this run uses: those that are fair to its models."""
        return select_tasks(self.settings.env, split, count, 0, fair=self._fair, without=self.settings.without_tasks)

    # -- calls and money --------------------------------------------------------------------------------------------

    def _open_desk(self) -> DeskConfig:
        """Opens the call store and the ledger, and settles what a run that died here left open."""
        s = self.settings
        config = DeskConfig(str(self._calls.resolve()), str(self._ledger.resolve()), self._cap, replay=bool(s.replay))
        if s.replay:
            CallStore(self._calls).load(Path(s.replay))
        self.settle()
        return config

    def settle(self) -> None:
        """Closes what killed processes left open in the ledger: paid when the reply was stored, else lost."""
        calls, prices = CallStore(self._calls), {m.name: m.price for m in self.pool.models}

        def find(key: str) -> tuple[Usage, int] | None:
            call = calls.get(key)
            return (call.usage, prices[call.model].cost(call.usage)) if call and call.model in prices else None

        self.ledger().recover(find)

    @property
    def _calls(self) -> Path:
        return Path(self.settings.calls) if self.settings.calls else self.out / "calls.db"

    @property
    def _cap(self) -> int | None:
        """Micro-dollars, rounded down: what the studies of this run leave of its limit. None is open beside it."""
        spend = self.settings.max_spend
        return None if math.isinf(spend) else max(0, microusd(spend) - self._studies)

    @property
    def _ledger(self) -> Path:
        return self.out / "spend.db"

    def temperature(self, model: LanguageModel) -> float:
        """What a model is sampled at."""
        own = model.sampling.temperature
        return self.settings.temperature if own is None else own

    def ledger(self) -> SpendLedger:
        """What this run has spent, over all its attempts."""
        return SpendLedger(self._ledger, self._cap)

    # -- Ray --------------------------------------------------------------------------------------------------------

    def start_ray(self) -> None:
        """Connects to the cluster this runs on, or starts Ray on this machine, unless this process has done so."""
        alone = not ray.is_initialized() and self._init_ray()
        check_learners(self.settings, ray.cluster_resources(), resources(ray.nodes(), node_id()), self._lent_gpus)
        if not alone:
            self.desk = dataclasses.replace(self.desk, node=node_id(), actor=f"desk-{uuid.uuid4().hex[:8]}")
            self._desk_actor = serve_desk(self.desk, lent_environment(self.models))
        if not self.settings.replay:
            host_pool(self.models)
        for note in () if self.settings.replay else crowded(self.models, self.cpus):
            self.console.print(note, soft_wrap=True, highlight=False)

    def _init_ray(self) -> bool:
        """Whether no other node can join: it is a Ray of this process alone."""
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        for name in ("ray.rllib", "ray._common.deprecation"):
            logging.getLogger(name).setLevel(logging.ERROR)
        for name in ("ray.tune", "ray.train"):  # a failed trial is reported by the sweep, in one line
            logging.getLogger(name).setLevel(logging.CRITICAL)
        os.environ.update({k: v for k, v in QUIET.items() if k not in os.environ})
        address = os.environ.get("RAY_ADDRESS", "local")
        alone = address == "local"
        if alone and self.settings.cpus > (there := len(os.sched_getaffinity(0))):
            self.console.print(f"--cpus {self.settings.cpus}: this machine has {there}, which its processes share")
        on_sigterm = signal.getsignal(signal.SIGTERM)
        context = ray.init(
            address=address, logging_level=logging.ERROR, log_to_driver=False,
            runtime_env={"env_vars": QUIET}, **({"num_cpus": self.settings.cpus or narrowed()} if alone else {}),
        )  # fmt: skip
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # which Ray has set: it would end the process on the spot
        dashboard = (
            f"http://{context.dashboard_url}" if context.dashboard_url else "not installed (pip install 'ray[default]')"
        )
        self.console.print(f"Ray dashboard: {dashboard}", soft_wrap=True, markup=False)
        self.console.print(f"Ray's logs:    {context.address_info['session_dir']}/logs", soft_wrap=True)
        return alone

    @property
    def gpus(self) -> float:
        """GPUs that may be used to learn."""
        return max(0.0, ray.cluster_resources().get("GPU", 0.0) - self._lent_gpus)

    @property
    def _lent_gpus(self) -> int:
        """At most so many are local models'."""
        return 0 if self.settings.replay else sum(m.provider == "hf" and m.device != "cpu" for m in self.models.models)

    @property
    def cpus(self) -> int:
        """CPUs that may be used."""
        return self.settings.cpus or int(ray.cluster_resources().get("CPU", 1))

    def config(self) -> BoPOConfig:
        """The settings that all of this run's algorithms and runners share."""
        s = self.settings
        cfg = BoPOConfig()
        cfg.environment(
            s.env,
            env_config={
                "pool": self.models,
                "processes": self.cpus,
                "desk": self.desk,
                "temperature": s.temperature,
                "env": {"max_steps": s.max_steps},
            },
        )
        cfg.env_runners(num_envs_per_env_runner=s.lanes)
        cfg.router(**s.router_shape).learning(**s.learning)
        cfg.total_updates, cfg.async_share = s.updates, s.async_share
        cfg.lr, cfg.beta, cfg.cost_mode, cfg.cost_scale = s.lr, s.beta, s.cost, s.cost_scale
        cfg.group_size, cfg.tasks_per_update, cfg.t_max = s.group_size, s.tasks_per_update, s.max_steps
        cfg.boundary_dir, cfg.price_hash = str(self.episodes / "boundary"), self.pool.price_hash
        cfg.memory_per_env_runner, cfg.memory_for_main_process = runner_bytes(s.env, s.lanes), LEARNER_BYTES
        if s.backbone:
            from bopo_ray.rllib.backbone import footprint  # with transformers it takes a second

            more = footprint(s.router_shape, s.lanes, gpu=s.num_gpus_per_learner > 0)
            cfg.memory_per_env_runner += more.runner
            cfg.memory_for_main_process += more.learner
        cfg.home = self.desk.node
        return cfg

    def runners(self) -> EnvRunnerGroup:
        """Env runners on all CPUs, as far as there is memory for them, for everything outside of the sweep.

        Where more CPUs are asked for than there are, their nodes are still to come: nothing waits for those.
        """
        if self._group is None:
            cfg, nodes = self.config(), ray.nodes()
            growing = self.cpus > ray.cluster_resources().get("CPU", 0)
            if not growing:
                cfg.memory_per_env_runner = min(cfg.memory_per_env_runner, most_memory(nodes))
            count = self.cpus if growing else fitting(nodes, self.cpus, cfg.memory_per_env_runner)
            if count < self.cpus:
                self.console.print(
                    f"{count} env runners on {self.cpus} CPUs: each takes {cfg.memory_per_env_runner / 1e9:.1f} GB"
                )
            # RLlib would wait for all of them without a word; `Fleet` asks them itself, and says when none comes.
            cfg.env_runners(num_env_runners=count, validate_env_runners_after_construction=False)
            cfg.validate()
            self._group = RunnerGroup(config=cfg, local_env_runner=False)
        return self._group

    def stop_runners(self) -> None:
        """Frees the CPUs and memory of `runners`, also of those that hang in an episode."""
        if self._group is not None:
            self._group.foreach_env_runner(lambda runner: runner.stop(), local_env_runner=False, timeout_seconds=STOP_S)
            self._group._worker_manager.clear()
            self._group = None

    # -- episodes ---------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> CostMode:
        """Unit of C(tau)."""
        return CostMode(self.settings.cost)

    @property
    def episodes(self) -> Path:
        """Folder of all episodes."""
        return self.out / "episodes"

    def store(self, name: str) -> EpisodeStore:
        """The episodes called `name`."""
        return EpisodeStore(self.episodes / name, self.pool.price_hash)

    def play(
        self, title: str, store: EpisodeStore, specs: Sequence[EpisodeSpec], weights: Any = None,
        routers: Mapping[str, Router] | None = None,
    ) -> None:  # fmt: skip
        """Plays what `store` does not hold yet, writing episodes as they come; raises EngineError when one failed.

        `weights` are the learned router's, as `stages.load_policy` gives them.
        """
        missing = store.missing(specs)
        if not missing:
            return
        version = next(self._versions)
        pending: list[Episode] = []
        failures: list[Failure] = []
        with self.progress(title, len(specs), len(specs) - len(missing)) as advance:

            def on_episode(result: Episode | Failure) -> None:
                if isinstance(result, Failure):
                    failures.append(result)
                else:
                    pending.append(result)
                    if len(pending) >= 16:
                        store.append(pending)
                        pending.clear()
                advance()

            try:
                collect(self.runners(), missing, weights, version, on_episode, routers=routers)
            finally:
                store.append(pending)
        store.compact()
        if failures:
            raise EngineError(
                f"{len(failures)} of {len(specs)} episodes could not be played (first: {failures[0].spec.task.name}: "
                f"{failures[0].reason}); the others are kept: run the same command with --resume to try these again, "
                "or leave out a task that never can be played: --without-tasks NAME, with another --out and "
                f"--calls {self._calls}, which has all that was paid"
            )

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Any]:
        """A progress bar with how far and how long still; yields a function that advances it."""
        if not self.console.is_terminal:
            with self._log_progress(title, total, done) as advance:
                yield advance
            return
        columns = (
            TextColumn("{task.description:<28}"), BarColumn(bar_width=None), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda n=1: bar.update(task, advance=n)

    @contextmanager
    def _log_progress(self, title: str, total: int, done: int) -> Iterator[Any]:
        """The same for a log file: a line when it starts, at most one every LOG_EVERY_S seconds, one at the end.

        How long still is reckoned from the first that was done: before it, engines started.
        """
        started = said = time.monotonic()
        count = done
        first: tuple[float, float] = 0.0, math.inf  # when, and how many there were

        def say() -> None:
            now = time.monotonic()
            since, had = first
            when = f", {(now - since) / (count - had) * (total - count):.0f} s left" if had < count < total else ""
            self.console.print(f"{title}: {count}/{total}, {now - started:.0f} s{when}", highlight=False)

        def advance(n: int = 1) -> None:
            nonlocal count, said, first
            count += n
            if math.isinf(first[1]):
                first = time.monotonic(), count
            if time.monotonic() - said >= LOG_EVERY_S:
                said = time.monotonic()
                say()

        say()
        yield advance
        say()


def narrowed() -> int | None:
    """CPUs that this process may run on, where they are not all; else None: Ray itself knows a container's limit."""
    own = len(os.sched_getaffinity(0))
    return own if own < (os.cpu_count() or own) else None


def check_learners(s: Settings, there: Mapping[str, float], home: Mapping[str, float], lent_gpus: int = 0) -> None:
    """Raises ConfigError when a trial's learners ask for more than there is, by Ray's names of resources.

    Args:
        s: with the learners.
        there: of all nodes.
        home: of the node with the run's files, where learners read and write them.
        lent_gpus: that local models take.
    """
    asked = f"num_learners={s.num_learners}, num_gpus_per_learner={s.num_gpus_per_learner:g}"
    gpus = s.num_gpus_per_learner * max(1, s.num_learners)
    cpus = 1 + (0 if gpus else 0.5 * s.num_learners)
    if gpus and not home.get("GPU"):
        raise ConfigError(
            f"{asked}: the node where this run was started, which has its files, has no GPU, and learners work there; "
            "start it on a node with a GPU, or give --num-gpus-per-learner 0"
        )
    for what, needed, lent, name in (
        ("GPU", gpus, lent_gpus, "num_gpus_per_learner"), ("CPU", cpus, 0, "num_learners")
    ):  # fmt: skip
        found = there.get(what, 0.0)
        if needed and needed > found - lent:
            models = f", of which the local models take {min(lent, found):g}" if lent else ""
            raise ConfigError(
                f"{asked}: a trial takes {needed:g} {what}, here Ray has {found:g}{models}; give less with "
                f"--{name.replace('_', '-')}, or set RAY_ADDRESS to a cluster that has them"
            )
    if gpus and not torch.cuda.is_available():
        raise ConfigError(
            f"num_gpus_per_learner={s.num_gpus_per_learner:g}: this torch ({torch.__version__}) finds no GPU; install "
            "one built for it, or give --num-gpus-per-learner 0"
        )


def crowded(models: PoolSpec, processes: int) -> list[str]:
    """A line for each model of which more calls may be in flight than its endpoint is to have.

    Raises ConfigError where a process may begin less than a call a minute: it would soon be taken for a silent one.
    """
    for m in models.models:
        if m.provider == "openai" and 0 < m.requests_per_minute < processes:
            raise ConfigError(
                f"model {m.model!r}: requests_per_minute={m.requests_per_minute} lets each of {processes} processes "
                f"begin a call only every {60 * processes / m.requests_per_minute:.0f} s; need {processes} or more, "
                "a call a minute for each: set it in the pool file, or use fewer processes with --cpus"
            )
    return [
        f"{m.label}: max_concurrency={m.max_concurrency} is less than one call for each of {processes} processes: "
        f"up to {processes} calls may be in flight; use fewer with --cpus"
        for m in models.models
        if m.provider == "openai" and m.max_concurrency < processes
    ]
