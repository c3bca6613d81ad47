"""Runs on the Hugging Face hub, read by hub:NAME as a directory of this machine.

What comes from there is data, as in any directory: FILES says what is taken, none of it is code or a pickle, and
whatever a run names beside it is believed only with `trust`. The token is huggingface_hub's own (`hf auth login`).
"""

import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

from policygrad.errors import Note, UserError, ending, one_line, shortened
from policygrad.files import as_path, check_real, write_bytes
from policygrad.train.reports import at_terminal

PREFIX = "hub:"
VIDEOS = ("video.mp4", "video.gif")
# The files of a run that are pushed, and the only ones that are read from the hub.
FILES = (
    "config.json", "policy.json", "policy.safetensors", "critic.safetensors", "summary.json", "metrics.jsonl",
    "held_out.jsonl", "curve.png", *VIDEOS, "model/*.json", "model/*.safetensors", "model/*.jinja", "model/*.txt",
    "model/*.model",
)  # fmt: skip


def on_hub(place: Any) -> bool:
    """Whether a place is a run on the hub."""
    return isinstance(place, str | os.PathLike) and str(place).startswith(PREFIX)


def directory_of(place: Any) -> Path:
    """The directory of a run that is to be read: the path, or what hub:NAME or hub:NAME@REVISION is downloaded to.

    Raises UserError.
    """
    return _fetched(str(place).removeprefix(PREFIX)) if on_hub(place) else as_path(place)


def wanted(name: str) -> bool:
    """Whether a file on the hub is one of a run's. The name is of one or two plain parts, so it leads nowhere else."""
    parts = name.split("/")
    patterns = [x.split("/") for x in FILES]
    return "\\" not in name and any(
        len(x) == len(parts) and all(map(fnmatchcase, parts, x)) and x[0] == parts[0] for x in patterns
    )


def _fetched(place: str) -> Path:
    """The directory on this machine of a run on the hub. One commit has one directory, which does not change."""
    check_installed()
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import HF_HOME

    name, at, revision = place.partition("@")
    check_name(name)
    if at and not revision:
        raise UserError(f"{PREFIX}{place} names no revision: give one after @, or leave @ out")
    base = Path(HF_HOME) / "policygrad"
    ref = base / "refs" / f"{name}@{quote(revision or 'main', safe='')}"  # the commit that it was
    try:
        with explained(f"{PREFIX}{place}", "read"):
            info = HfApi(library_name="policygrad").model_info(name, revision=revision or None)
    except UserError as error:
        known = base / _commit(ref.read_text() if ref.is_file() else "") / name
        if not isinstance(error, Unreached) or not (known / "config.json").is_file():
            raise
        warnings.warn(f"{error}; the copy on this machine is used", Note, stacklevel=3)
        return known
    names = [x.rfilename for x in info.siblings or () if wanted(x.rfilename)]
    if "config.json" not in names:
        raise UserError(f"{PREFIX}{place} holds no run: give one that policygrad push wrote")
    directory = base / _commit(str(info.sha)) / name
    if not directory.is_dir():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as new:
            for file in names:
                with explained(f"{PREFIX}{place}", "read"):
                    hf_hub_download(name, file, revision=info.sha, local_dir=new, library_name="policygrad")
            shutil.rmtree(Path(new, ".cache"), ignore_errors=True)
            check_real(Path(new))
            with suppress(OSError):  # another process was faster
                os.rename(new, directory)
            if not directory.is_dir():
                raise UserError(f"{ending(str(directory), 80)} cannot be written: make room, or set HF_HOME")
            Path(new).mkdir(exist_ok=True)  # for its removal
    with suppress(OSError):
        ref.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(ref, str(info.sha).encode())
    return directory


def _commit(sha: str) -> str:
    """A commit's name, or a name that none has."""
    return sha if re.fullmatch("[0-9a-f]{40}", sha) else "none"


class Unreached(UserError):
    """The hub cannot be asked now."""


@contextmanager
def explained(place: str, what: str) -> Iterator[None]:
    """Errors of the hub in one line, and its progress bars on a terminal alone."""
    from huggingface_hub import errors
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not at_terminal() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise UserError(f"{place} is gated: ask for access on its page, then hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{place} is not on the hub, or private: check the name, and log in by hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{place} has no such revision: give a branch, a tag or a commit that it has") from error
    except errors.OfflineModeIsEnabled as error:
        raise Unreached(f"{place} cannot be {what}: HF_HUB_OFFLINE is set") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"{place} cannot be {what} without a token: hf auth login") from error
    except Exception as error:  # of the network, too
        answer = next((x for x in (error, error.__cause__) if isinstance(x, errors.HfHubHTTPError)), None)
        if answer is not None:
            code = answer.response.status_code
            said = {401: "the hub asks for a token: hf auth login", 403: "your token has no right to it"}.get(code)
            raise UserError(f"{place} cannot be {what}: {said or f'the hub answers {code}; try again'}") from error
        raise Unreached(f"{place} cannot be {what}: {type(error).__name__}: {one_line(error, 60)}") from error
    finally:
        if quiet:
            enable_progress_bars()


def check_installed() -> None:
    """Raise UserError without huggingface_hub."""
    if find_spec("huggingface_hub") is None:
        raise UserError("the hub needs huggingface_hub: pip install policygrad[hub]")


def check_name(name: str) -> None:
    """Raise UserError for what cannot be a name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{shortened(name)} is no name on the hub: write USER/NAME") from error
