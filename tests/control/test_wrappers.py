"""What wrappers learn in training is what an evaluation begins with, and it stays as it is."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, TimeLimit
from gymnasium.wrappers.utils import RunningMeanStd
from gymnasium.wrappers.vector import NormalizeObservation as NormalizeVectorObservation
from gymnasium.wrappers.vector import NormalizeReward as NormalizeVectorReward
from probes import Known, limited

from policygrad.control import Policy, Sampler, evaluate, make_environments
from policygrad.control.wrappers import Layers, Wrappers, merged
from policygrad.errors import UserError


class Recorded(Known):
    """Its observations, before any wrapper sees them."""

    seen: list[np.ndarray]

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def _obs(self) -> np.ndarray:
        self.seen.append(super()._obs())
        return self.seen[-1]


class OwnScale(gymnasium.Wrapper):
    """A wrapper of the user's: statistics in an object of its own, and a number that grows from step to step."""

    def __init__(self, environment: gymnasium.Env) -> None:
        super().__init__(environment)
        self.statistics, self.level, self.fixed = RunningMeanStd(shape=(3,)), 0, 7

    def reset(self, **options: Any) -> Any:
        obs, info = self.env.reset(**options)
        return self._scaled(obs), info

    def step(self, action: Any) -> Any:
        self.level += 1
        obs, *rest = self.env.step(action)
        return self._scaled(obs), *rest

    def _scaled(self, obs: np.ndarray) -> np.ndarray:
        self.statistics.update(obs[None])
        return ((obs - self.statistics.mean) / np.sqrt(self.statistics.var + 1e-8)).astype(np.float32)


def normalized(make: Any = Known) -> Any:
    return lambda: TimeLimit(NormalizeObservation(make()), 8)


def policy_of(environments: Any) -> Policy:
    return Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,))


def trained(environment: Any, count: int = 3, **how: Any) -> Any:
    """The environments after a rollout, the policy, and what the wrappers have learned."""
    environments = make_environments(environment, count, **how)
    policy = policy_of(environments)
    wrappers = Wrappers(environments)
    Sampler(environments, 40, seed=0)(policy)
    return environments, policy, wrappers.learned()


def test_the_statistics_of_all_copies_are_those_of_all_observations() -> None:
    made: list[Recorded] = []

    def make() -> Recorded:
        made.append(Recorded())
        return made[-1]

    _, _, learned = trained(normalized(make))
    seen = np.concatenate([x.seen for x in made]).astype(np.float64)
    assert learned.keys() == {f"NormalizeObservation.0.obs_rms.{x}" for x in ("mean", "var", "count")}
    count, mean, var = (learned[f"NormalizeObservation.0.obs_rms.{x}"] for x in ("count", "mean", "var"))
    assert count == pytest.approx(len(seen), abs=0.01)
    np.testing.assert_allclose(mean, seen.mean(0), rtol=1e-4)
    np.testing.assert_allclose(var, seen.var(0), rtol=1e-4)


def test_processes_learn_what_one_process_learns() -> None:
    found = []
    for vectorization in ("sync", "async"):
        torch.manual_seed(0)
        environments, _, learned = trained(normalized(), vectorization=vectorization)
        environments.close()
        found.append(learned)
    assert found[0].keys() == found[1].keys() != set()
    for name, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][name])


@pytest.mark.parametrize("wrap", [NormalizeObservation, OwnScale])
def test_an_evaluation_sees_the_observations_by_the_statistics_of_training(wrap: Any) -> None:
    """Computed by hand from the raw observations."""
    _, policy, learned = trained(lambda: TimeLimit(wrap(Known()), 8))
    place = next(name for name in learned if name.endswith(".mean")).removesuffix(".mean")
    made: list[Recorded] = []

    def make() -> gymnasium.Env:
        made.append(Recorded())
        return TimeLimit(wrap(made[-1]), 8)

    shown: list[np.ndarray] = []

    class Watching(torch.nn.Module):
        def forward(self, obs: torch.Tensor) -> Any:
            shown.append(obs[:, 0].numpy().copy())
            return policy(obs)

    evaluate(Watching(), make, 1, learned=learned, stochastic=True)
    raw = np.stack(made[0].seen)[: len(shown)]
    expected = (raw - learned[f"{place}.mean"]) / np.sqrt(learned[f"{place}.var"] + 1e-8)
    tolerance = 1e-5 if wrap is NormalizeObservation else 0.1  # the user's own sees each observation once
    steps = min(len(raw), 8)
    np.testing.assert_allclose(np.concatenate(shown)[:steps], expected[:steps], atol=tolerance)


def test_an_evaluation_is_the_same_however_many_episodes_came_before() -> None:
    _, policy, learned = trained(normalized())
    one, many = (evaluate(policy, normalized(), n, seed=3, learned=learned) for n in (16, 64))
    assert one.returns == many.returns[:16]


def test_numbers_of_a_users_own_wrapper_that_changed_go_along() -> None:
    environments, _, learned = trained(lambda: TimeLimit(OwnScale(Known()), 8), 1)
    inside = environments.envs[0].get_wrapper_attr("level")
    assert learned["OwnScale.0.level"] == inside > 30
    assert "OwnScale.0.fixed" not in learned, "a setting is none of what was learned"
    made: list[OwnScale] = []

    def make() -> gymnasium.Env:
        made.append(OwnScale(Known()))
        return TimeLimit(made[-1], 8)

    with Wrappers(make_environments(make, 1)).frozen(learned) as held:
        assert (made[0].level, made[0].fixed, type(made[0].level)) == (inside, 7, int)
        held.reset(seed=0)
        held.step(np.zeros((1, 2), np.float32))
        np.testing.assert_array_equal(made[0].statistics.mean, learned["OwnScale.0.statistics.mean"])
    assert made[0].level == 0, "undone afterwards"


def test_a_vector_wrapper_keeps_its_statistics_through_an_evaluation() -> None:
    environments = NormalizeVectorObservation(SyncVectorEnv([limited(Known, 8)] * 3))
    policy = policy_of(environments)
    Sampler(environments, 40, seed=0)(policy)
    before = [np.array(x) for x in (environments.obs_rms.mean, environments.obs_rms.var, environments.obs_rms.count)]
    first, again = (evaluate(policy, environments, 6, seed=4) for _ in range(2))
    assert first == again
    after = (environments.obs_rms.mean, environments.obs_rms.var, environments.obs_rms.count)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)
    assert environments.update_running_mean


@pytest.mark.parametrize("vector", [False, True])
def test_the_return_is_counted_before_rewards_are_normalized(vector: bool) -> None:
    """By wrappers that have learned a scale, in one environment each or around all of them."""
    if vector:
        environments: Any = NormalizeVectorReward(SyncVectorEnv([limited(Known, 8)] * 5))
    else:
        environments = SyncVectorEnv([lambda: TimeLimit(NormalizeReward(Known()), 8)] * 5)
    policy = policy_of(environments)
    Sampler(environments, 40, seed=0)(policy)
    plain, found = (evaluate(policy, x, 5, seed=1) for x in (limited(Known, 8), environments))
    assert found.returns == pytest.approx(plain.returns, rel=1e-6)
    assert Wrappers(environments).learned() == {}, "no policy looks at it"


@pytest.mark.parametrize(
    ("environment", "learned", "said"),
    [
        (normalized(), None, r"NormalizeObservation has seen nothing yet: .*learned="),
        (normalized(), {}, r"NormalizeObservation has statistics, and training had none"),
        (limited(Known, 8), "those", r"^training had NormalizeObservation around the environment"),
        (lambda: AsyncVectorEnv([normalized()] * 2), None, r"learns in .*processes.*, out of reach"),
    ],
    ids=["fresh", "training without", "evaluation without", "processes"],
)
def test_statistics_that_are_not_there_are_one_line(environment: Any, learned: Any, said: str) -> None:
    _, policy, those = trained(normalized())
    environment = environment() if said.startswith("learns") else environment
    try:
        with pytest.raises(UserError, match=said) as raised:
            evaluate(policy, environment, 2, learned=those if learned == "those" else learned)
    finally:
        if isinstance(environment, AsyncVectorEnv):
            environment.close()
    assert len(str(raised.value)) <= 200


def test_statistics_of_another_shape_are_one_line() -> None:
    _, policy, learned = trained(normalized())
    learned = {name: x[:1] if np.ndim(x) else x for name, x in learned.items()}
    with pytest.raises(UserError, match=r"statistics of shape \(3,\) here and \(1,\) in training"):
        evaluate(policy, normalized(), 2, learned=learned)


def test_what_gymnasium_keeps_in_a_wrapper_is_not_learned() -> None:
    class Counted(gymnasium.Wrapper):
        count = 0

        def step(self, action: Any) -> Any:
            self.count += 1
            return super().step(action)

    environments = make_environments(lambda: Counted(gymnasium.make("CartPole-v1")), 2)
    wrappers = Wrappers(environments)
    assert all(x.spec is not None for x in environments.envs), "from now on in the wrapper"
    Sampler(environments, 5, seed=0)(policy_of(environments))
    assert wrappers.learned() == {"Counted.0.count": 5}


def test_merging_one_copy_changes_nothing() -> None:
    one = {"A.0.mean": np.array([0.1, 0.7]), "A.0.var": np.array([1.3, 0.2]), "A.0.count": np.array(7.5)}
    for name, x in merged([one]).items():
        np.testing.assert_array_equal(x, one[name])


def test_an_environment_without_wrappers_has_learned_nothing() -> None:
    class Physics(Known):
        def step(self, action: Any) -> Any:
            self.energy = float(np.sum(action))  # of a state that a reset sets
            return super().step(action)

    _, _, learned = trained(limited(Physics, 8))
    assert learned == {}
    assert Layers(Known()).learned() == {}


def test_statistics_inside_the_environment_itself_are_learned_too() -> None:
    class Normalizing(Known):
        def __init__(self) -> None:
            super().__init__()
            self.obs_rms = RunningMeanStd(shape=(3,))

        def _obs(self) -> np.ndarray:
            obs = super()._obs()
            self.obs_rms.update(obs[None])
            return obs

    _, _, learned = trained(limited(Normalizing, 8))
    assert set(learned) == {f"Normalizing.0.obs_rms.{x}" for x in ("mean", "var", "count")}
    assert spaces.Box(-np.inf, np.inf, (3,)).shape == learned["Normalizing.0.obs_rms.mean"].shape
