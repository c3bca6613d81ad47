"""Advantage actor-critic: its objective against the definition; and V-trace, whose credit follows the policy."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import off_policy
from oracles import TREE, WORLD, every_group, gradient, parameters, table, token_policy
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from policygrad.algorithms.actor_critic import ActorCriticObjective, actor_critic, off_policy_actor_critic
from policygrad.credit import Credit, vtrace
from policygrad.exact.closed_form import visitation, weighted_gradient
from policygrad.exact.expected import vtrace_credit
from policygrad.exact.policies import TabularCritic, score_table
from policygrad.exact.sampler import CompletionSampler
from policygrad.exact.tokens import OnPrefixes
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.updates import Metrics, Objective, ascend
from policygrad.weights import per_episode, per_token

Sample = Callable[..., Rollout]
close = partial(assert_close, rtol=1e-10, atol=1e-12)
BARS = {"lam": 0.8, "rho_bar": 1.1, "c_bar": 0.9}


@pytest.mark.parametrize("memoryless", [True, False])
@pytest.mark.parametrize("weights", [per_token, per_episode])
@pytest.mark.parametrize("with_critic", [True, False])
def test_the_objective_is_its_definition_token_by_token(
    with_critic: bool,
    weights: Callable[[Tensor], Tensor],
    memoryless: bool,
    policy: nn.Module,
    critic: nn.Module,
    sample: Sample,
) -> None:
    """sum_w [log pi A + c_H H - c_V (V - target)^2], with gradients of policy and critic."""
    rollout = off_policy(policy, sample, memoryless=memoryless)
    advantage, target = torch.randn(2, 7, 5)
    mask = rollout.mask
    each = 1 / int(mask.sum()) if weights is per_token else 1 / 7
    gain, entropy, loss = 0.0, 0.0, 0.0
    for i, t in mask.nonzero().tolist():
        w, obs = each * rollout.importance[i, t].item(), rollout.obs[i, t].view(1, 1, 3)
        distribution = policy(obs)
        gain += w * advantage[i, t].item() * distribution.log_prob(rollout.action[i, t].unsqueeze(0).unsqueeze(0)).sum()
        entropy += w * distribution.entropy().sum()
        loss += w * (critic(obs).sum() - target[i, t].item()) ** 2
    defined = gain + 0.2 * entropy - (0.7 * loss if with_critic else 0.0)
    objective = ActorCriticObjective(
        policy, critic if with_critic else None, entropy_coefficient=0.2, value_coefficient=0.7
    )
    batch = decisions(rollout, weights(mask), *(x.where(mask, torch.nan) for x in (advantage, target, target)))
    found, metrics = objective(batch)
    close(found, defined)
    wanted = {"objective": gain, "entropy": entropy} | ({"value_loss": loss} if with_critic else {})
    close(metrics, {name: x.detach() for name, x in wanted.items()})
    for module in (policy, critic) if with_critic else (policy,):
        slope = torch.cat(
            [g.flatten() for g in torch.autograd.grad(defined, list(module.parameters()), retain_graph=True)]
        )
        assert slope.norm() > 1e-2
        mine = torch.autograd.grad(found, list(module.parameters()), retain_graph=True)
        close(torch.cat([g.flatten() for g in mine]), slope)


# Off the policy


@pytest.fixture
def policy_of_tokens(float64: None) -> OnPrefixes:
    return token_policy(0)


@pytest.fixture
def critic_of_tokens(float64: None) -> OnPrefixes:
    return OnPrefixes(WORLD, TabularCritic(torch.randn(len(TREE.start))))


def test_the_first_step_expects_vtraces_gradient(policy_of_tokens: OnPrefixes, critic_of_tokens: OnPrefixes) -> None:
    """Of steps that another policy took: sum_s eta_mu(s) sum_a mu(a|s) grad log pi(a|s) E_mu[A|s, a]."""
    policy, mu = policy_of_tokens, token_policy(3, near=policy_of_tokens)
    found = torch.zeros_like(parameters(policy))

    def update(objective: Objective, batch: Batch) -> Metrics:
        nonlocal found
        found = found + share * gradient(objective(batch)[0], policy)
        return {}

    credit = vtrace(policy, critic_of_tokens.requires_grad_(False), gamma=1.0, **BARS)
    for share, rollout in every_group(policy, 1, by=mu):  # noqa: B007  `update` reads it
        loop = off_policy_actor_critic(
            lambda _, rollout=rollout: rollout,
            credit,
            ActorCriticObjective(policy, None),
            update,
            weights=per_episode,
            epochs=1,
        )
        next(loop)
    probs, probs_old = table(policy).detach(), table(mu).detach()
    value = critic_of_tokens.module.value.detach()
    each = vtrace_credit(TREE, probs, probs_old, value, **BARS)
    score = score_table(policy.module.features, probs)
    defined = weighted_gradient(visitation(TREE, probs_old, 1.0), probs_old, each, score)
    assert defined.norm() > 1e-2
    close(found, defined)


def test_credit_is_assigned_afresh_before_each_step(policy_of_tokens: OnPrefixes, critic_of_tokens: OnPrefixes) -> None:
    """From the policy and the critic as the step before has left them."""
    policy, critic = policy_of_tokens, critic_of_tokens
    rollout = CompletionSampler(WORLD, 4, 4)(token_policy(3, near=policy))
    assign, wanted, seen = vtrace(policy, critic, gamma=1.0, **BARS), [], []
    inner = ascend(SGD([*policy.parameters(), *critic.parameters()], lr=1.0))

    def update(objective: Objective, batch: Batch) -> Metrics:
        wanted.append(decisions(rollout, per_token(rollout.mask), *assign(rollout)))  # of now
        seen.append(batch)
        return inner(objective, batch)

    run = off_policy_actor_critic(lambda _: rollout, assign, ActorCriticObjective(policy, critic), update)
    next(run)
    assert len(seen) == 4
    for batch, fresh in zip(seen, wanted, strict=True):
        for name in ("advantage", "target", "value"):
            assert torch.equal(getattr(batch, name), getattr(fresh, name)), name
    for a, b in pairwise(seen):
        assert (a.advantage - b.advantage).abs().max() > 1e-3
        assert (a.value - b.value).abs().max() > 1e-3


def test_on_the_policy_one_step_is_one_step(policy_of_tokens: OnPrefixes) -> None:
    rollout, calls = CompletionSampler(WORLD, 4, 4)(policy_of_tokens), []

    def credit(rollout: Rollout) -> Credit:
        calls.append(1)
        return Credit(*torch.zeros(3, *rollout.mask.shape))

    run = actor_critic(
        lambda _: rollout, credit, ActorCriticObjective(policy_of_tokens, None), lambda *_: {}, diagnose=lambda *_: {}
    )
    next(run)
    assert calls == [1]
