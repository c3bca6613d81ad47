"""What a lag costs: each correction where the policy that sampled is some updates older than the one that learns."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from policygrad.exact.closed_form import fisher, mean_kl, visitation
from policygrad.exact.policies import SoftmaxPolicy
from policygrad.verify.settings import GROUP, Setting, listing, options_for, row_of
from policygrad.verify.statistics import Row, Section
from policygrad.verify.tokens import HIGH, INF, LOW, weighed_rows
from policygrad.verify.written_out import expectation

LAGS = (0, 1, 2, 4)
STEP = 0.0005  # nats a decision by which each update moves the policy, to second order

CLIPPED: dict[str, Any] = {"clip_low": LOW, "clip_high": HIGH}
UNCLIPPED: dict[str, Any] = {"clip_low": INF, "clip_high": INF}
SEQUENCE: dict[str, Any] = {"group_baseline": "leave_one_out", "group_scale": "none", "weights": "row"}


def lag_section(start: Setting) -> Section:
    """Every correction at every lag, its rows by correction. Each row estimates grad J of the policy that learns."""
    rows = []
    for lag in LAGS:
        at = lagged(start, lag)
        kl = float(mean_kl(visitation(at.world, at.probs_old, 1.0), at.probs_old, at.probs))
        of_world = control_lag_rows(at) if at.tokens is None else token_lag_rows(at)
        rows.append([replace(r, name=f"{r.name}, lag {lag} (KL {kl:.4f})", exact=at.gradient) for r in of_world])
    return Section(f"{start.name}, lag", [row for same in zip(*rows, strict=True) for row in same], start.on_policy,
                   start.gradient)  # fmt: skip


def lagged(start: Setting, lag: int) -> Setting:
    """The setting after `lag` updates of its policy, which saw none of them when it sampled: `off_policy` is its own.

    An update is theta + alpha grad J(theta), exact, with alpha such that KL(old, new) = alpha^2 g^T F g / 2 is STEP.
    """
    at = start
    for _ in range(lag):
        g, visits = at.gradient, visitation(at.world, at.probs, 1.0)
        alpha = (2 * STEP / (g @ fisher(visits, at.probs, at.scores) @ g)).sqrt()
        table: SoftmaxPolicy = deepcopy(at.table)
        with torch.no_grad():
            table.theta.add_(alpha * g)
        at = replace(at, table=table)
    return replace(at, table_old=start.table, on_policy=listing(at, at.table), off_policy=start.on_policy)


def token_lag_rows(at: Setting) -> list[Row]:
    """Leave-one-out credit in groups with each ratio, or weighed by rollout correction; and V-trace, by token."""

    def row(name: str, reason: str, method: str = "rloo", size: int = GROUP, **values: Any) -> Row:
        made = row_of(at, name, method, at.wrong_value, reason=reason, size=size, off_policy=True, **values)
        options = options_for(at, method, **values)
        expected = expectation(options, at, at.off_policy, size, at.wrong_value, off_policy=True)
        return replace(made, expected=expected)

    unweighed, *weighed = weighed_rows(at, "")
    vtrace: dict[str, Any] = {"method": "off_policy_actor_critic", "size": 1}
    return [
        unweighed,
        row("ratio by token", "its prefixes", **UNCLIPPED),
        row("ratio by token, clipped (PPO)", "its prefixes, ratio clipped", **CLIPPED),
        row("ratio by token, weight clipped (CISPO)", "its prefixes, weights clipped", gain="weight", clip_low=INF,
            clip_high=HIGH),
        row("ratio of the row", "1/|y|, its prefixes, a root of the ratio", "gspo", **SEQUENCE, **UNCLIPPED),
        row("ratio of the row, clipped (GSPO)", "1/|y|, its prefixes, ratio clipped", "gspo", **SEQUENCE, **CLIPPED),
        row("product of ratios", "", ratio="product", weights="row", **UNCLIPPED),
        row("product of ratios, clipped", "ratio clipped", ratio="product", weights="row", **CLIPPED),
        *weighed,
        row("V-trace, wrong critic, ratios at most 1", "its prefixes, ratios clipped", **vtrace),
        row("V-trace, wrong critic, unclipped", "its prefixes", rho_bar=INF, c_bar=INF, **vtrace),
    ]  # fmt: skip


def control_lag_rows(at: Setting) -> list[Row]:
    """GAE with the exact critic, with the ratio and without; and V-trace. All are unbiased without a lag."""

    def row(name: str, reason: str, method: str, **values: Any) -> Row:
        values = {"discounted": True, "lam": 0.9, **values}
        made = row_of(at, name, method, at.value, reason=reason, off_policy=True, **values)
        expected = expectation(options_for(at, method, **values), at, at.off_policy, 1, at.value, off_policy=True)
        return replace(made, expected=expected)

    return [
        row("GAE, not weighed", "its states and actions", "actor_critic"),
        row("GAE, ratio", "its states and what follows", "trpo", normalize_advantages="none"),
        row("GAE, ratio, clipped (PPO)", "its states, ratio clipped", "ppo", **CLIPPED),
        row("V-trace, exact critic, ratios at most 1", "its states, ratios clipped", "off_policy_actor_critic"),
        row("V-trace, exact critic, unclipped", "its states", "off_policy_actor_critic", rho_bar=INF, c_bar=INF),
    ]
