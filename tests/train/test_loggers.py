"""Loggers, with the real tools: what they have is what metrics.jsonl has, and nothing of theirs reaches the run."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import parameters, untimed

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import loggers
from policygrad.train.loggers import LOGGERS, Copy, Logger, flat, installed, nested
from policygrad.train.options import Options
from policygrad.train.recording import Recorder

SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 8, "hidden": (4,), "minibatch_size": 8, "epochs": 1, "iterations": 3, "compile": "off",
    "preset": "none", "checkpoint_every": 1, "progress": False,
}  # fmt: skip
TOOLS = [pytest.param(x, marks=pytest.mark.skipif(not installed(x), reason=f"{x} is not installed")) for x in LOGGERS]
each_tool = pytest.mark.parametrize("tool", TOOLS)
needs_wandb = pytest.mark.skipif(not installed("wandb"), reason="wandb is not installed")


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path_factory.getbasetemp() / "trackio"))  # which its reader reads once
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_GROUP", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def train(out: Path, **options: Any) -> Any:
    return pg.train("ppo", "CartPole-v1", out=out, **SMALL | options)


def rows_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# What the tools have, by their own readers: rows by step, configuration, summary, state, name, group


def of_wandb(directory: Path, tmp_path: Path) -> dict[str, Any]:
    """From the files of an offline run's parts, by wandb's own protobufs. The files are framed as LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Any] = {"rows": [], "configuration": {}, "summary": {}, "ids": []}
    id = json.loads((directory / "wandb.json").read_text())["id"]
    for path in sorted(tmp_path.glob(f"wandb/offline-run-*/run-{id}.wandb")):
        held, at, whole = path.read_bytes(), 7, b""
        while at + 7 <= len(held):
            room = 2**15 - at % 2**15
            if room < 7:
                at += room
                continue
            _, size, kind = struct.unpack("<IHB", held[at : at + 7])
            if kind == 0:
                break
            whole, at = whole + held[at + 7 : at + 7 + size], at + 7 + size
            if kind not in (1, 4):  # first and middle parts
                continue
            record, whole = Record.FromString(whole), b""
            which = record.WhichOneof("record_type")
            if which == "run" and record.run.run_id:
                found |= {"name": record.run.display_name, "group": record.run.run_group or None}
                found["ids"].append(record.run.run_id)
                found["project"] = record.run.project
                found["configuration"] |= {x.key: json.loads(x.value_json) for x in record.run.config.update}
            elif which == "history":
                items = {x.key or x.nested_key[0]: json.loads(x.value_json) for x in record.history.item}
                row = {x: y for x, y in items.items() if not x.startswith("_")}
                found["rows"].append((items.get("_step", record.history.step.num), row))
            elif which == "summary":
                found["summary"] |= {x.key: json.loads(x.value_json) for x in record.summary.update}
            elif which == "exit":
                found["state"] = {0: "finished", 255: "interrupted", 1: "failed"}[record.exit.exit_code]
    return found


def of_mlflow(directory: Path, tmp_path: Path) -> dict[str, Any]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("policygrad")
    run = client.get_run(json.loads((directory / "mlflow.json").read_text())["id"])
    assert run.info.experiment_id == experiment.experiment_id
    by_step: dict[int, dict[str, float]] = {}
    count = 0
    for name in run.data.metrics:
        for one in client.get_metric_history(run.info.run_id, name):
            if not name.startswith("summary/"):
                by_step.setdefault(one.step, {})[name] = one.value
                count += 1
    assert count == sum(map(len, by_step.values())), "a metric stands twice"
    every = {**run.data.metrics, **run.data.tags}
    return {
        "rows": sorted(by_step.items()),
        "configuration": run.data.params,
        "summary": {x.removeprefix("summary/"): y for x, y in every.items() if x.startswith("summary/")},
        "state": {"FINISHED": "finished", "KILLED": "interrupted", "FAILED": "failed"}[run.info.status],
        "name": run.info.run_name,
        "group": run.data.tags.get("group"),
        "ids": [x.info.run_id for x in client.search_runs([experiment.experiment_id])],
    }  # fmt: skip


def of_trackio(directory: Path, tmp_path: Path) -> dict[str, Any]:
    from trackio.sqlite_storage import SQLiteStorage

    name = json.loads((directory / "trackio.json").read_text())["id"]
    rows, summary = [], {}
    for entry in SQLiteStorage.get_logs("policygrad", name):
        values = {x: y for x, y in entry.items() if x not in ("timestamp", "step")}
        if "summary/ended" in values:
            summary = {x.removeprefix("summary/"): y for x, y in values.items()}
        else:
            rows.append((entry["step"], values))
    configuration = SQLiteStorage.get_run_config("policygrad", name)
    ended = summary.get("ended")
    return {
        "rows": rows,
        "configuration": configuration,
        "summary": summary,
        "state": ended if ended in ("finished", "interrupted") else "failed",
        "name": name[:-7],
        "group": configuration["_Group"],
        "ids": [x for x in SQLiteStorage.get_runs("policygrad") if x == name],
    }


READ: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "wandb": of_wandb, "mlflow": of_mlflow, "trackio": of_trackio,
}  # fmt: skip


def check_rows(held: list[tuple[int, dict[str, float]]], rows: list[dict[str, float]]) -> None:
    assert [step for step, _ in held] == [row["steps"] for row in rows]
    assert [row for _, row in held] == rows


@each_tool
@pytest.mark.parametrize(
    ("method", "task", "options"),
    [("ppo", "CartPole-v1", SMALL), ("grpo", "exact:chain", {"iterations": 2, "progress": False})],
)
def test_a_tool_has_every_number_and_the_configuration(
    tool: str, method: str, task: str, options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "some" / "run"
    run = pg.train(method, task, out=out, log=tool, **options)
    found = READ[tool](out, tmp_path)
    check_rows(found["rows"], rows_of(out))
    written = json.loads((out / "config.json").read_text())
    configuration = flat(nested(written)) if tool == "mlflow" else nested(written)
    shown = str if tool == "mlflow" else lambda x: x
    for name, x in configuration.items():
        assert found["configuration"][name] == shown(x), name
    assert (found["state"], found["name"], found["group"]) == ("finished", "some/run", None)
    assert len(set(found["ids"])) == 1
    assert float(found["summary"]["steps"]) == run.summary()["steps"]
    assert found["summary"]["ended"] == "finished"


@needs_wandb
def test_the_run_is_the_same_with_and_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, logged = (train(tmp_path / str(len(log)), log=log) for log in ((), ("wandb",)))
    assert torch.equal(parameters(plain), parameters(logged))
    assert untimed(plain.metrics) == untimed(logged.metrics)
    assert capfd.readouterr() == ("", ""), "the tool is not heard"


@needs_wandb
def test_one_line_says_where_the_run_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", log="wandb", progress=True)
    said = [x for x in capfd.readouterr().err.splitlines() if "wandb" in x]
    assert len(said) == 1
    assert said[0].startswith(f"wandb: in {tmp_path}/wandb/offline-run-")


class Stops(pg.Training):
    """Is interrupted, or fails, in its third iteration."""

    error: BaseException = KeyboardInterrupt()

    def __next__(self) -> Any:
        if self.iteration == 2:
            raise self.error
        return super().__next__()


@each_tool
def test_a_run_that_is_resumed_goes_on_in_the_same_run(tool: str, tmp_path: Path) -> None:
    out = tmp_path / "some" / "run"
    training = Stops("ppo", "CartPole-v1", out=out, log=tool, **SMALL)
    with suppress(KeyboardInterrupt), training, Recorder(training) as record:
        for row in training:
            record(row)
    before = READ[tool](out, tmp_path)
    assert before["state"] == "interrupted"
    check_rows(before["rows"], rows_of(out))
    assert len(before["rows"]) == 2
    newest = max((out / "checkpoints").glob("*.json"))  # as if it had been killed before the last checkpoint
    newest.unlink()
    newest.with_suffix(".safetensors").unlink()
    pg.resume(out, iterations=1, progress=False)
    after = READ[tool](out, tmp_path)
    assert set(after["ids"]) == set(before["ids"])
    assert len(set(after["ids"])) == 1
    assert after["state"] == "finished"
    rows = rows_of(out)
    assert len(rows) == 4
    assert untimed([row for _, row in after["rows"]]) == untimed(rows), "each once, the second of the first process"
    assert after["rows"][:2] == before["rows"]


@each_tool
def test_a_run_that_fails_is_shown_as_failed(tool: str, tmp_path: Path) -> None:
    out = tmp_path / "some" / "run"
    training = Stops("ppo", "CartPole-v1", out=out, log=tool, **SMALL)
    training.error = UserError("a number is not finite")
    with suppress(UserError), training, Recorder(training) as record:
        for row in training:
            record(row)
    found = READ[tool](out, tmp_path)
    assert (found["state"], found["summary"]["ended"]) == ("failed", "a number is not finite")


@needs_wandb
def test_a_run_that_is_killed_has_its_rows_and_a_state(tmp_path: Path) -> None:
    """Nothing is left running, either, which would hold the lock."""
    out = tmp_path / "run"
    options = SMALL | {"iterations": 10**6}
    code = f"import policygrad; policygrad.train('ppo', 'CartPole-v1', out={str(out)!r}, log='wandb', **{options!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not (out / "wandb.json").exists() or json.loads((out / "wandb.json").read_text())["steps"] < 0:
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    released(out / ".wandb.lock")
    found = of_wandb(out, tmp_path)
    assert found["state"] == "failed"
    check_rows(found["rows"], rows_of(out)[: len(found["rows"])])
    assert len(found["rows"]) >= 1


def released(lock: Path) -> None:
    """Wait until the process that holds a lock has ended."""
    import fcntl

    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


@needs_wandb
def test_the_seeds_of_a_study_are_a_group(tmp_path: Path) -> None:
    out = tmp_path / "task" / "study"
    pg.study("ppo", "CartPole-v1", seeds=[3], out=out, processes=1, log="wandb", **SMALL)
    found = of_wandb(out / "seed-3", tmp_path)
    assert (found["group"], found["name"], found["configuration"]["seed"]) == ("task/study", "study/seed-3", 3)


@needs_wandb
def test_the_tools_own_variables_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, x in (("PROJECT", "mine"), ("NAME", "my run"), ("RUN_GROUP", "my group")):
        monkeypatch.setenv(f"WANDB_{name}", x)
    train(tmp_path / "run", log="wandb")
    found = of_wandb(tmp_path / "run", tmp_path)
    assert (found["project"], found["name"], found["group"]) == ("mine", "my run", "my group")


# What goes wrong does not reach the run


def of_tool(said: pytest.WarningsRecorder) -> list[str]:
    return [str(x.message) for x in said if str(x.message).startswith("wandb")]


@needs_wandb
def test_a_tool_that_cannot_begin_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here for want of a key."""
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="wandb fails .*training goes on, and metrics.jsonl has every row") as said:
        run = train(tmp_path / "run", log="wandb")
    (line,) = of_tool(said)
    assert len(line) <= 200
    assert run.ended == "finished"
    assert len(rows_of(tmp_path / "run")) == 3


def test_a_tool_that_never_answers_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name that hangs, and leaves a process behind. Neither is there afterwards."""
    (tmp_path / "wandb.py").write_text(
        "import pathlib, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(1000)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(loggers, "PATIENCE", 2.0)
    monkeypatch.setattr(loggers, "installed", lambda name: True)
    with pytest.warns(UserWarning, match="wandb does not have all rows in time: training goes on") as said:
        run = train(tmp_path / "run", log="wandb")
    assert len(of_tool(said)) == 1
    assert run.ended == "finished"
    left = Path("/proc", (tmp_path / "pid").read_text(), "exe")
    for _ in range(100):  # until it is gone, or waits for its parent
        if not left.exists():
            return
        time.sleep(0.05)
    raise AssertionError("a process of the tool is left")


def test_a_tool_that_dies_is_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match="wandb ended early: training goes on") as said:
        run = train(tmp_path / "run", log="wandb")
    assert len(of_tool(said)) == 1
    assert run.ended == "finished"


class Flaky(Logger):
    """Fails while it is down, before anything is taken."""

    def __init__(self) -> None:
        self.down, self.rows = True, list[dict[str, float]]()

    def open(self, about: Any, known: dict[str, Any]) -> str:
        self._check()
        return "here"

    def write(self, rows: list[dict[str, float]]) -> None:
        self._check()
        self.rows += rows

    def close(self, ended: str, summary: dict[str, Any]) -> None:
        self._check()

    def _check(self) -> None:
        if self.down:
            raise ConnectionError("no network")


@pytest.mark.parametrize("chunk", [1000, 2**20])
def test_what_was_refused_comes_later_and_a_half_line_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(loggers, "RETRY", 0.0)
    monkeypatch.setattr(loggers, "CHUNK", chunk)
    logger, said = Flaky(), list[dict[str, Any]]()
    copy = Copy(logger, {"logger": "wandb", "directory": str(tmp_path)}, lambda **x: said.append(x))
    path = tmp_path / "metrics.jsonl"
    rows = [{"steps": float(i), "x": i / 3} for i in range(100)]
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines[:50]))
    copy.go()
    copy.go()
    assert logger.rows == []
    assert said == [{"problem": "fails (ConnectionError: no network)"}]
    logger.down = False
    copy.go()
    assert logger.rows == rows[:50]
    path.write_text("".join(lines[:60]) + lines[60][:9])
    copy.go()
    assert logger.rows == rows[:60]
    logger.down = True
    path.write_text("".join(lines))
    copy.go()
    logger.down = False
    copy.end("finished", {})
    assert logger.rows == rows
    again_and_again = [{"problem": "fails (ConnectionError: no network)"}, {"well": True}]
    assert said[1:] == [{"place": "here"}, {"well": True}, *again_and_again]
    again = Copy(Flaky(), copy.about, lambda **x: None)
    again.logger.down = False  # type: ignore[attr-defined]
    again.go()
    assert again.logger.rows == []  # type: ignore[attr-defined]


def test_a_missing_tool_is_named_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory of that name, where wandb keeps its runs, is no package."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(x for x in sys.path if "site-packages" not in x)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError, match=r"log is trackio, which is not installed: pip install policygrad\[trackio\]"):
        train(tmp_path / "run", log="trackio")
    assert not (tmp_path / "run").exists()


def test_a_logger_needs_a_directory_and_stands_once() -> None:
    with pytest.raises(UserError, match="log shows what a run writes: give out"):
        pg.train("ppo", "CartPole-v1", log="wandb", progress=False)
    with pytest.raises(UserError, match="names that stand there once"):
        pg.train("ppo", "CartPole-v1", log=["wandb", "wandb"], progress=False)
    with pytest.raises(UserError, match="one of wandb, mlflow, trackio"):
        pg.train("ppo", "CartPole-v1", log="tensorboard", progress=False)


def test_the_option_and_the_table_name_the_same_tools() -> None:
    assert repr(Options.__annotations__["log"]) == f"tuple[typing.Literal[{', '.join(map(repr, LOGGERS))}], ...]"


def test_an_interrupt_of_the_terminal_is_not_the_loggers(tmp_path: Path) -> None:
    """They are in a session of their own: the run is saved first, and told then."""
    process = loggers._Process("wandb", {"directory": str(tmp_path), "name": "x", "group": None, "configuration": {}})
    try:
        assert os.getsid(process.process.pid) != os.getsid(0)
    finally:
        os.kill(process.process.pid, signal.SIGKILL)
        process.kill()
