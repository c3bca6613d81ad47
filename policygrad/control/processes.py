"""One process per environment. What happens to a process is said in one line."""

import multiprocessing
import queue
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import gymnasium
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.vector.async_vector_env import AsyncState

from policygrad.errors import UserError, one_line

CLOSING = 10.0  # seconds that the processes have to close their environments


class Processes(AsyncVectorEnv):
    """Gymnasium's AsyncVectorEnv, with a time limit for the start of a process, each step, reset and call.

    Raises UserError if an environment raises an error, and if its process dies or does not answer in time.
    """

    def __init__(self, makers: list[Callable[[], gymnasium.Env]], time_limit: float | None = None) -> None:
        self.time_limit = time_limit
        super().__init__([partial(_sending, make) for make in makers], autoreset_mode=AutoresetMode.NEXT_STEP)

    def reset(self, **options: Any) -> Any:
        """As Gymnasium's."""
        with self._told("reset"):
            self.reset_async(**options)
            return self.reset_wait(self.time_limit)

    def step(self, actions: Any) -> Any:
        """As Gymnasium's."""
        with self._told("step"):
            self.step_async(actions)
            return self.step_wait(self.time_limit)

    def call(self, name: str, *arguments: Any, **named: Any) -> tuple[Any, ...]:
        """As Gymnasium's."""
        with self._told(name):
            self.call_async(name, *arguments, **named)
            return self.call_wait(self.time_limit)

    def close_extras(self, timeout: float | None = CLOSING, terminate: bool = False) -> None:
        """Let each process close its environment, and end those that do not in time."""
        for pipe in self.parent_pipes:
            with suppress(OSError):
                if pipe is not None:
                    pipe.send(("close", None))
        until = time.monotonic() + (0.0 if terminate else timeout or CLOSING)
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self._end()

    def _check_spaces(self) -> None:
        with self._told("its start"):
            self.call_async("render_mode")  # the first answer comes when the environment is made
            self.call_wait(self.time_limit)
            super()._check_spaces()

    @contextmanager
    def _told(self, method: str) -> Iterator[None]:
        """Say which process was lost, and how, in place of an error of its pipe."""
        try:
            yield
        except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:
            said = self._lost(method, isinstance(error, multiprocessing.TimeoutError))
            self._end()
            raise UserError(said) from error

    def _lost(self, method: str, late: bool) -> str:
        if late:
            silent = [i for i, pipe in enumerate(self.parent_pipes) if not pipe.poll(0)]
            return (
                f"environment {silent[0]} of {self.num_envs} did not finish {method} within {self.time_limit:g} s: fix "
                "it, or raise step_time_limit"
            )
        until = time.monotonic() + 1.0  # a pipe closes a moment before its process is gone
        while all(x.exitcode is None for x in self.processes) and time.monotonic() < until:
            time.sleep(0.01)
        gone = [(i, x.exitcode) for i, x in enumerate(self.processes) if x.exitcode is not None]
        if not gone:
            return f"a process of the environments closed its pipe in {method}: fix the environment"
        i, code = gone[0]
        how = f"exited with code {code}"
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            how += " (out of memory?)" if -code == signal.SIGKILL else ""
        return (
            f"the process of environment {i} of {self.num_envs} {how} in {method}: to see where, try vectorization sync"
        )

    def _end(self) -> None:
        """End all processes, so that nothing waits for them again."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()
        self.closed = True

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        """Raise the first error of the processes, without Gymnasium's report on standard error."""
        failed = [i for i, success in enumerate(successes) if not success]
        if not failed:
            return
        method = "reset" if self._state is AsyncState.WAITING_RESET else "step"
        errors = []
        with suppress(queue.Empty):
            for _ in failed:
                errors.append(self.error_queue.get(timeout=5.0))
        for i in failed:
            self.parent_pipes[i].close()
            self.parent_pipes[i] = None  # type: ignore[call-overload]
        self._state = AsyncState.DEFAULT
        if not errors:
            raise UserError(f"environment {failed[0]} raised an error in {method} that cannot be sent to this process")
        _, kind, value, trace = errors[0]
        if issubclass(kind, UserError):
            raise UserError(str(value))
        if not issubclass(kind, Exception):
            raise kind(value)
        name, said = value.args if kind is _Sent else (kind.__name__, value)
        raise UserError(
            f"the environment raised {name} in {method}: {one_line(said)} (--debug shows where)"
        ) from RuntimeError(trace)


class _Sent(Exception):
    """The class's name and the text of an error: it itself may not survive the way to another process."""


class _Sending(gymnasium.Wrapper):
    """An environment that raises its errors in a form that can be sent to another process."""

    def reset(self, **options: Any) -> Any:
        try:
            return self.env.reset(**options)
        except Exception as error:
            raise _sent(error) from error

    def step(self, action: Any) -> Any:
        try:
            return self.env.step(action)
        except Exception as error:
            raise _sent(error) from error


def _sent(error: Exception) -> Exception:
    """The error in that form; that of a user stays one."""
    if isinstance(error, UserError):
        return UserError(str(error))
    return _Sent(type(error).__name__, one_line(error, 200))


def _sending(make: Callable[[], gymnasium.Env]) -> gymnasium.Env:
    return _Sending(make())
