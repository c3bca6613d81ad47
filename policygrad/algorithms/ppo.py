"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347), and the loop of all methods with minibatches.

    sample    rows from pi_old
    credit    A = GAE(lam), target = A + V
    objective E[min(r A, clip(r, 1 - eps, 1 + eps) A)] - beta KL(old, new) + c_H H(pi) - c_V E[(V - target)^2]
    update    gradient ascent, in several epochs of minibatches

With an adaptive coefficient and no clip, it is the KL-penalty form of section 4. The two can be combined.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from policygrad.advantages import standardize
from policygrad.credit import Assign, check_modules, check_rows, credited
from policygrad.critics import Fit, both, fitted, no_fit, unit
from policygrad.diagnostics import after_update, clip_fraction, clip_fraction_by_side, mean_metrics, ratio_metrics
from policygrad.divergences import AdaptiveCoefficient, k3
from policygrad.objectives import clipped_squared_error, clipped_surrogate, dual_clip, imitated, penalized_surrogate
from policygrad.rollout import Batch, Rollout, minibatches, rows_of_all
from policygrad.score import token_ratio
from policygrad.updates import Metrics, Objective, Update
from policygrad.weights import average, per_token


class PPOObjective(Objective):
    """E[min(r A, clip(r) A)] - beta KL(old, new) + c_H H(pi) - c_V E[(V - target)^2].

    critic: None leaves the last term out; V, target and value_clip are in its unit (critics.unit). clip: (low, high) of
    the ratio. penalty: the coefficient of KL(old, new), estimated by k3. value_clip: see clipped_squared_error.
    dual_clip: see objectives.dual_clip. A batch with imitation adds it: see objectives.imitated.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module | None,
        *,
        clip: tuple[float, float] = (0.2, 0.2),
        penalty: AdaptiveCoefficient | None = None,
        entropy_coefficient: float = 0.0,
        value_coefficient: float = 0.5,
        value_clip: float = torch.inf,
        dual_clip: float = torch.inf,
    ) -> None:
        super().__init__()
        self.policy, self.critic, self.penalty = policy, critic, penalty
        self.clip, self.value_clip, self.dual_clip = clip, value_clip, dual_clip
        self.entropy_coefficient, self.value_coefficient = entropy_coefficient, value_coefficient

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        distribution, value = both(self.policy, self.critic, batch.obs)
        logp = distribution.log_prob(batch.action).where(batch.mask, 0.0)
        ratio = token_ratio(logp, batch.logp, batch.mask)
        low, high = self.clip
        gain = dual_clip(
            clipped_surrogate(logp, ratio, batch.advantage, low=low, high=high), batch.advantage, self.dual_clip
        )
        gain = imitated(gain, logp, batch.imitation)
        if self.penalty is not None:
            gain = penalized_surrogate(gain, k3(batch.logp, logp), self.penalty.value)
        gain, entropy = average(gain, batch.weight), average(distribution.entropy(), batch.weight)
        total, metrics = gain + self.entropy_coefficient * entropy, {"objective": gain, "entropy": entropy}
        if self.critic is not None and value is not None:
            value, target, value_old = (x / unit(self.critic) for x in (value, batch.target, batch.value))
            error = clipped_squared_error(value, target, value_old, self.value_clip)
            metrics["value_loss"] = average(error, batch.weight)
            total = total - self.value_coefficient * metrics["value_loss"]
        metrics = {name: x.detach() for name, x in metrics.items()}
        metrics |= ratio_metrics(logp, batch.logp, batch.mask, batch.weight)
        metrics["clip_fraction"] = clip_fraction(ratio, batch.weight, low, high)
        return total, metrics | clip_fraction_by_side(ratio, batch.advantage, batch.weight, low, high)

    def adapt(self, metrics: Metrics) -> Metrics:
        return {} if self.penalty is None else self.penalty.adapt(metrics, "kl_old")


def ppo(
    sample: Callable[[nn.Module], Rollout],
    credit: Assign,
    objective: Objective,
    update: Update,
    *,
    epochs: int = 10,
    minibatch_size: int | None = 64,
    normalize: Callable[[Tensor, Tensor], Tensor] = standardize,
    target_kl: float = torch.inf,
    fit: Fit = no_fit,
    weights: Callable[[Tensor], Tensor] = per_token,
    diagnose: Callable[[Objective, Batch], Metrics] = after_update,
) -> Iterator[dict[str, Tensor | float]]:
    """Train forever; yield the metrics of each iteration, means over the minibatches of the last epoch.

    minibatch_size: decisions in a gradient step, or whole rows if the policy has memory; None: all. normalize:
    (advantage, mask) -> advantage, applied to each minibatch before it is split into micro-batches. target_kl: an
    iteration ends once a minibatch's KL exceeds 1.5 target_kl. fit, weights, diagnose: see reinforce.
    """
    check_rows(sample, credit)
    check_modules(credit, objective, fit)
    while True:
        rollout = sample(objective.policy)  # Sample
        batch = credited(rollout, weights, credit)  # Credit
        rows, steps = rows_of_all(batch), []
        size = minibatch_size or rows
        for part in minibatches(batch, size, epochs, normalize):  # Update
            steps.append(update(objective, part))
            if target_kl < torch.inf and steps[-1] and steps[-1]["kl_old"] > 1.5 * target_kl:
                break
        # Each step measured the policy before its change; `diagnose` measures the whole update.
        metrics = {**mean_metrics(steps[-rows // size :]), **diagnose(objective, batch)}
        fit_metrics = fitted(fit, batch, objective.policy)
        yield {**metrics, **objective.adapt(metrics), **fit_metrics, "updates": len(steps), **rollout.metrics}
