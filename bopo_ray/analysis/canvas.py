"""What all figures share: the canvas, its heading, the palette, and how they are rendered.

Names in the data are printed as they are, never read as mathematics. The palette is Okabe and Ito's, which colour-blind
readers can tell apart; methods differ in their markers as well.
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bopo_ray.analysis.tables import ALWAYS_LARGE, ALWAYS_SMALL

__all__ = [
    "DIFFICULTY_COLOURS", "GRID", "INK", "MUTED", "NARROW", "canvas", "head", "mark", "method_style", "ordered",
    "save_png", "styled", "to_svg", "usd",
]  # fmt: skip

NARROW = 5.2
"""Inches: a figure of this width is readable on a phone."""
INK, MUTED, GRID = "#1f2328", "#6b7280", "#e5e7eb"
_STYLES: Mapping[str, tuple[str, str]] = {  # method -> colour, marker
    "bopo-hybrid": ("#0072B2", "o"),
    "bopo-augmented": ("#56B4E9", "s"),
    "grpo-vanilla": ("#D55E00", "^"),
    "bosft": ("#009E73", "D"),
    "first-large": ("#CC79A7", "v"),
    "last-large": ("#9A4F7D", "H"),
    "cascade": ("#E69F00", "P"),
    "task-level": ("#8c6d1f", "X"),
    "task-knn": ("#7B4FA3", "h"),
    "one-step": ("#2F6B4F", "p"),
    "best-schedule": ("#A33B4F", "d"),
    "prompted": ("#4F5D95", "8"),
    "oracle": ("#b8860b", "*"),
    "random": (MUTED, "."),
    ALWAYS_SMALL: (INK, "<"),
    ALWAYS_LARGE: (INK, ">"),
    "without BoSFT": ("#2F6B4F", "p"),
    "without bonus": ("#A33B4F", "d"),
    "without normalised cost": ("#7B4FA3", "h"),
    "without boundary value": ("#4F5D95", "8"),
    "without our additions": ("#8c6d1f", "X"),
}
_SPARE = [("#8c6d1f", "X"), ("#7B4FA3", "h"), ("#2F6B4F", "p"), ("#A33B4F", "d")]
_SIZES = {ALWAYS_SMALL: 11, ALWAYS_LARGE: 11, "oracle": 12, "cascade": 9, "task-level": 9, "random": 11}
"""Of marks, points; 7 of others. A star, a plus, a cross and a dot fill less of theirs."""
DIFFICULTY_COLOURS = {"easy": "#009E73", "hard": "#0072B2", "intractable": "#9ca3af"}
_RC: Any = {  # a literal type of several hundred keys on the other side
    "font.size": 11, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "xtick.color": MUTED,
    "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.8, "axes.axisbelow": True, "text.parse_math": False, "svg.fonttype": "path",
    "svg.hashsalt": "bopo-ray", "axes.titlesize": 12, "axes.titlelocation": "left", "legend.frameon": False,
}  # fmt: skip

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draws with our settings and puts the caller's back."""

    @functools.wraps(draw)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_RC):
            return draw(*args, **kwargs)

    return wrapped


def save_png(figure: Figure, path: Path | str, width_px: int = 1200) -> None:
    """Writes the figure `width_px` wide; its height follows."""
    with matplotlib.rc_context(_RC):
        figure.savefig(path, dpi=width_px / figure.get_figwidth(), facecolor="white")


def to_svg(figure: Figure, description: str) -> str:
    """The figure as one `<svg>` element for a page: no prolog, no metadata, scales with its container.

    `description` is read to those who can't see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(_RC):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    own = hashlib.sha256(text.encode()).hexdigest()[:6]  # ids are unique in a page that holds several figures
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{own}-", text)
    quoted = description.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    head, _, rest = text.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{quoted}">{rest}'


def canvas(width: float, height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Figure, Any]:
    """A figure of so many inches and its axes, [rows, columns] with single dimensions left out."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, gridspec_kw=grid or None)


def head(figure: Figure, title: str, subtitle: str, label: str) -> float:
    """Title, subtitle and label; returns their share of the figure's height where they stand above each other."""
    inch = 1 / figure.get_figheight()
    narrow = figure.get_figwidth() <= NARROW
    title = textwrap.fill(title, 44, break_on_hyphens=False) if narrow else title
    figure.text(0.02, 1 - 0.16 * inch, title, fontsize=13 if narrow else 16, fontweight="bold", va="top")
    below = 0.2 + 0.24 * (title.count("\n") + 1)  # inches
    if subtitle:
        subtitle = textwrap.fill(subtitle, 62) if narrow else subtitle
        y = below if narrow else 0.52
        figure.text(0.02, 1 - y * inch, subtitle, fontsize=9 if narrow else 10.5, color=MUTED, va="top")
        below += 0.17 * (subtitle.count("\n") + 1)
    if label:
        box = {"boxstyle": "round,pad=0.4", "facecolor": "#FFF4D6", "edgecolor": "#E69F00", "linewidth": 1}
        label = textwrap.fill(label, 48)
        y, size = (below + 0.12, 9) if narrow else (0.24, 10.5)
        figure.text(0.98, 1 - y * inch, label, fontsize=size, ha="right", va="top", bbox=box)
        below += 0.3 + 0.14 * (label.count("\n") + 1)
    return (below + 0.1) * inch


def ordered(methods: Sequence[Any]) -> list[Any]:
    """In the palette's order, unknown ones last: the same in every figure."""
    known = list(_STYLES)
    return sorted(methods, key=lambda m: (known.index(m) if m in known else len(known), str(m)))


def method_style(method: str) -> tuple[str, str]:
    """Colour and marker; an unknown method always gets the same spare pair."""
    return _STYLES.get(method) or _SPARE[sum(map(ord, method)) % len(_SPARE)]


def mark(method: str, headline: bool) -> dict[str, Any]:
    """How `Line2D` marks a method's points; the headline's are rings, through which those under them are seen."""
    colour, marker = method_style(method)
    if headline:
        return {"color": colour, "marker": marker, "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 2}
    return {"color": colour, "marker": marker, "markersize": _SIZES.get(method, 7), "markeredgecolor": "white",
            "markeredgewidth": 0.6}  # fmt: skip


def usd(value: float, _: object = None) -> str:
    """Dollars with as many digits as a tick has: 0.0175 and 1.25."""
    return f"{value:.3g}"
