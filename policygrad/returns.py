"""reward -> return. Values are [B, T + 1]: the last column is V of the state where the row stops."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def reward_to_go(reward: Float[Tensor, "B T"], ended: Bool[Tensor, "B T"], gamma: float = 1.0) -> Float[Tensor, "B T"]:
    """G_t = r_t + gamma G_{t+1}, up to the end of the episode (Sutton & Barto 2018, eq. 3.9).

    If the row ends first, the sum ends with the row.
    """
    return _suffix_sum(reward, gamma, ended)


def trajectory_return(
    reward: Float[Tensor, "B T"], ended: Bool[Tensor, "B T"], gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """G_0 at every step of its episode: the whole trajectory's return (Williams 1992, section 6)."""
    return reward_to_go(reward, ended, gamma).gather(1, _episode_start(ended))


def n_step(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    gamma: float,
    n: int,
) -> Float[Tensor, "B T"]:
    """G_t = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V(s_{t+n}), cut short at an end (Sutton & Barto 2018, eq. 7.1).

    If the episode or the row stops within n steps, the sum stops there, plus the discounted V of that state unless the
    episode terminated.
    """
    after = value[:, 1:]
    bootstrap = after.where(~terminated, 0.0)
    total = reward + gamma * bootstrap
    for _ in range(min(n, reward.shape[1]) - 1):
        following = torch.cat([total[:, 1:], after[:, -1:]], 1)
        total = reward + gamma * bootstrap.where(ended, following)
    return total


def lambda_return(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    gamma: float,
    lam: float | Float[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    """G_t = r_t + gamma ((1 - lam) V(s_{t+1}) + lam G_{t+1}) (Sutton & Barto 2018, eq. 12.2 in recursive form).

    lam = 0 is the TD(0) target. lam = 1 is the Monte Carlo return, with V where the row or a time limit cuts it off.
    """
    bootstrap = value[:, 1:].where(~terminated, 0.0)
    delta = reward + gamma * bootstrap - value[:, :-1]
    return value[:, :-1] + _suffix_sum(delta, gamma * lam, ended)


def vtrace(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    ratio: Float[Tensor, "B T"],
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """V-trace: targets and advantages for pi from steps of mu, with ratio = pi/mu (Espeholt et al. 2018, eq. 1).

        delta_t = rho_t (r_t + gamma V(s_{t+1}) - V(s_t))        rho_t = min(rho_bar, ratio_t)
        v_t     = V(s_t) + delta_t + gamma c_t (v_{t+1} - V(s_{t+1}))    c_t = lam min(c_bar, ratio_t)
        A_t     = rho_t (r_t + gamma v_{t+1} - V(s_t))           (section 4.2; A includes rho)

    After a truncation, and after the end of the row, v_{t+1} is V(s_{t+1}). Returns (v, A), both [B, T].
    """
    rho, c = ratio.clamp(max=rho_bar), lam * ratio.clamp(max=c_bar)
    bootstrap = value[:, 1:].where(~terminated, 0.0)
    delta = rho * (reward + gamma * bootstrap - value[:, :-1])
    target = value[:, :-1] + _suffix_sum(delta, gamma * c, ended)
    following = torch.cat([target[:, 1:], value[:, -1:]], 1)
    advantage = rho * (reward + gamma * bootstrap.where(ended, following) - value[:, :-1])
    return target, advantage


def kl_in_reward(
    reward: Float[Tensor, "B T"], logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"], beta: float | Tensor
) -> Float[Tensor, "B T"]:
    """r_t - beta log(pi / pi_ref) (Ziegler et al. 2019, eq. 2): its expected return is J - beta KL(pi, pi_ref)."""
    return reward - beta * (logp - logp_ref)


def discount(
    mask: Bool[Tensor, "B T"], ended: Bool[Tensor, "B T"], gamma: float, dtype: torch.dtype | None = None
) -> Float[Tensor, "B T"]:
    """gamma^t, with t the number of earlier decisions in the same episode. dtype: torch's default, if None.

    The discounted policy gradient has this factor, and libraries usually drop it; without it the usual update is the
    gradient of no function (Nota & Thomas 2020, arXiv 1906.07073).
    """
    before = mask.cumsum(1) - mask.long()  # decisions before this step in the row
    age = before - before.gather(1, _episode_start(ended))
    return gamma ** age.to(dtype or torch.get_default_dtype())


def _episode_start(ended: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The index of the first step of each step's episode."""
    t = torch.arange(ended.shape[1], device=ended.device).expand_as(ended)
    first = torch.cat([torch.ones_like(ended[:, :1]), ended[:, :-1]], 1)
    return t.where(first, 0).cummax(1).values


def _suffix_sum(x: Float[Tensor, "B T"], decay: float | Tensor, ended: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """y_t = x_t + decay_t y_{t+1}, with nothing carried across an end: the recursion behind every return.

    It doubles: before round k, y_t holds the first 2^k terms of its sum, and `factor` is the weight of the next 2^k.
    """
    y, goes_on = x, ~ended
    factor = decay if isinstance(decay, Tensor) else torch.full_like(x, decay)
    reach = 1
    while reach < x.shape[1]:
        # `where` instead of a product with 0, so that a NaN after an end does not leak.
        more = (factor[:, :-reach] * y[:, reach:]).where(goes_on[:, :-reach], 0.0)
        y = torch.cat([y[:, :-reach] + more, y[:, -reach:]], 1)
        factor = torch.cat([factor[:, :-reach] * factor[:, reach:], factor[:, -reach:]], 1)
        goes_on = torch.cat([goes_on[:, :-reach] & goes_on[:, reach:], goes_on[:, -reach:]], 1)
        reach *= 2
    return y
