"""Reports of a run: metrics.jsonl, TensorBoard events, the progress line, and the learning curve."""

import errno
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from policygrad.errors import Note, ending, one_line
from policygrad.files import LARGEST_JSON, check_file, damaged, parse_json

Row = dict[str, float]

FIRST, EVERY = 3.0, 30.0  # seconds to the first plain line of progress, and between the others

# The TensorBoard folder of each metric; other metrics go to `update`.
GROUPS = {
    "return": "episodes",
    "length": "episodes",
    "evaluation": "episodes",
    "episodes": "episodes",
    "success": "episodes",
    "reward_per_step": "episodes",
    "steps_per_second": "time",
    "seconds": "time",
    "value_loss": "critic",
    "explained_variance": "critic",
    "critic_gradient_norm": "critic",
    "reward": "completions",
    "reward_std": "completions",
    "group_std": "completions",
    "flat_groups": "completions",
    "cut_fraction": "completions",
    "completions": "completions",
    "held_out": "completions",
    "sampling_tokens_per_second": "time",
    "learning_tokens_per_second": "time",
    "sampling_seconds": "time",
}


class Log:
    """metrics.jsonl and TensorBoard events in a run directory. A full disk stops neither: it delays them."""

    def __init__(self, directory: Path, at: Mapping[str, Any] | None = None) -> None:
        """at: the `position` of a log to go on with. What was written after it is removed."""
        at = at or {"metrics": 0, "events": None}
        self.metrics, events = Tail(directory / "metrics.jsonl", at["metrics"]), directory / "tensorboard"
        if at["events"] is None:
            for path in events.glob("events.out.tfevents.*"):
                if re.fullmatch(r"\d+\.\d+", path.name.removeprefix("events.out.tfevents.")):  # of this class
                    path.unlink()
            self.events = Tail(events / f"events.out.tfevents.{int(time.time())}.{os.getpid()}")
            self.events.write(_record(Event(wall_time=time.time(), file_version="brain.Event:2")))
        else:
            name, written = at["events"]
            self.events = Tail(events / Path(name).name, written)
        self.close()

    def position(self) -> dict[str, Any]:
        """Where the log is, all of it on the disk. Raises OSError if there is no room for it."""
        self.close()
        if self.metrics.waiting or self.events.waiting:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with self.metrics.path.open("rb") as file:
            os.fsync(file.fileno())
        return {"metrics": self.metrics.written, "events": (self.events.path.name, self.events.written)}

    def write(self, row: Row) -> None:
        """Write one line of metrics.jsonl and one point of each TensorBoard curve."""
        self.metrics.write((json.dumps(row) + "\n").encode())
        points = [
            Summary.Value(tag=name if "/" in name else f"{GROUPS.get(name, 'update')}/{name}", simple_value=value)
            for name, value in row.items()
            if name != "steps"
        ]
        step = int(row["steps"])
        self.events.write(_record(Event(wall_time=time.time(), step=step, summary=Summary(value=points))))

    def close(self) -> None:
        """Write what is left."""
        self.metrics.write(b"")
        self.events.write(b"")


class Tail:
    """A file that grows by whole records. What a full disk refuses is written later, and said once."""

    def __init__(self, path: Path, written: int = 0) -> None:
        self.path, self.waiting, self.written, self.warned = path, b"", written, False

    def write(self, record: bytes) -> None:
        """Append a record, and those before it that are not written yet."""
        self.waiting += record
        try:
            self.path.parent.mkdir(exist_ok=True)
            with open(os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666), "wb", buffering=0) as file:
                # Without the part of a record that a full disk took, and without a hole if others made it shorter.
                self.written = min(self.written, os.fstat(file.fileno()).st_size)
                file.truncate(self.written)
                file.seek(self.written)
                if (file.write(self.waiting) or 0) < len(self.waiting):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.written, self.waiting = self.written + len(self.waiting), b""
        except OSError as error:
            if not self.warned:
                name = ending(str(self.path), 60)
                warnings.warn(f"{name} cannot be written ({error.strerror}): training goes on", Note, stacklevel=3)
            self.warned = True


def read_rows(path: Path, size: int | None = None) -> list[Row]:
    """The rows of a metrics.jsonl, or those in its first `size` bytes.

    A last line without its end is one that is being written, and is left out. Raises UserError if the file is missing,
    shorter than `size`, or holds something else than rows of numbers.
    """
    check_file(path, path.parent, LARGEST_JSON)
    try:
        with path.open("rb") as file:
            held = file.read() if size is None else file.read(size)
        if size is not None and len(held) < size:
            raise ValueError(f"it has {len(held):,} bytes of {size:,}")
        rows = [parse_json(line) for line in held.split(b"\n")[:-1]]
        for i, row in enumerate(rows, start=1):
            if not isinstance(row, dict) or any(type(x) not in (int, float) for x in row.values()):
                raise ValueError(f"line {i} is no row of numbers")
    except OSError as error:
        raise damaged(path, one_line(error), "cannot be read") from error
    except ValueError as error:
        raise damaged(path, one_line(error)) from error
    return rows


def _record(event: Event) -> bytes:
    """An event as TensorBoard's files hold it, with its length and checksums."""
    content = io.BytesIO()
    RecordWriter(content).write(event.SerializeToString())
    return content.getvalue()


class PlainLines:
    """Progress as a plain line on standard error now and then: for logs and notebooks, which show no bar."""

    def __init__(self, description: str, total: int, show: bool) -> None:
        self.description, self.total, self.show = description, total, show
        self.start = time.perf_counter()
        self.next = self.start + FIRST

    def update(self, done: int | float, status: str) -> None:
        """Print a line if one is due: how much is done, the newest numbers, and the time left."""
        now = time.perf_counter()
        if not self.show or now < self.next or sys.stderr is None:
            return
        self.next = now + EVERY
        left = (now - self.start) * max(self.total - done, 0) / max(done, 1e-9)
        parts = [f"{self.description}: {_short(done)}/{_short(self.total)}", status, f"{_duration(left)} left"]
        with suppress(OSError, ValueError):  # nobody reads it any more
            print("  ".join(filter(None, parts)), file=sys.stderr, flush=True)


@contextmanager
def progress_bar(description: str, total: int, show: bool = True) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, or plain lines. Yields a function that adds a step with a status."""
    console = _terminal()
    plain = PlainLines(description, total, show and not console.is_terminal)
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed} of {task.total}"),
        TextColumn("[cyan]{task.fields[status]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, disable=not (show and console.is_terminal), transient=True) as progress:
        task = progress.add_task(description, total=total, status="")

        def advance(status: str) -> None:
            progress.update(task, advance=1, status=status)
            plain.update(progress.tasks[0].completed, status)

        yield advance


class ProgressLine:
    """A progress line on standard error, or plain lines: progress, the newest numbers, the time left."""

    def __init__(self, description: str, total: int, show: bool = True) -> None:
        console = _terminal()
        self.plain = PlainLines(description, total, show and not console.is_terminal)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            *([BarColumn(bar_width=24)] if console.width >= 110 else []),  # the numbers take precedence
            TextColumn("{task.fields[count]}"),
            TextColumn("[cyan]{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not (show and console.is_terminal),
            transient=True,
        )
        self.total = total
        self.task = self.progress.add_task(description, total=total, count="", status="")

    def update(self, done: int | float, parts: list[str]) -> None:
        """Show that `done` of the total is complete, and the newest numbers."""
        count = f"{_short(done)}/{_short(self.total)}"
        self.progress.update(self.task, completed=done, count=count, status="  ".join(parts))
        self.plain.update(done, "  ".join(parts))

    def __enter__(self) -> "ProgressLine":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()


def _terminal() -> Console:
    """A console on standard error. FORCE_COLOR does not make it a terminal."""
    return Console(stderr=True, force_terminal=at_terminal())


def at_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def _short(count: int | float) -> str:
    """12.3k, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + letter
    return f"{count:.0f}"


def _duration(seconds: int | float) -> str:
    """12 s, 3 min, 2.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@dataclass(frozen=True)
class Curve:
    """The axes of a learning curve, each a (metric, label). points: dots over the curve, such as evaluations."""

    x: tuple[str, str] = ("steps", "environment steps")
    y: tuple[str, str] = ("return", "mean return of the last 100 episodes")
    points: tuple[str, str] | None = None
    length_of: str = "episode"


# Small panels below the learning curve, for metrics that a run has: (metric, title).
PANELS = (
    ("entropy", "entropy"),
    ("kl_old", "KL(old, new)"),
    ("kl_ref", "KL(policy, reference), by decision"),
    ("flat_groups", "share of flat groups"),
    ("length", "{of} length"),
    ("explained_variance", "explained variance"),
    ("gradient_norm", "gradient norm"),
)
BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#777777"


def draw_curve(rows: list[Row], title: str, path: Path, curve: Curve | None = None) -> None:
    """Draw the learning curve, with small panels for other metrics."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    curve = curve or Curve()
    x, y, points = curve.x, curve.y, curve.points
    figure = Figure(figsize=(10, 4.8), layout="constrained", dpi=150)
    # Only metrics above rounding error: the KL to the old policy is 0 if every rollout has one update.
    panels = [(name, label) for name, label in PANELS if any(abs(row.get(name, 0.0)) > 1e-9 for row in rows)][:5]
    left, right = list(np.asarray(figure.subfigures(1, 2, width_ratios=(2.0, 1.0))))
    main = left.subplots()
    small = right.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0] if panels else []
    curves = [(main, y[0], BLUE, 2.0 if points is None else 1.2)]
    curves += [(axes, name, GREY, 1.0) for axes, (name, _) in zip(small, panels, strict=True)]
    for axes, name, color, width in curves:
        at, values = _series(rows, x[0], name)
        single = "o" if len(at) == 1 else None  # one point draws no line
        axes.plot(
            at,
            values,
            color=color,
            linewidth=width,
            solid_capstyle="round",
            label=y[1],
            marker=single,
            clip_on=not single,
        )
        axes.set_xlim(0, 1.01 * max(row[x[0]] for row in rows))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    main.set_title(title, loc="left", fontsize=12, fontweight="bold")
    main.set_xlabel(x[1])
    main.set_ylabel(y[1])
    if not _series(rows, x[0], y[0])[0]:
        main.text(0.5, 0.5, "no episode has ended yet", transform=main.transAxes, ha="center", color=GREY, fontsize=12)
        main.set_yticks([])
    if points is not None:
        at, values = _series(rows, x[0], points[0])
        main.plot(at, values, "o-", color=ORANGE, linewidth=1.5, markersize=6, label=points[1], clip_on=False, zorder=3)
        main.legend(frameon=False, loc="lower right")
        last = (values or _series(rows, x[0], y[0])[1])[-1:]
    else:
        at, values = _series(rows, x[0], y[0])
        main.plot(at[-1:], values[-1:], "o", color=BLUE, markersize=6, clip_on=False, zorder=3)
        last = values[-1:]
    if last:
        color = BLUE if points is None else ORANGE
        shown = f"{last[0]:,.1f}" if abs(last[0]) >= 10 else f"{last[0]:.3f}"
        main.set_title(shown, loc="right", fontsize=12, fontweight="bold", color=color)
    for axes, (_, label) in zip(small, panels, strict=True):
        axes.set_title(label.format(of=curve.length_of), loc="left", fontsize=9, color="#444444")
        axes.tick_params(labelsize=7)
    figure.savefig(path)


def _series(rows: list[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    """x and y of the rows where the metric y is present and finite."""
    known = [(row[x], row[y]) for row in rows if y in row and math.isfinite(row[y])]
    return [a for a, _ in known], [b for _, b in known]
