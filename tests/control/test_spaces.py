"""Spaces survive JSON, and actions arrive in the space."""

import json
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from policygrad.control.spaces import describe, rebuild, to_environment, units
from policygrad.errors import UserError, one_line

SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(4, start=-3),
    spaces.Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 5.0], np.float32)),
    spaces.Box(-np.inf, np.inf, (2,), np.float32),
    spaces.Box(0, np.inf, (2, 2), np.float64),
    spaces.Box(0, 255, (2, 1), np.uint8),
    spaces.MultiDiscrete([2, 5, 3]),
    spaces.MultiDiscrete(np.array([[2, 3], [1, 4]]), start=np.array([[0, 5], [-2, 1]])),
    spaces.MultiBinary(5),
    spaces.MultiBinary((2, 3)),
    spaces.Box(-np.inf, 3, (1,), np.float32),
    spaces.Box(np.array([[0, 0], [0, 1]], np.uint8), np.array([[9, 9], [9, 9]], np.uint8), (2, 2), np.uint8),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_space_is_rebuilt_from_its_description(space: spaces.Space) -> None:
    again = rebuild(json.loads(json.dumps(describe(space), allow_nan=False)))
    assert describe(again) == describe(space)
    assert again.shape == space.shape
    assert again.dtype == space.dtype
    if not isinstance(space, spaces.MultiBinary):  # MultiBinary(5) and MultiBinary([5]) are the same and not equal
        assert again == space


def test_one_number_stands_for_the_bounds_of_all_pixels() -> None:
    found = describe(spaces.Box(0, 255, (4, 84, 84), np.uint8))
    assert (found["low"], found["high"], found["shape"]) == ([0.0], [255.0], [4, 84, 84])


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (spaces.Text(5), "a Text space"),
        (spaces.Dict({"a": spaces.Sequence(spaces.Discrete(2))}), "a Sequence space"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "a Dict space"),
    ],
)
def test_the_space_that_is_not_supported_is_named(space: spaces.Space, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        describe(space)
    assert len(str(raised.value)) <= 200


def test_an_unknown_description_is_refused() -> None:
    with pytest.raises(UserError, match="'Text'"):
        rebuild({"kind": "Text"})


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        (spaces.Discrete(4, start=-3), [0, 3], [-3, 0]),
        (spaces.MultiDiscrete([2, 5], start=[1, -1]), [[0, 4]], [[1, 3]]),
        (SPACES[7], [[1, 2, 0, 3]], [[[1, 7], [-2, 4]]]),
        (spaces.MultiBinary((2, 2)), [[1.0, 0.0, 0.0, 1.0]], [[[1, 0], [0, 1]]]),
        (SPACES[2], [[7.0, -3.0], [-0.5, 2.0]], [[1, 0], [-0.5, 2]]),
        (spaces.Box(-1, 1, (2, 1), np.float64), [[0.25, 9.0]], [[[0.25], [1]]]),
        (spaces.Box(0, 3, (1,), np.int32), [[-9.0], [0.4], [1.7], [9.0]], [[0], [0], [2], [3]]),
    ],
    ids=str,
)
def test_an_action_arrives_from_the_start_in_the_bounds_shape_and_dtype(
    space: spaces.Space, action: Any, expected: Any
) -> None:
    given = np.array(action)
    before = given.copy()
    found = to_environment(given, space)
    assert found.tolist() == expected
    assert found.dtype == space.dtype
    assert (given == before).all(), "the action that is scored does not change"


def test_actions_in_another_space_are_refused() -> None:
    with pytest.raises(UserError, match="Dict action space"):
        to_environment(np.zeros(1), spaces.Dict({"a": spaces.Discrete(2)}))


def test_a_text_in_one_line() -> None:
    assert one_line("a\n b") == "a b"
    assert one_line(12 * "a", 10) == "aaaaaaa..."


LOW, HIGH = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("low", "high", "dtype", "center", "half_width", "bounded"),
    [
        (-1, 1, np.float32, 0, 1, True),
        (-2, 2, np.float32, 0, 2, True),
        (0, 1000, np.float32, 500, 500, True),
        (-3, 5, np.float64, 1, 4, True),
        (2, 2, np.float32, 2, 0, False),
        (-np.inf, np.inf, np.float32, 0, 1, False),
        (LOW, HIGH, np.float32, 0, 1, False),
        (-3.4e38, 3.4e38, np.float32, 0, 1, False),
        (-1e300, 1e300, np.float64, 0, 1, False),
        (5, np.inf, np.float32, 6, 1, False),
        (-3.4e38, -7, np.float32, -8, 1, False),
        (0, 255, np.uint8, 127.5, 127.5, True),
        (-128, 127, np.int8, -0.5, 127.5, True),
        (-(2**31), 2**31 - 1, np.int32, 0, 1, False),
        (0, 2**63 - 1, np.int64, 1, 1, False),
        (-65504, 65504, np.float16, 0, 1, False),
    ],
)
def test_the_bounds_are_at_1_and_a_bound_that_no_number_reaches_is_none(
    low: float, high: float, dtype: Any, center: float, half_width: float, bounded: bool
) -> None:
    found = units(spaces.Box(low, high, (1,), dtype))
    assert (found.center.item(), found.half_width.item(), found.bounded.item()) == (center, half_width, bounded)


def test_each_dimension_has_units_of_its_own() -> None:
    found = units(spaces.Box(np.array([[-1.0, 0.0], [-np.inf, 3.0]]), np.array([[1.0, 10.0], [np.inf, 3.0]])))
    assert found.center.tolist() == [0, 5, 0, 3]
    assert found.half_width.tolist() == [1, 5, 1, 0]
