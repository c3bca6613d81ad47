"""The estimators of language on token sequences: group credit, sequence ratios, GAE, and every KL to a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from policygrad.algorithms.grpo import GRPOObjective
from policygrad.divergences import AdaptiveCoefficient, Divergence, at_action, straight_through, to_reference
from policygrad.exact.closed_form import policy_gradient, visitation, weighted_gradient
from policygrad.exact.policies import probabilities
from policygrad.exact.tokens import expected_reward, log_likelihood, sequence_kl
from policygrad.rollout import Rollout, at_last_decision
from policygrad.samplers import KLCharged, Rescored
from policygrad.train.compose import DIVERGENCES, RATIOS
from policygrad.verify.control import LEANS, control_rows, no_credit
from policygrad.verify.settings import GROUP, Setting, of_size, options_for, row_of
from policygrad.verify.statistics import Experience, Row, Section
from policygrad.verify.written_out import corrected, expectation
from policygrad.weights import per_episode

BETA = 0.3
LOW, HIGH = 0.1, 0.2  # of the ratio, so near 1 that both are met; two numbers, so that an exchange shows
INF = torch.inf


# The exact quantities, from the list of all completions


def exact_reward_gradient(at: Setting) -> Tensor:
    """grad J, through the list of completions."""
    rollout = at.on_policy.rollout
    return _gradient(at, lambda log_p: expected_reward(log_p, _prompt(at), rollout.reward.sum(1)))


def exact_best_gradient(at: Setting) -> Tensor:
    """grad E[max_i R_i] of GROUP independent completions of a prompt, through the list of all such groups."""
    assert at.tokens is not None
    reward, (index, probability) = at.on_policy.rollout.reward.sum(1), at.on_policy.batches(GROUP)

    def value(log_p: Tensor) -> Tensor:
        likelihood = (log_p - log_p.detach())[index].sum(1).exp()  # 1, with the group's gradient
        return (probability * likelihood * reward[index].amax(1)).sum()

    return _gradient(at, value)


def exact_success_gradient(at: Setting, order: int) -> Tensor:
    """sum_{k <= order} grad pass@k / k, with pass@k = 1 - (1 - p)^k and p a prompt's probability of a reward of 1.

    The mean over prompts. As the order grows it is the gradient of log p (MaxRL, arXiv 2602.02710).
    """
    rollout = at.on_policy.rollout

    def value(log_p: Tensor) -> Tensor:
        succeeded = log_p.exp() * rollout.reward.sum(1)
        total = torch.zeros(())
        for prompt in rollout.group.unique():
            p = succeeded[rollout.group == prompt].sum()
            total = total + sum((1 - (1 - p) ** k) / k for k in range(1, order + 1))
        return total / len(rollout.group.unique())

    return _gradient(at, value)


def exact_kl_gradient(at: Setting) -> Tensor:
    """grad KL(pi, pi_ref) of whole completions."""
    log_p_ref = _log_likelihood(at, _probs_ref(at))
    return _gradient(at, lambda log_p: sequence_kl(log_p, log_p_ref, _prompt(at)))


def _prompt(at: Setting) -> Tensor:
    assert at.tokens is not None
    return torch.full((len(at.on_policy.rollout.mask),), 1 / at.tokens.prompts)


def _probs_ref(at: Setting) -> Tensor:
    assert at.table_ref is not None
    return probabilities(at.table_ref)


def _gradient(at: Setting, of: Callable[[Tensor], Tensor]) -> Tensor:
    value = of(_log_likelihood(at, probabilities(at.table)))
    return torch.autograd.grad(value, at.table.theta)[0]


def _log_likelihood(at: Setting, probs: Tensor) -> Tensor:
    rollout = at.on_policy.rollout
    return log_likelihood(rollout, probs, at.states(rollout))


# Credit, ratios and gains


def group_rows(at: Setting) -> list[Row]:
    """REINFORCE, leave-one-out and group-relative credit, each weighting, and the ratios by token and sequence.

    Also REINFORCE++, on pairs of completions of any prompts, and PPO's GAE by token.
    """
    nothing = torch.zeros_like(at.value)

    def row(
        name: str,
        reason: str = "",
        method: str = "rloo",
        size: int = GROUP,
        off_policy: bool = False,
        critic: Tensor = nothing,
        exact: Tensor | None = None,
        of: str = "grad J",
        **values: Any,
    ) -> Row:
        options = options_for(at, method, **values)
        experience = of_size(at, options, off_policy, size)
        expected = expectation(options, at, experience, size, critic, off_policy=off_policy)
        made = row_of(at, name, method, critic, expected=expected, reason=reason, size=size, **values)
        return replace(made, experience=experience, exact=exact, of=of)

    std: dict[str, Any] = {"group_baseline": "mean", "group_scale": "std"}
    mean: dict[str, Any] = {"group_baseline": "mean"}
    unclipped: dict[str, Any] = {"clip_low": INF, "clip_high": INF}
    clipped: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH}
    sequence: dict[str, Any] = {"method": "gspo", "group_baseline": "leave_one_out", "group_scale": "none",
                                "weights": "row", **unclipped}  # fmt: skip
    off: dict[str, Any] = {"off_policy": True}
    best = exact_best_gradient(at) / GROUP
    return [
        row("REINFORCE, no baseline", method="reinforce", size=1, baseline="none"),
        row("leave-one-out (RLOO)"),
        row("group mean, own reward in it", "1 - 1/n as long, same direction", **mean),
        row("group mean, over the budget (Dr. GRPO)", "(1 - 1/n)/T as long, same direction", weights="budget", **mean),
        row("group mean / std", "weighs prompts by 1/std (Dr. GRPO)", **std),
        row("leave-one-out, mean by row", "1/|y| favors long errors (Dr. GRPO)", weights="row"),
        row("group mean / std, mean by row (GRPO)", "1/std and 1/|y| (Dr. GRPO)", weights="row", **std),
        row("leave-one-out, mean by token", "ratio of two sums (DAPO)", weights="token"),
        row("token ratio, at the old policy", **unclipped),
        row("clipped token ratio, at the old policy", **clipped),
        row("sequence ratio, at the old policy", "1/|y| favors long errors (GSPO)", **sequence),
        row("token ratio, away from the old policy", "prefixes of the old policy", **unclipped, **off),
        row("clipped token ratio, away from the old policy", "old prefixes, ratio clipped (PPO)", **clipped, **off),
        row("clipped weight, away from the old policy (CISPO)", "old prefixes, weight clipped", gain="weight",
            clip_low=INF, clip_high=HIGH, **off),
        row("sequence ratio, away from the old policy", "old completions, 1/|y| power (GSPO)", **sequence, **off),
        row("product ratio, away from the old policy", ratio="product", weights="row", **unclipped, **off),
        row("best of the group, less the best of the others (pass@k)", exact=best, of="grad E[max R] / n",
            group_baseline="other_best"),
        row("standardized over the batch (REINFORCE++)", "1/std and the mean of all prompts", "reinforce_plus_plus", 2,
            weights="token"),
        row("GAE(0.95) by token, exact critic", LEANS, "ppo", 1, critic=at.value),
        row("GAE(0.95) by token, zero critic", LEANS, "ppo", 1, critic=nothing),
        row("GAE by token, lambda by length (VAPO), wrong critic", LEANS, "ppo", 1, critic=at.wrong_value,
            length_adaptive_lam=0.8),
    ]  # fmt: skip


def weighed_rows(at: Setting, whose: str) -> list[Row]:
    """The old policy's completions, scored again by the policy and weighed by their ratio; the first are not weighed.

    whose: before each name.
    """
    table = [
        ("not weighed", "token", 1.0, 1.0, False, "its tokens"),
        ("weight by token", "token", 0.0, INF, False, "its prefixes"),
        ("weight by token, clipped above", "token", 0.0, 1 + LOW, False, "its prefixes, weights clipped"),
        ("weight by token, dropped outside", "token", 1 - LOW, 1 + LOW, True, "its prefixes, tokens dropped"),
        ("weight by completion", "product", 0.0, INF, False, ""),
        ("weight by completion, clipped on both sides", "product", 1 - LOW, 1 + LOW, False, "weights clipped"),
        ("weight by completion, dropped outside", "product", 1 - LOW, 1 + LOW, True, "completions dropped"),
        ("weight by the geometric mean", "sequence", 0.0, INF, False, "a root of the weight"),
        ("weight by the geometric mean, clipped on both sides", "sequence", 1 - LOW, 1 + LOW, False,
         "a root of the weight, clipped"),
        ("weight by the geometric mean, dropped outside", "sequence", 1 - LOW, 1 + LOW, True,
         "a root of the weight, completions dropped"),
    ]  # fmt: skip
    rows, mu = [], at.off_policy.rollout
    for name, level, low, bound, drop, reason in table:
        rescored = Rescored(lambda _: mu, bound, ratio=RATIOS[level], low=low, drop=drop)(at.seen(at.table))
        made = row_of(at, f"{whose}{name}", "rloo", size=GROUP, reason=reason)
        expected = corrected(at, GROUP, level, low, bound, drop)
        rows.append(replace(made, expected=expected, experience=replace(at.off_policy, rollout=rescored)))
    for name, level, bound in (("token, clipped above", "token", 1 + LOW), ("completion", "product", INF)):

        def of_batch(part: Rollout, level: str = level, bound: float = bound) -> Rollout:
            return Rescored(lambda _: part, bound, ratio=RATIOS[level], normalize=True)(at.seen(at.table))

        made = row_of(at, f"{whose}weight by {name}, normalized", "rloo", size=GROUP, off_policy=True)
        expected = corrected(at, GROUP, level, 0.0, bound, False, normalized=True)
        rows.append(replace(made, expected=expected, wrapped=of_batch, reason="weights over their mean"))
    return rows


# KL to the reference


def kl_rows(at: Setting) -> list[Row]:
    """Every form of KL in the loss, on and off the policy, of whole completions, in the reward, and as a number."""
    probs, reference, visits = at.probs, _probs_ref(at), visitation(at.world, at.probs, 1.0)
    visits_old, log_ratio = visitation(at.world, at.probs_old, 1.0), (probs / reference).log()
    downhill = -exact_kl_gradient(at)
    # The state distribution held still: sum_s eta(s) grad KL(pi, ref)(s), and the same of KL(ref, pi).
    still = -weighted_gradient(visits, probs, log_ratio, at.scores)
    still_reversed = weighted_gradient(visits, reference, torch.ones_like(probs), at.scores)
    # Tokens of the old policy: its prefixes stay, and only with the ratio as a weight are its tokens made up for.
    still_old = -weighted_gradient(visits_old, probs, log_ratio, at.scores)
    as_old = -weighted_gradient(visits_old, at.probs_old, log_ratio, at.scores)
    local, reverse = "without effect on later tokens", "follows KL(ref, pi), token by token"
    straight, exactly = DIVERGENCES["straight_through"], DIVERGENCES["exact"]
    unweighted = partial(at_action, estimate=straight_through)
    table: list[tuple[str, Divergence, bool, Tensor, str]] = [
        ("k1 in the loss", DIVERGENCES["k1"], False, torch.zeros_like(downhill), "expected gradient is 0"),
        ("k2 in the loss", DIVERGENCES["k2"], False, still, local),
        ("k3 in the loss", DIVERGENCES["k3"], False, still_reversed, reverse),
        ("straight-through (k3, gradient of k2)", straight, False, still, local),
        ("KL over the vocabulary in the loss", exactly, False, still, local),
        ("straight-through, off policy", unweighted, True, as_old, "old prefixes and tokens"),
        ("reweighted straight-through, off policy", straight, True, still_old, "old prefixes"),
        ("KL over the vocabulary, off policy", exactly, True, still_old, "old prefixes"),
    ]
    rows = [
        replace(_anchored(at, name, divergence, off), expected=expected, reason=reason, exact=downhill, of="-grad KL",
                one_by_one=divergence is exactly)
        for name, divergence, off, expected, reason in table
    ]  # fmt: skip
    rows += [replace(_by_completion(at), exact=downhill, of="-grad KL"), _charged(at, downhill)]
    # The objective itself, as a number: -KL of a completion.
    exact = -torch.einsum("s,sa,sa->", visits, probs, log_ratio).reshape(1)
    square = -torch.einsum("s,sa,sa->", visits, probs, log_ratio**2 / 2).reshape(1)
    for name, row, expected in zip(
        ("k1", "k2", "k3", "straight-through"), rows, (exact, square, exact, exact), strict=False
    ):
        number: dict[str, Any] = {"expected": expected, "exact": exact, "of": "-KL", "is_value": True}
        rows.append(replace(row, name=f"{name} as a number", reason="half the squared log-ratio", **number))
    return rows


def _anchored(at: Setting, name: str, divergence: Divergence, off_policy: bool) -> Row:
    """GRPO's objective with a coefficient of 1 and nothing else to maximize."""
    assert at.table_ref is not None
    anchor = partial(to_reference, reference=at.seen(at.table_ref), divergence=divergence)
    return row_of(at, name, "grpo", assign=no_credit, anchor=anchor, off_policy=off_policy)


class _Completions(nn.Module):
    """A policy of tokens as one of completions: obs ([B, 1, T] of prefixes, their mask), the action all of the row."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: tuple[Tensor, Tensor]) -> _Completion:
        """The distribution of the one decision of each row."""
        return _Completion(self.policy(obs[0][:, 0]), obs[1][:, 0])


class _Completion:
    """log P(y|x), and (unused) the entropy of the tokens."""

    def __init__(self, tokens: Any, mask: Tensor) -> None:
        self.tokens, self.mask = tokens, mask

    def log_prob(self, action: Tensor) -> Tensor:
        """sum_t log pi(y_t|x, y_<t) [B, 1]."""
        return self.tokens.log_prob(action[:, 0]).where(self.mask, 0.0).sum(1, keepdim=True)

    def entropy(self) -> Tensor:
        """Of the first token [B, 1]."""
        return self.tokens.entropy()[:, :1]


def _by_completion(at: Setting) -> Row:
    """k2 of whole completions: the same loss where a completion is one decision."""
    rollout, reference = at.on_policy.rollout, at.table_ref
    assert reference is not None
    first = slice(0, 1)
    whole = replace(
        rollout,
        obs=(rollout.obs.unsqueeze(1), rollout.mask.unsqueeze(1)),
        action=rollout.action.unsqueeze(1),
        logp=rollout.logp.sum(1, keepdim=True),
        reward=rollout.reward.sum(1, keepdim=True),
        **{name: getattr(rollout, name)[:, first] for name in ("terminated", "ended", "mask")},
    )
    anchor = partial(to_reference, reference=_Completions(at.seen(reference)), divergence=DIVERGENCES["k2"])
    objective = GRPOObjective(_Completions(at.seen(at.table)), anchor=anchor, coefficient=AdaptiveCoefficient(1.0))
    return Row(
        "k2 of whole completions", no_credit, objective, per_episode, experience=replace(at.on_policy, rollout=whole)
    )


def _charged(at: Setting, downhill: Tensor) -> Row:
    """k1 in the reward, as the sampler's wrapper charges it."""
    rollout: Rollout = at.on_policy.rollout
    assert at.table_ref is not None
    charged = KLCharged(lambda _: rollout, at.seen(at.table_ref), AdaptiveCoefficient(BETA))(at.seen(at.table))
    row = row_of(at, "k1 in the reward", "reinforce", baseline="none")
    exact = exact_reward_gradient(at) + BETA * downhill
    return replace(row, exact=exact, of="grad J - beta KL", experience=replace(at.on_policy, rollout=charged))


def success_rows(at: Setting) -> list[Row]:
    """MaxRL on rewards of 0 and 1: groups of n follow likelihood to the order n - 1, and two are REINFORCE."""
    at = succeeding(at)
    values: dict[str, Any] = {"group_baseline": "mean", "group_scale": "mean"}
    return [
        replace(
            row_of(at, f"over the mean, groups of {size} (MaxRL)", "rloo", size=size, **values),
            experience=at.on_policy,
            exact=exact_success_gradient(at, size - 1),
            of=f"grad log p, order {size - 1}",
        )
        for size in (2, GROUP)
    ]


def succeeding(at: Setting) -> Setting:
    """The same completions, of which those with more than the mean reward succeed."""

    def judged(experience: Experience) -> Experience:
        rollout = experience.rollout
        success = (rollout.reward.sum(1) > at.on_policy.rollout.reward.sum(1).mean()).to(rollout.reward.dtype)
        return replace(experience, rollout=replace(rollout, reward=at_last_decision(success, rollout.mask)))

    return replace(at, on_policy=judged(at.on_policy), off_policy=judged(at.off_policy))


def token_rows(at: Setting) -> list[Row]:
    """Every estimator of language."""
    return [*group_rows(at), *success_rows(at), *weighed_rows(at, "an engine's completions, "), *kl_rows(at)]


def token_section(at: Setting) -> Section:
    """The table of them."""
    return Section(at.name, token_rows(at), at.on_policy, exact_reward_gradient(at))


def paid_section(at: Setting) -> Section:
    """Rewards by token, discounted: the estimators of control that look at no other row. Groups compare plain sums."""
    rows = [row for row in control_rows(at) if row.size == 1]
    plain = policy_gradient(replace(at.world, gamma=1.0), at.probs, at.scores)
    group = replace(row_of(at, "leave-one-out (RLOO)", "rloo", size=GROUP), exact=plain, of="grad J without discount")
    return Section(at.name, [*rows, group], at.on_policy, at.gradient)
