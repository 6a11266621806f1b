"""A run's plays: whose weights its runners act by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bopo_ray.pipeline import run as module
from bopo_ray.pipeline.run import Run
from bopo_ray.pipeline.settings import resolve
from bopo_ray.records import Phase
from tests.toy import ID, toy_spec


def test_weights_are_new_to_the_runners_at_each_play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners keep the weights of a version that they know: the same one for other weights would play the old ones."""
    given: list[tuple[Any, int]] = []
    monkeypatch.setattr(
        module, "collect", lambda runners, specs, weights, version, *_, **__: given.append((weights, version))
    )
    monkeypatch.setattr(Run, "runners", lambda self: None)
    with Run(resolve(None, {"env": ID, "scale": "tiny"}), tmp_path / "run", False, Console(quiet=True)) as run:
        for i, store in enumerate((run.store("dev"), run.store("dev"), run.store("evaluation"))):
            run.play("calibrating", store, [toy_spec(member=i, phase=Phase.SELECTION)], f"weights {i}")
        run.play("nothing is missing", run.store("dev"), [], "weights 3")
    assert [w for w, _ in given] == ["weights 0", "weights 1", "weights 2"]
    assert len({version for _, version in given}) == 3
