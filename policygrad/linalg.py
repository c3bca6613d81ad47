"""Linear algebra without forming a matrix: conjugate gradient, Fisher-vector product, per-row gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor], b: Float[Tensor, " N"], iters: int = 10, tol: float = 1e-10
) -> Float[Tensor, " N"]:
    """Solve F x = b for a symmetric positive definite F, given only v -> F v (Hestenes & Stiefel 1952).

    Stops after `iters` products, once |b - F x| <= tol |b|, or before a direction d along which F is 0 to rounding:
    d.F d / |d|^2 is then noise, and may be negative (Steihaug 1983, truncated conjugate gradient). x satisfies
    x.b = x.F x even if it stops early, so the KL of a step along x needs no further product.
    """
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = residual @ residual
    rounding = 10 * torch.finfo(b.dtype).eps
    limit = max(tol, rounding) ** 2 * square  # below it, directions of a singular F are noise
    steepest = torch.zeros_like(square)  # the largest d.F d / |d|^2 so far: F's scale
    for _ in range(iters):
        if square <= limit:  # also b = 0
            break
        product = matvec(direction)
        curvature, length = direction @ product, direction @ direction
        if curvature <= rounding * steepest * length:  # false where F is NaN or infinite, which x must show
            break
        steepest = torch.maximum(steepest, curvature / length)
        alpha = square / curvature
        x += alpha * direction
        residual -= alpha * product
        square, last = residual @ residual, square
        direction = residual + square / last * direction
    return x


def flat_gradient(
    scalar: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
) -> Float[Tensor, " N"]:
    """d scalar / d parameters as one vector; 0 for a parameter that the scalar does not depend on."""
    gradients = torch.autograd.grad(
        scalar, parameters, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in gradients])


def fisher_vector_product(
    divergence: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    damping: float = 0.0,
    over: Callable[[Tensor], Tensor] = lambda product: product,
) -> Callable[[Tensor], Tensor]:
    """v -> (F + damping I) v, with F the Hessian of KL(old, new) at new = old (Schulman et al. 2015, appendix C).

    `divergence` returns the mean KL(old, new) with the old policy constant. It is evaluated once, here. Each product
    is one more backward pass through its gradient. over: F v of these rows -> that of the rows of all ranks.
    """
    gradient = flat_gradient(divergence(), parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return over(flat_gradient(gradient @ v, parameters, retain_graph=True)) + damping * v

    return product


def add_to(parameters: Sequence[Tensor], origin: Sequence[Tensor], step: Float[Tensor, " N"]) -> None:
    """parameters <- origin + step, in place."""
    pieces = step.split([p.numel() for p in parameters])
    with torch.no_grad():
        for p, start, piece in zip(parameters, origin, pieces, strict=True):
            p.copy_(start + piece.view_as(p))


def score_products(
    policy: nn.Module,
    obs: Any,
    action: Tensor,
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    """X.Z and |Z|^2 of each row, with Z = sum_t grad log pi(a_t|s_t) and X = sum_t grad log pi(a_t|s_t) G_t.

    The sums run over the steps in the mask. Rows are differentiated `chunk_size` at a time (torch.func.vmap).
    """
    parameters = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    buffers = dict(policy.named_buffers())
    ones = torch.ones_like(returns).where(mask, 0.0)
    returns = returns.where(mask, 0.0)

    def weighted_logp(parameters: dict[str, Tensor], obs: Any, action: Tensor, weight: Tensor) -> Tensor:
        row = tree_map(lambda x: x.unsqueeze(0), obs)
        logp = functional_call(policy, (parameters, buffers), (row,)).log_prob(action.unsqueeze(0))
        return (logp[0] * weight).sum()

    def products(obs: Any, action: Tensor, returns: Tensor, ones: Tensor) -> tuple[Tensor, Tensor]:
        x = grad(weighted_logp)(parameters, obs, action, returns)
        z = grad(weighted_logp)(parameters, obs, action, ones)
        dots = [((x[n] * z[n]).sum(), (z[n] * z[n]).sum()) for n in parameters]
        return torch.stack([a for a, _ in dots]).sum(), torch.stack([b for _, b in dots]).sum()

    return vmap(products, chunk_size=chunk_size)(obs, action, returns, ones)
