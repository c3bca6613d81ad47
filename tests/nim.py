"""Nim, as PettingZoo has games: players take one or two from a heap in turn, and who takes the last one wins."""

from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
from gymnasium import spaces


class Nim:
    """Its observation is the heap. An action that the mask forbids is an error."""

    possible_agents: Any = ("first", "second")
    metadata: Any = MappingProxyType({"name": "nim", "render_modes": ["rgb_array"]})

    def __init__(self, heap: int = 7, mask: str = "key", render_mode: str | None = None) -> None:
        self.start, self.mask, self.render_mode = heap, mask, render_mode
        self.agents: list[str] = []

    def observation_space(self, agent: str) -> spaces.Space:
        own = spaces.Box(0, 99, (1,), np.float32)
        return spaces.Dict({"observation": own, "action_mask": spaces.MultiBinary(2)}) if self.mask == "key" else own

    def action_space(self, agent: str) -> spaces.Space:
        return spaces.Discrete(2)

    def reset(self, seed: Any = None, options: Any = None) -> None:
        self.heap, self.agents, self.agent_selection = self.start, list(self.possible_agents), "first"
        self.reward, self.over = dict.fromkeys(self.agents, 0.0), False

    def allowed(self) -> np.ndarray:
        return np.array([self.heap >= 1, self.heap >= 2], np.int8)

    def last(self) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs: Any = np.array([self.heap], np.float32)
        obs = {"observation": obs, "action_mask": self.allowed()} if self.mask == "key" else obs
        info = {"action_mask": self.allowed()} if self.mask == "info" and not self.over else {}
        return obs, self.reward[self.agent_selection], self.over, False, info

    def agent_iter(self) -> Any:
        raise NotImplementedError

    def step(self, action: Any) -> None:
        now = self.agent_selection
        other = next(x for x in self.possible_agents if x != now)
        if self.over:
            assert action is None
            self.agents.remove(now)
        else:
            assert self.allowed()[action], (action, self.heap)
            self.heap -= int(action) + 1
            self.reward[now] = 0.0  # what it had was seen before its turn
            if self.heap == 0:
                self.over, self.reward = True, {now: 1.0, other: -1.0}
        self.agent_selection = other

    def render(self) -> np.ndarray:
        return np.full((4, 4, 3), self.heap, np.uint8)

    def close(self) -> None:
        pass


@cache
def best(heap: int) -> float:
    """The expected result of the best player whose turn it is, against a random one."""
    values = []
    for taken in range(1, min(2, heap) + 1):
        left = heap - taken
        answers = range(1, min(2, left) + 1)
        values.append(sum(-1.0 if x == left else best(left - x) for x in answers) / len(answers) if left else 1.0)
    return max(values)


def best_of_seats(heap: int) -> float:
    """The same, where each seat is as likely as the other."""
    answers = range(1, min(2, heap) + 1)
    second = sum(-1.0 if x == heap else best(heap - x) for x in answers) / len(answers)
    return (best(heap) + second) / 2
