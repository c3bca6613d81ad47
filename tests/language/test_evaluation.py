"""pass@k against all subsets, and evaluations against their own completions."""

from itertools import combinations
from typing import Any

import pytest
import torch
from torch import nn

from language.conftest import with_tool
from policygrad.errors import UserError
from policygrad.language import arithmetic, evaluation
from policygrad.language.evaluation import Evaluation, evaluate_policy, pass_at_k
from policygrad.language.policies import LanguagePolicy
from policygrad.language.rewards import Rewards
from policygrad.language.tasks import prepared


@pytest.mark.parametrize("k", [1, 2, 3, 5, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(k: int) -> None:
    samples = 6
    shares = []
    for c in range(samples + 1):
        right = [i < c for i in range(samples)]
        subsets = list(combinations(right, k))
        shares.append(sum(map(any, subsets)) / len(subsets))
        assert pass_at_k(torch.tensor([c]), samples, k) == pytest.approx(shares[-1], rel=1e-15, abs=0)
    assert pass_at_k(torch.arange(samples + 1), samples, k) == pytest.approx(sum(shares) / 7, rel=1e-15)


def test_pass_at_k_of_many_samples() -> None:
    """Binomials beyond 1e308, and a probability too small for 1 - (1 - p)."""
    assert pass_at_k(torch.tensor([1]), 10_000, 5_000) == 0.5
    assert pass_at_k(torch.tensor([1]), 10**6, 1) == 1e-6
    assert pass_at_k(torch.tensor([10_000, 0]), 10_000, 1) == 0.5


@pytest.mark.parametrize(
    ("correct", "samples", "k", "message"),
    [
        ([1], 4, 5, "pass@5 cannot be estimated from 4 samples a problem: give a k from 1 to 4"),
        ([1], 4, 0, "pass@0 cannot be estimated from 4 samples a problem: give a k from 1 to 4"),
        ([], 4, 1, "pass@k is a mean over problems, and there are none: evaluate at least one"),
        ([2, 5], 4, 1, "5 of 4 samples of a problem cannot be right: count the right ones"),
        ([2, -1], 4, 1, "-1 of 4 samples of a problem cannot be right: count the right ones"),
    ],
)
def test_pass_at_k_of_no_sense(correct: list[int], samples: int, k: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        pass_at_k(torch.tensor(correct, dtype=torch.long), samples, k)
    assert str(caught.value) == message


TOKENIZER = arithmetic.tokenizer()
PROBLEMS = arithmetic.problems(5, seed=0)


def first_is_even(completions: list[str], **_: Any) -> list[float]:
    return [float(text[:1] in ("2", "4", "6", "8")) for text in completions]


def digits(completions: list[str], **_: Any) -> list[float]:
    return [len(text) / 9 for text in completions]


def evaluated(*functions: Any, **options: Any) -> Evaluation:
    torch.manual_seed(0)
    model = arithmetic.model(hidden=16, layers=1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else None
    options = {"completions": 4, "max_tokens": 6} | options
    return evaluate_policy(
        LanguagePolicy(model), prepared(PROBLEMS, TOKENIZER), TOKENIZER, Rewards(functions), **options
    )


def test_an_evaluation_is_of_its_completions() -> None:
    found = evaluated(first_is_even)
    rewards = torch.tensor([row["reward"] for row in found.rows])
    assert (found.prompts, found.completions, len(found.rows)) == (5, 4, 20)
    assert [row["prompt"] for row in found.rows] == [x["prompt"] for x in PROBLEMS for _ in range(4)]
    assert rewards.tolist() == first_is_even([row["completion"] for row in found.rows])
    assert 0 < found.reward < 1
    assert found.accuracy == found.reward == pytest.approx(rewards.mean().item())
    assert found.parts == {"first_is_even": pytest.approx(found.reward)}
    assert found.reward_std == pytest.approx(rewards.std(correction=0).item())
    assert found.length == pytest.approx(sum(row["tokens"] for row in found.rows) / 20)
    assert found.cut_fraction == pytest.approx(sum(row["cut"] for row in found.rows) / 20)
    solved = rewards.view(5, 4).sum(1)
    assert set(found.pass_at_k) == {1, 2, 4}
    assert found.pass_at_k[1] == pytest.approx(found.reward)
    assert found.pass_at_k[4] == pytest.approx((solved > 0).double().mean().item())
    assert "rows" not in found.summary()
    assert found.summary()["reward"] == found.reward


def test_only_rewards_of_0_and_1_have_an_accuracy() -> None:
    found = evaluated(digits)
    assert found.accuracy is None
    assert found.pass_at_k == {}
    assert found.line().startswith(f"reward {found.reward:.3f} +- {found.reward_std:.3f}, length ")
    line = evaluated(first_is_even).line()
    assert line.startswith("accuracy 0.")
    assert "pass@1" not in line
    assert "pass@2 0." in line
    assert line.endswith("% cut, 5 prompts")


def judged_if_even(completions: list[str], **_: Any) -> list[float | None]:
    """None for every other length."""
    values = first_is_even(completions)
    return [None if len(text) % 2 else x for text, x in zip(completions, values, strict=True)]


def test_completions_without_a_reward_leave_the_means_accuracy_and_pass_at_k() -> None:
    found = evaluated(judged_if_even)
    rewards = [row["reward"] for row in found.rows]
    known = [x for x in rewards if x is not None]
    assert 0 < len(known) < 20
    assert found.unjudged == pytest.approx(1 - len(known) / 20)
    assert found.reward == found.accuracy == pytest.approx(sum(known) / len(known))
    by_prompt = [[x for x in rewards[i : i + 4] if x is not None] for i in range(0, 20, 4)]
    for k, value in found.pass_at_k.items():
        subsets = [[max(s) for s in combinations(x, k)] for x in by_prompt if len(x) >= k]
        assert value == pytest.approx(sum(sum(x) / len(x) for x in subsets) / len(subsets))
    assert set(found.pass_at_k) == {k for k in (1, 2, 4) if max(map(len, by_prompt)) >= k}
    assert f", {found.unjudged:.1%} without a reward, 5 prompts" in found.line()
    assert found.rows[rewards.index(None)]["judged_if_even"] is None


def test_an_evaluation_without_any_reward_is_refused() -> None:
    def never(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    with pytest.raises(UserError, match=r"^no reward applies to any of 20 completions: never returned None for each"):
        evaluated(never)


def test_each_reward_function_of_0_and_1_has_an_accuracy_and_pass_at_k() -> None:
    found, alone = evaluated(first_is_even, digits), evaluated(first_is_even)
    assert found.accuracy is None
    assert found.pass_at_k == {}
    assert found.part_pass_at_k == {"first_is_even": alone.pass_at_k} == alone.part_pass_at_k
    assert found.parts["first_is_even"] == alone.accuracy
    words = f", first_is_even accuracy {alone.accuracy:.3f}, pass@2 {alone.pass_at_k[2]:.3f}"
    assert words in found.line()
    assert "first_is_even" not in alone.line(), "one function is the reward"


def test_the_seed_decides_and_greedy_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluated(digits).rows == evaluated(digits).rows != evaluated(digits, seed=1).rows
    greedy = evaluated(digits, greedy=True)
    assert greedy.rows == evaluated(digits, greedy=True, seed=1).rows
    monkeypatch.setattr(evaluation, "ROWS", 8)  # in several batches
    assert evaluated(digits, greedy=True).rows == greedy.rows


def test_the_length_of_completions_counts_decisions() -> None:
    found = evaluated(digits, engine=with_tool, completions=2)
    assert all(row["tokens"] <= 4 for row in found.rows), "two of six tokens are inserted"
    assert found.length == pytest.approx(sum(row["tokens"] for row in found.rows) / 10)
    assert any(len(row["completion"]) > row["tokens"] for row in found.rows), "and its text has them all"


@pytest.mark.parametrize("completions", [0, -1])
def test_an_evaluation_of_no_completions_is_refused(completions: int) -> None:
    with pytest.raises(UserError, match=f"^completions is {completions}: it must be at least 1$"):
        evaluated(digits, completions=completions)
