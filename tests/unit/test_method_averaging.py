"""The weights of the averaged router, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bopo_ray.method.averaging import averaging_weight


def test_the_first_router_is_its_own_average() -> None:
    assert averaging_weight(1) == 1.0


@pytest.mark.parametrize("updates", [1, 2, 3, 8, 100])
def test_router_i_counts_in_proportion_to_three_rising_factors(updates: int) -> None:
    shares = np.zeros(updates)
    for i in range(updates):
        weight = averaging_weight(i + 1)
        shares *= 1 - weight
        shares[i] = weight
    i = np.arange(1, updates + 1)
    wanted = i * (i + 1) * (i + 2)
    assert shares == pytest.approx(wanted / wanted.sum())


def test_of_eight_routers_the_last_four_count_nine_tenths() -> None:
    wanted = [6, 24, 60, 120, 210, 336, 504, 720]
    assert sum(wanted[4:]) / sum(wanted) == pytest.approx(0.894, abs=1e-3)


def test_there_is_no_update_zero() -> None:
    with pytest.raises(ValueError, match="update=0"):
        averaging_weight(0)
