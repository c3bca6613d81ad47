"""A user's advantage function: its rows, and what is said of one that fails."""

from pathlib import Path

import pytest

from policygrad.errors import UserError
from policygrad.exact.closed_form import action_value, visitation, weighted_gradient
from policygrad.exact.worlds import garnet, with_clock
from policygrad.functions import load_function
from policygrad.verify import user
from policygrad.verify.command import exactly, run, verify
from policygrad.verify.options import VerifyOptions
from policygrad.verify.settings import listed
from policygrad.verify.statistics import Section, judged
from policygrad.verify.user import user_rows

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
def centered(reward, value, terminated, ended, gamma):
    a = reward + gamma * value[:, 1:].where(~terminated, 0.0) - value[:, :-1]
    return a - a.mean()
def raises(reward, value, terminated, ended, gamma):
    raise RuntimeError("out of luck")
def shape(reward, value, terminated, ended, gamma):
    return value
def four(reward, value, terminated, ended):
    return reward
def exits(reward, value, terminated, ended, gamma):
    import sys
    sys.exit("the license has run out")
def hangs(reward, value, terminated, ended, gamma):
    while True:
        pass
class Odd(Exception):
    def __str__(self):
        raise ValueError
def unprintable(reward, value, terminated, ended, gamma):
    raise Odd
def long(reward, value, terminated, ended, gamma):
    raise ValueError("x y" * 1000)
def complex_numbers(reward, value, terminated, ended, gamma):
    return reward * 1j
def truths(reward, value, terminated, ended, gamma):
    return reward > 0
def sparse(reward, value, terminated, ended, gamma):
    return reward.to_sparse()
def meta(reward, value, terminated, ended, gamma):
    return reward.to("meta")
def array(reward, value, terminated, ended, gamma):
    return reward.numpy()
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


def users(file, name, world):
    options = VerifyOptions(estimator=f"{file}:{name}", world=world, samples=1_000)
    report = verify(options, load_function(str(options.estimator), what="advantage function"))
    return {(f.world, f.name): f.verdict for f in report.findings if f.name.startswith(f"{name},")}


def test_a_right_function_is_unbiased_with_an_exact_critic(file):
    for world in ("bandit", "tokens"):
        found = users(file, "good", world)
        assert found[world, "good, exact critic"] == "unbiased"
    assert found["tokens", "good, zero critic"] == "biased"


def test_one_that_takes_truncation_for_termination_is_wrong(file):
    with exactly():
        for world, ends, expected in ((garnet(), True, "WRONG"), (with_clock(garnet(), 2), False, "unbiased")):
            at = listed("world", world, 2, 0, cut=ends)
            function = load_function(f"{file}:cut")
            rows = user_rows("mine.py:cut", function, at)
            visits = visitation(world, at.probs, world.gamma, at.horizon)
            exact = weighted_gradient(visits, at.probs, action_value(world, at.probs), at.scores)
            found = judged(Section("world", rows, at.on_policy, exact), 1_000)
            assert (found[0].name, found[0].verdict) == ("cut, exact critic", expected)


def test_one_that_looks_at_several_rows_is_called_once_a_batch(file):
    # Centered by its batch, the advantage has its own step in the mean: 1 - 1/n of the gradient for equal lengths.
    assert users(file, "centered", "bandit")["bandit", "centered, exact critic"] == "WRONG"
    assert "WRONG" not in users(file, "centered", "cliff").values()  # in batches of 192 steps it is lost in the noise


def test_a_wrong_one_makes_exit_code_1(file, capsys):
    assert run(VerifyOptions(estimator=f"{file}:centered", world="bandit", samples=1_000)) == 1
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
        ("four", r"takes 4 positional .* were given: it takes \(reward, value, terminated, ended, gamma\)"),
        ("exits", "raised SystemExit: the license has run out: fix the function"),
        ("hangs", "raised TimeoutError: a call took more than 0.2 seconds"),
        ("unprintable", "raised Odd: Odd: fix"),
        ("long", "raised ValueError: x yx y"),
        ("complex_numbers", "numbers that are torch.complex128"),
        ("truths", "numbers that are torch.bool"),
        ("sparse", "torch.sparse_coo"),
        ("meta", "on meta"),
        ("array", "returned ndarray"),
    ],
)
def test_a_function_that_fails_is_one_line(file, name, message, monkeypatch):
    monkeypatch.setattr(user, "CALL_SECONDS", 0.2 if name == "hangs" else 60.0)
    with pytest.raises(UserError, match=message) as error:
        users(file, name, "bandit")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 200


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine", "module:function"),
        ("nowhere.py:f", "there is no file"),
        ("no_such_module:f", "there is no module"),
        ("{file}:absent", "no function 'absent'"),
        ("{file}:number", "no function 'number'"),
    ],
)
def test_a_name_that_is_none_is_refused(file, name, message):
    with pytest.raises(UserError, match=message):
        run(VerifyOptions(estimator=name.format(file=file), world="bandit"))
