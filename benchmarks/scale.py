"""One run on several processes: how much faster, what is sent, and what is left when one is killed.

    python benchmarks/scale.py                  all of it, into docs/scale.json and the section of docs/scale.md
    python benchmarks/scale.py --quick          tiny numbers, printed only: does the script run?
    python benchmarks/scale.py --kills 20 --only kills

Scaling: each workload on 1 and on 2 processes, in turn, `--repeats` times; of each the median seconds of an iteration
after the first. Weak: twice the environments or prompts on twice the processes. Strong: the same number on both.
Messages: every call of torch.distributed in an iteration, and the bytes that a rank hands to it, beside the least that
data-parallel learning can do, one sum of the gradient for each gradient step. Kills: runs under torchrun of which a
rank is killed by SIGKILL at a random moment, and what they come to beside an undisturbed run. Nothing else should run
beside this: processes that wait for one another feel every other one.
"""

import argparse
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import distributed as dist

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- measured by benchmarks/scale.py -->", "<!-- end of what was measured -->"
COMMON: dict[str, Any] = {"preset": "none", "progress": False, "threads": 1}
# name -> (method, task, options, the option that grows with the processes, iterations)
WORKLOADS: dict[str, tuple[str, str, dict[str, Any], str, int]] = {
    "environments": ("ppo", "HalfCheetah-v5", {"num_envs": 16, "num_steps": 128, "epochs": 1, "minibatch_size": 512,
                                                      "compile": "off"},
                     "num_envs", 12),
    "learning": ("ppo", "CartPole-v1", {"num_envs": 16, "num_steps": 128, "epochs": 4, "minibatch_size": 512,
                                        "hidden": (256, 256), "compile": "off"}, "num_envs", 12),
    "trpo": ("trpo", "HalfCheetah-v5", {"num_envs": 16, "num_steps": 128, "critic_epochs": 1,
                                        "critic_minibatch_size": 512, "compile": "off"}, "num_envs", 12),
    "language": ("grpo", "arithmetic", {"prompts_per_rollout": 8, "completions": 8, "held_out": 0, "max_tokens": 24,
                                        "learning_rate": 1e-4}, "prompts_per_rollout", 6),
}  # fmt: skip
KILLED = ["train", "ppo", "CartPole-v1", "--preset", "none", "--num-envs", "3", "--num-steps", "32",
          "--iterations", "40", "--minibatch-size", "48", "--normalize-observations",
          "--checkpoint-every", "2"]  # fmt: skip


class Counted:
    """Counts what torch.distributed is asked to send: calls, and the bytes of this rank's own tensor."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        for name in ("all_reduce", "all_gather"):
            setattr(dist, name, self._counting(getattr(dist, name)))
        dist.distributed_c10d.all_gather = dist.all_gather  # of objects, which are gathered as bytes

    def _counting(self, function: Any) -> Any:
        def counted(*arguments: Any, **options: Any) -> Any:
            own = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[1]
            self.calls, self.bytes = self.calls + 1, self.bytes + own.numel() * own.element_size()
            return function(*arguments, **options)

        return counted


def rank_of(name: str, options: dict[str, Any], place: Path) -> None:
    """One process of a workload: what it has measured is a file."""
    from policygrad import ranks
    from policygrad.train.training import Training

    torch.set_num_threads(1)
    method, task, *_, iterations = WORKLOADS[name]
    iterations = options.pop("iterations", iterations)
    counted = None
    if ranks.asked_for():
        counted = Counted()
        ranks.join()
    seconds, messages, steps = [], [], []
    with Training(method, task, iterations=iterations, **COMMON, **options) as training:
        learned = sum(p.numel() for p in training.learner.objective.parameters() if p.requires_grad)
        for _ in range(iterations):
            before, start = (counted.calls, counted.bytes) if counted else (0, 0), time.perf_counter()
            row = next(training)
            seconds.append(time.perf_counter() - start)
            after = (counted.calls, counted.bytes) if counted else (0, 0)
            messages.append([y - x for x, y in zip(before, after, strict=True)])
            steps.append(row.get("updates", 1.0))
    found = {"seconds": seconds[1:], "messages": messages[1:], "updates": steps[1:], "parameters": learned}
    (place / f"{ranks.rank()}.json").write_text(json.dumps({**found, "steps": row["steps"]}))
    ranks.leave()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def measured(name: str, processes: int, options: dict[str, Any]) -> dict[str, Any]:
    """A workload on so many processes, once."""
    with tempfile.TemporaryDirectory() as place:
        together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
        given = [sys.executable, __file__, "--rank-of", name, "--options", json.dumps(options), "--place", place]
        running = [
            subprocess.Popen(given, env={**os.environ, "OMP_NUM_THREADS": "1", **together, "RANK": str(i)})
            for i in range(processes)
        ]
        if any(process.wait() for process in running):
            raise SystemExit(f"{name} on {processes} processes has failed")
        return json.loads((Path(place) / "0.json").read_text())


def scaling(name: str, repeats: int, quick: bool) -> dict[str, Any]:
    """Seconds of an iteration on one process, and on two: of the same work, and of twice as much."""
    _, _, options, grows, _ = WORKLOADS[name]
    options = {**options, **({"iterations": 3} if quick else {})}
    if quick and "num_steps" in options:
        options |= {"num_steps": 16}
        options |= {x: 64 for x in ("minibatch_size", "critic_minibatch_size") if x in options}
    cases = {"one": (1, options), "strong": (2, options), "weak": (2, options | {grows: 2 * options[grows]})}
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    last: dict[str, Any] = {}
    for _ in range(repeats):
        for case, (processes, given) in cases.items():
            last[case] = measured(name, processes, given)
            seconds[case].append(median(last[case]["seconds"]))
    one, strong, weak = (median(seconds[case]) for case in cases)
    return {
        "seconds": seconds,
        "strong": one / (2 * strong),
        "weak": one / weak,
        "messages": traffic(last["strong"], products=10 if name == "trpo" else 0),
        "parameters": last["strong"]["parameters"],
    }


def traffic(found: dict[str, Any], products: int) -> dict[str, float]:
    """Messages and bytes of an iteration, and the least there can be: a sum of gradients for each step.

    products: those with the Fisher matrix in a natural step, which are sums as long as a gradient.
    """
    calls, size = (median(x[i] for x in found["messages"]) for i in range(2))
    sums = median(found["updates"]) + products
    return {"calls": calls, "bytes": size, "least_calls": sums, "least_bytes": 4 * found["parameters"] * sums}


# Kills


def killed(kills: int, place: Path) -> dict[str, Any]:
    """Kill a rank of a run so often, and compare what it comes to with an undisturbed run."""
    from safetensors.torch import load_file

    whole = torchrun(place / "whole", 0)
    survived, each = 0, 4
    for i in range(math.ceil(kills / each)):
        count = min(each, kills - each * i)
        out = place / f"killed-{i}"
        if torchrun(out, count, seed=i):
            break
        first, second = (load_file(x / "policy.safetensors") for x in (place / "whole", out))
        same = all(torch.equal(x, second[name]) for name, x in first.items())
        rows = [untimed(x / "metrics.jsonl") for x in (place / "whole", out)]
        survived += count if same and rows[0] == rows[1] else 0
    return {"kills": kills, "survived": survived, "undisturbed": whole == 0}


def untimed(path: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]


def torchrun(out: Path, kills: int, seed: int = 0) -> int:
    """Train on two ranks, of which one is killed after a new checkpoint, as often as is said. Returns the exit code."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "--max-restarts", str(kills), "-m", "policygrad", *KILLED, "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running, generator, seen = subprocess.Popen(command, **quiet), random.Random(seed), ""  # type: ignore[call-overload]
    while kills and running.poll() is None:
        newest = max((path.name for path in (out / "checkpoints").glob("*.json")), default="")
        if newest > seen:
            time.sleep(generator.uniform(0, 0.5))
            newest = max((path.name for path in (out / "checkpoints").glob("*.json")), default="")
            listed = ["ps", "-o", "pid=", "--ppid", str(running.pid)]
            ranks = [int(x) for x in subprocess.run(listed, capture_output=True, text=True).stdout.split()]
            if len(ranks) == 2:
                os.kill(generator.choice(ranks), signal.SIGKILL)
                seen, kills = newest, kills - 1
        time.sleep(0.02)
    return running.wait()


# Cost


def model_of_cost() -> list[dict[str, Any]]:
    """Share of the time that computes, on many GPUs, for three sizes of model that fit one of them.

    A gradient step of 64 x 1,024 tokens on each GPU at 40% of 989 TFLOP/s takes 6 P tokens / speed seconds; a ring
    sums 4 P bytes in 2 (N - 1) / N 4 P / bandwidth seconds, at 450 GB/s within 8 GPUs and 50 GB/s beyond, plus 20
    microseconds and log2(N) for each message. Not overlapped, as here.
    """
    rows = []
    for parameters in (1e8, 5e8, 3e9):
        compute = 6 * parameters * 64 * 1024 / (0.4 * 989e12)
        for count in (8, 64, 1024):
            bandwidth = 450e9 if count <= 8 else 50e9
            messages = 2 + math.ceil(parameters / 2**22)
            sums = 2 * (count - 1) / count * 4 * parameters / bandwidth + messages * 20e-6 * math.log2(count)
            rows.append({"parameters": parameters, "gpus": count, "compute": compute, "sums": sums,
                         "efficiency": compute / (compute + sums)})  # fmt: skip
    return rows


# The document


def section(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    lines = [BEGIN, ""]
    if found["scaling"]:
        lines += ["| workload | 1 process, s | 2, same work, s | efficiency | 2, twice the work, s | efficiency |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for name, x in found["scaling"].items():
            one, strong, weak = (median(x["seconds"][case]) for case in ("one", "strong", "weak"))
            lines.append(f"| {name} | {one:.3f} | {strong:.3f} | {x['strong']:.2f} | {weak:.3f} | {x['weak']:.2f} |")
        lines += ["", "| workload | parameters | messages | least | bytes | least |", "|---|---|---|---|---|---|"]
        for name, x in found["scaling"].items():
            sent = x["messages"]
            numbers = (x["parameters"], *(sent[n] for n in ("calls", "least_calls", "bytes", "least_bytes")))
            lines.append(f"| {name} | " + " | ".join(f"{n:,.0f}" for n in numbers) + " |")
        lines.append("")
    if found["kills"]:
        x = found["kills"]
        lines += [f"Kills: {x['survived']} of {x['kills']} survived, with the parameters and metrics of a run that was "
                  "not disturbed.", ""]  # fmt: skip
    lines += ["| parameters | GPUs | a step computes, s | and sums, s | efficiency |", "|---|---|---|---|---|"]
    for x in found["cost"]:
        numbers = f"{x['compute']:.3f} | {x['sums']:.4f} | {x['efficiency']:.2f}"
        lines.append(f"| {x['parameters']:.0e} | {x['gpus']:,} | {numbers} |")
    return "\n".join([*lines, "", f"torch {torch.__version__}, {os.cpu_count()} cores.", "", END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=[*WORKLOADS, "kills"], default=[*WORKLOADS, "kills"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank_of:
        rank_of(given.rank_of, json.loads(given.options), given.place)
        return
    found: dict[str, Any] = {"scaling": {}, "kills": None, "cost": model_of_cost()}
    for name in (x for x in given.only if x != "kills"):
        found["scaling"][name] = scaling(name, 1 if given.quick else given.repeats, given.quick)
        print(json.dumps({name: found["scaling"][name]}), flush=True)
    if "kills" in given.only:
        with tempfile.TemporaryDirectory() as place:
            found["kills"] = killed(2 if given.quick else given.kills, Path(place))
    text = section(found)
    print(text)
    if not given.quick and set(given.only) == {*WORKLOADS, "kills"}:
        (ROOT / "docs" / "scale.json").write_text(json.dumps(found, indent=2) + "\n")
        document = ROOT / "docs" / "scale.md"
        before, _, rest = document.read_text().partition(BEGIN)
        document.write_text(before + text + rest.partition(END)[2])
    if found["kills"] and found["kills"]["survived"] < found["kills"]["kills"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
