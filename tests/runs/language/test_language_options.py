"""Values of another type are refused in words, also where an option carries a note for the command line."""

import pytest

from policygrad.errors import UserError
from policygrad.runs.language.options import GRPO, RewardModelOptions
from policygrad.runs.options import with_values


def test_an_annotated_option_is_of_its_own_type() -> None:
    assert with_values(RewardModelOptions(), {"json": True}).json is True
    with pytest.raises(UserError, match="json is 'yes': it must be True or False"):
        with_values(RewardModelOptions(), {"json": "yes"})


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (RewardModelOptions, {"out": 3}, "out is 3: it must be a path"),
        (RewardModelOptions, {"learning_rate": "fast"}, "learning_rate is 'fast': it must be a number"),
        (GRPO, {"reward": "right"}, "reward is 'right': it must be a list, each entry text"),
        (GRPO, {"reward_weight": ("much",)}, "it must be a list, each entry a number"),
        (GRPO, {"kl": "both"}, "kl is 'both': it must be one of none, reward, loss"),
    ],
    ids=str,
)
def test_another_type_is_said_in_words(kind: type, values: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_values(kind(), values)
