"""The page: complete, self-contained and inert, whatever models and tasks wrote."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bopo_ray.analysis.bill import Bill
from bopo_ray.analysis.canvas import to_svg
from bopo_ray.analysis.plots import frontier_figure, taxonomy_figure, training_curves_figure
from bopo_ray.analysis.report import Price, ReportContext, Setting, render_report, write_report
from bopo_ray.analysis.tables import Settings, frontier, summary
from bopo_ray.records import CostMode, Episode, EpisodeSpec, Phase, Step, StopReason
from envs.base import Split, Task
from tests.unit.test_analysis_plots import synthetic_curves, synthetic_taxonomy
from tests.unit.test_analysis_tables import synthetic_episodes

HOSTILE = "</script><script>alert(1)</script><!--<script>\"'`><img src=x onerror=alert(2)>{{ 7*7 }}\u2028"
LONE_SURROGATE = "\ud800"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Scripts, attributes and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        else:
            self.text += data


def synthetic_episode(text: str = "You are in the kitchen.", name: str = "boil/3", n_steps: int = 6) -> Episode:
    spec = EpisodeSpec(
        Task("ScienceWorld-v0", name, Split.TEST), Phase.EVALUATION, "bopo-hybrid lam=0.3 seed=0 it=4", 0, 0, 0
    )
    steps = tuple(
        Step(
            model=int(i in (2, 3)),
            probabilities=(0.9 - 0.15 * i, 0.1 + 0.15 * i),
            mask=(True, i < 5),
            reply=f"Thought: {text}\nAction: go north",
            action=f"go north {text}",
            observation=f"{text} Step {i}.",
            prompt_tokens=400 + 90 * i,
            cached_tokens=0,
            completion_tokens=40,
            cost_microusd=300 + 900 * (i in (2, 3)),
            lost_microusd=0,
            latency_s=0.4,
            router_s=0.001,
        )
        for i in range(n_steps)
    )
    return Episode(
        spec=spec,
        task_text=f"Boil water. {text}",
        first_observation=text,
        max_steps=30,
        steps=steps,
        outcome=1.0,
        success=True,
        score=100.0,
        stop=StopReason.SUCCESS,
    )


def synthetic_context(text: str = "", n_tasks: int = 40) -> ReportContext:
    episodes = synthetic_episodes(n_tasks=n_tasks)
    episodes["policy"] = episodes["policy"].astype(str) + text
    settings = Settings(n=100)
    points, compared = frontier(episodes, settings), summary(episodes, settings)
    label = f"Simulated model pair on real ScienceWorld: costs are list prices.{text}"
    return ReportContext(
        title=f"Frontier{text}",
        label=label,
        setting=Setting(
            environment=f"ScienceWorld, {n_tasks} test tasks, at most 30 steps{text}",
            models=(f"small{text}", f"large{text}"),
            scale="tiny",
            seeds=(0, 1),
            command=f"python -m experiments.frontier --scale tiny{text}",
            prices=(Price(f"gpt-4.1-mini{text}", 0.40, 0.10, 1.60), Price("gpt-4.1", 2.0, 0.5, 8.0)),
            prices_date="2026-02-01",
            prices_hash="a1b2c3d4",
            versions={"bopo_ray": "0.1", "ray": "2.60.0"},
        ),
        frontier=points,
        summary=compared,
        bill=Bill(1234, 23456, 12_345_678, 20_000, 10_000_000, 3_456, 2_345_678, 2, 5_000, 9_000, 7.2, 90.0, 8_000_000),
        taxonomy={"easy": 10, "hard": 20, "intractable": 4},
        frontier_svg=to_svg(frontier_figure(points, compared, "Success against cost", "simulated pair"), "frontier"),
        taxonomy_svg=to_svg(taxonomy_figure(synthetic_taxonomy(), label="simulated pair"), "taxonomy"),
        curves_svg=to_svg(training_curves_figure(synthetic_curves(), label="simulated pair"), "curves"),
        narrow_svgs={
            "frontier": to_svg(
                frontier_figure(points, compared, "Success against cost", "simulated pair", narrow=True), "frontier"
            ),
            "taxonomy": to_svg(taxonomy_figure(synthetic_taxonomy(), label="simulated pair", narrow=True), "taxonomy"),
            "curves": to_svg(training_curves_figure(synthetic_curves(), label="simulated", narrow=True), "curves"),
        },
        router_tokens=96,
        episodes=(synthetic_episode(text or "You are in the kitchen."), synthetic_episode("A hall.", "melt/1", 3)),
        notes=(f"A note.{text}",),
    )


@pytest.fixture(scope="module")
def hostile_html() -> str:
    return render_report(synthetic_context(HOSTILE))


def test_hostile_texts_stay_text(hostile_html: str) -> None:
    page = Page(hostile_html)
    assert [attributes for attributes, _ in page.scripts] == [{"type": "application/json", "id": "episodes"}, {}]
    assert "alert" not in page.scripts[1][1]
    assert "img" not in page.tags
    assert page.text.count("{{ 7*7 }}") > 5
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.open == []
    shown = json.loads(page.scripts[0][1])
    assert HOSTILE in shown[0]["steps"][0]["observation"]
    assert "alert(1)" in page.text  # shown to the reader, as text


def test_nothing_is_fetched_and_only_our_script_may_run(hostile_html: str) -> None:
    page = Page(hostile_html)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert name != "src"
        if name.endswith("href"):
            assert value and value.startswith("#")
    assert "url(" not in re.sub(r"url\(#", "", hostile_html) and "@import" not in hostile_html
    digest = base64.b64encode(hashlib.sha256(page.scripts[1][1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in next(v for _, v in page.attributes if v and "default-src" in v)
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert sink not in page.scripts[1][1]


def test_the_page_holds_every_part(tmp_path: Path) -> None:
    context = synthetic_context()
    odd = synthetic_episode(f"odd {LONE_SURROGATE}", n_steps=2)
    context = replace(context, episodes=(*context.episodes, odd), title=f"{context.title} {LONE_SURROGATE}")
    write_report(tmp_path / "deep" / "report.html", context)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]
    page = Page((tmp_path / "deep" / "report.html").read_text(encoding="utf-8"))
    text = " ".join(page.text.split())
    for part in (
        "Frontier ?", context.label, "python -m experiments.frontier --scale tiny", "a1b2c3d4", "2026-02-01",
        "1,234 episodes", "All calls of all episodes23,456$12.35", "Paid20,000$10.00", "store3,456$2.3457",
            "at most2$0.0050", "0.80 ms a decision", "ray 2.60.0", "20 hard", "A note.", "gpt-4.1-mini", "random(0.4)",
        "boundary only", "a user can always deploy a boundary policy", "Intractable", "95% of its success",
        "Run it again, with another --out:",
    ):  # fmt: skip
        assert part in text, part
    assert page.tags.count("svg") == 6  # each for a wide and for a narrow screen
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_run_that_counts_calls_says_so() -> None:
    calls = Settings(n=50, cost=CostMode.CALLS)
    episodes = synthetic_episodes(n_tasks=30)
    context = replace(synthetic_context(), frontier=frontier(episodes, calls), summary=summary(episodes, calls))
    text = " ".join(Page(render_report(context)).text.split())
    large = next(p for p in context.summary["operating_points"] if p["method"] == "always-large")
    for part in (
        "Success against large calls", f"{large['large_calls']:.2f} large calls per task", "0.00 large calls per task",
        f"no success at {1.1 * large['large_calls']:.2f} large calls per task and full success for nothing",
        "Large calls saved against always-large",
    ):  # fmt: skip
        assert part in text, part


def test_the_viewer_adds_up() -> None:
    page = Page(render_report(synthetic_context()))
    first = json.loads(page.scripts[0][1])[0]
    assert [s["spent_usd"] for s in first["steps"]] == pytest.approx([3e-4, 6e-4, 18e-4, 30e-4, 33e-4, 36e-4])
    assert first["cost_usd"] == pytest.approx(first["steps"][-1]["spent_usd"])
    assert [s["model"] for s in first["steps"]] == ["small", "small", "large", "large", "small", "small"]
    assert first["steps"][1]["p_large"] == pytest.approx(0.25)
    assert [s["masked"] for s in first["steps"]] == [False] * 5 + [True]
    assert first["steps"][0]["view"].startswith("task: Boil water.")


def test_the_viewer_shows_what_fits_into_the_router() -> None:
    context = synthetic_context()
    long = replace(synthetic_episode(n_steps=4), first_observation="x " * 200, task_text="go on and " * 100)
    views = {}
    for tokens in (None, 96):
        page = Page(render_report(replace(context, episodes=(long,), router_tokens=tokens)))
        views[tokens] = json.loads(page.scripts[0][1])[0]["steps"][3]["view"].splitlines()
    assert len(views[None]) == 6 and len(views[None][0]) > 1000
    assert views[96][0].startswith("task: go on and") and views[96][0].endswith(" …") and len(views[96][0]) < 400
    assert views[96][1:3] == [views[None][1], views[None][-1]]  # the budget, then the newest


def test_a_figure_for_phones_is_drawn_where_there_is_one() -> None:
    context = synthetic_context()
    page = Page(render_report(replace(context, narrow_svgs={"curves": context.narrow_svgs["curves"]})))
    assert page.tags.count("svg") == 4
    with pytest.raises(ValueError, match="narrow_svgs"):
        replace(context, narrow_svgs={"curves": "<p>no figure</p>"})


def test_a_long_text_keeps_its_end() -> None:
    context = synthetic_context()
    long = synthetic_episode("x" * 20_000, n_steps=1)
    small = replace(context, episodes=(long,))
    shown = json.loads(Page(render_report(small)).scripts[0][1])
    observation = shown[0]["steps"][0]["observation"]
    assert observation.startswith("[") and observation.endswith("Step 0.") and len(observation) < 6100


def test_parts_that_are_not_there_are_left_out() -> None:
    context = synthetic_context()
    bare = ReportContext(context.title, context.label, context.setting, context.frontier, context.summary)
    page = Page(render_report(bare))
    assert "svg" not in page.tags
    assert "Training curves" not in page.text and "Episodes, step by step" not in page.text


def test_a_figure_with_a_script_is_refused() -> None:
    context = synthetic_context()
    for svg in ("<svg><script>alert(1)</script></svg>", "<p>no figure</p>"):
        with pytest.raises(ValueError, match="frontier_svg"):
            ReportContext(
                "Frontier ?", context.label, context.setting, context.frontier, context.summary, frontier_svg=svg
            )


def test_analysis_needs_neither_ray_nor_torch() -> None:
    code = (
        "import sys, bopo_ray.analysis.report, bopo_ray.analysis.plots\n"
        "print([m for m in ('ray', 'torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
