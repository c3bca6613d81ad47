"""The command line: one line and exit code 2 for what the user can mend, one JSON object where it is asked for."""

import contextlib
import dataclasses
import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from probes import BROKEN
from tiny_files import write_model, write_prompts, write_rewards

from policygrad import cli, load_policy, train
from policygrad.errors import UserError
from policygrad.language import warmup
from policygrad.train import compose, presets
from policygrad.train.methods import METHODS
from policygrad.train.options import options_of

HERE = Path(__file__).parent
PLACES = f"{HERE}{os.pathsep}{Path(cli.__file__).parent.parent}"  # of the environments here, and of policygrad
SMALL = ("--num-envs", "4", "--num-steps", "16", "--hidden", "8")
PPO = ("train", "ppo", "probes:Known-v0", *SMALL, "--minibatch-size", "16", "--steps", "100")


PRODUCT = ("--ratio", "product", "--weights", "row", "--clip-low", "inf", "--clip-high", "inf")
COMPOSE = ("train", "compose", "exact:tokens", *PRODUCT, "--group-baseline", "leave_one_out", "--group-scale", "none")


class Said(NamedTuple):
    code: int | str | None
    out: str
    err: str


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are written below the working directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def policygrad(capfd: pytest.CaptureFixture[str]) -> Any:
    """The command, in this process."""

    def run(*arguments: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(x) for x in arguments])
        return Said(stop.value.code or 0, *capfd.readouterr())

    return run


def strict(text: str) -> Any:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": PLACES}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


# Training


@pytest.mark.parametrize("method", ["reinforce", "trpo", "off-policy-actor-critic", "PPO", "Dr-GRPO", "REINFORCE++"])
def test_train_prints_one_json_object_and_nothing_else(policygrad: Any, method: str) -> None:
    """A method goes by its name in any case, with dashes too, or by its alias."""
    said = policygrad("train", method, "probes:Known-v0", "--num-envs", 4, "--steps", 60, "--hidden", 8, "--json")
    assert said.code == 0
    assert said.err == ""
    assert said.out.count("\n") == 1
    result = strict(said.out)
    keys = {"run", "method", "world", "task", "steps", "seconds", "steps_per_second", "return_mean", "return_std"}
    keys |= {"episodes", "preset", "reward_per_step", "success", "ended", "best"}
    assert set(result) == keys
    assert strict(Path(result["run"], "summary.json").read_text()) == result
    assert result["ended"] == "finished"
    assert result["preset"] is None
    full = {"a2c": "actor_critic", "REINFORCE++": "reinforce_plus_plus"}
    assert result["method"] == full.get(method, method.lower().replace("-", "_"))
    assert result["world"] == "control"
    assert result["task"] == "probes:Known-v0"
    assert result["steps"] >= 60
    assert Path(result["run"], "policy.safetensors").exists()


LOUD = """
import ctypes, os, gymnasium, probes

def say(what):
    print(what)
    os.write(1, what.encode())
    ctypes.CDLL(None).puts(what.encode())

class Loud(probes.Known):
    def __init__(self):
        say("made")
        super().__init__()

    def reset(self, **options):
        say("reset")
        return super().reset(**options)

    def step(self, action):
        say("stepped")
        return super().step(action)

say("imported")
gymnasium.register("Loud-v0", Loud, max_episode_steps=8)
"""


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_json_is_alone_on_standard_output_however_loud_the_environment_is(tmp_path: Path, vectorization: str) -> None:
    (tmp_path / "loud.py").write_text(LOUD)
    train = [*PPO[:2], "loud:Loud-v0", *PPO[3:], "--vectorization", vectorization, "--json", "--out", "run"]
    commands = [train, ["eval", "run", "--trust", "--episodes", "2", "--json"]]
    script = f"""
from policygrad.cli import main
for command in {commands!r}:
    try:
        main(command)
    except SystemExit as stop:
        assert not stop.code, (command, stop.code)
"""
    done = process("-c", script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained, evaluated = map(strict, done.stdout.splitlines())
    assert trained["run"] == "run"
    assert evaluated["episodes"] == 2
    assert all(what in done.stderr for what in ("imported", "made", "reset", "stepped"))


SENTENCES = [
    ("grpo CartPole-v1", ("--iterations", 2, "--num-envs", 2, "--hidden", 8), {"method": "grpo", "world": "control"}),
    ("ppo exact:chain", ("--steps", 200, "--num-envs", 4), {"method": "ppo", "world": "exact"}),
    ("trpo exact:chain", ("--steps", 200, "--num-envs", 4), {"method": "trpo", "world": "exact"}),
    ("a2c exact:chain", ("--steps", 200, "--num-envs", 4), {"method": "actor_critic", "world": "exact"}),
    (
        "trpo arithmetic",
        ("--iterations", 1, "--prompts-per-rollout", 2, "--completions", 2, "--max-tokens", 6, "--held-out", 2),
        {"method": "trpo", "world": "language", "preset": "arithmetic"},
    ),
]


@pytest.mark.parametrize(("sentence", "more", "expected"), SENTENCES, ids=[case[0] for case in SENTENCES])
def test_any_method_trains_on_any_world_and_leaves_a_run_that_eval_judges(
    policygrad: Any, sentence: str, more: tuple[Any, ...], expected: dict[str, str], hardly_warmed_up: None
) -> None:
    method, task = sentence.split()
    said = policygrad("train", method, task, *more)
    assert said.code == 0, said.err
    run = f"runs/{task.replace(':', '-')}/{expected['method']}-seed0"
    assert said.out.splitlines()[-1] == f"run: {run} (evaluate: policygrad eval {run})"
    assert f"{expected['method']} on {task}: " in said.out
    assert ("before: " in said.out) == ("after:  " in said.out) == (expected["world"] != "control")
    config = strict(Path(run, "config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    words, judged = policygrad("eval", run), policygrad("eval", run, "--trust", "--json")
    assert (words.code, judged.code) == (0, 0)
    assert strict(judged.out)
    assert strict(judged.out)["policy"]["run"] == "ended"
    score, stage = words.out.splitlines()[0].split("; ")
    assert re.fullmatch(r"policy of iteration \d+ \([\d,]+ steps\) of a run that ended", stage)
    if expected["world"] == "exact":
        assert f"after:  {score}\n" in said.out


@pytest.fixture
def hardly_warmed_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The arithmetic task's own model, after a few steps, in a cache of its own."""
    monkeypatch.setitem(warmup.RECIPE, "steps", 3)
    monkeypatch.setitem(warmup.RECIPE, "rows", 8)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("train", "grpo", "arithmetic"), "policygrad.cli._run"),
        (("eval", "run"), "policygrad.train.run.Run.load"),
        (("reward-model",), "policygrad.train.reward_model.train_reward_model"),
        (("verify",), "policygrad.verify.command.run"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
@pytest.mark.parametrize("capture", ["capfd", "capsys"])
def test_json_is_alone_in_every_other_command_too(
    arguments: tuple[str, ...],
    command: str,
    capture: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    arguments_of_command = arguments

    def loud(*arguments: Any, **options: Any) -> Any:
        print("hello")
        os.write(1, b"hello from C\n")
        if arguments_of_command[0] != "verify":
            result = SimpleNamespace(summary=lambda: {"a": 1}, world=SimpleNamespace(kind="language"))
            result.evaluate = lambda *_, **__: result
            result.stage = SimpleNamespace()
            return result
        print(json.dumps({"a": 1}))
        return 0

    monkeypatch.setattr(command, loud)
    captured = request.getfixturevalue(capture)
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--json"])
    said = captured.readouterr()
    assert not stop.value.code
    assert strict(said.out) == {"a": 1} | ({"policy": {}} if arguments[0] == "eval" else {})
    assert "hello\n" in said.err


def test_an_error_under_json_is_one_line_and_standard_output_is_what_it_was(policygrad: Any) -> None:
    assert_one_line(policygrad("train", "ppo", "CartPole-v1", "--gamma", "1.2", "--json"), "gamma is 1.2")
    assert policygrad("list").out.startswith("methods:")


def test_clone_takes_a_task_and_data_and_is_a_method_like_others(policygrad: Any) -> None:
    row = json.dumps({"observation": [0.1, 0.2, 0.3, 0.4], "action": 1, "reward": 1.0})
    Path("data.jsonl").write_text(f"{row}\n" * 20)
    first = policygrad("clone", "CartPole-v1", "data.jsonl", "--iterations", 2, "--hidden", 8)
    second = policygrad("train", "clone", "--hidden", 8, "CartPole-v1", "--iterations=2", "--demonstrations=data.jsonl")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    parts = [x.out.splitlines() for x in (first, second)]
    assert parts[0][-1] == "run: runs/CartPole-v1/clone-seed0 (evaluate: policygrad eval runs/CartPole-v1/clone-seed0)"
    assert parts[0][:2] == parts[1][:2]
    assert re.fullmatch(r"after:  log-probability -0\.\d{4}, accuracy 1\.000, of 2 held-out decisions", parts[0][1])
    assert "note: demonstrations: 20 transitions, 1 episode, return 20.0 +- 0.0" in parts[0]
    ended = policygrad("resume", "runs/CartPole-v1/clone-seed0", "--iterations", 1, "--demonstrations", "data.jsonl")
    assert ended.code == 0, ended.err
    assert policygrad("clone", "--help").code == 0
    for arguments, said in ((), "there is no task"), (("CartPole-v1",), "there are no demonstrations to clone"):
        refused = policygrad("clone", *arguments)
        assert refused.code == 2
        assert said in refused.err


def test_train_says_what_came_out_and_where_it_is(policygrad: Any, tmp_path: Path) -> None:
    said = policygrad(*PPO, "--out", tmp_path / "here")
    assert said.code == 0
    assert said.err == ""
    assert "return" in said.out
    assert "steps/s" in said.out
    assert f"policygrad eval {tmp_path / 'here'}" in said.out
    assert (tmp_path / "here" / "curve.png").exists()


def test_a_run_goes_below_runs_by_default_and_the_next_one_beside_it(policygrad: Any, tmp_path: Path) -> None:
    places = [strict(policygrad(*PPO, "--seed", 3, "--json").out)["run"] for _ in range(3)]
    assert places == [f"runs/probes-Known-v0/ppo-seed3{suffix}" for suffix in ("", "-2", "-3")]
    assert all((tmp_path / place / "config.json").exists() for place in places)


def test_a_directory_that_holds_something_is_refused_and_left_alone(policygrad: Any, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("mine")
    said = policygrad(*PPO, "--out", tmp_path / "full")
    assert said.code == 2
    assert "not empty" in said.err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes"]


def test_every_flag_reaches_the_method(policygrad: Any, tmp_path: Path) -> None:
    policygrad(
        *PPO,
        "--gamma",
        0.9,
        "--clip-low",
        "inf",
        "--distribution",
        "squashed",
        "--activation",
        "relu",
        "--out",
        tmp_path / "run",
    )
    options = strict((tmp_path / "run" / "config.json").read_text())["options"]
    assert (options["gamma"], options["clip_low"], options["distribution"]) == (0.9, "inf", "squashed")
    assert options["activation"] == "relu"
    assert (options["num_envs"], options["hidden"], options["minibatch_size"]) == (4, [8], 16)


def test_the_preset_is_printed_and_flags_go_before_it(policygrad: Any, tmp_path: Path) -> None:
    few = ("train", "ppo", "CartPole-v1", "--steps", 1, "--epochs", 1)
    tuned = presets.load("CartPole-v1")["ppo"]
    said = policygrad(*few, "--gamma", 0.5, "--out", tmp_path / "a")
    line = next(line for line in said.out.splitlines() if line.startswith("preset CartPole-v1: "))
    assert "gamma=0.5" in line
    assert all(f"{name}=" in line for name in tuned)
    options = strict((tmp_path / "a" / "config.json").read_text())["options"]
    assert options["gamma"] == 0.5
    assert options["lam"] == tuned["lam"]
    said = policygrad(*few, "--preset", "none", "--out", tmp_path / "b")
    assert not said.out.startswith("preset")
    config = strict((tmp_path / "b" / "config.json").read_text())
    assert config["preset"] is None
    assert config["options"]["lam"] == options_of("ppo", "control")().lam


def test_json_names_the_preset(policygrad: Any) -> None:
    said = policygrad("train", "ppo", "CartPole-v1", "--steps", 1, "--epochs", 1, "--json")
    assert strict(said.out)["preset"] == "CartPole-v1"
    assert said.err.startswith("preset CartPole-v1: ")
    assert said.err.count("\n") == 1


def test_a_clash_with_a_preset_names_it(policygrad: Any) -> None:
    said = policygrad("train", "ppo", "CartPole-v1", "--num-envs", 1)
    blamed = " (preset CartPole-v1 sets minibatch_size=256; preset none leaves it)\n"
    assert_one_line(said, "minibatch_size is 256")
    assert said.err.endswith(blamed)
    said = policygrad("train", "ppo", "CartPole-v1", "--num-envs", 1, "--minibatch-size", 255)
    assert_one_line(said, "minibatch_size is 255")
    assert "preset" not in said.err


def test_a_run_that_is_refused_leaves_no_directory_behind(policygrad: Any, tmp_path: Path) -> None:
    assert policygrad("train", "ppo", "CartPole-v1", "--gamma", 1.2).code == 2
    assert policygrad("train", "grpo", "arithmetic", "--temperature", -1).code == 2
    assert policygrad("reward-model", "--dataset", "/nowhere.jsonl").code == 2
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    assert policygrad("train", "ppo", "CartPole-v1", "--gamma", 1.2).code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_the_command_and_python_train_the_same(policygrad: Any, tmp_path: Path) -> None:
    policygrad(*PPO, "--seed", 5, "--out", tmp_path / "run")
    run = train("ppo", "probes:Known-v0", num_envs=4, num_steps=16, hidden=(8,), minibatch_size=16, steps=100, seed=5)
    policy, _ = load_policy(tmp_path / "run")
    assert all((a == b).all() for a, b in zip(policy.parameters(), run.policy.parameters(), strict=True))


# Evaluation


@pytest.fixture
def run(policygrad: Any, tmp_path: Path) -> Path:
    policygrad(*PPO, "--initial-log-std", "0.5", "--out", tmp_path / "run")
    return tmp_path / "run"


def test_eval_prints_one_json_object_and_nothing_else(policygrad: Any, run: Path) -> None:
    said = policygrad("eval", run, "--trust", "--episodes", 5, "--json")
    assert (said.code, said.err, said.out.count("\n")) == (0, "", 1)
    result = strict(said.out)
    names = {"return_mean", "return_std", "length_mean", "episodes", "returns", "lengths", "policy"}
    assert set(result) == names | {"success", "info"}
    assert result["policy"] == {"iteration": 2, "steps": 108, "run": "ended", "partway": False}
    assert result["episodes"] == len(result["returns"]) == 5
    assert result["return_mean"] == pytest.approx(sum(result["returns"]) / 5)
    assert 1 <= result["length_mean"] <= 8


def test_eval_repeats_itself_and_its_seed_and_noise_change_it(policygrad: Any, run: Path) -> None:
    few = ("eval", run, "--trust", "--episodes", 4, "--json")
    plain = policygrad(*few).out
    assert policygrad(*few).out == plain
    others = [policygrad(*few, *more).out for more in (("--seed", 7), ("--sampled",), ("--sampled", "--seed", 7))]
    assert len({plain, *others}) == 4
    assert policygrad(*few, "--sampled").out == others[1]
    assert policygrad(*few, "--greedy").out == plain


def test_eval_says_it_in_words(policygrad: Any, run: Path) -> None:
    said = policygrad("eval", run, "--trust", "--episodes", 3)
    assert said.code == 0
    assert "3 episodes" in said.out


# Several runs


def test_a_study_trains_its_seeds_and_sums_them_up(policygrad: Any) -> None:
    said = policygrad(*PPO, "--seeds", "0-1", "--out", "study")
    assert said.code == 0
    assert "seed 0: return" in said.err
    assert "study: study (" in said.out
    assert re.search(r"ppo +2 ", said.out)
    for seed in range(2):
        assert strict(Path("study", f"seed-{seed}", "config.json").read_text())["options"]["seed"] == seed
    again = policygrad(*PPO, "--seeds", "0-1", "--out", "study", "--json")
    assert (again.code, again.out.count("\n")) == (0, 1)
    assert set(strict(again.out)["runs"]) == {"0", "1"}
    assert strict(policygrad("compare", "study", "--json").out) == strict(again.out)["comparison"]


def test_a_seed_that_fails_is_one_line_and_exit_code_2(policygrad: Any) -> None:
    policygrad(*PPO, "--seeds", "0", "--out", "study")
    Path("study", "seed-1").mkdir()
    Path("study", "seed-1", "mine").write_text("")
    said = policygrad(*PPO, "--seeds", "0,1,2", "--out", "study", "--json")
    assert said.code == 2
    assert list(strict(said.out)["failed"]) == ["1"]
    assert list(strict(said.out)["runs"]) == ["0", "2"]
    assert said.err.count("policygrad: seed 1 failed: ") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seeds", "3-1"), "seeds is '3-1': give a range such as 0-9"),
        (("--seeds", "0-1", "--seed", 1), "seed is of one run, and seeds of a study"),
        (("--seeds", "0,0"), "the seed 0 is given more than once"),
        (("--processes", 2), "processes is of a study"),
        (("--seeds", "0-1", "--processes", 0), "processes is 0"),
        (("--seeds", "0-1", "--gamma", 3), "gamma is 3.0"),
    ],
    ids=str,
)
def test_a_study_that_cannot_be_meant_is_one_line(
    policygrad: Any, tmp_path: Path, flags: tuple[Any, ...], said: str
) -> None:
    assert_one_line(policygrad(*PPO, *flags, "--out", "study"), said)
    assert list(tmp_path.iterdir()) == []


def test_report_writes_a_page_beside_the_run(policygrad: Any, run: Path) -> None:
    said = policygrad("report", run, "--out", "page.html")
    assert (said.code, said.err, said.out) == (0, "", "report: page.html\n")
    assert Path("page.html").read_text().startswith("<!doctype html>")
    policygrad("train", "ppo", "exact:chain", "--steps", 64, "--out", "mine")
    assert policygrad("report", "mine").out == f"report: {Path('mine', 'report.html')}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "report needs runs"),
        (("nothing",), "nothing does not exist"),
        (("@", "--port", 80), "--port is of --live"),
        (("@", "--live", "--out", "x.html"), "give one of the two"),
        (("@", "--live", "--port", 70000), "port is 70000"),
    ],
    ids=str,
)
def test_a_report_that_cannot_be_meant_is_one_line(
    policygrad: Any, run: Path, words: tuple[Any, ...], said: str
) -> None:
    assert_one_line(policygrad("report", *(run if word == "@" else word for word in words)), said)


def test_compare_prints_a_table_and_writes_a_picture(policygrad: Any) -> None:
    for seed in range(2):
        policygrad("train", "ppo", "exact:chain", "--steps", 64, "--seed", seed, "--out", f"runs/ppo-{seed}")
        policygrad("train", "trpo", "exact:chain", "--steps", 64, "--seed", seed, "--out", f"runs/trpo-{seed}")
    said = policygrad("compare", "runs", "--out", "here")
    assert (said.code, said.err) == (0, "")
    assert "exact:chain: J of the policy, in closed form" in said.out
    assert "note: intervals of 2 runs are too narrow" in said.out
    assert "comparison: here" in said.out
    found = strict(Path("here", "comparison.json").read_text())
    assert (
        strict(policygrad("compare", "runs/ppo-0", "runs/ppo-1", "runs/trpo-0", "runs/trpo-1", "--json").out) == found
    )
    assert policygrad("compare", "runs", "--score", "training", "--at", 4000, "--unfinished").code == 0
    assert_one_line(policygrad("compare", "runs", "--at", 1), "by 1 to compare: give a larger at")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "there is no run to compare"),
        (("nowhere",), "nowhere does not exist"),
        (("run", "--score", "best"), "--score is 'best': it must be one of auto, training, evaluation"),
        (("run", "--at", 0), "at is 0"),
        (("run", "--at", "x"), "--at is 'x': it must be a whole number"),
    ],
    ids=str,
)
def test_compare_refuses_what_cannot_be_meant(
    policygrad: Any, run: Path, arguments: tuple[Any, ...], said: str
) -> None:
    assert_one_line(policygrad("compare", *arguments), said)


def test_watch_writes_a_video_or_prints_a_transcript(policygrad: Any) -> None:
    policygrad("train", "ppo", "CartPole-v1", "--steps", 64, "--num-steps", 8, "--preset", "none", "--out", "cart",
               "--minibatch-size", 8)  # fmt: skip
    said = policygrad("watch", "cart", "--out", "film.gif", "--max-steps", 4)
    assert said.code == 0
    assert "return 4.0" in said.out
    assert "video: film.gif" in said.out
    assert Path("film.gif").stat().st_size > 1000
    assert_one_line(policygrad("watch", "cart", "--out", "film.avi"), "a video is an .mp4 or a .gif file")
    assert_one_line(policygrad("watch", "cart", "--samples", 3), "--samples is for language")
    policygrad("train", "ppo", "exact:chain", "--steps", 64, "--out", "chain")
    said = policygrad("watch", "chain", "--seed", 3)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("episode 1: ")
    assert policygrad("watch", "chain", "--seed", 3, "--out", "said.txt").code == 0
    assert Path("said.txt").read_text() == said.out
    assert_one_line(policygrad("watch", "chain", "--episodes", 3), "--episodes is for control")


def test_watch_imports_no_code_that_a_run_names(policygrad: Any, run: Path) -> None:
    assert_one_line(policygrad("watch", run, "--out", "film.gif"), "environment 'probes:Known-v0': repeat")
    assert_one_line(policygrad("watch", run, "--out", "film.gif", "--trust"), "has no picture")


# Help and lists


TASKS = {"control": "CartPole-v1", "language": "arithmetic", "exact": "exact:chain"}


def test_help_is_everywhere_and_imports_no_torch() -> None:
    """What makes it slow is torch, matplotlib and the environments; so: none of them."""
    commands = [[], ["--help"], ["train", "--help"], ["eval", "--help"], ["list", "--help"], ["list"], ["--version"]]
    commands += [["reward-model", "--help"], ["verify", "--help"], ["train", "a2c", "--help"]]
    commands += [["train", "grpo", "--model", "m", "--help"], ["train", "grpo", "prompts.jsonl", "--help"]]
    commands += [["train", name, "--help"] for name in METHODS]
    commands += [["train", "ppo", task, "--help"] for task in (*TASKS.values(), "mine.py:Env", "module:Env-v0")]
    commands += [["train", "--seed", "1", "ppo", "CartPole-v1", "-h"], ["eval", "run", "--help"], ["list", "presets"]]
    commands += [["compare", "--help"], ["compare", "run", "--help"], ["watch", "--help"], ["watch", "run", "--help"]]
    commands += [["elo", "--help"], ["elo", "run", "--help"]]
    commands += [["list", "environments", "--help"], ["verify", "--estimator", "mine.py:f", "--help"]]
    script = f"""
import contextlib, io, sys
from policygrad.cli import main
for command in {commands!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(command)
        except SystemExit as stop:
            assert not stop.code, (command, stop.code)
    assert len(out.getvalue()) > 4, command
heavy = {{"torch", "transformers", "gymnasium", "matplotlib", "tensorboard", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = process("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("world", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_help_has_exactly_the_options_of_the_method_on_the_world(policygrad: Any, method: str, world: str) -> None:
    said = policygrad("train", method, TASKS[world], "--help")
    assert (said.code, said.err) == (0, "")
    shown = re.findall(r"^\W*(?:-h, )?--([\w-]+)", said.out, re.MULTILINE)
    own = {"out", "preset", "json", "seeds", "processes", "help"} | ({"samples"} if world == "language" else set())
    names = {f.name for f in dataclasses.fields(options_of(method, world))} | own
    assert sorted(shown) == sorted(name.replace("_", "-") for name in names)


def test_help_says_what_an_option_means(policygrad: Any) -> None:
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", policygrad("train", "ppo", "exact:chain", "--help").out).split())
    for f in dataclasses.fields(options_of("ppo", "exact")):
        assert f.metadata["help"].split(".")[0].split(" --")[0] in text, f.name


@pytest.mark.parametrize(("method", "task"), [("ppo", "CartPole-v1"), ("npg", "CartPole-v1"), ("trpo", "arithmetic")])
def test_help_shows_the_presets_defaults_where_the_task_is_named(policygrad: Any, method: str, task: str) -> None:
    said = policygrad("train", method, task, "--help").out
    text = " ".join(re.sub(r"[\u2500-\u257f]", " ", said).split())
    _, tuned = presets.choose(None, method, task, {})
    assert tuned
    for name, x in tuned.items():
        after = text.split(f" --{name.replace('_', '-')} ", 1)[1].split(" --", 1)[0]
        assert f"(default: {x})" in after, name


def test_list_names_the_methods_the_variants_and_the_presets(policygrad: Any) -> None:
    text = policygrad("list").out
    lines = [line.strip() for line in text.splitlines()]
    for name in (*METHODS, *presets.names()):
        assert any(line.startswith(name) and len(line) > len(name) + 2 for line in lines), name
    assert "a2c" in text
    assert "variants" in text


def test_list_environments_names_gymnasiums(policygrad: Any) -> None:
    assert "CartPole-v1" in policygrad("list", "environments").out.split()


# Bad input

NOT_TEXT = "is no text: it has a null byte or bytes that are not UTF-8"
BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("unknown command", ("trian",), "unknown command 'trian': did you mean train?"),
    ("command in capitals", ("TRAIN", "ppo"), "did you mean train?"),
    (
        "long command",
        ("x" * 1000,),
        "xxx...: there are train, clone, resume, reproduce, reward-model, eval, elo, watch, export, tune, compare,",
    ),
    ("null byte in a path", ("train", "ppo", "CartPole-v1", "--out", "a\0b"), f"'a\\x00b' {NOT_TEXT}"),
    ("null byte in a run", ("eval", "a\0b"), NOT_TEXT),
    ("null byte in a task", ("train", "ppo", "Cart\0Pole-v1"), NOT_TEXT),
    ("null byte in a number", ("verify", "--seed=1\0"), NOT_TEXT),
    ("null byte in a topic", ("list", "\0"), NOT_TEXT),
    ("half a pair", ("reward-model", "--dataset", "\ud800"), f"'\\ud800' {NOT_TEXT}"),
    ("an empty directory", ("train", "ppo", "CartPole-v1", "--out", ""), "an argument is empty"),
    ("an empty run", ("eval", ""), "an argument is empty"),
    ("bytes that are no text", ("eval", os.fsdecode(b"run\xff")), NOT_TEXT),
    ("a capital too few", ("train", "PPO", "cartpole-v1"), "did you mean CartPole-v1"),
    ("long method", ("train", "p" * 1000, "CartPole-v1"), "unknown method 'ppp"),
    ("no method", ("train", "--steps", "3"), "there is no method"),
    ("long preset", ("train", "ppo", "CartPole-v1", "--preset", "x" * 1000), "(or none, or FILE.toml)"),
    ("empty task", ("train", "ppo", ""), "an argument is empty (a variable of the shell that is not set?)"),
    ("long task", ("train", "ppo", "x" * 1000), "unknown environment"),
    ("escapes in a task", ("train", "ppo", "\x1b[31m\n\r"), "\\x1b[31m"),
    ("two tasks", ("train", "ppo", "CartPole-v1", "Acrobot-v1"), "'Acrobot-v1' belongs to no option"),
    (
        "a misspelled switch before the task",
        ("train", "ppo", "--scale-reward", "CartPole-v1"),
        "did you mean --scale-rewards?",
    ),
    ("no value", ("train", "ppo", "CartPole-v1", "--seed", "--json"), "--seed has no value: it must be a whole number"),
    ("a value twice", ("verify", "--seed", "1", "--seed", "2"), "--seed is given more than once: give it once"),
    ("long value", ("train", "ppo", "CartPole-v1", "--steps", "9" * 5000), "--steps is '999"),
    (
        "not a path",
        ("reward-model", "--lerning-rate", "3"),
        "there is no option --lerning-rate: did you mean --learning",
    ),
    ("second topic", ("list", "methods", "preset"), "nothing to list under 'preset': did you mean presets?"),
    ("not of the worlds", ("verify", "--world", "chian"), "--world is 'chian': it must be one of all, random, cliff,"),
    ("a file as run", ("eval", __file__), "is no run directory: give one that train wrote"),
    ("method and task in the wrong order", ("train", "CartPole-v1", "PPO"), "policygrad train PPO CartPole-v1"),
    ("credit as method", ("train", "vtrace"), "vtrace is a credit and no method: write a method, such as actor_critic"),
    (
        "lone task",
        ("train", "CartPole-v1"),
        "the method is missing: write policygrad train METHOD CartPole-v1, such as",
    ),
    ("lone world", ("train", "exact:chain", "--steps", "9"), "the method is missing: write policygrad train METHOD ex"),
    ("compiled muon", ("train", "ppo", "CartPole-v1", "--compile", "on", "--optimizer", "muon"), "have no graph"),
    ("a name twice", ("train", "ppo", "CartPole-v1", "--env-options", '{"a": 1, "a": 2}'), "has each name once"),
    ("unknown method", ("train", "pppo", "CartPole-v1"), "did you mean ppo"),
    ("unknown environment", ("train", "ppo", "CartPol-v1"), "did you mean CartPole-v1"),
    ("unknown version", ("train", "ppo", "CartPole-v7"), "CartPole-v1"),
    ("unknown module", ("train", "ppo", "no_such:Env-v0"), "no_such"),
    ("unknown preset", ("train", "ppo", "CartPole-v1", "--preset", "CartPole-v2"), "did you mean CartPole-v1"),
    ("unknown option", ("train", "ppo", "CartPole-v1", "--learning-rat", "1"), "did you mean --learning-rate"),
    ("a command's old option", ("train", "ppo", "CartPole-v1", "--clip", "0.2"), "--clip"),
    (
        "an option of another method",
        ("train", "trpo", "CartPole-v1", "--clip-low", "0.2"),
        "trpo has no option 'clip_low': it is for ppo, grpo, dr_grpo, dapo, gspo, cispo",
    ),
    ("of the other update", ("train", "ppo", "exact:chain", "--delta=0.1"), "ppo has no option 'delta': it is for npg"),
    (
        "an option of language",
        ("train", "ppo", "CartPole-v1", "--max-tokens", "4"),
        "ppo has no option 'max_tokens' on control: it is for language; leave it out",
    ),
    (
        "an option of control",
        ("train", "trpo", "arithmetic", "--num-steps", "4"),
        "trpo has no option 'num_steps' on language: it is for control; leave it out",
    ),
    (
        "of another world, without a value",
        ("train", "ppo", "exact:chain", "--scale-rewards"),
        "ppo has no option 'scale_rewards' on exact: it is for control; leave it out",
    ),
    (
        "an option that another choice leaves unread",
        ("train", "ppo", "CartPole-v1", "--group-size", "2"),
        "group_size is read only where credit is group",
    ),
    ("no task", ("train", "ppo"), "there is no task"),
    ("unknown exact world", ("train", "ppo", "exact:chian"), "did you mean chain"),
    ("greedy and sampled", ("eval", "run", "--greedy", "--sampled"), "exclude each other"),
    ("no run", ("eval",), "RUN is missing"),
    ("not a number", ("train", "ppo", "CartPole-v1", "--steps", "many"), "--steps"),
    ("not one of them", ("train", "ppo", "CartPole-v1", "--activation", "sine"), "sine"),
    ("gamma of 1.2", ("train", "ppo", "CartPole-v1", "--gamma", "1.2"), "gamma is 1.2"),
    ("gamma of nan", ("train", "ppo", "CartPole-v1", "--gamma", "nan"), "gamma is nan"),
    (
        "minibatch larger than the batch",
        ("train", "ppo", "probes:Known-v0", *SMALL, "--minibatch-size", "65"),
        "minibatch_size is 65",
    ),
    ("zero environments", ("train", "ppo", "CartPole-v1", "--num-envs", "0"), "num_envs is 0"),
    ("zero steps", ("train", "ppo", "CartPole-v1", "--steps", "0"), "steps is 0"),
    ("a seed below 0", ("train", "ppo", "CartPole-v1", "--seed", "-1"), "seed"),
    ("a seed too large", ("train", "ppo", "CartPole-v1", "--seed", "1" + "0" * 30), "seed"),
    ("a device that is not there", ("train", "ppo", "CartPole-v1", "--device", "abacus"), "abacus"),
    ("squash without a Box", ("train", "ppo", "CartPole-v1", "--distribution", "squashed"), "distribution is for Box"),
    ("normalized state numbers", ("train", "ppo", "CliffWalking-v1", "--normalize-observations"), "Discrete"),
    ("a missing package", ("train", "ppo", "probes:Missing-v0"), "not installed"),
    ("no time limit", ("train", "reinforce", "probes:Endless-v0"), "episode_steps"),
    ("not a run", ("eval", "."), "run"),
    ("not there", ("eval", "nowhere"), "nowhere"),
    ("nothing to list", ("list", "method"), "methods"),
    ("a file in the way", (*PPO, "--out", __file__), "is a file: choose another directory"),
    ("below a file", (*PPO, "--out", __file__ + "/run"), "cannot be written"),
]


def assert_one_line(said: Said, expected: str) -> None:
    assert said.code == 2, said
    assert said.err.startswith("policygrad: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
    assert said.err[:-1].isprintable()
    assert len(said.err) - len("policygrad: \n") <= 200
    assert expected in said.err
    assert said.out == ""


@pytest.mark.parametrize(("arguments", "expected"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_input_is_one_line_and_exit_code_2(policygrad: Any, arguments: tuple[Any, ...], expected: str) -> None:
    if "train" in arguments and "--preset" not in arguments:
        arguments = (*arguments, "--preset", "none")
    assert_one_line(policygrad(*arguments), expected)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_environment_is_one_line_and_exit_code_2(
    policygrad: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN", how)
    assert_one_line(policygrad("train", "ppo", "probes:Broken-v0", "--num-steps", 16, "--steps", 64), "environment")


@pytest.mark.parametrize("space", ["Sequence", "Text"])
def test_an_unsupported_action_space_is_named(policygrad: Any, space: str) -> None:
    assert_one_line(policygrad("train", "ppo", f"probes:{space}Actions-v0"), f"a {space} space is not supported")


@pytest.mark.parametrize("flag", [("--episodes", 0), ("--episodes", -3), ("--seed", -1), ("--seed", 10**30)], ids=str)
def test_eval_refuses_what_cannot_be_meant(policygrad: Any, run: Path, flag: tuple[str, int]) -> None:
    assert_one_line(policygrad("eval", run, "--trust", *flag), f"{flag[0].removeprefix('--')} is {flag[1]}")


def test_options_may_come_before_the_method_and_the_task(policygrad: Any) -> None:
    method, task, *options = (x for x in PPO[1:] if x not in ("--hidden", "8"))
    plain = policygrad("train", method, task, *options, "--hidden", 8, 4, "--seed", 3, "--json", "--out", "a")
    mixed = policygrad("train", *options, "--json", method, "--seed", 3, "--hidden", 8, 4, task, "--out=b")
    assert (plain.code, mixed.code) == (0, 0), mixed.err
    configurations = [strict(Path(out, "config.json").read_text()) for out in ("a", "b")]
    assert configurations[1]["options"] == configurations[0]["options"]
    assert configurations[1]["task"] == task


EXITS = """
import gymnasium, probes, sys
class Exits(probes.Known):
    def step(self, action):
        sys.exit(0)
gymnasium.register("Exits-v0", Exits)
"""


def test_code_that_ends_the_program_is_an_error_and_no_success(
    policygrad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "exits.py").write_text(EXITS)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = policygrad("train", "ppo", "exits:Exits-v0", *PPO[3:], "--out", "run")
    assert (said.code, said.err.count("\n")) == (2, 1)
    assert "code that was called (step, exits.py line 5) ended the program, by exit(0)" in said.err
    assert "the policy of iteration 0 (0 steps) is kept in run" in said.err


CANCELS = """
import asyncio, probes
class Cancels(probes.Known):
    def __init__(self):
        super().__init__()
        self.count = 0
    def step(self, action):
        self.count += 1
        if self.count > 9:
            raise asyncio.CancelledError("no client")
        return super().step(action)
class Stop(BaseException):
    pass
class Talk:
    def reset(self, seed):
        return "7 + 5 ="
    def step(self, text):
        raise Stop("no more")
def loss(log_probs, old_log_probs, advantages, action_mask):
    raise Stop("no more")
def estimator(reward, value, terminated, ended, gamma):
    raise Stop("no more")
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("train", "ppo", "cancels.py:Cancels", "--num-steps", "8", "--num-envs", "2", "--minibatch-size", "8",
             "--iterations", "3",
             "--preset", "none", "--out", "run"),
            r"code that was called \(step, cancels.py line 10\) raised CancelledError \(no client\), which is no "
            r"Exception: let it raise another error; the policy of iteration 1 \(\d+ steps\) is kept in run",
        ),
        (
            ("train", "grpo", "cancels.py:Talk", "--model", "model", "--max-tokens", "8", "--held-out", "2"),
            r"\(step, cancels.py line 18\) raised Stop \(no more\), which is no Exception",
        ),
        (("verify", "--loss", "cancels.py:loss"), r"\(loss, cancels.py line 20\) raised Stop \(no more\)"),
        (
            ("verify", "--estimator", "cancels.py:estimator", "--world", "bandit", "--samples", "1000"),
            r"raised Stop",
        ),
    ],
    ids=["environment", "conversation", "loss", "estimator"],
)  # fmt: skip
def test_an_error_that_is_no_exception_is_one_line_as_well(
    policygrad: Any, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "cancels.py").write_text(CANCELS)
    if "model" in words:
        write_model(tmp_path / "model")
    found = policygrad(*words)
    assert_one_line(found, "")
    assert re.search(said, found.err)


def test_a_demonstration_file_before_its_task_is_one_line(policygrad: Any) -> None:
    said = policygrad("clone", "moves.jsonl", "CartPole-v1")
    assert_one_line(said, "the task comes first: policygrad clone CartPole-v1 moves.jsonl")


def test_a_file_of_another_kind_is_not_written_over(policygrad: Any, tmp_path: Path) -> None:
    policygrad("train", "ppo", "exact:chain", "--steps", 64, "--out", "run")
    (tmp_path / "mine.py").write_text("mine")
    assert_one_line(policygrad("report", "run", "--out", "mine.py"), "out is 'mine.py': a report is an .html file")
    assert_one_line(policygrad("watch", "run", "--out", "mine.py"), "a transcript is a .txt or an .md file")
    assert (tmp_path / "mine.py").read_text() == "mine"


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 3 TiB"), RuntimeError("x: can't allocate memory: y")]
)
def test_too_little_memory_is_one_line(policygrad: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def run(rest: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_dispatch", run)
    assert_one_line(policygrad("train"), f"there is not enough memory ({error}): lower num_envs")


def test_a_full_disk_is_one_line_wherever_it_is_met(policygrad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(rest: list[str]) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/" + "x" * 300)

    monkeypatch.setattr(cli, "_dispatch", run)
    said = policygrad("train")
    assert_one_line(said, "No space left on device")
    assert said.err.endswith(": make room, or choose another place\n")


def test_a_damaged_preset_is_one_line_that_names_its_file(
    policygrad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    for text, expected in (
        ("[ppo", "CartPole-v1.toml cannot be read"),
        ("gamma = 0.9", "CartPole-v1.toml has 'gamma', which is no table of a method"),
        ("[pppo]\ngamma = 0.9", "CartPole-v1.toml has 'pppo'"),
        ('[ppo]\ngamma = "high"', "preset CartPole-v1: gamma is 'high': it must be a number"),
        ("[ppo]\ngama = 0.9", "preset CartPole-v1: ppo has no option 'gama': did you mean gamma"),
        ("[ppo]\ngamma = 2.0", "gamma is 2.0: it must be between 0 and 1 (preset CartPole-v1 sets gamma=2.0"),
        ("[ppo]\nminibatch_size = 5000", "minibatch_size is 5000"),
    ):
        (tmp_path / "CartPole-v1.toml").write_text(text)
        assert_one_line(policygrad("train", "ppo", "CartPole-v1"), expected)
    (tmp_path / "CartPole-v1.toml").write_bytes(b"\xff")
    assert_one_line(policygrad("train", "ppo", "CartPole-v1"), "CartPole-v1.toml cannot be read")


def test_training_that_explodes_is_one_line_and_exit_code_2(policygrad: Any, tmp_path: Path) -> None:
    said = policygrad(*PPO[:-1], "5000", "--learning-rate", 1e30, "--out", tmp_path / "run")
    assert_one_line(said, "training stopped")
    ended = strict((tmp_path / "run" / "summary.json").read_text())["ended"]
    assert said.err == f"policygrad: {ended}\n"
    policy, _ = load_policy(tmp_path / "run")
    assert all(p.isfinite().all() for p in policy.parameters())


def test_debug_shows_the_traceback(policygrad: Any) -> None:
    said = policygrad("train", "ppo", "CartPole-v1", "--gamma", "1.2", "--debug")
    assert said.code == 2
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("policygrad: gamma is 1.2")


def test_an_interrupt_does_not_say_that_anything_is_kept_where_nothing_is(
    policygrad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(rest: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    said = policygrad("train")
    assert (said.code, said.err) == (130, "policygrad: stopped; nothing was saved\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_stops_it_once_and_a_second_one_ends_it_at_once(
    policygrad: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = signal.Signals[name]
    handlers = []

    def stopped(rest: list[str]) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            handlers.extend(signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        raise AssertionError("the signal came to nothing")

    before = signal.getsignal(number)
    monkeypatch.setattr(cli, "_dispatch", stopped)
    said = policygrad("train")
    assert (said.code, said.err) == (128 + number, "policygrad: stopped; nothing was saved\n")
    assert handlers == [signal.SIG_DFL] * 3
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so(policygrad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup."""

    def hung_up(rest: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    monkeypatch.setattr(cli, "_dispatch", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert policygrad("train").code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("task", ["probes:Known-v0", "exact:chain"])
def test_a_run_that_is_terminated_says_what_it_keeps_and_eval_says_so_too(policygrad: Any, task: str) -> None:
    from policygrad.train.reports import ProgressLine

    def update(line: ProgressLine, done: float, parts: list[str]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    some = ("--num-envs", 4, "--steps", 10**9, "--compile", "off", "--out", "it")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressLine, "update", update)
        said = policygrad("train", "a2c", task, *some)
    assert said.code == 128 + signal.SIGTERM
    again = "policygrad resume it" + (" --trust" if task.startswith("probes") else "")
    kept = re.fullmatch(
        rf"policygrad: stopped; the (policy of iteration 1 \(\d+ steps\)) is kept in it; to go on: {again}\n", said.err
    )
    assert kept, said.err
    assert policygrad("eval", "it", "--trust").out.endswith(f"; {kept[1]} of a run that was stopped\n")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_run_that_is_stopped_goes_on_by_the_command_that_it_prints(policygrad: Any, name: str) -> None:
    """After a whole iteration, so that it ends as if it had not been stopped."""
    from policygrad.train.reports import ProgressLine

    number, updates, update = signal.Signals[name], [0], ProgressLine.update

    def stopping(line: ProgressLine, done: float, parts: list[str]) -> None:
        updates[0] += 1
        update(line, done, parts)
        if updates[0] == 2:
            os.kill(os.getpid(), number)

    longer = (*PPO[:-1], "250")
    whole = policygrad(*longer, "--out", "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProgressLine, "update", stopping)
        said = policygrad(*longer, "--out", "it's")
    assert said.code == 128 + number
    assert said.err.count("\n") == 1
    command = shlex.split(said.err.partition("to go on: ")[2])
    assert command[:3] == ["policygrad", "resume", "it's"]
    again = policygrad(*command[1:])
    assert again.code == 0
    assert re.search(r"^goes on from iteration 2 \(\d+ steps\)$", again.out, re.MULTILINE)
    score = r"^ppo on .*: return [^(]*\(last \d+ episodes\)"
    assert re.search(score, again.out, re.MULTILINE)[0] == re.search(score, whole.out, re.MULTILINE)[0]  # type: ignore[index]
    judged = [json.loads(policygrad("eval", x, "--trust", "--json").out) for x in ("whole", "it's")]
    assert judged[0] == judged[1]
    assert policygrad("resume", "it's", "--trust").code == 2, "it has ended"
    more = policygrad("resume", "it's", "--trust", "--steps", "50", "--json")
    assert strict(more.out)["steps"] >= 300


def test_a_second_signal_stops_a_run_at_once(policygrad: Any, tmp_path: Path) -> None:
    """In the middle of an iteration; the checkpoint before it is where it goes on from."""
    from policygrad.control.environments import Checked

    step, steps = Checked.step, [0]

    def stopping(environment: Any, action: Any) -> Any:
        steps[0] += 1
        if steps[0] in (150, 152):
            os.kill(os.getpid(), signal.SIGINT)
        assert steps[0] <= 152
        return step(environment, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checked, "step", stopping)
        said = policygrad(*PPO[:-1], "100000", "--compile", "off", "--checkpoint-every", "1", "--out", "it")
    assert said.code == 130
    kept = r"stopped; the policy of iteration 2 \(\d+ steps\) is kept in it"
    assert re.fullmatch(rf"policygrad: {kept}; to go on: policygrad resume it --trust\n", said.err), said.err
    assert sorted(x.stem for x in (tmp_path / "it" / "checkpoints").glob("*.json")) == ["000000001", "000000002"]


def test_resume_and_reproduce_print_one_json_object_and_nothing_else(policygrad: Any) -> None:
    policygrad(*PPO, "--out", "it")
    assert strict(policygrad("resume", "it", "--trust", "--steps", "64", "--json").out)["steps"] > 100
    said = policygrad("reproduce", "it", "--trust", "--json")
    assert said.code == 0
    assert strict(said.out)["reproduced"]
    metrics = Path("it", "metrics.jsonl")
    metrics.write_text(metrics.read_text().replace('"entropy": ', '"entropy": 1', 1))
    said = policygrad("reproduce", "it", "--trust")
    assert said.code == 1
    assert said.out.startswith("not reproduced: from iteration 1 (")
    assert "entropy is " in said.out
    assert said.out.splitlines()[1] == "what differs between the machines: nothing that config.json says"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("resume",), "RUN is missing"),
        (("resume", "nowhere"), "is no run directory"),
        (("resume", "it", "--steps", "0"), "steps is 0: it must be a whole number, at least 1"),
        (("resume", "it", "--steps", "many"), "--steps is 'many'"),
        (("resume", "it", "--gamma", "0.5"), "there is no option --gamma"),
        (("resume", "it"), "has ended, after"),
        (("reproduce", "nowhere"), "is no run directory"),
        (("reproduce", "it", "--steps", "3"), "there is no option --steps"),
    ],
)
def test_what_cannot_be_resumed_is_one_line(policygrad: Any, arguments: tuple[str, ...], expected: str) -> None:
    policygrad("train", "ppo", "exact:bandit", "--num-envs", 4, "--iterations", 2, "--out", "it")
    assert_one_line(policygrad(*arguments), expected)


@pytest.mark.parametrize("error", [BrokenPipeError, EOFError, RuntimeError])
def test_an_interrupt_is_one_though_what_is_closed_raises_again(
    policygrad: Any, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def interrupt(rest: list[str]) -> int:
        with contextlib.ExitStack() as stack:
            stack.callback(fail)
            raise KeyboardInterrupt

    def fail() -> None:
        raise error("the workers are gone")

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    said = policygrad("train")
    assert (said.code, said.err) == (130, "policygrad: stopped; nothing was saved\n")


def test_what_the_user_can_mend_is_said_though_what_is_closed_raises_again(
    policygrad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rest: list[str]) -> int:
        try:
            raise UserError("mend this")
        finally:
            raise BrokenPipeError

    monkeypatch.setattr(cli, "_dispatch", refuse)
    assert_one_line(policygrad("train"), "mend this")


def test_an_interrupt_of_asynchronous_environments_is_one(tmp_path: Path) -> None:
    """Ctrl-C goes to the workers as well."""
    script = "from policygrad.cli import main; main()"
    some = [*PPO[:-1], "1000000000", "--vectorization", "async", "--compile", "off", "--out", "run"]
    environment = os.environ | {"PYTHONPATH": PLACES}
    command = subprocess.Popen(
        [sys.executable, "-c", script, *some],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    )
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(command.pid, signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert (command.returncode, out) == (130, "")
    kept = r"policygrad: stopped; the policy (of|from the middle of) iteration [\d,]+ .*is kept in run"
    kept += r"(; to go on.*: policygrad resume run --trust)?\n"
    assert re.fullmatch(kept, err)
    summary = strict((tmp_path / "run" / "summary.json").read_text())
    assert summary["ended"] == "interrupted"
    assert summary["steps"] == strict(metrics.read_text().splitlines()[-1])["steps"]


def test_a_directory_that_the_system_refuses_is_one_line(
    policygrad: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert_one_line(policygrad(*PPO, "--out", "x" * 400), "File name too long")
    said = policygrad(*PPO, "--out", "x" * 400, "--debug")
    assert said.code == 2
    assert "Traceback" in said.err

    listed = Path.iterdir

    def refuse(path: Path) -> Any:
        if path.name == "mine":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert_one_line(policygrad(*PPO, "--out", "mine"), "Permission denied: 'mine'")


def test_train_without_arguments_says_how_and_is_an_error(policygrad: Any) -> None:
    said, asked = policygrad("train"), policygrad("train", "--help")
    assert (said.code, said.out) == (2, "")
    assert (asked.code, asked.err) == (0, "")
    assert said.err == asked.out
    assert said.err.startswith("usage: policygrad train METHOD TASK")


def test_a_reader_that_stops_early_is_no_error() -> None:
    script = "from policygrad.cli import main; main(['list'])"
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_files_beside_the_user_hide_no_module(tmp_path: Path) -> None:
    for name in ("gymnasium", "code", "typing", "tyro"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "mine.py").write_text("import gymnasium, probes\ngymnasium.register('Mine-v0', probes.Known)\n")
    for arguments in (["list", "environments"], ["train", "ppo", "mine:Min-v0"]):
        done = subprocess.run(
            [sys.executable, "-m", "policygrad", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": PLACES},
            cwd=tmp_path,
        )
        assert "the wrong one" not in done.stderr
        assert "CartPole-v1" in done.stdout or "did you mean Mine-v0" in done.stderr, done.stderr


def test_as_a_process_it_behaves_the_same(tmp_path: Path) -> None:
    """Also: a module beside the user is found, though the command is not run by `python -m`."""
    (tmp_path / "mine.py").write_text("import gymnasium, probes\ngymnasium.register('Mine-v0', probes.Known)\n")
    script = "from policygrad.cli import main; import sys; sys.path.remove(''); main()"
    bad = process("-c", script, "train", "ppo", "mine:Min-v0", cwd=tmp_path)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1), bad.stderr
    assert "Mine-v0" in bad.stderr


# Language models


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What a user of a language model gives: a model, prompts and a reward of his own."""
    place = tmp_path_factory.mktemp("language")
    model, prompts, rewards = write_model(place / "model"), write_prompts(place), write_rewards(place)
    return ["--model", str(model), "--dataset", str(prompts), "--reward", f"{rewards}:sevens"]


SMALL_LANGUAGE = ["--iterations", "1", "--prompts-per-rollout", "4", "--completions", "4"]
SMALL_LANGUAGE += ["--max-tokens", "6", "--held-out", "4"]


def test_training_shows_samples_before_and_after_and_a_second_run_goes_beside_the_first(
    policygrad: Any, files: list[str]
) -> None:
    said = policygrad("train", "grpo", *files, *SMALL_LANGUAGE).out
    before, after = said.index("before: reward"), said.index("after:  reward")
    assert said.count("completion", before, after) >= 1
    assert "tokens/s sampling" in said
    assert "run: runs/sums/grpo-seed0 (evaluate: policygrad eval runs/sums/grpo-seed0 --trust)" in said
    assert Path("runs/sums/grpo-seed0/model/model.safetensors").is_file()
    assert Path("runs/sums/grpo-seed0/samples.jsonl").is_file()
    said = policygrad("train", "grpo", *files, *SMALL_LANGUAGE, "--samples", 0).out
    assert "completion" not in said[said.index("before: reward") : said.index("after:  reward")]
    assert Path("runs/sums/grpo-seed0-2").is_dir()


def test_json_of_a_language_run_is_all_that_is_printed(policygrad: Any, files: list[str]) -> None:
    said = policygrad("train", "rloo", *files, *SMALL_LANGUAGE, "--json", "--out", "run")
    assert said.out.count("\n") == 1
    summary = strict(said.out)
    assert (summary["method"], summary["world"], summary["task"]) == ("rloo", "language", "sums")
    assert summary["completions"] == 16
    assert set(summary["after"]) >= {"reward", "pass_at_k", "length", "cut_fraction"}
    assert strict(policygrad("eval", "run", "--trust", "--json", "--completions", 2).out)["completions"] == 2


def test_a_language_run_is_evaluated(policygrad: Any, files: list[str]) -> None:
    right = [*files[:-1], files[-1].replace(":sevens", ":right")]
    assert policygrad("train", "grpo", *right, *SMALL_LANGUAGE, "--out", "run").code == 0
    said = policygrad("eval", "run", "--trust", "--completions", 4, "--samples", 2).out
    assert said.startswith("accuracy 0.")
    assert "pass@4" in said
    assert "pass@" not in policygrad("eval", "run", "--trust", "--greedy", "--completions", 1).out
    assert_one_line(policygrad("eval", "run", "--trust", "--episodes", 3), "--episodes is for control")
    assert_one_line(policygrad("eval", "run", "--trust", "--completions", 0), "completions is 0")


def test_ppo_is_of_language_where_a_model_is_named(policygrad: Any, files: list[str]) -> None:
    said = policygrad("train", "ppo", *files, *SMALL_LANGUAGE, "--minibatch-size", 8, "--json", "--out", "run")
    assert strict(said.out)["task"] == "sums"
    prompts = files[3]
    without = [*files[:2], *files[4:]]
    said = policygrad("train", "ppo", prompts, *without, *SMALL_LANGUAGE, "--minibatch-size", 8, "--json")
    assert strict(said.out)["run"] == "runs/sums/ppo-seed0"


ONCE = [
    (["train", "ppo", "CartPole-v1", "--seed", "1", "--seed", "2"], "--seed"),
    (["train", "ppo", "CartPole-v1", "--seed=1", "--steps", "8", "--seed", "1"], "--seed"),
    (["train", "ppo", "CartPole-v1", "--hidden", "8", "--num_envs", "2", "--hidden", "4"], "--hidden"),
    (["train", "ppo", "CartPole-v1", "--num_envs", "2", "--num-envs", "2"], "--num-envs"),
    (["train", "ppo", "Pendulum-v1", "--scale-rewards", "--no-scale-rewards"], "--scale-rewards"),
    (["train", "ppo", "CartPole-v1", "--out", "a", "--out", "b"], "--out"),
    (["train", "grpo", "arithmetic", "--model", "a", "--model", "b"], "--model"),
    (["train", "grpo", "exact:chain", "--steps", "1", "--steps", "2"], "--steps"),
    (["eval", "run", "--episodes", "1", "--episodes", "2"], "--episodes"),
    (["reward-model", "--seed", "1", "--seed", "1"], "--seed"),
    (["verify", "--seed", "1", "--seed", "1"], "--seed"),
]


@pytest.mark.parametrize(("arguments", "option"), ONCE, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_an_option_of_one_value_is_given_once(policygrad: Any, arguments: list[str], option: str) -> None:
    """The last one would win in silence."""
    assert_one_line(policygrad(*arguments), f"{option} is given more than once: give it once")


def test_data_sets_are_repeatable_with_a_weight_each(policygrad: Any, files: list[str]) -> None:
    Path("more.jsonl").write_text('{"q": "1+1=", "answer": "2"}\n' * 8)
    more = ["--dataset", "more.jsonl", "--dataset-weight", "1", "--dataset-weight", "2", "--columns", "prompt=q"]
    more += ["--evaluation-dataset", "more.jsonl", "--stop", "7", "--stop", "="]
    small = [x for i, x in enumerate(SMALL_LANGUAGE) if "--held-out" not in SMALL_LANGUAGE[max(i - 1, 0) : i + 1]]
    said = policygrad("train", "grpo", *files, *more, *small, "--out", "run")
    assert said.code == 0, said.err
    options = strict(Path("run/config.json").read_text())["options"]
    assert [Path(x).name for x in options["dataset"]] == ["sums.jsonl", "more.jsonl"]
    assert (options["dataset_weight"], options["columns"], options["stop"]) == ([1, 2], ["prompt=q"], ["7", "="])
    assert_one_line(
        policygrad("train", "grpo", *files, *more, *small, "--dataset-weight", 3), "2 data sets and 3 weights"
    )


def test_rewards_are_repeatable_with_a_weight_each(policygrad: Any, files: list[str]) -> None:
    other = files[-1].replace(":sevens", ":short")
    more = ["--reward", other, "--reward-weight", "1", "--reward-weight", "0.5"]
    assert policygrad("train", "grpo", *files, *more, *SMALL_LANGUAGE, "--out", "run").code == 0
    options = strict(Path("run/config.json").read_text())["options"]
    assert options["dataset"] == [files[3]]
    assert options["reward"] == [files[-1], other]
    assert options["reward_weight"] == [1.0, 0.5]


def test_arithmetic_needs_nothing_else_and_is_warmed_up_once(
    policygrad: Any, tmp_path: Path, hardly_warmed_up: None
) -> None:
    some = ["--iterations", "1", "--prompts-per-rollout", "2", "--held-out", "2", "--evaluate-every", "0"]
    first = policygrad("train", "grpo", "arithmetic", *some)
    assert first.code == 0
    assert "preset arithmetic: iterations=1" in first.out
    (cached,) = (tmp_path / "cache" / "policygrad").iterdir()
    written = (cached / "model.safetensors").stat().st_mtime_ns
    assert policygrad("train", "ppo", "arithmetic", *some, "--minibatch-size", "2").code == 0
    assert (cached / "model.safetensors").stat().st_mtime_ns == written
    assert policygrad("train", "grpo", "arithmetic", *some, "--heads", "3", "--out", tmp_path / "run").code == 0
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["num_attention_heads"] == 3
    assert policygrad("eval", tmp_path / "run").code == 0
    assert policygrad("resume", tmp_path / "run", "--iterations", "1").code == 0


LANGUAGE_BAD: list[tuple[list[str], str]] = [
    (["grpp", "arithmetic"], "unknown method 'grpp': did you mean grpo"),
    (["grpo", "--model", "/nowhere", "--dataset", "x.jsonl", "--reward", "exact_match"], "x.jsonl"),
    (["grpo", "prompts.jsonl"], "no model to train on prompts.jsonl"),
    (["grpo", "--model", "m", "--reward", "exact_match"], "no prompts to train on: give dataset"),
    (
        ["grpo", "a.jsonl", "--model", "m", "--reward", "exact_match", "--dataset-weight", "1"],
        "dataset_weight is of several data sets, and there is one",
    ),
    (["grpo", "arithmetic", "--preset", "none", "--dataset", "x.jsonl"], "leave dataset out"),
    (["grpo", "arithmetic", "--clip", "0.1"], "--clip"),
    (["dapo", "arithmetic", "--temperature", "-1"], "temperature is -1.0"),
    (
        ["grpo", "arithmetic", "--preset", "CartPole-v1"],
        "CartPole-v1: grpo has no option 'num_envs' on language",
    ),
    (["gspo", "arithmetic", "--preset", "CartPole-v1"], "preset CartPole-v1 has no settings for gspo"),
    (["trpo", "arithmetic", "--critic", "shared"], "critic is a critic's, and credit group has none"),
    (["grpo", "arithmetic", "--completions", "1"], "compares the completions of a prompt"),
    (
        ["grpo", "a.jsonl", "--model", "m", "--dataset", "b.jsonl", "--reward", "exact_match"],
        "are both data: give dataset for each",
    ),
]


@pytest.mark.parametrize(
    ("arguments", "expected"), LANGUAGE_BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else ""
)
def test_mistakes_with_language_models_are_one_line(policygrad: Any, arguments: list[str], expected: str) -> None:
    assert_one_line(policygrad("train", *arguments), expected)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        (("--completions", 2), "--completions is for language"),
        (("--samples", 2), "--samples is for language"),
        (("--max-steps", 0), "max_steps is 0: an episode needs at least one"),
        (("--greedy", "--sampled"), "exclude each other"),
        (("--gamma", 0.9), "eval does not read gamma"),
        (("--num-envs=3",), "eval does not read num_envs"),
        (("--reward", "exact_match"), "no option 'reward' on control"),
        (("--dataset", "x.jsonl"), "dataset is for language"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
    ids=str,
)
def test_eval_refuses_what_is_not_for_the_run(policygrad: Any, run: Path, flag: tuple[Any, ...], said: str) -> None:
    assert_one_line(policygrad("eval", run, "--trust", *flag), said)


def test_a_null_byte_is_one_line(policygrad: Any, run: Path) -> None:
    for arguments in (["eval", "a\0b"], ["train", "ppo", "CartPole-v1", "--out", "a\0b"], ["tra\0in"]):
        assert_one_line(policygrad(*arguments), "null byte")


def test_the_line_that_train_prints_evaluates_the_run_as_it_stands(policygrad: Any, tmp_path: Path) -> None:
    said = policygrad(*PPO, "--out", "a run of mine")
    printed = re.search(r"\(evaluate: policygrad (.*)\)", said.out)
    assert printed is not None
    assert shlex.split(printed[1]) == ["eval", "a run of mine", "--trust"]
    assert policygrad(*shlex.split(printed[1])).code == 0
    assert_one_line(policygrad("eval", "a run of mine"), "environment 'probes:Known-v0': repeat")
    assert policygrad("eval", "a run of mine", "--environment", "probes:Known-v0").code == 0


def test_eval_of_an_exact_run_takes_neither_a_count_nor_greedy(policygrad: Any) -> None:
    policygrad("train", "ppo", "exact:bandit", "--iterations", 1, "--out", "run")
    assert_one_line(policygrad("eval", "run", "--trust", "--greedy"), "evaluated exactly")
    assert_one_line(policygrad("eval", "run", "--seed", 3), "evaluated exactly, without random numbers")
    assert_one_line(policygrad("eval", "run", "--trust", "--episodes", 3), "--episodes is for control")
    assert_one_line(policygrad("eval", "run", "--trust", "--completions", 3), "--completions is for language")


def test_the_best_policy_is_said_where_it_is_not_the_last(policygrad: Any) -> None:
    options = ("--num-envs", 4, "--steps", 400, "--hidden", 8, "--preset", "none", "--evaluate-every", 1)
    said = policygrad("train", "reinforce", "probes:Known-v0", "--learning-rate", 1e-30, "--out", "run", *options)
    found = re.search(r"^best: evaluation [-\d.]+, iteration 0 of \d+ \(evaluate: policygrad eval run/best --trust\)$",
                      said.out, re.MULTILINE)  # fmt: skip
    assert found, "no evaluation is better than the first, since nothing is learned: " + said.out
    assert policygrad("eval", "run/best", "--trust", "--episodes", 2).code == 0


# Composed


def test_a_combination_shows_its_row_before_it_trains(policygrad: Any) -> None:
    """The ratio of whole completions, unclipped and averaged by row, is unbiased off policy too."""
    code, out, err = policygrad(*COMPOSE, "--iterations", "2")
    assert code == 0
    rows = [line for line in err.splitlines() if "policy " in line or "it runs" in line]
    assert [line.split()[-1] for line in rows] == ["unbiased"] * 3
    assert "grpo on exact:tokens" in out


@pytest.mark.parametrize(("update", "method"), [("ascend", "grpo"), ("natural", "npg"), ("trust_region", "trpo")])
def test_an_update_is_that_of_a_line_of_the_table(policygrad: Any, update: str, method: str) -> None:
    code, out, _ = policygrad("train", "compose", "exact:chain", f"--update={update}", "--iterations", "1", "--json",
                              "--credit", "gae")  # fmt: skip
    assert code == 0
    assert json.loads(out)["method"] == method


def test_the_help_of_compose_says_what_is_its_own(policygrad: Any) -> None:
    code, out, _ = policygrad("train", "COMPOSE", "--update", "natural", "--help")
    assert code == 0
    assert out.startswith("usage: policygrad train compose TASK [--update ascend|natural|trust_region] [--anyway]")
    assert "it starts from npg" in out
    assert "compose" not in policygrad("train", "npg", "--help").out.split("TASK")[0]


def test_a_combination_that_is_wrong_asks_for_anyway(policygrad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compose.RATIOS["product"]
    monkeypatch.setitem(compose.RATIOS, "product", lambda logp, old, mask: right(logp, old, mask) ** 2)
    code, out, err = policygrad(*COMPOSE, "--iterations", "1")
    assert (code, out) == (2, "")
    assert "WRONG" in err
    assert "does not expect what is written out for it" in err
    assert not Path("runs").exists()
    assert policygrad(*COMPOSE, "--iterations", "1", "--anyway").code == 0


def test_an_update_that_there_is_not_is_one_line(policygrad: Any) -> None:
    code, _, err = policygrad("train", "compose", "exact:chain", "--update")
    assert code == 2
    assert "--update is '': it must be one of ascend, natural, trust_region" in err
