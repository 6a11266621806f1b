"""The report of a finished run, opened and clicked through in a real browser, as wide as a desk and as a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.integration.conftest import Frontier

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SIZES = {"desk": (1280, 900), "phone": (390, 844), "small phone": (320, 640)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The Chromium that CHROMIUM names, or the system's."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("needs a Chromium: `make browser`, apt-get install chromium, or CHROMIUM=path/to/it")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to build as root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*sandbox, "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Browser, toy_run: Frontier) -> Iterator[Page]:
    """The report, open; afterwards: nothing was complained of, and nothing was asked of a network."""
    width, height = SIZES[request.param]
    page = browser.new_page(viewport={"width": width, "height": height})
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda asked: said.extend([asked.url] * (not asked.url.startswith("file:"))))
    page.goto((toy_run.out / "report.html").as_uri())
    yield page
    page.close()
    assert said == []


def overflow(page: Page) -> int:
    """Pixels by which the page is wider than the screen."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))


def test_everything_is_there_and_fits(page: Page) -> None:
    assert overflow(page) <= 0
    assert page.locator(".lead").inner_text().startswith("bopo-hybrid")
    assert page.locator(".card").count() == 3
    figures = page.locator("figure svg >> visible=true")
    assert figures.count() == 3
    for i in range(3):
        box = figures.nth(i).bounding_box()
        assert box is not None and box["width"] > 250 and box["height"] > 100
        assert box["x"] >= 0 and box["x"] + box["width"] <= page.viewport_size["width"]  # type: ignore[index]
        assert figures.nth(i).locator("path").count() > 20
    for table in page.locator("table").all():
        assert table.locator("tbody tr").count() > 0
        assert "" not in [cell.strip() for cell in table.locator("tbody td:not(:has(.forest))").all_text_contents()]
    for link in page.locator("nav a").all():
        link.click()
        assert page.locator(str(link.get_attribute("href"))).is_visible()
    for folded in page.locator("summary").all():
        folded.click()
    assert overflow(page) <= 0


def test_a_table_is_sorted_by_a_click(page: Page) -> None:
    table = page.locator("#frontier table").first
    shown = "(table) => [...table.tBodies[0].rows].map((row) => Number(row.cells[3].dataset.sort))"
    for falling in (False, True):
        table.locator("th button").nth(3).click()
        costs = table.evaluate(shown)
        assert costs == sorted(costs, reverse=falling) and len(set(costs)) > 1


def test_an_episode_is_stepped_through(page: Page) -> None:
    """What is shown at each step is what the buttons, the bars and the keys say."""
    viewer = page.locator("#viewer-body")
    episodes = viewer.locator("#episode option").count()
    assert episodes >= 2
    viewer.locator("#episode").select_option(str(episodes - 1))
    steps = viewer.locator("#strip button").count()
    assert steps > 1 and viewer.locator("#position").inner_text() == f"Step 1 of {steps}"
    assert viewer.locator("#previous").is_disabled()
    seen, spent = [], []
    for step in range(1, steps + 1):
        assert viewer.locator("#position").inner_text() == f"Step {step} of {steps}"
        assert viewer.locator("#strip [aria-current]").inner_text() == str(step)
        for part in ("view", "reply", "chosen", "task-text"):
            assert viewer.locator(f"#{part}").inner_text().strip()
        seen.append(viewer.locator("#view").inner_text())
        spent.append(float(viewer.locator("#step-facts").inner_text().split("$")[-1].split()[0]))
        assert overflow(page) <= 0
        if step < steps:
            viewer.locator("#next").click()
    assert viewer.locator("#next").is_disabled()
    assert len(set(seen)) == steps and spent == sorted(spent) and spent[0] > 0
    viewer.locator("#strip button").first.click()
    page.keyboard.press("ArrowRight")
    assert viewer.locator("#position").inner_text() == f"Step 2 of {steps}"


def test_it_prints(browser: Browser, toy_run: Frontier, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 718, "height": 1000})  # A4 within its margins
    page.goto((toy_run.out / "report.html").as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    assert overflow(page) <= 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible() and not page.locator("#next").is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.close()


def test_it_can_be_read_without_javascript(browser: Browser, toy_run: Frontier) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((toy_run.out / "report.html").as_uri())
    assert page.locator("#frontier table tbody tr").count() > 2 and "needs JavaScript" in page.inner_text("#viewer")
    context.close()
