"""Samplers of small worlds: they sample what is enumerated, resume bit for bit, and every algorithm learns on them."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam

from policygrad.advantages import gae
from policygrad.algorithms.actor_critic import actor_critic, off_policy_actor_critic
from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.reinforce import reinforce
from policygrad.algorithms.trpo import npg, trpo
from policygrad.critics import fit_critic
from policygrad.errors import UserError
from policygrad.exact.closed_form import expected_return, optimal_probs, state_value, visitation
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, tabular
from policygrad.exact.sampler import CompletionSampler, EpisodeSampler
from policygrad.exact.tokens import OnPrefixes, TokenWorld, tree
from policygrad.exact.worlds import chain, garnet, with_clock


def uniform(world):
    return SoftmaxPolicy(tabular(*world.reward.shape))


def test_frequencies_are_the_visitation():
    world = with_clock(garnet(3, 2, 2, termination=0.2), 3)
    policy = uniform(world)
    rollout = EpisodeSampler(world, 20_000, 3)(policy)
    counted = torch.bincount(rollout.obs[rollout.mask], minlength=9) / 20_000
    torch.testing.assert_close(counted, visitation(world, probabilities(policy).detach(), 1.0), atol=0.02, rtol=0)
    logp = policy(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0)
    torch.testing.assert_close(rollout.logp, logp.detach(), rtol=0, atol=1e-15)


def test_termination_and_truncation_are_two_things():
    world = garnet(3, 2, 2, termination=0.3)
    rollout = EpisodeSampler(world, 500, 4)(uniform(world))
    assert (rollout.ended.sum(1) == 1).all()
    cut = rollout.ended & ~rollout.terminated
    assert cut.any()
    assert rollout.terminated.any()
    assert not cut[:, :-1].any()
    assert (rollout.mask.sum(1) == rollout.ended.int().argmax(1) + 1).all()
    assert (rollout.reward[~rollout.mask] == 0).all()
    successors = world.transition[rollout.obs[:, -1], rollout.action[:, -1], rollout.final_obs]
    assert (successors[cut[:, -1]] > 0).all()


def test_the_worlds_time_limit_is_the_horizon_and_none_is_refused():
    world = garnet(3, 2, 2)
    limited = type(world)(world.transition, world.reward, world.start, world.gamma, time_limit=6)
    assert EpisodeSampler(limited, 2)(uniform(world)).mask.shape == (2, 6)
    with pytest.raises(UserError, match="horizon"):
        EpisodeSampler(world, 2)


TOKENS = TokenWorld(2, 3, 3, lambda prompt, y: float(y[0] == prompt + 1) + 0.5 * (len(y) == 3))


def test_both_samplers_resume_bit_for_bit():
    world = chain(4)
    language = OnPrefixes(TOKENS, uniform(tree(TOKENS)))
    for sampler, policy in (
        (EpisodeSampler(world, 5, 6), uniform(world)),
        (CompletionSampler(TOKENS, 3, 2), language),
    ):
        sampler(policy)
        state = sampler.state_dict()
        first, second = sampler(policy), sampler(policy)
        assert not torch.equal(first.action, second.action)
        sampler.load_state_dict(state)
        assert torch.equal(sampler(policy).action, first.action)


def test_completions_come_in_groups_of_one_prompt():
    rollout = CompletionSampler(TOKENS, 5, 4)(OnPrefixes(TOKENS, uniform(tree(TOKENS))))
    assert not rollout.memoryless
    assert rollout.group.tolist() == [g for g in range(5) for _ in range(4)]
    assert (rollout.obs[:, 0].view(5, 4) == rollout.obs[::4, :1]).all()
    assert (rollout.obs[:, 0] >= TOKENS.vocabulary).all()


ALGORITHMS = {
    "reinforce": lambda p, c, s, o: reinforce(p, s, o, gamma=0.9),
    "actor_critic": lambda p, c, s, o: actor_critic(p, c, s, o, gamma=0.9, max_grad_norm=torch.inf),
    "off_policy_actor_critic": lambda p, c, s, o: off_policy_actor_critic(p, c, s, o, gamma=0.9),
    "ppo": lambda p, c, s, o: ppo(p, c, s, o, gamma=0.9, epochs=3, minibatch_size=128),
    "trpo": lambda p, c, s, o: trpo(p, c, s, fit_of(c), gamma=0.9),
    "npg": lambda p, c, s, o: npg(p, c, s, fit_of(c), gamma=0.9),
}


def fit_of(critic):
    return partial(fit_critic, critic=critic, optimizer=Adam(critic.parameters(), 0.05), epochs=3, minibatch_size=256)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_improves_j_as_it_is(name):
    torch.manual_seed(0)
    world = chain(4, gamma=0.9)
    policy, critic = uniform(world), TabularCritic(torch.zeros(4))
    before, best = (float(expected_return(world, p.detach())) for p in (probabilities(policy), optimal_probs(world)))
    optimizer = Adam([*policy.parameters(), *critic.parameters()], 0.05)
    run = ALGORITHMS[name](policy, critic, EpisodeSampler(world, 32, 20), optimizer)
    for _ in range(40):
        metrics = next(run)
        assert all(torch.as_tensor(x).isfinite() for x in metrics.values())
    after = float(expected_return(world, probabilities(policy).detach()))
    assert after > before + 0.5 * (best - before)


@pytest.mark.parametrize("name", ["reinforce", "trpo", "ppo"])
def test_the_same_algorithms_learn_language(name):
    torch.manual_seed(0)
    world = tree(TOKENS)
    table = uniform(world)
    policy, critic = OnPrefixes(TOKENS, table), OnPrefixes(TOKENS, TabularCritic(torch.zeros(len(world.start))))
    before = float(expected_return(world, probabilities(table).detach()))
    optimizer = Adam([*policy.parameters(), *critic.parameters()], 0.1)
    run = {
        "reinforce": lambda: reinforce(policy, CompletionSampler(TOKENS, 8, 8), optimizer, gamma=1.0),
        "trpo": lambda: trpo(policy, critic, CompletionSampler(TOKENS, 8, 8), fit_of(critic), gamma=1.0),
        "ppo": lambda: ppo(policy, critic, CompletionSampler(TOKENS, 8, 8), optimizer, gamma=1.0, epochs=2),
    }[name]()
    for _ in range(30):
        next(run)
    assert float(expected_return(world, probabilities(table).detach())) > before + 0.3  # of 1.5 at best


def test_one_step_of_gradient_ascent_with_an_exact_critic_raises_j():
    world = with_clock(garnet(3, 2, 2), 3)
    policy = uniform(world)
    before = expected_return(world, probabilities(policy).detach())
    critic = TabularCritic(state_value(world, probabilities(policy).detach()))
    run = actor_critic(
        policy, critic, EpisodeSampler(world, 5_000, 3), SGD(policy.parameters(), 0.1), advantages=partial(gae, lam=0.0)
    )
    next(run)
    assert expected_return(world, probabilities(policy).detach()) > before
