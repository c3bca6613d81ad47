"""A row held against what it should expect: moments by enumeration or sampling, the test, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, grad, vmap

from policygrad.credit import Assign
from policygrad.exact.enumeration import batches
from policygrad.rollout import Rollout, decisions
from policygrad.updates import Objective

FALSE_ALARM_RATE = 5e-4  # of all sampled rows of a run together; rows that are enumerated have none
TOLERANCE = 1e-9  # of an enumerated expectation, relative to the size of what it is compared with
PROJECTIONS = 32
BATCH = 16


@dataclass(frozen=True)
class Experience:
    """Rows to estimate from, and all batches of a size with the probability of each: all there are, or a sample."""

    rollout: Rollout
    batches: Callable[[int], tuple[Int[Tensor, "K B"], Float[Tensor, " K"]]]
    enumerated: bool = True


@dataclass(frozen=True)
class Row:
    """A row of a table: a credit, an objective and weights of the library, and what they should expect together.

    expected: what it expects, where that is not `exact`; then `reason` says why, in a few words. known: False where
    nothing here knows what it expects. exact: what it is to estimate, where that is not its section's; `of` names it.
    """

    name: str
    credit: Assign
    objective: Objective
    weights: Callable[[Tensor], Tensor]
    size: int = 1  # rows of a batch: more than one where rows look at each other
    any_size: bool = False  # they may be more: then the variance is that of BATCH
    expected: Tensor | None = None
    known: bool = True
    reason: str = ""
    exact: Tensor | None = None
    of: str = "grad J"
    is_value: bool = False  # the estimate is the objective itself, not its gradient
    one_by_one: bool = False  # torch.func.vmap does not go through it
    wrapped: Callable[[Rollout], Rollout] = lambda part: part  # what a wrapper of samplers makes of each batch
    experience: Experience | None = None  # its own, in place of the section's
    measured: Moments | None = None  # of an estimate that is not the row's gradient: what a method's own loop did


@dataclass(frozen=True)
class Section:
    """A table: rows, the experience that they are measured on, and the gradient that they are measured by."""

    name: str
    rows: list[Row]
    experience: Experience
    exact: Tensor


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
    verdict: str  # unbiased, biased (as the reason says), no closed form, or WRONG
    reason: str


def enumerated(rollout: Rollout, probability: Float[Tensor, " B"]) -> Experience:
    """All rows there are, and batches of independent ones."""
    return Experience(rollout, lambda size: unordered(*batches(probability, size)))


def unordered(
    index: Int[Tensor, "K B"], probability: Float[Tensor, " K"]
) -> tuple[Int[Tensor, "L B"], Float[Tensor, " L"]]:
    """Batches of the same rows in another order as one: no method may look at the order."""
    index, same = index.sort(1).values.unique(dim=0, return_inverse=True)
    return index, torch.zeros(len(index)).index_add(0, same, probability)


def estimates(row: Row, rollout: Rollout, index: Int[Tensor, "K B"]) -> Float[Tensor, "K N"]:
    """The estimate of every batch: the gradient of the row's objective in the policy's parameters (or its value)."""
    named = row.objective.policy.named_parameters()
    parameters = {f"policy.{name}": p.detach() for name, p in named if p.requires_grad}

    def value(parameters: dict[str, Tensor], index: Tensor) -> Tensor:
        part = row.wrapped(rollout.rows(index))
        batch = decisions(part, row.weights(part.mask), *row.credit(part))
        return functional_call(row.objective, parameters, (batch,))[0]

    def one(index: Tensor) -> Tensor:
        if row.is_value:
            return value(parameters, index).reshape(1)
        return torch.cat([g.flatten() for g in grad(value)(parameters, index).values()])

    if row.one_by_one:
        return torch.stack([one(i) for i in index]).detach()
    return vmap(one, chunk_size=8192)(index).detach()


def moments(row: Row, experience: Experience) -> Moments:
    """E[x] and Cov[x] = E[x x^T] - E[x] E[x]^T of the estimate x of one batch, with n / (n - 1) where sampled.

    A baseline from the other rows of a batch is enumerated over the smallest batches, where it is least good; its
    covariance is that of batches of BATCH, drawn from the same probabilities.
    """
    index, probability = experience.batches(row.size)
    x = estimates(row, experience.rollout, index)
    mean = probability @ x
    found = Moments(mean, (probability.unsqueeze(1) * (x - mean)).T @ (x - mean), index.shape[1])
    if not experience.enumerated:
        count = len(index)
        return replace(found, covariance=found.covariance * count / (count - 1), count=count)
    if not row.any_size:
        return found
    _, each = experience.batches(1)
    drawn = torch.multinomial(each, 2048 * BATCH, replacement=True, generator=torch.Generator().manual_seed(0))
    x = estimates(row, experience.rollout, drawn.view(-1, BATCH))
    return replace(found, covariance=torch.cov(x.T), rows=BATCH)


def judged(section: Section, samples: int) -> list[Finding]:
    """Every row of a section, measured and judged."""
    tests = len(section.rows)
    found = [row.measured or moments(row, row.experience or section.experience) for row in section.rows]
    return [
        judge(section.name, row, m, section.exact, samples, tests) for row, m in zip(section.rows, found, strict=True)
    ]


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


def judge(world: str, row: Row, found: Moments, exact: Float[Tensor, " N"], samples: int, tests: int = 1) -> Finding:
    """The row of the table: bias, cosine, z and variance against the exact quantity, verdict against the expected.

    z is the bias over the standard error at `samples` episodes, where a sample's unbiased mean has about 1.
    """
    exact = exact if row.exact is None else row.exact
    expected = exact if row.expected is None else row.expected
    rounding = TOLERANCE * max(1.0, float(exact.norm()))
    if agrees(found, expected, tests):
        verdict = "biased" if float((expected - exact).norm()) > rounding else "unbiased"
    elif row.known or not found.mean.isfinite().all():
        verdict = "WRONG"
    else:
        verdict = "biased" if row.reason else "no closed form"
    bias, variance = float((found.mean - exact).norm()), found.rows * float(found.covariance.trace())
    if math.isinf(found.count) and bias <= rounding:
        bias = 0.0  # what enumeration leaves is rounding
    cosine = float(torch.cosine_similarity(found.mean, exact, dim=0)) if found.mean.norm() > rounding else math.nan
    return Finding(
        world,
        row.name,
        row.of,
        "enumeration" if math.isinf(found.count) else "sampling",
        float(exact.norm()),
        bias,
        bias / float(exact.norm()),
        cosine,
        bias / math.sqrt(variance / samples) if variance > 0 else math.nan,
        variance,
        variance / bias**2 if bias > 0 else math.inf,
        verdict,
        row.reason if verdict == "biased" else "",
    )
