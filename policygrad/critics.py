"""Critics: the values that bootstrap an advantage, and fitting them to their targets."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from policygrad.advantages import optimal_constant_baseline
from policygrad.diagnostics import explained_variance, mean_metrics
from policygrad.errors import UserError
from policygrad.linalg import score_products
from policygrad.objectives import squared_error
from policygrad.rollout import Batch, Rollout, minibatches
from policygrad.updates import ascend
from policygrad.weights import average, normalized

# How a critic is fitted between updates: (batch with targets) -> metrics, e.g. partial(fit_critic, critic=..., ...).
Fit = Callable[[Batch], dict[str, Tensor]]


@torch.no_grad()
def bootstrap_values(critic: nn.Module, rollout: Rollout, micro_batch: int | None = None) -> Float[Tensor, "B steps"]:
    """V(s_0), ..., V(s_T): of every step, and of where each row stops (0 if every row terminates).

    micro_batch: rows computed at a time.
    """
    size = micro_batch or len(rollout.mask)
    parts = [tree_map(lambda x, at=at: x[at : at + size], rollout.obs) for at in range(0, len(rollout.mask), size)]
    value = _of_every_step(torch.cat([critic(part) for part in parts]), rollout)
    if rollout.final_obs is None:
        last = torch.zeros_like(value[:, :1])
    else:
        last = critic(tree_map(lambda x: x.unsqueeze(1), rollout.final_obs))
    return torch.cat([value, last], 1)


def fit_critic(
    batch: Batch,
    critic: nn.Module,
    optimizer: Optimizer,
    *,
    epochs: int = 10,
    minibatch_size: int = 64,
    max_grad_norm: float = torch.inf,
) -> dict[str, Tensor]:
    """Regress V(s) on batch.target: minimise the mean of (V(s) - target)^2 by minibatches.

    Returns value_loss and critic_gradient_norm, means over all minibatches, and explained_variance, of batch.value:
    what the critic predicted before it saw the targets.
    """
    share = normalized(batch.weight)

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = average(squared_error(critic(batch.obs), batch.target), batch.weight)
        return -loss, {"value_loss": loss.detach()}

    parts = minibatches(batch._replace(weight=share), minibatch_size, epochs)
    metrics = mean_metrics([ascend(objective, part, optimizer, max_grad_norm=max_grad_norm) for part in parts])
    metrics["critic_gradient_norm"] = metrics.pop("gradient_norm")
    metrics["explained_variance"] = explained_variance(batch.value, batch.target, share)
    return metrics


def no_fit(batch: Batch) -> dict[str, Tensor]:
    """There is no critic to fit."""
    return {}


def value_baseline(rollout: Rollout, returns: Float[Tensor, "B T"], *, critic: nn.Module) -> Float[Tensor, "B T"]:
    """b_t = V(s_t), learned from earlier rollouts."""
    with torch.no_grad():
        return _of_every_step(critic(rollout.obs), rollout)


def _of_every_step(value: Tensor, rollout: Rollout) -> Float[Tensor, "B T"]:
    """The values, if they are one for each step: [B, T, 1] would be broadcast against [B, T], and learn nothing."""
    if value.shape != rollout.mask.shape:
        raise UserError(
            f"the critic returned values of shape {tuple(value.shape)} for {tuple(rollout.mask.shape)} steps: "
            "it must return one number for each, as value.squeeze(-1) makes of a last dimension of 1"
        )
    return value


def optimal_baseline(rollout: Rollout, returns: Float[Tensor, "B T"], *, policy: nn.Module) -> Float[Tensor, "B T"]:
    """b = the constant that minimises the variance of the gradient, estimated from the other rows."""
    returns_score, score_score = score_products(policy, rollout.obs, rollout.action, returns, rollout.mask)
    return optimal_constant_baseline(returns_score, score_score).unsqueeze(1).expand_as(returns)
