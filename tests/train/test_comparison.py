"""Runs are compared with their like: groups, scores, what is left out and said, and what is written."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from outcomes import strict
from rich.console import Console

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train import comparison
from policygrad.train.comparison import ALL, Comparison, Group
from policygrad.train.methods import METHODS
from policygrad.train.options import options_of

OPTIONS = {"steps": 100, "seed": 0, "clip_low": 0.2, "device": "cpu"}


def write_run(
    place: Path,
    scores: list[float] | float = 1.0,
    *,
    method: str = "ppo",
    world: str = "control",
    task: str | None = "CartPole-v1",
    ended: str | None = "finished",
    metric: str = "return",
    steps: list[float] | None = None,
    more: dict[str, float] | None = None,
    **options: Any,
) -> Path:
    """The directory of a run with these scores at 50, 100, ... steps."""
    place.mkdir(parents=True)
    values = scores if isinstance(scores, list) else [scores]
    at = steps or [50.0 * (i + 1) for i in range(len(values))]
    config = {"method": method, "world": world, "task": task, "preset": None, "options": {**OPTIONS, **options}}
    (place / "config.json").write_text(json.dumps(config))
    rows = [{"steps": x, "completions": x, metric: y, **(more or {})} for x, y in zip(at, values, strict=True)]
    (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended is not None:
        (place / "summary.json").write_text(json.dumps({"ended": ended}))
    return place


def study(place: Path, scores: list[float], **how: Any) -> Path:
    for seed, score in enumerate(scores):
        write_run(place / f"seed-{seed}", score, seed=seed, **how)
    return place


def labels(found: Comparison, task: str = "CartPole-v1") -> list[str]:
    return [group.label for group in found.of(task)]


def group(found: Comparison, label: str, task: str = "CartPole-v1") -> Group:
    (one,) = [x for x in found.of(task) if x.label == label]
    return one


def test_the_seeds_of_a_study_are_one_group_and_the_best_comes_first(tmp_path: Path) -> None:
    study(tmp_path / "a", [10.0, 20.0, 30.0, 60.0, 90.0], method="actor_critic")
    study(tmp_path / "b", [100.0, 200.0, 300.0, 500.0, 400.0])
    found = pg.compare(tmp_path / "a", tmp_path / "b")
    assert labels(found) == ["ppo", "actor_critic"]
    assert group(found, "ppo").iqm.value == pytest.approx(300.0)
    assert group(found, "actor_critic").iqm.value == pytest.approx((20 + 30 + 60) / 3)
    assert group(found, "actor_critic").mean.value == pytest.approx(42.0)
    assert group(found, "actor_critic").median.value == pytest.approx(30.0)
    assert [run.seed for run in group(found, "ppo").runs] == [0, 1, 2, 3, 4]
    (pair,) = found.improvements
    assert (pair.better, pair.worse, pair.probability.value) == ("ppo", "actor_critic", 1.0)
    assert found.notes == []


def test_an_interval_lies_around_its_value_within_the_runs(tmp_path: Path) -> None:
    found = group(pg.compare(study(tmp_path / "a", [1.0, 2.0, 3.0, 4.0, 10.0])), "ppo")
    for x in (found.iqm, found.mean, found.median):
        assert x.low is not None
        assert x.high is not None
        assert 1.0 <= x.low < x.value < x.high <= 10.0


def test_groups_of_a_method_are_told_apart_by_the_options_that_differ(tmp_path: Path) -> None:
    study(tmp_path / "a", [1.0, 2.0], clip_low=0.1, gamma=0.9)
    study(tmp_path / "b", [3.0, 4.0], clip_low=0.3, gamma=0.9)
    study(tmp_path / "c", [5.0, 6.0], method="trpo", gamma=0.99)
    assert labels(pg.compare(tmp_path)) == ["trpo", "ppo (clip_low=0.3)", "ppo (clip_low=0.1)"]


def test_an_option_that_one_run_lacks_tells_it_apart(tmp_path: Path) -> None:
    study(tmp_path / "a", [1.0, 2.0])
    study(tmp_path / "b", [3.0, 4.0], entropy_coefficient=0.01)
    assert labels(pg.compare(tmp_path)) == ["ppo (entropy_coefficient=0.01)", "ppo (entropy_coefficient=None)"]


@pytest.mark.parametrize("name", ["device", "threads", "profile", "compile"])
def test_how_a_run_is_computed_does_not_tell_it_apart(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / "a", 1.0, seed=0, **{name: "one"})
    write_run(tmp_path / "b", 2.0, seed=1, **{name: "other"})
    assert labels(pg.compare(tmp_path)) == ["ppo"]


def test_tasks_are_compared_apart_and_then_together(tmp_path: Path) -> None:
    """Together each task runs from its lowest score to its highest."""
    for task, low in (("CartPole-v1", 0.0), ("Pendulum-v1", -1000.0)):
        study(tmp_path / task / "a", [low, low + 50.0], task=task)
        study(tmp_path / task / "b", [low + 100.0, low + 75.0], task=task, method="trpo")
    found = pg.compare(tmp_path)
    assert found.tasks == ["CartPole-v1", "Pendulum-v1", ALL]
    assert group(found, "ppo", ALL).mean.value == pytest.approx(0.25)
    assert group(found, "trpo", ALL).mean.value == pytest.approx(0.875)
    assert group(found, "trpo", ALL).count == 4
    together = [x for x in found.improvements if x.task == ALL]
    assert [(x.better, x.probability.value) for x in together] == [("trpo", 1.0)]


def test_a_method_that_is_not_on_every_task_is_not_in_the_scores_of_all(tmp_path: Path) -> None:
    study(tmp_path / "a", [1.0, 2.0])
    study(tmp_path / "b", [1.0, 2.0], task="Pendulum-v1")
    study(tmp_path / "c", [3.0, 4.0], method="trpo")
    found = pg.compare(tmp_path)
    assert labels(found, ALL) == ["ppo"]
    assert "trpo: not on every task, so not in the scores of all tasks" in found.notes


def test_the_score_is_the_last_return(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [5.0, 9.0, 7.0])
    found = group(pg.compare(tmp_path), "ppo")
    assert [(run.score, run.at) for run in found.runs] == [(7.0, 150.0)]


def test_the_score_may_be_that_at_a_number_of_steps(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [5.0, 9.0, 7.0])
    found = pg.compare(tmp_path, at=120)
    assert [(run.score, run.at) for run in group(found, "ppo").runs] == [(9.0, 100.0)]
    curve = group(found, "ppo").curve
    assert curve is not None
    assert curve.x[-1] == 100.0


def test_one_run_has_no_interval_and_that_is_said(tmp_path: Path) -> None:
    found = pg.compare(write_run(tmp_path / "a"))
    one = group(found, "ppo")
    assert (one.iqm.low, one.iqm.high, one.profile.low) == (None, None, None)
    assert one.curve is not None
    assert one.curve.low is None
    assert found.notes == ["ppo: one run, so there is no interval; train more seeds"]


def test_intervals_of_few_runs_are_said_to_be_narrow(tmp_path: Path) -> None:
    notes = pg.compare(study(tmp_path, [1.0, 2.0, 3.0])).notes
    assert notes == ["intervals of 3 runs are too narrow: so few resamples differ; 5 seeds or more are better"]


# What is left out, and said


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        (None, "has not finished: it is left out"),
        ("interrupted", "ended early (interrupted): it is left out"),
        ("training stopped in iteration 3", "ended early (training stopped in iteration 3): it is left out"),
    ],
)
def test_an_unfinished_run_is_left_out_and_named(tmp_path: Path, ended: str | None, said: str) -> None:
    write_run(tmp_path / "a", 1.0, seed=0)
    write_run(tmp_path / "b", 5.0, seed=1, ended=ended)
    found = pg.compare(tmp_path)
    assert [run.score for run in group(found, "ppo").runs] == [1.0]
    assert found.notes[0].endswith(f"/b {said}")
    every = pg.compare(tmp_path, unfinished=True)
    assert [run.score for run in group(every, "ppo").runs] == [1.0, 5.0]
    assert every.notes[0].endswith("it counts by its last score")


def test_if_no_run_has_finished_there_is_nothing_to_compare(tmp_path: Path) -> None:
    write_run(tmp_path / "a", ended=None)
    with pytest.raises(UserError, match="none of the 1 runs has finished: give unfinished"):
        pg.compare(tmp_path)


def test_a_run_that_ended_earlier_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [1.0, 2.0, 3.0], seed=0)
    write_run(tmp_path / "b", [1.0, 2.0], seed=1)
    write_run(tmp_path / "c", [1.0, 2.0, 3.0], seed=2, steps=[50.0, 100.0, 149.0])  # the size of a rollout apart
    (note, *_) = pg.compare(tmp_path).notes
    assert note == (
        "ppo on CartPole-v1, seed 1: ended at 100 environment steps of 150; at compares the scores at another number"
    )
    assert not any("ended at" in note for note in pg.compare(tmp_path, at=100).notes)


def test_one_seed_of_a_group_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1.0, seed=3)
    write_run(tmp_path / "b", 1.0, seed=3)
    found = pg.compare(tmp_path)
    assert group(found, "ppo").count == 1
    assert "is the same run as" in found.notes[0]


def test_a_run_counts_once_however_often_it_is_named(tmp_path: Path) -> None:
    place = write_run(tmp_path / "a", 1.0)
    found = pg.compare(tmp_path, place, str(place))
    assert group(found, "ppo").count == 1
    assert len(found.notes) == 1  # of the one run


def test_a_run_without_an_episode_is_left_out_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1.0, seed=0)
    write_run(tmp_path / "b", 1.0, seed=1, metric="reward_per_step")
    found = pg.compare(tmp_path)
    assert group(found, "ppo").count == 1
    assert "has no return yet, as no episode has ended: it is left out" in found.notes[0]


def test_links_are_not_followed_and_named(tmp_path: Path) -> None:
    write_run(tmp_path / "elsewhere")
    write_run(tmp_path / "runs" / "a", seed=1)
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "elsewhere")
    found = pg.compare(tmp_path / "runs")
    assert group(found, "ppo").count == 1
    assert "is a link, which is not followed" in found.notes[0]
    assert group(pg.compare(tmp_path / "runs" / "b"), "ppo").count == 1  # the user names it


# Training and evaluation


def language(place: Path, held_out: float | None, **how: Any) -> Path:
    more = {} if held_out is None else {"held_out": held_out}
    return write_run(place, 0.5, world="language", task="arithmetic", metric="reward", more=more, **how)


def test_the_score_is_of_evaluation_where_every_run_has_one(tmp_path: Path) -> None:
    language(tmp_path / "a", 0.25, seed=0)
    language(tmp_path / "b", 0.75, seed=1)
    found = pg.compare(tmp_path)
    assert found.score == "evaluation"
    assert found.metrics["arithmetic"] == "mean reward on held-out prompts"
    assert found.axes["arithmetic"] == "completions"
    assert [run.score for run in group(found, "ppo", "arithmetic").runs] == [0.25, 0.75]
    training = pg.compare(tmp_path, score="training")
    assert training.score == "training"
    assert [run.score for run in group(training, "ppo", "arithmetic").runs] == [0.5, 0.5]


def test_training_and_evaluation_are_not_mixed(tmp_path: Path) -> None:
    language(tmp_path / "a", 0.25, seed=0)
    language(tmp_path / "b", None, seed=1)
    with pytest.raises(UserError, match="was evaluated in training"):
        pg.compare(tmp_path)
    with pytest.raises(UserError, match="b was not evaluated in training"):
        pg.compare(tmp_path, score="evaluation")
    assert group(pg.compare(tmp_path, score="training"), "ppo", "arithmetic").count == 2


def test_nor_are_they_over_tasks(tmp_path: Path) -> None:
    language(tmp_path / "a", 0.25)
    write_run(tmp_path / "b", 1.0)
    with pytest.raises(UserError, match="compare them apart, or by score training"):
        pg.compare(tmp_path)


def test_exact_worlds_are_compared_by_their_exact_return(tmp_path: Path) -> None:
    for seed in range(2):
        pg.train("ppo", "exact:chain", steps=200, seed=seed, out=tmp_path / str(seed), progress=False)
    found = pg.compare(tmp_path)
    exact = [pg.load(tmp_path / str(seed)).evaluate().score for seed in range(2)]
    assert [run.score for run in group(found, "ppo", "exact:chain").runs] == exact


# Names of tasks


def test_files_of_one_name_in_two_places_are_two_tasks(tmp_path: Path) -> None:
    write_run(tmp_path / "a", task="/one/mine.py:Env", seed=0)
    write_run(tmp_path / "b", task="/two/mine.py:Env", seed=1)
    assert pg.compare(tmp_path).tasks[:2] == ["/one/mine.py:Env", "/two/mine.py:Env"]
    assert pg.compare(tmp_path / "a").tasks == ["mine.py:Env"]


def test_a_run_on_data_sets_is_named_by_them(tmp_path: Path) -> None:
    write_run(
        tmp_path / "a", world="language", task=None, metric="reward", dataset=["/data/x/sums.jsonl", "openai/gsm8k"]
    )
    assert pg.compare(tmp_path).tasks == ["/data/x/sums.jsonl+openai/gsm8k"]


# Runs in memory


def test_runs_in_memory_are_what_their_directories_are(tmp_path: Path) -> None:
    runs = [
        pg.train("ppo", "exact:chain", steps=200, seed=seed, out=tmp_path / str(seed), progress=False)
        for seed in range(2)
    ]
    here, there = pg.compare(*runs), pg.compare(tmp_path)
    assert here.summary() == there.summary()


# Curves and profiles


def test_a_curve_covers_what_all_runs_have_in_common(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.0, 1.0], steps=[0.0, 100.0], seed=0)
    write_run(tmp_path / "b", [2.0, 4.0], steps=[50.0, 150.0], seed=1)
    curve = group(pg.compare(tmp_path), "ppo").curve
    assert curve is not None
    assert curve.low is not None
    assert curve.high is not None
    assert (curve.x[0], curve.x[-1]) == (50.0, 100.0)
    x = np.array(curve.x)
    a, b = x / 100, 2 + (x - 50) / 50
    np.testing.assert_allclose(curve.y, (a + b) / 2)
    np.testing.assert_allclose(curve.low, a)  # of two runs a quarter of the resamples are one run alone
    np.testing.assert_allclose(curve.high, b)


def test_a_profile_falls_from_one_to_zero(tmp_path: Path) -> None:
    profile = group(pg.compare(study(tmp_path, [1.0, 2.0, 5.0])), "ppo").profile
    assert (profile.y[0], profile.y[-1]) == (1.0, 0.0)
    assert set(np.round(profile.y, 9)) == set(np.round([1.0, 2 / 3, 1 / 3, 0.0], 9))
    at = float(np.interp(3.0, profile.x, profile.y))
    assert at == pytest.approx(1 / 3)


# What is written


def test_a_comparison_is_a_picture_a_table_and_json(tmp_path: Path) -> None:
    study(tmp_path / "runs" / "a", [10.0, 20.0, 30.0, 60.0, 90.0], method="actor_critic")
    study(tmp_path / "runs" / "b", [100.0, 200.0, 300.0, 500.0, 400.0])
    found = pg.compare(tmp_path / "runs", out=tmp_path / "out" / "here")
    out = tmp_path / "out" / "here"
    assert sorted(path.name for path in out.iterdir()) == ["comparison.json", "comparison.md", "comparison.png"]
    assert strict((out / "comparison.json").read_text()) == json.loads(json.dumps(found.summary()))
    image = imread(out / "comparison.png")
    assert image.shape[1] > 1000
    assert image.std() > 0.01
    table = (out / "comparison.md").read_text()
    assert "| ppo | 5 | 300.0 [" in table
    assert "The score is of training." in table
    found.save(out)  # again: its own files are replaced


def test_the_tables_are_printed_whatever_the_width(tmp_path: Path) -> None:
    study(tmp_path / "a", [1.0, 2.0, 3.0, 4.0, 5.0], clip_low=[0.5, "[bold]"])
    study(tmp_path / "b", [3.0, 4.0, 5.0, 6.0, 7.0], clip_low=0.3)
    for width in (60, 80, 160):
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        pg.compare(tmp_path).show(console)
        said = console.export_text()
        assert "5.000 [" in said or "5.000\n" in said.replace(" ", "")
        assert "bold" in said
        assert all(len(line) <= width for line in said.splitlines())


@pytest.mark.parametrize("runs", [[1.0], [2.0, 2.0], [0.0, 0.0, 0.0], [1e9, -1e-9], [math.pi] * 12])
def test_a_picture_is_drawn_of_any_runs(tmp_path: Path, runs: list[float]) -> None:
    study(tmp_path / "runs" / "a", runs)
    pg.compare(tmp_path / "runs", out=tmp_path / "out")
    assert imread(tmp_path / "out" / "comparison.png").std() > 0.01


# Directories are data


def spoil(name: str, content: bytes) -> Any:
    return lambda run: (run / name).write_bytes(content)


def with_config(**changes: Any) -> Any:
    def change(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**config, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (spoil("metrics.jsonl", b'{"steps": 1, "return": 1}\n{"steps"\n'), "metrics.jsonl is damaged"),
        (spoil("metrics.jsonl", b'{"steps": 1, "return": NaN}\n'), "NaN is no JSON"),
        (spoil("metrics.jsonl", b'{"steps": 1, "return": "1"}\n'), "line 1 is no row of numbers"),
        (spoil("metrics.jsonl", b'{"steps": 1, "return": true}\n'), "line 1 is no row of numbers"),
        (spoil("metrics.jsonl", b"[1, 2]\n"), "line 1 is no row of numbers"),
        (spoil("metrics.jsonl", b'{"return": 1}\n'), "steps falls, or is missing, in line 1"),
        (spoil("metrics.jsonl", b'{"steps": 2}\n{"steps": 1}\n'), "steps falls, or is missing, in line 2"),
        (spoil("metrics.jsonl", b"\xff\xfe\n"), "metrics.jsonl is damaged"),
        (spoil("config.json", b"{}"), "config.json is damaged: KeyError"),
        (spoil("config.json", b"[]"), "config.json is damaged"),
        (spoil("config.json", b'"x"'), "config.json is damaged"),
        (spoil("summary.json", b"[]"), "summary.json is damaged"),
        (spoil("summary.json", b'{"ended": 3}'), "the run ended 3"),
        (with_config(world="chess"), "there is no 'ppo' on 'chess'"),
        (with_config(method=3), "there is no 3"),
        (with_config(task=["x"]), "there is no"),
        (with_config(options={"seed": "x"}), "the seed is 'x'"),
        (with_config(options=[]), "config.json is damaged"),
    ],
)
def test_a_damaged_run_is_named_in_one_line(tmp_path: Path, damage: Any, said: str) -> None:
    damage(write_run(tmp_path / "a"))
    with pytest.raises(UserError) as error:
        pg.compare(tmp_path)
    assert said in str(error.value)
    assert len(str(error.value)) <= 200


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [1.0, 2.0])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"steps": 150, "retu')
    assert [x.score for x in group(pg.compare(run), "ppo").runs] == [2.0]


def test_a_link_out_of_a_run_is_not_read(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    (run / "metrics.jsonl").rename(tmp_path / "elsewhere.jsonl")
    (run / "metrics.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    with pytest.raises(UserError, match="a link out of its directory"):
        pg.compare(run)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nothing", "does not exist: give the directory of a run"),
        ("file", "is a file: give the directory of a run"),
        ("empty", "holds no run: give a directory that train wrote"),
    ],
)
def test_what_is_no_run_is_named(tmp_path: Path, place: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        pg.compare(tmp_path / place)


def test_without_a_run_there_is_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="there is no run to compare"):
        pg.compare()


@pytest.mark.parametrize("at", [0, -5, math.nan, math.inf])
def test_a_number_of_steps_is_more_than_0(tmp_path: Path, at: float) -> None:
    with pytest.raises(UserError, match="at is"):
        pg.compare(write_run(tmp_path / "a"), at=at)


def test_what_does_not_tell_runs_apart_are_options() -> None:
    worlds = ("control", "exact", "language")
    names = {name for method in METHODS for world in worlds for name in vars(options_of(method, world)())}
    assert names >= comparison.APART
