"""What happened: trajectories as [B, T] arrays with a mask, and minibatches of their decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Rollout:
    """B rows of T steps, sampled from one policy.

    A row is a stretch of experience: one episode, or a segment that several episodes share, one after the other.
    `terminated` and `ended` are two arrays because a time limit is not an end of value: `terminated` cuts the
    bootstrap, `ended` (terminated or truncated) cuts the trace. `mask` is the one notion of 'counts'.

    reward and logp are set to 0 where the mask is False, so that whatever stood there (NaN and inf too) changes
    nothing; obs and action must be finite there too, since a network sees them. With Gymnasium's next-step auto-reset
    the observation of the masked step after an end is the true final observation, so that V(obs[:, t + 1]) is the value
    of the successor of step t everywhere.
    """

    obs: Any  # [B, T, ...] opaque: only a policy or a critic looks inside
    action: Tensor  # [B, T, ...]
    logp: Float[Tensor, "B T"]  # under the policy that sampled
    reward: Float[Tensor, "B T"]
    terminated: Bool[Tensor, "B T"]  # no value beyond this step
    ended: Bool[Tensor, "B T"]  # terminated or truncated; or an auto-reset, over which nothing is carried either
    mask: Bool[Tensor, "B T"]  # the policy chose this action
    group: Int[Tensor, " B"]  # rows that answer the same prompt or start state share a number
    final_obs: Any | None = None  # [B, ...] where each row stops; None if every row terminates
    memoryless: bool = False  # may a step be taken out of its row?
    metrics: dict[str, float] = field(default_factory=dict)  # what the sampler measured: return, steps, ...
    importance: Float[Tensor, "B T"] | None = None  # pi_old / what really sampled, truncated; None: they are the same

    def __post_init__(self) -> None:
        for name in ("reward", "logp", "importance"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, torch.where(self.mask, getattr(self, name), 0.0))

    def rows(self, index: Tensor | slice) -> Rollout:
        """Some of the rows, in the order of `index`, as often as it names them."""
        return _each(lambda x: x[index], self)

    def split(self, size: int) -> Iterator[Rollout]:
        """The rollout in order, at most `size` rows at a time."""
        for start in range(0, len(self.mask), size):
            yield self.rows(slice(start, start + size))

    @staticmethod
    def join(rollouts: Sequence[Rollout]) -> Rollout:
        """The rows of several rollouts, one after the other, with the metrics of the first."""
        return _each(lambda *x: torch.cat(x), *rollouts)

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout on another device."""
        return _each(lambda x: x.to(device), self)


class Batch(NamedTuple):
    """The decisions of a rollout with their credit: what an objective sees. All [B, T], or [N, 1] if memoryless.

    A NamedTuple, so that it passes through torch.func and torch.compile as it is. `weight` says how decisions are
    averaged (see weights.py); it is computed on the whole rollout, so that any split adds up to the same gradient.
    """

    obs: Any
    action: Tensor
    logp: Tensor
    mask: Tensor
    weight: Tensor
    advantage: Tensor
    target: Tensor  # what a critic is to predict; 0 if nothing
    value: Tensor  # what it predicted when the rollout was scored; 0 if there is none


def decisions(
    rollout: Rollout,
    weight: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    target: Float[Tensor, "B T"] | None = None,
    value: Float[Tensor, "B T"] | None = None,
) -> Batch:
    """Join a rollout with its credit. Behind the mask every column is 0.

    Where the rollout has importance weights the decisions' weights are multiplied by them: every mean over the batch
    is then one over actions of the policy whose log-probabilities the rollout has, not of the engine that sampled. What
    came before a decision and what it led to stay the engine's.

    The steps of a memoryless rollout become rows of one step each; the rows of any other stay whole, since a step
    of a sequence model that loses its prefix is another state.
    """
    zero = torch.zeros_like(advantage)
    if rollout.importance is not None:
        weight = weight * rollout.importance
    columns = [rollout.logp, weight, advantage, zero if target is None else target, zero if value is None else value]
    logp, weight, advantage, target, value = (torch.where(rollout.mask, x, 0.0) for x in columns)
    batch = Batch(rollout.obs, rollout.action, logp, rollout.mask, weight, advantage, target, value)
    return tree_map(lambda x: x.flatten(0, 1).unsqueeze(1), batch) if rollout.memoryless else batch


def minibatches(batch: Batch, size: int, epochs: int = 1) -> Iterator[Batch]:
    """Epoch after epoch, the rows of a batch in random order, `size` at a time, every minibatch of the same shape.

    If `size` does not divide the rows, the last minibatch is filled up with rows of weight 0. Weights are scaled by
    the number of minibatches, so that the mean of the minibatches' objectives is the objective of the batch.
    """
    rows = batch.mask.shape[0]
    size = min(size, rows)
    count = math.ceil(rows / size)
    spare = count * size - rows
    real = torch.arange(count * size, device=batch.mask.device).view(count, size, 1) < rows
    for _ in range(epochs):
        order = torch.randperm(rows, device=batch.mask.device)
        for k, index in enumerate(torch.cat([order, order[:spare]]).split(size)):
            part = tree_map(lambda x, index=index: x[index], batch)
            weight = part.weight * count
            if k == count - 1 and spare:
                part = part._replace(mask=part.mask & real[k])
                weight = weight.where(real[k], 0.0)
            yield part._replace(weight=weight)


def micro_batches(batch: Batch, rows: int) -> Iterator[tuple[float, Batch]]:
    """The batch in order, at most `rows` rows at a time, each with its share of the batch's weight.

    The weights of a part are scaled up to those of the whole, so that the mean of any objective or metric over the
    parts, taken with the shares, is that of the batch: also of one that divides by the sum of the weights. (What is
    a ratio of two means, as the effective sample size, is not linear in them: its mean is over the parts.) Parts
    without weight are left out; where nothing counts at all, the first stays.
    """
    total = float(batch.weight.sum())
    for start in range(0, batch.mask.shape[0], rows):
        part = tree_map(lambda x, start=start: x[start : start + rows], batch)
        share = float(part.weight.sum()) / total if total > 0 else float(start == 0)
        if share > 0:
            yield share, part._replace(weight=part.weight / share)


def at_last_decision(reward: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """The reward of each row at its last decision, 0 elsewhere; lost only in a row without a decision."""
    later = mask.flip(1).cumsum(1).flip(1)  # decisions from here on
    return reward.unsqueeze(1) * (mask & (later == 1))


def holes_last(mask: Bool[Tensor, "B T"], ended: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """The order of each row's steps that moves its holes to the end and changes nothing else.

    A hole is a step that no policy chose and over which the episode goes on, such as tool output between two tokens of
    a model. A masked step that `ended` marks is none: it cuts the trace, and its observation is a true final one.
    """
    return (~(mask | ended)).int().argsort(dim=1, stable=True)


def _each(function: Callable[..., Tensor], *rollouts: Rollout) -> Rollout:
    """A rollout whose columns are the function of the given rollouts' columns."""
    names = [f.name for f in fields(Rollout) if f.name not in ("memoryless", "metrics")]
    columns = {name: [getattr(x, name) for x in rollouts] for name in names}
    for name, found in columns.items():
        if len({x is None for x in found}) > 1:
            raise ValueError(f"some of the rollouts to join have {name} and some have not: give it to all, or to none")
    return replace(rollouts[0], **{name: tree_map(function, *x) for name, x in columns.items() if x[0] is not None})
