"""The built-in reward functions: what is honest, and what only looks like it."""
# ruff: noqa: E501, RUF001

from typing import Any

import pytest

from language.rewards.conftest import PROMPTS
from policygrad.errors import UserError
from policygrad.language.rewards import exact_match, final_answer, matches, math_equal, soft_overlong_penalty


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
