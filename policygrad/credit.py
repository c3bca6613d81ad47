"""(rollout) -> Credit: the advantage of each decision, and the target of the critic.

Estimates over time see decisions only. A hole in the mask (a step inside an episode that no policy chose) is moved out
of the way first and put back afterwards, so that it adds no value and no discount.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from policygrad import ranks
from policygrad.advantages import group_mean, group_scale, no_baseline, standardize
from policygrad.critics import bootstrap_values, no_fit
from policygrad.errors import UserError
from policygrad.ranks import Steps, added
from policygrad.returns import discount, reward_to_go
from policygrad.returns import vtrace as vtrace_returns
from policygrad.rollout import Batch, Everywhere, Rollout, Split, decisions, holes_last, in_parts, pieces_of
from policygrad.score import log_probabilities, token_ratio
from policygrad.weights import per_token


class Credit(NamedTuple):
    """The advantage of each decision, the critic's target, and the critic's prediction, all [B, T]."""

    advantage: Float[Tensor, "B T"]
    target: Float[Tensor, "B T"]  # 0 without a target
    value: Float[Tensor, "B T"]  # 0 without a critic


class Charged(NamedTuple):
    """Credit, and what the objective's penalty of KL(old, new) counts at each decision, [B, T]."""

    advantage: Float[Tensor, "B T"]
    target: Float[Tensor, "B T"]
    value: Float[Tensor, "B T"]
    charge: Float[Tensor, "B T"]


class Imitating(NamedTuple):
    """Credit, that charge if there is one, and the coefficient of log pi itself at each decision, [B, T]."""

    advantage: Float[Tensor, "B T"]
    target: Float[Tensor, "B T"]
    value: Float[Tensor, "B T"]
    charge: Float[Tensor, "B T"] | tuple[()]
    imitation: Float[Tensor, "B T"]


Assign = Callable[[Rollout], Any]  # a Credit, Charged or Imitating


def credited(rollout: Rollout, weights: Callable[[Tensor], Tensor], assign: Assign) -> Batch:
    """The decisions of a rollout with their weights and credit. What both ask of other ranks goes in one message."""
    rows = ranks.begun(ranks.total, len(rollout.mask) * pieces_of(rollout))
    weight, credit, count = ranks.together(ranks.begun(weights, rollout.mask), ranks.begun(assign, rollout), rows)
    batch = decisions(rollout, weight, *credit)
    return batch if ranks.size() == 1 else batch._replace(everywhere=Everywhere(count))


def baselined(
    returns: Callable[[Tensor, Tensor], Tensor] = reward_to_go,
    baseline: Callable[[Rollout, Tensor], Tensor] = no_baseline,
) -> Assign:
    """A = G - b, target = G, value = b (Williams 1992).

    returns: (reward, ended) -> [B, T], a partial of reward_to_go or trajectory_return. baseline: (rollout, returns) ->
    [B, T], from advantages.py or critics.py.
    """

    @ranks.collective
    def assign(rollout: Rollout) -> Steps[Credit]:
        steps = _Decisions(rollout)
        target = steps.back(returns(steps.reward, steps.ended))
        value = yield from ranks.begun(baseline, rollout, target)
        return Credit(target - value, target, value)

    assign.whole_episodes = True  # type: ignore[attr-defined]
    return _reading(assign, **_modules_in(baseline))


def bootstrapped(
    critic: nn.Module,
    estimate: Callable[..., Tensor],
    *,
    of_critic: Callable[..., Tensor] | None = None,
    micro_batch: Split = None,
) -> Assign:
    """A = estimate(reward, value, terminated, ended), target = A + V, value = V.

    estimate: a partial of gae, n_step_advantage or monte_carlo_advantage that takes these four arrays. The value is
    [B, T + 1], the others are [B, T]. of_critic: the estimate that the target is made of, if that is another (the
    decoupled GAE of VC-PPO and VAPO, arXiv 2504.05118). micro_batch: rows that the critic computes at a time.
    """

    def assign(rollout: Rollout) -> Credit:
        value = bootstrap_values(critic, rollout, micro_batch)
        steps = _Decisions(rollout)
        arrays = steps.reward, steps.values(value), steps.terminated, steps.ended
        advantage = steps.back(estimate(*arrays))
        error = advantage if of_critic is None else steps.back(of_critic(*arrays))
        return Credit(advantage, error + value[:, :-1], value[:, :-1])

    return _reading(assign, critic=critic)


def vtrace(
    policy: nn.Module,
    critic: nn.Module,
    *,
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
    micro_batch: Split = None,
) -> Assign:
    """V-trace (IMPALA, Espeholt et al. 2018, eq. 1): credit for the current policy from an older policy's steps."""

    def assign(rollout: Rollout) -> Credit:
        value = bootstrap_values(critic, rollout, micro_batch)
        logp = log_probabilities(policy, rollout, micro_batch)
        ratio = token_ratio(logp, rollout.logp, rollout.mask)
        steps = _Decisions(rollout)
        arrays = steps.reward, steps.values(value), steps.terminated, steps.ended, steps.of(ratio)
        target, advantage = vtrace_returns(*arrays, gamma, lam, rho_bar, c_bar)
        return Credit(steps.back(advantage), steps.back(target), value[:, :-1])

    return _reading(assign, policy=policy, critic=critic)


def grouped(
    baseline: Callable[[Tensor, Tensor], Tensor] = group_mean, scale: Callable[[Tensor, Tensor], Tensor] = group_scale
) -> Assign:
    """A_it = (R_i - b_i) / s_i, with R_i the sum of row i's rewards. All decisions of a row have the same advantage.

    baseline and scale: (returns [B], group [B]) -> [B]. group_mean and group_scale give GRPO (arXiv 2402.03300,
    section 4.1.2); leave_one_out and unit_scale give RLOO (arXiv 2402.14740, eq. 8). A group may have rows on several
    ranks. Raises UserError if every row is a group of its own.
    """

    @ranks.collective
    def assign(rollout: Rollout) -> Steps[Credit]:
        columns = (rollout.group, rollout.mask.any(1), rollout.reward.sum(1))
        (group, counts, returns), own = yield from ranks.begun(ranks.gathered_all, *columns)
        if _are_single(group, counts):
            raise UserError(
                "every row is a group of its own, and there is no other return to compare it with: make groups, with "
                "Sampler(..., whole_episodes=True, groups=4) or several completions of each prompt"
            )
        advantage = ((returns - baseline(returns, group)) / scale(returns, group))[own]
        nothing = torch.zeros_like(rollout.reward)
        return Credit(advantage.unsqueeze(1).expand_as(rollout.reward), nothing, nothing)

    return assign


def demonstrated(rollout: Rollout) -> Credit:
    """A = 1, for actions of a demonstrator: the gradient of log pi A is that of their log-likelihood."""
    nothing = torch.zeros_like(rollout.reward)
    return Credit(torch.ones_like(nothing), nothing, nothing)


def _are_single(group: Int[Tensor, " B"], counts: Bool[Tensor, " B"]) -> bool:
    """Whether every row counts and is a group of its own. torch.vmap, which knows no values, is not asked."""
    if torch._C._functorch.is_functorch_wrapped_tensor(group):
        return False
    return len(group.unique()) == len(group) and bool(counts.all())


def standardized(assign: Assign, normalize: Callable[[Tensor, Tensor], Tensor] = standardize) -> Assign:
    """The same credit, its advantage standardized over all decisions of the rollout (REINFORCE++ standardizes G)."""

    @ranks.collective
    def normalized(rollout: Rollout) -> Steps[Credit]:
        credit = yield from ranks.begun(assign, rollout)
        advantage = yield from ranks.begun(normalize, credit.advantage, rollout.mask)
        return credit._replace(advantage=advantage)

    return _like(assign, normalized)


def discounted(assign: Assign, gamma: float) -> Assign:
    """The same credit, its advantage multiplied by gamma^t, a factor that is usually dropped (see returns.discount)."""

    @ranks.collective
    def weighed(rollout: Rollout) -> Steps[Credit]:
        credit = yield from ranks.begun(assign, rollout)
        advantage = credit.advantage
        return credit._replace(advantage=advantage * discount(rollout.mask, rollout.ended, gamma, advantage.dtype))

    return _like(assign, weighed)


def selected(assign: Assign, keep: Callable[[Rollout], Tensor]) -> Assign:
    """The same credit, with an advantage of 0 where `keep` [B, T] is False: nothing is learned from those decisions."""

    @ranks.collective
    def chosen(rollout: Rollout) -> Steps[Credit]:
        credit, kept = yield from ranks.joined(ranks.begun(assign, rollout), ranks.begun(keep, rollout))
        return credit._replace(advantage=credit.advantage.where(kept, 0.0))

    return _like(assign, chosen)


@ranks.collective
def covariance(rollout: Rollout, advantage: Float[Tensor, "B T"]) -> Steps[Float[Tensor, "B T"]]:
    """(A - mean A) (log pi - mean log pi), of the policy that sampled; the means are over all decisions, of all ranks.

    Its mean is the covariance that drives the entropy down at a policy-gradient step (Cui et al. 2025, arXiv
    2505.22617, section 3): likely actions that were good, and unlikely ones that were bad. 0 behind the mask.
    """
    both = advantage, rollout.logp
    counts, *sums = zip(*(yield rollout.mask.sum(), *(x.where(rollout.mask, 0.0).sum() for x in both)), strict=True)
    count = added(counts).clamp(min=1)
    first, second = (x - added(seen) / count for x, seen in zip(both, sums, strict=True))
    return (first * second).where(rollout.mask, 0.0)


def covariance_thinned(assign: Assign, *, low: float, high: float, share: float) -> Assign:
    """The same credit, its advantage weakened where low < covariance < high (Clip-Cov, arXiv 2505.22617, section 4).

    The paper draws k = max(1, floor(share N)) of the N decisions at random among the n whose covariance is between the
    bounds, and takes their gradient away. Here the advantage of all n is multiplied by 1 - min(k, n) / n, the
    probability of not being drawn: the same gradient on average, without the noise of the draw.
    """

    @ranks.collective
    def thinned(rollout: Rollout) -> Steps[Credit]:
        credit = yield from ranks.begun(assign, rollout)
        found = yield from ranks.begun(covariance, rollout, credit.advantage)
        within = (found > low) & (found < high) & rollout.mask
        drawn, count = map(added, zip(*(yield rollout.mask.sum(), within.sum()), strict=True))
        drawn = _share_of(drawn, share)
        kept = 1 - drawn.minimum(count) / count.clamp(min=1)
        return credit._replace(advantage=torch.where(within, kept * credit.advantage, credit.advantage))

    return _like(assign, thinned)


def covariance_charged(assign: Assign, *, share: float) -> Assign:
    """The same credit, with a charge of 1 at the k = max(1, floor(share N)) of N decisions whose covariance is largest,
    and 0 at the others (KL-Cov, arXiv 2505.22617, section 4). Of those that are equal to rounding all are charged.
    """

    @ranks.collective
    def charged(rollout: Rollout) -> Steps[Charged]:
        credit = yield from ranks.begun(assign, rollout)
        found = yield from ranks.begun(covariance, rollout, credit.advantage)
        found = found.where(rollout.mask, -torch.inf)
        whole, counts = zip(*(yield found.flatten(), rollout.mask.sum()), strict=True)
        least = _largest(torch.cat(whole), _share_of(added(counts), share))
        charge = ((found >= least) & rollout.mask).to(credit.advantage.dtype)
        return Charged(credit.advantage, credit.target, credit.value, charge)

    return _like(assign, charged)


def imitating(assign: Assign, *, weight: float, weights: Callable[[Tensor], Tensor] = per_token) -> Assign:
    """The same credit, and c = weight 1[R > 0] / sum w 1[R > 0] as the coefficient of log pi at each decision.

    R is the return of its row and w the weight of a decision, so that the objective gains weight times the mean of
    log pi over the decisions of the rows that were right (VAPO's positive-example language-model loss, arXiv
    2504.05118, section 4.3, by token). 0 where no row was right. weights: those of the method's loop.
    """

    @ranks.collective
    def with_imitation(rollout: Rollout) -> Steps[Imitating]:
        credit, each = yield from ranks.joined(ranks.begun(assign, rollout), ranks.begun(weights, rollout.mask))
        each = each if rollout.importance is None else each * rollout.importance
        right = (rollout.reward.sum(1, keepdim=True) > 0) & rollout.mask
        total = added((yield each.where(right, 0.0).sum()))
        coefficient = torch.where(right & (total > 0), weight / total, 0.0).to(credit.advantage.dtype)
        charge = getattr(credit, "charge", ())
        return Imitating(credit.advantage, credit.target, credit.value, charge, coefficient)

    return _like(assign, with_imitation)


def _share_of(count: Int[Tensor, ""], share: float) -> Int[Tensor, ""]:
    """max(1, floor(share N)) of N decisions."""
    return (share * count).floor().long().clamp(min=1)


def _largest(x: Float[Tensor, " N"], count: Int[Tensor, ""]) -> Float[Tensor, "1"]:
    """The count-th largest of x, less what rounding makes of equal ones.

    The completions of a prompt begin at the same state. What is computed there differs in its last bits with the rows
    beside it, and where the limit falls among equal ones, only some of them would be above it.
    """
    least = x.sort(descending=True).values.gather(0, (count - 1).reshape(1))
    return least - 16 * torch.finfo(x.dtype).eps * (1 + least.abs())


@ranks.collective
def high_entropy(
    rollout: Rollout, *, policy: nn.Module, share: float, micro_batch: Split = None
) -> Steps[Bool[Tensor, "B T"]]:
    """Where H(pi(.|s)) is among the largest `share` of the rollout's decisions (Wang et al. 2025, arXiv 2506.01939).

    The paper finds that the forks of a chain of thought, the fifth of its tokens with the most entropy, teach it all.
    The number is rounded up; of entropies that are equal to rounding all are kept.
    """
    with torch.no_grad():
        entropy = in_parts(lambda obs: policy(obs).entropy(), micro_batch, rollout.obs)
    counted, counts = zip(*(yield entropy.where(rollout.mask, -torch.inf).flatten(), rollout.mask.sum()), strict=True)
    count = (share * added(counts)).ceil().long().clamp(min=1)
    return (entropy >= _largest(torch.cat(counted), count)) & rollout.mask


def modules_of(assign: Assign) -> dict[str, nn.Module]:
    """The policy and the critic that the credit reads, by these names, as far as it was made here."""
    return getattr(assign, "modules", {})


def check_modules(assign: Assign, objective: Any, fit: Any) -> None:
    """Raise UserError if the credit reads another policy or critic than the one that learns, or one that never does."""
    for name, module in modules_of(assign).items():
        learning = getattr(objective, name, None) or getattr(fit, name, None)
        own = set(module.parameters())
        if learning is not None and own != set(learning.parameters()):
            raise UserError(f"the credit reads another {name} than the one that learns: hand the same module to both")
        if learning is None and fit is no_fit and any(p.requires_grad for p in own):
            raise UserError(
                f"the credit reads a {name} that never learns: fit it with fit=fit_critic(critic, optimizer), "
                "give it to the objective, or freeze it with requires_grad_(False)"
            )


def check_rows(sample: Any, assign: Assign) -> None:
    """Raise UserError if a return ends with its row, and the sampler says that its rows end inside episodes."""
    while hasattr(sample, "sample"):  # a wrapper
        sample = sample.sample
    if getattr(assign, "whole_episodes", False) and not getattr(sample, "whole_episodes", True):
        raise UserError(
            "the credit is the return of a row, and the sampler's rows end inside episodes: make the Sampler with "
            "whole_episodes=True, or take credit that bootstraps (gae)"
        )


def _like(assign: Assign, changed: Assign) -> Assign:
    """Changed credit, which says of itself what the original does."""
    names = ("modules", "whole_episodes")
    changed.__dict__.update({name: x for name, x in getattr(assign, "__dict__", {}).items() if name in names})
    return changed


def _reading(assign: Assign, **modules: nn.Module) -> Assign:
    """The same credit, which says what modules it reads."""
    assign.modules = modules  # type: ignore[attr-defined]
    return assign


def _modules_in(baseline: Callable[..., Tensor]) -> dict[str, nn.Module]:
    """The modules that a partial holds by their names."""
    return {name: x for name, x in getattr(baseline, "keywords", {}).items() if isinstance(x, nn.Module)}


class _Decisions:
    """A rollout's arrays with each row's holes moved to its end, and the way to put them back."""

    def __init__(self, rollout: Rollout) -> None:
        self.order = holes_last(rollout.mask, rollout.ended)
        self.of = partial(torch.gather, dim=1, index=self.order)
        self.reward, self.terminated, ended = map(self.of, (rollout.reward, rollout.terminated, rollout.ended))
        self.hole = self.of(~(rollout.mask | rollout.ended))
        # The holes are now at the row's end, so the row ends before them.
        self.ended = ended | torch.cat([self.hole[:, 1:], torch.zeros_like(self.hole[:, :1])], 1)

    def values(self, value: Float[Tensor, "B steps"]) -> Float[Tensor, "B steps"]:
        """V of each remaining step, then V of the state after the row's last decision."""
        return torch.cat([self.of(value[:, :-1]).where(~self.hole, value[:, -1:]), value[:, -1:]], 1)

    def back(self, x: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Each step's number at its original place. A hole's number is masked."""
        return torch.zeros_like(x).scatter(1, self.order, x)
