"""Classic bugs of the field, put into the library one at a time: `verify` finds each, and none where there is none."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from policygrad import advantages, critics, divergences, linalg, objectives, returns, rollout, score, updates, weights
from policygrad.runs.verify.command import sections
from policygrad.runs.verify.options import VerifyOptions
from policygrad.runs.verify.statistics import judge, moments
from policygrad.runs.verify.updates import update_checks


def inject(monkeypatch, module, name, fault):
    """Put `fault(original)` wherever the library holds the original."""
    original = getattr(module, name)
    faulty = fault(original)
    for loaded in [m for n, m in sys.modules.items() if n.startswith("policygrad")]:
        for key, value in list(vars(loaded).items()):
            if value is original:
                monkeypatch.setattr(loaded, key, faulty)


def wrong_rows(world):
    """The rows that are WRONG in a world's tables, one after the other: a fault is found with the first."""
    if world == "updates":
        yield from (check.name for check in update_checks(0) if not check.holds)
        return
    for section in sections(VerifyOptions(world=world, samples=4_000)):
        yield from _wrong(section, section.measured)
        for row in section.rows:
            experience = row.experience or (section.off_policy if row.off_policy else section.on_policy)
            found = moments(section.policy, replace(row, any_rows=False), experience)  # bias only, which is faster
            yield from _wrong(section, [(row, found)])


def _wrong(section, measured):
    found = [judge(section.world, row, m, section.exact, 1_000) for row, m in measured]
    return [f"{f.world}: {f.name}" for f in found if f.verdict == "WRONG"]


def shifted(value, ended):
    """The value after an end is that of the observation after the reset."""
    later = torch.cat([value[:, 2:], value[:, -1:]], 1)
    return torch.cat([value[:, :1], torch.where(ended, later, value[:, 1:])], 1)


def own_mean(rollout, target):
    target = target.where(rollout.mask, 0.0)
    return (target.sum() / rollout.mask.sum()).expand_as(target)


def own_time_mean(rollout, target):
    return target.where(rollout.mask, 0.0).sum(0) / rollout.mask.sum(0).clamp(min=1) + torch.zeros_like(target)


def flat_decisions(original):
    return lambda rollout, *columns, **named: original(replace(rollout, memoryless=True), *columns, **named)


def reset_counts(original):
    def faulty(rollout, weight, advantage, *columns):
        everything = torch.ones_like(rollout.mask)
        return original(replace(rollout, mask=everything), weights.per_episode(everything), advantage, *columns)

    return faulty


def unscaled_minibatches(original):
    def faulty(batch, size, epochs=1):
        count = -(-len(batch.mask) // min(size, len(batch.mask)))
        for part in original(batch, size, epochs):
            yield part._replace(weight=part.weight / count)

    return faulty


def not_restored(original):
    def faulty(objective, divergence, batch, parameters, **options):
        report = original(objective, divergence, batch, parameters, **options)
        if not report["accepted"]:
            linalg.add_to(parameters, parameters, torch.full((sum(p.numel() for p in parameters),), 1e-9))
        return report

    return faulty


def search_ignored(original):
    def faulty(*arguments, delta, **options):
        return updates.natural_step(*arguments, step_size=partial(updates.kl_radius, delta=delta), **options)

    return faulty


def big_std(score, group):
    """E[x^2] - E[x]^2, which cancels."""
    same = (group.unsqueeze(1) == group.unsqueeze(0)).to(score.dtype)
    n = same.sum(1)
    mean, square = same @ score / n, same @ score**2 / n
    return ((square - mean**2).clamp(min=0) * n / (n - 1).clamp(min=1)).sqrt()


def everyone_mean(score, group):
    return score.mean().expand_as(score)


def by_row(rollout):
    score = rollout.reward.sum(1, keepdim=True)
    return advantages.standardize(score, score == score).expand_as(rollout.reward)


def upside_down_cg(original):
    def faulty(matvec, b, iters=10, tol=1e-10):
        return original(lambda v: matvec(v) + 0.01 * v, b, iters, tol)

    return faulty


def doubled_products(original):
    def faulty(divergence, parameters, damping=0.0):
        product = original(divergence, parameters, damping)
        return lambda v: 2 * product(v)

    return faulty


FAULTS = {
    # Truncation, termination, reset (pitfalls 1 to 4)
    "truncation taken for termination": (returns, "lambda_return", "random",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, ended, ended, *x)),
    "the trace runs on past a truncation": (returns, "lambda_return", "random",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, terminated, terminated, *x)),
    "a value beyond a termination": (returns, "lambda_return", "random",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, terminated & False, ended, *x)),
    "bootstrapping from the observation after the reset": (returns, "lambda_return", "random",
        lambda f: lambda r, v, terminated, ended, *x: f(r, shifted(v, ended), terminated, ended, *x)),
    "n-step: truncation taken for termination": (returns, "n_step", "random",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, ended, ended, *x)),
    "V-trace: the trace runs on past a truncation": (returns, "vtrace", "random",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, terminated, terminated, *x)),
    "no value where the row stops": (critics, "bootstrap_values", "random",
        lambda f: lambda critic, seen, *x: f(critic, replace(seen, final_obs=None), *x)),
    "the reset step counts": (rollout, "decisions", "random", reset_counts),
    # Returns and discounting (pitfall 11)
    "gamma^t dropped": (returns, "discount", "random", lambda f: lambda *x: torch.ones_like(f(*x))),
    "gamma^t not set back by an end": (returns, "discount", "random",
        lambda f: lambda mask, ended, gamma: f(mask, ended & False, gamma)),
    "reward-to-go without its own reward": (returns, "reward_to_go", "random",
        lambda f: lambda r, *x: f(r, *x) - r),
    "reward-to-go over an end": (returns, "reward_to_go", "updates",
        lambda f: lambda r, ended, *x: f(r, ended & False, *x)),
    "n-step of n + 1": (returns, "n_step", "random", lambda f: lambda *x: f(*x[:-1], x[-1] + 1)),
    "lambda where gamma lambda belongs": (returns, "lambda_return", "random",
        lambda f: lambda r, v, t, e, gamma, lam: f(r, v, t, e, gamma, lam / gamma)),
    "V-trace without clipping": (returns, "vtrace", "random", lambda f: lambda *x: f(*x[:-2], torch.inf, torch.inf)),
    "V-trace without lambda": (returns, "vtrace", "random",
        lambda f: lambda *x: f(*x[:6], 1.0, *x[7:])),
    # Baselines that know the action (pitfall 13)
    "the mean baseline has its own return in it": (advantages, "mean_baseline", "random", lambda f: own_mean),
    "the time-mean baseline has its own return in it": (advantages, "time_mean_baseline", "random",
        lambda f: own_time_mean),
    "the optimal baseline has its own score in it": (advantages, "optimal_constant_baseline", "random",
        lambda f: lambda x, z: (x.sum() / z.sum()).expand_as(x)),
    # Ratios and objectives
    "the ratio upside down": (score, "token_ratio", "random", lambda f: lambda new, old, mask: f(old, new, mask)),
    "no ratio off the policy": (score, "token_ratio", "random", lambda f: lambda new, old, mask: f(new, new, mask)),
    "the clipped objective's maximum": (objectives, "clipped_surrogate", "random",
        lambda f: lambda r, a, low, high: torch.maximum(r * a, r.clamp(1 - low, 1 + high) * a)),
    "clip-higher the wrong way round": (objectives, "clipped_surrogate", "random",
        lambda f: lambda r, a, low, high: f(r, a, high, low)),
    "clipping without the minimum": (objectives, "clipped_surrogate", "random",
        lambda f: lambda r, a, low, high: r.clamp(1 - low, 1 + high) * a),
    "the sign of the step": (updates, "ascend", "random",
        lambda f: lambda objective, *x, **o: f(lambda b: (-objective(b)[0], objective(b)[1]), *x, **o)),
    # Language (pitfalls 15 to 18)
    "a step out of its row": (rollout, "decisions", "tokens", flat_decisions),
    "mean by row over the padding": (weights, "per_row", "tokens",
        lambda f: lambda mask: mask.to(torch.float64) / mask.numel()),
    "leave-one-out over n": (advantages, "leave_one_out", "tokens",
        lambda f: lambda x, g: f(x, g) * (len(x) - 1) / len(x)),
    "the group's deviation over n": (advantages, "group_std", "tokens",
        lambda f: lambda x, g: f(x, g) * ((len(x) - 1) / len(x)) ** 0.5),
    "the sequence ratio without its root": (score, "sequence_ratio", "tokens",
        lambda f: lambda new, old, mask: (new - old).where(mask, 0.0).sum(1, keepdim=True).exp()),
    "k3 the other way round": (divergences, "k3", "tokens", lambda f: lambda p, q: f(q, p)),
    "k2 without its half": (divergences, "k2", "tokens", lambda f: lambda p, q: 2 * f(p, q)),
    "k3 in the place of k1": (divergences, "k1", "tokens", lambda f: divergences.k3),
    "Dr. GRPO over the tokens there are": (weights, "per_budget", "tokens", lambda f: weights.per_token),
    "the clipped weight with a gradient of its own": (objectives, "clipped_weight", "tokens",
        lambda f: lambda logp, r, a, low, high: r.clamp(1 - low, 1 + high) * a * logp),
    "the bound of the weight left out": (objectives, "clipped_weight", "tokens",
        lambda f: lambda logp, r, a, low, high: f(logp, r, a, low, torch.inf)),
    "the batch's advantage standardised by row": (advantages, "batch_advantage", "tokens", lambda f: by_row),
    "the KL of an old policy's tokens, not reweighted": (divergences, "reweighted", "tokens",
        lambda f: lambda p, q, batch, ratio: f(p, q, batch, torch.ones_like(ratio))),
    "the KL's weight with a gradient of its own": (divergences, "reweighted", "tokens",
        lambda f: lambda p, q, batch, ratio: ratio * f(p, q, batch, torch.ones_like(ratio))),
    "KL paid, not charged": (returns, "kl_in_reward", "tokens", lambda f: lambda *x: f(*x[:-1], -x[-1])),
    "groups that see each other": (advantages, "group_mean", "updates", lambda f: everyone_mean),
    "a deviation that cancels": (advantages, "group_std", "updates", lambda f: big_std),
    "losses normalised by the minibatch": (rollout, "minibatches", "updates", unscaled_minibatches),
    "equal advantages over their deviation": (advantages, "standardize", "updates",
        lambda f: lambda x, mask, epsilon=0.0: (x - x.mean()) / x.std()),
    # Updates (pitfalls 5 to 7)
    "parameters not restored": (updates, "trust_region_step", "updates", not_restored),
    "the line search ignored": (updates, "trust_region_step", "updates", search_ignored),
    "KL from new to old": (divergences, "kl", "updates", lambda f: lambda p, q: f(q, p)),
    "the radius without its 2": (updates, "kl_radius", "updates",
        lambda f: lambda slope, *, delta: (delta / slope).sqrt()),
    "damping that was not asked for": (linalg, "conjugate_gradient", "updates", upside_down_cg),
    "a Fisher matrix twice too large": (linalg, "fisher_vector_product", "updates", doubled_products),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(monkeypatch, name):
    module, function, world, fault = FAULTS[name]
    inject(monkeypatch, module, function, fault)
    assert next(wrong_rows(world), None) is not None


@pytest.mark.parametrize("world", ["random", "tokens", "updates"])
def test_no_fault_is_found_where_there_is_none(world):
    assert list(wrong_rows(world)) == []


@pytest.mark.parametrize("name", ["gamma^t dropped", "V-trace without clipping", "no ratio off the policy"])
def test_a_fault_is_found_in_samples(monkeypatch, name):
    module, function, _, fault = FAULTS[name]
    inject(monkeypatch, module, function, fault)
    assert next(wrong_rows("cliff"), None) is not None


def test_there_are_more_than_fifteen():
    assert len(FAULTS) >= 15
