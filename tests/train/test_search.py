"""What is tuned: only options that the method reads, only within their bounds, and nothing that is given."""

import math
from dataclasses import fields
from typing import Any

import pytest

from policygrad.train.methods import METHODS
from policygrad.train.options import EPISODIC, Options, compares_groups, options_of, validate, with_rate, with_values
from policygrad.train.search import TABLE, Choice, Range, searched, settled

BOUNDS = {f.name: f.metadata["bound"] for f in fields(Options)}
EVERYWHERE = [(method, world) for method in METHODS for world in ("control", "exact", "language")]
ODD: list[dict[str, Any]] = [
    {},
    {"num_envs": 3, "num_steps": 7, "minibatch_size": 21},
    {"num_envs": 1, "num_steps": 1000, "minibatch_size": 999, "steps": 500},
]


class Asked:
    """A trial in which the lowest or the highest number is drawn."""

    def __init__(self, high: bool) -> None:
        self.high, self.params = high, dict[str, Any]()

    def suggest_float(self, name: str, low: float, high: float, *, log: bool) -> None:
        assert low < high
        assert low > 0 or not log
        self.params[name] = high if self.high else low

    def suggest_int(self, name: str, low: int, high: int) -> None:
        assert low <= high
        self.params[name] = high if self.high else low

    def suggest_categorical(self, name: str, values: list[str]) -> None:
        self.params[name] = values[-1 if self.high else 0]


def test_every_line_is_of_an_option_and_for_some_run() -> None:
    assert {name for name, _, _ in TABLE} <= BOUNDS.keys()
    used = {name for method, world in EVERYWHERE for name in searched(options_of(method, world)(), ())}
    rest = {name for name, _, _ in TABLE} - used
    assert rest == {"n", "natural_learning_rate", "kl_old_target"}  # of a credit, a step rule and a penalty
    options = with_values(options_of("npg", "control")(), {"credit": "n_step", "step_rule": "learning_rate"})
    assert {"n", "natural_learning_rate"} <= searched(options, ()).keys()
    options = with_values(options_of("ppo", "control")(), {"kl_old_coefficient": 1.0, "kl_old_target": 0.01})
    assert "kl_old_target" in searched(options, ())


@pytest.mark.parametrize(("method", "world"), EVERYWHERE)
@pytest.mark.parametrize("high", [False, True])
@pytest.mark.parametrize("odd", ODD, ids=str)
def test_whatever_is_drawn_is_a_run(method: str, world: str, high: bool, odd: dict[str, Any]) -> None:
    """Both ends of every range, with rollouts and minibatches of any size."""
    defaults = options_of(method, world)()
    known = {f.name for f in fields(defaults)}
    given = {name: x for name, x in odd.items() if name in known and world == "control"}
    if compares_groups(defaults):
        given |= {"num_envs": 3} if "num_envs" in given else {}
    if getattr(defaults, "credit", None) in EPISODIC:
        given.pop("num_steps", None)
    options = with_rate(with_values(defaults, given))
    validate(options, defaults)
    ranges, trial = searched(options, given), Asked(high)
    assert ranges
    assert not ranges.keys() & given.keys()
    for name, x in ranges.items():
        x.draw(trial, name)
        here = x.value(x.drawn(getattr(options, name)))  # what it is without tuning is in the range
        apart = isinstance(here, float) and not math.isclose(here, getattr(options, name), rel_tol=5e-3, abs_tol=1e-8)
        assert not apart, name
    values = settled({name: x.value(trial.params[x.label(name)]) for name, x in ranges.items()}, options)
    validate(with_values(options, values), options)


@pytest.mark.parametrize(("x", "drawn"), [(0.98, 0.02), (0.9999, 0.0001), (0.9, 0.1)])
def test_a_discount_is_drawn_by_its_distance_from_1(x: float, drawn: float) -> None:
    how = Range(0.9, 0.9999, "near_one")
    assert how.drawn(x) == pytest.approx(drawn)
    assert how.value(how.drawn(x)) == x


def test_values_can_be_read() -> None:
    assert Range(1e-5, 1e-2).value(0.000123456) == 0.000123
    assert Range(16, 512, "powers").value(5) == 32
    assert Range(16, 512, "powers").drawn(100) == 7
    assert Choice(((64, 64), (256, 256))).value("256 256") == (256, 256)
    assert str(Range(0.9, 0.9999, "near_one")) == "0.9 to 0.9999 (log of 1 - x)"


def test_the_value_without_tuning_widens_the_range() -> None:
    options = with_values(options_of("ppo", "control")(), {"learning_rate": 0.5, "hidden": (8,), "clip_low": 0.05})
    found = searched(options, ())
    assert found["learning_rate"] == Range(1e-5, 0.5)
    assert found["clip_low"] == Range(0.05, 0.4, "linear")
    assert found["hidden"] == Choice(((64, 64), (256, 256), (8,)))
    assert found["entropy_coefficient"] == Range(1e-8, 0.1)  # a logarithm has no 0


@pytest.mark.parametrize(
    ("method", "given", "apart"),
    [
        ("ppo", {"clip_low": math.inf, "clip_high": math.inf}, {"clip_low", "clip_high"}),
        ("ppo", {"gamma": 1.0}, {"gamma"}),
        ("ppo", {"start": "somewhere"}, {"hidden", "activation"}),
        ("ppo", {"iterations": 5}, {"num_steps"}),
        ("reinforce", {"iterations": 5}, {"num_envs"}),
        ("grpo", {"group_size": 4}, {"num_envs"}),
        ("grpo", {}, {"minibatch_size", "gamma", "lam", "num_steps"}),
        ("ppo", {}, {"critic_learning_rate", "critic_epochs", "delta", "kl_old_target", "num_envs"}),
    ],
)
def test_what_is_off_or_unread_stays(method: str, given: dict[str, Any], apart: set[str]) -> None:
    options = with_values(options_of(method, "control")(), given)
    assert not searched(options, ()).keys() & apart


def test_networks_of_ones_own_are_not_shaped() -> None:
    assert not searched(options_of("ppo", "control")(), (), own_network=True).keys() & {"hidden", "activation"}


def test_a_trial_has_room_for_ten_rollouts() -> None:
    options = with_values(options_of("ppo", "control")(), {"steps": 8 * 64 * 10, "num_steps": 16})
    assert searched(options, ())["num_steps"] == Range(16, 64, "powers")
