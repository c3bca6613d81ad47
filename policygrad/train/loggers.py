"""Loggers: wandb, mlflow and trackio, which show the rows that metrics.jsonl has in any case.

Each runs in a process of its own that copies metrics.jsonl as it grows. So a tool cannot disturb the run: it shares no
random generator, terminal or signal with training, and what it cannot deliver now is tried again later. What a run that
is resumed goes on with is in RUN/NAME.json: the tool's id of the run, and the steps of the last row that the tool has.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Final

from policygrad.errors import Note, one_line
from policygrad.train.directories import CLAIM, STUDY

PROJECT = "policygrad"  # unless the tool's own environment variables say otherwise
EVERY, RETRY = 1.0, 30.0  # seconds between two looks at metrics.jsonl, and after a failure
PATIENCE, IMPATIENCE = 60.0, 10.0  # seconds for what is left at the end; for a tool that has failed, or on an interrupt
CHUNK = 2**20  # bytes of rows at a time

Row = dict[str, float]
About = Mapping[str, Any]  # name, group, directory and configuration of a run


class Logger(ABC):
    """A tool that shows runs. Its methods raise whatever the tool raises."""

    @abstractmethod
    def open(self, about: About, known: dict[str, Any]) -> str:
        """Begin a run, or go on with the one that is `known`; put into that what to know later. Returns where it is."""

    @abstractmethod
    def write(self, rows: list[Row]) -> None:
        """Write rows, each with its steps as the tool's step."""

    @abstractmethod
    def close(self, ended: str, summary: dict[str, Any]) -> None:
        """End the run, with its summary. ended: finished, interrupted, or the error."""


class Wandb(Logger):
    """Weights & Biases, with its environment variables: WANDB_MODE=offline, WANDB_PROJECT, WANDB_ENTITY, ..."""

    def open(self, about: About, known: dict[str, Any]) -> str:
        """The run of this id, or a new one. Rows that the server has are not sent again."""
        import wandb

        chosen = {"PROJECT": PROJECT, "NAME": about["name"], "RUN_GROUP": about["group"]}
        free: dict[str, Any] = {
            x.split("_")[-1].lower(): y for x, y in chosen.items() if not os.environ.get(f"WANDB_{x}")
        }
        again = {x: known[x] for x in ("id", "project") if x in known}
        settings = wandb.Settings(console="off", silent=True)
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings.init_timeout = PATIENCE / 2  # so that there is time to say why
        config = nested(about["configuration"])
        self.run = wandb.init(**(free | again), config=config, allow_val_change=True, resume="allow", settings=settings)
        known |= {"id": self.run.id, "project": self.run.project}
        if self.run.resumed:
            known["steps"] = max(known["steps"], self.run.starting_step - 1)
        return self.run.url or f"in {Path(self.run.dir).parent}; wandb sync uploads it"

    def write(self, rows: list[Row]) -> None:
        """One line of the history for each row."""
        for row in rows:
            self.run.log(row, step=int(row["steps"]))

    def close(self, ended: str, summary: dict[str, Any]) -> None:
        """By the exit code, which wandb shows as finished, killed (interrupted) or failed."""
        self.run.summary.update(flat(summary))
        self.run.finish(exit_code={"finished": 0, "interrupted": 255}.get(ended, 1))


class MLflow(Logger):
    """MLflow, with its environment variables: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ..."""

    MOST: Final = 100, 1000  # parameters, and metrics, in a request

    def open(self, about: About, known: dict[str, Any]) -> str:
        """The run of this id, or a new one. A parameter of MLflow never changes: that of the beginning stays."""
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of its 7, since this tries again
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow
        from mlflow.entities import Param

        self.client = client = mlflow.MlflowClient()
        if "id" in known:
            client.update_run(known["id"], status="RUNNING")
        else:
            tags = {"mlflow.source.name": "policygrad"} | ({"group": about["group"]} if about["group"] else {})
            known["id"] = client.create_run(self._experiment(), run_name=about["name"], tags=tags).info.run_id
        self.id = known["id"]
        run = client.get_run(self.id)
        given = flat(nested(about["configuration"]))
        parameters = [Param(x, str(y)) for x, y in given.items() if x not in run.data.params]
        for i in range(0, len(parameters), self.MOST[0]):
            client.log_batch(self.id, params=parameters[i : i + self.MOST[0]])
        place = re.sub("//[^/@]*@", "//", mlflow.get_tracking_uri())  # without a password
        return f"{place}, experiment {client.get_experiment(run.info.experiment_id).name}, run {run.info.run_name}"

    def _experiment(self) -> str:
        if "MLFLOW_EXPERIMENT_ID" in os.environ:
            return os.environ["MLFLOW_EXPERIMENT_ID"]
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        if found is None:
            with suppress(Exception):  # another run has made it just now
                return self.client.create_experiment(name)
            found = self.client.get_experiment_by_name(name)
        return found.experiment_id

    def write(self, rows: list[Row]) -> None:
        """A metric for each number, with characters that MLflow's names lack as _."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(_plain(x), y, now, int(row["steps"])) for row in rows for x, y in row.items()]
        for i in range(0, len(metrics), self.MOST[1]):
            self.client.log_batch(self.id, metrics=metrics[i : i + self.MOST[1]])

    def close(self, ended: str, summary: dict[str, Any]) -> None:
        """Numbers of the summary are metrics, and the rest of it is tags."""
        for name, x in flat(summary).items():
            if isinstance(x, int | float) and not isinstance(x, bool):
                self.client.log_metric(self.id, _plain(f"summary/{name}"), x, step=int(summary["steps"]))
            else:
                self.client.set_tag(self.id, _plain(f"summary/{name}"), str(x))
        self.client.set_terminated(self.id, {"finished": "FINISHED", "interrupted": "KILLED"}.get(ended, "FAILED"))


class Trackio(Logger):
    """Trackio, with its environment variables: TRACKIO_DIR, TRACKIO_SPACE_ID, TRACKIO_SERVER_URL."""

    def open(self, about: About, known: dict[str, Any]) -> str:
        """The run of this name, or a new one. Trackio finds a run by its name, so a name is used once."""
        import trackio

        warnings.simplefilter("error", UserWarning)  # what trackio could not do
        resume = "allow" if "id" in known else "never"
        known.setdefault("id", f"{about['name']}-{secrets.token_hex(3)}")
        config = nested(about["configuration"])
        self.run = trackio.init(
            PROJECT, name=known["id"], group=about["group"], config=config, resume=resume, embed=False
        )
        return f"trackio show --project {PROJECT}, run {known['id']}"

    def write(self, rows: list[Row]) -> None:
        """A row of the run for each."""
        for row in rows:
            self.run.log(row, step=int(row["steps"]))

    def close(self, ended: str, summary: dict[str, Any]) -> None:
        """The summary is one more row of the last step: trackio has no other place for how a run ended."""
        self.run.log({f"summary/{x}": y for x, y in flat(summary).items()}, step=int(summary["steps"]))
        self.run.finish()


LOGGERS: dict[str, type[Logger]] = {"wandb": Wandb, "mlflow": MLflow, "trackio": Trackio}


def nested(configuration: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration with its options at the top, where these tools compare runs."""
    about = {x: configuration[x] for x in ("method", "world", "task", "preset", "versions", "machine")}
    return {**configuration["options"], **about}


def flat(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A tree of dicts as one, with names such as after.score."""
    found: dict[str, Any] = {}
    for name, x in tree.items():
        found |= flat(x, f"{before}{name}.") if isinstance(x, dict) else {before + name: x}
    return found


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def installed(name: str) -> bool:
    """Whether a tool is installed. A directory of that name, where wandb keeps runs, is none."""
    found = find_spec(name)
    return found is not None and found.origin is not None


# Beside training


class Loggers:
    """The processes of a run's loggers. Whatever becomes of them, training goes on."""

    def __init__(self, run: Any, progress: bool = False) -> None:
        self.progress, self.processes = progress, list[_Process]()
        names = () if run.directory is None else run.options.log
        if not names:
            return
        directory = run.directory.resolve()
        of_study = (directory.parent / STUDY).exists()
        about = {
            "name": f"{directory.parent.name}/{directory.name}",
            "group": f"{directory.parent.parent.name}/{directory.parent.name}" if of_study else None,
            "directory": str(directory),
            "configuration": run.configuration(),
        }
        for name in names:
            try:
                self.processes.append(_Process(name, about))
            except OSError as error:
                self._warn(name, f"has no process ({one_line(error)})")

    def tell(self) -> None:
        """Pass on what the loggers have said since the last time."""
        for process in self.processes:
            for said in process.said():
                if "problem" in said:
                    self._warn(process.name, said["problem"])
                elif self.progress and "place" in said:
                    print(f"{process.name}: {said['place']}", file=sys.stderr, flush=True)

    def close(self, ended: str, summary: dict[str, Any]) -> None:
        """End the run in every tool, and give them some time for what they still have to send."""
        for process in self.processes:
            process.end({"ended": ended, "summary": summary})
        self.tell()
        start = time.monotonic()
        try:
            for process in self.processes:
                limit = start + (IMPATIENCE if process.failing or ended == "interrupted" else PATIENCE)
                process.wait(max(0.0, limit - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill()
            self.tell()

    def _warn(self, name: str, problem: str) -> None:
        said = f"{name} {problem}: training goes on, and metrics.jsonl has every row"
        warnings.warn(said, Note, stacklevel=3)


class _Process:
    """The process of one logger: it hears what to log and how the run ends, and says where that is, or a problem."""

    def __init__(self, name: str, about: About) -> None:
        self.name, self.heard = name, SimpleQueue[dict[str, Any]]()
        self.failing, self.warned = False, False
        code = "import json, sys; sys.path[:] = json.loads(sys.argv.pop()); "
        code += "from policygrad.train.loggers import child; child()"
        command = [sys.executable, "-c", code, json.dumps([x for x in sys.path if isinstance(x, str)])]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # in a session of its own, since Ctrl-C is the run's
        self.process = subprocess.Popen(command, **pipes, start_new_session=True, text=True)
        self._send({"logger": name, **about})
        self.reader = threading.Thread(target=self._hear, daemon=True)
        self.reader.start()

    def _send(self, what: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(OSError):  # it is gone, which is heard
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        done = False
        for line in self.process.stdout:
            with suppress(ValueError):  # it died while it wrote
                said = json.loads(line)
                done |= "done" in said
                self.heard.put(said)
        if not done:
            self.heard.put({"problem": "ended early"})

    def said(self) -> Iterator[dict[str, Any]]:
        """What it has said; a problem once."""
        with suppress(Empty):
            while True:
                what = self.heard.get_nowait()
                self.failing = "problem" in what
                if not (self.failing and self.warned):
                    yield what
                self.warned |= self.failing

    def end(self, how: dict[str, Any]) -> None:
        """Tell it how the run has ended."""
        self._send(how)
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Let it send what is left."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
            return
        self.heard.put({"problem": "does not have all rows in time"})

    def kill(self) -> None:
        """End it, with the processes that the tool has started, and hear the rest."""
        if self.process.poll() is None:
            with suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.process.kill()
        self.process.wait()
        self.reader.join(1.0)


# The process itself


class Copy:
    """Copies rows of metrics.jsonl to a tool, each once."""

    def __init__(self, logger: Logger, about: About, tell: Callable[..., None]) -> None:
        self.logger, self.about, self.tell = logger, about, tell
        self.path = Path(about["directory"], CLAIM)
        self.file = self.path.with_name(f"{about['logger']}.json")
        self.offset, self.opened, self.failing, self.next = 0, False, False, 0.0
        self.known: dict[str, Any] = {"steps": -1}
        with suppress(OSError, ValueError):
            self.known |= json.loads(self.file.read_text())

    def go(self) -> None:
        """Copy the rows that are new. Where that fails, a later try may succeed."""
        if time.monotonic() < self.next:
            return
        try:
            if not self.opened:
                place = self.logger.open(self.about, self.known)
                self.opened = True
                self._keep()
                self.tell(place=place)
            while self._part():
                pass
            if self.failing:
                self.failing = False
                self.tell(well=True)
        except Exception as error:  # of the tool's own kind
            self._problem(error)

    def end(self, ended: str, summary: dict[str, Any]) -> None:
        """Copy the last rows, and end the run."""
        self.next = 0.0
        self.go()
        if self.opened:
            try:
                self.logger.close(ended, {**summary, "ended": ended})
            except Exception as error:
                self._problem(error)

    def _part(self) -> bool:
        """Copy some rows. Returns whether there may be more."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            held = file.read(CHUNK)
        whole = held[: held.rfind(b"\n") + 1]
        rows = [row for row in map(json.loads, whole.splitlines()) if row["steps"] > self.known["steps"]]
        if rows:
            self.logger.write(rows)
            self.known["steps"] = rows[-1]["steps"]
            self._keep()
        self.offset += len(whole)
        return bool(whole)

    def _keep(self) -> None:
        new = self.file.with_suffix(".json.new")
        new.write_text(json.dumps(self.known) + "\n")
        os.replace(new, self.file)

    def _problem(self, error: Exception) -> None:
        self.next = time.monotonic() + RETRY
        if not self.failing:
            self.failing = True
            self.tell(problem=f"fails ({type(error).__name__}: {one_line(error, 90)})")


def child() -> None:
    """The process of one logger: copy rows until standard input says how the run ended, or the run is gone."""
    reports, parent = os.fdopen(os.dup(1), "w"), os.getppid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the tools print
    about = json.loads(sys.stdin.readline())
    end: dict[str, Any] = {"ended": "killed", "summary": {}}
    over = threading.Event()

    def tell(**what: Any) -> None:
        with suppress(OSError):  # nobody hears it any more
            reports.write(json.dumps(what) + "\n")
            reports.flush()

    def wait() -> None:
        with suppress(ValueError):
            end.update(json.loads(sys.stdin.readline()))
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    with Path(about["directory"], f".{about['logger']}.lock").open("a") as lock:
        with suppress(ImportError, OSError):  # not on every system
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)  # the process of a run that was killed may still be sending
        copy = Copy(LOGGERS[about["logger"]](), about, tell)
        copy.go()
        while not over.wait(EVERY) and os.getppid() == parent:
            copy.go()
        limit = threading.Timer(PATIENCE, os._exit, (1,))  # nobody else ends it if the run is gone
        limit.daemon = True
        limit.start()
        copy.end(end["ended"], {"steps": max(0, copy.known["steps"]), **end["summary"]})
        tell(done=True)
        os._exit(0)  # without waiting for threads of others
