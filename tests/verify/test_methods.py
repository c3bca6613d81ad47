"""Every line of the table has its rows, a new one the day it is written, and what is written out is right."""

import pytest
import torch

from policygrad.train import compose
from policygrad.train.methods import METHODS, Method
from policygrad.verify.command import exactly, sections
from policygrad.verify.methods import as_it_runs, method_rows, method_section, options_at
from policygrad.verify.options import VerifyOptions
from policygrad.verify.settings import setting_of, token_setting
from policygrad.verify.statistics import Section, judged
from policygrad.verify.written_out import NoClosedForm, expectation


@pytest.fixture
def tokens(float64):
    return token_setting(0)


@pytest.fixture
def random(float64):
    return setting_of("random", 0, 0)


def verdicts(at, options):
    rows = method_rows(at, options)
    return {f.name: f.verdict for f in judged(Section("x", rows, at.on_policy, at.gradient), 1_000)}


def test_every_method_has_a_row_on_policy_and_one_as_it_runs(tokens):
    names = {row.name for row in method_section(tokens).rows}
    assert {f"{name}, {where}" for name in METHODS for where in ("on policy", "as it runs")} <= names
    assert {f"{name}, off policy" for name in ("ppo", "trpo", "gspo", "off_policy_actor_critic")} <= names


def test_those_with_a_critic_or_returns_have_their_rows_on_control_too(random):
    names = {row.name for row in method_section(random).rows}
    assert {f"{name}, as it runs" for name in ("reinforce", "ppo", "trpo", "reinforce_plus_plus")} <= names
    assert not any(name.startswith("grpo") for name in names)


def test_a_line_added_to_the_table_has_its_row_without_a_change_here(monkeypatch, tokens):
    mine = Method("mine", "Made up.", "grpo", defaults={
        "credit": "group", "group_scale": "none", "weights": "row", "ratio": "sequence", "clip_high": 0.5,
    })  # fmt: skip
    monkeypatch.setitem(METHODS, "mine", mine)
    found = verdicts(tokens, options_at("mine", tokens))
    assert found == {f"mine, {where}": "biased" for where in
                     ("on policy", "off policy", "as it runs")}  # fmt: skip
    with exactly():
        names = {row.name for section in sections(VerifyOptions(world="tokens")) for row in section.rows}
    assert "mine, as it runs" in names


def test_one_of_a_new_value_is_measured_and_has_no_closed_form(monkeypatch, tokens):
    monkeypatch.setitem(compose.WEIGHTS, "squared", lambda mask: (mask / mask.sum()) ** 2)
    newer = Method("newer", "Made up.", "grpo", defaults={"credit": "group", "weights": "squared"})
    monkeypatch.setitem(METHODS, "newer", newer)
    assert set(verdicts(tokens, options_at("newer", tokens)).values()) == {"no closed form"}


@pytest.mark.parametrize(
    "values",
    [
        {"credit": "gae", "lam": 0.7, "normalize_advantages": "none"},
        {"credit": "gae", "length_adaptive_lam": 0.7},
        {"credit": "n_step", "n": 2, "normalize_advantages": "batch"},
        {"credit": "monte_carlo", "clip_low": 0.05, "clip_high": 0.1},
        {"credit": "vtrace", "lam": 0.8, "rho_bar": 1.05, "c_bar": 0.9},
        {"credit": "reward_to_go", "baseline": "mean", "weights": "episode", "discounted": True},
        {"credit": "reward_to_go", "baseline": "time_mean", "weights": "budget"},
        {"credit": "trajectory_return", "baseline": "value", "weights": "row"},
        {"dual_clip": 1.02, "clip_high": 9.0},
        {"kl_old_coefficient": 0.5},
    ],
    ids=str,
)
def test_ppo_with_other_options_expects_what_is_written_out(values, random):
    options = options_at("ppo", random)
    found = verdicts(random, type(options)(**{**vars(options), **values}))
    assert set(found.values()) <= {"unbiased", "biased"}


@pytest.mark.parametrize("values", [{"entropy_coefficient": 0.1}, {"kl_ref": "loss"}, {"baseline": "optimal"}], ids=str)
def test_what_is_not_written_out_is_said_to_be_so(values, tokens):
    options = options_at("reinforce_plus_plus", tokens)
    options = type(options)(**{**vars(options), **values})
    with pytest.raises(NoClosedForm):
        expectation(options, tokens, tokens.on_policy, 1, tokens.value, off_policy=False)


def test_a_run_leaves_the_policy_of_the_setting_as_it_was(random):
    before = random.table.theta.detach().clone()
    row = as_it_runs(random, options_at("actor_critic", random))
    assert torch.equal(random.table.theta, before)
    assert row.measured.mean.norm() > 0


FREE = {"clip_low": torch.inf, "clip_high": torch.inf}
TIGHT = [
    {"divergence_mask": "binary_tv", "divergence_bound": 0.02, **FREE},
    {"divergence_mask": "binary_kl", "divergence_bound": 1e-3, **FREE},
    {"divergence_mask": "tv", "divergence_bound": 0.05, **FREE},
    {"divergence_mask": "kl", "divergence_bound": 0.01, **FREE},
    {"drift_bound": 0.02, **FREE},
    {"dual_clip": 1.05, "clip_high": 9.0},
    {"token_clip": 0.05, **FREE},
    {"token_clip": 0.05, "ratio": "sequence", **FREE},
    {"token_clip": 0.05, "ratio": "product", **FREE},
    {"ratio": "product", "clip_low": 0.1, "clip_high": 0.1},
    {"ratio": "sequence_token", "clip_low": 0.01, "clip_high": 0.02},
    {"gain": "weight", "ratio": "product", "clip_low": 0.1, "clip_high": 0.1},
    {"gain": "sigmoid", "ratio": "sequence", "sigmoid_positive": 3.0, "sigmoid_negative": 7.0},
    {"gain": "gamma", "gamma_power_positive": 1.5, "gamma_rate_negative": 0.5},
    {"gain": "score"},
    {"kl_old_coefficient": 0.5},
    {"kl_old_coefficient": 0.5, "kl_old_estimate": "squared_row"},
    {"group_baseline": "other_best", "weights": "token"},
    {"group_scale": "batch", "group_baseline": "leave_one_out"},
    {"kl_old_coefficient": 0.5, "kl_old_estimate": "absolute"},
    {"kl_old_coefficient": 0.5, "kl_old_share": 0.5},
    {"kl_old_coefficient": 0.5, "kl_old_estimate": "absolute", "kl_old_share": 0.3, "weights": "token"},
    {"learn_from": "low_covariance", "covariance_low": 0.1, "covariance_high": 0.6, "covariance_share": 0.4},
    {"learn_from": "low_covariance", "covariance_low": 0.2, "weights": "token", "normalize_advantages": "batch"},
    {"learn_from": "high_entropy", "learn_from_share": 0.5},
    {"credit": "trajectory_return", "baseline": "length_weighted"},
    {"credit": "reward_to_go", "baseline": "token", "normalize_advantages": "batch"},
]


@pytest.mark.parametrize("values", TIGHT, ids=str)
def test_grpo_with_other_options_expects_what_is_written_out_and_they_have_a_say(values, tokens):
    """On policy, off it and as it runs. Off policy every bound is met: without it, it is another gradient."""
    options = options_at("grpo", tokens)
    without = FREE if FREE.items() <= values.items() else {}
    chosen, plain = (type(options)(**{**vars(options), **x}) for x in (values, without))
    assert set(verdicts(tokens, chosen).values()) <= {"unbiased", "biased"}
    found, other = (
        next(row.expected for row in method_rows(tokens, x) if row.name.endswith("off policy")) for x in (chosen, plain)
    )
    assert (found - other).norm() > 1e-3
