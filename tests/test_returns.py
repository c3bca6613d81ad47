"""Every return against its definition, written out as a sum."""

import pytest
import torch
from segments import Segments
from torch import Tensor
from torch.testing import assert_close

from policygrad.returns import discount, kl_in_reward, lambda_return, n_step, reward_to_go, trajectory_return, vtrace

pytestmark = pytest.mark.usefixtures("float64")
GAMMA = 0.9


def n_step_sum(s: Segments, b: int, t: int, n: int) -> Tensor:
    """sum_{i<k} gamma^i r_{t+i} + gamma^k V(s_{t+k}), with k = n or as far as the episode goes."""
    k = min(n, s.stop(b, t) - t + 1)
    return sum(GAMMA**i * s.reward[b, t + i] for i in range(k)) + GAMMA**k * s.after(b, t + k - 1)


def td_error(s: Segments, b: int, t: int) -> Tensor:
    return s.reward[b, t] + GAMMA * s.after(b, t) - s.value[b, t]


@pytest.mark.parametrize("gamma", [0.0, GAMMA, 1.0])
def test_reward_to_go_is_the_discounted_sum_to_the_end_of_the_episode(segments: Segments, gamma: float) -> None:
    expected = segments.each(
        lambda b, t: sum(gamma ** (u - t) * segments.reward[b, u] for u in range(t, segments.stop(b, t) + 1))
    )
    assert_close(reward_to_go(segments.reward, segments.ended, gamma), expected)


def test_trajectory_return_is_the_sum_from_the_start_of_the_episode_at_each_of_its_steps(segments: Segments) -> None:
    def total(b: int, t: int) -> Tensor:
        start = next((u + 1 for u in reversed(range(t)) if segments.ended[b, u]), 0)
        return sum(GAMMA ** (u - start) * segments.reward[b, u] for u in range(start, segments.stop(b, t) + 1))

    assert_close(trajectory_return(segments.reward, segments.ended, GAMMA), segments.each(total))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 100])
def test_n_step_is_n_rewards_and_the_value_after_them(segments: Segments, n: int) -> None:
    assert_close(n_step(*segments, GAMMA, n), segments.each(lambda b, t: n_step_sum(segments, b, t, n)))


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_lambda_return_is_the_weighted_mean_of_all_n_step_returns(segments: Segments, lam: float) -> None:
    """(1 - lam) sum_{n<N} lam^(n-1) G^(n) + lam^(N-1) G^(N), with N the steps that are left."""

    def mean(b: int, t: int) -> Tensor:
        left = segments.stop(b, t) - t + 1
        shorter = sum((1 - lam) * lam ** (n - 1) * n_step_sum(segments, b, t, n) for n in range(1, left))
        return shorter + lam ** (left - 1) * n_step_sum(segments, b, t, left)

    assert_close(lambda_return(*segments, GAMMA, lam), segments.each(mean))


def test_lambda_return_of_0_is_one_step_and_of_1_is_all_steps(segments: Segments) -> None:
    assert_close(lambda_return(*segments, GAMMA, 0.0), n_step(*segments, GAMMA, 1))
    assert_close(lambda_return(*segments, GAMMA, 1.0), n_step(*segments, GAMMA, 7))


def test_without_values_the_lambda_return_of_1_is_the_reward_to_go(segments: Segments) -> None:
    nothing = torch.zeros_like(segments.value)
    everything = lambda_return(segments.reward, nothing, segments.terminated, segments.ended, GAMMA, 1.0)
    assert_close(everything, reward_to_go(segments.reward, segments.ended, GAMMA))


@pytest.mark.parametrize(("rho_bar", "c_bar"), [(1.0, 1.0), (2.0, 1.0), (0.5, 0.8), (torch.inf, torch.inf)])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_vtrace_is_its_definition(segments: Segments, lam: float, rho_bar: float, c_bar: float) -> None:
    """v_s = V(s) + sum_t gamma^(t-s) (prod_{i<t} c_i) rho_t delta_t;  A_s = rho_s (r_s + gamma v_{s+1} - V(s))."""
    ratio = torch.randn(5, 7).exp()

    def target(b: int, s: int) -> Tensor:
        v, trace = segments.value[b, s], 1.0
        for t in range(s, segments.stop(b, s) + 1):
            v = v + GAMMA ** (t - s) * trace * min(rho_bar, ratio[b, t].item()) * td_error(segments, b, t)
            trace *= lam * min(c_bar, ratio[b, t].item())
        return v

    def advantage(b: int, s: int) -> Tensor:
        following = segments.after(b, s) if s == segments.stop(b, s) else target(b, s + 1)
        rho = min(rho_bar, ratio[b, s].item())
        return rho * (segments.reward[b, s] + GAMMA * following - segments.value[b, s])

    v, a = vtrace(*segments, ratio, GAMMA, lam, rho_bar, c_bar)
    assert_close(v, segments.each(target))
    assert_close(a, segments.each(advantage))


@pytest.mark.parametrize(("rho_bar", "c_bar"), [(1.0, 1.0), (3.0, 1.5)])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_vtrace_on_policy_is_the_lambda_return(segments: Segments, lam: float, rho_bar: float, c_bar: float) -> None:
    target, advantage = vtrace(*segments, torch.ones(5, 7), GAMMA, lam, rho_bar, c_bar)
    assert_close(target, lambda_return(*segments, GAMMA, lam))
    if lam == 1:
        assert_close(advantage, target - segments.value[:, :-1])


def test_vtrace_of_ratio_0_learns_nothing(segments: Segments) -> None:
    target, advantage = vtrace(*segments, torch.zeros(5, 7), GAMMA)
    assert_close(target, segments.value[:, :-1])
    assert advantage.eq(0).all()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_what_stands_behind_a_termination_reaches_nothing_before_it(garbage: float) -> None:
    reward, value, ratio = torch.randn(2, 6), torch.randn(2, 7), torch.rand(2, 6)
    ended = torch.zeros(2, 6, dtype=torch.bool)
    ended[:, 3] = True
    spoiled, spoiled_value, spoiled_ratio = reward.clone(), value.clone(), ratio.clone()
    spoiled[:, 4:], spoiled_value[:, 4:], spoiled_ratio[:, 4:] = garbage, garbage, garbage

    def credit(reward: Tensor, value: Tensor, ratio: Tensor) -> list[Tensor]:
        both = (ended, ended, GAMMA)
        with_values = [n_step(reward, value, *both, n) for n in (1, 2, 6)] + [lambda_return(reward, value, *both, 0.9)]
        with_values += vtrace(reward, value, ended, ended, ratio, GAMMA)
        return [reward_to_go(reward, ended, GAMMA), trajectory_return(reward, ended, GAMMA), *with_values]

    for clean, dirty in zip(credit(reward, value, ratio), credit(spoiled, spoiled_value, spoiled_ratio), strict=True):
        assert torch.equal(clean[:, :4], dirty[:, :4])


def test_returns_of_a_transposed_array_are_those_of_a_copy(segments: Segments) -> None:
    strided = Segments(*(x.t().contiguous().t() for x in segments))
    assert not strided.reward.is_contiguous()
    assert_close(lambda_return(*strided, GAMMA, 0.9), lambda_return(*segments, GAMMA, 0.9))
    assert_close(n_step(*strided, GAMMA, 3), n_step(*segments, GAMMA, 3))
    assert_close(trajectory_return(*strided[::3], GAMMA), trajectory_return(*segments[::3], GAMMA))


def test_the_precision_of_the_rewards_is_the_precision_of_the_return() -> None:
    reward, ended = torch.randn(2, 3, dtype=torch.float32), torch.zeros(2, 3, dtype=torch.bool)
    assert reward_to_go(reward, ended, GAMMA).dtype == torch.float32
    assert (
        lambda_return(reward, torch.zeros(2, 4, dtype=torch.float32), ended, ended, GAMMA, 0.9).dtype == torch.float32
    )


def test_expected_reward_less_the_kl_charge_is_the_expected_reward_less_beta_kl() -> None:
    p, q, reward, beta = torch.randn(4).softmax(0), torch.randn(4).softmax(0), torch.randn(4), 0.3
    charged = kl_in_reward(reward[None], p.log()[None], q.log()[None], beta)[0]
    divergence = sum(p[a] * (p[a] / q[a]).log() for a in range(4))
    assert_close((p * charged).sum(), (p * reward).sum() - beta * divergence)


@pytest.mark.parametrize("reset_ends", [False, True])
def test_discount_counts_decisions_not_masked_steps_and_begins_anew_with_each_episode(reset_ends: bool) -> None:
    #          episode of three | reset | two, a tool's output between them
    mask = torch.tensor([[1, 1, 1, 0, 1, 0, 1]]).bool()
    ended = torch.tensor([[0, 0, 1, int(reset_ends), 0, 0, 1]]).bool()
    age = torch.tensor([[0, 1, 2, 0, 0, 1, 1]])
    assert_close(discount(mask, ended, GAMMA), GAMMA**age)
    assert_close(discount(mask, ended, 1.0), torch.ones(1, 7))
