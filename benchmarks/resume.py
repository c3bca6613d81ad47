"""Kill runs at random moments, resume them, and hold what they come to against runs that were never stopped.

    python benchmarks/resume.py [KILLS] [KIND...] [--methods METHOD...]

KILLS (100) of each KIND: control (all methods), compiled (all methods whose steps are graphs), language (a fifth as
many; GRPO, PPO and an adapter), and damaged: ten times as many checkpoints that are cut short or have one bit changed,
each of which must be noticed, and the one before it used.

Each run is ended by SIGKILL at a random moment after its directory first holds a run, and resumed, until it has been
killed as often as its share of KILLS says; then it trains to its end. Parameters and rows of metrics must be those of
the unbroken run, bit for bit and line for line. A checkpoint is written after every iteration, so that many kills fall
into one. Exits with 1 if a run comes to anything else. Bits are comparable with one thread on one machine.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import policygrad as pg
from policygrad.train.methods import METHODS
from policygrad.train.options import EPISODIC, has_critic, options_of
from policygrad.train.snapshots import read_checkpoint

COMMON: dict[str, Any] = {"checkpoint_every": 1, "progress": False, "preset": "none", "threads": 1}
CONTROL: dict[str, Any] = {
    "num_envs": 4, "num_steps": 32, "minibatch_size": 64, "hidden": (16,), "iterations": 150, "learning_rate": 1e-3,
}  # fmt: skip
LANGUAGE: dict[str, Any] = {
    "prompts_per_rollout": 2, "completions": 2, "max_tokens": 8, "held_out": 2, "learning_rate": 1e-4,
    "evaluate_every": 4, "evaluation_completions": 1, "iterations": 20,
}  # fmt: skip
WAIT = {"control": 0.15, "compiled": 0.1, "language": 0.5}  # seconds from a row to a kill, on average
TASKS = ("CartPole-v1", "Pendulum-v1", "Acrobot-v1")
PROCESSES = multiprocessing.get_context("forkserver")  # each run is a process of its own that need not import torch
PROCESSES.set_forkserver_preload(
    ["policygrad.train.training", *(f"policygrad.train.worlds.{x}" for x in ("control", "language"))]
)

Case = tuple[str, str, dict[str, Any]]


def cases(kind: str, methods: list[str]) -> list[Case]:
    """The runs of a kind: (method, task, options)."""
    if kind == "language":
        runs = [("grpo", {"kl_ref": "loss"}), ("ppo", {"minibatch_size": 4}), ("grpo", {"lora_rank": 2})]
        return [(x, "arithmetic", COMMON | LANGUAGE | more) for x, more in runs if x in methods]
    found: list[Case] = []
    for method in METHODS:
        if method not in methods:
            continue
        default = options_of(method, "control")()
        names = set(vars(default)) - ({"num_steps"} if default.credit in EPISODIC else set())
        options = {name: x for name, x in (COMMON | CONTROL).items() if name in names or name in ("progress", "preset")}
        options |= {"episode_steps": 40} if default.credit in EPISODIC else {}
        options |= {"normalize_observations": True} if len(found) % 3 == 1 else {}
        options |= {"vectorization": "sync"} if len(found) % 3 == 2 else {}
        if kind == "compiled":
            if not has_critic(default) and METHODS[method].update != "ascend":
                continue
            options |= {"compile": "on", "iterations": 60}
        else:
            options |= {"compile": "off"}
        found.append((method, TASKS[len(found) % len(TASKS)], options))
    return found


def train(case: Case, out: Path, errors: Path) -> None:
    """Train, or go on, in a process of its own."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    method, task, options = case
    if (out / "config.json").exists():
        pg.resume(out, progress=False)
    else:
        pg.train(method, task, out=out, **options)


def begun(case: Case, out: Path) -> Any:
    child = PROCESSES.Process(target=train, args=(case, out, out.with_suffix(".errors")))
    child.start()
    return child


def _gone_on(child: Any, metrics: Path) -> None:
    """Wait until a run has written a row, so that it comes to its end."""
    lowest = metrics.stat().st_size
    while child.is_alive() and metrics.stat().st_size <= lowest:
        lowest = min(lowest, metrics.stat().st_size)  # rows after the checkpoint are removed first
        time.sleep(0.001)


def ended(case: Case, out: Path, kills: int, draw: random.Random, kind: str) -> tuple[int, float]:
    """Train to the end, and kill it so many times on the way. Returns how often, and how long the whole run takes."""
    count, start = 0, time.monotonic()
    child = begun(case, out)
    while count < kills:
        while not (out / "config.json").exists() and child.is_alive():
            time.sleep(0.001)
        if draw.random() < 0.75:  # else at any moment: on the way up, or in the middle of being restored
            _gone_on(child, out / "metrics.jsonl")
        child.join(draw.expovariate(1 / WAIT[kind]))
        if child.exitcode is not None:
            break
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        count += 1
        child = begun(case, out)
    child.join()
    if child.exitcode:
        raise AssertionError(out.with_suffix(".errors").read_text()[-600:])
    return count, time.monotonic() - start


def outcome(out: Path) -> tuple[list[Any], list[torch.Tensor]]:
    """The rows of metrics without what a clock measured, and everything that was trained."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: x for name, x in row.items() if "second" not in name} for row in rows]
    return rows, list(pg.Run.load(out).world.modules().state_dict().values())


def differs(whole: Path, broken: Path) -> str | None:
    """Where two runs part; None if they do not."""
    (rows, tensors), (others, their) = outcome(whole), outcome(broken)
    for k, (a, b) in enumerate(zip(rows, others, strict=False)):
        if a != b:
            return f"row {k + 1} of {len(rows)}: " + ", ".join(x for x in a if a[x] != b.get(x))
    if len(rows) != len(others):
        return f"{len(others)} rows of {len(rows)}"
    return None if all(map(torch.equal, tensors, their)) else "the parameters"


def noticed(count: int, draw: random.Random) -> int:
    """Damage so many checkpoints, and return for how many of them the one before was used."""
    found = 0
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(action="ignore"):
        pg.train("ppo", "CartPole-v1", out=place, **COMMON | CONTROL | {"iterations": 3})
        for _ in range(count):
            path = draw.choice(sorted(Path(place, "checkpoints").glob("000000003.*")))
            content = path.read_bytes()
            changed = bytearray(content)
            if draw.random() < 0.5:
                del changed[draw.randrange(len(content)) :]
            else:
                changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(changed)
            found += (read_checkpoint(Path(place)) or {})["iteration"] == 2
            path.write_bytes(content)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, nargs="?", default=100)
    parser.add_argument("kinds", nargs="*", default=["control", "compiled", "language", "damaged"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    draw, faults = random.Random(given.seed), []
    print("| kind | runs | kills | resumed bit for bit |\n|---|---|---|---|")
    for kind in given.kinds:
        if kind == "damaged":
            sound = noticed(10 * given.kills, draw)
            faults += [] if sound == 10 * given.kills else [f"{10 * given.kills - sound} damaged checkpoints were used"]
            print(f"| damaged | 1 | {10 * given.kills} | {sound} noticed |", flush=True)
            continue
        runs, wanted = cases(kind, given.methods), max(1, given.kills // (5 if kind == "language" else 1))
        kills = sound = 0
        for i, case in enumerate(runs):
            share = wanted * (i + 1) // len(runs) - wanted * i // len(runs)
            with tempfile.TemporaryDirectory() as place:
                whole = Path(place, "whole")
                ended(case, whole, 0, draw, kind)
                done = tries = 0
                while done < share:  # a run that comes to its end before is trained once more
                    broken, tries = Path(place, f"broken{tries}"), tries + 1
                    count, seconds = ended(case, broken, share - done, draw, kind)
                    fault = differs(whole, broken)
                    print(f"  {kind} {case[0]} on {case[1]}: {count} kills, {seconds:.1f} s", file=sys.stderr)
                    faults += [] if fault is None else [f"{kind}, {case[0]} on {case[1]}: {fault}"]
                    sound += count if fault is None else 0
                    done, kills = done + count, kills + count
        print(f"| {kind} | {len(runs)} | {kills} | {sound} |", flush=True)
    print("\n".join(faults) or json.dumps({"faults": 0}))
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
