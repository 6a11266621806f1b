"""Boundary rollouts, the taxonomy and BoSFT: made once, shared by all trials of a sweep."""

from __future__ import annotations

import gc
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pyarrow as pa
import ray
import torch

from bopo_ray.agent import router_view
from bopo_ray.errors import ConfigError, EngineError
from bopo_ray.files import write_json
from bopo_ray.method.synthesis import Expert, choose_expert, gate, reliable_policies, stratified_shares, task_gate
from bopo_ray.method.taxonomy import classify, counts
from bopo_ray.pipeline.baselines import dev_tasks
from bopo_ray.pipeline.card import describe
from bopo_ray.pipeline.run import Run
from bopo_ray.records import CostMode, Difficulty, Episode, EpisodeSpec, Phase
from bopo_ray.rllib.bopo import Boundary, read_boundaries
from bopo_ray.rllib.bosft import BoSFT, BoSFTConfig
from bopo_ray.rllib.experts import ExpertFile
from bopo_ray.rllib.open_desk import DeskConfig, borrow_environment
from bopo_ray.rllib.saved import acting_module, check_pair
from bopo_ray.rllib.value import fit_value, rank_quality
from bopo_ray.routers import ALWAYS_LARGE, ALWAYS_SMALL
from bopo_ray.store import write_table
from envs.base import Task

__all__ = ["bosft_stage", "boundary_stage", "load_policy"]


def boundary_stage(run: Run) -> dict[str, Boundary]:
    """K rollouts of each boundary policy on each training task; writes boundaries.parquet.

    Raises GateError where no task is Hard.
    """
    specs = [
        EpisodeSpec(task, Phase.BOUNDARY, policy, 0, member, 0, router=policy)
        for task in run.train
        for policy in (ALWAYS_SMALL, ALWAYS_LARGE)
        for member in range(run.settings.k)
    ]
    store = run.store("boundary")
    if run.settings.backbone and len(store.missing(specs)) == len(specs):
        _check_context(run)
    run.play("boundary rollouts", store, specs)
    boundaries = read_boundaries(store.folder, run.pool.price_hash, run.mode)
    labels = classify(b.stats for b in boundaries.values())
    rows = [
        {
            "task": name, "difficulty": str(labels[name]), "successes_small": b.stats.successes_small,
            "successes_large": b.stats.successes_large, "k": b.stats.k_small,
            "cost_small_usd": float(np.mean([e.cost_microusd for e in b.small])) / 1e6,
            "cost_large_usd": float(np.mean([e.cost_microusd for e in b.large])) / 1e6,
            "outcome_small": b.stats.outcome_small, "outcome_large": b.stats.outcome_large,
            "steps_small": float(np.mean([len(e.steps) for e in b.small])), "steps_large": b.stats.steps_large,
        }
        for name, b in boundaries.items()
    ]  # fmt: skip
    write_table(pa.Table.from_pylist(rows), run.out / "boundaries.parquet")
    tasks, inverted = counts(labels), sum(r["cost_small_usd"] > r["cost_large_usd"] for r in rows)
    run.console.print(
        "taxonomy: "
        + ", ".join(f"{n} {d}" for d, n in tasks.items())
        + f"; always-small costs more than always-large on {inverted} of {len(rows)} tasks"
    )
    if run.mode is CostMode.USD and not any(r["cost_large_usd"] + r["cost_small_usd"] for r in rows):
        run.console.print("every call costs $0: lambda has no effect; count calls of the large model with --cost calls")
    task_gate(tasks, override=run.settings.ignore_gate)
    return boundaries


def _check_context(run: Run) -> None:
    """Raises ConfigError, before anything is paid for, where a task is too long for the backbone's context."""
    from bopo_ray.rllib.prompt import prompt_of  # brings transformers, which small routers do without

    s = run.settings
    tasks = (*run.train, *run.test, *(dev_tasks(run) if s.shares else ()))
    read = ray.remote(num_cpus=1, max_calls=1)(_task_texts)  # its process ends with it, and takes its engine along
    with run.progress("reading the tasks", len(tasks)) as advance:
        arguments = run.desk, s.env, {"max_steps": s.max_steps}
        found = [read.remote(*arguments, tasks[i :: run.cpus]) for i in range(run.cpus)]
        texts = {name: text for part in ray.get(found) for name, text in part.items()}
        advance(len(texts))
    prompt = prompt_of(run.settings.router_shape["backbone"], s.backbone_context)
    least = {name: prompt.least(router_view(text, "", (), 0, "").split("\n")[0]) for name, text in texts.items()}
    if too_long := [name for name, n in least.items() if n > s.backbone_context]:
        longest = max(too_long, key=lambda name: least[name])
        raise ConfigError(
            f"backbone_context={s.backbone_context}: too short for {len(too_long)} of {len(tasks)} tasks; the task "
            f"text of {longest} and a budget alone make a prompt of {least[longest]} tokens; need at least that, set "
            "it with --backbone-context"
        )


def _task_texts(desk: DeskConfig, env_id: str, arguments: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, str]:
    """By name; without those that the engine could not start."""
    borrow_environment(desk)  # it says where the tasks are
    env, texts = gym.make(env_id, disable_env_checker=True, **arguments), dict[str, str]()
    for task in tasks:
        try:
            texts[task.name] = str(env.reset(options={"task": task.name})[1]["task_text"])
        except EngineError:
            continue
    env.close()
    return texts


def bosft_stage(run: Run, boundaries: dict[str, Boundary]) -> Path:
    """Stratified rollouts of the Hard tasks, then supervised learning of the cheapest successes.

    Returns the folder of the saved router. Raises GateError when it gives LARGE too little probability.
    """
    s, folder = run.settings, run.out / "policies" / "bosft"
    hard = [b.task for b in boundaries.values() if b.stats.difficulty() is Difficulty.HARD]
    strata = [f"random({p:g})" for p in stratified_shares(s.strata)]
    strata += [f"first-large({k})" for k in s.schedules if 0 < k < s.max_steps]
    # With draws of their own: in those of the boundary rollouts the small model has mostly lost, else it were not Hard.
    specs = [
        EpisodeSpec(task, Phase.STRATIFIED, router, 0, i, 0, router=router, sample=s.k + i)
        for task in hard
        for i, router in enumerate(strata)
    ]
    store = run.store("stratified")
    if specs:
        run.play("stratified rollouts", store, specs)
    run.stop_runners()
    report = run.out / "bosft.json"
    if not (report.exists() and folder.exists()):
        stratified: dict[str, list[Episode]] = {}
        for e in store.read():
            stratified.setdefault(e.spec.task.name, []).append(e)
        known = {name: (*b.small, *b.large, *stratified.get(name, ())) for name, b in boundaries.items()}
        write_json(report, _train(run, _experts(run, boundaries, stratified), known, folder))
    _check_pair(run, folder)
    figures = json.loads(report.read_text())
    p = gate(np.full(figures["hard_steps"], figures["p_large_hard"]), override=s.ignore_gate)
    for line in _said(figures | {"epochs": figures.get("epochs", s.sft_epochs)}, p):
        run.console.print(line, soft_wrap=True)
    return folder


def _said(figures: Mapping[str, Any], p_large_hard: float) -> Iterator[str]:
    """What bosft.json holds, for people."""
    held_out = figures["held_out"]
    yield (
        f"BoSFT imitates {figures['experts']} trajectories, one a task, {figures['steps']} steps in all; it keeps "
        f"epoch {figures['epoch']} of {figures['epochs']}, whose loss is {figures['loss']:.3f}"
        + (f", and {figures['validation_loss']:.3f} on {held_out} held-out tasks" if held_out else "")
    )
    yield f"it gives a larger model a mean probability of {p_large_hard:.2f} on Hard training tasks; BoPO needs 0.10"
    if classes := figures.get("calibration"):
        yield (
            f"that probability by class on {'held-out' if held_out else 'training'} tasks (the expert's share of large "
            "calls; how far off, on average): "
            + ", ".join(f"{d} {c['p_large']:.2f} ({c['large']:.2f}; {c['error']:.2f})" for d, c in classes.items())
        )


def _experts(run: Run, boundaries: Mapping[str, Boundary], stratified: Mapping[str, Sequence[Episode]]) -> list[Expert]:
    """What BoSFT imitates, of the rollouts that are stored; by task."""
    labels = classify(b.stats for b in boundaries.values())
    hard = [name for name, d in labels.items() if d is Difficulty.HARD]
    tried = [e for n in hard for e in (*stratified.get(n, ()), *boundaries[n].small, *boundaries[n].large)]
    reliable = reliable_policies(tried, run.mode, run.settings.reliability)
    if reliable:
        run.console.print(f"of Hard tasks BoSFT imitates successes of {', '.join(sorted(reliable))}")
    chosen = [
        choose_expert(labels[name], b.small, b.large, stratified.get(name, ()), run.mode, reliable)
        for name, b in boundaries.items()
    ]
    return [expert for expert in chosen if expert]


def _train(run: Run, experts: Sequence[Expert], known: Mapping[str, Sequence[Episode]], folder: Path) -> dict[str, Any]:
    """Trains and saves the router; where there are enough tasks, every eighth is held out to choose the epoch by.

    The calibration is that on held-out tasks, where there are any. `known`: the rollouts of each task.
    """
    s = run.settings
    cfg = BoSFTConfig().environment(s.env, env_config=run.config().env_config).router(**s.router_shape)
    cfg.learning(**s.learning)
    cfg.lr, cfg.total_epochs = s.bosft_lr, s.sft_epochs
    cfg.debugging(seed=0)
    algorithm = cfg.build_algo()
    assert isinstance(algorithm, BoSFT)
    split = [i % 8 == 0 for i in range(len(experts))] if len(experts) >= 16 else [False] * len(experts)
    files = run.out / "experts"
    files.mkdir(exist_ok=True)
    own, held_out = (
        ExpertFile.write(files / f"{name}.parquet", [e for e, out in zip(experts, split, strict=True) if out is held])
        for name, held in (("train", False), ("held_out", True))
    )
    algorithm.set_experts(own)
    value = _read_value(run, algorithm, experts, split, known) if s.router_shape.get("value") else {}
    temporary = folder.with_suffix(".tmp").resolve()
    judges = held_out if held_out.trajectories else None
    with run.progress("BoSFT", s.sft_epochs) as advance:
        kept = algorithm.fit(s.sft_epochs, judges, temporary, s.sft_patience, advance)
    algorithm.load_router(temporary)
    algorithm.sharpen(s.sharpness)
    algorithm.save_router(temporary)
    seen = [algorithm.judge(file) for file in (own, held_out) if file.trajectories]
    p_hard = np.concatenate([j.of(Difficulty.HARD) for j in seen])
    algorithm.stop()
    del algorithm
    gc.collect()
    torch.cuda.empty_cache()  # else what learning took of the GPU stays taken during the sweep
    describe(run, temporary, folder.name, method="bosft", epochs=kept["epoch"], experts=len(experts))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return kept | {
        "experts": len(experts), "held_out": held_out.trajectories, "steps": sum(len(e.labels) for e in experts),
        "hard_steps": int(p_hard.size), "p_large_hard": float(p_hard.mean()) if p_hard.size else 0.0,
        "value": value,
        "calibration": {d: c._asdict() for d, c in seen[-1].calibration().items()},
    }  # fmt: skip


def _read_value(
    run: Run, algorithm: BoSFT, experts: Sequence[Expert], held_out: Sequence[bool],
    known: Mapping[str, Sequence[Episode]],
) -> dict[str, Any]:  # fmt: skip
    """Fits always-small's value to the tasks that are not held out, for the router to read; says what it is worth."""
    s = run.settings
    judges = {e.episode.spec.task.name for e, out in zip(experts, held_out, strict=True) if out}
    run.console.print("fitting the value of always-small to the rollouts")
    value = fit_value(
        (e for name, own in known.items() if name not in judges for e in own), s.context, s.boundary_value
    )
    if value is None:
        run.console.print("always-small wins, or loses, whatever it has begun: its value says nothing")
        return {}
    algorithm.set_value(value)
    auc = rank_quality(value, (e for name in judges for e in known[name]), s.context)
    known_as = (
        "" if math.isnan(auc) else f"; of {len(judges)} held-out tasks it ranks the hand-overs with an AUC of {auc:.2f}"
    )
    run.console.print(f"the value of always-small, fitted to {value.states:,} states{known_as}")
    return {"states": value.states, "auc": None if math.isnan(auc) else auc}


def load_policy(run: Run, folder: Path) -> Any:
    """The weights to act with of a saved router, as numpy arrays: its average over the updates.

    Raises StoreError for a router of other models or prices, or a damaged one.
    """
    _check_pair(run, folder)
    return dict(acting_module(folder).get_state())


def _check_pair(run: Run, folder: Path) -> None:
    mend = "put this run's own router back, or remove that folder, for --resume to train it again"
    check_pair(folder, [m.name for m in run.pool.models], run.pool.price_hash, mend)
