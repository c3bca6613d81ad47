"""Gymnasium spaces: as JSON and back, and the action that a space's environment receives."""

from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces

from policygrad.errors import UserError, type_of


def describe(space: spaces.Space) -> dict[str, Any]:
    """A JSON description of a space. Raises UserError for a space without an encoder and a head."""
    match space:
        case spaces.Box():
            low, high = (_finite(x) for x in (space.low, space.high))
            return {"kind": "Box", "shape": list(space.shape), "dtype": str(space.dtype), "low": low, "high": high}
        case spaces.Discrete():
            return {"kind": "Discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            return {"kind": "MultiBinary", "shape": list(space.shape)}
    space = unsupported(space) or space
    raise UserError(
        f"{type_of(space)} space is not supported: wrap the environment so that it has a Box, Discrete, "
        "MultiDiscrete or MultiBinary space (for observations also a Dict or Tuple of these)"
    )


def rebuild(description: dict[str, Any]) -> spaces.Space:
    """The space that `describe` described."""
    match description["kind"]:
        case "Box":
            shape, dtype = description["shape"], np.dtype(description["dtype"])
            low, high = _bound(description["low"], -np.inf, shape), _bound(description["high"], np.inf, shape)
            return spaces.Box(low.astype(dtype), high.astype(dtype), dtype=dtype.type)
        case "Discrete":
            return spaces.Discrete(description["n"], start=description["start"])
        case "MultiDiscrete":
            return spaces.MultiDiscrete(description["nvec"], start=description["start"])
        case "MultiBinary":
            return spaces.MultiBinary(description["shape"])
    raise UserError(
        f"the policy's description names an unknown kind of space, {description['kind']!r}: save the policy again"
    )


def to_environment(action: np.ndarray, space: spaces.Space) -> np.ndarray:
    """The action [B, ...] as the environment receives it: from the space's start, in its bounds, shape and dtype.

    Raises UserError for a space that is not supported.
    """
    match space:
        case spaces.Discrete():
            return (action.reshape(-1) + space.start).astype(space.dtype)
        case spaces.MultiDiscrete():
            return (action.reshape(-1, *space.shape) + space.start).astype(space.dtype)
        case spaces.MultiBinary():
            return action.reshape(-1, *space.shape).astype(space.dtype)
        case spaces.Box():
            return in_box(action.astype(np.float64), space)
    raise UserError(f"{type_of(space)} action space is not supported: wrap the environment so that it has a Box")


class Units(NamedTuple):
    """The units of a Box, [D]: its number is center + half_width u, and where both bounds are real u is in [-1, 1]."""

    center: np.ndarray
    half_width: np.ndarray
    bounded: np.ndarray  # whether both bounds are real and differ


def units(space: spaces.Box) -> Units:
    """The units in which a policy that knows nothing else acts in a Box.

    One real bound is at u = -1 or 1 of half-width 1, none at all leaves the numbers as they are. A bound at the end of
    its type's range, or from 1e30 on, stands for none; the ends of 8 and 16 bits are real.
    """
    low, high = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (space.low, space.high))
    dtype: Any = space.dtype
    largest = np.inf
    if dtype.kind == "f":
        largest = min(1e30, float(np.finfo(dtype).max))
    elif dtype.itemsize > 2:
        largest = float(np.iinfo(dtype).max)
    has_low, has_high = np.abs(low) < largest, np.abs(high) < largest
    both = has_low & has_high
    with np.errstate(invalid="ignore", over="ignore"):
        half_width = np.where(both, (high - low) / 2, 1.0)
        center = np.select([both, has_low, has_high], [low + half_width, low + 1, high - 1], 0.0)
    return Units(center, half_width, both & (half_width > 0))


def in_box(numbers: np.ndarray, space: spaces.Box) -> np.ndarray:
    """float64 numbers [B, ...] in the Box's shape and dtype, clipped at its bounds; rounded if it holds integers."""
    numbers = np.clip(numbers.reshape(-1, *space.shape), space.low, space.high)
    return (np.rint(numbers) if space.dtype.kind in "iu" else numbers).astype(space.dtype)


def unsupported(space: spaces.Space) -> spaces.Space | None:
    """The first space in a Dict or Tuple, at any depth, that cannot be flattened into numbers."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        members = space.values() if isinstance(space, spaces.Dict) else space
        return next((x for x in map(unsupported, members) if x is not None), None)
    known = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    return None if isinstance(space, known) else space


def _finite(bound: np.ndarray) -> list[float | None]:
    """The bounds as a list, of one if all are the same, with None for infinity, which JSON lacks."""
    numbers = bound.reshape(-1)
    same = len(numbers) and (numbers == numbers[0]).all()
    return [float(x) if np.isfinite(x) else None for x in (numbers[:1] if same else numbers)]


def _bound(numbers: list[float | None], infinite: float, shape: list[int]) -> np.ndarray:
    found = np.array([infinite if x is None else x for x in numbers], np.float64)
    return np.full(shape, found[0]) if len(found) == 1 else found.reshape(shape)
