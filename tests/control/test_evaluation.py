"""Evaluation plays whole episodes, as many as asked, each environment its share, without noise unless asked."""

from typing import Any

import numpy as np
import pytest
import torch
from probes import ActionMatters, Counting, DelayedReward, Known, Potential, limited
from torch import Tensor, nn
from torch.distributions import Categorical

from policygrad.control import Policy, evaluate, make_environments
from policygrad.control.evaluation import time_limit
from policygrad.errors import UserError


def policy_for(environments: Any) -> Policy:
    return Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,))


class Coin(nn.Module):
    """Action 1 with probability 0.75: its mode is 1."""

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(probs=torch.tensor([0.25, 0.75]).expand(*obs.shape[:2], 2))


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("episodes", [1, 5, 6])
def test_it_plays_as_many_episodes_as_asked(count: int, episodes: int) -> None:
    environments = make_environments(lambda: Counting((3,)), count)
    returns, lengths = evaluate(policy_for(environments), environments, episodes, max_steps=50)
    assert returns.tolist() == [6.0] * episodes
    assert lengths.tolist() == [3] * episodes


def test_short_episodes_are_not_taken_more_often_than_long_ones() -> None:
    lengths = iter([1, 9])
    environments = make_environments(lambda: Counting((next(lengths),)), 2)
    played = evaluate(policy_for(environments), environments, 20, max_steps=50)[1]
    assert sorted(played.tolist()) == [1] * 10 + [9] * 10


def test_actions_are_the_mode_unless_they_are_to_be_sampled() -> None:
    environments = make_environments(ActionMatters, 4)
    assert evaluate(Coin(), environments, 40, max_steps=5)[0].tolist() == [1.0] * 40
    torch.manual_seed(0)
    noisy = evaluate(Coin(), environments, 400, max_steps=5, stochastic=True)[0]
    assert 0.65 < (noisy == 1).mean() < 0.85


def test_the_same_seed_plays_the_same_episodes() -> None:
    environments = make_environments(limited(Known, 8), 2)
    policy = policy_for(environments)
    first, again, other = (evaluate(policy, environments, 6, seed=seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


def test_an_episode_that_does_not_end_is_refused() -> None:
    environments = make_environments(Potential, 2)
    with pytest.raises(UserError, match=r"did not end within 20 steps.*time limit"):
        evaluate(policy_for(environments), environments, 2, max_steps=20)


@pytest.mark.parametrize("episodes", [0, -1])
def test_there_is_at_least_one_episode(episodes: int) -> None:
    environments = make_environments(DelayedReward, 1)
    with pytest.raises(UserError, match="episodes"):
        evaluate(policy_for(environments), environments, episodes)


@pytest.mark.parametrize(
    ("environment", "vectorization", "limit"),
    [
        ("CartPole-v1", "auto", 500),
        ("CartPole-v1", "sync", 500),
        ("Acrobot-v1", "async", 500),
        ("probes:Known-v0", "sync", 8),
        (limited(Known, 6), "sync", 6),
        (Known, "sync", None),
    ],
)
def test_the_time_limit_is_the_environments_own(environment: Any, vectorization: str, limit: int | None) -> None:
    environments = make_environments(environment, 2, vectorization=vectorization)
    assert time_limit(environments) == limit
    environments.close()


def test_a_time_limit_that_was_asked_for_goes_before_the_ids_own() -> None:
    assert time_limit(make_environments("CartPole-v1", 2, vectorization="sync", max_episode_steps=3)) == 3
