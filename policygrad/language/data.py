"""Data sets of prompts and of preferences: checking, splitting, encoding as tokens.

Messages count rows from 0, as they stand in the data set.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from policygrad.errors import UserError, ending, listed, shortened
from policygrad.language import templates
from policygrad.language.reading import Example, Fault, read, refuse

T = TypeVar("T")
LONG = ("refuse", "drop")  # what becomes of a prompt that is too long
MESSAGES = 'give text, or a list of messages {"role": ..., "content": ...}'


def load_examples(sources: Any, *, split: str = "train", columns: Sequence[str] = ()) -> list[Example]:
    """The rows of a data set, each with a `prompt`: text, or a list of messages {"role": ..., "content": ...}.

    sources: a data set, or a list of several (see reading.read). columns: `new=old` renames a column. All other columns
    stay as they are. The content of a message is text: its parts are joined.

    Raises UserError if a source cannot be read or is empty, or if a row has no prompt; about all such rows at once.
    """
    examples = _load(sources, split, columns, ("prompt",))
    _check(examples, ("prompt",))
    return examples


def load_demonstrations(sources: Any, *, split: str = "train", columns: Sequence[str] = ()) -> list[Example]:
    """The rows of a data set of answers to learn from, each with `prompt` and `completion`. sources: see load_examples.

    The two are text, or lists of messages. Or a row has `messages`, and the last one, of the assistant, is the
    completion.
    """
    examples = _load(sources, split, columns, ())
    faults, whole = [], [example for example in examples if "messages" in example and "completion" not in example]
    _check(whole, ("messages",))
    for example in whole:
        messages = example.pop("messages")
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            faults.append((f"messages of {example.place}", "do not end with an answer of the assistant to others"))
        else:
            example |= {"prompt": messages[:-1], "completion": messages[-1:]}
    refuse(faults, "give messages, or prompt and completion")
    for example in examples:
        if "completion" not in example:
            known = listed(map(str, example))
            raise UserError(
                f"{example.place} has no column 'completion' or 'messages', only {known}: name the right one by "
                "columns, completion=..."
            )
    _check(examples, ("prompt", "completion"))
    for example in examples:
        prompt, completion = example["prompt"], example["completion"]
        if isinstance(prompt, str) and isinstance(completion, list):
            faults.append((example.place, "has a prompt of text and a completion of messages"))
        elif isinstance(completion, list) and [x["role"] for x in completion] != ["assistant"]:
            faults.append((f"the completion of {example.place}", "is not one message of the assistant"))
    refuse(faults, "give both as text, or messages and the assistant's answer")
    return examples


def load_preferences(sources: Any, *, split: str = "train", columns: Sequence[str] = ()) -> list[Example]:
    """The rows of a data set of comparisons, each with `prompt`, `chosen` and `rejected`. sources: see load_examples.

    The three are text, or lists of messages. In the data the prompt may stand in front of both answers, as their common
    beginning or as messages, with or without a column of its own.
    """
    examples = _load(sources, split, columns, ("chosen", "rejected"))
    _check(examples, ("chosen", "rejected"))
    explicit = [example for example in examples if "prompt" in example]
    _check(explicit, ("prompt",))
    faults = []
    for example in examples:
        try:
            example |= _compared(example)
        except ValueError as error:
            faults.append((f"the pair of {example.place}", str(error)))
    refuse(faults, "see docs/language-models.md for the layouts")
    return examples


def with_system_prompt(examples: Sequence[Example], text: str) -> list[Example]:
    """Prompts with a system message in front. A prompt of text becomes the user's message after it."""
    faults, changed = [], []
    for example in examples:
        prompt = example["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if messages[0]["role"] in ("system", "developer"):
            faults.append((f"the prompt of {example.place}", "has a system message of its own"))
        changed.append(with_columns(example, prompt=[{"role": "system", "content": text}, *messages]))
    refuse(faults, "leave system_prompt out, or take them out of the data")
    return changed


def hold_out(examples: Sequence[T], count: int, seed: int) -> tuple[list[T], list[T]]:
    """The examples to train on and `count` held-out ones, drawn at random; both in the order of the data.

    With the same seed a larger count holds out the same examples and more.
    """
    if not 0 <= count < len(examples):
        raise UserError(
            f"{count} of {len(examples)} examples cannot be held out: lower held_out, or give more examples"
        )
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    held = set(order[:count])
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [examples[i] for i in sorted(held)]


def columns_of(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Every column except the prompt; None where an example lacks it."""
    names = dict.fromkeys(name for example in examples for name in example if name != "prompt")
    return {name: [example.get(name) for example in examples] for name in names}


def encode_prompts(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The prompts as tokens.

    Text begins as the tokenizer begins a text, once, and has no end-of-sequence token after it. Conversations are
    written by the chat template, with its `variables`, up to the assistant's next message. If the last message is the
    assistant's, the prompt ends inside it, and the completion continues it.

    Raises UserError for a conversation without a template, and for prompts that it cannot write or that have no tokens.
    """
    texts = {i: example["prompt"] for i, example in enumerate(examples) if isinstance(example["prompt"], str)}
    chats = {i: _ended(example["prompt"]) for i, example in enumerate(examples) if i not in texts}
    faults: list[Fault] = []
    written: dict[int, str] = {}
    if variables and not chats:
        raise UserError("template_variables are for conversations, and all prompts are text: leave them out")
    if chats:
        found = templates.write(list(chats.values()), tokenizer, variables)
        for i, (text, error) in zip(chats, found, strict=True):
            if text is None:
                faults.append((f"the chat template cannot write the prompt of {place_of(examples, i)}:", str(error)))
            else:
                written[i] = text
    refuse(faults, "change the template or the row")
    rows = dict(zip(written, as_tokens(list(written.values()), tokenizer), strict=True))
    rows |= dict(zip(texts, encode_texts(list(texts.values()), tokenizer), strict=True))
    refuse(
        [(f"the prompt of {place_of(examples, i)}", "has no tokens") for i in range(len(examples)) if not rows[i]],
        "leave the row out, or give it a text",
    )
    return [rows[i] for i in range(len(examples))]


def encode_completions(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """The completions of demonstrations as tokens, each with the end-of-sequence token at its end.

    A text becomes tokens apart from its prompt, as a policy that answers sees it. An answer in a conversation is what
    the chat template writes after the prompt, up to its last end-of-sequence token. Raises UserError where the template
    does not write it there.
    """
    texts: dict[int, str] = {}
    chats = [i for i, example in enumerate(examples) if not isinstance(example["prompt"], str)]
    texts |= {i: str(x["completion"]) for i, x in enumerate(examples) if isinstance(x["prompt"], str)}
    if chats:
        prompts, wholes = (
            templates.write([(examples[i]["prompt"] + more(examples[i]), ending) for i in chats], tokenizer, variables)
            for ending, more in (("answer", lambda x: []), ("closed", _answer))
        )
        faults: list[Fault] = []
        for i, (prompt, _), (whole, error) in zip(chats, prompts, wholes, strict=True):
            if prompt is None or whole is None or not whole.startswith(prompt):
                said = str(error) if whole is None else "it does not begin as its prompt does"
                faults.append((f"the chat template cannot write the answer of {place_of(examples, i)}:", said))
            else:
                texts[i] = whole[len(prompt) :]
        refuse(faults, "change the template or the row")
    end = int(tokenizer.eos_token_id)
    rows = as_tokens([texts[i] for i in range(len(examples))], tokenizer)
    return [row[: len(row) - row[::-1].index(end)] if end in row else [*row, end] for row in rows]


def _answer(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The completion of a conversation as a message."""
    said = example["completion"]
    return [{"role": "assistant", "content": said}] if isinstance(said, str) else said


def openings(
    examples: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    variables: Mapping[str, Any] | None = None,
) -> list[str]:
    """What the chat template writes before each completion (see templates.openings); nothing for text."""
    chats = iter(
        templates.openings([x["prompt"] for x in examples if not isinstance(x["prompt"], str)], tokenizer, variables)
    )
    return ["" if isinstance(x["prompt"], str) else next(chats) for x in examples]


def encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts as tokens, begun as the tokenizer begins a text and without an end.

    A text that has this beginning already, since a template has written it, does not get it twice.
    """
    start = _beginning(tokenizer)
    return [row if row[: len(start)] == start else [*start, *row] for row in as_tokens(texts, tokenizer)]


def short_enough(
    rows: Sequence[Sequence[int]],
    places: Callable[[int], str],
    limit: int | None,
    long: str = "refuse",
    what: tuple[str, str] = ("prompts", "max_prompt_tokens"),
) -> list[int]:
    """The rows with at most `limit` tokens. Raises UserError if others are to be refused, or if none is left.

    what: the rows in words, and the option that limits them.
    """
    if limit is None:
        return list(range(len(rows)))
    kept = [i for i, row in enumerate(rows) if len(row) <= limit]
    count = len(rows) - len(kept)
    if count and (long == "refuse" or not kept):
        i = next(i for i, row in enumerate(rows) if len(row) > limit)
        advice = "set long_prompts to drop" if long == "refuse" else "choose another data set"
        raise UserError(
            f"{count:,} of {len(rows):,} {what[0]} are longer than {limit} tokens, the first in {places(i)} with "
            f"{len(rows[i])}: raise {what[1]}, or {advice}"
        )
    return kept


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
        if len(row):
            tokens[i, -len(row) :] = torch.as_tensor(row)
            mask[i, -len(row) :] = True
    return tokens, mask


def as_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Texts as tokens, none added."""
    if not texts:
        return []
    return [list(row) for row in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text, such as <s>."""
    bare, whole = as_tokens(["a"], tokenizer)[0], list(tokenizer("a", verbose=False)["input_ids"])
    places = [k for k in range(len(whole)) if whole[k : k + len(bare)] == bare]
    return whole[: places[0]] if places else []


def _ended(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Messages, and how the prompt ends: see templates.write."""
    if messages[-1]["role"] != "assistant":
        return messages, "answer"
    return (messages, "open") if messages[-1]["content"] else (messages[:-1], "answer")


def place_of(examples: Sequence[Mapping[str, Any]], i: int) -> str:
    """Where the i-th example comes from, for messages."""
    example = examples[i]
    return example.place if isinstance(example, Example) else f"row {i}"


def with_columns(example: Example, **columns: Any) -> Example:
    """A copy with other columns, of the same place."""
    changed = Example(example | columns)
    changed.__dict__.update(example.__dict__)
    return changed


def _load(sources: Any, split: str, columns: Sequence[str], required: Sequence[str]) -> list[Example]:
    """The rows of one or several data sets, their columns renamed. Each set must have the required ones."""
    several = sets_of(sources)
    renamed = _renamed_columns(columns)
    found: list[Example] = []
    missing = set(renamed.values())
    for number, source in enumerate(several):
        examples = read(source, split)
        origin = str(source) if isinstance(source, str | Path) else f"data set {number}"
        known = list(dict.fromkeys(name for example in examples for name in example))
        missing -= set(known)
        examples = [_renamed(example, renamed) for example in examples]
        named = {name for example in examples for name in example}
        for name in required:
            if name not in named:
                raise UserError(
                    f"{ending(origin)} has no column {name!r}, only {listed(known)}: name the right one by columns, "
                    f"{name}=..."
                )
        for example in examples:
            example.source, example.origin = number, origin if len(several) > 1 else ""
        found += examples
    if missing:
        raise UserError(
            f"columns renames {shortened(min(missing), 40)}, which no data set has: there are {listed(known)}"
        )
    return found


def sets_of(sources: Any) -> Sequence[Any]:
    """The data sets: those of a list, or the one that is given, which may be a list of rows."""
    several = isinstance(sources, list | tuple) and bool(sources) and not all(isinstance(x, Mapping) for x in sources)
    return sources if several else [sources]


def _renamed_columns(columns: Sequence[str]) -> dict[str, str]:
    """`new=old` texts as {new: old}. Raises UserError for another text, and for a name given twice."""
    pairs = [column.partition("=") for column in columns]
    for (new, equals, old), column in zip(pairs, columns, strict=True):
        if not (new and equals and old):
            raise UserError(f"columns has {shortened(column)}: give new=old, such as prompt=question")
    renamed = {new: old for new, _, old in pairs}
    if len(renamed) < len(pairs):
        raise UserError(f"columns gives one name to two columns ({listed(columns)}): give each a name of its own")
    return renamed


def _renamed(example: Example, renamed: Mapping[str, str]) -> Example:
    """An example with its columns renamed; a name that is taken must be given to another column too."""
    here = {new: old for new, old in renamed.items() if old in example}
    kept = {name: x for name, x in example.items() if name not in here.values()}
    taken = [name for name in here if name in kept]
    if taken:
        raise UserError(
            f"columns makes a {taken[0]!r}, and {example.place} has one already: rename that too, such as "
            f"old_{ending(taken[0], 40)}={ending(taken[0], 40)}"
        )
    changed = Example(kept | {new: example[old] for new, old in here.items()})
    changed.__dict__.update(example.__dict__)
    return changed


def _check(examples: Sequence[Example], names: Sequence[str]) -> None:
    """Make every entry of these columns text or messages of text, in place. Raises UserError about all others."""
    faults: list[Fault] = []
    for example in examples:
        for name in names:
            try:
                example[name] = text_or_messages(example[name])
            except KeyError:
                faults.append((example.place, f"has no {name}"))
            except ValueError as error:
                faults.append((f"{name} of {example.place}", str(error)))
    refuse(faults, MESSAGES)


def text_or_messages(value: Any) -> str | list[dict[str, Any]]:
    """Text, or messages of text. Raises ValueError that says what else it is."""
    if isinstance(value, str):
        return _encodable(value)
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"is {shortened(value)}")
    return [_message(message) for message in value]


def _message(message: Any) -> dict[str, Any]:
    """A message whose content is text, or None beside tool calls; its other fields stay."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"has the message {shortened(message)}")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(map(_part, content))
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"has the message {shortened(dict(message))}")
    return {**message, "content": content if content is None else _encodable(content)}


def _part(part: Any) -> str:
    """The text of a part of a message's content."""
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        what = shortened(part, 40) if kind is None or kind == "text" else f"of type {shortened(kind, 20)}"
        raise ValueError(f"has a part {what}, and only parts of text can be read")
    return part["text"]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"is {shortened(text, 40)}, with half of a surrogate pair, which is no character") from None
    return text


def _compared(example: Example) -> dict[str, Any]:
    """Prompt, chosen and rejected of a comparison, whatever its layout. Raises ValueError if it has none.

    chosen and rejected may be whole texts or whole conversations, whose common beginning is the prompt.
    """
    prompt, chosen, rejected = example.get("prompt"), example["chosen"], example["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("has text and messages: give both answers as text, or both as messages")
    if isinstance(chosen, str):
        if isinstance(prompt, list):
            raise ValueError("has a prompt of messages and answers of text: give both as text, or both as messages")
        if prompt is None:
            prompt = _beginning_of_words(chosen, rejected)
            if not prompt:
                raise ValueError("has no prompt, and its answers have no common beginning")
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if isinstance(prompt, str) and not _asks(chosen, rejected, prompt):
        raise ValueError("has a prompt of text that its messages do not begin with: give both in one form")
    shared = len(prompt) if isinstance(prompt, list) else _shared(chosen, rejected)
    if not isinstance(prompt, list) or all(answer[:shared] == prompt for answer in (chosen, rejected)):
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    for name, answer in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not answer:
            raise ValueError(f"has a {name} without messages")
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant":
            raise ValueError(
                f"has a {name} answer that starts with a message of the {ending(answer[0]['role'], 20)}, not of the "
                "assistant"
            )
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """The number of messages at the beginning that both have; their last ones are answers."""
    count = 0
    while count < min(len(chosen), len(rejected)) - 1 and chosen[count] == rejected[count]:
        count += 1
    return count


def _asks(chosen: Sequence[Any], rejected: Sequence[Any], prompt: str) -> bool:
    """Whether the text of a prompt is the last message before the answers."""
    shared = _shared(chosen, rejected)
    return shared > 0 and str(chosen[shared - 1]["content"]).strip() == prompt.strip()


def _beginning_of_words(first: str, second: str) -> str:
    """What two texts begin with, up to the last space or line break, so that no word is divided."""
    pairs = enumerate(zip(first, second, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    words = re.match(r"(?s).*\s", first[:shared])
    return words[0] if words else ""
