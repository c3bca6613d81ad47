"""The worlds that rows are measured on, and a row of what the table of methods makes of some options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from policygrad.algorithms.grpo import Anchor
from policygrad.credit import Assign
from policygrad.divergences import AdaptiveCoefficient
from policygrad.exact.closed_form import policy_gradient, state_value
from policygrad.exact.enumeration import batches, in_succession, trajectories, with_holes
from policygrad.exact.policies import BlindPolicy, SoftmaxPolicy, TabularCritic, probabilities, score_table, tabular
from policygrad.exact.sampler import EpisodeSampler
from policygrad.exact.tokens import OnPrefixes, TokenWorld, completions, groups, prefix_state, tree
from policygrad.exact.worlds import World, bandit, chain, cliff, garnet, with_clock
from policygrad.rollout import Rollout
from policygrad.train.compose import WEIGHTS, credit_of, objective_of
from policygrad.train.options import compares_groups, options_of
from policygrad.verify.statistics import BATCH, Experience, Row, enumerated, unordered

NAMES = ("random", "chain", "bandit", "cliff")  # of control
GROUP = 3  # completions of a prompt that are compared


@dataclass(frozen=True)
class Setting:
    """A world, a policy at which the gradient is taken, the older one that sampled for it, and what they did.

    On sequences of tokens the world is the tree of prefixes, and the policy sees the row of tokens so far.
    """

    name: str
    world: World
    table: SoftmaxPolicy  # the policy on the world's states
    table_old: SoftmaxPolicy
    on_policy: Experience
    off_policy: Experience
    horizon: int | None = None  # where a time limit cuts what is seen; None if the world itself ends
    tokens: TokenWorld | None = None
    table_ref: SoftmaxPolicy | None = None

    @property
    def probs(self) -> Tensor:
        return probabilities(self.table).detach()

    @property
    def probs_old(self) -> Tensor:
        return probabilities(self.table_old).detach()

    @property
    def scores(self) -> Tensor:
        return score_table(self.table.features, self.probs)

    @property
    def value(self) -> Tensor:
        return state_value(self.world, self.probs)

    @property
    def wrong_value(self) -> Tensor:
        """A critic that is wrong everywhere, each state by another amount, the state 0 of the padding among them."""
        return self.value + torch.linspace(1.0, -1.0, len(self.world.start))

    @property
    def gradient(self) -> Tensor:
        """grad J."""
        return policy_gradient(self.world, self.probs, self.scores)

    def seen(self, module: nn.Module) -> nn.Module:
        """A policy or critic of states as one of what is observed."""
        return module if self.tokens is None else OnPrefixes(self.tokens, module)

    def critic(self, value: Tensor) -> nn.Module:
        """A critic of these values."""
        return self.seen(TabularCritic(value))

    def states(self, rollout: Rollout) -> Tensor:
        """The state of the world at every step [B, T]."""
        return rollout.obs if self.tokens is None else prefix_state(self.tokens, rollout.obs)


def options_for(at: Setting, method: str, **values: Any) -> Any:
    """A method's options with some of them set, with the world's discount, and averaging by episode if not told."""
    return replace(options_of(method, "exact")(), **({"gamma": at.world.gamma, "weights": "episode"} | values))


def row_of(
    at: Setting,
    name: str,
    method: str,
    critic: Tensor | None = None,
    *,
    assign: Assign | None = None,
    anchor: Anchor | None = None,
    expected: Tensor | None = None,
    reason: str = "",
    size: int = 1,
    off_policy: bool = False,
    **values: Any,
) -> Row:
    """A row of the credit, objective and weights that a method has with some of its options set.

    critic: its values. assign, anchor: the credit and the KL to a reference, in place of the options'.
    """
    options = options_for(at, method, **values)
    policy, valued = at.seen(at.table), None if critic is None else at.critic(critic)
    coefficients = {"kl_old": AdaptiveCoefficient(options.kl_old_coefficient)} if "kl_old_coefficient" in values else {}
    if anchor is not None:
        coefficients["kl_ref"] = AdaptiveCoefficient(1.0)
    return Row(
        name,
        assign or credit_of(options, policy, valued),
        objective_of(options, policy, valued, coefficients, anchor),
        WEIGHTS[options.weights],
        size,
        expected=expected,
        reason=reason,
        experience=at.off_policy if off_policy else at.on_policy,
    )


def of_size(at: Setting, options: Any, off_policy: bool, size: int) -> Experience:
    """What was sampled, in batches of completions of one prompt only where the credit compares them."""
    experience = at.off_policy if off_policy else at.on_policy
    if at.tokens is None or compares_groups(options) or size == 1:
        return experience
    return enumerated(experience.rollout, experience.batches(1)[1])


# The worlds


def setting_of(name: str, samples: int, seed: int) -> Setting:
    """The world of control of that name with its two policies, enumerated, or sampled if it is the cliff."""
    if name == "bandit":
        rewards = torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))
        return listed(name, bandit(rewards), 1, seed)
    if name == "chain":
        return listed(name, with_clock(chain(3), 3), 3, seed)
    if name == "random":
        return listed(name, with_clock(garnet(termination=0.1, seed=seed), 3), 3, seed)
    horizon = 12
    world = with_clock(cliff(3, 4, gamma=0.9, fall=-10.0), horizon)
    policy, old = (BlindPolicy(tabular(12, 4), horizon, theta) for theta in _two_policies(48, seed))
    on, off = (_sampled(world, p, horizon, samples, seed) for p in (policy, old))
    return Setting(name, world, policy, old, on, off)


def listed(
    name: str,
    world: World,
    horizon: int,
    seed: int,
    cut: bool = False,
    features: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Setting:
    """A world of which all trajectories are listed. cut: a time limit ends them, not the world.

    features, allowed: of the policy; by default each state has parameters of its own, and allows all actions.
    """
    features = tabular(*world.reward.shape) if features is None else features
    policy, old = (SoftmaxPolicy(features, theta, allowed) for theta in _two_policies(features.shape[-1], seed))
    on, off = (enumerated(*trajectories(world, probabilities(p), horizon)) for p in (policy, old))
    return Setting(name, world, policy, old, on, off, horizon if cut else None)


def token_setting(seed: int) -> Setting:
    """Two prompts, completions of at most three of three tokens, and three policies: current, old, reference.

    The reward is arbitrary, drawn with the seed; some completions of a prompt share theirs.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, 4, 3, 3, 3, generator=generator).mul(2).round().div(2)
    tokens = TokenWorld(2, 3, 3, lambda x, y: float(drawn[(x, len(y), *y, *[0] * (3 - len(y)))]))
    world = tree(tokens)
    features = tabular(*world.reward.shape)
    theta, away, further = torch.randn(3, features.shape[-1], generator=generator)
    policy, old = (SoftmaxPolicy(features, 0.7 * theta + 0.3 * far) for far in (torch.zeros_like(away), away))
    reference = SoftmaxPolicy(features, 0.7 * theta + 0.5 * further).requires_grad_(False)

    on, off = (_completions(tokens, p) for p in (policy, old))
    return Setting("tokens", world, policy, old, on, off, None, tokens, reference)


def paid_by_token(seed: int) -> Setting:
    """The same completions, with a reward at every token and discounted ones: r(x, y_<t, y_t), drawn with the seed."""
    at = token_setting(seed)
    drawn = torch.randn(at.world.reward.shape, generator=torch.Generator().manual_seed(seed))
    world = replace(at.world, reward=drawn, gamma=0.9)

    def paid(experience: Experience) -> Experience:
        rollout = experience.rollout
        reward = drawn[at.states(rollout), rollout.action].where(rollout.mask, 0.0)
        return replace(experience, rollout=replace(rollout, reward=reward))

    return replace(
        at, name="tokens, paid by token", world=world, on_policy=paid(at.on_policy), off_policy=paid(at.off_policy)
    )


def listing(at: Setting, policy: SoftmaxPolicy) -> Experience:
    """All that a policy of the world's states does there; the world ends by itself."""
    if at.tokens is not None:
        return _completions(at.tokens, policy)
    return enumerated(*trajectories(at.world, probabilities(policy), at.on_policy.rollout.mask.shape[1]))


def _completions(tokens: TokenWorld, policy: SoftmaxPolicy) -> Experience:
    rollout, probability = completions(tokens, probabilities(policy))
    return Experience(rollout, lambda size: unordered(*groups(rollout, probability, size)))


def in_pairs(at: Setting, name: str) -> Setting:
    """Rows of two episodes, one after the other: what they expect is twice what one does."""
    index, probability = batches(at.on_policy.batches(1)[1], 2)
    return replace(at, name=name, on_policy=enumerated(in_succession(at.on_policy.rollout, index), probability))


def holed(at: Setting, name: str, hole: int | None = None, open_end: bool = False) -> Setting:
    """The same rows with holes in them. open_end: a row that the time limit cut has no end of its own."""

    def changed(experience: Experience) -> Experience:
        rollout = experience.rollout
        rollout = replace(rollout, ended=rollout.terminated) if open_end else rollout
        return replace(experience, rollout=with_holes(rollout, hole=hole))

    return replace(at, name=name, on_policy=changed(at.on_policy), off_policy=changed(at.off_policy))


def _two_policies(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """theta of a policy with preferences, and of one far enough away that ratios are clipped on both sides."""
    theta, away = torch.randn(2, size, generator=torch.Generator().manual_seed(seed))
    return 0.7 * theta, 0.7 * theta + 0.3 * away


def _sampled(world: World, policy: nn.Module, horizon: int, samples: int, seed: int) -> Experience:
    rollout = EpisodeSampler(world, samples, horizon, seed)(policy)

    def split(size: int) -> tuple[Tensor, Tensor]:
        size = BATCH if size > 1 else 1
        index = torch.arange(samples // size * size).view(-1, size)
        return index, torch.full((len(index),), 1 / len(index))

    return Experience(rollout, split, enumerated=False)
