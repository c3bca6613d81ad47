"""What is done with the gradient, held against a solved world: natural step, trust region, clipping, minibatches."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policygrad.advantages import gae, group_mean, group_std, leave_one_out, standardize
from policygrad.algorithms.ppo import PPOObjective
from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.exact.closed_form import (
    advantage,
    expected_return,
    fisher,
    kl_by_state,
    lower_bound,
    mean_kl,
    natural_gradient,
    optimal_return,
    performance_difference,
    policy_gradient,
    visitation,
)
from policygrad.exact.policies import SoftmaxPolicy, probabilities, score_table, tabular
from policygrad.exact.worlds import World, garnet
from policygrad.linalg import conjugate_gradient, fisher_vector_product, flat_gradient
from policygrad.objectives import clipped_surrogate
from policygrad.returns import reward_to_go
from policygrad.rollout import Batch, minibatches
from policygrad.score import token_ratio
from policygrad.updates import Metrics, Update, ascend, kl_radius, learning_rate, natural_step, trust_region_step

DELTA = 0.01
LOW, HIGH = 0.2, 0.3


@dataclass(frozen=True)
class Check:
    """One claim: what was measured, what it should be, and whether it is."""

    name: str
    measured: float
    claim: str
    holds: bool


def update_checks(seed: int) -> list[Check]:
    """Every claim about updates, on a random world of four states and three actions."""
    world = garnet(4, 3, 2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    features = identifiable(4, 3)
    theta = torch.randn(features.shape[-1], generator=generator)
    away = torch.randn(64, features.shape[-1], generator=generator)
    mix = torch.randn(len(theta), len(theta), generator=generator) + 2 * torch.eye(len(theta))
    at = partial(SoftmaxPolicy, features)
    return [
        *_identities(world, at(theta), [at(theta + a) for a in away]),
        *_natural(world, at(theta), mix),
        *_radius(world, at(theta)),
        *_trust_region(world, at(theta)),
        _restored(world, at(theta)),
        *_clipping(world, at(theta)),
        *_batches(world, at(theta)),
        *_credit(),
    ]


def identifiable(states: int, actions: int) -> Tensor:
    """One logit for each (s, a) but the last action of each state, whose logit is 0: then F has an inverse."""
    return tabular(states, actions).view(states, actions, states, actions)[..., :-1].flatten(2)


def exact_batch(world: World, policy: SoftmaxPolicy) -> Batch:
    """Every (s, a) once, weighted by d(s) pi(a|s), with its exact advantage: a rollout without chance."""
    probs = probabilities(policy).detach()
    states, actions = probs.shape
    visits = visitation(world, probs, world.gamma)
    weight = (visits / visits.sum()).unsqueeze(1) * probs
    obs = torch.arange(states).repeat_interleave(actions).unsqueeze(1)
    action = torch.arange(actions).repeat(states).unsqueeze(1)
    columns = [x.reshape(-1, 1) for x in (probs.log(), weight, advantage(world, probs))]
    zero = torch.zeros_like(columns[0])
    return Batch(obs, action, columns[0], zero == 0, columns[1], columns[2], zero, zero)


def _small(name: str, error: Tensor | float, limit: float = 1e-9) -> Check:
    error = float(error)
    return Check(name, error, f"below {limit:.0e}", error <= limit)  # false for NaN


def _identities(world: World, policy: SoftmaxPolicy, others: list[SoftmaxPolicy]) -> list[Check]:
    """The performance difference and the lower bound, at policies near and far."""
    old = probabilities(policy).detach()
    error, slack = 0.0, torch.inf
    for other in others:
        new = probabilities(other).detach()
        gained = expected_return(world, new) - expected_return(world, old)
        error = max(error, float((gained - performance_difference(world, new, old)).abs()))
        slack = min(slack, float(expected_return(world, new) - lower_bound(world, new, old)))
    return [
        _small("performance difference identity, 64 policies: error", error),
        Check("J above TRPO's lower bound, 64 policies: least slack", slack, "not negative", slack >= -1e-9),
    ]


def _natural(world: World, policy: SoftmaxPolicy, mix: Tensor) -> list[Check]:
    """Gradient, Fisher-vector product, conjugate gradient, and what a change of coordinates does to a step."""
    probs = probabilities(policy).detach()
    score, visits = score_table(policy.features, probs), visitation(world, probs, world.gamma)
    matrix, gradient = fisher(visits, probs, score), policy_gradient(world, probs, score) / visits.sum()
    batch, objective = exact_batch(world, policy), SurrogateObjective(policy)
    found = flat_gradient(objective(batch)[0], [policy.theta])
    product = fisher_vector_product(objective.divergence(batch), [policy.theta])
    columns = torch.stack([product(e) for e in torch.eye(len(gradient))])
    dense = natural_gradient(matrix, gradient)
    solved = conjugate_gradient(product, gradient, iters=len(gradient) + 2)
    few = conjugate_gradient(product, gradient, iters=3)
    left = float((few - dense).norm() / dense.norm())
    natural = natural_step(step_size=partial(learning_rate, rate=0.1), **_EXACT)
    radius = natural_step(step_size=partial(kl_radius, delta=DELTA), **_EXACT)
    differs = partial(_step_in_both, world, policy, mix)
    moved = (_after(world, policy, natural).theta - policy.theta).detach()
    plain = differs(None)
    return [
        _small("gradient of the surrogate against grad J: error", (found - gradient).abs().max()),
        _small("Fisher-vector product against the matrix: error", (columns - matrix).abs().max()),
        _small("conjugate gradient against the dense solve: error", (solved - dense).norm() / dense.norm(), 1e-6),
        Check("the same after 3 of 8 products", left, "above 0, below 1", 0 < left < 1),
        _small("natural step in other coordinates: pi differs by", differs(natural), 1e-6),
        _small("natural step of KL delta in other coordinates: pi differs by", differs(radius), 1e-6),
        Check("plain step in other coordinates: pi differs by", plain, "above 1e-3", plain > 1e-3),
        _small("natural step of rate 0.1 against 0.1 F^-1 g: error", (moved - 0.1 * dense).abs().max(), 1e-6),
    ]


_EXACT: dict[str, Any] = {"damping": 0.0, "cg_iters": 20}


def _after(world: World, policy: SoftmaxPolicy, update: Update | None) -> SoftmaxPolicy:
    """A copy of the policy, one step on; without an update, a plain one of rate 0.1."""
    policy = deepcopy(policy)
    update = update or ascend(torch.optim.SGD(policy.parameters(), lr=0.1))
    update(SurrogateObjective(policy), exact_batch(world, policy))
    return policy


def _step_in_both(world: World, policy: SoftmaxPolicy, mix: Tensor, update: Update | None) -> float:
    """max |pi - pi'| after the same step with theta, and with theta' where theta = M theta'."""
    other = SoftmaxPolicy(policy.features @ mix, torch.linalg.solve(mix, policy.theta.detach()))
    one, two = (probabilities(_after(world, p, update)) for p in (policy, other))
    return float((one - two).detach().abs().max())


def _radius(world: World, policy: SoftmaxPolicy) -> list[Check]:
    """KL(old, new) of the natural step over delta: 1 to second order, so its error falls with sqrt(delta)."""
    checks, old = [], probabilities(policy).detach()
    for delta in (1e-2, 1e-4, 1e-6):
        update = natural_step(step_size=partial(kl_radius, delta=delta), **_EXACT)
        new = probabilities(_after(world, policy, update)).detach()
        ratio = float(mean_kl(visitation(world, old, world.gamma), old, new)) / delta
        limit = 10 * delta**0.5
        name = f"KL of the natural step over delta = {delta:.0e}"
        checks.append(Check(name, ratio, f"1 within {limit:.0e}", abs(ratio - 1) <= limit))
    return checks


def _trust_region(world: World, policy: SoftmaxPolicy, steps: int = 25) -> list[Check]:
    """Trust-region steps with exact advantages: J against what they promise."""
    policy, update = deepcopy(policy), trust_region_step(delta=DELTA, **_EXACT)
    first, best = float(expected_return(world, probabilities(policy).detach())), float(optimal_return(world))
    rise, slack, farthest, error, surrogate_gain = torch.inf, torch.inf, 0.0, 0.0, torch.inf
    for _ in range(steps):
        old = probabilities(policy).detach()
        report = update(SurrogateObjective(policy), exact_batch(world, policy))
        new = probabilities(policy).detach()
        moved = float(mean_kl(visitation(world, old, world.gamma), old, new))
        rise = min(rise, float(expected_return(world, new) - expected_return(world, old)))
        slack = min(slack, float(expected_return(world, new) - lower_bound(world, new, old)))
        farthest, error = max(farthest, moved), max(error, abs(moved - float(report["kl_old"])))
        surrogate_gain = min(surrogate_gain, float(report["improvement"]))
    share = (float(expected_return(world, new)) - first) / (best - first)
    return [
        Check(f"TRPO, {steps} steps: least rise of J", rise, "not negative", rise >= -1e-9),
        Check("TRPO: share of the way to the optimal J", share, "above 0.5", share > 0.5),
        Check("TRPO: least rise of the surrogate", surrogate_gain, "not negative", surrogate_gain >= 0),
        Check("TRPO: J above its lower bound, least slack", slack, "not negative", slack >= -1e-9),
        Check("TRPO: largest KL(old, new) over delta", farthest / DELTA, "at most 1, above 0.5",
              0.5 < farthest / DELTA <= 1 + 1e-9),
        _small("TRPO: KL it reports against KL(old, new): error", error),
    ]  # fmt: skip


class _Falling(SurrogateObjective):
    """One that falls wherever one steps."""

    calls = 0

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        self.calls += 1
        value, metrics = super().forward(batch)
        return value - self.calls, metrics


def _restored(world: World, policy: SoftmaxPolicy) -> Check:
    """Where no step is accepted the parameters must be what they were, bit for bit."""
    policy, before = deepcopy(policy), policy.theta.detach().clone()
    trust_region_step(delta=DELTA, **_EXACT)(_Falling(policy), exact_batch(world, policy))
    changed = int((policy.theta != before).sum())
    return Check("TRPO, no step accepted: parameters changed", float(changed), "exactly 0", changed == 0)


def _clipping(world: World, policy: SoftmaxPolicy) -> list[Check]:
    """PPO's objective inside its bound, at it and beyond: pointwise, and after many steps on one batch."""
    ratio = torch.cat([torch.linspace(0.2, 2.0, 37), torch.tensor([1 - LOW, 1 + HIGH])]).repeat(2).unsqueeze(1)
    gain = torch.tensor([1.0, -2.0]).repeat_interleave(len(ratio) // 2).unsqueeze(1)
    ratio.requires_grad_()
    value = clipped_surrogate(ratio.log(), ratio, gain, low=LOW, high=HIGH)
    slope = torch.autograd.grad(value.sum(), ratio)[0]
    at = ratio.detach()
    rewarded = ((gain > 0) & (at > 1 + HIGH + 1e-9)) | ((gain < 0) & (at < 1 - LOW - 1e-9))
    inside = (at > 1 - LOW + 1e-9) & (at < 1 + HIGH - 1e-9)
    back = ~rewarded & ~inside & (at - 1 - HIGH).abs().gt(1e-9) & (at - 1 + LOW).abs().gt(1e-9)
    policy = deepcopy(policy)
    old, batch = probabilities(policy).detach(), exact_batch(world, policy)
    objective, update = (
        PPOObjective(policy, None, clip=(LOW, HIGH)),
        ascend(torch.optim.SGD(policy.parameters(), lr=1.0)),
    )
    start = float(objective(batch)[0].detach())
    for _ in range(200):
        update(objective, batch)
    gained = float(objective(batch)[0].detach()) - start
    bound = float((batch.weight * torch.where(batch.advantage > 0, HIGH, LOW) * batch.advantage.abs()).sum())
    ratios = (probabilities(policy).detach() / old).flatten()
    moved = float(kl_by_state(old, probabilities(policy).detach()).max())
    return [
        _small("PPO: clipped minus surrogate, at most", (value - ratio * gain).detach().max(), 1e-12),
        _small("PPO, inside the bound: slope against A, error", (slope - gain)[inside].abs().max(), 1e-12),
        _small("PPO, beyond it the rewarded way: slope", slope[rewarded].abs().max(), 1e-12),
        _small("PPO, beyond it the other way: slope against A, error", (slope - gain)[back].abs().max(), 1e-12),
        Check("PPO, 200 steps on one batch: gain over its bound", gained / bound, "above 0, at most 1",
              0 < gained / bound <= 1 + 1e-9),
        Check("the same: largest ratio (nothing holds it at the bound)", float(ratios.max()), f"above {1 + HIGH}",
              float(ratios.max()) > 1 + HIGH),
        Check("the same: largest KL(old, new) of a state", moved, "finite", 0 < moved < torch.inf),
    ]  # fmt: skip


def _batches(world: World, policy: SoftmaxPolicy) -> list[Check]:
    """Minibatches of any size add up to the gradient of the whole batch, and the first ratio is 1."""
    batch, objective = exact_batch(world, policy), SurrogateObjective(policy)
    whole = flat_gradient(objective(batch)[0], [policy.theta])
    error = 0.0
    state = torch.get_rng_state()  # minibatches are drawn from the global generator: leave it as it was
    for size in (1, 3, 5, 7, 12):
        parts = [flat_gradient(objective(part)[0], [policy.theta]) for part in minibatches(batch, size)]
        error = max(error, float((torch.stack(parts).mean(0) - whole).abs().max()))
    torch.set_rng_state(state)
    first = token_ratio(policy(batch.obs).log_prob(batch.action), batch.logp, batch.mask)
    return [
        _small("minibatches of 1, 3, 5, 7, 12: mean gradient against the whole, error", error),
        _small("ratio before the first step, minus 1", (first - 1).detach().abs().max(), 1e-12),
    ]


def _credit() -> list[Check]:
    """Credit that must be exactly nothing: equal rewards of a group, a constant reward under a time limit."""
    gamma, steps = 0.9, 5
    reward, value = torch.ones(2, steps), torch.full((2, steps + 1), 1 / (1 - gamma))
    terminated = torch.zeros(2, steps, dtype=torch.bool)
    ended = terminated.clone()
    ended[:, -1] = True
    cut = gae(reward, value, terminated, ended, gamma, 0.95)
    score, group = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7]), torch.tensor([0, 0, 0, 1, 1, 1])
    flat = (score - group_mean(score, group)) / (group_std(score, group) + 1e-12)
    alone = torch.cat([flat, score - leave_one_out(score, group)])
    mixed, either = torch.tensor([0.0, 1.0, 5.0, 7.0, 3.0]) + 1e8, torch.tensor([0, 0, 1, 1, 1])
    by_hand = torch.tensor([0.5, 0.5, 5.0, 5.0, 5.0]) + 1e8, torch.tensor([0.5**0.5] * 2 + [2.0] * 3)
    others = torch.tensor([1.0, 0.0, 5.0, 4.0, 6.0]) + 1e8
    found = (group_mean(mixed, either), by_hand[0]), (group_std(mixed, either), by_hand[1])
    error = max(float((x - y).abs().max()) for x, y in (*found, (leave_one_out(mixed, either), others)))
    over_ends = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[False, True, False]])
    to_go = reward_to_go(*over_ends, 0.5) - torch.tensor([[2.0, 2.0, 4.0]])
    even = standardize(torch.full((2, 3), 0.1), torch.ones(2, 3, dtype=torch.bool))
    return [
        _small("reward 1, V = 1 / (1 - gamma), time limit: largest advantage", cut.abs().max()),
        Check("groups of equal rewards: largest advantage", float(alone.abs().max()), "exactly 0",
              bool((alone == 0).all())),
        _small("reward-to-go of a row with an end in it: error", to_go.abs().max()),
        _small("mean, deviation and leave-one-out of two groups around 1e8: error", error, 1e-6),
        Check("equal advantages, standardized: largest", float(even.abs().max()), "exactly 0", bool((even == 0).all())),
    ]  # fmt: skip
