"""A tiny real model on disk with its tokenizer, prompts in a file and a reward in a file: what a user has."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny

from policygrad.language import arithmetic, models

REWARD = """
def short(prompts, completions, **_):
    return [1.0 / (1 + len(text)) for text in completions]


def right(prompts, completions, answer, **_):
    return [float(text.endswith(wanted)) for text, wanted in zip(completions, answer)]


def lucky(prompts, completions, **_):
    return [float(text[:1] in ("7", "8")) for text in completions]


def sevens(prompts, completions, **_):
    return [text.count("7") / max(1, len(text)) for text in completions]


def broken(prompts, completions, **_):
    raise ValueError("no judge today")
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model."""
    directory = tmp_path_factory.mktemp("model")
    models.save_model(tiny(), arithmetic.tokenizer(), directory)
    return directory


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty problems in a JSONL file."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in arithmetic.problems(40, seed=0)))
    return path


@pytest.fixture(scope="session")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of reward functions."""
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARD)
    return path


@pytest.fixture
def small(model: Path, prompts: Path, rewards: Path) -> dict[str, object]:
    """Options of a run that takes a fraction of a second."""
    return {
        "model": str(model),
        "dataset": str(prompts),
        "reward": (f"{rewards}:sevens",),
        "iterations": 2,
        "prompts_per_rollout": 4,
        "completions": 4,
        "max_tokens": 6,
        "minibatch_size": 16,
        "held_out": 8,
        "learning_rate": 1e-2,
        "threads": 1,
        "progress": False,
    }
