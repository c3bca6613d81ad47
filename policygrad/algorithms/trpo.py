"""TRPO (Schulman et al. 2015, arXiv 1502.05477) and the natural policy gradient (Kakade 2001).

sample    rows from pi_old
credit    A = GAE(lam), target = A + V
objective E[r A], with KL(pi_old, pi) as the measure of distance: from the old policy to the new, as in the paper
update    the natural step F^-1 g, inside KL <= delta with a line search (TRPO) or as it is (NPG); then the critic
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from policygrad.advantages import gae, standardize
from policygrad.critics import Fit, bootstrap_values
from policygrad.diagnostics import policy_change
from policygrad.divergences import kl
from policygrad.objectives import surrogate
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.score import token_ratio
from policygrad.updates import kl_radius, natural_step, trust_region_step
from policygrad.weights import average, normalized, per_token


def trpo(
    policy: nn.Module,
    critic: nn.Module,
    sample: Callable[[nn.Module], Rollout],
    fit: Fit,
    *,
    gamma: float = 0.99,
    lam: float = 0.95,
    step: Callable[..., dict[str, Tensor]] = trust_region_step,
    normalize: Callable[[Tensor, Tensor], Tensor] = standardize,
    weights: Callable[[Tensor], Tensor] = per_token,
) -> Iterator[dict[str, Tensor | float]]:
    """Train without end; yields the metrics of each iteration.

    step: a partial of trust_region_step or natural_step. fit: teaches the critic its targets, after the policy's step
    (a critic that has seen the rollout's returns would bias their advantages).
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]

    while True:
        # Sample
        rollout = sample(policy)
        # Credit
        value = bootstrap_values(critic, rollout)
        advantage = gae(rollout.reward, value, rollout.terminated, rollout.ended, gamma, lam)
        target = advantage + value[:, :-1]
        advantage = normalize(advantage, rollout.mask)
        batch = decisions(rollout, weights(rollout.mask), advantage, target, value[:, :-1])
        with torch.no_grad():
            old = deepcopy(policy(batch.obs))  # what holds a parameter itself, not a function of it, would move along

        # Objective
        def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            distribution = policy(batch.obs)
            ratio = token_ratio(distribution.log_prob(batch.action), batch.logp, batch.mask)
            entropy = average(distribution.entropy(), normalized(batch.weight))
            return average(surrogate(ratio, batch.advantage), batch.weight), {"entropy": entropy.detach()}

        def divergence(batch: Batch, old: torch.distributions.Distribution = old) -> Tensor:
            return average(kl(old, policy(batch.obs)), normalized(batch.weight))

        # Update
        metrics = step(objective, divergence, batch, parameters)
        metrics = {**policy_change(policy, batch), **metrics}  # of the two KLs, the exact one
        yield {**rollout.metrics, **metrics, **fit(batch)}


npg = partial(trpo, step=partial(natural_step, step_size=partial(kl_radius, delta=0.01)))
