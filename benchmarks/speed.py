"""Training speed beside Stable-Baselines3, in alternation, with the same networks, batches and epochs.

    python -m venv PEERS && PEERS/bin/pip install stable-baselines3 sb3-contrib "gymnasium[mujoco]"
    python benchmarks/speed.py --peers PEERS/bin/python [--only NAME] [--repetitions 3]

Each measurement is a process of its own, which first trains for a warm-up (compilation is in it) and then for the steps
that are timed. Medians of the repetitions; the ratio is that of the medians. The return stands beside the speed: the
mean of the last 100 training episodes. Writes docs/speed.md when all of it is run.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Name: (method, task, ours, theirs, steps to warm up, steps to time, the ratio that is asked for).
WORK: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], int, int, float]] = {
    "PPO CartPole-v1, 64 x 128": (
        "ppo", "CartPole-v1", {"num_envs": 64, "num_steps": 128, "epochs": 4, "minibatch_size": 2048},
        {"n_steps": 128, "n_epochs": 4, "batch_size": 2048}, 81_920, 409_600, 4.0,
    ),
    "PPO CartPole-v1, 4 x 128": (
        "ppo", "CartPole-v1", {"num_envs": 4, "num_steps": 128, "epochs": 4, "minibatch_size": 128},
        {"n_steps": 128, "n_epochs": 4, "batch_size": 128}, 10_240, 81_920, 4.0,
    ),
    "PPO HalfCheetah-v5, 8 x 256": (
        "ppo", "HalfCheetah-v5", {"num_envs": 8, "num_steps": 256, "epochs": 10, "minibatch_size": 64},
        {"n_steps": 256, "n_epochs": 10, "batch_size": 64}, 8_192, 32_768, 3.5,
    ),
    "TRPO HalfCheetah-v5, 8 x 256": (
        "trpo", "HalfCheetah-v5",
        {"num_envs": 8, "num_steps": 256, "cg_iters": 10, "critic_epochs": 10, "critic_minibatch_size": 128},
        {"n_steps": 256, "batch_size": 128, "cg_max_steps": 10, "n_critic_updates": 10}, 8_192, 65_536, 1.7,
    ),
    "A2C CartPole-v1, 16 x 5": (
        "actor_critic", "CartPole-v1", {"num_envs": 16, "num_steps": 5},
        {"n_steps": 5}, 20_000, 160_000, 4.0,
    ),
}  # fmt: skip


def ours(name: str, compile: str) -> dict[str, float]:
    """Steps per second of this library, and the return."""
    from policygrad.train.training import Training

    method, task, options, _, warm, timed, _ = WORK[name]
    with Training(method, task, preset="none", steps=10**9, compile=compile, **options) as training:
        row = {"steps": 0.0}
        while row["steps"] < warm:
            row = next(training)
        first, start = row["steps"], time.perf_counter()
        while row["steps"] < first + timed:
            row = next(training)
        seconds = time.perf_counter() - start
    return {"speed": (row["steps"] - first) / seconds, "return": row.get("return", float("nan"))}


def theirs(name: str) -> dict[str, float]:
    """The same of Stable-Baselines3."""
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.env_util import make_vec_env

    method, task, options, others, warm, timed, _ = WORK[name]
    kind = {"ppo": stable_baselines3.PPO, "actor_critic": stable_baselines3.A2C, "trpo": sb3_contrib.TRPO}[method]
    shape = {"net_arch": {"pi": [64, 64], "vf": [64, 64]}}
    environments = make_vec_env(task, options["num_envs"])
    model: Any = kind("MlpPolicy", environments, policy_kwargs=shape, device="cpu", **others)
    model.learn(warm)
    first, start = model.num_timesteps, time.perf_counter()
    model.learn(timed, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    found = [x["r"] for x in model.ep_info_buffer]
    return {"speed": (model.num_timesteps - first) / seconds, "return": statistics.mean(found) if found else 0.0}


def measured(script: str, python: str, *words: str) -> dict[str, float]:
    """What a script prints last when this Python runs it as a child."""
    done = subprocess.run([python, script, "child", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        who, name = sys.argv[2:4]
        print(json.dumps(theirs(name) if who == "theirs" else ours(name, who)))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True)
    parser.add_argument("--only")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    lines = [
        "| work | plain | compiled | Stable-Baselines3 | ratio | asked for | returns |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, (*_, wanted) in WORK.items():
        if options.only and options.only not in name:
            continue
        ways = {"off": sys.executable, "on": sys.executable, "theirs": options.peers}
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _ in range(options.repetitions):
            for way, python in ways.items():
                found[way].append(measured(__file__, python, way, name))
        speed = {way: statistics.median(x["speed"] for x in xs) for way, xs in found.items()}
        returns = " / ".join(f"{statistics.median(x['return'] for x in xs):,.0f}" for xs in found.values())
        columns = [
            name,
            *(f"{x:,.0f}" for x in speed.values()),
            f"{speed['on'] / speed['theirs']:.2f}",
            f"{wanted}",
            returns,
        ]
        lines.append(f"| {' | '.join(columns)} |")
        print(lines[-1], flush=True)
    if not options.only:
        head = __doc__.split("\n\n")
        text = (
            "# Speed\n\nWritten by `python benchmarks/speed.py --peers PEERS/bin/python`: environment steps per second "
            f"of training, sampling and learning together, on {platform.machine()} with 2 cores. {head[2].strip()}\n\n"
        )
        Path(__file__).parents[1].joinpath("docs", "speed.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
