"""Data sets in every form they come in, with the values that stand in them, and what is refused."""

import csv
import datetime
import json
import logging
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from policygrad.errors import UserError
from policygrad.language import reading
from policygrad.language.reading import read

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 2 =", "answer": None}, {"prompt": "a,b", "answer": "007"}]
CHAT = [{"role": "system", "content": "add"}, {"role": "user", "content": "1 + 1"}]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a file of the form that its name ends in."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are short: those from the directory of the test."""
    monkeypatch.chdir(tmp_path)


def said(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
    return str(caught.value)


# Where the data comes from.


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_file_is_read_as_it_is_now(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    assert read(write(path, ROWS)) == ROWS
    assert read(write(path, ROWS[::-1])) == ROWS[::-1]
    assert read(str(path), split="test") == ROWS[::-1]  # a file is one split, whatever it is called
    assert read(str(path), split="train[1:]") == ROWS[:2][::-1]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_conversations_keep_their_messages_as_they_were(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": CHAT}, {"prompt": [{"role": "user", "content": "2", "name": "me"}]}]
    assert read(write(tmp_path / f"data.{suffix}", rows)) == rows


def test_csv_is_text_and_nothing_else(tmp_path: Path) -> None:
    """Guessed types would make 2 and a gap 2.0 and nan, 007 seven, and the answer NA none."""
    path = tmp_path / "data.csv"
    path.write_bytes('\ufeffprompt,answer\n1+1,2\n"a\nb",\nx,NA\ny,007\n'.encode())
    assert read(str(path)) == [
        {"prompt": "1+1", "answer": "2"},
        {"prompt": "a\nb", "answer": None},
        {"prompt": "x", "answer": "NA"},
        {"prompt": "y", "answer": "007"},
    ]


def test_directories(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "two")
    assert read(str(tmp_path / "one")) == ROWS
    assert read(str(tmp_path / "two"), split="test") == ROWS[2:]
    assert said("two", split="dev") == "two has no split 'dev': give one of train, test"
    assert read("two", split="train[1:]+test") == [ROWS[1], ROWS[2], ROWS[2]]


def test_a_directory_of_files_is_read_as_the_files_are(tmp_path: Path) -> None:
    """`datasets` only finds them: by Arrow's guess the date would be a time."""
    files = tmp_path / "files"
    files.mkdir()
    assert said("files").startswith("files cannot be read: ")
    dated = [{"prompt": "when?", "answer": "2024-01-01"}, {"prompt": "n", "answer": 2**60}, {"prompt": "m"}]
    for rows in (ROWS, dated):
        write(files / "train.jsonl", rows)
        write(files / "test.jsonl", rows[:1])
        assert read("files") == rows
        assert read("files", split="test") == rows[:1]
        assert [row.number for row in read("files", split="train[1:]")] == [1, 2]
    assert said("files", split="dev") == "files has no split 'dev': give one of train, test"


def test_a_directory_that_says_how_it_is_to_be_read(tmp_path: Path) -> None:
    (tmp_path / "set" / "main").mkdir(parents=True)
    (tmp_path / "set" / "main" / "a.csv").write_text("prompt;answer\n1,5 + 1;2,5\n")
    card = "---\nconfigs:\n- config_name: default\n  sep: ';'\n  data_files: {}\n---\n"
    (tmp_path / "set" / "README.md").write_text(card.format("main/a.csv"))
    assert read("set") == [{"prompt": "1,5 + 1", "answer": "2,5"}]
    (tmp_path / "other.csv").write_text("prompt;answer\nsecret;0\n")
    for elsewhere in ("../other.csv", str(tmp_path / "other.csv")):
        (tmp_path / "set" / "README.md").write_text(card.format(elsewhere))
        assert said("set") == "set names files outside of itself: give the files"


def test_the_hub_out_of_reach(offline: None) -> None:
    assert said("someone/data") == (
        "there is no file or directory someone/data, and the hub cannot be reached: check the name and the network"
    )


def test_files_leave_no_copy_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    read(write(tmp_path / "a.jsonl", ROWS))
    assert not cache.exists()


def test_datasets_is_quiet_and_then_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = logged.append  # type: ignore[method-assign]
    monkeypatch.setattr(logging.getLogger("datasets"), "handlers", [handler])
    datasets.enable_progress_bars()
    datasets.logging.set_verbosity_warning()
    verbosity = datasets.logging.get_verbosity()
    read(write(tmp_path / "a.jsonl", ROWS))
    (tmp_path / "bad.jsonl").write_text("{")
    said(tmp_path / "bad.jsonl")
    assert logged == []
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()
    assert datasets.logging.get_verbosity() == verbosity


def test_rows_of_python_are_numbered_too() -> None:
    for data in (ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS)):
        found = read(data)
        assert found == ROWS
        assert [row.place for row in found] == ["row 0", "row 1", "row 2"]
        assert read(data)[0] is not ROWS[0]
    both = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    assert read(both, split="train[:2]") == ROWS[:2]
    assert said(both, split="dev") == "the data has no split 'dev': give one of train"
    assert said([]) == "the data is empty: give at least one row"
    assert said([1]) == "the data is [1]: give a file, a list of dicts, or a datasets.Dataset"
    assert said(7) == "the data is 7: give a file, a list of dicts, or a datasets.Dataset"


# What stands in it.

EXACT = {
    "date": "2024-01-01",
    "time": "2024-01-01T00:00:00Z",
    "large": 2**64 + 1,
    "float": 0.1,
    "text": "007",
    "gap": None,
    "yes": True,
    "nested": {"a": [1, "1", None, {"b": 2**53 + 1}]},
}


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_arrives_as_it_stands(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": "a", **EXACT}, {"prompt": "b", "date": 5, "only": [1, "x"]}, {"prompt": "c"}]
    found = read(write(tmp_path / f"data.{suffix}", rows))
    assert found == rows
    assert [list(row) for row in found] == [list(row) for row in rows], "what is not there is not there"
    assert type(found[0]["float"]) is float
    assert type(found[0]["large"]) is int


def test_json_may_be_written_in_lines_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text('{"prompt": "a\\u2028"}\n\n{"prompt": "b"}\n')
    assert read("lines.json") == [{"prompt": "a\u2028"}, {"prompt": "b"}]
    (tmp_path / "odd.jsonl").write_bytes('\ufeff{"prompt": "a\u2028b"}\r\n \r\n{"prompt": "c"}'.encode())
    assert read("odd.jsonl") == [{"prompt": "a\u2028b"}, {"prompt": "c"}], "such a separator ends no line"


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    day, price = datetime.date(2024, 2, 3), Decimal("1.10")
    columns = {"prompt": ["a", "b"], "day": [day, None], "price": [price, price], "n": [2**63 - 1, None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "data.parquet")
    assert read("data.parquet") == [
        {"prompt": "a", "day": day, "price": price, "n": 2**63 - 1},
        {"prompt": "b", "day": None, "price": price, "n": None},
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_have_the_fields_that_they_were_given(suffix: str, tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    other = {"type": "function", "function": {"name": "no", "arguments": {"b": "x"}}}
    chat = [{"role": "assistant", "tool_calls": [call]}, {"role": "assistant", "tool_calls": [other]}, CHAT[0]]
    assert read(write(tmp_path / f"data.{suffix}", [{"prompt": chat}])) == [{"prompt": chat}]


# What is refused.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no file PATH: check the path"),
        ("no where", None, "there is no file or directory PATH: check the path"),
        ("nul\0.jsonl", None, "there is no file 'nul\\x00.jsonl': check the path"),
        ("data.txt", "1 + 1", "PATH cannot be read: give a file that ends in .json, .jsonl, .csv, .parquet"),
        (
            "bad.jsonl",
            '{"prompt": "a"}\n{"prompt":\n{"prompt": "b"}\n?\n',
            "PATH cannot be read: line 2 is no JSON: Expecting value: line 1 column 11 (char 10) (and 1 more row): ",
        ),
        ("bad.json", "[{]", "PATH cannot be read: Expecting property name enclosed in double quotes"),
        (
            "bad.csv",
            "prompt,answer\na,b\na,b,c,d\ne\n",
            "PATH cannot be read: line 3 has 4 fields, and the header 2 (and 1",
        ),
        ("open.csv", 'prompt,answer\na,"b\n', "PATH cannot be read: unexpected end of data"),
        ("twice.csv", "prompt,answer,answer\na,b,c\n", "PATH has two columns 'answer': give each a name of its own"),
        (
            "twice.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            "PATH cannot be read: line 1 is no JSON: 'prompt' stands twice",
        ),
        (
            "nan.jsonl",
            '{"prompt": "a", "x": NaN}',
            "PATH cannot be read: line 1 is no JSON: NaN is no JSON; write null",
        ),
        ("inf.json", '[{"prompt": "a", "x": 1e999}]', "PATH cannot be read: 1e999 is too large for a number"),
        ("half.jsonl", '{"prompt": "\\ud800"}', "PATH cannot be read: line 1 is no JSON: it has half of a surrogate"),
        ("deep.json", "[" * 9_999_999, "PATH cannot be read: lists and objects stand in each other more than 100 deep"),
        (
            "deep.jsonl",
            '{"prompt": ' + "[" * 101 + "]" * 101 + "}",
            "PATH cannot be read: line 1 is no JSON: lists and",
        ),
        ("digits.json", '[{"x": ' + "1" * 5000 + "}]", "PATH cannot be read: Exceeds the limit (4300"),
        ("rows.jsonl", '{"prompt": "a"}\n[1]\n2\n', "row 1 is [1] (and 1 more row): give objects, such as"),
        ("number.json", "7", "row 0 is 7: give objects"),
        ("bad.parquet", "prompt,answer", "PATH cannot be read: Parquet magic bytes not found"),
        ("empty.jsonl", "", "PATH is empty: give at least one row"),
        ("empty.json", "[]", "PATH is empty: give at least one row"),
        ("empty.csv", "", "PATH is empty: give at least one row"),
        ("header.csv", "prompt,answer\n", "PATH is empty: give at least one row"),
    ],
)
def test_data_that_cannot_be_used(name: str, content: str | None, message: str) -> None:
    if content is not None:
        Path(name).write_text(content)
    assert said(name).startswith(message.replace("PATH", name))


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv"])
def test_what_is_not_utf_8_is_said_with_its_place(suffix: str) -> None:
    Path(f"a.{suffix}").write_bytes(b'{"prompt": "caf\xe9"}')
    assert said(f"a.{suffix}") == f"a.{suffix} is not UTF-8 (byte 0xe9 at 15): save it as UTF-8"


def test_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    assert said("twice.parquet") == "twice.parquet has two columns 'prompt': give each a name of its own"


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo("pipe.jsonl")
    assert said("pipe.jsonl") == "pipe.jsonl is a pipe or a device, not a file: write its rows to a file first"
    assert said("/dev/zero") == "/dev/zero is a pipe or a device, not a file: write its rows to a file first"
    Path("folder.jsonl").mkdir()
    assert said("folder.jsonl").startswith("folder.jsonl cannot be read: ")
    Path("loop.jsonl").symlink_to("loop.jsonl")
    assert said("loop.jsonl").startswith("loop.jsonl cannot be read: ")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.truncate(2**31 + 1)  # without its blocks
    assert said("large.jsonl") == "large.jsonl has 2.0 GiB, and a file is read whole, up to 2.0 GiB: split it"
    monkeypatch.setattr(reading, "MOST_ROWS", 2)
    write(tmp_path / "long.parquet", ROWS)
    assert said("long.parquet") == "long.parquet has 3 rows, and at most 2 are read: split it"


def test_a_field_may_be_long_and_the_limit_of_csv_stays(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    assert read(write(tmp_path / "a.csv", [{"prompt": "x" * 200_000}])) == [{"prompt": "x" * 200_000}]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("split", ["train[", "train[:x]"])
def test_a_split_that_cannot_be_taken(split: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    assert said("a.jsonl", split=split).startswith(f"the split '{split}' cannot be taken: ")
    assert said("a.jsonl", split="train[9:]") == "the split 'train[9:]' has no rows, of 3: try train[:100]"
