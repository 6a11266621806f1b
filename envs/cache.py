"""Where the environments keep what takes long to make: `$BOPO_RAY_CACHE`, else `~/.cache/bopo_ray`.

The cache is only an aid: a file is there whole or not at all, and a folder that can't be written is no error.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "keep"]


def cache_folder(name: str) -> Path:
    """A folder of the cache; it need not exist."""
    return Path(os.environ.get("BOPO_RAY_CACHE") or Path.home() / ".cache" / "bopo_ray") / name


def keep(path: Path, data: bytes) -> None:
    """Writes a file, also when several processes write it at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except OSError:
        pass  # what is not kept is made again
