"""What every test starts from: one thread, one seed, and small policies whose every number can be computed by hand."""

from collections.abc import Callable, Iterator

import pytest
import torch
from segments import Segments
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from policygrad.rollout import Rollout

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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


@pytest.fixture(params=[Softmax, Gaussian])
def policy(request: pytest.FixtureRequest, float64: None) -> nn.Module:
    return request.param()


@pytest.fixture
def softmax(float64: None) -> nn.Module:
    return Softmax()


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
        return Rollout(**(made | columns))

    return sample
