"""Numbers that are not finite stop a run, which names them and keeps them; or their updates are skipped and counted."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from outcomes import parameters, untimed
from safetensors import safe_open
from safetensors.torch import load_file

import policygrad as pg
from policygrad.errors import Kept, NonFiniteError
from policygrad.rollout import Rollout
from policygrad.train import compose

SMALL: dict[str, Any] = {"num_envs": 4, "iterations": 5, "hidden": (8,), "preset": "none", "progress": False}
SHORT: dict[str, Any] = SMALL | {"num_steps": 16}


class Failing(gymnasium.Wrapper):
    """CartPole whose environment number `at` returns a number that is not finite in its 50th step."""

    made = 0

    def __init__(self, at: int, what: str) -> None:
        super().__init__(gymnasium.make("CartPole-v1"))
        self.bad, self.what, self.count = Failing.made == at, what, 0
        Failing.made += 1

    def step(self, action: Any) -> Any:
        obs, reward, terminated, truncated, info = super().step(action)
        self.count += 1
        if self.bad and self.count == 50:
            if self.what == "observation":
                obs = np.full_like(obs, math.nan)
            else:
                reward = math.nan
        return obs, reward, terminated, truncated, info


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("observation", "environment 2 of 4 returned an observation that is NaN or infinite: fix its step or reset"),
        ("reward", "environment 2 of 4 returned a reward of nan: fix its step"),
    ],
)
def test_the_step_of_an_environment_is_kept(what: str, said: str, tmp_path: Path) -> None:
    Failing.made = 0
    with pytest.raises(NonFiniteError) as raised:
        pg.train("ppo", lambda: Failing(2, what), out=tmp_path / "run", vectorization="sync", **SHORT)
    assert str(raised.value) == f"training stopped in iteration 4: {said}"
    (kept,) = (x for x in raised.value.__notes__ if isinstance(x, Kept))
    assert kept.endswith("; the numbers around it are in nonfinite.safetensors")
    found = load_file(tmp_path / "run" / "nonfinite.safetensors")
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "obs": (4, 4), "action": (4,), "reward": (4,), "next_obs": (4, 4),
    }  # fmt: skip
    wrong = found["next_obs"].isnan().all(1) if what == "observation" else found["reward"].isnan()
    assert wrong.tolist() == [False, False, True, False]
    assert found["obs"].isfinite().all()
    with safe_open(tmp_path / "run" / "nonfinite.safetensors", "pt") as file:
        assert file.metadata()["error"] == str(raised.value)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """(iteration) -> the credit of that iteration has an advantage and a target that are not finite."""
    make = compose.credit_of

    def spoil(iteration: int) -> None:
        def credit_of(*arguments: Any) -> Any:
            credit, count = make(*arguments), 0

            def spoiled(rollout: Rollout) -> Any:
                nonlocal count
                count += 1
                parts = [x.clone() for x in credit(rollout)]
                if count == iteration:
                    row, step = rollout.mask.nonzero()[-1].tolist()
                    for x in parts[:2]:
                        x[row, step] = math.nan
                return tuple(parts)

            for name, x in vars(credit).items():
                setattr(spoiled, name, x)
            return spoiled

        monkeypatch.setattr(compose, "credit_of", credit_of)

    return spoil


@pytest.mark.parametrize("method", ["ppo", "actor_critic", "trpo", "npg", "reinforce"])
def test_the_batch_of_an_update_is_kept(method: str, spoil: Callable[[int], None], tmp_path: Path) -> None:
    spoil(3)
    values = SHORT if method != "reinforce" else SMALL
    with pytest.raises(NonFiniteError, match=r"stopped in iteration 3: advantage is not finite in \d+ of") as raised:
        pg.train(method, "CartPole-v1", out=tmp_path / "run", **values)
    assert len(str(raised.value)) <= 200
    found = load_file(tmp_path / "run" / "nonfinite.safetensors")
    assert set(found) == {"obs", "action", "logp", "mask", "weight", "advantage", "target", "value"}
    assert not found["advantage"][found["mask"]].isfinite().all()
    assert all(p.isfinite().all() for p in pg.load(tmp_path / "run").policy.parameters())


@pytest.mark.parametrize("method", ["ppo", "actor_critic", "trpo", "npg", "reinforce"])
def test_a_run_that_skips_goes_on_and_counts(method: str, spoil: Callable[[int], None], tmp_path: Path) -> None:
    spoil(3)
    values = SHORT if method != "reinforce" else SMALL
    run = pg.train(method, "CartPole-v1", out=tmp_path / "run", on_nonfinite="skip", **values)
    counts = [row["skipped_updates"] for row in run.metrics]
    assert counts[:2] == [0, 0]
    assert counts[2] >= 1
    assert counts[2:] == [counts[2]] * 3, "it is the total so far"
    assert all(math.isfinite(x) for row in run.metrics for x in row.values())
    assert all(p.isfinite().all() for p in run.policy.parameters())
    assert not (tmp_path / "run" / "nonfinite.safetensors").exists()


def test_without_anything_to_skip_the_run_is_the_same(tmp_path: Path) -> None:
    stop, skip = (pg.train("ppo", "CartPole-v1", on_nonfinite=x, **SHORT) for x in ("stop", "skip"))
    assert torch.equal(parameters(stop), parameters(skip))
    assert untimed(skip.metrics) == [row | {"skipped_updates": 0.0} for row in untimed(stop.metrics)]


def test_a_run_that_is_resumed_goes_on_counting(
    spoil: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spoil(2)
    values = SHORT | {"on_nonfinite": "skip", "checkpoint_every": 1, "iterations": 3}
    run = pg.train("actor_critic", "CartPole-v1", out=tmp_path / "run", **values)
    monkeypatch.undo()
    resumed = pg.resume(tmp_path / "run", iterations=2, progress=False)
    assert run.metrics[-1]["skipped_updates"] == 1
    assert [row["skipped_updates"] for row in resumed.metrics] == [0, 1, 1, 1, 1]


def test_the_batch_of_a_language_model_is_kept(spoil: Callable[[int], None], tmp_path: Path) -> None:
    spoil(1)
    values: dict[str, Any] = {
        "prompts_per_rollout": 2,
        "completions": 2,
        "max_tokens": 4,
        "iterations": 2,
        "minibatch_size": 4,
    }
    with pytest.raises(NonFiniteError, match=r"advantage is not finite in \d+ of \d+ decisions"):
        pg.train("ppo", "arithmetic", out=tmp_path / "run", held_out=0, preset="none", progress=False, **values)
    found = load_file(tmp_path / "run" / "nonfinite.safetensors")
    assert {"action", "logp", "mask", "advantage"} < set(found)
    nested = {f"obs.{x}{y}" for x in ("prompt", "completion") for y in ("", "_mask")}
    assert {name for name in found if name.startswith("obs")} == nested


def a_third_of_nothing(completions: list[str], **_: Any) -> list[float]:
    """A reward whose third value is none."""
    return [0.0, 1.0, math.nan, 0.0][: len(completions)]


def test_the_completions_with_a_reward_that_is_no_number_are_kept(tmp_path: Path) -> None:
    values: dict[str, Any] = {"prompts_per_rollout": 2, "completions": 2, "max_tokens": 4, "iterations": 2}
    with pytest.raises(NonFiniteError, match=r"iteration 1: reward 'a_third_of_nothing' returned nan for sample 2"):
        pg.train(
            "grpo", "arithmetic", out=tmp_path / "run", held_out=0, preset="none", progress=False,
            reward=(a_third_of_nothing,), **values,
        )  # fmt: skip
    found = load_file(tmp_path / "run" / "nonfinite.safetensors")
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "tokens": (4, 4), "logp": (4, 4), "mask": (4, 4), "cut": (4,),
    }  # fmt: skip
