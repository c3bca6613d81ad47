"""Token sequences small enough to list, and what a method's own update expects: the sum over every batch."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from policygrad.algorithms.grpo import measured_in_steps
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
from policygrad.train.compose import Learner, compose
from policygrad.train.methods import METHODS
from policygrad.train.options import has_critic, options_of
from policygrad.updates import ascend

# Completions (0,), (1, 0), (1, 1, 0) and (1, 1, 1) of each prompt; two of the first prompt's are worth the same.
REWARD = {(0,): (0.4, -1.0), (1, 0): (-0.3, 0.7), (1, 1, 0): (1.1, 0.2), (1, 1, 1): (-0.3, 2.0)}
WORLD = TokenWorld(2, 2, 3, lambda prompt, y: REWARD[y][prompt])
TREE = tree(WORLD)

Sample = Callable[[nn.Module], Rollout]
Method = Callable[..., Iterator[dict[str, Any]]]  # (policy, sample, optimizer, **options)
# The lines of the table that exchange one piece of GRPO.
# Those of GRPO's objective, without a critic.
FAMILY = [n for n, x in METHODS.items() if x.objective == "grpo" and not has_critic(options_of(n, "exact")())]


def composed(
    name: str,
    policy: nn.Module,
    sample: Sample,
    critic: nn.Module | None = None,
    reference: nn.Module | None = None,
    **values: Any,
) -> Learner:
    """A line of the table. If nothing else is said there is no discount, and a gradient is as long as it is."""
    kind = options_of(name, "exact")
    free = {"gamma": 1.0} | ({"max_grad_norm": inf} if METHODS[name].update == "ascend" else {})
    paid = positive(sample) if kind(**values).credit == "group" and kind(**values).group_scale == "mean" else sample
    return compose(kind(**(free | values)), policy, critic, paid, None if reference is None else lambda: reference)


def positive(sample: Sample) -> Sample:
    """The same with the size of each reward, for a credit that none may be negative for."""

    def sampled(policy: nn.Module) -> Rollout:
        rollout = sample(policy)
        return replace(rollout, reward=rollout.reward.abs())

    return sampled


def line(name: str) -> Method:
    """A line of the table whose gradient is followed by an optimizer that is given. GRPO's metrics are the step's."""

    def method(policy: nn.Module, sample: Sample, optimizer: Optimizer, /, **values: Any) -> Iterator[dict[str, Any]]:
        learner = composed(name, policy, sample, **values)
        if METHODS[name].objective == "grpo":
            learner = replace(learner, loop=partial(learner.loop, diagnose=measured_in_steps))
        bound = {"max_grad_norm": values.get("max_grad_norm", inf), "micro_batch": values.get("micro_batch")}
        return iter(replace(learner, update=ascend(optimizer, **bound)))

    return method


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


def iteration(method: Method, policy: nn.Module, sample: Sample, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """The change of the parameters in one iteration at a learning rate of 1, which is the gradient; and the metrics."""
    learner = deepcopy(policy)
    metrics = next(method(learner, sample, SGD(learner.parameters(), lr=1.0), **options))
    return parameters(learner) - parameters(policy), metrics


def every_group(policy: OnPrefixes, size: int, *, by: OnPrefixes | None = None) -> Iterator[tuple[Tensor, Rollout]]:
    """All groups of `size` completions that the policy `by` samples: (probability, rollout).

    A group is listed once for all orders of its rows, which make no difference (test_grpo.py holds that).
    """
    rollout, probability = completions(policy.world, table(by or policy))
    index, weight = groups(rollout, probability, size)
    index, same = index.sort(1).values.unique(dim=0, return_inverse=True)
    weight = torch.zeros(len(index), dtype=weight.dtype).index_add(0, same, weight)
    for chosen, share in zip(index, weight, strict=True):
        yield share, rollout.rows(chosen)


def expected(
    method: Method,
    policy: OnPrefixes,
    size: int,
    *,
    by: OnPrefixes | None = None,
    wrap: Callable[[Sample], Sample] = lambda sample: sample,
    **options: Any,
) -> Tensor:
    """E of the method's own first update, over all groups of `size` completions that the policy `by` samples."""
    total = torch.zeros_like(parameters(policy))
    for share, part in every_group(policy, size, by=by):
        total += share * iteration(method, policy, wrap(lambda _, part=part: part), **options)[0]
    return total


def assert_split_changes_nothing(policy: nn.Module, learn: Callable[..., tuple[Tensor, dict[str, Any]]]) -> None:
    """learn(micro_batch=rows at a time) -> (change, metrics), of at most 35 decisions."""
    tolerance = 4 * 35 * torch.finfo(next(policy.parameters()).dtype).eps  # a rounding for each term, of a few sums
    torch.manual_seed(1)
    whole, metrics = learn(micro_batch=None)
    assert whole.norm() > 1e-3
    for rows in (1, 2, 3):
        torch.manual_seed(1)
        split, split_metrics = learn(micro_batch=rows)
        assert (split - whole).norm() <= tolerance * whole.norm(), rows
        assert list(split_metrics) == list(metrics)
        for name in metrics.keys() - {"effective_sample_size"}:  # a ratio of two means
            assert_close(split_metrics[name], metrics[name], rtol=tolerance, atol=tolerance, msg=f"{name}, {rows} rows")
