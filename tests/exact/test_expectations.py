"""The expectation of every estimator over ALL trajectories (pairs, triples) of a small world is the exact gradient."""

from functools import partial

import pytest
import torch

from policygrad.advantages import gae, mean_baseline, monte_carlo_advantage, no_baseline, time_mean_baseline
from policygrad.algorithms.actor_critic import ActorCriticObjective
from policygrad.algorithms.grpo import GRPOObjective
from policygrad.algorithms.ppo import PPOObjective
from policygrad.algorithms.reinforce import ReinforceObjective
from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.credit import Credit, baselined, bootstrapped
from policygrad.credit import discounted as credit_times_discount
from policygrad.critics import optimal_baseline, value_baseline
from policygrad.exact.closed_form import policy_gradient, state_value, visitation, weighted_gradient
from policygrad.exact.enumeration import batches, trajectories, with_holes
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, score_table, tabular
from policygrad.exact.worlds import garnet, with_clock
from policygrad.linalg import flat_gradient
from policygrad.objectives import clipped_weight
from policygrad.returns import reward_to_go, trajectory_return
from policygrad.rollout import decisions
from policygrad.weights import per_episode

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


def estimate(objective, rollout, credit):
    """The gradient that a method would follow on this rollout."""
    batch = decisions(rollout, per_episode(rollout.mask), *credit(rollout))
    return flat_gradient(objective(batch)[0], list(objective.policy.parameters()))


def expectation(policy, everything, size, credit):
    """The sum over all batches of `size` trajectories of the batch's probability times its estimate."""
    rollout, probability = everything
    index, weight = batches(probability, size)
    objective = ReinforceObjective(policy)
    return sum(w * estimate(objective, rollout.rows(i), credit) for w, i in zip(weight, index, strict=True))


def reinforced(returns, baseline, discounted):
    credit = baselined(partial(returns, gamma=WORLD.gamma), baseline)
    return credit_times_discount(credit, WORLD.gamma) if discounted else credit


def led_by(critic, estimator):
    return credit_times_discount(bootstrapped(critic, partial(estimator, gamma=WORLD.gamma)), WORLD.gamma)


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
    found = expectation(policy, everything, 1, led_by(critic, partial(gae, lam=lam)))
    torch.testing.assert_close(found, exact_gradient(policy), rtol=1e-9, atol=1e-10)


def test_monte_carlo_with_a_wrong_critic_is_unbiased_and_one_step_is_not(policy, everything):
    critic = TabularCritic(torch.tensor([3.0, -1.0, 2.0, 0.5]))
    found = expectation(policy, everything, 1, led_by(critic, monte_carlo_advantage))
    torch.testing.assert_close(found, exact_gradient(policy), rtol=1e-9, atol=1e-10)
    found = expectation(policy, everything, 1, led_by(critic, partial(gae, lam=0.0)))
    assert (found - exact_gradient(policy)).norm() > 0.1 * exact_gradient(policy).norm()


def credit_of(advantage):
    return lambda rollout: Credit(advantage, torch.zeros_like(advantage), torch.zeros_like(advantage))


def test_the_score_has_expectation_zero(policy, everything):
    found = expectation(policy, everything, 1, lambda rollout: credit_of(torch.ones_like(rollout.reward))(rollout))
    assert found.abs().max() < 1e-14


def test_every_objective_has_the_same_gradient_at_the_old_policy(policy, everything):
    rollout, _ = everything
    credit = credit_of(torch.randn(rollout.reward.shape))
    of_score = estimate(ReinforceObjective(policy), rollout, credit)
    assert of_score.norm() > 1e-3
    for objective in (
        ActorCriticObjective(policy, None),
        SurrogateObjective(policy),
        PPOObjective(policy, None),
        GRPOObjective(policy),
        GRPOObjective(policy, gain=clipped_weight),
    ):
        torch.testing.assert_close(estimate(objective, rollout, credit), of_score, rtol=1e-12, atol=1e-14)


def test_holes_change_no_expectation(policy, everything):
    rollout, probability = everything
    holed = with_holes(rollout, seed=1), probability
    critic = TabularCritic(state_value(WORLD, probabilities(policy).detach()))
    found = expectation(policy, holed, 1, led_by(critic, partial(gae, lam=0.7)))
    torch.testing.assert_close(found, exact_gradient(policy), rtol=1e-9, atol=1e-10)


def test_holes_stand_everywhere_and_are_none_of_the_decisions(policy, everything):
    rollout, _ = everything
    for hole in (None, -1):
        holed = with_holes(rollout, 4, hole=hole)
        rows, steps = rollout.mask.shape
        assert holed.mask.shape == (rows, steps + 4)
        for name in ("obs", "action", "logp", "reward", "terminated", "ended"):
            assert torch.equal(getattr(holed, name)[holed.mask], getattr(rollout, name)[rollout.mask]), name
        assert torch.equal(holed.ended.sum(1), rollout.ended.sum(1))
        before = holed.mask.cumsum(1) == 0
        assert before.any()
        assert (~holed.mask & ~before & (holed.mask.flip(1).cumsum(1).flip(1) > 0)).any()  # between decisions
        assert (holed.obs[~holed.mask].min() == -1) == (hole == -1)


def test_a_baseline_with_its_own_return_in_it_is_caught(policy, everything):
    def own_mean(rollout, target):
        return target.where(rollout.mask, 0.0).sum().div(rollout.mask.sum()).expand_as(target)

    found = expectation(policy, everything, 2, reinforced(reward_to_go, own_mean, discounted=True))
    assert (found - exact_gradient(policy)).norm() > 0.1 * exact_gradient(policy).norm()
