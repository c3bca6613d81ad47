"""The command line of language models: what is printed, what is written, and exit codes."""

import json
from pathlib import Path

import pytest

from policygrad import cli
from policygrad.runs.language import warmup

SMALL = [
    "--iterations",
    "1",
    "--prompts-per-rollout",
    "4",
    "--completions",
    "4",
    "--max-tokens",
    "6",
    "--held-out",
    "4",
]


@pytest.fixture
def files(model: Path, prompts: Path, rewards: Path) -> list[str]:
    return ["--model", str(model), "--dataset", str(prompts), "--reward", f"{rewards}:sevens"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0)


def test_training_shows_samples_before_and_after_and_says_where_the_run_is(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "grpo", *files, *SMALL) == 0
    said = capsys.readouterr().out
    before, after = said.index("before: reward"), said.index("after : reward")
    assert said.count("completion", before, after) >= 1
    assert "tokens/s sampling" in said
    assert "run: runs/sums/grpo-seed0 (model/, samples.jsonl" in said
    assert Path("runs/sums/grpo-seed0/model/model.safetensors").is_file()


def test_a_second_run_goes_beside_the_first(files: list[str]) -> None:
    assert run("train", "grpo", *files, *SMALL) == run("train", "grpo", *files, *SMALL) == 0
    assert Path("runs/sums/grpo-seed0-2").is_dir()


def test_json_is_all_that_is_printed(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "rloo", *files, *SMALL, "--json", "--out", "run") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["algorithm"] == "rloo"
    assert summary["iterations"] == 1
    assert summary["completions"] == 16
    assert set(summary["after"]) >= {"reward", "pass_at_k", "length", "cut_fraction"}
    assert run("eval", "run", "--json", "--completions", "2") == 0
    assert json.loads(capsys.readouterr().out)["completions"] == 2


def test_a_run_is_evaluated(files: list[str], rewards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files[-1] = f"{rewards}:right"
    assert run("train", "grpo", *files, *SMALL, "--out", "run") == 0
    capsys.readouterr()
    assert run("eval", "run", "--completions", "4", "--samples", "2") == 0
    said = capsys.readouterr().out
    assert said.startswith("accuracy 0.")
    assert "pass@4" in said
    assert run("eval", "run", "--greedy", "--completions", "1") == 0
    assert "pass@" not in capsys.readouterr().out


def test_ppo_is_of_language_where_a_model_is_named(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "ppo", *files, *SMALL, "--minibatch-size", "8", "--json", "--out", "run") == 0
    assert json.loads(capsys.readouterr().out)["task"] == "sums"


def test_rewards_are_repeatable_with_a_weight_each(files: list[str], rewards: Path) -> None:
    more = ["--reward", f"{rewards}:short", "--reward-weight", "1", "--reward-weight", "0.5"]
    assert run("train", "grpo", *files, *more, *SMALL, "--out", "run") == 0
    options = json.loads(Path("run/config.json").read_text())["options"]
    assert options["reward"] == [f"{rewards}:sevens", f"{rewards}:short"]
    assert options["reward_weight"] == [1.0, 0.5]


def test_arithmetic_needs_nothing_else_and_is_warmed_up_once(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(warmup.RECIPE, "steps", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere / "cache"))
    arguments = ["--iterations", "1", "--prompts-per-rollout", "2", "--held-out", "2", "--evaluate-every", "0"]
    assert run("train", "grpo", "arithmetic", *arguments) == 0
    first = capsys.readouterr().out
    assert "learns from imperfect demonstrations first" in first
    assert "preset arithmetic: iterations=1" in first
    (cached,) = (elsewhere / "cache" / "policygrad").iterdir()
    written = (cached / "model.safetensors").stat().st_mtime_ns
    assert run("train", "ppo", "arithmetic", *arguments, "--minibatch-size", "2") == 0
    assert "demonstrations first" not in capsys.readouterr().out
    assert (cached / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "grpp", "arithmetic"], "unknown algorithm 'grpp': did you mean grpo"),
        (["train", "grpo", "--model", "/nowhere", "--dataset", "x.jsonl", "--reward", "exact_match"], "x.jsonl"),
        (["train", "grpo", "prompts.jsonl"], "no model to train on prompts.jsonl"),
        (["train", "grpo", "arithmetic", "--dataset", "x.jsonl"], "leave --dataset out"),
        (["train", "grpo", "arithmetic", "--clip", "0.1"], "--clip"),
        (["train", "dapo", "arithmetic", "--temperature", "-1"], "temperature is -1.0"),
        (["train", "grpo", "arithmetic", "--preset", "CartPole-v1"], "preset CartPole-v1 has no settings for grpo"),
        (["eval", "nowhere"], "nowhere"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("policygrad: ")
    assert said in error
    assert error.count("\n") == 1


def test_help_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom policygrad import cli\ntry:\n    cli.main(['train', 'grpo', '--help'])\nexcept SystemExit:\n"
        "    pass\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--lora-rank" in done.stdout
