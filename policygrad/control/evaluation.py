"""Evaluation: whole episodes with a policy that no longer changes."""

import copy
import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from torch import Tensor, nn

from policygrad.control.environments import Environment, label, make_environments
from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.policies import Policy
from policygrad.control.sampler import Sampler
from policygrad.control.spaces import describe, rebuild
from policygrad.errors import UserError, one_line


@dataclass
class Evaluation:
    """The returns and lengths of whole episodes."""

    return_mean: float
    return_std: float
    length_mean: float
    episodes: int
    returns: list[float]
    lengths: list[int]

    @property
    def score(self) -> float:
        """The one number that sums it up."""
        return self.return_mean

    def line(self) -> str:
        """For a reader."""
        return (
            f"return {self.return_mean:,.1f} +- {self.return_std:,.1f}, length {self.length_mean:,.1f}, "
            f"{self.episodes} episodes"
        )

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def evaluate_on(
    policy: nn.Module,
    normalizer: ObservationNormalizer | None,
    environment: Environment,
    episodes: int,
    *,
    seed: int = 1000,
    stochastic: bool = False,
    max_steps: int | None = None,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Evaluate a policy on an environment as make_environments takes it, and close what was made here.

    Raises UserError where `evaluate` does, for a seed out of range, and for other spaces than the policy's.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: it must be 0 or more and less than 2**63")
    single = isinstance(environment, gymnasium.Env)
    environments = make_environments(environment, 1 if single else max(1, min(episodes, 16)))
    with ExitStack() as stack:
        if not isinstance(environment, gymnasium.Env | VectorEnv):
            stack.callback(environments.close)
        _check_spaces(policy, environments, label(environment))
        stack.enter_context(torch.random.fork_rng())
        torch.manual_seed(seed)
        return evaluate(
            policy,
            environments,
            episodes,
            seed=seed,
            stochastic=stochastic,
            normalizer=normalizer,
            max_steps=max_steps,
            device=device,
        )


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
) -> Evaluation:
    """Play `episodes` whole episodes, the same number in every environment, plus or minus one.

    Taking the first episodes to finish would over-represent short ones. Actions are the mode of the policy's
    distribution unless `stochastic`. The normalizer's statistics are frozen. max_steps: of an episode, by default the
    environment's time limit, or 100,000. Raises UserError for episodes < 1, for an episode that does not end, and where
    Sampler does.
    """
    if episodes < 1:
        raise UserError(f"episodes is {episodes}: ask for at least one")
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
    returns, lengths = returns[:episodes], lengths[:episodes]
    return Evaluation(
        float(np.mean(returns)), float(np.std(returns)), float(np.mean(lengths)), episodes, returns, lengths
    )


def _check_spaces(policy: nn.Module, environments: VectorEnv, name: str) -> None:
    """Raise UserError for an environment of other spaces than the policy's, as far as the policy reads them."""
    if not isinstance(policy, Policy):
        return
    described: dict[str, Any] = policy.description
    unread = ("low", "high", "dtype")  # of observations
    for what, space in (
        ("observation", environments.single_observation_space),
        ("action", environments.single_action_space),
    ):
        own, other = described[f"{what}_space"], describe(space)
        if what == "observation":
            own, other = ({key: x for key, x in d.items() if key not in unread} for d in (own, other))
        if own != other:
            trained = rebuild(described[f"{what}_space"])
            raise UserError(
                f"the {what} space of {one_line(name, 40)} is {one_line(space, 40)}, and the policy's is "
                f"{one_line(trained, 40)}: use the environment of its training"
            )


def time_limit(environments: VectorEnv) -> int | None:
    """The longest episode that the environment allows, by its specification or a TimeLimit wrapper."""
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
    """A policy without noise: its samples are the mode of its distribution."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, obs: Any) -> "Certain":
        return Certain(self.policy(obs))


class Certain:
    """A distribution with its mode in place of its samples."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        self.distribution = distribution
        if hasattr(distribution, "to_environment"):
            self.to_environment = distribution.to_environment

    def sample(self) -> Tensor:
        """The mode; 0 where torch's mode is NaN, as for a coin of probability 0.5."""
        mode = self.distribution.mode
        return mode.masked_fill(mode.isnan(), 0)

    def log_prob(self, value: Tensor) -> Tensor:
        """The distribution's own."""
        return self.distribution.log_prob(value)
