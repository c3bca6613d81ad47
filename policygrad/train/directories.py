"""Run directories. No torch here: the command line names a directory before there is work to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from policygrad.errors import UserError, ending

with suppress(ImportError):  # not on every system
    import fcntl

CLAIM = "metrics.jsonl"  # the first file of a run: who creates it has the directory
STUDY = "study.json"  # what the runs of a study have in common, in the directory that has theirs
LOCK = ".lock"  # who writes there holds a lock on it


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
        raise _unwritable(directory, error) from error


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


def check_empty(directory: Path | None) -> None:
    """Raise UserError for a directory that is not empty, or for a file."""
    if directory is not None and not directory.is_dir() and (directory.exists() or directory.is_symlink()):
        raise UserError(f"{ending(str(directory), 100)} is a file: choose another directory")
    if directory is not None and directory.is_dir() and any(directory.iterdir()):
        raise UserError(
            f"{ending(str(directory), 100)} is not empty, and nothing is overwritten: choose another directory"
        )


def claim(directory: Path) -> list[Path]:
    """Create a directory, or take an empty one, for one run alone: of two processes one gets it.

    Returns the directories that it has created. Raises UserError if it is not empty or cannot be written.
    """
    try:
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        check_empty(directory)
        (directory / CLAIM).open("x").close()
        return made
    except FileExistsError as error:
        raise UserError(
            f"{ending(str(directory), 100)} was taken by another run just now: choose another directory"
        ) from error
    except OSError as error:
        raise _unwritable(directory, error) from error


def release(directory: Path, made: list[Path], names: tuple[str, ...] = ()) -> None:
    """Remove what a run that never began has written (`names`), its claim, and the directories made for it."""
    with suppress(OSError):
        for path in sorted((x for name in (CLAIM, *names) for x in directory.glob(name)), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        for path in made:
            path.rmdir()


class Lock:
    """The right to write to a run's directory, until it is released or the process is gone, however that ends.

    The lock is the process's alone: children that outlive it do not have it. Raises UserError if another run holds it.
    """

    held: ClassVar[set[Path]] = set()  # by this process, which the system's locks do not keep apart

    def __init__(self, directory: Path) -> None:
        self.path = directory.resolve() / LOCK
        taken = UserError(f"{ending(str(directory), 100)} is being written by another run: wait for it, or stop it")
        if self.path in Lock.held:
            raise taken
        try:
            self.file = self.path.open("a")
        except OSError as error:
            raise _unwritable(directory, error) from error
        try:
            if "fcntl" in globals():
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self.file.close()
            raise taken from error
        except OSError:  # a file system without locks
            pass
        Lock.held.add(self.path)

    def release(self) -> None:
        """Let others write there."""
        if not self.file.closed:
            self.file.close()
            Lock.held.discard(self.path)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.release()


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(f"the directory {ending(str(directory), 80)} cannot be written ({error.strerror}): choose another")
