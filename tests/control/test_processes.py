"""Environments in processes: the same numbers, and what happens to a process is said in one line."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from probes import Broken, Known, Slow, limited

from policygrad.control import make_environments, processes
from policygrad.control.environments import close
from policygrad.control.processes import Processes, pays, step_time
from policygrad.control.stepping import Stepping
from policygrad.errors import Note, UserError


class Ending(Known):
    """Ends its process, or hangs, at the second step."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.t = how, 0

    def step(self, action: Any) -> Any:
        self.t += 1
        if self.t == 2:
            match self.how:
                case "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "terminated":
                    os.kill(os.getpid(), signal.SIGTERM)
                case "exit":
                    os._exit(3)
                case "hangs":
                    time.sleep(600)
        return super().step(action)


def step(made: Stepping, action: np.ndarray) -> None:
    for _ in range(8):
        made.step(action)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", r"the process of environment 1 of 3 was ended by SIGKILL \(out of memory\?\) in step"),
        ("terminated", r"environment 1 of 3 was ended by SIGTERM in step"),
        ("exit", r"environment 1 of 3 exited with code 3 in step"),
        ("hangs", r"environment 1 of 3 did not finish step within 0\.5 s: .*step_time_limit"),
    ],
)
def test_a_process_that_is_lost_is_named(how: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    makers = [lambda: Ending("well"), lambda: Ending(how), lambda: Ending("well")]
    made = Stepping(Processes(makers, time_limit=0.5 if how == "hangs" else None))
    made.reset()
    with pytest.raises(UserError, match=said) as raised:
        step(made, np.zeros((3, 2), np.float32))
    assert len(str(raised.value)) <= 200
    processes: Any = made.environments
    assert not any(x.is_alive() for x in processes.processes), "no process is left"
    made.environments.close()
    assert capfd.readouterr().err == ""


class Late(Known):
    """Takes its time to be made, and to say what it has learned, in a process of its own."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.child = os.getpid() != PARENT
        if where == "start" and self.child:
            time.sleep(600)

    def learned(self) -> None:
        time.sleep(600)


PARENT = os.getpid()


def test_the_time_limit_is_also_of_the_start_and_of_calls() -> None:
    with pytest.raises(UserError, match=r"^environment 0 of 2 did not finish its start within 0\.3 s: "):
        make_environments(lambda: Late("start"), 2, vectorization="async", step_time_limit=0.3)
    made = Processes([lambda: Late("call")] * 2, time_limit=0.3)
    with pytest.raises(UserError, match=r"^environment 0 of 2 did not finish learned within 0\.3 s: "):
        made.call("learned")


class TwoParts(Exception):
    def __init__(self, part: str, why: str) -> None:
        super().__init__(f"{part}: {why}")


class TwoPartsOfAUser(UserError):
    def __init__(self, part: str, why: str) -> None:
        super().__init__(f"{part}: {why}")


@pytest.mark.parametrize("method", ["step", "reset"])
@pytest.mark.parametrize("kind", ["two parts", "local", "of a user"])
def test_an_error_of_any_class_arrives_as_what_it_was(method: str, kind: str) -> None:
    """One whose class takes two arguments cannot be unpickled, and one of a local class not even pickled."""

    class Local(Exception):
        pass

    error = {"two parts": TwoParts, "of a user": TwoPartsOfAUser}.get(kind, lambda a, b: Local(f"{a}: {b}"))

    class Raising(Known):
        def reset(self, **options: Any) -> Any:
            if method == "reset":
                raise error("the motor", "too hot")
            return super().reset(**options)

        def step(self, action: Any) -> Any:
            raise error("the motor", "too hot")

    said = f"the environment raised {'Local' if kind == 'local' else 'TwoParts'} in {method}: the motor: too hot"
    made = Stepping(make_environments(Raising, 2, vectorization="async"))
    if method == "step":
        made.reset()
    with pytest.raises(UserError, match="^the motor: too hot$" if kind == "of a user" else f"^{said}"):
        made.reset() if method == "reset" else step(made, np.zeros((2, 2), np.float32))


def test_an_error_in_a_process_is_its_own_and_leaves_no_report(capfd: pytest.CaptureFixture[str]) -> None:
    environments = make_environments(Broken, 2, vectorization="async")
    made = Stepping(environments)
    made.reset()
    with pytest.raises(
        UserError, match=r"^the environment raised RuntimeError in step: the simulator crashed"
    ) as raised:
        step(made, np.zeros(2, np.int64))
    assert "the simulator" in str(raised.value.__cause__), "with the trace of the process, for --debug"
    environments.close()
    assert capfd.readouterr().err == ""


def test_a_wrong_value_in_a_process_is_the_same_line_as_without() -> None:
    said = []
    for vectorization in ("sync", "async"):
        environments = make_environments(lambda: Broken("wrong reward shape"), 2, vectorization=vectorization)
        made = Stepping(environments)
        made.reset()
        with pytest.raises(UserError) as raised:
            step(made, np.zeros(2, np.int64))
        said.append(str(raised.value))
        environments.close()
    assert said[0] == said[1]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_the_numbers_are_those_of_one_process(workers: int) -> None:
    makers = [limited(Known, 3 + i) for i in range(5)]
    whole = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
    shared = Processes(makers, workers=workers)
    assert len(shared.processes) == workers
    seeds, generator = [7, 7, 1, 2, 3], np.random.default_rng(0)
    np.testing.assert_array_equal(shared.reset(seed=seeds)[0], whole.reset(seed=seeds)[0])
    for _ in range(12):
        action = generator.normal(size=(5, 2)).astype(np.float32)
        found, expected = shared.step(action), whole.step(action)
        for x, y in zip(found[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(x, y)
        assert found[4].keys() == expected[4].keys()
        for name, x in found[4].items():
            np.testing.assert_array_equal(x, expected[4][name])
    assert shared.call("has_wrapper_attr", "learned") == (False,) * 5
    shared.close()
    assert not any(x.is_alive() for x in shared.processes)


def test_what_was_returned_does_not_change_with_the_next_step() -> None:
    environments = Processes([limited(Known, 8)] * 2)
    environments.reset(seed=[0, 1])
    first = environments.step(np.zeros((2, 2), np.float32))
    before = [x.copy() for x in first[:4]]
    environments.step(np.ones((2, 2), np.float32))
    for x, y in zip(first[:4], before, strict=True):
        np.testing.assert_array_equal(x, y)
    environments.close()


class Thinking(Known):
    def step(self, action: Any) -> Any:
        time.sleep(1.0)
        return super().step(action)

    def name(self) -> str:
        return "slow"


def test_an_answer_to_a_request_that_was_interrupted_is_not_taken_for_another_s() -> None:
    environments = Processes([Thinking, Thinking])
    environments.reset(seed=[0, 1])

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            environments.step(np.zeros((2, 2), np.float32))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert environments.call("name") == ("slow", "slow")
    environments.close()


def test_actions_of_another_shape_are_refused() -> None:
    environments = Processes([limited(Known, 8)] * 2)
    environments.reset(seed=[0, 1])
    with pytest.raises(UserError, match=r"shape \(1, 2\), not \(2, 2\)"):
        environments.step(np.zeros((1, 2), np.float32))
    environments.close()


def test_no_process_outlives_its_parent() -> None:
    script = """
import os, sys, gymnasium
from policygrad.control.processes import Processes
environments = Processes([lambda: gymnasium.make("CartPole-v1")] * 3, workers=3)
print(*[x.pid for x in environments.processes], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    until = time.monotonic() + 20
    pids = [int(x) for x in done.stdout.split()]
    assert len(pids) == 3
    while any(_runs(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_a_time_limit_that_is_kept_changes_nothing() -> None:
    found = []
    for limit in (None, 60.0):
        made = Stepping(make_environments(limited(Known, 8), 2, vectorization="async", step_time_limit=limit), seed=0)
        made.reset()
        found.append([made.step(np.zeros((2, 2), np.float32)).reward for _ in range(12)])
        made.environments.close()
    np.testing.assert_array_equal(*found)


class Unclosed(Known):
    def close(self) -> None:
        raise RuntimeError("the window\nis gone")


@pytest.mark.filterwarnings("ignore::policygrad.errors.Note")
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_error_in_close_is_a_note(vectorization: str, capfd: pytest.CaptureFixture[str]) -> None:
    environments = make_environments(Unclosed, 2, vectorization=vectorization)
    environments.reset(seed=0)
    said = r"^the environment raised RuntimeError in close: the window is gone \(the results are kept\)$"
    if vectorization == "sync":
        with pytest.warns(Note, match=said):
            close(environments)
    else:
        close(environments)
        assert "Traceback" not in capfd.readouterr().err
    assert environments.closed


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, whatever the machine has."""
    monkeypatch.setattr(processes, "cores", lambda: 2)


@pytest.mark.parametrize(
    ("environment", "count", "options", "kind"),
    [
        ("probes:Slow-v0", 4, {}, Processes),
        ("probes:Slow", 4, {"wrap": ["TimeLimit:3"], "restarts": 1}, Processes),
        ("probes:Slow-v0", 1, {}, SyncVectorEnv),  # there is nothing to share
        ("probes:Slow-v0", 4, {"vectorization": "sync"}, SyncVectorEnv),
        ("probes:Known-v0", 2, {}, SyncVectorEnv),  # the pipes would take longer than the steps
        (Slow, 4, {}, SyncVectorEnv),  # a class may share objects with its caller
    ],
)
def test_auto_takes_what_is_faster(environment: Any, count: int, options: Any, kind: type, two: None) -> None:
    made = make_environments(environment, count, **options)
    assert type(made.unwrapped) is kind
    made.close()


def test_one_core_steps_as_fast_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "cores", lambda: 1)
    assert not pays(Slow, 4)


@pytest.mark.parametrize("other", ["spawn", "daemon"])
def test_processes_are_not_for_a_parent_that_cannot_have_them(
    other: str, two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pays(Slow, 4)
    if other == "spawn":
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda: "spawn")
    else:
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert not pays(Slow, 4)


@pytest.mark.parametrize("kind", ["no environment", "raises", "killed", "hangs"])
def test_what_cannot_be_measured_is_met_by_the_run(
    kind: str, two: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "WAITING", 0.5)
    makers: Any = {"no environment": lambda: 1 / 0, "raises": Broken}
    assert not pays(makers.get(kind, lambda: Ending(kind)), 4)
    assert capfd.readouterr() == ("", "")


class Loud(Slow):
    """Says what it does, draws from the generator of all, and counts itself."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Loud.made += 1

    def step(self, action: Any) -> Any:
        print("a step", flush=True)
        np.random.random()  # noqa: NPY002
        return super().step(action)


def test_measuring_leaves_no_trace(two: None, capfd: pytest.CaptureFixture[str]) -> None:
    before = np.random.get_state()[2]  # noqa: NPY002
    assert pays(Loud, 4)
    assert np.random.get_state()[2] == before  # noqa: NPY002
    assert Loud.made == 0
    assert capfd.readouterr() == ("", "")


def test_the_time_of_a_step_is_its_median() -> None:
    class Uneven(Known):
        """Every third step takes 30 ms, the others one."""

        count = 0

        def step(self, action: Any) -> Any:
            self.count += 1
            time.sleep(0.03 if self.count % 3 == 0 else 0.001)
            return super().step(action)

    assert 1e-3 <= step_time(Uneven()) < 25e-3
