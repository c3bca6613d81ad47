"""Where a run goes, and what it may be evaluated on."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from probes import Known

import policygrad as pg
from policygrad.errors import UserError
from policygrad.runs.directories import free_directory, run_directory

SMALL: dict[str, Any] = {"hidden": (8,), "num_envs": 4, "num_steps": 16, "steps": 64, "minibatch_size": 16}


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
    (directory / "config.json").write_text(json.dumps(config | {"environment": environment}))


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
        pg.evaluate_run(saved, 2)
    assert variant(what) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bounds_of_observations_that_no_policy_looks_at_are_no_matter(saved: Path) -> None:
    on("probes:Known-v0", saved)
    before = pg.evaluate_run(saved, 2)
    on(variant("bounds of observations"), saved)
    assert pg.evaluate_run(saved, 2) == before


def test_no_two_runs_are_given_the_same_directory(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(free_directory, [tmp_path / "runs" / "it"] * 24))
    assert {path.name for path in given} == {"it", *(f"it-{n}" for n in range(2, 25))}
    assert all(path.is_dir() for path in given)


def test_a_directory_that_nothing_was_written_to_is_gone_again(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with run_directory(None, tmp_path / "a" / "b" / "c") as directory:
        assert directory.is_dir()
    assert list((tmp_path / "a").iterdir()) == []
    with pytest.raises(UserError), run_directory(None, tmp_path / "a" / "b" / "c") as directory:  # noqa: PT012
        (directory / "kept").touch()
        raise UserError("stopped")
    assert (tmp_path / "a" / "b" / "c" / "kept").exists()
    with run_directory(tmp_path / "mine", tmp_path / "a") as directory:
        assert directory == tmp_path / "mine"


def test_a_place_where_no_directory_can_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in (tmp_path / "file" / "a" / "b", tmp_path / "link" / "a", tmp_path / ("x" * 400)):
        with pytest.raises(UserError, match="cannot be written"):
            free_directory(place)
