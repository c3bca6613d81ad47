"""Data sets of prompts and of preferences: reading, checking, splitting, encoding as tokens.

Messages count rows from 0.
"""

import contextlib
import csv
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policygrad.errors import UserError, ending, listed, one_line, shortened

Example = dict[str, Any]  # a row of a data set: its columns by name
FILES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_CONVERSATIONS = ("prompt", "chosen", "rejected")  # columns that may hold messages


def load_examples(source: str, *, split: str = "train") -> list[Example]:
    """The rows of a data set, each with a `prompt`: text, or a list of messages {"role": ..., "content": ...}.

    source: a .json, .jsonl, .csv or .parquet file, a directory that `datasets` saved or can read, or a data set on the
    Hugging Face hub, as `name` or `name:configuration`. A file is one split. All columns of a CSV file are text.

    Raises UserError if the source cannot be read or is empty, or if a row has no prompt.
    """
    examples = _read(source, split)
    _require_columns(examples, ("prompt",), source)
    for i, example in enumerate(examples):
        _require_text(example["prompt"], "prompt", i)
    return examples


def load_preferences(source: str, *, split: str = "train") -> list[Example]:
    """The rows of a data set of comparisons, each with `prompt`, `chosen` and `rejected`. source: see load_examples.

    The three are text, or lists of messages; those of an answer do not repeat the prompt's.
    """
    examples = _read(source, split)
    _require_columns(examples, _CONVERSATIONS, source)
    for i, example in enumerate(examples):
        for name in _CONVERSATIONS:
            _require_text(example[name], name, i)
        for name in ("chosen", "rejected"):
            if type(example[name]) is not type(example["prompt"]):
                raise UserError(f"prompt and {name} of row {i} differ in kind: give both as text, or both as messages")
            if not isinstance(example[name], str) and example[name][0]["role"] != "assistant":
                raise UserError(
                    f"{name} of row {i} starts with a message of the {ending(example[name][0]['role'], 40)}: "
                    "leave out the prompt's messages, so that it starts with the assistant's"
                )
    return examples


def hold_out(examples: Sequence[Example], count: int, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to train on and `count` held-out ones, drawn at random; both in the order of the data.

    With the same seed a larger count holds out the same examples and more.
    """
    if not 0 <= count < len(examples):
        raise UserError(f"{count} of {len(examples)} examples cannot be held out: leave at least one to train on")
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    held = set(order[:count])
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [examples[i] for i in sorted(held)]


def columns_of(examples: Sequence[Example]) -> dict[str, list[Any]]:
    """Every column except the prompt; None where an example lacks it."""
    names = dict.fromkeys(name for example in examples for name in example if name != "prompt")
    return {name: [example.get(name) for example in examples] for name in names}


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None
) -> list[list[int]]:
    """The prompts as tokens: text with the tokenizer's usual special tokens, conversations by its chat template.

    Raises UserError for a conversation without a template, and for a prompt that is empty or longer than max_length.
    """
    rows = []
    for i, example in enumerate(examples):
        row = _encode(example["prompt"], tokenizer, i)
        if not row:
            raise UserError(f"the prompt of row {i} has no tokens: leave the row out, or give it a text")
        if max_length is not None and len(row) > max_length:
            raise UserError(
                f"the prompt of row {i} has {len(row)} tokens and the limit is {max_length}: raise the limit or leave "
                "the row out"
            )
        rows.append(row)
    return rows


def left_padded(
    rows: Sequence[Sequence[int]], pad: int, length: int | None = None
) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
    """Rows of tokens padded on the left, and their mask. P = length, by default that of the longest row."""
    longest = max(map(len, rows), default=0)
    length = longest if length is None else length
    if longest > length:
        raise UserError(f"a row of {longest} tokens does not fit in {length}: raise the length")
    tokens = torch.full((len(rows), length), pad, dtype=torch.long)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row:
            tokens[i, -len(row) :] = torch.tensor(row)
            mask[i, -len(row) :] = True
    return tokens, mask


def _encode(prompt: Any, tokenizer: PreTrainedTokenizerBase, i: int) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer(prompt, verbose=False)["input_ids"])
    if tokenizer.chat_template is None:
        raise UserError(
            f"the prompt of row {i} is a conversation, and the tokenizer has no chat template: give prompts as plain "
            "text, or a tokenizer with one"
        )
    try:
        return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False))
    except Exception as error:  # a template is a program with its own errors, such as for a role that it lacks
        said = one_line(error, 80)
        raise UserError(
            f"the chat template cannot write the prompt of row {i}: {said}; change the template or the row"
        ) from error


def _read(source: str, split: str) -> list[Example]:
    """The rows of a data set with any columns."""
    path, shown = Path(source), ending(source, 80)
    try:
        with _without_progress_bars():
            if path.is_file() or (path.suffix in FILES and not path.is_dir()):
                examples = _read_file(path, split)
            elif any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
                examples = _read_saved(path, split)
            elif path.is_dir():
                examples = _afresh(source, split=split)
            else:
                examples = _read_hub(source, split)
    except UserError:
        raise
    except ConnectionError as error:  # from `datasets`, for a name on the hub
        raise UserError(
            f"there is no file or directory {shown}, and the hub cannot be reached: check the name and the network"
        ) from error
    except Exception as error:
        if "corresponds to no data" in str(error):  # the words of `datasets`
            raise UserError(f"{shown} is empty: give at least one row") from error
        start, end = f"{shown} cannot be read: ", "; fix the file, or give another source"
        raise UserError(start + one_line(error.__cause__ or error, 200 - len(start) - len(end)) + end) from error
    if not examples:
        raise UserError(f"{shown} is empty: give at least one row")
    for example in examples:
        example |= {name: _without_gaps(example[name]) for name in _CONVERSATIONS if name in example}
    return examples


def _read_file(path: Path, split: str) -> list[Example]:
    """The rows of a file."""
    import datasets

    if path.suffix not in FILES:
        raise UserError(f"{ending(str(path), 80)} cannot be read: give a file that ends in {', '.join(FILES)}")
    if not path.is_file():
        raise UserError(f"there is no file {ending(str(path), 80)}: check the path")
    if path.stat().st_size == 0:  # each reader has another message for this
        return []
    options: dict[str, Any] = {}
    if path.suffix == ".csv":
        # No types are guessed, so that 007 stays 007 and 72 does not become 72.0 in a column with gaps.
        with path.open(newline="", encoding="utf-8-sig") as file:
            header = next(csv.reader(file), [])
        text = datasets.Value("string")
        options = {"features": datasets.Features(dict.fromkeys(header, text)), "keep_default_na": False}
        options["na_values"] = [""]
    name = (re.match(r"\w+", split) or ["train"])[0]  # the split of a slice such as train[:100]
    return _afresh(FILES[path.suffix], data_files={name: str(path)}, split=split, **options)


def _afresh(*arguments: Any, **options: Any) -> list[Example]:
    """datasets.load_dataset of local files, with a temporary cache, since the files may change."""
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        return datasets.load_dataset(*arguments, cache_dir=cache, **options).to_list()


def _read_saved(path: Path, split: str) -> list[Example]:
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise UserError(f"{ending(str(path))} has no split {shortened(split, 40)}: give one of {listed(saved)}")
        saved = saved[split]
    return saved.to_list()


def _read_hub(source: str, split: str) -> list[Example]:
    import datasets

    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", source):
        raise UserError(f"there is no file or directory {ending(source, 80)}: check the path")
    name, _, configuration = source.partition(":")
    return datasets.load_dataset(name, configuration or None, split=split).to_list()


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


def _without_gaps(value: Any) -> Any:
    """Messages without the fields that `datasets` adds with None because another message has them."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in x.items() if v is not None} if isinstance(x, dict) else x for x in value]


def _require_columns(examples: list[Example], names: Sequence[str], source: str) -> None:
    for name in names:
        if name not in examples[0]:
            known = listed(examples[0])
            raise UserError(f"{ending(source)} has no column {name!r}, only {known}: rename the right one to it")


def _require_text(value: Any, name: str, i: int) -> None:
    messages = isinstance(value, list) and bool(value) and all(map(_is_message, value))
    if not isinstance(value, str) and not messages:
        raise UserError(
            f'{name} of row {i} is {shortened(value)}: give text, or a list of messages {{"role": ..., "content": ...}}'
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))
