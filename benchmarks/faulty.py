"""Environments that fail, for fuzz.py: `faulty:NAME-v0`. Each is a good one but for what its name says."""

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Unprintable(Exception):
    """An error that raises when it is shown."""

    def __str__(self) -> str:
        raise RuntimeError("this error cannot be shown")


def raising(error: BaseException) -> Callable[..., Any]:
    def raises(*_: Any, **__: Any) -> Any:
        raise error

    return raises


ERRORS: dict[str, BaseException] = {
    "value": ValueError("no such level\nin this game " * 30),
    "null": RuntimeError("a null \0, an escape \x1b[31m and half a pair \udcff"),
    "unprintable": Unprintable(),
    "empty": RuntimeError(),
    "key": KeyError("level"),
    "system": OSError(28, "No space left on device"),
    "memory": MemoryError(),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "stop": StopIteration(3),
    "exit": SystemExit(3),
    "text-exit": SystemExit("the license server said no"),
    "assert": AssertionError(),
    "unicode": UnicodeDecodeError("utf-8", b"\xff" * 300, 0, 1, "invalid start byte"),
    "import": ModuleNotFoundError("No module named 'simulator'"),
    "interrupt": KeyboardInterrupt(),
}
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)
ACTIONS: dict[str, Any] = {
    "text": spaces.Text(3), "dict": spaces.Dict({"a": BOX}), "tuple": spaces.Tuple((BOX, BOX)), "none": None,
    "sequence": spaces.Sequence(BOX), "graph": spaces.Graph(BOX, None), "empty": spaces.Box(-1.0, 1.0, (0,)),
    "unbounded": spaces.Box(-np.inf, np.inf, (2,)), "integers": spaces.Box(0, 255, (2,), np.uint8),
    "one": spaces.Discrete(1), "shifted": spaces.Discrete(3, start=-7), "many": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(3), "matrix": spaces.MultiDiscrete([[2, 3], [4, 5]]), "number": 3,
    "halves": spaces.Box(-1.0, 1.0, (2,), np.float16), "point": spaces.Box(1.0, 1.0, (2,)),
    "huge": spaces.Discrete(10**9), "wide": spaces.Box(-1e30, 1e30, (2,)),
}  # fmt: skip
OBSERVATIONS: dict[str, Any] = {
    "text": spaces.Text(3), "dict": spaces.Dict({"a": BOX, "b": spaces.Discrete(2)}), "none": None, "class": int,
    "sequence": spaces.Sequence(BOX), "empty": spaces.Box(-1.0, 1.0, (0,)),
    "image": spaces.Box(0, 255, (8, 8, 3), np.uint8),
    "huge": spaces.Box(-1.0, 1.0, (10**6,), np.float32), "state": spaces.Discrete(5, start=2),
    "binary": spaces.MultiBinary(4), "scalar": spaces.Box(-1.0, 1.0, (), np.float32),
    "double": spaces.Box(-1.0, 1.0, (2,), np.float64),
}  # fmt: skip
RESETS: dict[str, Callable[[Any], Any]] = {
    "none": lambda obs: None, "alone": lambda obs: obs, "three": lambda obs: (obs, {}, 1),
    "shape": lambda obs: (np.zeros(7, np.float32), {}), "nan": lambda obs: (obs * np.nan, {}),
    "text": lambda obs: ("left", {}), "info": lambda obs: (obs, None), "listed": lambda obs: (obs.tolist(), {}),
}  # fmt: skip
STEPS: dict[str, Callable[[Any], Any]] = {
    "none": lambda obs: None, "four": lambda obs: (obs, 1.0, False, {}), "number": lambda obs: 3,
    "shape": lambda obs: (np.zeros((2, 2)), 1.0, False, False, {}), "absent": lambda obs: (None, 1.0, False, False, {}),
    "nan": lambda obs: (obs * np.nan, 1.0, False, False, {}), "inf": lambda obs: (obs + np.inf, 1.0, False, False, {}),
    "nan-reward": lambda obs: (obs, np.nan, False, False, {}),
    "inf-reward": lambda obs: (obs, -np.inf, False, False, {}),
    "no-reward": lambda obs: (obs, None, False, False, {}), "text-reward": lambda obs: (obs, "one", False, False, {}),
    "list-reward": lambda obs: (obs, [1.0], False, False, {}),
    "large-reward": lambda obs: (obs, 1e300, False, False, {}),
    "complex-reward": lambda obs: (obs, 1j, False, False, {}), "end": lambda obs: (obs, 1.0, None, False, {}),
    "text-end": lambda obs: (obs, 1.0, "no", False, {}), "info": lambda obs: (obs, 1.0, False, False, None),
    "integer": lambda obs: (obs, 10**400, False, False, {}), "listed": lambda obs: (obs.tolist(), 1, 0, 1, {}),
    "changing-info": lambda obs: (obs, 1.0, False, False, {"a": [1, "x", None][int(abs(obs[0]) * 100) % 3]}),
}  # fmt: skip


class Faulty(gymnasium.Env[Any, Any]):
    """Episodes of 8 steps. The fault comes where it is said to, in `step` from the third step on."""

    def __init__(self, where: str = "", fault: Any = None, action: Any = None, observation: Any = BOX) -> None:
        self.where, self.fault, self.count = where, fault, 0
        self.observation_space = observation
        self.action_space = spaces.Discrete(2) if action is None else action
        if where == "action":
            self.action_space = fault
        if where == "observation":
            self.observation_space = fault
        if where == "make":
            fault()

    def _obs(self) -> Any:
        space = self.observation_space
        return space.sample() if isinstance(space, spaces.Space) else np.zeros(2, np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if self.where == "reset":
            return self.fault(self._obs())
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.count += 1
        if self.where == "step" and self.count > 2:
            return self.fault(self._obs())
        return self._obs(), 1.0, False, False, {}

    def close(self) -> None:
        if self.where == "close":
            self.fault()


class WithoutSeed(Faulty):
    """Knows nothing of seeds."""

    def reset(self) -> Any:  # type: ignore[override]
        return self._obs(), {}


def loud(obs: Any) -> Any:
    print("step " * 50)
    print("step", file=sys.stderr)
    warnings.warn("deprecated " * 50, stacklevel=1)
    return obs, 1.0, False, False, {}


def slow(obs: Any) -> Any:
    time.sleep(0.05)
    return obs, 1.0, False, False, {}


def stuck(obs: Any) -> Any:
    time.sleep(3600)


def faults() -> dict[str, tuple[str, Any]]:
    """Name -> where the fault is, and what."""
    found: dict[str, tuple[str, Any]] = {"good": ("", None), "loud": ("step", loud), "slow": ("step", slow)}
    found["stuck"] = ("step", stuck)
    for name, error in ERRORS.items():
        found |= {f"{where}-raises-{name}": (where, raising(error)) for where in ("make", "reset", "step", "close")}
    for where, table in (("reset", RESETS), ("step", STEPS), ("action", ACTIONS), ("observation", OBSERVATIONS)):
        found |= {f"{where}-{name}": (where, fault) for name, fault in table.items()}
    return found


for name, (where, fault) in faults().items():
    gymnasium.register(f"{name}-v0", Faulty, kwargs={"where": where, "fault": fault}, max_episode_steps=8)
gymnasium.register("seedless-v0", WithoutSeed, max_episode_steps=8)
gymnasium.register("endless-v0", Faulty)
gymnasium.register("no-class-v0", "faulty:Absent")
gymnasium.register("no-module-v0", "absent_module:Absent")
gymnasium.register("no-environment-v0", lambda: 3)  # type: ignore[arg-type, return-value]
NAMES = [*faults(), "seedless", "endless", "no-class", "no-module", "no-environment"]
