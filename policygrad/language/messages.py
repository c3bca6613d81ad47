"""Values and errors of others, short enough to quote in a message of one line."""

from collections.abc import Iterable
from typing import Any


def shortened(value: Any, length: int = 60) -> str:
    """The repr of a value in at most `length` characters."""
    said = repr(value)
    return said if len(said) <= length else said[: length - 3] + "..."


def one_line(error: BaseException, length: int = 100) -> str:
    """The message of an error, in one line of at most `length` characters."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= length else said[: length - 3] + "..."


def ending(name: str, length: int = 60) -> str:
    """A name or path, or the end of a long one."""
    return name if len(name) <= length else "..." + name[3 - length :]


def listed(names: Iterable[str], length: int = 60) -> str:
    """Names with commas between them, in at most `length` characters."""
    said = ", ".join(names)
    return said if len(said) <= length else said[: length - 3] + "..."
