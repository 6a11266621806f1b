"""Where labels go on a figure so that they don't cover each other: plain geometry, no Matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["free_spots", "spread"]

_DIRECTIONS = ((0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0))


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, in their order, at least `gap` apart and inside [low, high] if all fit there."""
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    placed = [0.0] * len(wanted)
    bottom = low
    for i in order:
        placed[i] = bottom = max(wanted[i], bottom)
        bottom += gap
    top = high
    for i in reversed(order):
        placed[i] = top = min(placed[i], top)
        top -= gap
    return placed


def free_spots(
    anchors_LX: npt.NDArray[np.float64],
    texts: Sequence[str],
    obstacles_PX: npt.NDArray[np.float64],
    *,
    character_px: float,
    line_px: float,
) -> list[npt.NDArray[np.float64] | None]:
    """Centres for labels beside their anchors that cover no obstacle and no earlier label; None where none is free.

    Args:
        anchors_LX: points to label, pixels, shape (L, 2); earlier ones choose first.
        texts: one per anchor.
        obstacles_PX: points to keep clear of, pixels, shape (P, 2).
        character_px: width of a character.
        line_px: height of a line.
    """
    taken: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]] = []
    spots: list[npt.NDArray[np.float64] | None] = []
    for anchor, text in zip(anchors_LX, texts, strict=True):
        half = np.array([len(text) * character_px, line_px]) / 2
        spot = None
        for direction in _DIRECTIONS:
            centre = anchor + np.array(direction) * (half + line_px * 0.55)
            covers_point = np.any(np.all(np.abs(obstacles_PX - centre) < half + line_px * 0.25, axis=1))
            covers_label = any(np.all(np.abs(other - centre) < half + size) for other, size in taken)
            if not covers_point and not covers_label:
                spot = centre
                taken.append((centre, half))
                break
        spots.append(spot)
    return spots
