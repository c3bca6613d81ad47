"""The T-maze: its rules, and that it needs memory."""

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env

from policygrad.control.tmaze import DOWN, FORWARD, UP, TMaze
from policygrad.errors import UserError


@pytest.mark.parametrize("length", [1, 2, 10])
def test_the_sign_says_which_way_is_right_and_is_seen_once(length: int) -> None:
    maze, signs = TMaze(length), set()
    maze.reset(seed=0)
    for right in (True, False) * 10:
        obs, _ = maze.reset()
        sign = int(obs[0])
        signs.add(sign)
        assert obs.tolist() == [sign, 1, 0]
        for step in range(length):
            obs, reward, terminated, truncated, _ = maze.step(FORWARD)
            assert obs.tolist() == ([0, 1, 0] if step + 1 < length else [0, 0, 1])
            assert (reward, terminated, truncated) == (0, False, False)
        way = UP if (sign == 1) == right else DOWN
        _, reward, terminated, _, info = maze.step(way)
        assert (reward, terminated, info) == (1 if right else -1, True, {"is_success": float(right)})
    assert signs == {-1, 1}


def test_a_walker_that_does_not_walk_is_cut() -> None:
    maze = TMaze(2)
    maze.reset(seed=0)
    for action, place in ((UP, 0), (DOWN, 0), (FORWARD, 1), (FORWARD, 2), (FORWARD, 2)):
        obs, reward, terminated, truncated, _ = maze.step(action)
        assert reward == (0 if action == FORWARD and maze.steps < 5 else -0.1)
        assert (maze.place, obs[0], terminated, truncated) == (place, 0, False, False)
    for step in range(6, 13):
        *_, truncated, info = maze.step(FORWARD)
        assert truncated == (step == 12)
    assert info == {"is_success": 0.0}


def test_it_is_an_environment_of_gymnasium() -> None:
    check_env(gymnasium.make("policygrad/TMaze-v0", length=3).unwrapped, skip_render_check=True)
    for length in (0, -1):
        with pytest.raises(UserError, match=f"length is {length}: the corridor of a T-maze needs 1 step or more"):
            TMaze(length)
