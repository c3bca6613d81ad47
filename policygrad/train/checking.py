"""Whether the gradient depends on how a batch is split: into micro-batches, packed rows, padding, or ranks.

A mean that is taken within a part, in place of over the batch, is such a dependence: training works, and learns
something else with every other size of the parts.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import SGD
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.errors import UserError
from policygrad.precision import without_autocast
from policygrad.rollout import Batch, Rollout, Split
from policygrad.train.compose import Learner, compose
from policygrad.train.keywords import Keywords
from policygrad.train.training import Training
from policygrad.updates import ascend

# Differences of this share of a parameter's largest gradient are rounding, by the precision of the parameters.
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
SMALL = 1e-3  # a parameter whose gradient is smaller than this share of the largest is measured by that
MORE = 3  # rows and steps of padding that are added


@dataclass
class Difference:
    """One way to split the batch: the largest relative difference of its gradient, and of which parameter."""

    name: str
    difference: float
    parameter: str


@dataclass
class Checked:
    """How far the gradient of one batch depends on how it is split.

    The difference of a parameter is max |g - g'| / max |g|, g the gradient of the whole batch.
    """

    method: str
    task: str
    decisions: int
    tolerance: float
    splits: list[Difference] = field(default_factory=list)
    parameters: dict[str, dict[str, float]] = field(default_factory=dict)  # split -> parameter -> difference

    @property
    def passed(self) -> bool:
        """Whether no difference is above the tolerance."""
        return all(x.difference <= self.tolerance for x in self.splits)

    def lines(self) -> list[str]:
        """The result in words."""
        width = max(len(x.name) for x in self.splits)
        rows = [
            f"  {x.name:{width}}  {x.difference:8.1e}  {x.parameter if x.difference else ''}".rstrip()
            + ("" if x.difference <= self.tolerance else "  DIFFERS")
            for x in self.splits
        ]
        head = f"{self.method} on {self.task}: the gradient of {self.decisions:,} decisions, and its largest difference"
        said = "the gradient does not depend on the split" if self.passed else "the gradient DEPENDS ON THE SPLIT"
        return [f"{head} if they are split", *rows, f"{said} (tolerance {self.tolerance:g})"]

    def summary(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "passed": self.passed}


class _Seen(Exception):
    """The first update of a loop has been seen."""


def check(
    method: str, task: Any = None, *, tolerance: float | None = None, count: int = 2, **keywords: Unpack[Keywords]
) -> Checked:
    """Sample one rollout, and compute the gradient of the method's first update on it, whole and split.

    The split ones are: micro-batches of one row, of a third of the rows, and of random rows; for a language model rows
    packed by length, and prompts computed once for each completion; padding, more rows and steps behind the mask; and
    `count` ranks, threads that each assign credit and weights to their own rows. Minibatches are not compared: each is
    meant to have a gradient of its own, so the batch is the whole rollout. tolerance: by default 1e-6 in float64
    (control, exact worlds), 1e-3 in float32 and 5e-2 in 16 bits. Autocast is set aside: its rounding depends on the
    split, and would hide what else does. The keywords are those of Training.

    Raises UserError as Training does, for a tolerance or count that makes no sense, and if the gradient is 0.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(f"tolerance is {tolerance}: it must be 0 or more and finite")
    if count < 2:
        raise UserError(f"ranks is {count}: compare at least 2")
    values: dict[str, Any] = dict(keywords)
    with _in_float64(), Training(method, task, **values) as training:
        world: Any = training.world
        options = _as_one_batch(training.options)
        modules: list[nn.Module] = [x for x in (world.policy, world.critic) if x is not None]
        with training._inside(), without_autocast(*modules):
            rollout = training.sample(world.policy)
            rollout = replace(rollout, reward=rollout.reward.to(rollout.logp.dtype))  # environments give float32
            rows = len(rollout.mask)
            if rows < count:
                raise UserError(f"a rollout has {rows} rows, too few for {count} ranks: sample more, or check fewer")
            made = partial(_learner, options, world)
            whole, batch = _gradient(made(rollout))
            if not any(bool(x.any()) for x in whole.values()):
                raise UserError(
                    "the gradient of this rollout is 0, since all its advantages are: sample more, or take another seed"
                )
            precision = max((TOLERANCES.get(p.dtype, 0.0) for p in world.policy.parameters()), default=0.0)
            found = Checked(method, world.name, int(batch.mask.sum()), precision if tolerance is None else tolerance)
            for name, split in _micro_batches(len(batch.mask), world.policy).items():
                _compare(found, name, whole, _gradient(made(rollout), split)[0])
            if getattr(world.policy, "shared", False):
                world.policy.shared = False
                _compare(found, "prompts apart", whole, _gradient(made(rollout))[0])
                world.policy.shared = True
            padded = partial(_padded, steps=world.kind == "control")
            _compare(found, "padding", whole, _gradient(made(rollout), change=padded)[0])
            parts = [rollout.rows(torch.arange(rows).tensor_split(count)[i]) for i in range(count)]
            _compare(found, f"{count} ranks", whole, _of_ranks(made, parts))
    return found


@contextmanager
def _in_float64() -> Iterator[None]:
    """New modules and numbers are float64, so that rounding is far below any other difference."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _as_one_batch(options: Any) -> Any:
    """The options with the whole rollout as one batch, sampled once."""
    values: dict[str, Any] = {"minibatch_size": None, "micro_batch": None, "micro_batch_tokens": None, "epochs": 1}
    values |= {
        "sampling_rounds": 1,
        "overlap": False,
        "lag": 0,
        "compile": "off",
        "gradient_noise": "off",
        "mix": None,
        "max_grad_norm": math.inf,
    }
    return replace(options, **{name: x for name, x in values.items() if hasattr(options, name)})


def _learner(options: Any, world: Any, rollout: Rollout) -> Learner:
    """The method on copies of the world's modules, always on the same rollout."""
    policy, critic = deepcopy((world.policy, world.critic))
    sample = _Constant(rollout, getattr(world.sample, "length", None))
    return compose(options, policy, critic, sample, world.reference)


class _Constant:
    """A sampler that always returns the same rollout."""

    def __init__(self, rollout: Rollout, length: int | None) -> None:
        self.rollout = rollout
        if length is not None:
            self.length = length

    def __call__(self, policy: Any) -> Rollout:
        return replace(self.rollout)


def _gradient(
    learner: Learner, split: Split = None, change: Callable[[Batch], Batch] = lambda batch: batch
) -> tuple[dict[str, Tensor], Batch]:
    """The gradient of the loop's first update by parameter, split by ascend, and its batch.

    change: the batch -> one that should have the same gradient.
    """
    named = {name: p for name, p in learner.objective.named_parameters() if p.requires_grad}
    update, seen = ascend(SGD(list(named.values()), lr=0.0), micro_batch=split), list[Batch]()

    def first(objective: Any, batch: Batch) -> Any:
        update(objective, change(batch))
        seen.append(batch)
        raise _Seen

    with suppress(_Seen):
        next(learner.loop(learner.sample, learner.credit, learner.objective, first))
    nothing = {name: torch.zeros_like(p) for name, p in named.items()}
    return nothing | {name: p.grad.clone() for name, p in named.items() if p.grad is not None}, seen[0]


def _of_ranks(made: Callable[[Rollout], Learner], parts: list[Rollout]) -> dict[str, Tensor]:
    """The gradient of ranks that have a part of the rollout each, which all of them hold in the end."""
    learners = ranks.simulated([partial(made, part) for part in parts])
    gradients = ranks.simulated([partial(_gradient, learner) for learner in learners])
    return gradients[0][0]


def _micro_batches(rows: int, policy: Any) -> dict[str, Split]:
    """Ways to part the rows, by their names."""
    order, few, many = torch.randperm(rows), max(1, rows // 64), max(1, rows // 3)
    found: dict[str, Split] = {
        f"micro-batches of {few:,} row{'s' * (few > 1)}": few,
        f"micro-batches of {many:,} rows": many,
        "micro-batches of 1 row and the rest": lambda obs: ([order[:1], order[1:]], {}),
    }
    parts = getattr(policy, "parts", None)
    if parts is not None:
        found["packing"] = lambda obs: parts(obs, rows=max(1, rows // 3))
    return found


def _padded(batch: Batch, *, steps: bool) -> Batch:
    """The batch with more rows that do not count, and more steps, where rows have several.

    steps: whether the second dimension of observations is the steps. (On an exact world they are rows of tokens.)
    """
    longer = batch.mask.shape[1] > 1

    def more_steps(x: Tensor) -> Tensor:
        return torch.cat([x, x[:, -1:].expand(-1, MORE, *x.shape[2:])], 1)

    obs = batch.obs
    if hasattr(obs, "completion"):  # prompts have padding on the left
        left = {name: pad(getattr(obs, name), (MORE, 0)) for name in ("prompt", "prompt_mask")}
        right = {name: more_steps(getattr(obs, name)) for name in ("completion", "completion_mask")}
        right["completion_mask"][:, -MORE:] = False
        batch = batch._replace(obs=obs._replace(**left, **right))
    elif longer and steps and isinstance(obs, Tensor):
        batch = batch._replace(obs=more_steps(obs))
    else:
        longer = False
    if longer:
        columns: dict[str, Any] = {
            name: more_steps(x) for name, x in batch._asdict().items() if name != "obs" and isinstance(x, Tensor)
        }
        columns["mask"][:, -MORE:] = False
        columns["weight"] = columns["weight"].where(columns["mask"], 0.0)
        batch = batch._replace(**columns)
    rows = len(batch.mask)
    index = torch.cat([torch.arange(rows), torch.arange(MORE) % rows])
    batch = tree_map(lambda x: x[index], batch)
    real = (torch.arange(len(index), device=batch.mask.device) < rows).unsqueeze(1)
    return batch._replace(mask=batch.mask & real, weight=batch.weight.where(real, 0.0))


def _compare(found: Checked, name: str, whole: dict[str, Tensor], split: dict[str, Tensor]) -> None:
    """Write down how far a split's gradient is from that of the whole batch."""
    largest = max(float(x.abs().max()) for x in whole.values())
    each = {}
    for parameter, x in whole.items():
        unit = max(float(x.abs().max()), SMALL * largest)
        distance = float((split[parameter] - x).abs().max())
        each[parameter] = distance / unit if unit else (math.inf if distance else 0.0)
    worst = max(each, key=lambda parameter: each[parameter])
    found.parameters[name] = each
    found.splits.append(Difference(name, each[worst], worst))
