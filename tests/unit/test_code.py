"""Which commit a result says that it is of."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import bopo_ray.code

SAY = "import sys; sys.path.insert(0, '.'); from bopo_ray.code import code_version; print(code_version())"


def git(folder: Path, *words: str) -> str:
    own = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *own, *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def said(folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", SAY], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_commit_and_whether_a_file_was_changed(tmp_path: Path) -> None:
    package = tmp_path / "bopo_ray"
    package.mkdir()
    for name in ("__init__.py", "code.py"):
        shutil.copy(Path(bopo_ray.code.__file__).with_name(name), package / name)
    version = said(tmp_path)
    assert " at " not in version, "no repository"
    git(tmp_path, "init", "-q")
    (tmp_path / "other.txt").write_text("")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-qm", "another project's")
    assert said(tmp_path) == version, "in a repository that is not ours"
    git(tmp_path, "add", "bopo_ray")
    git(tmp_path, "commit", "-qm", "ours")
    commit = git(tmp_path, "rev-parse", "--short=7", "HEAD")
    assert said(tmp_path) == f"{version} at {commit}"
    (tmp_path / "other.txt").write_text("a page")
    assert said(tmp_path) == f"{version} at {commit}", "no code"
    (package / "__init__.py").write_text("")
    assert said(tmp_path) == f"{version} at {commit}, changed"
