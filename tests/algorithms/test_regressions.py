"""Two bugs of the algorithms that only their own loop shows."""

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.testing import assert_close

from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.trpo import trpo
from policygrad.critics import no_fit
from policygrad.divergences import AdaptiveCoefficient, kl
from policygrad.rollout import Rollout


class Gaussian(nn.Module):
    """With the standard deviation itself a parameter: the distribution holds it as it is."""

    def __init__(self, size: int, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Linear(3, size), nn.Parameter(torch.full((size,), std))

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Normal(self.mean(obs), self.std, validate_args=False), 1)


class Zero(nn.Module):
    def forward(self, obs: Tensor) -> Tensor:
        return 0 * obs[..., 0]


def rollout(policy: nn.Module, mask: Tensor, obs: Tensor) -> Rollout:
    with torch.no_grad():
        action = policy(obs).sample()
        logp = policy(obs).log_prob(action)
    never = torch.zeros_like(mask)
    reward = -action.square().sum(-1)
    group = torch.arange(len(mask))
    return Rollout(obs, action, logp, reward, never, ~never, mask, group, final_obs=obs[:, 0], memoryless=True)


def test_trpos_old_policy_stays_where_it_was_when_the_distribution_holds_a_parameter() -> None:
    policy, obs = Gaussian(2, 1.0), torch.randn(20, 5, 3)
    with torch.no_grad():
        before = Normal(policy.mean(obs).clone(), policy.std.detach().clone())
    everywhere = torch.ones(20, 5, dtype=torch.bool)
    metrics = next(trpo(policy, Zero(), lambda policy: rollout(policy, everywhere, obs), no_fit))
    with torch.no_grad():
        moved = kl(Independent(before, 1), policy(obs)).mean()
    assert metrics["accepted"] == 1
    assert moved <= 0.01
    assert_close(metrics["kl"], moved)


def test_ppos_kl_penalty_has_a_gradient_when_the_density_behind_the_mask_is_huge() -> None:
    policy, obs = Gaussian(100, 0.05), torch.zeros(2, 4, 3)  # log pi near 158: its exponential is no float
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1]]).bool()
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-9)
    algorithm = ppo(
        policy,
        Zero(),
        lambda policy: rollout(policy, mask, obs),
        optimizer,
        penalty=AdaptiveCoefficient(1.0),
        epochs=1,
        minibatch_size=8,
    )
    assert torch.isfinite(next(algorithm)["gradient_norm"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
