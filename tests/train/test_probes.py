"""Every method on environments so small that what it must learn is known: the values, and the action."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import gymnasium
import pytest
import torch
from probes import (
    ActionAndObservationMatter,
    ActionMatters,
    ConstantReward,
    DelayedReward,
    ObservationReward,
    Target,
    limited,
)

import policygrad as pg
from policygrad.train.methods import METHODS
from policygrad.train.options import has_critic, options_of
from policygrad.train.run import Run

GAMMA = 0.5
# The settings that make each quick here, none of them per probe.
SETTINGS: dict[str, dict[str, Any]] = {
    "reinforce": {"learning_rate": 0.03, "critic_learning_rate": 0.03, "num_envs": 64, "critic_epochs": 5},
    "actor_critic": {"learning_rate": 0.03, "num_envs": 32, "num_steps": 4},
    "off_policy_actor_critic": {"learning_rate": 0.03, "num_envs": 64, "num_steps": 4, "epochs": 2},
    "npg": {"learning_rate": 0.03, "num_envs": 64, "num_steps": 4, "delta": 0.05},
    "trpo": {"learning_rate": 0.03, "num_envs": 64, "num_steps": 4, "delta": 0.05},
    "ppo": {"learning_rate": 0.03, "num_envs": 64, "num_steps": 4, "epochs": 4, "minibatch_size": 128},
}
GROUP = {"learning_rate": 0.03, "num_envs": 64, "epochs": 4}
SETTINGS |= {name: GROUP for name, method in METHODS.items() if method.objective == "grpo"}
SETTINGS["remax"] = SETTINGS["reinforce"]
SETTINGS["dro"] = SETTINGS["reinforce"] | {"kl_old_coefficient": 0.1}
# Of grpo's family the first; on tokens all are tried (test_methods.py).
every_method = pytest.mark.parametrize("method", list(SETTINGS)[:7])
with_a_critic = pytest.mark.parametrize(
    "method", [name for name in METHODS if has_critic(options_of(name, "control")())]
)


def learn(method: str, make: Callable[[], gymnasium.Env], steps: int, **settings: Any) -> Run:
    return pg.train(method, limited(make, 8), progress=False, steps=steps, hidden=(16,), **settings)


def trained(method: str, make: Callable[[], gymnasium.Env], steps: int = 2500, **others: Any) -> Run:
    discount = {} if options_of(method, "control")().credit == "group" else {"gamma": GAMMA}
    settings = {
        n: x for n, x in SETTINGS[method].items() if n in {f.name for f in fields(options_of(method, "control"))}
    }
    return learn(method, make, steps, **discount, **settings, **others)


def value(run: Run, x: float) -> float:
    return run.critic(torch.full((1, 1, 1), float(x))).item()


def action(run: Run, x: float) -> int:
    return run.policy(torch.full((1, 1, 1), float(x))).mode.item()


def test_every_method_has_its_settings() -> None:
    assert set(SETTINGS) == set(METHODS)


@with_a_critic
def test_constant_reward_the_value_is_the_reward(method: str) -> None:
    run = trained(method, ConstantReward, 2000)
    assert value(run, 0) == pytest.approx(1, abs=0.05)
    assert run.metrics[-1]["return"] == 1


@with_a_critic
def test_reward_is_the_observation_and_so_is_the_value(method: str) -> None:
    run = trained(method, ObservationReward)
    assert [value(run, -1), value(run, 1)] == pytest.approx([-1, 1], abs=0.1)


@with_a_critic
def test_a_delayed_reward_is_discounted(method: str) -> None:
    run = trained(method, DelayedReward)
    later = GAMMA if method == "dro" else 1  # whose critic is of the whole episode, wherever it is asked
    assert [value(run, 0), value(run, 1)] == pytest.approx([GAMMA, later], abs=0.1)


@every_method
def test_where_the_action_matters_the_right_one_is_found(method: str) -> None:
    run = trained(method, ActionMatters)
    assert action(run, 0) == 1
    assert run.policy(torch.zeros(1, 1, 1)).probs[..., 1].item() > 0.9
    assert run.critic is None or value(run, 0) == pytest.approx(1, abs=0.2)


@every_method
def test_where_action_and_observation_matter_each_observation_finds_its_own(method: str) -> None:
    run = trained(method, ActionAndObservationMatter, 3000)
    assert (action(run, -1), action(run, 1)) == (0, 1)
    assert run.evaluate(20).return_mean == 1
    assert run.critic is None or [value(run, -1), value(run, 1)] == pytest.approx([1, 1], abs=0.2)


@every_method
def test_a_beta_learns_an_action_between_its_bounds_for_each_observation(method: str) -> None:
    """Uniform actions have a return of -0.58, and the best one for both observations -0.25."""
    assert trained(method, Target, 6000, distribution="beta").metrics[-1]["return"] > -0.15


@pytest.mark.parametrize("baseline", ["none", "mean", "time_mean", "optimal", "value"])
@pytest.mark.parametrize("credit", ["reward_to_go", "trajectory_return"])
def test_reinforce_finds_the_action_with_every_baseline_and_return(baseline: str, credit: str) -> None:
    settings = SETTINGS["reinforce"] | {"baseline": baseline, "credit": credit}
    if baseline != "value":
        settings = {name: x for name, x in settings.items() if not name.startswith("critic")}
    run = learn("reinforce", ActionAndObservationMatter, 1500, **settings)
    assert (action(run, -1), action(run, 1)) == (0, 1)


@pytest.mark.parametrize("credit", ["gae", "n_step", "monte_carlo"])
def test_actor_critic_finds_the_action_with_every_advantage(credit: str) -> None:
    settings = SETTINGS["actor_critic"] | {"credit": credit}
    run = learn("actor_critic", ActionAndObservationMatter, 2000, **settings)
    assert (action(run, -1), action(run, 1)) == (0, 1)


def test_ppo_finds_the_action_by_the_penalty_alone() -> None:
    penalty = {"clip_low": math.inf, "clip_high": math.inf, "kl_old_coefficient": 1.0, "kl_old_target": 0.02}
    settings = SETTINGS["ppo"] | penalty
    run = learn("ppo", ActionAndObservationMatter, 2500, **settings)
    assert (action(run, -1), action(run, 1)) == (0, 1)
