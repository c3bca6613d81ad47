"""Every objective of the table, and what its options may add to it, on a batch of every kind of action."""

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from gymnasium import spaces

from policygrad.control import Critic, Policy
from policygrad.control.masks import random_masks
from policygrad.control.spaces import Flat, FlatActions
from policygrad.divergences import AdaptiveCoefficient, AdaptiveEntropy, to_reference
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.train.compose import DIVERGENCES, WEIGHTS, credit_of, objective_of, reads_rows
from policygrad.train.methods import METHODS
from policygrad.train.options import options_of
from policygrad.updates import Objective

OBSERVATIONS = spaces.Box(-1, 1, (3,))
MASKED = Flat(spaces.Dict({"action_mask": spaces.MultiBinary(4), "observation": OBSERVATIONS}))
ACTIONS: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "discrete": (spaces.Discrete(4), {}),
    "gaussian": (spaces.Box(-2, 2, (2,)), {}),
    "squashed": (spaces.Box(-2, 2, (2,)), {"distribution": "squashed", "state_dependent_std": True}),
    "beta": (spaces.Box(-2, 2, (2,)), {"distribution": "beta"}),
    "many": (spaces.MultiDiscrete([2, 3]), {}),
    "binary": (spaces.MultiBinary(3), {}),
    "masked": (spaces.Discrete(4), {}),
    "joint": (FlatActions(spaces.Tuple([spaces.Discrete(3), spaces.Box(-2, 2, (2,)), spaces.MultiBinary(2)])), {}),
}
# Every line of the table as it is, and what its options may add to its objective.
ALL_OF_PPO = {"kl_old_coefficient": 1.0, "dual_clip": 3.0, "value_clip": 0.2, "entropy_coefficient": 0.1}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "ppo with all": ("ppo", {**ALL_OF_PPO, "clip_low": 0.1}),
    "ppo without a critic": ("ppo", {"credit": "group"}),
    "actor-critic without a critic": ("actor_critic", {"credit": "group", "entropy_coefficient": 0.1}),
    "trpo of whole rows": ("trpo", {"ratio": "sequence"}),
    "dppo over all actions": ("dppo", {"divergence_mask": "kl", "divergence_bound": 0.01}),
    "grpo to a reference": ("grpo", {"kl_ref": "loss", "entropy_coefficient": 0.1}),
    "gspo to a reference": ("gspo", {"kl_ref": "loss", "kl_ref_estimate": "k3"}),
    "cispo to a reference": ("cispo", {"kl_ref": "loss", "kl_ref_estimate": "exact"}),
}
# Each equation with all its branches; the other settings leave some of them out.
TRACED = ["reinforce", "actor_critic", "ppo", "ppo with all", "trpo of whole rows"]
TRACED += [name for name in SETTINGS if "reference" in name]
TRACED += ["dppo", "dppo over all actions", "sapo", "gmpo", "gspo_token", "vespo", "masked_grpo", "skywork_or1", "opmd"]
TRACED += ["clip_cov", "kl_cov", "dro"]


def kinds(name: str) -> list[str]:
    """The kinds of action that the method is for."""
    return ["discrete", "masked"] if SETTINGS[name][0] == "otb" else list(ACTIONS)


def problem(name: str, kind: str) -> tuple[Objective, Batch]:
    """The objective of these settings, on a batch of a policy nearby."""
    (method, values), (space, made) = SETTINGS[name], ACTIONS[kind]
    options = options_of(method, "control")(**values)
    obs, seen = torch.randn(4, 6, 3), OBSERVATIONS
    if kind == "masked":
        masks = torch.from_numpy(random_masks(24, space)).view(4, 6, 4)
        obs, seen = torch.cat([masks.to(obs.dtype), obs], -1), MASKED
    policy, critic = Policy(seen, space, hidden=(8,), **made), Critic(seen, hidden=(8,))
    with torch.no_grad():
        action = policy(obs).sample()
        near = getattr(options, "clip_high", 1.0) < 1e-3  # as the ratios of whole rows are clipped
        distance = 1e-4 if near else 0.1
        logp = policy(obs).log_prob(action) + distance * torch.randn(4, 6)
    never = torch.zeros(4, 6, dtype=torch.bool)
    rollout = Rollout(
        obs,
        action,
        logp,
        torch.randn(4, 6).abs() if method == "maxrl" else torch.randn(4, 6),
        never,
        never,
        ~never.index_fill(1, torch.tensor(2), True),
        torch.arange(4) // 2,
        torch.randn_like(obs[:, 0]),
        memoryless=not reads_rows(options),
        greedy=torch.arange(4) / 4,
    )
    coefficients, anchor = {}, None
    if options.kl_ref == "loss":
        reference = deepcopy(policy)
        with torch.no_grad():
            for p in reference.parameters():
                p.add_(0.1 * torch.randn_like(p))
        coefficients["kl_ref"] = AdaptiveCoefficient(0.5)
        anchor = partial(to_reference, reference=reference, divergence=DIVERGENCES[options.kl_ref_estimate])
    if getattr(options, "kl_old_coefficient", 0):
        coefficients["kl_old"] = AdaptiveCoefficient(options.kl_old_coefficient)
    if getattr(options, "entropy_target", None) is not None:
        coefficients["entropy"] = AdaptiveEntropy(options.entropy_target, options.entropy_step, start=0.1)
    credit = credit_of(options, policy, critic)(rollout)
    batch = decisions(rollout, WEIGHTS[options.weights](rollout.mask), *credit)
    old = deepcopy(policy)
    with torch.no_grad():
        for p in old.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return objective_of(options, policy, critic, coefficients, anchor, old), batch
