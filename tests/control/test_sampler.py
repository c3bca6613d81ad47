"""The sampler: what a row holds, what counts, and the same estimates whichever way an environment resets."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from probes import BROKEN, GAMMA, Broken, Counting, Known, Potential, limited
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from policygrad.advantages import gae, standardize
from policygrad.algorithms.actor_critic import actor_critic, off_policy_actor_critic
from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.reinforce import reinforce
from policygrad.algorithms.trpo import npg, trpo
from policygrad.control import Critic, ObservationNormalizer, Policy, RewardScaler, Sampler, make_environments
from policygrad.critics import bootstrap_values, no_fit
from policygrad.errors import UserError
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
    assert sampler.steps == 7


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
    assert sample().metrics == {"steps": 7, "episodes": 3, "return": (3 + 6 + 3) / 3, "length": (2 + 3 + 2) / 3}
    metrics = sample().metrics  # episode 3, of 3 steps; 4, of 2; and the first step of 5
    assert metrics == {"steps": 13, "episodes": 5, "return": (3 + 6 + 3 + 6 + 3) / 5, "length": 12 / 5}
    assert [x for x, _ in sampler.finished] == [3, 6, 3, 6, 3]


def test_there_is_no_return_before_an_episode_has_ended() -> None:
    _, sample = sampled(vector(lambda: Counting((9,))), 4)
    assert sample().metrics == {"steps": 4, "episodes": 0}


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
    assert sampler.steps == 3


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
    assert rollout.mask.int().tolist() == [[1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0]]
    assert rollout.reward.sum(1).tolist() == [3, 10]
    assert rollout.obs[:, 0].tolist() == [[0, 0], [0, 0]]
    assert (rollout.ended & rollout.mask).sum(1).tolist() == [1, 1]
    assert (sampler.steps, sampler.episodes) == (6, 2)


def test_an_episode_cut_at_the_longest_that_it_may_be_counts_among_the_returns() -> None:
    environments = vector(lambda: Counting((9,)), lambda: Counting((2, 9)), lambda: Counting((4,)))
    sampler, sample = sampled(environments, 4, whole_episodes=True)
    metrics = sample().metrics
    assert sorted(sampler.finished) == [(3.0, 2), (10.0, 4), (10.0, 4)]
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
    assert rollout.obs.shape == (2, 1000, 2), "the shapes are fixed all the same"
    assert rollout.action.shape == rollout.logp.shape == (2, 1000)


class GarbageOnReset(VectorWrapper):
    """Next-step environments that return a reward and an end on the step that only resets."""

    garbage = np.nan

    def reset(self, **options: Any) -> Any:
        self.ended = np.zeros(self.num_envs, bool)
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        reward, resets = np.where(self.ended, self.garbage, reward), self.ended
        self.ended = terminated | truncated
        return obs, reward, terminated | resets, truncated | resets, info


@pytest.mark.parametrize("garbage", [1e9, np.nan, np.inf])
def test_what_the_environment_returns_on_a_reset_step_changes_nothing(garbage: float) -> None:
    rollouts = []
    for wrap in (lambda x: x, GarbageOnReset):
        torch.manual_seed(0)
        environments = wrap(vector(Counting, lambda: Counting((1, 4))))
        environments.garbage = garbage
        _, sample = sampled(environments, 12, reward_scaler=RewardScaler(2, 0.9))
        rollouts.append(sample())
        rollouts.append(sample())
    for a, b in zip(rollouts[:2], rollouts[2:], strict=True):
        assert a.metrics == b.metrics
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in COLUMNS)


def one_iteration(name: str, policy: nn.Module, critic: nn.Module, sample: Callable[[nn.Module], Rollout]) -> None:
    both = torch.optim.Adam([*policy.parameters(), *critic.parameters()])
    algorithm = {
        "reinforce": lambda: reinforce(policy, sample, both, normalize=standardize, entropy_coefficient=0.01),
        "actor_critic": lambda: actor_critic(policy, critic, sample, both, normalize=standardize),
        "off_policy_actor_critic": lambda: off_policy_actor_critic(policy, critic, sample, both, normalize=standardize),
        "npg": lambda: npg(policy, critic, sample, no_fit),
        "trpo": lambda: trpo(policy, critic, sample, no_fit),
        "ppo": lambda: ppo(policy, critic, sample, both, minibatch_size=5, normalize_batch=standardize),
    }[name]()
    next(iter(algorithm))


@pytest.mark.parametrize("name", ["reinforce", "actor_critic", "off_policy_actor_critic", "npg", "trpo", "ppo"])
def test_masked_steps_change_no_parameter(name: str) -> None:
    def parameters(spoil: bool) -> Tensor:
        torch.manual_seed(0)
        environments = vector(Counting, lambda: Counting((1, 4)))
        policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(8,))
        critic = Critic(environments.single_observation_space, hidden=(8,))
        sampler = Sampler(environments, 12)

        def sample(policy: nn.Module) -> Rollout:
            rollout = sampler(policy)
            if spoil:
                hidden = ~rollout.mask
                rollout.action[hidden] = 1 - rollout.action[hidden]
                rollout.logp[hidden] = -1e9
                rollout.reward[hidden] = torch.nan
                rollout.terminated[hidden] = True
                rollout.ended[hidden] = True
            return rollout

        one_iteration(name, policy, critic, sample)
        return torch.cat([p.detach().flatten() for m in (policy, critic) for p in m.parameters()])

    clean, spoiled = parameters(False), parameters(True)
    assert clean.isfinite().all()
    assert torch.equal(clean, spoiled)


def test_observation_statistics_are_those_of_the_observations_that_decisions_were_taken_on() -> None:
    normalizer = ObservationNormalizer((2,))
    sampler, sample = sampled(vector(Counting, lambda: Counting((1, 4))), 12, observation_normalizer=normalizer)
    _, plain = sampled(vector(Counting, lambda: Counting((1, 4))), 12)
    seen = []
    for _ in range(3):
        sample()
        rollout = plain()
        seen += [rollout.obs[rollout.mask]]
    waiting = rollout.final_obs[torch.tensor(~sampler.resetting)]  # already taken in, the decision is still to come
    seen = torch.cat([*seen, waiting]).double().numpy()
    assert normalizer.statistics.count == len(seen)
    np.testing.assert_allclose(normalizer.statistics.mean, seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normalizer.statistics.var, seen.var(0), rtol=1e-12)


def test_the_reward_scale_is_the_standard_deviation_of_the_discounted_returns_of_counted_steps() -> None:
    scaler = RewardScaler(2, 0.9)
    _, sample = sampled(vector(Counting, lambda: Counting((1, 4))), 12, reward_scaler=scaler)
    _, plain = sampled(vector(Counting, lambda: Counting((1, 4))), 12)
    sample()
    rollout, returns = plain(), []
    for row in range(2):
        total = 0.0
        for t in range(12):
            if rollout.mask[row, t]:
                total = 0.9 * total + rollout.reward[row, t].item()
                returns.append(total)
            if rollout.ended[row, t]:
                total = 0.0
    assert scaler.statistics.count == len(returns)
    np.testing.assert_allclose(scaler.statistics.var, np.var(returns), rtol=1e-6)


def test_an_episode_that_a_whole_episodes_row_cuts_off_leaves_no_return_behind() -> None:
    scaler = RewardScaler(1, 0.9)
    _, sample = sampled(vector(lambda: Counting((99,))), 3, whole_episodes=True, reward_scaler=scaler)
    sample()
    first = scaler.returns.copy()
    sample()
    np.testing.assert_array_equal(scaler.returns, first)


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
    torch.testing.assert_close(logp.where(rollout.mask, 0.0), rollout.logp, rtol=0, atol=1e-5)


def test_dropout_is_off_so_that_the_policy_scored_is_the_one_that_sampled() -> None:
    environments = vector(Counting)
    inner = Policy(environments.single_observation_space, environments.single_action_space)
    inner.network.insert(1, nn.Dropout(0.5))
    rollout = Sampler(environments, 9)(inner)
    logp = inner(rollout.obs).log_prob(rollout.action)
    torch.testing.assert_close(logp[rollout.mask], rollout.logp[rollout.mask], rtol=0, atol=1e-6)


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


def test_the_state_is_a_snapshot_that_sampling_does_not_change() -> None:
    sampler, sample = sampled(
        make_environments(limited(Known, 8), 2),
        5,
        observation_normalizer=ObservationNormalizer((3,)),
        reward_scaler=RewardScaler(2, 0.9),
    )
    sample()
    state = sampler.state_dict()
    before = {name: np.array(x) for name, x in state.items() if isinstance(x, np.ndarray)}
    sample()
    assert before
    assert all(np.array_equal(x, state[name]) for name, x in before.items())
    sampler.load_state_dict(state)
    again = sampler.state_dict()
    assert again["steps"] == state["steps"]
    for name, x in before.items():
        np.testing.assert_array_equal(again[name], x)
    for name in ("observations", "rewards"):
        assert all(np.array_equal(state[name][key], again[name][key]) for key in ("mean", "var", "count"))


@pytest.mark.parametrize("how", BROKEN)
def test_an_environment_that_misbehaves_is_one_line_that_says_how(how: str) -> None:
    _, sample = sampled(make_environments(lambda: Broken(how), 2), 8)
    with pytest.raises(UserError) as raised:
        sample()
    assert "environment" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_line_repeats_what_the_environment_said() -> None:
    _, sample = sampled(make_environments(Broken, 2), 8)
    with pytest.raises(UserError, match=r"RuntimeError in step: the simulator crashed"):
        sample()


class WrongVector(VectorWrapper):
    """A vector environment of the user's own that returns a column in the place of a row."""

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, reward[:, None], *rest


@pytest.mark.parametrize("count", [1, 3])
def test_a_vector_environment_whose_rewards_are_of_the_wrong_shape_is_refused(count: int) -> None:
    _, sample = sampled(WrongVector(vector(*[Counting] * count)), 8)
    with pytest.raises(UserError, match="shape"):
        sample()


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
        return self.make(x)

    def to_environment(self, action: Tensor) -> np.ndarray:
        return np.zeros(len(action), dtype=np.int64)


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
    with pytest.raises(UserError, match=rf"^the policy's {said} is not finite: a lower learning_rate or scale_rewards"):
        sampler(Poisoned(make))
    assert not stepped


def test_a_policy_may_be_nan_where_nothing_counts() -> None:
    environments = vector(lambda: Counting((2,)), lambda: Counting((4,)))
    rollout = Sampler(environments, 4, whole_episodes=True)(Poisoned(normal, only_masked=True))
    assert rollout.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("empty", [{}, {"final_obs": np.array([None], dtype=object)}], ids=["absent", "none"])
def test_a_reset_in_the_same_step_without_the_final_observation_is_refused(whole: bool, empty: Any) -> None:
    class Silent(VectorWrapper):
        def step(self, action: Any) -> Any:
            return *super().step(action)[:4], empty

    _, sample = sampled(Silent(vector(Counting, mode=AutoresetMode.SAME_STEP)), 8, whole_episodes=whole)
    with pytest.raises(UserError, match=r"no final_obs: .*NEXT_STEP"):
        sample()


def test_a_state_number_outside_its_space_is_refused() -> None:
    class Outside(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gymnasium.spaces.Discrete(3, start=1)

        def _obs(self) -> Any:
            return 1 + self.t  # 4 is outside

    _, sample = sampled(make_environments(Outside, 1), 8)
    with pytest.raises(UserError, match="Discrete"):
        sample()


def test_environments_that_never_reset_are_refused() -> None:
    with pytest.raises(UserError, match="reset"):
        Sampler(vector(Counting, mode=AutoresetMode.DISABLED), 4)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_rollout_has_at_least_one_step(steps: int) -> None:
    with pytest.raises(UserError, match="steps"):
        Sampler(vector(Counting), steps)


def test_only_a_box_can_be_normalised() -> None:
    class Numbered(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.observation_space = gymnasium.spaces.Discrete(9)

    with pytest.raises(UserError, match="Discrete"):
        Sampler(vector(Numbered), 4, observation_normalizer=ObservationNormalizer(()))
