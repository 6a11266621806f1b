"""The main job with a Hugging Face model as its router."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bopo_ray import load_router
from bopo_ray.models import load_pool
from bopo_ray.pipeline.jobs import spent_usd
from bopo_ray.records import Phase
from bopo_ray.routers import LEARNED
from bopo_ray.store import EpisodeStore
from tests.integration.conftest import Frontier
from tests.replay import agree
from tests.tiny_router import make_qwen
from tests.toy import ID

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

TINY = ("--env", ID, "--scale", "tiny", "--train-tasks", "4", "--test-tasks", "3", "--k", "2", "--strata", "1",
        "--updates", "1", "--tasks-per-update", "2", "--group-size", "2", "--lambdas", "0.3", "--advantage", "hybrid",
        "--cpus", "1", "--sft-epochs", "2", "--max-steps", "8", "--schedules", "0", "--ignore-gate")  # fmt: skip


def test_it_is_trained_evaluated_and_loaded(tmp_path: Path) -> None:
    backbone = make_qwen(tmp_path / "backbone")
    run = Frontier(tmp_path, (*TINY, "--backbone", str(backbone), "--lora-rank", "4", "--gradient-checkpointing"))
    assert run.run() == 0, run.said()
    assert (run.out / "report.html").exists() and json.loads((run.out / "summary.json").read_text())
    policies = [p for p in (run.out / "policies").iterdir() if p.is_dir()]
    assert len(policies) == 2 and all((p / "adapter_model.safetensors").exists() for p in policies)
    for folder in policies:
        card = (folder / "README.md").read_text()
        assert "library_name: peft" in card and "with LoRA of rank 4 on all-linear" in card
        assert f"4 tasks of {ID}" in card and "| 1 | `simulated:large` |" in card and "| success |" in card
    routers = {p.name: load_router(p) for p in policies}
    pool = load_pool("simulated")
    store = EpisodeStore(run.out / "episodes" / "evaluation", pool.price_hash)
    episodes = [e for e in store.read(Phase.EVALUATION) if e.spec.router == LEARNED]
    assert {e.spec.policy for e in episodes} == set(routers)
    assert sum(agree(routers[e.spec.policy], e) for e in episodes) > 6


def test_a_context_too_short_for_a_task_is_found_before_anything_is_paid_for(tmp_path: Path) -> None:
    options = (*TINY, "--backbone", str(make_qwen(tmp_path / "backbone")), "--backbone-context", "200")
    run = Frontier(tmp_path, options)
    assert run.run() == 2, run.said()
    line = run.said().splitlines()[-1]  # Ray said where its logs are
    assert line.startswith("error: backbone_context=200: too short for 7 of 7 tasks; the task text of ")
    assert line.endswith(" tokens; need at least that, set it with --backbone-context")
    assert not list(run.out.rglob("part-*.parquet")) and spent_usd(run.out) == 0
    needed = int(line.partition("a prompt of ")[2].split()[0])
    assert 200 < needed < 1024 and str(needed) not in line.partition("a prompt of ")[0]
