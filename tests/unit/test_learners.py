"""Who learns, and at which rate: the schedule by hand, and what is said when asked-for devices are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module import RLModuleSpec
from ray.rllib.utils.actor_manager import RemoteCallResults, ResultOrError

from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.run import check_learners
from bopo_ray.pipeline.settings import Settings
from bopo_ray.rllib import bopo
from bopo_ray.rllib.backbone import Backbone, Trunk
from bopo_ray.rllib.batch import Group, bopo_batch
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.bosft import BoSFT
from bopo_ray.rllib.config import ask_learners
from bopo_ray.rllib.encode import Reader
from bopo_ray.rllib.learner import BoPOTorchLearner, rate_factor
from bopo_ray.rllib.open_desk import DeskConfig
from bopo_ray.rllib.router_module import ROUTER_DEFAULTS, RouterModule
from tests.tiny_router import make_qwen
from tests.toy import play, toy_spec


def test_the_rate_rises_and_falls() -> None:
    # Up over the first fifth, then down to a tenth: at 0.6 it is half-way down, 1 - 0.9 / 2.
    found = [rate_factor(x, 0.2, 0.1) for x in (0.05, 0.1, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.25, 0.5, 1.0, 0.55, 0.1])
    assert [rate_factor(x, 0.0, 1.0) for x in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_devices_that_are_not_there_are_named() -> None:
    check_learners(Settings(), {"CPU": 1.0}, {"CPU": 1.0})
    check_learners(Settings(), {"CPU": 1.0}, {"CPU": 1.0}, lent_gpus=2)
    check_learners(Settings(num_learners=2), {"CPU": 2.0}, {})
    cpus, one, two = {"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 2.0}
    cases = (
        (Settings(num_gpus_per_learner=1), cpus, cpus, 0, "run was started, .* no GPU, .*; start it on a node with"),
        (Settings(num_gpus_per_learner=1), two, cpus, 0, "run was started, .* no GPU, .*; start it on a node with"),
        (Settings(num_learners=2, num_gpus_per_learner=1), one, one, 0, "takes 2 GPU, here Ray has 1; give less with"),
        (Settings(num_gpus_per_learner=1), two, one, 2, "1 GPU, here Ray has 2, of which the local models take 2; "),
        (Settings(num_learners=4), {"CPU": 2.0}, cpus, 0, "num_learners=4, .*: a trial takes 3 CPU, here Ray has 2; "),
    )
    for s, there, home, lent, rule in cases:
        with pytest.raises(ConfigError, match=rule) as caught:
            check_learners(s, there, home, lent)
        assert "\n" not in str(caught.value)


def test_rllibs_names_reach_its_config() -> None:
    cfg = BoPOConfig().learning(**Settings(num_learners=2, num_gpus_per_learner=1).learning)
    assert (cfg.num_learners, cfg.num_gpus_per_learner, cfg.num_cpus_per_learner) == (2, 1, 0)
    assert BoPOConfig().learning(**Settings(num_learners=2).learning).num_cpus_per_learner == 0.5


class Remote(LearnerGroup):
    """As RLlib's with two learners elsewhere: an error of one is a result like others; later calls pass it by."""

    def __init__(self, broken: tuple[int, ...]) -> None:
        self._is_shut_down, self.broken, self.asked = True, broken, list[int]()

    def foreach_learner(self, func: Any, *, healthy_only: bool = True, remote_actor_ids: Any = None) -> Any:
        results = RemoteCallResults()
        for i in remote_actor_ids or (0, 1):
            self.asked.append(i)
            if i not in self.broken:
                results.add_result(i, ResultOrError(result=f"of {i}"), None)
            elif not healthy_only:
                results.add_result(i, ResultOrError(error=OSError("no space left")), None)
        return results


def test_what_goes_wrong_in_a_learner_elsewhere_is_raised() -> None:
    assert ask_learners(Remote(()), str) == ["of 0", "of 1"]
    group = Remote((1,))
    assert ask_learners(group, str, first=True) == ["of 0"] and group.asked == [0]
    algorithm: Any = object.__new__(BoSFT)
    algorithm.learner_group = group
    folder: Any = Path("anywhere")
    for ask, what in (
        (BoSFT.save_router, folder), (BoSFT.load_router, folder), (BoSFT.sharpen, 2.0), (BoSFT.set_value, None)
    ):  # fmt: skip
        with pytest.raises(OSError, match="no space left"):
            ask(algorithm, what)


def test_a_trial_borrows_what_a_backbone_is_found_by_before_it_loads_one(monkeypatch: pytest.MonkeyPatch) -> None:
    done, desk = list[object](), DeskConfig(actor="desk")
    monkeypatch.setattr(bopo, "borrow_environment", done.append)
    monkeypatch.setattr(Algorithm, "setup", lambda self, config: [done.append("loaded"), 1 / 0])
    for given in (BoPOConfig().environment(env_config={"desk": desk}), {"env_config": {"desk": desk}}):
        with pytest.raises(ZeroDivisionError):
            object.__new__(bopo.BoPO).setup(given)
    assert done == [desk, "loaded"] * 2


def test_a_router_to_start_from_is_found_in_a_trial() -> None:
    cfg = BoPOConfig().router(width=16, layers=1).start_from("/saved")
    spec = BoPOConfig().update_from_dict(cfg.to_dict()).rl_module_spec
    assert (spec.module_class, spec.load_state_path, spec.model_config["width"]) == (RouterModule, "/saved", 16)
    assert BoPOConfig().rl_module_spec.load_state_path is None


# -- an update --------------------------------------------------------------------------------------------------------


def updated(backbone: Path, tokens_per_pass: int, **how: Any) -> tuple[dict[str, torch.Tensor], BoPOTorchLearner]:
    """The weights of a tiny backbone after an update of two optimizer steps."""
    shape = ROUTER_DEFAULTS | {"backbone": str(backbone), "context": 1024, "lora_rank": 4}
    cfg = BoPOConfig().router(**shape).learning(0, 0, tokens_per_pass, 0.5, 0.0)
    played = [play(toy_spec(f"{kind}/1", member=i))[0] for i, kind in enumerate(("fetch", "mix", "long", "measure"))]
    groups = [Group(tuple(played), np.array([1.0, -1.0, 0.5, -0.5]), ((played[1], 0.5),))]
    ids = gym.spaces.Box(-1, 2**31 - 1, (1024,), np.int32)
    learner = BoPOTorchLearner(config=cfg, module_spec=RLModuleSpec(
        module_class=RouterModule, model_config=shape, observation_space=ids, action_space=gym.spaces.Discrete(2)
    ))  # fmt: skip
    learner.build()
    learner.set_reference()
    steps = sum(len(e.steps) for e in (*played, played[1]))
    made = bopo_batch(groups, 20, Reader.of(shape), -(-steps // 2), 1, np.random.default_rng(0))
    assert made is not None
    learner.update(batch=made.data, minibatch_size=made.rows, num_epochs=1, **how)
    return {k: v.clone() for k, v in learner.router.policy.state_dict().items()}, learner


def test_more_passes_change_nothing_but_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = make_qwen(tmp_path / "backbone")
    seen: list[int] = []
    read = Trunk.read
    monkeypatch.setattr(
        Trunk, "read", lambda self, ids, *a, **k: (seen.append(ids.numel()), read(self, ids, *a, **k))[1]
    )
    start, many = made_before(backbone), updated(backbone, 700)[0]
    passes_of_many, largest = len(seen), max(seen)
    seen.clear()
    one, learner = updated(backbone, 1 << 20)
    # Old policy, reference and two optimizer steps: 4 passes, and more of fewer tokens.
    assert len(seen) == 4 < passes_of_many and largest <= 1024 < max(seen)
    for name, value in one.items():
        assert torch.allclose(value, many[name], atol=1e-5), name
    assert any(not torch.allclose(value, start[name], atol=1e-5) for name, value in one.items())
    assert learner.router.reference.state_dict().keys() == start.keys()


def made_before(backbone: Path) -> dict[str, torch.Tensor]:
    """The weights that an update starts from."""
    shape = ROUTER_DEFAULTS | {"backbone": str(backbone), "context": 1024, "lora_rank": 4}
    return Backbone(shape, 2).state_dict()


def test_the_old_policy_of_a_stale_group_is_the_one_that_played_it(tmp_path: Path) -> None:
    backbone = make_qwen(tmp_path / "backbone")
    learner = updated(backbone, 1 << 20)[1]
    shape = ROUTER_DEFAULTS | {"backbone": str(backbone), "context": 1024, "lora_rank": 4}
    played = [play(toy_spec(f"{kind}/2"), p_large=0.3)[0] for kind in ("fetch", "mix")]

    def old(stale: bool) -> np.ndarray:
        group = Group(tuple(played), np.array([1.0, -1.0]), (), stale)
        made = bopo_batch([group], 20, Reader.of(shape), 1000, 1, np.random.default_rng(0))
        assert made is not None
        rows = made.data.policy_batches["default_policy"]
        learner._prepare(rows)
        return np.asarray(rows["old_logp"])[np.asarray(rows["weights"]) > 0]

    assert set(np.exp(old(True)).round(6)) == {np.float32(0.3), np.float32(0.7)}
    assert not np.allclose(np.exp(old(False)), np.exp(old(True)), atol=1e-3)


def test_the_rate_of_each_optimizer_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, rates = make_qwen(tmp_path / "backbone"), list[float]()
    monkeypatch.setattr(BoPOTorchLearner, "_set_optimizer_lr", staticmethod(lambda optimizer, lr: rates.append(lr)))
    lr = BoPOConfig().lr
    # Warm-up over half of the training, then down to nothing; this update is its second quarter, of two steps.
    updated(backbone, 1 << 20, progress=(0.25, 0.25))
    assert rates[-3:-1] == pytest.approx([lr * 0.75, lr])  # RLlib sets its own again, behind
    updated(backbone, 1 << 20, progress=(0.75, 0.25))
    assert rates[-3:-1] == pytest.approx([lr * 0.25, 0.0])
    updated(backbone, 1 << 20)
    assert rates[-3:-1] == pytest.approx([lr, lr])
