"""The weighted sum of reward functions, and a sum that cannot be made."""

import functools
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from language.rewards.conftest import NAN, judged, length, returning, said
from policygrad.errors import UserError
from policygrad.language.rewards import Rewards, matches


def test_the_total_is_the_weighted_sum_of_the_functions() -> None:
    total, parts = judged(length, returning([1, 0, -2]), weights=[2.0, 0.5])
    assert_close(total, torch.tensor([2.5, 4.0, 5.0]))
    assert list(parts) == ["length", "reward"]
    assert_close(parts["length"], torch.tensor([1.0, 2.0, 3.0]))
    assert_close(parts["reward"], torch.tensor([1.0, 0.0, -2.0]))
    assert total.dtype == parts["reward"].dtype == torch.float32


def test_a_function_that_does_not_apply_adds_nothing_and_is_nan_in_its_part() -> None:
    """Where none applies there is no reward; 0 would be one."""
    total, parts = judged(returning([None, 1.0, None]), returning([2.0, 4.0, None]), weights=[10.0, 1.0])
    assert_close(total, torch.tensor([2.0, 14.0, NAN]), equal_nan=True)
    assert_close(parts["reward"], torch.tensor([NAN, 1.0, NAN]), equal_nan=True)
    assert_close(parts["reward-2"], torch.tensor([2.0, 4.0, NAN]), equal_nan=True)


def test_names_are_unique() -> None:
    assert Rewards([length, length, functools.partial(length), matches("a")]).names == [
        "length",
        "length-2",
        "length-3",
        "format",
    ]
    assert Rewards([length] * 3, names=["a", "a-2", "a"]).names == ["a", "a-2", "a-3"]


def test_a_column_of_another_length() -> None:
    assert said(length, columns={"answer": [1, 2]}) == "answer has 2 entries for 3 completions: give one each"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "there is no reward function: give at least one"),
        ([length], {"weights": [1.0, 2.0]}, "there are 1 reward functions and 2 weights: give one each"),
        ([length, length], {"names": ["a"]}, "there are 2 reward functions and 1 names: give one each"),
        ([length], {"weights": [NAN]}, "a reward weight is nan: give a finite number"),
        ([length], {"time_limit": 0.0}, "the time limit of reward functions is 0.0 s: give more than 0"),
    ],
)
def test_rewards_that_cannot_be_made(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Rewards(arguments, **options)
    assert str(caught.value) == message
