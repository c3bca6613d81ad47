"""The seed decides everything: the same parameters bit for bit, whatever happened before in the same process."""

import dataclasses
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TransformReward
from outcomes import ANY_ACTION, DISTINCT, parameters, untimed
from probes import Known, limited
from torch import Tensor, nn

import policygrad as pg
from policygrad.train.methods import METHODS
from policygrad.train.options import EPISODIC, has_critic, options_of
from policygrad.train.run import Run

SMALL: dict[str, Any] = {"hidden": (8,), "num_envs": 3, "num_steps": 8}
every_method = pytest.mark.parametrize("method", DISTINCT)


def short(method: str, **options: Any) -> Run:
    small = SMALL | {"steps": 60, "seed": 0, "minibatch_size": 7, "episode_steps": 8} | options
    known = {f.name for f in dataclasses.fields(options_of(method, "control"))}
    known -= {"num_steps"} if options_of(method, "control")().credit in EPISODIC else {"episode_steps"}
    values = {name: x for name, x in small.items() if name in known}
    return pg.train(method, "probes:Known-v0", progress=False, **values)


@every_method
def test_the_same_seed_gives_the_same_parameters_bit_for_bit(method: str) -> None:
    options = {"normalize_observations": True, "scale_rewards": True}
    first = short(method, **options)
    torch.rand(17)  # the caller's own random numbers are no part of it
    second = short(method, **options)
    assert torch.equal(parameters(first), parameters(second))
    assert untimed(first.metrics) == untimed(second.metrics)
    assert first.evaluate(3) == second.evaluate(3)


@every_method
def test_another_seed_gives_other_parameters(method: str) -> None:
    assert not torch.equal(parameters(short(method)), parameters(short(method, seed=1)))


@pytest.mark.parametrize("environment", ["CartPole-v1", "Pendulum-v1"])
def test_the_seed_decides_on_gymnasiums_own_environments(environment: str) -> None:
    runs = [
        pg.train("ppo", environment, progress=False, **SMALL, steps=48, minibatch_size=8, preset="none")
        for _ in range(2)
    ]
    assert torch.equal(*(parameters(run) for run in runs))


def test_training_and_evaluation_leave_torchs_generator_and_threads_as_they_were() -> None:
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    run = short("ppo", threads=2)
    run.evaluate(2, greedy=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_evaluation_changes_no_parameter_and_repeats_itself() -> None:
    run = short("ppo")
    before = parameters(run)
    results = [run.evaluate(5), run.evaluate(5), run.evaluate(5, seed=3)]
    assert results[0] == results[1] != results[2]
    assert torch.equal(parameters(run), before)


class Dropped(nn.Module):
    """A policy of one's own, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5), nn.Linear(64, 2))

    def forward(self, obs: Tensor) -> torch.distributions.Distribution:
        return torch.distributions.Independent(torch.distributions.Normal(self.layers(obs), 1.0), 1)


@pytest.mark.parametrize(
    "policy",
    [{}, Dropped, {"distribution": "squashed"}, {"distribution": "beta"}, {"state_dependent_std": True}],
    ids=["clipped", "dropout", "squashed", "beta", "state std"],
)
def test_the_ratio_is_1_on_the_first_minibatch(policy: Any) -> None:
    """Nothing is clipped then; and a policy that hardly moves has KL(old, new) 0 and an effective sample size of 1."""
    options: dict[str, Any] = {"learning_rate": 1e-30} | (policy if isinstance(policy, dict) else {})
    if policy is Dropped:
        options |= {"policy": Dropped()}
    run = pg.train("ppo", "probes:Known-v0", progress=False, **SMALL, steps=1, epochs=1, minibatch_size=24, **options)
    row = run.metrics[0]
    assert row["kl_old"] == pytest.approx(0, abs=1e-7)
    assert row["effective_sample_size"] == pytest.approx(1, abs=1e-6)
    assert row["clip_fraction"] == 0


class Global(Known):
    """An environment that draws from the global generators."""

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, reward + random.random() + np.random.normal(), *rest  # noqa: NPY002


def test_the_seed_decides_what_is_drawn_from_pythons_and_numpys_generators() -> None:
    def trained(seed: int) -> Run:
        random.seed(), np.random.seed()  # noqa: NPY002
        return pg.train("ppo", limited(Global, 8), progress=False, **SMALL, steps=60, minibatch_size=8, seed=seed)

    first, second, other = trained(0), trained(0), trained(1)
    assert torch.equal(parameters(first), parameters(second))
    assert untimed(first.metrics) == untimed(second.metrics) != untimed(other.metrics)


# Units


def in_units(method: str, c: float, **options: Any) -> Run:
    """Trained on rewards c times as large, with an Adam that adds nothing to the size of a gradient."""
    small = SMALL | {"steps": 120, "seed": 0, "minibatch_size": 7, "episode_steps": 8, "adam_epsilon": 1e-30} | options
    defaults = options_of(method, "control")()
    known = {f.name for f in dataclasses.fields(defaults)}
    known -= {"num_steps"} if defaults.credit in EPISODIC else {"episode_steps"}
    known -= set() if METHODS[method].update == "ascend" or has_critic(defaults) else {"adam_epsilon"}
    values = {"max_grad_norm": math.inf} | {name: x for name, x in small.items() if name in known}
    values = {name: x for name, x in values.items() if name in known}
    return pg.train(method, limited(lambda: TransformReward(Known(), lambda r: c * r), 8), progress=False, **values)


@pytest.mark.parametrize("c", [2.0**-14, 2.0**14], ids=["small", "large"])
@pytest.mark.parametrize("method", ANY_ACTION)
def test_the_unit_of_the_rewards_makes_no_difference_to_any_method(method: str, c: float) -> None:
    """The same policy bit for bit, and the same values in the other unit."""
    plain, scaled = in_units(method, 1.0), in_units(method, c)
    for a, b in zip(plain.policy.parameters(), scaled.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    if plain.critic is not None:
        obs = torch.randn(5, 1, 3)
        assert torch.equal(c * plain.critic(obs), scaled.critic(obs))
        assert plain.critic(obs).std() > 0


def test_the_unit_of_the_rewards_makes_no_difference_with_a_value_clip_and_scaled_rewards() -> None:
    for options in ({"value_clip": 0.2, "max_grad_norm": 0.5}, {"scale_rewards": True}):
        plain, scaled = (in_units("ppo", c, **options) for c in (1.0, 2.0**14))
        for a, b in zip(plain.policy.parameters(), scaled.policy.parameters(), strict=True):
            assert torch.equal(a, b)


class InUnits(Known):
    """Known, with actions from low to high."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__(spaces.Box(low, high, (2,), np.float64))
        self.low, self.high = low, high

    def step(self, action: Any) -> Any:
        return super().step((2 * action - (self.low + self.high)) / (self.high - self.low))


@pytest.mark.parametrize("distribution", ["normal", "squashed", "beta"])
@pytest.mark.parametrize(("low", "high"), [(-512.0, 512.0), (0.0, 1024.0), (-(2.0**-20), 2.0**-20)])
def test_the_unit_of_the_actions_makes_no_difference(low: float, high: float, distribution: str) -> None:
    options = SMALL | {"progress": False, "distribution": distribution, "steps": 60, "epochs": 2, "minibatch_size": 8}
    plain, other = (pg.train("ppo", limited(lambda x=x: InUnits(*x), 8), **options) for x in ((-1.0, 1.0), (low, high)))
    torch.testing.assert_close(parameters(plain), parameters(other), rtol=1e-4, atol=1e-5)
    assert other.metrics[-1]["return"] == pytest.approx(plain.metrics[-1]["return"], rel=1e-4)
    assert other.metrics[-1]["action_std"] == pytest.approx(plain.metrics[-1]["action_std"], rel=1e-4)
