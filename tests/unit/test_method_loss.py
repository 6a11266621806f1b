"""The losses: values and gradients worked by hand, additivity, masks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bopo_ray.errors import ConfigError
from bopo_ray.method.loss import LossConfig, bopo_loss, bosft_loss

PLAIN = LossConfig(kl=0.0, entropy=0.0)
LOG3 = math.log(3.0)


def batch(seed: int, n: int = 12, models: int = 3, masked: bool = False) -> dict[str, Tensor]:
    """Random rows: two of three are policy rows, the others anchor rows; the taken action is always allowed."""
    g = torch.Generator().manual_seed(seed)
    actions = torch.randint(models, (n,), generator=g)
    anchor = torch.arange(n) % 3 == 2
    rows = {
        "logits_BN": 2 * torch.randn(n, models, generator=g),
        "actions_B": actions,
        "old_logp_B": -2 * torch.rand(n, generator=g),
        "advantages_B": torch.where(anchor, 0.0, torch.randn(n, generator=g)),
        "ref_logits_BN": torch.randn(n, models, generator=g),
        "anchor_adv_B": torch.where(anchor, 1 + torch.rand(n, generator=g), 0.0),
        "weights_B": 0.01 + torch.rand(n, generator=g),
    }
    if masked:
        mask = torch.rand(n, models, generator=g) < 0.5
        mask[torch.arange(n), actions] = True
        rows["mask_BN"] = mask
    return rows


def loss_and_gradient(rows: dict[str, Tensor], cfg: LossConfig) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logits = rows["logits_BN"].clone().requires_grad_(True)
    loss, stats = bopo_loss(**{**rows, "logits_BN": logits}, cfg=cfg)
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient, stats


def two_steps(advantage: float, old_p: float) -> dict[str, Tensor]:
    """Two policy rows with pi = (1/4, 3/4), action 1 taken under pi_old(1) = `old_p`, weight 1/2 each."""
    return {
        "logits_BN": torch.tensor([[0.0, LOG3]] * 2),
        "actions_B": torch.tensor([1, 1]),
        "old_logp_B": torch.tensor([math.log(old_p), math.log(0.75)]),
        "advantages_B": torch.tensor([advantage, advantage]),
        "ref_logits_BN": torch.zeros(2, 2),
        "anchor_adv_B": torch.zeros(2),
        "weights_B": torch.tensor([0.5, 0.5]),
    }


@pytest.mark.parametrize(
    ("advantage", "old_p", "expected", "first_moves"),
    [
        # rho = 0.75 / 0.5 = 1.5 and 1. A = 2: -(min(3, 2.4) + 2) / 2 = -2.2, the first step is clipped: no gradient
        (2.0, 0.5, -2.2, False),
        # A = -2: -(min(-3, -2.4) - 2) / 2 = 2.5, the pessimistic side is not clipped
        (-2.0, 0.5, 2.5, True),
        # rho = 0.75 / 1 = 0.75 and 1. A = 2: -(min(1.5, 1.6) + 2) / 2 = -1.75
        (2.0, 1.0, -1.75, True),
        # A = -2: -(min(-1.5, -1.6) - 2) / 2 = 1.8, clipped
        (-2.0, 1.0, 1.8, False),
    ],
)
def test_two_steps_by_hand(advantage: float, old_p: float, expected: float, first_moves: bool) -> None:
    rows = two_steps(advantage, old_p)
    loss, gradient, stats = loss_and_gradient(rows, PLAIN)
    rho = 0.75 / old_p
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    # d rho / d logit_1 = rho * (1 - pi_1) = rho / 4, and the other logit's the negative; times -w * A
    slope = [-0.5 * advantage * rho / 4 if first_moves else 0.0, -0.5 * advantage * 1.0 / 4]
    torch.testing.assert_close(gradient, torch.tensor([[-s, s] for s in slope]))
    assert stats["clip_fraction"].item() == 0.5
    assert stats["ratio"].item() == pytest.approx((rho + 1) / 2)
    assert stats["policy_loss"].item() == pytest.approx(expected, abs=1e-6)


def test_kl_and_entropy_by_hand() -> None:
    loss, gradient, stats = loss_and_gradient(two_steps(0.0, old_p=0.75), LossConfig(kl=0.1, entropy=0.01))
    # pi = (1/4, 3/4), reference (1/2, 1/2): H = ln 4 - 3/4 ln 3, KL = ln 2 - H
    entropy = math.log(4) - 0.75 * LOG3
    kl = math.log(2) - entropy
    assert stats["entropy"].item() == pytest.approx(entropy, abs=1e-6)
    assert stats["kl"].item() == pytest.approx(kl, abs=1e-6)
    assert loss.item() == pytest.approx(0.1 * kl - 0.01 * entropy, abs=1e-6)
    # dKL/dlogit_1 = p1 (log(p1/q1) - KL); dH/dlogit_1 = -p1 (log p1 + H); each row has weight 1/2
    slope = 0.5 * 0.75 * (0.1 * (math.log(1.5) - kl) + 0.01 * (math.log(0.75) + entropy))
    torch.testing.assert_close(gradient, torch.tensor([[-slope, slope]] * 2))


def test_anchor_rows_by_hand() -> None:
    """Only -w * A_b * log pi: no ratio (old_logp is NaN here), no KL, no entropy."""
    rows = two_steps(0.0, old_p=0.5) | {
        "old_logp_B": torch.full((2,), torch.nan),
        "anchor_adv_B": torch.tensor([3.0, 1.0]),
    }
    loss, gradient, stats = loss_and_gradient(rows, LossConfig())
    # 0.5 * (0.5 * 3 + 0.5 * 1) * -ln 0.75
    assert loss.item() == pytest.approx(-math.log(0.75), abs=1e-6)
    # d -log pi_1 / d logit_1 = -(1 - 0.75)
    torch.testing.assert_close(gradient, torch.tensor([[0.1875, -0.1875], [0.0625, -0.0625]]))
    assert stats["anchor_loss"].item() == pytest.approx(loss.item())
    assert [stats[k].item() for k in ("policy_loss", "kl", "entropy", "clip_fraction", "ratio")] == [0] * 5


def test_padding_rows_change_nothing() -> None:
    rows = batch(0)
    padded = {k: torch.cat([v, v[:4]]) for k, v in rows.items()}
    padded["weights_B"][12:] = 0
    padded["anchor_adv_B"][12:] = 0
    loss, gradient, stats = loss_and_gradient(rows, LossConfig())
    loss_p, gradient_p, stats_p = loss_and_gradient(padded, LossConfig())
    torch.testing.assert_close(loss_p, loss)
    torch.testing.assert_close(gradient_p[:12], gradient)
    assert not gradient_p[12:].any()
    torch.testing.assert_close(stats_p, stats)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 11), st.booleans())
def test_minibatches_add_up(seed: int, cut: int, masked: bool) -> None:
    rows = batch(seed, masked=masked)
    parts = ({k: v[:cut] for k, v in rows.items()}, {k: v[cut:] for k, v in rows.items()})
    whole, gradient, stats = loss_and_gradient(rows, LossConfig())
    (a, gradient_a, stats_a), (b, gradient_b, stats_b) = (loss_and_gradient(p, LossConfig()) for p in parts)
    torch.testing.assert_close(a + b, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([gradient_a, gradient_b]), gradient)
    for name in ("policy_loss", "anchor_loss"):
        torch.testing.assert_close(stats_a[name] + stats_b[name], stats[name], atol=1e-4, rtol=1e-4)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 100.0, 1e4]), st.integers(2, 4))
def test_any_mask_that_allows_the_action_gives_finite_numbers(seed: int, scale: float, models: int) -> None:
    rows = batch(seed, models=models, masked=True)
    rows["logits_BN"] = scale * rows["logits_BN"]
    rows["old_logp_B"] = scale * rows["old_logp_B"]
    loss, gradient, stats = loss_and_gradient(rows, LossConfig())
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert not gradient[~rows["mask_BN"]].any()
    assert all(torch.isfinite(v) for v in stats.values())


def test_a_masked_model_is_as_if_it_did_not_exist() -> None:
    rows = batch(3, models=2)
    wide = rows | {k: torch.cat([rows[k], torch.full((12, 1), 7.0)], -1) for k in ("logits_BN", "ref_logits_BN")}
    wide["mask_BN"] = torch.tensor([[True, True, False]]).expand(12, 3)
    loss, _, stats = loss_and_gradient(rows, LossConfig())
    loss_w, _, stats_w = loss_and_gradient(wide, LossConfig())
    torch.testing.assert_close(loss_w, loss)
    torch.testing.assert_close(stats_w, stats)


def test_a_forced_choice_teaches_nothing() -> None:
    rows = two_steps(2.0, old_p=1.0) | {"old_logp_B": torch.zeros(2), "mask_BN": torch.tensor([[False, True]] * 2)}
    loss, gradient, stats = loss_and_gradient(rows, LossConfig())
    assert loss.item() == pytest.approx(-2.0)
    assert not gradient.any()
    assert (stats["kl"].item(), stats["entropy"].item(), stats["ratio"].item()) == (0, 0, 1)


def test_a_forbidden_action_is_refused() -> None:
    rows = two_steps(1.0, 0.5) | {"mask_BN": torch.tensor([[True, True], [True, False]])}
    with pytest.raises(ValueError, match="forbids an action"):
        loss_and_gradient(rows, PLAIN)


def test_the_reference_gets_no_gradient_and_half_precision_is_lifted() -> None:
    rows = batch(5)
    rows["logits_BN"] = rows["logits_BN"].bfloat16().requires_grad_(True)
    rows["ref_logits_BN"] = rows["ref_logits_BN"].requires_grad_(True)
    loss, stats = bopo_loss(**rows, cfg=LossConfig())
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.dtype == torch.float32
    assert rows["ref_logits_BN"].grad is None
    assert rows["logits_BN"].grad is not None
    assert not any(v.requires_grad for v in stats.values())


def test_bosft_by_hand() -> None:
    logits = torch.tensor([[0.0, LOG3]] * 2, requires_grad=True)
    loss = bosft_loss(logits, torch.tensor([1, 0]), torch.tensor([0.25, 0.75]))
    # (0.5 * -ln 3/4 + 1.5 * -ln 1/4) / 2
    assert loss.item() == pytest.approx((0.5 * math.log(4 / 3) + 1.5 * math.log(4)) / 2, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    # w * (pi - onehot): 0.25 * (1/4, -1/4) and 0.75 * (-3/4, 3/4)
    torch.testing.assert_close(gradient, torch.tensor([[0.0625, -0.0625], [-0.5625, 0.5625]]))


@pytest.mark.parametrize(
    ("field", "value"), [("clip", 0.0), ("clip", 1.0), ("kl", -0.1), ("entropy", -1.0), ("anchor", np.nan)]
)
def test_config_names_field_value_and_rule(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}={value}: need"):
        LossConfig(**{field: value})
