"""What several ranks learn is what one process learns from the rows of all of them; alone, nothing is summed."""

import functools
import math
import pickle
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rank_cases import CASES, LAYOUTS, MORE, Messages, Problem, alone, as_rank, learned, spawned
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves

from policygrad import ranks
from policygrad.advantages import mean_baseline, standardize, time_mean_baseline, unnormalized
from policygrad.algorithms.ppo import PPOObjective
from policygrad.algorithms.reinforce import ReinforceObjective
from policygrad.control.normalization import RunningStatistics
from policygrad.credit import grouped, standardized
from policygrad.diagnostics import explained_variance
from policygrad.errors import NonFiniteError, UserError
from policygrad.rollout import Rollout, decisions, minibatches
from policygrad.samplers import WithoutFlatGroups, mean_of
from policygrad.updates import ascend
from policygrad.weights import per_budget, per_episode, per_row, per_token

close = partial(assert_close, rtol=0, atol=1e-12)
SOME = [name for name in CASES if "by token" in name][::3] + list(MORE)[::3]


# What is learned


@cache
def one_process(case: str, layout: str) -> tuple[Tensor, list[dict[str, float]]]:
    return alone(case, layout)


def assert_as_alone(case: str, layout: str, found: list[Any]) -> None:
    """The same parameters on every rank, bit for bit, and those of one process to rounding; its metrics, too."""
    parameters, rows = one_process(case, layout)
    for other, _ in found[1:]:
        assert torch.equal(found[0][0], other)
    close(found[0][0], parameters)
    for row, row_alone in zip(found[0][1], rows, strict=True):
        assert row == pytest.approx(row_alone, rel=1e-9, abs=1e-9)


def assert_learned_alike(case: str, layout: str) -> None:
    """Of threads as ranks."""
    problems = [Problem(layout) for _ in LAYOUTS[layout]]
    made = [problem.learner(case, problem.parts[i]) for i, problem in enumerate(problems)]
    assert_as_alone(case, layout, ranks.simulated([partial(learned, *one) for one in made]))


@pytest.mark.parametrize("case", CASES)
def test_three_ranks_one_of_them_masked_learn_what_one_process_does(case: str, float64: None) -> None:
    assert_learned_alike(case, "three")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "three"])
@pytest.mark.parametrize("case", SOME)
def test_it_does_not_matter_who_has_which_rows(case: str, layout: str, float64: None) -> None:
    assert_learned_alike(case, layout)


# layout -> cases in processes: what torch.distributed sums is what threads sum
SPAWNED = {"empty": SOME, "cut": [f"{name} by token" for name in ("trpo", "npg", "ppo", "grpo", "reinforce")]}


# Of all types, with one number and with none, and parameters.
TENSORS = [torch.arange(3).to(x) for x in (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)]
TENSORS += [torch.tensor(-0.0), torch.tensor([math.nan, -math.inf]), nn.Parameter(torch.ones(2))]


def in_a_process() -> dict[str, Any]:
    """All cases of SPAWNED as one of two ranks, and what the functions of `ranks` say there."""
    torch.set_default_dtype(torch.float64)
    found: dict[str, Any] = {
        f"{layout}, {case}": as_rank(case, layout) for layout, cases in SPAWNED.items() for case in cases
    }
    here = ranks.rank()
    flags, own = ranks.gathered(torch.arange(3 + here) % 2 == 0)
    found["gathered"] = flags.tolist(), own.start, own.stop
    found["sums"] = [x.tolist() for x in ranks.sum_all([torch.ones(2), torch.tensor([here]), torch.ones(1).float()])]
    found["total"], found["some"] = ranks.total(here + 1), ranks.some(here == 1)
    found["objects"] = []
    for length in (10, 3000 * here, 3000, 200_000, 10):
        with Messages() as messages:
            seen = ranks.objects((here, b"x" * length))
        found["objects"].append(([(i, len(x)) for i, x in seen], messages.calls["allgather_"]))
    found["tensors"] = ranks.each([x.repeat(here) if x.ndim else x for x in TENSORS])
    try:
        with ranks.agreed():
            if here == 1:
                raise UserError("no such file")
    except UserError as error:
        found["error"] = str(error)
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes have found, started once."""
    return spawned(in_a_process, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("layout", SPAWNED)
def test_two_processes_learn_what_one_does(layout: str, processes: list[dict[str, Any]], float64: None) -> None:
    for case in SPAWNED[layout]:
        assert_as_alone(case, layout, [found[f"{layout}, {case}"] for found in processes])


def test_processes_sum_gather_and_fail_together(processes: list[dict[str, Any]]) -> None:
    for i, found in enumerate(processes):
        flags = [True, False, True, True, False, True, False]
        assert found["gathered"] == (flags, *[(0, 3), (3, 7)][i])
        assert found["sums"] == [[2.0, 2.0], [1], [2.0]]
        assert (found["total"], found["some"]) == (3, True)
    assert [found["error"] for found in processes] == ["rank 1: no such file", "no such file"]


def test_objects_of_any_length_are_one_message_once_there_is_room(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        (short, _), (one, first), (both, second), (large, two), (after, last) = found["objects"]
        assert (short, after) == ([(0, 10), (1, 10)],) * 2
        assert (one, both, large) == ([(0, 0), (1, 3000)], [(0, 3000), (1, 3000)], [(0, 200_000), (1, 200_000)])
        assert (first, second, two, last) == (2, 1, 2, 1)  # a large one does not make room for as much


def test_tensors_come_as_they_were_sent(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        for i, sent in enumerate(found["tensors"]):
            for x, wanted in zip(sent, TENSORS, strict=True):
                wanted = wanted.detach().repeat(i) if wanted.ndim else wanted
                assert (x.dtype, x.shape) == (wanted.dtype, wanted.shape)
                assert torch.equal(*(y.reshape(-1).view(torch.uint8) for y in (x, wanted)))


# The functions


def test_alone_nothing_changes() -> None:
    x = torch.randn(3)
    assert ranks.sum(x) is x
    assert ranks.maximum(x) is x
    assert ranks.gathered(x)[0] is x
    assert ranks.apart(torch.arange(3)).tolist() == [0, 1, 2]
    assert (ranks.size(), ranks.rank(), ranks.seed(5), ranks.device("cuda")) == (1, 0, 5, "cuda")
    assert (ranks.total(2.5), ranks.some(False), ranks.objects("a"), ranks.from_first(lambda: 7)) == (
        2.5,
        False,
        ["a"],
        7,
    )
    assert ranks.share(5) == slice(0, 5)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 3), (2, 3), (0, 2)])
def test_shares_cover_everything_once_and_are_even(count: int, size: int) -> None:
    shares = ranks.simulated([lambda: ranks.share(count)] * size)
    assert [i for one in shares for i in range(count)[one]] == list(range(count))
    lengths = [one.stop - one.start for one in shares]
    assert max(lengths) - min(lengths) <= 1


def test_seeds_and_groups_of_ranks_differ() -> None:
    assert len({*ranks.simulated([lambda: ranks.seed(5)] * 4), 5}) == 5
    groups = torch.cat(ranks.simulated([lambda: ranks.apart(torch.arange(3))] * 3))
    assert len(groups.unique()) == 9


def test_large_sums_go_in_several_messages_and_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BUCKET", 5)
    tensors = [torch.randn(3), torch.randn(2, 2), torch.arange(4), torch.randn(9), torch.randn(())]
    for found in ranks.simulated([lambda: ranks.sum_all(tensors)] * 2):
        assert all(torch.equal(x, 2 * y) for x, y in zip(found, tensors, strict=True))


def test_an_error_of_one_rank_is_that_of_all() -> None:
    said = []

    def work(fails: bool) -> None:
        try:
            with ranks.agreed():
                if fails:
                    raise ValueError("broken")
        except (ranks.Elsewhere, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")

    ranks.simulated([partial(work, i == 1) for i in range(3)])
    assert sorted(said) == ["Elsewhere: rank 1: ValueError: broken"] * 2 + ["ValueError: broken"]


def test_what_rank_0_makes_is_made_once_and_its_error_is_that_of_all() -> None:
    made: list[int] = []
    assert ranks.simulated([lambda: ranks.from_first(lambda: made.append(1) or "it")] * 3) == ["it"] * 3
    assert made == [1]

    def fails() -> None:
        with pytest.raises(UserError, match="no room"):
            ranks.from_first(refused)

    def refused() -> None:
        raise UserError("no room")

    ranks.simulated([fails] * 2)


def test_rank_0_makes_first() -> None:
    order: list[int] = []
    ranks.simulated([lambda: ranks.in_turn(lambda: order.append(ranks.rank()))] * 3)
    assert order[0] == 0
    assert sorted(order) == [0, 1, 2]


def test_a_difference_is_said_with_its_rank() -> None:
    def work(rate: float) -> None:
        with pytest.raises(UserError, match=r"option rate is 0\.1 on rank 0 and 0\.2 on rank 1: start all"):
            ranks.check_alike("option", {"seed": 0, "rate": rate})

    ranks.simulated([partial(work, 0.1), partial(work, 0.2)])


# Messages


def messages_of(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any], count: int = 2) -> list[str]:
    """What rank 0 of some simulated ones sends in this work: "sum" and "max" of tensors, and "objects"."""
    sent: list[str] = []
    objects, reduce = ranks.Threads.objects, ranks.Threads.reduce

    def sending(self: Any, x: Any) -> Any:
        if self.rank == 0:
            sent.append("objects")
        return objects(self, x)

    def reducing(self: Any, x: Tensor, how: str) -> Tensor:
        found = reduce(self, x, how)
        if self.rank == 0:
            sent[-1] = how  # which is made of objects here
        return found

    monkeypatch.setattr(ranks.Threads, "objects", sending)
    monkeypatch.setattr(ranks.Threads, "reduce", reducing)
    ranks.simulated([work] * count)
    return sent


def test_each_collective_is_one_message_and_several_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout = Problem("even").parts[0]
    mask, reward = rollout.mask, rollout.reward
    asking = {
        "standardize": partial(standardize, reward, mask),
        "explained variance": partial(explained_variance, reward, 2 * reward, per_token_alone(mask)),
        **{f"weights {x.__name__}": partial(x, mask) for x in (per_token, per_row, per_episode, per_budget)},
        "mean": partial(mean_baseline, rollout, reward),
        "time mean": partial(time_mean_baseline, rollout, reward),
        "groups": partial(grouped(), rollout),
        "standardized groups": partial(standardized(grouped(), unnormalized), rollout),
        "unit": partial(mean_of, reward, mask),
        "total": partial(ranks.total, 3),
        "rows": partial(ranks.gathered, reward),
    }
    for name, work in asking.items():
        assert messages_of(monkeypatch, work) == ["objects"], name
        monkeypatch.undo()
    several = [work for name, work in asking.items() if name != "rows"]  # which is a function around one

    def at_once() -> None:
        one_by_one = [work() for work in several]
        found = ranks.together(*map(ranks.begun, several))
        for x, y in zip(tree_leaves(one_by_one), tree_leaves(found), strict=True):
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))

    assert messages_of(monkeypatch, at_once) == ["objects"] * (len(several) + 1)


def per_token_alone(mask: Tensor) -> Tensor:
    return mask / mask.sum()


@ranks.collective
def asks_twice(x: int) -> Any:
    first = yield x
    second = yield 10 * sum(first)
    return first, second


def test_questions_after_questions_go_together_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        here = ranks.rank()
        found = ranks.together(asks_twice.steps(here + 1), ranks.begun(ranks.total, here), ranks.begun(lambda: "no"))
        assert found == [([1, 2], [30, 30]), 1, "no"]

    assert messages_of(monkeypatch, work) == ["objects"] * 2
    monkeypatch.undo()
    assert asks_twice(1) == ([1], [10])


def test_a_wrapper_of_a_collective_and_its_copy_are_not_passed_over() -> None:
    @functools.wraps(asks_twice)
    def wrapper(x: int) -> str:
        return "wrapped"

    @ranks.collective
    @functools.wraps(asks_twice)
    def again(x: int) -> Any:
        first, second = yield from asks_twice.steps(x)
        return "again", first, second

    assert ranks.together(ranks.begun(wrapper, 1)) == ["wrapped"]
    assert again(1) == ("again", [1], [10])
    assert pickle.loads(pickle.dumps(per_token)) is per_token
    assert (
        ranks.together(ranks.begun(partial(partial(per_budget, limit=3), limit=4), torch.ones(1, 2).bool()))[0]
        .eq(0.25)
        .all()
    )


@pytest.mark.parametrize("sums", [True, False])
def test_an_agreement_rides_on_the_next_message(sums: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        heard: list[Any] = []
        with ranks.agreed(heard.append) as told:
            told.own = ranks.rank()
        assert not heard
        assert float(ranks.sum(torch.ones(())) if sums else ranks.total(1)) == 2
        assert heard == [[0, 1]]

    assert messages_of(monkeypatch, work) == (["objects", "sum"] if sums else ["objects"])


@pytest.mark.parametrize("sums", [True, False])
def test_an_error_that_rides_ends_all(sums: bool) -> None:
    said = []

    def work(fails: bool) -> None:
        try:
            with ranks.agreed(lambda _: said.append("heard")):
                if fails:
                    raise ValueError("broken")
            _ = ranks.sum(torch.ones(())) if sums else ranks.total(1)
            said.append("went on")
        except (ranks.Elsewhere, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")

    ranks.simulated([partial(work, i == 1) for i in range(3)])
    assert sorted(said) == ["Elsewhere: rank 1: ValueError: broken"] * 2 + ["ValueError: broken"]


def test_ranks_with_shards_do_not_put_an_agreement_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_lockstep", True)

    def work() -> None:
        heard: list[Any] = []
        with ranks.agreed(heard.append):
            pass
        assert heard == [[None, None]]

    assert messages_of(monkeypatch, work) == ["objects"]


# Of one iteration: o asks for objects and s sums tensors. unit: the critic's; credit: with weights; diagnosis: of the
# whole update. An epoch of minibatches is prepared in one message, and a whole batch is asked for its weight.
ITERATIONS = {
    "ppo by token": ("unit o, credit o, 2 epochs os os, diagnosis o"),
    "grpo by row": ("credit o, 2 epochs os os, diagnosis o"),
    "reinforce by episode": ("unit o, 2 steps oos oos, diagnosis o, fit os, explained variance o"),
    "actor_critic by token": ("unit o, 2 steps oos oos, diagnosis o"),
    "trpo by token": (
        "unit o, step oo s, products ssssssssss, line search s, diagnosis o, fit os, explained variance o"
    ),
}


@pytest.mark.parametrize("case", ITERATIONS)
def test_an_iteration_sends_its_gradients_and_little_else(
    case: str, monkeypatch: pytest.MonkeyPatch, float64: None
) -> None:
    problems = [Problem("even") for _ in range(2)]
    made = [iter(problem.learner(case, part)[0]) for problem, part in zip(problems, problems[0].parts, strict=True)]
    sent = messages_of(monkeypatch, lambda: next(made[ranks.rank()]))
    assert "".join(x[0] for x in sent) == "".join(re.findall(r"\b[os]+\b", ITERATIONS[case]))


# What is summed


def test_equal_numbers_on_all_ranks_are_standardized_to_exactly_0() -> None:
    x = torch.full((2, 3), 0.1)
    for found in ranks.simulated([lambda: standardize(x, torch.ones(2, 3, dtype=torch.bool))] * 2):
        assert torch.equal(found, torch.zeros(2, 3))


def test_a_rank_without_decisions_does_not_explain_away_equal_targets() -> None:
    def work(weight: float) -> Tensor:
        shape = (1, 2)
        return explained_variance(torch.randn(shape), torch.full(shape, -3.0 * weight), torch.full(shape, weight))

    assert ranks.simulated([partial(work, 1.0), partial(work, 0.0)]) == [0, 0]


def test_ranks_have_as_many_minibatches_of_the_weight_of_all(float64: None) -> None:
    def work(rows: int) -> list[float]:
        mask = torch.rand(rows, 2) < 0.6
        none = torch.zeros(rows, 2)
        rollout = Rollout(none, none, none, none, mask, mask, mask, torch.arange(rows))
        batch = decisions(rollout, per_token(mask), none)
        return [float(part.weight.sum()) for part in minibatches(batch, 4, 2)]

    found = ranks.simulated([partial(work, rows) for rows in (9, 1, 3)])
    assert [len(one) for one in found] == [8, 8, 8]  # 13 rows, 4 at a time, twice
    close(sum(map(sum, found)) / 4, 2.0)


def test_statistics_are_shared_between_rollouts() -> None:
    rows = [[np.random.default_rng(i).normal(i, 1 + i, (5 + i, 2)) for i in (j, j + 3)] for j in range(3)]

    def work(mine: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        statistics, seen = RunningStatistics((2,)), []
        for x in mine:
            statistics.update(x[:2])
            statistics.update(x[2:])
            statistics.share(ranks.objects(statistics.fresh()))
            seen.append(statistics.state_dict())
        return seen

    found = ranks.simulated([partial(work, mine) for mine in rows])
    for i in range(2):
        everything = np.concatenate([x for j in range(i + 1) for x in [mine[j] for mine in rows]])
        for name, x in {"mean": everything.mean(0), "var": everything.var(0), "count": len(everything)}.items():
            assert all(np.array_equal(one[i][name], found[0][i][name]) for one in found)
            np.testing.assert_allclose(found[0][i][name], x, rtol=1e-12)


def test_flat_groups_are_dropped_whole_on_all_ranks() -> None:
    """Group 0 lies on both ranks; it is flat only if one does not look at the other."""

    def rollout(reward: list[float], group: list[int]) -> Rollout:
        count = len(reward)
        ones = torch.ones(count, 1, dtype=torch.bool)
        none = torch.zeros(count, 1)
        return Rollout(none, none, none, torch.tensor(reward).unsqueeze(1), ones, ones, ones, torch.tensor(group))

    rollouts = [rollout([1.0, 2.0, 2.0], [0, 1, 1]), rollout([0.0, 3.0, 4.0], [0, 2, 2])]

    def work() -> tuple[list[float], float]:
        sample = WithoutFlatGroups(lambda _: rollouts[ranks.rank()], rounds=3)
        found = sample(nn.Identity())
        return found.reward.where(found.mask, torch.nan).flatten().tolist(), found.metrics["sampling_rounds"]

    (first, rounds), (second, others) = ranks.simulated([work] * 2)
    assert rounds == others == 3  # rank 0 has one lively row of three each time
    assert first[0] == 1.0
    assert all(map(math.isnan, first[1:]))  # of its later rounds, whose group 0 has no room on rank 1
    assert [x for x in second if not math.isnan(x)] == [0.0, 3.0, 4.0]


def with_a_term_beside(problem: Problem, rollout: Rollout, rows: int | None) -> tuple[Tensor, dict[str, float]]:
    """The parameters after a step on these rows, with log pi of the same rows beside, and its metrics."""
    likelihood = ReinforceObjective(problem.policy)

    def weighed(part: Any) -> Any:
        value, metrics = likelihood(part)
        return 0.3 * value, {"beside": metrics["objective"]}

    def beside() -> Any:
        return weighed, decisions(rollout, per_token(rollout.mask), torch.ones_like(rollout.reward))

    update = ascend(torch.optim.SGD(problem.policy.parameters(), lr=0.5), micro_batch=rows, beside=beside)
    batch = decisions(rollout, per_token(rollout.mask), rollout.reward)
    metrics = {name: float(x) for name, x in update(PPOObjective(problem.policy, None), batch).items()}
    return torch.cat([p.detach().flatten() for p in problem.policy.parameters()]), metrics


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_term_beside_adds_its_gradient_that_of_all_ranks(layout: str, rows: int | None, float64: None) -> None:
    problem = Problem(layout)
    policy, whole = problem.policy, Rollout.join(problem.parts)
    change: Any = 0.0
    for scale, objective, x in (
        (0.5, PPOObjective(policy, None), whole.reward),
        (0.15, ReinforceObjective(policy), torch.ones_like(whole.reward)),
    ):
        value = objective(decisions(whole, per_token(whole.mask), x))[0]
        found = torch.autograd.grad(value, list(policy.parameters()))
        change = change + scale * torch.cat([g.flatten() for g in found])
    before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
    expected, metrics = with_a_term_beside(problem, whole, rows)
    close(expected, before + change)
    problems = [Problem(layout) for _ in LAYOUTS[layout]]
    work = [partial(with_a_term_beside, x, x.parts[i], rows) for i, x in enumerate(problems)]
    for parameters, of_rank in ranks.simulated(work):
        close(parameters, expected)
        assert all(of_rank[name] == pytest.approx(metrics[name]) for name in ("beside", "objective", "gradient_norm"))


# What fails


def broken(fails: type[Exception] | None) -> str:
    """The error of a rank's second step, where its objective may fail."""
    problem = Problem("even")
    rollout = problem.parts[ranks.rank()]
    objective = PPOObjective(problem.policy, None)
    update = ascend(torch.optim.SGD(problem.policy.parameters(), lr=0.1))
    batch = decisions(rollout, per_token(rollout.mask), torch.ones_like(rollout.reward))
    update(objective, batch)
    before = torch.cat([p.detach().clone().flatten() for p in problem.policy.parameters()])
    if fails is not None:
        problem.policy.register_forward_pre_hook(partial(raising, fails))
    try:
        update(objective, batch)
    except Exception as error:
        assert torch.equal(before, torch.cat([p.detach().flatten() for p in problem.policy.parameters()]))
        return type(error).__name__
    return "nothing"


def raising(error: type[Exception], *_: Any) -> None:
    raise error("a NaN")


def test_an_objective_that_fails_on_one_rank_stops_all_and_changes_nothing() -> None:
    torch.manual_seed(0)
    assert ranks.simulated([partial(broken, None), partial(broken, ValueError)]) == ["NonFiniteError", "ValueError"]


def test_a_rank_that_is_lost_is_said() -> None:
    def ends() -> None:
        raise NonFiniteError("this is why")

    with pytest.raises(NonFiniteError, match="this is why"):
        ranks.simulated([ends, lambda: ranks.total(1)])


def test_replaced_rollouts_are_not_needed() -> None:
    """The cases hand the same rollout to every iteration."""
    rollout = Problem("even").parts[0]
    assert torch.equal(replace(rollout).reward, rollout.reward)


def test_layouts_are_what_they_say(tmp_path: Path, float64: None) -> None:
    assert all(not part.mask.any() for part in Problem("empty").parts[1:])
    first, second = Problem("cut").parts
    assert {*first.group.tolist()} & {*second.group.tolist()}


class Silent:
    """The store of a rank 0 that a cut network has taken away: it never answers."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def check(self, keys: list[str]) -> bool:
        return self.free.wait()

    def set(self, key: str, value: str) -> None:
        self.free.wait()


@pytest.mark.parametrize("error", [ranks.Lost("lost"), UserError("broken")])
def test_a_rank_that_cannot_reach_rank_0_any_more_speaks_itself(
    error: UserError, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ranks.Processes.__new__(ranks.Processes)
    group.rank, group.size, group.store = 1, 2, Silent()
    monkeypatch.setattr(ranks, "_joined", group)
    monkeypatch.setattr(ranks, "ANSWERING", 0.2)
    start = time.monotonic()
    assert ranks.speaks("why", error) == (True, "why")
    assert time.monotonic() - start < 5
    group.store.free.set()


@pytest.mark.parametrize(("number", "count"), [("5", "2"), ("2", "2"), ("-1", "2"), ("x", "2"), ("0", "x"), ("", "2")])
def test_a_number_that_no_rank_has_is_said_at_once(number: str, count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others would be waited for, as long as they may take."""
    for name, x in (("RANK", number), ("WORLD_SIZE", count), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, x)
    with pytest.raises(UserError, match=f"RANK is '{number}' and WORLD_SIZE '{count}': ranks are 0 to WORLD_SIZE - 1"):
        ranks.join()
