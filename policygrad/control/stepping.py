"""Stepping a Gymnasium vector environment: checks, normalization, auto-reset, and the statistics of its episodes."""

import warnings
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.control.checks import (
    Arrays,
    check_groups,
    check_next_step,
    checked_observations,
    checked_reward,
    failure,
    final_observations,
    no_seeds,
    stored,
)
from policygrad.control.environments import autoreset_mode
from policygrad.control.envpool import EnvPool
from policygrad.control.masks import check_mask_space, check_masks
from policygrad.control.normalization import ObservationNormalizer, RewardScaler
from policygrad.control.players import Agents
from policygrad.control.processes import RESTARTED, Processes
from policygrad.control.spaces import MASK, Flat, describe, unsupported
from policygrad.errors import NonFiniteError, Note, UserError, one_line, type_of


class Step(NamedTuple):
    """One step of B environments. All is 0 or False for an environment that only reset."""

    counts: Arrays  # [B], whether this was a decision: not of an environment that reset, or was made anew
    reward: Arrays  # [B], scaled
    terminated: Arrays  # [B]
    ended: Arrays  # [B], terminated or truncated
    final: Arrays | None  # [B, ...], with same-step resets: the observations before the resets


class Stepping:
    """A vector environment with its running statistics.

    obs [B, ...]: the observations of the next decisions; None before the first reset. starting [B]: where they are the
    first of an episode. resetting [B]: environments without a decision, which the next step only resets; with
    whole_episodes they wait for the next `reset`. Where rows are agents, those that have ended have no decision until
    the game of the others is over, too.
    group_size: this many neighboring environments get the same seed at each reset. Raises UserError if the environments
    raise an error or return an invalid value (see checks.py).
    """

    def __init__(
        self,
        environments: VectorEnv,
        *,
        seed: int | np.random.SeedSequence | None = None,
        whole_episodes: bool = False,
        group_size: int = 1,
        observation_normalizer: ObservationNormalizer | None = None,
        reward_scaler: RewardScaler | None = None,
    ) -> None:
        mode = autoreset_mode(environments)
        if mode == AutoresetMode.DISABLED:
            raise UserError("the vector environment does not reset itself: make it with autoreset_mode NEXT_STEP")
        space = environments.single_observation_space
        if space.shape is None or space.dtype is None:
            if (member := unsupported(space)) is not None:
                describe(member)  # raises
            raise UserError(f"the observation space is {type_of(space)}: flatten it with make_environments")
        for what, one in (("observation", space), ("action", environments.single_action_space)):
            if 0 in (one.shape or ()):
                raise UserError(f"the {what} space {one_line(one, 60)} holds no numbers: give it at least one")
        check_mask_space(space, environments.single_action_space)
        if observation_normalizer is not None and not isinstance(space, spaces.Box):
            raise UserError(f"observations in {one_line(space, 60)} cannot be normalized, only a Box: leave it off")
        if isinstance(seed, int) and seed < 0:
            raise UserError(f"seed is {seed}: choose 0 or more")
        self.environments, self.observation_space, self.same_step = environments, space, mode == AutoresetMode.SAME_STEP
        base = environments.unwrapped
        self.agents = base if isinstance(base, Agents) else None
        self.whole_episodes, self.group_size = whole_episodes, group_size
        self.observation_normalizer, self.reward_scaler = observation_normalizer, reward_scaler
        self.seeded, self.generator = seed is not None, np.random.default_rng(seed)
        self.obs: Arrays | None = None
        self.told = False  # whether a mask that is not read has been mentioned
        self.begun = False  # whether these environments have been reset
        self.resetting, self.starting = (np.zeros(environments.num_envs, dtype=bool) for _ in range(2))
        self.episode_return = np.zeros(environments.num_envs)
        self.episode_length = np.zeros(environments.num_envs, dtype=np.int64)
        self.finished: deque[tuple[float, int]] = deque(maxlen=100)  # return and length of the last episodes
        self.endings: deque[dict[str, float]] = deque(maxlen=100)  # the numbers in info at their ends
        self.ending: list[dict[str, float]] = [{} for _ in range(environments.num_envs)]  # of each environment
        self.reward_sum, self.reward_count = 0.0, 0  # of the decisions since the sampler set them to 0
        self.steps, self.episodes, self.restarts = 0, 0, 0

    def now(self) -> Arrays:
        """The observations of the next decisions, [B, ...]."""
        assert self.obs is not None
        return self.obs

    def go_on(self) -> None:
        """Continue the episodes; start new ones if there are none, or if they are of other environments."""
        if self.obs is None or not self.begun:
            self.reset()

    def reset(self) -> None:
        """Start a new episode in every environment."""
        seed: Any = None
        self.seeded |= self.obs is not None and not self.begun  # a state was loaded, and its generator decides
        grouped = self.group_size > 1
        takes_list = isinstance(self.environments.unwrapped, SyncVectorEnv | AsyncVectorEnv | Processes | EnvPool)
        if grouped or self.seeded:
            groups = self.environments.num_envs // self.group_size
            drawn = self.generator.integers(2**31, size=groups).repeat(self.group_size).tolist()
            seed = drawn if grouped or takes_list else drawn[0]
        try:
            obs, info = self.environments.reset(seed=seed)
        except Exception as error:
            raise (no_seeds(self.group_size) if grouped and not takes_list else failure("reset", error)) from error
        if MASK in (info or {}) and getattr(self.observation_space, "mask", None) is None and not self.told:
            self.told = True
            warnings.warn(
                "the environment's info has an action_mask, which is not read: set action_mask to info, or off",
                Note,
                stacklevel=2,
            )
        self.seeded, self.begun = False, True  # later resets continue the environments' own random streams
        self.resetting, self.starting[:] = self._waiting(), True
        if self.whole_episodes and self.resetting.any():
            raise UserError(
                "an agent is not there when its game begins, and whole episodes are played here: train by "
                "a method such as ppo, without evaluations, or let all agents begin"
            )
        self.episode_return[:] = 0.0
        self.episode_length[:] = 0
        self.ending = [{} for _ in self.ending]
        if self.reward_scaler is not None:
            self.reward_scaler.returns[:] = 0.0
        self.obs = self._received(obs, ~self.resetting)
        check_groups(self.obs, self.group_size)

    def step(self, action: Arrays) -> Step:
        """Step the environments."""
        if not self._is_finite(action):
            raise NonFiniteError(
                f"the policy's action is beyond {action.dtype}, the action space's type: bound its mean"
            )
        try:
            obs, reward, terminated, truncated, info = self.environments.step(action)
        except Exception as error:
            raise failure("step", error) from error
        try:
            return self._taken(obs, reward, terminated, truncated, info)
        except NonFiniteError as error:
            error.evidence = {"obs": self.obs, "action": action, "reward": reward, "next_obs": obs}
            raise

    def _taken(self, obs: Any, reward: Any, terminated: Arrays, truncated: Arrays, info: Any) -> Step:
        """What the environments' step returned, checked and counted."""
        renewed, counts = self._renewed(info), ~self.resetting
        if renewed is not None:
            counts = counts & ~renewed
        reward = self._rewarded(reward, counts)
        terminated, ended = terminated & counts, (terminated | truncated) & counts
        if not self.same_step and info:
            check_next_step(info)
        self.reward_sum += float(reward.sum())
        self.reward_count += int(counts.sum())
        self.episode_return += reward
        self.episode_length += counts
        if ended.any():
            numbers = self._numbers(info.get("final_info") if self.same_step else info)
            for i in self._where(ended):
                self.ending[i] = _numbers_of(numbers, i)
            self.finish(ended)
        cut, begun = ended, self.resetting
        if renewed is not None:  # their episodes were cut, and are none to report
            self.episode_return[renewed], self.episode_length[renewed] = 0.0, 0
            cut, begun = ended | renewed, self.resetting | renewed
        if self.reward_scaler is not None:
            reward = self._scaled(reward, cut, counts)
        self.starting = begun | (ended & self.same_step)
        if self.whole_episodes:
            self.resetting = begun | ended
        else:
            self.resetting = (ended & (not self.same_step)) | self._waiting()
        final = self._received(self._final(obs, ended, info), ended & False) if self.same_step else None
        self.obs = self._received(obs, ~self.resetting)
        return Step(counts, reward, terminated, ended, final)

    def _waiting(self) -> Any:
        """Which rows are of agents that do not act in the next step, [B]."""
        return self.resetting & False if self.agents is None else self.agents.waiting.copy()

    def _renewed(self, info: dict[str, Any]) -> Arrays | None:
        """Which environments failed in this step and were made anew, [B]; each is said in a note. None: no one."""
        if RESTARTED not in info:
            return None
        renewed = np.asarray(info[f"_{RESTARTED}"], dtype=bool)
        for i in np.flatnonzero(renewed):
            self.restarts += 1
            said = f"environment {i} of {len(renewed)} was made anew, and its episode is cut"
            warnings.warn(f"{said}: it {one_line(info[RESTARTED][i], 100)}", Note, stacklevel=4)
        return renewed & ~self.resetting

    def finish(self, ended: Arrays) -> None:
        """Count the episodes of these environments as finished."""
        if not (rows := self._where(ended)):
            return
        totals, lengths = self.episode_return[rows].tolist(), self.episode_length[rows].tolist()
        self.finished += zip(totals, lengths, strict=True)
        self.endings += [self.ending[i] for i in rows]
        self.episodes += len(rows)
        self.episode_return[rows], self.episode_length[rows] = 0.0, 0

    def metrics(self) -> dict[str, float]:
        """What the environments have to report.

        steps and episodes so far; restarts, environments that were made anew, if there were any; reward_per_step of the
        newest rollout, unscaled; and means over the last 100 episodes: return, unscaled, length, success (the info's
        `success` or `is_success`), and info/NAME for its other numbers.
        """
        metrics = {"steps": float(self.steps), "episodes": float(self.episodes)}
        if self.restarts:
            metrics["restarts"] = float(self.restarts)
        if self.reward_count:
            metrics["reward_per_step"] = self.reward_sum / self.reward_count
        if self.finished:
            returns, lengths = zip(*self.finished, strict=True)
            metrics |= {"return": float(np.mean(returns)), "length": float(np.mean(lengths))}
        return metrics | info_means(self.endings)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes here, as tensors, numbers and strings. The environments' own state is not in it."""
        state = {name: getattr(self, name) for name in _STATE}
        state |= {"finished": list(self.finished), "endings": [dict(x) for x in self.endings]}
        state |= {"generator": self.generator.bit_generator.state}
        if self.observation_normalizer is not None:
            state["observations"] = self.observation_normalizer.statistics.state_dict()
        if self.reward_scaler is not None:
            state["rewards"] = self.reward_scaler.statistics.state_dict()
            state["returns"] = self.reward_scaler.returns
        return tree_map(lambda x: torch.from_numpy(np.array(x)) if isinstance(x, np.ndarray) else x, state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict. Environments that have not begun cannot go on with its episodes, and `go_on` resets."""
        state = _as_arrays(state)
        for name in _STATE:
            setattr(self, name, state[name])
        self.finished = deque(((x, n) for x, n in state["finished"]), maxlen=100)
        self.endings = deque(state["endings"], maxlen=100)
        self.generator.bit_generator.state = state["generator"]
        self._restore_statistics(state)
        if self.reward_scaler is not None:
            self.reward_scaler.returns = state["returns"]

    def divide_anew(self, states: Sequence[dict[str, Any]], seed: int) -> None:
        """Go on from the states of another number of ranks: with their statistics, a part of what they have counted,
        and of their last episodes, and with new episodes from the seed."""
        for name in ("steps", "episodes", "restarts"):
            setattr(self, name, ranks.portion(sum(x[name] for x in states)))
        # The last of each come last, so that a rank with more than 100 drops the oldest.
        finished, endings = (
            list(zip_longest(*(reversed(x[name]) for x in states))) for name in ("finished", "endings")
        )
        for own, columns in ((self.finished, finished), (self.endings, endings)):
            of_all: list[Any] = [x for column in columns for x in column if x is not None]
            own.extend(reversed(of_all[ranks.rank() :: ranks.size()]))
        self.seeded, self.generator = True, np.random.default_rng(seed)
        self._restore_statistics(_as_arrays(states[0]))

    def _restore_statistics(self, state: dict[str, Any]) -> None:
        if self.observation_normalizer is not None:
            self.observation_normalizer.statistics.load_state_dict(state["observations"])
        if self.reward_scaler is not None:
            self.reward_scaler.statistics.load_state_dict(state["rewards"])

    # What is done in numpy, and in torch where the environments are of tensors (TensorStepping).

    def _is_finite(self, action: Arrays) -> bool:
        """Whether no number of an action is NaN or infinite."""
        return action.dtype.kind != "f" or bool(np.isfinite(action).all())

    def _where(self, chosen: Arrays) -> list[int]:
        """The environments where chosen [B] is True."""
        return np.flatnonzero(chosen).tolist()

    def _numbers(self, info: Any) -> Any:
        """An info with its numbers in arrays."""
        return info

    def _rewarded(self, reward: Any, counts: Arrays) -> Arrays:
        """The rewards, checked; 0 where they do not count."""
        return checked_reward(reward, counts)

    def _scaled(self, reward: Arrays, ended: Arrays, counts: Arrays) -> Arrays:
        """The rewards as the policy learns from them."""
        assert self.reward_scaler is not None
        return self.reward_scaler(reward, ended, counts)

    def _final(self, obs: Any, ended: Arrays, info: Any) -> Arrays:
        """The observations before the resets of this same step."""
        return final_observations(obs, ended, info)

    def _received(self, obs: Any, counts: Arrays) -> Arrays:
        """Observations as a rollout stores them: checked and normalized."""
        obs = checked_observations(obs, self.observation_space, self.environments.num_envs)
        if isinstance(self.observation_space, Flat) and self.observation_space.mask is not None:
            check_masks(obs, counts, self.observation_space, self.environments.single_action_space)
        if self.observation_normalizer is not None:
            obs = self.observation_normalizer(obs, counts)
        return stored(obs)


_STATE = ("seeded", "obs", "resetting", "starting", "episode_return", "episode_length", "steps", "episodes", "restarts")


def _as_arrays(state: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with arrays of its own for tensors, which states have in checkpoints, and for arrays."""
    return tree_map(lambda x: np.array(x) if isinstance(x, torch.Tensor | np.ndarray) else x, state)


def _numbers_of(info: Any, i: int) -> dict[str, float]:
    """The finite numbers in environment i's part of a vector environment's info."""
    found = {}
    for name, x in info.items() if isinstance(info, dict) else ():
        one_each = isinstance(x, np.ndarray) and x.ndim == 1 and i < len(x) and x.dtype.kind in "biuf"
        if one_each and not name.startswith("_") and info.get(f"_{name}", [True] * len(x))[i] and np.isfinite(x[i]):
            found[name] = float(x[i])
    return found


def info_means(endings: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over the episodes that have it, as metrics: `success`, and `info/NAME` of others."""
    columns: dict[str, list[float]] = {}
    for ending in endings:
        for name, x in ending.items():
            columns.setdefault("success" if name in ("success", "is_success") else f"info/{name}", []).append(x)
    return {name: float(np.mean(column)) for name, column in columns.items()}
