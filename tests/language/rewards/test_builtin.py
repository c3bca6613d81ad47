"""The built-in reward functions."""

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


def test_exact_match() -> None:
    texts = ["so\n#### 72", "72", "72.", "Answer: yes", "7 2", "72"]
    gold = ["72", 72, "72", "yes", 72.0, None]
    assert exact_match(PROMPTS, texts, answer=gold, cut=[]) == [1.0, 1.0, 0.0, 1.0, 0.0, None]
    worked = "48/2 = <<48/2=24>>24 clips.\n#### 72"
    assert exact_match(PROMPTS, ["72", "24", [{"role": "assistant", "content": "#### 72"}]], [worked] * 3) == [1, 0, 1]
    assert exact_match(PROMPTS, ["72", "72.5"], [72.0, 72.5]) == [1.0, 1.0]


def test_math_equal() -> None:
    """Through a whole Rewards: in a thread, where math-verify's own time limits cannot work."""
    cases = [
        ("The answer is $\\frac{2}{4}$", "1/2", 1.0),
        ("so \\boxed{0.5}", "\\frac{1}{2}", 1.0),
        ("#### Check\n\\boxed{3}\n#### done", "3", 1.0),
        ("it is 1000", "1,000", 1.0),
        ("so it is 41", 42, 0.0),
        ("I do not know", "42", 0.0),
        ("", "42", 0.0),
        ("Answer: 1 + 2x", "2x+1", 1.0),  # 2, if it is read as prose
        ("Answer: 2", "2x+1", 0.0),
        ("$(3, \\frac{\\pi}{2})$", "( 3, \\frac{\\pi}{2} )", 1.0),
        ("so $x = 5$", "5", 1.0),
        ("72", 72.0, 1.0),
        ("72", "24 + 48, so\n#### 72", 1.0),
        ("4", "no number at all", None),
        ("4", "", None),
        ("4", None, None),
    ]
    texts, gold, expected = (list(column) for column in zip(*cases, strict=True))
    _, parts = Rewards([math_equal])(texts, texts, {"answer": gold})
    values = [None if x != x else x for x in parts["math_equal"].tolist()]
    assert dict(zip(cases, values, strict=True)) == dict(zip(cases, expected, strict=True))


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
