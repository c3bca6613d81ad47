"""An objective is a function of its batch and its parameters, and traces into one graph without a break."""

import subprocess
import sys
import warnings
from copy import deepcopy
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.testing import assert_close

from policygrad import compiling
from policygrad.control import Critic, Policy
from policygrad.divergences import AdaptiveCoefficient, to_reference
from policygrad.linalg import flat_gradient
from policygrad.rollout import Batch, Rollout, decisions, micro_batches
from policygrad.train.compose import DIVERGENCES, WEIGHTS, credit_of, objective_of
from policygrad.train.methods import METHODS
from policygrad.train.options import options_of
from policygrad.updates import Objective, ascend

OBSERVATIONS = spaces.Box(-1, 1, (3,))
ACTIONS: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "discrete": (spaces.Discrete(4), {}),
    "gaussian": (spaces.Box(-2, 2, (2,)), {}),
    "squashed": (spaces.Box(-2, 2, (2,)), {"squash": True, "state_dependent_std": True}),
    "many": (spaces.MultiDiscrete([2, 3]), {}),
    "binary": (spaces.MultiBinary(3), {}),
}
# Every line of the table as it is, and what its options may add to its objective.
ALL_OF_PPO = {"kl_old_coefficient": 1.0, "dual_clip": 3.0, "value_clip": 0.2, "entropy_coefficient": 0.1}
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "ppo with all": ("ppo", {**ALL_OF_PPO, "clip_low": 0.1}),
    "ppo without a critic": ("ppo", {"credit": "group"}),
    "actor-critic without a critic": ("actor_critic", {"credit": "group", "entropy_coefficient": 0.1}),
    "trpo of whole rows": ("trpo", {"ratio": "sequence"}),
    "grpo to a reference": ("grpo", {"kl_ref": "loss", "entropy_coefficient": 0.1}),
    "gspo to a reference": ("gspo", {"kl_ref": "loss", "kl_ref_estimate": "k3"}),
    "cispo to a reference": ("cispo", {"kl_ref": "loss", "kl_ref_estimate": "exact"}),
}
# Each equation with all its branches; the other settings leave some of them out.
TRACED = ["reinforce", "actor_critic", "ppo", "ppo with all", "trpo of whole rows"]
TRACED += [name for name in SETTINGS if "reference" in name]


def problem(name: str, kind: str) -> tuple[Objective, Batch]:
    """The objective of these settings, on a batch of a policy nearby."""
    (method, values), (space, made) = SETTINGS[name], ACTIONS[kind]
    options = options_of(method, "control")(**values)
    policy, critic = Policy(OBSERVATIONS, space, hidden=(8,), **made), Critic(OBSERVATIONS, hidden=(8,))
    obs = torch.randn(4, 6, 3)
    with torch.no_grad():
        action = policy(obs).sample()
        distance = 1e-4 if method == "gspo" else 0.1  # a whole row's ratio is clipped near 1
        logp = policy(obs).log_prob(action) + distance * torch.randn(4, 6)
    never = torch.zeros(4, 6, dtype=torch.bool)
    rollout = Rollout(
        obs,
        action,
        logp,
        torch.randn(4, 6),
        never,
        never,
        ~never.index_fill(1, torch.tensor(2), True),
        torch.arange(4) // 2,
        torch.randn(4, 3),
        memoryless=getattr(options, "ratio", "token") == "token",
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
    credit = credit_of(options, policy, critic)(rollout)
    batch = decisions(rollout, WEIGHTS[options.weights](rollout.mask), *credit)
    return objective_of(options, policy, critic, coefficients, anchor), batch


def slope(value: Tensor, objective: Objective) -> Tensor:
    return flat_gradient(value, [p for p in objective.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("name", SETTINGS)
def test_the_functional_gradient_is_the_one_that_is_ascended(name: str, kind: str, float64: None) -> None:
    objective, batch = problem(name, kind)
    parameters = {name: p.detach() for name, p in objective.named_parameters()}
    gradients, (value, metrics) = grad_and_value(
        lambda parameters: functional_call(objective, parameters, (batch,)), has_aux=True
    )(parameters)
    plain, plain_metrics = objective(batch)
    assert_close(value, plain)
    assert_close(metrics, plain_metrics)
    found = torch.cat([gradients[name].reshape(-1) for name in parameters])
    assert_close(found, slope(plain, objective))
    assert found.norm() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_the_objective_of_any_micro_batches_adds_up_to_the_whole(name: str, float64: None) -> None:
    objective, batch = problem(name, "gaussian")
    torch.manual_seed(0)
    weight = batch.weight * torch.rand_like(batch.weight)  # as importance weights make them
    batch = batch._replace(weight=weight.index_fill(0, torch.tensor([1, 3]), 0.0))
    value, metrics = objective(batch)
    whole = slope(value, objective)
    assert whole.norm() > 1e-3
    for rows in (1, 3, 5, 12, 23):
        parts = [(share, *objective(part)) for share, part in micro_batches(batch, rows)]
        total = sum(share * value for share, value, _ in parts)
        assert_close(total, value, rtol=1e-12, atol=1e-13)
        assert_close(slope(total, objective), whole, rtol=0, atol=1e-12)
        for metric in metrics.keys() - {"effective_sample_size"}:
            assert_close(sum(share * m[metric] for share, _, m in parts), metrics[metric], rtol=1e-12, atol=1e-13)


def trace() -> None:
    """Each objective's gradient step as one graph, or an error where it breaks, and held to the plain step.

    `aot_eager` leaves the compiler behind the graph out; tests/test_compiling.py has it.
    """
    warnings.simplefilter("error")  # a step that is not compiled says so
    torch.set_default_dtype(torch.float64)
    compiling.BACKEND = "aot_eager"
    for name, kind in zip(TRACED, cycle(ACTIONS), strict=False):
        torch.compiler.reset()
        plain, batch = problem(name, kind)
        compiled, found = deepcopy(plain), []
        for objective, way in ((plain, False), (compiled, True)):
            optimizer = torch.optim.Adam(objective.parameters(), lr=0.01, fused=True)
            update = ascend(optimizer, max_grad_norm=0.3, compiled=way)
            found.append([update(objective, batch) for _ in range(3)])
        assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
        assert_close(list(compiled.parameters()), list(plain.parameters()), rtol=0, atol=1e-12)


def test_every_objective_and_kind_of_action_is_compiled_and_does_the_same() -> None:
    # In a process of its own: the shape checks of the test run are no part of the graph.
    command = [sys.executable, "-c", "from tests.algorithms.test_one_graph import trace; trace()"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
