"""Decoding: the rows of a batch of completions grow together, by one token a step."""

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from policygrad.errors import Note, one_line
from policygrad.language.completions import Completions, Request
from policygrad.language.policies import LanguagePolicy, causal

MARGIN = 8  # tokens
KEPT = 3 / 4  # finished rows are dropped once at most this share of the rows goes on
BLOCK = 256  # steps of a capture: attention runs over the keys that the last of them has
LOOK = 16  # steps from one look at which rows go on to the next, if a look makes the CPU wait


class Decoding(ABC):
    """Rows of completions in one batch. `done` [B, T] is filled in as they grow.

    rows [n] are those of `done` that are in the batch, alive [n] those that have not ended, place [n] the position of
    the newest token, and t the steps so far. seen [n, P]: the prompt without its padding. Once a quarter of the batch
    has ended, those rows are dropped from it and from the cache.
    """

    every = 1  # steps from one look at which rows go on to the next

    def __init__(
        self,
        policy: LanguagePolicy,
        cache: DynamicCache,
        seen: Bool[Tensor, "n P"],
        place: Int[Tensor, " n"],
        done: Completions,
        request: Request,
        uniform: Float[Tensor, "B T"] | None,
    ) -> None:
        self.policy, self.cache, self.place, self.done = policy, cache, place, done
        self.request, self.uniform = request, uniform
        self.prompt, device = seen.shape[1], seen.device
        self.seen = pad(seen, (0, request.max_tokens), value=True)
        self.stop = torch.tensor(list(request.stop), device=device)
        self.rows = torch.arange(len(seen), device=device)
        self.token = torch.zeros_like(self.rows)
        self.alive = torch.ones_like(self.rows, dtype=torch.bool)
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        self.count = 0  # t, on the CPU

    def run(self, states: Float[Tensor, "n 1 H"]) -> Completions:
        """All tokens. states: after the prompts."""
        self.choose(states)
        self.count = 1
        while self.goes_on() and self.count < self.request.max_tokens:
            self.step()
            self.count += 1
        self.done.cut[self.rows] = self.alive
        return self.done

    @abstractmethod
    def step(self) -> None:
        """The next token of each row."""

    def choose(self, states: Float[Tensor, "n 1 H"]) -> None:
        """Choose the token after these states, in place."""
        drawn = None if self.uniform is None else self.uniform[self.rows, self.t]
        token, logp = _chosen(self.policy.distribution(states).logits[:, 0], drawn)
        self.done.tokens[self.rows, self.t] = token.where(self.alive, self.request.pad)
        self.done.logp[self.rows, self.t] = logp.where(self.alive, 0.0)
        self.done.mask[self.rows, self.t] = self.alive
        self.alive &= (token.unsqueeze(1) != self.stop).all(1)
        self.token.copy_(token)
        self.t += 1

    def goes_on(self) -> bool:
        """Whether a row goes on. Ends rows at their stop texts and drops those that have ended."""
        texts = self.request.stop_texts
        if texts:
            self.alive &= ~self._stopped()
        if not texts and self.count % self.every:
            return True
        left = int(self.alive.sum())
        if 0 < left <= KEPT * len(self.rows):
            self.keep(self.alive.nonzero().squeeze(1))
        return left > 0

    def keep(self, going: Int[Tensor, " m"]) -> None:
        """Drop all other rows."""
        for name in ("rows", "alive", "token", "place", "seen"):
            setattr(self, name, getattr(self, name)[going])
        self.cache.reorder_cache(going)  # type: ignore[arg-type]

    def _stopped(self) -> Bool[Tensor, " n"]:
        """Whether a stop text ends with the newest token."""
        going = self.alive.nonzero().squeeze(1)
        tokens = self.done.tokens[self.rows[going], max(0, self.count - _reach(self.request)) : self.count]
        found = _have_stop_text(tokens.tolist(), self.request)
        return torch.zeros_like(self.alive).index_put_((going,), torch.tensor(found, device=going.device))


def stopped_at(tokens: list[int], request: Request) -> int | None:
    """The number of tokens at which decoding would have ended a completion for a stop text; None: for none."""
    if not request.stop_texts:
        return None
    ends, reach = range(1, len(tokens) + 1), _reach(request)
    found = _have_stop_text([tokens[max(0, end - reach) : end] for end in ends], request)
    return next((end for end, stops in zip(ends, found, strict=True) if stops), None)


def _reach(request: Request) -> int:
    """How many tokens are looked at for a stop text.

    Each byte of it takes at most one token, so the last few tokens are enough; some more complete the first character.
    """
    return max(len(text.encode()) for text in request.stop_texts) + MARGIN


def _have_stop_text(tokens: list[list[int]], request: Request) -> list[bool]:
    """Whether each of these tokens as text has a stop text in it."""
    assert request.decode is not None
    return [any(text in said for text in request.stop_texts) for said in request.decode(tokens)]


class Growing(Decoding):
    """Step by step, over keys and values that grow. For every kind of cache.

    Sliding and recurrent layers have their own ways to grow.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        room = self.request.max_tokens
        self.cache.layers = [Roomy(x, room) if type(x) is DynamicLayer else x for x in self.cache.layers]

    def step(self) -> None:
        self.place = self.place + 1
        self.choose(
            self.policy.states(
                1,
                input_ids=self.token.unsqueeze(1),
                position_ids=self.place.unsqueeze(1),
                attention_mask=self.seen[:, : self.prompt + self.count].long(),
                past_key_values=self.cache,
                use_cache=True,
            )
        )


class Captured(Decoding):
    """A step over fixed shapes, which changes its tensors in place: it is captured as a CUDA graph and replayed.

    A step of the interpreter launches hundreds of small kernels and takes longer than the GPU takes to run them. A
    capture serves for BLOCK steps, or until rows are dropped. A model that cannot be captured takes each step by
    itself, and a Note says why.
    """

    every = LOOK

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.at = torch.full_like(self.t, self.prompt)  # of the newest key
        self.seen[:, self.prompt :] = False
        room = self.request.max_tokens
        self.layers = [_InPlace(layer, room, self.at) for layer in self.cache.layers]  # type: ignore[arg-type]
        self.cache.layers = [*self.layers]
        self.width = 0  # keys that attention runs over
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captures = self.rows.device.type == "cuda"

    @staticmethod
    def can(policy: LanguagePolicy, cache: DynamicCache) -> bool:
        """Whether all layers attend to all keys, and by a mask, so that keys may follow which are not seen yet.

        transformers says which models read no number of keys elsewhere.
        """
        model: Any = causal(policy.model)
        attention = getattr(model.config.get_text_config(), "_attn_implementation", None)
        full = all(type(layer) is DynamicLayer for layer in cache.layers)
        return full and attention in ("sdpa", "eager") and getattr(model, "_can_compile_fullgraph", False)

    def step(self) -> None:
        if self.prompt + self.count > self.width:
            self.width = min(self.prompt + self.count + BLOCK - 1, self.seen.shape[1])
            self.graph = None
            for layer in self.layers:
                layer.open(self.width)
            self.advance()  # by itself: libraries set themselves up at their first call
            return
        if self.captures and self.graph is None:
            self._capture()
        if self.graph is None:
            self.advance()
        else:
            self.graph.replay()

    def advance(self) -> None:
        """The step itself, without a number that the CPU has to know."""
        self.place += 1
        self.seen.index_fill_(1, self.at, True)
        self.choose(
            self.policy.states(
                1,
                input_ids=self.token.unsqueeze(1),
                position_ids=self.place.unsqueeze(1),
                attention_mask=self.seen[:, : self.width],
                past_key_values=self.cache,
                use_cache=True,
            )
        )
        self.at += 1

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.rows.device.index or 0]
        spare = generator.clone_state()
        try:
            with torch.cuda.graph(graph):
                self.advance()
        except RuntimeError as error:  # it waits for the GPU somewhere
            generator.graphsafe_set_state(spare)  # its own still counts draws of the capture, and would draw no more
            self.captures = False
            warnings.warn(f"decoding is not captured as a CUDA graph ({one_line(error, 100)})", Note, stacklevel=2)
        else:
            self.graph = graph

    def keep(self, going: Int[Tensor, " m"]) -> None:
        super().keep(going)
        self.width = 0


def _chosen(
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


class Roomy(DynamicLayer):
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


class _InPlace(Roomy):
    """Keys and values whose number is a tensor, `at`. Attention runs over the part that is open, by a mask."""

    is_compileable = True  # transformers then makes the mask without asking whether it is needed

    def __init__(self, layer: DynamicLayer, room: int, at: Int[Tensor, " 1"]) -> None:
        super().__init__(layer, room)
        self.at = at

    def open(self, width: int) -> None:
        """Let attention run over the first `width` places."""
        self.keys, self.values = (memory[..., :width, :] for memory in self.memory)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for written, new in ((self.keys, key_states), (self.values, value_states)):
            written.index_copy_(-2, self.at, new.to(written.dtype))  # under autocast they may have two types
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The keys that a mask is over, and the first of them."""
        return self.keys.shape[-2], 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.memory = tuple(memory[beam_idx] for memory in self.memory)
