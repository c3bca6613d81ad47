"""A user's own advantage function, loaded by name and held against the same gradients."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from policygrad.critics import bootstrap_values
from policygrad.errors import UserError
from policygrad.exact.enumeration import rows
from policygrad.returns import discount
from policygrad.rollout import Rollout, decisions
from policygrad.runs.verify.statistics import Estimator, Experience
from policygrad.score import score
from policygrad.weights import average, per_episode

# my_advantage(reward [B, T], value [B, T + 1], terminated [B, T], ended [B, T], gamma) -> [B, T]
Advantage = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]

PAIRS = 50_000  # of trajectories, on each of which a user's function may be called


def load_function(name: str) -> Advantage:
    """The function that `module:function` or `file.py:function` names. Raises UserError if there is none."""
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise UserError(f"{name!r} names no function: write module:function or file.py:function")
    module = _import(place)
    found = getattr(module, function, None)
    if not callable(found):
        raise UserError(f"{place} has no function {function!r}: check the name after the colon")
    return found


def _import(place: str) -> ModuleType:
    path = Path(place)
    try:
        if path.suffix != ".py":
            if "" not in sys.path:
                sys.path.insert(0, "")  # a module beside the user is found, as by python -m
            return importlib.import_module(place)
        if not path.is_file():
            raise UserError(f"there is no file {place}: give its path from here")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place} cannot be imported: {_said(error)}") from error


def user_rows(
    name: str,
    function: Advantage,
    experience: Experience,
    critics: dict[str, nn.Module],
    gamma: float,
) -> list[Estimator]:
    """The function with each critic. With the exact one any bias is an error; another it may lean on.

    Its advantages are computed before anything is differentiated, so that it may do what it likes with tensors. A
    function that looks at several rows at once has no row where there are too many pairs to call it on each.
    """
    short = name.rpartition(":")[2]
    table = []
    for critic_name, critic in critics.items():
        whole = _call(name, function, experience.rollout, critic, gamma)
        if _row_by_row(name, function, experience.rollout, critic, gamma, whole):
            credited, size = replace(experience, rollout=replace(experience.rollout, reward=whole)), 1
        elif experience.enumerated and len(whole) ** 2 > PAIRS:
            continue
        else:
            credited, size = _batch_by_batch(name, function, experience, critic, gamma)
        gain = partial(_gain, gamma=gamma)
        row = Estimator(f"{short}, {critic_name} critic", gain, size, experience=credited, reason="leans on the critic")
        table.append(replace(row, wrong_if_biased=critic_name == "exact"))
    return table


def _row_by_row(
    name: str, function: Advantage, rollout: Rollout, critic: nn.Module, gamma: float, whole: Tensor
) -> bool:
    """Whether two rows' advantages are the same with the others there and without."""
    pairs = torch.tensor([[0, len(whole) // 2], [len(whole) // 3, len(whole) - 1]])
    few = [_call(name, function, rows(rollout, pair), critic, gamma) for pair in pairs]
    return torch.allclose(torch.stack(few), whole[pairs], equal_nan=True)


def _batch_by_batch(
    name: str, function: Advantage, experience: Experience, critic: nn.Module, gamma: float
) -> tuple[Experience, int]:
    """The batches of the experience, one after the other, with the advantages in the reward's place; their size."""
    index, probability = experience.batches(2)
    credit = torch.cat([_call(name, function, rows(experience.rollout, i), critic, gamma) for i in index])
    expanded = replace(rows(experience.rollout, index.flatten()), reward=credit)
    size = index.shape[1]

    def each(_: int) -> tuple[Tensor, Tensor]:
        return torch.arange(len(credit)).view(-1, size), probability

    return Experience(expanded, each, experience.enumerated), size


def _call(name: str, function: Advantage, rollout: Rollout, critic: nn.Module, gamma: float) -> Tensor:
    """One call, of copies. Raises UserError if it raises, or returns another shape or what is not finite."""
    value = bootstrap_values(critic, rollout)
    arrays = [x.clone() for x in (rollout.reward, value, rollout.terminated, rollout.ended)]
    try:
        credit = function(arrays[0], arrays[1], arrays[2], arrays[3], gamma)
    except Exception as error:
        raise UserError(f"{name} raised {_said(error)}: mend the function") from error
    if not isinstance(credit, Tensor) or credit.shape != rollout.reward.shape:
        what = list(credit.shape) if isinstance(credit, Tensor) else type(credit).__name__
        raise UserError(f"{name} returned {what} for rewards of shape {list(rollout.reward.shape)}: return [B, T]")
    if not credit[rollout.mask].isfinite().all():
        raise UserError(f"{name} returned an advantage that is NaN or infinite: mend the function")
    return credit.detach().to(rollout.reward)


def _gain(policy: Callable[[Any], Any], rollout: Rollout, *, gamma: float) -> Tensor:
    """As actor-critic has it, with gamma^t; the advantage stands in the reward's place."""
    credit = rollout.reward * discount(rollout.mask, rollout.ended, gamma)
    batch = decisions(rollout, per_episode(rollout.mask), credit)
    return average(score(policy(batch.obs).log_prob(batch.action), batch.advantage), batch.weight)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
