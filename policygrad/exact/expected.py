"""The expected credit of biased estimators in closed form: C(s, a) = E[A_t | s_t = s, a_t = a] as a table [S, A].

`weighted_gradient` turns it into the gradient that the estimator follows. The values may come from any critic, right or
wrong; the value after termination is 0. All functions work on the world's tables, not on trajectories.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from policygrad.exact.closed_form import ratio, transition_under
from policygrad.exact.worlds import World


def td_credit(world: World, value: Float[Tensor, " S"]) -> Float[Tensor, "S A"]:
    """E[delta_t | s, a] = r(s, a) + gamma sum_s' P(s'|s, a) V(s') - V(s)."""
    return world.reward + world.gamma * world.transition @ value - value.unsqueeze(1)


def gae_credit(
    world: World, probs: Float[Tensor, "S A"], value: Float[Tensor, " S"], lam: float
) -> Float[Tensor, "S A"]:
    """C = delta + gamma lam P c, with c = (I - gamma lam P_pi)^-1 delta_pi (Schulman et al. 2016, eq. 16)."""
    delta, decay = td_credit(world, value), world.gamma * lam
    identity = torch.eye(len(value), dtype=value.dtype)
    onward = torch.linalg.solve(identity - decay * transition_under(world, probs), (probs * delta).sum(-1))
    return delta + decay * world.transition @ onward


def n_step_credit(
    world: World, probs: Float[Tensor, "S A"], value: Float[Tensor, " S"], n: int
) -> Float[Tensor, "S A"]:
    """C_1 = delta, C_n = r + gamma P (T_pi^(n-1) V) - V, T_pi the Bellman operator (Sutton & Barto 2018, eq. 7.1)."""
    onward = value
    for _ in range(n - 1):
        onward = (probs * (world.reward + world.gamma * world.transition @ onward)).sum(-1)
    return world.reward + world.gamma * world.transition @ onward - value.unsqueeze(1)


def vtrace_credit(
    world: World,
    probs: Float[Tensor, "S A"],
    probs_old: Float[Tensor, "S A"],
    value: Float[Tensor, " S"],
    lam: float,
    rho_bar: float,
    c_bar: float,
) -> Float[Tensor, "S A"]:
    """E_mu[V-trace advantage | s, a], mu = pi_old (Espeholt et al. 2018, eq. 1 and section 4.2).

    The target's correction d = v - V solves d = mu.(rho delta) + gamma (sum_a mu c P) d.
    """
    unclipped = ratio(probs, probs_old)
    rho, c = unclipped.clamp(max=rho_bar), lam * unclipped.clamp(max=c_bar)
    traced = torch.einsum("sa,sap->sp", probs_old * c, world.transition)
    identity = torch.eye(len(value), dtype=value.dtype)
    delta = td_credit(world, value)
    correction = torch.linalg.solve(identity - world.gamma * traced, (probs_old * rho * delta).sum(-1))
    return rho * (delta + world.gamma * world.transition @ correction)
