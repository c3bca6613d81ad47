"""Where the answer of a completion stands, and what of a completion is only its prompt again."""

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import Any

from policygrad.language.rewards.numerals import AFTERWARDS, LONGEST, NUMERAL, SPACES, STATES, denied, plain, undenied

PIECE = 4  # words in a row that make a completion's text a piece of its prompt
LONG_PIECE = 8  # words in a row that make a completion one that repeats its prompt
WORD = re.compile(r"[A-Za-z]+|\d+(?:[.,]\d+)*|[-+*/^=\u00d7\u00f7]")
OF_MARKS = frozenset(("the", "final", "answer", "is", "boxed", "so"))  # words of a mark, which are nobody's own
# A mark, up to where its answer begins.
MARK = re.compile(r"####|<answer>|(?:\bfinal\s+)?\banswer\s*[*_`]*\s*:\s*[*_`]*", re.IGNORECASE)

# What takes back the answers before it, if another follows: `Wait, no, the answer is 12`.
CORRECTION = r"(?:oh|no|nope|wait|actually|correction|sorry|oops|hmm|scratch that|hold on|i mean|on second thought)\b"
CORRECTS = re.compile(
    rf"(?:^|(?<=[.!?)}}>*\n]))[ \t]*(?:but )?{CORRECTION}[\s,.:;!—-]*(?:{CORRECTION}[\s,.:;!—-]*)*", re.IGNORECASE
)
# Where the expression around a \boxed{} ends: at dollars, ends of lines and sentences, equality, words, another box.
AROUND = re.compile(
    r"(?<!\\)[=\n$&,;:]|\.(?!\d)|\\[()\[\]\\]|(?<![\\A-Za-z])[A-Za-z]{2,}|</?[A-Za-z]\w*>|[→⇒∴≈]|\*\*|__"
    r"|\\(?:text|mbox|mathrm|tag|begin|end)\s*\{[^{}]*\}|\\f?boxed\s*(?:\{[^{}]*\}|\d)"
    r"|\\(?:approx|in|to|implies|therefore|because|blacksquare|square|checkmark|(?:[Ll]ong)?[Rr]ightarrow)(?![A-Za-z])"
)


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
    `Answer:` only without a `Final answer:`. A correction takes back the marks before it, if there is one after it.
    """
    for rest in reversed(CORRECTS.split(text)[1:]):
        if found_after := marked(rest):
            return found_after
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
    text = re.sub(r"(?m)^[ \t]*\d{1,2}[.)]\s+(?=\D)", "", text)
    return [x.strip() for x in re.split(r"(?<=[.!?])\s+|\n+", text) if x.strip()]


def stated(text: str) -> list[str]:
    """The sentences of a text without marks that state its answer; the last is the one that counts.

    Those that speak of an answer, and alternatives to it (`Or 13`); or else the last with a number or a formula, after
    those that are a bare number. A correction (`No, 13`) takes back the sentences before it.
    """
    lines = sentences(text)
    for i in reversed(range(1, len(lines))):
        corrects = CORRECTS.match(lines[i])
        rest = lines[i][corrects.end() :] if corrects else ""
        if rest and (_answers(rest) or _bare(rest)):
            lines = [rest, *lines[i + 1 :]]
            break
    if any(map(_answers, lines)):
        return [x for x in lines if _answers(x) or re.match(r"or\b.*\d", x, re.IGNORECASE)]
    return [x for x in lines if _bare(x)] + ([x for x in lines if re.search(r"\d|\$|\\", x)] or lines)[-1:]


def formula(sentence: str) -> str:
    """The formula that a sentence states, without its dollars; empty if there is none, or if it is denied."""
    sentence = re.sub(r"\*\*|__|`", "", sentence).strip().rstrip(".,;").strip()
    if len(sentence) > 10 * LONGEST:
        return ""
    found = list(re.finditer(r"\$\$?(.+?)\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]", sentence))
    if found:
        between = [sentence[a.end() : b.start()] for a, b in pairwise(found)]
        first = len(found) - 1
        while first and re.fullmatch(r"\s*(?:,|,?\s*(?:and|or)|,\s*)\s*", between[first - 1]):
            first -= 1
        after = sentence[found[-1].end() :]  # at most a unit
        if len(after.split()) > 3 or denied(after) or AFTERWARDS.search(after) or STATES.search(after):
            return ""
        if denied(sentence[: found[first].start()]):
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


def _answers(sentence: str) -> bool:
    """Whether a sentence states something about an answer, and does not only deny it."""
    mark = re.search(r"\banswer\b", sentence, re.IGNORECASE)
    return mark is not None and re.search(r"[\d$\\]", undenied(sentence[mark.end() :])) is not None


def _bare(sentence: str) -> bool:
    """Whether a sentence is a number and nothing else."""
    return NUMERAL.fullmatch(plain(sentence).strip(" .,;:=()")) is not None


def _boxed(text: str) -> Iterator[str]:
    """What boxes hold, each within the expression that it is a part of: -\boxed{3}x states -3x."""
    for start in re.finditer(r"\\f?boxed\s*(?=\{|\d)", text):
        if text[start.end()] != "{":
            yield text[start.end()]
            continue
        depth = 0
        for brace in re.compile("[{}]").finditer(text, start.end(), start.end() + 10 * LONGEST):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                before = text[max(0, start.start() - LONGEST) : start.start()]
                after = text[brace.end() : brace.end() + LONGEST]
                yield _within(before, text[start.end() + 1 : brace.start()], after)
                break


def _within(before: str, content: str, after: str) -> str:
    """The expression of a box; empty if it is denied or has an alternative.

    In prose, where no dollar is open, only what touches the box on its left belongs to it.
    """
    others = re.match(r"[$\s)\\\]}*,]*(?:\\text\{)?\s*(?:(?:is|are) )?(?:or|not|wrong|false|incorrect)\b", after)
    if others or denied(sentences(before + "\x00")[-1]):
        return ""
    before = before.rpartition("\n")[2]
    left, right = (re.sub(SPACES, " ", x) for x in (AROUND.split(before)[-1], AROUND.split(after, maxsplit=1)[0]))
    opened = before.count("$") % 2 or any(before.count(rf"\{x}") > before.count(rf"\{y}") for x, y in ("()", "[]"))
    left = left.rstrip() if opened else re.split(r"\s", left)[-1]
    return f"{left}{'*' * bool(re.search(r'[A-Za-z0-9)}]$', left))}{content}{right}".strip()


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
