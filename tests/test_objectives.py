"""What is maximized: tables of values and slopes, and the one gradient that all share at the old policy."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.objectives import (
    clipped_squared_error,
    clipped_surrogate,
    clipped_weight,
    dual_clip,
    gamma_weight,
    penalized_surrogate,
    sigmoid_gate,
    squared_error,
    surrogate,
    within_divergence,
    without_drifted,
)
from policygrad.rollout import Batch, Rollout
from policygrad.score import score, token_ratio

pytestmark = pytest.mark.usefixtures("float64")
INF = torch.inf
LOGP = torch.full((1, 1), torch.nan)  # of a gain that does not read it


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return clipped_surrogate(LOGP.expand_as(advantage), ratio, advantage, low=low, high=high)


def value_and_slope(f: Callable[[Tensor], Tensor], x: float) -> tuple[float, float]:
    at = torch.full((1, 1), x, requires_grad=True)
    y = f(at)
    return y.item(), torch.autograd.grad(y.sum(), at)[0].item()


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "slope"),
    [
        # a good action: no more gain above 1 + high
        (2.0, 0.5, 1.0, 2.0),
        (2.0, 0.85, 1.7, 2.0),
        (2.0, 1.0, 2.0, 2.0),
        (2.0, 1.25, 2.5, 2.0),
        (2.0, 1.5, 2.6, 0.0),
        # a bad action: no more gain below 1 - low
        (-2.0, 0.5, -1.6, 0.0),
        (-2.0, 0.85, -1.7, -2.0),
        (-2.0, 1.0, -2.0, -2.0),
        (-2.0, 1.25, -2.5, -2.0),
        (-2.0, 1.5, -3.0, -2.0),
        # neither
        (0.0, 0.5, 0.0, 0.0),
        (0.0, 1.5, 0.0, 0.0),
    ],
)
def test_clipped_surrogate_with_low_0p2_and_high_0p3(
    advantage: float, ratio: float, value: float, slope: float
) -> None:
    found = value_and_slope(lambda r: clipped(r, torch.full((1, 1), advantage), 0.2, 0.3), ratio)
    assert found == pytest.approx((value, slope))


def test_clipped_surrogate_is_the_least_of_the_two_and_so_a_lower_bound() -> None:
    ratio, advantage = torch.rand(20, 20) * 3, torch.randn(20, 20)
    bound = clipped(ratio, advantage, 0.1, 0.4)
    for r, a, b in zip(ratio.flatten(), advantage.flatten(), bound.flatten(), strict=True):
        assert_close(b, min(r * a, min(max(r, torch.tensor(0.9)), torch.tensor(1.4)) * a))
    assert (bound <= surrogate(LOGP.expand_as(advantage), ratio, advantage)).all()


def test_clip_inf_is_the_surrogate() -> None:
    ratio, advantage = (torch.rand(5, 5) * 9).requires_grad_(), torch.randn(5, 5)
    assert torch.equal(clipped(ratio, advantage, INF, INF), surrogate(LOGP.expand_as(advantage), ratio, advantage))
    assert_close(torch.autograd.grad(clipped(ratio, advantage, INF, INF).sum(), ratio)[0], advantage)


def test_one_ratio_a_row_serves_every_token() -> None:
    ratio, advantage = torch.rand(3, 1) * 2, torch.randn(3, 4)
    whole = ratio.expand(3, 4)
    assert torch.equal(clipped(ratio, advantage, 0.2, 0.2), clipped(whole, advantage, 0.2, 0.2))


@pytest.mark.parametrize(
    ("advantage", "ratio", "value", "slope"),
    [
        (-2.0, 2.0, -4.0, -2.0),
        (-2.0, 5.0, -6.0, 0.0),
        (-2.0, 0.5, -1.6, 0.0),
        (2.0, 5.0, 2.4, 0.0),
        (0.0, 5.0, 0.0, 0.0),
    ],
)
def test_dual_clip_is_a_floor_of_3_advantages_where_the_advantage_is_negative(
    advantage: float, ratio: float, value: float, slope: float
) -> None:
    a = torch.full((1, 1), advantage)
    found = value_and_slope(lambda r: dual_clip(clipped(r, a, 0.2, 0.2), a, 3.0), ratio)
    assert found == pytest.approx((value, slope))


def test_dual_clip_inf_is_no_floor_and_an_advantage_of_0_gives_no_nan() -> None:
    ratio, advantage = torch.tensor([[0.5, 1.0, 90.0]]).requires_grad_(), torch.tensor([[-1.0, 0.0, -2.0]])
    gain = dual_clip(surrogate(LOGP.expand_as(advantage), ratio, advantage), advantage, INF)
    assert_close(gain, surrogate(LOGP.expand_as(advantage), ratio, advantage))
    assert_close(torch.autograd.grad(gain.sum(), ratio)[0], advantage)


def test_penalized_surrogate_is_the_gain_less_beta_times_the_divergence() -> None:
    gain, divergence = torch.randn(2, 3), torch.rand(2, 3)
    for beta in (0.0, 0.7, torch.tensor(2.0)):
        assert_close(penalized_surrogate(gain, divergence, beta), gain - float(beta) * divergence)


@pytest.mark.parametrize(("ratio", "weight"), [(0.3, 0.8), (0.9, 0.9), (1.2, 1.2), (7.0, 1.5)])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_the_gradient_of_clipped_weight_is_the_clipped_ratio_times_that_of_the_score_term(
    ratio: float, weight: float, advantage: float
) -> None:
    old = torch.full((1, 1), -1.0)

    def objective(logp: Tensor) -> Tensor:
        return clipped_weight(logp, (logp - old).exp(), torch.full((1, 1), advantage), low=0.2, high=0.5)

    logp = -1 + torch.tensor(ratio).log().item()
    assert value_and_slope(objective, logp) == pytest.approx((weight * advantage * logp, weight * advantage))


def test_surrogates_and_score_have_one_gradient_at_the_old_policy(
    policy: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout, advantage = sample(policy), torch.randn(6, 5)

    def gradient(gain: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        logp = policy(rollout.obs).log_prob(rollout.action)
        ratio = token_ratio(logp, rollout.logp, rollout.mask)
        total = gain(logp, ratio, advantage).where(rollout.mask, 0.0).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, list(policy.parameters()))])

    clipping = partial(clipped_surrogate, low=0.2, high=0.2)
    plain = gradient(score)
    assert plain.norm() > 0.1
    assert_close(gradient(surrogate), plain)
    assert_close(gradient(clipping), plain)
    assert_close(gradient(partial(clipped_weight, low=0.2, high=0.2)), plain)
    assert_close(gradient(lambda *x: dual_clip(clipping(*x), advantage, 3.0)), plain)


def test_squared_error() -> None:
    value, target = torch.randn(2, 3), torch.randn(2, 3)
    assert_close(squared_error(value, target), value**2 - 2 * value * target + target**2)


@pytest.mark.parametrize(
    ("value", "target", "error", "slope"),
    [
        (1.1, 3.0, 1.9**2, -3.8),  # within reach of the old value, 1
        (1.5, 3.0, 1.8**2, 0.0),  # nearer to the target than it may be: no slope
        (0.5, 3.0, 2.5**2, -5.0),  # moved away from the target: the full error
        (5.0, 1.0, 4.0**2, 8.0),  # far beyond the target
    ],
)
def test_clipped_squared_error_is_the_larger_of_the_two(
    value: float, target: float, error: float, slope: float
) -> None:
    old, to = torch.ones(1, 1), torch.full((1, 1), target)
    assert value_and_slope(lambda v: clipped_squared_error(v, to, old, 0.2), value) == pytest.approx((error, slope))


def test_clipped_squared_error_without_a_clip_is_the_squared_error() -> None:
    value, target, old = torch.randn(3, 5, 5)
    value.requires_grad_()
    assert_close(clipped_squared_error(value, target, old, INF), squared_error(value, target))
    assert_close(
        torch.autograd.grad(clipped_squared_error(value, target, old, INF).sum(), value)[0], 2 * (value - target)
    )


@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 1.5), (-2.0, 4.0)])
def test_the_sigmoid_gate_has_the_slope_of_the_score_at_1_and_less_beside_it(
    ratio: float, advantage: float, tau: float
) -> None:
    def gate(r: Tensor) -> Tensor:
        return sigmoid_gate(LOGP, r, torch.full((1, 1), advantage), positive=1.5, negative=4.0)

    value, slope = value_and_slope(gate, ratio)
    s = 1 / (1 + math.exp(-tau * (ratio - 1)))
    assert value == pytest.approx(4 / tau * s * advantage)
    assert slope == pytest.approx(4 * s * (1 - s) * advantage)
    assert (abs(slope) == pytest.approx(abs(advantage))) == (ratio == 1.0)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0, 3.0])
@pytest.mark.parametrize(("advantage", "power", "rate"), [(2.0, 2.0, 3.0), (-2.0, 3.0, 2.0)])
def test_the_gamma_weight_is_1_at_1_and_has_the_gradient_of_the_score(
    ratio: float, advantage: float, power: float, rate: float
) -> None:
    def gain(logp: Tensor) -> Tensor:
        w = torch.full((1, 1), ratio, requires_grad=True)
        return gamma_weight(logp, w, torch.full((1, 1), advantage), positive=(2.0, 3.0), negative=(3.0, 2.0))

    weight = ratio**power * math.exp(rate * (1 - ratio))
    assert value_and_slope(gain, -0.7) == pytest.approx((weight * advantage * -0.7, weight * advantage))
    assert (weight == 1) == (ratio == 1)


def batch_of(logp_old: list[list[float]], advantage: list[list[float]], mask: list[list[bool]] | None = None) -> Batch:
    old, a = torch.tensor(logp_old), torch.tensor(advantage)
    counts = torch.ones_like(old, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return Batch(old, old, old, counts, old, a, old, old)


def test_a_decision_is_left_out_where_its_divergence_is_too_large_on_the_side_that_the_advantage_favors() -> None:
    batch = batch_of([[-1.0] * 6], [[1.0, 1.0, 1.0, -1.0, -1.0, 0.0]])
    logp = torch.tensor([[-0.5, -0.9, -1.5, -1.5, -0.5, -0.5]])
    keep = within_divergence(None, batch, logp, divergence=lambda d, b, x: (x - b.logp).abs(), bound=0.3)
    assert keep.tolist() == [[False, True, True, False, True, True]]


def test_a_bad_row_is_left_out_where_the_policy_has_moved_away_from_it() -> None:
    """By the mean over its decisions alone; a row that has become likelier, or was good, stays."""
    old = [[-1.0, -1.0, -1.0]] * 4
    batch = batch_of(old, [[-1.0] * 3, [-1.0] * 3, [1.0] * 3, [-1.0] * 3], [[True, True, False]] * 4)
    logp = torch.tensor([[-2.0, -1.4, 9.0], [-1.4, -1.4, -99.0], [-9.0, -9.0, 0.0], [-0.1, -0.1, -9.0]])
    keep = without_drifted(None, batch, logp, bound=0.5)  # means: 0.7, 0.4, 8, -0.9
    assert keep[:, :2].tolist() == [[False] * 2, [True] * 2, [True] * 2, [True] * 2]
