"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["put", "write_bytes", "write_json"]


def put(temporary: Path, path: Path) -> None:
    """Gives a file its name when its bytes are on the disk: a machine that loses power keeps the old one or the new."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file; raises OSError, also where the disk is full, and then takes up none of it."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(data)
        put(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file, see `write_bytes`."""
    write_bytes(path, json.dumps(value, indent=1).encode())
