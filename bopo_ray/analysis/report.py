"""One self-contained page about one experiment: inline style, figures and script; nothing is fetched from anywhere.

What models and tasks wrote is untrusted: the template escapes it, the episodes travel as JSON without `<`, `>` and `&`,
and the script puts text in place as text. A content security policy lets only our own script run, named by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bopo_ray.analysis.bill import Bill, Sharing
from bopo_ray.analysis.cost_unit import cost_unit, dollars
from bopo_ray.analysis.story import tell
from bopo_ray.analysis.tables import ALWAYS_LARGE, ALWAYS_SMALL, verdict
from bopo_ray.analysis.trajectory import step_records
from bopo_ray.records import Episode

__all__ = ["Price", "ReportContext", "Setting", "render_report", "write_report"]

_HERE = Path(__file__).parent
_TEXT_LIMIT = 6000
"""Characters of one text that the viewer shows."""


@dataclass(frozen=True, slots=True)
class Price:
    """One line of the price table, US dollars per million tokens."""

    model: str
    input_usd: float
    cached_usd: float
    output_usd: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What was run, and how to run it again."""

    environment: str
    """e.g. "ScienceWorld, 30 test tasks, at most 40 steps"."""
    models: tuple[str, ...]
    """The smallest first; names the models in the viewer."""
    scale: str
    """e.g. "tiny: 24 training tasks, 3 lambdas, 6 updates"."""
    seeds: tuple[int, ...]
    command: str
    """Reproduces the experiment."""
    prices: tuple[Price, ...] = ()
    prices_date: str = ""
    """Of the price table, ISO 8601."""
    prices_hash: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package to version."""


@dataclass(frozen=True, slots=True, eq=False)
class ReportContext:
    """All that a report shows. A part that is None or empty is left out of the page."""

    title: str
    label: str
    """What is measured and what is simulated, in a sentence; the banner of the page."""
    setting: Setting
    frontier: pd.DataFrame
    """Of `tables.frontier`."""
    summary: Mapping[str, Any]
    """Of `tables.summary`."""
    bill: Bill | None = None
    sharing: Sharing | None = None
    taxonomy: Mapping[str, int] = field(default_factory=dict)
    """Difficulty to number of training tasks."""
    frontier_svg: str | None = None
    """Figures come from `canvas.to_svg`."""
    taxonomy_svg: str | None = None
    curves_svg: str | None = None
    narrow_svgs: Mapping[str, str] = field(default_factory=dict)
    """The same for a phone: "frontier", "taxonomy" or "curves" to a narrow drawing."""
    episodes: Sequence[Episode] = ()
    """For the viewer; a handful, as each is in the page whole."""
    router_tokens: int | None = None
    """Context of the router, tokens: the viewer shows what fits there of its view; None: all."""
    notes: tuple[str, ...] = ()
    """Printed under the label."""

    def __post_init__(self) -> None:
        own = {name: getattr(self, name) for name in ("frontier_svg", "taxonomy_svg", "curves_svg")}
        for name, svg in (own | {f"narrow_svgs[{k!r}]": svg for k, svg in self.narrow_svgs.items()}).items():
            if svg is not None and (not svg.startswith("<svg") or "<script" in svg.lower()):
                raise ValueError(f"{name} must be one <svg> element without scripts, it starts with {svg[:40]!r}")


def write_report(path: Path | str, context: ReportContext) -> None:
    """Writes the page to `path` in one step: a reader sees the old page or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.write_text(render_report(context), encoding="utf-8", errors="replace")
    draft.replace(path)


def render_report(context: ReportContext) -> str:
    """The page as HTML."""
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"usd": _usd, "percent": _percent, "number": _number, "pvalue": _p_value}
    return environment.get_template("report.html.j2").render(
        context=context,
        story=tell(context.summary),
        unit=cost_unit(context.summary),
        rows=_rows(context.frontier),
        points=context.summary["operating_points"],
        main_points=_main(context.summary),
        summary=context.summary,
        forest=_forest(context.summary["differences"], context.summary["bootstrap"]["level"]),
        volumes=sorted(context.summary["hypervolumes"].items(), key=lambda item: -item[1]["estimate"]),
        difficulties=_difficulties(context.summary),
        figures={  # our own drawings, checked by ReportContext
            "frontier": Markup(context.frontier_svg or ""),
            "taxonomy": Markup(context.taxonomy_svg or ""),
            "curves": Markup(context.curves_svg or ""),
        },
        narrow={name: Markup(svg) for name, svg in context.narrow_svgs.items()},
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        episodes_json=Markup(_inline_json([_viewed(e, context) for e in context.episodes])),
    )


def _rows(frontier: pd.DataFrame) -> list[dict[str, Any]]:
    """Records with None for NaN."""
    return [
        {str(k): None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}
        for record in frontier.to_dict("records")
    ]


def _main(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The operating points that matter first: the common front, the boundary policies and the headline method."""
    methods = {ALWAYS_SMALL, ALWAYS_LARGE, summary["headline"]}
    return [p for p in summary["operating_points"] if p["on_front"] or p["method"] in methods]


def _forest(differences: Mapping[str, Mapping[str, Any]], level: float) -> dict[str, dict[str, float | str]]:
    """Each difference as a dot and a line on one scale: positions in percent, and what it settles."""
    drawn = {m: d for m, d in differences.items() if d["low"] is not None}
    reach = max((abs(d[k]) for d in drawn.values() for k in ("low", "high", "estimate")), default=0.0) or 1.0
    return {
        method: {k: round(50 + 48 * d[k] / reach, 2) for k in ("low", "high", "estimate")}
        | {"verdict": verdict(d, level)}
        for method, d in drawn.items()
    }


def _difficulties(summary: Mapping[str, Any]) -> list[str]:
    found = {name for shares in summary["spend_by_difficulty"].values() for name in shares}
    known = ["easy", "hard", "intractable"]
    return [d for d in known if d in found] + sorted(found - set(known))


def _viewed(episode: Episode, context: ReportContext) -> dict[str, Any]:
    """What the viewer shows of an episode."""
    steps = [
        {name: _cut(value) if isinstance(value, str) else value for name, value in record.items()}
        for record in step_records(episode, context.setting.models, context.router_tokens)
    ]
    return {
        "task": episode.spec.task.name,
        "task_text": _cut(episode.task_text),
        "policy": episode.spec.policy,
        "stop": str(episode.stop),
        "success": episode.success,
        "score": episode.score,
        "cost_usd": episode.cost_microusd / 1e6,
        "large_calls": episode.large_calls,
        "steps": steps,
    }


def _cut(text: str) -> str:
    """The end of a long text: what the router saw last is at the end of its view."""
    left_out = len(text) - _TEXT_LIMIT
    return text if left_out <= 0 else f"[{left_out} characters left out]\n{text[-_TEXT_LIMIT:]}"


def _inline_json(value: Any) -> str:
    """JSON that can stand inside a script element: ASCII, and no character that HTML could read."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _usd(value: float | None) -> str:
    return "–" if value is None else dollars(value)


def _percent(value: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    return f"{100 * value:+.1f}%" if signed else f"{100 * value:.1f}%"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _p_value(value: float | None) -> str:
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
