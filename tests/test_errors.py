"""Values and errors in a message of one line."""

from policygrad.errors import ending, listed, one_line, shortened


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
