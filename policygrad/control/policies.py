"""Policies and critics for Gymnasium's spaces: encoder, multilayer perceptron, head."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Independent, Normal
from torch.nn.functional import one_hot

from policygrad.control.distributions import SquashedNormal
from policygrad.control.spaces import describe, rebuild
from policygrad.errors import UserError

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU}


class Policy(nn.Module):
    """obs [B, T, ...] -> the distribution of the action, of batch_shape [B, T].

    observation_space: Box of any rank (flattened) or Discrete (one-hot). action_space: Discrete, MultiDiscrete,
    MultiBinary, or Box with a diagonal Gaussian: `squash` by tanh onto the bounds, or else clipped at them on the way
    to the environment, after the log-probability was taken; its standard deviation is a parameter, or a function of
    the observation with `state_dependent_std`. `orthogonal`: initial weights of gain sqrt(2), in the last layer
    0.01, as is the field's habit for policy gradients. Raises UserError for any other space.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        orthogonal: bool = True,
        squash: bool = False,
        state_dependent_std: bool = False,
        initial_log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.description = {
            "observation_space": describe(observation_space),
            "action_space": describe(action_space),
            "hidden": list(hidden),
            "activation": activation,
            "orthogonal": orthogonal,
            "squash": squash,
            "state_dependent_std": state_dependent_std,
            "initial_log_std": initial_log_std,
        }
        self.encode = encoder(observation_space)
        self.head = head(action_space, squash, state_dependent_std, initial_log_std)
        sizes = [self.encode.size, *hidden, self.head.size]
        self.network = perceptron(sizes, activation, last_gain=0.01 if orthogonal else None)

    def forward(self, obs: Tensor) -> Distribution:
        return self.head(self.network(self.encode(obs)))

    def to_environment(self, action: Tensor) -> np.ndarray:
        """The action [B, ...] as the environment takes it: shifted to its start, clipped or squashed to its bounds."""
        return self.head.to_environment(action)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Policy":
        """A new policy of the shape that `policy.description` describes."""
        rest = dict(description)
        return cls(rebuild(rest.pop("observation_space")), rebuild(rest.pop("action_space")), **rest)


class Critic(nn.Module):
    """obs [B, T, ...] -> V(s), [B, T]. The arguments are Policy's; the last layer has gain 1."""

    def __init__(
        self,
        observation_space: spaces.Space,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        orthogonal: bool = True,
    ) -> None:
        super().__init__()
        self.encode = encoder(observation_space)
        self.network = perceptron([self.encode.size, *hidden, 1], activation, last_gain=1.0 if orthogonal else None)

    def forward(self, obs: Tensor) -> Tensor:
        return self.network(self.encode(obs)).squeeze(-1)


def perceptron(sizes: Sequence[int], activation: str, last_gain: float | None) -> nn.Sequential:
    """Linear layers with an activation between them. last_gain None leaves torch's own initialisation."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes[:-1]):
        layers += [_linear(inputs, outputs, None if last_gain is None else math.sqrt(2)), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, _linear(sizes[-2], sizes[-1], last_gain))


def _linear(inputs: int, outputs: int, gain: float | None) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    if gain is not None:
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer


# Encoders: obs [B, T, ...] -> features [B, T, size].


class Flatten(nn.Module):
    """A Box of any rank as one vector."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.size = math.prod(shape)

    def forward(self, obs: Tensor) -> Tensor:
        return obs.reshape(*obs.shape[:2], self.size)


class OneHot(nn.Module):
    """A state number as a vector with a single 1."""

    def __init__(self, n: int, start: int) -> None:
        super().__init__()
        self.size, self.start = n, start

    def forward(self, obs: Tensor) -> Tensor:
        return one_hot(obs.long() - self.start, self.size).to(torch.get_default_dtype())


def encoder(space: spaces.Space) -> Flatten | OneHot:
    """The encoder of an observation space. Raises UserError for any but Box and Discrete."""
    if isinstance(space, spaces.Box):
        return Flatten(space.shape)
    if isinstance(space, spaces.Discrete):
        return OneHot(int(space.n), int(space.start))
    raise UserError(
        f"a policy cannot take observations of the space {space}: make the environment with "
        "policygrad.control.make_environments, which flattens Dict and Tuple, or hand in a policy of your own"
    )


# Heads: features [B, T, size] -> distribution, and its actions as the environment takes them.


class CategoricalHead(nn.Module):
    """Discrete(n, start): logits."""

    def __init__(self, space: spaces.Discrete) -> None:
        super().__init__()
        self.size, self.start = int(space.n), int(space.start)

    def forward(self, features: Tensor) -> Distribution:
        return Categorical(logits=features, validate_args=False)

    def to_environment(self, action: Tensor) -> np.ndarray:
        return action.cpu().numpy() + self.start


class MultiCategoricalHead(nn.Module):
    """MultiDiscrete: independent categoricals, their logits padded to the largest by -1e9 (probability exactly 0)."""

    present: Tensor
    place: Tensor

    def __init__(self, space: spaces.MultiDiscrete) -> None:
        super().__init__()
        self.shape, self.start, self.dtype = space.shape, space.start, space.dtype
        counts = torch.as_tensor(space.nvec.reshape(-1), dtype=torch.long)
        self.size = int(counts.sum())
        present = torch.arange(int(counts.max())) < counts.unsqueeze(1)
        place = (present.reshape(-1).cumsum(0) - 1).clamp(min=0).view_as(present)
        self.register_buffer("present", present, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        logits = features[..., self.place].where(self.present, -1e9)
        return Independent(Categorical(logits=logits, validate_args=False), 1, validate_args=False)

    def to_environment(self, action: Tensor) -> np.ndarray:
        return (action.cpu().numpy().reshape(-1, *self.shape) + self.start).astype(self.dtype)


class Coins(Bernoulli):
    """Bernoulli whose mode at a probability of exactly 0.5 is 0, where torch's is NaN."""

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(self.logits)


class BernoulliHead(nn.Module):
    """MultiBinary: independent coins."""

    def __init__(self, space: spaces.MultiBinary) -> None:
        super().__init__()
        self.shape, self.dtype = space.shape, space.dtype
        self.size = math.prod(space.shape)

    def forward(self, features: Tensor) -> Distribution:
        return Independent(Coins(logits=features, validate_args=False), 1, validate_args=False)

    def to_environment(self, action: Tensor) -> np.ndarray:
        return action.cpu().numpy().reshape(-1, *self.shape).astype(self.dtype)


class NormalHead(nn.Module):
    """Box: a diagonal Gaussian, clipped at the bounds on the way to the environment, or squashed onto them."""

    half_width: Tensor

    def __init__(self, space: spaces.Box, squash: bool, state_dependent_std: bool, initial_log_std: float) -> None:
        super().__init__()
        self.shape, self.dtype, self.squash = space.shape, space.dtype, squash
        self.low, self.high = (np.asarray(x, dtype=np.float64) for x in (space.low, space.high))
        if squash and not (np.isfinite(self.low).all() and np.isfinite(self.high).all()):
            raise UserError(f"squash needs finite bounds, and the action space is {space}: leave squash off")
        if squash and (self.low >= self.high).any():
            bound = self.low[self.low >= self.high][0]
            raise UserError(
                f"squash needs low < high in every dimension, and the action space has low = high = {bound:g}: leave "
                "squash off, or wrap the environment so that the dimension is not an action"
            )
        dimensions = math.prod(space.shape)
        self.size = 2 * dimensions if state_dependent_std else dimensions
        self.initial_log_std = initial_log_std
        self.log_std = None if state_dependent_std else nn.Parameter(torch.full((dimensions,), initial_log_std))
        half_width = torch.as_tensor((self.high - self.low).reshape(-1) / 2, dtype=torch.get_default_dtype())
        self.register_buffer("half_width", half_width, persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        if self.log_std is None:
            mean, log_std = features.chunk(2, -1)
            log_std = (log_std + self.initial_log_std).clamp(-20, 2)
        else:
            mean, log_std = features, self.log_std.expand_as(features)
        if self.squash:
            return SquashedNormal(mean, log_std.exp(), self.half_width)
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1, validate_args=False)

    def to_environment(self, action: Tensor) -> np.ndarray:
        numbers = action.detach().double().cpu().numpy().reshape(-1, *self.shape)
        if self.squash:
            numbers = self.low + (np.tanh(numbers) + 1) / 2 * (self.high - self.low)
        numbers = np.clip(numbers, self.low, self.high)
        return (np.rint(numbers) if self.dtype.kind in "iu" else numbers).astype(self.dtype)


def head(
    space: spaces.Space, squash: bool = False, state_dependent_std: bool = False, initial_log_std: float = 0.0
) -> Any:
    """The head of an action space. Raises UserError for a space it has none for, or options that do not apply."""
    if isinstance(space, spaces.Box):
        return NormalHead(space, squash, state_dependent_std, initial_log_std)
    gaussian = {"squash": squash, "state_dependent_std": state_dependent_std, "initial_log_std": initial_log_std}
    for option, value in gaussian.items():
        if value:
            raise UserError(f"{option} is for Box actions, and the action space is {space}: leave it out")
    if isinstance(space, spaces.Discrete):
        return CategoricalHead(space)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategoricalHead(space)
    if isinstance(space, spaces.MultiBinary):
        return BernoulliHead(space)
    describe(space)  # raises
    raise UserError(f"no head for the action space {space}")
