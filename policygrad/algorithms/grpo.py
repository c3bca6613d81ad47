"""Group-relative policy optimization (GRPO; Shao et al. 2024, arXiv 2402.03300) and its variants.

sample    several rows of each prompt (or start state), from pi_old
credit    A_i = (R_i - mean of the group) / std of the group, the same for all decisions of a row
objective mean over rows of the mean over decisions of min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL(pi, pi_ref)
update    gradient ascent, in one or more epochs of minibatches

There is no critic: the other answers to the same prompt are the baseline. The variants change the credit, the ratio,
the gain, the weights, or which decisions are learned from; the table of methods has a line for each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from policygrad.advantages import unnormalized
from policygrad.algorithms.ppo import ppo
from policygrad.diagnostics import clip_fraction_by_side, ratio_metrics
from policygrad.divergences import AdaptiveCoefficient, AdaptiveEntropy
from policygrad.objectives import Filter, clipped_surrogate, dual_clip, imitated, penalized_surrogate
from policygrad.rollout import Batch
from policygrad.score import bounded, token_ratio
from policygrad.updates import Metrics, Objective
from policygrad.weights import average, normalized, per_row

Ratio = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logp, logp_old, mask) -> [B, T] or [B, 1]
Gain = Callable[..., Tensor]  # (logp, ratio, advantage) -> [B, T]; with a clip also low= and high=
Penalty = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logp, logp_old, mask) -> KL(old, new), [B, T] or [B, 1]
Anchor = Callable[[Any, Batch, Tensor], Tensor]  # (distribution, batch, ratio by token) -> KL(pi, pi_ref), [B, T]


class GRPOObjective(Objective):
    """E[min(r A, clip(r) A)] - beta KL(pi, pi_ref) - beta_old KL(old, new) + c_H H(pi).

    ratio: of score.py. gain: of objectives.py, with clip: its (low, high), or None for a gain that has none.
    token_clip: see score.bounded; dual_clip: see objectives.dual_clip. filters: decisions that one of them does not
    keep add 0. anchor: a partial of divergences.to_reference; the coefficient is its beta. penalty: the estimate of
    KL(old, new), such as divergences.squared_row, with its own coefficient, times the batch's charge if it has one.
    entropy_bonus: c_H, if it adapts. A batch with imitation adds it: see objectives.imitated.

    If the weights match the centering (by row, or rows of equal length), the objective is always 0 at ratio 1: watch
    reward, group_std, flat_groups and gradient_norm instead. clipped_weight keeps every gradient; for it,
    clip_fraction_low and _high are the shares that clipping the surrogate would have cut off.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        ratio: Ratio = token_ratio,
        gain: Gain = clipped_surrogate,
        clip: tuple[float, float] | None = (0.2, 0.2),
        token_clip: float = torch.inf,
        dual_clip: float = torch.inf,
        filters: Sequence[Filter] = (),
        anchor: Anchor | None = None,
        coefficient: AdaptiveCoefficient | None = None,
        penalty: Penalty | None = None,
        penalty_coefficient: AdaptiveCoefficient | None = None,
        entropy_coefficient: float = 0.0,
        entropy_bonus: AdaptiveEntropy | None = None,
    ) -> None:
        super().__init__()
        if (anchor is None) != (coefficient is None) or (penalty is None) != (penalty_coefficient is None):
            raise ValueError("an anchor or penalty is charged with a coefficient: give both, or neither")
        self.policy, self.ratio, self.gain, self.clip = policy, ratio, gain, clip
        self.token_clip, self.dual_clip, self.filters = token_clip, dual_clip, filters
        self.anchor, self.coefficient = anchor, coefficient
        self.divergence, self.penalty = penalty, penalty_coefficient
        self.entropy_coefficient, self.entropy_bonus = entropy_coefficient, entropy_bonus

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        distribution = self.policy(batch.obs)
        logp = distribution.log_prob(batch.action).where(batch.mask, 0.0)
        gain, metrics = self._gain(logp, batch)
        share = normalized(batch.weight)
        if self.filters:
            kept = torch.stack([keep(distribution, batch, logp).expand_as(gain) for keep in self.filters]).all(0)
            gain = gain.where(kept, 0.0)
            metrics["kept"] = average(kept.to(share.dtype), share)
        gain = imitated(gain, logp, batch.imitation)
        if self.divergence is not None and self.penalty is not None:
            divergence = self.divergence(logp, batch.logp, batch.mask)
            divergence = divergence * batch.charge if isinstance(batch.charge, Tensor) else divergence
            gain = penalized_surrogate(gain, divergence, self.penalty.value)
        if self.anchor is not None and self.coefficient is not None:
            divergence = self.anchor(distribution, batch, token_ratio(logp, batch.logp, batch.mask))
            gain = penalized_surrogate(gain, divergence, self.coefficient.value)
            metrics["kl_ref"] = average(divergence, share).detach()
        value, entropy = average(gain, batch.weight), average(distribution.entropy(), share)
        metrics |= {"objective": value.detach(), "entropy": entropy.detach()}
        bonus = self.entropy_coefficient if self.entropy_bonus is None else self.entropy_bonus.value
        charged = self.entropy_bonus is not None or self.entropy_coefficient
        return (value + bonus * entropy if charged else value), metrics

    def _gain(self, logp: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """The gain of each decision before anything is subtracted, and how far the policy has moved."""
        metrics = ratio_metrics(logp, batch.logp, batch.mask, batch.weight)
        near = logp if self.token_clip == torch.inf else bounded(logp, batch.logp, batch.advantage, self.token_clip)
        ratio = self.ratio(near, batch.logp, batch.mask)
        if self.clip is None:
            gain = self.gain(logp, ratio, batch.advantage)
        else:
            low, high = self.clip
            gain = self.gain(logp, ratio, batch.advantage, low=low, high=high)
            metrics |= clip_fraction_by_side(ratio, batch.advantage, batch.weight, low, high)
        if self.dual_clip < torch.inf:
            gain = dual_clip(gain, batch.advantage, self.dual_clip)
        return gain, metrics

    def adapt(self, metrics: Metrics) -> Metrics:
        found = {} if self.coefficient is None else self.coefficient.adapt(metrics, "kl_ref")
        found |= {} if self.penalty is None else self.penalty.adapt(metrics, "kl_old")
        return found if self.entropy_bonus is None else found | self.entropy_bonus.adapt(metrics)


def measured_in_steps(objective: Objective, batch: Batch) -> Metrics:
    """No metrics beyond the steps' own: another forward pass of a large model is expensive.

    The steps measure KL(old, new) before they change the policy, so an adaptive penalty needs after_update instead.
    """
    return {}


grpo = partial(ppo, epochs=1, minibatch_size=None, normalize=unnormalized, weights=per_row, diagnose=measured_in_steps)
