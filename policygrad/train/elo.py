"""How strong the selves of a run of self-play are: they play each other, and Elo ratings are fitted to the results."""

import itertools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policygrad.control.environments import close, make_environments
from policygrad.control.seats import Frozen, Opponents, Player, Seat, play, random_player
from policygrad.errors import UserError, one_line
from policygrad.train.checkpoints import read_policy
from policygrad.train.run import Run, arithmetic
from policygrad.train.worlds.control import SELVES

RANDOM = "random"
KEPT = "elo.json"  # where the command leaves the ratings in a run's directory, for its report
SCALE = 400 / math.log(10)  # a rating's points for a factor e in the odds


@dataclass
class Rating:
    """A player with its rating, and how its games came out. iteration: of the policy; None for the random player."""

    player: str
    iteration: int | None
    elo: float
    games: int
    wins: int
    draws: int
    losses: int


def elo(run: Run | Path | str, *, games: int = 20, players: int = 12, seed: int = 1000) -> list[Rating]:
    """The ratings of a run's frozen selves and of a random player, which is 0, in the order of training.

    games: of each pair, half of them in each seat. players: at most so many, the first and the last among them. All
    sample their actions. Raises UserError for a run without self-play, and for games of other than two players.
    """
    if games < 2 or games % 2:
        raise UserError(f"games is {games}: each pair plays as many in one seat as in the other, so give 2, 4, ...")
    if players < 2:
        raise UserError(f"players is {players}: at least two are compared")
    run = run if isinstance(run, Run) else Run.load(run)
    with arithmetic(run.world, run.options.threads):
        found = chosen(_selves(run), players - 1)
        every: list[Player] = [random_player, *found]
        score = _tournament(run, every, games, seed)
    ratings = fitted(score[:, :, 0] + score[:, :, 1] / 2)
    rows = []
    for i, (its, rating) in enumerate(zip([None, *(x.iteration for x in found)], ratings - ratings[0], strict=True)):
        wins, draws, losses = (int(x) for x in score[i].sum(0))
        name = RANDOM if its is None else f"iteration {its:,}"
        rows.append(Rating(name, its, float(rating), wins + draws + losses, wins, draws, losses))
    return rows


def chosen(selves: list[Frozen], count: int) -> list[Frozen]:
    """At most `count` of them, as evenly as it goes: the last one always, the first one if there is room for two."""
    if len(selves) <= count:
        return selves
    return [selves[round(k)] for k in np.linspace(0, len(selves) - 1, count)] if count > 1 else selves[-1:]


def fitted(points: np.ndarray) -> np.ndarray:
    """Elo ratings [P] of the model in which player i gets the share 1 / (1 + 10^((R_j - R_i) / 400)) against j.

    points [P, P]: those of i against j, a draw half a point. The maximum of the likelihood (Bradley & Terry 1952), by
    Hunter's iteration (2004, eq. 3), with a draw more between each two players who have met: without it, one who has
    won all games would have no rating. Their mean is 0.
    """
    met = points + points.T > 0
    points = points + met / 2
    pairs, strength = points + points.T, np.ones(len(points))
    for _ in range(100_000):
        before = strength
        strength = points.sum(1) / (pairs / (strength[:, None] + strength)).sum(1)
        strength = strength / np.exp(np.log(strength).mean())
        if np.abs(np.log(strength / before)).max() < 1e-10:
            break
    return SCALE * np.log(strength)


def table(ratings: list[Rating]) -> str:
    """The ratings for a reader."""
    lines = [f"{'player':<18} {'Elo':>6} {'games':>6} {'won':>6} {'drawn':>6} {'lost':>6}"]
    lines += [f"{x.player:<18} {x.elo:>6.0f} {x.games:>6} {x.wins:>6} {x.draws:>6} {x.losses:>6}" for x in ratings]
    return "\n".join(lines)


def summary(ratings: list[Rating]) -> dict[str, Any]:
    """The ratings for JSON."""
    return {"ratings": [asdict(x) for x in ratings]}


def _selves(run: Run) -> list[Frozen]:
    """The frozen selves in a run's directory, in the order of training."""
    name = one_line(run.world.name, 40)
    if run.world.kind != "control" or getattr(run.options, "opponent", "random") != "self" or run.directory is None:
        raise UserError(f"this run on {name} has no earlier selves: train with opponent self, and in a directory")
    world: Any = run.world
    places = [x for x in (run.directory / SELVES).glob("*") if x.name.isdecimal() and (x / "policy.json").exists()]
    if not places:
        raise UserError(f"this run on {name} has no earlier selves in its directory: let it train on")
    known, found = world.seen_by_players(), []
    for place in sorted(places, key=lambda x: int(x.name)):
        saved = read_policy(place, None)
        found.append(Frozen(int(place.name), 0, saved.policy, saved.normalizer, known, world.action_space))
    return found


def _tournament(run: Run, players: list[Player], games: int, seed: int) -> np.ndarray:
    """Wins, draws and losses of each player against each other one, [P, P, 3]."""
    world: Any = run.world
    opponents = Opponents()
    environments = make_environments(world.task, 1, **world.how(), opponents=opponents)
    try:
        (seat,) = opponents.seats
        _check_two(seat)
        score = np.zeros((len(players), len(players), 3))
        for i, j in itertools.combinations(range(len(players)), 2):
            for k in range(games):
                generator = np.random.default_rng([seed, i, j, k])
                pair = [players[i], players[j]] if k % 2 == 0 else [players[j], players[i]]
                returns = play(seat, pair, generator)
                mine, other = returns if k % 2 == 0 else returns[::-1]
                score[i, j, int(1 - np.sign(mine - other))] += 1
                score[j, i, int(1 - np.sign(other - mine))] += 1
        return score
    finally:
        close(environments)


def _check_two(seat: Seat) -> None:
    if len(seat.agents) != 2:
        raise UserError(f"the game has {len(seat.agents)} players, and Elo ratings are of two: compare by evaluations")
