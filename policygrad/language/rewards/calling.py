"""How reward functions are called: their arguments, time limits, failures, and the numbers that they return."""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from policygrad.errors import UserError, listed, one_line, shortened

Column = Sequence[Any]  # one entry a sample
Reward = Callable[..., Any]  # (prompts=, completions=, **columns) -> list[float | None], or a coroutine of it
Outcome = tuple[Any, BaseException | None]  # what a function returned, or what it raised


def text_of(completion: Any) -> str:
    """The text of a prompt or a completion; of a conversation that of its messages, one after another."""
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def name_of(function: Reward) -> str:
    """The name of a function, also of a partial one."""
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def unique(names: Sequence[str]) -> list[str]:
    """The names, with -2, -3, ... after repeated ones."""
    found: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in found:
            number += 1
            candidate = f"{name}-{number}"
        found.append(candidate)
    return found


def arguments_of(function: Reward, name: str, offered: dict[str, Column]) -> dict[str, Column]:
    """The columns that a function takes. Raises UserError if one that it needs is missing."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # some callables in C have none
        return offered
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for parameter in named:
        if parameter.name not in offered and parameter.default is parameter.empty:
            columns = listed(column for column in offered if column not in ("prompts", "completions")) or "none"
            raise UserError(
                f"reward {name!r} needs the column {parameter.name!r}, and the data has {columns}: add it, or give the "
                "parameter a default"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return offered
    return {p.name: offered[p.name] for p in named if p.name in offered}


def call(functions: Sequence[Reward], arguments: Sequence[dict[str, Column]], seconds: float) -> dict[int, Outcome]:
    """The result or the error of each function, by its place; none for a function that exceeded the time limit."""
    done: dict[int, Outcome] = {}

    def call_one(k: int) -> None:
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
        _in_thread(seconds, lambda: asyncio.run(gather(together)))  # cancels the late ones
    for k in range(len(functions)):
        if k not in together:
            _in_thread(seconds, call_one, k)
            if k not in done:
                break  # it goes on in its thread; the caller raises, so the others are not needed
    return done


def failure(
    name: str, function: Reward, arguments: dict[str, Column], error: BaseException, seconds: float
) -> UserError:
    """A function's error as a UserError, with the first sample that raises one by itself."""
    if isinstance(error, UserError):
        return error
    where = "the whole batch"
    found = _first_that_raises(function, arguments, seconds)
    if found is not None:
        i, error = found
        where = f"sample {i}"
        if "completions" in arguments:
            where += f" ({_quoted(arguments['completions'][i], 40)})"
    start, end = f"reward {name!r} raised {type(error).__name__} on {where}: ", ": fix it (--debug shows where)"
    return UserError(start + one_line(error, max(30, 200 - len(start) - len(end))) + end)


def numbers(name: str, values: Any, completions: Column) -> Float[Tensor, " B"]:
    """The values that a function returned, None as NaN. Raises UserError unless there is a finite number a sample."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        what = "None" if values is None else f"a {type(values).__name__}"
        raise UserError(f"reward {name!r} returned {what}: return a list of one number, or None, for each completion")
    if len(values) != len(completions):
        raise UserError(
            f"reward {name!r} returned {len(values)} values for {len(completions)} completions: return one for each"
        )
    found = [math.nan if value is None else _number(value) for value in values]
    for i, (number, value) in enumerate(zip(found, values, strict=True)):
        if number is None or (value is not None and not abs(number) <= torch.finfo(torch.float32).max):
            raise UserError(
                f"reward {name!r} returned {shortened(value, 30)} for sample {i} ({_quoted(completions[i], 40)}): "
                "return a finite number, or None where it does not apply"
            )
    return torch.tensor(found, dtype=torch.float32)


def _is_async(function: Reward) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))  # or an object's call


def _first_that_raises(
    function: Reward, arguments: dict[str, Column], seconds: float
) -> tuple[int, BaseException] | None:
    """The first sample on which the function raises by itself, and the error; None if there is none in time."""
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
    """Do the work, and wait for it no longer than this. The thread is a daemon, so the process can end all the same."""
    gradients = torch.is_grad_enabled()  # each thread has its own

    def run() -> None:
        torch.set_grad_enabled(gradients)
        work(*arguments)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _number(value: Any) -> float | None:
    """A number, True or False, or a scalar of numpy or torch, as a float; None for anything else."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return None


def _quoted(value: Any, length: int) -> str:
    """A completion, shortened; of messages their text."""
    messages = isinstance(value, list) and value and all(isinstance(x, dict) and "content" in x for x in value)
    return shortened(text_of(value) if messages else value, length)
