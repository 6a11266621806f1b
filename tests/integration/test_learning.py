"""BoPO as RLlib runs it: checkpoints to the last bit, the ratio of a first step, one learner or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.rllib.core import DEFAULT_MODULE_ID

from bopo_ray.method.synthesis import Expert
from bopo_ray.models import load_pool
from bopo_ray.models.pool import resolve_pool
from bopo_ray.models.pricing import price_table
from bopo_ray.pipeline.settings import load_settings
from bopo_ray.records import CostMode, Difficulty
from bopo_ray.rllib.bopo import BoPO, BoPOConfig, read_boundaries
from bopo_ray.rllib.bosft import BoSFT, BoSFTConfig
from bopo_ray.rllib.experts import ExpertFile
from tests.integration.conftest import Frontier
from tests.tiny_router import make_qwen

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def algorithm(
    run: Frontier, learners: int = 0, minibatch: int = 64, backbone: Path | None = None, group: int = 4
) -> BoPO:
    """BoPO on the boundary episodes of a finished run, from its BoSFT router, or from a backbone."""
    s = load_settings(run.out / "settings.yaml")
    cfg = BoPOConfig()
    cfg.environment(
        s.env, env_config={"pool": resolve_pool(s.models, "", "", price_table()), "env": {"max_steps": s.max_steps}}
    )
    cfg.env_runners(num_env_runners=0, create_local_env_runner=True, num_envs_per_env_runner=4)
    if backbone is None:
        cfg.router(**s.router_shape)
        cfg.start_from(str(run.out / "policies" / "bosft"))
    else:
        cfg.router(backbone=str(backbone), context=1024, lora_rank=4)
    cfg.boundary_dir, cfg.price_hash = str(run.out / "episodes" / "boundary"), load_pool(s.models).price_hash
    cfg.group_size, cfg.tasks_per_update, cfg.t_max, cfg.minibatch_size = group, 4, s.max_steps, minibatch
    cfg.learners(num_learners=learners)
    cfg.debugging(seed=3)
    built = cfg.build_algo()
    assert isinstance(built, BoPO)
    return built


def leaves(state: Any, path: str = "") -> dict[str, Any]:
    """A nested state as {path: array or number}."""
    if isinstance(state, dict):
        return {k: v for key, item in state.items() for k, v in leaves(item, f"{path}/{key}").items()}
    if isinstance(state, list | tuple):
        return {k: v for i, item in enumerate(state) for k, v in leaves(item, f"{path}/{i}").items()}
    return {path: np.asarray(state)}


def learned(built: BoPO) -> dict[str, Any]:
    """Everything that learning goes on from: router, reference, optimizer; and the place in the task lists."""
    learner = built.learner_group.get_state()["learner"]
    parts = {k: learner[k] for k in ("rl_module", "optimizer")}
    return leaves(parts | {"bopo": built.get_state()["bopo"]})


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def figures(result: dict[str, Any]) -> dict[str, float]:
    logged = result["learners"][DEFAULT_MODULE_ID]
    return {k: float(logged[k]) for k in ("ratio", "clip_fraction", "kl", "gradients_default_optimizer_global_norm")}


def test_a_restored_run_goes_on_to_the_last_bit(toy_run: Frontier, ray_session: Any, tmp_path: Path) -> None:
    first = algorithm(toy_run)
    start = learned(first)
    first.train()
    first.save_to_path(str(tmp_path / "checkpoint"))
    saved = learned(first)
    first.train()
    wanted = learned(first)
    first.stop()
    for k in (k for k in wanted if "average" in k):
        last, one, two = k.replace("average", "policy"), saved[k], wanted[k]
        assert np.array_equal(one, saved[last]), k
        assert np.allclose(two, 0.2 * one + 0.8 * wanted[last], atol=1e-6), k
    assert not same(start, saved) and not same(saved, wanted)
    assert all(any(part in k for k in wanted) for part in ("reference", "average", "exp_avg_sq"))
    for k in wanted:
        if "reference" in k:
            assert np.array_equal(wanted[k], start[k]), k  # frozen since BoSFT

    second = algorithm(toy_run)
    assert same(learned(second), start)
    second.restore_from_path(str(tmp_path / "checkpoint"))
    assert same(learned(second), saved)
    assert second.updates == 1
    second.train()
    second.stop()
    assert same(learned(second), wanted)


def test_the_ratio_is_one_before_the_first_step(toy_run: Frontier, ray_session: Any) -> None:
    built = algorithm(toy_run, minibatch=4096, group=16)  # all rows in one minibatch; one group at least differs
    first = figures(built.train())
    built.stop()
    assert first["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["clip_fraction"] == 0.0
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is where it starts
    assert first["gradients_default_optimizer_global_norm"] > 0


def test_two_learners_learn_what_one_does(toy_run: Frontier, ray_session: Any, tmp_path: Path) -> None:
    backbone, states = make_qwen(tmp_path / "backbone"), []
    for learners, minibatch in ((0, 80), (2, 40)):
        built = algorithm(toy_run, learners, minibatch, backbone)
        before = learned(built)
        built.train()
        after = learned(built)
        states.append({k: after[k] - before[k] for k in after if "rl_module" in k and "/policy." in k})
        built.stop()
    one, two = states
    assert one.keys() == two.keys() and one
    moved = np.concatenate([one[k].ravel() for k in one])
    apart = np.concatenate([(one[k] - two[k]).ravel() for k in one])
    assert np.abs(moved).max() > 1e-4
    # Adam's first step is lr * sign(gradient) nearly everywhere: only where the gradient is rounding it may differ.
    assert np.mean(np.abs(apart) > 1e-5) < 1e-2


def test_bosft_keeps_the_epoch_that_does_best_on_held_out_tasks(
    toy_run: Frontier, ray_session: Any, tmp_path: Path
) -> None:
    s = load_settings(toy_run.out / "settings.yaml")
    boundaries = read_boundaries(toy_run.out / "episodes" / "boundary", load_pool(s.models).price_hash, CostMode.USD)
    rollouts = [b.large[0] for b in boundaries.values()]
    easy = [Expert(e, (0,) * len(e.steps), Difficulty.EASY) for e in rollouts]
    contrary = [Expert(e, (1,) * len(e.steps), Difficulty.EASY) for e in rollouts]
    own, other = (ExpertFile.write(tmp_path / f"{n}.parquet", e) for n, e in (("own", easy), ("other", contrary)))
    cfg = BoSFTConfig().environment(s.env, env_config={"pool": resolve_pool(s.models, "", "", price_table())})
    cfg.router(**s.router_shape).debugging(seed=0)
    built = cfg.build_algo()
    assert isinstance(built, BoSFT)
    built.set_experts(own)
    kept = built.fit(9, other, tmp_path / "router", patience=2)
    # The more it learns, the worse it does there, and so it stops.
    assert (kept["epoch"], kept["epochs"]) == (1, 3) and built.judge(other).loss > kept["validation_loss"]
    built.load_router(tmp_path / "router")
    assert built.judge(other).loss == pytest.approx(kept["validation_loss"])
    assert built.fit(3, None, tmp_path / "router", patience=2)["epoch"] == 3
    before = built.judge(own)
    calibrated = before.calibration()["easy"]
    assert calibrated.steps == sum(own.steps.values()) == sum(len(e.labels) for e in easy) and calibrated.large == 0
    assert calibrated.p_large == pytest.approx(before.of(Difficulty.EASY).mean()) == calibrated.error
    none = built.fit(0, other, tmp_path / "untrained")
    assert none == {"epoch": 0, "epochs": 0, "loss": before.loss, "validation_loss": built.judge(other).loss}
    built.load_router(tmp_path / "untrained")
    assert built.judge(own).loss == before.loss, "no epoch, no change"
    # In parts no longer than an episode: the same figures, and another epoch of many updates.
    cfg.part_steps = 1
    small = cfg.build_algo()
    assert isinstance(small, BoSFT)
    small.load_router(tmp_path / "untrained")
    assert small.judge(own).loss == pytest.approx(before.loss)
    small.set_experts(own)
    small.fit(1, None, tmp_path / "parts")
    assert small.judge(own).loss < before.loss
    built.stop()
    small.stop()
