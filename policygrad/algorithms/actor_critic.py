"""Advantage actor-critic (A2C; Mnih et al. 2016, arXiv 1602.01783), and its off-policy correction by V-trace.

sample    a few steps of many environments
credit    A = GAE(lam), n-step or Monte-Carlo return - V; or V-trace where the steps are not the policy's own
objective E[log pi A] + c_H H(pi) - c_V E[(V - target)^2]
update    one step of gradient ascent (V-trace: several on the same steps)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from policygrad.advantages import monte_carlo_advantage, unnormalized
from policygrad.critics import bootstrap_values
from policygrad.diagnostics import explained_variance, mean_metrics, policy_change
from policygrad.objectives import squared_error
from policygrad.returns import vtrace
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.score import score, token_ratio
from policygrad.updates import Objective, ascend
from policygrad.weights import average, per_token


def actor_critic(
    policy: nn.Module,
    critic: nn.Module,
    sample: Callable[[nn.Module], Rollout],
    optimizer: Optimizer,
    *,
    gamma: float = 0.99,
    advantages: Callable[..., Tensor] = monte_carlo_advantage,
    entropy_coefficient: float = 0.0,
    value_coefficient: float = 0.5,
    normalize: Callable[[Tensor, Tensor], Tensor] = unnormalized,
    weights: Callable[[Tensor], Tensor] = per_token,
    max_grad_norm: float = 0.5,
) -> Iterator[dict[str, Tensor | float]]:
    """Train without end; yields the metrics of each iteration. `optimizer` holds the parameters of policy and critic.

    advantages: (reward, value, terminated, ended, gamma) -> [B, T], a partial of gae, n_step_advantage or
    monte_carlo_advantage.
    """
    objective = _objective(policy, critic, entropy_coefficient, value_coefficient)
    while True:
        # Sample
        rollout = sample(policy)
        # Credit
        value = bootstrap_values(critic, rollout)
        advantage = advantages(rollout.reward, value, rollout.terminated, rollout.ended, gamma)
        target = advantage + value[:, :-1]
        advantage = normalize(advantage, rollout.mask)
        batch = decisions(rollout, weights(rollout.mask), advantage, target, value[:, :-1])
        # Update
        metrics = ascend(objective, batch, optimizer, max_grad_norm=max_grad_norm)
        metrics["explained_variance"] = explained_variance(batch.value, batch.target, batch.weight)
        yield {**rollout.metrics, **metrics, **policy_change(policy, batch)}


def off_policy_actor_critic(
    policy: nn.Module,
    critic: nn.Module,
    sample: Callable[[nn.Module], Rollout],
    optimizer: Optimizer,
    *,
    gamma: float = 0.99,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    epochs: int = 4,
    entropy_coefficient: float = 0.0,
    value_coefficient: float = 0.5,
    normalize: Callable[[Tensor, Tensor], Tensor] = unnormalized,
    weights: Callable[[Tensor], Tensor] = per_token,
    max_grad_norm: float = 0.5,
) -> Iterator[dict[str, Tensor | float]]:
    """Actor-critic on steps of an older policy, corrected by V-trace (IMPALA, Espeholt et al. 2018).

    The steps may be stale when `sample` returns them, and they are used `epochs` times; credit is assigned afresh
    before each, with the ratio of the policy as it then is to the one that sampled.
    """
    objective = _objective(policy, critic, entropy_coefficient, value_coefficient)
    while True:
        # Sample
        rollout = sample(policy)
        steps = []
        for _ in range(epochs):
            # Credit
            value = bootstrap_values(critic, rollout)
            with torch.no_grad():
                logp = policy(rollout.obs).log_prob(rollout.action)
                ratio = token_ratio(logp, rollout.logp, rollout.mask)
            target, advantage = vtrace(
                rollout.reward, value, rollout.terminated, rollout.ended, ratio, gamma, lam, rho_bar, c_bar
            )
            advantage = normalize(advantage, rollout.mask)
            batch = decisions(rollout, weights(rollout.mask), advantage, target, value[:, :-1])
            # Update
            metrics = ascend(objective, batch, optimizer, max_grad_norm=max_grad_norm)
            metrics["explained_variance"] = explained_variance(batch.value, batch.target, batch.weight)
            steps.append(metrics)
        metrics = mean_metrics(steps)
        metrics["explained_variance"] = steps[0]["explained_variance"]  # before the critic saw this rollout
        yield {**rollout.metrics, **metrics, **policy_change(policy, batch)}


def _objective(policy: nn.Module, critic: nn.Module, entropy_coefficient: float, value_coefficient: float) -> Objective:
    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        distribution = policy(batch.obs)
        gain = average(score(distribution.log_prob(batch.action), batch.advantage), batch.weight)
        entropy = average(distribution.entropy(), batch.weight)
        error = average(squared_error(critic(batch.obs), batch.target), batch.weight)
        metrics = {"objective": gain.detach(), "entropy": entropy.detach(), "value_loss": error.detach()}
        return gain + entropy_coefficient * entropy - value_coefficient * error, metrics

    return objective
