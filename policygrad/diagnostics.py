"""Diagnostics of training. Nothing here has a gradient."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from policygrad import ranks
from policygrad.divergences import k3
from policygrad.ranks import Steps, added, averaged, merged
from policygrad.rollout import Batch, Split
from policygrad.score import log_probabilities, log_ratio
from policygrad.weights import average, normalized


@torch.no_grad()
def ratio_metrics(
    logp: Float[Tensor, "B T"],
    logp_old: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    weight: Float[Tensor, "B T"],
) -> dict[str, Tensor]:
    """The distance from the old policy to the new one, on the old policy's decisions.

    kl_old: KL(old, new), estimated by k3. effective_sample_size: (sum w r)^2 / (sum w)(sum w r^2), a share in (0, 1]
    (Kong 1992).
    """
    return _of_means(*_ratio_means(logp, logp_old, mask, normalized(weight)))


def _ratio_means(logp: Tensor, logp_old: Tensor, mask: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The means of k3, of the ratio and of its square."""
    # Use the log-ratio itself: log(ratio) is infinite if the ratio underflows to 0.
    difference = log_ratio(logp, logp_old, mask)
    ratio = difference.exp()
    kl_old = average(k3(torch.zeros_like(difference), difference), share)
    return kl_old, average(ratio, share), average(ratio**2, share)


def _of_means(kl_old: Tensor, mean: Tensor, square: Tensor) -> dict[str, Tensor]:
    """ratio_metrics, of its means."""
    return {"kl_old": kl_old, "effective_sample_size": mean**2 / square.clamp(min=1e-30)}


@ranks.collective
def after_update(objective: Any, batch: Batch, *, micro_batch: Split = None) -> Steps[dict[str, Tensor]]:
    """The size of an update: ratio_metrics of the current policy against the policy that sampled the batch.

    With a critic, also the explained_variance of its predictions before the update. Costs one forward pass of the
    policy, `micro_batch` rows at a time. Over the decisions of all ranks.
    """
    logp = log_probabilities(objective.policy, batch, micro_batch)
    asked: list[Steps[Any]] = [_ratio_metrics(logp, batch)]
    if getattr(objective, "critic", None) is not None:
        asked.append(ranks.begun(explained_variance, batch.value, batch.target, batch.weight))
    metrics, *explained = yield from ranks.joined(*asked)
    return metrics | dict(zip(["explained_variance"], explained, strict=False))


def _ratio_metrics(logp: Tensor, batch: Batch) -> Steps[dict[str, Tensor]]:
    """ratio_metrics over the decisions of all ranks."""
    with torch.no_grad():
        means = torch.stack(_ratio_means(logp, batch.logp, batch.mask, normalized(batch.weight)))
    weights, seen = zip(*(yield batch.weight.sum(), means), strict=True)
    return _of_means(*averaged(weights, seen))


@torch.no_grad()
def clip_fraction(
    ratio: Float[Tensor, "B #T"], weight: Float[Tensor, "B T"], low: float, high: float
) -> Float[Tensor, ""]:
    """The share of decisions with a ratio outside [1 - low, 1 + high]."""
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
    """The shares of decisions whose gradient is clipped away: A < 0 below 1 - low, and A > 0 above 1 + high."""
    share = normalized(weight)
    below = (ratio < 1 - low) & (advantage < 0)
    above = (ratio > 1 + high) & (advantage > 0)
    return {
        "clip_fraction_low": average(below.to(share.dtype), share),
        "clip_fraction_high": average(above.to(share.dtype), share),
    }


@ranks.collective
def explained_variance(
    value: Float[Tensor, "B T"], target: Float[Tensor, "B T"], weight: Float[Tensor, "B T"]
) -> Steps[Float[Tensor, ""]]:
    """1 - Var[target - V] / Var[target]: 1 for a perfect critic, 0 for a constant one.

    Also 0 where all targets are equal up to rounding. Over the decisions of all ranks.
    """
    value, target, weight = value.detach(), target.detach(), weight.detach()
    largest, share = target.abs().where(weight != 0, 0.0).amax(), normalized(weight)
    first = target.flatten()[share.argmax()]
    target, value = target - first, value - first  # one target from all: equal targets become exactly 0
    both = [target, target - value]
    means = [average(x, share) for x in both]
    squares = [average((x - mean) ** 2, share) for x, mean in zip(both, means, strict=True)]
    told = torch.stack([weight.sum(), largest, first, *means, *squares])
    weights, sizes, firsts, targets, errors, spreads, lefts = torch.stack((yield told), 1)
    shares, counts = weights / added(weights.unbind()).clamp(min=1e-12), weights != 0
    apart = torch.where(counts, firsts - firsts[counts.int().argmax()], 0.0)  # from the first that counts anywhere
    spread, left = (
        merged(shares.unbind(), mean.unbind(), (shares * square).unbind())[1]
        for mean, square in ((targets + apart, spreads), (errors, lefts))
    )
    rounding = 2 * torch.finfo(target.dtype).eps * sizes.amax()
    return torch.where(spread.sqrt() <= rounding, 0.0, 1 - left / spread)


def mean_metrics(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each metric over an update's minibatches, without those that were dropped, which have no metrics."""
    rows = [row for row in rows if row]
    return {name: torch.stack([row[name] for row in rows]).mean() for name in (rows[0] if rows else ())}
