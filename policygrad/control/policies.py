"""Policies and critics for Gymnasium's spaces: encoder, multilayer perceptron, head."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Normal
from torch.nn.functional import softplus

from policygrad.control.acting import act
from policygrad.control.distributions import (
    ClippedNormal,
    Coins,
    DiscreteActions,
    IndependentActions,
    JointActions,
    ScaledBeta,
    SquashedNormal,
    clipped,
    squashed,
)
from policygrad.control.encoders import chosen, make_encoder
from policygrad.control.masks import check_mask_space, choices, is_box
from policygrad.control.memory import Rows, make_memory, rows_of
from policygrad.control.spaces import Flat, FlatActions, describe, rebuild, to_environment, units
from policygrad.errors import UserError, one_line, shortened

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "gelu": nn.GELU, "silu": nn.SiLU}
AUTOCAST = {None: None, "bfloat16": torch.bfloat16}  # as a description names them
DISTRIBUTIONS = ("normal", "squashed", "beta")  # of Box actions


class Policy(nn.Module):
    """obs [B, T, ...] -> the distribution of the action, of batch_shape [B, T].

    observation_space: Box of any rank or Discrete, or Flat, a Dict or Tuple as one vector, packed or not; encoder,
    channels, keys and autocast say how it becomes features (make_encoder). Where it has an action mask the distribution
    is that of the allowed actions, and the network does not see the mask. memory: `gru`, `lstm` or `transformer` (over
    memory_window steps) after the encoder, of memory_size features; it then takes Rows, and observations alone are rows
    that start an episode. action_space: Discrete, MultiDiscrete, MultiBinary, or Box with a `distribution` of its own;
    or FlatActions, a Dict or Tuple of these. hidden: the layers after the encoder; () is none. distribution: "normal"
    is a diagonal Gaussian in units where the bounds are -1 and 1 (see spaces.units), whose action is clipped at them on
    the way to the environment, and whose log-probability is that of the unclipped action; "squashed" maps it onto the
    bounds by tanh; "beta" is a Beta distribution between them. The Gaussian's standard deviation is a parameter, or a
    function of the observation with `state_dependent_std`; at first its logarithm is initial_log_std, from -20 to 10.
    `orthogonal`: orthogonal initial weights of gain sqrt(2), and 0.01 in the last layer. Raises UserError for any other
    space, and for a mask of another size than the actions have choices.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        encoder: str | nn.Module = "auto",
        channels: str = "auto",
        keys: Sequence[str] = (),
        autocast: torch.dtype | None = None,
        memory: str = "none",
        memory_size: int = 64,
        memory_window: int = 16,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        orthogonal: bool = True,
        distribution: str = "normal",
        state_dependent_std: bool = False,
        initial_log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.description: dict[str, Any] | None = None  # with an encoder of the user's own, it cannot be rebuilt
        if not isinstance(encoder, nn.Module):
            encoder, channels = chosen(observation_space, encoder, channels)
            self.description = {
                "observation_space": describe(observation_space),
                "action_space": describe(action_space),
                "encoder": encoder,
                "channels": channels,
                "keys": list(keys),
                "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
                "memory": memory,
                "memory_size": memory_size,
                "memory_window": memory_window,
                "hidden": list(hidden),
                "activation": activation,
                "orthogonal": orthogonal,
                "distribution": distribution,
                "state_dependent_std": state_dependent_std,
                "initial_log_std": initial_log_std,
            }
        self.encode = make_encoder(observation_space, encoder, channels, orthogonal, keys, autocast)
        self.memory = make_memory(memory, self.encode.size, memory_size, memory_window, orthogonal)
        self.observation_space, self.action_space = observation_space, action_space
        check_mask_space(observation_space, action_space)
        of = observation_space
        self.mask = of.mask if isinstance(of, Flat) else None
        self.allowed = of.place(of.mask) if isinstance(of, Flat) and of.mask is not None else None
        self.head = head(action_space, distribution, state_dependent_std, initial_log_std)
        sizes = [_width(self.encode, self.memory), *hidden, self.head.size]
        self.network = perceptron(sizes, activation, last_gain=0.01 if orthogonal else None)

    def forward(self, obs: Any) -> Distribution:
        return self.distribution(obs, self.features(obs))

    def features(self, obs: Any) -> Tensor:
        """What the hidden layers are given, [B, T, F]: the observations encoded, and remembered."""
        if self.memory is None:
            return self.encode(obs)
        rows = rows_of(obs, self.memory.state_size)
        return self.memory(self.encode(rows.obs), rows.start, rows.state[:, 0])

    def initial(self, batch: int) -> Tensor:
        """The empty memory [batch, S]; S = 0 without one."""
        return _empty(self, batch)

    def unrolled(self, obs: Any) -> tuple[Distribution, Tensor]:
        """The distribution at each step of Rows, and the memory [B, S] after the last."""
        rows = rows_of(obs, self.initial(1).shape[-1])
        features, state = self.encode(rows.obs), rows.state[:, 0]
        if self.memory is not None:
            features, state = self.memory.unrolled(features, rows.start, state)
        return self.distribution(rows, features), state

    def distribution(self, obs: Any, features: Tensor) -> Distribution:
        """The distribution at observations of which `features` are known."""
        output = self.network(features)
        if self.allowed is None:
            return self.head(output)
        obs = obs.obs if isinstance(obs, Rows) else obs
        return self.head(self.head.masked(output, self.allowed.of(obs) != 0))

    def act(self, obs: Any, state: Any = None, *, greedy: bool = True) -> Any:
        """The environment's action for one observation, or actions [B, ...] for a batch, as numpy has them.

        greedy: the mode of the distribution, else a sample. With memory: (action, state), to be handed in again at the
        next step; None is the empty memory. The observations are those that the policy was trained on; `run.act`
        normalizes the environment's own.
        """
        return act(self, obs, self.observation_space, self.action_space, state=state, greedy=greedy)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "Policy":
        """A new policy with the arguments in `policy.description`."""
        rest = {**description, "autocast": AUTOCAST[description.get("autocast")]}
        return cls(rebuild(rest.pop("observation_space")), rebuild(rest.pop("action_space")), **rest)


class Critic(nn.Module):
    """obs [B, T, ...] -> V(s) = scale network(s), [B, T]. The arguments are Policy's.

    of: a policy whose encoder and memory it shares, in place of its own; with_policy then computes them once. A critic
    without memory takes Rows, too.

    The scale is the root mean square of the rewards that are not 0 (samplers.InUnits), so that the network learns the
    same numbers in any unit of reward (as PopArt, van Hasselt et al. 2016, arXiv 1602.07714, which takes the size of
    the targets instead). A step of the optimizer then moves V by a share of one reward. In units of a whole return,
    that step would be as large as the differences between states that the advantages are made of.
    """

    square: Tensor
    scale: Tensor
    rescaled: Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        *,
        encoder: str | nn.Module = "auto",
        channels: str = "auto",
        keys: Sequence[str] = (),
        autocast: torch.dtype | None = None,
        memory: str = "none",
        memory_size: int = 64,
        memory_window: int = 16,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        orthogonal: bool = True,
        of: Policy | None = None,
    ) -> None:
        super().__init__()
        self.shares = of is not None
        if of is None:
            self.encode = make_encoder(observation_space, encoder, channels, orthogonal, keys, autocast)
            self.memory = make_memory(memory, self.encode.size, memory_size, memory_window, orthogonal)
        else:
            self.encode, self.memory = of.encode, of.memory
        sizes = [_width(self.encode, self.memory), *hidden, 1]
        self.network = perceptron(sizes, activation, last_gain=1.0 if orthogonal else None)
        self.register_buffer("square", torch.ones(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("rescaled", torch.zeros((), dtype=torch.long))  # how often

    def forward(self, obs: Any) -> Tensor:
        if self.memory is None:
            features = self.encode(obs.obs if isinstance(obs, Rows) else obs)
            return self._value(features)
        rows = rows_of(obs, self.memory.state_size)
        return self._value(self.memory(self.encode(rows.obs), rows.start, self._state(rows)))

    def with_policy(self, policy: nn.Module, obs: Any) -> tuple[Distribution, Tensor]:
        """The policy's distribution and V(s), and what both share computed once (critics.both)."""
        if not (self.shares and isinstance(policy, Policy) and self.encode is policy.encode):
            return policy(obs), self(obs)
        features = policy.features(obs)
        return policy.distribution(obs, features), self._value(features)

    def initial(self, batch: int) -> Tensor:
        """The empty memory [batch, S] of its own; S = 0 without one, and where it shares the policy's."""
        return _empty(self, batch)[:, : 0 if self.shares else None]

    def unrolled(self, obs: Any) -> tuple[Tensor, Tensor]:
        """V(s) at each step of Rows, and the memory [B, S] after the last."""
        assert self.memory is not None
        rows = rows_of(obs, self.memory.state_size)
        features, state = self.memory.unrolled(self.encode(rows.obs), rows.start, self._state(rows))
        return self._value(features), state

    def _state(self, rows: Rows) -> Tensor:
        state = (rows.state if self.shares else rows.critic_state)[:, 0]
        if self.memory is not None and state.shape[-1] != self.memory.state_size:
            whose = "the policy's memory" if self.shares else "this critic's memory: make it with critic=critic"
            raise UserError(f"the sampler's rows do not have {whose}")
        return state

    def _value(self, features: Tensor) -> Tensor:
        return self.scale * self.network(features).squeeze(-1)

    @torch.no_grad()
    def rescale(self, square: Tensor) -> None:
        """Follow the mean square of new rewards, and keep every V(s) as it is, but for the first rewards.

        It is averaged over the first ten calls, and a moving average after that. Rewards of only 0 say nothing.
        """
        if not 0 < square < math.inf:
            return
        self.rescaled += 1
        self.square.lerp_(square, (1 / self.rescaled).clamp(min=0.1))
        before = self.scale.clone()
        self.scale.copy_(self.square.sqrt())
        if self.rescaled > 1:  # before that, V has no unit yet
            last: Any = self.network[-1]
            for p in last.parameters():
                p.mul_(before / self.scale)


def _width(encode: Any, memory: Any) -> int:
    """The number of features that reach the hidden layers."""
    return encode.size if memory is None else memory.size


def _empty(module: Any, batch: int) -> Tensor:
    """The empty memory of a policy or critic, [batch, S]."""
    p = next(module.network.parameters())
    return torch.zeros(batch, 0 if module.memory is None else module.memory.state_size, dtype=p.dtype, device=p.device)


def perceptron(sizes: Sequence[int], activation: str, last_gain: float | None) -> nn.Sequential:
    """Linear layers with an activation between them. last_gain None leaves torch's own initialization."""
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


# Heads: features [B, T, size] -> distribution of batch_shape [B, T]. For acting, `noise`, `choice` and `to_environment`
# do the same in numpy: an action is a function of the network's output and of noise that is drawn beforehand.
Choice = Callable[[np.ndarray, np.ndarray | None], np.ndarray]

NEVER = -1e9  # the logit of a choice that is not there: its probability is exactly 0


class CategoricalHead(nn.Module):
    """Discrete(n, start): logits."""

    def __init__(self, space: spaces.Discrete) -> None:
        super().__init__()
        self.space, self.size = space, int(space.n)

    def forward(self, features: Tensor) -> Distribution:
        return DiscreteActions(self.space, features)

    def masked(self, features: Tensor, allowed: Tensor) -> Tensor:
        """Logits of the allowed actions alone. allowed: [..., n]."""
        return features.where(allowed, NEVER)

    def noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Gumbel noise, [*shape, n]: argmax(logits + noise) is a sample (Yellott 1977; Maddison et al. 2014)."""
        return -np.log(generator.standard_exponential((*shape, self.size)))

    def choice(self) -> Choice:
        """(logits [B, n], noise) -> actions [B]; without noise, the mode."""
        return lambda logits, noise: (logits if noise is None else logits + noise).argmax(-1)

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """The actions [B] as the environment receives them."""
        return to_environment(action, self.space)


class MultiCategoricalHead(nn.Module):
    """MultiDiscrete: independent categoricals, their logits padded to the largest number of choices."""

    present: Tensor
    place: Tensor

    def __init__(self, space: spaces.MultiDiscrete) -> None:
        super().__init__()
        self.space = space
        counts = torch.as_tensor(space.nvec.reshape(-1), dtype=torch.long)
        self.size = int(counts.sum())
        present = torch.arange(int(counts.max())) < counts.unsqueeze(1)
        place = (present.reshape(-1).cumsum(0) - 1).clamp(min=0).view_as(present)
        self.register_buffer("present", present, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        logits = features[..., self.place].where(self.present, NEVER)
        return IndependentActions(self.space, Categorical(logits=logits, validate_args=False))

    def masked(self, features: Tensor, allowed: Tensor) -> Tensor:
        """Logits of the allowed choices alone. allowed: [..., sum(nvec)]."""
        return features.where(allowed, NEVER)


class BernoulliHead(nn.Module):
    """MultiBinary: independent coins."""

    def __init__(self, space: spaces.MultiBinary) -> None:
        super().__init__()
        self.space, self.size = space, math.prod(space.shape)

    def forward(self, features: Tensor) -> Distribution:
        return IndependentActions(self.space, Coins(logits=features, validate_args=False))

    def masked(self, features: Tensor, allowed: Tensor) -> Tensor:
        """Log-odds where only the allowed sides come up. allowed: [..., 2 D], tails and heads of each coin."""
        tails, heads = allowed.unflatten(-1, (self.size, 2)).unbind(-1)
        return features.where(heads, NEVER).where(tails, -NEVER)


class NormalHead(nn.Module):
    """Box: a diagonal Gaussian, clipped at the bounds on the way to the environment, or squashed onto them.

    A standard deviation that the network computes stays within a factor of e^10 of the initial one.
    """

    half_width: Tensor

    def __init__(self, space: spaces.Box, squash: bool, state_dependent_std: bool, initial_log_std: float) -> None:
        super().__init__()
        if not -20 <= initial_log_std <= 10:
            raise UserError(f"initial_log_std is {initial_log_std}: it must be between -20 and 10")
        self.space, self.squash, self.units = space, squash, units(space)
        if squash:
            _check_bounds(space, "squashed")
        dimensions = math.prod(space.shape)
        self.size = 2 * dimensions if state_dependent_std else dimensions
        self.initial_log_std = initial_log_std
        self.log_std = None if state_dependent_std else nn.Parameter(torch.full((dimensions,), initial_log_std))
        half_width = torch.as_tensor(self.units.half_width, dtype=torch.get_default_dtype())
        self.register_buffer("half_width", half_width, persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        if self.log_std is None:
            mean, log_std = features.chunk(2, -1)
            log_std = self.initial_log_std + log_std.clamp(-10, 10)
        else:
            mean, log_std = features, self.log_std.expand_as(features)
        if self.squash:
            return SquashedNormal(self.space, mean, log_std.exp(), self.half_width)
        return ClippedNormal(self.space, Normal(mean, log_std.exp(), validate_args=False), self.units)

    def noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal noise, [*shape, D], in float32."""
        return generator.standard_normal((*shape, math.prod(self.space.shape)), dtype=np.float32)

    def choice(self) -> Choice:
        """(outputs [B, size], noise) -> u [B, D] = mean + std noise, with the parameters as they are; or the mean."""
        if self.log_std is not None:
            std = self.log_std.detach().exp().cpu().numpy()
            return lambda mean, noise: mean.copy() if noise is None else mean + std * noise
        return self._with_its_own_std

    def to_environment(self, action: np.ndarray) -> np.ndarray:
        """The action at u = action [B, D] as the environment receives it."""
        return squashed(action, self.space) if self.squash else clipped(action, self.space, self.units)

    def _with_its_own_std(self, output: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        mean, log_std = np.split(output, 2, -1)
        return mean.copy() if noise is None else mean + np.exp(self.initial_log_std + log_std.clip(-10, 10)) * noise


class BetaHead(nn.Module):
    """Box with bounds: a Beta distribution between them, alpha and beta = 1 + softplus(features).

    Both are above 1, so that the density has one peak and is 0 at the bounds (Chou et al. 2017, section 4).
    """

    width: Tensor

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        _check_bounds(space, "beta")
        self.space, self.size = space, 2 * math.prod(space.shape)
        width = torch.as_tensor(2 * units(space).half_width, dtype=torch.get_default_dtype())
        self.register_buffer("width", width, persistent=False)

    def forward(self, features: Tensor) -> Distribution:
        alpha, beta = (1 + softplus(features)).chunk(2, -1)
        return ScaledBeta(self.space, alpha, beta, self.width)


class JointHead(nn.Module):
    """A Dict or Tuple of actions: a head for each part."""

    def __init__(self, space: FlatActions, **of_boxes: Any) -> None:
        super().__init__()
        some_box = any(is_box(part) for part, _ in space.parts)
        self.space = space
        self.heads = nn.ModuleList(
            head(part) if some_box and not is_box(part) else head(part, **of_boxes) for part, _ in space.parts
        )
        self.sizes: list[int] = [x.size for x in self.heads]  # type: ignore[misc]
        self.size = sum(self.sizes)

    def forward(self, features: Tensor) -> Distribution:
        pieces = zip(self.heads, features.split(self.sizes, -1), strict=True)
        return JointActions(self.space, [one(x) for one, x in pieces])

    def masked(self, features: Tensor, allowed: Tensor) -> Tensor:
        """The features with those of the parts that have choices masked."""
        sizes = [0 if is_box(part) else sum(choices(part)) for part, _ in self.space.parts]
        heads: list[Any] = list(self.heads)
        pieces = zip(heads, features.split(self.sizes, -1), allowed.split(sizes, -1), strict=True)
        return torch.cat([one.masked(x, mask) if mask.shape[-1] else x for one, x, mask in pieces], -1)


def _check_bounds(space: spaces.Box, distribution: str) -> None:
    """Raise UserError where a distribution has no interval between the bounds."""
    single = space.low.reshape(-1)[space.low.reshape(-1) >= space.high.reshape(-1)]
    if single.size:
        raise UserError(
            f"distribution {distribution} needs low < high in every dimension, and the action space has low = high = "
            f"{single[0]:g}: choose normal, or remove that dimension from the action space"
        )
    if not units(space).bounded.all():
        raise UserError(
            f"distribution {distribution} needs finite bounds, and the action space is a Box without them: "
            "choose normal"
        )


def head(
    space: spaces.Space,
    distribution: str = "normal",
    state_dependent_std: bool = False,
    initial_log_std: float = 0.0,
) -> Any:
    """The head of an action space. Raises UserError for a space it has none for, or options that do not apply."""
    if distribution not in DISTRIBUTIONS:
        said = " or ".join(DISTRIBUTIONS)
        raise UserError(f"distribution is {shortened(distribution, 40)}: it must be {said}")
    gaussian = {"state_dependent_std": state_dependent_std, "initial_log_std": initial_log_std}
    if isinstance(space, FlatActions):
        return JointHead(space, distribution=distribution, **gaussian)
    for option, value in gaussian.items() if distribution == "beta" else ():
        if value:
            raise UserError(f"{option} is for a Gaussian, and distribution is beta: leave it out")
    if isinstance(space, spaces.Box):
        if distribution == "beta":
            return BetaHead(space)
        return NormalHead(space, distribution == "squashed", state_dependent_std, initial_log_std)
    for option, value in {"distribution": distribution != "normal", **gaussian}.items():
        if value:
            raise UserError(f"{option} is for Box actions, and the action space is {one_line(space, 60)}: leave it out")
    if isinstance(space, spaces.Discrete):
        return CategoricalHead(space)
    if isinstance(space, spaces.MultiDiscrete):
        return MultiCategoricalHead(space)
    if isinstance(space, spaces.MultiBinary):
        return BernoulliHead(space)
    describe(space)  # raises
    raise UserError(f"there is no head for the action space {one_line(space, 60)}: use a policy of your own")
