"""What a run writes as it goes: metrics.jsonl, TensorBoard events, a line on the terminal, and the learning curve."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

Row = dict[str, float]

# TensorBoard's folders, by what a practitioner looks for; the rest is `update`.
GROUPS = {
    "return": "episodes",
    "length": "episodes",
    "episodes": "episodes",
    "steps_per_second": "time",
    "seconds": "time",
    "value_loss": "critic",
    "explained_variance": "critic",
    "critic_gradient_norm": "critic",
}


class Log:
    """metrics.jsonl and TensorBoard events in a run directory; a context manager."""

    def __init__(self, directory: Path) -> None:
        self.file = (directory / "metrics.jsonl").open("w")
        self.tensorboard = SummaryWriter(str(directory / "tensorboard"))

    def write(self, row: Row) -> None:
        """One line, and one point of each curve."""
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in row.items():
            if name != "steps":
                self.tensorboard.add_scalar(f"{GROUPS.get(name, 'update')}/{name}", value, int(row["steps"]))

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.file.close()
        self.tensorboard.close()


class ProgressLine:
    """One line on standard error, where that is a terminal: steps, return, KL, steps per second, time left."""

    def __init__(self, description: str, steps: int, show: bool = True) -> None:
        console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} steps"),
            TextColumn("[cyan]{task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not (show and console.is_terminal),
            transient=True,
        )
        self.task = self.progress.add_task(description, total=steps, status="")

    def update(self, row: Row) -> None:
        """Show the newest numbers."""
        parts = [f"return {row['return']:,.1f}"] if "return" in row else []
        parts += [f"KL {row['kl']:.4f}"] if "kl" in row else []
        parts += [f"{row['steps_per_second']:,.0f} steps/s"]
        self.progress.update(self.task, completed=row["steps"], status="  ".join(parts))

    def __enter__(self) -> "ProgressLine":
        self.progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.progress.stop()


# The panels beside the learning curve, where a run has them: (metric, title).
PANELS = (
    ("entropy", "entropy"),
    ("kl", "KL(old, new)"),
    ("explained_variance", "explained variance"),
    ("gradient_norm", "gradient norm"),
)


def draw_curve(rows: list[Row], title: str, path: Path) -> None:
    """The learning curve as a picture: the mean return of the last 100 episodes, and four small panels beside it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(10, 4.8), layout="constrained", dpi=150)
    panels = [(name, label) for name, label in PANELS if any(name in row for row in rows)]
    left, right = list(np.asarray(figure.subfigures(1, 2, width_ratios=(2.0, 1.0))))
    main = left.subplots()
    small = right.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0] if panels else []
    curves = [(main, "return", "#1f5fa8", 2.0)] + [
        (axes, name, "#777777", 1.0) for axes, (name, _) in zip(small, panels, strict=True)
    ]
    for axes, name, colour, width in curves:
        points = [(row["steps"], row[name]) for row in rows if name in row and math.isfinite(row[name])]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, linewidth=width, solid_capstyle="round")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.margins(x=0.01)
    main.set_title(title, loc="left", fontsize=12, fontweight="bold")
    main.set_xlabel("environment steps")
    main.set_ylabel("mean return of the last 100 episodes")
    last = [row["return"] for row in rows if "return" in row]
    if last:
        main.plot(rows[-1]["steps"], last[-1], "o", color="#1f5fa8", markersize=6, clip_on=False, zorder=3)
        main.set_title(f"{last[-1]:,.1f}", loc="right", fontsize=12, fontweight="bold", color="#1f5fa8")
    for axes, (_, label) in zip(small, panels, strict=True):
        axes.set_title(label, loc="left", fontsize=9, color="#444444")
        axes.tick_params(labelsize=7)
    figure.savefig(path)
