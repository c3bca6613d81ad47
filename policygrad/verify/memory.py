"""Policies with memory on a world with hidden states: the estimators of control, on rows that are not cut into steps.

The exact gradient is that of J over all histories. What the policy does after each of them is computed a second time,
one step after the other by torch's own cells; the rows run `control.Policy` on whole rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn

from policygrad.control.memory import Rows
from policygrad.control.policies import Policy
from policygrad.exact.closed_form import action_value, visitation, weighted_gradient
from policygrad.exact.enumeration import trajectories
from policygrad.exact.policies import TabularCritic
from policygrad.exact.worlds import garnet, with_history
from policygrad.rollout import Rollout, state_size
from policygrad.verify.control import control_rows, doubled, surrogate_rows
from policygrad.verify.settings import Setting, in_pairs, row_of
from policygrad.verify.statistics import Experience, Row, Section, enumerated

LOOK = torch.tensor([0, 0, 1])  # what the three states look like: the first two the same
STEPS, SIZE = 3, 2


def memory_sections(seed: int) -> Iterator[tuple[Setting, Section]]:
    """GRU and LSTM: rows of one episode, of two, and cut into pieces before which the memory is given."""
    for kind, rows in (("gru", control_rows), ("lstm", surrogate_rows)):
        at = remembering(kind, seed)
        yield at, Section(at.name, [*rows(at), piece_row(at)], at.on_policy, at.gradient)
        pairs = two_episodes(at)
        alone = [
            row_of(pairs, "REINFORCE, reward-to-go", "reinforce", baseline="none", discounted=True),
            row_of(pairs, "A2C, GAE(0.9), exact critic", "actor_critic", at.value, lam=0.9, discounted=True),
        ]
        yield pairs, Section(pairs.name, doubled(alone), pairs.on_policy, 2 * at.gradient)


@dataclass(frozen=True)
class Remembering(Setting):
    """A setting whose policy has a memory, and whose world's states are histories."""

    table: Any  # control.Policy
    table_old: Any
    histories: Tensor = field(kw_only=True)  # [S, T] what was seen up to and in each state, then -1

    @cached_property
    def probs(self) -> Tensor:
        """pi(a|history) as a table [S, A]."""
        return after_histories(self.table, self.histories).detach()

    @cached_property
    def probs_old(self) -> Tensor:
        """That of the older policy."""
        return after_histories(self.table_old, self.histories).detach()

    @cached_property
    def scores(self) -> Tensor:
        """grad log pi(a|history) [S, A, N], through all steps of the history."""
        return score_rows(self.table, after_histories(self.table, self.histories))

    def critic(self, value: Tensor) -> nn.Module:
        """A critic that knows the state of the world."""
        return _OnRows(TabularCritic(value))

    def states(self, rollout: Rollout) -> Tensor:
        """The state of the world at every step [B, T]."""
        return rollout.obs.obs


def remembering(kind: str, seed: int) -> Remembering:
    """Three states, two of which look the same, and three steps; the policy has a memory of that kind."""
    world, histories = with_history(garnet(3, 2, 2, termination=0.1, seed=seed), LOOK, STEPS)
    policy, old = policies(kind, histories, world.reward.shape[1], seed)

    def all_of(policy: Policy) -> Experience:
        rollout, probability = trajectories(world, after_histories(policy, histories), STEPS)
        return enumerated(as_rows(rollout, policy), probability)

    name = f"random, {kind.upper()}"
    return Remembering(name, world, policy, old, all_of(policy), all_of(old), histories=histories)


def two_episodes(at: Remembering) -> Setting:
    """Rows of two episodes: the memory is empty where the second one starts."""
    rollout = at.on_policy.rollout
    plain = replace(at, on_policy=replace(at.on_policy, rollout=replace(rollout, obs=rollout.obs.obs)))
    pairs = in_pairs(plain, f"{at.name}, two episodes a row")
    return replace(pairs, on_policy=replace(pairs.on_policy, rollout=as_rows(pairs.on_policy.rollout, at.table)))


def policies(kind: str, histories: Tensor, actions: int, seed: int) -> tuple[Policy, Policy]:
    """A policy with preferences, and one far enough away that ratios are clipped on both sides."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        policy = Policy(
            spaces.Discrete(len(histories)), spaces.Discrete(actions), encoder=_Look(histories), memory=kind,
            memory_size=SIZE, hidden=(),
        )  # fmt: skip
        made.append(policy)
    with torch.no_grad():
        for p, old in zip(*(x.parameters() for x in made), strict=True):
            theta, away = torch.randn(2, *p.shape, generator=generator)
            p.copy_(theta)
            old.copy_(theta + 0.4 * away)
    return made[0], made[1]


def as_rows(rollout: Rollout, policy: Policy, pieces: int = 1) -> Rollout:
    """The same rows for a policy with memory. pieces: how many each is cut into, with the policy's memory before each.

    An episode starts with the row, and after a step on which the environment resets.
    """
    obs = rollout.obs.obs if isinstance(rollout.obs, Rows) else rollout.obs
    begins = (rollout.ended & ~rollout.mask)[:, :-1]
    start = torch.cat([torch.ones_like(begins[:, :1]), begins], 1)
    state, states = torch.zeros(len(obs), state_size(policy)), []
    for x, starts in zip(obs.chunk(pieces, 1), start.chunk(pieces, 1), strict=True):
        states.append(state)
        state = policy.unrolled(Rows(x, starts, state.unsqueeze(1), state[:, None, :0]))[1].detach()
    rows = Rows(obs, start, torch.stack(states, 1), torch.zeros(len(obs), pieces, 0))
    return replace(rollout, obs=rows, final_obs=None, memoryless=False, pieces=pieces)  # the world ends every row


def piece_row(at: Remembering) -> Row:
    """Rows cut into single steps: no gradient reaches back over a cut, so it is that of the last step alone."""
    rollout = as_rows(at.on_policy.rollout, at.table, pieces=STEPS)
    last = score_rows(at.table, after_histories(at.table, at.histories, through_time=False))
    visits = visitation(at.world, at.probs, at.world.gamma)
    expected = weighted_gradient(visits, at.probs, action_value(at.world, at.probs), last)
    row = row_of(at, "REINFORCE, reward-to-go, in pieces", "reinforce", baseline="none", discounted=True,
                 expected=expected, reason="no gradient to earlier pieces")  # fmt: skip
    return replace(row, one_by_one=True, experience=replace(at.on_policy, rollout=rollout))


def after_histories(policy: Policy, histories: Tensor, through_time: bool = True) -> Tensor:
    """pi(a|history) [S, A] by torch's own cells, step by step, differentiable in the policy's parameters.

    through_time: else what the memory held before the last step is taken as given.
    """
    memory: Any = policy.memory
    layer = memory.layer
    weights = [layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0]
    h = c = torch.zeros(len(histories), layer.hidden_size)
    for t in range(histories.shape[1]):
        seen = histories[:, t : t + 1] >= 0
        looks = torch.eye(int(histories.max()) + 1)[histories[:, t].clamp(min=0)]
        past = (h, c) if through_time else (h.detach(), c.detach())
        if isinstance(layer, nn.GRU):
            new = torch.gru_cell(looks, past[0], *weights), c
        else:
            new = torch.lstm_cell(looks, past, *weights)
        h, c = (torch.where(seen, after, before) for after, before in zip(new, (h, c), strict=True))
    output: Any = policy.network
    return output(h).softmax(-1)


def score_rows(policy: Policy, probs: Tensor) -> Tensor:
    """grad log probs [S, A, N] in the policy's parameters, one number after the other."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    rows = []
    for logp in probs.log().flatten():
        found = torch.autograd.grad(logp, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).view(*probs.shape, -1)


class _Look(nn.Module):
    """State numbers [N] -> what is seen there, as a vector with a single 1."""

    looks: Tensor

    def __init__(self, histories: Tensor) -> None:
        super().__init__()
        newest = histories.gather(1, (histories >= 0).sum(1, keepdim=True) - 1).squeeze(1)
        self.register_buffer("looks", torch.eye(int(histories.max()) + 1)[newest])

    def forward(self, state: Tensor) -> Tensor:
        return self.looks[state]


class _OnRows(nn.Module):
    """A critic of states on rows of a policy with memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, rows: Rows) -> Tensor:
        return self.module(rows.obs)
