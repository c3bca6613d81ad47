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
    other = _energy(at, rollout), rollout.greedy
    advantage = _advantage(options, rollout.reward, mask, ratio, at_states, index, together, *other)
    if options.normalize_advantages == "batch":
        advantage = _standardized(advantage, mask[index], together)
    covaries = _covariance(advantage, sampled.log()[states, rollout.action][index], mask[index], together)
    charge = _charge(options, covaries, mask[index], together)
    match getattr(options, "learn_from", "all"):
        case "high_entropy":
            advantage = advantage.where(_uncertain(options, at.probs[states][index], mask[index], together), 0.0)
        case "low_covariance":
            advantage = advantage * _undrawn(options, covaries, mask[index], together)
    if getattr(options, "discounted", False):
        advantage = advantage * options.gamma ** torch.arange(mask.shape[1])
    if options.normalize_advantages == "minibatch" and together:  # the loop's part
        advantage = _standardized(advantage, mask[index], together)
    new, old = at.probs[states][index], sampled[states][index]
    kept = _kept(options, advantage, ratio[index], mask[index], new, old, rollout.action[index])
    slope = _slope(options, advantage, ratio[index], mask[index], _weight(options, mask[index]), kept, charge)
    taken = (probability[:, None, None] * slope).where(mask[index], 0.0).flatten(0, 1)
    each = torch.zeros_like(rollout.reward).index_add(0, index.flatten(), taken)
    return torch.einsum("bt,btn->n", each, at.scores[states, rollout.action])


def corrected(
    at: Setting, size: int, level: str, low: float, bound: float, drop: bool, normalized: bool = False
) -> Float[Tensor, " N"]:
    """What leave-one-out credit expects of an engine's completions, weighed by pi / engine within [low, bound].

    The engine is the setting's old policy. Each completion is summed over its tokens. normalized: over the mean weight
    of the batch's tokens.
    """
    rollout = at.off_policy.rollout
    index, probability = at.off_policy.batches(size)
    states, mask = at.states(rollout), rollout.mask
    each = (at.probs / at.probs_old)[states, rollout.action].where(mask, 1.0)
    whole = each.prod(1, keepdim=True)
    weight = {"token": each, "product": whole, "sequence": whole ** (1 / mask.sum(1, keepdim=True))}[level]
    weight = weight.where((weight >= low) & (weight <= bound), 0.0) if drop else weight.clamp(low, bound)
    returns = rollout.reward.sum(1)[index]
    advantage = returns - (returns.sum(1, keepdim=True) - returns) / (size - 1)
    taken, counted = weight.expand_as(each)[index], mask[index]
    if normalized:
        taken = taken * counted.sum((1, 2), keepdim=True) / taken.where(counted, 0.0).sum((1, 2), keepdim=True)
    slope = (taken * advantage.unsqueeze(-1) / size).where(counted, 0.0)
    return torch.einsum("k,kbt,kbtn->n", probability, slope, at.scores[states, rollout.action][index])


def _advantage(
    o: Any,
    reward: Tensor,
    mask: Tensor,
    ratio: Tensor,
    value: Tensor,
    index: Tensor,
    together: bool,
    energy: Tensor,
    greedy: Tensor | None,
) -> Tensor:
    """[K, size, T]."""
    after = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)  # nothing is left at the end
    delta = (reward + o.gamma * after - value).where(mask, 0.0)
    match o.credit:
        case "group":
            return _grouped(o, reward.sum(1)[index], together).unsqueeze(-1).expand(*index.shape, reward.shape[1])
        case "reward_to_go" | "trajectory_return":
            returns = _onward(reward, o.gamma)
            returns = returns[:, :1].expand_as(reward) if o.credit == "trajectory_return" else returns
            seen = returns[index].where(mask[index], 0.0)
            if o.baseline == "greedy" and greedy is not None:
                return returns[index] - greedy[index].unsqueeze(2)
            return returns[index] - _baseline(o, seen, mask[index], value[index], together, energy[index])
        case "gae":
            if getattr(o, "length_adaptive_lam", None) is not None:
                lam = (1 - 1 / (o.length_adaptive_lam * mask.sum(1))).clamp(min=0).tolist()
                rows = [_onward(delta[i : i + 1], o.gamma * x) for i, x in enumerate(lam)]
                return torch.cat(rows)[index]
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


def _grouped(o: Any, returns: Tensor, together: bool) -> Tensor:
    total, n = returns.sum(1, keepdim=True), returns.shape[1]
    match o.group_baseline:
        case "mean":
            centered = returns - total / n
        case "leave_one_out":
            centered = returns - (total - returns) / (n - 1)
        case "other_best":
            rest = torch.stack([returns[:, [j for j in range(n) if j != i]].amax(1) for i in range(n)], 1)
            centered = returns.amax(1, keepdim=True) - rest
        case _:
            raise NoClosedForm
    match o.group_scale:
        case "none":
            return centered
        case "std":
            scale = (returns - total / n).square().sum(1, keepdim=True).div(n - 1).sqrt()
        case "mean":
            scale = total / n
        case "batch":
            scale = returns.std() if together else returns.std(1, keepdim=True)
        case _:
            raise NoClosedForm
    return (centered / scale).where(scale > 1e-12, 0.0)


def _energy(at: Setting, rollout: Any) -> Tensor:
    """|grad log pi(a|s)|^2 in the logits, e_a - pi, summed over the row so far."""
    probs = at.probs[at.states(rollout)]
    chosen = torch.nn.functional.one_hot(rollout.action, probs.shape[-1])
    return (chosen - probs).square().sum(-1).where(rollout.mask, 0.0).cumsum(1)


def _uncertain(o: Any, probs: Tensor, mask: Tensor, together: bool) -> Tensor:
    """Whether at most share - 1 of the batch's decisions (or of all) have more entropy."""
    entropy = -(probs * probs.log()).sum(-1)
    flat, counted = (x.reshape(1, -1) if together else x.flatten(1) for x in (entropy, mask))
    above = torch.stack(
        [((e.unsqueeze(0) > e.unsqueeze(1) + 1e-12) & m).sum(1) for e, m in zip(flat, counted, strict=True)]
    )
    return (above < o.learn_from_share * counted.sum(1, keepdim=True)).view(mask.shape) & mask


def _covariance(advantage: Tensor, logp: Tensor, mask: Tensor, together: bool) -> Tensor:
    """Of each decision, from the means over those of its batch, or of all batches together."""
    over = (0, 1, 2) if together else (1, 2)
    count = mask.sum(over, keepdim=True)
    a, p = (x - x.where(mask, 0.0).sum(over, keepdim=True) / count for x in (advantage, logp))
    return a * p


def _undrawn(o: Any, found: Tensor, mask: Tensor, together: bool) -> Tensor:
    """The probability that a decision is not among those drawn, whose number is a share of all, but at least 1."""
    over = (0, 1, 2) if together else (1, 2)
    within = mask & (found > o.covariance_low) & (found < o.covariance_high)
    drawn = (o.covariance_share * mask.sum(over, keepdim=True)).long().clamp(min=1)
    chance = (drawn / within.sum(over, keepdim=True)).clamp(max=1.0)
    return (1 - chance).expand_as(found).where(within, 1.0)


def _charge(o: Any, found: Tensor, mask: Tensor, together: bool) -> Tensor:
    """1 at the share of decisions, at least 1, than which fewer have a larger covariance."""
    if getattr(o, "kl_old_share", 1.0) == 1:
        return mask.to(found.dtype)
    flat, counted = (x.reshape(1, -1) if together else x.flatten(1) for x in (found, mask))
    above = torch.stack(
        [((x.unsqueeze(0) > x.unsqueeze(1) + 1e-12) & m).sum(1) for x, m in zip(flat, counted, strict=True)]
    )
    number = (o.kl_old_share * counted.sum(1, keepdim=True)).long().clamp(min=1)
    return ((above < number).view(mask.shape) & mask).to(found.dtype)


def _kept(o: Any, advantage: Tensor, ratio: Tensor, mask: Tensor, new: Tensor, old: Tensor, action: Tensor) -> Tensor:
    """Which decisions the objective learns from; new, old: the probabilities of all actions."""
    kept = torch.ones_like(mask)
    p, q = (x.gather(-1, action.unsqueeze(-1)).squeeze(-1) for x in (new, old))
    match getattr(o, "divergence_mask", "none"):
        case "binary_tv":
            far = (p - q).abs()
        case "binary_kl":
            far = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        case "tv":
            far = (new - old).abs().sum(-1) / 2
        case "kl":
            far = (old * (old / new).log()).sum(-1)
        case _:
            far = torch.zeros_like(p)
    kept &= ~((far > getattr(o, "divergence_bound", torch.inf)) & (advantage * (p - q) > 0))
    drift = -ratio.log().sum(2, keepdim=True) / mask.sum(2, keepdim=True)
    return kept & ~((advantage < 0) & (drift > getattr(o, "drift_bound", torch.inf)))


def _baseline(o: Any, returns: Tensor, mask: Tensor, value: Tensor, together: bool, energy: Tensor) -> Tensor:
    """The means are over the other rows of the batch, or of all batches together; or over the rows of the group."""

    def others(x: Tensor) -> Tensor:
        return x.sum((0, 1) if together else 1, keepdim=True) - x

    match o.baseline:
        case "none":
            return torch.zeros_like(returns)
        case "value":
            return value
        case "start_value":
            return value[..., :1].expand_as(returns)
        case "mean":
            return others(returns.sum(2, keepdim=True)) / others(mask.sum(2, keepdim=True))
        case "time_mean":
            return others(returns) / others(mask.long()).clamp(min=1)
        case "length_weighted":
            return (returns.sum((1, 2), keepdim=True) / mask.sum((1, 2), keepdim=True)).expand_as(returns)
        case "token":
            weight = energy.where(mask, 0.0)
            mean = (weight * returns).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
            return mean.where(mask.sum(1, keepdim=True) > 1, 0.0).expand_as(returns)
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


def _slope(
    o: Any, advantage: Tensor, ratio: Tensor, mask: Tensor, weight: Tensor, kept: Tensor, charge: Tensor
) -> Tensor:
    """The objective's derivative in each decision's log-probability."""
    if o.kl_ref != "none" or getattr(o, "entropy_coefficient", 0):
        raise NoClosedForm
    named = METHODS[o.method].objective
    if named in ("reinforce", "actor_critic"):
        return weight * advantage
    length = mask.sum(2, keepdim=True)
    log_ratio, bound = ratio.log(), getattr(o, "token_clip", torch.inf)
    beyond = advantage.sign() * log_ratio > bound  # tokens that are stopped before ratios are averaged
    total = log_ratio.where(~beyond, advantage.sign() * bound if bound < torch.inf else 0.0).sum(2, keepdim=True)
    by = getattr(o, "ratio", "token")
    if by not in ("token", "sequence", "sequence_token", "product"):
        raise NoClosedForm
    r = {"token": ratio, "product": total.exp()}.get(by, (total / length).exp())
    own, through = _derivative(o, named, r, advantage)
    found, reached = weight * (own * kept), weight * (through * kept)
    if by in ("sequence", "product"):
        reached = (reached.sum(2, keepdim=True) / (length if by == "sequence" else 1)).expand_as(weight)
    found = found + reached.where(~beyond, 0.0)
    beta = getattr(o, "kl_old_coefficient", 0.0)
    if getattr(o, "kl_old_estimate", "k3") == "absolute":
        return found - beta * weight * charge * log_ratio.sign() * (log_ratio.abs() > 1e-12)
    if getattr(o, "kl_old_estimate", "k3") == "squared_row":
        return found - beta * weight.sum(2, keepdim=True) * log_ratio.sum(2, keepdim=True) / length
    return found - beta * weight * charge * (ratio - 1)


def _derivative(o: Any, named: str, r: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """The gain's derivatives in log pi itself, and in the logarithm of the ratio."""
    gain, none = getattr(o, "gain", "surrogate"), torch.zeros_like(advantage)
    low, high = (1 - o.clip_low, 1 + o.clip_high) if named in ("ppo", "grpo") else (-torch.inf, torch.inf)
    floor = getattr(o, "dual_clip", torch.inf)
    if gain != "surrogate" and floor < torch.inf:
        raise NoClosedForm
    match gain:
        case "surrogate":
            stopped = ((advantage > 0) & (r > high)) | ((advantage < 0) & ((r < low) | (r > floor)))
            return none, (r * advantage).where(~stopped, 0.0)
        case "weight":
            return r.clamp(low, high) * advantage, none
        case "sigmoid":
            tau = torch.where(advantage > 0, o.sigmoid_positive, o.sigmoid_negative)
            return none, r * advantage / (tau * (r - 1) / 2).cosh() ** 2
        case "gamma":
            good = advantage > 0
            power = torch.where(good, o.gamma_power_positive, o.gamma_power_negative)
            rate = torch.where(good, o.gamma_rate_positive, o.gamma_rate_negative)
            return r**power * (rate - rate * r).exp() * advantage, none
        case "score":
            return advantage, none
    raise NoClosedForm
