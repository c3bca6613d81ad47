"""GRPO's own update: its KL to a reference, splits, garbage behind the mask, and what each option changes."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import pytest
import torch
from conftest import SoftmaxOfPrefix, SpoiledPolicy, off_policy, spoiled
from oracles import (
    TREE,
    WORLD,
    assert_split_changes_nothing,
    expected,
    gradient,
    iteration,
    parameters,
    table,
    token_policy,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.testing import assert_close

from policygrad.algorithms.grpo import GRPOObjective, grpo
from policygrad.credit import Assign, Credit, baselined, grouped
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
from policygrad.exact.closed_form import kl_by_state, visitation
from policygrad.exact.sampler import CompletionSampler
from policygrad.exact.tokens import OnPrefixes, completions, prefix_state
from policygrad.objectives import clipped_weight
from policygrad.rollout import Rollout
from policygrad.score import sequence_ratio
from policygrad.updates import ascend
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
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
close = partial(assert_close, rtol=1e-10, atol=1e-12)


def pieces(
    policy: nn.Module,
    sample: Sample,
    optimizer: Optimizer,
    *,
    credit: Assign = grouped(),  # noqa: B008
    max_grad_norm: float = inf,
    micro_batch: int | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """GRPO of these pieces; the options are the loop's and the objective's."""
    names = ("weights", "epochs", "minibatch_size", "normalize", "target_kl")
    loop = {name: options.pop(name) for name in names if name in options}
    update = ascend(optimizer, max_grad_norm=max_grad_norm, micro_batch=micro_batch)
    return grpo(sample, credit, GRPOObjective(policy, **options), update, **loop)


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
    options = anchored(divergence, token_policy(7), 0.3) | {"weights": per_episode, "credit": baselined()}
    return expected(pieces, policy, 1, by=by, wrap=without_reward, **options) / -0.3


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
    metrics = iteration(pieces, language, lambda _: rollout, weights=weights, **anchored("over_actions", reference))[1]
    exact = {"kl_ref": kl_by_state(probs, table(reference).detach()), "entropy": -(probs * probs.log()).sum(1)}
    for name, by_state in exact.items():
        each = by_state[prefix_state(WORLD, rollout.obs)]
        by_row = [row[counts] for row, counts in zip(each, rollout.mask, strict=True)]
        mean = sum(row.mean() for row in by_row) / len(by_row) if weights is per_row else torch.cat(by_row).mean()
        close(metrics[name], mean)


def test_the_anchor_sees_the_ratio_of_each_token_whatever_the_objectives_is(language: OnPrefixes) -> None:
    """A sequence's ratio would reweigh its tokens by what the others are."""
    rollout = without_reward(lambda _: completions(WORLD, table(token_policy(3, near=language)))[0])
    options = anchored("reweighted", token_policy(7))
    gspo = {"ratio": sequence_ratio, "clip": (3e-4, 4e-4)}
    by_token, by_sequence = (iteration(pieces, language, rollout, **options, **x)[0] for x in ({}, gspo))
    assert by_token.norm() > 1e-2
    close(by_sequence, by_token)


# Splits


@every_divergence
def test_any_split_is_the_same_with_every_divergence(
    divergence: str, softmax_of_prefix: nn.Module, sample: Sample
) -> None:
    rollout, options = off_policy(softmax_of_prefix, sample), anchored(divergence, SoftmaxOfPrefix())
    learn = partial(iteration, pieces, softmax_of_prefix, lambda _: rollout, **options)
    assert_split_changes_nothing(softmax_of_prefix, learn)


def test_no_more_rows_are_computed_at_a_time(softmax_of_prefix: nn.Module, sample: Sample) -> None:
    rollout, seen = off_policy(softmax_of_prefix, sample), []
    softmax_of_prefix.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    reference = SoftmaxOfPrefix()
    reference.register_forward_pre_hook(lambda module, inputs: seen.append(-len(inputs[0])))
    options = anchored("k3", reference) | {"minibatch_size": 5, "micro_batch": 3}
    iteration(pieces, softmax_of_prefix, lambda _: rollout, **options)
    assert seen == [3, -3, 2, -2] + [3, -3]  # of the last minibatch three rows fill up, and two of them stand alone


# Behind the mask


@pytest.mark.parametrize("garbage", [torch.nan, inf, -inf])
@every_divergence
def test_garbage_behind_the_mask_changes_nothing(
    divergence: str, garbage: float, float64: None, sample: Sample
) -> None:
    """From the rollout, the credit, the policy and the reference, to every bit of the parameters and the metrics."""
    policy, reference = SpoiledPolicy(), SpoiledPolicy()
    rollout = off_policy(policy, sample)
    assert not rollout.mask.all()

    def learn(garbage: float) -> tuple[Tensor, dict[str, Any]]:
        def credit(rollout: Rollout) -> Credit:
            return Credit(*(x.where(rollout.mask, garbage) for x in grouped()(rollout)))

        policy.garbage = reference.garbage = garbage
        dirty = spoiled(rollout, garbage)
        options = {"entropy_coefficient": 0.1, "epochs": 2, "minibatch_size": 4, "credit": credit}
        torch.manual_seed(0)
        return iteration(pieces, policy, lambda _: dirty, **options, **anchored(divergence, reference))

    (clean, clean_metrics), (dirty, dirty_metrics) = learn(0.0), learn(garbage)
    assert clean.norm() > 1e-3
    assert torch.equal(clean, dirty)
    for metric, x in clean_metrics.items():
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(dirty_metrics[metric])), metric


# Options: each changes what it says


Learn = Callable[..., tuple[Tensor, dict[str, Any]]]


@pytest.fixture
def learn(softmax_of_prefix: nn.Module, sample: Sample) -> Learn:
    """(**options) -> (change, metrics), on one rollout from near the policy."""
    rollout = replace(off_policy(softmax_of_prefix, sample, rows=6), importance=None)

    def learn(**options: Any) -> tuple[Tensor, dict[str, Any]]:
        torch.manual_seed(0)
        return iteration(pieces, softmax_of_prefix, lambda _: rollout, **options)

    return learn


def test_credit_and_weights_scale_the_gradient(learn: Learn) -> None:
    def tripled(rollout: Rollout) -> Credit:
        credit = grouped()(rollout)
        return credit._replace(advantage=3 * credit.advantage)

    plain = learn()[0]
    assert_close(learn(credit=tripled)[0], 3 * plain)
    assert_close(learn(weights=lambda mask: 2 * per_row(mask))[0], 2 * plain)
    assert (learn(weights=per_token)[0] - plain).norm() > 1e-3


def test_ratio_and_gain_are_exchanged(learn: Learn) -> None:
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

    def credit(rollout: Rollout) -> Credit:
        seen.append(rollout)
        return grouped()(rollout)

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


def test_the_anchor_is_charged_with_its_coefficient(learn: Learn, float64: None) -> None:
    anchor = partial(to_reference, reference=SoftmaxOfPrefix(), divergence=over_actions)
    plain = learn()[0]
    pull = {beta: learn(anchor=anchor, coefficient=AdaptiveCoefficient(beta))[0] - plain for beta in (0.0, 0.04, 2.0)}
    assert pull[0.0].abs().max() < 1e-15
    assert pull[2.0].norm() > 1e-2
    assert_close(pull[0.04], pull[2.0] / 50)
    assert "kl_ref_coefficient" not in learn()[1]
    for half in ({"anchor": anchor}, {"coefficient": AdaptiveCoefficient(0.04)}):
        with pytest.raises(ValueError, match="both"):
            learn(**half)


@pytest.mark.parametrize(("target", "factor"), [(1e-9, 2.0), (1e9, 0.5), (inf, 1.0)])
def test_the_coefficient_moves_towards_its_target_after_every_iteration(
    target: float, factor: float, language: OnPrefixes
) -> None:
    anchor = partial(to_reference, reference=token_policy(7), divergence=over_actions)
    coefficient = AdaptiveCoefficient(0.1, target)
    optimizer = SGD(language.parameters(), 1e-3)
    run = pieces(language, CompletionSampler(WORLD, 2, 4), optimizer, anchor=anchor, coefficient=coefficient)
    used = [float(next(run)["kl_ref_coefficient"]) for _ in range(4)]
    assert used == pytest.approx([0.1 * factor**k for k in range(4)])
    assert coefficient.value.item() == pytest.approx(0.1 * factor**4)


def test_the_metrics_of_every_iteration_have_the_same_names_and_are_finite(language: OnPrefixes) -> None:
    always = {"objective", "entropy", "kl_old", "effective_sample_size", "clip_fraction_low", "clip_fraction_high"}
    always |= {"gradient_norm", "updates"}
    for options in ({}, anchored("k3", token_policy(7))):
        run = pieces(language, CompletionSampler(WORLD, 2, 4), Adam(language.parameters()), epochs=2, **options)
        rows = [next(run) for _ in range(3)]
        assert len({tuple(row) for row in rows}) == 1
        assert rows[0].keys() >= always | ({"kl_ref", "kl_ref_coefficient"} if options else set())
        assert all(torch.as_tensor(x).isfinite() and not torch.as_tensor(x).requires_grad for x in rows[0].values())
