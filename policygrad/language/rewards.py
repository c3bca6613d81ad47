"""What completions are worth: the weighted sum of reward functions, the built-in functions, and those given by name.

A reward function is called with keywords, `reward(prompts=..., completions=..., **columns)`, and returns one number a
sample, or None where it does not apply. Prompts and completions are lists of text; for prompts that are conversations
they are lists of message lists, a completion being [{"role": "assistant", "content": text}]. The columns are the data
set's others, one entry a sample, with `completion_ids` (tokens) and `cut` (the length limit came before the end).
"""

import asyncio
import atexit
import difflib
import importlib
import importlib.util
import inspect
import json
import math
import re
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from policygrad.errors import UserError

Column = Sequence[Any]  # one entry a sample
Reward = Callable[..., Any]  # (prompts=, completions=, **columns) -> list[float | None], or a coroutine of it
_Outcome = tuple[Any, BaseException | None]  # what a function returned, or what it raised


class Rewards:
    """r = sum_k w_k r_k over the functions that apply; a sample to which none applies has reward 0.

    Functions that are `async def` run side by side; the others one after another. A function without **columns is given
    those that it names. `time_limit`, in seconds, bounds each function's call on a whole batch; nothing can interrupt
    Python in the middle of one long operation, such as the search for a regular expression that backtracks for ever.

    Raises UserError if a function raises, exceeds its limit, or returns other than a finite number or None a sample.
    """

    def __init__(
        self,
        functions: Sequence[Reward],
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        time_limit: float = 60.0,
    ) -> None:
        weights = [1.0] * len(functions) if weights is None else weights
        names = [_name(function) for function in functions] if names is None else names
        if not functions:
            raise UserError("there is no reward function: give at least one")
        for given, what in ((weights, "weights"), (names, "names")):
            if len(given) != len(functions):
                raise UserError(f"there are {len(functions)} reward functions and {len(given)} {what}: give one each")
        if not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"the reward weights are {', '.join(map(str, weights))}: each must be a finite number")
        if not time_limit > 0:
            raise UserError(f"the reward functions' time limit is {time_limit} s: it must be more than 0")
        self.functions, self.weights = list(functions), [float(weight) for weight in weights]
        self.names, self.time_limit = _unique(names), time_limit

    def __call__(
        self, prompts: Column, completions: Column, columns: Mapping[str, Column]
    ) -> tuple[Float[Tensor, " B"], dict[str, Float[Tensor, " B"]]]:
        """The weighted sum, 0 where no function applies, and each function's own values, NaN where it does not."""
        offered = {**columns, "prompts": prompts, "completions": completions}
        for name, column in offered.items():
            if len(column) != len(completions):
                raise UserError(f"{name} has {len(column)} entries for {len(completions)} completions: give one each")
        arguments = [_arguments(f, name, offered) for f, name in zip(self.functions, self.names, strict=True)]
        outcomes = _outcomes(self.functions, arguments, self.time_limit)
        parts = {}
        for k, name in enumerate(self.names):
            if k not in outcomes:
                raise UserError(
                    f"reward {name!r} took longer than {self.time_limit:g} s for {len(completions)} completions: "
                    "raise the time limit, or make it faster"
                )
            values, error = outcomes[k]
            if error is not None:
                raise self._failure(k, arguments[k], error) from error
            parts[name] = _numbers(name, values, completions)
        total = torch.zeros(len(completions))
        for weight, part in zip(self.weights, parts.values(), strict=True):
            total = total + torch.where(part.isnan(), 0.0, weight * part)
        return total, parts

    def _failure(self, k: int, arguments: dict[str, Column], error: BaseException) -> UserError:
        """The error, with the first sample that raises one when it is judged alone."""
        if isinstance(error, UserError):
            return error
        where = "the whole batch"
        found = _first_that_raises(self.functions[k], arguments, self.time_limit)
        if found is not None:
            i, error = found
            where = f"sample {i}"
            if "completions" in arguments:
                where += f" ({_short(arguments['completions'][i])})"
        message = " ".join(str(error).split())
        return UserError(
            f"reward {self.names[k]!r} raised {type(error).__name__} on {where}: {message} (--debug shows where)"
        )


def text_of(completion: Any) -> str:
    """The text of a prompt or completion, that of its messages one after another if it is a conversation."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def final_answer(text: str) -> str:
    """What stands behind the last `####` or `Answer:` (in any case) of a text, or else the whole text, stripped."""
    return re.split(r"####|\banswer:", text, flags=re.IGNORECASE)[-1].strip()


# The built-in reward functions.


def exact_match(prompts: Column, completions: Column, answer: Column, **_: Any) -> list[float | None]:
    """1 if the completion's final answer is the answer's, to the letter; 0 if not; None without an answer.

    Of both the final answer counts (see final_answer): so GSM8K's worked answers are understood as they are.
    """
    return [
        None if gold is None else float(final_answer(text_of(completion)) == final_answer(_written(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def math_equal(prompts: Column, completions: Column, answer: Column, **_: Any) -> list[float | None]:
    """1 if the completion's answer is mathematically the answer's, by math-verify; None if that is no mathematics.

    Looked for is the last \\boxed{}, else what math-verify finds in the final answer. A comparison of more than
    3 seconds counts as a wrong answer.
    """
    values: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        formula = "" if gold is None else _formula(_written(gold))
        equal = _mathematics(formula, _formula(text_of(completion))) if formula else None
        values.append(None if equal is None else float(equal))
    return values


def matches(pattern: str) -> Reward:
    """A reward function: 1 if the regular expression matches the whole completion, `.` being any character, else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(f"the regular expression {pattern!r} cannot be read: {error}") from error

    def format(prompts: Column, completions: Column, **_: Any) -> list[float]:
        return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]

    return format


def soft_overlong_penalty(max_length: int, buffer: int) -> Reward:
    """A reward function: 0 for up to max_length - buffer tokens, then linearly down to -1 at max_length and beyond.

    min(0, max(-1, (max_length - buffer - |y|) / buffer)): DAPO, eq. 13 (Yu et al. 2025, arXiv 2503.14476).
    """
    if not 0 < buffer <= max_length:
        raise UserError(
            f"the overlong penalty's buffer is {buffer} and its longest completion {max_length}: "
            "the buffer is at least 1 and no longer than that"
        )

    def overlong(prompts: Column, completions: Column, completion_ids: Column, **_: Any) -> list[float]:
        return [min(0.0, max(-1.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return overlong


# Reward functions by name.

BUILT_IN: dict[str, Reward] = {"exact_match": exact_match, "math_equal": math_equal}
FORMS = [*BUILT_IN, "format:REGEX", "overlong:MAX,BUFFER", "module:function", "path/file.py:function"]


def is_function_spec(spec: str) -> bool:
    """Does this name a function (and not, perhaps, a reward model)?"""
    kind, colon, rest = spec.rpartition(":")
    named = bool(colon) and rest.isidentifier() and (kind.endswith(".py") or re.fullmatch(r"\w+(\.\w+)*", kind))
    return spec in BUILT_IN or spec.split(":")[0] in ("format", "overlong") or spec.endswith(".py") or bool(named)


def load_reward(spec: str) -> Reward:
    """A reward function from its name: one of FORMS. Raises UserError if there is none."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    kind, _, rest = spec.partition(":")
    if kind == "format":
        if not rest:
            raise UserError(f"reward {spec!r} lacks its regular expression: write format:REGEX")
        return matches(rest)
    if kind == "overlong":
        numbers = re.fullmatch(r"(\d+),(\d+)", rest)
        if numbers is None:
            raise UserError(f"reward {spec!r} lacks its two numbers: write overlong:MAX,BUFFER, in tokens")
        return soft_overlong_penalty(int(numbers[1]), int(numbers[2]))
    if spec.endswith(".py"):
        raise UserError(f"reward {spec!r} names a file: name the function in it too, as {spec}:function")
    if not is_function_spec(spec):
        near = difflib.get_close_matches(spec, BUILT_IN, n=3, cutoff=0.5)
        raise UserError(
            f"unknown reward function {spec!r}: "
            + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(FORMS)}")
        )
    place, _, name = spec.rpartition(":")
    module = _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [other for other, x in vars(module).items() if inspect.isfunction(x) and not other.startswith("_")]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
        raise UserError(f"{place} has no function {name!r}: it has {', '.join(near) or 'none'}")
    return function


def _module(place: str) -> ModuleType:
    """The module of this name, or in this file; a file is executed anew, since it may have changed."""
    name = place
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        if not Path(place).is_file():
            raise UserError(f"there is no reward file {place}: give the path of a Python file")
        name = f"policygrad_reward_{Path(place).stem}"
        specification = importlib.util.spec_from_file_location(name, place)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # as an import would: dataclasses, for one, look themselves up
        specification.loader.exec_module(module)
        return module
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if place.endswith(".py"):
            sys.modules.pop(name, None)
        missing = isinstance(error, ModuleNotFoundError) and f"{place}.".startswith(f"{error.name}.")
        if missing:
            raise UserError(f"there is no module {place!r}: give one that can be imported, or path/file.py") from error
        message = " ".join(str(error).split())
        raise UserError(f"importing {place} raised {type(error).__name__}: {message} (--debug shows where)") from error


# How functions are called.


def _name(function: Reward) -> str:
    function = getattr(function, "func", function)  # a partial's
    return getattr(function, "__name__", type(function).__name__)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with -2, -3, ... behind those that were there before."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique:
            number += 1
            candidate = f"{name}-{number}"
        unique.append(candidate)
    return unique


def _arguments(function: Reward, name: str, offered: dict[str, Column]) -> dict[str, Column]:
    """What of all that is offered the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables in C have none
        return offered
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.name not in offered and parameter.default is parameter.empty:
            columns = [column for column in offered if column not in ("prompts", "completions")]
            raise UserError(
                f"reward {name!r} needs the column {parameter.name!r}, and the data has {', '.join(columns) or 'none'}"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in named if p.name in offered}


def _is_async(function: Reward) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))  # or an object's call


def _outcomes(
    functions: Sequence[Reward], arguments: Sequence[dict[str, Column]], seconds: float
) -> dict[int, _Outcome]:
    """What each function returned or raised, by its place; none for those that took longer than the limit."""
    done: dict[int, _Outcome] = {}

    def call(k: int) -> None:
        try:
            done[k] = functions[k](**arguments[k]), None
        except (Exception, SystemExit) as error:
            done[k] = None, error

    async def call_async(k: int) -> None:
        try:
            done[k] = await functions[k](**arguments[k]), None
        except (Exception, SystemExit) as error:
            done[k] = None, error

    async def gather(chosen: list[int]) -> None:
        await asyncio.wait([asyncio.create_task(call_async(k)) for k in chosen], timeout=seconds)

    together = [k for k, function in enumerate(functions) if _is_async(function)]
    if together:
        _in_thread(seconds, lambda: asyncio.run(gather(together)))  # which cancels what is late
    for k in range(len(functions)):
        if k not in together:
            _in_thread(seconds, call, k)
            if k not in done:
                break  # it runs on; the others need not be waited for
    return done


def _first_that_raises(
    function: Reward, arguments: dict[str, Column], seconds: float
) -> tuple[int, BaseException] | None:
    """The first sample on which the function raises when it is judged alone, and what; None if it cannot be found."""
    found: list[tuple[int, BaseException]] = []

    def search() -> None:
        for i in range(min(map(len, arguments.values()), default=0)):
            alone = {name: column[i : i + 1] for name, column in arguments.items()}
            try:
                asyncio.run(function(**alone)) if _is_async(function) else function(**alone)
            except (Exception, SystemExit) as error:
                found.append((i, error))
                return

    _in_thread(seconds, search)
    return found[0] if found else None


def _in_thread(seconds: float, work: Callable[..., Any], *arguments: Any) -> None:
    """Do the work, or give up waiting for it. A daemon thread that hangs does not keep the process from ending."""
    gradients = torch.is_grad_enabled()  # which is each thread's own

    def run() -> None:
        torch.set_grad_enabled(gradients)
        work(*arguments)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _numbers(name: str, values: Any, completions: Column) -> Float[Tensor, " B"]:
    """What a function returned, None as NaN. Raises UserError for what is not a finite number a sample."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise UserError(
            f"reward {name!r} returned {_a(values)}: return a list of one number, or None, for each completion"
        )
    if len(values) != len(completions):
        raise UserError(
            f"reward {name!r} returned {len(values)} values for {len(completions)} completions: return one for each"
        )
    numbers = [math.nan if value is None else _number(value) for value in values]
    for i, (number, value) in enumerate(zip(numbers, values, strict=True)):
        if number is None or (value is not None and not abs(number) <= torch.finfo(torch.float32).max):
            raise UserError(
                f"reward {name!r} returned {_short(value)} for sample {i} ({_short(completions[i])}): "
                "return a finite number, or None where it does not apply"
            )
    return torch.tensor(numbers, dtype=torch.float32)


def _number(value: Any) -> float | None:
    """A number, True and False, or a scalar of numpy or torch, as a float; None for anything else."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def _a(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    """A value in at most 60 characters; of messages, their text."""
    messages = isinstance(value, list) and value and all(isinstance(x, dict) and "content" in x for x in value)
    said = repr(text_of(value) if messages else value)
    return said if len(said) <= 60 else said[:57] + "..."


# Mathematics.

# math-verify limits its time by signals, which only a main thread has; and raising 9 to the power 9^9 does not let
# another thread run until it is done. So the comparisons are made in a process of their own, which can be ended.
_COMPARE = """
import json, sys
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    gold, answer = (parse(text, parsing_timeout=None) for text in json.loads(line))
    print(json.dumps(verify(gold, answer, timeout_seconds=None) if gold else None), flush=True)
"""
_COMPARISON_SECONDS, _START_SECONDS = 3.0, 60.0


class _Mathematics:
    """Is one formula equal to another, by math-verify? None if the first is no formula."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self._end)

    def __call__(self, gold: str, answer: str) -> bool | None:
        with self.lock:
            process = self.process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                said = self._line(process, _COMPARISON_SECONDS)
            except BrokenPipeError:
                said = b""
            if not said:  # too slow, or too much for its memory
                self._end()
                return False
            return json.loads(said)

    def _start(self) -> "subprocess.Popen[bytes]":
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _COMPARE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if not self._line(self.process, _START_SECONDS):
            self._end()
            raise UserError("math_equal cannot import math_verify: pip install math-verify")
        return self.process

    def _line(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else b""

    def _end(self) -> None:
        if self.process is not None:
            with self.process as process:  # which closes the pipes and waits
                process.kill()
        self.process = None


_mathematics = _Mathematics()


def _formula(text: str) -> str:
    """The part of a text that math-verify is to read, between dollars if it is a formula without any words."""
    if "\\boxed" in text:
        return text
    text = final_answer(text)
    worded = re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}|\$|\\\(|\\\[", text)
    return f"${text}$" if text and not worded else text


def _written(answer: Any) -> str:
    """An answer as text; a whole number is written as one, though a column with gaps in it holds 72.0."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
