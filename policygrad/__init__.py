"""policygrad: the policy-gradient family of reinforcement learning in one PyTorch library.

Public names are imported at first use, so `import policygrad` is instant. A method without a file of its own, such as
`dapo`, is a line in the table of methods, built by `assemble`.
"""

import importlib
from functools import partial
from typing import Any

_MODULES = {
    "policygrad.rollout": ("Rollout", "Batch", "decisions", "minibatches"),
    "policygrad.weights": ("per_token", "per_row", "per_episode", "per_budget", "average"),
    "policygrad.credit": ("Credit",),
    "policygrad.algorithms.reinforce": ("reinforce", "ReinforceObjective"),
    "policygrad.algorithms.actor_critic": ("actor_critic", "off_policy_actor_critic", "ActorCriticObjective"),
    "policygrad.algorithms.trpo": ("trpo", "npg", "SurrogateObjective"),
    "policygrad.algorithms.ppo": ("ppo", "PPOObjective"),
    "policygrad.algorithms.grpo": ("grpo", "GRPOObjective"),
    "policygrad.divergences": ("AdaptiveCoefficient",),
    "policygrad.critics": ("fit_critic",),
    "policygrad.advantages": ("gae",),
    "policygrad.samplers": ("KLCharged", "Rescored", "WithoutFlatGroups"),
    "policygrad.language.policies": ("LanguagePolicy", "ValueModel", "Prefixes", "reference_of"),
    "policygrad.language.sampler": ("CompletionSampler",),
    "policygrad.language.rewards": ("Rewards",),
    "policygrad.control": ("Policy", "Critic", "Sampler", "make_environments", "evaluate"),
    "policygrad.train.training": ("Training", "train"),
    "policygrad.train.run": ("Run",),
    "policygrad.train.compose": ("assemble",),
    "policygrad.train.checkpoints": ("load_policy",),
    "policygrad.errors": ("UserError",),
}
_NAMES = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = ("advantages", "credit", "objectives", "returns", "updates", "weights", "divergences", "samplers")

__all__ = sorted({*_NAMES, *_SUBMODULES})


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"policygrad.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("policygrad")
    from policygrad.train.methods import METHODS

    if name in METHODS:
        return partial(importlib.import_module("policygrad.train.compose").assemble, name)
    raise AttributeError(f"module 'policygrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
