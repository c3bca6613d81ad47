"""Reward functions to judge three completions with."""

from typing import Any

import pytest
from torch import Tensor

from policygrad.errors import UserError
from policygrad.language.rewards import Rewards

PROMPTS, TEXTS = ["p", "q", "r"], ["a", "bb", "ccc"]
NAN = float("nan")


def length(completions: list[str], **_: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def returning(values: Any) -> Any:
    def reward(**_: Any) -> Any:
        return values

    return reward


def judged(*functions: Any, columns: dict[str, list] | None = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return Rewards(functions, **options)(PROMPTS, TEXTS, columns or {})


def said(*arguments: Any, **options: Any) -> str:
    """What judged() complains of."""
    with pytest.raises(UserError) as caught:
        judged(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
    return str(caught.value)
