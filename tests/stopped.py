"""Runs that are stopped: small ones, and what a process that is killed leaves behind."""

from pathlib import Path
from typing import Any

import pytest

from policygrad.train.options import EPISODIC, has_critic, options_of
from policygrad.train.recording import Recorder
from policygrad.train.training import Training

SMALL: dict[str, Any] = {
    "num_envs": 3, "num_steps": 10, "minibatch_size": 15, "iterations": 6, "hidden": (8,), "preset": "none",
    "checkpoint_every": 2, "progress": False, "learning_rate": 0.01, "critic_learning_rate": 0.01, "compile": "off",
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """curve.png takes longer than all the rest of a small run."""
    monkeypatch.setattr("policygrad.train.run.draw_curve", lambda *arguments: None)


def known(method: str, world: str = "control", **values: Any) -> dict[str, Any]:
    """Those of SMALL that the method reads there, and the values."""
    kind = options_of(method, world)
    credit = values.get("credit", kind().credit)
    names = {name for name in SMALL if hasattr(kind(), name)} | {"preset", "progress"}
    names -= {"num_steps"} if credit in EPISODIC else set()
    names -= (
        set() if has_critic(kind(**{x: y for x, y in values.items() if x == "credit"})) else {"critic_learning_rate"}
    )
    return {name: x for name, x in SMALL.items() if name in names} | values


def killed(method: str, task: Any, out: Path, after: int, **arguments: Any) -> None:
    """Train for so many iterations, and leave the directory as a process that is killed leaves it."""
    training = Training(method, task, out=out, **{x: y for x, y in arguments.items() if x != "progress"})
    record = Recorder(training)
    for _ in range(after):
        record(next(training))
    training.close()
