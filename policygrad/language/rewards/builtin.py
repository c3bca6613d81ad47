"""The built-in reward functions."""

import re
from collections.abc import Callable
from itertools import chain
from typing import Any

from policygrad.errors import UserError, one_line, shortened
from policygrad.language.rewards import mathematics
from policygrad.language.rewards.answers import MARK, formula, last_words, marked, own_words, said, stated
from policygrad.language.rewards.calling import Column, Reward, text_of
from policygrad.language.rewards.numerals import number, plain, same


def final_answer(text: str) -> str:
    """The answer that a text marks (see answers.marked), or else the whole text; stripped."""
    marks = marked(text)
    return marks[-1][-1] if marks else "" if MARK.fullmatch(text.strip()) else text.strip()


def exact_match(prompts: Column, completions: Column, answer: Column, **_: Any) -> list[float | None]:
    """1 if the final answer of the completion is that of the answer, to the letter; 0 if not; None without an answer.

    Both are reduced to their final answer (see final_answer), so GSM8K's worked answers can be used as they are, and to
    what markdown and LaTeX show: **72**, $72$ and 72 are the same. A completion that marks different answers has none,
    unless it corrects itself between them. Nor is a piece of the prompt an answer.
    """
    return _each(_same_letters, prompts, completions, answer)


def math_equal(prompts: Column, completions: Column, answer: Column, **_: Any) -> list[float | None]:
    """1 if the completion's answer is equal to the answer; 0 if not; None if that is empty or no formula.

    A number is met by one number as it is written (digits, a decimal, a fraction, a percentage, a LaTeX numeral, with
    its unit or without), and not by an expression such as 7+5. A formula is met by an equal one of no more than its
    kind, by math-verify: an integral meets only an integral. A comparison of more than 3 seconds is a wrong answer.

    The answer of a completion is what it marks (\\boxed{}, <answer>, `Answer:`, ####), or else what its last sentence
    about an answer or a number states. Different answers without a correction between them, or one that is denied, are
    none. Nor is a piece of the prompt: four of its words in a row, or a formula of it.
    """
    return _each(_equal, prompts, completions, answer)


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

    overlong.starts = max_length - buffer  # type: ignore[attr-defined]  # tokens below which it never applies
    return overlong


def _each(
    judge: Callable[[str, str, str], bool | None], prompts: Column, completions: Column, answers: Column
) -> list[float | None]:
    """The verdicts of (gold, own words of the completion, prompt). An answer in a list may be any of its entries."""
    values: list[float | None] = []
    for prompt, completion, answer in zip(prompts, completions, answers, strict=True):
        found: list[bool | None] = []
        for gold in answer if isinstance(answer, list | tuple) else [answer]:
            wanted = "" if gold is None else final_answer(_written(gold))
            ours = own_words(last_words(text_of(completion)), text_of(prompt), wanted)
            found.append(judge(wanted, ours, text_of(prompt)) if wanted else None)
        known = [x for x in found if x is not None]
        values.append(float(any(known)) if known else None)
    return values


def _same_letters(gold: str, text: str, prompt: str) -> bool:
    marks = marked(text)
    return {said(x) for x in (marks[-1] if marks else [text])} == {said(gold)}


def _equal(gold: str, text: str, prompt: str) -> bool | None:
    """Whether the answer of a text meets the gold one."""
    wanted, marks = None if re.search(r"\d\s*!", gold) else number(gold), marked(text)  # 5! is no 5 in a gold answer
    if wanted is None:
        if not mathematics.is_formula(gold):
            return None
        formulas = map(formula, dict.fromkeys(marks[-1] if marks else stated(text)[-1:] or [""]))
        verdicts = [mathematics.meets(gold, x, prompt) for x in dict.fromkeys(formulas)]
        return None if None in verdicts else all(verdicts)
    numbers = [number(x) for x in dict.fromkeys(reversed(list(chain(*marks)) if marks else stated(text)))]
    if not numbers or numbers[0] is None:
        return False
    ours = numbers[0].written
    copied = re.search(r"[/%*^]", ours) and ours.rstrip("%") != wanted.written.rstrip("%")
    if copied and ours in re.sub(r"\s", "", plain(prompt)):
        return False
    return all(same(wanted, x) for x in numbers if x is not None)


def _written(answer: Any) -> str:
    """An answer as text. A column with gaps holds 72.0 for 72, so a whole number is written without its point."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)
