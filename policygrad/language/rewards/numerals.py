"""Reading the one number that a sentence states: digits, a decimal, a fraction, a percentage, a LaTeX numeral.

An expression is not evaluated: 7 + 5 is no number. Several numbers are none either, nor is one that is denied.
"""

# ruff: noqa: RUF001  (people write all of these signs)
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+)"
NUMERAL = re.compile(
    rf"(?P<sign>(?<![\w)\]])[-+]\s*)?(?:(?:(?P<whole>\d+)\s+)?(?P<over>[-+]?{UNSIGNED})\s*/\s*(?P<under>-?{UNSIGNED})"
    rf"|(?P<repeating>\d*\.\d*)\\overline\s*(?P<period>\d+)"
    rf"|(?P<number>{UNSIGNED})(?:\s*\*\s*10\s*\^\s*\(?(?P<power>[-+]?\d+)\)?|[eE](?P<e>[-+]?\d+)(?!\w))?)"
    rf"(?:\s*(?P<percent>%|per ?cent\b)|\s*(?P<many>hundred|thousand|million|billion|trillion)\b)?"
)
MANY = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
LONGEST = 400  # characters of a numeral or a formula that is read

SPACES = r"\\(?:left|right|bigl?|bigr?|Bigl?|Bigr?|displaystyle|quad|qquad)(?![A-Za-z])|(?<!\\)\\[,;:! ]|~|&nbsp;"
NAMED = (
    r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|mbox|emph|underline|bf|rm|boldsymbol|boxed|fbox)"
    r"\s*\{([^{}]*)\}"
)
PLAIN = [  # what stands in a text -> the same without LaTeX and markdown
    (r"(\d)(?:\\[,!]|\{,\}|\\!,|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))", r"\1,"),
    (r"(?<=\d)(?=[¼-¾⅐-⅞])", " "),
    (r"\\(?:begin|end)\{[a-z]+\*?\}|&|<\|[^|<>]*\|>", " "),
    (r"[!<>]=", "≠"),
    (r"²", "^2"),
    (r"³", "^3"),
    (r"(?m)^[ \t]*#{1,6}[ \t]+", ""),
    (r"</?[A-Za-z]\w*>", " "),
    (r"\*\*|__|`", ""),
    (r"(?<![\w*])[*_]([^*_\n]+)[*_](?![\w*])", r"\1"),
    (SPACES, " "),
    (NAMED, r" \1 "),
    (NAMED, r" \1 "),
    (r"\\[dtc]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r" \1\2/\3\4 "),
    (r"\^\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?|\\degree|°", " "),
    (r"\\%", "%"),
    (r"\\\$|\$|\\[()\[\]]|[£€¥₹]", " "),
    (r"\\(?:cdot|times)(?![A-Za-z])|[×·⋅]", "*"),
    (r"\\(?:approx|simeq|equiv)(?![A-Za-z])|[≈≡]", "="),
    (r"[−–‐‑‒]", "-"),
    (r"—", " , "),
    (r"(?<!\\)[{}]", ""),
    (r"\b([A-Za-z]+)\s*\^[23]\b", r"\1"),  # square and cubic units
    (r"(?<=[A-Za-z])\s*/\s*(?=[A-Za-z])", " "),
    (r"\b(?:negative|minus)\s+(?=\d)", "-"),
]
# The verbs after which a number is stated.
STATES = re.compile(
    r"\b(?:is|are|was|were|be|equals?|makes?|gives?|gets?|got|yields?|becomes?|has|have|had|leaves?|obtain|find|totals?"
    r"|(?:equal|adds?|comes?|amounts?|sums?|simplifies|evaluates|reduces|equivalent)(?: up| out)? to)\b|:(?!\d)|=",
    re.IGNORECASE,
)
DENIES = (
    r"\b(?:not|cannot|never|neither|nor|no|wrong|false|incorrect|doubt|impossible|unlikely|hardly|unless|if)\b|n[’']t\b"
)
ELSEWHERE = re.compile(  # words before a number that make another one of it
    DENIES + r"|\b(?:or|either|except|excluding|without|but|besides|unlike|instead|between|from|to|through|until|than"
    r"|least|most|under|below|above|over|beyond|within|sum|product|difference|quotient|integral|derivative|limit|series"
    r"|whether|(?:any|one|some|out) of|almost|nearly|near|close|(?:starts?|begins?|ends?) (?:with|in)"
    r"|half|twice|double|triple|square|cube|root|power|plus|minus|times|divided|multiplied|factorial|log|sin|cos|tan"
    r"|before|after|next|previous|step|digits?|multiples?|factors?|divisors?|base|exp|ln|sqrt|mod)\b",
    re.IGNORECASE,
)
AFTERWARDS = re.compile(  # words after a number that make another one of it
    r"\b(?:not|wrong|false|incorrect|or|squared|cubed|factorial|plus|minus|times (?:the|[b-z])|divided|multiplied"
    r"|choose|mod|and a|dozens?|halves|tenths?|hundredths?|thousandths?|to|through|too (?:many|much|few|little))\b"
    r"|n[’']t\b"
    r"|^\s*is\b\s*(?:$|[.,;]|(?:an?|too|even|odd|prime|less|more|greater|larger|smaller|bigger|higher|lower|close|near)\b)"
    r"|^\s*(?-i:[bcefijknopqrtuvwxyzXYZ])\b|^(?:ish|(?-i:[akKMB]))\b",
    re.IGNORECASE,
)
DENIED = re.compile(  # another number beside the one that is stated, such as `not 13, but`
    rf"[,(]?(?: ?\b(?:not|rather than|instead of)|n[’']t)(?: be)?\s+({NUMERAL.pattern})(?!\w)\)?(?:,? but\b)?",
    re.IGNORECASE,
)
ARROWS = re.compile(r"\\(?:therefore|[Rr]ightarrow|implies)(?![A-Za-z])|=>|->|[→⇒∴]")
MATHEMATICS = re.compile(r"[\\^*/+±<>|=\[\]#πθφλαβγ∞√∑∫∏≤≥≠]")


class Number(NamedTuple):
    """A number as it was written."""

    value: Fraction  # of 50%: 50
    percent: bool = False
    digits: int = 0  # significant digits of a decimal, after its leading zeros
    places: int = 0  # digits after its point
    written: str = ""  # without spaces


def plain(text: str) -> str:
    """A text without LaTeX's and markdown's marks, its fractions as a/b."""
    for pattern, replacement in PLAIN:
        text = re.sub(pattern, replacement, text)
    return unicodedata.normalize("NFKC", text).replace("\u2044", "/")


def number(sentence: str) -> Number | None:
    """The one number that a sentence states; None if it states none, several, or an expression."""
    text = ARROWS.sub("=", plain(sentence)).strip()
    if text.endswith("?"):
        return None
    text = re.sub(r"\((?:=|(?:since|because|as)\b)[^()]*\)", " ", text)  # a remark on the number before it
    text = undenied(re.sub(r"(?<![\w)\]])\[([^][]*)\]", r" \1 ", text))
    if "=" in text:
        before, _, text = text.rpartition("=")
        before = before if re.search(r"[A-Za-z]{2}", before) else ""
    else:
        cut = next((m for m in reversed(list(STATES.finditer(text))) if re.search(r"\d", text[m.end() :])), None)
        before, text = (text[: cut.start()], text[cut.end() :]) if cut else ("", text)
    if denied(before):
        return None
    found = list(NUMERAL.finditer(text))
    if len(found) != 1 or len(found[0][0]) > LONGEST:
        return None
    left, right = text[: found[0].start()], re.sub(r"^(?:st|nd|rd|th)\b|^/(?=[A-Za-z])", " ", text[found[0].end() :])
    sign = found[0]["sign"] or ""
    if sign and (re.search(r"(?:\b[A-Za-z]|[)\]\d])\s*$", left) or (sign[1:] and left.strip())):
        return None  # a difference or a sum
    if MATHEMATICS.search(left + right) or re.search(r"[A-Za-z_]$|\w\($|[A-Za-z)]\s*-\s*$", left):
        return None
    if re.match(r"\s*(?:,\s*)?\d|\s*-+\s*(?:$|\w\b)", right) or ELSEWHERE.search(left) or AFTERWARDS.search(right):
        return None
    return _value(found[0])


def undenied(text: str) -> str:
    """A text without the numbers that it denies beside one that it states: `It is 12, not 13` is `It is 12`.

    One that is both stays, so that there are two.
    """
    rest = DENIED.sub(" ", text)
    denied_ones = {x[1].strip() for x in DENIED.finditer(text)}
    return text if denied_ones & {x[0].strip() for x in NUMERAL.finditer(rest)} else rest


def denied(before: str) -> bool:
    """Whether the words before a statement deny it. Only its own clause counts."""
    clause = re.split(r"[,;:.]\s|\b(?:so|thus|therefore|hence|but|because)\b", before, flags=re.IGNORECASE)[-1]
    return re.search(DENIES, clause, re.IGNORECASE) is not None


def same(gold: Number, said: Number) -> bool:
    """Whether two numbers are equal: 50% is met by 50% and, as people write it, by 50 and by 0.5.

    A fraction without an end, such as 1/3, is also met by a decimal of six or more digits that it rounds to.
    """
    golds, saids = _values(gold), _values(said)
    if gold.percent and said.percent:
        return gold.value == said.value
    if any(x == y for x in golds for y in saids):
        return True
    endless = gold.value.denominator
    for prime in (2, 5):
        while endless % prime == 0:
            endless //= prime
    return endless > 1 and said.digits >= 6 and said.places > 0 and round(gold.value, said.places) == said.value


def _values(x: Number) -> list[Fraction]:
    return [x.value, x.value / 100] if x.percent else [x.value]


def _value(found: re.Match[str]) -> Number | None:
    of = {name: (text or "").replace(",", "") for name, text in found.groupdict().items()}
    digits = places = 0
    try:
        if of["under"]:
            value = Fraction(of["over"]) / Fraction(of["under"])
            value = value + int(of["whole"]) if of["whole"] else value
        elif of["period"]:
            shown = of["repeating"].partition(".")[2]
            value = Fraction(of["repeating"].rstrip(".") or "0") if shown else Fraction(of["repeating"][:-1] or "0")
            value += Fraction(int(of["period"]), (10 ** len(of["period"]) - 1) * 10 ** len(shown))
        else:
            power = int(of["power"] or of["e"] or "0")
            if abs(power) > LONGEST:
                return None
            value = Fraction(of["number"]) * Fraction(10) ** power
            places = 0 if power else len(of["number"].partition(".")[2])
            digits = len(of["number"].replace(".", "").lstrip("0"))
    except (ValueError, ZeroDivisionError):
        return None
    value = value * MANY.get(of["many"], 1)
    value = -value if of["sign"].strip() == "-" else value
    return Number(value, bool(of["percent"]), digits, places, re.sub(r"\s", "", found[0]))
