"""Observations of several parts as one vector, of all environments at once."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorObservationWrapper
from gymnasium.vector.utils import batch_space

from policygrad.control.checks import whole
from policygrad.control.spaces import flat, unsupported

Leaf = tuple[tuple[Any, ...], spaces.Space]  # the keys that lead to it


class VectorFlattened(VectorObservationWrapper):
    """Observations as gymnasium.wrappers.vector.FlattenObservation gives them, without its loop.

    masked: whether an action_mask is the mask. Raises ValueError where environments reset in the same step.
    """

    def __init__(self, environments: VectorEnv, masked: bool = True) -> None:
        super().__init__(environments)
        self.single_observation_space = flat(environments.single_observation_space, masked)
        self.observation_space = batch_space(self.single_observation_space, environments.num_envs)
        self.flatten = flattener(environments.single_observation_space)

    def observations(self, observations: Any) -> Any:
        """A batch of observations as an array [B, D]."""
        return self.flatten(observations)


def flattener(space: spaces.Space) -> Callable[[Any], np.ndarray]:
    """The function x -> spaces.flatten(space, x), to the bit; and of batches [B, ...], by row.

    The numbers of Box and MultiBinary follow one another as they are, and of Discrete and MultiDiscrete one-hot.
    Raises UserError for one of these outside its space.
    """
    if unsupported(space) is not None:  # which a policy will refuse
        return partial(spaces.flatten, space)  # type: ignore[return-value]
    leaves = list(_leaves(space))
    dtype = np.result_type(*[leaf.dtype for _, leaf in leaves])
    ends = np.cumsum([0, *[spaces.flatdim(leaf) for _, leaf in leaves]]).tolist()
    writes = [(path, slice(*ends), _numbers(leaf)) for (path, leaf), ends in zip(leaves, pairwise(ends), strict=True)]
    path, leaf = leaves[0]
    dimensions = len(leaf.shape or ())

    def flatten(obs: Any) -> np.ndarray:
        before = np.shape(_at(obs, path))
        before = before[: len(before) - dimensions]
        found = np.empty((*before, ends[-1]), dtype)
        for keys, where, numbers in writes:
            found[..., where] = numbers(_at(obs, keys), before)
        return found

    return flatten


def _leaves(space: spaces.Space, path: tuple[Any, ...] = ()) -> Iterator[Leaf]:
    """The parts that have none themselves, in the order of flattening."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        members = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        for key, member in members:
            yield from _leaves(member, (*path, key))
    else:
        yield path, space


def _at(obs: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        obs = obs[key]
    return obs


def _numbers(space: Any) -> Callable[[Any, tuple[int, ...]], Any]:
    """The function (observations [*before, ...], before) -> their numbers [*before, D]."""
    if isinstance(space, spaces.Discrete):
        choices = np.arange(space.start, space.start + space.n)
        return lambda x, before: whole(np.asarray(x), space)[..., None] == choices
    if isinstance(space, spaces.MultiDiscrete):
        counts = space.nvec.reshape(-1)
        choices = np.concatenate(
            [first + np.arange(n) for first, n in zip(space.start.reshape(-1), counts, strict=True)]
        )

        def one_hot(x: Any, before: tuple[int, ...]) -> np.ndarray:
            return np.repeat(whole(np.asarray(x), space).reshape(*before, -1), counts, axis=-1) == choices

        return one_hot
    return lambda x, before: np.reshape(np.asarray(x, dtype=space.dtype), (*before, -1))
