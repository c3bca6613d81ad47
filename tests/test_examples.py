"""The examples run as they are written."""

import json
import os
import runpy
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
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


@pytest.fixture(scope="module")
def kuhn() -> Any:
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / "kuhn.py")))


def equilibrium(kuhn: Any) -> dict[tuple[int, str], float]:
    """Kuhn's solution with alpha = 1/3, for both seats."""
    bets = {"": (1 / 3, 0, 1), "pb": (0, 2 / 3, 1), "p": (1 / 3, 0, 1), "b": (0, 1 / 3, 1)}
    return {(card, asked): float(x) for asked, of in bets.items() for card, x in enumerate(of)}


def test_kuhn_poker_has_the_values_that_are_known(kuhn: Any) -> None:
    """Perfect play: -1/18 in the first seat. Who has forgotten its card: at best -1/3, whatever it does."""
    best = equilibrium(kuhn)
    assert kuhn.value(best, best) == pytest.approx(-1 / 18, abs=1e-12)
    assert kuhn.worst(best) == pytest.approx(0, abs=1e-12)
    assert kuhn.worst(best | {(0, ""): 0.5}) < -0.01
    simple = {(card, asked): float(card > 0) for card, asked in best}  # who bets and calls with all but the lowest card
    for bets in product((0.0, 1.0), repeat=4):  # between them every number is linear
        blind = {(card, asked): bets[["", "pb", "p", "b"].index(asked)] for card, asked in best}
        assert kuhn.value(blind, simple) <= -1 / 3 + 1e-12
        assert kuhn.value(simple, blind) >= 1 / 3 - 1e-12
        assert kuhn.worst(blind) <= kuhn.against(blind, simple)
    assert kuhn.worst({(card, asked): float(asked in ("pb", "b")) for card, asked in best}) < -1 / 3 + 1e-12


def test_kuhn_poker_is_played_as_its_values_are_computed(kuhn: Any) -> None:
    """All games: what each player sees and gets is what `value` and `plan` take for granted."""
    game, dealt, endings = kuhn.Kuhn(), set(), set()
    for seed, actions in product(range(30), product((0, 1), repeat=3)):
        game.reset(seed)
        cards, bets, said, rewards = dict(game.cards), "", list(actions), {}
        for agent in ("first", "second"):  # each looks
            assert game.agent_selection == agent
            obs, reward, over, cut, _ = game.last()
            assert (reward, over, cut) == (0, False, False)
            assert list(obs["observation"]) == [*(cards[agent] == x for x in range(3)), 0, 0, 0, 0]
            assert list(obs["action_mask"]) == [1, 0]
            game.step(0)
        while bets not in kuhn.OVER:
            agent = game.agent_selection
            assert bets in kuhn.ASKED[agent]
            obs = game.last()[0]
            np.testing.assert_equal(obs, kuhn.seen(None, bets))
            assert list(obs["observation"][:3]) == [0, 0, 0]
            bets += "pb"[said[0]]
            game.step(said.pop(0))
        while game.agents:
            agent = game.agent_selection
            _, rewards[agent], over, _, _ = game.last()
            assert over
            game.step(None)
        assert rewards["first"] == kuhn.chips(bets, cards["first"], cards["second"]) == -rewards["second"]
        dealt.add((cards["first"], cards["second"]))
        endings.add(bets)
    assert dealt == set(permutations(range(3), 2))
    assert endings == set(kuhn.OVER)


def test_kuhn_poker_is_learned_with_memory_alone(kuhn: Any) -> None:
    """In its worst case the policy with memory is better than any without one, and it wins against the other."""
    gru, none = kuhn.learned("gru", 5_000), kuhn.learned("none", 1_500)
    assert kuhn.worst(gru) > -0.25
    assert kuhn.worst(none) < -1 / 3 + 1e-6
    assert kuhn.against(gru, none) > 0.1


def test_the_plan_of_a_policy_is_what_it_does_step_by_step(kuhn: Any) -> None:
    """With a memory that is moved far from its beginning."""
    from policygrad.control import Policy
    from policygrad.control.memory import Rows

    with torch.random.fork_rng():
        torch.manual_seed(0)
        flat = spaces.flatten_space(kuhn.SPACE)
        policy = Policy(flat, spaces.Discrete(2), memory="gru", memory_size=4, hidden=(8,), orthogonal=False)
    found = kuhn.plan(policy)
    for card, asked in product(range(3), [("", "pb"), ("p",), ("b",)]):
        state = policy.initial(1).unsqueeze(1)
        for k, game in enumerate([kuhn.seen(card, ""), *(kuhn.seen(None, bets) for bets in asked)]):
            obs = torch.from_numpy(spaces.flatten(kuhn.SPACE, game)).float()[None, None]
            distribution, after = policy.unrolled(Rows(obs, torch.zeros(1, 1).bool(), state, state[..., :0]))
            state = after.unsqueeze(1)
            if k:
                assert found[card, asked[k - 1]] == pytest.approx(float(distribution.probs[0, 0, 1].detach()), abs=1e-6)
    assert len({round(x, 6) for x in found.values()}) == 12  # each of its own, so that a mixed-up one is seen


def test_kuhn_poker_prints_and_writes_what_it_finds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("kuhn.py", "--steps", "512", "--seeds", "1", "--out", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert capsys.readouterr().out.startswith(
        f"seed 0, chips a game: with memory at worst {found['worst']['gru'][0]:.3f}"
    )
    assert found["steps"] == 512


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
