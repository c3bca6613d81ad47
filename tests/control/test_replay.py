"""Environments are saved as they stand: restored ones go on as the saved ones, bit for bit, or say they cannot."""

import json
import os
import random
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import (
    DelayObservation,
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    StickyAction,
    TimeAwareObservation,
    TimeLimit,
)
from gymnasium.wrappers.vector import NormalizeObservation as NormalizeVectorObservation
from probes import Counting, Known, Probe, limited
from safetensors.torch import load

from policygrad.control import make_environments, replay
from policygrad.control.replay import restore, state_of
from policygrad.files import as_safetensors
from policygrad.train.states import decoded, encoded


def through_a_file(state: Any) -> Any:
    tree, tensors = encoded(state)
    return decoded(json.loads(json.dumps(tree)), load(b"".join(as_safetensors(tensors, {}))))


class Drifting(Known):
    """Remembers earlier episodes, in numbers, lists, words and generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.level, self.history, self.mode = 0, [np.float32(0.0)], "easy"
        self.own, self.legacy, self.python = np.random.default_rng(3), np.random.RandomState(4), random.Random(5)
        self.table = np.zeros(3)
        self.view = self.table[1:]

    def reset(self, **options: Any) -> Any:
        self.level += 1
        self.mode = "hard" if self.level % 2 else "easy"
        self.history = [*self.history[-3:], np.float32(self.own.normal())]
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        self.view += self.own.random() + self.legacy.random_sample() + self.python.random()
        obs, reward, *rest = super().step(action)
        return obs, reward + self.level + float(self.history[-1]) + self.table.sum() + (self.mode == "hard"), *rest


class Composite(Probe):
    """Observations of several parts."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Dict({"x": spaces.Box(-9, 9, (2,), np.float64), "k": spaces.Discrete(5)})

    def reset(self, **options: Any) -> Any:
        gymnasium.Env.reset(self, seed=options.get("seed"))
        self.t = 0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self._obs(), 1.0, self.t == 4, False, {}

    def _obs(self) -> Any:
        return {"x": self.np_random.normal(size=2).clip(-9, 9), "k": int(self.np_random.integers(5))}


class Scaled(gymnasium.Wrapper):
    """A wrapper that learns, and acts at random by the action space's generator."""

    seen = 0.0

    def step(self, action: Any) -> Any:
        obs, reward, *rest = self.env.step(self.action_space.sample() if self.seen % 3 == 1 else action)
        self.seen += 1
        return obs, reward / (1 + self.seen), *rest


ENVIRONMENTS: dict[str, Callable[..., VectorEnv]] = {
    "an id": lambda: make_environments("CartPole-v1", 3, vectorization="sync"),
    "native": lambda: make_environments("CartPole-v1", 3),
    "pendulum": lambda: make_environments("Pendulum-v1", 2),
    "mountain car": lambda: make_environments("MountainCarContinuous-v0", 2),
    "words": lambda: make_environments("FrozenLake-v1", 3),
    "taxi": lambda: make_environments("Taxi-v4" if "Taxi-v4" in gymnasium.registry else "Taxi-v3", 2),
    "own numbers": lambda: make_environments(limited(Drifting, 6), 3),
    "own numbers in processes": lambda: make_environments(limited(Drifting, 6), 3, vectorization="async"),
    "counts its episodes": lambda: make_environments(Counting, 3),
    "parts": lambda: make_environments(Composite, 2),
    "parts in processes": lambda: make_environments(Composite, 2, vectorization="async"),
    "learns": lambda: make_environments(lambda: NormalizeReward(NormalizeObservation(limited(Known, 6)())), 3),
    "learns in processes": lambda: make_environments(
        lambda: NormalizeObservation(limited(Known, 6)()), 3, vectorization="async"
    ),
    "a wrapper's own": lambda: make_environments(lambda: Scaled(limited(Known, 6)()), 2),
    "wrappers of Gymnasium": lambda: make_environments(
        lambda: RecordEpisodeStatistics(
            StickyAction(DelayObservation(TimeAwareObservation(TimeLimit(CartPoleEnv(), 9)), 2), 0.3)
        ),
        2,
    ),
    "frames": lambda: make_environments(lambda: FrameStackObservation(TimeLimit(CartPoleEnv(), 9), 3), 2),
    "one object": lambda: make_environments(limited(Known, 6)()),
    "around the vector": lambda: make_environments(
        NormalizeVectorObservation(gymnasium.make_vec("CartPole-v1", 3, vectorization_mode="vector_entry_point")), 3
    ),
}  # fmt: skip


def played(environments: VectorEnv, count: int, draw: np.random.Generator) -> list[Any]:
    """What comes back from so many steps. Every action is drawn, also where an environment only resets."""
    found = []
    for _ in range(count):
        shape, space = environments.action_space.shape, environments.single_action_space
        if isinstance(space, spaces.Box):
            actions = draw.uniform(-1, 1, shape).astype(space.dtype)
        else:
            actions = draw.integers(space.n, size=shape)  # type: ignore[attr-defined]
        found.append(environments.step(actions)[:4])
    return found


def assert_the_same(a: list[Any], b: list[Any]) -> None:
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            assert np.array_equal(x, y)
            assert x.dtype == y.dtype


@pytest.mark.parametrize("after", [0, 1, 7, 40])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_restored_environments_go_on_as_the_saved_ones(name: str, after: int) -> None:
    saved, new = ENVIRONMENTS[name](), ENVIRONMENTS[name]()
    try:
        saved.reset(seed=5)
        played(saved, after, np.random.default_rng(0))
        state = state_of(saved)
        assert state is not None
        assert restore(new, through_a_file(state))
        again = through_a_file(state_of(new))
        draws = [np.random.default_rng(1) for _ in range(2)]
        assert_the_same(*(played(x, 60, draw) for x, draw in zip((saved, new), draws, strict=True)))
        played(new, 3, np.random.default_rng(2))
        third = ENVIRONMENTS[name]()
        try:
            assert restore(third, again), "a restored one can be saved again"
        finally:
            third.close()
    finally:
        saved.close()
        new.close()


def test_saving_changes_nothing() -> None:
    one, other = (make_environments(limited(Drifting, 6), 2) for _ in range(2))
    draws = [np.random.default_rng(1) for _ in range(2)]
    for x in (one, other):
        x.reset(seed=0)
    for _ in range(20):
        assert_the_same(*(played(x, 1, draw) for x, draw in zip((one, other), draws, strict=True)))
        state_of(one)


def test_a_later_reset_is_that_of_the_saved_one() -> None:
    """Whole episodes begin with a reset, and each environment's own random stream goes on."""
    saved, new = (make_environments(limited(Known, 6), 2) for _ in range(2))
    saved.reset(seed=5)
    played(saved, 9, np.random.default_rng(0))
    assert restore(new, through_a_file(state_of(saved)))
    assert np.array_equal(saved.reset()[0], new.reset()[0])


class Undecided(Known):
    """Its generator is no part of it: no seed decides what it does."""

    def reset(self, **options: Any) -> Any:
        self.obs = np.frombuffer(os.urandom(3), np.uint8).astype(np.float32)
        return self.obs, {}


class Fails(Known):
    """Raises where it is reset for the second time by one process."""

    resets = 0

    def reset(self, **options: Any) -> Any:
        Fails.resets += 1
        if Fails.resets > 2:
            raise RuntimeError("no")
        return super().reset(**options)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_what_does_not_repeat_itself_is_noticed(vectorization: str) -> None:
    saved, new = (make_environments(limited(Undecided, 8), 2, vectorization=vectorization) for _ in range(2))
    try:
        saved.reset(seed=0)
        played(saved, 3, np.random.default_rng(0))
        assert not restore(new, through_a_file(state_of(saved)))
        new.reset(seed=1)
        played(new, 3, np.random.default_rng(0))
    finally:
        saved.close()
        new.close()


def test_an_environment_that_raises_in_the_replay_is_not_restored() -> None:
    saved, new = (make_environments(Fails, 2) for _ in range(2))
    saved.reset(seed=0)
    assert not restore(new, state_of(saved) or {})


def test_an_episode_that_is_too_long_is_not_kept_and_the_next_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "LONGEST", 32)
    environments = make_environments(Known, 1)
    environments.reset(seed=0)
    recording = environments.envs[0].get_wrapper_attr("recording")  # type: ignore[attr-defined]
    for count in range(40):
        assert (recording.state_dict() is None) == (count > 32), count
        recording.add(np.zeros(2, np.float32))
    environments.reset()
    assert state_of(environments) is not None


class Own(VectorEnv):
    """A vector environment of the user's own. `held`: something that no file can hold."""

    metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(self, held: Any = None) -> None:
        self.num_envs, self.held, self.at = 2, held, np.zeros(2, np.float32)
        self.single_observation_space, self.single_action_space = spaces.Box(-9, 9, (1,)), spaces.Discrete(2)
        self.observation_space = spaces.Box(-9, 9, (2, 1))
        self.action_space = spaces.MultiDiscrete([2, 2])

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.at = self.np_random.normal(size=2).astype(np.float32)
        return self.at[:, None].copy(), {}

    def step(self, actions: Any) -> Any:
        self.at = np.tanh(self.at + self.np_random.normal(size=2)).astype(np.float32)
        never = np.zeros(2, bool)
        return self.at[:, None].copy(), self.at.astype(np.float64), never, never, {}


class WithState(Own):
    """One that can save itself."""

    def state_dict(self) -> Any:
        return {"at": self.at, "random": self.np_random.bit_generator.state}

    def load_state_dict(self, state: Any) -> None:
        self.at, self.np_random.bit_generator.state = state["at"], state["random"]


@pytest.mark.parametrize("make", [Own, lambda: WithState(object())])
def test_a_vector_environment_is_its_arrays_or_what_it_says_itself(make: Any) -> None:
    saved, new = make(), make()
    saved.reset(seed=0)
    played(saved, 3, np.random.default_rng(0))
    assert restore(new, through_a_file(state_of(saved)))
    draws = [np.random.default_rng(1) for _ in range(2)]
    assert_the_same(*(played(x, 9, draw) for x, draw in zip((saved, new), draws, strict=True)))


def test_what_has_no_form_for_a_file_says_so() -> None:
    for environments in (Own(object()), Own([Known()]), SyncVectorEnv([Known] * 2)):
        environments.reset(seed=0)
        assert state_of(environments) is None


def test_a_path_in_a_file_is_not_put_into_an_environment() -> None:
    class Reads(Known):
        path, word = "", ""

        def __init__(self) -> None:
            super().__init__()
            self.path, self.word = "/data/levels", "easy"

    environments = make_environments(limited(Reads, 9), 1)
    environments.reset(seed=0)
    state = state_of(environments)
    assert state is not None
    held = state["copies"][0]["before"][0]
    assert held["word"] == "easy"
    assert "path" not in held
    held["path"] = "/etc/passwd"
    restore(environments, state)
    assert environments.envs[0].unwrapped.path == "/data/levels"  # type: ignore[attr-defined]
