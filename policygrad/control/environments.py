"""Vector environments from a Gymnasium id, an environment, or a callable that makes one."""

import difflib
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import FlattenObservation
from gymnasium.wrappers.vector import FlattenObservation as FlattenVectorObservation

from policygrad.errors import UserError, one_line
from policygrad.functions import load_module

Environment = str | gymnasium.Env | VectorEnv | Callable[[], gymnasium.Env]


def make_environments(
    environment: Environment, num_envs: int = 1, *, vectorization: str = "auto", **options: Any
) -> VectorEnv:
    """`num_envs` copies of an environment in one vector environment. Each resets on the step after its episode ends.

    environment: an id that Gymnasium knows (`module:Id-v0` imports the module first), an environment object (for one
    copy), a callable that makes one, or a vector environment, which stays as it is. vectorization: `auto` uses the
    environment's own vectorized form if it has one, else `sync`; `async` runs one process per copy. options go to
    gymnasium.make. Dict, Tuple and other composite observations are flattened into a Box.

    Raises UserError for an environment that is unknown or cannot be made, for num_envs < 1, and for a callable that
    returns the same object twice.
    """
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}: ask for at least one environment")
    if vectorization not in ("auto", "sync", "async"):
        raise UserError(f"vectorization is {vectorization!r}: choose one of auto, sync, async")
    if isinstance(environment, VectorEnv):
        _distinct(environment)
        return _flat(environment)
    if isinstance(environment, gymnasium.Env):
        if num_envs > 1:
            raise UserError(
                f"one environment object cannot serve as {num_envs} environments: pass a callable that makes one"
            )
        return SyncVectorEnv([lambda: _prepared(environment)], autoreset_mode=AutoresetMode.NEXT_STEP)
    try:
        spec = None
        if isinstance(environment, str):
            spec = find(environment)
            if spec.vector_entry_point is not None and vectorization == "auto":
                return _flat(gymnasium.make_vec(spec, num_envs, vectorization_mode="vector_entry_point", **options))

            def make() -> gymnasium.Env:
                return gymnasium.make(spec, disable_env_checker=True, **options)
        else:
            make = environment
        copies = [lambda: _prepared(make())] * num_envs
        vector = AsyncVectorEnv if vectorization == "async" else SyncVectorEnv
        environments = vector(copies, autoreset_mode=AutoresetMode.NEXT_STEP)
        _distinct(environments)
        environments.spec = spec
        return environments
    except UserError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise UserError(f"{label(environment)} needs a package that is not installed: {one_line(error)}") from error
    except Exception as error:
        raise UserError(
            f"the environment {label(environment)} could not be made: {type(error).__name__}: {one_line(error)}"
        ) from error


def autoreset_mode(environments: VectorEnv) -> AutoresetMode:
    """When the environments reset. Their metadata says so as Gymnasium's enum or in words; NEXT_STEP without it."""
    said = (environments.metadata or {}).get("autoreset_mode")
    if said is None:
        return AutoresetMode.NEXT_STEP
    word = _letters(getattr(said, "value", said))
    for mode in AutoresetMode:
        if word == _letters(mode.value):
            return mode
    raise UserError(f"the vector environment's autoreset_mode is {said!r}: set it to NextStep, SameStep or Disabled")


def _letters(word: Any) -> str:
    return "".join(x for x in str(word).rpartition(".")[2].lower() if x.isalpha())


def find(name: str) -> gymnasium.envs.registration.EnvSpec:
    """The specification of an id. Raises UserError with similar ids if Gymnasium does not know it."""
    module, _, name = name.rpartition(":")
    if module:
        load_module(module, what="environment")
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ValueError) as error:
        known = {key.lower(): key for key in gymnasium.registry}
        near = [known[key] for key in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
        hint = f"did you mean {' or '.join(near)}?" if near else "`policygrad list environments` lists the known ones"
        raise UserError(f"unknown environment {name!r}: {hint}") from error


class Checked(gymnasium.Wrapper):
    """Refuses an observation or a reward of the wrong shape, which Gymnasium would copy into the batch."""

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """As the environment's, with the observation's shape checked."""
        obs, info = self.env.reset(**options)
        self._check(obs, "reset")
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with the observation's and the reward's shape checked."""
        obs, number, terminated, truncated, info = self.env.step(action)
        reward: Any = number
        self._check(obs, "step")
        if np.ndim(reward) != 0:
            raise UserError(
                f"the environment's step returned a reward of shape {np.shape(reward)}: fix it to return a number"
            )
        return obs, reward, terminated, truncated, info

    def _check(self, obs: Any, method: str) -> None:
        shape = self.observation_space.shape
        if shape is not None and np.shape(obs) != shape:
            raise UserError(
                f"the environment's {method} returned an observation of shape {np.shape(obs)}, but its "
                f"observation_space says {shape}: fix one of the two"
            )


def _prepared(environment: gymnasium.Env) -> gymnasium.Env:
    checked = Checked(environment)
    simple = isinstance(checked.observation_space, spaces.Box | spaces.Discrete)
    return checked if simple else FlattenObservation(checked)


def _distinct(environments: VectorEnv) -> None:
    """Raise UserError if one object serves as several environments (in separate processes it would be copied)."""
    made = [id(x.unwrapped) for x in getattr(environments.unwrapped, "envs", ()) if isinstance(x, gymnasium.Env)]
    if len(set(made)) < len(made):
        raise UserError(
            f"for {len(made)} environments the callable returned the same object more than once: "
            "make a new environment in each call"
        )


def _flat(environments: VectorEnv) -> VectorEnv:
    if isinstance(environments.single_observation_space, spaces.Box | spaces.Discrete):
        return environments
    metadata, mode = environments.metadata or {}, autoreset_mode(environments)
    if metadata.get("autoreset_mode") is not mode:  # Gymnasium's wrapper reads only the enum
        environments = VectorWrapper(environments)
        environments.metadata = metadata | {"autoreset_mode": mode}
    try:
        return FlattenVectorObservation(environments)
    except ValueError as error:
        space = type(environments.single_observation_space).__name__
        raise UserError(
            f"{space} observations can be flattened only if the vector environment resets on the next step: make it "
            "with autoreset_mode NEXT_STEP"
        ) from error


def label(environment: Environment) -> str:
    """The name of an environment, for a reader."""
    if isinstance(environment, str):
        return environment
    spec = getattr(environment, "spec", None)
    if spec is not None:
        return spec.id
    return getattr(environment, "__name__", type(environment).__name__)
