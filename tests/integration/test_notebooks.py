"""The notebooks: executed by Jupyter on a finished run, and the same as the text that is reviewed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

from tests.integration.conftest import ROOT, Frontier

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

FOLDER = ROOT / "notebooks"
FIGURES = {"01_frontier": 2, "02_difficulty": 2, "03_trajectories": 1, "04_training_curves": 2}


def test_each_has_its_text() -> None:
    assert {p.stem for p in FOLDER.glob("*.ipynb")} == {p.stem for p in FOLDER.glob("*.py")} == set(FIGURES)


@pytest.mark.parametrize("name", FIGURES)
def test_notebook_and_text_say_the_same_and_carry_no_outputs(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    text = jupytext.read(FOLDER / f"{name}.py", fmt="py:percent")
    cells, reviewed = ([(c.cell_type, c.source) for c in n.cells] for n in (notebook, text))
    assert cells == reviewed, f"run: jupytext --sync notebooks/{name}.ipynb"
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "commit notebooks without outputs"


@pytest.mark.parametrize("name", FIGURES)
def test_it_reads_a_run_and_draws(name: str, toy_run: Frontier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are only read, and every figure is shown."""
    monkeypatch.setenv("BOPO_RAY_RUN", str(toy_run.out))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = state(toy_run.out)
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    shown = Counter(kind for c in notebook.cells for o in c.get("outputs", ()) for kind in o.get("data", ()))
    assert shown["image/png"] == FIGURES[name]
    assert shown["text/html"] >= 1, "a table"
    printed = "".join(o.text for c in notebook.cells for o in c.get("outputs", ()) if o.output_type == "stream")
    assert "Simulated" in printed and "Warning" not in printed
    if name == "03_trajectories":
        assert "steps left" in printed and "p(LARGE)" in printed and "paid $" in printed
    assert state(toy_run.out) == before


def state(folder: Path) -> dict[Path, int]:
    """When each file was last written."""
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
