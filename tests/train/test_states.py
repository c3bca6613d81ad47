"""A state comes back from tensors and JSON as it was: every type and every bit."""

import json
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from policygrad.files import as_safetensors, bytes_of
from policygrad.train.states import decoded, encoded


def through_a_file(state: Any) -> Any:
    tree, tensors = encoded(state)
    content = b"".join(as_safetensors(tensors, {"state": json.dumps(tree, allow_nan=False)}))
    return decoded(json.loads(json.dumps(tree, allow_nan=False)), load(content))


def same(a: Any, b: Any) -> bool:
    """Equal in type and in every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor | np.ndarray):
        bits = [bytes(bytes_of(x)) if isinstance(x, Tensor) else x.tobytes() for x in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and bits[0] == bits[1]
    if isinstance(a, dict):
        return list(a) == list(b) and all(
            same(a[name], b[name]) and same(x, y) for name, x, y in zip(a, a, b, strict=True)
        )
    if isinstance(a, list | tuple | deque):
        lengths = [getattr(x, "maxlen", None) for x in (a, b)] + [len(a), len(b)]
        return lengths[0] == lengths[1] and lengths[2] == lengths[3] and all(map(same, a, b))
    return repr(a) == repr(b)


VALUES: dict[str, Any] = {
    "nothing": None,
    "flags": [True, False, np.bool_(True)],
    "integers": [0, -1, 2**63, 2**128 + 1, -(2**130)],
    "floats": [0.0, -0.0, 0.1, 1e-320, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
    "texts": ["", "a\nb", "\u2028 ü 漢", "$tensor"],
    "tuple": (1, (2.0, [3, ()]), "4"),
    "list": [1, [2.0, (3, [])], "4"],
    "queue": deque([(1.0, 2)], maxlen=3),
    "endless queue": deque([1]),
    "keys": {0: "a", 1: {"b": 2}, "2": 3, (4, 5): 6},
    "keys like ours": {"$tensor": 1, "$": [2]},
    "numbers of NumPy": [np.float32(0.1), np.float64(0.1), np.int8(-3), np.uint64(2**64 - 1), np.float32("nan")],
    "generator": np.random.default_rng(0).bit_generator.state,
    "legacy": np.random.RandomState(0).get_state(legacy=False),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back_as_they_were(name: str) -> None:
    assert same(through_a_file({"x": VALUES[name]})["x"], VALUES[name])


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (1, 0, 2)], ids=str)
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
)
def test_tensors_and_arrays_keep_type_shape_and_bits(dtype: str, shape: tuple[int, ...]) -> None:
    x = (10 * torch.randn(shape)).to(getattr(torch, dtype))
    assert same(through_a_file([x])[0], x)
    if dtype != "bfloat16":
        assert same(through_a_file([x.numpy()])[0], x.numpy())


def test_every_bit_of_a_number_is_kept() -> None:
    """Also those of NaN, of which there are many."""
    bits = torch.tensor([0x7FF8000000000001, -1, 0x7FF0000000000000], dtype=torch.int64).view(torch.float64)
    assert same(through_a_file([bits])[0], bits)


def test_what_is_not_in_order_in_memory_comes_back() -> None:
    x = torch.arange(12.0).view(3, 4)
    for view in (x.T, x[:, ::2], x[1:], x.expand(2, 3, 4)):
        assert torch.equal(through_a_file([view])[0], view)
    array = np.arange(12.0).reshape(3, 4)
    for one in (array.T, array[::-1], np.asfortranarray(array)):
        assert np.array_equal(through_a_file([one])[0], one)


def test_memory_that_is_shared_is_kept_once() -> None:
    x = torch.randn(1000)
    _, tensors = encoded({"a": x, "b": [x, x[:10]], "c": x.clone()})
    assert sorted(map(len, tensors.values())) == [10, 1000, 1000]
    back = through_a_file({"a": x, "b": [x, x[:10]]})
    assert torch.equal(back["a"], x)
    assert torch.equal(back["b"][1], x[:10])


def test_arrays_that_are_made_on_the_way_do_not_take_each_others_place() -> None:
    state = [np.arange(6.0).reshape(2, 3).T + k for k in range(100)]
    assert all(np.array_equal(a, b) for a, b in zip(through_a_file(state), state, strict=True))


@pytest.mark.parametrize(
    "x", [object(), {1, 2}, b"bytes", 1j, np.datetime64("2020-01-01"), len], ids=lambda x: type(x).__name__
)
def test_what_no_file_holds_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match=r"/a/1 is .*, which no checkpoint holds"):
        encoded({"a": [0, x]})


def test_what_is_not_of_this_form_is_refused() -> None:
    for tree in ({"$unknown": 1}, {"$tensor": "missing"}, {"$number": ["<f4"]}, {"$float": "one"}):
        with pytest.raises((ValueError, KeyError)):
            decoded(tree, {})
