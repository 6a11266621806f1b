"""A study on disk: its table as CSV, its figure as PNG and SVG, and one self-contained page with both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from bopo_ray.analysis.canvas import save_png, to_svg

__all__ = ["write_study"]

_HERE = Path(__file__).parent


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
    shown = table if shown is None else shown
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    text = environment.get_template("page.html.j2").render(
        title=title, label=label, notes=notes, figure=Markup(drawing),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        columns=[str(c).replace("_", " ") for c in shown.columns],
        rows=[[_cell(v) for v in row] for row in shown.itertuples(index=False)],
    )  # fmt: skip
    page.write_text(text, encoding="utf-8", errors="replace")
    return [page, csv, png, svg]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)
