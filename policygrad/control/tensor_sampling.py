"""Stepping and acting in environments of tensors: what is sampled stays on their device."""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from policygrad.control.actors import DistributionActor
from policygrad.control.checks import checked_observations, checked_reward, stored, stored_dtype
from policygrad.control.masks import check_masks, choices
from policygrad.control.normalization import RunningStatistics
from policygrad.control.spaces import Flat
from policygrad.control.stepping import Stepping
from policygrad.control.tensors import normalized, tensor, to_environment
from policygrad.errors import UserError

ARRAYS = ("resetting", "starting", "episode_return", "episode_length")  # of Stepping, [B]


class TensorStepping(Stepping):
    """Stepping of TensorEnvironments: all that is [B, ...] are tensors on their device, and every promise is the same.

    Running statistics, of one observation's size, are merged in NumPy, and the returns and lengths of episodes that end
    become Python's numbers. Where a check fails, the same check in NumPy says why.
    """

    def state_dict(self) -> dict[str, Any]:
        """As Stepping's, on the CPU."""
        state = super().state_dict()
        return {name: x.cpu().clone() if isinstance(x, Tensor) else x for name, x in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict."""
        super().load_state_dict(state)
        device = self.environments.unwrapped.device  # type: ignore[attr-defined]
        self.obs = None if self.obs is None else torch.as_tensor(self.obs, device=device)
        self._to(device)

    def _to(self, device: torch.device) -> None:
        """Move what there is for each environment to a device."""
        for name in ARRAYS:
            setattr(self, name, torch.as_tensor(getattr(self, name), device=device))
        if self.reward_scaler is not None:
            returns: Any = torch.as_tensor(self.reward_scaler.returns, device=device)
            self.reward_scaler.returns = returns

    def _is_finite(self, action: Tensor) -> bool:
        return not action.is_floating_point() or bool(action.isfinite().all())

    def _where(self, chosen: Tensor) -> list[int]:
        return chosen.nonzero()[:, 0].tolist()

    def _renewed(self, info: dict[str, Any]) -> None:
        return None  # none is made anew

    def _numbers(self, info: Any) -> Any:
        numbers = info if isinstance(info, dict) else {}
        return {name: tensor(x).cpu().numpy() for name, x in numbers.items() if hasattr(x, "__dlpack__")}

    def _rewarded(self, reward: Tensor, counts: Tensor) -> Any:
        if reward.shape == counts.shape:
            reward = reward if reward.is_floating_point() else reward.double()
            found = reward.where(counts, 0.0)
            if bool((found.abs() <= torch.finfo(torch.get_default_dtype()).max).all()):
                return found
        return checked_reward(reward.cpu().numpy(), counts.cpu().numpy())  # raises

    def _scaled(self, reward: Tensor, ended: Tensor, counts: Tensor) -> Any:
        scaler: Any = self.reward_scaler
        scaler.returns = (scaler.gamma * scaler.returns + reward).where(counts, scaler.returns)
        _merge(scaler.statistics, scaler.returns[counts])
        scaler.returns[ended] = 0.0
        std = float(np.sqrt(scaler.statistics.var))
        return (reward.double() / std).clamp(-10, 10) if std > 0 else torch.zeros_like(reward)

    def _final(self, obs: Tensor, ended: Tensor, info: Any) -> Tensor:
        final = info.get("final_obs")
        if final is None:
            if not bool(ended.any()):
                return obs
            raise UserError(
                "the vector environment resets in the same step without final_obs in its info: add the last "
                "observations of all there, [B, ...], or make it with autoreset_mode NEXT_STEP"
            )
        return torch.where(ended.reshape(-1, *[1] * (obs.ndim - 1)), final, obs)

    def _received(self, obs: Tensor, counts: Any) -> Any:
        if not isinstance(self.resetting, Tensor) or self.resetting.device != obs.device:
            self._to(obs.device)
        counts, space = torch.as_tensor(counts, device=obs.device), self.observation_space
        obs = _checked(obs, space, self.environments.num_envs)
        if isinstance(space, Flat) and space.mask is not None:
            mask = obs[:, space.mask]
            parts = mask.split(choices(self.environments.single_action_space), 1)
            allowed = torch.stack([x.any(1) for x in parts], 1)
            if not bool(((mask == 0) | (mask == 1)).all() & allowed[counts].all()):
                check_masks(obs.cpu().numpy(), counts.cpu().numpy(), space, self.environments.single_action_space)
        normalizer, received = self.observation_normalizer, obs
        if normalizer is not None:
            if not normalizer.frozen:
                _merge(normalizer.statistics, obs[counts])
            statistics = normalizer.statistics
            mean, var = (torch.as_tensor(x, device=obs.device) for x in (statistics.mean, statistics.var))
            kept = None if normalizer.kept is None else torch.as_tensor(normalizer.kept, device=obs.device)
            received = normalized(obs, mean, var.sqrt(), kept)
        dtype = torch.from_numpy(np.zeros(0, stored_dtype(np.dtype(space.dtype)))).dtype
        found = received.to(dtype, copy=True)  # environments may write into their observations
        if received.dtype == torch.float64 and not bool(found.isfinite().all()):
            stored(received.cpu().numpy())  # raises
        return found


class TensorActor(DistributionActor):
    """Actions of any policy in environments of tensors, sampled by its own distributions, on its own device."""

    def _returned(self, distribution: Any, action: Tensor) -> tuple[Tensor, Tensor]:
        own = getattr(distribution, "distribution", distribution)  # the one that a mode is of
        return action, to_environment(action, own, self.space)


def _checked(obs: Tensor, space: spaces.Space, count: int) -> Tensor:
    """Observations of the right shape, finite, whole where the space is: as checked_observations has them."""
    whole = np.dtype(space.dtype).kind in "biu"
    if obs.shape == (count, *(space.shape or ())) and obs.is_floating_point() != whole:
        found, sound = obs, True
        if whole:
            found = obs.to(torch.from_numpy(np.zeros(0, stored_dtype(np.dtype(space.dtype)))).dtype)
            sound = isinstance(space, spaces.Box | spaces.Discrete) and found.dtype == obs.dtype
            if isinstance(space, spaces.Discrete):
                sound = bool(((obs >= int(space.start)) & (obs < int(space.start + space.n))).all())
        else:
            sound = bool(obs.isfinite().all())
        if sound:
            return found
    return torch.from_numpy(checked_observations(obs.cpu().numpy(), space, count)).to(obs.device)


def _merge(statistics: RunningStatistics, x: Tensor) -> None:
    """Merge x [N, *shape] into running statistics, its sums taken where it is."""
    if len(x):
        x = x.double()
        mean = x[0] + (x - x[0]).mean(0)
        statistics.merge(len(x), *torch.stack([mean, ((x - mean) ** 2).sum(0)]).cpu().numpy())
