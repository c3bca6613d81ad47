"""Every credit against its definition, written out decision by decision; and that holes in the mask are not there."""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.advantages import (
    gae,
    gae_by_length,
    group_mean,
    group_scale,
    leave_one_out,
    mean_baseline,
    monte_carlo_advantage,
    n_step_advantage,
    no_baseline,
    time_mean_baseline,
    unit_scale,
    unnormalized,
)
from policygrad.algorithms.grpo import GRPOObjective
from policygrad.algorithms.ppo import PPOObjective
from policygrad.credit import (
    Assign,
    Credit,
    baselined,
    bootstrapped,
    check_modules,
    check_rows,
    covariance_charged,
    covariance_thinned,
    demonstrated,
    discounted,
    grouped,
    high_entropy,
    imitating,
    modules_of,
    selected,
    standardized,
    vtrace,
)
from policygrad.critics import fit_critic, no_fit, optimal_baseline, value_baseline
from policygrad.errors import UserError
from policygrad.exact.policies import SoftmaxPolicy, TabularCritic, tabular
from policygrad.returns import reward_to_go, trajectory_return
from policygrad.rollout import Rollout, decisions
from policygrad.weights import per_row, per_token

pytestmark = pytest.mark.usefixtures("float64")
close = partial(assert_close, rtol=1e-11, atol=1e-12)  # sums of some tens of numbers near 1, in float64
GAMMA, LAM, N = 0.9, 0.7, 3
BARS = {"lam": LAM, "rho_bar": 0.9, "c_bar": 0.6}
STATES, ACTIONS, HOLE = 6, 3, 6  # state 6 is seen in holes only


@dataclass
class Step:
    """One step of a row. kind: a decision, the masked step with which an episode is reset, or a hole."""

    kind: str
    state: int
    action: int = 0
    logp: float = 0.0
    reward: float = 0.0
    terminated: bool = False
    ended: bool = False


class Case(NamedTuple):
    """Rows of different numbers of steps, and where each stops."""

    rows: list[list[Step]]
    final: list[int]
    policy: nn.Module
    critic: nn.Module

    def rollout(self) -> Rollout:
        """The rows as arrays, filled up behind the mask with steps that nothing can be learned from."""
        longest = max(map(len, self.rows))
        pad = Step("padding", 0, logp=torch.nan, reward=torch.nan)
        rows = [row + [pad] * (longest - len(row)) for row in self.rows]

        def array(name: str) -> Tensor:
            return torch.tensor([[getattr(step, name) for step in row] for row in rows])

        mask = torch.tensor([[step.kind == "decision" for step in row] for row in rows])
        columns = {name: array(name) for name in ("action", "logp", "reward", "terminated", "ended")}
        group = torch.arange(len(rows)) // 2
        return Rollout(obs=array("state"), mask=mask, group=group, final_obs=torch.tensor(self.final), **columns)

    def at_decisions(self, x: Tensor) -> list[list[float]]:
        """What stands at each row's decisions."""
        return [
            [x[b, t].item() for t, step in enumerate(row) if step.kind == "decision"] for b, row in enumerate(self.rows)
        ]


def case(seed: int) -> Case:
    """Seven rows of up to four episodes, which terminate or are truncated, with and without a step for the reset."""
    g = torch.Generator().manual_seed(seed)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=g))

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=g) < p)

    theta = torch.randn((STATES + 1) * ACTIONS, generator=g)
    policy = SoftmaxPolicy(tabular(STATES + 1, ACTIONS), theta)
    critic = TabularCritic(torch.randn(STATES + 1, generator=g))
    rows, final = [], []
    for _ in range(7):
        row: list[Step] = []
        for _ in range(1 + draw(4)):
            length = 1 + draw(4)
            for t in range(length):
                state, action = draw(STATES), draw(ACTIONS)
                logp = -2 * torch.rand((), generator=g).item()
                ended = t == length - 1 and chance(0.8)
                terminated = ended and chance(0.5)
                reward = torch.randn((), generator=g).item()
                row.append(Step("decision", state, action, logp, reward, terminated, ended))
            if row[-1].ended and (not row[-1].terminated or chance(0.5)):
                # The masked step after an end: its observation is the true final one.
                row.append(Step("reset", draw(STATES), logp=torch.nan, reward=torch.nan, ended=True))
        rows.append(row)
        final.append(draw(STATES))
    return Case(rows, final, policy, critic)


def with_holes(plain: Case, seed: int, garbage: float) -> Case:
    """The same rows with masked steps at their starts, between their decisions, and at their ends."""
    g = torch.Generator().manual_seed(seed)
    hole = Step("hole", HOLE, action=1, logp=garbage, reward=garbage)
    rows = []
    for row in plain.rows:
        made: list[Step] = []
        for step in [*row, None]:
            # Several in a row; but none between an end and its reset, where no episode goes on.
            count = 0 if step is not None and step.kind == "reset" else int(torch.randint(4, (), generator=g)) - 1
            made += [hole] * count + ([] if step is None else [step])
        rows.append(made)
    rows[0] = [hole, hole] + rows[0] + [hole, hole, hole]
    value = plain.critic.value.detach().clone()
    value[HOLE] = garbage
    return Case(rows, plain.final, plain.policy, TabularCritic(value))


# Definitions, decision by decision


class Decision(NamedTuple):
    """What a definition may look at: nothing of holes."""

    reward: float
    value: float  # V(s)
    after: float  # V of the successor, 0 beyond a termination
    ratio: float  # pi / mu
    first: int  # the row's decision with which the episode starts
    last: int  # the row's last decision of the episode
    place: int  # the step of the row, resets counted


def walked(c: Case) -> list[list[Decision]]:
    """The decisions of each row."""
    value = c.critic.value.tolist()
    probs = (c.policy.features @ c.policy.theta).detach().softmax(-1).tolist()
    found = []
    for row, final in zip(c.rows, c.final, strict=True):
        steps = [step for step in row if step.kind != "hole"]
        chosen = [i for i, step in enumerate(steps) if step.kind == "decision"]
        made = []
        for k, i in enumerate(chosen):
            step = steps[i]
            following = steps[i + 1].state if i + 1 < len(steps) else final
            first = next((j for j in range(k, 0, -1) if steps[chosen[j - 1]].ended), 0)
            last = next((j for j in range(k, len(chosen)) if steps[chosen[j]].ended), len(chosen) - 1)
            ratio = probs[step.state][step.action] / torch.tensor(step.logp).exp().item()
            after = 0.0 if step.terminated else value[following]
            made.append(Decision(step.reward, value[step.state], after, ratio, first, last, i))
        found.append(made)
    return found


Table = list[list[float]]  # a number for each decision of each row


def each(c: Case, f: Callable[[list[Decision], int], float]) -> Table:
    return [[f(row, k) for k in range(len(row))] for row in walked(c)]


def defined_gae(row: list[Decision], k: int) -> float:
    """sum_j (gamma lam)^j (r + gamma V' - V), to the end of the episode."""
    steps = enumerate(row[k : row[k].last + 1])
    return sum((GAMMA * LAM) ** j * (d.reward + GAMMA * d.after - d.value) for j, d in steps)


def defined_n_step(row: list[Decision], k: int, n: int = N) -> float:
    """r_k + ... + gamma^n V - V(s_k), as far as the episode goes."""
    steps = row[k : row[k].last + 1][:n]
    total = sum(GAMMA**j * d.reward for j, d in enumerate(steps))
    return total + GAMMA ** len(steps) * steps[-1].after - row[k].value


def defined_monte_carlo(row: list[Decision], k: int) -> float:
    return defined_n_step(row, k, n=10**6)


def defined_target(row: list[Decision], k: int) -> float:
    """v = V + sum_j gamma^j (prod_{i<j} c_i) rho_j delta_j."""
    v, trace = row[k].value, 1.0
    for j, d in enumerate(row[k : row[k].last + 1]):
        v += GAMMA**j * trace * min(BARS["rho_bar"], d.ratio) * (d.reward + GAMMA * d.after - d.value)
        trace *= BARS["lam"] * min(BARS["c_bar"], d.ratio)
    return v


def defined_vtrace(row: list[Decision], k: int) -> float:
    """rho (r + gamma v' - V), with v' = V' past the last decision of an episode."""
    d = row[k]
    following = d.after if k == d.last else defined_target(row, k + 1)
    return min(BARS["rho_bar"], d.ratio) * (d.reward + GAMMA * following - d.value)


def defined_to_go(row: list[Decision], k: int) -> float:
    return sum(GAMMA**j * d.reward for j, d in enumerate(row[k : row[k].last + 1]))


def defined_whole(row: list[Decision], k: int) -> float:
    return defined_to_go(row, row[k].first)


def age(row: list[Decision], k: int) -> int:
    return k - row[k].first


def mean_of_the_others(c: Case, x: Table) -> Table:
    """Of all decisions of all other rows."""
    rest = [[y for j, row in enumerate(x) if j != i for y in row] for i in range(len(x))]
    return [[sum(others) / len(others)] * len(row) for row, others in zip(x, rest, strict=True)]


def mean_of_the_others_at_that_step(c: Case, x: Table) -> Table:
    places = [{d.place: y for d, y in zip(row, ys, strict=True)} for row, ys in zip(walked(c), x, strict=True)]
    found = []
    for i, mine in enumerate(places):
        row = []
        for place in mine:
            others = [theirs[place] for j, theirs in enumerate(places) if j != i and place in theirs]
            row.append(sum(others) / len(others) if others else 0.0)
        found.append(row)
    return found


def zeros(c: Case, x: Table) -> Table:
    return [[0.0] * len(row) for row in x]


def values(c: Case, x: Table) -> Table:
    return each(c, lambda row, k: row[k].value)


# The library's credit, and the definition's (advantage, target, value)

RETURNS = {"reward_to_go": (reward_to_go, defined_to_go), "trajectory_return": (trajectory_return, defined_whole)}
BASELINES: dict[str, tuple[Callable[[Case], Callable], Callable[[Case, Table], Table]]] = {
    "none": (lambda c: no_baseline, zeros),
    "mean": (lambda c: mean_baseline, mean_of_the_others),
    "time_mean": (lambda c: time_mean_baseline, mean_of_the_others_at_that_step),
    "value": (lambda c: partial(value_baseline, critic=c.critic), values),
}
ESTIMATES = {
    "gae": (partial(gae, gamma=GAMMA, lam=LAM), defined_gae),
    "n_step": (partial(n_step_advantage, gamma=GAMMA, n=N), defined_n_step),
    "monte_carlo": (partial(monte_carlo_advantage, gamma=GAMMA), defined_monte_carlo),
}
GROUPS = {"group_mean": group_mean, "leave_one_out": leave_one_out}
SCALES = {"group_scale": group_scale, "unit_scale": unit_scale}


def less(x: Table, y: Table) -> Table:
    return [[a - b for a, b in zip(p, q, strict=True)] for p, q in zip(x, y, strict=True)]


def by_return(name: str, baseline: str) -> tuple[Callable[[Case], Assign], Callable[[Case], tuple[Table, ...]]]:
    (library, definition), (made, mean) = RETURNS[name], BASELINES[baseline]

    def defined(c: Case) -> tuple[Table, ...]:
        target = each(c, definition)
        b = mean(c, target)
        return less(target, b), target, b

    return lambda c: baselined(partial(library, gamma=GAMMA), made(c)), defined


def by_critic(name: str) -> tuple[Callable[[Case], Assign], Callable[[Case], tuple[Table, ...]]]:
    library, definition = ESTIMATES[name]

    def defined(c: Case) -> tuple[Table, ...]:
        advantage, value = each(c, definition), values(c, [])
        return advantage, less(advantage, [[-v for v in row] for row in value]), value

    return lambda c: bootstrapped(c.critic, library, micro_batch=3), defined


def by_vtrace(c: Case) -> tuple[Table, ...]:
    return each(c, defined_vtrace), each(c, defined_target), values(c, [])


def by_group(baseline: str, scale: str) -> tuple[Callable[[Case], Assign], Callable[[Case], tuple[Table, ...]]]:
    def defined(c: Case) -> tuple[Table, ...]:
        rows = walked(c)
        total = [sum(d.reward for d in row) for row in rows]
        advantage = []
        for i, row in enumerate(rows):
            own = [x for j, x in enumerate(total) if j // 2 == i // 2]
            rest = [x for j, x in enumerate(total) if j // 2 == i // 2 and j != i]
            mean = sum(own) / len(own)
            b = mean if baseline == "group_mean" else sum(rest) / max(len(rest), 1)
            spread = (sum((x - mean) ** 2 for x in own) / max(len(own) - 1, 1)) ** 0.5
            s = (spread or math.inf) if scale == "group_scale" else 1.0
            advantage.append([(total[i] - b) / s] * len(row))
        return advantage, zeros(c, advantage), zeros(c, advantage)

    return lambda c: grouped(GROUPS[baseline], SCALES[scale]), defined


CREDITS = {
    **{f"{name}, baseline {b}": by_return(name, b) for name in RETURNS for b in BASELINES},
    **{name: by_critic(name) for name in ESTIMATES},
    "vtrace": (lambda c: vtrace(c.policy, c.critic, gamma=GAMMA, **BARS, micro_batch=2), by_vtrace),
    **{f"{b}, {s}": by_group(b, s) for b in GROUPS for s in SCALES},
}
every_credit = pytest.mark.parametrize("name", CREDITS)
every_case = pytest.mark.parametrize("seed", range(3))


def assert_defined(c: Case, found: Credit, wanted: tuple[Table, ...]) -> None:
    for column, x, y in zip(Credit._fields, found, wanted, strict=True):
        assert x.shape == (len(c.rows), max(map(len, c.rows))), column
        for row, expected in zip(c.at_decisions(x), y, strict=True):
            close(torch.tensor(row), torch.tensor(expected), msg=lambda said, column=column: f"{column}: {said}")


@every_case
@every_credit
def test_credit_is_its_definition(name: str, seed: int) -> None:
    made, defined = CREDITS[name]
    c = case(seed)
    assert_defined(c, made(c)(c.rollout()), defined(c))


@pytest.mark.parametrize("garbage", [1e6, torch.nan, torch.inf])
@every_case
@every_credit
def test_holes_change_nothing(name: str, seed: int, garbage: float) -> None:
    """What no policy chose has no value, no reward, no time of its own, and ends no trace."""
    made, defined = CREDITS[name]
    c = case(seed)
    holed = with_holes(c, seed + 100, garbage)
    assert_defined(holed, made(holed)(holed.rollout()), defined(c))


def test_the_cases_have_everything_in_them() -> None:
    """Ends of both kinds with and without a reset, cut rows; holes first, between and last, several in a row."""
    cases = [case(seed) for seed in range(4)]
    rows = [row for c in cases for row in c.rows]
    kinds = {(step.terminated, step.ended, after.kind) for row in rows for step, after in pairwise(row)}
    assert {(True, True, "reset"), (True, True, "decision"), (False, True, "reset")} <= kinds
    assert any(not row[-1].ended for row in rows)
    assert any(row[-1].ended and row[-1].kind == "decision" for row in rows)
    holed = ["".join(step.kind[0] for step in row) for s, c in enumerate(cases) for row in with_holes(c, s, 1.0).rows]
    for pattern in ("hhd", "dhd", "dhhd", "dhh", "rhd"):
        assert any(pattern in row for row in holed), pattern
    assert any(row.startswith("h") for row in holed)
    assert any(row.endswith("h") for row in holed)


@every_case
@pytest.mark.parametrize("name", ["gae", "n_step", "monte_carlo", "vtrace"])
def test_a_hole_that_a_critic_could_see_would_be_found(name: str, seed: int) -> None:
    """With the holes marked as decisions the credit is another: the test above can fail."""
    made, defined = CREDITS[name]
    holed = with_holes(case(seed), seed + 100, 3.0)
    rollout = holed.rollout()
    everywhere = replace(rollout, mask=rollout.mask | (rollout.obs == HOLE))
    with pytest.raises(AssertionError):
        assert_defined(holed, made(holed)(everywhere), defined(holed))


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("seed", [3])
@every_credit
def test_standardized_it_is_of_mean_0_and_deviation_1_over_the_decisions(name: str, seed: int, holes: bool) -> None:
    made, defined = CREDITS[name]
    plain = case(seed)
    c = with_holes(plain, seed + 100, torch.nan) if holes else plain
    advantage, *rest = defined(plain)
    flat = torch.tensor([x for row in advantage for x in row])
    wanted = [[((x - flat.mean()) / flat.std()).item() for x in row] for row in advantage]
    assert_defined(c, standardized(made(c))(c.rollout()), (wanted, *rest))
    assert_defined(c, standardized(made(c), unnormalized)(c.rollout()), (advantage, *rest))


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("seed", [3])
@every_credit
def test_discounted_each_advantage_is_multiplied_by_gamma_to_the_decisions_before_it(
    name: str, seed: int, holes: bool
) -> None:
    made, defined = CREDITS[name]
    plain = case(seed)
    c = with_holes(plain, seed + 100, torch.nan) if holes else plain
    advantage, *rest = defined(plain)
    ages = each(plain, age)
    wanted = [[x * GAMMA**k for x, k in zip(row, ks, strict=True)] for row, ks in zip(advantage, ages, strict=True)]
    assert max(k for ks in ages for k in ks) >= 3
    assert_defined(c, discounted(made(c), GAMMA)(c.rollout()), (wanted, *rest))


# Behind the mask


class Spoiled(nn.Module):
    """A critic or a policy that is NaN, or worse, where the observation is a hole's or padding."""

    def __init__(self, module: nn.Module, garbage: float) -> None:
        super().__init__()
        self.module, self.garbage = module, garbage

    def forward(self, obs: Tensor) -> Tensor | torch.distributions.Categorical:
        hidden = obs >= HOLE
        said = self.module(obs.where(~hidden, 0))
        if isinstance(said, Tensor):
            return said.where(~hidden, self.garbage)
        garbage = self.garbage

        class Doubtful(torch.distributions.Categorical):
            def log_prob(self, action: Tensor) -> Tensor:
                return super().log_prob(action).where(~hidden, garbage)

        return Doubtful(logits=said.logits, validate_args=False)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e30])
@every_credit
def test_garbage_behind_the_mask_changes_no_bit_of_what_an_objective_sees(name: str, garbage: float) -> None:
    """In rewards and log-probabilities everywhere behind the mask; from policy and critic in holes and padding."""

    def seen(garbage: float) -> tuple[Tensor, ...]:
        plain = with_holes(case(1), 101, garbage)
        rollout = plain.rollout()
        mask = rollout.mask
        hidden = ~(mask | rollout.ended)
        spoiled = replace(
            rollout,
            obs=rollout.obs.where(~hidden, HOLE),
            reward=rollout.reward.where(mask, garbage),
            logp=rollout.logp.where(mask, garbage),
        )
        c = plain._replace(policy=Spoiled(plain.policy, garbage), critic=Spoiled(plain.critic, garbage))
        credit = discounted(standardized(CREDITS[name][0](c)), GAMMA)(spoiled)
        batch = decisions(spoiled, per_token(mask), *credit)
        return batch.advantage, batch.target, batch.value, batch.logp, batch.weight

    for clean, dirty in zip(seen(0.0), seen(garbage), strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


@every_credit
def test_a_row_without_a_decision_gets_nothing_and_changes_nothing(name: str) -> None:
    """A completion that is filtered out as a whole."""
    made, defined = CREDITS[name]
    c = case(2)
    reached = replace(c.rollout(), group=torch.tensor([0, 0, 1, 1, 2, 2, 3]))
    columns = {f.name: getattr(reached, f.name) for f in fields(reached)}
    empty = {n: x[:1].clone() for n, x in columns.items() if isinstance(x, Tensor)}
    for n in ("mask", "terminated", "ended"):
        empty[n].zero_()
    empty["obs"], empty["group"] = torch.full_like(empty["obs"], HOLE), torch.tensor([9])
    more = replace(reached, **{n: torch.cat([columns[n], x]) for n, x in empty.items()})
    credit = made(c)(more)
    assert_defined(c, Credit(*(x[:-1] for x in credit)), defined(c))


# Credit that asks the policy


@pytest.mark.parametrize("returns", [reward_to_go, trajectory_return])
def test_the_optimal_baseline_has_no_holes_either(returns: Callable[..., Tensor]) -> None:
    c = case(0)
    holed = with_holes(c, 100, 1e6)
    credits = [
        baselined(partial(returns, gamma=GAMMA), partial(optimal_baseline, policy=c.policy))(x.rollout())
        for x in (c, holed)
    ]
    for plain, found in zip(*credits, strict=True):
        for row, expected in zip(holed.at_decisions(found), c.at_decisions(plain), strict=True):
            close(torch.tensor(row), torch.tensor(expected))


def test_vtrace_follows_the_policy_as_it_is_when_it_is_asked() -> None:
    c = case(3)
    assign = vtrace(c.policy, c.critic, gamma=GAMMA, **BARS)
    before = assign(c.rollout())
    with torch.no_grad():
        c.policy.theta += torch.randn_like(c.policy.theta)
    after = assign(c.rollout())
    assert_defined(c, after, by_vtrace(c))
    assert (after.advantage - before.advantage).abs().max() > 0.1


@every_credit
def test_credit_has_no_gradient(name: str) -> None:
    c = case(0)
    assert not any(x.requires_grad for x in CREDITS[name][0](c)(c.rollout()))


# Groups


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -1e6 - 0.1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", GROUPS)
def test_in_a_group_of_equal_returns_it_is_exactly_0(
    baseline: str, scale: str, reward: float, softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rewards = torch.zeros(9, 5).index_fill(1, torch.tensor(0), reward)  # the first step of every row counts
    rollout = sample(softmax, rows=9, group=torch.arange(9) // 3, reward=rewards)
    assert grouped(GROUPS[baseline], SCALES[scale])(rollout).advantage.eq(0).all()


def test_group_credit_is_grpos_if_nothing_is_said(softmax: nn.Module, sample: Callable[..., Rollout]) -> None:
    rollout = sample(softmax)
    named = grouped(group_mean, group_scale)(rollout)
    assert all(torch.equal(x, y) for x, y in zip(grouped()(rollout), named, strict=True))


def test_standardized_reward_to_go_does_not_look_at_groups(softmax: nn.Module, sample: Callable[..., Rollout]) -> None:
    """REINFORCE++'s credit: the batch is the baseline."""
    rollout = sample(softmax)
    regrouped = replace(rollout, group=torch.zeros(6, dtype=torch.long))
    assert torch.equal(*(standardized(baselined())(x).advantage for x in (rollout, regrouped)))


def test_groups_of_one_row_each_are_refused(softmax: nn.Module, sample: Callable[..., Rollout]) -> None:
    """Each return is its group's mean: the gradient would be 0 for ever."""
    alone = sample(softmax, rows=4, group=torch.arange(4))
    with pytest.raises(UserError, match=r"every row is a group of its own.*groups=4") as raised:
        grouped()(alone)
    assert len(str(raised.value)) <= 200
    grouped()(replace(alone, group=torch.tensor([0, 1, 2, 2])))
    cut = alone.mask.index_fill(0, torch.tensor(1), False)  # its group was not always of one
    assert grouped()(replace(alone, mask=cut)).advantage.eq(0).all()


# Who reads what


def who(credit: Assign) -> set[str]:
    return set(modules_of(credit))


def test_a_credit_says_which_modules_it_reads(softmax: nn.Module, critic: nn.Module) -> None:
    estimate = partial(gae, gamma=0.9, lam=0.9)
    assert modules_of(bootstrapped(critic, estimate)) == {"critic": critic}
    assert modules_of(vtrace(softmax, critic, gamma=0.9)) == {"policy": softmax, "critic": critic}
    assert modules_of(baselined(baseline=partial(value_baseline, critic=critic))) == {"critic": critic}
    assert modules_of(baselined(baseline=partial(optimal_baseline, policy=softmax))) == {"policy": softmax}
    assert who(standardized(discounted(bootstrapped(critic, estimate), 0.9))) == {"critic"}
    assert who(baselined()) == who(grouped()) == set()


def test_a_critic_or_policy_that_is_not_the_one_that_learns_is_refused(softmax: nn.Module, critic: nn.Module) -> None:
    credit, objective = bootstrapped(critic, partial(gae, gamma=0.9, lam=0.9)), SimpleNamespace(policy=softmax)
    fit = fit_critic(critic, torch.optim.Adam(critic.parameters()))
    check_modules(credit, SimpleNamespace(policy=softmax, critic=critic), no_fit)
    check_modules(credit, objective, fit)
    check_modules(credit, objective, lambda batch: {})  # nobody knows what it fits
    other = copy.deepcopy(critic)
    for wrong, fitting in (
        (SimpleNamespace(critic=other), no_fit),
        (objective, fit_critic(other, torch.optim.Adam(other.parameters()))),
    ):
        with pytest.raises(UserError, match="another critic than the one that learns"):
            check_modules(credit, wrong, fitting)
    with pytest.raises(UserError, match="another policy than the one that learns"):
        check_modules(vtrace(softmax, critic, gamma=0.9), SimpleNamespace(policy=copy.deepcopy(softmax)), fit)
    with pytest.raises(UserError, match="a critic that never learns") as raised:
        check_modules(credit, objective, no_fit)
    assert len(str(raised.value)) <= 200
    check_modules(bootstrapped(other.requires_grad_(False), partial(gae, gamma=0.9, lam=0.9)), objective, no_fit)


class OfRows:
    """A sampler that says whether its rows are whole episodes, or does not say."""

    def __init__(self, whole: bool | None) -> None:
        if whole is not None:
            self.whole_episodes = whole


class Around:
    def __init__(self, sample: Any) -> None:
        self.sample = sample


def test_a_return_needs_rows_that_are_whole_episodes(critic: nn.Module) -> None:
    whole = [baselined(), standardized(baselined()), discounted(standardized(baselined(trajectory_return)), 0.9)]
    segments = OfRows(False)
    for assign in whole:
        for sample in (OfRows(True), OfRows(None), Around(OfRows(True)), lambda policy: None):
            check_rows(sample, assign)
        for sample in (segments, Around(Around(segments))):
            with pytest.raises(UserError, match="rows end inside episodes: make the Sampler with whole_episodes=True"):
                check_rows(sample, assign)
    check_rows(segments, standardized(bootstrapped(critic, gae)))
    check_rows(segments, lambda rollout: None)  # type: ignore[arg-type, return-value]


def test_a_demonstrators_every_decision_has_the_advantage_1() -> None:
    rollout = Rollout(
        torch.zeros(2, 3, 1), torch.zeros(2, 3), torch.zeros(2, 3), torch.randn(2, 3), *torch.zeros(2, 2, 3).bool(),
        mask=torch.tensor([[True, False, True], [True, True, False]]), group=torch.arange(2),
    )  # fmt: skip
    credit = demonstrated(rollout)
    assert_close(credit.advantage, torch.ones(2, 3))
    assert_close(credit.target, torch.zeros(2, 3))
    assert_close(credit.value, torch.zeros(2, 3))
    assert_close(decisions(rollout, per_token(rollout.mask), *credit).advantage, rollout.mask.double())


# Where it is learned


def test_nothing_is_credited_where_nothing_is_learned(policy: nn.Module, sample: Callable[..., Rollout]) -> None:
    rollout = sample(policy)
    keep = torch.rand(rollout.mask.shape) < 0.5
    plain = baselined()
    found = selected(plain, lambda _: keep)(rollout)
    assert torch.equal(found.advantage, plain(rollout).advantage.where(keep, 0.0))
    assert torch.equal(found.target, plain(rollout).target)
    assert selected(plain, lambda _: keep).whole_episodes, "it says of itself what the plain one does"


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_high_entropy_is_the_share_of_decisions_with_the_most(
    share: float, softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(softmax)
    entropy = softmax(rollout.obs).entropy().detach()
    ranked = sorted(entropy[rollout.mask].tolist(), reverse=True)
    count = math.ceil(share * len(ranked))
    wanted = (entropy >= ranked[count - 1]) & rollout.mask
    assert wanted.sum() == count
    for rows in (None, 2):
        assert torch.equal(high_entropy(rollout, policy=softmax, share=share, micro_batch=rows), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_choose_among_equal_decisions(
    dtype: torch.dtype, softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    """Rows of one state, as a prompt's completions begin: their entropies and covariances differ in the last bits."""
    rollout = sample(softmax, rows=6, steps=4)
    rollout = replace(rollout, mask=torch.ones(6, 4, dtype=torch.bool))
    noise = 1 + torch.finfo(dtype).eps * torch.arange(-3, 3).to(dtype)[:, None]
    at = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=dtype) * noise  # 6 decisions of each
    policy = nn.Identity()
    policy.forward = lambda _: SimpleNamespace(entropy=lambda: at)  # type: ignore[method-assign]
    logp, advantage = torch.full((6, 4), -1.0, dtype=dtype), at * torch.tensor([1, -1], dtype=dtype).repeat(2)
    plain = Credit(advantage, advantage, advantage)
    rollout = replace(rollout, logp=logp.index_fill(1, torch.tensor([1, 3]), -2.0))
    for share, columns in [(0.02, 1), (0.25, 1), (0.3, 2), (0.5, 2), (0.6, 3), (0.75, 3), (0.9, 4)]:
        wanted = torch.arange(4).expand(6, 4) < columns
        assert torch.equal(high_entropy(rollout, policy=policy, share=share), wanted)
    for share in (0.02, 0.1, 0.25, 0.3, 0.5):  # covariances of 0.175 in two columns, of 0.075 in two
        charge = covariance_charged(lambda _: plain, share=share)(rollout).charge
        assert torch.equal(charge, torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=dtype).expand(6, 4))


# Two lambdas


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_lambda_by_length_is_that_of_each_row_alone(
    alpha: float, softmax: nn.Module, critic: nn.Module, sample: Callable[..., Rollout]
) -> None:
    """Rows of one episode, as completions are, with holes in them."""
    rollout = sample(softmax)
    found = bootstrapped(critic, partial(gae_by_length, gamma=GAMMA, alpha=alpha))(rollout)
    for i in range(len(rollout.mask)):
        row = rollout.rows(slice(i, i + 1))
        count = int(row.mask.sum())
        lam = max(0.0, 1 - 1 / (alpha * count)) if count else 0.0
        alone = bootstrapped(critic, partial(gae, gamma=GAMMA, lam=lam))(row)
        close(found.advantage[i][row.mask[0]], alone.advantage[row.mask])


def test_the_critic_has_a_lambda_of_its_own(
    softmax: nn.Module, critic: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(softmax)
    of_policy, of_critic = (partial(gae, gamma=GAMMA, lam=lam) for lam in (0.3, 1.0))
    both = bootstrapped(critic, of_policy, of_critic=of_critic)(rollout)
    assert torch.equal(both.advantage, bootstrapped(critic, of_policy)(rollout).advantage)
    assert torch.equal(both.target, bootstrapped(critic, of_critic)(rollout).target)
    assert not torch.equal(both.target, bootstrapped(critic, of_policy)(rollout).target)


def by_draws(kept: list[float], share: float, low: float, high: float, found: list[float]) -> list[float]:
    """The mean over all draws of the advantages that Clip-Cov leaves."""
    within = [i for i, c in enumerate(found) if low < c < high]
    count = min(max(1, math.floor(share * len(found))), len(within))
    draws = list(itertools.combinations(within, count))
    return [sum(x * (i not in draw) for draw in draws) / len(draws) for i, x in enumerate(kept)]


@pytest.mark.parametrize(
    ("low", "high", "share"), [(0.02, 9.0, 0.01), (0.0, 0.2, 0.15), (-0.1, 0.5, 0.4), (9.0, 10.0, 0.5)]
)
def test_thinned_by_covariance_it_is_the_mean_over_all_draws(
    low: float, high: float, share: float, softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(softmax)
    advantage = baselined()(rollout).advantage
    logp, kept = rollout.logp[rollout.mask].tolist(), advantage[rollout.mask].tolist()
    means = sum(logp) / len(logp), sum(kept) / len(kept)
    found = [(a - means[1]) * (p - means[0]) for a, p in zip(kept, logp, strict=True)]
    credit = covariance_thinned(baselined(), low=low, high=high, share=share)
    close(credit(rollout).advantage[rollout.mask], torch.tensor(by_draws(kept, share, low, high, found)))
    assert credit.whole_episodes, "it says of itself what the plain one does"


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5])
def test_the_share_that_covaries_most_is_charged(
    share: float, softmax: nn.Module, sample: Callable[..., Rollout]
) -> None:
    rollout = sample(softmax)
    plain = baselined()(rollout)
    a, p = (x[rollout.mask].tolist() for x in (plain.advantage, rollout.logp))
    found = [(x - sum(a) / len(a)) * (y - sum(p) / len(p)) for x, y in zip(a, p, strict=True)]
    least = sorted(found, reverse=True)[max(1, math.floor(share * len(found))) - 1]
    credit = covariance_charged(baselined(), share=share)(rollout)
    assert credit.charge[rollout.mask].tolist() == [float(c >= least) for c in found]
    assert torch.equal(credit.advantage, plain.advantage)
    batch = decisions(rollout, per_token(rollout.mask), *credit)
    assert torch.equal(batch.charge, credit.charge)
    assert isinstance(decisions(rollout, per_token(rollout.mask), *plain).charge, tuple)


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("average", [per_token, per_row])
@pytest.mark.parametrize("of", [PPOObjective, GRPOObjective])
def test_the_rows_that_were_right_are_imitated(
    of: Any, average: Any, corrected: bool, softmax: nn.Module, sample: Callable[..., Rollout], float64: None
) -> None:
    """The objective gains 0.3 times the mean of log pi over their decisions, in scalar loops, and its gradient.

    corrected: an engine sampled, and its decisions have importance weights.
    """
    softmax, rollout = softmax.double(), sample(softmax)
    importance = torch.rand(rollout.mask.shape).double() if corrected else None
    rollout = replace(rollout, logp=rollout.logp.double(), reward=rollout.reward.double(), importance=importance)
    objective = of(softmax, None) if of is PPOObjective else of(softmax)
    plain, imitated = baselined(), imitating(baselined(), weight=0.3, weights=average)
    weight = average(rollout.mask).double()
    first, second = (decisions(rollout, weight, *assign(rollout)) for assign in (plain, imitated))
    weight = weight if importance is None else weight * importance
    logp = softmax(rollout.obs).log_prob(rollout.action)
    total, wanted, rows = 0.0, torch.zeros(()).double(), rollout.reward.sum(1).tolist()
    assert min(rows) < 0 < max(rows)
    for i, returned in enumerate(rows):
        for t in range(rollout.mask.shape[1]):
            if returned > 0 and rollout.mask[i, t]:
                total, wanted = total + float(weight[i, t]), wanted + weight[i, t] * logp[i, t]
    wanted = 0.3 * wanted / total
    found = objective(second)[0] - objective(first)[0]
    assert_close(found, wanted)
    parameters = list(softmax.parameters())
    for x, y in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert_close(x, y)
    nothing = imitated(replace(rollout, reward=-rollout.reward.abs())).imitation
    assert not nothing.any(), "no row was right"
    charged = imitating(covariance_charged(plain, share=0.3), weight=0.3)(rollout)
    assert torch.equal(charged.charge, covariance_charged(plain, share=0.3)(rollout).charge)
