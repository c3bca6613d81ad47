"""The test that a row is held to, and its estimates."""

import pytest
import torch

from policygrad.credit import baselined
from policygrad.exact.worlds import bandit
from policygrad.verify.command import exactly
from policygrad.verify.settings import listed, row_of
from policygrad.verify.statistics import Moments, agrees, estimates, judge, moments, unordered


def test_the_test_of_samples_finds_a_bias_and_no_noise():
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 2.0
    samples = mean + spread * torch.randn(10_000, 3, generator=generator, dtype=torch.float64)
    found = Moments(samples.mean(0), torch.cov(samples.T), count=10_000)
    assert agrees(found, mean, tests=100)
    assert not agrees(found, mean + torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64), tests=100)
    assert not agrees(Moments(mean * torch.nan, found.covariance, count=10_000), mean, tests=100)


@pytest.fixture
def at(float64):
    return listed("bandit", bandit(torch.tensor([[0.0, 1.0, 3.0]])), 1, seed=0)


def test_an_estimate_is_the_gradient_of_the_objective_on_those_rows(at):
    row = row_of(at, "REINFORCE", "reinforce", assign=baselined())
    found = estimates(row, at.on_policy.rollout, torch.tensor([[0], [1], [2]]))
    by_hand = at.on_policy.rollout.reward * (torch.eye(3) - at.probs)
    torch.testing.assert_close(found, by_hand)


def test_moments_are_sums_over_all_batches(at):
    row = row_of(at, "REINFORCE", "reinforce", assign=baselined())
    x, p = estimates(row, at.on_policy.rollout, torch.tensor([[0], [1], [2]])), at.probs[0]
    found = moments(row, at.on_policy)
    torch.testing.assert_close(found.mean, p @ x)
    torch.testing.assert_close(found.covariance, (p[:, None] * x).T @ x - torch.outer(p @ x, p @ x))


def test_batches_in_another_order_are_one(at):
    index, probability = at.on_policy.batches(2)
    assert index.tolist() == [[0, 0], [0, 1], [0, 2], [1, 1], [1, 2], [2, 2]]
    assert float(probability.sum()) == pytest.approx(1)
    again = unordered(torch.tensor([[1, 0], [0, 1]]), torch.tensor([0.25, 0.5]))
    assert again[0].tolist() == [[0, 1]]
    assert again[1].tolist() == [0.75]


@pytest.mark.parametrize(
    ("known", "reason", "verdict"),
    [(True, "why", "WRONG"), (False, "", "no closed form"), (False, "leans on the critic", "biased")],
)
def test_a_row_of_another_mean_is_wrong_unless_nothing_is_known_of_it(at, known, reason, verdict):
    row = row_of(at, "x", "reinforce", assign=baselined(), reason=reason)
    row = type(row)(**{**vars(row), "known": known})
    found = Moments(torch.ones(3), torch.eye(3))
    assert judge("bandit", row, found, torch.zeros(3) + 0.5, 1_000).verdict == verdict
    nan = Moments(torch.ones(3) * torch.nan, torch.eye(3))
    assert judge("bandit", row, nan, torch.ones(3), 1_000).verdict == "WRONG"


def test_exactly_is_left_as_it_was_entered():
    with exactly():
        assert torch.get_default_dtype() == torch.float64
        assert torch.get_num_threads() == 1
    assert torch.get_default_dtype() == torch.float32
