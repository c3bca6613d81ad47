"""Sampling environments of tensors is sampling them as arrays: the same rollouts, bit for bit, and statistics."""

import copy
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from modules import Wrapped
from probes import Counting, Known, limited
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import policygrad as pg
from policygrad.control import ObservationNormalizer, Policy, RewardScaler, Sampler, evaluate, make_environments
from policygrad.control.spaces import kept_of
from policygrad.control.tensors import TensorEnvironments
from policygrad.errors import NonFiniteError, Note, UserError

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")),
]


class Copies(VectorEnv):
    """Copies of an environment in arrays of NumPy, or in tensors on a device; seeded by one number."""

    def __init__(
        self, make: Callable[[], gymnasium.Env], count: int, mode: AutoresetMode, device: str | None = None
    ) -> None:
        self.inside, self.num_envs, self.to = SyncVectorEnv([make] * count, autoreset_mode=mode), count, device
        self.metadata = {"autoreset_mode": mode, "torch": device is not None}
        self.single_observation_space = self.inside.single_observation_space
        self.single_action_space = self.inside.single_action_space
        self.observation_space = batch_space(self.single_observation_space, count)
        self.action_space = batch_space(self.single_action_space, count)
        self.buffer: dict[int, Tensor] = {}

    def given(self, x: Any) -> Any:
        if self.to is None or not isinstance(x, np.ndarray) or x.dtype == object:
            return x
        return torch.from_numpy(x).to(self.to, copy=True)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        obs, info = self.inside.reset(seed=seed)
        return tree_map(self.given, obs), info

    def step(self, actions: Any) -> Any:
        if self.to is not None:
            assert all(isinstance(x, Tensor) and x.device.type == self.to for x in tree_leaves(actions))
            actions = tree_map(lambda x: x.cpu().numpy(), actions)
        assert self.action_space.contains(actions), actions
        obs, reward, terminated, truncated, info = self.inside.step(actions)
        if self.to is not None and "final_obs" in info:
            last = [x if x is not None else np.full_like(np.asarray(obs)[0], 7) for x in info["final_obs"]]
            info["final_obs"] = np.stack(last)
        info = {k: tree_map(self.given, x) for k, x in info.items()}
        return (*(tree_map(self.given, x) for x in (obs, reward, terminated, truncated)), info)


class Structured(Known):
    """Observations of several parts, one of them a mask, and a number in the info."""

    def __init__(self) -> None:
        super().__init__(spaces.MultiDiscrete([2, 3], start=[1, 0]))
        self.observation_space = spaces.Dict(
            action_mask=spaces.MultiBinary(5), place=spaces.Discrete(3, start=1), numbers=spaces.Box(-9, 9, (2, 2))
        )

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, {**info, "size": abs(reward), "is_success": reward > 0}

    def _obs(self) -> Any:
        self.obs = self.np_random.normal(size=3).astype(np.float32)
        mask = self.np_random.integers(0, 2, 5).astype(np.int8)
        mask[[0, 3]] = 1
        place = 1 + int(self.np_random.integers(3))
        return {"action_mask": mask, "place": place, "numbers": self.np_random.normal(size=(2, 2)).astype(np.float32)}


class Pixels(Known):
    """Images of integers."""

    def __init__(self) -> None:
        super().__init__(spaces.Discrete(3, start=4))
        self.observation_space = spaces.Box(0, 255, (4, 4, 1), np.uint8)

    def step(self, action: Any) -> Any:
        return self._obs(), float(action == 4), bool(self.np_random.random() < 0.2), False, {}

    def _obs(self) -> Any:
        return self.np_random.integers(0, 256, (4, 4, 1), dtype=np.uint8)


class Double(Known):
    """Observations in float64 and integers as actions."""

    def __init__(self) -> None:
        super().__init__(spaces.Box(-3, 3, (2,), np.int64))
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)

    def _obs(self) -> Any:
        return super()._obs().astype(np.float64) + 1e-9


class Hybrid(Known):
    """Actions of several parts, nested."""

    def __init__(self) -> None:
        part = spaces.Tuple([spaces.Box(-2, 2, (2, 2), np.float64), spaces.MultiBinary(2)])
        super().__init__(spaces.Dict(turn=spaces.Discrete(3, start=1), move=part))

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        return super().step(action["turn"] + action["move"][0].sum() - 3 * action["move"][1][0])


KINDS: dict[str, Callable[[], gymnasium.Env]] = {
    "box": Known,
    "structured": Structured,
    "pixels": Pixels,
    "double": Double,
    "hybrid": Hybrid,
}
NEXT, SAME = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP
OPTIONS: dict[str, dict[str, Any]] = {
    "segments": {},
    "whole episodes": {"whole_episodes": True},
    "one group": {"whole_episodes": True, "groups": "all"},
}


def samplers(kind: str, mode: AutoresetMode, device: str, normalized: bool = False, **options: Any) -> list[Sampler]:
    """A sampler of arrays, and one of tensors."""
    made = []
    for where in (None, device):
        environments = make_environments(Copies(limited(KINDS[kind], 6), 3, mode, where))
        space: Any = environments.single_observation_space
        statistics: dict[str, Any] = {}
        if normalized:
            statistics["observation_normalizer"] = ObservationNormalizer(space.shape, kept_of(space))
            statistics["reward_scaler"] = RewardScaler(3, 0.9)
        steps = 4 if options.get("whole_episodes") else 12
        made.append(Sampler(environments, steps, seed=3, device=device, **statistics, **options))
    assert isinstance(made[1].stepping.environments.unwrapped, TensorEnvironments)
    return made


def acting(sample: Sampler) -> Wrapped:
    torch.manual_seed(0)
    environments = sample.stepping.environments
    policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(8,))
    return Wrapped(policy).to(sample.device)


def assert_same(found: Any, expected: Any) -> None:
    """The same, and numbers that sums in another order make to their last digits."""
    for name in ("obs", "action", "logp", "reward", "terminated", "ended", "mask", "group", "final_obs"):
        for x, y in zip(*(tree_leaves(getattr(rollout, name)) for rollout in (found, expected)), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0, msg=name)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)


def assert_agree(tensors: Sampler, plain: Sampler, policy: nn.Module, rollouts: int) -> None:
    """So many rollouts of both, each with the same noise."""
    for seed in range(rollouts):
        torch.manual_seed(seed)
        expected = plain(policy)
        torch.manual_seed(seed)
        assert_same(tensors(policy), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_are_those_of_arrays(kind: str, options: str, device: str) -> None:
    plain, tensors = samplers(kind, NEXT, device, **OPTIONS[options])
    assert_agree(tensors, plain, acting(plain), 3)
    assert tensors.stepping.finished == plain.stepping.finished
    assert tensors.stepping.endings == plain.stepping.endings
    assert (tensors.steps, tensors.stepping.episodes) == (plain.steps, plain.stepping.episodes)
    assert tensors.stepping.episodes > 5


class Remembering(Policy):
    """Of another class, so that it acts by its distribution in every sampler."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [NEXT, SAME])
def test_so_are_those_of_a_policy_with_memory(mode: AutoresetMode, device: str) -> None:
    plain, tensors = samplers("box", mode, device)
    torch.manual_seed(0)
    spaces_ = (KINDS["box"]().observation_space, KINDS["box"]().action_space)
    policy = Remembering(*spaces_, hidden=(8,), memory="gru", memory_size=4).to(device)
    assert_agree(tensors, plain, policy, 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["box", "pixels", "double"])
def test_so_they_are_with_resets_in_the_same_step(kind: str, whole: bool, device: str) -> None:
    plain, tensors = samplers(kind, SAME, device, whole_episodes=whole)
    assert_agree(tensors, plain, acting(plain), 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["box", "structured", "double"])
def test_so_are_normalized_observations_and_scaled_rewards(kind: str, whole: bool, device: str) -> None:
    plain, tensors = samplers(kind, NEXT, device, normalized=True, whole_episodes=whole)
    policy = acting(plain)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = plain(policy)
        torch.manual_seed(seed)
        found = tensors(policy)
        for name in ("obs", "reward", "logp", "action"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    for one in ("observation_normalizer", "reward_scaler"):
        expected_state, found_state = (getattr(x.stepping, one).statistics.state_dict() for x in (plain, tensors))
        for name, x in expected_state.items():
            np.testing.assert_allclose(found_state[name], x, rtol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_goes_on_bit_for_bit(device: str) -> None:
    _, first = samplers("box", NEXT, device, normalized=True)
    policy = acting(first)
    first(policy)
    state = copy.deepcopy(first.state_dict())
    assert all(x.device.type == "cpu" for x in state.values() if isinstance(x, Tensor))
    _, second = samplers("box", NEXT, device, normalized=True)
    second.load_state_dict(state)
    again = second.state_dict()
    for name, x in state.items():
        assert torch.equal(again[name], x) if isinstance(x, Tensor) else True, name
    torch.manual_seed(1)
    rollout = second(policy)
    assert rollout.metrics["steps"] > first.steps, "new episodes, and the counts go on"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stochastic", [False, True])
def test_evaluations_are_those_of_arrays(stochastic: bool, device: str) -> None:
    found = []
    for where in (None, device):
        environments = Copies(limited(Structured, 6), 3, NEXT, where)
        made = make_environments(environments)
        torch.manual_seed(0)
        policy = Wrapped(Policy(made.single_observation_space, made.single_action_space, hidden=(8,))).to(device)
        found.append(evaluate(policy, environments, 7, seed=5, stochastic=stochastic, max_steps=6, device=device))
    assert found[0] == found[1]
    assert found[0].success is not None


def test_gymnasiums_own_cartpole_is_the_same_by_dlpack() -> None:
    torch.manual_seed(0)
    policy = Wrapped(Policy(CartPoleVectorEnv(1).single_observation_space, spaces.Discrete(2), hidden=(8,)))
    rollouts = []
    for environments in (CartPoleVectorEnv(4), TensorEnvironments(CartPoleVectorEnv(4))):
        torch.manual_seed(1)
        rollouts.append(Sampler(environments, 64, seed=0)(policy))
    assert_same(rollouts[1], rollouts[0])
    assert rollouts[0].metrics["episodes"] > 4


class Robots(gymnasium.Env):
    """Isaac Lab's interface: copies in one object, tensors in a dict, resets in the same step, buffers used again.

    A point on a line is to come to 0; its episodes are cut after `length` steps and end beyond 4.
    """

    def __init__(self, count: int = 8, length: int = 12, device: str = "cpu") -> None:
        self.num_envs, self.max_episode_length, self.device = count, length, device
        self.single_observation_space = spaces.Dict(
            policy=spaces.Box(-np.inf, np.inf, (1,)), critic=spaces.Box(-np.inf, np.inf, (2,))
        )
        self.single_action_space = spaces.Box(-np.inf, np.inf, (1,))
        self.observation_space = batch_space(self.single_observation_space, count)
        self.action_space = batch_space(self.single_action_space, count)
        self.x, self.t = torch.zeros(count, device=device), torch.zeros(count, device=device, dtype=torch.long)
        self.buffer = {name: torch.zeros(count, n, device=device) for name, n in (("policy", 1), ("critic", 2))}
        self.generator = torch.Generator(device)
        self.before: list[Tensor] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        if seed is not None:
            self.generator.manual_seed(seed)
        self._begin(torch.ones_like(self.x, dtype=torch.bool))
        return self._obs(), {}

    def step(self, action: Tensor) -> Any:
        assert action.shape == (self.num_envs, 1)
        assert action.device.type == torch.device(self.device).type
        self.before.append(self._obs()["policy"].clone())
        self.x += 0.5 * action[:, 0].clamp(-1, 1)
        self.t += 1
        reward, terminated, truncated = -self.x.abs(), self.x.abs() > 4, self.t >= self.max_episode_length
        self._begin(terminated | truncated)
        return self._obs(), reward, terminated, truncated, {"log": {"mean": 0.0}}

    def _begin(self, which: Tensor) -> None:
        start = 4 * torch.rand(self.num_envs, generator=self.generator, device=self.device) - 2
        self.x, self.t = torch.where(which, start, self.x), self.t.where(~which, 0)

    def _obs(self) -> dict[str, Tensor]:
        self.buffer["policy"].copy_(self.x.unsqueeze(1))
        self.buffer["critic"].copy_(torch.stack([self.x, self.t.float()], 1))
        return self.buffer


@pytest.mark.parametrize("device", DEVICES)
def test_isaac_labs_interface_is_learned_from(device: str) -> None:
    options: dict[str, Any] = {"policy_keys": ("policy",), "hidden": (16,), "gamma": 0.9, "device": device}
    with pytest.warns(Note, match="last observation but one"):
        run = pg.train(
            "ppo", Robots(64, device=device), num_steps=12, steps=40_000, learning_rate=3e-3, progress=False, **options
        )
    assert run.options.num_envs == 64
    assert run.metrics[-1]["length"] == pytest.approx(12, abs=0.5)
    assert run.metrics[-1]["return"] > 0.6 * run.metrics[1]["return"], "rewards are below 0"
    x = torch.tensor([1.5])
    assert run.act({"policy": x.numpy(), "critic": np.array([1.5, 0.0], np.float32)})[0] < -0.5


def test_without_the_last_observation_it_is_the_one_before() -> None:
    robots = Robots(3, length=4)
    environments = make_environments(robots)
    torch.manual_seed(0)
    policy = Policy(environments.single_observation_space, robots.single_action_space)
    with pytest.warns(Note):
        rollout = Sampler(environments, 10, seed=0)(policy)
    assert rollout.mask[0].tolist() == [True] * 4 + [False] + [True] * 4 + [False]
    before = torch.stack(robots.before, 1)
    space: Any = environments.single_observation_space
    seen = space.parts(rollout.obs)["policy"]
    torch.testing.assert_close(seen[:, :4], before[:, :4], msg="buffers that are used again change nothing")
    torch.testing.assert_close(seen[:, 4], before[:, 3])
    torch.testing.assert_close(seen[:, 5:9], before[:, 4:8])
    assert not rollout.terminated.any()


@pytest.fixture(scope="module")
def cartpole() -> str:
    pytest.importorskip("flax")  # of gymnasium[jax]
    return "phys2d/CartPole-v1"


class InNumpy(VectorWrapper):
    """Arrays of JAX as NumPy's."""

    def reset(self, **options: Any) -> Any:
        return np.asarray(self.env.reset(**options)[0]), {}

    def step(self, actions: Any) -> Any:
        return *(np.asarray(x) for x in self.env.step(actions)[:4]), {}


def test_a_jax_environment_is_the_same_by_dlpack_and_by_numpy(cartpole: str) -> None:
    torch.manual_seed(0)
    rollouts = []
    policy = Wrapped(Policy(spaces.Box(-np.inf, np.inf, (4,)), spaces.Discrete(2), hidden=(8,)))
    for convert in (InNumpy, TensorEnvironments):
        torch.manual_seed(1)
        environments = convert(gymnasium.make_vec(cartpole, num_envs=4))
        sample = Sampler(environments, 40, seed=0)
        rollouts.append(sample(policy))
    assert_same(rollouts[1], rollouts[0])
    assert rollouts[0].metrics["episodes"] > 3


@pytest.mark.parametrize("task", ["phys2d/CartPole-v1", "phys2d/Pendulum-v0"])
@pytest.mark.usefixtures("cartpole")
def test_an_id_of_jax_trains_without_a_word(task: str) -> None:
    run = pg.train("ppo", task, num_envs=4, num_steps=16, minibatch_size=32, iterations=2, progress=False)
    assert isinstance(run.world.environments.unwrapped, TensorEnvironments)  # type: ignore[union-attr]
    assert run.evaluate(2).length_mean > 5


# Errors


def broken(change: Callable[[list[Any]], Any], device: str = "cpu") -> Sampler:
    class Changed(Copies):
        def step(self, actions: Any) -> Any:
            found = list(super().step(actions))
            change(found)
            return tuple(found)

    return Sampler(make_environments(Changed(limited(Known, 6), 3, NEXT, device)), 4, seed=0)


def put(i: int, value: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    return lambda found: found.__setitem__(i, value(found[i]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (put(0, lambda x: x.masked_fill(torch.ones_like(x, dtype=torch.bool), torch.nan)), "0 of 3 .* NaN or infinite"),
        (put(0, lambda x: x[:, :2]), r"observations of shape \(3, 2\), not \(3, 3\)"),
        (put(1, lambda x: x.unsqueeze(1)), r"rewards of shape \(3, 1\), not \(3,\)"),
        (put(1, lambda x: x.double() * 1e300), r"a reward of .*beyond float32"),
        (put(2, lambda x: x.unsqueeze(1)), r"terminated of shape \(3, 1\), not \(3,\)"),
        (put(3, lambda x: [False] * 3), r"returned a list where a tensor was expected"),
    ],
    ids=["nan", "shape", "rewards", "overflow", "flags", "list"],
)
def test_what_is_wrong_is_said_in_one_line(change: Any, said: str) -> None:
    sample = broken(change)
    with pytest.raises(UserError, match=said) as raised:
        sample(acting(sample))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


def test_an_action_that_is_not_finite_is_the_policys() -> None:
    sample = Sampler(make_environments(Copies(limited(Known, 6), 3, NEXT, "cpu")), 4, seed=0)
    policy = acting(sample)
    with torch.no_grad():
        next(iter(policy.parameters())).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="the policy's"):
        sample(policy)


def test_masks_are_checked() -> None:
    class NoneAllowed(Structured):
        def _obs(self) -> Any:
            return {**super()._obs(), "action_mask": np.array([0, 0, 1, 1, 1], np.int8)}

    sample = Sampler(make_environments(Copies(limited(NoneAllowed, 6), 3, NEXT, "cpu")), 4, seed=0)
    with pytest.raises(UserError, match="environment 0 of 3 allows no action in part 0"):
        sample(acting(sample))


def test_same_step_resets_need_the_last_observations() -> None:
    class Lost(Copies):
        def step(self, actions: Any) -> Any:
            *found, _ = super().step(actions)
            return (*found, {})

    sample = Sampler(make_environments(Lost(limited(Counting, 2), 3, SAME, "cpu")), 6, seed=0)
    with pytest.raises(UserError, match=r"without final_obs in its info: add the last observations of all"):
        sample(acting(sample))


@pytest.mark.parametrize("method", ["reinforce", "ppo", "trpo"])
def test_methods_learn_from_structured_actions(method: str) -> None:
    how: Any = {"episode_steps": 6} if method == "reinforce" else {"num_steps": 16}
    environments = Copies(limited(Hybrid, 6), 4, SAME, "cpu")
    run = pg.train(method, environments, num_envs=4, iterations=2, progress=False, preset="none", **how)
    taken = run.act(np.zeros(3, np.float32))
    assert Hybrid().action_space.contains(taken)
