"""Playing whole episodes with a policy that no longer changes."""

import copy
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray
from torch import Tensor, nn

from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.sampler import Sampler
from policygrad.errors import UserError


def evaluate(
    policy: nn.Module,
    environments: VectorEnv,
    episodes: int,
    *,
    seed: int = 0,
    stochastic: bool = False,
    normalizer: ObservationNormalizer | None = None,
    max_steps: int | None = None,
    device: torch.device | str = "cpu",
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The returns and lengths of `episodes` whole episodes.

    Every environment plays the same number of them, plus or minus one: whichever ended first would be a short one too
    often. Actions are the mode of the policy's distribution unless `stochastic`; the normaliser's statistics are
    frozen; no step is kept. max_steps: of an episode, by default the environment's time limit, or 100,000. Raises
    UserError for episodes < 1, and for an episode that does not end.
    """
    if episodes < 1:
        raise UserError(f"episodes is {episodes}; at least one is needed")
    if normalizer is not None:
        normalizer = copy.deepcopy(normalizer)
        normalizer.frozen = True
    limit = max_steps or time_limit(environments) or 100_000
    sample = Sampler(
        environments, limit, seed=seed, whole_episodes=True, observation_normalizer=normalizer, device=device
    )
    player = policy if stochastic else Mode(policy)
    returns: list[float] = []
    lengths: list[int] = []
    while len(returns) < episodes:
        total, length, ended = sample.play(player)
        if not ended.all():
            raise UserError(f"an episode did not end within {limit} steps: give the environment a time limit")
        returns += total.tolist()
        lengths += length.tolist()
    return np.array(returns[:episodes]), np.array(lengths[:episodes])


def time_limit(environments: VectorEnv) -> int | None:
    """The longest episode that the environment allows, where its specification or a TimeLimit wrapper says."""
    base = environments.unwrapped
    if isinstance(base, AsyncVectorEnv):
        limited = all(base.call("has_wrapper_attr", "_max_episode_steps"))
        limits = list(base.get_attr("_max_episode_steps")) if limited else []
    else:
        limits = [_time_limit(x) for x in getattr(base, "envs", ())]
    if limits and None not in limits:
        return max(limits)
    own = getattr(base, "max_episode_steps", None)  # as Gymnasium's native vector environments have it
    spec = getattr(environments, "spec", None)
    return spec.max_episode_steps if own is None and spec is not None else own


def _time_limit(environment: gymnasium.Env) -> int | None:
    spec = getattr(environment, "spec", None)
    if spec is not None and spec.max_episode_steps is not None:
        return spec.max_episode_steps
    while isinstance(environment, gymnasium.Wrapper):
        if isinstance(environment, TimeLimit):
            return environment._max_episode_steps
        environment = environment.env
    return None


class Mode(nn.Module):
    """A policy without its noise: what it samples is the mode of its distribution."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        if hasattr(policy, "to_environment"):
            self.to_environment = policy.to_environment

    def forward(self, obs: Any) -> "Certain":
        return Certain(self.policy(obs))


class Certain:
    """The mode of a distribution in the place of its samples."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        self.distribution = distribution

    def sample(self) -> Tensor:
        """The mode; 0 where torch leaves it open and says NaN, as for a coin of probability 0.5."""
        mode = self.distribution.mode
        return mode.masked_fill(mode.isnan(), 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """The distribution's own."""
        return self.distribution.log_prob(value)
