"""Environments in processes of their own, several in each. What happens to a process is said in one line."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from policygrad.control.masks import random_action
from policygrad.errors import UserError, one_line
from policygrad.machine import cores

CLOSING = 10.0  # seconds that the processes have to close their environments
COST = 3e-4  # seconds that a step takes longer in processes, besides the environments' own (docs/log.md, 2026-11-27)
TRIED, TRYING = 64, 0.02  # the most steps, and about the most seconds of steps, from which the time of one is measured
WAITING = 60.0  # seconds for that; a process that is forked beside other threads may wait for what they had
RESTARTED = "restarted"  # in the info of the step in which an environment failed and was made anew: why
COLUMNS = ("obs", "action", "reward", "terminated", "truncated")


class Processes(VectorEnv):
    """Steps the environments in as many processes as there are cores, each with its share of neighbors.

    Observations, actions, rewards and flags are in shared memory; a pipe says when they are there. Each environment
    resets on the step after its episode ends. time_limit: seconds for the start of a process, a step, a reset and a
    call. restarts: how often each process is started anew with its environments if it dies or does not answer a step in
    time: their episodes are cut, and RESTARTED in their infos says why. Raises UserError if an environment raises an
    error, and if its process dies or does not answer in time.
    """

    def __init__(
        self,
        makers: list[Callable[[], gymnasium.Env]],
        time_limit: float | None = None,
        workers: int | None = None,
        restarts: int = 0,
    ) -> None:
        self.makers, self.restarts = makers, restarts
        self.num_envs, self.time_limit, self.closed = len(makers), time_limit, False
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        example = makers[0]()
        self.single_observation_space, self.single_action_space = example.observation_space, example.action_space
        example.close()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.shares = [
            list(map(int, x)) for x in np.array_split(range(self.num_envs), min(workers or cores(), len(makers)))
        ]
        like = {
            "obs": self.observation_space, "action": self.action_space, "reward": np.dtype(np.float64),
            "terminated": np.dtype(bool), "truncated": np.dtype(bool),
        }  # fmt: skip
        memory = self.memory = {name: _shared(x, self.num_envs) for name, x in like.items()}
        self.current = multiprocessing.RawArray("i", len(self.shares))  # the environment that each one is at
        self.columns = {name: _array(*x) for name, x in memory.items()}
        pipes = [multiprocessing.Pipe() for _ in self.shares]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [self._begun(k, pipes) for k in range(len(self.shares))]
        self.restarted = [0] * len(self.shares)
        for _, theirs in pipes:
            theirs.close()
        self.seeds: list[Any] = [None] * self.num_envs
        self.number = 0  # of the newest request: an interrupt may leave answers to older ones
        try:
            self._answers("its start")
        except BaseException:
            self._end()
            raise

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        """As Gymnasium's."""
        seeds = [seed + i for i in range(self.num_envs)] if isinstance(seed, int) else seed or [None] * self.num_envs
        self.seeds = [old if new is None else new for old, new in zip(self.seeds, seeds, strict=True)]
        infos = self._asked("reset", lambda share: ([seeds[i] for i in share], options))
        return self.columns["obs"].copy(), self._together(infos)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """As Gymnasium's."""
        if np.shape(actions) != self.columns["action"].shape:
            raise UserError(f"the actions have shape {np.shape(actions)}, not {self.columns['action'].shape}")
        self.columns["action"][:] = actions
        infos = self._asked("step", lambda share: None)
        obs, _, reward, terminated, truncated = (self.columns[name].copy() for name in COLUMNS)
        return obs, reward, terminated, truncated, self._together(infos)

    def call(self, name: str, *arguments: Any, **named: Any) -> tuple[Any, ...]:
        """A method's result, or an attribute, of each environment."""
        return tuple(x for _, x in self._asked("call", lambda share: (name, arguments, named), name))

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """An attribute of each environment."""
        return self.call(name)

    def restore(self, states: list[dict[str, Any]]) -> list[bool]:
        """Play each environment's episode of Checked.recorded again: whether it came to where it was."""
        limit, self.time_limit = self.time_limit, None  # of one step, and these are many
        try:
            return [x for _, x in self._asked("restore", lambda share: [states[i] for i in share])]
        finally:
            self.time_limit = limit

    def close_extras(self, **options: Any) -> None:
        """Let each process close its environments, and end those that do not in time."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send((-1, "close", None))
        until = time.monotonic() + CLOSING
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        self._end()

    def _together(self, infos: list[tuple[int, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for i, info in infos:
            if info:
                found = self._add_info(found, info, i)
        return found

    def _asked(self, request: str, argument: Callable[[list[int]], Any], said: str | None = None) -> list[Any]:
        """The answers of all processes to a request with an argument for each share. said: its name in messages."""
        self.number += 1
        for pipe, share in zip(self.pipes, self.shares, strict=True):
            with suppress(ConnectionError):  # of a process that is gone: then no answer comes
                pipe.send((self.number, request, argument(share)))
        return self._answers(said or request)

    def _answers(self, said: str) -> list[Any]:
        """The answers (environment, x) of all processes to the newest request."""
        until = None if self.time_limit is None else time.monotonic() + self.time_limit
        answers: list[Any] = []
        errors: list[Any] = []
        for k in range(len(self.pipes)):
            try:
                done, found = self._answer(k, until)
            except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:
                lost = self._lost(k, said, isinstance(error, multiprocessing.TimeoutError))
                if said != "step" or self.restarted[k] >= self.restarts:
                    self._end()
                    raise UserError(lost) from error
                done, found = self._renewed(k, lost)
            answers += found if done else []
            errors += [] if done else [found]
        for kind, text, trace in errors:
            if kind is None:
                raise UserError(text)
            raise UserError(f"the environment raised {kind} in {said}: {text} (--debug shows where)") from RuntimeError(
                trace
            )
        return answers

    def _answer(self, k: int, until: float | None) -> tuple[bool, Any]:
        """The answer of process k to the newest request: whether it succeeded, and what it found."""
        number = -1
        while number != self.number:
            if until is not None and not self.pipes[k].poll(max(0.0, until - time.monotonic())):
                raise multiprocessing.TimeoutError
            number, done, found = self.pipes[k].recv()
        return done, found

    def _begun(self, k: int, pipes: list[Any]) -> Any:
        """Process k, started. pipes: (our end, its end) of each process; of those that run already ours alone."""
        made = CloudpickleWrapper([self.makers[i] for i in self.shares[k]])  # type: ignore[arg-type]
        arguments = (k, self.shares[k], made, self.memory, self.current, pipes)
        process = multiprocessing.Process(target=_work, args=arguments, daemon=True, name=f"environments {k}")
        process.start()
        return process

    def _renewed(self, k: int, lost: str) -> tuple[bool, Any]:
        """Start process k anew after it was lost in a step, and reset its environments: their answer to that step."""
        share = self.shares[k]
        self.restarted[k] += 1
        self.processes[k].kill()
        self.processes[k].join()
        self.pipes[k].close()
        self.pipes[k], theirs = multiprocessing.Pipe()
        self.processes[k] = self._begun(k, [(ours, theirs if j == k else None) for j, ours in enumerate(self.pipes)])
        theirs.close()
        seeds = [None if self.seeds[i] is None else another_seed(self.seeds[i], self.restarted[k]) for i in share]
        with suppress(ConnectionError):  # it is gone again: then no answer comes
            self.pipes[k].send((self.number, "reset", (seeds, None)))
        try:
            done, found = self._answer(k, None if self.time_limit is None else time.monotonic() + self.time_limit)
        except (EOFError, ConnectionError, multiprocessing.TimeoutError) as error:
            lost = self._lost(k, "its new start", isinstance(error, multiprocessing.TimeoutError))
            self._end()
            raise UserError(lost) from error
        for name in ("reward", "terminated", "truncated"):
            self.columns[name][share] = 0
        return done, [(i, info | {RESTARTED: lost}) for i, info in found] if done else found

    def _lost(self, k: int, method: str, late: bool) -> str:
        """What happened to process k, in words."""
        if late:
            return (
                f"environment {self.current[k]} of {self.num_envs} did not finish {method} within "
                f"{self.time_limit:g} s: fix it, or raise step_time_limit"
            )
        process = self.processes[k]
        process.join(1.0)  # a pipe closes a moment before its process is gone
        code = process.exitcode
        if code is None:
            return f"a process of the environments closed its pipe in {method}: fix the environment"
        how = f"exited with code {code}"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
            how += " (out of memory?)" if -code == signal.SIGKILL else ""
        return (
            f"the process of environment {self.current[k]} of {self.num_envs} {how} in {method}: to see where, try "
            "vectorization sync"
        )

    def _end(self) -> None:
        """End all processes, so that nothing waits for them again."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.closed = True


def pays(make: Callable[[], gymnasium.Env], count: int) -> bool:
    """Whether `count` environments are to be stepped in processes: it saves at least twice what it costs.

    Saved is count * (the time of a step alone) - ceil(count / cores) * (that time with all cores at work), and the cost
    is COST. Environments are made and stepped for that in processes, so that this one stays as it is. False if one
    fails, which the run will meet and say, and where processes cannot be forked: a script must be written for those.
    """
    workers = min(cores(), count)
    if workers == 1 or multiprocessing.get_start_method() != "fork" or multiprocessing.current_process().daemon:
        return False
    alone, largest = _measured(make, 1), -(-count // workers)
    if alone * (count - largest) <= 2 * COST:
        return False
    together = _measured(make, workers)
    return together > 0 and count * alone - largest * together > 2 * COST


def _measured(make: Callable[[], gymnasium.Env], count: int) -> float:
    """The seconds of a step in the slowest of `count` processes that step at the same time; 0 if one fails."""
    begin, pipes, processes = multiprocessing.Barrier(count), [], []
    try:
        for _ in range(count):
            ours, theirs = multiprocessing.Pipe()
            pipes.append(ours)
            processes.append(multiprocessing.Process(target=_measure, args=(make, begin, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
        until = time.monotonic() + WAITING
        if not all(ours.poll(max(0.0, until - time.monotonic())) for ours in pipes):
            return 0.0
        found = [ours.recv() for ours in pipes]
        for process in processes:
            process.join(CLOSING)
        return min(found) and max(found)
    except (EOFError, OSError):  # one has died
        return 0.0
    finally:
        for process in processes:
            process.kill()
            process.join()
        for ours in pipes:
            ours.close()


def _measure(make: Callable[[], gymnasium.Env], begin: Any, pipe: Any) -> None:
    """Send the seconds of a step of an environment, 0 if it fails. begin: the moment. What it prints is not shown."""
    _as_child()
    sys.stdout = sys.stderr = nowhere = open(os.devnull, "w")  # noqa: SIM115 - until this process ends
    for stream in (1, 2):
        os.dup2(nowhere.fileno(), stream)
    seconds, environment = 0.0, None
    try:
        environment = make()
        begin.wait(WAITING)
        seconds = step_time(environment)
    except Exception:
        begin.abort()
    pipe.send(seconds)
    with suppress(Exception):
        if environment is not None:
            environment.close()


def step_time(environment: gymnasium.Env) -> float:
    """The median seconds of a step of an environment, with random actions."""
    times: list[float] = []
    generator, ended = np.random.default_rng(0), True
    environment.action_space.seed(0)
    while len(times) < TRIED and sum(times) < TRYING:
        if ended:
            obs, _ = environment.reset(seed=len(times))
        action = random_action(obs, environment.observation_space, environment.action_space, generator)
        began = time.perf_counter()
        obs, _, terminated, truncated, _ = environment.step(action)
        times.append(time.perf_counter() - began)
        ended = terminated or truncated
    return float(np.median(times))


def another_seed(seed: int, times: int) -> int:
    """The seed of an environment that is made anew: with the old one it would repeat what it has done."""
    return int(np.random.SeedSequence([seed, times], spawn_key=(4,)).generate_state(1)[0])


def _shared(like: Any, count: int) -> tuple[Any, tuple[int, ...], np.dtype]:
    """Shared memory for a batch of a space, or for `count` numbers of a type."""
    shape, dtype = ((count,), like) if isinstance(like, np.dtype) else (like.shape, np.dtype(like.dtype))
    return multiprocessing.RawArray("b", max(1, int(np.prod(shape)) * dtype.itemsize)), shape, dtype


def _array(memory: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(memory, dtype, int(np.prod(shape))).reshape(shape)


def _as_child() -> None:
    """What this process leaves to its parent: the signals of a terminal, and the other cores."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # and OpenMP's threads do not survive a fork


def _work(k: int, share: list[int], made: Any, memory: dict[str, Any], current: Any, pipes: list[Any]) -> None:
    """What a process does: it answers requests until it is told to close, or its parent is gone."""
    _as_child()
    for other, (ours, theirs) in enumerate(pipes):
        ours.close()  # so that a pipe ends with either of its two processes
        if other != k and theirs is not None:
            theirs.close()
    worker = _Worker(k, share, {name: _array(*x) for name, x in memory.items()}, current)
    pipe, number, request, argument = pipes[k][1], 0, "start", made.fn
    while request != "close":
        try:
            reply = (number, True, getattr(worker, request)(argument))
        except BaseException as error:
            kind = None if isinstance(error, UserError) else type(error).__name__
            text = str(error) if kind is None else one_line(error, 120)
            reply = (number, False, (kind, text, traceback.format_exc()))
        try:
            pipe.send(reply)
            number, request, argument = pipe.recv()
        except (EOFError, OSError):  # the parent is gone
            break
    for environment in worker.environments:
        with suppress(Exception):
            environment.close()


class _Worker:
    """A process's share of the environments, and its rows of the columns. Each method answers one kind of request.

    share: the numbers of its environments. current: where each process says which environment it is at.
    """

    def __init__(self, k: int, share: list[int], columns: dict[str, np.ndarray], current: Any) -> None:
        self.k, self.share, self.columns, self.current = k, share, columns, current
        self.environments: list[gymnasium.Env] = []
        self.resetting = [True] * len(share)

    def start(self, makers: list[Callable[[], gymnasium.Env]]) -> list[Any]:
        """Make the environments."""
        for i, make in enumerate(makers):
            self._at(i)
            self.environments.append(make())
        return []

    def reset(self, argument: tuple[list[int | None], Any]) -> list[tuple[int, Any]]:
        """Reset them. argument: their seeds, and the options."""
        seeds, options = argument
        return [self._reset(i, seed=seed, options=options) for i, seed in enumerate(seeds)]

    def step(self, argument: None) -> list[tuple[int, Any]]:
        """Step them, or reset those whose episode has ended."""
        return [self._step(i) for i in range(len(self.share))]

    def call(self, argument: tuple[str, tuple[Any, ...], dict[str, Any]]) -> list[tuple[int, Any]]:
        """Call a method of each, or read an attribute. argument: its name and arguments."""
        name, arguments, named = argument
        answers = []
        for i, j in enumerate(self.share):
            self._at(i)
            found = self.environments[i].get_wrapper_attr(name)
            answers.append((j, found(*arguments, **named) if callable(found) else found))
        return answers

    def restore(self, states: list[dict[str, Any]]) -> list[tuple[int, Any]]:
        """Play their episodes again. states: what each has recorded."""
        answers = []
        for i, state in enumerate(states):
            answers.append((self._at(i), self.environments[i].get_wrapper_attr("replayed")(state)))
            self.resetting[i] = state["ended"]
        return answers

    def _at(self, i: int) -> int:
        """Say that the process is at this environment; its number among all."""
        self.current[self.k] = self.share[i]
        return self.share[i]

    def _reset(self, i: int, **options: Any) -> tuple[int, Any]:
        j = self._at(i)
        obs, info = self.environments[i].reset(**options)
        self.columns["obs"][j], self.resetting[i] = obs, False
        return j, info

    def _step(self, i: int) -> tuple[int, Any]:
        j, columns = self._at(i), self.columns
        if self.resetting[i]:
            columns["reward"][j], columns["terminated"][j], columns["truncated"][j] = 0.0, False, False
            return self._reset(i)
        obs, reward, terminated, truncated, info = self.environments[i].step(columns["action"][j].copy())
        columns["obs"][j], columns["reward"][j] = obs, reward
        columns["terminated"][j], columns["truncated"][j] = terminated, truncated
        self.resetting[i] = terminated or truncated
        return j, info
