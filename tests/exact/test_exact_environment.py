"""A tabular world as a Gymnasium environment."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from policygrad.exact.environment import TabularEnv
from policygrad.exact.worlds import garnet

MODULE = "policygrad.exact.environment"


@pytest.mark.parametrize("name", ["Bandit", "Chain", "Cliff", "Garnet", "TwoStates"])
def test_it_is_made_by_its_name(name):
    environment = gymnasium.make(f"{MODULE}:policygrad/{name}-v0")
    check_env(environment.unwrapped, skip_render_check=True)


def test_any_world_is_one():
    environment = gymnasium.make(f"{MODULE}:policygrad/Tabular-v0", world=garnet(7, 4, 2), max_episode_steps=9)
    assert environment.observation_space.n == 7
    assert environment.action_space.n == 4
    environment.reset(seed=0)
    over = [environment.step(0)[2:4] for _ in range(9)]
    assert over == [(False, False)] * 8 + [(False, True)]  # the time limit truncates


def test_it_moves_as_the_world_says():
    world = garnet(3, 2, 2, termination=0.2)
    environment = TabularEnv(world)
    environment.reset(seed=0)
    counts, draws = torch.zeros(4), 20_000
    for _ in range(draws):
        environment._state = 1
        state, reward, terminated, truncated, _ = environment.step(np.int64(1))
        assert reward == float(world.reward[1, 1])
        assert not truncated
        counts[3 if terminated else state] += 1
    expected = torch.cat([world.transition[1, 1], torch.tensor([0.2])])
    torch.testing.assert_close(counts / draws, expected, atol=0.02, rtol=0)
    assert counts[expected == 0].sum() == 0


def test_seeds_repeat_it():
    def play(seed):
        environment = TabularEnv(garnet(5, 2, 3))
        state, _ = environment.reset(seed=seed)
        return [int(state)] + [int(environment.step(0)[0]) for _ in range(30)]

    assert play(1) == play(1)
    assert play(1) != play(2)
