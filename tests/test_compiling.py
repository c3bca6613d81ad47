"""Compiled gradient steps: the plain step to rounding, the same optimizer, no second compilation."""

import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.testing import assert_close

import policygrad as pg
from policygrad import compiling
from policygrad.compiling import has_rule
from policygrad.critics import ValueObjective, fit_critic
from policygrad.errors import NonFiniteError, Note
from policygrad.rollout import Batch
from policygrad.train.compose import COMPILE_PAYS, compiles
from policygrad.train.options import options_of, with_values
from policygrad.updates import MasterWeightsAdam, MasterWeightsSGD, ascend


def in_its_own_process(check: Callable[[], None]) -> None:
    """Run a function of this file where the shape checks of the test run are no part of the graph."""
    command = [
        sys.executable,
        "-W",
        "error::UserWarning",
        "-c",
        f"from tests.test_compiling import *; {check.__name__}()",
    ]
    # torch's compiler writes code that does not compile where the oldest instruction set is demanded.
    environment = {name: x for name, x in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def critic() -> nn.Module:
    torch.manual_seed(0)
    return pg.Critic(spaces.Box(-1, 1, (3,)), hidden=(8,)).double()


def batch(rows: int = 20, size: float = 1.0) -> Batch:
    mask = torch.ones(rows, 1, dtype=torch.bool)
    zero, target = torch.zeros(rows, 1).double(), size * torch.randn(rows, 1).double()
    return Batch(torch.randn(rows, 1, 3).double(), zero, zero, mask, mask / rows, zero, target, zero)


def compare_by_the_compiler() -> None:
    """Steps at changing rates, from a state that is loaded on the way, and a gradient that is not finite."""
    warnings.simplefilter("error", Note)
    torch.set_default_dtype(torch.float64)
    momentum, nesterov = partial(torch.optim.SGD, momentum=0.9, dampening=0.1), partial(MasterWeightsSGD, momentum=0.5)
    adams: list[Any] = [torch.optim.Adam, torch.optim.AdamW, MasterWeightsAdam]
    for make in [*adams, torch.optim.SGD, momentum, partial(nesterov, nesterov=True)]:
        plain, compiled = critic(), critic()
        optimizers = [make(x.parameters(), lr=0.1, weight_decay=0.1) for x in (plain, compiled)]
        objectives = [ValueObjective(x) for x in (plain, compiled)]
        updates = [ascend(x, max_grad_norm=0.5, compiled=way) for x, way in zip(optimizers, (False, True), strict=True)]
        for k in range(7):
            part = batch(size=3.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.1 / (1 + k)
                if k == 4:
                    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
            found = [update(objective, part) for update, objective in zip(updates, objectives, strict=True)]
            assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
            assert_close(list(compiled.parameters()), list(plain.parameters()), rtol=0, atol=1e-12)
        states = [x.state_dict()["state"] for x in optimizers]
        assert_close(states[1], states[0], rtol=1e-10, atol=1e-12)
        before = deepcopy([list(compiled.parameters()), states[1]])
        try:
            updates[1](objectives[1], part._replace(target=torch.full_like(part.target, math.nan)))
        except NonFiniteError:
            after = [list(compiled.parameters()), optimizers[1].state_dict()["state"]]
            assert_close(after, before, rtol=0, atol=0)
        else:
            raise AssertionError("a gradient of NaN was no error")
    counts = torch._dynamo.utils.counters["stats"]
    assert counts["unique_graphs"] == 6, counts


def count_compilations() -> None:
    """A graph of the policy's steps or the critic's, and one of PPO's advantages; none for a later iteration."""
    warnings.simplefilter("error", Note)
    compiling.BACKEND = "aot_eager"
    common: dict[str, Any] = {"num_envs": 2, "num_steps": 16, "preset": "none", "progress": False, "compile": "on"}
    schedule: dict[str, Any] = {"learning_rate_schedule": "linear"}
    penalty: dict[str, Any] = {"kl_old_coefficient": 1.0, "kl_old_target": 0.01}
    for method, values in (
        ("ppo", schedule | penalty | {"minibatch_size": 10}),
        ("actor_critic", schedule),
        ("trpo", {}),
    ):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        pg.train(method, "CartPole-v1", iterations=12, **common, **values)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 + (method == "ppo"), method
    torch._dynamo.utils.counters.clear()
    pg.train("ppo", "CartPole-v1", iterations=2, **common | {"compile": "off"}, minibatch_size=16)
    assert not torch._dynamo.utils.counters["stats"]


class Scaled(ValueObjective):
    """A value objective times a number that may change; its negative out of training."""

    scale = 1.0

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = super().forward(batch)
        return self.scale * (value if self.training else -value), metrics


def change_what_a_graph_is_of() -> None:
    """Numbers of the objective, its mode and shapes change, and a batch has no decision: steps are the plain ones."""
    warnings.simplefilter("error", Note)
    compiling.BACKEND = "aot_eager"
    torch.set_default_dtype(torch.float64)
    objectives = [Scaled(critic()) for _ in range(2)]
    optimizers = [torch.optim.Adam(x.parameters(), lr=0.1, eps=1.0) for x in objectives]  # not blind to the scale
    updates = [ascend(x, compiled=way) for x, way in zip(optimizers, (False, True), strict=True)]
    torch.manual_seed(0)
    graphs = []
    for change in ("begin", "none", "scale", "mode", "rows", "masked", "none"):
        part = batch(rows=9 if change == "rows" else 20)
        if change == "masked":
            part = part._replace(mask=part.mask & False, weight=0 * part.weight)
        before = deepcopy([x.state_dict() for x in (objectives[1], optimizers[1])])
        for x in objectives:
            if change == "scale":
                x.scale = 3.0
            if change == "mode":
                x.eval()
        found = [update(objective, part) for update, objective in zip(updates, objectives, strict=True)]
        assert_close(found[1], found[0], rtol=1e-12, atol=1e-14)
        assert_close(list(objectives[1].parameters()), list(objectives[0].parameters()), rtol=0, atol=1e-12)
        after = [x.state_dict() for x in (objectives[1], optimizers[1])]
        if change == "masked":
            assert_close([after[0], after[1]["state"]], [before[0], before[1]["state"]], rtol=0, atol=0)
            assert found[1]["critic_gradient_norm"] == 0
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[:2] == [0, 1]
    assert graphs == sorted(graphs)
    assert graphs[2:5] == [2, 3, 4]  # one more for each change


SIZES = (np.ones(3), np.full(3, 2.0))


class WithArrays(ValueObjective):
    """A value objective times numbers in NumPy's arrays, of which torch sees a passing copy."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = super().forward(batch)
        one, two = (torch.as_tensor(x, dtype=value.dtype) for x in SIZES)
        return (value * one * two).mean(), metrics


def make_a_graph_of_arrays() -> None:
    """A graph whose guards torch cannot choose among is made with all of them."""
    warnings.simplefilter("error", Note)
    compiling.BACKEND = "aot_eager"
    torch.set_default_dtype(torch.float64)
    objectives = [WithArrays(critic()) for _ in range(2)]
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.1) for x in objectives]
    for way, objective, optimizer in zip((False, True), objectives, optimizers, strict=True):
        torch.manual_seed(0)
        update, part = ascend(optimizer, compiled=way), batch()
        for _ in range(3):
            update(objective, part)
    assert_close(list(objectives[1].parameters()), list(objectives[0].parameters()), rtol=0, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def double(x: Tensor) -> Tensor:
    return 2 * x


def look_for_instructions() -> None:
    """Vector instructions are tried in another thread, so that the tracing does not wait."""
    from torch._inductor import cpu_vec_isa

    seen: queue.Queue[threading.Thread] = queue.Queue()
    cpu_vec_isa.valid_vec_isa_list = lambda: seen.put(threading.current_thread())
    torch.compile = lambda function, **_: function  # type: ignore[assignment]
    assert compiling.graph(double, double)(torch.ones(1)) == 2
    assert seen.get(timeout=60) is not threading.main_thread()


def interrupt_the_compiler() -> None:
    """Ctrl-C while a step is compiled: it is taken, and then the interrupt comes."""

    def backend(module: Any, inputs: Any) -> Any:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        return module.forward

    compiling.BACKEND = backend
    module, part = critic(), batch()
    objective, optimizer = ValueObjective(module), torch.optim.Adam(module.parameters())
    update = ascend(optimizer, compiled=True)
    update(objective, part)
    try:
        update(objective, part)
    except KeyboardInterrupt:
        assert all(x["step"] == 2 for x in optimizer.state.values())
    else:
        raise AssertionError("the interrupt never came")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    update(objective, part)
    assert all(x["step"] == 3 for x in optimizer.state.values())


BY_THE_COMPILER = pytest.param(
    compare_by_the_compiler, marks=pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
)


@pytest.mark.parametrize(
    "check",
    [
        BY_THE_COMPILER,
        count_compilations,
        change_what_a_graph_is_of,
        make_a_graph_of_arrays,
        look_for_instructions,
        interrupt_the_compiler,
    ],
)
def test_in_its_own_process(check: Callable[[], None]) -> None:
    in_its_own_process(check)


@pytest.mark.filterwarnings("ignore:Dynamo does not know")
def test_what_has_no_graph_runs_plain_and_says_so_once(float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "BACKEND", "eager")

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1).double()

        def forward(self, obs: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return self.net(obs).squeeze(-1)

    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = Odd()
        fit = fit_critic(module, torch.optim.Adam(module.parameters()), epochs=2, compiled=compiled)
        torch.manual_seed(1)
        part = batch()
        if compiled:
            with pytest.warns(Note, match="the update is not compiled") as said:
                metrics, _ = fit(part), fit(part)
            notes = [x for x in said if issubclass(x.category, Note)]
            assert len(notes) == 1
            assert len(str(notes[0].message)) <= 200
        else:
            metrics, _ = fit(part), fit(part)
        found.append((metrics, list(module.parameters())))
    assert_close(found[1], found[0], rtol=0, atol=0)


def test_only_plain_forms_have_a_rule() -> None:
    p = nn.Parameter(torch.zeros(3))
    assert has_rule(torch.optim.Adam([p], fused=True))
    assert has_rule(torch.optim.AdamW([p], weight_decay=0.1))
    assert not has_rule(torch.optim.Adam([p], amsgrad=True))
    assert has_rule(torch.optim.SGD([p], lr=0.1, momentum=0.9))
    assert not has_rule(torch.optim.SGD([p], lr=0.1, maximize=True))
    assert not has_rule(torch.optim.RMSprop([p], lr=0.1))
    assert not has_rule(torch.optim.Muon([nn.Parameter(torch.zeros(3, 3))]))
    assert not has_rule(MasterWeightsAdam([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))]))


@pytest.mark.parametrize(
    ("method", "values", "updates"),
    [
        ("ppo", {"steps": 10_000, "minibatch_size": 50, "epochs": 4}, 800),
        (
            "ppo",
            {"steps": None, "iterations": 10, "num_envs": 2, "num_steps": 100, "minibatch_size": 50, "epochs": 4},
            160,
        ),
        ("actor_critic", {"steps": 10_000, "num_envs": 5, "num_steps": 10}, 200),
        ("trpo", {"steps": 10_000, "critic_epochs": 3, "critic_minibatch_size": 100}, 300),
        ("reinforce", {"steps": 10_000, "critic_epochs": 3, "critic_minibatch_size": 100, "baseline": "value"}, 300),
        ("grpo", {"steps": 10**12}, 0),
    ],
)
def test_auto_compiles_where_the_run_has_enough_steps(
    method: str, values: dict[str, Any], updates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = with_values(options_of(method, "control")(), values)
    assert not compiles(options)
    for pays in (updates, updates + 1):
        monkeypatch.setattr("policygrad.train.compose.COMPILE_PAYS", pays)
        assert compiles(options) == (pays == updates)
    assert COMPILE_PAYS > 800
    assert compiles(with_values(options, {"compile": "on"}))
    assert not compiles(with_values(options, {"compile": "off"}))


def test_auto_does_not_compile_for_iterations_of_a_size_that_is_not_known() -> None:
    for method, world in (("reinforce", "control"), ("ppo", "exact")):
        options = with_values(
            options_of(method, world)(),
            {"iterations": 10**9, "minibatch_size": 2}
            if world == "exact"
            else {"iterations": 10**9, "baseline": "value"},
        )
        assert not compiles(options)
