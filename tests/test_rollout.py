"""What happened, the credit that is joined to it, and how it is cut into minibatches."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from policygrad.advantages import gae, leave_one_out, standardize
from policygrad.credit import bootstrapped
from policygrad.divergences import k3
from policygrad.objectives import clipped_squared_error, clipped_surrogate, penalized_surrogate
from policygrad.rollout import (
    Batch,
    Rollout,
    at_last_decision,
    decisions,
    holes_last,
    in_parts,
    micro_batches,
    minibatches,
)
from policygrad.score import score, sequence_ratio, token_ratio
from policygrad.weights import average, normalized, per_episode, per_row, per_token

pytestmark = pytest.mark.usefixtures("float64")
Sample = Callable[..., Rollout]
GARBAGE = [torch.nan, torch.inf, -torch.inf, 1e30]


def credited(rollout: Rollout, weights: Callable[[Tensor], Tensor] = per_token) -> Batch:
    """The rollout with some advantages, targets and values."""
    columns = torch.randn(5, *rollout.mask.shape, generator=torch.Generator().manual_seed(1))
    return decisions(rollout, weights(rollout.mask), *columns)


def gain(policy: nn.Module, batch: Batch) -> Tensor:
    logp = policy(batch.obs).log_prob(batch.action)
    return average(score(logp, torch.ones_like(logp), batch.advantage), batch.weight)


def gradient(policy: nn.Module, *batches: Batch) -> Tensor:
    """The sum of the batches' gradients of E[log pi A]."""
    policy.zero_grad()
    for batch in batches:
        gain(policy, batch).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def rows(batch: Batch, index: Tensor | slice) -> Batch:
    return tree_map(lambda x: x[index], batch)


# Behind the mask


@pytest.mark.parametrize("garbage", GARBAGE)
def test_reward_and_logp_are_0_behind_the_mask(garbage: float, policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy)
    spoiled = replace(
        rollout,
        reward=rollout.reward.where(rollout.mask, garbage),
        logp=rollout.logp.where(rollout.mask, garbage),
    )
    for name in ("reward", "logp"):
        assert torch.equal(getattr(spoiled, name), getattr(rollout, name))
        assert getattr(spoiled, name)[~rollout.mask].eq(0).all()


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
    """From the rollout to the gradient of everything that is maximized at once."""
    rollout = sample(policy, memoryless=memoryless)
    old, credit = rollout.logp + 0.3 * torch.randn(6, 5), torch.randn(3, 6, 5)
    never = torch.zeros_like(rollout.mask)

    def learn(garbage: float) -> list[Tensor]:
        def fill(x: Tensor) -> Tensor:
            return x.where(rollout.mask, garbage)

        spoiled = replace(rollout, reward=fill(rollout.reward), logp=fill(old))
        delta = gae(spoiled.reward, torch.zeros(6, 6), never, never, 0.9, 0.5)
        advantage = standardize(fill(credit[0] + delta), rollout.mask)
        batch = decisions(spoiled, per_row(rollout.mask), fill(advantage), fill(credit[1]), fill(credit[2]))
        logp = policy(batch.obs).log_prob(batch.action)
        logp = logp.where(batch.mask, logp + garbage)
        ratios = [ratio(logp, batch.logp, batch.mask) for ratio in (token_ratio, sequence_ratio)]
        gain = sum(clipped_surrogate(logp, ratio, batch.advantage, low=0.2, high=0.2) for ratio in ratios)
        gain = penalized_surrogate(gain, k3(batch.logp, logp.where(batch.mask, 0.0)), 0.1)
        gain = gain + score(logp, ratios[0], batch.advantage)
        error = clipped_squared_error(critic(batch.obs), batch.target, batch.value, 0.2)
        objective = average(gain - error, batch.weight)
        parameters = [*policy.parameters(), *critic.parameters()]
        return [objective, *torch.autograd.grad(objective, parameters)]

    for clean, dirty in zip(learn(0.0), learn(garbage), strict=True):
        assert torch.equal(clean, dirty)


# Some of its rows


def numbered(sample: Sample, policy: nn.Module, **columns: object) -> Rollout:
    """Six rows whose every column, trees of observations too, says which row it is."""
    row, steps = torch.arange(6.0), torch.rand(6, 5)
    columns = {
        "obs": {"eye": row.view(6, 1, 1).expand(6, 5, 2), "ear": (row.view(6, 1) + steps,)},
        "action": row.view(6, 1, 1).expand(6, 5, 3),
        "logp": -row.unsqueeze(1) - steps,
        "reward": row.unsqueeze(1) + steps,
        "terminated": (steps < 0.2),
        "ended": (steps < 0.4),
        "group": 10 * row.long(),
        "final_obs": {"eye": row.view(6, 1).expand(6, 2), "ear": (row,)},
        "importance": row.unsqueeze(1) + steps,
        "memoryless": True,
        "metrics": {"return": 2.0},
    } | columns
    return sample(policy, **columns)


def flat(rollout: Rollout) -> list[Tensor]:
    """Every array, in one order."""
    columns = (getattr(rollout, f.name) for f in fields(rollout) if f.name not in ("memoryless", "pieces", "metrics"))
    return [x for x in tree_leaves(tuple(columns)) if x is not None]


@pytest.mark.parametrize("index", [torch.tensor([4, 1, 1]), torch.tensor([], dtype=torch.long), slice(2, 5)])
def test_rows_are_those_the_index_names_in_every_column(
    index: Tensor | slice, softmax: nn.Module, sample: Sample
) -> None:
    rollout = numbered(sample, softmax)
    chosen = rollout.rows(index)
    assert chosen.group.tolist() == (10 * torch.arange(6)[index]).tolist()
    assert len(flat(chosen)) == 13
    for x, whole in zip(flat(chosen), flat(rollout), strict=True):
        assert torch.equal(x, whole[index])
    assert chosen.memoryless
    assert chosen.metrics == rollout.metrics


def test_rows_of_a_rollout_without_final_observations_or_importance_have_none(
    softmax: nn.Module, sample: Sample
) -> None:
    rollout = numbered(sample, softmax, final_obs=None, importance=None, memoryless=False)
    for part in (rollout.rows(slice(0, 2)), next(rollout.split(2)), Rollout.join([rollout, rollout])):
        assert part.final_obs is None
        assert part.importance is None
        assert not part.memoryless


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_a_rollout_split_and_joined_is_the_rollout(size: int, softmax: nn.Module, sample: Sample) -> None:
    rollout = numbered(sample, softmax)
    parts = list(rollout.split(size))
    assert [len(part.mask) for part in parts] == [len(x) for x in torch.arange(6).split(size)]
    whole = Rollout.join(parts)
    for x, y in zip(flat(whole), flat(rollout), strict=True):
        assert torch.equal(x, y)
    assert whole.memoryless
    assert whole.metrics == rollout.metrics


def test_joined_rows_come_one_after_the_other(softmax: nn.Module, sample: Sample) -> None:
    rollout = numbered(sample, softmax)
    joined = Rollout.join([rollout.rows(slice(4, 6)), rollout.rows(slice(0, 1))])
    assert joined.group.tolist() == [40, 50, 0]
    assert joined.obs["ear"][0][:, 0].long().tolist() == [4, 5, 0]


def test_a_shorter_rollout_joined_to_a_longer_one_keeps_its_decisions_and_its_values(
    softmax: nn.Module, sample: Sample
) -> None:
    """The returns, with a bootstrap from where each row stops, are those of the rollouts by themselves."""
    final, critic = torch.randn(6, 3), nn.Sequential(nn.Linear(3, 1), nn.Flatten(1))
    long, short = sample(softmax, steps=5, final_obs=final), sample(softmax, steps=3, final_obs=final)
    short = replace(short, importance=torch.rand(6, 3), metrics={"return": 1.0})
    long = replace(long, importance=torch.rand(6, 5))
    joined = Rollout.join([short, long])
    assert joined.mask.shape == (12, 5)
    assert not joined.mask[:6, 3:].any()
    assert joined.metrics == short.metrics
    assert torch.equal(joined.mask.sum(), short.mask.sum() + long.mask.sum())
    estimate = bootstrapped(critic, partial(gae, gamma=0.9, lam=0.8))
    for whole, parts in zip(estimate(joined), zip(estimate(short), estimate(long), strict=True), strict=True):
        assert_close(whole[joined.mask], torch.cat([x[y.mask] for x, y in zip(parts, (short, long), strict=True)]))


# Rewards of whole rows, and holes


def test_a_rows_reward_is_at_its_last_decision_and_lost_only_without_one() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    reward = torch.randn(6)
    expected = torch.zeros(6, 4)
    for b, row in enumerate(mask):
        for t in [t for t in range(4) if row[t]][-1:]:
            expected[b, t] = reward[b]
    found = at_last_decision(reward, mask)
    assert torch.equal(found, expected)
    assert torch.equal(found.sum(1), reward.where(mask.any(1), 0.0))


def test_the_steps_that_are_no_holes_keep_their_order_before_the_holes() -> None:
    """A step that no policy chose and over which an episode ended is none: nothing is carried over it."""
    mask, ended = torch.rand(50, 9) < 0.6, torch.rand(50, 9) < 0.3
    order = holes_last(mask, ended)
    for b in range(50):
        kept = [t for t in range(9) if mask[b, t] or ended[b, t]]
        assert order[b].tolist() == kept + [t for t in range(9) if t not in kept]


# Joining a rollout with its credit


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
        if name not in ("weight", "charge", "imitation", "everywhere"):
            assert torch.equal(getattr(weighed, name), getattr(plain, name)), name
    ones = credited(replace(rollout, importance=torch.ones(6, 5)))
    assert torch.equal(ones.weight, plain.weight)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_importance_is_0_behind_the_mask(garbage: float, policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy)
    spoiled = replace(rollout, importance=torch.ones(6, 5).where(rollout.mask, garbage))
    assert spoiled.importance[~rollout.mask].eq(0).all()
    assert torch.equal(credited(spoiled).weight, credited(rollout).weight)


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
            for x, whole in zip(part[5:10], batch[5:10], strict=True):
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
        if name not in ("weight", "everywhere"):
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
    relabeled = replace(rollout, group=torch.tensor([12, -1, 5])[rollout.group])
    assert_close(learn(shuffled), learn(rollout), atol=1e-12, rtol=0)
    assert_close(learn(relabeled), learn(rollout), atol=1e-12, rtol=0)


def test_one_step_at_a_time_is_the_same_gradient_where_nothing_is_remembered(policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy, memoryless=True)
    whole = credited(replace(rollout, memoryless=False), per_row)
    assert_close(gradient(policy, credited(rollout, per_row)), gradient(policy, whole), atol=1e-12, rtol=0)


def test_rollouts_that_know_where_their_rows_stop_do_not_join_others(softmax: nn.Module, sample: Sample) -> None:
    knows, knows_not = sample(softmax, final_obs=torch.randn(6, 3)), sample(softmax)
    for pair in ([knows, knows_not], [knows_not, knows]):
        with pytest.raises(ValueError, match="final_obs"):
            Rollout.join(pair)


@pytest.mark.parametrize("parts", [[[2, 0, 1]], [[2, 1], [0]], [[0], [1], [2]]])
def test_what_is_computed_in_parts_comes_back_in_the_order_of_the_rows(parts: list[list[int]]) -> None:
    obs, action = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    split = tuple(torch.tensor(part) for part in parts)
    found = in_parts(lambda x, y: x + y, lambda obs: (split, {}), obs, action)
    assert found.tolist() == [[11.0], [22.0], [33.0]]


def test_rows_are_cut_into_pieces_with_the_state_before_each(policy: nn.Module, sample: Sample) -> None:
    """obs may have columns [B, P, ...] besides those of steps: one entry for each piece."""
    rollout = sample(policy)
    rows, steps = rollout.mask.shape
    place = torch.arange(rows * steps).view(rows, steps)
    whole = replace(rollout, obs={"place": place, "state": 10 * torch.arange(rows).unsqueeze(1)}, memoryless=False)
    assert credited(whole).obs["place"].tolist() == place.tolist()
    cut = replace(whole, obs={"place": place, "state": torch.arange(rows * steps).view(rows, steps)}, pieces=steps)
    batch = credited(cut)
    assert batch.obs["place"].tolist() == batch.obs["state"].tolist() == [[i] for i in range(rows * steps)]
    columns = ("action", "logp", "reward", "terminated", "ended", "mask")
    short = {name: getattr(cut, name)[:2, :4] for name in columns} | {"group": cut.group[:2], "greedy": None}
    twice = replace(cut, obs={"place": place[:2, :4], "state": torch.tensor([[0, 2], [5, 7]])}, pieces=2, **short)
    batch = credited(twice)
    assert batch.obs["place"].tolist() == [[0, 1], [2, 3], [5, 6], [7, 8]]
    assert batch.obs["state"].tolist() == [[0], [2], [5], [7]]
    assert batch.logp.tolist() == twice.logp.reshape(4, 2).tolist()
