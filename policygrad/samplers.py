"""Wrappers: a sampler in, a sampler out. Each changes one thing of the rollout that an algorithm then learns from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from policygrad.advantages import group_std
from policygrad.divergences import AdaptiveCoefficient, k3
from policygrad.returns import kl_in_reward
from policygrad.rollout import Batch, Rollout
from policygrad.score import log_ratio
from policygrad.weights import average, per_token

Sample = Callable[[nn.Module], Rollout]


class Wrapper(ABC):
    """What all wrappers share: their state is that of the sampler inside, and their own."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    @abstractmethod
    def __call__(self, policy: nn.Module) -> Rollout:
        """Sample with the policy as it is now."""

    def state_dict(self) -> dict[str, Any]:
        return {"sample": self.sample.state_dict()}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sample.load_state_dict(state["sample"])  # type: ignore[attr-defined]


class OneGroup(Wrapper):
    """All rows are one group: what makes GRPO of a control task whose episodes start alike.

    Rows stay whole, since they are what is compared: a mean by row or a sequence ratio needs the row.
    """

    def __call__(self, policy: nn.Module) -> Rollout:
        rollout = self.sample(policy)
        return replace(rollout, group=torch.zeros_like(rollout.group), memoryless=False)


class KLCharged(Wrapper):
    """The reward of every decision minus beta log(pi / pi_ref) (returns.kl_in_reward; Ziegler et al. 2019, eq. 2).

    Its expected return is J - beta KL(pi, pi_ref) of whole rows, so that any method ascends the right gradient; k1 is
    the only estimate for which that holds. The coefficient adapts to the KL of each rollout, if it has a target. Adds
    to the metrics kl_reference, by decision (k3), and kl_coefficient.
    """

    def __init__(
        self, sample: Sample, reference: nn.Module, coefficient: AdaptiveCoefficient, micro_batch: int | None = None
    ) -> None:
        super().__init__(sample)
        self.reference, self.coefficient, self.micro_batch = reference, coefficient, micro_batch

    def __call__(self, policy: nn.Module) -> Rollout:
        rollout = self.sample(policy)
        logp_ref = log_probabilities(self.reference, rollout, self.micro_batch)
        beta = float(self.coefficient.value)
        reward = kl_in_reward(rollout.reward, rollout.logp, logp_ref, beta)
        divergence = float(average(k3(rollout.logp, logp_ref), per_token(rollout.mask)))
        self.coefficient.update(divergence)
        metrics = {**rollout.metrics, "kl_reference": divergence, "kl_coefficient": beta}
        return replace(rollout, reward=reward, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "coefficient": self.coefficient.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.coefficient.load_state_dict(state["coefficient"])


class Rescored(Wrapper):
    """The log-probabilities of the learner in the place of the sampler's, which another engine or precision made.

    What the sampler drew is then corrected for by pi_old / mu, at most `bound` (truncated importance sampling, Yao et
    al. 2025; Espeholt et al. 2018): the weights stand in rollout.importance, by token, and enter every mean once. They
    correct each decision alone, at the prefixes and with the continuations of mu; for single decisions that is all.
    The ratio in the objective stays pi / pi_old. bound = 0: no correction. Adds to the metrics mismatch_kl,
    KL(mu, pi_old) by decision, mismatch_ratio and mismatch_largest, the mean and largest pi_old / mu, and
    importance_cut, the share of weights at the bound.
    """

    def __init__(self, sample: Sample, bound: float = 2.0, micro_batch: int | None = None) -> None:
        super().__init__(sample)
        self.bound, self.micro_batch = bound, micro_batch

    def __call__(self, policy: nn.Module) -> Rollout:
        rollout = self.sample(policy)
        logp = log_probabilities(policy, rollout, self.micro_batch)
        difference, weight = log_ratio(logp, rollout.logp, rollout.mask), per_token(rollout.mask)
        ratio = difference.exp()
        measured = {
            "mismatch_kl": average(k3(torch.zeros_like(ratio), difference), weight),
            "mismatch_ratio": average(ratio, weight),
            "mismatch_largest": ratio.where(rollout.mask, 0.0).max(),
        }
        if self.bound:
            measured["importance_cut"] = average((ratio > self.bound).to(ratio.dtype), weight)
        metrics = {**rollout.metrics, **{name: float(x) for name, x in measured.items()}}
        importance = ratio.clamp(max=self.bound) if self.bound else None
        return replace(rollout, logp=logp, importance=importance, metrics=metrics)


class WithoutFlatGroups(Wrapper):
    """Sample on until a rollout's rows are filled with groups whose scores differ (DAPO's dynamic sampling, eq. 11).

    A group of equal scores has no gradient. After `rounds` rollouts the rest is filled with what there is. The sampler
    inside must give rows of the same shape every time, and rewards before KL is charged to them: KLCharged goes around
    this, not into it. Groups stay whole: one that the rows have no room for, because
    groups are of different sizes, is masked. The metrics are the mean over the rounds, so that the reward is that of
    all prompts, but for `counters`, which are the last round's; sampling_rounds is added.
    """

    def __init__(
        self, sample: Sample, rounds: int = 4, counters: tuple[str, ...] = ("steps", "episodes", "completions", "epoch")
    ) -> None:
        super().__init__(sample)
        self.rounds, self.counters = rounds, counters

    def __call__(self, policy: nn.Module) -> Rollout:
        rollouts: list[Rollout] = []
        rows, lively, groups = 1, 0, 0
        while len(rollouts) < self.rounds and lively < rows:
            rollout = self.sample(policy)
            group = rollout.group.unique(return_inverse=True)[1] + groups
            rollouts.append(replace(rollout, group=group))
            rows, groups = len(group), int(group.max()) + 1
            lively += int((~_flat(rollout)).sum())
        drawn = _joined(rollouts)
        order = (drawn.group + groups * _flat(drawn)).argsort(stable=True)  # each group together, flat ones last
        filled = _rows(drawn, order[:rows])
        cut = torch.isin(filled.group, drawn.group[order[rows:]])
        return replace(filled, mask=filled.mask & ~cut.unsqueeze(1), metrics=self._metrics(rollouts))

    def _metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        last = rollouts[-1].metrics
        seen = {name: [x.metrics[name] for x in rollouts if name in x.metrics] for x in rollouts for name in x.metrics}
        mean = {name: sum(x) / len(x) for name, x in seen.items()}
        counted = {name: last[name] for name in self.counters if name in last}
        return {**mean, **counted, "sampling_rounds": float(len(rollouts))}


@torch.no_grad()
def log_probabilities(
    policy: nn.Module, rollout: Rollout | Batch, micro_batch: int | None = None
) -> Float[Tensor, "B T"]:
    """log pi(a|s) of what was done, `micro_batch` rows at a time; 0 behind the mask."""
    rows = len(rollout.mask)
    parts = []
    for start in range(0, rows, micro_batch or rows):
        obs = tree_map(lambda x, start=start: x[start : start + (micro_batch or rows)], rollout.obs)
        parts.append(policy(obs).log_prob(rollout.action[start : start + (micro_batch or rows)]))
    return torch.cat(parts).where(rollout.mask, 0.0)


def _flat(rollout: Rollout) -> Bool[Tensor, " B"]:
    """Whether all rows of a row's group have the same score."""
    return group_std(rollout.reward.sum(1), rollout.group) == 0


def _rows(rollout: Rollout, index: Tensor) -> Rollout:
    """Some rows of a rollout."""
    return _each(lambda x: x[index], rollout)


def _joined(rollouts: list[Rollout]) -> Rollout:
    """The rows of several rollouts, one after the other."""
    return _each(lambda *x: torch.cat(x), *rollouts)


def _each(function: Callable[..., Tensor], *rollouts: Rollout) -> Rollout:
    names = [f.name for f in fields(Rollout) if f.name not in ("memoryless", "metrics")]
    columns = {name: [getattr(x, name) for x in rollouts] for name in names}
    return replace(rollouts[0], **{name: tree_map(function, *x) for name, x in columns.items() if x[0] is not None})
