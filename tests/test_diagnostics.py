"""What a practitioner looks at."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from policygrad.diagnostics import (
    after_update,
    clip_fraction,
    clip_fraction_by_side,
    explained_variance,
    mean_metrics,
    ratio_metrics,
)
from policygrad.objectives import clipped_surrogate
from policygrad.rollout import Rollout, decisions
from policygrad.score import token_ratio
from policygrad.weights import per_row, per_token

pytestmark = pytest.mark.usefixtures("float64")
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()


def test_ratio_metrics_are_their_definitions() -> None:
    old, new, weight = torch.randn(2, 4), torch.randn(2, 4), 3 * per_row(MASK)  # whatever the weights add up to
    metrics = ratio_metrics(new.where(MASK, torch.nan), old, MASK, weight)
    share = {(b, t): weight[b, t] / weight.sum() for b in range(2) for t in range(4) if MASK[b, t]}
    ratio = {bt: (new[bt] - old[bt]).exp() for bt in share}
    assert_close(metrics["kl_old"], sum(w * (ratio[bt] - 1 - ratio[bt].log()) for bt, w in share.items()))
    outside = sum(w for bt, w in share.items() if not 0.5 <= ratio[bt] <= 1.7)
    assert 0 < outside < 1
    assert_close(clip_fraction(token_ratio(new.where(MASK, torch.nan), old, MASK), weight, 0.5, 0.7), outside)
    first, second = (sum(w * ratio[bt] ** k for bt, w in share.items()) for k in (1, 2))
    assert_close(metrics["effective_sample_size"], first**2 / second)


def test_kl_is_finite_where_a_ratio_is_too_small_for_a_float() -> None:
    """k3 of a log-ratio d is e^d - 1 - d: of -110 it is 109, though e^-110 is 0 in float32."""
    old, new = torch.zeros(1, 2), torch.tensor([[0.0, -110.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    metrics = ratio_metrics(new.float(), old.float(), mask, per_token(mask))
    assert metrics["kl_old"].item() == pytest.approx(109 / 2)


def test_equal_policies_have_kl_0_nothing_clipped_and_every_sample_effective() -> None:
    logp = torch.randn(2, 4)
    metrics = ratio_metrics(logp, logp, MASK, per_token(MASK))
    assert metrics["kl_old"] == 0
    assert clip_fraction(token_ratio(logp, logp, MASK), per_token(MASK), 0.0, 0.0) == 0
    assert_close(metrics["effective_sample_size"], torch.tensor(1.0))


def test_one_ratio_that_dwarfs_the_others_leaves_one_effective_sample() -> None:
    logp = torch.zeros(2, 4)
    logp[0, 0] = 20
    metrics = ratio_metrics(logp, torch.zeros(2, 4), MASK, per_token(MASK))
    assert_close(metrics["effective_sample_size"], torch.tensor(1 / 6))
    ratio = token_ratio(logp, torch.zeros(2, 4), MASK)
    assert (
        clip_fraction(ratio, per_token(MASK), torch.inf, torch.inf) == 0
    )  # nothing is outside of an infinite interval


def test_a_minibatch_without_a_decision_has_finite_metrics() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    metrics = ratio_metrics(torch.randn(2, 4), torch.randn(2, 4), nothing, per_token(nothing))
    assert all(value == 0 for value in metrics.values())
    assert clip_fraction(torch.rand(2, 4), per_token(nothing), 0.2, 0.2) == 0


@pytest.mark.parametrize("by_row", [False, True], ids=["token ratio", "sequence ratio"])
def test_clip_fractions_by_side_are_the_shares_without_gradient(by_row: bool) -> None:
    ratio, advantage = torch.rand(40, 1 if by_row else 4) * 2, torch.randn(40, 4)
    mask = torch.rand(40, 4) < 0.7
    weight = 3 * per_row(mask)
    found = clip_fraction_by_side(ratio, advantage.where(mask, torch.nan), weight, 0.3, 0.4)
    low = high = 0.0
    for b, t in mask.nonzero().tolist():
        r, a, share = ratio[b, 0 if by_row else t], advantage[b, t], weight[b, t] / weight.sum()
        low, high = low + share * (r < 0.7 and a < 0), high + share * (r > 1.4 and a > 0)
    assert 0 < low < 0.5
    assert 0 < high < 0.5
    assert_close(found, {"clip_fraction_low": low, "clip_fraction_high": high})


def test_clip_fractions_by_side_are_where_the_clipped_surrogate_is_flat() -> None:
    ratio, advantage = (2 * torch.rand(40, 4)).requires_grad_(), torch.randn(40, 4)
    (slope,) = torch.autograd.grad(clipped_surrogate(ratio, ratio, advantage, low=0.2, high=0.3).sum(), ratio)
    weight = torch.full((40, 4), 1 / 160)
    found = clip_fraction_by_side(ratio, advantage, weight, 0.2, 0.3)
    assert_close(found["clip_fraction_low"] + found["clip_fraction_high"], slope.eq(0).double().mean())


def test_no_ratio_is_outside_of_an_infinite_interval() -> None:
    ratio, advantage = torch.tensor([[0.0, 4e8]]), torch.tensor([[-1.0, 1.0]])
    found = clip_fraction_by_side(ratio, advantage, torch.ones(1, 2), torch.inf, torch.inf)
    assert found == {"clip_fraction_low": 0, "clip_fraction_high": 0}


def test_clip_fraction_of_one_ratio_a_row_counts_all_of_its_decisions() -> None:
    ratio, weight = torch.tensor([[2.0], [1.0]]), per_token(MASK)
    assert_close(clip_fraction(ratio, weight, 0.2, 0.2), torch.tensor(4 / 6))


@pytest.mark.parametrize("micro_batch", [None, 1, 4])
@pytest.mark.parametrize("with_critic", [False, True])
def test_after_an_update_it_is_the_policy_of_now_against_the_one_that_sampled(
    with_critic: bool, micro_batch: int | None, softmax_of_prefix: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(softmax_of_prefix)
    batch = decisions(rollout, per_row(rollout.mask), *torch.randn(3, 6, 5))
    with torch.no_grad():
        for p in softmax_of_prefix.parameters():
            p.add_(0.3 * torch.randn_like(p))
        logp = softmax_of_prefix(rollout.obs).log_prob(rollout.action)
    objective = nn.Module()
    objective.policy = softmax_of_prefix
    if with_critic:
        objective.critic = nn.Linear(1, 1)  # its predictions from before the update are in the batch
    expected = ratio_metrics(logp, rollout.logp, rollout.mask, batch.weight)
    assert expected["kl_old"] > 1e-3
    if with_critic:
        expected["explained_variance"] = explained_variance(batch.value, batch.target, batch.weight)
    found = after_update(objective, batch, micro_batch=micro_batch)
    assert found.keys() == expected.keys()
    assert_close(found, expected)


def test_explained_variance_is_one_less_the_share_that_is_left() -> None:
    value, target, weight = torch.randn(2, 4), torch.randn(2, 4), torch.rand(2, 4).where(MASK, 0.0)
    left, whole = (target - value)[MASK], target[MASK]
    share = weight[MASK] / weight.sum()
    variance = [(share * (x - (share * x).sum()) ** 2).sum() for x in (left, whole)]
    spoiled = [x.where(MASK, torch.nan) for x in (value, target)]
    assert_close(explained_variance(*spoiled, weight), 1 - variance[0] / variance[1])


def test_explained_variance_is_1_for_a_perfect_critic_and_one_that_is_off_by_a_constant() -> None:
    target = torch.randn(2, 4)
    assert explained_variance(target, target, per_token(MASK)) == 1
    assert_close(explained_variance(target + 3, target, per_token(MASK)), torch.tensor(1.0))


def test_explained_variance_is_0_for_a_constant() -> None:
    value = torch.full((2, 4), 7.0)
    assert_close(explained_variance(value, torch.randn(2, 4), per_token(MASK)), torch.tensor(0.0), atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [1, 3, 10, 64, 1000])
@pytest.mark.parametrize("target", [0.1, 1 / 3, 1e6 + 0.1])
def test_explained_variance_of_equal_targets_is_0_and_not_a_quotient_of_rounding_errors(
    steps: int, target: float
) -> None:
    equal = torch.full((1, steps), target, dtype=torch.float32)
    weight = torch.full((1, steps), 1 / steps, dtype=torch.float32)
    assert explained_variance(torch.randn(1, steps, dtype=torch.float32), equal, weight) == 0


def test_metrics_have_no_gradient() -> None:
    logp = torch.randn(2, 4, requires_grad=True)
    metrics = ratio_metrics(logp, torch.zeros(2, 4), MASK, per_token(MASK))
    metrics["explained_variance"] = explained_variance(logp, torch.randn(2, 4), per_token(MASK))
    metrics |= clip_fraction_by_side(logp.exp(), torch.randn(2, 4), per_token(MASK), 0.2, 0.2)
    assert not any(value.requires_grad for value in metrics.values())


def test_mean_metrics_are_means() -> None:
    rows = [{"a": torch.tensor(1.0), "b": torch.tensor(5.0)}, {"a": torch.tensor(2.0), "b": torch.tensor(7.0)}]
    assert mean_metrics(rows) == {"a": torch.tensor(1.5), "b": torch.tensor(6.0)}


@pytest.mark.parametrize("c", [2.0**-30, 2.0**30])
def test_the_unit_of_the_values_makes_no_difference_to_what_is_explained(c: float) -> None:
    target, weight = torch.randn(4, 3, dtype=torch.float32), torch.full((4, 3), 1 / 12, dtype=torch.float32)
    value = target + 0.3 * torch.randn(4, 3, dtype=torch.float32)
    found = explained_variance(value, target, weight)
    assert 0.5 < found < 1
    assert torch.equal(explained_variance(c * value, c * target, weight), found)


def test_the_rounding_of_equal_targets_is_nothing_to_explain() -> None:
    target = torch.full((4, 3), 1e6 / 3, dtype=torch.float32)
    target[0] = torch.nextafter(target[0], torch.tensor(torch.inf))
    weight = torch.full((4, 3), 1 / 12, dtype=torch.float32)
    assert explained_variance(torch.zeros(4, 3), target, weight) == 0


def test_a_target_that_is_not_finite_is_not_hidden() -> None:
    target = torch.tensor([[1.0, torch.nan, 3.0]])
    assert explained_variance(torch.zeros(1, 3), target, torch.ones(1, 3)).isnan()
