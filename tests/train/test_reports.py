"""What a run writes as it goes can be read again, and the line on the terminal is quiet where there is no terminal."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import policygrad as pg
from policygrad.train import reports
from policygrad.train.reports import Curve, ProgressLine, Tail, draw_curve
from policygrad.train.run import Run

PARTS = ["return 12.5", "KL 0.0123", "4,321 steps/s"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    small: dict[str, Any] = {"hidden": (8,), "num_envs": 4, "num_steps": 16, "minibatch_size": 16, "progress": False}
    return pg.train("ppo", "probes:Known-v0", out=tmp_path_factory.mktemp("run") / "it", steps=200, **small)


def path_of(run: Run, name: str) -> Path:
    assert run.directory is not None
    return run.directory / name


def test_metrics_jsonl_is_what_the_run_saw_line_by_line(run: Run) -> None:
    lines = path_of(run, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.metrics
    assert len(lines) >= 4
    assert all(math.isfinite(x) for line in lines for x in json.loads(line).values())


def test_a_file_that_others_cut_or_remove_goes_on_without_a_hole(tmp_path: Path) -> None:
    log = Tail(tmp_path / "metrics.jsonl")
    log.write(b"one\n")
    log.path.unlink()
    log.write(b"two\n")
    log.path.write_bytes(b"tw")
    log.write(b"three\n")
    log.write(b"four\n")
    assert log.path.read_bytes() == b"twthree\nfour\n"


def test_every_metric_is_a_curve_in_tensorboard(run: Run) -> None:
    events = EventAccumulator(str(path_of(run, "tensorboard")))
    events.Reload()
    curves = {tag.split("/")[-1]: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert set(curves) == {name for row in run.metrics for name in row} - {"steps"}
    for name, points in curves.items():
        rows = [row for row in run.metrics if name in row]
        assert [point.step for point in points] == [row["steps"] for row in rows]
        np.testing.assert_allclose([point.value for point in points], [row[name] for row in rows], rtol=1e-6)


def test_the_curve_is_a_picture_with_something_on_it(run: Run) -> None:
    image = imread(path_of(run, "curve.png"))
    assert image.shape[0] > 300
    assert image.shape[1] > 600
    assert image.std() > 0.01


@pytest.mark.parametrize(
    "rows",
    [
        [{"steps": 10.0, "entropy": 1.0}],
        [{"steps": 10.0}],
        [{"steps": 10.0, "return": 1.0}, {"steps": 20.0, "return": 2.0, "kl_old": 0.1}],
        [{"steps": 10.0, "return": math.nan, "kl_old": math.inf}],
    ],
    ids=["no episode has ended", "nothing at all", "columns that come later", "not finite"],
)
def test_a_curve_is_drawn_of_whatever_there_is(rows: list[dict[str, float]], tmp_path: Path) -> None:
    draw_curve(rows, "title", tmp_path / "curve.png")
    assert imread(tmp_path / "curve.png").shape[2] == 4


def test_the_curve_shows_the_run_that_it_is_of(tmp_path: Path) -> None:
    images = []
    for returns in ([0.0, 1.0], [1.0, 0.0]):
        rows = [{"steps": 10.0 * k, "return": x} for k, x in enumerate(returns)]
        draw_curve(rows, "title", tmp_path / "curve.png")
        images.append(imread(tmp_path / "curve.png"))
    assert not np.array_equal(*images)


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, show: bool = True) -> str:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=160, color_system=None)
    monkeypatch.setattr(reports, "Console", lambda **_: console)
    with ProgressLine("ppo Somewhere-v0", 1000, show) as line:
        line.update(500.0, PARTS)
        line.progress.refresh()
    return screen.getvalue()


def test_the_line_shows_steps_return_kl_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    for part in ("ppo Somewhere-v0", "500/1k", "return 12.5", "KL 0.0123", "4,321 steps/s", "-:--"):
        assert part in text or (part == "-:--" and ":" in text), part


def test_the_line_is_quiet_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=False) == ""


def test_the_line_is_quiet_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, terminal=True, show=False) == ""


def test_where_there_is_no_terminal_a_plain_line_comes_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first after 3 s, the next 30 s later. The clock is the test's."""
    now = 100.0
    monkeypatch.setattr(reports.time, "perf_counter", lambda: now)
    with ProgressLine("ppo Somewhere-v0", 1000) as line:
        for second in range(100):
            now = 100.0 + second
            line.update(10.0 * second, PARTS)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"ppo Somewhere-v0: {done}/1k  return 12.5  KL 0.0123  4,321 steps/s  {left} left"
        for done, left in [("30", "97 s"), ("330", "67 s"), ("630", "37 s"), ("930", "7 s")]
    ]
    with ProgressLine("ppo Somewhere-v0", 1000, show=False) as line:
        now += 100.0
        line.update(500.0, PARTS)
    assert capsys.readouterr() == ("", "")


def test_a_bar_of_steps_has_plain_lines_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reports, "FIRST", 0.0)
    with reports.progress_bar("warm-up", 600) as advance:
        for step in range(100):
            advance(f"loss {step}")
    assert re.fullmatch(r"warm-up: 1/600  loss 0  \d+ (s|min|h) left\n", capsys.readouterr().err)


def test_a_notebook_has_plain_lines_and_no_widgets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = type("ZMQInteractiveShell", (), {})()  # by which rich knows a notebook
    monkeypatch.setattr("builtins.get_ipython", lambda: shell, raising=False)
    monkeypatch.setattr(reports, "FIRST", 0.0)
    assert Console().is_jupyter
    with ProgressLine("ppo Somewhere-v0", 1000) as line:
        line.update(500.0, PARTS)
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"ppo Somewhere-v0: 500/1k  return 12.5  KL 0.0123  4,321 steps/s  \S+ s left\n", said.err)


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (9000, "2.5 h")])
def test_durations_are_short(seconds: float, said: str) -> None:
    assert reports._duration(seconds) == said


def test_training_says_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    pg.train("actor_critic", "probes:Known-v0", iterations=2, num_envs=2)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("count", "said"), [(7, "7"), (999, "999"), (12_345, "12.3k"), (100_000, "100k"), (1_000_000, "1M")]
)
def test_counts_are_short(count: float, said: str) -> None:
    assert reports._short(count) == said


def test_everything_on_the_line_has_room_on_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(reports, "Console", lambda **_: console)
    with ProgressLine("trpo HalfCheetah-v5", 1_000_000) as line:
        line.update(812_032.0, ["return 1,234.5", "KL 0.0123", "4,321 steps/s"])
        line.progress.refresh()
    for part in ("trpo HalfCheetah-v5", "812k/1M", "return 1,234.5", "KL 0.0123", "4,321 steps/s"):
        assert part in screen.getvalue()


def test_colors_asked_for_do_not_make_a_pipe_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not reports._terminal().is_terminal


def test_points_are_drawn_over_a_curve_of_what_else_is_asked_for(tmp_path: Path) -> None:
    curve = Curve(x=("completions", "completions"), y=("reward", "reward"), points=("held_out", "held-out"))
    rows = [{"steps": 0.0, "completions": 0.0, "held_out": 0.1}, {"steps": 9.0, "completions": 8.0, "reward": 0.2}]
    images = []
    for last in (0.3, 0.9):
        draw_curve([*rows, rows[1] | {"completions": 16.0, "held_out": last}], "title", tmp_path / "curve.png", curve)
        images.append(imread(tmp_path / "curve.png"))
    assert not np.array_equal(*images)
