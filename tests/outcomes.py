"""What a run came to, in a form that two runs can be compared by."""

import json
from typing import Any

import torch
from torch import Tensor

from policygrad.train.methods import TABLE

# One line of the table for each set of pieces: objective, update and credit.
# GRPO with other numbers at the same places: a whole run of one goes where another's goes.
ALIKE = {"sapo", "gmpo", "gspo_token", "luspo", "vespo", "maxrl", "pass_at_k", "lite_ppo", "two_sided_grpo",
         "masked_grpo", "reinforce_plus_plus_baseline", "gdpo"}  # fmt: skip
WHOLE = [x.name for x in TABLE if x.name not in ALIKE]
ANY_ACTION = [name for name in WHOLE if name not in ("dppo", "otb")]  # and not only those that have probabilities
DISTINCT = list({(x.objective, x.update, x.defaults.get("credit")): x.name for x in reversed(TABLE)}.values())[::-1]


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def parameters(run: Any) -> Tensor:
    """All that was trained, policy and critic, as one vector."""
    modules = [module for module in (run.policy, run.critic) if module is not None]
    return torch.cat([p.detach().flatten().float() for module in modules for p in module.parameters()])


def untimed(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows of metrics without what a clock measured."""
    return [{name: x for name, x in row.items() if "second" not in name} for row in rows]
