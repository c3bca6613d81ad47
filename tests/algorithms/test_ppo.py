"""PPO as it runs: its objective and gradients against the definition, token by token; its loop, split or whole."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Critic, Gaussian, Softmax, SoftmaxOfPrefix, off_policy
from oracles import gradient
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.testing import assert_close

from policygrad.advantages import gae, standardize, unnormalized
from policygrad.algorithms.ppo import PPOObjective, ppo
from policygrad.credit import Credit, bootstrapped
from policygrad.diagnostics import after_update
from policygrad.divergences import AdaptiveCoefficient
from policygrad.rollout import Batch, Rollout, decisions, minibatches
from policygrad.updates import Metrics, Objective, ascend
from policygrad.weights import per_episode, per_row, per_token

Sample = Callable[..., Rollout]
Learn = Callable[..., tuple[Tensor, dict[str, Any]]]
close = partial(assert_close, rtol=1e-10, atol=1e-12)


class Both(nn.Module):
    """Policy and critic, whose gradients belong together."""

    def __init__(self, policy: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.policy, self.critic = policy, critic


# The objective, written out


def log_pi(policy: nn.Module, obs: Tensor, action: Tensor) -> Tensor:
    """log pi(a|s) of one step, from the policy's own layers."""
    if isinstance(policy, Softmax):
        logits = policy.net(obs)
        return logits[int(action)] - sum(x.exp() for x in logits).log()
    mean, log_std = policy.mean(obs), policy.log_std
    each = [
        -((action[i] - mean[i]) ** 2) / (2 * (2 * log_std[i]).exp()) - log_std[i] - math.log(2 * math.pi) / 2
        for i in range(len(mean))
    ]
    return sum(each)


def entropy(policy: nn.Module, obs: Tensor) -> Tensor:
    """-sum_a pi log pi; of a Gaussian, sum_i log std_i + log(2 pi e) / 2."""
    if isinstance(policy, Softmax):
        logp = [log_pi(policy, obs, torch.tensor(a)) for a in range(4)]
        return -sum(x.exp() * x for x in logp)
    return sum(x + math.log(2 * math.pi * math.e) / 2 for x in policy.log_std)


def written_out(both: Both, batch: Batch, weight: list[list[float]], **o: Any) -> tuple[Tensor, dict[str, Any]]:
    """sum_w [min(r A, clip(r) A), at least c A if A < 0] - beta (r - 1 - log r) + c_H H - c_V (V - target)^2."""
    low, high = o["clip"]
    total: dict[str, Any] = {"gain": 0.0, "kl": 0.0, "entropy": 0.0, "value_loss": 0.0}
    met = dict.fromkeys(("low", "high", "dual", "value"), 0.0)
    for i, ws in enumerate(weight):
        for t, w in enumerate(ws):
            if not batch.mask[i, t]:
                continue
            a = batch.advantage[i, t].item()
            r = (log_pi(both.policy, batch.obs[i, t], batch.action[i, t]) - batch.logp[i, t]).exp()
            clipped = min(max(r, torch.tensor(1 - low)), torch.tensor(1 + high))
            gain = min(r * a, clipped * a)
            met["low"] += w * (r < 1 - low and a < 0)
            met["high"] += w * (r > 1 + high and a > 0)
            if a < 0 and gain < o["dual_clip"] * a:
                gain, met["dual"] = torch.tensor(o["dual_clip"] * a), met["dual"] + w
            value, target, old = both.critic.net(batch.obs[i, t])[0], batch.target[i, t], batch.value[i, t].item()
            near = min(max(value, torch.tensor(old - o["value_clip"])), torch.tensor(old + o["value_clip"]))
            met["value"] += w * ((near - target) ** 2 > (value - target) ** 2)
            total["gain"] += w * gain
            total["kl"] += w * (r - 1 - r.log())
            total["entropy"] += w * entropy(both.policy, batch.obs[i, t])
            total["value_loss"] += w * max((value - target) ** 2, (near - target) ** 2)
    objective = total["gain"] - o["beta"] * total["kl"]
    whole = objective + o["entropy_coefficient"] * total["entropy"] - o["value_coefficient"] * total["value_loss"]
    return whole, {**total, "objective": objective, "met": met}


ALL = {
    "clip": (0.15, 0.3),
    "value_clip": 0.3,
    "dual_clip": 2.0,
    "beta": 0.7,
    "entropy_coefficient": 0.2,
    "value_coefficient": 0.6,
}
NONE = {"clip": (math.inf, math.inf), "value_clip": math.inf, "dual_clip": math.inf, "beta": 0.0}
NONE |= {"entropy_coefficient": 0.0, "value_coefficient": 0.5}
# Everything together, nothing, and each alone.
SETTINGS = {
    "all": ALL,
    "none": NONE,
    "clip": NONE | {"clip": (0.15, 0.3)},
    "dual clip": NONE | {"dual_clip": 2.0},
    "value clip": NONE | {"value_clip": 0.3},
    "penalty": NONE | {"beta": 0.7},
    "entropy": NONE | {"entropy_coefficient": 0.2},
}


def objective_of(both: Both, **o: Any) -> PPOObjective:
    rest = {name: x for name, x in o.items() if name != "beta"}
    penalty = AdaptiveCoefficient(o["beta"]) if o["beta"] else None
    return PPOObjective(both.policy, both.critic, penalty=penalty, **rest)


def credited(policy: nn.Module, sample: Sample, memoryless: bool = True) -> Rollout:
    """Seven rows of five steps, some of them masked, of a policy some way off."""
    rollout = off_policy(policy, sample, memoryless=memoryless)
    return replace(rollout, logp=rollout.logp + 0.6 * torch.randn(7, 5), importance=None)


def credit(rollout: Rollout) -> Credit:
    advantage, target, value = torch.randn(3, 7, 5)
    return Credit(advantage, 3 * target, value)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("make", [Softmax, Gaussian])
@pytest.mark.parametrize("size", [10, 20, 35])
def test_on_every_minibatch_objective_and_gradients_are_the_definition(
    size: int, make: type[nn.Module], name: str, float64: None, sample: Sample
) -> None:
    """Of 35 steps, some masked; minibatches of 10 and of 20 are filled up with 5 that count twice and so not at all."""
    both, settings = Both(make(), Critic()), SETTINGS[name]
    rollout = credited(both.policy, sample)
    objective = objective_of(both, **settings)
    batch = decisions(rollout, per_token(rollout.mask), *credit(rollout))
    parts, met = list(minibatches(batch, size, epochs=2)), dict.fromkeys(("low", "high", "dual", "value"), 0.0)
    count = -(-35 // size)
    assert len(parts) == 2 * count
    assert sum(int(part.mask.sum()) for part in parts) == 2 * int(rollout.mask.sum())
    for part in parts:
        # A mean over the rollout's decisions, in as many parts: whatever the batch says its weights are.
        weight = [[count / int(rollout.mask.sum())] for _ in range(size)]
        defined, told = written_out(both, part, weight, **settings)
        found, metrics = objective(part)
        close(found, defined)
        slope = gradient(defined, both)
        assert slope.norm() > 1e-2
        close(gradient(found, both), slope)
        for metric in ("objective", "entropy", "value_loss"):
            close(metrics[metric], told[metric].detach())
        share = count * int(part.mask.sum()) / int(rollout.mask.sum())
        close(metrics["kl_old"], told["kl"].detach() / share)
        if math.isfinite(settings["clip"][0]):
            close(float(metrics["clip_fraction_low"]), float(told["met"]["low"]) / share)
            close(float(metrics["clip_fraction_high"]), float(told["met"]["high"]) / share)
        met = {key: x + float(told["met"][key]) for key, x in met.items()}
    bounds = {"all": met, "clip": ("low", "high"), "dual clip": ("dual",), "value clip": ("value",)}
    assert all(met[key] > 0 for key in bounds.get(name, ())), "a bound that is not met is not tested"


@pytest.mark.parametrize("weights", [per_token, per_row, per_episode])
@pytest.mark.parametrize("name", ["all", "none"])
def test_of_whole_rows_with_any_weights_and_importance_it_is_the_definition(
    name: str, weights: Callable[[Tensor], Tensor], float64: None, sample: Sample
) -> None:
    both, settings = Both(Softmax(), Critic()), SETTINGS[name]
    rollout = replace(credited(both.policy, sample, memoryless=False), importance=0.5 + torch.rand(7, 5))
    batch = decisions(rollout, weights(rollout.mask), *credit(rollout))
    counts = rollout.mask.sum(1).tolist()
    of_row = {per_token: [1 / sum(counts)] * 7, per_row: [1 / n / 7 for n in counts], per_episode: [1 / 7] * 7}[weights]
    weight = [[w * rollout.importance[i, t].item() for t in range(5)] for i, w in enumerate(of_row)]
    defined, _ = written_out(both, batch, weight, **settings)
    found, _ = objective_of(both, **settings)(batch)
    close(found, defined)
    close(gradient(found, both), gradient(defined, both))


def test_without_a_critic_only_the_value_loss_is_missing(softmax: nn.Module, sample: Sample) -> None:
    both = Both(softmax, Critic())
    rollout = credited(softmax, sample)
    batch = decisions(rollout, per_token(rollout.mask), *credit(rollout))
    (whole, metrics), (without, fewer) = (PPOObjective(softmax, c)(batch) for c in (both.critic, None))
    close(without, whole + 0.5 * metrics["value_loss"])
    close(gradient(without, softmax), gradient(whole, softmax))
    assert metrics.keys() - fewer.keys() == {"value_loss"}


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30])
def test_what_stands_behind_the_mask_changes_no_bit(garbage: float, softmax: nn.Module, sample: Sample) -> None:
    both = Both(softmax, Critic())
    rollout = credited(softmax, sample)
    mask, columns = rollout.mask, credit(rollout)

    def learned(garbage: float) -> tuple[Tensor, ...]:
        filled = replace(rollout, logp=rollout.logp.where(mask, garbage), reward=rollout.reward.where(mask, garbage))
        batch = decisions(filled, per_token(mask), *(x.where(mask, garbage) for x in columns))
        value, metrics = objective_of(both, **ALL)(batch)
        return value, gradient(value, both), *metrics.values()

    for clean, dirty in zip(learned(0.0), learned(garbage), strict=True):
        assert torch.equal(clean, dirty)


class Narrow(nn.Module):
    """A Gaussian of a hundred dimensions and little spread."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(3, 100)

    def forward(self, obs: Tensor) -> Independent:
        return Independent(Normal(self.mean(obs), 0.05, validate_args=False), 1)


def test_the_penalty_has_a_gradient_where_the_density_behind_the_mask_is_huge() -> None:
    """log pi is near 158: its exponential is no float."""
    policy, mask = Narrow(), torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1]]).bool()
    obs = torch.zeros(2, 4, 3)
    with torch.no_grad():
        action = policy(obs).mean
        logp = policy(obs).log_prob(action)
    assert logp.exp().isinf().all()
    zero = torch.zeros(2, 4)
    batch = Batch(obs, action, logp.where(mask, 0.0), mask, per_token(mask), zero, zero, zero)
    value, _ = PPOObjective(policy, None, penalty=AdaptiveCoefficient(1.0))(batch)
    assert gradient(value, policy).isfinite().all()


# The loop


def test_kl_old_is_that_of_the_policy_it_leaves(float64: None, sample: Sample) -> None:
    policy, critic = SoftmaxOfPrefix(), Critic()
    fixed = sample(policy, rows=7)
    update = ascend(torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=0.05))
    assign = bootstrapped(critic, partial(gae, gamma=0.99, lam=0.95))
    objective = PPOObjective(policy, critic)
    metrics = next(ppo(lambda _: fixed, assign, objective, update, epochs=3, minibatch_size=2))
    new = policy(fixed.obs).log_prob(fixed.action)
    ratio = (new - fixed.logp)[fixed.mask].exp()
    assert metrics["kl_old"] > 1e-3
    assert_close(metrics["kl_old"], (ratio - 1 - ratio.log()).mean().detach())


def test_the_credit_is_assigned_once_an_iteration_and_the_minibatches_share_it(
    softmax: nn.Module, sample: Sample
) -> None:
    rollout, seen, calls = credited(softmax, sample), [], []

    def assign(rollout: Rollout) -> Credit:
        calls.append(1)
        return credit(rollout)

    def update(objective: Objective, batch: Batch) -> Metrics:
        seen.append(batch)
        return {"kl_old": torch.zeros(())}

    run = ppo(lambda _: rollout, assign, PPOObjective(softmax, None), update, epochs=2, minibatch_size=10)
    first = next(run)
    assert calls == [1]
    assert first["updates"] == len(seen) == 2 * 4
    assert {part.mask.shape for part in seen} == {(10, 1)}
    for part in seen:  # standardized by itself, over what counts
        advantage = part.advantage[part.mask]
        close(advantage.mean(), torch.zeros(()))
        close(advantage.std(), torch.ones(()), rtol=1e-7)
    next(run)
    assert calls == [1, 1]


def test_the_metrics_are_means_over_the_last_epoch(softmax: nn.Module, sample: Sample) -> None:
    rollout, calls = credited(softmax, sample), []

    def update(objective: Objective, batch: Batch) -> Metrics:
        calls.append(1)
        return {"number": torch.tensor(float(len(calls)))}

    options = {"epochs": 3, "minibatch_size": 10, "diagnose": lambda objective, batch: {}}
    metrics = next(ppo(lambda _: rollout, credit, PPOObjective(softmax, None), update, **options))
    assert metrics["updates"] == 12
    assert metrics["number"] == (9 + 10 + 11 + 12) / 4


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5), (math.inf, 1.0)])
def test_the_penalty_moves_with_the_kl_of_the_whole_update(
    target: float, factor: float, softmax: nn.Module, sample: Sample
) -> None:
    """With one minibatch the KL measured in the step is 0, whatever the step does (Schulman et al. 2017, section 4)."""
    penalty = AdaptiveCoefficient(0.1, target)
    update = ascend(torch.optim.SGD(softmax.parameters(), lr=0.1))
    objective = PPOObjective(softmax, None, penalty=penalty)
    run = ppo(sample, credit_of_any, objective, update, epochs=1, minibatch_size=None)
    rows = [next(run) for _ in range(4)]
    assert all(row["kl_old"] > 1e-6 for row in rows)
    assert [float(row["kl_old_coefficient"]) for row in rows] == pytest.approx([0.1 * factor**k for k in range(4)])
    assert penalty.value.item() == pytest.approx(0.1 * factor**4)


def credit_of_any(rollout: Rollout) -> Credit:
    return Credit(*torch.randn(3, *rollout.mask.shape))


@pytest.fixture
def whole_rows(prefix_policy: nn.Module, sample: Sample) -> Learn:
    """(**options) -> (change of the parameters at a learning rate of 0.1, metrics)."""
    start = Both(prefix_policy, Critic())
    rollout = off_policy(prefix_policy, sample)

    def learn(seen: list[int] | None = None, micro_batch: int | None = None, **options: Any) -> tuple[Tensor, dict]:
        torch.manual_seed(1)
        both = deepcopy(start)
        for module in (both.policy, both.critic) if seen is not None else ():
            module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        of_objective = {name: options.pop(name) for name in ("penalty", "value_clip") if name in options}
        objective = PPOObjective(both.policy, both.critic, entropy_coefficient=0.1, **of_objective)
        update = ascend(torch.optim.SGD(both.parameters(), lr=0.1), micro_batch=micro_batch)
        assign = bootstrapped(both.critic, partial(gae, gamma=0.9, lam=0.95), micro_batch=micro_batch)
        if micro_batch:
            options["diagnose"] = partial(after_update, micro_batch=micro_batch)
        metrics = next(
            ppo(lambda _: rollout, assign, objective, update, **{"epochs": 1, "minibatch_size": 7} | options)
        )
        change = [p.detach() - q.detach() for p, q in zip(both.parameters(), start.parameters(), strict=True)]
        return torch.cat([x.flatten() for x in change]), metrics

    return learn


@pytest.mark.parametrize("normalize", [standardize, unnormalized])
@pytest.mark.parametrize("minibatch_size", [7, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_ppo_in_micro_batches_is_ppo(
    rows: int, minibatch_size: int, normalize: Callable[[Tensor, Tensor], Tensor], whole_rows: Learn
) -> None:
    """Advantages are standardized over the minibatch, however it is computed."""
    options: dict[str, Any] = {
        "minibatch_size": minibatch_size,
        "normalize": normalize,
        "value_clip": 0.2,
        "penalty": AdaptiveCoefficient(0.5),
    }
    whole, metrics = whole_rows(**options)
    split, split_metrics = whole_rows(**options, micro_batch=rows)
    tolerance = 4 * 35 * torch.finfo(whole.dtype).eps  # a rounding for each term, of a few sums
    assert whole.norm() > 1e-2
    assert (split - whole).norm() <= tolerance * whole.norm()
    assert list(split_metrics) == list(metrics)
    for name in metrics.keys() - {"effective_sample_size"}:  # a ratio of two means
        assert_close(split_metrics[name], metrics[name], rtol=tolerance, atol=tolerance, msg=name)


def test_ppo_computes_no_more_rows_at_a_time_than_a_micro_batch(whole_rows: Learn) -> None:
    seen: list[int] = []
    whole_rows(seen=seen, minibatch_size=5, micro_batch=3)
    # The critic on the rollout, without gradient; then policy and critic on 5 rows, and on 2 with 3 to fill up.
    # And the policy on the rollout again: how far it went.
    assert seen == [*[3, 3, 1], *[3, 3, 2, 2], *[3, 3], *[3, 3, 1]]


def test_what_a_micro_batch_must_not_do_would_be_seen(whole_rows: Learn) -> None:
    """Minibatches of so many rows are another thing, and so is no standardization."""
    whole = whole_rows()[0]
    for other in ({"minibatch_size": 2}, {"normalize": unnormalized}):
        assert (whole_rows(**other)[0] - whole).norm() > 1e-3 * whole.norm()


def test_a_target_kl_is_looked_at_once_a_minibatch_however_it_is_split(whole_rows: Learn) -> None:
    counts = {
        rows: whole_rows(minibatch_size=3, epochs=4, target_kl=1e-9, micro_batch=rows)[1]["updates"]
        for rows in (None, 1)
    }
    assert counts == {None: 1, 1: 1}, "the first minibatch is off the policy"
    assert whole_rows(minibatch_size=3, epochs=4, micro_batch=1)[1]["updates"] == 12
