"""What the options of an algorithm do to it, by their own definition."""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Critic, SoftmaxOfPrefix
from policygrad.runs import learners
from policygrad.runs.training import Run
from torch import Tensor, nn

from policygrad import train
from policygrad.advantages import standardize, unnormalized
from policygrad.algorithms.ppo import ppo
from policygrad.divergences import AdaptiveCoefficient
from policygrad.errors import UserError
from policygrad.rollout import Rollout


def run(algorithm: str, **options: Any) -> Run:
    small: dict[str, Any] = {"hidden": (8,), "num_envs": 4, "num_steps": 16, "steps": 200, "learning_rate": 0.01}
    if algorithm == "ppo":
        small |= {"minibatch_size": 16, "epochs": 4}
    return train(algorithm, "probes:Known-v0", **(small | options))


def column(run: Run, name: str) -> list[float]:
    return [row[name] for row in run.metrics]


def parameters(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for m in (run.policy, run.critic) for p in m.parameters()])


def test_the_penalty_doubles_while_kl_is_above_its_target() -> None:
    beta = column(run("ppo", kl_coefficient=0.1, kl_coefficient_target=1e-9), "kl_coefficient")
    assert beta == pytest.approx([0.1 * 2**k for k in range(len(beta))])


def test_the_penalty_halves_while_kl_is_below_its_target() -> None:
    beta = column(run("ppo", kl_coefficient=0.1, kl_coefficient_target=1e9), "kl_coefficient")
    assert beta == pytest.approx([0.1 / 2**k for k in range(len(beta))])


def test_the_penalty_follows_the_kl_of_the_whole_update() -> None:
    """With one minibatch the KL measured in the step is 0, whatever the step does (Schulman et al. 2017, section 4)."""
    one = {"epochs": 1, "minibatch_size": 64}
    rows = run("ppo", **one, kl_coefficient=0.1, kl_coefficient_target=1e-9).metrics
    assert all(row["kl"] > 1e-6 and row["effective_sample_size"] < 1 for row in rows)
    assert [row["kl_coefficient"] for row in rows] == pytest.approx([0.1 * 2**k for k in range(len(rows))])


def test_ppos_kl_is_that_of_the_policy_it_leaves(sample: Callable[..., Rollout]) -> None:
    policy, critic = SoftmaxOfPrefix(), Critic()
    fixed = sample(policy, rows=7)
    optimizer = torch.optim.Adam([*policy.parameters(), *critic.parameters()], lr=0.05)
    metrics = next(ppo(policy, critic, lambda _: fixed, optimizer, epochs=3, minibatch_size=2))
    new = policy(fixed.obs).log_prob(fixed.action)
    ratio = (new - fixed.logp)[fixed.mask].exp()
    torch.testing.assert_close(metrics["kl"], (ratio - 1 - ratio.log()).mean().detach(), rtol=1e-4, atol=1e-7)


def test_the_penalty_stays_without_a_target() -> None:
    assert set(column(run("ppo", kl_coefficient=0.5), "kl_coefficient")) == {0.5}


def test_a_strong_penalty_keeps_the_policy_near() -> None:
    free, held = (run("ppo", clip=math.inf, kl_coefficient=beta) for beta in (1e-9, 100.0))
    assert max(column(held, "kl")) < 0.2 * max(column(free, "kl"))


def test_a_target_kl_ends_the_epochs_early() -> None:
    full = column(run("ppo"), "updates")
    assert set(full) == {4 * 4}
    assert set(column(run("ppo", target_kl=1e-9), "updates")) <= {2, 3, 4}, "the first minibatch is at the old policy"


def test_clipping_nothing_is_a_very_wide_clip() -> None:
    assert torch.equal(parameters(run("ppo", clip=math.inf)), parameters(run("ppo", clip=1e9)))


def test_bounds_of_infinity_are_bounds_that_are_never_reached() -> None:
    plain = parameters(run("ppo"))
    for option in ("value_clip", "dual_clip_bound", "max_grad_norm"):
        infinite, wide = parameters(run("ppo", **{option: math.inf})), parameters(run("ppo", **{option: 1e9}))
        assert torch.equal(infinite, wide), option
        assert torch.equal(infinite, plain) == (option != "max_grad_norm"), option


def test_each_advantage_normalization_is_its_own() -> None:
    results = [parameters(run("ppo", advantage_normalization=x)) for x in ("minibatch", "batch", "none")]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(results[i], results[j])


def test_over_one_minibatch_that_is_the_batch_both_normalizations_agree() -> None:
    one = {"minibatch_size": 64, "epochs": 1, "steps": 1}
    a, b = (parameters(run("ppo", advantage_normalization=x, **one)) for x in ("minibatch", "batch"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_normalized_advantages_do_not_care_for_the_scale_of_the_objective() -> None:
    for algorithm, off in (("trpo", {"normalize_advantages": False}), ("npg", {"normalize_advantages": False})):
        a, b = run(algorithm, steps=1), run(algorithm, steps=1, **off)
        assert not torch.equal(parameters(a), parameters(b))
        assert column(a, "improvement")[0] < column(b, "improvement")[0], "these rewards spread by more than 1"


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce", "actor_critic", "off_policy_actor_critic"])
def test_the_linear_schedule_ends_at_0(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of each iteration is what is left of the steps when it begins."""
    rates, built = [], learners.build

    def watched(*arguments: Any) -> learners.Learner:
        learner = built(*arguments)

        def iterations() -> Iterator[Any]:
            for metrics in learner.iterations:
                rates.append([group["lr"] for optimizer in learner.optimizers for group in optimizer.param_groups])
                yield metrics

        return learners.Learner(iterations(), learner.optimizers, learner.others)

    monkeypatch.setattr(learners, "build", watched)
    done = run(algorithm, learning_rate_schedule="linear", steps=300)
    left = [1.0] + [1 - steps / 300 for steps in column(done, "steps")[:-1]]
    first = rates[0]
    assert len(rates) > 3
    for rate, share in zip(rates, left, strict=True):
        assert rate == pytest.approx([x * share for x in first])
    rates.clear()
    run(algorithm, steps=300)
    assert all(rate == first for rate in rates)


def test_the_gradient_is_scaled_down_to_its_bound() -> None:
    a, b = run("actor_critic", max_grad_norm=1e-4, steps=1), run("actor_critic", max_grad_norm=1e9, steps=1)
    assert column(a, "gradient_norm") == column(b, "gradient_norm"), "it is reported as it was"
    assert not torch.equal(parameters(a), parameters(b))


def test_an_entropy_bonus_keeps_the_policy_random() -> None:
    for algorithm in ("ppo", "actor_critic", "off_policy_actor_critic", "reinforce"):
        plain, bonus = (run(algorithm, entropy_coefficient=c) for c in (0.0, 10.0))
        assert column(bonus, "entropy")[-1] > column(plain, "entropy")[-1]


def test_reinforce_with_the_factor_gamma_to_the_t_is_the_same_only_if_gamma_is_1() -> None:
    for gamma in (1.0, 0.5):
        a, b = (run("reinforce", gamma=gamma, discounted=x, baseline="none") for x in (False, True))
        assert torch.equal(parameters(a), parameters(b)) == (gamma == 1.0)


def test_a_trajectory_return_is_not_discounted_twice() -> None:
    with pytest.raises(UserError, match="discounted"):
        run("reinforce", discounted=True, returns="trajectory_return")


def test_n_step_with_n_beyond_the_row_is_monte_carlo() -> None:
    a = run("actor_critic", advantage="n_step", n=99)
    b = run("actor_critic", advantage="monte_carlo")
    c = run("actor_critic", advantage="gae", lam=1.0)
    torch.testing.assert_close(parameters(a), parameters(b), rtol=1e-4, atol=1e-5)
    assert torch.equal(parameters(b), parameters(c))


def test_n_step_of_1_is_gae_with_lambda_0() -> None:
    a, b = run("actor_critic", advantage="n_step", n=1), run("actor_critic", advantage="gae", lam=0.0)
    torch.testing.assert_close(parameters(a), parameters(b), rtol=1e-4, atol=1e-5)


def test_the_step_rules_of_the_natural_gradient_meet_where_their_steps_are_equal() -> None:
    radius = run("npg", steps=1)
    alpha = column(radius, "step_size")[0]
    plain = run("npg", steps=1, step_rule="learning_rate", natural_learning_rate=alpha)
    torch.testing.assert_close(parameters(radius), parameters(plain), rtol=1e-5, atol=1e-6)
    assert column(radius, "kl")[0] == pytest.approx(0.01, rel=0.5), "KL is delta to second order, less the damping"
    assert set(column(run("npg", step_rule="learning_rate", natural_learning_rate=0.125), "step_size")) == {0.125}


def test_off_policy_credit_with_one_epoch_is_on_policy() -> None:
    """The ratio is 1 then, and V-trace with bounds of 1 is the lambda-return."""
    a = run("off_policy_actor_critic", epochs=1, steps=1)
    b = run("actor_critic", lam=1.0, steps=1)
    torch.testing.assert_close(column(a, "value_loss"), column(b, "value_loss"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(column(a, "entropy"), column(b, "entropy"), rtol=1e-6, atol=1e-6)


# PPO in micro-batches: whole rows of a sequence policy, ragged, off the policy


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def whole_rows(
    request: pytest.FixtureRequest, sample: Callable[..., Rollout]
) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """(**options of ppo) -> (change of the parameters at a learning rate of 0.1, metrics)."""
    if request.param == torch.float64:
        request.getfixturevalue("float64")
    start = nn.ModuleList([SoftmaxOfPrefix(), Critic()])
    rollout = sample(start[0], rows=7)
    rollout = replace(rollout, logp=rollout.logp + 0.3 * torch.randn(7, 5), importance=0.5 + torch.rand(7, 5))

    def learn(seen: list[int] | None = None, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(1)
        modules = deepcopy(start)
        for module in modules if seen is not None else ():
            module.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        options = {"gamma": 0.9, "epochs": 1, "minibatch_size": 7, "entropy_coefficient": 0.1} | options
        optimizer = torch.optim.SGD(modules.parameters(), lr=0.1)
        metrics = next(ppo(*modules, lambda _: rollout, optimizer, **options))
        change = [p.detach() - q.detach() for p, q in zip(modules.parameters(), start.parameters(), strict=True)]
        return torch.cat([x.flatten() for x in change]), metrics

    return learn


WholeRows = Callable[..., tuple[Tensor, dict[str, Any]]]


@pytest.mark.parametrize("normalize", [standardize, unnormalized])
@pytest.mark.parametrize("minibatch_size", [7, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 100])
def test_ppo_in_micro_batches_is_ppo(
    rows: int, minibatch_size: int, normalize: Callable[[Tensor, Tensor], Tensor], whole_rows: WholeRows
) -> None:
    """Advantages are normalised over the minibatch, however it is computed."""
    options: dict[str, Any] = {
        "minibatch_size": minibatch_size,
        "normalize_minibatch": normalize,
        "value_clip": 0.2,
        "penalty": AdaptiveCoefficient(0.5),
    }
    whole, metrics = whole_rows(**options)
    split, split_metrics = whole_rows(**options, micro_batch=rows)
    tolerance = 1e-12 if whole.dtype == torch.float64 else 3e-6
    assert whole.norm() > 1e-2
    assert (split - whole).norm() <= tolerance * whole.norm()
    assert list(split_metrics) == list(metrics)
    for name in metrics.keys() - {"effective_sample_size"}:  # a ratio of two means
        torch.testing.assert_close(split_metrics[name], metrics[name], rtol=tolerance, atol=tolerance, msg=name)


def test_ppo_computes_no_more_rows_at_a_time_than_a_micro_batch(whole_rows: WholeRows) -> None:
    seen: list[int] = []
    whole_rows(seen=seen, minibatch_size=5, micro_batch=3)
    # The critic on the rollout, without gradient; then policy and critic on 5 rows, and on 2 with 3 to fill up.
    # And the policy on the rollout again: how far it went.
    assert seen == [*[3, 3, 1], *[3, 3, 2, 2], *[3, 3], *[3, 3, 1]]


def test_what_a_micro_batch_must_not_do_would_be_seen(whole_rows: WholeRows) -> None:
    """Minibatches of so many rows are another thing, and so is no normalisation."""
    whole = whole_rows()[0]
    for other in ({"minibatch_size": 2}, {"normalize_minibatch": unnormalized}):
        assert (whole_rows(**other)[0] - whole).norm() > 1e-3 * whole.norm()


def test_a_target_kl_is_looked_at_once_a_minibatch_however_it_is_split(whole_rows: WholeRows) -> None:
    counts = {
        rows: whole_rows(minibatch_size=3, epochs=4, target_kl=1e-9, micro_batch=rows)[1]["updates"]
        for rows in (None, 1)
    }
    assert counts == {None: 1, 1: 1}, "the first minibatch is off the policy"
    assert whole_rows(minibatch_size=3, epochs=4, micro_batch=1)[1]["updates"] == 12
