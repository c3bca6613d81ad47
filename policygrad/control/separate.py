"""Agents of one game with parameters of their own: a policy and a critic for each, rows routed by their agent.

An observation says whose it is, in the key `agent_index` of a Dict (players.Agents). What a policy computes for its
agent's rows is what it would compute alone; its gradient is that of its own rows, weighed by their share of the batch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import kl_divergence, register_kl
from torch.utils._pytree import tree_map

from policygrad.control.distributions import ActionDistribution
from policygrad.control.memory import Rows
from policygrad.control.policies import AUTOCAST, Critic, Policy
from policygrad.control.spaces import AGENT, Flat, rebuild
from policygrad.errors import UserError


class Routes:
    """Which rows are whose. Observations [B, T, N] alone are routed by the step, Rows of a policy with memory whole."""

    def __init__(self, obs: Any, place: slice, count: int) -> None:
        self.whole = isinstance(obs, Rows)
        seen = obs.obs if self.whole else obs.flatten(0, 1).unsqueeze(1)
        agent = seen[:, 0, place].argmax(-1)
        found = [(k, (agent == k).nonzero().squeeze(1)) for k in range(count)]
        self.of = [(k, index) for k, index in found if len(index)]
        self.shape = torch.Size((obs.obs if self.whole else obs).shape[:2])
        self.order = torch.cat([index for _, index in self.of]).argsort()

    def split(self, x: Any) -> list[Any]:
        """Columns [B, T, ...] of each agent that has rows."""
        x = x if self.whole else tree_map(lambda y: y.flatten(0, 1).unsqueeze(1), x)
        return [tree_map(lambda y, index=index: y[index], x) for _, index in self.of]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """A column [B, T, ...] of those of the agents."""
        x = torch.cat(list(parts))[self.order]
        return x if self.whole else x.reshape(*self.shape, *x.shape[2:])


class OfAgents(ActionDistribution):
    """Rows of several agents, each with the distribution that its own policy has there.

    parts: one for each agent that has rows, in the order of the routes. batch_shape [B, T].
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, space: spaces.Space, routes: Routes, parts: Sequence[Any]) -> None:
        self.space, self.routes, self.parts = space, routes, list(parts)
        super().__init__(routes.shape, self.parts[0].event_shape, validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """One action for each row and step."""
        if len(sample_shape):
            raise NotImplementedError("one action at a time")
        return self.routes.join([part.sample() for part in self.parts])

    def log_prob(self, value: Tensor) -> Tensor:
        """log pi of the row's own policy."""
        return self.routes.join([p.log_prob(x) for p, x in zip(self.parts, self.routes.split(value), strict=True)])

    def entropy(self) -> Tensor:
        """That of the row's own policy."""
        return self.routes.join([part.entropy() for part in self.parts])

    @property
    def mode(self) -> Tensor:
        """That of the row's own policy."""
        return self.routes.join([part.mode for part in self.parts])

    def to_environment(self, action: Tensor) -> np.ndarray:
        """The actions [B, ...] as the environment receives them, which depends on the space alone."""
        return self.parts[0].to_environment(action)

    def from_environment(self, action: np.ndarray) -> np.ndarray:
        """The environment's actions [B, ...] as the distributions score them."""
        return self.parts[0].from_environment(action)


@register_kl(OfAgents, OfAgents)
def _kl_of_agents(p: OfAgents, q: OfAgents) -> Tensor:
    return p.routes.join([kl_divergence(one, other) for one, other in zip(p.parts, q.parts, strict=True)])


class SeparatePolicies(nn.Module):
    """obs [B, T, N] -> the distribution of the action, by the policy of each row's agent. The arguments are Policy's.

    observation_space: of a game whose agents are separate (make_environments), which no policy sees its agent's number
    of. Rows stay with one agent. Raises UserError for a space that does not say whose an observation is.
    """

    def __init__(
        self, observation_space: spaces.Space, action_space: spaces.Space, *, keys: Sequence[str] = (), **how: Any
    ) -> None:
        super().__init__()
        self.place, self.count = _place(observation_space)
        if isinstance(how.get("encoder"), nn.Module):
            raise UserError("an encoder that is a module would be one for all agents: give the name of a kind")
        keys = list(keys) or others(observation_space)
        made = [Policy(observation_space, action_space, keys=keys, **how) for _ in range(self.count)]
        self.policies = nn.ModuleList(made)
        self.description = {**(made[0].description or {}), "agents": "separate"}
        self.observation_space, self.action_space, self.mask = observation_space, action_space, made[0].mask
        if made[0].memory is not None:
            self.initial, self.unrolled = made[0].initial, self._unrolled

    def forward(self, obs: Any) -> OfAgents:
        routes = Routes(obs, self.place, self.count)
        parts = zip(routes.of, routes.split(obs), strict=True)
        return OfAgents(self.action_space, routes, [self.policies[k](x) for (k, _), x in parts])

    def _unrolled(self, rows: Rows) -> tuple[OfAgents, Tensor]:
        """The distribution at each step of Rows, and the memory [B, S] after the last."""
        routes = Routes(rows, self.place, self.count)
        found = [self.policies[k].unrolled(x) for (k, _), x in zip(routes.of, routes.split(rows), strict=True)]  # type: ignore[operator]
        distributions, states = zip(*found, strict=True)
        return OfAgents(self.action_space, routes, distributions), routes.join(states)

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> "SeparatePolicies":
        """New policies with the arguments in `description`."""
        rest = {name: x for name, x in description.items() if name != "agents"}
        rest["autocast"] = AUTOCAST[rest.get("autocast")]
        return cls(rebuild(rest.pop("observation_space")), rebuild(rest.pop("action_space")), **rest)


class SeparateCritics(nn.Module):
    """obs [B, T, N] -> V(s) by the critic of each row's agent, in one unit of value. The arguments are Critic's.

    of: policies whose encoders and memories they share.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        *,
        keys: Sequence[str] = (),
        of: SeparatePolicies | None = None,
        **how: Any,
    ) -> None:
        super().__init__()
        self.place, self.count = _place(observation_space)
        keys = list(keys) or others(observation_space)
        shared: list[Any] = [None] * self.count if of is None else list(of.policies)
        self.critics = nn.ModuleList(Critic(observation_space, keys=keys, of=x, **how) for x in shared)
        first: Any = self.critics[0]
        if first.memory is not None and of is None:
            self.initial, self.unrolled = first.initial, self._unrolled

    def forward(self, obs: Any) -> Tensor:
        routes = Routes(obs, self.place, self.count)
        parts = zip(routes.of, routes.split(obs), strict=True)
        return routes.join([self.critics[k](x) for (k, _), x in parts])

    def with_policy(self, policy: nn.Module, obs: Any) -> tuple[Any, Tensor]:
        """The policies' distribution and V(s), and what each agent's two share computed once (Critic.with_policy)."""
        if not isinstance(policy, SeparatePolicies):
            return policy(obs), self(obs)
        routes = Routes(obs, self.place, self.count)
        parts = zip(routes.of, routes.split(obs), strict=True)
        found = [self.critics[k].with_policy(policy.policies[k], x) for (k, _), x in parts]  # type: ignore[operator]
        distributions, values = zip(*found, strict=True)
        return OfAgents(policy.action_space, routes, distributions), routes.join(values)

    def _unrolled(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """V(s) at each step of Rows, and the memory [B, S] after the last."""
        routes = Routes(rows, self.place, self.count)
        found = [self.critics[k].unrolled(x) for (k, _), x in zip(routes.of, routes.split(rows), strict=True)]  # type: ignore[operator]
        values, states = zip(*found, strict=True)
        return routes.join(values), routes.join(states)

    @property
    def scale(self) -> Tensor:
        """The unit of all values: that of the rewards of all agents."""
        return self.critics[0].scale  # type: ignore[return-value]

    def rescale(self, square: Tensor) -> None:
        """Follow the mean square of new rewards (Critic.rescale)."""
        for one in self.critics:
            one.rescale(square)  # type: ignore[operator]


def others(space: spaces.Space) -> list[str]:
    """The keys of what an agent sees: all but its number and its mask of actions."""
    assert isinstance(space, Flat)
    return [key for key, where in space.slices.items() if key != AGENT and where != space.mask]


def _place(space: spaces.Space) -> tuple[slice, int]:
    """Where an observation says whose it is, and how many agents there are."""
    if not isinstance(space, Flat) or AGENT not in space.slices:
        raise UserError(f"agents separate needs observations with the key {AGENT}: make the game with agents separate")
    place = space.slices[AGENT]
    return place, place.stop - place.start
