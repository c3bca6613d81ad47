"""The expectation of every estimator over ALL trajectories (pairs, triples) of a small world is the exact gradient."""

from functools import partial

import pytest
import torch

from policygrad.advantages import gae, mean_baseline, monte_carlo_advantage, no_baseline, time_mean_baseline
from policygrad.critics import bootstrap_values, optimal_baseline, value_baseline
from policygrad.exact.closed_form import policy_gradient, state_value, visitation, weighted_gradient
from policygrad.exact.enumeration import batches, rows, trajectories
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, score_table, tabular
from policygrad.exact.worlds import garnet, with_clock
from policygrad.linalg import flat_gradient
from policygrad.objectives import clipped_surrogate, surrogate
from policygrad.returns import discount, reward_to_go, trajectory_return
from policygrad.rollout import decisions
from policygrad.score import score, token_ratio
from policygrad.weights import average, per_episode

HORIZON = 2
WORLD = with_clock(garnet(2, 2, 1, termination=0.2, seed=3), HORIZON)
# One start state, so that there are few trajectories and triples of them can be listed.
WORLD = type(WORLD)(WORLD.transition, WORLD.reward, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), WORLD.gamma)


@pytest.fixture
def policy():
    theta = torch.randn(8, generator=torch.Generator().manual_seed(1))
    return SoftmaxPolicy(tabular(4, 2), theta)


@pytest.fixture
def everything(policy):
    return trajectories(WORLD, probabilities(policy), HORIZON)


def exact_gradient(policy):
    probs = probabilities(policy).detach()
    return policy_gradient(WORLD, probs, score_table(policy.features, probs))


def estimate(policy, rollout, advantage, gain=None):
    """The gradient that an algorithm would follow on this rollout."""
    batch = decisions(rollout, per_episode(rollout.mask), advantage)
    logp = policy(batch.obs).log_prob(batch.action)
    x = score(logp, batch.advantage)
    if gain is not None:
        x = gain(token_ratio(logp, batch.logp, batch.mask), batch.advantage)
    return flat_gradient(average(x, batch.weight), [policy.theta])


def expectation(policy, everything, size, advantage):
    """The sum over all batches of `size` trajectories of the batch's probability times its estimate."""
    rollout, probability = everything
    index, weight = batches(probability, size)
    parts = (rows(rollout, i) for i in index)
    return sum(w * estimate(policy, part, advantage(part)) for w, part in zip(weight, parts, strict=True))


def reinforced(returns, baseline, discounted):
    def advantage(rollout):
        target = returns(rollout.reward, rollout.ended, WORLD.gamma)
        credit = target - baseline(rollout, target)
        return credit * discount(rollout.mask, rollout.ended, WORLD.gamma) if discounted else credit

    return advantage


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("baseline", ["none", "mean", "time mean", "value", "wrong value", "optimal"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole return", "reward-to-go"])
def test_reinforce_is_unbiased_with_every_baseline(policy, everything, size, baseline, whole):
    value = state_value(WORLD, probabilities(policy).detach())
    baselines = {
        "none": no_baseline,
        "mean": mean_baseline,
        "time mean": time_mean_baseline,
        "value": partial(value_baseline, critic=TabularCritic(value)),
        "wrong value": partial(value_baseline, critic=TabularCritic(value + torch.arange(4))),
        "optimal": partial(optimal_baseline, policy=policy),
    }
    if size == 3 and baseline in ("none", "value", "wrong value"):
        pytest.skip("looks at one row alone: pairs show nothing that triples would change")
    returns = trajectory_return if whole else reward_to_go
    found = expectation(policy, everything, size, reinforced(returns, baselines[baseline], discounted=not whole))
    torch.testing.assert_close(found, exact_gradient(policy), rtol=1e-9, atol=1e-10)


def test_without_gamma_to_the_t_it_is_the_undiscounted_visitation_that_weighs(policy, everything):
    found = expectation(policy, everything, 1, reinforced(reward_to_go, no_baseline, discounted=False))
    probs = probabilities(policy).detach()
    value = state_value(WORLD, probs)
    q = WORLD.reward + WORLD.gamma * WORLD.transition @ value
    by_visits = weighted_gradient(visitation(WORLD, probs, 1.0), probs, q, score_table(policy.features, probs))
    torch.testing.assert_close(found, by_visits, rtol=1e-9, atol=1e-10)
    assert (found - exact_gradient(policy)).norm() > 1e-2 * exact_gradient(policy).norm()


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_with_an_exact_critic_is_unbiased(policy, everything, lam):
    critic = TabularCritic(state_value(WORLD, probabilities(policy).detach()))

    def advantage(rollout):
        value = bootstrap_values(critic, rollout)
        credit = gae(rollout.reward, value, rollout.terminated, rollout.ended, WORLD.gamma, lam)
        return credit * discount(rollout.mask, rollout.ended, WORLD.gamma)

    found = expectation(policy, everything, 1, advantage)
    torch.testing.assert_close(found, exact_gradient(policy), rtol=1e-9, atol=1e-10)


def test_monte_carlo_with_a_wrong_critic_is_unbiased_and_one_step_is_not(policy, everything):
    critic = TabularCritic(torch.tensor([3.0, -1.0, 2.0, 0.5]))

    def advantage(rollout, estimator):
        value = bootstrap_values(critic, rollout)
        credit = estimator(rollout.reward, value, rollout.terminated, rollout.ended, WORLD.gamma)
        return credit * discount(rollout.mask, rollout.ended, WORLD.gamma)

    found = expectation(policy, everything, 1, partial(advantage, estimator=monte_carlo_advantage))
    torch.testing.assert_close(found, exact_gradient(policy), rtol=1e-9, atol=1e-10)
    found = expectation(policy, everything, 1, partial(advantage, estimator=partial(gae, lam=0.0)))
    assert (found - exact_gradient(policy)).norm() > 0.1 * exact_gradient(policy).norm()


def test_the_score_has_expectation_zero(policy, everything):
    found = expectation(policy, everything, 1, lambda rollout: torch.ones_like(rollout.reward))
    assert found.abs().max() < 1e-14


def test_surrogate_clipped_surrogate_and_score_agree_at_the_old_policy(policy, everything):
    rollout, _ = everything
    advantage = torch.randn(rollout.reward.shape)
    of_score = estimate(policy, rollout, advantage)
    of_surrogate = estimate(policy, rollout, advantage, surrogate)
    of_clipped = estimate(policy, rollout, advantage, partial(clipped_surrogate, low=0.2, high=0.2))
    torch.testing.assert_close(of_surrogate, of_score, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(of_clipped, of_score, rtol=1e-12, atol=1e-14)
    assert of_score.norm() > 1e-3


def test_a_baseline_with_its_own_return_in_it_is_caught(policy, everything):
    def own_mean(rollout, target):
        return target.where(rollout.mask, 0.0).sum().div(rollout.mask.sum()).expand_as(target)

    found = expectation(policy, everything, 2, reinforced(reward_to_go, own_mean, discounted=True))
    assert (found - exact_gradient(policy)).norm() > 0.1 * exact_gradient(policy).norm()
