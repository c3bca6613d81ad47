"""Evaluation: whole episodes with a policy that no longer changes."""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit
from torch import nn

from policygrad.control.acting import Mode
from policygrad.control.atari import judged
from policygrad.control.environments import close, label, make_environments
from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.players import agents_of
from policygrad.control.policies import Policy
from policygrad.control.processes import Processes
from policygrad.control.sampler import Sampler
from policygrad.control.separate import SeparatePolicies
from policygrad.control.spaces import describe
from policygrad.control.stepping import info_means
from policygrad.control.wrappers import Learned, Wrappers
from policygrad.errors import UserError, one_line


@dataclass
class Evaluation:
    """The returns and lengths of whole episodes.

    success and info: means of the numbers in the info at the end of each episode; success is the info's `is_success` or
    `success`.
    """

    return_mean: float
    return_std: float
    length_mean: float
    episodes: int
    returns: list[float]
    lengths: list[int]
    success: float | None = None
    info: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """The one number that sums it up."""
        return self.return_mean

    def line(self) -> str:
        """For a reader."""
        success = "" if self.success is None else f"success {self.success:.2f}, "
        return (
            f"return {self.return_mean:,.1f} +- {self.return_std:,.1f}, {success}length {self.length_mean:,.1f}, "
            f"{self.episodes} episodes"
        )

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def evaluate(
    policy: nn.Module,
    environment: Any,
    episodes: int = 10,
    *,
    seed: int = 1000,
    stochastic: bool = False,
    normalizer: ObservationNormalizer | None = None,
    learned: Learned | None = None,
    max_steps: int | None = None,
    threads: int | None = 1,
    device: torch.device | str = "cpu",
    vectorization: str = "auto",
    wrap: Sequence[str] = (),
    action_mask: str = "auto",
    agents: str = "shared",
    env_options: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Play `episodes` whole episodes, the same number in every copy of the environment, plus or minus one.

    Taking the first episodes to finish would over-represent short ones. Where rows are agents, these are games, with
    an episode for each agent. Actions are the mode of the policy's distribution unless `stochastic`. environment,
    vectorization, wrap, action_mask, agents and env_options: as make_environments takes them; what was made here is
    closed.
    Environments and actions have random numbers of their own, which follow from the seed and are not those of training.

    The normalizer's statistics are frozen, and so are those of wrappers in the environment: `learned` in training
    (`run.world.learned()`), or by default their own. The rewards of NormalizeReward are counted as they were before it,
    and of Atari games (`ALE/` ids) whole games are played for their own score, whatever the options of training said.
    max_steps cuts every episode; by default the environment's time limit ends it. threads: of torch; one is fastest for
    small networks, and None leaves all.

    Raises UserError for episodes < 1, a seed out of range, an episode that does not end, other spaces than the
    policy's, wrappers without statistics, and where Sampler does.
    """
    if episodes < 1:
        raise UserError(f"episodes is {episodes}: ask for at least one")
    if max_steps is not None and max_steps < 1:
        raise UserError(f"max_steps is {max_steps}: an episode needs at least one")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: it must be 0 or more and less than 2**63")
    if normalizer is not None:
        normalizer = copy.deepcopy(normalizer)
        normalizer.frozen = True
    single = isinstance(environment, gymnasium.Env)
    if vectorization != "envpool":  # whose options are its own
        env_options = judged(environment, env_options)
    how: dict[str, Any] = {"vectorization": vectorization, "wrap": wrap, "action_mask": action_mask}
    how |= {"agents": agents, "env_options": env_options}
    environments = make_environments(environment, 1 if single else min(episodes, 16), **how)
    with ExitStack() as stack:
        if not isinstance(environment, gymnasium.Env | VectorEnv):
            stack.callback(close, environments)
        _check_spaces(policy, environments, label(environment))
        episodes *= agents_of(environments)
        stack.enter_context(_own_arithmetic(seed, threads))
        limit = max_steps or time_limit(environments) or 100_000
        sample = Sampler(
            stack.enter_context(Wrappers(environments).frozen(learned)),
            limit,
            seed=np.random.SeedSequence(seed, spawn_key=(1,)),
            whole_episodes=True,
            observation_normalizer=normalizer,
            device=device,
        )
        return _played(sample, policy if stochastic else Mode(policy), episodes, may_be_cut=max_steps is not None)


def _played(sample: Sampler, policy: nn.Module, episodes: int, *, may_be_cut: bool) -> Evaluation:
    """The first `episodes` of the whole episodes that a sampler plays. Raises UserError for one that does not end."""
    returns: list[float] = []
    lengths: list[int] = []
    endings: list[dict[str, float]] = []
    while len(returns) < episodes:
        total, length, ended = sample.play(policy)
        if not ended.all() and not may_be_cut:
            raise UserError(f"an episode did not end within {sample.length} steps: give max_steps, or a time limit")
        returns += total.tolist()
        lengths += length.tolist()
        endings += sample.stepping.ending
    found = info_means(endings[:episodes])
    returns, lengths = returns[:episodes], lengths[:episodes]
    return Evaluation(
        float(np.mean(returns)),
        float(np.std(returns)),
        float(np.mean(lengths)),
        episodes,
        returns,
        lengths,
        found.pop("success", None),
        {name.removeprefix("info/"): x for name, x in found.items()},
    )


@contextmanager
def _own_arithmetic(seed: int, threads: int | None) -> Iterator[None]:
    """Torch's random numbers by the seed, and its number of threads; both are restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def _check_spaces(policy: nn.Module, environments: VectorEnv, name: str) -> None:
    """Raise UserError for an environment of other spaces than the policy's, as far as the policy reads them."""
    if not isinstance(policy, Policy | SeparatePolicies):
        return
    for what, trained, space in (
        ("observation", policy.observation_space, environments.single_observation_space),
        ("action", policy.action_space, environments.single_action_space),
    ):
        own, other = describe(trained), describe(space)
        if what == "observation":
            own, other = _read(own), _read(other)
        if own != other:
            raise UserError(
                f"the {what} space of {one_line(name, 40)} is {one_line(space, 40)}, and the policy's is "
                f"{one_line(trained, 40)}: use the environment of its training"
            )


def _read(description: Any) -> Any:
    """A described observation space without what a policy does not read. Images are scaled by their bounds."""
    if isinstance(description, dict):
        if description.get("dtype") == "uint8" and len(description["shape"]) == 3:
            return description
        return {name: _read(x) for name, x in description.items() if name not in ("low", "high", "dtype")}
    return [_read(x) for x in description] if isinstance(description, list) else description


def time_limit(environments: VectorEnv) -> int | None:
    """The longest episode that the environment allows, by its specification or a TimeLimit wrapper."""
    base = environments.unwrapped
    if isinstance(base, AsyncVectorEnv | Processes):
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
