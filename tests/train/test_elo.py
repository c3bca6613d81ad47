"""Elo ratings: the maximum of a likelihood, and the games that they are fitted to."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nim import Nim

import policygrad as pg
from policygrad import cli
from policygrad.control.seats import Opponents, Seat, play
from policygrad.errors import UserError
from policygrad.train.elo import chosen, fitted, table
from policygrad.train.page import gathered, html_of


def share(a: float, b: float) -> float:
    """What a player of rating a expects against one of rating b, by the definition of Elo's ratings."""
    return 1 / (1 + 10 ** ((b - a) / 400))


def test_two_players_have_their_odds() -> None:
    """In closed form: with the draw more, 7.5 + 0.5 points to 2.5 + 0.5."""
    ratings = fitted(np.array([[0.0, 7.5], [2.5, 0.0]]))
    assert ratings[0] - ratings[1] == pytest.approx(400 * np.log10(8 / 3), abs=1e-6)
    assert ratings.sum() == pytest.approx(0, abs=1e-6)


def test_ratings_are_found_again_from_the_points_that_they_expect() -> None:
    true, points = np.array([-300.0, -50.0, 0.0, 120.0, 230.0]), np.zeros((5, 5))
    for i, j in itertools.permutations(range(5), 2):
        points[i, j] = 1e9 * share(true[i], true[j])
    assert fitted(points) == pytest.approx(true, abs=1e-4)


def test_the_likelihood_is_at_its_maximum() -> None:
    points = np.random.default_rng(0).integers(0, 9, (4, 4)).astype(float)
    np.fill_diagonal(points, 0)
    seen = points + 0.5 * (1 - np.eye(4))

    def likelihood(ratings: np.ndarray) -> float:
        pairs = itertools.permutations(range(4), 2)
        return sum(seen[i, j] * np.log(share(ratings[i], ratings[j])) for i, j in pairs)

    best = fitted(points)
    for k in range(4):
        for step in (-1.0, 1.0):
            assert likelihood(best + step * np.eye(4)[k]) < likelihood(best)


def test_a_player_who_wins_every_game_has_a_rating() -> None:
    ratings = fitted(np.array([[0.0, 10.0], [0.0, 0.0]]))
    assert ratings[0] - ratings[1] == pytest.approx(400 * np.log10(10.5 / 0.5))


def test_players_are_chosen_evenly_with_the_last() -> None:
    assert evenly(10, 20) == list(range(10))
    assert evenly(10, 4) == [0, 3, 6, 9]
    assert evenly(10, 2) == [0, 9]
    assert evenly(10, 1) == [9]


def evenly(count: int, room: int) -> list[int]:
    training = pg.Training("ppo", Nim, num_envs=2, num_steps=32, iterations=1, opponent="self")
    (one,) = training.world.selves.frozen  # type: ignore[attr-defined]
    selves = [type(one)(k, 0, one.policy, None, one.observation_space, one.action_space) for k in range(count)]
    return [x.iteration for x in chosen(selves, room)]


def test_a_game_is_played_by_its_players_in_their_seats() -> None:
    """From 7, always one against always two: 1, 2, 1, 2, and the first player takes the last one."""

    def takes(count: int) -> Any:
        return lambda obs, info, space, generator: min(count, int(obs["observation"][0])) - 1

    seat = Seat(Nim(), Opponents())
    generator = np.random.default_rng(0)
    assert play(seat, [takes(1), takes(2)], generator) == [1, -1]
    assert play(seat, [takes(2), takes(1)], generator) == [1, -1]
    assert play(Seat(Nim(heap=6), Opponents()), [takes(1), takes(2)], generator) == [-1, 1]


@pytest.fixture(scope="module")
def of_self_play(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "nim"
    how: Any = {"opponent": "self", "freeze_every": 2, "iterations": 4, "progress": False}
    pg.train("ppo", "nim:Nim", out=out, num_envs=4, num_steps=19, **how)
    return out


def test_the_table_of_a_run(of_self_play: Path) -> None:
    run = pg.Run.load(of_self_play, trust=True)
    ratings = pg.elo(run, games=4)
    assert [x.iteration for x in ratings] == [None, 0, 2, 4]
    assert ratings[0].elo == 0
    assert all(x.games == 12 == x.wins + x.draws + x.losses for x in ratings)
    assert sum(x.wins for x in ratings) == sum(x.losses for x in ratings) == 24
    assert pg.elo(run, games=4) == ratings
    assert pg.elo(run, games=4, seed=1) != ratings
    assert [x.iteration for x in pg.elo(run, games=2, players=3)] == [None, 0, 4]
    assert table(ratings).splitlines()[-1].split()[:2] == ["iteration", "4"]


def test_the_command(of_self_play: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rest, read in ((["--json"], lambda x: json.loads(x)["ratings"]), ([], str.splitlines)):
        with pytest.raises(SystemExit) as stop:
            cli.main(["elo", str(of_self_play), "--trust", "--games", "2", *rest])
        assert not stop.value.code
        assert len(read(capsys.readouterr().out)) == (4 if rest else 5)


def test_the_report_shows_what_the_command_found(of_self_play: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (of_self_play / "elo.json").unlink(missing_ok=True)
    assert "Elo" not in html_of(gathered([of_self_play]))
    with pytest.raises(SystemExit):
        cli.main(["elo", str(of_self_play), "--trust", "--games", "2", "--json"])
    page = html_of(gathered([of_self_play]))
    for rating in json.loads(capsys.readouterr().out)["ratings"]:
        cells = [rating["player"], f"{rating['elo']:.0f}", *(str(rating[x]) for x in ("games", "wins", "draws"))]
        assert re.search("</td><td[^>]*>".join(map(re.escape, cells)), page), rating
    wrong = {
        "ratings": [
            {"player": "<b>", "elo": "<i>"},
            3,
            {"player": "<u>", **dict.fromkeys(("elo", "games", "wins", "draws", "losses"), 1)},
        ]
    }
    (of_self_play / "elo.json").write_text(json.dumps(wrong))
    page = html_of(gathered([of_self_play]))
    assert "<i>" not in page
    assert "<u>" not in page
    assert "&lt;u&gt;" in page


def test_what_cannot_be_rated(of_self_play: Path, tmp_path: Path) -> None:
    run = pg.Run.load(of_self_play, trust=True)
    for how, said in (({"games": 3}, "give 2, 4"), ({"games": 0}, "give 2, 4"), ({"players": 1}, "at least two")):
        with pytest.raises(UserError, match=said):
            pg.elo(run, **how)  # type: ignore[arg-type]
    other = pg.train("ppo", Nim, num_envs=2, num_steps=32, iterations=1, progress=False)
    with pytest.raises(UserError, match="train with opponent self"):
        pg.elo(other)
    with pytest.raises(UserError, match="the run names what is not its own"):
        pg.elo(of_self_play)

    class Three(Nim):
        possible_agents = ("first", "second", "third")

    run.world.task = Three
    with pytest.raises(UserError, match="3 players"):
        pg.elo(run)
