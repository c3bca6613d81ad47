"""Presets: every file fits its algorithms and its environment, and the right one is taken."""

import gymnasium
import pytest

from policygrad import train
from policygrad.errors import UserError
from policygrad.runs import presets
from policygrad.runs.language.options import LANGUAGE
from policygrad.runs.language.options import validate as validate_language
from policygrad.runs.options import ALGORITHMS, validate, with_values

PROMISED = {
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "LunarLander-v3",
    "LunarLanderContinuous-v3",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Walker2d-v5",
    "Ant-v5",
    "Swimmer-v5",
    "InvertedPendulum-v5",
}


TASKS = {"arithmetic"}  # of language models


def test_the_promised_presets_are_there() -> None:
    assert set(presets.names()) >= PROMISED | TASKS
    assert all("ppo" in presets.load(name) for name in PROMISED)
    assert set(presets.load("arithmetic")) == set(LANGUAGE)


@pytest.mark.parametrize("name", presets.names())
def test_it_is_named_for_an_environment_or_a_task(name: str) -> None:
    assert name in {*gymnasium.registry, *TASKS}


@pytest.mark.parametrize(
    ("name", "algorithm"), [(name, algorithm) for name in presets.names() for algorithm in presets.load(name)]
)
def test_every_setting_is_a_possible_option_of_its_algorithm(name: str, algorithm: str) -> None:
    tuned = presets.load(name)[algorithm]
    if name in TASKS:
        validate_language(algorithm, with_values(LANGUAGE[algorithm](), tuned))
    else:
        validate(with_values(ALGORITHMS[algorithm](), tuned))
    assert not {"seed", "device", "threads", "steps"} & set(tuned), "these are the user's"


def test_the_environments_own_is_taken_by_default() -> None:
    assert presets.choose(None, "ppo", "CartPole-v1") == ("CartPole-v1", presets.load("CartPole-v1")["ppo"])
    assert presets.choose(None, "ppo", "somewhere:CartPole-v1")[0] == "CartPole-v1"


@pytest.mark.parametrize("environment", ["probes:Known-v0", "CartPole-v0", gymnasium.make, None])
def test_there_is_none_by_default_for_other_environments(environment: object) -> None:
    assert presets.choose(None, "ppo", environment) == (None, {})


def test_none_takes_none() -> None:
    assert presets.choose("none", "ppo", "CartPole-v1") == (None, {})


def test_another_environments_can_be_taken_by_name() -> None:
    assert presets.choose("CartPole-v1", "ppo", "Acrobot-v1") == presets.choose(None, "ppo", "CartPole-v1")


def test_an_unknown_one_gives_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'CartPole-v2': did you mean CartPole-v1"):
        presets.load("CartPole-v2")


def test_one_without_the_algorithm_says_which_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "load", lambda name: {"ppo": {}, "trpo": {}})
    with pytest.raises(UserError, match=r"no settings for npg, only for ppo, trpo"):
        presets.choose("CartPole-v1", "npg", "CartPole-v1")


def test_what_is_given_goes_before_the_preset_and_both_are_announced() -> None:
    said: list[str] = []
    run = train("ppo", "CartPole-v1", steps=1, num_envs=2, minibatch_size=64, epochs=1, announce=said.append)
    tuned = presets.load("CartPole-v1")["ppo"]
    assert run.preset == "CartPole-v1"
    assert run.options.num_envs == 2
    assert run.options.gamma == tuned["gamma"]
    assert len(said) == 1
    assert said[0].startswith("preset CartPole-v1: ")
    assert "num_envs=2" in said[0]


def test_without_a_preset_nothing_is_announced() -> None:
    said: list[str] = []
    run = train("actor_critic", "CartPole-v1", preset="none", steps=1, announce=said.append)
    assert run.preset is None
    assert said == []


def test_an_error_blames_the_values_of_the_preset_that_the_user_left() -> None:
    message, tuned = "lam is 2.5: read where n is 25, m is 7", {"lam": 2.5, "n": 2, "m": 7, "k": 1}
    assert presets.blamed(message, "P", tuned, {"lam": 2.5, "n": 2, "m": 7, "k": 1}) == (
        " (preset P sets lam=2.5, m=7; --preset none leaves them)"
    )
    assert presets.blamed(message, "P", tuned, {"lam": 2.5, "n": 25, "m": 8, "k": 1}) == (
        " (preset P sets lam=2.5; --preset none leaves it)"
    )
    assert presets.blamed(message, "P", {"lam": 2}, {"lam": 2}) == presets.blamed(message, None, {}, {}) == ""
