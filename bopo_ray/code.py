"""Which code this is, for what it leaves behind to say."""

from __future__ import annotations

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["code_version"]

CODE = ("bopo_ray", "envs", "experiments")
"""What a result depends on."""


@cache
def code_version() -> str:
    """E.g. "0.1.0 at 0a01704", with ", changed" where a file of it is not as committed; the version alone where the
    package lies in no repository of its own. As it is when it is first asked: a run asks when it begins."""
    try:
        number = version("bopo_ray")
    except PackageNotFoundError:  # run from a folder, not installed
        number = "unknown"
    package = Path(__file__).parent
    # Installed into a folder of another repository, that one's commit would say nothing: ours has this file.
    if _git(package, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return number
    commit = _git(package, "rev-parse", "--short=7", "HEAD")
    changed = _git(package.parent, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    return f"{number} at {commit}{', changed' if changed else ''}" if commit else number


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
