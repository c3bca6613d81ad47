"""How decisions are averaged: mask -> weights. Every mean over a batch is taken by `average`, and only there."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize


def per_token(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """w = m / sum(m): every decision of the batch counts the same (DAPO, arXiv 2503.14476, eq. 8; all of control)."""
    m = mask.to(torch.get_default_dtype())
    return m / m.sum().clamp(min=1)


def per_row(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """w_i = m_i / |m_i| / B: mean over rows of the mean over the row's decisions (GRPO, arXiv 2402.03300, eq. 3)."""
    return normalize(mask.to(torch.get_default_dtype()), p=1.0, dim=1) / mask.shape[0]


def per_episode(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """w = m / B: mean over rows of the SUM over the row's decisions, each row an episode.

    The weighting of the policy-gradient theorem, grad J = E[sum_t grad log pi A_t] (Sutton et al. 2000, theorem 1).
    """
    return mask.to(torch.get_default_dtype()) / mask.shape[0]


def per_budget(mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """w = m / (B T): a constant, T being the most decisions that a row may have (Dr. GRPO, arXiv 2503.20783)."""
    return mask.to(torch.get_default_dtype()) / mask.numel()


def normalized(weight: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """w / sum(w): weights that add up to 1, or to 0 where nothing counts."""
    return weight / weight.sum().clamp(min=1e-12)


def average(x: Float[Tensor, "B T"], weight: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
    """sum_bt w_bt x_bt, where w is not 0: what stands elsewhere (NaN too) changes nothing."""
    return (weight * x).where(weight != 0, 0.0).sum()
