"""How decisions are averaged."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from policygrad.weights import average, normalized, per_budget, per_episode, per_row, per_token

pytestmark = pytest.mark.usefixtures("float64")
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0]]).bool()


def test_per_token_is_the_mean_of_all_decisions() -> None:
    x = torch.randn(3, 4)
    decisions = [x[b, t] for b in range(3) for t in range(4) if MASK[b, t]]
    assert_close(average(x, per_token(MASK)), sum(decisions) / 7)


def test_per_row_is_the_mean_of_the_rows_means() -> None:
    x = torch.randn(3, 4)
    rows = [[x[b, t] for t in range(4) if MASK[b, t]] for b in range(3)]
    assert_close(average(x, per_row(MASK)), sum(sum(row) / len(row) for row in rows) / 3)


def test_per_episode_is_the_mean_of_the_rows_sums() -> None:
    x = torch.randn(3, 4)
    assert_close(average(x, per_episode(MASK)), sum(x[b, t] for b in range(3) for t in range(4) if MASK[b, t]) / 3)


def test_per_budget_is_the_sum_over_the_most_decisions_there_may_be() -> None:
    x = torch.randn(3, 4)
    assert_close(average(x, per_budget(MASK)), sum(x[b, t] for b in range(3) for t in range(4) if MASK[b, t]) / 12)


def test_per_budget_weighs_every_decision_of_every_rollout_alike() -> None:
    full, sparse = torch.ones(3, 4, dtype=torch.bool), MASK
    assert torch.equal(per_budget(full)[sparse], per_budget(sparse)[sparse])


def test_normalized_weights_add_up_to_1_or_to_0() -> None:
    weight = torch.rand(3, 4)
    assert_close(normalized(weight), weight / weight.sum())
    assert_close(normalized(1e-6 * weight), normalized(weight))
    assert normalized(torch.zeros(3, 4)).eq(0).all()


@pytest.mark.parametrize("weights", [per_token, per_row, per_episode, per_budget])
def test_a_masked_step_and_an_empty_row_weigh_nothing(weights: Callable[[Tensor], Tensor]) -> None:
    mask = torch.cat([MASK, torch.zeros(1, 4, dtype=torch.bool)])
    assert weights(mask)[~mask].eq(0).all()
    assert weights(mask)[mask].gt(0).all()
    assert weights(torch.zeros(2, 3, dtype=torch.bool)).eq(0).all()
    assert torch.equal(weights(mask)[:3], weights(MASK)), "and changes no other weight"


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_the_average_and_its_gradient_do_not_see_what_weighs_nothing(garbage: float) -> None:
    clean, weight = torch.randn(3, 4), per_row(MASK)
    x = clean.where(MASK, garbage).requires_grad_()
    mean = average(x, weight)
    mean.backward()
    assert_close(mean, average(clean, weight))
    assert_close(x.grad, weight)


def test_per_budget_takes_the_limit_of_rows_that_can_be_longer() -> None:
    assert torch.equal(per_budget(MASK, limit=50), per_budget(torch.cat([MASK, torch.zeros(3, 46).bool()], 1))[:, :4])
