"""Every algorithm on environments so small that what it must learn is known: the values, and the action."""

from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
import torch
from policygrad.runs.options import ALGORITHMS
from policygrad.runs.training import Run
from probes import ActionAndObservationMatter, ActionMatters, ConstantReward, DelayedReward, ObservationReward, limited

from policygrad import train

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
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def trained(algorithm: str, make: Callable[[], gymnasium.Env], steps: int = 2500) -> Run:
    return train(algorithm, limited(make, 8), steps=steps, gamma=GAMMA, hidden=(16,), **SETTINGS[algorithm])


def value(run: Run, x: float) -> float:
    return run.critic(torch.full((1, 1, 1), float(x))).item()


def action(run: Run, x: float) -> int:
    return run.policy(torch.full((1, 1, 1), float(x))).mode.item()


def test_every_algorithm_has_its_settings() -> None:
    assert set(SETTINGS) == set(ALGORITHMS)


@every_algorithm
def test_constant_reward_the_value_is_the_reward(algorithm: str) -> None:
    run = trained(algorithm, ConstantReward, 2000)
    assert value(run, 0) == pytest.approx(1, abs=0.05)
    assert run.metrics[-1]["return"] == 1


@every_algorithm
def test_reward_is_the_observation_and_so_is_the_value(algorithm: str) -> None:
    run = trained(algorithm, ObservationReward)
    assert [value(run, -1), value(run, 1)] == pytest.approx([-1, 1], abs=0.1)


@every_algorithm
def test_a_delayed_reward_is_discounted(algorithm: str) -> None:
    run = trained(algorithm, DelayedReward)
    assert [value(run, 0), value(run, 1)] == pytest.approx([GAMMA, 1], abs=0.1)


@every_algorithm
def test_where_the_action_matters_the_right_one_is_found(algorithm: str) -> None:
    run = trained(algorithm, ActionMatters)
    assert action(run, 0) == 1
    assert run.policy(torch.zeros(1, 1, 1)).probs[..., 1].item() > 0.9
    assert value(run, 0) == pytest.approx(1, abs=0.2)


@every_algorithm
def test_where_action_and_observation_matter_each_observation_finds_its_own(algorithm: str) -> None:
    run = trained(algorithm, ActionAndObservationMatter, 3000)
    assert (action(run, -1), action(run, 1)) == (0, 1)
    assert run.evaluate(20).return_mean == 1
    assert [value(run, -1), value(run, 1)] == pytest.approx([1, 1], abs=0.2)


@pytest.mark.parametrize("baseline", ["none", "mean", "time_mean", "optimal", "value"])
@pytest.mark.parametrize("returns", ["reward_to_go", "trajectory_return"])
def test_reinforce_finds_the_action_with_every_baseline_and_return(baseline: str, returns: str) -> None:
    settings = SETTINGS["reinforce"] | {"baseline": baseline, "returns": returns}
    if baseline != "value":
        settings = {name: x for name, x in settings.items() if not name.startswith("critic")}
    run = train("reinforce", limited(ActionAndObservationMatter, 8), steps=1500, hidden=(16,), **settings)
    assert (action(run, -1), action(run, 1)) == (0, 1)


@pytest.mark.parametrize("advantage", ["gae", "n_step", "monte_carlo"])
def test_actor_critic_finds_the_action_with_every_advantage(advantage: str) -> None:
    settings = SETTINGS["actor_critic"] | {"advantage": advantage}
    run = train("actor_critic", limited(ActionAndObservationMatter, 8), steps=2000, hidden=(16,), **settings)
    assert (action(run, -1), action(run, 1)) == (0, 1)


def test_ppo_finds_the_action_by_the_penalty_alone() -> None:
    settings = SETTINGS["ppo"] | {"clip": float("inf"), "kl_coefficient": 1.0, "kl_coefficient_target": 0.02}
    run = train("ppo", limited(ActionAndObservationMatter, 8), steps=2500, hidden=(16,), **settings)
    assert (action(run, -1), action(run, 1)) == (0, 1)
