"""What a formula is made of."""

import pytest
from math_verify import parse

from policygrad.language.rewards.comparison import equal, kinds


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("x^2+2x+1", set()),
        ("(x+1)^2", set()),
        ("\\frac{3\\pi}{4}", set()),
        ("-x", set()),
        ("7+5", {"arithmetic"}),
        ("x+7+5", {"arithmetic"}),
        ("2 \\cdot 3", {"arithmetic"}),
        ("2^{10}", {"arithmetic"}),
        ("\\pi + 1 - 1", {"arithmetic"}),
        ("\\sqrt{2}", {"root"}),
        ("\\sqrt{1+1}", {"root", "arithmetic"}),
        ("\\frac{1}{x}", {"quotient"}),
        ("\\sin x + \\cos x", {"trigonometric"}),
        ("\\log x", {"exponential"}),
        ("\\int_0^1 x dx", {"Integral"}),
        ("3!", {"factorial"}),
        ("(1+2, 4)", {"arithmetic"}),
    ],
)
def test_kinds(formula: str, expected: set[str]) -> None:
    assert kinds(parse(f"${formula}$", parsing_timeout=None)[0]) == expected


def test_an_equal_formula_of_more_kinds_is_not_the_answer() -> None:
    assert equal("x+12", "12+x") is True
    assert equal("x+12", "x+7+5") is False
    assert equal("x+7+5", "x+12") is True
    assert equal("x", "y") is False
    assert equal("", "x") is None
