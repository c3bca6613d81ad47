"""Conversations: the policy and an environment take turns, and every token that the policy chose is a decision.

Tokens are appended and never made again from text: what was sampled is what is trained on. What stands between two
turns of the policy (the end of a turn that was cut, the environment's messages, the beginning of the next turn) is a
hole in the mask: the policy sees it and is not scored on it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.language import data, templates
from policygrad.language.completions import Completions, Engine, Request
from policygrad.language.policies import LanguagePolicy
from policygrad.language.reading import Example
from policygrad.language.rewards.calling import limited, name_of
from policygrad.language.sampler import MULTIPLE, Answers, Judge, Prompts, judged

Message = dict[str, Any]
Messages = str | list[Message]  # text, or messages {"role": ..., "content": ...}
TURNS = 8  # of the policy, by default
SECONDS = 60.0  # for an environment's start, a reset or a step, by default


@runtime_checkable
class Environment(Protocol):
    """What the policy talks to: a game, a user, a problem with its judge. Each conversation has one of its own.

    It may also have `tools`, a list of functions (tools.py), whose calls are answered before it sees the text, or
    `schemas`, the JSON schemas of tools whose calls it answers itself.
    """

    def reset(self, seed: int) -> Messages:
        """Begin: the same seed gives the same beginning, so that conversations with one seed can be compared."""

    def step(self, text: str) -> tuple[Messages | None, float, bool]:
        """The policy's turn as text -> (what is said to it, or None at the end; the reward of its turn; the end)."""


class Limited:
    """An environment whose start, resets and steps have `seconds` each, and which has the tools of the one inside.

    Raises UserError if one of them takes longer, or raises.
    """

    def __init__(self, make: Callable[[], Environment], seconds: float) -> None:
        self.seconds = seconds
        self.environment = within(make, seconds, f"the start of {ending(name_of(make), 60)}")

    @property
    def tools(self) -> Sequence[Any]:
        """Those of the environment."""
        return getattr(self.environment, "tools", ())

    @property
    def schemas(self) -> Sequence[Any]:
        """Those of the environment."""
        return getattr(self.environment, "schemas", ())

    def reset(self, seed: int) -> Messages:
        """That of the environment."""
        found: Messages = _asked(self.environment, "reset", seed, self.seconds)
        return found

    def step(self, text: str) -> tuple[Messages | None, float, bool]:
        """That of the environment."""
        found: tuple[Messages | None, float, bool] = _asked(self.environment, "step", text, self.seconds)
        return found


Begin = Callable[[Mapping[str, Any]], Environment]  # the row of a prompt -> its environment, at the beginning


@dataclass(frozen=True)
class Dialogue:
    """How conversations are held.

    begin: makes the environment of a row. turns: of the policy, at most. turn_tokens: of one turn, at most; None: as
    many as there is room for. variables: of the chat template.
    """

    begin: Begin
    turns: int = TURNS
    turn_tokens: int | None = None
    variables: Mapping[str, Any] | None = None

    def __call__(
        self,
        policy: LanguagePolicy,
        prompts: Prompts,
        request: Request,
        tokenizer: PreTrainedTokenizerBase,
        judge: Judge | None,
        generator: torch.Generator,
        engine: Engine,
    ) -> Answers:
        """Hold `request.completions` conversations from every prompt, all turns of all of them in one batch.

        T = request.max_tokens is what a conversation may have after its prompt, the environment's tokens among them. A
        conversation is cut if the limit of turns or tokens came before its end, or in its last turn. A reward stands at
        the last decision of the turn that it is for; that of `judge`, which sees the last turn, at the last decision.

        Raises UserError if an environment raises, or returns anything else than `Environment` says.
        """
        if "conversation" in prompts.columns:
            raise UserError(
                "the data has a column 'conversation', which is what rewards see of a conversation: rename it by "
                "columns, such as data_conversation=conversation"
            )
        repeated = prompts.take(torch.arange(len(prompts)).repeat_interleave(request.completions))
        rows = [
            _Row(self.begin({name: column[i] for name, column in repeated.columns.items()}), text)
            for i, text in enumerate(repeated.texts)
        ]
        asked = [row.tolist() for row in repeated.tokens.split(repeated.lengths.tolist())]
        for turn in range(self.turns):
            going = [i for i, row in enumerate(rows) if not row.over]
            if not going:
                break
            room = [request.max_tokens - len(rows[i].tokens) for i in going]
            most = min(max(room), self.turn_tokens or request.max_tokens)
            first = turn == 0
            part = replace(request, max_tokens=most, completions=request.completions if first else 1)
            contexts = prompts.padded() if first else _padded([asked[i] + rows[i].tokens for i in going], prompts.pad)
            context, seen = (x.to(next(policy.parameters()).device) for x in contexts)
            said = engine(policy, context, seen, part, generator)
            for i, space, ids, logp, mask, cut in zip(
                going, room, said.ids(), said.logp.tolist(), said.mask.tolist(), said.cut.tolist(), strict=True
            ):
                rows[i].say(ids[:space], logp, mask, cut or len(ids) > space, tokenizer)
            for i in going:
                rows[i].hear()
            still = [rows[i] for i in going if not rows[i].over]
            if turn + 1 < self.turns:
                self._answer(still, request, tokenizer)
        return _answers(rows, repeated, request, tokenizer, judge, said.logp)

    def _answer(self, rows: Sequence["_Row"], request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
        """Append what stands before the next turn of each row; a row without room for it and one token more is over."""
        for row, between in zip(rows, tokens_between(rows, request, tokenizer, self.variables), strict=True):
            if len(row.tokens) + len(between) < request.max_tokens:
                row.append(between)
            else:
                row.over = True


@dataclass
class _Row:
    """A conversation as it grows: its messages, and the tokens after its prompt with what belongs to each."""

    environment: Environment
    start: Messages
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    earned: list[float] = field(default_factory=list)
    state: list[int] = field(default_factory=list)  # of the environment, before each token
    said: list[Message] = field(default_factory=list)  # after the prompt
    heard: Messages = ""  # what the policy answers next
    cut: bool = True  # the newest turn has no end
    over: bool = False  # nothing more is said, at the end or at a limit
    ended: bool = False  # by the environment

    def __post_init__(self) -> None:
        self.heard = self.start

    @property
    def chat(self) -> bool:
        """Whether there are messages, for a chat template; else all is plain text, one piece after another."""
        return not isinstance(self.start, str)

    def append(self, tokens: Sequence[int], logp: Sequence[float] = (), mask: Sequence[bool] = ()) -> None:
        """Tokens as they are; without a mask they are not the policy's."""
        count = len(tokens)
        self.tokens += tokens
        self.logp += list(logp[:count]) if mask else [0.0] * count
        self.mask += list(mask[:count]) if mask else [False] * count
        self.earned += [0.0] * count
        self.state += [_number(self.heard)] * count

    def say(
        self,
        ids: Sequence[int],
        logp: Sequence[float],
        mask: Sequence[bool],
        cut: bool,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """The policy's turn."""
        self.append(ids, logp, mask)
        self.cut = cut
        text = tokenizer.decode(list(ids), skip_special_tokens=True)
        self.said.append({"role": "assistant", "content": text})

    def hear(self) -> None:
        """The environment's answer to it."""
        heard, reward, self.ended = stepped(self.environment, str(self.said[-1]["content"]))
        last = max(t for t, mine in enumerate(self.mask) if mine)
        self.earned[last] += reward
        self.over = self.ended
        if heard is not None:
            self.heard = _spoken(heard) if self.chat else text_in(heard)
            self.said += _spoken(heard)

    @property
    def messages(self) -> list[Message]:
        """All of them, those of the prompt first."""
        return _spoken(self.start) + self.said


def stepped(environment: Environment, text: str) -> tuple[Messages | None, float, bool]:
    """environment.step(text), checked. Raises UserError for anything that is not (messages or None, reward, end)."""
    found = _asked(environment, "step", text)
    if not isinstance(found, tuple) or len(found) != 3:
        raise UserError(f"step returned {shortened(found)}: return (messages or None, reward, whether it is the end)")
    heard, reward, end = found
    try:
        number = float(reward)
    except (TypeError, ValueError):
        raise UserError(f"step returned the reward {shortened(reward)}: return a number") from None
    if not math.isfinite(number):
        raise UserError(f"step returned the reward {number}: return a finite number")
    heard = None if heard is None else checked(heard, "step")
    if heard is None and not end:
        raise UserError("step returned no messages, and not the end either: return what is said next, or end with True")
    return heard, number, bool(end)


def checked(heard: Any, what: str) -> Messages:
    """Text that is not empty, or messages of others than the assistant. Raises UserError for anything else."""
    try:
        found = data.text_or_messages(heard)
    except ValueError as error:
        raise UserError(f"{what} returned messages: what it returned {one_line(error, 80)}; {data.MESSAGES}") from error
    if not found:
        raise UserError(f"{what} returned an empty text: say something, or end the conversation")
    if not isinstance(found, str) and what == "step" and any(x["role"] == "assistant" for x in found):
        raise UserError("step returned a message of the assistant, which is the policy: return others' messages")
    return found


def starts(make: Callable[[], Environment], count: int, first: int = 0) -> list[Example]:
    """The beginnings of an environment for `count` seeds from `first` on, as rows with `prompt` and `seed`.

    Raises UserError if one seed gives two beginnings.
    """
    examples = []
    for seed in range(first, first + count):
        examples.append(Example({"prompt": begun(make(), seed), "seed": seed}))
        examples[-1].number = seed
    if begun(make(), first) != examples[0]["prompt"]:
        raise UserError(
            f"reset({first}) gives another beginning the second time: let it depend on its seed alone, since "
            "conversations of a group begin alike"
        )
    return examples


def begun(environment: Environment, seed: int) -> Messages:
    """environment.reset(seed), checked. Raises UserError for anything that is not text or messages."""
    return checked(_asked(environment, "reset", seed), "reset")


def within(work: Callable[[], Any], seconds: float, what: str) -> Any:
    """What the work returns. Raises what it raises, and UserError if it takes longer. what: the work, in words."""
    outcome = limited(work, seconds)
    if outcome is None:
        raise UserError(f"{what} did not finish within {seconds:g} s: fix it, or raise step_time_limit")
    found, error = outcome
    if error is not None:
        raise error
    return found


def _asked(environment: Environment, what: str, argument: str | int, seconds: float | None = None) -> Any:
    """environment.what(argument). Raises UserError in the place of what it raises, and if it takes longer."""
    name, ask = ending(type(environment).__name__, 60), getattr(environment, what)
    try:
        return ask(argument) if seconds is None else within(lambda: ask(argument), seconds, f"{what} of {name}")
    except UserError:
        raise
    except Exception as error:
        said = one_line(error, 70) or "no message"
        raise UserError(
            f"{what} of {name} raised {type(error).__name__}: {said}: fix it (--debug shows where)"
        ) from error


def from_seed(make: Callable[[], Environment]) -> Begin:
    """Environments that are reset with the seed of their row."""

    def begin(row: Mapping[str, Any]) -> Environment:
        environment = make()
        begun(environment, int(row["seed"]))
        return environment

    return begin


def tokens_between(
    rows: Sequence[_Row],
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The tokens between the newest turn of each row and its next one.

    Of messages: what the chat template writes between the two, from the end of the turn on. A turn that has its
    end-of-sequence token gets no second one. Of plain text: the text; a turn that was cut gets its end before it, the
    first stop text if there is one, else the end-of-sequence token.
    """
    chats = [row for row in rows if row.chat]
    written = templates.between([row.messages for row in chats], tokenizer, variables) if chats else []
    texts, closed = iter(written), request.stop_texts[0] if request.stop_texts else None
    found = []
    for row in rows:
        if row.chat:
            ids = data.as_tokens([next(texts)], tokenizer)[0]
            found.append(_after_the_end(ids, request, tokenizer) if row.tokens[-1] in request.stop else ids)
        else:
            end = (
                []
                if not row.cut
                else data.as_tokens([closed], tokenizer)[0]
                if closed
                else [int(tokenizer.eos_token_id)]
            )
            found.append(end + data.as_tokens([text_in(row.heard)], tokenizer)[0])
    if not all(found):
        raise UserError("nothing stands between two turns of the policy: let step return text that has tokens")
    return found


def _after_the_end(ids: list[int], request: Request, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the template writes after the end of a turn, if it writes an end at once, but for spaces."""
    end = next((k for k, token in enumerate(ids) if token in request.stop), None)
    return ids if end is None or str(tokenizer.decode(ids[:end])).strip() else ids[end + 1 :]


def text_in(heard: Messages) -> str:
    """Plain text, or the contents of messages one after another."""
    return heard if isinstance(heard, str) else "".join(str(x.get("content") or "") for x in heard)


def _spoken(heard: Messages) -> list[Message]:
    """Messages; text is the user's."""
    return [{"role": "user", "content": heard}] if isinstance(heard, str) else list(heard)


def _number(heard: Messages) -> int:
    """A number for what was heard: the same for the same, another for anything else but for 2^-63 by chance."""
    text = json.dumps(heard, sort_keys=True, default=str)
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") >> 1


def _padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Rows of tokens padded on the left, as Prompts.padded does."""
    return data.left_padded(rows, pad, math.ceil(max(map(len, rows)) / MULTIPLE) * MULTIPLE)


def _answers(
    rows: Sequence[_Row],
    prompts: Prompts,
    request: Request,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge | None,
    like: Tensor,
) -> Answers:
    """The conversations as answers, judged. like: a tensor of the type and the device of log-probabilities."""
    width, precise, device = request.max_tokens, like.dtype, like.device

    def column(name: str, fill: Any, dtype: torch.dtype) -> Tensor:
        made = [getattr(row, name) + [fill] * (width - len(row.tokens)) for row in rows]
        return torch.tensor(made, dtype=dtype, device=device)

    cut = torch.tensor([row.cut or not row.ended for row in rows], device=device)
    tokens = column("tokens", request.pad, torch.long)
    done = Completions(tokens, column("logp", 0.0, precise), column("mask", False, torch.bool), cut)
    earned = column("earned", 0.0, precise)
    last = [row.said[max(k for k, x in enumerate(row.said) if x["role"] == "assistant")]["content"] for row in rows]
    found = judged(prompts, done, last, tokenizer, judge, conversation=[row.said for row in rows])
    return replace(
        found,
        texts=["\n".join(str(x["content"]) for x in row.said if x["role"] == "assistant") for row in rows],
        reward=found.reward + earned.sum(1).to(found.reward),
        earned=earned,
        state=column("state", 0, torch.long),
        said=[row.said for row in rows],
    )
