"""REINFORCE (Williams 1992), and the loop of all methods that take a step on a whole rollout.

sample    whole episodes from pi
credit    A_t = G_t - b, G_t the episode's return or the reward-to-go
objective E[sum_t log pi(a_t|s_t) A_t] + c_H H(pi)
update    one step of gradient ascent; then the critic, if any, is fitted
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from policygrad.credit import Assign, check_modules, check_rows, credited
from policygrad.critics import Fit, fitted, no_fit
from policygrad.diagnostics import after_update, mean_metrics
from policygrad.rollout import Batch, Rollout, measured
from policygrad.score import score
from policygrad.updates import Metrics, Objective, Update
from policygrad.weights import average, normalized, per_episode


class ReinforceObjective(Objective):
    """E[sum_t log pi(a_t|s_t) A_t] + c_H H(pi)."""

    def __init__(self, policy: nn.Module, *, entropy_coefficient: float = 0.0) -> None:
        super().__init__()
        self.policy, self.entropy_coefficient = policy, entropy_coefficient

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        distribution = self.policy(batch.obs)
        logp = distribution.log_prob(batch.action)
        gain = average(score(logp, torch.ones_like(logp), batch.advantage), batch.weight)
        entropy = average(distribution.entropy(), normalized(batch.weight))
        return gain + self.entropy_coefficient * entropy, {"objective": gain.detach(), "entropy": entropy.detach()}


def reinforce(
    sample: Callable[[nn.Module], Rollout],
    credit: Assign,
    objective: Objective,
    update: Update,
    *,
    fit: Fit = no_fit,
    weights: Callable[[Tensor], Tensor] = per_episode,
    epochs: int = 1,
    diagnose: Callable[[Objective, Batch], Metrics] = after_update,
) -> Iterator[dict[str, Tensor | float]]:
    """Train forever; yield the metrics of each iteration.

    sample: REINFORCE needs rows of whole episodes; with a bootstrapping critic, any rows will do. fit: fits a critic
    after the policy's steps (a critic fitted to the rollout's returns first would bias their advantages). weights: how
    decisions are averaged. epochs: steps on one rollout, with credit recomputed before each, for credit that depends on
    the policy (V-trace). diagnose: measures the whole update.
    """
    check_rows(sample, credit)
    check_modules(credit, objective, fit)
    while True:
        rollout = sample(objective.policy)  # Sample
        batches, steps = [], []
        for _ in range(epochs):
            batches.append(measured(credited(rollout, weights, credit)))  # Credit
            steps.append(update(objective, batches[-1]))  # Update
        metrics = {**diagnose(objective, batches[0]), **mean_metrics(steps)}
        fit_metrics = fitted(fit, batches[-1], objective.policy)
        yield {**metrics, **objective.adapt(metrics), **fit_metrics, **rollout.metrics}
