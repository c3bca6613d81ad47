"""From a model, examples and reward functions to a task: the policy, its prompts and its judges."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedTokenizerBase

from policygrad.errors import UserError, ending
from policygrad.language import data, models
from policygrad.language.distributions import CHUNK
from policygrad.language.policies import LanguagePolicy, ValueModel, trunk
from policygrad.language.rewards import (
    Reward,
    Rewards,
    is_function_spec,
    load_reward,
    near_function,
    soft_overlong_penalty,
)
from policygrad.language.sampler import Prompts

ARITHMETIC, LOOKUP = "arithmetic", "lookup"  # the names of the tasks in arithmetic.py and lookup.py


@dataclass
class Task:
    """A policy before training, with its prompts and its judges."""

    name: str
    policy: LanguagePolicy
    tokenizer: PreTrainedTokenizerBase
    train: Prompts
    held_out: Prompts | None
    judge: Rewards | None  # None: an environment gives the rewards
    judge_held_out: Rewards | None  # without the penalty on length, for reported results


def prepared(
    examples: Sequence[data.Example] | Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    *,
    long: str = "refuse",
    variables: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
) -> Prompts:
    """Examples as prompts: tokens, and the other columns. See encode_prompts and short_enough.

    max_tokens: examples are demonstrations, and their completions, which become tokens too, have at most so many.
    """

    def place(i: int) -> str:
        return data.place_of(examples, i)

    rows = data.encode_prompts(examples, tokenizer, variables)
    kept = data.short_enough(rows, place, max_length, long)
    answers: list[list[int]] = []
    if max_tokens is not None:
        answers = data.encode_completions(examples, tokenizer, variables)
        fitting = set(data.short_enough(answers, place, max_tokens, long, ("completions", "max_tokens")))
        kept = [i for i in kept if i in fitting]
        answers = [answers[i] for i in kept]
    chosen = [examples[i] for i in kept]
    return Prompts.of(
        [x["prompt"] for x in chosen],
        [rows[i] for i in kept],
        data.columns_of(chosen),
        pad=int(tokenizer.pad_token_id),
        origin=[getattr(x, "source", 0) for x in chosen],
        openings=data.openings(chosen, tokenizer, variables),
        answers=answers,
    )


def room_for_prompts(model: nn.Module, max_tokens: int) -> int | None:
    """The tokens that a model's context leaves for a prompt; None if it has no bound."""
    config: Any = model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if context is None else max(context - max_tokens, 0)


def split_prompts(prompts: Prompts, held_out: int) -> tuple[Prompts, Prompts | None]:
    """Prompts to train on, and `held_out` others, always the same; None if that is 0."""
    train, kept = (torch.tensor(x, dtype=torch.long) for x in data.hold_out(range(len(prompts)), held_out, seed=0))
    return prompts.take(train), prompts.take(kept) if held_out else None


def policy_of(
    model: nn.Module,
    *,
    device: torch.device | str = "cpu",
    temperature: float = 1.0,
    autocast: torch.dtype | None = None,
    chunk: int = CHUNK,
    lora_rank: int = 0,
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
    gradient_checkpointing: bool = False,
) -> LanguagePolicy:
    """A model as a policy on its device. lora_rank: that of an adapter; 0: none. lora_targets: see add_adapter."""
    if lora_rank:
        model = models.add_adapter(model, lora_rank, alpha=lora_alpha, targets=lora_targets or None)
    if gradient_checkpointing:
        models.checkpoint_gradients(model)
    return LanguagePolicy(model.to(device), temperature=temperature, autocast=autocast, chunk=chunk)


def critic_of(
    policy: LanguagePolicy,
    kind: str,
    *,
    dtype: str = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
    trust: bool = False,
    autocast: torch.dtype | None = None,
    gradient_checkpointing: bool = False,
    device: torch.device | str = "cpu",
) -> ValueModel:
    """A critic on the policy's trunk ("shared"), on a copy of it ("copy"), or on that of a model by path or hub id.

    gradient_checkpointing: of another model's trunk; a copy has it if the policy has. Raises UserError for a model with
    fewer tokens than the policy's.
    """
    if kind == "shared":
        return ValueModel(trunk(policy.model), autocast=autocast)
    if kind == "copy":
        return ValueModel(deepcopy(trunk(policy.model)), autocast=autocast)
    other: nn.Module = models.load_model(
        kind,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        trust=trust,
        kind=AutoModel,  # without a head, so that a reward model can be given too
    ).to(device)  # type: ignore[arg-type]
    mine, its = (len(x.get_input_embeddings().weight) for x in (trunk(policy.model), other))  # type: ignore
    if its < mine:
        raise UserError(
            f"the critic {ending(kind)} has embeddings for {its:,} tokens and the policy for {mine:,}: "
            "give one with the same tokenizer"
        )
    if gradient_checkpointing:
        models.checkpoint_gradients(other)
    return ValueModel(other, autocast=autocast)


def reward_functions(
    rewards: Sequence[str | Reward],
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    trust: bool = False,
) -> list[Reward]:
    """Reward functions by their names; functions stay. A name that is not a function's is that of a reward model.

    Raises UserError for a name that is neither, such as a misspelled one of a built-in function.
    """
    found: list[Reward] = []
    for reward in rewards:
        if callable(reward):
            found.append(reward)
        elif is_function_spec(reward) or (near_function(reward) and not Path(reward).exists()):
            found.append(load_reward(reward))
        else:
            from policygrad.language.reward_models import RewardModel

            found.append(RewardModel.load(reward, device=str(device), trust_remote_code=trust_remote_code, trust=trust))
    return found


def task_of(
    name: str,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Prompts,
    held_out: Prompts | None,
    functions: Sequence[Reward] | None,
    *,
    max_tokens: int,
    reward_weight: Sequence[float] = (),
    reward_time_limit: float = 60.0,
    overlong_fraction: float = 0.0,
    **policy: Any,
) -> Task:
    """Put a task together. Raises UserError if model, tokenizer and prompts do not fit together.

    functions: None if an environment gives all rewards. max_tokens: of a completion. reward_weight: one for each
    function; all 1 by default. overlong_fraction: adds the soft overlong penalty over this last share of max_tokens
    (DAPO). policy: the options of policy_of.
    """
    longest = max((int(x.lengths.max()) for x in (train, held_out) if x), default=0)
    models.check_pair(model, tokenizer, longest + max_tokens)  # type: ignore[arg-type]
    for function in functions or ():
        if (starts := getattr(function, "starts", 0)) >= max_tokens:
            raise UserError(
                f"the overlong penalty starts at {starts} tokens, and a completion has at most {max_tokens}: lower its "
                "two numbers, or raise max_tokens"
            )
    plain = judge = None
    weights = list(reward_weight) or [1.0] * len(functions or ())
    if functions is not None:
        plain = judge = Rewards(functions, weights, time_limit=reward_time_limit)
    if overlong_fraction:
        buffer = max(1, round(overlong_fraction * max_tokens))
        penalty = soft_overlong_penalty(max_tokens, buffer)
        judge = Rewards([*(functions or ()), penalty], [*weights, 1.0], time_limit=reward_time_limit)
    return Task(name, policy_of(model, **policy), tokenizer, train, held_out, judge, plain)
