"""A run is found again as it was, and judged on its own task or refused by name."""

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from outcomes import parameters, strict
from probes import Known, limited
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

import policygrad as pg
from policygrad.errors import UserError
from policygrad.files import add_metadata

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
        pg.Run.load(saved, trust=True).evaluate(2)
    assert variant(what) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bounds_of_observations_that_no_policy_looks_at_are_no_matter(saved: Path) -> None:
    on("probes:Known-v0", saved)
    before = pg.Run.load(saved, trust=True).evaluate(2)
    on(variant("bounds of observations"), saved)
    assert pg.Run.load(saved, trust=True).evaluate(2) == before


# Runs of every world


@pytest.mark.parametrize(
    ("method", "task"), [("ppo", "exact:chain"), ("dapo", "exact:tokens"), ("trpo", "exact:bandit")]
)
def test_an_exact_run_is_found_again_as_it_was(method: str, task: str, tmp_path: Path) -> None:
    run = pg.train(method, task, out=tmp_path / "run", iterations=2, progress=False)
    again = pg.Run.load(tmp_path / "run", trust=True)
    assert (again.method, again.options, again.world.name) == (run.method, run.options, task)
    assert again.evaluate() == run.evaluate() == run.after != run.before
    assert torch.equal(parameters(again), parameters(run))


def test_a_control_run_is_found_again_with_its_critic_and_saved_again(tmp_path: Path) -> None:
    run = pg.train("ppo", "probes:Known-v0", out=tmp_path / "run", **SMALL)
    torch.manual_seed(3)
    drawn = torch.get_rng_state()
    again = pg.Run.load(tmp_path / "run", trust=True)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(parameters(again), parameters(run))
    again.save(tmp_path / "copy")
    assert torch.equal(parameters(pg.Run.load(tmp_path / "copy", trust=True)), parameters(run))


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
    again = pg.Run.load(tmp_path / "run", trust=True)
    assert again.critic is None
    assert again.evaluate(1).episodes == 1


@pytest.mark.parametrize(("option", "value"), [("threads", -5), ("gamma", 2.0), ("hidden", [0])])
def test_a_number_out_of_bounds_in_a_run_is_one_line(option: str, value: Any, saved: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["options"][option] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json is damaged: {option} is") as raised:
        pg.Run.load(copy, trust=True)
    assert len(str(raised.value)) <= 200


def test_a_language_run_is_found_again_as_it_was(language: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("grpo", out=tmp_path / "run", **language, learning_rate=1e-2)
    again = pg.Run.load(str(tmp_path / "run"), trust=True)
    assert run.before is not None
    assert run.after is not None
    assert again.evaluate().rows == run.after.rows != run.before.rows
    assert again.evaluate(seed=5).rows != run.after.rows
    assert again.evaluate(2).completions == 2


def test_infinite_options_come_back(tmp_path: Path) -> None:
    run = pg.train("cispo", "exact:tokens", out=tmp_path / "run", iterations=1, progress=False)
    stored = strict((tmp_path / "run" / "config.json").read_text())
    assert stored["options"]["clip_low"] == "inf"
    assert pg.Run.load(tmp_path / "run", trust=True).options == run.options


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "dqn"}, "there is no 'dqn' on 'control'"),
        ({"world": "mars"}, "there is no 'ppo' on 'mars'"),
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
        pg.Run.load(copy, trust=True)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_cannot_be_meant_is_refused(seed: int, saved: Path) -> None:
    on("probes:Known-v0", saved)
    with pytest.raises(UserError, match=f"seed is {seed}"):
        pg.Run.load(saved, trust=True).evaluate(2, seed=seed)


def test_a_run_on_an_environment_without_an_id_says_so(tmp_path: Path) -> None:
    run = pg.train("ppo", limited(Known, 8), out=tmp_path / "run", **SMALL)
    assert run.configuration()["task"] is None
    with pytest.raises(UserError, match=r"environment of this run, .*, has no name .*evaluate\(environment=\.\.\.\)"):
        pg.Run.load(tmp_path / "run", trust=True).evaluate(2)


def test_the_summary_is_the_worlds_after_what_all_have(tmp_path: Path) -> None:
    common = ["run", "method", "world", "task", "preset", "ended", "steps", "seconds", "steps_per_second"]
    control = pg.train("ppo", "probes:Known-v0", **SMALL).summary()
    exact = pg.train("ppo", "exact:bandit", iterations=1, progress=False).summary()
    assert list(control) == [*common, "episodes", "return_mean", "return_std", "reward_per_step", "success", "best"]
    assert list(exact) == [*common, "return_mean", "before", "after", "best"]
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
        pg.Run.load(copy, trust=True)  # it is judged without
        return
    refused(copy)


@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "garbage"])
def test_a_damaged_adapter_is_one_line(how: str, completions: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(completions[1], tmp_path / "copy"))
    spoil(copy / "model" / "adapter_model.safetensors", how)
    refused(copy)


# A directory from a stranger


@pytest.fixture(scope="module")
def directories(saved: Path, exact: Path, completions: tuple[Path, Path], tmp_path_factory: Any) -> dict[str, Path]:
    """A run of each kind on tasks of the library's own, so that nothing has to be trusted."""
    place = tmp_path_factory.mktemp("own")
    pg.train("ppo", "CartPole-v1", out=place / "control", **SMALL, preset="none", normalize_observations=True)
    return {"control": place / "control", "exact": exact, "ppo": completions[0], "adapter": completions[1]}


def changed(directory: Path, copy: Path, **change: Any) -> Path:
    """A copy of a run whose config.json says something else."""
    shutil.copytree(directory, copy)
    config = json.loads((copy / "config.json").read_text())
    options = config["options"] | {name: x for name, x in change.items() if name in config["options"]}
    config |= {"options": options} | {name: x for name, x in change.items() if name not in options}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


EVIL = """
import gymnasium, pathlib
pathlib.Path(__file__).with_name("executed").touch()

def f(prompts, completions, **_):
    return [1.0] * len(prompts)

gymnasium.register("Evil-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv", max_episode_steps=5)
"""


@pytest.mark.parametrize(
    ("which", "change", "repeated"),
    [
        ("control", {"task": "evil:Evil-v0"}, {"environment": "evil:Evil-v0"}),
        ("ppo", {"reward": ["evil:f"]}, {"reward": ("evil:f",)}),
        ("ppo", {"reward": ["exact_match", "evil.py:f"]}, {"reward": ("evil.py:f",)}),
    ],
    ids=str,
)
def test_code_that_a_run_names_is_printed_and_runs_only_on_request(
    which: str,
    change: dict[str, Any],
    repeated: dict[str, Any],
    directories: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "evil.py").write_text(EVIL)
    run = changed(directories[which], tmp_path / "run", **change)
    with pytest.raises(UserError, match=r"the run names what is not its own, .*evil") as raised:
        pg.Run.load(run).evaluate(1)
    assert len(str(raised.value)) <= 200
    assert not (tmp_path / "executed").exists()
    for trusting in (repeated, {"trust": True}):
        monkeypatch.setattr(sys, "modules", {name: x for name, x in sys.modules.items() if name != "evil"})
        pg.Run.load(run, **trusting).evaluate(1)
        assert (tmp_path / "executed").exists()
        (tmp_path / "executed").unlink()


def test_remote_code_is_never_believed_of_a_file(completions: tuple[Path, Path], tmp_path: Path) -> None:
    run = changed(completions[0], tmp_path / "run", trust_remote_code=True, reward=["exact_match"])
    path = run / "model" / "config.json"
    mapped = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}
    path.write_text(json.dumps(json.loads(path.read_text()) | mapped))
    (run / "model" / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    for trust in (False, True):
        with pytest.raises(UserError):
            pg.Run.load(run, trust=trust)
    assert not (tmp_path / "executed").exists()
    assert pg.Run.load(completions[0], trust=True, trust_remote_code=True).options.trust_remote_code
    assert not pg.Run.load(completions[0], trust=True).options.trust_remote_code


def test_files_of_elsewhere_are_not_read(completions: tuple[Path, Path], tmp_path: Path) -> None:
    run = changed(completions[0], tmp_path / "run", reward=["exact_match"], dataset="/etc/passwd", task="/etc/hosts")
    assert "prompt" in pg.Run.load(run).evaluate(1).rows[0]
    (run / "held_out.jsonl").unlink()
    (run / "held_out.jsonl").symlink_to("/etc/passwd")
    with pytest.raises(UserError, match="link out of its directory"):
        pg.Run.load(run)
    adapter = changed(completions[1], tmp_path / "adapter", reward=["exact_match"])
    with pytest.raises(UserError, match="not its own, model '"):
        pg.Run.load(adapter)
    base = json.loads((adapter / "config.json").read_text())["options"]["model"]
    assert pg.Run.load(adapter, model=base).evaluate(1).completions == 1


@pytest.mark.parametrize("name", ["config.json", "policy.json", "policy.safetensors"])
def test_a_pipe_or_a_link_in_the_place_of_a_file_is_one_line(
    name: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    copy = changed(directories["control"], tmp_path / "copy")
    (copy / name).rename(tmp_path / name)
    (copy / name).symlink_to(tmp_path / name)
    refused(copy)
    (copy / name).unlink()
    os.mkfifo(copy / name)
    refused(copy)


def leaves(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in JSON, also to the lists and objects."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(way for name, x in inside for way in leaves(x, (*path, name)))]


DROP = object()
ODD: list[Any] = [DROP, None, True, -1, 0, 3, 10**12, 10**400, 1e308, 0.5, "", "x", "a\0b", "inf", "\ud800", [], {}]
ODD += [[[]], [1, "a"], {"a": 1}, json.loads("[" * 20 + "]" * 20), "x" * 10_000]


def mutations(content: Any, count: int, random: Random) -> Iterator[Any]:
    """JSON with one value replaced or left out, or with the text of it damaged."""
    ways = leaves(content)
    for number in range(count):
        mutated, way = deepcopy(content), ways[number % len(ways)]
        value = random.choice(ODD)
        if not way:
            yield None if value is DROP else value
            continue
        outer = mutated
        for name in way[:-1]:
            outer = outer[name]
        if value is DROP:
            del outer[way[-1]]
        else:
            outer[way[-1]] = value
        yield mutated


def damages(tensors: dict[str, Tensor], metadata: dict[str, str], count: int, random: Random) -> Iterator[bytes]:
    """A safetensors file with a tensor or a text of its metadata changed, or cut short."""
    for _ in range(count):
        changed, said, name = dict(tensors), dict(metadata), random.choice(sorted(tensors))
        x = changed[name]
        cut = 0
        match random.randrange(8):
            case 0:
                del changed[name]
            case 1:
                changed[name] = torch.full_like(x.float(), math.nan)
            case 2:
                changed[name] = torch.zeros(*x.shape, 2)
            case 3:
                changed[name] = x.to(random.choice([torch.int8, torch.bool, torch.float16, torch.complex64]))
            case 4:
                changed[random.choice(["policy.x", "x", ""])] = x.clone()
            case 5:
                said[random.choice(sorted(said))] = random.choice(["", "x", "-1", "9" * 30, "٣", "True"])
            case 6:
                changed[name] = torch.zeros(0)
            case 7:
                cut = random.randrange(1, 200)
        content = save(changed, said)
        yield content[: len(content) - cut] if random.random() < 0.5 else content[: max(9, cut)] if cut else content


@pytest.mark.parametrize(("which", "count"), [("control", 240), ("exact", 160), ("ppo", 24), ("adapter", 12)])
def test_whatever_is_in_a_run_it_is_loaded_or_refused_in_one_line(
    which: str, count: int, directories: dict[str, Path], tmp_path: Path
) -> None:
    random, own = Random(0), {} if which in ("control", "exact") else {"reward": ("exact_match",)}
    if which == "adapter":
        own["model"] = json.loads((directories[which] / "config.json").read_text())["options"]["model"]
    copy = Path(shutil.copytree(directories[which], tmp_path / "copy"))
    files = [path for path in sorted(copy.rglob("*")) if path.suffix in (".json", ".safetensors", ".jsonl")]
    unread = ("metrics.jsonl", "samples.jsonl", "checkpoints")
    files = [path for path in files if path.name not in unread and path.parent.name not in unread]
    loaded = 0
    for path in files:
        content, many = path.read_bytes(), math.ceil(count / len(files))
        changes: Iterator[bytes]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            changes = damages(load(content), metadata, many, random)
        else:
            text = content.decode().splitlines()[0] if path.suffix == ".jsonl" else content
            changes = (json.dumps(x).encode() for x in mutations(json.loads(text), many, random))
        for change in changes:
            path.write_bytes(change)
            try:
                run = pg.Run.load(copy, **own)
                assert all(p.isfinite().all() for p in run.policy.parameters())
                if run.world.kind == "control":
                    run.evaluate(1)
                loaded += 1
            except Exception as error:
                if not isinstance(error, UserError) or "\n" in str(error) or len(str(error)) > 200:
                    raise AssertionError(f"{path.name}: {change[:3000]!r}") from error
        path.write_bytes(content)
    assert loaded > 0
    pg.Run.load(copy, **own)


# A run of one's own


def test_a_run_is_used_from_another_directory_and_without_its_data(
    model: Path, prompts: Path, rewards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (prompts, rewards):
        shutil.copy(path, tmp_path)
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    size = {"iterations": 1, "prompts_per_rollout": 2, "completions": 2, "max_tokens": 4, "held_out": 2}
    common = {"model": "model", "reward": (f"{rewards.name}:sevens",), "progress": False, "threads": 1, **size}
    for name, more in (("whole", {}), ("adapter", {"lora_rank": 2})):
        pg.train("grpo", prompts.name, out=name, **common, **more)
    config = json.loads(Path("whole", "config.json").read_text())
    assert config["task"] == str(tmp_path / prompts.name)
    assert config["options"]["model"] == str(tmp_path / "model")
    assert config["options"]["reward"] == [f"{tmp_path / rewards.name}:sevens"]
    (tmp_path / prompts.name).unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("whole", "adapter"):
        assert pg.Run.load(tmp_path / name, trust=True).evaluate().prompts == 2


def test_a_run_is_evaluated_on_other_prompts(completions: tuple[Path, Path], prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"prompt": "1+1="}\n')
    run = pg.Run.load(completions[0], trust=True, dataset=str(tmp_path / "other.jsonl"))
    assert [row["prompt"] for row in run.evaluate(1).rows] == ["1+1="]


def test_a_run_is_saved_to_its_own_place_again_and_over_no_other(saved: Path, tmp_path: Path) -> None:
    run = pg.train("ppo", "exact:bandit", iterations=1, progress=False)
    for _ in range(2):
        run.save(tmp_path / "mine")
    on("probes:Known-v0", saved)
    before = {path: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="is not empty, and nothing is overwritten"):
        run.save(saved)
    assert before == {path: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    again = pg.Run.load(tmp_path / "mine")
    again.save(tmp_path / "mine")
    assert again.stage == run.stage == pg.Run.load(tmp_path / "mine").stage


def test_weights_of_two_iterations_are_refused_and_a_critic_of_another_is_named(
    completions: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(completions[0], tmp_path / "copy"))
    run = pg.Run.load(copy, trust=True)
    assert run.standing() == "policy of iteration 1 (16 steps) of a run that ended"
    add_metadata(copy / "critic.safetensors", {"iteration": "0"})
    assert pg.Run.load(copy, trust=True).standing().endswith("ended; its critic's file is of iteration 0")
    shutil.copy(copy / "critic.safetensors", copy / "model" / "other.safetensors")
    with pytest.raises(UserError, match="its weights are of different iterations"):
        pg.Run.load(copy, trust=True)


def refused(directory: Path) -> None:
    with pytest.raises(UserError) as raised:
        pg.Run.load(directory, trust=True).evaluate()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200, str(raised.value)
