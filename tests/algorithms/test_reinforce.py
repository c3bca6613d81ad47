"""REINFORCE: its objective against the definition, and the loop of every method that takes one step on a rollout."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import off_policy
from oracles import WORLD, expected, gradient, parameters, reward_gradient, token_policy
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from policygrad.advantages import mean_baseline
from policygrad.algorithms.reinforce import ReinforceObjective, reinforce
from policygrad.credit import Credit, baselined
from policygrad.exact.sampler import CompletionSampler
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.updates import Metrics, Objective, ascend
from policygrad.weights import per_episode, per_row, per_token

Sample = Callable[..., Rollout]
close = partial(assert_close, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize("weights", [per_episode, per_token, per_row])
@pytest.mark.parametrize("memoryless", [True, False])
def test_the_objective_is_its_definition_token_by_token(
    memoryless: bool, weights: Callable[[Tensor], Tensor], coefficient: float, policy: nn.Module, sample: Sample
) -> None:
    """sum_w log pi A, and c_H times the mean entropy, the weights of which add up to 1."""
    rollout = off_policy(policy, sample, memoryless=memoryless)
    advantage, mask = torch.randn(7, 5), rollout.mask
    counts = mask.sum(1).tolist()
    of_row = {per_token: [1 / sum(counts)] * 7, per_row: [1 / n / 7 for n in counts], per_episode: [1 / 7] * 7}[weights]
    weight = {
        (i, t): of_row[i] * rollout.importance[i, t].item() for i in range(7) for t in range(5) if rollout.mask[i, t]
    }
    gain, entropy = 0.0, 0.0
    for (i, t), w in weight.items():
        distribution = policy(rollout.obs[i, t].view(1, 1, 3))
        gain += w * advantage[i, t].item() * distribution.log_prob(rollout.action[i, t].unsqueeze(0).unsqueeze(0)).sum()
        entropy += w / sum(weight.values()) * distribution.entropy().sum()
    defined = gain + coefficient * entropy
    batch = decisions(rollout, weights(mask), advantage.where(mask, torch.nan))
    found, metrics = ReinforceObjective(policy, entropy_coefficient=coefficient)(batch)
    close(found, defined)
    close(metrics["objective"], gain.detach())
    close(metrics["entropy"], entropy.detach())
    slope = gradient(defined, policy)
    assert slope.norm() > 1e-2
    close(gradient(found, policy), slope)


def of_returns(policy: nn.Module, sample: Sample, optimizer: Optimizer, **options: Any) -> Any:
    return reinforce(sample, baselined(), ReinforceObjective(policy), ascend(optimizer), **options)


def test_it_expects_the_gradient_of_j(float64: None) -> None:
    policy = token_policy(0)
    close(expected(of_returns, policy, 1), reward_gradient(policy))


# The loop


class Order:
    """What a loop calls, in order."""

    def __init__(self, sample: Sample, policy: nn.Module) -> None:
        self.calls: list[str] = []
        self.inner, self.update_ = sample, ascend(SGD(policy.parameters(), lr=0.1))

    def sample(self, policy: nn.Module) -> Rollout:
        self.calls.append("sample")
        return self.inner(policy)

    def credit(self, rollout: Rollout) -> Credit:
        self.calls.append("credit")
        return baselined()(rollout)

    def update(self, objective: Objective, batch: Batch) -> Metrics:
        self.calls.append("update")
        return self.update_(objective, batch)

    def fit(self, batch: Batch) -> Metrics:
        self.calls.append("fit")
        return {"value_loss": torch.tensor(1.0)}


@pytest.mark.parametrize("epochs", [1, 3])
def test_sample_then_credit_and_update_each_time_then_fit(epochs: int, softmax: nn.Module, sample: Sample) -> None:
    """A critic learns after the policy: one that had seen the returns would bias their advantages."""
    order = Order(sample, softmax)
    objective = ReinforceObjective(softmax)
    run = reinforce(order.sample, order.credit, objective, order.update, fit=order.fit, epochs=epochs)
    for _ in range(2):
        order.calls.clear()
        metrics = next(run)
        assert order.calls == ["sample"] + ["credit", "update"] * epochs + ["fit"]
        assert metrics["value_loss"] == 1


def test_the_metrics_are_means_over_the_steps_and_say_how_far_they_went_in_all(float64: None) -> None:
    policy, steps = token_policy(0), []
    rollout = CompletionSampler(WORLD, 4, 4)(policy)
    inner = ascend(SGD(policy.parameters(), lr=0.5))

    def update(objective: Objective, batch: Batch) -> Metrics:
        steps.append(inner(objective, batch))
        return steps[-1]

    metrics = next(reinforce(lambda _: rollout, baselined(), ReinforceObjective(policy), update, epochs=3))
    close(metrics["gradient_norm"], sum(step["gradient_norm"] for step in steps) / 3)
    new = policy(rollout.obs).log_prob(rollout.action)
    ratio = (new - rollout.logp).exp()
    kl = (ratio - 1 - ratio.log())[rollout.mask].mean()
    assert kl > 1e-3
    close(metrics["kl_old"], kl.detach())
    assert metrics["return"] == rollout.metrics["return"]


def test_weights_are_the_methods_own(float64: None) -> None:
    policy = token_policy(0)
    rollout, start = CompletionSampler(WORLD, 4, 4)(policy), parameters(policy)
    seen: list[Tensor] = []

    def update(objective: Objective, batch: Batch) -> Metrics:
        seen.append(batch.weight)
        return {}

    credit = baselined(baseline=mean_baseline)
    next(reinforce(lambda _: rollout, credit, ReinforceObjective(policy), update, diagnose=lambda *_: {}))
    next(
        reinforce(
            lambda _: rollout, credit, ReinforceObjective(policy), update, weights=per_row, diagnose=lambda *_: {}
        )
    )
    close(seen[0], rollout.mask / 16)
    close(seen[1], per_row(rollout.mask))
    assert torch.equal(parameters(policy), start)
