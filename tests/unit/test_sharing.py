"""Which calls each lambda of a sweep needs, by hand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bopo_ray.analysis.bill import sharing


def test_the_trials_of_routers_that_suit_all_lambdas_are_needed_by_each(tmp_path: Path) -> None:
    policies = ("always-small", "bopo-hybrid(lam=0.3,seed=0)", "bosft_lam0.1_offset1", "bosft_lam0.8_offset0",
                "bopo-hybrid_lam0.3_seed0_for0.1_offset1", "bopo-hybrid_lam0.3_seed0_for0.8_offset0")  # fmt: skip
    rows = [
        {"task": f"t{i}", "policy": policy, "member": 0, "sample": 0, "first_observation": "here",
         "steps": [{"model": 0, "reply": "go", "observation": "there", "question": ""}]}
        for i, policy in enumerate(policies)
    ]  # fmt: skip
    path = tmp_path / "part-0.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = sharing([path], deterministic=False, trained_for_all=True)
    assert (found.calls, found.one_lambda) == (6, {"0.1": 4, "0.8": 4}) and found.ratio == 1.5
    alone = sharing([path], deterministic=False)
    assert alone.one_lambda == {"0.1": 3, "0.3": 2, "0.8": 3}, "as if 0.3 were a point of the frontier, too"
