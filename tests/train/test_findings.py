"""Each known illness is found in a run that has it, and not in a run that has not."""

import math
from typing import Any

import numpy as np
import pytest

import policygrad as pg
from policygrad.train.findings import CHECKS, Course, findings

COUNT = 40
FALLS, RISES = np.linspace(1, 0, COUNT), np.linspace(0, 1, COUNT)
NOISE = np.random.default_rng(0).normal(size=COUNT)


def run(world: str = "control", options: dict[str, Any] | None = None, **columns: Any) -> Course:
    """A healthy run, but for what is given. None: without that metric."""
    healthy: dict[str, Any] = {
        "entropy": 0.7 - 0.4 * RISES, "kl_old": 0.01 + 0.001 * NOISE, "clip_fraction": 0.1 + 0.01 * NOISE,
        "explained_variance": 0.2 + 0.6 * RISES, "gradient_norm": 1 + 0.1 * NOISE,
    }  # fmt: skip
    own = {
        "control": {"return": 20 + 200 * RISES + NOISE, "length": 20 + 200 * RISES + NOISE},
        "language": {
            "reward": 0.3 + 0.5 * RISES + 0.01 * NOISE, "held_out": 0.3 + 0.5 * RISES, "length": 40 + NOISE,
            "prompt_repeats": 0.02 + 0.001 * NOISE, "flat_groups": 0.3 + 0.01 * NOISE,
        },
    }[world]  # fmt: skip
    table = {**healthy, **own, **{name.replace("__", "/"): x for name, x in columns.items()}}
    table = {name: np.broadcast_to(x, COUNT) for name, x in table.items() if x is not None}
    rows = [{name: float(x[i]) for name, x in table.items()} for i in range(COUNT)]
    return Course("ppo", world, options or {}, rows)


FLAT = 100 + NOISE
# The check -> a run that has the illness, and what of it is near but healthy.
ILL: dict[str, tuple[Course, Course]] = {
    "entropy_collapsed": (
        run(entropy=np.where(np.arange(COUNT) < 8, 0.7, 0.001), **{"return": FLAT}),
        run(entropy=np.where(np.arange(COUNT) < 8, 0.7, 0.001)),  # the return goes on rising
    ),
    "score_fell": (
        run(**{"return": np.where(np.arange(COUNT) < 20, 20 + 300 * RISES, 30.0) + NOISE}),
        run(**{"return": 200 * RISES + 30 * np.sin(np.arange(COUNT))}),
    ),
    "steps_too_far": (run(kl_old=0.03, options={"target_kl": 0.01}), run(kl_old=0.03, options={"target_kl": "inf"})),
    "nothing_moves": (run(kl_old=0.0, **{"return": FLAT}), run(kl_old=0.0)),
    "critic_explains_nothing": (run(explained_variance=0.01), run(explained_variance=0.3)),
    "everything_clipped": (run(clip_fraction=0.8), run(clip_fraction=0.3)),
    "always_cut": (run(length=200.0), run(length=np.where(np.arange(COUNT) < 8, 30.0, 500.0))),
    "groups_flat": (run("language", flat_groups=0.95), run("language", flat_groups=0.6)),
    "part_falls": (
        run("language", reward__right=0.8 * FALLS + 0.01 * NOISE, reward__format=RISES),
        run("language", reward__right=0.5 + 0.05 * NOISE, reward__format=RISES),
    ),
    "repeats_its_prompt": (run("language", prompt_repeats=0.9 * RISES), run("language", prompt_repeats=0.9)),
    "length_drifts": (
        run("language", length=40 + 80 * RISES, held_out=0.3 + 0.001 * NOISE),
        run("language", length=40 + 80 * RISES),
    ),
    "memorizes": (run("language", held_out=0.3 + 0.001 * NOISE), run("language", held_out=None)),
    "gradient_peaks": (run(gradient_norm=np.where(np.arange(COUNT) == 20, 90.0, 1.0)), run(gradient_norm=1 + RISES)),
    "steps_refused": (run(accepted=np.arange(COUNT) % 3 == 0), run(accepted=np.arange(COUNT) % 3 > 0)),
    "at_the_bounds": (run(bound_fraction=0.7), run(bound_fraction=0.4)),
}


def test_every_check_is_tried() -> None:
    assert list(ILL) == [check.__name__ for check in CHECKS]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_is_found_where_it_is_and_not_where_it_is_not(check: Any) -> None:
    ill, well = ILL[check.__name__]
    found = check(ill)
    assert found is not None
    assert found.metric in ill.rows[-1]
    assert len(found.line()) < 400
    assert check(well) is None


@pytest.mark.parametrize("world", ["control", "language"])
def test_a_healthy_run_has_none(world: str) -> None:
    assert findings(run(world)) == []


def test_of_a_few_rows_nothing_is_said() -> None:
    ill = ILL["everything_clipped"][0]
    assert findings(Course(ill.method, ill.world, ill.options, ill.rows[:7])) == []
    assert findings(Course("ppo", "control", {}, [])) == []


def test_a_change_is_measured_in_its_standard_errors() -> None:
    first, last = np.tile([0.0, 2.0], 5), np.tile([3.0, 5.0], 5)
    rows = [{"return": x} for x in (*first, *np.ones(20), *last)]
    error = math.sqrt(2 * (10 / 9) / 10)  # both quarters have the variance 10/9
    assert Course("ppo", "control", {}, rows).moved("return") == pytest.approx(3 / error)


def test_a_real_run_that_is_well_and_one_that_is_ill() -> None:
    """PPO on CartPole with its settings, and with a learning rate a thousand times as high."""
    small: dict[str, Any] = {"steps": 12_000, "progress": False, "seed": 0, "compile": "off"}
    well = pg.train("ppo", "CartPole-v1", **small)
    ill = pg.train("ppo", "CartPole-v1", learning_rate=1.0, **small)
    named = [
        {found.name for found in findings(Course("ppo", "control", vars(x.options), x.metrics))} for x in (well, ill)
    ]
    assert not named[0] & {"entropy collapsed", "updates go too far", "everything is clipped"}
    assert named[1] & {"entropy collapsed", "updates go too far", "everything is clipped"}
