"""policygrad reproduce: train a run again from its directory alone, and compare every number."""

from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policygrad import ranks
from policygrad.errors import UserError, ending, listed
from policygrad.files import read_json
from policygrad.machine import described
from policygrad.train.directories import CLAIM
from policygrad.train.hub import directory_of
from policygrad.train.reports import ProgressLine, Row, read_rows
from policygrad.train.resuming import Written
from policygrad.train.run import Run
from policygrad.train.snapshots import read_checkpoint
from policygrad.train.training import Training


@dataclass(frozen=True)
class Reproduction:
    """What a run comes to when it is trained again.

    rows, parameters: how many were compared. first: where they part; None if every bit is the same. machine: what
    differs between the machines and versions.
    """

    rows: int
    parameters: int
    first: str | None
    machine: tuple[str, ...]

    def lines(self) -> list[str]:
        """The result in words."""
        if self.first is None:
            said = f"{self.rows:,} rows of metrics and {self.parameters:,} parameters are the same, bit for bit"
            return [f"reproduced: {said}"]
        where = "; ".join(self.machine) or "nothing that config.json says"
        return [f"not reproduced: {self.first}", f"what differs between the machines: {where}"]

    def summary(self) -> dict[str, Any]:
        """The result for JSON."""
        return {"reproduced": self.first is None, **vars(self)}


def reproduce(
    directory: Path | str,
    *,
    trust: bool = False,
    environment: Any = None,
    policy: Any = None,
    critic: Any = None,
    engine: Any = None,
    progress: bool = True,
    **repeated: Any,
) -> Reproduction:
    """Train the run in a directory again, to where it was saved, and compare metrics and parameters, bit by bit.

    Nothing is written. What a clock measured is not compared. The arguments are those of Training.resume. Raises
    UserError for a directory that holds no run, or one of which nothing is saved.
    """
    directory = directory_of(directory)
    found = Written.read(directory, trust, environment, repeated | {"critic": critic})
    before = read_json(directory / "config.json")
    if found.ranks_before:
        numbers = listed([str(x["ranks"]) for x in found.ranks_before] + [str(before.get("ranks", 1))], 40)
        said = f"{ending(str(directory), 80)} was trained by {numbers} ranks, one number after the other"
        raise UserError(f"{said}: only a run of one number of ranks can be trained again")
    if before.get("ranks", 1) != ranks.size():
        said = f"{ending(str(directory), 80)} was trained by {before['ranks']} ranks"
        raise UserError(f"{said}, and one process would sample otherwise: train it again by torchrun")
    checkpoint = read_checkpoint(directory)
    iteration, steps, wanted = _saved(directory, checkpoint, trust, policy, repeated)
    finally_ = found.options  # with all that it was given later
    totals, found.totals = [*found.totals], []
    if totals:
        found.options = _with_total(finally_, totals[0])
    rows = [row for row in read_rows(directory / CLAIM) if row.get("steps", 0) <= steps]
    at: dict[float, int] = {}
    with (
        Training._again(found, None, policy, critic, engine, progress) as training,
        ProgressLine(f"{found.method} again", iteration, progress) as line,
    ):
        if checkpoint is not None:
            training.check_own(checkpoint, directory, "reproduce")
        while training.iteration < iteration:
            if totals and totals[0]["iteration"] == training.iteration:
                totals.pop(0)
                training.lengthen(_with_total(finally_, totals[0]) if totals else finally_)
            row = next(training, None)
            if row is None:
                break
            at[row["steps"]] = training.iteration
            line.update(float(training.iteration), training.world.status(row))
        mine = [row for row in training.run.metrics if row["steps"]]
        if rows and mine[-1:] != [training.last] and rows[-1]["steps"] == training.last["steps"]:
            mine.append(training.last)  # the last row of a run that was stopped
        modules = training.world.modules().state_dict()
        learned = {name: x for name, x in modules.items() if name in wanted or checkpoint is None}
        first = _first_row(rows, mine, at) or _first_parameter(wanted, learned, iteration)
    now = {**training.world.versions(), **described()}
    then = {name: x for part in ("versions", "machine") for name, x in dict_of(before.get(part)).items()}
    names = dict.fromkeys([*then, *now])
    machine = tuple(f"{x} {then.get(x)} then, {now.get(x)} now" for x in names if then.get(x) != now.get(x))
    return Reproduction(len(rows), sum(x.numel() for x in wanted.values()), first, machine)


def _saved(
    directory: Path, checkpoint: dict[str, Any] | None, trust: bool, policy: Any, repeated: dict[str, Any]
) -> tuple[int, int, dict[str, Tensor]]:
    """How far the run has come, in iterations and steps, and what it had learned there."""
    if checkpoint is not None:
        return checkpoint["iteration"], checkpoint["steps"], checkpoint["training"]["modules"]
    run = Run.load(directory, trust=trust, **({} if policy is None else {"policy": policy}), **repeated)
    if run.stage.partway or not run.stage.iteration:
        raise UserError(f"{ending(str(directory), 80)} holds no whole iteration to compare with")
    return run.stage.iteration, run.stage.steps, run.world.modules().state_dict()


def dict_of(x: Any) -> dict[str, Any]:
    """An object of a file's JSON; an empty one for anything else."""
    return x if isinstance(x, dict) else {}


def _with_total(options: Any, total: dict[str, Any]) -> Any:
    return replace(options, steps=total["steps"], iterations=total["iterations"])


def _first_row(then: list[Row], now: list[Row], at: dict[float, int]) -> str | None:
    """The first number in which the rows differ; None if there is none."""
    for old, new in zip_longest(then, now):
        if old is None or new is None:
            return f"there were {len(then):,} rows of metrics, and are {len(now):,}"
        where = f"iteration {at.get(new['steps'], 0):,} ({new['steps']:,.0f} steps)"
        for name in dict.fromkeys([*old, *new]):
            if "second" not in name and old.get(name) != new.get(name):
                return f"from {where} on, {name} is {new.get(name)} and was {old.get(name)}"
    return None


def _first_parameter(then: dict[str, Tensor], now: dict[str, Tensor], iteration: int) -> str | None:
    """The first parameter in which they differ; None if there is none."""
    for name in dict.fromkeys([*then, *now]):
        if name not in then or name not in now:
            return f"{name} is {'new' if name in now else 'gone'}"
        old, new = then[name], now[name].detach().cpu()
        if old.dtype != new.dtype or not torch.equal(old.cpu(), new):
            different = int((old.cpu() != new).sum()) if old.shape == new.shape else new.numel()
            return (
                f"the metrics are the same, and after iteration {iteration:,} {different:,} numbers of {name} are not"
            )
    return None
