"""Updates: gradient ascent, the natural step, and a line search inside a trust region.

An update is (objective, batch) -> metrics, and changes the objective's parameters.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.utils._pytree import tree_map

from policygrad import ranks
from policygrad.compiling import MOVED, VALUE, gradient, gradient_step, has_rule
from policygrad.errors import NonFiniteError, UserError, shortened
from policygrad.linalg import add_to, conjugate_gradient, fisher_vector_product, flat_gradient
from policygrad.rollout import Batch, Everywhere, Split, measured, micro_batches, parts_of

Metrics = dict[str, Tensor]


class Objective(nn.Module, ABC):
    """The function of a batch that a method maximizes. Its parameters are the parameters to train."""

    policy: nn.Module  # and `critic`, if the objective has a value loss

    @abstractmethod
    def forward(self, batch: Batch) -> tuple[Tensor, Metrics]:
        """The scalar to maximize, and its metrics."""

    def adapt(self, metrics: Metrics) -> Metrics:
        """Adapt the coefficients after an update with these metrics. Returns the coefficients that the update used."""
        return {}


class Measured(Objective):
    """An objective that also measures how far its policy moves."""

    @abstractmethod
    def divergence(self, batch: Batch) -> Callable[[], Tensor]:
        """The mean KL(old, new) as a function of the parameters; old is the policy at the time of this call."""


Scalar = Callable[[Batch], tuple[Tensor, Metrics]]  # an objective, or any function of this form
Update = Callable[[Any, Batch], Metrics]  # (objective, batch) -> metrics
Beside = Callable[[], tuple[Scalar, Batch]]  # a further function of the same parameters, and what it is a function of
# The step size along x = F^-1 g: (g.x) -> alpha.
StepSize = Callable[[Tensor], Tensor]


def ascend(
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    max_grad_norm: float = math.inf,
    micro_batch: Split = None,
    compiled: bool = False,
    varying: bool = False,
    beside: Beside | None = None,
) -> Update:
    """theta <- theta + step(grad objective): one ascent step of a torch optimizer, or of several.

    A gradient with a norm above `max_grad_norm` is scaled down to it. A critic that shares no parameter with the policy
    has a norm of its own, so that the size of its error does not shrink the policy's step. micro_batch: rows that the
    objective sees at a time while gradients accumulate, or a function that parts them (rollout.Split); it changes only
    time and memory. compiled: every step after the optimizer's first is one graph (compiling.gradient_step; of a rank,
    objective and gradient are one, compiling.gradient): the same step to rounding, so a run that goes on with an
    optimizer that was loaded takes the way of one that was never stopped. varying: the batches have different numbers
    of rows, for which there is one graph from the start. beside: asked at each step for a term that is added to the
    objective, on a batch of its own, such as demonstrations; nothing is compiled then.

    The update returns the objective's metrics, those of the split, and gradient_norm and critic_gradient_norm, the
    norms before scaling. A batch without a decision that counts changes nothing: the optimizer's moments would move the
    parameters. Of several ranks, batch is a rank's own part: the gradient is that of all parts, in one sum after the
    backward pass, and so are norms and metrics. It raises NonFiniteError before the step if the objective or a gradient
    is NaN or infinite, and UserError at its first step if the optimizer's parameters are not the objective's, or no
    gradient reaches them.
    """
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    checked: Scalar | None = None
    parts: dict[str, list[Tensor]] = {}
    step: Callable[[Batch], Metrics | None] | None = None
    graph: Callable[[Batch], Any] | None = None  # of a rank

    def update(objective: Scalar, batch: Batch) -> Metrics:
        nonlocal checked, parts, step, graph
        first = objective is not checked
        if first:
            parts, step, graph = _parts(objective, optimizers), None, None
        parted, measured = ((), {}) if micro_batch is None else parts_of(batch.obs, micro_batch)
        graphed = compiled and beside is None and len(parted) < 2 and len(optimizers) == 1 and _begun(optimizers)
        if graphed and ranks.size() == 1 and (step is not None or has_rule(optimizers[0])):
            if step is None:
                step = gradient_step(objective, optimizers[0], parts, max_grad_norm, varying)
            if (found := step(batch)) is not None:
                checked = objective
                return {**_of_graph(found, batch, parts), **measured}
        whole_weight, counts = _everywhere(batch)
        if not counts:
            return {**_of_nothing(objective, batch, parts), **measured}
        for one in optimizers:
            one.zero_grad()
        further = [] if beside is None else [_parted(*beside(), micro_batch)]
        if whole_weight is None:
            parted_batch: Any = micro_batches(batch, parted) if len(parted) > 1 else [(1.0, batch)]
            whole, total = _with_further(_backward(objective, parted_batch), further)
        else:
            rows = parted if len(parted) > 1 else len(batch.mask)
            own = ranks.as_often(list(micro_batches(batch, rows, whole_weight)), partial(_idle, batch))
            owners = [p for found in parts.values() for p in found]
            if graphed and (graph is not None or has_rule(optimizers[0])):
                graph = graph or gradient(objective, owners, varying)
            whole, total = _backward_everywhere(objective, batch, own, owners, graph, further)
        if first:
            _check_reached(parts)
            checked = objective
        norms = _clipped_norms(whole, parts, max_grad_norm)
        for one in optimizers:
            one.step()
            one.param_groups[0]["begun"] = True  # part of its state_dict
        return {**total, **norms, **measured}

    return update


def _of_nothing(objective: Scalar, batch: Batch, parts: Iterable[str]) -> Metrics:
    """The metrics of a batch without a decision that counts: its gradient is 0."""
    with torch.no_grad():
        value, metrics = objective(batch)
    return {**metrics, **{f"{name}gradient_norm": torch.zeros_like(value) for name in parts}}


def _clipped_norms(value: Tensor, parts: Mapping[str, list[Tensor]], most: float) -> Metrics:
    """Scale gradients down to `most`; their norms before. Raises NonFiniteError if one is not finite, or the value."""
    norms = {name: _clipped(found, most) for name, found in parts.items()}
    _check_finite({"the objective": value} | _norms(norms))
    return {f"{name}gradient_norm": x for name, x in norms.items()}


def _of_graph(found: Metrics, batch: Batch, parts: Iterable[str]) -> Metrics:
    """The metrics of a compiled step. Raises NonFiniteError for one that was not taken because of its numbers."""
    value = found.pop(VALUE)
    if not found.pop(MOVED):
        norms = {x: found[f"{x}gradient_norm"] for x in parts}
        if batch.mask.any():
            _check_finite({"the objective": value} | _norms(norms))
        found |= {f"{x}gradient_norm": torch.zeros_like(norm) for x, norm in norms.items()}
    return found


def _clipped(parameters: list[Tensor], most: float) -> Tensor:
    """The norm of the gradient, which is scaled down to `most`. Of shards, the norm is of all ranks'."""
    if not any(map(ranks.is_shard, parameters)):
        return clip_grad_norm_(parameters, most)
    own = [ranks.local(p.grad) for p in parameters if p.grad is not None]
    square = torch.stack([x.square().sum() for x in own]).sum()
    norm = ranks.sum(square).sqrt()
    factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_
    torch._foreach_mul_(own, factor)
    return norm


def _idle(batch: Batch, last: tuple[float, Batch] | None) -> tuple[float, Batch]:
    """A part without weight, for a rank that has fewer than others whose model is sharded."""
    part = tree_map(lambda x: x[:1], batch) if last is None else last[1]
    return 0.0, part._replace(weight=torch.zeros_like(part.weight), everywhere=())


def _everywhere(batch: Batch) -> tuple[float | None, bool]:
    """The weight of a batch of which every rank has a part, and whether a decision of it counts; None: alone."""
    known = measured(batch).everywhere
    return (known.weight, known.counts) if isinstance(known, Everywhere) else (None, bool(batch.mask.any()))


def _backward(objective: Scalar, parts: Iterable[tuple[float, Batch]]) -> tuple[Tensor, Metrics]:
    """The objective and its metrics from the parts with their shares; gradients are added to the parameters."""
    total: Metrics = {}
    whole: Any = 0.0
    for share, part in parts:
        value, metrics = objective(part)
        if not value.requires_grad:
            raise UserError("the objective has no gradient: compute it outside torch.no_grad(), without detach()")
        (-share * value).backward()  # the one minus sign: torch's optimizers descend
        whole = whole + (share * value.detach() if share else torch.zeros_like(value))
        for name, x in metrics.items():
            own = share * x if share else torch.zeros_like(x)
            total[name] = total[name] + own if name in total else own
    return whole, total


def _parted(objective: Scalar, batch: Batch, micro_batch: Split) -> tuple[Scalar, list[tuple[float, Batch]]]:
    """A further objective with the parts of its batch, and their shares of the weight of all ranks."""
    parts = parts_of(batch.obs, micro_batch)[0]
    found = list(micro_batches(batch, parts, ranks.total(float(batch.weight.sum()))))
    return objective, found or [(0.0, batch)]  # every rank has the same metrics


def _with_further(
    found: tuple[Tensor, Metrics], further: Sequence[tuple[Scalar, list[tuple[float, Batch]]]]
) -> tuple[Tensor, Metrics]:
    """The objective and its metrics with those of further ones, whose gradients are added too."""
    whole, total = found
    for objective, parts in further:
        value, metrics = _backward(objective, parts)
        whole, total = whole + value, total | metrics
    return whole, total


def _backward_everywhere(
    objective: Scalar,
    batch: Batch,
    parts: list[tuple[float, Batch]],
    parameters: list[Tensor],
    graph: Callable[[Batch], Any] | None,
    further: Sequence[tuple[Scalar, list[tuple[float, Batch]]]] = (),
) -> tuple[Tensor, Metrics]:
    """The same of the parts of all ranks: one sum of gradients, objective and metrics. graph: compiling.gradient.

    A rank without weight adds zeros, and one whose objective fails adds NaN, so that none waits for it. A parameter
    that no rank's objective reaches keeps no gradient.
    """
    failed: Exception | None = None
    try:
        found = graph(parts[0][1]) if graph is not None and parts else None
        if found is not None:
            ((share, _),), (value, metrics, gradients) = parts, found
            for p, x in zip(parameters, gradients, strict=True):
                p.grad = None if x is None else -share * x
            whole, total = share * value, {name: share * x for name, x in metrics.items()}
        elif parts:
            whole, total = _backward(objective, ranks.summed_with_last(objective, parts))
        else:
            with torch.no_grad():
                whole, total = objective(batch)
            whole, total = torch.zeros_like(whole), {name: torch.zeros_like(x) for name, x in total.items()}
        whole, total = _with_further((whole, total), further)
        objective.names_of_metrics = list(total)  # type: ignore[attr-defined]
    except Exception as error:
        names = getattr(objective, "names_of_metrics", None)
        if names is None:  # the others do not know either, and end with this rank
            raise
        failed, whole = error, parameters[0].new_full((), math.nan).detach()
        total = {name: torch.zeros_like(whole) for name in names}
    learning = [p for p in parameters if p.requires_grad]
    if any(map(ranks.is_shard, learning)):  # their gradients are summed in the backward pass
        numbers = ranks.sum(torch.stack([x.detach().reshape(()) for x in (whole, *total.values())]))
        if failed is not None:
            raise failed
        whole, *found = numbers.unbind()
        return whole, dict(zip(total, found, strict=True))
    gradients = [torch.zeros_like(p, dtype=p.grad_dtype or p.dtype) if p.grad is None else p.grad for p in learning]
    reached = torch.tensor([float(p.grad is not None) for p in learning])
    numbers = torch.stack([x.detach().reshape(()).to(gradients[0]) for x in (whole, *total.values())])
    *gradients, reached, numbers = ranks.sum_all([*gradients, reached.to(numbers), numbers])
    if failed is not None:
        raise failed
    for p, x, count in zip(learning, gradients, reached.tolist(), strict=True):
        p.grad = x if count else None
    whole, *found = numbers.unbind()
    return whole, dict(zip(total, found, strict=True))


def _begun(optimizers: Sequence[Optimizer]) -> bool:
    """Whether each has taken a step, also in the run that its state is of; SGD without momentum has no other state."""
    return all(one.param_groups[0].get("begun", False) for one in optimizers)


class MasterWeights(Optimizer):
    """An optimizer on float32 copies of the bfloat16 parameters, the master weights (Micikevicius et al. 2018,
    1710.03740): a mixin for those of torch.

    bfloat16 has 8 significant bits: an update below 1/512 of a weight would be lost. The copies, `master` in the
    optimizer's state, take it whole; the parameters are the copies, rounded. Gradients are float32, so that
    micro-batches add up in it. Other parameters are the optimizer's own. Raises UserError for float16.
    """

    def __init__(self, params: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(params, *arguments, **options)
        if any(p.dtype == torch.float16 for p in self._parameters()):
            raise UserError(
                "weights in float16 cannot be trained, since small gradients are 0 in it: make them float32 or "
                "bfloat16 (of a language model by dtype, or train an adapter on them by lora_rank)"
            )
        for p in self._rounded():
            p.grad_dtype = torch.float32

    def step(self, closure: Any = None) -> Any:
        with self._masters():
            return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with self._masters():  # torch casts the state to the type of its parameter
            super().load_state_dict(state_dict)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _rounded(self) -> list[nn.Parameter]:
        return [p for p in self._parameters() if p.dtype == torch.bfloat16]

    @contextmanager
    def _masters(self) -> Iterator[None]:
        """The parameters are their copies inside the block; after it, the copies rounded, in the same memory."""
        rounded = [(p, p.data) for p in self._rounded()]
        for p, x in rounded:
            p.data = self.state[p].pop("master") if "master" in self.state[p] else x.float()
            p.grad = None if p.grad is None else p.grad.float()
        try:
            yield
        finally:
            for p, x in rounded:
                master = self.state[p].setdefault("master", p.data)
                p.data = x.copy_(master)


class MasterWeightsAdam(MasterWeights, Adam):
    """Adam on master weights."""


class MasterWeightsAdamW(MasterWeights, AdamW):
    """AdamW on master weights."""


class MasterWeightsSGD(MasterWeights, SGD):
    """SGD on master weights."""


class MasterWeightsMuon(MasterWeights, Muon):
    """Muon on master weights."""


def _parts(objective: Any, optimizers: Sequence[Optimizer]) -> dict[str, list[Tensor]]:
    """The optimizer's parameters: those of a critic that shares none with the policy as `critic_`, the others as ``.

    Raises UserError if the objective has a parameter to learn that the optimizer lacks, or the other way round.
    """
    given = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(objective, nn.Module):  # a function: it may depend on any tensor
        return {"": given}
    known, own = set(given), dict(objective.named_parameters())
    for name, p in own.items():
        if p.requires_grad and p not in known:
            raise UserError(
                f"the optimizer lacks {shortened(name)} of the objective, which would never learn: make it of "
                "objective.parameters() as they are now, or freeze that with requires_grad_(False)"
            )
    if strange := known - set(own.values()):
        shape = tuple(next(p for p in given if p in strange).shape)
        raise UserError(
            f"the optimizer has {len(strange)} parameters that the objective lacks, the first of shape {shape}: make "
            "it of objective.parameters(), and another one for what is fitted apart"
        )
    policy, critic = (
        set() if module is None else set(module.parameters())
        for module in (getattr(objective, name, None) for name in ("policy", "critic"))
    )
    critic = set() if critic & policy else critic
    parts = {"": [p for p in given if p not in critic], "critic_": [p for p in given if p in critic]}
    return {name: found for name, found in parts.items() if found}


def _check_reached(parts: dict[str, list[Tensor]]) -> None:
    """Raise UserError if no gradient has reached the policy, or the critic."""
    for name, found in parts.items():
        if all(p.grad is None for p in found) and any(p.requires_grad for p in found):
            raise UserError(
                f"no gradient reaches the {'critic' if name else 'policy'}: its output does not depend on its "
                "parameters; look for detach(), torch.no_grad() or .data in its forward"
            )


def kl_radius(slope: Tensor, *, delta: float) -> Tensor:
    """sqrt(2 delta / g.F^-1 g): the step along F^-1 g with KL delta to second order (Peters & Schaal 2008; TRPO)."""
    return (2 * delta / slope).sqrt()


def learning_rate(slope: Tensor, *, rate: float) -> Tensor:
    """alpha = rate: a fixed learning rate along F^-1 g (Kakade 2001)."""
    return torch.full_like(slope, rate)


def natural_step(*, step_size: StepSize, damping: float = 0.1, cg_iters: int = 10) -> Update:
    """theta <- theta + alpha F^-1 g (Kakade 2001), F the Fisher matrix, alpha = step_size(g.F^-1 g).

    Conjugate gradient on Fisher-vector products finds F^-1 g, with `damping` added to F's diagonal. The update returns
    the objective's metrics, gradient_norm, step_size, kl_old (of the step) and improvement (of the objective). It
    raises NonFiniteError if the objective, the gradient or the step is NaN or infinite; nothing has changed then. Of
    several ranks, batch is a rank's own part, and all of this is of all parts.
    """

    def update(objective: Measured, batch: Batch) -> Metrics:
        at = _Natural(objective, batch, damping, cg_iters)
        alpha = step_size(at.slope).where(at.slope > 0, 0.0)
        with torch.no_grad(), at.restored_on_error() as old:
            add_to(at.parameters, old, alpha * at.direction)
            _check_finite({"the step's norm": torch.stack([p.norm() for p in at.parameters]).norm()})
            gain, step_kl = at.measured()
            improvement = gain - at.value
        norm = at.gradient.norm()
        moved = {"gradient_norm": norm, "step_size": alpha, "kl_old": step_kl, "improvement": improvement}
        return {**at.metrics, **moved}

    return update


def trust_region_step(
    *, delta: float = 0.01, damping: float = 0.1, cg_iters: int = 10, backtracks: int = 10, shrink: float = 0.8
) -> Update:
    """Maximize the objective inside KL(old, new) <= delta (TRPO, Schulman et al. 2015, eq. 12 and appendix C).

    Tries the natural step of KL delta times 1, shrink, shrink^2, ... until the objective has grown and the KL is at
    most delta. If none of `backtracks` trials succeeds, the parameters are restored bit for bit. The update returns the
    objective's metrics, gradient_norm, kl_old and improvement (of the accepted step, else 0), accepted (0 or 1) and
    step_fraction (the share of the full step that was taken). It raises NonFiniteError as natural_step does.
    """

    def update(objective: Measured, batch: Batch) -> Metrics:
        at = _Natural(objective, batch, damping, cg_iters)
        full_step = kl_radius(at.slope, delta=delta).where(at.slope > 0, 0.0) * at.direction
        step_kl, improvement, fraction = (torch.zeros_like(at.value) for _ in range(3))
        accepted = False
        _check_finite({"the step's norm": full_step.norm()})
        with torch.no_grad(), at.restored_on_error() as old:
            for k in range(backtracks):
                add_to(at.parameters, old, shrink**k * full_step)
                gain, moved = at.measured()
                gained = gain - at.value
                accepted = bool((gained > 0) & (moved <= delta))
                if accepted:
                    step_kl, improvement, fraction = moved, gained, torch.full_like(at.value, shrink**k)
                    break
            if not accepted:
                at.restore(old)
        return {
            **at.metrics,
            "gradient_norm": at.gradient.norm(),
            "kl_old": step_kl,
            "improvement": improvement,
            "accepted": torch.tensor(float(accepted)),
            "step_fraction": fraction,
        }

    return update


class _Natural:
    """The objective before the step, its gradient g, the direction x = F^-1 g, and the slope g.x = x.F x.

    Each is the sum over the ranks of what their parts of the batch say, by their shares of its weight.
    """

    def __init__(self, objective: Measured, batch: Batch, damping: float, cg_iters: int) -> None:
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.share = 1.0
        if (weight := _everywhere(batch)[0]) is not None:
            ((self.share, batch),) = list(micro_batches(batch, len(batch.mask), weight)) or [(0.0, batch)]
        divergence = objective.divergence(batch)
        self.measured = lambda: self.over([objective(batch)[0], divergence()])
        value, metrics = objective(batch)
        gradient = flat_gradient(value, self.parameters)
        self.gradient, self.value, *found = self.over([gradient, value.detach(), *metrics.values()])
        self.metrics = dict(zip(metrics, found, strict=True))
        _check_finite({"the objective": self.value, "the gradient's norm": self.gradient.norm()})
        with _twice_differentiable(objective):
            product = fisher_vector_product(divergence, self.parameters, damping, lambda x: self.over([x])[0])
        self.direction = conjugate_gradient(product, self.gradient, cg_iters)
        self.slope = self.gradient @ self.direction

    def over(self, own: list[Tensor]) -> list[Tensor]:
        """What all parts come to, from this rank's; a part without weight has no say."""
        if ranks.size() == 1:
            return own
        return ranks.sum_all([self.share * x if self.share else torch.zeros_like(x) for x in own])

    @contextmanager
    def restored_on_error(self) -> Iterator[list[Tensor]]:
        """A block that changes the parameters: if it fails, they are what they were, which is its value."""
        old = [p.detach().clone() for p in self.parameters]
        try:
            yield old
        except BaseException:
            self.restore(old)
            raise

    @torch.no_grad()
    def restore(self, old: list[Tensor]) -> None:
        """Make the parameters what they were."""
        for p, p_old in zip(self.parameters, old, strict=True):
            p.copy_(p_old)


def _twice_differentiable(module: nn.Module) -> AbstractContextManager[Any]:
    """A block whose results have second derivatives: cuDNN's recurrent kernels have none, and torch's own have."""
    if any(isinstance(x, nn.RNNBase) for x in module.modules()):
        return torch.backends.cudnn.flags(enabled=False)
    return nullcontext()


def _norms(norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norms of an optimizer's parts by their names in messages."""
    return {"the critic's gradient's norm" if name else "the gradient's norm": x for name, x in norms.items()}


def _check_finite(numbers: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError before an objective, a gradient or a step that is not finite changes the parameters."""
    found = torch.stack([x.double().reshape(()) for x in numbers.values()]).isfinite()
    if not found.all():  # in one look
        name, x = next((name, x) for (name, x), finite in zip(numbers.items(), found, strict=True) if not finite)
        raise NonFiniteError(f"{name} is {x.item()}: a lower learning rate or smaller rewards may help")
