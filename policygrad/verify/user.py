"""A user's own advantage function, as the estimate of `credit.bootstrapped`, held against the same gradients."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from policygrad.algorithms.actor_critic import ActorCriticObjective
from policygrad.credit import Assign, Credit, bootstrapped, discounted
from policygrad.errors import UserError, ending, one_line
from policygrad.rollout import Rollout
from policygrad.verify.settings import Setting
from policygrad.verify.statistics import Experience, Row
from policygrad.weights import per_episode

# my_advantage(reward [B, T], value [B, T + 1], terminated [B, T], ended [B, T], gamma) -> [B, T]
Advantage = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

CALL_SECONDS = 60.0  # the most that a call of a user's function may take
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
        raise UserError(f"{ending(name, 50)} returned an advantage that is NaN or infinite: fix the function")
    return advantage.where(rollout.mask, 0.0)


def _called(
    name: str, function: Advantage, gamma: float, reward: Tensor, value: Tensor, terminated: Tensor, ended: Tensor
) -> Tensor:
    """One call, of copies. Raises UserError if it raises, exits, hangs, or returns anything but real numbers [B, T]."""
    arrays = [x.clone() for x in (reward, value, terminated, ended)]
    try:
        with limited(CALL_SECONDS):
            advantage: Any = function(arrays[0], arrays[1], arrays[2], arrays[3], gamma)
    except (Exception, SystemExit) as error:
        raised = f"{type(error).__name__}: {one_line(error, 80)}"
        fix = (
            "it takes (reward, value, terminated, ended, gamma)" if isinstance(error, TypeError) else "fix the function"
        )
        raise UserError(f"{ending(name, 50)} raised {raised}: {fix}") from error
    if not isinstance(advantage, Tensor) or advantage.shape != reward.shape:
        what = list(advantage.shape) if isinstance(advantage, Tensor) else type(advantage).__name__
        raise UserError(f"{ending(name, 50)} returned {what} for rewards of shape {list(reward.shape)}: return [B, T]")
    dense = advantage.layout == torch.strided and advantage.device.type != "meta"
    if not dense or advantage.is_complex() or advantage.dtype == torch.bool:
        what = f"{advantage.dtype}, {advantage.layout}, on {advantage.device}"
        raise UserError(f"{ending(name, 50)} returned numbers that are {what}: return real numbers, as reward's are")
    return advantage.detach().to(reward)


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a block that takes longer. Only the main thread of a Unix process can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: Any) -> None:
        raise TimeoutError(f"a call took more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
