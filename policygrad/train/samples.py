"""Samples of a language model: a table to read, and a file with all of them."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from policygrad.errors import UserError, one_line
from policygrad.files import check_file, damaged, parse_json, write_bytes
from policygrad.language.rewards import text_of

Row = dict[str, Any]  # prompt, completion, reward, cut, and the data set's columns
HELD_OUT = "held_out.jsonl"  # the examples of a run that were held out from training
TABLE_TEXT = 240  # maximum characters shown of a prompt or a completion


def samples_table(rows: Sequence[Row], *, limit: int, console: Console | None = None) -> None:
    """Print the first `limit` samples. Long texts lose their middle; a newline appears as ⏎."""
    shown = list(rows[: max(limit, 0)])
    if not shown:
        return
    table = Table(box=box.SIMPLE_HEAD, show_lines=False, expand=False, pad_edge=False, padding=(0, 1, 1, 0))
    table.add_column("prompt", ratio=2, overflow="fold", style="dim")
    table.add_column("completion", ratio=3, overflow="fold")
    table.add_column("reward", justify="right", no_wrap=True, style="cyan")
    if any(row.get("cut") for row in shown):
        table.add_column("cut", no_wrap=True, style="yellow")
    for row in shown:
        cells = [Text(_shown(row["prompt"])), Text(_shown(row["completion"])), Text(_number(row.get("reward")))]
        table.add_row(*(cells + [Text("cut" if row.get("cut") else "")])[: len(table.columns)])
    (console or Console()).print(table)


def as_text(said: Any) -> str:
    """A text, or messages one after the other with their roles."""
    if isinstance(said, str):
        return said
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in said)


def write_samples(path: Path | str, rows: Sequence[Row]) -> None:
    """Write samples as JSON, one per line. The file is replaced in one step, so a crash leaves the old one.

    NaN and infinity become null, since JSON has neither.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for row in rows:
                file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")
        os.replace(beside, path)
    except OSError as error:
        where, said = str(path), str(error.strerror or error)
        where = where if len(where) <= 80 else "..." + where[-77:]
        raise UserError(f"{where} cannot be written ({said[:60]}): give another place, or make room") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_examples(path: Path, examples: Sequence[Row]) -> None:
    """Write the rows of a data set as JSON, one per line, atomically. `read_examples` gives the same rows."""
    write_bytes(path, "".join(json.dumps(row, default=_tagged) + "\n" for row in examples).encode())


def read_examples(path: Path) -> list[Row]:
    """The rows that write_examples wrote. Raises UserError for a file that is damaged."""
    check_file(path, path.parent)
    rows: list[Row] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = _untagged(parse_json(line, finite=False))
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
                raise ValueError(f"row {len(rows)} has no prompt")
            rows.append(row)
    except (ValueError, TypeError, ArithmeticError, OSError) as error:
        raise damaged(path, one_line(error)) from error
    return rows


# Values of Parquet files and of the hub that JSON lacks: to text and back, each under its name.
_KINDS: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "datetime": (datetime, datetime.isoformat, datetime.fromisoformat),
    "date": (date, date.isoformat, date.fromisoformat),
    "time": (time, time.isoformat, time.fromisoformat),
    "Decimal": (Decimal, str, Decimal),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}


def _tagged(value: Any) -> Any:
    """A value that JSON lacks as {"policygrad:KIND": text}; arrays become lists, and anything else becomes text."""
    for name, (kind, write, _) in _KINDS.items():
        if isinstance(value, kind):
            return {f"policygrad:{name}": write(value)}
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _untagged(value: Any) -> Any:
    if isinstance(value, list):
        return [_untagged(x) for x in value]
    if isinstance(value, dict):
        kind = next(iter(value), "").removeprefix("policygrad:") if len(value) == 1 else ""
        if kind in _KINDS and next(iter(value)) != kind:
            return _KINDS[kind][2](value[f"policygrad:{kind}"])
        return {name: _untagged(x) for name, x in value.items()}
    return value


def _shown(said: Any) -> str:
    """A text or a conversation as one line, without control characters, and without its middle if it is long."""
    text = (
        (text_of(said) if isinstance(said, str) or len(said) < 2 else as_text(said))
        .replace("\n", "⏎")
        .replace("\t", " ")
    )
    text = "".join(character if character.isprintable() else "�" for character in text)
    half = (TABLE_TEXT - 3) // 2
    return text if len(text) <= TABLE_TEXT else f"{text[:half]} … {text[-half:]}"


def _number(reward: float | None) -> str:
    return "-" if reward is None or math.isnan(reward) else f"{reward:.3g}"


def _plain(value: Any) -> Any:
    """A value for JSON: tensors and arrays become lists, and anything that JSON cannot hold becomes text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
