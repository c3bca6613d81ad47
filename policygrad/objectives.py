"""What is maximized, pointwise. Averaging is separate (weights.py), and the sign is `ascend`'s.

A gain is (logp, ratio, advantage) -> [B, T], whichever of the three it reads: `surrogate`, `clipped_surrogate`,
`clipped_weight`, and `score.score`. The ratio is [B, T] by token, or [B, 1] by sequence.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def surrogate(
    logp: Float[Tensor, "B T"], ratio: Float[Tensor, "B #T"], advantage: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """r A: the importance-sampled improvement over the old policy (Schulman et al. 2015, eq. 14).

    At the old policy its gradient is the score term's.
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

    A lower bound of the surrogate, without gradient where the ratio has left the interval in the direction that the
    advantage rewards. low = high = inf clips nothing.
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def dual_clip(gain: Float[Tensor, "B T"], advantage: Float[Tensor, "B T"], bound: float) -> Float[Tensor, "B T"]:
    """max(gain, bound A) where A < 0: a floor for ratios far above 1 (Ye et al. 2020, arXiv 1912.09729, eq. 5)."""
    return torch.where(advantage < 0, torch.maximum(gain, bound * advantage), gain)


def penalized_surrogate(
    gain: Float[Tensor, "B T"], divergence: Float[Tensor, "B T"], beta: float | Tensor
) -> Float[Tensor, "B T"]:
    """gain - beta KL (Schulman et al. 2017, eq. 8), with any surrogate as the gain and any estimate of the KL."""
    return gain - beta * divergence


def clipped_weight(
    logp: Float[Tensor, "B T"],
    ratio: Float[Tensor, "B #T"],
    advantage: Float[Tensor, "B T"],
    *,
    low: float,
    high: float,
) -> Float[Tensor, "B T"]:
    """sg(clip(r, 1 - low, 1 + high)) A log pi: clips the weight, keeps the gradient (CISPO, arXiv 2506.13585)."""
    return ratio.clamp(1 - low, 1 + high).detach() * advantage * logp


def squared_error(value: Float[Tensor, "B T"], target: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(V - target)^2: what a critic minimizes."""
    return (value - target) ** 2


def clipped_squared_error(
    value: Float[Tensor, "B T"],
    target: Float[Tensor, "B T"],
    value_old: Float[Tensor, "B T"],
    clip: float,
) -> Float[Tensor, "B T"]:
    """max((V - target)^2, (V_old + clip(V - V_old, -clip, clip) - target)^2): PPO2's value clipping.

    Of the three forms in use, OpenAI baselines'. It depends on the rewards' scale and has not been seen to help
    (Andrychowicz et al. 2021, arXiv 2006.05990, section 3.3). clip = inf is the squared error.
    """
    near = value_old + (value - value_old).clamp(-clip, clip)
    return torch.maximum((value - target) ** 2, (near - target) ** 2)
