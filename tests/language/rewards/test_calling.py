"""How reward functions are called: their arguments, their return values, their time, and every kind of failure."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from language.rewards.conftest import NAN, PROMPTS, TEXTS, judged, length, returning, said
from policygrad.errors import UserError
from policygrad.language.rewards import Rewards, exact_match


@pytest.mark.parametrize(
    "values",
    [
        (True, False, True),
        np.array([1.0, 0.0, 1.0], dtype=np.float16),
        np.array([True, False, True]),
        [np.float32(1), np.int64(0), np.bool_(True)],
        torch.tensor([1, 0, 1]),
        torch.tensor([1, 0, 1], dtype=torch.bfloat16, requires_grad=False),
        [torch.tensor(1.0, requires_grad=True), torch.tensor(0), torch.tensor(True)],
    ],
    ids=["bool", "array", "bool array", "numpy scalars", "tensor", "bfloat16", "torch scalars"],
)
@pytest.mark.filterwarnings("error")
def test_numbers_come_in_many_forms(values: Any) -> None:
    assert_close(judged(returning(values))[0], torch.tensor([1.0, 0.0, 1.0]))


# What a function is given.


def test_a_function_with_columns_is_given_all_and_one_without_those_it_names() -> None:
    seen = {}

    def everything(**columns: Any) -> list[float]:
        seen["everything"] = columns
        return [0.0] * 3

    def some(completions: Any, *, answer: Any, missing: Any = "default") -> list[float]:
        seen["some"] = {"completions": completions, "answer": answer, "missing": missing}
        return [0.0] * 3

    columns = {"answer": [1, 2, 3], "cut": [True, False, False]}
    judged(everything, some, columns=columns)
    assert seen["everything"] == {"prompts": PROMPTS, "completions": TEXTS, **columns}
    assert seen["some"] == {"completions": TEXTS, "answer": [1, 2, 3], "missing": "default"}


def test_a_missing_column() -> None:
    message = said(exact_match, columns={"solution": [1, 2, 3], "cut": [False] * 3})
    start = "reward 'exact_match' needs the column 'answer', and the data has "
    assert message.startswith(f"{start}solution, cut: add it")
    assert said(exact_match).startswith(f"{start}none: add it")


def test_the_callers_gradient_mode_holds_in_the_functions_too() -> None:
    def mode(**_: Any) -> list[bool]:
        return [torch.is_grad_enabled()] * 3

    assert judged(mode)[0].tolist() == [1.0] * 3
    with torch.no_grad():
        assert judged(mode)[0].tolist() == [0.0] * 3


# Asynchronous functions.


def test_asynchronous_functions_run_side_by_side() -> None:
    """Each waits for the other: one after another they would wait for ever. The order of the parts is kept."""
    here = {"a": asyncio.Event(), "b": asyncio.Event()}

    async def a(completions: list[str]) -> list[float]:
        here["a"].set()
        await here["b"].wait()
        return [1.0] * len(completions)

    class B:
        async def __call__(self, completions: list[str], **_: Any) -> list[float | None]:
            here["b"].set()
            await here["a"].wait()
            return [2.0, None, 2.0]

    total, parts = judged(a, length, B(), time_limit=5.0)
    assert list(parts) == ["a", "length", "B"]
    assert_close(total, torch.tensor([4.0, 3.0, 6.0]))


def test_an_asynchronous_function_that_raises() -> None:
    async def picky(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        return [{"a": 1.0}[text] for text in completions]

    message = said(length, picky)
    assert message == "reward 'picky' raised KeyError on sample 1 ('bb'): 'bb': fix it (--debug shows where)"


# Functions that fail.


@pytest.mark.parametrize("kind", ["plain", "asynchronous", "asynchronous that blocks"])
def test_a_function_that_hangs(kind: str) -> None:
    ended, called = threading.Event(), []

    def plain(**_: Any) -> list[float]:
        assert threading.current_thread().daemon  # else the process could not end
        time.sleep(2)
        return [0.0] * 3

    async def asynchronous(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(2)
        finally:
            ended.set()
        return [0.0] * 3

    async def blocking(**_: Any) -> list[float]:
        time.sleep(2)
        return [0.0] * 3

    async def quick(**_: Any) -> list[float]:
        return [0.0] * 3

    def after(**_: Any) -> list[float]:
        called.append("after")
        return [0.0] * 3

    function = {"plain": plain, "asynchronous": asynchronous, "asynchronous that blocks": blocking}[kind]
    start = time.perf_counter()
    message = said(quick, function, after, time_limit=0.2)
    if kind == "asynchronous":
        assert ended.wait(1.0)  # it was cancelled
    assert called == [] or kind != "plain"
    assert time.perf_counter() - start < 1.5
    name = function.__name__
    assert message == (
        f"reward {name!r} took longer than 0.2 s for 3 completions: raise the time limit, or make it faster"
    )


def test_a_function_that_raises_names_the_first_sample_that_does() -> None:
    def reward(completions: list[str], answer: list[int]) -> list[float]:
        if max(answer) > 1:
            raise ValueError(f"cannot judge {answer}")
        return [1.0] * len(answer)

    long = ["a", "b" * 100, "c"]
    with pytest.raises(UserError) as caught:
        Rewards([reward])(PROMPTS, long, {"answer": [1, 2, 2]})
    where = f"on sample 1 ('{'b' * 36}...)"
    assert str(caught.value) == (
        f"reward 'reward' raised ValueError {where}: cannot judge [2]: fix it (--debug shows where)"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_function_that_raises_on_no_sample_alone() -> None:
    def together(completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too\nmany")
        return [0.0]

    assert said(together) == (
        "reward 'together' raised RuntimeError on the whole batch: too many: fix it (--debug shows where)"
    )


def test_a_function_that_wants_to_end_the_process() -> None:
    def leaves(**_: Any) -> list[float]:
        raise SystemExit(3)

    assert said(leaves) == "reward 'leaves' raised SystemExit on sample 0 ('a'): 3: fix it (--debug shows where)"


def test_a_functions_own_user_error_is_passed_on() -> None:
    def strict(**_: Any) -> list[float]:
        raise UserError("fix this")

    assert said(strict) == "fix this"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (1.0, "returned a float: return a list of one number, or None, for each completion"),
        (torch.tensor(1.0), "returned a float: return a list of one number, or None, for each completion"),
        (None, "returned None: return a list of one number, or None, for each completion"),
        ("abc", "returned a str: return a list of one number, or None, for each completion"),
        ({"a": 1, "b": 2, "c": 3}, "returned a dict: return a list of one number, or None, for each completion"),
        ([1.0, 2.0], "returned 2 values for 3 completions: return one for each"),
        ([1.0, NAN, NAN], "returned nan for sample 1 ('bb'): return a finite number, or None where it does not apply"),
        ([1.0, 2.0, -float("inf")], "returned -inf for sample 2 ('ccc'): return a finite number"),
        ([1e39, 2.0, 3.0], "returned 1e+39 for sample 0 ('a'): return a finite number"),
        ([10**400, 2.0, 3.0], f"returned 1{'0' * 26}... for sample 0 ('a'): return a finite number"),
        ([1.0, "2", 3.0], "returned '2' for sample 1 ('bb'): return a finite number"),
        ([1.0, [2.0], 3.0], "returned [2.0] for sample 1 ('bb'): return a finite number"),
        (torch.ones(3, 2), "returned [1.0, 1.0] for sample 0 ('a'): return a finite number"),
        ([1.0, 2j, 3.0], "returned 2j for sample 1 ('bb'): return a finite number"),
    ],
)
def test_what_a_function_may_not_return(values: Any, message: str) -> None:
    assert said(returning(values)).startswith(f"reward 'reward' {message}")


def test_a_conversation_is_quoted_by_its_text() -> None:
    messages = [[{"role": "assistant", "content": "yes"}]]
    with pytest.raises(UserError, match=r"returned nan for sample 0 \('yes'\): "):
        Rewards([returning([NAN])])([[{"role": "user", "content": "?"}]], messages, {})
