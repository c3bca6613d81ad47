"""Environments of verifiers (pip install policygrad[verifiers]) as conversations: its own rollouts, by turns."""

import asyncio
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any

from policygrad.errors import UserError, one_line, shortened, type_of
from policygrad.language.conversations import Message, Messages
from policygrad.language.rewards.calling import FOREVER, LOOP
from policygrad.language.tools import before_calls, json_object, parts_of_calls

NAME = "policygrad"  # of the model, as environments see it
FAULTS: ContextVar[list[str]] = ContextVar("FAULTS")  # what the rubric of a rollout logged as errors


class Verifiers:
    """An environment of verifiers, of its class `Environment`: SingleTurnEnv, MultiTurnEnv, ToolEnv and theirs.

    environment: may serve many conversations at once. Its data set has the beginnings, a row a seed, and its rubric
    pays at the end. verifiers' own rollout runs, with its stop conditions and its state; it is given the policy's turn
    in the place of a model's response, and only the seed's row and the turns decide what it does.

    Calls in a turn (see tools.py) are its `tool_calls`, which the environment answers; what is no JSON object with a
    name stays text. A conversation that is cut by limits of this library has no reward of the rubric.

    Raises UserError for another environment; for one whose rubric compares rollouts; where a reward function raises,
    which verifiers would count as 0; for a rollout that ends with an error, that rewrites what was said, or that has
    tools or rewards of single turns.
    """

    def __init__(self, environment: Any) -> None:
        base = _package().Environment
        if not isinstance(environment, base):
            raise UserError(f"{type_of(environment)} is no environment of verifiers: give one of its class Environment")
        if environment.requires_group_rollouts:
            raise UserError("its rubric compares the rollouts of a group, and conversations are judged one by one")
        _clients().register(_Turns)
        self.environment = environment
        self.turns: _Turns | None = None

    def __len__(self) -> int:
        """The rows of the data set."""
        return len(_rows(self.environment))

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """The JSON schemas of the tools that the environment answers."""
        return [_schema(tool) for tool in self.environment.tool_defs or []]

    def reset(self, seed: int) -> Messages:
        """Begin with the row of that number."""
        self._leave()
        row = dict(_rows(self.environment)[seed])
        self.turns = _Turns(self.environment)
        messages, _, over = _run(self.turns.begin(row))
        if over:
            raise UserError(f"row {seed} ends before the policy's first turn: leave it out of the data set")
        return messages

    def step(self, text: str) -> tuple[Messages | None, float, bool]:
        """What the environment says to it; at the end the reward of the rubric."""
        assert self.turns is not None
        found: tuple[Messages | None, float, bool] = _run(self.turns.say(text))
        return found

    def _leave(self) -> None:
        """End a rollout that is not at its end, so that it cleans up."""
        if self.turns is not None:
            self.turns.cancel()

    def __del__(self) -> None:
        if getattr(self, "turns", None) is not None:
            self._leave()


class _Turns:
    """What a rollout takes for the client of a model: each response that it asks for is a turn of the policy.

    It is registered as a client of verifiers, because a subclass would have to import the package.
    """

    def __init__(self, environment: Any) -> None:
        self.environment = environment
        self.asked: asyncio.Queue[Messages] = asyncio.Queue()
        self.said: asyncio.Queue[str] = asyncio.Queue()
        self.known: list[Any] = []  # messages: what the policy saw, and its turn
        self.calls: dict[str, str] = {}  # of tools in the turns: id -> name
        self.count = 0  # of turns
        self.rollout: asyncio.Task[Any] | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.state: Any = None
        self.faults: list[str] = []

    async def begin(self, row: dict[str, Any]) -> tuple[Messages | None, float, bool]:
        """Start the rollout."""
        logging.getLogger("verifiers").addHandler(HANDLER)
        FAULTS.set(self.faults)
        self.loop = asyncio.get_running_loop()
        self.rollout = asyncio.create_task(self.environment.run_rollout(row, self, NAME, {}))
        return await self._heard()

    async def say(self, text: str) -> tuple[Messages | None, float, bool]:
        """Go on with the policy's turn."""
        self.said.put_nowait(text)
        return await self._heard()

    def cancel(self) -> None:
        """End the rollout, which cleans up."""
        if self.loop is not None and self.rollout is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.rollout.cancel)

    async def get_response(self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **kwargs: Any) -> Any:
        """The policy's turn after these messages."""
        self.state = kwargs["state"]
        if list(tools or []) != list(self.environment.tool_defs or []):
            raise UserError("a row of the data set has tools of its own: only the environment's are shown")
        if list(prompt[: len(self.known)]) != self.known:
            raise UserError("the environment rewrites what was said: only what is appended can be learned from")
        self.asked.put_nowait(self._plain(prompt[len(self.known) :]))
        response = _response(await self.said.get(), [tool.name for tool in tools or []], self.count)
        self.count += 1
        self.calls |= {call.id: call.name for call in response.message.tool_calls or []}
        self.known = [*prompt, *await _messages_of(response)]
        return response

    async def _heard(self) -> tuple[Messages | None, float, bool]:
        """What comes next: messages for the policy, or the end."""
        assert self.rollout is not None
        asked = asyncio.ensure_future(self.asked.get())
        await asyncio.wait({asked, self.rollout}, return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return asked.result(), 0.0, False
        asked.cancel()
        return self._end(self.rollout.result())

    def _end(self, found: Any) -> tuple[Messages | None, float, bool]:
        """The last messages and the reward of a rollout that is over."""
        state = self.state or {}
        error = state.get("error")
        if error is not None:
            cause = error.__cause__ or error
            said = f"{type(error).__name__}, {one_line(cause, 80)}"
            raise UserError(f"the environment ended a conversation with an error ({said}): fix it") from error
        if self.faults:
            raise UserError(f"{one_line(self.faults[0], 140)}: fix it, or let it return 0 itself")
        if any(step["reward"] is not None or step["advantage"] is not None for step in state.get("trajectory", ())):
            raise UserError("the environment pays single turns, which is not read: let its rubric pay for the whole")
        last = state.get("final_env_response")
        return (self._plain(_normalized(last)) if last else None), float(found["reward"]), True

    def _plain(self, messages: Sequence[Any]) -> Messages:
        """Messages of verifiers as dicts, results of tools by their names; those of the role `text` as text."""
        if messages and all(x.role == "text" for x in messages):
            return "".join(x.content for x in messages)
        found: list[Message] = [x.model_dump(exclude_none=True) for x in messages]
        for message in found:
            if "tool_call_id" in message:
                message["name"] = self.calls.get(message.pop("tool_call_id"), "")
        return found


class _Handler(logging.Handler):
    """It keeps what rubrics log as errors; by default verifiers logs nothing, and counts such a reward as 0."""

    def emit(self, record: logging.LogRecord) -> None:
        if ".rubrics." in record.name:
            FAULTS.get([]).append(record.getMessage())


HANDLER = _Handler(logging.ERROR)


def verifiers_environment(name: str) -> Callable[[], Verifiers]:
    """What makes conversations of an installed environment, by its name. It runs that package's code.

    Raises UserError if there is none, or if it cannot be one here.
    """
    Verifiers(_loaded(name))
    return partial(Verifiers, _loaded(name))


@lru_cache(maxsize=16)
def _loaded(name: str) -> Any:
    package = _package()
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        return package.load_environment(name)
    except Exception as error:
        said = one_line(error.__cause__ or error, 80) or type(error).__name__
        raise UserError(f"verifiers loads no environment {shortened(name, 40)} ({said}): see to that first") from error
    finally:
        for number, handler in before.items():  # it takes both signals, and the run's own end is then lost
            signal.signal(number, handler)


def _package() -> Any:
    try:
        import verifiers

        verifiers.Environment  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise UserError("verifiers below 0.4 is not installed: pip install policygrad[verifiers]") from error
    return verifiers


def _clients() -> Any:
    """The class that verifiers asks a client to be of."""
    from verifiers.clients import Client

    return Client


def _rows(environment: Any) -> Any:
    try:
        return environment.get_dataset()
    except ValueError as error:
        raise UserError(
            f"the environment has nothing to train on ({one_line(error, 80)}): give it a dataset"
        ) from error


def _run(work: Any) -> Any:
    """What a coroutine returns, in the event loop of all. Raises what it raises."""
    found, error = LOOP.run({0: work}, FOREVER)[0]
    if error is not None:
        raise error
    return found


def _response(text: str, names: Sequence[str], turn: int) -> Any:
    """The policy's turn as a response: its text before the first call, and the calls."""
    from verifiers.types import Response, ResponseMessage, ToolCall

    found = [json_object(part) for part in parts_of_calls(text, names)] if names else []
    calls: list[Any] = []
    for written in found:
        if written is not None and isinstance(written.get("name"), str):
            arguments = written.get("arguments", written.get("parameters", {}))
            given = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            calls.append(ToolCall(id=f"call_{turn}_{len(calls)}", name=written["name"], arguments=given))
    message = ResponseMessage(
        content=before_calls(text) if calls else text,
        tool_calls=calls or None,
        finish_reason="tool_calls" if calls else "stop",
        is_truncated=False,
    )
    return Response(id=f"turn_{turn}", created=int(time.time()), model=NAME, message=message)


async def _messages_of(response: Any) -> list[Any]:
    """The messages that a rollout makes of a response."""
    from verifiers.utils.response_utils import parse_response_message

    made: list[Any] = await parse_response_message(response)
    return made


def _normalized(messages: Any) -> Any:
    from verifiers.utils.message_utils import normalize_messages

    return normalize_messages(messages)


def _schema(tool: Any) -> dict[str, Any]:
    """A tool of verifiers, as chat templates read one."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}
