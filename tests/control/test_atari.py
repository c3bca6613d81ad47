"""Atari games: one environment is preprocessed exactly as ale-py's own vector environment does it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import policygrad as pg
from policygrad.control.atari import judged
from policygrad.errors import UserError

GAMES = ("ALE/Pong-v5", "ALE/Breakout-v5")
STILL = {"repeat_action_probability": 0.0, "noop_max": 0}  # no chance


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")


@pytest.mark.parametrize("options", [{}, {"episodic_life": True, "reward_clipping": False, "stack_num": 3}], ids=str)
@pytest.mark.parametrize("game", GAMES)
def test_one_game_is_the_native_vector_environment_bit_for_bit(game: str, options: dict[str, Any]) -> None:
    native, single = (
        pg.make_environments(game, 1, vectorization=how, env_options=STILL | options) for how in ("auto", "sync")
    )
    assert type(native.unwrapped).__name__ == "AtariVectorEnv"
    assert native.single_observation_space == single.single_observation_space
    assert native.single_action_space == single.single_action_space
    generator, rewards, ends = np.random.default_rng(0), 0, 0
    np.testing.assert_array_equal(native.reset(seed=1)[0], single.reset(seed=1)[0])
    for _ in range(600):
        action = generator.integers(native.single_action_space.n, size=1)  # type: ignore[attr-defined]
        found, expected = native.step(action)[:4], single.step(action)[:4]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        rewards, ends = rewards + bool(found[1]), ends + bool(found[2])
    assert rewards > 0
    assert bool(ends) == (game == "ALE/Breakout-v5")
    native.close()
    single.close()


def test_the_usual_shape_is_the_default() -> None:
    environments = pg.make_environments("ALE/Pong-v5", 2)
    space: Any = environments.single_observation_space
    assert (space.shape, space.dtype) == ((4, 84, 84), np.uint8)
    environments.close()


def test_an_evaluation_plays_whole_games_for_their_own_score(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("policygrad.control.evaluation.make_environments", lambda *_, **how: seen.append(how) or 1 / 0)
    for environment in ("ALE/Breakout-v5", "ale_py:ALE/Breakout-v5"):
        with pytest.raises(ZeroDivisionError):
            pg.evaluate(torch.nn.Identity(), environment, env_options={"episodic_life": True, "noop_max": 3})
    whole = {"episodic_life": False, "reward_clipping": False, "noop_max": 3}
    assert [how["env_options"] for how in seen] == [whole, whole]
    assert judged("CartPole-v1", {"a": 1}) == {"a": 1}


def test_it_trains_saves_and_plays(tmp_path: Path) -> None:
    options = {"num_envs": 2, "num_steps": 4, "minibatch_size": 8, "epochs": 1, "iterations": 1}
    run = pg.train("ppo", "ALE/Breakout-v5", out=tmp_path, progress=False, **options)
    assert run.preset == "ALE/Breakout-v5"
    assert run.policy.description["encoder"] == "nature"  # type: ignore[index, union-attr]
    assert run.policy.description["hidden"] == []  # type: ignore[index, union-attr]
    assert pg.load(tmp_path).evaluate(1, max_steps=5).lengths == [5]


def test_an_unknown_option_is_one_line() -> None:
    for how in ("auto", "sync"):
        with pytest.raises(UserError, match="could not be made: TypeError") as raised:
            pg.make_environments("ALE/Pong-v5", 2, vectorization=how, env_options={"no_such": 1})
        assert len(str(raised.value)) <= 200
