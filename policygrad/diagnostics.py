"""What a practitioner looks at while it learns. Nothing here has a gradient."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from policygrad.advantages import group_std
from policygrad.divergences import k3
from policygrad.rollout import Batch
from policygrad.score import log_ratio
from policygrad.weights import average, normalized


@torch.no_grad()
def ratio_metrics(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"],
) -> dict[str, Tensor]:
    """How far the new policy is from the old one, on the old one's decisions.

    kl: KL(old, new), estimated by k3. effective_sample_size: (sum w r)^2 / (sum w)(sum w r^2), a share in (0, 1]
    (Kong 1992).
    """
    share = normalized(weight)
    # Of the logarithm, not log(exp(it)): that is infinite where a ratio is too small for a float.
    difference = log_ratio(logp, logp_old, mask)
    ratio = difference.exp()
    return {
        "kl": average(k3(torch.zeros_like(difference), difference), share),
        "effective_sample_size": average(ratio, share) ** 2 / average(ratio**2, share).clamp(min=1e-30),
    }


def policy_change(policy: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """ratio_metrics of the policy as it is now, after an update, against the one that sampled the batch."""
    with torch.no_grad():
        logp = policy(batch.obs).log_prob(batch.action)
    return ratio_metrics(logp, batch.logp, batch.mask, batch.weight)


@torch.no_grad()
def clip_fraction(
    ratio: Float[Tensor, "B #T"], weight: Float[Tensor, "B T"], low: float, high: float
) -> Float[Tensor, ""]:
    """The share of decisions whose ratio is outside [1 - low, 1 + high]."""
    outside = ((ratio < 1 - low) | (ratio > 1 + high)).to(ratio.dtype)
    return average(outside.expand_as(weight), normalized(weight))


@torch.no_grad()
def clip_fraction_by_side(
    ratio: Float[Tensor, "B #T"],
    advantage: Float[Tensor, "B T"],
    weight: Float[Tensor, "B T"],
    low: float,
    high: float,
) -> dict[str, Tensor]:
    """The shares of decisions that clipping leaves without gradient: bad below 1 - low, good above 1 + high."""
    share = normalized(weight)
    below = (ratio < 1 - low) & (advantage < 0)
    above = (ratio > 1 + high) & (advantage > 0)
    return {
        "clip_fraction_low": average(below.to(share.dtype), share),
        "clip_fraction_high": average(above.to(share.dtype), share),
    }


@torch.no_grad()
def group_metrics(score: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> dict[str, Tensor]:
    """The spread of rewards inside a group, and the share of rows whose group is flat: they teach nothing.

    Rows alone in their group are left out; without any others there is nothing to say.
    """
    compared = (group.unsqueeze(1) == group).sum(1) > 1
    std = group_std(score, group)[compared]
    return {"group_std": std.mean(), "flat_groups": (std == 0).to(std.dtype).mean()} if len(std) else {}


@torch.no_grad()
def explained_variance(
    value: Float[Tensor, "B T"], target: Float[Tensor, "B T"], weight: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """1 - Var[target - V] / Var[target]: 1 for a perfect critic, 0 for a constant (or equal targets)."""
    share = normalized(weight)
    first = share.argmax()  # measured from one of them, equal targets are equal to 0 to the last bit
    target, value = target - target.flatten()[first], value - target.flatten()[first]

    def variance(x: Tensor) -> Tensor:
        return average((x - average(x, share)) ** 2, share)

    spread = variance(target)
    return torch.where(spread > 0, 1 - variance(target - value) / spread, 0.0)


def mean_metrics(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over the minibatches of an update."""
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
