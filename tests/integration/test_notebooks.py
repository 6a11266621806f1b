"""The notebooks, executed cell by cell on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from tests.integration.conftest import ROOT, Frontier

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("notebook", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_cell_runs_and_figures_are_drawn(
    notebook: Path, toy_run: Frontier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell's last expression is its output, as in Jupyter; results are only read."""
    monkeypatch.setenv("BOPO_RAY_RUN", str(toy_run.out))
    before = {p: p.stat().st_mtime_ns for p in toy_run.out.rglob("*") if p.is_file()}
    names: dict[str, object] = {}
    outputs = []
    for cell in json.loads(notebook.read_text())["cells"]:
        assert not cell.get("outputs"), "commit notebooks without outputs"
        if cell["cell_type"] != "code":
            continue
        *lines, last = [line for line in "".join(cell["source"]).splitlines() if not line.startswith("%")]
        exec("\n".join(lines), names)
        try:
            outputs.append(eval(last, names))
        except SyntaxError:
            exec(last, names)
    assert sum(isinstance(o, Figure) for o in outputs) >= 3
    assert {p: p.stat().st_mtime_ns for p in toy_run.out.rglob("*") if p.is_file()} == before
