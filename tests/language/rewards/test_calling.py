"""How reward functions are called: their arguments, their return values, their time, and every kind of failure."""

import asyncio
import contextlib
import re
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from language.rewards.conftest import NAN, PROMPTS, TEXTS, judged, length, returning, said
from policygrad.errors import UserError
from policygrad.language.rewards import Rewards, exact_match, soft_overlong_penalty, text_of
from policygrad.language.rewards.calling import GIVEN


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


class Judge:
    def __call__(self, prompts: list[str], completions: list[str], cut: list[bool]) -> list[float]:
        return [0.0] * len(prompts)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda prompts, completions, answer: [], ""),
        (lambda prompts, completions, **_: [], ""),
        (lambda prompts, completions, **columns: [], "completion_ids, completion_mask, completions_raw, cut"),
        (lambda completions, **columns: [], "prompts, completion_ids, completion_mask, completions_raw, cut"),
        (lambda **columns: [], "prompts, completions, completion_ids, completion_mask, completions_raw, cut"),
        (lambda completions, completions_raw, **_: [], "completions_raw"),
        (Judge(), "cut"),
        (exact_match, ""),
        (soft_overlong_penalty(4, 2), ""),
    ],
)
def test_a_column_that_a_function_would_not_get_is_refused(function: Any, wanted: str) -> None:
    judge = Rewards([exact_match, function], names=["first", "second"])
    judge.check_columns(["answer", "cuts", "prompt"])
    for column in GIVEN:
        if column in wanted.split(", "):
            advice = f"would not get the column '{column}' of the data.* by columns, such as data_{column}={column}$"
            with pytest.raises(UserError, match=f"^reward 'second' {advice}") as raised:
                judge.check_columns(["answer", column])
            assert len(str(raised.value)) <= 200
        else:
            judge.check_columns(["answer", column])


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


def test_a_message_without_content_has_no_text() -> None:
    calls = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "b"},
    ]
    assert text_of(calls) == "a\nb"
    assert text_of("a") == "a"


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


def test_what_is_made_once_serves_in_every_batch() -> None:
    """A semaphore belongs to the event loop in which it is first waited for."""
    semaphore = asyncio.Semaphore(1)

    async def one(text: str) -> float:
        async with semaphore:
            await asyncio.sleep(0)
            return float(len(text))

    async def reward(completions: list[str]) -> list[float]:
        return await asyncio.gather(*map(one, completions))

    rewards = Rewards([reward, lambda completions: reward(completions)])  # and a plain function of a coroutine
    for _ in range(3):
        assert rewards(PROMPTS, TEXTS, {})[0].tolist() == [2.0, 4.0, 6.0]


def test_a_loop_that_was_blocked_is_left_behind() -> None:
    async def blocking(**_: Any) -> list[float]:
        time.sleep(1)
        return [0.0] * 3

    async def quick(**_: Any) -> list[float]:
        return [1.0] * 3

    assert "'blocking' took longer than 0.05 s" in said(blocking, time_limit=0.05)
    assert judged(quick, time_limit=5.0)[0].tolist() == [1.0] * 3


# The thread of a function.


def test_a_function_may_use_signals_in_the_main_thread() -> None:
    def alarmed(**_: Any) -> list[float]:
        def late(*_: Any) -> None:
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, late)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            time.sleep(5)
        except TimeoutError:
            return [1.0, 2.0, 3.0]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return [0.0] * 3

    def handler(*_: Any) -> None:
        pass

    before = {number: signal.signal(number, handler) for number in (signal.SIGURG, signal.SIGVTALRM)}
    try:
        assert judged(alarmed)[0].tolist() == [1.0, 2.0, 3.0]
        assert [signal.getsignal(number) for number in before] == [handler, handler], "they are put back"
    finally:
        for number, kept in before.items():
            signal.signal(number, kept)


def test_math_verify_as_its_guide_has_it() -> None:
    from math_verify import parse, verify

    def reward(completions: list[str]) -> list[bool]:
        return [verify(parse("$3$"), parse(f"${len(text)}$")) for text in completions]

    assert judged(reward)[0].tolist() == [0.0, 0.0, 1.0]


def sleeps() -> None:
    time.sleep(5)


def spins() -> None:
    while True:
        pass


def waits() -> None:
    threading.Lock().acquire() and threading.Event().wait(5)


def catches() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(5)


def backtracks() -> None:
    re.fullmatch(r"(a+)+b", "a" * 40)


def swallows() -> None:
    """Only once."""
    try:
        time.sleep(5)
    except BaseException:
        time.sleep(5)


@pytest.mark.parametrize("work", [sleeps, spins, waits, catches, backtracks, swallows])
def test_a_function_that_hangs_in_the_main_thread_is_interrupted(work: Any) -> None:
    called = []

    def reward(**_: Any) -> list[float]:
        assert threading.current_thread() is threading.main_thread()
        work()
        return [0.0] * 3

    start = time.perf_counter()
    message = said(reward, lambda **_: called.append("after"), time_limit=0.1)
    assert time.perf_counter() - start < 3
    assert (
        message == "reward 'reward' took longer than 0.1 s for 3 completions: raise the time limit, or make it faster"
    )
    assert called == []


def test_in_another_thread_a_function_has_a_thread_of_its_own() -> None:
    """Which is left behind when its time is up."""
    found: list[Any] = []

    def reward(**_: Any) -> list[float]:
        found.append((threading.current_thread().daemon, torch.is_grad_enabled()))
        time.sleep(1)
        return [0.0] * 3

    def caller() -> None:
        with torch.no_grad():
            found.append(said(reward, time_limit=0.05))

    thread = threading.Thread(target=caller)
    thread.start()
    thread.join()
    assert found[0] == (True, False)
    assert "took longer than 0.05 s" in found[1]


def test_an_asynchronous_function_that_hangs_is_cancelled() -> None:
    ended = threading.Event()

    async def reward(**_: Any) -> list[float]:
        try:
            await asyncio.sleep(5)
        finally:
            ended.set()
        return [0.0] * 3

    assert "took longer than 0.05 s" in said(reward, time_limit=0.05)
    assert ended.wait(3.0)


# Functions that fail.


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("cannot\njudge"), "ValueError: cannot judge"),
        (KeyError("bb"), "KeyError: 'bb'"),
        (SystemExit(3), "SystemExit: 3"),
        (asyncio.CancelledError(), "CancelledError: CancelledError"),
        (GeneratorExit("x"), "GeneratorExit: x"),
        (TimeoutError("of its own"), "TimeoutError: of its own"),
        (StopIteration(), None),
    ],
)
def test_an_error_is_reported_as_what_it_was_and_the_function_is_not_called_again(
    kind: str, error: BaseException, words: str | None
) -> None:
    calls = []

    def plain(**_: Any) -> list[float]:
        calls.append(1)
        raise error

    async def asynchronous(**columns: Any) -> list[float]:
        return plain(**columns)

    message = said(plain if kind == "plain" else asynchronous)
    assert calls == [1]
    assert message.startswith(f"reward {kind!r} raised ")
    if words:
        assert message == f"reward {kind!r} raised {words}: fix it (--debug shows where)"


def test_the_cause_of_the_error_is_kept() -> None:
    def reward(**_: Any) -> list[float]:
        raise ValueError("long" * 100)

    with pytest.raises(UserError, match=r"^reward 'reward' raised ValueError: longlong.*\.\.\.: fix it") as caught:
        judged(reward)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize("kind", ["plain", "asynchronous"])
def test_control_c_is_the_users(kind: str) -> None:
    def plain(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    async def asynchronous(**_: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(plain if kind == "plain" else asynchronous)


def test_a_function_that_changes_its_arguments_changes_nothing_else() -> None:
    def first(completions: list[str], notes: list[dict[str, list[int]]], prompts: list[str]) -> list[float]:
        completions[0] = ""
        notes[0]["seen"].append(1)
        prompts.clear()
        return [0.0] * 3

    columns = {"notes": [{"seen": []} for _ in range(3)]}
    total, _ = judged(first, length, lambda notes: [len(x["seen"]) for x in notes], columns=columns)
    assert total.tolist() == [1.0, 2.0, 3.0]
    assert columns == {"notes": [{"seen": []}] * 3}
    assert (len(PROMPTS), TEXTS[0]) == (3, "a")


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
