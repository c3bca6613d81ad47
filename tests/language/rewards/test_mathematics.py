"""The child process that compares formulas."""

import pytest

from policygrad.errors import UserError
from policygrad.language.rewards import mathematics


def test_it_compares_formulas_and_knows_what_is_none() -> None:
    assert mathematics.equal("$\\frac{1}{2}$", "$0.5$") is True
    assert mathematics.equal("$4$", "$5$") is False
    assert mathematics.equal("nothing", "$5$") is None


def test_an_endless_comparison_counts_as_wrong_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 to the power 9^9 would hold up every thread of the process that computes it."""
    monkeypatch.setattr(mathematics, "COMPARISON_SECONDS", 0.5)
    assert mathematics.equal("$4$", "$9^{9^{9}}$") is False
    assert mathematics.equal("$4$", "$2^2$") is True


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "COMPARE", "import no_such_module")
    with pytest.raises(UserError, match=r"^math_equal cannot import math_verify: pip install math-verify$"):
        mathematics.Mathematics()("$4$", "$4$")
