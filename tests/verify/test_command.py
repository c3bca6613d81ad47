"""The command: what it prints, what it returns, and what it refuses; and the claims of the papers in its tables."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch

from policygrad.errors import UserError
from policygrad.verify.command import run, verify
from policygrad.verify.options import VerifyOptions
from policygrad.verify.updates import Check

CONTROL = ["random", "chain", "bandit"]


@cache
def findings(world, seed=0):
    return verify(VerifyOptions(world=world, samples=2_000, seed=seed)).findings


@pytest.mark.parametrize("world", [*CONTROL, "cliff", "tokens", "conversations"])
def test_nothing_is_wrong(world):
    found = findings(world)
    assert {f.verdict for f in found} == {"unbiased", "biased"}, [f.name for f in found if f.verdict == "WRONG"]
    assert len(found) > 10


@pytest.mark.parametrize("world", ["chain", "tokens"])
def test_nothing_is_wrong_with_another_seed(world):
    assert [f.name for f in findings(world, seed=1) if f.verdict == "WRONG"] == []


def test_the_claims_of_the_papers():
    of = {f.name: f for f in findings("random") if f.world == "random"}
    for name in ("reward-to-go", "reward-to-go, mean baseline", "reward-to-go, optimal baseline", "whole return"):
        assert of[f"REINFORCE, {name}"].verdict == "unbiased"
        assert of[f"REINFORCE, {name}"].bias == 0
    assert of["REINFORCE, reward-to-go, without gamma^t"].verdict == "biased"
    assert of["REINFORCE, reward-to-go, without gamma^t"].reason.startswith("gamma^t dropped")
    assert of["A2C, GAE(0.9), exact critic"].verdict == "unbiased"
    assert of["A2C, GAE(0.9), zero critic"].verdict == "biased"
    assert of["A2C, TD(1), wrong critic"].verdict == "unbiased"
    # Variance falls from the whole return to the reward-to-go to a baseline to a critic.
    order = ["REINFORCE, whole return", "REINFORCE, reward-to-go", "REINFORCE, reward-to-go, mean baseline",
             "REINFORCE, reward-to-go, baseline V", "A2C, GAE(0.9), exact critic",
             "A2C, 1-step, exact critic"]  # fmt: skip
    variances = [of[name].variance for name in order]
    assert variances == sorted(variances, reverse=True)


def test_the_claims_about_language():
    of = {f.name: f for f in findings("tokens")}
    assert of["leave-one-out (RLOO)"].verdict == "unbiased"
    assert of["group mean, own reward in it"].cosine == pytest.approx(1, abs=1e-12)
    assert of["group mean, own reward in it"].relative_bias == pytest.approx(1 / 3, abs=1e-9)
    assert of["group mean / std"].verdict == "biased"
    assert of["k1 in the loss"].relative_bias == pytest.approx(1, abs=1e-9)
    assert of["k3 in the loss"].cosine < 1
    assert of["k2 of whole completions"].verdict == "unbiased"
    assert of["group mean, over the budget (Dr. GRPO)"].cosine == pytest.approx(1, abs=1e-12)
    assert of["group mean, over the budget (Dr. GRPO)"].relative_bias == pytest.approx(1 - 2 / 3 / 3, abs=1e-9)
    assert of["standardized over the batch (REINFORCE++)"].verdict == "biased"
    plain, clipped, weighed = (
        of[f"{name}, away from the old policy{who}"].relative_bias
        for name, who in (("token ratio", ""), ("clipped token ratio", ""), ("clipped weight", " (CISPO)"))
    )
    assert plain < weighed < clipped  # what is cut off, a weight's excess or all of a gradient
    kl = {name: of[f"{name}, off policy"] for name in ("straight-through", "reweighted straight-through")}
    over = of["KL over the vocabulary, off policy"]
    assert kl["reweighted straight-through"].relative_bias == pytest.approx(over.relative_bias, abs=1e-9)
    assert kl["reweighted straight-through"].relative_bias < kl["straight-through"].relative_bias
    assert over.variance < kl["reweighted straight-through"].variance
    assert of["k1 in the reward"].verdict == "unbiased"


def test_the_sample_size_is_where_noise_equals_bias():
    for f in findings("bandit"):
        if f.verdict == "biased" and f.variance == f.variance:
            assert f.sample_size == pytest.approx(f.variance / f.bias**2)
            assert f.z == pytest.approx((2_000 / f.sample_size) ** 0.5)


def test_json_is_one_object_and_nothing_else(capsys):
    assert run(VerifyOptions(world="bandit", samples=1_000, json=True)) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["wrong"] == 0
    assert {"name", "bias", "cosine", "z", "variance", "sample_size", "verdict"} <= out["estimators"][0].keys()
    said = {row["verdict"].partition(":")[0] for row in out["estimators"]}
    assert said == {"unbiased", "biased, as its paper says"}


def test_the_table_says_it_in_words_and_stderr_is_quiet(capsys):
    assert run(VerifyOptions(world="tokens", samples=1_000)) == 0
    captured = capsys.readouterr()
    assert "leave-one-out (RLOO)" in captured.out
    assert "none WRONG" in captured.out
    assert captured.err == ""


def test_wrong_is_exit_code_1(monkeypatch, capsys):
    wrong = [Check("a claim", 1.0, "0", False)]
    monkeypatch.setattr("policygrad.verify.command.update_checks", lambda seed: wrong)
    monkeypatch.setattr("policygrad.verify.command.sections", lambda *_: iter(()))
    assert run(VerifyOptions()) == 1
    assert "1 WRONG" in capsys.readouterr().out


def test_the_callers_random_numbers_and_dtype_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    verify(VerifyOptions(world="bandit", samples=1_000))
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_default_dtype() == torch.float32


def test_the_options_need_no_torch():
    code = "import sys, policygrad.verify.options; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_too_few_and_too_many_samples_are_refused():
    for samples in (10, 10_000_000, 10**400):
        with pytest.raises(UserError, match="--samples") as raised:
            verify(VerifyOptions(world="bandit", samples=samples))
        assert len(str(raised.value)) <= 200


def test_a_seed_beyond_the_generators_is_refused():
    for seed in (-1, 2**63, 10**400):
        with pytest.raises(UserError, match="--seed") as raised:
            verify(VerifyOptions(world="bandit", seed=seed))
        assert len(str(raised.value)) <= 200


def test_rows_with_holes_expect_what_those_without_do():
    of = {(f.world, f.name): f for f in findings("random")}
    for name in (
        "REINFORCE, reward-to-go, mean baseline",
        "A2C, GAE(0.9), wrong critic",
        "V-trace, off-policy, exact critic",
    ):
        holes, whole = of["random, with holes", name], of["random", name]
        assert holes.bias == pytest.approx(whole.bias, abs=1e-12)
        assert holes.variance == pytest.approx(whole.variance, rel=0.2)
    assert of["random, with holes", "A2C, GAE(0.9), exact critic, 0 in holes"].verdict == "unbiased"
    assert of["random, cut rows with holes", "A2C, 1-step, exact critic"].verdict == "unbiased"


def test_every_method_is_in_the_tables():
    for world in ("random", "tokens"):
        names = {f.name for f in findings(world) if f.world == f"{world}, methods"}
        assert {"ppo, on policy", "ppo, off policy", "ppo, as it runs"} <= names
