"""Actors: what a sampler asks for actions, a step at a time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from policygrad.control.acting import Mode
from policygrad.control.checks import Arrays, as_tensor, called, checked_distribution
from policygrad.control.encoders import Flatten
from policygrad.control.memory import Rows
from policygrad.control.policies import CategoricalHead, NormalHead, Policy
from policygrad.control.spaces import to_environment
from policygrad.errors import NonFiniteError
from policygrad.rollout import state_size

BLOCK = 128  # the most steps whose noise and outputs are set aside at a time
IN_PLACE: dict[type, Callable[[Tensor], Tensor]] = {nn.Tanh: torch.tanh_, nn.ReLU: torch.relu_}


class Actor(ABC):
    """A policy that acts step by step, as it is when the actor is made.

    state: [B, S], what it remembers, S = 0 without memory; it changes with each step.
    """

    state: Tensor

    @abstractmethod
    def __call__(self, obs: Arrays, counts: Arrays, start: Arrays) -> tuple[Arrays, Arrays]:
        """The next actions [B, ...], as they are stored and as the environment takes them.

        obs: [B, ...]; counts: [B], False where the action will not be used; start: [B], where an episode starts. Raises
        UserError where a number of the policy's is not finite.
        """

    @abstractmethod
    def log_probabilities(self, action: Tensor) -> Tensor:
        """log pi(a | s) of the actions [B, T, ...] so far, [B, T]."""


class DistributionActor(Actor):
    """Actions of any policy, sampled by its own distributions, from torch's global generator.

    Raises UserError where the policy returns no distribution of the space's actions.
    """

    def __init__(self, policy: nn.Module, space: spaces.Space, device: torch.device, rows: int, *, keep: bool) -> None:
        self.policy, self.space, self.device, self.keep = policy, space, device, keep
        self.state = _empty(policy, rows)
        self.logp: list[Tensor] = []

    def __call__(self, obs: Arrays, counts: Arrays, start: Arrays) -> tuple[Arrays, Arrays]:
        given = as_tensor(obs, self.device).unsqueeze(1)
        if self.state.shape[1]:
            rows = Rows(
                given, as_tensor(start, self.device).unsqueeze(1), self.state.unsqueeze(1), self.state[:, None, :0]
            )
            found, self.state = self.policy.unrolled(rows)  # type: ignore[operator]
        else:
            found = called(self.policy, given)
        distribution = checked_distribution(found, len(obs), self.space)
        try:
            action = distribution.sample()
        except RuntimeError as error:
            said = {"probability tensor contains": "probability", "all elements of std": "standard deviation"}
            if not (name := next((said[x] for x in said if x in str(error)), "")):
                raise
            shown = next((x for x in vars(distribution).values() if isinstance(x, Tensor)), given)
            raise not_finite(name, shown, torch.as_tensor(counts)) from error
        logp = distribution.log_prob(action)
        total = logp.sum() + action.sum() if action.is_floating_point() else logp.sum()
        if not math.isfinite(total):  # then look closely: only where it counts
            for name, x in (("action", action), ("log-probability", logp)):
                if not x[torch.as_tensor(counts).to(x.device)].isfinite().all():
                    raise not_finite(name, x, torch.as_tensor(counts))
        if self.keep:
            self.logp.append(logp[:, 0])
        return self._returned(distribution, action[:, 0])

    def _returned(self, distribution: Any, action: Tensor) -> tuple[Arrays, Arrays]:
        """The actions [B, ...] as they are stored, and as the environment takes them."""
        owned = hasattr(distribution, "to_environment")
        taken = distribution.to_environment(action) if owned else to_environment(action.cpu().numpy(), self.space)
        return action.cpu().numpy(), taken

    def log_probabilities(self, action: Tensor) -> Tensor:
        return torch.stack(self.logp, 1)


class PerceptronActor(Actor):
    """Actions of a perceptron with a categorical or a Gaussian head, without a distribution at each step.

    The layers write into the same memory at each step, in the operations of the policy's own forward pass, and give
    the same numbers. An action is a function of the network's output and of noise that is drawn beforehand (the head's
    `noise` and `choose`). Its log-probability is computed once for all steps, of the same outputs.
    """

    def __init__(
        self,
        policy: Policy,
        device: torch.device,
        rows: int,
        steps: int,
        generator: np.random.Generator | None,
        *,
        keep: bool,
    ) -> None:
        self.policy, self.device, self.rows, self.generator, self.keep = policy, device, rows, generator, keep
        self.block, self.state = min(BLOCK, steps), _empty(policy, rows)
        linear = [x for x in policy.network if isinstance(x, nn.Linear)]
        activations = [IN_PLACE[type(x)] for x in policy.network if not isinstance(x, nn.Linear)]
        layers = [(x.bias.detach(), x.weight.detach().t()) for x in linear]
        self.hidden = [
            (bias, weight, torch.empty(rows, len(bias), dtype=bias.dtype, device=device), activation)
            for (bias, weight), activation in zip(layers[:-1], activations, strict=True)
        ]
        self.last = layers[-1]
        plain = isinstance(policy.encode, Flatten) and policy.memory is None and policy.mask is None
        self.given: Tensor | None = None  # where observations go that the first layer takes as they are
        if plain and device.type == "cpu":
            self.given = torch.empty(rows, layers[0][1].shape[0], dtype=layers[0][1].dtype)
            self.given_host = self.given.numpy()
        self.choose = policy.head.choice()
        self.outputs: list[Tensor] = []  # blocks [block, B, F]
        self.t = 0

    def __call__(self, obs: np.ndarray, counts: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        k = self.t % self.block
        if k == 0:
            self._next_block()
        x, allowed = self._encoded(obs, start)
        for bias, weight, memory, activate in self.hidden:
            x = activate(torch.addmm(bias, x, weight, out=memory))
        torch.addmm(self.last[0], x, self.last[1], out=self.outputs[-1][k])
        if allowed is not None:
            self.outputs[-1][k] = self.policy.head.masked(self.outputs[-1][k], allowed)
        output = self.host[k] if self.host is not None else self.outputs[-1][k].cpu().numpy()
        if not np.isfinite(output.sum()) and not np.isfinite(output[counts]).all():
            raise not_finite("output", torch.from_numpy(output), torch.from_numpy(counts))
        self.t += 1
        action = self.choose(output, None if self.noise is None else self.noise[k])
        return action, self.policy.head.to_environment(action)

    def _encoded(self, obs: np.ndarray, start: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """What the first layer takes [B, F], and the actions that are allowed, where there are masks."""
        if self.given is not None and obs.dtype == self.given_host.dtype:
            np.copyto(self.given_host, obs.reshape(self.rows, -1))
            return self.given, None
        x = as_tensor(obs, self.device)
        allowed = None if self.policy.mask is None else x[:, self.policy.mask] != 0
        x = self.policy.encode(x.unsqueeze(1)).squeeze(1)
        if self.policy.memory is not None:
            begins = as_tensor(start, self.device).unsqueeze(1)
            x, self.state = self.policy.memory.unrolled(x.unsqueeze(1), begins, self.state)
            x = x.squeeze(1)
        return x, allowed

    def log_probabilities(self, action: Tensor) -> Tensor:
        output = torch.cat(self.outputs)[: self.t].transpose(0, 1)
        return self.policy.head(output).log_prob(action)

    def _next_block(self) -> None:
        head, dtype = self.policy.head, self.last[0].dtype
        if self.outputs and not self.keep:
            self.outputs.clear()
        self.outputs.append(torch.empty(self.block, self.rows, head.size, dtype=dtype, device=self.device))
        self.host = self.outputs[-1].numpy() if self.device.type == "cpu" else None
        self.noise = None if self.generator is None else head.noise(self.generator, (self.block, self.rows))


def actor(
    policy: nn.Module,
    space: spaces.Space,
    device: torch.device,
    rows: int,
    steps: int,
    generator: np.random.Generator,
    *,
    keep: bool = True,
) -> Actor:
    """The actor of a policy for `rows` environments with this action space, and for at most so many steps.

    generator: of the noise. keep: whether log_probabilities will be asked for.
    """
    own = policy.policy if isinstance(policy, Mode) else policy
    if _is_plain(own):
        return PerceptronActor(own, device, rows, steps, generator if own is policy else None, keep=keep)  # type: ignore[arg-type]
    return DistributionActor(policy, space, device, rows, keep=keep)


def _empty(policy: nn.Module, rows: int) -> Tensor:
    return policy.initial(rows) if state_size(policy) else torch.zeros(rows, 0)  # type: ignore[operator]


def _is_plain(policy: nn.Module) -> bool:
    """Whether calling a policy does no more than its layers do, and PerceptronActor knows its layers and its head."""
    return (
        type(policy) is Policy
        and policy.description is not None  # else its encoder is the user's own, and may draw
        and all(p.dtype == torch.get_default_dtype() for p in policy.parameters())  # that of observations
        and isinstance(policy.head, CategoricalHead | NormalHead)
        and all(type(x) is nn.Linear or type(x) in IN_PLACE for x in policy.network)
        and not any(x._forward_hooks or x._forward_pre_hooks or "forward" in vars(x) for x in policy.modules())
    )


def not_finite(name: str, x: Tensor, counts: Tensor) -> NonFiniteError:
    """A number of the policy's is NaN or infinite. x: [B, ...], by environment. counts: where it matters, [B, ...]."""
    wrong = (~x.isfinite().cpu().reshape(len(x), -1)).any(1) & counts.cpu().reshape(len(x), -1).any(1)
    at = f" for environment {int(wrong.nonzero()[0])} of {len(x)}" if wrong.any() else ""
    return NonFiniteError(f"the policy's {name} is not finite{at}: try a lower learning_rate or scale_rewards")
