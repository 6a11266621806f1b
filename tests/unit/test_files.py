"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bopo_ray.files import put, write_bytes, write_json


def test_a_file_is_the_old_one_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "chosen.json"
    write_json(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]} and list(tmp_path.iterdir()) == [path]

    def cut(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", cut)
        with pytest.raises(OSError, match="Input/output"):
            write_json(path, "another")
    assert json.loads(path.read_text()) == {"a": [1, 2]} and list(tmp_path.iterdir()) == [path]


def test_its_bytes_are_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append((tmp_path / "b").exists()))
    (tmp_path / "a").write_text("x")
    put(tmp_path / "a", tmp_path / "b")
    assert seen == [False] and (tmp_path / "b").read_text() == "x"


def test_a_full_disk_keeps_what_was_there_and_none_of_what_was_not_written(small_disk: Callable[[int], Path]) -> None:
    path = small_disk(64) / "state.bin"
    write_bytes(path, b"old")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            write_bytes(path, os.urandom(100_000))
        assert path.read_bytes() == b"old" and len(list(path.parent.iterdir())) == 1
