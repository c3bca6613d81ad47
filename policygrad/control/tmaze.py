"""T-maze: a small task that needs memory. A sign at the start says which way to turn at the end of a corridor.

    gymnasium.make("policygrad/TMaze-v0", length=10)

The observation is (sign, corridor, junction): sign is 1 (up) or -1 (down) in the first step, else 0; corridor and
junction are 1 where the walker stands. Actions are 0, up; 1, forward; 2, down. In the corridor only forward moves, and
at the junction only up and down; anything else has reward -0.1. The turn ends the episode, with reward 1 if it is the
sign's, else -1. An episode is cut after 4 (length + 1) steps. Without memory the mean return is at best 0; with it, 1.
After Bakker (2001), "Reinforcement learning with long short-term memory".
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from policygrad.errors import UserError

UP, FORWARD, DOWN = 0, 1, 2


class TMaze(gymnasium.Env[np.ndarray, np.int64]):
    """length: steps from the sign to the junction."""

    def __init__(self, length: int = 10) -> None:
        if not isinstance(length, int) or length < 1:
            raise UserError(f"length is {length}: the corridor of a T-maze needs 1 step or more")
        self.observation_space, self.action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(3)
        self.length, self.place, self.steps, self.sign = length, 0, 0, 1

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A new sign, and the walker at the start."""
        super().reset(seed=seed)
        self.place, self.steps, self.sign = 0, 0, 1 - 2 * int(self.np_random.integers(2))
        return self._observation(), {}

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One step."""
        self.steps += 1
        if self.place == self.length and action != FORWARD:
            right = (action == UP) == (self.sign == 1)
            return self._observation(), 2.0 * right - 1.0, True, False, {"is_success": float(right)}
        moves = self.place < self.length and action == FORWARD
        self.place += moves
        cut = self.steps >= 4 * (self.length + 1)
        return self._observation(), 0.0 if moves else -0.1, False, cut, {"is_success": 0.0} if cut else {}

    def _observation(self) -> np.ndarray:
        junction = self.place == self.length
        sign = self.sign if self.steps == 0 else 0
        return np.array([sign, not junction, junction], np.float32)
