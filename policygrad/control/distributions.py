"""The one distribution that torch.distributions lacks: a Gaussian squashed by tanh, with its own entropy and KL."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, kl_divergence, register_kl
from torch.nn.functional import softplus


class SquashedNormal(Distribution):
    """a = centre + half_width tanh(u), u ~ N(mean, std^2) in each dimension (Haarnoja et al. 2018, appendix C).

    Actions are represented by u, from which a follows exactly but not the reverse (atanh near 1 loses everything);
    log_prob(u) is the log-density OF a, at the a that u gives:

        log p(a) = sum_d log N(u_d) - log half_width_d - log(1 - tanh(u_d)^2)

    mean, std: [..., D]; batch_shape [...], event_shape [D].
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, mean: Tensor, std: Tensor, half_width: Tensor) -> None:
        self.normal = Independent(Normal(mean, std, validate_args=False), 1, validate_args=False)
        self.half_width = half_width
        super().__init__(self.normal.batch_shape, self.normal.event_shape, validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """u, differentiable in mean and std."""
        return self.normal.rsample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(a) at value = u."""
        return self.normal.log_prob(value) - self._log_slope(value).sum(-1)

    def entropy(self) -> Tensor:
        """H(a) = H(u) + E log da/du, the expectation by Gauss-Hermite quadrature: no noise, and differentiable."""
        nodes, weights = (torch.as_tensor(x, dtype=self.mean.dtype, device=self.mean.device) for x in _HERMITE)
        u = self.mean.unsqueeze(-1) + self.normal.base_dist.stddev.unsqueeze(-1) * nodes
        slope = self._log_slope(u.movedim(-1, 0)).movedim(0, -1)
        return self.normal.entropy() + (slope * weights).sum((-1, -2))

    @property
    def mean(self) -> Tensor:
        """The mean of u."""
        return self.normal.mean

    @property
    def mode(self) -> Tensor:
        """The u of the action that is taken without noise, tanh(mean): the field's convention."""
        return self.normal.mean

    def _log_slope(self, u: Tensor) -> Tensor:
        """log da/du = log half_width + log(1 - tanh(u)^2), without cancellation."""
        return self.half_width.log() + 2 * (math.log(2) - u - softplus(-2 * u))


# E f(u) for u ~ N(0, 1): sum of weights f(nodes).
_HERMITE = np.polynomial.hermite_e.hermegauss(32)
_HERMITE = (_HERMITE[0], _HERMITE[1] / math.sqrt(2 * math.pi))


@register_kl(SquashedNormal, SquashedNormal)
def _kl_squashed(p: SquashedNormal, q: SquashedNormal) -> Tensor:
    # A bijection, the same for both, changes no KL.
    return kl_divergence(p.normal, q.normal)
