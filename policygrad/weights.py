"""How decisions are averaged: mask -> weights. `average` takes every mean over a batch.

B counts the rows with a decision: a row that is masked whole changes no mean. Sums over the mask are over that of all
ranks, so that what each of them averages adds up to the mean (ranks.sum).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from policygrad import ranks
from policygrad.ranks import Steps, added


@ranks.collective
def per_token(mask: Bool[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """w = m / sum(m): all decisions of the batch count equally (DAPO, arXiv 2503.14476, eq. 8; usual in control)."""
    m = mask.to(torch.get_default_dtype())
    return m / added((yield m.sum())).clamp(min=1)


@ranks.collective
def per_row(mask: Bool[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """w_i = m_i / |m_i| / B: mean over rows of each row's mean over its decisions (GRPO, arXiv 2402.03300, eq. 3)."""
    return normalize(mask.to(torch.get_default_dtype()), p=1.0, dim=1) / _rows((yield mask.any(1).sum()))


@ranks.collective
def per_episode(mask: Bool[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """w = m / B: mean over rows of each row's SUM over its decisions; each row is an episode.

    This is the weighting of the policy-gradient theorem, grad J = E[sum_t grad log pi A_t] (Sutton et al. 2000,
    theorem 1).
    """
    return mask.to(torch.get_default_dtype()) / _rows((yield mask.any(1).sum()))


@ranks.collective
def per_budget(mask: Bool[Tensor, "B T"], limit: int | None = None) -> Steps[Float[Tensor, "B T"]]:
    """w = m / (B limit): constant, with `limit` the most decisions that a row may have (Dr. GRPO, arXiv 2503.20783).

    None: T. Rows of whole episodes in control are only as long as the longest episode: give the limit of an episode.
    """
    rows, steps = zip(*(yield mask.any(1).sum(), mask.shape[1]), strict=True)
    return mask.to(torch.get_default_dtype()) / (_rows(rows) * (limit or max(steps)))


def normalized(weight: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """w / sum(w): weights that sum to 1, or to 0 if nothing counts. The sum is over these alone, not over ranks."""
    return weight / weight.sum().clamp(min=1e-12)


def average(x: Float[Tensor, "B T"], weight: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
    """sum_bt w_bt x_bt over the entries with w_bt != 0: other entries (even NaN) have no effect."""
    return (weight * x).where(weight != 0, 0.0).sum()


def _rows(seen: Sequence[Tensor]) -> Int[Tensor, ""]:
    """The number of rows with a decision of all ranks, or 1 if there are none."""
    return added(seen).clamp(min=1)
