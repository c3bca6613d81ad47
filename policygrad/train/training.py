"""Training: one loop for every method and world, an iterator of rows of metrics."""

import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from policygrad.errors import NonFiniteError, UserError, one_line
from policygrad.train import presets
from policygrad.train.checkpoints import write_json
from policygrad.train.compose import compose
from policygrad.train.generators import Generators
from policygrad.train.methods import method_named
from policygrad.train.options import OptionError, has_critic, options_of, validate, with_values
from policygrad.train.reports import Log, ProgressLine, Row
from policygrad.train.run import Run, arithmetic, make_directory
from policygrad.train.worlds import kind_of, world_of
from policygrad.train.worlds.world import Own

SAVE_SECONDS = 30.0  # between two saves of the policy
ROWS = 1000  # maximum rows of metrics in a run


class Training:
    """A training run. Iterating it trains and yields the metrics of each iteration.

        training = Training("ppo", "CartPole-v1", steps=100_000)
        for row in training:
            print(row["return"])
        training.run.evaluate()

    method: a name from the table of methods (policygrad.train.methods). task: a Gymnasium id, an environment, a
    callable that makes one, or a vector environment; arithmetic, or a data set of prompts with `model` and `reward`;
    exact:chain or another exact world. out: a directory for the run; None writes nothing. preset: the name of tuned
    settings, or "none"; by default the task's preset if it has one. policy, critic: for control, your own modules, or
    callables that make them from (observation_space, action_space) and (observation_space); for language, critic is a
    text, the option of that name. engine: the function that samples completions. values: any option of the method (see
    policygrad.train.options); they override the preset.

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
        **values: Any,
    ) -> None:
        name = method_named(method).name
        if isinstance(task, Path):
            task = str(task)
        if isinstance(critic, str):  # for a language model, critic is an option
            values["critic"], critic = critic, None
        kind = kind_of(task, values)
        _check_count(task, values)
        self.preset, tuned = presets.choose(preset, name, task, values)
        defaults = with_values(options_of(name, kind)(), tuned, f"preset {self.preset}: ")
        options = with_values(defaults, values)
        validate(options, defaults)
        if kind == "control":
            _check_shape_read(options, defaults, policy, critic)
        check_device(options.device)
        directory = None if out is None else Path(out)
        check_empty(directory)
        self.world = world_of(kind)(task, options)
        self.options = options = self.world.options
        self.run = Run(name, options, self.preset, self.world, directory)
        self.iteration, self.next_row, self.done = 0, 0.0, False
        self.random = Generators(options.seed, options.device)
        self.clock, self.last = 0.0, Row()  # seconds spent in the loop, and the newest row
        try:
            with self._inside():
                self.world.build(Own(policy, critic, engine), progress)
                self.learner = compose(
                    options, self.world.policy, self.world.critic, self.world.sample, self.world.reference, self._due
                )
                self.iterations = iter(self.learner)
                if directory is not None:
                    make_directory(directory)
                    write_json(directory / "config.json", self.run.configuration())
                    if kind != "language":  # the starting language model is already at its source
                        self.world.save(directory)
                if self.world.judged:
                    self.run.before = self.world.evaluate()
        except BaseException:
            self.world.close()
            raise
        self.rates = [group["lr"] for group in self._groups()]

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        """Train for one iteration. Raises StopIteration at the end, and UserError if a number is not finite."""
        if self.done:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
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

    def close(self) -> None:
        """Close the environments; the policy stays usable."""
        self.world.close()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _share(self, steps: float, iteration: int) -> float:
        """The completed share of the run."""
        shares = [iteration / self.options.iterations] if self.options.iterations else []
        return max([*shares, *([steps / self.options.steps] if self.options.steps else [])])

    def _due(self) -> bool:
        """Whether the current iteration's row will be kept."""
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
            self.run.metrics.append({"completions": 0.0, "steps": 0.0, name: self.run.before.score})
        if self.done or self._judged(self.iteration):
            self.run.after = self.world.evaluate()
            row[name] = self.run.after.score

    def _schedule(self, share: float) -> None:
        """Set the learning rates of the next iteration."""
        if self.options.learning_rate_schedule == "linear":
            for group, rate in zip(self._groups(), self.rates, strict=True):
                group["lr"] = rate * max(0.0, 1 - share)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.learner.optimizers for group in optimizer.param_groups]

    def _check(self, row: Row) -> None:
        """Raise UserError for a metric or a parameter that is not finite."""
        at = f"training stopped in iteration {self.iteration}, after {row['steps']:,.0f} steps, because"
        if not self.sound():
            raise UserError(f"{at} a parameter is not finite: what was saved before stays; lower the learning rate")
        for name, x in row.items():
            if not math.isfinite(x):
                raise UserError(f"{at} {name} is {x}: a lower learning_rate or scale_rewards may help")

    def sound(self) -> bool:
        """Are all parameters finite? In one look."""
        largest = torch._foreach_norm([p.detach() for p in self.world.modules().parameters()], math.inf)
        return bool(torch.stack([x.float() for x in largest]).isfinite().all())

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Use the run's own random state, precision and threads; restore the caller's afterwards."""
        with self.random.inside(), arithmetic(self.world, self.options.threads):
            yield


def train(method: str, task: Any = None, *, progress: bool = True, **arguments: Any) -> Run:
    """Train a policy to the end. The arguments are those of Training. progress: show a line on the terminal."""
    with Training(method, task, progress=progress, **arguments) as training:
        complete(training, progress)
    return training.run


def complete(training: Training, progress: bool = True) -> None:
    """Train to the end. Write rows and policy to the run's directory, and show a line on the terminal."""
    run, options = training.run, training.options
    total = options.steps if options.steps and not options.iterations else options.iterations
    description = f"{run.method} {run.world.name}"
    with Recorder(training) as record, ProgressLine(description, total, progress) as line:
        for row in training:
            record(row)
            line.update(row["steps"] if total == options.steps else float(training.iteration), run.world.status(row))


class Recorder:
    """Writes a run to its directory: its rows, the policy every 30 seconds, and everything at the end."""

    def __init__(self, training: Training) -> None:
        self.training, self.next_save = training, SAVE_SECONDS
        self.log = None if training.run.directory is None else Log(training.run.directory)

    def __call__(self, row: Row) -> None:
        run = self.training.run
        if self.log is None or run.directory is None:
            return
        if run.metrics and run.metrics[-1] is row:
            self.log.write(row)
        if row["seconds"] >= self.next_save:  # so that a killed process leaves a policy
            run.world.save(run.directory)
            self.next_save = row["seconds"] + SAVE_SECONDS

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        run = self.training.run
        if self.log is None or run.directory is None:
            return
        self.log.__exit__(*error)
        if self.training.sound():  # also where it stopped in the middle of an iteration
            run.save(run.directory)


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
        raise UserError(
            f"training stopped in iteration {iteration}: {error}; the policy before that step is kept"
        ) from error
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


def _check_shape_read(options: Any, defaults: Any, policy: Any, critic: Any) -> None:
    """Raise UserError for an option of the default networks if the user's own modules replace them."""
    own_policy = policy is not None
    both = own_policy and (critic is not None or not has_critic(options))
    unread = {"squash": own_policy, "state_dependent_std": own_policy, "initial_log_std": own_policy}
    unread |= {"hidden": both, "activation": both, "orthogonal": both}
    for name, ignored in unread.items():
        if ignored and getattr(options, name) != getattr(defaults, name):
            raise OptionError(name, f"{name} shapes the networks made here, and you hand in your own: leave {name} out")


def check_device(name: str) -> None:
    """Raise UserError for a device that cannot be used."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError("device", f"device {name!r} cannot be used: {str(error).splitlines()[0]}"[:200]) from error


def check_empty(directory: Path | None) -> None:
    """Raise UserError for a directory that is not empty."""
    if directory is not None and directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty, and nothing is overwritten: choose another directory")
