"""Every line of the table: its expected gradient is its definition, and the variants differ by what they exchange."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from math import inf
from typing import Any, get_args, get_type_hints

import pytest
import torch
from conftest import SoftmaxOfPrefix, SpoiledPolicy, off_policy, spoiled
from oracles import (
    FAMILY,
    TREE,
    WORLD,
    Method,
    assert_split_changes_nothing,
    composed,
    expected,
    gradient,
    iteration,
    line,
    log_p,
    parameters,
    reward_gradient,
    table,
    token_policy,
)
from probes import ActionAndObservationMatter
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.advantages import (
    gae,
    group_mean,
    group_scale,
    mean_baseline,
    monte_carlo_advantage,
    n_step_advantage,
    no_baseline,
    time_mean_baseline,
    unit_scale,
)
from policygrad.advantages import leave_one_out as group_leave_one_out
from policygrad.algorithms.actor_critic import ActorCriticObjective
from policygrad.algorithms.grpo import GRPOObjective
from policygrad.algorithms.ppo import PPOObjective
from policygrad.algorithms.reinforce import ReinforceObjective
from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.control import Policy, Sampler, make_environments
from policygrad.credit import Assign, baselined, bootstrapped, discounted, grouped, standardized, vtrace
from policygrad.critics import optimal_baseline, value_baseline
from policygrad.divergences import AdaptiveCoefficient, k3
from policygrad.errors import UserError
from policygrad.exact.closed_form import expected_return
from policygrad.exact.enumeration import batches
from policygrad.exact.policies import TabularCritic
from policygrad.exact.sampler import CompletionSampler
from policygrad.exact.tokens import OnPrefixes, completions, groups, prefix_state
from policygrad.objectives import clipped_surrogate, clipped_weight
from policygrad.returns import reward_to_go, trajectory_return
from policygrad.rollout import Rollout, decisions
from policygrad.score import sequence_ratio, token_ratio
from policygrad.train.compose import reads_rows
from policygrad.train.methods import ALIASES, CREDITS, METHODS, TABLE, method_named
from policygrad.train.options import Options, options_of
from policygrad.updates import Objective

SIZE = 3
Sample = Callable[..., Rollout]
close = partial(assert_close, rtol=1e-10, atol=1e-12)
every_variant = pytest.mark.parametrize("name", FAMILY)


@pytest.fixture
def policy(float64: None) -> OnPrefixes:
    return token_policy(0)


# Names


def test_a_method_is_found_by_any_spelling_of_its_name() -> None:
    for method in TABLE:
        for name in (method.name, method.name.upper(), method.name.replace("_", "-")):
            assert method_named(name) is method
    for alias, name in ALIASES.items():
        assert method_named(alias) is METHODS[name]


def test_a_method_of_the_table_names_its_paper() -> None:
    for method in TABLE:
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}|[A-Z]\w+( et al\.)? \d{4}", method.source), method.name


@pytest.mark.parametrize(("name", "advice"), [("gprpo", "did you mean grpo"), ("sac_v9_x", "there are")])
def test_an_unknown_name_is_met_with_the_nearest(name: str, advice: str) -> None:
    with pytest.raises(UserError, match=f"unknown method '{name}': .*{advice}"):
        method_named(name)


@pytest.mark.parametrize("name", [3, None, ["ppo"]])
def test_a_name_that_is_no_text_is_refused(name: object) -> None:
    with pytest.raises(UserError, match=r"the method is .*: give its name, such as ppo"):
        method_named(name)  # type: ignore[arg-type]


# At the old policy: sum over groups of P(group) sum_i c_i grad log P(y_i|x), with c_i written out.
# reward R and length L of the completions of each group: [K, SIZE] -> c [K, SIZE].


def mean_and_std(reward: Tensor) -> tuple[Tensor, Tensor]:
    mean = sum(reward.unbind(1)) / SIZE
    square = sum((r - mean) ** 2 for r in reward.unbind(1))
    return mean.unsqueeze(1), (square / (SIZE - 1)).sqrt().unsqueeze(1)


def per_row(reward: Tensor, length: Tensor) -> Tensor:
    mean, std = mean_and_std(reward)
    return (reward - mean) / std.where(std > 1e-12, inf) / length / SIZE


def per_token(reward: Tensor, length: Tensor) -> Tensor:
    mean, std = mean_and_std(reward)
    return (reward - mean) / std.where(std > 1e-12, inf) / length.sum(1, keepdim=True)


def per_budget(reward: Tensor, length: Tensor) -> Tensor:
    return (reward - mean_and_std(reward)[0]) / (SIZE * WORLD.length)


def leave_one_out(reward: Tensor, length: Tensor) -> Tensor:
    return (reward - (reward.sum(1, keepdim=True) - reward) / (SIZE - 1)) / SIZE


def per_episode(reward: Tensor, length: Tensor) -> Tensor:
    return (reward - mean_and_std(reward)[0]) / SIZE


def standard_per_episode(reward: Tensor, length: Tensor) -> Tensor:
    return per_row(reward, length) * length


def over_the_mean(reward: Tensor, length: Tensor) -> Tensor:
    mean = mean_and_std(reward)[0]
    return (reward - mean) / mean.where(mean > 0, inf) / length.sum(1, keepdim=True)


def over_the_std_of_all(reward: Tensor, length: Tensor) -> Tensor:
    """One group is all there is."""
    return per_token(reward, length)


def owed_to(reward: Tensor, length: Tensor) -> Tensor:
    best = [max(row) for row in reward.tolist()]
    rest = [[max(x for j, x in enumerate(row) if j != i) for i in range(SIZE)] for row in reward.tolist()]
    return (torch.tensor(best).unsqueeze(1) - torch.tensor(rest)) / SIZE


def weighted_by_length(reward: Tensor, length: Tensor) -> Tensor:
    total = length.sum(1, keepdim=True)
    return (reward - (length * reward).sum(1, keepdim=True) / total) / total


AT_THE_OLD_POLICY = {
    "grpo": per_row,
    "gspo": per_row,
    "dapo": per_token,
    "cispo": per_token,
    "dr_grpo": per_budget,
    "rloo": leave_one_out,
    "dppo": per_budget,
    "sapo": per_row,
    "gmpo": per_row,
    "gspo_token": per_row,
    "luspo": standard_per_episode,
    "vespo": per_episode,
    "maxrl": over_the_mean,
    "pass_at_k": owed_to,
    "lite_ppo": over_the_std_of_all,
    "opo": weighted_by_length,
    "two_sided_grpo": per_row,
    "masked_grpo": per_row,
    "skywork_or1": per_token,
    "kl_cov": per_token,
    "opmd": per_episode,
}
# Of those that look at single tokens or at the batch, `verify` has the definition.
OF_VERIFY = {"clip_cov", "otb", "forking_tokens", "gdpo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"}


def variant(name: str) -> Method:
    """A line of the table on one rollout: dynamic sampling would draw more of them."""
    return partial(line(name), **({"sampling_rounds": 1} if name == "dapo" else {}))


def test_every_variant_has_a_definition_here() -> None:
    assert set(FAMILY) == set(AT_THE_OLD_POLICY) | OF_VERIFY


@pytest.mark.parametrize("name", AT_THE_OLD_POLICY)
def test_the_expected_gradient_is_the_definition(name: str, policy: OnPrefixes) -> None:
    rollout, probability = completions(WORLD, table(policy))
    index, weight = groups(rollout, probability, SIZE)
    reward = rollout.reward.sum(1).abs() if name == "maxrl" else rollout.reward.sum(1)
    credit = AT_THE_OLD_POLICY[name](reward[index], rollout.mask.sum(1)[index])
    defined = gradient((weight.unsqueeze(1) * credit * log_p(policy, rollout)[index]).sum(), policy)
    assert defined.norm() > 1e-2
    close(expected(variant(name), policy, SIZE), defined)


@pytest.mark.parametrize("size", [2, SIZE])
def test_rloo_is_the_gradient_of_j(size: int, policy: OnPrefixes) -> None:
    close(expected(line("rloo"), policy, size), reward_gradient(policy))


@pytest.mark.parametrize("size", [2, SIZE])
def test_dr_grpo_has_the_direction_of_the_gradient_of_j(size: int, policy: OnPrefixes) -> None:
    close(expected(line("dr_grpo"), policy, size), (1 - 1 / size) / WORLD.length * reward_gradient(policy))


def test_grpo_has_not(policy: OnPrefixes) -> None:
    assert torch.cosine_similarity(expected(line("grpo"), policy, SIZE), reward_gradient(policy), dim=0) < 0.98


@pytest.mark.parametrize("size", [1, 2])
def test_reinforce_plus_plus_is_the_return_standardized_over_the_decisions_of_the_batch(
    size: int, policy: OnPrefixes
) -> None:
    """Of batches of any prompts, with a reward at every token: each is credited with what came from it on."""
    rollout, probability = completions(WORLD, table(policy))
    rollout = replace(rollout, reward=torch.randn(rollout.mask.shape))
    logp = table(policy).log()[prefix_state(WORLD, rollout.obs), rollout.action]
    found, defined = 0.0, 0.0
    for index, weight in zip(*batches(probability, size), strict=True):
        part = rollout.rows(index)
        found += weight * iteration(line("reinforce_plus_plus"), policy, lambda _, part=part: part)[0]
        chosen = [(i, t) for i in index for t in range(WORLD.length) if rollout.mask[i, t]]
        to_go = [sum(rollout.reward[i, u] for u in range(t, WORLD.length) if rollout.mask[i, u]) for i, t in chosen]
        mean = sum(to_go) / len(to_go)
        std = (sum((g - mean) ** 2 for g in to_go) / max(len(to_go) - 1, 1)) ** 0.5
        advantage = [(g - mean) / (std or inf) for g in to_go]
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
        case "rloo" | "pass_at_k":
            return sum(sum(least(r, a, 0.2, 0.2) for r in rs) for rs, _, a in each) / rows
        case "dppo":

            def near(r: Tensor, lp: Tensor, a: float) -> bool:
                p, old = lp.exp(), (lp / 1).exp() / r
                return bool((p - old <= 0.15) if a > 0 else (p - old >= -0.15))

            kept = ((r, lp, a) for rs, lps, a in each for r, lp in zip(rs, lps, strict=True) if near(r, lp, a))
            return sum(min(r.item(), 20.0) * a * lp for r, lp, a in kept) / rows / WORLD.length
        case "sapo":

            def gate(r: Tensor, a: float) -> Tensor:
                tau = 1.0 if a > 0 else 1.05
                return 4 / tau / (1 + (-tau * (r - 1)).exp()) * a

            return sum(sum(gate(r, a) for r in rs) / len(rs) for rs, _, a in each) / rows
        case "gmpo":

            def stopped(r: Tensor, a: float) -> Tensor:
                return min(r, torch.tensor(0.4).exp()) if a > 0 else max(r, torch.tensor(-0.4).exp())

            return sum(torch.stack([stopped(r, a) for r in rs]).prod() ** (1 / len(rs)) * a for rs, _, a in each) / rows
        case "gspo_token":
            whole = [torch.stack(rs).prod() ** (1 / len(rs)) for rs in ratio]
            return sum(least(s, a, 3e-4, 4e-4) for s, a in zip(whole, credit, strict=True)) / rows
        case "luspo":
            whole = [torch.stack(rs).prod() ** (1 / len(rs)) for rs in ratio]
            return sum(len(rs) * least(s, a, 3e-4, 4e-4) for rs, s, a in zip(ratio, whole, credit, strict=True)) / rows
        case "vespo":

            def kernel(rs: list[Tensor], a: float) -> float:
                w, (k, c) = torch.stack(rs).prod().item(), (2.0, 3.0) if a > 0 else (3.0, 2.0)
                return w**k * torch.tensor(c * (1 - w)).exp().item()

            return sum(kernel(rs, a) * a * sum(lps) for rs, lps, a in each) / rows
        case "maxrl":
            return sum(sum(r * a for r in rs) for rs, _, a in each) / total
        case "lite_ppo" | "skywork_or1":
            return sum(sum(least(r, a, 0.2, 0.2) for r in rs) for rs, _, a in each) / total
        case "opo":
            return sum(sum(r * a for r in rs) for rs, _, a in each) / total
        case "two_sided_grpo":
            bounded = (
                [max(least(r, a, 0.2, 0.2), torch.tensor(4.0 * a)) if a < 0 else least(r, a, 0.2, 0.2) for r in rs]
                for rs, _, a in each
            )
            return sum(sum(row) / len(row) for row in bounded) / rows
        case "masked_grpo":
            drift = [-torch.stack(rs).log().mean().item() for rs in ratio]
            kept_rows = [(rs, a) for (rs, _, a), d in zip(each, drift, strict=True) if a >= 0 or d <= 0.5]
            return sum(sum(least(r, a, 0.2, 0.2) for r in rs) / len(rs) for rs, a in kept_rows) / rows
        case "clip_cov":
            covaries, within = covariances(ratio, logp, credit), 0
            within = sum(1.0 < c < 5.0 for row in covaries for c in row)
            drawn = min(max(int(2e-4 * total), 1), within)  # the mean over all draws of so many of them
            value = torch.zeros(())
            for (rs, _, a), cs in zip(each, covaries, strict=True):
                for r, c in zip(rs, cs, strict=True):
                    value = value + least(r, a, 0.2, 0.2) * (1 - drawn / within if 1.0 < c < 5.0 else 1.0)
            return value / total
        case "kl_cov":
            covaries = covariances(ratio, logp, credit)
            most = sorted((c for row in covaries for c in row), reverse=True)[max(int(2e-4 * total), 1) - 1]
            value = torch.zeros(())
            for (rs, _, a), cs in zip(each, covaries, strict=True):
                for r, c in zip(rs, cs, strict=True):
                    value = value + r * a - (r.log().abs() if c >= most else 0.0)
            return value / total
        case "opmd":
            log_w = [torch.stack(rs).log().sum() for rs in ratio]
            return sum(sum(lps) * a - 0.1 / 2 * w**2 for (_, lps, a), w in zip(each, log_w, strict=True)) / rows
    raise AssertionError(name)


def covariances(ratio: list[list[Tensor]], logp: list[list[Tensor]], credit: list[float]) -> list[list[float]]:
    """(A - mean A) (log pi_old - mean log pi_old) of each decision, with the means over all of them."""
    old = [[(lp - r.log()).item() for r, lp in zip(rs, lps, strict=True)] for rs, lps in zip(ratio, logp, strict=True)]
    flat = [x for row in old for x in row]
    mean, mean_credit = sum(flat) / len(flat), sum(a * len(r) for a, r in zip(credit, old, strict=True)) / len(flat)
    return [[(a - mean_credit) * (x - mean) for x in row] for a, row in zip(credit, old, strict=True)]


def old_rollout(old: OnPrefixes) -> Rollout:
    """Four completions of each prompt, the old policy's, none of them equal."""
    return completions(WORLD, table(old))[0]


@pytest.mark.parametrize("name", [*AT_THE_OLD_POLICY, "clip_cov"])
def test_away_from_the_old_policy_the_gradient_is_that_of_the_papers_objective(name: str, policy: OnPrefixes) -> None:
    low, high, kept = 0.0, 0.0, 1.0
    for seed in range(12):
        distance = (1e-3 if name in ("gspo", "gspo_token", "luspo") else 1.0) * (0.3, 0.9, 2.5)[seed % 3]
        rollout = old_rollout(token_policy(seed, near=policy, distance=distance))
        logp = table(policy).log()[prefix_state(WORLD, rollout.obs), rollout.action]
        by_row = [[logp[i, t] for t in range(3) if rollout.mask[i, t]] for i in range(8)]
        ratio = [[(logp[i, t] - rollout.logp[i, t]).exp() for t in range(3) if rollout.mask[i, t]] for i in range(8)]
        defined = gradient(written_out(name, ratio, by_row, written_out_credit(name, rollout)), policy)
        found, metrics = iteration(variant(name), policy, lambda _, rollout=rollout: rollout)
        close(found, defined)
        low, high = low + metrics.get("clip_fraction_low", 0.0), high + metrics.get("clip_fraction_high", 0.0)
        kept = min(kept, float(metrics.get("kept", 1.0)))
    one_sided = ("cispo", "dppo", "pass_at_k")
    unbounded = ("sapo", "gmpo", "vespo", "maxrl", "opo", "opmd", "kl_cov")
    assert high > 0 or name in (*unbounded, "dppo"), "a bound that is not met is not tested"
    assert low > 0 or name in (*unbounded, *one_sided)
    assert (kept < 1) == (name in ("dppo", "masked_grpo"))


def written_out_credit(name: str, rollout: Rollout) -> list[float]:
    """Of each row; there are four of each prompt, one after the other."""
    score = rollout.reward.sum(1).view(2, 4)
    if name == "rloo":
        return (score - (score.sum(1, keepdim=True) - score) / 3).flatten().tolist()
    if name == "pass_at_k":
        return [max(row) - max(x for j, x in enumerate(row) if j != i) for row in score.tolist() for i in range(4)]
    if name == "opo":
        length = rollout.mask.sum(1).view(2, 4)
        return (score - (length * score).sum(1, keepdim=True) / length.sum(1, keepdim=True)).flatten().tolist()
    scale = score.std(1, keepdim=True)
    if name in ("dr_grpo", "dppo", "vespo", "opmd"):
        scale = 1
    elif name == "maxrl":
        score = score.abs()
        scale = score.mean(1, keepdim=True)
    elif name == "lite_ppo":
        scale = score.std()
    return ((score - score.mean(1, keepdim=True)) / scale).flatten().tolist()


@pytest.mark.parametrize("tau", [0.1, 1.0])
def test_dro_is_the_squared_error_of_its_paper(tau: float, policy: OnPrefixes) -> None:
    """-(1 / 2 tau) E[(R - V(x) - tau log(pi / pi_old))^2], whose expansion is the line's objective and a constant."""
    for seed in range(3):
        rollout = old_rollout(token_policy(seed, near=policy, distance=0.9))
        values = OnPrefixes(WORLD, TabularCritic(torch.linspace(-1.0, 1.0, len(TREE.start))))
        at_start = values(rollout.obs)[:, 0].tolist()
        logp = table(policy).log()[prefix_state(WORLD, rollout.obs), rollout.action]
        total = torch.zeros(())
        for i in range(8):
            log_w = sum(logp[i, t] - rollout.logp[i, t] for t in range(3) if rollout.mask[i, t])
            total = total - (rollout.reward[i].sum() - at_start[i] - tau * log_w) ** 2 / (2 * tau)
        found = iteration(partial(line("dro"), critic=values), policy, lambda _, x=rollout: x, kl_old_coefficient=tau)[
            0
        ]
        close(found, gradient(total / 8, policy))


@pytest.mark.parametrize("low", [0.1, 0.2, inf])
def test_cispo_with_a_bound_below_clips_weights_from_below(low: float, policy: OnPrefixes) -> None:
    rollout = old_rollout(token_policy(10, near=policy, distance=0.9)).rows(slice(0, 4))
    logp = table(policy).log()[prefix_state(WORLD, rollout.obs), rollout.action]
    weight = (logp - rollout.logp).exp().clamp(1 - low, 1.28).detach()
    score = rollout.reward.sum(1, keepdim=True)
    advantage = (score - score.mean()) / score.std()
    defined = (weight * advantage * logp)[rollout.mask].sum() / rollout.mask.sum()
    found = iteration(line("cispo"), policy, lambda _: rollout, clip_low=low)[0]
    close(found, gradient(defined, policy))


# What each exchanges


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "grpo"])
def test_no_variant_is_another(name: str, policy: OnPrefixes) -> None:
    """At some distance of the old policy; but GSPO with one advantage for a row is GSPO, by token or not, and of one
    reward GDPO has nothing to decouple."""
    alike = [("gspo", "gspo_token"), ("gdpo", "reinforce_plus_plus_baseline")]
    same = dict(alike + [(b, a) for a, b in alike]).get(name)
    most = dict.fromkeys({*FAMILY} - {name}, 0.0)
    for seed, distance in enumerate((1e-3, 0.3, 0.9, 2.5)):
        rollout = old_rollout(token_policy(10 + seed, near=policy, distance=distance))
        found = {n: iteration(variant(n), policy, lambda _, rollout=rollout: rollout)[0] for n in FAMILY}
        most = {n: max(x, float((found[name] - found[n]).norm())) for n, x in most.items()}
    assert most.pop(same, 0.0) < 1e-12
    assert min(most.values()) > 1e-3, min(most, key=lambda n: most[n])


def test_a_variant_with_grpos_options_is_grpo(policy: OnPrefixes) -> None:
    """The difference is a default: what is asked for wins."""
    rollout = old_rollout(token_policy(10, near=policy, distance=0.9))
    options = asdict(options_of("grpo", "exact")()) | {"max_grad_norm": inf}
    plain = iteration(line("grpo"), policy, lambda _: rollout, **options)[0]
    for name in FAMILY:
        assert torch.equal(iteration(line(name), policy, lambda _: rollout, **options)[0], plain), name


@pytest.mark.parametrize("world", ["exact", "control"])
def test_each_is_one_exchange_away_from_grpo(world: str) -> None:
    plain = asdict(options_of("grpo", world)())
    found = {
        name: {option for option, x in asdict(options_of(name, world)()).items() if x != plain[option]}
        for name in FAMILY
    }
    assert found == {
        "grpo": set(),
        "dr_grpo": {"group_scale", "weights"},
        "dapo": {"clip_high", "weights", "sampling_rounds"},
        "gspo": {"ratio", "clip_low", "clip_high"},
        "cispo": {"gain", "clip_low", "clip_high", "weights"},
        "rloo": {"group_baseline", "group_scale", "weights"},
        "dppo": {"gain", "clip_low", "clip_high", "divergence_mask", "group_scale", "weights"},
        "sapo": {"gain"},
        "gmpo": {"ratio", "clip_low", "clip_high", "token_clip"},
        "gspo_token": {"ratio", "clip_low", "clip_high"},
        "luspo": {"ratio", "clip_low", "clip_high", "weights"},
        "vespo": {"ratio", "gain", "group_scale", "weights"},
        "maxrl": {"group_scale", "clip_low", "clip_high", "weights"},
        "pass_at_k": {"group_baseline", "group_scale", "weights"},
        "lite_ppo": {"group_scale", "weights"},
        "opo": {"credit", "baseline", "clip_low", "clip_high", "weights"},
        "otb": {"credit", "baseline", "clip_low", "clip_high", "weights"},
        "two_sided_grpo": {"dual_clip"},
        "masked_grpo": {"drift_bound"},
        "forking_tokens": {"clip_high", "weights", "learn_from"},
        "skywork_or1": {"weights", "entropy_target"},
        "clip_cov": {"weights", "learn_from"},
        "kl_cov": {"weights", "clip_low", "clip_high", "kl_old_coefficient", "kl_old_estimate", "kl_old_share"},
        "opmd": {"gain", "group_scale", "weights", "kl_old_coefficient", "kl_old_estimate"},
        "reinforce_plus_plus_baseline": {"group_scale", "normalize_advantages", "weights"},
        "gdpo": {"group_scale", "normalize_advantages", "weights"},
        "reinforce_plus_plus": {"credit", "baseline", "normalize_advantages", "weights"},
    }


def test_a_gradient_longer_than_1_is_shortened_if_nothing_else_is_said() -> None:
    for name in FAMILY:
        assert options_of(name, "exact")().max_grad_norm == 1.0


# Splits


def anchored(reference: nn.Module, estimate: str = "straight_through") -> dict[str, Any]:
    return {"reference": reference, "kl_ref": "loss", "kl_ref_coefficient": 0.3, "kl_ref_estimate": estimate}


@every_variant
def test_any_split_into_micro_batches_is_the_same_gradient_and_the_same_metrics(
    name: str, prefix_policy: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(prefix_policy, sample)
    options = anchored(SoftmaxOfPrefix()) | {"entropy_coefficient": 0.1}
    learn = partial(iteration, variant(name), prefix_policy, lambda _: rollout, **options)
    assert_split_changes_nothing(prefix_policy, learn)


@every_variant
def test_minibatches_split_as_the_whole_does(name: str, softmax_of_prefix: nn.Module, sample: Sample) -> None:
    """In minibatches of three, the last filled up; two epochs, so that an error would be carried on."""
    rollout = off_policy(softmax_of_prefix, sample)
    options = {"minibatch_size": 3, "epochs": 2, "entropy_coefficient": 0.1}
    learn = partial(iteration, variant(name), softmax_of_prefix, lambda _: rollout, **options)
    assert_split_changes_nothing(softmax_of_prefix, learn)


# Behind the mask


@pytest.mark.parametrize("micro_batch", [None, 1])
@every_variant
def test_rows_in_which_nothing_counts_are_no_reason_to_stop(
    name: str, micro_batch: int | None, policy: OnPrefixes
) -> None:
    """Completions cut and filtered out, down to whole minibatches of them, and a whole rollout."""
    rollout = completions(WORLD, table(policy))[0]
    options = anchored(token_policy(7), "k3") | {"entropy_coefficient": 0.1, "micro_batch": micro_batch}
    for kept in (slice(0, 2), slice(0, 0)):
        mask = torch.zeros_like(rollout.mask)
        mask[kept] = rollout.mask[kept]
        sparse = replace(rollout, mask=mask)
        torch.manual_seed(0)
        options["minibatch_size"] = 2
        change, metrics = iteration(variant(name), policy, lambda _, sparse=sparse: sparse, **options)
        assert change.isfinite().all()
        assert all(torch.as_tensor(x).isfinite() for x in metrics.values())
        assert {"kl_old", "entropy", "kl_ref", "gradient_norm"} <= metrics.keys()
        assert bool(change.eq(0).all()) == (kept == slice(0, 0))


@pytest.mark.parametrize("garbage", [torch.nan, inf, -inf])
@every_variant
def test_garbage_behind_the_mask_changes_nothing(name: str, garbage: float, float64: None, sample: Sample) -> None:
    """From the rollout and the policy to every bit of the parameters and the metrics."""
    policy = SpoiledPolicy()
    rollout = off_policy(policy, sample)
    assert not rollout.mask.all()

    def learn(garbage: float) -> tuple[Tensor, dict[str, Any]]:
        policy.garbage = garbage
        dirty = spoiled(rollout, garbage)
        torch.manual_seed(0)
        options = {"entropy_coefficient": 0.1, "epochs": 2, "minibatch_size": 4}
        return iteration(variant(name), policy, lambda _: dirty, **options)

    (clean, clean_metrics), (dirty, dirty_metrics) = learn(0.0), learn(garbage)
    assert clean.norm() > 1e-3
    assert torch.equal(clean, dirty)
    for metric, x in clean_metrics.items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(dirty_metrics[metric])), metric


# The first update


def on_policy(policy: OnPrefixes, prompts: int = 4, size: int = 4) -> Rollout:
    """Scored by the very function that the learner scores with."""
    rollout = CompletionSampler(WORLD, prompts, size)(policy)
    with torch.no_grad():
        return replace(rollout, logp=policy(rollout.obs).log_prob(rollout.action))


@every_variant
def test_the_first_ratio_is_exactly_1(name: str, policy: OnPrefixes) -> None:
    rollout = on_policy(policy)
    change, metrics = iteration(variant(name), policy, lambda _: rollout)
    assert metrics["kl_old"] == metrics.get("clip_fraction_low", 0) == metrics.get("clip_fraction_high", 0) == 0
    assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-14)
    assert metrics["gradient_norm"] > 1e-3
    assert_close(metrics["gradient_norm"], change.norm())
    later = iteration(variant(name), policy, lambda _: rollout, epochs=2)[1]
    assert later["kl_old"] > 0, "the second epoch is away from the old policy"


@pytest.mark.parametrize("name", ["grpo", "gspo", "reinforce_plus_plus"])
def test_the_objective_is_0_at_first_whatever_is_learned(name: str, policy: OnPrefixes) -> None:
    """Where the weights are those by which the advantages are centered."""
    change, metrics = iteration(variant(name), policy, lambda _: on_policy(policy))
    assert metrics["objective"] == pytest.approx(0, abs=1e-14)
    assert change.norm() > 1e-3


@pytest.mark.parametrize("reward", [0.1, -1e6 - 0.1])
@pytest.mark.parametrize("name", [name for name in FAMILY if name != "otb"])  # it has no baseline beyond other rows
def test_groups_of_equal_rewards_teach_nothing(name: str, reward: float, policy: OnPrefixes) -> None:
    """To the last bit. Each group has a reward of its own, but for REINFORCE++, whose group is the batch."""
    rollout = on_policy(policy)
    per_group = reward if name == "reinforce_plus_plus" else reward * (1 + rollout.group.unsqueeze(1))
    flat = replace(rollout, reward=torch.where(rollout.ended, per_group, 0.0))
    change, metrics = iteration(line(name), policy, lambda _: flat, epochs=2, minibatch_size=5)
    assert change.eq(0).all()
    assert metrics["gradient_norm"] == metrics["objective"] == 0


# Invariances


@every_variant
def test_neither_the_order_of_rows_nor_the_labels_of_groups_matter(
    name: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(softmax_of_prefix, sample)
    plain = iteration(variant(name), softmax_of_prefix, lambda _: rollout)[0]
    shuffled = rollout.rows(torch.randperm(7))
    relabeled = replace(rollout, group=torch.tensor([12, -1, 5])[rollout.group])
    for other in (shuffled, relabeled):
        assert_close(iteration(variant(name), softmax_of_prefix, lambda _, o=other: o)[0], plain, rtol=0, atol=1e-13)
    one = replace(rollout, group=torch.zeros_like(rollout.group))
    other = iteration(variant(name), softmax_of_prefix, lambda _: one)[0]
    assert ((other - plain).norm() > 1e-3) == (name != "reinforce_plus_plus"), "which rows are together does"


@pytest.mark.parametrize(
    "name", sorted({*AT_THE_OLD_POLICY} - {"maxrl", "lite_ppo"})
)  # which divide by what it changes
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(
    name: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(softmax_of_prefix, sample)
    plain = iteration(variant(name), softmax_of_prefix, lambda _: rollout)[0]
    reward = rollout.reward.clone()
    reward[:, 0] += torch.tensor([5.0, -3.0, 100.0])[rollout.group]  # the first step of every row counts
    shifted = replace(rollout, reward=reward)
    assert_close(iteration(variant(name), softmax_of_prefix, lambda _: shifted)[0], plain, rtol=0, atol=1e-12)
    by_row = replace(rollout, reward=rollout.reward + torch.arange(7.0).unsqueeze(1))
    assert (iteration(variant(name), softmax_of_prefix, lambda _: by_row)[0] - plain).norm() > 1e-3


@every_variant
def test_only_a_division_by_the_deviation_takes_out_the_scale_of_rewards(
    name: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(softmax_of_prefix, sample)
    plain, scaled = (
        iteration(variant(name), softmax_of_prefix, lambda _, c=c: replace(rollout, reward=c * rollout.reward))[0]
        for c in (1, 5)
    )
    if name == "opmd":  # the squared log-ratio is not of the rewards
        scaled, plain = scaled - plain, iteration(variant(name), softmax_of_prefix, lambda _: rollout, gain="score")[0]
        charged = iteration(variant(name), softmax_of_prefix, lambda _: replace(rollout, reward=0 * rollout.reward))[0]
        assert_close(scaled, 4 * (plain - charged), rtol=0, atol=1e-12)
    elif name in ("dr_grpo", "rloo", "dppo", "vespo", "pass_at_k", "opo", "otb"):
        assert_close(scaled, 5 * plain, rtol=0, atol=1e-12)
    else:
        assert_close(scaled, plain, rtol=0, atol=1e-12)


# What the options of a line become

GAMMA = 0.9
NUMBERS = {"lam": 0.6, "n": 2, "rho_bar": 1.2, "c_bar": 0.7}


def credits(policy: nn.Module, critic: nn.Module) -> dict[str, tuple[dict[str, Any], Assign]]:
    """Options, and the credit they name."""
    value = partial(value_baseline, critic=critic)
    vtraced = {name: NUMBERS[name] for name in ("lam", "rho_bar", "c_bar")}
    found = {
        "gae": bootstrapped(critic, partial(gae, gamma=GAMMA, lam=0.6)),
        "n_step": bootstrapped(critic, partial(n_step_advantage, gamma=GAMMA, n=2)),
        "monte_carlo": bootstrapped(critic, partial(monte_carlo_advantage, gamma=GAMMA)),
        "vtrace": vtrace(policy, critic, gamma=GAMMA, **vtraced),
    }
    made: dict[str, tuple[dict[str, Any], Assign]] = {name: ({"credit": name}, x) for name, x in found.items()}
    baselines = {
        "none": no_baseline,
        "mean": mean_baseline,
        "time_mean": time_mean_baseline,
        "value": value,
        "optimal": partial(optimal_baseline, policy=policy),
    }
    for name, b in baselines.items():
        for returns in (reward_to_go, trajectory_return):
            assign = baselined(partial(returns, gamma=GAMMA), b)
            made[f"{returns.__name__}, {name}"] = ({"credit": returns.__name__, "baseline": name}, assign)
    for name, b in {"mean": group_mean, "leave_one_out": group_leave_one_out}.items():
        for scale, x in {"std": group_scale, "none": unit_scale}.items():
            options = {"credit": "group", "group_baseline": name, "group_scale": scale}
            made[f"group, {name}, {scale}"] = (options, grouped(b, x))
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_line_is_credited_as_its_options_say(
    name: str, softmax: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    """Any line with any credit, to the last bit."""
    rollout = off_policy(softmax, sample, final_obs=torch.randn(7, 3))
    for label, (options, assign) in credits(softmax, critic).items():
        for more, wanted in (
            ({"normalize_advantages": "none"}, assign),
            ({"normalize_advantages": "batch"}, standardized(assign)),
            ({"normalize_advantages": "none", "discounted": True}, discounted(assign, GAMMA)),
        ):
            everywhere = {"learn_from": "all", "kl_old_share": 1.0} if METHODS[name].objective == "grpo" else {}
            values = NUMBERS | {"gamma": GAMMA} | everywhere | options | more
            found = composed(name, softmax, sample, critic, **values).credit(rollout)
            for column, x, y in zip(found._fields, found, wanted(rollout), strict=True):
                assert torch.equal(x, y), (label, more, column)


OBJECTIVE: dict[str, dict[str, Any]] = {
    "entropy_coefficient": {"entropy_coefficient": 0.3},
    "value_coefficient": {"value_coefficient": 0.9},
    "clip": {"clip_low": 0.05, "clip_high": 0.15},
    "value_clip": {"value_clip": 0.1},
    "dual_clip": {"dual_clip": 1.1},
    "penalty": {"kl_old_coefficient": 0.8},
    "ratio": {"ratio": "sequence"},
    "gain": {"gain": "weight"},
}


def by_hand(name: str, policy: nn.Module, critic: nn.Module, o: dict[str, Any]) -> Objective:
    """The objective of a line with its critic in it, if it takes one."""
    entropy, weight = {"entropy_coefficient": o.get("entropy_coefficient", 0.0)}, o.get("value_coefficient", 0.5)
    clip = (o.get("clip_low", 0.2), o.get("clip_high", 0.2))
    ratio = sequence_ratio if o.get("ratio") == "sequence" else token_ratio
    match METHODS[name].objective:
        case "reinforce":
            return ReinforceObjective(policy, **entropy)
        case "actor_critic":
            return ActorCriticObjective(policy, critic, **entropy, value_coefficient=weight)
        case "surrogate":
            return SurrogateObjective(policy, ratio=ratio)
        case "ppo":
            penalty = AdaptiveCoefficient(o["kl_old_coefficient"]) if "kl_old_coefficient" in o else None
            bounds = {x: o.get(x, inf) for x in ("value_clip", "dual_clip")}
            return PPOObjective(
                policy, critic, clip=clip, penalty=penalty, **entropy, value_coefficient=weight, **bounds
            )
    gain = clipped_weight if o.get("gain") == "weight" else clipped_surrogate
    bound = {"dual_clip": o.get("dual_clip", inf)}
    if "kl_old_coefficient" in o:
        coefficient = AdaptiveCoefficient(o["kl_old_coefficient"])
        bound |= {"penalty": lambda new, old, mask: k3(old, new), "penalty_coefficient": coefficient}
    return GRPOObjective(policy, ratio=ratio, gain=gain, clip=clip, **entropy, **bound)


@pytest.mark.parametrize("name", ["reinforce", "actor_critic", "off_policy_actor_critic", "npg", "trpo", "ppo", "grpo"])
def test_a_lines_objective_is_what_its_options_say(
    name: str, softmax: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    """Each option that it has changes the objective as it says, to the last bit; and it changes it."""
    rollout = off_policy(softmax, sample)
    batch = decisions(rollout, rollout.mask / 7, *torch.randn(3, 7, 5))
    batch = batch._replace(logp=batch.logp + torch.randn(7, 5).where(rollout.mask, 0.0))
    known = asdict(options_of(name, "exact")())
    plain = composed(name, softmax, sample, critic).objective(batch)[0]
    assert torch.equal(plain, by_hand(name, softmax, critic, {})(batch)[0])
    for label, options in OBJECTIVE.items():
        if options.keys() <= known.keys():
            found = composed(name, softmax, sample, critic, **options).objective(batch)[0]
            assert torch.equal(found, by_hand(name, softmax, critic, options)(batch)[0]), label
            assert (found - plain).abs() > 1e-6, label
    without = composed(name, softmax, sample, critic, credit="group").objective
    assert getattr(without, "critic", None) is None


def test_policy_and_critic_have_rates_of_their_own(softmax: nn.Module, critic: nn.Module, sample: Sample) -> None:
    for name, fitted in {"ppo": False, "actor_critic": False, "reinforce": True, "trpo": True}.items():
        values = {"critic_learning_rate": 0.25} | ({} if name == "trpo" else {"learning_rate": 0.5})
        learner = composed(name, softmax, sample, critic, **values)
        rates = {p: g["lr"] for optimizer in learner.optimizers for g in optimizer.param_groups for p in g["params"]}
        assert all(rates[p] == 0.25 for p in critic.parameters())
        assert all(rates.get(p) == (None if name == "trpo" else 0.5) for p in softmax.parameters())
        assert len(learner.optimizers) == (1 + fitted) - (name == "trpo")


@pytest.mark.parametrize(("epochs", "size", "updates"), [(1, None, 1), (3, 4, 6), (2, 7, 2)])
def test_epochs_and_minibatches_are_the_loops(epochs: int, size: int | None, updates: int, sample: Sample) -> None:
    policy = SoftmaxOfPrefix()
    rollout = sample(policy, rows=7)
    for name in ("ppo", "grpo"):
        options = {"credit": "group", "epochs": epochs, "minibatch_size": size}
        metrics = next(iter(composed(name, deepcopy(policy), lambda _: rollout, **options)))
        assert metrics["updates"] == updates
        options |= {"target_kl": 1e-12, "learning_rate": 0.1}
        metrics = next(iter(composed(name, deepcopy(policy), lambda _: rollout, **options)))
        assert metrics["updates"] == min(updates, 2), "the first minibatch is at the old policy"


@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_the_natural_step_has_the_rule_and_the_radius_it_is_given(
    rate: float, softmax: nn.Module, sample: Sample
) -> None:
    rollout = sample(softmax)
    by_rate = {"step_rule": "learning_rate", "natural_learning_rate": rate}
    metrics = next(iter(composed("npg", deepcopy(softmax), lambda _: rollout, credit="group", **by_rate)))
    assert metrics["step_size"] == pytest.approx(rate)
    for name in ("npg", "trpo"):
        options = {"credit": "group", "delta": rate / 10, "damping": 1e-3}
        metrics = next(iter(composed(name, deepcopy(softmax), lambda _: rollout, **options)))
        assert rate / 40 < metrics["kl_old"] < rate / 5


# It learns


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "pass_at_k"])
def test_every_variant_learns_language(name: str, policy: OnPrefixes) -> None:
    before = float(expected_return(TREE, table(policy).detach()))
    run = iter(composed(name, policy, CompletionSampler(WORLD, 4, 8), learning_rate=0.3, epochs=2))
    for _ in range(8):
        next(run)
    after = float(expected_return(TREE, table(policy).detach()))
    assert after > before + 0.5 * (1.55 - before)  # half the way to the best completion of each prompt


def test_pass_at_k_learns_that_one_of_the_group_is_best(policy: OnPrefixes) -> None:
    """The mean of the group is not what it is for."""

    def best(policy: OnPrefixes) -> float:
        rollout = CompletionSampler(WORLD, 200, 4)(policy)
        return float(rollout.reward.sum(1).view(-1, 4).amax(1).mean())

    before = best(policy)
    run = iter(composed("pass_at_k", policy, CompletionSampler(WORLD, 8, 4), learning_rate=0.3, epochs=2))
    for _ in range(12):
        next(run)
    assert best(policy) > before + 0.5 * (1.55 - before)


def episodes(make: Any, count: int, steps: int) -> tuple[Policy, Sampler]:
    environments = make_environments(make, count)
    policy = Policy(environments.single_observation_space, environments.single_action_space, hidden=(8,))
    return policy, Sampler(environments, steps, seed=0, whole_episodes=True, groups="all")


@every_variant
def test_cartpole_needs_no_new_code(name: str) -> None:
    policy, sample = episodes("CartPole-v1", 4, 30)
    before = parameters(policy)
    whole = reads_rows(options_of(name, "control")())
    rows = [4, 4] if whole else [64, 50]
    options = {"epochs": 2, "minibatch_size": rows[0], "micro_batch": rows[1], "learning_rate": 1e-2}
    run = iter(composed(name, policy, sample, **options))
    metrics = [next(run) for _ in range(2)]
    assert metrics[1]["steps"] > metrics[0]["steps"] > 0
    assert all(torch.as_tensor(x).isfinite() for row in metrics for x in row.values())
    assert (parameters(policy) - before).norm() > 1e-3


@pytest.mark.parametrize(
    "name", [name for name in FAMILY if name not in ("pass_at_k", "maxrl")]
)  # rewards are 1 and -1
def test_where_action_and_observation_matter_each_observation_finds_its_own(name: str) -> None:
    policy, sample = episodes(ActionAndObservationMatter, 32, 2)
    run = iter(composed(name, policy, sample, learning_rate=0.1))
    for _ in range(15):
        next(run)
    for x, action in {-1: 0, 1: 1}.items():
        assert policy(torch.full((1, 1, 1), float(x))).probs[..., action].item() > 0.8


def test_the_credits_are_those_of_the_option() -> None:
    assert get_args(get_type_hints(Options)["credit"]) == CREDITS
    for name in CREDITS:
        with pytest.raises(UserError, match=f"^{name} is a credit and no method: .* and credit {name}$"):
            method_named(name)
