"""policygrad tune: a search for the options of a run, which Optuna proposes from the results of those before.

A study is a directory: study.db, a run for each trial (trial-0, trial-1, ...), and preset.toml with the best options.
Trials run one after the other, so that what is proposed depends on the seed alone, and not on when it was stopped.
"""

import json
import shlex
import signal
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

from rich import box
from rich.console import Console
from rich.table import Table

from policygrad.errors import Kept, NonFiniteError, UserError, ending, one_line, shortened
from policygrad.files import check_file, damaged, write_json
from policygrad.train import presets
from policygrad.train.comparison import APART, METRICS, kind_of_score, recorded, score_of
from policygrad.train.directories import STUDY
from policygrad.train.keywords import Keywords
from policygrad.train.methods import method_named
from policygrad.train.names import outside
from policygrad.train.options import OptionError, options_of, validate, with_rate, with_values
from policygrad.train.recording import complete
from policygrad.train.reports import ProgressLine, Row
from policygrad.train.resuming import rows_apart
from policygrad.train.run import json_number
from policygrad.train.search import searched, settled
from policygrad.train.stopping import Stopped
from policygrad.train.studies import Job, begun, directory_of, make_room, request_of, taken
from policygrad.train.training import Training
from policygrad.train.worlds import kind_of

DATABASE = "study.db"
PRESET = "preset.toml"
MOST = 10_000  # trials
POINTS = 20  # of a learning curve, at which trials are compared
PATIENCE = 5  # the first point at which a trial may be stopped
OWN = {*APART, "steps", "iterations", "stop_at_return", "trust", "trust_remote_code"}  # of a run, and of no preset
SHOWN = 5  # trials in the table


@dataclass(frozen=True)
class Trial:
    """A trial: the values of the options that are tuned, what they came to, and the run's directory."""

    number: int
    seed: int
    options: dict[str, Any]
    score: float | None  # None: it was stopped early
    ended: str  # finished, or why not
    run: Path

    def line(self) -> str:
        """The trial in words."""
        return self.ended if self.score is None else f"score {_number(self.score)}"


@dataclass
class Tuning:
    """What a study has found: its trials, and the best of them. `preset` is what train takes."""

    directory: Path
    method: str
    task: Any
    maximized: str  # what the score is
    trials: list[Trial] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)  # options that are not tuned, and not in the preset

    @property
    def finished(self) -> list[Trial]:
        """The trials with a score, the best one first."""
        scored = [(-x.score, x) for x in self.trials if x.score is not None]
        return [x for _, x in sorted(scored, key=lambda pair: (pair[0], pair[1].number))]

    @property
    def best(self) -> Trial:
        """The trial with the highest score; of equals, the first. Raises UserError if there is none yet."""
        if not self.finished:
            raise UserError(f"no trial has finished: {self.trials[-1].ended if self.trials else 'there is none'}")
        return self.finished[0]

    @property
    def options(self) -> dict[str, Any]:
        """The best values of the options that are tuned."""
        return self.best.options

    @property
    def value(self) -> float:
        """The best score."""
        assert self.best.score is not None
        return self.best.score

    @property
    def preset(self) -> Path:
        """The file of the best options, all that differ from the method's own."""
        return self.directory / PRESET

    def command(self) -> str:
        """The command that trains with the best options."""
        task = "" if self.task is None else f" {shlex.quote(str(self.task))}"
        flags = "".join(_flag(name, x) for name, x in self.given.items())
        return f"policygrad train {self.method}{task} --preset {shlex.quote(str(self.preset))}{flags}"

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        trials = [
            {**vars(x), "run": str(x.run), "options": {name: json_number(y) for name, y in x.options.items()}}
            for x in self.trials
        ]
        best = {"best": self.best.number, "score": self.value} if self.finished else {"best": None, "score": None}
        return {
            "study": str(self.directory), "maximized": self.maximized, **best, "preset": str(self.preset),
            "trials": trials,
        }  # fmt: skip

    def show(self) -> None:
        """Print the best trials side by side."""
        console, best = Console(), self.finished[:SHOWN]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold")
        for trial in best:
            table.add_column(f"trial {trial.number}", justify="right")
        table.add_row("score", *(_number(x.score or 0.0) for x in best))
        for name in dict.fromkeys(name for x in best for name in x.options):
            table.add_row(name, *(_said(x.options.get(name)) for x in best))
        with console.capture() as said:  # rich would end the program if nobody reads it any more
            console.print(table, end="")
        print(said.get(), end="", flush=True)


def tune(
    method: str,
    task: Any = None,
    *,
    trials: int = 20,
    out: Path | str | None = None,
    preset: str | Path | None = None,
    policy: Any = None,
    critic: Any = None,
    engine: Any = None,
    progress: bool = True,
    **keywords: Unpack[Keywords],
) -> Tuning:
    """Search for the options that give the highest score, in `trials` runs, one after the other.

    The score is that of `compare`: the last evaluation in training (control with evaluate_every, held-out prompts, J of
    an exact world), else the last return or reward of training. Options that are given are fixed; of the others, those
    of the table in policygrad.train.search that the method reads are tuned. Trial 0 is the run without tuning. Trial k
    has the seed seed + k, and is the run of `train(..., **trial.options, seed=trial.seed)`, bit for bit.

    Optuna's TPE proposes (Bergstra et al. 2011), and a trial whose learning curve is below the median of the others is
    stopped early. The same study in the same directory goes on to `trials` in all; `out` is by default
    runs/TASK/METHOD-tune. A trial whose numbers turn NaN or infinite counts as stopped early. Other errors end the
    study, and the same trial is run again with the next call. Raises UserError.
    """
    if find_spec("optuna") is None:
        raise UserError("optuna must be installed to tune: pip install policygrad[tune]")
    if type(trials) is not int or not 1 <= trials <= MOST:
        raise UserError(f"trials is {shortened(trials, 30)}: it must be a whole number between 1 and {MOST:,}")
    own = {x: y for x, y in (("policy", policy), ("critic", critic), ("engine", engine)) if y is not None}
    task = str(task) if isinstance(task, Path) else task
    search = Search(method_named(method).name, task, {**keywords, **own}, preset)
    request = request_of(search.method, task, {**search.values, "seed": search.seed}) | search.described()
    directory = directory_of(out, request, "tune")
    with taken(directory, STUDY, DATABASE):
        write_json(directory / STUDY, request)
        with _optuna(directory) as study:
            return _run(search, study, directory, trials, progress)


class Search:
    """What is tuned: the options of the run, the ranges of those that are not given, and what they make of a draw."""

    def __init__(self, method: str, task: Any, values: dict[str, Any], preset: Any) -> None:
        self.method, self.task, self.values = method, task, {x: y for x, y in values.items() if x != "seed"}
        plain = {
            x: y for x, y in values.items() if x != "policy" and (x not in ("critic", "engine") or isinstance(y, str))
        }
        named, rows = rows_apart(task, plain)
        kind = kind_of(named, plain | ({"dataset": "rows"} if rows else {}))
        self.preset, self.settings = presets.choose(preset, method, named, plain)
        defaults = with_values(options_of(method, kind)(), self.settings, f"preset {self.preset}: ")
        options = with_values(defaults, plain)
        with presets.blamed(self.preset, self.settings, plain):
            validate(options, defaults)
        self.options = with_rate(options)
        self.seed = self.options.seed
        self.ranges = searched(self.options, values, own_network="policy" in values)
        if not self.ranges:
            raise UserError(f"every option of {method} that can be tuned is given: leave one out")
        held_out = kind == "language" and (
            task == "arithmetic" or self.options.held_out or "evaluation_dataset" in values
        )
        judged = kind == "exact" or held_out or self.options.evaluate_every
        of = kind_of_score(self.options.method, kind)
        self.maximized = METRICS[of, "evaluation" if judged else "training"]
        self.watched = METRICS[of, "evaluation" if self.options.evaluate_every else "training"].name

    def described(self) -> dict[str, Any]:
        """What is tuned, beside what is given, as JSON."""
        ranges = {name: str(x) for name, x in self.ranges.items()}
        settings = {name: json_number(x) for name, x in self.settings.items()}
        return json.loads(json.dumps({"preset": settings, "tuned": ranges}))

    def first(self) -> dict[str, Any]:
        """What is drawn for trial 0: the options as they are without tuning."""
        return {x.label(name): x.drawn(getattr(self.options, name)) for name, x in self.ranges.items()}

    def drawn(self, number: int, found: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the tuned options in a trial, from what Optuna drew."""
        if number == 0:
            return {name: getattr(self.options, name) for name in self.ranges}
        return settled({name: x.value(found[x.label(name)]) for name, x in self.ranges.items()}, self.options)

    def seed_of(self, number: int) -> int:
        """The seed of a trial."""
        return (self.seed + number) % 2**63

    def job(self, number: int, found: Mapping[str, Any], out: Path) -> Job:
        """The run of a trial, as `begun` takes it."""
        own = {"seed": self.seed_of(number), "out": str(out), "preset": self.preset or "none"}
        return self.method, self.task, {**self.values, **self.drawn(number, found), **own}

    def parts(self, drawn: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The options of a trial that a preset holds, and the given ones that it does not."""
        options = with_values(self.options, drawn)
        defaults = options_of(self.method, options.world)()
        apart = {*OWN, *outside(options.world, None, options, training=True)}
        differing = {f.name: getattr(options, f.name) for f in fields(options)}
        differing = {x: y for x, y in differing.items() if y != getattr(defaults, x) or x in self.settings}
        held = {x: y for x, y in differing.items() if x not in apart and y is not None}
        return held, {x: y for x, y in differing.items() if x not in held and x in self.values}


class Pruned(UserError):
    """A trial that is stopped early, because its learning curve is low."""


def _run(search: Search, study: Any, directory: Path, trials: int, progress: bool) -> Tuning:
    """Train until there are so many trials. Raises UserError if there is none with a score in the end."""
    found = Tuning(directory, search.method, search.task, search.maximized.said)
    found.given = search.parts({})[1]
    _take(found, search, study)
    task = search.task if isinstance(search.task, str | None) else getattr(search.task, "__name__", "")
    label = f"tune {search.method} {one_line(task or '', 40)}, trials"
    with ProgressLine(label, trials, progress) as line:

        def say(text: str) -> None:
            if progress:
                line.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        if found.trials:
            say(f"finished before: {len(found.trials)} trials{_best(found)}")
        elif progress:
            say(f"tuned: {', '.join(f'{name} {x}' for name, x in search.ranges.items())}")
        try:
            while len(found.trials) < trials:
                trial = _next(study, search)

                def status(share: float, parts: list[str], number: int = trial.number) -> None:
                    line.update(number + 0.999 * share, [f"trial {number}:", *parts])

                _train(study, trial, search, directory / f"trial-{trial.number}", status)
                _take(found, search, study)
                last = found.trials[-1]
                say(f"trial {last.number}: {last.line()}{_best(found)}")
        except KeyboardInterrupt as error:
            stop = Stopped(getattr(error, "number", signal.SIGINT))
            place = ending(str(directory), 60)
            stop.add_note(Kept(f"{len(found.trials)} of {trials} trials are in {place}; the same command goes on"))
            raise stop from error
    _ = found.best  # raises
    return found


def _train(study: Any, trial: Any, search: Search, out: Path, status: Any) -> None:
    """Train the run of a trial to its end, or to where it is stopped early, and tell the study."""
    from optuna.trial import TrialState

    job = search.job(trial.number, trial.params, out)
    reported = {x for old in study.get_trials(False) if old.number == trial.number for x in old.intermediate_values}

    class Watched(Training):
        """Tells the study its learning curve, and stops early if the study says so."""

        score: float | None = None

        def __next__(self) -> Row:
            known = [*self.run.metrics, self.last]  # of a run that goes on, too
            row = super().__next__()
            name = search.watched
            self.score = next((x[name] for x in (row, *reversed(known)) if name in x), None)
            share = min(1.0, self._share(row["steps"], self.iteration))
            status(share, self.run.world.status(row)[:1])
            if self.score is None or self.done:
                return row
            for point in range(1, int(share * POINTS) + 1):
                if point not in reported:
                    trial.report(self.score, point)
                    reported.add(point)
            if trial.should_prune():
                raise Pruned(f"stopped early at {share:.0%}, score {_number(self.score)}")
            return row

    try:
        make_room(job)
        with begun(Watched, job) as training:
            complete(training, progress=False, signals=True)
            score = score_of(recorded(training.run))
    except (Pruned, NonFiniteError, OptionError) as error:
        if isinstance(error, OptionError) and trial.number == 0:
            raise
        trial.set_user_attr("ended", one_line(error, 200))
        study.tell(trial, state=TrialState.PRUNED)
        return
    if score is None:
        trial.set_user_attr("ended", "no episode has ended: give more steps")
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, score)


def _next(study: Any, search: Search) -> Any:
    """The trial that was stopped, or a new one. What is drawn for it follows from the seed and the trials before."""
    from optuna.samplers import TPESampler
    from optuna.trial import Trial as Asked
    from optuna.trial import TrialState

    known = study.get_trials(deepcopy=False)
    if not known:
        study.enqueue_trial(search.first())
    stopped = [x for x in known if x.state == TrialState.RUNNING]
    number = stopped[0].number if stopped else len(known)
    study.sampler = TPESampler(seed=search.seed_of(number) % 2**32)
    trial = Asked(study, stopped[0]._trial_id) if stopped else study.ask()
    for name, x in search.ranges.items():
        x.draw(trial, name)
    return trial


def _take(found: Tuning, search: Search, study: Any) -> None:
    """Take over what the study knows of its trials that have ended, and write the preset of the best one."""
    found.trials = []
    for x in study.get_trials(deepcopy=False):
        if x.state.is_finished():
            score = x.value if x.state.name == "COMPLETE" else None
            ended = "finished" if score is not None else str(x.user_attrs.get("ended", "failed"))
            drawn, run = search.drawn(x.number, x.params), found.directory / f"trial-{x.number}"
            found.trials.append(Trial(x.number, search.seed_of(x.number), drawn, score, ended, run))
    if found.finished:
        held, _ = search.parts(found.options)
        said = f"trial {found.best.number} of {len(found.trials)}, {found.maximized} {_number(found.value)}"
        presets.write(found.preset, search.method, held, f"{search.method} on {_task(search.task)}: {said}")


@contextmanager
def _optuna(directory: Path) -> Iterator[Any]:
    """The study in a directory's database. Optuna says nothing in the meantime. Raises UserError if it is damaged."""
    import optuna

    path, verbosity = directory / DATABASE, optuna.logging.get_verbosity()
    if path.exists() or path.is_symlink():
        check_file(path, directory)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        try:
            storage = optuna.storages.RDBStorage("sqlite://", engine_kwargs={"creator": lambda: sqlite3.connect(path)})
            pruner = optuna.pruners.MedianPruner(n_warmup_steps=PATIENCE)
            study = optuna.create_study(
                storage=storage, study_name="policygrad", direction="maximize", load_if_exists=True, pruner=pruner
            )
        except Exception as error:  # of SQLite, SQLAlchemy, Alembic or Optuna
            raise damaged(path, one_line(error, 80)) from error
        with warnings.catch_warnings(action="ignore", category=optuna.exceptions.ExperimentalWarning):
            yield study
    finally:
        optuna.logging.set_verbosity(verbosity)


# In words


def _best(found: Tuning) -> str:
    return f" (best: {_number(found.value)}, trial {found.best.number})" if found.finished else ""


def _task(task: Any) -> str:
    return one_line(task if isinstance(task, str) else getattr(task, "__name__", "data"), 60)


def _number(x: float) -> str:
    return f"{x:,.1f}" if abs(x) >= 10 else f"{x:.3f}"


def _said(x: Any) -> str:
    return " ".join(map(str, x)) if isinstance(x, tuple) else f"{x:g}" if isinstance(x, float) else str(x)


def _flag(name: str, x: Any) -> str:
    """An option as it is typed."""
    flag = "--" + name.replace("_", "-")
    if isinstance(x, bool):
        return f" {flag}" if x else f" --no-{flag[2:]}"
    values = [f" {flag} {shlex.quote(str(y))}" for y in (x if isinstance(x, tuple) else (x,))]
    return "".join(values)
