"""Addition with its working, by brute force; imperfect demonstrations; and what the reward says of both."""

import random
import re
from itertools import pairwise, product

import pytest
import torch

from policygrad.language.arithmetic import (
    CHARACTERS,
    NUMBERS,
    Demonstrators,
    demonstrations,
    model,
    preferences,
    problems,
    right,
    splits,
    tokenizer,
    working,
)
from policygrad.language.models import check_pair, stop_tokens
from policygrad.language.policies import LanguagePolicy

INTERESTING = [*range(24), *range(45, 56), *range(88, 112), 199, 450, 499, 500, 555, 900, *range(988, 1000)]
PAIRS = list(product(INTERESTING, INTERESTING))


def parsed(text: str) -> tuple[list[tuple[list[int], int]], str]:
    """Columns as (what is added, sum), from the last to the first, and the answer."""
    columns, _, answer = text.partition(":")
    pairs = [column.split("=") for column in columns.split(",")]
    return [([int(x) for x in left.split("+")], int(total)) for left, total in pairs], answer


def digit(number: int, place: int) -> int:
    return number // 10**place % 10


def test_the_working_is_as_it_is_described() -> None:
    assert working(47, 385) == "7+5=12,4+8+1=13,0+3+1=4:432"
    assert working(47, 385, carries=False) == "7+5=12,4+8=12,0+3=3:322"
    assert working(0, 0) == "0+0=0:0"


def test_with_carries_every_column_and_the_answer_are_right() -> None:
    for a, b in PAIRS:
        columns, answer = parsed(working(a, b))
        assert answer == str(a + b), (a, b)
        assert len(columns) == max(len(str(a)), len(str(b)))
        for place, (added, total) in enumerate(columns):
            carry = (a % 10**place + b % 10**place) // 10**place
            assert added == [digit(a, place), digit(b, place), *([carry] if carry else [])]
            assert total == sum(added)


def test_without_carries_the_answer_is_wrong_exactly_where_one_was_to_be_carried() -> None:
    wrong = 0
    for a, b in PAIRS:
        columns, answer = parsed(working(a, b, carries=False))
        sums = [digit(a, place) + digit(b, place) for place in range(len(columns))]
        assert [total for _, total in columns] == sums
        assert all(len(added) == 2 for added, _ in columns)
        assert answer == str(sums[-1]) + "".join(str(x % 10) for x in reversed(sums[:-1]))
        assert (answer == str(a + b)) == all(x < 10 for x in sums[:-1]), (a, b)
        wrong += answer != str(a + b)
    assert 0.3 < wrong / len(PAIRS) < 0.9


def test_columns_are_wrong_as_often_as_they_are_to_be() -> None:
    generator = random.Random(0)
    columns = [x for a, b in PAIRS for x in parsed(working(a, b, True, 0.3, generator))[0]]
    share = sum(total != sum(added) for added, total in columns) / len(columns)
    assert share == pytest.approx(0.3 * 18 / 19, abs=0.02), "one of 19 sums drawn is the right one"
    assert {total for added, total in columns if total != sum(added)} == set(range(19))


def test_what_follows_from_a_wrong_column_is_worked_out_with_it() -> None:
    """A mistake is carried on: the answer is that of the columns as they are written."""
    generator = random.Random(1)
    for a, b in PAIRS[::7]:
        columns, answer = parsed(working(a, b, True, 0.5, generator))
        totals = [total for _, total in columns]
        assert answer == str(totals[-1]) + "".join(str(x % 10) for x in reversed(totals[:-1]))
        for (_, before), (added, _) in pairwise(columns):
            assert added[2:] == ([before // 10] if before >= 10 else [])


def test_problems_are_different_and_have_their_sums() -> None:
    found = problems(3000, seed=1)
    assert len({x["prompt"] for x in found}) == 3000
    for x in found:
        a, b = map(int, re.fullmatch(r"(\d+)\+(\d+)=", x["prompt"]).groups())
        assert x["answer"] == str(a + b)
        assert max(a, b) < NUMBERS
    assert problems(50, seed=1) == found[:50]
    assert problems(50, seed=2) != found[:50]


@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_out_is_in_no_training(seed: int) -> None:
    train, held_out = splits(3000, 400, seed)
    assert (len(train), len(held_out)) == (3000, 400)
    assert {x["prompt"] for x in train}.isdisjoint(x["prompt"] for x in held_out)
    everything = frozenset(x["prompt"] for x in held_out)
    assert any(x["prompt"] in everything for x in problems(3000, seed)), "without care some would have been"


def test_demonstrations_are_right_less_than_half_of_the_time() -> None:
    examples = problems(8000, seed=0)
    answers = [x["answer"] for x in examples]

    def accuracy(**quality: float) -> float:
        texts = demonstrations(examples, 0, Demonstrators(**quality) if quality else None)
        return sum(right([], texts, answers)) / len(texts)

    assert 0.4 < accuracy() < 0.5
    assert accuracy(forgets=0.0, errs=0.0) == 1
    assert accuracy(forgets=1.0, errs=0.0) == pytest.approx(0.55**2, abs=0.02), "no carry from two columns"
    assert accuracy(forgets=0.0, errs=0.02) == pytest.approx((1 - 0.02 * 18 / 19) ** 3, abs=0.01)


def test_some_demonstrators_carry_and_some_do_not() -> None:
    """Every text is of one of two ways; which is taken does not depend on the problem."""
    examples = problems(4000, seed=0)
    texts = demonstrations(examples, 0, Demonstrators(forgets=0.3, errs=0.0))
    ways = []
    for example, text in zip(examples, texts, strict=True):
        a, b = map(int, example["prompt"][:-1].split("+"))
        assert text in (working(a, b), working(a, b, carries=False))
        if working(a, b) != working(a, b, carries=False):
            ways.append(text == working(a, b))
    assert sum(ways) / len(ways) == pytest.approx(0.7, abs=0.03)
    assert texts == demonstrations(examples, 0, Demonstrators(forgets=0.3, errs=0.0))
    assert texts != demonstrations(examples, 1, Demonstrators(forgets=0.3, errs=0.0))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("7+5=12,4+8+1=13,0+3+1=4:432", 1),
        (":432", 1),
        ("1=2:3:432", 1),
        ("432", 0),  # without a colon nothing stands after it
        ("7+5=12,4+8+1=13,0+3+1=4:322", 0),
        ("7+5=12:4322", 0),
        ("7+5=12:0432", 0),
        ("432:", 0),
        ("", 0),
    ],
)
def test_the_reward_is_for_what_stands_after_the_colon(text: str, reward: float) -> None:
    assert right(["47+385="], [text], ["432"], cut=[False]) == [reward]


def test_every_completion_has_its_reward() -> None:
    assert right(["", ""], [":1", ":2"], ["2", "2"]) == [0, 1]
    with pytest.raises(ValueError, match="shorter"):
        right(["", ""], [":1", ":2"], ["2"])


def test_a_judge_prefers_the_right_one_of_two_and_errs_now_and_then() -> None:
    examples = problems(4000, seed=0)
    answers = {x["prompt"]: x["answer"] for x in examples}
    for errs in (0.0, 0.2):
        pairs = preferences(examples, 0, errs=errs)
        assert 1000 < len(pairs) < 3000, "where both are right, or neither is, there is nothing to compare"
        scores = [right([], [x["chosen"], x["rejected"]], [answers[x["prompt"]]] * 2) for x in pairs]
        assert all(sorted(x) == [0, 1] for x in scores)
        assert sum(b > a for a, b in scores) / len(scores) == pytest.approx(errs, abs=0.03)
    assert preferences(examples, 0) == preferences(examples, 0) != preferences(examples, 1)


def test_a_token_is_a_character() -> None:
    words = tokenizer()
    assert len(words) == len(CHARACTERS) + 2
    assert (words.pad_token, words.eos_token) == ("<pad>", "<eos>")
    texts = [x["prompt"] for x in problems(300, 0)] + demonstrations(problems(300, 0), 0) + [CHARACTERS]
    for text in texts:
        tokens = words(text)["input_ids"]
        assert len(tokens) == len(text)
        assert words.decode(tokens) == text
        assert words.decode([*tokens, words.eos_token_id, words.pad_token_id], skip_special_tokens=True) == text
    assert len(set(words(CHARACTERS)["input_ids"])) == len(CHARACTERS)
    assert {words.pad_token_id, words.eos_token_id}.isdisjoint(words(CHARACTERS)["input_ids"])


def test_the_longest_text_fits_the_model() -> None:
    words = tokenizer()
    longest = max(len(f"{a}+{b}=") + len(working(a, b)) + 1 for a, b in product(range(990, 1000), repeat=2))
    check_pair(model(hidden=16, layers=1), words, longest)
    assert longest == len("999+999=9+9=18,9+9+1=19,9+9+1=19:1998") + 1


def test_the_model_is_drawn_from_torchs_generator() -> None:
    def made() -> torch.Tensor:
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in model(hidden=16, layers=2).parameters()])

    assert torch.equal(made(), made())
    small = model(hidden=16, layers=2)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight
    assert small.get_input_embeddings().weight.shape == (len(tokenizer()), 16)
    assert LanguagePolicy(small).plain_head
    assert stop_tokens(small, tokenizer()) == (tokenizer().eos_token_id,)
