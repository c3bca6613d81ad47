"""Each check passes valid values through unchanged, and refuses the rest."""

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from policygrad.control.checks import (
    check_groups,
    checked_observations,
    checked_reward,
    failure,
    final_observations,
    stored_dtype,
)
from policygrad.errors import UserError

IMAGE, BOX = spaces.Box(0, 255, (2,), np.uint8), spaces.Box(-1, 1, (2,), np.float32)


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (BOX, np.array([[0.5, 3.0]], np.float32)),
        (IMAGE, np.array([[0, 255]], np.uint8)),
        (IMAGE, np.array([[0, 255]], np.int64)),
        (IMAGE, np.array([[0.0, 255.0]])),
        (spaces.Discrete(3, start=2), np.array([4])),
    ],
)
def test_valid_observations_pass_through(space: spaces.Space, obs: np.ndarray) -> None:
    found = checked_observations(obs, space, 1)
    np.testing.assert_array_equal(found, obs)
    assert found.dtype == space.dtype


@pytest.mark.parametrize(
    ("space", "obs", "said"),
    [
        (BOX, np.zeros((1, 3), np.float32), "shape"),
        (BOX, np.zeros((2, 2), np.float32), "shape"),
        (BOX, np.array([[np.nan, 0]], np.float32), "NaN"),
        (BOX, np.array([[np.inf, 0]], np.float32), "infinite"),
        (IMAGE, np.array([[0.5, 0]]), "uint8"),
        (IMAGE, np.array([[np.nan, 0]]), "uint8"),
        (IMAGE, np.array([[256, 0]]), "uint8"),
        (IMAGE, np.array([[-1, 0]]), "uint8"),
        (spaces.Discrete(3, start=2), np.array([1]), "Discrete"),
        (spaces.MultiBinary(2), np.array([[1, -1]], np.int8), "MultiBinary"),
        (spaces.MultiBinary(2), np.array([[0, 2]], np.int8), "MultiBinary"),
        (spaces.Discrete(3, start=2), np.array([5]), "Discrete"),
    ],
)
def test_invalid_observations_are_refused(space: spaces.Space, obs: np.ndarray, said: str) -> None:
    with pytest.raises(UserError, match=said):
        checked_observations(obs, space, 1)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (np.uint8, np.uint8),
        (np.int8, np.int8),
        (np.bool_, np.bool_),
        (np.uint32, np.int64),
        (np.float16, np.float32),
        (np.float64, np.float32),
    ],
)
def test_the_stored_dtype(dtype: Any, expected: Any) -> None:
    assert stored_dtype(np.dtype(dtype)) == expected
    torch.from_numpy(np.zeros(1, stored_dtype(np.dtype(dtype)))) + 1  # torch can compute with it


def test_floats_are_stored_in_the_default_dtype(float64: None) -> None:
    assert stored_dtype(np.dtype(np.float32)) == np.float64


def test_rewards_behind_the_mask_are_0() -> None:
    found = checked_reward(np.array([1.5, np.nan, 2.0]), np.array([True, False, True]))
    assert found.tolist() == [1.5, 0, 2]


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_refused(wrong: float) -> None:
    with pytest.raises(UserError, match=f"reward of {wrong}"):
        checked_reward(np.array([1.0, wrong]), np.array([True, True]))


def test_final_observations_replace_those_after_the_reset() -> None:
    obs = np.array([[1.0], [2.0]])
    final = final_observations(obs, np.array([False, True]), {"final_obs": np.array([None, np.array([9.0])], object)})
    assert final.tolist() == [[1], [9]]
    assert obs.tolist() == [[1], [2]], "the environments' own array does not change"


def test_groups_start_from_equal_observations() -> None:
    check_groups(np.array([[1.0], [1.0], [2.0], [2.0]]), 2)
    with pytest.raises(UserError, match="groups of 2"):
        check_groups(np.array([[1.0], [1.0], [2.0], [3.0]]), 2)


def test_an_error_becomes_one_short_line() -> None:
    text = str(failure("step", RuntimeError("a\nb " + 300 * "x")))
    assert text.startswith("the environment raised RuntimeError in step: a b xxx")
    assert len(text) <= 200
    own = UserError("as it is")
    assert failure("step", own) is own
