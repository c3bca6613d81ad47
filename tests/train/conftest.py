"""What a user has on disk, and the options of runs that take a fraction of a second."""

from pathlib import Path
from typing import Any

import pytest
from tiny_files import write_model, write_prompts, write_rewards


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rewards(tmp_path_factory.mktemp("rewards"))


@pytest.fixture
def language(model: Path, prompts: Path, rewards: Path) -> dict[str, Any]:
    """Arguments of pg.train for a language model."""
    return {
        "task": str(prompts),
        "model": str(model),
        "reward": (f"{rewards}:sevens",),
        "iterations": 2,
        "prompts_per_rollout": 4,
        "completions": 4,
        "max_tokens": 6,
        "held_out": 8,
        "threads": 1,
        "progress": False,
    }
