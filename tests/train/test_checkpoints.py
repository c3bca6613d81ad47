"""A policy on disk is the policy that was saved, or one line that says what is wrong with the files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train.checkpoints import Stage, load_tensors, save_policy, write_json, write_tensors

SMALL: dict[str, Any] = {
    "hidden": (8,),
    "num_envs": 4,
    "num_steps": 16,
    "steps": 64,
    "minibatch_size": 16,
    "progress": False,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "it"
    pg.train("ppo", "probes:Known-v0", out=directory, **SMALL)
    return directory


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.mark.parametrize(
    "options",
    [{}, {"distribution": "squashed"}, {"distribution": "beta"}, {"state_dependent_std": True, "activation": "gelu"}],
    ids=str,
)
def test_the_rebuilt_policy_does_what_the_saved_one_does(options: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("ppo", "probes:Known-v0", out=tmp_path, **SMALL, **options)
    policy, normalizer = pg.load_policy(tmp_path)
    assert normalizer is None
    obs = torch.randn(5, 3, 3)
    a, b = run.policy(obs), policy(obs)
    assert torch.equal(a.mode, b.mode)
    assert torch.equal(a.log_prob(a.mode), b.log_prob(a.mode))
    np.testing.assert_array_equal(a.to_environment(a.mode), b.to_environment(b.mode))
    assert run.evaluate(5) == pg.Run.load(tmp_path, trust=True).evaluate(5)
    assert run.evaluate(5, greedy=False) == pg.Run.load(tmp_path, trust=True).evaluate(5, greedy=False)


def test_a_policy_of_ones_own_is_filled(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, obs: Tensor) -> Independent:
            return Independent(Normal(self.layer(obs), 1.0), 1)

    run = pg.train("ppo", "probes:Known-v0", policy=Own(), out=tmp_path, **SMALL)
    with pytest.raises(UserError, match=r"Own.*load\(directory, policy=\.\.\.\)"):
        pg.load_policy(tmp_path)
    policy, _ = pg.load_policy(tmp_path, Own())
    obs = torch.randn(5, 1, 3)
    assert torch.equal(policy(obs).mean, run.policy(obs).mean)


def test_the_description_is_json_that_anything_can_read(saved: Path) -> None:
    description = json.loads((saved / "policy.json").read_text())
    assert description["format"] == 4
    assert description["policy"]["action_space"]["kind"] == "Box"
    assert description["policy"]["observation_space"]["low"] == [None], "one number stands for equal bounds"


def test_shared_weights_are_saved_once_for_each(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    save_policy(tmp_path, nn.Sequential(layer), nn.Sequential(layer, nn.Linear(2, 1)), None)
    policy = nn.Sequential(nn.Linear(2, 2))
    pg.load_policy(tmp_path, policy)
    assert torch.equal(policy[0].weight, layer.weight)


def test_a_crash_while_writing_leaves_the_one_before(
    saved: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*arguments: Any) -> None:
        raise OSError("no space left")

    before = (copied / "policy.safetensors").read_bytes(), (copied / "config.json").read_text()
    monkeypatch.setattr("policygrad.files.os.replace", crash)
    with pytest.raises(OSError, match="no space"):
        save_policy(copied, nn.Linear(1, 1), nn.Linear(1, 1), None)
    with pytest.raises(OSError, match="no space"):
        write_json(copied / "config.json", {})
    assert before == ((copied / "policy.safetensors").read_bytes(), (copied / "config.json").read_text())


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="run"):
            pg.Run.load(directory)
        with pytest.raises(UserError, match="run"):
            pg.load_policy(directory)


@pytest.mark.parametrize("name", ["config.json", "policy.json", "policy.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "nonsense", "a folder"])
def test_damaged_files_are_one_line(name: str, damage: str, copied: Path) -> None:
    path = copied / name
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "nonsense":
            path.write_bytes(b"[1, 2]" if name.endswith("json") else b"\x00" * 64)
        case "a folder":
            path.mkdir()
    with pytest.raises(UserError) as raised:
        pg.Run.load(copied, trust=True).evaluate(1)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200
    assert "copy" in str(raised.value)
    assert name in str(raised.value) or damage == "missing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 99}, "format 99"),
        ({"policy": {"hidden": [4]}}, "policy.json"),
    ],
    ids=["format", "description"],
)
def test_a_description_of_another_kind_is_one_line(change: dict[str, Any], said: str, copied: Path) -> None:
    path = copied / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=said):
        pg.load_policy(copied)


@pytest.mark.parametrize("name", ["policy", "class", "normalizes_observations"])
def test_a_description_that_lacks_something_is_damaged(name: str, copied: Path) -> None:
    path = copied / "policy.json"
    description = json.loads(path.read_text())
    del description[name]
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=rf"policy\.json is damaged: {name} is missing"):
        pg.load_policy(copied)


@pytest.mark.parametrize(
    "hidden", [[-1], [8, -1], [10**12], [10**400], [5000, 5000], [8.5], ["8"], 8, None], ids=lambda x: str(x)[:12]
)
def test_a_description_of_impossible_layers_is_damaged(hidden: Any, copied: Path) -> None:
    path = copied / "policy.json"
    description = json.loads(path.read_text())
    description["policy"]["hidden"] = hidden
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"policy\.json is damaged") as raised:
        pg.load_policy(copied)
    assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"num_envs": 2, "num_steps": 16, "iterations": 1, "minibatch_size": 32, "preset": "none"}
    out = tmp_path_factory.mktemp("run")
    pg.train("ppo", "policygrad/Catch-v0", out=out, progress=False, encoder="impala", hidden=(8,), **options)
    return out


def test_a_policy_of_images_is_made_again_from_its_files_with_its_critic(of_images: Path) -> None:
    text = (of_images / "policy.json").read_text()
    assert len(text) < 2000, "the bounds of every pixel are not there"
    run = pg.load(of_images)
    assert json.loads(text)["policy"]["encoder"] == "impala"
    assert run.critic is not None
    images = torch.randint(256, (3, 1, 1, 10, 10), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(run.policy(images).logits, pg.load_policy(of_images)[0](images).logits)


@pytest.mark.parametrize(
    ("shape", "encoder", "channels"),
    [
        ([1, 10**6, 10**6], "impala", "first"),
        ([10**9, 10, 10], "small", "first"),
        ([40, 40, 10**12], "nature", "last"),
        ([1, 10, 10], "nature", "first"),
        ([1, 10, 10], "small", "first"),
        ([1, 10, 10], "of my own", "first"),
        ([10, 10], "small", "first"),
    ],
    ids=str,
)
def test_a_description_of_an_impossible_encoder_is_damaged(
    shape: Any, encoder: str, channels: str, of_images: Path, tmp_path: Path
) -> None:
    shutil.copytree(of_images, tmp_path / "run")
    path = tmp_path / "run" / "policy.json"
    description = json.loads(path.read_text())
    description["policy"]["observation_space"]["shape"] = shape
    description["policy"] |= {"encoder": encoder, "channels": channels}
    path.write_text(json.dumps(description))
    with pytest.raises(
        UserError, match=r"policy\.(json|safetensors) (is damaged|has weights that do not fit)"
    ) as raised:
        pg.load_policy(tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_statistics_that_are_not_there_are_damage(copied: Path) -> None:
    path = copied / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizes_observations": True}))
    with pytest.raises(UserError, match=r"policy\.safetensors is damaged: .*observations\.mean is missing"):
        pg.load_policy(copied)


def test_a_directory_may_be_text(saved: Path, tmp_path: Path) -> None:
    run = pg.train("ppo", "probes:Known-v0", **SMALL)
    run.save(str(tmp_path / "run"))
    for directory in (str(tmp_path / "run"), tmp_path / "run"):
        policy, _ = pg.load_policy(directory)
        assert all((a == b).all() for a, b in zip(policy.parameters(), run.policy.parameters(), strict=True))
        assert pg.Run.load(directory, trust=True).evaluate(2) == run.evaluate(2)
    with pytest.raises(UserError, match="nowhere holds no policy"):
        pg.load_policy("nowhere")
    with pytest.raises(UserError, match="nowhere is no run directory"):
        pg.Run.load("nowhere")


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_the_files_are_readable_as_the_umask_says(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        save_policy(tmp_path, nn.Linear(1, 1), nn.Linear(1, 1), None)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "policy.json": 0o666 & ~mask,
        "policy.safetensors": 0o666 & ~mask,
    }


def test_weights_that_do_not_fit_are_one_line(copied: Path) -> None:
    path = copied / "policy.json"
    description = json.loads(path.read_text())
    description["policy"]["hidden"] = [9]
    path.write_text(json.dumps(description))
    with pytest.raises(UserError, match="do not fit") as raised:
        pg.load_policy(copied)
    assert "\n" not in str(raised.value)


def test_an_environment_without_an_id_is_evaluated_from_python(tmp_path: Path) -> None:
    from probes import Known, limited

    pg.train("ppo", limited(Known, 8), out=tmp_path, **SMALL)
    run = pg.Run.load(tmp_path)
    with pytest.raises(UserError, match=r"evaluate\(environment=\.\.\.\)"):
        run.evaluate(1)
    found = run.evaluate(4, environment=limited(Known, 8))
    policy, _ = pg.load_policy(tmp_path)
    assert pg.evaluate(policy, limited(Known, 8), 4) == found
    assert found.episodes == len(found.returns) == len(found.lengths) == 4


def test_a_module_without_a_description_is_kept_by_its_tensors(tmp_path: Path) -> None:
    path, module, other = tmp_path / "policy.safetensors", nn.Linear(2, 3), nn.Linear(2, 3)
    write_tensors(path, module.state_dict(), Stage(3, 40, "stopped"))
    assert load_tensors(path, other) == Stage(3, 40, "stopped")
    assert torch.equal(other.weight, module.weight)
    with pytest.raises(UserError, match="do not fit the policy"):
        load_tensors(path, nn.Linear(3, 3))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match="damaged"):
        load_tensors(path, other)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load_tensors(path, other)
