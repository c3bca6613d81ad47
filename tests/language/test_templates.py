"""Chat templates: what they write, and that no template can hang or fill the memory."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from policygrad.errors import UserError
from policygrad.language import arithmetic, templates
from policygrad.language.templates import write

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<no_think>{% endif %}{% endif %}"
)
USER = [{"role": "user", "content": "1"}]
BEGUN = [*USER, {"role": "assistant", "content": "2+"}]
LOOP, END = "{% for a in range(99999) %}", "{% endfor %}"


def tokenizer(template: Any = TEMPLATE) -> PreTrainedTokenizerFast:
    made = arithmetic.tokenizer()
    made.chat_template = template
    return made


def said(conversations: Any, template: Any = TEMPLATE, variables: Any = None) -> str:
    with pytest.raises(UserError) as caught:
        write(conversations, tokenizer(template), variables)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
    return str(caught.value)


def test_a_text_ends_where_it_is_asked_to() -> None:
    assert write([(USER, "answer"), (BEGUN, "open"), (BEGUN, "closed")], tokenizer()) == [
        ("<user>1<eos><assistant>", None),
        ("<user>1<eos><assistant>2+", None),
        ("<user>1<eos><assistant>2+<eos>", None),
    ]


def test_it_is_what_transformers_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "TOGETHER", 2)
    chats = [[{"role": "user", "content": f"{i} + é"}] for i in range(5)]
    own = [tokenizer().apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in chats]
    assert write([(x, "answer") for x in chats], tokenizer()) == [(text, None) for text in own]


def test_the_variables_of_a_template() -> None:
    asked = [(USER, "answer")]
    assert write(asked, tokenizer(), {"enable_thinking": False})[0][0] == "<user>1<eos><assistant><no_think>"
    assert write(asked, tokenizer(), {"enable_thinking": True})[0][0] == "<user>1<eos><assistant>"
    assert said(asked, variables={"enable_thinkin": False}) == (
        "the chat template reads no variable 'enable_thinkin': correct template_variables"
    )
    assert said(asked, variables={"add_generation_prompt": False}) == (
        "template_variables has add_generation_prompt, which is set for each prompt: leave it out"
    )


def test_a_field_without_a_value_is_not_there() -> None:
    """Templates write None as a word."""
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    plain = (
        "{% for m in messages %}{% if 'content' in m %}{{ m.content }}{% endif %}|{{ m.tool_calls[0].function.name }}"
    )
    assert write([([called], "closed")], tokenizer(plain + "{% endfor %}")) == [("|add", None)]


def test_errors_of_a_template_are_each_rows_own() -> None:
    strict = "{% if messages[0].content == '1' %}{{ raise_exception('no\n1 here') }}{% endif %}fine"
    other = [{"role": "user", "content": "2"}]
    assert write([(USER, "answer"), (other, "answer")], tokenizer(strict)) == [(None, "no 1 here"), ("fine", None)]
    assert write([(USER, "answer")], tokenizer("{% if %}"))[0][0] is None
    assert "unsafe" in str(write([(USER, "answer")], tokenizer("{{ cycler.__init__.__globals__ }}"))[0][1])


def test_without_a_template_there_is_no_conversation() -> None:
    assert said([(USER, "answer")], None) == (
        "the data has conversations, and the tokenizer has no chat template: give plain text, or a tokenizer with one"
    )


@pytest.mark.parametrize("template", [LOOP * 4 + "x" + END * 4, "{% set a = namespace(x=9**9) %}{{ a.x ** a.x }}"])
def test_a_template_without_an_end_is_ended(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write([(USER, "answer")], tokenizer())  # the process has started
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    assert said([(USER, "answer")], template) == (
        "the chat template takes more than 0.3 s or too much memory: give a tokenizer with another one"
    )
    monkeypatch.undo()
    assert write([(USER, "answer")], tokenizer())[0] == ("<user>1<eos><assistant>", None), "and the next one is written"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% set n = 10**10 %}{{ 'a' * n }}", "MemoryError"),
        ("{% set n = 10**7 %}{{ 'a' * n }}b", "it writes more than 10,000,000 characters"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "maximum recursion depth exceeded"),
    ],
)
def test_a_template_that_fills_the_memory_is_an_error(template: str, message: str) -> None:
    text, error = write([(USER, "answer")], tokenizer(template))[0]
    assert text is None
    assert str(error).startswith(message)
