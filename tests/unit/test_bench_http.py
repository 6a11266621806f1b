"""The bench of an endpoint's calls, at a small size."""

from __future__ import annotations

import pytest

from experiments import bench_http


def test_all_ways_make_their_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_http, "CALLS", 8)
    monkeypatch.setattr(bench_http, "CALLERS", 4)
    monkeypatch.setenv("no_proxy", "")  # the bench sets it: put back afterwards
    (row,) = bench_http.run(0.0)
    assert row.unit == "calls/s of CPU time" and row.naive and row.limit
    assert min(row.ours, row.naive, row.limit) > 10
