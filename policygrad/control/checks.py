"""What an environment returns, checked before it is averaged into a batch. Each check raises UserError."""

import math
import re
import traceback
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from policygrad.control.spaces import FlatActions
from policygrad.errors import NonFiniteError, UserError, one_line, shortened, type_of
from policygrad.machine import free_memory

Arrays = Any  # np.ndarray, or Tensor where the environments are of tensors
_DEFAULT = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


def checked_member(obs: Any, space: spaces.Space, said: str) -> Any:
    """One observation in its space's dtype, the same numbers.

    said: where it comes from, such as "the environment's step returned". Raises UserError for one that its batch would
    not hold as it is, and for a number that is outside its space, if the space has finitely many.
    """
    if isinstance(space, spaces.Dict | spaces.Tuple):
        parts = {}
        for name in space.spaces if isinstance(space, spaces.Dict) else range(len(space.spaces)):
            try:
                part = obs[name]
            except (KeyError, IndexError, TypeError) as error:
                raise _one_of_two(f"{said} an observation without {shortened(name, 40)}, which", "has") from error
            parts[name] = checked_member(part, space[name], said)  # type: ignore[index]
        if len(obs) > len(parts):
            other = next((x for x in obs if x not in parts), "") if isinstance(obs, dict) else len(parts)
            raise _one_of_two(f"{said} an observation with {shortened(other, 40)}, which", "lacks")
        return parts if isinstance(space, spaces.Dict) else tuple(parts.values())
    if space.shape is None or space.dtype is None:
        return obs
    array = obs if isinstance(obs, np.ndarray) else np.asarray(obs.detach().cpu() if isinstance(obs, Tensor) else obs)
    if array.shape != space.shape:
        raise _one_of_two(f"{said} an observation of shape {array.shape}, but", f"says {space.shape}")
    if array.dtype != space.dtype:
        if (changed := _changed(array, space.dtype)) is not None:
            raise UserError(
                f"{said} {changed} in an observation, which is no {space.dtype} number: fix it or the observation_space"
            )
        array = array.astype(space.dtype)
    if _is_outside(array, space):
        raise UserError(f"{said} {one_line(array, 40)}, which is outside {one_line(space, 60)}: fix one of the two")
    return array


def _one_of_two(said: str, is_so: str) -> UserError:
    return UserError(f"{said} its observation_space {is_so}: fix one of the two")


def _is_outside(numbers: np.ndarray, space: spaces.Space) -> bool:
    """Whether a number is none of a space of finitely many. The bounds of a Box are not checked."""
    match space:
        case spaces.Discrete() if numbers.shape == ():  # at every step of one environment, as Python's numbers
            return not 0 <= numbers.item() - space.start < space.n
        case spaces.Discrete():
            least, most = space.start, space.start + space.n - 1
        case spaces.MultiDiscrete():
            least, most = space.start, space.start + space.nvec - 1
        case spaces.MultiBinary() if numbers.dtype == np.int8:  # a mask at every step: as unsigned ones, -1 is 255
            return bool(numbers.view(np.uint8).max(initial=0) > 1)
        case spaces.MultiBinary():
            least, most = 0, 1
        case _:
            return False
    return bool(((numbers < least) | (numbers > most)).any())


def finite_numbers(info: Any) -> dict[str, float]:
    """The finite numbers in an info, as floats. The other entries, and Gymnasium's own names, are left out."""
    if not info:
        return {}
    if not isinstance(info, dict):
        raise UserError(f"the environment's info is {shortened(info, 40)}: fix its step or reset to return a dict")
    found = {}
    for name, x in info.items():
        named = isinstance(name, str) and not name.startswith(("_", "final_"))
        if named and isinstance(x, (int, float, np.number, np.bool_)):
            try:
                number = float(x)
            except (TypeError, OverflowError):  # complex, or an integer beyond floats
                continue
            if math.isfinite(number):
                found[name] = number
    return found


def check_distinct(made: list[Any]) -> None:
    """Raise UserError if one object serves as several environments."""
    if len({id(x) for x in made}) < len(made):
        raise UserError(
            f"for {len(made)} environments the callable returned the same object more than once: "
            "make a new environment in each call"
        )


def _changed(array: np.ndarray, dtype: np.dtype) -> str | None:
    """The first number that a cast to `dtype` would change by more than rounding; None if there is none."""
    if array.dtype.kind not in "biuf":
        return shortened(array.reshape(-1)[0], 40)
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
        wrong = np.isinf(cast) & np.isfinite(array) if np.dtype(dtype).kind == "f" else cast != array
    return str(array[wrong].reshape(-1)[0]) if wrong.any() else None


def checked_number(reward: Any) -> Any:
    """The reward of one step. Raises UserError if it is not a number."""
    if not isinstance(reward, float | int):
        if np.ndim(reward) != 0:
            raise UserError(
                f"the environment's step returned a reward of shape {np.shape(reward)}: fix it to return a number"
            )
        if np.asarray(reward).dtype.kind not in "biuf":
            raise UserError(
                f"the environment's step returned a reward of {shortened(reward, 60)}: fix it to return a number"
            )
    return reward


def checked_flag(flag: Any, name: str) -> bool:
    """`terminated` or `truncated` of one step. Raises UserError if it is neither true nor false."""
    if not isinstance(flag, bool | np.bool_):
        array = np.asarray(flag)
        if array.shape != () or array.dtype.kind not in "biuf" or array not in (0, 1):
            raise UserError(
                f"the environment's step returned {shortened(flag, 40)} as {name}: fix it to return True or False"
            )
    return bool(flag)


def checked_observations(obs: Any, space: spaces.Space, count: int) -> np.ndarray:
    """The observations of `count` environments: of the right shape, finite, in the space's dtype if that is whole."""
    obs, expected = np.asarray(obs), (count, *(space.shape or ()))
    if obs.shape != expected:
        raise UserError(f"the environments returned observations of shape {obs.shape}, not {expected}: fix the space")
    if np.dtype(space.dtype).kind in "biu":
        return whole(obs, space)
    if not np.isfinite(obs).all():
        i = int(np.flatnonzero(~np.isfinite(obs).reshape(count, -1).all(1))[0])
        raise NonFiniteError(
            f"environment {i} of {count} returned an observation that is NaN or infinite: fix its step or reset"
        )
    return obs


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of observations in a rollout: integers and bools keep theirs, others get torch's default."""
    if dtype.kind not in "biu":
        return np.dtype(_DEFAULT[torch.get_default_dtype()])
    return np.dtype(np.int64) if dtype.kind == "u" and dtype.itemsize > 1 else dtype  # torch computes in uint8 only


def whole(obs: np.ndarray, space: spaces.Space) -> np.ndarray:
    """Observations in the space's integer dtype, the same numbers."""
    with np.errstate(invalid="ignore"):
        numbers = obs.astype(space.dtype)
    if obs.dtype != numbers.dtype and (numbers != obs).any():
        raise UserError(f"the environment returned an observation that is no {space.dtype} number: fix the space")
    if _is_outside(numbers, space):
        raise UserError(f"the environment returned an observation outside its {one_line(space, 60)}: fix the space")
    return numbers


def checked_reward(reward: Any, counts: np.ndarray) -> np.ndarray:
    """The rewards [B], of the right shape and finite; 0 where they do not count."""
    if np.shape(reward) != counts.shape:
        raise UserError(
            f"the environments returned rewards of shape {np.shape(reward)}, not {counts.shape}: fix their step"
        )
    reward = np.where(counts, reward, 0.0)
    most = torch.finfo(torch.get_default_dtype()).max
    if not float(np.abs(reward).max()) <= most:  # NaN too
        wrong = ~(np.abs(reward.astype(np.float64)) <= most)
        i = int(np.flatnonzero(wrong)[0])
        beyond = " (beyond float32)" if np.isfinite(reward[i]) else ""
        raise NonFiniteError(f"environment {i} of {len(reward)} returned a reward of {reward[i]}{beyond}: fix its step")
    return reward


def stored(obs: np.ndarray) -> np.ndarray:
    """Observations as a rollout stores them. Raises UserError for numbers that would change."""
    dtype = stored_dtype(obs.dtype)
    if obs.dtype == dtype:
        return obs
    if (changed := _changed(obs, dtype)) is not None:
        raise UserError(f"the environment returned {changed} in an observation, which is beyond {dtype}: scale it down")
    return obs.astype(dtype)


def as_tensor(x: Arrays, device: torch.device) -> Tensor:
    """A copy in memory as torch lays it out: row by row, from a multiple of 64 bytes on.

    The last bit of a matrix product depends on that. Environments may hand out a transposed array, and the state of a
    run that is resumed is none: the first step after resuming would come to another bit.
    """
    return torch.as_tensor(x).to(device, copy=True, memory_format=torch.contiguous_format)


def check_next_step(info: dict[str, Any]) -> None:
    """Raise UserError if an environment that is said to reset on the next step reports that it already has."""
    for name in ("final_obs", "final_observation"):
        if info.get(name) is not None:
            raise UserError(
                f"the vector environment says autoreset_mode NEXT_STEP, and its info has {name}, as of SAME_STEP: "
                "set the mode that it has in its metadata"
            )


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


def checked_distribution(output: Any, rows: int, space: spaces.Space) -> Any:
    """What a policy returned for observations [rows, 1, ...], if it is a distribution of actions in the space.

    Raises UserError if it is not.
    """
    distribution = getattr(output, "distribution", output)  # the one that a mode is of
    if not callable(getattr(distribution, "log_prob", None)):
        what = "a tensor, such as logits," if isinstance(distribution, Tensor) else type_of(distribution)
        raise UserError(
            f"the policy returned {what} and no distribution of actions: return one of torch.distributions, such as "
            "Categorical(logits=...)"
        )
    if not isinstance(distribution, torch.distributions.Distribution):
        return output
    batch, event = tuple(distribution.batch_shape), tuple(distribution.event_shape)
    if batch != (rows, 1):
        advice = "give it obs's first two dimensions"
        if batch[:2] == (rows, 1) and space.shape:
            advice = "wrap it in torch.distributions.Independent(..., 1)"
        raise UserError(f"the policy's distribution has batch_shape {batch} for obs of [{rows}, 1, ...]: {advice}")
    if hasattr(distribution, "to_environment") or space.shape is None:
        return output
    if math.prod(event) != math.prod(space.shape):
        raise UserError(
            f"the policy's actions have shape {event}, and the action space's {space.shape}: fix the policy"
        )
    if isinstance(space, FlatActions):
        return output
    continuous = isinstance(space, spaces.Box)
    if _is_discrete(distribution) == continuous and not (continuous and space.dtype.kind in "iu"):  # type: ignore[union-attr]
        choice = "a Categorical" if isinstance(space, spaces.Discrete) else "Independent(Categorical(...), 1)"
        raise UserError(
            f"the policy returned {type_of(distribution)}, and actions are {one_line(space, 40)}: return "
            + ("Independent(Normal(mean, std), 1)" if continuous else choice)
        )
    if isinstance(space, spaces.Discrete) and isinstance(distribution, torch.distributions.Categorical):
        count = distribution.logits.shape[-1]
        if count != space.n:
            raise UserError(
                f"the policy chooses among {count} actions, and the environment has {space.n}: fix the policy"
            )
    return output


def _is_discrete(distribution: torch.distributions.Distribution) -> bool | None:
    """Whether its actions are whole numbers, if it says so."""
    try:
        return distribution.support.is_discrete  # type: ignore[union-attr]
    except NotImplementedError:
        return None


def called(module: torch.nn.Module, obs: Any, name: str = "policy") -> Any:
    """What a policy or a critic returns. Raises UserError for an error of the user's own, with the shape of obs."""
    try:
        return module(obs)
    except Exception as error:
        own = not type(module).__module__.startswith("policygrad.")
        if not own or re.search(r"\bnan\b", str(error), re.IGNORECASE):  # of training, and not of the module's code
            raise
        seen = getattr(obs, "obs", obs)  # that of Rows
        said = f"the {name} raised {type(error).__name__} for obs {list(seen.shape)} of {seen.dtype}: "
        raise UserError(said + one_line(error, 197 - len(said))) from error


def check_entropy(distribution: Any) -> None:
    """Raise UserError if a distribution of torch's has no entropy, which every method reports."""
    try:
        _ = isinstance(distribution, torch.distributions.Distribution) and distribution.entropy()
    except NotImplementedError as error:
        raise UserError(
            f"the policy's {type(distribution).__name__} has no entropy(): give it one in a class of your own; "
            'distribution="squashed" is a Gaussian through tanh that has one'
        ) from error


def check_memory(size: int, what: str, advice: str) -> None:
    """Raise UserError for more bytes than there are free, before they are allocated."""
    if size > (free := free_memory()):
        raise UserError(f"{what} would take {size / 2**30:,.3g} GiB, and {free / 2**30:,.3g} are free here: {advice}")


def check_groups(obs: Arrays, size: int) -> None:
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
    if any(frame.name == "_add_info" for frame in traceback.extract_tb(error.__traceback__)):
        return UserError(
            f"the environment's info changes its types or shapes, and Gymnasium cannot batch it ({one_line(error, 50)}"
            "): keep them, or hand in a callable that makes one environment"
        )
    text = f"the environment raised {type(error).__name__} in {method}: {one_line(error)}"
    return UserError(f"{text} (--debug shows where)")
