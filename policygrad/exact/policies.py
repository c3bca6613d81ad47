"""Softmax policies and tabular critics of a small world: policies and critics with accessible tables."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributions import Categorical


class SoftmaxPolicy(nn.Module):
    """pi(a|s) = exp(theta.phi(s, a)) / sum_b exp(theta.phi(s, b)); obs [B, T] of state numbers -> Categorical [B, T].

    One feature for each (s, a) makes the policy tabular. With shared features, states share parameters. allowed: of the
    other actions of a state the probability is 0, and the sum over b is without them; by default all are.
    """

    def __init__(
        self,
        features: Float[Tensor, "S A N"],
        theta: Float[Tensor, " N"] | None = None,
        allowed: Bool[Tensor, "S A"] | None = None,
    ) -> None:
        super().__init__()
        self.features: Tensor
        self.register_buffer("features", features)
        self.allowed: Tensor | None
        self.register_buffer("allowed", allowed, persistent=False)
        self.theta = nn.Parameter(torch.zeros_like(features[0, 0]) if theta is None else theta.clone())

    def forward(self, obs: Int[Tensor, "B T"]) -> Categorical:
        """The distribution over actions at every step."""
        return Categorical(logits=self.logits()[obs], validate_args=False)

    def logits(self) -> Float[Tensor, "S A"]:
        """theta.phi(s, a); -1e9 where an action is not allowed."""
        logits = self.features @ self.theta
        return logits if self.allowed is None else logits.where(self.allowed, -1e9)


class BlindPolicy(SoftmaxPolicy):
    """A policy on a world `with_clock` that cannot see the clock: it is the same at every time.

    `features` are those of the world without a clock; they are repeated for every time.
    """

    def __init__(
        self, features: Float[Tensor, "S A N"], horizon: int, theta: Float[Tensor, " N"] | None = None
    ) -> None:
        super().__init__(blind_to_time(features, horizon), theta)
        self.few = features

    def forward(self, obs: Int[Tensor, "B T"]) -> Categorical:
        """The distribution over actions at every step."""
        return Categorical(logits=(self.few @ self.theta)[obs % len(self.few)], validate_args=False)


class TabularCritic(nn.Module):
    """V(s) from a table; obs [B, T] of state numbers -> [B, T]."""

    def __init__(self, value: Float[Tensor, " S"]) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone())

    def forward(self, obs: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The value of every step's state."""
        return self.value[obs]


def tabular(states: int, actions: int) -> Float[Tensor, "S A N"]:
    """phi(s, a) = the unit vector of (s, a): one logit for each pair."""
    return torch.eye(states * actions, dtype=torch.float64).view(states, actions, states * actions)


def blind_to_time(features: Float[Tensor, "S A N"], horizon: int) -> Float[Tensor, "_ A N"]:
    """Repeat the features for every time of a world `with_clock`, so that the policy cannot see the clock."""
    return features.repeat(horizon, 1, 1)


def probabilities(policy: SoftmaxPolicy) -> Float[Tensor, "S A"]:
    """pi(a|s) as a table, differentiable in theta."""
    return policy.logits().softmax(-1)


def score_table(features: Float[Tensor, "S A N"], probs: Float[Tensor, "S A"]) -> Float[Tensor, "S A N"]:
    """grad log pi(a|s) = phi(s, a) - sum_b pi(b|s) phi(s, b) (Sutton et al. 2000, section 3)."""
    return features - torch.einsum("sa,san->sn", probs, features).unsqueeze(1)
