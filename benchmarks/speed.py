"""Training speed beside Stable-Baselines3, SBX and rejax, in alternation, with the same networks, batches and epochs.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 stable-baselines3 sb3-contrib sbx-rl rejax "gymnax<0.1"
    PEERS/bin/pip install mujoco==3.3.7 "gymnasium[mujoco]"
    python benchmarks/speed.py --peers PEERS/bin/python [--only NAME] [--repetitions 3]

Each measurement is a process of its own. It first trains for a warm-up, and compilation is in it; then it trains for
the steps that are timed. Speeds are medians of the repetitions, and a ratio is that of the medians. The return stands
beside the speed: the mean of the last 100 training episodes, of rejax the mean of 128 evaluation episodes. torch has
one thread on both sides. The rows at the end time whole processes: from the start of Python to a mean return of 475
over 100 training episodes, and the two commands that do nothing. Rows with EnvPool need it installed; those with a
sampler, which is overlap in a process of its own, need Ray. Writes docs/speed.json, docs/speed.md and docs/speed.png
when all of it is run; --write does it again from docs/speed.json.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
OURS = {
    "plain": {"compile": "off"},
    "compiled": {"compile": "on"},
    "overlap": {"compile": "on", "overlap": True},
    "EnvPool": {"compile": "on", "vectorization": "envpool"},
    "sampler": {"compile": "on", "samplers": 1, "lag": 1},
}
NEEDS = {"EnvPool": "envpool", "sampler": "ray"}
SOLVED = "from policygrad.train.training import train; train('ppo', 'CartPole-v1', progress=False, {})"
# The settings of rl-baselines3-zoo for PPO on CartPole-v1, stopped by the training episodes as ours is.
SOLVED_BY_SB3 = """
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

torch.set_num_threads(1)

class Stop(BaseCallback):
    def _on_step(self):
        found = [x["r"] for x in self.model.ep_info_buffer]
        return len(found) < 100 or sum(found) / len(found) < 475

PPO(
    "MlpPolicy", make_vec_env("CartPole-v1", 8), n_steps=32, batch_size=256, gae_lambda=0.8, gamma=0.98, n_epochs=20,
    ent_coef=0.0, learning_rate=lambda left: 0.001 * left, clip_range=lambda left: 0.2 * left, device="cpu", seed={},
).learn(100_000, callback=Stop())
"""


@dataclass(frozen=True)
class Work:
    """What is timed: settings of this library and of the peers, and the least ratio asked for of a way to a peer."""

    method: str
    task: str
    options: dict[str, Any]
    theirs: dict[str, Any]
    warm: int  # steps
    timed: int
    asked: dict[tuple[str, str], float] = field(default_factory=dict)


WORK = {
    "PPO CartPole-v1, 64 x 128": Work(
        "ppo", "CartPole-v1", {"num_envs": 64, "num_steps": 128, "epochs": 4, "minibatch_size": 2048},
        {"n_steps": 128, "n_epochs": 4, "batch_size": 2048}, 81_920, 409_600,
        {("compiled", "SB3"): 4.0, ("compiled", "SBX"): 3.0, ("compiled", "rejax"): 0.9},
    ),
    "PPO CartPole-v1, 4 x 128": Work(
        "ppo", "CartPole-v1", {"num_envs": 4, "num_steps": 128, "epochs": 4, "minibatch_size": 128},
        {"n_steps": 128, "n_epochs": 4, "batch_size": 128}, 10_240, 81_920, {("compiled", "SB3"): 4.0},
    ),
    "PPO HalfCheetah-v5, 8 x 256": Work(
        "ppo", "HalfCheetah-v5", {"num_envs": 8, "num_steps": 256, "epochs": 10, "minibatch_size": 64},
        {"n_steps": 256, "n_epochs": 10, "batch_size": 64}, 8_192, 32_768,
        {("compiled", "SB3"): 3.5, ("compiled", "SBX"): 1.8, ("overlap", "SB3"): 5.0, ("sampler", "SB3"): 5.0,
         ("EnvPool", "SB3"): 5.0},
    ),
    "TRPO HalfCheetah-v5, 8 x 256": Work(
        "trpo", "HalfCheetah-v5",
        {"num_envs": 8, "num_steps": 256, "cg_iters": 10, "critic_epochs": 10, "critic_minibatch_size": 128},
        {"n_steps": 256, "batch_size": 128, "cg_max_steps": 10, "n_critic_updates": 10}, 8_192, 65_536,
        {("compiled", "SB3"): 1.7, ("EnvPool", "SB3"): 2.5},
    ),
    "A2C CartPole-v1, 16 x 5": Work(
        "actor_critic", "CartPole-v1", {"num_envs": 16, "num_steps": 5}, {"n_steps": 5}, 20_000, 160_000,
        {("compiled", "SB3"): 4.0},
    ),
}  # fmt: skip


def ours(work: Work, way: str) -> dict[str, float]:
    """Steps per second of this library, and the return."""
    from policygrad.train.training import Training

    values: dict[str, Any] = {**work.options, **OURS[way]}
    with Training(work.method, work.task, preset="none", steps=10**9, **values) as training:
        row = {"steps": 0.0}
        while row["steps"] < work.warm:
            row = next(training)
        first, start = row["steps"], time.perf_counter()
        while row["steps"] < first + work.timed:
            row = next(training)
        seconds = time.perf_counter() - start
    return {"speed": (row["steps"] - first) / seconds, "return": row.get("return", float("nan"))}


def baselines(work: Work, way: str) -> dict[str, float]:
    """The same of Stable-Baselines3, or of SBX."""
    import sb3_contrib
    import stable_baselines3
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    kinds = {"ppo": stable_baselines3.PPO, "actor_critic": stable_baselines3.A2C, "trpo": sb3_contrib.TRPO}
    kind: Any = kinds[work.method]
    values: dict[str, Any] = {"policy_kwargs": {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}, "device": "cpu"}
    if way == "SBX":
        import sbx

        kind, values = sbx.PPO, {"policy_kwargs": {"net_arch": [64, 64]}}
    model = kind("MlpPolicy", make_vec_env(work.task, work.options["num_envs"]), **values, **work.theirs)
    model.learn(work.warm)
    first, start = model.num_timesteps, time.perf_counter()
    model.learn(work.timed, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    found = [x["r"] for x in model.ep_info_buffer]
    return {"speed": (model.num_timesteps - first) / seconds, "return": statistics.mean(found) if found else 0.0}


def rejax(work: Work) -> dict[str, float]:
    """The same of rejax's PPO: environment, acting and update are one compiled loop."""
    import jax
    from rejax import PPO

    count, steps, epochs = (work.options[name] for name in ("num_envs", "num_steps", "epochs"))
    made = PPO.create(
        env=work.task, agent_kwargs={"hidden_layer_sizes": (64, 64), "activation": "tanh"}, num_envs=count,
        num_steps=steps, num_epochs=epochs, num_minibatches=count * steps // work.options["minibatch_size"],
        total_timesteps=work.timed, eval_freq=work.timed, learning_rate=3e-4, max_grad_norm=0.5, ent_coef=0.0,
        skip_initial_evaluation=True,
    )  # fmt: skip
    loop = jax.jit(made.replace(eval_callback=lambda *_: ()).train)
    jax.block_until_ready(loop(jax.random.PRNGKey(0)))
    start = time.perf_counter()
    state, _ = jax.block_until_ready(loop(jax.random.PRNGKey(1)))
    seconds = time.perf_counter() - start
    _, returns = made.eval_callback(made, state, jax.random.PRNGKey(2))
    return {"speed": work.timed / seconds, "return": float(returns.mean())}


def measured(script: str, python: str, *words: str) -> dict[str, float]:
    """What a script prints last when this Python runs it as a child."""
    done = subprocess.run([python, script, "child", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def child(way: str, name: str) -> dict[str, float]:
    work = WORK[name]
    if way in OURS:
        return ours(work, way)
    return rejax(work) if way == "rejax" else baselines(work, way)


def alternated(commands: dict[str, Any], repetitions: int) -> dict[str, list[Any]]:
    """The results of each of several ways to measure, in turns."""
    found: dict[str, list[Any]] = {way: [] for way in commands}
    for _ in range(repetitions):
        for way, measure in commands.items():
            found[way].append(measure())
    return found


def whole_process(command: list[str]) -> float:
    """The seconds that a process takes."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return time.perf_counter() - start


def run(peers: str, only: str | None, repetitions: int) -> list[dict[str, Any]]:
    """All rows: a way, a peer, the medians of both, their ratio, and the one asked for."""
    rows = []
    for name, work in WORK.items():
        if only is not None and only not in name:
            continue
        ways = ["plain", *dict.fromkeys(way for pair in work.asked for way in pair)]
        ways = [way for way in ways if way not in NEEDS or importlib.util.find_spec(NEEDS[way]) is not None]
        found = alternated(
            {way: partial(measured, __file__, sys.executable if way in OURS else peers, way, name) for way in ways},
            repetitions,
        )
        middle = {w: {k: statistics.median(x[k] for x in xs) for k in ("speed", "return")} for w, xs in found.items()}
        for (way, peer), asked in {("compiled", "plain"): None, **work.asked}.items():
            if way in middle:
                mine, other = middle[way], middle[peer]
                rows.append(
                    {"work": name, "way": way, "peer": peer, "unit": "steps/s", "ours": mine["speed"],
                     "theirs": other["speed"], "ratio": mine["speed"] / other["speed"], "asked": asked,
                     "returns": [mine["return"], other["return"]]}
                )  # fmt: skip
                print(line_of(rows[-1]), flush=True)
    if only is None or only in "CartPole-v1 to 475":
        seeds, options = iter(range(10**6)), "seed={}, stop_at_return=475.0"
        found = alternated(
            {
                "ours": lambda: whole_process([sys.executable, "-c", SOLVED.format(options.format(next(seeds)))]),
                "SB3": lambda: whole_process([peers, "-c", SOLVED_BY_SB3.replace("seed={}", f"seed={next(seeds)}")]),
            },
            max(5, repetitions),
        )
        mine, other = (statistics.median(x) for x in found.values())
        rows.append(
            {"work": "CartPole-v1 to 475, whole process", "way": "preset", "peer": "SB3, zoo's settings",
             "unit": "s", "ours": mine, "theirs": other, "ratio": mine / other, "asked": 0.6, "returns": None}
        )  # fmt: skip
        print(line_of(rows[-1]), flush=True)
    for name, limit, command in (
        ("`policygrad --help`", 0.2, ["-m", "policygrad", "--help"]),
        ("`import policygrad`", 0.05, ["-c", "import policygrad"]),
    ):
        if only is None or only in name:
            bare = {"ours": [sys.executable, *command], "bare": [sys.executable, "-c", "pass"]}
            found = alternated({way: partial(whole_process, c) for way, c in bare.items()}, 11)
            mine, other = (statistics.median(x) for x in found.values())
            rows.append(
                {"work": name, "way": "whole process", "peer": "python -c pass", "unit": "s", "ours": mine,
                 "theirs": other, "ratio": mine / other, "asked": limit, "returns": None}
            )  # fmt: skip
            print(line_of(rows[-1]), flush=True)
    return rows


def line_of(row: dict[str, Any]) -> str:
    """A row of the table."""
    numbers = [f"{x:,.0f}" if row["unit"] == "steps/s" else f"{x:.2f} s" for x in (row["ours"], row["theirs"])]
    asked = "" if row["asked"] is None else f"{row['asked']}"
    if row["work"].startswith("`"):  # a time and not a ratio
        asked = f"{row['asked']} s"
    returns = "" if row["returns"] is None else " / ".join(f"{x:,.0f}" for x in row["returns"])
    columns = [row["work"], row["way"], numbers[0], row["peer"], numbers[1], f"{row['ratio']:.2f}", asked, returns]
    return f"| {' | '.join(columns)} |"


def reached(row: dict[str, Any]) -> bool:
    """Whether a row has what was asked for."""
    if row["work"].startswith("`"):
        return row["ours"] <= row["asked"]
    return row["ratio"] <= row["asked"] if row["unit"] == "s" else row["ratio"] >= row["asked"]


def draw(rows: list[dict[str, Any]]) -> None:
    """The ratios, with a mark at what was asked for."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["unit"] == "steps/s" and row["asked"]][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(rows) + 1.2), layout="constrained")
    axes.barh(range(len(rows)), [row["ratio"] for row in rows], color="#4477aa", height=0.6)
    for i, row in enumerate(rows):
        axes.plot([row["asked"]] * 2, [i - 0.38, i + 0.38], color="#cc3311", linewidth=2)
        axes.text(row["ratio"] + 0.06, i, f"{row['ratio']:.2f}", va="center", fontsize=9)
    names = [f"{row['work']}: {row['way']} / {row['peer']}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=9)
    axes.axvline(1, color="0.4", linewidth=1, linestyle=":")
    axes.set_xlabel("speed, as a multiple of the peer in the same run (red: asked for)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / "speed.png", dpi=150)


def write() -> None:
    """docs/speed.md and docs/speed.png from docs/speed.json. What was written by hand below the table stays."""
    rows = json.loads((DOCS / "speed.json").read_text())
    head = [
        "| work | this library | speed | peer | speed | ratio | asked for | returns of both |",
        "|---|---|---|---|---|---|---|---|",
    ]
    text = (
        "# Speed\n\nMade by `python benchmarks/speed.py --peers PEERS/bin/python`: environment steps per second of "
        f"training, sampling and learning together, on {platform.machine()} with {os.cpu_count()} cores.\n"
        f"{__doc__.split(chr(10) * 2)[2].strip()}\n\n![The ratios of the table](speed.png)\n\n"
    )
    asked = [row for row in rows if row["asked"] is not None]
    reach = f"\n\n{sum(map(reached, asked))} of {len(asked)} rows reach what was asked for.\n"
    place, mark = DOCS / "speed.md", "\n## "
    below = place.read_text().partition(mark) if place.exists() else ("", "", "")
    place.write_text(text + "\n".join([*head, *map(line_of, rows)]) + reach + "".join(below[1:]))
    draw(rows)


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        print(json.dumps(child(*sys.argv[2:4])))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", help="the Python of the environment with the peers")
    parser.add_argument("--only")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="draw and write docs/speed.json again")
    options = parser.parse_args()
    if not options.write:
        if options.peers is None:
            parser.error("--peers is required")
        rows = run(options.peers, options.only, options.repetitions)
        if options.only:
            return
        (DOCS / "speed.json").write_text(json.dumps(rows, indent=1) + "\n")
    write()


if __name__ == "__main__":
    main()
