"""TRPO and the natural gradient: objective and distance against their definitions; the step itself."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import off_policy
from oracles import gradient
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.testing import assert_close

from policygrad.algorithms.trpo import SurrogateObjective, npg, trpo
from policygrad.credit import Credit
from policygrad.divergences import kl
from policygrad.rollout import Rollout, decisions
from policygrad.score import sequence_ratio, token_ratio
from policygrad.updates import kl_radius, natural_step, trust_region_step
from policygrad.weights import per_episode, per_token

Sample = Callable[..., Rollout]
close = partial(assert_close, rtol=1e-10, atol=1e-12)


def weights_of(rollout: Rollout, weights: Callable[[Tensor], Tensor]) -> dict[tuple[int, int], float]:
    each = 1 / int(rollout.mask.sum()) if weights is per_token else 1 / len(rollout.mask)
    return {(i, t): each * rollout.importance[i, t].item() for i, t in rollout.mask.nonzero().tolist()}


def log_pi(policy: nn.Module, rollout: Rollout, i: int, t: int) -> Tensor:
    action = rollout.action[i, t].unsqueeze(0).unsqueeze(0)
    return policy(rollout.obs[i, t].view(1, 1, 3)).log_prob(action).sum()


@pytest.mark.parametrize("weights", [per_token, per_episode])
@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_the_objective_is_its_definition_token_by_token(
    ratio: Callable[..., Tensor], weights: Callable[[Tensor], Tensor], policy: nn.Module, sample: Sample
) -> None:
    """sum_w r A; of whole rows with r the geometric mean of its decisions' ratios."""
    rollout = off_policy(policy, sample)
    advantage, mask = torch.randn(7, 5), rollout.mask
    logs = {(i, t): log_pi(policy, rollout, i, t) - rollout.logp[i, t].item() for i, t in mask.nonzero().tolist()}
    defined = 0.0
    for (i, t), w in weights_of(rollout, weights).items():
        row = [x for (j, _), x in logs.items() if j == i]
        r = logs[i, t].exp() if ratio is token_ratio else (sum(row) / len(row)).exp()
        defined += w * r * advantage[i, t].item()
    batch = decisions(rollout, weights(mask), advantage.where(mask, torch.nan))
    found, metrics = SurrogateObjective(policy, ratio=ratio)(batch)
    close(found, defined)
    slope = gradient(defined, policy)
    assert slope.norm() > 1e-2
    close(gradient(found, policy), slope)
    share = weights_of(rollout, weights)
    entropy = sum(w * policy(rollout.obs[i, t].view(1, 1, 3)).entropy().sum() for (i, t), w in share.items())
    close(metrics["entropy"], entropy.detach() / sum(share.values()))


@pytest.mark.parametrize("weights", [per_token, per_episode])
def test_the_divergence_is_the_mean_kl_from_the_old_policy_to_the_new(
    weights: Callable[[Tensor], Tensor], policy: nn.Module, sample: Sample
) -> None:
    """From where it was when it was asked, wherever the policy goes; its gradient there is 0."""
    rollout = off_policy(policy, sample)
    batch = decisions(rollout, weights(rollout.mask), torch.zeros(7, 5))
    moved = SurrogateObjective(policy).divergence(batch)
    before = [p.detach().clone() for p in policy.parameters()]
    assert moved() == 0
    assert gradient(moved(), policy).abs().max() < 1e-14
    after = [p + 0.3 * torch.randn_like(p) for p in before]

    def said(parameters: list[Tensor]) -> Any:
        """What the policy says with these parameters, which it keeps."""
        with torch.no_grad():
            for p, x in zip(policy.parameters(), parameters, strict=True):
                p.copy_(x)
            return policy(rollout.obs)

    old, new = said(before), said(after)
    share, defined = weights_of(rollout, weights), 0.0
    for (i, t), w in share.items():
        if hasattr(old, "probs"):
            p, q = old.probs[i, t], new.probs[i, t]
            each = sum(p[a] * (p[a] / q[a]).log() for a in range(4))
        else:
            (m, s), (n, u) = ((x.base_dist.loc[i, t], x.base_dist.scale[i, t]) for x in (old, new))
            each = sum((u[k] / s[k]).log() + (s[k] ** 2 + (m[k] - n[k]) ** 2) / (2 * u[k] ** 2) - 0.5 for k in (0, 1))
        defined += w / sum(share.values()) * each
    assert defined > 1e-3
    close(moved().detach(), defined)


class Gaussian(nn.Module):
    """With the standard deviation itself a parameter: the distribution holds it as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.std = nn.Linear(3, 2), nn.Parameter(torch.ones(2))

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Normal(self.mean(obs), self.std, validate_args=False), 1)


def rewarded(rollout: Rollout) -> Credit:
    advantage = -rollout.action.square().sum(-1)
    return Credit(advantage, torch.zeros_like(advantage), torch.zeros_like(advantage))


def test_the_old_policy_stays_where_it_was_when_the_distribution_holds_a_parameter(
    float64: None, sample: Sample
) -> None:
    policy = Gaussian()
    rollout = sample(policy, rows=20, mask=torch.ones(20, 5, dtype=torch.bool))
    with torch.no_grad():
        before = Independent(Normal(policy.mean(rollout.obs).clone(), policy.std.clone().expand(20, 5, 2)), 1)
    metrics = next(trpo(lambda _: rollout, rewarded, SurrogateObjective(policy), trust_region_step(delta=0.01)))
    with torch.no_grad():
        moved = kl(before, policy(rollout.obs)).mean()
    assert metrics["accepted"] == 1
    assert 1e-4 < moved <= 0.01
    assert_close(metrics["kl_old"], moved)


@pytest.mark.parametrize("delta", [1e-3, 1e-2])
def test_what_is_reported_is_the_step_itself_and_not_an_estimate_of_it(
    delta: float, float64: None, sample: Sample
) -> None:
    policy = Gaussian()
    rollout = sample(policy, rows=20)
    objective = SurrogateObjective(policy)
    steps = {
        "trpo": trpo(lambda _: rollout, rewarded, objective, trust_region_step(delta=delta)),
        "npg": npg(lambda _: rollout, rewarded, objective, natural_step(step_size=partial(kl_radius, delta=delta))),
    }
    for name, run in steps.items():
        moved = objective.divergence(decisions(rollout, per_token(rollout.mask), rewarded(rollout).advantage))
        metrics = next(run)
        close(metrics["kl_old"], moved().detach())
        assert 0 < metrics["kl_old"] <= (delta if name == "trpo" else 2 * delta)
        assert 0 < metrics["effective_sample_size"] < 1
        assert {"improvement", "gradient_norm", "entropy"} <= metrics.keys()
