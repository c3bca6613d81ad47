"""Masks of actions: which actions an environment allows, as a part of its observation.

A mask has a number for each choice, 1 if it is allowed and 0 if not: n for Discrete(n), sum(nvec) for MultiDiscrete,
and for MultiBinary two for each coin (0, then 1), as for a MultiDiscrete of twos; for a Dict or Tuple, those of its
parts that are no Box. An info may also have the masks that Gymnasium's spaces sample with (flat_mask).
"""

import math
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from policygrad.control.checks import checked_member
from policygrad.control.spaces import MASK, Flat, FlatActions
from policygrad.errors import UserError, one_line, shortened


def choices(space: spaces.Space) -> list[int]:
    """How many choices each part of an action has. Raises UserError for a space that has no finite ones."""
    match space:
        case spaces.Discrete():
            return [int(space.n)]
        case spaces.MultiDiscrete():
            return [int(n) for n in space.nvec.reshape(-1)]
        case spaces.MultiBinary():
            return [2] * math.prod(space.shape)
        case FlatActions() if found := [n for part, _ in space.parts if not is_box(part) for n in choices(part)]:
            return found
    raise UserError(
        f"an action_mask is for Discrete, MultiDiscrete or MultiBinary actions, and these are {one_line(space, 60)}: "
        "set action_mask off"
    )


def is_box(space: spaces.Space) -> bool:
    """Whether a part of an action has no choices to forbid."""
    return isinstance(space, spaces.Box)


def check_mask_space(space: spaces.Space, action_space: spaces.Space) -> None:
    """Raise UserError if the space of observations has an action_mask of another size than the actions have choices."""
    if isinstance(space, Flat) and space.mask is not None:
        found, expected = space.mask.stop - space.mask.start, sum(choices(action_space))
        if found != expected:
            raise UserError(
                f"the action_mask has {found} numbers, and {one_line(action_space, 60)} has {expected} choices: make "
                "it one number for each choice, as in MultiBinary or Box(0, 1)"
            )


def check_masks(
    obs: np.ndarray, counts: np.ndarray, space: Flat, action_space: spaces.Space, what: str = "environment"
) -> None:
    """Raise UserError for masks in obs [B, N] of other numbers than 0 and 1, or that allow nothing where it counts."""
    mask = obs[:, space.mask]
    if not ((mask == 0) | (mask == 1)).all():
        i, j = np.argwhere((mask != 0) & (mask != 1))[0]
        raise UserError(f"{what} {i} of {len(obs)} has {mask[i, j]:g} in its action_mask: use 0 and 1")
    sizes = choices(action_space)
    allowed = np.add.reduceat(mask, np.cumsum([0, *sizes[:-1]]), axis=1) > 0
    if not allowed[counts].all():
        i, part = np.argwhere(~allowed & counts[:, None])[0]
        of_part = f" in part {part} of its actions" if len(sizes) > 1 else ""
        raise UserError(
            f"{what} {i} of {len(obs)} allows no action{of_part}: its action_mask is 0 everywhere; allow one, or "
            "end the episode before"
        )


def mask_space(action_space: spaces.Space) -> spaces.MultiBinary:
    """The space of an action's masks."""
    return spaces.MultiBinary(sum(choices(action_space)))


def with_mask(space: spaces.Space, mask: spaces.Space) -> spaces.Dict:
    """The space of an observation that a mask has joined."""
    return spaces.Dict({**(space.spaces if isinstance(space, spaces.Dict) else {"observation": space}), MASK: mask})


def random_masks(count: int, action_space: spaces.Space) -> np.ndarray:
    """`count` masks, always the same, with each choice allowed half of the time, and one of each part always."""
    generator, masks = np.random.default_rng(0), []
    for n in choices(action_space):
        masks.append(generator.integers(0, 2, (count, n)))
        masks[-1][np.arange(count), generator.integers(0, n, count)] = 1
    return np.concatenate(masks, 1)


def random_action(obs: Any, space: spaces.Space, action_space: spaces.Space, generator: np.random.Generator) -> Any:
    """A random action for an observation of one environment, with the choices that its mask allows."""
    action = action_space.sample()
    if not isinstance(space, Flat) or space.mask is None:
        return action
    allowed = np.split(obs[space.mask], np.cumsum(choices(action_space))[:-1])
    drawn = np.array([generator.choice(np.flatnonzero(x)) for x in allowed])
    if not isinstance(action_space, FlatActions):
        return (drawn.reshape(np.shape(action)) + getattr(action_space, "start", 0)).astype(action_space.dtype)[()]
    for part, where in action_space.parts:
        if not is_box(part):
            count = where.stop - where.start
            action[where] = drawn[:count] + np.ravel(getattr(part, "start", 0))
            drawn = drawn[count:]
    return action


class MaskFromInfo(gymnasium.Wrapper):
    """The observation joined by the info's `action_mask`, as a Dict of `observation` and `action_mask`.

    Where the observation is a Dict, the mask is one more key. After the end of an episode a mask may be missing.
    """

    def __init__(self, environment: gymnasium.Env) -> None:
        super().__init__(environment)
        self.mask = mask_space(environment.action_space)
        self.observation_space = with_mask(environment.observation_space, self.mask)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """As the environment's, with the mask."""
        obs, info = self.env.reset(**options)
        return self._joined(obs, info, "reset"), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with the mask."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        over = np.ndim(terminated) == np.ndim(truncated) == 0 and bool(terminated or truncated)
        return self._joined(obs, info, "step", needed=not over), reward, terminated, truncated, info

    def _joined(self, obs: Any, info: Any, method: str, *, needed: bool = True) -> dict[str, Any]:
        mask = info.get(MASK) if isinstance(info, dict) else None
        if mask is None and needed:
            raise UserError(
                f"the info of the environment's {method} has no action_mask: add it, or set action_mask auto"
            )
        return joined(obs, np.ones(self.mask.shape, np.int8) if mask is None else flat_mask(mask, self.action_space))


class VectorMaskFromInfo(VectorWrapper):
    """As MaskFromInfo, around a vector environment, whose info has the masks of all, [B, n]."""

    def __init__(self, environments: VectorEnv) -> None:
        super().__init__(environments)
        self.mask = mask_space(environments.single_action_space)
        self.single_observation_space = with_mask(environments.single_observation_space, self.mask)
        self.observation_space = batch_space(self.single_observation_space, environments.num_envs)

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """As the environments', with the masks."""
        obs, info = self.env.reset(**options)
        return self._joined(obs, info, self._acting()), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environments', with the masks."""
        obs, reward, terminated, truncated, info = self.env.step(actions)
        return self._joined(obs, info, self._acting() & ~(terminated | truncated)), reward, terminated, truncated, info

    def _acting(self) -> np.ndarray:
        """The rows that act in the next step, [B]: not those of agents that wait (see players.py)."""
        return ~np.broadcast_to(getattr(self.env.unwrapped, "waiting", False), self.num_envs)

    def _joined(self, obs: Any, info: dict[str, Any], needed: np.ndarray) -> dict[str, Any]:
        masks: Any = info.get(MASK, ())
        there = np.broadcast_to(info.get(f"_{MASK}", MASK in info), needed.shape)
        if (needed & ~there).any():
            raise UserError(
                "the vector environment has no action_mask [B, n] in its info: add it, or set action_mask to auto"
            )
        found = np.ones((self.num_envs, *self.mask.shape), np.int8)
        for i in np.flatnonzero(there):
            found[i] = checked_member(
                flat_mask(masks[i], self.single_action_space),
                self.mask,
                "the vector environment's info has, as action_mask,",
            )
        return joined(obs, found)


def joined(obs: Any, mask: np.ndarray) -> dict[str, Any]:
    """An observation, or a batch, with its mask."""
    return {**(obs if isinstance(obs, dict) else {"observation": obs}), MASK: mask}


def flat_mask(mask: Any, space: spaces.Space) -> np.ndarray:
    """A mask as one vector, a number for each choice in the space.

    mask: such a vector, or what Gymnasium's spaces sample with: of MultiDiscrete a tuple of a mask for each dimension;
    of MultiBinary, in its shape, 0 or 1 for a coin that must be so, and 2 for one that may be either. Of FlatActions it
    may be a tuple with one of these for each part that is no Box.
    """
    if isinstance(space, FlatActions) and isinstance(mask, tuple | list):
        parts = [part for part, _ in space.parts if not is_box(part)]
        if len(parts) == len(mask) and not any(map(np.isscalar, mask)):
            return np.concatenate([flat_mask(x, part) for x, part in zip(mask, parts, strict=True)])
    try:
        found = np.concatenate([np.ravel(x) for x in mask]) if isinstance(mask, tuple | list) else np.asarray(mask)
    except ValueError as error:
        raise UserError(f"the action_mask is {shortened(mask, 60)}: make it an array of 0 and 1") from error
    return _sides(found.reshape(-1)) if isinstance(space, spaces.MultiBinary) and found.shape == space.shape else found


def _sides(coins: np.ndarray) -> np.ndarray:
    """Which sides each coin may have, 0 then 1, [2 D]. coins: [D], of 0, 1, and 2 for either."""
    if not np.isin(coins, (0, 1, 2)).all():
        raise UserError(
            f"the action_mask of {len(coins)} coins is {shortened(coins.tolist(), 60)}: use 0 or 1 for one that must "
            "be so, 2 for either, or two numbers for each coin"
        )
    return np.stack([coins != 1, coins != 0], -1).reshape(-1).astype(np.int8)
