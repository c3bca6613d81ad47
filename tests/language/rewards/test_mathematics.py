"""Formulas against gold formulas, and the child process that compares them."""

from pathlib import Path

import pytest

from policygrad.errors import UserError
from policygrad.language.rewards import mathematics


def test_it_compares_formulas_and_knows_what_is_none() -> None:
    assert mathematics.equal("\\frac{x}{2}", "0.5x") is True
    assert mathematics.equal("4", "5") is False
    assert mathematics.equal("", "5") is None


def test_an_endless_comparison_counts_as_wrong_and_the_next_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 to the power 9^9 would hold up every thread of the process that computes it."""
    mathematics.equal("x", "x")  # it has started
    monkeypatch.setattr(mathematics, "COMPARISON_SECONDS", 0.5)
    assert mathematics.equal("2^2", "9^{9^{9}}") is False
    monkeypatch.undo()
    assert mathematics.equal("2^2", "2^2") is True


def test_an_interrupted_comparison_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = mathematics.Mathematics()
    assert comparison("x", "x")

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        comparison("x", "x")
    monkeypatch.undo()
    assert comparison("x", "y") is False


def test_without_math_verify(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "comparison.py").write_text("import no_such_module")
    monkeypatch.setattr(mathematics, "COMPARISON", tmp_path / "comparison.py")
    with pytest.raises(UserError, match=r"^math_equal cannot import math_verify: pip install math-verify$"):
        mathematics.Mathematics()("x", "x")


@pytest.mark.parametrize(
    ("gold", "expected"),
    [("2x+1", True), ("(3, 4)", True), ("\\text{even}", True), ("\\sin x", True), ("x", True), ("", False)]
    + [(x, False) for x in ("Paris", "no number at all", "it is so", "yes and no")],
)
def test_what_a_formula_is(gold: str, expected: bool) -> None:
    assert mathematics.is_formula(gold) is expected
