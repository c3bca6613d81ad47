"""Environments whose every number is known. `probes:Known-v0` and `probes:Broken-v0` have an id."""

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

Step = tuple[Any, float, bool, bool, dict[str, Any]]
GAMMA = 0.5  # Potential's discount factor; a power of 2, so that its advantages are 0 to the last bit


class Probe(gymnasium.Env):
    """A Gymnasium environment with two actions; observations are one number."""

    def __init__(self) -> None:
        self.observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space: spaces.Space = spaces.Discrete(2)

    def observation(self, x: float) -> np.ndarray:
        return np.array([x], np.float32)


class Counting(Probe):
    """Episodes of the given lengths in turn. Observation: (episode, step); reward: 1, 2, 3, ... of each episode."""

    def __init__(self, lengths: tuple[int, ...] = (2, 3), truncated: tuple[bool, ...] = (False, True)) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0.0, np.inf, (2,), np.float32)
        self.lengths, self.truncated, self.episode = lengths, truncated, -1

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.episode, self.t = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action: Any) -> Step:
        self.t += 1
        end = self.t == self.lengths[self.episode % len(self.lengths)]
        cut = self.truncated[self.episode % len(self.truncated)]
        return self._obs(), float(self.t), end and not cut, end and cut, {}

    def _obs(self) -> np.ndarray:
        return np.array([self.episode, self.t], np.float32)


class Potential(Probe):
    """Never terminates, and r = V(s) - gamma V(s') with V(s) = s + 1: with that critic every advantage is 0."""

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.t = 0
        return self.observation(0), {}

    def step(self, action: Any) -> Step:
        self.t += 1
        return self.observation(self.t), self.t - GAMMA * (self.t + 1), False, False, {}


class ConstantReward(Probe):
    """One step, reward 1: V = 1."""

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        return self.observation(0), {}

    def step(self, action: Any) -> Step:
        return self.observation(0), 1.0, True, False, {}


class ObservationReward(Probe):
    """One step, the observation is -1 or 1 and so is the reward: V(s) = s."""

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.x = self.np_random.choice([-1.0, 1.0])
        return self.observation(self.x), {}

    def step(self, action: Any) -> Step:
        return self.observation(0), self.reward(action), True, False, {}

    def reward(self, action: Any) -> float:
        return self.x


class DelayedReward(Probe):
    """Two steps, observations 0 and 1, the reward 1 on the second: V(0) = gamma, V(1) = 1."""

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        self.t = 0
        return self.observation(0), {}

    def step(self, action: Any) -> Step:
        self.t += 1
        return self.observation(self.t), float(self.t == 2), self.t == 2, False, {}


class ActionMatters(ConstantReward):
    """One step, reward 1 for action 1 and -1 for action 0."""

    def step(self, action: Any) -> Step:
        return self.observation(0), 2.0 * action - 1.0, True, False, {}


class ActionAndObservationMatter(ObservationReward):
    """One step, reward 1 for action 1 at observation 1 and for action 0 at observation -1, else -1."""

    def reward(self, action: Any) -> float:
        return (2.0 * action - 1.0) * self.x


class Target(ObservationReward):
    """One step, minus the squared distance of the action from 0.5 or 1.5, at the observations -1 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.action_space = spaces.Box(0.0, 2.0, (1,), np.float32)

    def reward(self, action: Any) -> float:
        return -float((action[0] - 1.0 - 0.5 * self.x) ** 2)


class Known(Probe):
    """Random observations, actions in a Box, a reward of any size, ends of both kinds: something of everything."""

    def __init__(self, actions: spaces.Space | None = None) -> None:
        super().__init__()
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (2,), np.float32) if actions is None else actions

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=options.get("seed"))
        return self._obs(), {}

    def step(self, action: Any) -> Step:
        error = float(np.square(np.asarray(action, np.float64).sum() - self.obs[0]))
        return self._obs(), 3.0 - error, bool(self.np_random.random() < 0.1), False, {}

    def _obs(self) -> np.ndarray:
        self.obs = (2.0 + 3.0 * self.np_random.normal(size=3)).astype(np.float32)
        return self.obs


class Broken(ConstantReward):
    """Fails in one way, from the third step on."""

    def __init__(self, how: str | None = None) -> None:
        super().__init__()
        self.how, self.steps = how or os.environ.get("BROKEN", "raises in step"), 0

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        obs, info = super().reset(**options)
        match self.how:
            case "raises in reset":
                raise RuntimeError("no such level\nin this game")
            case "wrong shape in reset":
                obs = np.zeros(3, np.float32)
            case "NaN in reset":
                obs = self.observation(np.nan)
        return obs, info

    def step(self, action: Any) -> Step:
        self.steps += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if self.steps < 3:
            return obs, reward, terminated, truncated, info
        match self.how:
            case "raises in step":
                raise RuntimeError("the simulator\ncrashed")
            case "NaN observation":
                obs = self.observation(np.nan)
            case "wrong observation shape":
                obs = np.zeros((2, 1), np.float32)
            case "no observation":
                obs = None
            case "NaN reward":
                reward = np.nan
            case "infinite reward":
                reward = np.inf
            case "wrong reward shape":
                reward = np.ones(2)
            case "no reward":
                reward = None
            case "reward is text":
                reward = "one"
            case "four values":
                return obs, reward, terminated, info  # type: ignore[return-value]
        return obs, reward, terminated, truncated, info


BROKEN = (
    "raises in reset",
    "wrong shape in reset",
    "NaN in reset",
    "raises in step",
    "NaN observation",
    "wrong observation shape",
    "no observation",
    "NaN reward",
    "infinite reward",
    "wrong reward shape",
    "no reward",
    "reward is text",
    "four values",
)


class Slow(Known):
    """Waits in each step, as if for a simulator elsewhere, which several processes do at once. Says if it is in one."""

    def step(self, action: Any) -> Step:
        time.sleep(5e-3)
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, {**info, "child": multiprocessing.parent_process() is not None}


def limited(make: Callable[[], gymnasium.Env], steps: int) -> Callable[[], gymnasium.Env]:
    """A maker of the environment with a time limit."""
    return lambda: TimeLimit(make(), steps)


gymnasium.register("Known-v0", entry_point=Known, max_episode_steps=8)
gymnasium.register("Endless-v0", entry_point=Known)
gymnasium.register("Slow-v0", entry_point=Slow, max_episode_steps=8)
gymnasium.register("Broken-v0", entry_point=Broken, max_episode_steps=8)
gymnasium.register(
    "Missing-v0", entry_point=lambda: (_ for _ in ()).throw(gymnasium.error.DependencyNotInstalled("no such\npackage"))
)
for _space in (spaces.Sequence(spaces.Discrete(2)), spaces.Text(5)):
    gymnasium.register(f"{type(_space).__name__}Actions-v0", entry_point=Known, kwargs={"actions": _space})


def mirror(obs: Any, action: Any) -> tuple[Any, Any]:
    """A reflection, as the option symmetry takes it."""
    return -obs, action
