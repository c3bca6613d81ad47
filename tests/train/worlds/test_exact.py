"""Exact worlds: every method on them, judged in closed form."""

from typing import Any

import pytest
import torch
from outcomes import WHOLE

import policygrad as pg
from policygrad.errors import UserError
from policygrad.exact.closed_form import expected_return, optimal_probs
from policygrad.exact.policies import probabilities

NAMES = ("chain", "bandit", "cliff", "garnet", "two_states", "tokens")


@pytest.mark.parametrize("task", ["exact:chain", "exact:tokens"])
@pytest.mark.parametrize("method", WHOLE)
def test_every_method_trains_and_is_judged(method: str, task: str) -> None:
    run = pg.train(method, task, iterations=2, num_envs=8, progress=False)
    found = [row["expected_return"] for row in run.metrics]
    assert (len(found), found[0], found[-1]) == (3, run.before.score, run.after.score)
    assert run.after == run.evaluate()
    assert run.after.score != run.before.score
    assert run.after.score <= run.after.best + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_every_world_is_there_under_its_name(name: str) -> None:
    short = {} if name == "tokens" else {"episode_steps": 20}
    run = pg.train("actor_critic", f"exact:{name}", iterations=1, num_envs=4, progress=False, **short)
    assert run.world.name == f"exact:{name}"
    world = run.world.world
    with torch.no_grad():
        assert run.after.score == pytest.approx(float(expected_return(world, probabilities(run.world.table))))
        assert run.after.best == pytest.approx(float(expected_return(world, optimal_probs(world))))
    assert {p.dtype for module in (run.policy, run.critic) for p in module.parameters()} == {torch.float64}


@pytest.mark.parametrize(("method", "iterations"), [("ppo", 10), ("trpo", 20), ("grpo", 30)])
@pytest.mark.parametrize("task", ["exact:tokens", "exact:bandit"])
def test_it_learns(method: str, iterations: int, task: str) -> None:
    run = pg.train(method, task, iterations=iterations, evaluate_every=0, progress=False)
    assert len([row for row in run.metrics if "expected_return" in row]) == 2
    assert run.after.score - run.before.score > 0.5 * (run.after.best - run.before.score)


def test_the_discount_is_the_worlds_unless_another_is_given() -> None:
    run = pg.train("ppo", "exact:chain", iterations=1, progress=False)
    assert run.options.gamma == run.world.world.gamma == 0.9
    assert pg.train("ppo", "exact:chain", iterations=1, gamma=0.5, progress=False).options.gamma == 0.5


def test_evaluation_along_the_way() -> None:
    run = pg.train("ppo", "exact:bandit", iterations=4, evaluate_every=2, progress=False)
    assert [row["steps"] for row in run.metrics if "expected_return" in row] == [0, 64, 128]
    assert "J = " in run.after.line()
    assert set(run.after.summary()) == {"score", "best"}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("exact:chian", {}, "chain"),
    ("exact:tokens", {"num_envs": 6}, "num_envs is 6: exact:tokens answers each prompt 4 times"),
    ("exact:chain", {"policy": torch.nn.Linear(1, 1)}, "an exact one has its own tables"),
    ("exact:chain", {"critic": torch.nn.Linear(1, 1)}, "an exact one has its own tables"),
    ("exact:chain", {"engine": print}, "an exact one has its own tables"),
    ("exact:chain", {"num_steps": 5}, "no option 'num_steps' on exact"),
    ("exact:chain", {"num_envs": 0}, "num_envs is 0"),
]


@pytest.mark.parametrize(("task", "values", "said"), REFUSED, ids=str)
def test_what_it_has_no_use_for_is_refused(task: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.train("ppo", task, iterations=1, progress=False, **values)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("values", [{"count": 5}, {"greedy": True}])
def test_an_exact_evaluation_takes_no_samples(values: dict[str, Any]) -> None:
    run = pg.train("ppo", "exact:bandit", iterations=1, progress=False)
    with pytest.raises(UserError, match="is evaluated exactly, not by samples"):
        run.evaluate(**values)
