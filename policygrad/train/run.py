"""A run: a trained policy to evaluate, save and load, on any world."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from policygrad.errors import UserError
from policygrad.train.checkpoints import write_json
from policygrad.train.generators import Generators
from policygrad.train.methods import METHODS
from policygrad.train.options import check_bounds, options_of, with_values
from policygrad.train.reports import Row, draw_curve
from policygrad.train.worlds import world_of
from policygrad.train.worlds.world import Evaluation, World


@dataclass
class Run:
    """A trained policy, with everything needed to use, evaluate and save it."""

    method: str
    options: Any
    preset: str | None
    world: World
    directory: Path | None = None
    metrics: list[Row] = field(default_factory=list)
    seconds: float = 0.0
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

    def evaluate(self, count: int | None = None, *, seed: int = 1000, greedy: bool | None = None) -> Evaluation:
        """Evaluate the current policy.

        count: episodes (control; 10), or completions of each held-out prompt (language; as in training). greedy: take
        the policy's mode instead of samples; the default in control, not in language. On `exact:` worlds J is exact.
        """
        if not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}: it must be 0 or more and less than 2**63")
        with Generators(seed).inside(), arithmetic(self.world, self.options.threads):
            return self.world.evaluate(count, seed=seed, greedy=greedy)

    def save(self, directory: Path | str) -> None:
        """Write the run directory: config.json, the world's files of policy and critic, and curve.png."""
        directory = Path(directory)
        make_directory(directory)
        write_json(directory / "config.json", self.configuration())
        self.world.save(directory)
        if self.world.kind == "language":
            from policygrad.train.worlds.language import card

            (directory / "model" / "README.md").write_text(card(self))
        if self.metrics:
            draw_curve(self.metrics, f"{self.method} on {self.world.name}", directory / "curve.png", self.world.curve())

    @classmethod
    def load(cls, directory: Path | str) -> "Run":
        """Load the run in a directory, for use and evaluation. Raises UserError if the run is missing or damaged."""
        directory = Path(directory)
        try:
            config = json.loads((directory / "config.json").read_text())
            method, kind, task, given = (config[name] for name in ("method", "world", "task", "options"))
            values = {name: float(x) if x in ("inf", "-inf", "nan") else x for name, x in given.items()}
            if method not in METHODS or kind not in ("control", "language", "exact"):
                raise ValueError(f"there is no {method} on {kind}")
            options = with_values(options_of(method, kind)(), values)
            check_bounds(options)
        except UserError as error:
            raise UserError(f"{directory}/config.json is damaged: {error}"[:200]) from error
        except OSError as error:
            raise UserError(f"{directory} is no run directory ({error.strerror}): give one that train wrote") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{directory}/config.json is damaged ({type(error).__name__}: {error}): give a run's directory"[:200]
            ) from error
        run = cls(method, options, config.get("preset"), world_of(kind)(task, options), directory)
        with arithmetic(run.world, options.threads), torch.random.fork_rng([]):  # new modules draw their weights
            run.world.load(directory)
        return run

    def configuration(self) -> dict[str, Any]:
        """Everything that the run was started with."""
        return {
            "method": self.method,
            "world": self.world.kind,
            "task": self.world.stored(),
            "preset": self.preset,
            "options": {name: json_number(x) for name, x in dataclasses.asdict(self.options).items()},
            "versions": self.world.versions(),
        }

    def summary(self) -> dict[str, Any]:
        """The JSON that `policygrad train --json` prints."""
        steps = int(self.metrics[-1]["steps"]) if self.metrics else 0
        judged = {"before": self.before, "after": self.after} if self.world.judged else {}
        return {
            "run": None if self.directory is None else str(self.directory),
            "method": self.method,
            "world": self.world.kind,
            "task": self.world.name,
            "preset": self.preset,
            "steps": steps,
            "seconds": round(self.seconds, 3),
            "steps_per_second": round(steps / max(self.seconds, 1e-9), 1),
            **self.world.summary(self.metrics),
            **{when: None if x is None else x.summary() for when, x in judged.items()},
        }


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


def make_directory(directory: Path) -> None:
    """Create a writable directory. Raises UserError if that fails."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise UserError(f"the directory {directory} cannot be written ({error.strerror}): choose another") from error


def json_number(x: Any) -> Any:
    """The number, or text if it is infinite or NaN, which JSON does not have."""
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x
