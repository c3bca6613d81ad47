"""The rows of data sets as they stand in files, in directories, on the hub, or in Python.

JSON and CSV are read by Python: Arrow would guess types, and make a time of the text "2024-01-01". Parquet has types.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from policygrad.errors import UserError, ending, listed, one_line, shortened

LARGEST_FILE = 2 * 2**30  # bytes; a file is read whole
MOST_ROWS = 10_000_000
DEEPEST = 100  # levels of lists and objects in each other
Fault = tuple[str, str]  # where it is, and what is wrong there


class Example(dict[str, Any]):
    """A row of a data set: its columns by name. It knows its number there, from 0, and which data set it is of."""

    number: int = 0
    source: int = 0  # the place of its data set among those given
    origin: str = ""  # the name of its data set, if there are several

    @property
    def place(self) -> str:
        """Where it comes from, for messages."""
        return f"row {self.number}" + (f" of {ending(self.origin, 30)}" if self.origin else "")


def read(source: Any, split: str = "train") -> list[Example]:
    """The rows of a data set.

    source: a .json, .jsonl, .csv or .parquet file, which is one split; a directory of such files, or one that
    `datasets` saved; a data set on the Hugging Face hub, as `name` or `name:configuration`; or, from Python, a list of
    dicts or a `datasets.Dataset`. split: its name, or a slice such as train[:100] or train[:10%].

    Raises UserError if the source cannot be read or is empty.
    """
    shown = ending(str(source), 80) if isinstance(source, str | Path) else "the data"
    try:
        with _without_progress_bars():
            examples = _read_path(str(source), split) if isinstance(source, str | Path) else _from_python(source, split)
    except UserError:
        raise
    except ConnectionError as error:  # from `datasets`, for a name on the hub
        raise UserError(
            f"there is no file or directory {shown}, and the hub cannot be reached: check the name and the network"
        ) from error
    except Exception as error:
        raise _unreadable(shown, error.__cause__ or error) from error
    if not examples:
        raise UserError(f"{shown} is empty: give at least one row")
    return examples


def refuse(faults: Sequence[Fault], advice: str) -> None:
    """Raise UserError about all faults at once, if there are any: the first one, and how many more there are."""
    if not faults:
        return
    count = len(faults) - 1
    others = f" (and {count:,} more row{'s' if count > 1 else ''})" if count else ""
    (where, wrong), end = faults[0], f"{others}: {advice}"
    raise UserError(f"{where} " + one_line(wrong, 199 - len(where) - len(end)) + end)


def _read_path(source: str, split: str) -> list[Example]:
    path, shown = Path(os.path.expanduser(source)), ending(source, 80)
    try:
        mode = path.stat().st_mode
    except ValueError:  # a null byte
        raise UserError(f"there is no file {shortened(source)}: check the path") from None
    except (FileNotFoundError, NotADirectoryError):
        if path.suffix.lower() in READERS:
            raise UserError(f"there is no file {shown}: check the path") from None
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
            raise UserError(f"there is no file or directory {shown}: check the path") from None
        name, _, configuration = source.partition(":")
        return _read_with_datasets(name, configuration or None, split)
    if stat.S_ISREG(mode):
        if path.suffix.lower() not in READERS:
            raise UserError(f"{shown} cannot be read: give a file that ends in {', '.join(READERS)}")
        rows = read_file(path, path.suffix.lower())
        return _of_split(split, lambda name: rows)
    if not stat.S_ISDIR(mode):
        raise UserError(f"{shown} is a pipe or a device, not a file: write its rows to a file first")
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        import datasets

        return _from_python(datasets.load_from_disk(str(path)), split, shown)
    return _read_with_datasets(str(path), None, split)


def read_file(path: Path, kind: str, **options: Any) -> list[Example]:
    """The rows of a file of a kind, one of READERS."""
    if not path.is_file():
        raise UserError(f"{ending(str(path), 80)} is not a file: give one")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise UserError(
            f"{ending(str(path), 80)} has {size / 2**30:.1f} GiB, and a file is read whole, up to "
            f"{LARGEST_FILE / 2**30:.1f} GiB: split it"
        )
    try:
        return _numbered(READERS[kind](path, **options) if size else [])
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(ending(str(path), 80), error) from error


def _json(path: Path) -> list[dict[str, Any]]:
    """One list of rows; or one row a line."""
    text = _text(path)
    try:
        rows = _parsed(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _jsonl(path)
    return _objects(rows if isinstance(rows, list) else [rows])


def _jsonl(path: Path) -> list[dict[str, Any]]:
    """One row a line."""
    rows, faults = [], []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(_parsed(line))
            except (ValueError, RecursionError) as error:
                faults.append((f"{ending(str(path))} cannot be read: line {number}", f"is no JSON: {_said(error)}"))
    refuse(faults, "fix the file, or give another source")
    return _objects(rows)


def _objects(rows: list[Any]) -> list[dict[str, Any]]:
    faults = [(f"row {i}", f"is {shortened(row)}") for i, row in enumerate(rows) if not isinstance(row, dict)]
    refuse(faults, 'give objects, such as {"prompt": ..., "answer": ...}')
    return rows


def _parsed(text: str) -> Any:
    """JSON as Python's values; integers are exact. Raises ValueError for what JSON does not have, such as NaN."""
    value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_distinct)
    if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
        raise RecursionError
    if re.search(r"\\ud[89a-f]", text, re.IGNORECASE):
        json.dumps(value, ensure_ascii=False).encode()  # raises for half of a pair, which is no character
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write null")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is too large for a number; write it as text")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{_repeated(name for name, _ in pairs)!r} stands twice in an object")
    return found


def _depth(value: Any) -> int:
    """How many lists and objects stand in each other."""
    depth, level = 0, [value]
    while level:
        inner = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
        depth += 1
    return depth


def _csv(path: Path, *, separator: str = ",") -> list[dict[str, Any]]:
    """Rows below a header. Every column is text; an empty field is None."""
    limit = csv.field_size_limit(LARGEST_FILE)
    try:
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=separator, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            name = _repeated(header)
            raise UserError(f"{ending(str(path))} has two columns {shortened(name)}: give each a name of its own")
        rows, faults = [], []
        for row in reader:
            if row and len(row) != len(header):
                line = f"{ending(str(path))} cannot be read: line {reader.line_num}"
                faults.append((line, f"has {len(row)} fields, and the header {len(header)}"))
            elif row:
                rows.append({name: field or None for name, field in zip(header, row, strict=True)})
    finally:
        csv.field_size_limit(limit)
    refuse(faults, "quote fields that have commas or line breaks")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    """The rows with their own types: dates, decimals, whole numbers."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        names, count = file.schema_arrow.names, file.metadata.num_rows
        if len(set(names)) < len(names):
            name = _repeated(names)
            raise UserError(f"{ending(str(path))} has two columns {shortened(name)}: give each a name of its own")
        if count > MOST_ROWS:
            raise UserError(f"{ending(str(path))} has {count:,} rows, and at most {MOST_ROWS:,} are read: split it")
        return _without_gaps(file.read().to_pylist())


READERS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{ending(str(path))} is not UTF-8 (byte {error.object[error.start]:#x} at {error.start:,}): save it as "
            "UTF-8"
        ) from error


def _read_with_datasets(source: str, configuration: str | None, split: str) -> list[Example]:
    """A directory or a data set on the hub: `datasets` finds the files, and the readers of this module read them."""
    import datasets

    local = os.path.isdir(source)
    with tempfile.TemporaryDirectory() if local else contextlib.nullcontext() as cache:  # the files may change
        builder = datasets.load_dataset_builder(source, configuration, cache_dir=cache)
        files: Mapping[Any, Sequence[str]] = builder.config.data_files or {}
        if local and not all(_inside(file, source) for found in files.values() for file in found):
            raise UserError(f"{ending(source)} names files outside of itself: give the files")
        if f".{builder.name}" not in READERS or getattr(builder.config, "field", None):
            return _from_python(datasets.load_dataset(source, configuration, split=split, cache_dir=cache), split)
        options = {"separator": builder.config.delimiter or builder.config.sep} if builder.name == "csv" else {}

        def rows_of(name: str) -> list[Example]:
            _require_split(name, map(str, files), source)
            places = datasets.DownloadManager().download_and_extract(list(files[name]))
            return _numbered(row for place in places for row in read_file(Path(place), f".{builder.name}", **options))

        return _of_split(split, rows_of)


def _inside(file: str, directory: str) -> bool:
    return os.path.abspath(file).startswith(os.path.join(os.path.abspath(directory), ""))


def _from_python(data: Any, split: str, shown: str = "the data") -> list[Example]:
    """Rows, or a data set of `datasets`."""
    import datasets

    if isinstance(data, datasets.DatasetDict):

        def rows_of(name: str) -> list[Example]:
            _require_split(name, data, shown)
            return _from_python(data[name], split)

        return _of_split(split, rows_of)
    if isinstance(data, datasets.Dataset):
        return _numbered(_without_gaps(data.to_list()))
    if not isinstance(data, Sequence) or not all(isinstance(row, Mapping) for row in data):
        raise UserError(f"{shown} is {shortened(data)}: give a file, a list of dicts, or a datasets.Dataset")
    return _numbered(data)


def _of_split(split: str, rows_of: Callable[[str], list[Example]]) -> list[Example]:
    """The rows that a split names: `train`, slices of it, and several with + between them."""
    import datasets

    names = {re.split(r"[\[(]", part)[0].strip() for part in split.split("+")}
    rows = {name: rows_of(name) for name in names}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(x) for name, x in rows.items()})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"the split {shortened(split)} cannot be taken: {one_line(error, 60)}; try train[:100]"
        ) from error
    found = [row for part in parts for row in rows[part.splitname][part.from_ : part.to]]
    if not found and any(rows.values()):
        raise UserError(
            f"the split {shortened(split)} has no rows, of {sum(map(len, rows.values())):,}: try train[:100]"
        )
    return found


def _require_split(name: str, known: Iterable[str], source: str) -> None:
    known = list(known)
    if name not in known:
        raise UserError(f"{ending(source)} has no split {shortened(name, 40)}: give one of {listed(known)}")


def _numbered(rows: Iterable[Mapping[str, Any]]) -> list[Example]:
    examples = [Example(row) for row in rows]
    for number, example in enumerate(examples):
        example.number = number
    return examples


def _without_gaps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows from Arrow, their messages without the fields that it adds with None because another message has them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(x) for name, x in value.items() if x is not None}
        return [plain(x) for x in value] if isinstance(value, list) else value

    def of_messages(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(isinstance(x, dict) and "role" in x for x in value)

    return [{name: plain(x) if of_messages(x) else x for name, x in row.items()} for row in rows]


def _repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]


def _said(error: BaseException) -> str:
    """What a reader says about an error."""
    if isinstance(error, RecursionError):
        return f"lists and objects stand in each other more than {DEEPEST} deep"
    if isinstance(error, UnicodeEncodeError):
        return "it has half of a surrogate pair, which is no character"
    return str(error)


def _unreadable(shown: str, error: BaseException) -> UserError:
    start, end = f"{shown} cannot be read: ", "; fix the file, or give another source"
    return UserError(start + one_line(_said(error), 200 - len(start) - len(end)) + end)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """`datasets` without its progress bars and its log; errors are raised all the same."""
    import datasets

    shown, level = datasets.is_progress_bar_enabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
