"""Presets: every file fits its methods and its environment, and the right one is taken."""

import math
import os
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from probes import Known

import policygrad as pg
from policygrad.control.environments import find
from policygrad.errors import UserError
from policygrad.train import presets
from policygrad.train.methods import METHODS
from policygrad.train.options import OptionError, options_of, validate, with_values

PROMISED = {
    "CartPole-v1",
    "Acrobot-v1",
    "Pendulum-v1",
    "MountainCarContinuous-v0",
    "LunarLander-v3",
    "LunarLanderContinuous-v3",
    "HalfCheetah-v5",
    "Hopper-v5",
    "Walker2d-v5",
    "Ant-v5",
    "Swimmer-v5",
    "InvertedPendulum-v5",
    "ALE/Pong-v5",
    "ALE/Breakout-v5",
    "policygrad/Catch-v0",
    "policygrad/TMaze-v0",
}


TASKS = {"arithmetic", "lookup"}  # of language models


def test_the_promised_presets_are_there() -> None:
    assert set(presets.names()) >= PROMISED | TASKS
    assert all("ppo" in presets.load(name) for name in PROMISED)
    assert all(presets.choose(None, method, "arithmetic", {})[0] == "arithmetic" for method in METHODS)


@pytest.mark.parametrize("name", presets.names())
def test_it_is_named_for_an_environment_or_a_task(name: str) -> None:
    if name.startswith("ALE/"):
        pytest.importorskip("ale_py")
    assert name in TASKS or find(name).id == name


def settings(name: str) -> list[str]:
    """The methods that a preset is for."""
    return list(METHODS) if presets.ANY in presets.load(name) else list(presets.load(name))


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in presets.names() for method in settings(name)])
def test_every_setting_is_a_possible_option_of_its_method(name: str, method: str) -> None:
    chosen, tuned = presets.choose(name, method, name, {})
    assert chosen == name
    assert tuned.items() >= presets.load(name).get(method, {}).items()
    defaults = options_of(method, "language" if name in TASKS else "control")()
    for_any = {option: x for option, x in tuned.items() if option not in presets.load(name).get(method, {})}
    validate(with_values(defaults, tuned), with_values(defaults, for_any))
    assert not {"seed", "device", "threads", "steps"} & set(tuned), "these are the user's"


def test_the_environments_own_is_taken_by_default() -> None:
    assert presets.choose(None, "ppo", "CartPole-v1", {}) == ("CartPole-v1", presets.load("CartPole-v1")["ppo"])
    assert presets.choose(None, "ppo", "somewhere:CartPole-v1", {})[0] == "CartPole-v1"


@pytest.mark.parametrize("task", ["probes:Known-v0", "CartPole-v0", "exact:chain", gymnasium.make, None])
def test_there_is_none_by_default_for_other_tasks(task: object) -> None:
    assert presets.choose(None, "ppo", task, {}) == (None, {})


def test_one_in_a_folder_is_named_with_it_and_is_no_users_file() -> None:
    for task in ("ALE/Pong-v5", "ale_py:ALE/Pong-v5"):
        assert presets.choose(None, "ppo", task, {})[0] == "ALE/Pong-v5"
    assert presets.choose("ALE/Pong-v5", "ppo", "CartPole-v1", {})[1]["clip_low"] == 0.1
    assert not presets.is_file("ALE/Pong-v5")
    assert presets.is_file("ALE/Pongg-v5")


def test_none_takes_none() -> None:
    assert presets.choose("none", "ppo", "CartPole-v1", {}) == (None, {})


def test_another_environments_can_be_taken_by_name() -> None:
    assert presets.choose("CartPole-v1", "ppo", "Acrobot-v1", {}) == presets.choose(None, "ppo", "CartPole-v1", {})


def test_an_unknown_one_gives_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown preset 'CartPole-v2': did you mean CartPole-v1"):
        presets.load("CartPole-v2")


def test_one_without_the_method_says_which_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "load", lambda name: {"ppo": {}, "trpo": {}})
    with pytest.raises(UserError, match=r"no settings for npg, only for ppo, trpo"):
        presets.choose("CartPole-v1", "npg", "CartPole-v1", {})


def test_the_arithmetic_tasks_is_for_its_own_model() -> None:
    assert presets.choose(None, "grpo", "arithmetic", {})[0] == "arithmetic"
    assert presets.choose(None, "grpo", "arithmetic", {"model": "of-mine"}) == (None, {})


def test_what_is_given_goes_before_the_preset() -> None:
    run = pg.train("ppo", "CartPole-v1", iterations=1, num_envs=2, minibatch_size=64, epochs=1, progress=False)
    tuned = presets.load("CartPole-v1")["ppo"]
    assert run.preset == "CartPole-v1"
    assert run.options.num_envs == 2
    assert run.options.gamma == tuned["gamma"]


FEW: dict[str, Any] = {"iterations": 1, "epochs": 1}


def test_from_python_the_preset_and_its_values_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    pg.train("PPO", "CartPole-v1", gamma=0.5, **FEW)
    tuned = presets.load("CartPole-v1")["ppo"] | {"gamma": 0.5, "epochs": 1}
    assert capsys.readouterr() == ("", "preset CartPole-v1: " + ", ".join(f"{x}={tuned[x]}" for x in tuned) + "\n")
    pg.train("ppo", "CartPole-v1", progress=False, **FEW)
    pg.train("ppo", "CartPole-v1", preset="none", **FEW)
    assert capsys.readouterr() == ("", "")


def cartpole() -> gymnasium.Env:
    return gymnasium.make("CartPole-v1")


UNUSED = 'note: CartPole-v1 has a preset, which is for its id and not used here: preset="CartPole-v1" uses it'


@pytest.mark.parametrize(
    ("task", "options", "said"),
    [
        (cartpole, {}, f"{UNUSED}\n"),
        (cartpole, {"vectorization": "async", "num_envs": 2}, f"{UNUSED}\n"),
        (lambda: gymnasium.wrappers.ClipReward(cartpole(), 0, 1), {}, f"{UNUSED}\n"),
        (cartpole(), {"minibatch_size": 16}, f"{UNUSED}, with a function that makes the environment\n"),
        (gymnasium.make_vec("CartPole-v1", 4), {}, f"{UNUSED}\n"),
        (cartpole, {"preset": "none"}, ""),
        (cartpole, {"progress": False}, ""),
        (Known, {}, ""),
    ],
    ids=["function", "processes", "wrapped", "object", "vector", "none", "quiet", "no preset"],
)
def test_one_that_is_not_used_for_an_environment_of_ones_own_is_named(
    task: Any, options: dict[str, Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = pg.train("ppo", task, **FEW, **options)
    assert capsys.readouterr() == ("", said)
    assert run.preset is None


def test_what_the_note_says_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    run = pg.train("ppo", cartpole, preset="CartPole-v1", **FEW)
    assert run.options.num_envs == presets.load("CartPole-v1")["ppo"]["num_envs"]
    assert capsys.readouterr().err.startswith("preset CartPole-v1: num_envs=8, ")


def test_without_a_preset_the_defaults_are_the_methods() -> None:
    run = pg.train("actor_critic", "CartPole-v1", preset="none", iterations=1, progress=False)
    assert run.preset is None
    assert run.options == with_values(options_of("actor_critic", "control")(), {"iterations": 1})


def test_a_preset_for_another_world_is_refused_by_its_name() -> None:
    said = "preset CartPole-v1: ppo has no option 'num_steps' on exact"
    with pytest.raises(OptionError, match=said) as raised:
        pg.train("ppo", "exact:chain", preset="CartPole-v1", progress=False)
    assert raised.value.option == "num_steps"
    assert len(str(raised.value)) <= 200


def test_what_is_set_for_any_method_is_set_where_a_method_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "load", lambda name: {"any": {"epochs": 2, "num_envs": 4}, "ppo": {"epochs": 3}})
    found = {m: presets.choose("CartPole-v1", m, "CartPole-v1", {})[1] for m in ("ppo", "grpo", "trpo")}
    assert found == {"ppo": {"epochs": 3, "num_envs": 4}, "grpo": {"epochs": 2, "num_envs": 4}, "trpo": {"num_envs": 4}}


def test_an_error_blames_the_value_of_the_preset_that_the_user_left() -> None:
    error, tuned = OptionError("lam", "lam is 2.5"), {"lam": 2.5, "n": 2}

    def said(error: UserError, preset: str | None, tuned: dict[str, Any], given: set[str]) -> str:
        with pytest.raises(type(error)) as raised, presets.blamed(preset, tuned, given):
            raise error
        return str(raised.value)

    assert said(error, "P", tuned, {"n"}) == "lam is 2.5 (preset P sets lam=2.5; preset none leaves it)"
    assert said(error, "P", tuned, {"lam"}) == said(error, None, {}, set()) == "lam is 2.5"
    assert said(OptionError("gamma", "gamma is 2"), "P", tuned, set()) == "gamma is 2"
    assert said(UserError("lam is 2.5"), "P", tuned, set()) == "lam is 2.5"


def test_the_line_has_what_the_run_reads() -> None:
    options = with_values(options_of("ppo", "control")(), {"credit": "n_step", "epochs": 3})
    assert presets.said("tuned", {"lam": 0.9, "epochs": 3, "n": 5}, options) == "preset tuned: epochs=3, n=5"


# A file of one's own


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_file_is_read_like_a_preset(tmp_path: Path) -> None:
    name = written(tmp_path / "mine.toml", "[any]\ngamma = 0.9\n[ppo]\nhidden = [8]\nclip_low = inf\nclip_high = inf\n")
    assert presets.choose(name, "ppo", "CartPole-v1", {}) == (
        name,
        {"gamma": 0.9, "hidden": [8], "clip_low": math.inf, "clip_high": math.inf},
    )
    run = pg.train("ppo", "probes:Known-v0", preset=Path(name), gamma=0.5, iterations=1, epochs=1, progress=False)
    assert (run.options.gamma, run.options.hidden, run.options.clip_low) == (0.5, (8,), math.inf)
    assert run.preset == name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[ppo]\nlearning = 1\n", "ppo has no option 'learning': did you mean"),
        ("[ppo]\ngamma = 'high'\n", "gamma is 'high': it must be a number"),
        ("[ppo]\ngamma = 2\n", "gamma is 2.0: it must be between 0 and 1"),
        ("[dqn]\ngamma = 0.9\n", "has 'dqn', which is no table of a method: mend it"),
        ("ppo = 3\n", "has 'ppo', which is no table of a method"),
        ("[trpo]\ngamma = 0.9\n", "has no settings for ppo, only for trpo"),
        ("[ppo\n", "cannot be read"),
        (
            '[ppo]\nenv_options = \'{"path": "/etc/x.xml"}\'\n',
            "sets env_options, which leads out of it: give --env-opt",
        ),
        ("[ppo]\nstart = 'runs/of-someone'\n", "sets start, which leads out of it: give --start"),
        ("#" * 70_000, "it has 70,000 bytes, and at most 65,536 are read"),
    ],
)
def test_a_file_that_is_no_preset_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    name = written(tmp_path / "mine.toml", text)
    with pytest.raises(UserError) as error:
        pg.train("ppo", "probes:Known-v0", preset=name, iterations=1, progress=False)
    assert said in str(error.value)
    assert len(str(error.value)) <= 200
    assert "mine.toml" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("reward", '["evil.py:f"]'), ("model", '"elsewhere/model"'), ("trust_remote_code", "true"), ("trust", "true")],
)
def test_a_file_names_no_code_and_no_model(tmp_path: Path, name: str, value: str) -> None:
    path = written(tmp_path / "mine.toml", f"[grpo]\n{name} = {value}\n")
    with pytest.raises(UserError, match=f"sets {name}, which leads out of it: give --{name.replace('_', '-')}"):
        presets.choose(path, "grpo", "arithmetic", {})
    path = written(tmp_path / "mine.toml", '[grpo]\nreward = ["exact_match"]\n')
    assert presets.choose(path, "grpo", "arithmetic", {}) == (path, {"reward": ["exact_match"]})


def test_a_file_must_be_there_and_be_a_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml cannot be read: No such file"):
        presets.load(str(tmp_path / "none.toml"))
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match=r"pipe\.toml is damaged: it is not a regular file"):
        presets.load(str(tmp_path / "pipe.toml"))
    (tmp_path / "link.toml").symlink_to(written(tmp_path / "mine.toml", "[ppo]\n"))  # the user's own choice
    assert presets.load(str(tmp_path / "link.toml")) == {"ppo": {}}
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"bytes\.toml cannot be read"):
        presets.load(str(tmp_path / "bytes.toml"))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    values = {
        "gamma": 1 - 1e-8,
        "learning_rate": 1e-05,
        "clip_low": math.inf,
        "epochs": 3,
        "hidden": (64, 64),
        "orthogonal": False,
        "activation": "relu",
        "system_prompt": 'a "quoted"\nline \x7f \\ é 🙂',
    }
    presets.write(tmp_path / "mine.toml", "ppo", values, "two\nlines")
    assert presets.load(str(tmp_path / "mine.toml")) == {"ppo": values | {"hidden": [64, 64]}}
