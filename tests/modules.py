"""Modules of the user's own, as tests hand them in."""

from typing import Any

from torch import Tensor, nn


class Wrapped(nn.Module):
    """Another class around a policy: it acts by its distribution, with noise of torch's global generator."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: Tensor) -> Any:
        return self.policy(obs)
