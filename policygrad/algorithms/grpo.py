"""Group-relative policy optimisation (GRPO; Shao et al. 2024, arXiv 2402.03300), and what is one exchange away from it.

sample    several rows of each prompt (or start state), from pi_old
credit    A_i = (R_i - mean of the group) / std of the group, the same for all decisions of a row
objective mean over rows of the mean over decisions of min(r A, clip(r, 1 - eps, 1 + eps) A) - beta KL(pi, pi_ref)
update    gradient ascent, in one or more epochs of minibatches

There is no critic: the other answers to the same prompt are the baseline. variants.py exchanges the pieces.
"""

from collections.abc import Callable, Iterator

from torch import Tensor, nn
from torch.optim import Optimizer

from policygrad.advantages import group_advantage
from policygrad.diagnostics import clip_fraction_by_side, group_metrics, mean_metrics, ratio_metrics
from policygrad.divergences import AdaptiveCoefficient
from policygrad.objectives import clipped_surrogate, penalised_surrogate
from policygrad.rollout import Batch, Rollout, decisions, minibatches
from policygrad.score import token_ratio
from policygrad.updates import ascend
from policygrad.weights import average, normalized, per_row


def clipped(logp: Tensor, ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's gain; objectives.clipped_weight has the same form, and makes it CISPO."""
    return clipped_surrogate(ratio, advantage, low, high)


def grpo(
    policy: nn.Module,
    sample: Callable[[nn.Module], Rollout],
    optimizer: Optimizer,
    *,
    credit: Callable[[Rollout], Tensor] = group_advantage,
    ratio: Callable[[Tensor, Tensor, Tensor], Tensor] = token_ratio,
    gain: Callable[[Tensor, Tensor, Tensor, float, float], Tensor] = clipped,
    clip: tuple[float, float] = (0.2, 0.2),
    weights: Callable[[Tensor], Tensor] = per_row,
    anchor: Callable[[object, Batch, Tensor], Tensor] | None = None,
    coefficient: AdaptiveCoefficient | None = None,
    entropy_coefficient: float = 0.0,
    epochs: int = 1,
    minibatch_size: int | None = None,
    micro_batch: int | None = None,
    max_grad_norm: float = 1.0,
) -> Iterator[dict[str, Tensor | float]]:
    """Train without end; yields the metrics of each iteration.

    credit: (rollout) -> [B, T]. ratio: token_ratio or sequence_ratio. gain: (logp, ratio, advantage, low, high) ->
    [B, T]. anchor: (distribution, batch, ratio by token) -> KL(pi, pi_ref) [B, T], a partial of to_reference, charged
    with the coefficient. minibatch_size: rows of a gradient step; None: all. micro_batch: rows computed at a time.

    Where the weights match the centring (by row, or rows of equal length) the objective is 0 at ratio 1, whatever is
    learned: look at reward, group_std, flat_groups and gradient_norm instead. Of clipped_weight, which keeps every
    gradient, clip_fraction_low and _high are the shares that clipping would have silenced.
    """
    if anchor is not None and coefficient is None:
        coefficient = AdaptiveCoefficient(0.04)

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        distribution = policy(batch.obs)
        logp = distribution.log_prob(batch.action).where(batch.mask, 0.0)
        r = ratio(logp, batch.logp, batch.mask)
        x, share = gain(logp, r, batch.advantage, *clip), normalized(batch.weight)
        metrics = ratio_metrics(logp, batch.logp, batch.mask, batch.weight)
        metrics |= clip_fraction_by_side(r, batch.advantage, batch.weight, *clip)
        if anchor is not None and coefficient is not None:
            divergence = anchor(distribution, batch, token_ratio(logp, batch.logp, batch.mask))
            x = penalised_surrogate(x, divergence, coefficient.value)
            metrics["kl_reference"] = average(divergence, share).detach()
        value, entropy = average(x, batch.weight), average(distribution.entropy(), share)
        metrics |= {"objective": value.detach(), "entropy": entropy.detach()}
        return (value + entropy_coefficient * entropy if entropy_coefficient else value), metrics

    while True:
        # Sample
        rollout = sample(policy)
        # Credit
        batch = decisions(rollout, weights(rollout.mask), credit(rollout))
        # Update
        parts = minibatches(batch, minibatch_size or len(batch.mask), epochs)
        steps = [
            ascend(objective, part, optimizer, max_grad_norm=max_grad_norm, micro_batch=micro_batch) for part in parts
        ]
        metrics = {**mean_metrics(steps), **group_metrics(rollout.reward.sum(1), rollout.group)}
        if anchor is not None and coefficient is not None:
            metrics["kl_coefficient"] = coefficient.value.clone()
            coefficient.update(float(metrics["kl_reference"]))
        # Rollout last: where KL is charged in the reward, its own group figures are of the reward before.
        yield {**metrics, "updates": len(steps), **rollout.metrics}
