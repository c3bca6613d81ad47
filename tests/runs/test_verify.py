"""The command: what it prints, what it returns, what it takes of a user's, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from policygrad.errors import UserError
from policygrad.runs.verify.command import run, verify
from policygrad.runs.verify.options import VerifyOptions
from policygrad.runs.verify.statistics import Moments, agrees
from policygrad.runs.verify.updates import Check

CONTROL = ["random", "chain", "bandit"]


def findings(world, **options):
    return verify(VerifyOptions(world=world, samples=options.pop("samples", 2_000), **options)).findings


@pytest.mark.parametrize("world", [*CONTROL, "cliff", "tokens"])
def test_nothing_is_wrong(world):
    report = verify(VerifyOptions(world=world, samples=2_000))
    assert [f.name for f in report.findings if f.verdict == "WRONG"] == []
    assert len(report.findings) > 20


@pytest.mark.parametrize("world", ["random", "tokens"])
@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_is_wrong_with_another_seed(seed, world):
    assert [f.name for f in findings(world, seed=seed) if f.verdict == "WRONG"] == []


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
    assert of["standardised over the batch (REINFORCE++)"].verdict == "biased"
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


def test_the_test_of_samples_finds_a_bias_and_no_noise():
    generator = torch.Generator().manual_seed(0)
    mean, spread = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 2.0
    samples = mean + spread * torch.randn(10_000, 3, generator=generator, dtype=torch.float64)
    found = Moments(samples.mean(0), torch.cov(samples.T), count=10_000)
    assert agrees(found, mean, tests=100)
    assert not agrees(found, mean + torch.tensor([0.2, 0.0, 0.0], dtype=torch.float64), tests=100)
    assert not agrees(Moments(mean * torch.nan, found.covariance, count=10_000), mean, tests=100)


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
    monkeypatch.setattr("policygrad.runs.verify.command.update_checks", lambda seed: wrong)
    monkeypatch.setattr("policygrad.runs.verify.command.sections", lambda *_: iter(()))
    assert run(VerifyOptions()) == 1
    assert "1 WRONG" in capsys.readouterr().out


def test_the_callers_random_numbers_and_dtype_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    findings("bandit")
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_default_dtype() == torch.float32


def test_the_options_need_no_torch():
    code = "import sys, policygrad.runs.verify.options; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A user's function

GOOD = """
import torch
def good(reward, value, terminated, ended, gamma):
    advantage = torch.zeros_like(reward)
    for b in range(reward.shape[0]):
        total = 0.0
        for t in reversed(range(reward.shape[1])):
            after = 0.0 if terminated[b, t] else value[b, t + 1].item()
            delta = reward[b, t].item() + gamma * after - value[b, t].item()
            total = delta + gamma * 0.5 * (0.0 if ended[b, t] else total)
            advantage[b, t] = total
    return advantage
def cut(reward, value, terminated, ended, gamma):
    return reward + gamma * value[:, 1:].where(~ended, 0.0) - value[:, :-1]
def centred(reward, value, terminated, ended, gamma):
    a = reward + gamma * value[:, 1:].where(~terminated, 0.0) - value[:, :-1]
    return a - a.mean()
def raises(reward, value, terminated, ended, gamma):
    raise RuntimeError("out of luck")
def shape(reward, value, terminated, ended, gamma):
    return value
def nothing(reward, value, terminated, ended, gamma):
    return None
def nan(reward, value, terminated, ended, gamma):
    return reward / 0.0
number = 3
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def users(file, name, world="random"):
    options = VerifyOptions(estimator=f"{file}:{name}", world=world, samples=1_000)
    from policygrad.runs.verify.user import load_function

    report = verify(options, load_function(str(options.estimator)))
    return {(f.world, f.name): f.verdict for f in report.findings if f.name.startswith(f"{name},")}


def test_a_right_function_is_unbiased_with_an_exact_critic(file):
    for world in ("bandit", "tokens"):
        found = users(file, "good", world)
        assert found[world, "good, exact critic"] == "unbiased"
    assert found["tokens", "good, zero critic"] == "biased"


def test_one_that_takes_truncation_for_termination_is_wrong(file):
    found = users(file, "cut")
    assert found["random", "cut, exact critic"] == "unbiased"
    assert found["random, time limit", "cut, exact critic"] == "WRONG"


def test_one_that_looks_at_several_rows_is_called_once_a_batch(file):
    # Centred by its batch, the advantage has its own step in the mean: 1 - 1/n of the gradient for equal lengths.
    assert users(file, "centred", "bandit")["bandit", "centred, exact critic"] == "WRONG"
    assert "WRONG" not in users(file, "centred", "cliff").values()  # in batches of 192 steps it is lost in the noise


def test_a_wrong_one_makes_exit_code_1(file, capsys):
    assert run(VerifyOptions(estimator=f"{file}:cut", world="random", samples=1_000)) == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_module_is_found_by_name(file, monkeypatch):
    monkeypatch.syspath_prepend(str(file.parent))
    assert users("mine", "good", "bandit")["bandit", "good, exact critic"] == "unbiased"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "raised RuntimeError: out of luck"),
        ("shape", r"returned \[6, 2\] for rewards of shape \[6, 1\]: return \[B, T\]"),
        ("nothing", "returned NoneType"),
        ("nan", "NaN or infinite"),
    ],
)
def test_a_function_that_fails_is_one_line(file, name, message):
    with pytest.raises(UserError, match=message) as error:
        users(file, name, "bandit")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "module:function"),
        ("nowhere.py:f", "there is no file"),
        ("no_such_module:f", "cannot be imported"),
        ("{file}:absent", "no function 'absent'"),
        ("{file}:number", "no function 'number'"),
    ],
)
def test_a_name_that_is_none_is_refused(file, name, message):
    with pytest.raises(UserError, match=message):
        run(VerifyOptions(estimator=name.format(file=file), world="bandit"))


def test_too_few_and_too_many_samples_are_refused():
    for samples in (10, 10_000_000):
        with pytest.raises(UserError, match="--samples"):
            verify(VerifyOptions(world="bandit", samples=samples))


def test_the_picture_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr("policygrad.runs.verify.plot.STEPS", 20)
    path = tmp_path / "verify.png"
    assert run(VerifyOptions(world="bandit", samples=1_000, plot=path, json=True)) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write the picture"):
        run(VerifyOptions(world="bandit", samples=1_000, plot=tmp_path / "nowhere" / "x.png", json=True))
