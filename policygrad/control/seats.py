"""Games in which players take turns: PettingZoo's agent environment cycle (Terry et al. 2021, arXiv 2009.14471).

One seat of such a game is a Gymnasium environment. Its other seats are played by opponents: what they do is a part of
the environment's step.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from policygrad.control.acting import act
from policygrad.control.checks import checked_flag, checked_number, finite_numbers
from policygrad.control.masks import choices, flat_mask, joined
from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.players import shared_space
from policygrad.control.spaces import MASK, to_environment
from policygrad.errors import UserError, one_line

# (observation and info as the game gives them, action space, random numbers) -> an action
Player = Callable[[Any, Mapping[str, Any], spaces.Space, np.random.Generator], Any]


def random_player(obs: Any, info: Mapping[str, Any], space: spaces.Space, generator: np.random.Generator) -> Any:
    """Any action that the mask allows, each with the same probability."""
    mask = obs[MASK] if isinstance(obs, Mapping) and MASK in obs else info.get(MASK)
    if mask is not None and isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        sizes, chosen = choices(space), []
        for part in np.split(flat_mask(mask, space), np.cumsum(sizes)[:-1]):
            if not len(allowed := np.flatnonzero(part)):
                raise UserError("the game asks for an action and allows none: its action_mask is 0 everywhere")
            chosen.append(allowed[generator.integers(len(allowed))])
        return to_environment(np.array([chosen]), space)[0]
    drawn = deepcopy(space)
    drawn.seed(int(generator.integers(2**31)))
    return drawn.sample() if mask is None else drawn.sample(mask=mask)


class Opponents:
    """Who plays the other seats: a player is drawn for each game. Here it is always the same one.

    seats: what has these opponents. count: how many players there are to draw from. A seat keeps that number as it is
    when a game begins, so that a game which is played again has the same player.
    """

    def __init__(self, player: Player = random_player) -> None:
        self.player, self.seats = player, list["Seat"]()

    @property
    def count(self) -> int:
        """How many players there are."""
        return 1

    def __call__(self, generator: np.random.Generator, count: int) -> Player:
        """A player for the next game, one of the first `count`."""
        return self.player


class Frozen:
    """A player that is a policy as it was after an iteration. It samples, as the policy in training does.

    observation_space: of the game, as the policy's is made of. action_space: as the policy's. The policy is on the CPU.
    """

    def __init__(
        self,
        iteration: int,
        steps: int,
        policy: nn.Module,
        normalizer: ObservationNormalizer | None,
        observation_space: spaces.Space,
        action_space: spaces.Space,
    ) -> None:
        self.iteration, self.steps = iteration, steps
        self.policy, self.normalizer = policy.cpu().requires_grad_(False).eval(), normalizer
        self.observation_space, self.action_space = observation_space, action_space
        if normalizer is not None:
            normalizer.frozen = True

    def __call__(self, obs: Any, info: Mapping[str, Any], space: spaces.Space, generator: np.random.Generator) -> Any:
        """An action. All chance in it is the generator's."""
        inside = isinstance(self.observation_space, spaces.Dict) and MASK in self.observation_space.spaces
        if inside and not (isinstance(obs, Mapping) and MASK in obs):
            obs = joined(obs, flat_mask(info[MASK], self.action_space))
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(int(generator.integers(2**62)))
            return act(
                self.policy, obs, self.observation_space, self.action_space, greedy=False, normalizer=self.normalizer
            )


class Selves(Opponents):
    """Frozen earlier selves: half of the games are against the newest, and half against any of them, each as likely."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[Frozen] = []

    @property
    def count(self) -> int:
        """How many selves there are."""
        return len(self.frozen)

    def __call__(self, generator: np.random.Generator, count: int) -> Player:
        """A self for the next game, one of the first `count`."""
        newest, drawn = generator.random() < 0.5, int(generator.integers(count))
        return self.frozen[count - 1 if newest else drawn]

    def take(self, *selves: Frozen) -> None:
        """Add selves. Games that have begun keep their players."""
        self.frozen += selves
        self.tell()

    def tell(self) -> None:
        """Let all seats draw from all selves, from their next games on."""
        for seat in self.seats:
            seat.known = self.count


class Seat(gymnasium.Env):
    """One seat of a game, another one in each episode by chance; the opponents play the other seats.

    environment: of PettingZoo, whose agents take turns. An episode goes from the seat's first turn to its end, and the
    reward of a step is what the seat gets until its next turn. At the end the info has `is_success` (the return was
    above 0), `draw` (it was 0), and `success_AGENT`, by the seat.

    Raises UserError for agents of different spaces, and for a game that ends again and again before the seat's turn.
    """

    def __init__(self, environment: Any, opponents: Opponents) -> None:
        self.game, self.opponents = environment, opponents
        self.agents = list(getattr(environment, "possible_agents", ()))
        self.observation_space = deepcopy(shared_space(environment, self.agents, "observation"))
        self.action_space = deepcopy(shared_space(environment, self.agents, "action"))
        self.metadata = dict(environment.metadata)
        self.render_mode = getattr(environment, "render_mode", None)
        self.seat, self.total, self.known = 0, 0.0, opponents.count
        opponents.seats.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """A new game, up to the seat's first turn."""
        super().reset(seed=seed)
        for _ in range(100):
            self.game.reset(seed=int(self.np_random.integers(2**31)))
            self.seat, self.total = int(self.np_random.integers(len(self.agents))), 0.0
            self.player = self.opponents(self.np_random, self.known)
            obs, _, terminated, truncated, info = self._turn()
            if not (terminated or truncated):
                return obs, dict(info)
        raise UserError(f"the game has ended 100 times before it was the turn of {one_line(self._agent(), 40)}")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The seat's action, then those of the others, up to the seat's next turn."""
        self.game.step(action)
        obs, reward, terminated, truncated, info = self._turn()
        self.total += reward
        if terminated or truncated:
            won = float(self.total > 0)
            ends = {"is_success": won, "draw": float(self.total == 0), f"success_{self._agent()}": won}
            info = finite_numbers(info) | ends
        return obs, reward, terminated, truncated, dict(info)

    def render(self) -> Any:
        """As the game's."""
        return self.game.render()

    def close(self) -> None:
        """Close the game."""
        self.game.close()

    def _agent(self) -> Any:
        return self.agents[self.seat]

    def _turn(self) -> tuple[Any, float, bool, bool, Mapping[str, Any]]:
        """Let the others play until it is the seat's turn, and return what it then sees."""
        mine, game = self._agent(), self.game
        while (now := game.agent_selection) != mine:
            obs, _, terminated, truncated, info = game.last()
            over = terminated or truncated
            game.step(None if over else self.player(obs, info, self.action_space, self.np_random))
            if mine not in game.agents:
                raise UserError(
                    f"agent {one_line(mine, 40)} is gone after the turn of {one_line(now, 40)}: fix the game"
                )
        obs, reward, terminated, truncated, info = game.last()
        reward = float(checked_number(reward))
        return obs, reward, checked_flag(terminated, "terminated"), checked_flag(truncated, "truncated"), info or {}


def play(seat: Seat, players: Sequence[Player], generator: np.random.Generator) -> list[float]:
    """One game in which every seat has a player of its own. Returns the sum of each player's rewards."""
    game, total = seat.game, dict.fromkeys(seat.agents, 0.0)
    game.reset(seed=int(generator.integers(2**31)))
    while game.agents:
        now = game.agent_selection
        obs, reward, terminated, truncated, info = game.last()
        total[now] += float(checked_number(reward))
        over = terminated or truncated
        game.step(None if over else players[seat.agents.index(now)](obs, info or {}, seat.action_space, generator))
    return [total[x] for x in seat.agents]
