"""However a run ends, what was learned is on disk, says what it is, and nothing of it is not finite."""

import dataclasses
import errno
import importlib
import math
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import parameters, strict, untimed
from probes import Broken, Known, limited
from safetensors import SafetensorError
from safetensors.torch import save_file
from scripted import fill, on_disk, replaced
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import recording
from policygrad.train import training as module
from policygrad.train.checkpoints import Stage
from policygrad.train.options import EPISODIC, options_of
from policygrad.train.stopping import asked

SHORT: dict[str, Any] = {"num_envs": 4, "num_steps": 16, "steps": 100, "minibatch_size": 16, "progress": False}
SMALL: dict[str, Any] = {"hidden": (8,), **SHORT}


def known(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that the method reads."""
    kind = options_of(method, "control")
    names = {f.name for f in dataclasses.fields(kind)} | {"progress"}
    if kind().credit in EPISODIC:
        names -= {"num_steps"}
    return {name: x for name, x in values.items() if name in names}


def values(module: nn.Module) -> set[float]:
    return {x for p in module.parameters() for x in p.flatten().tolist()}


def lines(directory: Path) -> list[dict[str, float]]:
    return [strict(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_the_first_signal_is_a_request_and_the_second_is_that_of_outside(name: str) -> None:
    number, outside = signal.Signals[name], []
    before = signal.signal(number, lambda *arguments: outside.append(arguments[0]))
    try:
        with asked() as came:
            signal.raise_signal(number)
            assert (came, outside) == ([number], [])
            signal.raise_signal(number)
            assert (came, outside) == ([number], [number])
        signal.raise_signal(number)
        assert (came, outside) == ([number], [number] * 2)
    finally:
        signal.signal(number, before)


def test_what_outside_ignores_or_leaves_to_the_system_stays_so() -> None:
    for handler in (signal.SIG_IGN, signal.SIG_DFL):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with asked():
                assert signal.getsignal(signal.SIGHUP) is handler
        finally:
            signal.signal(signal.SIGHUP, before)


class OwnPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Normal(self.layer(obs), 1.0, validate_args=False), 1)


def test_a_metric_that_turns_nan_stops_it_and_what_was_learned_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        for k, kl in enumerate((0.1, 0.1, math.nan), 1):
            fill(policy, k)
            yield {"steps": float(k), "episodes": 0.0, "reward_per_step": 0.0, "kl_old": kl}

    replaced(monkeypatch, loop)
    with pytest.raises(UserError, match=r"iteration 3, after 3 steps, because kl_old is nan"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == {3.0}
    assert [row["kl_old"] for row in lines(tmp_path)] == [0.1, 0.1]
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("which", ["policy", "critic"])
def test_a_parameter_that_is_not_finite_stops_it_and_what_was_saved_stays(
    which: str, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        fill(policy, 1)
        yield {"steps": 1.0, "episodes": 0.0, "reward_per_step": 0.0}
        fill({"policy": policy, "critic": critic}[which], value)
        yield {"steps": 2.0, "episodes": 0.0, "reward_per_step": 0.0}

    replaced(monkeypatch, loop)
    monkeypatch.setattr(recording, "SAVE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"iteration 2, after 2 steps, because a parameter is not finite"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == {1.0}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("found NaN in the loc"), UserError("no")], ids=repr)
@pytest.mark.parametrize("value", [2.0, math.nan])
def test_an_iteration_that_stops_half_way_keeps_what_is_finite(
    error: BaseException, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        fill(policy, 1)
        yield {"steps": 1.0, "episodes": 0.0, "reward_per_step": 0.0}
        fill(policy, value)
        raise error

    replaced(monkeypatch, loop)
    monkeypatch.setattr(recording, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == ({1.0} if math.isnan(value) else {value})
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("method", ["ppo", "actor_critic", "reinforce", "grpo", "trpo", "npg"])
def test_a_gradient_that_is_nan_stops_it_before_the_step(method: str, tmp_path: Path) -> None:
    policy = OwnPolicy()
    policy.layer.bias.register_hook(lambda g: g * math.nan)
    before = values(policy)
    with pytest.raises(UserError, match=r"training stopped in iteration 1: the gradient's norm is nan") as raised:
        pg.train(method, "probes:Known-v0", policy=policy, out=tmp_path, **known(method, SHORT))
    assert len(str(raised.value)) <= 200
    assert values(policy) == on_disk(tmp_path) == before


class Later(Broken):
    """Stops at its fortieth step."""

    error: BaseException = RuntimeError("the simulator crashed")

    def step(self, action: Any) -> Any:
        if self.steps == 40:
            raise self.error
        self.steps += 1
        return self.observation(0), 1.0, False, False, {}


class Interrupted(Later):
    error = KeyboardInterrupt()


@pytest.mark.parametrize(("make", "error"), [(Later, UserError), (Interrupted, KeyboardInterrupt)])
def test_the_policy_on_disk_is_the_one_that_the_environment_failed_under(make: Any, error: Any, tmp_path: Path) -> None:
    made: list[pg.Policy] = []

    def policy(*spaces: Any) -> pg.Policy:
        made.append(pg.Policy(*spaces, hidden=(4,)))
        made.append(deepcopy(made[0]))
        return made[0]

    with pytest.raises(error):
        pg.train("ppo", make, policy=policy, out=tmp_path, **(SHORT | {"num_envs": 2, "steps": 1000}))
    assert len(lines(tmp_path)) == 2
    saved, _ = pg.load_policy(tmp_path)
    assert values(saved) == values(made[0]) != values(made[1])
    assert (tmp_path / "curve.png").exists()


# What is on disk at any moment


WORLDS = {
    "control": ("a2c", {"task": "CartPole-v1", "num_envs": 2, "hidden": (4,), "normalize_observations": True}),
    "exact": ("ppo", {"task": "exact:chain", "num_envs": 4}),
    "language": ("grpo", {}),
}


@pytest.fixture(params=WORLDS)
def training(request: pytest.FixtureRequest, tmp_path: Path) -> pg.Training:
    method, arguments = WORLDS[request.param]
    if request.param == "language":
        arguments = request.getfixturevalue("language") | {"learning_rate": 1e-2}
    return pg.Training(method, **arguments | {"iterations": 3, "progress": False}, out=tmp_path / "run")


def test_every_world_saves_at_the_start_now_and_then_and_at_the_end(
    training: pg.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(recording, "SAVE_SHARE", math.inf)
    directory = training.run.directory
    assert directory is not None
    with recording.Recorder(training) as record:
        for iteration in range(4):
            found = pg.Run.load(directory, trust=True)
            ending = "ended" if iteration == 3 else "unfinished"
            assert (found.stage.iteration, found.stage.run, found.stage.partway) == (iteration, ending, False)
            assert found.stage.steps == (training.last["steps"] if iteration else 0)
            assert torch.equal(parameters(found), parameters(training.run))
            assert found.evaluate() == training.run.evaluate()
            for row in training:
                record(row)
                break
    assert pg.Run.load(directory, trust=True).stage == training.run.stage


def test_saving_takes_a_small_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    clock = recording.SaveClock()
    saves = []
    for second in range(100, 4000):
        now[0] = float(second)
        if clock.due():
            with clock:
                saves.append(now[0])
                now[0] += 10.0 if len(saves) > 3 else 0.5
    assert saves[:4] == [130.0, 161.0, 192.0, 223.0]
    assert saves[4] - saves[3] == pytest.approx(10 + 10 / recording.SAVE_SHARE, abs=1)


def test_the_numbers_of_a_run_that_is_stopped_are_those_of_its_policy(
    training: pg.Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last row is none of those that are kept."""
    monkeypatch.setattr(module, "ROWS", 1)
    directory = training.run.directory
    assert directory is not None
    with pytest.raises(KeyboardInterrupt), recording.Recorder(training) as record:  # noqa: PT012
        for row in training:
            record(row)
            if training.iteration == 2:
                raise KeyboardInterrupt
    stage = pg.Run.load(directory, trust=True).stage
    assert stage.iteration == 2
    assert strict((directory / "summary.json").read_text())["steps"] == stage.steps
    assert [row["steps"] for row in (training.run.metrics[-1], lines(directory)[-1])] == [stage.steps] * 2


@pytest.mark.parametrize("error", [KeyboardInterrupt(), UserError("no")], ids=repr)
def test_a_run_says_how_it_ended_and_whether_an_iteration_was_whole(
    error: BaseException, training: pg.Training
) -> None:
    directory = training.run.directory
    assert directory is not None
    how = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
    for change, partway in ((0.0, False), (1.0, True)):
        with pytest.raises(type(error)) as raised, recording.Recorder(training):  # noqa: PT012
            next(training)
            with torch.no_grad():
                next(iter(training.run.policy.parameters())).add_(change)
            raise error
        stage = pg.Run.load(directory, trust=True).stage
        assert (stage.run, stage.partway) == (how, partway)
        assert stage.iteration == training.iteration
        assert raised.value.__notes__[-1] == f"the {stage.policy()} is kept in {directory}"


def test_what_is_not_finite_is_not_saved_and_what_was_says_that_the_run_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        fill(policy, 1)
        yield {"steps": 1.0, "episodes": 0.0, "reward_per_step": 0.0}
        fill(policy, math.nan)
        yield {"steps": 2.0, "episodes": 0.0, "reward_per_step": 0.0}

    replaced(monkeypatch, loop)
    monkeypatch.setattr(recording, "SAVE_SECONDS", 0.0)
    with pytest.raises(UserError) as raised:
        pg.train("ppo", "CartPole-v1", out=tmp_path / "run", preset="none", **SMALL)
    assert raised.value.__notes__ == [f"the policy of iteration 1 (1 steps) is kept in {tmp_path}/run"]
    assert pg.Run.load(tmp_path / "run").stage == Stage(1, 1, "failed")


def test_a_run_that_cannot_begin_leaves_nothing(language: dict[str, Any], tmp_path: Path) -> None:
    reward = language["reward"][0].replace("sevens", "broken")
    with pytest.raises(UserError):
        pg.train("grpo", **language | {"reward": (reward,)}, out=tmp_path / "a" / "run")
    assert list(tmp_path.iterdir()) == []


# A disk that is full


@pytest.fixture
def limit_files() -> Iterator[Callable[[bool], None]]:
    """(full) -> whether no file can grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda full: resource.setrlimit(resource.RLIMIT_FSIZE, (1 if full else before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def filled(full: set[int], limit_files: Callable[[bool], None]) -> Callable[[nn.Module, nn.Module], Iterator[Any]]:
    """A loop of four iterations, some of which meet a full disk."""

    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        for k in range(1, 5):
            fill(policy, k)
            limit_files(k in full)
            yield {"steps": 25.0 * k, "episodes": 0.0, "reward_per_step": 0.0}

    return loop


def test_what_safetensors_says_of_a_full_disk_is_understood(
    limit_files: Callable[[bool], None], tmp_path: Path
) -> None:
    limit_files(True)
    with pytest.raises(SafetensorError) as raised:
        save_file({"x": torch.zeros(1000)}, tmp_path / "x.safetensors")
    limit_files(False)
    assert not hasattr(raised.value, "errno")
    assert recording.number_of(raised.value) == errno.EFBIG in recording.FULL
    outer = UserError("it cannot be written")
    outer.__cause__ = raised.value
    assert recording.number_of(outer) == errno.EFBIG
    assert recording.number_of(OSError(errno.ENOSPC, "full")) == errno.ENOSPC
    assert recording.number_of(ValueError("28")) is None


def test_a_full_disk_stops_the_run_which_goes_on_bit_for_bit_once_there_is_room(
    limit_files: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = {**SMALL, "steps": 300, "checkpoint_every": 1, "preset": "none"}
    whole = pg.train("ppo", "CartPole-v1", out=tmp_path / "whole", **values)
    write = recording.write_checkpoint
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def writes(directory: Path, state: dict[str, Any], keep: int) -> None:
        limit_files(state["iteration"] == 3)
        write(directory, state, keep)

    monkeypatch.setattr(recording, "write_checkpoint", writes)
    with pytest.raises(recording.FullDiskError) as raised:
        pg.train("ppo", "CartPole-v1", out=tmp_path / "broken", **values)
    limit_files(False)
    assert re.search(r"cannot be written \(File too large\) in iteration 3: make room, and resume", str(raised.value))
    assert len(str(raised.value)) <= 200
    (kept,) = raised.value.__notes__
    assert re.search(
        r"the policy of iteration 2 \(\d+ steps\) is kept there, the rest is lost; to go on from iter", kept
    )
    assert not list((tmp_path / "broken").rglob("*.new"))
    monkeypatch.setattr(recording, "write_checkpoint", write)
    resumed = pg.resume(tmp_path / "broken", progress=False)
    assert untimed(lines(tmp_path / "broken")) == untimed(lines(tmp_path / "whole"))
    assert torch.equal(parameters(resumed), parameters(whole))
    events = EventAccumulator(str(tmp_path / "broken" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("episodes/episodes")) == len(lines(tmp_path / "whole"))


def test_what_has_no_room_in_its_place_is_saved_elsewhere(
    training: pg.Training, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").touch()  # nothing can be written below a file
    with (
        pytest.warns(UserWarning, match="cannot be written"),
        pytest.raises(UserError, match=r"iteration 3 .*is saved in ") as raised,
    ):
        recording.complete(training, progress=False)
    (place,) = (tmp_path / "temporary").iterdir()
    assert str(raised.value).endswith(f" is saved in {place}")
    assert len(str(raised.value).replace(str(tmp_path / "temporary"), "/tmp")) <= 200
    found = pg.Run.load(place, trust=True)
    assert torch.equal(parameters(found), parameters(training.run))
    assert (found.stage.iteration, found.stage.run) == (3, "ended")


def test_an_environment_that_fails_to_close_leaves_a_finished_run(tmp_path: Path) -> None:
    class Stuck(Known):
        def close(self) -> None:
            raise RuntimeError("the window\nis stuck")

    with pytest.warns(UserWarning, match="raised RuntimeError in close: the window is stuck"):
        run = pg.train("ppo", limited(Stuck, 8), out=tmp_path / "run", **SMALL)
    assert run.stage.run == "ended"


def test_runs_that_are_killed_hold_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/kills.py, with three kills."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    kills = importlib.import_module("kills")
    directories = [tmp_path / str(number) for number in range(3)]
    for number, directory in enumerate(directories):
        assert kills.killed("control", signal.SIGKILL, directory, 0.2 * number) == -signal.SIGKILL
    assert kills.judged("control", directories) == []


def test_torch_is_as_it_was_after_a_language_run_and_after_one_that_fails(language: dict[str, Any]) -> None:
    def state() -> tuple[Any, ...]:
        return tuple(torch.get_rng_state().tolist()), torch.get_default_dtype(), torch.get_num_threads()

    torch.manual_seed(5)
    policy = OwnPolicy()
    before = state()
    made = pg.Training("grpo", **(language | {"iterations": 1}))
    assert state() == before
    for _ in made:
        assert state() == before
    made.run.evaluate()
    assert state() == before
    with pytest.raises(UserError, match="own tables"):
        pg.Training("ppo", "exact:chain", policy=policy, threads=2)
    assert state() == before
