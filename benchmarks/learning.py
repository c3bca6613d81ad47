"""Does it learn what the field's methods learn? Trains each on its tasks over several seeds, by the command line.

    python benchmarks/learning.py                     every task (hours on two cores)
    python benchmarks/learning.py ppo/CartPole-v1     some of them
    python benchmarks/learning.py --table             only write docs/learning.md from the results there are

Each run is `policygrad train` with the presets, then `policygrad eval`: 20 episodes with the policy's mode, or on a
world in closed form the exact J of the policy. A task passes if the mean over its seeds reaches the threshold. Results
are kept in benchmarks/learning.json, run by run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import beside
import pong

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "learning.json"
TABLE = HERE.parent / "docs" / "learning.md"
KUHN = HERE / "kuhn.json"

# (method, task, steps, seeds, threshold)
TASKS = [
    ("ppo", "CartPole-v1", 100_000, 5, 490),
    ("trpo", "CartPole-v1", 100_000, 5, 490),
    ("npg", "CartPole-v1", 200_000, 5, 475),
    ("actor_critic", "CartPole-v1", 500_000, 5, 475),
    ("reinforce", "CartPole-v1", 500_000, 5, 475),
    ("grpo", "CartPole-v1", 300_000, 3, 475),
    ("ppo", "Acrobot-v1", 500_000, 5, -85),
    ("ppo", "Pendulum-v1", 200_000, 5, -250),
    ("ppo", "LunarLander-v3", 1_000_000, 5, 220),
    ("ppo", "HalfCheetah-v5", 1_000_000, 3, 2000),
    ("trpo", "HalfCheetah-v5", 1_000_000, 3, 1800),
    ("ppo", "exact:chain", 20_000, 3, 0.7),
    ("trpo", "exact:chain", 20_000, 3, 0.7),
    ("actor_critic", "exact:chain", 100_000, 3, 0.7),
]


def is_exact(task: str) -> bool:
    """Is J computed, not estimated?"""
    return task.startswith("exact:")


def one(method: str, task: str, steps: int, seed: int) -> dict:
    """Train and evaluate once."""
    command = [sys.executable, "-m", "policygrad.cli"]
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/run"
        train = [*command, "train", method, task, "--steps", str(steps), "--seed", str(seed)]
        trained = json.loads(subprocess.check_output([*train, "--out", out, "--json"]))
        episodes = [] if is_exact(task) else ["--episodes", "20"]
        evaluated = json.loads(subprocess.check_output([*command, "eval", out, *episodes, "--json"]))
    return {
        "algorithm": method,
        "environment": task,
        "steps": trained["steps"],
        "seed": seed,
        "seconds": trained["seconds"],
        "evaluation": evaluated["score" if is_exact(task) else "return_mean"],
        "training": trained["return_mean"],
    }


def write_table(results: list[dict]) -> None:
    """docs/learning.md."""
    lines = [
        "# What is learned",
        "",
        "Written by `python benchmarks/learning.py`: `policygrad train` with the presets, then 20 evaluation episodes",
        "with the policy's mode; on `exact:` worlds the exact discounted return of the policy, with its noise. Mean",
        "over the seeds, each seed's result beside it.",
        "",
        "| method | task | steps | threshold | evaluation, mean | each seed | seconds a run (median) |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, task, steps, seeds, threshold in TASKS:
        runs = [r for r in results if (r["algorithm"], r["environment"]) == (method, task)]
        runs = sorted((r for r in runs if r["seed"] < seeds), key=lambda r: r["seed"])
        if len(runs) < seeds:
            continue
        scores = [r["evaluation"] for r in runs]
        digits, each = (3, 3) if is_exact(task) else (1, 0)
        seconds = statistics.median(r["seconds"] for r in runs)
        lines.append(
            f"| `{method}` | {task} | {steps:,} | {threshold} | **{statistics.mean(scores):,.{digits}f}** | "
            f"{', '.join(f'{x:,.{each}f}' for x in scores)} | {seconds:,.0f} |"
        )
    lines += ["", "The seconds were taken with two runs at a time on two cores."]
    lines += beside_others() + of_pong() + of_kuhn()
    TABLE.write_text("\n".join(lines) + "\n")


def beside_others() -> list[str]:
    """Memory and masks beside sb3-contrib, as benchmarks/beside.py measured them last."""
    found = json.loads(beside.RESULTS.read_text()) if beside.RESULTS.exists() else {}
    lines = []
    for task, said in (
        ("memory", "Memory: popgym's RepeatPreviousEasy, beside RecurrentPPO"),
        ("memory-long", "The same for ten times as long, two seeds at a time"),
        ("masks", "Masks: sb3-contrib's InvalidActionEnvDiscrete (80 actions, 60 forbidden), beside MaskablePPO"),
    ):
        if task in found:
            lines += [
                "",
                f"## {said}",
                "",
                f"`python benchmarks/beside.py {task}`: the same networks, batches and epochs,",
            ]
            lines += [
                "torch on one thread, processes in alternation. The return is of the last 100 training episodes.",
                "",
            ]
            lines += beside.table(task, found[task])
    return lines


def of_pong() -> list[str]:
    """Pong beside Stable-Baselines3, if benchmarks/pong.py has been run."""
    if not pong.RESULTS.exists():
        return []
    said = [
        "`python benchmarks/pong.py`, and `--sides float32`: the same settings, an hour of a core each. The first and",
        "the last row ran at the same time; float32 in another hour, beside another job on the other core.",
    ]
    return [
        "",
        "## Pong from pixels, beside Stable-Baselines3",
        "",
        *said,
        "",
        *pong.table(json.loads(pong.RESULTS.read_text())),
        "",
        "One seed. Stable-Baselines3 computes in float32. By torch's profiler an iteration of ours in float32, 1,024",
        "decisions, is 6.4 s of a core: 2.6 of convolutions with their gradients, 0.7 of linear layers, 1.1 of casting",
        "pixels and dividing them by 255, 0.7 of other operators, and 1.3 of the game and Python.",
    ]


def of_kuhn() -> list[str]:
    """A game that needs memory, as examples/kuhn.py found it last."""
    found = json.loads(KUHN.read_text())
    lines = [
        "",
        "## A game that needs memory: Kuhn poker whose cards are looked at once",
        "",
        "`python examples/kuhn.py --out benchmarks/kuhn.json`: PPO by self-play. A player sees its card in its first",
        "move and never again. Chips a game, the mean of both seats, summed over all that can happen; at worst is",
        "against the opponent who answers the policy best. With perfect play that is 0, and for any policy without",
        "memory at most -1/3: who bets and calls with all but the lowest card wins so much from all of them.",
        "",
        f"| {found['steps']:,} decisions | each seed |",
        "|---|---|",
    ]
    rows = {"GRU, at worst": found["worst"]["gru"], "no memory, at worst": found["worst"]["none"]}
    for name, scores in {**rows, "GRU against no memory": found["against"]}.items():
        lines.append(f"| {name} | {', '.join(f'{x:.3f}' for x in scores)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help="METHOD/TASK, by default all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    if not arguments.table:
        chosen = [task for task in TASKS if not arguments.tasks or f"{task[0]}/{task[1]}" in arguments.tasks]
        with ThreadPoolExecutor(arguments.workers) as pool:
            jobs = [pool.submit(one, *task[:3], seed) for task in chosen for seed in range(task[3])]
            for job in as_completed(jobs):
                result = job.result()
                print(json.dumps(result), flush=True)
                key = ("algorithm", "environment", "seed")
                results = [r for r in results if any(r[k] != result[k] for k in key)] + [result]
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_table(results)


if __name__ == "__main__":
    main()
