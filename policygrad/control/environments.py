"""Vector environments from a Gymnasium id, an environment, or a callable that makes one, also by its name."""

import difflib
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial, reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import FlattenObservation

from policygrad.control.atari import is_preprocessed, preprocessed
from policygrad.control.checks import check_distinct, checked_flag, checked_member, checked_number, finite_numbers
from policygrad.control.envpool import EnvPool
from policygrad.control.flattening import VectorFlattened
from policygrad.control.masks import MaskFromInfo, VectorMaskFromInfo
from policygrad.control.players import Agents, GameFound, game, is_game, takes_turns
from policygrad.control.processes import RESTARTED, Processes, another_seed, pays
from policygrad.control.replay import Recording
from policygrad.control.seats import Opponents, Seat, Selves, SideBySide
from policygrad.control.spaces import MASK, flat
from policygrad.control.structured import StructuredActions, VectorStructuredActions, has_parts
from policygrad.control.tensors import TensorEnvironments, of_tensors
from policygrad.control.wrappers import Layers, Learned
from policygrad.control.wrapping import wrapped, wrapper
from policygrad.errors import Note, UserError, ending, one_line, shortened
from policygrad.functions import load_function, load_module

Environment = str | gymnasium.Env | VectorEnv | Callable[..., gymnasium.Env]

gymnasium.register(
    "policygrad/Catch-v0",
    entry_point="policygrad.control.catch:Catch",
    vector_entry_point="policygrad.control.catch:CatchVector",
)

gymnasium.register("policygrad/TMaze-v0", entry_point="policygrad.control.tmaze:TMaze")

# Ids of other packages: how they begin, what to install, and the module whose import registers them.
PACKAGES = (
    (r"ALE/", "ale-py", "ale_py"),
    (r"MiniGrid-|BabyAI-", "minigrid", "minigrid"),
    (r"Fetch|Hand|PointMaze|AntMaze|Adroit|FrankaKitchen", "gymnasium-robotics", "gymnasium_robotics"),
    (r"dm_control/", "shimmy[dm-control]", "shimmy"),
    (r"(highway|merge|roundabout|parking|intersection|racetrack)-", "highway-env", "highway_env"),
    (r"Meta-World/", "metaworld", "metaworld"),
    (r"PyFlyt/", "PyFlyt", "PyFlyt.gym_envs"),
)  # fmt: skip


def make_environments(
    environment: Any,
    num_envs: int = 1,
    *,
    vectorization: str = "auto",
    native: bool = True,
    step_time_limit: float | None = None,
    restarts: int = 0,
    wrap: Sequence[str] = (),
    action_mask: str = "auto",
    agents: str = "shared",
    opponents: Opponents | None = None,
    env_options: Mapping[str, Any] | None = None,
) -> VectorEnv:
    """`num_envs` copies of an environment in one vector environment. Each resets on the step after its episode ends.

    environment: an id that Gymnasium knows (`module:Id-v0` imports the module first); the name of a class or function
    that makes one, as `module:Name` or `path/file.py:Name`; such a callable itself; an environment object (for one
    copy); or a vector environment, which stays as it is. vectorization: `auto` uses the environment's own vectorized
    form if it has one; else what is faster for one that has a name, `sync` or `async`, by the time that a step of it
    takes (processes.pays), and `sync` for a callable, which may share objects with its caller; the numbers are the
    same. `async` runs a process per core; `envpool` takes EnvPool's environment of this id and its options, in spaces
    of its own types. native: False leaves out that own form, which takes one seed for all. step_time_limit: seconds
    that such a process may take for its start, a step or a reset; None: any time. restarts: how often an environment
    that raises an error, or whose process dies or hangs, is made anew (RESTARTED says so in its info). wrap:
    Gymnasium's wrappers by name, the first one inside (see wrapping.py). With either, auto takes no native form.
    action_mask: where the mask of allowed actions is (see masks.py); auto: in the key action_mask of Dict observations,
    info: in the info, off: nowhere. agents: separate lets observations of a game of several say whose they are
    (separate.py). env_options go to gymnasium.make, the class or the function. Dict, Tuple and other composite
    observations are flattened into a Box; that of a Dict or Tuple is a Flat, which knows its parts.

    Raises UserError for an environment that is unknown or cannot be made, for num_envs < 1, for a callable that returns
    the same object twice, and for settings that an object which exists already cannot follow.
    """
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}: ask for at least one environment")
    _check_choice("vectorization", vectorization, ("auto", "sync", "async", "envpool"))
    _check_choice("action_mask", action_mask, ("auto", "info", "off"))
    _check_choice("agents", agents, ("shared", "separate"))
    if isinstance(environment, gymnasium.Env | VectorEnv):
        unread = {"restarts": restarts, "wrap": wrap, "env_options": env_options}
        unread_names = [name for name, x in unread.items() if x]
        return _given(environment, num_envs, vectorization, action_mask, unread_names)
    name, wraps = one_line(ending(label(environment), 60), 60), [wrapper(text) for text in wrap]
    try:
        if vectorization == "envpool":
            if restarts or wraps:
                raise UserError("EnvPool's environments are one object, neither made anew nor wrapped one by one")
            return _flat(EnvPool(environment, num_envs, dict(env_options or {})), action_mask)
        spec, make = _maker(environment, dict(env_options or {}))
        native = native and vectorization == "auto" and not (restarts or wraps or agents == "separate")
        if native and spec is not None and spec.vector_entry_point is not None:
            how: Any = {"vectorization_mode": "vector_entry_point", **(env_options or {})}
            return _flat(gymnasium.make_vec(spec, num_envs, **how), action_mask)

        opponents = opponents or Opponents()
        one = _one(make, name, wraps, opponents, restarts, action_mask)
        measured = vectorization == "auto" and isinstance(environment, str) and not isinstance(opponents, Selves)
        in_processes = vectorization == "async" or (measured and pays(one, num_envs))
        environments = _together([one] * num_envs, in_processes, step_time_limit, restarts, opponents)
        environments.unwrapped.spec = spec
        if agents == "separate":
            close(environments)
            raise UserError(f"agents separate is for games of several agents, and {name} is none: leave agents out")
        return environments
    except GameFound as found:
        if vectorization == "async":
            raise
        return _flat(_games(found.environment, make, num_envs, wraps, restarts, agents), action_mask)
    except UserError:
        raise
    except Exception as error:
        raise _not_made(name, error) from error


def _one(
    make: Callable[[], Any], name: str, wraps: Sequence[Any], opponents: Opponents, restarts: int, action_mask: str
) -> Callable[[], gymnasium.Env]:
    """What makes one copy as a vector environment takes it: of a game with turns one seat, wrapped, and checked."""

    def made() -> Any:
        environment = make()
        if takes_turns(environment):
            environment = Seat(environment, opponents)
        return wrapped(environment, wraps) if isinstance(environment, gymnasium.Env) else environment

    return lambda: _prepared(made(), name, made if restarts else None, restarts, action_mask)


def _games(first: Any, make: Callable[[], Any], count: int, wraps: Sequence[Any], restarts: int, agents: str) -> Agents:
    """`count` games of several agents. first: one of them, which is made."""
    for option, given in (("wrap", wraps), ("restart_envs", restarts)):
        if given:
            raise UserError(
                f"{option} is for Gymnasium's environments, and this one has several agents: leave {option} out, and "
                "wrap it in a function that makes it"
            )
    made = [first, *(make() for _ in range(count - 1))]
    check_distinct([getattr(x, "unwrapped", x) for x in made])
    return Agents(made, separate=agents == "separate")


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{option} is {value!r}: choose one of {', '.join(choices)}")


def _not_made(name: str, error: Exception) -> UserError:
    """Why an environment could not be made."""
    if isinstance(error, gymnasium.error.DependencyNotInstalled):
        return UserError(f"{name} needs a package that is not installed: {one_line(error)}")
    if isinstance(error, ModuleNotFoundError):
        extra = "jax" if name.startswith(("phys2d/", "tabular/")) else ""
        how = f"pip install policygrad[{extra}]" if extra else "install its package"
        return UserError(f"{name} needs {error.name or one_line(error, 60)}, which is not installed: {how}")
    hint = ": its arguments are env_options" if isinstance(error, TypeError) else ""
    said = f"the environment {name} could not be made: {type(error).__name__}: "
    return UserError(said + one_line(error, 200 - len(said) - len(hint)) + hint)


def _together(
    copies: list[Any], in_processes: bool, step_time_limit: float | None, restarts: int, opponents: Opponents
) -> VectorEnv:
    """The environments that these functions make. opponents: of their seats, which move for all games at once."""
    if in_processes:
        return Processes(copies, step_time_limit, restarts=restarts)
    environments = SyncVectorEnv(copies, autoreset_mode=AutoresetMode.NEXT_STEP)
    _distinct(environments)
    return SideBySide(environments) if isinstance(opponents, Selves) else environments


def _given(environment: Any, num_envs: int, vectorization: str, action_mask: str, unread: list[str]) -> VectorEnv:
    """An object of the user's as a vector environment. unread: what is given for one that is made here."""
    if unread:
        raise UserError(
            f"the environment handed in is made already, and takes no {unread[0]}: hand in a callable that makes one"
        )
    single = isinstance(environment, gymnasium.Env) and not of_tensors(environment)
    if vectorization in ("async", "envpool") or (vectorization == "sync" and not single):
        raise UserError(
            f"the environment handed in is made already: vectorization {vectorization} is for a callable that makes one"
        )
    if not single:
        _distinct(environment)
        return _flat(environment, action_mask)
    if num_envs > 1:
        raise UserError(
            f"one environment object cannot serve as {num_envs} environments: pass a callable that makes one"
        )
    return SyncVectorEnv(
        [lambda: _prepared(environment, label(environment), action_mask=action_mask)],
        autoreset_mode=AutoresetMode.NEXT_STEP,
    )


def _maker(environment: Any, options: dict[str, Any]) -> tuple[EnvSpec | None, Callable[[], Any]]:
    """The specification of an id, None for anything else, and what makes one copy."""
    if isinstance(environment, str):
        if (of_game := game(environment, options)) is not None:
            return None, of_game
        found = named(environment)
        if isinstance(found, EnvSpec):
            make = preprocessed if is_preprocessed(found) else gymnasium.make
            return found, lambda: make(found, disable_env_checker=True, **options)
        environment = found
    if not callable(environment):
        raise UserError(_no_environment(environment))
    return None, partial(environment, **options)


def named(name: str) -> EnvSpec | Callable[..., Any]:
    """What a name stands for: an id's specification, or the class or function of `module:Name` or `file.py:Name`.

    Raises UserError if nothing has that name.
    """
    place, _, last = name.rpartition(":")
    if place.endswith(".py") or name.endswith(".py"):
        return load_function(name, what="environment")
    if place and last.isidentifier():
        module = load_module(place, what="environment")
        if last not in gymnasium.registry or callable(getattr(module, last, None)):
            return load_function(name, what="environment")
    return find(name)


def importable(environment: Any) -> str | None:
    """The name by which `named` finds a class or function again; None if there is none."""
    name = getattr(environment, "__qualname__", "")
    module = sys.modules.get(getattr(environment, "__module__", None) or "")
    if module is None or not name.isidentifier() or getattr(module, name, None) is not environment:
        return None
    if module.__name__ == "__main__" or module.__name__.startswith("policygrad_file_"):
        file = getattr(module, "__file__", None)
        return None if file is None else f"{file}:{name}"
    return f"{module.__name__}:{name}"


def autoreset_mode(environments: VectorEnv) -> AutoresetMode:
    """When the environments reset. Their metadata says so as Gymnasium's enum or in words.

    Raises UserError if it does not: with the wrong one, a decision of each episode would be lost or made up.
    """
    said = (environments.metadata or {}).get("autoreset_mode")
    word = _letters(getattr(said, "value", said))
    for mode in AutoresetMode:
        if word == _letters(mode.value):
            return mode
    is_said = "does not say when it resets" if said is None else f"has the autoreset_mode {shortened(said, 40)}"
    raise UserError(
        f'the vector environment {is_said}: set metadata["autoreset_mode"] to AutoresetMode.NEXT_STEP or SAME_STEP'
    )


def _letters(word: Any) -> str:
    return "".join(x for x in str(word).rpartition(".")[2].lower() if x.isalpha())


def find(name: str) -> EnvSpec:
    """The specification of an id. Raises UserError with similar ids, or the package to install, if it is unknown."""
    module, _, name = name.rpartition(":")
    if module:
        load_module(module, what="environment")
    elif name not in gymnasium.registry:
        for _, _, registers in (x for x in PACKAGES if re.match(x[0], name) and _installed(x[2])):
            import_module(registers)  # a fixed list: no name in a run decides what is imported
    try:
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ValueError) as error:
        said = f"unknown environment {shortened(name)}: "
        for beginning, package, registers in PACKAGES:
            if re.match(beginning, name) and not module and not _installed(registers):
                raise UserError(f"{said}install its package, with pip install {package}") from error
        known = {key.lower(): key for key in gymnasium.registry}
        near = [known[key] for key in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)]
        space = name.rpartition("/")[0]
        if space and not module and not any(key.startswith(f"{space}/") for key in gymnasium.registry):
            hint = f"name the module that registers it, as in module:{ending(name, 40)}"
        elif near:
            hint = f"did you mean {' or '.join(near)}?"
        else:
            hint = "`policygrad list environments` lists the known ones"
        raise UserError(said + hint) from error


def _installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None


class Checked(gymnasium.Wrapper):
    """Refuses what Gymnasium would cast or copy into the batch unseen: wrong shapes, and numbers that would change.

    Of `info` it passes on the numbers at an episode's end, which are all that is read, as floats, since Gymnasium's
    arrays take the type of the first value; and of a reset, whether there is a mask of actions that is left unread.

    make, restarts: an environment that raises an error is made anew so many times. The step that failed then returns
    the observation of a reset, no reward, and why as RESTARTED in its info: the episode before it was cut.
    """

    def __init__(
        self,
        environment: gymnasium.Env,
        make: Callable[[], gymnasium.Env] | None = None,
        restarts: int = 0,
        action_mask: str = "auto",
    ) -> None:
        super().__init__(environment)
        self.make, self.restarts, self.restarted, self.action_mask = make, restarts, 0, action_mask
        self._attach(environment)

    def _attach(self, environment: gymnasium.Env) -> None:
        self.env = environment
        self.layers = Layers(environment)
        self.recording = Recording([x for _, x in self.layers.layers], environment.action_space)

    @property
    def unflattened(self) -> spaces.Space:
        """The space of the observations as the environment gives them."""
        return self.env.observation_space

    def learned(self) -> Learned:
        """What the wrappers inside have learned."""
        return self.layers.learned()

    def recorded(self) -> dict[str, Any] | None:
        """The episode so far, to be played again; None if it cannot be."""
        return self.recording.state_dict()

    def replayed(self, state: dict[str, Any]) -> bool:
        """Play an episode of `recorded` again. Returns whether it came to where it was."""
        try:
            return self.recording.load_state_dict(state, self)
        except Exception:  # of the environment
            return False

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """As the environment's, with the observation checked. A seed also decides the samples of the spaces."""
        try:
            return self._reset(**options)
        except Exception as error:
            self._renew(error)
            return self.reset(**options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """As the environment's, with everything checked."""
        try:
            return self._step(action)
        except Exception as error:
            seed = self.recording.seed
            self._renew(error)
            obs, _ = self.reset(seed=None if seed is None else another_seed(seed, self.restarted))
            return obs, 0.0, False, False, {RESTARTED: f"raised {type(error).__name__} in step: {one_line(error, 80)}"}

    def _renew(self, error: Exception) -> None:
        """Put a new environment in the place of one that failed. Raises the error if that has been done enough."""
        if self.make is None or self.restarted >= self.restarts or isinstance(error, UserError):
            raise error
        learned = self.layers.learned()
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            self.env.close()
        self._attach(self.make())
        self.layers.set(learned, statistics_alone=True)
        self.restarted += 1

    def _reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        self.recording.begin(options.get("seed"))
        if options.get("seed") is not None:
            of_actions, of_observations = np.random.SeedSequence(options["seed"], spawn_key=(2,)).generate_state(2)
            self.env.action_space.seed(int(of_actions))
            self.env.observation_space.seed(int(of_observations))
        obs, info = self.env.reset(**options)
        finite_numbers(info)  # which is checked
        obs = self.recording.obs = checked_member(obs, self.observation_space, "the environment's reset returned")
        return obs, {MASK: 1.0} if self.action_mask == "auto" and MASK in (info or {}) else {}

    def _step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        self.recording.add(action)
        obs, reward, terminated, truncated, info = self.env.step(action)
        obs = self.recording.obs = checked_member(obs, self.observation_space, "the environment's step returned")
        terminated, truncated = checked_flag(terminated, "terminated"), checked_flag(truncated, "truncated")
        numbers = finite_numbers(info) if terminated or truncated or not isinstance(info, dict) else {}
        reward = checked_number(reward)
        self.recording.ended, self.recording.total = terminated or truncated, self.recording.total + float(reward)
        return obs, reward, terminated, truncated, numbers

    def close(self) -> None:
        """As the environment's. An error becomes a note: what was learned is not lost for it."""
        close(self.env)


def close(environments: gymnasium.Env | VectorEnv) -> None:
    """Close environments. An error becomes a note of one line."""
    try:
        environments.close()
    except Exception as error:
        said = f"the environment raised {type(error).__name__} in close: {one_line(error)}"
        warnings.warn(f"{said} (the results are kept)", Note, stacklevel=2)


def unflattened(environments: VectorEnv) -> spaces.Space:
    """The space of one environment's observations as the environment gives them, before they are flattened."""
    base = environments.unwrapped
    if isinstance(environments, VectorFlattened):
        return environments.env.single_observation_space
    if isinstance(base, Processes):
        return base.call("unflattened")[0]
    if isinstance(base, TensorEnvironments):
        return base.unflattened
    inside = base.envs[0] if isinstance(base, SyncVectorEnv) else None
    if isinstance(inside, gymnasium.Wrapper) and inside.has_wrapper_attr("unflattened"):
        return inside.get_wrapper_attr("unflattened")
    return environments.single_observation_space


def _prepared(
    environment: Any,
    name: str,
    make: Callable[[], gymnasium.Env] | None = None,
    restarts: int = 0,
    action_mask: str = "auto",
) -> gymnasium.Env:
    if is_game(environment):
        raise GameFound(environment)
    if not isinstance(environment, gymnasium.Env):
        raise UserError(f"{name} made no environment: {_no_environment(environment)}")
    if type(environment).step is gymnasium.Env.step:
        raise UserError(f"the environment {name} has no step: define step and reset in its class")
    for part in ("observation_space", "action_space"):
        if not isinstance(getattr(environment, part, None), spaces.Space):
            raise UserError(f"the environment {name} has no {part}: set it to a gymnasium.spaces.Space in its __init__")
    inside: list[Callable[..., gymnasium.Env]] = [StructuredActions] if has_parts(environment.action_space) else []
    inside += [MaskFromInfo] if action_mask == "info" else []  # whose masks are of the actions as they are taken

    def dressed(environment: gymnasium.Env) -> gymnasium.Env:
        return reduce(lambda inner, wrapper: wrapper(inner), inside, environment)

    checked = Checked(dressed(environment), None if make is None else lambda: dressed(make()), restarts, action_mask)
    if isinstance(checked.observation_space, spaces.Box | spaces.Discrete):
        return checked
    space = flat(checked.observation_space, action_mask != "off")
    flattened = FlattenObservation(checked)
    flattened.observation_space = space
    return flattened


def _no_environment(thing: Any) -> str:
    """Why an object is no environment, and what to do."""
    said = f"{shortened(thing, 40)} is no gymnasium.Env"
    if any(x.__module__.partition(".")[0] == "gym" for x in type(thing).__mro__):
        kind = type(thing).__name__
        return f"{kind} is of the old package gym: convert it with shimmy.GymV26CompatibilityV0(env={kind}(...))"
    if is_game(thing):
        return f"{type(thing).__name__} is a game of several agents, already made: hand in the function that makes it"
    if isinstance(thing, VectorEnv):
        return f"{type(thing).__name__} is a vector environment: hand in the object itself"
    if callable(getattr(thing, "step", None)):
        talks = "" if hasattr(thing, "observation_space") else ", or give model to talk to it"
        return f"{said}: derive its class from gymnasium.Env{talks}"
    return f"{said}: give an id, an environment, or a class or function that makes one"


def _distinct(environments: gymnasium.Env | VectorEnv) -> None:
    """Raise UserError if one object serves as several environments (in separate processes it would be copied)."""
    check_distinct([x.unwrapped for x in getattr(environments.unwrapped, "envs", ()) if isinstance(x, gymnasium.Env)])


def _flat(environments: Any, action_mask: str) -> VectorEnv:
    if of_tensors(environments):
        if action_mask == "info":
            raise UserError("environments of tensors have their mask in the key action_mask: set action_mask to auto")
        environments = TensorEnvironments(environments, masked=action_mask != "off")
    if isinstance(environments.unwrapped, TensorEnvironments):
        autoreset_mode(environments)  # raises
        return environments
    mode = autoreset_mode(environments)
    if has_parts(environments.single_action_space):
        environments = VectorStructuredActions(environments)
    if action_mask == "info":
        environments = VectorMaskFromInfo(environments)
    if isinstance(environments.single_observation_space, spaces.Box | spaces.Discrete):
        return environments
    metadata = environments.metadata
    if metadata["autoreset_mode"] is not mode:  # Gymnasium's wrapper reads only the enum
        environments = VectorWrapper(environments)
        environments.metadata = metadata | {"autoreset_mode": mode}
    try:
        return VectorFlattened(environments, action_mask != "off")
    except ValueError as error:
        kind = type(environments.single_observation_space).__name__
        raise UserError(
            f"{kind} observations can be flattened only if the vector environment resets on the next step: make it "
            "with autoreset_mode NEXT_STEP"
        ) from error


def label(environment: Any) -> str:
    """The name of an environment, for a reader."""
    if isinstance(environment, str):
        return environment
    spec = getattr(environment, "spec", None)
    if spec is not None:
        return spec.id
    return getattr(environment, "__name__", type(environment).__name__)
