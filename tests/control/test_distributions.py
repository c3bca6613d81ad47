"""Distributions of actions keep torch's numbers, and know their environment's actions. All in float64.

The squashed Gaussian and the Beta are compared with numerical integrals and with torch's own transformed distributions.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Independent,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.distributions.transforms import AffineTransform, TanhTransform

from policygrad.control.distributions import Coins, DiscreteActions, IndependentActions, ScaledBeta, SquashedNormal

pytestmark = pytest.mark.usefixtures("float64")
PARAMETERS = [(0.0, 1.0), (0.7, 0.3), (-1.5, 0.8), (2.5, 0.5)]
HALF_WIDTH = 2.0
BOX, PLANE = spaces.Box(-1.0, 3.0, (1,), np.float64), spaces.Box(-1.0, 3.0, (2,), np.float64)


def squashed(mean: float, std: float) -> SquashedNormal:
    return SquashedNormal(BOX, torch.tensor([mean]), torch.tensor([std]), torch.tensor([HALF_WIDTH]))


def logits() -> Tensor:
    return torch.linspace(-1, 2, 24).view(2, 3, 4)


ACTIONS: dict[str, tuple[Any, Any]] = {  # a distribution of actions, and torch's own with the same numbers
    "discrete": (lambda: DiscreteActions(spaces.Discrete(4, start=2), logits()), lambda: Categorical(logits=logits())),
    "multi-binary": (
        lambda: IndependentActions(spaces.MultiBinary(4), Coins(logits=logits())),
        lambda: Independent(Bernoulli(logits=logits()), 1),
    ),
    "box": (
        lambda: IndependentActions(spaces.Box(-1, 1, (4,)), Normal(logits(), 0.5)),
        lambda: Independent(Normal(logits(), 0.5), 1),
    ),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_samples_log_probability_entropy_and_divergence_are_torchs(name: str) -> None:
    own, torchs = (make() for make in ACTIONS[name])
    torch.manual_seed(1)
    action = own.sample()
    torch.manual_seed(1)
    assert torch.equal(action, torchs.sample())
    assert torch.equal(own.log_prob(action), torchs.log_prob(action))
    assert torch.equal(own.entropy(), torchs.entropy())
    for p, q in ((own, torchs), (torchs, own), (own, own)):
        assert torch.equal(kl_divergence(p, q), kl_divergence(torchs, torchs))


@pytest.mark.parametrize("name", [*ACTIONS, "squashed", "beta"])
def test_a_copy_and_an_expansion_act_in_the_same_space(name: str) -> None:
    box = spaces.Box(-1, 3, (4,))
    own: Distribution = {
        **{known: make for known, (make, _) in ACTIONS.items()},
        "squashed": lambda: SquashedNormal(box, logits(), logits().exp(), torch.full((4,), HALF_WIDTH)),
        "beta": lambda: ScaledBeta(box, 1 + logits().exp(), 2 + logits().exp(), torch.full((4,), 2 * HALF_WIDTH)),
    }[name]()
    action, wide = own.sample()[:, 0], own.expand((5, 2, 3))
    expected = own.to_environment(action)  # type: ignore[attr-defined]
    for other in (copy.deepcopy(own), wide):
        np.testing.assert_array_equal(other.to_environment(action), expected)  # type: ignore[attr-defined]
    assert wide.batch_shape == (5, 2, 3)
    assert wide.sample().shape[:3] == (5, 2, 3)
    assert torch.equal(wide.entropy()[4], own.entropy())


def test_the_mode_of_a_fair_coin_is_0() -> None:
    coins = Coins(logits=torch.tensor([0.0, 1e-3, -1e-3]))
    assert coins.mode.tolist() == [0, 1, 0]
    assert coins.expand((2, 3)).mode.tolist() == [[0, 1, 0]] * 2


def test_squashing_puts_0_at_the_center_and_infinity_at_the_bounds() -> None:
    action = torch.tensor([[0.0], [99.0], [-99.0], [0.5]])
    found = squashed(0.0, 1.0).to_environment(action)
    np.testing.assert_allclose(found, np.array([[1], [3], [-1], [1 + 2 * np.tanh(0.5)]]), rtol=1e-12)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "action", "expected"),
    [(-1, 1, np.int64, [-2.0, -0.1, 0.1, 2.0], [-1, 0, 0, 1]), (0, 3, np.uint8, [-5.0, 0.5, 5.0], [0, 2, 3])],
)
def test_a_squashed_integer_is_the_nearest(low: int, high: int, dtype: Any, action: Any, expected: Any) -> None:
    space = spaces.Box(low, high, (1,), dtype)
    found = SquashedNormal(space, torch.zeros(1), torch.ones(1), torch.ones(1)).to_environment(
        torch.tensor(action).unsqueeze(1)
    )
    assert found.dtype == dtype
    assert found[:, 0].tolist() == expected


def test_the_squashed_log_probability_is_a_density_over_the_environments_actions() -> None:
    """The integral of the density over an interval is the share of samples that arrive in it."""
    distribution = squashed(0.2, 0.8)
    action = torch.linspace(-0.9, 2.0, 20_001)
    mass = torch.trapezoid(distribution.log_prob(((action - 1) / HALF_WIDTH).atanh().unsqueeze(1)).exp(), action)
    taken = distribution.to_environment(distribution.sample((200_000,)))
    assert ((taken >= -0.9) & (taken <= 2.0)).mean() == pytest.approx(mass.item(), abs=0.005)


def integral(f: Tensor, x: Tensor) -> Tensor:
    return torch.trapezoid(f, x)


def grid(mean: float, std: float) -> Tensor:
    """u, as far as the normal density reaches."""
    return torch.linspace(mean - 12 * std, mean + 12 * std, 200_001)


@pytest.mark.parametrize(("mean", "std"), PARAMETERS)
def test_the_density_is_torchs_transformed_distribution(mean: float, std: float) -> None:
    base = Independent(Normal(torch.tensor([mean]), torch.tensor([std])), 1)
    transforms = [TanhTransform(), AffineTransform(1.0, HALF_WIDTH)]
    reference = TransformedDistribution(base, transforms)
    u = torch.linspace(-4, 4, 41).unsqueeze(-1)
    action = 1.0 + HALF_WIDTH * u.tanh()
    torch.testing.assert_close(squashed(mean, std).log_prob(u), reference.log_prob(action), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("mean", "std"), PARAMETERS)
def test_the_density_integrates_to_1_over_the_bounds(mean: float, std: float) -> None:
    u = grid(mean, std)
    action = HALF_WIDTH * u.tanh()
    density = squashed(mean, std).log_prob(u.unsqueeze(-1)).exp()
    inside = action.abs() < HALF_WIDTH  # where tanh rounds to 1 the grid stands still
    assert integral(density[inside], action[inside]).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("mean", "std"), [*PARAMETERS, (0.0, 5.0), (0.7, 5.0)])
def test_the_entropy_is_minus_the_integral_of_p_log_p(mean: float, std: float) -> None:
    u, p = grid(mean, std), squashed(mean, std)
    normal = Normal(mean, std).log_prob(u).exp()
    expected = -integral(normal * p.log_prob(u.unsqueeze(-1)), u)
    assert p.entropy().item() == pytest.approx(expected.item(), abs=2e-6 if std <= 3 else 2e-4)


def test_the_entropy_is_that_of_samples() -> None:
    p = SquashedNormal(PLANE, torch.tensor([0.3, -1.0]), torch.tensor([0.5, 0.9]), torch.tensor([1.0, 3.0]))
    logp = p.log_prob(p.sample((200_000,)))
    assert p.entropy().item() == pytest.approx(-logp.mean().item(), abs=5 * logp.std().item() / 200_000**0.5)


def test_the_entropy_is_not_the_gaussians() -> None:
    p = squashed(1.0, 1.0)
    assert p.entropy() < p.normal.entropy()
    assert squashed(0.0, 3.0).entropy() < squashed(0.0, 1.0).entropy(), "a wide Gaussian piles up at the bounds"


def test_the_gradient_of_the_entropy_is_that_of_the_integral() -> None:
    mean, std = torch.tensor([0.4], requires_grad=True), torch.tensor([0.7], requires_grad=True)
    half_width = torch.tensor([HALF_WIDTH])
    u = grid(0.4, 0.7)
    normal = Normal(mean, std).log_prob(u).exp()
    logp = SquashedNormal(BOX, mean, std, half_width).log_prob(u.unsqueeze(-1))
    expected = torch.autograd.grad(-integral(normal * logp, u), (mean, std))
    found = torch.autograd.grad(SquashedNormal(BOX, mean, std, half_width).entropy(), (mean, std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert gradcheck(lambda m, s: SquashedNormal(BOX, m, s, half_width).entropy(), (mean, std))


@pytest.mark.parametrize(("mean", "std"), PARAMETERS)
def test_the_divergence_is_the_integral_of_p_log_p_over_q(mean: float, std: float) -> None:
    u, p, q = grid(mean, std), squashed(mean, std), squashed(0.5, 1.2)
    point = u.unsqueeze(-1)
    action = HALF_WIDTH * u.tanh()
    log_ratio = p.log_prob(point) - q.log_prob(point)
    inside = action.abs() < HALF_WIDTH
    expected = integral((p.log_prob(point).exp() * log_ratio)[inside], action[inside])
    assert kl_divergence(p, q).item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize("u", [0.0, 5.0, -20.0, 400.0, -1e4])
def test_far_out_nothing_is_lost_or_infinite(u: float) -> None:
    point = torch.tensor([u], requires_grad=True)
    logp = squashed(0.0, 1.0).log_prob(point)
    (slope,) = torch.autograd.grad(logp, point)
    assert logp.isfinite()
    # d/du [log N(u) - log(1 - tanh(u)^2)] = -u + 2 tanh(u)
    assert slope.item() == pytest.approx(-u + 2 * torch.tensor(u).tanh().item(), rel=1e-12)


def test_dimensions_are_independent() -> None:
    mean, std, half_width = torch.tensor([0.2, -0.4]), torch.tensor([0.5, 1.5]), torch.tensor([1.0, 4.0])
    both = SquashedNormal(PLANE, mean.expand(3, 5, 2), std.expand(3, 5, 2), half_width)
    single = [SquashedNormal(BOX, mean[d : d + 1], std[d : d + 1], half_width[d : d + 1]) for d in range(2)]
    u = both.sample()
    assert (both.batch_shape, u.shape) == ((3, 5), (3, 5, 2))
    torch.testing.assert_close(both.log_prob(u), sum(p.log_prob(u[..., d : d + 1]) for d, p in enumerate(single)))
    torch.testing.assert_close(both.entropy(), sum(p.entropy() for p in single).expand(3, 5))


def test_the_mode_is_the_action_without_noise() -> None:
    p = squashed(0.7, 0.3)
    assert torch.equal(p.mode, torch.tensor([0.7]))
    assert torch.equal(p.mean, p.mode)


SHAPES = [(1.0, 1.0), (1.7, 1.7), (1.0, 3.0), (2.5, 1.2), (80.0, 40.0), (5e4, 3e4)]  # alpha, beta


def scaled(alpha: float, beta: float, dtype: torch.dtype = torch.float64) -> ScaledBeta:
    numbers = (torch.tensor([x], dtype=dtype) for x in (alpha, beta, 2 * HALF_WIDTH))
    return ScaledBeta(BOX, *numbers)


def torchs(alpha: float, beta: float) -> TransformedDistribution:
    return TransformedDistribution(Beta(alpha, beta), [AffineTransform(-1.0, 2 * HALF_WIDTH)])


@pytest.mark.parametrize(("alpha", "beta"), SHAPES)
def test_a_betas_density_is_torchs_and_its_integral_is_1(alpha: float, beta: float) -> None:
    p, x = scaled(alpha, beta), torch.linspace(0, 1, 400_001)[1:-1]
    density = p.log_prob((x.log() - (-x).log1p()).unsqueeze(-1))
    torch.testing.assert_close(density, torchs(alpha, beta).log_prob(-1 + 2 * HALF_WIDTH * x), rtol=1e-9, atol=1e-9)
    assert torch.trapezoid(density.exp(), 2 * HALF_WIDTH * x).item() == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize(("alpha", "beta"), SHAPES)
def test_a_betas_entropy_and_divergence_are_integrals(alpha: float, beta: float) -> None:
    p, q, x = scaled(alpha, beta), scaled(2.0, 3.0), torch.linspace(0, 1, 400_001)[1:-1]
    u = (x.log() - (-x).log1p()).unsqueeze(-1)
    logp, logq = p.log_prob(u), q.log_prob(u)
    entropy = -torch.trapezoid(logp.exp() * logp, 2 * HALF_WIDTH * x)
    divergence = torch.trapezoid(logp.exp() * (logp - logq), 2 * HALF_WIDTH * x)
    assert p.entropy().item() == pytest.approx(entropy.item(), abs=1e-4)
    assert kl_divergence(p, q).item() == pytest.approx(divergence.item(), abs=2e-4)
    assert kl_divergence(p, p).item() == 0


@pytest.mark.parametrize(("alpha", "beta"), SHAPES)
def test_a_betas_samples_have_its_moments_and_stay_between_the_bounds(alpha: float, beta: float) -> None:
    torch.manual_seed(0)
    p, count = scaled(alpha, beta), 100_000
    taken = p.to_environment(p.sample((count,)))[:, 0]
    mean, std = 2 * HALF_WIDTH * alpha / (alpha + beta) - 1, p.stddev.item() * HALF_WIDTH
    assert taken.mean() == pytest.approx(mean, abs=5 * std / count**0.5)
    assert taken.std() == pytest.approx(std, rel=0.02)
    assert std == pytest.approx(2 * HALF_WIDTH * Beta(alpha, beta).stddev.item())
    assert ((taken >= -1) & (taken <= 3)).all()


@pytest.mark.parametrize("u", [0.0, 30.0, -40.0, 800.0, -1e4])
def test_at_the_bounds_a_betas_numbers_are_exact_and_finite(u: float) -> None:
    """From u = 40 on x rounds to 1, and log(1 - x) by x would be infinite; from -745 on x rounds to 0."""
    p, point = scaled(2.5, 4.0), torch.tensor([u], requires_grad=True)
    (slope,) = torch.autograd.grad(p.log_prob(point), point)
    x = 1 / (1 + np.exp(-np.float64(u))) if u > -700 else 0.0
    # d/du [(alpha - 1) log x + (beta - 1) log(1 - x)] = (alpha - 1)(1 - x) - (beta - 1) x
    assert slope.item() == pytest.approx(1.5 * (1 - x) - 3 * x, rel=1e-12)
    assert p.log_prob(point).isfinite()
    assert -1 <= p.to_environment(point.unsqueeze(0)).item() <= 3


def test_single_precision_keeps_the_digits_of_a_narrow_beta() -> None:
    """log B(5e4, 3e4) is -53,000: in float32 alone it would be off by 0.01."""
    single, double = scaled(5e4, 3e4, torch.float32), scaled(5e4, 3e4)
    u = single.sample((1000,))
    assert u.dtype == single.log_prob(u).dtype == single.entropy().dtype == torch.float32
    torch.testing.assert_close(single.log_prob(u), double.log_prob(u).float(), rtol=1e-6, atol=1e-6)


def test_the_mode_of_a_beta_is_where_its_density_is_largest() -> None:
    for alpha, beta in ((2.5, 1.2), (80.0, 40.0), (1.7, 1.7)):
        p, x = scaled(alpha, beta), torch.linspace(0, 1, 100_001)[1:-1]
        best = x[p.log_prob((x.log() - (-x).log1p()).unsqueeze(-1)).argmax()]
        assert p.to_environment(p.mode.unsqueeze(0)).item() == pytest.approx(2 * HALF_WIDTH * best.item() - 1, abs=1e-4)
    assert scaled(1.0, 1.0).mode.item() == 0, "uniform: the center"
    assert scaled(1.0, 2.0).to_environment(scaled(1.0, 2.0).mode.unsqueeze(0)).item() == -1
    assert scaled(1.0, 2.0).mode.isfinite()


def test_the_gradients_of_a_beta_are_right() -> None:
    alpha, beta = (torch.tensor([x], requires_grad=True) for x in (2.5, 1.3))
    other, width, u = ScaledBeta(BOX, *torch.tensor([[2.0], [3.0], [4.0]])), torch.tensor([4.0]), torch.tensor([0.7])
    for f in (ScaledBeta.entropy, lambda p: p.log_prob(u), lambda p: kl_divergence(p, other)):
        assert gradcheck(lambda a, b, f=f: f(ScaledBeta(BOX, a, b, width)), (alpha, beta))
        assert gradgradcheck(lambda a, b, f=f: f(ScaledBeta(BOX, a, b, width)), (alpha, beta))
