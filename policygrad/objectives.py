"""Pointwise objectives. weights.py averages them, and `ascend` sets the sign.

A gain is (logp, ratio, advantage) -> [B, T]; it may ignore some of the three. The gains are `surrogate`,
`clipped_surrogate`, `clipped_weight`, `sigmoid_gate`, `gamma_weight`, and `score.score`. The ratio is [B, T] by token,
or [B, 1] by sequence.

A filter is (distribution, batch, logp) -> [B, T] or [B, 1], True where a decision is learned from.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policygrad.rollout import Batch
from policygrad.score import sequence_ratio


def surrogate(
    logp: Float[Tensor, "B T"], ratio: Float[Tensor, "B #T"], advantage: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """r A: the importance-sampled improvement over the old policy (Schulman et al. 2015, eq. 14).

    At the old policy its gradient equals the gradient of the score term.
    """
    return ratio * advantage


def clipped_surrogate(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B #T"],
    advantage: Float[Tensor, "B T"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "B T"]:
    """min(r A, clip(r, 1 - low, 1 + high) A) (PPO, Schulman et al. 2017, eq. 7; low < high is DAPO's clip-higher).

    A lower bound of the surrogate. Its gradient is 0 once the ratio leaves the interval in the direction that the
    advantage favors. low = high = inf clips nothing.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dual_clip(gain: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], bound: float) -> Float[Tensor, "B T"]:
    """max(gain, bound A) if A < 0, else gain: a floor for large ratios (Ye et al. 2020, arXiv 1912.09729, eq. 5)."""
    return torch.where(advantage < 0, torch.maximum(gain, bound * advantage), gain)


def penalized_surrogate(
    gain: Float[Tensor, "B T"], divergence: Float[Tensor, "B #T"], beta: float | Tensor
) -> Float[Tensor, "B T"]:
    """gain - beta KL (Schulman et al. 2017, eq. 8), for any surrogate gain and any estimate of the KL."""
    return gain - beta * divergence


def imitated(
    gain: Float[Tensor, "B T"], logp: Float[Tensor, "B T"], coefficient: Float[Tensor, "B T"] | tuple[()]
) -> Float[Tensor, "B T"]:
    """gain + c log pi: the decision itself is imitated, whatever its advantage (see credit.imitating); (): c = 0."""
    return gain + coefficient * logp if isinstance(coefficient, Tensor) else gain


def clipped_weight(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B #T"],
    advantage: Float[Tensor, "B T"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "B T"]:
    """sg(clip(r, 1 - low, 1 + high)) A log pi: clips the weight but keeps the gradient (CISPO, arXiv 2506.13585)."""
    return ratio.clamp(1 - low, 1 + high).detach() * advantage * logp


def sigmoid_gate(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B #T"],
    advantage: Float[Tensor, "B T"],
    *,
    positive: float,
    negative: float,
) -> Float[Tensor, "B T"]:
    """(4 / tau) sigmoid(tau (r - 1)) A, with tau = positive where A > 0, else negative (SAPO, arXiv 2511.20347).

    A soft clip: its slope in r is A at r = 1 and falls to 0 on both sides, faster for a larger temperature tau.
    """
    tau = torch.where(advantage > 0, positive, negative)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage


def gamma_weight(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B #T"],
    advantage: Float[Tensor, "B T"],
    *,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Float[Tensor, "B T"]:
    """sg(W^k exp(c (1 - W))) A log pi, with (k, c) = positive where A > 0, else negative.

    VESPO (Shen et al. 2026, arXiv 2602.10693, eq. 20). The weight is 1 at W = 1, has the form of a gamma density, and
    vanishes for W near 0 and for large W. W is the ratio of whole rows (score.product_ratio).
    """
    power, rate = (torch.where(advantage > 0, p, n) for p, n in zip(positive, negative, strict=True))
    return (ratio**power * (rate * (1 - ratio)).exp()).detach() * advantage * logp


Filter = Callable[[Any, Batch, Tensor], Tensor]


def within_divergence(
    distribution: Any, batch: Batch, logp: Float[Tensor, "B T"], *, divergence: Callable[..., Tensor], bound: float
) -> Bool[Tensor, "B T"]:
    """Not (D > bound, and pi moved away from pi_old as the advantage favors) (DPPO, arXiv 2602.04879).

    D is the divergence of the two policies at the decision: divergence(distribution, batch, logp), such as
    divergences.binary_total_variation. PPO's clip asks for the ratio instead, which says little of a rare action.
    """
    further = ((logp > batch.logp) & (batch.advantage > 0)) | ((logp < batch.logp) & (batch.advantage < 0))
    return ~(further & (divergence(distribution, batch, logp) > bound))


def without_drifted(
    distribution: Any, batch: Batch, logp: Float[Tensor, "B T"], *, bound: float
) -> Bool[Tensor, "B T"]:
    """Not (A < 0, and the row's mean of log(pi_old / pi) > bound) (DeepSeek-V3.2, arXiv 2512.02556).

    Bad rows that the policy would hardly sample any more teach it nothing.
    """
    drift = -sequence_ratio(logp, batch.logp, batch.mask).log()
    return (batch.advantage >= 0) | (drift <= bound)


def squared_error(value: Float[Tensor, "B T"], target: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(V - target)^2, the critic's loss."""
    return (value - target) ** 2


def clipped_squared_error(
    value: Float[Tensor, "B T"],
    target: Float[Tensor, "B T"],
    value_old: Float[Tensor, "B T"],
    clip: float,
) -> Float[Tensor, "B T"]:
    """max((V - target)^2, (V_old + clip(V - V_old, -clip, clip) - target)^2): PPO2's value clipping.

    This is the form in OpenAI baselines. It depends on the scale of the rewards, and experiments found no benefit
    (Andrychowicz et al. 2021, arXiv 2006.05990, section 3.3). clip = inf is the squared error.
    """
    near = value_old + (value - value_old).clamp(-clip, clip)
    return torch.maximum((value - target) ** 2, (near - target) ** 2)
