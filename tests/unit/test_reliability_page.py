"""docs/reliability.md: each test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_each_test_that_it_names_is_there() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)
    assert len(named) > 30
    files: dict[str, str] = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        files[path.name] = files.get(path.name, "") + path.read_text()
    assert [(file, test) for file, test in named if f"def {test}(" not in files.get(file, "")] == []


def test_each_fault_has_a_test() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    assert [row[0] for row in rows if "::test_" not in row[-1]] == []


def test_whatever_else_it_names_is_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+|kill_run)`", PAGE):
        assert f"def {name}(" in sources, name
