"""A search: its trials are runs of train, it goes on as if it had never stopped, and its preset trains the best one."""

import json
import shlex
import sys
import tomllib
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from outcomes import untimed

import policygrad as pg
from policygrad import cli
from policygrad.errors import UserError
from policygrad.train.options import options_of, with_values
from policygrad.train.tuning import MOST, PATIENCE, Tuning

optuna = pytest.importorskip("optuna")

SMALL: dict[str, Any] = {"num_envs": 4, "steps": 100, "epochs": 2, "hidden": (8,)}
QUIET: dict[str, Any] = {**SMALL, "progress": False}


def rows(run: Path) -> list[dict[str, float]]:
    return untimed([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])


def stored(directory: Path) -> list[Any]:
    return optuna.load_study(study_name="policygrad", storage=f"sqlite:///{directory / 'study.db'}").get_trials()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tuning")


@pytest.fixture(scope="module")
def found(place: Path) -> Tuning:
    return pg.tune("ppo", "probes:Known-v0", trials=3, out=place / "study", seed=7, **QUIET)


def test_each_trial_is_the_run_that_train_makes_of_its_options(place: Path, found: Tuning) -> None:
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    for trial in found.trials:
        assert trial.seed == 7 + trial.number
        alone = pg.train(
            "ppo", "probes:Known-v0", seed=trial.seed, out=place / f"alone-{trial.number}", **QUIET | trial.options
        )
        assert rows(trial.run) == rows(place / f"alone-{trial.number}")
        assert alone.summary()["return_mean"] == trial.score
        (group,) = pg.compare(trial.run).groups
        assert group.runs[0].score == trial.score
    assert len({json.dumps(trial.options) for trial in found.trials}) == 3


def test_trial_0_is_the_run_without_tuning(place: Path, found: Tuning) -> None:
    pg.train("ppo", "probes:Known-v0", seed=7, out=place / "untuned", **QUIET)
    assert rows(found.trials[0].run) == rows(place / "untuned")


def test_what_is_given_is_fixed(found: Tuning) -> None:
    assert "learning_rate" in found.options
    for trial in found.trials:
        assert not trial.options.keys() & SMALL.keys()
        config = json.loads((trial.run / "config.json").read_text())["options"]
        assert {name: config[name] for name in SMALL} == json.loads(json.dumps(SMALL))


def test_the_best_is_the_first_of_the_highest_score(found: Tuning) -> None:
    scores = [trial.score for trial in found.trials]
    assert found.value == max(x for x in scores if x is not None)
    assert found.best.number == scores.index(found.value)
    assert found.options == found.best.options


def test_the_preset_trains_with_the_options_of_the_best_trial(place: Path, found: Tuning) -> None:
    run = pg.train("ppo", "probes:Known-v0", preset=found.preset, seed=found.best.seed, steps=100, progress=False)
    options = with_values(options_of("ppo", "control")(), {**SMALL, **found.options, "seed": found.best.seed})
    assert run.options == options
    assert not tomllib.loads(found.preset.read_text())["ppo"].keys() & {"steps", "seed", "threads", "device"}
    assert found.command() == f"policygrad train ppo probes:Known-v0 --preset {found.preset} --steps 100"


def test_more_trials_go_on_with_the_study(place: Path, tmp_path: Path) -> None:
    """Two and then three are the same three as at once: what is proposed follows from the seed and those before."""
    first = pg.tune("ppo", "exact:chain", trials=2, out=tmp_path / "study", steps=128, progress=False)
    again = pg.tune("ppo", "exact:chain", trials=4, out=tmp_path / "study", steps=128, progress=False)
    whole = pg.tune("ppo", "exact:chain", trials=4, out=tmp_path / "whole", steps=128, progress=False)
    assert again.trials[:2] == first.trials
    assert [(x.options, x.score, x.ended) for x in again.trials] == [
        (x.options, x.score, x.ended) for x in whole.trials
    ]
    assert len(stored(tmp_path / "study")) == 4
    assert pg.tune("ppo", "exact:chain", trials=1, out=tmp_path / "study", steps=128, progress=False) == again


ONCE = """
import signal
from pathlib import Path
import probes

HERE = Path(__file__).parent

class Once(probes.Known):
    "Sends a signal, or fails, in its Nth step from now, if a file says so."
    def step(self, action):
        for path in (*HERE.glob("SIG*"), *HERE.glob("fail")):
            left = int(path.read_text()) - 1
            path.write_text(str(left))
            if not left:
                path.unlink()
                if path.name == "fail":
                    raise RuntimeError("the disk of this environment is full")
                signal.raise_signal(getattr(signal, path.name))
        return super().step(action)
"""


def test_a_study_that_is_stopped_goes_on_as_if_it_had_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the middle of the second trial. Its rows of before stay, and the end is that of a study never stopped."""
    (tmp_path / "once.py").write_text(ONCE)
    command = ["tune", "ppo", f"{tmp_path}/once.py:Once", "--trials", "2", "--num-envs", "4", "--steps", "100"]
    command += ["--checkpoint-every", "1", "--num-steps", "8", "--minibatch-size", "16"]
    command += ["--vectorization", "sync", "--out"]  # it counts its steps in a file: none of them are to be measured

    def ended(out: str) -> Any:
        with pytest.raises(SystemExit) as stop:
            cli.main([*command, str(tmp_path / out)])
        return stop.value.code

    assert ended("whole") == 0
    (tmp_path / "SIGTERM").write_text("190")
    assert ended("study") == 143
    assert "policygrad: stopped; 1 of 2 trials are in" in capsys.readouterr().err
    first = (tmp_path / "study" / "trial-1" / "metrics.jsonl").read_text()
    assert 0 < len(first.splitlines()) < len(rows(tmp_path / "whole" / "trial-1"))
    assert ended("study") == 0
    assert (tmp_path / "study" / "trial-1" / "metrics.jsonl").read_text().startswith(first)
    for number in range(2):
        assert rows(tmp_path / "study" / f"trial-{number}") == rows(tmp_path / "whole" / f"trial-{number}")
    ours, theirs = (
        [(x.params, x.value, x.intermediate_values) for x in stored(tmp_path / out)] for out in ("study", "whole")
    )
    assert ours == theirs
    assert len(ours) == 2


def test_an_error_of_the_environment_ends_the_study_and_the_trial_is_run_again(tmp_path: Path) -> None:
    (tmp_path / "once.py").write_text(ONCE)
    common: dict[str, Any] = {"trials": 2, "out": tmp_path / "study", **QUIET, "num_steps": 8, "minibatch_size": 16}
    common["vectorization"] = "sync"  # it counts its steps in a file: none of them are to be measured
    (tmp_path / "fail").write_text("150")
    with pytest.raises(UserError, match="the disk of this environment is full"):
        pg.tune("ppo", f"{tmp_path}/once.py:Once", **common)
    assert [x.state.name for x in stored(tmp_path / "study")] == ["COMPLETE", "RUNNING"]
    found = pg.tune("ppo", f"{tmp_path}/once.py:Once", **common)
    assert [x.ended for x in found.trials] == ["finished", "finished"]


def test_a_trial_is_stopped_early_below_the_median_of_the_others(tmp_path: Path) -> None:
    found = pg.tune("reinforce", "exact:bandit", trials=8, out=tmp_path / "study", iterations=20, progress=False)
    early = [x for x in found.trials if x.score is None]
    assert early
    known = stored(tmp_path / "study")
    for trial in early:
        assert trial.ended.startswith("stopped early at ")
        assert json.loads((trial.run / "summary.json").read_text())["ended"] == trial.ended
        curve = known[trial.number].intermediate_values
        last = max(curve)
        others = [x.intermediate_values[last] for x in known[: trial.number] if x.state.name == "COMPLETE"]
        assert max(curve.values()) < median(others)
        assert last >= PATIENCE
    assert all(sorted(x.intermediate_values) == list(range(1, 20)) for x in known if x.state.name == "COMPLETE")


UNLUCKY = """
import numpy as np
import probes

class Unlucky(probes.Known):
    def reset(self, **options):
        found, info = super().reset(**options)
        return (found * np.nan if self.np_random.integers(3) == 0 else found), info

class Never(probes.Known):
    def reset(self, **options):
        found, info = super().reset(**options)
        return found * np.nan, info
"""


def test_numbers_that_are_not_finite_end_a_trial_and_not_the_study(tmp_path: Path) -> None:
    (tmp_path / "unlucky.py").write_text(UNLUCKY)
    common: dict[str, Any] = {**QUIET, "num_envs": 1, "steps": 16, "num_steps": 16, "minibatch_size": 16}
    found = pg.tune("ppo", f"{tmp_path}/unlucky.py:Unlucky", trials=5, out=tmp_path / "study", **common)
    failed = [x for x in found.trials if "NaN or infinite" in x.ended]
    assert failed
    assert all(x.score is None for x in failed)
    assert len(found.finished) > 0
    assert len(found.trials) == 5
    with pytest.raises(UserError, match=r"no trial has finished: .*NaN or infinite"):
        pg.tune("ppo", f"{tmp_path}/unlucky.py:Never", trials=2, out=tmp_path / "never", **common)


def test_runs_that_end_no_episode_have_no_score(tmp_path: Path) -> None:
    common: dict[str, Any] = {"num_envs": 1, "steps": 1, "num_steps": 1, "minibatch_size": None, "progress": False}
    with pytest.raises(UserError, match="no episode has ended: give more steps"):
        pg.tune("ppo", "Pendulum-v1", trials=1, out=tmp_path / "study", **common)


def test_the_score_is_the_evaluation_where_there_is_one(tmp_path: Path) -> None:
    found = pg.tune("ppo", "probes:Known-v0", trials=1, out=tmp_path / "study", evaluate_every=1, **QUIET)
    assert found.maximized == "mean return of evaluation episodes"
    assert found.value == rows(found.trials[0].run)[-1]["evaluation"]
    exact = pg.tune("ppo", "exact:chain", trials=1, out=tmp_path / "exact", steps=64, progress=False)
    assert exact.value == rows(exact.trials[0].run)[-1]["expected_return"]


def test_a_language_model_is_tuned_by_the_same_code(tmp_path: Path, language: dict[str, Any]) -> None:
    task = language.pop("task")
    found = pg.tune("grpo", task, trials=2, out=tmp_path / "study", **language)
    assert found.maximized == "mean reward on held-out prompts"
    assert found.value in [rows(x.run)[-1]["held_out"] for x in found.trials]
    assert {"learning_rate", "clip_low", "epochs"} <= found.options.keys()
    text, command = found.preset.read_text(), found.command()
    assert "prompts_per_rollout = 4" in text
    for name in ("model", "reward"):  # which lead out of the preset
        assert f"{name} =" not in text
        assert f" --{name} " in command


def test_a_directory_has_one_study(place: Path, found: Tuning, tmp_path: Path) -> None:
    again: dict[str, Any] = {"trials": 3, "out": place / "study", "seed": 7, **QUIET}
    before = sorted(place.joinpath("study").rglob("*"))
    with pytest.raises(UserError, match="holds a study that differs in tuned, gamma: choose another directory"):
        pg.tune("ppo", "probes:Known-v0", **again, gamma=0.9)
    with pytest.raises(UserError, match="holds a study that differs in seed: choose another directory"):
        pg.tune("ppo", "probes:Known-v0", **again | {"seed": 8})
    with pytest.raises(UserError, match="holds a study that differs in"):
        pg.study("ppo", "probes:Known-v0", seeds=[0], out=place / "study", **QUIET)
    assert sorted(place.joinpath("study").rglob("*")) == before
    (tmp_path / "mine").write_text("")
    with pytest.raises(UserError, match="is not empty, and holds no study"):
        pg.tune("ppo", "probes:Known-v0", **again | {"out": tmp_path})


def test_what_is_no_run_of_the_study_is_not_removed(tmp_path: Path) -> None:
    pg.tune("ppo", "probes:Known-v0", trials=1, out=tmp_path / "study", **QUIET)
    (tmp_path / "study" / "trial-1").mkdir()
    (tmp_path / "study" / "trial-1" / "mine").write_text("precious")
    with pytest.raises(UserError, match="holds something else than a run of this study: move it away"):
        pg.tune("ppo", "probes:Known-v0", trials=2, out=tmp_path / "study", **QUIET)
    assert (tmp_path / "study" / "trial-1" / "mine").read_text() == "precious"


def test_a_damaged_database_is_one_line(tmp_path: Path) -> None:
    pg.tune("ppo", "exact:chain", trials=1, out=tmp_path / "study", steps=64, progress=False)
    (tmp_path / "study" / "study.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"study\.db is damaged") as error:
        pg.tune("ppo", "exact:chain", trials=2, out=tmp_path / "study", steps=64, progress=False)
    assert len(str(error.value)) <= 200


@pytest.mark.parametrize("trials", [0, -1, MOST + 1, 2.5, True, "3"])
def test_the_number_of_trials_has_bounds(tmp_path: Path, trials: Any) -> None:
    with pytest.raises(UserError, match="it must be a whole number between 1 and"):
        pg.tune("ppo", "exact:chain", trials=trials, out=tmp_path / "study")
    assert not any(tmp_path.iterdir())


def test_what_cannot_train_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ppo has no option 'stepz'"):
        pg.tune("ppo", "probes:Known-v0", out=tmp_path / "a" / "study", stepz=1)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="Unknown-v0"):
        pg.tune("ppo", "Unknown-v0", out=tmp_path / "a" / "study", **QUIET)
    assert not any(tmp_path.iterdir())


def test_optuna_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"optuna must be installed to tune: pip install policygrad\[tune\]"):
        pg.tune("ppo", "exact:chain", out=tmp_path / "study")


def test_optuna_is_as_loud_afterwards_as_before(tmp_path: Path) -> None:
    before = optuna.logging.get_verbosity()
    pg.tune("ppo", "exact:chain", trials=1, out=tmp_path / "study", steps=64, progress=False)
    assert optuna.logging.get_verbosity() == before


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "ppo", "probes:Known-v0", "--trials", "2", "--steps", "100", "--num-envs", "4"]
    command += ["--no-orthogonal", "--gamma", "0.99", "--out", str(tmp_path / "study")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--json"])
    assert stop.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [x["number"] for x in found["trials"]] == [0, 1]
    assert "gamma" not in found["trials"][0]["options"]  # given, though it is the default
    with pytest.raises(SystemExit):
        cli.main(command)
    said = capsys.readouterr()
    assert "maximized: mean return of the last 100 training episodes" in said.out
    assert "finished before: 2 trials (best: " in said.err
    line = next(x for x in said.out.splitlines() if x.startswith("train with it: policygrad "))
    with pytest.raises(SystemExit) as stop:
        cli.main([*shlex.split(line)[4:], "--out", str(tmp_path / "run"), "--json"])
    assert stop.value.code == 0
    options = json.loads((tmp_path / "run" / "config.json").read_text())["options"]
    best = found["trials"][found["best"]]["options"] | {"num_envs": 4, "orthogonal": False, "gamma": 0.99, "steps": 100}
    assert {name: options[name] for name in best} == best
