"""Pong from pixels beside Stable-Baselines3: the same settings, an hour of processor time each, side by side.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 stable-baselines3 ale-py opencv-python-headless
    python benchmarks/pong.py --peers PEERS/bin/python [--hours 1] [--sides bfloat16 SB3]
    python benchmarks/pong.py --write        only the page's table and the picture, from benchmarks/pong.json

ALE/Pong-v5 with sticky actions: gray, 84 x 84, four frames; the preset (PPO, 8 environments of 128 steps, 4 epochs of
minibatches of 256, one network of three convolutions for policy and critic), which is the zoo's of Stable-Baselines3
but for the clip, which stays 0.1 on both sides. `bfloat16` is ours with `--autocast bfloat16`, `float32` ours without.
The sides named run at the same time, each on a core of its own with one thread, and each stops once its process has
used its hours of processor time, whatever else the machine does; those of other runs stay in the results. The return is
the mean of the last 100 training episodes, from -21 to 21. PEERS sees this library by PYTHONPATH; it needs its
dependencies, too. `python benchmarks/learning.py --table` writes the result to docs/learning.md.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks" / "pong.json", ROOT / "docs" / "pong.png"
LINES = {
    "bfloat16": ("#1b6ca8", "policygrad, bfloat16"),
    "float32": ("#6fa8dc", "policygrad"),
    "SB3": ("#d1752c", "Stable-Baselines3"),
}
STEPS = 10_000_000  # to which the learning rate falls
SIDES = {"bfloat16": "ours, `--autocast bfloat16`", "float32": "ours", "SB3": "Stable-Baselines3"}


class Enough(Exception):
    """The processor time is used."""


Report = Callable[[int, float], None]  # (steps, return); raises Enough at the end


def watched(hours: float) -> Report:
    """Prints the progress as lines of JSON, one in half a minute."""
    began, printed = time.perf_counter(), 0.0

    def report(steps: int, mean: float) -> None:
        nonlocal printed
        used, wall = sum(os.times()[:4]), time.perf_counter() - began  # with that of a compiler
        if used - printed >= 30 or used >= 3600 * hours:
            printed = used
            row = {"hours": used / 3600, "wall": wall / 3600, "steps": steps, "return": mean}
            print(json.dumps(row), flush=True)
        if used >= 3600 * hours:
            raise Enough

    return report


def ours(seed: int, report: Report, autocast: str = "none") -> None:
    import policygrad as pg

    how: Any = {"steps": STEPS, "seed": seed, "threads": 1, "checkpoints": 0, "autocast": autocast}
    with pg.Training("ppo", "ALE/Pong-v5", **how) as training:
        for row in training:
            report(row["steps"], row.get("return", -21.0))


def theirs(seed: int, report: Report) -> None:
    import ale_py
    import gymnasium
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    gymnasium.register_envs(ale_py)
    torch.set_num_threads(1)
    game = {"frameskip": 1, "repeat_action_probability": 0.25}
    environments = VecFrameStack(make_atari_env("ALE/Pong-v5", 8, seed=seed, env_kwargs=game), 4)

    class Watch(BaseCallback):
        def _on_rollout_end(self) -> None:
            assert self.model.ep_info_buffer is not None
            found = [x["r"] for x in self.model.ep_info_buffer]
            report(self.num_timesteps, sum(found) / len(found) if found else -21.0)

        def _on_step(self) -> bool:
            return True

    model = PPO(
        "CnnPolicy", environments, n_steps=128, n_epochs=4, batch_size=256, learning_rate=lambda left: 2.5e-4 * left,
        clip_range=0.1, vf_coef=0.5, ent_coef=0.01, gamma=0.99, gae_lambda=0.95, max_grad_norm=0.5, seed=seed,
        device="cpu",
    )  # fmt: skip
    model.learn(STEPS, callback=Watch())


def child(side: str, seed: int, hours: float) -> None:
    import warnings

    warnings.simplefilter("ignore")
    run = {"bfloat16": partial(ours, autocast="bfloat16"), "float32": ours, "SB3": theirs}[side]
    with contextlib.suppress(Enough):
        run(seed, watched(hours))


def measure(peers: str, sides: list[str], hours: float, seed: int) -> dict[str, list[dict[str, float]]]:
    """The sides, at the same time, each on a core of its own as far as they reach."""
    cores = sorted(os.sched_getaffinity(0))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    running = {}
    for place, side in enumerate(sides):
        core = cores[place % len(cores)]
        command = ["taskset", "-c", str(core), peers, __file__, "--child", side]
        command += ["--seed", str(seed), "--hours", str(hours)]
        running[side] = subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True
        )
    found = {}
    for side, process in running.items():
        said, _ = process.communicate()
        if process.returncode:
            raise SystemExit(f"{side} ended with code {process.returncode}")
        found[side] = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    return found


def table(found: dict[str, list[dict[str, float]]]) -> list[str]:
    """The lines of docs/learning.md."""
    last = {side: found[side][-1] for side in SIDES if side in found}
    base = last["SB3"]["steps"] / last["SB3"]["hours"]
    lines = [
        "| side | hours of a core | decisions | a second | ratio | return, last 100 games |",
        "|---|---|---|---|---|---|",
    ]
    for side, x in last.items():
        speed = x["steps"] / x["hours"]
        lines.append(
            f"| {SIDES[side]} | {x['hours']:.2f} | {x['steps']:,.0f} | {speed / 3600:,.0f} | {speed / base:.2f} | "
            f"{x['return']:.1f} |"
        )
    return [*lines, "", "![The return by hours, and by decisions](pong.png)"]


def draw(found: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for panel, (name, label, unit) in zip(
        panels, [("hours", "hours of one core", 1), ("steps", "decisions (thousands)", 1e3)], strict=True
    ):
        for side, (color, said) in LINES.items():
            rows = found.get(side, [])
            if rows:
                panel.plot([x[name] / unit for x in rows], [x["return"] for x in rows], color=color, label=said, lw=1.8)
        panel.set_xlabel(label)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("return of the last 100 games")
    panels[0].legend(frameon=False)
    figure.suptitle("Pong from pixels, the same settings, one seed", fontsize=11)
    figure.savefig(PICTURE, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["bfloat16", "SB3"])
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", choices=SIDES)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.seed, arguments.hours)
        return
    if not arguments.write:
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        measured = measure(arguments.peers, arguments.sides, arguments.hours, arguments.seed)
        RESULTS.write_text(json.dumps(before | measured, indent=1) + "\n")
    found = json.loads(RESULTS.read_text())
    draw(found)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
