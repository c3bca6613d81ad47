"""Wrappers around samplers. Each changes one thing about the rollout."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from policygrad import ranks
from policygrad.advantages import group_std
from policygrad.divergences import AdaptiveCoefficient, k3
from policygrad.errors import UserError
from policygrad.ranks import Steps, averaged
from policygrad.returns import kl_in_reward
from policygrad.rollout import Rollout, Split
from policygrad.score import log_probabilities, log_ratio, token_ratio
from policygrad.weights import average, per_token

Sample = Callable[[nn.Module], Rollout]


class Wrapper(ABC):
    """A sampler around another sampler. Its state includes the inner sampler's state."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    @abstractmethod
    def __call__(self, policy: nn.Module) -> Rollout:
        """Sample with the current policy."""

    @property
    def steps(self) -> int:
        """The inner sampler's steps so far."""
        return self.sample.steps  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"sample": self.sample.state_dict()}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sample.load_state_dict(state["sample"])  # type: ignore[attr-defined]

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        """Go on from the states of another number of ranks: what all of them have is restored, counts are divided
        among the ranks that there are, and what each has of its own is drawn anew from the seed."""
        self.sample.divide_anew([x["sample"] for x in states], seed)  # type: ignore[attr-defined]


class WholeRows(Wrapper):
    """Keep rows whole, as a sequence ratio requires, where they could be cut."""

    def __call__(self, policy: nn.Module) -> Rollout:
        return replace(self.sample(policy), memoryless=False, pieces=1)


class Overlapped(Wrapper):
    """Sample the next rollouts in a thread while this one is learned from.

    A call returns the oldest of the `lag` rollouts that were begun before it, and begins another one: every rollout
    but the first `lag` ones is of the policy of `lag` calls before, never more and never less, and none is discarded.
    The gradient is then that of the rows `METHOD, off policy` of verify, so the method must weigh actions by the ratio
    to the log-probabilities of the policy that sampled them. It holds `lag` copies of the policy, and of the sampler's
    critic, if it has one: that of the same calls then fills the rows with its memory. The sampler has a method
    draws_its_own(policy): whether it leaves torch's global generator alone, without which the seed would not decide the
    run. It may have a method observed(obs), which makes observations of what a checkpoint holds of them. Adds the
    metric policy_lag, the number of versions. Raises UserError for a policy that samples from the global
    generator, and what the sampler raised, `lag` calls later.
    """

    def __init__(self, sample: Sample, lag: int = 1) -> None:
        super().__init__(sample)
        threads = torch.get_num_threads()  # a thread's own number
        self.pool = ThreadPoolExecutor(1, "sampling", initializer=lambda: torch.set_num_threads(threads))
        self.lag, self.version = lag, 0  # the version of the policy is the number of calls
        self.next: deque[tuple[int, Future[Rollout]]] = deque()  # of which version, the oldest first
        self.copies: dict[Future[Rollout], nn.ModuleList] = {}  # policy and critic as they were when a rollout began
        self.free: list[nn.ModuleList] = []  # copies whose rollout is sampled

    def __call__(self, policy: nn.Module) -> Rollout:
        if not self.sample.draws_its_own(policy):  # type: ignore[attr-defined]
            raise UserError(
                "sampling ahead needs a policygrad Policy of tanh or relu layers, with Discrete or Gaussian actions, "
                "and no tensors: others draw from torch's generator; leave overlap (lag) out"
            )
        version, sampled = self.version, None
        if self.next:
            version, following = self.next.popleft()
            sampled = following.result()
            self.free += [self.copies.pop(following)] if following in self.copies else []
        sampled = self.sample(policy) if sampled is None else sampled
        rollout = sampled.to(next(policy.parameters()).device)  # one of a file is not there yet
        critic = getattr(self.sample, "critic", None)
        now = nn.ModuleList([policy] if critic is None else [policy, critic])
        while len(self.next) < self.lag:
            copy = self.free.pop() if self.free else deepcopy(now)
            copy.load_state_dict(now.state_dict())
            following = self.pool.submit(self.sample, *copy)
            self.copies[following] = copy
            self.next.append((self.version, following))
        lag, self.version = float(self.version - version), self.version + 1
        return replace(rollout, metrics=rollout.metrics | {"policy_lag": lag})

    def state_dict(self) -> dict[str, Any]:
        following = [
            {"version": version, **{f.name: getattr(one.result(), f.name) for f in fields(Rollout)}}
            for version, one in self.next
        ]  # first of all, since the sampler changes until they are there
        return {**super().state_dict(), "version": self.version, "next": following}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.version, self.next, self.copies = int(state["version"]), deque(), {}
        observed = getattr(self.sample, "observed", lambda obs: obs)
        for saved in state["next"]:
            one: Future[Rollout] = Future()
            columns = {name: x for name, x in saved.items() if name != "version"}
            seen = {name: observed(x) for name in ("obs", "final_obs") if (x := saved[name]) is not None}
            one.set_result(Rollout(**columns | seen))
            self.next.append((int(saved["version"]), one))


class Following(Wrapper):
    """Give a copy of the policy its parameters before each rollout: `old` is then the policy that sampled."""

    def __init__(self, sample: Sample, old: nn.Module) -> None:
        super().__init__(sample)
        self.old = old

    def __call__(self, policy: nn.Module) -> Rollout:
        self.old.load_state_dict(policy.state_dict())
        return self.sample(policy)


class Refreshed(Wrapper):
    """Bring the reference of a KL penalty nearer to the policy before rollouts, but not before the first.

    every: each so many rollouts it becomes the policy as it is. decay: before each it becomes decay times itself plus
    1 - decay times the policy, an exponential moving average. The reference is a copy of the policy, and part of the
    state. Raises UserError if the reference has no parameters of its own, as the model under an adapter.
    """

    def __init__(self, sample: Sample, reference: nn.Module, *, every: int = 1, decay: float = 0.0) -> None:
        super().__init__(sample)
        if not any(True for _ in reference.parameters()):
            raise UserError(
                "the reference is the model under the adapter, which stays as it is: leave out reference_every and "
                "reference_decay, or train all weights"
            )
        self.reference, self.every, self.decay, self.rollouts = reference, every, decay, 0

    @torch.no_grad()
    def __call__(self, policy: nn.Module) -> Rollout:
        if self.rollouts and self.rollouts % self.every == 0:
            moved = zip(self.reference.parameters(), policy.parameters(), strict=True)
            for own, new in moved:
                own.copy_(new if self.decay == 0 else self.decay * own + (1 - self.decay) * new)
            for held, seen in zip(self.reference.buffers(), policy.buffers(), strict=True):
                held.copy_(seen)
        self.rollouts += 1
        return self.sample(policy)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "reference": self.reference.state_dict(), "rollouts": self.rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restore(state)

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        super().divide_anew(states, seed)
        self._restore(states[0])

    def _restore(self, state: dict[str, Any]) -> None:
        self.reference.load_state_dict(state["reference"])
        self.rollouts = int(state["rollouts"])


class OfRanks(Wrapper):
    """A wrapper that only several ranks need. Its state is the inner sampler's, from which one process goes on."""

    def state_dict(self) -> dict[str, Any]:
        return self.sample.state_dict()  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sample.load_state_dict(state)  # type: ignore[attr-defined]

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        self.sample.divide_anew(states, seed)  # type: ignore[attr-defined]


class Together(OfRanks):
    """Several ranks sample, each its share: where one of them fails, all do, and none waits for it.

    A sampler with running statistics has two methods: fresh() is what a rank has seen in a rollout, and share(seen),
    with that of each rank, makes the statistics those of all. This, the number of steps, and whether a rank has failed
    ride on the next message, which weights and credit need in any case.
    """

    counted = 0

    def __call__(self, policy: nn.Module) -> Rollout:
        sample: Any = self.sample
        with ranks.agreed(self._heard) as told:
            rollout = sample(policy)
            told.own = getattr(sample, "steps", 0), sample.fresh() if hasattr(sample, "fresh") else None
        return rollout

    def _heard(self, told: list[tuple[int, Any]]) -> None:
        """What each rank has told of its rollout."""
        steps, seen = zip(*told, strict=True)
        self.counted = sum(steps)
        if hasattr(self.sample, "share"):
            self.sample.share(seen)

    @property
    def steps(self) -> int:
        """The steps of all ranks after the last rollout, once a message has told them."""
        return self.counted


class Gathered(OfRanks):
    """Sample with all weights of a policy that is sharded over ranks: each makes as many passes as its rows need.

    whole: policy -> a block with all of its weights.
    """

    def __init__(self, sample: Sample, whole: Callable[[nn.Module], AbstractContextManager[None]]) -> None:
        super().__init__(sample)
        self.whole = whole

    def __call__(self, policy: nn.Module) -> Rollout:
        with self.whole(policy):
            return self.sample(policy)


class Mixed(Wrapper):
    """Rollouts as they are, with a sampler of demonstrations beside them, which updates draw from."""

    def __init__(self, sample: Sample, demonstrations: Sample) -> None:
        super().__init__(sample)
        self.demonstrations = demonstrations

    def __call__(self, policy: nn.Module) -> Rollout:
        return self.sample(policy)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "demonstrations": self.demonstrations.state_dict()}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.demonstrations.load_state_dict(state["demonstrations"])  # type: ignore[attr-defined]


class InUnits(Wrapper):
    """Give the critic its unit, the size of a reward, before it is asked for the values of a rollout.

    That is the root mean square of the rewards that are not 0: where most decisions have none, the mean over all would
    be far below the size of one, and errors of V in it far above the advantages, which share their gradient's norm.
    The critic has a method rescale(mean square). Rewards that are scaled already need no unit.
    """

    def __init__(self, sample: Sample, critic: Any) -> None:
        super().__init__(sample)
        self.critic = critic

    def __call__(self, policy: nn.Module) -> Rollout:
        rollout = self.sample(policy)
        self.critic.rescale(mean_of(rollout.reward**2, rollout.mask & (rollout.reward != 0)))
        return rollout


class KLCharged(Wrapper):
    """Subtract beta log(pi / pi_ref) from every decision's reward (returns.kl_in_reward; Ziegler et al. 2019, eq. 2).

    The expected return is then J - beta KL(pi, pi_ref) of whole rows, so any method follows its gradient. This holds
    only for the estimate k1. With a target, the coefficient adapts to the KL of each rollout. Adds the metrics kl_ref
    (per decision, by k3) and kl_ref_coefficient.
    """

    def __init__(
        self, sample: Sample, reference: nn.Module, coefficient: AdaptiveCoefficient, micro_batch: Split = None
    ) -> None:
        super().__init__(sample)
        self.reference, self.coefficient, self.micro_batch = reference, coefficient, micro_batch

    def __call__(self, policy: nn.Module) -> Rollout:
        rollout = self.sample(policy)
        logp_ref = log_probabilities(self.reference, rollout, self.micro_batch)
        reward = kl_in_reward(rollout.reward, rollout.logp, logp_ref, self.coefficient.value)
        metrics = {"kl_ref": mean_of(k3(rollout.logp, logp_ref), rollout.mask)}
        metrics |= self.coefficient.adapt(metrics, "kl_ref")
        return replace(rollout, reward=reward, metrics=rollout.metrics | metrics)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "coefficient": self.coefficient.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.coefficient.load_state_dict(state["coefficient"])

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        super().divide_anew(states, seed)
        self.coefficient.load_state_dict(states[0]["coefficient"])


class RandomNetworkDistillation(Wrapper):
    """Add c e(s') / scale to every decision's reward: e(s') = mean_k (predictor_k(s') - target_k(s'))^2, [B, T].

    The predictor learns to be the target, a network that stays as it is, on the successors s' that were seen: where it
    still errs is new (Burda et al. 2019, arXiv 1810.12894; one stream of rewards, and not their two). Both modules map
    obs [B, T, ...] to features [B, T, K]; observations should be normalized. scale: the root mean square of all errors
    so far, so that c is in units of reward. After the rewards, the optimizer takes one pass over the successors in
    minibatches. Adds the metrics novelty (mean e) and intrinsic_reward (mean of what was added). Raises UserError if
    the sampler does not say where its rows stop.
    """

    def __init__(
        self,
        sample: Sample,
        target: nn.Module,
        predictor: nn.Module,
        optimizer: torch.optim.Optimizer,
        coefficient: float = 1.0,
        minibatch_size: int = 256,
    ) -> None:
        super().__init__(sample)
        self.target, self.predictor, self.optimizer = target.requires_grad_(False), predictor, optimizer
        self.coefficient, self.minibatch_size = coefficient, minibatch_size
        self.square, self.count = 0.0, 0  # the sum of e^2, and the number of its terms

    def __call__(self, policy: nn.Module) -> Rollout:
        rollout = self.sample(policy)
        if ranks.size() > 1:
            raise UserError("random network distillation learns in one process: start it without torchrun")
        if rollout.final_obs is None:
            raise UserError("random network distillation needs the observations where rows stop: give final_obs")
        obs, final = (getattr(x, "obs", x) for x in (rollout.obs, rollout.final_obs))  # of a policy with memory, too
        seen = torch.cat([obs[:, 1:], final.unsqueeze(1)], 1)[rollout.mask].unsqueeze(1)
        with torch.no_grad():
            error = self._error(seen)
        self.square, self.count = self.square + float(error.double().square().sum()), self.count + len(error)
        scale = (self.square / max(self.count, 1)) ** 0.5
        bonus = torch.zeros_like(rollout.reward)
        bonus[rollout.mask] = self.coefficient * error / scale if scale else error
        for part in torch.randperm(len(seen)).split(self.minibatch_size) if len(seen) else ():
            self.optimizer.zero_grad()
            self._error(seen[part.to(seen.device)]).mean().backward()
            self.optimizer.step()
        weight = per_token(rollout.mask)
        metrics = {"novelty": error.mean(), "intrinsic_reward": average(bonus, weight)} if len(seen) else {}
        return replace(rollout, reward=rollout.reward + bonus, metrics=rollout.metrics | metrics)

    def _error(self, obs: Tensor) -> Tensor:
        """e of obs [N, 1, ...], [N]."""
        return (self.predictor(obs) - self.target(obs)).square().mean(-1).squeeze(-1)

    def state_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name).state_dict() for name in ("target", "predictor", "optimizer")}
        return {**super().state_dict(), **own, "square": self.square, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name in ("target", "predictor", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.square, self.count = state["square"], state["count"]


class Rescored(Wrapper):
    """Replace the log-probabilities of the sampling engine mu with the learner's pi_old.

    The weights pi_old / mu, within [low, bound], then correct for mu (truncated importance sampling, Yao et al. 2025;
    Espeholt et al. 2018). rollout.importance holds them by decision, and every mean uses them once. ratio: of score.py.
    token_ratio corrects each decision alone, and its prefix and continuation remain mu's; product_ratio, without
    bounds, is unbiased; sequence_ratio is between them. drop: a weight outside the bounds becomes 0 instead of the
    bound (masked importance sampling, arXiv 2510.18855). normalize: divide by the mean weight. The ratio in the
    objective stays pi / pi_old. bound = 0: no correction.

    Adds the metrics mismatch_kl (KL(mu, pi_old) per decision), mismatch_ratio and mismatch_largest (the mean and the
    largest pi_old / mu of a decision), importance_cut (the share of weights outside the bounds) and importance_kept
    (the mean weight within them over the mean weight).
    """

    def __init__(
        self,
        sample: Sample,
        bound: float = 2.0,
        micro_batch: Split = None,
        *,
        ratio: Callable[[Tensor, Tensor, Tensor], Tensor] = token_ratio,
        low: float = 0.0,
        drop: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__(sample)
        self.bound, self.micro_batch, self.ratio = bound, micro_batch, ratio
        self.low, self.drop, self.normalize = low, drop, normalize

    def __call__(self, policy: nn.Module) -> Rollout:
        rollout = self.sample(policy)
        logp = log_probabilities(policy, rollout, self.micro_batch)
        difference = log_ratio(logp, rollout.logp, rollout.mask)
        ratio = difference.exp()
        means, importance = [k3(torch.zeros_like(ratio), difference), ratio], None
        if self.bound:
            whole = self.ratio(logp, rollout.logp, rollout.mask).expand_as(logp)
            inside = (whole >= self.low) & (whole <= self.bound)
            importance = whole.where(inside, 0.0) if self.drop else whole.clamp(self.low, self.bound)
            means += [(~inside).to(ratio.dtype), importance, whole]
        asked = [ranks.begun(mean_of, x, rollout.mask) for x in means]
        largest, *found = ranks.together(ranks.begun(ranks.each, ratio.where(rollout.mask, 0.0).max()), *asked)
        measured = {
            "mismatch_kl": found[0],
            "mismatch_ratio": found[1],
            "mismatch_largest": torch.stack(largest).amax(),
        }
        if importance is not None:
            cut, mean, before = found[2:]
            measured |= {"importance_cut": cut, "importance_kept": mean / before.clamp(min=1e-12)}
            if self.normalize:
                importance = importance / mean.clamp(min=1e-12)
        return replace(rollout, logp=logp, importance=importance, metrics=rollout.metrics | measured)


class WithoutFlatGroups(Wrapper):
    """Sample until groups with unequal returns fill the rollout's rows (DAPO's dynamic sampling, eq. 11).

    A flat group (equal returns) has no gradient. After `rounds` rollouts, flat groups fill the remaining rows. A group
    that does not fit in whole is masked. Of several ranks, all sample until each has filled its own rows. The inner
    sampler must return rows of the same shape every time. Its rewards
    must not include KL yet, so KLCharged goes outside this wrapper. Metrics are means over the rounds, so the reward
    covers all prompts; `counters` come from the last round. Adds sampling_rounds.
    """

    def __init__(
        self, sample: Sample, rounds: int = 4, counters: tuple[str, ...] = ("steps", "episodes", "completions", "epoch")
    ) -> None:
        super().__init__(sample)
        self.rounds, self.counters = rounds, counters

    def __call__(self, policy: nn.Module) -> Rollout:
        rollouts: list[Rollout] = []
        rows, lively, groups = 1, 0, 0
        while len(rollouts) < self.rounds and ranks.some(lively < rows):
            rollout = self.sample(policy)
            group = rollout.group + groups
            rollouts.append(replace(rollout, group=group))
            flat, most = ranks.together(ranks.begun(_flat, rollout), ranks.begun(ranks.each, int(group.max())))
            rows, groups = len(group), max(most) + 1
            lively += int((~flat).sum())
        drawn = Rollout.join(rollouts)
        order = (drawn.group + groups * _flat(drawn)).argsort(stable=True)  # sorted by group, flat groups last
        filled = drawn.rows(order[:rows])
        cut = torch.isin(filled.group, ranks.gathered(drawn.group[order[rows:]])[0])
        return replace(filled, mask=filled.mask & ~cut.unsqueeze(1), metrics=self._metrics(rollouts))

    def _metrics(self, rollouts: list[Rollout]) -> dict[str, Any]:
        last = rollouts[-1].metrics
        seen = {name: [x.metrics[name] for x in rollouts if name in x.metrics] for x in rollouts for name in x.metrics}
        mean = {name: sum(x) / len(x) for name, x in seen.items()}
        counted = {name: last[name] for name in self.counters if name in last}
        return {**mean, **counted, "sampling_rounds": float(len(rollouts))}


@ranks.collective
def mean_of(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Steps[Float[Tensor, ""]]:
    """The mean of x over the decisions of all ranks."""
    count = mask.to(torch.get_default_dtype()).sum()
    counts, means = zip(*(yield count, average(x, mask.to(count.dtype) / count.clamp(min=1))), strict=True)
    return averaged(counts, means)


@ranks.collective
def _flat(rollout: Rollout) -> Steps[Bool[Tensor, " B"]]:
    """Whether all rows of each row's group have the same return, on whatever ranks they are."""
    (returns, group), own = yield from ranks.begun(ranks.gathered_all, rollout.reward.sum(1), rollout.group)
    return (group_std(returns, group) == 0)[own]
