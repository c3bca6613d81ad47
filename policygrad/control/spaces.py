"""Gymnasium spaces as JSON and back, so that a policy is rebuilt without its environment."""

from typing import Any

import numpy as np
from gymnasium import spaces

from policygrad.errors import UserError


def describe(space: spaces.Space) -> dict[str, Any]:
    """A JSON description of a space. Raises UserError for a space that no policy here can take."""
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
    space = _unsupported(space) or space
    raise UserError(
        f"a {type(space).__name__} space is not supported; use Box, Discrete, MultiDiscrete or MultiBinary "
        "(observations may also be Dict or Tuple of these), or wrap the environment so that it has one"
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
    raise UserError(f"unknown kind of space {description['kind']!r} in the policy's description")


def _unsupported(space: spaces.Space) -> spaces.Space | None:
    """The first space in a Dict or Tuple, at any depth, that cannot be flattened into numbers either."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        members = space.values() if isinstance(space, spaces.Dict) else space
        return next((x for x in map(_unsupported, members) if x is not None), None)
    known = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    return None if isinstance(space, known) else space


def _finite(bound: np.ndarray) -> list[float | None]:
    """Infinity has no JSON: None stands for it."""
    return [float(x) if np.isfinite(x) else None for x in bound.reshape(-1)]


def _bound(numbers: list[float | None], infinite: float, shape: list[int]) -> np.ndarray:
    return np.array([infinite if x is None else x for x in numbers]).reshape(shape)
