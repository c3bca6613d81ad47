"""An objective is a function of its batch and its parameters, and traces into one graph without a break."""

import subprocess
import sys
import warnings
from copy import deepcopy
from itertools import cycle
from pathlib import Path

import pytest
import torch
from problems import ACTIONS, SETTINGS, TRACED, kinds, problem
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.testing import assert_close

from policygrad import compiling
from policygrad.linalg import flat_gradient
from policygrad.rollout import micro_batches
from policygrad.updates import Objective, ascend


def slope(value: Tensor, objective: Objective) -> Tensor:
    return flat_gradient(value, [p for p in objective.parameters() if p.requires_grad])


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in SETTINGS for kind in kinds(name)])
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
    objective, batch = problem(name, "gaussian" if "gaussian" in kinds(name) else "discrete")
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
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    command = [sys.executable, "-c", f"import sys; sys.path += {tests}; import test_one_graph; test_one_graph.trace()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
