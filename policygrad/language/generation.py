"""Sampling completions: an engine is a function (policy, prompts, request, generator) -> Completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from policygrad.errors import UserError
from policygrad.language.policies import LanguagePolicy, causal, evaluating, positions, precision


@dataclass(frozen=True)
class Request:
    """How completions are to be sampled."""

    completions: int  # of each prompt
    max_tokens: int  # of a completion, its end-of-sequence token among them
    stop: Sequence[int]  # the end-of-sequence tokens
    pad: int  # what stands behind an end
    greedy: bool = False  # the likeliest token instead of a sample; for evaluation


@dataclass(frozen=True)
class Completions:
    """B completions of T = max_tokens tokens, those of a prompt side by side, padded on the right.

    logp is that of the distribution sampled from, 0 behind the mask. A cut completion has no end-of-sequence token.
    """

    tokens: Int[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    cut: Bool[Tensor, " B"]


@runtime_checkable
class Engine(Protocol):
    """What samples completions: `generate` here, or another engine that holds the same weights.

    An engine is handed the policy at every call, so that one with a copy of the weights can bring it up to date. Its
    log-probabilities are those of the tokens under the distribution that it sampled from.
    """

    def __call__(
        self,
        policy: LanguagePolicy,
        prompt: Int[Tensor, "N P"],
        prompt_mask: Bool[Tensor, "N P"],
        request: Request,
        generator: torch.Generator,
    ) -> Completions: ...


@torch.no_grad()
def generate(
    policy: LanguagePolicy,
    prompt: Int[Tensor, "N P"],
    prompt_mask: Bool[Tensor, "N P"],
    request: Request,
    generator: torch.Generator,
) -> Completions:
    """Sample with the policy's own model: each prompt is read once, its keys and values are shared by its completions.

    Prompts are left-padded. Batched over all completions, with a static key-value cache where the model's layers allow
    it. Rows that have ended are computed on until the last has.
    """
    first = int(prompt_mask.any(0).int().argmax())
    prompt, prompt_mask = prompt[:, first:], prompt_mask[:, first:]
    seen = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt), request.max_tokens)], 1)
    stop = torch.tensor(list(request.stop), device=prompt.device)
    with evaluating(policy.model), precision(prompt.device, policy.autocast):
        states, cache = _read(policy, prompt, prompt_mask, request)
        seen = seen.repeat_interleave(request.completions, 0)
        place = positions(prompt_mask)[:, -1].repeat_interleave(request.completions)
        alive = torch.ones(len(seen), dtype=torch.bool, device=prompt.device)
        tokens: list[Tensor] = []
        logps: list[Tensor] = []
        masks: list[Tensor] = []
        for t in range(request.max_tokens):
            if t > 0:
                place = place + 1
                states = policy.states(
                    1,
                    input_ids=tokens[-1].unsqueeze(1),
                    position_ids=place.unsqueeze(1),
                    attention_mask=_visible(seen, prompt.shape[1] + t, cache),
                    past_key_values=cache,
                    use_cache=True,
                )
            token, logp = _choose(policy.distribution(states).logits[:, 0], request.greedy, generator)
            tokens.append(token.where(alive, request.pad))
            logps.append(logp.where(alive, 0.0))
            masks.append(alive)
            alive = alive & ~torch.isin(token, stop)
            if not alive.any():
                break
    return Completions(
        _filled(tokens, request.max_tokens, request.pad),
        _filled(logps, request.max_tokens, 0.0),
        _filled(masks, request.max_tokens, False),
        alive,
    )


def _read(
    policy: LanguagePolicy, prompt: Tensor, prompt_mask: Tensor, request: Request
) -> tuple[Float[Tensor, "B 1 H"], Cache]:
    """The states after the prompts, and their keys and values, one row a completion, with room to grow."""
    model = causal(policy.model)
    if "past_key_values" not in signature(model.forward).parameters:
        raise UserError(f"{type(model).__name__} keeps no cache of keys and values: sample from it by another engine")
    once = DynamicCache(config=model.config)
    states = policy.states(
        1,
        input_ids=prompt,
        position_ids=positions(prompt_mask),
        attention_mask=prompt_mask.long(),
        past_key_values=once,
        use_cache=True,
    )
    rows = torch.arange(len(prompt), device=prompt.device).repeat_interleave(request.completions)
    if not _may_be_static(policy, once):
        once.reorder_cache(rows)  # type: ignore[arg-type]
        return states[rows], once
    cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + request.max_tokens)
    for number, layer in enumerate(once.layers):
        cache.update(layer.keys[rows], layer.values[rows], number)  # type: ignore[index, union-attr]
    return states[rows], cache


def _may_be_static(policy: LanguagePolicy, cache: Cache) -> bool:
    """Does no layer slide or recur, and does the model's attention see what is not yet written as such?"""
    whole = all(type(layer) is DynamicLayer for layer in cache.layers)
    # Under autocast keys and values come in two types, of which a static layer takes one.
    return whole and policy.autocast is None and causal(policy.model)._can_compile_fullgraph


def _visible(seen: Bool[Tensor, "B L"], length: int, cache: Cache) -> Int[Tensor, "B _"]:
    """What may be attended to: a static cache hides its unwritten places itself, by causality."""
    return (seen if isinstance(cache, StaticCache) else seen[:, :length]).long()


def _choose(
    logp: Float[Tensor, "B V"], greedy: bool, generator: torch.Generator
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """A token of each row, and its log-probability. Never truncated: no top-k, no top-p."""
    if greedy:
        token = logp.argmax(-1)
    else:
        # The exponential race: argmax of p / e, e ~ Exp(1), is a sample of p; on a GPU it needs no synchronisation.
        race = torch.empty_like(logp).exponential_(generator=generator)
        token = (logp.exp() / race).argmax(-1)
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)


def _filled(columns: list[Tensor], width: int, value: float | int | bool) -> Tensor:
    """Columns as [B, width], with `value` where sampling ended early."""
    x = torch.stack(columns, 1)
    return torch.cat([x, x.new_full((len(x), width - x.shape[1]), value)], 1)
