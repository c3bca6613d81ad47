"""Ids, objects and callables become a vector environment, or one line that says why not."""

from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import TimeLimit
from probes import Broken, Counting, Known, limited

from policygrad.control import Policy, Sampler, make_environments
from policygrad.control.environments import autoreset_mode, label
from policygrad.errors import UserError


class Observed(Counting):
    """An environment whose observations are samples of the space."""

    def __init__(self, space: spaces.Space) -> None:
        super().__init__()
        self.observation_space = space

    def _obs(self) -> Any:
        return self.observation_space.sample()


def played(environments: VectorEnv) -> Sampler:
    """A sampler that has taken a rollout, so that the environments were reset and stepped."""
    sampler = Sampler(environments, 9, seed=0)
    sampler(Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,)))
    return sampler


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ("Acrobot-v1", 3),
        ("probes:Known-v0", 3),
        (CartPoleEnv, 3),
        (lambda: gymnasium.make("CartPole-v1"), 3),
        (CartPoleEnv(), 1),
        (SyncVectorEnv([CartPoleEnv] * 3), 3),
        (CartPoleVectorEnv(3), 3),
    ],
    ids=["id", "module:id", "class", "callable", "object", "vector", "native vector"],
)
def test_an_environment_is_given_by(environment: Any, count: int) -> None:
    environments = make_environments(environment, count)
    assert isinstance(environments, VectorEnv)
    assert environments.num_envs == count
    assert environments.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert played(environments).stepping.steps > 0


def test_the_native_vectorized_form_is_used_where_there_is_one() -> None:
    environments = make_environments("CartPole-v1", 3)
    assert isinstance(environments.unwrapped, CartPoleVectorEnv)


def test_the_native_form_keeps_the_time_limit() -> None:
    environments = make_environments("CartPole-v1", 1)
    assert environments.unwrapped.max_episode_steps == 500  # type: ignore[attr-defined]


@pytest.mark.parametrize(("vectorization", "kind"), [("sync", SyncVectorEnv), ("async", AsyncVectorEnv)])
def test_the_other_forms_are_there_by_choice(vectorization: str, kind: type) -> None:
    environments = make_environments("CartPole-v1", 2, vectorization=vectorization)
    try:
        assert isinstance(environments, kind)
        assert environments.num_envs == 2
    finally:
        environments.close()


def test_processes_sample_what_one_process_samples() -> None:
    rollouts = []
    for vectorization in ("sync", "async"):
        torch.manual_seed(0)
        environments = make_environments("probes:Known-v0", 2, vectorization=vectorization)
        policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,))
        rollouts.append(Sampler(environments, 12, seed=0)(policy))
        environments.close()
    for name in ("obs", "action", "reward", "ended", "mask", "final_obs"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts)), name


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(UserError, match="auto, sync, async"):
        make_environments("CartPole-v1", 2, vectorization="threads")


def test_options_go_to_the_environment() -> None:
    environments = make_environments("CartPole-v1", 2, vectorization="sync", max_episode_steps=3)
    sampler = Sampler(environments, 5, seed=0)
    rollout = sampler(Policy(environments.single_observation_space, environments.single_action_space))
    assert rollout.metrics["length"] == 3


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("environment", ["CartPole-v1", Counting])
def test_there_is_at_least_one_environment(environment: Any, count: int) -> None:
    with pytest.raises(UserError, match="num_envs"):
        make_environments(environment, count)


def test_one_object_is_not_several_environments() -> None:
    with pytest.raises(UserError, match="callable"):
        make_environments(Counting(), 2)


@pytest.mark.parametrize("form", ["callable", "wrapped", "vector"])
def test_a_callable_makes_a_new_environment_each_time(form: str) -> None:
    shared = Counting()
    environment = {
        "callable": lambda: shared,
        "wrapped": lambda: TimeLimit(shared, 5),
        "vector": SyncVectorEnv([lambda: shared] * 2),
    }[form]
    with pytest.raises(UserError, match="same object more than once: make a new environment in each call"):
        make_environments(environment, 4)
    assert make_environments(lambda: shared, 1).num_envs == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("CartPole-v9", "CartPole-v1"),
        ("cartpole-v1", "CartPole-v1"),
        ("Cartpol-v1", "CartPole-v1"),
        ("LunarLandr-v3", "LunarLander-v3"),
        ("probes:Knwon-v0", "Known-v0"),
        ("$$$", "policygrad list environments"),
        ("no_such_module:Env-v0", "no_such_module"),
        ("not an id", "not an id"),
        ("", "''"),
    ],
)
def test_an_unknown_id_gives_the_nearest_names(name: str, said: str) -> None:
    with pytest.raises(UserError) as raised:
        make_environments(name, 2)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"Missing-v0 needs a package that is not installed: no such package"):
        make_environments("probes:Missing-v0", 2)


def test_an_environment_that_cannot_be_made_is_one_line() -> None:
    def make() -> gymnasium.Env:
        raise OSError("no level\nfile")

    with pytest.raises(UserError, match=r"could not be made: OSError: no level file"):
        make_environments(make, 2)


@pytest.mark.parametrize(
    ("space", "size"),
    [
        (spaces.Dict({"a": spaces.Box(-1, 1, (2, 2)), "b": spaces.Discrete(3)}), 7),
        (spaces.Tuple((spaces.Discrete(2, start=5), spaces.MultiBinary(3))), 5),
        (spaces.MultiDiscrete([2, 3]), 5),
        (spaces.MultiBinary((2, 2)), 4),
        (spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 1, (3,))))}), 5),
    ],
    ids=["dict", "tuple", "multi-discrete", "multi-binary", "nested"],
)
@pytest.mark.parametrize("form", ["callable", "object", "vector"])
def test_composite_observations_are_flattened(space: spaces.Space, size: int, form: str) -> None:
    environment = {
        "callable": lambda: lambda: Observed(space),
        "object": lambda: Observed(space),
        "vector": lambda: SyncVectorEnv([lambda: Observed(space)]),
    }[form]()
    environments = make_environments(environment, 1)
    assert isinstance(environments.single_observation_space, spaces.Box)
    assert environments.single_observation_space.shape == (size,)
    assert played(environments).stepping.steps == 7


@pytest.mark.parametrize("space", [spaces.Box(0, 255, (4, 4, 3), np.uint8), spaces.Box(-1, 1, ()), spaces.Discrete(5)])
def test_boxes_and_state_numbers_are_left_as_they_are(space: spaces.Space) -> None:
    environments = make_environments(lambda: Observed(space), 2)
    assert environments.single_observation_space == space
    assert played(environments).stepping.steps == 14


@pytest.mark.parametrize(
    "space", [spaces.Sequence(spaces.Discrete(3)), spaces.Graph(spaces.Box(-1, 1, (2,)), None)], ids=["seq", "graph"]
)
def test_an_observation_space_without_a_fixed_size_is_named(space: spaces.Space) -> None:
    with pytest.raises(UserError, match=type(space).__name__):
        played(make_environments(lambda: Observed(space), 1))


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Sequence(spaces.Discrete(3))}),
        spaces.Tuple((spaces.Box(0, 1), spaces.Dict({"b": spaces.Sequence(spaces.Discrete(3))}))),
    ],
    ids=["dict", "nested"],
)
@pytest.mark.parametrize("form", ["callable", "object"])
def test_the_member_without_a_fixed_size_is_named(space: spaces.Space, form: str) -> None:
    environment: Any = (lambda: Observed(space)) if form == "callable" else Observed(space)
    with pytest.raises(UserError, match=r"^a Sequence space is not supported"):
        played(make_environments(environment, 1))


class Saying(VectorWrapper):
    """A vector environment whose metadata says `said` of when it resets."""

    def __init__(self, mode: AutoresetMode, said: Any, make: Any = Counting) -> None:
        super().__init__(SyncVectorEnv([make], autoreset_mode=mode))
        self.metadata = {} if said is None else {"autoreset_mode": said}


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        *((AutoresetMode.SAME_STEP, x) for x in ("SameStep", "same_step", "SAME_STEP", "AutoresetMode.SAME_STEP")),
        *((AutoresetMode.NEXT_STEP, x) for x in ("NextStep", "next-step", AutoresetMode.NEXT_STEP)),
    ],
)
def test_when_it_resets_may_be_said_in_words(mode: AutoresetMode, said: Any) -> None:
    environments = Saying(mode, said)
    assert autoreset_mode(environments) is mode
    rewards = Sampler(environments, 6)(Policy(environments.single_observation_space, spaces.Discrete(2))).reward
    assert rewards.tolist() == [[1, 2, 0, 1, 2, 3]]


def test_a_word_for_no_mode_is_refused() -> None:
    with pytest.raises(UserError, match="the autoreset_mode 'sometimes'"):
        autoreset_mode(Saying(AutoresetMode.NEXT_STEP, "sometimes"))


def test_composite_observations_are_flattened_whichever_way_it_is_said_when_it_resets() -> None:
    space = spaces.Dict({"a": spaces.Discrete(3)})
    for said in (AutoresetMode.NEXT_STEP, "next_step"):
        given = Saying(AutoresetMode.NEXT_STEP, said, lambda: Observed(space))
        assert played(make_environments(given)).stepping.steps == 7
        assert given.metadata.get("autoreset_mode") == said


def test_a_vector_environment_that_cannot_be_flattened_is_refused_in_one_line() -> None:
    space = spaces.Dict({"a": spaces.Discrete(3)})
    environments = SyncVectorEnv([lambda: Observed(space)], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(UserError, match="NEXT_STEP"):
        make_environments(environments)


def test_a_wrong_shape_inside_a_composite_observation_is_one_line() -> None:
    class Wrong(Observed):
        def _obs(self) -> Any:
            return {"a": np.zeros(5, np.float32)}

    with pytest.raises(UserError, match="shape"):
        played(make_environments(lambda: Wrong(spaces.Dict({"a": spaces.Box(-1, 1, (2,))})), 1))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Gymnasium reports the worker's end in its own words too
def test_an_error_in_another_process_is_one_line() -> None:
    environments = make_environments(Broken, 2, vectorization="async")
    try:
        with pytest.raises(UserError, match=r"RuntimeError in step: the simulator crashed"):
            played(environments)
    finally:
        environments.close()


@pytest.mark.parametrize("squash", [False, True])
def test_an_environment_never_sees_an_action_outside_its_box(squash: bool) -> None:
    seen = []

    class Seen(Known):
        def step(self, action: Any) -> Any:
            seen.append(action)
            assert self.action_space.contains(action)
            return super().step(action)

    environments = make_environments(limited(Seen, 8), 2)
    spaces_ = (environments.single_observation_space, environments.single_action_space)
    Sampler(environments, 32)(Policy(*spaces_, squash=squash, initial_log_std=1.0))
    assert len(seen) > 50


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ("probes:Known-v0", "probes:Known-v0"),
        (gymnasium.make("CartPole-v1"), "CartPole-v1"),
        (Counting, "Counting"),
        (Counting(), "Counting"),
        (CartPoleVectorEnv(2), "CartPoleVectorEnv"),
    ],
    ids=["id", "made", "class", "object", "vector"],
)
def test_an_environment_has_a_name(environment: Any, name: str) -> None:
    assert label(environment) == name


def test_a_long_error_is_shortened() -> None:
    def make() -> gymnasium.Env:
        raise OSError("x" * 1000)

    with pytest.raises(UserError, match=r"could not be made: OSError: xxx") as raised:
        make_environments(make, 2)
    assert len(str(raised.value)) <= 200


def test_copies_are_seeded_apart() -> None:
    environments = make_environments(limited(Known, 8), 3)
    obs, _ = environments.reset(seed=0)
    assert len({tuple(row) for row in obs.tolist()}) == 3
