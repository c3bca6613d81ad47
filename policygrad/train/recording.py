"""Training to the end, with everything that a run's directory gets on the way: rows, checkpoints, the policy."""

import errno
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_flatten_with_path

from policygrad import ranks
from policygrad.errors import Kept, Note, UserError, ending, one_line
from policygrad.files import add_metadata, as_safetensors, write_durably
from policygrad.train.best import write_best
from policygrad.train.loggers import Loggers
from policygrad.train.names import resuming
from policygrad.train.reports import Log, ProgressLine, Row
from policygrad.train.snapshots import write_checkpoint
from policygrad.train.stopping import Stopped, asked, unasked

SAVE_SECONDS = 30.0  # between two saves of the policy, or longer
SAVE_SHARE = 0.02  # of the time may go into saving
EVIDENCE = "nonfinite.safetensors"  # the batch or the step with a number that is not finite
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in a quota, or in what a process may write


class FullDiskError(UserError):
    """There is no room for a checkpoint: a run that went on could lose all that it learns from here on."""


def complete(training: Any, progress: bool = True, *, signals: bool = False) -> None:
    """Train to the end. Write rows, policy and checkpoints to the run's directory, and show a line on the terminal.

    signals: the first SIGINT, SIGTERM or SIGHUP ends the run after its iteration, with a checkpoint.
    """
    run, options = training.run, training.options
    progress = progress and ranks.rank() == 0
    total = options.steps if options.steps and not options.iterations else options.iterations
    description = f"{run.method} {run.world.name}"
    with (
        Recorder(training, progress) as record,
        ProgressLine(description, total, progress) as line,
        (asked if signals else unasked)() as came,
    ):
        for row in training:
            with run.span("logging"):
                record(row)
                status = run.world.status(row)
                if "gradient_snr" in row:
                    status.insert(-1, f"SNR {row['gradient_snr']:.2g}")
                line.update(row["steps"] if total == options.steps else float(training.iteration), status)
            stopped = ranks.some(bool(came))  # each rank gets the signal, and not between the same iterations
            if stopped and not training.done:
                record.save(policy=False)  # which is saved on the way out
                raise Stopped(came[0] if came else signal.SIGTERM)


class Recorder:
    """Writes a run to its directory: rows as they come, checkpoints and the policy now and then, everything at the end.

    What cannot be written is tried again later, but a full disk stops training: the run goes on from its last
    checkpoint once there is room. When a run is stopped or fails, a note (`Kept`) on the exception says what is saved.
    Of several ranks, rank 0 writes, and the others hand it their part of a checkpoint.
    """

    def __init__(self, training: Any, progress: bool = False) -> None:
        self.training, self.run, self.clock = training, training.run, SaveClock()
        self.log = None if self.run.directory is None else Log(self.run.directory, training.resumed)
        self.saved = (training.iteration or None) if training.resumed else None  # that of the last checkpoint
        self.warned = False
        self.state: dict[str, Any] | None = None  # of all ranks, to be written
        self.collected = None if training.resumed else training.iteration  # whose weights rank 0 has of all ranks
        self._keep_best()
        self.loggers = Loggers(training.run, progress)

    def __call__(self, row: Row) -> None:
        if ranks.size() == 1 and self.log is None:
            return
        if self.log is not None and self.run.metrics and self.run.metrics[-1] is row:
            self.log.write(row)
        self._keep_best()
        if self.log is not None:
            self.loggers.tell()
        every = self.training.options.checkpoint_every
        due = self.training.iteration % every == 0 if every else ranks.some(ranks.rank() == 0 and self.clock.due())
        if due or self.training.done:  # then the policy is saved on the way out, too
            self.save(policy=due)

    def save(self, *, policy: bool = True) -> None:
        """Write a checkpoint, then the policy. Where that fails, a later save may succeed."""
        if ranks.size() > 1 and self.training.options.checkpoints:
            self.state = self.training.state_dict()
        elif self.training.world.sharded:
            self.training.world.collect()
        self.collected = self.training.iteration
        with self.clock, ranks.agreed():
            if self.log is None:
                return
            writes = [self._write_best, self.write_checkpoint, *([self.run.write_policy] if policy else [])]
            self._written(*writes, said=policy)  # without it, the policy is saved on the way out, which will say so

    def _keep_best(self) -> None:
        """Keep the current policy at once if an evaluation has just said that it is the best."""
        best, keep = self.training.best, self.training.options.keep_best and self.log is not None
        is_best = self.training.options.keep_best and best.iteration == self.training.iteration > 0
        if self.training.world.sharded and is_best and self.collected != self.training.iteration:
            self.training.world.collect()
            self.collected = self.training.iteration
        if keep and not best.written and best.iteration == self.training.iteration:
            self._written(self._write_best, said=True)

    def _written(self, *writes: Callable[[Path], None], said: bool) -> None:
        """Write to the run's directory. Raises FullDiskError; what else fails is a warning, if `said`."""
        assert self.run.directory is not None
        try:
            for write in writes:
                write(self.run.directory)
        except Exception as error:  # of the system, or of a library's own kind
            problem = unwritable(self.run.directory, error)
            if number_of(error) in FULL:
                problem = f"{problem} in iteration {self.training.iteration:,}"
                raise FullDiskError(f"{problem}: make room, and resume the run") from error
            if said:
                warnings.warn(f"{problem}: training goes on, and {self.run.kept('there')}", Note, stacklevel=3)

    def _write_best(self, directory: Path) -> None:
        """Write the current policy to RUN/best if it is the best so far. Raises OSError."""
        if self.training.options.keep_best and self.training.best_now():
            write_best(self.run, directory)
            self.training.best.written = True

    def write_checkpoint(self, directory: Path) -> None:
        """Write the whole run, between two iterations. Raises OSError."""
        assert self.log is not None
        if self.training.options.checkpoints == 0:
            return
        state = self.training.checkpoint(self.log.position(), self.state)
        surroundings = state["training"].get("ranks", [state["training"]])[0]["surroundings"]
        if not self.warned and isinstance(surroundings, dict) and surroundings["environments"] is None:
            self.warned = True
            said = f"{self.run.world.name} has no state that can be saved: a run that is resumed begins new episodes"
            warnings.warn(said, Note, stacklevel=2)
        write_checkpoint(directory, state, self.training.options.checkpoints)
        self.saved = self.training.iteration

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
            evidence = self._evidence(error, self.run.directory)
            stopped = isinstance(error, KeyboardInterrupt | FullDiskError)
            again = self._again(self.run.directory) if stopped else ""
            error.add_note(Kept((problem or self.run.kept()) + again + evidence))
        self.loggers.close(self.run.ended, self.run.summary())
        if error is None and problem is not None:
            raise UserError(problem)

    def _evidence(self, error: BaseException, directory: Path) -> str:
        """Keep the numbers around one that is not finite, and say where."""
        if getattr(error, "evidence", None) is None:
            return ""
        try:
            found = tree_flatten_with_path(error.evidence)[0]  # type: ignore[attr-defined]
            tensors = {".".join(map(_plain, path)): torch.as_tensor(x) for path, x in found if _is_numbers(x)}
            write_durably(directory / EVIDENCE, as_safetensors(tensors, {"error": one_line(error, 200)}))
        except Exception as problem:  # whatever it is, the error itself must be seen
            return f"; {EVIDENCE} is missing: {unwritable(directory, problem)}"
        return f"; the numbers around it are in {EVIDENCE}"

    def _again(self, directory: Path) -> str:
        """How to go on with a run that is stopped."""
        if self.saved is None:
            return ""
        back = (
            f" from iteration {self.saved:,}" if self.saved != self.training.iteration or self.run.stage.partway else ""
        )
        command = resuming(directory, self.run.world.kind, self.run.world.stored(), self.run.options)
        return f"; to go on{back}: {command}"

    def _finish(self, directory: Path) -> str | None:
        """Save for the last time. If the directory cannot be written, save elsewhere, and return what happened."""
        behind = self.training.world.sharded and (
            self.collected != self.training.iteration or self.run.stage.partway  # other ranks may have ended
        )
        if behind or not self.training.sound():  # it stopped in the middle of an iteration: what was saved before stays
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


def _is_numbers(x: Any) -> bool:
    return isinstance(x, torch.Tensor) or (isinstance(x, np.ndarray) and x.dtype.kind in "biuf")


def _plain(key: Any) -> str:
    """The name of a dict's entry or an object's attribute, or the number of a list's entry."""
    return str(next(getattr(key, x) for x in ("key", "name", "idx") if hasattr(key, x)))


def number_of(error: BaseException) -> int | None:
    """The system's number of an error, or of what caused it; safetensors has it in its text alone."""
    found = getattr(error, "errno", None)
    if found is None and (said := re.search(r"\(os error (\d+)\)", str(error))) is not None:
        found = int(said[1])
    if found is None and error.__cause__ is not None:
        return number_of(error.__cause__)
    return found


def unwritable(directory: Path, error: Exception) -> str:
    """What is wrong with a directory, in a few words."""
    cause = error.__cause__ or error  # of an error that names the directory itself
    said = one_line(getattr(cause, "strerror", None) or cause, 40)
    return f"{ending(str(directory), 40)} cannot be written ({said})"
