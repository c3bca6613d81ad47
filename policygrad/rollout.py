"""Trajectories as [B, T] arrays with a mask, and minibatches of their decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_map, tree_unflatten

from policygrad import ranks
from policygrad.ranks import Steps, added

Parts = tuple[Sequence[Tensor], dict[str, Tensor]]  # the indices of the rows computed together, and metrics of them
Split = int | Callable[[Any], Parts] | None  # rows computed at a time; or observations -> parts; None: all


@dataclass(frozen=True)
class Rollout:
    """B rows of T steps, sampled from one policy.

    A row is one episode, or a segment that holds parts of several consecutive episodes. `terminated` cuts the
    bootstrap; `ended` (terminated or truncated) cuts the trace. They differ because the value continues past a time
    limit. Only the `mask` says which steps count.

    reward and logp are set to 0 where the mask is False, so that nothing there (not even NaN or inf) has an effect. obs
    and action must be finite there too, since a network sees them. With Gymnasium's next-step auto-reset, the masked
    step after an end holds the true final observation, so V(obs[:, t + 1]) is always the value of step t's successor.
    """

    obs: Any  # [B, T, ...] opaque: only a policy or a critic reads it
    action: Tensor  # [B, T, ...]
    logp: Float[Tensor, "B T"]  # log-probability under the policy that sampled
    reward: Float[Tensor, "B T"]
    terminated: Bool[Tensor, "B T"]  # no value beyond this step
    ended: Bool[Tensor, "B T"]  # terminated or truncated, or the auto-reset step after an end
    mask: Bool[Tensor, "B T"]  # the policy chose this action
    group: Int[Tensor, " B"]  # rows with the same prompt or start state share a number
    final_obs: Any | None = None  # [B, ...] the state where each row stops; None if every row terminates
    memoryless: bool = False  # whether a step can stand alone, outside its row
    pieces: int = 1  # equal parts that a row may be cut into, since obs has the policy's memory before each
    metrics: dict[str, Any] = field(default_factory=dict)  # the sampler's metrics, numbers or tensors: return, ...
    importance: Float[Tensor, "B T"] | None = None  # truncated pi_old / sampling policy; None: they agree
    state: Int[Tensor, "B T"] | None = None  # decisions where the environment says the same share a number
    greedy: Float[Tensor, " B"] | None = None  # return of an episode of the policy's mode from the row's start

    def __post_init__(self) -> None:
        for name in ("reward", "logp", "importance"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, torch.where(self.mask, getattr(self, name), 0.0))

    def rows(self, index: Tensor | slice) -> Rollout:
        """The rows that `index` names, in its order; a row may repeat."""
        return _each(lambda x: x[index], self)

    def split(self, size: int) -> Iterator[Rollout]:
        """The rollout in order, at most `size` rows at a time."""
        for start in range(0, len(self.mask), size):
            yield self.rows(slice(start, start + size))

    @staticmethod
    def join(rollouts: Sequence[Rollout]) -> Rollout:
        """The rows of several rollouts, one after the other, with the metrics of the first.

        Shorter rollouts get masked steps at their end. Observations whose widths differ have a method `join` of their
        own.
        """
        length = max(x.mask.shape[1] for x in rollouts)
        rollouts = [_lengthened(x, length) for x in rollouts]
        obs = [x.obs for x in rollouts]
        if hasattr(obs[0], "join"):
            rollouts = [replace(x, obs=None) for x in rollouts]
        joined = _each(lambda *x: torch.cat(x), *rollouts)
        return replace(joined, obs=obs[0].join(obs)) if joined.obs is None else joined

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout on another device."""
        return _each(lambda x: x.to(device), self)


def pieces_of(rollout: Rollout) -> int:
    """The rows of a batch that a row of the rollout becomes."""
    return rollout.mask.shape[1] if rollout.memoryless else rollout.pieces


@dataclass(frozen=True)
class Everywhere:
    """What all ranks have of a batch of which each has a part. In trees of tensors it is structure, and no leaf."""

    rows: int
    weight: float | None = None  # None: not asked yet
    counts: bool = True  # whether a decision counts on some rank


register_pytree_node(Everywhere, lambda x: ([], x), lambda _, x: x)


class Batch(NamedTuple):
    """The decisions of a rollout with their credit: an objective's input. All [B, T], or [N, 1] if memoryless.

    A NamedTuple passes through torch.func and torch.compile unchanged. `weight` sets how decisions are averaged (see
    weights.py); it is computed on the whole rollout, so that any split adds up to the same gradient.
    """

    obs: Any
    action: Tensor
    logp: Tensor
    mask: Tensor
    weight: Tensor
    advantage: Tensor
    target: Tensor  # the critic's target; 0 if there is none
    value: Tensor  # the critic's prediction when credit was assigned; 0 without a critic
    charge: Tensor | tuple[()] = ()  # what a penalty of KL(old, new) counts at each decision; (), no leaf: 1 everywhere
    imitation: Tensor | tuple[()] = ()  # the coefficient of log pi itself at each decision; (), no leaf: 0 everywhere
    everywhere: Everywhere | tuple[()] = ()  # of all ranks; (): not asked yet, or one process


def decisions(
    rollout: Rollout,
    weight: Float[Tensor, "B T"],
    advantage: Float[Tensor, "B T"],
    target: Float[Tensor, "B T"] | None = None,
    value: Float[Tensor, "B T"] | None = None,
    charge: Float[Tensor, "B T"] | tuple[()] = (),
    imitation: Float[Tensor, "B T"] | tuple[()] = (),
) -> Batch:
    """Join a rollout with its credit. Every column is 0 behind the mask.

    Importance weights multiply the decisions' weights: every mean over the batch is then over actions of the policy
    that logp belongs to, not of the engine that sampled. The prefix and the continuation of each decision remain the
    engine's.

    A memoryless rollout's steps become rows of one step. Other rows stay whole, since a sequence model's step needs its
    prefix, or are cut into the pieces before which its memory is known.
    """
    zero = torch.zeros_like(advantage)
    if rollout.importance is not None:
        weight = weight * rollout.importance
    columns = [rollout.logp, weight, advantage, zero if target is None else target, zero if value is None else value]
    logp, weight, advantage, target, value = (torch.where(rollout.mask, x, 0.0) for x in columns)
    charge, imitation = (
        torch.where(rollout.mask, x, 0.0) if isinstance(x, Tensor) else () for x in (charge, imitation)
    )
    batch = Batch(rollout.obs, rollout.action, logp, rollout.mask, weight, advantage, target, value, charge, imitation)
    pieces = pieces_of(rollout)
    return tree_map(lambda x: x.unflatten(1, (pieces, -1)).flatten(0, 1), batch) if pieces > 1 else batch


def rows_of_all(batch: Batch) -> int:
    """The rows of a batch on all ranks."""
    return batch.everywhere.rows if isinstance(batch.everywhere, Everywhere) else ranks.total(len(batch.mask))


def weight_of_all(batch: Batch) -> Float[Tensor, ""]:
    """The weight of a batch on all ranks."""
    known = batch.everywhere.weight if isinstance(batch.everywhere, Everywhere) else None
    return ranks.total(batch.weight.sum()) if known is None else batch.weight.new_tensor(known)


@ranks.collective
def measured(batch: Batch) -> Steps[Batch]:
    """The batch with its weight on all ranks, where that is not known yet; one process has no others to ask."""
    if ranks.size() == 1 or (isinstance(batch.everywhere, Everywhere) and batch.everywhere.weight is not None):
        return batch
    told = torch.stack([batch.weight.sum().double(), batch.mask.any().double()])
    counts, seen = zip(*(yield len(batch.mask), told), strict=True)
    weight, counting = added(seen).tolist()
    return batch._replace(everywhere=Everywhere(added(counts), weight, counting > 0))


def minibatches(
    batch: Batch, size: int, epochs: int = 1, normalize: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Iterator[Batch]:
    """Shuffle the rows of a batch in each epoch and yield them `size` at a time. All minibatches have the same shape.

    If `size` does not divide the rows, rows of weight 0 fill the last minibatch. Weights are multiplied by the number
    of minibatches, so that the mean of the minibatches' objectives is the objective of the batch. size: of a minibatch
    of all ranks, which have as many minibatches each, though not as many rows. normalize: (advantage, mask) ->
    advantage, of each minibatch. What is asked of other ranks is one message an epoch.
    """
    rows, device = batch.mask.shape[0], batch.mask.device
    everywhere = rows_of_all(batch)
    count = math.ceil(everywhere / min(size, everywhere))
    size = size if everywhere == rows else math.ceil(rows / count)
    size = min(size, rows)
    spare = count * size - rows
    real = (torch.arange(count * size, device=device) < rows).unsqueeze(1)
    for _ in range(epochs):
        order = torch.randperm(rows, device=device)
        order = order.repeat(1 + math.ceil(spare / rows))[: count * size]
        shuffled = tree_map(lambda x, order=order: x[order], batch)  # once an epoch: the minibatches are views
        shuffled = shuffled._replace(weight=(shuffled.weight * count).where(real, 0.0), mask=shuffled.mask & real)
        shuffled = shuffled._replace(everywhere=())
        columns, layout = tree_flatten(shuffled)
        parts = [tree_unflatten(part, layout) for part in zip(*(x.split(size) for x in columns), strict=True)]
        yield from ranks.together(*(_prepared(part, normalize) for part in parts))


def _prepared(part: Batch, normalize: Callable[[Tensor, Tensor], Tensor] | None) -> Steps[Batch]:
    """A minibatch with its weight on all ranks and its advantage normalized."""
    asked = [] if normalize is None else [ranks.begun(normalize, part.advantage, part.mask)]
    part, *advantage = yield from ranks.joined(ranks.begun(measured, part), *asked)
    return part._replace(advantage=advantage[0]) if advantage else part


def parts_of(obs: Any, micro_batch: Split) -> Parts:
    """The rows that are computed together: in order, `micro_batch` at a time, or as that function of obs says."""
    if callable(micro_batch):
        return micro_batch(obs)
    rows = torch.arange(len(tree_leaves(obs)[0]))
    return rows.split(micro_batch or max(1, len(rows))), {}


def in_parts(function: Callable[..., Tensor], micro_batch: Split, obs: Any, *columns: Tensor) -> Tensor:
    """function(obs, *columns), a row for each of theirs, computed one micro-batch after another."""
    if micro_batch is None:
        return function(obs, *columns)
    parts, _ = parts_of(obs, micro_batch)
    run = ranks.as_often(parts)  # what is computed more often than there are parts is not kept
    found = [function(*tree_map(lambda x, index=index: x[index], (obs, *columns))) for index in run][: len(parts)]
    return torch.cat(found)[torch.cat(list(parts)).argsort()]


def micro_batches(
    batch: Batch, rows: int | Sequence[Tensor], total: float | None = None
) -> Iterator[tuple[float, Batch]]:
    """Split the batch into parts, each with its share of the batch's weight.

    rows: the rows of each part, or how many a part has at most, in order. total: the weight that the shares are of,
    that of all ranks; None: the batch's own.

    Each part's weights are divided by its share, so the share-weighted mean of an objective or metric over the parts is
    its value on the batch, even if it divides by the sum of the weights. (A ratio of two means, such as the effective
    sample size, is not linear in them, so its mean is only over the parts.) Parts without weight are skipped; if the
    whole batch has none, the first part is kept.
    """
    total = float(batch.weight.sum()) if total is None else total
    parts = torch.arange(len(batch.mask)).split(rows) if isinstance(rows, int) else rows
    for i, index in enumerate(parts):
        part = tree_map(lambda x, index=index: x[index], batch)
        share = float(part.weight.sum()) / total if total > 0 else float(i == 0)
        if share > 0:
            yield share, part._replace(weight=part.weight / share, everywhere=())


def state_size(module: Any) -> int:
    """The numbers of a policy's or critic's memory of one row; 0 if it has none.

    A module with memory has two methods: initial(batch) -> the empty memory [batch, S], and unrolled(rows) -> what it
    returns for Rows, and the state [B, S] after their last step.
    """
    return module.initial(1).shape[-1] if hasattr(module, "initial") else 0


def at_last_decision(reward: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Each row's reward at its last decision, 0 elsewhere. A row without a decision loses its reward."""
    later = mask.flip(1).cumsum(1).flip(1)  # decisions from here on
    return reward.unsqueeze(1) * (mask & (later == 1))


def holes_last(mask: Bool[Tensor, "B T"], ended: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """An index [B, T] that moves each row's holes to its end and keeps the order of all other steps.

    A hole is a masked step inside an episode, such as tool output between two tokens of a model. A masked step that
    `ended` marks is not a hole: it cuts the trace and holds a true final observation.
    """
    return (~(mask | ended)).int().argsort(dim=1, stable=True)


def _lengthened(rollout: Rollout, length: int) -> Rollout:
    """The rollout with holes up to `length`, at the observation where each row stops."""
    more = length - rollout.mask.shape[1]
    if not more:
        return rollout

    def repeated(column: Tensor, last: Tensor) -> Tensor:
        return torch.cat([column, last.unsqueeze(1).expand(-1, more, *last.shape[1:])], 1)

    stop = tree_map(lambda x: x[:, -1], rollout.obs) if rollout.final_obs is None else rollout.final_obs
    names = ("action", "logp", "reward", "terminated", "ended", "mask", "importance", "state")
    columns = {name: x for name in names if (x := getattr(rollout, name)) is not None}
    padded: dict[str, Any] = {name: repeated(x, torch.zeros_like(x[:, 0])) for name, x in columns.items()}
    return replace(rollout, obs=tree_map(repeated, rollout.obs, stop), **padded)


def _each(function: Callable[..., Tensor], *rollouts: Rollout) -> Rollout:
    """Apply the function to each column of the given rollouts."""
    names = [f.name for f in fields(Rollout) if f.name not in ("memoryless", "pieces", "metrics")]
    columns = {name: [getattr(x, name) for x in rollouts] for name in names}
    for name, found in columns.items():
        if len({x is None for x in found}) > 1:
            raise ValueError(f"some of the rollouts to join have {name} and some have not: give it to all, or to none")
    return replace(rollouts[0], **{name: tree_map(function, *x) for name, x in columns.items() if x[0] is not None})
