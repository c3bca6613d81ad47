"""Observations of several parts as one vector, of all environments at once."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorObservationWrapper
from gymnasium.vector.utils import batch_space

from policygrad.control.checks import whole
from policygrad.control.spaces import flat, members, unsupported


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
    """The function that makes a batch of observations [B, ...] one array [B, D]: by row spaces.flatten's, to the bit.

    The numbers of Box and MultiBinary follow one another as they are, and of Discrete and MultiDiscrete one-hot.
    Raises UserError for one of these outside its space.
    """
    if unsupported(space) is not None:  # which a policy will refuse
        return partial(spaces.flatten, space)  # type: ignore[return-value]
    leaves = [leaf for leaf, _ in members(space)]
    dtype = np.result_type(*[leaf.dtype for leaf in leaves])
    ends = np.cumsum([0, *[spaces.flatdim(leaf) for leaf in leaves]]).tolist()
    places = [(slice(*both), _numbers(leaf)) for both, leaf in zip(pairwise(ends), leaves, strict=True)]

    def flatten(observations: Any) -> np.ndarray:
        parts = [x for _, x in members(space, observations)]
        found = np.empty((len(parts[0]), ends[-1]), dtype)
        for (where, numbers), part in zip(places, parts, strict=True):
            found[:, where] = numbers(part)
        return found

    return flatten


def _numbers(space: Any) -> Callable[[Any], Any]:
    """The function (observations of one part [B, ...]) -> their numbers [B, n]."""
    if not isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return lambda x: np.asarray(x, dtype=space.dtype).reshape(len(x), -1)
    counts = np.reshape(space.n if isinstance(space, spaces.Discrete) else space.nvec, -1)
    starts = np.reshape(space.start, -1)
    choices = np.concatenate([start + np.arange(n) for start, n in zip(starts, counts, strict=True)])
    return lambda x: np.repeat(whole(np.asarray(x), space).reshape(len(x), -1), counts, axis=-1) == choices
