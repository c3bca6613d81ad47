"""GRPO's own update: its KL to a reference, splits, garbage behind the mask, the first ratio, options, any world."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
from conftest import SoftmaxOfPrefix
from oracles import TREE, VARIANTS, WORLD, expected, gradient, iteration, parameters, table, token_policy
from probes import ActionAndObservationMatter
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence, register_kl
from torch.optim import SGD, Adam
from torch.testing import assert_close

from policygrad.advantages import group_advantage
from policygrad.algorithms.grpo import grpo
from policygrad.algorithms.variants import cispo, dapo, gspo, rloo
from policygrad.control import Policy, Sampler, make_environments
from policygrad.divergences import (
    AdaptiveCoefficient,
    at_action,
    k1,
    k2,
    k3,
    over_actions,
    reweighted,
    straight_through,
    to_reference,
)
from policygrad.exact.closed_form import expected_return, kl_by_state, visitation
from policygrad.exact.sampler import CompletionSampler
from policygrad.exact.tokens import OnPrefixes, completions, prefix_state
from policygrad.objectives import clipped_weight
from policygrad.rollout import Rollout
from policygrad.samplers import OneGroup
from policygrad.score import sequence_ratio
from policygrad.weights import per_budget, per_episode, per_row, per_token

Sample = Callable[..., Rollout]
DIVERGENCES = {
    "k1": partial(at_action, estimate=k1),
    "k2": partial(at_action, estimate=k2),
    "k3": partial(at_action, estimate=k3),
    "straight_through": partial(at_action, estimate=straight_through),
    "reweighted": reweighted,
    "reweighted k3": partial(reweighted, estimate=k3),
    "over_actions": over_actions,
}
every_variant = pytest.mark.parametrize("name", VARIANTS)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
close = partial(assert_close, rtol=1e-10, atol=1e-12)


def anchored(divergence: str, reference: nn.Module, beta: float = 0.3) -> dict[str, Any]:
    anchor = partial(to_reference, reference=reference, divergence=DIVERGENCES[divergence])
    return {"anchor": anchor, "coefficient": AdaptiveCoefficient(beta)}


# KL to a reference, in the loss: with rewards of 0 it is all there is. Expected over single completions, summed by row.


@pytest.fixture
def language(float64: None) -> OnPrefixes:
    return token_policy(0)


def without_reward(sample: Callable[[nn.Module], Rollout]) -> Callable[[nn.Module], Rollout]:
    def rewardless(policy: nn.Module) -> Rollout:
        rollout = sample(policy)
        return replace(rollout, reward=torch.zeros_like(rollout.reward))

    return rewardless


def kl_gradient(policy: OnPrefixes, divergence: str, by: OnPrefixes) -> Tensor:
    options = anchored(divergence, token_policy(7), 0.3) | {"weights": per_episode}
    return expected(grpo, policy, 1, by=by, wrap=without_reward, **options) / -0.3


def still(policy: OnPrefixes, by: OnPrefixes, backwards: bool = False) -> Tensor:
    """sum_s eta(s) grad KL(pi, pi_ref)(s): over the prefixes that `by` comes to, which are held still."""
    visits, reference = visitation(TREE, table(by).detach(), 1.0), table(token_policy(7)).detach()
    each = kl_by_state(reference, table(policy)) if backwards else kl_by_state(table(policy), reference)
    return gradient(visits @ each, policy)


@pytest.mark.parametrize("divergence", ["k2", "straight_through", "reweighted", "over_actions"])
def test_on_the_policy_the_kl_in_the_loss_follows_the_kl_of_every_prefix(divergence: str, language: OnPrefixes) -> None:
    true = still(language, language)
    assert true.norm() > 1e-2
    close(kl_gradient(language, divergence, language), true)


@pytest.mark.parametrize("divergence", ["k3", "reweighted k3"])
def test_on_the_policy_k3_in_the_loss_follows_the_kl_the_other_way(divergence: str, language: OnPrefixes) -> None:
    close(kl_gradient(language, divergence, language), still(language, language, backwards=True))
    assert (still(language, language, backwards=True) - still(language, language)).norm() > 1e-2


def test_on_the_policy_k1_in_the_loss_does_nothing(language: OnPrefixes) -> None:
    close(kl_gradient(language, "k1", language), torch.zeros_like(parameters(language)))


@pytest.mark.parametrize("divergence", ["reweighted", "over_actions"])
def test_off_the_policy_too_the_right_forms_follow_the_kl_of_every_prefix_seen(
    divergence: str, language: OnPrefixes
) -> None:
    old = token_policy(3, near=language)
    true = still(language, old)
    assert (true - still(language, language)).norm() > 1e-2, "the prefixes are others"
    close(kl_gradient(language, divergence, old), true)


@pytest.mark.parametrize("divergence", ["k1", "k2", "k3", "straight_through", "reweighted k3"])
def test_off_the_policy_the_other_forms_do_not(divergence: str, language: OnPrefixes) -> None:
    old = token_policy(3, near=language)
    assert (kl_gradient(language, divergence, old) - still(language, old)).norm() > 1e-2


@pytest.mark.parametrize("weights", [per_row, per_token, per_episode, per_budget])
def test_kl_and_entropy_are_means_whatever_the_weights_add_up_to(
    weights: Callable[[Tensor], Tensor], language: OnPrefixes
) -> None:
    """Of rows for per_row, of decisions for the others."""
    rollout, reference, probs = completions(WORLD, table(language))[0], token_policy(7), table(language).detach()
    metrics = iteration(grpo, language, lambda _: rollout, weights=weights, **anchored("over_actions", reference))[1]
    exact = {"kl_reference": kl_by_state(probs, table(reference).detach()), "entropy": -(probs * probs.log()).sum(1)}
    for name, by_state in exact.items():
        each = by_state[prefix_state(WORLD, rollout.obs)]
        by_row = [row[counts] for row, counts in zip(each, rollout.mask, strict=True)]
        mean = sum(row.mean() for row in by_row) / len(by_row) if weights is per_row else torch.cat(by_row).mean()
        close(metrics[name], mean)


def test_the_anchor_sees_the_ratio_of_each_token_whatever_the_objectives_is(language: OnPrefixes) -> None:
    """A sequence's ratio would reweigh its tokens by what the others are."""
    rollout = without_reward(lambda _: completions(WORLD, table(token_policy(3, near=language)))[0])
    options = anchored("reweighted", token_policy(7))
    by_token, by_sequence = (iteration(variant, language, rollout, **options)[0] for variant in (grpo, gspo))
    assert by_token.norm() > 1e-2
    close(by_sequence, by_token)


# Splits


def off_policy(policy: nn.Module, sample: Sample, rows: int = 7, **columns: Any) -> Rollout:
    """Ragged rows in groups of two and three, sampled by something near the policy, with importance weights."""
    rollout = sample(policy, rows=rows, **columns)
    noise = torch.randn(rows, 5)
    group, importance = torch.arange(rows) // 2, 0.5 + torch.rand(rows, 5)
    group[-1] = group[-2]
    return replace(rollout, logp=rollout.logp + 0.3 * noise, group=group, importance=importance)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def prefix_policy(request: pytest.FixtureRequest) -> nn.Module:
    if request.param == torch.float64:
        request.getfixturevalue("float64")
    return SoftmaxOfPrefix()


def assert_split_changes_nothing(policy: nn.Module, learn: Callable[..., tuple[Tensor, dict[str, Any]]]) -> None:
    """learn(micro_batch=rows at a time) -> (change, metrics)."""
    precise = next(policy.parameters()).dtype == torch.float64
    tolerance = 1e-12 if precise else 1e-6
    torch.manual_seed(1)
    whole, metrics = learn(micro_batch=None)
    assert whole.norm() > 1e-3
    for rows in (1, 2, 3):
        torch.manual_seed(1)
        split, split_metrics = learn(micro_batch=rows)
        assert (split - whole).norm() <= tolerance * whole.norm(), rows
        assert list(split_metrics) == list(metrics)
        for name in metrics.keys() - {"effective_sample_size"}:  # a ratio of two means
            assert_close(split_metrics[name], metrics[name], rtol=tolerance, atol=tolerance, msg=f"{name}, {rows} rows")


@every_variant
def test_any_split_into_micro_batches_is_the_same_gradient_and_the_same_metrics(
    name: str, prefix_policy: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(prefix_policy, sample)
    options = anchored("reweighted", SoftmaxOfPrefix()) | {"entropy_coefficient": 0.1}
    learn = partial(iteration, VARIANTS[name], prefix_policy, lambda _: rollout, **options)
    assert_split_changes_nothing(prefix_policy, learn)


@every_divergence
def test_any_split_is_the_same_with_every_divergence(
    divergence: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout, options = off_policy(softmax_of_prefix, sample), anchored(divergence, SoftmaxOfPrefix())
    learn = partial(iteration, grpo, softmax_of_prefix, lambda _: rollout, **options)
    assert_split_changes_nothing(softmax_of_prefix, learn)


def test_no_more_rows_are_computed_at_a_time(softmax_of_prefix: nn.Module, sample: Sample) -> None:
    rollout, seen = off_policy(softmax_of_prefix, sample), []
    softmax_of_prefix.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    reference = SoftmaxOfPrefix()
    reference.register_forward_pre_hook(lambda module, inputs: seen.append(-len(inputs[0])))
    options = anchored("k3", reference) | {"minibatch_size": 5, "micro_batch": 3}
    iteration(grpo, softmax_of_prefix, lambda _: rollout, **options)
    assert seen == [3, -3, 2, -2] + [3, -3]  # of the last minibatch three rows fill up, and two of them stand alone


@every_variant
def test_minibatches_split_as_the_whole_does(name: str, softmax_of_prefix: nn.Module, sample: Sample) -> None:
    """In minibatches of three, the last filled up; two epochs, so that an error would be carried on."""
    rollout = off_policy(softmax_of_prefix, sample)
    options = {"minibatch_size": 3, "epochs": 2, "entropy_coefficient": 0.1}
    learn = partial(iteration, VARIANTS[name], softmax_of_prefix, lambda _: rollout, **options)
    assert_split_changes_nothing(softmax_of_prefix, learn)


@pytest.mark.parametrize("micro_batch", [None, 1])
@every_variant
def test_rows_in_which_nothing_counts_are_no_reason_to_stop(
    name: str, micro_batch: int | None, language: OnPrefixes
) -> None:
    """Completions cut and filtered out, down to whole minibatches of them, and a whole rollout."""
    rollout = completions(WORLD, table(language))[0]
    options = anchored("k3", token_policy(7)) | {"entropy_coefficient": 0.1, "micro_batch": micro_batch}
    for kept in (slice(0, 2), slice(0, 0)):
        mask = torch.zeros_like(rollout.mask)
        mask[kept] = rollout.mask[kept]
        sparse = replace(rollout, mask=mask)
        torch.manual_seed(0)
        options["minibatch_size"] = 2
        change, metrics = iteration(VARIANTS[name], language, lambda _, sparse=sparse: sparse, **options)
        assert change.isfinite().all()
        assert all(torch.as_tensor(x).isfinite() for x in metrics.values())
        assert {"kl", "entropy", "kl_reference", "gradient_norm"} <= metrics.keys()
        assert bool(change.eq(0).all()) == (kept == slice(0, 0))


# Behind the mask


class Spoilt(Categorical):
    """A categorical of which nothing can be believed where `hidden`."""

    def __init__(self, logits: Tensor, hidden: Tensor, garbage: float) -> None:
        super().__init__(logits=logits, validate_args=False)
        self.spoilt = torch.zeros(hidden.shape).where(~hidden, garbage)

    def log_prob(self, action: Tensor) -> Tensor:
        return super().log_prob(action) + self.spoilt

    def entropy(self) -> Tensor:
        return super().entropy() + self.spoilt


@register_kl(Spoilt, Spoilt)
def _(p: Spoilt, q: Spoilt) -> Tensor:
    return kl_divergence(Categorical(logits=p.logits), Categorical(logits=q.logits)) + p.spoilt


class SpoiltPolicy(SoftmaxOfPrefix):
    """Observations of 9 are padding: there, whatever the distribution says is garbage."""

    garbage = 0.0

    def forward(self, obs: Tensor) -> Spoilt:
        hidden = obs[..., 0] == 9
        return Spoilt(super().forward(obs.where(~hidden.unsqueeze(-1), 0.0)).logits, hidden, self.garbage)


def spoilt(rollout: Rollout, garbage: float) -> Rollout:
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


@pytest.mark.parametrize("garbage", [torch.nan, inf, -inf])
@pytest.mark.parametrize("divergence", [None, *DIVERGENCES])
def test_garbage_behind_the_mask_changes_nothing(
    divergence: str | None, garbage: float, float64: None, sample: Sample
) -> None:
    """From the rollout, the credit, the policy and the reference, to every bit of the parameters and the metrics."""
    policy, reference = SpoiltPolicy(), SpoiltPolicy()
    rollout = off_policy(policy, sample)
    assert not rollout.mask.all()

    def learn(name: str, garbage: float) -> tuple[Tensor, dict[str, Any]]:
        policy.garbage = reference.garbage = garbage
        dirty = spoilt(rollout, garbage)
        options = {"entropy_coefficient": 0.1, "epochs": 2, "minibatch_size": 4}
        options |= {} if divergence is None else anchored(divergence, reference)
        base = VARIANTS[name].keywords.get("credit", group_advantage) if name != "grpo" else group_advantage
        options["credit"] = lambda rollout: base(rollout).where(rollout.mask, garbage)
        torch.manual_seed(0)
        return iteration(VARIANTS[name], policy, lambda _: dirty, **options)

    for name in VARIANTS if divergence is None else ("grpo",):
        (clean, clean_metrics), (dirty, dirty_metrics) = learn(name, 0.0), learn(name, garbage)
        assert clean.norm() > 1e-3
        assert torch.equal(clean, dirty), name
        for metric, x in clean_metrics.items():
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(dirty_metrics[metric])), (name, metric)


# The first update


def on_policy(policy: OnPrefixes, prompts: int = 4, size: int = 4) -> Rollout:
    """Scored by the very function that the learner scores with."""
    rollout = CompletionSampler(WORLD, prompts, size)(policy)
    with torch.no_grad():
        return replace(rollout, logp=policy(rollout.obs).log_prob(rollout.action))


@every_variant
def test_the_first_ratio_is_exactly_1(name: str, language: OnPrefixes) -> None:
    rollout = on_policy(language)
    change, metrics = iteration(VARIANTS[name], language, lambda _: rollout)
    assert metrics["kl"] == metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-15)
    assert metrics["gradient_norm"] > 1e-3
    assert_close(metrics["gradient_norm"], change.norm())
    later = iteration(VARIANTS[name], language, lambda _: rollout, epochs=2)[1]
    assert later["kl"] > 0, "the second epoch is away from the old policy"


@pytest.mark.parametrize("name", ["grpo", "gspo", "reinforce_plus_plus"])
def test_the_objective_is_0_at_first_whatever_is_learned(name: str, language: OnPrefixes) -> None:
    """Where the weights are those by which the advantages are centred."""
    change, metrics = iteration(VARIANTS[name], language, lambda _: on_policy(language))
    assert metrics["objective"] == pytest.approx(0, abs=1e-15)
    assert change.norm() > 1e-3


@pytest.mark.parametrize("reward", [0.1, -1e6 - 0.1])
@every_variant
def test_groups_of_equal_rewards_teach_nothing(name: str, reward: float, language: OnPrefixes) -> None:
    """To the last bit. Each group has a reward of its own, but for REINFORCE++, whose group is the batch."""
    rollout = on_policy(language)
    per_group = reward if name == "reinforce_plus_plus" else reward * (1 + rollout.group.unsqueeze(1))
    flat = replace(rollout, reward=torch.where(rollout.ended, per_group, 0.0))
    change, metrics = iteration(VARIANTS[name], language, lambda _: flat, epochs=2, minibatch_size=5)
    assert change.eq(0).all()
    assert metrics["flat_groups"] == 1
    assert metrics["gradient_norm"] == metrics["group_std"] == metrics["objective"] == 0


def test_the_spread_of_rewards_is_reported(language: OnPrefixes) -> None:
    rollout = on_policy(language, prompts=2, size=2)
    scores = torch.tensor([1.0, 4.0, 2.0, 2.0])
    rollout = replace(rollout, reward=torch.where(rollout.ended, scores.unsqueeze(1), 0.0), metrics={"reward": 2.25})
    metrics = iteration(grpo, language, lambda _: rollout)[1]
    assert metrics["group_std"] == pytest.approx((2 * 4.5**0.5 + 2 * 0) / 4)
    assert metrics["flat_groups"] == 0.5
    assert metrics["reward"] == 2.25, "what the sampler measured"
    charged = replace(rollout, reward=rollout.reward - torch.rand(4, 3), metrics={"flat_groups": 0.5})
    assert iteration(grpo, language, lambda _: charged)[1]["flat_groups"] == 0.5, "of its own reward, before KL"


# Invariances


def chosen(rollout: Rollout, index: Tensor) -> Rollout:
    columns = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return replace(rollout, **{n: x[index] for n, x in columns.items() if isinstance(x, Tensor)})


@every_variant
def test_neither_the_order_of_rows_nor_the_labels_of_groups_matter(
    name: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(softmax_of_prefix, sample)
    plain = iteration(VARIANTS[name], softmax_of_prefix, lambda _: rollout)[0]
    shuffled = chosen(rollout, torch.randperm(7))
    relabelled = replace(rollout, group=torch.tensor([12, -1, 5])[rollout.group])
    for other in (shuffled, relabelled):
        assert_close(iteration(VARIANTS[name], softmax_of_prefix, lambda _, o=other: o)[0], plain, rtol=0, atol=1e-14)
    one = replace(rollout, group=torch.zeros_like(rollout.group))
    other = iteration(VARIANTS[name], softmax_of_prefix, lambda _: one)[0]
    assert ((other - plain).norm() > 1e-3) == (name != "reinforce_plus_plus"), "which rows are together does"


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"])
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(
    name: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(softmax_of_prefix, sample)
    plain = iteration(VARIANTS[name], softmax_of_prefix, lambda _: rollout)[0]
    reward = rollout.reward.clone()
    reward[:, 0] += torch.tensor([5.0, -3.0, 100.0])[rollout.group]  # the first step of every row counts
    shifted = replace(rollout, reward=reward)
    assert_close(iteration(VARIANTS[name], softmax_of_prefix, lambda _: shifted)[0], plain, rtol=0, atol=1e-12)
    by_row = replace(rollout, reward=rollout.reward + torch.arange(7.0).unsqueeze(1))
    assert (iteration(VARIANTS[name], softmax_of_prefix, lambda _: by_row)[0] - plain).norm() > 1e-3


@every_variant
def test_only_a_division_by_the_deviation_takes_out_the_scale_of_rewards(
    name: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout = off_policy(softmax_of_prefix, sample)
    plain, scaled = (
        iteration(VARIANTS[name], softmax_of_prefix, lambda _, c=c: replace(rollout, reward=c * rollout.reward))[0]
        for c in (1, 5)
    )
    if name in ("dr_grpo", "rloo"):
        assert_close(scaled, 5 * plain, rtol=0, atol=1e-12)
    else:
        assert (scaled - plain).norm() < 1e-3 * plain.norm()
    if name != "reinforce_plus_plus":
        assert (scaled - plain).norm() > 1e-8, "up to the 1e-4 beside the deviation"


# Options: each changes what it says


@pytest.fixture
def learn(softmax_of_prefix: nn.Module, sample: Sample) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """(**options of grpo) -> (change, metrics), on one rollout from near the policy."""
    rollout = replace(off_policy(softmax_of_prefix, sample, rows=6), importance=None)

    def learn(algorithm: Callable[..., Any] = grpo, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(0)
        return iteration(algorithm, softmax_of_prefix, lambda _: rollout, **options)

    return learn


Learn = Callable[..., tuple[Tensor, dict[str, Any]]]


def test_credit_and_weights_scale_the_gradient(learn: Learn) -> None:
    plain = learn()[0]
    assert_close(learn(credit=lambda rollout: 3 * group_advantage(rollout))[0], 3 * plain)
    assert_close(learn(weights=lambda mask: 2 * per_row(mask))[0], 2 * plain)
    assert_close(learn(weights=per_episode)[0], learn(rloo, credit=group_advantage)[0])


def test_ratio_and_gain_are_the_objectives(learn: Learn) -> None:
    assert_close(learn(ratio=sequence_ratio, clip=(3e-4, 4e-4))[0], learn(gspo)[0])
    assert_close(learn(gain=clipped_weight, clip=(inf, 0.28), weights=per_token)[0], learn(cispo)[0])
    assert (learn(ratio=sequence_ratio)[0] - learn()[0]).norm() > 1e-3
    assert (learn(gain=clipped_weight)[0] - learn()[0]).norm() > 1e-3


def test_each_bound_clips_its_own_side(learn: Learn) -> None:
    free = learn(clip=(inf, inf))
    low, high = learn(clip=(0.1, inf)), learn(clip=(inf, 0.1))
    for (change, metrics), side, other in ((low, "low", "high"), (high, "high", "low")):
        assert (change - free[0]).norm() > 1e-3
        assert metrics[f"clip_fraction_{side}"] > metrics[f"clip_fraction_{other}"] == 0
    both = learn(clip=(0.1, 0.1))
    assert_close(both[0] - free[0], low[0] - free[0] + high[0] - free[0])
    assert free[1]["clip_fraction_low"] == free[1]["clip_fraction_high"] == 0


def test_the_entropy_coefficient_adds_the_gradient_of_the_mean_entropy(
    learn: Learn, softmax_of_prefix: nn.Module
) -> None:
    seen: list[Rollout] = []

    def credit(rollout: Rollout) -> Tensor:
        seen.append(rollout)
        return group_advantage(rollout)

    plain, metrics = learn(weights=per_token)
    bonus = learn(weights=per_token, entropy_coefficient=0.7, credit=credit)[0]
    entropy = softmax_of_prefix(seen[0].obs).entropy()[seen[0].mask].mean()
    assert_close(metrics["entropy"], entropy.detach())
    assert_close(bonus - plain, 0.7 * gradient(entropy, softmax_of_prefix))


def test_epochs_and_minibatches_are_the_steps_taken(learn: Learn) -> None:
    counts = {(4, 1): 2, (4, 3): 6, (2, 2): 6, (6, 1): 1, (100, 2): 2}
    found = {(size, epochs): learn(minibatch_size=size, epochs=epochs) for size, epochs in counts}
    assert {key: metrics["updates"] for key, (_, metrics) in found.items()} == counts
    assert_close(found[6, 1][0], learn()[0], rtol=0, atol=1e-14)
    assert min((found[key][0] - learn()[0]).norm() for key in counts if key != (6, 1)) > 1e-3


def test_the_gradient_is_scaled_down_to_max_grad_norm(learn: Learn) -> None:
    free, metrics = learn()
    short, short_metrics = learn(max_grad_norm=1e-3)
    assert short.norm() == pytest.approx(1e-3, rel=1e-3)
    assert torch.cosine_similarity(short, free, dim=0) == pytest.approx(1)
    assert short_metrics["gradient_norm"] == metrics["gradient_norm"] > 1e-3, "it is reported as it was"


def test_max_grad_norm_is_1_if_nothing_else_is_said(softmax_of_prefix: nn.Module, sample: Sample) -> None:
    rollout, learner = off_policy(softmax_of_prefix, sample), deepcopy(softmax_of_prefix)
    rollout = replace(rollout, reward=100 * rollout.reward)
    metrics = next(rloo(learner, lambda _: rollout, SGD(learner.parameters(), 1.0)))
    assert metrics["gradient_norm"] > 1
    assert (parameters(learner) - parameters(softmax_of_prefix)).norm() == pytest.approx(1, rel=1e-3)


def test_the_anchor_is_charged_with_its_coefficient(learn: Learn, float64: None) -> None:
    anchor = partial(to_reference, reference=SoftmaxOfPrefix(), divergence=over_actions)
    plain = learn()[0]
    pull = {beta: learn(anchor=anchor, coefficient=AdaptiveCoefficient(beta))[0] - plain for beta in (0.0, 0.04, 2.0)}
    assert pull[0.0].abs().max() < 1e-15
    assert pull[2.0].norm() > 1e-2
    assert_close(pull[0.04], pull[2.0] / 50)
    assert_close(learn(anchor=anchor)[0] - plain, pull[0.04])
    assert "kl_coefficient" not in learn()[1]


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5), (inf, 1.0)])
def test_the_coefficient_moves_towards_its_target_after_every_iteration(
    target: float, factor: float, language: OnPrefixes
) -> None:
    anchor = partial(to_reference, reference=token_policy(7), divergence=over_actions)
    coefficient = AdaptiveCoefficient(0.1, target)
    optimizer = SGD(language.parameters(), 1e-3)
    run = grpo(language, CompletionSampler(WORLD, 2, 4), optimizer, anchor=anchor, coefficient=coefficient)
    used = [float(next(run)["kl_coefficient"]) for _ in range(4)]
    assert used == pytest.approx([0.1 * factor**k for k in range(4)])
    assert coefficient.value.item() == pytest.approx(0.1 * factor**4)


def test_the_metrics_of_every_iteration_have_the_same_names_and_are_finite(language: OnPrefixes) -> None:
    always = {"objective", "entropy", "kl", "effective_sample_size", "clip_fraction_low", "clip_fraction_high"}
    always |= {"gradient_norm", "group_std", "flat_groups", "updates"}
    for options in ({}, anchored("k3", token_policy(7))):
        run = dapo(language, CompletionSampler(WORLD, 2, 4), Adam(language.parameters()), epochs=2, **options)
        rows = [next(run) for _ in range(3)]
        assert len({tuple(row) for row in rows}) == 1
        assert rows[0].keys() >= always | ({"kl_reference", "kl_coefficient"} if options else set())
        assert all(torch.as_tensor(x).isfinite() and not torch.as_tensor(x).requires_grad for x in rows[0].values())


# It learns, in any world


@every_variant
def test_every_variant_learns_language(name: str, language: OnPrefixes) -> None:
    before = float(expected_return(TREE, table(language).detach()))
    run = VARIANTS[name](language, CompletionSampler(WORLD, 4, 8), Adam(language.parameters(), 0.3), epochs=2)
    for _ in range(8):
        next(run)
    after = float(expected_return(TREE, table(language).detach()))
    assert after > before + 0.5 * (1.55 - before)  # half the way to the best completion of each prompt


def control(make: Any, count: int, steps: int) -> tuple[Policy, OneGroup]:
    environments = make_environments(make, count)
    space, actions = environments.single_observation_space, environments.single_action_space
    return Policy(space, actions, hidden=(8,)), OneGroup(Sampler(environments, steps, seed=0, whole_episodes=True))


@pytest.mark.parametrize("name", ["grpo", "cispo", "reinforce_plus_plus"])
def test_cartpole_needs_no_new_code(name: str) -> None:
    policy, sample = control("CartPole-v1", 4, 30)
    before = parameters(policy)
    run = VARIANTS[name](policy, sample, Adam(policy.parameters(), 1e-2), epochs=2, minibatch_size=64, micro_batch=50)
    rows = [next(run) for _ in range(2)]
    assert rows[1]["steps"] > rows[0]["steps"] > 0
    assert all(torch.as_tensor(x).isfinite() for row in rows for x in row.values())
    assert rows[0]["flat_groups"] == 0 < rows[0]["group_std"]
    assert (parameters(policy) - before).norm() > 1e-3


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "gspo"])  # whose ratio needs rows to be whole
def test_where_action_and_observation_matter_each_observation_finds_its_own(name: str) -> None:
    policy, sample = control(ActionAndObservationMatter, 32, 2)
    run = VARIANTS[name](policy, sample, Adam(policy.parameters(), 0.1))
    for _ in range(15):
        next(run)
    for x, action in {-1: 0, 1: 1}.items():
        assert policy(torch.full((1, 1, 1), float(x))).probs[..., action].item() > 0.8
