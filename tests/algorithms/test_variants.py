"""The expected gradient of every variant's own update over all groups of a token world, against its definition."""

from dataclasses import replace
from functools import partial
from inspect import signature
from math import inf

import pytest
import torch
from oracles import VARIANTS, WORLD, expected, gradient, iteration, log_p, reward_gradient, table, token_policy
from torch import Tensor
from torch.testing import assert_close

from policygrad.algorithms.grpo import grpo
from policygrad.algorithms.variants import cispo, dr_grpo, reinforce_plus_plus, rloo
from policygrad.exact.enumeration import batches, rows
from policygrad.exact.tokens import OnPrefixes, completions, groups, prefix_state
from policygrad.rollout import Rollout

pytestmark = pytest.mark.usefixtures("float64")
SIZE = 3
close = partial(assert_close, rtol=1e-10, atol=1e-12)


@pytest.fixture
def policy(float64: None) -> OnPrefixes:
    return token_policy(0)


# At the old policy: sum over groups of P(group) sum_i c_i grad log P(y_i|x), with c_i written out.
# reward R and length L of the completions of each group: [K, SIZE] -> c [K, SIZE].


def mean_and_std(reward: Tensor) -> tuple[Tensor, Tensor]:
    mean = sum(reward.unbind(1)) / SIZE
    square = sum((r - mean) ** 2 for r in reward.unbind(1))
    return mean.unsqueeze(1), (square / (SIZE - 1)).sqrt().unsqueeze(1)


def per_row(reward: Tensor, length: Tensor) -> Tensor:
    mean, std = mean_and_std(reward)
    return (reward - mean) / (std + 1e-4) / length / SIZE


def per_token(reward: Tensor, length: Tensor) -> Tensor:
    mean, std = mean_and_std(reward)
    return (reward - mean) / (std + 1e-4) / length.sum(1, keepdim=True)


def per_budget(reward: Tensor, length: Tensor) -> Tensor:
    return (reward - mean_and_std(reward)[0]) / (SIZE * WORLD.length)


def leave_one_out(reward: Tensor, length: Tensor) -> Tensor:
    return (reward - (reward.sum(1, keepdim=True) - reward) / (SIZE - 1)) / SIZE


AT_THE_OLD_POLICY = {
    "grpo": per_row,
    "gspo": per_row,
    "dapo": per_token,
    "cispo": per_token,
    "dr_grpo": per_budget,
    "rloo": leave_one_out,
}


@pytest.mark.parametrize("name", AT_THE_OLD_POLICY)
def test_the_expected_gradient_is_the_definition(name: str, policy: OnPrefixes) -> None:
    rollout, probability = completions(WORLD, table(policy))
    index, weight = groups(rollout, probability, SIZE)
    credit = AT_THE_OLD_POLICY[name](rollout.reward.sum(1)[index], rollout.mask.sum(1)[index])
    defined = gradient((weight.unsqueeze(1) * credit * log_p(policy, rollout)[index]).sum(), policy)
    assert defined.norm() > 1e-2
    close(expected(VARIANTS[name], policy, SIZE), defined)


@pytest.mark.parametrize("size", [2, SIZE])
def test_rloo_is_the_gradient_of_j(size: int, policy: OnPrefixes) -> None:
    close(expected(rloo, policy, size), reward_gradient(policy))


@pytest.mark.parametrize("size", [2, SIZE])
def test_dr_grpo_has_the_direction_of_the_gradient_of_j(size: int, policy: OnPrefixes) -> None:
    close(expected(dr_grpo, policy, size), (1 - 1 / size) / WORLD.length * reward_gradient(policy))


def test_grpo_has_not(policy: OnPrefixes) -> None:
    assert torch.cosine_similarity(expected(grpo, policy, SIZE), reward_gradient(policy), dim=0) < 0.98


@pytest.mark.parametrize("size", [1, 2])
def test_reinforce_plus_plus_is_the_return_standardised_over_the_decisions_of_the_batch(
    size: int, policy: OnPrefixes
) -> None:
    """Of batches of any prompts, with a reward at every token: each is credited with what came from it on."""
    rollout, probability = completions(WORLD, table(policy))
    rollout = replace(rollout, reward=torch.randn(rollout.mask.shape))
    logp = table(policy).log()[prefix_state(WORLD, rollout.obs), rollout.action]
    found, defined = 0.0, 0.0
    for index, weight in zip(*batches(probability, size), strict=True):
        part = rows(rollout, index)
        found += weight * iteration(reinforce_plus_plus, policy, lambda _, part=part: part)[0]
        chosen = [(int(i), t) for i in index for t in range(WORLD.length) if rollout.mask[i, t]]
        to_go = [sum(rollout.reward[i, u] for u in range(t, WORLD.length) if rollout.mask[i, u]) for i, t in chosen]
        mean = sum(to_go) / len(to_go)
        std = (sum((g - mean) ** 2 for g in to_go) / max(len(to_go) - 1, 1)) ** 0.5
        advantage = [(g - mean) / (std + 1e-8) for g in to_go]
        defined += weight * sum(a * logp[i, t] for a, (i, t) in zip(advantage, chosen, strict=True)) / len(chosen)
    defined = gradient(defined, policy)
    assert defined.norm() > 1e-2
    close(found, defined)


# Away from the old policy: one rollout of it, and each objective written out token by token.


def least(r: Tensor, a: float, low: float, high: float) -> Tensor:
    """min(r a, clip(r) a)"""
    return min(r * a, min(max(r, torch.tensor(1 - low)), torch.tensor(1 + high)) * a)


def written_out(name: str, ratio: list[list[Tensor]], logp: list[list[Tensor]], credit: list[float]) -> Tensor:
    """The objective of each paper. ratio and logp: of each row's decisions; credit: of each row."""
    rows, total = len(ratio), sum(len(row) for row in ratio)
    each = list(zip(ratio, logp, credit, strict=True))
    match name:
        case "grpo":
            return sum(sum(least(r, a, 0.2, 0.2) for r in rs) / len(rs) for rs, _, a in each) / rows
        case "dr_grpo":
            return sum(sum(least(r, a, 0.2, 0.2) for r in rs) for rs, _, a in each) / rows / WORLD.length
        case "dapo":
            return sum(sum(least(r, a, 0.2, 0.28) for r in rs) for rs, _, a in each) / total
        case "gspo":
            whole = [torch.stack(rs).prod() ** (1 / len(rs)) for rs in ratio]
            return sum(least(s, a, 3e-4, 4e-4) for s, a in zip(whole, credit, strict=True)) / rows
        case "cispo":
            weighted = (sum(min(r.item(), 1.28) * a * lp for r, lp in zip(rs, lps, strict=True)) for rs, lps, a in each)
            return sum(weighted) / total
        case "rloo":
            return sum(sum(least(r, a, 0.2, 0.2) for r in rs) for rs, _, a in each) / rows
    raise AssertionError(name)


def old_rollout(old: OnPrefixes) -> Rollout:
    """Four completions of each prompt, the old policy's, none of them equal."""
    return completions(WORLD, table(old))[0]


@pytest.mark.parametrize("name", AT_THE_OLD_POLICY)
def test_away_from_the_old_policy_the_gradient_is_that_of_the_papers_objective(name: str, policy: OnPrefixes) -> None:
    low, high = 0.0, 0.0
    for seed in range(12):
        distance = (1e-3 if name == "gspo" else 1.0) * (0.3, 0.9, 2.5)[seed % 3]
        rollout = old_rollout(token_policy(seed, near=policy, distance=distance))
        logp = table(policy).log()[prefix_state(WORLD, rollout.obs), rollout.action]
        by_row = [[logp[i, t] for t in range(3) if rollout.mask[i, t]] for i in range(8)]
        ratio = [[(logp[i, t] - rollout.logp[i, t]).exp() for t in range(3) if rollout.mask[i, t]] for i in range(8)]
        defined = gradient(written_out(name, ratio, by_row, written_out_credit(name, rollout)), policy)
        found, metrics = iteration(VARIANTS[name], policy, lambda _, rollout=rollout: rollout)
        close(found, defined)
        low, high = low + metrics["clip_fraction_low"], high + metrics["clip_fraction_high"]
    assert high > 0, "a bound that is not met is not tested"
    assert low > 0 or name == "cispo"


def written_out_credit(name: str, rollout: Rollout) -> list[float]:
    """Of each row; there are four of each prompt, one after the other."""
    score = rollout.reward.sum(1).view(2, 4)
    if name == "rloo":
        return (score - (score.sum(1, keepdim=True) - score) / 3).flatten().tolist()
    scale = 1 if name == "dr_grpo" else score.std(1, keepdim=True) + 1e-4
    return ((score - score.mean(1, keepdim=True)) / scale).flatten().tolist()


# What each exchanges


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "grpo"])
def test_no_variant_is_another(name: str, policy: OnPrefixes) -> None:
    rollout = old_rollout(token_policy(10, near=policy, distance=0.9))
    found = {n: iteration(v, policy, lambda _: rollout)[0] for n, v in VARIANTS.items()}
    others = [x for n, x in found.items() if n != name]
    assert min((found[name] - x).norm() for x in others) > 1e-3


def test_a_variant_takes_every_keyword_of_grpo(policy: OnPrefixes) -> None:
    """The difference is a default: what is asked for wins."""
    rollout = old_rollout(token_policy(10, near=policy, distance=0.9))
    options = {name: x.default for name, x in signature(grpo).parameters.items() if x.kind is x.KEYWORD_ONLY}
    options.pop("max_grad_norm")
    plain = iteration(grpo, policy, lambda _: rollout)[0]
    for name, variant in VARIANTS.items():
        assert torch.equal(iteration(variant, policy, lambda _: rollout, **options)[0], plain), name


@pytest.mark.parametrize("low", [0.0, 0.2, inf])
def test_cispo_with_a_bound_below_clips_weights_from_below(low: float, policy: OnPrefixes) -> None:
    rollout = rows(old_rollout(token_policy(10, near=policy, distance=0.9)), torch.arange(4))
    logp = table(policy).log()[prefix_state(WORLD, rollout.obs), rollout.action]
    weight = (logp - rollout.logp).exp().clamp(1 - low, 1.28).detach()
    score = rollout.reward.sum(1, keepdim=True)
    advantage = (score - score.mean()) / (score.std() + 1e-4)
    defined = (weight * advantage * logp)[rollout.mask].sum() / rollout.mask.sum()
    close(iteration(cispo, policy, lambda _: rollout, clip=(low, 0.28))[0], gradient(defined, policy))


def test_each_is_one_exchange_away_from_grpo() -> None:
    differences = {name: set(v.keywords) for name, v in VARIANTS.items() if isinstance(v, partial)}
    assert all(v.func is grpo for v in VARIANTS.values() if isinstance(v, partial))
    assert differences == {
        "dr_grpo": {"credit", "weights"},
        "dapo": {"clip", "weights"},
        "gspo": {"ratio", "clip"},
        "cispo": {"gain", "clip", "weights"},
        "rloo": {"credit", "weights"},
        "reinforce_plus_plus": {"credit", "weights"},
    }
