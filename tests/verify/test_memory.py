"""A policy with memory on a world with hidden states: the tables that the rows are held against."""

import pytest
import torch

from policygrad.exact.closed_form import expected_return
from policygrad.verify.command import exactly
from policygrad.verify.memory import after_histories, memory_sections, remembering, two_episodes
from policygrad.verify.statistics import judged

each_kind = pytest.mark.parametrize("kind", ["gru", "lstm"])


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@each_kind
def test_the_exact_gradient_is_that_of_j_by_all_rows(kind):
    """J = sum of P(row) R(row), with P(row) by the policy on whole rows, differentiated."""
    with exactly():
        at = remembering(kind, 0)
        rollout, (_, probability) = at.on_policy.rollout, at.on_policy.batches(1)
        logp = at.table(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0).sum(1)
        discount = at.world.gamma ** torch.arange(rollout.mask.shape[1])
        j = (probability * (logp - logp.detach()).exp() * (discount * rollout.reward).sum(1)).sum()
        torch.testing.assert_close(j, expected_return(at.world, at.probs), rtol=0, atol=1e-12)
        parameters = list(at.table.parameters())
        torch.testing.assert_close(flat(torch.autograd.grad(j, parameters)), at.gradient, rtol=0, atol=1e-12)
        again = expected_return(at.world, after_histories(at.table, at.histories))
        torch.testing.assert_close(flat(torch.autograd.grad(again, parameters)), at.gradient, rtol=0, atol=1e-12)


@each_kind
def test_what_was_seen_before_counts(kind):
    with exactly():
        at = remembering(kind, 0)
        seen = at.histories.tolist()
        probs = {tuple(history): p for history, p in zip(seen, at.probs.tolist(), strict=True)}
    assert probs[(0, 0, -1)] != pytest.approx(probs[(1, 0, -1)], abs=1e-3)
    assert len(probs) == 2 + 4 + 8
    assert len(seen) == 3 * 7


def test_a_second_episode_starts_where_the_environment_has_reset():
    with exactly():
        rollout = two_episodes(remembering("gru", 0)).on_policy.rollout
    assert rollout.obs.start[:, [0, 4]].all()
    assert rollout.obs.start.sum() == 2 * len(rollout.mask)


def test_no_row_is_wrong_with_another_seed():
    with exactly():
        found = [f for at, section in memory_sections(1) if at.name.startswith("random, LSTM") for f in
                 judged(section, 1_000)]  # fmt: skip
    assert {f.verdict for f in found} == {"unbiased", "biased"}
    assert len(found) == 8 + 2
