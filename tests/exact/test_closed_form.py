"""The closed forms against autograd, against sums over all trajectories, and against numbers worked out by hand."""

import pytest
import torch

from policygrad.errors import UserError
from policygrad.exact import closed_form as exact
from policygrad.exact.enumeration import trajectories
from policygrad.exact.expected import gae_credit, n_step_credit, td_credit, vtrace_credit
from policygrad.exact.policies import BlindPolicy, SoftmaxPolicy, blind_to_time, probabilities, score_table, tabular
from policygrad.exact.worlds import (
    NAMES,
    World,
    bandit,
    chain,
    cliff,
    garnet,
    two_states,
    with_clock,
    with_history,
    world_named,
)

WORLDS = {
    "bandit": bandit(torch.tensor([[0.0, 1.0, -2.0], [0.5, 0.2, 0.1]], dtype=torch.float64)),
    "chain": chain(4),
    "cliff": cliff(3, 4),
    "garnet": garnet(5, 3, 2),
    "garnet that ends": garnet(5, 3, 2, termination=0.2),
    "two states": two_states(),
    "clock": with_clock(garnet(3, 2, 2, termination=0.1), 3),
}


@pytest.fixture(params=WORLDS)
def world(request):
    return WORLDS[request.param]


def random_policy(world, seed=0):
    features = tabular(*world.reward.shape)
    return SoftmaxPolicy(features, torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(seed)))


def table(world, seed=0):
    return probabilities(random_policy(world, seed)).detach()


def test_the_policy_gradient_theorem_is_the_gradient_of_j(world):
    policy = random_policy(world)
    j = exact.expected_return(world, probabilities(policy))
    probs = probabilities(policy).detach()
    found = exact.policy_gradient(world, probs, score_table(policy.features, probs))
    torch.testing.assert_close(found, torch.autograd.grad(j, policy.theta)[0])


def test_shared_features_are_differentiated_like_any(world):
    features = torch.randn(*world.reward.shape, 2)
    policy = SoftmaxPolicy(features, torch.tensor([0.3, -0.5]))
    j = exact.expected_return(world, probabilities(policy))
    probs = probabilities(policy).detach()
    found = exact.policy_gradient(world, probs, score_table(features, probs))
    torch.testing.assert_close(found, torch.autograd.grad(j, policy.theta)[0])


def test_values_satisfy_the_bellman_equations(world):
    probs = table(world)
    v, q = exact.state_value(world, probs), exact.action_value(world, probs)
    torch.testing.assert_close((probs * q).sum(1), v)
    torch.testing.assert_close(q, world.reward + world.gamma * world.transition @ v)
    assert (probs * exact.advantage(world, probs)).sum(1).abs().max() < 1e-12


def test_the_score_has_mean_zero(world):
    probs = table(world)
    score = score_table(tabular(*probs.shape), probs)
    assert torch.einsum("sa,san->sn", probs, score).abs().max() < 1e-15


def test_j_and_the_visitation_are_sums_over_all_trajectories():
    world, horizon = WORLDS["clock"], 3
    probs = table(world)
    rollout, probability = trajectories(world, probs, horizon)
    assert probability.sum() == pytest.approx(1, abs=1e-14)
    powers = world.gamma ** torch.arange(horizon)
    assert float(probability @ (rollout.reward * powers).sum(1)) == pytest.approx(
        float(exact.expected_return(world, probs)), abs=1e-12
    )
    for gamma, factor in ((world.gamma, powers), (1.0, torch.ones(horizon))):
        counted = torch.zeros(len(world.start)).index_add(
            0, rollout.obs.flatten(), (probability.unsqueeze(1) * rollout.mask * factor).flatten()
        )
        torch.testing.assert_close(counted, exact.visitation(world, probs, gamma))


def test_the_visitation_of_a_horizon_tends_to_the_whole(world):
    probs = table(world)
    whole = exact.visitation(world, probs, 0.5)
    torch.testing.assert_close(exact.visitation(world, probs, 0.5, 60), whole)
    assert (exact.visitation(world, probs, 0.5, 1) - world.start).abs().max() == 0


def test_the_fisher_matrix_is_the_hessian_of_the_kl(world):
    policy = random_policy(world)
    probs = probabilities(policy).detach()
    visits = exact.visitation(world, probs, 0.9)

    def divergence(theta):
        return exact.mean_kl(visits, probs, (policy.features @ theta).softmax(-1))

    hessian = torch.func.hessian(divergence)(policy.theta.detach())
    torch.testing.assert_close(exact.fisher(visits, probs, score_table(policy.features, probs)), hessian)


def test_the_natural_gradient_of_a_tabular_softmax_is_the_advantage():
    world = garnet(4, 3, 2)
    probs = table(world)
    score, visits = score_table(tabular(4, 3), probs), exact.visitation(world, probs, world.gamma)
    matrix = exact.fisher(visits, probs, score)
    natural = exact.natural_gradient(matrix, exact.policy_gradient(world, probs, score)).view(4, 3)
    # Kakade 2001, theorem 1, up to what changes no policy (a constant for each state) and the factor of d.
    found = natural - (probs * natural).sum(1, keepdim=True)
    torch.testing.assert_close(found, visits.sum() * exact.advantage(world, probs))


def test_performance_difference_and_lower_bound(world):
    old = table(world, 0)
    for seed in range(1, 6):
        new = table(world, seed)
        gained = exact.expected_return(world, new) - exact.expected_return(world, old)
        torch.testing.assert_close(exact.performance_difference(world, new, old), gained)
    if world.gamma < 1:
        for share in (0.01, 0.1, 1.0):
            near = (1 - share) * old + share * new
            assert exact.lower_bound(world, near, old) <= exact.expected_return(world, near)
    torch.testing.assert_close(exact.surrogate_return(world, old, old), exact.expected_return(world, old))


def test_the_surrogate_has_the_gradient_of_j_at_the_old_policy(world):
    policy = random_policy(world)
    old = probabilities(policy).detach()
    of_surrogate = torch.autograd.grad(exact.surrogate_return(world, probabilities(policy), old), policy.theta)[0]
    of_j = torch.autograd.grad(exact.expected_return(world, probabilities(policy)), policy.theta)[0]
    torch.testing.assert_close(of_surrogate, of_j)


def test_the_optimal_policy_has_no_advantage_left():
    world = garnet(5, 3, 2)
    best = exact.optimal_probs(world)
    assert exact.advantage(world, best).max() < 1e-12
    assert all(exact.expected_return(world, best) >= exact.expected_return(world, table(world, s)) for s in range(5))


def test_kl_of_two_policies_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    by_hand = 0.5 * torch.log(torch.tensor(2.0)) + 0.5 * torch.log(torch.tensor(2 / 3))
    torch.testing.assert_close(exact.kl_by_state(p, q)[0], by_hand)
    assert exact.kl_by_state(p, p).abs().max() == 0


def test_forbidden_actions_have_no_probability_and_no_part_in_the_divergence(world):
    states, actions = world.reward.shape
    features, allowed = tabular(states, actions), torch.ones(states, actions, dtype=torch.bool)
    allowed[:, 0] = torch.arange(states) % 2 == 0
    policy, other = (SoftmaxPolicy(features, torch.randn(features.shape[-1]), allowed) for _ in range(2))
    probs, probs_other = probabilities(policy), probabilities(other).detach()
    assert probs[~allowed].abs().max() == 0
    j = exact.expected_return(world, probs)
    found = exact.policy_gradient(world, probs.detach(), score_table(features, probs.detach()))
    torch.testing.assert_close(found, torch.autograd.grad(j, policy.theta)[0])
    divergence = torch.stack([
        (p[kept] * (p[kept] / q[kept]).log()).sum() for p, q, kept in zip(probs, probs_other, allowed, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(exact.kl_by_state(probs, probs_other), divergence)
    ratio = exact.ratio(probs, probs_other)
    assert ratio[~allowed].eq(1).all()
    torch.testing.assert_close(ratio[allowed], (probs / probs_other)[allowed])


def test_the_credits_of_an_exact_critic_are_its_advantages(world):
    probs = table(world)
    value, a = exact.state_value(world, probs), exact.advantage(world, probs)
    for credit in (
        td_credit(world, value),
        gae_credit(world, probs, value, 0.7),
        n_step_credit(world, probs, value, 3),
        vtrace_credit(world, probs, probs, value, 0.7, 1.0, 1.0),
    ):
        torch.testing.assert_close(credit, a)


def test_the_limits_of_the_credits_of_a_wrong_critic():
    world, value = garnet(4, 2, 2), torch.tensor([3.0, -1.0, 0.5, 2.0])
    probs = table(world)
    torch.testing.assert_close(gae_credit(world, probs, value, 0.0), td_credit(world, value))
    torch.testing.assert_close(n_step_credit(world, probs, value, 1), td_credit(world, value))
    monte_carlo = exact.action_value(world, probs) - value.unsqueeze(1)
    torch.testing.assert_close(gae_credit(world, probs, value, 1.0), monte_carlo)
    torch.testing.assert_close(n_step_credit(world, probs, value, 400), monte_carlo)
    unclipped = vtrace_credit(world, probs, table(world, 1), value, 1.0, torch.inf, torch.inf)
    torch.testing.assert_close(unclipped, probs / table(world, 1) * monte_carlo)


def test_a_clock_ends_a_world_and_leaves_its_rewards():
    world, horizon = garnet(3, 2, 2), 4
    clocked = with_clock(world, horizon)
    probs = table(world)
    j, reach = 0.0, world.start
    for t in range(horizon):
        j += world.gamma**t * reach @ (probs * world.reward).sum(1)
        reach = reach @ exact.transition_under(world, probs)
    torch.testing.assert_close(exact.expected_return(clocked, probs.repeat(horizon, 1)), j)
    assert blind_to_time(tabular(3, 2), horizon).shape == (12, 2, 6)


def test_a_history_is_what_was_seen_and_leaves_the_world_as_it_is():
    world, horizon, look = garnet(3, 2, 2), 3, torch.tensor([0, 1, 0])
    seeing, histories = with_history(world, look, horizon)
    newest = histories.gather(1, (histories >= 0).sum(1, keepdim=True) - 1).squeeze(1)
    state = torch.arange(3).repeat(7)
    assert torch.equal(newest, look[state])
    probs = table(world)  # of the state under the history
    j = exact.expected_return(with_clock(world, horizon), probs.repeat(horizon, 1))
    torch.testing.assert_close(exact.expected_return(seeing, probs[state]), j)
    here, action, there = seeing.transition.nonzero(as_tuple=True)
    torch.testing.assert_close(
        seeing.transition[here, action, there], world.transition[state[here], action, state[there]]
    )
    for before, after in zip(histories[here].tolist(), histories[there].tolist(), strict=True):
        seen = [x for x in before if x >= 0]
        assert after[: len(seen)] == seen  # the history goes on, by one look
        assert sum(x >= 0 for x in after) == len(seen) + 1


def test_worlds_are_what_they_say():
    world = cliff()
    assert world.reward.min() == -100
    start, goal = 36, 47
    assert world.transition[start, 1, start] == 1  # right of the start is the cliff, which leads back
    assert world.reward[start, 1] == -100
    assert world.transition[goal - 12, 2].sum() == 0  # down into the goal ends
    assert chain(5).transition[4, 1].sum() == pytest.approx(0.1)
    torch.testing.assert_close(garnet(6, 2, 3, termination=0.25).transition.sum(-1), torch.full((6, 2), 0.75))
    assert garnet(6, 2, 3, seed=1).transition.count_nonzero(-1).eq(3).all()
    assert not torch.equal(garnet(seed=0).reward, garnet(seed=1).reward)


def test_a_world_of_no_probabilities_is_refused():
    good = garnet()
    with pytest.raises(UserError, match="probabilities"):
        World(2 * good.transition, good.reward, good.start, 0.9)
    with pytest.raises(UserError, match="sums to 1"):
        World(good.transition, good.reward, good.start / 2, 0.9)
    with pytest.raises(UserError, match="gamma"):
        World(good.transition, good.reward, good.start, 1.5)


def test_a_world_too_large_to_enumerate_is_refused():
    world = garnet(4, 3, 3)
    with pytest.raises(UserError, match="more than 200,000 trajectories"):
        trajectories(world, table(world), 12)


def test_a_policy_that_is_blind_to_time_is_the_one_of_repeated_features():
    horizon, theta = 4, torch.randn(6)
    blind = BlindPolicy(tabular(3, 2), horizon, theta)
    plain = SoftmaxPolicy(blind_to_time(tabular(3, 2), horizon), theta)
    obs = torch.arange(12).view(3, 4)
    torch.testing.assert_close(blind(obs).probs, plain(obs).probs)
    torch.testing.assert_close(probabilities(blind), probabilities(plain))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "tokens"])
def test_a_world_is_made_by_its_name_with_a_time_limit(name):
    world = world_named(name)
    assert world.time_limit >= 1
    uniform = torch.full_like(world.reward, 1 / world.reward.shape[1])
    assert exact.optimal_return(world) > exact.expected_return(world, uniform)


def test_a_name_of_no_world_is_refused_with_the_nearest():
    for name, advice in (
        ("chian", "did you mean chain"),
        ("moon", "there are bandit, chain"),
        ("tokens", "token_world"),
    ):
        with pytest.raises(UserError, match=advice) as error:
            world_named(name)
        assert len(str(error.value)) <= 200
