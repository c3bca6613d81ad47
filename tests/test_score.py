"""log pi: the score term, the ratios, and a rollout scored in pieces."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from policygrad.rollout import Rollout, decisions
from policygrad.score import (
    bounded,
    log_probabilities,
    log_ratio,
    product_ratio,
    score,
    sequence_ratio,
    sequence_token_ratio,
    token_ratio,
)
from policygrad.weights import per_token

pytestmark = pytest.mark.usefixtures("float64")
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()


def test_the_gradient_of_the_score_term_is_the_advantage_times_that_of_log_pi() -> None:
    logp, advantage = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    score(logp, torch.randn(3, 4), advantage).sum().backward()
    assert_close(logp.grad, advantage.detach())
    assert advantage.grad is None


def test_the_expected_gradient_of_log_pi_is_0() -> None:
    logits = torch.randn(1, 5, requires_grad=True)
    logp = logits.log_softmax(1)
    (logp.detach().exp() * score(logp, torch.ones(1, 5), torch.ones(1, 5))).sum().backward()
    assert_close(logits.grad, torch.zeros(1, 5))


def test_token_ratio_is_the_quotient_of_probabilities_and_1_behind_the_mask() -> None:
    p, q = torch.rand(3, 4), torch.rand(3, 4)
    assert_close(token_ratio(p.log(), q.log(), MASK), (p / q).where(MASK, 1.0))


def test_sequence_ratio_is_the_geometric_mean_of_the_rows_token_ratios() -> None:
    p, q = torch.rand(3, 4), torch.rand(3, 4)
    ratio = sequence_ratio(p.log(), q.log(), MASK)
    assert ratio.shape == (3, 1)
    assert_close(ratio[0, 0], (p[0] / q[0]).prod() ** (1 / 4))
    assert_close(ratio[1, 0], (p[1, 1] * p[1, 3] / (q[1, 1] * q[1, 3])) ** (1 / 2))
    assert ratio[2, 0] == 1


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio, sequence_token_ratio, product_ratio])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_ratios_and_their_gradients_do_not_see_behind_the_mask(ratio: object, garbage: float) -> None:
    old, clean = torch.randn(3, 4), torch.randn(3, 4, requires_grad=True)
    dirty = clean.detach().where(MASK, garbage).requires_grad_()
    ratios = [ratio(x, y, MASK) for x, y in [(clean, old), (dirty, old.where(MASK, -garbage))]]
    for r in ratios:
        r.sum().backward()
    assert torch.equal(*ratios)
    assert torch.equal(clean.grad, dirty.grad)
    assert dirty.grad[~MASK].eq(0).all()


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio, sequence_token_ratio, product_ratio])
def test_the_ratio_of_a_policy_to_itself_is_exactly_1(ratio: object) -> None:
    logp = torch.randn(3, 4)
    assert ratio(logp, logp, MASK).eq(1).all()


def test_log_ratio_is_the_difference_of_log_probabilities_bounded_above() -> None:
    new, old = torch.randn(3, 4), torch.randn(3, 4)
    assert_close(log_ratio(new, old, MASK), (new - old).where(MASK, 0.0))
    far = torch.tensor([[19.0, 21.0, 1e4, -1e4]])
    assert log_ratio(far, torch.zeros(1, 4), MASK[:1]).tolist() == [[19, 20, 20, -1e4]]
    assert token_ratio(far, torch.zeros(1, 4), MASK[:1]).isfinite().all()


@pytest.mark.parametrize("micro_batch", [None, 1, 4, 6, 100])
def test_log_probabilities_are_those_of_the_actions_taken_whatever_is_scored_at_a_time(
    micro_batch: int | None, policy: nn.Module, sample: Callable[..., Rollout]
) -> None:
    """Of a rollout and of a batch alike, without gradient, 0 behind the mask."""
    rollout, seen = sample(policy), []
    policy.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    batch = decisions(rollout, per_token(rollout.mask), torch.zeros(6, 5))
    for scored in (rollout, batch):
        seen.clear()
        found = log_probabilities(policy, scored, micro_batch)
        assert seen == [len(x) for x in torch.arange(6).split(micro_batch or 6)]
        assert not found.requires_grad
        assert_close(found, rollout.logp)
        assert found[~rollout.mask].eq(0).all()
    tree = replace(rollout, obs={"eye": rollout.obs})
    policy.register_forward_pre_hook(lambda module, inputs: inputs[0]["eye"], prepend=True)
    assert_close(log_probabilities(policy, tree, micro_batch), rollout.logp)


def test_product_ratio_is_that_of_the_whole_row() -> None:
    p, q = torch.rand(3, 4), torch.rand(3, 4)
    ratio = product_ratio(p.log(), q.log(), MASK)
    assert_close(ratio[0, 0], (p[0] / q[0]).prod())
    assert_close(ratio[1, 0], p[1, 1] * p[1, 3] / (q[1, 1] * q[1, 3]))
    assert ratio[2, 0] == 1


def test_sequence_token_ratio_has_the_rows_value_and_each_tokens_gradient() -> None:
    logp, old = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    s = sequence_ratio(logp, old, MASK).detach()
    ratio = sequence_token_ratio(logp, old, MASK)
    assert_close(ratio.detach(), s.expand(3, 4))
    (slope,) = torch.autograd.grad((ratio * torch.arange(12.0).view(3, 4)).sum(), logp)
    assert_close(slope, (s * torch.arange(12.0).view(3, 4)).where(MASK, 0.0))


@pytest.mark.parametrize(
    ("advantage", "difference", "value", "slope"),
    [(2.0, 0.5, 0.3, 0.0), (2.0, 0.2, 0.2, 1.0), (2.0, -0.5, -0.5, 1.0), (-2.0, -0.5, -0.3, 0.0), (-2.0, 0.5, 0.5, 1.0),
     (0.0, 0.5, 0.5, 1.0)],
)  # fmt: skip
def test_bounded_stops_where_the_advantage_favors_going_further(
    advantage: float, difference: float, value: float, slope: float
) -> None:
    old = torch.full((1, 1), -1.0)
    logp = (old + difference).requires_grad_()
    found = bounded(logp, old, torch.full((1, 1), advantage), 0.3)
    assert (found - old).item() == pytest.approx(value)
    assert torch.autograd.grad(found.sum(), logp)[0].item() == slope
