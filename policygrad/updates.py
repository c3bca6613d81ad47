"""What is done with the gradient: follow it, take the natural step, or search along it inside a trust region."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from policygrad.linalg import add_to, conjugate_gradient, fisher_vector_product, flat_gradient
from policygrad.rollout import Batch, micro_batches

# An objective is a function of a batch that closes over its modules: (batch) -> (scalar to maximise, metrics).
Objective = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
# A divergence is a mean KL(old, new): (batch) -> scalar, 0 and without slope at the old parameters.
Divergence = Callable[[Batch], Tensor]
# How far to go along x = F^-1 g: (g.x) -> alpha.
StepSize = Callable[[Tensor], Tensor]


def ascend(
    objective: Objective,
    batch: Batch,
    optimizer: Optimizer,
    *,
    max_grad_norm: float = math.inf,
    micro_batch: int | None = None,
) -> dict[str, Tensor]:
    """theta <- theta + step(grad objective): one step of a torch optimiser, uphill.

    The gradient is scaled down to `max_grad_norm` where its norm is larger. micro_batch: the rows that the objective
    sees at a time, gradients adding up; it changes the memory and nothing else. Returns the objective's metrics and
    gradient_norm, the norm before that.
    """
    optimizer.zero_grad()
    total: dict[str, Tensor] = {}
    rows = batch.mask.shape[0]
    parts = micro_batches(batch, micro_batch) if micro_batch and micro_batch < rows else [(1.0, batch)]
    for share, part in parts:
        value, metrics = objective(part)
        (-share * value).backward()  # the one minus sign: torch's optimisers descend
        for name, x in metrics.items():
            total[name] = total[name] + share * x if name in total else share * x
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return {**total, "gradient_norm": norm}


def kl_radius(slope: Tensor, *, delta: float) -> Tensor:
    """sqrt(2 delta / g.F^-1 g): the step along F^-1 g of KL delta, to second order (Peters & Schaal 2008; TRPO)."""
    return (2 * delta / slope).sqrt()


def learning_rate(slope: Tensor, *, rate: float) -> Tensor:
    """A plain learning rate along F^-1 g (Kakade 2001)."""
    return torch.full_like(slope, rate)


def natural_step(
    objective: Objective,
    divergence: Divergence,
    batch: Batch,
    parameters: Iterable[Tensor],
    *,
    step_size: StepSize,
    damping: float = 0.1,
    cg_iters: int = 10,
) -> dict[str, Tensor]:
    """theta <- theta + alpha F^-1 g (Kakade 2001), F the Fisher matrix, alpha = step_size(g.F^-1 g).

    F^-1 g is found by conjugate gradient on Fisher-vector products with `damping` added to F's diagonal. Returns the
    objective's metrics, gradient_norm, step_size, kl (of the step taken) and improvement (of the objective).
    """
    parameters = list(parameters)
    value, metrics, gradient, direction, slope = _natural_direction(
        objective, divergence, batch, parameters, damping, cg_iters
    )
    alpha = step_size(slope).where(slope > 0, 0.0)
    add_to(parameters, parameters, alpha * direction)
    with torch.no_grad():
        improvement = objective(batch)[0] - value
        step_kl = divergence(batch)
    return {
        **metrics,
        "gradient_norm": gradient.norm(),
        "step_size": alpha,
        "kl": step_kl,
        "improvement": improvement,
    }


def trust_region_step(
    objective: Objective,
    divergence: Divergence,
    batch: Batch,
    parameters: Iterable[Tensor],
    *,
    delta: float = 0.01,
    damping: float = 0.1,
    cg_iters: int = 10,
    backtracks: int = 10,
    shrink: float = 0.8,
) -> dict[str, Tensor]:
    """Maximise the objective inside KL(old, new) <= delta (TRPO, Schulman et al. 2015, eq. 12 and appendix C).

    The natural step of KL delta, shrunk by `shrink` until the objective has grown and the KL is within delta, at most
    `backtracks` times. If no step is accepted the parameters are what they were, bit for bit. Returns the objective's
    metrics, gradient_norm, kl and improvement (of the accepted step, else 0), accepted (0 or 1) and step_fraction (the
    share of the full step that was taken).
    """
    parameters = list(parameters)
    value, metrics, gradient, direction, slope = _natural_direction(
        objective, divergence, batch, parameters, damping, cg_iters
    )
    old = [p.detach().clone() for p in parameters]
    full_step = kl_radius(slope, delta=delta).where(slope > 0, 0.0) * direction
    step_kl, improvement, fraction = torch.zeros_like(value), torch.zeros_like(value), torch.zeros_like(value)
    accepted = False
    with torch.no_grad():
        for k in range(backtracks):
            add_to(parameters, old, shrink**k * full_step)
            gained, moved = objective(batch)[0] - value, divergence(batch)
            accepted = bool((gained > 0) & (moved <= delta))
            if accepted:
                step_kl, improvement, fraction = moved, gained, torch.full_like(value, shrink**k)
                break
        if not accepted:
            for p, p_old in zip(parameters, old, strict=True):
                p.copy_(p_old)
    return {
        **metrics,
        "gradient_norm": gradient.norm(),
        "kl": step_kl,
        "improvement": improvement,
        "accepted": torch.tensor(float(accepted)),
        "step_fraction": fraction,
    }


def _natural_direction(
    objective: Objective,
    divergence: Divergence,
    batch: Batch,
    parameters: Sequence[Tensor],
    damping: float,
    cg_iters: int,
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor, Tensor]:
    """The objective and its metrics, its gradient g, the direction x = F^-1 g, and the slope g.x = x.F x."""
    value, metrics = objective(batch)
    gradient = flat_gradient(value, parameters)
    product = fisher_vector_product(lambda: divergence(batch), parameters, damping)
    direction = conjugate_gradient(product, gradient, cg_iters)
    return value.detach(), metrics, gradient, direction, gradient @ direction
