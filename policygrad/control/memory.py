"""Memory: what a policy carries from step to step. GRU, LSTM, and a small transformer over a window.

A policy with memory is asked about rows of steps, with what it remembered before them:

    policy(Rows(obs, start, state, ...)) -> the distribution at each step

A row may hold parts of several episodes. Where one starts, the memory is empty.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import relu

from policygrad.errors import UserError, one_line

LAYERS = 2  # blocks of the transformer


class Rows(NamedTuple):
    """Observations of rows of steps, with what their memory needs.

    A row may be cut into P equal pieces, each with the state before it. The states are those of the policy that
    sampled: learning takes them as they are, and no gradient flows to an earlier piece.
    """

    obs: Tensor  # [B, T, ...]
    start: Tensor  # [B, T], whether an episode starts at this step
    state: Tensor  # [B, P, S], the policy's memory before each piece
    critic_state: Tensor  # [B, P, S'], that of a critic with memory of its own; S' = 0 for others

    @staticmethod
    def join(rows: Sequence["Rows"]) -> "Rows":
        """The rows of several, one after the other; whole, unless all are cut into as many pieces."""
        pieces = {x.state.shape[1] for x in rows}
        kept = pieces.pop() if len(pieces) == 1 else 1
        cut = [x._replace(state=x.state[:, :kept], critic_state=x.critic_state[:, :kept]) for x in rows]
        return Rows(*(torch.cat(columns) for columns in zip(*cut, strict=True)))


class Memory(nn.Module, ABC):
    """Features [B, T, F] -> features [B, T, size] that depend on the steps before, back to the start of the episode.

    `state` [B, state_size] is what is carried from one call to the next; zeros are the empty memory.
    """

    size: int
    state_size: int

    def forward(
        self, features: Float[Tensor, "B T F"], start: Bool[Tensor, "B T"], state: Float[Tensor, "B S"]
    ) -> Float[Tensor, "B T size"]:
        """The features alone, as learning needs them."""
        return self.unrolled(features, start, state)[0]

    @abstractmethod
    def unrolled(
        self, features: Float[Tensor, "B T F"], start: Bool[Tensor, "B T"], state: Float[Tensor, "B S"]
    ) -> tuple[Float[Tensor, "B T size"], Float[Tensor, "B S"]]:
        """The features, and the state after the last step."""


class Recurrent(Memory):
    """A layer of torch's. orthogonal: orthogonal weights and biases of 0; else torch's own.

    Acting goes step by step, and so does all that torch traces. Learning takes the layer's own kernel, which computes
    whole sequences, many times as fast: a row is cut where an episode starts, and its parts are sequences of their own.
    """

    def __init__(self, layer: nn.RNNBase, states: int, orthogonal: bool) -> None:
        super().__init__()
        self.layer, self.size, self.state_size = layer, layer.hidden_size, states * layer.hidden_size
        if orthogonal:
            for name, p in layer.named_parameters():
                nn.init.orthogonal_(p) if name.startswith("weight") else nn.init.zeros_(p)

    def train(self, mode: bool = True) -> "Recurrent":
        """As of any module, but for the layer: it has no dropout, and on a GPU no gradient in evaluation mode."""
        super().train(mode)
        self.layer.train()
        return self

    def forward(self, features: Tensor, start: Tensor, state: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or is_mapped(features, *self.layer.parameters()):
            return self.unrolled(features, start, state)[0]
        rows, steps = start.shape
        begins = start.clone()
        begins[:, 0] = True
        begins = begins.flatten()
        if int(begins.sum()) == rows:
            return self.sequences(features, state * ~start[:, :1])
        first = begins.nonzero().squeeze(1)
        sequence = begins.cumsum(0) - 1
        place = torch.arange(rows * steps, device=start.device) - first[sequence]
        padded = features.new_zeros(len(first), int(place.max()) + 1, features.shape[-1])
        initial = state.new_zeros(len(first), self.state_size)
        padded = padded.index_put((sequence, place), features.flatten(0, 1))
        initial = initial.index_put((sequence.view(rows, steps)[:, 0],), state * ~start[:, :1])
        return self.sequences(padded, initial)[sequence, place].unflatten(0, (rows, steps))

    def unrolled(self, features: Tensor, start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        projected = nn.functional.linear(features, self.layer.weight_ih_l0, self.layer.bias_ih_l0)  # type: ignore[arg-type]
        kept = (~start).to(features.dtype).unsqueeze(-1)
        found = []
        for x, keep in zip(projected.unbind(1), kept.unbind(1), strict=True):
            state = self.step(x, keep * state)
            found.append(state[:, : self.size])
        return torch.stack(found, 1), state

    @abstractmethod
    def sequences(self, features: Tensor, state: Tensor) -> Tensor:
        """The features of sequences [N, L, F] without starts inside, by the layer's own kernel."""

    @abstractmethod
    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """The state after a step with the projected input x [B, gates size]. Its first `size` numbers are h."""

    def recurrent(self, h: Tensor) -> Tensor:
        """U h + b."""
        return nn.functional.linear(h, self.layer.weight_hh_l0, self.layer.bias_hh_l0)  # type: ignore[arg-type]


class GRU(Recurrent):
    """h' = (1 - z) n + z h, n = tanh(W x + r (U h)), with gates r and z (Cho et al. 2014, arXiv 1406.1078)."""

    def __init__(self, inputs: int, size: int, orthogonal: bool = True) -> None:
        super().__init__(nn.GRU(inputs, size, batch_first=True), 1, orthogonal)

    def sequences(self, features: Tensor, state: Tensor) -> Tensor:
        return self.layer(features, state.unsqueeze(0))[0]

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        recurrent, gates = self.recurrent(state), 2 * self.size
        r, z = (x[:, :gates] + recurrent[:, :gates]).sigmoid().chunk(2, -1)
        n = torch.addcmul(x[:, gates:], r, recurrent[:, gates:]).tanh()
        return torch.lerp(n, state, z)


class LSTM(Recurrent):
    """c' = f c + i g, h' = o tanh(c'), with gates i, f and o (Hochreiter & Schmidhuber 1997; Gers et al. 2000)."""

    def __init__(self, inputs: int, size: int, orthogonal: bool = True) -> None:
        super().__init__(nn.LSTM(inputs, size, batch_first=True), 2, orthogonal)

    def sequences(self, features: Tensor, state: Tensor) -> Tensor:
        h, c = (x.contiguous().unsqueeze(0) for x in state.chunk(2, -1))
        return self.layer(features, (h, c))[0]

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        h, c = state.chunk(2, -1)
        i, f, g, o = (x + self.recurrent(h)).chunk(4, -1)
        c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
        return torch.cat([o.sigmoid() * c.tanh(), c], -1)


class Transformer(Memory):
    """Two blocks of attention over the last `window` steps of the episode, this one included.

    A block is x + attention(norm(x)), then x + perceptron(norm(x)) (Vaswani et al. 2017, with the norms before, as in
    Parisotto et al. 2019, arXiv 1910.06764). A bias for each head and distance says how long ago a step was. The state
    is what each block was given in the last window - 1 steps (Dai et al. 2019, arXiv 1901.02860), and which of them are
    of this episode. Two blocks thus reach back 2 (window - 1) steps.
    """

    def __init__(self, inputs: int, size: int, window: int) -> None:
        super().__init__()
        if window < 2:
            raise UserError(f"memory_window is {window}: a window holds at least 2 steps")
        self.size, self.past = size, window - 1
        self.state_size = self.past * (LAYERS * size + 1)
        self.embed = nn.Linear(inputs, size)
        self.blocks = nn.ModuleList(Block(size, window) for _ in range(LAYERS))

    def unrolled(self, features: Tensor, start: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, steps = self.embed(features), features.shape[1]
        held, known = state.split([self.past * LAYERS * self.size, self.past], -1)
        before = held.unflatten(-1, (LAYERS, self.past, self.size)).unbind(1)
        # Episodes in the row are numbered from 0, that of the state; -1 is none.
        episode = start.long().cumsum(1)
        of_key = torch.cat([torch.where(known > 0, 0, -1), episode], 1)
        distance = (
            self.past
            + torch.arange(steps, device=x.device).unsqueeze(1)
            - torch.arange(self.past + steps, device=x.device)
        )
        allowed = (of_key.unsqueeze(1) == episode.unsqueeze(2)) & (distance >= 0) & (distance <= self.past)
        remains = of_key[:, -self.past :] == episode[:, -1:]
        after = []
        for block, cached in zip(self.blocks, before, strict=True):
            context = torch.cat([cached, x], 1)
            after.append(context[:, -self.past :].where(remains.unsqueeze(-1), 0.0).flatten(1))
            x = block(x, context, allowed, distance.clamp(0, self.past))
        return x, torch.cat([*after, remains.to(x.dtype)], -1)


class Block(nn.Module):
    """Attention of steps [B, T, size] to a context [B, K, size], then a perceptron."""

    def __init__(self, size: int, window: int) -> None:
        super().__init__()
        self.heads = next(n for n in (4, 2, 1) if size % n == 0)
        self.norm, self.norm_after = nn.LayerNorm(size), nn.LayerNorm(size)
        self.query, self.keys, self.out = nn.Linear(size, size), nn.Linear(size, 2 * size), nn.Linear(size, size)
        self.bias = nn.Parameter(torch.zeros(self.heads, window))
        self.wide, self.narrow = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)

    def forward(self, x: Tensor, context: Tensor, allowed: Tensor, distance: Tensor) -> Tensor:
        """allowed: [B, T, K], which steps of the context each step sees; distance: [T, K], how long ago they were."""
        q = self._by_head(self.query(self.norm(x)))
        k, v = map(self._by_head, self.keys(self.norm(context)).chunk(2, -1))
        # Written out: torch's fused attention has no second derivative, which a Fisher-vector product takes.
        logits = q @ k.mT / q.shape[-1] ** 0.5 + self.bias[:, distance]
        share = logits.masked_fill(~allowed.unsqueeze(1), -torch.inf).softmax(-1)
        x = x + self.out((share @ v).transpose(1, 2).flatten(2))
        return x + self.narrow(relu(self.wide(self.norm_after(x))))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def is_mapped(*tensors: Tensor) -> bool:
    """Whether torch.func is transforming a function of these, as torch.vmap does."""
    compiling = torch.compiler.is_compiling()  # which cannot look
    return not compiling and any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def make_memory(kind: str, inputs: int, size: int, window: int, orthogonal: bool) -> Memory | None:
    """The memory of a name: `gru`, `lstm`, or `transformer` over a window; None for `none`.

    Raises UserError for another name.
    """
    match kind:
        case "none":
            return None
        case "gru":
            return GRU(inputs, size, orthogonal)
        case "lstm":
            return LSTM(inputs, size, orthogonal)
        case "transformer":
            return Transformer(inputs, size, window)
    raise UserError(f"memory is {one_line(kind, 40)}: choose none, gru, lstm or transformer")


def measured_memory(inputs: int, options: dict[str, Any]) -> tuple[int, int]:
    """The parameters of a memory, and its features, before memory is taken for it. options: the policy's; {}: none."""
    if not options:
        return 0, inputs
    try:
        with torch.device("meta"):
            made = make_memory(options["memory"], inputs, options["memory_size"], options["memory_window"], False)
    except (RuntimeError, TypeError):  # so many bytes that torch has no number for them
        return sys.maxsize, options["memory_size"]
    return (0, inputs) if made is None else (sum(p.numel() for p in made.parameters()), made.size)


def rows_of(obs: Any, size: int) -> Rows:
    """Rows as they are; observations [B, T, ...] alone are rows that start an episode with an empty memory.

    size: of the state.
    """
    if isinstance(obs, Rows):
        return obs
    start = torch.zeros(obs.shape[:2], dtype=torch.bool, device=obs.device)
    start[:, 0] = True
    dtype = obs.dtype if obs.is_floating_point() else torch.get_default_dtype()
    state = torch.zeros(len(obs), 1, size, dtype=dtype, device=obs.device)
    return Rows(obs, start, state, state)
