"""What training needs to know of a world: its policy, critic and sampler, and how to judge, keep and describe them."""

from abc import ABC, abstractmethod
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from policygrad.train.reports import Curve, Row


@runtime_checkable
class Evaluation(Protocol):
    """What a policy scored."""

    @property
    def score(self) -> float:
        """The one number: mean return, or mean reward."""

    def line(self) -> str:
        """In a line."""

    def summary(self) -> dict[str, Any]:
        """In terms of JSON."""


@dataclass
class Own:
    """What a user hands in instead of what the world would make."""

    policy: Any = None  # a module, or a function that makes one
    critic: Any = None
    engine: Any = None  # what samples completions


class World(ABC):
    """A task with its options. `build` makes what is to be trained, or `load` what was; then it can be judged."""

    kind: ClassVar[str]
    dtype: ClassVar[torch.dtype | None] = None  # of whatever is made without one; None: torch's default
    judged: str | None = None  # what the score before, during and after training is called; None: it is not judged
    policy: nn.Module
    critic: nn.Module | None = None
    sample: Any  # the sampler, with `steps` (decisions so far) and a state_dict

    def __init__(self, task: Any, options: Any) -> None:
        self.task, self.options = task, options

    @property
    @abstractmethod
    def name(self) -> str:
        """What the task is called."""

    @abstractmethod
    def build(self, own: Own, progress: bool) -> None:
        """Make policy, critic and sampler as the options say; random numbers come from torch's global generator."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Take policy, critic and what belongs to them from a run directory. Raises UserError."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write them to a run directory, each file whole or not at all."""

    @abstractmethod
    def evaluate(self, count: int | None = None, *, seed: int = 1000, greedy: bool | None = None) -> Evaluation:
        """Judge the policy as it is, on `count` episodes or completions a prompt, with random numbers of its own."""

    @abstractmethod
    def decisions(self) -> int:
        """How many the sampler has taken so far."""

    def reference(self) -> nn.Module:
        """The policy as it is now, frozen."""
        return deepcopy(self.policy).requires_grad_(False)

    def modules(self) -> nn.ModuleDict:
        """What is trained."""
        critic = {} if self.critic is None else {"critic": self.critic}
        return nn.ModuleDict({"policy": self.policy, **critic})

    def solved(self, row: Row) -> bool:
        """May training stop early?"""
        return False

    def speeds(self, row: Row, before: Row, seconds: float) -> Row:
        """How fast the iteration was. seconds: what it took; row["seconds"]: since training began."""
        return {"steps_per_second": row["steps"] / max(row["seconds"], 1e-9)}

    @abstractmethod
    def status(self, row: Row) -> list[str]:
        """The newest numbers, for the progress line."""

    @abstractmethod
    def curve(self) -> Curve:
        """What the learning curve shows."""

    @abstractmethod
    def summary(self, rows: list[Row]) -> dict[str, Any]:
        """What `policygrad train --json` says of this world."""

    @abstractmethod
    def result(self, rows: list[Row], seconds: float) -> str:
        """What training came to, in a line."""

    def notes(self, run: Any) -> list[str]:
        """What a reader of the result should know."""
        return []

    def stored(self) -> str | None:
        """The task as config.json keeps it; None if it has no name to find it by."""
        return self.task if isinstance(self.task, str) else None

    def versions(self) -> dict[str, str]:
        """Of the packages that decide the numbers."""
        return {"torch": torch.__version__}

    def close(self) -> None:
        """Give back what was opened."""
        return
