"""policygrad push, by huggingface_hub itself, to a server that speaks the hub's protocol."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import TOKEN, Hub
from outcomes import parameters

import policygrad as pg
from policygrad.errors import UserError
from policygrad.train.publishing import command
from policygrad.train.statistics import estimate, mean

SMALL: dict[str, Any] = {
    "num_envs": 2, "num_steps": 8, "hidden": (4, 4), "minibatch_size": 8, "epochs": 1, "iterations": 3,
    "compile": "off", "preset": "none", "progress": False,
}  # fmt: skip


def pole(out: Path, **options: Any) -> Any:
    return pg.train("ppo", "CartPole-v1", out=out, **SMALL | options)


def card_of(server: Hub, name: str) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard(server.files(name)["README.md"].decode())


def test_what_is_pushed_is_read_back(server: Hub, tmp_path: Path) -> None:
    run = pole(tmp_path / "run")
    (tmp_path / "run" / "video.gif").write_bytes(b"GIF89a")
    (tmp_path / "run" / "secret.pkl").write_bytes(b"\x80\x04.")
    assert pg.push(run, "pole", count=4) == f"{server.url}/me/pole"
    files = server.files("me/pole")
    pushed = {
        "config.json", "policy.json", "policy.safetensors", "summary.json", "metrics.jsonl", "curve.png", "video.gif",
    }  # fmt: skip
    assert set(files) == pushed | {"README.md", ".gitattributes"}
    assert all(files[name] == (tmp_path / "run" / name).read_bytes() for name in pushed)
    again = pg.load("hub:me/pole")
    assert torch.equal(parameters(again), parameters(run))
    assert again.evaluate(4).returns == run.evaluate(4).returns


def test_the_card_has_the_evaluation_and_its_interval(server: Hub, tmp_path: Path) -> None:
    run = pole(tmp_path / "run", learning_rate=0.01)
    (tmp_path / "run" / "video.mp4").write_bytes(b"film")
    pg.push(tmp_path / "run", "me/pole", count=6)
    card, result = card_of(server, "me/pole"), run.evaluate(6)
    (found,) = card.data.eval_results
    wanted = estimate(mean, [np.array(result.returns)])
    assert found.metric_value == result.return_mean == wanted.value
    assert found.metric_args == {"episodes": 6, "interval": [wanted.low, wanted.high], "confidence": 0.95}
    assert (found.task_type, found.dataset_name, found.metric_type) == (
        "reinforcement-learning", "CartPole-v1", "mean_return",
    )  # fmt: skip
    assert card.data.library_name == "policygrad"
    assert card.data.tags == ["policygrad", "reinforcement-learning", "ppo", "CartPole-v1"]
    assert result.line() in card.text
    assert f'<video controls loop src="{server.url}/me/pole/resolve/main/video.mp4">' in card.text
    assert torch.__version__ in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    assert code.splitlines() == ["import policygrad as pg", 'run = pg.load("hub:me/pole")']
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert torch.equal(parameters(scope["run"]), parameters(run))


@pytest.mark.parametrize(
    ("method", "task", "options"),
    [
        ("ppo", "CartPole-v1", {"hidden": (4, 8), "clip_low": float("inf"), "steps": None, "iterations": 2}),
        ("ppo", "CartPole-v1", {"preset": "CartPole-v1", "learning_rate": 0.5, "orthogonal": False, "steps": 64}),
        ("a2c", "exact:chain", {"learning_rate_schedule": "linear", "seed": 3}),
        ("grpo", "FrozenLake-v1", {"env_options": '{"is_slippery": false}', "episode_steps": 9}),
    ],
)
def test_the_command_trains_a_run_like_it(
    method: str, task: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command line makes the same options of it."""
    from policygrad import cli

    values = {"iterations": 1, "progress": False, "compile": "off", **options}
    run = pg.train(method, task, **values)
    words = shlex.split(command(run))
    assert words[:2] == ["policygrad", "train"]
    made: list[Any] = []

    def seen(found: Any, out: Path) -> Any:
        made.append((found.name, found.task, found.preset, found.values))
        raise UserError("seen")

    monkeypatch.setattr(cli, "_run", seen)
    with pytest.raises(SystemExit):
        cli.main(words[1:])
    ((name, found_task, preset, found),) = made
    assert (name, found_task, preset) == (run.method, task, run.preset)
    assert {x: getattr(run.options, x) for x in found} == found


def test_a_second_push_leaves_this_run_alone_and_what_is_not_a_runs(server: Hub, tmp_path: Path) -> None:
    """One commit for each, and the first is still there by its name."""
    first, second = pole(tmp_path / "first"), pole(tmp_path / "second", seed=1)
    (tmp_path / "first" / "video.gif").write_bytes(b"GIF89a")
    pg.push(first, "me/pole", count=1)
    before = server.repositories["me/pole"].head
    server.put("me/pole", server.files("me/pole") | {"notes.md": b"mine"})
    pg.push(second, "me/pole", count=1)
    assert "video.gif" not in server.files("me/pole")
    assert server.files("me/pole")["notes.md"] == b"mine"
    assert torch.equal(parameters(pg.load("hub:me/pole")), parameters(second))
    assert torch.equal(parameters(pg.load(f"hub:me/pole@{before}")), parameters(first))


def test_the_best_policy_is_a_run_too(server: Hub, tmp_path: Path) -> None:
    pole(tmp_path / "run", evaluate_every=1, evaluation_episodes=2)
    for _ in range(2):  # the second time over the first
        pg.push(tmp_path / "run" / "best", "me/best", count=1)
    best = pg.load(tmp_path / "run" / "best")
    assert torch.equal(parameters(pg.load("hub:me/best")), parameters(best))


def test_a_language_model_is_read_back_and_by_transformers(
    server: Hub, tmp_path: Path, language: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = pg.train("grpo", out=tmp_path / "run", **language)
    pg.push(run, "me/words", count=2)
    files = server.files("me/words")
    assert not [x for x in files if x.startswith("checkpoints") or x.endswith((".bin", ".pt", ".py", ".pkl"))]
    (found,) = card_of(server, "me/words").data.eval_results
    assert found.metric_type == "mean_reward"
    assert found.metric_args["prompts"] == 8
    assert found.metric_args["interval"][0] <= found.metric_value <= found.metric_args["interval"][1]
    again = pg.load("hub:me/words", trust=True)
    assert torch.equal(parameters(again), parameters(run))
    with pytest.raises(UserError, match="the run names what is not its own, reward"):
        pg.load("hub:me/words")
    model = AutoModelForCausalLM.from_pretrained(again.directory / "model")
    assert torch.equal(
        torch.cat([p.flatten() for p in model.parameters()]),
        parameters(run)[: sum(p.numel() for p in model.parameters())],
    )
    assert AutoTokenizer.from_pretrained(again.directory / "model").vocab_size
    begun = language | {"model": None, "start": "hub:me/words", "iterations": 1, "learning_rate": 1e-12}
    started = pg.train("grpo", **begun)
    torch.testing.assert_close(parameters(started), parameters(run), atol=1e-6, rtol=0)


def test_it_is_private_if_it_shall_be(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = pole(tmp_path / "run")
    pg.push(run, "me/mine", private=True, count=1)
    assert server.repositories["me/mine"].private
    assert pg.load("hub:me/mine").method == "ppo"
    pg.push(run, "me/open", count=1)
    before = server.repositories["me/open"].head
    with pytest.raises(UserError, match="me/open is public already"):
        pg.push(run, "me/open", private=True, count=1)
    assert server.repositories["me/open"].head == before
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"hub:me/mine is not on the hub, or private: .*hf auth login"):
        pg.load("hub:me/mine")
    with pytest.raises(UserError, match="push needs a token that may write: hf auth login"):
        pg.push(run, "me/new", count=1)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UserError, match="hf auth login") as said:
        pg.push(run, "me/new", count=1)
    assert len(str(said.value)) <= 200


def test_nothing_of_another_kind_is_overwritten(server: Hub, tmp_path: Path) -> None:
    run = pole(tmp_path / "run")
    for files in ({"config.json": b"{}", "model.safetensors": b""}, {"data.csv": b"1"}):
        server.put("me/other", files)
        with pytest.raises(UserError, match="me/other holds something else than a run: choose another name"):
            pg.push(run, "me/other", count=1)
        assert server.files("me/other") == files


def test_what_cannot_be_pushed_is_one_line(server: Hub, tmp_path: Path) -> None:
    run = pole(tmp_path / "run")
    with pytest.raises(UserError, match="is no name on the hub: write USER/NAME"):
        pg.push(run, "me/my/run")
    with pytest.raises(UserError, match="pushed from its directory, and this one has none"):
        pg.push(pg.train("ppo", "CartPole-v1", **SMALL), "me/run")
    for code, said in ((403, "your token has no right to it"), (418, "the hub answers 418")):
        server.fault = code
        with pytest.raises(UserError, match=f"me/run cannot be written: {said}") as raised:
            pg.push(run, "me/run", count=1)
        assert TOKEN not in str(raised.value)
    server.fault, server.missing = None, "store"
    with pytest.raises(UserError, match="me/full cannot be written: the hub answers 413; try again"):
        pg.push(run, "me/full", count=1)
    (tmp_path / "run" / "video.gif").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="it is no regular file"):
        pg.push(run, "me/run", count=1)
    assert "me/run" not in server.repositories


def test_without_its_environment_it_is_pushed_unevaluated(server: Hub, tmp_path: Path) -> None:
    run = pg.train("ppo", lambda: __import__("gymnasium").make("CartPole-v1"), out=tmp_path / "run", **SMALL)
    assert run.world.stored() is None
    with pytest.warns(UserWarning, match="the card has no evaluation: "):
        pg.push(tmp_path / "run", "me/own")
    assert card_of(server, "me/own").data.eval_results is None
    assert torch.equal(parameters(pg.load("hub:me/own")), parameters(run))


def test_the_command_line(server: Hub, tmp_path: Path) -> None:
    """By HF_ENDPOINT, in a process of its own. The token is not printed."""
    run = pole(tmp_path / "run")
    known = {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "other"),
        "HF_HUB_DISABLE_XET": "1",
    }

    def policygrad(*words: str) -> str:
        line = [sys.executable, "-m", "policygrad", *words]
        done = subprocess.run(line, env=os.environ | known, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done.stdout

    said = policygrad("push", "run", "pole", "--episodes", "2", "--private")
    assert said == f"pushed: {server.url}/me/pole (evaluate: policygrad eval hub:me/pole)\n"
    assert server.repositories["me/pole"].private
    remote = json.loads(policygrad("eval", "hub:me/pole", "--episodes", "3", "--json"))
    assert remote["returns"] == run.evaluate(3).returns
