"""The estimators of language on token sequences: group baselines, sequence ratios, GAE, and every KL to a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from policygrad.advantages import batch_advantage, gae, group_mean, group_std, leave_one_out
from policygrad.critics import bootstrap_values
from policygrad.divergences import (
    Divergence,
    at_action,
    k1,
    k2,
    k3,
    kl,
    over_actions,
    reweighted,
    straight_through,
    to_reference,
)
from policygrad.exact.closed_form import state_value, visitation, weighted_gradient
from policygrad.exact.enumeration import batches
from policygrad.exact.expected import gae_credit
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, score_table, tabular
from policygrad.exact.tokens import (
    OnPrefixes,
    TokenWorld,
    completions,
    expected_reward,
    groups,
    log_likelihood,
    prefix_state,
    sequence_kl,
    tree,
)
from policygrad.exact.worlds import World
from policygrad.objectives import clipped_surrogate, clipped_weight, penalised_surrogate, surrogate
from policygrad.returns import kl_in_reward, reward_to_go
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.runs.verify.statistics import Estimator, Experience, Objective
from policygrad.score import score, sequence_ratio, token_ratio
from policygrad.weights import average, per_budget, per_episode, per_row, per_token

GROUP = 3
BETA = 0.3
EPSILON = 1e-4  # beside the standard deviation, as GRPO's implementations have it
LOW, HIGH = 0.1, 0.2  # of the ratio, so near 1 that both are met; two numbers, so that an exchange shows


@dataclass(frozen=True)
class TokenSetting:
    """Two prompts, completions of at most three of three tokens, and three policies: current, old, reference."""

    tokens: TokenWorld
    world: World
    policy: OnPrefixes
    table: SoftmaxPolicy  # the policy on the tree of prefixes
    old: SoftmaxPolicy
    table_reference: SoftmaxPolicy
    reference: OnPrefixes
    on_policy: Experience
    off_policy: Experience

    @property
    def probs(self) -> Tensor:
        return probabilities(self.table).detach()

    @property
    def probs_old(self) -> Tensor:
        return probabilities(self.old).detach()

    @property
    def probs_reference(self) -> Tensor:
        return probabilities(self.table_reference).detach()

    @property
    def scores(self) -> Tensor:
        return score_table(self.table.features, self.probs)


def token_setting(seed: int) -> TokenSetting:
    """An arbitrary reward, drawn with the seed; some completions of a prompt share theirs."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 4, 3, 3, 3, generator=generator).mul(2).round().div(2)
    tokens = TokenWorld(2, 3, 3, lambda x, y: float(drawn[(x, len(y), *y, *[0] * (3 - len(y)))]))
    world = tree(tokens)
    features = tabular(*world.reward.shape)
    theta, away, further = torch.randn(3, features.shape[-1], generator=generator)
    table, old = SoftmaxPolicy(features, 0.7 * theta), SoftmaxPolicy(features, 0.7 * theta + 0.3 * away)
    anchor = SoftmaxPolicy(features, 0.7 * theta + 0.5 * further)
    reference = OnPrefixes(tokens, anchor).requires_grad_(False)
    on, off = (_enumerated(tokens, probabilities(p)) for p in (table, old))
    return TokenSetting(tokens, world, OnPrefixes(tokens, table), table, old, anchor, reference, on, off)


def _enumerated(tokens: TokenWorld, probs: Tensor) -> Experience:
    rollout, probability = completions(tokens, probs)
    return Experience(rollout, partial(groups, rollout, probability), enumerated=True)


# The exact quantities, from the list of all completions


def exact_reward_gradient(at: TokenSetting) -> Tensor:
    """grad J, through the list of completions."""
    rollout = at.on_policy.rollout
    prompt = torch.full((len(rollout.mask),), 1 / at.tokens.prompts)
    return _gradient(at, lambda log_p: expected_reward(log_p, prompt, rollout.reward.sum(1)))


def exact_kl_gradient(at: TokenSetting) -> Tensor:
    """grad KL(pi, pi_ref) of whole completions."""
    prompt = torch.full((len(at.on_policy.rollout.mask),), 1 / at.tokens.prompts)
    log_p_ref = _log_likelihood(at, at.probs_reference)
    return _gradient(at, lambda log_p: sequence_kl(log_p, log_p_ref, prompt))


def _gradient(at: TokenSetting, of: Callable[[Tensor], Tensor]) -> Tensor:
    value = of(_log_likelihood(at, probabilities(at.table)))
    return torch.autograd.grad(value, at.table.theta)[0]


def _log_likelihood(at: TokenSetting, probs: Tensor) -> Tensor:
    rollout = at.on_policy.rollout
    return log_likelihood(rollout, probs, prefix_state(at.tokens, rollout.obs))


def _follows(at: TokenSetting, credit: Tensor) -> Tensor:
    """sum_y P(x, y) C(x, y) grad log P(y|x): what crediting a completion with C expects. C is [B]."""
    _, probability = at.on_policy.batches(1)
    return _gradient(at, lambda log_p: (probability * credit * log_p).sum())


def _given_own(experience: Experience, credit: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """E[credit | own completion] over groups of GROUP: [B]. Written out, and not with the library's functions.

    credit(own reward [K], all rewards [K, GROUP], own length [K], all lengths [K, GROUP]) -> [K].
    """
    rollout = experience.rollout
    index, probability = experience.batches(GROUP)
    reward, length = rollout.reward.sum(1)[index], rollout.mask.sum(1)[index]
    value = credit(reward[:, 0], reward, length[:, 0], length)
    own = torch.zeros(len(rollout.mask)).index_add(0, index[:, 0], probability * value)
    return own / experience.batches(1)[1]


# The estimators


def _group_gain(
    policy: Callable[[Any], Any],
    rollout: Rollout,
    *,
    credit: Callable[[Tensor, Tensor], Tensor],
    weights: Callable[[Tensor], Tensor] = per_episode,
    gain: Callable[[Tensor, Tensor, Batch], Tensor] | None = None,
) -> Tensor:
    """credit: (reward of the completions [B], their groups [B]) -> [B], the same for every token of a completion."""
    advantage = credit(rollout.reward.sum(1), rollout.group).unsqueeze(1).expand_as(rollout.reward)
    batch = decisions(rollout, weights(rollout.mask), advantage)
    logp = policy(batch.obs).log_prob(batch.action)
    x = score(logp, batch.advantage) if gain is None else gain(logp, batch.advantage, batch)
    return average(x, batch.weight)


def _no_group(reward: Tensor, group: Tensor) -> Tensor:
    return reward


def _rloo(reward: Tensor, group: Tensor) -> Tensor:
    return reward - leave_one_out(reward, group)


def _centred(reward: Tensor, group: Tensor) -> Tensor:
    return reward - group_mean(reward, group)


def _grpo(reward: Tensor, group: Tensor) -> Tensor:
    return (reward - group_mean(reward, group)) / (group_std(reward, group) + EPSILON)


def _token_surrogate(logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    return surrogate(token_ratio(logp, batch.logp, batch.mask), advantage)


def _token_clipped(logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    return clipped_surrogate(token_ratio(logp, batch.logp, batch.mask), advantage, LOW, HIGH)


def _token_weighted(logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    return clipped_weight(logp, token_ratio(logp, batch.logp, batch.mask), advantage, torch.inf, HIGH)


def _sequence_surrogate(logp: Tensor, advantage: Tensor, batch: Batch) -> Tensor:
    return clipped_surrogate(sequence_ratio(logp, batch.logp, batch.mask), advantage, torch.inf, torch.inf)


def group_rows(at: TokenSetting) -> list[Estimator]:
    """REINFORCE, leave-one-out and group-relative advantages, each weighting, and the ratios by token and sequence."""
    n, rollout = GROUP, at.on_policy.rollout
    exact = exact_reward_gradient(at)
    by_std = _given_own(at.on_policy, lambda r, all_r, size, sizes: (r - all_r.mean(1)) / (all_r.std(1) + EPSILON))
    by_length = _given_own(at.on_policy, lambda r, all_r, size, sizes: (r - all_r[:, 1:].mean(1)) / size)
    by_total = _given_own(at.on_policy, lambda r, all_r, size, sizes: n * (r - all_r[:, 1:].mean(1)) / sizes.sum(1))
    length = rollout.mask.sum(1)
    by_mean, off = partial(_group_gain, weights=per_row), {"off_policy": True}
    table: list[tuple[str, Objective, Tensor | None, str, dict[str, Any]]] = [
        ("leave-one-out (RLOO)", partial(_group_gain, credit=_rloo), None, "", {}),
        ("group mean, own reward in it", partial(_group_gain, credit=_centred), (1 - 1 / n) * exact,
         "1 - 1/n as long, same direction", {}),
        ("group mean, over the budget (Dr. GRPO)", partial(_group_gain, credit=_centred, weights=per_budget),
         (1 - 1 / n) / at.tokens.length * exact, "(1 - 1/n)/T as long, same direction", {}),
        ("group mean / std", partial(_group_gain, credit=_grpo), _follows(at, by_std),
         "weighs prompts by 1/std (Dr. GRPO)", {}),
        ("leave-one-out, mean by row", partial(by_mean, credit=_rloo), _follows(at, by_length),
         "1/|y| favours long errors (Dr. GRPO)", {}),
        ("group mean / std, mean by row (GRPO)", partial(by_mean, credit=_grpo), _follows(at, by_std / length),
         "1/std and 1/|y| (Dr. GRPO)", {}),
        ("leave-one-out, mean by token", partial(_group_gain, credit=_rloo, weights=per_token),
         _follows(at, by_total), "ratio of two sums (DAPO)", {}),
        ("token ratio, at the old policy", partial(_group_gain, credit=_rloo, gain=_token_surrogate), None, "", {}),
        ("clipped token ratio, at the old policy", partial(_group_gain, credit=_rloo, gain=_token_clipped), None,
         "", {}),
        ("sequence ratio, at the old policy", partial(by_mean, credit=_rloo, gain=_sequence_surrogate),
         _follows(at, by_length), "1/|y| favours long errors (GSPO)", {}),
        ("token ratio, away from the old policy", partial(_group_gain, credit=_rloo, gain=_token_surrogate),
         _off_policy(at, by_token=True), "prefixes of the old policy", off),
        ("clipped token ratio, away from the old policy", partial(_group_gain, credit=_rloo, gain=_token_clipped),
         _off_policy_clipped(at), "old prefixes, ratio clipped (PPO)", off),
        ("clipped weight, away from the old policy (CISPO)", partial(_group_gain, credit=_rloo, gain=_token_weighted),
         _off_policy_weighted(at), "old prefixes, weight clipped", off),
        ("sequence ratio, away from the old policy", partial(by_mean, credit=_rloo, gain=_sequence_surrogate),
         _off_policy(at, by_token=False), "old completions, 1/|y| power (GSPO)", off),
    ]  # fmt: skip
    alone = Estimator("REINFORCE, no baseline", partial(_group_gain, credit=_no_group))
    return [alone, *(Estimator(name, gain, n, expected=e, reason=r, **o) for name, gain, e, r, o in table)]


def _off_policy(at: TokenSetting, by_token: bool) -> Tensor:
    """sum_y P_old(x, y) (R - J_old(x)) grad of sum_t ratio_t, or of (P(y|x) / P_old(y|x))^(1/|y|)."""
    rollout = at.off_policy.rollout
    states = prefix_state(at.tokens, rollout.obs)
    credit = rollout.reward.sum(1) - state_value(at.world, at.probs_old)[rollout.group]
    log_ratio = (probabilities(at.table) / at.probs_old)[states, rollout.action].log().where(rollout.mask, 0.0)
    by_row = log_ratio.exp().where(rollout.mask, 0.0).sum(1)
    by_sequence = (log_ratio.sum(1) / rollout.mask.sum(1)).exp()
    _, probability = at.off_policy.batches(1)
    value = probability @ (credit * (by_row if by_token else by_sequence))
    return torch.autograd.grad(value, at.table.theta)[0]


def _old_ratio(at: TokenSetting) -> Tensor:
    """pi / pi_old of the old policy's completions by token, from the tables."""
    rollout = at.off_policy.rollout
    return (probabilities(at.table) / at.probs_old)[prefix_state(at.tokens, rollout.obs), rollout.action]


def _off_policy_clipped(at: TokenSetting) -> Tensor:
    """sum_y P_old(x, y) grad of sum_t (C+ min(ratio_t, 1 + HIGH) - C- max(ratio_t, 1 - LOW)), C the RLOO credit."""

    def rises(r: Tensor, all_r: Tensor, size: Tensor, sizes: Tensor) -> Tensor:
        return (r - all_r[:, 1:].mean(1)).clamp(min=0)

    def falls(r: Tensor, all_r: Tensor, size: Tensor, sizes: Tensor) -> Tensor:
        return (all_r[:, 1:].mean(1) - r).clamp(min=0)

    ratio, mask = _old_ratio(at), at.off_policy.rollout.mask
    up = _given_own(at.off_policy, rises) * ratio.clamp(max=1 + HIGH).where(mask, 0.0).sum(1)
    down = _given_own(at.off_policy, falls) * ratio.clamp(min=1 - LOW).where(mask, 0.0).sum(1)
    _, probability = at.off_policy.batches(1)
    return torch.autograd.grad(probability @ (up - down), at.table.theta)[0]


def _off_policy_weighted(at: TokenSetting) -> Tensor:
    """sum_y P_old(x, y) (R - J_old(x)) sum_t min(ratio_t, 1 + HIGH) grad log pi(y_t)."""
    rollout, ratio = at.off_policy.rollout, _old_ratio(at)
    credit = rollout.reward.sum(1) - state_value(at.world, at.probs_old)[rollout.group]
    weighted = (ratio.detach().clamp(max=1 + HIGH) * ratio.log()).where(rollout.mask, 0.0).sum(1)
    _, probability = at.off_policy.batches(1)
    return torch.autograd.grad(probability @ (credit * weighted), at.table.theta)[0]


def batch_row(at: TokenSetting) -> Estimator:
    """REINFORCE++: pairs of completions of any prompts, each standardised over the decisions of both."""
    rollout, (_, each) = at.on_policy.rollout, at.on_policy.batches(1)
    pairs, probability = batches(each, 2)
    reward, length = rollout.reward.sum(1)[pairs], rollout.mask.sum(1)[pairs].to(each.dtype)
    total = length.sum(1, keepdim=True)
    mean = (length * reward).sum(1, keepdim=True) / total
    std = ((length * (reward - mean) ** 2).sum(1, keepdim=True) / (total - 1)).sqrt()
    credit = 2 * (reward - mean) / (std + 1e-8) / total  # of each token: the two of a pair count alike
    own = torch.zeros(len(each)).index_add(0, pairs[:, 0], probability * credit[:, 0]) / each
    return Estimator(
        "standardised over the batch (REINFORCE++)",
        _batch_gain,
        2,
        expected=_follows(at, own),
        reason="1/std and the mean of all prompts",
        experience=replace(at.on_policy, batches=partial(batches, each)),
    )


def _batch_gain(policy: Callable[[Any], Any], rollout: Rollout) -> Tensor:
    batch = decisions(rollout, per_token(rollout.mask), batch_advantage(rollout))
    return average(score(policy(batch.obs).log_prob(batch.action), batch.advantage), batch.weight)


def critic_rows(at: TokenSetting) -> list[Estimator]:
    """PPO for language: GAE by token, with an exact and a zero critic."""
    exact = state_value(at.world, at.probs)
    visits = visitation(at.world, at.probs, 1.0)
    rows = []
    for name, value in (("exact", exact), ("zero", torch.zeros_like(exact))):
        expected = weighted_gradient(visits, at.probs, gae_credit(at.world, at.probs, value, 0.95), at.scores)
        critic = OnPrefixes(at.tokens, TabularCritic(value))
        gain = partial(_critic_gain, critic=critic)
        rows.append(
            Estimator(f"GAE(0.95) by token, {name} critic", gain, expected=expected, reason="leans on the critic")
        )
    return rows


def _critic_gain(policy: Callable[[Any], Any], rollout: Rollout, *, critic: nn.Module) -> Tensor:
    value = bootstrap_values(critic, rollout)
    advantage = gae(rollout.reward, value, rollout.terminated, rollout.ended, 1.0, 0.95)
    batch = decisions(rollout, per_episode(rollout.mask), advantage)
    logp = policy(batch.obs).log_prob(batch.action)
    ratio = token_ratio(logp, batch.logp, batch.mask)
    return average(clipped_surrogate(ratio, batch.advantage, 0.2, 0.2), batch.weight)


# KL to the reference


def _kl_loss(
    policy: Callable[[Any], Any],
    rollout: Rollout,
    *,
    reference: nn.Module,
    estimate: Callable[[Tensor, Tensor], Tensor],
    sign: float = -1.0,
) -> Tensor:
    logp = policy(rollout.obs).log_prob(rollout.action)
    divergence = estimate(logp, reference(rollout.obs).log_prob(rollout.action))
    gain = penalised_surrogate(torch.zeros_like(logp), -sign * divergence, 1.0)
    return average(gain, per_episode(rollout.mask))


def _kl_by_sequence(policy: Callable[[Any], Any], rollout: Rollout, *, reference: nn.Module) -> Tensor:
    pair = (p(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0) for p in (policy, reference))
    logp, logp_ref = (x.sum(1, keepdim=True) for x in pair)
    return average(-k2(logp, logp_ref), per_episode(rollout.mask[:, :1]))


def _kl_anchored(
    policy: Callable[[Any], Any], rollout: Rollout, *, reference: nn.Module, divergence: Divergence
) -> Tensor:
    """As GRPO's loss has it."""
    batch = decisions(rollout, per_episode(rollout.mask), torch.zeros_like(rollout.reward))
    distribution = policy(batch.obs)
    ratio = token_ratio(distribution.log_prob(batch.action), batch.logp, batch.mask)
    divergence_of = to_reference(distribution, batch, ratio, reference=reference, divergence=divergence)
    return average(-divergence_of, batch.weight)


def _kl_over_vocabulary(policy: Callable[[Any], Any], rollout: Rollout, *, reference: nn.Module) -> Tensor:
    return average(-kl(policy(rollout.obs), reference(rollout.obs)), per_episode(rollout.mask))


def _kl_charged(policy: Callable[[Any], Any], rollout: Rollout, *, reference: nn.Module) -> Tensor:
    logp_ref = reference(rollout.obs).log_prob(rollout.action)
    reward = kl_in_reward(rollout.reward, rollout.logp, logp_ref, BETA).where(rollout.mask, 0.0)
    advantage = reward_to_go(reward, rollout.ended)
    batch = decisions(rollout, per_episode(rollout.mask), advantage)
    return average(score(policy(batch.obs).log_prob(batch.action), batch.advantage), batch.weight)


def kl_rows(at: TokenSetting) -> list[Estimator]:
    """k1, k2, k3 in the loss, the straight-through one, the sum over the vocabulary, and KL in the reward."""
    probs, reference, visits = at.probs, at.probs_reference, visitation(at.world, at.probs, 1.0)
    downhill = -exact_kl_gradient(at)
    # The state distribution held still: sum_s eta(s) grad KL(pi, ref)(s), and the same of KL(ref, pi).
    still = -weighted_gradient(visits, probs, (probs / reference).log(), at.scores)
    still_reversed = weighted_gradient(visits, reference, torch.ones_like(probs), at.scores)
    local, reverse = "without effect on later tokens", "follows KL(ref, pi), token by token"
    table = []
    for name, estimate, expected, reason in [
        ("k1 in the loss", k1, torch.zeros_like(downhill), "expected gradient is 0"),
        ("k2 in the loss", k2, still, local),
        ("k3 in the loss", k3, still_reversed, reverse),
        ("straight-through (k3, gradient of k2)", straight_through, still, local),
    ]:
        gain = partial(_kl_loss, reference=at.reference, estimate=estimate)
        table.append(Estimator(name, gain, expected=expected, reason=reason, exact=downhill, of="-grad KL"))
    over = partial(_kl_over_vocabulary, reference=at.reference)
    options: dict[str, Any] = {"exact": downhill, "of": "-grad KL"}
    name = "KL over the vocabulary in the loss"
    table.append(Estimator(name, over, expected=still, reason=local, one_by_one=True, **options))
    table += _off_policy_kl_rows(at, downhill)
    by_sequence = partial(_kl_by_sequence, reference=at.reference)
    table.append(Estimator("k2 of whole completions", by_sequence, **options))
    charged, exact = partial(_kl_charged, reference=at.reference), exact_reward_gradient(at) + BETA * downhill
    table.append(Estimator("k1 in the reward", charged, exact=exact, of="grad J - beta KL"))
    return [*table, *_kl_values(at, visits)]


def _off_policy_kl_rows(at: TokenSetting, downhill: Tensor) -> list[Estimator]:
    """Tokens of the old policy: its prefixes stay, and only with the ratio as a weight are its tokens made up for."""
    visits, log_ratio = visitation(at.world, at.probs_old, 1.0), (at.probs / at.probs_reference).log()
    still = -weighted_gradient(visits, at.probs, log_ratio, at.scores)
    as_old = -weighted_gradient(visits, at.probs_old, log_ratio, at.scores)
    unweighted = partial(at_action, estimate=straight_through)
    table: list[tuple[str, Divergence, Tensor, str, bool]] = [
        ("straight-through", unweighted, as_old, "old prefixes and tokens", False),
        ("reweighted straight-through", reweighted, still, "old prefixes", False),
        ("KL over the vocabulary", over_actions, still, "old prefixes", True),
    ]
    rows = []
    for name, divergence, expected, reason, one_by_one in table:
        gain = partial(_kl_anchored, reference=at.reference, divergence=divergence)
        row = Estimator(f"{name}, off policy", gain, expected=expected, reason=reason, exact=downhill)
        rows.append(replace(row, of="-grad KL", off_policy=True, one_by_one=one_by_one))
    return rows


def _kl_values(at: TokenSetting, visits: Tensor) -> list[Estimator]:
    """The same three as numbers: what they say the KL of a completion is."""
    log_ratio = (at.probs / at.probs_reference).log()
    exact = torch.einsum("s,sa,sa->", visits, at.probs, log_ratio).reshape(1)
    square = torch.einsum("s,sa,sa->", visits, at.probs, log_ratio**2 / 2).reshape(1)
    table = []
    for name, estimate, expected in (("k1", k1, exact), ("k2", k2, square), ("k3", k3, exact)):
        gain = partial(_kl_loss, reference=at.reference, estimate=estimate, sign=1.0)
        row = Estimator(f"{name} as a number", gain, expected=expected, exact=exact, of="KL", is_value=True)
        table.append(replace(row, reason="half the squared log-ratio"))
    table.append(replace(table[2], name="straight-through as a number", objective=partial(
        _kl_loss, reference=at.reference, estimate=straight_through, sign=1.0)))  # fmt: skip
    return table


def token_rows(at: TokenSetting) -> list[Estimator]:
    """Every estimator of language."""
    return [*group_rows(at), batch_row(at), *critic_rows(at), *kl_rows(at)]
