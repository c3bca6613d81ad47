"""A real model end to end: SmolLM2-135M-Instruct on two tasks of reasoning-gym, with LoRA, on two cores.

    python benchmarks/smollm2.py PACKAGE MODEL                      which says where PACKAGE comes from
    python benchmarks/real_model.py --model MODEL [--minutes 40]    writes docs/real-model.md, .png, and .json here
    python benchmarks/real_model.py --write                         the page and the picture from the results there are

Both tasks run at the same time, each on a core of its own with one thread, until its minutes are over. Problems are
told apart by their question: those that are held out are in no rollout. A completion goes on behind "The answer is",
and earns 1 if it names the right number (math_equal), else 0. The model answers the held-out problems before and after:
once greedily, and four times by samples at temperature 1, which is what is trained.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, PICTURE = (ROOT / x for x in ("benchmarks/real_model.json", "docs/real-model.md", "docs/real-model.png"))
PREFILL = "The answer is"
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {
        "said": "sums and differences of 2 or 3 numbers of 1 or 2 digits",
        "problems": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        "size": 6000,
        "held_out": 256,
    },
    "products": {
        "said": "products of two numbers of one digit",
        "problems": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "size": 2000,
        "held_out": 30,
    },
}
HOW: dict[str, Any] = {
    "lora_rank": 16,
    "learning_rate": 5e-4,
    "prompts_per_rollout": 8,
    "completions": 16,
    "max_tokens": 8,
    "reward": ["math_equal"],
    "threads": 1,
    "seed": 0,
    "iterations": 100_000,
    "checkpoints": 0,
}
SAMPLES = 4  # of each held-out problem
SHOWN = 12  # of them on the page
READ = """## Read by eye

All greedy answers after training, 256 and 30, are a number and a period; nothing else came.

`chain_sum`: of problems whose answer is not negative, those with two numbers are right in 56 of 93 (30
before), those with three in 9 of 103 (6). Of the 60 whose answer is negative none is right: no greedy answer
begins with a minus, before or after. Wrong answers have come nearer: half of all are within 4 of the right
number (8 before). The curve was still rising when the time was over.

`products` has 100 problems in all, so many that are held out are in training the other way round (8 times 7
for 7 times 8). The two that are wrong at the end, 4 times 7 and 7 times 4, are both held out.
"""  # of the results in real_model.json


def problems(task: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows to train on, and rows that are held out: no question is in both, and none twice."""
    import reasoning_gym

    how = TASKS[task]
    made = reasoning_gym.create_dataset(task, size=how["size"], seed=1, **how["problems"])
    unique = {x["question"]: x["answer"] for x in made}
    rows = [
        {"prompt": [{"role": "user", "content": q}, {"role": "assistant", "content": PREFILL}], "answer": a}
        for q, a in unique.items()
    ]
    return rows[how["held_out"] :], rows[: how["held_out"]]


def child(task: str, model: str, minutes: float, work: Path) -> None:
    """One task: answers before, training, answers after. Prints lines of JSON."""
    import policygrad as pg

    files = []
    for name, rows in zip(("train", "held_out"), problems(task), strict=True):
        files.append(work / f"{task}-{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {**HOW, "model": model, "evaluation_dataset": str(files[1]), "out": work / task, "progress": False}
    with pg.Training("grpo", str(files[0]), **how) as training:
        print(json.dumps({"before": answers(training.run)}), flush=True)
        began = time.perf_counter()
        for iteration, row in enumerate(training, 1):
            used = (time.perf_counter() - began) / 60
            found = {name: row[name] for name in ("reward", "length", "kl_old", "entropy") if name in row}
            print(json.dumps({"minutes": used, "iteration": iteration, **found}), flush=True)
            if used >= minutes:
                break
        print(json.dumps({"after": answers(training.run)}), flush=True)


def by_prompt(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of an evaluation, those of a prompt together."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["prompt"]), []).append(row)
    return list(found.values())


def interval(values: list[float]) -> list[float]:
    """The mean of independent values, and its interval of 95% by the normal distribution."""
    mean = sum(values) / len(values)
    half = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))
    return [mean, mean - half, mean + half]


def smooth(values: list[float]) -> list[float]:
    """The mean of each value and the four before it."""
    return [sum(values[max(0, i - 4) : i + 1]) / min(5, i + 1) for i in range(len(values))]


def answers(run: Any) -> dict[str, Any]:
    """Held-out accuracy, greedily and by samples, with intervals of 95%, and the samples."""
    greedy, sampled = run.evaluate(1, greedy=True), run.evaluate(SAMPLES)
    assert greedy.accuracy is not None  # every reward is 0 or 1
    mean, low, high = interval([sum(x["reward"] for x in rows) / len(rows) for rows in by_prompt(sampled.rows)])
    return {
        "greedy": [greedy.accuracy, *wilson(greedy.accuracy, greedy.prompts)],
        "sampled": [mean, max(0.0, low), min(1.0, high)],
        "problems": greedy.prompts,
        "samples": [
            {name: row[name] for name in ("prompt", "completion", "answer", "reward") if name in row}
            for row in greedy.rows
        ],
    }


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval of a share of `count` independent trials (Wilson 1927)."""
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def measure(model: str, minutes: float, work: Path) -> dict[str, Any]:
    """Both tasks, at the same time, each on a core of its own as far as they reach."""
    cores = sorted(os.sched_getaffinity(0))
    running = {}
    for place, task in enumerate(TASKS):
        command = ["taskset", "-c", str(cores[place % len(cores)]), sys.executable, __file__, "--child", task]
        command += ["--model", model, "--minutes", str(minutes), "--work", str(work)]
        running[task] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = {}
    for task, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{task} ended with code {process.returncode}")
        lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        ends = {name: line[name] for line in lines for name in ("before", "after") if name in line}
        found[task] = {**ends, "iterations": [line for line in lines if "iteration" in line]}
    return found


def page(found: dict[str, Any]) -> str:
    with_interval = "{:.2f} ({:.2f} to {:.2f})".format
    shown = {name: HOW[name] for name in ("lora_rank", "learning_rate", "prompts_per_rollout", "completions")}
    lines = [
        "# A real model",
        "",
        "`python benchmarks/real_model.py --model MODEL` trains SmolLM2-135M-Instruct by GRPO with LoRA on two tasks",
        "of reasoning-gym, at the same time, on one core each:",
        "`" + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in shown.items()) + "`.",
        f'A completion has up to {HOW["max_tokens"]} tokens behind "{PREFILL}", and earns 1 if it names the right',
        "number, else 0. Held-out problems are in no rollout. Intervals are of 95%, over problems.",
        "",
        "| task | held out | minutes | iterations | greedy, before | after | sampled, before | after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, x in found.items():
        last, ends = x["iterations"][-1], (x["before"], x["after"])
        cells = [with_interval(*end[kind]) for kind in ("greedy", "sampled") for end in ends]
        lines.append(
            f"| {task}: {TASKS[task]['said']} | {x['before']['problems']} | {last['minutes']:.0f} | "
            f"{len(x['iterations'])} | {' | '.join(cells)} |"
        )
    lines += ["", "![The share of right answers in training](real-model.png)", ""]
    for task, x in found.items():
        lines += [f"## {task}: the first {SHOWN} held-out problems, greedily", ""]
        lines += ["| question | answer | before | after |", "|---|---|---|---|"]
        for before, after in list(zip(x["before"]["samples"], x["after"]["samples"], strict=True))[:SHOWN]:
            said = [
                f"`{one(sample['completion'])}`{' ✓' if sample['reward'] == 1 else ''}" for sample in (before, after)
            ]
            lines.append(f"| {one(question(before))} | {before['answer']} | {said[0]} | {said[1]} |")
        lines.append("")
    return "\n".join([*lines, READ]).rstrip() + "\n"


def question(row: dict[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def one(text: str) -> str:
    """A text within a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def draw(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for (task, x), color in zip(found.items(), ("#1b6ca8", "#d1752c"), strict=True):
        minutes, rewards = ([row[name] for row in x["iterations"]] for name in ("minutes", "reward"))
        panel.plot(minutes, rewards, color=color, alpha=0.25, lw=0.8)
        panel.plot(minutes, smooth(rewards), color=color, lw=1.8, label=f"{task} (mean of 5 iterations)")
        for at, end in ((0, "before"), (minutes[-1], "after")):
            mean, low, high = x[end]["sampled"]
            panel.errorbar(at, mean, [[mean - low], [high - mean]], color=color, marker="o", ms=4, capsize=3)
    panel.set_xlabel("minutes of one core")
    panel.set_ylabel("share of right answers")
    panel.set_ylim(0, 1)
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc=(0.5, 0.55))
    figure.suptitle("SmolLM2-135M-Instruct, GRPO with LoRA; dots: held-out problems", fontsize=11)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", choices=TASKS)
    arguments = parser.parse_args()
    if not (arguments.model or arguments.write):
        parser.error("--model is missing: the directory that benchmarks/smollm2.py wrote")
    if arguments.child:
        child(arguments.child, arguments.model, arguments.minutes, arguments.work)
        return
    if not arguments.write:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(str(Path(arguments.model).resolve()), arguments.minutes, arguments.work or Path(folder))
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    draw(found)
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
