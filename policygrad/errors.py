"""Exceptions that the user can fix, and texts short enough to quote in their messages of one line.

The command line prints the message in one line and exits with code 2.
"""

from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A request that cannot be carried out. The message says in one line what is wrong and how to change it."""


class NonFiniteError(UserError):
    """A number is NaN or infinite. It is raised before the parameters change.

    evidence: the numbers around it by name: the batch of an update, or the step of the environments.
    """

    evidence: Any = None


class Kept(str):
    """A note on the exception that stopped a run: what is saved of it, and where."""


class Note(UserWarning):
    """Something that the user should know and that stops nothing, in one line."""


def one_line(thing: Any, length: int = 100) -> str:
    """An error's message, or any object as text, in one line of at most `length` characters."""
    try:
        said = " ".join(str(thing).split()) or type(thing).__name__
    except Exception:  # an object of the user's may not be printable
        said = type(thing).__name__
    return said if len(said) <= length else said[: length - 3] + "..."


def within(message: str, length: int = 200) -> str:
    """A message as one printable line. A long one loses its middle, because its end says what to change."""
    said = "".join(x if x.isprintable() else repr(x)[1:-1] for x in " ".join(message.split()))
    half = (length - 5) // 2
    return said if len(said) <= length else f"{said[:half]} ... {said[-half:]}"


def shortened(value: Any, length: int = 60) -> str:
    """The repr of a value, as one line of at most `length` characters."""
    try:
        said = " ".join(line.strip() for line in repr(value).splitlines())
    except Exception:  # an object of the user's may not be printable
        said = type(value).__name__
    return said if len(said) <= length else said[: length - 3] + "..."


def type_of(value: Any) -> str:
    """The name of a value's type, with its article: a Box, an Independent."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeio' else 'a'} {name}"


def ending(name: str, length: int = 60) -> str:
    """A name or path, or the end of a long one."""
    return name if len(name) <= length else "..." + name[3 - length :]


def listed(names: Iterable[str], length: int = 60) -> str:
    """Names with commas between them, in at most `length` characters."""
    said = ", ".join(names)
    return said if len(said) <= length else said[: length - 3] + "..."
