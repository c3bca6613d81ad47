"""What a language model is to learn: its starting model, its prompts, and what judges its answers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from policygrad.errors import UserError
from policygrad.language import arithmetic, data, models
from policygrad.language.policies import LanguagePolicy
from policygrad.language.rewards import Rewards, is_function_spec, load_reward, soft_overlong_penalty
from policygrad.language.sampler import Prompts
from policygrad.runs.language.options import LanguageOptions

ARITHMETIC = "arithmetic"
TRAINED_ON = 8000  # arithmetic problems, in the demonstrations and in training


@dataclass
class Task:
    """A policy before it is trained, with what it is trained and judged on."""

    name: str
    policy: LanguagePolicy
    tokenizer: PreTrainedTokenizerBase
    train: Prompts
    held_out: Prompts | None
    judge: Rewards
    judge_held_out: Rewards  # without the shaping of lengths: what is reported as the result


def load_task(
    name: str | None, options: LanguageOptions, announce: Callable[[str], None], progress: bool = True
) -> Task:
    """The task that the options describe. Raises UserError for whatever does not fit together."""
    if name == ARITHMETIC or (name is None and options.dataset is None and options.model is None):
        return _arithmetic(options, announce, progress)
    source = options.dataset or name
    if source is None:
        raise UserError("there are no prompts: give --dataset, a file or a hub id, or train on arithmetic")
    if options.model is None:
        raise UserError(f"there is no model to train on {source}: give --model, a directory or a hub id")
    if not options.reward:
        raise UserError("nothing judges the completions: give --reward, such as exact_match or my_rewards.py:function")
    examples = data.load_examples(source, split=options.split)
    train, held_out = data.hold_out(examples, options.held_out, seed=0)
    return _task(Path(source).stem, options, train, held_out, _functions(options), _load(options))


def _arithmetic(options: LanguageOptions, announce: Callable[[str], None], progress: bool) -> Task:
    """Addition with working: on the small model of the task's own, warmed up on demonstrations, or on another."""
    from policygrad.runs.language.warmup import warmed_up

    if options.dataset is not None:
        raise UserError("arithmetic makes its own problems: leave --dataset out")
    train, held_out = arithmetic.splits(TRAINED_ON, options.held_out, seed=0)
    if options.model is not None:
        loaded = _load(options)
    else:
        loaded = (warmed_up(announce, progress, device=options.device), arithmetic.tokenizer())
    functions = _functions(options) if options.reward else [arithmetic.right]
    return _task(ARITHMETIC, options, train, held_out, functions, loaded)


def _task(
    name: str,
    options: LanguageOptions,
    train: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
    functions: list[Callable],
    loaded: tuple[nn.Module, PreTrainedTokenizerBase],
) -> Task:
    model, tokenizer = loaded
    both = [prepared(x, tokenizer, options.max_prompt_tokens) for x in (train, held_out) if x]
    longest = max(x.mask.shape[1] for x in both) + options.max_tokens
    models.check_pair(model, tokenizer, longest)  # type: ignore[arg-type]
    policy = policy_of(model, options)
    weights, limit = list(options.reward_weight) or [1.0] * len(functions), options.reward_time_limit
    plain = Rewards(functions, weights, time_limit=limit)
    judge = plain
    if options.overlong_fraction:
        buffer = max(1, round(options.overlong_fraction * options.max_tokens))
        penalty = soft_overlong_penalty(options.max_tokens, buffer)
        judge = Rewards([*functions, penalty], [*weights, 1.0], time_limit=limit)
    return Task(name, policy, tokenizer, both[0], both[1] if len(both) > 1 else None, judge, plain)


def prepared(examples: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> Prompts:
    """Examples as prompts: tokens padded on the left, and their columns."""
    rows = data.encode_prompts(examples, tokenizer, max_length=max_length)
    tokens, mask = data.left_padded(rows, int(tokenizer.pad_token_id))
    return Prompts([x["prompt"] for x in examples], tokens, mask, data.columns_of(examples))


def policy_of(model: nn.Module, options: LanguageOptions) -> LanguagePolicy:
    """The model as a policy: on its device, with its adapter, its precision and its temperature."""
    if options.lora_rank:
        targets = options.lora_targets or None
        model = models.add_adapter(model, options.lora_rank, alpha=options.lora_alpha, targets=targets)
    if options.gradient_checkpointing:
        models.checkpoint_gradients(model)
    autocast = torch.bfloat16 if options.autocast == "bfloat16" else None
    return LanguagePolicy(model.to(options.device), temperature=options.temperature, autocast=autocast)


def _load(options: LanguageOptions) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    name = str(options.model)
    tokenizer = models.load_tokenizer(options.tokenizer or name, trust_remote_code=options.trust_remote_code)
    model = models.load_model(
        name, dtype=options.dtype, attention=options.attention, trust_remote_code=options.trust_remote_code
    )
    return model, tokenizer


def _functions(options: LanguageOptions) -> list[Callable]:
    """The reward functions by name; what names no function is a reward model."""
    found: list[Callable] = []
    for spec in options.reward:
        if is_function_spec(spec):
            found.append(load_reward(spec))
        else:
            from policygrad.language.reward_models import RewardModel

            found.append(RewardModel.load(spec, device=options.device, trust_remote_code=options.trust_remote_code))
    return found
