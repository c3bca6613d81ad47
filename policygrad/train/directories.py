"""Run directories. No torch here: the command line names a directory before there is work to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from policygrad.errors import UserError


def file_name(name: str) -> str:
    """The name with only characters that are safe in a file name, and at most 100 of them."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]


def free_directory(directory: Path) -> Path:
    """Create a new directory of that name, or with -2, -3, ... if it exists, so that no other run can take it.

    Raises UserError if the directory cannot be created.
    """
    number, candidate = 1, directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        while True:
            with suppress(FileExistsError):
                candidate.mkdir()
                return candidate
            number += 1
            candidate = directory.with_name(f"{directory.name}-{number}")
    except OSError as error:
        raise UserError(f"the directory {directory} cannot be written ({error.strerror}): choose another") from error


@contextmanager
def run_directory(given: Path | None, default: Path) -> Iterator[Path]:
    """The directory of a run: the given one, or a new one, which is removed again if it stays empty."""
    if given is not None:
        yield given
        return
    above = [path for path in default.parents if not path.exists()]
    directory = free_directory(default)
    try:
        yield directory
    finally:
        with suppress(OSError):  # not empty
            for path in (directory, *above):
                path.rmdir()
