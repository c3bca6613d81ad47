"""Catch: a small task on images that is learned in a minute. A ball falls, and a paddle is to be under it.

    gymnasium.make("policygrad/Catch-v0"), make_vec too

The image [1, size, size] of uint8 is 255 at the ball and at the paddle, which is in the bottom row. In each step the
paddle moves (0: left, 1: not, 2: right) and the ball falls one row, down its column. Once it is in the bottom row the
episode ends, with reward 1 if the paddle is in its column, else -1. The paddle can reach every ball, so the best return
is 1. After bsuite's catch (Osband et al. 2020, arXiv 1908.03568).
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from policygrad.errors import UserError

PIXELS = 16  # of a rendered cell's side


def image_space(size: int) -> spaces.Box:
    """The space of images of this size. Raises UserError for a size that is no game."""
    if not isinstance(size, int) or size < 3:
        raise UserError(f"size is {size}: the image of Catch needs a side of 3 or more")
    return spaces.Box(0, 255, (1, size, size), np.uint8)


def images(row: np.ndarray, column: np.ndarray, paddle: np.ndarray, size: int) -> np.ndarray:
    """The images [B, 1, size, size] of balls and paddles at these places, each [B]."""
    found = np.zeros((len(row), 1, size, size), np.uint8)
    found[np.arange(len(row)), 0, row, column] = 255
    found[np.arange(len(row)), 0, size - 1, paddle] = 255
    return found


def stepped(row: Any, column: Any, paddle: Any, action: Any, size: int) -> tuple[Any, Any, Any, Any]:
    """Row and paddle after a step, whether the episode ended, and whether the ball was caught; of arrays or numbers."""
    row, paddle = row + 1, np.clip(paddle + action - 1, 0, size - 1)
    return row, paddle, row == size - 1, (row == size - 1) & (paddle == column)


class CatchVector(VectorEnv):
    """`num_envs` games in one object. Each resets on the step after its episode ends."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 as Gymnasium declares it

    def __init__(self, num_envs: int = 1, size: int = 10) -> None:
        self.num_envs, self.size = num_envs, size
        self.single_observation_space, self.single_action_space = image_space(size), spaces.Discrete(3)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.max_episode_steps = size - 1
        self.row, self.column, self.paddle = (np.zeros(num_envs, np.int64) for _ in range(3))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """New games: the ball in a column by chance, the paddle in the middle."""
        super().reset(seed=seed)
        self._begin(np.ones(self.num_envs, bool))
        return self._images(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One row down; a new game where the last step ended one."""
        over = self.row == self.size - 1
        row, paddle, ended, caught = stepped(self.row, self.column, self.paddle, np.asarray(actions), self.size)
        self.row[:], self.paddle[:], ended, caught = row, paddle, ended & ~over, caught & ~over
        if over.any():
            self._begin(over)
        reward = 2.0 * caught - ended
        return self._images(), reward, ended, np.zeros_like(ended), {"is_success": caught.astype(float)}

    def _begin(self, which: np.ndarray) -> None:
        self.row[which], self.paddle[which] = 0, self.size // 2
        self.column[which] = self.np_random.integers(self.size, size=int(which.sum()))

    def _images(self) -> np.ndarray:
        return images(self.row, self.column, self.paddle, self.size)


class Catch(gymnasium.Env[np.ndarray, np.int64]):
    """One game."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012 as Gymnasium declares it

    def __init__(self, size: int = 10, render_mode: str | None = None) -> None:
        self.observation_space, self.action_space = image_space(size), spaces.Discrete(3)
        self.size, self.render_mode = size, render_mode
        self.row, self.column, self.paddle = 0, 0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A new game: the ball in a column by chance, the paddle in the middle."""
        super().reset(seed=seed)
        self.row, self.column, self.paddle = 0, int(self.np_random.integers(self.size)), self.size // 2
        return self._image(), {}

    def step(self, action: np.int64 | int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """One row down."""
        row, paddle, ended, caught = stepped(self.row, self.column, self.paddle, int(action), self.size)
        self.row, self.paddle = int(row), int(paddle)
        return self._image(), float(2 * caught - ended), bool(ended), False, {"is_success": float(caught)}

    def render(self) -> np.ndarray:
        """The image, enlarged, [16 size, 16 size, 3]."""
        gray = self._image()[0].repeat(PIXELS, 0).repeat(PIXELS, 1)
        return np.stack([gray] * 3, -1)

    def _image(self) -> np.ndarray:
        row, column, paddle = np.array([[self.row], [self.column], [self.paddle]])
        return images(row, column, paddle, self.size)[0]
