"""Statistics of few runs: interquartile mean, bootstrap intervals, probability of improvement, performance profile.

Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv 2108.13264. The
scores of a method are strata: an array [..., N] of N runs for each task. A statistic reduces the last axis of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

Strata = Sequence[np.ndarray]
Statistic = Callable[[Strata], Any]  # of shape [...]: a number, or one of each point of a curve

CONFIDENCE = 0.95
RESAMPLES = 10_000
TOGETHER = 500  # resamples in memory


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval; a single run has none."""

    value: float
    low: float | None = None
    high: float | None = None


def interquartile_mean(scores: Strata) -> Any:
    """The mean of the middle half of all runs of all tasks: N // 4 are cut off at each end. A.k.a. 25% trimmed mean."""
    pooled = np.sort(np.concatenate(scores, axis=-1), axis=-1)
    cut = pooled.shape[-1] // 4
    return pooled[..., cut : pooled.shape[-1] - cut].mean(-1)


def mean(scores: Strata) -> Any:
    """The mean of all runs of all tasks."""
    return np.concatenate(scores, axis=-1).mean(-1)


def median(scores: Strata) -> Any:
    """The median of all runs of all tasks."""
    return np.median(np.concatenate(scores, axis=-1), axis=-1)


def probability_of_improvement(scores: Strata) -> Any:
    """P(X > Y) = 1 / (N M) sum_ij [x_i > y_j] + [x_i = y_j] / 2, averaged over the tasks.

    scores: X's runs of each task, then Y's runs of each task in the same order. Section 4.3 of the paper.
    """
    tasks = len(scores) // 2
    signs = [np.sign(x[..., :, None] - y[..., None, :]) for x, y in zip(scores[:tasks], scores[tasks:], strict=True)]
    return np.mean([(1 + sign).mean((-2, -1)) / 2 for sign in signs], axis=0)


def performance_profile(thresholds: Float[np.ndarray, " K"]) -> Statistic:
    """The statistic tau -> the share of runs with a score above tau, [K, ...] for K thresholds."""

    def share(scores: Strata) -> Any:
        pooled = np.concatenate(scores, axis=-1)
        return (pooled > thresholds.reshape(-1, *[1] * pooled.ndim)).mean(-1)

    return share


def resampled(statistic: Statistic, scores: Strata, resamples: int = RESAMPLES) -> Float[np.ndarray, "*K R"]:
    """The statistic of R stratified bootstrap resamples: the runs of each task are drawn with replacement, by itself.

    The random numbers are always the same.
    """
    generator = np.random.default_rng(0)
    found = []
    for start in range(0, resamples, TOGETHER):
        size = min(TOGETHER, resamples - start)
        drawn = [x[..., generator.integers(x.shape[-1], size=(size, x.shape[-1]))] for x in scores]
        found.append(statistic(drawn))
    return np.concatenate(found, axis=-1)


def has_interval(scores: Strata) -> bool:
    """Whether there are at least two runs of each task."""
    return all(x.shape[-1] > 1 for x in scores)


def interval(statistic: Statistic, scores: Strata) -> tuple[Any, Any]:
    """The percentile bootstrap interval of a statistic: its lower and its upper end."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled(statistic, scores), [tail, 1 - tail], axis=-1)
    return low, high


def estimate(statistic: Statistic, scores: Strata) -> Estimate:
    """The statistic of the runs, with its interval if there are several runs of each task."""
    value = float(statistic(scores))
    if not has_interval(scores):
        return Estimate(value)
    low, high = interval(statistic, scores)
    return Estimate(value, float(low), float(high))
