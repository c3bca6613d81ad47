"""The sampler: what a row contains, what counts, groups, and the same rollout for both ways of resetting."""

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from modules import Wrapped
from probes import GAMMA, Counting, Known, Potential, limited
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

from policygrad import ranks
from policygrad.advantages import gae
from policygrad.control import ObservationNormalizer, Policy, RewardScaler, Sampler, make_environments
from policygrad.control.sampler import next_step_layout
from policygrad.critics import bootstrap_values
from policygrad.errors import NonFiniteError, UserError
from policygrad.returns import trajectory_return
from policygrad.rollout import Rollout

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
COLUMNS = ("obs", "action", "logp", "reward", "terminated", "ended", "mask", "final_obs")


class ValueOf(nn.Module):
    """A critic that is a function of the observation."""

    def __init__(self, value: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.value = value

    def forward(self, obs: Tensor) -> Tensor:
        return self.value(obs)


def vector(*makers: Callable[[], gymnasium.Env], mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> VectorEnv:
    return SyncVectorEnv(list(makers), autoreset_mode=mode)


def sampled(environments: VectorEnv, steps: int, **options: Any) -> tuple[Sampler, Callable[[], Rollout]]:
    policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(8,))
    sampler = Sampler(environments, steps, **options)
    return sampler, lambda: sampler(policy)


def test_a_row_holds_episodes_one_after_the_other_with_a_masked_step_where_the_environment_resets() -> None:
    sampler, sample = sampled(vector(Counting), 9)
    rollout = sample()
    expected = [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]
    assert rollout.obs.tolist() == [expected]
    assert rollout.mask.int().tolist() == [[1, 1, 0, 1, 1, 1, 0, 1, 1]]
    assert rollout.reward.tolist() == [[1, 2, 0, 1, 2, 3, 0, 1, 2]]
    assert rollout.terminated.int().tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 1]]
    assert rollout.ended.int().tolist() == [[0, 1, 1, 0, 0, 1, 1, 0, 1]]  # nothing is carried over a reset either
    assert trajectory_return(rollout.reward, rollout.ended, 0.5).tolist() == [[2, 2, 0, 2.75, 2.75, 2.75, 0, 2, 2]]
    assert rollout.final_obs.tolist() == [[2, 2]], "the row stops where an episode ends: that is its last observation"
    assert rollout.memoryless
    assert rollout.group.tolist() == [0]
    assert sampler.stepping.steps == 7


def test_the_next_rollout_goes_on_where_the_last_one_stopped() -> None:
    _, one = sampled(vector(Counting, Counting), 24)
    _, three = sampled(vector(Counting, Counting), 8)
    whole, parts = one(), [three() for _ in range(3)]
    for name in ("obs", "mask", "reward", "terminated", "ended"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts], 1)), name
    for part, following in pairwise(parts):
        assert torch.equal(part.final_obs, following.obs[:, 0])


@pytest.mark.parametrize("mode", MODES)
def test_the_observation_after_a_step_is_its_true_successor(mode: AutoresetMode) -> None:
    lengths = [(2, 3), (1,), (4, 1, 2)]
    _, sample = sampled(vector(*[lambda x=x: Counting(x) for x in lengths], mode=mode), 7)
    for _ in range(3):
        rollout = sample()
        following = torch.cat([rollout.obs[:, 1:], rollout.final_obs.unsqueeze(1)], 1)
        step = torch.tensor([0.0, 1.0])
        assert torch.equal(following[rollout.mask], rollout.obs[rollout.mask] + step)


def test_return_and_length_are_the_means_of_the_episodes_that_ended() -> None:
    sampler, sample = sampled(vector(Counting), 9)
    found = sample().metrics
    assert found.pop("reward_per_step") == pytest.approx((3 + 6 + 3) / 7)
    assert found == {"steps": 7, "episodes": 3, "return": (3 + 6 + 3) / 3, "length": (2 + 3 + 2) / 3}
    metrics = sample().metrics  # episode 3, of 3 steps; 4, of 2; and the first step of 5
    assert metrics.pop("reward_per_step") == pytest.approx((6 + 3 + 1) / 6)
    assert metrics == {"steps": 13, "episodes": 5, "return": (3 + 6 + 3 + 6 + 3) / 5, "length": 12 / 5}
    assert [x for x, _ in sampler.stepping.finished] == [3, 6, 3, 6, 3]


def test_there_is_no_return_before_an_episode_has_ended() -> None:
    _, sample = sampled(vector(lambda: Counting((9,))), 4)
    assert sample().metrics == {"steps": 4, "episodes": 0, "reward_per_step": (1 + 2 + 3 + 4) / 4}


@pytest.mark.parametrize("whole", [False, True])
def test_same_step_and_next_step_resets_give_the_same_rollout(whole: bool) -> None:
    makers = [lambda x=x: Counting(x) for x in [(2, 3), (5,), (1, 4)]]
    rollouts = []
    for mode in MODES:
        torch.manual_seed(0)
        _, sample = sampled(vector(*makers, mode=mode), 6, whole_episodes=whole)
        rollouts.append(sample())
    real = rollouts[0].mask
    for name in ("obs", "mask", "reward", "terminated", "ended"):
        a, b = (getattr(rollout, name) for rollout in rollouts)
        assert torch.equal(a[real], b[real]), name
    assert torch.equal(rollouts[0].mask, rollouts[1].mask)
    critic = ValueOf(lambda obs: (obs * torch.tensor([0.3, 0.7])).sum(-1))
    a, b = (
        gae(r.reward, bootstrap_values(critic, r), r.terminated, r.ended, 0.9, 0.8).where(real, 0.0) for r in rollouts
    )
    assert torch.equal(a, b)


def test_a_same_step_row_that_stops_at_an_end_keeps_the_final_observation() -> None:
    _, sample = sampled(vector(lambda: Counting((3,)), mode=AutoresetMode.SAME_STEP), 3)
    assert sample().final_obs.tolist() == [[0, 3]]


def test_same_step_resets_do_not_count_what_did_not_fit_the_row() -> None:
    sampler, sample = sampled(vector(lambda: Counting((1,)), mode=AutoresetMode.SAME_STEP), 6)
    rollout = sample()
    assert rollout.mask.int().tolist() == [[1, 0, 1, 0, 1, 0]]
    assert sampler.stepping.steps == 3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("steps", [3, 5, 12])
def test_a_time_limit_is_not_an_end_of_value(mode: AutoresetMode, whole: bool, steps: int, float64: None) -> None:
    """Constant reward 1 and V = 1 / (1 - gamma), episodes cut at 5: every advantage is 0 (SB3 #658, CleanRL #198)."""

    class Constant(Potential):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 1.0, *rest

    _, sample = sampled(vector(*[limited(Constant, 5)] * 2, mode=mode), steps, whole_episodes=whole)
    critic = ValueOf(lambda obs: torch.full(obs.shape[:2], 1 / (1 - GAMMA)))
    for _ in range(2):
        rollout = sample()
        value = bootstrap_values(critic, rollout)
        for lam in (0.0, 0.5, 1.0):
            advantage = gae(rollout.reward, value, rollout.terminated, rollout.ended, GAMMA, lam)
            assert (advantage[rollout.mask] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("steps", [3, 5, 12])
def test_the_bootstrap_at_a_time_limit_is_the_value_of_the_state_before_the_reset(
    mode: AutoresetMode, whole: bool, steps: int, float64: None
) -> None:
    """r = V(s) - gamma V(s'): any other state in the place of s' gives an advantage (TorchRL #3771)."""
    _, sample = sampled(vector(limited(Potential, 5), limited(Potential, 4), mode=mode), steps, whole_episodes=whole)
    critic = ValueOf(lambda obs: obs[..., 0] + 1)
    for _ in range(3):
        rollout = sample()
        value = bootstrap_values(critic, rollout)
        for lam in (0.0, 0.5, 1.0):
            advantage = gae(rollout.reward, value, rollout.terminated, rollout.ended, GAMMA, lam)
            assert (advantage[rollout.mask] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_bootstrap_is_right_when_whole_episodes_all_end_together(mode: AutoresetMode, float64: None) -> None:
    _, sample = sampled(vector(*[limited(Potential, 5)] * 2, mode=mode), 12, whole_episodes=True)
    rollout = sample()
    value = bootstrap_values(ValueOf(lambda obs: obs[..., 0] + 1), rollout)
    advantage = gae(rollout.reward, value, rollout.terminated, rollout.ended, GAMMA, 0.9)
    assert (advantage[rollout.mask] == 0).all()


def test_a_truncated_row_is_its_two_episodes_estimated_apart(float64: None) -> None:
    critic = ValueOf(lambda obs: obs @ torch.tensor([0.3, 0.7]))

    def advantages(rollout: Rollout) -> Tensor:
        value = bootstrap_values(critic, rollout)
        return gae(rollout.reward, value, rollout.terminated, rollout.ended, 0.9, 0.8)[rollout.mask]

    _, both = sampled(vector(lambda: Counting((2, 3), (True,))), 6)
    _, single = sampled(vector(lambda: Counting((2, 3), (True,))), 4, whole_episodes=True)
    torch.testing.assert_close(advantages(both()), torch.cat([advantages(single()), advantages(single())]))


def test_whole_episodes_are_one_to_a_row_and_masked_after_their_end() -> None:
    sampler, sample = sampled(vector(lambda: Counting((2,)), lambda: Counting((4,))), 9, whole_episodes=True)
    rollout = sample()
    assert rollout.mask.int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert rollout.reward.sum(1).tolist() == [3, 10]
    assert rollout.obs[:, 0].tolist() == [[0, 0], [0, 0]]
    assert (rollout.ended & rollout.mask).sum(1).tolist() == [1, 1]
    assert (sampler.stepping.steps, sampler.stepping.episodes) == (6, 2)


def test_an_episode_cut_at_the_longest_that_it_may_be_counts_among_the_returns() -> None:
    environments = vector(lambda: Counting((9,)), lambda: Counting((2, 9)), lambda: Counting((4,)))
    sampler, sample = sampled(environments, 4, whole_episodes=True)
    metrics = sample().metrics
    assert sorted(sampler.stepping.finished) == [(3.0, 2), (10.0, 4), (10.0, 4)]
    assert (metrics["episodes"], metrics["length"]) == (3, pytest.approx(10 / 3))
    assert sample().metrics["episodes"] == 6


def test_whole_episodes_start_anew_in_every_rollout() -> None:
    _, sample = sampled(vector(lambda: Counting((9,))), 4, whole_episodes=True)
    assert [sample().obs[0, 0, 1].item() for _ in range(3)] == [0, 0, 0]


def test_whole_episodes_stop_stepping_once_all_have_ended() -> None:
    class Counted(VectorWrapper):
        steps = 0

        def step(self, action: Any) -> Any:
            self.steps += 1
            return super().step(action)

    environments = Counted(vector(lambda: Counting((2,)), lambda: Counting((4,))))
    _, sample = sampled(environments, 1000, whole_episodes=True)
    rollout = sample()
    assert environments.steps == 4
    assert rollout.obs.shape == (2, 5, 2), "the longest episode and its final observation"
    assert rollout.action.shape == rollout.logp.shape == (2, 5)


def test_returns_are_reported_unscaled() -> None:
    _, sample = sampled(vector(Counting), 9, reward_scaler=RewardScaler(1, 0.9))
    rollout = sample()
    assert rollout.metrics["return"] == 4
    assert rollout.reward[rollout.mask].tolist() != [1, 2, 1, 2, 3, 1, 2]


def test_the_logp_is_of_the_action_that_is_stored_and_not_of_the_one_that_was_clipped() -> None:
    environments = make_environments(Known, 2)
    policy = Policy(environments.single_observation_space, environments.single_action_space, initial_log_std=1.0)
    rollout = Sampler(environments, 32, seed=0)(policy)
    assert (rollout.action.abs() > 1).any()
    logp = policy(rollout.obs).log_prob(rollout.action)
    torch.testing.assert_close(logp.where(rollout.mask, 0.0), rollout.logp, rtol=1e-5, atol=1e-5)


def test_dropout_is_off_so_that_the_policy_scored_is_the_one_that_sampled() -> None:
    environments = vector(Counting)
    inner = Policy(environments.single_observation_space, environments.single_action_space)
    inner.network.insert(1, nn.Dropout(0.5))
    rollout = Sampler(environments, 9)(inner)
    logp = inner(rollout.obs).log_prob(rollout.action)
    torch.testing.assert_close(logp[rollout.mask], rollout.logp[rollout.mask], rtol=1e-6, atol=1e-6)


def test_the_same_seed_samples_the_same_rollout() -> None:
    rollouts = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        _, sample = sampled(make_environments(limited(Known, 8), 3), 16, seed=seed)
        rollouts.append([sample(), sample()])
    for a, b, other in zip(*rollouts, strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)
        assert not torch.equal(a.obs, other.obs)


def test_rollouts_are_float64_where_that_is_the_default(float64: None) -> None:
    _, sample = sampled(make_environments(limited(Known, 8), 1), 4)
    rollout = sample()
    assert {getattr(rollout, name).dtype for name in ("obs", "reward", "logp", "final_obs")} == {torch.float64}


class Poisoned(nn.Module):
    """A policy whose numbers are NaN: all of them, or those of one environment's decisions after its first episode."""

    def __init__(self, make: Callable[[Tensor], Any], only_masked: bool = False) -> None:
        super().__init__()
        self.make, self.only_masked, self.calls = make, only_masked, 0

    def forward(self, obs: Tensor) -> Any:
        self.calls += 1
        x = torch.zeros(*obs.shape[:2], 2)
        if not self.only_masked:
            x[-1] = torch.nan
        elif self.calls > 2:
            x[0] = torch.nan
        distribution = self.make(x)
        distribution.to_environment = lambda action: np.zeros(len(action), dtype=np.int64)
        return distribution


def normal(x: Tensor) -> Independent:
    return Independent(Normal(x, 1.0, validate_args=False), 1)


class Blind(Normal):
    """Its log-probability does not show that the action is NaN."""

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


class Careless(Categorical):
    """Its actions are numbers, and only the log-probability is NaN."""

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.zeros(self.batch_shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (normal, "action"),
        (lambda x: Independent(Blind(x, 1.0, validate_args=False), 1), "action"),
        (lambda x: Categorical(logits=x, validate_args=False), "probability"),
        (lambda x: Careless(logits=x, validate_args=False), "log-probability"),
    ],
    ids=["gaussian", "blind", "categorical", "careless"],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_policy_that_is_nan_is_named_before_the_environment_sees_it(make: Any, said: str, whole: bool) -> None:
    stepped = []

    class Seen(Counting):
        def step(self, action: Any) -> Any:
            stepped.append(action)
            return super().step(action)

    sampler = Sampler(vector(Seen, Seen), 8, whole_episodes=whole)
    at = f"the policy's {said} is not finite for environment 1 of 2: try a lower learning_rate"
    with pytest.raises(NonFiniteError, match=at) as raised:
        sampler(Poisoned(make))
    assert not stepped
    assert raised.value.evidence["obs"].shape[0] == raised.value.evidence["mask"].shape[0] == 2


def test_a_policy_may_be_nan_where_nothing_counts() -> None:
    environments = vector(lambda: Counting((2,)), lambda: Counting((4,)))
    rollout = Sampler(environments, 4, whole_episodes=True)(Poisoned(normal, only_masked=True))
    assert rollout.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("steps", [0, -3])
def test_a_rollout_has_at_least_one_step(steps: int) -> None:
    with pytest.raises(UserError, match="steps"):
        Sampler(vector(Counting), steps)


class Recording(Known):
    """Remembers the actions that arrive."""

    def __init__(self, actions: spaces.Space) -> None:
        super().__init__(actions)
        self.seen: list[Any] = []

    def step(self, action: Any) -> Any:
        self.seen.append(np.array(action))
        return super().step(action)


@pytest.mark.parametrize("wrap", [lambda x: x, Wrapped], ids=["policy", "wrapped"])
def test_a_squashed_action_arrives_squashed_through_any_wrapper(wrap: Callable[[nn.Module], nn.Module]) -> None:
    environment = Recording(spaces.Box(-2.0, 2.0, (1,), np.float32))
    of = (environment.observation_space, environment.action_space)
    policy = Policy(*of, distribution="squashed", initial_log_std=-20.0)
    with torch.no_grad():
        policy.network[-1].weight.zero_()  # type: ignore[operator, union-attr]
        policy.network[-1].bias.fill_(0.5)  # type: ignore[operator, union-attr]
    rollout = Sampler(vector(lambda: environment), 3)(wrap(policy))
    np.testing.assert_allclose(rollout.action, 0.5, rtol=1e-6)
    np.testing.assert_allclose(environment.seen, 0.924234, rtol=1e-6)  # 2 tanh(0.5)


class Plain(nn.Module):
    """A policy of the user's own, with torch's distributions."""

    def __init__(self, make: Callable[[Tensor], Any], size: int) -> None:
        super().__init__()
        self.make, self.net = make, nn.Linear(3, size)

    def forward(self, obs: Tensor) -> Any:
        return self.make(self.net(obs))


@pytest.mark.parametrize(
    ("space", "make", "size"),
    [
        (spaces.Discrete(3, start=5), lambda x: Categorical(logits=x), 3),
        (spaces.Discrete(2, start=5), lambda x: Bernoulli(logits=x.squeeze(-1)), 1),
        (spaces.Box(-0.1, 0.1, (2, 2), np.float32), lambda x: Independent(Normal(x, 1.0), 1), 4),
    ],
    ids=["shifted", "coin", "clipped"],
)
def test_an_action_of_a_plain_distribution_is_mapped_by_the_space(space: Any, make: Any, size: int) -> None:
    environment = Recording(space)
    rollout = Sampler(vector(lambda: environment), 64)(Plain(make, size))
    assert all(space.contains(x) for x in environment.seen)
    stored = rollout.action[rollout.mask].reshape(-1, *space.shape)
    expected = stored + space.start if isinstance(space, spaces.Discrete) else stored.clamp(-0.1, 0.1)
    np.testing.assert_array_equal(np.stack(environment.seen), expected.numpy())


class Image(Counting):
    """Counting, as a picture."""

    def __init__(self, dtype: Any = np.uint8) -> None:
        super().__init__((3, 5))
        self.observation_space = spaces.Box(0, 255, (4, 4, 1), dtype)

    def _obs(self) -> np.ndarray:
        pixels = np.random.default_rng([self.episode, self.t]).integers(256, size=(4, 4, 1))
        images = self.observation_space.dtype == np.uint8
        return pixels.astype(np.uint8) if images else pixels.astype(np.float32) / np.float32(255)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("whole", [False, True])
def test_images_stay_uint8_and_give_the_same_rollout_as_floats(mode: AutoresetMode, whole: bool) -> None:
    rollouts = []
    for dtype in (np.uint8, np.float32):
        torch.manual_seed(0)
        environments = vector(*[lambda dtype=dtype: Image(dtype)] * 2, mode=mode)
        space = environments.single_observation_space
        policy = Policy(space, environments.single_action_space, orthogonal=False, encoder="flat")
        rollouts.append(Sampler(environments, 9, whole_episodes=whole)(policy))
        if dtype == np.uint8:
            logp = policy(rollouts[0].obs).log_prob(rollouts[0].action)
            torch.testing.assert_close(logp.where(rollouts[0].mask, 0.0), rollouts[0].logp)
    images, floats = rollouts
    assert (images.obs.dtype, images.final_obs.dtype) == (torch.uint8, torch.uint8)
    assert floats.obs.dtype == torch.float32
    assert images.obs.unique().numel() > 50
    assert torch.equal(images.obs.float() / 255, floats.obs)
    assert torch.equal(images.final_obs.float() / 255, floats.final_obs)
    for name in ("action", "logp", "reward", "mask"):
        assert torch.equal(getattr(images, name), getattr(floats, name)), name


def test_state_numbers_stay_integers() -> None:
    class Numbered(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = spaces.Discrete(9, start=2)

        def _obs(self) -> Any:
            return 2 + self.t

    _, sample = sampled(vector(Numbered), 4)
    assert sample().obs.tolist() == [[2, 3, 4, 2]]
    assert sample().obs.dtype == torch.int64


class Recurrent(nn.Module):
    def __init__(self, features: int = 3) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(features, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.head(self.cell(obs)[0]))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_policy_with_memory_is_refused(whole: bool, count: int) -> None:
    with pytest.raises(UserError, match=r"^the policy's output at a step depends on other steps of its row"):
        Sampler(vector(*[Counting] * count), 6, whole_episodes=whole)(Recurrent(2))


def test_sampling_with_a_seed_draws_nothing_from_the_global_generators() -> None:
    environments = vector(lambda: Counting((9,)))
    policy = Policy(environments.single_observation_space, environments.single_action_space)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    Sampler(environments, 4, seed=0)(policy)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_sampling_with_a_seed_does_not_even_borrow_the_generator_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that learns may draw at any time, and a state that is put back would undo its draw."""
    environments = make_environments("CartPole-v1", num_envs=2)
    for whole in (False, True):
        sample = Sampler(environments, steps=20, seed=0, whole_episodes=whole)
        policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(4,))
        with monkeypatch.context() as patched:
            for name in ("get_rng_state", "set_rng_state", "fork_rng"):
                patched.setattr(torch.random, name, lambda *_, **__: pytest.fail("it was borrowed"))
                patched.setattr(torch, name, lambda *_, **__: pytest.fail("it was borrowed"), raising=False)
            sample(policy)
            if whole:
                sample.play(policy)


def test_sampling_draws_from_the_random_stream_only_what_a_policy_of_ones_own_draws() -> None:
    environments = vector(lambda: Counting((9,)))
    policy = nn.Sequential(Policy(environments.single_observation_space, environments.single_action_space))
    sample = Sampler(environments, 4, seed=0)
    torch.manual_seed(1)
    rollout = sample(policy)
    after = torch.rand(1)
    torch.manual_seed(1)
    for t in range(4):
        policy(rollout.obs[:, t : t + 1]).sample()
    assert torch.equal(torch.rand(1), after)


def test_without_a_seed_the_generator_of_torch_decides() -> None:
    def actions(seed: int) -> Tensor:
        environments = make_environments("CartPole-v1", 2)
        torch.manual_seed(seed)
        policy = Policy(environments.single_observation_space, environments.single_action_space)
        return Sampler(environments, 32)(policy).action

    assert torch.equal(actions(0), actions(0))
    assert not torch.equal(actions(0), actions(1))


def test_a_state_dict_holds_the_noise_of_the_actions() -> None:
    sampler, sample = sampled(make_environments(limited(Known, 8), 2), 16, seed=3)
    sample()
    other, _ = sampled(make_environments(limited(Known, 8), 2), 16, seed=4)
    other.load_state_dict(sampler.state_dict())
    assert other.noise.standard_normal(3).tolist() == sampler.noise.standard_normal(3).tolist()


def test_the_columns_do_not_share_memory_with_the_next_rollout() -> None:
    _, sample = sampled(make_environments(limited(Known, 8), 2), 4)
    first = sample()
    before = {name: getattr(first, name).clone() for name in COLUMNS}
    sample()
    assert all(torch.equal(getattr(first, name), x) for name, x in before.items())


@pytest.mark.parametrize(("groups", "expected"), [(None, [0, 1, 2, 3]), ("all", [0, 0, 0, 0]), (2, [0, 0, 1, 1])])
def test_rows_are_grouped(groups: Any, expected: list[int]) -> None:
    environments = vector(*[limited(Known, 8)] * 4)
    _, sample = sampled(environments, 8, seed=0, whole_episodes=True, groups=groups)
    rollout = sample()
    assert rollout.group.tolist() == expected
    start = rollout.obs[:, 0]
    same = (start.unsqueeze(1) == start).all(-1)
    own = rollout.group.unsqueeze(1) == rollout.group
    assert torch.equal(same, own if groups == 2 else torch.eye(4, dtype=torch.bool))


def test_the_rollouts_of_groups_follow_from_the_seed_and_the_state() -> None:
    def new() -> tuple[Sampler, Callable[[], Rollout]]:
        torch.manual_seed(0)
        return sampled(vector(*[limited(Known, 8)] * 4), 8, seed=3, whole_episodes=True, groups=2)

    first, sample = new()
    sample()
    state, random = first.state_dict(), torch.get_rng_state()
    expected = sample()
    second, again = new()
    second.load_state_dict(state)
    torch.set_rng_state(random)
    found = again()
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in COLUMNS)
    assert found.metrics == expected.metrics


@pytest.mark.parametrize(
    ("groups", "std", "flat"), [("all", np.std([6, 6, 3, 10], ddof=1), 0), (2, np.std([3, 10], ddof=1) / 2, 0.5)]
)
def test_the_metrics_of_groups_are_the_spread_of_their_returns(groups: Any, std: float, flat: float) -> None:
    lengths = [(3,), (3,), (2,), (4,)]
    environments = vector(*[lambda x=x: Counting(x) for x in lengths])
    _, sample = sampled(environments, 4, whole_episodes=True, groups=groups)
    metrics = sample().metrics
    assert (metrics["group_std"], metrics["flat_groups"]) == (pytest.approx(std, rel=1e-12), flat)


def test_rows_of_their_own_have_no_spread() -> None:
    _, sample = sampled(vector(Counting, Counting), 4, whole_episodes=True)
    assert not {"group_std", "flat_groups"} & sample().metrics.keys()


def test_equal_returns_that_are_not_exact_are_flat() -> None:
    class Tenths(Counting):
        def step(self, action: Any) -> Any:
            obs, _, *rest = super().step(action)
            return obs, 0.1, *rest

    environments = vector(*[lambda: Tenths((3,))] * 3)
    _, sample = sampled(environments, 4, whole_episodes=True, groups="all")
    metrics = sample().metrics
    assert (metrics["group_std"], metrics["flat_groups"]) == (0, 1)


@pytest.mark.parametrize(
    ("groups", "options", "said"),
    [
        (3, {"whole_episodes": True}, "divides the 4 environments"),
        (0, {"whole_episodes": True}, "groups is 0"),
        ("each", {}, "groups is 'each'"),
        (2, {}, "whole_episodes=True"),
        ("all", {}, "compares the returns of episodes: it needs whole_episodes=True"),
    ],
)
def test_groups_that_cannot_be_made_are_refused(groups: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampler(vector(*[Counting] * 4), 4, groups=groups, **options)


def test_what_is_no_vector_environment_is_named() -> None:
    """In a process of its own, for the tests' type checker would refuse it first."""
    code = """
import gymnasium
from policygrad.control import Sampler
for thing in ("CartPole-v1", gymnasium.make("CartPole-v1"), gymnasium.Env, None):
    try:
        Sampler(thing, 4)
    except ValueError as error:
        print(error)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == 4
    assert all(x.endswith(" is no vector environment: make one of it, with make_environments") for x in said)


def test_a_rollout_beyond_memory_is_refused_and_a_long_limit_of_episodes_is_not() -> None:
    with pytest.raises(UserError, match="a rollout of 1 environments and 1000000000000 steps would take"):
        Sampler(vector(Counting), 10**12)
    policy = Policy(spaces.Box(0.0, np.inf, (2,), np.float32), spaces.Discrete(2), hidden=(4,))
    found = Sampler(vector(Counting), 10**12, whole_episodes=True)(policy)
    assert found.mask.sum() == 2


def test_the_native_vector_environment_makes_no_groups() -> None:
    environments = make_environments("CartPole-v1", 4)
    _, sample = sampled(environments, 4, whole_episodes=True, groups=2)
    with pytest.raises(UserError, match='vectorization="sync"'):
        sample()


def test_the_layout_of_next_step_resets() -> None:
    """One row: steps 0 and 1 of an episode, then 0 and 1 of the next, which starts where the first stopped."""
    obs = torch.tensor([[[10.0], [11.0], [20.0], [21.0]]])
    final = torch.tensor([[[11.0], [12.0], [21.0], [22.0]]])
    ended = torch.tensor([[False, True, False, False]])
    columns = {"obs": obs, "ended": ended, "mask": torch.ones(1, 4, dtype=torch.bool), "reward": torch.ones(1, 4)}
    found, stop = next_step_layout(columns, final, torch.tensor([[22.0]]))
    assert found["obs"].flatten().tolist() == [10, 11, 12, 20]
    assert found["mask"].flatten().tolist() == [True, True, False, True]
    assert found["ended"].flatten().tolist() == [False, True, True, False]
    assert found["reward"].flatten().tolist() == [1, 1, 0, 1]
    assert stop.tolist() == [[21]], "step 21 did not fit the row: it is the observation after its last step"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (lambda obs: (torch.zeros(len(obs), 1, 2),), "returned a tuple and no distribution of actions"),
        (lambda obs: torch.zeros(len(obs), 1, 2), "returned a tensor, such as logits,"),
        (
            lambda obs: torch.distributions.Normal(torch.zeros(len(obs), 1, 2), 1.0),
            r"wrap it in .*Independent\(\.\.\., 1\)",
        ),
        (
            lambda obs: torch.distributions.Independent(
                torch.distributions.Normal(torch.zeros(len(obs), 1, 3), 1.0), 1
            ),
            r"actions have shape \(3,\), and the action space's \(2,\)",
        ),
        (
            lambda obs: torch.distributions.Independent(
                torch.distributions.Categorical(logits=torch.zeros(len(obs), 1, 2, 5)), 1
            ),
            r"returned an Independent, and actions are Box\(.*: return Independent\(Normal\(mean, std\), 1\)",
        ),
        (
            lambda obs: torch.distributions.Independent(
                torch.distributions.TransformedDistribution(
                    torch.distributions.Normal(torch.zeros(*obs.shape[:2], 2), 1.0),
                    torch.distributions.transforms.TanhTransform(cache_size=1),
                ),
                1,
            ),
            r"the policy's Independent has no entropy\(\): give it one .*distribution=.squashed.",
        ),
        (
            lambda obs: nn.Linear(7, 2)(obs),
            r"the policy raised RuntimeError for obs \[1, 1, 3\] of torch.float32: mat1 and mat2 shapes cannot be",
        ),
    ],
    ids=["tuple", "logits", "not independent", "shape", "discrete", "no entropy", "wrong size"],
)
def test_a_policy_that_returns_no_distribution_of_actions_is_named(output: Any, said: str) -> None:
    class Own(nn.Module):
        def forward(self, obs: Tensor) -> Any:
            return output(obs)

    with pytest.raises(UserError, match=said) as raised:
        Sampler(vector(limited(Known, 8)), 4)(Own())
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("longest", [1, 127, 128, 129, 300])
def test_rows_of_whole_episodes_grow_as_the_episodes_do(longest: int, mode: AutoresetMode) -> None:
    """A limit of 10^12 steps takes no memory; and the rows are those of any other limit."""
    rollouts = []
    for limit in (10**12, max(longest, 2) + 1, 5000):
        torch.manual_seed(0)
        environments = vector(lambda: Counting((longest,)), lambda: Counting((2,)), mode=mode)
        rollouts.append(sampled(environments, limit, whole_episodes=True)[1]())
    assert rollouts[0].mask.shape == (2, max(longest, 2) + 1)
    assert rollouts[0].mask.sum(1).tolist() == [longest, 2]
    assert rollouts[0].obs[0, :, 1].tolist()[: longest + 1] == list(range(longest + 1))
    assert torch.equal(rollouts[0].reward[0, :longest], torch.arange(1.0, longest + 1))
    for other in rollouts[1:]:
        for name in COLUMNS:
            assert torch.equal(getattr(rollouts[0], name)[:, : longest + 1], getattr(other, name)[:, : longest + 1])


class Fixed(nn.Module):
    """A policy with a distribution of one's own."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, obs: Tensor) -> Any:
        return self.make(torch.zeros(*obs.shape[:2], 2))


def test_how_widely_a_policy_explores_is_in_units_of_the_range() -> None:
    space = spaces.Box(np.array([0.0, -3.0], np.float32), np.array([1000.0, 5.0], np.float32))
    sample = Sampler(vector(lambda: Known(space)), 400)
    own = Policy(spaces.Box(-np.inf, np.inf, (3,)), space, initial_log_std=-1.5)
    assert sample(own).metrics["action_std"] == pytest.approx(np.exp(-1.5))
    user = Fixed(lambda x: Independent(Normal(x + torch.tensor([500.0, 1.0]), torch.tensor([250.0, 1.0])), 1))
    metrics = sample(user).metrics
    assert metrics["action_std"] == pytest.approx((0.5 + 0.25) / 2)
    assert metrics["bound_fraction"] == pytest.approx(0.0455 / 2, abs=0.02), "two deviations in one of two dimensions"
    wide = sample(Policy(spaces.Box(-np.inf, np.inf, (3,)), space, initial_log_std=5.0)).metrics
    assert wide["bound_fraction"] > 0.98
    obs = spaces.Box(-np.inf, np.inf, (3,))
    squashed = sample(Policy(obs, space, distribution="squashed", initial_log_std=5.0)).metrics
    assert squashed["bound_fraction"] > 0.9
    assert squashed["action_std"] == pytest.approx(np.exp(5))
    beta = Policy(obs, space, distribution="beta", orthogonal=False)
    for p in beta.parameters():
        nn.init.constant_(p, 0.0)
    nn.init.constant_(beta.network[-1].bias, np.log(np.expm1(3.0)))  # type: ignore[arg-type]
    metrics = sample(beta).metrics
    assert metrics["action_std"] == pytest.approx(2 * (4 * 4 / (8**2 * 9)) ** 0.5), "of Beta(4, 4), twice"
    assert metrics["bound_fraction"] == 0


def test_where_there_is_no_range_there_is_no_share_at_its_bounds() -> None:
    for space, known in (
        (spaces.Box(-np.inf, np.inf, (2,), np.float32), {"action_std"}),
        (spaces.Box(0, 1, (2,), np.int64), {"action_std"}),
        (spaces.MultiBinary(2), set()),
    ):
        sample = Sampler(vector(lambda space=space: Known(space)), 3)
        metrics = sample(Policy(spaces.Box(-np.inf, np.inf, (3,)), space)).metrics
        assert metrics.keys() & {"action_std", "bound_fraction"} == known


@pytest.mark.parametrize(("vectorization", "groups"), [("sync", 2), ("sync", None), ("auto", None)])
def test_the_greedy_return_is_that_of_the_mode_from_the_rows_own_start(vectorization: str, groups: Any) -> None:
    """CartPole has no chance after its start, so its physics say what the mode earns from there."""
    torch.manual_seed(0)
    environments = make_environments("CartPole-v1", 4, vectorization=vectorization)
    policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(8,))
    sample = Sampler(environments, 30, seed=3, whole_episodes=True, groups=groups, greedy=True)
    for _ in range(2):
        rollout = sample(policy)
        for i, found in enumerate(rollout.greedy.tolist()):
            one = gymnasium.make("CartPole-v1").unwrapped
            one.reset()
            one.state, steps, over = rollout.obs[i, 0].double().tolist(), 0, False
            while not over and steps < 30:
                action = int(policy(torch.tensor(one.state).float().view(1, 1, 4)).probs.argmax())
                steps, over = steps + 1, one.step(action)[2]
            assert found == steps
    assert sample.steps == int(sample.stepping.metrics()["steps"]) == rollout.metrics["steps"]
    assert rollout.metrics["episodes"] == 8, "those of the mode are not counted"


def test_greedy_leaves_what_is_sampled_as_it_is() -> None:
    torch.manual_seed(0)
    environments = [make_environments("CartPole-v1", 4, vectorization="sync") for _ in range(2)]
    policy = Policy(environments[0].single_observation_space, environments[0].single_action_space, hidden=(8,))
    samplers = [
        Sampler(x, 30, seed=3, whole_episodes=True, groups=2, greedy=greedy)
        for x, greedy in zip(environments, (False, True), strict=True)
    ]
    for _ in range(2):
        plain, rollout = (sample(policy) for sample in samplers)
        assert torch.equal(plain.obs, rollout.obs)
        assert torch.equal(plain.action, rollout.action)
        assert plain.metrics == rollout.metrics
        assert plain.greedy is None
    with pytest.raises(UserError, match="whole_episodes=True"):
        Sampler(environments[0], 30, greedy=True)


def test_another_number_of_ranks_divides_counts_and_keeps_statistics() -> None:
    """Of two ranks, three go on: totals add up, the last episodes are dealt out, and nobody draws what another does."""

    def made(seed: int) -> Sampler:
        return Sampler(
            make_environments("CartPole-v1", 2), 40, seed=seed, observation_normalizer=ObservationNormalizer((4,))
        )

    def state_of_one(seed: int) -> dict[str, Any]:
        sample = made(seed)
        sample(Policy(spaces.Box(-1, 1, (4,)), spaces.Discrete(2)))
        return sample.state_dict()

    states = [state_of_one(seed) for seed in (1, 2)]

    def go_on() -> tuple[Any, ...]:
        sample = made(0)
        sample.divide_anew(states, ranks.seed_from(7, 3))
        stepping = sample.stepping
        seen = stepping.observation_normalizer.statistics  # type: ignore[union-attr]
        drawn = stepping.generator.integers(2**31), sample.noise.integers(2**31)
        return stepping.steps, stepping.episodes, list(stepping.finished), seen.mean.tolist(), drawn

    steps, episodes, finished, means, drawn = zip(*ranks.simulated([go_on] * 3), strict=True)
    assert sum(steps) == sum(x["steps"] for x in states) > 100
    assert sum(episodes) == sum(x["episodes"] for x in states) > 2
    assert sorted(x for one in finished for x in one) == sorted(tuple(x) for one in states for x in one["finished"])
    assert max(map(len, finished)) - min(map(len, finished)) <= 1
    assert {tuple(x) for x in means} == {tuple(states[0]["observations"]["mean"].tolist())}
    assert len({x for one in drawn for x in one}) == 6
