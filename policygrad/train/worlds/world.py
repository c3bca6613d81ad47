"""The interface of a world: its policy, critic and sampler, and how to evaluate, save and describe them."""

import warnings
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

import policygrad
from policygrad import ranks
from policygrad.errors import Note, UserError, ending
from policygrad.files import read_tensors
from policygrad.train.checkpoints import Stage, fill, fits, part_of
from policygrad.train.options import OptionError
from policygrad.train.reports import Curve, Row


@runtime_checkable
class Evaluation(Protocol):
    """The result of evaluating a policy."""

    @property
    def score(self) -> float:
        """The main number: mean return, or mean reward."""

    def line(self) -> str:
        """The result as one line."""

    def summary(self) -> dict[str, Any]:
        """The result for JSON."""


TOTALS = ("steps", "episodes", "completions", "restarts")  # metrics that add up over ranks
DECISIONS = ""  # the weight of a metric that has none of its own


@dataclass
class Own:
    """The user's own objects, which replace the world's defaults."""

    policy: Any = None  # a module, or a function that makes one
    critic: Any = None
    engine: Any = None  # the function that samples completions
    data: dict[str, Any] = field(default_factory=dict)  # rows, by the option that names a data set otherwise


class World(ABC):
    """A task with its options. Call `build` to make new modules or `load` to read trained ones, then `evaluate`."""

    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype | None] = None  # default dtype of new tensors; None: torch's default
    judged: str | None = None  # the metric name of the evaluation score in training; None: no evaluation in training
    policy: nn.Module
    critic: nn.Module | None = None
    critic_stage: Stage | None = None  # that of the critic's own file, where it has one
    demonstrations: Any = None  # the sampler of demonstrations that are mixed in, if there are any
    sample: Any  # the sampler, with `steps` (decisions so far) and a state_dict

    def __init__(self, task: Any, options: Any) -> None:
        self.task, self.options = task, options

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the task."""

    @abstractmethod
    def build(self, own: Own, progress: bool) -> None:
        """Make policy, critic and sampler from the options. Random numbers come from torch's global generator."""

    @abstractmethod
    def load(self, directory: Path) -> Stage:
        """Load policy, critic and their state from a run directory. Raises UserError if that fails."""

    def begin_from(self, directory: Path) -> None:
        """Take the policy of another run, and its critic if it fits. Raises UserError if the policy does not."""
        path = directory / "policy.safetensors"
        if not path.exists():
            raise UserError(f"{ending(str(directory), 80)} holds no policy to begin from: give the directory of a run")
        tensors, _ = read_tensors(path)
        fill(self.policy, part_of(tensors, "policy."), path)
        critic = part_of(tensors, "critic.")
        if self.critic is not None and critic and fits(self.critic, critic):
            self.critic.load_state_dict(critic)
        elif self.critic is not None:
            said = "has a critic that does not fit" if critic else "has no critic"
            warnings.warn(f"{ending(str(directory), 80)} {said}: the critic begins anew", Note, stacklevel=2)

    @abstractmethod
    def save(self, directory: Path, stage: Stage) -> None:
        """Write policy, critic and their state to a run directory, each file atomically and with the stage in it."""

    @abstractmethod
    def evaluate(self, count: int | None = None, *, seed: int = 1000, greedy: bool | None = None) -> Evaluation:
        """Evaluate the current policy on `count` episodes, or completions per prompt, with its own random numbers."""

    def judge(self) -> Evaluation:
        """Evaluate the current policy in training, for the metric `judged`."""
        return self.evaluate()

    def scores(self, evaluation: Evaluation) -> Row:
        """What a row of metrics gets of an evaluation in training."""
        assert self.judged is not None
        return {self.judged: evaluation.score}

    def reference(self) -> nn.Module:
        """A frozen copy of the current policy."""
        return deepcopy(self.policy).requires_grad_(False)

    def beside(self) -> dict[str, str]:
        """The digests of models beside policy and critic that never change, and that no run's directory holds."""
        return {}

    def data_digests(self) -> dict[str, str]:
        """The digests of the data that is learned from, by what it is in words."""
        return {}

    def fingerprint(self) -> list[float]:
        """Numbers that change whenever training changes something that `save` writes."""
        changing = (p for p in self.modules().parameters() if p.is_floating_point())  # codes of 4 bits do not
        parameters = [ranks.local(p.detach()) for p in changing]
        return torch.stack(list(torch._foreach_norm(parameters, 1, dtype=torch.float64))).tolist()

    def modules(self) -> nn.ModuleDict:
        """The modules to train."""
        critic = {} if self.critic is None else {"critic": self.critic}
        return nn.ModuleDict({"policy": self.policy, **critic})

    def rows_of_rank(self, name: str, together: int = 1) -> int:
        """This rank's share of the option `name`, a number of rows; rows that are compared stay `together`.

        Raises OptionError if it leaves a rank without work.
        """
        count = getattr(self.options, name) // together
        if count < ranks.size():
            each = "" if together == 1 else f" in groups of {together}"
            needed = ranks.size() * together
            said = f"{name} is {count * together:,}{each}, which leaves one of {ranks.size()} ranks without work"
            raise OptionError(name, f"{said}: give at least {needed:,}, or start fewer ranks")
        own = ranks.share(count)
        return (own.stop - own.start) * together

    def part(self, row: Row) -> Any:
        """What a rank tells the others of its last rollout: its metrics, and of how many numbers each is the mean.

        The count of DECISIONS is that of all other metrics.
        """
        return row, {DECISIONS: 1.0}

    def joined(self, parts: list[Any]) -> Row:
        """The metrics of all ranks as those of one rollout, from what `part` returned on each."""
        joined: Row = {}
        for name in dict.fromkeys(name for row, _ in parts for name in row):
            found = [(row[name], count.get(name, count[DECISIONS])) for row, count in parts if name in row]
            values, weights = zip(*found, strict=True)
            if name in TOTALS:
                joined[name] = sum(values)
            elif len({*values}) == 1:
                joined[name] = values[0]
            elif any(weights):
                joined[name] = sum(x * n for x, n in found) / sum(weights)
        return joined

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of the weights."""
        return False

    def shard(self) -> None:
        """Give each rank its part of policy, critic and reference, if the options say so. All ranks call it."""
        return

    def whole(self) -> AbstractContextManager[None]:
        """A block in which each rank has the whole policy, for passes of its own. All ranks enter and leave it."""
        return nullcontext()

    def cut(self) -> None:
        """Let go of weights of other ranks that are still there."""
        return

    def collect(self) -> dict[str, Any]:
        """The tensors of the modules, whole. Of a sharded world, on rank 0, which `save` writes: all ranks call it."""
        return self.modules().state_dict()

    def watch(self, profile: Any, learner: Any) -> None:
        """Measure the time of the pieces of this world's sampler and of the learner: see profiling.Profile."""
        profile.watch(learner, self.sample, ("acting", "acting", "update"))

    def surroundings(self) -> Any:
        """What changes outside of policy, critic and sampler, for a checkpoint; None if there is nothing."""
        return None

    def restore(self, surroundings: Any) -> str | None:
        """Bring back what `surroundings` returned. Returns why the run cannot go on as if it had not been stopped.

        Raises UserError where it cannot go on at all.
        """
        return None

    def restore_common(self, surroundings: Any) -> None:
        """Bring back what all ranks have in common of what `surroundings` returned. Raises UserError as restore."""
        return

    def after(self, iteration: int) -> None:
        """So many iterations are over."""
        return

    def solved(self, row: Row) -> bool:
        """Whether training can stop early."""
        return False

    def speeds(self, row: Row, before: Row, seconds: float) -> Row:
        """The speed of the iteration. seconds: its duration; row["seconds"]: the time since training began."""
        return {"steps_per_second": row["steps"] / max(row["seconds"], 1e-9)}

    @abstractmethod
    def status(self, row: Row) -> list[str]:
        """The newest numbers, for the progress line."""

    @abstractmethod
    def curve(self) -> Curve:
        """The axes of the learning curve."""

    @abstractmethod
    def summary(self, rows: list[Row]) -> dict[str, Any]:
        """This world's part of the JSON of `policygrad train --json`."""

    @abstractmethod
    def result(self, rows: list[Row], seconds: float) -> str:
        """The result of training as one line."""

    def notes(self, run: Any) -> list[str]:
        """Notes to print below the result."""
        return []

    def stored(self) -> str | None:
        """The task as config.json stores it; None if it has no name."""
        return self.task if isinstance(self.task, str) else None

    def versions(self) -> dict[str, str]:
        """Versions of the packages that affect the results."""
        return {"policygrad": policygrad.__version__, "torch": str(torch.__version__)}

    def close(self) -> None:
        """Release open resources."""
        return
