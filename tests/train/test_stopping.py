"""However a run ends, what was learned is on disk, and nothing that is not finite."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import strict
from probes import Broken
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import compose as composing
from policygrad.train import training as module
from policygrad.train.options import EPISODIC, options_of

SHORT: dict[str, Any] = {"num_envs": 4, "num_steps": 16, "steps": 100, "minibatch_size": 16, "progress": False}
SMALL: dict[str, Any] = {"hidden": (8,), **SHORT}


def known(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """Those of the values that the method reads."""
    kind = options_of(method, "control")
    names = {f.name for f in dataclasses.fields(kind)} | {"progress"}
    if kind().credit in EPISODIC:
        names -= {"num_steps"}
    return {name: x for name, x in values.items() if name in names}


def replaced(monkeypatch: pytest.MonkeyPatch, loop: Callable[[nn.Module, nn.Module], Iterator[Any]]) -> None:
    """Put a loop of the test's own in the place of whatever the options ask for."""

    def compose(options: Any, policy: Any, critic: Any, *rest: Any) -> composing.Learner:
        learner = composing.compose(options, policy, critic, *rest)
        return dataclasses.replace(learner, loop=lambda *_: loop(policy, critic))

    monkeypatch.setattr(module, "compose", compose)


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


def values(module: nn.Module) -> set[float]:
    return {x for p in module.parameters() for x in p.flatten().tolist()}


def on_disk(directory: Path) -> set[float]:
    tensors = load_file(directory / "policy.safetensors")
    return {x for name, tensor in tensors.items() if name.startswith("policy.") for x in tensor.flatten().tolist()}


def lines(directory: Path) -> list[dict[str, float]]:
    return [strict(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class OwnPolicy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Normal(self.layer(obs), 1.0, validate_args=False), 1)


def test_a_metric_that_turns_nan_stops_it_and_what_was_learned_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        for k, kl in enumerate((0.1, 0.1, math.nan), 1):
            fill(policy, k)
            yield {"steps": float(k), "episodes": 0.0, "kl_old": kl}

    replaced(monkeypatch, loop)
    with pytest.raises(UserError, match=r"iteration 3, after 3 steps, because kl_old is nan"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == {3.0}
    assert [row["kl_old"] for row in lines(tmp_path)] == [0.1, 0.1]
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("which", ["policy", "critic"])
def test_a_parameter_that_is_not_finite_stops_it_and_what_was_saved_stays(
    which: str, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        fill(policy, 1)
        yield {"steps": 1.0, "episodes": 0.0}
        fill({"policy": policy, "critic": critic}[which], value)
        yield {"steps": 2.0, "episodes": 0.0}

    replaced(monkeypatch, loop)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"iteration 2, after 2 steps, because a parameter is not finite"):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == {1.0}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("found NaN in the loc"), UserError("no")], ids=repr)
@pytest.mark.parametrize("value", [2.0, math.nan])
def test_an_iteration_that_stops_half_way_keeps_what_is_finite(
    error: BaseException, value: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        fill(policy, 1)
        yield {"steps": 1.0, "episodes": 0.0}
        fill(policy, value)
        raise error

    replaced(monkeypatch, loop)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError):
        pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL)
    assert on_disk(tmp_path) == ({1.0} if math.isnan(value) else {value})
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize("method", ["ppo", "actor_critic", "reinforce", "grpo", "trpo", "npg"])
def test_a_gradient_that_is_nan_stops_it_before_the_step(method: str, tmp_path: Path) -> None:
    policy = OwnPolicy()
    policy.layer.bias.register_hook(lambda g: g * math.nan)
    before = values(policy)
    with pytest.raises(UserError, match=r"training stopped in iteration 1: the gradient's norm is nan") as raised:
        pg.train(method, "probes:Known-v0", policy=policy, out=tmp_path, **known(method, SHORT))
    assert len(str(raised.value)) <= 200
    assert values(policy) == on_disk(tmp_path) == before


class Later(Broken):
    """Stops at its fortieth step."""

    error: BaseException = RuntimeError("the simulator crashed")

    def step(self, action: Any) -> Any:
        if self.steps == 40:
            raise self.error
        self.steps += 1
        return self.observation(0), 1.0, False, False, {}


class Interrupted(Later):
    error = KeyboardInterrupt()


@pytest.mark.parametrize(("make", "error"), [(Later, UserError), (Interrupted, KeyboardInterrupt)])
def test_the_policy_on_disk_is_the_one_that_the_environment_failed_under(make: Any, error: Any, tmp_path: Path) -> None:
    made: list[pg.Policy] = []

    def policy(*spaces: Any) -> pg.Policy:
        made.append(pg.Policy(*spaces, hidden=(4,)))
        made.append(deepcopy(made[0]))
        return made[0]

    with pytest.raises(error):
        pg.train("ppo", make, policy=policy, out=tmp_path, **(SHORT | {"num_envs": 2, "steps": 1000}))
    assert len(lines(tmp_path)) == 2
    saved, _ = pg.load_policy(tmp_path)
    assert values(saved) == values(made[0]) != values(made[1])
    assert (tmp_path / "curve.png").exists()


def test_torch_is_as_it_was_after_a_language_run_and_after_one_that_fails(language: dict[str, Any]) -> None:
    def state() -> tuple[Any, ...]:
        return tuple(torch.get_rng_state().tolist()), torch.get_default_dtype(), torch.get_num_threads()

    torch.manual_seed(5)
    policy = OwnPolicy()
    before = state()
    made = pg.Training("grpo", **(language | {"iterations": 1}))
    assert state() == before
    for _ in made:
        assert state() == before
    made.run.evaluate()
    assert state() == before
    with pytest.raises(UserError, match="own tables"):
        pg.Training("ppo", "exact:chain", policy=policy, threads=2)
    assert state() == before
