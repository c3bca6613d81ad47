"""Any method with any credit: what its first gradient expects is what the credit defines, and it runs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from oracles import TREE, WORLD, every_group, gradient, log_p, parameters, table, token_policy
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from policygrad.advantages import (
    gae,
    leave_one_out,
    mean_baseline,
    monte_carlo_advantage,
    n_step_advantage,
    unit_scale,
    unnormalized,
)
from policygrad.algorithms.actor_critic import ActorCriticObjective, actor_critic, off_policy_actor_critic
from policygrad.algorithms.grpo import GRPOObjective, grpo
from policygrad.algorithms.ppo import PPOObjective, ppo
from policygrad.algorithms.reinforce import ReinforceObjective, reinforce
from policygrad.algorithms.trpo import SurrogateObjective, npg, trpo
from policygrad.credit import Assign, baselined, bootstrapped, discounted, grouped, vtrace
from policygrad.critics import fit_critic, value_baseline
from policygrad.exact.closed_form import action_value, visitation, weighted_gradient
from policygrad.exact.expected import gae_credit, n_step_credit, vtrace_credit
from policygrad.exact.policies import TabularCritic, score_table
from policygrad.exact.sampler import CompletionSampler
from policygrad.exact.tokens import OnPrefixes
from policygrad.returns import trajectory_return
from policygrad.rollout import Batch
from policygrad.updates import Metrics, Objective, ascend, kl_radius, natural_step, trust_region_step
from policygrad.weights import per_episode

pytestmark = pytest.mark.usefixtures("float64")
close = partial(assert_close, rtol=1e-9, atol=1e-11)
BARS = {"lam": 0.8, "rho_bar": 0.9, "c_bar": 0.7}
LAM, N = 0.6, 2


def loose(objective: type[nn.Module]) -> Callable[[nn.Module, nn.Module | None], nn.Module]:
    """An objective that has no use for a critic."""
    return lambda policy, critic: objective(policy)


# (loop, objective, update as the method has it)
METHODS: dict[str, tuple[Any, Any, Any]] = {
    "reinforce": (reinforce, loose(ReinforceObjective), ascend),
    "actor_critic": (actor_critic, ActorCriticObjective, ascend),
    "off_policy_actor_critic": (partial(off_policy_actor_critic, epochs=2), ActorCriticObjective, ascend),
    "npg": (npg, loose(SurrogateObjective), lambda _: natural_step(step_size=partial(kl_radius, delta=1e-3))),
    "trpo": (trpo, loose(SurrogateObjective), lambda _: trust_region_step(delta=1e-3)),
    "ppo": (partial(ppo, normalize=unnormalized, minibatch_size=None), PPOObjective, ascend),
    "grpo": (grpo, loose(GRPOObjective), ascend),
}
# (policy, critic) -> credit. SIZE: rows of a batch, where they look at one another.
CREDITS: dict[str, Callable[[nn.Module, nn.Module], Assign]] = {
    "gae": lambda policy, critic: bootstrapped(critic, partial(gae, gamma=1.0, lam=LAM)),
    "n_step": lambda policy, critic: bootstrapped(critic, partial(n_step_advantage, gamma=1.0, n=N)),
    "monte_carlo": lambda policy, critic: bootstrapped(critic, partial(monte_carlo_advantage, gamma=1.0)),
    "vtrace": lambda policy, critic: vtrace(policy, critic, gamma=1.0, **BARS),
    "reward_to_go, value": lambda policy, critic: baselined(baseline=partial(value_baseline, critic=critic)),
    "trajectory_return, mean": lambda policy, critic: baselined(trajectory_return, mean_baseline),
    "group": lambda policy, critic: grouped(),
    "leave_one_out": lambda policy, critic: grouped(leave_one_out, unit_scale),
}
SIZE = {"trajectory_return, mean": 2, "group": 3, "leave_one_out": 2}


def by_state(each: Tensor, probs: Tensor, policy: OnPrefixes) -> Tensor:
    """sum_s eta(s) sum_a pi(a|s) grad log pi(a|s) C(s, a)."""
    return weighted_gradient(visitation(TREE, probs, 1.0), probs, each, score_table(policy.module.features, probs))


def defined(name: str, policy: OnPrefixes, critic: OnPrefixes) -> Tensor:
    """The expected gradient of log pi A, summed over a row and averaged over rows, that the credit defines."""
    probs, value = table(policy).detach(), critic.module.value.detach()
    if name == "group":
        return by_group(policy)
    each = {
        "gae": lambda: gae_credit(TREE, probs, value, LAM),
        "n_step": lambda: n_step_credit(TREE, probs, value, N),
        "monte_carlo": lambda: gae_credit(TREE, probs, value, 1.0),
        "vtrace": lambda: vtrace_credit(TREE, probs, probs, value, **BARS),
    }
    # What subtracts a baseline that does not know the action expects grad J.
    return by_state(each.get(name, lambda: action_value(TREE, probs))(), probs, policy)


def by_group(policy: OnPrefixes) -> Tensor:
    """sum over groups of P(group) sum_i (R_i - mean) / std grad log P(y_i|x) / SIZE."""
    total = torch.zeros(())
    for share, rollout in every_group(policy, SIZE["group"]):
        score = rollout.reward.sum(1)
        advantage = ((score - score.mean()) / score.std()).where(score.std() > 1e-12, 0.0)
        total = total + share * (advantage * log_p(policy, rollout)).mean()
    return gradient(total, policy)


@pytest.fixture
def policy(float64: None) -> OnPrefixes:
    return token_policy(0)


@pytest.fixture
def critic(float64: None) -> OnPrefixes:
    return OnPrefixes(WORLD, TabularCritic(torch.randn(len(TREE.start))))


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_gradient_expects_what_the_credit_defines(
    method: str, credit: str, policy: OnPrefixes, critic: OnPrefixes
) -> None:
    """Over all groups of completions, each row an episode; the policy does not move."""
    loop, make, _ = METHODS[method]
    total, first = torch.zeros_like(parameters(policy)), None

    def update(objective: Objective, batch: Batch) -> Metrics:
        nonlocal first
        first = gradient(objective(batch)[0], policy) if first is None else first
        return {}

    for share, rollout in every_group(policy, SIZE.get(credit, 1)):
        first = None
        assign = CREDITS[credit](policy, critic.requires_grad_(False))
        objective, options = make(policy, None), {"weights": per_episode, "diagnose": lambda *_: {}}
        next(loop(lambda _, rollout=rollout: rollout, assign, objective, update, **options))
        total += share * first
    exact = defined(credit, policy, critic)
    assert exact.norm() > 1e-2
    close(total, exact)


def test_the_definitions_differ(policy: OnPrefixes, critic: OnPrefixes) -> None:
    found = [defined(name, policy, critic) for name in ("gae", "n_step", "vtrace", "group", "leave_one_out")]
    assert min((x - y).norm() for i, x in enumerate(found) for y in found[:i]) > 1e-2


@pytest.mark.parametrize("fitted", [False, True], ids=["together", "fitted"])
@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize("method", METHODS)
def test_it_runs_as_it_is(method: str, credit: str, fitted: bool, policy: OnPrefixes, critic: OnPrefixes) -> None:
    """With its own update; the critic, where the credit has one, learns in the objective or is fitted alone."""
    loop, make, update_of = METHODS[method]
    before, value = parameters(policy), parameters(critic)
    assign = discounted(CREDITS[credit](policy, critic), 0.9)
    with_critic = credit in ("gae", "n_step", "monte_carlo", "vtrace", "reward_to_go, value")
    objective = make(policy, critic if with_critic and not fitted else None)
    update = update_of(SGD(objective.parameters(), lr=0.1))
    critic.requires_grad_(fitted or getattr(objective, "critic", None) is not None)
    options = {}
    if fitted and with_critic:
        options["fit"] = fit_critic(critic, SGD(critic.parameters(), lr=0.1), epochs=2)
    run = loop(CompletionSampler(WORLD, 3, 4), assign, objective, update, **options)
    rows = [next(run) for _ in range(2)]
    assert len({tuple(row) for row in rows}) == 1
    assert all(torch.as_tensor(x).isfinite() for row in rows for x in row.values())
    assert (parameters(policy) - before).norm() > 1e-4
    in_objective = getattr(objective, "critic", None) is not None
    assert ((parameters(critic) - value).norm() > 1e-4) == (with_critic and (fitted or in_objective))
    assert ("value_loss" in rows[0]) == (with_critic and (fitted or in_objective))
    assert {"kl_old", "gradient_norm", "entropy", "return"} <= rows[0].keys()
