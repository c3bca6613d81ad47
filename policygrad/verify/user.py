"""A user's own advantage function, as the estimate of `credit.bootstrapped`, held against the same gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policygrad.algorithms.actor_critic import ActorCriticObjective
from policygrad.credit import Assign, Credit, bootstrapped, discounted
from policygrad.errors import UserError
from policygrad.rollout import Rollout
from policygrad.verify.settings import Setting
from policygrad.verify.statistics import Experience, Row
from policygrad.weights import per_episode

# my_advantage(reward [B, T], value [B, T + 1], terminated [B, T], ended [B, T], gamma) -> [B, T]
Advantage = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

PAIRS = 50_000  # of trajectories, on each of which a user's function may be called


def user_rows(name: str, function: Advantage, at: Setting) -> list[Row]:
    """The function with an exact and a zero critic. With the exact one any bias is an error; on another it may lean.

    Its advantages are computed before anything is differentiated, so that it may do what it likes with tensors. A
    function that looks at several rows at once has no row where there are too many pairs to call it on each.
    """
    tables = {"exact": at.value} | ({} if at.horizon is not None else {"zero": torch.zeros_like(at.value)})
    experience, policy, rows = at.on_policy, at.seen(at.table), []
    for critic_name, table in tables.items():
        credit = bootstrapped(at.critic(table), partial(_called, name, function, at.world.gamma))
        whole = _advantages(name, credit, experience.rollout)
        if _row_by_row(name, credit, experience.rollout, whole):
            credited, size = replace(experience, rollout=replace(experience.rollout, reward=whole)), 1
        elif experience.enumerated and len(whole) ** 2 > PAIRS:
            continue
        else:
            credited, size = _batch_by_batch(name, credit, experience)
        row = Row(
            f"{name.rpartition(':')[2]}, {critic_name} critic",
            discounted(_in_the_reward, at.world.gamma),
            ActorCriticObjective(policy, None),
            per_episode,
            size,
            experience=credited,
        )
        rows.append(row if critic_name == "exact" else replace(row, known=False, reason="leans on the critic"))
    return rows


def _in_the_reward(rollout: Rollout) -> Credit:
    """The advantage that was computed before."""
    nothing = torch.zeros_like(rollout.reward)
    return Credit(rollout.reward, nothing, nothing)


def _row_by_row(name: str, credit: Assign, rollout: Rollout, whole: Tensor) -> bool:
    """Whether two rows' advantages are the same with the others there and without."""
    pairs = torch.tensor([[0, len(whole) // 2], [len(whole) // 3, len(whole) - 1]])
    few = [_advantages(name, credit, rollout.rows(pair)) for pair in pairs]
    return torch.allclose(torch.stack(few), whole[pairs], equal_nan=True)


def _batch_by_batch(name: str, credit: Assign, experience: Experience) -> tuple[Experience, int]:
    """The batches of the experience, one after the other, with the advantages in the reward's place; their size."""
    index, probability = experience.batches(2)
    advantage = torch.cat([_advantages(name, credit, experience.rollout.rows(i)) for i in index])
    expanded = replace(experience.rollout.rows(index.flatten()), reward=advantage)

    def each(_: int) -> tuple[Tensor, Tensor]:
        return torch.arange(len(advantage)).view(index.shape), probability

    return Experience(expanded, each, experience.enumerated), index.shape[1]


def _advantages(name: str, credit: Assign, rollout: Rollout) -> Tensor:
    """Those of the decisions. Raises UserError for one that is not finite."""
    advantage = credit(rollout).advantage
    if not advantage[rollout.mask].isfinite().all():
        raise UserError(f"{_short(name)} returned an advantage that is NaN or infinite: fix the function")
    return advantage.where(rollout.mask, 0.0)


def _called(
    name: str, function: Advantage, gamma: float, reward: Tensor, value: Tensor, terminated: Tensor, ended: Tensor
) -> Tensor:
    """One call, of copies. Raises UserError if it raises or returns another shape."""
    arrays = [x.clone() for x in (reward, value, terminated, ended)]
    try:
        advantage: Any = function(arrays[0], arrays[1], arrays[2], arrays[3], gamma)
    except Exception as error:
        said = " ".join(str(error).split())
        raised = f"{type(error).__name__}: {said if len(said) <= 80 else said[:77] + '...'}"
        raise UserError(f"{_short(name)} raised {raised}: fix the function") from error
    if not isinstance(advantage, Tensor) or advantage.shape != reward.shape:
        what = list(advantage.shape) if isinstance(advantage, Tensor) else type(advantage).__name__
        raise UserError(f"{_short(name)} returned {what} for rewards of shape {list(reward.shape)}: return [B, T]")
    return advantage.detach().to(reward)


def _short(name: str) -> str:
    """A name, or the last 50 characters of a long one."""
    return name if len(name) <= 50 else "..." + name[-47:]
