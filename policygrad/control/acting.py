"""Acting: observations as an environment gives them in, its actions out."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from policygrad.control.checks import checked_distribution, checked_observations, stored
from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.spaces import to_environment
from policygrad.errors import UserError, one_line


class Mode(nn.Module):
    """A policy without noise: its samples are the mode of its distribution."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: Any) -> "Certain":
        return Certain(self.policy(obs))


class Certain:
    """A distribution with its mode in place of its samples."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        self.distribution = distribution
        if hasattr(distribution, "to_environment"):
            self.to_environment = distribution.to_environment

    def sample(self) -> Tensor:
        """The mode; 0 where torch's mode is NaN, as for a coin of probability 0.5."""
        mode = self.distribution.mode
        return mode.masked_fill(mode.isnan(), 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """The distribution's own."""
        return self.distribution.log_prob(value)


@torch.no_grad()
def act(
    policy: nn.Module,
    obs: Any,
    observation_space: spaces.Space,
    action_space: spaces.Space,
    *,
    greedy: bool = True,
    normalizer: ObservationNormalizer | None = None,
) -> Any:
    """The environment's action for one observation, or the actions [B, ...] for a batch of them.

    observation_space: of one observation. A Dict, a Tuple or another composite observation is flattened as in training.
    greedy: the mode of the policy's distribution, else a sample from torch's global generator. normalizer: its
    statistics do not change. Raises UserError for an observation of another shape.
    """
    batch, single = _batch(obs, observation_space)
    if normalizer is not None:
        batch = normalizer(batch, np.zeros(len(batch), dtype=bool))
    device = next((x.device for x in policy.parameters()), torch.device("cpu"))
    policy.eval()
    output: Any = policy(torch.from_numpy(stored(batch)).to(device).unsqueeze(1))
    distribution = Certain(output) if greedy else output
    checked_distribution(distribution, len(batch), action_space)
    action = distribution.sample()[:, 0]
    owned = hasattr(distribution, "to_environment")
    actions = distribution.to_environment(action) if owned else to_environment(action, action_space)
    return actions[0] if single else actions


def _batch(obs: Any, space: spaces.Space) -> tuple[np.ndarray, bool]:
    """Observations [B, ...] as the policy takes them, and whether there was a single one."""
    if isinstance(space, spaces.Box | spaces.Discrete):
        array = np.asarray(obs)
        single = array.shape == space.shape
        if not single and (array.ndim == 0 or array.shape[1:] != space.shape):
            raise _other_shape(f"shape {array.shape}", space)
        array = array[np.newaxis] if single else array
        return checked_observations(array, space, len(array)).astype(space.dtype), single
    if space.contains(obs):
        return np.asarray(spaces.flatten(space, obs))[np.newaxis], True
    try:
        count = (
            len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs[0] if isinstance(obs, tuple) else obs)
        )
        rows = [np.asarray(spaces.flatten(space, _row(obs, i))) for i in range(count)]
        return np.stack(rows), False
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        found = f"shape {obs.shape}" if isinstance(obs, np.ndarray) else f"a {type(obs).__name__} of other parts"
        raise _other_shape(found, space) from error


def _row(obs: Any, i: int) -> Any:
    """Observation i of a batch of composite observations."""
    if isinstance(obs, dict):
        return {name: _row(x, i) for name, x in obs.items()}
    return tuple(_row(x, i) for x in obs) if isinstance(obs, tuple) else obs[i]


def _other_shape(found: str, space: spaces.Space) -> UserError:
    return UserError(
        f"act got {found}, and an observation is in {one_line(space, 80)}: give one, or a batch [B, ...] of them"
    )
