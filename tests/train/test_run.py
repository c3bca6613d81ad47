"""A run is found again as it was, and judged on its own task or refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from outcomes import parameters, strict
from probes import Known, limited

import policygrad as pg
from policygrad.errors import UserError

SMALL: dict[str, Any] = {
    "hidden": (8,),
    "num_envs": 4,
    "num_steps": 16,
    "steps": 64,
    "minibatch_size": 16,
    "progress": False,
}


class Variant(Known):
    """Known with other spaces."""

    def __init__(self, what: str) -> None:
        super().__init__()
        match what:
            case "observations":
                self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float32)
            case "observations of another kind":
                self.observation_space = spaces.Discrete(3)
            case "actions":
                self.action_space = spaces.Discrete(2)
            case "bounds of actions":
                self.action_space = spaces.Box(-2.0, 1.0, (2,), np.float32)
            case "bounds of observations":
                self.observation_space = spaces.Box(-100.0, 100.0, (3,), np.float32)


def variant(what: str) -> str:
    name = f"Variant-{what.replace(' ', '-')}-v0"
    if name not in gymnasium.registry:
        gymnasium.register(name, lambda: Variant(what), max_episode_steps=8)
    return name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "it"
    pg.train("ppo", "probes:Known-v0", out=directory, **SMALL)
    return directory


def on(environment: str, directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"task": environment}))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("observations", r"the observation space of \S+ is Box\(-inf, inf, \(4,\), float32\), and the policy's is "),
        ("observations of another kind", r"is Discrete\(3\), and the policy's is Box\(-inf, inf, \(3,\), float32\)"),
        ("actions", r"the action space of \S+ is Discrete\(2\), and the policy's is Box\(-1.0, 1.0, \(2,\), float32\)"),
        ("bounds of actions", r"is Box\(-2.0, 1.0, \(2,\), float32\), and the policy's is Box\(-1.0, 1.0, "),
    ],
)
def test_an_environment_of_other_spaces_is_refused_by_name(saved: Path, what: str, said: str) -> None:
    on(variant(what), saved)
    with pytest.raises(UserError, match=said) as raised:
        pg.Run.load(saved).evaluate(2)
    assert variant(what) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bounds_of_observations_that_no_policy_looks_at_are_no_matter(saved: Path) -> None:
    on("probes:Known-v0", saved)
    before = pg.Run.load(saved).evaluate(2)
    on(variant("bounds of observations"), saved)
    assert pg.Run.load(saved).evaluate(2) == before


# Runs of every world


@pytest.mark.parametrize(
    ("method", "task"), [("ppo", "exact:chain"), ("dapo", "exact:tokens"), ("trpo", "exact:bandit")]
)
def test_an_exact_run_is_found_again_as_it_was(method: str, task: str, tmp_path: Path) -> None:
    run = pg.train(method, task, out=tmp_path / "run", iterations=2, progress=False)
    again = pg.Run.load(tmp_path / "run")
    assert (again.method, again.options, again.world.name) == (run.method, run.options, task)
    assert again.evaluate() == run.evaluate() == run.after != run.before
    assert torch.equal(parameters(again), parameters(run))


def test_a_control_run_is_found_again_with_its_critic_and_saved_again(tmp_path: Path) -> None:
    run = pg.train("ppo", "probes:Known-v0", out=tmp_path / "run", **SMALL)
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    again = pg.Run.load(tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(parameters(again), parameters(run))
    again.save(tmp_path / "copy")
    assert torch.equal(parameters(pg.Run.load(tmp_path / "copy")), parameters(run))


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_run_without_a_critic_or_with_one_of_ones_own_is_found_without(method: str, tmp_path: Path) -> None:
    class Own(torch.nn.Module):
        def __init__(self, space: spaces.Space) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, obs: torch.Tensor) -> torch.Tensor:
            return self.layer(obs).squeeze(-1)

    small = {"hidden": (8,), "num_envs": 4, "iterations": 1, "progress": False}
    critic = {} if method == "grpo" else {"critic": Own, "num_steps": 16}
    pg.train(method, "probes:Known-v0", out=tmp_path / "run", **small, **critic)
    again = pg.Run.load(tmp_path / "run")
    assert again.critic is None
    assert again.evaluate(1).episodes == 1


@pytest.mark.parametrize(("option", "value"), [("threads", -5), ("gamma", 2.0), ("hidden", [0])])
def test_a_number_out_of_bounds_in_a_run_is_one_line(option: str, value: Any, saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["options"][option] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json is damaged: {option} is") as raised:
        pg.Run.load(copy)
    assert len(str(raised.value)) <= 200


def test_a_language_run_is_found_again_as_it_was(language: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("grpo", out=tmp_path / "run", **language, learning_rate=1e-2)
    again = pg.Run.load(str(tmp_path / "run"))
    assert run.before is not None
    assert run.after is not None
    assert again.evaluate().rows == run.after.rows != run.before.rows
    assert again.evaluate(seed=5).rows != run.after.rows
    assert again.evaluate(2).completions == 2


def test_infinite_options_come_back(tmp_path: Path) -> None:
    run = pg.train("cispo", "exact:tokens", out=tmp_path / "run", iterations=1, progress=False)
    stored = strict((tmp_path / "run" / "config.json").read_text())
    assert stored["options"]["clip_low"] == "inf"
    assert pg.Run.load(tmp_path / "run").options == run.options


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "dqn"}, "there is no dqn on control"),
        ({"world": "mars"}, "there is no ppo on mars"),
        ({"options": {"num_envs": "many"}}, "num_envs is 'many'"),
        ({"options": {"nonsense": 1}}, "no option 'nonsense'"),
        ({"options": 3}, "damaged"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_one_line(
    change: dict[str, Any], said: str, saved: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=said) as raised:
        pg.Run.load(copy)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_cannot_be_meant_is_refused(seed: int, saved: Path) -> None:
    on("probes:Known-v0", saved)
    with pytest.raises(UserError, match=f"seed is {seed}"):
        pg.Run.load(saved).evaluate(2, seed=seed)


def test_a_run_on_an_environment_without_an_id_says_so(tmp_path: Path) -> None:
    run = pg.train("ppo", limited(Known, 8), out=tmp_path / "run", **SMALL)
    assert run.configuration()["task"] is None
    with pytest.raises(UserError, match=r"environment of this run, .*, has no name .*evaluate\(environment=\.\.\.\)"):
        pg.Run.load(tmp_path / "run").evaluate(2)


def test_the_summary_is_the_worlds_after_what_all_have(tmp_path: Path) -> None:
    common = ["run", "method", "world", "task", "preset", "steps", "seconds", "steps_per_second"]
    control = pg.train("ppo", "probes:Known-v0", **SMALL).summary()
    exact = pg.train("ppo", "exact:bandit", iterations=1, progress=False).summary()
    assert list(control) == [*common, "episodes", "return_mean", "return_std", "reward_per_step", "success"]
    assert list(exact) == [*common, "return_mean", "before", "after"]
    for summary in (control, exact):
        strict(json.dumps(summary))


# Damaged directories of every world


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exact") / "it"
    pg.train("ppo", "exact:chain", out=directory, iterations=1, num_envs=4, progress=False)
    return directory


@pytest.fixture(scope="module")
def completions(
    tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path, rewards: Path
) -> tuple[Path, Path]:
    """Two directories: of PPO, with a critic, and of an adapter."""
    made = []
    for name, more in {"ppo": {"minibatch_size": None}, "grpo": {"lora_rank": 2}}.items():
        made.append(tmp_path_factory.mktemp("language") / name)
        size = {"iterations": 1, "prompts_per_rollout": 2, "completions": 2, "max_tokens": 4, "held_out": 2}
        judged = {"model": str(model), "reward": (f"{rewards}:sevens",)}
        pg.train(name, str(prompts), out=made[-1], progress=False, threads=1, **size, **judged, **more)
    return made[0], made[1]


def spoil(path: Path, how: str) -> None:
    match how:
        case "missing":
            path.unlink()
        case "cut short":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "empty":
            path.write_bytes(b"")
        case "garbage":
            path.write_bytes(b"\x00\xff no such thing")


@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "garbage"])
@pytest.mark.parametrize("name", ["config.json", "policy.safetensors"])
def test_a_damaged_exact_run_is_one_line(name: str, how: str, exact: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exact, tmp_path / "copy"))
    spoil(copy / name, how)
    refused(copy)


@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "garbage"])
@pytest.mark.parametrize(
    "name",
    ["config.json", "model/config.json", "model/model.safetensors", "model/tokenizer.json", "critic.safetensors"],
)
def test_a_damaged_language_run_is_one_line(
    name: str, how: str, completions: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(completions[0], tmp_path / "copy"))
    spoil(copy / name, how)
    if (name, how) == ("critic.safetensors", "missing"):
        pg.Run.load(copy)  # it is judged without
        return
    refused(copy)


@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "garbage"])
def test_a_damaged_adapter_is_one_line(how: str, completions: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(completions[1], tmp_path / "copy"))
    spoil(copy / "model" / "adapter_model.safetensors", how)
    refused(copy)


def refused(directory: Path) -> None:
    with pytest.raises(UserError) as raised:
        pg.Run.load(directory).evaluate()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200, str(raised.value)
