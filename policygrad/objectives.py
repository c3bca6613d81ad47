"""Pointwise objectives. weights.py averages them, and `ascend` sets the sign.

A gain is (logp, ratio, advantage) -> [B, T]; it may ignore some of the three. The gains are `surrogate`,
`clipped_surrogate`, `clipped_weight`, and `score.score`. The ratio is [B, T] by token, or [B, 1] by sequence.
"""

import torch
from jaxtyping import Float
from torch import Tensor


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
    gain: Float[Tensor, "B T"], divergence: Float[Tensor, "B T"], beta: float | Tensor
) -> Float[Tensor, "B T"]:
    """gain - beta KL (Schulman et al. 2017, eq. 8), for any surrogate gain and any estimate of the KL."""
    return gain - beta * divergence


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
