"""cluster.yaml and docs/cluster-on-premises.yaml: Ray itself accepts them, offline, and they fit this package."""

from __future__ import annotations

import copy
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from bopo_ray.rllib.placement import runner_bytes

ROOT = Path(__file__).parents[2]
FILES = ("cluster.yaml", "docs/cluster-on-premises.yaml")


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def check(config: dict[str, Any]) -> dict[str, Any]:
    """Ray's own check, as `ray up` makes it, without asking the cloud; returns the config with Ray's defaults."""
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it(config: dict[str, Any]) -> None:
    prepared = check(config)
    assert set(prepared["available_node_types"]) == set(config["available_node_types"]), "Ray adds no nodes of its own"
    # What is not named here comes from Ray's defaults: nothing that installs or starts something else.
    ours = [*config["setup_commands"], *config["head_setup_commands"]]
    assert prepared["head_setup_commands"] == ours
    assert prepared["worker_setup_commands"] == config["setup_commands"]


@pytest.mark.parametrize(
    ("path", "key"),
    [((), "max_worker"), (("available_node_types", "rollouts"), "min_worker"), (("docker",), "imagee")],
)
def test_ray_rejects_a_misspelt_key(config: dict[str, Any], path: tuple[str, ...], key: str) -> None:
    inner = config
    for name in path:
        inner = inner[name]
    inner[key] = 1
    with pytest.raises(ValidationError, match=key):
        check(config)


def test_workers_start_from_none_and_fit_the_cluster(config: dict[str, Any]) -> None:
    types = check(config)["available_node_types"]
    workers = {name: t for name, t in types.items() if name != config["head_node_type"]}
    assert all(t["min_workers"] == 0 for t in workers.values())
    assert sum(t["max_workers"] for t in workers.values()) <= config["max_workers"]
    spot = {name for name, t in types.items() if "InstanceMarketOptions" in t["node_config"]}
    assert spot == {"rollouts"}, "a lost head or model costs the run; a lost rollout node only its episodes"


def test_local_models_have_a_gpu_and_its_image(config: dict[str, Any]) -> None:
    with_gpu = {name for name, t in config["available_node_types"].items() if t["resources"].get("GPU")}
    gpu_image = {
        n for n, t in config["available_node_types"].items() if "-gpu" in t.get("docker", {}).get("worker_image", "")
    }
    assert with_gpu == gpu_image == {"models"}


def test_a_head_that_learns_on_a_gpu_is_what_stands_behind_the_lines(config: dict[str, Any]) -> None:
    """Learners work on the head, where the results are, so that no other node's GPU is of use to them."""
    text = re.sub(r": [^#\n]+ # to learn on a GPU: ", ": ", (ROOT / "cluster.yaml").read_text())
    with_gpu = yaml.safe_load(text.replace("g6.2xlarge, with one L4 (24 GB)", "g6.2xlarge"))
    types = check(with_gpu)["available_node_types"]
    assert types["head"]["resources"]["GPU"] == 1 and with_gpu["docker"]["head_image"].endswith("-gpu")
    assert types["head"]["node_config"]["InstanceType"] == types["models"]["node_config"]["InstanceType"]
    assert config["docker"]["head_image"].endswith("-cpu") and "GPU" not in config["available_node_types"]["head"]


def test_a_rollout_node_holds_a_runner_per_cpu(config: dict[str, Any]) -> None:
    """At the 32 lanes of the scale of the paper, with 4 GB per CPU, of which Ray gives away 70%."""
    node = config["available_node_types"]["rollouts"]
    assert node["node_config"]["InstanceType"] == "m7i.4xlarge" and node["resources"]["CPU"] == 16
    assert 16 * runner_bytes("ScienceWorld-v0", 32) < 0.7 * (64 << 30)


def test_the_nodes_get_this_checkout_without_history_results_or_keys(config: dict[str, Any]) -> None:
    assert config["file_mounts"] == {
        "/home/ray/bopo_ray": ".", "/home/ray/.ray/auth_token": "~/.ray/auth_token"
    }  # fmt: skip
    assert {".git", ".env"} <= set(config["rsync_exclude"])
    assert config["rsync_filter"] == [".gitignore"]
    assert {"/results/", ".venv*/"} <= set((ROOT / ".gitignore").read_text().split())


def test_the_images_have_the_tested_ray(config: dict[str, Any]) -> None:
    images = re.findall(r"rayproject/ray:\S+", (ROOT / "cluster.yaml").read_text())
    assert len(images) == 4
    assert all(re.fullmatch(rf"rayproject/ray:{re.escape(version('ray'))}-py311-[cg]pu", image) for image in images)


@pytest.mark.parametrize("name", FILES)
def test_it_holds_no_secret(name: str) -> None:
    text = (ROOT / name).read_text()
    found = re.findall(r"AKIA\w+|sk-\w{8,}|(?i:password|secret|api_?key|access_key|token)\s*[:=]\s*\S+", text)
    assert set(found) <= {"token: ~/.ray/auth_token"}  # where it lies


@pytest.mark.parametrize("name", FILES)
def test_nothing_starts_without_the_token_and_the_dashboard_stays_on_the_head(name: str) -> None:
    prepared = check(yaml.safe_load((ROOT / name).read_text()))
    commands = [*prepared["head_start_ray_commands"], *prepared["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2 and all("export RAY_AUTH_MODE=token;" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0] and "dashboard" not in starts[1]
    assert {"~/.ray/auth_token"} < set(prepared["file_mounts"].values())


@pytest.mark.parametrize("name", FILES)
def test_each_node_gets_the_three_benchmarks_at_the_pinned_versions(name: str) -> None:
    setup = " ".join(check(yaml.safe_load((ROOT / name).read_text()))["setup_commands"])
    make = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z -]+?)(?: PYTHON=|$| &&)", setup.replace(" cd ", "\n"), re.MULTILINE)
    named = {target for group in targets for target in group.split()}
    assert named and all(re.search(rf"^{re.escape(t)}:", make, re.MULTILINE) for t in named)
    assert "alfworld" in setup and "appworld" in setup and "-c constraints.txt" in setup


def test_what_stops_machines_of_ones_own_reaches_all_of_them() -> None:
    """Ray's own `ray down` calls `ray` on the head alone, where it is not on the path."""
    text = (ROOT / FILES[1]).read_text()
    config = yaml.safe_load(text)
    (workers,) = re.findall(r"^#   for node in (.*); do$", text, re.MULTILINE)
    assert workers.split() == config["provider"]["worker_ips"]
    assert text.count("'~/bopo_ray/.venv/bin/ray stop'") == 2 and "#   ray down" not in text
    assert f"ssh -i {config['auth']['ssh_private_key']} {config['auth']['ssh_user']}@$node" in text


def test_machines_of_ones_own_are_all_used_and_take_no_node_types() -> None:
    config = yaml.safe_load((ROOT / FILES[1]).read_text())
    (kind,) = check(config)["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])
    with pytest.raises(ValidationError, match="min_worker"):
        check(config | {"min_worker": 1})
