"""The built-in reward functions."""

import re
from typing import Any

from policygrad.errors import UserError, one_line, shortened
from policygrad.language.rewards import mathematics
from policygrad.language.rewards.calling import Column, Reward, text_of


def final_answer(text: str) -> str:
    """The part of a text after its last `####` or `Answer:` (in any case), or else the whole text; stripped."""
    return re.split(r"####|\banswer:", text, flags=re.IGNORECASE)[-1].strip()


def exact_match(prompts: Column, completions: Column, answer: Column, **_: Any) -> list[float | None]:
    """1 if the final answer of the completion is that of the answer, to the letter; 0 if not; None without an answer.

    Both are reduced to their final answer (see final_answer), so GSM8K's worked answers can be used as they are.
    """
    return [
        None if gold is None else float(final_answer(text_of(completion)) == final_answer(_written(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]


def math_equal(prompts: Column, completions: Column, answer: Column, **_: Any) -> list[float | None]:
    """1 if completion and answer are mathematically equal, by math-verify; 0 if not; None if the answer is no formula.

    A completion's answer is its last \\boxed{}, or else what math-verify finds in the final answer. A comparison of
    more than 3 seconds counts as a wrong answer.
    """
    values: list[float | None] = []
    for completion, gold in zip(completions, answer, strict=True):
        formula = "" if gold is None else _formula(_written(gold))
        equal = mathematics.equal(formula, _formula(text_of(completion))) if formula else None
        values.append(None if equal is None else float(equal))
    return values


def matches(pattern: str) -> Reward:
    """A reward function: 1 if the regular expression matches the whole completion (`.`: any character), else 0."""
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise UserError(
            f"the regular expression {shortened(pattern)} cannot be read: {one_line(error, 70)}; fix it, or escape it"
        ) from error

    def format(prompts: Column, completions: Column, **_: Any) -> list[float]:
        return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]

    return format


def soft_overlong_penalty(max_length: int, buffer: int) -> Reward:
    """A reward function: 0 for up to max_length - buffer tokens, then linearly down to -1 at max_length and beyond.

    min(0, max(-1, (max_length - buffer - |y|) / buffer)): DAPO, eq. 13 (Yu et al. 2025, arXiv 2503.14476). |y| counts
    all tokens of a completion, as the limit does, also those that an engine inserted.
    """
    if not 0 < buffer <= max_length:
        raise UserError(
            f"the overlong penalty has a buffer of {buffer} tokens and a longest completion of {max_length}: "
            f"give a buffer between 1 and {max_length}"
            if max_length > 0
            else f"the overlong penalty has a longest completion of {max_length} tokens: give at least 1"
        )

    def overlong(prompts: Column, completions: Column, completion_ids: Column, **_: Any) -> list[float]:
        return [min(0.0, max(-1.0, (max_length - buffer - len(ids)) / buffer)) for ids in completion_ids]

    return overlong


def _formula(text: str) -> str:
    """The part of a text that math-verify reads; between dollars if it is a formula without any words."""
    if "\\boxed" in text:
        return text
    text = final_answer(text)
    worded = re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}|\$|\\\(|\\\[", text)
    return f"${text}$" if text and not worded else text


def _written(answer: Any) -> str:
    """An answer as text. A column with gaps holds 72.0 for 72, so a whole number is written without its point."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
