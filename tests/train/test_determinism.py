"""The seed decides everything: the same parameters bit for bit, whatever happened before in the same process."""

import dataclasses
from typing import Any

import pytest
import torch
from outcomes import DISTINCT, parameters, untimed
from torch import Tensor, nn

import policygrad as pg
from policygrad.train.options import EPISODIC, options_of
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
    "policy", [None, Dropped, "squash", "state_dependent_std"], ids=["clipped", "dropout", "squash", "state std"]
)
def test_the_ratio_is_1_on_the_first_minibatch(policy: Any) -> None:
    """Nothing is clipped then; and a policy that hardly moves has KL(old, new) 0 and an effective sample size of 1."""
    options: dict[str, Any] = {"learning_rate": 1e-30} | ({policy: True} if isinstance(policy, str) else {})
    if policy is Dropped:
        options |= {"policy": Dropped()}
    run = pg.train("ppo", "probes:Known-v0", progress=False, **SMALL, steps=1, epochs=1, minibatch_size=24, **options)
    row = run.metrics[0]
    assert row["kl_old"] == pytest.approx(0, abs=1e-7)
    assert row["effective_sample_size"] == pytest.approx(1, abs=1e-6)
    assert row["clip_fraction"] == 0
