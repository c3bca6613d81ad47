"""The worlds of verify: rows of two episodes, rows with holes, and a policy that does not see the clock."""

import pytest
import torch

from policygrad.exact.closed_form import expected_return
from policygrad.exact.policies import probabilities
from policygrad.exact.worlds import garnet
from policygrad.verify.settings import (
    GROUP,
    holed,
    in_pairs,
    listed,
    of_size,
    options_for,
    paid_by_token,
    setting_of,
    token_setting,
)  # fmt: skip


@pytest.fixture
def cut(float64):
    return listed("cut", garnet(seed=0), 2, 0, cut=True)


def test_pairs_are_all_there_are(cut):
    pairs = in_pairs(cut, "pairs")
    count = len(cut.on_policy.rollout.mask)
    assert len(pairs.on_policy.rollout.mask) == count**2
    assert float(pairs.on_policy.batches(1)[1].sum()) == pytest.approx(1)


def test_an_open_end_is_no_end(cut):
    rollout = holed(cut, "holes", open_end=True).on_policy.rollout
    assert not rollout.ended.any()
    assert torch.equal(rollout.final_obs, cut.on_policy.rollout.final_obs)
    assert (rollout.mask.sum(1) == 2).all()
    assert (~rollout.mask[:, -1]).any(), "some rows stop with a hole"


def test_batches_are_of_one_prompt_only_where_the_credit_compares_them(float64):
    at = token_setting(0)
    for method, mixed in (("grpo", False), ("reinforce_plus_plus", True)):
        experience = of_size(at, options_for(at, method), False, GROUP - 1)
        index, probability = experience.batches(GROUP - 1)
        prompts = experience.rollout.group[index]
        assert (prompts[:, 0] != prompts[:, 1]).any() == mixed
        assert float(probability.sum()) == pytest.approx(1)


def test_the_sampled_world_is_that_of_its_tables(float64):
    at = setting_of("cliff", 2_000, 0)
    rollout = at.on_policy.rollout
    logp = at.probs.log()[rollout.obs, rollout.action].where(rollout.mask, 0.0)
    torch.testing.assert_close(rollout.logp, logp)
    assert not at.on_policy.enumerated


def test_rewards_by_token_make_the_return_of_their_world(float64):
    at = paid_by_token(0)
    rollout, probability = at.on_policy.rollout, at.on_policy.batches(1)[1]
    assert ((rollout.reward != 0) == rollout.mask).all()
    returns = (at.world.gamma ** torch.arange(3) * rollout.reward).sum(1)
    assert float((probability * returns).sum()) == pytest.approx(float(expected_return(at.world, at.probs)), abs=1e-12)
    logp = probabilities(at.table).log()[at.states(rollout), rollout.action].where(rollout.mask, 0.0).sum(1)
    (exact,) = torch.autograd.grad((logp.exp() * returns).sum() / 2, at.table.theta)
    torch.testing.assert_close(at.gradient, exact, rtol=0, atol=1e-12)
