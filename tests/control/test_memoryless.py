"""Memory is found wherever it is, and looking for it changes nothing."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from modules import Wrapped
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.nn.functional import scaled_dot_product_attention

from policygrad.control import Critic, Policy, memoryless
from policygrad.control.memoryless import has_memory, refuse_memory
from policygrad.errors import UserError

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (3,), np.float32)
BOX = spaces.Box(-1, 1, (2,), np.float32)


class Features(nn.Module):
    """features [B, T, 8] -> a distribution; the base of policies with and without memory."""

    def __init__(self, zero: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)
        if zero:
            nn.init.zeros_(self.head.weight)

    def features(self, obs: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, obs: Tensor) -> Any:
        return Categorical(logits=self.head(self.features(obs)))


class Recurrent(Features):
    def __init__(self, kind: Any = nn.LSTM, zero: bool = False) -> None:
        super().__init__(zero)
        self.cell = kind(3, 8, batch_first=True)

    def features(self, obs: Tensor) -> Tensor:
        return self.cell(obs)[0]


class Attention(Features):
    """Causal self-attention; with `gate` its output starts at 0."""

    def __init__(self, zero: bool = False, gate: float = 1.0) -> None:
        super().__init__(zero)
        self.qkv, self.gate = nn.Linear(3, 24), nn.Parameter(torch.tensor(gate))

    def features(self, obs: Tensor) -> Tensor:
        q, k, v = self.qkv(obs).chunk(3, -1)
        return v + self.gate * scaled_dot_product_attention(q, k, v, is_causal=True)


class Position(Features):
    """Knows how many steps came before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.place = nn.Linear(3, 8), nn.Embedding(64, 8)

    def features(self, obs: Tensor) -> Tensor:
        return self.first(obs) + self.place.weight[: obs.shape[1]]


class Lookahead(Features):
    """The action depends on later observations only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)

    def features(self, obs: Tensor) -> Tensor:
        return self.first(obs.flip(1).cumsum(1).flip(1))


class MemoryCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(3, 1, batch_first=True)

    def forward(self, obs: Tensor) -> Tensor:
        return self.cell(obs)[0].squeeze(-1)


class Sharp(nn.Module):
    """Nearly deterministic: rounding in its mean is large in its log-probability."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 2))

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Normal(self.net(obs), 1e-6), 1)


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.net(obs))


WITH = {
    "LSTM": Recurrent,
    "GRU": lambda: Recurrent(nn.GRU),
    "causal attention": Attention,
    "position": Position,
    "lookahead": Lookahead,
    "LSTM before a layer of zeros": lambda: Recurrent(zero=True),
    "attention before a layer of zeros": lambda: Attention(zero=True),
    "attention behind a closed gate": lambda: Attention(gate=0.0),
    "wrapped LSTM": lambda: Wrapped(Recurrent()),
    "critic": MemoryCritic,
    "float64": lambda: Recurrent().double(),
}
WITHOUT = {
    "discrete": lambda: Policy(OBSERVATIONS, spaces.Discrete(3)),
    "clipped": lambda: Policy(OBSERVATIONS, BOX),
    "squashed": lambda: Policy(OBSERVATIONS, BOX, distribution="squashed", state_dependent_std=True),
    "beta": lambda: Policy(OBSERVATIONS, BOX, distribution="beta"),
    "multi-discrete": lambda: Policy(OBSERVATIONS, spaces.MultiDiscrete([2, 3])),
    "multi-binary": lambda: Policy(OBSERVATIONS, spaces.MultiBinary(3)),
    "wrapped": lambda: Wrapped(Policy(OBSERVATIONS, spaces.Discrete(3))),
    "wide": lambda: Policy(OBSERVATIONS, BOX, hidden=(512, 512)),
    "critic": lambda: Critic(OBSERVATIONS),
    "sharp": Sharp,
    "dropout": Dropout,
    "float64": lambda: Policy(OBSERVATIONS, BOX).double(),
    "compiled": lambda: torch.compile(Policy(OBSERVATIONS, BOX), backend="eager"),
}


def obs_for(module: nn.Module) -> Tensor:
    return torch.randn(4, 6, 3, dtype=next(module.parameters()).dtype)


@pytest.mark.parametrize("name", WITH)
def test_memory_is_found(name: str) -> None:
    module = WITH[name]()
    assert has_memory(module, obs_for(module))


@pytest.mark.parametrize("name", WITH)
def test_memory_is_found_where_observations_hardly_differ(name: str) -> None:
    module = WITH[name]()
    assert has_memory(module, 1 + 0.1 * obs_for(module))


@pytest.mark.parametrize("name", WITHOUT)
def test_no_memory_is_found_where_there_is_none(name: str) -> None:
    module = WITHOUT[name]()
    assert not has_memory(module, obs_for(module))


@pytest.mark.parametrize("make", [Recurrent, Dropout, lambda: Policy(OBSERVATIONS, BOX)])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(make: Callable[[], nn.Module], training: bool) -> None:
    module = make().train(training)
    next(iter(module.children())).eval()
    before, modes = copy.deepcopy(module.state_dict()), [x.training for x in module.modules()]
    obs, random = obs_for(module), torch.get_rng_state()
    has_memory(module, obs)
    assert torch.equal(torch.get_rng_state(), random)
    assert [x.training for x in module.modules()] == modes
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())


def test_the_answer_is_remembered_without_keeping_the_module_alive() -> None:
    calls = []

    class Counted(Recurrent):
        def forward(self, obs: Tensor) -> Any:
            calls.append(obs.shape)
            return super().forward(obs)

    module = Counted()
    obs, before = obs_for(module), len(memoryless._found)
    has_memory(module, obs)
    count = len(calls)
    assert has_memory(module, obs)
    assert len(calls) == count
    assert len(memoryless._found) == before + 1
    del module
    gc.collect()
    assert len(memoryless._found) == before


@pytest.mark.parametrize("obs", [torch.randn(4, 1, 3), torch.ones(4, 6, 3)], ids=["one step", "equal observations"])
def test_no_answer_is_remembered_from_observations_that_cannot_show_memory(obs: Tensor) -> None:
    module = Attention()
    assert not has_memory(module, obs)
    assert has_memory(module, obs_for(module))


def test_a_large_rollout_is_read_in_part() -> None:
    shapes = []

    class Seen(Recurrent):
        def forward(self, obs: Tensor) -> Any:
            shapes.append(tuple(obs.shape[:2]))
            return super().forward(obs)

    has_memory(Seen(), torch.randn(100, 1000, 3))
    assert set(shapes) <= {(8, 16), (128, 1)}


@pytest.mark.parametrize(("module", "name"), [(Recurrent(), "policy"), (MemoryCritic(), "critic")])
def test_a_module_with_memory_is_refused_in_one_line(module: nn.Module, name: str) -> None:
    with pytest.raises(UserError, match=f"^the {name}'s output at a step depends on other steps") as raised:
        refuse_memory(module, obs_for(module), name)
    assert len(str(raised.value)) <= 200
    assert "\n" not in str(raised.value)


def test_a_declaration_is_not_believed() -> None:
    module = Recurrent()
    module.memoryless = True
    assert has_memory(module, obs_for(module))
