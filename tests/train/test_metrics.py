"""What each method reports: the names, finite numbers, and that they mean what they say."""

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from outcomes import DISTINCT

import policygrad as pg
from policygrad.train.methods import METHODS
from policygrad.train.options import EPISODIC, options_of
from policygrad.train.run import Run
from policygrad.train.worlds.control import ControlWorld

ALWAYS = {"steps", "episodes", "return", "length", "entropy", "kl_old", "gradient_norm", "effective_sample_size"}
ALWAYS |= {"seconds", "steps_per_second"}
CRITIC = {"value_loss", "explained_variance"}
# What a method reports beyond that.
OWN = {
    "reinforce": CRITIC,
    "actor_critic": CRITIC,
    "off_policy_actor_critic": CRITIC,
    "npg": CRITIC | {"step_size", "improvement"},
    "trpo": CRITIC | {"accepted", "step_fraction", "improvement"},
    "ppo": CRITIC | {"clip_fraction", "updates"},
}
every_method = pytest.mark.parametrize("method", DISTINCT)
GROUPS = {"clip_fraction_low", "clip_fraction_high", "group_std", "flat_groups", "updates"}
OWN |= {name: GROUPS for name, method in METHODS.items() if method.objective == "grpo"}
OWN["reinforce_plus_plus"] = GROUPS - {"group_std", "flat_groups"}
OWN["dro"] = GROUPS - {"group_std", "flat_groups"} | CRITIC
OWN["remax"] = set()


def run(method: str, **options: Any) -> Run:
    small: dict[str, Any] = {"hidden": (8,), "num_envs": 4, "num_steps": 16, "steps": 180, "learning_rate": 0.01}
    small |= {"minibatch_size": 16, "epochs": 4} | options
    chosen = options_of(method, "control")(**{x: options[x] for x in options})
    known = {f.name for f in dataclasses.fields(chosen)} - ({"num_steps"} if chosen.credit in EPISODIC else set())
    values = {name: x for name, x in small.items() if name in known}
    return pg.train(method, "probes:Known-v0", progress=False, **values)


@every_method
def test_the_metrics_a_practitioner_looks_at_are_there_and_finite(method: str) -> None:
    rows = run(method).metrics
    assert len(rows) >= 3
    for row in rows:
        assert row.keys() >= ALWAYS | OWN[method], (ALWAYS | OWN[method]) - row.keys()
        assert all(math.isfinite(x) for x in row.values())
        json.dumps(row, allow_nan=False)
    assert len({tuple(row) for row in rows}) == 1, "the same columns in every row"


@every_method
def test_steps_count_decisions_and_grow(method: str) -> None:
    steps = [row["steps"] for row in run(method).metrics]
    assert steps == sorted(set(steps))
    assert steps[-1] >= 180 > steps[-2]


@every_method
def test_the_update_moves_the_policy_and_kl_says_how_far(method: str) -> None:
    rows = run(method).metrics
    assert all(row["kl_old"] >= 0 for row in rows)
    assert any(row["kl_old"] > 1e-7 for row in rows)
    assert all(0 < row["effective_sample_size"] <= 1 + 1e-6 for row in rows)
    assert any(row["effective_sample_size"] < 1 - 1e-7 for row in rows)
    assert any(row["gradient_norm"] > 0 for row in rows)
    assert all(row["gradient_norm"] > 0 for row in rows) or method == "gspo", "its clip may silence all"


def test_reinforce_without_a_critic_reports_none() -> None:
    for row in run("reinforce", baseline="mean").metrics:
        assert not row.keys() & {"value_loss", "explained_variance"}


def test_trpo_stays_inside_its_radius() -> None:
    for row in run("trpo", delta=0.005, steps=600).metrics:
        assert row["kl_old"] <= 0.005
        assert row["accepted"] in (0, 1)
        assert (row["improvement"] > 0) == bool(row["accepted"])


def test_trpo_that_may_try_no_shorter_step_is_refused_and_stays() -> None:
    """With a huge radius the first try oversteps; with one try only, nothing is accepted and nothing moves."""
    rows = run("trpo", delta=50.0, backtracks=1).metrics
    refused = [row for row in rows if row["accepted"] == 0]
    assert refused
    assert all(row["kl_old"] == row["improvement"] == row["step_fraction"] == 0 for row in refused)


def test_the_clip_fraction_is_the_share_of_clipped_ratios() -> None:
    assert any(row["clip_fraction"] > 0 for row in run("ppo", clip_low=0.01, clip_high=0.01).metrics)
    assert all(row["clip_fraction"] == 0 for row in run("ppo", clip_low=math.inf, clip_high=math.inf).metrics)


def test_the_entropy_is_the_policys() -> None:
    first = run("ppo", epochs=1, minibatch_size=64, steps=1, initial_log_std=-1.0).metrics[0]["entropy"]
    assert first == pytest.approx(2 * (0.5 * math.log(2 * math.pi * math.e) - 1.0), rel=1e-4)


# What the last lines say about exploration


def noted(rows: list[dict[str, float]]) -> list[str]:
    world = ControlWorld("CartPole-v1", options_of("ppo", "control")())
    return world.notes(SimpleNamespace(metrics=rows))


def rows_of(entropy: list[float], returns: list[float], **more: list[float]) -> list[dict[str, float]]:
    columns = {"entropy": entropy, "return": returns, **more}
    return [{"steps": 100.0 * k} | {n: x[k] for n, x in columns.items()} for k in range(len(entropy))]


def test_a_policy_that_died_is_said_to_have_and_since_when() -> None:
    (note,) = noted(rows_of([0.7, 1e-9, 0.0, 1e-5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [20.0] + [9.0] * 9))
    assert "not explored since step 100:" in note
    assert "learning_rate" in note
    late = rows_of([0.7, 0.6, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0], [20, 40, 60, 80, 100, 90, 60, 30, 20, 10])
    assert "not explored since step 800:" in noted(late)[0]


def test_a_policy_that_learned_and_became_certain_is_not_said_to_have_died() -> None:
    good = [20.0, 60, 120, 200, 300, 400, 450, 480, 490, 495]
    assert noted(rows_of([0.7, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 1e-2, 1e-4, 1e-5], good)) == []
    assert noted(rows_of([0.7, 0.0, 0.0, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1], good)) == [], "it came back"
    assert noted([]) == noted([{"steps": 5.0}]) == []


def test_a_gaussians_entropy_of_0_is_no_certainty() -> None:
    assert noted(rows_of([1.4, 0.0, 0.0, 0.0], [1.0] * 4, action_std=[1.0, 0.25, 0.25, 0.25])) == []
    (note,) = noted(rows_of([1.4, -9.0, -9.0, -9.0, -9], [1.0] * 5, action_std=[1.0, 1e-5, 1e-5, 1e-5, 1e-5]))
    assert "not explored since step 100:" in note


def test_a_standard_deviation_that_explodes_is_said_to() -> None:
    std, at = [1.0, 2.0, 9.0, 40.0], [0.3, 0.6, 0.9, 0.98]
    (note,) = noted(rows_of([1.4, 2.0, 3.0, 4.0], [1.0, 2, 3, 4], action_std=std, bound_fraction=at))
    assert "mostly noise since step 200: standard deviation 40" in note
    assert "98% of them at a bound" in note
    wide = rows_of([2.4] * 4, [1.0, 2, 3, 4], action_std=[20.0, 19.0, 18.0, 17.0], bound_fraction=[0.9] * 4)
    assert noted(wide) == [], "as wide as it was asked to be"


def test_a_run_at_a_ruinous_rate_ends_with_the_note() -> None:
    run = pg.train(
        "ppo", "CartPole-v1", preset="none", progress=False, learning_rate=3.0, steps=2000, num_envs=4, num_steps=32
    )
    assert any("not explored since step" in note for note in run.world.notes(run))
