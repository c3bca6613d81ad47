"""Reward functions: what they are given, what they may return, every way in which they fail, and the built-in ones."""

import asyncio
import functools
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from policygrad.errors import UserError
from policygrad.language.rewards import (
    Rewards,
    exact_match,
    final_answer,
    is_function_spec,
    load_reward,
    matches,
    math_equal,
    soft_overlong_penalty,
)

PROMPTS, TEXTS = ["p", "q", "r"], ["a", "bb", "ccc"]
NAN = float("nan")


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def returning(values: Any) -> Any:
    def reward(**_: Any) -> Any:
        return values

    return reward


def judged(*functions: Any, columns: dict[str, list] | None = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return Rewards(functions, **options)(PROMPTS, TEXTS, columns or {})


def said(*arguments: Any, **options: Any) -> str:
    """What judged() complains of."""
    with pytest.raises(UserError) as caught:
        judged(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The sum.


def test_the_total_is_the_weighted_sum_of_the_functions() -> None:
    total, parts = judged(length, returning([1, 0, -2]), weights=[2.0, 0.5])
    assert_close(total, torch.tensor([2.5, 4.0, 5.0]))
    assert list(parts) == ["length", "reward"]
    assert_close(parts["length"], torch.tensor([1.0, 2.0, 3.0]))
    assert_close(parts["reward"], torch.tensor([1.0, 0.0, -2.0]))
    assert total.dtype == parts["reward"].dtype == torch.float32


def test_a_function_that_does_not_apply_adds_nothing_and_is_nan_in_its_part() -> None:
    total, parts = judged(returning([None, 1.0, None]), returning([2.0, 4.0, None]), weights=[10.0, 1.0])
    assert_close(total, torch.tensor([2.0, 14.0, 0.0]))
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
    assert message == "reward 'exact_match' needs the column 'answer', and the data has solution, cut"
    assert said(exact_match).endswith("needs the column 'answer', and the data has none")


def test_a_column_of_another_length() -> None:
    assert said(length, columns={"answer": [1, 2]}) == "answer has 2 entries for 3 completions: give one each"


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
    assert message == "reward 'picky' raised KeyError on sample 1 ('bb'): 'bb' (--debug shows where)"


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
    assert str(caught.value) == (
        f"reward 'reward' raised ValueError on sample 1 ('{'b' * 56}...): cannot judge [2] (--debug shows where)"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_function_that_raises_on_no_sample_alone() -> None:
    def together(completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too\nmany")
        return [0.0]

    assert said(together) == (
        "reward 'together' raised RuntimeError on the whole batch: too many (--debug shows where)"
    )


def test_a_function_that_wants_to_end_the_process() -> None:
    def leaves(**_: Any) -> list[float]:
        raise SystemExit(3)

    assert said(leaves) == "reward 'leaves' raised SystemExit on sample 0 ('a'): 3 (--debug shows where)"


def test_a_functions_own_user_error_is_passed_on() -> None:
    def strict(**_: Any) -> list[float]:
        raise UserError("mend this")

    assert said(strict) == "mend this"


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
        ([10**400, 2.0, 3.0], f"returned 1{'0' * 56}... for sample 0 ('a'): return a finite number"),
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


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "there is no reward function: give at least one"),
        ([length], {"weights": [1.0, 2.0]}, "there are 1 reward functions and 2 weights: give one each"),
        ([length, length], {"names": ["a"]}, "there are 2 reward functions and 1 names: give one each"),
        ([length], {"weights": [NAN]}, "the reward weights are nan: each must be a finite number"),
        ([length], {"time_limit": 0.0}, "the reward functions' time limit is 0.0 s: it must be more than 0"),
    ],
)
def test_rewards_that_cannot_be_made(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Rewards(arguments, **options)
    assert str(caught.value) == message


# The built-in functions.


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 42\n", "42"),
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 3\nno: #### 4 ", "4"),
        ("It is 4. Answer: 4", "4"),
        ("ANSWER: x = 1", "x = 1"),
        ("the answer is 4", "the answer is 4"),
        ("", ""),
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_exact_match() -> None:
    texts = ["so\n#### 72", "72", "72.", "Answer: yes", "7 2", "72"]
    gold = ["72", 72, "72", "yes", 72.0, None]
    assert exact_match(PROMPTS, texts, answer=gold, cut=[]) == [1.0, 1.0, 0.0, 1.0, 0.0, None]
    worked = "48/2 = <<48/2=24>>24 clips.\n#### 72"
    assert exact_match(PROMPTS, ["72", "24", [{"role": "assistant", "content": "#### 72"}]], [worked] * 3) == [1, 0, 1]
    assert exact_match(PROMPTS, ["72", "72.5"], [72.0, 72.5]) == [1.0, 1.0]


def test_math_equal() -> None:
    """Through a whole Rewards: in a thread, where math-verify's own time limits cannot work."""
    cases = [
        ("The answer is $\\frac{2}{4}$", "1/2", 1.0),
        ("so \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("#### Check\n\\boxed{3}\n#### done", "3", 1.0),
        ("it is 1000", "1,000", 1.0),
        ("so it is 41", 42, 0.0),
        ("I do not know", "42", 0.0),
        ("", "42", 0.0),
        ("Answer: 1 + 2x", "2x+1", 1.0),  # 2, if it is read as prose
        ("Answer: 2", "2x+1", 0.0),
        ("$(3, \\frac{\\pi}{2})$", "( 3, \\frac{\\pi}{2} )", 1.0),
        ("so $x = 5$", "5", 1.0),
        ("72", 72.0, 1.0),
        ("72", "24 + 48, so\n#### 72", 1.0),
        ("4", "no number at all", None),
        ("4", "", None),
        ("4", None, None),
    ]
    texts, gold, expected = (list(column) for column in zip(*cases, strict=True))
    _, parts = Rewards([math_equal])(texts, texts, {"answer": gold})
    values = [None if x != x else x for x in parts["math_equal"].tolist()]
    assert dict(zip(cases, values, strict=True)) == dict(zip(cases, expected, strict=True))


def test_an_endless_comparison_counts_as_wrong_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 to the power 9^9 would hold up every thread of the process that computes it."""
    monkeypatch.setattr("policygrad.language.rewards._COMPARISON_SECONDS", 0.5)
    assert math_equal(PROMPTS, ["$9^{9^{9}}$", "$2^2$"], answer=["4", "4"]) == [0.0, 1.0]


def test_math_equal_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    from policygrad.language import rewards

    monkeypatch.setattr(rewards, "_mathematics", rewards._Mathematics())
    monkeypatch.setattr(rewards, "_COMPARE", "import no_such_module")
    with pytest.raises(UserError, match=r"^math_equal cannot import math_verify: pip install math-verify$"):
        math_equal(PROMPTS, ["4"], answer=["4"])


def test_matches_the_whole_completion() -> None:
    reward = matches(r"<think>.*</think>\d+")
    texts = ["<think>a\nb</think>12", "<think></think>1 ", "x<think></think>1", "12"]
    assert reward(prompts=PROMPTS, completions=texts) == [1.0, 0.0, 0.0, 0.0]
    assert reward(prompts=PROMPTS, completions=[[{"role": "assistant", "content": texts[0]}]]) == [1.0]
    with pytest.raises(UserError, match=r"^the regular expression '\(' cannot be read: missing \)"):
        matches("(")


def test_soft_overlong_penalty_is_equation_13_of_dapo() -> None:
    """-|y| against the piecewise definition, at every length."""
    reward = soft_overlong_penalty(10, 4)
    ids = [[0] * n for n in range(14)]
    expected = [0.0 if n <= 6 else (6 - n) / 4 if n <= 10 else -1.0 for n in range(14)]
    assert reward(prompts=[], completions=[], completion_ids=ids) == expected
    assert expected[7:12] == [-0.25, -0.5, -0.75, -1.0, -1.0]


@pytest.mark.parametrize("numbers", [(10, 0), (10, 11), (0, 0)])
def test_soft_overlong_penalty_of_no_sense(numbers: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"buffer is {numbers[1]} and its longest completion {numbers[0]}: the buffer"):
        soft_overlong_penalty(*numbers)


# Functions by name.


def test_built_in_functions_by_name() -> None:
    assert load_reward("exact_match") is exact_match
    assert load_reward("math_equal") is math_equal
    assert load_reward("format:a:b+")(prompts=[], completions=["a:bb", "a"]) == [1.0, 0.0]
    assert load_reward("overlong:10,4")(prompts=[], completions=[], completion_ids=[[0] * 8]) == [-0.5]


def test_a_users_function_by_module_and_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "my_rewards.py"
    file.write_text("def always(completions):\n    return [1.0] * len(completions)\n")
    assert judged(load_reward(f"{file}:always"))[0].tolist() == [1.0] * 3
    monkeypatch.syspath_prepend(tmp_path)
    assert judged(load_reward("my_rewards:always"))[0].tolist() == [1.0] * 3
    file.write_text("def always(completions):\n    return [22.0] * len(completions)\n")
    assert judged(load_reward(f"{file}:always"))[0].tolist() == [22.0] * 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exact_mach", "unknown reward function 'exact_mach': did you mean exact_match?"),
        (
            "zzz",
            "unknown reward function 'zzz': there are exact_match, math_equal, format:REGEX, overlong:MAX,BUFFER, ",
        ),
        ("format:", "reward 'format:' lacks its regular expression: write format:REGEX"),
        ("format:(", "the regular expression '(' cannot be read: "),
        ("overlong:10", "reward 'overlong:10' lacks its two numbers: write overlong:MAX,BUFFER, in tokens"),
        ("overlong:4,10", "the overlong penalty's buffer is 10 and its longest completion 4: "),
        ("no_such_package.rewards:f", "there is no module 'no_such_package.rewards': give one that can be imported"),
        ("nowhere.py:f", "there is no reward file nowhere.py: give the path of a Python file"),
        ("FILE", "reward 'FILE' names a file: name the function in it too, as FILE:function"),
        ("FILE:helpful", "FILE has no function 'helpful': it has helper"),
        ("FILE:zzz", "FILE has no function 'zzz': it has helper, other\n"),
        ("FILE:CONSTANT", "FILE has no function 'CONSTANT': it has helper, other"),
        ("BROKEN:f", "importing BROKEN raised SyntaxError: "),
        ("EXITS:f", "importing EXITS raised SystemExit: 1 (--debug shows where)"),
        ("NEEDS:f", "importing NEEDS raised ModuleNotFoundError: No module named 'no_such_package'"),
    ],
)
def test_functions_that_cannot_be_loaded(spec: str, message: str, tmp_path: Path) -> None:
    sources = {
        "FILE": "CONSTANT = 1\ndef helper(): ...\ndef other(): ...\ndef _private(): ...\n",
        "BROKEN": "def f(:\n",
        "EXITS": "raise SystemExit(1)\n",
        "NEEDS": "import no_such_package\n",
    }
    for name, source in sources.items():
        path = tmp_path / f"{name.lower()}.py"
        path.write_text(source)
        spec, message = spec.replace(name, str(path)), message.replace(name, str(path))
    with pytest.raises(UserError) as caught:
        load_reward(spec)
    assert f"{caught.value}\n".startswith(message)
    assert "\n" not in str(caught.value)
    assert not any(name.startswith(f"policygrad_reward_{file}") for name in sys.modules for file in ("broken", "exits"))


@pytest.mark.parametrize(
    ("spec", "is_function"),
    [
        ("exact_match", True),
        ("format:x/y", True),
        ("overlong", True),
        ("package.module:f", True),
        ("./some/file.py:f", True),
        ("file.py", True),
        ("gpt2", False),
        ("organisation/reward-model", False),
        ("./models/reward", False),
        ("organisation/model:f", False),
    ],
)
def test_is_function_spec(spec: str, is_function: bool) -> None:
    assert is_function_spec(spec) is is_function
