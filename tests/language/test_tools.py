"""Tools: calls are data, checked against the signature; what a call returns, or what is wrong with it, is a message."""

import json
from typing import Any, Literal

import pytest

from language.chat import Echo
from policygrad.errors import UserError
from policygrad.language import tools
from policygrad.language.tools import WithTools, answers_to_calls, calls_in, load_tool, schema_of, with_tools


def lookup(key: str, times: int = 1, how: Literal["plain", "loud"] = "plain") -> Any:
    """Look up a key.

    Args:
        key: The key.
        times: How often.
        how: In which voice.
    """
    return {"plain": key * times, "loud": [key.upper()] * times}[how]


def divide(a: float, b: float | None = None) -> float:
    """Divide.

    Args:
        a: The one.
        b: The other.
    """
    return a / (b or 0)


def call(**arguments: Any) -> str:
    return json.dumps({"name": "lookup", "arguments": arguments})


def said(text: str, *functions: Any) -> list[str]:
    answers = answers_to_calls(text, functions or (lookup, divide))
    assert all(x["role"] == "tool" and set(x) == {"role", "name", "content"} for x in answers)
    return [str(x["content"]) for x in answers]


def test_the_schema_is_that_of_the_signature() -> None:
    assert schema_of(lookup) == {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look up a key.",
            "parameters": {
                "type": "object",
                "properties": {
                    "key": {"type": "string", "description": "The key."},
                    "times": {"type": "integer", "description": "How often."},
                    "how": {"type": "string", "enum": ["plain", "loud"], "description": "In which voice."},
                },
                "required": ["key"],
            },
            "return": {},
        },
    }


@pytest.mark.parametrize(
    ("text", "answers"),
    [
        (f"I look.\n<tool_call>\n{call(key='a')}\n</tool_call>", ["a"]),
        (f"<tool_call>{call(key='a')}</tool_call>\n<tool_call>{call(key='b', times=2)}</tool_call>", ["a", "bb"]),
        (f"<tool_call>\n{call(key='a', how='loud')}", ['["A"]']),  # cut before its end, and whole
        ('{"name": "lookup", "parameters": {"key": "é"}}', ["é"]),  # Llama
        ('{"name": "divide", "arguments": {"a": 3, "b": 2}}', ["1.5"]),
        ('{"name": "divide", "arguments": {"a": 3, "b": null}}', ["error: ZeroDivisionError: division by zero"]),
        ("the answer is 7", []),
        ('{"name": "other", "arguments": {}}', []),  # text that is JSON is no call unless it names a tool
        ('["lookup"]', []),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', [
            "error: there is no tool 'other', only lookup, divide"]),
        ("<tool_call>lookup('a')</tool_call>", [
            'error: a call is a JSON object {"name": ..., "arguments": {...}}']),
        ("<tool_call>{}</tool_call>", ['error: a call is a JSON object {"name": ..., "arguments": {...}}']),
        (f"<tool_call>{call()}</tool_call>", ["error: the argument key is missing"]),
        (f"<tool_call>{call(key='a', x=1)}</tool_call>", [
            "error: there is no argument 'x', only key, times, how"]),
        (f"<tool_call>{call(key=1)}</tool_call>", [
            "error: the argument key is 1, and should be of type string"]),
        (f"<tool_call>{call(key='a', times=True)}</tool_call>", [
            "error: the argument times is True, and should be of type integer"]),
        (f"<tool_call>{call(key='a', how='soft')}</tool_call>", [
            "error: the argument how is 'soft', and should be one of plain, loud"]),
        ('<tool_call>{"name": "lookup", "arguments": ["a"]}</tool_call>', ["error: the arguments are a JSON object"]),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", [
            'error: a call is a JSON object {"name": ..., "arguments": {...}}']),
    ],
)  # fmt: skip
def test_calls_and_their_answers(text: str, answers: list[str]) -> None:
    assert said(text) == answers
    assert len(calls_in(text, {"lookup": lookup, "divide": divide})) == len(answers)


def test_nothing_of_a_text_is_evaluated() -> None:
    assert said('<tool_call>{"name": "lookup", "arguments": {"key": "__import__(\'os\').getcwd()"}}</tool_call>') == [
        "__import__('os').getcwd()"
    ]


def test_a_tool_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "SECONDS", 0.2)

    def spin(n: int) -> int:
        """Spin.

        Args:
            n: So often.
        """
        while n:
            pass
        return n

    assert said('{"name": "spin", "arguments": {"n": 1}}', spin) == ["error: spin took longer than 0.2 s"]
    assert said('{"name": "spin", "arguments": {"n": 0}}', spin) == ["0"]


def test_a_long_result_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "LONGEST", 10)
    assert said('{"name": "lookup", "arguments": {"key": "ab", "times": 10}}') == [
        "ababababab ... (10 characters left out)"
    ]


def test_an_environment_sees_only_texts_without_a_call() -> None:
    inner = Echo()
    inner.reset(0)
    environment = WithTools([lookup], inner)
    assert environment.reset(3) == [{"role": "user", "content": "say 3"}]
    assert environment.step(call(key="a")) == ([{"role": "tool", "name": "lookup", "content": "a"}], 0.0, False)
    assert inner.turns == 0
    assert environment.step("hello") == ([{"role": "tool", "content": "heard 'hel'"}], 3.1, False)
    assert WithTools([lookup]).step("hello") == (None, 0.0, True), "alone, the first text without a call is the end"


def test_tools_of_an_environment_and_more() -> None:
    class Having(Echo):
        def __init__(self) -> None:
            self.tools = [divide]

    def made(row: Any) -> Any:
        return Having()

    both = with_tools(made, [lookup])({})
    assert isinstance(both, WithTools)
    assert [x.__name__ for x in both.tools] == ["lookup", "divide"]
    assert isinstance(with_tools(lambda row: Echo())({}), Echo)
    alone = with_tools(None, [lookup])({})
    assert isinstance(alone, WithTools)
    assert alone.environment is None


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("language.test_tools:nothing", "language.test_tools has no function 'nothing'"),
        ("language.test_tools:untyped", "no tool can be made of untyped"),
        ("lookup", "tool 'lookup' names no function"),
    ],
)
def test_what_is_no_tool(spec: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_tool(spec)
    assert message in str(caught.value)
    assert len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


def untyped(x):  # type: ignore[no-untyped-def]
    """It has no type hint."""


def test_a_tool_by_its_name() -> None:
    assert load_tool("language.test_tools:lookup")("a") == "a"
    assert load_tool("python:unconfined")("1 + 1") == "2"


def test_an_async_tool_is_refused() -> None:
    async def later(x: int) -> int:
        """Later.

        Args:
            x: It.
        """
        return x

    with pytest.raises(UserError, match="the tool later is async: give a plain function"):
        said('{"name": "later", "arguments": {"x": 1}}', later)
