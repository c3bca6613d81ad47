"""What happened, the credit that is joined to it, and how it is cut into minibatches."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.advantages import gae, leave_one_out, standardize
from policygrad.divergences import k3
from policygrad.objectives import clipped_squared_error, clipped_surrogate, penalised_surrogate
from policygrad.rollout import Batch, Rollout, decisions, micro_batches, minibatches
from policygrad.score import score, sequence_ratio, token_ratio
from policygrad.weights import average, normalized, per_episode, per_row, per_token

pytestmark = pytest.mark.usefixtures("float64")
Sample = Callable[..., Rollout]
GARBAGE = [torch.nan, torch.inf, -torch.inf, 1e30]


def credited(rollout: Rollout, weights: Callable[[Tensor], Tensor] = per_token) -> Batch:
    """The rollout with some advantages, targets and values."""
    columns = torch.randn(3, *rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    return decisions(rollout, weights(rollout.mask), *columns)


def gain(policy: nn.Module, batch: Batch) -> Tensor:
    return average(score(policy(batch.obs).log_prob(batch.action), batch.advantage), batch.weight)


def gradient(policy: nn.Module, *batches: Batch) -> Tensor:
    """The sum of the batches' gradients of E[log pi A]."""
    policy.zero_grad()
    for batch in batches:
        gain(policy, batch).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def rows(batch: Batch, index: Tensor | slice) -> Batch:
    return Batch(*(x[index] for x in batch))


# Behind the mask


@pytest.mark.parametrize("garbage", GARBAGE)
def test_reward_and_logp_are_0_behind_the_mask(garbage: float, policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy)
    spoilt = replace(
        rollout,
        reward=rollout.reward.where(rollout.mask, garbage),
        logp=rollout.logp.where(rollout.mask, garbage),
    )
    for name in ("reward", "logp"):
        assert torch.equal(getattr(spoilt, name), getattr(rollout, name))
        assert getattr(spoilt, name)[~rollout.mask].eq(0).all()


@pytest.mark.parametrize("memoryless", [True, False])
def test_every_column_of_credit_is_0_behind_the_mask(memoryless: bool, policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy, memoryless=memoryless)
    batch = decisions(rollout, *torch.full((4, *rollout.mask.shape), torch.nan).where(rollout.mask, torch.inf))
    for column in (batch.logp, batch.weight, batch.advantage, batch.target, batch.value):
        assert column[~batch.mask].eq(0).all()
    assert batch.advantage[batch.mask].isnan().all()


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("memoryless", [True, False])
def test_garbage_behind_the_mask_changes_no_value_and_no_gradient(
    garbage: float, memoryless: bool, policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    """From the rollout to the gradient of everything that is maximised at once."""
    rollout = sample(policy, memoryless=memoryless)
    old, credit = rollout.logp + 0.3 * torch.randn(6, 5), torch.randn(3, 6, 5)
    never = torch.zeros_like(rollout.mask)

    def learn(garbage: float) -> list[Tensor]:
        def fill(x: Tensor) -> Tensor:
            return x.where(rollout.mask, garbage)

        spoilt = replace(rollout, reward=fill(rollout.reward), logp=fill(old))
        delta = gae(spoilt.reward, torch.zeros(6, 6), never, never, 0.9, 0.5)
        advantage = standardize(fill(credit[0] + delta), rollout.mask)
        batch = decisions(spoilt, per_row(rollout.mask), fill(advantage), fill(credit[1]), fill(credit[2]))
        logp = policy(batch.obs).log_prob(batch.action)
        logp = logp.where(batch.mask, logp + garbage)
        gain = clipped_surrogate(token_ratio(logp, batch.logp, batch.mask), batch.advantage, 0.2, 0.2)
        gain = gain + clipped_surrogate(sequence_ratio(logp, batch.logp, batch.mask), batch.advantage, 0.2, 0.2)
        gain = penalised_surrogate(gain, k3(batch.logp, logp.where(batch.mask, 0.0)), 0.1)
        gain = gain + score(logp, batch.advantage)
        error = clipped_squared_error(critic(batch.obs), batch.target, batch.value, 0.2)
        objective = average(gain - error, batch.weight)
        parameters = [*policy.parameters(), *critic.parameters()]
        return [objective, *torch.autograd.grad(objective, parameters)]

    for clean, dirty in zip(learn(0.0), learn(garbage), strict=True):
        assert torch.equal(clean, dirty)


# Joining


def test_steps_of_a_memoryless_rollout_become_rows_in_their_order(policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy, memoryless=True)
    advantage = torch.randn(6, 5)
    batch = decisions(rollout, per_token(rollout.mask), advantage)
    for b in range(6):
        for t in range(5):
            n = 5 * b + t
            assert torch.equal(batch.obs[n, 0], rollout.obs[b, t])
            assert torch.equal(batch.action[n, 0], rollout.action[b, t])
            assert batch.mask[n, 0] == rollout.mask[b, t]
            assert batch.logp[n, 0] == rollout.logp[b, t]
            assert batch.advantage[n, 0] == (advantage[b, t] if rollout.mask[b, t] else 0)
    assert batch.mask.shape == batch.target.shape == (30, 1)


def test_rows_of_a_sequence_model_stay_whole(softmax_of_prefix: nn.Module, sample: Sample) -> None:
    rollout = sample(softmax_of_prefix, memoryless=False)
    for part in minibatches(credited(rollout), 2):
        logp = softmax_of_prefix(part.obs).log_prob(part.action)
        assert_close(token_ratio(logp, part.logp, part.mask), torch.ones(2, 5))
    torn = credited(replace(rollout, memoryless=True))
    logp = softmax_of_prefix(torn.obs).log_prob(torn.action)
    assert (token_ratio(logp, torn.logp, torn.mask) - 1).abs().max() > 0.01  # why `memoryless` exists


def test_without_a_critic_target_and_value_are_0(policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy)
    batch = decisions(rollout, per_token(rollout.mask), torch.randn(6, 5))
    assert batch.target.eq(0).all()
    assert batch.value.eq(0).all()


def test_observations_may_be_any_tree_and_arrays_any_stride(policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy, memoryless=True)
    strided = rollout.obs.transpose(0, 1).contiguous().transpose(0, 1)
    tree = replace(rollout, obs={"eye": strided, "ear": (rollout.obs[..., 0],)}, mask=rollout.mask.t().clone().t())
    batch = credited(tree)
    assert torch.equal(batch.obs["eye"], credited(rollout).obs)
    part = next(minibatches(batch, 4))
    assert part.obs["eye"].shape == (4, 1, 3)
    assert torch.equal(part.obs["ear"][0], part.obs["eye"][..., 0])


def test_a_rollout_moves_as_a_whole(policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy, final_obs={"eye": torch.randn(6, 3)}, metrics={"return": 1.0}, memoryless=True)
    assert rollout.to("meta").importance is None
    rollout = replace(rollout, importance=torch.rand(6, 5))
    moved = rollout.to("meta")
    columns = (moved.obs, moved.action, moved.logp, moved.reward, moved.terminated, moved.ended, moved.mask)
    assert {x.device.type for x in (*columns, moved.importance, moved.group, moved.final_obs["eye"])} == {"meta"}
    assert moved.memoryless
    assert moved.metrics == {"return": 1.0}


# Importance: how much more often the policy would have done it than what sampled


@pytest.mark.parametrize("memoryless", [True, False])
def test_importance_multiplies_the_weights_and_nothing_else(
    memoryless: bool, policy: nn.Module, sample: Sample
) -> None:
    rollout, importance = sample(policy, memoryless=memoryless), 2 * torch.rand(6, 5)
    plain, weighed = credited(rollout), credited(replace(rollout, importance=importance))
    shape = (30, 1) if memoryless else (6, 5)
    assert_close(weighed.weight, plain.weight * importance.view(shape))
    for name in Batch._fields:
        if name != "weight":
            assert torch.equal(getattr(weighed, name), getattr(plain, name)), name
    ones = credited(replace(rollout, importance=torch.ones(6, 5)))
    assert torch.equal(ones.weight, plain.weight)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_importance_is_0_behind_the_mask(garbage: float, policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy)
    spoilt = replace(rollout, importance=torch.ones(6, 5).where(rollout.mask, garbage))
    assert spoilt.importance[~rollout.mask].eq(0).all()
    assert torch.equal(credited(spoilt).weight, credited(rollout).weight)


# Minibatches


@pytest.mark.parametrize("memoryless", [True, False])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 7, 30, 1000])
def test_an_epoch_visits_each_row_once_in_minibatches_of_one_shape(
    size: int, memoryless: bool, policy: nn.Module, sample: Sample
) -> None:
    batch = credited(sample(policy, memoryless=memoryless, mask=torch.ones(6, 5, dtype=torch.bool)))
    batch = batch._replace(target=batch.logp.clone())  # every row with numbers of its own
    count, steps = batch.mask.shape
    parts = list(minibatches(batch, size, epochs=3))
    each = -(-count // size)
    assert len(parts) == 3 * each
    for epoch in range(3):
        epoch_parts = parts[epoch * each : (epoch + 1) * each]
        assert {part.mask.shape for part in epoch_parts} == {(min(size, count), steps)}
        seen = torch.cat([part.target[part.mask[:, 0]] for part in epoch_parts])
        assert sorted(map(tuple, seen.tolist())) == sorted(map(tuple, batch.target.tolist()))
        for part in epoch_parts:
            assert part.weight[~part.mask].eq(0).all()
            assert part.weight[part.mask].gt(0).all()


@pytest.mark.parametrize("weights", [per_token, per_row, per_episode])
@pytest.mark.parametrize("memoryless", [True, False])
@pytest.mark.parametrize("size", [1, 4, 5, 6, 50])
def test_the_mean_over_an_epochs_minibatches_is_the_whole_batch(
    size: int, memoryless: bool, weights: Callable[[Tensor], Tensor], policy: nn.Module, sample: Sample
) -> None:
    batch = credited(sample(policy, memoryless=memoryless), weights)
    parts = list(minibatches(batch, size))
    assert_close(sum(gain(policy, part) for part in parts) / len(parts), gain(policy, batch))
    assert_close(gradient(policy, *parts) / len(parts), gradient(policy, batch), atol=1e-12, rtol=0)


def test_epochs_differ_in_order_and_a_seed_fixes_them(policy: nn.Module, sample: Sample) -> None:
    batch = credited(sample(policy, memoryless=True))
    torch.manual_seed(3)
    first, second = minibatches(batch, 30, epochs=2)
    torch.manual_seed(3)
    again = next(minibatches(batch, 30))
    assert torch.equal(first.obs, again.obs)
    assert not torch.equal(first.obs, second.obs)
    assert not torch.equal(first.obs, batch.obs)


def test_observation_action_and_credit_of_a_row_stay_together(policy: nn.Module, sample: Sample) -> None:
    batch = credited(sample(policy, memoryless=True))
    row = {tuple(obs.flatten().tolist()): n for n, obs in enumerate(batch.obs)}
    for part in minibatches(batch, 7):
        for k in range(7):
            n = row[tuple(part.obs[k].flatten().tolist())]
            for x, whole in zip(part[1:3], batch[1:3], strict=True):
                assert torch.equal(x[k], whole[n])
            for x, whole in zip(part[5:], batch[5:], strict=True):
                assert torch.equal(x[k], whole[n])


# Micro-batches


@pytest.mark.parametrize("weights", [per_token, per_row, per_episode])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 100])
def test_micro_batches_are_the_rows_in_order_with_their_shares(
    size: int, weights: Callable[[Tensor], Tensor], policy: nn.Module, sample: Sample
) -> None:
    batch = credited(replace(sample(policy), importance=torch.rand(6, 5)), weights)
    parts = list(micro_batches(batch, size))
    assert [len(part.mask) for _, part in parts] == [len(x) for x in torch.arange(6).split(size)]
    for name in Batch._fields:
        if name != "weight":
            assert torch.equal(torch.cat([getattr(part, name) for _, part in parts]), getattr(batch, name)), name
    assert_close(torch.cat([share * part.weight for share, part in parts]), batch.weight)
    assert sum(share for share, _ in parts) == pytest.approx(1, abs=1e-14)
    for _, part in parts:
        assert_close(part.weight.sum(), batch.weight.sum())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_mean_that_divides_by_the_weights_is_that_of_the_whole(size: int, policy: nn.Module, sample: Sample) -> None:
    """As an entropy is averaged: parts of unequal weight would else count alike."""
    batch = credited(sample(policy))

    def mean(part: Batch) -> Tensor:
        return average(part.target, normalized(part.weight))

    parts = list(micro_batches(batch, size))
    assert_close(sum(share * mean(part) for share, part in parts), mean(batch))
    assert (sum(mean(part) for _, part in parts) / len(parts) - mean(batch)).abs() > 1e-3


@pytest.mark.parametrize("empty", [slice(0, 2), slice(2, 6), slice(0, 6)])
def test_a_micro_batch_in_which_nothing_counts_is_left_out(empty: slice, policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy)
    mask = rollout.mask.clone()
    mask[empty] = False
    batch = credited(replace(rollout, mask=mask))
    parts = list(micro_batches(batch, 2))
    kept = [k for k in (0, 2, 4) if mask[k : k + 2].any()] or [0]  # never none: an objective has to be computed
    assert sum(share for share, _ in parts) == pytest.approx(1)
    assert_close(torch.cat([part.obs for _, part in parts]), torch.cat([batch.obs[k : k + 2] for k in kept]))
    weight = torch.cat([batch.weight[k : k + 2] for k in kept])
    assert_close(torch.cat([share * part.weight for share, part in parts]), weight)
    assert_close(weight.sum(), batch.weight.sum())


# Splits and orders


@pytest.mark.parametrize("weights", [per_token, per_row, per_episode])
@pytest.mark.parametrize("split", [[6], [3, 3], [1, 5], [2, 1, 3], [1] * 6])
def test_any_split_into_micro_batches_adds_up_to_the_same_gradient(
    split: list[int], weights: Callable[[Tensor], Tensor], policy: nn.Module, sample: Sample
) -> None:
    batch = credited(sample(policy), weights)
    parts = [rows(batch, index) for index in torch.randperm(6).split(split)]
    assert_close(gradient(policy, *parts), gradient(policy, batch), atol=1e-12, rtol=0)


@pytest.mark.parametrize("weights", [per_token, per_row, per_episode])
def test_the_gradient_does_not_depend_on_the_order_of_rows_or_the_groups_labels(
    weights: Callable[[Tensor], Tensor], policy: nn.Module, sample: Sample
) -> None:
    rollout, order = sample(policy), torch.randperm(6)

    def learn(rollout: Rollout) -> Tensor:
        total = rollout.reward.sum(1)
        advantage = (total - leave_one_out(total, rollout.group)).unsqueeze(1).expand_as(rollout.reward)
        advantage = standardize(advantage, rollout.mask)
        return gradient(policy, decisions(rollout, weights(rollout.mask), advantage))

    columns = ("obs", "action", "logp", "reward", "terminated", "ended", "mask", "group")
    shuffled = replace(rollout, **{name: getattr(rollout, name)[order] for name in columns})
    relabelled = replace(rollout, group=torch.tensor([12, -1, 5])[rollout.group])
    assert_close(learn(shuffled), learn(rollout), atol=1e-12, rtol=0)
    assert_close(learn(relabelled), learn(rollout), atol=1e-12, rtol=0)


def test_one_step_at_a_time_is_the_same_gradient_where_nothing_is_remembered(policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy, memoryless=True)
    whole = credited(replace(rollout, memoryless=False), per_row)
    assert_close(gradient(policy, credited(rollout, per_row)), gradient(policy, whole), atol=1e-12, rtol=0)
