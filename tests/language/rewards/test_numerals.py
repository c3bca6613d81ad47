"""Reading one number. The forms that people write, and what is none, are tables in test_builtin.py."""

from fractions import Fraction

import pytest

from policygrad.language.rewards.numerals import Number, number, plain, same


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("1,234.50", Fraction(2469, 2)),
        ("-\\frac{3}{4}", Fraction(-3, 4)),
        ("1\\frac12", Fraction(3, 2)),
        ("1.5 \\times 10^{-3}", Fraction(3, 2000)),
        ("0.1\\overline{6}", Fraction(1, 6)),
        ("2 million", 2_000_000),
        ("72%", 72),
        ("x = 7 + 5 = 12 apples", 12),
        ("7 + 5", None),
        ("12 or 13", None),
        ("not 12", None),
        ("1/0", None),
        ("1e999999999", None),
        ("9" * 10_000, None),
    ],
)
def test_the_number_that_a_sentence_states(text: str, value: Fraction | None) -> None:
    found = number(text)
    assert (found and found.value) == value


def test_a_percentage_is_met_by_its_number_and_by_its_value() -> None:
    half = Number(Fraction(50), percent=True)
    assert all(same(half, Number(x)) and same(Number(x), half) for x in (Fraction(50), Fraction(1, 2)))
    assert same(half, half)
    assert not same(half, Number(Fraction(1, 2), percent=True))
    assert not same(half, Number(Fraction(5)))


def test_a_fraction_without_an_end_is_met_by_six_digits_of_it() -> None:
    third = number("1/3")
    assert third is not None
    for text, expected in {"0.333333": True, "0.33333": False, "0.333334": False, "0.3333333333": True}.items():
        said = number(text)
        assert said is not None
        assert same(third, said) is expected
    exact, near = number("1234567.89"), number("1234567.9")
    assert exact is not None
    assert near is not None
    assert not same(exact, near), "a decimal with an end is exact"


def test_plain_text() -> None:
    assert plain("**$\\frac{1}{2}$**").split() == ["1/2"]
    assert plain("1\u202f234") == "1,234"
