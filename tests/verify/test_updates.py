"""Every claim about updates holds, on other worlds too."""

import pytest
import torch

from policygrad.exact.closed_form import advantage, visitation
from policygrad.exact.policies import SoftmaxPolicy, probabilities
from policygrad.exact.worlds import garnet
from policygrad.verify.command import exactly
from policygrad.verify.updates import exact_batch, identifiable, update_checks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_claim_holds(seed):
    with exactly():
        checks = update_checks(seed)
    assert [c.name for c in checks if not c.holds] == []
    assert len(checks) > 30


def test_a_batch_without_chance(float64):
    world, features = garnet(4, 3, 2), identifiable(4, 3)
    policy = SoftmaxPolicy(features, torch.randn(features.shape[-1]))
    batch, probs = exact_batch(world, policy), probabilities(policy).detach()
    assert float(batch.weight.sum()) == pytest.approx(1)
    assert torch.equal(batch.advantage.view(4, 3), advantage(world, probs))
    visits = visitation(world, probs, world.gamma)
    torch.testing.assert_close(batch.weight.view(4, 3).sum(1), visits / visits.sum())
    assert torch.linalg.matrix_rank(features.flatten(0, 1).T @ features.flatten(0, 1)) == features.shape[-1]
