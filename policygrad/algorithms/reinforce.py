"""REINFORCE (Williams 1992), with reward-to-go and a baseline.

sample    whole episodes from pi
credit    A_t = G_t - b, G_t the episode's return or the reward-to-go
objective E[sum_t gamma^t log pi(a_t|s_t) A_t] + c_H H(pi)     (gamma^t only if `discounted`)
update    one step of gradient ascent; then the baseline learns
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from policygrad.advantages import no_baseline, unnormalized
from policygrad.critics import Fit, no_fit
from policygrad.diagnostics import policy_change
from policygrad.returns import discount, reward_to_go
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.score import score
from policygrad.updates import ascend
from policygrad.weights import average, normalized, per_episode


def reinforce(
    policy: nn.Module,
    sample: Callable[[nn.Module], Rollout],
    optimizer: Optimizer,
    *,
    gamma: float = 0.99,
    returns: Callable[[Tensor, Tensor, float], Tensor] = reward_to_go,
    baseline: Callable[[Rollout, Tensor], Tensor] = no_baseline,
    fit: Fit = no_fit,
    discounted: bool = False,
    entropy_coefficient: float = 0.0,
    normalize: Callable[[Tensor, Tensor], Tensor] = unnormalized,
    weights: Callable[[Tensor], Tensor] = per_episode,
    max_grad_norm: float = torch.inf,
) -> Iterator[dict[str, Tensor | float]]:
    """Train without end; yields the metrics of each iteration. Each row of `sample` is to be one whole episode.

    returns: reward_to_go or trajectory_return. baseline: (rollout, returns) -> [B, T]. fit: teaches a learned baseline
    the returns. discounted: weigh step t by gamma^t, which makes the update with reward_to_go
    the gradient of the discounted J (with trajectory_return it is that without the factor).
    """

    def objective(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        distribution = policy(batch.obs)
        gain = average(score(distribution.log_prob(batch.action), batch.advantage), batch.weight)
        entropy = average(distribution.entropy(), normalized(batch.weight))
        metrics = {"objective": gain.detach(), "entropy": entropy.detach()}
        return gain + entropy_coefficient * entropy, metrics

    while True:
        # Sample
        rollout = sample(policy)
        # Credit
        target = returns(rollout.reward, rollout.ended, gamma)
        value = baseline(rollout, target)
        advantage = normalize(target - value, rollout.mask)
        if discounted:
            advantage = advantage * discount(rollout.mask, rollout.ended, gamma)
        batch = decisions(rollout, weights(rollout.mask), advantage, target, value)
        # Update
        metrics = ascend(objective, batch, optimizer, max_grad_norm=max_grad_norm)
        yield {**rollout.metrics, **metrics, **policy_change(policy, batch), **fit(batch)}
