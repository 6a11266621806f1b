"""An environment of one's own, as the README shows it, through the main job."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT, Frontier

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_the_readmes_command_for_ones_own_environment(tmp_path: Path) -> None:
    text, start = (ROOT / "README.md").read_text(), "python -m experiments.frontier --env docs.example_env:Doors-v0"
    (short, *_) = [line for line in text.splitlines() if line.startswith(start) and not line.endswith("\\")]
    options = shlex.split(short)[3:]
    frontier = Frontier(tmp_path, tuple(options))
    assert frontier.run() == 0, frontier.said()
    summary = json.loads((frontier.out / "summary.json").read_text())
    assert summary["taxonomy"]["hard"] > 0 and "bopo-hybrid" in summary["hypervolumes"]
