"""Classic bugs of the field, put into the library one at a time: `verify` finds each.

test_command.py holds that it finds none where there is none.
"""

import inspect
from dataclasses import replace
from functools import partial
from types import FunctionType

import pytest
import torch

from policygrad import (
    advantages,
    credit,
    critics,
    divergences,
    linalg,
    objectives,
    ranks,
    returns,
    rollout,
    score,
    updates,
    weights,
)
from policygrad.algorithms.actor_critic import ActorCriticObjective
from policygrad.algorithms.grpo import GRPOObjective
from policygrad.algorithms.ppo import PPOObjective
from policygrad.algorithms.reinforce import ReinforceObjective
from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.control import memory
from policygrad.verify.command import exactly, sections
from policygrad.verify.options import VerifyOptions
from policygrad.verify.statistics import judge, moments
from policygrad.verify.updates import update_checks


def inject(monkeypatch, owner, name, fault):
    """Make a function of the library behave as `fault(original)`, whoever holds it and under whatever name."""
    function = inspect.unwrap(getattr(owner, name))
    original = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    original.__kwdefaults__ = function.__kwdefaults__
    made, code = {}, f"def fault(*x, **o):\n    return _fault_in_{name}(*x, **o)\n"
    if isinstance(getattr(owner, name), ranks.Collective):  # a generator
        original, code = ranks.Collective(original), f"{code}    yield\n"
    exec(code, made)
    monkeypatch.setitem(function.__globals__, f"_fault_in_{name}", fault(original))
    for attribute, x in (("__defaults__", None), ("__kwdefaults__", None), ("__code__", made["fault"].__code__)):
        monkeypatch.setattr(function, attribute, x)


def wrong_rows(world):
    """The rows that are WRONG in a world's tables, one after the other: a fault is found with the first."""
    if world == "updates":
        with exactly():
            yield from (check.name for check in update_checks(0) if not check.holds)
        return
    with exactly():
        for section in sections(VerifyOptions(world=world.partition(",")[0], samples=4_000)):
            if "," in world and section.name != world:
                continue
            for row in section.rows:
                row = replace(row, any_size=False)  # bias only, which is faster
                found = row.measured or moments(row, row.experience or section.experience)
                if judge(section.name, row, found, section.exact, 1_000).verdict == "WRONG":
                    yield f"{section.name}: {row.name}"


def shifted(value, ended):
    """The value after an end is that of the observation after the reset."""
    later = torch.cat([value[:, 2:], value[:, -1:]], 1)
    return torch.cat([value[:, :1], torch.where(ended, later, value[:, 1:])], 1)


def own_mean(rollout, target):
    target = target.where(rollout.mask, 0.0)
    return (target.sum() / rollout.mask.sum()).expand_as(target)


def own_time_mean(rollout, target):
    return target.where(rollout.mask, 0.0).sum(0) / rollout.mask.sum(0).clamp(min=1) + torch.zeros_like(target)


def flat_decisions(f):
    return lambda rollout, *columns, **named: f(replace(rollout, memoryless=True), *columns, **named)


def reset_counts(f):
    def faulty(rollout, weight, advantage, *columns):
        everything = torch.ones_like(rollout.mask)
        return f(replace(rollout, mask=everything), weights.per_episode(everything), advantage, *columns)

    return faulty


def unscaled_minibatches(f):
    def faulty(batch, size, *more):
        count = -(-len(batch.mask) // min(size, len(batch.mask)))
        for part in f(batch, size, *more):
            yield part._replace(weight=part.weight / count)

    return faulty


def negative(f):
    def faulty(self, batch):
        value, metrics = f(self, batch)
        return -value, metrics

    return faulty


def downhill(f):
    def faulty(given, **options):
        for optimizer in given if isinstance(given, list) else [given]:
            for group in optimizer.param_groups:
                group["lr"] *= -1
        return f(given, **options)

    return faulty


def exchanged_clip(f):
    def faulty(self, batch):
        self.clip = self.clip[::-1]
        try:
            return f(self, batch)
        finally:
            self.clip = self.clip[::-1]

    return faulty


def not_restored(f):
    def faulty(**options):
        def update(objective, batch):
            report, parameters = f(**options)(objective, batch), list(objective.parameters())
            if not report["accepted"]:
                linalg.add_to(parameters, parameters, torch.full((sum(p.numel() for p in parameters),), 1e-9))
            return report

        return update

    return faulty


def search_ignored(f):
    def faulty(*, delta, **options):
        return updates.natural_step(step_size=partial(updates.kl_radius, delta=delta), **options)

    return faulty


def big_std(score, group):
    """E[x^2] - E[x]^2, which cancels."""
    same = (group.unsqueeze(1) == group.unsqueeze(0)).to(score.dtype)
    n = same.sum(1)
    mean, square = same @ score / n, same @ score**2 / n
    return ((square - mean**2).clamp(min=0) * n / (n - 1).clamp(min=1)).sqrt()


def row_by_row(f):
    def faulty(x, mask):
        return torch.cat([f(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))])

    return faulty


def upside_down_cg(f):
    return lambda matvec, b, iters=10, tol=1e-10: f(lambda v: matvec(v) + 0.01 * v, b, iters, tol)


def doubled_products(f):
    def faulty(divergence, parameters, *more):
        product = f(divergence, parameters, *more)
        return lambda v: 2 * product(v)

    return faulty


def values_of_holes(f):
    """The successor of a row's last decision is the hole behind it."""
    return lambda self, value: torch.cat([self.of(value[:, :-1]), value[:, -1:]], 1)


FAULTS = {
    # Truncation, termination, reset (pitfalls 1 to 4)
    "truncation taken for termination": (returns, "lambda_return", "random, time limit",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, ended, ended, *x)),
    "the trace runs on past a truncation": (returns, "lambda_return", "random, two cut episodes a row",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, terminated, terminated, *x)),
    "a value beyond a termination": (returns, "lambda_return", "random",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, terminated & False, ended, *x)),
    "bootstrapping from the observation after the reset": (returns, "lambda_return", "random, two cut episodes a row",
        lambda f: lambda r, v, terminated, ended, *x: f(r, shifted(v, ended), terminated, ended, *x)),
    "n-step: truncation taken for termination": (returns, "n_step", "random, time limit",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, ended, ended, *x)),
    "V-trace: the trace runs on past a truncation": (returns, "vtrace", "random, two cut episodes a row",
        lambda f: lambda r, v, terminated, ended, *x: f(r, v, terminated, terminated, *x)),
    "no value where the row stops": (critics, "bootstrap_values", "random, time limit",
        lambda f: lambda critic, seen, *x: f(critic, replace(seen, final_obs=None), *x)),
    "the reset step counts": (rollout, "decisions", "random, two episodes a row", reset_counts),
    # Returns and discounting (pitfall 11)
    "gamma^t dropped": (returns, "discount", "random", lambda f: lambda *x: torch.ones_like(f(*x))),
    "gamma^t left out of the credit": (credit, "discounted", "random", lambda f: lambda assign, gamma: assign),
    "gamma^t not set back by an end": (returns, "discount", "random, two episodes a row",
        lambda f: lambda mask, ended, *x: f(mask, ended & False, *x)),
    "reward-to-go without its own reward": (returns, "reward_to_go", "random",
        lambda f: lambda r, *x, **o: f(r, *x, **o) - r),
    "reward-to-go over an end": (returns, "reward_to_go", "updates",
        lambda f: lambda r, ended, *x, **o: f(r, ended & False, *x, **o)),
    "n-step of n + 1": (returns, "n_step", "random", lambda f: lambda *x: f(*x[:-1], x[-1] + 1)),
    "lambda where gamma lambda belongs": (returns, "lambda_return", "random",
        lambda f: lambda r, v, t, e, gamma, lam: f(r, v, t, e, gamma, lam / gamma)),
    "V-trace without clipping": (returns, "vtrace", "random", lambda f: lambda *x: f(*x[:-2], torch.inf, torch.inf)),
    "V-trace without lambda": (returns, "vtrace", "random", lambda f: lambda *x: f(*x[:6], 1.0, *x[7:])),
    # Holes
    "a hole counted in gamma^t": (returns, "discount", "random, with holes",
        lambda f: lambda mask, ended, *x: f(mask | ~ended, ended, *x)),
    "a critic's 0 or worse at a hole taken for a value": (rollout, "holes_last", "random, with holes",
        lambda f: lambda mask, ended: torch.arange(mask.shape[1]).expand_as(mask)),
    "a hole taken for where the row stops": (credit._Decisions, "values", "random, cut rows with holes",
        values_of_holes),
    "advantages standardized over holes": (advantages, "standardize", "random, methods",
        lambda f: lambda x, mask, *o: f(x, torch.ones_like(mask), *o)),
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
        lambda f: lambda logp, r, a, low, high: torch.maximum(r * a, r.clamp(1 - low, 1 + high) * a)),
    "clip-higher the wrong way round": (objectives, "clipped_surrogate", "random",
        lambda f: lambda logp, r, a, low, high: f(logp, r, a, low=high, high=low)),
    "the bounds of PPO's objective exchanged": (PPOObjective, "forward", "random", exchanged_clip),
    "clipping without the minimum": (objectives, "clipped_surrogate", "random",
        lambda f: lambda logp, r, a, low, high: r.clamp(1 - low, 1 + high) * a),
    "the sign of the step": (updates, "ascend", "random, methods", downhill),
    "the sign of REINFORCE's objective": (ReinforceObjective, "forward", "random", negative),
    "the sign of A2C's objective": (ActorCriticObjective, "forward", "random", negative),
    "the sign of TRPO's objective": (SurrogateObjective, "forward", "random", negative),
    "the sign of PPO's objective": (PPOObjective, "forward", "random", negative),
    "the sign of GRPO's objective": (GRPOObjective, "forward", "tokens", negative),
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
        lambda f: lambda logp, r, a, low, high: f(logp, r, a, low=low, high=torch.inf)),
    "the batch's advantage standardized row by row": (advantages, "standardize", "tokens", row_by_row),
    "the KL of an old policy's tokens, not reweighted": (divergences, "reweighted", "tokens",
        lambda f: lambda p, q, batch, ratio: f(p, q, batch, torch.ones_like(ratio))),
    "the KL's weight with a gradient of its own": (divergences, "reweighted", "tokens",
        lambda f: lambda p, q, batch, ratio: ratio * f(p, q, batch, torch.ones_like(ratio))),
    "KL paid, not charged": (returns, "kl_in_reward", "tokens", lambda f: lambda *x: f(*x[:-1], -x[-1])),
    "groups that see each other": (advantages, "group_mean", "tokens, methods",
        lambda f: lambda score, group: score.mean().expand_as(score)),
    "a deviation that cancels": (advantages, "group_std", "updates", lambda f: big_std),
    "losses normalized by the minibatch": (rollout, "minibatches", "updates", unscaled_minibatches),
    "equal advantages over their deviation": (advantages, "standardize", "updates",
        lambda f: lambda x, mask: (x - x.mean()) / x.std()),
    # Memory
    "a memory that the end of an episode does not empty": (memory.Recurrent, "unrolled",
        "random, GRU, two episodes a row", lambda f: lambda self, x, start, state: f(self, x, start & False, state)),
    "no gradient back in time": (memory.GRU, "step", "random, GRU",
        lambda f: lambda self, x, state: f(self, x, state.detach())),
    "the gates of an LSTM exchanged": (memory.LSTM, "step", "random, LSTM",
        lambda f: lambda self, x, state: f(self, torch.cat([x[:, self.size :], x[:, : self.size]], 1), state)),
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
    owner, function, world, fault = FAULTS[name]
    inject(monkeypatch, owner, function, fault)
    assert next(wrong_rows(world), None) is not None


@pytest.mark.parametrize("name", ["gamma^t dropped", "V-trace without clipping", "no ratio off the policy"])
def test_a_fault_is_found_in_samples(monkeypatch, name):
    owner, function, _, fault = FAULTS[name]
    inject(monkeypatch, owner, function, fault)
    assert next(wrong_rows("cliff"), None) is not None


def test_an_injected_fault_is_taken_out_again(monkeypatch):
    with monkeypatch.context() as inside:
        inject(inside, weights, "per_row", lambda f: lambda mask: 2 * f(mask))
        assert weights.per_row(torch.ones(1, 2).bool()).sum() == 2
    assert weights.per_row(torch.ones(1, 2).bool()).sum() == 1
