"""Gymnasium spaces: as JSON and back, and actions on the way to a space's environment and from it."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from policygrad.errors import UserError, type_of

MASK = "action_mask"  # the key of a Dict observation that says which actions are allowed

AGENT = "agent_index"  # the key that says which agent sees it, where each has its own parameters


class Flat(spaces.Box):
    """A Dict or Tuple observation as one vector [N], as gymnasium.spaces.flatten makes it, which knows its parts.

    slices: where each part is, by its key, or its number in a Tuple. leaves: (key, space, place) of every part that is
    no Dict or Tuple itself, in order. mask: where the `action_mask` of a Dict is; None if it has none, or if not
    `masked`. kept [N]: the numbers that no normalization may change, those of masks, images and
    an agent's number. mixed: whether there are images among other numbers, which then take a float for each pixel.

    Rollouts keep mixed observations packed, if all that read them know of it: as bytes [..., K], first those of the
    other numbers in torch's default dtype, then one for each pixel, then some that fill the last number.
    """

    def __init__(self, of: spaces.Dict | spaces.Tuple, masked: bool = True) -> None:
        _some(of, "observation")
        flattened: Any = spaces.flatten_space(of)
        super().__init__(flattened.low, flattened.high, flattened.shape, flattened.dtype)
        self.of, start = of, 0
        self.slices: dict[str, slice] = {}
        self.leaves: list[tuple[str, spaces.Space, slice]] = []
        self.kept = np.zeros(self.shape, bool)
        for name, part in of.spaces.items() if isinstance(of, spaces.Dict) else enumerate(of.spaces):
            first = start
            for leaf, _ in members(part):
                place = slice(start, start + spaces.flatdim(leaf))
                self.leaves.append((str(name), leaf, place))
                self.kept[place] = is_image(leaf)
                start = place.stop
            self.slices[str(name)] = slice(first, start)
        self.mask = self.slices.get(MASK) if masked and isinstance(of, spaces.Dict) else None
        for unscaled in (self.mask, self.slices.get(AGENT)):
            if unscaled is not None:
                self.kept[unscaled] = True

        self.images = [place for _, leaf, place in self.leaves if is_image(leaf)]
        self.mixed = bool(self.images) and self.dtype != np.uint8

    def parts(self, obs: Tensor) -> dict[str, Tensor]:
        """The parts of observations [..., N], by their keys, each [..., n]."""
        return {name: obs[..., part] for name, part in self.slices.items()}

    def packed(self, obs: np.ndarray) -> np.ndarray:
        """Mixed observations [..., N] as bytes [..., K]."""
        dtype = _of_torch(torch.get_default_dtype())
        others = [place for _, leaf, place in self.leaves if not is_image(leaf)]
        numbers = np.concatenate([obs[..., :0].astype(dtype), *(obs[..., x].astype(dtype) for x in others)], -1)
        pixels = [obs[..., x].astype(np.uint8) for x in self.images]
        spare = np.zeros((*obs.shape[:-1], -sum(x.shape[-1] for x in pixels) % dtype.itemsize), np.uint8)
        return np.concatenate([numbers.view(np.uint8), *pixels, spare], -1)

    def place(self, where: slice) -> "Place":
        """The place of numbers of the vector, which are within an image, or have no pixels."""
        before = sum(x.stop - x.start for x in self.images if x.stop <= where.start)
        pixels = sum(x.stop - x.start for x in self.images)
        image = any(x.start <= where.start < x.stop for x in self.images)
        first = before if image else where.start - before
        return Place(where, self.mixed, image, first, self.shape[0] - pixels)


class Place(NamedTuple):
    """Where numbers of a Flat are, in observations that are packed or not."""

    where: slice  # in the vector
    mixed: bool
    image: bool
    first: int  # the pixels, or the other numbers, before it
    others: int  # the numbers of the vector that are no pixels

    def of(self, obs: Tensor) -> Tensor:
        """These numbers of observations [..., N], or of packed ones [..., K]."""
        if not self.mixed or obs.dtype != torch.uint8:
            return obs[..., self.where]
        dtype, count = torch.get_default_dtype(), self.where.stop - self.where.start
        if self.image:
            first = self.others * dtype.itemsize + self.first
            return obs[..., first : first + count]
        found = obs[..., self.first * dtype.itemsize : (self.first + count) * dtype.itemsize]
        return found.contiguous().view(dtype)


def _of_torch(dtype: torch.dtype) -> np.dtype:
    """The same dtype of numpy's."""
    return torch.zeros(0, dtype=dtype).numpy().dtype


def has_densities(space: spaces.Space) -> bool:
    """Whether a distribution over the space, or over a part of it, has a density and not probabilities."""
    parts = space.spaces if isinstance(space, spaces.Dict | spaces.Tuple) else ()
    inner = parts.values() if isinstance(parts, dict) else parts
    return isinstance(space, spaces.Box) or any(has_densities(part) for part in inner)


def is_image(space: spaces.Space) -> bool:
    """Whether observations in a space are images: uint8, of three dimensions."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def kept_of(space: spaces.Space) -> np.ndarray | None:
    """Which numbers of an observation no normalization may change; None if there are none."""
    return space.kept if isinstance(space, Flat) and space.kept.any() else None


class FlatActions(spaces.Box):
    """A Dict or Tuple of actions, nested as it may be, as one vector [D] of float64: the numbers of its parts in order.

    parts: each part that is no Dict or Tuple, and where it is in the vector.
    """

    def __init__(self, of: spaces.Space) -> None:
        self.of, self.parts, bounds = of, [], []
        start = 0
        for part in _some(of, "action"):
            bounds.append(_numbers_between(part))
            self.parts.append((part, slice(start, start + len(bounds[-1][0]))))
            start += len(bounds[-1][0])
        low, high = (np.concatenate(x) for x in zip(*bounds, strict=True))
        super().__init__(low, high, dtype=np.float64)

    def structured(self, action: np.ndarray) -> Any:
        """The action of a vector [D] as the environment takes it; of vectors [B, D], with arrays [B, ...] in it."""

        def numbers(part: spaces.Space, where: slice) -> Any:
            return action[..., where].reshape((*action.shape[:-1], *(part.shape or ()))).astype(part.dtype)[()]

        return self.assembled(numbers)

    def assembled(self, numbers: Callable[[spaces.Space, slice], Any]) -> Any:
        """The Dict or Tuple of numbers(part, where it is in the vector) for each part."""
        parts = iter(self.parts)

        def made(space: spaces.Space) -> Any:
            if isinstance(space, spaces.Dict):
                return {name: made(x) for name, x in space.spaces.items()}
            if isinstance(space, spaces.Tuple):
                return tuple(made(x) for x in space.spaces)
            return numbers(*next(parts))

        return made(self.of)

    def vectors(self, actions: Any) -> np.ndarray:
        """The vectors [B, D] of a batch of actions, as `structured` makes them."""
        parts = [np.asarray(x, np.float64).reshape(len(x), -1) for _, x in members(self.of, actions)]
        return np.concatenate(parts, 1)


def _some(space: spaces.Space, what: str) -> list[spaces.Space]:
    """The parts of a space. Raises UserError if there are none."""
    if not (found := [x for x, _ in members(space)]):
        raise UserError(f"the {what} space is a Dict or Tuple without parts: give it at least one")
    return found


def members(space: spaces.Space, x: Any = None) -> Iterator[tuple[spaces.Space, Any]]:
    """The parts of a space that are no Dict or Tuple, in order, each with that part of x, an element or a batch."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        yield space, x
        return
    for name, member in space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space):
        yield from members(member, None if x is None else x[name])


def _numbers_between(space: spaces.Space) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number in each place of an action of one part, [D]. Raises UserError."""
    match space:
        case spaces.Discrete():
            found = space.start, space.start + space.n - 1
        case spaces.MultiDiscrete():
            found = space.start, space.start + space.nvec - 1
        case spaces.MultiBinary():
            found = np.zeros(space.shape), np.ones(space.shape)
        case spaces.Box():
            found = space.low, space.high
        case _:
            describe(space)  # raises
    return tuple(np.asarray(x, np.float64).reshape(-1) for x in found)  # type: ignore[return-value]


def flat(space: spaces.Space, masked: bool = True) -> spaces.Space:
    """The space of flattened observations; a Flat of a Dict or Tuple. masked: whether an action_mask is the mask."""
    structured = isinstance(space, spaces.Dict | spaces.Tuple) and unsupported(space) is None
    return Flat(space, masked) if structured else spaces.flatten_space(space)  # type: ignore[arg-type]


def describe(space: spaces.Space) -> dict[str, Any]:
    """A JSON description of a space. Raises UserError for a space without an encoder and a head."""
    match space:
        case Flat():
            return {"kind": "Flat", "of": describe_parts(space.of), "masked": space.mask is not None}
        case FlatActions():
            return {"kind": "FlatActions", "of": describe_parts(space.of)}
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
        "MultiDiscrete or MultiBinary space, or a Dict or Tuple of these"
    )


def describe_parts(space: spaces.Space) -> dict[str, Any]:
    """A JSON description of a space that may be a Dict or a Tuple of others. A Dict's keys keep their order."""
    match space:
        case spaces.Dict():
            return {"kind": "Dict", "of": [[name, describe_parts(x)] for name, x in space.spaces.items()]}
        case spaces.Tuple():
            return {"kind": "Tuple", "of": [describe_parts(x) for x in space.spaces]}
    return describe(space)


def rebuild(description: dict[str, Any]) -> spaces.Space:
    """The space that `describe` described."""
    match description["kind"]:
        case "Flat":
            return Flat(rebuild(description["of"]), description["masked"])  # type: ignore[arg-type]
        case "FlatActions":
            return FlatActions(rebuild(description["of"]))
        case "Dict":
            return spaces.Dict(OrderedDict((name, rebuild(x)) for name, x in description["of"]))  # a dict is sorted
        case "Tuple":
            return spaces.Tuple([rebuild(x) for x in description["of"]])
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
        case FlatActions():
            taken = [to_environment(action[:, where], part) for part, where in space.parts]
            return np.concatenate([x.reshape(len(action), -1).astype(np.float64) for x in taken], 1)
        case spaces.Discrete():
            return (action.reshape(-1) + space.start).astype(space.dtype)
        case spaces.MultiDiscrete():
            return (action.reshape(-1, *space.shape) + space.start).astype(space.dtype)
        case spaces.MultiBinary():
            return action.reshape(-1, *space.shape).astype(space.dtype)
        case spaces.Box():
            return in_box(action.astype(np.float64), space)
    raise UserError(f"{type_of(space)} action space is not supported: wrap the environment so that it has a Box")


def from_environment(action: np.ndarray, space: spaces.Space) -> np.ndarray:
    """Actions [B, ...] of the space as a policy counts them: from 0, and the numbers of each in one row, [B, D].

    The inverse of to_environment. Raises UserError for a space that is not supported.
    """
    match space:
        case FlatActions():
            parts = [from_environment(action[:, where], part) for part, where in space.parts]
            return np.concatenate([x.reshape(len(action), -1).astype(np.float64) for x in parts], 1)
        case spaces.Discrete():
            return (action.reshape(-1) - space.start).astype(np.int64)
        case spaces.MultiDiscrete():
            return (action - space.start).reshape(len(action), -1).astype(np.int64)
        case spaces.MultiBinary() | spaces.Box():
            return action.reshape(len(action), -1).astype(np.float64)
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
    numbers = np.minimum(np.maximum(numbers.reshape(-1, *space.shape), space.low), space.high)  # np.clip takes longer
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
