"""The noise scale against its definition: estimates whose means over every possible sample are exact."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import policygrad as pg
from policygrad.noise import NoiseMeter, _metrics, gradient_noise, noise_of_moments
from policygrad.rollout import Batch
from policygrad.updates import Metrics

pytestmark = pytest.mark.usefixtures("float64")
NOISES = list(torch.tensor([[2.0, -1.0], [-2.0, 1.0], [0.0, 3.0], [0.0, -3.0]], dtype=torch.float64))
G = torch.tensor([1.0, -0.5], dtype=torch.float64)
VARIANCE = sum(float(e @ e) for e in NOISES) / len(NOISES)  # tr(Sigma)


class Linear(nn.Module):
    """The mean of x . theta: the gradient of a row is x."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(2, 1, bias=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        return (batch.weight * self.policy(batch.obs).squeeze(-1)).sum() / batch.weight.sum(), {}


def batch(gradients: list[Tensor], weight: Tensor | None = None) -> Batch:
    obs = torch.stack(gradients).unsqueeze(1)
    mask = torch.ones(len(obs), 1, dtype=torch.bool)
    weight = mask / len(obs) if weight is None else weight
    zero = torch.zeros(len(obs), 1)
    return Batch(obs, zero, zero, mask, weight, zero, zero, zero)


@pytest.mark.parametrize(("rows", "parts"), [(4, 16), (5, 2)], ids=["one row a part", "three rows and two"])
def test_over_every_sample_the_estimates_are_those_of_the_definition(
    rows: int, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The means of both estimates over all 4^rows batches, also with parts of unequal weight."""
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr(
        "policygrad.noise._metrics", lambda signal, noise, size: seen.append((signal, noise * size)) or {}
    )
    objective = Linear()
    for noises in itertools.product(NOISES, repeat=rows):
        gradient_noise(objective, batch([G + e for e in noises]), parts)
    signal, noise = torch.tensor(seen).mean(0)
    assert_close(signal, G @ G)
    assert_close(noise, torch.tensor(VARIANCE))


def test_of_one_batch() -> None:
    found = gradient_noise(Linear(), batch([G + e for e in NOISES]))
    # tr(Sigma) by n - 1; |g|^2 = |G|^2, since these noises add up to 0.
    variance = VARIANCE * 4 / 3
    signal = float(G @ G) - variance / 4
    assert signal < 0
    assert found == {"gradient_snr": 1e-6, "noise_scale": 4e6}
    near = gradient_noise(Linear(), batch([10 * G + e for e in NOISES]))
    assert near["noise_scale"].item() == pytest.approx(variance / (100 * float(G @ G) - variance / 4))
    assert near["gradient_snr"].item() == pytest.approx(4 / near["noise_scale"].item())


def test_what_has_no_weight_is_not_there() -> None:
    rows = [10 * G + e for e in NOISES]
    weight = torch.tensor([[0.25], [0.25], [0.25], [0.25], [0.0]])
    spare = batch([*rows, torch.full((2,), 1e6)], weight)
    spare = spare._replace(mask=weight > 0)
    expected = gradient_noise(Linear(), batch(rows))
    assert gradient_noise(Linear(), spare) == expected
    nothing = gradient_noise(Linear(), batch(rows[:1]))
    assert nothing == {"gradient_snr": 1e-6, "noise_scale": 1e6}, "the same columns in every row"


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_moments_over_every_history_give_the_same_two_numbers(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    monkeypatch.setattr("policygrad.noise._metrics", lambda signal, noise, size: seen.append((signal, noise)) or {})
    for noises in itertools.product(NOISES, repeat=3):
        policy = nn.Linear(2, 1, bias=False)
        optimizer = make(policy.parameters(), lr=0.1)
        for e in noises:
            policy.weight.grad = (G + e).unsqueeze(0)
            optimizer.step()
        noise_of_moments([optimizer], policy, 1.0)
    signal, noise = torch.tensor(seen).mean(0)
    assert_close(signal, G @ G)
    assert_close(noise, torch.tensor(VARIANCE))


def test_moments_are_of_the_policy_alone_and_of_adam() -> None:
    policy, critic = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizer = torch.optim.Adam([{"params": policy.parameters()}, {"params": critic.parameters()}])
    alone = torch.optim.Adam(deep := [nn.Parameter(p.detach().clone()) for p in policy.parameters()])
    torch.manual_seed(0)
    for k in range(5):
        for p, q in zip(policy.parameters(), deep, strict=True):
            p.grad = q.grad = 1 + 0.1 * torch.randn_like(p)
        for p in critic.parameters():
            p.grad = torch.full_like(p, 100.0 * (-1) ** k)
        optimizer.step(), alone.step()
    mirror = nn.ParameterList(deep)
    found, expected = noise_of_moments([optimizer], policy, 64.0), noise_of_moments([alone], mirror, 64.0)
    assert_close(found, expected)
    assert found["noise_scale"] * found["gradient_snr"] == pytest.approx(64)
    assert noise_of_moments([torch.optim.SGD(policy.parameters(), lr=1.0)], policy, 64.0) == {}
    fresh = noise_of_moments([torch.optim.Adam(policy.parameters())], policy, 64.0)
    assert fresh == {"gradient_snr": 1e-6, "noise_scale": 64e6}, "before the second step nothing is seen"


def test_what_is_not_seen_has_an_end() -> None:
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert _metrics(-one, one, 8) == {"gradient_snr": 1e-6, "noise_scale": 8e6}
    assert _metrics(one, zero, 8) == {"gradient_snr": 1e6, "noise_scale": 8e-6}
    assert _metrics(zero, zero, 8) == {"gradient_snr": 1e-6, "noise_scale": 8e6}
    assert _metrics(one, one, 8) == {"gradient_snr": 1, "noise_scale": 8}


def test_the_meter_measures_the_first_batch_before_its_step() -> None:
    objective, meter, values = Linear(), NoiseMeter(), []

    def update(objective: Any, batch: Batch) -> Metrics:
        values.append(meter.found.get("noise_scale"))
        return {"updated": torch.ones(())}

    measured, first = meter(update), batch([10 * G + e for e in NOISES])
    assert measured(objective, first) == {"updated": torch.ones(())}
    meter.begin()
    measured(objective, first)
    measured(objective, batch([G, G]))
    expected = gradient_noise(objective, first)["noise_scale"]
    assert [values[0], *values[1:]] == [None, expected, expected]
    assert all(p.grad is None for p in objective.parameters())


def test_training_reports_it_and_is_not_changed_by_it() -> None:
    values: dict[str, Any] = {"num_envs": 4, "num_steps": 32, "iterations": 3, "preset": "none", "progress": False}
    runs = {x: pg.train("ppo", "CartPole-v1", gradient_noise=x, **values) for x in ("moments", "exact", "off")}
    for name, run in runs.items():
        there = [row.get("gradient_snr") is not None for row in run.metrics]
        assert there == [name != "off"] * 3
        pairs = zip(run.policy.parameters(), runs["off"].policy.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    long = pg.train("ppo", "CartPole-v1", gradient_noise="exact", **(values | {"steps": 4096, "iterations": None}))
    assert all("gradient_snr" in row for row in long.metrics), "measured by steps, too"
    a2c = pg.train("actor_critic", "CartPole-v1", **(values | {"num_steps": 16}))
    for row in a2c.metrics[1:]:
        if "noise_scale" in row:
            decisions = row["steps"] - a2c.metrics[a2c.metrics.index(row) - 1]["steps"]
            assert row["noise_scale"] * row["gradient_snr"] == pytest.approx(decisions)


def test_the_same_moments_are_the_same_numbers_to_the_last_bit() -> None:
    """Wherever the parameters lie in memory: a run that is resumed has the metrics of one that was not."""
    found, kept = set(), []
    for _ in range(50):
        torch.manual_seed(3)
        policy = nn.Sequential(*(nn.Linear(5, 5) for _ in range(6)))
        optimizer = torch.optim.Adam(policy.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            policy(torch.randn(7, 5)).square().sum().backward()
            optimizer.step()
        found.add(float(noise_of_moments([optimizer], policy, 64.0)["noise_scale"]))
        kept.append((policy, optimizer))
    assert len(found) == 1
