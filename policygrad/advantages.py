"""return -> advantage. Baselines, group statistics, GAE, standardization."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from policygrad import ranks
from policygrad.errors import UserError
from policygrad.ranks import Steps, added, merged
from policygrad.returns import lambda_return, n_step
from policygrad.rollout import Rollout, holes_last

# Baselines: (rollout, returns [B, T]) -> [B, T]. Each leaves out the row's own return, because a baseline that depends
# on the action biases the gradient. critics.py has the baselines that need a policy or a critic. The other rows, and
# what is standardized, are those of all ranks.


def no_baseline(rollout: Rollout, returns: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """b = 0."""
    return torch.zeros_like(returns)


@ranks.collective
def mean_baseline(rollout: Rollout, returns: Float[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """b_i = mean of the other rows' returns, over all their steps (Williams 1992, reinforcement comparison).

    0 if there is no other row.
    """
    count, own = rollout.mask.sum(1, keepdim=True), returns.where(rollout.mask, -torch.inf).amax()
    below = (returns - _known(own)).where(rollout.mask, 0.0).sum()
    counts, most, sums = zip(*(yield count.sum(), own, below), strict=True)
    origin, others = _known(torch.stack(most).amax()), added(counts) - count
    # What each rank has summed is below its own largest, and these are not the same.
    total = added([x + n * (_known(y) - origin) for n, y, x in zip(counts, most, sums, strict=True)])
    returns = (returns - origin).where(rollout.mask, 0.0)
    mean = origin + (total - returns.sum(1, keepdim=True)) / others.clamp(min=1)
    return mean.where(others > 0, 0.0).expand_as(returns)


@ranks.collective
def largest(returns: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Steps[Float[Tensor, ""]]:
    """The largest return of all decisions, of all ranks; 0 if there are none.

    It is subtracted before a mean is taken, so that of equal returns nothing is left, to the bit: a rounding would be
    as large as any other advantage once advantages are standardized.
    """
    return _known(torch.stack((yield returns.where(mask, -torch.inf).amax())).amax())


def _known(most: Tensor) -> Tensor:
    """The largest returns; 0 where there are none."""
    return most.where(most != -torch.inf, 0.0)


@ranks.collective
def time_mean_baseline(rollout: Rollout, returns: Float[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """b_it = mean of the other rows' returns at step t, not counting holes; 0 if no other row has a step t."""
    order = holes_last(rollout.mask, rollout.ended)
    mask = rollout.mask.gather(1, order)
    returns = returns.gather(1, order).where(mask, 0.0)
    own = returns.where(mask, -torch.inf).amax(0)  # of each step, as `largest`
    seen = yield mask.sum(0), own, (returns - _known(own)).where(mask, 0.0).sum(0)
    more = [mask.shape[1] - len(most) for _, most, _ in seen]  # steps of this rank that another does not have
    counts, sums = ([pad(one[i], (0, n)) for one, n in zip(seen, more, strict=True)] for i in (0, 2))
    most = [pad(one[1], (0, n), value=-torch.inf) for one, n in zip(seen, more, strict=True)]
    origin, others = _known(torch.stack(most).amax(0)), added(counts) - mask.int()
    total = added([x + n * (_known(y) - origin) for n, y, x in zip(counts, most, sums, strict=True)])
    returns = (returns - origin).where(mask, 0.0)
    mean = origin + (total - returns) / others.clamp(min=1)
    return torch.zeros_like(returns).scatter(1, order, mean.where(others > 0, 0.0))


def greedy_baseline(rollout: Rollout, returns: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """b_i = the return of the most likely episode from the row's start (ReMax, Li et al. 2023, arXiv 2310.10505).

    It does not depend on what the row did, so the gradient stays unbiased, and no critic is needed; it costs one more
    episode for each start. Raises UserError if the rollout does not know it: Rollout.greedy.
    """
    if rollout.greedy is None:
        raise UserError(
            "the greedy baseline needs the greedy policy's returns, and the sampler has none: make it with greedy=True"
        )
    return rollout.greedy.unsqueeze(1).expand_as(returns)


@ranks.collective
def optimal_constant_baseline(
    returns_score: Float[Tensor, " B"], score_score: Float[Tensor, " B"]
) -> Steps[Float[Tensor, " B"]]:
    """b_i = sum_{j!=i} X_j.Z_j / sum_{j!=i} |Z_j|^2: the constant that minimizes the variance of X - b Z.

    Z_j = sum_t grad log pi(a_t|s_t) is row j's score, and X_j = sum_t grad log pi(a_t|s_t) G_t is its gradient without
    a baseline. For whole-trajectory returns this is E[|Z|^2 R] / E[|Z|^2] (Greensmith et al. 2004, theorem 3; Peters &
    Schaal 2008, eq. 13). `returns_score` holds X_j.Z_j, and `score_score` holds |Z_j|^2.
    """
    (returns_score, score_score), own = yield from ranks.begun(ranks.gathered_all, returns_score, score_score)
    # Sum the other rows directly: subtracting a row with a large score from the total loses the others to rounding.
    others = ~torch.eye(len(score_score), dtype=torch.bool, device=score_score.device)[own]
    squares = _sum(others, score_score)
    return torch.where(squares > 0, _sum(others, returns_score) / squares, 0.0)


@ranks.collective
def length_weighted_mean(rollout: Rollout, returns: Float[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """b = sum_j |y_j| R_j / sum_j |y_j| over the rows of the group, the own one too (OPO, arXiv 2505.23585).

    The constant of least variance, if the squared score of a row is as large as the row is long. With
    returns.trajectory_return.
    """
    length = rollout.mask.sum(1).to(returns.dtype)
    total = returns.gather(1, rollout.mask.int().argmax(1, keepdim=True)).squeeze(1)  # as at all of the row's decisions
    (total, length, group), own = yield from ranks.begun(ranks.gathered_all, total, length, rollout.group)
    same, origin = _same(total, group)
    mean = origin + _sum(same, length * (total - origin)) / _sum(same, length).clamp(min=1)
    return mean[own].unsqueeze(1).expand_as(returns)


def gae(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    gamma: float,
    lam: float | Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V(s_{t+1}) - V(s_t) (Schulman et al. 2016, eq. 16).

    delta drops V(s_{t+1}) at `terminated`; the sum stops at `ended`, which includes time limits. A_t is the
    lambda-return minus the value.
    """
    return lambda_return(reward, value, terminated, ended, gamma, lam) - value[:, :-1]


def gae_by_length(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    gamma: float,
    alpha: float,
) -> Float[Tensor, "B T"]:
    """GAE with lam = max(0, 1 - 1 / (alpha l)), l the steps of the row's episode (VAPO, arXiv 2504.05118).

    The weights of its TD errors then add up to alpha l, a share of the row's length, where those of one lambda would
    add up to the same for all. Each row is one episode, with its end or the row's.
    """
    steps = torch.where(ended.any(1), ended.int().argmax(1) + 1, ended.shape[1]).unsqueeze(1)
    lam = (1 - 1 / (alpha * steps.to(reward.dtype))).clamp(min=0).expand_as(reward)
    return gae(reward, value, terminated, ended, gamma, lam)


def n_step_advantage(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    gamma: float,
    n: int,
) -> Float[Tensor, "B T"]:
    """A_t = r_t + ... + gamma^n V(s_{t+n}) - V(s_t) (A3C, Mnih et al. 2016, section 4)."""
    return n_step(reward, value, terminated, ended, gamma, n) - value[:, :-1]


def monte_carlo_advantage(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    gamma: float,
) -> Float[Tensor, "B T"]:
    """A_t = G_t - V(s_t), the TD(1) advantage: GAE with lam = 1. G adds V only where the row or a limit cuts it off."""
    return gae(reward, value, terminated, ended, gamma, 1.0)


def group_mean(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Mean return of each row's group, exact if all returns are equal (GRPO, arXiv 2402.03300, section 4.1.1)."""
    same, origin = _same(returns, group)
    return origin + _sum(same, returns - origin) / same.sum(1)


def leave_one_out(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Mean return of the group's other rows; 0 for a group of one (Kool et al. 2019; RLOO, arXiv 2402.14740)."""
    same, origin = _same(returns, group)
    others = same.sum(1) - 1
    mean = origin + (_sum(same, returns - origin) - (returns - origin)) / others.clamp(min=1)
    return mean.where(others > 0, 0.0)


def other_best(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """R_i - (max_j R_j - max_{j != i} R_j): what is left is how much the group's best return owes to row i.

    Minus this baseline, the expected gradient is that of E[max_j R_j], pass@k for k completions that succeed or fail
    (Tang et al. 2025, arXiv 2503.19595). A group of one owes its return to its row.
    """
    same = group.unsqueeze(1) == group.unsqueeze(0)
    own = torch.eye(len(returns), dtype=torch.bool, device=returns.device)
    best, others = (returns.where(rows, -torch.inf).amax(1) for rows in (same, same & ~own))
    return returns - (best - others.where(others > -torch.inf, 0.0))


def group_std(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Sample standard deviation (n - 1) of each row's group, in two passes.

    0 for a group of one, and where the returns are equal up to rounding.
    """
    same, _ = _same(returns, group)
    squares = _sum(same, (returns - group_mean(returns, group)) ** 2)
    std = (squares / (same.sum(1) - 1).clamp(min=1)).sqrt()
    equal = std <= _rounding(returns.abs().where(same, 0.0).amax(1))  # not so if a return is NaN: that stays seen
    return std.where(~equal, 0.0)


def group_scale(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """GRPO's divisor, the group's std: prompts that are almost always or almost never solved get the most weight.

    Infinity where the std is 0, so that the advantage is 0. A constant added to the std would have the unit of the
    rewards, and change what is learned with it.
    """
    std = group_std(returns, group)
    return std.where(std != 0, torch.inf)


def mean_scale(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """MaxRL's divisor, the group's mean (Tajwar et al. 2026, arXiv 2602.02710).

    For rewards of 0 and 1, n to a group, (R - mean) / mean has the expectation sum_{k < n - 1} (1 - p)^k grad p: it
    nears grad log p, the gradient of maximum likelihood, as n grows. Infinity where the mean is 0, so that the
    advantage is 0. Raises UserError if a return is negative.
    """
    if not torch._C._functorch.is_functorch_wrapped_tensor(returns) and bool((returns < 0).any()):
        raise UserError(
            "the mean return divides a group's advantages, and a return is negative: use rewards of 0 or more, or "
            "group_scale std or none"
        )
    mean = group_mean(returns, group)
    return mean.where(mean != 0, torch.inf)


def batch_scale(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The sample standard deviation of all returns, of all groups (Lite PPO, arXiv 2508.08221).

    Infinity where it is 0, so that the advantage is 0. A row that is alone in its group is left out: it is compared
    with nothing, as are rows to which no reward applies.
    """
    alone = (group.unsqueeze(1) == group.unsqueeze(0)).sum(1) == 1
    apart = torch.arange(1, len(group) + 1, device=group.device, dtype=group.dtype)
    return group_scale(returns, torch.where(alone, apart, torch.zeros_like(group)))


def unit_scale(returns: Float[Tensor, " B"], group: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """1: no division (Dr. GRPO, arXiv 2503.20783; RLOO)."""
    return torch.ones_like(returns)


@ranks.collective
def standardize(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """(x - mean) / std over the mask, whatever the unit of x. 0 if all are equal up to rounding, or if there is one."""
    return _standardized(x, mask, (yield _spread(x, mask)))


def standardize_alone(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The same of one process, for a graph, in which there are no generators."""
    return _standardized(x, mask, [_spread(x, mask)])


def _spread(x: Tensor, mask: Tensor) -> Tensor:
    """Of a rank's numbers: how many, the largest magnitude, the smallest, and above it the mean and the squares."""
    least, count = x.where(mask, torch.inf).amin(), mask.sum().to(x.dtype)
    above = (x - least).where(mask, 0.0)
    mean = above.sum() / count.clamp(min=1)
    squares = ((above - mean).where(mask, 0.0) ** 2).sum()
    return torch.stack([count, x.abs().where(mask, 0.0).amax(), least, mean, squares])


def _standardized(x: Tensor, mask: Tensor, seen: Sequence[Tensor]) -> Tensor:
    """x less the mean of all ranks, over their standard deviation, of what _spread says on each."""
    counts, sizes, leasts, means, squares = torch.stack(list(seen), 1)
    least = leasts.amin()
    # The smallest is subtracted first: equal numbers become exactly 0, so the result is exactly 0.
    means = torch.where(counts > 0, means + (leasts - least), 0.0)
    mean, square = merged(counts.unbind(), means.unbind(), squares.unbind())
    centered = ((x - least).where(mask, 0.0) - mean).where(mask, 0.0)
    std = (square / (counts.sum() - 1).clamp(min=1)).sqrt()
    equal = std <= _rounding(sizes.amax())  # not so if a number is NaN: that stays seen
    return (centered / std).where(mask & ~equal, 0.0)


def unnormalized(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """x unchanged: the alternative to `standardize`."""
    return x


def _rounding(largest: Tensor) -> Tensor:
    """The standard deviation up to which numbers of this size may differ by rounding alone."""
    return 2 * torch.finfo(largest.dtype).eps * largest


def _same(returns: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows share a group [B, B], and the return of each group's first row [B], which is subtracted first."""
    same = group.unsqueeze(1) == group.unsqueeze(0)
    return same, returns[same.int().argmax(1)]


def _sum(same: Tensor, x: Tensor) -> Tensor:
    return x.where(same, 0.0).sum(1)
