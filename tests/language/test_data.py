"""Prompts and preferences: their layouts, what is refused, how they are split, and what they are as tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from policygrad.errors import UserError
from policygrad.language.data import (
    columns_of,
    encode_prompts,
    encode_texts,
    hold_out,
    left_padded,
    load_examples,
    load_preferences,
    short_enough,
    with_system_prompt,
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


def write(path: str, rows: list[dict[str, Any]]) -> str:
    """The rows as JSON, one a line."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths are short: those from the directory of the test."""
    monkeypatch.chdir(tmp_path)


def said(load: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
    return str(caught.value)


# What a prompt is.


def test_the_content_of_messages_becomes_text_and_the_rest_stays() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    parts = [{"type": "text", "text": "1 +"}, {"type": "text", "text": " 1"}, "?"]
    rows = [
        {"prompt": [{"role": "user", "content": parts, "name": "me"}]},
        {"prompt": [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "2"}]},
        {"prompt": [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "2"}]},
        {"prompt": "text", "answer": "007"},
    ]
    found = load_examples(write("a.jsonl", rows))
    assert found[0]["prompt"] == [{"role": "user", "content": "1 + 1?", "name": "me"}]
    assert found[1] == found[2] == rows[1]
    assert found[3] == rows[3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "a", "answer": "b"}],
            "a.jsonl has no column 'prompt', only question, answer: name the right one",
        ),
        ([{"prompt": 1}, {"prompt": 2}], "prompt of row 0 is 1 (and 1 more row): give text, or a list of messages"),
        ([{"prompt": "a"}, {"prompt": None}], "prompt of row 1 is None: give text"),
        ([{"prompt": "a"}, {"answer": "b"}], "row 1 has no prompt: give text"),
        ([{"prompt": []}], "prompt of row 0 is []: give text"),
        ([{"prompt": [{"content": "a"}]}], "prompt of row 0 has the message {'content': 'a'}: give text"),
        (
            [{"prompt": [{"role": "user", "content": None}]}],
            "prompt of row 0 has the message {'role': 'user', 'content'",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}],
            "prompt of row 0 has a part of type 'image', and only parts of text can be read: give text",
        ),
        (
            [{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}],
            "prompt of row 0 has a part {'type': 'text'}, and only parts of text can be read: give text",
        ),
    ],
)
def test_prompts_that_cannot_be_used(rows: list[dict[str, Any]], message: str) -> None:
    assert said(load_examples, write("a.jsonl", rows)).startswith(message)


def test_half_a_character_in_a_row_of_python_is_said() -> None:
    assert said(load_examples, [{"prompt": "\ud800"}]).startswith("prompt of row 0 is '\\ud800', with half of a surr")


# Several data sets, their columns, and a system prompt.


def test_several_data_sets_are_one_and_a_row_knows_its_own() -> None:
    a, b = write("a.jsonl", [{"prompt": "a0"}, {"prompt": "a1"}]), write("b.jsonl", [{"prompt": "b0"}])
    found = load_examples([a, Path(b), [{"prompt": "c0"}]])
    assert [row["prompt"] for row in found] == ["a0", "a1", "b0", "c0"]
    assert [row.source for row in found] == [0, 0, 1, 2]
    assert [row.place for row in found] == [
        "row 0 of a.jsonl",
        "row 1 of a.jsonl",
        "row 0 of b.jsonl",
        "row 0 of data set 2",
    ]
    assert [row.place for row in load_examples([a])] == ["row 0", "row 1"]
    assert load_examples([{"prompt": "a0"}, {"prompt": "a1"}]) == load_examples(a), "a list of rows is one data set"
    write("b.jsonl", [{"prompt": "b0"}, {"prompt": 1}])
    assert said(load_examples, [a, b]).startswith("prompt of row 1 of b.jsonl is 1: ")


def test_columns_are_renamed() -> None:
    rows = [{"question": "1+1", "solution": "2", "prompt": "old"}]
    assert load_examples(rows, columns=["prompt=question", "answer=solution", "was=prompt"]) == [
        {"prompt": "1+1", "answer": "2", "was": "old"}
    ]
    assert load_examples([[{"q": "a"}], [{"prompt": "b"}]], columns=["prompt=q"]) == [{"prompt": "a"}, {"prompt": "b"}]
    swapped = load_examples([{"prompt": "a", "answer": "b"}], columns=["prompt=answer", "answer=prompt"])
    assert swapped == [{"prompt": "b", "answer": "a"}]
    assert load_preferences(
        [{"q": "a", "good": "b", "bad": "c"}], columns=["prompt=q", "chosen=good", "rejected=bad"]
    ) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["question"], "columns has 'question': give new=old, such as prompt=question"),
        (["=question"], "columns has '=question': give new=old"),
        (["prompt=question", "prompt=solution"], "columns gives one name to two columns (prompt=question, prompt=solu"),
        (["prompt=questoin"], "the data has no column 'prompt', only question, solution, old: name the right one"),
        (["prompt=question", "x=y"], "columns renames 'y', which no data set has: there are question, solution, old"),
        (
            ["prompt=question", "old=solution"],
            "columns makes a 'old', and row 0 has one already: rename that too, such as old_old=old",
        ),
    ],
)
def test_columns_that_cannot_be_renamed(columns: list[str], message: str) -> None:
    rows = [{"question": "1+1", "solution": "2", "old": 1}]
    assert said(load_examples, rows, columns=columns).replace("data set 0", "the data").startswith(message)


def test_a_system_prompt_stands_before_every_prompt() -> None:
    rows = load_examples([{"prompt": "1 + 1", "answer": "2"}, {"prompt": CHAT[1:]}])
    rows[0].number = 7
    found = with_system_prompt(rows, "add")
    assert found == [{"prompt": CHAT, "answer": "2"}, {"prompt": CHAT}]
    assert found[0].place == "row 7"
    assert rows[0]["prompt"] == "1 + 1"
    assert said(with_system_prompt, load_examples([{"prompt": "a"}, {"prompt": CHAT}, {"prompt": CHAT}]), "x") == (
        "the prompt of row 1 has a system message of its own (and 1 more row): leave system_prompt out, or take them "
        "out of the data"
    )


# Preferences.


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


QUESTION = [{"role": "user", "content": "1 + 1"}]
PAIR = {"prompt": QUESTION, "chosen": answer("2"), "rejected": answer("3")}


def test_preferences_with_a_prompt() -> None:
    texts = [{"prompt": "1+1", "chosen": "2", "rejected": "3", "score": 1}]
    assert load_preferences(write("a.jsonl", texts)) == texts
    chats = [{"prompt": CHAT, "chosen": answer("2"), "rejected": answer("3")}]
    assert load_preferences(write("b.jsonl", chats), split="train") == chats


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": QUESTION + answer("2"), "rejected": QUESTION + answer("3")}, PAIR),
        ({"prompt": "1 + 1", "chosen": QUESTION + answer("2"), "rejected": QUESTION + answer("3")}, PAIR),
        ({"prompt": QUESTION, "chosen": QUESTION + answer("2"), "rejected": QUESTION + answer("3")}, PAIR),
        ({"chosen": QUESTION + answer("2"), "rejected": QUESTION + answer("2")}, {**PAIR, "rejected": answer("2")}),
        (
            {
                "chosen": [{"role": "user", "content": [{"type": "text", "text": "1 + 1"}]}, *answer("2")],
                "rejected": [{"role": "user", "content": [{"type": "text", "text": "1 + 1"}]}, *answer("3")],
            },
            PAIR,
        ),
        (  # the conversation goes on after the answers differ
            {"chosen": [*QUESTION, *answer("2"), *QUESTION, *answer("2")], "rejected": [*QUESTION, *answer("3")]},
            {**PAIR, "chosen": [*answer("2"), *QUESTION, *answer("2")]},
        ),
        (
            {
                "chosen": "\n\nHuman: Add.\n\nAssistant: It is two.",
                "rejected": "\n\nHuman: Add.\n\nAssistant: It is three.",
            },
            {"prompt": "\n\nHuman: Add.\n\nAssistant: It is ", "chosen": "two.", "rejected": "three."},
        ),
    ],
)
def test_preferences_whose_answers_begin_with_the_prompt(row: dict[str, Any], expected: dict[str, Any]) -> None:
    """The layouts of ultrafeedback, of Skywork's and Tulu's preferences, and of hh-rlhf."""
    assert load_preferences(write("a.jsonl", [row | {"score": 1.5}])) == [expected | {"score": 1.5}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "a.jsonl has no column 'rejected', only prompt, chosen: name the right one"),
        ({"prompt": "a", "chosen": 2, "rejected": 3}, "chosen of row 0 is 2 (and 1 more row): give text, or a list"),
        ({"prompt": "a", "chosen": "b", "rejected": answer("c")}, "the pair of row 0 has text and messages: give both"),
        ({"prompt": CHAT, "chosen": "b", "rejected": "c"}, "the pair of row 0 has a prompt of messages and answers of"),
        (
            {"prompt": "a", "chosen": answer("b"), "rejected": answer("c")},
            "the pair of row 0 has a prompt of text that",
        ),
        ({"chosen": answer("b"), "rejected": answer("c")}, "the pair of row 0 has a prompt without messages"),
        ({"chosen": "yes", "rejected": "no"}, "the pair of row 0 has no prompt, and its answers have no common begin"),
        ({"prompt": CHAT, "chosen": CHAT, "rejected": CHAT}, "the pair of row 0 has a chosen without messages"),
        (
            {"prompt": CHAT, "chosen": CHAT[1:] + answer("2"), "rejected": CHAT[1:] + answer("3")},
            "the pair of row 0 has a chosen answer that starts with a message of the user, not of the assistant",
        ),
    ],
)
def test_preferences_that_cannot_be_used(row: dict[str, Any], message: str) -> None:
    assert said(load_preferences, write("a.jsonl", [row])).startswith(message)


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
    with pytest.raises(
        UserError, match=f"^{count} of 3 examples cannot be held out: lower held_out, or give more examples$"
    ):
        hold_out(ROWS, count, seed=0)


def test_columns_of() -> None:
    assert columns_of(ROWS) == {"answer": ["2", None, "007"]}
    assert columns_of([{"prompt": "a", "x": 1}, {"y": 2, "prompt": "b"}]) == {"x": [1, None], "y": [None, 2]}


# Tokens.


def words(rows: list[list[int]]) -> list[str]:
    return [" ".join(WORDS[token] for token in row) for row in rows]


def test_text_has_the_usual_special_tokens_and_a_conversation_those_of_its_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = TEMPLATE
    chat = [{"role": "user", "content": "add 1"}]
    rows = encode_prompts([{"prompt": "1 + 1 ="}, {"prompt": chat}, {"prompt": "2"}], tokenizer)
    assert words(rows) == ["<s> 1 + 1 =", "<user> add 1 </s> <assistant>", "<s> 2"]
    assert all(type(token) is int for row in rows for token in row)


@pytest.mark.parametrize(
    ("single", "expected"),
    [
        ("<s> $A", ["<s> 1 + 1", "<s> 1 </s>", "<s> <user> 1", "<s>"]),
        ("<s> $A </s>", ["<s> 1 + 1", "<s> 1 </s>", "<s> <user> 1", "<s>"]),
        ("$A </s>", ["1 + 1", "1 </s>", "<s> <user> 1", ""]),
        ("<s> <user> $A", ["<s> <user> 1 + 1", "<s> <user> 1 </s>", "<s> <user> 1", "<s> <user>"]),
        ("$A", ["1 + 1", "1 </s>", "<s> <user> 1", ""]),
    ],
)
def test_a_text_begins_once_and_has_no_end_but_its_own(
    single: str, expected: list[str], tokenizer: PreTrainedTokenizerFast
) -> None:
    """A template may have written <s> already; a tokenizer that adds </s> would end the prompt."""
    ids = [(name, WORDS.index(name)) for name in ("<s>", "</s>", "<user>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    assert words(encode_texts(["1 + 1", "1 </s>", "<s> <user> 1", ""], tokenizer)) == expected


def test_a_last_message_of_the_assistant_is_continued(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE
    user = {"role": "user", "content": "1 + 1"}
    chats = [[user, {"role": "assistant", "content": x}] for x in ("2 =", "")]
    assert words(encode_prompts([{"prompt": x} for x in chats], tokenizer)) == [
        "<user> 1 + 1 </s> <assistant> 2 =",
        "<user> 1 + 1 </s> <assistant>",
    ]


def test_template_variables_are_for_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATE + "{% if brief %} add{% endif %}"
    rows = [{"prompt": [{"role": "user", "content": "1"}]}]
    assert words(encode_prompts(rows, tokenizer, {"brief": True})) == ["<user> 1 </s> <assistant> add"]
    assert said(encode_prompts, [{"prompt": "1"}], tokenizer, {"brief": True}) == (
        "template_variables are for conversations, and all prompts are text: leave them out"
    )


def test_prompts_that_cannot_be_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    def complaint(prompt: Any) -> str:
        rows = load_examples([{"prompt": "1"}, {"prompt": "2"}, {"prompt": prompt}, {"prompt": prompt}])
        return said(encode_prompts, rows[1:], tokenizer)

    assert complaint(CHAT).startswith("the data has conversations, and the tokenizer has no chat template: ")
    tokenizer.chat_template = TEMPLATE
    assert complaint([{"role": "tool", "content": "1"}]) == (
        "the chat template cannot write the prompt of row 2: no tools here (and 1 more row): change the template or "
        "the row"
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    assert complaint([{"role": "user", "content": ""}]) == (
        "the prompt of row 2 has no tokens (and 1 more row): leave the row out, or give it a text"
    )


def test_prompts_that_are_too_long_are_counted_and_refused_or_dropped() -> None:
    rows = [[1], [1, 2, 3], [1, 2], [1, 2, 3, 4]]
    named = "row {}".format
    assert short_enough(rows, named, None) == short_enough(rows, named, 4) == [0, 1, 2, 3]
    assert short_enough(rows, named, 2, "drop") == [0, 2]
    assert said(short_enough, rows, named, 2) == (
        "2 of 4 prompts are longer than 2 tokens, the first in row 1 with 3: raise max_prompt_tokens, or set "
        "long_prompts to drop"
    )
    assert said(short_enough, rows, named, 0, "drop").endswith("raise max_prompt_tokens, or choose another data set")


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
