"""How much better than expected: GAE, baselines, group statistics and standardization against their definitions."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from segments import Segments
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.advantages import (
    batch_scale,
    gae,
    group_mean,
    group_scale,
    group_std,
    leave_one_out,
    length_weighted_mean,
    mean_baseline,
    mean_scale,
    monte_carlo_advantage,
    n_step_advantage,
    no_baseline,
    optimal_constant_baseline,
    other_best,
    standardize,
    time_mean_baseline,
    unnormalized,
)
from policygrad.errors import UserError
from policygrad.returns import lambda_return, n_step
from policygrad.rollout import Rollout

pytestmark = pytest.mark.usefixtures("float64")
GAMMA = 0.9


# GAE


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_the_double_sum(segments: Segments, lam: float) -> None:
    """A_t = sum_k (gamma lam)^k (r_{t+k} + gamma V(s_{t+k+1}) - V(s_{t+k})), as far as the episode goes."""

    def advantage(b: int, t: int) -> Tensor:
        total = torch.zeros(())
        for u in range(t, segments.stop(b, t) + 1):
            delta = segments.reward[b, u] + GAMMA * segments.after(b, u) - segments.value[b, u]
            total = total + (GAMMA * lam) ** (u - t) * delta
        return total

    assert_close(gae(*segments, GAMMA, lam), segments.each(advantage))


def test_gae_of_0_is_the_td_error_and_of_1_the_monte_carlo_advantage(segments: Segments) -> None:
    delta = segments.each(lambda b, t: segments.reward[b, t] + GAMMA * segments.after(b, t) - segments.value[b, t])
    assert_close(gae(*segments, GAMMA, 0.0), delta)
    assert_close(gae(*segments, GAMMA, 1.0), n_step(*segments, GAMMA, 7) - segments.value[:, :-1])
    assert_close(monte_carlo_advantage(*segments, GAMMA), gae(*segments, GAMMA, 1.0))


def test_n_step_advantage_is_the_return_less_the_value(segments: Segments) -> None:
    assert_close(n_step_advantage(*segments, GAMMA, 3), n_step(*segments, GAMMA, 3) - segments.value[:, :-1])


def truncated_at_5(length: int = 12) -> Tensor:
    return (torch.arange(length) % 5 == 4).expand(2, -1)


def all_advantages(s: Segments) -> list[Tensor]:
    found = [gae(*s, GAMMA, lam) for lam in (0.0, 0.9, 1.0)] + [n_step_advantage(*s, GAMMA, n) for n in (1, 3, 99)]
    return [*found, monte_carlo_advantage(*s, GAMMA)]


def test_a_time_limit_is_no_end_of_value() -> None:
    """Constant reward 1, V = 1 / (1 - gamma), truncated at 5: nothing is better than expected."""
    value = torch.full((2, 13), 1 / (1 - GAMMA))
    never = torch.zeros(2, 12, dtype=torch.bool)
    for advantage in all_advantages(Segments(torch.ones(2, 12), value, never, truncated_at_5())):
        assert_close(advantage, torch.zeros(2, 12), atol=1e-13, rtol=0)


def test_an_end_of_value_is_one() -> None:
    ended = truncated_at_5()
    advantage = gae(torch.ones(2, 12), torch.full((2, 13), 1 / (1 - GAMMA)), ended, ended, GAMMA, 0.9)
    assert (advantage[:, :10] < -1e-2).all()


def test_a_batch_with_a_truncation_is_its_two_trajectories_estimated_apart() -> None:
    reward, value = torch.randn(3, 8), torch.randn(3, 9)
    never = torch.zeros(3, 8, dtype=torch.bool)
    ended = never.index_fill(1, torch.tensor(4), True)
    apart = [
        all_advantages(Segments(reward[:, :5], value[:, :6], never[:, :5], never[:, :5])),
        all_advantages(Segments(reward[:, 5:], value[:, 5:], never[:, 5:], never[:, 5:])),
    ]
    # In one row V(obs[5]) is the second trajectory's first state, which the bootstrap of the first is taken from.
    for whole, first, second in zip(all_advantages(Segments(reward, value, never, ended)), *apart, strict=True):
        assert_close(whole, torch.cat([first, second], 1))


@pytest.mark.parametrize("reset_ends", [False, True])
def test_next_step_reset_gives_the_advantages_of_the_episodes_apart(reset_ends: bool) -> None:
    """The masked step's value is the true final observation's: first episode, its last value, second episode."""
    reward, value = [torch.randn(3, 4), torch.randn(3, 3)], [torch.randn(3, 5), torch.randn(3, 4)]
    never = torch.zeros(3, 8, dtype=torch.bool)
    ended = never.clone()
    ended[:, 3], ended[:, 4] = True, reset_ends
    garbage = torch.full((3, 1), 1e3)
    row = Segments(torch.cat([reward[0], garbage, reward[1]], 1), torch.cat(value, 1), never, ended)
    apart = [
        all_advantages(Segments(r, v, torch.zeros_like(r).bool(), torch.zeros_like(r).bool()))
        for r, v in zip(reward, value, strict=True)
    ]
    for whole, first, second in zip(all_advantages(row), *apart, strict=True):
        assert_close(whole[:, :4], first)
        assert_close(whole[:, 5:], second)


# Baselines


def returns_of(rollout: Rollout) -> Tensor:
    return torch.randn(rollout.mask.shape).where(rollout.mask, torch.nan)


def test_mean_baseline_is_the_mean_return_of_the_other_rows(softmax: nn.Module, sample: Callable[..., Rollout]) -> None:
    rollout = sample(softmax)
    returns = returns_of(rollout)
    for i, b in enumerate(mean_baseline(rollout, returns)):
        others = [returns[j, t] for j in range(6) for t in range(5) if j != i and rollout.mask[j, t]]
        assert_close(b, (sum(others) / len(others)).expand(5))


def test_time_mean_baseline_is_the_mean_return_of_the_other_rows_at_that_step_of_theirs(
    softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    """What no policy chose is no step, unless an episode ended there."""
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[0, 1] = mask[1, 0] = mask[2, 3] = mask[3, 1:3] = mask[4, 2:] = False
    ended = torch.zeros(6, 5, dtype=torch.bool)
    ended[2, 3] = True  # a reset, which takes its time
    rollout = sample(softmax, mask=mask, ended=ended)
    returns = returns_of(rollout)
    each = [[t for t in range(5) if mask[b, t] or ended[b, t]] for b in range(6)]  # steps of a row -> their place in it
    baseline = time_mean_baseline(rollout, returns)
    for i in range(6):
        for k, t in enumerate(each[i]):
            others = [returns[j, each[j][k]] for j in range(6) if j != i and k < len(each[j]) and mask[j, each[j][k]]]
            if mask[i, t]:
                assert_close(baseline[i, t], sum(others) / len(others) if others else torch.zeros(()))
    assert [len(steps) for steps in each] == [4, 4, 5, 3, 2, 5]


def test_optimal_constant_baseline_minimizes_the_variance_of_the_other_rows_gradients() -> None:
    score, gradient = torch.randn(6, 4), torch.randn(6, 4)  # Z_j and X_j
    baseline = optimal_constant_baseline((gradient * score).sum(1), (score * score).sum(1))
    for i in range(6):
        others = [j for j in range(6) if j != i]

        def second_moment(b: Tensor, others: list[int] = others) -> Tensor:
            return sum((gradient[j] - b * score[j]).square().sum() for j in others)

        slope = torch.func.grad(second_moment)(baseline[i])
        assert_close(slope, torch.zeros(()), atol=1e-12, rtol=0)


def test_optimal_constant_baseline_survives_a_row_with_a_score_that_dwarfs_the_others() -> None:
    squares = torch.tensor([1.0, 1e-9, 1e-9], dtype=torch.float32)
    products = torch.tensor([1.0, 3e-9, 3e-9], dtype=torch.float32)
    assert_close(optimal_constant_baseline(products, squares)[0], torch.tensor(3.0, dtype=torch.float32))


@pytest.mark.parametrize("baseline", [no_baseline, mean_baseline, time_mean_baseline])
def test_no_baseline_looks_at_the_row_it_judges(
    baseline: Callable[[Rollout, Tensor], Tensor], softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(softmax)
    returns = returns_of(rollout)
    changed = returns.clone()
    changed[2] += 5
    before, after = (baseline(rollout, x)[2][rollout.mask[2]] for x in (returns, changed))
    assert_close(before, after)


@pytest.mark.parametrize("baseline", [no_baseline, mean_baseline, time_mean_baseline])
def test_the_baseline_of_a_row_alone_is_0(
    baseline: Callable[[Rollout, Tensor], Tensor], softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(softmax, rows=1)
    assert baseline(rollout, returns_of(rollout))[rollout.mask].eq(0).all()
    assert optimal_constant_baseline(torch.randn(1), torch.rand(1)).eq(0).all()


# Groups


def test_group_statistics_are_their_definitions() -> None:
    returns, group = torch.randn(9), torch.tensor([7, 2, 7, 2, 2, 7, 5, 7, 5])
    mean, others, std = group_mean(returns, group), leave_one_out(returns, group), group_std(returns, group)
    for i in range(9):
        own = [returns[j] for j in range(9) if group[j] == group[i]]
        rest = [returns[j] for j in range(9) if group[j] == group[i] and j != i]
        assert_close(mean[i], sum(own) / len(own))
        assert_close(others[i], sum(rest) / len(rest))
        assert_close(std[i], torch.sqrt(sum((x - mean[i]) ** 2 for x in own) / (len(own) - 1)))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10, 64])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6 + 0.1, -0.7])
def test_equal_rewards_have_advantage_exactly_0(reward: float, size: int) -> None:
    returns, group = torch.full((size,), reward, dtype=torch.float32), torch.zeros(size, dtype=torch.long)
    assert (returns - group_mean(returns, group)).eq(0).all()
    assert group_std(returns, group).eq(0).all()
    if size > 1:
        assert (returns - leave_one_out(returns, group)).eq(0).all()


def test_a_row_alone_has_its_own_mean_nobody_to_be_compared_with_and_no_spread() -> None:
    returns, group = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([0, 1, 0])
    assert group_mean(returns, group)[1] == 3
    assert leave_one_out(returns, group)[1] == 0
    assert group_std(returns, group)[1] == 0


@pytest.mark.parametrize("statistic", [group_mean, leave_one_out, group_std])
def test_group_statistics_do_not_depend_on_labels_or_order(statistic: Callable[[Tensor, Tensor], Tensor]) -> None:
    returns, group, order = torch.randn(12), torch.randint(4, (12,)), torch.randperm(12)
    relabeled = torch.tensor([40, -3, 7, 1000])[group]
    assert torch.equal(statistic(returns, relabeled), statistic(returns, group))
    assert_close(statistic(returns[order], group[order]), statistic(returns, group)[order])


@pytest.mark.parametrize("statistic", [group_mean, leave_one_out, group_std])
def test_a_group_is_not_touched_by_the_numbers_of_another(statistic: Callable[[Tensor, Tensor], Tensor]) -> None:
    returns, group = torch.tensor([1.0, 2.0, 4.0, torch.nan, torch.inf, 3.0]), torch.tensor([0, 0, 0, 1, 2, 2])
    assert_close(statistic(returns, group)[:3], statistic(returns[:3], group[:3]))


def test_a_large_offset_does_not_cancel() -> None:
    small = torch.tensor([0.0, 0.5, 1.0, 0.5], dtype=torch.float32)
    group = torch.zeros(4, dtype=torch.long)
    large = small + 1e6
    assert_close(large - group_mean(large, group), small - 0.5)
    assert_close(large - leave_one_out(large, group), (small - 0.5) * 4 / 3, atol=0.05, rtol=0)
    assert_close(group_std(large, group), group_std(small, group))
    assert_close(standardize(large[None], large[None] > 0), standardize(small[None], small[None] >= 0))


# Standardization


def test_standardized_is_of_mean_0_and_standard_deviation_1_over_the_mask() -> None:
    x, mask = 5 + 3 * torch.randn(4, 6), torch.rand(4, 6) < 0.6
    y = standardize(x, mask)
    chosen = x[mask]
    assert_close(y[mask], (chosen - chosen.mean()) / chosen.std())
    assert_close(y[mask].mean(), torch.zeros(()), atol=1e-12, rtol=0)
    assert_close(y[mask].std(), torch.ones(()))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 1000])
def test_equal_advantages_and_one_alone_are_standardized_to_exactly_0(count: int) -> None:
    x = torch.full((1, count + 2), 0.1, dtype=torch.float32)
    x[:, :2] = torch.tensor([torch.nan, 1e9])
    mask = torch.ones(1, count + 2, dtype=torch.bool).index_fill(1, torch.tensor([0, 1]), False)
    assert standardize(x, mask).eq(0).all()


def test_nothing_in_the_mask_is_standardized_to_0() -> None:
    assert standardize(torch.full((2, 2), torch.nan), torch.zeros(2, 2, dtype=torch.bool)).eq(0).all()


def test_unnormalized_is_as_it_was() -> None:
    x = torch.randn(2, 3)
    assert unnormalized(x, x > 0) is x


def test_lambda_return_is_gae_plus_the_value(segments: Segments) -> None:
    target = gae(*segments, GAMMA, 0.8) + segments.value[:, :-1]
    assert_close(target, lambda_return(*segments, GAMMA, 0.8))


# Units


@pytest.mark.parametrize("c", [2.0**-30, 2.0**30, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unit_of_the_rewards_makes_no_difference(c: float, dtype: torch.dtype) -> None:
    x, mask, group = torch.randn(6, 5, dtype=dtype), torch.rand(6, 5) < 0.8, torch.arange(6) // 3
    assert torch.equal(standardize(c * x, mask), (1 if c > 0 else -1) * standardize(x, mask)) or c < 0
    returns = x.sum(1)
    assert torch.equal(group_std(c * returns, group), abs(c) * group_std(returns, group))
    assert torch.equal(
        c * returns / group_scale(c * returns, group), (c / abs(c)) * returns / group_scale(returns, group)
    )


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_what_is_equal_up_to_rounding_is_0(size: float) -> None:
    x = torch.full((4, 3), size / 3, dtype=torch.float32)
    x[0] = torch.nextafter(x[0], torch.tensor(torch.inf))
    mask, group = torch.ones(4, 3, dtype=torch.bool), torch.zeros(4, dtype=torch.long)
    assert standardize(x, mask).eq(0).all()
    assert group_std(x[:, 0], group).eq(0).all()
    assert ((x[:, 0] - x[1, 0]) / group_scale(x[:, 0], group)).eq(0).all()
    apart = x * (1 + torch.arange(4) * 1e-5).unsqueeze(1)
    assert standardize(apart, mask).std().item() == pytest.approx(1, abs=1e-3)
    assert group_std(apart[:, 0], group).gt(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_not_hidden_by_a_statistic(bad: float) -> None:
    """It must reach the gradient, which then stops the run: an advantage of 0 would be wrong in silence."""
    x = torch.tensor([[1.0, bad, 3.0]])
    whole = torch.ones_like(x, dtype=torch.bool)
    assert not standardize(x, whole).isfinite().any()
    assert_close(standardize(x, x.isfinite()), torch.tensor([[-1.0, 0.0, 1.0]]) / 2**0.5)
    group = torch.tensor([0, 0, 0])
    assert not group_std(x[0], group).isfinite().any()
    assert group_scale(x[0], group).isnan().all()


# Of variants


def test_what_the_groups_best_return_owes_to_a_row() -> None:
    returns, group = torch.tensor([3.0, 1.0, 3.0, 5.0, 2.0, -1.0, -4.0]), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    owed = returns - other_best(returns, group)
    assert_close(owed, torch.tensor([0.0, 0.0, 0.0, 3.0, 0.0, 3.0, 0.0]))
    alone = torch.tensor([2.0])
    assert (alone - other_best(alone, torch.tensor([0]))).item() == 2


def test_the_mean_as_a_scale_takes_no_negative_return() -> None:
    group = torch.tensor([0, 0, 1, 1])
    assert mean_scale(torch.tensor([1.0, 0.0, 0.0, 0.0]), group).tolist() == [0.5, 0.5, torch.inf, torch.inf]
    with pytest.raises(UserError, match="a return is negative: use rewards of 0 or more"):
        mean_scale(torch.tensor([1.0, -1e-3, 0.0, 0.0]), group)


def test_the_batchs_deviation_is_over_all_groups() -> None:
    returns, group = torch.randn(6), torch.tensor([0, 0, 1, 1, 2, 2])
    assert_close(batch_scale(returns, group), returns.std().expand(6))
    assert batch_scale(torch.full((6,), 0.1), group).isinf().all()
    apart = torch.tensor([0, 0, 1, 1, 2, 3])  # two that are compared with nothing
    expected = torch.cat([returns[:4].std().expand(4), torch.full((2,), torch.inf)])
    assert_close(batch_scale(returns, apart), expected)


def test_the_mean_weighted_by_length_is_that_of_the_tokens(sample: Callable[..., Rollout], policy: nn.Module) -> None:
    rollout = sample(policy)
    returns = rollout.reward.sum(1, keepdim=True).expand_as(rollout.reward)
    found = length_weighted_mean(rollout, returns)
    for i, group in enumerate(rollout.group.tolist()):
        rows = [j for j in range(len(rollout.group)) if rollout.group[j] == group]
        length = [int(rollout.mask[j].sum()) for j in rows]
        mean = sum(n * float(returns[j, 0]) for n, j in zip(length, rows, strict=True)) / sum(length)
        assert_close(found[i], torch.full_like(found[i], mean))


@pytest.mark.parametrize("baseline", [mean_baseline, time_mean_baseline])
@pytest.mark.parametrize("reward", [0.1, 0.7, -1e6 - 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_returns_a_baseline_leaves_nothing_to_standardize(
    baseline: Callable[..., Tensor],
    reward: float,
    dtype: torch.dtype,
    sample: Callable[..., Rollout],
    policy: nn.Module,
) -> None:
    """To the bit: a rounding, standardized, would be an advantage of 1 like any other."""
    rollout = sample(policy)
    mask = torch.arange(rollout.mask.shape[1]) < torch.tensor([5, 3, 4, 5, 2, 5]).unsqueeze(1)
    rollout = replace(rollout, mask=mask)
    returns = torch.full(mask.shape, reward, dtype=dtype)
    advantage = (returns - baseline(rollout, returns)).where(mask, 0.0)
    assert advantage.eq(0).all()
    assert standardize(advantage, mask).eq(0).all()


@pytest.mark.parametrize("baseline", [mean_baseline, time_mean_baseline])
def test_where_there_is_no_other_row_a_baseline_is_0(
    baseline: Callable[..., Tensor], sample: Callable[..., Rollout], policy: nn.Module
) -> None:
    """And not the row's own return."""
    rollout = sample(policy).rows(slice(0, 1))
    assert baseline(rollout, torch.full_like(rollout.reward, 3.0)).eq(0).all()
