"""What any router reads, whichever way its view is encoded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOTHING", "Reading"]

NOTHING = -1
"""Stands behind what a backbone reads, up to a fixed length: no token has this id."""


class Reading(NamedTuple):
    """Token ids [T], and where in them is decided."""

    ids: NDArray[np.int32]
    """Without padding."""
    asks: NDArray[np.int32] | None = None
    """[T]: k > 0 at the tokens of the k-th question, behind whose last one is decided; they are seen by each other
    alone. None: one decision, by all of it."""

    @property
    def decisions(self) -> int:
        """How many there are, one for each step."""
        return 1 if self.asks is None else int(self.asks.max())
