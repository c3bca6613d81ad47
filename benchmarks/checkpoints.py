"""What checkpoints cost: the share of a run's time that goes into saving, at the default interval.

    python benchmarks/checkpoints.py [SECONDS]

Trains each run for about SECONDS (90) and measures the time inside the saves: checkpoint, policy and best policy, the
encoding, the hash and the wait for the disk included. What the environments record for resuming is no part of it: that
is a cost of every step.
"""

import sys
import tempfile
import time
from typing import Any

from policygrad.train.recording import Recorder
from policygrad.train.training import Training

RUNS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "ppo",
        "CartPole-v1",
        {"num_envs": 64, "num_steps": 128, "steps": 10**9, "minibatch_size": 2048, "compile": "off"},
    ),
    ("ppo", "HalfCheetah-v5", {"num_envs": 8, "num_steps": 256, "steps": 10**9, "compile": "off"}),
    ("grpo", "arithmetic", {"iterations": 10**6}),
]


def share(method: str, task: str, options: dict[str, Any], seconds: float) -> tuple[int, float, float]:
    """The saves of a run, their time, and that of the run."""
    spent, count = 0.0, 0
    save = Recorder.save

    def timed(self: Recorder, **how: Any) -> None:
        nonlocal spent, count
        start = time.perf_counter()
        save(self, **how)
        spent, count = spent + time.perf_counter() - start, count + 1

    Recorder.save = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as out:
            training = Training(method, task, out=f"{out}/run", **options)
            start = time.perf_counter()
            with training, Recorder(training) as record:
                for row in training:
                    record(row)
                    if time.perf_counter() - start > seconds:
                        break
                whole = time.perf_counter() - start
    finally:
        Recorder.save = save  # type: ignore[method-assign]
    return count, spent, whole


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 90.0
    print("| run | saves | seconds in them | of the run |\n|---|---|---|---|")
    for method, task, options in RUNS:
        count, spent, whole = share(method, task, options, seconds)
        print(f"| {method} {task} | {count} | {spent:.3f} | {spent / whole:.2%} |", flush=True)


if __name__ == "__main__":
    main()
