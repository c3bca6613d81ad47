"""Samplers of small worlds: they sample what is enumerated, resume bit for bit, and every method learns on them."""

from dataclasses import replace

import pytest
import torch
from oracles import composed
from torch.optim import SGD

from policygrad.errors import UserError
from policygrad.exact.closed_form import expected_return, optimal_return, state_value, visitation
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, tabular
from policygrad.exact.sampler import CompletionSampler, EpisodeSampler
from policygrad.exact.tokens import OnPrefixes, TokenWorld, tree
from policygrad.exact.worlds import chain, garnet, with_clock
from policygrad.updates import ascend


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


LEARNERS = ["reinforce", "actor_critic", "off_policy_actor_critic", "ppo", "trpo", "npg"]


def rates(name):
    given = {"critic_learning_rate": 0.05} | ({"learning_rate": 0.05} if name not in ("trpo", "npg") else {})
    return given | ({"epochs": 3, "minibatch_size": 128} if name == "ppo" else {})


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_improves_j_as_it_is(name):
    world = chain(4, gamma=0.9)
    policy, critic = uniform(world), TabularCritic(torch.zeros(4))
    before, best = float(expected_return(world, probabilities(policy).detach())), float(optimal_return(world))
    run = iter(composed(name, policy, EpisodeSampler(world, 32, 20), critic, gamma=0.9, **rates(name)))
    for _ in range(20):
        metrics = next(run)
        assert all(torch.as_tensor(x).isfinite() for x in metrics.values())
    after = float(expected_return(world, probabilities(policy).detach()))
    assert after > before + 0.25 * (best - before)


@pytest.mark.parametrize("name", ["reinforce", "trpo", "ppo", "grpo"])
def test_the_same_methods_learn_language(name):
    world = tree(TOKENS)
    table = uniform(world)
    policy, critic = OnPrefixes(TOKENS, table), OnPrefixes(TOKENS, TabularCritic(torch.zeros(len(world.start))))
    before = float(expected_return(world, probabilities(table).detach()))
    given = {"learning_rate": 0.1} if name == "grpo" else rates(name)
    run = iter(composed(name, policy, CompletionSampler(TOKENS, 8, 8), critic, **given))
    for _ in range(30):
        next(run)
    assert float(expected_return(world, probabilities(table).detach())) > before + 0.3  # of 1.5 at best


def test_one_step_of_gradient_ascent_with_an_exact_critic_raises_j():
    world = with_clock(garnet(3, 2, 2), 3)
    policy = uniform(world)
    before = expected_return(world, probabilities(policy).detach())
    critic = TabularCritic(state_value(world, probabilities(policy).detach())).requires_grad_(False)
    learner = composed("actor_critic", policy, EpisodeSampler(world, 5_000, 3), critic, gamma=0.9, lam=0.0)
    next(iter(replace(learner, update=ascend(SGD(policy.parameters(), 0.1)))))
    assert expected_return(world, probabilities(policy).detach()) > before


def test_both_count_what_they_have_played():
    world = chain(4)
    language = OnPrefixes(TOKENS, uniform(tree(TOKENS)))
    for sampler, policy, rows in (
        (EpisodeSampler(world, 5, 6), uniform(world), 5),
        (CompletionSampler(TOKENS, 3, 2), language, 6),
    ):
        first, second = sampler(policy), sampler(policy)
        assert sampler.steps == first.mask.sum() + second.mask.sum() == second.metrics["steps"]
        assert sampler.episodes == 2 * rows == second.metrics["episodes"]
        assert second.metrics["return"] == pytest.approx(float(second.reward.sum(1).mean()))
        assert second.metrics["length"] == pytest.approx(float(second.mask.sum(1).double().mean()))
        another = type(sampler)(*((world, 5, 6) if rows == 5 else (TOKENS, 3, 2)))
        another.load_state_dict(sampler.state_dict())
        assert another(policy).metrics == sampler(policy).metrics


def test_groups_of_answers_are_measured():
    rollout = CompletionSampler(TOKENS, 4, 3)(OnPrefixes(TOKENS, uniform(tree(TOKENS))))
    score = rollout.reward.sum(1).view(4, 3)
    spread = score.std(1, correction=0)
    assert rollout.metrics["reward"] == pytest.approx(float(score.mean()))
    assert rollout.metrics["group_std"] == pytest.approx(float(spread.mean()))
    assert rollout.metrics["flat_groups"] == pytest.approx(float((spread == 0).double().mean()))


def test_episodes_from_the_same_start_are_a_group():
    world = garnet(3, 2, 2)
    rollout = EpisodeSampler(world, 20, 4)(uniform(world))
    assert torch.equal(rollout.group, rollout.obs[:, 0])
    assert len(rollout.group.unique()) > 1


def test_the_draws_are_those_of_the_seed():
    world = chain(4)
    first = EpisodeSampler(world, 3, 5, seed=3)(uniform(world)).action
    assert first.tolist() == [[1, 0, 0, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]


def test_the_greedy_return_is_that_of_the_most_likely_actions_from_the_rows_start(float64):
    """In worlds without chance; what is sampled first is as it was."""
    world, nodes = chain(4, slip=0.0), tree(TOKENS)
    control = SoftmaxPolicy(tabular(*world.reward.shape), torch.randn(world.reward.numel()))
    table = SoftmaxPolicy(tabular(*nodes.reward.shape), torch.randn(nodes.reward.numel()))
    for make, policy, on, probs in (
        (lambda **o: EpisodeSampler(world, 6, 5, **o), control, world, probabilities(control)),
        (lambda **o: CompletionSampler(TOKENS, 5, 3, **o), OnPrefixes(TOKENS, table), nodes, probabilities(table)),
    ):
        plain, rollout = make()(policy), make(greedy=True)(policy)
        assert plain.greedy is None
        assert torch.equal(plain.action, rollout.action)
        starts = rollout.group if on is world else rollout.obs[:, 0] - TOKENS.vocabulary
        for start, found in zip(starts.tolist(), rollout.greedy.tolist(), strict=True):
            state, total = start, 0.0
            for _ in range(5):
                action = int(probs[state].argmax())
                total += float(on.reward[state, action])
                if not on.transition[state, action].any():
                    break
                state = int(on.transition[state, action].argmax())
            assert found == pytest.approx(total)
