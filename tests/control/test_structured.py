"""Dict and Tuple actions: each part has the distribution that it has alone, and the environment gets its own."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch.distributions import Categorical, Distribution, Normal, kl_divergence

import policygrad as pg
from policygrad.control import Policy, Sampler, make_environments
from policygrad.control.distributions import JointActions
from policygrad.control.policies import head
from policygrad.control.spaces import FlatActions, describe, rebuild
from policygrad.errors import UserError

SPACE = spaces.Dict(
    {
        "move": spaces.Tuple([spaces.Box(-1, 3, (2,), np.float32), spaces.Discrete(3, start=5)]),
        "keys": spaces.MultiBinary(2),
        "gear": spaces.MultiDiscrete([2, 3], start=[1, 0]),
        "dial": spaces.Dict({"a": spaces.Box(0, 10, (1, 2), np.int16)}),
    }
)
OBSERVATIONS = spaces.Box(-9, 9, (3,), np.float32)


class Hybrid(gymnasium.Env):
    """Fails at an action that is none of its space; the nearer its numbers are to 1 the higher is the reward."""

    def __init__(self, space: spaces.Space = SPACE) -> None:
        self.observation_space, self.action_space = OBSERVATIONS, space
        self.seen: list[Any] = []

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.t = 0
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self.action_space.contains(action):
            raise RuntimeError(f"{action} is none of {self.action_space}")
        self.seen.append(action)
        self.t += 1
        far = np.abs(spaces.flatten(self.action_space, action).astype(float) - 1).sum()
        return self.np_random.normal(size=3).astype(np.float32), -float(far), self.t == 5, False, {}


def parts_alone(made: Any, features: torch.Tensor) -> list[Distribution]:
    """The distributions of the heads that each part would have alone."""
    found, start = [], 0
    for part, one in zip(made.space.parts, made.heads, strict=True):
        alone = head(part[0])
        alone.load_state_dict(one.state_dict())
        found.append(alone(features[..., start : start + alone.size]))
        start += alone.size
    assert start == made.size
    return found


def test_log_probabilities_entropies_and_divergences_are_sums_over_the_parts(float64: None) -> None:
    made = head(FlatActions(SPACE), initial_log_std=-0.5)
    features, other = torch.randn(2, 4, 6, made.size)
    distribution, q = made(features), made(other)
    action = distribution.sample()
    assert action.shape == (4, 6, 2 + 2 + 2 + 2 + 1)
    alone, alone_q = parts_alone(made, features), parts_alone(made, other)
    pieces = distribution.of_parts(action)
    for found, expected in (
        (distribution.log_prob(action), [p.log_prob(x) for p, x in zip(alone, pieces, strict=True)]),
        (distribution.entropy(), [p.entropy() for p in alone]),
        (kl_divergence(distribution, q), [kl_divergence(p, o) for p, o in zip(alone, alone_q, strict=True)]),
    ):
        assert found.shape == (4, 6)
        torch.testing.assert_close(found, sum(expected))
    torch.testing.assert_close(distribution.expand((2, 4, 6)).log_prob(action)[1], distribution.log_prob(action))
    torch.testing.assert_close(distribution.of_parts(distribution.mode)[0], alone[0].mode)


def test_a_density_and_a_probability_multiply(float64: None) -> None:
    """By the definition, of an action with one of each."""
    made = head(FlatActions(spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (1,))])))
    features = torch.randn(1, 1, 3)
    logits, mean = features[..., :2], features[..., 2]
    value = torch.tensor([[[1.0, 0.3]]])
    expected = Categorical(logits=logits).log_prob(torch.tensor(1)) + Normal(mean, 1.0).log_prob(torch.tensor(0.3))
    torch.testing.assert_close(made(features).log_prob(value), expected)


@pytest.mark.parametrize("space", [SPACE, SPACE["move"]], ids=["Dict", "Tuple"])
def test_an_action_goes_to_its_vector_and_back(space: spaces.Space) -> None:
    flat = FlatActions(space)
    assert describe(rebuild(describe(flat))) == describe(flat)
    made = head(flat)
    distribution = made(torch.randn(50, 1, made.size))
    action = distribution.sample()[:, 0]
    taken = distribution.to_environment(action)
    inside = torch.from_numpy(distribution.to_environment(distribution.mode[:, 0]))
    back = distribution.from_environment(inside.numpy())
    np.testing.assert_allclose(distribution.to_environment(torch.from_numpy(back)), inside, rtol=1e-6, atol=1e-6)
    batch = flat.structured(taken)
    np.testing.assert_array_equal(flat.vectors(batch), taken)
    for i in range(50):
        one = flat.structured(taken[i])
        assert space.contains(one)
        assert flat.contains(taken[i])
        np.testing.assert_array_equal(spaces.flatten(space, one), spaces.flatten(space, _row(batch, i)))


def _row(batch: Any, i: int) -> Any:
    if isinstance(batch, dict):
        return {name: _row(x, i) for name, x in batch.items()}
    return tuple(_row(x, i) for x in batch) if isinstance(batch, tuple) else batch[i]


@pytest.mark.parametrize("how", ["sync", "async", "vector", "vector of processes", "object"])
def test_environments_get_actions_of_their_space(how: str) -> None:
    next_step = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    given: Any = {
        "vector": lambda: SyncVectorEnv([Hybrid] * 2, **next_step),
        "vector of processes": lambda: AsyncVectorEnv([Hybrid] * 2, **next_step),
        "object": Hybrid,
    }
    if how in given:
        environments = make_environments(given[how](), 1 if how == "object" else 2)
    else:
        environments = make_environments(Hybrid, 2, vectorization=how)
    try:
        policy = Policy(environments.single_observation_space, environments.single_action_space)
        rollout = Sampler(environments, 20, seed=0)(policy)
    finally:
        environments.close()
    assert isinstance(policy(rollout.obs), JointActions)
    again = policy(rollout.obs).log_prob(rollout.action)
    torch.testing.assert_close(again.where(rollout.mask, 0.0), rollout.logp)
    assert {"action_std", "bound_fraction"} <= set(rollout.metrics)


@pytest.mark.parametrize("method", ["reinforce", "a2c", "npg", "trpo", "ppo", "grpo", "off_policy_actor_critic"])
def test_every_method_has_them(method: str, tmp_path: Path) -> None:
    task, out = "tests.control.test_structured:Hybrid", tmp_path / "run"
    run = pg.train(method, task, steps=300, out=out, progress=False, wrap=["TimeLimit:9"])
    again = pg.Run.load(out, trust=True)
    one = again.act(np.zeros(3, np.float32))
    assert SPACE.contains(one)
    np.testing.assert_array_equal(spaces.flatten(SPACE, one), spaces.flatten(SPACE, run.act(np.zeros(3, np.float32))))
    assert again.evaluate(3).returns == run.evaluate(3).returns


def test_a_policy_of_ones_own_may_act_on_the_vector() -> None:
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.nn.Parameter(torch.zeros(2))

        def forward(self, obs: torch.Tensor) -> Distribution:
            mean = self.mean.expand(*obs.shape[:2], 2)
            return torch.distributions.Independent(Normal(mean, 1.0), 1)

    space = spaces.Dict({"a": spaces.Box(-1, 1, (1,)), "b": spaces.Box(0, 2, (1,))})
    run = pg.train("ppo", lambda: Hybrid(space), policy=Own(), steps=64, num_steps=32, progress=False)
    assert space.contains(run.act(np.zeros(3, np.float32)))


def test_options_of_a_gaussian_are_for_the_boxes() -> None:
    made = head(FlatActions(spaces.Tuple([spaces.Discrete(2), spaces.Box(-1, 1, (3,))])), state_dependent_std=True)
    assert made.sizes == [2, 6]
    with pytest.raises(UserError, match="distribution is for Box actions"):
        head(FlatActions(spaces.Tuple([spaces.Discrete(2), spaces.MultiBinary(2)])), distribution="squashed")


def test_a_part_that_no_policy_can_have_is_refused() -> None:
    space = spaces.Dict({"a": spaces.Discrete(2), "text": spaces.Text(5)})
    with pytest.raises(UserError, match="a Text space is not supported: wrap the environment"):
        pg.train("ppo", lambda: Hybrid(space), steps=10, progress=False)
