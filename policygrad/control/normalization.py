"""Running normalization of observations and scaling of rewards. Plain numpy, with a state_dict."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policygrad import ranks

FloatArray = NDArray[np.floating]


class RunningStatistics:
    """Mean and variance of all batches so far, merged without cancellation (Chan et al. 1979).

    Of several ranks, each merges what it sees, and `share` replaces that by what all have seen.
    """

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.mean = np.zeros(shape)
        self.var = np.ones(shape)
        self.count = 0.0
        self.parts: list[tuple[int, Any, Any]] = []  # what was merged since all ranks had the same
        self.before: dict[str, np.ndarray] = {}  # what they had

    def update(self, x: np.ndarray) -> None:
        """Merge in x, [N, *shape]."""
        n, x = len(x), np.asarray(x, dtype=np.float64)
        if n == 0:
            return
        mean = x[0] + (x - x[0]).mean(0)  # exact if all are equal: then the variance is exactly 0
        self.merge(n, mean, ((x - mean) ** 2).sum(0))

    def merge(self, n: int, mean: Any, squares: Any) -> None:
        """Merge in n numbers by their mean and the sum of their squared distances from it, [*shape]."""
        if ranks.size() > 1:
            self.before = self.before or self.state_dict()
            self.parts.append((n, mean, squares))
        self._merge(n, mean, squares)

    def fresh(self) -> tuple[float, Any, Any]:
        """What this rank has seen since the last `share`: how many, their mean, and the sum of squared distances."""
        own = RunningStatistics(self.mean.shape)
        for x in self.parts:
            own._merge(*x)
        return own.count, own.mean, own.var * own.count

    def share(self, seen: Sequence[tuple[float, Any, Any]]) -> None:
        """Merge in what each rank has seen since the last call, in their order: the same on each."""
        if self.before:
            self.load_state_dict(self.before)
        for n, mean, squares in seen:
            if n:
                self._merge(n, mean, squares)

    def _merge(self, n: float | int, mean: Any, squares: Any) -> None:
        squares = squares + (self.var * self.count if self.count else 0.0)
        delta = mean - self.mean
        total = self.count + n
        squares = squares + delta**2 * (self.count * n / total)
        self.mean = self.mean + delta * (n / total)
        self.var = squares / total
        self.count = total

    def state_dict(self) -> dict[str, np.ndarray]:
        """mean, var and count as arrays."""
        return {name: np.array(getattr(self, name)) for name in ("mean", "var", "count")}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Restore a state_dict, which all ranks have."""
        self.parts, self.before = [], {}
        self.mean, self.var = (np.array(state[name], dtype=np.float64) for name in ("mean", "var"))
        self.count = float(state["count"])


class ObservationNormalizer:
    """(obs - mean) / std, clipped to +-10, over the observations of all decisions so far. `frozen` in evaluation.

    A dimension that has not varied so far is 0. kept [*shape]: numbers that stay as they are.
    """

    def __init__(self, shape: tuple[int, ...], kept: np.ndarray | None = None) -> None:
        self.statistics, self.kept = RunningStatistics(shape), kept
        self.frozen = False

    def __call__(self, obs: np.ndarray, counts: NDArray[np.bool_]) -> FloatArray:
        """Normalize obs [B, *shape]. Observations where counts [B] is True enter the statistics first."""
        if not self.frozen:
            self.statistics.update(obs[counts])
        found = np.clip(_divided(obs - self.statistics.mean, np.sqrt(self.statistics.var)), -10, 10)
        return found if self.kept is None else np.where(self.kept, obs, found)


class RewardScaler:
    """reward / std of the running discounted return, clipped to +-10 (Engstrom et al. 2020, section 3).

    Rewards are not centered: a shift would change the optimal policy. They are 0 while all returns are equal.
    """

    def __init__(self, num_envs: int, gamma: float) -> None:
        self.statistics = RunningStatistics()
        self.returns = np.zeros(num_envs)
        self.gamma = gamma

    def __call__(self, reward: FloatArray, ended: NDArray[np.bool_], counts: NDArray[np.bool_]) -> FloatArray:
        """Scale reward [B]. The discounted returns where counts [B] is True enter the statistics first."""
        self.returns = np.where(counts, self.gamma * self.returns + reward, self.returns)
        self.statistics.update(self.returns[counts])
        self.returns[ended] = 0.0
        return np.clip(_divided(reward, np.sqrt(self.statistics.var)), -10, 10)


def _divided(x: np.ndarray, std: Any) -> FloatArray:
    """x / std, and 0 where std is 0: no constant is added to std, for it would have the unit of x."""
    return np.divide(x, std, out=np.zeros(np.shape(x)), where=std > 0)
