"""Read and write the files of a run or model directory.

What comes from elsewhere is data: a file's kind, place and size are checked before it is read. Nothing is unpickled.
"""

import hashlib
import json
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load
from torch import Tensor

from policygrad.errors import UserError, ending, one_line, shortened

LARGEST_JSON = 64 * 2**20  # bytes; the largest tokenizers have some 30 MB
DEEPEST_JSON = 32  # levels of lists and objects
LONGEST = 200  # characters of a message
# The types of tensors that safetensors has, by its names.
TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint64: "U64", torch.uint32: "U32",
    torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def as_path(place: Any) -> Path:
    """A path that the system can have. Raises UserError."""
    if not isinstance(place, str | os.PathLike) or "\0" in str(place) or not str(place):
        raise UserError(f"{shortened(place)} is no path: give the name of a directory")
    return Path(place)


def check_file(path: Path, within: Path, largest: int | float = float("inf")) -> None:
    """Raise UserError unless `path` is a regular file of at most `largest` bytes.

    A link may lead anywhere inside the directory `within`, and not out of it.
    """
    try:
        known = path.stat()
        inside = path.resolve().is_relative_to(within.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise damaged(path, str(getattr(error, "strerror", None) or one_line(error)), "cannot be read") from error
    if not stat.S_ISREG(known.st_mode):
        raise damaged(path, "it is not a regular file")
    if not inside:
        raise damaged(path, "it is a link out of its directory")
    if known.st_size > largest:
        raise damaged(path, f"it has {known.st_size:,} bytes, and at most {largest:,} are read")


def read_json(path: Path, within: Path | None = None) -> Any:
    """The content of a JSON file, as the standard has it: no NaN, no infinity. Raises UserError."""
    check_file(path, within or path.parent, LARGEST_JSON)
    try:
        return parse_json(path.read_bytes())
    except OSError as error:
        raise damaged(path, one_line(error), "cannot be read") from error
    except ValueError as error:
        raise damaged(path, one_line(error)) from error


def parse_json(text: str | bytes, *, finite: bool = True) -> Any:
    """One JSON value. Raises ValueError for what is not JSON, and for more than DEEPEST_JSON levels.

    finite: refuse NaN and infinity, which are not in the standard; some models' settings have them.
    """
    try:
        content = json.loads(text, parse_constant=_refused if finite else None)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [content]
    for _ in range(DEEPEST_JSON):
        level = [x for outer in level if isinstance(outer, dict | list) for x in _inside(outer)]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


def read_tensors(path: Path, within: Path | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, all of them finite, and its metadata. Raises UserError."""
    metadata = read_metadata(path, within)
    try:
        tensors = load(path.read_bytes())  # load_file maps it, and a file that shrinks later would end the process
        bad = next((name for name, x in tensors.items() if not x.isfinite().all()), None)
    except Exception as error:  # safetensors has its own exceptions, and torch others for types that it lacks
        raise damaged(path, one_line(error)) from error
    if bad is not None:
        raise damaged(path, f"{bad[:60]!r} is not finite")
    return tensors, metadata


def read_metadata(path: Path, within: Path | None = None) -> dict[str, str]:
    """The metadata of a safetensors file. Raises UserError if the file's header is not sound."""
    check_file(path, within or path.parent)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # of safetensors' own kind
        raise damaged(path, one_line(error)) from error


def check_directory(directory: Path, within: Path) -> None:
    """Check every file of a model directory that another library will read. Raises UserError."""
    try:
        paths = sorted(directory.iterdir())
    except OSError as error:
        raise damaged(directory, error.strerror or one_line(error), "cannot be read") from error
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            continue  # no library looks for weights or settings below
        check_file(path, within)
        if path.suffix == ".safetensors":
            read_metadata(path, within)
        elif path.suffix in (".json", ".jinja"):
            check_file(path, within, LARGEST_JSON)
        if path.suffix == ".json":
            try:
                content = parse_json(path.read_bytes(), finite=False)
            except ValueError as error:
                raise damaged(path, one_line(error)) from error
            parts = content.get("weight_map") if isinstance(content, dict) else None
            if isinstance(parts, dict) and any(Path(str(name)).name != name for name in parts.values()):
                raise damaged(path, "it names weights outside its directory")


def damaged(path: Path, why: str, what: str = "is damaged") -> UserError:
    """The error of a file that cannot be used."""
    return UserError(f"{ending(str(path), 80)} {what}: {why}"[:LONGEST])


def check_real(directory: Path) -> None:
    """Raise UserError if a directory holds a link, a pipe or a device, which leads out of it."""
    for folder, names, files in os.walk(directory):
        for name in (*names, *files):
            path = Path(folder, name)
            try:
                mode = path.lstat().st_mode
            except OSError:  # it is gone
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise damaged(path, "it is no regular file, and may lead out of the directory: put a file in its place")


def beside(path: Path) -> Path:
    """Where to write what is renamed to `path` when it is whole. What stands there, such as a link, is removed."""
    temporary = path.with_name(path.name + ".new")
    temporary.unlink(missing_ok=True)
    return temporary


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it, so that a crash leaves the old file. Raises OSError."""
    temporary = beside(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # room for others, if the disk is full
        raise


def write_durably(path: Path, parts: Iterable[Any]) -> tuple[int, str]:
    """As write_bytes, and on the disk itself before this returns. parts: what has bytes, written one after another.

    Returns the size and the SHA-256 of the file. Raises OSError.
    """
    temporary, digest, size = beside(path), hashlib.sha256(), 0
    try:
        with temporary.open("wb") as file:
            for part in parts:
                digest.update(part)
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name, too
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    return size, digest.hexdigest()


def as_safetensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[Any]:
    """The parts of a safetensors file: its header, then one tensor after another, with one copy at a time."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name, x in tensors.items():
        end = place + x.numel() * x.element_size()
        header[name] = {"dtype": TYPES[x.dtype], "shape": list(x.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors begin where torch's own do, at a multiple of 64 bytes
    yield struct.pack("<Q", len(text)) + text
    for x in tensors.values():
        yield bytes_of(x)


def bytes_of(x: Tensor) -> memoryview:
    """The bytes of a tensor, in order."""
    if not x.numel():  # which has no strides to view
        return memoryview(b"")
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def add_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Add metadata to a safetensors file, atomically. Its tensors stay as they are."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = header.get("__metadata__", {}) | metadata
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)  # tensors begin where torch's own do, at a multiple of 64 bytes
        temporary = beside(path)
        try:
            with temporary.open("wb") as copy:
                copy.write(struct.pack("<Q", len(text)) + text)
                while part := file.read(2**24):
                    copy.write(part)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _inside(outer: Any) -> Any:
    return outer.values() if isinstance(outer, dict) else outer


def _refused(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")
