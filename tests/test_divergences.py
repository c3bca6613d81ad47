"""KL and its estimates, against sums over every outcome."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.testing import assert_close

from policygrad.divergences import AdaptiveCoefficient, k1, k2, k3, kl, straight_through

pytestmark = pytest.mark.usefixtures("float64")


def exact(p: Tensor, q: Tensor) -> Tensor:
    """sum_a p(a) log(p(a) / q(a)) of log-probabilities [1, A]."""
    return sum(p[0, a].exp() * (p[0, a] - q[0, a]) for a in range(p.shape[1]))


def two_policies() -> tuple[Tensor, Tensor]:
    return torch.randn(1, 5).requires_grad_(), torch.randn(1, 5).requires_grad_()


def test_kl_of_softmax_policies_is_the_sum() -> None:
    p, q = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    found = kl(Categorical(logits=p), Categorical(logits=q))
    for b in range(2):
        for t in range(3):
            assert_close(found[b, t], exact(p.log_softmax(-1)[b, t][None], q.log_softmax(-1)[b, t][None]))


def test_kl_of_gaussian_policies_is_the_integral() -> None:
    """Of log p - log q, a polynomial of degree 2 in the action, by quadrature along each axis."""
    p, q = (Independent(Normal(torch.randn(1, 1, 2), torch.rand(1, 1, 2) + 0.5), 1) for _ in range(2))
    x = torch.linspace(-12, 12, 4001)[:, None]
    integral = 0.0
    for i in range(2):
        pi, qi = (Normal(d.base_dist.loc[0, 0, i], d.base_dist.scale[0, 0, i]) for d in (p, q))
        integral += torch.trapezoid(pi.log_prob(x).exp() * (pi.log_prob(x) - qi.log_prob(x)), x, dim=0)
    assert_close(kl(p, q)[0, 0], integral[0])


def test_kl_without_a_closed_form_says_so() -> None:
    class Unknown(Distribution):
        arg_constraints = {}  # noqa: RUF012

    with pytest.raises(NotImplementedError):
        kl(Unknown(torch.Size([1, 1])), Unknown(torch.Size([1, 1])))


@pytest.mark.parametrize("estimate", [k1, k3])
def test_k1_and_k3_are_unbiased(estimate: object) -> None:
    p, q = (x.log_softmax(1) for x in two_policies())
    assert_close((p.exp() * estimate(p, q)).sum(), exact(p, q))


def test_k2_and_k3_are_never_negative_and_k1_is() -> None:
    p, q = (x.log_softmax(1) for x in two_policies())
    assert (k2(p, q) > 0).all()
    assert (k3(p, q) > 0).all()
    assert (k1(p, q) < 0).any()


@pytest.mark.parametrize("estimate", [k1, k2, k3])
def test_estimates_of_a_policy_to_itself_are_0(estimate: object) -> None:
    p = torch.randn(2, 3)
    assert estimate(p, p).eq(0).all()


def test_k3_of_two_near_policies_does_not_cancel() -> None:
    small = torch.full((1, 1), 1e-4, dtype=torch.float32)
    assert_close(k3(torch.zeros_like(small), small), small**2 / 2, rtol=1e-2, atol=0)


def expected_gradient(estimate: object, logits_p: Tensor, logits_q: Tensor, by: Tensor) -> Tensor:
    """E_{a ~ p}[grad estimate(a)]: the samples are given, only the estimate is differentiated."""
    p, q = logits_p.log_softmax(1), logits_q.log_softmax(1)
    return torch.autograd.grad((p.detach().exp() * estimate(p, q)).sum(), by)[0]


def test_the_expected_gradient_of_k2_on_policy_is_that_of_the_kl() -> None:
    p, q = two_policies()
    true = torch.autograd.grad(exact(p.log_softmax(1), q.log_softmax(1)), p)[0]
    assert_close(expected_gradient(k2, p, q, by=p), true)


def test_the_expected_gradient_of_k3_when_the_sampler_is_the_old_policy_is_that_of_kl_old_new() -> None:
    old, new = two_policies()
    true = torch.autograd.grad(exact(old.log_softmax(1), new.log_softmax(1)), new)[0]
    assert_close(expected_gradient(k3, old, new, by=new), true)


def test_the_expected_gradient_of_k3_on_policy_is_that_of_the_kl_the_other_way() -> None:
    p, q = two_policies()
    other_way = torch.autograd.grad(exact(q.log_softmax(1), p.log_softmax(1)), p)[0]
    assert_close(expected_gradient(k3, p, q, by=p), other_way)


def test_the_expected_gradient_of_k1_on_policy_is_0() -> None:
    p, q = two_policies()
    assert_close(expected_gradient(k1, p, q, by=p), torch.zeros(1, 5))


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [(0.0, 0.5), (0.0199, 0.5), (0.0201, 1.0), (0.03, 1.0), (0.0449, 1.0), (0.0451, 2.0), (9.0, 2.0)],
)
def test_the_coefficient_halves_below_and_doubles_above(divergence: float, expected: float) -> None:
    coefficient = AdaptiveCoefficient(1.0, target=0.03)
    coefficient.update(divergence)
    assert coefficient.value.item() == expected


def test_the_coefficient_changes_in_place() -> None:
    coefficient = AdaptiveCoefficient(1.0, target=0.01)
    held = coefficient.value
    coefficient.update(1.0)
    assert held.item() == 2
    coefficient.update(0.0)
    coefficient.update(0.0)
    assert held.item() == 0.5
    coefficient.load_state_dict({"value": 0.25})
    assert held.item() == 0.25


@pytest.mark.parametrize("divergence", [0.0, 0.1, 100.0])
def test_without_a_target_the_coefficient_is_constant(divergence: float) -> None:
    coefficient = AdaptiveCoefficient(0.7)
    coefficient.update(divergence)
    assert_close(coefficient.value, torch.tensor(0.7))


def test_the_coefficients_state_is_its_value_bit_for_bit() -> None:
    coefficient = AdaptiveCoefficient(0.1, target=0.01)
    for divergence in (1.0, 1.0, 0.0, 1.0):
        coefficient.update(divergence)
    other = AdaptiveCoefficient(5.0, target=0.01)
    other.load_state_dict(coefficient.state_dict())
    assert torch.equal(other.value, coefficient.value)


@pytest.mark.parametrize(("value", "target"), [(-1.0, 0.01), (1.0, 0.0), (1.0, -0.1), (1.0, torch.nan)])
def test_an_impossible_coefficient_is_refused(value: float, target: float) -> None:
    with pytest.raises(ValueError, match="coefficient"):
        AdaptiveCoefficient(value, target)


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2() -> None:
    logp, logp_ref = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    assert_close(straight_through(logp, logp_ref), k3(logp, logp_ref))
    (gradient,) = torch.autograd.grad(straight_through(logp, logp_ref).sum(), logp)
    (of_k2,) = torch.autograd.grad(k2(logp, logp_ref).sum(), logp)
    assert_close(gradient, of_k2)
