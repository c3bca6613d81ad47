"""Environments as they stand, in a form that a file can hold, and back.

Most environments cannot be copied. But what an environment does is decided by what it holds when it is reset, by the
seed, and by the actions that follow: that is kept, and restoring it plays the episode again. Whether it came out the
same is seen from the last observation, the rewards and the random generator. A vector environment that computes on
arrays is its arrays and its generator.
"""

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper

from policygrad.control.processes import Processes

LONGEST = 2**20  # actions of an episode that are kept
LARGEST = 2**16  # bytes of an array that is kept at each reset; larger ones are pictures or data
LONG = 256  # entries of a list or dict that is kept at each reset; longer ones are tables
DEEPEST = 3  # objects, lists and dicts within each other
GENERATORS = {"PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"}
OBJECT, GENERATOR = "attributes of", "generator of"  # before the name of an object's class and of a generator's kind

_OPAQUE: Any = object()  # what has no such form


class Recording:
    """What an environment, with its wrappers, held before its last reset, and the actions since.

    layers: the environment and its wrappers. space: that of the actions.
    """

    def __init__(self, layers: Sequence[Any], space: spaces.Space) -> None:
        self.layers = layers
        self.before: list[dict[str, Any]] | None = None
        self.seed: int | None = None
        self.actions = np.zeros((16, *(space.shape or ())), space.dtype)
        self.count, self.ended, self.total = 0, False, 0.0
        self.obs: Any = None

    def begin(self, seed: int | None) -> None:
        """An episode begins: call this before the reset."""
        self.before = [contents(x) for x in self.layers]
        self.seed, self.count, self.ended, self.total = seed, 0, False, 0.0

    def add(self, action: Any) -> None:
        """The next action: call this before the step."""
        if self.count == len(self.actions):
            if self.count >= LONGEST:
                self.before, self.count = None, 0  # the episode is too long to be played again
            else:
                self.actions = np.concatenate([self.actions, np.zeros_like(self.actions)])
        self.actions[self.count] = action
        self.count += 1

    def state_dict(self) -> dict[str, Any] | None:
        """None if there is no episode, or one that is too long to be played again."""
        if self.before is None:
            return None
        return {
            "before": self.before,
            "seed": self.seed,
            "actions": self.actions[: self.count].copy(),
            "ended": self.ended,
            "reached": self.reached(),
        }

    def load_state_dict(self, state: dict[str, Any], environment: gymnasium.Env) -> bool:
        """Play the episode again. Returns whether it came to where it was. environment: what this records."""
        for layer, held in zip(self.layers, state["before"], strict=True):
            fill(layer, held)
        environment.reset(seed=state["seed"])
        for action in state["actions"]:
            environment.step(action)
        return self.reached() == state["reached"] and self.ended == state["ended"]

    def reached(self) -> str:
        """A hash of the last observation, the sum of the rewards, and the state of the environment's generator."""
        found = hashlib.sha256(repr((self.total, copied(vars(self.layers[0]).get("_np_random")))).encode())
        digest(self.obs, found.update)
        return found.hexdigest()


def state_of(environments: VectorEnv) -> dict[str, Any] | None:
    """The environments as they stand; None if they have no form that a file can hold."""
    base, around = environments.unwrapped, _around(environments)
    state: dict[str, Any] = {"around": [contents(x) for x in around]}
    if type(base) in (SyncVectorEnv, Processes):
        if not all(_called(base, "has_wrapper_attr", "recorded")):
            return None
        copies = list(_called(base, "recorded"))
        return None if any(x is None for x in copies) else {**state, "copies": copies}
    if callable(saved := getattr(base, "state_dict", None)) and hasattr(base, "load_state_dict"):
        return {**state, "own": saved()}
    arrays = {name: copied(x, largest=math.inf) for name, x in vars(base).items() if not _settled(x)}
    if any(x is _OPAQUE or (isinstance(x, dict) and OBJECT in x) for x in arrays.values()):  # nothing would check it
        return None
    return {**state, "arrays": arrays}


def restore(environments: VectorEnv, state: dict[str, Any]) -> bool:
    """Bring new environments to this state. Returns whether they are where they were; if not, reset them."""
    base = environments.unwrapped
    for layer, held in zip(_around(environments), state["around"], strict=True):
        fill(layer, held)
    if "own" in state:
        return base.load_state_dict(state["own"]) is not False  # type: ignore[attr-defined]
    if "arrays" in state:
        fill(base, state["arrays"])
        return True
    copies = state["copies"]
    if isinstance(base, Processes):
        return all(base.restore(copies))
    assert isinstance(base, SyncVectorEnv)
    base._autoreset_envs = np.array([x["ended"] for x in copies])
    return all(x.get_wrapper_attr("replayed")(one) for x, one in zip(base.envs, copies, strict=True))


def contents(thing: Any, depth: int = 0) -> dict[str, Any]:
    """Copies of an object's attributes, as far as they are numbers, words, arrays, generators, or hold such."""
    found = ((name, copied(x, depth)) for name, x in vars(thing).items())
    return {name: x for name, x in found if x is not _OPAQUE}


def copied(x: Any, depth: int = 0, largest: float = LARGEST) -> Any:
    """A copy of a value; _OPAQUE if a file could not hold it, or if it has more than `largest` bytes."""
    kind = type(x)
    if x is None or kind in (bool, int, float):
        return x
    if kind is str:
        return _OPAQUE if set(x) & set("/\\:.") else x  # a path is none of a state's
    if kind is np.ndarray:
        return x.copy() if x.dtype.kind in "biuf" and x.itemsize <= 8 and x.nbytes <= largest else _OPAQUE
    if isinstance(x, np.random.Generator) and type(x.bit_generator).__name__ in GENERATORS:
        return {GENERATOR: "Generator", "state": x.bit_generator.state}
    if isinstance(x, np.random.RandomState):
        return {GENERATOR: "RandomState", "state": x.get_state(legacy=False)}
    if isinstance(x, random.Random):
        return {GENERATOR: "Random", "state": x.getstate()}
    if isinstance(x, np.generic):
        return x if x.dtype.kind in "biuf" and x.itemsize <= 8 else _OPAQUE
    if isinstance(x, spaces.Space):
        return {OBJECT: kind.__name__, "_np_random": copied(x._np_random)}
    if depth == DEEPEST:
        return _OPAQUE
    if kind in (list, tuple, deque, dict):
        entries: list[Any] = []
        for one in x.values() if kind is dict else x:
            entries.append(copied(one, depth + 1))
            tagged = isinstance(entries[-1], dict) and type(one) is not dict  # could not be put into its place again
            if entries[-1] is _OPAQUE or tagged or len(entries) > LONG:
                return _OPAQUE
        if kind is dict:
            named = all(type(name) in (str, int) for name in x)
            return dict(zip(x, entries, strict=True)) if named else _OPAQUE
        return deque(entries, x.maxlen) if kind is deque else kind(entries)
    if not hasattr(x, "__dict__") or _settled(x):
        return _OPAQUE
    return {OBJECT: kind.__name__, **contents(x, depth + 1)}


def fill(thing: Any, held: Mapping[str, Any]) -> None:
    """Give an object's attributes their values again, in place where they are arrays, generators or objects."""
    attributes = vars(thing)
    for name, x in held.items():
        if name == OBJECT:
            continue
        now = attributes.get(name)
        if isinstance(x, dict) and OBJECT in x:
            if type(now).__name__ == x[OBJECT]:
                fill(now, x)
        elif isinstance(x, dict) and GENERATOR in x:
            attributes[name] = _generator(now, x[GENERATOR], x["state"])
        elif isinstance(now, np.ndarray) and isinstance(x, np.ndarray) and (now.shape, now.dtype) == (x.shape, x.dtype):
            now[...] = x  # others may hold a view of it
        elif (value := copied(x)) is not _OPAQUE:
            attributes[name] = value


def _generator(now: Any, kind: str, state: Any) -> Any:
    """A generator in this state: the one that is there, or a new one if it is of another kind."""
    if kind == "Random":
        found = now if isinstance(now, random.Random) else random.Random()
        found.setstate(state)
        return found
    if kind == "RandomState":
        legacy = now if isinstance(now, np.random.RandomState) else np.random.RandomState()
        legacy.set_state(state)
        return legacy
    name = state["bit_generator"]
    if not (isinstance(now, np.random.Generator) and type(now.bit_generator).__name__ == name):
        if name not in GENERATORS:
            raise ValueError(f"there is no generator {name}")
        now = np.random.Generator(getattr(np.random, name)())
    now.bit_generator.state = state
    return now


def _settled(x: Any) -> bool:
    """Whether a value is no state: it describes the environment, or it is an environment or a function of its own."""
    known = (gymnasium.Env, VectorEnv, EnvSpec, ModuleType, type, spaces.Space, property)
    return isinstance(x, known) or callable(x)


def _around(environments: VectorEnv) -> list[Any]:
    """The wrappers around a vector environment."""
    found = []
    while isinstance(environments, VectorWrapper):
        found.append(environments)
        environments = environments.env
    return found


def _called(base: Any, name: str, *arguments: Any) -> tuple[Any, ...]:
    return base.call(name, *arguments)


def digest(x: Any, update: Callable[[bytes], Any]) -> None:
    """Feed an observation to a hash: its parts, their types, shapes and bytes."""
    if isinstance(x, Mapping):
        for name, one in x.items():
            update(repr(name).encode())
            digest(one, update)
    elif isinstance(x, list | tuple):
        update(str(len(x)).encode())
        for one in x:
            digest(one, update)
    elif isinstance(x, str):
        update(x.encode())
    else:
        array = np.asarray(x)
        update(f"{array.dtype.str}{array.shape}".encode())
        update(array.tobytes())
