"""How the cost of training grows, with the limits drawn in.

    python benchmarks/growth.py [--only NAME]     measure, and write docs/growth.json, docs/growth.png, docs/growth.md
    python benchmarks/growth.py --write           draw and write docs/growth.json again

Each point is a run of its own in this process, on one thread: three iterations of warm-up, compilation among them, and
then as many as a second and a half holds, at least three. Its speed is that of the median iteration: decisions per
second of environments, tokens of completions per second of language models. Two limits stand beside it. `arithmetic`:
the matrix products of an iteration, counted as they are called, at the rate of the fastest product measured here.
`environments alone`: the same environments with the same actions every time, and nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speed_language import SMALL, make, reward

DOCS = Path(__file__).parents[1] / "docs"
SECONDS, LEAST, WARM = 1.5, 3, 3  # of the timed part of a point; its iterations at least; those before
CART = {"num_envs": 64, "num_steps": 128, "epochs": 4, "minibatch_size": 2048, "hidden": (64, 64)}
TEXT = {"prompts": 8, "completions": 8, "prompt": 24, "tokens": 32, "vocabulary": 512}


@dataclass(frozen=True)
class Curve:
    """What one plot varies: its numbers, and the settings that each makes of CART or TEXT."""

    title: str
    numbers: tuple[int, ...]
    settings: Any  # number -> dict


CONTROL = {
    "environments": Curve(
        "environments, 32 steps each",
        (1, 4, 16, 64, 256, 1024, 4096),
        lambda n: {"num_envs": n, "num_steps": 32, "minibatch_size": 8 * n},
    ),
    "width": Curve("width of both hidden layers", (32, 64, 128, 256, 512, 1024), lambda n: {"hidden": (n, n)}),
    "minibatch": Curve("rows of a minibatch", (32, 128, 512, 2048, 8192), lambda n: {"minibatch_size": n}),
}
LANGUAGE = {
    "context": Curve(
        "tokens of a prompt", (16, 64, 256, 1024), lambda n: {"prompt": n, "prompts": 2, "completions": 8, "tokens": 16}
    ),
    "vocabulary": Curve("vocabulary", (512, 2048, 8192, 32768), lambda n: {"vocabulary": n}),
    "completions": Curve(
        "completions of a prompt", (2, 4, 8, 16, 32, 64), lambda n: {"completions": n, "prompts": 2, "prompt": 64}
    ),
}
WAYS = {"plain": {"compile": "off"}, "compiled": {"compile": "on"}}


def products_per_second() -> float:
    """Floating-point operations per second of the fastest matrix product."""
    import torch

    best = 0.0
    for n in (256, 512, 1024):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(20):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def timed(training: Any) -> tuple[float, float]:
    """Decisions or tokens per second of the median iteration, and the operations in matrix products for each."""
    from torch.utils.flop_counter import FlopCounterMode

    speeds: list[float] = []
    before = 0.0
    for _ in range(WARM):
        before = next(training)["steps"]
    begin = time.perf_counter()
    while time.perf_counter() < begin + SECONDS or len(speeds) < LEAST:
        start = time.perf_counter()
        now = next(training)["steps"]
        speeds.append((now - before) / (time.perf_counter() - start))
        before = now
    if training.compiled == "on":  # a graph's products are not counted
        return statistics.median(speeds), 0.0
    with FlopCounterMode(display=False) as counter:
        now = next(training)["steps"]
    return statistics.median(speeds), counter.get_total_flops() / (now - before)


def alone(settings: dict[str, Any]) -> float:
    """Steps per second of the environments with the same actions every time."""
    import numpy as np

    from policygrad.control.environments import make_environments

    count = settings["num_envs"]
    environments = make_environments("CartPole-v1", count)
    environments.reset(seed=0)
    actions, steps, begin = np.arange(count) % 2, 0, time.perf_counter()
    while time.perf_counter() < begin + SECONDS / 2 or steps < 10 * count:
        environments.step(actions)
        steps += count
    speed = steps / (time.perf_counter() - begin)
    environments.close()
    return speed


def of_control(curve: Curve) -> Iterator[dict[str, Any]]:
    """The points of a curve on CartPole-v1."""
    from policygrad.train.training import Training

    for number in curve.numbers:
        point: dict[str, Any] = {"number": number}
        settings = {**CART, **curve.settings(number)}
        for way, words in WAYS.items():
            with Training("ppo", "CartPole-v1", preset="none", steps=10**10, **settings, **words) as training:
                point[way], operations = timed(training)
                if way == "plain":  # a graph's products are not counted
                    point["operations"] = operations
        yield {**point, "environments alone": alone(settings)}


def of_language(curve: Curve) -> Iterator[dict[str, Any]]:
    """The points of a curve on a random Llama of about 1M parameters."""
    from policygrad.train.training import Training

    for number in curve.numbers:
        settings: dict[str, Any] = {**TEXT, **curve.settings(number)}
        with tempfile.TemporaryDirectory() as place:
            make({**SMALL, "num_attention_heads": 4, "vocab_size": settings["vocabulary"]}, Path(place), 2048)
            words = [" ".join(f"w{2 + (i * 31 + j * 7) % 500}" for j in range(settings["prompt"])) for i in range(64)]
            with Training(
                "grpo", None, dataset=[{"prompt": x} for x in words], model=place, reward=reward, held_out=0,
                prompts_per_rollout=settings["prompts"], completions=settings["completions"], kl_ref="none",
                max_tokens=settings["tokens"], learning_rate=1e-6, iterations=10**6, threads=1,
            ) as training:  # fmt: skip
                speed, operations = timed(training)
        yield {"number": number, "plain": speed, "operations": operations}


def draw(found: dict[str, Any]) -> None:
    """The curves and their limits, both axes logarithmic."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    for axes, (name, curve) in zip(grid.flat, {**CONTROL, **LANGUAGE}.items(), strict=True):
        points = found["curves"].get(name, [])
        numbers = [x["number"] for x in points]
        for way, color in zip(WAYS, ("#999999", "#4477aa"), strict=True):
            if points and way in points[0]:
                axes.plot(numbers, [x[way] for x in points], "o-", color=color, label=way, markersize=4)
        limits = {"arithmetic": [found["products per second"] / x["operations"] for x in points]}
        if points and "environments alone" in points[0]:
            limits["environments alone"] = [x["environments alone"] for x in points]
        for limit, style in zip(limits, ("--", ":"), strict=False):
            axes.plot(numbers, limits[limit], style, color="#cc3311", label=limit)
        axes.set(xscale="log", yscale="log", xlabel=curve.title)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [f"{x:,}" for x in numbers])
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    grid[0, 0].set_ylabel("PPO on CartPole-v1: decisions per second")
    grid[1, 0].set_ylabel("GRPO, Llama of 1M: tokens per second")
    figure.savefig(DOCS / "growth.png", dpi=130)


def table(found: dict[str, Any]) -> Iterator[str]:
    """The numbers behind the picture."""
    for name, curve in {**CONTROL, **LANGUAGE}.items():
        points = found["curves"].get(name, [])
        ways = [way for way in (*WAYS, "environments alone") if points and way in points[0]]
        yield f"\n| {curve.title} | {' | '.join(ways)} | arithmetic |\n|{'---|' * (len(ways) + 2)}"
        for x in points:
            numbers = [x[way] for way in ways] + [found["products per second"] / x["operations"]]
            yield f"| {x['number']:,} | {' | '.join(f'{value:,.0f}' for value in numbers)} |"


def write() -> None:
    """docs/growth.md and docs/growth.png from docs/growth.json. What was written by hand below the tables stays."""
    found = json.loads((DOCS / "growth.json").read_text())
    text = (
        f"# How cost grows\n\nMade by `python benchmarks/growth.py` on {platform.machine()}, {os.cpu_count()} cores. "
        f"The fastest matrix product ran at {found['products per second'] / 1e9:.0f} GFLOP/s.\n"
        f"{__doc__.split(chr(10) * 2)[2].strip()}\n\n![Speeds and limits](growth.png)\n"
    )
    place, mark = DOCS / "growth.md", "\n## "
    below = place.read_text().partition(mark) if place.exists() else ("", "", "")
    place.write_text(text + "\n".join(table(found)) + "\n" + "".join(below[1:]))
    draw(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[*CONTROL, *LANGUAGE], help="measure this alone, and print it")
    parser.add_argument("--write", action="store_true", help="draw and write docs/growth.json again")
    options = parser.parse_args()
    if not options.write:
        import torch

        torch.set_num_threads(1)
        found: dict[str, Any] = {"products per second": products_per_second(), "curves": {}}
        for curves, points_of in ((CONTROL, of_control), (LANGUAGE, of_language)):
            for name, curve in curves.items():
                if options.only in (None, name):
                    found["curves"][name] = []
                    for point in points_of(curve):
                        found["curves"][name].append(point)
                        print(name, {key: round(x) for key, x in point.items()}, flush=True)
        if options.only:
            return
        (DOCS / "growth.json").write_text(json.dumps(found, indent=1) + "\n")
    write()


if __name__ == "__main__":
    main()
