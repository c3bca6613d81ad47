"""What a method expects, from its options and the tables of a world, written out a second time.

Only the options are shared with the library: no function of it is called here. Sums over time are products with a
matrix, ratios come from the tables of probabilities, gradients from the table of scores. A row is one whole episode
without holes, at whose end nothing is left; a batch is rows of one group.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from policygrad.train.methods import METHODS
from policygrad.verify.settings import Setting
from policygrad.verify.statistics import Experience


class NoClosedForm(Exception):
    """An option has a value that is not written out here."""


def expectation(
    options: Any,
    at: Setting,
    experience: Experience,
    size: int,
    value: Float[Tensor, " S"],
    *,
    off_policy: bool,
    together: bool = False,
) -> Float[Tensor, " N"]:
    """The gradient that the method expects on batches of `size` rows, with a critic of these values.

    off_policy: the old policy sampled. together: all batches are one rollout, over which advantages are standardized.
    Raises NoClosedForm.
    """
    rollout = experience.rollout
    index, probability = experience.batches(size)
    states, mask = at.states(rollout), rollout.mask
    sampled = at.probs_old if off_policy else at.probs
    ratio = (at.probs / sampled)[states, rollout.action].where(mask, 1.0)
    at_states = value[states].where(mask, 0.0)
    advantage = _advantage(options, rollout.reward, mask, ratio, at_states, index, together)
    if options.normalize_advantages == "batch":
        advantage = _standardized(advantage, mask[index], together)
    if getattr(options, "discounted", False):
        advantage = advantage * options.gamma ** torch.arange(mask.shape[1])
    if options.normalize_advantages == "minibatch" and together:  # the loop's part
        advantage = _standardized(advantage, mask[index], together)
    slope = _slope(options, advantage, ratio[index], mask[index], _weight(options, mask[index]))
    taken = (probability[:, None, None] * slope).where(mask[index], 0.0).flatten(0, 1)
    each = torch.zeros_like(rollout.reward).index_add(0, index.flatten(), taken)
    return torch.einsum("bt,btn->n", each, at.scores[states, rollout.action])


def _advantage(
    o: Any, reward: Tensor, mask: Tensor, ratio: Tensor, value: Tensor, index: Tensor, together: bool
) -> Tensor:
    """[K, size, T]."""
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)  # nothing is left at the end
    delta = (reward + o.gamma * after - value).where(mask, 0.0)
    match o.credit:
        case "group":
            return _grouped(o, reward.sum(1)[index]).unsqueeze(-1).expand(*index.shape, reward.shape[1])
        case "reward_to_go" | "trajectory_return":
            returns = _onward(reward, o.gamma)
            returns = returns[:, :1].expand_as(reward) if o.credit == "trajectory_return" else returns
            seen = returns[index].where(mask[index], 0.0)
            return returns[index] - _baseline(o, seen, mask[index], value[index], together)
        case "gae":
            return _onward(delta, o.gamma * o.lam)[index]
        case "monte_carlo":
            return _onward(delta, o.gamma)[index]
        case "n_step":
            return _onward(delta, o.gamma, o.n)[index]
        case "vtrace":
            rho, c, total = ratio.clamp(max=o.rho_bar), o.lam * ratio.clamp(max=o.c_bar), torch.zeros_like(delta)
            for t in range(delta.shape[1]):
                for u in range(t, delta.shape[1]):  # what the error at u corrects the value at t by
                    total[:, t] += o.gamma ** (u - t) * c[:, t:u].prod(1) * rho[:, u] * delta[:, u]
            following = torch.cat([total[:, 1:], torch.zeros_like(total[:, :1])], 1)
            return (rho * (delta + o.gamma * following))[index]
    raise NoClosedForm


def _onward(x: Tensor, decay: float, most: int | None = None) -> Tensor:
    """sum_{k < most} decay^k x_{t+k}."""
    t = torch.arange(x.shape[1])
    ahead = t.unsqueeze(0) - t.unsqueeze(1)
    kept = (ahead >= 0) & (ahead < (most or len(t)))
    return x @ (decay ** ahead.clamp(min=0).to(x.dtype)).where(kept, 0.0).T


def _grouped(o: Any, returns: Tensor) -> Tensor:
    total, n = returns.sum(1, keepdim=True), returns.shape[1]
    if o.group_baseline not in ("mean", "leave_one_out") or o.group_scale not in ("std", "none"):
        raise NoClosedForm
    centered = returns - (total / n if o.group_baseline == "mean" else (total - returns) / (n - 1))
    spread = (returns - total / n).square().sum(1, keepdim=True).div(n - 1).sqrt()
    return (centered / spread).where(spread > 1e-12, 0.0) if o.group_scale == "std" else centered


def _baseline(o: Any, returns: Tensor, mask: Tensor, value: Tensor, together: bool) -> Tensor:
    """The means are over the other rows of the batch, or of all batches together."""

    def others(x: Tensor) -> Tensor:
        return x.sum((0, 1) if together else 1, keepdim=True) - x

    match o.baseline:
        case "none":
            return torch.zeros_like(returns)
        case "value":
            return value
        case "mean":
            return others(returns.sum(2, keepdim=True)) / others(mask.sum(2, keepdim=True))
        case "time_mean":
            return others(returns) / others(mask.long()).clamp(min=1)
    raise NoClosedForm


def _standardized(x: Tensor, mask: Tensor, together: bool) -> Tensor:
    """Over the decisions of each batch, or of all batches together."""
    over = (0, 1, 2) if together else (1, 2)
    count = mask.sum(over, keepdim=True)
    centered = x - x.where(mask, 0.0).sum(over, keepdim=True) / count
    std = centered.square().where(mask, 0.0).sum(over, keepdim=True).div((count - 1).clamp(min=1)).sqrt()
    return (centered / std).where(std > 1e-9, 0.0)


def _weight(o: Any, mask: Tensor) -> Tensor:
    rows, steps = mask.shape[1:]
    match o.weights:
        case "token":
            return mask / mask.sum((1, 2), keepdim=True)
        case "row":
            return mask / mask.sum(2, keepdim=True) / rows
        case "episode":
            return mask / rows
        case "budget":
            return mask / (rows * steps)
    raise NoClosedForm


def _slope(o: Any, advantage: Tensor, ratio: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """The objective's derivative in each decision's log-probability."""
    if o.kl_ref != "none" or getattr(o, "entropy_coefficient", 0):
        raise NoClosedForm
    named, gain, by = METHODS[o.method].objective, getattr(o, "gain", "surrogate"), getattr(o, "ratio", "token")
    if named in ("reinforce", "actor_critic"):
        return weight * advantage
    if gain not in ("surrogate", "weight") or by not in ("token", "sequence"):
        raise NoClosedForm
    length = mask.sum(2, keepdim=True)
    r = ratio if by == "token" else ratio.prod(2, keepdim=True) ** (1 / length)
    low, high = (1 - o.clip_low, 1 + o.clip_high) if named in ("ppo", "grpo") else (-torch.inf, torch.inf)
    if gain == "weight":
        return weight * r.clamp(low, high) * advantage
    stopped = ((advantage > 0) & (r > high)) | (
        (advantage < 0) & ((r < low) | (r > getattr(o, "dual_clip", torch.inf)))
    )
    found = weight * (r * advantage).where(~stopped, 0.0)
    if by == "sequence":
        found = (found.sum(2, keepdim=True) / length).expand_as(weight)
    return found - getattr(o, "kl_old_coefficient", 0.0) * weight * (ratio - 1)
