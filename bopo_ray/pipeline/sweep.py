"""The Ray Tune sweep over lambda, seed and advantage mode: the points of the frontier.

Always true here: a finished point is in the ledger with its saved router and is not trained again; an interrupted
one goes on from its newest usable checkpoint.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune import Callback, CheckpointConfig, FailureConfig, RunConfig

from bopo_ray.errors import ConfigError, EngineError, SpendLimitError, StoreError
from bopo_ray.files import write_json
from bopo_ray.pipeline.baselines import Policy
from bopo_ray.pipeline.board import Board, board_folder
from bopo_ray.pipeline.card import describe
from bopo_ray.pipeline.curves import Point, keep_curves, training_curves
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import Settings
from bopo_ray.rllib.bopo import BoPO, BoPOConfig
from bopo_ray.rllib.collect import ALONE_S
from bopo_ray.rllib.placement import fitting, most_memory, resources
from bopo_ray.routers import LEARNED

__all__ = ["Point", "Sweep", "learned_policies", "untaught"]

log = logging.getLogger(__name__)
MODULE = Path("learner_group/learner/rl_module/default_policy")
"""Where RLlib keeps the router in an algorithm's checkpoint."""
CONTENTS = "contents.json"
"""In a checkpoint: its files and their sizes in bytes, written when all of them are there."""


def points_of(s: Settings) -> list[Point]:
    """All that a run of these settings trains by BoPO."""
    lambdas = s.train_lambdas or s.lambdas
    return [Point(a, lam, seed) for a in s.advantage for lam in lambdas for seed in s.seeds]


def learned_policies(s: Settings, out: Path) -> list[Policy]:
    """The routers that a run of these settings trains in the folder `out`, BoSFT's first, without offsets."""
    folder = out / "policies"
    return [
        Policy("bosft", "bosft", folder=folder / "bosft"),
        *(Policy(p.name, p.method, LEARNED, p.lam, p.seed, folder / p.name) for p in points_of(s)),
    ]


def untaught(out: Path) -> list[str]:
    """Points of a run none of whose updates had a group to learn from."""
    curves = training_curves(out)
    return [] if curves.empty else [name for name, own in curves.groupby("trial")["kl"] if own.isna().all()]


class Sweep:
    """All points of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.points = points_of(run.settings)
        self.ledger = run.out / "ledger.json"
        self.folder = run.out / "tune"
        self.refused = ""
        """Why a model refuses every call."""

    def finished(self) -> dict[str, dict[str, Any]]:
        """Ledger entries of finished points, by name."""
        entries = json.loads(self.ledger.read_text()) if self.ledger.exists() else {}
        return {k: v for k, v in entries.items() if self.policy(k).exists()}

    def policy(self, name: str) -> Path:
        """Folder of a point's saved router."""
        return self.run.out / "policies" / name

    def train(self, start: Path) -> None:
        """Trains all unfinished points from the router in `start`.

        Raises EngineError when one failed for good, StoreError when the disk is full, SpendLimitError when the money
        is spent, ConfigError when a model refuses every call.
        """
        s, run = self.run.settings, self.run
        for point in self.points:  # ended when the run was killed before it was in the ledger
            checkpoint = self._checkpoint(point)
            if checkpoint and _updates(checkpoint) >= s.updates and point.name not in self.finished():
                self.finish(point.name, Path(checkpoint))
        done = self.finished()
        todo = [p for p in self.points if p.name not in done]
        if not todo:
            return
        cfg = run.config().start_from(str(start.resolve()))
        cfg.episode_dir = str((run.episodes / "policy").resolve())
        cfg.boundary_dir = str(Path(str(cfg.boundary_dir)).resolve())
        ask(cfg, len(todo), run.cpus, run.gpus, ray.nodes())
        space = cfg.to_dict() | {
            "point": tune.grid_search(
                [{"advantage": p.advantage, "lam": p.lam, "seed": p.seed, "resume_from": self._checkpoint(p)}
                 for p in todo]
            )
        }  # fmt: skip
        attempt = self._attempt()
        total = len(self.points) * s.updates
        resumed = sum(_updates(self._checkpoint(p)) for p in todo)
        with run.progress("BoPO sweep", total, len(done) * s.updates + resumed) as advance:
            tuner = tune.Tuner(
                BoPO,
                param_space=space,
                tune_config=tune.TuneConfig(
                    trial_name_creator=_trial_name, trial_dirname_creator=_trial_name, metric=None,
                    max_concurrent_trials=max(1, run.cpus),
                ),
                run_config=RunConfig(
                    name=attempt, storage_path=str(self.folder.resolve()), verbose=0,
                    stop=_Stop(s.updates), failure_config=FailureConfig(max_failures=3),
                    checkpoint_config=CheckpointConfig(checkpoint_frequency=1, checkpoint_at_end=True, num_to_keep=2),
                    callbacks=[_Ledger(self, advance), Board(board_folder(run.out).resolve())],
                ),
            )  # fmt: skip
            failures = self._fit(tuner)
        if self.refused:
            raise ConfigError(self.refused)
        if not failures and any(p.name not in self.finished() for p in todo):
            raise SpendLimitError("the sweep stopped at the limit of --max-spend")
        if failures:
            full = _disk_full(failures[0], self.folder)
            raise (StoreError if full else EngineError)(
                f"{len(failures)} of {len(todo)} trials failed: {failures[0]}; finished points are kept: "
                f"{'free some space, then ' * full}run the same command with --resume. Details: {self.folder / attempt}"
            )
        if names := untaught(run.out):
            run.console.print(
                f"no update changed {', '.join(names)}: the episodes of each group were worth the same, so there was "
                "nothing to learn, and these routers are BoSFT's. Where BoSFT is too sure to try both models, lower "
                "--sharpness or --sft-epochs; else raise --group-size, --tasks-per-update or --updates (with another "
                "--out)", soft_wrap=True, highlight=False,
            )  # fmt: skip

    def _fit(self, tuner: tune.Tuner) -> list[str]:
        """Runs the trials; returns one line for each that failed."""
        try:
            return [_last_line(e) for e in tuner.fit().errors]
        except Exception as error:
            if not _disk_full(str(error), self.folder):
                raise
            return [f"{os.strerror(errno.ENOSPC)} ({_last_line(error)})"]  # Tune trips over its own unfinished files

    def finish(self, name: str, checkpoint: Path) -> None:
        """Keeps the router of a point's last checkpoint, enters the point in the ledger and removes its checkpoints."""
        target = self.policy(name)
        temporary = target.with_suffix(".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(checkpoint / MODULE, temporary)
        point = next(p for p in self.points if p.name == name)
        how = {"method": point.method, "lam": point.lam, "seed": point.seed, "updates": _updates(checkpoint)}
        describe(self.run, temporary, name, **how)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        write_json(self.ledger, self.finished() | {name: {"updates": how["updates"]}})
        for folder in self.folder.glob(f"attempt-*/{name}/checkpoint_*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _attempt(self) -> str:
        """Name of the next attempt's folder, above all that are there."""
        numbers = [int(f.name.removeprefix("attempt-")) for f in self.folder.glob("attempt-*")]
        return f"attempt-{max(numbers, default=-1) + 1}"

    def _checkpoint(self, point: Point) -> str | None:
        """The newest usable checkpoint of an interrupted point."""
        folders = sorted(self.folder.glob(f"attempt-*/{point.name}/checkpoint_*"), key=_updates, reverse=True)
        return next((str(f.resolve()) for f in folders if _updates(f) > 0), None)


def ask(cfg: BoPOConfig, points: int, cpus: int, gpus: float, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Sets what each of so many trials asks for: those that have room at once share all that a run may use.

    Args:
        cfg: with the memory of a main process and of a runner, and `home`.
        points: trials to run.
        cpus, gpus: that they may use; of CPUs more than there are where their nodes are still to come.
        nodes: `ray.nodes()`.
    """
    shares = [node["Resources"] for node in nodes if node["Alive"]]
    home, runner, main = resources(nodes, cfg.home), cfg.memory_per_env_runner, cfg.memory_for_main_process
    own_cpus = min(0.5, home.get("CPU", 0.0)) if cfg.home else 0.5  # a cluster's head may have none to give
    own_gpus = 0.0 if cfg.num_learners else cfg.num_gpus_per_learner
    fits = [points]
    if cfg.num_gpus_per_learner:
        fits.append(int(gpus / (cfg.num_gpus_per_learner * max(1, cfg.num_learners))))
    if cfg.home:  # all main processes are there
        least = {"CPU": own_cpus, "GPU": own_gpus, "memory": main}
        fits += [int(home.get(name, 0) / each) for name, each in least.items() if each]
    at_once, most = max(1, min(fits)), max(runner, main)
    growing = cpus > sum(share.get("CPU", 0) for share in shares)  # by nodes whose memory is not known yet
    room = cpus if growing else fitting(nodes, cpus, most)
    runners = room // at_once - 1 - math.ceil(cfg.num_learners * cfg.num_cpus_per_learner)
    if not growing:
        slots = sum(int(share.get("memory", 0) // most) for share in shares)
        runners = min(runners, slots // at_once - 1 - cfg.num_learners)
    runners = max(1, runners)
    cfg.env_runners(num_env_runners=runners, num_cpus_per_env_runner=0.5 if runners == 1 else 1)
    cfg.resources(num_cpus_for_main_process=own_cpus)
    need = main + (cfg.num_learners + (runners if len(shares) == 1 else 1)) * runner  # a learner asks as a runner does
    have = min(need, most_memory(nodes))  # one trial must fit, else none ever starts
    cfg.memory_for_main_process, cfg.memory_per_env_runner = main * have // need, runner * have // need
    if cfg.home:
        cfg.memory_for_main_process = min(cfg.memory_for_main_process, int(home.get("memory", 0)))


class _Ledger(Callback):
    """Keeps the progress bar, the training curves and the ledger of finished points; says that trials find no room."""

    def __init__(self, sweep: Sweep, advance: Any) -> None:
        self.sweep, self.advance = sweep, advance
        self.updates: set[tuple[str, int]] = set()
        self.busy = time.monotonic()
        """When a trial ran last, or that none does was told."""

    def __getstate__(self) -> dict[str, Any]:
        """Tune pickles its callbacks for a restore of its own, which is not used: the ledger does that here."""
        return {}

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:
        """They may wait without an end: where no node has room for one, or another job has it."""
        now, waiting = time.monotonic(), [trial for trial in trials if trial.status == trial.PENDING]
        if not waiting or any(trial.status == trial.RUNNING for trial in trials):
            self.busy = now
        elif now - self.busy > ALONE_S:
            self.busy = now
            asked, home = waiting[0].placement_group_factory, waiting[0].config["home"]
            here = f", of it {_in_words(asked.bundles[0])} on the node where this run was started" if home else ""
            log.warning(
                "no trial has started, and %d wait: one asks Ray for %s%s (see `ray status`); stop other jobs, add "
                "nodes, or go on later with --resume",
                len(waiting), _in_words(asked.required_resources), here,
            )  # fmt: skip

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:
        self.sweep.refused = result.get("refused") or self.sweep.refused
        for line in result.get("warned", "").splitlines():
            log.warning("%s: %s", trial, line)
        update = str(trial), int(result["updates"])
        if update not in self.updates:  # a trial that failed repeats some
            self.updates.add(update)
            self.advance()
        if not (result.get("refused") or result.get("spend_limit")):  # then it was no update
            keep_curves(self.sweep.run.out, _point(trial), result)

    def on_checkpoint(self, iteration: int, trials: Any, trial: Any, checkpoint: Any, **info: Any) -> None:
        folder = Path(checkpoint.path)
        sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
        write_json(folder / CONTENTS, sizes)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        if trial.last_result["updates"] >= self.sweep.run.settings.updates:  # else it stopped before
            self.sweep.finish(str(trial), Path(trial.checkpoint.path))


class _Stop:
    """Ends a trial after its last update, when the run's money is spent, or when a model refuses every call."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return result["updates"] >= self.updates or bool(result.get("spend_limit") or result.get("refused"))


def _point(trial: Any) -> Point:
    p = trial.config["point"]
    return Point(p["advantage"], p["lam"], p["seed"])


def _trial_name(trial: Any) -> str:
    return _point(trial).name


def _updates(checkpoint: Path | str | None) -> int:
    """Updates that a checkpoint holds; 0 for none or a damaged one."""
    if checkpoint is None:
        return 0
    folder = Path(checkpoint)
    try:
        sizes = json.loads((folder / CONTENTS).read_text())
        whole = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return int((folder / "updates.json").read_text()) if whole else 0
    except (OSError, ValueError):
        return 0


def _in_words(asked: Mapping[str, float]) -> str:
    devices = [f"{asked[name]:g} {name}" for name in ("CPU", "GPU") if asked.get(name)]
    return ", ".join([*devices, f"{asked.get('memory', 0) / 1e9:.1f} GB"])


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _disk_full(reason: str, folder: Path) -> bool:
    return os.strerror(errno.ENOSPC) in reason or shutil.disk_usage(folder).free < 1 << 16
