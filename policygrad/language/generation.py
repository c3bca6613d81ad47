"""Sampling completions with the policy's own model, an engine of them."""

from dataclasses import fields
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from policygrad.errors import UserError
from policygrad.language.completions import Completions, Request
from policygrad.language.decoding import Captured, Decoding, Growing
from policygrad.language.policies import LanguagePolicy, causal, evaluating, positions
from policygrad.machine import free_memory
from policygrad.precision import precision

BYTES = 64  # of a token in a rollout: the token, its random number, log-probabilities, reward, marks, credit


@torch.no_grad()
def generate(
    policy: LanguagePolicy,
    prompt: Int[Tensor, "N P"],
    prompt_mask: Bool[Tensor, "N P"],
    request: Request,
    generator: torch.Generator,
) -> Completions:
    """Sample with the policy's own model. It reads each prompt once and copies the keys and values to its completions.

    Prompts are left-padded. Completions are sampled `request.micro_batch` rows at a time. Each row has its own random
    numbers, so that the size of a batch changes no sample. Once a quarter of a batch has finished, its finished rows
    are dropped from it and from the cache. This changes no sample either.

    Raises UserError if there is too little memory.
    """
    check_memory(policy, len(prompt), prompt.shape[1], request)
    rows = torch.arange(len(prompt), device=prompt.device).repeat_interleave(request.completions)
    uniform = None if request.greedy else _uniform(len(rows), request.max_tokens, generator)
    parts = []
    for index in torch.arange(len(rows), device=prompt.device).split(request.micro_batch or len(rows) or 1):
        own, copies = rows[index].unique_consecutive(return_counts=True)
        drawn = None if uniform is None else uniform[index]
        parts.append(_together(policy, prompt[own], prompt_mask[own], copies, request, drawn))
    return Completions(*(torch.cat([getattr(x, f.name) for x in parts]) for f in fields(Completions)))


def _together(
    policy: LanguagePolicy,
    prompt: Int[Tensor, "n P"],
    prompt_mask: Bool[Tensor, "n P"],
    copies: Int[Tensor, " n"],
    request: Request,
    uniform: Float[Tensor, "b T"] | None,
) -> Completions:
    """Completions sampled in one batch, `copies` of each prompt. uniform: a random number for each token; or greedy."""
    first = int(prompt_mask.any(0).int().argmax())
    prompt, prompt_mask = prompt[:, first:], prompt_mask[:, first:]
    with evaluating(policy.model), precision(prompt.device, policy.autocast):
        states, cache = _read(policy, prompt, prompt_mask, copies)
        seen, place = prompt_mask.repeat_interleave(copies, 0), positions(prompt_mask)[:, -1].repeat_interleave(copies)
        kind = form(policy, cache, prompt.device)
        done = _nothing_yet(len(states), states, request)
        return kind(policy, cache, seen, place, done, request, uniform).run(states)


def form(policy: LanguagePolicy, cache: DynamicCache, device: torch.device) -> type[Decoding]:
    """The form of decoding: captured on a GPU, if the model can be."""
    return Captured if device.type == "cuda" and Captured.can(policy, cache) else Growing


def check_memory(policy: LanguagePolicy, prompts: int, length: int, request: Request) -> None:
    """Raise UserError if completions of so many prompts of this length need more memory than is free.

    It counts the tokens with what belongs to each, and the keys and values of the rows sampled at a time.
    """
    rows, weight = prompts * request.completions, next(policy.parameters())
    together = min(rows, request.micro_batch or rows)
    cache = together * (length + request.max_tokens) * _cached(policy) * weight.element_size()
    needed, there = rows * request.max_tokens * BYTES + cache, memory_of(weight.device)
    if needed > there:
        raise UserError(
            f"{rows:,} completions of {request.max_tokens:,} tokens need {needed / 2**30:,.0f} GiB, and "
            f"{there / 2**30:,.0f} are free: lower max_tokens, completions or micro_batch"
        )


def _cached(policy: LanguagePolicy) -> int:
    """The numbers of keys and values of a token, as far as the model's configuration says."""
    config: Any = causal(policy.model).config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
    return 2 * getattr(config, "num_hidden_layers", 1) * (getattr(config, "num_key_value_heads", None) or heads) * size


def memory_of(device: torch.device) -> float:
    """The bytes of a device's memory that are free; of a GPU with those that torch keeps for later use."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    return free_memory()


def _nothing_yet(count: int, states: Float[Tensor, "N 1 H"], request: Request) -> Completions:
    shape, device = (count, request.max_tokens), states.device
    return Completions(
        torch.full(shape, request.pad, device=device),
        torch.zeros(shape, dtype=torch.promote_types(states.dtype, torch.float32), device=device),
        torch.zeros(shape, dtype=torch.bool, device=device),
        torch.zeros(count, dtype=torch.bool, device=device),
    )


def _read(
    policy: LanguagePolicy, prompt: Tensor, prompt_mask: Tensor, copies: Tensor
) -> tuple[Float[Tensor, "B 1 H"], DynamicCache]:
    """The states after the prompts and the cache of keys and values, a row for each completion."""
    model = causal(policy.model)
    if "past_key_values" not in signature(model.forward).parameters:
        raise UserError(f"{type(model).__name__} keeps no cache of keys and values: sample from it with another engine")
    cache = DynamicCache(config=model.config)
    states = policy.states(
        1,
        input_ids=prompt,
        position_ids=positions(prompt_mask),
        attention_mask=prompt_mask.long(),
        past_key_values=cache,
        use_cache=True,
    )
    rows = torch.arange(len(prompt), device=prompt.device).repeat_interleave(copies)
    cache.reorder_cache(rows)  # type: ignore[arg-type]
    return states[rows], cache


def _uniform(count: int, steps: int, generator: torch.Generator) -> Float[Tensor, "B T"]:
    """A number in [0, 1) for each token of each row, in the device's finest type."""
    dtype = torch.float32 if generator.device.type == "mps" else torch.float64
    return torch.rand(count, steps, dtype=dtype, device=generator.device, generator=generator)
