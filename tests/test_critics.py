"""Values that bootstrap, critics that learn, baselines that need a network."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.critics import (
    bootstrap_values,
    both,
    fit_critic,
    fitted,
    no_fit,
    optimal_baseline,
    optimal_token_baseline,
    value_baseline,
)
from policygrad.errors import UserError
from policygrad.linalg import flat_gradient
from policygrad.rollout import Batch, Rollout, decisions
from policygrad.weights import per_episode, per_token

pytestmark = pytest.mark.usefixtures("float64")
Sample = Callable[..., Rollout]


def test_bootstrap_values_are_of_every_step_and_of_where_the_row_stops(
    policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    rollout = sample(policy, final_obs=torch.randn(6, 3))
    value = bootstrap_values(critic, rollout)
    assert value.shape == (6, 6)
    assert not value.requires_grad
    for b in range(6):
        for t in range(5):
            assert_close(value[b, t], critic(rollout.obs[b, t]).detach())
        assert_close(value[b, 5], critic(rollout.final_obs[b]).detach())


@pytest.mark.parametrize("micro_batch", [1, 4, 6, 100])
def test_how_many_rows_a_critic_computes_at_a_time_changes_no_value(
    micro_batch: int, policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    rollout, seen = sample(policy, final_obs=torch.randn(6, 3)), []
    whole = bootstrap_values(critic, rollout)
    critic.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    assert_close(bootstrap_values(critic, rollout, micro_batch), whole)
    assert seen == 2 * [len(x) for x in torch.arange(6).split(micro_batch)], "of the steps, and of where rows stop"


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_a_critic_is_fitted_alike_in_micro_batches(
    micro_batch: int, policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    batch, fitted = fitting(policy, critic, sample, True), []
    for rows in (None, micro_batch):
        learner = deepcopy(critic)
        torch.manual_seed(3)
        optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
        metrics = fit_critic(learner, optimizer, epochs=2, minibatch_size=8, micro_batch=rows)(batch)
        fitted.append((nn.utils.parameters_to_vector(learner.parameters()).detach(), metrics))
    assert_close(fitted[1], fitted[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("read", [bootstrap_values, lambda critic, r: value_baseline(r, r.reward, critic=critic)])
def test_a_critic_of_another_shape_is_refused(read: Callable, policy: nn.Module, sample: Sample) -> None:
    """[B, T, 1] against [B, T] would be broadcast: wrong, and silent."""
    with pytest.raises(UserError, match=r"\(6, 5, 1\) for \(6, 5\) steps.*squeeze"):
        read(nn.Linear(3, 1), sample(policy, final_obs=torch.randn(6, 3)))


def test_where_every_row_terminates_the_last_value_is_0(policy: nn.Module, critic: nn.Module, sample: Sample) -> None:
    value = bootstrap_values(critic, sample(policy, final_obs=None))
    assert value[:, -1].eq(0).all()
    assert value[:, :-1].ne(0).all()


def test_bootstrap_values_of_a_tree_of_observations(policy: nn.Module, sample: Sample) -> None:
    class Ear(nn.Module):
        def forward(self, obs: dict[str, torch.Tensor]) -> torch.Tensor:
            return 2 * obs["ear"]

    ear, last = torch.randn(6, 5), torch.randn(6)
    value = bootstrap_values(Ear(), sample(policy, obs={"ear": ear}, final_obs={"ear": last}))
    assert_close(value, 2 * torch.cat([ear, last[:, None]], 1))


def fitting(policy: nn.Module, critic: nn.Module, sample: Sample, memoryless: bool) -> Batch:
    """Targets that a linear critic can meet, and garbage behind the mask."""
    rollout = sample(policy, memoryless=memoryless)
    target = rollout.obs @ torch.tensor([1.0, -2.0, 0.5]) + 3
    with torch.no_grad():
        value = critic(rollout.obs)
    target = target.where(rollout.mask, torch.nan)
    return decisions(rollout, per_episode(rollout.mask), torch.zeros(6, 5), target, value)


@pytest.mark.parametrize("memoryless", [True, False])
def test_a_critic_is_fitted_to_its_targets(
    memoryless: bool, policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    batch = fitting(policy, critic, sample, memoryless)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)
    first = fit_critic(critic, optimizer, epochs=1, minibatch_size=8)(batch)
    for _ in range(4):
        last = fit_critic(critic, optimizer, epochs=50, minibatch_size=8)(batch)
    assert last["value_loss"] < 1e-4 * first["value_loss"]
    assert_close(critic.net.weight.detach(), torch.tensor([[1.0, -2.0, 0.5]]), atol=0.05, rtol=0)
    assert set(last) == {"value_loss", "critic_gradient_norm", "explained_variance"}


def test_what_is_reported_is_the_mean_squared_error_and_what_was_explained_before(
    policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    batch = fitting(policy, critic, sample, True)
    error = (batch.value - batch.target)[batch.mask]
    spread = (batch.target - batch.target[batch.mask].mean())[batch.mask]
    loss = (critic(batch.obs) - batch.target)[batch.mask].square().mean()
    norm = flat_gradient(loss, list(critic.parameters())).norm()
    metrics = fit_critic(critic, torch.optim.SGD(critic.parameters(), lr=0.1), epochs=1, minibatch_size=1000)(batch)
    assert_close(metrics["value_loss"], error.square().mean())  # whatever the weights add up to
    assert_close(metrics["explained_variance"], 1 - error.var(correction=0) / spread.square().mean())
    assert_close(metrics["critic_gradient_norm"], norm)


def test_the_critics_gradient_is_clipped_and_epochs_and_minibatches_count(
    policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    batch = fitting(policy, critic, sample, True)  # 30 steps
    start = nn.utils.parameters_to_vector(critic.parameters()).detach().clone()
    optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
    metrics = fit_critic(critic, optimizer, epochs=1, minibatch_size=30, max_grad_norm=1e-3)(batch)
    moved = nn.utils.parameters_to_vector(critic.parameters()).detach() - start
    assert metrics["critic_gradient_norm"] > 0.1
    assert_close(moved.norm(), torch.tensor(1e-3), rtol=1e-4, atol=0)
    adam = torch.optim.Adam(critic.parameters())
    fit_critic(critic, adam, epochs=3, minibatch_size=8)(batch)
    assert adam.state[critic.net.weight]["step"] == 3 * 4


def test_without_a_critic_nothing_is_fitted(policy: nn.Module, critic: nn.Module, sample: Sample) -> None:
    assert no_fit(fitting(policy, critic, sample, True)) == {}


def test_the_value_baseline_is_the_critic_and_does_not_look_at_the_returns(
    policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    rollout = sample(policy)
    baseline = value_baseline(rollout, torch.full((6, 5), torch.nan), critic=critic)
    assert_close(baseline, critic(rollout.obs).detach())
    assert not baseline.requires_grad


def test_the_optimal_baseline_is_one_number_a_row_that_does_not_look_at_the_row(
    policy: nn.Module, sample: Sample
) -> None:
    rollout, returns = sample(policy), torch.randn(6, 5)
    baseline = optimal_baseline(rollout, returns, policy=policy)
    assert baseline.shape == (6, 5)
    assert baseline.eq(baseline[:, :1]).all()
    changed = returns.clone()
    changed[2] += 5
    after = optimal_baseline(rollout, changed, policy=policy)
    assert_close(after[2], baseline[2])
    assert (after - baseline)[[0, 1, 3, 4, 5]].abs().min() > 1e-3


def test_of_returns_that_are_equal_the_optimal_baseline_is_that_return(policy: nn.Module, sample: Sample) -> None:
    rollout = sample(policy)
    returns = torch.full((6, 5), 3.0).where(rollout.mask, torch.nan)
    assert torch.equal(optimal_baseline(rollout, returns, policy=policy), torch.full((6, 5), 3.0))


def test_of_whole_trajectory_returns_it_is_their_mean_weighted_by_the_squared_score(
    policy: nn.Module, sample: Sample
) -> None:
    rollout, total = sample(policy), torch.randn(6, 1)
    squares = []
    for b in range(6):
        logp = policy(rollout.obs[b : b + 1]).log_prob(rollout.action[b : b + 1])
        z = flat_gradient(logp.where(rollout.mask[b : b + 1], 0.0).sum(), list(policy.parameters()))
        squares.append(z @ z)
    baseline = optimal_baseline(rollout, total.expand(6, 5), policy=policy)
    for i in range(6):
        others = [j for j in range(6) if j != i]
        mean = sum(squares[j] * total[j, 0] for j in others) / sum(squares[j] for j in others)
        assert_close(baseline[i, 0], mean)


def test_a_critic_is_taught_nothing_by_steps_that_do_not_count(
    policy: nn.Module, critic: nn.Module, sample: Sample
) -> None:
    rollout = sample(policy)
    target = torch.randn(6, 5)
    starts = {name: p.detach().clone() for name, p in critic.named_parameters()}
    fitted = []
    for garbage in (0.0, torch.inf):
        critic.load_state_dict(starts)
        torch.manual_seed(5)
        spoiled = target.where(rollout.mask, garbage)
        batch = decisions(rollout, per_token(rollout.mask), spoiled, spoiled, spoiled)
        fit_critic(critic, torch.optim.SGD(critic.parameters(), lr=0.01), epochs=2, minibatch_size=4)(batch)
        fitted.append(nn.utils.parameters_to_vector(critic.parameters()).detach().clone())
    assert torch.equal(*fitted)


# Units


class Scaled(nn.Module):
    """As control's critic: a linear value in units of its own."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.net, self.scale = nn.Linear(3, 1), torch.tensor(scale)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, obs: Tensor) -> Tensor:
        return self.scale * self.net(obs).squeeze(-1)


@pytest.mark.parametrize("c", [2.0**-30, 2.0**30])
def test_a_critic_with_a_scale_is_fitted_alike_in_any_unit(c: float, policy: nn.Module, sample: Sample) -> None:
    batch, found = fitting(policy, Scaled(1.0), sample, True), []
    for factor in (1.0, c):
        critic = Scaled(factor)
        torch.manual_seed(3)
        target = batch._replace(target=factor * batch.target)
        metrics = fit_critic(critic, torch.optim.Adam(critic.parameters(), lr=0.01), max_grad_norm=0.5)(target)
        found.append((critic.net.weight.detach().clone(), metrics["value_loss"], critic(batch.obs).detach() / factor))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_fit_that_moves_the_policy_is_refused(policy: nn.Module, critic: nn.Module, sample: Sample) -> None:
    batch = fitting(policy, critic, sample, True)
    optimizer = torch.optim.Adam(critic.parameters())
    fit = fit_critic(critic, optimizer)
    assert fitted(fit, batch, policy).keys() >= {"value_loss"}
    with pytest.raises(UserError, match="fitting the critic would move the policy") as raised:
        fitted(fit, batch, nn.Sequential(nn.Linear(2, 2), critic.net))
    assert len(str(raised.value)) <= 200
    with pytest.raises(UserError, match="fitting the critic would move the policy"):
        fitted(lambda batch: fit(batch), batch, critic)


def test_the_optimal_token_baseline_is_the_groups_mean_weighted_by_the_score_so_far(
    softmax: nn.Module, sample: Sample
) -> None:
    """Token by token; nothing where no other row of the group has one."""
    rollout = sample(softmax)
    mask = torch.arange(rollout.mask.shape[1]) < torch.tensor([2, 5, 4, 1, 3, 5])[: len(rollout.mask)].unsqueeze(1)
    rollout = replace(rollout, mask=mask, group=torch.arange(len(mask)) // 2)
    returns = torch.randn(mask.shape).where(mask, 0.0)
    probs = softmax(rollout.obs).probs.detach()
    found = optimal_token_baseline(rollout, returns, policy=softmax)

    def energy(j: int, t: int) -> float:
        chosen = torch.nn.functional.one_hot(rollout.action[j], probs.shape[-1])
        return float((chosen - probs[j]).square().sum(-1)[: t + 1].sum())

    for i in range(len(mask)):
        for t in range(mask.shape[1]):
            rows = [j for j in range(len(mask)) if j // 2 == i // 2 and mask[j, t]]
            wanted = 0.0
            if mask[i, t] and len(rows) > 1:
                total = sum(energy(j, t) for j in rows)
                wanted = sum(energy(j, t) * float(returns[j, t]) for j in rows) / total
            assert found[i, t].item() == pytest.approx(wanted, abs=1e-12), (i, t)
    assert_close(optimal_token_baseline(rollout, returns, policy=softmax, micro_batch=2), found)


def test_the_token_baseline_of_a_density_is_refused(sample: Sample) -> None:
    class Gaussian(nn.Module):
        def forward(self, obs: Tensor) -> torch.distributions.Distribution:
            return torch.distributions.Normal(obs[..., 0], 1.0)

    rollout = sample(Gaussian())
    with pytest.raises(UserError, match="needs the probabilities of all actions"):
        optimal_token_baseline(rollout, rollout.reward, policy=Gaussian())


def test_of_equal_returns_nothing_is_left_to_the_bit(softmax: nn.Module, sample: Sample) -> None:
    """A rounding would be as large as any other advantage once they are standardized."""
    rollout = sample(softmax)
    rollout = replace(rollout, group=torch.arange(len(rollout.group)) // 3)
    returns = torch.tensor([0.1, -0.3])[rollout.group].unsqueeze(1).expand_as(rollout.reward)
    baseline = optimal_token_baseline(rollout, returns, policy=softmax)
    shared = rollout.mask & (baseline != 0)
    assert shared.any()
    assert torch.equal(baseline[shared], returns[shared])


def test_without_another_row_the_optimal_baseline_is_0_and_not_the_rows_own_return(
    policy: nn.Module, sample: Sample
) -> None:
    rollout = sample(policy).rows(slice(0, 1))
    assert optimal_baseline(rollout, torch.full_like(rollout.reward, 3.0), policy=policy).eq(0).all()


# Layers that policy and critic share


def test_policy_and_critic_are_asked_one_by_one_unless_the_critic_knows_how_to_share(
    policy: nn.Module, critic: nn.Module
) -> None:
    obs = torch.randn(2, 5, 3)
    distribution, value = both(policy, critic, obs)
    action = distribution.sample()
    assert torch.equal(distribution.log_prob(action), policy(obs).log_prob(action))
    assert torch.equal(value, critic(obs))
    assert both(policy, None, obs)[1] is None
    asked = []

    def with_policy(*given: object) -> tuple[str, Tensor]:
        asked.append(given)
        return "distribution", value

    critic.with_policy = with_policy  # type: ignore[assignment]
    assert both(policy, critic, obs) == ("distribution", value)
    assert asked == [(policy, obs)]
