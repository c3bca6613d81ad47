"""Data sets in every form they come in, what is refused, and prompts as tokens."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from policygrad.errors import UserError
from policygrad.language.data import (
    columns_of,
    encode_prompts,
    hold_out,
    left_padded,
    load_examples,
    load_preferences,
)

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 2 =", "answer": None}, {"prompt": "a,b", "answer": "007"}]
CHAT = [{"role": "system", "content": "add"}, {"role": "user", "content": "1 + 1"}]
WORDS = ["<s>", "</s>", "<user>", "<assistant>", "add", "1", "+", "=", "2"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools\nhere') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; text is begun with <s>."""
    numbers = {word: i for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel({**numbers, "?": len(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="?")


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


def said(source: Any, load: Any = load_examples, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(str(source), **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
    return str(caught.value)


# Where the data comes from.


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_a_file_is_read_as_it_is_now(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data.{suffix}"
    assert load_examples(write(path, ROWS)) == ROWS
    assert load_examples(write(path, ROWS[::-1])) == ROWS[::-1]
    assert load_examples(str(path), split="test") == ROWS[::-1]  # a file is one split, whatever it is called
    assert load_examples(str(path), split="train[1:]") == ROWS[:2][::-1]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_conversations_keep_their_messages_as_they_were(suffix: str, tmp_path: Path) -> None:
    rows = [{"prompt": CHAT}, {"prompt": [{"role": "user", "content": "2", "name": "me"}]}]
    assert load_examples(write(tmp_path / f"data.{suffix}", rows)) == rows


def test_csv_is_text_and_nothing_else(tmp_path: Path) -> None:
    """Guessed types would make 2 and a gap 2.0 and nan, 007 seven, and the answer NA none."""
    path = tmp_path / "data.csv"
    path.write_bytes('\ufeffprompt,answer\n1+1,2\n"a\nb",\nx,NA\ny,007\n'.encode())
    assert load_examples(str(path)) == [
        {"prompt": "1+1", "answer": "2"},
        {"prompt": "a\nb", "answer": None},
        {"prompt": "x", "answer": "NA"},
        {"prompt": "y", "answer": "007"},
    ]


def test_directories(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([2])}).save_to_disk(tmp_path / "two")
    assert load_examples(str(tmp_path / "one")) == ROWS
    assert load_examples(str(tmp_path / "two"), split="test") == ROWS[2:]
    assert said("two", split="dev") == "two has no split 'dev': give one of train, test"
    files = tmp_path / "files"
    files.mkdir()
    assert said("files").startswith("files cannot be read: ")
    for rows in (ROWS, ROWS[::-1]):
        write(files / "train.jsonl", rows)
        assert load_examples(str(files)) == rows


def test_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.Dataset:
        asked.append((*arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_examples("someone/data", split="test") == ROWS
    assert load_examples("someone/data:main") == ROWS
    assert asked == [("someone/data", None, {"split": "test"}), ("someone/data", "main", {"split": "train"})]


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'someone/data' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert said("someone/data") == (
        "there is no file or directory someone/data, and the hub cannot be reached: check the name and the network"
    )


def test_files_leave_no_copy_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    load_examples(write(tmp_path / "a.jsonl", ROWS))
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
    load_examples(write(tmp_path / "a.jsonl", ROWS))
    (tmp_path / "bad.jsonl").write_text("{")
    said(tmp_path / "bad.jsonl")
    assert logged == []
    assert capfd.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()
    assert datasets.logging.get_verbosity() == verbosity


# What is refused.


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "there is no file PATH: check the path"),
        ("no where", None, "there is no file or directory PATH: check the path"),
        ("data.txt", "1 + 1", "PATH cannot be read: give a file that ends in .json, .jsonl, .csv, .parquet"),
        (
            "bad.jsonl",
            '{"prompt": "a"}\n{"prompt":\n',
            "PATH cannot be read: JSON parse error: Invalid value. in row 1",
        ),
        ("bad.json", "[{]", "PATH cannot be read: "),
        ("bad.csv", "prompt,answer\na,b\na,b,c,d\n", "PATH cannot be read: Error tokenizing data."),
        ("bad.parquet", "prompt,answer", "PATH cannot be read: Parquet magic bytes not found"),
        ("empty.jsonl", "", "PATH is empty: give at least one row"),
        ("empty.json", "[]", "PATH is empty: give at least one row"),
        ("empty.csv", "", "PATH is empty: give at least one row"),
        ("header.csv", "prompt,answer\n", "PATH is empty: give at least one row"),
        (
            "columns.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "PATH has no column 'prompt', only question, answer: rename the right one to it",
        ),
        (
            "number.jsonl",
            '{"prompt": 1}\n{"prompt": 2}\n',
            'prompt of row 0 is 1: give text, or a list of messages {"role": ..., "content": ...}',
        ),
        ("gap.jsonl", '{"prompt": "a"}\n{"prompt": null}\n', "prompt of row 1 is None: give text"),
        ("list.json", '[{"prompt": []}]', "prompt of row 0 is []: give text"),
        ("role.json", '[{"prompt": [{"content": "a"}]}]', "prompt of row 0 is [{'content': 'a'}]: give text"),
        (
            "tool.json",
            '[{"prompt": [{"role": "user", "content": null}]}]',
            "prompt of row 0 is [{'role': 'user'}]: give text",
        ),
    ],
)
def test_data_that_cannot_be_used(name: str, content: str | None, message: str) -> None:
    path = Path(name)
    if content is not None:
        path.write_text(content)
    assert said(path).startswith(message.replace("PATH", str(path)))


# Preferences.


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_preferences(tmp_path: Path) -> None:
    texts = [{"prompt": "1+1", "chosen": "2", "rejected": "3", "score": 1}]
    assert load_preferences(write(tmp_path / "a.jsonl", texts)) == texts
    chats = [{"prompt": CHAT, "chosen": answer("2"), "rejected": answer("3")}]
    assert load_preferences(write(tmp_path / "b.jsonl", chats), split="train") == chats


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a", "chosen": "b"},
            "PATH has no column 'rejected', only prompt, chosen: rename the right one to it",
        ),
        ({"chosen": "a", "rejected": "b"}, "PATH has no column 'prompt', only chosen, rejected: "),
        ({"prompt": "a", "chosen": 2, "rejected": 3}, "chosen of row 0 is 2: give text, or a list of messages"),
        (
            {"prompt": "a", "chosen": "b", "rejected": answer("c")},
            "prompt and rejected of row 0 differ in kind: give both as text, or both as messages",
        ),
        (
            {"prompt": CHAT, "chosen": CHAT + answer("2"), "rejected": CHAT + answer("3")},
            "chosen of row 0 starts with a message of the system: leave out the prompt's messages",
        ),
    ],
)
def test_preferences_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    path = write(Path("data.jsonl"), [row])
    assert said(path, load_preferences).startswith(message.replace("PATH", path))


# Splits and columns.


def test_hold_out_is_a_split_drawn_with_the_seed() -> None:
    rows = [{"prompt": str(i)} for i in range(200)]
    train, held = hold_out(rows, 5, seed=1)
    assert (len(train), len(held)) == (195, 5)
    assert sorted(train + held, key=rows.index) == rows
    assert train == sorted(train, key=rows.index)
    assert held == sorted(held, key=rows.index)
    assert hold_out(rows, 5, seed=1) == (train, held)
    assert len({str(hold_out(rows, 5, seed=seed)[1]) for seed in range(5)}) == 5
    assert all(row in hold_out(rows, 9, seed=1)[1] for row in held)
    assert hold_out(rows, 0, seed=1) == (rows, [])


@pytest.mark.parametrize("count", [-1, 3, 4])
def test_more_than_there_is_cannot_be_held_out(count: int) -> None:
    with pytest.raises(UserError, match=f"^{count} of 3 examples cannot be held out: leave at least one to train on$"):
        hold_out(ROWS, count, seed=0)


def test_columns_of() -> None:
    assert columns_of(ROWS) == {"answer": ["2", None, "007"]}
    assert columns_of([{"prompt": "a", "x": 1}, {"y": 2, "prompt": "b"}]) == {"x": [1, None], "y": [None, 2]}


# Tokens.


def test_text_has_the_usual_special_tokens_and_a_conversation_those_of_its_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "add 1"}]
    rows = encode_prompts([{"prompt": "1 + 1 ="}, {"prompt": chat}], tokenizer, max_length=5)
    assert [[WORDS[token] for token in row] for row in rows] == [
        ["<s>", "1", "+", "1", "="],
        ["<user>", "add", "1", "</s>", "<assistant>"],
    ]
    assert all(type(token) is int for row in rows for token in row)


def test_prompts_that_cannot_be_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    def complaint(prompt: Any, max_length: int | None = None) -> str:
        with pytest.raises(UserError) as caught:
            encode_prompts([{"prompt": "1"}, {"prompt": prompt}], tokenizer, max_length=max_length)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert complaint(CHAT) == (
        "the prompt of row 1 is a conversation, and the tokenizer has no chat template: give prompts as plain text, "
        "or a tokenizer with one"
    )
    assert complaint("1 + 1", max_length=3) == (
        "the prompt of row 1 has 4 tokens and the limit is 3: raise the limit or leave the row out"
    )
    tokenizer.chat_template = TEMPLATE
    tool = [{"role": "tool", "content": "1"}]
    assert (
        complaint(tool)
        == "the chat template cannot write the prompt of row 1: no tools here; change the template or the row"
    )
    tokenizer.chat_template = "{% if messages[0].content != '1' %}{{ messages[0].content }}{% endif %}"
    assert complaint([{"role": "user", "content": ""}]) == (
        "the prompt of row 1 has no tokens: leave the row out, or give it a text"
    )


def test_left_padded() -> None:
    tokens, mask = left_padded([[1, 2, 3], [4], []], pad=9)
    assert tokens.tolist() == [[1, 2, 3], [9, 9, 4], [9, 9, 9]]
    assert mask.tolist() == [[True, True, True], [False, False, True], [False, False, False]]
    assert tokens.dtype == torch.long
    tokens, mask = left_padded([[1, 2]], pad=1, length=4)
    assert tokens.tolist() == [[1, 1, 1, 2]]
    assert mask.tolist() == [[False, False, True, True]]
    with pytest.raises(UserError, match=r"^a row of 3 tokens does not fit in 2: raise the length$"):
        left_padded([[1], [1, 2, 3]], pad=0, length=2)
