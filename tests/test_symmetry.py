"""Every decision and its reflection: the gradient, where the policy is symmetric and where it is not."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.utils._pytree import tree_map

from policygrad.advantages import gae
from policygrad.algorithms.ppo import PPOObjective
from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.control.memory import Rows
from policygrad.credit import bootstrapped
from policygrad.errors import UserError
from policygrad.exact.closed_form import action_value, policy_gradient, state_value, visitation, weighted_gradient
from policygrad.exact.enumeration import trajectories
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, score_table, tabular
from policygrad.exact.worlds import World, garnet, with_clock
from policygrad.linalg import flat_gradient
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.symmetry import mirrored

STATES, ACTIONS, STEPS = 3, 3, 2
OF_STATE = torch.tensor([1, 0, 2])  # the reflection exchanges the first two states and the first two actions
OF_ACTION = torch.tensor([1, 0, 2])
CLOCKED = torch.cat([OF_STATE + STATES * t for t in range(STEPS)])


def mirror(obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    return CLOCKED[obs], OF_ACTION[action]


def symmetric_world() -> World:
    """A random world, half itself and half its reflection, undiscounted and two steps long."""
    drawn = garnet(STATES, ACTIONS, 2, gamma=1.0, seed=3)
    transition = drawn.transition + drawn.transition[OF_STATE][:, OF_ACTION][:, :, OF_STATE]
    reward = drawn.reward + drawn.reward[OF_STATE][:, OF_ACTION]
    start = drawn.start + drawn.start[OF_STATE]
    return with_clock(World(transition / 2, reward / 2, start / 2, 1.0), STEPS)


def reflected(table: Tensor) -> Tensor:
    return table[CLOCKED][:, OF_ACTION]


def logits(symmetric: bool) -> Tensor:
    drawn = 2 * torch.randn(STATES * STEPS, ACTIONS, generator=torch.Generator().manual_seed(5))
    return (drawn + reflected(drawn)) / 2 if symmetric else drawn


class Symmetrized(SoftmaxPolicy):
    """The same parameters as a policy that is symmetric whatever they are: logits are reflected, and the mean taken."""

    def logits(self) -> Tensor:
        of_itself = super().logits()
        return (of_itself + reflected(of_itself)) / 2


def batch_of(policy: SoftmaxPolicy, world: World) -> tuple[Rollout, Tensor, Batch]:
    """All trajectories, each weighed by its probability, with the credit of an exact critic."""
    rollout, probability = trajectories(world, probabilities(policy), STEPS)
    critic = TabularCritic(state_value(world, probabilities(policy).detach()))
    weight = probability.unsqueeze(1) * rollout.mask
    found = bootstrapped(critic, partial(gae, gamma=1.0, lam=0.9))(rollout)
    return rollout, probability, decisions(rollout, weight, *found)


def gradient(objective: Any, batch: Batch, *, mirror: Any = None) -> Tensor:
    found = []

    def update(objective: Any, batch: Batch) -> dict[str, Tensor]:
        found.append(flat_gradient(objective(batch)[0], [objective.policy.theta]))
        return {}

    (update if mirror is None else mirrored(update, mirror))(objective, batch)
    return found[0]


@pytest.mark.parametrize("make", [SurrogateObjective, partial(PPOObjective, critic=None)])
def test_of_a_symmetric_policy_each_decision_has_the_gradient_of_the_symmetrized_one(make: Any, float64: None) -> None:
    world, theta = symmetric_world(), logits(True).flatten()
    features = tabular(STATES * STEPS, ACTIONS)
    policy, symmetrized = SoftmaxPolicy(features, theta), Symmetrized(features, theta)
    _, _, batch = batch_of(policy, world)
    for index in (slice(0, 1), slice(3, 9), slice(None)):  # not in expectation alone
        part = Batch(*(x[index] for x in batch))
        one, other = gradient(make(policy), part, mirror=mirror), gradient(make(symmetrized), part)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    whole = gradient(make(policy), batch, mirror=mirror)
    exact = policy_gradient(world, policy.logits().softmax(-1).detach(), score_table(features, probabilities(policy)))
    torch.testing.assert_close(whole, exact.detach(), rtol=0, atol=1e-12)
    assert gradient(make(policy), part).norm() > 1e-2
    few = Batch(*(x[3:9] for x in batch))
    assert not torch.allclose(gradient(make(policy), few), gradient(make(policy), few, mirror=mirror), atol=1e-6)


def test_of_another_policy_half_the_gradient_is_that_off_the_reflected_policy(float64: None) -> None:
    world, theta = symmetric_world(), logits(False).flatten()
    features = tabular(STATES * STEPS, ACTIONS)
    policy = SoftmaxPolicy(features, theta)
    _, _, batch = batch_of(policy, world)
    probs = probabilities(policy).detach()
    scores = score_table(features, probs)
    exact = policy_gradient(world, probs, scores)
    other = reflected(probs)  # the policy whose actions the reflections are
    advantage = action_value(world, other) - state_value(world, other).unsqueeze(1)
    away = weighted_gradient(visitation(world, other, 1.0), probs, advantage, scores)
    found = gradient(SurrogateObjective(policy), batch, mirror=mirror)
    torch.testing.assert_close(found, (exact + away) / 2, rtol=0, atol=1e-12)
    assert (exact - away).norm() > 0.05 * exact.norm()


class Remembering(nn.Module):
    """The distribution depends on all that was seen in two steps: logits of each history, [3 + 3 x 3, A]."""

    def __init__(self, theta: Tensor, tied: bool = False) -> None:
        super().__init__()
        self.theta, self.tied = nn.Parameter(theta.clone()), tied

    def forward(self, rows: Rows) -> Categorical:
        first, now = rows.obs[:, :1], rows.obs[:, 1:] - STATES
        index = torch.cat([first, STATES + STATES * first + now], 1)
        theta = (self.theta + of_histories(self.theta)) / 2 if self.tied else self.theta
        return Categorical(logits=theta[index])


def of_histories(theta: Tensor) -> Tensor:
    """The logits of the reflected history, reflected."""
    whole = theta[STATES:].unflatten(0, (STATES, STATES))[OF_STATE][:, OF_STATE].flatten(0, 1)
    return torch.cat([theta[:STATES][OF_STATE], whole])[:, OF_ACTION]


def with_memory(policy: Remembering, start: bool = True) -> Batch:
    """All trajectories of two steps as whole rows, of which this policy is the old one; some credit."""
    rollout, probability = trajectories(
        symmetric_world(), probabilities(SoftmaxPolicy(tabular(STATES * STEPS, ACTIONS))), STEPS
    )
    begins = torch.zeros_like(rollout.mask)
    begins[:, 0] = start
    none = rollout.reward.new_zeros(len(begins), 1, 0)
    rows = Rows(rollout.obs, begins, none, none)
    logp = policy(rows).log_prob(rollout.action).detach()
    rollout = replace(rollout, obs=rows, logp=logp, memoryless=False)
    credit = torch.randn(rollout.reward.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return decisions(rollout, probability.unsqueeze(1) * rollout.mask, credit)


@pytest.mark.parametrize("make", [SurrogateObjective, partial(PPOObjective, critic=None)])
def test_with_memory_each_history_has_the_gradient_of_the_symmetrized_policy(make: Any, float64: None) -> None:
    drawn = 2 * torch.randn(STATES + STATES**2, ACTIONS, generator=torch.Generator().manual_seed(5))
    theta = (drawn + of_histories(drawn)) / 2
    policy, symmetrized = Remembering(theta), Remembering(theta, tied=True)
    whole = with_memory(policy)
    assert whole.mask.shape[1] == STEPS
    for index in (slice(0, 1), slice(4, 11), slice(None)):
        part = tree_map(lambda x, index=index: x[index], whole)
        one, other = gradient(make(policy), part, mirror=mirror), gradient(make(symmetrized), part)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert not torch.allclose(one, gradient(make(policy), part), atol=1e-6)


def test_rows_that_begin_in_the_midst_of_an_episode_are_refused(float64: None) -> None:
    policy = Remembering(torch.zeros(STATES + STATES**2, ACTIONS))
    with pytest.raises(UserError, match="begin with an episode") as raised:
        gradient(SurrogateObjective(policy), with_memory(policy, start=False), mirror=mirror)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda obs, action: (CLOCKED[obs], (action + 1) % ACTIONS), "its own inverse"),
        (lambda obs, action: (obs.double(), action), "shape or the type of obs"),
        (lambda obs, action: (obs, action.float()), "shape or the type of action"),
        (lambda obs, action: obs, "a pair"),
    ],
)
def test_what_is_no_reflection_is_refused(wrong: Any, said: str, float64: None) -> None:
    policy = SoftmaxPolicy(tabular(STATES * STEPS, ACTIONS))
    _, _, batch = batch_of(policy, symmetric_world())
    with pytest.raises(UserError, match=said) as raised:
        gradient(SurrogateObjective(policy), batch, mirror=wrong)
    assert len(str(raised.value)) <= 200
