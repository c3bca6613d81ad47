"""Token sequences small enough to list, and what an algorithm's own update expects: the sum over every batch."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from policygrad.algorithms.grpo import grpo
from policygrad.algorithms.variants import cispo, dapo, dr_grpo, gspo, reinforce_plus_plus, rloo
from policygrad.exact.enumeration import rows
from policygrad.exact.policies import SoftmaxPolicy, probabilities, tabular
from policygrad.exact.tokens import (
    OnPrefixes,
    TokenWorld,
    completions,
    groups,
    log_likelihood,
    prefix_state,
    tree,
)
from policygrad.rollout import Rollout

# Completions (0,), (1, 0), (1, 1, 0) and (1, 1, 1) of each prompt; two of the first prompt's are worth the same.
REWARD = {(0,): (0.4, -1.0), (1, 0): (-0.3, 0.7), (1, 1, 0): (1.1, 0.2), (1, 1, 1): (-0.3, 2.0)}
WORLD = TokenWorld(2, 2, 3, lambda prompt, y: REWARD[y][prompt])
TREE = tree(WORLD)

Algorithm = Callable[..., Any]
VARIANTS: dict[str, Algorithm] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
}


def token_policy(
    seed: int = 0, near: nn.Module | None = None, distance: float = 0.8, world: TokenWorld = WORLD
) -> OnPrefixes:
    """A policy with a logit for each token after each prefix, or one at a distance from another."""
    features = tabular(*tree(world).reward.shape)
    theta = distance * torch.randn(features.shape[-1], generator=torch.Generator().manual_seed(seed))
    start = torch.zeros_like(theta) if near is None else parameters(near)
    return OnPrefixes(world, SoftmaxPolicy(features, start + theta))


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def table(policy: OnPrefixes) -> Tensor:
    """pi(token|prefix) [S, A], differentiable in the policy's parameters."""
    return probabilities(policy.module)  # type: ignore[arg-type]


def log_p(policy: OnPrefixes, rollout: Rollout) -> Tensor:
    """log P(y|x) [B], through the table of prefixes and not through the policy's distribution."""
    return log_likelihood(rollout, table(policy), prefix_state(policy.world, rollout.obs))


def gradient(value: Tensor, policy: nn.Module) -> Tensor:
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(policy.parameters()))])


def reward_gradient(policy: OnPrefixes) -> Tensor:
    """grad J = grad sum_y P(x) P(y|x) R(x, y), over the list of completions."""
    rollout, _ = completions(policy.world, table(policy))
    return gradient((log_p(policy, rollout).exp() * rollout.reward.sum(1)).sum() / policy.world.prompts, policy)


def iteration(
    algorithm: Algorithm, policy: nn.Module, sample: Callable[[nn.Module], Rollout], **options: Any
) -> tuple[Tensor, dict[str, Any]]:
    """The change of the parameters in one iteration at a learning rate of 1, which is the gradient; and the metrics."""
    learner = deepcopy(policy)
    optimizer = SGD(learner.parameters(), lr=1.0)
    metrics = next(algorithm(learner, sample, optimizer, **({"max_grad_norm": torch.inf} | options)))
    return parameters(learner) - parameters(policy), metrics


def expected(
    algorithm: Algorithm,
    policy: OnPrefixes,
    size: int,
    *,
    by: OnPrefixes | None = None,
    wrap: Callable[[Callable[[nn.Module], Rollout]], Callable[[nn.Module], Rollout]] = lambda sample: sample,
    **options: Any,
) -> Tensor:
    """E of the algorithm's own first update, over all groups of `size` completions that the policy `by` samples.

    A group is listed once for all orders of its rows, which make no difference (test_grpo.py holds that).
    """
    rollout, probability = completions(policy.world, table(by or policy))
    index, weight = groups(rollout, probability, size)
    index, same = index.sort(1).values.unique(dim=0, return_inverse=True)
    weight = torch.zeros(len(index)).index_add(0, same, weight)
    total = torch.zeros_like(parameters(policy))
    for chosen, share in zip(index, weight, strict=True):
        part = rows(rollout, chosen)
        total += share * iteration(algorithm, policy, wrap(lambda _, part=part: part), **options)[0]
    return total
