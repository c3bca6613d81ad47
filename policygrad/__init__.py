"""policygrad: the policy-gradient family of reinforcement learning, whole, in one PyTorch library.

The public names below are imported when they are first used: `import policygrad` is instant.
"""

import importlib
from typing import Any

_MODULES = {
    "policygrad.rollout": ("Rollout", "Batch", "decisions", "minibatches"),
    "policygrad.weights": ("per_token", "per_row", "per_episode", "average"),
    "policygrad.algorithms.reinforce": ("reinforce",),
    "policygrad.algorithms.actor_critic": ("actor_critic", "off_policy_actor_critic"),
    "policygrad.algorithms.trpo": ("trpo", "npg"),
    "policygrad.algorithms.ppo": ("ppo",),
    "policygrad.algorithms.grpo": ("grpo",),
    "policygrad.algorithms.variants": ("dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_plus_plus"),
    "policygrad.language.policies": ("LanguagePolicy", "ValueModel", "Prefixes", "reference_of"),
    "policygrad.language.sampler": ("CompletionSampler",),
    "policygrad.language.rewards": ("Rewards",),
    "policygrad.runs.language.training": ("train_language",),
    "policygrad.runs.language.run": ("LanguageRun", "LanguageEvaluation", "evaluate_language_run"),
    "policygrad.control": ("Policy", "Critic", "Sampler", "make_environments", "evaluate"),
    "policygrad.runs.training": ("train",),
    "policygrad.runs.run": ("Run", "Evaluation", "evaluate_run"),
    "policygrad.runs.checkpoints": ("load_policy",),
    "policygrad.errors": ("UserError",),
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'policygrad' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES})
