"""Every claim about updates holds, on other worlds too."""

import pytest
import torch

from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.exact.closed_form import advantage, expected_return, optimal_return, visitation
from policygrad.exact.policies import SoftmaxPolicy, probabilities
from policygrad.exact.worlds import garnet
from policygrad.updates import trust_region_step
from policygrad.verify.command import exactly
from policygrad.verify.updates import exact_batch, identifiable, update_checks


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_claim_holds(seed):
    with exactly():
        checks = update_checks(seed)
    assert [c.name for c in checks if not c.holds] == []
    assert len(checks) > 30


@pytest.mark.parametrize("seed", range(8))
def test_natural_steps_go_on_at_the_optimum(seed, float64):
    """F is singular there, and the gradient rounding."""
    world, features = garnet(4, 3, 2, seed=seed), identifiable(4, 3)
    policy = SoftmaxPolicy(features, torch.randn(features.shape[-1]))
    update = trust_region_step(damping=0.0, cg_iters=20)
    value = expected_return(world, probabilities(policy).detach())
    for _ in range(150):
        report = update(SurrogateObjective(policy), exact_batch(world, policy))
        value, last = expected_return(world, probabilities(policy).detach()), value
        assert value >= last - 1e-9
        assert report["kl_old"] <= 0.01
    assert float(optimal_return(world) - value) <= 1e-6


def test_a_batch_without_chance(float64):
    world, features = garnet(4, 3, 2), identifiable(4, 3)
    policy = SoftmaxPolicy(features, torch.randn(features.shape[-1]))
    batch, probs = exact_batch(world, policy), probabilities(policy).detach()
    assert float(batch.weight.sum()) == pytest.approx(1)
    assert torch.equal(batch.advantage.view(4, 3), advantage(world, probs))
    visits = visitation(world, probs, world.gamma)
    torch.testing.assert_close(batch.weight.view(4, 3).sum(1), visits / visits.sum())
    assert torch.linalg.matrix_rank(features.flatten(0, 1).T @ features.flatten(0, 1)) == features.shape[-1]
