"""Acting: observations as an environment gives them in, its actions out."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from policygrad.control.checks import as_tensor, called, checked_distribution, checked_member, stored
from policygrad.control.masks import check_masks
from policygrad.control.memory import Rows
from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.spaces import FlatActions, to_environment
from policygrad.errors import UserError, one_line, shortened
from policygrad.rollout import state_size


class Mode(nn.Module):
    """A policy without noise: its samples are the mode of its distribution."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        if state_size(policy):
            self.initial = policy.initial

    def forward(self, obs: Any) -> "Certain":
        return Certain(called(self.policy, obs))

    def unrolled(self, obs: Any) -> tuple["Certain", Tensor]:
        """As a policy's with memory."""
        distribution, state = self.policy.unrolled(obs)  # type: ignore[operator]
        return Certain(distribution), state


class Certain:
    """A distribution with its mode in place of its samples."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        self.distribution = distribution
        if hasattr(distribution, "to_environment"):
            self.to_environment = distribution.to_environment

    def sample(self) -> Tensor:
        """The mode; 0 where torch's mode is NaN, as for a coin of probability 0.5."""
        mode = self.distribution.mode
        return mode.masked_fill(mode.isnan(), 0) if mode.is_floating_point() else mode

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
    state: Any = None,
    greedy: bool = True,
    normalizer: ObservationNormalizer | None = None,
) -> Any:
    """The environment's action for one observation, or the actions [B, ...] for a batch of them.

    Of a policy with memory: (action, state). state: what the step before returned, [B, S]; None is the empty memory,
    with which an episode starts.

    observation_space: of one observation. A Dict, a Tuple or another composite observation is flattened as in training.
    greedy: the mode of the policy's distribution, else a sample from torch's global generator. normalizer: its
    statistics do not change. Raises UserError for an observation or a state of another shape.
    """
    batch, single = _batch(obs, observation_space)
    if getattr(policy, "mask", None) is not None:
        check_masks(batch, np.ones(len(batch), bool), policy.observation_space, action_space, "observation")  # type: ignore[arg-type]
    if normalizer is not None:
        batch = normalizer(batch, np.zeros(len(batch), dtype=bool))
    device = next((x.device for x in policy.parameters()), torch.device("cpu"))
    if policy.training:
        policy.eval()
    given = as_tensor(stored(batch), device).unsqueeze(1)
    remembers, after = state_size(policy) > 0, None
    if remembers:
        output, after = policy.unrolled(_with_state(given, state, policy.initial(len(batch))))  # type: ignore[operator]
    elif state is not None:
        raise UserError("act got a state, and the policy has no memory: leave it out")
    else:
        output = called(policy, given)
    distribution = Certain(output) if greedy else output
    checked_distribution(distribution, len(batch), action_space)
    action = distribution.sample()[:, 0]
    owned = hasattr(distribution, "to_environment")
    actions = distribution.to_environment(action) if owned else to_environment(action.cpu().numpy(), action_space)
    taken = actions[0] if single else actions
    if isinstance(action_space, FlatActions):
        taken = action_space.structured(taken)
    return (taken, after) if remembers else taken


def _with_state(obs: Tensor, state: Any, empty: Tensor) -> Rows:
    """Rows of one step, with the state that act was given. Raises UserError for one of another shape."""
    state = empty if state is None else state
    if not isinstance(state, Tensor) or state.shape != empty.shape:
        found = list(state.shape) if isinstance(state, Tensor) else shortened(state, 40)
        raise UserError(
            f"act got a state of {found}, and the memory is {list(empty.shape)}: give what the last act returned, or "
            "None where an episode starts"
        )
    start = torch.zeros(obs.shape[:2], dtype=torch.bool, device=obs.device)
    return Rows(obs, start, state.unsqueeze(1), state.unsqueeze(1)[..., :0])


def _batch(obs: Any, space: spaces.Space) -> tuple[np.ndarray, bool]:
    """Observations [B, ...] as the policy takes them, and whether there was a single one."""
    single = _is_one(obs, space)
    try:
        rows = [obs] if single else [_row(obs, i) for i in range(_count(obs))]
    except (KeyError, IndexError, TypeError) as error:
        raise _no_observation(obs, space) from error
    if not rows or not all(_is_one(x, space) for x in rows):
        raise _no_observation(obs, space)
    return together(rows, space), single


def together(rows: list[Any], space: spaces.Space) -> np.ndarray:
    """Observations of a space as one array [B, ...] of what a policy takes. Raises UserError for one that is none."""
    rows = [checked_member(x, space, "act got") for x in rows]
    if not isinstance(space, spaces.Box | spaces.Discrete):
        rows = [spaces.flatten(space, x) for x in rows]
    batch = np.stack(rows)
    if batch.dtype.kind == "f" and not np.isfinite(batch).all():
        raise UserError("act got an observation that is NaN or infinite: look at what the environment returned")
    return batch


def _is_one(obs: Any, space: spaces.Space) -> bool:
    """Whether this is a single observation, by its parts and their shapes."""
    if isinstance(space, spaces.Dict):
        return isinstance(obs, dict) and all(name in obs and _is_one(obs[name], x) for name, x in space.items())
    if isinstance(space, spaces.Tuple):
        return isinstance(obs, tuple | list) and len(obs) == len(space) and all(map(_is_one, obs, space))
    if space.shape is None:
        return space.contains(obs)
    return shape_of(obs) == space.shape


def shape_of(obs: Any) -> tuple[int, ...] | None:
    """The shape of an array, or of lists in its place; None if they make no array."""
    try:
        return np.shape(obs)
    except ValueError:
        return None


def _count(obs: Any) -> int:
    """The number of observations in a batch."""
    while isinstance(obs, dict | tuple):
        obs = next(iter(obs.values() if isinstance(obs, dict) else obs), ())
    return len(obs)


def _row(obs: Any, i: int) -> Any:
    """Observation i of a batch."""
    if isinstance(obs, dict):
        return {name: _row(x, i) for name, x in obs.items()}
    return tuple(_row(x, i) for x in obs) if isinstance(obs, tuple) else obs[i]


def _no_observation(obs: Any, space: spaces.Space) -> UserError:
    if isinstance(obs, tuple) and len(obs) == 2 and isinstance(obs[1], dict):
        return UserError("act got a pair (obs, info), as reset returns it: give obs alone")
    found = f"shape {obs.shape}" if hasattr(obs, "shape") else f"{shortened(obs, 30)}"
    return UserError(
        f"act got {found}, and an observation is in {one_line(space, 80)}: give one, or a batch [B, ...] of them"
    )
