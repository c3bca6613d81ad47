"""Gymnasium's environments as conversations."""

from typing import Any

import gymnasium
import pytest
from gymnasium.spaces import Discrete, Text

from policygrad.errors import UserError
from policygrad.language.conversations import Environment, starts
from policygrad.language.games import TextGame

MOVES = {"left": 0, "down": 1, "right": 2, "up": 3}


class Parrot(gymnasium.Env[str, str]):
    """It repeats, twice."""

    observation_space, action_space = Text(20), Text(20)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 2
        return f"hello {self.np_random.integers(100)}", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return action * 2, float(len(action)), self.left == 0, False, {}


def lake() -> TextGame:
    return TextGame(
        lambda: gymnasium.make("FrozenLake-v1", is_slippery=False, max_episode_steps=5),
        say=lambda field: f"You are on {field}.",
        actions=MOVES,
        rules="Walk. ",
    )


def test_a_game_in_text_is_played_as_it_is() -> None:
    game = TextGame(Parrot)
    assert isinstance(game, Environment)
    assert game.reset(3) == TextGame(Parrot).reset(3)
    assert game.reset(3) != game.reset(4)
    assert game.step(" ab\n") == ([{"role": "user", "content": "abab"}], 2.0, False)
    assert game.step("c") == (None, 1.0, True)
    assert len(starts(lambda: TextGame(Parrot), 5)) == 5


def test_numbers_are_said_and_names_are_actions() -> None:
    game = lake()
    assert game.reset(0) == [{"role": "user", "content": "Walk. You are on 0."}]
    assert game.step("down") == ([{"role": "user", "content": "You are on 4."}], 0.0, False)
    assert game.step("fly") == ([{"role": "user", "content": "That is no action."}], 0.0, False)
    assert game.step("right") == (None, 0.0, True), "a hole in the ice"
    game.reset(0)
    for _ in range(4):
        assert game.step("left")[2] is False
    assert game.step("left") == (None, 0.0, True), "the time limit, which the turn without a step did not move"


def test_what_is_no_text_must_be_said() -> None:
    with pytest.raises(UserError, match="FrozenLake-v1 has no text but a Discrete: give say"):
        TextGame("FrozenLake-v1")
    with pytest.raises(UserError, match="give actions"):
        TextGame("FrozenLake-v1", say=str)

    class Half(Parrot):
        action_space = Discrete(2)  # type: ignore[assignment]

    with pytest.raises(UserError, match="has no text but a Discrete: give actions") as caught:
        TextGame(Half)
    assert len(str(caught.value)) <= 200
