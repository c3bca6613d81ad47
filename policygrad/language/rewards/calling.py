"""How reward functions are called: their arguments, time limits, failures, and the numbers that they return."""

import asyncio
import inspect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from policygrad.errors import NonFiniteError, UserError, listed, one_line, shortened, type_of

Column = Sequence[Any]  # one entry a sample
Reward = Callable[..., Any]  # (prompts=, completions=, **columns) -> list[float | None], or a coroutine of it
GIVEN = (
    "prompts",
    "completions",
    "completion_ids",
    "completion_mask",
    "completions_raw",
    "cut",
)  # what every reward is offered
REPEAT = 0.1  # seconds between interruptions
FOREVER = 1e8  # seconds; threads and event loops take no infinite ones
Outcome = tuple[Any, BaseException | None]  # what a function returned, or what it raised


def text_of(completion: Any) -> str:
    """The text of a prompt or a completion; of a conversation that of its messages, one after another.

    A message without content, such as one of tool calls, has no text.
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion if message.get("content") is not None)


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


def check_columns(functions: Sequence[Reward], names: Sequence[str], columns: Iterable[str]) -> None:
    """Raise UserError if a function wants a column of the data and would get one of GIVEN in its place."""
    for column in set(columns).intersection(GIVEN):
        for function, name in zip(functions, names, strict=True):
            if _wants(function, column):
                raise UserError(
                    f"reward {shortened(name, 40)} would not get the column {column!r} of the data, but what every "
                    f"reward receives by that name: rename it by columns, such as data_{column}={column}"
                )


def _wants(function: Reward, column: str) -> bool:
    """Whether a function may want the data's column, by one of the names in GIVEN.

    The functions of this library, and those that name `prompts` or `completions`, want the policy's.
    """
    if str(getattr(function, "__module__", "")).startswith("policygrad."):
        return False
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some callables in C have none
        return True
    if column in parameters:
        return column not in ("prompts", "completions")
    return any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in parameters.values())


def call(functions: Sequence[Reward], arguments: Sequence[dict[str, Column]], seconds: float) -> dict[int, Outcome]:
    """The result or the error of each function, by its place; none for a function that exceeded the time limit.

    Each function has its own copy of its arguments. A KeyboardInterrupt is the user's, and passes.
    """
    done: dict[int, Outcome] = {}
    given = [deepcopy(columns) for columns in arguments]
    together = [k for k, function in enumerate(functions) if _is_async(function)]
    if together:
        done.update(LOOP.run({k: _awaited(functions[k], given[k]) for k in together}, seconds))
    for k, function in enumerate(functions):
        if k not in together:
            outcome = limited(lambda f=function, columns=given[k]: f(**columns), seconds)  # type: ignore[misc]
            if outcome is not None and inspect.isawaitable(outcome[0]):
                outcome = LOOP.run({k: outcome[0]}, seconds).get(k)
            if outcome is None:
                break  # the caller raises, so the others are not needed
            done[k] = outcome
            if isinstance(outcome[1], KeyboardInterrupt):
                break
    for _, error in done.values():
        if isinstance(error, KeyboardInterrupt):
            raise error
    return done


class TimeLimitError(BaseException):
    """The time limit, raised inside a function; not an Exception, which the function might catch."""


def limited(work: Callable[[], Any], seconds: float) -> Outcome | None:
    """What the work returns or raises; None if it takes longer.

    In the main thread the work runs there, so that it may use signals (SIGALRM, as math-verify does). A second thread
    watches the time and interrupts it by SIGURG, which wakes it from sleep, a lock or a socket too. A timer of
    computing time (SIGVTALRM) serves where that thread cannot run, as during the search for a regular expression. Only
    an operation in C that never looks for signals goes on to its end. In another thread, or where there are no such
    signals, the work has a thread of its own, which is left behind when time is up.
    """
    seconds = min(seconds, FOREVER)
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGURG"):
        return _in_thread(work, seconds)
    ended, main, inside, deadline = threading.Event(), threading.get_ident(), True, time.monotonic() + seconds

    def interrupt(*_: Any) -> None:
        if inside and time.monotonic() >= deadline:
            raise TimeLimitError

    def watch() -> None:
        while not ended.wait(max(REPEAT, deadline - time.monotonic())):  # again, if the function caught it
            signal.pthread_kill(main, signal.SIGURG)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGURG, signal.SIGVTALRM)}
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, REPEAT)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        outcome = _outcome(work)
        inside = False
        return outcome
    except TimeLimitError:
        return None
    finally:
        inside = False
        ended.set()
        watcher.join()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        for number, handler in before.items():  # a late SIGVTALRM would end the process by default
            signal.signal(number, signal.SIG_IGN if handler in (signal.SIG_DFL, None) else handler)


class EventLoop:
    """One event loop in a thread of its own for all coroutines of the process, so that a client or a semaphore that is
    made once serves in every batch. One that blocks beyond the time limit is left behind, and the next is new."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def run(self, work: "dict[int, Any]", seconds: float) -> dict[int, Outcome]:
        """The outcome of each coroutine, side by side; none for one that takes longer, which is cancelled."""
        seconds = min(seconds, FOREVER)
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
            threading.Thread(target=self.loop.run_forever, daemon=True).start()
        gradients = torch.is_grad_enabled()  # each thread has its own

        async def outcome(one: Any) -> Outcome:
            torch.set_grad_enabled(gradients)
            try:
                return await one, None
            except BaseException as error:
                return None, error

        async def gather() -> dict[int, Outcome]:
            tasks = {k: asyncio.ensure_future(outcome(one)) for k, one in work.items()}
            finished, late = await asyncio.wait(tasks.values(), timeout=seconds)
            for task in late:
                task.cancel()
            return {k: task.result() for k, task in tasks.items() if task in finished}

        running = asyncio.run_coroutine_threadsafe(gather(), self.loop)
        try:
            return running.result(seconds + 0.2 + 0.1 * seconds)
        except TimeoutError:  # one blocks the loop
            self.loop = None
            return {}


LOOP = EventLoop()


def failure(name: str, error: BaseException) -> UserError:
    """A function's error as a UserError."""
    if isinstance(error, UserError):
        return error
    start, end = f"reward {name!r} raised {type(error).__name__}: ", ": fix it (--debug shows where)"
    return UserError(start + one_line(error, max(30, 200 - len(start) - len(end))) + end)


def numbers(
    name: str, values: Any, completions: Column, ids: Column | None = None
) -> Float[Tensor, " B"] | Float[Tensor, "B W"]:
    """The values that a function returned, None as NaN: [B], or [B, W] if they are lists, a number a token.

    ids: the tokens of each completion; W is the most that one has, and 0 stands behind its end. Raises UserError unless
    there is a finite number a sample, or one for each token of a sample.
    """
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        what = "None" if values is None else type_of(values)
        raise UserError(f"reward {name!r} returned {what}: return a list of one number, or None, for each completion")
    if len(values) != len(completions):
        raise UserError(
            f"reward {name!r} returned {len(values)} values for {len(completions)} completions: return one for each"
        )
    if ids is not None and any(map(_is_row, values)):
        return _by_token(name, values, ids)
    places = (f"sample {i} ({_quoted(completion, 40)})" for i, completion in enumerate(completions))
    return torch.tensor([_finite(name, *pair) for pair in zip(values, places, strict=True)], dtype=torch.float32)


def _finite(name: str, value: Any, place: str) -> float:
    """The value as a number, None as NaN. Raises UserError unless it is finite."""
    number = math.nan if value is None else _number(value)
    if number is None or (value is not None and not abs(number) <= torch.finfo(torch.float32).max):
        raise (UserError if number is None else NonFiniteError)(
            f"reward {name!r} returned {shortened(value, 30)} for {place}: "
            "return a finite number, or None where it does not apply"
        )
    return number


def _is_row(value: Any) -> bool:
    """Whether a value is several numbers: a list, or an array or a tensor of one dimension."""
    return isinstance(value, list | tuple) or (hasattr(value, "tolist") and getattr(value, "ndim", 0) == 1)


def _by_token(name: str, values: Column, ids: Column) -> Float[Tensor, "B W"]:
    """The values of a function that returns a number for each token; a row of NaN for a sample that has none."""
    found = torch.zeros(len(values), max(map(len, ids)))
    for i, (value, tokens) in enumerate(zip(values, ids, strict=True)):
        if value is not None and (not _is_row(value) or len(value) != len(tokens)):
            what = f"{len(value)} numbers" if _is_row(value) else shortened(value, 30)
            said = f"reward {shortened(name, 40)!r} returned {what} for sample {i}, of {len(tokens)} tokens"
            raise UserError(f"{said}: return a list with a number for each of its completion_ids, or None")
        if value is None:
            found[i] = math.nan
            continue
        row = [_finite(name, x, f"token {t} of sample {i}") for t, x in enumerate(value)]
        if any(x is None for x in value):
            raise UserError(f"reward {shortened(name, 40)!r} returned None for a token of sample {i}: return 0 there")
        found[i, : len(tokens)] = torch.tensor(row)
    return found


def _is_async(function: Reward) -> bool:
    return any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))  # or an object's call


async def _awaited(function: Reward, columns: dict[str, Column]) -> Any:
    return await function(**columns)


def _outcome(work: Callable[[], Any]) -> Outcome:
    try:
        return work(), None
    except TimeLimitError:
        raise
    except BaseException as error:
        return None, error


def _in_thread(work: Callable[[], Any], seconds: float) -> Outcome | None:
    """The outcome of work in a daemon thread, so that the process can end all the same; None if it takes longer."""
    gradients, found = torch.is_grad_enabled(), []

    def run() -> None:
        torch.set_grad_enabled(gradients)
        found.append(_outcome(work))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


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
