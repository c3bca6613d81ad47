"""Distributions over the actions of a Gymnasium space. Each knows how its actions reach the environment."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Independent,
    Normal,
    kl_divergence,
    register_kl,
)
from torch.nn.functional import logsigmoid, softplus

from policygrad.control.spaces import FlatActions, Units, from_environment, in_box, to_environment, units

INSIDE = 0.999  # of the way to a bound: an action beyond that counts as one at the bound (sampler.action_metrics)


class ActionDistribution(Distribution):
    """A distribution over the actions of `space`. Mixed into a distribution of torch, whose KL and entropy it keeps."""

    space: Any  # a Gymnasium space

    def to_environment(self, action: Tensor) -> np.ndarray:
        """The action [B, ...] as the environment receives it."""
        return to_environment(action.detach().cpu().numpy(), self.space)

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """The environment's action [B, ...] as this distribution scores it, [B] or [B, D]: whole numbers or float64."""
        return from_environment(action, self.space)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """As torch's, over the same space."""
        new = self._get_checked_instance(type(self), _instance)
        new.space = self.space
        return super().expand(torch.Size(batch_shape), _instance=new)


class DiscreteActions(ActionDistribution, Categorical):
    """Discrete(n, start): action k stands for start + k. logits: [..., n]."""

    def __init__(self, space: spaces.Discrete, logits: Tensor) -> None:
        self.space = space
        Categorical.__init__(self, logits=logits, validate_args=False)


class IndependentActions(ActionDistribution, Independent):
    """MultiDiscrete or MultiBinary: independent dimensions. base: batch_shape [..., D]."""

    def __init__(self, space: spaces.Space, base: Distribution) -> None:
        self.space = space
        Independent.__init__(self, base, 1, validate_args=False)


class Coins(Bernoulli):
    """Bernoulli whose mode at a probability of exactly 0.5 is 0, where torch's is NaN."""

    @property
    def mode(self) -> Tensor:
        return (self.logits > 0).to(self.logits)


class ClippedNormal(IndependentActions):
    """a = clip(center + half_width u), u ~ N(mean, std^2) in each dimension: -1 and 1 are the bounds, if there are any.

    Actions are stored as u. log_prob(u), entropy and KL are those of u: before clipping, and without the constant
    sum_d log half_width_d that separates the log-density of u from that of center + half_width u.

    base: Normal of batch_shape [..., D]. units: of the Box (spaces.units).
    """

    def __init__(self, space: spaces.Box, base: Normal, units: Units) -> None:
        super().__init__(space, base)
        self.units = units

    def to_environment(self, action: Tensor) -> np.ndarray:
        """a at u = action [B, D], in the space's shape and dtype."""
        return clipped(action.detach().cpu().numpy(), self.space, self.units)

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """The u at which a = action. At a bound, beyond which every u gives the same a, it is that of the bound."""
        return in_units(action, self.space, self.units)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        """As torch's, in the same units."""
        new = self._get_checked_instance(type(self), _instance)
        new.units = self.units
        return super().expand(batch_shape, _instance=new)


class JointActions(ActionDistribution):
    """Independent parts of a Dict or Tuple action: log-probabilities, entropies and divergences are sums over them.

    Actions are stored as one vector [..., D] of the parts' own numbers. parts: a distribution of batch_shape [...] for
    each part of the space.
    """

    space: FlatActions
    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, space: FlatActions, parts: Sequence[Any]) -> None:
        self.space, self.parts = space, list(parts)
        super().__init__(self.parts[0].batch_shape, torch.Size(space.shape), validate_args=False)

    def of_parts(self, action: Tensor) -> list[Tensor]:
        """The action [..., D] of each part, in its own shape."""
        pieces = zip(self.parts, self.space.parts, strict=True)
        return [action[..., where] if part.event_shape else action[..., where.start] for part, (_, where) in pieces]

    def joined(self, actions: Sequence[Tensor]) -> Tensor:
        """The parts' actions as one vector [..., D]."""
        pieces = zip(self.parts, actions, strict=True)
        columns = [x if part.event_shape else x.unsqueeze(-1) for part, x in pieces]
        return torch.cat([x.to(torch.get_default_dtype()) for x in columns], -1)

    def to_environment(self, action: Tensor) -> np.ndarray:
        """The actions [B, D] in the environment's numbers, as one vector each."""
        taken = [part.to_environment(x) for part, x in zip(self.parts, self.of_parts(action), strict=True)]
        return np.concatenate([x.reshape(len(action), -1).astype(np.float64) for x in taken], 1)

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """The vectors [B, D] in the environment's numbers as the parts score them, [B, D]."""
        pieces = zip(self.parts, self.space.parts, strict=True)
        found = [
            part.from_environment(action[:, where].reshape((-1, *(one.shape or ())))) for part, (one, where) in pieces
        ]
        return np.concatenate([x.reshape(len(action), -1).astype(np.float64) for x in found], 1)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One action of each part."""
        return self.joined([part.sample(torch.Size(sample_shape)) for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """sum_parts log p(a_part)."""
        parts = zip(self.parts, self.of_parts(value), strict=True)
        return torch.stack([part.log_prob(x) for part, x in parts]).sum(0)

    def entropy(self) -> Tensor:
        """sum_parts H(a_part)."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "JointActions":
        """The same distribution, repeated over batch_shape."""
        return JointActions(self.space, [part.expand(torch.Size(batch_shape)) for part in self.parts])

    @property
    def mode(self) -> Tensor:
        """The mode of each part."""
        return self.joined([part.mode for part in self.parts])


class SquashedNormal(ActionDistribution):
    """a = center + half_width tanh(u), u ~ N(mean, std^2) in each dimension (Haarnoja et al. 2018, appendix C).

    Actions are stored as u: a follows from u exactly, and atanh near 1 loses all digits of u. log_prob(u) is the
    log-density of a, at the a that u gives:

        log p(a) = sum_d log N(u_d) - log half_width_d - log(1 - tanh(u_d)^2)

    space: a bounded Box. mean, std: [..., D]. half_width: [D], (high - low) / 2. batch_shape [...], event_shape [D].
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, space: spaces.Box, mean: Tensor, std: Tensor, half_width: Tensor) -> None:
        self.space, self.half_width = space, half_width
        self.normal = Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)
        super().__init__(self.normal.batch_shape, self.normal.event_shape, validate_args=False)

    def to_environment(self, action: Tensor) -> np.ndarray:
        """a at u = action [B, D], in the space's shape and dtype."""
        return squashed(action.detach().cpu().numpy(), self.space)

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """The u at which a = action. No u reaches a bound: a is moved to INSIDE of the way to it at most."""
        return np.arctanh(in_units(action, self.space, units(self.space)).clip(-INSIDE, INSIDE))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """u, differentiable in mean and std."""
        return self.normal.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(a) at value = u."""
        return self.normal.log_prob(value) - self._log_slope(value).sum(-1)

    def entropy(self) -> Tensor:
        """H(a) = H(u) + E log da/du, the expectation by quadrature: no noise, and differentiable."""
        nodes, weights = (x.to(self.mean) for x in _QUADRATURE)
        u = self.mean.unsqueeze(-1) + self.normal.base_dist.stddev.unsqueeze(-1) * nodes
        slope = self._log_slope(u.movedim(-1, 0)).movedim(0, -1)
        return self.normal.entropy() + (slope * weights).sum((-1, -2))

    def expand(self, batch_shape: Any, _instance: Any = None) -> "SquashedNormal":
        """The same distribution, repeated over batch_shape."""
        shape = (*batch_shape, *self.event_shape)
        return SquashedNormal(
            self.space, self.mean.expand(shape), self.normal.base_dist.stddev.expand(shape), self.half_width
        )

    @property
    def mean(self) -> Tensor:
        """The mean of u."""
        return self.normal.mean

    @property
    def mode(self) -> Tensor:
        """u without noise. The field's convention: tanh(mean), not the maximum of the density of a."""
        return self.normal.mean

    def _log_slope(self, u: Tensor) -> Tensor:
        """log da/du = log half_width + log(1 - tanh(u)^2), without cancellation."""
        return self.half_width.log() + 2 * (math.log(2) - u - softplus(-2 * u))


class ScaledBeta(ActionDistribution):
    """a = low + (high - low) x, x ~ Beta(alpha, beta) in each dimension (Chou et al. 2017, PMLR 70).

    Actions are stored as u = log x - log(1 - x), of which every number has a finite log-probability: x rounds to 0 or 1
    where its own is infinite. log_prob(u) is the log-density of a, at the a that u gives:

        log p(a) = sum_d (alpha_d - 1) log x_d + (beta_d - 1) log(1 - x_d) - log B(alpha_d, beta_d) - log width_d

    space: a bounded Box. alpha, beta: [..., D], at least 1. width: [D], high - low. batch_shape [...], event_shape [D].
    Everything is computed in float64, since log B is a difference of large numbers, and returned in the type of alpha.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, space: spaces.Box, alpha: Tensor, beta: Tensor, width: Tensor) -> None:
        self.space, self.alpha, self.beta, self.width = space, alpha, beta, width
        self.of_x = Independent(Beta(alpha.double(), beta.double(), validate_args=False), 1, validate_args=False)
        super().__init__(self.of_x.batch_shape, self.of_x.event_shape, validate_args=False)

    def to_environment(self, action: Tensor) -> np.ndarray:
        """a at u = action [B, D], in the space's shape and dtype."""
        return squashed(action.detach().cpu().double().numpy() / 2, self.space)  # x = (1 + tanh(u / 2)) / 2

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """The u at which a = action. No u reaches a bound: a is moved to INSIDE of the way to it at most."""
        return 2 * np.arctanh(in_units(action, self.space, units(self.space)).clip(-INSIDE, INSIDE))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """u, from two gamma variables: x is the share of the first in their sum."""
        shape, least = (*sample_shape, *self.batch_shape, *self.event_shape), torch.finfo(torch.float64).tiny
        with torch.no_grad():
            drawn = (torch._standard_gamma(x.double().expand(shape)) for x in (self.alpha, self.beta))
            first, second = (x.clamp(min=least).log() for x in drawn)
            return (first - second).to(self.alpha.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(a) at value = u."""
        u, alpha, beta = value.double(), self.alpha.double(), self.beta.double()
        log_beta = alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()
        logp = (alpha - 1) * logsigmoid(u) + (beta - 1) * logsigmoid(-u) - log_beta - self.width.double().log()
        return logp.sum(-1).to(self.alpha.dtype)

    def entropy(self) -> Tensor:
        """H(a) = H(x) + sum_d log width_d."""
        return (self.of_x.entropy() + self.width.double().log().sum(-1)).to(self.alpha.dtype)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ScaledBeta":
        """The same distribution, repeated over batch_shape."""
        shape = (*batch_shape, *self.event_shape)
        return ScaledBeta(self.space, self.alpha.expand(shape), self.beta.expand(shape), self.width)

    @property
    def stddev(self) -> Tensor:
        """The standard deviation of a in half-ranges: twice that of x, [..., D]."""
        return 2 * self.of_x.stddev

    @property
    def mode(self) -> Tensor:
        """u at the x where the density of a is largest, (alpha - 1) / (alpha + beta - 2); 0 where it is uniform."""
        first, second = ((x.double() - 1).clamp(min=1e-30).log() for x in (self.alpha, self.beta))
        return (first - second).to(self.alpha.dtype)


def in_units(action: np.ndarray, space: spaces.Box, units: Units) -> np.ndarray:
    """(a - center) / half_width of a = action [B, ...], [B, D]; 0 where the bounds are one number."""
    found = from_environment(action, space) - units.center
    return np.divide(found, units.half_width, out=np.zeros_like(found), where=units.half_width > 0)


def clipped(u: np.ndarray, space: spaces.Box, units: Units) -> np.ndarray:
    """clip(center + half_width u) of u [B, D], in the space's shape and dtype."""
    return in_box(units.center + units.half_width * u, space)


def squashed(u: np.ndarray, space: spaces.Box) -> np.ndarray:
    """center + half_width tanh(u) of u [B, D], in the space's shape and dtype."""
    low, high = (np.asarray(x, dtype=np.float64).reshape(-1) for x in (space.low, space.high))
    return in_box(low + (np.tanh(u.astype(np.float64)) + 1) / 2 * (high - low), space)


# E f(u) for u ~ N(0, 1) as the sum of weights f(nodes), by the trapezoidal rule. Its error falls as exp(-2 pi d / step)
# for a function that is analytic within d of the real line; for log da/du, d = pi / (2 std). That gives 2e-8 at a
# standard deviation of 2 and 2e-4 at 5; a Gauss-Hermite rule with as many nodes is off by 2e-2.
_nodes = np.arange(-24, 25) / 4
_density = np.exp(-(_nodes**2) / 2)
_QUADRATURE = (torch.from_numpy(_nodes), torch.from_numpy(_density / _density.sum()))


@register_kl(SquashedNormal, SquashedNormal)
def _kl_squashed(p: SquashedNormal, q: SquashedNormal) -> Tensor:
    # A bijection, the same for both, changes no KL.
    return kl_divergence(p.normal, q.normal)


@register_kl(ScaledBeta, ScaledBeta)
def _kl_beta(p: ScaledBeta, q: ScaledBeta) -> Tensor:
    return kl_divergence(p.of_x, q.of_x).to(p.alpha.dtype)


@register_kl(JointActions, JointActions)
def _kl_joint(p: JointActions, q: JointActions) -> Tensor:
    return torch.stack([kl_divergence(one, other) for one, other in zip(p.parts, q.parts, strict=True)]).sum(0)
