"""One run on several processes: how much faster, and what is sent.

    python benchmarks/scale.py                  all of it, into docs/scale.json and the section of docs/scale.md
    python benchmarks/scale.py messages         only this part; the others stay as they were measured last
    python benchmarks/scale.py scaling --workloads environments learning
    python benchmarks/scale.py --quick          tiny numbers, printed only: does the script run?

Scaling: each workload on 1 and on 2 processes, in turn, `--repeats` times; of each the median seconds of an iteration
after the first. Weak: twice the environments or prompts on twice the processes. Strong: the same number on both. Apart:
two runs of one process each, at the same time, which is the most that weak scaling can reach on this machine.
Nothing else should run beside it: processes that wait for one another feel every other one. Messages: every call of
torch.distributed in an iteration of 2 processes, and the bytes that a rank sends where they go around a ring, beside
the least that data-parallel learning can do, one sum of the gradient for each gradient step. (Kills are kills.py, two
hosts hosts.py.)
"""

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured by benchmarks/scale.py -->", "<!-- end of what was measured -->"
COMMON: dict[str, Any] = {"preset": "none", "progress": False, "threads": 1}
# A process has a core: without this, one that is alone steps its environments in processes of their own, on both.
CONTROL: dict[str, Any] = {"vectorization": "sync", "compile": "off"}
# name -> (method, task, options, the option that grows with the processes, iterations)
WORKLOADS: dict[str, tuple[str, str, dict[str, Any], str, int]] = {
    "environments": ("ppo", "HalfCheetah-v5", {"num_envs": 16, "num_steps": 128, "epochs": 1, "minibatch_size": 512,
                                               **CONTROL}, "num_envs", 12),
    "learning": ("ppo", "CartPole-v1", {"num_envs": 16, "num_steps": 128, "epochs": 4, "minibatch_size": 512,
                                        "hidden": (256, 256), **CONTROL}, "num_envs", 12),
    "trpo": ("trpo", "HalfCheetah-v5", {"num_envs": 16, "num_steps": 128, "critic_epochs": 1,
                                        "critic_minibatch_size": 512, **CONTROL}, "num_envs", 12),
    "language": ("grpo", "arithmetic", {"prompts_per_rollout": 8, "completions": 8, "held_out": 0, "max_tokens": 24,
                                        "learning_rate": 1e-4}, "prompts_per_rollout", 6),
}  # fmt: skip
LANGUAGE = WORKLOADS["language"][2] | {"micro_batch": 8, "shared_prompts": "off"}
# Only counted: one process has nothing to shard.
SHARDED: dict[str, tuple[str, str, dict[str, Any], str, int]] = {
    name: ("grpo", "arithmetic", LANGUAGE | {"shard": True} | more, "prompts_per_rollout", 4)
    for name, more in {
        "sharded": {},
        "sharded, once a step": {"gradient_sync": "step"},
        "sharded, in bfloat16": {"gradient_sync": "step", "autocast": "bfloat16"},
    }.items()
}
COUNTED = {
    **WORKLOADS,
    "language, micro-batches": ("grpo", "arithmetic", LANGUAGE, "prompts_per_rollout", 4),
    **SHARDED,
}


class Messages(TorchDispatchMode):
    """Counts what torch.distributed is asked for: calls, and the bytes that a rank sends if they go around a ring."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0.0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if function.namespace == "c10d":
            others = dist.get_world_size() - 1
            at, share = {
                "allreduce_": (0, 2 * others / (others + 1)),
                "_reduce_scatter_base_": (1, others / (others + 1)),
                "_allgather_base_": (1, others),
                "allgather_": (1, others),
            }[function._schema.name.partition("::")[2]]
            given = arguments[at] if isinstance(arguments[at], list | tuple) else [arguments[at]]
            self.calls += 1
            self.bytes += share * sum(x.nbytes for x in given)
        return function(*arguments, **(options or {}))


def rank_of(name: str, options: dict[str, Any], counting: bool, place: Path) -> None:
    """One process of a workload: what it has measured is a file."""
    from policygrad import ranks
    from policygrad.train.training import Training

    torch.set_num_threads(1)
    method, task, *_, iterations = COUNTED[name]
    iterations = options.pop("iterations", iterations)
    ranks.join()
    seconds, sent, steps = [], [], []
    with Training(method, task, iterations=iterations, **COMMON, **options) as training:
        learned = sum(p.numel() for p in training.learner.objective.parameters() if p.requires_grad)
        trained = sum(p.numel() for p in training.world.modules().parameters() if p.requires_grad)
        for _ in range(iterations):
            messages, start = Messages(), time.perf_counter()
            with messages if counting else nullcontext():
                row = next(training)
            seconds.append(time.perf_counter() - start)
            sent.append((messages.calls, messages.bytes))
            steps.append(row.get("updates", 1.0))
    found = {"seconds": seconds[1:], "messages": sent[1:], "updates": steps[1:]}
    found |= {"parameters": learned, "fitted": trained - learned}
    (place / f"{ranks.rank()}.json").write_text(json.dumps(found))
    ranks.leave()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def measured(
    name: str, processes: int, options: dict[str, Any], counting: bool = False, runs: int = 1
) -> list[dict[str, Any]]:
    """A workload on so many processes, and so many runs of it at the same time, once."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / str(run) for run in range(runs)]
        running = []
        for place in places:
            place.mkdir()
            together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
            together |= {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
            given = [sys.executable, __file__, "--rank-of", name, "--options", json.dumps(options)]
            given += ["--place", str(place), *(["--counting"] if counting else [])]
            running += [
                subprocess.Popen(given, env={**os.environ, **together, "RANK": str(i)}) for i in range(processes)
            ]
        if any(process.wait() for process in running):
            raise SystemExit(f"{name} on {processes} processes has failed")
        return [json.loads((place / "0.json").read_text()) for place in places]


def scaling(name: str, repeats: int, quick: bool) -> dict[str, Any]:
    """Seconds of an iteration on one process, on two of the same work, on two of twice as much, and of two runs that
    know nothing of each other: what the machine leaves to each where both are at work.
    """
    options, grows = shortened(WORKLOADS[name][2], quick), WORKLOADS[name][3]
    twice = options | {grows: 2 * options[grows]}
    cases = {"one": (1, options, 1), "strong": (2, options, 1), "weak": (2, twice, 1), "apart": (1, options, 2)}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(repeats):
        for case, (processes, given, runs) in cases.items():
            found = measured(name, processes, given, runs=runs)
            seconds[case].append(mean(median(x["seconds"]) for x in found))
    one, strong, weak, apart = (median(seconds[case]) for case in cases)
    return {"seconds": seconds, "strong": one / (2 * strong), "weak": one / weak, "apart": one / apart}


def shortened(options: dict[str, Any], quick: bool) -> dict[str, Any]:
    if not quick:
        return options
    sizes = ("num_steps", "minibatch_size", "critic_minibatch_size")
    small = dict(zip(sizes, (16, 64, 64), strict=True))
    return options | {"iterations": 3} | {name: x for name, x in small.items() if name in options}


def traffic(name: str, quick: bool) -> dict[str, float]:
    """Messages and bytes of an iteration of a workload on two processes, and the least there can be.

    That is a sum of gradients for each step, which a ring does with 2 (N - 1) / N times their bytes, also of shards,
    whose weights are gathered in one half of it and whose gradients are summed in the other. Products with the Fisher
    matrix, of which a natural step has as many as conjugate gradient has iterations, are sums as long as a gradient.
    """
    options = shortened(COUNTED[name][2], quick)
    [found] = measured(name, 2, options, counting=True)
    calls, size = (median(x[i] for x in found["messages"]) for i in range(2))
    sums = median(found["updates"]) + 10 * (name == "trpo")
    size_of_sums = 4 * found["parameters"] * sums
    if found["fitted"]:  # a critic of its own, in one epoch
        fits = options["num_envs"] * options["num_steps"] / options["critic_minibatch_size"]
        sums, size_of_sums = sums + fits, size_of_sums + 4 * found["fitted"] * fits
    return {"parameters": found["parameters"] + found["fitted"], "calls": calls, "bytes": size, "least_calls": sums,
            "least_bytes": size_of_sums}  # fmt: skip


# Cost


PARTS, BLOCKS = 8, 24  # micro-batches of a step, and transformer blocks of a model
ASKED = 3  # messages of a step that are no gradient: weights and credit, the batch's weight, metrics


def model_of_cost() -> list[dict[str, Any]]:
    """Share of the time that computes, on many GPUs, for three sizes of model that fit one of them.

    A gradient step of 64 x 1,024 tokens on each GPU at 40% of 989 TFLOP/s takes 6 P tokens / speed seconds. With whole
    models a ring sums 4 P bytes, 2 (N - 1) / N of which each sends. With shards in bfloat16, summed once a step, 2 P
    bytes are gathered twice for each of PARTS micro-batches, and 4 P summed once, (N - 1) / N of each. 450 GB/s within
    8 GPUs and 50 GB/s beyond, and 20 microseconds and log2(N) for each message; ASKED ones go around the CPUs in a
    ring, N - 1 times 20 microseconds. Nothing is overlapped.
    """
    rows = []
    for parameters in (1e8, 5e8, 3e9):
        compute = 6 * parameters * 64 * 1024 / (0.4 * 989e12)
        for count in (8, 64, 1024):
            share, bandwidth = (count - 1) / count, 450e9 if count <= 8 else 50e9
            sent = {
                "whole": (2 * share * 4 * parameters, math.ceil(parameters / 2**22)),
                "sharded": (share * (2 * PARTS * 2 + 4) * parameters, (2 * PARTS + 1) * (BLOCKS + 1)),
            }
            row: dict[str, Any] = {"parameters": parameters, "gpus": count, "compute": compute}
            for name, (size, messages) in sent.items():
                seconds = size / bandwidth + 20e-6 * (messages * math.log2(count) + ASKED * (count - 1))
                row[name] = {"seconds": seconds, "efficiency": compute / (compute + seconds)}
            rows.append(row)
    return rows


# The document


def section(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [BEGIN, ""]
    if found["scaling"]:
        lines += ["| workload | 1 process, s | 2, same work, s | efficiency | 2, twice the work, s | efficiency | "
                  "2 runs apart, s | efficiency |",
                  "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for name, x in found["scaling"].items():
            cells = [f"{median(x['seconds']['one']):.3f}"]
            for case in ("strong", "weak", "apart"):
                cells += [f"{median(x['seconds'][case]):.3f}", f"{x[case]:.2f}"] if case in x else ["", ""]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    if found["messages"]:
        lines += ["| workload | parameters | messages | least | bytes | least |", "|---|---|---|---|---|---|"]
        for name, x in found["messages"].items():
            numbers = (x[n] for n in ("parameters", "calls", "least_calls", "bytes", "least_bytes"))
            lines.append(f"| {name} | " + " | ".join(f"{n:,.0f}" for n in numbers) + " |")
        lines.append("")
    lines += ["| parameters | GPUs | a step computes, s | whole: sends, s | efficiency | shards: s | efficiency |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for x in model_of_cost():
        both = [f"{x[name]['seconds']:.3f} | {x[name]['efficiency']:.2f}" for name in ("whole", "sharded")]
        lines.append(f"| {x['parameters']:.0e} | {x['gpus']:,} | {x['compute']:.3f} | {' | '.join(both)} |")
    return "\n".join([*lines, "", f"torch {found['torch']}, {found['cores']} cores.", "", END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="scaling, messages; by default both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="*", choices=[*COUNTED])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    parser.add_argument("--counting", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of:
        rank_of(given.rank_of, json.loads(given.options), given.counting, given.place)
        return
    if unknown := {*given.parts} - {"scaling", "messages"}:
        parser.error(f"no part {', '.join(unknown)}: there are scaling and messages")
    path, document = ROOT / "docs" / "scale.json", ROOT / "docs" / "scale.md"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"scaling": {}, "messages": {}}
    found |= {"torch": torch.__version__, "cores": os.cpu_count()}
    for part in given.parts or ("scaling", "messages"):
        known = WORKLOADS if part == "scaling" else COUNTED
        for name in (x for x in given.workloads or known if x in known):
            measure = partial(scaling, repeats=given.repeats) if part == "scaling" else traffic
            found[part][name] = measure(name, quick=given.quick)
            print(json.dumps({part: {name: found[part][name]}}), flush=True)
    text = section(found)
    print(text)
    if not given.quick:
        path.write_text(json.dumps(found, indent=2) + "\n")
        before, _, rest = document.read_text().partition(BEGIN)
        document.write_text(before + text + rest.partition(END)[2])


if __name__ == "__main__":
    main()
