"""What a user has on disk, and the options of runs that take a fraction of a second."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import TOKEN, Hub
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


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and a user of it who is logged in."""
    constants = pytest.importorskip("huggingface_hub.constants")
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        template = "/{repo_id}/resolve/{revision}/{filename}"
        for name, x in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + template,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_CACHE": str(tmp_path / "home" / "hub"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, x)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        server.shutdown()
        thread.join()
