"""Catch: its rules, its two forms, and that it is learned."""

from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import policygrad as pg
from policygrad.control.catch import Catch, CatchVector, images
from policygrad.errors import UserError


def test_the_ball_falls_and_the_paddle_moves() -> None:
    game = Catch(4)
    obs, _ = game.reset(seed=0)
    column = game.column
    assert (game.row, game.paddle) == (0, 2)
    for row, action, paddle in ((1, 2, 3), (2, 2, 3), (3, 1, 3)):
        expected = np.zeros((1, 4, 4), np.uint8)
        expected[0, game.row, column] = expected[0, 3, game.paddle] = 255
        np.testing.assert_array_equal(obs, expected)
        obs, reward, terminated, truncated, info = game.step(action)
        assert (game.row, game.column, game.paddle) == (row, column, paddle)
        assert (terminated, truncated) == (row == 3, False)
        assert reward == (0 if row < 3 else 1 if column == 3 else -1)
    assert info == {"is_success": float(column == 3)}


@pytest.mark.parametrize("size", [3, 4, 9, 10])
def test_every_ball_can_be_caught_and_every_column_comes(size: int) -> None:
    game, columns = Catch(size), set()
    game.reset(seed=0)
    for _ in range(20 * size):
        game.reset()
        columns.add(game.column)
        steps, ended = 0, False
        while not ended:
            _, reward, ended, _, _ = game.step(1 + int(np.sign(game.column - game.paddle)))
            steps += 1
        assert (reward, steps) == (1.0, size - 1)
    assert columns == set(range(size))


def test_the_vector_form_plays_the_same_games() -> None:
    """Each copy is a game of its own, with the columns that it drew; the step after an end only resets."""
    many, generator = CatchVector(5, size=6), np.random.default_rng(0)
    obs, _ = many.reset(seed=1)
    games = [Catch(6) for _ in range(5)]
    for i, game in enumerate(games):
        game.column, game.paddle = int(many.column[i]), 3
    for _ in range(40):
        expected = [images(*np.array([[g.row], [g.column], [g.paddle]]), 6)[0] for g in games]
        np.testing.assert_array_equal(obs, expected)
        actions = generator.integers(3, size=5)
        obs, reward, ended, truncated, info = many.step(actions)
        for i, game in enumerate(games):
            if game.row == 5:  # it ended before, and begins anew
                assert (reward[i], ended[i], many.row[i], many.paddle[i]) == (0.0, False, 0, 3)
                game.row, game.column, game.paddle = 0, int(many.column[i]), 3
                continue
            _, r, over, _, end = game.step(actions[i])
            assert (reward[i], ended[i], info["is_success"][i]) == (r, over, end["is_success"])
        assert not truncated.any()


def test_the_seed_decides() -> None:
    for make in (Catch, lambda: CatchVector(8)):
        first, again, other = (make().reset(seed=seed)[0] for seed in (3, 3, 4))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()


def test_it_is_an_environment_of_gymnasium() -> None:
    environment = gymnasium.make("policygrad/Catch-v0", size=5, render_mode="rgb_array")
    check_env(environment.unwrapped, skip_render_check=True)
    environment.reset(seed=0)
    picture: Any = environment.render()
    assert (picture.shape, picture.dtype) == ((80, 80, 3), np.uint8)
    assert picture[0, 16 * environment.unwrapped.column].tolist() == [255] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [2, 0, -1])
def test_an_impossible_size_is_refused(size: Any) -> None:
    for vectorization in ("auto", "sync"):
        with pytest.raises(UserError, match=f"size is {size}"):
            pg.make_environments("policygrad/Catch-v0", 2, vectorization=vectorization, env_options={"size": size})


def test_it_is_learned_and_its_preset_is_taken() -> None:
    run = pg.train("ppo", "policygrad/Catch-v0", steps=8_000, epochs=4, learning_rate=2e-3, seed=0, progress=False)
    assert run.preset == "policygrad/Catch-v0"
    assert run.evaluate(100).success > 0.5, "by chance it is about 0.1"


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Any) -> None:
    options = {"num_envs": 3, "num_steps": 14, "minibatch_size": 42, "epochs": 1, "preset": "none", "progress": False}
    whole = pg.train("ppo", "policygrad/Catch-v0", iterations=4, **options)
    pg.train("ppo", "policygrad/Catch-v0", iterations=2, out=tmp_path, checkpoint_every=1, **options)
    resumed = pg.resume(tmp_path, iterations=2, progress=False)
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert (a == b).all()


def test_overlap_takes_images() -> None:
    options = {"num_envs": 3, "num_steps": 14, "minibatch_size": 42, "epochs": 1, "preset": "none", "progress": False}
    run = pg.train("ppo", "policygrad/Catch-v0", iterations=2, overlap=True, **options)
    assert [row["policy_lag"] for row in run.metrics] == [0.0, 1.0]
