"""The command line: one line and exit code 2 for what the user can mend, one JSON object where it is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from probes import BROKEN

from policygrad import cli
from policygrad.runs import presets
from policygrad.runs.options import ALGORITHMS

HERE = Path(__file__).parent
SMALL = ("--num-envs", "4", "--num-steps", "16", "--hidden", "8")
PPO = ("train", "ppo", "probes:Known-v0", *SMALL, "--minibatch-size", "16", "--steps", "100")


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
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


# Training


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "a2c", "off-policy-actor-critic"])
def test_train_prints_one_json_object_and_nothing_else(policygrad: Any, algorithm: str) -> None:
    said = policygrad("train", algorithm, "probes:Known-v0", "--num-envs", 4, "--steps", 60, "--hidden", 8, "--json")
    assert said.code == 0
    assert said.err == ""
    assert said.out.count("\n") == 1
    result = strict(said.out)
    keys = {"run", "algorithm", "environment", "steps", "seconds", "steps_per_second", "return_mean", "return_std"}
    assert set(result) == keys | {"episodes"}
    assert result["algorithm"] == {"a2c": "actor_critic"}.get(algorithm, algorithm.replace("-", "_"))
    assert result["environment"] == "probes:Known-v0"
    assert result["steps"] >= 60
    assert Path(result["run"], "policy.safetensors").exists()


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


def test_every_flag_reaches_the_algorithm(policygrad: Any, tmp_path: Path) -> None:
    policygrad(*PPO, "--gamma", 0.9, "--clip", "inf", "--squash", "--activation", "relu", "--out", tmp_path / "run")
    options = strict((tmp_path / "run" / "config.json").read_text())["options"]
    assert (options["gamma"], options["clip"], options["squash"], options["activation"]) == (0.9, "inf", True, "relu")
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
    assert config["options"]["lam"] == ALGORITHMS["ppo"]().lam  # type: ignore[attr-defined]


def test_the_command_and_python_train_the_same(policygrad: Any, tmp_path: Path) -> None:
    from policygrad import load_policy, train

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
    said = policygrad("eval", run, "--episodes", 5, "--json")
    assert (said.code, said.err, said.out.count("\n")) == (0, "", 1)
    result = strict(said.out)
    assert set(result) == {"return_mean", "return_std", "length_mean", "episodes", "returns"}
    assert result["episodes"] == len(result["returns"]) == 5
    assert result["return_mean"] == pytest.approx(sum(result["returns"]) / 5)
    assert 1 <= result["length_mean"] <= 8


def test_eval_repeats_itself_and_its_seed_and_noise_change_it(policygrad: Any, run: Path) -> None:
    few = ("eval", run, "--episodes", 4, "--json")
    plain = policygrad(*few).out
    assert policygrad(*few).out == plain
    others = [policygrad(*few, *more).out for more in (("--seed", 7), ("--stochastic",), ("--stochastic", "--seed", 7))]
    assert len({plain, *others}) == 4
    assert policygrad(*few, "--stochastic").out == others[1]


def test_eval_says_it_in_words(policygrad: Any, run: Path) -> None:
    said = policygrad("eval", run, "--episodes", 3)
    assert said.code == 0
    assert "3 episodes" in said.out


# Help and lists


def test_help_is_everywhere_and_imports_no_torch() -> None:
    """What makes it slow is torch, matplotlib and the environments; so: none of them."""
    commands = [[], ["--help"], ["train", "--help"], ["eval", "--help"], ["list", "--help"], ["list"], ["--version"]]
    commands += [["train", name, "--help"] for name in (*ALGORITHMS, "a2c")]
    commands += [["train", "ppo", "CartPole-v1", "--help"]]
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
heavy = {{"torch", "gymnasium", "matplotlib", "tensorboard", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = process("-c", script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_help_has_every_option_with_its_meaning_and_default(policygrad: Any, algorithm: str) -> None:
    text = policygrad("train", algorithm, "--help").out
    for name in vars(ALGORITHMS[algorithm]()):
        assert f"--{name.replace('_', '-')}" in text
    for name in ("out", "preset", "json"):
        assert f"--{name}" in text


def test_help_shows_the_presets_defaults_where_the_environment_is_named(policygrad: Any) -> None:
    plain, tuned = (policygrad("train", "ppo", *more, "--help").out for more in ((), ("CartPole-v1",)))
    assert plain != tuned


def test_list_names_the_algorithms_the_variants_and_the_presets(policygrad: Any) -> None:
    text = policygrad("list").out
    lines = [line.strip() for line in text.splitlines()]
    for name in (*ALGORITHMS, *presets.names()):
        assert any(line.startswith(name) and len(line) > len(name) + 2 for line in lines), name
    assert "a2c" in text
    assert "variants" in text


def test_list_environments_names_gymnasiums(policygrad: Any) -> None:
    assert "CartPole-v1" in policygrad("list", "environments").out.split()


# Bad input

BAD: list[tuple[str, tuple[Any, ...], str]] = [
    ("unknown command", ("trian",), "train"),
    ("unknown algorithm", ("train", "pppo", "CartPole-v1"), "did you mean ppo"),
    ("unknown environment", ("train", "ppo", "CartPol-v1"), "did you mean CartPole-v1"),
    ("unknown version", ("train", "ppo", "CartPole-v7"), "CartPole-v1"),
    ("unknown module", ("train", "ppo", "no_such:Env-v0"), "no_such"),
    ("unknown preset", ("train", "ppo", "CartPole-v1", "--preset", "CartPole-v2"), "did you mean CartPole-v1"),
    ("unknown option", ("train", "ppo", "CartPole-v1", "--learning-rat", "1"), "did you mean --learning-rate"),
    ("an option of another algorithm", ("train", "trpo", "CartPole-v1", "--clip", "0.2"), "--clip"),
    ("no algorithm's environment", ("train", "ppo"), "ENVIRONMENT is missing"),
    ("no run", ("eval",), "RUN is missing"),
    ("not a number", ("train", "ppo", "CartPole-v1", "--steps", "many"), "many"),
    ("not one of them", ("train", "ppo", "CartPole-v1", "--activation", "sine"), "sine"),
    ("gamma of 1.2", ("train", "ppo", "CartPole-v1", "--gamma", "1.2"), "gamma is 1.2"),
    ("gamma of nan", ("train", "ppo", "CartPole-v1", "--gamma", "nan"), "gamma is nan"),
    ("minibatch larger than the batch", (*PPO, "--minibatch-size", "65"), "minibatch_size is 65"),
    ("zero environments", ("train", "ppo", "CartPole-v1", "--num-envs", "0"), "num_envs is 0"),
    ("zero steps", ("train", "ppo", "CartPole-v1", "--steps", "0"), "steps is 0"),
    ("a seed below 0", ("train", "ppo", "CartPole-v1", "--seed", "-1"), "seed"),
    ("a seed too large", ("train", "ppo", "CartPole-v1", "--seed", "1" + "0" * 30), "seed"),
    ("a device that is not there", ("train", "ppo", "CartPole-v1", "--device", "abacus"), "abacus"),
    ("squash without a Box", ("train", "ppo", "CartPole-v1", "--squash"), "squash is for Box"),
    ("normalised state numbers", ("train", "ppo", "CliffWalking-v1", "--normalize-observations"), "Discrete"),
    ("a missing package", ("train", "ppo", "probes:Missing-v0"), "not installed"),
    ("no time limit", ("train", "reinforce", "probes:Endless-v0"), "num_steps"),
    ("not a run", ("eval", "."), "run"),
    ("not there", ("eval", "nowhere"), "nowhere"),
    ("nothing to list", ("list", "algorithm"), "algorithms"),
    ("a file in the way", (*PPO, "--out", __file__), "cannot be written"),
    ("below a file", (*PPO, "--out", __file__ + "/run"), "cannot be written"),
]


def assert_one_line(said: Said, expected: str) -> None:
    assert said.code == 2, said
    assert said.err.startswith("policygrad: ")
    assert said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.err
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


@pytest.mark.parametrize("space", ["Dict", "Tuple", "Text"])
def test_an_unsupported_action_space_is_named(policygrad: Any, space: str) -> None:
    assert_one_line(policygrad("train", "ppo", f"probes:{space}Actions-v0"), f"a {space} space is not supported")


@pytest.mark.parametrize("flag", [("--episodes", 0), ("--episodes", -3), ("--seed", -1), ("--seed", 10**30)], ids=str)
def test_eval_refuses_what_cannot_be_meant(policygrad: Any, run: Path, flag: tuple[str, int]) -> None:
    assert_one_line(policygrad("eval", run, *flag), f"{flag[0].removeprefix('--')} is {flag[1]}")


def test_training_that_explodes_is_one_line_and_exit_code_2(policygrad: Any, tmp_path: Path) -> None:
    said = policygrad(*PPO, "--steps", 5000, "--learning-rate", 1e30, "--out", tmp_path / "run")
    assert_one_line(said, "training stopped")
    assert policygrad("eval", tmp_path / "run", "--episodes", 2).code == 0


def test_debug_shows_the_traceback(policygrad: Any) -> None:
    said = policygrad("train", "ppo", "CartPole-v1", "--gamma", "1.2", "--debug")
    assert said.code == 2
    assert "Traceback" in said.err
    assert said.err.splitlines()[-1].startswith("policygrad: gamma is 1.2")


def test_an_interrupt_says_that_what_was_learned_is_kept(policygrad: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(rest: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", interrupt)
    said = policygrad("train")
    assert (said.code, said.err.count("\n")) == (130, 1)


def test_a_reader_that_stops_early_is_no_error() -> None:
    script = "from policygrad.cli import main; main(['list'])"
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", script], stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_as_a_process_it_behaves_the_same(tmp_path: Path) -> None:
    """Also: a module beside the user is found, though the command is not run by `python -m`."""
    (tmp_path / "mine.py").write_text("import gymnasium, probes\ngymnasium.register('Mine-v0', probes.Known)\n")
    script = "from policygrad.cli import main; import sys; sys.path.remove(''); main()"
    bad = process("-c", script, "train", "ppo", "mine:Min-v0", cwd=tmp_path)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1), bad.stderr
    assert "Mine-v0" in bad.stderr
