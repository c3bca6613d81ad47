"""Checkpoints of whole runs, in RUN/checkpoints: everything that changes, so that a run goes on bit for bit.

NAME.safetensors holds the state (see states.py). NAME.json is written after it, with its size and SHA-256: a checkpoint
that is cut short or changed in one bit is noticed, and the one before it is used.
"""

import hashlib
import json
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load
from torch import Tensor

from policygrad.errors import Note, UserError, one_line
from policygrad.files import as_safetensors, bytes_of, check_file, damaged, parse_json, write_durably
from policygrad.train.states import decoded, encoded

FOLDER = "checkpoints"
FORMAT = 1
LARGEST = 4096  # bytes of a manifest


def write_checkpoint(directory: Path, state: dict[str, Any], keep: int) -> None:
    """Write the state of a run, which has its `iteration` and `steps`, and remove all but the last `keep` checkpoints.

    Whatever ends the process, the checkpoints before stay whole until this one is. Raises OSError.
    """
    folder, name = directory / FOLDER, f"{state['iteration']:09d}"
    folder.mkdir(exist_ok=True)
    tree, tensors = encoded(state)
    size, digest = write_durably(
        folder / f"{name}.safetensors", as_safetensors(tensors, {"state": json.dumps(tree, allow_nan=False)})
    )
    manifest = {"format": FORMAT, "iteration": state["iteration"], "steps": state["steps"]}
    write_durably(folder / f"{name}.json", [_text({**manifest, "size": size, "sha256": digest})])
    kept = [x for x in sorted(folder.glob("*.json")) if x.stem <= name][-keep:]
    for path in sorted(folder.iterdir()):  # a manifest comes before its tensors
        if re.fullmatch(r"\d{9,}\.(json|safetensors)(\.new)?", path.name) and path.with_suffix(".json") not in kept:
            path.unlink()


def read_checkpoint(directory: Path) -> dict[str, Any] | None:
    """The state of the last checkpoint; None if there is none. A damaged one is said, and the one before it is read.

    Raises UserError if all are damaged.
    """
    errors: list[UserError] = []
    for path in sorted((directory / FOLDER).glob("*.json"), reverse=True):
        try:
            state = _read(path, directory)
        except UserError as error:
            errors.append(error)
            continue
        for damage in errors:
            warnings.warn(f"{one_line(damage, 150)}; the one before it is used", Note, stacklevel=2)
        return state
    if errors:
        raise UserError(f"{one_line(errors[0], 120)}; there is no whole one before it: train again, or use its policy")
    return None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors, with their names, types and shapes."""
    found = hashlib.sha256()
    for name, x in tensors.items():
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(bytes_of(x))
    return found.hexdigest()


def _read(path: Path, directory: Path) -> dict[str, Any]:
    """The state of one checkpoint, by its manifest. Raises UserError if a byte is not what was written."""
    manifest, content = _manifest(path, directory), path.with_suffix(".safetensors")
    check_file(content, directory)
    try:
        held = content.read_bytes()
    except OSError as error:
        raise damaged(content, error.strerror or one_line(error), "cannot be read") from error
    if len(held) != manifest["size"]:
        raise damaged(content, f"it has {len(held):,} bytes of {manifest['size']:,}")
    if hashlib.sha256(held).hexdigest() != manifest["sha256"]:
        raise damaged(content, "its SHA-256 is not that of its manifest")
    try:
        (length,) = struct.unpack("<Q", held[:8])
        tree = parse_json(parse_json(held[8 : 8 + length])["__metadata__"]["state"])
        state = decoded(tree, load(held))
    except Exception as error:  # of a file that nothing here has written; safetensors has its own exceptions
        raise damaged(content, f"{type(error).__name__}: {one_line(error)}") from error
    if not isinstance(state, dict) or [state.get(x) for x in ("iteration", "steps")] != [*_named(manifest)]:
        raise damaged(path, "it is of another checkpoint")
    return state


def _manifest(path: Path, directory: Path) -> dict[str, Any]:
    check_file(path, directory, LARGEST)
    try:
        text = path.read_bytes()
        manifest = parse_json(text)
        if not isinstance(manifest, dict) or _text(manifest) != text:
            raise ValueError("it is not as it was written")
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is of format {one_line(manifest['format'], 20)}, and this is format {FORMAT}")
        if path.stem != f"{manifest['iteration']:09d}" or not isinstance(manifest["size"], int):
            raise ValueError("it is not of this checkpoint")
        _ = manifest["sha256"], manifest["steps"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error
    return manifest


def _named(manifest: dict[str, Any]) -> Iterator[Any]:
    return (manifest[x] for x in ("iteration", "steps"))


def _text(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=2) + "\n").encode()
