"""TRPO (Schulman et al. 2015, arXiv 1502.05477) and the natural policy gradient (Kakade 2001).

sample    rows from pi_old
credit    A = GAE(lam), target = A + V
objective E[r A], with KL(pi_old, pi) as the distance, in the paper's direction
update    the natural step F^-1 g, with a line search inside KL <= delta (TRPO) or without one (NPG); then the critic
"""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor, nn

from policygrad.algorithms.reinforce import reinforce
from policygrad.divergences import kl
from policygrad.objectives import surrogate
from policygrad.rollout import Batch
from policygrad.score import token_ratio
from policygrad.updates import Measured, Metrics
from policygrad.weights import average, normalized, per_token


class SurrogateObjective(Measured):
    """E[r A], and the mean of KL(old, pi) over the batch's decisions."""

    def __init__(
        self,
        policy: nn.Module,
        *,
        ratio: Callable[[Tensor, Tensor, Tensor], Tensor] = token_ratio,
    ) -> None:
        super().__init__()
        self.policy, self.ratio = policy, ratio

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        distribution = self.policy(batch.obs)
        logp = distribution.log_prob(batch.action)
        gain = surrogate(logp, self.ratio(logp, batch.logp, batch.mask), batch.advantage)
        entropy = average(distribution.entropy(), normalized(batch.weight))
        return average(gain, batch.weight), {"entropy": entropy.detach()}

    def divergence(self, batch: Batch) -> Callable[[], Tensor]:
        with torch.no_grad():
            # Copy it: a distribution that holds a parameter itself would change with the policy.
            old = deepcopy(self.policy(batch.obs))
        return lambda: average(kl(old, self.policy(batch.obs)), normalized(batch.weight))


trpo = npg = partial(reinforce, weights=per_token)  # they differ in the update: trust_region_step or natural_step
