"""KL and its estimates, against sums over every outcome."""

from collections.abc import Callable
from functools import partial
from math import log

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.testing import assert_close

from policygrad.divergences import (
    AdaptiveCoefficient,
    AdaptiveEntropy,
    at_action,
    binary_kl,
    binary_total_variation,
    k1,
    k2,
    k3,
    kl,
    kl_from_old,
    over_actions,
    reweighted,
    squared_row,
    straight_through,
    to_reference,
    total_variation,
)
from policygrad.rollout import Batch

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


# KL to a reference, as an objective uses it: in each row one prefix, and every action there is

ESTIMATES = {"k1": k1, "k2": k2, "k3": k3, "straight_through": straight_through}


def every_action(p: Tensor, q: Tensor) -> tuple[Categorical, Categorical, Batch]:
    """Two policies at one prefix [A, 1], and a batch with each action once, the last one masked."""
    count = p.shape[1]
    policies = (Categorical(logits=x.expand(count, -1).unsqueeze(1)) for x in (p, q))
    action, mask = torch.arange(count).unsqueeze(1), (torch.arange(count) < count - 1).unsqueeze(1)
    zero = torch.zeros(count, 1)
    return *policies, Batch(zero, action, zero, mask, zero, zero, zero, zero)


@pytest.mark.parametrize("name", ESTIMATES)
def test_at_the_action_it_is_the_estimate_whatever_the_ratio(name: str) -> None:
    p, q = two_policies()
    *policies, batch = every_action(p, q)
    found = at_action(*policies, batch, torch.rand(5, 1), estimate=ESTIMATES[name])
    each = ESTIMATES[name](p.log_softmax(1).T, q.log_softmax(1).T)
    assert_close(found[:4], each[:4])


@pytest.mark.parametrize("name", ESTIMATES)
def test_reweighted_it_is_the_ratio_times_the_estimate_and_the_ratio_is_a_constant(name: str) -> None:
    p, q = two_policies()
    *policies, batch = every_action(p, q)
    ratio = torch.rand(5, 1, requires_grad=True)
    found = reweighted(*policies, batch, ratio, estimate=ESTIMATES[name])
    plain = at_action(*policies, batch, ratio, estimate=ESTIMATES[name])
    assert_close(found, ratio.detach() * plain)
    slopes = [torch.autograd.grad(x[:4].sum(), p, retain_graph=True)[0] for x in (found, ratio.detach() * plain)]
    assert_close(*slopes)
    assert_close(reweighted(*policies, batch, ratio), reweighted(*policies, batch, ratio, estimate=straight_through))
    assert torch.autograd.grad(found.sum(), ratio, allow_unused=True) == (None,)


def test_over_all_actions_it_is_exact_at_every_one() -> None:
    p, q = two_policies()
    *policies, batch = every_action(p, q)
    found = over_actions(*policies, batch, torch.rand(5, 1))
    assert_close(found, exact(p.log_softmax(1), q.log_softmax(1)).expand(5, 1))


@pytest.mark.parametrize("name", ["reweighted", "over_actions"])
def test_off_the_old_policy_the_expected_gradient_is_that_of_the_kl(name: str) -> None:
    p, q = two_policies()
    old = torch.randn(1, 5).log_softmax(1)
    *policies, batch = every_action(p, q)
    batch = batch._replace(mask=torch.ones(5, 1, dtype=torch.bool))
    ratio = (p.log_softmax(1) - old).exp().T
    found = {"reweighted": reweighted, "over_actions": over_actions}[name](*policies, batch, ratio)
    (slope,) = torch.autograd.grad((old.exp().T * found).sum(), p, retain_graph=True)
    assert_close(slope, torch.autograd.grad(exact(p.log_softmax(1), q.log_softmax(1)), p)[0])


class Table(nn.Module):
    """The same logits everywhere, with something added where the observation is negative."""

    def __init__(self, logits: Tensor, elsewhere: Tensor) -> None:
        super().__init__()
        self.logits, self.elsewhere = nn.Parameter(logits.detach().clone()), elsewhere

    def forward(self, obs: Tensor) -> Categorical:
        logits = self.logits + torch.where(obs.unsqueeze(-1) < 0, self.elsewhere, 0.0)
        return Categorical(logits=logits, validate_args=False)


DIVERGENCES = {name: partial(at_action, estimate=estimate) for name, estimate in ESTIMATES.items()}
DIVERGENCES |= {f"reweighted {name}": partial(reweighted, estimate=estimate) for name, estimate in ESTIMATES.items()}
DIVERGENCES |= {"over_actions": over_actions}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_to_a_reference_it_has_no_gradient_there_and_is_0_behind_the_mask(name: str) -> None:
    p, q = two_policies()
    *policies, batch = every_action(p, q)
    reference = Table(q, torch.zeros(5))
    ratio = torch.rand(5, 1)
    found = to_reference(policies[0], batch, ratio, reference=reference, divergence=DIVERGENCES[name])
    assert_close(found[:4], DIVERGENCES[name](*policies, batch, ratio)[:4])
    assert found[4] == 0
    found.sum().backward()
    assert reference.logits.grad is None


@pytest.mark.parametrize("extreme", [100.0, 800.0, 1e6, torch.inf])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "over_actions"])
def test_an_action_behind_the_mask_that_one_of_the_two_would_never_take_has_no_gradient(
    name: str, extreme: float
) -> None:
    """Padding, as a model may see it: e^800 is infinite, and 0 times its slope is no number."""
    never = torch.zeros(5).index_fill(0, torch.tensor(4), -extreme)
    obs, action = torch.tensor([[1.0, -1.0]]), torch.tensor([[2, 4]])
    zero, mask = torch.zeros(1, 2), torch.tensor([[True, False]])
    batch = Batch(obs, action, zero, mask, zero, zero, zero, zero)
    for mine, theirs in ((never, torch.zeros(5)), (torch.zeros(5), never)):
        policy, reference = Table(torch.randn(5), mine), Table(torch.randn(5), theirs)
        options = {"reference": reference, "divergence": DIVERGENCES[name]}
        found = to_reference(policy(obs), batch, torch.ones(1, 2), **options)
        (slope,) = torch.autograd.grad(found.sum(), policy.logits)
        assert slope.isfinite().all()
        assert found[0, 1] == 0


# How far from the old policy


def test_half_the_squared_log_ratio_of_a_row_is_shared_by_its_decisions() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    new, old = torch.randn(2, 3, 3)
    found = squared_row(new, old, mask)
    assert found.shape == (3, 1)
    assert_close((found * mask).sum(1)[:2], (new - old).where(mask, 0.0).sum(1)[:2] ** 2 / 2)
    assert found[2] == 0


@pytest.mark.parametrize(("binary", "whole"), [(binary_total_variation, total_variation), (binary_kl, kl_from_old)])
def test_the_divergence_of_one_action_is_that_of_two_classes_and_at_most_that_of_all(
    binary: Callable[..., Tensor], whole: Callable[..., Tensor]
) -> None:
    p, q, batch = every_action(*(x.detach() for x in two_policies()))
    batch = batch._replace(logp=q.log_prob(batch.action))
    logp = p.log_prob(batch.action)
    found, all_of_it = binary(p, batch, logp), whole(p, batch, logp, old=lambda obs: q)
    for a in range(5):
        x, y = float(logp[a].exp()), float(batch.logp[a].exp())
        two = abs(x - y) if binary is binary_total_variation else y * log(y / x) + (1 - y) * log((1 - y) / (1 - x))
        assert found[a].item() == pytest.approx(two)
    assert (found <= all_of_it + 1e-12).all()
    each = (p.probs[0, 0], q.probs[0, 0])
    over_all = (
        (each[0] - each[1]).abs().sum() / 2 if whole is total_variation else (each[1] * (each[1] / each[0]).log()).sum()
    )
    assert_close(all_of_it, over_all.expand(5, 1))


@pytest.mark.parametrize("logp", [0.0, -1e-30, -800.0])
def test_the_binary_kl_of_a_sure_action_is_no_nan(logp: float) -> None:
    x = torch.full((1, 1), logp)
    batch = Batch(x, x, x, x == x, x, x, x, x)
    assert binary_kl(None, batch, x).item() == 0
    assert not binary_kl(None, batch, torch.full((1, 1), -0.5)).isnan()


def test_the_bonus_of_entropy_grows_while_there_is_too_little_and_is_off_above() -> None:
    rule = AdaptiveEntropy(0.5, 0.1, start=0.3)
    value, found = rule.value, []
    for entropy in (0.4, 0.5, 0.6, 0.6, 0.4):
        used = rule.adapt({"entropy": torch.tensor(entropy)})
        found.append((round(float(used["entropy_coefficient"]), 6), round(rule.raised, 6), round(float(rule.value), 6)))
    assert found == [(0.3, 0.4, 0.4), (0.4, 0.5, 0.5), (0.5, 0.4, 0.0), (0.0, 0.3, 0.0), (0.0, 0.4, 0.4)]
    assert rule.value is value, "a compiled objective keeps it"
    rule.adapt({})
    assert rule.raised == pytest.approx(0.4), "an update that was dropped says nothing"
    other = AdaptiveEntropy(0.5, 0.1)
    other.load_state_dict(rule.state_dict())
    assert other.state_dict() == rule.state_dict()


def test_it_does_not_fall_below_0() -> None:
    rule = AdaptiveEntropy(0.5, 0.1)
    rule.adapt({"entropy": torch.tensor(2.0)})
    assert rule.raised == rule.value == 0


@pytest.mark.parametrize(("target", "step", "start"), [(0.0, 0.1, 0.0), (1.0, 0.0, 0.0), (1.0, 0.1, -1.0)])
def test_an_impossible_target_of_entropy_is_refused(target: float, step: float, start: float) -> None:
    with pytest.raises(ValueError, match="entropy"):
        AdaptiveEntropy(target, step, start)
