"""Memory and masks beside sb3-contrib's RecurrentPPO and MaskablePPO: the same networks, batches and epochs.

    python -m venv PEERS && PEERS/bin/pip install torch==2.13.0 sb3-contrib popgym
    python benchmarks/beside.py memory --peers PEERS/bin/python [--repetitions 2]
    python benchmarks/beside.py masks --peers PEERS/bin/python
    python benchmarks/beside.py memory-long --peers PEERS/bin/python --workers 2     ten times as long: the returns

The environments are the peers' own, in their environment of packages: popgym's RepeatPreviousEasy (say what was seen
four steps ago; without memory the best mean return is about -0.5) and sb3-contrib's InvalidActionEnvDiscrete (80
actions of which 60 are forbidden at a time; the mask is made by numpy, because its own loop over the actions takes four
times as long as a step, for both sides). PEERS sees this library by PYTHONPATH; it needs its dependencies, too.

Each run is a process of its own, in alternation, with torch on one thread; --workers: so many seeds at a time. Speed is
decisions per second of the whole training, median of the repetitions; the return is that of the last 100 training
episodes, a mean over the repetitions' seeds. Results are kept in benchmarks/beside.json, and `python
benchmarks/learning.py --table` writes them to docs/learning.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "beside.json"
SHARED = {"envs": 16, "steps": 128, "epochs": 4, "batch": 512, "rate": 1e-3, "units": 64}
WAYS = {
    "memory": {
        "ours, LSTM, whole rows": {"memory": "lstm"},
        "ours, LSTM, pieces of 16": {"memory": "lstm", "sequence_length": 16},
        "ours, GRU, pieces of 16": {"memory": "gru", "sequence_length": 16},
        "ours, no memory": {},
        "RecurrentPPO": None,
    },
    "memory-long": {
        "ours, GRU, pieces of 16": {"memory": "gru", "sequence_length": 16},
        "ours, no memory": {},
        "RecurrentPPO": None,
    },
    "masks": {"ours": {"action_mask": "info"}, "ours, without the mask": {}, "MaskablePPO": None},
}
NOTES = {
    "masks": """\
An iteration of 2,048 decisions takes 240 ms here (`--profile`, plain). The environments themselves take 52 of it.
Another 76 check and join their observations and masks, one environment at a time. The gradient steps take 72 (10 if
they are compiled), and acting 29. MaskablePPO checks nothing, and asks each environment a second time for its mask.
Twice its speed would be 124 ms an iteration.""",
}
STEPS = {"memory": 100_000, "memory-long": 1_000_000, "masks": 240_000}


def environment(task: str) -> Any:
    """One environment; of masks with the mask in its info too, where this library reads it."""
    if task.startswith("memory"):
        from popgym.envs.repeat_previous import RepeatPreviousEasy

        return RepeatPreviousEasy()
    import gymnasium
    from sb3_contrib.common.envs import InvalidActionEnvDiscrete

    class Masked(gymnasium.Wrapper):
        def reset(self, **options: Any) -> Any:
            obs, info = self.env.reset(**options)
            return obs, {**info, "action_mask": self.mask()}

        def step(self, action: Any) -> Any:
            obs, reward, terminated, truncated, info = self.env.step(action)
            return obs, reward, terminated, truncated, {**info, "action_mask": self.mask()}

        def mask(self) -> Any:
            import numpy as np

            mask = np.ones(80, np.int8)
            mask[self.env.unwrapped.invalid_actions] = 0
            return mask

        def action_masks(self) -> Any:
            return self.mask().astype(bool)

    return Masked(InvalidActionEnvDiscrete(dim=80, n_invalid_actions=60))


def ours(task: str, options: dict[str, Any], seed: int) -> dict[str, float]:
    import policygrad as pg

    pg.train  # noqa: B018 - its modules, as the peer's, are imported before the clock starts
    start = time.perf_counter()
    size = {"memory_size": SHARED["units"]} if "memory" in options else {}
    run = pg.train(
        "ppo", lambda: environment(task), preset="none", steps=STEPS[task], seed=seed, num_envs=SHARED["envs"],
        num_steps=SHARED["steps"], epochs=SHARED["epochs"], minibatch_size=SHARED["batch"], checkpoints=0,
        learning_rate=SHARED["rate"], hidden=(SHARED["units"],), max_grad_norm=0.5, progress=False,
        normalize_advantages="minibatch", **size, **options,
    )  # fmt: skip
    last = run.metrics[-1]
    return {"speed": last["steps"] / (time.perf_counter() - start), "return": last["return"]}


def theirs(task: str, seed: int) -> dict[str, float]:
    import torch
    from sb3_contrib import MaskablePPO, RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    shared: dict[str, Any] = {
        "n_steps": SHARED["steps"], "batch_size": SHARED["batch"], "n_epochs": SHARED["epochs"], "device": "cpu",
        "learning_rate": SHARED["rate"], "seed": seed,
    }  # fmt: skip
    network: dict[str, Any] = {"net_arch": [SHARED["units"]]}
    environments = make_vec_env(lambda: environment(task), SHARED["envs"])
    start = time.perf_counter()
    if task.startswith("memory"):
        network |= {"lstm_hidden_size": SHARED["units"]}
        model: Any = RecurrentPPO("MlpLstmPolicy", environments, policy_kwargs=network, **shared)
    else:
        model = MaskablePPO("MlpPolicy", environments, policy_kwargs=network, **shared)
    model.learn(STEPS[task])
    seconds = time.perf_counter() - start
    found = [x["r"] for x in model.ep_info_buffer]
    return {"speed": model.num_timesteps / seconds, "return": sum(found) / len(found)}


def child(task: str, way: str, seed: int) -> dict[str, float]:
    import warnings

    import gymnasium

    warnings.simplefilter("ignore")
    gymnasium.logger.min_level = gymnasium.logger.ERROR
    options: Any = WAYS[task][way]
    return theirs(task, seed) if options is None else ours(task, options, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=WAYS)
    parser.add_argument("--peers", default=sys.executable)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "SEED"))
    arguments = parser.parse_args()
    if arguments.child:
        way, seed = arguments.child
        print(json.dumps(child(arguments.task, way, int(seed))))
        return
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

    def of_seed(seed: int) -> dict[str, dict[str, float]]:
        each = {}
        for way in WAYS[arguments.task]:
            command = [arguments.peers, __file__, arguments.task, "--child", way, str(seed)]
            answer = subprocess.check_output(command, env={**os.environ, "PYTHONPATH": path}, text=True)
            each[way] = json.loads(answer.splitlines()[-1])
            print(f"{way} {seed}: {each[way]}", file=sys.stderr)
        return each

    with ThreadPoolExecutor(arguments.workers) as pool:
        seeds = list(pool.map(of_seed, range(arguments.repetitions)))
    found = {way: [each[way] for each in seeds] for way in WAYS[arguments.task]}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**kept, arguments.task: found}, indent=1) + "\n")
    print("\n".join(table(arguments.task, found)))


def table(task: str, found: dict[str, list[dict[str, float]]]) -> list[str]:
    """The lines of a table, with speeds as ratios to the peer's."""
    peer = next(way for way, options in WAYS[task].items() if options is None)
    base = statistics.median(x["speed"] for x in found[peer])
    lines = [f"| {STEPS[task]:,} decisions | a second | ratio | return, each seed |", "|---|---|---|---|"]
    for way, runs in found.items():
        speed = statistics.median(x["speed"] for x in runs)
        score = ", ".join(f"{x['return']:.2f}" for x in runs)
        lines.append(f"| {way} | {speed:,.0f} | {speed / base:.2f} | {score} |")
    return [*lines, *(["", *NOTES[task].splitlines()] if task in NOTES else [])]


if __name__ == "__main__":
    main()
