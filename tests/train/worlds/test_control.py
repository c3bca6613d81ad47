"""Control: any Gymnasium environment, by any method, however its copies are stepped."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv
from probes import Known
from torch import nn

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train.methods import METHODS
from policygrad.train.options import options_of
from policygrad.train.worlds import kind_of
from policygrad.train.worlds.control import observations, own_module

SMALL: dict[str, Any] = {"hidden": (8,), "num_envs": 4, "iterations": 2, "progress": False, "preset": "none"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_an_environment(method: str) -> None:
    run = pg.train(method, "CartPole-v1", **SMALL)
    assert len(run.metrics) == 2
    assert (run.critic is None) == (
        options_of(method, "control")().credit in ("group",) or method == "reinforce_plus_plus"
    )
    assert run.evaluate(2).episodes == 2


@pytest.mark.parametrize(
    ("environment", "vectorization", "kind"),
    [
        ("CartPole-v1", "auto", CartPoleVectorEnv),
        ("CartPole-v1", "sync", SyncVectorEnv),
        ("Acrobot-v1", "auto", SyncVectorEnv),
        ("probes:Known-v0", "async", AsyncVectorEnv),
    ],
)
@pytest.mark.parametrize("method", ["actor_critic", "grpo"])
def test_vectorization_says_how_the_environments_are_stepped(
    method: str, environment: str, vectorization: str, kind: type
) -> None:
    with pg.Training(method, environment, vectorization=vectorization, num_envs=2, preset="none") as training:
        assert isinstance(training.world.environments.unwrapped, kind)


def test_groups_smaller_than_the_rollout_need_a_seed_for_each_environment() -> None:
    """A native vector environment takes one for all, so that its copies would start alike or not at all."""
    with pg.Training("grpo", "CartPole-v1", group_size=2, num_envs=4, preset="none") as training:
        assert isinstance(training.world.environments.unwrapped, SyncVectorEnv)
        row = next(training)
    assert row["episodes"] == 4


def test_a_group_begins_in_the_same_state() -> None:
    with pg.Training("grpo", "CartPole-v1", group_size=2, num_envs=6, preset="none") as training:
        rollout = training.world.sample(training.world.policy)
    start, group = rollout.obs[:, 0], rollout.group
    for i in range(6):
        for j in range(6):
            assert torch.equal(start[i], start[j]) == bool(group[i] == group[j])


def test_the_length_of_an_episode_is_the_environments_or_the_users() -> None:
    with pg.Training("grpo", "probes:Known-v0", num_envs=2) as training:
        assert training.world.sample(training.world.policy).mask.shape[1] == 8
    with pg.Training("grpo", "probes:Known-v0", num_envs=2, episode_steps=3) as training:
        assert training.world.sample(training.world.policy).mask.shape[1] == 3
    with pytest.raises(UserError, match=r"the environment has no time limit: .*episode_steps") as raised:
        pg.train("grpo", "probes:Endless-v0", **SMALL)
    assert raised.value.option == "episode_steps"


def test_it_is_solved_once_a_hundred_episodes_have_reached_the_return() -> None:
    with pg.Training("ppo", "CartPole-v1", stop_at_return=10.0, preset="none") as training:
        found = [
            training.world.solved({"episodes": n, "return": x}) for n, x in ((99.0, 11.0), (100.0, 9.0), (100.0, 11.0))
        ]
        assert found == [False, False, True]


def test_greedy_is_the_mode_and_sampled_has_noise() -> None:
    run = pg.train("ppo", "probes:Known-v0", minibatch_size=16, num_steps=16, **SMALL)
    plain = run.evaluate(4)
    assert run.evaluate(4, greedy=True) == run.evaluate(4) == plain
    assert run.evaluate(4, greedy=False) == run.evaluate(4, greedy=False) != plain
    assert run.evaluate(4, seed=3) != plain
    assert run.evaluate().episodes == 10
    for count in (0, -1):
        with pytest.raises(UserError, match=f"episodes is {count}"):
            run.evaluate(count)


def test_recurrent_critics_are_refused() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            return self.layer(obs.cumsum(1)).squeeze(-1)

    with pytest.raises(UserError, match="critic"):
        pg.train("ppo", "probes:Known-v0", critic=Remembers(), num_steps=16, minibatch_size=16, **SMALL)


SPACES = [
    spaces.Box(-1.0, 1.0, (3,), np.float32),
    spaces.Box(0, 255, (2, 2), np.uint8),
    spaces.Discrete(5, start=2),
    spaces.MultiBinary(4),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_observations_to_try_a_module_on_are_of_the_space(space: gymnasium.Space) -> None:
    made = observations(space)
    assert made.shape[:2] == (4, 4)
    assert torch.equal(made, observations(space))
    if not isinstance(space, spaces.MultiBinary):
        assert all(space.contains(x.numpy().astype(space.dtype)[()]) for x in made.flatten(0, 1))


def test_a_module_by_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"policy is MlpPolicy: hand in an nn\.Module"):
        own_module("policy", "MlpPolicy")


@pytest.mark.parametrize(
    ("task", "values", "kind"),
    [
        ("CartPole-v1", {}, "control"),
        ("exact:chain", {}, "exact"),
        ("arithmetic", {}, "language"),
        ("prompts.jsonl", {}, "language"),
        (None, {"dataset": "org/name"}, "language"),
        (None, {"model": "org/name"}, "language"),
        ("CartPole-v1", {"model": None}, "control"),
        pytest.param(Known, {}, "control", id="a callable"),
    ],
    ids=lambda x: str(x),
)
def test_a_task_names_its_world(task: Any, values: dict[str, Any], kind: str) -> None:
    assert kind_of(task, values) == kind
