"""Games in which players take turns: PettingZoo's agent environment cycle (Terry et al. 2021, arXiv 2009.14471).

One seat of such a game is a Gymnasium environment. Its other seats are played by opponents: what they do is a part of
the environment's step. Games that are played side by side ask an opponent that many of them have for all its moves at
once.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv, VectorWrapper
from gymnasium.vector.utils import iterate
from torch import Tensor, nn

from policygrad.control.acting import act, together
from policygrad.control.checks import checked_flag, checked_number, finite_numbers, stored
from policygrad.control.masks import check_masks, choices, flat_mask, joined
from policygrad.control.memory import Rows
from policygrad.control.normalization import ObservationNormalizer
from policygrad.control.players import shared_space
from policygrad.control.policies import CategoricalHead, Policy
from policygrad.control.spaces import MASK, FlatActions, to_environment
from policygrad.errors import UserError, one_line
from policygrad.rollout import state_size


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


class Asked(NamedTuple):
    """A move that is asked for."""

    obs: Any  # as the game gives it
    info: Mapping[str, Any]
    generator: np.random.Generator  # of all chance in the move
    held: dict[str, Tensor]  # what the player keeps of this game until it is asked again; empty where a game begins


class Frozen:
    """A player that is a policy as it was after an iteration. It samples, as the policy in training does.

    observation_space: of the game, as the policy's is made of. action_space: as the policy's. The policy is on the CPU.
    If it has memory, it remembers what it saw at its own moves in this game, as the policy in training does: held is
    its state [1, S].
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
        self.remembers = state_size(policy) > 0
        self.exact: nn.Module | None = None  # the policy in float64, once it has been asked
        if normalizer is not None:
            normalizer.frozen = True

    def moves(self, asked: Sequence[Asked]) -> list[Any]:
        """An action for each, which does not depend on who else asks; `held` is changed.

        The logits of many rows have other last bits than those of one. They are computed in float64, and so is memory,
        and the noise that is added to them is that of each one's own generator, so that another action would take noise
        within 1e-15 of a tie. Distributions that are not categorical are sampled one by one.
        """
        seen = [self._seen(one.obs, one.info) for one in asked]
        if type(self.policy) is not Policy or not isinstance(self.policy.head, CategoricalHead):
            return [self._alone(obs, one) for obs, one in zip(seen, asked, strict=True)]
        logits = self._logits(together(seen, self.observation_space), [one.held for one in asked])
        noise = np.stack([self.policy.head.noise(one.generator, ()) for one in asked])
        return list(to_environment((logits + noise).argmax(-1), self.action_space))

    @torch.no_grad()
    def _logits(self, batch: np.ndarray, held: Sequence[dict[str, Tensor]]) -> np.ndarray:
        """Logits [B, n] of observations [B, ...] as the game gives them, in float64, after what is held of each."""
        if self.exact is None:
            self.exact = deepcopy(self.policy).double()
        policy: Any = self.policy
        if policy.mask is not None:
            check_masks(batch, np.ones(len(batch), bool), policy.observation_space, self.action_space, "game")
        if self.normalizer is not None:
            batch = self.normalizer(batch, np.zeros(len(batch), bool))
        given, usual = torch.from_numpy(stored(batch)).unsqueeze(1), torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # which encoders cast whole numbers to
        try:
            return self._after(given.double() if given.is_floating_point() else given, held).logits[:, 0].numpy()
        finally:
            torch.set_default_dtype(usual)

    def _after(self, obs: Tensor, held: Sequence[dict[str, Tensor]]) -> Any:
        """The distribution in float64 for observations [B, 1, ...], with the memory of each, which goes on."""
        exact: Any = self.exact
        if not self.remembers:
            return exact(obs)
        state = torch.cat([one.get("state", exact.initial(1)) for one in held]).unsqueeze(1)
        start = torch.zeros(len(obs), 1, dtype=torch.bool)  # an empty memory starts a game
        found, after = exact.unrolled(Rows(obs, start, state, state[..., :0]))
        for one, x in zip(held, after.split(1), strict=True):
            one["state"] = x
        return found

    def _alone(self, obs: Any, asked: Asked) -> Any:
        known = self.observation_space, self.action_space
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(int(asked.generator.integers(2**62)))
            given: dict[str, Any] = {"state": asked.held.get("state"), "greedy": False, "normalizer": self.normalizer}
            found = act(self.policy, obs, *known, **given)
        if not self.remembers:
            return found
        action, asked.held["state"] = found
        return action

    def _seen(self, obs: Any, info: Mapping[str, Any]) -> Any:
        """What the policy sees: the observation with its mask."""
        inside = isinstance(self.observation_space, spaces.Dict) and MASK in self.observation_space.spaces
        if inside and not (isinstance(obs, Mapping) and MASK in obs):
            return joined(obs, flat_mask(info[MASK], self.action_space))
        return obs


# (observation and info as the game gives them, action space, random numbers) -> an action; or an earlier self
Player = Callable[[Any, Mapping[str, Any], spaces.Space, np.random.Generator], Any] | Frozen


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
        self.ahead: Turn | Exception | None = None  # what the next step comes to, if it has been made already
        self.held: dict[Any, dict[str, Tensor]] = {}  # what the player keeps of this game, in each of the other seats
        opponents.seats.append(self)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """A new game, up to the seat's first turn."""
        super().reset(seed=seed)
        for _ in range(100):
            self.game.reset(seed=int(self.np_random.integers(2**31)))
            self.seat, self.total = int(self.np_random.integers(len(self.agents))), 0.0
            self.player, self.held = self.opponents(self.np_random, self.known), {}
            obs, _, terminated, truncated, info = self._alone(self._turn())
            if not (terminated or truncated):
                return obs, dict(info)
        raise UserError(f"the game has ended 100 times before it was the turn of {one_line(self._agent(), 40)}")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The seat's action, then those of the others, up to the seat's next turn."""
        found, self.ahead = self.ahead, None
        if isinstance(found, Exception):
            raise found
        obs, reward, terminated, truncated, info = self._alone(self.taking(action)) if found is None else found
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

    def taking(self, action: Any) -> "Moves":
        """The seat's action, then those of the others, which are asked for, up to the seat's next turn."""
        self.game.step(action)
        return (yield from self._turn())

    def _turn(self) -> "Moves":
        """Let the others play until it is the seat's turn, and return what it then sees."""
        mine, game = self._agent(), self.game
        while (now := game.agent_selection) != mine:
            obs, _, terminated, truncated, info = game.last()
            over, held = terminated or truncated, self.held.setdefault(now, {})
            game.step(None if over else (yield Asked(obs, info or {}, self.np_random, held)))
            if mine not in game.agents:
                raise UserError(
                    f"agent {one_line(mine, 40)} is gone after the turn of {one_line(now, 40)}: fix the game"
                )
        obs, reward, terminated, truncated, info = game.last()
        reward = float(checked_number(reward))
        return obs, reward, checked_flag(terminated, "terminated"), checked_flag(truncated, "truncated"), info or {}

    def _alone(self, moves: "Moves") -> "Turn":
        """What moves come to, with those of this game's player."""
        answer = None
        while True:
            try:
                asked = moves.send(answer)
            except StopIteration as end:
                return end.value
            (answer,) = _moves(self.player, [(self, asked)])


Turn = tuple[Any, float, bool, bool, Mapping[str, Any]]  # observation, reward, terminated, truncated, info
Moves = Generator[Asked, Any, Turn]  # asks for each move of the others, and returns the seat's next turn


class SideBySide(VectorWrapper):
    """Seats whose games are played in step, so that a Frozen player which several have is asked for many moves at once.

    environments: of seats. What happens is what would happen if each were stepped alone.
    """

    def __init__(self, environments: SyncVectorEnv) -> None:
        super().__init__(environments)
        self.copies = environments

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """As the environments'."""
        copies, space, going = self.copies, self.copies.single_action_space, list[tuple[Seat, Moves]]()
        for i, action in enumerate(iterate(copies.action_space, actions)):
            if not copies._autoreset_envs[i]:
                seat: Any = copies.envs[i].unwrapped
                going.append(
                    (seat, seat.taking(space.structured(action) if isinstance(space, FlatActions) else action))
                )
        _go_on(going)
        return self.env.step(actions)


def _go_on(going: list[tuple[Seat, Moves]]) -> None:
    """Play games up to their seats' turns, one move in each at a time, and set what they come to as `ahead`."""
    answers: list[Any] = [None] * len(going)
    while going:
        asking: list[tuple[Seat, Moves, Asked]] = []
        for (seat, moves), answer in zip(going, answers, strict=True):
            try:
                asking.append((seat, moves, moves.send(answer)))
            except StopIteration as end:
                seat.ahead = end.value
            except Exception as error:  # of the game: the step of this seat raises it
                seat.ahead = error
        going, answers = [(seat, moves) for seat, moves, _ in asking], [None] * len(asking)
        for player in {id(seat.player): seat.player for seat, _ in going}.values():
            its = [k for k, (seat, _) in enumerate(going) if seat.player is player]
            for k, move in zip(its, _moves(player, [asking[k][::2] for k in its]), strict=True):
                answers[k] = move


def _moves(player: Player, asked: list[tuple[Seat, Asked]]) -> list[Any]:
    """A player's moves in several games."""
    if isinstance(player, Frozen):
        return player.moves([x for _, x in asked])
    return [player(x.obs, x.info, seat.action_space, x.generator) for seat, x in asked]


def play(seat: Seat, players: Sequence[Player], generator: np.random.Generator) -> list[float]:
    """One game in which every seat has a player of its own. Returns the sum of each player's rewards."""
    game, total = seat.game, dict.fromkeys(seat.agents, 0.0)
    held: dict[Any, dict[str, Tensor]] = {agent: {} for agent in seat.agents}
    game.reset(seed=int(generator.integers(2**31)))
    while game.agents:
        now = game.agent_selection
        obs, reward, terminated, truncated, info = game.last()
        total[now] += float(checked_number(reward))
        asked = Asked(obs, info or {}, generator, held[now])
        over, player = terminated or truncated, players[seat.agents.index(now)]
        game.step(None if over else _moves(player, [(seat, asked)])[0])
    return [total[x] for x in seat.agents]
