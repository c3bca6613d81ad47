"""A language run begins from another run: its model, and its critic where that fits."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import parameters, untimed

import policygrad as pg
from policygrad.errors import Note, UserError

SMALL: dict[str, Any] = {
    "prompts_per_rollout": 2, "completions": 4, "max_tokens": 40, "iterations": 2, "held_out": 0, "preset": "none",
    "learning_rate": 1e-3, "progress": False, "threads": 1,
}  # fmt: skip
PPO: dict[str, Any] = SMALL | {"minibatch_size": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of GRPO, and one of PPO with its critic."""
    place = tmp_path_factory.mktemp("runs")
    for method, values in (("grpo", SMALL), ("ppo", PPO)):
        run = pg.train(method, "arithmetic", out=place / method, **values)
        assert any(row["gradient_norm"] > 0 for row in run.metrics), "or the model is still the task's own"
    return place


def weights(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("of", ["grpo", "ppo"])
def test_the_model_is_that_of_the_run_and_the_critic_if_it_has_one(of: str, runs: Path) -> None:
    before = pg.Run.load(runs / of)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        training = pg.Training("ppo", "arithmetic", start=runs / of, **PPO)
    assert torch.equal(weights(training.world.policy), weights(before.policy))
    said = [str(x.message) for x in notes if x.category is Note]
    if of == "ppo":
        assert said == []
        assert torch.equal(weights(training.world.critic), weights(before.critic))
    else:
        assert len(said) == 1
        assert said[0].endswith("/grpo has no critic: the critic begins anew")
    training.close()


def test_it_is_another_model_than_the_tasks_own(runs: Path) -> None:
    own = pg.Training("grpo", "arithmetic", **SMALL)
    assert not torch.equal(weights(own.world.policy), weights(pg.Run.load(runs / "ppo").policy))
    own.close()


def test_a_critic_of_another_kind_begins_anew(runs: Path) -> None:
    with pytest.warns(Note, match="has a critic that does not fit .*: the critic begins anew"):
        training = pg.Training("ppo", "arithmetic", start=runs / "ppo", critic="shared", **PPO)
    fresh = pg.Training("ppo", "arithmetic", model=runs / "ppo" / "model", critic="shared", **PPO)
    assert torch.equal(weights(training.world.critic), weights(fresh.world.critic)), "as if it had not been tried"
    training.close(), fresh.close()


def test_a_run_that_was_begun_so_is_loaded_resumed_and_reproduced(runs: Path, tmp_path: Path) -> None:
    values = SMALL | {"start": runs / "grpo", "checkpoint_every": 1}
    whole = pg.train("grpo", "arithmetic", out=tmp_path / "whole", **(values | {"iterations": 3}))
    pg.train("grpo", "arithmetic", out=tmp_path / "broken", **values)
    resumed = pg.resume(tmp_path / "broken", iterations=1, trust=True, progress=False)
    assert torch.equal(parameters(resumed), parameters(whole))
    assert untimed(resumed.metrics) == untimed(whole.metrics)
    assert torch.equal(weights(pg.Run.load(tmp_path / "whole").policy), weights(whole.policy))
    with pytest.raises(UserError, match="names what is not its own, start"):
        pg.resume(tmp_path / "broken", iterations=1, progress=False)


def test_an_adapter_is_trained_on_the_model_of_the_run(runs: Path, tmp_path: Path) -> None:
    run = pg.train("grpo", "arithmetic", out=tmp_path / "run", start=runs / "grpo", lora_rank=2, **SMALL)
    with pytest.raises(UserError, match="names what is not its own, start"):
        pg.Run.load(tmp_path / "run")
    loaded = pg.Run.load(tmp_path / "run", trust=True)
    assert torch.equal(weights(loaded.policy), weights(run.policy))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"start": "runs", "model": "other"}, "start and model are both the model to begin with"),
        ({"start": "."}, r" holds no model: give the directory of a language run"),
    ],
)
def test_what_cannot_be_begun_from(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        pg.Training("grpo", "arithmetic", **SMALL, **values)
