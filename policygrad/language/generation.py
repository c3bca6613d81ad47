"""Sampling completions. An engine is a function (policy, prompts, request, generator) -> Completions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from policygrad.errors import UserError
from policygrad.language.policies import LanguagePolicy, causal, evaluating, positions, precision
from policygrad.machine import free_memory

BYTES = 64  # of a token in a rollout: the token, its random number, log-probabilities, reward, marks, credit
MARGIN = 8  # tokens
KEPT = 3 / 4  # finished rows are dropped once at most this share of the rows goes on


@dataclass(frozen=True)
class Request:
    """A request to an engine for completions."""

    completions: int  # of each prompt
    max_tokens: int  # of a completion, its end-of-sequence token among them
    stop: Sequence[int]  # the end-of-sequence tokens
    pad: int  # fills a row after its end
    greedy: bool = False  # take the most likely token instead of a sample; for evaluation
    stop_texts: Sequence[str] = ()  # a completion ends once one of them stands in its text
    decode: Callable[[list[list[int]]], list[str]] | None = None  # tokens -> text, to find the stop texts
    micro_batch: int | None = None  # rows sampled at a time; None: all


@dataclass(frozen=True)
class Completions:
    """B completions of T = max_tokens tokens, those of a prompt side by side, padded on the right.

    mask: the policy chose this token. It may have holes: an engine may insert tokens between decisions, such as the
    output of a tool. The policy sees them and is not scored on them. A completion ends at its last decision.
    logp: of the distribution sampled from; 0 outside the mask. cut: the completion has neither an end-of-sequence token
    nor a stop text.
    """

    tokens: Int[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    cut: Bool[Tensor, " B"]

    def ids(self) -> list[list[int]]:
        """The tokens of each completion up to its end, inserted ones among them."""
        whole = self.mask.flip(1).cumsum(1).flip(1) > 0  # up to the last decision
        return [row[kept].tolist() for row, kept in zip(self.tokens.cpu(), whole.cpu(), strict=True)]


@runtime_checkable
class Engine(Protocol):
    """A sampler of completions: `generate`, or another engine with the same weights.

    Every call hands over the policy, so an engine with its own copy of the weights can bring the copy up to date. Its
    log-probabilities are those of the distribution that it sampled from.
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
    stop = torch.tensor(list(request.stop), device=prompt.device)
    with evaluating(policy.model), precision(prompt.device, policy.autocast):
        states, cache = _read(policy, prompt, prompt_mask, copies, request)
        done = _nothing_yet(len(states), states, request)
        rows = torch.arange(len(done.mask), device=prompt.device)  # the rows in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)  # which of them have not finished
        seen = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt), request.max_tokens)], 1)
        seen = seen.repeat_interleave(copies, 0)
        place = positions(prompt_mask)[:, -1].repeat_interleave(copies)
        token = rows
        for t in range(request.max_tokens):
            if t > 0:
                place = place + 1
                states = policy.states(
                    1,
                    input_ids=token.unsqueeze(1),
                    position_ids=place.unsqueeze(1),
                    attention_mask=seen[:, : prompt.shape[1] + t].long(),
                    past_key_values=cache,
                    use_cache=True,
                )
            drawn = None if uniform is None else uniform[rows, t]
            token, logp = _choose(policy.distribution(states).logits[:, 0], drawn)
            done.tokens[rows, t] = token.where(alive, request.pad)
            done.logp[rows, t] = logp.where(alive, 0.0)
            done.mask[rows, t] = alive
            alive = alive & ~torch.isin(token, stop)
            if request.stop_texts:
                alive = alive & ~_stopped(done.tokens[rows, : t + 1], alive, request)
            left = int(alive.sum())
            if left == 0:
                break
            if left <= KEPT * len(rows):
                going = alive.nonzero().squeeze(1)
                rows, alive, token, place, seen = (x[going] for x in (rows, alive, token, place, seen))
                cache.reorder_cache(going)  # type: ignore[arg-type]
    done.cut[rows] = alive
    return done


def _stopped(tokens: Int[Tensor, "b t"], alive: Bool[Tensor, " b"], request: Request) -> Bool[Tensor, " b"]:
    """Whether a stop text ends with the newest token.

    Each byte of it takes at most one token, so the last few tokens are enough; some more complete the first character.
    """
    assert request.decode is not None
    reach = max(len(text.encode()) for text in request.stop_texts) + MARGIN
    going = alive.nonzero().squeeze(1)
    said = request.decode(tokens[going, -reach:].tolist())
    found = [any(text in x for text in request.stop_texts) for x in said]
    return torch.zeros_like(alive).index_put((going,), torch.tensor(found, dtype=torch.bool, device=alive.device))


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
    policy: LanguagePolicy, prompt: Tensor, prompt_mask: Tensor, copies: Tensor, request: Request
) -> tuple[Float[Tensor, "B 1 H"], DynamicCache]:
    """The states after the prompts and the cache of keys and values, a row for each completion, with room to grow."""
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
    # Sliding and recurrent layers have their own ways to grow.
    cache.layers = [
        _Roomy(layer, request.max_tokens) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return states[rows], cache


class _Roomy(DynamicLayer):
    """The keys and values of a full-attention layer, in memory that is allocated once for all tokens.

    New ones are written in place; a DynamicLayer would copy all earlier ones. Attention runs over the written part
    only; a StaticLayer's runs over the whole memory.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: DynamicLayer, room: int) -> None:
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self.is_initialized, self.dtype, self.device = True, layer.dtype, layer.device
        self._set_aside(layer.keys, layer.values, room)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; returns all written so far."""
        start, stop = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        for memory, new in zip(self.memory, (key_states, value_states), strict=True):
            memory[..., start:stop, :] = new
        self.keys, self.values = (memory[..., :stop, :] for memory in self.memory)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows."""
        room = self.memory[0].shape[-2] - self.keys.shape[-2]
        self._set_aside(self.keys[beam_idx], self.values[beam_idx], room)

    def _set_aside(self, keys: Tensor, values: Tensor, room: int) -> None:
        self.memory = tuple(pad(x, (0, 0, 0, room)) for x in (keys, values))
        self.keys, self.values = (x[..., : keys.shape[-2], :] for x in self.memory)


def _uniform(count: int, steps: int, generator: torch.Generator) -> Float[Tensor, "B T"]:
    """A number in [0, 1) for each token of each row, in the device's finest type."""
    dtype = torch.float32 if generator.device.type == "mps" else torch.float64
    return torch.rand(count, steps, dtype=dtype, device=generator.device, generator=generator)


def _choose(
    logp: Float[Tensor, "n V"], uniform: Float[Tensor, " n"] | None
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """A token of each row, drawn or the most likely, and its log-probability. No truncation (top-k, top-p)."""
    token = logp.argmax(-1) if uniform is None else inverse_transform(logp.exp(), uniform)
    return token, logp.gather(1, token.unsqueeze(1)).squeeze(1)


def inverse_transform(p: Float[Tensor, "n V"], uniform: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """The first v with p_0 + ... + p_v > uniform * (sum of p): a sample of p, if uniform is drawn from [0, 1).

    The sums are in the type of `uniform`; in float64 even the smallest float32 probability has its share. They run
    over blocks of sqrt(V) tokens, then inside one block, so a large vocabulary costs one pass. The CPU does not wait
    for a GPU.
    """
    width = math.isqrt(p.shape[1] - 1) + 1
    blocks = pad(p, (0, -p.shape[1] % width)).unflatten(1, (-1, width))
    mass = blocks.sum(-1, dtype=uniform.dtype).cumsum(-1)
    target = uniform.unsqueeze(1) * mass[:, -1:]
    block = _first_above(mass, target)
    inside = blocks.take_along_dim(block.unsqueeze(2), 1).squeeze(1).to(uniform.dtype).cumsum(-1)
    token = _first_above(inside, target - pad(mass, (1, 0)).gather(1, block))
    return (block * width + token).squeeze(1).clamp(max=p.shape[1] - 1)  # NaN too gives a valid token


def _first_above(cumulative: Float[Tensor, "n K"], x: Float[Tensor, "n 1"]) -> Int[Tensor, "n 1"]:
    """The first place where the sum exceeds x. If rounding leaves none, the last place that adds to the sum."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.searchsorted(cumulative, x, right=True).minimum(last).clamp(max=cumulative.shape[1] - 1)
