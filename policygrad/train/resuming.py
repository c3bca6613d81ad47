"""What a directory says that its run is, and whether that run can go on from its checkpoint."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.files import damaged, read_json, read_metadata
from policygrad.train.checkpoints import Stage
from policygrad.train.names import absolute, located
from policygrad.train.options import OptionError
from policygrad.train.run import configured, json_number
from policygrad.train.worlds import ROWS as OF_ROWS

# Options in which a run that goes on may differ: they say how it is computed and kept, and not what it is.
FREE = {
    *("trust", "trust_remote_code", "device", "threads", "profile", "gradient_noise"),
    *("checkpoint_every", "checkpoints", "keep_best", "log", "shard", "gradient_sync", "engine_python"),
    *("rank_time_limit", "step_time_limit", "reward_time_limit"),
}
TOTAL = ("iteration", "steps", "iterations")  # the names of what a run was to have, and up to where


@dataclass
class Written:
    """What a run's directory says that it is."""

    method: str
    kind: str
    task: Any
    preset: str | None
    options: Any
    rows: dict[str, Any]  # data sets that are handed in
    totals: list[dict[str, Any]]  # what the run was to have before it was to have more
    ranks_before: list[dict[str, Any]]  # how many ranks trained it, each up to an iteration

    @classmethod
    def read(cls, directory: Path, trust: bool, environment: Any, repeated: dict[str, Any]) -> "Written":
        """From a directory, with what repeats or replaces its names. Raises UserError, as Run.load does."""
        critic = repeated.get("critic")
        if critic is None or not isinstance(critic, str):
            repeated.pop("critic", None)
        _, rows = rows_apart("", repeated)
        method, kind, task, preset, options = configured(directory, repeated, trust, environment, training=True)
        if environment is not None and not isinstance(environment, str):
            task = environment
        if kind == "language" and task is not None and options.dataset:  # the task is a file of prompts, named again
            task, options = absolute(options.dataset[0]), replace(options, dataset=())
        if task is None and kind == "control":
            raise UserError(
                "the environment of this run has no name to find it by: in Python, "
                f"policygrad.resume({ending(str(directory), 60)!r}, environment=...) takes the object of training"
            )
        path = directory / "config.json"
        config = read_json(path)
        totals, ranks_before = config.get("totals", []), config.get("ranks_before", [])
        for name, parts, keys in (("totals", totals, TOTAL), ("ranks_before", ranks_before, ("iteration", "ranks"))):
            numbers = [part.get(x) for part in parts for x in keys] if _are_dicts(parts) else [""]
            if not all((x is None and name == "totals") or (type(x) is int and 0 <= x < 2**63) for x in numbers):
                raise damaged(path, f"its {name} make no sense")
        return cls(method, kind, task, preset, located(options), rows, totals, ranks_before)


def _are_dicts(x: Any) -> bool:
    return isinstance(x, list) and all(isinstance(entry, dict) for entry in x)


def longer(options: Any, checkpoint: dict[str, Any]) -> bool:
    """Whether the run is to be longer than it was to be at the checkpoint."""
    return any(getattr(options, name) != checkpoint["options"][name] for name in ("steps", "iterations"))


def extended(options: Any, steps: int | None, iterations: int | None) -> Any:
    """The options of a run with so many more steps or iterations."""
    more = {"steps": steps, "iterations": iterations}
    for name, x in more.items():
        if x is not None and (type(x) is not int or x < 1):
            raise OptionError(name, f"{name} is {shortened(x, 40)}: it must be a whole number, at least 1")
        if x is not None and getattr(options, name) is None:
            other = "iterations" if name == "steps" else "steps"
            raise OptionError(name, f"the run is measured in {other}: give {other}, how many more to train")
    return replace(options, **{name: getattr(options, name) + x for name, x in more.items() if x is not None})


def check_resumable(directory: Path, options: Any, checkpoint: dict[str, Any] | None) -> None:
    """Raise UserError if the directory has no checkpoint and has been trained, if its options are no longer those of
    the checkpoint, or if there is nothing to train.
    """
    shown = ending(str(directory), 60)
    if checkpoint is None:
        if options.checkpoints == 0:
            raise UserError(f"the run in {shown} was to keep no checkpoints (checkpoints 0): train again")
        saved = [directory / "policy.safetensors", *(directory / "model").glob("*.safetensors")]
        stages = [Stage.of(read_metadata(path), path) for path in saved if path.exists()]
        if any(stage.iteration or stage.run == "best" for stage in stages):
            raise UserError(f"{shown} has a policy and no checkpoint to go on from: train again")
        return
    if not isinstance(checkpoint["compiled"], str) or checkpoint["compiled"] not in ("on", "off"):
        raise ValueError("compiled must be on or off")
    now = {name: json_number(x) for name, x in asdict(options).items()}
    for name, was in checkpoint["options"].items():
        if name in ("steps", "iterations") and was is not None and (now[name] or 0) >= was:
            continue
        if name not in FREE and json.dumps(now.get(name)) != json.dumps(was):
            said = f"{name} was {shortened(was, 40)} in training, and is {shortened(now.get(name), 40)}"
            raise UserError(f"{said}: put it back, or begin a new run")
    steps = checkpoint["steps"]
    reached = {"iterations": checkpoint["iteration"], "steps": steps}
    ended = [name for name, x in reached.items() if x >= (getattr(options, name) or math.inf)]
    if ended or (checkpoint["training"]["done"] and not longer(options, checkpoint)):
        name = ended[0] if ended else "steps" if options.steps else "iterations"
        raise UserError(f"the run in {shown} has ended, after {steps:,} steps: give {name}, how many more")


def processes(count: int) -> str:
    """So many ranks, in words."""
    return f"{count} ranks" if count > 1 else "one process"


@contextmanager
def of_a_checkpoint() -> Iterator[None]:
    """A checkpoint that holds something else than this needs is an error of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {one_line(error, 80)}"
        raise UserError(f"the checkpoint does not fit what the directory says that the run is ({said})") from error


def rows_apart(task: Any, values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The task, and data sets that are rows and not names, taken out of the values: option -> rows."""

    def named(data: Any) -> bool:
        return isinstance(data, str | Path) or (isinstance(data, list | tuple) and all(map(named, data)))

    given = {name: values.get(name) for name in ("dataset", "evaluation_dataset", "demonstrations")}
    rows = {name: values.pop(name) for name, data in given.items() if data is not None and not named(data)}
    if isinstance(task, list) or hasattr(task, "column_names"):  # a data set of `datasets`
        if "dataset" in rows or values.get("dataset"):
            raise OptionError("dataset", "the task and dataset are both data: give dataset for each set")
        rows["dataset"], task = task, None
    return (OF_ROWS if task is None and "dataset" in rows else task), rows
