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

from policygrad.errors import NonFiniteError, UserError
from policygrad.train import presets
from policygrad.train.checkpoints import write_json
from policygrad.train.compose import compose
from policygrad.train.methods import method_named
from policygrad.train.options import OptionError, has_critic, options_of, validate, with_values
from policygrad.train.reports import Log, ProgressLine, Row
from policygrad.train.run import Run, arithmetic, make_directory
from policygrad.train.worlds import kind_of, world_of
from policygrad.train.worlds.world import Own

SAVE_SECONDS = 30.0  # between one save of the policy and the next
ROWS = 1000  # of the metrics that a run keeps, at most


class Training:
    """A run in the making: iterating it trains, and yields the metrics of each iteration.

        training = Training("ppo", "CartPole-v1", steps=100_000)
        for row in training:
            print(row["return"])
        training.run.evaluate()

    method: a name of the table (policygrad.train.methods). task: a Gymnasium id, an environment, a callable that makes
    one, or a vector environment; arithmetic, or a data set of prompts with `model` and `reward`; exact:chain and its
    like. out: a directory to write the run to; None writes nothing. preset: the name of tuned settings, "none", or by
    default the task's own if there are any. policy, critic: modules of one's own for control, or callables that make
    them of (observation_space, action_space) and (observation_space); of a language model the critic is an option, a
    text. engine: what samples completions. values: any
    option of the method (see policygrad.train.options), over the preset's.

    The seed decides everything that is random: the same seed gives the same parameters, bit for bit, on the same
    machine with the same number of threads. torch's global generator is left as it was.

    Raises UserError for whatever the caller can change, and when training turns NaN or infinite.
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
        if isinstance(critic, str):  # of a language model: an option
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
        self.tuned = {option: getattr(options, option) for option in tuned}
        self.iteration, self.next_row, self.done, self.sound = 0, 0.0, False, True
        self.random = _own_random(options.seed)
        self.clock, self.last = 0.0, Row()  # seconds in the loop so far, and the newest row
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
                    if kind != "language":  # a language model as it was is where it came from
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
        """Train for one iteration. Raises StopIteration at the end, and UserError for what is not finite."""
        if self.done:
            self.close()
            raise StopIteration
        start = time.perf_counter()
        try:
            return self._advance(start)
        except BaseException:
            self.done = True  # the method has stopped in the middle of an iteration
            raise

    def _advance(self, start: float) -> Row:
        with self._inside():
            row = _as_row(next(_worded(self.iterations, self.iteration + 1)))
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
            if share >= self.next_row or self.done:
                self.run.metrics.append(row)
                self.next_row = share + 1 / ROWS
            self._schedule(share)
        return row

    def state_dict(self) -> dict[str, Any]:
        """All that changes as the run goes on."""
        return {
            "iteration": self.iteration,
            "next_row": self.next_row,
            "done": self.done,
            "clock": self.clock,
            "random": dict(self.random),
            "modules": self.world.modules().state_dict(),
            "optimizers": [x.state_dict() for x in self.learner.optimizers],
            "coefficients": {name: x.state_dict() for name, x in self.learner.coefficients.items()},
            "sample": self.learner.sample.state_dict(),  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave, of a run with the same options."""
        for name in ("iteration", "next_row", "done", "clock"):
            setattr(self, name, state[name])
        self.random = dict(state["random"])
        self.world.modules().load_state_dict(state["modules"])
        for optimizer, saved in zip(self.learner.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, saved in state["coefficients"].items():
            self.learner.coefficients[name].load_state_dict(saved)
        self.learner.sample.load_state_dict(state["sample"])  # type: ignore[attr-defined]

    def close(self) -> None:
        """Give back the environments; the policy stays."""
        self.world.close()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _share(self, steps: float, iteration: int) -> float:
        """How much of the run is done."""
        shares = [iteration / self.options.iterations] if self.options.iterations else []
        return max([*shares, *([steps / self.options.steps] if self.options.steps else [])])

    def _due(self) -> bool:
        """Will the row of the iteration that is at work be kept?"""
        return self._share(float(self.world.decisions()), self.iteration + 1) >= min(self.next_row, 1.0)

    def _judge(self, row: Row) -> None:
        """Evaluate where it is due, into the row."""
        name = self.world.judged
        if name is None or self.run.before is None:
            return
        if self.iteration == 1:
            self.run.metrics.append({"completions": 0.0, "steps": 0.0, name: self.run.before.score})
        every = self.options.evaluate_every
        if self.done or (every > 0 and self.iteration % every == 0):
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
        """Raise UserError for a metric or a parameter that is not finite; the parameters in one look."""
        largest = torch._foreach_norm([p.detach() for p in self.world.modules().parameters()], math.inf)
        self.sound = bool(torch.stack([x.float() for x in largest]).isfinite().all())
        at = f"training stopped in iteration {self.iteration}, after {row['steps']:,.0f} steps, because"
        if not self.sound:
            raise UserError(f"{at} a parameter is not finite: what was saved before stays; lower the learning rate")
        for name, x in row.items():
            if not math.isfinite(x):
                raise UserError(f"{at} {name} is {x}: a lower learning_rate or scale_rewards may help")

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """The run's own random numbers, precision and threads; the caller's are left as they were."""
        cuda = self.options.device.startswith("cuda")
        with torch.random.fork_rng([self.options.device] if cuda else []), arithmetic(self.world, self.options.threads):
            torch.set_rng_state(self.random["cpu"])
            if cuda and "cuda" in self.random:
                torch.cuda.set_rng_state(self.random["cuda"], self.options.device)
            elif cuda:
                torch.cuda.manual_seed(self.options.seed)
            try:
                yield
            finally:
                self.random["cpu"] = torch.get_rng_state()
                if cuda:
                    self.random["cuda"] = torch.cuda.get_rng_state(self.options.device)


def train(method: str, task: Any = None, *, progress: bool = True, **arguments: Any) -> Run:
    """Train a policy to the end. The arguments are those of Training; progress: show a line on the terminal."""
    with Training(method, task, progress=progress, **arguments) as training:
        complete(training, progress)
    return training.run


def complete(training: Training, progress: bool = True) -> None:
    """Train to the end, with rows and policy written to the run's directory, and a line on the terminal."""
    run, options = training.run, training.options
    total = options.steps if options.steps and not options.iterations else options.iterations
    description = f"{run.method} {run.world.name}"
    with Recorder(training) as record, ProgressLine(description, total, progress) as line:
        for row in training:
            record(row)
            line.update(row["steps"] if total == options.steps else float(training.iteration), run.world.status(row))


class Recorder:
    """Writes a run to its directory: the rows that it keeps, the policy every 30 seconds, everything at the end."""

    def __init__(self, training: Training) -> None:
        self.training, self.next_save = training, SAVE_SECONDS
        self.log = None if training.run.directory is None else Log(training.run.directory)

    def __call__(self, row: Row) -> None:
        run = self.training.run
        if self.log is None or run.directory is None:
            return
        if run.metrics and run.metrics[-1] is row:
            self.log.write(row)
        if row["seconds"] >= self.next_save:  # what even a killed process leaves
            run.world.save(run.directory)
            self.next_save = row["seconds"] + SAVE_SECONDS

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        run = self.training.run
        if self.log is None or run.directory is None:
            return
        self.log.__exit__(*error)
        if self.training.sound:
            run.save(run.directory)


def _as_row(metrics: dict[str, Tensor | float]) -> Row:
    """Numbers, read from each device at once."""
    row = {name: float(x) for name, x in metrics.items() if not isinstance(x, Tensor)}
    tensors = {name: x.detach() for name, x in metrics.items() if isinstance(x, Tensor)}
    for device in {x.device for x in tensors.values()}:
        here = {name: x for name, x in tensors.items() if x.device == device}
        row |= dict(zip(here, torch.stack([x.double().reshape(()) for x in here.values()]).tolist(), strict=True))
    return {name: row[name] for name in metrics}


def _worded(iterations: Any, iteration: int) -> Iterator[Any]:
    """The next iteration, with a NaN inside torch or a gradient as one line for the user."""
    try:
        yield next(iterations)
    except NonFiniteError as error:
        raise UserError(
            f"training stopped in iteration {iteration}: {error}; the policy before that step is kept"
        ) from error
    except (ValueError, RuntimeError) as error:
        if isinstance(error, UserError) or re.search(r"\bnan\b", str(error), re.IGNORECASE) is None:
            raise
        said = " ".join(str(error).split())[:80]
        raise UserError(f"training stopped in iteration {iteration}: a probability turned NaN ({said})") from error


def _own_random(seed: int) -> dict[str, Tensor]:
    """The state of torch's generator after a seed, without setting it."""
    return {"cpu": torch.Generator().manual_seed(seed).get_state()}


def _check_count(task: Any, values: dict[str, Any]) -> None:
    """Environments that are handed in say how many they are."""
    if isinstance(task, gymnasium.Env | VectorEnv):
        count = getattr(task, "num_envs", 1)
        if values.setdefault("num_envs", count) != count:
            raise OptionError(
                "num_envs", f"num_envs is {values['num_envs']}, and the environment handed in is {count}: leave it out"
            )


def _check_shape_read(options: Any, defaults: Any, policy: Any, critic: Any) -> None:
    """Raise UserError for an option of the networks made here where the user's own take their place."""
    own_policy = policy is not None
    both = own_policy and (critic is not None or not has_critic(options))
    unread = {"squash": own_policy, "state_dependent_std": own_policy, "initial_log_std": own_policy}
    unread |= {"hidden": both, "activation": both, "orthogonal": both}
    for name, ignored in unread.items():
        if ignored and getattr(options, name) != getattr(defaults, name):
            raise OptionError(name, f"{name} shapes the networks made here, and you hand in your own: leave {name} out")


def check_device(name: str) -> None:
    """Raise UserError for a device that cannot be used here."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError("device", f"device {name!r} cannot be used: {str(error).splitlines()[0]}"[:200]) from error


def check_empty(directory: Path | None) -> None:
    """Raise UserError for a directory that holds something."""
    if directory is not None and directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty, and nothing is overwritten: choose another directory")
