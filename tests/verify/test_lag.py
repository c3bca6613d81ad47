"""What each correction expects of a policy that is some updates older: without a lag it is the row on policy."""

from dataclasses import replace

import pytest
import torch

from policygrad.exact.closed_form import expected_return, mean_kl, visitation
from policygrad.exact.policies import probabilities
from policygrad.verify.command import exactly
from policygrad.verify.lag import CLIPPED, LAGS, SEQUENCE, STEP, control_lag_rows, lag_section, lagged, token_lag_rows
from policygrad.verify.settings import GROUP, row_of, setting_of, token_setting
from policygrad.verify.statistics import judged, moments

WORLDS = {"tokens": lambda seed: token_setting(seed), "random": lambda seed: setting_of("random", 0, seed)}
each_world = pytest.mark.parametrize("world", WORLDS)


def on_policy(at):
    """The row on policy of each that has a lag, by the beginning of its name: made without a word of old policies."""
    if at.tokens is None:
        gae = {"critic": at.value, "lam": 0.9, "discounted": True}
        return {
            "GAE": row_of(at, "", "actor_critic", **gae),
            "V-trace": row_of(at, "", "off_policy_actor_critic", **gae),
        }
    return {
        "ratio of the row": row_of(at, "", "gspo", size=GROUP, **SEQUENCE, **CLIPPED),
        "V-trace": row_of(at, "", "off_policy_actor_critic", at.wrong_value),
        "": row_of(at, "", "rloo", size=GROUP),
    }


@each_world
def test_without_a_lag_each_is_its_row_on_policy_mean_and_covariance(world, float64):
    at = WORLDS[world](0)
    rows = (control_lag_rows if at.tokens is None else token_lag_rows)(lagged(at, 0))
    plain = on_policy(at)
    for row in rows:
        alike = next(x for name, x in plain.items() if row.name.startswith(name))
        found, expected = moments(row, row.experience), moments(alike, at.on_policy)
        torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-13)
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=0, atol=1e-12)


@each_world
def test_an_update_is_along_the_gradient_of_j_and_of_its_length(world, float64):
    at = WORLDS[world](0)
    for lag in (1, 2):
        before, after = (lagged(at, x).table for x in (lag - 1, lag))
        (slope,) = torch.autograd.grad(expected_return(at.world, probabilities(before)), before.theta)
        cosine = torch.cosine_similarity((after.theta - before.theta).detach(), slope, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-12)
        old, new = (probabilities(x).detach() for x in (before, after))
        assert float(mean_kl(visitation(at.world, old, 1.0), old, new)) == pytest.approx(STEP, rel=0.03)


@each_world
def test_the_rows_are_those_of_the_policy_before_all_updates(world, float64):
    at = WORLDS[world](0)
    late = lagged(at, 2)
    rollout, states = late.off_policy.rollout, late.states(late.off_policy.rollout)
    logp = at.probs.log()[states, rollout.action].where(rollout.mask, 0.0)
    torch.testing.assert_close(rollout.logp.where(rollout.mask, 0.0), logp, rtol=0, atol=1e-12)
    assert torch.equal(late.probs_old, at.probs)
    fresh = late.on_policy.rollout
    logp = late.probs.log()[late.states(fresh), fresh.action].where(fresh.mask, 0.0)
    torch.testing.assert_close(fresh.logp.where(fresh.mask, 0.0), logp, rtol=0, atol=1e-12)
    value = (late.on_policy.batches(1)[1] * (at.world.gamma ** torch.arange(3) * fresh.reward).sum(1)).sum()
    assert float(value) == pytest.approx(float(expected_return(at.world, late.probs)), abs=1e-12)
    assert float(value) > float(expected_return(at.world, at.probs))


def biases(world, seed=0):
    """By correction, in the order of the lags."""
    with exactly():
        at = WORLDS[world](seed)
        found = {}
        for f in judged(lag_section(at), 1_000):
            assert f.verdict in ("unbiased", "biased"), f.name
            assert f.verdict == "unbiased" or f.reason
            found.setdefault(f.name.partition(", lag ")[0], []).append(f.relative_bias)
        return found


def test_whole_weights_are_unbiased_at_any_lag_and_other_biases_grow():
    found = biases("tokens")
    for name in ("product of ratios", "weight by completion"):
        assert found.pop(name) == [0.0] * len(LAGS)
    for name, bias in found.items():
        assert bias == sorted(bias), name
        assert bias[-1] > 0.05
        assert bias[0] == 0 or name.startswith("ratio of the row"), name


def test_in_control_the_ratio_is_better_than_nothing_and_nothing_better_than_the_clipped_ratio():
    found = biases("random")
    assert all(bias[0] == 0 and bias == sorted(bias) for bias in found.values())
    last = {name: bias[-1] for name, bias in found.items()}
    assert (
        last["V-trace, exact critic, unclipped"] < last["GAE, ratio"] < last["V-trace, exact critic, ratios at most 1"]
    )
    assert (
        last["V-trace, exact critic, ratios at most 1"] < last["GAE, not weighed"] < last["GAE, ratio, clipped (PPO)"]
    )


@each_world
def test_nothing_is_wrong_with_another_seed(world):
    assert len(biases(world, seed=1)) > 4


def test_one_that_forgets_to_weigh_is_wrong(float64):
    at = lagged(token_setting(0), 2)
    row = next(row for row in token_lag_rows(at) if row.name == "weight by completion")
    forgotten = replace(row.experience, rollout=replace(row.experience.rollout, importance=None))
    section = lag_section(at)
    (finding,) = judged(replace(section, rows=[replace(row, experience=forgotten, exact=at.gradient)]), 1_000)
    assert finding.verdict == "WRONG"
