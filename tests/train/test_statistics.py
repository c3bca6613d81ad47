"""Each statistic against numbers worked out by hand, and intervals against all resamples there are."""

from itertools import product
from typing import Any

import numpy as np
import pytest

from policygrad.train import statistics as module
from policygrad.train.statistics import (
    estimate,
    has_interval,
    interquartile_mean,
    interval,
    mean,
    median,
    performance_profile,
    probability_of_improvement,
    resampled,
)


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


@pytest.mark.parametrize(
    ("scores", "middle"),
    [
        ([7.0], 7.0),
        ([1.0, 9.0, 2.0], 4.0),  # fewer than four: nothing is cut
        ([100.0, 2.0, 4.0, -50.0], 3.0),  # one at each end
        ([1.0, 2.0, 3.0, 4.0, 500.0], 3.0),
        ([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 4.5),  # 3, 4, 5, 6
        ([0.0] * 2 + [1.0, 2.0, 3.0, 4.0, 5.0, 9.0] + [50.0] * 2, 4.0),  # of ten, two at each end
    ],
)
def test_the_interquartile_mean_is_that_of_the_middle_half(scores: list[float], middle: float) -> None:
    assert interquartile_mean([array(*scores)]) == pytest.approx(middle)


def test_runs_of_several_tasks_are_pooled() -> None:
    tasks = [array(0.0, 1.0), array(10.0, 2.0, 3.0, 50.0)]
    assert mean(tasks) == pytest.approx(66 / 6)
    assert median(tasks) == pytest.approx(2.5)
    assert interquartile_mean(tasks) == pytest.approx((1 + 2 + 3 + 10) / 4)


def test_improvement_is_the_share_of_pairs_and_a_tie_is_a_half() -> None:
    x, y = array(1.0, 3.0, 3.0), array(3.0, 0.0)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(x, y)]
    assert sum(pairs) == 4.0  # of six: 1 > 0, 3 = 3, 3 > 0, and the last two again
    assert probability_of_improvement([x, y]) == pytest.approx(4 / 6)
    assert probability_of_improvement([y, x]) == pytest.approx(2 / 6)


def test_improvement_is_averaged_over_tasks_whatever_their_runs() -> None:
    always, never = [array(2.0), array(1.0)], [array(0.0, 0.0, 0.0), array(5.0)]
    scores = [always[0], never[0], always[1], never[1]]  # X on both tasks, then Y on both
    assert probability_of_improvement(scores) == pytest.approx(0.5)


def test_the_profile_is_the_share_of_runs_above_each_threshold() -> None:
    profile = performance_profile(array(0.0, 1.0, 2.5, 9.0))
    np.testing.assert_allclose(profile([array(1.0, 2.0), array(3.0, 3.0)]), [1.0, 0.75, 0.5, 0.0])


def all_resamples(scores: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Every way to draw, by the definition: with replacement, as many as there are, each task by itself."""
    return [list(map(np.array, drawn)) for drawn in product(*[list(product(x, repeat=len(x))) for x in scores])]


@pytest.mark.parametrize("statistic", [mean, median, interquartile_mean, probability_of_improvement])
@pytest.mark.parametrize(
    "scores",
    [[array(1.0, 4.0, 5.0, 11.0), array(0.0, 3.0)], [array(0.5, 2.0, 7.0), array(6.0, 1.0, 1.5)]],
    ids=["unequal", "equal"],
)
def test_the_interval_is_that_of_all_resamples(statistic: Any, scores: list[np.ndarray]) -> None:
    """The share of resamples below the ends is what is asked for, as near as a discrete distribution allows it."""
    values = np.array([statistic(drawn) for drawn in all_resamples(scores)])
    low, high = interval(statistic, scores)
    slack = 4 * np.sqrt(0.025 / module.RESAMPLES)
    assert (values < low - 1e-9).mean() <= 0.025 + slack
    assert (values <= low + 1e-9).mean() >= 0.025 - slack
    assert (values > high + 1e-9).mean() <= 0.025 + slack
    assert (values >= high - 1e-9).mean() >= 0.025 - slack


def test_resamples_have_the_distribution_of_all_resamples() -> None:
    scores = [array(1.0, 4.0, 6.0), array(0.0, 3.0)]
    exact = np.array([mean(drawn) for drawn in all_resamples(scores)])
    drawn = resampled(mean, scores)
    assert drawn.shape == (module.RESAMPLES,)
    assert set(drawn.round(9)) <= set(exact.round(9))
    assert drawn.mean() == pytest.approx(exact.mean(), abs=4 * exact.std() / module.RESAMPLES**0.5)
    for value in set(exact.round(9)):
        share = (exact.round(9) == value).mean()
        assert (drawn.round(9) == value).mean() == pytest.approx(share, abs=4 * (share / module.RESAMPLES) ** 0.5)


def test_a_curve_is_resampled_by_whole_runs() -> None:
    """Two runs that cross: at each point the mean of a resample is of the same two runs."""
    curves = array(0.0, 1.0, 1.0, 0.0).reshape(2, 2)  # [K, N]: the second point has the runs the other way round
    drawn = resampled(mean, [curves])
    assert drawn.shape == (2, module.RESAMPLES)
    np.testing.assert_allclose(drawn[0] + drawn[1], 1.0)


def test_the_same_runs_give_the_same_interval() -> None:
    scores = [np.linspace(0, 1, 7)]
    assert estimate(mean, scores) == estimate(mean, scores)


def test_one_run_of_a_task_has_no_interval() -> None:
    assert not has_interval([array(1.0, 2.0), array(3.0)])
    found = estimate(mean, [array(1.0, 2.0), array(3.0)])
    assert (found.value, found.low, found.high) == (2.0, None, None)


def test_equal_runs_have_an_interval_of_no_width() -> None:
    found = estimate(interquartile_mean, [array(3.0, 3.0, 3.0)])
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)
