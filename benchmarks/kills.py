"""Kill runs at random moments, and hold what they leave to what it says.

    python benchmarks/kills.py [N [RUN...]]   N kills (20) of each kind of each run; exits with 1 if one leaves less

Each run is ended by SIGKILL or SIGTERM at a random moment after its directory first holds a run. It saves after every
iteration, so that many kills fall into a save. What is left is loaded, and the same run is trained again to the
iteration that the policy names: every number must be the same, bit for bit. (A policy that was stopped in the middle of
an iteration says so, and must differ.) Bits are comparable with one thread on one machine.
"""

import json
import math
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

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


def main() -> int:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    draw, faults = random.Random(0), []
    print("| run | signal | runs | sound |\n|---|---|---|---|")
    for world in sys.argv[2:] or WORLDS:
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
