"""Studies: one method on one task with several seeds, each seed in a process of its own.

A study is a directory with a run for each seed: seed-0, seed-1, ... The same study in the same directory trains the
seeds that have not finished.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from policygrad import __version__
from policygrad.errors import Kept, Note, UserError, ending, listed, one_line, shortened
from policygrad.files import as_path, damaged, read_json, write_json
from policygrad.machine import cores
from policygrad.train.comparison import Comparison, compare, outcome_of
from policygrad.train.directories import STUDY, file_name
from policygrad.train.keywords import Keywords
from policygrad.train.methods import method_named
from policygrad.train.names import NAMES
from policygrad.train.options import options_of
from policygrad.train.reports import ProgressLine
from policygrad.train.run import json_number
from policygrad.train.worlds import OWN_TASKS, is_conversation, kind_of

if TYPE_CHECKING:
    from policygrad.train.training import Training

MOST = 1000  # seeds of a study
LONGEST = 1000  # characters of a value in study.json; rows of data are longer, and stand there by their hash
BETWEEN = 0.2  # seconds between two reports of a process


@dataclass
class Study:
    """The runs of a study by their seeds, why others failed, and what all of its finished runs came to."""

    directory: Path
    runs: dict[int, Path] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    comparison: Comparison | None = None  # None if no run has finished

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "study": str(self.directory),
            "runs": {str(seed): str(path) for seed, path in sorted(self.runs.items())},
            "failed": {str(seed): said for seed, said in sorted(self.failed.items())},
            "comparison": None if self.comparison is None else self.comparison.summary(),
        }


def seeds_of(text: str) -> list[int]:
    """Seeds as they are typed: 0-9, or 0,3,7, or both. Raises UserError."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(x.isascii() and x.isdecimal() and len(x) < 20 for x in ends) or int(ends[0]) > int(ends[1]):
            raise UserError(f"seeds is {shortened(text)}: give a range such as 0-9, or a list such as 0,3,7")
        if int(ends[1]) - int(ends[0]) >= MOST:
            raise UserError(f"seeds is {shortened(text)}: a study has at most {MOST:,}")
        found += range(int(ends[0]), int(ends[1]) + 1)
    return found


def study(
    method: str,
    task: Any = None,
    *,
    seeds: Sequence[int],
    out: Path | str | None = None,
    processes: int | None = None,
    preset: str | Path | None = None,
    policy: Any = None,
    critic: Any = None,
    engine: Any = None,
    progress: bool = True,
    **keywords: Unpack[Keywords],
) -> Study:
    """Train the same run with several seeds, each in a process of its own, and sum them up.

    The run of a seed is bit for bit that of `train(..., seed=seed)`, in the directory out/seed-N; `out` is by default
    runs/TASK/METHOD-seeds. If `out` holds this study already, only the seeds that have not finished are trained, and a
    run that was stopped goes on from its checkpoint if a file can hold all of it. processes: how many at a time; by
    default as many as the cores allow with the threads of a run, and one on a device that is no CPU. The other
    arguments are those of Training; what is not text or a number must be something that cloudpickle can send to another
    process.

    A seed that fails does not stop the others: `failed` of the result says why. Raises UserError if the request is
    wrong, if `out` holds something else, or if all seeds fail.
    """
    asked = [int(x) if isinstance(x, Integral) and not isinstance(x, bool) else x for x in seeds]
    _check_seeds(asked)
    own = {"preset": preset, "policy": policy, "critic": critic, "engine": engine}
    values: dict[str, Any] = {**keywords, **{x: y for x, y in own.items() if y is not None}}
    if "seed" in values:
        raise UserError("seed is of one run, and seeds of a study: give one of the two")
    name = method_named(method).name
    request = request_of(name, task, values)
    directory = directory_of(out, request, "seeds")
    workers = _processes(processes, name, task, values, len(asked))
    with taken(directory, STUDY):
        write_json(directory / STUDY, request)
        found = Study(directory)
        for seed in asked:
            path = directory / f"seed-{seed}"
            if _finished(path):
                found.runs[seed] = path
        missing = [seed for seed in asked if seed not in found.runs]
        if progress and found.runs and missing:
            print(f"finished before: seeds {listed(map(str, found.runs), 100)}", file=sys.stderr, flush=True)
        _train(found, missing, workers, name, task, values, progress)
        if found.runs:
            try:
                found.comparison = compare(directory)
                found.comparison.save(directory)
            except UserError as error:  # no episode has ended, or the disk is full: the runs are there
                warnings.warn(str(error), Note, stacklevel=2)
    reasons = set(found.failed.values())
    if not found.runs and len(reasons) == 1:
        raise UserError(reasons.pop())
    return found


# What a study is


def _check_seeds(seeds: list[Any]) -> None:
    if not 1 <= len(seeds) <= MOST:
        raise UserError(f"there are {len(seeds):,} seeds: give 1 to {MOST:,} of them")
    wrong = [x for x in seeds if type(x) is not int or not 0 <= x < 2**63]
    if wrong:
        raise UserError(f"a seed is {shortened(wrong[0], 40)}: it must be a whole number of 0 or more, below 2**63")
    twice = [x for i, x in enumerate(seeds) if x in seeds[:i]]
    if twice:
        raise UserError(f"the seed {twice[0]} is given more than once: give each once")


def request_of(name: str, task: Any, values: dict[str, Any]) -> dict[str, Any]:
    """What the runs of a study have in common, as JSON."""

    def said(x: Any) -> Any:
        text = json.dumps(json_number(tuple(x) if isinstance(x, list) else x), default=_named)
        return json.loads(text) if len(text) < LONGEST else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"

    common = {x: said(y) for x, y in sorted(values.items())}
    return {"policygrad": __version__, "method": name, "task": said(task), "options": common}


def _named(x: Any) -> str:
    """An object that JSON lacks as a text that is the same in every process."""
    said = json_number(x) if callable(x) else str(x)
    return type(x).__name__ if " at 0x" in said else said


def directory_of(out: Path | str | None, request: dict[str, Any], what: str) -> Path:
    """The directory of a study: the given one, or the first of its default names that is free or has this study.

    Raises UserError if the given one has something else.
    """
    if out is not None:
        directory = as_path(out)
        other = _other(directory, request)
        if other is not None:
            raise UserError(f"{ending(str(directory), 80)} {other}: choose another directory")
        return directory
    task = request["task"] or (request["options"].get("dataset") or ["rows"])[0]
    default = Path("runs") / file_name(Path(str(task)).stem if "/" in str(task) else str(task))
    names = (f"{request['method']}-{what}" + (f"-{i}" if i > 1 else "") for i in count(1))
    return next(default / x for x in names if _other(default / x, request) is None)


def _other(directory: Path, request: dict[str, Any]) -> str | None:
    """What a directory holds that is not this study; None if it is free, or has the study."""
    if not directory.exists() and not directory.is_symlink():
        return None
    if not directory.is_dir():
        return "is a file"
    if (directory / STUDY).exists():
        known = read_json(directory / STUDY)
        if not isinstance(known, dict) or not isinstance(known.get("options"), dict):
            raise damaged(directory / STUDY, "it describes no study")
        if known == request:
            return None
        flat = [{**x, **x["options"]} for x in (known, request)]
        names = [x for x in {**flat[0], **flat[1]} if x != "options" and flat[0].get(x) != flat[1].get(x)]
        return f"holds a study that differs in {listed(names, 60)}"
    return "is not empty, and holds no study" if any(directory.iterdir()) else None


def _processes(given: Any, name: str, task: Any, values: dict[str, Any], seeds: int) -> int:
    """How many processes at a time."""
    if given is not None and (type(given) is not int or not 1 <= given <= MOST):
        raise UserError(f"processes is {shortened(given, 30)}: it must be a whole number between 1 and {MOST:,}")
    kind = kind_of(task if isinstance(task, str) or not _is_rows(task) else "rows", values)
    threads = values.get("threads", options_of(name, kind)().threads) or cores()
    default = max(1, cores() // threads) if str(values.get("device", "cpu")) == "cpu" else 1
    return min(given or default, max(1, seeds))


def _is_rows(task: Any) -> bool:
    return isinstance(task, list) or hasattr(task, "column_names")


@contextmanager
def taken(directory: Path, *own: str) -> Iterator[None]:
    """Hold a study's directory: of two processes one gets it. The system lets go of it if this process dies.

    own: the study's own files, removed again if no run has begun.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        held = os.open(directory, os.O_RDONLY)
    except OSError as error:
        said = f"{ending(str(directory), 80)} cannot be written ({error.strerror})"
        raise UserError(f"{said}: choose another directory") from error
    try:
        with suppress(ImportError):  # there is no fcntl on Windows
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        raise UserError(f"{ending(str(directory), 80)} is being trained by another process: let it end") from error
    try:
        yield
    finally:
        if {path.name for path in directory.iterdir()} <= {*own}:
            with suppress(OSError):
                for name in own:
                    (directory / name).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
        os.close(held)


def _finished(path: Path) -> bool:
    """Whether a seed's directory holds a run that has finished."""
    return path.is_dir() and outcome_of(path) == "finished"


# The processes


def _train(
    found: Study, seeds: list[int], workers: int, name: str, task: Any, values: dict[str, Any], progress: bool
) -> None:
    """Train the seeds, `workers` at a time, and note in `found` what becomes of them."""
    named = task if isinstance(task, str) else getattr(task, "__name__", type(task).__name__)
    label = f"{name} {one_line(named, 40)}, seeds"
    every = len(seeds) + len(found.runs)
    shares: dict[int, tuple[float, str]] = {}
    stop = threading.Event()
    children = [_Child(found.directory / f"seed-{seed}", seed, workers, name, task, values, stop) for seed in seeds]

    with ProgressLine(label, every, progress) as line, ThreadPoolExecutor(max(1, workers)) as pool:

        def tell(seed: int, share: float, status: str) -> None:
            shares[seed] = share, status
            running = [f"seed {x}: {said}" for x, (done, said) in sorted(shares.items()) if done < 1 and said]
            line.update(len(found.runs) + sum(done for done, _ in shares.values() if done < 1), running)

        def say(text: str) -> None:
            if progress:
                line.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

        notes: set[str] = set()

        def note(seed: int, text: str) -> None:
            if text not in notes:
                notes.add(text)
                say(f"note (seed {seed}): {text}")

        jobs = {pool.submit(child.train, tell, note): child for child in children}
        try:
            for job in as_completed(jobs):
                child = jobs[job]
                shares.pop(child.seed, None)
                try:
                    result = job.result()
                except UserError as error:
                    found.failed[child.seed] = str(error)
                    say(f"seed {child.seed}: {error}")
                    continue
                found.runs[child.seed] = child.path
                say(f"seed {child.seed}: {result}")
        except BaseException as error:
            stop.set()
            for job in jobs:
                job.cancel()
            for child in children:
                child.stop()
            pool.shutdown()
            error.add_note(Kept(_standing(found, seeds)))
            raise


def _standing(found: Study, seeds: list[int]) -> str:
    """What a study that is stopped has, and how to go on."""
    done = [seed for seed in seeds if _finished(found.directory / f"seed-{seed}")]
    left = [seed for seed in seeds if seed not in done]
    return (
        f"{len(found.runs | dict.fromkeys(done))} seeds are finished in {ending(str(found.directory), 50)}; the same "
        f"command trains the others ({listed(map(str, left), 30)})"
    )


class _Child:
    """A process that trains one seed, one of `beside` at a time.

    It is told what to train on its standard input, and stops when that closes.
    """

    def __init__(
        self, path: Path, seed: int, beside: int, name: str, task: Any, values: dict[str, Any], stopped: threading.Event
    ) -> None:
        self.path, self.seed, self.beside, self.stopped = path, seed, beside, stopped
        self.job = (name, task, {**values, "seed": seed, "out": str(path)})
        self.process: subprocess.Popen[bytes] | None = None

    def train(self, tell: Callable[[int, float, str], None], note: Callable[[int, str], None]) -> str:
        """Train to the end, and return the result in words. Raises UserError if that fails."""
        make_room(self.job)
        job = _sent(self.job)
        code = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
        code += f"from policygrad.machine import share; share({self.beside}); "
        code += "from policygrad.train.studies import child; child()"
        path = json.dumps([x for x in sys.path if isinstance(x, str)])
        process = self.process = subprocess.Popen(
            [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(len(job).to_bytes(8, "little") + job)
            process.stdin.flush()
        if self.stopped.is_set():
            self.stop()
        said: dict[str, Any] = {}
        for line in process.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # it died while it wrote
                said = {}
                break
            if "share" in said:
                tell(self.seed, said["share"], said["status"])
            elif "note" in said:
                note(self.seed, said["note"])
            else:
                break
        process.stdout.close()
        self.stop()
        code_ = process.wait()
        if "result" in said:
            return said["result"]
        if "error" in said:
            raise UserError(said["error"])
        how = f"by signal {-code_}" if code_ < 0 else f"with exit code {code_}"
        hint = ": there may be too little memory; lower processes" if code_ == -signal.SIGKILL else ""
        raise UserError(f"the process of seed {self.seed} ended {how}{hint}")

    def stop(self) -> None:
        """Close the pipe, on which the process saves what it has, and ends."""
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()


Job = tuple[str, Any, dict[str, Any]]  # the method, the task, and what else Training takes, its directory `out` too


def make_room(job: Job) -> None:
    """Remove a run of this job that has not finished, unless it goes on: the end is the same, bit for bit."""
    name, _, values = job
    path = Path(values["out"])
    if not path.exists() and not path.is_symlink():
        return
    try:
        config = read_json(path / "config.json")
        ours = config["method"] == name and config["options"]["seed"] == values["seed"]
    except (UserError, KeyError, TypeError):
        ours = path.is_dir() and not path.is_symlink() and {*os.listdir(path)} <= {"metrics.jsonl"}
    if not ours or path.is_symlink():
        raise UserError(f"{ending(str(path), 100)} holds something else than a run of this study: move it away")
    if not _goes_on(job):
        shutil.rmtree(path)


def begun(kind: type["Training"], job: Job) -> "Training":
    """The run of a job, of this class: from its checkpoint if it can go on, else from its beginning."""
    name, task, values = job
    if _goes_on(job):
        try:
            return kind.resume(values["out"], **_repeated(job))
        except UserError:  # of another version, say: it begins again
            shutil.rmtree(values["out"])
    return kind(name, task, progress=False, **values)


def _goes_on(job: Job) -> bool:
    """Whether a run can go on from its checkpoint: it has one, and no object of the user's that no file holds."""
    _, task, values = job
    plain = isinstance(task, str | None) and not any(callable(x) or _is_rows(x) for x in values.values())
    return plain and any(Path(values["out"], "checkpoints").glob("*.safetensors"))


def _repeated(job: Job) -> dict[str, Any]:
    """The names that a run leads out of its directory by, as the study has them: the run's own are not believed."""
    _, task, values = job
    found = {x: values[x] for x in (*NAMES, "trust_remote_code") if values.get(x) is not None}
    if task is not None and (is_conversation(task) or kind_of(task, values) == "control"):
        found["environment"] = task
    elif task not in (None, *OWN_TASKS) and kind_of(task, values) == "language":
        found["dataset"] = [task]
    return found


def _sent(job: Job) -> bytes:
    """A job in a form for another process."""
    from gymnasium.vector.utils import CloudpickleWrapper

    try:
        return pickle.dumps(CloudpickleWrapper(job))  # type: ignore[arg-type]
    except Exception as error:  # of any kind, from objects of the user's
        said = "a seed's process cannot be sent what it shall train"
        raise UserError(
            f"{said} ({type(error).__name__}: {one_line(error, 80)}): name it, as in module:name"
        ) from error


def child() -> None:
    """The process of one seed: read the job from standard input, train, and report on standard output."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an environment prints is no report
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    pipe = sys.stdin.buffer
    job = pipe.read(int.from_bytes(pipe.read(8), "little"))

    def report(**what: Any) -> None:
        with suppress(OSError):  # nobody reads it any more
            reports.write(json.dumps(what) + "\n")
            reports.flush()

    def watch() -> None:
        while os.read(pipe.fileno(), 4096):  # without Python's lock of stdin, which a forked process closes first
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        end = {"result": _trained(pickle.loads(job).fn, report)}
    except KeyboardInterrupt:
        end = {"error": "stopped"}
    except Exception as error:
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        end = {"error": one_line(said, 200)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pipe closes at the end, too
    report(**end)
    sys.stderr.flush()
    os._exit(0)  # without waiting for threads of others


def _trained(job: Job, report: Callable[..., None]) -> str:
    """Train as `train` does, and return the result in words."""
    import gymnasium

    from policygrad.train.recording import complete
    from policygrad.train.training import Training

    gymnasium.logger.min_level = logging.CRITICAL  # its warnings are for authors of environments
    others = warnings.showwarning

    def shown(message: Any, category: type[Warning], *place: Any) -> None:
        if issubclass(category, Note):
            report(note=str(message))
        else:
            others(message, category, *place)

    warnings.showwarning = shown  # type: ignore[assignment]

    class Reporting(Training):
        """Tells how far it is."""

        next = 0.0

        def __next__(self) -> Any:
            row = super().__next__()
            if time.monotonic() >= self.next:
                self.next = time.monotonic() + BETWEEN
                share = min(1.0, self._share(row["steps"], self.iteration))
                report(share=0.999 * share, status="  ".join(self.run.world.status(row)[:1]))
            return row

    with begun(Reporting, job) as training:
        complete(training, progress=False, signals=True)
        run = training.run
        return run.world.result(run.metrics, run.seconds)
