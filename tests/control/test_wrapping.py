"""Gymnasium's wrappers by name: the same as in code, kept with the run, and none that reaches out of it."""

import json
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers

import policygrad as pg
from policygrad.control import make_environments
from policygrad.control.environments import close
from policygrad.control.wrapping import NAMES, wrapped, wrapper
from policygrad.errors import UserError

SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 32, "minibatch_size": 32, "iterations": 2, "hidden": (8,), "preset": "none",
    "progress": False,
}  # fmt: skip


def names_of(environment: gymnasium.Env) -> list[str]:
    """The wrappers of an environment, from the outside."""
    found = []
    while isinstance(environment, gymnasium.Wrapper):
        found.append(type(environment).__name__)
        environment = environment.env
    return found


@pytest.mark.parametrize(
    ("texts", "make"),
    [
        (["TimeLimit:7"], lambda x: wrappers.TimeLimit(x, 7)),
        (['TimeLimit:{"max_episode_steps": 7}'], lambda x: wrappers.TimeLimit(x, max_episode_steps=7)),
        (["RescaleAction:-1,1"], lambda x: wrappers.RescaleAction(x, -1, 1)),
        (["ReshapeObservation:[1,3]"], lambda x: wrappers.ReshapeObservation(x, (1, 3))),
        (["ClipReward:-0.5,0.5"], lambda x: wrappers.ClipReward(x, -0.5, 0.5)),
        (
            ["NormalizeObservation", "FrameStackObservation:3"],
            lambda x: wrappers.FrameStackObservation(wrappers.NormalizeObservation(x), 3),
        ),
        (
            ["FrameStackObservation:3", "NormalizeObservation"],
            lambda x: wrappers.NormalizeObservation(wrappers.FrameStackObservation(x, 3)),
        ),
        ([], lambda x: x),
    ],
    ids=["limit", "limit by name", "action", "reshape", "reward", "stack of normal", "normal of stack", "none"],
)
def test_a_name_is_what_it_is_in_code(texts: list[str], make: Any) -> None:
    """The same wrappers, and the same numbers step by step."""
    named = wrapped(gymnasium.make("Pendulum-v1"), [wrapper(x) for x in texts])
    written = make(gymnasium.make("Pendulum-v1"))
    assert names_of(named) == names_of(written)
    assert (named.observation_space, named.action_space) == (written.observation_space, written.action_space)
    one, other = (x.reset(seed=0)[0] for x in (named, written))
    for k in range(7):
        np.testing.assert_array_equal(one, other)
        action = np.full(named.action_space.shape, np.sin(k), np.float32)
        (one, *rest), (other, *others) = named.step(action)[:4], written.step(action)[:4]
        assert rest == others


def test_every_name_is_a_wrapper_of_gymnasium_and_none_writes_or_opens() -> None:
    assert all(issubclass(getattr(wrappers, name), gymnasium.Wrapper) for name in NAMES)
    assert not {"RecordVideo", "HumanRendering", "RenderCollection", "Autoreset", "TransformReward"} & set(NAMES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('RecordVideo:"/tmp"', "no wrapper is called 'RecordVideo'"),
        ("os:system", "no wrapper is called 'os'"),
        ("timelimit:3", "did you mean TimeLimit"),
        ("TimeLimit:seven", "its arguments are no JSON"),
        ("TimeLimit:[" + "[" * 5000, "its arguments are no JSON"),
        ("TimeLimit", "does not fit the environment or its arguments: TypeError"),
        ("TimeLimit:0", "does not fit the environment or its arguments"),
        ("RescaleAction:-1,1", "does not fit the environment or its arguments"),
        ("x" * 500, "no wrapper is called"),
        ("FrameStackObservation:1000000000000", "would take .* GiB, and .* are free here: make it smaller"),
        ('FrameStackObservation:{"stack_size": 1000000000000}', "would take .* GiB"),
        ("ResizeObservation:[10000000,10000000]", "would take .* GiB"),
        ("AtariPreprocessing:30,4,100000000", "would take .* GiB"),
    ],
    ids=[
        *("writes", "code", "case", "no JSON", "deep", "no argument", "zero", "another space", "long"),
        *("large", "large by name", "pixels", "a screen"),
    ],
)
def test_what_cannot_be_is_one_line(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make_environments("CartPole-v1", wrap=[text])
    assert len(str(raised.value)) <= 200


def test_each_copy_is_wrapped_whatever_makes_it() -> None:
    """An id that has a native form goes without it."""
    for task, how in (("CartPole-v1", "auto"), (lambda: gymnasium.make("CartPole-v1"), "async")):
        environments = make_environments(task, 2, wrap=["TimeLimit:3"], vectorization=how)
        environments.reset(seed=[0, 1])
        ends = [environments.step(np.array([0, 1]))[3].tolist() for _ in range(3)]
        assert ends == [[False, False], [False, False], [True, True]]
        close(environments)


def test_the_run_keeps_them_for_evaluation_and_resuming(tmp_path: Path) -> None:
    values = SMALL | {"wrap": ["TimeLimit:9", "RescaleAction:-1,1"], "checkpoint_every": 1}
    run = pg.train("ppo", "Pendulum-v1", out=tmp_path / "run", **values)
    assert run.world.action_space.high.tolist() == [1]
    assert run.evaluate(3).length_mean == 9
    loaded = pg.load(tmp_path / "run")
    assert loaded.evaluate(3).returns == run.evaluate(3).returns
    assert loaded.evaluate(3, environment="Pendulum-v1").length_mean == 9, "another environment is wrapped, too"
    pg.resume(tmp_path / "run", iterations=1, progress=False)
    with pytest.raises(UserError, match="hand in a function"):
        run.evaluate(3, environment=gymnasium.make("Pendulum-v1"))


@pytest.mark.parametrize(
    ("task", "wrap", "options"),
    [
        ("Pendulum-v1", ["TimeLimit:9", "RescaleAction:-1,1"], {}),
        ("CartPole-v1", ["NormalizeObservation", "RepeatAction:2"], {}),
        ("Taxi-v4", ["TimeLimit:9"], {"action_mask": "info"}),
    ],
    ids=["actions", "statistics", "masks"],
)
def test_what_is_filmed_is_what_is_evaluated(
    task: str, wrap: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    """The run's wrappers are around the environment once, with what they learned."""
    pytest.importorskip("pygame")
    run = pg.train("ppo", task, out=tmp_path / "run", wrap=wrap, **SMALL, **options)
    found = pg.watch(tmp_path / "run", tmp_path / "film.gif", max_steps=12)
    one = pg.load(tmp_path / "run").evaluate(1, max_steps=12)
    assert (found.returns, found.lengths) == (one.returns, one.lengths)
    assert run.evaluate(1, max_steps=12).returns == found.returns


def test_a_file_names_none_that_reaches_out(tmp_path: Path) -> None:
    pg.train("ppo", "Pendulum-v1", out=tmp_path / "run", **SMALL)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["options"]["wrap"] = [f'RecordVideo:"{tmp_path}/video"']
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="no wrapper is called 'RecordVideo'"):
        pg.load(tmp_path / "run").evaluate(1)
    assert not (tmp_path / "video").exists()


@pytest.mark.parametrize("what", ["an object", "EnvPool"])
def test_what_is_made_already_is_not_wrapped(what: str) -> None:
    task = gymnasium.make("CartPole-v1") if what == "an object" else "CartPole-v1"
    values: dict[str, Any] = {"num_envs": 1} if what == "an object" else {"vectorization": "envpool"}
    with pytest.raises(UserError, match="wrap"):
        pg.Training("ppo", task, wrap="TimeLimit:3", preset="none", **values)


def test_minigrids_wrapper_leaves_the_image() -> None:
    pytest.importorskip("minigrid")
    environments = make_environments("MiniGrid-Empty-5x5-v0", 2, wrap=["ImgObsWrapper"])
    policy = pg.Policy(environments.single_observation_space, environments.single_action_space)
    description: Any = policy.description
    assert (description["encoder"], description["channels"]) == ("small", "last")
    assert pg.Sampler(environments, 5, seed=0)(policy).obs.shape == (2, 5, 7, 7, 3)
    environments.close()


def test_minigrids_wrapper_without_minigrid_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "minigrid.wrappers", None)
    with pytest.raises(UserError, match=r"wrap ImgObsWrapper needs a package that is not installed: .*minigrid"):
        wrapper("ImgObsWrapper")(gymnasium.make("CartPole-v1"))
