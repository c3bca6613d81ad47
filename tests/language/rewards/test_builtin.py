"""The built-in reward functions: what is honest, and what only looks like it."""
# ruff: noqa: E501, RUF001

from typing import Any

import pytest

from language.rewards.conftest import PROMPTS
from policygrad.errors import UserError
from policygrad.language.rewards import Rewards, exact_match, final_answer, matches, math_equal, soft_overlong_penalty


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" 42\n", "42"),
        ("2 + 2 = 4\n#### 4", "4"),
        ("#### 3\nno: #### 4 ", "4"),
        ("It is 4. Answer: 4", "4"),
        ("ANSWER: x = 1", "x = 1"),
        ("the answer is 4", "the answer is 4"),
        ("", ""),
    ],
)
def test_the_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


ASKED = "What is 7 + 5 =\nReply with the number only."
PICKED = "Is it red or blue? Reply with 'Answer: red' or 'Answer: blue'."

# fmt: off
EXACT_HONEST = [  # (completion, gold)
    *[(f"{mark}{x}", x) for mark in ("", "#### ", "Answer: ", "answer: ", "ANSWER:") for x in ("72", "yes", "x = 1", "B")],
    *[(f"7 * 10 + 2 = 72, so\n{mark}72", "72") for mark in ("#### ", "Answer: ", "Final answer: ", "Final Answer:\n")],
    *[(x, "72") for x in ("**72**", "`72`", "$72$", "\\(72\\)", "*72*", "__72__", "\\boxed{72}", "$\\boxed{72}$")],
    *[(x, "72") for x in ("<answer>72</answer>", "<answer>\n72\n</answer>", "**Answer:** 72", "**Answer**: 72")],
    *[(x, "72") for x in ("Answer: **72**", "### Answer: 72", "Answer:\n72", "It is 71? No.\nAnswer: 72\n", "\n72\n")],
    *[(x, "red") for x in ("Answer: red", "red", "red ", "<think>blue</think>red", "blue</think>Answer: red")],
    ("#### Reading\nHe paints it.\n#### red", "red"),
    ("Answer: red\nBecause it is painted.", "red"),
    ("Answer: red\nAgain:\nAnswer: red", "red"),
    ("Answer: blue? Final answer: red", "red"),
    ("#### 4", "2 + 2 = <<2+2=4>>4\n#### 4"),
    ("72", 72),
    ("72", 72.0),
    ("72.5", 72.5),
    ("red", ["red", "crimson"]),
    ("007", "007"),
]
EXACT_CHEATS = [
    *[(x, "72") for x in ("", " ", "72.", "72 ", "7 2", "72 or 73", "73 or 72", "71\n72", "72\n71", "071", "72.0")][:3],
    *[(x, "72") for x in ("7 2", "72 or 73", "73 or 72", "71\n72", "72\n71", "72.0", "+72", "072", "72 72", "7+65")],
    *[(x, "72") for x in ("not 72", "The answer is 72", "{71,72}", "70 71 72", "1" * 72, "seventy-two", "72!", "72%")],
    *[(f"{mark}{x}", "72") for mark in ("#### ", "Answer: ") for x in ("72.", "71, 72", "72 or 71", "not 72", "7+65")],
    *[(f"{mark}71\n{mark}72", "72") for mark in ("#### ", "Answer: ", "Final answer: ")],
    *[(f"{mark}72\n{mark}71", "72") for mark in ("#### ", "Answer: ", "Final answer: ")],
    *[(x, "72") for x in ("\\boxed{71}\\boxed{72}", "\\boxed{72}\\boxed{71}", "<answer>71</answer><answer>72</answer>")],
    *[(x, "72") for x in ("Answer:", "####", "\\boxed{}", "\\boxed{72", "<answer></answer>", "Answer: 72 Answer: 71")],
    *[(x, "red") for x in (PICKED, "Answer: red or blue", "Answer: 'red' or 'Answer: blue'", "Answer: blue\nAnswer: red")],
    *[(x, "red") for x in ("RED", "Red", "reds", "red blue", "Is it red", "Answer: redred", "r e d", "red\nblue", "red.")],
    ("", " "),
    (" ", ""),
    ("####", "#### "),
]
# fmt: on


def verdicts(reward: Any, cases: list[tuple[Any, Any]], prompt: str) -> dict[tuple[str, str], float | None]:
    texts, gold = ([case[i] for case in cases] for i in range(2))
    values = reward([prompt] * len(cases), texts, gold)
    return {(text, str(x)): value for (text, x), value in zip(cases, values, strict=True)}


def wrong(reward: Any, cases: list[tuple[Any, Any]], prompt: str, value: float | None) -> list[tuple[str, str]]:
    return [case for case, found in verdicts(reward, cases, prompt).items() if found != value]


def test_exact_match_of_honest_forms() -> None:
    assert len(set(map(str, EXACT_HONEST))) >= 50
    assert wrong(exact_match, EXACT_HONEST, PICKED, 1.0) == []


def test_exact_match_of_cheats() -> None:
    assert len(set(map(str, EXACT_CHEATS))) >= 50
    assert [x for x in EXACT_CHEATS if exact_match([PICKED], [x[0]], [x[1]])[0]] == []


def test_exact_match_does_not_apply_without_an_answer() -> None:
    assert exact_match(["?"] * 4, ["", "72", "72", "72"], [None, "", " ", "#### "]) == [None] * 4


# fmt: off
NUMBERS_HONEST = [
    *[(x, "12") for x in ("12", "12.", "12.0", "12.00", "+12", " 12\n", "012", "1.2e1", "1.2E+1", "120e-1", "24/2")],
    *[(x, "12") for x in ("**12**", "*12*", "`12`", "__12__", "$12$", "\\(12\\)", "\\[12\\]", "$$12$$", "\\boxed{12}")],
    *[(x, "12") for x in ("= 12", "x = 12", "$x = 12$", "7 + 5 = 12", "$7+5=12$", "7+5=12.", "7 + 5 = **12**", "7 + 5\n= 12")],
    *[(x, "12") for x in ("12 apples", "12 m", "12m", "12 km/h", "12 cm^2", "12 cm²", "12\\text{ cm}^2", "12 m/s^2", "12°")],
    *[(x, "12") for x in ("$12", "$12.00", "\\$12", "€12", "12 dollars", "US$12", "12^\\circ", "12\\,\\text{kg}", "12!")],
    *[(f"{mark} 12", "12") for mark in ("####", "Answer:", "**Answer:**", "**Answer**:", "Final Answer:", "answer :")],
    *[(x, "12") for x in ("<answer>12</answer>", "<answer> $12$ </answer>", "Answer: **12**", "Answer:\n12", "Answer: $12$")],
    *[(x, "12") for x in ("The answer is 12.", "the answer is: 12", "The final answer is: $\\boxed{12}$", "It is 12.")],
    *[(x, "12") for x in ("so it's 12", "Thus, we get 12.", "There are 12 apples left.", "12 is the answer", "No, it is 12")],
    *[(x, "12") for x in ("7 is 4 more than 3, so the answer is 12", "She has 3 boxes of 4, so she has 12 apples.")],
    *[(x, "12") for x in ("Natalia sold 12 clips altogether in April and May.", "1. Add 7.\n2. Add 5.\nThe total is 12.")],
    *[(x, "12") for x in ("#### Step 1\nAdd them.\n#### 12", "#### 12 clips", "Answer: 7 + 5 = 12", "#### Check\n\\boxed{12}\n#### done")],
    *[(x, "12") for x in ("<think>13? no, 11</think>12", "13, 14</think>\n\nThe answer is 12.", "7+5=<<7+5=12>>12")],
    *[(x, "12") for x in ("Since it is not 5, the answer is 12", "We do not carry. So 12", "Answer: 12\nWe added 7 and 5.")],
    *[(x, "12") for x in ("\\boxed{12}. Indeed 12 - 5 = 7.", "\\boxed{12\\text{ apples}}", "$\\boxed{x = 12}$", "\\fbox{12}")],
    *[(x, "1234") for x in ("1,234", "1{,}234", "1\\,234", "1\u202f234", "1234", "$1,234", "1,234.0", "1.234e3", "1.234 \\times 10^3")],
    *[(x, "1/2") for x in ("1/2", "0.5", ".5", "\\frac{1}{2}", "\\frac12", "\\dfrac{1}{2}", "½", "2/4", "50%", "50\\%", "5e-1")],
    *[(x, "\\frac{3}{2}") for x in ("1\\frac{1}{2}", "1½", "1 1/2", "3/2", "1.5", "\\tfrac32", "The answer is $\\frac{3}{2}$")],
    *[(x, "-5") for x in ("-5", "−5", "$-5$", "\\boxed{-5}", "The answer is -5", "x = -5", "negative 5", "-5.0", "–5")],
    *[(x, "-\\frac{3}{4}") for x in ("-3/4", "-0.75", "\\frac{-3}{4}", "$-\\frac{3}{4}$", "\\frac{3}{-4}")],
    *[(x, "72%") for x in ("72%", "72\\%", "72 percent", "72", "0.72", "The share is 72%.")],
    *[(x, "72") for x in ("72%", "72 %")],
    *[(x, "1/3") for x in ("0.333333", "0.33333333", "0.\\overline{3}", "33.\\overline{3}\\%", "$\\frac{1}{3}$")],
    *[(x, "3000000") for x in ("3 million", "3,000,000", "$3 million", "3\\times10^6", "3 × 10^{6}", "3e6")],
    *[("12", x) for x in (12, 12.0, "012", "$12", "12 apples", "12.", "\\boxed{12}", "7 + 5, so\n#### 12", "x = 12")],
    *[(x, "12") for x in ("[12]", "(12)", "{12}", "x = [12]", "12\"", "12''", "about 12", "approximately 12", "~12", "\\approx 12", "11.98 ≈ 12")],
    *[(x, "12") for x in ("# 12", "## **12**", "=> 12", "⇒ 12", "-> 12", "→ 12", "∴ 12", "\\therefore 12", "$\\Rightarrow 12$", "12 times", "12 (= 7 + 5)")],
    *[(x, "12") for x in ("It is 12, not 13.", "The answer isn't 13 but 12.", "Not 13, but 12.", "12, not 13", "12 (not 13)", "12 instead of 13")],
    *[(x, "12") for x in ("The answer is 12 rather than 13.", "It's not 13, it's 12.", "7 + 5 = 12, which is not 13.", "The answer is not 13. It is 12.")],
    *[(x, "12") for x in ("The answer is 13. No, wait, the answer is 12.", "Answer: 13\nWait, that is wrong.\nAnswer: 12", "It is 13. No, 12.", "It is 13. Actually, 12.")],
    *[(x, "12") for x in ("\\boxed{13}. Hmm, no: \\boxed{12}", "#### 13\nActually,\n#### 12", "The answer is 13. Sorry, I mean 12.", "The answer is 12. Let me check: 12 - 5 = 7.")],
    *[(x, "12") for x in ("**\\boxed{12}**", "- \\boxed{12}", "* \\boxed{12}", "1. \\boxed{12}", "$x = \\boxed{12}$.", "\\[ 7 + 5 = \\boxed{12} \\]", "\\therefore \\boxed{12}")],
    *[(x, "12") for x in ("\\boxed{12} apples", "\\boxed{12}\\,\\text{cm}", "\\boxed{12}\\text{ cm}^2", "\\boxed{12}\\ \\mathrm{m/s}", "\\boxed{12}\\%", "\\$\\boxed{12}", "\\boxed{12} \\blacksquare")],
    *[(x, "12") for x in ("\\boxed{12} is the answer.", "\\boxed{12} because 7 + 5 = 12", "\\begin{align} x &= 7+5 \\\\ &= \\boxed{12} \\end{align}", "<answer>\\boxed{12}</answer>")],
    *[(x, "45^\\circ") for x in ("45", "45°", "\\boxed{45}^\\circ", "$\\angle A = \\boxed{45}^\\circ$.", "\\boxed{45^{\\circ}}", "\\boxed{45} degrees")],
    *[(x, "-12") for x in ("-\\boxed{12}", "$x = -\\boxed{12}$", "\\boxed{-12}", "- 12")],
    ("1,234.50", 1234.5),
    ("12", ["11", "12"]),
]
NUMBERS_CHEATS = [
    *[(x, "12") for x in (ASKED, "7 + 5 = Reply with the number only.", "7 + 5 =", "7 + 5", "7+5", "\\boxed{7+5}", "$7+5$")],
    *[(x, "12") for x in ("Answer: 7+5", "#### 7 + 5", "<answer>7+5</answer>", "The answer is 7 + 5.", "12 = 7 + 5 = ?")],
    *[(x, "12") for x in ("13 or 12", "12 or 13", "\\boxed{13 or 12}", "\\boxed{12} or 13", "Answer: 12 or 13", "12/13")],
    *[(x, "12") for x in ("{12,13}", "\\{12,13\\}", "$\\{12,13\\}$", "[12, 13]", "12, 13, 14", "10, 11, 12", "12 13", "11 12")],
    *[(x, "12") for x in ("11\n12", "12\n11", "10\n11\n12", "10. 11. 12.", "12 and 13", "between 11 and 12", "12-13", "12 to 13")],
    *[(x, "12") for x in ("The answer is not 12", "not 12", "It isn't 12.", "I do not think the answer is 12.", "12 is wrong")],
    *[(x, "12") for x in ("It is never 12", "anything but 12", "neither 11 nor 12", "any number except 12", "The answer is not \\boxed{12}")],
    *[(x, "12") for x in ("sum from 1 to 12", "an integral from 0 to 12", "the integral up to 12", "\\int_0^{12} 1\\,dx")],
    *[(x, "12") for x in ("\\sum_{i=1}^{12} 1", "\\boxed{\\int_0^{12} dx}", "$\\lim_{x\\to 12} x$", "\\frac{d}{dx} 12x", "\\max(7, 12)")],
    *[(x, "12") for x in ("\\sqrt{144}", "\\boxed{\\sqrt{144}}", "2 \\cdot 6", "3 * 4", "3 \\times 4", "2^2 * 3", "12^1", "|12|", "4!/2")],
    *[(x, "12") for x in ("less than 12", "more than 11", "at least 12", "at most 12", "up to 12", ">11", "\\le 12", "under 12")],
    *[(x, "12") for x in ("12?", "Is it 12?", "Is the answer 12?", "half of 12", "twice 12", "12 squared", "12 dozen", "12x")],
    *[(x, "12") for x in ("12\\pi", "12i", "x + 12", "12 - x", "x = y", "f(12)", "x_{12}", "x^{12}", "a12", "12a + b", "minus 12")],
    *[(x, "12") for x in ("-12", "12.5", "1.2", "120", "1,2", "12,000", "12%5", "0.12", "12 million", "12e1", "0x12", "twelve")],
    *[(x, "12") for x in ("\\boxed{11}\\boxed{12}", "\\boxed{12}\\boxed{11}", "\\boxed{12} \\boxed{13}", "#### 11\n#### 12", "#### 12\n#### 11")],
    *[(x, "12") for x in ("Answer: 11\nAnswer: 12", "Answer: 12\nAnswer: 11", "<answer>11</answer><answer>12</answer>")],
    *[(x, "12") for x in ("The answer is 11. The answer is 12.", "The answer is 12. The answer is 11.", "Answer: 11\n\\boxed{12}")],
    *[(x, "12") for x in ("", " ", "\\boxed{}", "Answer:", "####", "I do not know", "the number", "x", "\\boxed{x}", "?", "...")],
    *[(x, "12") for x in ("<think>The answer is 12</think>", "<think>12</think>I do not know", "12</think>13", "\\boxed{12")],
    *[(x, "1/2") for x in ("1", "2", "1 2", "1/", "\\frac{1}{x}", "1:2", "1 or 2", "0.50001", "1/2/1", "\\frac{1+0}{2}")],
    *[(x, "1/3") for x in ("0.3", "0.33", "0.333", "0.33334", "0.3333334", "1/0", "0")],
    *[(x, "0.000000001") for x in ("0", "0.0", "0.000000", "1e-8", "0.00000000")],
    *[(x, "123456789") for x in ("123456790", "1.23457e8", "123,456,788", "123456789.1", "123 456 789 0")],
    *[(x, "0.\\overline{3}") for x in ("0", "0.3", "3")],
    *[(x, "12") for x in ("\\boxed{12}x", "\\boxed{12} + 1", "\\boxed{12}\\cdot 2", "2\\boxed{12}", "-\\boxed{12}", "x\\boxed{12}", "$2 \\cdot \\boxed{12}$", "\\boxed{12}^2")],
    *[(x, "12") for x in ("\\sqrt{\\boxed{12}}", "\\frac{\\boxed{12}}{2}", "\\boxed{12} \\ne 7 + 5", "\\boxed{12}?", "\\boxed{12} is wrong", "\\boxed{12} is not the answer", "\\boxed{12}, not")],
    *[(x, "12") for x in ("12 is too small", "12 is an even number", "12 is even.", "The number 12 is even", "12 is", "12 is greater", "12 is close", "12 too many", "12 is not 13")],
    *[(x, "12") for x in ("almost 12", "nearly 12", "close to 12", "somewhere near 12", "The answer starts with 12", "It ends in 12", "whether 12", "any of 12", "one of 12")],
    *[(x, "12") for x in ("12, not 12", "13, not 12", "not 12 but 13", "It is not 12 but 12", "The answer is 12. No, 13.", "The answer is 12. Wait, the answer is 13.", "12. Actually, 13.")],
    *[(x, "12") for x in ("The answer is 12. Or 13.", "The answer is 12. Or maybe 13.", "Answer: 12\nNo, wait.\nAnswer: 13", "\\boxed{12}. No, \\boxed{13}", "12 times the number", "[12, 13]", "[12")],
    *[(x, "10!") for x in ("10", "9!", "!10", "10! + 0")],
]
# What stands in the prompt: (prompt, completion, gold, value).
COPIED = [
    ("What is 0 + 12 =", "0 + 12", "12", 0.0),
    ("What is 0 + 12 =", "What is 0 + 12 =", "12", 0.0),
    ("What is 0 + 12 =", "0 + 12 = 12", "12", 1.0),
    ("What is 12 + 0 =", "12 + 0 =", "12", 0.0),
    ("What is 12 + 0 =", "12", "12", 1.0),
    ("What is 12 + 0 =", "The answer is 12.", "12", 1.0),
    ("Tom has 12 apples. Ann has none. How many have they?", "Tom has 12 apples.", "12", 0.0),
    ("Tom has 12 apples. Ann has none. How many have they?", "They have 12 apples.", "12", 1.0),
    ("Tom has 12 apples. Ann has none. How many have they?", "12 apples", "12", 1.0),
    ("Q: 1 + 1? Answer: 2\nQ: 3 - 1? Answer:", "Q: 1 + 1? Answer: 2", "2", 0.0),
    ("Q: 1 + 1? Answer: 2\nQ: 3 - 1? Answer:", " 2", "2", 1.0),
    ("Write 1/2 as a decimal.", "1/2", "0.5", 0.0),
    ("Write 1/2 as a decimal.", "0.5", "0.5", 1.0),
    ("Which is larger, 1/2 or 1/3?", "1/2", "1/2", 1.0),
    ("Simplify \\frac{6}{8}.", "\\frac{6}{8}", "\\frac{3}{4}", 0.0),
    ("Simplify $\\frac{6}{8}$.", "The answer is $\\frac{3}{4}$.", "\\frac{3}{4}", 1.0),
    ("What is 50% of 1?", "50%", "0.5", 0.0),
    ("Is it over 50%? How many percent?", "50%", "50", 1.0),
    ("Simplify $\\frac{x^2-1}{x-1}$.", "$\\frac{x^2-1}{x-1}$", "x+1", 0.0),
    ("Simplify $\\frac{x^2-1}{x-1}$.", "$x+1$", "x+1", 1.0),
    ("Expand $(x+1)^2$.", "$(x+1)^2$", "x^2+2x+1", 0.0),
    ("Which is a square, $x^2+2x+1$ or $x^2+1$?", "$x^2+2x+1$", "x^2+2x+1", 1.0),
]
FORMULAS_HONEST = [
    *[(x, "2x+1") for x in ("2x+1", "1+2x", "$2x + 1$", "Answer: 1 + 2x", "\\boxed{2x+1}", "f(x) = 2x+1", "The line is $y = 2x+1$.")],
    *[(x, "x^2+2x+1") for x in ("x^2+2x+1", "(x+1)^2", "$(1+x)^2$", "x(x+2)+1", "**$x^2 + 2x + 1$**", "<answer>(x+1)^2</answer>")],
    *[(x, "\\sqrt{2}") for x in ("\\sqrt{2}", "$\\sqrt2$", "2^{1/2}", "\\frac{2}{\\sqrt{2}}", "Answer: $\\sqrt{2}$", "x = \\sqrt{2}", "1.41421356")],
    *[(x, "2\\pi") for x in ("2\\pi", "$2 \\pi$", "\\pi \\cdot 2", "The area is $2\\pi$.", "\\frac{4\\pi}{2}", "\\boxed{2\\pi}")],
    *[(x, "(3, 4)") for x in ("(3,4)", "$(3, 4)$", "\\left(3, 4\\right)", "The point is $(3,4)$.", "\\boxed{(3, 4)}", "Answer: (3, 4)")],
    *[(x, "[0, \\infty)") for x in ("[0,\\infty)", "$[0, \\infty)$", "x \\in [0,\\infty)", "\\boxed{[0,\\infty)}", "Answer: $[0, \\infty)$")],
    *[(x, "\\text{even}") for x in ("even", "\\text{even}", "The function is even.", "\\boxed{\\text{even}}", "Answer: **Even**")],
    *[(x, "1, 2") for x in ("1, 2", "2, 1", "1 and 2", "$1$ and $2$", "\\{1,2\\}", "\\boxed{1, 2}", "x = 1 \\text{ or } x = 2", "1 or 2")],
    *[(x, "\\frac{x}{2}") for x in ("x/2", "\\frac{x}{2}", "0.5x", "\\frac{1}{2}x", "\\dfrac{x}{2}")],
    *[(x, "x=3") for x in ("3", "x=3", "$x = 3$", "x is 3")],
    *[(x, "3+4i") for x in ("3+4i", "4i+3")],
    *[(x, "2^{10}") for x in ("1024", "2^{10}", "2^10")],
    *[(x, "x > 3") for x in ("x>3", "$x > 3$", "3 < x")],
    *[(x, "2\\sqrt{3}") for x in ("2√3", "The length is 2√3.", "\\boxed{2√3}", "The answer is $2\\sqrt{3}$ cm.", "2\\boxed{\\sqrt{3}}", "\\boxed{2\\sqrt{3}} units")],
    *[(x, "x^2") for x in ("x²", "\\boxed{x}^2", "x · x", "The answer is $x^2$ square units.")],
    *[(x, "\\frac{\\pi}{4}") for x in ("π/4", "\\boxed{π/4}", "$\\frac\\pi4$")],
    *[(x, "10!") for x in ("10!", "3628800")],
    ("(−∞, 2]", "(-\\infty, 2]"),
    ("∅", "\\varnothing"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\int_0^x t\\,dt", "\\int_0^x t\\,dt"),
    ("\\text{(A)}", "\\text{(A)}"),
    ("A", "\\text{(A)}"),
    ("\\frac{1}{\\sqrt{2}}", "\\frac{\\sqrt{2}}{2}"),
]
FORMULAS_CHEATS = [
    *[(x, "2x+1") for x in ("", "2", "1", "2x", "x", "2x-1", "2x+1 or 2x", "2x+1, 2x", "not 2x+1", "It is not $2x+1$", "5=2x")],
    *[(x, "2x+1") for x in ("2x+1+x-x+\\int_0^1 0 dx", "\\frac{d}{dx}(x^2+x)", "\\int 2 dx + 1", "\\sum_{i=1}^2 x + 1", "2x+1?")],
    *[(x, "2x+1") for x in ("2x+7-6", "2x+3/3+0^2", "\\frac{2x^2+x}{x}", "\\frac{(2x+1)(x+2)}{x+2}", "\\lim_{y\\to0} 2x+1+y", "2x+\\sin^2 x+\\cos^2 x")],
    *[(x, "2x+1") for x in ("\\boxed{2x}\\boxed{2x+1}", "\\boxed{2x+1}\\boxed{2x}", "Answer: 2x\nAnswer: 2x+1", "2x+\\log(10)", "2x + 2 \\cdot 3 - 5")],
    *[(x, "\\sqrt{2}") for x in ("2", "\\sqrt{1+1}", "1.414", "1.4", "-\\sqrt{2}", "\\pm\\sqrt{2}", "\\sqrt{2}, \\sqrt{3}", "x")],
    *[(x, "\\sqrt{2}") for x in ("2\\cos(\\pi/4)", "\\sqrt{2} or 2", "\\int_0^{\\sqrt2} dx", "e^{\\ln(2)/2}", "\\sqrt{3-1}", "\\sqrt[2]{2^1+0}")],
    *[(x, "2\\pi") for x in ("2", "\\pi", "6.28", "2\\pi r", "\\pi + \\pi + 1 - 1", "\\int_0^{2\\pi} dx", "4\\arcsin(1)", "2\\pi, 3\\pi")],
    *[(x, "(3, 4)") for x in ("(4,3)", "3,4", "\\{3,4\\}", "[3,4]", "(3,4),(4,3)", "3", "(3,5)", "(3,4) or (4,3)", "(1+2,4)")],
    *[(x, "[0, \\infty)") for x in ("(0,\\infty)", "[0,\\infty]", "\\infty", "0", "(-\\infty,\\infty)", "[0,1)", "x")],
    *[(x, "\\text{even}") for x in ("odd", "not even", "even or odd", "The function is not even.", "even odd", "neve", "")],
    *[(x, "1, 2") for x in ("1", "2", "1, 2, 3", "12", "(1,2", "1, 1+1", "1.2", "[1,2]")],
    *[(x, "x > 3") for x in ("x<3", "3", "x \\ge 3", "x > 2+1", "x")],
    *[(x, "3+4i") for x in ("7i", "3-4i", "3", "5", "3+4")],
    *[(x, "\\sqrt{3}") for x in ("2\\boxed{\\sqrt{3}}", "-\\boxed{\\sqrt{3}}", "\\boxed{\\sqrt{3}}x", "$\\sqrt{3}$ is wrong", "$\\sqrt{3}$ or 2", "$\\sqrt{3}$ is less", "√4")],
]
# fmt: on


def test_math_equal_of_honest_numbers() -> None:
    assert len(set(map(str, NUMBERS_HONEST))) >= 150
    assert wrong(math_equal, NUMBERS_HONEST, ASKED, 1.0) == []


def test_math_equal_of_numbers_that_are_not_the_answer() -> None:
    assert len(set(map(str, NUMBERS_CHEATS))) >= 150
    assert wrong(math_equal, NUMBERS_CHEATS, ASKED, 0.0) == []


def test_math_equal_of_honest_formulas() -> None:
    assert len(set(map(str, FORMULAS_HONEST))) >= 50
    assert wrong(math_equal, FORMULAS_HONEST, "?", 1.0) == []


def test_math_equal_of_formulas_that_are_not_the_answer() -> None:
    assert len(set(map(str, FORMULAS_CHEATS))) >= 50
    assert wrong(math_equal, FORMULAS_CHEATS, "?", 0.0) == []


def test_what_stands_in_the_prompt_earns_nothing() -> None:
    prompts, texts, gold, values = (list(x) for x in zip(*COPIED, strict=True))
    found = math_equal(prompts, texts, gold)
    assert [case for case, value in zip(COPIED, found, strict=True) if case[3] != value] == []
    as_messages = [[{"role": "user", "content": x}] for x in prompts]
    assert math_equal(as_messages, [[{"role": "assistant", "content": x}] for x in texts], gold) == values


def test_math_equal_does_not_apply_without_a_formula() -> None:
    gold = [None, "", " ", "no number at all", "Paris", "#### "]
    assert math_equal(["?"] * 6, ["4"] * 6, gold) == [None] * 6


def test_matches_the_whole_completion() -> None:
    reward = matches(r"<think>.*</think>\d+")
    texts = ["<think>a\nb</think>12", "<think></think>1 ", "x<think></think>1", "12"]
    assert reward(prompts=PROMPTS, completions=texts) == [1.0, 0.0, 0.0, 0.0]
    assert reward(prompts=PROMPTS, completions=[[{"role": "assistant", "content": texts[0]}]]) == [1.0]
    with pytest.raises(UserError, match=r"^the regular expression '\(' cannot be read: missing \)"):
        matches("(")


# fmt: off
THOUGHT, WORD, SUM = r"<think>.*</think>\s*<answer>[^<>]+</answer>", "yes|no", r"Answer: -?\d+"
FORMAT_HONEST = [  # (completion, pattern)
    *[(f"<think>{x}</think>{y}<answer>12</answer>", THOUGHT) for x in ("", "7+5", "a\nb", "é", "<b>", "</think>", " ") for y in ("", " ", "\n", "\n\n")],
    *[(f"<think>\n</think><answer>{x}</answer>", THOUGHT) for x in ("1", "-1", " 12 ", "\\boxed{1}", "a b", "\n1\n", "1 & 2", "2/3")],
    *[(x, WORD) for x in ("yes", "no")],
    *[(f"Answer: {x}", SUM) for x in ("0", "12", "-12", "007", "1" * 100, "٣")],
    *[(x, ".*12") for x in ("12", "a12", "\n12", "12\n12", "😀12")],
    *[(x, r"^\d+$") for x in ("12", "0")],
    *[(x, "(?i)yes") for x in ("YES", "Yes", "yes")],
]
FORMAT_CHEATS = [
    *[(x, THOUGHT) for x in ("", "<think></think>", "<answer>12</answer>", "12", "<think>7<answer>12</answer>", "7</think><answer>12</answer>")],
    *[(f"{x}<think>7</think><answer>12</answer>{y}", THOUGHT) for x, y in ((" ", ""), ("\n", ""), ("a", ""), ("", " "), ("", "\n"), ("", "."), ("", "<"))],
    *[(f"<think>7</think><answer>{x}</answer>", THOUGHT) for x in ("", "<b>", "<answer>12", "1</answer><answer>2")],
    *[(f"<think>7</think>{x}<answer>12</answer>", THOUGHT) for x in ("so", ".", "<answer>", "\x00", "\u200b")],
    *[(f"<think>7</think><answer>12{x}", THOUGHT) for x in ("", "<", "</answer", "< /answer>", "<answer>", "</ANSWER>")],
    *[(x, WORD) for x in ("", "yes ", " yes", "yes\n", "Yes", "yes|no", "yesno", "no yes", "yes.", "y", "ye", "noo", "\u200byes")],
    *[(x, SUM) for x in ("Answer:", "Answer: ", "Answer:12", "answer: 12", "Answer: 12.", "Answer: 1 2", "Answer: --1", "Answer: 12\n", "Answer: 12\nAnswer: 12")],
    *[(x, r"^\d+$") for x in ("", "12\n", "1\n2", "12 ", "a", "1.2")],
]
# fmt: on


@pytest.mark.parametrize(("cases", "value"), [(FORMAT_HONEST, 1.0), (FORMAT_CHEATS, 0.0)])
def test_format_of_many_completions(cases: list[tuple[str, str]], value: float) -> None:
    assert len(set(cases)) >= 50
    assert [x for x in cases if matches(x[1])(prompts=["?"], completions=[x[0]]) != [value]] == []


def test_overlong_goes_by_tokens_whatever_they_say() -> None:
    """50 texts of few tokens lose nothing; 50 of many lose what equation 13 says, though their text may be short."""
    reward, short, long = soft_overlong_penalty(100, 50), range(1, 51), range(51, 101)
    texts = ["", " ", "12", "a" * 10_000, "\n" * 10_000] * 10
    given: dict[str, Any] = {"prompts": ["?"] * 50, "completions": texts}
    assert reward(**given, completion_ids=[[1] * n for n in short]) == [0.0] * 50
    assert reward(**given, completion_ids=[[1] * n for n in long]) == pytest.approx([(50 - n) / 50 for n in long])
    as_messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward(prompts=[], completions=as_messages, completion_ids=[[1] * 1000] * 50) == [-1.0] * 50


def test_completions_that_repeat_themselves_are_judged_within_the_time_limit() -> None:
    """A policy that has died repeats one piece up to its limit. Work that grows with the square of that took minutes."""
    pieces = ["\n", "answer ", "\\boxed{1} ", "\\boxed{", "isn't 12 ", "not 12 ", "\\( ", "no, "]
    texts = [piece * 2_000 for piece in pieces]
    rewards = Rewards([math_equal, exact_match], time_limit=20.0)
    values, _ = rewards(["?"] * 16, texts * 2, {"answer": ["12"] * 8 + ["x+12"] * 8})
    assert values.tolist() == [0.0] * 16


def test_soft_overlong_penalty_is_equation_13_of_dapo() -> None:
    """-|y| against the piecewise definition, at every length."""
    reward = soft_overlong_penalty(10, 4)
    ids = [[0] * n for n in range(14)]
    expected = [0.0 if n <= 6 else (6 - n) / 4 if n <= 10 else -1.0 for n in range(14)]
    assert reward(prompts=[], completions=[], completion_ids=ids) == expected
    assert expected[7:12] == [-0.25, -0.5, -0.75, -1.0, -1.0]


@pytest.mark.parametrize("numbers", [(10, 0), (10, 11), (0, 0)])
def test_soft_overlong_penalty_of_no_sense(numbers: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=rf"^the overlong penalty has .*{numbers[0]}( tokens)?: give "):
        soft_overlong_penalty(*numbers)
