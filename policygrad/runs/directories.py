"""Where runs go. No torch here: the command line names a directory before there is work to do."""

import re
from pathlib import Path


def file_name(name: str) -> str:
    """A name with nothing in it that a file system could mind."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


def free_directory(directory: Path) -> Path:
    """The directory, or with -2, -3, ... where it holds a run already."""
    number, candidate = 1, directory
    while candidate.exists():
        number += 1
        candidate = directory.with_name(f"{directory.name}-{number}")
    return candidate
