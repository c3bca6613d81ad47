"""Exact V, Q, A, visitation, J, policy gradient, Fisher matrix, natural gradient, and the bounds of TRPO.

`probs` is the policy as a table pi(a|s) [S, A], differentiable; `score` is the table grad log pi(a|s) [S, A, N].
"""

import torch
from jaxtyping import Float
from torch import Tensor

from policygrad.exact.worlds import World


def transition_under(world: World, probs: Float[Tensor, "S A"]) -> Float[Tensor, "S S"]:
    """P_pi(s'|s) = sum_a pi(a|s) P(s'|s, a)."""
    return torch.einsum("sa,sap->sp", probs, world.transition)


def state_value(world: World, probs: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    """V = (I - gamma P_pi)^-1 r_pi: the solution of the Bellman equation (Sutton & Barto 2018, eq. 4.4)."""
    reward = (probs * world.reward).sum(-1)
    return torch.linalg.solve(
        torch.eye(len(reward), dtype=reward.dtype) - world.gamma * transition_under(world, probs), reward
    )


def action_value(world: World, probs: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
    """Q(s, a) = r(s, a) + gamma sum_s' P(s'|s, a) V(s')."""
    return world.reward + world.gamma * world.transition @ state_value(world, probs)


def advantage(world: World, probs: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
    """A(s, a) = Q(s, a) - V(s)."""
    return action_value(world, probs) - state_value(world, probs).unsqueeze(1)


def expected_return(world: World, probs: Float[Tensor, "S A"]) -> Float[Tensor, ""]:
    """J = sum_s P(s_0 = s) V(s)."""
    return world.start @ state_value(world, probs)


def optimal_probs(world: World) -> Float[Tensor, "S A"]:
    """The policy that is greedy for its own Q, by policy iteration (Sutton & Barto 2018, section 4.3).

    Requires gamma < 1, or a world whose episodes end under any policy.
    """
    states, actions = world.reward.shape
    probs = torch.full_like(world.reward, 1 / actions)
    for _ in range(states * actions + 1):
        greedy = torch.eye(actions, dtype=probs.dtype)[action_value(world, probs).argmax(1)]
        if torch.equal(greedy, probs):
            break
        probs = greedy
    return probs


def optimal_return(world: World) -> Float[Tensor, ""]:
    """max_pi J(pi): J of the policy from `optimal_probs`."""
    return expected_return(world, optimal_probs(world))


def visitation(
    world: World, probs: Float[Tensor, "S A"], gamma: float, horizon: int | None = None
) -> Float[Tensor, " S"]:
    """eta(s) = sum_t gamma^t P(s_t = s), over all t, or over t < horizon (Sutton et al. 2000, theorem 1).

    With the world's gamma it is the discounted visitation of the policy-gradient theorem. With gamma = 1 it is the
    expected number of visits, finite only if every episode ends.
    """
    backward = transition_under(world, probs).T
    if horizon is None:
        return torch.linalg.solve(torch.eye(len(backward), dtype=backward.dtype) - gamma * backward, world.start)
    reach, visits = world.start, torch.zeros_like(world.start)
    for t in range(horizon):
        visits = visits + gamma**t * reach
        reach = backward @ reach
    return visits


def weighted_gradient(
    visits: Float[Tensor, " S"],
    probs: Float[Tensor, "S A"],
    credit: Float[Tensor, "S A"],
    score: Float[Tensor, "S A N"],
) -> Float[Tensor, " N"]:
    """sum_s eta(s) sum_a pi(a|s) grad log pi(a|s) C(s, a): the expectation of any estimator with expected credit C."""
    return torch.einsum("s,sa,sa,san->n", visits, probs, credit, score)


def policy_gradient(world: World, probs: Float[Tensor, "S A"], score: Float[Tensor, "S A N"]) -> Float[Tensor, " N"]:
    """grad J = sum_s eta(s) sum_a pi(a|s) grad log pi(a|s) Q(s, a) (Sutton et al. 2000, theorem 1)."""
    return weighted_gradient(visitation(world, probs, world.gamma), probs, action_value(world, probs), score)


def fisher(
    visits: Float[Tensor, " S"], probs: Float[Tensor, "S A"], score: Float[Tensor, "S A N"]
) -> Float[Tensor, "N N"]:
    """F = sum_s d(s) sum_a pi(a|s) grad log pi grad log pi^T, d = eta / sum eta (Kakade 2001, eq. 2)."""
    return torch.einsum("s,sa,sam,san->mn", visits / visits.sum(), probs, score, score)


def natural_gradient(fisher: Float[Tensor, "N N"], gradient: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """F^+ g (Kakade 2001, eq. 3). F is singular for a softmax, because some directions change nothing."""
    return torch.linalg.pinv(fisher, hermitian=True) @ gradient


def kl_by_state(probs: Float[Tensor, "S A"], probs_ref: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    """KL(pi, pi_ref)(s) = sum_a pi(a|s) log(pi(a|s) / pi_ref(a|s)), over the actions that pi takes."""
    taken = probs > 0
    return (probs * (probs.where(taken, 1.0).log() - probs_ref.where(taken, 1.0).log())).sum(-1)


def ratio(probs: Float[Tensor, "S A"], probs_old: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
    """pi(a|s) / pi_old(a|s); 1 for an action that neither ever takes."""
    never = (probs == 0) & (probs_old == 0)
    return (probs / probs_old).where(~never, 1.0)


def mean_kl(
    visits: Float[Tensor, " S"], probs: Float[Tensor, "S A"], probs_ref: Float[Tensor, "S A"]
) -> Float[Tensor, ""]:
    """sum_s d(s) KL(pi, pi_ref)(s), d = visits / sum(visits) (Schulman et al. 2015, eq. 12)."""
    return visits / visits.sum() @ kl_by_state(probs, probs_ref)


def performance_difference(
    world: World, probs: Float[Tensor, "S A"], probs_old: Float[Tensor, "S A"]
) -> Float[Tensor, ""]:
    """J(pi) - J(pi_old) = sum_s eta_pi(s) sum_a pi(a|s) A_old(s, a) (Kakade & Langford 2002, lemma 6.1)."""
    visits = visitation(world, probs, world.gamma)
    return torch.einsum("s,sa,sa->", visits, probs, advantage(world, probs_old))


def surrogate_return(world: World, probs: Float[Tensor, "S A"], probs_old: Float[Tensor, "S A"]) -> Float[Tensor, ""]:
    """L_old(pi) = J(pi_old) + sum_s eta_old(s) sum_a pi(a|s) A_old(s, a) (Schulman et al. 2015, eq. 3)."""
    visits = visitation(world, probs_old, world.gamma)
    return expected_return(world, probs_old) + torch.einsum("s,sa,sa->", visits, probs, advantage(world, probs_old))


def lower_bound(world: World, probs: Float[Tensor, "S A"], probs_old: Float[Tensor, "S A"]) -> Float[Tensor, ""]:
    """L_old(pi) - C max_s KL(pi_old, pi)(s) <= J(pi), C = 4 epsilon gamma / (1 - gamma)^2, epsilon = max |A_old|.

    Schulman et al. 2015, theorem 1. Requires gamma < 1.
    """
    epsilon = advantage(world, probs_old).abs().max()
    penalty = 4 * epsilon * world.gamma / (1 - world.gamma) ** 2
    return surrogate_return(world, probs, probs_old) - penalty * kl_by_state(probs_old, probs).max()
