"""Where an answer stands. What the built-in functions make of it is a table in test_builtin.py."""

import pytest

from policygrad.language.rewards.answers import formula, last_words, marked, own_words, repeats, stated

PROMPT = "What is 7 + 5 =\nReply with the number only."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7 + 5 = Reply with the number only.", True),
        (PROMPT, True),
        (f"Sure. {PROMPT} It is 12.", True),
        ("What is 7 + 5 =", True),
        ("7 + 5 = 12", False),
        ("12", False),
        ("", False),
        ("The sum of 7 and 5 is 12.", False),
    ],
)
def test_a_completion_that_repeats_its_prompt(text: str, expected: bool) -> None:
    assert repeats(text, PROMPT) is expected


@pytest.mark.parametrize(
    ("text", "gold", "own"),
    [
        ("7 + 5 = 12", "12", "\n 12"),
        ("What is 7 + 5 =", "12", "\n"),
        ("12", "12", "12"),
        ("with the number", "", "with the number"),  # two words, for `the` is nobody's own
        ("Reply with the number only", "Reply with the number only", "Reply with the number only"),
    ],
)
def test_pieces_of_the_prompt_are_left_out(text: str, gold: str, own: str) -> None:
    assert own_words(text, PROMPT, gold) == own


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12", []),
        ("#### 12", [["12"]]),
        ("Answer: 12\nmore", [["12"]]),
        ("**Answer:**\n\n12", [["12"]]),
        ("Answer: 1\nFinal answer: 2", [["2"]]),
        ("#### Step\ntext\n#### 2", [["2"]]),
        ("#### 1\n<answer>2</answer> \\boxed{3}", [["1"], ["2"], ["3"]]),
        ("\\boxed{\\frac{1}{2}} \\boxed 3", [["\\frac{1}{2}", "3"]]),
        ("not \\boxed{3}", [[""]]),
        ("\\boxed{3", []),
    ],
)
def test_marked_answers(text: str, expected: list[list[str]]) -> None:
    assert marked(text) == expected


def test_stated_answers() -> None:
    assert stated("The answer is 1. I used 3 steps. The answer is 2.") == ["The answer is 1.", "The answer is 2."]
    assert stated("11\nor so\n12") == ["11", "12", "12"]
    assert stated("1. Add 2.\nSo 3 are left. Good.") == ["So 3 are left."]
    assert stated("") == []


def test_formulas_in_sentences() -> None:
    assert formula("The line is $y = 2x$.") == "y = 2x"
    assert formula("It is $1$ and $2$") == "1, 2"
    assert formula("It is not $x$") == ""
    assert formula("f is 2x") == "2x"


def test_thinking_is_no_answer() -> None:
    assert last_words("<think>1</think>2") == "2"
    assert last_words("7+5=<<7+5=12>>12") == "7+5=12"
