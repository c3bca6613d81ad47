"""The weighted sum of reward functions."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from policygrad.errors import UserError
from policygrad.language.rewards.calling import (
    Column,
    Reward,
    arguments_of,
    call,
    check_columns,
    failure,
    name_of,
    numbers,
    unique,
)


class Rewards:
    """r = sum_k w_k r_k over the functions that apply to a sample; NaN where none does.

    Functions that are `async def` run side by side, in one event loop for the whole run; the others one after another,
    in the main thread if the caller is there. A function without **columns gets the columns that it names, and each
    has copies of its own. Beside those of the data set there are `prompts`, `completions`, and for a completion
    `completion_ids` (its tokens), `completion_mask` (which of them the policy chose), `cut`, and `completions_raw`: its
    text with special tokens, after whatever the chat template wrote into the turn before it, such as <think>.

    `time_limit`, in seconds, bounds each function's call on a whole batch; see calling.limited for how.

    Raises UserError if a function raises, exceeds the limit, or returns anything but a finite number, a finite number
    for each token of `completion_ids`, or None a sample.
    """

    def __init__(
        self,
        functions: Sequence[Reward],
        weights: Sequence[float] | None = None,
        *,
        names: Sequence[str] | None = None,
        time_limit: float = 60.0,
    ) -> None:
        weights = [1.0] * len(functions) if weights is None else weights
        names = [name_of(function) for function in functions] if names is None else names
        if not functions:
            raise UserError("there is no reward function: give at least one")
        for given, what in ((weights, "weights"), (names, "names")):
            if len(given) != len(functions):
                raise UserError(f"there are {len(functions)} reward functions and {len(given)} {what}: give one each")
        wrong = [weight for weight in weights if not math.isfinite(weight)]
        if wrong:
            raise UserError(f"a reward weight is {wrong[0]}: give a finite number")
        if not time_limit > 0:
            raise UserError(f"the time limit of reward functions is {time_limit} s: give more than 0")
        self.functions, self.weights = list(functions), [float(weight) for weight in weights]
        self.names, self.time_limit = unique(names), time_limit

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise UserError for a column of the data that a function wants and would not get."""
        check_columns(self.functions, self.names, columns)

    def __call__(
        self, prompts: Column, completions: Column, columns: Mapping[str, Column]
    ) -> tuple[Float[Tensor, " B"] | Float[Tensor, "B W"], dict[str, Float[Tensor, " B"]]]:
        """The weighted sum, NaN where no function applies, and each function's own values, NaN where it does not.

        If a function returns a number for each token, the sum is [B, W], with the numbers of the others at the last
        token of each completion; its own values are the sums of its rows.
        """
        offered = {**columns, "prompts": prompts, "completions": completions}
        for name, column in offered.items():
            if len(column) != len(completions):
                raise UserError(f"{name} has {len(column)} entries for {len(completions)} completions: give one each")
        arguments = [arguments_of(f, name, offered) for f, name in zip(self.functions, self.names, strict=True)]
        outcomes = call(self.functions, arguments, self.time_limit)
        parts, by_token, ids = {}, {}, columns.get("completion_ids")
        for k, name in enumerate(self.names):
            if k not in outcomes:
                raise UserError(
                    f"reward {name!r} took longer than {self.time_limit:g} s for {len(completions)} completions: "
                    "raise the time limit, or make it faster"
                )
            values, error = outcomes[k]
            if error is not None:
                raise failure(name, error) from error
            part = numbers(name, values, completions, ids)
            if part.dim() == 2:
                by_token[name], part = part, part.sum(1)
            parts[name] = part
        values = torch.stack([weight * part for weight, part in zip(self.weights, parts.values(), strict=True)])
        nothing = values.isnan().all(0)
        if not by_token or ids is None:
            return values.nansum(0).masked_fill(nothing, math.nan), parts
        width, last = max(map(len, ids)), torch.tensor([len(row) - 1 for row in ids]).unsqueeze(1)
        total = torch.zeros(len(completions), width)
        for weight, (name, part) in zip(self.weights, parts.items(), strict=True):
            once = torch.zeros_like(total).scatter(1, last, part.unsqueeze(1))
            total += weight * by_token.get(name, once).nan_to_num(0.0)
        return total.masked_fill(nothing.unsqueeze(1), math.nan), parts
