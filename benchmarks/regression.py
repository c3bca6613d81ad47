"""What every method computes, recorded to the bit, so that a rebuilding can be held to it.

    python benchmarks/regression.py record FILE     before a change
    python benchmarks/regression.py compare FILE    after it, on the same machine: names what differs, exits with 1

Parameters (as a hash) and metrics after a few iterations of every method, with several option sets and seeds, in
control, on exact worlds and on a small language model. Bits are comparable on one machine with one version of torch.
"""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import policygrad as pg
from policygrad.train.methods import METHODS

SEEDS = (0, 1)
SMALL: dict[str, Any] = {"num_envs": 4, "num_steps": 32, "steps": 512, "hidden": (16,), "preset": "none"}
EPISODES: dict[str, Any] = {"num_envs": 4, "episode_steps": 50, "steps": 400, "hidden": (16,), "preset": "none"}
EXACT: dict[str, Any] = {"num_envs": 8, "iterations": 3, "preset": "none"}
LANGUAGE: dict[str, Any] = {
    "iterations": 3, "prompts_per_rollout": 4, "completions": 4, "max_tokens": 24, "held_out": 8,
    "evaluation_completions": 2, "learning_rate": 1e-4, "threads": 1, "preset": "none",
}  # fmt: skip
PENALTY: dict[str, Any] = {"kl_old_coefficient": 1.0, "kl_old_target": 0.01}
MINIBATCHES: dict[str, Any] = {"minibatch_size": 48, "epochs": 3, **SMALL}
CONTROL: tuple[tuple[str, dict[str, Any]], ...] = (
    ("reinforce", EPISODES),
    ("reinforce", EPISODES | {"credit": "trajectory_return", "baseline": "none"}),
    ("reinforce", EPISODES | {"baseline": "optimal", "discounted": True, "max_grad_norm": 0.5}),
    ("actor_critic", SMALL),
    ("actor_critic", SMALL | {"credit": "n_step", "n": 3, "normalize_advantages": "batch", "scale_rewards": True}),
    ("off_policy_actor_critic", SMALL | {"lam": 0.9, "rho_bar": 0.8, "c_bar": 0.7, "entropy_coefficient": 0.01}),
    ("npg", SMALL),
    ("npg", SMALL | {"step_rule": "learning_rate", "natural_learning_rate": 0.05}),
    ("trpo", SMALL | {"normalize_observations": True}),
    ("trpo", EPISODES | {"credit": "group"}),
    ("ppo", MINIBATCHES),
    ("ppo", MINIBATCHES | PENALTY | {"clip_low": math.inf, "clip_high": math.inf}),
    ("ppo", MINIBATCHES | PENALTY | {"value_clip": 0.2, "dual_clip": 3.0, "entropy_coefficient": 0.01}),
    ("ppo", MINIBATCHES | {"normalize_advantages": "none", "target_kl": 0.001, "learning_rate_schedule": "linear"}),
    ("ppo", EPISODES | {"credit": "group", "group_size": 2, "minibatch_size": 64, "epochs": 2}),
    ("grpo", EPISODES | {"epochs": 2, "minibatch_size": 64}),
)
ONE_COMPLETION: dict[str, Any] = {"completions": 1, "prompts_per_rollout": 16}
COMPLETIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, {}) for name in ("dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus", "reinforce")),
    ("grpo", {"kl_ref_estimate": "k3", "kl_ref_coefficient": 0.2, "kl_ref_target": 0.001}),
    ("grpo", {"kl_ref": "reward", "old_logp": "recomputed", "cut": "masked", "max_tokens": 14, "micro_batch": 5}),
    ("grpo", {"lora_rank": 4, "epochs": 2, "minibatch_size": 8, "entropy_coefficient": 0.01}),
    ("ppo", {**ONE_COMPLETION, "minibatch_size": 8}),
    ("ppo", {"critic": "shared", "minibatch_size": 5, "epochs": 2, "value_clip": 0.2}),
)


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(method, task, options) of every run."""
    runs = [(method, task, options) for method, options in CONTROL for task in ("CartPole-v1", "Pendulum-v1")]
    runs += [(name, task, EXACT) for name in METHODS for task in ("exact:chain", "exact:tokens")]
    runs += [(name, "arithmetic", LANGUAGE | options) for name, options in COMPLETIONS]
    return [(method, task, options | {"seed": seed}) for method, task, options in runs for seed in SEEDS]


def outcome(method: str, task: str, options: dict[str, Any]) -> dict[str, Any]:
    """The parameters' hash, and every metric but those of time."""
    run = pg.train(method, task, progress=False, **options)
    parameters = hashlib.sha256()
    for name, x in run.world.modules().state_dict().items():
        parameters.update(name.encode() + x.detach().cpu().contiguous().numpy().tobytes())
    rows = [{k: v for k, v in row.items() if "second" not in k} for row in run.metrics]
    return {"parameters": parameters.hexdigest(), "rows": rows}


def main() -> int:
    if len(sys.argv) != 3 or sys.argv[1] not in ("record", "compare"):
        print(__doc__)
        return 2
    path = Path(sys.argv[2])
    known = json.loads(path.read_text()) if sys.argv[1] == "compare" else {}
    found, different = {}, 0
    for method, task, options in cases():
        name = f"{method} {task} {json.dumps(options, sort_keys=True)}"
        found[name] = json.loads(json.dumps(outcome(method, task, options)))
        if known and found[name] != known.get(name):
            different += 1
            print(f"different: {name}")
    if not known:
        path.write_text(json.dumps(found))
    print(f"{len(found)} runs" + (f", {different} different" if known else f" recorded in {path}"))
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
