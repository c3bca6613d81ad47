"""Credit by turns: its definition written out, and its gradient against the exact one on enumerated conversations."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from policygrad.advantages import gae, leave_one_out, unit_scale
from policygrad.credit import Credit, bootstrapped, grouped
from policygrad.errors import UserError
from policygrad.exact.closed_form import action_value, policy_gradient, state_value, visitation, weighted_gradient
from policygrad.exact.enumeration import batches, trajectories, with_turns
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, probabilities, score_table, tabular
from policygrad.exact.worlds import World, garnet, with_clock
from policygrad.rollout import Rollout
from policygrad.turns import bootstrapped_by_turn, grouped_by_state, turns_of

H, N = False, True  # a hole, and a decision


@pytest.fixture(autouse=True)
def _double() -> Any:
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(was)


def rollout_of(pattern: list[str], reward: Tensor | None = None, state: Tensor | None = None) -> Rollout:
    """Rows of decisions (x), holes (.) and padding (-); each ends at its last decision."""
    mask = torch.tensor([[step == "x" for step in row] for row in pattern])
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    reward = torch.randn(mask.shape) if reward is None else reward
    obs = torch.arange(mask.numel()).view(mask.shape)
    group = torch.arange(len(mask)) // 2
    nothing = torch.zeros(mask.shape)
    return Rollout(obs, obs, nothing, reward, last, last, mask, group, state=state)


PATTERN = ["xx.xxx..x--", ".x.........", "xxxxx------", "...xx.x.xxx", "-----------"]


def test_a_turn_is_a_run_of_decisions() -> None:
    torch.manual_seed(0)
    rollout = rollout_of(PATTERN)
    turns = turns_of(rollout)
    assert turns.real.sum(1).tolist() == [3, 1, 1, 3, 0]
    assert turns.first[turns.real].tolist() == [0, 3, 8, 1, 0, 3, 6, 8]
    assert turns.of[rollout.mask].tolist() == [0, 0, 1, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2]
    sums = [x.sum().item() for x in (rollout.reward[0, :2], rollout.reward[0, 3:6], rollout.reward[0, 8:9])]
    assert turns.reward[0].tolist() == pytest.approx(sums)
    assert turns.terminated.long().tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert turns.ended[:4].int().argmax(1).tolist() == [2, 0, 0, 2]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.9, 0.0), (1.0, 1.0)])
def test_gae_from_turn_to_turn_is_its_definition(gamma: float, lam: float) -> None:
    torch.manual_seed(1)
    rollout = rollout_of(PATTERN)
    value = torch.randn(rollout.mask.numel())
    credit = bootstrapped_by_turn(TabularCritic(value), gamma=gamma, lam=lam)(rollout)
    turns = turns_of(rollout)
    for i, row in enumerate(turns.real):
        count = int(row.sum())
        v = [value[rollout.obs[i, turns.first[i, k]]].item() for k in range(count)] + [0.0]
        delta = [turns.reward[i, k].item() + gamma * v[k + 1] - v[k] for k in range(count)]
        for t in rollout.mask[i].nonzero().flatten().tolist():
            k = int(turns.of[i, t])
            advantage = sum((gamma * lam) ** j * x for j, x in enumerate(delta[k:]))
            assert credit.advantage[i, t].item() == pytest.approx(advantage, abs=1e-12)
            assert credit.target[i, t].item() == pytest.approx(advantage + v[k], abs=1e-12)
            assert credit.value[i, t] == value[rollout.obs[i, t]]


def test_turns_of_one_decision_are_steps() -> None:
    """With a hole after every decision, GAE from turn to turn is GAE from decision to decision."""
    torch.manual_seed(2)
    rollout = rollout_of(["x.x.x..x---", ".x.x-------", "x----------"])
    critic = TabularCritic(torch.randn(rollout.mask.numel()))
    by_turn = bootstrapped_by_turn(critic, gamma=0.9, lam=0.8)(rollout)
    by_step = bootstrapped(critic, partial(gae, gamma=0.9, lam=0.8))(rollout)
    for a, b in zip(by_turn, by_step, strict=True):
        assert_close(a[rollout.mask], b[rollout.mask])


def test_a_row_that_is_cut_goes_on_from_the_value_of_where_it_stops() -> None:
    rollout = rollout_of(["xx.x"], torch.ones(1, 4))
    never = torch.zeros_like(rollout.mask)
    rollout = replace(rollout, terminated=never, ended=never, final_obs=torch.tensor([5]))
    credit = bootstrapped_by_turn(TabularCritic(torch.arange(6.0)), gamma=0.5, lam=1.0)(rollout)
    assert credit.target[0, 3].item() == pytest.approx(1 + 0.5 * 5)
    assert credit.target[0, 0].item() == pytest.approx(2 + 0.5 * (1 + 0.5 * 5))


def test_credit_of_the_state_is_its_definition() -> None:
    torch.manual_seed(3)
    pattern = ["xx.x.x", "x..x.-", "x.xx.x", "x.x.x.", "xx.x.x"]
    state = torch.tensor(
        [[7, 7, 0, 8, 0, 9], [7, 0, 0, 9, 0, 0], [7, 0, 8, 8, 0, 9], [8, 0, 8, 0, 8, 0], [1, 1, 0, 2, 0, 3]]
    )
    rollout = rollout_of(pattern, state=state)
    rollout = replace(rollout, group=torch.tensor([0, 0, 1, 1, 1]))
    gamma, weight = 0.9, 0.5
    turns, found = turns_of(rollout), {}
    for i, row in enumerate(turns.real):
        for k in range(int(row.sum())):
            rest = turns.reward[i, k : int(row.sum())].tolist()
            key = (int(rollout.group[i]), int(state[i, turns.first[i, k]]))
            found.setdefault(key, {})[(i, k)] = sum(gamma**j * r for j, r in enumerate(rest))
    credit = grouped_by_state(gamma=gamma, weight=weight)(rollout)
    plain = grouped()(rollout)
    seen = set()
    for members in found.values():
        values = torch.tensor(list(members.values()))
        for (i, k), g in members.items():
            step = (g - values.mean()) / values.std() if len(members) > 1 else 0.0
            seen.add(len(members))
            for t in ((turns.of[i] == k) & rollout.mask[i]).nonzero().flatten().tolist():
                expected = float(plain.advantage[i, t] + weight * step)
                assert credit.advantage[i, t].item() == pytest.approx(expected, abs=1e-9)
    assert seen >= {1, 2, 4}
    assert_close(grouped_by_state(weight=0.0)(rollout).advantage[rollout.mask], plain.advantage[rollout.mask])


def test_states_must_be_known() -> None:
    with pytest.raises(UserError, match="these rollouts have no state: use grouped"):
        grouped_by_state()(rollout_of(["x.x", "x.x"]))


# Against the exact gradient, on all conversations of a small world whose answers are random.


class Enumerated:
    """A random world of three or four decisions, as conversations whose turns have one or two of them."""

    def __init__(self, decisions: int, steps: int = 3, states: int = 3) -> None:
        self.world: World = with_clock(garnet(states, 2, 2, gamma=1.0, termination=0.2, seed=3), steps)
        torch.manual_seed(4)
        policy = SoftmaxPolicy(tabular(*self.world.reward.shape), torch.randn(self.world.reward.numel()))
        self.probs = probabilities(policy).detach()
        self.scores = score_table(policy.features, self.probs)
        rollout, self.probability = trajectories(self.world, self.probs, steps)
        self.rollout = with_turns(rollout, decisions)
        self.exact = policy_gradient(self.world, self.probs, self.scores)
        self.value = state_value(self.world, self.probs)

    def expected(self, credit: Credit, probability: Tensor, rollout: Rollout) -> Tensor:
        """E[sum_t grad log pi A] over rows with these probabilities."""
        score = self.scores[rollout.obs, rollout.action] * credit.advantage.where(rollout.mask, 0.0).unsqueeze(2)
        return torch.einsum("b,btn->n", probability, score.where(rollout.mask.unsqueeze(2), 0.0))


def test_conversations_have_turns_and_holes() -> None:
    at = Enumerated(2, steps=4)
    whole = at.rollout.mask.all(1) | (at.rollout.mask.sum(1) == 4)
    assert whole.any()
    assert turns_of(at.rollout).real.sum(1).max() == 2
    assert (~at.rollout.mask[:, 2]).all()


@pytest.mark.parametrize("decisions", [1, 2])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_with_the_exact_critic_it_expects_the_exact_gradient(decisions: int, lam: float) -> None:
    at = Enumerated(decisions, steps=4)
    credit = bootstrapped_by_turn(TabularCritic(at.value), gamma=1.0, lam=lam)(at.rollout)
    assert_close(at.expected(credit, at.probability, at.rollout), at.exact, rtol=0, atol=1e-12)


def test_with_lambda_1_any_critic_will_do_and_with_less_a_wrong_one_misleads() -> None:
    at = Enumerated(2, steps=4)
    wrong = TabularCritic(at.value + torch.linspace(1, -1, len(at.value)))
    credit = bootstrapped_by_turn(wrong, gamma=1.0, lam=1.0)(at.rollout)
    assert_close(at.expected(credit, at.probability, at.rollout), at.exact, rtol=0, atol=1e-12)
    credit = bootstrapped_by_turn(wrong, gamma=1.0, lam=0.5)(at.rollout)
    assert (at.expected(credit, at.probability, at.rollout) - at.exact).norm() > 1e-3


def pairs(at: Enumerated) -> tuple[Tensor, Tensor]:
    """Pairs of rows from one start, each with the probability that it has given a start drawn by the first row."""
    index, probability = batches(at.probability, 2)
    starts = at.rollout.obs[:, 0]
    same = starts[index[:, 0]] == starts[index[:, 1]]
    share = torch.zeros(len(at.world.start)).index_add(0, starts, at.probability)
    return index[same], probability[same] / share[starts[index[same][:, 0]]]


@pytest.mark.parametrize("decisions", [1, 2])
def test_leave_one_out_expects_the_exact_gradient_in_conversations(decisions: int) -> None:
    at = Enumerated(decisions, steps=2 if decisions == 1 else 3, states=2)
    index, probability = pairs(at)
    assert probability.sum().item() == pytest.approx(1.0)
    total = torch.zeros_like(at.exact)
    for rows, p in zip(index, probability, strict=True):
        batch = at.rollout.rows(rows)
        batch = replace(batch, group=torch.zeros(2, dtype=torch.long))
        credit = grouped(leave_one_out, unit_scale)(batch)
        total += at.expected(credit, p.expand(2) / 2, batch)
    assert_close(total, at.exact, rtol=0, atol=1e-12)


def test_credit_of_the_state_adds_the_gradient_weighed_by_how_often_a_state_is_met_again() -> None:
    """GiGPO with leave-one-out and no division: E[A_S] = sum_s d(s) P(the other row meets s) E[score Q].

    No state is met twice in a row here, so the baseline of a turn is of the other row alone.
    """
    at = Enumerated(1, steps=2)
    index, probability = pairs(at)
    total = torch.zeros_like(at.exact)
    for rows, p in zip(index, probability, strict=True):
        batch = at.rollout.rows(rows)
        batch = replace(batch, group=torch.zeros(2, dtype=torch.long))
        credit = grouped_by_state(leave_one_out, unit_scale, gamma=1.0, weight=1.0)(batch)
        total += at.expected(credit, p.expand(2) / 2, batch)
    visits = visitation(at.world, at.probs, 1.0)
    again = torch.zeros_like(visits)
    for start in at.world.start.nonzero().flatten():
        there = World(at.world.transition, at.world.reward, torch.eye(len(visits))[start], 1.0)
        met = visitation(there, at.probs, 1.0)
        again += at.world.start[start] * met * met
    local = weighted_gradient(again, at.probs, action_value(at.world, at.probs), at.scores)
    assert_close(total, at.exact + local, rtol=0, atol=1e-12)
    cosine = torch.cosine_similarity(total, at.exact, dim=0)
    assert 0.5 < cosine < 1 - 1e-6, "another direction: states that are met again weigh more"
    assert not math.isclose(local.norm().item(), 0.0)
