"""Values and errors in a message of one line."""

import pytest

from policygrad.errors import ending, listed, one_line, shortened, type_of, within


def test_what_is_short_stays_and_what_is_long_is_as_long_as_it_may_be() -> None:
    assert shortened("a") == "'a'"
    assert shortened("a" * 99, 10) == "'aaaaaa..."
    assert ending("/a/b.py") == "/a/b.py"
    assert ending("/far/away" * 9, 10) == "...ar/away"
    assert listed(["a", "b"]) == "a, b"
    assert listed(["abc"] * 9, 10) == "abc, ab..."


def test_an_error_is_one_line() -> None:
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(ValueError()) == "ValueError"
    assert one_line(ValueError("a " * 99), 10) == "a a a a..."


def test_an_error_that_cannot_be_shown_is_its_type() -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert one_line(Unprintable()) == "Unprintable"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("mend this", "mend this"),
        ("two\n  lines", "two lines"),
        (
            "a null \0, an escape \x1b[31m and half a pair \udcff",
            r"a null \x00, an escape \x1b[31m and half a pair \udcff",
        ),
        ("日本語 é", "日本語 é"),
        ("a" * 200, "a" * 200),
        ("a" * 150 + "b" * 150, "a" * 97 + " ... " + "b" * 97),
    ],
)
def test_a_message_is_one_printable_line_that_keeps_its_end(message: str, said: str) -> None:
    assert within(message) == said


def test_the_repr_of_an_object_is_one_line() -> None:
    class Table:
        def __repr__(self) -> str:
            return "   a\n0  1\n1  2"

    class Unprintable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert shortened(Table()) == "a 0  1 1  2"
    assert shortened("two  spaces\nand a break") == "'two  spaces\\nand a break'"
    assert shortened(Unprintable()) == "Unprintable"


def test_a_type_has_its_article() -> None:
    assert [type_of(x) for x in ({}, 1, 1.0, OSError())] == ["a dict", "an int", "a float", "an OSError"]
