"""An objective is a function of its batch and its modules' parameters, and traces into one graph without a break."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.testing import assert_close

import policygrad.algorithms.actor_critic
import policygrad.algorithms.grpo
import policygrad.algorithms.ppo
import policygrad.algorithms.reinforce
from policygrad.algorithms.actor_critic import actor_critic, off_policy_actor_critic
from policygrad.algorithms.grpo import grpo
from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.reinforce import reinforce
from policygrad.algorithms.variants import cispo, dapo, dr_grpo, gspo, reinforce_plus_plus, rloo
from policygrad.control import Critic, Policy
from policygrad.divergences import AdaptiveCoefficient, at_action, k3, over_actions, reweighted, to_reference
from policygrad.linalg import flat_gradient
from policygrad.rollout import Batch, Rollout, micro_batches

OBSERVATIONS = spaces.Box(-1, 1, (3,))
ACTIONS: dict[str, tuple[spaces.Space, dict[str, Any]]] = {
    "discrete": (spaces.Discrete(4), {}),
    "gaussian": (spaces.Box(-2, 2, (2,)), {}),
    "squashed": (spaces.Box(-2, 2, (2,)), {"squash": True, "state_dependent_std": True}),
    "many": (spaces.MultiDiscrete([2, 3]), {}),
    "binary": (spaces.MultiBinary(3), {}),
}
VARIANTS: dict[str, Callable[..., Any]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_plus_plus": reinforce_plus_plus,
}


def without_critic(variant: Callable[..., Any], divergence: Any = None) -> Callable[..., Any]:
    """GRPO's kind, with the KL to a policy near the one that learns."""

    def algorithm(policy: nn.Module, critic: nn.Module, sample: Any, optimizer: Any) -> Any:
        if divergence is None:
            return variant(policy, sample, optimizer)
        reference = deepcopy(policy)
        with torch.no_grad():
            for p in reference.parameters():
                p.add_(0.1 * torch.randn_like(p))
        anchor = partial(to_reference, reference=reference, divergence=divergence)
        return variant(policy, sample, optimizer, anchor=anchor)

    return algorithm


ALGORITHMS: dict[str, Callable[..., Any]] = {
    "reinforce": lambda policy, critic, sample, optimizer: reinforce(policy, sample, optimizer),
    "actor_critic": lambda policy, critic, sample, optimizer: actor_critic(policy, critic, sample, optimizer),
    "off_policy": lambda policy, critic, sample, optimizer: off_policy_actor_critic(policy, critic, sample, optimizer),
    "ppo": lambda policy, critic, sample, optimizer: ppo(policy, critic, sample, optimizer, entropy_coefficient=0.1),
    "ppo_all": lambda policy, critic, sample, optimizer: ppo(
        policy, critic, sample, optimizer, penalty=AdaptiveCoefficient(1.0, 0.01), dual_clip_bound=3.0, value_clip=0.2
    ),
    **{name: without_critic(variant) for name, variant in VARIANTS.items()},
    "grpo_all": without_critic(partial(grpo, entropy_coefficient=0.1), divergence=reweighted),
    "grpo_k3": without_critic(gspo, divergence=partial(at_action, estimate=k3)),
    "grpo_exact": without_critic(cispo, divergence=over_actions),
}


class Both(nn.Module):
    """Policy and critic, and the objective over them, as one function of all their parameters."""

    def __init__(self, policy: nn.Module, critic: nn.Module, objective: Callable[[Batch], Any]) -> None:
        super().__init__()
        self.policy, self.critic, self.objective = policy, critic, objective

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.objective(batch)


def caught(algorithm: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Both, Batch]:
    """The objective and the batch that an algorithm hands to its first `ascend`."""

    class Stop(Exception):
        pass

    def ascend(objective: Callable[[Batch], Any], batch: Batch, *_: Any, **__: Any) -> None:
        raise Stop(objective, batch)

    names = ("reinforce", "actor_critic", "ppo", "grpo")
    for module in (getattr(policygrad.algorithms, name) for name in names):
        monkeypatch.setattr(module, "ascend", ascend)
    space, options = ACTIONS[kind]
    policy, critic = Policy(OBSERVATIONS, space, hidden=(8,), **options), Critic(OBSERVATIONS, hidden=(8,))
    obs = torch.randn(4, 6, 3)
    with torch.no_grad():
        action = policy(obs).sample()
        logp = policy(obs).log_prob(action) + 0.1 * torch.randn(4, 6)
    nothing, all_ = torch.zeros(4, 6, dtype=torch.bool), torch.ones(4, 6, dtype=torch.bool)
    rollout = Rollout(
        obs,
        action,
        logp,
        torch.randn(4, 6),
        nothing,
        nothing,
        all_,
        torch.arange(4) // 2,
        torch.randn(4, 3),
        memoryless=True,
    )
    optimizer = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=1.0)
    with pytest.raises(Stop) as stopped:
        next(ALGORITHMS[algorithm](policy, critic, lambda _: rollout, optimizer))
    objective, batch = stopped.value.args
    return Both(policy, critic, objective), batch


@pytest.mark.parametrize("kind", ACTIONS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_functional_gradient_is_the_one_that_is_ascended(
    algorithm: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, batch = caught(algorithm, kind, monkeypatch)
    parameters = {name: p.detach() for name, p in both.named_parameters()}
    gradients, (value, metrics) = grad_and_value(
        lambda parameters: functional_call(both, parameters, (batch,)), has_aux=True
    )(parameters)
    plain, plain_metrics = both(batch)
    assert_close(value, plain)
    assert_close(metrics, plain_metrics)
    found = torch.cat([gradients[name].reshape(-1) for name in parameters])
    assert_close(found, flat_gradient(plain, list(both.parameters())))
    assert found.norm() > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_objective_of_any_micro_batches_adds_up_to_the_whole(
    algorithm: str, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, batch = caught(algorithm, "gaussian", monkeypatch)
    torch.manual_seed(0)
    weight = batch.weight * torch.rand_like(batch.weight)  # as importance weights make them
    batch = batch._replace(weight=weight.index_fill(0, torch.tensor([3, 4]), 0.0))
    value, metrics = both(batch)
    slope = flat_gradient(value, list(both.parameters()))
    for rows in (1, 5, 12, 23):
        parts = [(share, *both(part)) for share, part in micro_batches(batch, rows)]
        total = sum(share * value for share, value, _ in parts)
        assert_close(total, value, rtol=1e-12, atol=1e-14)
        assert_close(flat_gradient(total, list(both.parameters())), slope, rtol=0, atol=1e-12)
        for name in metrics.keys() - {"effective_sample_size"}:
            assert_close(sum(share * m[name] for share, _, m in parts), metrics[name], rtol=1e-12, atol=1e-14)


def trace() -> None:
    """One graph of each objective, or an error where it breaks; `eager` leaves the compiler behind it out."""
    distinct = [name for name in ALGORITHMS if name not in VARIANTS]  # the three with an anchor have all branches
    for algorithm, kind in zip(distinct, cycle(ACTIONS), strict=False):
        torch.compiler.reset()
        with pytest.MonkeyPatch.context() as monkeypatch:
            both, batch = caught(algorithm, kind, monkeypatch)
        plain = both(batch)  # first: torch.distributions looks up the KL of two kinds once, which does not trace
        traced = torch.compile(both, fullgraph=True, dynamic=False, backend="eager")
        assert_close(traced(batch), plain)


def test_every_objective_traces_into_one_graph() -> None:
    # In a process of its own: the shape checks of the test run are no part of the graph.
    command = [sys.executable, "-c", "from tests.algorithms.test_one_graph import trace; trace()"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
