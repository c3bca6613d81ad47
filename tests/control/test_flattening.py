"""Flattened observations are Gymnasium's, to the bit."""

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, iterate

from policygrad.control.flattening import flattener
from policygrad.errors import UserError

SPACES = [
    spaces.MultiDiscrete([3, 2]),
    spaces.MultiDiscrete([[3, 2], [4, 1]], start=[[0, -2], [5, 0]]),
    spaces.MultiBinary((2, 3)),
    spaces.Tuple((spaces.Discrete(4, start=-1), spaces.Box(-1, 1, (2, 2), np.float32))),
    spaces.Dict({"observation": spaces.Discrete(5), "action_mask": spaces.MultiBinary(5)}),
    spaces.Dict({"b": spaces.Box(0, 255, (2, 2, 3), np.uint8), "a": spaces.Dict({"x": spaces.Box(-2, 2, ())})}),
    spaces.Tuple((spaces.Tuple((spaces.MultiDiscrete([2, 3]),)), spaces.Box(-1, 1, (3,), np.float64))),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("count", [1, 6])
def test_it_is_gymnasiums_row_by_row(space: spaces.Space, count: int) -> None:
    many = batch_space(space, count)
    many.seed(1)
    for _ in range(5):
        batch = many.sample()
        found, expected = flattener(space)(batch), np.stack([spaces.flatten(space, x) for x in iterate(many, batch)])
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


@pytest.mark.parametrize(
    ("space", "obs"),
    [
        (spaces.Discrete(3, start=1), np.array([1, 0])),
        (spaces.Discrete(3), np.array([3, 0])),
        (spaces.MultiDiscrete([2, 3]), np.array([[1, 2], [2, 0]])),
    ],
    ids=str,
)
def test_a_number_outside_its_space_is_not_a_vector_of_zeros(space: spaces.Space, obs: np.ndarray) -> None:
    with pytest.raises(UserError, match="an observation outside its"):
        flattener(spaces.Tuple((space,)))((obs,))


def test_each_batch_has_memory_of_its_own() -> None:
    flatten = flattener(spaces.Dict({"a": spaces.Discrete(2), "b": spaces.Box(-1, 1, (2,))}))
    first = flatten({"a": np.array([1]), "b": np.array([[0.5, -0.5]], np.float32)})
    flatten({"a": np.array([0]), "b": np.zeros((1, 2), np.float32)})
    np.testing.assert_array_equal(first, [[0, 1, 0.5, -0.5]])


def test_spaces_that_no_policy_takes_are_left_to_gymnasium() -> None:
    space = spaces.Text(4)
    space.seed(0)
    obs = space.sample()
    np.testing.assert_array_equal(flattener(space)(obs), gymnasium.spaces.flatten(space, obs))
