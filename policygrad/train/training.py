"""Training: one loop for every method and world, an iterator of rows of metrics."""

import hashlib
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Unpack

import gymnasium
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.errors import Kept, NonFiniteError, Note, UserError, ending, listed, one_line, shortened
from policygrad.files import as_path, check_real, read_json
from policygrad.guards import as_non_finite
from policygrad.noise import noise_of_moments
from policygrad.train import presets
from policygrad.train.best import Best
from policygrad.train.checkpoints import Stage, finite
from policygrad.train.compose import compiles, compose
from policygrad.train.directories import CLAIM, Lock, check_empty, claim, release
from policygrad.train.generators import Generators
from policygrad.train.hub import directory_of
from policygrad.train.keywords import Arguments, Keywords
from policygrad.train.loggers import installed
from policygrad.train.methods import method_named
from policygrad.train.names import absolute, located
from policygrad.train.options import OptionError, has_critic, options_of, validate, with_values
from policygrad.train.profiling import Profile
from policygrad.train.recording import complete, unwritable
from policygrad.train.reports import Row, read_rows
from policygrad.train.resuming import (
    Written,
    check_resumable,
    extended,
    longer,
    of_a_checkpoint,
    processes,
    rows_apart,
)
from policygrad.train.run import Run, arithmetic, check_device
from policygrad.train.snapshots import digest, read_checkpoint
from policygrad.train.worlds import OWN_TASKS, kind_of, world_of
from policygrad.train.worlds import ROWS as OF_ROWS
from policygrad.train.worlds.world import Own, World

# What a run writes before it trains, removed again if it cannot begin.
WRITTEN = (
    ".lock",
    "config.json",
    "policy.*",
    "critic.safetensors",
    "held_out.jsonl",
    "samples.jsonl",
    "model",
    "model/*",
    "best",
    "best/*",
    "best/model/*",
    "selves",
    "selves/*",
    "selves/*/*",
)
OF_THE_START = "model that the run began with, its reference,"
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
    settings, a file of them, or "none"; by default the task's preset if it has one. policy, critic: for control, your
    own modules, or callables that make them from (observation_space, action_space) and (observation_space); for
    language, critic is a text, the option of that name. engine: the function that samples completions, or a text, the
    option of that name. keywords: any option of the method (see policygrad.train.options); they override the preset.

    The seed determines all random numbers: the same seed gives the same parameters, bit for bit, on the same machine
    with the same number of threads, also those from the global generators of torch, NumPy and Python, which are left
    unchanged. (Worker processes of async environments have global generators of their own.)

    Of several ranks (policygrad.ranks.join), each makes one with the same arguments, and iterates it: they train one
    run, and rank 0 writes it.

    Raises UserError for every error that the caller can fix, and if training produces NaN or infinity.
    """

    def __init__(
        self,
        method: str,
        task: Any = None,
        *,
        out: Path | str | None = None,
        preset: str | Path | None = None,
        policy: Any = None,
        critic: Any = None,
        engine: Any = None,
        progress: bool = False,
        **keywords: Unpack[Keywords],
    ) -> None:
        own = {"preset": preset, "policy": policy, "critic": critic, "engine": engine}
        with ranks.agreed():
            run, parts = self._asked(method, task, out, own, dict(keywords))
        ranks.check_alike("option", {"method": run.method, "task": run.world.stored(), **asdict(run.options)})
        ranks.check_alike("the file", contents(run.world.stored(), *vars(run.options).values()))
        ranks.limit_to(run.options.rank_time_limit)
        with presets.blamed(run.preset, self.tuned, dict(keywords)):
            self._make(run, parts, progress)

    def _asked(self, method: str, task: Any, out: Any, own: dict[str, Any], values: dict[str, Any]) -> tuple[Run, Own]:
        """The run that the arguments ask for, and the user's own objects. own: preset, policy, critic and engine."""
        preset, policy, critic, engine = own.values()
        name = method_named(method).name
        if isinstance(task, Path):
            task = str(task)
        if isinstance(critic, str):  # for a language model, critic is an option
            values["critic"], critic = critic, None
        if isinstance(engine, str):
            values["engine"], engine = engine, None
        task, rows = rows_apart(task, values)
        kind = kind_of(task, values)
        if "demonstrations" in rows:
            with_values(options_of(name, kind)(), {"demonstrations": OF_ROWS})  # raises where there is no such option
        if hasattr(options_of(name, kind), "num_envs"):
            _check_count(task, values)
        preset, tuned = presets.choose(preset, name, task, values)
        defaults = with_values(options_of(name, kind)(), tuned, f"preset {preset}: ")
        options = with_values(defaults, values)
        with presets.blamed(preset, tuned, values):
            validate(options, defaults)
        if kind == "control":
            _check_shape_read(options, defaults, policy, critic)
        options = _on_rank(options, defaults)
        check_device(options.device)
        directory = None if out is None else as_path(out)
        if options.log and directory is None:
            raise OptionError(
                "log", f"log shows what a run writes: give out, a directory for it, as in out='runs/{name}'"
            )
        if ranks.rank():
            directory = None  # rank 0 writes it
        check_empty(directory)
        if isinstance(task, str) and (".py:" in task or (kind == "language" and task not in (*OWN_TASKS, OF_ROWS))):
            task = absolute(task)
        world = world_of(kind, name)(task, located(options))
        self.tuned = tuned
        return Run(name, world.options, preset, world, directory), Own(policy, critic, engine, rows)

    def _make(self, run: Run, own: Own, progress: bool, checkpoint: dict[str, Any] | None = None) -> None:
        """Make everything that the options ask for. checkpoint: where to go on; {}: from the beginning, once more."""
        self.run, self.world, options = run, run.world, run.options
        self.preset, self.options, directory = run.preset, options, run.directory
        data = "demonstrations" if "demonstrations" in own.data else "dataset"
        self.own = {{"data": data}.get(name, name) for name, x in vars(own).items() if x is not None and x != {}}
        self.iteration, self.next_row, self.done = 0, 0.0, False
        self.random = Generators(options.seed, options.device)
        self.best = Best()
        self.dropped = 0  # updates that were dropped so far
        self.counted = 0.0  # decisions of all iterations before this one
        self.clock, self.last = 0.0, Row()  # seconds spent in the loop, and the newest row
        self.resumed: dict[str, Any] | None = None  # of a run that goes on: where its log was
        self.lock: Lock | None = None
        self.remote: Any = None  # samplers in other processes
        made: list[Path] | None = None
        _check_loggers(options.log if directory is not None else ())
        try:
            with self._inside():
                ranks.in_turn(lambda: self.world.build(own, progress and ranks.rank() == 0))
                if getattr(options, "samplers", None) is not None:
                    self.remote = self._remote(own)
                with ranks.agreed():
                    in_checkpoint = checkpoint and not self._charged() and not self._frozen()
                    if getattr(options, "start", None) and not in_checkpoint:
                        self.world.begin_from(directory_of(options.start))
                    self.world.after(0)
                    self.start = {} if directory is None else {OF_THE_START: digest(self._kept_from_the_start())}
                if getattr(options, "shard", False):
                    ranks.check_alike("at the start, the", {"policy": self._parameters()})
                    self.world.shard()
                with ranks.agreed():
                    if checkpoint and hasattr(options, "compile"):  # as it was, though more steps may pay for more
                        options = replace(options, compile=checkpoint["compiled"])
                    self.compiled = "on" if compiles(options) else "off"
                    self.learner = compose(
                        options,
                        self.world.policy,
                        self.world.critic,
                        self.sample,
                        self.world.reference,
                        self._due,
                        self.world.demonstrations,
                    )
                    self.start |= {} if directory is None else self.world.beside()
                    self.data = {} if directory is None else self.world.data_digests()
                    if options.profile:
                        self.run.profile = Profile()
                        self.world.watch(self.run.profile, self.learner)
                    self.iterations = iter(self.learner)
                    if directory is not None and checkpoint is None:
                        made = claim(directory)
                        self.lock = Lock(directory)
                        self.run.places.add(directory.resolve())
                        self._begin(directory)
                ranks.check_alike("at the start, the", {"policy": self._parameters()})
                if self.world.judged:
                    self.run.before = self._judgement()
                    self._score(self.world.judged, self.run.before.score, 0)
                self._mark()
            self.random = Generators(ranks.seed(options.seed), options.device) if ranks.size() > 1 else self.random
        except BaseException:
            with warnings.catch_warnings(action="ignore", category=Note):  # there are no results to speak of
                self._shut()
            if directory is not None and made is not None:
                release(directory, made, WRITTEN)
            if self.lock is not None:
                self.lock.release()
            raise
        self.rates = [group["lr"] for group in self._groups()]
        self._schedule(0.0)

    @property
    def sample(self) -> Any:
        """The sampler of the world, or the samplers in other processes."""
        return self.world.sample if self.remote is None else self.remote

    def _remote(self, own: Own) -> Any:
        """Samplers in other processes, which make the world's policy anew."""
        from policygrad.train.remote import Remote

        if own != Own():
            raise UserError("samplers make policy and critic anew, from options, and one is handed in: leave one out")
        options = self.options
        how = {"lag": options.lag, "address": options.ray, "limit": options.rank_time_limit}
        return Remote(self.world, options.samplers, **how)

    @classmethod
    def resume(
        cls,
        directory: Path | str,
        *,
        steps: int | None = None,
        iterations: int | None = None,
        trust: bool = False,
        environment: Any = None,
        policy: Any = None,
        critic: Any = None,
        engine: Any = None,
        progress: bool = False,
        **repeated: Any,
    ) -> "Training":
        """A run that goes on from the last checkpoint in its directory, as if it had not been stopped.

        Its parameters and metrics come out the same, bit for bit, on the same machine with the same versions. steps,
        iterations: so many more than the run was to have. trust, repeated: as for Run.load; training also reads the
        model and the data sets, and no file in the directory may be a link. environment, policy, critic,
        engine and dataset: your own objects of training, which no file holds. Raises UserError for a run that has
        ended, unless it gets more steps, that another process is writing, or whose environment, options or starting
        model are no longer what they were.
        """
        directory, lock = as_path(directory), None
        try:
            with ranks.agreed():
                found = Written.read(directory, trust, environment, repeated | {"critic": critic})
                check_real(directory)
                lock = Lock(directory) if ranks.rank() == 0 else None
                checkpoint = read_checkpoint(directory)
                found.options = _on_rank(extended(found.options, steps, iterations))
                with of_a_checkpoint():
                    check_resumable(directory, found.options, checkpoint)
            ranks.limit_to(found.options.rank_time_limit)
            written = directory if ranks.rank() == 0 else None
            training = cls._again(found, written, policy, critic, engine, progress, checkpoint or {})
            try:
                with ranks.agreed(), of_a_checkpoint():
                    training._go_on(checkpoint, directory)
            except BaseException:
                training._shut()
                raise
            training.lock = lock
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        return training

    @classmethod
    def _again(
        cls,
        found: "Written",
        directory: Path | None,
        policy: Any,
        critic: Any,
        engine: Any,
        progress: bool,
        checkpoint: dict[str, Any] | None = None,
    ) -> "Training":
        """The run that a directory describes, at its beginning. directory: where it writes."""
        training = cls.__new__(cls)
        training.tuned = {}
        world = world_of(found.kind, found.method)(found.task, found.options)
        run = Run(
            found.method,
            world.options,
            found.preset,
            world,
            directory,
            totals=found.totals,
            ranks_before=found.ranks_before,
        )
        if directory is not None:
            run.places.add(directory.resolve())
        own = Own(policy, None if isinstance(critic, str) else critic, engine, found.rows)
        training._make(run, own, progress, checkpoint)
        return training

    def _go_on(self, checkpoint: dict[str, Any] | None, directory: Path) -> None:
        """Go on from a checkpoint; None: from the beginning."""
        if checkpoint is None:
            warnings.warn("there is no checkpoint yet: the run begins once more", Note, stacklevel=3)
            self.resumed = {"metrics": 0, "events": None}
            return
        self.check_own(checkpoint, directory, "resume")
        if checkpoint["task"] != self.world.stored():
            said = f"the task was {shortened(checkpoint['task'])}, and is {shortened(self.world.stored())}"
            warnings.warn(f"{said}: the numbers may not be those of an unbroken run", Note, stacklevel=3)
        if ranks.rank() == 0:
            for name, now in self.start.items():
                if checkpoint["start"].get(name) != now:
                    raise UserError(f"the {name} is no longer what it was: put it back, or begin a new run")
        for name, now in self.data.items():
            if checkpoint["data"].get(name) != now:
                said = f"the {name} is no longer what it was: the numbers may not be those of an unbroken run"
                warnings.warn(said, Note, stacklevel=3)
        changed = [f"{x} {checkpoint['versions'].get(x)}, now {now}" for x, now in self.world.versions().items()
                   if checkpoint["versions"].get(x) != now]  # fmt: skip
        if changed:
            said = f"the checkpoint is of {listed(changed, 90)}"
            warnings.warn(f"{said}: the numbers may not be those of an unbroken run", Note, stacklevel=3)
        self.load_state_dict(checkpoint["training"])
        self._count_ranks(checkpoint)
        (name, size), rows = checkpoint["log"]["events"], int(checkpoint["log"]["metrics"])
        self.resumed = {"metrics": rows, "events": (str(name), int(size))}
        self.last = {str(name): float(x) for name, x in checkpoint["last"].items()}
        self.run.seconds = self.clock
        self.run.stage = self.run.saved = Stage(
            self.iteration, checkpoint["steps"], "ended" if self.done else "unfinished"
        )
        try:
            self.run.metrics = read_rows(directory / CLAIM, rows)
        except UserError as error:
            warnings.warn(f"{one_line(error, 150)}: earlier rows are missing", Note, stacklevel=3)
        if self.world.judged and self.run.before is not None and self.iteration:
            self.run.metrics.insert(0, self._before(self.last))
        if longer(self.options, checkpoint):
            was = {name: checkpoint["options"][name] for name in ("steps", "iterations")}
            self.run.totals = [*checkpoint["totals"], {"iteration": self.iteration, **was}]
            self.lengthen(self.options)
            if self.options.learning_rate_schedule != "constant" or self.options.warmup:
                said = f"learning_rate_schedule {self.options.learning_rate_schedule} is of the whole run"
                warnings.warn(f"{said}: with more of it, the rates are higher from here on", Note, stacklevel=3)
        if self.run.directory is not None and (longer(self.options, checkpoint) or self._counts_otherwise(directory)):
            self.run.describe(directory)
        self._mark()

    def _counts_otherwise(self, directory: Path) -> bool:
        """Whether config.json says other numbers of ranks."""
        written, now = read_json(directory / "config.json"), self.run.configuration()
        return any(written.get(name) != now[name] for name in ("ranks", "ranks_before"))

    def _count_ranks(self, checkpoint: dict[str, Any]) -> None:
        """Keep how many ranks have trained the run until now, and say so if there are as many no longer."""
        was = len(checkpoint["training"].get("ranks", "1"))
        earlier = [x for x in self.run.ranks_before if x["iteration"] < self.iteration]
        now = [] if was == ranks.size() else [{"iteration": self.iteration, "ranks": was}]
        self.run.ranks_before = earlier + now
        if now:
            said = f"the run was trained by {processes(was)}, and goes on with {processes(ranks.size())}"
            warnings.warn(
                f"{said}: from the same parameters and counts, and on rows that are drawn anew from the seed",
                Note,
                stacklevel=4,
            )

    def check_own(self, checkpoint: dict[str, Any], directory: Path, function: str) -> None:
        """Raise UserError if an object that was handed in is missing."""
        for name in sorted(set(checkpoint["own"]) - self.own):
            said = f"the run was trained with a {name} of your own: in Python, "
            raise UserError(f"{said}policygrad.{function}({ending(str(directory), 60)!r}, {name}=...) takes it")

    def lengthen(self, options: Any) -> None:
        """Go on with the total of these options in place of what the run was to have."""
        self.options = self.run.options = options
        share = self._share(self.last.get("steps", 0.0), self.iteration)
        self.done, self.next_row, self.best.waited = False, share + 1 / ROWS, 0
        self._schedule(share)

    def checkpoint(self, log: dict[str, Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
        """The whole run, between two iterations, as resume takes it.

        log: where metrics and events are. state: its state_dict, where all ranks have been asked for it.
        """
        return {
            "iteration": self.iteration,
            "steps": int(self.last.get("steps", 0)),
            "training": self.state_dict() if state is None else state,
            "last": dict(self.last),
            "log": log,
            "own": sorted(self.own),
            "task": self.world.stored(),
            "options": self.run.configuration()["options"],
            "versions": self.world.versions(),
            "start": self.start,
            "data": self.data,
            "compiled": self.compiled,
            "totals": self.run.totals,
        }

    def _kept_from_the_start(self) -> dict[str, Tensor]:
        """What no checkpoint holds, since it stays: frozen parameters, and the policy that the reference is of."""
        modules, frozen = self.world.modules(), self._frozen()
        whole = self._charged()
        return {
            name: x
            for name, x in modules.state_dict().items()
            if name in frozen or (whole and name.startswith("policy."))
        }

    def _charged(self) -> bool:
        """Whether KL to the policy of the start is charged."""
        return getattr(self.options, "kl_ref", "none") != "none"

    def _frozen(self) -> set[str]:
        """The names of the parameters that nothing changes."""
        named = self.world.modules().named_parameters(remove_duplicate=False)
        return {name for name, p in named if not p.requires_grad}

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
            self._shut()
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
            if self.learner.meter is not None:
                self.learner.meter.begin()
            metrics = _next(self.iterations, self.iteration + 1)
            self.world.cut()
            metrics = self._of_all(metrics)
            row = _as_row({**metrics, **self._noise(metrics)})
            self.iteration, self.counted = self.iteration + 1, row["steps"]
            dropped, self.dropped = self.learner.guard.skipped - self.dropped, self.learner.guard.skipped
            if self.learner.guard.skip:
                row["skipped_updates"] = float(self.dropped)
            row = self._checked(row, dropped)
            self.world.after(self.iteration)
            seconds = time.perf_counter() - start
            self.done = self.world.solved(row) or self._share(row["steps"], self.iteration) >= 1
            self.run.stage = Stage(self.iteration, int(row["steps"]), "ended" if self.done else "unfinished")
            with self.run.span("evaluation"):
                self._judge(row)
            if self.best.waited >= (self.options.evaluation_patience or math.inf):
                self.done, self.run.stage = True, replace(self.run.stage, run="ended")
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

    def _of_all(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics of all ranks. Raises UserError if their parameters are no longer the same."""
        if ranks.size() == 1:
            return metrics
        parts, parameters = zip(*ranks.objects((self.world.part(_as_row(metrics)), self._parameters())), strict=True)
        for i, other in enumerate(parameters):
            if other != parameters[0]:
                raise UserError(
                    f"the parameters of ranks 0 and {i} part in iteration {self.iteration + 1:,}: are their machines "
                    "and versions of torch the same?"
                )
        return self.world.joined(list(parts))

    def _parameters(self) -> list[float]:
        """Numbers that differ where the parameters of two ranks do."""
        return World.fingerprint(self.world) if ranks.size() > 1 and not self.world.sharded else []

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes during the run. Of several ranks, all have to ask for it at once."""
        frozen = self._frozen()
        own: dict[str, Any] = {
            "random": self.random.state_dict(),
            "sample": self.learner.sample.state_dict(),  # type: ignore[attr-defined]
            "surroundings": None if self.remote else self.world.surroundings(),  # else they are the samplers'
        }
        if ranks.size() > 1:
            own = {"ranks": ranks.objects(tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, own))}
        return {
            "iteration": self.iteration,
            "next_row": self.next_row,
            "done": self.done,
            "clock": self.clock,
            "best": vars(self.best),
            "dropped": self.dropped,
            "counted": self.counted,
            "modules": {name: x for name, x in self.world.collect().items() if name not in frozen},
            "optimizers": ranks.assembled([x.state_dict() for x in self.learner.optimizers]),
            "coefficients": {name: x.state_dict() for name, x in self.learner.coefficients.items()},
            **own,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state_dict of a run with the same options.

        Of another number of ranks: what all ranks have, and what each has of its own is drawn anew from the seed.
        """
        held, lost = state.get("ranks", [state]), None  # what each rank had of its own
        same = len(held) == ranks.size()
        self.iteration, self.done = int(state["iteration"]), bool(state["done"])
        self.next_row, self.clock = float(state["next_row"]), float(state["clock"])
        self.best, self.dropped = Best(**state["best"]), int(state["dropped"])
        self.learner.guard.skipped, self.counted = self.dropped, float(state["counted"])
        self.run.best = self.best.summary()
        with self._inside():  # environments may draw from the global generators
            if self.remote:
                pass  # the surroundings are the samplers'
            elif same:
                lost = self.world.restore(held[ranks.rank()]["surroundings"])
            else:
                self.world.restore_common(held[0]["surroundings"])
        here = self.world.modules().state_dict()
        modules = {name: ranks.cut_as(x, here.get(name)) for name, x in state["modules"].items()}
        found = self.world.modules().load_state_dict(modules, strict=False)
        if found.unexpected_keys or set(found.missing_keys) - self._frozen():
            raise ValueError(f"other modules: {listed([*found.unexpected_keys, *found.missing_keys])}")
        for optimizer, saved in zip(self.learner.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(_cut_as(saved, optimizer))
        for name, saved in state["coefficients"].items():
            self.learner.coefficients[name].load_state_dict(saved)
        sample: Any = self.learner.sample
        if same:
            sample.load_state_dict(held[ranks.rank()]["sample"])
            self.random.load_state_dict(held[ranks.rank()]["random"])
        else:
            seed = ranks.seed_from(self.options.seed, self.iteration)
            sample.divide_anew([x["sample"] for x in held], seed)
            self.random = Generators(seed, self.options.device)
        if lost is not None:
            warnings.warn(lost, Note, stacklevel=2)

    def note(self) -> str | None:
        """A line about the preset that is used, or about one that is for the task's id only and not used."""
        if self.preset is not None:
            return presets.said(self.preset, self.tuned, self.options)
        return presets.passed_over(self.world.task, getattr(self.world, "environments", None), self.run.method)

    def close(self) -> None:
        """Close the environments, and let other processes write to the directory; the policy stays usable."""
        self._shut()
        if self.lock is not None:
            self.lock.release()

    def _shut(self) -> None:
        """End what samples."""
        if self.remote is not None:
            self.remote.close()
        self.world.close()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        if (
            error is not None
            and ranks.rank() == 0
            and not any(isinstance(note, Kept) for note in getattr(error, "__notes__", ()))
        ):
            error.add_note(Kept(self.run.kept()))
        self.close()

    def _share(self, steps: float, iteration: int) -> float:
        """The completed share of the run."""
        shares = [iteration / self.options.iterations] if self.options.iterations else []
        return max([*shares, *([steps / self.options.steps] if self.options.steps else [])])

    def _due(self) -> bool:
        """Whether the current iteration's row may be kept."""
        if getattr(self.options, "overlap", False) or getattr(self.options, "lag", 0):
            return True  # the sampler is at the next rollout, and not to be waited for
        sample: Any = self.learner.sample  # of all ranks
        share = self._share(float(sample.steps), self.iteration + 1)
        return share >= min(self.next_row, 1.0) or self._judged(self.iteration + 1)

    def _noise(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """How much of a step was signal, if the row may be kept."""
        options, meter = self.options, self.learner.meter
        if meter is not None:
            return meter.found
        if getattr(options, "gradient_noise", "off") == "off" or not self._due():
            return {}
        size = getattr(options, "minibatch_size", None)
        if size is None and self.world.kind == "language":
            size = options.prompts_per_rollout * getattr(options, "completions", 1)
        elif size is None:
            size = float(metrics["steps"]) - self.counted
        return noise_of_moments(self.learner.optimizers, self.world.policy, size)

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
            self.run.metrics.append(self._before(row))
        if self.done or self._judged(self.iteration):
            self.run.after = self._judgement()
            row |= self.world.scores(self.run.after)
            self._score(name, row[name], int(row["steps"]))

    def _judgement(self) -> Any:
        """An evaluation, which rank 0 makes for all."""
        with self.world.whole():
            return ranks.from_first(self.run.judge)

    def _score(self, metric: str, score: float, steps: int) -> None:
        """Take a score of the current policy."""
        self.best.see(metric, score, self.iteration, steps)
        self.run.best = self.best.summary()

    def best_now(self) -> bool:
        """Whether the current policy is the best one, and RUN/best has another. Without evaluations, training says."""
        name = self.world.curve().y[0]
        if self.world.judged is None and name in self.last:
            self._score(name, self.last[name], int(self.last["steps"]))
        return not self.best.written and self.best.iteration == self.iteration

    def _before(self, row: Row) -> Row:
        """The row of the evaluation before training. It is not in metrics.jsonl. row: one of this run."""
        assert self.world.judged is not None
        assert self.run.before is not None
        counters = {name: 0.0 for name in ("completions", "steps") if name in row}
        return counters | self.world.scores(self.run.before)

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
        waits = self.iteration < getattr(self.options, "critic_warmup", 0)
        of_policy = set(self.world.policy.parameters()) if waits else set()
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate * factor * of_policy.isdisjoint(group["params"])

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.learner.optimizers for group in optimizer.param_groups]

    def _checked(self, row: Row, dropped: int) -> Row:
        """The row. Raises UserError for a parameter that is not finite, and for a metric.

        Where updates were dropped, a metric may be infinite for the same reason, and the row goes without it.
        """
        at = f"training stopped in iteration {self.iteration}, after {row['steps']:,.0f} steps, because"
        if ranks.some(not self.sound()) if self.world.sharded else not self.sound():
            raise NonFiniteError(f"{at} a parameter is not finite: lower learning_rate")
        for name, x in row.items():
            if not math.isfinite(x) and not dropped:
                raise NonFiniteError(f"{at} {name} is {x}: a lower learning_rate or scale_rewards may help")
        return {name: x for name, x in row.items() if math.isfinite(x)}

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
        if progress and ranks.rank() == 0 and note is not None and arguments.get("preset") != "none":
            print(note, file=sys.stderr, flush=True)
        complete(training, progress)
    if progress and ranks.rank() == 0 and training.run.profile is not None:
        print(training.run.profile.table(), file=sys.stderr, flush=True)
    return training.run


def clone(task: Any = None, data: Any = None, **arguments: Unpack[Arguments]) -> Run:
    """Learn from demonstrations: the policy under which they are most likely. Any method goes on from it, by `start`.

    For control, data are transitions in the task: a file, a data set of Minari, rows, or arrays by name (see
    the guide, docs/control.md). A language model learns from completions of prompts: give model, and dataset or the
    task, and leave data out. The other arguments are those of Training.
    """
    given: Any = {} if data is None else {"demonstrations": data}
    return train("clone", task, **given, **arguments)


def resume(directory: Path | str, *, progress: bool = True, **arguments: Any) -> Run:
    """Continue a run from the last checkpoint in its directory, to its end. The arguments are those of Training.resume.

    `policygrad.resume("runs/CartPole-v1/ppo-seed0", steps=50_000)` trains for so many steps more.
    """
    with Training.resume(directory, progress=progress, **arguments) as training:
        complete(training, progress)
    return training.run


def scheduled(schedule: str, warmup: float, share: float) -> float:
    """The factor of the learning rates once a share s of the run is done: s / warmup, and after that, with the share
    u = (s - warmup) / (1 - warmup) of the rest: 1 (constant), 1 - u (linear) or (1 + cos(pi u)) / 2 (cosine)."""
    if share < warmup:
        return share / warmup
    rest = min(1.0, (share - warmup) / (1 - warmup))
    return {"constant": 1.0, "linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2}[schedule]


def _as_row(metrics: dict[str, Tensor | float]) -> Row:
    """The metrics as numbers, with one transfer per device."""
    row = {name: float(x) for name, x in metrics.items() if not isinstance(x, Tensor)}
    tensors = {name: x.detach() for name, x in metrics.items() if isinstance(x, Tensor)}
    for device in {x.device for x in tensors.values()}:
        here = {name: x for name, x in tensors.items() if x.device == device}
        row |= dict(zip(here, torch.stack([x.double().reshape(()) for x in here.values()]).tolist(), strict=True))
    return {name: row[name] for name in metrics}


def contents(*values: Any) -> dict[str, str]:
    """The SHA-256 of each file of code that texts name, `FILE.py:NAME`, by its name."""
    texts = [x for value in values for x in (value if isinstance(value, tuple) else (value,)) if isinstance(x, str)]
    files = [Path(x.rpartition(":")[0]) for x in texts if ".py:" in x]
    return {x.name: hashlib.sha256(x.read_bytes()).hexdigest()[:12] for x in files if x.is_file()}


def _check_loggers(names: Sequence[str]) -> None:
    """Raise OptionError for one that is not installed."""
    for name in names:
        if not installed(name):
            raise OptionError("log", f"log is {name}, which is not installed: pip install policygrad[{name}]")


def _on_rank(options: Any, defaults: Any = None) -> Any:
    """The options on this rank: of several GPUs, each has its own.

    Raises OptionError for what several ranks cannot have, or one process has no use for.
    """
    if ranks.size() == 1:
        alone = getattr(options, "samplers", None) is None
        if defaults is not None and options.rank_time_limit != defaults.rank_time_limit and alone:
            said = "rank_time_limit is of several ranks, and this is one process"
            raise OptionError("rank_time_limit", f"{said}: start it by torchrun, or leave it out")
        if getattr(options, "shard", False) and defaults is not None:
            said = "shard is of several ranks, and this is one process: start it by torchrun, or leave it out"
            raise OptionError("shard", said)
        whole = {"shard": False, "gradient_sync": "micro_batch"}
        return replace(options, **whole) if getattr(options, "shard", False) else options
    if getattr(options, "samplers", None) is not None:
        said = "samplers are of one learner, and ranks sample for themselves"
        raise OptionError("samplers", f"{said}: leave out samplers or torchrun")
    if getattr(options, "lag", 0):
        raise OptionError("lag", "lag is of one process, and this is one of several: start it without torchrun")
    learned = getattr(options, "normalize_observations", False) or getattr(options, "scale_rewards", False)
    if getattr(options, "overlap", False) and learned:
        said = "overlap is on, and ranks share running statistics between rollouts"
        raise OptionError("overlap", f"{said}: leave out overlap, or normalize_observations and scale_rewards")
    return replace(options, device=ranks.device(options.device))


def _cut_as(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer, with the numbers of each parameter sharded as the parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {name: ranks.cut_as(x, parameters[i]) for name, x in one.items()} for i, one in saved["state"].items()}
    return {**saved, "state": state}


def _next(iterations: Iterator[Any], iteration: int) -> Any:
    """The metrics of the next iteration. Raises NonFiniteError, which says the iteration."""
    try:
        return next(iterations)
    except (ValueError, RuntimeError) as error:
        found = as_non_finite(error)
        if found is None:
            raise
        said = NonFiniteError(f"training stopped in iteration {iteration}: {found}")
        said.evidence = found.evidence
        raise said from error


def _check_count(task: Any, values: dict[str, Any]) -> None:
    """Set num_envs from the given environments. Raises OptionError if the option contradicts them."""
    if isinstance(task, gymnasium.Env | VectorEnv):
        count = getattr(task.unwrapped, "num_envs", 1)
        if values.setdefault("num_envs", count) != count:
            raise OptionError(
                "num_envs", f"num_envs is {values['num_envs']}, and the environment handed in is {count}: leave it out"
            )


def _check_shape_read(options: Any, defaults: Any, policy: Any, critic: Any) -> None:
    """Raise UserError for an option of the default networks if the user's own modules replace them."""
    own_policy = policy is not None
    both = own_policy and (critic is not None or not has_critic(options))
    unread = {"distribution": own_policy, "state_dependent_std": own_policy, "initial_log_std": own_policy}
    unread |= {"critic_encoder": critic is not None}
    unread |= dict.fromkeys(("encoder", "channels", "autocast", "hidden", "activation", "orthogonal"), both)
    for name, ignored in unread.items():
        if ignored and getattr(options, name, None) != getattr(defaults, name, None):
            raise OptionError(name, f"{name} shapes the networks made here, and you hand in your own: leave {name} out")
