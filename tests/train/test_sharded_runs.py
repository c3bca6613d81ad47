"""Runs of sharded models: trained, evaluated, stopped, resumed on other numbers of ranks, saved for Hugging Face."""

import json
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import untimed
from rank_cases import spawned
from safetensors.torch import load_file
from stopped import killed, without_pictures
from tiny_files import write_all
from torch import Tensor
from transformers import AutoModelForCausalLM

import policygrad as pg
from policygrad import ranks
from policygrad.train.options import OptionError
from policygrad.train.snapshots import read_checkpoint
from policygrad.train.training import Training

assert without_pictures  # a fixture
SMALL: dict[str, Any] = {
    "iterations": 4, "prompts_per_rollout": 3, "completions": 4, "max_tokens": 6, "held_out": 4, "threads": 1,
    "learning_rate": 1e-2, "evaluate_every": 2, "evaluation_completions": 2, "micro_batch": 3,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"kl_ref": "loss", "epochs": 2}),
    "ppo": ("ppo", {"prompts_per_rollout": 5, "completions": 1, "minibatch_size": 4, "kl_ref": "reward"}),
    "in bfloat16": ("ppo", {"prompts_per_rollout": 5, "completions": 1, "minibatch_size": 4, "autocast": "bfloat16"}),
}
OF_SHARDS = {"in bfloat16": {"gradient_sync": "step"}}


def arguments_of(name: str, place: Path) -> tuple[str, str, dict[str, Any]]:
    method, values = CASES[name]
    reward = f"{place / 'rewards' / 'mine.py'}:sevens"
    given = {"model": str(place / "model"), "reward": (reward,), **SMALL, **values}
    return method, str(place / "data" / "sums.jsonl"), given


def numbers(run: Any) -> Tensor:
    """All parameters, whole."""
    modules = [x for x in (run.policy, run.critic) if x is not None]
    found = [p.full_tensor() if ranks.is_shard(p) else p for x in modules for p in x.parameters()]
    return torch.cat([x.detach().flatten() for x in found])


def in_a_process(place: Path) -> dict[str, Any]:
    """Every case as one of two ranks: sharded, stopped and resumed, and whole."""
    import policygrad.train.run as module

    module.draw_curve = lambda *arguments: None  # type: ignore[assignment]
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in CASES:
        method, task, given = arguments_of(name, place)
        shard = {"shard": True, **OF_SHARDS.get(name, {})}
        run = pg.train(method, task, out=place / name / "sharded", progress=False, **shard, **given)
        assert all(map(ranks.is_shard, run.world.modules().parameters()))
        killed(method, task, place / name / "broken", 3, checkpoint_every=2, **shard, **given)
        shutil.copytree(place / name / "broken", place / name / f"copy {ranks.rank()}")
        resumed = pg.resume(place / name / "broken", progress=False, trust=True)
        with Training.resume(place / f"alone {name}", trust=True, shard=True) as training:
            begun = numbers(training.run)
            rows = [next(training)]
        ranks.in_lockstep(False)
        whole = pg.train(method, task, out=place / name / "whole", progress=False, shared_prompts="off", **given)
        found[name] = {
            "parameters": [numbers(x) for x in (run, resumed, whole)],
            "metrics": [untimed(x.metrics) for x in (run, resumed, whole)],
            "begun": begun,
            "rows": rows,
        }
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = write_all(tmp_path_factory.mktemp("sharded"))
    for name in CASES:
        method, task, given = arguments_of(name, place)
        killed(method, task, place / f"alone {name}", 2, checkpoint_every=1, **given)
        shutil.copytree(place / f"alone {name}", place / f"untouched {name}")
    return place


@pytest.fixture(scope="module")
def processes(place: Path) -> list[dict[str, Any]]:
    """What two processes have found, started once."""
    return spawned(partial(in_a_process, place), place)


every_case = pytest.mark.parametrize("name", CASES)


@pytest.mark.parametrize("name", [name for name in CASES if name not in OF_SHARDS])
def test_a_sharded_run_is_the_whole_one_to_rounding(name: str, processes: list[dict[str, Any]]) -> None:
    """Its rows too, with the evaluations that rank 0 makes; and all ranks come to the same."""
    (sharded, _, whole), (rows, _, of_whole) = (processes[0][name][x] for x in ("parameters", "metrics"))
    torch.testing.assert_close(sharded, whole, rtol=1e-3, atol=1e-4)
    assert torch.equal(processes[1][name]["parameters"][0], sharded)
    assert processes[1][name]["metrics"][0] == rows
    assert [row["held_out"] for row in rows if "held_out" in row]
    for row, other in zip(rows, of_whole, strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)


@every_case
def test_a_sharded_run_that_was_stopped_ends_as_an_unbroken_one(name: str, processes: list[dict[str, Any]]) -> None:
    found = processes[0][name]
    assert torch.equal(found["parameters"][1], found["parameters"][0])
    assert found["metrics"][1] == found["metrics"][0]


@every_case
def test_what_is_saved_is_whole_and_loads_anywhere(name: str, place: Path, processes: list[dict[str, Any]]) -> None:
    directory = place / name / "sharded"
    run = pg.load(directory, trust=True)
    assert torch.equal(numbers(run), processes[0][name]["parameters"][0])
    model = AutoModelForCausalLM.from_pretrained(directory / "model")
    for own, its in zip(model.parameters(), run.policy.parameters(), strict=True):
        assert torch.equal(own, its)
    whole = load_file(place / name / "whole" / "model" / "model.safetensors")
    assert {x: y.shape for x, y in whole.items()} == {
        x: y.shape for x, y in load_file(directory / "model" / "model.safetensors").items()
    }
    assert json.loads((directory / "config.json").read_text())["options"]["shard"] is True


@every_case
def test_one_process_goes_on_with_a_sharded_run(name: str, place: Path, processes: list[dict[str, Any]]) -> None:
    """From the parameters and moments of its checkpoint, bit for bit."""
    run = place / name / "copy 0"
    checkpoint = read_checkpoint(run)
    assert checkpoint is not None
    with Training.resume(run, trust=True) as training:
        now = training.state_dict()
        for part in ("modules", "optimizers"):
            wanted = torch.utils._pytree.tree_leaves(checkpoint["training"][part])
            found = torch.utils._pytree.tree_leaves(now[part])
            assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(found, wanted, strict=True)
                       if isinstance(y, Tensor))  # fmt: skip
        assert training.options.shard is False
        assert next(training)["steps"] > checkpoint["steps"]


@every_case
def test_ranks_shard_what_one_process_has_begun(name: str, place: Path, processes: list[dict[str, Any]]) -> None:
    with Training.resume(place / f"untouched {name}", trust=True) as training:
        wanted = numbers(training.run)
    for found in processes:
        assert torch.equal(found[name]["begun"], wanted)
    assert processes[0][name]["rows"][0]["steps"] > 0


REFUSED: dict[str, Any] = {
    "lora_rank": 2, "optimizer": "muon", "dtype": "bfloat16", "shared_prompts": "on",
    "reference_decay": 0.5, "gradient_noise": "exact", "critic": "shared",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sharded_is_said(name: str) -> None:
    method = "ppo" if name == "critic" else "grpo"
    values = {"kl_ref": "reward"} if name == "reference_decay" else {}
    with pytest.raises(OptionError, match=f"{name} is .*, and not with shard, since .*: leave one of the two out"):
        Training(method, "arithmetic", shard=True, iterations=1, **{name: REFUSED[name]}, **values)


def test_one_process_and_control_are_not_sharded() -> None:
    with pytest.raises(OptionError, match="shard is of several ranks, and this is one process: start it by torchrun"):
        Training("grpo", "arithmetic", shard=True, iterations=1)
    with pytest.raises(OptionError, match="shard"):
        Training("ppo", "CartPole-v1", shard=True, steps=1)
    with pytest.raises(OptionError, match="shard is not for clone"):
        Training("clone", "arithmetic", shard=True, iterations=1)
