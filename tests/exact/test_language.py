"""PPO, TRPO and the natural gradient of a token model as they are: the step they expect, against the solved tree."""

from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from oracles import TREE, WORLD, composed, gradient, parameters, reward_gradient, table, token_policy
from torch import Tensor
from torch.optim import SGD
from torch.testing import assert_close

from policygrad.advantages import gae
from policygrad.algorithms.trpo import SurrogateObjective, trpo
from policygrad.credit import bootstrapped, standardized
from policygrad.exact.closed_form import (
    advantage,
    expected_return,
    fisher,
    kl_by_state,
    mean_kl,
    natural_gradient,
    policy_gradient,
    state_value,
    visitation,
    weighted_gradient,
)
from policygrad.exact.enumeration import batches
from policygrad.exact.expected import gae_credit
from policygrad.exact.policies import TabularCritic, score_table
from policygrad.exact.sampler import CompletionSampler
from policygrad.exact.tokens import OnPrefixes, completions, prefix_state
from policygrad.exact.worlds import World
from policygrad.rollout import Rollout
from policygrad.updates import Update, ascend, kl_radius, learning_rate, natural_step, trust_region_step

BETA, DELTA = 0.3, 0.01
close = partial(assert_close, rtol=1e-10, atol=1e-12)


@pytest.fixture
def policy() -> OnPrefixes:
    return token_policy(0)


@pytest.fixture
def reference() -> OnPrefixes:
    return token_policy(7)


def charged_world(policy: OnPrefixes, reference: OnPrefixes) -> World:
    """The tree whose reward for a token is less BETA times its log-ratio."""
    log_ratio = (table(policy) / table(reference)).log().detach()
    return replace(TREE, reward=TREE.reward - BETA * log_ratio)


def critic_of(value: Tensor) -> OnPrefixes:
    return OnPrefixes(WORLD, TabularCritic(value)).requires_grad_(False)


def ppo_step(policy: OnPrefixes, critic: OnPrefixes, reference: OnPrefixes, rollout: Rollout, **options: Any) -> Tensor:
    """The change of the policy's and the critic's parameters in one iteration of PPO at a learning rate of 1."""
    learner = torch.nn.ModuleList([deepcopy(policy), deepcopy(critic)])
    given = {"epochs": 1, "normalize_advantages": "none", "minibatch_size": None, "value_coefficient": 0.5}
    given |= {"kl_ref": "reward", "kl_ref_coefficient": BETA}
    made = composed("ppo", learner[0], lambda _: rollout, learner[1], reference, **(given | options))
    next(iter(replace(made, update=ascend(SGD(learner.parameters(), 1.0)))))
    return parameters(learner) - torch.cat([parameters(policy), parameters(critic)])


def expected_ppo_step(
    policy: OnPrefixes, critic: OnPrefixes, reference: OnPrefixes, size: int, **options: Any
) -> Tensor:
    """Over all batches of `size` completions, of any prompts."""
    rollout, probability = completions(WORLD, table(policy))
    parts = zip(*batches(probability, size), strict=True)
    return sum(p * ppo_step(policy, critic, reference, rollout.rows(index), **options) for index, p in parts)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_ppo_with_an_exact_critic_follows_j_less_the_kl_of_whole_completions(
    lam: float, policy: OnPrefixes, reference: OnPrefixes
) -> None:
    world, probs = charged_world(policy, reference), table(policy)
    critic = critic_of(state_value(world, probs.detach()))
    found = expected_ppo_step(policy, critic, reference, 1, lam=lam, weights="episode")
    kl = visitation(TREE, probs, 1.0) @ kl_by_state(probs, table(reference).detach())
    true = gradient(expected_return(TREE, probs) - BETA * kl, policy)
    moved = len(true)
    close(found[:moved], true)
    close(found[moved:], torch.zeros_like(found[moved:]))  # the critic, being right, stays


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_ppo_with_any_critic_follows_what_gae_credits(lam: float, policy: OnPrefixes, reference: OnPrefixes) -> None:
    world, probs = charged_world(policy, reference), table(policy).detach()
    value = torch.linspace(-1, 1, len(TREE.start))
    found = expected_ppo_step(policy, critic_of(value), reference, 1, lam=lam, weights="episode")
    score = score_table(policy.module.features, probs)
    visits = visitation(TREE, probs, 1.0)
    true = weighted_gradient(visits, probs, gae_credit(world, probs, value, lam), score)
    close(found[: len(true)], true)
    unbiased = policy_gradient(world, probs, score)
    assert ((true - unbiased).norm() > 1e-2) == (lam < 1), "it leans on the critic, but for Monte Carlo"


def test_ppo_by_token_is_a_ratio_of_two_sums(policy: OnPrefixes, reference: OnPrefixes) -> None:
    """With an exact critic and lam = 0 a decision's advantage is A(s, a): nothing in this world is left to chance."""
    world, probs = charged_world(policy, reference), table(policy)
    critic = critic_of(state_value(world, probs.detach()))
    found = expected_ppo_step(policy, critic, reference, 2, lam=0.0, weights="token")
    rollout, probability = completions(WORLD, probs)
    index, weight = batches(probability, 2)
    at = prefix_state(WORLD, rollout.obs), rollout.action
    gain = (advantage(world, probs.detach())[at] * probs.log()[at]).where(rollout.mask, 0.0).sum(1)
    length = rollout.mask.sum(1)
    true = gradient((weight * gain[index].sum(1) / length[index].sum(1)).sum(), policy)
    close(found[: len(true)], true)


def test_ppos_tokens_keep_their_prefix_in_every_minibatch(policy: OnPrefixes, reference: OnPrefixes) -> None:
    """Minibatches of rows, not of tokens: the mean of their first steps is the step of the whole."""
    rollout = completions(WORLD, table(policy))[0]
    critic, options = critic_of(torch.zeros(len(TREE.start))), {"weights": "token", "minibatch_size": 1}
    whole = ppo_step(policy, critic, reference, rollout, weights="token")
    each = []
    for k in range(len(rollout.mask)):
        part = rollout.rows(torch.tensor([k]))
        each.append(ppo_step(policy, critic, reference, part, **options) * rollout.mask[k].sum() / rollout.mask.sum())
    close(sum(each), whole)


# The natural gradient and the trust region, on all completions at once, each weighted by its probability


def listed(policy: OnPrefixes, update: Update, lam: float = 0.95) -> tuple[Tensor, dict[str, Any]]:
    """One iteration with an exact critic: how the policy's parameters have changed, and the metrics."""
    rollout, probability = completions(WORLD, table(policy))
    before, critic = parameters(policy), critic_of(state_value(TREE, table(policy).detach()))
    credit, objective = bootstrapped(critic, partial(gae, gamma=1.0, lam=lam)), SurrogateObjective(policy)
    run = trpo(lambda _: rollout, credit, objective, update, weights=lambda mask: probability.unsqueeze(1) * mask)
    metrics = next(run)
    return parameters(policy) - before, metrics


def dense(policy: OnPrefixes, damping: float) -> tuple[Tensor, Tensor]:
    """(F, F^-1 g) from the tables of the tree."""
    probs = table(policy).detach()
    matrix = fisher(visitation(TREE, probs, 1.0), probs, score_table(policy.module.features, probs))
    g = reward_gradient(policy)
    if damping == 0:
        return matrix, natural_gradient(matrix, g)
    return matrix, torch.linalg.solve(matrix + damping * torch.eye(len(g)), g)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("lam", [0.0, 0.95])
def test_a_natural_step_of_a_token_model_is_the_dense_solve(damping: float, lam: float, policy: OnPrefixes) -> None:
    plain, (_, direction) = reward_gradient(policy), dense(policy, damping)
    update = natural_step(step_size=partial(learning_rate, rate=0.1), damping=damping, cg_iters=100)
    found, metrics = listed(policy, update, lam)
    assert_close(found, 0.1 * direction, rtol=1e-6, atol=1e-8)
    assert_close(metrics["gradient_norm"], plain.norm())
    assert torch.cosine_similarity(direction, plain, dim=0) < 0.97, "not the plain gradient"


def test_npg_goes_as_far_as_its_radius(policy: OnPrefixes) -> None:
    matrix, direction = dense(policy, 0.1)
    slope = direction @ reward_gradient(policy)
    found, _ = listed(policy, natural_step(step_size=partial(kl_radius, delta=DELTA)))
    assert_close(found, (2 * DELTA / slope).sqrt() * direction, rtol=1e-6, atol=1e-8)
    assert 0.2 * DELTA < found @ matrix @ found / 2 < DELTA, "less than delta by the damping"


@pytest.mark.parametrize("delta", [1e-4, DELTA, 0.3])
def test_the_trust_region_of_a_token_model_holds_the_mean_kl_of_its_prefixes(delta: float, policy: OnPrefixes) -> None:
    for _ in range(3):
        old = table(policy).detach()
        _, metrics = listed(policy, trust_region_step(delta=delta, damping=1e-3))
        new = table(policy).detach()
        moved = mean_kl(visitation(TREE, old, 1.0), old, new)
        assert 0 < moved <= delta
        assert_close(metrics["kl_old"], moved)
        assert metrics["accepted"] == 1
        assert expected_return(TREE, new) > expected_return(TREE, old)


def test_the_trust_region_holds_on_sampled_rows_too(policy: OnPrefixes) -> None:
    critic, sample = critic_of(torch.zeros(len(TREE.start))), CompletionSampler(WORLD, 4, 4)
    seen: list[tuple[Rollout, Tensor]] = []

    def remembering(policy: OnPrefixes) -> Rollout:
        seen.append((sample(policy), table(policy).detach()))
        return seen[-1][0]

    credit = standardized(bootstrapped(critic, partial(gae, gamma=1.0, lam=0.95)))
    run = trpo(remembering, credit, SurrogateObjective(policy), trust_region_step())
    for _ in range(5):
        metrics = next(run)
        rollout, old = seen[-1]
        each = kl_by_state(old, table(policy).detach())[prefix_state(WORLD, rollout.obs)]
        assert metrics["accepted"] == 1
        assert 0 < each[rollout.mask].mean() <= DELTA
        assert_close(metrics["kl_old"], each[rollout.mask].mean())
