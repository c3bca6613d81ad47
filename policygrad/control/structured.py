"""Dict and Tuple actions: to everything but the environment, one vector of the numbers of all their parts."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from policygrad.control.spaces import FlatActions, unsupported


def has_parts(space: spaces.Space) -> bool:
    """Whether actions are a Dict or a Tuple, of parts that a policy can have."""
    return isinstance(space, spaces.Dict | spaces.Tuple) and unsupported(space) is None


class StructuredActions(gymnasium.Wrapper):
    """An environment of Dict or Tuple actions that takes them as one vector, and gives the environment its own."""

    def __init__(self, environment: gymnasium.Env) -> None:
        super().__init__(environment)
        self.action_space = self.actions = FlatActions(environment.action_space)

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with an action [D]."""
        return self.env.step(self.actions.structured(action))


class VectorStructuredActions(VectorWrapper):
    """As StructuredActions, around a vector environment: actions are [B, D]."""

    def __init__(self, environments: VectorEnv) -> None:
        super().__init__(environments)
        self.single_action_space: FlatActions = FlatActions(environments.single_action_space)
        self.action_space = batch_space(self.single_action_space, environments.num_envs)

    def step(self, actions: np.ndarray) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environments', with actions [B, D]."""
        return self.env.step(self.single_action_space.structured(actions))
