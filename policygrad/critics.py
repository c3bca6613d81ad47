"""Critics: bootstrap values, fitting a critic to targets, and baselines that need a policy or a critic."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.advantages import largest, optimal_constant_baseline
from policygrad.diagnostics import explained_variance, mean_metrics
from policygrad.errors import UserError
from policygrad.linalg import score_products
from policygrad.objectives import squared_error
from policygrad.ranks import Steps
from policygrad.rollout import Batch, Rollout, Split, holes_last, in_parts, minibatches, weight_of_all
from policygrad.updates import Metrics, Objective, Update, ascend
from policygrad.weights import average

# Fits a critic between updates: (batch with targets) -> metrics, e.g. fit_critic(critic, optimizer).
Fit = Callable[[Batch], Metrics]


@torch.no_grad()
def bootstrap_values(critic: nn.Module, rollout: Rollout, micro_batch: Split = None) -> Float[Tensor, "B steps"]:
    """V(s_0), ..., V(s_T): V of every step, then of the state where each row stops (0 if every row terminates).

    micro_batch: rows computed at a time. Raises UserError if the critic returns the wrong shape.
    """
    value = _of_every_step(in_parts(critic, micro_batch, rollout.obs), rollout)
    if rollout.final_obs is None:
        return torch.cat([value, torch.zeros_like(value[:, :1])], 1)
    last = in_parts(critic, micro_batch, tree_map(lambda x: x.unsqueeze(1), rollout.final_obs))
    return torch.cat([value, last], 1)


def both(policy: nn.Module, critic: nn.Module | None, obs: Any) -> tuple[Any, Float[Tensor, "B T"] | None]:
    """pi(. | s) and V(s), None without a critic. Layers that both have are computed once: critic.with_policy."""
    if critic is None:
        return policy(obs), None
    together = getattr(critic, "with_policy", None)
    return (policy(obs), critic(obs)) if together is None else together(policy, obs)


def unit(critic: nn.Module) -> Tensor | float:
    """The unit of a critic's values: its `scale`, or 1 if it has none.

    The error is measured in it, so that the unit of the rewards does not change what is learned (samplers.InUnits).
    """
    return getattr(critic, "scale", 1.0)


class ValueObjective(Objective):
    """-E[((V(s) - target) / unit)^2], the mean over the batch's decisions."""

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        one = unit(self.critic)
        loss = average(squared_error(self.critic(batch.obs) / one, batch.target / one), batch.weight)
        return -loss, {"value_loss": loss.detach()}


def fit_critic(
    critic: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    epochs: int = 10,
    minibatch_size: int = 64,
    max_grad_norm: float = torch.inf,
    micro_batch: Split = None,
    compiled: bool = False,
    varying: bool = False,
    guard: Callable[[Update], Update] = lambda update: update,
) -> Fit:
    """Regress V(s) on batch.target: minimize the mean of ((V(s) - target) / unit)^2 in minibatches.

    The fit returns value_loss and critic_gradient_norm (means over all minibatches), and the explained_variance of
    batch.value, the critic's predictions before the fit. max_grad_norm, micro_batch, compiled and varying: see
    updates.ascend. guard: wraps the gradient step (guards.Guard).
    """
    objective = ValueObjective(critic)
    update = guard(
        ascend(optimizer, max_grad_norm=max_grad_norm, micro_batch=micro_batch, compiled=compiled, varying=varying)
    )

    def fit(batch: Batch) -> Metrics:
        share = batch.weight / weight_of_all(batch).clamp(min=1e-12)
        parts = minibatches(batch._replace(weight=share), minibatch_size, epochs)
        metrics = mean_metrics([update(objective, part) for part in parts])
        metrics["explained_variance"] = explained_variance(batch.value, batch.target, share)
        return metrics

    fit.critic = critic  # type: ignore[attr-defined]
    fit.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)  # type: ignore[attr-defined]
    return fit


def no_fit(batch: Batch) -> Metrics:
    """Fit nothing: there is no critic."""
    return {}


def fitted(fit: Fit, batch: Batch, policy: nn.Module) -> Metrics:
    """Fit the critic after the policy's update. Raises UserError if that moves the policy: they share parameters."""
    groups = [group for x in getattr(fit, "optimizers", ()) for group in x.param_groups]
    learning = {p for group in groups for p in group["params"] if p.requires_grad}  # a fused one leaves versions as is
    before = [p._version for p in policy.parameters()]
    shared = any(p in learning for p in policy.parameters())
    metrics = {} if shared else fit(batch)
    if shared or [p._version for p in policy.parameters()] != before:
        raise UserError(
            "fitting the critic would move the policy, because they share parameters: give the critic a network of its "
            "own, or train both in one objective (actor_critic, ppo)"
        )
    return metrics


def value_baseline(rollout: Rollout, returns: Float[Tensor, "B T"], *, critic: nn.Module) -> Float[Tensor, "B T"]:
    """b_t = V(s_t), learned from earlier rollouts."""
    with torch.no_grad():
        return _of_every_step(critic(rollout.obs), rollout)


def start_value_baseline(rollout: Rollout, returns: Float[Tensor, "B T"], *, critic: nn.Module) -> Float[Tensor, "B T"]:
    """b = V of the row's first decision, V(x) of a prompt, at all of its decisions (DRO, arXiv 2405.19107)."""
    value = value_baseline(rollout, returns, critic=critic)
    return value.gather(1, rollout.mask.int().argmax(1, keepdim=True)).expand_as(returns)


@ranks.collective
def optimal_baseline(
    rollout: Rollout, returns: Float[Tensor, "B T"], *, policy: nn.Module
) -> Steps[Float[Tensor, "B T"]]:
    """b_i = the constant that minimizes the variance of the gradient, estimated from the other rows; 0 without any."""
    origin = yield from ranks.begun(largest, returns, rollout.mask)
    above = (returns - origin).where(rollout.mask, 0.0)
    returns_score, score_score = score_products(policy, rollout.obs, rollout.action, above, rollout.mask)
    scored = score_score > 0
    found = ranks.begun(optimal_constant_baseline, returns_score, score_score)
    best, count = yield from ranks.joined(found, ranks.begun(ranks.total, scored.sum()))
    others = count - scored.long()
    best = (origin + best).where(others > 0, 0.0)
    return best.unsqueeze(1).expand_as(returns)


@ranks.collective
def optimal_token_baseline(
    rollout: Rollout, returns: Float[Tensor, "B T"], *, policy: nn.Module, micro_batch: Split = None
) -> Steps[Float[Tensor, "B T"]]:
    """b_t = sum_j W_jt G_jt / sum_j W_jt over the rows of the group (OTB, arXiv 2602.07078), 0 beyond all other rows.

    W_jt = sum_{u <= t} (1 - 2 pi(a_u|s_u) + sum_a pi(a|s_u)^2) is the squared norm of the row's score so far, in the
    logits: rows that went through uncertain decisions say more of the baseline of least variance. The own row is among
    them. Raises UserError if the policy's actions have no probabilities.
    """
    order = holes_last(rollout.mask, rollout.ended)

    @torch.no_grad()
    def energy(obs: Any, action: Tensor) -> Tensor:
        distribution = policy(obs)
        if not hasattr(distribution, "probs"):
            raise UserError("the token baseline needs the probabilities of all actions: use another baseline")
        squares = distribution.probs.square().sum(-1)
        return 1 - 2 * distribution.log_prob(action).exp() + squares

    mask = rollout.mask.gather(1, order)
    each = in_parts(energy, micro_batch, rollout.obs, rollout.action).gather(1, order).where(mask, 0.0)
    weight, steps = each.cumsum(1) * mask, mask.shape[1]
    returns = returns.gather(1, order).where(mask, 0.0)
    ask = ranks.begun(ranks.gathered_all, rollout.group, returns[:, 0])
    ((group, first), own), lengths = yield from ranks.joined(ask, ranks.begun(ranks.each, steps))
    longest = max(lengths)
    same = group[own].unsqueeze(1) == group.unsqueeze(0)
    # One return of the group is subtracted from all first, so that of equal returns nothing is left, to the bit.
    origin = first[same.int().argmax(1)].unsqueeze(1)
    same = same.to(returns.dtype)
    columns = [pad(x, (0, longest - steps)) for x in (weight, weight * (returns - origin), mask.to(returns.dtype))]
    (weights, weighted, counts), _ = yield from ranks.begun(ranks.gathered_all, *columns)
    mean = origin + (same @ weighted / (same @ weights).clamp(min=1e-12))[:, :steps]
    others = (same @ counts)[:, :steps] > 1  # another row has a step there
    return torch.zeros_like(returns).scatter(1, order, mean.where(others & mask, 0.0))


def _of_every_step(value: Tensor, rollout: Rollout) -> Float[Tensor, "B T"]:
    """Check that there is one value for each step: [B, T, 1] would broadcast against [B, T] and learn nothing."""
    if value.shape != rollout.mask.shape:
        raise UserError(
            f"the critic returned values of shape {tuple(value.shape)} for {tuple(rollout.mask.shape)} steps: "
            "return one number for each, for example value.squeeze(-1)"
        )
    return value
