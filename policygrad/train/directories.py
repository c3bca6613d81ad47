"""Where runs go. No torch here: the command line names a directory before there is work to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from policygrad.errors import UserError


def file_name(name: str) -> str:
    """A name with nothing in it that a file system could mind."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def free_directory(directory: Path) -> Path:
    """A new directory of that name, or with -2, -3, ... where there is one. It is made here, so no other run takes it.

    Raises UserError where none can be made.
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
    """The directory of a run: the one given, or a new one that is gone again if nothing was written to it."""
    if given is not None:
        yield given
        return
    above = [path for path in default.parents if not path.exists()]
    directory = free_directory(default)
    try:
        yield directory
    finally:
        with suppress(OSError):  # where something is in it
            for path in (directory, *above):
                path.rmdir()
