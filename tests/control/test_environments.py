"""Ids, objects and callables become a vector environment, or one line that says why not."""

import sys
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers import TimeLimit
from probes import Broken, Counting, Known, limited

from policygrad.control import Policy, Sampler, make_environments
from policygrad.control.environments import autoreset_mode, importable, label, named
from policygrad.control.processes import Processes
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


@pytest.mark.parametrize(("vectorization", "kind"), [("sync", SyncVectorEnv), ("async", Processes)])
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
    environments = make_environments("CartPole-v1", 2, vectorization="sync", env_options={"max_episode_steps": 3})
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


def test_a_module_that_an_environment_imports_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)  # as where it is not installed
    monkeypatch.delitem(sys.modules, "gymnasium.envs.phys2d.cartpole", raising=False)
    with pytest.raises(UserError, match=r"phys2d/CartPole-v1 needs \w+, which is not installed: pip install .*\[jax\]"):
        make_environments("phys2d/CartPole-v1", 2)

    def make() -> gymnasium.Env:
        raise ModuleNotFoundError("No module named 'x'", name="x")

    with pytest.raises(UserError, match="make needs x, which is not installed: install its package"):
        make_environments(make, 2)


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


def test_a_vector_environment_that_does_not_say_when_it_resets_is_refused() -> None:
    for take in (autoreset_mode, make_environments, lambda x: Sampler(x, 4)):
        with pytest.raises(UserError, match=r"does not say when it resets: set metadata\[\"autoreset_mode\"\]"):
            take(Saying(AutoresetMode.SAME_STEP, None))


def test_one_that_resets_at_once_and_says_otherwise_is_refused() -> None:
    """A decision of each episode would be lost."""
    environments = make_environments(Saying(AutoresetMode.SAME_STEP, "NextStep"))
    with pytest.raises(UserError, match=r"says autoreset_mode NEXT_STEP, and its info has final_obs, as of SAME_STEP"):
        played(environments)


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


@pytest.mark.parametrize(
    "made", [{"initial_log_std": 1.0}, {"distribution": "squashed", "initial_log_std": 1.0}, {"distribution": "beta"}]
)
def test_an_environment_never_sees_an_action_outside_its_box(made: dict[str, Any]) -> None:
    seen = []

    class Seen(Known):
        def step(self, action: Any) -> Any:
            seen.append(action)
            assert self.action_space.contains(action)
            return super().step(action)

    environments = make_environments(limited(Seen, 8), 2)
    spaces_ = (environments.single_observation_space, environments.single_action_space)
    Sampler(environments, 32)(Policy(*spaces_, **made))
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


# Names of classes and functions


MINE = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.wrappers import TimeLimit

class Mine(CartPoleEnv):
    def __init__(self, limit=5, gravity=9.8):
        super().__init__()
        self.gravity, self.limit = gravity, limit

def limited(limit=5):
    return TimeLimit(Mine(limit), limit)

NUMBER = 3
for name in ("Mine-v0", "unversioned"):
    gymnasium.registry.pop(name, None)
    gymnasium.register(name, entry_point=Mine, max_episode_steps=7)
"""


@pytest.fixture
def mine(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A directory with mine_env.py, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    (tmp_path / "mine_env.py").write_text(MINE)
    return tmp_path


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mine_env.py:Mine", {"gravity": 3.0}),
        ("mine_env:Mine", {"gravity": 3.0}),
        ("mine_env:Mine-v0", {"gravity": 3.0}),
        ("mine_env:unversioned", {"gravity": 3.0}),
        ("mine_env.py:limited", {"limit": 6}),
        ("mine_env:limited", {"limit": 6}),
    ],
)
def test_a_class_or_a_function_may_be_named(mine: Any, name: str, options: dict[str, Any]) -> None:
    environments = make_environments(name, 2, env_options=options)
    for option, value in options.items():
        assert [getattr(x.unwrapped, option) for x in environments.envs] == [value] * 2
    assert played(environments).stepping.steps > 0
    assert label(name) == name


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mine_env.py:Mien", {}, "has no function or class 'Mien': did you mean Mine"),
        ("mine_env:Mien", {}, "has no function or class 'Mien': did you mean Mine"),
        ("mine_env:NUMBER", {}, "has no function or class 'NUMBER'"),
        ("mine_env.py", {}, "file.py:function"),
        ("mine_en.py:Mine", {}, "there is no file mine_en.py: did you mean mine_env.py"),
        ("mine_env:Mine", {"gravty": 1}, "could not be made: TypeError: .*gravty.*: its arguments are env_options"),
    ],
)
def test_a_name_that_is_none_is_one_line(mine: Any, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make_environments(name, 2, env_options=options)
    assert len(str(raised.value)) <= 200
    assert "\n" not in str(raised.value)


def test_a_class_that_a_module_holds_is_found_again_by_its_name(mine: Any) -> None:
    class Local(Counting):
        pass

    assert importable(Counting) == "probes:Counting"
    assert make_environments("probes:Counting", 2).envs[0].unwrapped.__class__ is Counting
    of_file = named("mine_env.py:Mine")
    assert importable(of_file) == f"{mine}/mine_env.py:Mine" or importable(of_file) == "mine_env.py:Mine"
    for nameless in (Local, lambda: Counting(), Counting(), "CartPole-v1", partial(Counting, (3,))):
        assert importable(nameless) is None


class Stepless(gymnasium.Env):
    observation_space, action_space = spaces.Discrete(2), spaces.Discrete(2)


class Spaceless(Counting):
    def __init__(self) -> None:
        self.action_space = spaces.Discrete(2)


class Duck:
    observation_space, action_space = spaces.Discrete(2), spaces.Discrete(2)

    def reset(self) -> None: ...

    def step(self, action: Any) -> None: ...


class Old:
    """As of the package that came before Gymnasium."""

    __module__ = "gym.envs.classic_control"

    def step(self, action: Any) -> None: ...


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        (42, "42 is no gymnasium.Env: give an id, an environment, or a class or function that makes one"),
        ({"id": "CartPole-v1"}, "is no gymnasium.Env"),
        (b"CartPole-v1", "is no gymnasium.Env"),
        (Duck(), "is no gymnasium.Env: derive its class from gymnasium.Env"),
        (Old(), r"old package gym: convert it with shimmy.GymV26CompatibilityV0\(env=Old"),
        (Duck, "Duck made no environment: .*derive its class"),
        (lambda: None, "made no environment: None is no gymnasium.Env"),
        (dict, "dict made no environment"),
        (lambda: CartPoleVectorEnv(2), "is a vector environment: hand in the object itself"),
        (Stepless, "Stepless has no step: define step and reset"),
        (Spaceless, "Spaceless has no observation_space: set it"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_no_environment_is_said_in_one_line(thing: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make_environments(thing, 1)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("settings", [{"vectorization": "async"}, {"env_options": {"gravity": 3}}])
@pytest.mark.parametrize("make", [CartPoleEnv, lambda: SyncVectorEnv([CartPoleEnv])])
def test_what_is_made_already_takes_no_settings(make: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="is made already"):
        make_environments(make(), 1, **settings)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("PyFlyt/QuadX-v9", r"install its package, with pip install PyFlyt"),
        ("FetchReach-v4", r"install its package, with pip install gymnasium-robotics"),
        ("Nobodys/Game-v0", r"name the module that registers it, as in module:Nobodys/Game-v0"),
    ],
)
def test_an_id_of_another_package_says_what_to_install(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make_environments(name, 2)
    assert len(str(raised.value)) <= 200


# What passes on to the batch


class Returning(Counting):
    """Returns these observations, rewards and infos, one after the other."""

    def __init__(
        self, space: spaces.Space, obs: Any, reward: Any = 1.0, infos: tuple[Any, ...] = ({},), flag: Any = False
    ) -> None:
        super().__init__()
        self.observation_space, self.obs, self.given, self.infos, self.flag = space, obs, reward, infos, flag

    def reset(self, **options: Any) -> Any:
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.obs, self.given, self.flag, self.t == 3, self.infos[(self.t - 1) % len(self.infos)]


IMAGE = spaces.Box(0, 255, (2,), np.uint8)
FLOATS = spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("space", "obs", "said"),
    [
        (IMAGE, np.array([0.5, 1.0]), "0.5 in an observation, which is no uint8 number"),
        (IMAGE, np.array([-1, 1]), "-1 in an observation"),
        (IMAGE, np.array([1, 256]), "256 in an observation"),
        (spaces.Box(-9, 9, (2,), np.int8), np.array([1, 300]), "300 in an observation"),
        (spaces.Box(-9, 9, (2,), np.int32), np.array([1, 2**40]), "1099511627776 in an observation"),
        (FLOATS, np.array([1e39, 0.0]), r"1e\+39 in an observation, which is no float32 number"),
        (FLOATS, np.array([1 + 2j, 0]), "in an observation, which is no float32"),
        (FLOATS, np.array(["1", "2"]), "in an observation, which is no float32"),
        (spaces.Discrete(3), 1.5, "1.5 in an observation, which is no int64"),
        (spaces.MultiBinary(2), np.array([0.3, 1]), "0.3 in an observation, which is no int8"),
        (spaces.Dict({"a": IMAGE}), {"a": np.array([0.5, 1.0])}, "0.5 in an observation"),
        (
            spaces.Dict({"a": IMAGE, "b": IMAGE}),
            {"a": np.array([0, 1])},
            "without 'b', which its observation_space has",
        ),
        (spaces.Tuple((spaces.Discrete(2), IMAGE)), (1,), "an observation without 1"),
        (spaces.Tuple((IMAGE,)), (np.array([0, 1]), 2), "an observation with 1, which its observation_space lacks"),
        (spaces.Dict({"a": IMAGE}), {"a": np.array([0, 1]), "b": 3}, "an observation with 'b', which .* lacks"),
        # Flattened, these would be the numbers of other states.
        (spaces.Discrete(3, start=1), 4, r"step returned 4, which is outside Discrete\(3, start=1\)"),
        (spaces.Dict({"a": spaces.Discrete(3)}), {"a": -1}, r"returned -1, which is outside Discrete\(3\)"),
        (spaces.MultiDiscrete([3, 3]), np.array([5, 0]), r"returned \[5 0\], which is outside MultiDiscrete"),
        (spaces.MultiDiscrete([3, 3], start=[1, 1]), np.array([0, 1]), r"returned \[0 1\], which is outside Multi"),
        (spaces.MultiBinary(2), np.array([0, 7]), r"returned \[0 7\], which is outside MultiBinary\(2\)"),
    ],
)
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_number_that_a_cast_would_change_is_refused(
    space: spaces.Space, obs: Any, said: str, vectorization: str
) -> None:
    environments = make_environments(lambda: Returning(space, obs), 2, vectorization=vectorization)
    try:
        with pytest.raises(UserError, match=said) as raised:
            played(environments)
    finally:
        environments.close()
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (IMAGE, np.array([0.0, 255.0])),
        (IMAGE, [3, 7]),
        (FLOATS, np.array([0.1, -3.0])),
        (FLOATS, np.array([1, 2])),
        (spaces.Discrete(3), 2.0),
        (spaces.Discrete(3), np.int8(2)),
        (spaces.MultiBinary(2), np.array([True, False])),
    ],
)
def test_a_number_of_another_type_that_stays_the_same_is_none_of_these(space: spaces.Space, obs: Any) -> None:
    sampler = played(make_environments(lambda: Returning(space, obs), 2))
    assert sampler.stepping.steps == 14


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("1.5", "reward of '1.5': fix it to return a number"),
        (None, "reward of None"),
        (1 + 2j, r"reward of \(1\+2j\)"),
        (1e39, r"reward of 1e\+39 \(beyond float32\)"),
        (np.float64(-1e300), r"reward of -1e\+300 \(beyond float32\)"),
        (np.array([1.0]), r"reward of shape \(1,\)"),
    ],
)
def test_a_reward_that_is_no_number_of_a_rollout_is_refused(reward: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        played(make_environments(lambda: Returning(FLOATS, np.zeros(2, np.float32), reward), 2))


@pytest.mark.parametrize("reward", [2, True, np.float32(2), np.int64(2), np.array(2.0), np.bool_(True)])
def test_any_number_is_a_reward(reward: Any) -> None:
    rollout = Sampler(make_environments(lambda: Returning(FLOATS, np.zeros(2, np.float32), reward), 1), 3)
    policy = Policy(FLOATS, spaces.Discrete(2), hidden=(4,))
    assert rollout(policy).reward.tolist() == [[float(reward)] * 3]


@pytest.mark.parametrize(
    "flag", [None, "False", np.nan, 2, -1, {}, np.array([True]), 1j, b"", [False]], ids=lambda x: repr(x)
)
def test_an_end_that_is_neither_true_nor_false_is_refused(flag: Any) -> None:
    """Cast to a bool, "False" would be an end, and None none."""
    with pytest.raises(UserError, match=r"step returned .* as terminated: fix it to return True or False") as raised:
        played(make_environments(lambda: Returning(FLOATS, np.zeros(2, np.float32), flag=flag), 2))
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("flag", [True, np.True_, 1, 1.0, np.array(True), torch.tensor(True)], ids=repr)
def test_an_end_may_be_a_number(flag: Any) -> None:
    rollout = Sampler(make_environments(lambda: Returning(FLOATS, np.zeros(2, np.float32), flag=flag), 1), 3)
    assert rollout(Policy(FLOATS, spaces.Discrete(2), hidden=(4,))).terminated.tolist() == [[True, False, True]]


@pytest.mark.parametrize("what", ["observation", "action"])
def test_a_space_without_numbers_is_refused(what: str) -> None:
    class Empty(Counting):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, f"{what}_space", spaces.Box(-1, 1, (0,)))

    with pytest.raises(UserError, match=rf"the {what} space Box\(.*\) holds no numbers"):
        Sampler(make_environments(Empty, 2), 4)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_infos_that_change_their_types_stop_nothing(vectorization: str) -> None:
    infos: Any = (
        {"x": 1, "y": np.zeros(2), "_x": 7, "final_obs": 3.0, 5: 1.0, "big": 10**400},
        {"x": "text", "y": np.zeros(3), "z": {"deep": 1}, "gone": None},
        {"x": np.float32(0.5), "y": [1, 2], "done": np.bool_(True), "not_finite": np.nan, "complex": 1j},
    )
    environments = make_environments(
        lambda: Returning(FLOATS, np.zeros(2, np.float32), 1.0, infos), 2, vectorization=vectorization
    )
    sampler = played(environments)
    environments.close()
    assert {name: x for name, x in sampler.stepping.metrics().items() if "info" in name} == {
        "info/x": 0.5,
        "info/done": 1.0,
    }


def test_an_info_that_is_no_dict_is_refused() -> None:
    with pytest.raises(UserError, match=r"the environment's info is \[1\]: .*return a dict"):
        played(make_environments(lambda: Returning(FLOATS, np.zeros(2, np.float32), 1.0, ([1],)), 2))


def test_an_info_that_gymnasium_cannot_batch_is_named_as_such() -> None:
    """In a vector environment of the user's, where nothing stands between."""
    infos: Any = ({"x": np.zeros(2)}, {"x": np.zeros(2)})
    one = lambda: Returning(FLOATS, np.zeros(2, np.float32), 1.0, infos)  # noqa: E731
    other = lambda: Returning(FLOATS, np.zeros(2, np.float32), 1.0, ({"x": np.zeros(3)},))  # noqa: E731
    with pytest.raises(UserError, match=r"info changes its types or shapes, and Gymnasium cannot batch it") as raised:
        played(make_environments(SyncVectorEnv([one, other])))
    assert len(str(raised.value)) <= 200


def test_the_seed_decides_what_the_spaces_sample() -> None:
    class Sampled(Counting):
        def reset(self, **options: Any) -> Any:
            super().reset(**options)
            return self.observation_space.sample(), {}

        def step(self, action: Any) -> Any:
            return np.array([self.action_space.sample(), 0], np.float32), *super().step(action)[1:]

    rows = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        environments = make_environments(Sampled, 2)
        policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,))
        rows.append(Sampler(environments, 12, seed=seed)(policy).obs)
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
