"""Tabular Markov decision processes small enough to solve: bandit, chain, cliff, Garnet, two states; with a clock, or
with all that was seen."""

from __future__ import annotations

import difflib
import itertools
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from policygrad.errors import UserError

DTYPE = torch.float64


@dataclass(frozen=True)
class World:
    """S states, A actions. The episode terminates with probability 1 - sum_s' transition[s, a, s'].

    A time limit truncates episodes and does not change the value. For a horizon that terminates them, see `with_clock`.
    Raises UserError if the numbers are not probabilities, or gamma is not in [0, 1].
    """

    transition: Float[Tensor, "S A S"]  # P(s'|s, a)
    reward: Float[Tensor, "S A"]
    start: Float[Tensor, " S"]
    gamma: float
    time_limit: int | None = None

    def __post_init__(self) -> None:
        leaving = self.transition.sum(-1)
        if self.transition.min() < 0 or leaving.max() > 1 + 1e-9 or self.start.min() < 0:
            raise UserError("a world's transitions and start are probabilities: none negative, no row above 1")
        if abs(float(self.start.sum()) - 1) > 1e-9 or not 0 <= self.gamma <= 1:
            raise UserError("a world's start sums to 1 and its gamma lies in [0, 1]")


def termination(world: World) -> Float[Tensor, "S A"]:
    """1 - sum_s' P(s'|s, a): the probability that this step ends the episode. Rounding errors become exactly 0."""
    missing = 1 - world.transition.sum(-1)
    return missing.where(missing > 1e-12, 0.0)


def bandit(rewards: Float[Tensor, "S A"]) -> World:
    """One decision in one of S equally likely contexts, then the end (Sutton & Barto 2018, section 2.9)."""
    states, actions = rewards.shape
    return World(
        torch.zeros(states, actions, states, dtype=DTYPE),
        rewards.to(DTYPE),
        torch.full((states,), 1 / states, dtype=DTYPE),
        gamma=1.0,
    )


def chain(length: int = 5, gamma: float = 0.9, slip: float = 0.1) -> World:
    """States in a line; actions left and right, swapped with probability `slip`.

    Leaving on the right pays 1 and ends the episode. Moving left in the first state pays 0.1 and stays there: the near
    reward distracts from the far one (after Strens 2000, figure 1).
    """
    walk = torch.zeros(length, 2, length, dtype=DTYPE)
    reward = torch.zeros(length, 2, dtype=DTYPE)
    for s in range(length):
        for action, right in ((0, slip), (1, 1 - slip)):
            walk[s, action, max(s - 1, 0)] += 1 - right
            if s + 1 < length:
                walk[s, action, s + 1] += right
    reward[-1] = torch.tensor([slip, 1 - slip], dtype=DTYPE)
    reward[0] += torch.tensor([0.1 * (1 - slip), 0.1 * slip], dtype=DTYPE)
    start = torch.zeros(length, dtype=DTYPE).index_fill(0, torch.tensor(0), 1.0)
    return World(walk, reward, start, gamma)


def cliff(height: int = 4, width: int = 12, gamma: float = 0.95, fall: float = -100.0) -> World:
    """A grid with a cliff in its bottom row, between start and goal (Sutton & Barto 2018, example 6.6).

    Actions up, right, down, left. Each step pays -1; a fall pays `fall` and leads back to the start; the goal ends the
    episode.
    """
    cells = height * width
    start_cell, goal = cells - width, cells - 1
    move = torch.zeros(cells, 4, cells, dtype=DTYPE)
    reward = torch.full((cells, 4), -1.0, dtype=DTYPE)
    for cell in range(cells):
        row, column = divmod(cell, width)
        for action, (down, right) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
            to = min(max(row + down, 0), height - 1) * width + min(max(column + right, 0), width - 1)
            if start_cell < to < goal:
                reward[cell, action], to = fall, start_cell
            if to != goal:
                move[cell, action, to] = 1.0
    start = torch.zeros(cells, dtype=DTYPE).index_fill(0, torch.tensor(start_cell), 1.0)
    return World(move, reward, start, gamma)


def garnet(
    states: int = 3,
    actions: int = 2,
    branching: int = 2,
    gamma: float = 0.9,
    termination: float = 0.0,
    seed: int = 0,
) -> World:
    """A random world: each (s, a) leads to `branching` random states, with random probabilities and rewards.

    Generic Average Reward Non-stationary Environment Test-bench (Archibald, McKinnon & Thomas 1995), here stationary.
    Each step ends the episode with probability `termination`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(states, actions, states, generator=generator, dtype=DTYPE).argsort(-1)[..., :branching]
    weight = torch.rand(states, actions, branching, generator=generator, dtype=DTYPE) + 0.1
    transition = torch.zeros(states, actions, states, dtype=DTYPE).scatter_(-1, order, weight)
    transition = (1 - termination) * transition / transition.sum(-1, keepdim=True)
    reward = torch.randn(states, actions, generator=generator, dtype=DTYPE)
    start = torch.rand(states, generator=generator, dtype=DTYPE)
    return World(transition, reward, start / start.sum(), gamma)


def two_states(gamma: float = 0.95) -> World:
    """Two states, actions stay and go: staying pays 1 in the first, 2 in the second (Kakade 2001, section 4, figure 2).

    Most episodes start in the first state, where the near reward keeps a plain gradient from the better second state.
    """
    stay_go = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]], dtype=DTYPE)
    reward = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=DTYPE)
    return World(stay_go, reward, torch.tensor([0.8, 0.2], dtype=DTYPE), gamma)


def with_clock(world: World, horizon: int) -> World:
    """The same world, terminating after `horizon` steps, with the time in the state: state t S + s is s at time t.

    The horizon is then part of the value, and V, Q and the visitation keep their stationary equations.
    """
    states, actions = world.reward.shape
    transition = torch.zeros(horizon, states, actions, horizon, states, dtype=DTYPE)
    for t in range(horizon - 1):
        transition[t, :, :, t + 1] = world.transition
    start = torch.zeros(horizon, states, dtype=DTYPE)
    start[0] = world.start
    size = horizon * states
    return replace(
        world,
        transition=transition.reshape(size, actions, size),
        reward=world.reward.repeat(horizon, 1),
        start=start.flatten(),
        time_limit=None,
    )


def with_history(world: World, look: Int[Tensor, " S"], horizon: int) -> tuple[World, Int[Tensor, "_ T"]]:
    """The same world, terminating after `horizon` steps, with all that was seen in the state.

    look: what each state looks like, numbers from 0; states that look the same are hidden from a policy that sees only
    this, and one with memory knows the looks so far. Returns the world, whose states are a history and the state under
    it, and what was seen up to and in each of them, followed by -1.
    """
    (states, actions), looks = world.reward.shape, int(look.max()) + 1
    firsts = [states * sum(looks**k for k in range(t)) for t in range(horizon + 1)]  # of each time
    size = firsts[-1]
    transition = torch.zeros(size, actions, size, dtype=DTYPE)
    histories = torch.full((size, horizon), -1)
    for t in range(horizon):
        for before, past in enumerate(itertools.product(range(looks), repeat=t)):
            for s in range(states):
                here, seen = firsts[t] + before * states + s, int(look[s])
                histories[here, : t + 1] = torch.tensor([*past, seen])
                if t + 1 < horizon:
                    there = firsts[t + 1] + (before * looks + seen) * states
                    transition[here, :, there : there + states] = world.transition[s]
    start = torch.zeros(size, dtype=DTYPE)
    start[:states] = world.start
    reward = world.reward.repeat(size // states, 1)
    return replace(world, transition=transition, reward=reward, start=start, time_limit=None), histories


# Small worlds by name. Each has a time limit, so any method can be trained on it. `tokens` is a world of completions,
# made by tokens.token_world.
NAMES = ("bandit", "chain", "cliff", "garnet", "two_states", "tokens")


def world_named(name: str) -> World:
    """The world of that name, with its usual sizes. Raises UserError with the nearest names for an unknown name."""
    match name:
        case "bandit":
            return replace(bandit(torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])), time_limit=1)
        case "chain":
            return replace(chain(), time_limit=100)
        case "cliff":
            return replace(cliff(), time_limit=200)
        case "garnet":
            return replace(garnet(10, 3, 3), time_limit=50)
        case "two_states":
            return replace(two_states(), time_limit=50)
        case "tokens":
            raise UserError("tokens is a world of completions: make it with policygrad.exact.tokens.token_world")
    near = difflib.get_close_matches(name, NAMES, n=2, cutoff=0.5)
    shown = name if len(name) <= 40 else name[:37] + "..."
    advice = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(NAMES)}"
    raise UserError(f"there is no exact world {shown!r}: {advice}")
