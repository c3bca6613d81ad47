"""The examples run as they are written."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str) -> None:
    """Run an example as `python examples/NAME ARGUMENTS` would."""
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        with torch.random.fork_rng():
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv = before


def test_rlhf_from_preferences_to_the_reward_against_the_kl(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("rlhf.py", "--quick", "--out", str(tmp_path / "rlhf"))
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line.endswith(" nats")]
    assert [row[:-4] for row in table] == [["start"], ["beta", "1"], ["beta", "0"]]
    assert all(float(row[-2]) >= 0 for row in table)
    assert (tmp_path / "rlhf" / "rlhf.png").stat().st_size > 10_000
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "rlhf" / "reward-model")
    for beta in ("1", "0"):
        assert (tmp_path / "rlhf" / f"ppo-beta-{beta}" / "model" / "model.safetensors").is_file()


def test_rlhf_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SystemExit, match="is not empty, and nothing is overwritten: choose another directory"):
        run("rlhf.py", "--quick", "--out", str(tmp_path))


def test_one_game_is_played_on_numbers_and_in_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("text_game.py", "--iterations", "1", "--seeds", "1", "--out", str(tmp_path / "game.png"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines[:2]] == ["perceptron", "language model"]
    assert (tmp_path / "game.png").stat().st_size > 10_000


def test_slurm_starts_torchrun_with_a_command_and_resumes_a_job_that_was_requeued(tmp_path: Path) -> None:
    """With srun and scontrol in its place that only say what they are asked."""
    for name, line in {"scontrol": "echo host-a; echo host-b", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    out = tmp_path / "run"
    given = {"SLURM_JOB_ID": "123", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "host-[a-b]", "OUT": str(out)}
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **given}

    def said() -> str:
        command = ["bash", str(EXAMPLES / "slurm.sh")]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert said().startswith("torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-id 123")
    assert "--rdzv-endpoint host-a:20123 -m policygrad train grpo arithmetic --device cuda" in said()
    assert said().rstrip().endswith(f"--out {out}")
    out.mkdir()
    (out / "config.json").touch()
    assert said().rstrip().endswith(f"-m policygrad resume {out} --trust")
