"""Credit in conversations: turns of a policy with another's between them, whose answers are random, all listed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from policygrad.advantages import leave_one_out, unit_scale
from policygrad.exact.closed_form import action_value, visitation, weighted_gradient
from policygrad.exact.enumeration import batches, with_turns
from policygrad.exact.expected import gae_credit
from policygrad.exact.worlds import garnet, with_clock
from policygrad.rollout import Rollout
from policygrad.turns import bootstrapped_by_turn, grouped_by_state
from policygrad.verify.control import LEANS
from policygrad.verify.settings import Setting, listed, row_of
from policygrad.verify.statistics import Experience, Row, Section, unordered

LAM = 0.9


def conversation_sections(seed: int) -> Iterator[tuple[Setting, Section]]:
    """Turns of one decision and of two. Nothing is discounted, so that turns discount as their decisions do."""
    for decisions, steps in ((1, 2), (2, 3)):
        world = with_clock(garnet(3, 2, 2, gamma=1.0, termination=0.2, seed=seed), steps)
        at = _as_conversations(listed(f"conversations, turns of {decisions}", world, steps, seed), decisions)
        rows = [*turn_rows(at), *group_rows(at)] + (single_rows(at) if decisions == 1 else [])
        yield at, Section(at.name, rows, at.on_policy, at.gradient)


def turn_rows(at: Setting) -> list[Row]:
    """GAE from decision to decision, and from turn to turn, whose advantage all decisions of a turn have."""
    exact, wrong = at.critic(at.value), at.critic(at.wrong_value)
    return [
        row_of(at, "REINFORCE, no baseline", "reinforce", baseline="none"),
        row_of(at, f"GAE({LAM}) by decision, exact critic", "actor_critic", at.value, lam=LAM),
        replace(
            row_of(at, f"GAE({LAM}) by turn, exact critic", "actor_critic", at.value,
                   assign=bootstrapped_by_turn(exact, gamma=1.0, lam=LAM)), one_by_one=True),
        replace(
            row_of(at, "GAE(1) by turn, wrong critic", "actor_critic", at.wrong_value,
                   assign=bootstrapped_by_turn(wrong, gamma=1.0, lam=1.0)), one_by_one=True),
    ]  # fmt: skip


def group_rows(at: Setting) -> list[Row]:
    """Pairs of conversations with one beginning."""
    return [replace(row_of(at, "leave-one-out (RLOO)", "rloo", size=2), one_by_one=True)]


def single_rows(at: Setting) -> list[Row]:
    """Where a turn is one decision, what is biased is known in closed form."""
    probs, wrong = at.probs, at.wrong_value
    visits = visitation(at.world, probs, 1.0)
    leans = weighted_gradient(visits, probs, gae_credit(at.world, probs, value=wrong, lam=LAM), at.scores)
    # The other conversation begins where this one does, and meets a state at most once, for time is part of it.
    again = torch.zeros_like(visits)
    for start in at.world.start.nonzero().flatten().tolist():
        there = replace(at.world, start=torch.eye(len(visits))[start])
        again = again + at.world.start[start] * visitation(there, probs, 1.0) ** 2
    local = weighted_gradient(again, probs, action_value(at.world, probs), at.scores)
    by_turn = bootstrapped_by_turn(at.critic(wrong), gamma=1.0, lam=LAM)
    by_state = grouped_by_state(leave_one_out, unit_scale, gamma=1.0)
    rows = [
        row_of(at, f"GAE({LAM}) by turn, wrong critic", "actor_critic", wrong, assign=by_turn, expected=leans,
               reason=LEANS),
        row_of(at, "leave-one-out, and of the state (GiGPO)", "rloo", assign=by_state, size=2,
               expected=at.gradient + local, reason="states that are met again weigh more"),
    ]  # fmt: skip
    return [replace(row, one_by_one=True) for row in rows]


def _as_conversations(at: Setting, decisions: int) -> Setting:
    """The same episodes with another's turn after every `decisions` decisions; those with one start are a group."""

    def changed(experience: Experience) -> Experience:
        rollout: Rollout = with_turns(experience.rollout, decisions)
        begun, (_, alone) = rollout.obs[:, 0], experience.batches(1)
        share = torch.zeros(len(at.world.start)).index_add(0, begun, alone)

        def of_one_start(size: int) -> tuple[Tensor, Tensor]:
            index, probability = batches(alone, size)
            first = begun[index]
            same = (first == first[:, :1]).all(1)
            return unordered(index[same], (probability / share[first[:, 0]] ** (size - 1))[same])

        return Experience(replace(rollout, group=begun), of_one_start)

    return replace(at, on_policy=changed(at.on_policy), off_policy=changed(at.off_policy))
