"""Training: one loop for every method and world, an iterator of rows of metrics."""

import math
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from policygrad.errors import Kept, NonFiniteError, Note, UserError, ending, one_line
from policygrad.files import add_metadata, as_path
from policygrad.train import presets
from policygrad.train.checkpoints import Stage, finite
from policygrad.train.compose import compose
from policygrad.train.directories import check_empty, claim, release
from policygrad.train.generators import Generators
from policygrad.train.keywords import Arguments, Keywords
from policygrad.train.methods import method_named
from policygrad.train.names import absolute, located
from policygrad.train.options import OptionError, has_critic, options_of, validate, with_values
from policygrad.train.profiling import Profile
from policygrad.train.reports import Log, ProgressLine, Row
from policygrad.train.run import Run, arithmetic, check_device
from policygrad.train.worlds import ROWS as OF_ROWS
from policygrad.train.worlds import kind_of, world_of
from policygrad.train.worlds.world import Own

SAVE_SECONDS = 30.0  # between two saves of the policy, or longer
SAVE_SHARE = 0.05  # of the time may go into saving
# What a run writes before it trains, removed again if it cannot begin.
WRITTEN = ("config.json", "policy.*", "critic.safetensors", "held_out.jsonl", "samples.jsonl", "model", "model/*")
ROWS = 1000  # maximum rows of metrics in a run


class Training:
    """A training run. Iterating it trains and yields the metrics of each iteration.

        training = Training("ppo", "CartPole-v1", steps=100_000)
        for row in training:
            print(row["return"])
        training.run.evaluate()

    method: a name from the table of methods (policygrad.train.methods). task: a Gymnasium id, an environment, a
    callable that makes one, or a vector environment; arithmetic, or a data set of prompts with `model` and `reward`: a
    file, a hub id, a list of dicts or a `datasets.Dataset` (so may the options `dataset` and `evaluation_dataset` be);
    exact:chain or another exact world. out: a directory for the run; None writes nothing. preset: the name of tuned
    settings, or "none"; by default the task's preset if it has one. policy, critic: for control, your own modules, or
    callables that make them from (observation_space, action_space) and (observation_space); for language, critic is a
    text, the option of that name. engine: the function that samples completions. keywords: any option of the method
    (see policygrad.train.options); they override the preset.

    The seed determines all random numbers: the same seed gives the same parameters, bit for bit, on the same machine
    with the same number of threads, also those from the global generators of torch, NumPy and Python, which are left
    unchanged. (Worker processes of async environments have global generators of their own.)

    Raises UserError for every error that the caller can fix, and if training produces NaN or infinity.
    """

    def __init__(
        self,
        method: str,
        task: Any = None,
        *,
        out: Path | str | None = None,
        preset: str | None = None,
        policy: Any = None,
        critic: Any = None,
        engine: Any = None,
        progress: bool = False,
        **keywords: Unpack[Keywords],
    ) -> None:
        name, values = method_named(method).name, dict[str, Any](keywords)
        if isinstance(task, Path):
            task = str(task)
        if isinstance(critic, str):  # for a language model, critic is an option
            values["critic"], critic = critic, None
        task, rows = _rows_apart(task, values)
        kind = kind_of(task, values)
        _check_count(task, values)
        self.preset, self.tuned = presets.choose(preset, name, task, values)
        defaults = with_values(options_of(name, kind)(), self.tuned, f"preset {self.preset}: ")
        options = with_values(defaults, values)
        with presets.blamed(self.preset, self.tuned, values):
            validate(options, defaults)
        if kind == "control":
            _check_shape_read(options, defaults, policy, critic)
        check_device(options.device)
        directory = None if out is None else as_path(out)
        check_empty(directory)
        if isinstance(task, str) and (".py:" in task or (kind == "language" and task not in ("arithmetic", OF_ROWS))):
            task = absolute(task)
        self.world = world_of(kind)(task, located(options))
        self.options = options = self.world.options
        self.run = Run(name, options, self.preset, self.world, directory)
        self.iteration, self.next_row, self.done = 0, 0.0, False
        self.random = Generators(options.seed, options.device)
        self.clock, self.last = 0.0, Row()  # seconds spent in the loop, and the newest row
        made: list[Path] | None = None
        try:
            with self._inside():
                with presets.blamed(self.preset, self.tuned, values):
                    self.world.build(Own(policy, critic, engine, rows), progress)
                self.learner = compose(
                    options, self.world.policy, self.world.critic, self.world.sample, self.world.reference, self._due
                )
                if options.profile:
                    self.run.profile = Profile()
                    self.world.watch(self.run.profile, self.learner)
                self.iterations = iter(self.learner)
                if directory is not None:
                    made = claim(directory)
                    self.run.places.add(directory.resolve())
                    self._begin(directory)
                if self.world.judged:
                    self.run.before = self.run.evaluate()
                self._mark()
        except BaseException:
            with warnings.catch_warnings(action="ignore", category=Note):  # there are no results to speak of
                self.world.close()
            if directory is not None and made is not None:
                release(directory, made, WRITTEN)
            raise
        self.rates = [group["lr"] for group in self._groups()]
        self._schedule(0.0)

    def _begin(self, directory: Path) -> None:
        """Save the run as it is before training, so that a process that is killed leaves a directory that loads."""
        try:
            self.run.write(directory)
        except Exception as error:  # of the system, or of a library's own kind
            raise UserError(f"{unwritable(directory, error)}: make room, or choose another directory") from error

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        """Train for one iteration. Raises StopIteration at the end, and UserError if a number is not finite."""
        if self.done:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
            with self.run.span("other"):
                return self._advance(start)
        except BaseException:
            self.done = True  # the method stopped in the middle of an iteration
            raise

    def _advance(self, start: float) -> Row:
        with self._inside():
            row = _as_row(_next(self.iterations, self.iteration + 1))
            self.iteration += 1
            self._check(row)
            seconds = time.perf_counter() - start
            self.done = self.world.solved(row) or self._share(row["steps"], self.iteration) >= 1
            self.run.stage = Stage(self.iteration, int(row["steps"]), "ended" if self.done else "unfinished")
            with self.run.span("evaluation"):
                self._judge(row)
            self.clock += time.perf_counter() - start
            row["seconds"] = self.run.seconds = self.clock
            row |= self.world.speeds(row, self.last, seconds)
            self.last = row
            share = self._share(row["steps"], self.iteration)
            if share >= self.next_row or self.done or self.world.judged in row:
                self.run.metrics.append(row)
                self.next_row = share + 1 / ROWS
            self._schedule(share)
            self._mark()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during the run."""
        return {
            "iteration": self.iteration,
            "next_row": self.next_row,
            "done": self.done,
            "clock": self.clock,
            "random": self.random.state_dict(),
            "modules": self.world.modules().state_dict(),
            "optimizers": [x.state_dict() for x in self.learner.optimizers],
            "coefficients": {name: x.state_dict() for name, x in self.learner.coefficients.items()},
            "sample": self.learner.sample.state_dict(),  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state_dict of a run with the same options."""
        for name in ("iteration", "next_row", "done", "clock"):
            setattr(self, name, state[name])
        self.random.load_state_dict(state["random"])
        self.world.modules().load_state_dict(state["modules"])
        for optimizer, saved in zip(self.learner.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, saved in state["coefficients"].items():
            self.learner.coefficients[name].load_state_dict(saved)
        self.learner.sample.load_state_dict(state["sample"])  # type: ignore[attr-defined]

    def note(self) -> str | None:
        """A line about the preset that is used, or about one that is for the task's id only and not used."""
        if self.preset is not None:
            return presets.said(self.preset, self.tuned, self.options)
        return presets.passed_over(self.world.task, getattr(self.world, "environments", None), self.run.method)

    def close(self) -> None:
        """Close the environments; the policy stays usable."""
        self.world.close()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        if error is not None and not any(isinstance(note, Kept) for note in getattr(error, "__notes__", ())):
            error.add_note(Kept(self.run.kept()))
        self.close()

    def _share(self, steps: float, iteration: int) -> float:
        """The completed share of the run."""
        shares = [iteration / self.options.iterations] if self.options.iterations else []
        return max([*shares, *([steps / self.options.steps] if self.options.steps else [])])

    def _due(self) -> bool:
        """Whether the current iteration's row may be kept."""
        if getattr(self.options, "overlap", False):  # the sampler is at the next rollout, and not to be waited for
            return True
        share = self._share(float(self.world.sample.steps), self.iteration + 1)
        return share >= min(self.next_row, 1.0) or self._judged(self.iteration + 1)

    def _judged(self, iteration: int) -> bool:
        """Whether an iteration ends with an evaluation, by the options."""
        every = self.options.evaluate_every if self.world.judged else 0
        return every > 0 and iteration % every == 0

    def _judge(self, row: Row) -> None:
        """Evaluate if it is due, and add the score to the row."""
        name = self.world.judged
        if name is None or self.run.before is None:
            return
        if self.iteration == 1:
            self.run.metrics.append(
                {x: 0.0 for x in ("completions", "steps") if x in row} | {name: self.run.before.score}
            )
        if self.done or self._judged(self.iteration):
            self.run.after = self.run.evaluate()
            row[name] = self.run.after.score

    def _mark(self) -> None:
        """Remember the numbers of a whole iteration, for a run that is written."""
        if self.run.directory is not None:
            self.fingerprint = self.world.fingerprint()

    def partway(self) -> bool:
        """Whether the policy has changed since the last whole iteration."""
        return self.world.fingerprint() != self.fingerprint

    def _schedule(self, share: float) -> None:
        """Set the learning rates of the next iteration."""
        factor = scheduled(self.options.learning_rate_schedule, self.options.warmup, share)
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate * factor

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.learner.optimizers for group in optimizer.param_groups]

    def _check(self, row: Row) -> None:
        """Raise UserError for a metric or a parameter that is not finite."""
        at = f"training stopped in iteration {self.iteration}, after {row['steps']:,.0f} steps, because"
        if not self.sound():
            raise UserError(f"{at} a parameter is not finite: lower learning_rate")
        for name, x in row.items():
            if not math.isfinite(x):
                raise UserError(f"{at} {name} is {x}: a lower learning_rate or scale_rewards may help")

    def sound(self) -> bool:
        """Are all parameters finite?"""
        return finite(self.world.modules())

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Use the run's own random state, precision and threads; restore the caller's afterwards."""
        with self.random.inside(), arithmetic(self.world, self.options.threads):
            yield


def train(method: str, task: Any = None, *, progress: bool = True, **arguments: Unpack[Arguments]) -> Run:
    """Train a policy to the end. The arguments are those of Training.

    progress: say on standard error which preset is used, and show a progress line: on a terminal at once, elsewhere now
    and then.
    """
    with Training(method, task, progress=progress, **arguments) as training:
        note = training.note()
        if progress and note is not None and arguments.get("preset") != "none":
            print(note, file=sys.stderr, flush=True)
        complete(training, progress)
    if progress and training.run.profile is not None:
        print(training.run.profile.table(), file=sys.stderr, flush=True)
    return training.run


def complete(training: Training, progress: bool = True) -> None:
    """Train to the end. Write rows and policy to the run's directory, and show a line on the terminal."""
    run, options = training.run, training.options
    total = options.steps if options.steps and not options.iterations else options.iterations
    description = f"{run.method} {run.world.name}"
    with Recorder(training) as record, ProgressLine(description, total, progress) as line:
        for row in training:
            with run.span("logging"):
                record(row)
                line.update(
                    row["steps"] if total == options.steps else float(training.iteration), run.world.status(row)
                )


class Recorder:
    """Writes a run to its directory: rows as they come, the policy now and then, and everything at the end.

    What cannot be written does not stop training: it is tried again. When a run is stopped or fails, a note (`Kept`)
    on the exception says what is saved.
    """

    def __init__(self, training: Training) -> None:
        self.training, self.run, self.clock = training, training.run, SaveClock()
        self.log = None if self.run.directory is None else Log(self.run.directory)

    def __call__(self, row: Row) -> None:
        if self.log is None or self.run.directory is None:
            return
        if self.run.metrics and self.run.metrics[-1] is row:
            self.log.write(row)
        if self.clock.due():
            with self.clock:
                try:
                    self.run.write_policy(self.run.directory)
                except Exception as error:  # of the system or of a library's own kind: a later save may succeed
                    said = f"{unwritable(self.run.directory, error)}: training goes on, and {self.run.kept('there')}"
                    warnings.warn(said, Note, stacklevel=2)

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        self.run.ended = how_it_ended(error)
        last = self.training.last
        if last and self.run.metrics[-1:] != [last]:  # of a run that is stopped, so that its numbers are its policy's
            self.run.metrics.append(last)
            if self.log is not None:
                self.log.write(last)
        if self.log is None or self.run.directory is None:
            return
        self.log.close()
        if error is not None:
            how = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            self.run.stage = replace(self.run.stage, run=how, partway=self.training.partway())
        problem = self._finish(self.run.directory)
        if error is not None:
            error.add_note(Kept(problem or self.run.kept()))
        elif problem is not None:
            raise UserError(problem)

    def _finish(self, directory: Path) -> str | None:
        """Save for the last time. If the directory cannot be written, save elsewhere, and return what happened."""
        if not self.training.sound():  # it stopped in the middle of an iteration: what was saved before stays
            with suppress(OSError):
                for path in directory.rglob("*.safetensors"):
                    add_metadata(path, {"run": self.run.stage.run})
                self.run.summarize(directory)
            return None
        try:
            self.run.write_policy(directory)
        except Exception as error:
            what = f"the {self.run.stage.policy()}"
            return f"{unwritable(directory, error)}: {rescued(self.run.write, what, self.run.kept('there'))}"
        try:
            self.run.describe(directory)
        except Exception as error:
            warnings.warn(f"{unwritable(directory, error)}: {self.run.kept('there')}, undescribed", Note, stacklevel=2)
        return None


def scheduled(schedule: str, warmup: float, share: float) -> float:
    """The factor of the learning rates once a share s of the run is done: s / warmup, and after that, with the share
    u = (s - warmup) / (1 - warmup) of the rest: 1 (constant), 1 - u (linear) or (1 + cos(pi u)) / 2 (cosine)."""
    if share < warmup:
        return share / warmup
    rest = min(1.0, (share - warmup) / (1 - warmup))
    return {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[schedule]


def how_it_ended(error: BaseException | None) -> str:
    """The end of a run, for its summary: finished, interrupted, or the error."""
    if error is None:
        return "finished"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return one_line(error if isinstance(error, UserError) else f"{type(error).__name__}: {error}", 200)


def rescued(write: Callable[[Path], None], what: str, kept: str) -> str:
    """Write what has no room in its own directory to a new temporary one. Returns what is saved where."""
    place = Path(tempfile.mkdtemp(prefix="policygrad-"))
    try:
        write(place)
    except Exception:  # no room there either
        shutil.rmtree(place, ignore_errors=True)
        return f"{kept}, the rest is lost"
    return f"{what} is saved in {place}"


def unwritable(directory: Path, error: Exception) -> str:
    """What is wrong with a directory, in a few words."""
    cause = error.__cause__ or error  # of an error that names the directory itself
    said = one_line(getattr(cause, "strerror", None) or cause, 40)
    return f"{ending(str(directory), 40)} cannot be written ({said})"


class SaveClock:
    """Says when to save next: SAVE_SECONDS after the last save, and so that saving takes SAVE_SHARE of the time."""

    def __init__(self) -> None:
        self.start, self.next = 0.0, time.monotonic() + SAVE_SECONDS

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() >= self.next

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *_: Any) -> None:
        now = time.monotonic()
        self.next = now + max(SAVE_SECONDS, (now - self.start) / SAVE_SHARE)


def _as_row(metrics: dict[str, Tensor | float]) -> Row:
    """The metrics as numbers, with one transfer per device."""
    row = {name: float(x) for name, x in metrics.items() if not isinstance(x, Tensor)}
    tensors = {name: x.detach() for name, x in metrics.items() if isinstance(x, Tensor)}
    for device in {x.device for x in tensors.values()}:
        here = {name: x for name, x in tensors.items() if x.device == device}
        row |= dict(zip(here, torch.stack([x.double().reshape(()) for x in here.values()]).tolist(), strict=True))
    return {name: row[name] for name in metrics}


def _next(iterations: Iterator[Any], iteration: int) -> Any:
    """The metrics of the next iteration. A NaN in torch or in a gradient becomes a UserError of one line."""
    try:
        return next(iterations)
    except NonFiniteError as error:
        raise UserError(f"training stopped in iteration {iteration}: {error}") from error
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or re.search(r"\bnan\b", str(error), re.IGNORECASE) is None:
            raise
        at = f"training stopped in iteration {iteration}"
        raise UserError(f"{at}: a probability turned NaN ({one_line(error, 80)})") from error


def _check_count(task: Any, values: dict[str, Any]) -> None:
    """Set num_envs from the given environments. Raises OptionError if the option contradicts them."""
    if isinstance(task, gymnasium.Env | VectorEnv):
        count = getattr(task, "num_envs", 1)
        if values.setdefault("num_envs", count) != count:
            raise OptionError(
                "num_envs", f"num_envs is {values['num_envs']}, and the environment handed in is {count}: leave it out"
            )


def _rows_apart(task: Any, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The task, and data sets that are rows and not names, taken out of the values: option -> rows."""

    def named(data: Any) -> bool:
        return isinstance(data, str | Path) or (isinstance(data, list | tuple) and all(map(named, data)))

    given = {name: values.get(name) for name in ("dataset", "evaluation_dataset")}
    rows = {name: values.pop(name) for name, data in given.items() if data is not None and not named(data)}
    if isinstance(task, list) or hasattr(task, "column_names"):  # a data set of `datasets`
        if "dataset" in rows or values.get("dataset"):
            raise OptionError("dataset", "the task and dataset are both data: give dataset for each set")
        rows["dataset"], task = task, None
    return (OF_ROWS if task is None and "dataset" in rows else task), rows


def _check_shape_read(options: Any, defaults: Any, policy: Any, critic: Any) -> None:
    """Raise UserError for an option of the default networks if the user's own modules replace them."""
    own_policy = policy is not None
    both = own_policy and (critic is not None or not has_critic(options))
    unread = {"squash": own_policy, "state_dependent_std": own_policy, "initial_log_std": own_policy}
    unread |= {"hidden": both, "activation": both, "orthogonal": both}
    for name, ignored in unread.items():
        if ignored and getattr(options, name) != getattr(defaults, name):
            raise OptionError(name, f"{name} shapes the networks made here, and you hand in your own: leave {name} out")
