"""RUN/best holds the policy with the highest score, and a run stops when no better one comes."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted import fill, on_disk, replaced
from torch import nn

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import recording
from policygrad.train.best import Best
from policygrad.train.checkpoints import Stage
from policygrad.train.worlds.control import ControlWorld

SMALL: dict[str, Any] = {
    "num_envs": 4, "num_steps": 16, "steps": 100, "minibatch_size": 16, "hidden": (8,), "progress": False,
}  # fmt: skip


def scripted(monkeypatch: pytest.MonkeyPatch, scores: list[float], **rows: list[float]) -> list[int]:
    """Runs whose policy is filled with its iteration, and whose evaluations (the first before training) come out so.

    Returns a list that grows by one with every evaluation.
    """
    asked: list[int] = []

    def loop(policy: nn.Module, critic: nn.Module) -> Iterator[Any]:
        for k in range(1, 10):
            fill(policy, k)
            row = {name: column[k - 1] for name, column in rows.items()}
            yield {"steps": 10.0 * k, "episodes": 0.0, "reward_per_step": 0.0, **row}

    def evaluate(*_: Any, **__: Any) -> Any:
        asked.append(len(asked))
        return SimpleNamespace(score=scores[len(asked) - 1], summary=dict, line=str)

    replaced(monkeypatch, loop)
    monkeypatch.setattr(ControlWorld, "evaluate", evaluate)
    return asked


def test_the_first_of_the_highest_scores_is_the_best() -> None:
    best = Best()
    for iteration, score in enumerate([1.0, 3.0, 2.0, 3.0, 0.0]):
        best.see("evaluation", score, iteration, 10 * iteration)
    assert (best.score, best.iteration, best.steps, best.waited) == (3.0, 1, 10, 3)
    best.see("return", -5.0, 5, 50)
    assert (best.metric, best.score, best.iteration, best.waited) == ("return", -5.0, 5, 0)
    best.see("reward", float("nan"), 6, 60)
    best.see("reward", -9.0, 7, 70)
    assert best.score == -9, "any number is better than none"


@pytest.mark.parametrize(
    ("scores", "kept"),
    [([0.0, 2.0, 5.0, 4.0, 3.0], 2), ([9.0, 2.0, 5.0, 4.0, 3.0], 0), ([0.0, 1.0, 2.0, 3.0, 4.0], 4)],
)
def test_the_policy_of_the_best_evaluation_is_kept(
    scores: list[float], kept: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also the one before training, if none after it is better."""
    scripted(monkeypatch, scores)
    values = SMALL | {"steps": 40, "evaluate_every": 1, "preset": "none"}
    run = pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **values)
    assert run.best == {"metric": "evaluation", "score": scores[kept], "iteration": kept, "steps": 10 * kept}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"] == run.best
    held = pg.Run.load(tmp_path / "run" / "best")
    assert held.stage == Stage(kept, 10 * kept, "best")
    assert held.standing().endswith("of a run that had none better")
    if kept:
        assert on_disk(tmp_path / "run" / "best") == {float(kept)}
    assert on_disk(tmp_path / "run") == {4.0}


def test_without_evaluations_the_best_of_the_saved_policies_by_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripted(monkeypatch, [], **{"return": [1.0, 8.0, 3.0, 7.0]})
    monkeypatch.setattr(recording, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(recording, "SAVE_SHARE", float("inf"))
    monkeypatch.setattr(ControlWorld, "curve", lambda self: SimpleNamespace(y=("return", "")))
    monkeypatch.setattr("policygrad.train.run.draw_curve", lambda *_: None)
    with pg.Training("ppo", "CartPole-v1", out=tmp_path / "run", preset="none", **(SMALL | {"steps": 40})) as training:
        recording.complete(training, progress=False)
    assert training.run.best == {"metric": "return", "score": 8.0, "iteration": 2, "steps": 20}
    assert on_disk(tmp_path / "run" / "best") == {2.0}


@pytest.mark.parametrize(("patience", "last"), [(1, 3), (2, 6), (3, 7), (None, 9)])
def test_a_run_stops_after_so_many_evaluations_without_a_better_one(
    patience: int | None, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = scripted(monkeypatch, [0.0, 2.0, 5.0, 4.0, 6.0, 6.0, 5.0, 1.0, 1.0, 1.0])
    values = SMALL | {"steps": 90, "evaluate_every": 1, "evaluation_patience": patience, "preset": "none"}
    run = pg.train("ppo", "CartPole-v1", **values)
    assert (run.stage.iteration, len(asked)) == (last, last + 1)
    assert run.ended == "finished"
    assert run.stage.run == "ended"


def test_a_run_that_has_stopped_so_may_have_more(tmp_path: Path) -> None:
    """It waits anew."""
    values = SMALL | {"preset": "none", "evaluate_every": 1, "evaluation_episodes": 1, "evaluation_patience": 1}
    values |= {"learning_rate": 1e-30, "checkpoint_every": 1, "steps": 6400}
    run = pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **values)
    assert run.stage.iteration == 1, "nothing is learned, and no evaluation is better than the one before training"
    assert pg.Run.load(tmp_path / "run").standing().endswith("of a run that ended")
    assert pg.resume(tmp_path / "run", steps=640, progress=False).stage.iteration == 2


def test_keeping_the_best_does_not_put_off_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every evaluation is better than the last, and the clock of the checkpoints goes on."""
    scripted(monkeypatch, [float(k) for k in range(10)])
    times = iter(range(0, 10_000, 5))  # seconds from one look at the clock to the next
    monkeypatch.setattr(recording, "time", SimpleNamespace(monotonic=lambda: float(next(times))))
    saved: list[int] = []
    monkeypatch.setattr(recording.Recorder, "write_checkpoint", lambda self, _: saved.append(self.training.iteration))
    values = SMALL | {"steps": 90, "evaluate_every": 1, "preset": "none"}
    pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **values)
    assert saved == [6, 9], "after 30 seconds, and at the end"
    assert on_disk(tmp_path / "run" / "best") == {9.0}


def test_a_run_may_keep_no_best(tmp_path: Path) -> None:
    values = SMALL | {"evaluate_every": 1, "evaluation_episodes": 1, "preset": "none", "steps": 128}
    pg.train("ppo", "CartPole-v1", out=tmp_path / "kept", **values)
    run = pg.train("ppo", "CartPole-v1", out=tmp_path / "none", keep_best=False, **values)
    assert (tmp_path / "kept" / "best").is_dir()
    assert not (tmp_path / "none" / "best").exists()
    assert run.best is not None


def test_the_best_is_that_of_the_whole_run_after_it_was_resumed(tmp_path: Path) -> None:
    values = SMALL | {"evaluate_every": 1, "evaluation_episodes": 2, "preset": "none", "checkpoint_every": 1}
    whole = pg.train("ppo", "CartPole-v1", out=tmp_path / "whole", **(values | {"steps": 512}))
    pg.train("ppo", "CartPole-v1", out=tmp_path / "broken", **(values | {"steps": 256}))
    resumed = pg.resume(tmp_path / "broken", steps=256, progress=False)
    assert resumed.best == whole.best
    pairs = zip(
        pg.load(tmp_path / "whole" / "best").policy.parameters(),
        pg.load(tmp_path / "broken" / "best").policy.parameters(),
        strict=True,
    )
    assert all(torch.equal(p, q) for p, q in pairs)
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        pg.resume(tmp_path / "broken" / "best", progress=False)


def test_another_run_begins_from_the_best(tmp_path: Path) -> None:
    values = SMALL | {"evaluate_every": 1, "evaluation_episodes": 1, "preset": "none"}
    pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **values)
    begun = pg.Training("a2c", "CartPole-v1", start=tmp_path / "run" / "best", hidden=(8,), preset="none", steps=100)
    best = pg.load(tmp_path / "run" / "best").policy
    assert all(map(torch.equal, begun.world.policy.state_dict().values(), best.state_dict().values()))
    begun.close()


def test_patience_is_of_evaluations() -> None:
    with pytest.raises(UserError, match="evaluation_patience is of evaluate_every, which is 0"):
        pg.Training("ppo", "CartPole-v1", evaluation_patience=2)
