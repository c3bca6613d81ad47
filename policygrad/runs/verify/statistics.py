"""An estimator held against what it should expect: moments by enumeration or sampling, the test, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from policygrad.exact.enumeration import rows as take
from policygrad.rollout import Rollout

# What an estimator maximises on one batch: (policy, rollout) -> scalar. Its gradient is the estimate.
Objective = Callable[[Callable[[Any], Any], Rollout], Tensor]

FALSE_ALARM_RATE = 5e-4  # of all sampled rows of a run together; rows that are enumerated have none
TOLERANCE = 1e-9  # of an enumerated expectation, relative to the size of what it is compared with
PROJECTIONS = 32
BATCH = 16


@dataclass(frozen=True)
class Estimator:
    """One row of the table.

    expected: what it expects in closed form, where that is not `exact`; then `reason` says why, in a few words.
    exact: what it is to estimate, where that is not grad J; `of` names it.
    """

    name: str
    objective: Objective
    rows: int = 1  # of a batch: more than one where rows look at each other
    any_rows: bool = False  # they may be more: then the variance is that of BATCH
    expected: Tensor | None = None
    reason: str = ""
    exact: Tensor | None = None
    of: str = "grad J"
    off_policy: bool = False  # sampled by the old policy
    is_value: bool = False  # the estimate is the objective itself, not its gradient
    wrong_if_biased: bool = True  # False: there is no closed form to hold it against
    one_by_one: bool = False  # torch.func.vmap does not go through it
    experience: Experience | None = None  # its own, in place of the section's


@dataclass(frozen=True)
class Experience:
    """Rows to estimate from, and the probability of each batch of them: all there are, or a sample."""

    rollout: Rollout
    batches: Callable[[int], tuple[Int[Tensor, "K B"], Float[Tensor, " K"]]]
    enumerated: bool


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of the estimate of one batch of `rows`, and how many batches they rest on (inf: all)."""

    mean: Float[Tensor, " N"]
    covariance: Float[Tensor, "N N"]
    rows: int = 1
    count: int | float = math.inf


@dataclass(frozen=True)
class Finding:
    """A judged row. `sample_size` is the number of episodes at which the standard error equals the bias."""

    world: str
    name: str
    of: str
    method: Literal["enumeration", "sampling"]
    size: float  # of the exact quantity
    bias: float
    relative_bias: float
    cosine: float
    z: float
    variance: float
    sample_size: float
    verdict: str  # unbiased, biased (as the reason says), or WRONG
    reason: str


@contextmanager
def float64() -> Iterator[None]:
    """Whatever is made without a dtype is float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def estimates(
    policy: nn.Module, estimator: Estimator, rollout: Rollout, index: Int[Tensor, "K B"]
) -> Float[Tensor, "K N"]:
    """The estimate of every batch: the gradient of its objective at the policy's parameters (or the objective)."""
    parameters = {name: p.detach() for name, p in policy.named_parameters()}

    def gain(parameters: dict[str, Tensor], index: Tensor) -> Tensor:
        return estimator.objective(lambda obs: functional_call(policy, parameters, (obs,)), take(rollout, index))

    def one(index: Tensor) -> Tensor:
        if estimator.is_value:
            return gain(parameters, index).reshape(1)
        return torch.cat([g.flatten() for g in grad(gain)(parameters, index).values()])

    if estimator.one_by_one:
        return torch.stack([one(i) for i in index]).detach()
    return vmap(one, chunk_size=8192)(index).detach()


def moments(policy: nn.Module, estimator: Estimator, experience: Experience) -> Moments:
    """E[x] and Cov[x] = E[x x^T] - E[x] E[x]^T of the estimate x of one batch, with n / (n - 1) where sampled.

    A baseline from the other rows of a batch is enumerated over the smallest batches, where it is least good; its
    covariance is that of batches of BATCH, drawn from the same probabilities.
    """
    index, probability = experience.batches(estimator.rows)
    found = _moments(estimates(policy, estimator, experience.rollout, index), probability)
    if not experience.enumerated:
        count = len(index)
        return replace(found, covariance=found.covariance * count / (count - 1), rows=index.shape[1], count=count)
    if not estimator.any_rows:
        return replace(found, rows=estimator.rows)
    _, each = experience.batches(1)
    drawn = torch.multinomial(each, 2048 * BATCH, replacement=True, generator=torch.Generator().manual_seed(0))
    x = estimates(policy, estimator, experience.rollout, drawn.view(-1, BATCH))
    return replace(found, covariance=torch.cov(x.T), rows=BATCH)


def _moments(x: Float[Tensor, "K N"], probability: Float[Tensor, " K"]) -> Moments:
    mean = probability @ x
    return Moments(mean, (probability.unsqueeze(1) * (x - mean)).T @ (x - mean))


def agrees(found: Moments, expected: Float[Tensor, " N"], tests: int) -> bool:
    """Whether the mean is what was expected: to rounding if enumerated, else by a test of false-alarm rate

    FALSE_ALARM_RATE / `tests`: two-sided z of the mean's error along the expectation and along fixed random
    directions, Bonferroni over both. (Along coordinates it would rest on states that are hardly ever seen.)
    """
    error = found.mean - expected
    if not bool(error.isfinite().all()):
        return False
    rounding = TOLERANCE * max(1.0, float(expected.abs().max()))
    if math.isinf(found.count):
        return float(error.abs().max()) <= rounding
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(PROJECTIONS, len(error), generator=generator, dtype=error.dtype)
    directions = torch.cat([directions, expected.unsqueeze(0)])
    variance = torch.einsum("pm,mn,pn->p", directions, found.covariance, directions).clamp(min=0) / found.count
    limit = NormalDist().inv_cdf(1 - FALSE_ALARM_RATE / (2 * tests * len(directions)))
    return bool(((directions @ error).abs() <= limit * variance.sqrt() + rounding).all())


def judge(
    world: str, estimator: Estimator, found: Moments, exact: Float[Tensor, " N"], samples: int, tests: int = 1
) -> Finding:
    """The row of the table: bias, cosine, z and variance against the exact quantity, verdict against the expected.

    z is the bias over the standard error at `samples` episodes, where a sample's unbiased mean has about 1.
    """
    exact = exact if estimator.exact is None else estimator.exact
    expected = exact if estimator.expected is None else estimator.expected
    rounding = TOLERANCE * max(1.0, float(exact.norm()))
    if agrees(found, expected, tests):
        verdict = "biased" if float((expected - exact).norm()) > rounding else "unbiased"
    else:
        verdict = "WRONG" if estimator.wrong_if_biased or not found.mean.isfinite().all() else "biased"
    bias, variance = float((found.mean - exact).norm()), found.rows * float(found.covariance.trace())
    if math.isinf(found.count) and bias <= rounding:
        bias = 0.0  # what enumeration leaves is rounding
    cosine = float(torch.cosine_similarity(found.mean, exact, dim=0)) if found.mean.norm() > rounding else math.nan
    return Finding(
        world,
        estimator.name,
        estimator.of,
        "enumeration" if math.isinf(found.count) else "sampling",
        float(exact.norm()),
        bias,
        bias / float(exact.norm()),
        cosine,
        bias / math.sqrt(variance / samples) if variance > 0 else math.nan,
        variance,
        variance / bias**2 if bias > 0 else math.inf,
        verdict,
        estimator.reason if verdict == "biased" else "",
    )
