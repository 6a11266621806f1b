"""A finished run's routers outside of it: they decide as its runners did, and as the README shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bopo_ray import Decision, load_router
from bopo_ray.models import load_pool
from bopo_ray.pipeline.settings import load_settings
from bopo_ray.records import Episode, Phase
from bopo_ray.routers import LEARNED
from bopo_ray.store import EpisodeStore
from tests.integration.conftest import ROOT, Frontier
from tests.replay import agree

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_it_decides_as_the_runs_own_runners_did(toy_run: Frontier) -> None:
    pool = load_pool(load_settings(toy_run.out / "settings.yaml").models)
    store = EpisodeStore(toy_run.out / "episodes" / "evaluation", pool.price_hash)
    by_policy: dict[str, list[Episode]] = {}
    for episode in store.read(Phase.EVALUATION):
        if episode.spec.router == LEARNED:
            by_policy.setdefault(episode.spec.policy, []).append(episode)
    folders = {path.name for path in (toy_run.out / "policies").iterdir()}
    assert by_policy.keys() <= folders and len(by_policy) >= 3
    routers = {name: load_router(toy_run.out / "policies" / name) for name in by_policy}
    for name, episodes in by_policy.items():
        assert all(e.spec.greedy for e in episodes)
        assert sum(agree(routers[name], e) for e in episodes) > 10
    one, *others = by_policy["bosft"][0].steps, *(e[0].steps for name, e in by_policy.items() if name != "bosft")
    assert any(o[0].probabilities != pytest.approx(one[0].probabilities, abs=1e-3) for o in others)


def test_each_router_has_a_card_with_what_it_chooses_between_and_how_it_did(toy_run: Frontier) -> None:
    settings = load_settings(toy_run.out / "settings.yaml")
    pool = load_pool(settings.models)
    points = {p["policy"]: p for p in json.loads((toy_run.out / "summary.json").read_text())["points"]}
    folders = [path for path in (toy_run.out / "policies").iterdir() if path.is_dir()]
    for folder in folders:
        card, known = (folder / "README.md").read_text(), json.loads((folder / "router.json").read_text())
        for i, m in enumerate(pool.models):
            assert f"| {i} | `{m.name}` | {m.price.input / 1e6:g} |" in card
        assert known["trained"]["price_hash"] == pool.price_hash and pool.price_hash in card
        assert f"{settings.train_tasks} tasks of {settings.env}" in card
        assert sum(known["trained"]["taxonomy"].values()) == settings.train_tasks
        assert all(f"{n} {c}" in card for c, n in known["trained"]["taxonomy"].items())
        assert "python -m experiments.frontier" in card.partition("## Command")[2]
        point = points[folder.name]
        assert (
            f"| success | {point['success']:.4g} | {point['success_low']:.4g} to {point['success_high']:.4g} |" in card
        )
        assert ("lam" in known["trained"]["how"]) == folder.name.startswith(("bopo", "grpo"))
        load_router(folder, pool)
    assert {f.name.partition("_")[0] for f in folders} >= {"bosft", "bopo-hybrid"}


def test_the_readmes_example(toy_run: Frontier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    section = (ROOT / "README.md").read_text().partition("## Use a trained router")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    code = code.replace("lam == 0.1", "lam == 0.2")  # a lambda that this run has
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "scienceworld-v0-embedded-quick").symlink_to(toy_run.out)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code, names)
    router, steps = names["router"], names["episode"].history.steps_left + 1
    first = router.begin("Your task is to boil water.", "You are in the hallway.").decide()
    assert capsys.readouterr().out == f"{router.models[first.model]} {first.probabilities}\n"
    assert names["decision"] == Decision(0, (1.0, 0.0))
    assert steps == router.max_steps == load_settings(toy_run.out / "settings.yaml").max_steps
