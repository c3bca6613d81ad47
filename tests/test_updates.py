"""What is done with the gradient: uphill, invariantly, and inside the trust region."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Gaussian, Softmax
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.func import functional_call
from torch.testing import assert_close

from policygrad.divergences import kl
from policygrad.errors import NonFiniteError, UserError
from policygrad.objectives import surrogate
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.score import token_ratio
from policygrad.updates import (
    MasterWeightsAdam,
    Measured,
    Metrics,
    Objective,
    Update,
    _begun,
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


class Problem(Measured):
    """The surrogate as a function of one policy, and how far the policy moves."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        new = self.policy(batch.obs)
        logp = new.log_prob(batch.action)
        gain = surrogate(logp, token_ratio(logp, batch.logp, batch.mask), batch.advantage)
        return average(gain, batch.weight), {"entropy": average(new.entropy(), batch.weight).detach()}

    def divergence(self, batch: Batch) -> Callable[[], Tensor]:
        with torch.no_grad():
            old = self.policy(batch.obs)
        return lambda: average(kl(old, self.policy(batch.obs)), batch.weight)


@pytest.fixture
def batch_of(sample: Callable[..., Rollout]) -> Callable[[nn.Module], Batch]:
    def batch_of(policy: nn.Module) -> Batch:
        rollout = sample(policy)
        return decisions(rollout, per_token(rollout.mask), torch.randn(6, 5))

    return batch_of


BatchOf = Callable[[nn.Module], Batch]


def flat(parameters: object) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in parameters])


def gradient(objective: Objective, batch: Batch) -> Tensor:
    return flat(torch.autograd.grad(objective(batch)[0], list(objective.parameters())))


def fisher(objective: Measured, batch: Batch) -> Tensor:
    parameters = list(objective.parameters())
    slopes = torch.autograd.grad(objective.divergence(batch)(), parameters, create_graph=True)
    return torch.stack(
        [
            flat(torch.autograd.grad(s, parameters, retain_graph=True, materialize_grads=True))
            for s in torch.cat([s.flatten() for s in slopes])
        ]
    )


# Plain ascent


class Parabola(Objective):
    """-|x - peak|^2, wherever one is."""

    def __init__(self, peak: float, size: int) -> None:
        super().__init__()
        self.x, self.peak = nn.Parameter(torch.zeros(size)), peak

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return -((self.x - self.peak) ** 2).sum(), {"x": self.x.detach().clone()}


def test_ascent_is_uphill_by_the_learning_rate_times_the_gradient(softmax: nn.Module, batch_of: BatchOf) -> None:
    batch, theta, objective = batch_of(softmax), flat(softmax.parameters()), Problem(softmax)
    g = gradient(objective, batch)
    metrics = ascend(torch.optim.SGD(softmax.parameters(), lr=1e-3))(objective, batch)
    assert_close(flat(softmax.parameters()), theta + 1e-3 * g)
    assert_close(metrics["gradient_norm"], g.norm())
    assert "entropy" in metrics


def test_ascent_reaches_the_top(softmax: nn.Module, batch_of: BatchOf) -> None:
    objective, batch = Parabola(3.0, 3), batch_of(softmax)
    update = ascend(torch.optim.SGD(objective.parameters(), lr=0.25))
    for _ in range(60):  # the gradient of the step before is not added to
        update(objective, batch)
    assert_close(objective.x.detach(), torch.full((3,), 3.0))


@pytest.mark.parametrize(("bound", "length"), [(100.0, 10.0), (1.0, 1.0), (torch.inf, 10.0)])
def test_a_long_gradient_is_shortened_and_its_length_reported_before(
    bound: float, length: float, softmax: nn.Module, batch_of: BatchOf
) -> None:
    objective = Parabola(5 / 2**0.5, 2)  # a slope of 10
    update = ascend(torch.optim.SGD([{"params": [objective.x]}], lr=1.0), max_grad_norm=bound)
    metrics = update(objective, batch_of(softmax))
    assert_close(metrics["gradient_norm"], torch.tensor(10.0))
    assert_close(objective.x.detach().norm(), torch.tensor(length), rtol=1e-6, atol=0)


class Recorded(Problem):
    """One part that is linear in the weights, and one that divides by their sum; and how many rows it saw each time."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        self.seen: list[int] = []

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        self.seen.append(len(batch.mask))
        gain, _ = super().forward(batch)
        entropy = average(self.policy(batch.obs).entropy(), batch.weight / batch.weight.sum())
        return gain + 0.3 * entropy, {"gain": gain.detach(), "entropy": entropy.detach()}


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 6, 100])
def test_in_micro_batches_the_step_and_the_metrics_are_the_same(
    rows: int, softmax: nn.Module, batch_of: BatchOf
) -> None:
    batch, theta = batch_of(softmax), flat(softmax.parameters())
    batch = batch._replace(weight=batch.weight * torch.rand(6, 5))
    objective = Recorded(softmax)

    def step(**options: int) -> tuple[Tensor, Metrics]:
        nn.utils.vector_to_parameters(theta.clone(), softmax.parameters())
        objective.seen.clear()
        update = ascend(torch.optim.SGD(softmax.parameters(), lr=1.0), max_grad_norm=0.01, **options)
        metrics = update(objective, batch)
        return flat(softmax.parameters()), metrics

    whole, metrics = step()
    assert objective.seen == [6]
    split, split_metrics = step(micro_batch=rows)
    assert objective.seen == [len(x) for x in torch.arange(6).split(rows)]
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
        update = ascend(torch.optim.Adam(softmax.parameters(), lr=0.1), micro_batch=rows)
        for part in (batch, nothing):
            metrics = update(Problem(softmax), part)
        assert metrics.keys() == {"entropy", "gradient_norm"}
        ends.append(flat(softmax.parameters()))
    assert_close(*ends, rtol=0, atol=1e-14)


# The natural step

STEP_SIZES = [partial(kl_radius, delta=1e-2), partial(learning_rate, rate=0.1)]
in_other_coordinates = pytest.mark.parametrize("step_size", STEP_SIZES, ids=["kl_radius", "learning_rate"])


class Reparameterized(nn.Module):
    """A policy in coordinates phi, with theta = A phi + b."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        theta = flat(policy.parameters())
        self.matrix, self.shift = (
            torch.randn(len(theta), len(theta)) + 4 * torch.eye(len(theta)),
            torch.randn_like(theta),
        )
        self.phi = nn.Parameter(torch.linalg.solve(self.matrix, theta - self.shift))
        self.shapes = {name: p.shape for name, p in policy.named_parameters()}
        self.policies = [policy]  # in a list: its parameters are not this module's

    def theta(self) -> Tensor:
        return self.matrix @ self.phi + self.shift

    def forward(self, obs: Tensor) -> Distribution:
        pieces = self.theta().split([shape.numel() for shape in self.shapes.values()])
        named = {n: x.view(s) for (n, s), x in zip(self.shapes.items(), pieces, strict=True)}
        return functional_call(self.policies[0], named, (obs,))


@in_other_coordinates
def test_the_natural_step_is_the_same_in_other_coordinates(
    step_size: Callable[[Tensor], Tensor], gaussian: nn.Module, batch_of: BatchOf
) -> None:
    batch, theta, other = batch_of(gaussian), flat(gaussian.parameters()), Reparameterized(gaussian)
    assert_close(other.theta().detach(), theta)
    update = natural_step(step_size=step_size, **exactly)
    update(Problem(other), batch)
    update(Problem(gaussian), batch)
    assert (flat(gaussian.parameters()) - theta).norm() > 1e-2
    assert_close(other.theta().detach(), flat(gaussian.parameters()), atol=1e-8, rtol=0)


def test_the_plain_step_is_another_in_other_coordinates(gaussian: nn.Module, batch_of: BatchOf) -> None:
    batch, theta, other = batch_of(gaussian), flat(gaussian.parameters()), Reparameterized(gaussian)
    ascend(torch.optim.SGD(other.parameters(), lr=0.1))(Problem(other), batch)
    ascend(torch.optim.SGD(gaussian.parameters(), lr=0.1))(Problem(gaussian), batch)
    step, changed = flat(gaussian.parameters()) - theta, other.theta().detach() - theta
    assert torch.cosine_similarity(step, changed, dim=0) < 0.99
    assert (step - changed).norm() > 0.1 * step.norm()


def test_the_kl_of_a_natural_step_is_delta_to_second_order(gaussian: nn.Module, batch_of: BatchOf) -> None:
    batch, theta, objective = batch_of(gaussian), flat(gaussian.parameters()), Problem(gaussian)
    error = []
    for delta in (1e-2, 1e-4, 1e-6):
        nn.utils.vector_to_parameters(theta.clone(), gaussian.parameters())
        moved = objective.divergence(batch)
        metrics = natural_step(step_size=partial(kl_radius, delta=delta), **exactly)(objective, batch)
        assert_close(metrics["kl_old"], moved().detach())
        error.append(abs(metrics["kl_old"] / delta - 1).item())
    assert error[0] < 0.2
    assert error[1] < error[0] / 3  # smaller as the root of delta, or faster
    assert error[2] < error[1] / 5


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_learning_rate_is_that_times_the_solution(damping: float, gaussian: nn.Module, batch_of: BatchOf) -> None:
    batch, theta, objective = batch_of(gaussian), flat(gaussian.parameters()), Problem(gaussian)
    g = gradient(objective, batch)
    matrix = fisher(objective, batch) + damping * torch.eye(len(g))
    before = objective(batch)[0].item()
    update = natural_step(step_size=partial(learning_rate, rate=0.05), damping=damping, cg_iters=200)
    metrics = update(objective, batch)
    assert_close(flat(gaussian.parameters()), theta + 0.05 * torch.linalg.solve(matrix, g), atol=1e-8, rtol=0)
    assert_close(metrics["step_size"], torch.tensor(0.05))
    assert_close(metrics["gradient_norm"], g.norm())
    assert_close(metrics["improvement"], objective(batch)[0].detach() - before)
    assert "entropy" in metrics


def test_kl_radius_is_its_equation() -> None:
    assert_close(kl_radius(torch.tensor(8.0), delta=0.01), torch.tensor(0.05))
    assert_close(learning_rate(torch.tensor(8.0), rate=0.3), torch.tensor(0.3))


@pytest.mark.parametrize("update", [*(natural_step(step_size=s) for s in STEP_SIZES), trust_region_step()])
def test_without_a_gradient_nothing_moves(update: Update, policy: nn.Module, batch_of: BatchOf) -> None:
    batch = batch_of(policy)
    batch = batch._replace(advantage=torch.zeros_like(batch.advantage))
    theta = flat(policy.parameters())
    metrics = update(Problem(policy), batch)
    assert torch.equal(flat(policy.parameters()), theta)
    assert all(torch.isfinite(x) for x in metrics.values())
    assert metrics["kl_old"] == metrics["improvement"] == metrics["gradient_norm"] == 0


# The trust region


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("make", [Softmax, Gaussian])
@pytest.mark.parametrize("delta", [1e-3, 1e-2, 0.3, 3.0])
def test_a_trust_region_step_never_exceeds_delta_and_never_lowers_the_surrogate(
    delta: float, make: type[nn.Module], seed: int, batch_of: BatchOf
) -> None:
    torch.manual_seed(seed)
    policy = make()
    batch, theta, objective = batch_of(policy), flat(policy.parameters()), Problem(policy)
    before, distance = objective(batch)[0].detach(), objective.divergence(batch)
    metrics = trust_region_step(delta=delta, damping=1e-3)(objective, batch)
    with torch.no_grad():
        improvement, moved = objective(batch)[0] - before, distance()
    assert moved <= delta
    assert improvement >= 0
    assert_close(metrics["improvement"], improvement)
    assert_close(metrics["kl_old"], moved)
    if metrics["accepted"]:
        assert improvement > 0
        assert metrics["step_fraction"].item() in [pytest.approx(0.8**k) for k in range(10)]
    else:
        assert torch.equal(flat(policy.parameters()), theta)
    if delta <= 1e-2:
        assert metrics["accepted"]
        assert moved > 0.1 * delta


class Obstacle(Problem):
    """The same gradient and curvature where it starts, and something in the way everywhere else."""

    def __init__(self, policy: nn.Module, kind: str) -> None:
        super().__init__(policy)
        self.kind, self.here = kind, flat(policy.parameters())

    def away(self) -> Tensor:
        return ((torch.cat([p.reshape(-1) for p in self.policy.parameters()]) - self.here) ** 2).sum()

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = super().forward(batch)
        if self.kind == "lower":
            value = value - 1e9 * self.away()
        if self.kind == "NaN value" and self.away() > 0:
            value = value * torch.nan
        return value, metrics

    def divergence(self, batch: Batch) -> Callable[[], Tensor]:
        moved = super().divergence(batch)
        if self.kind == "too far":
            return lambda: moved() + 1e12 * self.away() ** 2
        if self.kind == "NaN divergence":
            return lambda: moved() * torch.nan if self.away() > 0 else moved()
        return moved


@pytest.mark.parametrize("kind", ["lower", "too far", "NaN value", "NaN divergence", "no tries"])
def test_if_no_step_is_accepted_the_parameters_are_what_they_were_bit_for_bit(
    kind: str, policy: nn.Module, batch_of: BatchOf
) -> None:
    batch, theta = batch_of(policy), flat(policy.parameters())
    update = trust_region_step(backtracks=0 if kind == "no tries" else 10)
    metrics = update(Obstacle(policy, kind), batch)
    assert torch.equal(flat(policy.parameters()), theta)
    assert metrics["accepted"] == metrics["improvement"] == metrics["kl_old"] == metrics["step_fraction"] == 0
    assert metrics["gradient_norm"] > 0


def far(policy: nn.Module, batch: Batch, rule: Callable[..., Update] = trust_region_step, **options: object) -> tuple:
    """The metrics and the step of a rule that goes so far that its second-order KL is wrong; the policy stays."""
    start = flat(policy.parameters())
    metrics = rule(damping=1e-4, **options)(Problem(policy), batch)
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
    batch, theta, objective = batch_of(gaussian), flat(gaussian.parameters()), Problem(gaussian)
    options = {"damping": 0.1, "cg_iters": 10}
    natural_step(step_size=partial(kl_radius, delta=1e-4), **options)(objective, batch)
    natural = flat(gaussian.parameters())
    nn.utils.vector_to_parameters(theta, gaussian.parameters())
    found = trust_region_step(delta=1e-4, **options)(objective, batch)
    assert found["step_fraction"] == 1
    assert_close(flat(gaussian.parameters()), natural)


# A gradient that is no number


def adam_in_motion(policy: nn.Module, batch: Batch) -> Update:
    """Ascent with momentum: what is left of earlier steps must not move the parameters either."""
    update = ascend(torch.optim.Adam(policy.parameters(), lr=0.1), max_grad_norm=0.5)
    update(Problem(policy), batch)
    return update


UPDATES = {
    "ascend": adam_in_motion,
    "ascend in micro-batches": lambda policy, batch: ascend(
        torch.optim.SGD(policy.parameters(), lr=1.0), micro_batch=2
    ),
    "natural_step": lambda policy, batch: natural_step(step_size=STEP_SIZES[0]),
    "trust_region_step": lambda policy, batch: trust_region_step(),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", UPDATES)
def test_a_gradient_that_is_not_finite_is_refused_before_anything_changes(
    name: str, bad: float, policy: nn.Module, batch_of: BatchOf
) -> None:
    batch = batch_of(policy)
    update = UPDATES[name](policy, batch)
    theta = flat(policy.parameters())
    spoiled = batch._replace(advantage=batch.advantage.index_fill(0, torch.tensor(5), bad))
    with pytest.raises(NonFiniteError, match=r"^the objective is (nan|-?inf): a lower learning rate") as raised:
        update(Problem(policy), spoiled)
    assert torch.equal(flat(policy.parameters()), theta)
    assert isinstance(raised.value, UserError)
    assert len(str(raised.value)) <= 200


class Lost(Problem):
    """A value that is NaN, and a gradient that is not: that of a clamp is 0 there."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = super().forward(batch)
        first = next(self.parameters()).flatten()[0]
        return value + (torch.nan + first).clamp(max=20), metrics


@pytest.mark.parametrize("name", UPDATES)
def test_a_value_that_is_nan_is_refused_though_its_gradient_is_finite(
    name: str, policy: nn.Module, batch_of: BatchOf
) -> None:
    batch = batch_of(policy)
    update = UPDATES[name](policy, batch)
    theta = flat(policy.parameters())
    value = Lost(policy)(batch)[0]
    if "natural" not in name and "trust" not in name:
        assert all(x.isfinite().all() for x in torch.autograd.grad(value, list(policy.parameters())) if x is not None)
    with pytest.raises(NonFiniteError, match=r"^the objective is nan"):
        update(Lost(policy), batch)
    assert torch.equal(flat(policy.parameters()), theta)


class Endless(Problem):
    """A finite value whose slope is infinite, in one parameter of many."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = super().forward(batch)
        first = next(self.parameters()).flatten()[0]
        return value + (first - first.detach()).abs().sqrt(), metrics


@pytest.mark.parametrize("name", UPDATES)
def test_an_infinite_slope_of_a_finite_value_is_refused_too(name: str, policy: nn.Module, batch_of: BatchOf) -> None:
    batch = batch_of(policy)
    update = UPDATES[name](policy, batch)
    theta = flat(policy.parameters())
    assert Endless(policy)(batch)[0].isfinite()
    with pytest.raises(NonFiniteError):
        update(Endless(policy), batch)
    assert torch.equal(flat(policy.parameters()), theta)


# Master weights.


def _adam(parameter: nn.Parameter, rate: float = 1e-6) -> MasterWeightsAdam:
    return MasterWeightsAdam([parameter], lr=rate, eps=1e-8)


def _weights(dtype: torch.dtype) -> nn.Parameter:
    """The same numbers in every type: bfloat16 represents them."""
    return nn.Parameter((1 + torch.arange(200) / 128).to(torch.bfloat16).to(dtype))


def test_small_updates_of_bfloat16_weights_add_up_as_in_float32() -> None:
    exact, coarse = _weights(torch.float32), _weights(torch.bfloat16)
    start = exact.detach().clone()
    optimizers = [torch.optim.Adam([exact], lr=1e-4, eps=1e-8), _adam(coarse, 1e-4)]
    for _ in range(300):
        gradient = torch.randn(200, dtype=torch.float32).abs()
        for p, optimizer in zip((exact, coarse), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(optimizers[1].state[coarse]["master"], exact.detach())
    assert torch.equal(coarse, exact.to(torch.bfloat16))
    moved, expected = (coarse.float() - start).mean(), (exact - start).mean()
    assert_close(moved, expected, rtol=0, atol=2**-9)
    assert expected < -0.01


def test_at_the_default_rate_every_weight_moves() -> None:
    p = _weights(torch.bfloat16)
    before, optimizer = p.detach().float(), _adam(p)
    p.grad = torch.ones(200, dtype=torch.float32)
    optimizer.step()
    assert (optimizer.state[p]["master"] < before).all()
    assert torch.equal(p.detach().float(), before), "one such step is lost in bfloat16"


def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = _adam(p)
    for _ in range(1000):
        p.sum().backward()
    assert p.grad is not None
    assert p.grad.dtype == torch.float32
    assert p.grad.item() == 1000, "in bfloat16 it would stay at 256"
    memory = p.data_ptr()
    optimizer.step()
    assert (p.dtype, p.data_ptr()) == (torch.bfloat16, memory)


def test_the_master_weights_are_in_the_state_and_resume_bit_for_bit() -> None:
    def steps(p: nn.Parameter, optimizer: MasterWeightsAdam, count: int) -> None:
        for k in range(count):
            p.grad = torch.full((200,), 1.0 + k, dtype=torch.float32)
            optimizer.step()

    whole = _weights(torch.bfloat16)
    first = _adam(whole, 1e-5)
    steps(whole, first, 50)
    other = nn.Parameter(torch.zeros(200, dtype=torch.bfloat16))
    second = _adam(other, 1e-5)
    second.load_state_dict(deepcopy(first.state_dict()))
    assert torch.equal(other, whole)
    for p, optimizer in ((whole, first), (other, second)):
        steps(p, optimizer, 50)
    for name in ("master", "exp_avg", "exp_avg_sq"):
        assert second.state[other][name].dtype == torch.float32
        assert torch.equal(second.state[other][name], first.state[whole][name])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_that_is_loaded_has_taken_its_first_step(make: Any) -> None:
    """SGD without momentum has nothing else that says so; a compiled update would take its first step plain again."""
    first, second = (make([nn.Parameter(torch.ones(3))], lr=0.1) for _ in range(2))

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return first.param_groups[0]["params"][0].sum(), {}

    mask = torch.ones(1, 1, dtype=torch.bool)
    assert not _begun([first])
    ascend(first)(objective, Batch(mask, mask, mask, mask, mask, mask, mask, mask))
    assert _begun([first])
    second.load_state_dict(deepcopy(first.state_dict()))
    assert _begun([second])
    assert not _begun([second, make([nn.Parameter(torch.ones(3))], lr=0.1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_weights_are_adams_bit_for_bit(dtype: torch.dtype) -> None:
    ours, theirs = _weights(dtype), _weights(dtype)
    for p, optimizer in ((ours, _adam(ours)), (theirs, torch.optim.Adam([theirs], lr=1e-6))):
        p.grad = torch.linspace(-1, 1, 200, dtype=dtype)
        optimizer.step()
        assert "master" not in optimizer.state[p]
    assert torch.equal(ours, theirs)


def test_float16_is_not_trained() -> None:
    with pytest.raises(
        UserError, match=r"weights in float16 cannot be trained.*float32 or bfloat16.*lora_rank"
    ) as raised:
        _adam(_weights(torch.float16))
    assert len(str(raised.value)) <= 200


# Policy and critic apart


class Together(Objective):
    """A slope of 3 in the policy, and of 4,000 in the critic."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.policy, self.critic = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        if shared:
            self.critic = nn.Sequential(self.policy, self.critic)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        one = torch.ones(1, 1)
        return (3 * self.policy(one) - 4000 * self.critic(one)).sum(), {}


@pytest.fixture
def batch(softmax: nn.Module, batch_of: BatchOf) -> Batch:
    return batch_of(softmax)


def test_the_size_of_the_critics_error_does_not_shrink_the_policys_step(batch: Batch) -> None:
    objective = Together()
    before = flat(objective.parameters())
    metrics = ascend(torch.optim.SGD(objective.parameters(), lr=1.0), max_grad_norm=0.5)(objective, batch)
    assert_close(flat(objective.parameters()) - before, torch.tensor([0.5, -0.5]), rtol=1e-5, atol=0)
    assert_close((metrics["gradient_norm"], metrics["critic_gradient_norm"]), (torch.tensor(3.0), torch.tensor(4000.0)))


def test_where_they_share_a_parameter_there_is_one_norm(batch: Batch) -> None:
    objective = Together(shared=True)
    before = flat(objective.parameters())
    metrics = ascend(torch.optim.SGD(objective.parameters(), lr=1.0), max_grad_norm=0.5)(objective, batch)
    assert_close((flat(objective.parameters()) - before).norm(), torch.tensor(0.5), rtol=1e-5, atol=0)
    assert metrics["gradient_norm"] > 100
    assert "critic_gradient_norm" not in metrics


# An optimizer of something else


def test_a_parameter_that_the_optimizer_lacks_is_named(batch: Batch) -> None:
    objective = Together()
    update = ascend(torch.optim.SGD(objective.policy.parameters(), lr=1.0))
    with pytest.raises(UserError, match=r"the optimizer lacks 'critic.weight'.*requires_grad_\(False\)") as raised:
        update(objective, batch)
    assert len(str(raised.value)) <= 200
    objective.critic.requires_grad_(False)
    update(objective, batch)


def test_a_parameter_that_the_objective_lacks_is_refused(batch: Batch) -> None:
    objective, other = Together(), nn.Linear(2, 5)
    update = ascend(torch.optim.SGD([*objective.parameters(), *other.parameters()], lr=1.0))
    with pytest.raises(
        UserError, match=r"2 parameters that the objective lacks, the first of shape \(5, 2\)"
    ) as raised:
        update(objective, batch)
    assert len(str(raised.value)) <= 200


def test_an_optimizer_of_the_module_as_it_was_is_refused(batch: Batch) -> None:
    objective = Together()
    update = ascend(torch.optim.SGD(objective.parameters(), lr=1.0))
    objective.policy.weight = nn.Parameter(objective.policy.weight.detach().clone())  # as some .to(device) do
    with pytest.raises(UserError, match=r"the optimizer lacks 'policy\.weight'"):
        update(objective, batch)


@pytest.mark.parametrize("part", ["policy", "critic"])
def test_a_module_that_no_gradient_reaches_is_named(part: str, batch: Batch) -> None:
    objective = Together()
    getattr(objective, part).register_forward_hook(lambda module, inputs, output: output.detach())
    before = flat(objective.parameters())
    with pytest.raises(UserError, match=f"no gradient reaches the {part}") as raised:
        ascend(torch.optim.SGD(objective.parameters(), lr=1.0))(objective, batch)
    assert len(str(raised.value)) <= 200
    assert torch.equal(flat(objective.parameters()), before)


def test_an_objective_without_a_gradient_is_refused(batch: Batch) -> None:
    objective = Together()
    for part in (objective.policy, objective.critic):
        part.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(UserError, match="the objective has no gradient"):
        ascend(torch.optim.SGD(objective.parameters(), lr=1.0))(objective, batch)


def test_a_function_of_any_tensor_is_ascended_too(batch: Batch) -> None:
    x = torch.zeros(2, requires_grad=True)
    metrics = ascend(torch.optim.SGD([x], lr=1.0))(lambda _: ((3 * x).sum(), {}), batch)
    assert_close(x.detach(), torch.full((2,), 3.0))
    assert metrics.keys() == {"gradient_norm"}
