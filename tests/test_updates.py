"""What is done with the gradient: uphill, invariantly, and inside the trust region."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import Gaussian, Softmax
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call
from torch.testing import assert_close

from policygrad.divergences import kl
from policygrad.objectives import surrogate
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.score import token_ratio
from policygrad.updates import (
    Divergence,
    Objective,
    ascend,
    kl_radius,
    learning_rate,
    natural_step,
    trust_region_step,
)
from policygrad.weights import average, per_token

pytestmark = pytest.mark.usefixtures("float64")
exactly = {"damping": 0.0, "cg_iters": 200}


@pytest.fixture
def gaussian(float64: None) -> nn.Module:
    return Gaussian()  # its Fisher matrix is not singular


def problem(act: Callable[[Tensor], Distribution], batch: Batch) -> tuple[Objective, Divergence]:
    """The surrogate, and KL(old, new) from what `act` is now."""
    with torch.no_grad():
        old = act(batch.obs)

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        new = act(batch.obs)
        ratio = token_ratio(new.log_prob(batch.action), batch.logp, batch.mask)
        gain = average(surrogate(ratio, batch.advantage), batch.weight)
        return gain, {"entropy": average(new.entropy(), batch.weight).detach()}

    def divergence(batch: Batch) -> Tensor:
        return average(kl(old, act(batch.obs)), batch.weight)

    return objective, divergence


@pytest.fixture
def batch_of(sample: Callable[..., Rollout]) -> Callable[[nn.Module], Batch]:
    def batch_of(policy: nn.Module) -> Batch:
        rollout = sample(policy)
        return decisions(rollout, per_token(rollout.mask), torch.randn(6, 5))

    return batch_of


BatchOf = Callable[[nn.Module], Batch]


def flat(parameters: object) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in parameters])


def gradient(objective: Objective, batch: Batch, parameters: object) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(objective(batch)[0], list(parameters))])


def fisher(divergence: Divergence, batch: Batch, parameters: list[Tensor]) -> Tensor:
    slopes = torch.autograd.grad(divergence(batch), parameters, create_graph=True)
    return torch.stack(
        [
            torch.cat(
                [h.flatten() for h in torch.autograd.grad(s, parameters, retain_graph=True, materialize_grads=True)]
            )
            for s in torch.cat([s.flatten() for s in slopes])
        ]
    )


# Plain ascent


def parabola(x: Tensor, peak: float) -> Objective:
    return lambda batch: (-((x - peak) ** 2).sum(), {"x": x.detach().clone()})


def test_ascent_is_uphill_by_the_learning_rate_times_the_gradient(softmax: nn.Module, batch_of: BatchOf) -> None:
    batch, theta = batch_of(softmax), flat(softmax.parameters())
    objective, _ = problem(softmax, batch)
    g = gradient(objective, batch, softmax.parameters())
    metrics = ascend(objective, batch, torch.optim.SGD(softmax.parameters(), lr=1e-3))
    assert_close(flat(softmax.parameters()), theta + 1e-3 * g)
    assert_close(metrics["gradient_norm"], g.norm())
    assert "entropy" in metrics


def test_ascent_reaches_the_top(softmax: nn.Module, batch_of: BatchOf) -> None:
    x = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([x], lr=0.25)
    for _ in range(60):  # the gradient of the step before is not added to
        ascend(parabola(x, 3.0), batch_of(softmax), optimizer)
    assert_close(x.detach(), torch.full((3,), 3.0))


@pytest.mark.parametrize(("bound", "length"), [(100.0, 10.0), (1.0, 1.0), (torch.inf, 10.0)])
def test_a_long_gradient_is_shortened_and_its_length_reported_before(
    bound: float, length: float, softmax: nn.Module, batch_of: BatchOf
) -> None:
    x = nn.Parameter(torch.tensor([0.0, 0.0]))
    optimizer = torch.optim.SGD([{"params": [x]}], lr=1.0)
    objective = parabola(x, 5 / 2**0.5)  # a slope of 10
    metrics = ascend(objective, batch_of(softmax), optimizer, max_grad_norm=bound)
    assert_close(metrics["gradient_norm"], torch.tensor(10.0))
    assert_close(x.detach().norm(), torch.tensor(length), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 100])
def test_in_micro_batches_the_step_and_the_metrics_are_the_same(
    rows: int, softmax: nn.Module, batch_of: BatchOf
) -> None:
    batch, theta = batch_of(softmax), flat(softmax.parameters())
    batch = batch._replace(weight=batch.weight * torch.rand(6, 5))
    seen: list[int] = []

    def objective(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One part that is linear in the weights, and one that divides by their sum."""
        seen.append(len(part.mask))
        new = softmax(part.obs)
        ratio = token_ratio(new.log_prob(part.action), part.logp, part.mask)
        gain = average(surrogate(ratio, part.advantage), part.weight)
        entropy = average(new.entropy(), part.weight / part.weight.sum())
        return gain + 0.3 * entropy, {"gain": gain.detach(), "entropy": entropy.detach()}

    def step(**options: int) -> tuple[Tensor, dict[str, Tensor]]:
        nn.utils.vector_to_parameters(theta.clone(), softmax.parameters())
        seen.clear()
        metrics = ascend(objective, batch, torch.optim.SGD(softmax.parameters(), lr=1.0), max_grad_norm=0.01, **options)
        return flat(softmax.parameters()), metrics

    whole, metrics = step()
    assert seen == [6]
    split, split_metrics = step(micro_batch=rows)
    assert seen == [len(x) for x in torch.arange(6).split(rows)]
    assert (whole - theta).norm() > 1e-3
    assert_close(split, whole, rtol=0, atol=1e-14)
    assert_close(split_metrics, metrics, rtol=1e-12, atol=1e-14)
    assert not any(x.requires_grad for x in split_metrics.values())


def test_micro_batches_in_which_nothing_counts_leave_the_optimizer_its_step(
    softmax: nn.Module, batch_of: BatchOf
) -> None:
    """The gradient is 0 and not absent: Adam goes on by its momentum, split or not."""
    batch, start = batch_of(softmax), flat(softmax.parameters())
    nothing = batch._replace(weight=torch.zeros(6, 5), mask=torch.zeros(6, 5, dtype=torch.bool))
    ends = []
    for rows in (None, 2):
        nn.utils.vector_to_parameters(start.clone(), softmax.parameters())
        optimizer = torch.optim.Adam(softmax.parameters(), lr=0.1)
        for part in (batch, nothing):
            metrics = ascend(problem(softmax, part)[0], part, optimizer, micro_batch=rows)
        assert metrics.keys() == {"entropy", "gradient_norm"}
        ends.append(flat(softmax.parameters()))
    assert_close(*ends, rtol=0, atol=1e-14)


# The natural step

STEP_SIZES = [partial(kl_radius, delta=1e-2), partial(learning_rate, rate=0.1)]
in_other_coordinates = pytest.mark.parametrize("step_size", STEP_SIZES, ids=["kl_radius", "learning_rate"])


def reparameterized(policy: nn.Module) -> tuple[Callable[[Tensor], Distribution], Tensor, Callable[[Tensor], Tensor]]:
    """The policy in coordinates phi with theta = A phi + b: (policy of phi, phi, phi -> theta)."""
    theta = flat(policy.parameters())
    matrix, shift = torch.randn(len(theta), len(theta)) + 4 * torch.eye(len(theta)), torch.randn(len(theta))
    phi = torch.linalg.solve(matrix, theta - shift).requires_grad_()
    shapes = {name: p.shape for name, p in policy.named_parameters()}

    def act(obs: Tensor) -> Distribution:
        pieces = (matrix @ phi + shift).split([shape.numel() for shape in shapes.values()])
        return functional_call(policy, {n: x.view(s) for (n, s), x in zip(shapes.items(), pieces, strict=True)}, (obs,))

    return act, phi, lambda phi: matrix @ phi.detach() + shift


@in_other_coordinates
def test_the_natural_step_is_the_same_in_other_coordinates(
    step_size: Callable[[Tensor], Tensor], gaussian: nn.Module, batch_of: BatchOf
) -> None:
    batch, theta = batch_of(gaussian), flat(gaussian.parameters())
    act, phi, to_theta = reparameterized(gaussian)
    assert_close(to_theta(phi), theta)
    natural_step(*problem(act, batch), batch, [phi], step_size=step_size, **exactly)
    natural_step(*problem(gaussian, batch), batch, gaussian.parameters(), step_size=step_size, **exactly)
    assert (flat(gaussian.parameters()) - theta).norm() > 1e-2
    assert_close(to_theta(phi), flat(gaussian.parameters()), atol=1e-8, rtol=0)


def test_the_plain_step_is_another_in_other_coordinates(gaussian: nn.Module, batch_of: BatchOf) -> None:
    batch, theta = batch_of(gaussian), flat(gaussian.parameters())
    act, phi, to_theta = reparameterized(gaussian)
    ascend(problem(act, batch)[0], batch, torch.optim.SGD([phi], lr=0.1))
    ascend(problem(gaussian, batch)[0], batch, torch.optim.SGD(gaussian.parameters(), lr=0.1))
    step, other = flat(gaussian.parameters()) - theta, to_theta(phi) - theta
    assert torch.cosine_similarity(step, other, dim=0) < 0.99
    assert (step - other).norm() > 0.1 * step.norm()


def test_the_kl_of_a_natural_step_is_delta_to_second_order(gaussian: nn.Module, batch_of: BatchOf) -> None:
    batch, theta = batch_of(gaussian), flat(gaussian.parameters())
    error = []
    for delta in (1e-2, 1e-4, 1e-6):
        torch.nn.utils.vector_to_parameters(theta, gaussian.parameters())
        objective, divergence = problem(gaussian, batch)
        step_size = partial(kl_radius, delta=delta)
        metrics = natural_step(objective, divergence, batch, gaussian.parameters(), step_size=step_size, **exactly)
        assert_close(metrics["kl"], divergence(batch).detach())
        error.append(abs(metrics["kl"] / delta - 1).item())
    assert error[0] < 0.2
    assert error[1] < error[0] / 3  # smaller as the root of delta, or faster
    assert error[2] < error[1] / 5


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_learning_rate_is_that_times_the_solution(damping: float, gaussian: nn.Module, batch_of: BatchOf) -> None:
    batch, theta = batch_of(gaussian), flat(gaussian.parameters())
    objective, divergence = problem(gaussian, batch)
    g = gradient(objective, batch, gaussian.parameters())
    matrix = fisher(divergence, batch, list(gaussian.parameters())) + damping * torch.eye(len(g))
    before = objective(batch)[0].item()
    step_size = partial(learning_rate, rate=0.05)
    metrics = natural_step(
        objective, divergence, batch, gaussian.parameters(), step_size=step_size, damping=damping, cg_iters=200
    )
    assert_close(flat(gaussian.parameters()), theta + 0.05 * torch.linalg.solve(matrix, g), atol=1e-8, rtol=0)
    assert_close(metrics["step_size"], torch.tensor(0.05))
    assert_close(metrics["gradient_norm"], g.norm())
    assert_close(metrics["improvement"], objective(batch)[0].detach() - before)
    assert "entropy" in metrics


def test_kl_radius_is_its_equation() -> None:
    assert_close(kl_radius(torch.tensor(8.0), delta=0.01), torch.tensor(0.05))
    assert_close(learning_rate(torch.tensor(8.0), rate=0.3), torch.tensor(0.3))


@pytest.mark.parametrize("rule", [*(partial(natural_step, step_size=s) for s in STEP_SIZES), trust_region_step])
def test_without_a_gradient_nothing_moves(rule: Callable[..., dict], policy: nn.Module, batch_of: BatchOf) -> None:
    batch = batch_of(policy)
    batch = batch._replace(advantage=torch.zeros_like(batch.advantage))
    theta = flat(policy.parameters())
    metrics = rule(*problem(policy, batch), batch, policy.parameters())
    assert torch.equal(flat(policy.parameters()), theta)
    assert all(torch.isfinite(x) for x in metrics.values())
    assert metrics["kl"] == metrics["improvement"] == metrics["gradient_norm"] == 0


# The trust region


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("make", [Softmax, Gaussian])
@pytest.mark.parametrize("delta", [1e-3, 1e-2, 0.3, 3.0])
def test_a_trust_region_step_never_exceeds_delta_and_never_lowers_the_surrogate(
    delta: float, make: type[nn.Module], seed: int, batch_of: BatchOf
) -> None:
    torch.manual_seed(seed)
    policy = make()
    batch, theta = batch_of(policy), flat(policy.parameters())
    objective, divergence = problem(policy, batch)
    before = objective(batch)[0].detach()
    metrics = trust_region_step(objective, divergence, batch, policy.parameters(), delta=delta, damping=1e-3)
    with torch.no_grad():
        improvement, moved = objective(batch)[0] - before, divergence(batch)
    assert moved <= delta
    assert improvement >= 0
    assert_close(metrics["improvement"], improvement)
    assert_close(metrics["kl"], moved)
    if metrics["accepted"]:
        assert improvement > 0
        assert metrics["step_fraction"].item() in [pytest.approx(0.8**k) for k in range(10)]
    else:
        assert torch.equal(flat(policy.parameters()), theta)
    if delta <= 1e-2:
        assert metrics["accepted"]
        assert moved > 0.1 * delta


def only_worse(objective: Objective, policy: nn.Module) -> Objective:
    """The same gradient here, and lower everywhere else."""
    here = [p.detach().clone() for p in policy.parameters()]

    def worse(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        away = sum(((p - q) ** 2).sum() for p, q in zip(policy.parameters(), here, strict=True))
        return objective(batch)[0] - 1e9 * away, {}

    return worse


def only_too_far(divergence: Divergence, policy: nn.Module) -> Divergence:
    """The same curvature here, and beyond any delta everywhere else."""
    here = [p.detach().clone() for p in policy.parameters()]

    def too_far(batch: Batch) -> Tensor:
        away = sum(((p - q) ** 2).sum() for p, q in zip(policy.parameters(), here, strict=True))
        return divergence(batch) + 1e12 * away**2

    return too_far


@pytest.mark.parametrize("obstacle", ["objective", "divergence", "nan objective", "nan divergence", "no tries"])
def test_if_no_step_is_accepted_the_parameters_are_what_they_were_bit_for_bit(
    obstacle: str, policy: nn.Module, batch_of: BatchOf
) -> None:
    batch, theta = batch_of(policy), flat(policy.parameters())
    objective, divergence = problem(policy, batch)
    first = {"objective": objective, "divergence": divergence}

    def once(name: str) -> Callable:
        """As it is the first time, NaN from then on."""
        calls = []

        def f(batch: Batch) -> object:
            calls.append(1)
            found = first[name](batch)
            if len(calls) == 1:
                return found
            return (found[0] * torch.nan, {}) if name == "objective" else found * torch.nan

        return f

    objective, divergence = {
        "objective": (only_worse(objective, policy), divergence),
        "divergence": (objective, only_too_far(divergence, policy)),
        "nan objective": (once("objective"), divergence),
        "nan divergence": (objective, once("divergence")),
        "no tries": (objective, divergence),
    }[obstacle]
    backtracks = 0 if obstacle == "no tries" else 10
    metrics = trust_region_step(objective, divergence, batch, policy.parameters(), backtracks=backtracks)
    assert torch.equal(flat(policy.parameters()), theta)
    assert metrics["accepted"] == metrics["improvement"] == metrics["kl"] == metrics["step_fraction"] == 0
    assert metrics["gradient_norm"] > 0


def far(policy: nn.Module, batch: Batch, rule: Callable[..., dict] = trust_region_step, **options: object) -> tuple:
    """The metrics and the step of a rule that goes so far that its second-order KL is wrong; the policy stays."""
    start = flat(policy.parameters())
    metrics = rule(*problem(policy, batch), batch, policy.parameters(), damping=1e-4, **options)
    step = flat(policy.parameters()) - start
    nn.utils.vector_to_parameters(start, policy.parameters())
    return metrics, step


def test_more_backtracks_find_a_step_where_few_find_none(softmax: nn.Module, batch_of: BatchOf) -> None:
    batch = batch_of(softmax)
    found, _ = far(softmax, batch, delta=0.5, backtracks=20)
    assert found["accepted"] == 1
    tries = round((found["step_fraction"].log() / torch.tensor(0.8).log()).item()) + 1
    assert tries > 1
    assert far(softmax, batch, delta=0.5, backtracks=tries)[0]["accepted"] == 1
    assert far(softmax, batch, delta=0.5, backtracks=tries - 1)[0]["accepted"] == 0


@pytest.mark.parametrize("shrink", [0.3, 0.8, 0.95])
def test_the_step_is_shrunk_by_shrink_and_the_first_that_fits_is_taken(
    shrink: float, softmax: nn.Module, batch_of: BatchOf
) -> None:
    batch = batch_of(softmax)
    _, full = far(softmax, batch, natural_step, step_size=partial(kl_radius, delta=0.5))
    found, step = far(softmax, batch, delta=0.5, shrink=shrink, backtracks=60)
    assert found["accepted"] == 1
    tries = (found["step_fraction"].log() / torch.tensor(shrink).log()).item()
    assert tries == pytest.approx(round(tries))
    assert round(tries) >= 1
    assert_close(step, shrink ** round(tries) * full)
    # one try earlier it was outside, or lower
    assert far(softmax, batch, delta=0.5, shrink=shrink, backtracks=round(tries))[0]["accepted"] == 0


def test_the_full_step_is_the_natural_step_where_it_fits(gaussian: nn.Module, batch_of: BatchOf) -> None:
    batch, theta = batch_of(gaussian), flat(gaussian.parameters())
    options = {"damping": 0.1, "cg_iters": 10}
    natural_step(
        *problem(gaussian, batch), batch, gaussian.parameters(), step_size=partial(kl_radius, delta=1e-4), **options
    )
    natural = flat(gaussian.parameters())
    nn.utils.vector_to_parameters(theta, gaussian.parameters())
    found = trust_region_step(*problem(gaussian, batch), batch, gaussian.parameters(), delta=1e-4, **options)
    assert found["step_fraction"] == 1
    assert_close(flat(gaussian.parameters()), natural)
