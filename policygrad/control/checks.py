"""What an environment returns, checked before it is averaged into a batch. Each check raises UserError."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from policygrad.errors import UserError, one_line

_DEFAULT = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


def checked_observations(obs: Any, space: spaces.Space, count: int) -> np.ndarray:
    """The observations of `count` environments: of the right shape, finite, in the space's dtype if that is whole."""
    obs, expected = np.asarray(obs), (count, *(space.shape or ()))
    if obs.shape != expected:
        raise UserError(f"the environments returned observations of shape {obs.shape}, not {expected}: fix the space")
    if np.dtype(space.dtype).kind in "biu":
        return _whole(obs, space)
    if not np.isfinite(obs).all():
        raise UserError("the environment returned an observation that is NaN or infinite: fix its step or reset")
    return obs


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of observations in a rollout: integers and bools keep theirs, others get torch's default."""
    if dtype.kind not in "biu":
        return np.dtype(_DEFAULT[torch.get_default_dtype()])
    return np.dtype(np.int64) if dtype.kind == "u" and dtype.itemsize > 1 else dtype  # torch computes in uint8 only


def _whole(obs: np.ndarray, space: spaces.Space) -> np.ndarray:
    """Observations in the space's integer dtype, the same numbers."""
    with np.errstate(invalid="ignore"):
        numbers = obs.astype(space.dtype)
    if obs.dtype != numbers.dtype and (numbers != obs).any():
        raise UserError(f"the environment returned an observation that is no {space.dtype} number: fix the space")
    if isinstance(space, spaces.Discrete):
        index = numbers - space.start
        if not ((index >= 0) & (index < space.n)).all():
            raise UserError(f"the environment returned an observation outside its {one_line(space, 60)}: fix the space")
    return numbers


def checked_reward(reward: Any, counts: np.ndarray) -> np.ndarray:
    """The rewards [B], of the right shape and finite; 0 where they do not count."""
    if np.shape(reward) != counts.shape:
        raise UserError(
            f"the environments returned rewards of shape {np.shape(reward)}, not {counts.shape}: fix their step"
        )
    reward = np.where(counts, reward, 0.0)
    if not np.isfinite(reward).all():
        wrong = reward[~np.isfinite(reward)][0]
        raise UserError(f"the environment's step returned a reward of {wrong}: fix its step")
    return reward


def final_observations(obs: Any, ended: np.ndarray, info: dict[str, Any]) -> np.ndarray:
    """The observations before the resets of this same step."""
    final = np.array(obs)
    found = info.get("final_obs")
    for i in np.flatnonzero(ended):
        if found is None or found[i] is None:
            raise UserError(
                "the vector environment resets in the same step without final_obs in its info: add the last "
                "observation of each episode there, or make it with autoreset_mode NEXT_STEP"
            )
        final[i] = found[i]
    return final


def check_groups(obs: np.ndarray, size: int) -> None:
    """Raise UserError if the environments of a group start from different observations."""
    rows = obs.reshape(-1, size, *obs.shape[1:])
    if not (rows == rows[:, :1]).all():
        raise no_seeds(size)


def no_seeds(size: int) -> UserError:
    """The environments cannot start in groups."""
    return UserError(
        f"groups of {size} rows need one seed per environment, and a reset that depends on nothing but its seed: "
        'make the environments with vectorization="sync"'
    )


def failure(method: str, error: Exception) -> UserError:
    """The environments raised an error."""
    if isinstance(error, UserError):
        return error
    text = f"the environment raised {type(error).__name__} in {method}: {one_line(error)}"
    return UserError(f"{text} (--debug shows where)")
