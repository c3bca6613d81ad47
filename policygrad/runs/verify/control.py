"""The estimators of control, each put together from the library's functions as its algorithm does, and what it expects.

Every row estimates grad J of the discounted J. What a row expects comes from exact/, which shares no line with the
functions under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from policygrad.advantages import (
    gae,
    mean_baseline,
    monte_carlo_advantage,
    n_step_advantage,
    no_baseline,
    time_mean_baseline,
)
from policygrad.algorithms.actor_critic import actor_critic, off_policy_actor_critic
from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.reinforce import reinforce
from policygrad.algorithms.trpo import trpo
from policygrad.critics import bootstrap_values, optimal_baseline, value_baseline
from policygrad.divergences import k3
from policygrad.exact.closed_form import (
    action_value,
    advantage,
    policy_gradient,
    state_value,
    visitation,
    weighted_gradient,
)
from policygrad.exact.enumeration import batches, in_succession, trajectories
from policygrad.exact.expected import gae_credit, n_step_credit, td_credit, vtrace_credit
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, blind_to_time, probabilities, score_table, tabular
from policygrad.exact.sampler import EpisodeSampler
from policygrad.exact.worlds import World, bandit, chain, cliff, garnet, termination, with_clock
from policygrad.linalg import flat_gradient
from policygrad.objectives import clipped_surrogate, clipped_weight, surrogate
from policygrad.returns import discount, lambda_return, reward_to_go, trajectory_return, vtrace
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.runs.verify.statistics import BATCH, Estimator, Experience, Moments
from policygrad.score import score, token_ratio
from policygrad.weights import average, per_episode

CLIP = (0.1, 0.2)  # two numbers, so that an exchange shows

LEANS = "leans on the critic"
TWICE = "gamma^t counted twice"
NO_DISCOUNT = "gamma^t dropped (Nota & Thomas)"
OLD_STATES = "states of the old policy (Degris)"
CLIPPED = "old states, ratio clipped"


@dataclass(frozen=True)
class Setting:
    """A world, a policy at which the gradient is taken, the older one that sampled for it, and what they did."""

    name: str
    world: World
    policy: SoftmaxPolicy
    old: SoftmaxPolicy
    on_policy: Experience
    off_policy: Experience
    horizon: int | None = None  # where a time limit cuts what is seen; None if the world itself ends

    @property
    def probs(self) -> Tensor:
        return probabilities(self.policy).detach()

    @property
    def probs_old(self) -> Tensor:
        return probabilities(self.old).detach()

    @property
    def scores(self) -> Tensor:
        return score_table(self.policy.features, self.probs)

    @property
    def wrong_value(self) -> Tensor:
        """A critic that is wrong everywhere, each state by another amount, the state 0 of the padding among them."""
        return state_value(self.world, self.probs) + torch.linspace(1.0, -1.0, len(self.world.start))


# The worlds


def setting_of(name: str, samples: int, seed: int) -> Setting:
    """The world of that name with its two policies, enumerated, or sampled if it is the cliff."""
    if name == "bandit":
        rewards = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        return _enumerated(name, bandit(rewards), 1, seed)
    if name == "chain":
        return _enumerated(name, with_clock(chain(3), 3), 3, seed)
    if name == "random":
        return _enumerated(name, with_clock(garnet(termination=0.1, seed=seed), 3), 3, seed)
    horizon = 12
    features = blind_to_time(tabular(12, 4), horizon)
    world = with_clock(cliff(3, 4, gamma=0.9, fall=-10.0), horizon)
    policy, old = _policies(features, seed)
    on, off = (_sampled(world, p, horizon, samples, seed) for p in (policy, old))
    return Setting(name, world, policy, old, on, off)


def _policies(features: Tensor, seed: int) -> tuple[SoftmaxPolicy, SoftmaxPolicy]:
    """A policy with preferences, and one a little away from it: far enough that ratios are clipped, on both sides."""
    generator = torch.Generator().manual_seed(seed)
    theta, away = torch.randn(2, features.shape[-1], generator=generator) * torch.tensor([[0.7], [0.3]])
    return SoftmaxPolicy(features, theta), SoftmaxPolicy(features, theta + away)


def _enumerated(name: str, world: World, horizon: int, seed: int, cut: bool = False) -> Setting:
    policy, old = _policies(tabular(*world.reward.shape), seed)
    seen = []
    for p in (policy, old):
        rollout, probability = trajectories(world, probabilities(p), horizon)
        seen.append(Experience(rollout, partial(batches, probability), enumerated=True))
    return Setting(name, world, policy, old, seen[0], seen[1], horizon if cut else None)


def _sampled(world: World, policy: nn.Module, horizon: int, samples: int, seed: int) -> Experience:
    rollout = EpisodeSampler(world, samples, horizon, seed)(policy)

    def split(size: int) -> tuple[Tensor, Tensor]:
        size = BATCH if size > 1 else 1
        index = torch.arange(samples // size * size).view(-1, size)
        return index, torch.full((len(index),), 1 / len(index))

    return Experience(rollout, split, enumerated=False)


# The estimators, as the algorithms put them together


def _score_gain(policy: Callable[[Any], Any], rollout: Rollout, credit: Tensor) -> Tensor:
    batch = decisions(rollout, per_episode(rollout.mask), credit)
    return average(score(policy(batch.obs).log_prob(batch.action), batch.advantage), batch.weight)


def _reinforce(
    policy: Callable[[Any], Any],
    rollout: Rollout,
    *,
    gamma: float,
    returns: Callable[..., Tensor],
    baseline: Callable[[Rollout, Tensor], Tensor],
    discounted: bool,
) -> Tensor:
    target = returns(rollout.reward, rollout.ended, gamma)
    credit = target - baseline(rollout, target)
    if discounted:
        credit = credit * discount(rollout.mask, rollout.ended, gamma)
    return _score_gain(policy, rollout, credit)


def _actor_critic(
    policy: Callable[[Any], Any],
    rollout: Rollout,
    *,
    gamma: float,
    critic: nn.Module,
    advantages: Callable[..., Tensor],
    discounted: bool = True,
) -> Tensor:
    value = bootstrap_values(critic, rollout)
    credit = advantages(rollout.reward, value, rollout.terminated, rollout.ended, gamma)
    if discounted:
        credit = credit * discount(rollout.mask, rollout.ended, gamma)
    return _score_gain(policy, rollout, credit)


def _td_lambda(reward: Tensor, value: Tensor, terminated: Tensor, ended: Tensor, gamma: float, lam: float) -> Tensor:
    return lambda_return(reward, value, terminated, ended, gamma, lam) - value[:, :-1]


def _vtrace(
    policy: Callable[[Any], Any],
    rollout: Rollout,
    *,
    gamma: float,
    critic: nn.Module,
    lam: float,
    rho_bar: float,
    c_bar: float,
) -> Tensor:
    value = bootstrap_values(critic, rollout)
    logp = policy(rollout.obs).log_prob(rollout.action).detach()
    ratio = token_ratio(logp, rollout.logp, rollout.mask)
    arrays = rollout.reward, value, rollout.terminated, rollout.ended
    credit = vtrace(*arrays, ratio, gamma, lam, rho_bar, c_bar)[1]
    return _score_gain(policy, rollout, credit * discount(rollout.mask, rollout.ended, gamma))


def _ratio_gain(
    policy: Callable[[Any], Any],
    rollout: Rollout,
    *,
    gamma: float,
    critic: nn.Module,
    lam: float,
    gain: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The form of TRPO and PPO: gain(logp, logp_old, ratio, advantage), with gamma^t in the advantage."""
    value = bootstrap_values(critic, rollout)
    credit = gae(rollout.reward, value, rollout.terminated, rollout.ended, gamma, lam)
    credit = credit * discount(rollout.mask, rollout.ended, gamma)
    batch = decisions(rollout, per_episode(rollout.mask), credit)
    logp = policy(batch.obs).log_prob(batch.action)
    ratio = token_ratio(logp, batch.logp, batch.mask)
    return average(gain(logp, batch.logp, ratio, batch.advantage), batch.weight)


# The table


def reinforce_rows(at: Setting) -> list[Estimator]:
    """REINFORCE: whole return or reward-to-go, each baseline, with and without gamma^t."""
    gamma, world, critic = at.world.gamma, at.world, TabularCritic(state_value(at.world, at.probs))
    q = action_value(world, at.probs)

    def follows(rate: float) -> Tensor:
        return weighted_gradient(visitation(world, at.probs, rate), at.probs, q, at.scores)

    def row(name: str, rows: int = 1, expected: Tensor | None = None, reason: str = "", **options: Any) -> Estimator:
        chosen: dict[str, Any] = {"returns": reward_to_go, "baseline": no_baseline, "discounted": True} | options
        gain = partial(_reinforce, gamma=gamma, **chosen)
        return Estimator(f"REINFORCE, {name}", gain, rows, expected=expected, reason=reason, any_rows=rows > 1)

    whole: dict[str, Any] = {"returns": trajectory_return, "discounted": False}
    learned = partial(value_baseline, critic=critic)
    wrong = partial(value_baseline, critic=TabularCritic(at.wrong_value))
    optimal = partial(optimal_baseline, policy=at.policy)
    return [
        row("whole return", **whole),
        row("whole return, mean baseline", 2, baseline=mean_baseline, **whole),
        row("whole return, optimal baseline", 2, baseline=optimal, **whole),
        row("whole return, with gamma^t", 1, follows(gamma**2), TWICE, returns=trajectory_return),
        row("reward-to-go"),
        row("reward-to-go, mean baseline", 2, baseline=mean_baseline),
        row("reward-to-go, time-mean baseline", 2, baseline=time_mean_baseline),
        row("reward-to-go, optimal baseline", 2, baseline=optimal),
        row("reward-to-go, baseline V", baseline=learned),
        row("reward-to-go, wrong baseline", baseline=wrong),
        row("reward-to-go, without gamma^t", 1, follows(1.0), NO_DISCOUNT, discounted=False),
        row("reward-to-go, V, without gamma^t", 1, follows(1.0), NO_DISCOUNT, discounted=False, baseline=learned),
        row(
            "reward-to-go, mean, without gamma^t",
            2,
            follows(1.0),
            NO_DISCOUNT,
            discounted=False,
            baseline=mean_baseline,
        ),
    ]


def actor_critic_rows(at: Setting) -> list[Estimator]:
    """A2C: TD(1), n-step, TD(lambda) and GAE, each with an exact, a zero and a wrong critic."""
    world, probs = at.world, at.probs
    visits = visitation(world, probs, world.gamma, at.horizon)
    exact = state_value(world, probs)
    critics = {"exact": exact, "zero": torch.zeros_like(exact), "wrong": at.wrong_value}
    kinds: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]] = {
        "TD(1)": (monte_carlo_advantage, lambda v: gae_credit(world, probs, v, 1.0)),
        "1-step": (partial(n_step_advantage, n=1), lambda v: td_credit(world, v)),
        "2-step": (partial(n_step_advantage, n=2), lambda v: n_step_credit(world, probs, v, 2)),
        "TD(0.5)": (partial(_td_lambda, lam=0.5), lambda v: gae_credit(world, probs, v, 0.5)),
        "GAE(0.9)": (partial(gae, lam=0.9), lambda v: gae_credit(world, probs, v, 0.9)),
    }
    table = []
    for kind, (estimate, credit) in kinds.items():
        for name, value in critics.items():
            if at.horizon is not None and name != "exact":
                continue  # where a time limit cuts, the closed forms hold for the exact critic only
            gain = partial(_actor_critic, gamma=world.gamma, critic=TabularCritic(value), advantages=estimate)
            expected = weighted_gradient(visits, probs, credit(value), at.scores)
            table.append(Estimator(f"A2C, {kind}, {name} critic", gain, expected=expected, reason=LEANS))
    gain = partial(
        _actor_critic,
        gamma=world.gamma,
        critic=TabularCritic(exact),
        advantages=partial(gae, lam=0.9),
        discounted=False,
    )
    visits = visitation(world, probs, 1.0, at.horizon)
    expected = weighted_gradient(visits, probs, advantage(world, probs), at.scores)
    return [*table, Estimator("A2C, GAE(0.9), exact, without gamma^t", gain, expected=expected, reason=NO_DISCOUNT)]


def vtrace_rows(at: Setting) -> list[Estimator]:
    """V-trace on and off the policy, clipped and not, with an exact and a wrong critic."""
    world, probs, probs_old = at.world, at.probs, at.probs_old
    exact = state_value(world, probs)
    table = []
    for name, off, value, lam, bar in [
        ("on-policy, exact critic", False, exact, 1.0, 1.0),
        ("on-policy, wrong critic", False, at.wrong_value, 1.0, 1.0),
        ("on-policy, lambda 0.9, wrong critic", False, at.wrong_value, 0.9, 1.0),
        ("off-policy, unclipped, wrong critic", True, at.wrong_value, 1.0, torch.inf),
        ("off-policy, exact critic", True, exact, 1.0, 1.0),
        ("off-policy, lambda 0.9, wrong critic", True, at.wrong_value, 0.9, 1.0),
    ]:
        sampled = probs_old if off else probs
        if at.horizon is not None and (off or name != "on-policy, exact critic"):
            continue
        options: dict[str, Any] = {"lam": lam, "rho_bar": bar, "c_bar": bar}
        credit = vtrace_credit(world, probs, sampled, value, **options)
        expected = weighted_gradient(visitation(world, sampled, world.gamma, at.horizon), sampled, credit, at.scores)
        gain = partial(_vtrace, gamma=world.gamma, critic=TabularCritic(value), **options)
        reason = LEANS if not off else OLD_STATES if bar > 1 else "old states, ratios clipped"
        table.append(Estimator(f"V-trace, {name}", gain, expected=expected, reason=reason, off_policy=off))
    return table


def objective_rows(at: Setting) -> list[Estimator]:
    """The surrogates of TRPO, PPO and CISPO at the old policy, where all agree, and away from it."""
    world, probs, probs_old, gamma = at.world, at.probs, at.probs_old, at.world.gamma

    def clip(logp: Tensor, logp_old: Tensor, ratio: Tensor, credit: Tensor) -> Tensor:
        return clipped_surrogate(ratio, credit, *CLIP)

    def weight(logp: Tensor, logp_old: Tensor, ratio: Tensor, credit: Tensor) -> Tensor:
        return clipped_weight(logp, ratio, credit, *CLIP)

    def plain(logp: Tensor, logp_old: Tensor, ratio: Tensor, credit: Tensor) -> Tensor:
        return surrogate(ratio, credit)

    def penalty(logp: Tensor, logp_old: Tensor, ratio: Tensor, credit: Tensor) -> Tensor:
        return -k3(logp_old, logp)

    value, value_old = state_value(world, probs), state_value(world, probs_old)
    visits_old = visitation(world, probs_old, gamma)
    ratio = probs / probs_old
    # min(r A, clip(r) A) has the gradient r A grad log pi, and none where r is out of bounds in the direction that A
    # rewards. A is here the TD error, whose sign depends on the successor, so the mean is over successors too.
    delta, chance = _td_errors(world, value_old)
    stopped = ((delta > 0) & (ratio > 1 + CLIP[1])[..., None]) | ((delta < 0) & (ratio < 1 - CLIP[0])[..., None])
    kept = (chance * delta.where(~stopped, 0.0)).sum(-1)
    td = (chance * delta).sum(-1)
    local = partial(weighted_gradient, visits_old, probs_old, score=at.scores)
    table: list[tuple[str, Any, bool, Tensor | None, str]] = [
        ("surrogate", plain, False, None, ""),
        ("clipped surrogate", clip, False, None, ""),
    ]
    table += [("clipped weight (CISPO)", weight, False, None, "")]
    table += [("surrogate", plain, True, local(credit=ratio * td), OLD_STATES)]
    table += [("clipped surrogate", clip, True, local(credit=ratio * kept), CLIPPED)]
    table += [
        ("clipped weight (CISPO)", weight, True, local(credit=ratio.clamp(1 - CLIP[0], 1 + CLIP[1]) * td), CLIPPED)
    ]
    rows = []
    for name, gain, off, expected, reason in table:
        critic = TabularCritic(value_old if off else value)
        objective = partial(_ratio_gain, gamma=gamma, critic=critic, lam=0.0, gain=gain)
        where = "away from the old policy" if off else "at the old policy"
        rows.append(Estimator(f"{name}, {where}", objective, expected=expected, reason=reason, off_policy=off))
    # sum_s eta(s) grad KL(old, pi)(s) = -sum_s eta(s) sum_a old(a|s) grad log pi(a|s); eta counts visits, undiscounted.
    toward_old = weighted_gradient(visitation(world, probs_old, 1.0), probs_old, torch.ones_like(probs), at.scores)
    objective = partial(_ratio_gain, gamma=gamma, critic=TabularCritic(value), lam=0.0, gain=penalty)
    name = "KL penalty k3(old, new) of PPO"
    rows.append(Estimator(name, objective, exact=toward_old, of="-grad KL(old, new)", off_policy=True))
    return rows


def _td_errors(world: World, value: Tensor) -> tuple[Tensor, Tensor]:
    """delta of each (s, a, successor), the end last, and the successor's probability: both [S, A, S + 1]."""
    successors = torch.cat([value, torch.zeros(1)])
    delta = world.reward.unsqueeze(-1) + world.gamma * successors - value[:, None, None]
    return delta, torch.cat([world.transition, termination(world).unsqueeze(-1)], -1)


def control_rows(at: Setting) -> list[Estimator]:
    """Every estimator of control."""
    return [*reinforce_rows(at), *actor_critic_rows(at), *vtrace_rows(at), *objective_rows(at)]


def time_limit_rows(seed: int) -> tuple[Setting, list[Estimator], Tensor]:
    """A world without end, cut by a time limit: what was seen is to be credited with what would have come.

    The exact gradient is that of the steps before the limit, with the whole Q.
    """
    at = _enumerated("random, time limit", garnet(seed=seed), 3, seed, cut=True)
    visits = visitation(at.world, at.probs, at.world.gamma, at.horizon)
    exact = weighted_gradient(visits, at.probs, action_value(at.world, at.probs), at.scores)
    return at, [*actor_critic_rows(at), *vtrace_rows(at)], exact


def two_episode_rows(seed: int) -> tuple[Setting, list[Estimator], Tensor]:
    """Rows of two episodes with a masked reset between, each cut by a time limit: twice the gradient of one."""
    at, rows, exact = time_limit_rows(seed)
    return _in_pairs(at, "random, two cut episodes a row"), _doubled(rows), 2 * exact


def two_whole_episode_rows(seed: int) -> tuple[Setting, list[Estimator], Tensor]:
    """The same with episodes that terminate, early ones too."""
    at = setting_of("random", 0, seed)
    rows = [row for row in reinforce_rows(at) if row.rows == 1]
    rows += [*actor_critic_rows(at), *(row for row in vtrace_rows(at) if not row.off_policy)]
    return _in_pairs(at, "random, two episodes a row"), _doubled(rows), 2 * exact_gradient(at)


def _in_pairs(at: Setting, name: str) -> Setting:
    index, probability = at.on_policy.batches(2)
    pairs = in_succession(at.on_policy.rollout, index)

    def each(size: int) -> tuple[Tensor, Tensor]:
        return torch.arange(len(probability)).unsqueeze(1), probability

    return replace(at, name=name, on_policy=Experience(pairs, each, enumerated=True))


def _doubled(rows: list[Estimator]) -> list[Estimator]:
    return [replace(row, expected=None if row.expected is None else 2 * row.expected) for row in rows]


# The algorithms themselves, run once over all trajectories


def algorithm_rows(at: Setting) -> list[tuple[Estimator, Moments]]:
    """What one iteration of each algorithm's own code adds to theta, with all trajectories as its one rollout.

    Each row of the rollout is weighted by its probability, so that the step of rate 1 is the expected step.
    """
    world, probs, policy = at.world, at.probs, at.policy
    undiscounted = visitation(world, probs, 1.0)
    exact = state_value(world, probs)
    dropped = weighted_gradient(undiscounted, probs, action_value(world, probs), at.scores)
    off = weighted_gradient(
        visitation(world, at.probs_old, 1.0),
        at.probs_old,
        vtrace_credit(world, probs, at.probs_old, exact, 1.0, 1.0, 1.0),
        at.scores,
    )
    on, old = (partial(_expected_step, at, source=source) for source in (at.on_policy, at.off_policy))
    common: dict[str, Any] = {"max_grad_norm": torch.inf, "value_coefficient": 0.0, "gamma": world.gamma}
    named = [
        ("reinforce(discounted=True)", None, on(lambda p, c, s, o, w: reinforce(
            p, s, o, gamma=world.gamma, discounted=True, weights=w))),
        ("reinforce()", dropped, on(lambda p, c, s, o, w: reinforce(p, s, o, gamma=world.gamma, weights=w))),
        ("actor_critic()", dropped, on(lambda p, c, s, o, w: actor_critic(p, c, s, o, weights=w, **common))),
        ("off_policy_actor_critic()", off, old(lambda p, c, s, o, w: off_policy_actor_critic(
            p, c, s, o, weights=w, epochs=1, **common))),
        ("ppo(), first step", dropped, on(lambda p, c, s, o, w: ppo(
            p, c, s, o, weights=w, epochs=1, minibatch_size=10**9, normalize_minibatch=_as_it_is, **common))),
        ("trpo(), gradient", dropped, on(lambda p, c, s, o, w: trpo(
            p, c, s, _no_fit, gamma=world.gamma, weights=w, normalize=_as_it_is, step=_plain_step))),
    ]  # fmt: skip
    empty = torch.full((len(policy.theta),) * 2, torch.nan)
    table = []
    for name, expected, step in named:
        reason = "gamma^t dropped, old states" if expected is off else NO_DISCOUNT
        estimator = Estimator(f"{name} as it runs", _nothing, expected=expected, reason=reason)
        table.append((estimator, Moments(step, empty)))
    return table


Run = Callable[..., Any]  # (policy, critic, sample, optimizer, weights) -> the algorithm's generator


def _expected_step(at: Setting, run: Run, source: Experience) -> Tensor:
    """How far one iteration moves theta, with all of the experience as its rollout and a rate of 1."""
    policy = SoftmaxPolicy(at.policy.features, at.policy.theta.detach())
    critic = TabularCritic(state_value(at.world, at.probs))
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=1.0)
    _, probability = source.batches(1)

    def weights(mask: Tensor) -> Tensor:
        return mask * probability.unsqueeze(1)

    next(iter(run(policy, critic, lambda _: source.rollout, optimizer, weights)))
    return (policy.theta - at.policy.theta).detach()


def _plain_step(objective: Any, divergence: Any, batch: Batch, parameters: list[Tensor]) -> dict[str, Tensor]:
    """In the place of TRPO's step: theta <- theta + g, so that its gradient can be seen."""
    gradient = flat_gradient(objective(batch)[0], parameters)
    with torch.no_grad():
        parameters[0].add_(gradient)
    return {}


def _as_it_is(advantage: Tensor, mask: Tensor) -> Tensor:
    return advantage


def _no_fit(batch: Batch) -> dict[str, Tensor]:
    return {}


def _nothing(policy: Callable[[Any], Any], rollout: Rollout) -> Tensor:
    raise NotImplementedError  # the row was measured already


def exact_gradient(at: Setting) -> Tensor:
    """grad J of the setting's world at its policy."""
    return policy_gradient(at.world, at.probs, at.scores)
