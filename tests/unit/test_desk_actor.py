"""What a desk on another node asks the actor for, where answers get lost; with a real one: the integration tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bopo_ray.errors import ModelError
from bopo_ray.models.pricing import Usage
from bopo_ray.models.spend import SpendLedger
from bopo_ray.rllib import open_desk
from bopo_ray.rllib.open_desk import _Remote

ME = "here/1/1"


class Line:
    """The way to an actor that is restarted now and then: "q", the question is lost; "a", its answer."""

    def __init__(self, ledger: SpendLedger, lose: str) -> None:
        self.ledger, self.lose = ledger, iter(lose)

    def ask(self, question: Any) -> Any:
        how = next(self.lose, ".")
        if how == "q":
            raise ModelError("the actor does not answer")
        answer = getattr(self.ledger, question.method)(*question.args)
        if how == "a":
            raise ModelError("the actor does not answer")
        return answer


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[SpendLedger]:
    ledger = SpendLedger(tmp_path / "spend.db", 1000)
    yield ledger
    ledger.close()


@pytest.mark.parametrize("lose", ["", "a", "q", "aqa", "qaa"])
def test_a_restart_of_the_actor_leaves_no_money_set_aside(
    ledger: SpendLedger, lose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_desk, "AGAIN_S", 0.001)
    spend = _Remote(Line(ledger, lose), "spend")  # type: ignore[arg-type]
    reservation = spend.reserve(ME, "key", "mini", 600)
    assert reservation and ledger.totals().overall.reserved_microusd == 600
    spend.settle(reservation, Usage(10, 1), 11)
    overall = ledger.totals().overall
    assert (overall.paid_microusd, overall.reserved_microusd, overall.lost_microusd) == (11, 0, 0)


def test_each_reservation_is_one_of_its_own(ledger: SpendLedger) -> None:
    """Also of the same owner and call: an attempt that failed may not be closed yet."""
    reserve = _Remote(Line(ledger, ""), "spend").reserve  # type: ignore[arg-type]
    first, second = (reserve(ME, "key", "mini", 300) for _ in range(2))
    assert first and second and first != second and ledger.totals().overall.reserved_microusd == 600
    assert reserve(ME, "key", "mini", 401) is None
