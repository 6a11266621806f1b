"""Whether processes and files are gone, in time."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["gone", "removed"]


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends in time; a zombie that nobody reaps counts as ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def removed(path: Path, within_s: float = 10.0) -> bool:
    """Whether a file or folder is removed in time."""
    deadline = time.monotonic() + within_s
    while path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not path.exists()
