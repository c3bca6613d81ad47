"""Problems of reasoning-gym as an environment."""

import pytest

from policygrad.errors import UserError
from policygrad.language import reasoning
from policygrad.language.conversations import Environment, starts
from policygrad.language.reasoning import ReasoningGym


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning._problems.cache_clear()
    with pytest.raises(UserError, match=r"reasoning_gym is not installed: pip install policygrad\[reasoning\]"):
        reasoning.reasoning_gym("chain_sum")


def test_it_asks_and_scores() -> None:
    pytest.importorskip("reasoning_gym")
    make = reasoning.reasoning_gym("chain_sum")
    environment = make()
    assert isinstance(environment, Environment)
    (message,) = environment.reset(3)
    assert message["role"] == "user"
    assert message == make().reset(3)[0], "the seed decides"
    assert message != make().reset(4)[0]
    right = environment.problem["answer"]
    assert environment.step(f"I add. <answer> 1 </answer> No. <answer> {right} </answer>") == (None, 1.0, True)
    assert environment.step(f" {right}\n") == (None, 1.0, True)
    assert environment.step("<answer>1</answer>")[1] < 0.1
    assert [x["seed"] for x in starts(make, 3)] == [0, 1, 2]


def test_options_of_a_data_set() -> None:
    pytest.importorskip("reasoning_gym")
    environment = ReasoningGym("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    environment.reset(0)
    assert environment.problem["metadata"]["num_terms"] == 2


def test_a_name_that_there_is_not() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(UserError) as caught:
        reasoning.reasoning_gym("chain_sums")
    assert str(caught.value) == (
        "reasoning_gym makes no data set 'chain_sums' (Dataset 'chain_sums' not registered): correct its name"
    )
