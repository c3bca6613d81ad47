"""reward -> return: what a decision led to. Values are [B, T + 1]: the last column is where the row stops."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def reward_to_go(reward: Float[Tensor, "B T"], ended: Bool[Tensor, "B T"], gamma: float = 1.0) -> Float[Tensor, "B T"]:
    """G_t = r_t + gamma G_{t+1}, to the end of t's episode (Sutton & Barto 2018, eq. 3.9).

    An episode that the row cuts off counts as far as the row goes.
    """
    return _suffix_sum(reward, gamma, ended)


def trajectory_return(
    reward: Float[Tensor, "B T"], ended: Bool[Tensor, "B T"], gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    """G_0 at every step of its episode: the whole trajectory's return (Williams 1992, section 6)."""
    to_go = reward_to_go(reward, ended, gamma)
    total = [to_go[:, 0]]
    for t in range(1, reward.shape[1]):
        total.append(torch.where(ended[:, t - 1], to_go[:, t], total[-1]))
    return torch.stack(total, 1)


def n_step(
    reward: Float[Tensor, "B T"],
    value: Float[Tensor, "B T+1"],
    terminated: Bool[Tensor, "B T"],
    ended: Bool[Tensor, "B T"],
    gamma: float,
    n: int,
) -> Float[Tensor, "B T"]:
    """G_t = r_t + ... + gamma^(n-1) r_{t+n-1} + gamma^n V(s_{t+n}), cut short at an end (Sutton & Barto 2018, eq. 7.1).

    Where the episode or the row stops within n steps, the sum stops there and V of that state is added, unless the
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
    lam: float,
) -> Float[Tensor, "B T"]:
    """G_t = r_t + gamma ((1 - lam) V(s_{t+1}) + lam G_{t+1}) (Sutton & Barto 2018, eq. 12.2 in recursive form).

    lam = 0 is the TD(0) target; lam = 1 the Monte-Carlo return, with V where the row or a time limit cuts it off.
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
    """V-trace: targets and advantages for pi from steps that mu took, with ratio = pi/mu (Espeholt et al. 2018, eq. 1).

        delta_t = rho_t (r_t + gamma V(s_{t+1}) - V(s_t))        rho_t = min(rho_bar, ratio_t)
        v_t     = V(s_t) + delta_t + gamma c_t (v_{t+1} - V(s_{t+1}))    c_t = lam min(c_bar, ratio_t)
        A_t     = rho_t (r_t + gamma v_{t+1} - V(s_t))           (section 4.2; rho is part of it)

    Past a truncation, and past the end of the row, v_{t+1} is V(s_{t+1}). Returns (v, A), both [B, T].
    """
    rho, c = ratio.clamp(max=rho_bar), lam * ratio.clamp(max=c_bar)
    bootstrap = value[:, 1:].where(~terminated, 0.0)
    delta = rho * (reward + gamma * bootstrap - value[:, :-1])
    target = value[:, :-1] + _suffix_sum(delta, gamma * c, ended)
    following = torch.cat([target[:, 1:], value[:, -1:]], 1)
    advantage = rho * (reward + gamma * bootstrap.where(ended, following) - value[:, :-1])
    return target, advantage


def kl_in_reward(
    reward: Float[Tensor, "B T"], logp: Float[Tensor, "B T"], logp_ref: Float[Tensor, "B T"], beta: float
) -> Float[Tensor, "B T"]:
    """r_t - beta log(pi / pi_ref) (Ziegler et al. 2019, eq. 2): its expected return is J - beta KL(pi, pi_ref)."""
    return reward - beta * (logp - logp_ref)


def discount(mask: Bool[Tensor, "B T"], ended: Bool[Tensor, "B T"], gamma: float) -> Float[Tensor, "B T"]:
    """gamma^t, with t the number of decisions taken before in the same episode.

    The factor that the discounted policy gradient has and that every library drops; without it the usual update is
    the gradient of no function (Nota & Thomas 2020, arXiv 1906.07073).
    """
    age, ages = torch.zeros_like(mask[:, 0], dtype=torch.long), []
    for t in range(mask.shape[1]):
        ages.append(age)
        age = (age + mask[:, t]).where(~ended[:, t], 0)
    return gamma ** torch.stack(ages, 1).to(torch.get_default_dtype())


def _suffix_sum(x: Float[Tensor, "B T"], decay: float | Tensor, ended: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """y_t = x_t + decay_t y_{t+1}, where nothing is carried over an end: the recursion behind every return."""
    columns, cuts = x.unbind(1), ended.unbind(1)
    decays = decay.unbind(1) if isinstance(decay, Tensor) else (decay,) * len(columns)
    y, out = torch.zeros_like(columns[0]), []
    for x_t, decay_t, cut in zip(reversed(columns), reversed(decays), reversed(cuts), strict=True):
        # `where`, not a product with (1 - cut): a NaN behind an end must not come through.
        y = x_t + decay_t * y.where(~cut, 0.0)  # type: ignore[operator]
        out.append(y)
    return torch.stack(out[::-1], 1)
