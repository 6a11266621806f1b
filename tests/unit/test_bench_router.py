"""The benches of the router run, tiny, and compare like with like."""

from __future__ import annotations

import pytest

from experiments import bench_learner, bench_router, bench_router_parts


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench_learner, bench_router, bench_router_parts):
        monkeypatch.setattr(module, "STEPS", 3)
    monkeypatch.setattr(bench_learner, "GROUP", 2)
    monkeypatch.setattr(bench_router, "BATCHES", (1, 2))
    monkeypatch.setattr(bench_router, "CAUSAL_BATCHES", (1, 2))


def test_the_learners() -> None:
    rows = bench_learner.run(0.0)
    assert [r.name.partition(":")[2].strip() for r in rows] == ["update", "update", "one sequence"]
    assert all(r.ours > 0 and r.naive and r.unit == "steps/s" for r in rows) and rows[0].limit and rows[1].limit


def test_the_routers() -> None:
    rows = {(r.name, r.unit): r for r in bench_router.run(0.0)}
    assert len(rows) == 2 * 2 * 4 and all(r.ours > 0 for r in rows.values())
    for model in ("small encoder", "tiny causal LM"):
        for batch in (1, 2):
            p50, p95 = (rows[f"{model}, batch {batch}: p{p}", "ms"] for p in (50, 95))
            assert p50.ours <= p95.ours and (p50.naive is None) == (model == "small encoder")
