"""Who learns, and at which rate: the schedule by hand, and what is said when asked-for devices are not there."""

from __future__ import annotations

import pytest

from bopo_ray.errors import ConfigError
from bopo_ray.pipeline.run import check_learners
from bopo_ray.pipeline.settings import Settings
from bopo_ray.rllib.bopo import BoPOConfig
from bopo_ray.rllib.learner import rate_factor


def test_the_rate_rises_and_falls() -> None:
    # Up over the first fifth, then down to a tenth: at 0.6 it is half-way down, 1 - 0.9 / 2.
    found = [rate_factor(x, 0.2, 0.1) for x in (0.05, 0.1, 0.2, 0.6, 1.0)]
    assert found == pytest.approx([0.25, 0.5, 1.0, 0.55, 0.1])
    assert [rate_factor(x, 0.0, 1.0) for x in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_devices_that_are_not_there_are_named() -> None:
    check_learners(Settings(), {"CPU": 1.0})
    check_learners(Settings(num_learners=2), {"CPU": 2.0})
    cases = (
        (
            Settings(num_gpus_per_learner=1),
            {"CPU": 8.0},
            "takes 1 GPU, here Ray has 0; give less with --num-gpus",
        ),
        (Settings(num_learners=4, num_gpus_per_learner=0.5), {"CPU": 8.0, "GPU": 1.0}, "takes 2 GPU, here Ray has 1;"),
        (Settings(num_learners=4), {"CPU": 2.0}, "num_learners=4, .*: a trial takes 3 CPU, here Ray has 2; give less"),
    )
    for s, there, rule in cases:
        with pytest.raises(ConfigError, match=rule) as caught:
            check_learners(s, there)
        assert "\n" not in str(caught.value)


def test_rllibs_names_reach_its_config() -> None:
    cfg = BoPOConfig().learning(**Settings(num_learners=2, num_gpus_per_learner=0.5).learning)
    assert (cfg.num_learners, cfg.num_gpus_per_learner, cfg.num_cpus_per_learner) == (2, 0.5, 0)
    assert BoPOConfig().learning(**Settings(num_learners=2).learning).num_cpus_per_learner == 0.5
