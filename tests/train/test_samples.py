"""Samples for people: the table and the file."""

import json
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from policygrad.errors import UserError
from policygrad.train.samples import read_examples, samples_table, write_examples, write_samples


def printed(rows: list[dict[str, Any]], limit: int = 10, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    samples_table(rows, limit=limit, console=console)
    return console.export_text()


def row(**values: Any) -> dict[str, Any]:
    return {"prompt": "1+1=", "completion": "2", "reward": 1.0, "cut": False, **values}


def test_the_table_shows_the_first_samples() -> None:
    text = printed([row(prompt=f"number {i}") for i in range(5)], limit=2)
    assert "number 1" in text
    assert "number 2" not in text
    assert printed([row()], limit=0) == printed([], limit=3) == ""


def test_the_table_shows_what_is_written_and_not_what_it_would_do() -> None:
    text = printed([row(prompt="[bold]a[/bold] [/]", completion="one\ntwo\x1b[31m", reward=0.25)])
    assert "[bold]a[/bold] [/]" in text
    assert "one⏎two�[31m" in text
    assert "0.25" in text


def test_the_table_shortens_long_texts_in_the_middle() -> None:
    text = "".join(printed([row(completion="start" + "x" * 5000 + "end")], width=400).split())
    assert "startxxx" in text
    assert "xxxend" in text
    assert "x…x" in text
    assert text.count("x") < 300


def test_the_table_has_a_column_for_cut_samples_if_there_are_any() -> None:
    assert "cut" not in printed([row()])
    assert printed([row(), row(cut=True)]).count("cut") == 2


def test_the_table_of_conversations_and_of_samples_without_a_reward() -> None:
    chat = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1"}]
    text = printed([row(prompt=chat, completion=[{"role": "assistant", "content": "so 2"}], reward=None)])
    assert "system: add⏎user: 1+1" in text
    assert "so 2" in text
    assert "assistant" not in text
    assert printed([row(reward=float("nan"))]).count("nan") == 0


def test_samples_are_written_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "samples.jsonl"
    rows = [row(completion="a\nb ü \udc80"), row(reward=float("nan"), part=torch.tensor(0.5), ids=np.array([1, 2]))]
    write_samples(path, rows)
    first, second = path.read_text().splitlines()
    assert json.loads(first) == rows[0]
    assert "ü" in first
    assert json.loads(second) == {**row(reward=None), "part": 0.5, "ids": [1, 2]}
    assert "NaN" not in second


def test_a_crash_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    write_samples(path, [row()])
    before = path.read_text()

    class Broken:
        def __str__(self) -> str:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_samples(path, [row(), row(x=Broken())])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/samples.jsonl cannot be written \((File exists|Not a directory)\): give another place"
    ):
        write_samples(tmp_path / "file" / "samples.jsonl", [row()])


EXAMPLES: list[dict[str, Any]] = [
    {"prompt": "1+1=", "answer": "007", "number": 2**60 + 1, "share": 0.1, "none": None, "yes": True},
    {"prompt": [{"role": "user", "content": "\u2028 ⏎ \ud800"}], "list": [[1], {"a": "b"}], "policygrad:date": 3},
    {"prompt": "", "day": date(2024, 2, 29), "moment": datetime(2024, 2, 29, 1, 2, 3, 4, UTC), "hour": time(5, 6)},
    {"prompt": "x", "price": Decimal("1.10"), "picture": b"\x00\xff", "deep": [{"day": date(1, 1, 1)}]},
]


def test_held_out_examples_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "held_out.jsonl"
    write_examples(path, EXAMPLES)
    found = read_examples(path)
    assert found == EXAMPLES
    assert [type(x) for row in found for x in row.values()] == [type(x) for row in EXAMPLES for x in row.values()]
    write_examples(path, [])
    assert read_examples(path) == []


@pytest.mark.parametrize(
    "line",
    ["", "[1]", "{}", '{"prompt": 3}', '{"prompt": "x"', '{"prompt": {"policygrad:date": "x"}}',
      '{"prompt": "x", "a": {"policygrad:bytes": "xyz"}}',
     '{"prompt": "x", "a": {"policygrad:Decimal": "x"}}', "[" * 1000],
)  # fmt: skip
def test_damaged_examples_are_one_line(line: str, tmp_path: Path) -> None:
    (tmp_path / "held_out.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"held_out\.jsonl is damaged") as raised:
        read_examples(tmp_path / "held_out.jsonl")
    assert "\n" not in str(raised.value)
