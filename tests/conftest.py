"""What every test starts from: one seed, one thread (`make test-portable` also takes two), and small policies whose
every number can be computed by hand.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from segments import Segments
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence, register_kl

from policygrad.rollout import Rollout

THREADS = int(os.environ.get("TEST_THREADS", "1"))


@pytest.fixture(autouse=True)
def seed_and_threads() -> None:
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:  # as in what a shell starts in the background, or under nohup
            signal.signal(number, usual)
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture
def float64() -> Iterator[None]:
    """Everything made without a dtype is float64, until the test is over."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(params=[0.0, 0.15, 0.3, 0.5, 1.0], ids=lambda p: f"ends={p}")
def segments(request: pytest.FixtureRequest, float64: None) -> Segments:
    ended = torch.rand(5, 7) < request.param
    return Segments(torch.randn(5, 7), torch.randn(5, 8), ended & (torch.rand(5, 7) < 0.5), ended)


class Softmax(nn.Module):
    """A small network's softmax over four actions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, obs: Tensor) -> Categorical:
        return Categorical(logits=self.net(obs), validate_args=False)


class SoftmaxOfPrefix(Softmax):
    """A sequence policy: what it does at t depends on all of the row up to t."""

    def forward(self, obs: Tensor) -> Categorical:
        return super().forward(obs.cumsum(1))


class Gaussian(nn.Module):
    """A diagonal Gaussian over two dimensions, with a standard deviation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Linear(3, 2), nn.Parameter(0.3 * torch.randn(2))

    def forward(self, obs: Tensor) -> Independent:
        mean = self.mean(obs)
        return Independent(Normal(mean, self.log_std.exp().expand_as(mean), validate_args=False), 1)


class Critic(nn.Module):
    """A linear value."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


# Rows that are ragged, off the policy, and full of garbage behind the mask


def off_policy(policy: nn.Module, sample: Callable[..., Rollout], rows: int = 7, **columns: Any) -> Rollout:
    """Ragged rows in groups of two and three, sampled by something near the policy, with importance weights."""
    rollout = sample(policy, rows=rows, **columns)
    group = torch.arange(rows) // 2
    group[-1] = group[-2]
    noise, importance = torch.randn(rows, 5), 0.5 + torch.rand(rows, 5)
    return replace(rollout, logp=rollout.logp + 0.3 * noise, group=group, importance=importance)


class Spoiled(Categorical):
    """A categorical of which nothing can be believed where `hidden`."""

    def __init__(self, logits: Tensor, hidden: Tensor, garbage: float) -> None:
        super().__init__(logits=logits, validate_args=False)
        self.spoiled = torch.zeros(hidden.shape).where(~hidden, garbage)

    def log_prob(self, action: Tensor) -> Tensor:
        return super().log_prob(action) + self.spoiled

    def entropy(self) -> Tensor:
        return super().entropy() + self.spoiled


@register_kl(Spoiled, Spoiled)
def _(p: Spoiled, q: Spoiled) -> Tensor:
    return kl_divergence(Categorical(logits=p.logits), Categorical(logits=q.logits)) + p.spoiled


class SpoiledPolicy(SoftmaxOfPrefix):
    """Observations of 9 are padding: there, whatever the distribution says is garbage."""

    garbage = 0.0

    def forward(self, obs: Tensor) -> Spoiled:
        hidden = obs[..., 0] == 9
        return Spoiled(super().forward(obs.where(~hidden.unsqueeze(-1), 0.0)).logits, hidden, self.garbage)


def spoiled(rollout: Rollout, garbage: float) -> Rollout:
    def fill(x: Tensor) -> Tensor:
        return x.where(rollout.mask, garbage)

    return replace(
        rollout,
        obs=rollout.obs.where(rollout.mask.unsqueeze(-1), 9.0),
        logp=fill(rollout.logp),
        reward=fill(rollout.reward),
        importance=fill(rollout.importance),
        action=rollout.action.where(rollout.mask, 3),
    )


@pytest.fixture(params=[Softmax, Gaussian])
def policy(request: pytest.FixtureRequest, float64: None) -> nn.Module:
    return request.param()


@pytest.fixture
def softmax(float64: None) -> nn.Module:
    return Softmax()


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def prefix_policy(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == torch.float64:
        request.getfixturevalue("float64")
    return SoftmaxOfPrefix()


@pytest.fixture
def softmax_of_prefix(float64: None) -> nn.Module:
    return SoftmaxOfPrefix()


@pytest.fixture
def critic(float64: None) -> nn.Module:
    return Critic()


@pytest.fixture
def sample() -> Callable[..., Rollout]:
    """(policy, rows, steps, **columns) -> a rollout of that policy on random observations, some of them masked."""

    def sample(policy: nn.Module, rows: int = 6, steps: int = 5, **columns: object) -> Rollout:
        obs = torch.randn(rows, steps, 3)
        mask = (torch.rand(rows, steps) < 0.7).index_fill(1, torch.tensor(0), True)
        with torch.no_grad():
            action = policy(obs).sample()
            logp = policy(obs).log_prob(action)
        nowhere = torch.zeros(rows, steps, dtype=torch.bool)
        made = {"obs": obs, "action": action, "logp": logp, "reward": torch.randn(rows, steps), "mask": mask}
        made |= {"terminated": nowhere, "ended": nowhere, "group": torch.arange(rows) // 2}
        made |= {"greedy": torch.arange(rows) / rows}
        return Rollout(**(made | columns))

    return sample
