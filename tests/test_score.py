"""log pi: the score term and the ratios."""

import pytest
import torch
from torch.testing import assert_close

from policygrad.score import score, sequence_ratio, token_ratio

pytestmark = pytest.mark.usefixtures("float64")
MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]).bool()


def test_the_gradient_of_the_score_term_is_the_advantage_times_that_of_log_pi() -> None:
    logp, advantage = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    score(logp, advantage).sum().backward()
    assert_close(logp.grad, advantage.detach())
    assert advantage.grad is None


def test_the_expected_gradient_of_log_pi_is_0() -> None:
    logits = torch.randn(1, 5, requires_grad=True)
    logp = logits.log_softmax(1)
    (logp.detach().exp() * score(logp, torch.ones(1, 5))).sum().backward()
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


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
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


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_the_ratio_of_a_policy_to_itself_is_exactly_1(ratio: object) -> None:
    logp = torch.randn(3, 4)
    assert ratio(logp, logp, MASK).eq(1).all()
