"""Sampling a Gymnasium vector environment: (policy) -> Rollout."""

import copy
import math
from collections import deque
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import nn

from policygrad.control.environments import autoreset_mode
from policygrad.control.normalization import ObservationNormalizer, RewardScaler
from policygrad.control.policies import head
from policygrad.errors import UserError
from policygrad.rollout import Rollout


class Sampler:
    """Steps a vector environment and returns its experience as rows of `steps` steps, one row an environment.

    With `whole_episodes` every row is one episode from its start, masked after its end, and cut at `steps`; else the
    environments run on from one rollout to the next, and the row that an episode ends in goes on with the next one.
    The step on which an environment resets is no transition: it is masked, cuts every trace (`ended`), and counts in
    nothing.

    observation_normalizer and reward_scaler: running statistics, part of the state. The policy is put in evaluation
    mode: with dropout the policy that is scored would not be the one that was sampled from.

    Rollout.metrics: steps (decisions taken so far), and over the last 100 episodes return and length, unscaled.
    Raises UserError if the environment raises, or returns what is not finite or of another shape, and if the policy's
    action or its log-probability is not finite.
    """

    def __init__(
        self,
        environments: VectorEnv,
        steps: int,
        *,
        seed: int | None = None,
        whole_episodes: bool = False,
        observation_normalizer: ObservationNormalizer | None = None,
        reward_scaler: RewardScaler | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if steps < 1:
            raise UserError(f"steps is {steps}; a rollout has at least one")
        mode = autoreset_mode(environments)
        if mode == AutoresetMode.DISABLED:
            raise UserError("the vector environment does not reset itself: make it with autoreset_mode NEXT_STEP")
        self.same_step = mode == AutoresetMode.SAME_STEP
        self.environments, self.length, self.whole_episodes = environments, steps, whole_episodes
        self.device = torch.device(device)
        self.observation_space = environments.single_observation_space
        if observation_normalizer is not None and not isinstance(self.observation_space, spaces.Box):
            raise UserError(f"observations can be normalised in a Box, and the space is {self.observation_space}")
        self.observation_normalizer, self.reward_scaler = observation_normalizer, reward_scaler
        count = environments.num_envs
        self.seed = seed
        self.obs: np.ndarray | None = None  # what the next decision is taken on; None before the first reset
        self.resetting = np.zeros(count, dtype=bool)  # the next step only resets
        self.episode_return, self.episode_length = np.zeros(count), np.zeros(count, dtype=np.int64)
        self.finished: deque[tuple[float, int]] = deque(maxlen=100)
        self.steps, self.episodes = 0, 0

    @torch.no_grad()
    def __call__(self, policy: nn.Module) -> Rollout:
        """Sample one rollout."""
        policy.eval()
        count, length = self.environments.num_envs, self.length
        if self.obs is None or self.whole_episodes:
            self._reset()
        assert self.obs is not None
        obs = np.zeros((count, length, *self.obs.shape[1:]), dtype=self.obs.dtype)
        final = np.zeros_like(obs) if self.same_step else None
        reward = np.zeros((count, length), dtype=np.float64)
        terminated, ended, mask = (np.zeros((count, length), dtype=bool) for _ in range(3))
        actions, logps = [], []
        for t in range(length):
            action, logp = self._draw(policy)
            actions.append(action)
            logps.append(logp)
            obs[:, t], mask[:, t] = self.obs, ~self.resetting
            reward[:, t], terminated[:, t], ended[:, t], last = self._step(self._hand_over(policy, action[:, 0]))
            if final is not None:
                final[:, t] = last
            if self.whole_episodes and self.resetting.all():
                break
        if self.whole_episodes:
            self._finish(~self.resetting)  # the longest that an episode may be has passed
        spare = length - len(actions)
        if spare:
            obs[:, len(actions)] = self.obs  # where the episodes that ended last stopped
        ended |= ~mask
        action, logp = (torch.cat(x, 1) for x in (actions, logps))
        columns = {
            "obs": obs,
            "action": torch.cat([action, action.new_zeros(count, spare, *action.shape[2:])], 1).cpu().numpy(),
            "logp": torch.cat([logp, logp.new_zeros(count, spare)], 1).cpu().numpy(),
            "reward": reward,
            "terminated": terminated,
            "ended": ended,
            "mask": mask,
        }
        final_obs = self.obs
        if final is not None:
            columns, final_obs = next_step_layout(columns, final, final_obs)
        self.steps += int(columns["mask"].sum())
        return Rollout(
            **{name: self._tensor(column) for name, column in columns.items()},
            group=torch.arange(count, device=self.device),
            final_obs=self._tensor(final_obs),
            memoryless=True,
            metrics=self._metrics(),
        )

    @torch.no_grad()
    def play(self, policy: nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a rollout of `whole_episodes` adds up to, no step kept: returns, lengths, whether each ended; [B]."""
        assert self.whole_episodes
        policy.eval()
        self._reset()
        total, length = np.zeros(len(self.resetting)), np.zeros(len(self.resetting), dtype=np.int64)
        for _ in range(self.length):
            length += ~self.resetting
            action, _ = self._draw(policy)
            reward, *_ = self._step(self._hand_over(policy, action[:, 0]))
            total += reward.astype(_DTYPES[torch.get_default_dtype()])  # as a rollout has it
            if self.resetting.all():
                break
        self.steps += int(length.sum())
        return total, length, self.resetting.copy()

    def state_dict(self) -> dict[str, Any]:
        """All that changes here; the environments' own state is theirs."""
        state = {name: getattr(self, name) for name in _STATE} | {"finished": list(self.finished)}
        if self.observation_normalizer is not None:
            state["observations"] = self.observation_normalizer.statistics.state_dict()
        if self.reward_scaler is not None:
            state["rewards"] = self.reward_scaler.statistics.state_dict()
            state["returns"] = self.reward_scaler.returns
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What state_dict gave."""
        state = copy.deepcopy(state)
        for name in _STATE:
            setattr(self, name, state[name])
        self.finished = deque((tuple(x) for x in state["finished"]), maxlen=100)
        if self.observation_normalizer is not None:
            self.observation_normalizer.statistics.load_state_dict(state["observations"])
        if self.reward_scaler is not None:
            self.reward_scaler.statistics.load_state_dict(state["rewards"])
            self.reward_scaler.returns = state["returns"]

    def _reset(self) -> None:
        try:
            obs, _ = self.environments.reset(seed=self.seed)
        except Exception as error:
            raise _failure("reset", error) from error
        self.seed = None  # later resets go on from the environments' own random state
        self.resetting[:] = False
        self.episode_return[:] = 0.0
        self.episode_length[:] = 0
        if self.reward_scaler is not None:
            self.reward_scaler.returns[:] = 0.0
        self.obs = self._receive(obs, ~self.resetting)

    def _draw(self, policy: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        """An action for each environment, [B, 1, ...], and its log-probability, [B, 1]; both finite."""
        assert self.obs is not None
        distribution = policy(torch.from_numpy(self.obs).to(self.device).unsqueeze(1))
        try:
            action = distribution.sample()
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            raise _not_finite("probability") from error
        logp = distribution.log_prob(action)
        total = logp.sum() + action.sum() if action.is_floating_point() else logp.sum()
        if not math.isfinite(total):  # then look closely: only where it counts
            counts = torch.from_numpy(~self.resetting).to(action.device)
            for name, x in (("action", action), ("log-probability", logp)):
                if not x[counts].isfinite().all():
                    raise _not_finite(name)
        return action, logp

    def _step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Step the environments: reward, terminated, ended, and in same-step mode where those that ended stopped."""
        try:
            obs, reward, terminated, truncated, info = self.environments.step(action)
        except Exception as error:
            raise _failure("step", error) from error
        counts = ~self.resetting
        if np.shape(reward) != counts.shape:
            raise UserError(
                f"the environments returned rewards of shape {np.shape(reward)}, not {counts.shape}: mend their step"
            )
        reward = np.where(counts, reward, 0.0)
        terminated, ended = terminated & counts, (terminated | truncated) & counts
        if not np.isfinite(reward).all():
            raise UserError(
                f"the environment's step returned a reward of {reward[~np.isfinite(reward)][0]}: mend its step"
            )
        self.episode_return += reward
        self.episode_length += counts
        self._finish(ended)
        if self.reward_scaler is not None:
            reward = self.reward_scaler(reward, ended, counts)
        if self.whole_episodes:
            self.resetting = self.resetting | ended
        else:
            self.resetting = np.zeros_like(ended) if self.same_step else ended
        last = None
        if self.same_step:
            last = np.array(obs)
            final = info.get("final_obs")
            for i in np.flatnonzero(ended):
                if final is None or final[i] is None:
                    raise UserError(
                        "the vector environment resets in the same step and its info has no final_obs: put there where "
                        "each episode stopped, or make it with autoreset_mode NEXT_STEP"
                    )
                last[i] = final[i]
            last = self._receive(last, np.zeros_like(ended))
        self.obs = self._receive(obs, ~self.resetting)
        return reward, terminated, ended, last

    def _finish(self, ended: np.ndarray) -> None:
        """Count the episodes of these environments."""
        for i in np.flatnonzero(ended):
            self.finished.append((float(self.episode_return[i]), int(self.episode_length[i])))
            self.episodes += 1
            self.episode_return[i], self.episode_length[i] = 0.0, 0

    def _receive(self, obs: Any, counts: np.ndarray) -> np.ndarray:
        """Observations as they are stored: finite, normalised, in torch's default precision."""
        obs = np.asarray(obs)
        expected = (self.environments.num_envs, *self.observation_space.shape)  # type: ignore[misc]
        if obs.shape != expected:
            raise UserError(
                f"the environments returned observations of shape {obs.shape}, not {expected}: mend the space"
            )
        if isinstance(self.observation_space, spaces.Discrete):
            number = obs - self.observation_space.start
            if not ((number >= 0) & (number < self.observation_space.n)).all():
                raise UserError(
                    f"the environment returned an observation outside its {self.observation_space}: mend the space"
                )
            return obs.astype(np.int64)
        if not np.isfinite(obs).all():
            raise UserError("the environment returned an observation that is NaN or infinite: mend its step or reset")
        if self.observation_normalizer is not None:
            obs = self.observation_normalizer(obs, counts)
        return obs.astype(_DTYPES[torch.get_default_dtype()])

    def _hand_over(self, policy: nn.Module, action: torch.Tensor) -> np.ndarray:
        to_environment = getattr(policy, "to_environment", None)
        if to_environment is None:
            to_environment = head(self.environments.single_action_space).to_environment
        return to_environment(action)

    def _tensor(self, column: np.ndarray) -> torch.Tensor:
        if column.dtype == np.float64:
            column = column.astype(_DTYPES[torch.get_default_dtype()])
        return torch.from_numpy(column).to(self.device)

    def _metrics(self) -> dict[str, float]:
        metrics = {"steps": float(self.steps), "episodes": float(self.episodes)}
        if self.finished:
            returns, lengths = zip(*self.finished, strict=True)
            metrics |= {"return": float(np.mean(returns)), "length": float(np.mean(lengths))}
        return metrics


_STATE = ("seed", "obs", "resetting", "episode_return", "episode_length", "steps", "episodes")
_DTYPES = {torch.float32: np.float32, torch.float64: np.float64}


def next_step_layout(
    columns: dict[str, np.ndarray], final: np.ndarray, last: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Rows sampled with same-step auto-reset, as next-step auto-reset would have given them.

    After each end a masked step is put in that holds the final observation; the steps that no longer fit the row are
    left out. columns: [B, T, ...]; final: [B, T, ...], where each step that ended stopped; last: [B, ...], the
    observations after the last step. Returns the columns and where each row now stops.
    """
    ended = columns["ended"]
    length = ended.shape[1]
    slot = np.arange(length) + np.cumsum(ended, 1) - ended  # one later for every end before
    rows, steps = np.nonzero(slot < length)
    result = {name: np.zeros_like(column) for name, column in columns.items()}
    for name, column in columns.items():
        result[name][rows, slot[rows, steps]] = column[rows, steps]
    rows, steps = np.nonzero(ended & (slot + 1 < length))
    result["obs"][rows, slot[rows, steps] + 1] = final[rows, steps]
    result["ended"] |= ~result["mask"]
    rows, kept = np.arange(len(ended)), (slot < length).sum(1) - 1
    following = np.concatenate([columns["obs"], last[:, None]], 1)[rows, kept + 1]
    stopped = ended[rows, kept].reshape(-1, *[1] * (last.ndim - 1))
    return result, np.where(stopped, final[rows, kept], following)


def _not_finite(name: str) -> UserError:
    return UserError(f"the policy's {name} is not finite: a lower learning_rate or scale_rewards may help")


def _failure(method: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    message = " ".join(str(error).split())
    return UserError(f"the environment raised {type(error).__name__} in {method}: {message} (--debug shows where)")
