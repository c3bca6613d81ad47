"""Comparing runs: what several seeds of each method reach, with the uncertainty of few runs.

Runs are grouped by what they are: method, task and options, all but the seed. Directories of runs are data.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from policygrad.errors import UserError, ending, listed, one_line, shortened
from policygrad.files import as_path, damaged, read_json, write_bytes, write_json
from policygrad.train.hub import directory_of
from policygrad.train.methods import CLONE
from policygrad.train.reports import Row, read_rows
from policygrad.train.run import Run
from policygrad.train.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Estimate,
    estimate,
    has_interval,
    interquartile_mean,
    interval,
    mean,
    median,
    performance_profile,
    probability_of_improvement,
)
from policygrad.train.worlds import PROMPTS

DEEPEST = 4  # levels of directories above a run
POINTS = 101  # of a learning curve and of a profile
FEW = 5  # runs; of fewer the bootstrap's intervals are too narrow
SAME = 0.95  # of the longest run: what ended there or later ended at the same time
ALL = "all tasks"
NARROW = 110  # characters of a terminal

# Options that change how a run is computed, watched or kept, and not what it is.
APART = {
    *("seed", "device", "threads", "compile", "profile", "step_time_limit", "restart_envs"),
    *("checkpoint_every", "checkpoints", "keep_best", "gradient_noise", "log"),
    *("evaluate_every", "evaluation_episodes", "evaluation_completions"),
    *("micro_batch", "micro_batch_tokens", "shared_prompts", "gradient_checkpointing"),
}

Kind = Literal["training", "evaluation"]


class Metric(NamedTuple):
    """A score of a world: its column in metrics.jsonl, and what it is."""

    name: str
    said: str


METRICS: dict[tuple[str, Kind], Metric] = {
    ("control", "training"): Metric("return", "mean return of the last 100 training episodes"),
    ("control", "evaluation"): Metric("evaluation", "mean return of evaluation episodes"),
    ("language", "training"): Metric("reward", "mean reward of a training rollout"),
    ("language", "evaluation"): Metric("held_out", "mean reward on held-out prompts"),
    ("exact", "training"): Metric("return", "mean return of a training rollout"),
    ("exact", "evaluation"): Metric("expected_return", "J of the policy, in closed form"),
    ("demonstrations", "training"): Metric("objective", "log-probability of demonstrations"),
    ("demonstrations", "evaluation"): Metric("log_probability", "log-probability of held-out demonstrations"),
}
AXES = {"control": ("steps", "environment steps"), "language": ("completions", "completions"),
        "exact": ("steps", "environment steps")}  # fmt: skip


def kind_of_score(method: str, world: str) -> str:
    """What the scores of a method on a world are of: the first part of a key of METRICS."""
    return "demonstrations" if method == CLONE.name else world


@dataclass(frozen=True)
class Recorded:
    """What a run leaves: its configuration, its rows of metrics, and how it ended (None: it did not)."""

    place: str
    method: str
    world: str
    task: str
    options: dict[str, Any]
    rows: list[Row]
    ended: str | None

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.options["seed"]

    def series(self, name: str, until: float) -> tuple[np.ndarray, np.ndarray]:
        """The places on the axis of the rows up to `until` that have a metric, and their values."""
        axis = AXES[self.world][0]
        known = [(row[axis], row[name]) for row in self.rows if name in row and row[axis] <= until]
        return np.array([x for x, _ in known]), np.array([y for _, y in known])


@dataclass(frozen=True)
class Score:
    """The final score of a run, and where on the axis it was measured."""

    run: str
    seed: int
    score: float
    at: float
    ended: str | None


@dataclass
class Curve:
    """A statistic at each x, with its interval if there are several runs."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass
class Group:
    """The runs of one method with one set of options on a task: the statistics of their final scores."""

    task: str
    label: str
    runs: list[Score]
    iqm: Estimate
    mean: Estimate
    median: Estimate
    profile: Curve
    curve: Curve | None = None  # the interquartile mean over training; none of several tasks

    @property
    def count(self) -> int:
        """The number of runs."""
        return len(self.runs)


@dataclass(frozen=True)
class Improvement:
    """The probability that a run of `better` has a higher score than one of `worse`; a tie is a half."""

    task: str
    better: str
    worse: str
    probability: Estimate


@dataclass
class Comparison:
    """What `compare` found. `show` prints it, and `save` writes it with its picture.

    groups: by task, the best first. With several tasks, those of the task "all tasks" have the scores of the methods
    that ran on each of them, normalized to 0 for the lowest of a task's scores here and 1 for the highest.
    """

    score: Kind
    metrics: dict[str, str]  # what the score of each task is
    axes: dict[str, str]  # what the learning curves of each task run over
    groups: list[Group]
    improvements: list[Improvement]
    notes: list[str] = field(default_factory=list)

    @property
    def tasks(self) -> list[str]:
        """The tasks, and "all tasks" if there are several."""
        return list(dict.fromkeys(group.task for group in self.groups))

    def of(self, task: str) -> list[Group]:
        """The groups of a task."""
        return [group for group in self.groups if group.task == task]

    def tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Each table: its title, the names of its columns, and its rows."""
        share = f"{CONFIDENCE:.0%}"
        for task in self.tasks:
            groups = self.of(task)
            digits = _digits(max(abs(run.score) for group in groups for run in group.runs))
            yield (
                f"{task}: {self.metrics[task]} [{share} interval]",
                ["method", "runs", "IQM", "mean", "median"],
                [
                    [x.label, str(x.count), *(_with_interval(y, digits) for y in (x.iqm, x.mean, x.median))]
                    for x in groups
                ],
            )
            rows = [
                [f"{x.better} over {x.worse}", _with_interval(x.probability, 2)]
                for x in self.improvements
                if x.task == task
            ]
            if rows:
                yield (
                    f"{task}: a run of one method is better than a run of another [{share} interval]",
                    ["methods", "probability"],
                    rows,
                )

    def show(self, console: Console | None = None) -> None:
        """Print the tables and the notes."""
        if console is None:
            console = Console()
            with console.capture() as said:  # rich would end the program if nobody reads it any more
                self.show(console)
            print(said.get(), end="", flush=True)
            return
        for title, columns, rows in self.tables():
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for i, name in enumerate(columns):
                table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
            for first, *others in rows:
                narrow = console.width < NARROW  # an interval then stands below its value
                table.add_row(Text(first), *(Text(x.replace(" [", "\n[") if narrow else x) for x in others))
            console.print(Text(title, style="bold"), table, sep="\n", end="")
        for note in self.notes:
            console.print(Text(f"note: {note}"), soft_wrap=True)

    def markdown(self) -> str:
        """The tables and the notes as Markdown."""
        lines = [f"The score is of {self.score}. {METHOD}", ""]
        for title, columns, rows in self.tables():
            lines += [f"**{title}**", "", _row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
            lines += [*map(_row, rows), ""]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)]).rstrip() + "\n"

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"confidence": CONFIDENCE, "resamples": RESAMPLES, **asdict(self)}

    def save(self, directory: Path | str) -> None:
        """Write comparison.png, comparison.json and comparison.md. Raises UserError."""
        from policygrad.train.comparison_picture import draw_comparison

        directory = as_path(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_bytes(directory / "comparison.png", draw_comparison(self))
            write_bytes(directory / "comparison.md", self.markdown().encode())
            write_json(directory / "comparison.json", self.summary())
        except OSError as error:
            said = f"{ending(str(directory), 80)} cannot be written ({error.strerror})"
            raise UserError(f"{said}: choose another directory") from error


METHOD = (
    "IQM is the interquartile mean. Intervals are of the percentile bootstrap, stratified by task "
    "(Agarwal et al. 2021, arXiv 2108.13264)."
)


def compare(
    *runs: Any,
    out: Path | str | None = None,
    score: Literal["auto", "training", "evaluation"] = "auto",
    at: int | float | None = None,
    unfinished: bool = False,
) -> Comparison:
    """Compare runs that differ in more than their seed, or sum up the seeds of one method.

    runs: directories of runs, directories that hold runs, and runs themselves (`Run`). out: a directory for a picture,
    a table and the numbers. score: training takes the last `return` (language: `reward`) of training; evaluation takes
    the last evaluation, which is J on `exact:` worlds; auto takes evaluation if every run has it, training if none has.
    at: compare the scores at this many steps (language: completions) instead of the last. unfinished: count runs that
    have not finished too, by the last score that they have.

    Statistics are those of Agarwal et al. 2021 (policygrad.train.statistics). What was left out is in `notes`.
    Raises UserError if there is no run, one that is damaged, or runs with different kinds of score.
    """
    if at is not None and not (at > 0 and math.isfinite(at)):
        raise UserError(f"at is {shortened(at, 20)}: it must be more than 0 steps")
    if score not in ("auto", "training", "evaluation"):
        raise UserError(f"score is {shortened(score)}: it must be one of auto, training, evaluation")
    notes: list[str] = []
    found = [recorded(x) for x in runs_in(runs, notes)]
    kept = list(_counted(found, unfinished, notes))
    if not kept:
        raise UserError(
            f"none of the {len(found)} runs has finished: give unfinished to compare them by the scores they have"
            if found
            else "there is no run to compare: give directories that train wrote"
        )
    kind, names = _kind(kept, score), _short_names({run.task for run in kept})
    kept = [replace(run, task=names[run.task]) for run in kept]
    comparison = _compared(kept, kind, math.inf if at is None else float(at), notes)
    if out is not None:
        comparison.save(out)
    return comparison


# Runs, from directories


def runs_in(places: Sequence[Any], notes: list[str]) -> Iterator[Run | Path]:
    """The runs given, and those in the directories given, each once."""
    seen = set()
    for place in places:
        if isinstance(place, Run):
            yield place
            continue
        path = directory_of(place)
        if not path.is_dir():
            said = "is a file" if path.exists() else "does not exist"
            raise UserError(f"{ending(str(path), 100)} {said}: give the directory of a run, or one that holds runs")
        below = [path] if _is_run(path) else list(_runs_below(path, DEEPEST, notes))
        if not below:
            raise UserError(f"{ending(str(path), 100)} holds no run: give a directory that train wrote")
        for one in below:
            if one.resolve() not in seen:
                seen.add(one.resolve())
                yield one


def _is_run(path: Path) -> bool:
    return (path / "config.json").is_file() and (path / "metrics.jsonl").is_file()


def _runs_below(directory: Path, levels: int, notes: list[str]) -> Iterator[Path]:
    """The runs in a directory, in order. Links are not followed."""
    try:
        paths = sorted(path for path in directory.iterdir() if path.is_dir())
    except OSError as error:
        raise damaged(directory, error.strerror or one_line(error), "cannot be read") from error
    for path in paths:
        if path.is_symlink():
            notes.append(f"{ending(str(path), 100)} is a link, which is not followed: to compare it, give it by name")
        elif _is_run(path):
            yield path
        elif levels > 1:
            yield from _runs_below(path, levels - 1, notes)


def recorded(run: Run | Path) -> Recorded:
    """What a run leaves behind. Raises UserError for a directory that is damaged."""
    if isinstance(run, Run):
        config = json.loads(json.dumps(run.configuration()))
        place = str(run.directory or f"the run of seed {config['options']['seed']}")
        task = _task(config["task"] or run.world.name, config["options"])
        rows = [row for row in run.metrics if "seconds" in row]  # as in its file: none of before training
        return Recorded(place, run.method, run.world.kind, task, config["options"], rows, run.ended)
    path = run / "config.json"
    config = read_json(path)
    try:
        method, world, task, options = (config[name] for name in ("method", "world", "task", "options"))
        if world not in AXES or not isinstance(method, str) or not isinstance(task, str | None):
            raise ValueError(f"there is no {shortened(method, 30)} on {shortened(world, 30)}")
        if type(options["seed"]) is not int:
            raise ValueError(f"the seed is {shortened(options['seed'], 30)}")
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error
    if task is None and world == "control":  # an environment that was handed in
        description = read_json(run / "policy.json")
        task = one_line(description.get("environment") if isinstance(description, dict) else None, 60)
    rows = _rows(run / "metrics.jsonl", AXES[world][0])
    return Recorded(str(run), method, world, _task(task, options), options, rows, outcome_of(run))


def score_of(run: Recorded) -> float | None:
    """The score of one run as `compare` takes it: its last evaluation in training, else the last of training."""
    kinds: tuple[Kind, ...] = ("evaluation", "training")
    for kind in kinds:
        scores = run.series(METRICS[kind_of_score(run.method, run.world), kind].name, math.inf)[1]
        if len(scores):
            return float(scores[-1])
    return None


def outcome_of(run: Path) -> str | None:
    """How the run in a directory ended; None if it has not. Raises UserError if its summary.json is damaged."""
    path = run / "summary.json"
    if not path.exists():
        return None
    summary = read_json(path)
    ended = summary.get("ended") if isinstance(summary, dict) else 0
    if not isinstance(ended, str | None):
        raise damaged(path, f"it says that the run ended {shortened(ended, 30)}")
    return ended


def _task(name: str | None, options: dict[str, Any]) -> str:
    """The task of a run: its name, or those of its data sets."""
    return name or "+".join(map(str, options.get("dataset") or ["rows"]))


def _short_names(tasks: Iterable[str]) -> dict[str, str]:
    """The name of each task for a reader: files without their directories, if that tells them apart."""

    def short(task: str) -> str:
        local = task.endswith(PROMPTS) or ".py:" in task
        return "+".join(Path(x).name for x in task.split("+")) if local else task

    names = {task: short(task) for task in tasks}
    return {task: task if list(names.values()).count(x) > 1 else x for task, x in names.items()}


def _rows(path: Path, axis: str) -> list[Row]:
    """The rows of a metrics.jsonl, along an axis on which they go on."""
    rows = read_rows(path)
    for i, (before, row) in enumerate(pairwise([{axis: 0.0}, *rows]), start=1):
        if not row.get(axis, -1) >= before[axis]:
            raise damaged(path, f"{axis} falls, or is missing, in line {i}")
    return rows


# What is compared


def _counted(runs: Sequence[Recorded], unfinished: bool, notes: list[str]) -> Iterator[Recorded]:
    """The runs that count: finished ones, or all, and each seed of a group once. The notes name the others."""
    seen: dict[tuple[Any, ...], str] = {}
    for run in runs:
        name = ending(run.place, 60)
        if run.ended != "finished":
            how = "has not finished" if run.ended is None else f"ended early ({one_line(run.ended, 60)})"
            notes.append(f"{name} {how}: " + ("it counts by its last score" if unfinished else "it is left out"))
            if not unfinished:
                continue
        key = (*_identity(run), run.seed)
        if key in seen:
            notes.append(f"{name} is the same run as {ending(seen[key], 60)}, of seed {run.seed}: it counts once")
            continue
        seen[key] = run.place
        yield run


def _identity(run: Recorded) -> tuple[str, str, str]:
    """What a run is, all but its seed."""
    options = {name: x for name, x in run.options.items() if name not in APART}
    return run.task, run.method, json.dumps(options, sort_keys=True)


def _kind(runs: Sequence[Recorded], asked: str) -> Kind:
    """The kind of score that all runs have. Raises UserError for runs of which some have an evaluation."""

    def has(run: Recorded, kind: Kind) -> bool:
        metric = METRICS.get((kind_of_score(run.method, run.world), kind))
        return metric is not None and any(metric.name in row for row in run.rows)

    with_, without = ([x for x in runs if has(x, "evaluation") is y] for y in (True, False))
    if asked != "training" and with_ and without:
        names = ending(with_[0].place, 40), ending(without[0].place, 40)
        if asked == "auto":
            raise UserError(
                f"{names[0]} was evaluated in training, {names[1]} was not: compare them apart, or by score training"
            )
    if asked == "evaluation" and without:
        raise UserError(
            f"{ending(without[0].place, 60)} was not evaluated in training: leave it out, or compare by score training"
        )
    return "evaluation" if asked == "evaluation" or (asked == "auto" and with_) else "training"


def _compared(runs: Sequence[Recorded], kind: Kind, until: float, notes: list[str]) -> Comparison:
    """The statistics of each group on each task, and of all tasks together."""
    groups: list[Group] = []
    improvements: list[Improvement] = []
    tasks = sorted({run.task for run in runs})
    metrics, axes = {}, {}
    for task in tasks:
        members = [run for run in runs if run.task == task]
        worlds = {run.world for run in members}
        if len(worlds) > 1:
            raise UserError(f"{ending(task, 60)} is the name of tasks of {' and '.join(worlds)}: compare them apart")
        metric = METRICS[kind_of_score(members[0].method, members[0].world), kind]
        metrics[task], axes[task] = metric.said, AXES[members[0].world][1]
        scored = {label: list(_scored(x, metric.name, until, notes)) for label, x in _labeled(members).items()}
        scored = {label: found for label, found in scored.items() if found}
        _note_ends(task, scored, axes[task], until, notes)
        every = [score.score for found in scored.values() for _, score in found]
        thresholds = _thresholds(every)
        made = []
        for label, found in scored.items():
            scores = [np.array([score.score for _, score in found])]
            curve = _curve([run.series(metric.name, until) for run, _ in found])
            made.append(_group(task, label, [score for _, score in found], scores, thresholds, curve))
        made.sort(key=lambda group: -group.iqm.value)
        groups += made
        improvements += _improvements(task, [(x.label, [np.array([run.score for run in x.runs])]) for x in made])
    if not groups:
        when, how = ("yet", "train longer") if math.isinf(until) else (f"by {until:,.0f}", "give a larger at")
        raise UserError(
            f"no run has a {METRICS[kind_of_score(runs[0].method, runs[0].world), kind].name} {when} to compare: {how}"
        )
    if len({group.task for group in groups}) > 1:
        metrics[ALL] = "scores between the lowest (0) and the highest (1) of each task here"
        axes[ALL] = ""
        together, pairs = _over_tasks(groups, notes)
        groups, improvements = groups + together, improvements + pairs
    few = sorted({group.count for group in groups if 1 < group.count < FEW and group.task != ALL})
    alone = list(dict.fromkeys(group.label for group in groups if group.count == 1))
    if alone:
        notes.append(f"{listed(alone, 100)}: one run, so there is no interval; train more seeds")
    if few:
        said = " or ".join(map(str, few))
        notes.append(
            f"intervals of {said} runs are too narrow: so few resamples differ; {FEW} seeds or more are better"
        )
    return Comparison(kind, metrics, axes, groups, improvements, notes)


def _labeled(runs: Sequence[Recorded]) -> dict[str, list[Recorded]]:
    """The runs of a task in groups by what they are: the method, and the options that differ within it."""
    alike: dict[tuple[str, str, str], list[Recorded]] = {}
    for run in runs:
        alike.setdefault(_identity(run), []).append(run)
    labeled: dict[str, list[Recorded]] = {}
    for members in alike.values():
        first = members[0]
        others = [x[0].options for x in alike.values() if x[0].method == first.method]
        differing = [
            name
            for name in dict.fromkeys(name for options in others for name in options)
            if name not in APART and len({json.dumps(options.get(name), sort_keys=True) for options in others}) > 1
        ]
        said = ", ".join(f"{name}={_plain(first.options.get(name))}" for name in differing)
        label = base = first.method + (f" ({said})" if said else "")
        while label in labeled:
            label = f"{base} #{len(labeled) + 1}"
        labeled[label] = sorted(members, key=lambda run: run.seed)
    return labeled


def _plain(value: Any) -> str:
    return shortened(value, 40) if not isinstance(value, str) else ending(one_line(value, 200), 40)


def _scored(runs: Iterable[Recorded], name: str, until: float, notes: list[str]) -> Iterator[tuple[Recorded, Score]]:
    """The last score of each run up to a place on the axis."""
    for run in runs:
        x, y = run.series(name, until)
        if not len(y):
            when = "yet, as no episode has ended" if math.isinf(until) else f"by {until:,.0f}"
            notes.append(f"{ending(run.place, 60)} has no {name} {when}: it is left out")
            continue
        yield run, Score(run.place, run.seed, float(y[-1]), float(x[-1]), run.ended)


def _note_ends(
    task: str, scored: dict[str, list[tuple[Recorded, Score]]], axis: str, until: float, notes: list[str]
) -> None:
    """One line for each group with runs that ended earlier than the longest run of their task."""
    longest = max([score.at for found in scored.values() for _, score in found], default=0.0)
    longest = max(longest, until) if math.isfinite(until) else longest
    for label, found in scored.items():
        early = [score for _, score in found if score.at < SAME * longest]
        if early:
            ends = sorted({round(score.at) for score in early})
            at = f"{ends[0]:,}" + (f" to {ends[-1]:,}" if len(ends) > 1 else "")
            who = f"seed{'s' if len(early) > 1 else ''} {listed((str(x.seed) for x in early), 30)}"
            notes.append(
                f"{one_line(label, 50)} on {ending(task, 30)}, {who}: ended at {at} {axis} of {longest:,.0f}; "
                "at compares the scores at another number"
            )


# Statistics of groups


def _group(
    task: str, label: str, runs: list[Score], scores: list[np.ndarray], thresholds: np.ndarray, curve: Curve | None
) -> Group:
    iqm, average, middle = (estimate(statistic, scores) for statistic in (interquartile_mean, mean, median))
    profile = performance_profile(thresholds)
    shares = Curve(thresholds.tolist(), profile(scores).tolist())
    if has_interval(scores):
        shares.low, shares.high = (x.tolist() for x in interval(profile, scores))
    return Group(task, label, runs, iqm, average, middle, shares, curve)


def _improvements(task: str, groups: Sequence[tuple[str, list[np.ndarray]]]) -> list[Improvement]:
    """Of each pair, in the order of the groups."""
    return [
        Improvement(task, name, other, estimate(probability_of_improvement, [*x, *y]))
        for i, (name, x) in enumerate(groups)
        for other, y in groups[i + 1 :]
    ]


def _curve(series: Sequence[tuple[np.ndarray, np.ndarray]]) -> Curve:
    """The interquartile mean of runs over the part of the axis that all of them have, interpolated linearly."""
    start, end = max(x[0] for x, _ in series), min(x[-1] for x, _ in series)
    grid = np.linspace(start, end, POINTS) if end > start else np.array([end])
    runs = np.stack([np.interp(grid, x, y) for x, y in series], axis=-1)
    curve = Curve(grid.tolist(), interquartile_mean([runs]).tolist())
    if has_interval([runs]):
        curve.low, curve.high = (x.tolist() for x in interval(interquartile_mean, [runs]))
    return curve


def _over_tasks(groups: list[Group], notes: list[str]) -> tuple[list[Group], list[Improvement]]:
    """The groups that ran on every task, with the scores of each task between its lowest and its highest."""
    tasks = list(dict.fromkeys(group.task for group in groups))
    labels = list(dict.fromkeys(group.label for group in groups))
    by_name = {(group.task, group.label): group for group in groups}
    everywhere = [x for x in labels if all((task, x) in by_name for task in tasks)]
    if left := [x for x in labels if x not in everywhere]:
        notes.append(f"{listed(left, 100)}: not on every task, so not in the scores of all tasks")
    made = []
    strata = {}
    for label in everywhere:
        scores, runs = [], []
        for task in tasks:
            every = [run.score for group in groups if group.task == task for run in group.runs]
            low, high = min(every), max(every)
            ran = by_name[task, label].runs
            normalized = [(run.score - low) / (high - low) if high > low else 0.5 for run in ran]
            scores.append(np.array(normalized))
            runs += [Score(x.run, x.seed, y, x.at, x.ended) for x, y in zip(ran, normalized, strict=True)]
        strata[label] = scores
        made.append(_group(ALL, label, runs, scores, np.linspace(0, 1, POINTS), None))
    made.sort(key=lambda group: -group.iqm.value)
    return made, _improvements(ALL, [(group.label, strata[group.label]) for group in made])


def _thresholds(scores: Sequence[float]) -> np.ndarray:
    """From a little below the lowest score to a little above the highest."""
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    room = 0.03 * (high - low) or 0.03 * abs(high) or 1.0
    return np.linspace(low - room, high + room, POINTS)


# Numbers as text


def _digits(largest: float) -> int:
    return 1 if largest >= 10 else 3


def _with_interval(x: Estimate, digits: int) -> str:
    value = f"{x.value:,.{digits}f}"
    return value if x.low is None or x.high is None else f"{value} [{x.low:,.{digits}f}, {x.high:,.{digits}f}]"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
