"""RLHF, whole: preferences -> reward model -> PPO with a KL penalty, on a model small enough for a CPU.

    python examples/rlhf.py            about 4 minutes; writes runs/rlhf/
    python examples/rlhf.py --quick    the same in seconds, too short to learn anything

The task is addition with written-out working, 47+385=7+5=12,4+8+1=13,0+3+1=4:432. A small model has learned it from
demonstrators who often forget to carry, and is right less than half of the time. Nobody tells it which answers are
right: a judge compares pairs of answers, and errs now and then. A reward model learns to score answers as the judge
compares them, and PPO raises the score, less beta times the KL divergence to the model that it started from:

    J(pi) = E[r(x, y)] - beta KL(pi, pi_ref)               (Ouyang et al. 2022, arXiv 2203.02155, eq. 2)

What comes out is a table and a picture of the reward against the KL, for several beta, and beside it what the reward
model stands for: the share of right answers, to problems that were in none of the steps. With a penalty the share grows
from under half to nearly nine in ten. Without one the score is the highest, and the answers are no better than at the
start: the policy has found what the reward model takes for right.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from policygrad.divergences import kl
from policygrad.errors import UserError
from policygrad.language import arithmetic
from policygrad.language.completions import Request
from policygrad.language.generation import generate
from policygrad.language.models import load_model, save_model
from policygrad.language.policies import LanguagePolicy, Prefixes
from policygrad.language.sampler import Prompts
from policygrad.language.warmup import warmed_up
from policygrad.train.reports import GREY
from policygrad.train.reward_model import train_reward_model
from policygrad.train.run import Run
from policygrad.train.training import check_empty, train

REWARD = "reward-model"
RIGHT = "policygrad.language.arithmetic:right"


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    coefficients: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.0)  # beta
    problems: int = 48_000  # about two in five of them give a comparison
    iterations: int = 12  # of PPO, for each beta
    prompts: int = 256  # in an iteration
    max_tokens: int = 40
    held_out: int = 128  # problems to be judged on


QUICK = Size(coefficients=(1.0, 0.0), problems=200, iterations=2, prompts=16, max_tokens=12, held_out=16)


@dataclass(frozen=True)
class Point:
    """A policy, as it is judged on held-out problems."""

    label: str
    reward: float  # the reward model's
    accuracy: float  # the truth
    divergence: float  # KL(pi, pi_ref), in nats a completion


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    parser.add_argument("--out", type=Path, default=Path("runs/rlhf"), help="an empty directory, by default runs/rlhf")
    arguments = parser.parse_args()
    try:
        check_empty(arguments.out)
        rlhf(QUICK if arguments.quick else Size(), arguments.out, quick=arguments.quick)
    except UserError as error:
        sys.exit(str(error))


def rlhf(size: Size, out: Path, *, quick: bool) -> None:
    """The three steps, and what came out of them."""
    # 0. The policy to begin with; it is also pi_ref, from which it shall not stray too far.
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a model this small is not worth two, which wait for each other where the CPU is shared
    model = arithmetic.model(hidden=16, layers=1) if quick else warmed_up(print)
    save_model(model, arithmetic.tokenizer(), out / "start")

    # 1. Preferences. Of two answers to a problem the judge has chosen one; all that is kept is which.
    problems, _ = arithmetic.splits(size.problems, 512, seed=0)
    pairs = arithmetic.preferences(problems, seed=0)
    (out / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    print(f"\n1. {len(pairs):,} preferences, such as {json.dumps(pairs[0])}")

    # 2. The reward model: the policy's own trunk under a new head. It maximizes E[log sigma(r_chosen - r_rejected)].
    print("\n2. The reward model")
    train_reward_model(
        str(out / "preferences.jsonl"),
        model=str(out / "start"),
        out=out / REWARD,
        announce=lambda line: print(f"   {line}"),
        held_out=64 if quick else 512,
        learning_rate=5e-4,
    )

    # 3. PPO. The reward of an answer is the reward model's; each token costs beta log(pi / pi_ref). Right answers are
    #    counted with a weight of 0: to see what becomes of them, not to learn from them.
    print("\n3. PPO with a KL penalty")
    runs = [ppo(beta, size, out) for beta in size.coefficients]

    # What came out, of problems that were held out.
    points = [judged(run, out, size) for run in runs]
    start = scored("start", runs[0].before, 0.0)
    print(f"\n{'':12}{'reward':>10}{'right':>10}{'KL(pi, pi_ref)':>18}")
    for point in (start, *points):
        print(f"{point.label:12}{point.reward:10.2f}{point.accuracy:10.1%}{point.divergence:13.2f} nats")
    draw(start, points, out / "rlhf.png")
    print(f"\n{out}: rlhf.png, preferences.jsonl, {REWARD}/ and a run for each beta")


def ppo(beta: float, size: Size, out: Path) -> Run:
    """Train the policy on the reward model with a penalty of weight beta."""
    run = train(
        "ppo",
        "arithmetic",
        model=str(out / "start"),
        reward=(str(out / REWARD), RIGHT),
        reward_weight=(1.0, 0.0),
        kl_ref="reward",
        kl_ref_coefficient=beta,
        iterations=size.iterations,
        prompts_per_rollout=size.prompts,
        completions=1,
        max_tokens=size.max_tokens,
        held_out=size.held_out,
        learning_rate=3e-4,
        learning_rate_schedule="linear",
        critic_learning_rate=1e-3,
        epochs=2,
        minibatch_size=min(128, size.prompts),
        out=out / f"ppo-beta-{beta:g}",
    )
    print(f"   beta = {beta:g}: {run.after.line() if run.after else ''}")
    return run


def judged(run: Run, out: Path, size: Size) -> Point:
    """The trained policy on the held-out problems."""
    reference = LanguagePolicy(load_model(str(out / "start")))
    divergence = divergence_of(run.policy, reference, run.world.prompts.held_out, size.max_tokens)
    label = f"beta {run.options.kl_ref_coefficient:g}"
    return scored(label, run.after, divergence)


def scored(label: str, evaluation: Any, divergence: float) -> Point:
    """What an evaluation on the held-out problems found."""
    return Point(label, evaluation.parts[REWARD], evaluation.parts["right"], divergence)


@torch.no_grad()
def divergence_of(policy: LanguagePolicy, reference: LanguagePolicy, prompts: Prompts, max_tokens: int) -> float:
    """KL(pi, pi_ref) of whole completions: E[sum_t KL(pi(.|s_t), pi_ref(.|s_t))], every summand exact."""
    words = arithmetic.tokenizer()
    request = Request(completions=4, max_tokens=max_tokens, stop=(words.eos_token_id,), pad=words.pad_token_id)
    answers = generate(policy, *prompts.padded(), request, torch.Generator().manual_seed(0))
    tokens, mask = (x.repeat_interleave(request.completions, 0) for x in prompts.padded())
    obs = Prefixes(tokens, mask, answers.tokens, answers.mask)
    return float(kl(policy(obs), reference(obs)).sum(1).mean())


def draw(start: Point, points: list[Point], path: Path) -> None:
    """What the reward model says of a policy, and what is true, against how far the policy has gone."""
    figure = Figure(figsize=(10, 4.4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2, sharex=True)
    by_distance = sorted((start, *points), key=lambda point: point.divergence)
    x = [point.divergence for point in by_distance]
    shades = colormaps["plasma"](np.linspace(0.85, 0.1, len(points)))
    colors = [GREY, *shades]  # the smaller beta, the darker
    for axes, name, title in (
        (left, "reward", "The reward model's score"),
        (right, "accuracy", "The share of right answers"),
    ):
        axes.plot(x, [getattr(point, name) for point in by_distance], color=GREY, linewidth=1, alpha=0.5)
        for point, color in zip((start, *points), colors, strict=True):
            at = (point.divergence, getattr(point, name))
            axes.plot(*at, "o", color=color, markersize=9, clip_on=False, zorder=3, label=point.label)
        axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
        axes.set_xlabel("KL(policy, start), nats a completion")
        axes.set_xscale("function", functions=(np.sqrt, np.square))  # as Gao et al. 2022, arXiv 2210.10760, draw it
        axes.margins(y=0.12)
        axes.set_xlim(0, max(1.08 * max(x), 1e-3))
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, loc="lower right")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.savefig(path)


if __name__ == "__main__":
    main()
