"""Whether an answer meets a gold answer: numbers by their value, formulas by math-verify in a child process.

math-verify limits its time by signals, which only a main thread receives. And Python lets no other thread run while it
raises 9 to the power 9^9. A child process can be ended at any time.
"""

# ruff: noqa: RUF001  (people write all of these signs)
import atexit
import json
import re
import select
import subprocess
import sys
import threading
from pathlib import Path

from policygrad.errors import UserError
from policygrad.language.rewards.numerals import LONGEST, SPACES, plain

COMPARISON = Path(__file__).with_name("comparison.py")
COMPARISON_SECONDS, START_SECONDS = 3.0, 60.0
RELATION = r"=|<|>|\\(?:leq?|geq?|neq?|lt|gt|in|approx|equiv)(?![A-Za-z])|[≤≥≠≈∈]"
HEAVY = re.compile(  # what may stand in an answer only if it stands in the gold answer too
    r"\\(?:i*int|oint|sum|prod|lim|binom|gcd|lcm|max|min|sup|inf(?!ty)|lfloor|lceil|det|bmod|pmod|mod|partial|nabla|bigcup"
    r"|bigcap|to|cdots|ldots|dots|l(?=n|og)|infty\s*(?=\]))|!|'|\.\.\.|…|∑|∫|∏|\\frac\{d\}\{d|\?"
)
SIGNS = {  # as they are written without LaTeX
    "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "∅": r"\emptyset ", "\\varnothing": r"\emptyset ",
    "×": r"\times ", "·": r"\cdot ", "÷": "/", "²": "^2", "³": "^3", "−": "-",
    "≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ",
}  # fmt: skip
WORDS = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{3,}|is|to|of|no|if|in|it|we|be|as|up)(?![A-Za-z])")
KNOWN = frozenset(("sin", "cos", "tan", "log", "exp", "sqrt", "frac", "begin", "end", "pmatrix", "bmatrix", "matrix"))


def clean(formula: str) -> str:
    """A formula without what only sets it in type; `and` and `or` between formulas are commas."""
    for sign, written in SIGNS.items():
        formula = formula.replace(sign, written)
    formula = re.sub(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))", r"\\sqrt{\1}", formula)
    formula = re.sub(r"\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|\b(?:and|or)\b", ",", formula)
    formula = re.sub(r"\\[dtc]frac", r"\\frac", re.sub(SPACES, " ", formula)).replace("\\$", "")
    return re.sub(r"\s*,[\s,]*", ", ", formula).strip(" ,.;$")


def compact(formula: str) -> str:
    """A formula as it is compared by the letter."""
    return re.sub(r"[\s{}$*]", "", clean(formula))


def is_formula(gold: str) -> bool:
    """Whether a gold answer is a formula: one without words of three letters or more, or LaTeX's text."""
    return bool(gold) and all(word in KNOWN for word in WORDS.findall(re.sub(r"\\[a-z]+\{[^{}]*\}", "", gold)))


def meets(gold: str, answer: str, prompt: str) -> bool | None:
    """Whether a formula is equal to the gold one, and no more than its kind of expression; None if that is none.

    An answer that stands in the prompt is none, unless it is the gold one to the letter.
    """
    gold, answer = clean(gold), clean(answer)
    if not re.search(RELATION, gold):
        parts = answer.split(", ") if ", " in gold and gold[0] not in "([" else [answer]
        answer = ", ".join(re.split(r"=|\\approx|≈|\\in(?![A-Za-z])|∈", part)[-1].strip() for part in parts)
    if re.match(r"\\(?:text|mathrm|textbf|mbox)\s*\{[^{}]*\}$", gold):
        return _letters(gold) == _letters(answer)
    if not answer or compact(answer) == compact(gold):
        return bool(answer)
    copied = len(compact(answer)) > 2 and compact(answer) in compact(prompt)
    heavier = set(HEAVY.findall(answer)) - set(HEAVY.findall(gold))
    worded = any(word not in KNOWN and word not in gold for word in WORDS.findall(answer))
    paired = gold[0] in "([" and answer[0] not in "(["
    if copied or heavier or worded or paired or len(answer) > max(LONGEST, 4 * len(gold)):
        return False
    return equal(gold, answer)


def _letters(text: str) -> str:
    return re.sub(r"[^\w]+", " ", plain(text)).strip().casefold()


class Mathematics:
    """(gold, answer) -> are the two formulas equal? None if `gold` is no formula. The process starts at first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        atexit.register(self._end)

    def __call__(self, gold: str, answer: str) -> bool | None:
        with self.lock:
            process = self.process or self._start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]).encode() + b"\n")
                said = self._line(process, COMPARISON_SECONDS)
            except BaseException as error:  # a pipe that broke; or the time limit of the caller, within a comparison
                self._end()
                if not isinstance(error, BrokenPipeError):
                    raise
                said = b""
            if not said:  # it took too much time or memory
                self._end()
                return False
            return json.loads(said)

    def _start(self) -> "subprocess.Popen[bytes]":
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(COMPARISON)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        if not self._line(self.process, START_SECONDS):
            self._end()
            raise UserError("math_equal cannot import math_verify: pip install math-verify")
        return self.process

    def _line(self, process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if ready else b""

    def _end(self) -> None:
        if self.process is not None:
            with self.process as process:  # closes the pipes and waits
                process.kill()
        self.process = None


equal = Mathematics()
