"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347).

    sample    rows from pi_old
    credit    A = GAE(lam), target = A + V
    objective E[min(r A, clip(r, 1 - eps, 1 + eps) A)] - beta KL(old, new) + c_H H(pi) - c_V E[(V - target)^2]
    update    several epochs of minibatches, gradient ascent

With clip = inf and an adaptive coefficient it is the KL-penalty form of section 4; both may act at once.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from policygrad.advantages import gae, standardize, unnormalized
from policygrad.critics import bootstrap_values
from policygrad.diagnostics import (
    clip_fraction,
    clip_fraction_by_side,
    explained_variance,
    mean_metrics,
    ratio_metrics,
)
from policygrad.divergences import AdaptiveCoefficient, k3
from policygrad.objectives import clipped_squared_error, clipped_surrogate, dual_clip, penalised_surrogate
from policygrad.rollout import Batch, Rollout, decisions, minibatches
from policygrad.samplers import log_probabilities
from policygrad.score import token_ratio
from policygrad.updates import ascend
from policygrad.weights import average, per_token


def ppo(
    policy: nn.Module,
    critic: nn.Module,
    sample: Callable[[nn.Module], Rollout],
    optimizer: Optimizer,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    epochs: int = 10,
    minibatch_size: int = 64,
    micro_batch: int | None = None,
    clip: tuple[float, float] = (0.2, 0.2),
    penalty: AdaptiveCoefficient | None = None,
    target_kl: float = torch.inf,
    entropy_coefficient: float = 0.0,
    value_coefficient: float = 0.5,
    value_clip: float = torch.inf,
    dual_clip_bound: float = torch.inf,
    max_grad_norm: float = 0.5,
    normalize_batch: Callable[[Tensor, Tensor], Tensor] = unnormalized,
    normalize_minibatch: Callable[[Tensor, Tensor], Tensor] = standardize,
    weights: Callable[[Tensor], Tensor] = per_token,
) -> Iterator[dict[str, Tensor | float]]:
    """Train without end; yields the metrics of each iteration. `optimizer` holds the parameters of policy and critic.

    micro_batch: rows computed at a time (see ascend). clip: (low, high) of the ratio. penalty: coefficient of
    KL(old, new), adapted to the KL of every update. target_kl: an iteration ends once a minibatch's KL exceeds
    1.5 target_kl. normalize_batch, normalize_minibatch: (advantage, mask) -> advantage on the whole rollout and on each
    minibatch. Of a language model: whole rows, and KL(pi, pi_ref) charged in the reward by samplers.KLCharged.
    """

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        distribution = policy(batch.obs)
        logp, entropy = distribution.log_prob(batch.action).where(batch.mask, 0.0), distribution.entropy()
        ratio = token_ratio(logp, batch.logp, batch.mask)
        gain = dual_clip(clipped_surrogate(ratio, batch.advantage, *clip), batch.advantage, dual_clip_bound)
        if penalty is not None:
            gain = penalised_surrogate(gain, k3(batch.logp, logp), penalty.value)
        error = clipped_squared_error(critic(batch.obs), batch.target, batch.value, value_clip)
        gain, entropy, error = (average(x, batch.weight) for x in (gain, entropy, error))
        metrics = {"objective": gain.detach(), "entropy": entropy.detach(), "value_loss": error.detach()}
        metrics |= ratio_metrics(logp, batch.logp, batch.mask, batch.weight)
        metrics["clip_fraction"] = clip_fraction(ratio, batch.weight, *clip)
        metrics |= clip_fraction_by_side(ratio, batch.advantage, batch.weight, *clip)
        return gain + entropy_coefficient * entropy - value_coefficient * error, metrics

    while True:
        # Sample
        rollout = sample(policy)
        # Credit
        value = bootstrap_values(critic, rollout, micro_batch)
        advantage = gae(rollout.reward, value, rollout.terminated, rollout.ended, gamma, lam)
        target = advantage + value[:, :-1]
        advantage = normalize_batch(advantage, rollout.mask)
        batch = decisions(rollout, weights(rollout.mask), advantage, target, value[:, :-1])
        # Update
        steps = []
        for part in minibatches(batch, minibatch_size, epochs):
            part = part._replace(advantage=normalize_minibatch(part.advantage, part.mask))
            steps.append(ascend(objective, part, optimizer, max_grad_norm=max_grad_norm, micro_batch=micro_batch))
            if steps[-1]["kl"] > 1.5 * target_kl:
                break
        metrics = mean_metrics(steps[-len(batch.mask) // minibatch_size :])  # of the last epoch
        # What the steps measured is from before each of them; this is how far they have gone.
        logp = log_probabilities(policy, batch, micro_batch)
        metrics |= ratio_metrics(logp, batch.logp, batch.mask, batch.weight)
        if penalty is not None:
            metrics["kl_coefficient"] = penalty.value.clone()
            penalty.update(float(metrics["kl"]))
        metrics["explained_variance"] = explained_variance(batch.value, batch.target, batch.weight)
        yield {**rollout.metrics, **metrics, "updates": len(steps)}
