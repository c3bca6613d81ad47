"""Tabular worlds as Gymnasium environments. Importing this module registers them.

    gymnasium.make("policygrad.exact.environment:policygrad/Chain-v0")

`policygrad/Tabular-v0` takes any `world=World(...)`. Observations and actions are numbers. A step that terminates
returns the state it left.
"""

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces

from policygrad.exact.worlds import World, bandit, chain, cliff, garnet, termination, two_states


class TabularEnv(gymnasium.Env[np.int64, np.int64]):
    """A World as an environment: s' ~ P(.|s, a), or termination with probability 1 - sum_s' P(s'|s, a).

    Gymnasium applies the time limit: pass `max_episode_steps` to `make`.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        states, actions = world.reward.shape
        self.observation_space = spaces.Discrete(states)
        self.action_space = spaces.Discrete(actions)
        outcome = np.concatenate([world.transition.numpy(), termination(world).unsqueeze(-1).numpy()], -1)
        self._outcome, self._start, self._reward = (
            outcome.cumsum(-1),
            world.start.numpy().cumsum(),
            world.reward.numpy(),
        )
        self._state = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.int64, dict[str, Any]]:
        """s_0 ~ world.start."""
        super().reset(seed=seed)
        self._state = self._draw(self._start)
        return np.int64(self._state), {}

    def step(self, action: np.int64 | int) -> tuple[np.int64, float, bool, bool, dict[str, Any]]:
        """r(s, a) and s' ~ P(.|s, a)."""
        reward = float(self._reward[self._state, action])
        following = self._draw(self._outcome[self._state, action])
        terminated = following == len(self._start)
        self._state = self._state if terminated else following
        return np.int64(self._state), reward, terminated, False, {}

    def _draw(self, cumulative: np.ndarray) -> int:
        """The first number whose cumulative probability exceeds a uniform draw below the total."""
        return int(np.searchsorted(cumulative, self.np_random.random() * cumulative[-1], side="right"))


def _bandit_env(**_: Any) -> TabularEnv:
    return TabularEnv(bandit(torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])))


def _chain_env(length: int = 5, slip: float = 0.1, **_: Any) -> TabularEnv:
    return TabularEnv(chain(length, slip=slip))


def _cliff_env(height: int = 4, width: int = 12, **_: Any) -> TabularEnv:
    return TabularEnv(cliff(height, width))


def _garnet_env(states: int = 10, actions: int = 3, branching: int = 3, seed: int = 0, **_: Any) -> TabularEnv:
    return TabularEnv(garnet(states, actions, branching, seed=seed))


def _two_states_env(**_: Any) -> TabularEnv:
    return TabularEnv(two_states())


gymnasium.register("policygrad/Tabular-v0", entry_point="policygrad.exact.environment:TabularEnv")
gymnasium.register("policygrad/Bandit-v0", entry_point=_bandit_env)
gymnasium.register("policygrad/Chain-v0", entry_point=_chain_env, max_episode_steps=100)
gymnasium.register("policygrad/Cliff-v0", entry_point=_cliff_env, max_episode_steps=200)
gymnasium.register("policygrad/Garnet-v0", entry_point=_garnet_env, max_episode_steps=50)
gymnasium.register("policygrad/TwoStates-v0", entry_point=_two_states_env, max_episode_steps=50)
