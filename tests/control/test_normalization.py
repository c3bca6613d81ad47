"""Running statistics are numpy's own over all batches."""

import numpy as np
import pytest

from policygrad.control import ObservationNormalizer, RewardScaler
from policygrad.control.normalization import RunningStatistics


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_merged_batches_have_the_mean_and_variance_of_the_whole(shape: tuple[int, ...], offset: float) -> None:
    x = offset + np.random.default_rng(0).normal(size=(1000, *shape))
    statistics = RunningStatistics(shape)
    for batch in np.split(x, [1, 2, 2, 10, 700]):
        statistics.update(batch)
    assert statistics.count == 1000
    np.testing.assert_allclose(statistics.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.var, x.var(0), rtol=1e-9)


def test_an_offset_does_not_cancel_in_single_precision() -> None:
    x = (1e6 + np.random.default_rng(0).normal(size=(1000, 1))).astype(np.float32)
    statistics = RunningStatistics((1,))
    for batch in np.split(x, 100):
        statistics.update(batch)
    np.testing.assert_allclose(statistics.var, x.astype(np.float64).var(0), rtol=1e-9)


def test_the_state_restores_the_statistics() -> None:
    statistics, other = RunningStatistics((3,)), RunningStatistics((3,))
    statistics.update(np.random.default_rng(0).normal(size=(10, 3)))
    other.load_state_dict(statistics.state_dict())
    more = np.ones((2, 3))
    statistics.update(more)
    other.update(more)
    assert all(np.array_equal(a, b) for a, b in zip(vars(statistics).values(), vars(other).values(), strict=True))


def test_observations_are_centered_scaled_and_clipped() -> None:
    normalizer, counts = ObservationNormalizer((1,)), np.ones(4, bool)
    x = np.array([[0.0], [2.0], [4.0], [6.0]])
    np.testing.assert_allclose(normalizer(x, counts), (x - 3) / np.sqrt(5), rtol=1e-8)
    normalizer.frozen = True
    assert normalizer(np.array([[1e9], [-1e9], [3.0], [3.0]]), counts).tolist() == [[10], [-10], [0], [0]]


def test_what_does_not_count_does_not_enter() -> None:
    normalizer = ObservationNormalizer((1,))
    normalizer(np.array([[1.0], [1e9], [3.0]]), np.array([True, False, True]))
    assert (normalizer.statistics.count, normalizer.statistics.mean.tolist()) == (2, [2])


def test_a_frozen_normalizer_learns_nothing() -> None:
    normalizer = ObservationNormalizer((1,))
    normalizer.frozen = True
    normalizer(np.ones((5, 1)), np.ones(5, bool))
    assert normalizer.statistics.count == 0


def test_rewards_are_scaled_and_not_centered() -> None:
    scaler = RewardScaler(1, 0.0)
    for reward in (1.0, 3.0, 5.0):
        scaled = scaler(np.array([reward]), np.array([False]), np.array([True]))
    np.testing.assert_allclose(scaled, 5 / np.std([1, 3, 5]), rtol=1e-8)


def test_a_return_starts_anew_after_an_end() -> None:
    scaler = RewardScaler(2, 0.5)
    on = np.ones(2, bool)
    scaler(np.array([4.0, 4.0]), np.array([True, False]), on)
    scaler(np.array([1.0, 1.0]), np.array([False, False]), on)
    assert scaler.returns.tolist() == [1, 3]


SCALES = [2.0**-30, 2.0**30]


@pytest.mark.parametrize("c", SCALES)
def test_the_unit_of_observations_and_rewards_makes_no_difference(c: float) -> None:
    generator = np.random.default_rng(0)
    for offset in (0.0, 5.0):
        plain, other = ObservationNormalizer((3,)), ObservationNormalizer((3,))
        rewards, scaled = RewardScaler(4, 0.9), RewardScaler(4, 0.9)
        for _ in range(20):
            x, on = offset + generator.normal(size=(4, 3)), generator.random(4) < 0.8
            np.testing.assert_array_equal(other(c * x, on), plain(x, on))
            np.testing.assert_array_equal(scaled(c * x[:, 0], ~on, on), rewards(x[:, 0], ~on, on))


@pytest.mark.parametrize("x", [0.0, 0.1, 1e-7, 123456.7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint8])
def test_what_does_not_vary_is_0_and_not_its_rounding(x: float, dtype: type) -> None:
    normalizer, scaler = ObservationNormalizer((1,)), RewardScaler(7, 0.0)
    on = np.ones(7, bool)
    for _ in range(50):
        assert not normalizer(np.full((7, 1), x).astype(dtype), on).any()
        assert not scaler(np.full(7, x), on, on).any()
    assert normalizer.statistics.var == scaler.statistics.var == 0


def test_small_integers_do_not_wrap_around() -> None:
    x = np.array([[200], [3], [255], [0]], np.uint8)
    statistics = RunningStatistics((1,))
    statistics.update(x)
    np.testing.assert_allclose([statistics.mean.item(), statistics.var.item()], [x.mean(), x.var()])
