"""Rows of several episodes, and what a definition needs to know about them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Rows of several episodes each, with values of every step and of where the row stops."""

    reward: Tensor  # [B, T]
    value: Tensor  # [B, T + 1]
    terminated: Tensor  # [B, T]
    ended: Tensor  # [B, T]

    def stop(self, b: int, t: int) -> int:
        """The last step of the episode that step t is in, or of the row."""
        return next((u for u in range(t, self.ended.shape[1]) if self.ended[b, u]), self.ended.shape[1] - 1)

    def after(self, b: int, t: int) -> Tensor:
        """What is to be expected after step t: V of its successor, 0 if there is none."""
        return torch.zeros(()) if self.terminated[b, t] else self.value[b, t + 1]

    def each(self, f: Callable[[int, int], Tensor]) -> Tensor:
        """f(row, step) of every step, [B, T]."""
        rows, steps = self.reward.shape
        return torch.stack([torch.stack([f(b, t) for t in range(steps)]) for b in range(rows)])
