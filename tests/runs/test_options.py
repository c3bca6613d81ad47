"""Every option of every algorithm changes something (TRL #2665), and none takes a value that cannot be meant."""

import dataclasses
import inspect
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv

from policygrad import train
from policygrad.advantages import no_baseline
from policygrad.algorithms.actor_critic import actor_critic, off_policy_actor_critic
from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.reinforce import reinforce
from policygrad.algorithms.trpo import trpo
from policygrad.critics import fit_critic
from policygrad.errors import UserError
from policygrad.returns import reward_to_go
from policygrad.runs import training
from policygrad.runs.options import ALGORITHMS, ALIASES, algorithm_named, check_read, validate, with_values
from policygrad.runs.run import Run
from policygrad.updates import natural_step, trust_region_step

SMALL: dict[str, Any] = {"hidden": (8,), "num_envs": 4, "num_steps": 16, "steps": 140, "learning_rate": 0.01}
BASE: dict[str, dict[str, Any]] = dict.fromkeys(ALGORITHMS, SMALL) | {
    "ppo": SMALL | {"minibatch_size": 16, "epochs": 4}
}

# option -> (another value, what else must be set for it to have a say)
COMMON: dict[str, tuple[Any, dict[str, Any]]] = {
    "steps": (280, {}),
    "seed": (1, {}),
    "stop_at_return": (-1e9, {"steps": 1500, "num_envs": 16}),
    "num_envs": (5, {}),
    "num_steps": (7, {}),
    "gamma": (0.5, {}),
    "learning_rate": (0.003, {}),
    "learning_rate_schedule": ("linear", {}),
    "adam_epsilon": (0.1, {}),
    "normalize_observations": (True, {}),
    "scale_rewards": (True, {}),
    "hidden": ((8, 8), {}),
    "activation": ("relu", {}),
    "orthogonal": (False, {}),
    "squash": (True, {}),
    "state_dependent_std": (True, {}),
    "initial_log_std": (-0.5, {}),
}
ELSEWHERE = {"device", "threads", "vectorization"}  # they may not change the numbers: tests of their own, below
OBJECTIVE: dict[str, tuple[Any, dict[str, Any]]] = {
    "normalize_advantages": (True, {}),
    "entropy_coefficient": (0.5, {}),
    "max_grad_norm": (0.01, {}),
}
CRITIC: dict[str, tuple[Any, dict[str, Any]]] = {"critic_epochs": (3, {}), "critic_minibatch_size": (5, {})}
NATURAL = CRITIC | {
    "lam": (0.3, {}),
    "normalize_advantages": (False, {}),
    "delta": (0.001, {}),
    "damping": (1.0, {}),
    "cg_iters": (1, {}),
}
OWN: dict[str, dict[str, tuple[Any, dict[str, Any]]]] = {
    "reinforce": OBJECTIVE
    | CRITIC
    | {
        "returns": ("trajectory_return", {}),
        "baseline": ("time_mean", {}),
        "discounted": (True, {}),
        "critic_learning_rate": (0.1, {}),
    },
    "actor_critic": OBJECTIVE
    | {
        "advantage": ("n_step", {}),
        "lam": (0.5, {}),
        "n": (2, {"advantage": "n_step"}),
        "value_coefficient": (5.0, {}),
    },
    "off_policy_actor_critic": OBJECTIVE
    | {
        "epochs": (2, {}),
        "lam": (0.5, {}),
        "rho_bar": (0.5, {}),
        "c_bar": (0.5, {}),
        "value_coefficient": (5.0, {}),
    },
    "npg": NATURAL
    | {
        "step_rule": ("learning_rate", {}),
        "natural_learning_rate": (0.01, {"step_rule": "learning_rate"}),
    },
    "trpo": NATURAL | {"backtracks": (1, {"delta": 50.0}), "shrink": (0.3, {"delta": 50.0})},
    "ppo": {
        "lam": (0.3, {}),
        "epochs": (3, {}),
        "minibatch_size": (32, {}),
        "clip": (0.01, {}),
        "kl_coefficient": (1.0, {}),
        "kl_coefficient_target": (1e-6, {"kl_coefficient": 1.0}),
        "target_kl": (1e-6, {}),
        "entropy_coefficient": (0.5, {}),
        "value_coefficient": (5.0, {}),
        "value_clip": (0.01, {}),
        "dual_clip_bound": (1.01, {}),
        "advantage_normalization": ("none", {}),
        "max_grad_norm": (0.01, {}),
    },
}
CASES = [
    pytest.param(algorithm, option, *case, id=f"{algorithm} {option}")
    for algorithm in ALGORITHMS
    for option, case in (COMMON | OWN[algorithm]).items()
]


def outcome(algorithm: str, **options: Any) -> tuple[list[float], list[dict[str, float]]]:
    """The parameters after a short training, and what was reported on the way."""
    run = train(algorithm, "probes:Known-v0", **(BASE[algorithm] | options))
    parameters = torch.cat([p.detach().flatten() for m in (run.policy, run.critic) for p in m.parameters()])
    return parameters.tolist(), [{n: x for n, x in row.items() if "second" not in n} for row in run.metrics]


remembered = cache(lambda algorithm, options: outcome(algorithm, **dict(options)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_table_has_every_option(algorithm: str) -> None:
    assert {f.name for f in dataclasses.fields(ALGORITHMS[algorithm])} == {*COMMON, *OWN[algorithm], *ELSEWHERE}


@pytest.mark.parametrize(("algorithm", "option", "value", "context"), CASES)
def test_it_changes_something(algorithm: str, option: str, value: Any, context: dict[str, Any]) -> None:
    before = remembered(algorithm, tuple(context.items()))
    after = outcome(algorithm, **context, **{option: value})
    assert before != after


def test_threads_are_torchs_while_it_trains() -> None:
    seen = []

    def policy(*spaces: Any) -> torch.nn.Module:
        seen.append(torch.get_num_threads())
        return training.Policy(*spaces)

    for threads in (2, 1):
        train("actor_critic", "probes:Known-v0", **SMALL, threads=threads, policy=policy)
    assert seen == [2, 1]


@pytest.mark.parametrize(
    ("environment", "vectorization", "kind"),
    [
        ("CartPole-v1", "auto", CartPoleVectorEnv),
        ("CartPole-v1", "sync", SyncVectorEnv),
        ("Acrobot-v1", "auto", SyncVectorEnv),
        ("probes:Known-v0", "async", AsyncVectorEnv),
    ],
)
@pytest.mark.parametrize("algorithm", ["actor_critic", "reinforce"])
def test_vectorization_says_how_the_environments_are_stepped(
    algorithm: str, environment: str, vectorization: str, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[VectorEnv] = []

    def make(*arguments: Any, **options: Any) -> VectorEnv:
        made.append(make_environments(*arguments, **options))
        return made[-1]

    make_environments = training.make_environments
    monkeypatch.setattr(training, "make_environments", make)
    size = {"num_steps": None} if algorithm == "reinforce" else {}
    train(algorithm, environment, preset="none", **(SMALL | size | {"steps": 1, "vectorization": vectorization}))
    assert isinstance(made[0].unwrapped, kind)


def test_the_device_is_where_the_modules_are() -> None:
    run = train("ppo", "probes:Known-v0", **BASE["ppo"], device="cpu:0")
    assert {p.device.type for p in run.policy.parameters()} == {"cpu"}
    with pytest.raises(UserError, match="device 'nowhere' cannot be used"):
        train("ppo", "probes:Known-v0", **BASE["ppo"], device="nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cuda"):
        train("ppo", "probes:Known-v0", **BASE["ppo"], device="cuda")


IMPOSSIBLE = [
    ("ppo", "gamma", 1.2),
    ("ppo", "gamma", -0.1),
    ("ppo", "gamma", math.nan),
    ("ppo", "lam", 1.01),
    ("ppo", "steps", 0),
    ("ppo", "steps", 1e6),
    ("ppo", "num_envs", 0),
    ("ppo", "num_envs", -2),
    ("ppo", "num_envs", 2.5),
    ("ppo", "num_envs", "8"),
    ("ppo", "num_envs", True),
    ("ppo", "num_steps", 0),
    ("ppo", "num_steps", None),
    ("ppo", "epochs", 0),
    ("ppo", "minibatch_size", 0),
    ("ppo", "minibatch_size", 1025),
    ("ppo", "learning_rate", 0.0),
    ("ppo", "learning_rate", -1e-3),
    ("ppo", "learning_rate", "fast"),
    ("ppo", "learning_rate_schedule", "cosine"),
    ("ppo", "advantage_normalization", "rows"),
    ("ppo", "activation", "sine"),
    ("ppo", "hidden", (64, 0)),
    ("ppo", "hidden", (64, 1.5)),
    ("ppo", "hidden", 64),
    ("ppo", "orthogonal", 1),
    ("ppo", "clip", 0.0),
    ("ppo", "dual_clip_bound", 1.0),
    ("ppo", "kl_coefficient", -1.0),
    ("ppo", "kl_coefficient_target", 0.0),
    ("ppo", "kl_coefficient_target", 0.01),  # of no coefficient
    ("ppo", "max_grad_norm", 0.0),
    ("ppo", "entropy_coefficient", -0.1),
    ("ppo", "seed", -1),
    ("ppo", "threads", 0),
    ("ppo", "vectorization", "threads"),
    ("ppo", "device", None),
    ("ppo", "learning_rate", math.inf),
    ("ppo", "initial_log_std", math.nan),
    ("ppo", "initial_log_std", -math.inf),
    ("ppo", "stop_at_return", math.nan),
    ("ppo", "threads", 100_000),
    ("trpo", "critic_minibatch_size", 1025),
    ("trpo", "delta", math.inf),
    ("trpo", "delta", 0.0),
    ("trpo", "damping", -1.0),
    ("trpo", "cg_iters", 0),
    ("trpo", "backtracks", 0),
    ("trpo", "shrink", 1.0),
    ("npg", "step_rule", "newton"),
    ("npg", "natural_learning_rate", 0.0),
    ("reinforce", "baseline", "median"),
    ("reinforce", "returns", "none"),
    ("actor_critic", "n", 0),
    ("actor_critic", "advantage", "td"),
    ("off_policy_actor_critic", "rho_bar", 0.0),
]


@pytest.mark.parametrize(("algorithm", "option", "value"), IMPOSSIBLE, ids=lambda x: str(x))
def test_an_impossible_value_is_refused_by_name(algorithm: str, option: str, value: Any) -> None:
    with pytest.raises(UserError, match=option) as raised:
        train(algorithm, "CartPole-v1", preset="none", **{option: value})
    assert "\n" not in str(raised.value)


UNREAD: list[tuple[str, dict[str, Any], str]] = [
    ("actor_critic", {"n": 3}, "n is read only where advantage is n_step, and advantage is gae"),
    ("actor_critic", {"advantage": "monte_carlo", "lam": 0.9}, "lam is read only where advantage is gae"),
    ("npg", {"natural_learning_rate": 0.2}, "natural_learning_rate is read only where step_rule is learning_rate"),
    ("npg", {"step_rule": "learning_rate", "delta": 0.02}, "delta is read only where step_rule is kl_radius"),
    ("reinforce", {"baseline": "mean", "critic_learning_rate": 0.1}, "critic_learning_rate is read only where"),
    ("reinforce", {"baseline": "none", "critic_epochs": 2}, "critic_epochs is read only where baseline is value"),
    ("reinforce", {"baseline": "optimal", "critic_minibatch_size": 9}, "critic_minibatch_size is read only where"),
    ("ppo", {"policy": torch.nn.Identity(), "squash": True}, "squash shapes the networks made here"),
    ("ppo", {"policy": torch.nn.Identity(), "initial_log_std": -1.0}, "initial_log_std shapes"),
    ("ppo", {"policy": torch.nn.Identity(), "state_dependent_std": True}, "state_dependent_std shapes"),
    ("ppo", {"policy": torch.nn.Identity(), "critic": torch.nn.Identity(), "hidden": (8,)}, "hidden shapes"),
]


@pytest.mark.parametrize(("algorithm", "options", "said"), UNREAD, ids=lambda x: str(x))
def test_an_option_that_nothing_would_read_is_refused(algorithm: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        train(algorithm, "CartPole-v1", preset="none", **options)


def test_what_a_preset_sets_may_go_unread() -> None:
    """The preset is for the choices it makes; one other choice, and some of it is not needed."""
    tuned = with_values(ALGORITHMS["actor_critic"](), {"lam": 0.9})
    check_read(with_values(tuned, {"advantage": "n_step", "n": 3}), tuned)
    with pytest.raises(UserError, match="lam is read only"):
        check_read(with_values(tuned, {"advantage": "n_step", "lam": 0.8}), tuned)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_defaults_are_possible(algorithm: str) -> None:
    validate(ALGORITHMS[algorithm]())


def test_an_option_that_the_algorithm_does_not_have_gives_the_nearest() -> None:
    with pytest.raises(UserError, match=r"PPO has no option 'learning_rat': did you mean learning_rate"):
        train("ppo", "CartPole-v1", learning_rat=1.0)
    with pytest.raises(UserError, match="TRPO has no option 'clip'"):
        with_values(ALGORITHMS["trpo"](), {"clip": 0.2})


def test_lists_become_tuples_as_they_come_from_a_file() -> None:
    assert with_values(ALGORITHMS["ppo"](), {"hidden": [3, 4]}).hidden == (3, 4)


def test_numpys_numbers_become_pythons() -> None:
    given = {"seed": np.int64(8), "hidden": (np.int64(8),), "gamma": np.float32(0.5), "clip": np.float64(0.1)}
    options: Any = with_values(ALGORITHMS["ppo"](), given)
    validate(options)
    assert [type(x) for x in (options.seed, options.hidden[0], options.gamma, options.clip)] == [int, int, float, float]


def test_a_critics_default_minibatch_is_not_too_large_for_a_small_rollout() -> None:
    validate(with_values(ALGORITHMS["trpo"](), {"num_envs": 1, "num_steps": 16}))


def test_algorithms_go_by_their_names_and_aliases() -> None:
    for name in ALGORITHMS:
        assert algorithm_named(name) == algorithm_named(name.replace("_", "-")) == name
    assert {alias: algorithm_named(alias) for alias in ALIASES} == ALIASES
    assert ALIASES["a2c"] == "actor_critic"
    assert {"reinforce", "actor_critic", "npg", "trpo", "ppo"} <= set(ALGORITHMS)


@pytest.mark.parametrize(
    ("name", "meant"), [("pppo", "ppo"), ("tpro", "trpo"), ("reinforc", "reinforce"), ("xyz", "there are")]
)
def test_an_unknown_algorithm_gives_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UserError, match=meant):
        algorithm_named(name)


# option of the command -> parameter of the function, where they are not called the same
RENAMED = {"critic_epochs": "epochs", "critic_minibatch_size": "minibatch_size"}
FUNCTIONS = [
    ("reinforce", reinforce, {"returns": reward_to_go, "baseline": no_baseline}),  # the command's has a critic
    ("actor_critic", actor_critic, {}),
    ("off_policy_actor_critic", off_policy_actor_critic, {}),
    ("ppo", ppo, {"clip": (0.2, 0.2)}),  # the function has two bounds
    ("trpo", trpo, {}),
    ("npg", trpo, {}),
    ("trpo", trust_region_step, {}),
    ("npg", natural_step, {}),
]


@pytest.mark.parametrize(("algorithm", "function", "different"), FUNCTIONS)
def test_the_command_and_the_function_have_the_same_defaults(
    algorithm: str, function: Any, different: dict[str, Any]
) -> None:
    parameters = inspect.signature(function).parameters
    compared = 0
    for f in dataclasses.fields(ALGORITHMS[algorithm]):
        if f.name in parameters and parameters[f.name].default is not inspect.Parameter.empty:
            assert parameters[f.name].default == different.get(f.name, f.default), f.name
            compared += 1
    assert compared


def test_the_critics_minibatches_are_larger_in_the_command_than_in_the_function() -> None:
    """More rollouts, fewer steps: the one default that differs, on purpose."""
    parameters = inspect.signature(fit_critic).parameters
    for algorithm, size in (("reinforce", 256), ("trpo", 128), ("npg", 128)):
        options: Any = ALGORITHMS[algorithm]()
        assert options.critic_epochs == parameters["epochs"].default
        assert options.critic_minibatch_size == size > parameters["minibatch_size"].default


def test_every_option_is_explained_to_the_reader_of_help() -> None:
    """A string stands below each option; the command line shows it."""
    for kind in {c for algorithm in ALGORITHMS.values() for c in algorithm.__mro__[:-1]}:
        source = inspect.getsource(kind)
        for name in kind.__annotations__:
            after = source.split(f"    {name}: ", 1)[1].split("\n", 1)[1].lstrip()
            assert after.startswith('"""'), f"{kind.__name__}.{name}"


def run_of(algorithm: str) -> Run:
    return train(algorithm, "probes:Known-v0", **BASE[algorithm])


def test_an_alias_trains_what_it_stands_for() -> None:
    assert train("a2c", "probes:Known-v0", **SMALL).algorithm == run_of("actor_critic").algorithm == "actor_critic"
