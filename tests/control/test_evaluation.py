"""Evaluation plays the requested number of whole episodes, the same number in every environment."""

import json
import tracemalloc
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from probes import ActionMatters, Counting, DelayedReward, Known, Potential, limited
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent

from policygrad.control import (
    Evaluation,
    ObservationNormalizer,
    Policy,
    Sampler,
    evaluate,
    make_environments,
)
from policygrad.control.acting import Mode
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
    found = evaluate(policy_for(environments), environments, episodes, max_steps=50)
    assert found == Evaluation(6.0, 0.0, 3.0, episodes, [6.0] * episodes, [3] * episodes)


def test_short_episodes_are_not_taken_more_often_than_long_ones() -> None:
    lengths = iter([1, 9])
    environments = make_environments(lambda: Counting((next(lengths),)), 2)
    played = evaluate(policy_for(environments), environments, 20, max_steps=50)
    assert sorted(played.lengths) == [1] * 10 + [9] * 10
    assert (played.length_mean, played.return_mean, played.return_std) == (5, (1 + 45) / 2, (45 - 1) / 2)


def test_actions_are_the_mode_unless_they_are_to_be_sampled() -> None:
    environments = make_environments(ActionMatters, 4)
    assert evaluate(Coin(), environments, 40, max_steps=5).returns == [1.0] * 40
    noisy = evaluate(Coin(), environments, 400, max_steps=5, stochastic=True)
    assert 0.65 < np.mean(np.array(noisy.returns) == 1) < 0.85


def test_the_same_seed_plays_the_same_episodes() -> None:
    environments = make_environments(limited(Known, 8), 2)
    policy = policy_for(environments)
    first, again, other = (evaluate(policy, environments, 6, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.returns != other.returns


def test_an_episode_that_does_not_end_is_refused() -> None:
    environments = make_environments(Potential, 2)
    environments.unwrapped.max_episode_steps = 20  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"did not end within 20 steps.*time limit"):
        evaluate(policy_for(environments), environments, 2)


def test_max_steps_cuts_an_episode_that_does_not_end() -> None:
    environments = make_environments(Potential, 2)
    found = evaluate(policy_for(environments), environments, 3, max_steps=20)
    assert (found.lengths, found.returns) == ([20] * 3, [20 * 21 / 2 - 0.5 * (21 * 22 / 2 - 1)] * 3)


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
        (limited(Known, 6), "async", 6),
        (lambda: gymnasium.make("CartPole-v1"), "sync", 500),
        (lambda: gymnasium.make("CartPole-v1"), "async", 500),
        (Known, "async", None),
        (Known, "sync", None),
    ],
)
def test_the_time_limit_is_the_environments_own(environment: Any, vectorization: str, limit: int | None) -> None:
    environments = make_environments(environment, 2, vectorization=vectorization)
    assert time_limit(environments) == limit
    environments.close()


def test_a_time_limit_that_was_asked_for_goes_before_the_ids_own() -> None:
    three = {"max_episode_steps": 3}
    assert time_limit(make_environments("CartPole-v1", 2, vectorization="sync", env_options=three)) == 3


@pytest.mark.parametrize("vectorization", ["auto", "sync", "async"])
def test_a_time_limit_that_was_asked_for_is_kept_in_every_form(vectorization: str) -> None:
    three = {"max_episode_steps": 3}
    environments = make_environments("CartPole-v1", 2, vectorization=vectorization, env_options=three)
    assert time_limit(environments) == 3
    environments.close()


class Named(Known):
    """Observations that have to be flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"x": spaces.Discrete(3)})

    def reset(self, **options: Any) -> Any:
        return {"x": 0}, super().reset(**options)[1]

    def step(self, action: Any) -> Any:
        return {"x": 1}, *super().step(action)[1:]


@pytest.mark.parametrize("make", [Known, Named])
@pytest.mark.parametrize("vector", [SyncVectorEnv, AsyncVectorEnv])
def test_a_time_limit_is_found_inside_a_vector_environments_wrappers(make: Any, vector: Any) -> None:
    environments = make_environments(RecordEpisodeStatistics(vector([limited(make, 7)] * 2)))
    assert time_limit(environments) == 7
    environments.close()


def test_the_longest_of_several_time_limits_counts_and_one_that_lacks_it_has_none() -> None:
    def limit(*makers: Any) -> int | None:
        return time_limit(SyncVectorEnv(makers))

    assert limit(lambda: TimeLimit(Known(), 5), lambda: TimeLimit(Known(), 9)) == 9
    assert limit(lambda: TimeLimit(Known(), 5), Known) is None


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_is_played_is_what_a_rollout_of_whole_episodes_holds(mode: AutoresetMode, stochastic: bool) -> None:
    environments = SyncVectorEnv([limited(Known, 8)] * 3, autoreset_mode=mode)
    policy, normalizer = policy_for(environments), ObservationNormalizer((1,))
    normalizer.statistics.mean += 0.5
    found = evaluate(policy, environments, 6, seed=4, stochastic=stochastic, normalizer=normalizer)
    normalizer.frozen = True
    seeds = np.random.SeedSequence(4, spawn_key=(1,))
    sample = Sampler(environments, 8, seed=seeds, whole_episodes=True, observation_normalizer=normalizer)
    torch.manual_seed(4)
    rollouts = [sample(policy if stochastic else Mode(policy)) for _ in range(2)]
    assert found.returns == [x for r in rollouts for x in r.reward.double().sum(1).tolist()]
    assert found.lengths == [x for r in rollouts for x in r.mask.sum(1).tolist()]
    assert len(set(found.lengths)) > 1
    assert not normalizer.statistics.count, "the statistics are frozen"


def test_memory_does_not_grow_with_the_limit() -> None:
    class Image(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Box(0, 255, (16, 16, 3), np.uint8)

        def _obs(self) -> Any:
            return np.zeros((16, 16, 3), np.uint8)

    environments = make_environments(Image, 2)
    policy = policy_for(environments)
    tracemalloc.start()
    try:
        evaluate(policy, environments, 2)  # 100,000 steps of 768 numbers would be 600 MB
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


class Undecided(nn.Module):
    """A policy of the user's own that throws fair coins."""

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Bernoulli(logits=torch.zeros(*obs.shape[:2], 3)), 1)


@pytest.mark.parametrize("own", [False, True])
def test_the_mode_of_a_fair_coin_is_0(own: bool) -> None:
    seen = []

    class Seen(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.action_space = spaces.MultiBinary(3)

        def _obs(self) -> Any:
            return np.zeros(2, np.float32)

        def step(self, action: Any) -> Any:
            seen.append(action.tolist())
            return super().step(action)

    environments = make_environments(Seen, 1)
    evaluate(Undecided() if own else policy_for(environments), environments, 1)
    assert seen == [[0, 0, 0]] * 2


def test_the_mode_of_a_squashed_policy_arrives_squashed() -> None:
    seen = []

    class Seen(Known):
        def __init__(self) -> None:
            super().__init__(spaces.Box(-2.0, 2.0, (1,), np.float32))

        def step(self, action: Any) -> Any:
            seen.append(action)
            return super().step(action)

    environments = make_environments(limited(Seen, 4), 1)
    space, actions = environments.single_observation_space, environments.single_action_space
    policy = Policy(space, actions, distribution="squashed")
    with torch.no_grad():
        policy.network[-1].weight.zero_()  # type: ignore[operator, union-attr]
        policy.network[-1].bias.fill_(0.5)  # type: ignore[operator, union-attr]
    evaluate(policy, environments, 1)
    np.testing.assert_allclose(seen, 0.924234, rtol=1e-6)  # 2 tanh(0.5)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 4)

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Bernoulli(logits=self.head(self.cell(obs)[0])), 1)


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_policy_with_memory_is_refused(stochastic: bool) -> None:
    environments = make_environments(limited(lambda: Known(spaces.MultiBinary(4)), 8), 1)
    with pytest.raises(UserError, match=r"^the policy's output at a step depends on other steps of its row"):
        evaluate(Recurrent(), environments, 1, stochastic=stochastic)


def test_an_evaluation_in_one_line_and_as_json() -> None:
    found = Evaluation(1500.0, 0.25, 500.0, 2, [1499.75, 1500.25], [500, 500])
    assert found.line() == "return 1,500.0 +- 0.2, length 500.0, 2 episodes"
    assert json.loads(json.dumps(found.summary())) == {
        "return_mean": 1500.0,
        "return_std": 0.25,
        "length_mean": 500.0,
        "episodes": 2,
        "returns": [1499.75, 1500.25],
        "lengths": [500, 500],
        "success": None,
        "info": {},
    }


def known(actions: spaces.Space | None = None) -> Policy:
    return Policy(spaces.Box(-np.inf, np.inf, (3,)), actions or spaces.Box(-1.0, 1.0, (2,)), hidden=(4,))


@pytest.mark.parametrize("stochastic", [False, True])
def test_an_evaluation_on_an_environment_has_its_own_random_stream(stochastic: bool) -> None:
    policy, found = known(), []
    for state in (1, 2):
        torch.manual_seed(state)
        found.append(evaluate(policy, "probes:Known-v0", 5, seed=7, stochastic=stochastic))
        after = torch.rand(1)
        torch.manual_seed(state)
        assert torch.equal(torch.rand(1), after)
    assert found[0] == found[1]
    assert found[0].episodes == 5
    assert found[0] != evaluate(policy, "probes:Known-v0", 5, seed=8, stochastic=stochastic)


def test_an_evaluation_closes_the_environments_that_it_made() -> None:
    closed = []

    class Closing(Known):
        def close(self) -> None:
            closed.append(self)

    own = limited(Closing, 4)()
    evaluate(known(), own, 2)
    assert not closed, "an environment that was passed in stays open"
    evaluate(known(), limited(Closing, 4), 2)
    assert len(closed) == 2


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UserError, match=f"seed is {seed}"):
        evaluate(known(), "probes:Known-v0", 1, seed=seed)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (lambda: known(spaces.Discrete(2)), "action space"),
        (lambda: known(spaces.Box(-2.0, 2.0, (2,))), "action space"),
        (lambda: Policy(spaces.Box(-1, 1, (4,)), spaces.Box(-1.0, 1.0, (2,))), "observation space"),
    ],
)
def test_an_environment_of_other_spaces_is_refused(policy: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^the {said} of probes:Known-v0") as raised:
        evaluate(policy(), "probes:Known-v0", 1)
    assert len(str(raised.value)) <= 200


def test_other_bounds_of_observations_are_no_other_space() -> None:
    policy = Policy(spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1.0, 1.0, (2,)))
    assert evaluate(policy, "probes:Known-v0", 1).episodes == 1
