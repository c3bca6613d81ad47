"""A run: a trained policy to evaluate, save and load, on any world."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from policygrad import ranks
from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.files import as_path, damaged, read_json, write_bytes, write_json
from policygrad.machine import described
from policygrad.train.checkpoints import Stage
from policygrad.train.directories import claim
from policygrad.train.generators import Generators
from policygrad.train.hub import directory_of
from policygrad.train.methods import KNOWN
from policygrad.train.names import check_trusted, outside
from policygrad.train.options import OptionError, check_bounds, options_of, with_values
from policygrad.train.profiling import Profile
from policygrad.train.reports import Row, draw_curve
from policygrad.train.worlds import is_conversation, world_of
from policygrad.train.worlds.world import Evaluation, World


@dataclass
class Run:
    """A trained policy, with everything needed to use, evaluate and save it."""

    method: str
    options: Any
    preset: str | None
    world: World
    directory: Path | None = None
    stage: Stage = field(default_factory=Stage)  # how far training was
    places: set[Path] = field(default_factory=set)  # the directories that this run has claimed
    saved: Stage | None = None  # how far it was when it was last saved in `directory`
    metrics: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    ended: str | None = None  # finished, interrupted, or the error; None while the run goes on
    totals: list[dict[str, Any]] = field(default_factory=list)  # steps and iterations before there were to be more
    ranks_before: list[dict[str, Any]] = field(default_factory=list)  # numbers of ranks, and up to which iteration
    profile: Profile | None = None  # where the time goes, if that is measured
    best: dict[str, Any] | None = None  # the best score so far, and where it was
    before: Evaluation | None = None  # scores before and after training, if the world evaluates
    after: Evaluation | None = None

    @property
    def policy(self) -> Any:
        """The current policy."""
        return self.world.policy

    @property
    def critic(self) -> nn.Module | None:
        """The critic, if the run has one."""
        return self.world.critic

    def span(self, name: str) -> Any:
        """A block whose time is of this name, if times are measured."""
        return nullcontext() if self.profile is None else self.profile.span(name)

    def act(self, obs: Any, state: Any = None, *, greedy: bool = True) -> Any:
        """The action for one observation, or the actions for a batch, as the environment gives and takes them.

        For control. The run's own normalization is applied. greedy: the mode of the distribution, else a sample. A
        policy with memory returns (action, state): hand the state in at the next step, and None where an episode
        starts.
        """
        if self.world.kind != "control":
            raise UserError(f"act is for control, and this run is on {self.world.name}: call its policy instead")
        with arithmetic(self.world, self.options.threads):
            return self.world.act(obs, state, greedy=greedy)  # type: ignore[attr-defined]

    def evaluate(
        self,
        count: int | None = None,
        *,
        seed: int = 1000,
        greedy: bool | None = None,
        environment: Any = None,
        max_steps: int | None = None,
    ) -> Evaluation:
        """Evaluate the current policy.

        count: episodes (control; 10), or completions of each held-out prompt (language; as in training). greedy: take
        the policy's mode instead of samples; the default in control, not in language. environment: another than that of
        training (control), as make_environments takes it. max_steps: cuts every episode (control). On `exact:` worlds J
        is exact.
        """
        elsewhere = {name: x for name, x in (("environment", environment), ("max_steps", max_steps)) if x is not None}
        if elsewhere and self.world.kind != "control":
            raise UserError(f"{min(elsewhere)} is for control, and this run is on {self.world.name}: leave it out")
        if not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}: it must be 0 or more and less than 2**63")
        with Generators(seed).inside(), arithmetic(self.world, self.options.threads):
            return self.world.evaluate(count, seed=seed, greedy=greedy, **elsewhere)

    def judge(self) -> Evaluation:
        """Evaluate the current policy as training does, for the metric `world.judged`."""
        with Generators(1000).inside(), arithmetic(self.world, self.options.threads):
            return self.world.judge()

    def save(self, directory: Path | str) -> None:
        """Write the run directory: the world's files of policy and critic, config.json, and curve.png.

        Raises UserError for a directory that holds anything else than this run.
        """
        directory = as_path(directory)
        if directory.resolve() not in self.places:
            claim(directory)
            self.places.add(directory.resolve())
            self.directory = self.directory or directory
        try:
            self.write(directory)
        except OSError as error:
            said = f"{ending(str(directory), 80)} cannot be written"
            raise UserError(f"{said} ({error.strerror}): make room, or choose another directory") from error

    def write(self, directory: Path) -> None:
        """Write all files of `save` to a directory that this run has claimed. Raises OSError."""
        self.write_policy(directory)
        self.describe(directory)

    def write_policy(self, directory: Path) -> None:
        """Write policy and critic alone, as often as one likes. Raises OSError, or a library's own exception."""
        self.world.save(directory, self.stage)
        if directory == self.directory:
            self.saved = self.stage

    def describe(self, directory: Path) -> None:
        """Write what describes the run: config.json, the model card, summary.json, trace.json and curve.png.

        Raises OSError.
        """
        write_json(directory / "config.json", self.configuration())  # last: where it is, the others are
        if self.world.kind == "language":
            from policygrad.train.worlds.language import card

            write_bytes(directory / "model" / "README.md", card(self).encode())
        if self.ended is not None:
            self.summarize(directory)
        if self.profile is not None and self.profile.spans:
            write_bytes(directory / "trace.json", json.dumps(self.profile.trace()).encode())
        if self.metrics:
            draw_curve(self.metrics, f"{self.method} on {self.world.name}", directory / "curve.png", self.world.curve())

    def summarize(self, directory: Path) -> None:
        """Write summary.json. Raises OSError."""
        write_json(directory / "summary.json", self.summary())

    @classmethod
    def load(
        cls,
        directory: Path | str,
        *,
        trust: bool = False,
        environment: str | None = None,
        dataset: str | None = None,
        policy: Any = None,
        **repeated: Any,
    ) -> "Run":
        """Load the run in a directory, for use and evaluation. Raises UserError if the run is missing or damaged.

        The directory is data: code that its config.json names (a reward `file.py:function`, an environment `module:Id`)
        is not run, and no file of elsewhere is read, unless the name is repeated here, or `trust` is set for a run of
        one's own. environment: the task of a control run. dataset: prompts to evaluate on in place of the held-out
        ones; `split` and `columns` are of it. policy: your own module of training, or what makes it (control).
        repeated: options, which override the run's; `trust_remote_code` is taken from here alone.
        """
        directory = directory_of(directory)
        of_dataset = {name: repeated.pop(name) for name in ("split", "columns") if name in repeated}
        if of_dataset and dataset is None:
            raise UserError(f"{min(of_dataset)} is of another data set to evaluate on, and there is none: give dataset")
        method, kind, task, preset, options = configured(directory, repeated, trust, environment)
        for name, x, its in (("policy", policy, "control"), ("dataset", dataset, "language")):
            if x is not None and kind != its:
                raise UserError(f"{name} is for {its}, and this run is on {kind}: leave it out")
        try:
            world = world_of(kind, method)(task, options)
        except (UserError, TypeError, AttributeError) as error:
            raise damaged(directory / "config.json", one_line(error)) from error
        if dataset is not None:
            world.evaluated_on = {"source": dataset, "split": options.evaluation_split, **of_dataset}
        run = cls(method, options, preset, world, directory)
        run.places.add(directory.resolve())
        with arithmetic(run.world, options.threads), torch.random.fork_rng([]):  # new modules draw their weights
            run.stage = run.world.load(directory, **({} if policy is None else {"policy": policy}))
        return run

    def kept(self, where: str = "") -> str:
        """What is saved, and where."""
        if self.saved is None:
            return "nothing was saved"
        return f"the {self.saved.policy()} is kept {where or f'in {ending(str(self.directory), 80)}'}"

    def standing(self) -> str:
        """Of which iteration the policy is, and how its run ended."""
        critic = self.world.critic_stage
        apart = "" if critic in (None, self.stage) else f"; its critic's file is of iteration {critic.iteration:,}"
        return self.stage.line() + apart

    def configuration(self) -> dict[str, Any]:
        """Everything that the run was started with."""
        return {
            "method": self.method,
            "world": self.world.kind,
            "task": self.world.stored(),
            "preset": self.preset,
            "options": {name: json_number(x) for name, x in dataclasses.asdict(self.options).items()},
            "totals": self.totals,
            "ranks": ranks.size(),
            "ranks_before": self.ranks_before,
            "versions": self.world.versions(),
            "machine": described(),
        }

    def summary(self) -> dict[str, Any]:
        """The JSON that `policygrad train --json` prints and that a run's directory keeps as summary.json."""
        steps = int(self.metrics[-1]["steps"]) if self.metrics else 0
        judged = {"before": self.before, "after": self.after} if self.world.judged else {}
        return {
            "run": None if self.directory is None else str(self.directory),
            "method": self.method,
            "world": self.world.kind,
            "task": self.world.name,
            "preset": self.preset,
            "ended": self.ended,
            "steps": steps,
            "seconds": round(self.seconds, 3),
            "steps_per_second": round(steps / max(self.seconds, 1e-9), 1),
            **self.world.summary(self.metrics),
            **{when: None if x is None else x.summary() for when, x in judged.items()},
            "best": self.best,
        }


def configured(
    directory: Path,
    repeated: dict[str, Any],
    trust: bool = False,
    environment: Any = None,
    *,
    training: bool = False,
) -> tuple[str, str, Any, str | None, Any]:
    """What a run's directory says that it is: its method, world, task, preset and options.

    repeated: options that override the run's. environment: the task of a control run, in place of its own. training:
    the run is to be trained, which follows more names than evaluating it. Raises UserError for a directory without a
    run, for a damaged one, and for names that are neither repeated nor trusted (see names.py).
    """
    path = directory / "config.json"
    if directory.name == "model" and (directory.parent / "metrics.jsonl").exists():
        shown = ending(str(directory.parent), 70)
        raise UserError(f"{shown}/model is a run's model: give the run, {shown}")
    if not path.exists():
        raise UserError(f"{ending(str(directory), 80)} is no run directory: give one that train wrote")
    config = read_json(path)
    try:
        method, kind, task, given = (config[name] for name in ("method", "world", "task", "options"))
        if method not in KNOWN or kind not in ("control", "language", "exact"):
            raise ValueError(f"there is no {shortened(method, 30)} on {shortened(kind, 30)}")
        if not isinstance(task, str | None) or not isinstance(config.get("preset"), str | None):
            raise ValueError("task and preset must be text")
        values = {name: float(x) if x in ("inf", "-inf", "nan") else x for name, x in given.items()}
        values |= dict.fromkeys({"trust", "trust_remote_code"} & values.keys(), False)
        options = with_values(options_of(method, kind)(), values)
        check_bounds(options)
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        said = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
        raise damaged(path, said) from error
    names = outside(kind, task, options, training=training)
    if environment is not None:
        if kind != "control" and not (kind == "language" and is_conversation(task)):
            raise UserError(f"environment is of runs in one, and this run is on {kind}: leave it out")
        task = environment if isinstance(environment, str) else task
        names.pop("environment", None)
    options = with_values(options, repeated)
    check_bounds(options)
    check_device(options.device)
    if trust and hasattr(options, "trust"):
        options = with_values(options, {"trust": True})
    if not trust:
        check_trusted({name: texts for name, texts in names.items() if name not in repeated})
    return method, kind, task, config.get("preset"), options


@contextmanager
def arithmetic(world: World, threads: int | None) -> Iterator[None]:
    """Set torch's precision to the world's, and the number of threads (None: unchanged); restore both afterwards."""
    before, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(threads or before)
    torch.set_default_dtype(world.dtype or dtype)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(dtype)


def check_device(name: str) -> None:
    """Raise UserError for a device that cannot be used."""
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        said = f"device {shortened(name)} cannot be used: {one_line(str(error).splitlines()[0])}"
        raise OptionError("device", said) from error


def json_number(x: Any) -> Any:
    """The value, with what JSON does not have as text: infinity and NaN, and functions, as module:name."""
    if isinstance(x, tuple):
        return tuple(json_number(entry) for entry in x)
    if callable(x):
        return f"{x.__module__}:{getattr(x, '__qualname__', type(x).__qualname__)}"
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
