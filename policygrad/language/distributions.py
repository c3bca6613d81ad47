"""The distribution of the next token, from hidden states, without all logits of a large vocabulary in memory.

At 2,048 positions and 152,000 tokens one copy of the logits takes 1.2 GB in float32, and a softmax with its gradient
takes several. So the positions are computed in chunks, and backward computes the logits of each chunk again.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Distribution, register_kl
from torch.nn.functional import linear

from policygrad.errors import UserError

CHUNK = 2**24  # the most logits held at once
BLOCK = 2**22  # of them computed at once, if only log-probabilities and entropies are asked for: they stay in the cache
Function = Callable[..., Tensor]  # (rows, log-probabilities [n, V] of each distribution at these rows) -> [n, ...]


class TokenDistribution(Distribution):
    """pi(v | s_t) = softmax_v((W h_t + b) / temperature), the categorical over the next token at every position.

    hidden [B, T, H], weight [V, H] or None if `hidden` is the logits themselves, bias [V]; batch_shape [B, T],
    event_shape (). where: the positions to compute. Everywhere else log_prob, entropy, KL and their gradients are 0,
    even if `hidden` is NaN there. chunk: the most logits held at once. If all fit, everything is plain torch, which
    can be differentiated twice, transformed and compiled. If not, it can be differentiated once, in reverse mode.

    The product W h is computed in hidden's type, also under autocast, and raised to float32 (float64 stays). A
    distribution made under no_grad is a constant: no gradient reaches the weight through it later.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        hidden: Float[Tensor, "B T H"],
        weight: Float[Tensor, "V H"] | None,
        bias: Float[Tensor, " V"] | None = None,
        *,
        temperature: float = 1.0,
        where: Bool[Tensor, "B T"] | None = None,
        chunk: int = CHUNK,
    ) -> None:
        if not temperature > 0:
            raise UserError(f"temperature is {temperature}: it must be more than 0")
        self.hidden, self.weight, self.bias = (_constant_under_no_grad(x) for x in (hidden, weight, bias))
        self.temperature, self.where, self.chunk = temperature, where, chunk
        self._memo: Any = None  # (was grad enabled, action, its log_prob, entropy)
        super().__init__(hidden.shape[:2], validate_args=False)

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "B T V"],
        *,
        temperature: float = 1.0,
        where: Bool[Tensor, "B T"] | None = None,
        chunk: int = CHUNK,
    ) -> "TokenDistribution":
        """softmax(logits / temperature), for a model with more than a linear layer as its head."""
        return cls(logits, None, temperature=temperature, where=where, chunk=chunk)

    def log_prob(self, value: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """log pi(a_t | s_t). The same pass computes the entropy. Both are kept for this tensor of actions."""
        grad = torch.is_grad_enabled()
        if self._memo is None or self._memo[0] != grad or self._memo[1] is not value:
            self._memo = (grad, value, *_picked(_select(value, self.where), self))
        return self._memo[2]

    def entropy(self) -> Float[Tensor, "B T"]:
        """H_t = -sum_v pi_v log pi_v."""
        grad = torch.is_grad_enabled()
        if self._memo is None or self._memo[0] != grad:
            self._memo = (grad, None, None, *_evaluate((_entropy,), self.where, self))
        return self._memo[3]

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Int[Tensor, "*S B T"]:
        """a_t ~ pi(. | s_t), from torch's global generator; 0 outside `where`."""
        draw = partial(_draw, torch.Size(sample_shape).numel())
        (token,) = _evaluate((draw,), self.where, self)
        return token.movedim(-1, 0).reshape(*sample_shape, *self.batch_shape)

    @property
    def logits(self) -> Float[Tensor, "B T V"]:
        """log pi_v of every token, all in memory; for small models. 0 outside `where`."""
        return _evaluate((_itself,), self.where, self)[0]

    @property
    def probs(self) -> Float[Tensor, "B T V"]:
        """pi_v of every token, all in memory; for small models. Uniform outside `where`."""
        return self.logits.softmax(-1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": None}  # results may have a graph, which cannot be copied


@register_kl(TokenDistribution, TokenDistribution)
def _kl_tokens(p: TokenDistribution, q: TokenDistribution) -> Float[Tensor, "B T"]:
    # At the positions that both of them compute.
    where = p.where if q.where is None else q.where if p.where is None else p.where & q.where
    return _evaluate((_kl,), where, p, q)[0]


def _pick(token: Int[Tensor, " N"], rows: slice, logp: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    return logp.gather(-1, token[rows].unsqueeze(-1)).squeeze(-1)


def _entropy(rows: slice, logp: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    return -(logp.exp() * logp).sum(-1)


def _kl(rows: slice, logp: Float[Tensor, "n V"], logq: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    return (logp.exp() * (logp - logq)).sum(-1)


def _draw(count: int, rows: slice, logp: Float[Tensor, "n V"]) -> Int[Tensor, "n count"]:
    return torch.multinomial(logp.exp(), count, replacement=True)


def _itself(rows: slice, logp: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
    return logp


class _Head(NamedTuple):
    """logits = hidden @ weight.T + bias, or hidden itself. Or the gradients of the three, or flags."""

    hidden: Any
    weight: Any
    bias: Any

    def vocabulary(self) -> int:
        return self.hidden.shape[-1] if self.weight is None else self.weight.shape[0]

    def logits(self, rows: slice) -> Float[Tensor, "n V"]:
        hidden, weight, bias = self.hidden[rows], self.weight, self.bias
        # Backward runs outside autocast and has to compute the same logits again.
        with torch.autocast(hidden.device.type, enabled=False):
            logits = hidden if weight is None else linear(hidden, weight, bias)
        return logits.to(_raised(hidden))

    def blocks(self, width: int) -> "Iterator[_Block]":
        """The head, `width` tokens of the vocabulary at a time."""
        for start in range(0, self.vocabulary(), width):
            columns = slice(start, start + width)
            bias = None if self.bias is None else self.bias[columns]
            yield _Block(self.hidden, self.weight[columns], bias, columns)

    def zeros(self, needed: "_Head") -> "_Head":
        """The sums of gradients over chunks, at zero; None where no gradient is needed."""
        # The sum for a weight in bfloat16 is in float32. Relative errors over 19 and 256 chunks: 0.2 % and 0.2 %, as
        # for one product over all rows; 0.4 % and 1.1 % if summed in bfloat16.
        dtypes = (self.hidden.dtype, _raised(self.hidden), _raised(self.hidden))
        given = zip(self, dtypes, needed, strict=True)
        return _Head(*(torch.zeros_like(x, dtype=dtype) if need else None for x, dtype, need in given))


def _head(given: TokenDistribution, where: Bool[Tensor, "B T"] | None) -> _Head:
    """The head at the positions `where`, all of it in the type of the hidden states."""
    weight, bias = (x if x is None else x.to(given.hidden.dtype) for x in (given.weight, given.bias))
    return _Head(_select(given.hidden, where), weight, bias)


def _evaluate(
    functions: Sequence[Function], where: Bool[Tensor, "B T"] | None, *distributions: TokenDistribution
) -> list[Tensor]:
    """Each function of the log-probabilities at the positions `where`, as [B, T, ...]; 0 at all other positions."""
    heads = [_head(d, where) for d in distributions]
    temperatures = [d.temperature for d in distributions]
    size = max(1, min(d.chunk for d in distributions) // heads[0].vocabulary())
    if heads[0].hidden.shape[0] <= size:
        found = _apply(functions, slice(None), [head.logits(slice(None)) for head in heads], temperatures)
    else:
        found = _Chunked.apply(functions, size, temperatures, *chain(*heads))
    return [_scatter(x, where, distributions[0].batch_shape) for x in found]


def _picked(token: Int[Tensor, " N"], given: TokenDistribution) -> list[Tensor]:
    """The log-probability of the tokens and the entropy, at the positions `where`, as [B, T]; 0 elsewhere."""
    head = _head(given, given.where)
    if head.weight is None or head.hidden.shape[0] * head.vocabulary() <= given.chunk:
        return _evaluate((partial(_pick, token), _entropy), given.where, given)
    width = max(1, min(BLOCK, given.chunk) // head.hidden.shape[0])
    found = _ByVocabulary.apply(token, width, given.temperature, *head)
    return [_scatter(x, given.where, given.batch_shape) for x in found]


class _ByVocabulary(torch.autograd.Function):
    """log pi of a token and the entropy at every position, `width` tokens of the vocabulary at a time.

    Blocks of the vocabulary read and write each row of the weight and of its gradient once; blocks of positions would
    go through all of it every time. With m = max_v x_v, s = sum_v e^(x_v - m) and u = sum_v e^(x_v - m) (x_v - m), both
    summed block by block, log sum_v e^x_v = m + log s and the entropy is log s - u / s. Backward computes the logits
    again; their gradients are g (1[v = token] - pi_v) and -g pi_v (log pi_v + entropy).
    """

    @staticmethod
    def forward(
        ctx: Any, token: Tensor, width: int, temperature: float, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        head, dtype = _Head(hidden, weight, bias), _raised(hidden)
        ctx.width, ctx.temperature = width, temperature
        ctx.set_materialize_grads(False)
        largest = torch.full(token.shape, -torch.inf, dtype=dtype, device=hidden.device)
        total, moment, picked = (torch.zeros_like(largest) for _ in range(3))
        for block in head.blocks(width):
            logits = block.logits(slice(None)).div_(temperature)
            place, inside = block.place(token)
            picked += logits.gather(1, place).squeeze(1).where(inside, 0.0)
            highest = logits.amax(1).maximum(largest)
            scale = (largest - highest).exp()
            moment = scale * (moment + (total * (largest - highest)).where(total > 0, 0.0))
            probability = logits.sub_(highest.unsqueeze(1)).exp()
            total, largest = scale * total + probability.sum(1), highest
            moment += probability.mul_(logits).sum(1)
        moment /= total
        ctx.save_for_backward(token, largest, total, moment, hidden, weight, bias)
        return picked - largest - total.log(), total.log() - moment

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph, and the second derivative would lack the part of the logits
            raise UserError("logits in chunks can be differentiated once: raise `chunk` for a second derivative")
        token, largest, total, moment, *tensors = ctx.saved_tensors
        head, (by_logp, by_entropy) = _Head(*tensors), (x if x is None else x / ctx.temperature for x in gradients)
        sums = head.zeros(_Head(*ctx.needs_input_grad[3:]))
        by_hidden = None if sums.hidden is None else torch.zeros_like(sums.hidden, dtype=_raised(head.hidden))
        for block in head.blocks(ctx.width) if by_logp is not None or by_entropy is not None else ():
            logits = block.logits(slice(None)).div_(ctx.temperature).sub_(largest.unsqueeze(1))
            g = logits.exp()  # pi times the total
            if by_entropy is None:
                assert by_logp is not None
                g.mul_((-by_logp / total).unsqueeze(1))
            else:  # log pi_v + entropy = logits - moment
                factor = logits.sub_(moment.unsqueeze(1)).mul_(by_entropy.unsqueeze(1))
                factor = factor if by_logp is None else factor.add_(by_logp.unsqueeze(1))
                g.mul_(factor.div_(-total.unsqueeze(1)))
            if by_logp is not None:
                place, inside = block.place(token)
                g.scatter_add_(1, place, by_logp.where(inside, 0.0).unsqueeze(1))
            if by_hidden is not None:
                by_hidden += g.to(block.weight.dtype) @ block.weight
            if sums.weight is not None:
                torch.mm(g.t(), head.hidden.to(g.dtype), out=sums.weight[block.columns])
            if sums.bias is not None:
                sums.bias[block.columns] = g.sum(0)
        return None, None, None, by_hidden, *sums[1:]  # autograd rounds them to their inputs' types


class _Block(NamedTuple):
    """A head of some tokens of the vocabulary only; columns: which."""

    hidden: Any
    weight: Any
    bias: Any
    columns: slice

    def logits(self, rows: slice) -> Float[Tensor, "n v"]:
        return _Head(self.hidden, self.weight, self.bias).logits(rows)

    def place(self, token: Int[Tensor, " n"]) -> tuple[Int[Tensor, "n 1"], Bool[Tensor, " n"]]:
        """Where each token stands in the block, and whether it does."""
        place = token - self.columns.start
        inside = (place >= 0) & (place < len(self.weight))
        return place.where(inside, 0).unsqueeze(1), inside


class _Chunked(torch.autograd.Function):
    """Functions of the log-probabilities, `size` rows at a time; tensors: the heads', one after another."""

    @staticmethod
    def forward(
        ctx: Any, functions: Sequence[Function], size: int, temperatures: Sequence[float], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.functions, ctx.size, ctx.temperatures = functions, size, temperatures
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)  # backward skips a function without a gradient
        heads = _heads(tensors)
        parts = [
            _apply(functions, rows, [head.logits(rows) for head in heads], temperatures)
            for rows in _chunks(heads[0].hidden, size)
        ]
        return tuple(torch.cat(x) for x in zip(*parts, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph, and the second derivative would lack the part of the logits
            raise UserError("logits in chunks can be differentiated once: raise `chunk` for a second derivative")
        heads, needed = _heads(ctx.saved_tensors), _heads(ctx.needs_input_grad[3:])
        sums = [head.zeros(need) for head, need in zip(heads, needed, strict=True)]
        asked = [(f, g) for f, g in zip(ctx.functions, gradients, strict=True) if g is not None]
        for rows in _chunks(heads[0].hidden, ctx.size) if asked else ():
            _add_gradients(sums, heads, rows, asked, ctx.temperatures)
        return None, None, None, *chain(*sums)  # autograd rounds them to their inputs' types


def _add_gradients(
    sums: list[_Head],
    heads: list[_Head],
    rows: slice,
    asked: list[tuple[Function, Tensor]],
    temperatures: Sequence[float],
) -> None:
    """Add the gradients of one chunk. A function of its own, so that the chunk's memory is free before the next one."""
    logits = [head.logits(rows).detach() for head in heads]
    given = zip(sums, heads, logits, strict=True)
    trained = [(total, head, x.requires_grad_()) for total, head, x in given if any(g is not None for g in total)]
    with torch.enable_grad():
        found = _apply([f for f, _ in asked], rows, logits, temperatures)
    gradients = torch.autograd.grad(found, [x for *_, x in trained], [g[rows] for _, g in asked])
    for (total, head, _), g in zip(trained, gradients, strict=True):
        if total.hidden is not None:
            total.hidden[rows] = g if head.weight is None else g.to(head.weight.dtype) @ head.weight
        if total.weight is not None:
            total.weight.addmm_(g.t(), head.hidden[rows].to(g.dtype))
        if total.bias is not None:
            total.bias.add_(g.sum(0))


def _apply(
    functions: Sequence[Function], rows: slice, logits: Sequence[Tensor], temperatures: Sequence[float]
) -> list[Tensor]:
    tempered = (x if t == 1 else x / t for x, t in zip(logits, temperatures, strict=True))
    logp = [torch.log_softmax(x, -1) for x in tempered]
    return [f(rows, *logp) for f in functions]


def _heads(tensors: Sequence[Any]) -> list[_Head]:
    return [_Head(*three) for three in zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)]


def _chunks(hidden: Tensor, size: int) -> Iterator[slice]:
    return (slice(i, i + size) for i in range(0, hidden.shape[0], size))


def _raised(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _select(x: Tensor, where: Bool[Tensor, "B T"] | None) -> Tensor:
    """The rows of x at the positions `where`; in a compiled graph (fixed shapes) all rows, and 0 elsewhere."""
    if where is None or torch.compiler.is_compiling():
        return _zero_elsewhere(x, where).flatten(0, 1)
    return x[where]


def _scatter(x: Tensor, where: Bool[Tensor, "B T"] | None, batch_shape: torch.Size) -> Tensor:
    """The inverse of _select."""
    shape = (*batch_shape, *x.shape[1:])
    if where is None or torch.compiler.is_compiling():
        return _zero_elsewhere(x.reshape(shape), where)
    return x.new_zeros(shape).index_put((where,), x)


def _zero_elsewhere(x: Tensor, where: Bool[Tensor, "B T"] | None) -> Tensor:
    return x if where is None else x.masked_fill(~where.view(*where.shape, *[1] * (x.dim() - 2)), 0)


def _constant_under_no_grad(x: Any) -> Any:
    return x if x is None or torch.is_grad_enabled() else x.detach()
