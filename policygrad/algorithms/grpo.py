"""Group-relative policy optimization (GRPO; Shao et al. 2024, arXiv 2402.03300) and its variants.

sample    several rows of each prompt (or start state), from pi_old
credit    A_i = (R_i - mean of the group) / std of the group, the same for all decisions of a row
objective mean over rows of the mean over decisions of min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL(pi, pi_ref)
update    gradient ascent, in one or more epochs of minibatches

There is no critic: the other answers to the same prompt are the baseline. Dr. GRPO, DAPO, GSPO, CISPO, RLOO and
REINFORCE++ change the credit, the ratio, the gain or the weights; the table of methods has a line for each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from policygrad.advantages import unnormalized
from policygrad.algorithms.ppo import ppo
from policygrad.diagnostics import clip_fraction_by_side, ratio_metrics
from policygrad.divergences import AdaptiveCoefficient
from policygrad.objectives import clipped_surrogate, penalized_surrogate
from policygrad.rollout import Batch
from policygrad.score import token_ratio
from policygrad.updates import Metrics, Objective
from policygrad.weights import average, normalized, per_row

Gain = Callable[..., Tensor]  # (logp, ratio, advantage, low=, high=) -> [B, T]
Anchor = Callable[[Any, Batch, Tensor], Tensor]  # (distribution, batch, ratio by token) -> KL(pi, pi_ref), [B, T]


class GRPOObjective(Objective):
    """E[min(r A, clip(r) A)] - beta KL(pi, pi_ref) + c_H H(pi).

    ratio: token_ratio or sequence_ratio. gain: clipped_surrogate, or clipped_weight (CISPO). clip: (low, high) of the
    gain. anchor: a partial of divergences.to_reference; the coefficient is its beta.

    If the weights match the centering (by row, or rows of equal length), the objective is always 0 at ratio 1: watch
    reward, group_std, flat_groups and gradient_norm instead. clipped_weight keeps every gradient; for it,
    clip_fraction_low and _high are the shares that clipping the surrogate would have cut off.
    """

    def __init__(
        self,
        policy: nn.Module,
        *,
        ratio: Callable[[Tensor, Tensor, Tensor], Tensor] = token_ratio,
        gain: Gain = clipped_surrogate,
        clip: tuple[float, float] = (0.2, 0.2),
        anchor: Anchor | None = None,
        coefficient: AdaptiveCoefficient | None = None,
        entropy_coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        if (anchor is None) != (coefficient is None):
            raise ValueError("an anchor is charged with a coefficient: give both, or neither")
        self.policy, self.ratio, self.gain, self.clip = policy, ratio, gain, clip
        self.anchor, self.coefficient, self.entropy_coefficient = anchor, coefficient, entropy_coefficient

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        distribution = self.policy(batch.obs)
        logp = distribution.log_prob(batch.action).where(batch.mask, 0.0)
        ratio, (low, high) = self.ratio(logp, batch.logp, batch.mask), self.clip
        gain = self.gain(logp, ratio, batch.advantage, low=low, high=high)
        share = normalized(batch.weight)
        metrics = ratio_metrics(logp, batch.logp, batch.mask, batch.weight)
        metrics |= clip_fraction_by_side(ratio, batch.advantage, batch.weight, low, high)
        if self.anchor is not None and self.coefficient is not None:
            divergence = self.anchor(distribution, batch, token_ratio(logp, batch.logp, batch.mask))
            gain = penalized_surrogate(gain, divergence, self.coefficient.value)
            metrics["kl_ref"] = average(divergence, share).detach()
        value, entropy = average(gain, batch.weight), average(distribution.entropy(), share)
        metrics |= {"objective": value.detach(), "entropy": entropy.detach()}
        return (value + self.entropy_coefficient * entropy if self.entropy_coefficient else value), metrics

    def adapt(self, metrics: Metrics) -> Metrics:
        return {} if self.coefficient is None else self.coefficient.adapt(metrics, "kl_ref")


def measured_in_steps(objective: Objective, batch: Batch) -> Metrics:
    """No metrics beyond the steps' own: another forward pass of a large model is expensive.

    The steps measure KL(old, new) before they change the policy, so an adaptive penalty needs after_update instead.
    """
    return {}


grpo = partial(ppo, epochs=1, minibatch_size=None, normalize=unnormalized, weights=per_row, diagnose=measured_in_steps)
