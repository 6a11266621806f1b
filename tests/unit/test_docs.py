"""The README and the pages of docs/: each relative link leads to a file, and each anchor to a heading of it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(([^()\s]+)\)")


def _prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings: lower case, no punctuation, a dash for each blank."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for target in LINK.findall(_prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


def test_every_figure_and_table_of_the_results_is_shown() -> None:
    """No picture or table lies in docs/results/ that no page speaks of."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    files = [file.name for file in (ROOT / "docs" / "results").iterdir() if file.suffix in {".csv", ".png"}]
    assert [name for name in files if name not in text] == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One: two, three\n\n[a](#one-two-three) [b](#four) [c](missing.md) [d\ne](page.md#one-two-three)\n"
        "[![f](gone.png)](https://example.org)\n```\n[g](code.md)\n```\n"
    )
    assert broken(page) == ["#four", "missing.md", "gone.png"]
