"""A run is trained again from its directory alone: it is the same to the last bit, or where it parts is said."""

import json
from pathlib import Path
from typing import Any

import pytest
from outcomes import DISTINCT
from stopped import killed, known, without_pictures

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train.options import EPISODIC, options_of
from policygrad.train.reproduce import Reproduction, reproduce

assert without_pictures  # a fixture


def again(directory: Path, **arguments: Any) -> Reproduction:
    return reproduce(directory, trust=True, progress=False, **arguments)


def changed(directory: Path, **values: Any) -> None:
    """Change options in the run's configuration."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["options"] |= values
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("method", DISTINCT)
def test_every_method_is_reproduced(method: str, tmp_path: Path) -> None:
    credit = options_of(method, "control")().credit
    values = known(method, **({"episode_steps": 9} if credit in EPISODIC else {}))
    run = pg.train(method, "probes:Known-v0", out=tmp_path / "run", **values)
    found = again(tmp_path / "run")
    assert found.first is None
    assert found.rows == 6
    assert found.parameters == sum(x.numel() for x in run.world.modules().state_dict().values())
    (line,) = found.lines()
    assert line == f"reproduced: 6 rows of metrics and {found.parameters:,} parameters are the same, bit for bit"


def test_a_run_that_was_stopped_extended_or_keeps_no_checkpoints_is_reproduced(tmp_path: Path) -> None:
    killed("ppo", "CartPole-v1", tmp_path / "killed", 5, **known("ppo", learning_rate_schedule="linear"))
    assert again(tmp_path / "killed") == Reproduction(4, again(tmp_path / "killed").parameters, None, ())
    with pytest.warns(UserWarning, match="is of the whole run"):
        pg.resume(tmp_path / "killed", iterations=3, progress=False)
    found = again(tmp_path / "killed")
    assert (found.rows, found.first) == (9, None)
    values = known("ppo") | {"checkpoints": 0, "checkpoint_every": None}
    pg.train("ppo", "CartPole-v1", out=tmp_path / "none", **values)
    assert again(tmp_path / "none").first is None


def test_nothing_is_written(tmp_path: Path) -> None:
    pg.train("ppo", "exact:bandit", out=tmp_path / "run", num_envs=4, iterations=3, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert again(tmp_path / "run").first is None
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_language_run_is_reproduced(language: dict[str, Any], tmp_path: Path) -> None:
    pg.train("grpo", out=tmp_path / "run", **language | {"learning_rate": 1e-2})
    assert again(tmp_path / "run").first is None


def test_it_says_from_which_iteration_and_in_what_a_run_differs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    pg.train("ppo", "CartPole-v1", out=run, **known("ppo"))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[3]["value_loss"] += 1e-9
    rows[4]["entropy"] = 0.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = again(run).first or ""
    steps, was = int(rows[3]["steps"]), rows[3]["value_loss"]
    assert first.startswith(f"from iteration 4 ({steps:,} steps) on, value_loss is ")
    assert first.endswith(f" and was {was}")
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert again(run).first == "there were 2 rows of metrics, and are 6"


def test_other_parameters_are_said_though_the_metrics_are_the_same(tmp_path: Path) -> None:
    """The last update changes no row of metrics: of a rate that is changed before it, only the parameters tell."""
    pg.train("actor_critic", "CartPole-v1", out=tmp_path / "run", **known("actor_critic", iterations=1))
    changed(tmp_path / "run", critic_learning_rate=0.011)
    found = again(tmp_path / "run").first or ""
    assert "the metrics are the same, and after iteration 1" in found
    assert "of critic." in found


def test_another_seed_and_another_machine_are_said(tmp_path: Path) -> None:
    pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **known("ppo"))
    changed(tmp_path / "run", seed=1)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["versions"]["torch"], config["machine"]["processor"] = "1.0", "abacus"
    path.write_text(json.dumps(config))
    found = again(tmp_path / "run")
    assert "from iteration 1 (" in (found.first or "")
    assert len(found.machine) == 2
    assert any(x.startswith("torch 1.0 then, ") for x in found.machine)
    assert "processor abacus then, " in found.lines()[1]
    assert found.summary()["reproduced"] is False


def test_a_name_that_runs_code_is_repeated_or_trusted(tmp_path: Path) -> None:
    pg.train("ppo", "probes:Known-v0", out=tmp_path / "run", **known("ppo"))
    with pytest.raises(UserError, match="the run names what is not its own"):
        reproduce(tmp_path / "run")
    assert reproduce(tmp_path / "run", environment="probes:Known-v0", progress=False).first is None
