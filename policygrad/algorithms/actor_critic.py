"""Advantage actor-critic (A2C; Mnih et al. 2016, arXiv 1602.01783), and its off-policy correction by V-trace.

sample    a few steps of many environments
credit    A = GAE(lam), n-step or Monte Carlo return - V; or V-trace if an older policy took the steps
objective E[log pi A] + c_H H(pi) - c_V E[(V - target)^2]
update    one step of gradient ascent (V-trace: several steps on one rollout)
"""

from functools import partial

import torch
from torch import Tensor, nn

from policygrad.algorithms.reinforce import reinforce
from policygrad.critics import both, unit
from policygrad.objectives import squared_error
from policygrad.rollout import Batch
from policygrad.score import score
from policygrad.updates import Metrics, Objective
from policygrad.weights import average, per_token


class ActorCriticObjective(Objective):
    """E[log pi A] + c_H H(pi) - c_V E[(V - target)^2], V and target in the critic's unit (critics.unit).

    Without a critic, the last term is omitted.
    """

    def __init__(
        self,
        policy: nn.Module,
        critic: nn.Module | None,
        *,
        entropy_coefficient: float = 0.0,
        value_coefficient: float = 0.5,
    ) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic
        self.entropy_coefficient, self.value_coefficient = entropy_coefficient, value_coefficient

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        distribution, value = both(self.policy, self.critic, batch.obs)
        logp = distribution.log_prob(batch.action)
        gain = average(score(logp, torch.ones_like(logp), batch.advantage), batch.weight)
        entropy = average(distribution.entropy(), batch.weight)
        total, metrics = gain + self.entropy_coefficient * entropy, {"objective": gain, "entropy": entropy}
        if self.critic is not None and value is not None:
            one = unit(self.critic)
            error = average(squared_error(value / one, batch.target / one), batch.weight)
            total, metrics["value_loss"] = total - self.value_coefficient * error, error
        return total, {name: x.detach() for name, x in metrics.items()}


actor_critic = partial(reinforce, weights=per_token)

# IMPALA (Espeholt et al. 2018), with credit.vtrace: the steps may be stale, and each rollout is used several times.
off_policy_actor_critic = partial(reinforce, weights=per_token, epochs=4)
