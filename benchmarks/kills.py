"""Kill runs at random moments, and hold what they leave to what it says.

    python benchmarks/kills.py [N [RUN...]]   N kills (20) of each kind of each run; exits with 1 if one leaves less

The runs `ranks` and `samplers` are of several processes, of which one is ended by SIGKILL, again and again: a rank
under torchrun, which starts all of them again, and an actor of Ray (policygrad[ray]), which Ray starts again. They must
end with the parameters and metrics of a run that was not disturbed.

Each other run is ended by SIGKILL or SIGTERM at a random moment after its directory first holds a run. It saves after
every iteration, so that many kills fall into a save. What is left is loaded, and the same run is trained again to the
iteration that the policy names: every number must be the same, bit for bit. (A policy that was stopped in the middle of
an iteration says so, and must differ.) Bits are comparable with one thread on one machine.
"""

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import policygrad as pg
from policygrad import cli
from policygrad.train import recording

WORLDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "control": (
        "ppo",
        "CartPole-v1",
        {"num_envs": 4, "num_steps": 64, "minibatch_size": 64, "preset": "none"} | {"compile": "off"},
    ),
    "exact": ("ppo", "exact:chain", {"num_envs": 8, "compile": "off"}),
    "language": (
        "grpo",
        "arithmetic",
        {"prompts_per_rollout": 2, "completions": 2, "max_tokens": 8, "held_out": 2, "learning_rate": 1e-4}
        | {"evaluate_every": 0, "evaluation_completions": 1, "threads": 1, "preset": "none"},
    ),
    "memory": (
        "ppo",
        "policygrad/TMaze-v0",
        {"num_envs": 4, "num_steps": 32, "minibatch_size": 64, "preset": "none", "memory": "gru", "memory_size": 8},
    ),
    "wrapped": (
        "ppo",
        "CartPole-v1",
        {"num_envs": 4, "num_steps": 64, "minibatch_size": 64, "preset": "none"}
        | {"wrap": "NormalizeObservation", "compile": "off"},
    ),
    "conversations": (
        "grpo",
        "lookup",
        {"prompts_per_rollout": 2, "completions": 2, "max_tokens": 40, "held_out": 2, "learning_rate": 1e-4}
        | {"evaluate_every": 0, "evaluation_completions": 1, "threads": 1, "preset": "none"},
    ),
}
LONG = {name: {"steps": 10**9} for name in WORLDS} | {
    name: {"iterations": 10**6} for name in ("language", "conversations")
}
SMALL: dict[str, Any] = {"preset": "none", "num_envs": 3, "num_steps": 32, "iterations": 40, "minibatch_size": 48}
TOGETHER = 4  # kills of one run of ranks
PROCESSES = multiprocessing.get_context("forkserver")  # each run is a process of its own that need not import torch
PROCESSES.set_forkserver_preload(
    ["policygrad.train.training", *(f"policygrad.train.worlds.{x}" for x in ("control", "exact", "language"))]
)


def command(arguments: list[str], errors: Path) -> None:
    """The command `policygrad`, with a save after every iteration."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    recording.SAVE_SECONDS, recording.SAVE_SHARE = 0.0, math.inf
    cli.main(arguments)


def killed(world: str, number: signal.Signals, directory: Path, delay: float) -> int:
    """Start a run, end it `delay` seconds after its directory holds one, and return its exit code."""
    method, task, options = WORLDS[world]
    flags = [x for name, value in (options | LONG[world]).items() for x in (f"--{name.replace('_', '-')}", str(value))]
    errors = directory.with_suffix(".errors")
    child = PROCESSES.Process(target=command, args=(["train", method, task, *flags, "--out", str(directory)], errors))
    child.start()
    while not (directory / "config.json").exists() and child.is_alive():
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(child.pid or 0, number)
    child.join()
    said = errors.read_text()
    if "nothing was saved" in said and not directory.exists():  # the model was still being measured before training
        return killed(world, number, directory, delay + 1)
    if number == signal.SIGTERM and "is kept in" not in said:
        raise AssertionError(f"{world}: the run says {said!r}")
    return child.exitcode or 0


def numbers(run: pg.Run) -> list[torch.Tensor]:
    """Everything that was trained."""
    return [x.detach().clone() for x in run.world.modules().state_dict().values()]


def iterations(world: str) -> Iterator[list[torch.Tensor]]:
    """What the same run has learned at its start, and after each iteration."""
    method, task, options = WORLDS[world]
    with pg.Training(method, task, **options | LONG[world]) as training:
        yield numbers(training.run)
        for _ in training:
            yield numbers(training.run)


def judged(world: str, directories: list[Path]) -> list[str]:
    """What is wrong with each directory, or nothing."""
    runs, wrong = [], {}
    for directory in directories:
        try:
            runs.append(pg.Run.load(directory))
        except Exception as error:
            wrong[directory] = f"{type(error).__name__}: {error}"
    last = max((run.stage.iteration for run in runs), default=0)
    for iteration, wanted in zip(range(last + 1), iterations(world), strict=False):
        for run in (x for x in runs if x.stage.iteration == iteration):
            same = all(map(torch.equal, numbers(run), wanted))
            if same == run.stage.partway:
                wrong[run.directory] = f"its numbers are not what it says, {run.standing()}"
    partway = sum(run.stage.partway for run in runs)
    words = sorted({run.stage.iteration for run in runs})
    print(f"  {world}: iterations {words[:1]} to {words[-1:]}, {partway} in the middle of one", file=sys.stderr)
    return [f"{directory}: {said}" for directory, said in wrong.items()]


# Several processes, of which one is killed


def ranks_killed(count: int, place: Path) -> list[str]:
    """Kill a rank of a run under torchrun so often, TOGETHER times a run. Returns what is wrong, once for each kill."""
    if code := under_torchrun(place / "whole", 0):
        raise AssertionError(f"the run that is not disturbed ends with {code}")
    whole, wrong = of_directory(place / "whole"), []
    for first in range(0, count, TOGETHER):
        kills, out = min(TOGETHER, count - first), place / f"killed-{first}"
        code = under_torchrun(out, kills, seed=first)
        if code or not same(of_directory(out), whole):
            wrong += [f"exit code {code}, or other numbers after {kills} kills"] * kills
    return wrong


def under_torchrun(out: Path, kills: int, seed: int = 0) -> int:
    """Train on two ranks, of which one is killed after a new checkpoint, as often as is said. Returns the exit code."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = [x for name, value in SMALL.items() for x in (f"--{name.replace('_', '-')}", str(value))]
    command = [*launch, "--max-restarts", str(kills), "-m", "policygrad", "train", "ppo", "CartPole-v1", *flags,
               "--normalize-observations", "--checkpoint-every", "2", "--out", str(out)]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    draw, seen = random.Random(seed), ""
    while kills and running.poll() is None:
        if newest_checkpoint(out) > seen:
            time.sleep(draw.uniform(0, 0.5))
            seen = newest_checkpoint(out)
            listed = ["ps", "-o", "pid=", "--ppid", str(running.pid)]
            ranks = [int(x) for x in subprocess.run(listed, capture_output=True, text=True).stdout.split()]
            if len(ranks) == 2:
                os.kill(draw.choice(ranks), signal.SIGKILL)
                kills -= 1
        time.sleep(0.02)
    return running.wait() or kills  # those that there was no time for are none that it survived


def newest_checkpoint(out: Path) -> str:
    return max((path.name for path in (out / "checkpoints").glob("*.json")), default="")


def samplers_killed(count: int, place: Path) -> list[str]:
    """Kill an actor of one run so often, at a random moment of an iteration. Returns what is wrong."""
    import ray

    options = SMALL | {"samplers": 2, "iterations": 2 * count + 2, "threads": 1}
    outcomes: list[Any] = []
    draw, died = random.Random(0), 0
    for kills in (0, count):
        seconds, rows = 0.0, []
        with pg.Training("ppo", "CartPole-v1", **options) as training, warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for i in range(options["iterations"]):
                start, killing = time.perf_counter(), None
                if i % 2 and i <= 2 * kills:
                    actor = draw.choice(training.remote.actors)
                    number = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))
                    killing = threading.Timer(draw.uniform(0, seconds), os.kill, (number, signal.SIGKILL))
                    killing.start()
                try:
                    rows.append(untimed(next(training)))
                except pg.UserError as error:
                    return [f"{error} (in iteration {i})"] * count
                if killing is None:
                    seconds = time.perf_counter() - start
                else:
                    killing.join()
            outcomes.append((numbers(training.run), rows))
        died += sum("has died" in str(x.message) for x in seen)
    if died != count:
        return [f"{died} of {count} kills were noticed"] * count
    return [] if same(*outcomes) else [f"other numbers after {count} kills"] * count


def of_directory(directory: Path) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """The parameters and metrics of a run that is written."""
    rows = (directory / "metrics.jsonl").read_text().splitlines()
    return [*load_file(directory / "policy.safetensors").values()], [untimed(json.loads(row)) for row in rows]


def untimed(row: dict[str, float]) -> dict[str, float]:
    return {name: x for name, x in row.items() if "second" not in name}


def same(first: Any, second: Any) -> bool:
    """Whether parameters and metrics are the same, bit for bit."""
    return all(map(torch.equal, first[0], second[0])) and first[1] == second[1]


SEVERAL: dict[str, Callable[[int, Path], list[str]]] = {"ranks": ranks_killed}
SEVERAL |= {"samplers": samplers_killed} if find_spec("ray") else {}


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    draw, faults = random.Random(0), []
    print("| run | signal | runs | sound |\n|---|---|---|---|")
    for world in sys.argv[2:] or [*WORLDS, *SEVERAL]:
        if world in SEVERAL:
            with tempfile.TemporaryDirectory() as place:
                wrong = SEVERAL[world](count, Path(place))
            faults += [f"{world}: {x}" for x in wrong]
            print(f"| {world} | SIGKILL | {count} | {count - len(wrong)} |", flush=True)
            continue
        for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
            with tempfile.TemporaryDirectory() as place:
                directories = [Path(place, str(i)) for i in range(count)]
                codes = [killed(world, number, x, draw.uniform(0, 3)) for x in directories]
                wrong = [f"exit code {x}" for x in codes if x != code] + judged(world, directories)
            faults += [f"{world}, {number.name}: {x}" for x in wrong]
            print(f"| {world} | {number.name} | {count} | {count - len(wrong)} |", flush=True)
    print("\n".join(faults) or json.dumps({"faults": 0}))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
