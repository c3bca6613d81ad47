"""A run that is stopped, killed or damaged goes on as if nothing had been, bit for bit, or says why it cannot."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward
from outcomes import ANY_ACTION, WHOLE, parameters, strict, untimed
from probes import Counting, Known, limited
from stopped import killed, known, without_pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributions import Categorical

import policygrad as pg
from policygrad.control import processes
from policygrad.errors import Note, UserError
from policygrad.train import recording
from policygrad.train import training as module
from policygrad.train.methods import METHODS
from policygrad.train.options import options_of
from policygrad.train.recording import Recorder
from policygrad.train.resuming import FREE
from policygrad.train.snapshots import read_checkpoint, write_checkpoint
from policygrad.train.training import Training

assert without_pictures  # a fixture


def lines(directory: Path) -> list[dict[str, float]]:
    return untimed([strict(line) for line in (directory / "metrics.jsonl").read_text().splitlines()])


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    (file,) = (directory / "tensorboard").iterdir()
    events = EventAccumulator(str(file)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/") and "second" not in tag]
    return {tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in tags}


def assert_the_same(whole: Path, broken: Path, runs: list[Any]) -> None:
    """Every parameter, every row of metrics and every point of every curve."""
    assert torch.equal(*map(parameters, runs))
    assert lines(whole) == lines(broken)
    assert lines(whole)
    assert curves(whole) == curves(broken)
    assert untimed(runs[0].metrics) == untimed(runs[1].metrics)
    summaries = [strict((x / "summary.json").read_text()) for x in (whole, broken)]
    for x in summaries:
        del x["run"], x["seconds"], x["steps_per_second"]
    assert summaries[0] == summaries[1]


def assert_resumes(
    place: Path, method: str, task: Any, after: int, again: dict[str, Any] | None = None, **arguments: Any
) -> None:
    """A run killed after so many iterations, and once more on the way, ends as one that was not."""
    whole = pg.train(method, task, out=place / "whole", **arguments)
    killed(method, task, place / "broken", after, **arguments)
    again = {"trust": True} if again is None else again
    with warnings.catch_warnings(action="error", category=Note):
        if after < 4:
            with Training.resume(place / "broken", **again) as training:
                record = Recorder(training)
                record(next(training))
        resumed = pg.resume(place / "broken", progress=False, **again)
    assert_the_same(place / "whole", place / "broken", [whole, resumed])


# Every method


@pytest.mark.parametrize("task", ["CartPole-v1", "probes:Known-v0", "exact:tokens"])
@pytest.mark.parametrize("method", WHOLE)
def test_every_method_goes_on_bit_for_bit(method: str, task: str, tmp_path: Path) -> None:
    if task == "probes:Known-v0" and method not in ANY_ACTION:
        pytest.skip("it is for actions that have probabilities")
    world = "exact" if task.startswith("exact:") else "control"
    values = known(method, world)
    if world == "exact":
        values |= {"num_envs": 8}
    elif "num_steps" not in values:
        values |= {"episode_steps": 9}
    assert_resumes(tmp_path, method, task, random.Random(method + task).randrange(2, 6), **values)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "statistics": ("ppo", {"normalize_observations": True, "scale_rewards": True}),
    "schedule": ("ppo", {"learning_rate_schedule": "cosine", "warmup": 0.3}),
    "adaptive penalty": ("ppo", {"kl_old_coefficient": 1.0, "kl_old_target": 1e-3}),
    "reference in the reward": ("actor_critic", {"kl_ref": "reward", "kl_ref_target": 0.01}),
    "a reference that follows": ("actor_critic", {"kl_ref": "reward", "reference_every": 2}),
    "a reference that is a mean": ("grpo", {"kl_ref": "loss", "reference_decay": 0.5, "episode_steps": 9}),
    "the critic first": ("ppo", {"critic_warmup": 3}),
    "the mode's return": ("remax", {"episode_steps": 9}),
    "reference in the loss": ("grpo", {"kl_ref": "loss", "kl_ref_target": 0.01, "episode_steps": 9}),
    "overlap": ("ppo", {"overlap": True}),
    "overlap of processes": ("ppo", {"overlap": True, "vectorization": "async"}),
    "processes": ("ppo", {"vectorization": "async"}),
    "copies": ("ppo", {"vectorization": "sync"}),
    "groups": ("grpo", {"num_envs": 4, "group_size": 2, "episode_steps": 9}),
    "dynamic sampling": ("dapo", {"num_envs": 4, "group_size": 2, "episode_steps": 9}),
    "momentum": ("actor_critic", {"optimizer": "sgd", "momentum": 0.9}),
    "muon": ("ppo", {"optimizer": "muon"}),
    "evaluations": ("ppo", {"evaluate_every": 2, "evaluation_episodes": 2}),
    "squashed": ("ppo", {"distribution": "squashed", "state_dependent_std": True}),
    "beta": ("ppo", {"distribution": "beta"}),
    "options of the environment": ("ppo", {"env_options": {"max_episode_steps": 5}}),
    "memory": ("ppo", {"memory": "lstm", "memory_size": 4, "critic_memory": "own"}),
    "memory in pieces": ("trpo", {"memory": "transformer", "memory_size": 4, "memory_window": 3, "sequence_length": 5}),
    "overlap with memory": ("ppo", {"overlap": True, "memory": "gru", "memory_size": 4, "sequence_length": 5}),
    "memory of episodes": ("grpo", {"memory": "gru", "num_envs": 4, "episode_steps": 9}),
    "infinite clip": ("ppo", {"clip_low": float("inf"), "clip_high": float("inf")}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_everything_that_changes_goes_on(name: str, tmp_path: Path) -> None:
    method, options = OPTIONS[name]
    assert_resumes(tmp_path, method, "probes:Known-v0", 3, **known(pg.train and method, **options))


@pytest.mark.parametrize("options", [{}, {"action_mask": "info", "env_options": {"key": False}}], ids=["key", "info"])
def test_masks_of_actions_go_on(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"normalize_observations": True, **options}
    assert_resumes(tmp_path, "ppo", "tests.control.test_masks:Forbidding", 3, **known("ppo", **options))


@pytest.mark.parametrize("cores", [(2, 1), (1, 2)])
def test_a_run_goes_on_in_the_form_that_is_faster_there(
    cores: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vectorization auto: what was sampled in processes goes on in one, and the other way, bit for bit."""
    values = known("ppo", vectorization="auto")
    whole = pg.train("ppo", "probes:Slow-v0", out=tmp_path / "whole", **values | {"vectorization": "sync"})
    monkeypatch.setattr(processes, "cores", lambda: cores[0])
    killed("ppo", "probes:Slow-v0", tmp_path / "broken", 4, **values)
    monkeypatch.setattr(processes, "cores", lambda: cores[1])
    resumed = pg.resume(tmp_path / "broken", progress=False, trust=True)
    assert resumed.world.processes == {1: 0, 2: 2}[cores[1]]
    for ours, theirs in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    found, expected = ([{**row, "info/child": 0} for row in untimed(run.metrics)] for run in (resumed, whole))
    assert found == expected


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_structured_actions_go_on(vectorization: str, tmp_path: Path) -> None:
    task = "tests.control.test_structured:Hybrid"
    assert_resumes(tmp_path, "trpo", task, 3, **known("trpo", vectorization=vectorization))


@pytest.mark.skipif(find_spec("mujoco") is None, reason="MuJoCo is not installed")
@pytest.mark.parametrize(("task", "vectorization"), [("HalfCheetah-v5", "sync"), ("Hopper-v5", "async")])
def test_physics_goes_on_bit_for_bit(task: str, vectorization: str, tmp_path: Path) -> None:
    """MuJoCo's state, with the warm start of its solver, follows from the reset and the actions."""
    options = {"num_envs": 2, "num_steps": 64, "minibatch_size": 64, "vectorization": vectorization}
    assert_resumes(tmp_path, "ppo", task, 3, **known("ppo", **options))


class Drifting(Known):
    """Each episode pays more than the one before."""

    episodes = 0

    def reset(self, **options: Any) -> Any:
        self.episodes += 1
        return super().reset(**options)

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, reward + self.episodes, *rest


class Drawing(Known):
    """Draws from the global generators."""

    def step(self, action: Any) -> Any:
        obs, reward, *rest = super().step(action)
        return obs, reward + 0 * (random.random() + np.random.normal()), *rest  # noqa: NPY002


ENVIRONMENTS: dict[str, Any] = {
    "remembers": limited(Drifting, 6),
    "counts": Counting,
    "normalizes": lambda: NormalizeReward(NormalizeObservation(limited(Known, 6)())),
    "global generators": limited(Drawing, 6),
}  # fmt: skip


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments_go_on_where_they_were(name: str, method: str, tmp_path: Path) -> None:
    values = known(method, **({} if method == "ppo" else {"episode_steps": 9}))
    assert_resumes(tmp_path, method, ENVIRONMENTS[name], 3, {"environment": ENVIRONMENTS[name]}, **values)


class OwnPolicy(nn.Module):
    """Half of it is frozen."""

    def __init__(self, *spaces: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(4, 8).requires_grad_(False), nn.Linear(8, 2)

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.second(self.first(obs).tanh()))


def test_modules_and_environments_of_ones_own_are_handed_in_again(tmp_path: Path) -> None:
    values = known("ppo", num_envs=1, minibatch_size=10, num_steps=10)
    given = {"policy": OwnPolicy, "critic": lambda space: pg.Critic(space, hidden=(4,))}
    values = {name: x for name, x in values.items() if name != "hidden"}
    whole = pg.train("ppo", CartPoleEnv(), out=tmp_path / "whole", **given, **values)
    killed("ppo", CartPoleEnv(), tmp_path / "broken", 3, **given, **values)
    for missing, said in (
        ({}, "has no name to find it by"),
        ({"environment": CartPoleEnv()}, "(policy|critic) of your own"),
        ({"environment": CartPoleEnv(), "critic": given["critic"]}, "policy of your own"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            pg.resume(tmp_path / "broken", progress=False, **missing)
        assert len(str(raised.value)) <= 200
    resumed = pg.resume(tmp_path / "broken", progress=False, environment=CartPoleEnv(), **given)
    assert_the_same(tmp_path / "whole", tmp_path / "broken", [whole, resumed])


def test_what_is_frozen_must_be_what_it_was(tmp_path: Path) -> None:
    values = known("ppo")
    del values["hidden"]
    killed("ppo", "CartPole-v1", tmp_path / "run", 3, policy=OwnPolicy, **values)
    other = OwnPolicy()
    with torch.no_grad():
        other.first.weight += 1e-6
    with pytest.raises(UserError, match="the model that the run began with"):
        pg.resume(tmp_path / "run", progress=False, policy=other)


def test_a_run_with_moments_in_8_bits_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    values = known("ppo") | {"optimizer": "adamw_8bit", "hidden": (64, 64)}  # no fewer numbers have 8 bits
    assert_resumes(tmp_path, "ppo", "CartPole-v1", 3, **values)


# Language


@pytest.mark.parametrize("method", ["grpo", "ppo", "trpo"])
@pytest.mark.parametrize("options", [{}, {"kl_ref": "reward"}, {"lora_rank": 2}], ids=str)
def test_a_language_run_goes_on(method: str, options: dict[str, Any], language: dict[str, Any], tmp_path: Path) -> None:
    if method == "trpo" and options:
        pytest.skip("one of the three is enough for it")
    task = language.pop("task")
    values = language | {"iterations": 5, "checkpoint_every": 2, "evaluate_every": 2, **options}
    values |= {"critic_learning_rate": 1e-3} if method != "grpo" else {}
    values |= {} if method == "trpo" else {"learning_rate": 1e-2, "minibatch_size": 8}
    assert_resumes(tmp_path, method, task, 3, **values)
    for name in ("samples.jsonl", "held_out.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "broken" / name).read_text()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("grpo", {"kl_ref": "reward"}),
        ("ppo", {"critic": "shared"}),
        ("trpo", {"credit": "group"}),
        ("grpo", {"lag": 1}),
    ],
    ids=str,
)
def test_a_run_on_a_base_in_4_bits_goes_on(
    method: str, options: dict[str, Any], language: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    task = language.pop("task")
    values = language | {"iterations": 5, "checkpoint_every": 2, "lora_rank": 2, "quantize": "4bit", **options}
    values |= {} if method == "trpo" else {"learning_rate": 1e-2, "minibatch_size": 8}
    assert_resumes(tmp_path, method, task, 3, **values)
    whole = pg.load(tmp_path / "whole", trust=True)
    assert whole.evaluate(2).reward == whole.evaluate(2).reward


def test_a_checkpoint_of_an_adapter_holds_the_adapter_alone(language: dict[str, Any], tmp_path: Path) -> None:
    task = language.pop("task")
    sizes = {}
    for rank in (0, 1):
        out = tmp_path / str(rank)
        pg.train("grpo", task, out=out, **language | {"lora_rank": rank, "iterations": 1})
        (file,) = (out / "checkpoints").glob("*.safetensors")
        sizes[rank] = file.stat().st_size
    assert sizes[1] < sizes[0]


# At any moment

PROCESSES = multiprocessing.get_context("forkserver")


def trained_to_its_end(out: Path, values: dict[str, Any], kill: tuple[str, int] | None) -> None:
    """In a process of its own. kill: the function of `os` at whose call of this number it kills itself."""
    torch.set_num_threads(1)
    if kill is not None:
        name, at = kill
        real, calls = getattr(os, name), [0]

        def killing(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, name, killing)
    if (out / "config.json").exists():
        pg.resume(out, progress=False)
    else:
        shutil.rmtree(out, ignore_errors=True)
        pg.train("ppo", "CartPole-v1", out=out, **values)


def test_a_process_that_is_killed_anywhere_is_resumed(tmp_path: Path) -> None:
    """Also in the middle of writing: at a call of the system that a save makes, until it comes to the end."""
    values = known("ppo", checkpoint_every=1, iterations=12)
    whole, broken, draw = tmp_path / "whole", tmp_path / "broken", random.Random(0)
    trained_to_its_end(whole, values, None)
    kills = 0
    PROCESSES.set_forkserver_preload(["policygrad.train.training", "policygrad.train.worlds.control"])
    while True:
        kill = None if kills == 8 else (draw.choice(["replace", "fsync", "open"]), draw.randrange(1, 20))
        child = PROCESSES.Process(target=trained_to_its_end, args=(broken, values, kill))
        child.start()
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert lines(whole) == lines(broken)
    assert curves(whole) == curves(broken)
    assert torch.equal(*(parameters(pg.Run.load(x)) for x in (whole, broken)))


def test_a_run_without_a_checkpoint_begins_once_more(tmp_path: Path) -> None:
    values = known("ppo", checkpoint_every=3)
    whole = pg.train("ppo", "CartPole-v1", out=tmp_path / "whole", **values)
    killed("ppo", "CartPole-v1", tmp_path / "broken", 2, **values)
    with pytest.warns(Note, match="there is no checkpoint yet"):
        resumed = pg.resume(tmp_path / "broken", progress=False)
    assert_the_same(tmp_path / "whole", tmp_path / "broken", [whole, resumed])


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path: Path) -> None:
    values = known("ppo", checkpoint_every=1)
    whole = pg.train("ppo", "CartPole-v1", out=tmp_path / "whole", **values)
    killed("ppo", "CartPole-v1", tmp_path / "broken", 4, **values)
    path = tmp_path / "broken" / "checkpoints" / "000000004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(Note, match="the one before it is used"):
        resumed = pg.resume(tmp_path / "broken", progress=False)
    assert_the_same(tmp_path / "whole", tmp_path / "broken", [whole, resumed])


def test_a_directory_may_have_been_moved(tmp_path: Path) -> None:
    values = known("ppo")
    whole = pg.train("ppo", "CartPole-v1", out=tmp_path / "whole", **values)
    killed("ppo", "CartPole-v1", tmp_path / "broken", 4, **values)
    shutil.move(tmp_path / "broken", tmp_path / "moved")
    resumed = pg.resume(tmp_path / "moved", progress=False)
    assert_the_same(tmp_path / "whole", tmp_path / "moved", [whole, resumed])


def test_a_directory_with_checkpoints_is_loaded_as_before(tmp_path: Path) -> None:
    run = pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **known("ppo"))
    assert (tmp_path / "run" / "checkpoints").is_dir()
    found = pg.load(tmp_path / "run")
    assert torch.equal(parameters(found), parameters(run))
    assert found.evaluate(3) == run.evaluate(3)


def test_rows_that_were_written_after_the_checkpoint_are_written_once(tmp_path: Path) -> None:
    """And half a line, of a process that was killed in the middle of it."""
    values = known("ppo", checkpoint_every=2)
    whole = pg.train("ppo", "CartPole-v1", out=tmp_path / "whole", **values)
    killed("ppo", "CartPole-v1", tmp_path / "broken", 5, **values)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"steps": 1')
    resumed = pg.resume(tmp_path / "broken", progress=False)
    assert_the_same(tmp_path / "whole", tmp_path / "broken", [whole, resumed])


def test_metrics_that_are_gone_are_said(tmp_path: Path) -> None:
    killed("ppo", "CartPole-v1", tmp_path / "run", 4, **known("ppo"))
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.warns(Note, match="rows are missing"):
        pg.resume(tmp_path / "run", progress=False)
    assert len(lines(tmp_path / "run")) == 2


# More, or other


@pytest.mark.parametrize("method", ["ppo", "reinforce", "trpo"])
def test_a_run_that_has_ended_goes_on_with_more_steps(method: str, tmp_path: Path) -> None:
    values = known(method, **({"episode_steps": 9} if method == "reinforce" else {}))
    longer = pg.train(method, "probes:Known-v0", out=tmp_path / "longer", **values | {"iterations": 9})
    pg.train(method, "probes:Known-v0", out=tmp_path / "run", **values)
    with pytest.raises(UserError, match=r"has ended, after \d+ steps: give iterations, how many more"):
        pg.resume(tmp_path / "run", trust=True)
    for more in (2, 1):
        run = pg.resume(tmp_path / "run", trust=True, progress=False, iterations=more)
    assert torch.equal(parameters(run), parameters(longer))
    assert lines(tmp_path / "run") == lines(tmp_path / "longer")
    assert strict((tmp_path / "run" / "config.json").read_text())["options"]["iterations"] == 9


def test_more_steps_are_on_top_of_those_it_was_to_have(tmp_path: Path) -> None:
    values = known("ppo", steps=100, iterations=None)
    longer = pg.train("ppo", "CartPole-v1", out=tmp_path / "longer", **values | {"steps": 200})
    killed("ppo", "CartPole-v1", tmp_path / "run", 2, **values)
    run = pg.resume(tmp_path / "run", progress=False, steps=100)
    assert torch.equal(parameters(run), parameters(longer))
    with pytest.raises(UserError, match="measured in steps: give steps"):
        pg.resume(tmp_path / "run", progress=False, iterations=3)
    for x in (0, -1, True):
        with pytest.raises(UserError, match="it must be a whole number, at least 1"):
            pg.resume(tmp_path / "run", progress=False, steps=x)


def test_more_steps_change_the_rates_of_a_schedule_and_that_is_said(tmp_path: Path) -> None:
    pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **known("ppo", learning_rate_schedule="linear"))
    with (
        pytest.warns(Note, match="learning_rate_schedule linear is of the whole run"),
        Training.resume(tmp_path / "run", iterations=6) as training,
    ):
        rates = [group["lr"] for group in training._groups()]
    assert rates == pytest.approx([0.01 / 2] * len(rates))


def test_more_steps_do_not_change_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = known("ppo", steps=90, iterations=None, compile="auto")
    killed("ppo", "CartPole-v1", tmp_path / "run", 2, **values)
    seen: list[str] = []
    composed = module.compose

    def compose(options: Any, *rest: Any) -> Any:
        seen.append(options.compile)
        return composed(options, *rest)

    monkeypatch.setattr(module, "compose", compose)
    with Training.resume(tmp_path / "run", steps=10**9) as training:
        assert training.options.compile == "auto"
    assert seen == ["off"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gamma": 0.5}, "gamma was 0.99 in training, and is 0.5"),
        ({"seed": 3}, "seed was 0"),
        ({"iterations": 2}, "iterations was 6"),
        ({"num_envs": 4}, "num_envs was 3"),
    ],
    ids=str,
)
def test_options_that_were_changed_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    killed("ppo", "CartPole-v1", tmp_path / "run", 4, **known("ppo"))
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["options"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        pg.resume(tmp_path / "run", progress=False)


def test_another_version_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed("ppo", "CartPole-v1", tmp_path / "run", 4, **known("ppo"))
    monkeypatch.setattr(pg, "__version__", "9.9")
    with pytest.warns(Note, match=r"the checkpoint is of policygrad 0\.1\.0, now 9\.9: the numbers may not be"):
        pg.resume(tmp_path / "run", progress=False)


def test_another_environment_is_said_or_refused(tmp_path: Path) -> None:
    killed("ppo", "CartPole-v1", tmp_path / "run", 4, **known("ppo"))
    for other in ("Pendulum-v1", "Acrobot-v1"):
        with pytest.raises(
            UserError, match=r"observation space was .*: resume with the environment of training"
        ) as raised:
            pg.resume(tmp_path / "run", progress=False, environment=other)
        assert len(str(raised.value)) <= 200
    with pytest.warns(Note, match="the task was 'CartPole-v1', and is 'CartPole-v0'"):
        pg.resume(tmp_path / "run", progress=False, environment="CartPole-v0")


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "checkpoints", "policy.safetensors", ".lock"])
def test_a_directory_that_leads_elsewhere_is_not_written_to(name: str, tmp_path: Path) -> None:
    """A run directory is data: a link in it would let it change files of the reader's."""
    killed("ppo", "probes:Known-v0", tmp_path / "run", 3, **known("ppo"))
    path, elsewhere = tmp_path / "run" / name, tmp_path / "elsewhere"
    os.replace(path, elsewhere) if path.exists() else elsewhere.write_text("mine")
    path.symlink_to(elsewhere)

    def held() -> dict[Path, bytes]:
        found = elsewhere.rglob("*") if elsewhere.is_dir() else [elsewhere]
        return {x: x.read_bytes() for x in found if x.is_file()}

    before = held()
    with pytest.raises(UserError, match="it is no regular file, and may lead out of the directory") as raised:
        pg.resume(tmp_path / "run", progress=False, trust=True)
    assert len(str(raised.value)) <= 200
    assert held() == before
    path.unlink()
    if name != ".lock":
        os.replace(elsewhere, path)
    pg.resume(tmp_path / "run", progress=False, environment="probes:Known-v0")


def test_what_may_differ_are_options() -> None:
    names = {
        name
        for method in METHODS
        for world in ("control", "exact", "language")
        for name in vars(options_of(method, world)())
    }
    assert names >= FREE


class Undecided(Known):
    """No seed decides it."""

    def _obs(self) -> np.ndarray:
        return super()._obs() + np.float32(time.perf_counter() % 100)


@pytest.mark.parametrize("method", ["ppo", "reinforce"])
def test_an_environment_that_does_not_repeat_itself_begins_new_episodes(method: str, tmp_path: Path) -> None:
    make = limited(Undecided, 8)
    values = known(method, **({"episode_steps": 9} if method == "reinforce" else {}))
    killed(method, make, tmp_path / "run", 4, **values)
    with pytest.warns(Note, match="did not repeat its episode: new episodes begin"):
        run = pg.resume(tmp_path / "run", progress=False, environment=make)
    assert run.stage.iteration == 6


def test_an_environment_that_cannot_be_saved_is_said_once_and_new_episodes_are_the_seeds(tmp_path: Path) -> None:
    def make() -> SyncVectorEnv:
        return SyncVectorEnv([limited(Known, 8)] * 3)

    values = known("ppo", checkpoint_every=1)
    with pytest.warns(Note) as said:
        killed("ppo", make(), tmp_path / "run", 4, **values)
    assert [str(x.message) for x in said] == [
        "SyncVectorEnv has no state that can be saved: a run that is resumed begins new episodes"
    ]
    runs = []
    for name in ("one", "two"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
        with pytest.warns(Note, match="has no state that can be saved: new episodes begin"):
            runs.append(pg.resume(tmp_path / name, progress=False, environment=make()))
    assert torch.equal(*map(parameters, runs))


# One process at a time


def test_two_cannot_write_one_directory(tmp_path: Path) -> None:
    training = Training("ppo", "CartPole-v1", out=tmp_path / "run", **{**known("ppo"), "progress": False})
    script = "import sys, policygrad as pg; pg.resume(sys.argv[1], progress=False)"
    for _ in range(2):
        with pytest.raises(UserError, match="is being written by another run"):
            Training.resume(tmp_path / "run")
    other = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert "is being written by another run: wait for it, or stop it" in other.stderr
    training.close()
    with pytest.warns(Note, match="no checkpoint yet"):
        pg.resume(tmp_path / "run", progress=False)


def test_a_refusal_lets_go_of_the_directory(tmp_path: Path) -> None:
    pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **known("ppo"))
    for _ in range(2):
        with pytest.raises(UserError, match="has ended"):
            pg.resume(tmp_path / "run")
    assert pg.resume(tmp_path / "run", progress=False, iterations=1).stage.iteration == 7


# What cannot be resumed


def test_what_is_no_run_or_has_nothing_to_go_on_from_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        pg.resume(tmp_path)
    pg.train(
        "ppo", "CartPole-v1", out=tmp_path / "none", **{**known("ppo"), "checkpoint_every": None, "checkpoints": 0}
    )
    assert not (tmp_path / "none" / "checkpoints").exists()
    with pytest.raises(UserError, match="was to keep no checkpoints"):
        pg.resume(tmp_path / "none")
    pg.train("ppo", "CartPole-v1", out=tmp_path / "gone", **known("ppo"))
    shutil.rmtree(tmp_path / "gone" / "checkpoints")
    before = (tmp_path / "gone" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="has a policy and no checkpoint to go on from"):
        pg.resume(tmp_path / "gone")
    assert (tmp_path / "gone" / "metrics.jsonl").read_text() == before


def test_a_name_that_runs_code_is_repeated_or_trusted(tmp_path: Path) -> None:
    killed("ppo", "probes:Known-v0", tmp_path / "run", 4, **known("ppo"))
    with pytest.raises(UserError, match="the run names what is not its own"):
        pg.resume(tmp_path / "run")
    assert pg.resume(tmp_path / "run", environment="probes:Known-v0", progress=False).stage.iteration == 6


def test_the_data_and_the_model_of_a_language_run_are_repeated_or_trusted(
    language: dict[str, Any], tmp_path: Path
) -> None:
    task = language.pop("task")
    killed("grpo", task, tmp_path / "run", 2, **language | {"iterations": 3, "checkpoint_every": 1})
    names = {"model": language["model"], "reward": language["reward"], "dataset": task}
    for name in names:
        with pytest.raises(UserError, match=f"the run names what is not its own, {name}"):
            pg.resume(tmp_path / "run", progress=False, **{x: y for x, y in names.items() if x != name})
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    runs = [pg.resume(tmp_path / x, progress=False, **y) for x, y in (("run", names), ("other", {"trust": True}))]
    assert [run.stage.iteration for run in runs] == [3, 3]
    assert torch.equal(*map(parameters, runs))


# When


def test_checkpoints_come_every_so_many_iterations_and_at_the_end(tmp_path: Path) -> None:
    for every, kept, expected in ((2, 5, [2, 4, 6, 7]), (3, 2, [6, 7]), (7, 9, [7])):
        out = tmp_path / str(every)
        pg.train("ppo", "CartPole-v1", out=out, **known("ppo", iterations=7, checkpoint_every=every, checkpoints=kept))
        assert sorted(int(x.stem) for x in (out / "checkpoints").glob("*.json")) == expected


def test_checkpoints_come_by_time_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(recording, "SAVE_SHARE", float("inf"))
    pg.train("ppo", "CartPole-v1", out=tmp_path / "run", **known("ppo", checkpoint_every=None, checkpoints=3))
    assert sorted(int(x.stem) for x in (tmp_path / "run" / "checkpoints").glob("*.json")) == [4, 5, 6]


# Compiled


def resume_compiled_runs(place: Path) -> None:
    """In a process of its own: the graphs of one run in memory, those of the others found again."""
    torch.set_num_threads(1)
    cases = [("ppo", {}), ("actor_critic", {"optimizer": "sgd"}), ("reinforce", {"episode_steps": 9})]
    for method, options in cases:
        values = known(method, **options, compile="on", iterations=4, checkpoint_every=1)
        whole = pg.train(method, "CartPole-v1", out=place / method / "whole", **values)
        torch.compiler.reset()
        killed(method, "CartPole-v1", place / method / "broken", 2, **values)
        torch.compiler.reset()
        run = pg.resume(place / method / "broken", progress=False)
        assert torch.equal(parameters(run), parameters(whole)), method
        assert lines(place / method / "broken") == lines(place / method / "whole"), method


def test_compiled_runs_go_on_bit_for_bit(tmp_path: Path) -> None:
    command = ["-c", f"from tests.train.test_resuming import *; resume_compiled_runs(Path({str(tmp_path)!r}))"]
    root = Path(__file__).parents[2]
    environment = {name: x for name, x in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


# From another run


def test_a_run_begins_from_the_policy_of_another_under_any_method(tmp_path: Path) -> None:
    values = known("ppo", normalize_observations=True)
    first = pg.train("ppo", "CartPole-v1", out=tmp_path / "first", **values)
    for method in ("actor_critic", "trpo", "grpo"):
        given = known(method, normalize_observations=True, start=tmp_path / "first")
        given |= {"episode_steps": 20} if method == "grpo" else {}
        with (
            warnings.catch_warnings(action="error", category=Note),
            Training(method, "CartPole-v1", **given) as training,
        ):
            assert training.world.normalizer.statistics.count == first.world.normalizer.statistics.count > 0
            for mine, its in ((training.run.policy, first.policy), (training.run.critic, first.critic)):
                if mine is not None:
                    assert all(map(torch.equal, mine.state_dict().values(), its.state_dict().values()))
            next(training)


def test_what_does_not_fit_is_refused_or_said(tmp_path: Path) -> None:
    pg.train("ppo", "CartPole-v1", out=tmp_path / "ppo", **known("ppo"))
    pg.train("grpo", "CartPole-v1", out=tmp_path / "grpo", **known("grpo", episode_steps=9))
    start = {"start": str(tmp_path / "ppo")}
    for values, said in (
        (known("actor_critic", hidden=(9,), **start), r"hidden \[8\], and this one \[9\]: set hidden to \[8\]"),
        (
            known("actor_critic", activation="relu", **start),
            "activation tanh, and this one relu: set activation to tanh",
        ),
        (known("actor_critic", memory="gru", **start), "memory none, and this one gru: set memory to none"),
        (known("actor_critic", normalize_observations=True, **start), "set normalize_observations to False"),
        (known("actor_critic", start=str(tmp_path)), "holds no policy to begin from"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            pg.train("actor_critic", "CartPole-v1", **values)
        assert len(str(raised.value)) <= 200
    with pytest.warns(Note, match="has no critic: the critic begins anew"):
        pg.train("actor_critic", "CartPole-v1", **known("actor_critic", start=tmp_path / "grpo"))


@pytest.mark.parametrize("options", [{}, {"kl_ref": "reward"}], ids=str)
def test_a_run_that_began_from_another_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    """Without the other one too, if nothing is held against it."""
    pg.train("ppo", "CartPole-v1", out=tmp_path / "first", **known("ppo"))
    values = known("actor_critic", start=str(tmp_path / "first"), **options)
    assert_resumes(tmp_path, "actor_critic", "CartPole-v1", 3, **values)
    shutil.rmtree(tmp_path / "broken")
    killed("actor_critic", "CartPole-v1", tmp_path / "broken", 3, **values)
    shutil.rmtree(tmp_path / "first")
    if options:
        with pytest.raises(UserError, match="holds no policy to begin from"):
            pg.resume(tmp_path / "broken", trust=True)
    else:
        assert pg.resume(tmp_path / "broken", trust=True, progress=False).stage.iteration == 6


def test_statistics_of_wrappers_begin_where_they_were(tmp_path: Path) -> None:
    def make() -> gymnasium.Env:
        return NormalizeObservation(limited(Known, 6)())

    first = pg.train("ppo", make, out=tmp_path / "first", **known("ppo"))
    with Training("actor_critic", make, **known("actor_critic", start=tmp_path / "first")) as training:
        learned, name = training.world.learned(), "NormalizeObservation.0.obs_rms.mean"
    np.testing.assert_allclose(learned[name], first.world.learned()[name], rtol=1e-6)  # these are float32


def test_statistics_of_wrappers_that_only_one_of_two_runs_has_are_one_line(tmp_path: Path) -> None:
    """The policy expects observations as they were: nothing else would say that they are in another unit."""
    values = known("ppo", vectorization="sync")
    pg.train("ppo", "CartPole-v1", out=tmp_path / "plain", **values)
    pg.train("ppo", "CartPole-v1", out=tmp_path / "wrapped", wrap=["NormalizeObservation"], **values)
    with pytest.raises(UserError, match="training had NormalizeObservation around the environment, and here it is mis"):
        Training("ppo", "CartPole-v1", start=tmp_path / "wrapped", **values)
    for vectorization in ("sync", "async"):
        given = values | {"vectorization": vectorization, "wrap": ["NormalizeObservation"]}
        with pytest.raises(UserError, match="NormalizeObservation has statistics, and training had none"):
            Training("ppo", "CartPole-v1", start=tmp_path / "plain", **given)


# A directory from anyone


def mutated(x: Any, draw: random.Random) -> Any:
    """The same with one value somewhere in it replaced, taken out, or put in twice."""
    if isinstance(x, dict) and x and draw.random() < 0.9:
        name = draw.choice(list(x))
        if draw.random() < 0.15:
            return {k: v for k, v in x.items() if k != name}
        return {**x, name: mutated(x[name], draw)}
    if isinstance(x, list | tuple) and x and draw.random() < 0.9:
        i = draw.randrange(len(x))
        return type(x)([*x[:i], mutated(x[i], draw), *x[i + draw.randrange(2) :]])
    others = [None, True, -1, 2**70, 0.5, float("nan"), "x", "/etc/passwd", [], {}, (1,), torch.zeros(2)]
    return draw.choice([*others, np.ones((2, 2))])


@pytest.mark.parametrize("task", ["probes:Known-v0", "CartPole-v1", "exact:chain"])
def test_whatever_is_in_a_checkpoint_it_is_resumed_or_refused_in_one_line(task: str, tmp_path: Path) -> None:
    """Its hash is right: it is of someone who wants it to be read."""
    values = known("ppo", "exact" if task.startswith("exact") else "control")
    killed("ppo", task, tmp_path / "run", 4, **values)
    checkpoint, draw, resumed = read_checkpoint(tmp_path / "run"), random.Random(0), 0
    assert checkpoint is not None
    refusals: list[str] = []
    for k in range(40):
        copy = Path(shutil.copytree(tmp_path / "run", tmp_path / str(k)))
        name = draw.choice([x for x in checkpoint if x not in ("iteration", "steps")])
        changed = {**checkpoint, name: mutated(checkpoint[name], draw)}
        write_checkpoint(copy, changed, 2)
        try:
            with warnings.catch_warnings(action="ignore"), Training.resume(copy, trust=True):
                resumed += 1
        except UserError as error:
            refusals.append(str(error))
    assert 0 < resumed < 40
    assert all(len(said) <= 200 and "\n" not in said for said in refusals)
