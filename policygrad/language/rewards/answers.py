"""Where the answer of a completion stands, and what of a completion is only its prompt again."""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

from policygrad.language.rewards.numerals import NUMERAL, STATES, denied, plain

PIECE = 4  # words in a row that make a completion's text a piece of its prompt
LONG_PIECE = 8  # words in a row that make a completion one that repeats its prompt
WORD = re.compile(r"[A-Za-z]+|\d+(?:[.,]\d+)*|[-+*/^=\u00d7\u00f7]")
OF_MARKS = frozenset(("the", "final", "answer", "is", "boxed", "so"))  # words of a mark, which are nobody's own
# A mark, up to where its answer begins.
MARK = re.compile(r"####|<answer>|(?:\bfinal\s+)?\banswer\s*[*_`]*\s*:\s*[*_`]*", re.IGNORECASE)


def own_words(completion: str, prompt: str, gold: str = "") -> str:
    """The completion without the pieces that stand in its prompt, which are no answer of its own.

    A piece is PIECE or more words in a row. One that is the gold answer to the letter stays.
    """
    words, copied = _copied(completion, prompt, PIECE)
    ours = [word for _, _, word in _words(gold)]
    kept, end = [], 0
    for first, last in _runs(copied):
        if [word for _, _, word in words[first : last + 1]] != ours:
            kept.append(completion[end : words[first][0]])
            end = words[last][1]
    return "\n".join([*kept, completion[end:]])


def repeats(completion: str, prompt: str) -> bool:
    """Whether LONG_PIECE words in a row stand in the prompt, or all words in pieces of PIECE or more."""
    _, pieces = _copied(completion, prompt, PIECE)
    return bool(pieces) and (all(pieces) or any(_copied(completion, prompt, LONG_PIECE)[1]))


def marked(text: str) -> list[list[str]]:
    """The answers that a text marks: \\boxed{} last, before it <answer>, `Final answer:`, and `Answer:` or `####`.

    The last of the last kind is the one that counts. A heading, which is a `####` before words, counts only there, and
    `Answer:` only without a `Final answer:`.
    """
    found: dict[str, list[str]] = {"": [], "f": [], "<": []}
    marks = list(MARK.finditer(text))
    for mark in marks:
        kind = mark[0][0].lower() if mark[0][0].lower() in found else ""
        rest = re.split(r"</answer>", text[mark.end() :], flags=re.IGNORECASE)[0] if kind == "<" else text[mark.end() :]
        content = rest.strip().partition("\n")[0].strip()
        heading = mark[0] == "####" and mark is not marks[-1] and re.match(r"[*_]*[A-Za-z]{2}", content)
        if content and not heading and not MARK.match(content):
            found[kind].append(content)
    if found["f"]:
        found[""] = []
    return [x for x in (*found.values(), list(_boxed(text))) if x]


def last_words(text: str) -> str:
    """The text after the model's thinking, without the marks of GSM8K's calculator."""
    return re.sub(r"<<[^<>\n]*>>", "", re.split(r"</think(?:ing)?>", text)[-1])


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, without the numbers of a list."""
    text = re.sub(r"(?m)^\s*\d{1,2}[.)]\s+(?=\D)", "", text)
    return [x.strip() for x in re.split(r"(?<=[.!?])\s+|\n+", text) if x.strip()]


def stated(text: str) -> list[str]:
    """The sentences of a text without marks that state its answer; the last is the one that counts.

    Those that speak of an answer; or else the last with a number or a formula, after those that are a bare number.
    """
    lines = sentences(text)
    answers = [x for x in lines if re.search(r"\banswer\b.*(?:\d|\$|\\)", x, re.IGNORECASE)]
    if answers:
        return answers
    bare = [x for x in lines if NUMERAL.fullmatch(plain(x).strip(" .,;:=()"))]
    return bare + ([x for x in lines if re.search(r"\d|\$|\\", x)] or lines)[-1:]


def formula(sentence: str) -> str:
    """The formula that a sentence states, without its dollars; empty if there is none, or if it is denied."""
    sentence = re.sub(r"\*\*|__|`", "", sentence).strip().rstrip(".,;").strip()
    found = list(re.finditer(r"\$\$?(.+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", sentence))
    if found:
        between = [sentence[a.end() : b.start()] for a, b in pairwise(found)]
        first = len(found) - 1
        while first and re.fullmatch(r"\s*(?:,|,?\s*(?:and|or)|,\s*)\s*", between[first - 1]):
            first -= 1
        if denied(sentence[: found[first].start()]) or re.search(r"[A-Za-z]{2}", sentence[found[-1].end() :]):
            return ""
        return ", ".join(next(filter(None, x.groups())) for x in found[first:])
    cut = list(STATES.finditer(sentence))
    words = [m for m in cut if re.match(r"[A-Za-z:]", m[0])]
    if words:
        if denied(sentence[: words[-1].start()]):
            return ""
        sentence = sentence[words[-1].end() :].strip()
    return sentence


def said(text: Any) -> str:
    """A short answer as it is compared by the letter: without markdown, LaTeX's text and outer dollars."""
    return " ".join(plain(str(text)).split())


def _boxed(text: str) -> Iterator[str]:
    for start in re.finditer(r"\\f?boxed\s*(?=\{|\d)", text):
        if text[start.end()] != "{":
            yield text[start.end()]
            continue
        depth = 0
        for i in range(start.end(), len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                before = sentences(text[: start.start()] + "\x00")[-1]
                after = re.match(r"[$\s)\\\]}]*(?:\\text\{)?\s*or\b|[-+*/^]", text[i + 1 :])
                yield "" if after or denied(before) else text[start.end() + 1 : i]
                break


def _words(text: str) -> list[tuple[int, int, str]]:
    found = ((m.start(), m.end(), m[0].casefold()) for m in WORD.finditer(text))
    return [x for x in found if x[2] not in OF_MARKS]


def _copied(completion: str, prompt: str, length: int) -> tuple[list[tuple[int, int, str]], list[bool]]:
    """The words of a completion, each with its place, and whether it stands in a piece of the prompt of this length."""
    words, pieces = _words(completion), _pieces(prompt, length)
    copied = [False] * len(words)
    for i, piece in enumerate(_in_a_row([word for _, _, word in words], length)):
        if piece in pieces:
            copied[i : i + length] = [True] * length
    return words, copied


@lru_cache(maxsize=256)  # a prompt has many completions
def _pieces(prompt: str, length: int) -> frozenset[tuple[str, ...]]:
    return frozenset(_in_a_row([word for _, _, word in _words(prompt)], length))


def _in_a_row(words: list[str], length: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[k:] for k in range(length)), strict=False)


def _runs(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """(first, last) of each run of True."""
    first = None
    for i, flag in enumerate([*flags, False]):
        if flag and first is None:
            first = i
        elif not flag and first is not None:
            yield first, i - 1
            first = None
