"""Pages of tables and figures, each self-contained; and a study on disk: its table as CSV, its figure, its page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bopo_ray.analysis.canvas import save_png, to_svg

__all__ = ["Section", "write_page", "write_study"]

_HERE = Path(__file__).parent
_LONG = 40
"""Characters of a cell that is worth a second line."""


@dataclass(frozen=True, slots=True, eq=False)
class Section:
    """A part of a page, from top to bottom; what is empty or None is left out."""

    title: str = ""
    text: Sequence[str] = ()
    """Paragraphs."""
    svgs: Sequence[str] = ()
    """Of `canvas.to_svg`, and trusted: they are put in as they are."""
    table: pd.DataFrame | None = None
    notes: Sequence[str] = ()
    """How to read it."""


def write_page(path: Path, title: str, label: str, sections: Sequence[Section]) -> Path:
    """Writes the page; returns its path.

    Args:
        path: in a folder that is there.
        title: of the page.
        label: what is measured and what is simulated, in a sentence.
        sections: in their order.
    """
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    parts = [
        {"title": s.title, "text": s.text, "figures": [Markup(svg) for svg in s.svgs], "notes": s.notes,
         "columns": [] if s.table is None else [str(c).replace("_", " ") for c in s.table.columns],
         "rows": [] if s.table is None else [[_cell(v) for v in row] for row in s.table.itertuples(index=False)]}
        for s in sections
    ]  # fmt: skip
    text = environment.get_template("page.html.j2").render(
        title=title, label=label, parts=parts, long=_LONG,
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
    )  # fmt: skip
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def write_study(
    folder: Path, name: str, title: str, label: str, table: pd.DataFrame, figure: Figure, notes: Sequence[str] = (),
    shown: pd.DataFrame | None = None,
) -> list[Path]:  # fmt: skip
    """Writes name.csv, .png, .svg and .html into `folder`; returns them, the page first.

    Args:
        folder: made where it is not there.
        name: of the files.
        title: of the page.
        label: what is measured and what is simulated, in a sentence.
        table: for the CSV.
        figure: the drawing.
        notes: how to read it.
        shown: the table of the page; None: the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, csv, png, svg = (folder / f"{name}.{kind}" for kind in ("html", "csv", "png", "svg"))
    drawing = to_svg(figure, title)
    table.to_csv(csv, index=False)
    save_png(figure, png)
    svg.write_text(drawing, encoding="utf-8")
    write_page(page, title, label, [Section("", (), (drawing,), table if shown is None else shown, notes)])
    return [page, csv, png, svg]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)
