"""Environments of tensors: arrays of torch, JAX or another library on any device, handed on by DLPack, not by NumPy."""

import warnings
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._pytree import tree_map

from policygrad.control.distributions import (
    ClippedNormal,
    DiscreteActions,
    IndependentActions,
    JointActions,
    ScaledBeta,
    SquashedNormal,
)
from policygrad.control.spaces import Flat, FlatActions, describe, flat
from policygrad.errors import Note, UserError, one_line, shortened, type_of


def of_tensors(environment: Any) -> bool:
    """Whether an environment returns tensors: its metadata has `jax` or `torch`, or it is an Env of several copies."""
    metadata = environment.metadata or {}
    several = isinstance(environment, gymnasium.Env) and hasattr(environment.unwrapped, "num_envs")
    return several or (isinstance(environment, VectorEnv) and bool(metadata.get("jax") or metadata.get("torch")))


class TensorEnvironments(VectorEnv):
    """A vector environment whose arrays arrive as tensors on their own device, and whose actions leave as its arrays.

    environments: a VectorEnv whose arrays have `__dlpack__` and `__array_namespace__` (torch, JAX, CuPy); or a
    gymnasium.Env of several copies, as Isaac Lab's ManagerBasedRLEnv and DirectRLEnv: `num_envs`,
    `single_observation_space`, `single_action_space`, observations as a dict of tensors, resets in the same step. Where
    such an environment has no `final_obs` [B, ...] in its extras, the last observation of an episode is taken to be the
    one before, as the field does, and a Note says so at the first episode that is cut.

    Dict and Tuple observations become one vector of their parts, in the order of gymnasium.spaces.flatten; Dict and
    Tuple actions come as one vector (FlatActions), and the environment gets its own, of tensors [B, ...]. masked:
    whether a key `action_mask` is the mask of actions. Raises UserError for spaces of other kinds.
    """

    def __init__(self, environments: VectorEnv | gymnasium.Env, *, masked: bool = True) -> None:
        base: Any = environments.unwrapped if isinstance(environments, gymnasium.Env) else environments
        self.environments, self.num_envs = environments, base.num_envs
        self.unflattened, self.single_action_space = base.single_observation_space, base.single_action_space
        self.single_observation_space = self.unflattened
        if not isinstance(self.unflattened, spaces.Box | spaces.Discrete):
            self.single_observation_space = flat(self.unflattened, masked)
        leaves = self.single_observation_space.leaves if isinstance(self.single_observation_space, Flat) else []
        for _, leaf, _ in leaves:
            if not isinstance(leaf, spaces.Box | spaces.Discrete | spaces.MultiBinary):
                raise UserError(
                    f"observations of tensors are Box, Discrete or MultiBinary, or a Dict or Tuple of these, not "
                    f"{one_line(leaf, 60)}: change the environment's space"
                )
        if isinstance(self.single_action_space, spaces.Dict | spaces.Tuple):
            self.single_action_space = FlatActions(self.single_action_space)  # raises
        describe(self.single_action_space)  # raises
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.metadata = dict(environments.metadata or {})
        self.several = isinstance(environments, gymnasium.Env)
        if self.several:
            self.metadata["autoreset_mode"] = AutoresetMode.SAME_STEP
        elif any(x.__module__ == "gymnasium.envs.functional_jax_env" for x in type(environments.unwrapped).__mro__):
            self.metadata.setdefault("autoreset_mode", AutoresetMode.NEXT_STEP)  # some of them do not say so
        self.spec, self.render_mode = environments.spec, environments.render_mode
        limits = (getattr(base, name, None) for name in ("max_episode_steps", "max_episode_length", "time_limit"))
        self.max_episode_steps = next((int(x) for x in limits if x), None)
        self.namespace: Any = None  # of the environment's arrays, if they are not torch's
        self.device = torch.device("cpu")
        self.last: Tensor | None = None
        self.told = False

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Tensor, dict[str, Any]]:
        """As the environments', with observations as one tensor [B, ...]."""
        obs, info = self.environments.reset(seed=seed) if options is None else self.environments.reset(
            seed=seed, options=options
        )  # fmt: skip
        first = _first(obs)
        self.namespace = None if isinstance(first, Tensor) else _namespace(first)
        found = self._observations(obs)
        self.device = found.device
        self.last = found.clone() if self.several else None
        return found, info or {}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """As the environments', with tensors [B, ...]; the rest of `info` stays as it is."""
        actions = actions.to(self.device)
        space = self.single_action_space
        taken = structured(actions, space) if isinstance(space, FlatActions) else actions
        if self.namespace is not None:
            taken = tree_map(self.namespace.from_dlpack, taken)
        obs, reward, terminated, truncated, info = self.environments.step(taken)
        found, info = self._observations(obs), dict(info or {})
        terminated, truncated = self._flags(terminated, "terminated"), self._flags(truncated, "truncated")
        if info.get("final_obs") is not None:
            info["final_obs"] = self._observations(info["final_obs"])
        elif self.several:
            info["final_obs"] = self.last
            if not self.told and bool((truncated & ~terminated).any()):
                self.told = True
                warnings.warn(
                    "the environment's extras have no final_obs: an episode that is cut is valued at its last "
                    "observation but one",
                    Note,
                    stacklevel=2,
                )
        self.last = found.clone() if self.several else None
        return found, tensor(reward), terminated, truncated, info

    def close_extras(self, **options: Any) -> None:
        """Close the environments."""
        self.environments.close()

    def _flags(self, flags: Any, name: str) -> Tensor:
        found = tensor(flags)
        if found.shape != (self.num_envs,):
            raise UserError(
                f"the environments returned {name} of shape {tuple(found.shape)}, not ({self.num_envs},): fix step"
            )
        return found.bool()

    def _observations(self, obs: Any) -> Tensor:
        """Observations as one tensor [B, ...]."""
        if not isinstance(self.single_observation_space, Flat):
            return tensor(obs)
        dtype = torch.from_numpy(np.zeros(0, self.single_observation_space.dtype)).dtype
        parts = self._parts(obs, self.unflattened)
        return torch.cat([x.reshape(self.num_envs, -1).to(dtype) for x in parts], 1)

    def _parts(self, obs: Any, space: spaces.Space) -> list[Tensor]:
        """The parts of structured observations, in order."""
        if isinstance(space, spaces.Dict | spaces.Tuple):
            names: Any = list(space.spaces) if isinstance(space, spaces.Dict) else range(len(space.spaces))
            given = list(obs) if isinstance(obs, dict) else range(len(obs))
            if other := {*names} ^ {*given}:
                name = shortened(min(other, key=str), 40)
                which = "without" if {*names} & other else "with"
                raise UserError(
                    f"the environment returned observations {which} {name}, and its observation_space says otherwise: "
                    "fix one of the two"
                )
            return [x for name in names for x in self._parts(obs[name], space[name])]
        found = tensor(obs)
        if found.shape != (self.num_envs, *(space.shape or ())):
            raise UserError(
                f"the environment returned a part of its observations of shape {tuple(found.shape)}, and its space is "
                f"{one_line(space, 60)}: fix one of the two"
            )
        if isinstance(space, spaces.Discrete):
            return [one_hot(found.long() - int(space.start), int(space.n))]
        return [found]


def tensor(array: Any) -> Tensor:
    """An array as a tensor on its device, by DLPack: the same memory. Raises UserError for what has no such thing."""
    if isinstance(array, Tensor):
        return array.detach()
    if not hasattr(array, "__dlpack__"):
        raise UserError(
            f"the environment returned {type_of(array)} where a tensor was expected: return arrays [B, ...]"
        )
    if isinstance(array, np.ndarray) and not array.flags.writeable:  # which DLPack does not hand out
        array = array.copy()
    return torch.from_dlpack(array)


def _first(obs: Any) -> Any:
    while isinstance(obs, dict | tuple):
        obs = next(iter(obs.values() if isinstance(obs, dict) else obs), None)
    return obs


def _namespace(array: Any) -> Any:
    """The array API of an array's library, which has from_dlpack."""
    if not hasattr(array, "__array_namespace__"):
        raise UserError(
            f"the environment returned {type_of(array)}: return arrays of torch, or of a library with the array API"
        )
    return array.__array_namespace__()


def to_environment(action: Tensor, distribution: Any, space: Any) -> Tensor:
    """The action [B, ...] as the environment receives it: the distribution's `to_environment`, in torch.

    Raises UserError for a distribution that has a way of its own.
    """
    kind = type(distribution)
    if kind is JointActions:
        parts = zip(distribution.of_parts(action), distribution.parts, distribution.space.parts, strict=True)
        taken = ((to_environment(x, part, one), where) for x, part, (one, where) in parts)
        return torch.cat([x.reshape(-1, where.stop - where.start).double() for x, where in taken], 1)
    if hasattr(distribution, "to_environment") and kind not in (
        *(DiscreteActions, IndependentActions),
        *(ClippedNormal, SquashedNormal, ScaledBeta),
    ):
        raise UserError(f"{type_of(distribution)} maps its actions in a way of its own, outside of torch")
    if isinstance(space, FlatActions):  # of a policy of the user's own, in the environment's units but for the starts
        taken = ((to_environment(action[:, where], None, one), where) for one, where in space.parts)
        return torch.cat([x.reshape(-1, where.stop - where.start).double() for x, where in taken], 1)
    dtype = torch.from_numpy(np.zeros(0, space.dtype)).dtype
    if not isinstance(space, spaces.Box):
        start = torch.as_tensor(getattr(space, "start", 0), device=action.device)
        return (action.reshape(-1, *space.shape).to(torch.int64) + start).to(dtype)
    low, high = (torch.from_numpy(np.asarray(x, np.float64)).to(action.device) for x in (space.low, space.high))
    number = action.double().reshape(-1, *space.shape)
    if kind is ClippedNormal:
        units = (torch.from_numpy(x.reshape(space.shape)) for x in distribution.units[:2])
        center, half_width = (x.to(action.device) for x in units)
        number = center + half_width * number
    elif kind is SquashedNormal:
        number = low + (number.tanh() + 1) / 2 * (high - low)
    elif kind is ScaledBeta:
        number = low + number.sigmoid() * (high - low)
    number = torch.minimum(torch.maximum(number, low), high)
    return (number if dtype.is_floating_point else number.round()).to(dtype)


def structured(action: Tensor, space: FlatActions) -> Any:
    """Actions [B, D] as tensors [B, ...] in the space's Dict or Tuple, each in its own type: FlatActions.structured."""

    def numbers(part: spaces.Space, where: slice) -> Tensor:
        found = action[:, where].reshape(-1, *(part.shape or ()))
        return found.to(torch.from_numpy(np.zeros(0, part.dtype)).dtype).contiguous()  # JAX takes no strides

    return space.assembled(numbers)


def normalized(obs: Tensor, mean: Tensor, std: Tensor, kept: Tensor | None) -> Tensor:
    """clip((obs - mean) / std, -10, 10) of obs [B, ...] in float64, and 0 where std is 0; as it is where `kept`."""
    varies = std > 0
    found = ((obs.double() - mean) / std.where(varies, 1.0)).where(varies, 0.0).clamp(-10, 10)
    return found if kept is None else torch.where(kept, obs.to(found.dtype), found)
