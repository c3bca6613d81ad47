"""Every line of the table of methods: its gradient on and off policy, and one step of its own loop."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.optim import SGD

from policygrad.exact.closed_form import state_value
from policygrad.exact.policies import SoftmaxPolicy
from policygrad.rollout import Rollout
from policygrad.train.compose import WEIGHTS, Learner, compose
from policygrad.train.methods import METHODS
from policygrad.train.options import OF_GROUPS, compares_greedy, compares_groups, options_of
from policygrad.updates import ascend
from policygrad.verify.settings import GROUP, Setting, of_size
from policygrad.verify.statistics import Experience, Moments, Row, Section
from policygrad.verify.tokens import exact_reward_gradient, succeeding
from policygrad.verify.written_out import NoClosedForm, expectation

ALONE = ("none", "greedy", "value", "start_value")  # baselines that look at no other row
ONE_STEP = {"epochs": 1, "minibatch_size": None, "sampling_rounds": 1}  # on the whole rollout, as it was sampled


def method_section(at: Setting) -> Section:
    """The table of them; on control without those that compare the completions of a prompt."""
    rows = []
    for name in METHODS:
        options = options_at(name, at)
        if not compares_groups(options) or at.tokens is not None:
            rows += method_rows(at, options)
    return Section(f"{at.name}, methods", rows, at.on_policy, at.gradient)


def options_at(name: str, at: Setting) -> Any:
    """The method's own options, for one step and with the discount of the world."""
    options = options_of(name, "exact")()
    known = {f.name for f in fields(options)}
    return replace(options, gamma=at.world.gamma, **{name: x for name, x in ONE_STEP.items() if name in known})


def method_rows(at: Setting, options: Any) -> list[Row]:
    """On policy; off policy, if the method reads the ratio; and as it runs. The critic is wrong."""
    exact = None
    if options.credit == "group" and options.group_scale == "mean":  # which is for rewards that are not negative
        at = succeeding(at)
        exact = exact_reward_gradient(at)
    if compares_greedy(options):
        at = with_greedy(at)
    reads_ratio = options.credit == "vtrace" or METHODS[options.method].objective not in ("reinforce", "actor_critic")
    size, rows = _size(options), []
    for off in (False, True) if reads_ratio else (False,):
        experience = of_size(at, options, off, size)
        learner = _composed(at, options, at.table, experience.rollout)
        sampled = learner.sample(at.seen(at.table_old if off else at.table))  # by the policy whose rollout it is
        row = Row(
            f"{options.method}, {'off' if off else 'on'} policy",
            learner.credit,
            learner.objective,
            WEIGHTS[options.weights],
            size,
            one_by_one=getattr(options, "divergence_mask", "none") == "kl",  # torch's KL looks at values
            experience=replace(experience, rollout=sampled),
        )
        rows.append(_expecting(row, options, at, experience, off))
    return [replace(row, exact=exact) for row in (*rows, as_it_runs(at, options))]


def as_it_runs(at: Setting, options: Any) -> Row:
    """What one iteration of the composed method adds to theta, with all batches as its one rollout and a rate of 1.

    Each batch is weighted by its probability, so that the step is the expected step. The update is plain `ascend`.
    """
    at = with_greedy(at) if compares_greedy(options) else at
    size, off = (2 if compares_groups(options) else 1), options.credit == "vtrace"
    experience = at.off_policy if off else at.on_policy
    index, probability = experience.batches(size)
    group = torch.arange(len(index)).repeat_interleave(size)
    table = deepcopy(at.table)
    learner = _composed(at, options, table, replace(experience.rollout.rows(index.flatten()), group=group))

    def weights(mask: Tensor) -> Tensor:
        each = vmap(WEIGHTS[options.weights])(mask.view(*index.shape, -1))
        return (probability[:, None, None] * each).view(mask.shape)

    rates = ((p, 1.0 if p is table.theta else 0.0) for p in learner.objective.parameters())  # a critic stays
    update = ascend(SGD([{"params": [p], "lr": rate} for p, rate in rates]))
    next(iter(learner.loop(learner.sample, learner.credit, learner.objective, update, weights=weights)))
    step = (table.theta - at.table.theta).detach()
    measured = Moments(step, torch.full((len(step),) * 2, torch.nan))
    row = Row(f"{options.method}, as it runs", learner.credit, learner.objective, weights, size, measured=measured)
    return _expecting(row, options, at, experience, off, together=True)


def with_greedy(at: Setting) -> Setting:
    """The same rows, which know what the policy's mode earns from their starts: its expected discounted return there.

    Any number would do that does not depend on what the row did.
    """
    mode = torch.nn.functional.one_hot(at.probs.argmax(1), at.probs.shape[1]).to(at.probs.dtype)
    value = state_value(at.world, mode)

    def known(experience: Experience) -> Experience:
        start = at.states(experience.rollout)[:, 0]
        return replace(experience, rollout=replace(experience.rollout, greedy=value[start]))

    return replace(at, on_policy=known(at.on_policy), off_policy=known(at.off_policy))


def _composed(at: Setting, options: Any, table: SoftmaxPolicy, rollout: Rollout) -> Learner:
    """The method on this policy, with a sampler that returns this rollout."""
    anchor = at.table_ref or at.table_old
    return compose(options, at.seen(table), at.critic(at.wrong_value), lambda _: rollout, lambda: at.seen(anchor))


def _expecting(row: Row, options: Any, at: Setting, experience: Experience, off: bool, together: bool = False) -> Row:
    """The row with what it expects, and why; or as one of which nothing here knows it."""
    why = ", ".join(words for words, holds in _REASONS.items() if holds(options, off, together))
    try:
        expected = expectation(options, at, experience, row.size, at.wrong_value, off_policy=off, together=together)
    except NoClosedForm:
        return replace(row, known=False)
    return replace(row, expected=expected, reason=why)


def _size(options: Any) -> int:
    """Rows of a batch: the fewest in which the method's credit means something."""
    if compares_groups(options):
        return GROUP
    others = options.credit in ("reward_to_go", "trajectory_return") and options.baseline not in ALONE
    return 2 if others or options.normalize_advantages == "batch" else 1


def _bounds(options: Any) -> tuple[str, ...]:
    """The options that bound the method's ratios."""
    if options.credit == "vtrace":
        return ("rho_bar",)
    clipped = getattr(options, "gain", "surrogate") in ("surrogate", "weight")
    return ("token_clip", "dual_clip", *(("clip_low", "clip_high") if clipped else ()))


# Why a method does not expect grad J: what is true of its options.
_REASONS: dict[str, Callable[[Any, bool, bool], bool]] = {
    "no gamma^t": lambda o, off, together: (
        o.gamma < 1 and o.credit != "trajectory_return" and not getattr(o, "discounted", False)
    ),
    "wrong V": lambda o, off, together: o.credit in ("n_step", "gae", "vtrace") and getattr(o, "lam", 0.0) < 1,
    "own return in b": lambda o, off, together: (
        (o.credit == "group" and o.group_baseline == "mean") or getattr(o, "baseline", "none") in OF_GROUPS
    ),
    "of the best": lambda o, off, together: o.credit == "group" and o.group_baseline == "other_best",
    "1/std": lambda o, off, together: (
        o.normalize_advantages == "batch"
        or (together and o.normalize_advantages == "minibatch")
        or (o.credit == "group" and o.group_scale in ("std", "batch"))
    ),
    "1/mean": lambda o, off, together: o.credit == "group" and o.group_scale == "mean",
    "few tokens": lambda o, off, together: getattr(o, "learn_from", "all") == "high_entropy",
    "by covariance": lambda o, off, together: getattr(o, "learn_from", "all") == "low_covariance",
    "by token": lambda o, off, together: o.weights == "token",
    "1/|y|": lambda o, off, together: (
        o.weights == "row" or (o.weights != "episode" and getattr(o, "ratio", "token") == "sequence")
    ),
    "1/T": lambda o, off, together: o.weights == "budget",
    "old states": lambda o, off, together: off,
    "no ratio": lambda o, off, together: off and getattr(o, "gain", "surrogate") == "score",
    "clipped": lambda o, off, together: off and any(getattr(o, name, torch.inf) < torch.inf for name in _bounds(o)),
    "soft clip": lambda o, off, together: off and getattr(o, "gain", "surrogate") in ("sigmoid", "gamma"),
    "masked": lambda o, off, together: (
        off and (getattr(o, "divergence_mask", "none") != "none" or getattr(o, "drift_bound", torch.inf) < torch.inf)
    ),
    "KL to the old": lambda o, off, together: off and getattr(o, "kl_old_coefficient", 0.0) > 0,
}
