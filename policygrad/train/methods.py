"""The table of methods. Each method or variant is one line: its objective, its update and its default options.

No torch here. `compose.py` builds the pieces of a line; `verify` tests every line against the exact gradient.
"""

import difflib
import math
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from policygrad.errors import UserError, listed, shortened


@dataclass(frozen=True)
class Method:
    """A method: its objective, its update, and its own default options, on all worlds or on one."""

    name: str
    summary: str
    objective: Literal["reinforce", "actor_critic", "surrogate", "ppo", "grpo", "clone"]
    update: Literal["ascend", "natural", "trust_region"] = "ascend"
    source: str = ""  # the paper, as arXiv's number or author and year
    defaults: dict[str, Any] = field(default_factory=dict)
    on: dict[str, dict[str, Any]] = field(default_factory=dict)  # world -> defaults there


_FITTED: dict[str, Any] = {"critic_learning_rate": 1e-3}
_NATURAL: dict[str, Any] = {"normalize_advantages": "batch", "lam": 0.95}
_A2C: dict[str, Any] = {"learning_rate": 7e-4, "max_grad_norm": 0.5, "num_steps": 16, "lam": 1.0}
_GROUP: dict[str, Any] = {"credit": "group", "minibatch_size": None, "max_grad_norm": 1.0}
_GRPO: dict[str, Any] = {**_GROUP, "weights": "row"}
_UNCLIPPED: dict[str, Any] = {"clip_low": math.inf, "clip_high": math.inf}
_RLHF: dict[str, Any] = {
    "completions": 1, "prompts_per_rollout": 128, "epochs": 4, "minibatch_size": 32, "kl_ref": "reward",
    "normalize_advantages": "batch", "max_grad_norm": 1.0,
}  # fmt: skip
_TABULAR: dict[str, Any] = {"learning_rate": 0.05}
_ONE_STEP: dict[str, dict[str, Any]] = {"language": {"learning_rate": None, "max_grad_norm": 1.0}, "exact": _TABULAR}

_STEPPED: dict[str, dict[str, Any]] = {
    "language": {"critic_learning_rate": 1e-5, "critic_minibatch_size": 32}, "exact": {"critic_learning_rate": 0.1},
}  # fmt: skip

TABLE = (
    Method(
        "reinforce", "REINFORCE on whole episodes: log pi (G - b), with a choice of baselines.", "reinforce",
        defaults={**_FITTED, "credit": "reward_to_go", "weights": "episode", "learning_rate": 3e-3,
                  "critic_minibatch_size": 256},
        on={"language": {**_STEPPED["language"], "baseline": "mean", "learning_rate": None, "max_grad_norm": 1.0},
            "exact": {**_STEPPED["exact"], **_TABULAR}},
        source="Williams 1992",
    ),
    Method(
        "remax", "REINFORCE with the reward of the most likely completion, or episode, as the baseline.", "reinforce",
        defaults={"credit": "reward_to_go", "baseline": "greedy", "weights": "episode", "learning_rate": 3e-3},
        on={"language": {"learning_rate": None, "max_grad_norm": 1.0, "kl_ref": "reward", "completions": 1,
                         "prompts_per_rollout": 128},
            "exact": _TABULAR},
        source="arXiv 2310.10505",
    ),
    Method(
        "actor_critic", "Advantage actor-critic (A2C): log pi A with a bootstrapped advantage, one step a rollout.",
        "actor_critic", defaults=_A2C, on=_ONE_STEP,
        source="Mnih et al. 2016",
    ),
    Method(
        "off_policy_actor_critic", "Actor-critic that uses a rollout several times, corrected by V-trace (IMPALA).",
        "actor_critic", defaults={**_A2C, "credit": "vtrace", "epochs": 4}, on=_ONE_STEP,
        source="Espeholt et al. 2018",
    ),
    Method(
        "npg", "Natural policy gradient: theta + alpha F^-1 g, without a line search.",
        "surrogate", "natural", defaults={**_NATURAL, **_FITTED}, on=_STEPPED,
        source="Kakade 2001",
    ),
    Method(
        "trpo", "Trust-region policy optimization: the natural step inside KL(old, new) <= delta, with a line search.",
        "surrogate", "trust_region", defaults={**_NATURAL, **_FITTED}, on=_STEPPED,
        source="Schulman et al. 2015",
    ),
    Method(
        "ppo", "Proximal policy optimization: the clipped surrogate, epochs of minibatches; or a KL penalty; or both.",
        "ppo", defaults={"epochs": 10, "normalize_advantages": "minibatch", "max_grad_norm": 0.5},
        on={"language": _RLHF, "exact": {"minibatch_size": 512}},
        source="Schulman et al. 2017",
    ),
    Method(
        "grpo", "Group-relative policy optimization: (return - group mean) / group std, clipped, and no critic.",
        "grpo", defaults=_GRPO, on={"language": {"kl_ref": "loss"}},
        source="arXiv 2402.03300",
    ),
    Method(
        "dr_grpo", "GRPO without its two biases: no division by the group's std or the row's length.",
        "grpo", defaults={**_GROUP, "group_scale": "none", "weights": "budget"},
        source="arXiv 2503.20783",
    ),
    Method(
        "dapo", "GRPO with clip-higher, the loss by token, dynamic sampling and a soft penalty of overlong answers.",
        "grpo", defaults={**_GROUP, "clip_high": 0.28, "weights": "token", "sampling_rounds": 4},
        on={"language": {"overlong_fraction": 0.2}},
        source="arXiv 2503.14476",
    ),
    Method(
        "gspo", "GRPO with the ratio of whole completions.",
        "grpo", defaults={**_GRPO, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
        source="arXiv 2507.18071",
    ),
    Method(
        "cispo", "GRPO that clips the importance weight and keeps every token's gradient.",
        "grpo", defaults={**_GROUP, "gain": "weight", "clip_low": math.inf, "clip_high": 0.28, "weights": "token"},
        source="arXiv 2506.13585",
    ),
    Method(
        "rloo", "REINFORCE with the mean of the group's other returns as the baseline; KL in the reward.",
        "grpo", defaults={**_GROUP, "group_baseline": "leave_one_out", "group_scale": "none", "weights": "episode"},
        on={"language": {"kl_ref": "reward"}},
        source="arXiv 2402.14740",
    ),
    Method(
        "reinforce_plus_plus", "REINFORCE++: the batch as the baseline; KL in the reward.",
        "grpo", defaults={"credit": "reward_to_go", "baseline": "none", "normalize_advantages": "batch",
                          "weights": "token", "minibatch_size": None, "max_grad_norm": 1.0},
        on={"language": {"kl_ref": "reward", "completions": 1, "prompts_per_rollout": 128}},
        source="arXiv 2501.03262",
    ),
    Method(
        "dppo", "Divergence PPO: a token is left out where its probability, not its ratio, has moved too far.",
        "grpo", defaults={**_GROUP, **_UNCLIPPED, "gain": "weight", "clip_high": 19.0, "divergence_mask": "binary_tv",
                          "group_scale": "none", "weights": "budget"},
        source="arXiv 2602.04879",
    ),
    Method(
        "sapo", "Soft adaptive policy optimization: a sigmoid of the ratio in place of its clip.",
        "grpo", defaults={**_GRPO, "gain": "sigmoid"},
        source="arXiv 2511.20347",
    ),
    Method(
        "gmpo", "Geometric-mean policy optimization: tokens are clipped, then their ratios averaged geometrically.",
        "grpo", defaults={**_GRPO, **_UNCLIPPED, "ratio": "sequence", "token_clip": 0.4},
        source="arXiv 2507.20673",
    ),
    Method(
        "gspo_token", "GSPO with an advantage for each token: the ratio of the sequence, the gradient of the token.",
        "grpo", defaults={**_GRPO, "ratio": "sequence_token", "clip_low": 3e-4, "clip_high": 4e-4},
        source="arXiv 2507.18071",
    ),
    Method(
        "luspo", "GSPO with each completion weighed by its length, so that long ones are not learned from less.",
        "grpo", defaults={**_GROUP, "ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "weights": "episode"},
        source="arXiv 2602.05261",
    ),
    Method(
        "vespo", "Variational sequence-level soft optimization: a smooth weight of the ratio of whole completions.",
        "grpo", defaults={**_GROUP, "ratio": "product", "gain": "gamma", "group_scale": "none", "weights": "episode"},
        source="arXiv 2602.10693",
    ),
    Method(
        "maxrl", "Maximum likelihood RL: the group's advantages over its mean reward, which favors hard prompts.",
        "grpo", defaults={**_GROUP, **_UNCLIPPED, "group_scale": "mean", "weights": "token"},
        source="arXiv 2602.02710",
    ),
    Method(
        "pass_at_k", "The gradient of the group's best reward: only a completion that others don't match is credited.",
        "grpo", defaults={**_GROUP, "group_baseline": "other_best", "group_scale": "none", "weights": "episode"},
        source="arXiv 2503.19595",
    ),
    Method(
        "lite_ppo", "Lite PPO: the group's mean, the batch's standard deviation, and the loss by token.",
        "grpo", defaults={**_GROUP, "group_scale": "batch", "weights": "token"},
        source="arXiv 2508.08221",
    ),
    Method(
        "gdpo", "GRPO of several rewards: each is standardized within its group, and their sum over the batch.",
        "grpo", defaults={**_GROUP, "group_scale": "none", "normalize_advantages": "batch", "weights": "token"},
        on={"language": {"decouple_rewards": True}}, source="arXiv 2601.05242",
    ),
    Method(
        "opo", "On-policy optimization with the baseline of least variance: the group's mean weighted by length.",
        "grpo", defaults={**_GROUP, **_UNCLIPPED, "credit": "trajectory_return", "baseline": "length_weighted",
                          "weights": "token"},
        source="arXiv 2505.23585",
    ),
    Method(
        "otb", "REINFORCE with the optimal token baseline: at each token, the group's returns by the score so far.",
        "grpo", defaults={**_GROUP, **_UNCLIPPED, "credit": "reward_to_go", "baseline": "token", "weights": "token"},
        source="arXiv 2602.07078",
    ),
    Method(
        "two_sided_grpo", "GRPO with a bound of the ratio for negative advantages too (INTELLECT-2).",
        "grpo", defaults={**_GRPO, "dual_clip": 4.0},
        source="arXiv 2505.07291",
    ),
    Method(
        "masked_grpo", "GRPO without bad completions that the policy has moved away from (DeepSeek-V3.2).",
        "grpo", defaults={**_GRPO, "drift_bound": 0.5}, on={"language": {"kl_ref": "loss"}},
        source="arXiv 2512.02556",
    ),
    Method(
        "forking_tokens", "DAPO's loss on the fifth of the tokens where the policy is least certain.",
        "grpo", defaults={**_GROUP, "clip_high": 0.28, "weights": "token", "learn_from": "high_entropy"},
        source="arXiv 2506.01939",
    ),
    Method(
        "clip_cov", "GRPO by token that learns less where the log-probability covaries most with the advantage.",
        "grpo", defaults={**_GROUP, "weights": "token", "learn_from": "low_covariance"},
        source="arXiv 2505.22617",
    ),
    Method(
        "kl_cov", "Policy gradient by token; KL(old, new) is charged where log-probability and advantage covary most.",
        "grpo", defaults={**_GROUP, **_UNCLIPPED, "weights": "token", "kl_old_coefficient": 1.0,
                          "kl_old_estimate": "absolute", "kl_old_share": 2e-4},
        source="arXiv 2505.22617",
    ),
    Method(
        "skywork_or1", "GRPO by token, with an entropy bonus that adapts to a target (Skywork-OR1).",
        "grpo", defaults={**_GROUP, "weights": "token", "entropy_target": 0.2},
        source="arXiv 2505.22312",
    ),
    Method(
        "opmd", "Online policy mirror descent: log pi (R - mean) minus the squared log-ratio of whole completions.",
        "grpo", defaults={**_GROUP, "gain": "score", "group_scale": "none", "weights": "episode",
                          "kl_old_coefficient": 0.1, "kl_old_estimate": "squared_row"},
        source="arXiv 2501.12599",
    ),
    Method(
        "dro", "Direct reward optimization: log pi (R - V(x)) minus the squared log-ratio of whole completions.",
        "grpo", defaults={**_FITTED, "credit": "trajectory_return", "baseline": "start_value", "gain": "score",
                          "weights": "episode", "minibatch_size": None, "max_grad_norm": 1.0,
                          "kl_old_coefficient": 1.0, "kl_old_estimate": "squared_row"},
        on={"language": {"critic_learning_rate": 1e-5, "completions": 1, "prompts_per_rollout": 128},
            "exact": {"critic_learning_rate": 0.1}},
        source="arXiv 2405.19107",
    ),
    Method(
        "reinforce_plus_plus_baseline", "REINFORCE++ with the group's mean as baseline, standardized over the batch.",
        "grpo", defaults={**_GROUP, "group_scale": "none", "normalize_advantages": "batch", "weights": "token"},
        on={"language": {"kl_ref": "loss", "kl_ref_estimate": "k2"}},
        source="arXiv 2501.03262",
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in TABLE}
# No policy gradient of a return, but composed like one: any method goes on from what it learned.
CLONE = Method(
    "clone", "Behavior cloning, or supervised fine-tuning: log pi of demonstrations, the score with advantage 1.",
    "clone",
    on={"control": {"steps": None, "iterations": 100, "evaluate_every": 1, "evaluation_patience": 10,
                    "minibatch_size": 128, "learning_rate": 1e-3},
        "language": {"evaluate_every": 20}},
)  # fmt: skip
KNOWN: Mapping[str, Method] = ChainMap({CLONE.name: CLONE}, METHODS)  # a line that is added to the table is known
CREDITS = ("gae", "n_step", "monte_carlo", "vtrace", "reward_to_go", "trajectory_return", "group")
ALIASES = {"a2c": "actor_critic", "impala": "off_policy_actor_critic", "reinforce++": "reinforce_plus_plus"}

# Further variants, made by options: (name, command, description).
VARIANTS = (
    ("a2c", "actor_critic", "synchronous advantage actor-critic, by its usual name"),
    ("PPO with a KL penalty", "ppo --clip-low inf --clip-high inf --kl-old-coefficient 1 --kl-old-target 0.01",
     "adaptive beta"),
    ("PPO with both", "ppo --kl-old-coefficient 1 --kl-old-target 0.01", "clipped and penalized"),
    ("PPO with dual clip", "ppo --dual-clip 3", "a floor for bad actions that became likely"),
    ("VAPO", "ppo --clip-high 0.28 --critic-lam 1 --length-adaptive-lam 0.05 --critic-warmup 50 --kl-ref none "
     "--positive-weight 0.1",
     "for language: two lambdas, one of them by length, a critic that begins first, and imitation of what was right"),
    ("PPO without a critic", "ppo --credit group --group-baseline leave_one_out", "the other episodes as the baseline"),
    ("TRPO without a critic", "trpo --credit group", "a trust region for GRPO's credit"),
    ("natural gradient", "npg --step-rule learning_rate", "Kakade's plain learning rate along F^-1 g"),
    ("GiGPO", "grpo --state-weight 1 --gamma 0.95", "compares turns of conversations from the same state as well"),
    ("PPO by turn", "ppo --turn-level", "GAE from turn to turn of a conversation"),
    ("one-step actor-critic", "actor_critic --credit n_step --n 1", "the TD error as the advantage"),
    ("true discounted gradient", "reinforce --discounted", "with the factor gamma^t that is usually dropped"),
)  # fmt: skip


def method_named(name: str) -> Method:
    """The method of a name, in any case, with dashes or underscores. Raises UserError with the nearest names."""
    if not isinstance(name, str):
        raise UserError(f"the method is {shortened(name)}: give its name, such as ppo")
    full = name.lower().replace("-", "_")
    full = ALIASES.get(full, full)
    if full in CREDITS:
        raise UserError(f"{full} is a credit and no method: write a method, such as actor_critic, and credit {full}")
    if full not in KNOWN:
        raise UserError(f"unknown method {shortened(name)}: {nearest(name.lower(), [*METHODS, *ALIASES])}")
    return KNOWN[full]


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message: the closest known names, or all names."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there are {listed(known, 110)}"
