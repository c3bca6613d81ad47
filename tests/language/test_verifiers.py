"""Environments of verifiers as conversations: the same rollouts as the package's own."""

import asyncio
import signal
from pathlib import Path
from typing import Any

import pytest

from policygrad.errors import UserError
from policygrad.language import verifiers as adapter
from policygrad.language.conversations import Environment, starts, stepped
from policygrad.language.verifiers import Verifiers, verifiers_environment

vf = pytest.importorskip("verifiers")
if not hasattr(vf, "Environment"):
    pytest.skip("verifiers 0.4 has other environments", allow_module_level=True)

from datasets import Dataset  # noqa: E402

ROWS = [{"question": f"Say {i}.", "answer": str(i), "info": {"least": i}} for i in range(3)]


def said(completion: Any, answer: str, info: dict[str, Any]) -> float:
    return float(answer in completion[-1]["content"]) + info["least"] / 10


async def length(completion: Any) -> float:
    """Of all that was said, calls of tools too."""
    return sum(len(x["content"]) + 7 * len(x.get("tool_calls") or ()) for x in completion) / 100


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: The other.
    """
    return a + b


class Guess(vf.MultiTurnEnv):
    """It says higher or lower, until the number is said."""

    left = 0  # rollouts that cleaned up

    async def setup_state(self, state: Any) -> Any:
        state["guesses"] = 0
        return state

    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        state["guesses"] += 1
        number = int(messages[-1]["content"])
        if number == int(state["answer"]):
            state["final_env_response"] = [{"role": "user", "content": "Right."}]
            return []
        return [{"role": "user", "content": "higher" if number < int(state["answer"]) else "lower"}]

    @vf.cleanup
    async def leave(self, state: Any) -> None:
        type(self).left += 1


def guessed(state: Any) -> float:
    return 1 / state["guesses"]


def made(kind: str, funcs: Any = None, **more: Any) -> Any:
    rubric = vf.Rubric(funcs=funcs or [said, length], weights=None if funcs else [1.0, 0.5])
    given = {"dataset": Dataset.from_list(ROWS), "rubric": rubric, "system_prompt": "Obey.", **more}
    if kind == "tool":
        return vf.ToolEnv(tools=[add], max_turns=4, **given)
    return Guess(max_turns=3, **given) if kind == "guess" else vf.SingleTurnEnv(**given)


CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 1}}\n</tool_call>'
BAD = '<tool_call>{"name": "add", "arguments": {"a": "1"}}</tool_call><tool_call>{"name": "sub"}</tool_call>'


class Script(vf.Client):
    """A client of verifiers whose model says these texts: what a server of a model would answer."""

    def __init__(self, turns: list[tuple[str, list[tuple[str, str]]]]) -> None:
        self.turns = iter(turns)

    async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **_: Any) -> Any:
        from verifiers.types import Response, ResponseMessage, ToolCall

        content, calls = next(self.turns)
        made = [ToolCall(id=f"{k}", name=name, arguments=text) for k, (name, text) in enumerate(calls)] or None
        message = ResponseMessage(content=content, tool_calls=made, finish_reason="stop", is_truncated=False)
        return Response(id="", created=0, model=model, message=message)

    setup_client = to_native_tool = to_native_prompt = get_native_response = None
    raise_from_native_response = from_native_response = close = None


@pytest.mark.parametrize(
    ("kind", "turns"),
    [
        ("single", [("It is 1.", [])]),
        ("single", [("It is 2.", [])]),
        ("guess", [("0", []), ("2", []), ("1", [])]),
        ("guess", [("0", []), ("2", []), ("3", [])]),
        ("guess", [("1", [])]),
        ("tool", [(f"I add. {CALL}", [("add", '{"a": 1, "b": 1}')]), ("It is 1.", [])]),
        ("tool", [(CALL, [("add", '{"a": 1, "b": 1}')]), (BAD, [("add", '{"a": "1"}'), ("sub", "{}")]), ("1", [])]),
        ("tool", [("<tool_call>add</tool_call> 1", [])]),
    ],
)
def test_a_conversation_is_the_rollout_of_verifiers(kind: str, turns: list[Any]) -> None:
    """The same messages and the same reward as its own rollout with a client that says the same."""
    funcs = [guessed, length] if kind == "guess" else None
    environment = made(kind, funcs)
    contents = [(text.partition("<tool_call>")[0].strip() if calls else text, calls) for text, calls in turns]
    row = dict(environment.get_dataset()[1])
    own = asyncio.run(environment.run_rollout(row, Script(contents), "model", {}))

    here = Verifiers(environment)
    assert isinstance(here, Environment)
    heard = here.reset(1)
    assert heard == [{"role": "system", "content": "Obey."}, {"role": "user", "content": "Say 1."}]
    found, rewards = [], []
    for k, (text, _) in enumerate(turns):
        answer, reward, over = stepped(here, text)
        found.append(("assistant", contents[k][0]))
        found += [(x["role"], x["content"]) for x in answer or []]
        rewards.append(reward)
        assert over == (k == len(turns) - 1)
    assert found == [(x["role"], x["content"]) for x in own["completion"]]
    assert rewards == [0.0] * (len(turns) - 1) + [own["reward"]]
    assert own["reward"] > 0


def test_results_of_tools_have_their_names() -> None:
    here = Verifiers(made("tool"))
    here.reset(0)
    assert stepped(here, CALL)[0] == [{"role": "tool", "name": "add", "content": "2"}]
    answers, _, _ = stepped(here, BAD)
    assert [x["name"] for x in answers] == ["add", "sub"]
    (schema,) = here.schemas
    assert schema["function"]["name"] == "add"
    assert set(schema["function"]["parameters"]["properties"]) == {"a", "b"}


def test_rows_are_beginnings() -> None:
    environment = made("guess", [guessed])
    assert len(Verifiers(environment)) == 3
    examples = starts(lambda: Verifiers(environment), 3)
    assert [x["prompt"][-1]["content"] for x in examples] == ["Say 0.", "Say 1.", "Say 2."]


def test_conversations_go_on_side_by_side_and_clean_up() -> None:
    environment = made("guess", [guessed])
    before = Guess.left
    one, other = Verifiers(environment), Verifiers(environment)
    one.reset(0)
    other.reset(2)
    assert stepped(one, "1")[0] == [{"role": "user", "content": "lower"}]
    assert stepped(other, "1")[0] == [{"role": "user", "content": "higher"}]
    assert stepped(one, "0") == ([{"role": "user", "content": "Right."}], 0.5, True)
    one.reset(1)
    one.reset(1)
    other.reset(1)
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), adapter.LOOP.loop).result()
    assert Guess.left == before + 3  # one that ended, and two that were left


def raising(completion: Any) -> float:
    raise ValueError("no number")


def compared(completions: Any) -> list[float]:
    return [0.0] * len(completions)


class Rewriting(Guess):
    async def get_prompt_messages(self, state: Any) -> Any:
        return [{"role": "user", "content": f"Begin again ({len(state['trajectory'])})."}]


class Paying(Guess):
    async def add_trajectory_step(self, state: Any, step: Any) -> None:
        step["reward"] = 1.0
        await super().add_trajectory_step(state, step)


class Failing(Guess):
    async def env_response(self, messages: Any, state: Any, **_: Any) -> Any:
        raise vf.ToolCallError("out of order") from OSError("no disk")


class Own(Guess):
    async def setup_state(self, state: Any) -> Any:
        state["tool_defs"] = [vf.Tool(name="add", description="Add.", parameters={})]
        return state


@pytest.mark.parametrize(
    ("kind", "funcs", "message"),
    [
        (vf.SingleTurnEnv, [raising], "Error calling reward function raising: no number"),
        (Rewriting, [length], "rewrites what was said"),
        (Paying, [length], "pays single turns"),
        (Failing, [length], r"ended a conversation with an error \(ToolCallError, no disk\)"),
        (Own, [length], "tools of its own"),
    ],
)
def test_what_cannot_be_a_conversation(kind: Any, funcs: Any, message: str) -> None:
    here = Verifiers(kind(dataset=Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=funcs)))
    with pytest.raises(UserError, match=message):  # noqa: PT012
        here.reset(1)
        stepped(here, "2")
        stepped(here, "1")


def test_what_cannot_be_an_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a Dataset is no environment of verifiers"):
        Verifiers(Dataset.from_list(ROWS))
    with pytest.raises(UserError, match="compares the rollouts of a group"):
        Verifiers(made("single", [compared]))
    with pytest.raises(UserError, match=r"verifiers loads no environment 'not-there' \(No module named 'not_there'\)"):
        verifiers_environment("not-there")
    with pytest.raises(UserError, match="nothing to train on"):
        len(Verifiers(vf.SingleTurnEnv(eval_dataset=Dataset.from_list(ROWS), rubric=vf.Rubric(funcs=[length]))))


def test_an_installed_environment_leaves_the_signals_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "say_it.py").write_text(
        "import verifiers as vf\nfrom datasets import Dataset\n\n\ndef load_environment():\n"
        "    data = Dataset.from_list([{'question': 'Say 1.', 'answer': '1'}])\n"
        "    return vf.SingleTurnEnv(dataset=data, rubric=vf.Rubric(funcs=[lambda completion: 1.0]))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)]
    make = verifiers_environment("org/say-it")
    assert [signal.getsignal(x) for x in (signal.SIGINT, signal.SIGTERM)] == before
    assert make().environment is make().environment, "loaded once"
    here = make()
    assert here.reset(0) == [{"role": "user", "content": "Say 1."}]
    assert stepped(here, "1") == (None, 1.0, True)
