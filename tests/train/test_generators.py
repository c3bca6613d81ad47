"""A run's own random numbers, from whichever generator they are drawn."""

import copy
import json
import random
from typing import Any

import numpy as np
import pytest
import torch

from policygrad.train.generators import Generators

# ruff: noqa: NPY002 - the legacy generator is the global one


def drawn() -> list[float]:
    """Numbers from each global generator, one of a pair among them, so that the other is part of the state."""
    return [random.random(), random.gauss(), np.random.random(), np.random.normal(), torch.rand(()).item()]


def inside(generators: Generators) -> list[float]:
    with generators.inside():
        return drawn()


def test_the_seed_determines_them_all_and_each_call_goes_on_where_the_last_one_stopped() -> None:
    generators, again = Generators(3), Generators(3)
    first = inside(generators)
    drawn()  # the caller's own are no part of it
    second = inside(generators)
    assert [inside(again), inside(again)] == [first, second]
    for other in (second, inside(Generators(4))):
        assert not set(first) & set(other)


def test_the_callers_generators_stay_as_they_were_also_after_an_error() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn() + drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    found = drawn()
    with pytest.raises(TypeError), Generators(0).inside():
        random.random(drawn())  # type: ignore[call-arg]
    assert found + drawn() == expected


def test_the_state_is_of_tensors_and_numbers_and_restores_them() -> None:
    generators, other = Generators(3), Generators(4)
    inside(generators)
    state: Any = copy.deepcopy(generators.state_dict())
    expected = inside(generators)
    other.load_state_dict(state)
    assert inside(other) == expected
    plain = [x for part in (state["python"], state["numpy"]) for x in part.values() if not isinstance(x, torch.Tensor)]
    json.dumps(plain)


def test_a_large_seed_is_a_seed_too() -> None:
    assert inside(Generators(2**63 - 1)) != inside(Generators(2**63 - 2))
