"""(rollout) -> Credit by turns of a conversation: a turn is one action, whose tokens share its advantage.

A turn is a run of decisions without a hole: what others say between two turns is a hole in the mask. The discount and
lambda apply from turn to turn, not from token to token.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from policygrad.advantages import gae, group_mean, group_scale
from policygrad.credit import Assign, Credit, grouped
from policygrad.critics import bootstrap_values
from policygrad.errors import UserError
from policygrad.returns import reward_to_go
from policygrad.rollout import Rollout, Split


class Turns(NamedTuple):
    """A rollout's steps as turns, [B, K] of them with K that of the row with most; `of` names the turn of each step."""

    of: Int[Tensor, "B T"]
    first: Int[Tensor, "B K"]  # the turn's first step; 0 behind a row's last turn
    real: Bool[Tensor, "B K"]
    reward: Float[Tensor, "B K"]
    terminated: Bool[Tensor, "B K"]
    ended: Bool[Tensor, "B K"]  # also at a row's last turn, behind which nothing is

    def by_step(self, x: Float[Tensor, "B K"]) -> Float[Tensor, "B T"]:
        """Each turn's number at all of its steps. A hole's number is masked."""
        return x.gather(1, self.of)


def turns_of(rollout: Rollout) -> Turns:
    """The turns of each row, with the sums of their rewards."""
    mask = rollout.mask
    no = torch.zeros_like(mask[:, :1])
    goes_on = torch.cat([no, (mask & ~rollout.ended)[:, :-1]], 1)  # a decision that the episode goes on from
    begins = mask & ~goes_on
    number = begins.cumsum(1) - 1
    count = int(number.amax()) + 1 if mask.any() else 1
    real = torch.arange(count, device=mask.device) <= number[:, -1:]
    of = number.clamp(min=0)
    rows, steps = begins.nonzero(as_tuple=True)
    first = torch.zeros(real.shape, dtype=torch.long, device=mask.device)
    first[rows, number[rows, steps]] = steps

    def added(x: Tensor) -> Tensor:
        return torch.zeros(real.shape, dtype=x.dtype, device=x.device).scatter_add(1, of, x.where(mask, 0))

    terminated, ended = (added(x.long()) > 0 for x in (rollout.terminated, rollout.ended))
    last = torch.cat([~real[:, 1:], ~no], 1)
    return Turns(of, first, real, added(rollout.reward), terminated, ended | last)


def bootstrapped_by_turn(critic: nn.Module, *, gamma: float, lam: float, micro_batch: Split = None) -> Assign:
    """GAE in which a turn is one action:

        A_k = sum_j (gamma lam)^j delta_{k+j},    delta_k = R_k + gamma V(s_{k+1}) - V(s_k)

    with R_k the sum of the rewards in turn k and s_k the prefix at its first token (Schulman et al. 2016, eq. 16, with
    turns as time steps). All tokens of the turn have A_k, and its lambda-return A_k + V(s_k) as the critic's target: no
    reward is discounted inside a turn.
    """

    def assign(rollout: Rollout) -> Credit:
        value = bootstrap_values(critic, rollout, micro_batch)
        turns = turns_of(rollout)
        before = value[:, :-1].gather(1, turns.first).where(turns.real, value[:, -1:])
        after = torch.cat([before, value[:, -1:]], 1)  # behind a row's last turn: V of where it stops
        advantage = gae(turns.reward, after, turns.terminated, turns.ended, gamma, lam)
        target = turns.by_step(advantage + before)
        return Credit(turns.by_step(advantage), target, value[:, :-1])

    assign.modules = {"critic": critic}  # type: ignore[attr-defined]
    return assign


def grouped_by_state(
    baseline: Callable[[Tensor, Tensor], Tensor] = group_mean,
    scale: Callable[[Tensor, Tensor], Tensor] = group_scale,
    *,
    gamma: float = 0.95,
    weight: float = 1.0,
) -> Assign:
    """GiGPO (Feng et al. 2025, arXiv 2505.10978, eqs. 3 to 8): credit of the episode and of the turn.

        A = A_E + weight A_S,    A_E = (R_i - mean) / F over the rows of the group,
                                 A_S = (G_k - mean) / F over the turns of the group's rows that begin in the same state

    with G_k = sum_j gamma^j R_{k+j} the return from turn k on, and F the standard deviation, or 1 (unit_scale). A state
    that only one turn begins in has A_S = 0. Two turns are in the same state where `rollout.state` is the same. (The
    authors' code takes the mean and deviation of A_E over turns by default, the paper over episodes, as here.)

    Raises UserError if the rollout does not know its states.
    """
    of_episode = grouped(baseline, scale)

    def assign(rollout: Rollout) -> Credit:
        if rollout.state is None:
            raise UserError(
                "the credit compares turns in the same state, and these rollouts have no state: use grouped"
            )
        turns = turns_of(rollout)
        returns = reward_to_go(turns.reward, turns.ended, gamma)[turns.real]
        begun = rollout.state.gather(1, turns.first)
        group = rollout.group.unsqueeze(1).expand_as(begun)
        same = torch.stack([group[turns.real], begun[turns.real]], 1).unique(dim=0, return_inverse=True)[1]
        several = same.bincount()[same] > 1
        step = ((returns - baseline(returns, same)) / scale(returns, same)).where(several, 0.0)
        of_turn = torch.zeros_like(turns.reward).masked_scatter(turns.real, step)
        credit = of_episode(rollout)
        return credit._replace(advantage=credit.advantage + weight * turns.by_step(of_turn))

    return assign
