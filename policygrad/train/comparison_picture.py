"""The picture of a comparison: a row for each task, with learning curves, final scores, profiles and improvements."""

import io
import textwrap
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from policygrad.train.comparison import ALL, Comparison, Curve, Group
from policygrad.train.reports import BLUE, ORANGE
from policygrad.train.statistics import CONFIDENCE, Estimate

# Told apart by color-blind readers, and in gray by their dashes.
COLORS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#444444", "#b8a000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
MARKERS = "osD^vPX"
INK, QUIET = "#222222", "#777777"
PAIRS = 10  # drawn; the table has all
TASKS = 8  # drawn, and all of them together
SMALL, BODY = 8.0, 9.5
WRAPPED = 28  # characters of a label beside a plot


def draw_comparison(comparison: Comparison) -> bytes:
    """The PNG of a comparison."""
    tasks = [task for task in comparison.tasks if task != ALL][:TASKS]
    tasks += [ALL] if ALL in comparison.tasks else []
    labels = list(dict.fromkeys(group.label for task in tasks for group in comparison.of(task)))
    styles = {label: _style(i) for i, label in enumerate(labels)}
    pairs = any(x.task in tasks for x in comparison.improvements)
    height = max(_height(comparison, task) for task in tasks)
    figure = Figure(figsize=(15.5 if pairs else 12, height * len(tasks) + 0.55), dpi=150, layout="constrained")
    widths = [1.35, 1.1, 1.0, *([1.1] if pairs else [])]
    axes = figure.subplots(len(tasks), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    titles = [f"final score: IQM, {CONFIDENCE:.0%} interval, each run", "share of runs above the score $\\tau$"]
    titles += ["probability of improvement"] if pairs else []
    for one, title in zip(axes[0][1:], titles, strict=True):
        one.set_title(title, loc="left", fontsize=BODY)
    for row, task in zip(axes, tasks, strict=True):
        groups = comparison.of(task)
        _curves(row[0], comparison, groups, styles)
        _scores(row[1], groups, styles)
        _profiles(row[2], groups, styles)
        if pairs:
            _improvements(row[3], comparison, task, styles)
        for one in row:
            one.spines[["top", "right"]].set_visible(False)
            one.tick_params(labelsize=SMALL, colors=INK)
            one.title.set_color(INK)
    handles = [_handle(axes[0][0], label, styles[label]) for label in labels]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5), frameon=False, fontsize=BODY)
    left_out = len([task for task in comparison.tasks if task != ALL]) - TASKS
    if left_out > 0:
        figure.supxlabel(f"{left_out} more tasks are in the table", fontsize=BODY, color=QUIET)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _height(comparison: Comparison, task: str) -> float:
    """Inches for the labels of a task's groups and pairs."""
    groups = comparison.of(task)
    lines = max(len(textwrap.wrap(group.label, WRAPPED)) for group in groups) + 1
    pairs = min(PAIRS, len(groups) * (len(groups) - 1) // 2)
    return max(2.9, 0.9 + max(0.42, 0.17 * lines) * len(groups), 0.9 + 0.37 * pairs)


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)]}


def _marker(label: str, styles: dict[str, Any]) -> str:
    return MARKERS[list(styles).index(label) % len(MARKERS)]


def _handle(axes: Any, label: str, style: dict[str, Any]) -> Any:
    (line,) = axes.plot([], [], linewidth=2.2, label="\n".join(textwrap.wrap(label, 40)), **style)
    return line


def _band(axes: Any, curve: Curve, style: dict[str, Any], step: Any = None) -> None:
    """A line, with its interval as a band."""
    single = {"marker": "o", "markersize": 4} if len(curve.x) == 1 else {}
    axes.plot(curve.x, curve.y, linewidth=1.8, **style, **single, drawstyle=f"steps-{step}" if step else "default")
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, step=step, color=style["color"], alpha=0.16, linewidth=0)


def _bar(axes: Any, i: int, found: Estimate, style: dict[str, Any], marker: str) -> None:
    """An estimate as a marker, with its interval as a bar."""
    if found.low is not None and found.high is not None:
        axes.plot([found.low, found.high], [i, i], color=style["color"], linewidth=7, alpha=0.3, solid_capstyle="butt")
    axes.plot([found.value], [i], marker, color=style["color"], markersize=6.5, markeredgecolor="white", clip_on=False)


def _curves(axes: Any, comparison: Comparison, groups: list[Group], styles: dict[str, Any]) -> None:
    """Learning curves of one task; of all tasks there are none, and the place says what is beside it."""
    task = groups[0].task
    if task == ALL:
        axes.axis("off")
        axes.set_title(ALL, loc="left", fontsize=11, fontweight="bold")
        said = textwrap.fill(comparison.metrics[ALL], 40)
        axes.text(0, 0.93, said, transform=axes.transAxes, va="top", color=QUIET, fontsize=BODY)
        return
    for group in groups:
        if group.curve is not None:
            _band(axes, group.curve, styles[group.label])
    axes.set_title(task, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(comparison.axes[task], fontsize=SMALL)
    axes.set_ylabel("\n".join(textwrap.wrap(comparison.metrics[task], 30)), fontsize=SMALL)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25, linewidth=0.6)


def _scores(axes: Any, groups: list[Group], styles: dict[str, Any]) -> None:
    """Interquartile mean with its interval, and behind it every run."""
    for i, group in enumerate(groups):
        color = styles[group.label]["color"]
        axes.plot([run.score for run in group.runs], [i] * group.count, "|", color=color, alpha=0.6, markersize=11)
        _bar(axes, i, group.iqm, styles[group.label], _marker(group.label, styles))
    counts = [f"{group.count} run" + ("s" if group.count > 1 else "") for group in groups]
    names = [f"{textwrap.fill(group.label, WRAPPED)}\n({x})" for group, x in zip(groups, counts, strict=True)]
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("score" + (", normalized" if groups[0].task == ALL else ""), fontsize=SMALL)


def _profiles(axes: Any, groups: list[Group], styles: dict[str, Any]) -> None:
    for group in groups:
        _band(axes, group.profile, styles[group.label], step="post")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("score $\\tau$" + (", normalized" if groups[0].task == ALL else ""), fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.25, linewidth=0.6)


def _shortened(label: str) -> str:
    return textwrap.shorten(label, 36, placeholder=" ...")


def _improvements(axes: Any, comparison: Comparison, task: str, styles: dict[str, Any]) -> None:
    """The probability of improvement of each pair, beside the line of a coin."""
    pairs = [x for x in comparison.improvements if x.task == task][:PAIRS]
    for i, pair in enumerate(pairs):
        _bar(axes, i, pair.probability, styles[pair.better], _marker(pair.better, styles))
    names = [f"{_shortened(x.better)}\nover {_shortened(x.worse)}" for x in pairs]
    axes.set_yticks(range(len(pairs)), names)
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.axvline(0.5, color=QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("probability", fontsize=SMALL)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
