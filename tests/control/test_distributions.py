"""The squashed Gaussian against numerical integrals and torch's own transformed distribution, in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import AffineTransform, TanhTransform

from policygrad.control.distributions import SquashedNormal

pytestmark = pytest.mark.usefixtures("float64")
PARAMETERS = [(0.0, 1.0), (0.7, 0.3), (-1.5, 0.8), (2.5, 0.5)]
HALF_WIDTH = 2.0


def squashed(mean: float, std: float) -> SquashedNormal:
    return SquashedNormal(torch.tensor([mean]), torch.tensor([std]), torch.tensor([HALF_WIDTH]))


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
    p = SquashedNormal(torch.tensor([0.3, -1.0]), torch.tensor([0.5, 0.9]), torch.tensor([1.0, 3.0]))
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
    logp = SquashedNormal(mean, std, half_width).log_prob(u.unsqueeze(-1))
    expected = torch.autograd.grad(-integral(normal * logp, u), (mean, std))
    found = torch.autograd.grad(SquashedNormal(mean, std, half_width).entropy(), (mean, std))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert gradcheck(lambda m, s: SquashedNormal(m, s, half_width).entropy(), (mean, std))


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
    both = SquashedNormal(mean.expand(3, 5, 2), std.expand(3, 5, 2), half_width)
    single = [SquashedNormal(mean[d : d + 1], std[d : d + 1], half_width[d : d + 1]) for d in range(2)]
    u = both.sample()
    assert (both.batch_shape, u.shape) == ((3, 5), (3, 5, 2))
    torch.testing.assert_close(both.log_prob(u), sum(p.log_prob(u[..., d : d + 1]) for d, p in enumerate(single)))
    torch.testing.assert_close(both.entropy(), sum(p.entropy() for p in single).expand(3, 5))


def test_the_mode_is_the_action_without_noise() -> None:
    p = squashed(0.7, 0.3)
    assert torch.equal(p.mode, torch.tensor([0.7]))
    assert torch.equal(p.mean, p.mode)
