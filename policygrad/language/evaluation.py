"""What a trained model's answers are reported as: pass@k, a table of samples, and a file of all of them."""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Int
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from policygrad.errors import UserError
from policygrad.language.rewards import text_of

Row = dict[str, Any]  # prompt, completion, reward, cut, and what else there is
TABLE_TEXT = 240  # characters shown of a prompt or a completion


def pass_at_k(correct: Int[Tensor, " N"], samples: int, k: int) -> float:
    """pass@k = E[1 - C(n - c, k) / C(n, k)]: the probability that one of k samples is right, without bias.

    correct: [N], of n = `samples` samples of each problem the number c that are right. Chen et al. 2021,
    arXiv 2107.03374, eq. 1; in whole numbers, so that nothing cancels or overflows.
    """
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} cannot be estimated from {samples} samples a problem: k is between 1 and {samples}")
    counts = correct.tolist()
    if not counts:
        raise UserError("pass@k is a mean over problems, and there are none: evaluate at least one")
    wrong = [c for c in counts if not 0 <= c <= samples]
    if wrong:
        raise UserError(f"of {samples} samples of a problem {wrong[0]} cannot be right: count those that are")
    subsets = math.comb(samples, k)
    return math.fsum((subsets - math.comb(samples - c, k)) / subsets for c in counts) / len(counts)


def samples_table(rows: Sequence[Row], *, limit: int, console: Console | None = None) -> None:
    """Print the first `limit` samples; long texts lose their middle, and newlines are shown as ⏎."""
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


def write_samples(path: Path | str, rows: Sequence[Row]) -> None:
    """Write samples as JSON, one a line; beside the file and moved there, so that a crash leaves the one before.

    NaN and infinity, which JSON lacks, are written as null.
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
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def _shown(said: Any) -> str:
    """A text, or a conversation, on one line, without control characters and without the middle if it is long."""
    if not isinstance(said, str) and len(said) > 1:
        said = "\n".join(f"{message['role']}: {message['content']}" for message in said)
    text = text_of(said).replace("\n", "⏎").replace("\t", " ")
    text = "".join(character if character.isprintable() else "�" for character in text)
    half = (TABLE_TEXT - 3) // 2
    return text if len(text) <= TABLE_TEXT else f"{text[:half]} … {text[-half:]}"


def _number(reward: float | None) -> str:
    return "-" if reward is None or math.isnan(reward) else f"{reward:.3g}"


def _plain(value: Any) -> Any:
    """A value in terms of JSON; tensors and arrays as lists, and what JSON has no word for as text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): _plain(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
