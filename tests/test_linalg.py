"""Products with a matrix that is never formed, against the matrix."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.divergences import kl
from policygrad.linalg import add_to, conjugate_gradient, fisher_vector_product, flat_gradient, score_products
from policygrad.rollout import Rollout
from policygrad.weights import average, per_row

pytestmark = pytest.mark.usefixtures("float64")


def positive_definite(condition: float, size: int = 8) -> Tensor:
    basis = torch.linalg.qr(torch.randn(size, size)).Q
    return basis @ torch.logspace(0, -np.log10(condition), size).diag() @ basis.T


# Conjugate gradient


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4, 1e8])
def test_conjugate_gradient_is_the_dense_solve(condition: float) -> None:
    matrix, b = positive_definite(condition), torch.randn(8)
    x = conjugate_gradient(lambda v: matrix @ v, b, iters=200, tol=1e-13)
    assert (matrix @ x - b).norm() <= 1e-7 * b.norm()
    assert_close(x, torch.linalg.solve(matrix, b), rtol=1e-12 * condition + 1e-9, atol=0)


@pytest.mark.parametrize("iters", [1, 2, 3, 5])
def test_stopped_early_the_slope_along_x_is_its_curvature(iters: int) -> None:
    matrix, b = positive_definite(1e3), torch.randn(8)
    x = conjugate_gradient(lambda v: matrix @ v, b, iters)
    assert (matrix @ x - b).norm() > 1e-4 * b.norm()
    assert_close(x @ b, x @ matrix @ x)


@pytest.mark.parametrize("third", [0.0, 1e-17, -1e-17])
def test_a_direction_without_curvature_is_not_taken(third: float) -> None:
    """Rounding makes the 0 of a singular matrix any small number, whose inverse would be the whole answer."""
    matrix, b = torch.tensor([1.0, 0.5, third]).diag(), torch.tensor([1.0, 1.0, 1e-8])
    x = conjugate_gradient(lambda v: matrix @ v, b, iters=50)
    assert_close(x, torch.tensor([1.0, 2.0, 0.0]), rtol=1e-12, atol=1e-7)
    assert_close(x @ b, x @ matrix @ x)
    assert conjugate_gradient(lambda v: -v, b).eq(0).all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("product", [0, 1])
def test_a_product_that_is_not_finite_is_seen_in_the_answer(wrong: float, product: int) -> None:
    matrix, calls = positive_definite(1e3), []
    factors = {product: wrong}
    x = conjugate_gradient(lambda v: calls.append(1) or factors.get(len(calls) - 1, 1.0) * (matrix @ v), torch.randn(8))
    assert x.isnan().any()


def test_each_iteration_is_nearer() -> None:
    matrix, b = positive_definite(1e3), torch.randn(8)
    errors = [torch.linalg.solve(matrix, b) - conjugate_gradient(lambda v: matrix @ v, b, n) for n in range(8)]
    assert (torch.stack([e @ matrix @ e for e in errors]).diff() < 0).all()


@pytest.mark.parametrize(("iters", "tol", "products"), [(3, 0.0, 3), (50, 1e-10, 2), (50, 1.0, 0)])
def test_as_many_products_as_are_needed_and_not_more_than_are_allowed(iters: int, tol: float, products: int) -> None:
    matrix = torch.tensor([1.0, 1.0, 5.0, 5.0]).diag() if products == 2 else positive_definite(1e6, 4)
    calls = []
    conjugate_gradient(lambda v: calls.append(1) or matrix @ v, torch.randn(4), iters, tol)
    assert len(calls) == products


def test_nothing_is_solved_by_nothing() -> None:
    calls = []
    assert conjugate_gradient(lambda v: calls.append(1) or v, torch.zeros(4)).eq(0).all()
    assert not calls


@pytest.mark.parametrize("seed", range(20))
def test_in_single_precision_a_singular_matrix_is_solved_as_far_as_it_goes(seed: int) -> None:
    torch.manual_seed(seed)
    root = torch.randn(8, 3, dtype=torch.float32)
    matrix = root @ root.T
    b = matrix @ torch.randn(8, dtype=torch.float32)
    x = conjugate_gradient(lambda v: matrix @ v, b, iters=50)
    assert (matrix @ x - b).norm() < 1e-4 * b.norm()


def test_the_argument_is_left_as_it_was() -> None:
    b = torch.randn(4)
    before = b.clone()
    conjugate_gradient(lambda v: 2 * v, b)
    assert torch.equal(b, before)


# Gradients as vectors


def test_flat_gradient_is_every_gradient_in_order_and_0_where_nothing_depends() -> None:
    a, unused, c = torch.randn(2, 2).requires_grad_(), torch.randn(3).requires_grad_(), torch.randn(2).requires_grad_()
    gradient = flat_gradient((a.t().contiguous().flatten() * torch.arange(4.0)).sum() + (c**2).sum(), [a, unused, c])
    assert_close(gradient, torch.cat([torch.tensor([0.0, 2.0, 1.0, 3.0, 0.0, 0.0, 0.0]), 2 * c.detach()]))


def test_add_to_is_the_inverse_of_flattening() -> None:
    parameters = [torch.randn(2, 3), torch.randn(3, 2).t(), torch.randn(())]
    origin, step = [p.clone() for p in parameters], torch.randn(13)
    add_to(parameters, origin, step)
    moved = torch.cat([(p - o).reshape(-1) for p, o in zip(parameters, origin, strict=True)])
    assert_close(moved, step)


# The Fisher matrix


def outcomes(policy: nn.Module, obs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(action, its probability or quadrature weight) in one state: sums of polynomials of degree 4 are exact."""
    distribution = policy(obs)
    if not hasattr(distribution, "base_dist"):
        return [(torch.tensor([[a]]), distribution.probs[0, 0, a].detach()) for a in range(4)]
    node, weight = (torch.as_tensor(x) for x in np.polynomial.hermite_e.hermegauss(5))
    weight = weight / weight.sum()
    loc, scale = distribution.base_dist.loc.detach(), distribution.base_dist.scale.detach()
    grid = [(torch.stack([node[i], node[j]]), weight[i] * weight[j]) for i in range(5) for j in range(5)]
    return [(loc + scale * z, w) for z, w in grid]


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_fisher_vector_product_is_by_the_expected_outer_product_of_the_score(policy: nn.Module, damping: float) -> None:
    parameters, obs = list(policy.parameters()), torch.randn(2, 3, 3)
    weight = per_row(torch.tensor([[1, 1, 0], [1, 0, 0]]).bool())
    fisher = torch.zeros(2 * [sum(p.numel() for p in parameters)])
    for b, t in weight.nonzero():
        state = obs[b, t].view(1, 1, 3)
        for action, probability in outcomes(policy, state):
            score = flat_gradient(policy(state).log_prob(action).sum(), parameters)
            fisher += weight[b, t] * probability * torch.outer(score, score)
    with torch.no_grad():
        old = policy(obs)
    product = fisher_vector_product(lambda: average(kl(old, policy(obs)), weight), parameters, damping)
    dense = torch.stack([product(e) for e in torch.eye(len(fisher))])
    assert fisher.norm() > 0.1
    assert_close(dense, fisher + damping * torch.eye(len(fisher)), atol=1e-12, rtol=0)


def test_the_divergence_is_evaluated_once() -> None:
    x, calls = torch.randn(3).requires_grad_(), []
    product = fisher_vector_product(lambda: calls.append(1) or (x**4).sum(), [x])
    for v in torch.randn(3, 3):
        assert_close(product(v), 12 * x.detach() ** 2 * v)
    assert len(calls) == 1


# Per-row gradients


@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_score_products_are_of_each_rows_own_gradients(
    chunk_size: int, policy: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(policy)
    returns = torch.randn(6, 5).where(rollout.mask, torch.nan)
    xz, zz = score_products(policy, rollout.obs, rollout.action, returns, rollout.mask, chunk_size=chunk_size)
    parameters = list(policy.parameters())
    for b in range(6):
        logp = policy(rollout.obs[b : b + 1]).log_prob(rollout.action[b : b + 1])[0]
        kept = [t for t in range(5) if rollout.mask[b, t]]
        z = flat_gradient(sum(logp[t] for t in kept), parameters, retain_graph=True)
        x = flat_gradient(sum(logp[t] * returns[b, t] for t in kept), parameters)
        assert_close(xz[b], x @ z)
        assert_close(zz[b], z @ z)


def test_score_products_are_of_the_parameters_that_learn(softmax: nn.Module, sample: Callable[..., Rollout]) -> None:
    rollout = sample(softmax, rows=1)
    softmax.net[0].requires_grad_(False)
    _, zz = score_products(softmax, rollout.obs, rollout.action, torch.ones(1, 5), rollout.mask)
    logp = softmax(rollout.obs).log_prob(rollout.action)
    z = flat_gradient(logp.where(rollout.mask, 0.0).sum(), list(softmax.net[2].parameters()))
    assert_close(zz[0], z @ z)
