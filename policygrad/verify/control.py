"""The estimators of control, each as a method's options make it, and what it expects in closed form.

Every row estimates grad J of the discounted J.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policygrad.credit import Credit
from policygrad.exact.closed_form import action_value, advantage, ratio, visitation, weighted_gradient
from policygrad.exact.expected import gae_credit, n_step_credit, td_credit, vtrace_credit
from policygrad.exact.policies import tabular
from policygrad.exact.worlds import World, garnet, termination, with_clock
from policygrad.rollout import Rollout
from policygrad.verify.settings import Setting, holed, in_pairs, listed, row_of, setting_of
from policygrad.verify.statistics import Row, Section

CLIP: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.2}  # two numbers, so that an exchange shows

LEANS = "leans on the critic"
TWICE = "gamma^t counted twice"
NO_DISCOUNT = "gamma^t dropped (Nota & Thomas)"
OLD_STATES = "states of the old policy (Degris)"
CLIPPED = "old states, ratio clipped"


def no_credit(rollout: Rollout) -> Credit:
    """Nothing, so that an objective's other terms stand alone."""
    nothing = torch.zeros_like(rollout.reward)
    return Credit(nothing, nothing, nothing)


def reinforce_rows(at: Setting) -> list[Row]:
    """REINFORCE: whole return or reward-to-go, each baseline, with and without gamma^t."""
    gamma, value, q = at.world.gamma, at.value, action_value(at.world, at.probs)

    def follows(rate: float) -> Tensor:
        return weighted_gradient(visitation(at.world, at.probs, rate), at.probs, q, at.scores)

    def row(name: str, baseline: str = "none", critic: Tensor | None = None, **given: Any) -> Row:
        size = 1 if baseline in ("none", "value") else 2
        options: dict[str, Any] = {"credit": "reward_to_go", "baseline": baseline, "discounted": True}
        made = row_of(at, f"REINFORCE, {name}", "reinforce", critic, size=size, **(options | given))
        return replace(made, any_size=size > 1)

    whole: dict[str, Any] = {"credit": "trajectory_return", "discounted": False}
    dropped: dict[str, Any] = {"discounted": False, "expected": follows(1.0), "reason": NO_DISCOUNT}
    return [
        row("whole return", **whole),
        row("whole return, mean baseline", "mean", **whole),
        row("whole return, optimal baseline", "optimal", **whole),
        row("whole return, with gamma^t", credit="trajectory_return", expected=follows(gamma**2), reason=TWICE),
        row("reward-to-go"),
        row("reward-to-go, mean baseline", "mean"),
        row("reward-to-go, time-mean baseline", "time_mean"),
        row("reward-to-go, optimal baseline", "optimal"),
        row("reward-to-go, baseline V", "value", value),
        row("reward-to-go, wrong baseline", "value", at.wrong_value),
        row("reward-to-go, without gamma^t", **dropped),
        row("reward-to-go, V, without gamma^t", "value", value, **dropped),
        row("reward-to-go, mean, without gamma^t", "mean", **dropped),
    ]


def actor_critic_rows(at: Setting) -> list[Row]:
    """A2C: TD(1), n-step, TD(lambda) and GAE, each with an exact, a zero and a wrong critic."""
    world, probs, value = at.world, at.probs, at.value
    visits = visitation(world, probs, world.gamma, at.horizon)
    critics = {"exact": value, "zero": torch.zeros_like(value), "wrong": at.wrong_value}
    kinds: dict[str, tuple[dict[str, Any], Any]] = {
        "TD(1)": ({"credit": "monte_carlo"}, partial(gae_credit, lam=1.0)),
        "1-step": ({"credit": "n_step", "n": 1}, lambda world, probs, value: td_credit(world, value)),
        "2-step": ({"credit": "n_step", "n": 2}, partial(n_step_credit, n=2)),
        "TD(0.5)": ({"credit": "gae", "lam": 0.5}, partial(gae_credit, lam=0.5)),
        "GAE(0.9)": ({"credit": "gae", "lam": 0.9}, partial(gae_credit, lam=0.9)),
    }
    row = partial(row_of, at, method="actor_critic")
    table = []
    for kind, (options, credit) in kinds.items():
        for name, v in critics.items():
            if at.horizon is not None and name != "exact":
                continue  # where a time limit cuts, the closed forms hold for the exact critic only
            expected = weighted_gradient(visits, probs, credit(world, probs, value=v), at.scores)
            options = options | {"discounted": True, "expected": expected, "reason": LEANS}
            table.append(row(f"A2C, {kind}, {name} critic", critic=v, **options))
    visits = visitation(world, probs, 1.0, at.horizon)
    expected = weighted_gradient(visits, probs, advantage(world, probs), at.scores)
    last = row("A2C, GAE(0.9), exact, without gamma^t", critic=value, lam=0.9, expected=expected, reason=NO_DISCOUNT)
    return [*table, last]


def vtrace_rows(at: Setting) -> list[Row]:
    """V-trace on and off the policy, clipped and not, with an exact and a wrong critic."""
    world, probs, value, wrong = at.world, at.probs, at.value, at.wrong_value
    table = []
    for name, off, critic, lam, bar in [
        ("on-policy, exact critic", False, value, 1.0, 1.0),
        ("on-policy, wrong critic", False, wrong, 1.0, 1.0),
        ("on-policy, lambda 0.9, wrong critic", False, wrong, 0.9, 1.0),
        ("off-policy, unclipped, wrong critic", True, wrong, 1.0, torch.inf),
        ("off-policy, exact critic", True, value, 1.0, 1.0),
        ("off-policy, lambda 0.9, wrong critic", True, wrong, 0.9, 1.0),
    ]:
        if at.horizon is not None and (off or critic is wrong):
            continue
        sampled = at.probs_old if off else probs
        options: dict[str, Any] = {"lam": lam, "rho_bar": bar, "c_bar": bar}
        credit = vtrace_credit(world, probs, sampled, critic, **options)
        expected = weighted_gradient(visitation(world, sampled, world.gamma, at.horizon), sampled, credit, at.scores)
        options |= {"discounted": True, "expected": expected, "off_policy": off}
        options["reason"] = LEANS if not off else OLD_STATES if bar > 1 else "old states, ratios clipped"
        table.append(row_of(at, f"V-trace, {name}", "off_policy_actor_critic", critic, **options))
    return table


def surrogate_rows(at: Setting) -> list[Row]:
    """The surrogates of TRPO, PPO and CISPO at the old policy, where all agree, and away from it; PPO's KL penalty."""
    world, probs, probs_old = at.world, at.probs, at.probs_old
    r, (low, high) = ratio(probs, probs_old), CLIP.values()
    # min(r A, clip(r) A) has the gradient r A grad log pi, and none where r is out of bounds in the direction that A
    # rewards. A is here the TD error, whose sign depends on the successor, so the mean is over successors too.
    value_old = action_value(world, probs_old).mul(probs_old).sum(1)
    delta, chance = _td_errors(world, value_old)
    stopped = ((delta > 0) & (r > 1 + high)[..., None]) | ((delta < 0) & (r < 1 - low)[..., None])
    kept, td = (chance * delta.where(~stopped, 0.0)).sum(-1), (chance * delta).sum(-1)
    away = partial(weighted_gradient, visitation(world, probs_old, world.gamma), probs_old, score=at.scores)
    kinds: dict[str, tuple[str, dict[str, Any], Tensor, str]] = {
        "surrogate": ("trpo", {"normalize_advantages": "none"}, away(credit=r * td), OLD_STATES),
        "clipped surrogate": ("ppo", CLIP, away(credit=r * kept), CLIPPED),
        "clipped weight (CISPO)": ("cispo", {"credit": "gae", **CLIP}, away(credit=r.clamp(1 - low, 1 + high) * td),
                                   CLIPPED),
    }  # fmt: skip
    table = []
    for off in (False, True):
        where = "away from the old policy" if off else "at the old policy"
        for name, (method, options, expected, reason) in kinds.items():
            about: dict[str, Any] = {"expected": expected, "reason": reason, "off_policy": True} if off else {}
            critic = value_old if off else at.value
            table.append(row_of(at, f"{name}, {where}", method, critic, lam=0.0, discounted=True, **(options | about)))
    # sum_s eta(s) grad KL(old, pi)(s) = -sum_s eta(s) sum_a old(a|s) grad log pi(a|s); eta counts visits, undiscounted.
    toward_old = weighted_gradient(visitation(world, probs_old, 1.0), probs_old, torch.ones_like(probs), at.scores)
    unclipped: dict[str, Any] = {"clip_low": torch.inf, "clip_high": torch.inf, "kl_old_coefficient": 1.0}
    penalty = row_of(
        at, "KL penalty k3(old, new) of PPO", "ppo", at.value, assign=no_credit, off_policy=True, **unclipped
    )
    return [*table, replace(penalty, exact=toward_old, of="-grad KL(old, new)")]


def _td_errors(world: World, value: Tensor) -> tuple[Tensor, Tensor]:
    """delta of each (s, a, successor), the end last, and the successor's probability: both [S, A, S + 1]."""
    successors = torch.cat([value, torch.zeros(1)])
    delta = world.reward.unsqueeze(-1) + world.gamma * successors - value[:, None, None]
    return delta, torch.cat([world.transition, termination(world).unsqueeze(-1)], -1)


def control_rows(at: Setting) -> list[Row]:
    """Every estimator of control."""
    return [*reinforce_rows(at), *actor_critic_rows(at), *vtrace_rows(at), *surrogate_rows(at)]


def bootstrapped_rows(at: Setting) -> list[Row]:
    """Those that know what to do where an episode is cut."""
    return [*actor_critic_rows(at), *vtrace_rows(at)]


# The same in rows that are harder to read: cut by a time limit, of two episodes, with holes


def harder_sections(seed: int) -> Iterator[tuple[Setting, Section]]:
    """Rows that expect the same whatever stands between and behind their decisions.

    A time limit cuts a world without end: what was seen is to be credited with what would have come. There the exact
    gradient is that of the steps before the limit, with the whole Q.
    """
    whole = setting_of("random", 0, seed)
    cut = listed("random, time limit", garnet(seed=seed), 3, seed, cut=True)
    visits = visitation(cut.world, cut.probs, cut.world.gamma, cut.horizon)
    cut_gradient = weighted_gradient(visits, cut.probs, action_value(cut.world, cut.probs), cut.scores)
    yield cut, Section(cut.name, bootstrapped_rows(cut), cut.on_policy, cut_gradient)
    pairs = in_pairs(cut, "random, two cut episodes a row")
    yield pairs, Section(pairs.name, doubled(bootstrapped_rows(pairs)), pairs.on_policy, 2 * cut_gradient)
    pairs = in_pairs(whole, "random, two episodes a row")
    alone = [row for row in (*reinforce_rows(pairs), *bootstrapped_rows(pairs)) if row.size == 1]
    alone = [row for row in alone if row.experience is pairs.on_policy]
    yield pairs, Section(pairs.name, doubled(alone), pairs.on_policy, 2 * whole.gradient)
    holes = holed(whole, "random, with holes")
    silent = holed(whole, "random, with holes", hole=-1)  # where the critics below have a 0 behind their last state
    rows = control_rows(holes) + [replace(row, name=f"{row.name}, 0 in holes") for row in _zero_rows(silent)]
    yield holes, Section(holes.name, rows, holes.on_policy, whole.gradient)
    holes = holed(cut, "random, cut rows with holes", open_end=True)
    yield holes, Section(holes.name, bootstrapped_rows(holes), holes.on_policy, cut_gradient)
    for at in (forbidding(seed), hiding(seed)):
        yield at, Section(at.name, control_rows(at), at.on_policy, at.gradient)


def forbidding(seed: int) -> Setting:
    """A world of three actions, of which each state forbids another one."""
    world, steps = garnet(3, 3, 2, termination=0.1, seed=seed), 3
    allowed = (~torch.eye(3, dtype=torch.bool)).repeat(steps, 1)
    return listed("random, forbidden actions", with_clock(world, steps), steps, seed, allowed=allowed)


def hiding(seed: int) -> Setting:
    """A world whose first two states look the same to the policy, at all times: its state is hidden."""
    world, steps = garnet(3, 2, 2, termination=0.1, seed=seed), 3
    seen = tabular(2, 2)[torch.tensor([0, 0, 1])].repeat(steps, 1, 1)
    return listed("random, hidden states", with_clock(world, steps), steps, seed, features=seen)


def _zero_rows(at: Setting) -> list[Row]:
    """Critics that are right at every state and 0 at a hole: what stands there is no value."""
    table = torch.cat([at.value, torch.zeros(1)])
    row = partial(row_of, at, critic=table, discounted=True)
    return [
        row("REINFORCE, reward-to-go, baseline V", "reinforce"),
        row("A2C, 2-step, exact critic", "actor_critic", credit="n_step", n=2),
        row("A2C, GAE(0.9), exact critic", "actor_critic", lam=0.9),
        row("V-trace, on-policy, exact critic", "off_policy_actor_critic"),
    ]


def doubled(rows: list[Row]) -> list[Row]:
    """The same rows, of two episodes each."""
    return [replace(row, expected=None if row.expected is None else 2 * row.expected) for row in rows]
