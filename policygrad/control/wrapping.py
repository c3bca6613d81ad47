"""Wrappers of Gymnasium and MiniGrid by their names, with arguments as JSON: `TimeLimit:200`, `RescaleAction:-1,1`.

Those that write files, open windows, take functions or change when an environment resets are not among them: a run
keeps these names, and a run is data.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import gymnasium
import numpy as np

from policygrad.control.checks import check_memory
from policygrad.errors import UserError, listed, one_line, shortened

NAMES = (
    "AddRenderObservation", "AddWhiteNoise", "AtariPreprocessing", "ClipAction", "ClipReward", "DelayObservation",
    "DiscretizeAction", "DiscretizeObservation", "FilterObservation", "FlattenObservation", "FrameStackObservation",
    "GrayscaleObservation", "MaxAndSkipObservation", "NormalizeObservation", "NormalizeReward", "ObstructView",
    "RepeatAction", "RescaleAction", "RescaleObservation", "ReshapeObservation", "ResizeObservation", "StickyAction",
    "TimeAwareObservation", "TimeLimit",
)  # fmt: skip

MINIGRID = (
    "FullyObsWrapper", "ImgObsWrapper", "OneHotPartialObsWrapper", "RGBImgObsWrapper", "RGBImgPartialObsWrapper",
    "ViewSizeWrapper",
)  # fmt: skip

Wrap = Callable[[gymnasium.Env], gymnasium.Env]


def wrapper(text: str) -> Wrap:
    """What `NAME`, `NAME:1,[2,3]` or `NAME:{"argument": 1}` does to an environment. Raises UserError."""
    name, _, rest = text.partition(":")
    known = (*NAMES, *MINIGRID)
    if name not in known:
        near = [x for x in known if x.lower() == name.lower()] or NAMES
        said = f"wrap is {shortened(text, 40)}, and no wrapper is called {shortened(name, 30)}: "
        raise UserError(said + (f"did you mean {near[0]}?" if len(near) == 1 else listed(near, 80)))
    try:
        given = json.loads(rest) if rest.lstrip().startswith("{") else json.loads(f"[{rest}]")
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"wrap is {shortened(text, 60)}, and its arguments are no JSON: write {name}:1,2 or {name}:"
            '{"argument": 1}'
        ) from error
    positional, named = ([], given) if isinstance(given, dict) else (list(map(_plain, given)), {})
    named = {x: _plain(y) for x, y in named.items()}

    def wrap(environment: gymnasium.Env) -> gymnasium.Env:
        check_memory(
            _least_size(name, environment.observation_space, [*_numbers([positional, *named.values()])]),
            f"wrap {shortened(text, 60)}",
            "make it smaller",
        )
        try:
            module = import_module("minigrid.wrappers" if name in MINIGRID else "gymnasium.wrappers")
            return getattr(module, name)(environment, *positional, **named)
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
            raise UserError(f"wrap {name} needs a package that is not installed: {one_line(error)}") from error
        except Exception as error:
            said = f"wrap {shortened(text, 40)} does not fit the environment or its arguments: "
            raise UserError(said + one_line(f"{type(error).__name__}: {error}", 200 - len(said))) from error

    return wrap


def wrapped(environment: gymnasium.Env, wraps: Sequence[Wrap]) -> gymnasium.Env:
    """The environment in its wrappers, the first one inside."""
    for wrap in wraps:
        environment = wrap(environment)
    return environment


def _least_size(name: str, space: gymnasium.Space, numbers: Sequence[int]) -> int:
    """At least how many bytes a wrapper with these numbers as arguments takes; 0 if they say nothing about it."""
    largest = max(numbers, default=0)
    match name:
        case "FrameStackObservation" | "DiscretizeObservation" | "DiscretizeAction":
            return largest * max(1, math.prod(space.shape or ()) * np.dtype(space.dtype or np.uint8).itemsize)
        case "ResizeObservation":
            return math.prod(numbers)
        case "AtariPreprocessing" | "ViewSizeWrapper" | "RGBImgObsWrapper" | "RGBImgPartialObsWrapper":
            return largest**2
    return 0


def _numbers(x: Any) -> Iterator[int]:
    """The whole numbers in an argument."""
    if isinstance(x, tuple | list):
        for part in x:
            yield from _numbers(part)
    elif isinstance(x, int):
        yield int(x)


def _plain(x: Any) -> Any:
    """JSON's lists as tuples, which wrappers take for shapes."""
    return tuple(map(_plain, x)) if isinstance(x, list) else x
