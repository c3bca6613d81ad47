"""What the wrappers of an environment learn: running statistics, carried from training to evaluation.

Gymnasium's NormalizeObservation keeps a running mean, variance and count, one for each copy of the environment; so do
many wrappers of users. Without them an evaluation would begin with the statistics of nothing.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import NormalizeReward
from gymnasium.wrappers.vector import NormalizeReward as NormalizeVectorReward
from torch import Tensor

from policygrad.control.processes import Processes
from policygrad.errors import UserError, one_line

Learned = dict[str, np.ndarray]  # by name, such as NormalizeObservation.0.obs_rms.mean
STATISTICS = ("mean", "var", "count")


class Layers:
    """An environment with its wrappers, or the wrappers of a vector environment, and the numbers that they keep.

    Running statistics are three numbers or arrays, `mean`, `var` and `count`, of a wrapper, of the environment itself,
    or of an object that one of them holds. Users' own wrappers may learn in other ways: there, every number counts that
    has changed since this object was made.
    """

    def __init__(self, environment: Any) -> None:
        layers = []
        while isinstance(environment, gymnasium.Wrapper | VectorWrapper):
            layers.append(environment)
            environment = environment.env
        layers.append(environment)
        self.layers: list[tuple[str, Any]] = []  # from the inside: a wrapper around all of them changes no name
        met: Counter[str] = Counter()
        for layer in reversed(layers):
            name = type(layer).__name__
            self.layers.append((f"{name}.{met[name]}", layer))
            met[name] += 1
        self.before = self.numbers()

    def numbers(self) -> Learned:
        """Every number that may be learned."""
        return {name: value for name, _, _, value in self._numbers()}

    def learned(self) -> Learned:
        """The statistics, and the other numbers that changed in users' own wrappers. Rewards are not in it."""
        found = {}
        for name, _, attribute, value in self._numbers():
            known = self.before.get(name)
            if attribute in STATISTICS or known is None or not np.array_equal(known, value):
                found[name] = value
        return found

    def set(self, learned: Learned, *, statistics_alone: bool = False) -> None:
        """Give each number its value in `learned`, in its own type."""
        for name, holder, attribute, value in list(self._numbers()):
            if name in learned and (attribute in STATISTICS or not statistics_alone):
                old, new = getattr(holder, attribute), np.asarray(learned[name]).astype(value.dtype)
                if isinstance(old, Tensor):
                    setattr(holder, attribute, old.new_tensor(new))
                else:
                    setattr(holder, attribute, new.copy() if isinstance(old, np.ndarray) else type(old)(new.item()))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Gymnasium's statistics are not updated, and its normalized rewards are the environment's own."""
        flags = [
            (layer, layer.update_running_mean) for _, layer in self.layers if hasattr(layer, "update_running_mean")
        ]
        rewards = [x for _, x in self.layers if isinstance(x, NormalizeReward | NormalizeVectorReward)]
        scales = [(layer.return_rms, layer.return_rms.var) for layer in rewards]
        for layer, _ in flags:
            layer.update_running_mean = False
        for layer in rewards:
            layer.return_rms.var = 1.0 - layer.epsilon  # it divides by sqrt(var + epsilon)
        try:
            yield
        finally:
            for layer, flag in flags:
                layer.update_running_mean = flag
            for statistics, var in scales:
                statistics.var = var

    def _numbers(self) -> Iterator[tuple[str, Any, str, np.ndarray]]:
        """(name, holder, attribute, value) of every number and array that may be learned."""
        for name, layer in self.layers:
            if isinstance(layer, NormalizeReward | NormalizeVectorReward):
                continue
            wraps = isinstance(layer, gymnasium.Wrapper | VectorWrapper)
            own = wraps and type(layer).__module__.partition(".")[0] not in ("gymnasium", "policygrad")
            held = [(f"{name}.{key}", x) for key, x in vars(layer).items() if _may_learn(x)]
            for place, holder in [(name, layer), *held]:
                numbers = {key: _number(getattr(holder, key, None)) for key in STATISTICS}
                if any(x is None for x in numbers.values()):
                    numbers = {}
                if own:
                    numbers = {key: _number(x) for key, x in vars(holder).items()} | numbers
                for key, value in numbers.items():
                    if value is not None:
                        yield f"{place}.{key}", holder, key, value


def _may_learn(thing: Any) -> bool:
    """Whether a wrapper's attribute may be an object with running statistics."""
    not_those = (gymnasium.Env, VectorEnv, gymnasium.Space, EnvSpec, type, np.random.Generator, Tensor)
    return (
        hasattr(thing, "__dict__") and not isinstance(thing, not_those) and not callable(getattr(thing, "mean", None))
    )


def _number(thing: Any) -> np.ndarray | None:
    """A copy of a number or of an array of numbers; None for anything else."""
    if not isinstance(thing, int | float | np.number | np.ndarray | Tensor):
        return None
    array = np.array(thing.detach().cpu() if isinstance(thing, Tensor) else thing)
    return array if array.dtype.kind in "biuf" else None


class Wrappers:
    """The wrappers of a vector environment: around it, and around each of its copies."""

    def __init__(self, environments: VectorEnv) -> None:
        self.environments, self.base = environments, environments.unwrapped
        self.around = Layers(environments)
        self.copies: list[Layers] = []
        if isinstance(self.base, SyncVectorEnv):
            self.copies = [getattr(_checked(x), "layers", None) or Layers(x) for x in self.base.envs]

    def learned(self) -> Learned:
        """What all copies have learned together. Raises UserError if it is out of reach, in processes of the user's."""
        copies = [x.learned() for x in self.copies]
        if isinstance(self.base, AsyncVectorEnv | Processes):
            if all(self.base.call("has_wrapper_attr", "learned")):
                copies = list(self.base.call("learned"))
            elif any(self.base.call("has_wrapper_attr", "obs_rms")):
                raise UserError(
                    "NormalizeObservation learns in the processes of the AsyncVectorEnv handed in, out of reach: hand "
                    'in a callable, with vectorization="async"'
                )
        return merged(copies) | self.around.learned()

    def take(self, learned: Learned) -> bool:
        """Give all copies what others have learned together. Returns whether they are in reach, not in processes.

        Raises UserError where the wrappers are not those that learned.
        """
        _check_all(self.learned(), learned)
        for x in (*self.copies, self.around):
            x.set(learned)
        return not isinstance(self.base, AsyncVectorEnv | Processes)

    @contextmanager
    def frozen(self, learned: Learned | None) -> Iterator[VectorEnv]:
        """The vector environment with these statistics, which stay as they are; None: its own. Undone afterwards.

        Raises UserError where the wrappers are not those that learned.
        """
        own = self.learned()
        if isinstance(self.base, AsyncVectorEnv | Processes) and own:
            name = _class_of(next(iter(own)))
            raise UserError(
                f"{name} learns in processes, out of reach: evaluate on a callable that makes the environment"
            )
        given = own if learned is None else learned
        _check_all(own, given)
        layers = [*self.copies, self.around]
        before = [x.numbers() for x in layers]
        for x in layers:
            x.set(given)
        try:
            with _all_frozen(layers):
                yield Held(self.environments, layers, given) if given else self.environments
        finally:
            for x, values in zip(layers, before, strict=True):
                x.set(values)


@contextmanager
def _all_frozen(layers: list[Layers]) -> Iterator[None]:
    if not layers:
        yield
        return
    with layers[0].frozen(), _all_frozen(layers[1:]):
        yield


class Held(VectorWrapper):
    """Sets running statistics back after each step, for wrappers that know no other way to stop learning."""

    def __init__(self, environments: VectorEnv, layers: list[Layers], learned: Learned) -> None:
        super().__init__(environments)
        self.layers, self.learned = layers, learned

    def reset(self, **options: Any) -> Any:
        """As the environments'."""
        found = self.env.reset(**options)
        self._hold()
        return found

    def step(self, actions: Any) -> Any:
        """As the environments'."""
        found = self.env.step(actions)
        self._hold()
        return found

    def _hold(self) -> None:
        for x in self.layers:
            x.set(self.learned, statistics_alone=True)


def merged(copies: list[Learned]) -> Learned:
    """The statistics of all copies' observations together (Chan et al. 1979); of other numbers, the first copy's."""
    found = {name: value for learned in reversed(copies) for name, value in learned.items()}
    for place in [name.removesuffix(".count") for name in found if name.endswith(".count")]:
        if not all(f"{place}.{x}" in learned for learned in copies for x in STATISTICS):
            continue
        means, variances, counts = (
            np.stack([np.asarray(learned[f"{place}.{x}"], np.float64) for learned in copies]) for x in STATISTICS
        )
        total = counts.sum(0)
        share = (counts / total).reshape(len(copies), *counts.shape[1:], *[1] * (means.ndim - counts.ndim))
        mean = (share * means).sum(0)
        variance = (share * (variances + (means - mean) ** 2)).sum(0)
        found |= {f"{place}.mean": mean, f"{place}.var": variance, f"{place}.count": total}
    return found


def _check_all(own: Learned, given: Learned) -> None:
    for name in sorted({*own, *given}):
        if name.endswith(".count"):
            _check(name, own, given)


def _check(name: str, own: Learned, given: Learned) -> None:
    """Raise UserError for statistics that a wrapper here lacks, or that no wrapper here has."""
    wrapper = _class_of(name)
    if name not in given:
        raise UserError(
            f"the environment's {wrapper} has statistics, and training had none: use the environment of training"
        )
    if name not in own:
        raise UserError(
            f"training had {wrapper} around the environment, and here it is missing: use the environment of training"
        )
    if not (np.asarray(given[name]) >= 1).all() and own is given:
        raise UserError(
            f"the environment's {wrapper} has seen nothing yet: hand in what it learned in training, as "
            "learned=run.world.learned()"
        )
    mean = name.removesuffix("count") + "mean"
    if np.shape(own[mean]) != np.shape(given[mean]):
        raise UserError(
            f"{wrapper} has statistics of shape {np.shape(own[mean])} here and {np.shape(given[mean])} in training: "
            "use the environment of training"
        )


def _class_of(name: str) -> str:
    return one_line(name.partition(".")[0], 40)


def _checked(environment: Any) -> Any:
    """The wrapper of environments.py around an environment, where it keeps its layers; None without it."""
    while isinstance(environment, gymnasium.Wrapper):
        if hasattr(environment, "layers"):
            return environment
        environment = environment.env
    return None
