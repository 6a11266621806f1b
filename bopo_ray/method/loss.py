"""The losses of BoSFT and BoPO (sections 3 and 4 of the method), arXiv:2602.21227.

Rows are steps. What differs from textbook PPO: the constant 1/(G * T_max) instead of 1/|tau| (a per-length mean
under-penalises long looping failures), the exact KL over the N actions, and the anchor term. Always true here:
arithmetic is in float32, a loss is a sum over rows (so the losses of minibatches add up to the loss of the batch),
and no mask with an allowed action gives a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bopo_ray.errors import ConfigError

__all__ = ["LossConfig", "bopo_loss", "bosft_loss"]

_MAX_LOG_RATIO = 20.0
"""|log rho| is cut here, far outside the clip range: exp must not overflow, for 0 * inf is NaN in the gradient."""


@dataclass(frozen=True, slots=True)
class LossConfig:
    """The coefficients of the BoPO loss. [ours]

    Raises:
        ConfigError: a coefficient outside its range.
    """

    clip: float = 0.2
    """Half-width of the trust region of rho; above 0, below 1."""
    kl: float = 0.02
    """Weight of KL(pi || pi_BoSFT); at least 0."""
    entropy: float = 0.005
    """Weight of the entropy bonus; at least 0."""
    anchor: float = 0.5
    """w: weight of the imitation of a boundary trajectory; at least 0."""

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise ConfigError(f"clip={self.clip}: need 0 < clip < 1")
        for name in ("kl", "entropy", "anchor"):
            value = getattr(self, name)
            if not value >= 0:
                raise ConfigError(f"{name}={value}: need at least 0")


def bosft_loss(logits_BN: Tensor, labels_B: Tensor, weights_B: Tensor) -> Tensor:
    """Weighted cross-entropy on the N action logits: sum_b w_b * -log pi(label_b). [paper; weights ours]

    With weights of sum 1 over the data set (`class_weights` over the number of steps) it is the mean loss, in parts
    that add up.

    Args:
        logits_BN: action logits [B, N].
        labels_B: expert's model at each step [B], int64.
        weights_B: weight of each step [B].

    Returns:
        A scalar, in nats.
    """
    losses_B = F.cross_entropy(logits_BN.float(), labels_B, reduction="none")
    return (weights_B.float() * losses_B).sum()


def _log_policy(logits_BN: Tensor, mask_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """log pi and pi [B, N]; where the mask is False pi is 0 and log pi is set to 0, so that pi * log pi is 0."""
    if mask_BN is None:
        logp_BN = F.log_softmax(logits_BN.float(), dim=-1)
        return logp_BN, logp_BN.exp()
    logp_BN = F.log_softmax(logits_BN.float().masked_fill(~mask_BN, -torch.inf), dim=-1)
    logp_BN = logp_BN.masked_fill(~mask_BN, 0.0)
    return logp_BN, logp_BN.exp().masked_fill(~mask_BN, 0.0)


def bopo_loss(
    logits_BN: Tensor,
    actions_B: Tensor,
    old_logp_B: Tensor,
    advantages_B: Tensor,
    ref_logits_BN: Tensor,
    anchor_adv_B: Tensor,
    weights_B: Tensor,
    cfg: LossConfig,
    mask_BN: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The BoPO loss, arXiv:2602.21227. [named by the paper; formula ours]

        L = sum_b w_b * ( -min(rho A, clip(rho, 1-c, 1+c) A) + kl * KL(pi || pi_ref) - entropy * H(pi) )  (policy rows)
          + sum_b w_b * ( -anchor * A_b * log pi(a_b | s_b) )                                              (anchor rows)

    Policy rows are steps of the G episodes of a group: anchor_adv 0, w = 1/(G * T_max * n_groups). Anchor rows are
    steps of a stored boundary trajectory: advantage 0, anchor_adv = A_b > 0, w = 1/(T_max * n_groups). KL and
    entropy are on policy rows only, with the same weights as the policy term (anchor states are off-policy, and an
    entropy bonus there would work against the imitation). Anchor rows have no importance weight: their
    `old_logp_B` is not read. Rows of weight 0 are padding.

    The loss and the two `*_loss` statistics are sums over rows: with weights fixed for the whole batch, those of
    minibatches add up to those of the batch, and so do their gradients.

    Args:
        logits_BN: the policy's action logits [B, N].
        actions_B: the chosen model [B], int64; for anchor rows the boundary policy's.
        old_logp_B: log pi_old(a|s) under the same mask [B], in nats.
        advantages_B: A_i of the row's episode [B].
        ref_logits_BN: logits of the frozen BoSFT policy [B, N]; gets no gradient.
        anchor_adv_B: A_b [B].
        weights_B: weight of each row [B].
        cfg: the coefficients.
        mask_BN: bool [B, N], False = the budget can't pay for that model; in the policy and in the reference its
            logit is -inf.

    Returns:
        The scalar loss, and detached statistics: `policy_loss`, `anchor_loss` (as they enter the loss); `kl`,
        `entropy` (nats), `clip_fraction`, `ratio`: plain means over the policy rows, 0 where there is none.

    Raises:
        ValueError: a row whose action the mask forbids.
    """
    actions_B1 = actions_B.long().unsqueeze(-1)
    if mask_BN is not None and not bool(mask_BN.gather(-1, actions_B1).all()):
        raise ValueError("mask_BN forbids an action that was taken: need mask_BN[b, actions_B[b]] True in each row")
    weights_B, anchor_adv_B, advantages_B = weights_B.float(), anchor_adv_B.float(), advantages_B.float()
    anchor_B = anchor_adv_B != 0
    policy_B = ~anchor_B & (weights_B != 0)

    logp_BN, p_BN = _log_policy(logits_BN, mask_BN)
    ref_logp_BN, _ = _log_policy(ref_logits_BN.detach(), mask_BN)
    logp_B = logp_BN.gather(-1, actions_B1).squeeze(-1)

    log_ratio_B = torch.where(anchor_B, 0.0, logp_B - old_logp_B.float())
    ratio_B = log_ratio_B.clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO).exp()
    clipped_B = ratio_B.clamp(1 - cfg.clip, 1 + cfg.clip)
    surrogate_B = torch.minimum(ratio_B * advantages_B, clipped_B * advantages_B)
    kl_B = (p_BN * (logp_BN - ref_logp_BN)).sum(-1)
    entropy_B = -(p_BN * logp_BN).sum(-1)

    weights_policy_B = torch.where(policy_B, weights_B, 0.0)
    policy_loss = -(weights_policy_B * surrogate_B).sum()
    anchor_loss = -cfg.anchor * (weights_B * anchor_adv_B * logp_B).sum()
    regulariser = (weights_policy_B * (cfg.kl * kl_B - cfg.entropy * entropy_B)).sum()
    loss = policy_loss + regulariser + anchor_loss

    def mean(value_B: Tensor) -> Tensor:
        return torch.where(policy_B, value_B, 0.0).sum().detach() / policy_B.sum().clamp(min=1)

    stats = {
        "policy_loss": policy_loss.detach(),
        "anchor_loss": anchor_loss.detach(),
        "kl": mean(kl_B),
        "entropy": mean(entropy_B),
        "clip_fraction": mean(((ratio_B - 1).abs() > cfg.clip).float()),
        "ratio": mean(ratio_B),
    }
    return loss, stats
