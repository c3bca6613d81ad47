"""Every option of every method changes something (TRL #2665), and none takes a value that cannot be meant."""

import dataclasses
import inspect
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import parameters, untimed
from probes import ConstantReward, limited

import policygrad as pg
from policygrad.critics import fit_critic
from policygrad.errors import UserError
from policygrad.train import options as table
from policygrad.train.methods import CLONE, KNOWN, METHODS, TABLE
from policygrad.train.options import (
    BOOTSTRAPPED,
    DEMONSTRATED,
    EPISODIC,
    OptionError,
    Options,
    compares_groups,
    defaults_of,
    for_command_line,
    has_critic,
    options_of,
    validate,
    with_values,
)
from policygrad.train.reward_options import RewardModelOptions
from policygrad.updates import natural_step, trust_region_step

WORLDS = ("control", "exact", "language")
every_method = pytest.mark.parametrize("method", METHODS)
every_world = pytest.mark.parametrize("world", WORLDS)


def names(method: str, world: str) -> set[str]:
    return {f.name for f in dataclasses.fields(options_of(method, world))}


# The table


@pytest.mark.parametrize("method", [*TABLE, CLONE], ids=lambda x: x.name)
def test_every_default_of_a_method_is_an_option_of_it_on_some_world(method: Any) -> None:
    for name in method.defaults:
        assert any(name in names(method.name, world) for world in WORLDS), name
    for world, defaults in method.on.items():
        assert world in WORLDS
        for name in defaults:
            assert name in names(method.name, world), (world, name)


@every_world
def test_every_default_of_a_world_is_an_option_there(world: str) -> None:
    plain = {f.name: f.default for f in dataclasses.fields(Options)}
    for name, x in table.WORLDS[world].items():
        assert any(name in names(method, world) for method in METHODS), name
        assert x != plain[name], name


@every_world
@every_method
def test_the_defaults_are_possible(method: str, world: str) -> None:
    options = options_of(method, world)()
    validate(options, options)
    given = defaults_of(METHODS[method], world)
    assert {name: getattr(options, name) for name in given} == given


@pytest.mark.parametrize("world", ["control", "language"])
def test_the_defaults_of_cloning_are_possible(world: str) -> None:
    options = options_of("clone", world)()
    validate(options, options)


def test_every_option_applies_somewhere_and_is_explained() -> None:
    for f in dataclasses.fields(Options):
        assert any(f.name in names(method, world) for method in KNOWN for world in WORLDS), f.name
        assert len(f.metadata["help"]) > 10
        assert f.metadata["help"].endswith((".", "None: all")) or ":" in f.metadata["help"], f.name
        assert f.metadata["bound"] is None or f.default is None or f.metadata["bound"].holds(f.default), f.name


def test_every_condition_can_be_met() -> None:
    """A condition names the world, a field of the methods or another option, and values that these can have."""
    known = {f.name: f for f in dataclasses.fields(Options)}
    hints = inspect.get_annotations(Options, eval_str=True)
    objectives = {m.objective for m in KNOWN.values()}
    possible = {"world": set(WORLDS), "objective": objectives, "update": {m.update for m in TABLE}}
    possible["credit"] = {*hints["credit"].__args__, DEMONSTRATED}
    for f in known.values():
        for other, values in f.metadata["when"].items():
            choices = possible.get(other) or set(getattr(hints[other], "__args__", (True, False)))
            assert set(values) <= choices, (f.name, other)


# Each changes something

# option -> another value; or (another value, what else must be set for it to have a say); or {its default: ...}.
VALUES: dict[str, Any] = {
    "steps": (1, {"steps": 90, "iterations": None}),
    "iterations": 1,
    "seed": 1,
    "stop_at_return": (-1e9, {"steps": 1000, "iterations": None, "num_envs": 16}),
    "evaluate_every": {0: 1, 1: 0},
    "evaluation_episodes": (3, {"evaluate_every": 1}),
    "num_envs": 6,
    "num_steps": 7,
    "episode_steps": 3,
    "group_size": 2,
    "env_options": '{"max_episode_steps": 3}',
    "normalize_observations": True,
    "scale_rewards": True,
    "encoder": ("flat", {"task": "policygrad/Catch-v0"}),
    "autocast": ("bfloat16", {"task": "policygrad/Catch-v0", "seed": 2}),  # one with a ball caught
    "channels": ("last", {"task": "policygrad/Catch-v0", "encoder": "impala"}),
    "memory": "gru",
    "memory_size": 5,
    "memory_window": 3,
    "critic_encoder": ("shared", {"task": "policygrad/Catch-v0"}),
    "critic_memory": "none",
    "sequence_length": (4, {"memory": "gru"}),
    "hidden": (8, 8),
    "activation": "relu",
    "orthogonal": False,
    "distribution": {"normal": "beta"},
    "state_dependent_std": True,
    "initial_log_std": -0.5,
    "sampling_rounds": {1: 3, 4: 1},
    "credit": {
        "gae": "group",
        "vtrace": "group",
        "reward_to_go": "group",
        "group": "reward_to_go",
        "trajectory_return": "group",
    },
    "gamma": 0.5,
    "lam": 0.3,
    "length_adaptive_lam": 0.3,
    "critic_lam": 0.3,
    "critic_warmup": 1,
    "n": 2,
    "rho_bar": 0.5,
    "c_bar": 0.5,
    "baseline": {
        "value": "time_mean",
        "none": "time_mean",
        "length_weighted": "time_mean",
        "token": "time_mean",
        "greedy": "time_mean",
        "start_value": "time_mean",
    },
    "discounted": True,
    "group_baseline": {"mean": "leave_one_out", "leave_one_out": "mean", "other_best": "mean"},
    "group_scale": {"std": "none", "none": "std", "mean": "std", "batch": ("std", {"group_size": 2})},
    "learn_from": {"all": "high_entropy", "high_entropy": "all", "low_covariance": "high_entropy"},
    "learn_from_share": 0.5,
    "covariance_share": (0.5, {"covariance_low": 0.1}),
    "covariance_low": 0.1,
    "covariance_high": (1.1, {"covariance_low": 0.1}),
    "normalize_advantages": {"none": "batch", "batch": "none", "minibatch": "none"},
    "weights": {"token": "row", "row": "token", "episode": "row", "budget": "row"},
    "entropy_coefficient": 0.5,
    "value_coefficient": 5.0,
    "value_clip": 1e-3,
    "ratio": {"token": "sequence", "sequence": "token", "sequence_token": "token", "product": "token"},
    "gain": {
        "surrogate": "weight",
        "weight": "surrogate",
        "sigmoid": "surrogate",
        "gamma": "surrogate",
        "score": "surrogate",
    },
    "clip_low": 0.01,
    "clip_high": 0.01,
    "sigmoid_positive": 5.0,
    "sigmoid_negative": 5.0,
    "gamma_power_positive": 0.5,
    "gamma_power_negative": 0.5,
    "gamma_rate_positive": 0.5,
    "gamma_rate_negative": 0.5,
    "token_clip": {math.inf: 0.01, 0.4: 0.01},
    "dual_clip": 1.01,
    "divergence_mask": {"none": "binary_tv", "binary_tv": "none"},
    "divergence_bound": 1e-3,
    "drift_bound": (1e-3, {"ratio": "sequence"}),
    "kl_old_estimate": {"k3": ("squared_row", {"kl_old_coefficient": 1.0}), "squared_row": "k3", "absolute": "k3"},
    "kl_old_share": {1.0: (0.3, {"kl_old_coefficient": 1.0}), 2e-4: 1.0},
    "entropy_target": {None: 10.0, 0.2: None},
    "entropy_step": (0.5, {"entropy_target": 10.0}),
    "kl_old_coefficient": {0.0: 1.0, 0.1: 1.0, 1.0: 0.3},
    "kl_old_target": (1e-6, {"kl_old_coefficient": 1.0}),
    "target_kl": 1e-6,
    "kl_ref": {"none": "reward", "reward": "none", "loss": "none"},
    "kl_ref_coefficient": 3.0,
    "kl_ref_target": 1e-9,
    "kl_ref_estimate": "k3",
    "reference_every": (1, {"kl_ref_coefficient": 3.0}),
    "reference_decay": (0.5, {"kl_ref_coefficient": 3.0}),
    "learning_rate": 0.003,
    "learning_rate_schedule": "linear",
    "warmup": 0.5,
    "optimizer": "muon",
    "weight_decay": 0.5,
    "momentum": (0.5, {"optimizer": "muon"}),
    "adam_epsilon": 0.1,
    "epochs": 2,
    "minibatch_size": 5,
    "max_grad_norm": 1e-3,
    "delta": 1e-4,
    "damping": 1.0,
    "cg_iters": 1,
    "backtracks": (1, {"delta": 2.0}),
    "shrink": (0.3, {"delta": 2.0}),
    "step_rule": "learning_rate",
    "natural_learning_rate": 0.01,
    "critic_learning_rate": 0.03,
    "critic_epochs": 2,
    "critic_minibatch_size": 3,
    "symmetry": "probes:mirror",
    "demonstrations": [{"observation": [0.0, 1.0, 2.0], "action": [0.5, -0.5]}] * 20,
    "validation": 0.5,
}
# They may not change the numbers: tests of their own, below and in the tests of the worlds.
# On an exact world the others are the same pieces as in control.
OF_EXACT = {"steps", "iterations", "seed", "evaluate_every", "num_envs", "episode_steps", "gamma", "credit", "weights"}
ELSEWHERE = {"compile", "profile", "overlap", "device", "threads", "vectorization", "step_time_limit", "micro_batch"}
ELSEWHERE |= {"checkpoint_every", "checkpoints", "keep_best", "log", "start", "evaluation_patience", "wrap"}
ELSEWHERE |= {"shard", "gradient_sync", "gradient_noise", "on_nonfinite", "restart_envs", "action_mask"}
ELSEWHERE |= {"policy_keys", "critic_keys", "opponent", "freeze_every", "rank_time_limit", "agents"}
ELSEWHERE |= {"samplers", "ray", "lag"}
# No step on a table oversteps its radius, so that none is shortened.
# On the way to a policy; the spaces of this environment are the same with all of its options.
UNREAD = {("clone", "env_options"), ("clone", "weights")}
UNREACHED: dict[str, set[str]] = {"control": set(), "exact": {"backtracks", "shrink"}}
TASKS = {"control": "probes:Known-v0", "exact": "exact:chain"}
# They are, or these methods, for actions with probabilities, or for rewards that are not negative.
OF_PROBABILITIES = {"divergence_mask", "divergence_bound", "learn_from", "learn_from_share"}
OF_CARTPOLE = {"dppo", "otb", "maxrl"}
# Where groups are sometimes flat.
FLAT: dict[str, Any] = {"control": limited(ConstantReward, 8), "exact": "exact:tokens"}
OF_CLONE = np.random.default_rng(0).uniform(-1, 1, (20, 5))  # transitions: three numbers seen, and two done
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 1, 10, 10), dtype=np.uint8)  # and images of Catch
# So large that ratios leave every clip, and so small that a run takes a few hundredths of a second.
SMALL: dict[str, dict[str, Any]] = {
    "control": {"hidden": (8,), "num_envs": 4, "num_steps": 8, "iterations": 2, "minibatch_size": 8},
    "exact": {"num_envs": 8, "episode_steps": 6, "iterations": 2, "minibatch_size": 16},
}
LARGE = {"learning_rate": 0.05, "epochs": 3, "critic_epochs": 1}


def small(method: str, world: str) -> dict[str, Any]:
    return {name: x for name, x in (SMALL[world] | LARGE).items() if name in names(method, world)}


def another(method: str, world: str, option: str) -> tuple[Any, dict[str, Any]]:
    """Another value of an option, and what must be set for it to be read, by its own conditions."""
    defaults = options_of(method, world)(**small(method, world))
    value, context = VALUES[option], {}
    if isinstance(value, dict):
        value = value[getattr(defaults, option)]
    if isinstance(value, tuple) and isinstance(value[-1], dict):
        value, context = value
    field = next(f for f in dataclasses.fields(Options) if f.name == option)
    for other, values in field.metadata["when"].items():
        if hasattr(defaults, other) and other not in ("world", "method") and getattr(defaults, other) not in values:
            context = {other: values[0]} | context
    credit = context.get("credit", getattr(defaults, "credit", None))
    if (option.startswith("critic") and credit == "group") or (
        option == "value_coefficient" and credit not in BOOTSTRAPPED
    ):
        context |= {"credit": "gae"}
    elif option.startswith("critic") and credit in ("reward_to_go",) and defaults.baseline != "value":
        context |= {"baseline": "value"}
    if option == "episode_steps" and world == "control" and credit not in EPISODIC:
        context |= {"credit": "group"}
    if option == "group_size" and not compares_groups(defaults):
        context |= {"credit": "group"}
    if option == "gamma" and credit == "group":
        context |= {"discounted": True}
    if option == "weights" and world == "exact":
        context |= {"task": "exact:tokens"}  # rows of several lengths
    if option in OF_PROBABILITIES:
        context |= {"task": "CartPole-v1"}
    if option == "sampling_rounds":
        context |= {"task": FLAT[world]}
    return value, context


def outcome(method: str, world: str, task: Any = None, **options: Any) -> Any:
    """The parameters after a short training, and what was reported on the way."""
    values = small(method, world) | options
    chosen = options_of(method, world)(**values)
    unread = set() if has_critic(chosen) else {"critic_epochs"}
    unread |= {"num_steps"} if getattr(chosen, "credit", None) in EPISODIC else set()
    unread |= {"episode_steps"} if task == "exact:tokens" else set()
    values = {name: x for name, x in values.items() if name not in unread - set(options)}
    if method == "clone":
        images = {"observation": PIXELS, "action": np.arange(20) % 3}
        numbers = {"observation": OF_CLONE[:, :3], "action": OF_CLONE[:, 3:], "episode": np.arange(20) // 5}
        values = {"demonstrations": numbers if task is None else images} | values
    usual = "CartPole-v1" if world == "control" and method in OF_CARTPOLE else TASKS[world]
    run = pg.train(method, task or usual, progress=False, **values)
    return parameters(run).tolist(), untimed(run.metrics)


remembered = cache(lambda method, world, options: outcome(method, world, **dict(options)))


def of_its_own(method: str, world: str) -> set[str]:
    """A line made of the same pieces as one above it has only its own defaults to try."""
    pieces = (KNOWN[method].objective, KNOWN[method].update)
    above = next(x.name for x in KNOWN.values() if (x.objective, x.update) == pieces)
    if above == method:
        return names(method, world)
    mine, theirs = (dataclasses.asdict(options_of(name, world)()) for name in (method, above))
    return {name for name, x in mine.items() if x != theirs[name]}


CASES = [
    pytest.param(method, world, option, id=f"{method} {world} {option}")
    for world in TASKS
    for method in (KNOWN if world == "control" else METHODS)
    for option in sorted(of_its_own(method, world) - ELSEWHERE - UNREACHED[world])
    if (world == "control" or option in OF_EXACT) and (method, option) not in UNREAD
]


@pytest.mark.parametrize(("method", "world", "option"), CASES)
def test_it_changes_something(method: str, world: str, option: str) -> None:
    value, context = another(method, world, option)
    before = remembered(method, world, tuple(context.items()))
    after = outcome(method, world, **(context | {option: value}))
    assert before != after


@pytest.mark.parametrize("world", TASKS)
def test_every_option_has_another_value_here(world: str) -> None:
    assert {name for method in KNOWN for name in names(method, world)} - ELSEWHERE <= set(VALUES)


def test_threads_are_torchs_while_it_trains() -> None:
    seen, before = [], torch.get_num_threads()

    def policy(*spaces: Any) -> torch.nn.Module:
        seen.append(torch.get_num_threads())
        return pg.Policy(*spaces)

    for threads in (2, 1):
        pg.train("actor_critic", TASKS["control"], progress=False, iterations=1, threads=threads, policy=policy)
    assert seen == [2, 1]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("method", "world", "values"),
    [
        ("trpo", "control", {"adam_epsilon": 0.1, "credit": "group"}),
        ("npg", "control", {"learning_rate_schedule": "linear", "credit": "group"}),
        ("npg", "control", {"warmup": 0.1, "credit": "group"}),
        ("trpo", "control", {"optimizer": "muon", "credit": "group"}),
        ("trpo", "control", {"weight_decay": 0.1, "credit": "group"}),
        ("ppo", "control", {"critic_learning_rate": 0.1, "credit": "group"}),
    ],
)
def test_what_only_a_critic_reads_is_refused_without_one(method: str, world: str, values: dict[str, Any]) -> None:
    defaults = options_of(method, world)()
    with pytest.raises(OptionError, match="is a critic's") as raised:
        validate(with_values(defaults, values), defaults)
    assert raised.value.option == next(iter(values))


def test_the_length_of_completions_is_their_worlds() -> None:
    with pytest.raises(OptionError, match="episode_steps"):
        pg.train("grpo", "exact:tokens", episode_steps=2, progress=False)


def test_micro_batches_change_nothing_but_rounding() -> None:
    for method, options in (("ppo", {}), ("grpo", {}), ("reinforce", {"baseline": "none"}), ("trpo", {})):
        if "micro_batch" not in names(method, "exact"):
            continue
        values = {n: x for n, x in small(method, "exact").items() if n not in ("critic_epochs", "episode_steps")}
        values |= options
        whole, parts = (
            pg.train(method, "exact:tokens", progress=False, **values, micro_batch=size) for size in (None, 3)
        )
        torch.testing.assert_close(parameters(whole), parameters(parts), rtol=1e-4, atol=1e-5)


def test_the_device_is_where_the_modules_are() -> None:
    run = pg.train("ppo", TASKS["control"], progress=False, **small("ppo", "control"), device="cpu:0")
    assert {p.device.type for p in run.policy.parameters()} == {"cpu"}
    with pytest.raises(UserError, match="device 'nowhere' cannot be used") as raised:
        pg.train("ppo", TASKS["control"], progress=False, device="nowhere")
    assert raised.value.option == "device"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="cuda"):
        pg.train("ppo", TASKS["control"], progress=False, device="cuda")


# What cannot be meant

IMPOSSIBLE: list[tuple[str, str, Any]] = [
    ("ppo", "gamma", 1.2),
    ("ppo", "gamma", -0.1),
    ("ppo", "gamma", math.nan),
    ("ppo", "lam", 1.01),
    ("ppo", "steps", 0),
    ("ppo", "steps", 1e6),
    ("ppo", "steps", None),  # and no iterations
    ("ppo", "iterations", 0),
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
    ("ppo", "minibatch_size", 1),  # standardized
    ("ppo", "learning_rate", 0.0),
    ("ppo", "learning_rate", -1e-3),
    ("ppo", "learning_rate", "fast"),
    ("ppo", "learning_rate_schedule", "exponential"),
    ("ppo", "optimizer", "rmsprop"),
    ("ppo", "weight_decay", -0.1),
    ("ppo", "warmup", 1.0),
    ("ppo", "momentum", 1.0),
    ("ppo", "normalize_advantages", "rows"),
    ("ppo", "normalize_advantages", True),
    ("ppo", "activation", "sine"),
    ("ppo", "iterations", 10**400),
    ("ppo", "steps", 2**63),
    ("ppo", "learning_rate", 10**400),
    ("ppo", "hidden", (64, 2**63)),
    ("ppo", "hidden", (64, 0)),
    ("ppo", "hidden", (64, 1.5)),
    ("ppo", "hidden", "64"),
    ("ppo", "orthogonal", 1),
    ("ppo", "clip_low", 0.0),
    ("ppo", "dual_clip", 1.0),
    ("ppo", "kl_old_coefficient", -1.0),
    ("ppo", "kl_old_target", 0.0),
    ("ppo", "kl_old_target", 0.01),  # of no coefficient
    ("ppo", "kl_ref", "loss"),
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
    ("trpo", "normalize_advantages", "minibatch"),
    ("trpo", "delta", math.inf),
    ("trpo", "delta", 0.0),
    ("trpo", "damping", -1.0),
    ("trpo", "cg_iters", 0),
    ("trpo", "backtracks", 0),
    ("trpo", "shrink", 1.0),
    ("npg", "step_rule", "newton"),
    ("npg", "natural_learning_rate", 0.0),
    ("reinforce", "baseline", "median"),
    ("reinforce", "credit", "none"),
    ("actor_critic", "n", 0),
    ("actor_critic", "credit", "td"),
    ("off_policy_actor_critic", "rho_bar", 0.0),
    ("grpo", "num_envs", 1),
    ("grpo", "group_size", 1),
    ("grpo", "group_size", 3),  # does not divide 8
]


def quick(option: str) -> dict[str, Any]:
    """A run that ends at once, should it begin."""
    return {} if option in ("steps", "iterations") else {"iterations": 1}


@pytest.mark.parametrize(("method", "option", "value"), IMPOSSIBLE, ids=lambda x: str(x))
def test_an_impossible_value_is_refused_by_name(method: str, option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=option) as raised:
        pg.train(method, "CartPole-v1", preset="none", **(quick(option) | {option: value}))
    assert raised.value.option == option
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


UNREAD: list[tuple[str, dict[str, Any], str]] = [
    ("actor_critic", {"n": 3}, "n is read only where credit is n_step, and credit is gae"),
    ("actor_critic", {"credit": "monte_carlo", "lam": 0.9}, "lam is read only where credit is gae or vtrace"),
    ("npg", {"natural_learning_rate": 0.2}, "natural_learning_rate is read only where step_rule is learning_rate"),
    ("npg", {"step_rule": "learning_rate", "delta": 0.02}, "delta is read only where step_rule is kl_radius"),
    ("reinforce", {"baseline": "mean", "critic_learning_rate": 0.1}, "critic_learning_rate is a critic's"),
    ("reinforce", {"baseline": "none", "critic_epochs": 2}, "critic_epochs is a critic's"),
    ("reinforce", {"baseline": "optimal", "critic_minibatch_size": 9}, "critic_minibatch_size is a critic's"),
    ("ppo", {"policy": torch.nn.Identity(), "distribution": "squashed"}, "distribution shapes the networks made here"),
    ("ppo", {"policy": torch.nn.Identity(), "initial_log_std": -1.0}, "initial_log_std shapes"),
    ("ppo", {"policy": torch.nn.Identity(), "state_dependent_std": True}, "state_dependent_std shapes"),
    ("ppo", {"policy": torch.nn.Identity(), "critic": torch.nn.Identity(), "hidden": (8,)}, "hidden shapes"),
    ("grpo", {"policy": torch.nn.Identity(), "hidden": (8,)}, "hidden shapes"),
    ("grpo", {"policy": torch.nn.Identity(), "encoder": "flat"}, "encoder shapes"),
    ("ppo", {"encoder": "flat", "channels": "last"}, "channels is read only where encoder is auto or nature"),
    ("ppo", {"encoder": "nature"}, "encoder nature is for images"),
    ("ppo", {"channels": "last"}, "channels last is for images"),
    ("grpo", {"gamma": 0.5}, "gamma is read only"),
    ("grpo", {"num_steps": 64}, "num_steps is read only where credit is"),
    ("grpo", {"lam": 0.5}, "lam is read only where credit is gae or vtrace, and credit is group"),
    ("grpo", {"critic_epochs": 2}, "critic_epochs is a critic's, and credit group has none"),
    ("grpo", {"kl_ref_coefficient": 0.1}, "kl_ref_coefficient is read only where kl_ref is reward or loss"),
    ("ppo", {"episode_steps": 9}, "episode_steps is for whole episodes, and credit gae takes segments"),
    ("ppo", {"group_size": 2}, "group_size is read only where credit is group"),
    ("ppo", {"sampling_rounds": 2}, "sampling_rounds is read only where credit is group"),
]


@pytest.mark.parametrize(("method", "options", "said"), UNREAD, ids=lambda x: str(x))
def test_an_option_that_nothing_would_read_is_refused(method: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said) as raised:
        pg.train(method, "CartPole-v1", preset="none", iterations=1, **options)
    assert raised.value.option in options
    assert len(str(raised.value)) <= 200


@every_world
@every_method
def test_no_message_about_a_default_that_is_changed_is_longer_than_a_line(method: str, world: str) -> None:
    """Whatever single option is set to whatever: what is said of it names it, in at most 200 characters."""
    defaults = options_of(method, world)()
    for f in dataclasses.fields(defaults):
        for value in (-1, 0, 1, 2, 0.5, 10**9, math.nan, math.inf, "?", "x" * 500, None, True, (), ("a",), (0,)):
            said = complaint(defaults, {f.name: value})
            assert len(said) <= 200, said
            assert "\n" not in said


def complaint(defaults: Any, values: dict[str, Any]) -> str:
    """What is said of options that are set; nothing if they can be meant."""
    try:
        validate(with_values(defaults, values), defaults)
    except OptionError as error:
        return str(error)
    return ""


def test_what_a_preset_sets_may_go_unread() -> None:
    """The preset is for the choices it makes; one other choice, and some of it is not needed."""
    tuned = with_values(options_of("actor_critic", "control")(), {"lam": 0.9})
    validate(with_values(tuned, {"credit": "n_step", "n": 3}), tuned)
    with pytest.raises(UserError, match="lam is read only"):
        validate(with_values(tuned, {"credit": "n_step", "lam": 0.8}), tuned)


OTHER = [
    ("ppo", "control", "learning_rat", r"ppo has no option 'learning_rat': did you mean learning_rate"),
    ("trpo", "control", "clip_low", r"trpo has no option 'clip_low': it is for ppo, grpo, "),
    ("trpo", "control", "learning_rate", r"trpo has no option 'learning_rate': it is for reinforce, "),
    ("ppo", "control", "temperature", r"ppo has no option 'temperature' on control: it is for language"),
    ("grpo", "language", "num_envs", r"grpo has no option 'num_envs' on language: it is for control and exact"),
    ("grpo", "exact", "hidden", r"grpo has no option 'hidden' on exact: it is for control"),
]


@pytest.mark.parametrize(("method", "world", "name", "said"), OTHER)
def test_an_option_of_another_method_or_world_is_met_with_whose_it_is(
    method: str, world: str, name: str, said: str
) -> None:
    with pytest.raises(OptionError, match=said) as raised:
        with_values(options_of(method, world)(), {name: 1})
    assert raised.value.option == name
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("grpo", {"reward": 3}, "reward is 3: it must be a list, each entry text"),
        ("grpo", {"reward_weight": ("much",)}, "it must be a list, each entry a number"),
        ("grpo", {"kl_ref": "both"}, "kl_ref is 'both': it must be one of none, reward, loss"),
        ("grpo", {"minibatch_size": "all"}, "minibatch_size is 'all': it must be a whole number"),
        ("ppo", {"lora_rank": True}, "lora_rank is True: it must be a whole number"),
    ],
    ids=str,
)
def test_another_type_is_said_in_words(method: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        with_values(options_of(method, "language")(), values)


def test_a_reward_models_options_are_of_their_own_types() -> None:
    with pytest.raises(OptionError, match="learning_rate is 'fast': it must be a number"):
        with_values(RewardModelOptions(), {"learning_rate": "fast"})
    with pytest.raises(OptionError, match="trust_remote_code is 'yes': it must be True or False"):
        with_values(RewardModelOptions(), {"trust_remote_code": "yes"})


def test_lists_become_tuples_as_they_come_from_a_file() -> None:
    assert with_values(options_of("ppo", "control")(), {"hidden": [3, 4]}).hidden == (3, 4)


def test_a_single_value_is_a_list_of_one() -> None:
    options = options_of("grpo", "language")()
    found = with_values(options, {"reward": "math_equal", "reward_weight": 2, "lora_targets": "q_proj"})
    assert (found.reward, found.reward_weight, found.lora_targets) == (("math_equal",), (2.0,), ("q_proj",))
    assert with_values(options_of("ppo", "control")(), {"hidden": 32}).hidden == (32,)


def test_a_reward_may_be_a_function() -> None:
    options = options_of("grpo", "language")()
    assert with_values(options, {"reward": len}).reward == (len,)
    assert with_values(options, {"reward": [len, "math_equal"]}).reward == (len, "math_equal")
    with pytest.raises(OptionError, match=r"^lora_targets is "):
        with_values(options, {"lora_targets": [len]})


def test_numpys_numbers_become_pythons() -> None:
    given = {"seed": np.int64(8), "hidden": (np.int64(8),), "gamma": np.float32(0.5), "clip_low": np.float64(0.1)}
    options = with_values(options_of("ppo", "control")(), given)
    kinds = [type(x) for x in (options.seed, options.hidden[0], options.gamma, options.clip_low)]
    assert kinds == [int, int, float, float]


def test_a_critics_default_minibatch_is_not_too_large_for_a_small_rollout() -> None:
    defaults = options_of("trpo", "control")()
    validate(with_values(defaults, {"num_envs": 1, "num_steps": 16}), defaults)


def test_an_updates_defaults_are_those_of_its_function() -> None:
    compared = 0
    for method, function in (("trpo", trust_region_step), ("npg", natural_step)):
        parameter = inspect.signature(function).parameters
        for f in dataclasses.fields(options_of(method, "control")):
            if f.name in parameter and parameter[f.name].default is not inspect.Parameter.empty:
                assert parameter[f.name].default == f.default, f.name
                compared += 1
    assert compared >= 6
    assert options_of("trpo", "control")().critic_epochs == inspect.signature(fit_critic).parameters["epochs"].default


def test_the_command_line_has_the_same_options_with_their_help() -> None:
    kind = options_of("ppo", "control")
    shown = for_command_line(kind)
    assert [f.name for f in dataclasses.fields(shown)] == [f.name for f in dataclasses.fields(kind)]
    assert dataclasses.asdict(shown()) == dataclasses.asdict(kind())


@pytest.mark.parametrize("values", [{"model": "a\0b"}, {"reward": ("exact_match", "a\0b")}, {"device": "\0"}], ids=str)
def test_a_null_byte_is_in_no_name(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="no name holds a null byte") as raised:
        with_values(options_of("ppo", "language")(), values)
    assert "\0" not in str(raised.value)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', '[{"a": 1}]', "{"])
def test_an_object_has_each_name_once(text: str) -> None:
    for method, world, name in (("ppo", "control", "env_options"), ("grpo", "language", "template_variables")):
        options = options_of(method, world)()
        with pytest.raises(OptionError, match=f"{name} is .*: it must be a JSON object that has each name once"):
            validate(with_values(options, {name: text}), options)
        validate(with_values(options, {name: '{"a": {"b": 1}, "b": 1}'}), options)
