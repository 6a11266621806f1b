"""Hugging Face models as the router of whole runs on real games: killed in the sweep, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from bopo_ray import load_router
from bopo_ray.models import load_pool
from bopo_ray.records import Phase
from bopo_ray.routers import LEARNED
from bopo_ray.store import EpisodeStore
from tests.integration.conftest import Frontier, audited, wait_for
from tests.replay import agree
from tests.soak.test_faults import checkpoints, kill_run, ledger, updates_of
from tests.tiny_router import make_encoder, make_qwen

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not find_spec("alfworld"), reason="needs ALFWorld's engine: make alfworld"),
]
GAMES = ("--env", "ALFWorld-v0", "--scale", "tiny", "--cpus", "2", "--lambdas", "0.2", "--advantage", "hybrid",
         "--updates", "3", "--sft-epochs", "3", "--offsets=-1,1", "--ignore-gate")  # fmt: skip
KINDS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "causal": (make_qwen, ("--lora-rank", "4")),
    "encoder": (make_encoder, ("--lora-rank", "0")),
    "two learners": (make_qwen, ("--lora-rank", "4", "--num-learners", "2")),
}
"""Router -> how its model is made, and options."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_goes_on_from_its_last_update_and_decides_as_it_did(
    kind: str, frontier: Frontier, tmp_path: Path
) -> None:
    make, own = KINDS[kind]
    frontier.options = (*GAMES, "--backbone", str(make(tmp_path / "backbone")), *own)
    process = frontier.start()
    wait_for(lambda: checkpoints(frontier), process)
    kill_run(process)
    ((name, kept),) = checkpoints(frontier).items()
    done = int((kept[-1] / "updates.json").read_text())
    played, before = frontier.rows("boundary"), frontier.rows("policy")
    assert done < 3 and not ledger(frontier)

    assert frontier.run("--resume") == 0, frontier.said()
    (last,) = frontier.out.glob(f"tune/attempt-1/{name}/result.json")
    assert updates_of(last) == list(range(done + 1, 4)) and list(ledger(frontier)) == [name]
    assert frontier.rows("boundary") == played
    assert before.items() <= frontier.rows("policy").items()
    assert "0 differ" in audited(frontier)
    store = EpisodeStore(frontier.out / "episodes" / "evaluation", load_pool("embedded:alfworld").price_hash)
    episodes = [e for e in store.read(Phase.EVALUATION) if e.spec.router == LEARNED]
    routers = {p: load_router(frontier.out / "policies" / p) for p in {e.spec.policy for e in episodes}}
    assert len(routers) == 2 and sum(agree(routers[e.spec.policy], e) for e in episodes) > 20
