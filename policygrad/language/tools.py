"""Tools: plain functions with type hints that the policy calls in its text, and whose results are messages.

A call is data: a JSON object with a name and arguments, which is checked against the function's signature. Nothing of
the text is evaluated.
"""

import inspect
import json
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any, NamedTuple

from transformers.utils import get_json_schema

from policygrad.errors import UserError, listed, one_line, shortened
from policygrad.functions import load_function
from policygrad.language.conversations import Begin, Environment, Message, Messages
from policygrad.language.rewards.calling import limited
from policygrad.language.sampler import ERROR
from policygrad.language.sandbox import python_tool

Tool = Callable[..., Any]
MARKED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
BUILT_IN = {"python": True, "python:unconfined": False}  # whether it is confined
SECONDS = 30.0  # for a call
LONGEST = 20_000  # characters of a result
KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


class Call(NamedTuple):
    """A call of a tool as the policy wrote it; fault: why it cannot be carried out, or nothing."""

    name: str
    arguments: dict[str, Any]
    fault: str = ""


def load_tool(spec: str) -> Tool:
    """A tool by its name: python, python:unconfined, module:function or file.py:function.

    Raises UserError if there is none, if it has no signature to make a schema of, or if Python cannot be confined.
    """
    tool = python_tool(confined=BUILT_IN[spec]) if spec in BUILT_IN else load_function(spec, what="tool")
    schema_of(tool)
    return tool


def schema_of(tool: Tool) -> dict[str, Any]:
    """The JSON schema of a function, from its type hints and its docstring, as chat templates read it.

    Raises UserError for a function that is async, or lacks a type hint, a docstring, or an argument's description.
    """
    if inspect.iscoroutinefunction(tool):
        raise UserError(f"the tool {_name(tool)} is async: give a plain function")
    try:
        return get_json_schema(tool)
    except Exception as error:
        said = one_line(error, 70)
        raise UserError(
            f"no tool can be made of {_name(tool)} ({said}): give type hints, and a docstring with Args"
        ) from error


def calls_in(text: str, tools: Mapping[str, Tool]) -> list[Call]:
    """The calls in a text: JSON between <tool_call> and </tool_call> (Qwen, Hermes), or a text that is one JSON object
    with the name of a tool (Llama). Arguments are named `arguments` or `parameters`.
    """
    return [_call(part, tools) for part in parts_of_calls(text, tools)]


def parts_of_calls(text: str, names: Container[str]) -> list[str]:
    """What stands between the marks of calls; all of a text that is one JSON object with one of these names."""
    marked: list[str] = MARKED.findall(text)
    whole = None if marked else json_object(text.strip())
    return [text.strip()] if whole is not None and whole.get("name") in names else marked


def before_calls(text: str) -> str:
    """What a text with calls says before the first of them."""
    first = MARKED.search(text)
    return text[: first.start()].strip() if first else ""


def answers_to_calls(text: str, tools: Sequence[Tool]) -> list[Message]:
    """A message of the role `tool` for each call in the text. A call that fails is answered with what is wrong."""
    named = {_name(tool): tool for tool in tools}
    return [{"role": "tool", "name": call.name, "content": _result(call, named)} for call in calls_in(text, named)]


class WithTools:
    """An environment whose policy may call tools. It sees only texts without a call.

    environment: None if the first text without a call is the end.
    """

    def __init__(self, tools: Sequence[Tool], environment: Environment | None = None) -> None:
        self.tools, self.environment = list(tools), environment

    def reset(self, seed: int) -> Messages:
        """That of the environment."""
        assert self.environment is not None
        return self.environment.reset(seed)

    def step(self, text: str) -> tuple[Messages | None, float, bool]:
        """The answers to the calls in the text, without a reward; or what the environment answers."""
        answers: list[Message] = answers_to_calls(text, self.tools)
        if answers:
            return answers, 0.0, False
        return (None, 0.0, True) if self.environment is None else self.environment.step(text)


def with_tools(begin: Begin | None, tools: Sequence[Tool] = ()) -> Begin:
    """The same environments with these tools and those that they have themselves; None: there is nothing but tools."""

    def begun(row: Mapping[str, Any]) -> Environment:
        environment = None if begin is None else begin(row)
        every = [*tools, *getattr(environment, "tools", ())]
        return WithTools(every, environment) if every or environment is None else environment

    return begun


def _call(text: str, tools: Mapping[str, Tool]) -> Call:
    found = json_object(text)
    if found is None or not isinstance(found.get("name"), str):
        return Call("", {}, 'a call is a JSON object {"name": ..., "arguments": {...}}')
    name, arguments = found["name"], found.get("arguments", found.get("parameters", {}))
    if name not in tools:
        return Call(name, {}, f"there is no tool {shortened(name, 40)}, only {listed(tools)}")
    if not isinstance(arguments, dict):
        return Call(name, {}, "the arguments are a JSON object")
    return Call(name, arguments, _fault(arguments, schema_of(tools[name])["function"]["parameters"]))


def _fault(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What is wrong with the arguments of a call, or nothing."""
    known = schema["properties"]
    missing = [name for name in schema.get("required", []) if name not in arguments]
    extra = [name for name in arguments if name not in known]
    if missing:
        return f"the argument {missing[0]} is missing"
    if extra:
        return f"there is no argument {shortened(extra[0], 40)}, only {listed(known)}"
    for name, value in arguments.items():
        kind = known[name].get("type")
        kinds = kind if isinstance(kind, list) else [kind] if isinstance(kind, str) else []
        wanted = tuple(python for x in kinds for python in KINDS.get(x, ()))
        right = isinstance(value, wanted) and (bool in wanted or not isinstance(value, bool))
        if wanted and not right and not (value is None and known[name].get("nullable")):
            return f"the argument {name} is {shortened(value, 40)}, and should be of type {' or '.join(kinds)}"
        choices = known[name].get("enum")
        if choices and value not in choices:
            return f"the argument {name} is {shortened(value, 40)}, and should be one of {listed(map(str, choices))}"
    return ""


def _result(call: Call, tools: Mapping[str, Tool]) -> str:
    """What a call returns as text; after ERROR, why it does not."""
    if call.fault:
        return ERROR + call.fault
    outcome = limited(lambda: tools[call.name](**call.arguments), SECONDS)
    if outcome is None:
        return f"{ERROR}{call.name} took longer than {SECONDS:g} s"
    found, error = outcome
    if isinstance(error, KeyboardInterrupt | UserError):
        raise error
    if error is not None:
        return f"{ERROR}{type(error).__name__}: {one_line(error, 200)}"
    text = found if isinstance(found, str) else json.dumps(found, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} characters left out)"


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; None if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _name(tool: Tool) -> str:
    return str(getattr(tool, "__name__", type(tool).__name__))
