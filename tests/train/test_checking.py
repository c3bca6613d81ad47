"""`policygrad check` passes every method, and sees what depends on the split."""

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from policygrad import cli
from policygrad.algorithms.ppo import PPOObjective
from policygrad.errors import UserError
from policygrad.rollout import Batch
from policygrad.train import compose
from policygrad.train.checking import Checked, check
from policygrad.train.methods import METHODS
from policygrad.train.options import EPISODIC, options_of
from policygrad.updates import Metrics

SMALL: dict[str, Any] = {"preset": "none", "num_envs": 4, "num_steps": 9, "hidden": (8,), "threads": 1}


def small(method: str, **values: Any) -> dict[str, Any]:
    kind = options_of(method, "control")
    credit = values.get("credit", kind().credit)
    given = {name: x for name, x in SMALL.items() if name == "preset" or hasattr(kind(), name)}
    given |= {"minibatch_size": 16} if getattr(kind(), "minibatch_size", None) else {}
    if credit in EPISODIC:
        del given["num_steps"]
        given["episode_steps"] = 30
    return given | values


def wrong(found: Checked) -> list[str]:
    """The splits that differ, in short."""
    return [x.name.split(" of")[0] for x in found.splits if x.difference > found.tolerance]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_in_control(method: str) -> None:
    # Where two episodes are as long as the limit, none is owed anything, and the gradient is 0.
    seed = {"seed": 4} if method == "pass_at_k" else {}
    found = check(method, "CartPole-v1", **small(method, **seed))
    assert found.passed, found.lines()
    assert {x.name for x in found.splits} >= {"padding", "2 ranks", "micro-batches of 1 row and the rest"}
    assert max(x.difference for x in found.splits) < 1e-10


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("ppo", {"memory": "gru", "memory_size": 4}),
        ("grpo", {"group_size": 2, "weights": "budget"}),
        ("reinforce", {"baseline": "time_mean"}),
        ("actor_critic", {"kl_ref": "reward", "credit": "group"}),
    ],
)
def test_with_options(method: str, values: dict[str, Any]) -> None:
    assert check(method, "CartPole-v1", count=3, **small(method, **values)).passed


def test_answers_of_an_exact_world() -> None:
    assert check("grpo", "exact:tokens", num_envs=8, kl_ref="loss").passed


def test_a_language_model(language: dict[str, Any]) -> None:
    given = {name: x for name, x in language.items() if name not in ("iterations", "progress")}
    found = check("grpo", **given, shared_prompts="on")
    assert found.passed, found.lines()
    assert {"packing", "prompts apart", "padding", "2 ranks"} <= {x.name for x in found.splits}
    assert found.tolerance == 1e-3


# Planted


class MeanOfItsOwn(PPOObjective):
    """The field's most frequent bug: the mean over the part, in place of a sum with the batch's weights."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        logp = self.policy(batch.obs).log_prob(batch.action)
        return (logp * batch.advantage)[batch.mask].mean(), {}


class MeanOverSteps(PPOObjective):
    """Padding counts as steps."""

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        logp = self.policy(batch.obs).log_prob(batch.action)
        total = batch.weight.sum() * batch.mask.shape[0]  # of all parts
        return (logp * batch.advantage).where(batch.mask, 0.0).sum() / total.clamp(min=1e-9), {}


def planted(monkeypatch: pytest.MonkeyPatch, kind: type[PPOObjective]) -> None:
    monkeypatch.setattr(compose, "objective_of", lambda options, policy, critic, *_: kind(policy, critic))


def test_a_mean_within_the_part_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, MeanOfItsOwn)
    found = check("grpo", "CartPole-v1", **small("grpo", num_envs=5))
    assert set(wrong(found)) == {"micro-batches", "2 ranks"}
    assert any("DIFFERS" in line and "policy.network" in line for line in found.lines())
    assert found.lines()[-1] == "the gradient DEPENDS ON THE SPLIT (tolerance 1e-06)"


def test_padding_that_counts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, MeanOverSteps)
    assert "padding" in wrong(check("grpo", "CartPole-v1", **small("grpo", num_envs=5)))


def test_weights_of_one_rank_alone_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compose.WEIGHTS, "token", lambda mask: mask / mask.sum())
    assert wrong(check("ppo", "CartPole-v1", **small("ppo"))) == ["2 ranks"]


# The command


def test_the_command_says_it_and_exits_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["check", "grpo", "CartPole-v1", "--num-envs", "5", "--episode-steps", "30", "--preset", "none"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--ranks", "3"])
    assert not stop.value.code
    assert "3 ranks" in capsys.readouterr().out
    planted(monkeypatch, MeanOfItsOwn)
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--json", "--tolerance", "1e-3"])
    assert stop.value.code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["tolerance"] == 1e-3
    assert not found["passed"]
    assert set(found["parameters"]["2 ranks"]) == {
        f"policy.network.{i}.{x}" for i in (0, 2, 4) for x in ("weight", "bias")
    }
    assert sys.stdout is not None


@pytest.mark.parametrize("values", [{"tolerance": -1.0}, {"tolerance": float("nan")}, {"count": 1}, {"count": 50}])
def test_what_makes_no_sense_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"tolerance is|ranks is 1|too few for 50 ranks"):
        check("ppo", "CartPole-v1", **small("ppo"), **values)


def test_a_gradient_of_0_says_nothing() -> None:
    with pytest.raises(UserError, match="the gradient of this rollout is 0, since all its advantages are"):
        check("grpo", "CartPole-v1", **small("grpo", episode_steps=2))  # all episodes return 2


def test_nothing_is_left_behind() -> None:
    before = torch.get_default_dtype()
    check("ppo", "CartPole-v1", **small("ppo"))
    assert torch.get_default_dtype() == before


@pytest.mark.parametrize("method", ["ppo", "trpo"])
def test_autocast_is_set_aside(method: str) -> None:
    found = check(method, "policygrad/Catch-v0", **small(method, autocast="bfloat16"))
    assert found.tolerance == 1e-6
    assert max(x.difference for x in found.splits) < 1e-10
