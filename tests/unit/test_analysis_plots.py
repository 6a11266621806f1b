"""The figures: they draw what the data says, honest labels included, and leave no trace behind."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from PIL import Image

from bopo_ray.analysis.canvas import mark, method_style, save_png, to_svg, usd
from bopo_ray.analysis.labels import free_spots, spread
from bopo_ray.analysis.plots import (
    frontier_figure,
    frontiers_figure,
    taxonomy_figure,
    training_curves_figure,
)
from bopo_ray.analysis.tables import Settings, frontier, summary
from bopo_ray.records import CostMode
from experiments.ablation import ADVANTAGES, NAMES
from tests.unit.test_analysis_tables import synthetic_episodes


def test_no_two_lines_of_the_ablation_look_alike():
    names = (*ADVANTAGES, *NAMES.values())
    assert len({method_style(name) for name in names}) == len(names)


def synthetic_curves() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for method in ("bopo-hybrid", "grpo-vanilla"):
        for lam in (0.1, 0.3, 0.8):
            for iteration in range(8):
                metrics = {m: iteration / 8 + rng.normal(0, 0.1) for m in ("reward", "success", "share_large", "kl")}
                key = {"trial": f"{method}-{lam}", "method": method, "lam": lam, "seed": 0, "iteration": iteration}
                rows.append(key | metrics)
    return pd.DataFrame(rows)


def synthetic_taxonomy() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "task": ["a", "b", "c", "d"],
            "difficulty": ["easy", "hard", "hard", "intractable"],
            "cost_small_usd": [0.002, 0.02, 0.01, 0.01],
            "cost_large_usd": [0.01, 0.01, 0.03, 0.03],
        }
    )


METHODS = {"bopo-hybrid", "grpo-vanilla", "random", "always-small", "always-large"}


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def curves_frontier(label: str = "simulated pair") -> Figure:
    episodes = synthetic_episodes(n_tasks=30)
    settings = Settings(n=50)
    return frontier_figure(frontier(episodes, settings), summary(episodes, settings), "A title", label)


def test_frontier_figure_says_what_it_shows(tmp_path: Path) -> None:
    figure = curves_frontier()
    shown = texts(figure)
    for text in ("A title", "simulated pair", "bopo-hybrid", "always-small", "always-large", "random", "λ=0.1"):
        assert text in shown
    save_png(figure, tmp_path / "f.png")
    with Image.open(tmp_path / "f.png") as image:
        assert image.width == 1200


def test_the_frontier_of_a_run_that_counts_calls_is_drawn_over_calls() -> None:
    settings = Settings(n=50, cost=CostMode.CALLS)
    episodes = synthetic_episodes(n_tasks=30)
    table, found = frontier(episodes, settings), summary(episodes, settings)
    axes = frontier_figure(table, found, "A title", "simulated pair").axes[0]
    assert axes.get_xlabel() == "mean calls of larger models per task"
    drawn = {round(float(x), 6) for line in axes.lines for x in np.atleast_1d(line.get_xdata())}
    assert {round(p["large_calls"], 6) for p in found["operating_points"]} <= drawn
    assert not {round(p["cost_usd"], 6) for p in found["operating_points"]} & drawn
    assert axes.get_xlim()[0] < 0, "always-small's mark, at no call, is seen whole"
    lambdas = [text for text in axes.texts if text.get_text().startswith("λ=")]
    assert lambdas and max(text.get_position()[0] for text in lambdas) > 1
    dollars = curves_frontier().axes[0]
    assert dollars.get_xlabel() == "mean cost per task (USD)" and dollars.get_xlim()[0] == 0


def test_the_method_that_others_are_compared_with_stands_out() -> None:
    episodes = synthetic_episodes(n_tasks=30)
    for name in ("bopo-hybrid", "grpo-vanilla"):
        known = summary(episodes, Settings(n=50)) | {"headline": name}
        figure = frontier_figure(frontier(episodes, Settings(n=50)), known, "A title", "simulated pair")
        names = figure.findobj(lambda a: isinstance(a, matplotlib.text.Text) and a.get_text() in METHODS)
        bold = {text.get_text() for text in names if text.get_fontweight() == "bold"}
        assert bold == {name} & set(texts(figure))


def test_the_headline_is_drawn_over_others_as_a_ring_that_hides_none() -> None:
    episodes = synthetic_episodes(n_tasks=30)
    points = summary(episodes, Settings(n=50))
    others = [p | {"method": "bosft"} for p in points["operating_points"] if p["method"] == "bopo-hybrid"]
    points["operating_points"] = [p for p in points["operating_points"] if p["method"] != "bosft"] + others
    axes = frontier_figure(frontier(episodes, Settings(n=50)), points, "A title", "simulated pair").axes[0]
    for line in ("None", "-"):  # marks and fronts
        ours, other = (
            next(
                a for a in axes.lines
                if a.get_color() == method_style(m)[0] and a.get_linestyle() == line and len(a.get_xdata()) > 1
            )
            for m in ("bopo-hybrid", "bosft")
        )  # fmt: skip
        assert ours.get_zorder() > other.get_zorder()
    assert mark("bopo-hybrid", True)["markerfacecolor"] == "none"
    assert mark("bopo-hybrid", True)["markersize"] > mark("bosft", False)["markersize"]


@pytest.mark.parametrize("method", ["oracle", "cascade", "random"])
def test_a_star_a_plus_and_a_dot_are_no_specks(method: str) -> None:
    look, style = mark(method, False), MarkerStyle(method_style(method)[1])
    shape = style.get_path().transformed(style.get_transform().scale(look["markersize"]))
    (x, y), *_ = (corners.T for corners in shape.to_polygons())
    area = abs(np.sum(x[:-1] * y[1:] - x[1:] * y[:-1])) / 2
    edge = np.hypot(np.diff(x), np.diff(y)).sum() * look["markeredgewidth"] / 2
    assert area - edge > 15, "square points that the white edge leaves"


@pytest.mark.parametrize("value", [0.0125, 0.0175, 0.00725, 0.0025, 1.25, 0.0])
def test_a_tick_says_what_it_stands_at(value: float) -> None:
    assert float(usd(value)) == value


@pytest.mark.parametrize("draw", ["frontier", "curves"])
def test_a_phone_s_figure_holds_its_labels(draw: str) -> None:
    if draw == "frontier":
        episodes, settings = synthetic_episodes(n_tasks=30), Settings(n=50)
        episodes["cost_usd"] *= 0.4
        episodes["success"] |= episodes["method"] == "always-large"
        figure = frontier_figure(frontier(episodes, settings), summary(episodes, settings), "T", "l", narrow=True)
    else:
        curves = synthetic_curves()
        curves["cost_usd"] = 0.0058 + 0.0001 * curves["iteration"] / 8
        figure = training_curves_figure(curves, label="l", metrics=["cost_usd", "kl"], narrow=True)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_tightbbox().x0 >= 0
        ticks = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
        ticks = [t for t in ticks if axes.bbox.x0 <= (t.x0 + t.x1) / 2 <= axes.bbox.x1]
        assert all(b.x0 - a.x1 > 3 for a, b in itertools.pairwise(ticks))
    legend = figure.legends[0].get_window_extent()
    gap = (legend.y0 - figure.axes[0].get_tightbbox().y1) / figure.dpi
    assert draw == "frontier" or 0 < gap < 0.4, "inches between the legend and the first panel"


def test_frontiers_stand_side_by_side_under_their_names() -> None:
    panels = {}
    for name, tasks in (("one world", 12), ("another", 20)):
        episodes, settings = synthetic_episodes(n_tasks=tasks), Settings(n=20)
        panels[name] = frontier(episodes, settings), summary(episodes, settings)
    shown = texts(frontiers_figure(panels, "A title", "simulated pair"))
    for text in ("A title", "simulated pair", "one world\n12 tasks", "another\n20 tasks", "bopo-hybrid", "random"):
        assert text in shown
    with pytest.raises(ValueError, match="no frontier"):
        frontiers_figure({}, "t", "l")


def test_only_the_boundary_policies_can_be_drawn() -> None:
    episodes = synthetic_episodes(n_tasks=1)
    episodes = episodes[episodes["method"].str.startswith("always")]
    figure = frontier_figure(frontier(episodes), summary(episodes), "t", "l")
    assert to_svg(figure, "d").startswith("<svg")


def test_long_names_stay_on_the_figure() -> None:
    episodes = synthetic_episodes(n_tasks=10)
    long = "without the normalised cost of an episode"
    episodes["method"] = episodes["method"].replace("grpo-vanilla", long)
    assert long in set(episodes["method"])
    figure = frontier_figure(frontier(episodes), summary(episodes), "t", "l")
    figure.draw_without_rendering()
    (name,) = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text() == long]
    assert name.get_window_extent().x1 <= figure.bbox.width


def test_svg_stands_in_a_page_and_is_reproducible() -> None:
    description = 'cost < "success" & more'
    svg = to_svg(curves_frontier(), description)
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == description
    assert "viewBox" in root.attrib and "width" not in root.attrib
    assert "metadata" not in svg and "<!DOCTYPE" not in svg
    assert not re.search(r'href="(?!#)', svg)  # refers to nothing but itself
    assert svg == to_svg(curves_frontier(), description)


def test_hostile_names_are_printed_as_they_are() -> None:
    label = "$\\frac{1}{0$ </svg><script>alert(1)</script>"
    svg = to_svg(curves_frontier(label), "d")
    assert "<script" not in svg
    ElementTree.fromstring(svg)


def test_training_curves_have_a_panel_per_metric() -> None:
    figure = training_curves_figure(synthetic_curves(), label="simulated pair")
    titles = [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()]
    assert titles == ["reward", "success", "share large", "kl"]
    assert all(len(axes.lines) == 6 for axes in figure.axes if axes.get_visible())
    assert "simulated pair" in texts(figure)
    chosen = training_curves_figure(synthetic_curves(), metrics=["kl"])
    assert [axes.get_title(loc="left") for axes in chosen.axes] == ["kl"]
    counts = synthetic_curves().assign(skipped_groups=3.0)
    axes = training_curves_figure(counts, metrics=["skipped_groups"]).axes[0]
    assert all(tick == round(tick) for tick in axes.get_yticks()), "groups are counted"
    with pytest.raises(ValueError, match="no metric"):
        training_curves_figure(synthetic_curves()[["trial", "method", "lam", "seed", "iteration"]])


def test_taxonomy_counts_and_inversions() -> None:
    shown = texts(taxonomy_figure(synthetic_taxonomy(), label="simulated pair"))
    assert "small costs more: 1 of 4 tasks (25%)" in shown
    assert "  2 (50%)" in shown and "simulated pair" in shown
    with pytest.raises(ValueError, match="cost_large_usd"):
        taxonomy_figure(synthetic_taxonomy().drop(columns="cost_large_usd"))
    with pytest.raises(ValueError, match="no task"):
        taxonomy_figure(synthetic_taxonomy().iloc[:0])


def test_settings_of_the_caller_are_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    to_svg(taxonomy_figure(synthetic_taxonomy()), "d")
    assert dict(matplotlib.rcParams) == before


@given(st.lists(st.floats(0, 1), max_size=15))
def test_spread_keeps_labels_apart_and_inside(wanted: list[float]) -> None:
    placed = spread(wanted, gap=0.05, low=0.0, high=1.0)
    assert len(placed) == len(wanted)
    assert all(-1e-9 <= y <= 1 + 1e-9 for y in placed)
    assert all(b - a >= 0.05 - 1e-9 for a, b in zip(sorted(placed), sorted(placed)[1:], strict=False))


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0, 200)), min_size=1, max_size=20))
def test_free_spots_cover_neither_points_nor_each_other(points: list[tuple[float, float]]) -> None:
    anchors = np.array(points)
    spots = free_spots(anchors, ["λ=0.1"] * len(points), anchors, character_px=8, line_px=14)
    half = np.array([20.0, 7.0])
    found = [spot for spot in spots if spot is not None]
    for i, spot in enumerate(found):
        assert not np.any(np.all(np.abs(anchors - spot) < half, axis=1))
        assert not any(np.all(np.abs(other - spot) < 2 * half - 1e-9) for other in found[:i])
