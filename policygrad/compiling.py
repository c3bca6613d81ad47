"""One gradient step as one compiled graph: objective, gradient, clipping and the optimizer's own rule. Of several
ranks, the objective and its gradient are one; the rest comes after the sum.

A gradient step of a small network takes the interpreter far longer than the arithmetic. As a graph it is the same step,
to rounding, and leaves the same state in the same optimizer.
"""

import math
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.adam import adam
from torch.optim.sgd import sgd
from torch.utils._pytree import tree_leaves

from policygrad.errors import Note, one_line

VALUE, MOVED = "value of the objective", "whether the parameters moved"  # among the metrics of a compiled step
BACKEND = "inductor"  # torch.compile's
# Guards on modules, functions and classes: what is imported stays what it is.
CODE = {"MODULE_MATCH", "CLOSURE_MATCH", "BUILTIN_MATCH", "CLASS_MATCH"}
INTERRUPTS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def graph(function: Callable[..., Any], otherwise: Callable[..., Any], varying: int = 0) -> Callable[..., Any]:
    """The function as one graph, compiled at its first call; if it has none, `otherwise`, and a Note that says why.

    varying: so many of the first arguments have another number of rows at each call. They are not fixed from the start:
    torch would make a graph for the first number alone, and the results would depend on which number that was.

    torch keeps graphs with a function's code, and few of them: the code of this one is its own.
    """
    assert isinstance(function, FunctionType)
    if hasattr(torch._dynamo.config, "trace_autograd_ops"):  # else the call says that torch.autograd.grad has no graph
        torch._dynamo.config.trace_autograd_ops = True
    if hasattr(torch._dynamo.config, "allow_rnn"):  # their parameters are read, and their kernels never called
        torch._dynamo.config.allow_rnn = True
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    compiled: Any = None
    works: bool | None = None
    guards: Any = _of_data

    def call(*arguments: Any) -> Any:
        nonlocal compiled, works, guards
        if works is False:
            return otherwise(*arguments)
        if compiled is None:
            _look_for_instructions()
            compiled = torch.compile(own, fullgraph=True, backend=BACKEND, options=_options(arguments, guards))
        if varying:
            for x in tree_leaves(arguments[:varying]):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        try:
            with _undisturbed():
                result = compiled(*arguments)
        except Exception as error:
            if works:
                raise
            if guards is not None and isinstance(error, torch._dynamo.exc.InternalTorchDynamoError):
                # To leave guards out torch makes them twice, and fails where one is of a NumPy array's passing copy.
                compiled, guards = None, None
                return call(*arguments)
            works = False
            warnings.warn(f"the update is not compiled ({one_line(error, 120)})", Note, stacklevel=2)
            return otherwise(*arguments)
        works = True
        return result

    return call


def _options(arguments: Any, guards: Any) -> dict[str, Any]:
    """How a graph of these arguments is made. On a CPU, what calls the kernels is C++, too."""
    options: dict[str, Any] = {} if guards is None else {"guard_filter_fn": guards}
    if BACKEND == "inductor" and all(x.device.type == "cpu" for x in tree_leaves(arguments) if isinstance(x, Tensor)):
        options["cpp_wrapper"] = True
    return options


def _look_for_instructions() -> None:
    """Begin to try which vector instructions can be compiled for. torch asks for them once it has traced the function.

    It tries each in a process of its own, which takes a second in all, and here the tracing does not wait for it.
    """
    if BACKEND == "inductor":
        from torch._inductor import codecache, cpp_builder, cpu_vec_isa  # noqa: F401 - two threads must not import them

        threading.Thread(target=cpu_vec_isa.valid_vec_isa_list, daemon=True).start()


def _of_data(guards: list[Any]) -> list[bool]:
    """Which of a graph's guards are checked at each call: all but those that code is still the same.

    Without these a call takes less time. What a run may change (shapes, types, numbers, modes) is checked.
    """
    return [x.guard_type not in CODE for x in guards]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """If a graph is made in the block, interrupts come after it: torch's compiler ends the process on an exception in
    its midst."""
    if threading.current_thread() is not threading.main_thread():  # others are not interrupted
        yield
        return
    came: list[int] = []
    handlers: dict[int, Any] = {}

    def hold(*_: Any) -> None:
        for number in INTERRUPTS:
            if number not in handlers and callable(handler := signal.getsignal(number)):
                handlers[number] = handler
                signal.signal(number, lambda number, frame: came.append(number))

    compiler = torch._dynamo.callback.callback_handler
    compiler.register_start_callback(hold)
    try:
        yield
    finally:
        compiler.remove_start_callback(hold)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def has_rule(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step can be part of a graph: Adam's, AdamW's and SGD's, without variants of their own.

    Muon's is not: it is iterated in bfloat16, which a graph rounds at other places.
    """
    if not isinstance(optimizer, tuple(RULES)):
        return False
    plain = all(
        not group.get(name) for group in optimizer.param_groups for name in ("amsgrad", "maximize", "differentiable")
    )
    return plain and all(p.dtype != torch.bfloat16 for p in _parameters(optimizer))


def gradient_step(
    objective: Any, optimizer: Optimizer, parts: dict[str, list[Tensor]], max_grad_norm: float, varying: bool = False
) -> Callable[[Any], dict[str, Tensor] | None]:
    """(batch) -> metrics: an ascent step like that of `updates.ascend`, as one graph.

    The optimizer has taken a step before; its rates may change after this, its other settings may not. parts: its
    parameters by whose norm they are scaled together. varying: batches have different numbers of rows. If a gradient is
    not finite, or no decision counts, nothing changes, and MOVED is False. What has no graph is not stepped: the result
    is None, and a Note says why.
    """

    # Not read from the optimizer inside the graph: it would be another graph for another rate.
    rule, names = next(x for kind, x in RULES.items() if isinstance(optimizer, kind))
    groups = [(group["params"], *map(group.get, names)) for group in optimizer.param_groups]

    def step(batch: Any, rates: list[Tensor], states: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
        value, metrics = objective(batch)
        owners = [p for found in parts.values() for p in found]
        gradients = dict(zip(owners, torch.autograd.grad(-value, owners, allow_unused=True), strict=True))
        norms = {}
        for name, found in parts.items():
            norm = torch.stack([x.square().sum() for p in found if (x := gradients[p]) is not None]).sum().sqrt()
            norms[f"{name}gradient_norm"] = norm
            if max_grad_norm < math.inf:
                share = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
                gradients |= {p: x * share for p in found if (x := gradients[p]) is not None}
        moved = torch.stack([value.detach().reshape(()), *norms.values()]).isfinite().all() & batch.mask.any()
        with torch.no_grad():
            for (group, *settings), rate, state in zip(groups, rates, states, strict=True):
                reached = [p for p in group if gradients[p] is not None]
                changing = [*reached, *(x for entry in state for name, x in entry.items() if name != "step")]
                before = [x.clone() for x in changing]
                rule(reached, [gradients[p] for p in reached], state, rate, *settings)
                for x, old in zip(changing, before, strict=True):
                    x.copy_(x.where(moved, old))
        return {**metrics, **norms, VALUE: value.detach(), MOVED: moved}

    compiled = graph(step, lambda *arguments: None, int(varying))
    states: list[list[dict[str, Tensor]]] = []
    found_in: tuple[Any, int] | None = None  # the optimizer's state that they are of, and its length

    def update(batch: Any) -> dict[str, Tensor] | None:
        nonlocal states, found_in
        if found_in is None or found_in[0] is not optimizer.state or found_in[1] != len(optimizer.state):
            states = [
                [optimizer.state[p] for p in group["params"] if p in optimizer.state]
                for group in optimizer.param_groups
            ]
            found_in = optimizer.state, len(optimizer.state)
        rates = [torch.as_tensor(group["lr"], dtype=torch.float64) for group in optimizer.param_groups]
        found = compiled(batch, rates, states)
        if found is not None and not found[MOVED]:
            for x in (entry["step"] for state in states for entry in state if "step" in entry):
                x -= 1  # here, because a graph loses what it writes to one number of float64
        return found

    return update


def gradient(
    objective: Any, parameters: list[Tensor], varying: bool = False
) -> Callable[[Any], tuple[Tensor, dict[str, Tensor], list[Tensor | None]] | None]:
    """(batch) -> the objective, its metrics and its gradient, as one graph: of a rank, which then adds up gradients.

    What has no graph is not computed: the result is None, and a Note says why.
    """

    def differentiated(batch: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor | None]]:
        value, metrics = objective(batch)
        return value.detach(), metrics, list(torch.autograd.grad(value, parameters, allow_unused=True))

    return graph(differentiated, lambda batch: None, int(varying))


def _adam(
    parameters: list[Tensor], gradients: list[Tensor], state: list[Any], rate: Tensor,
    betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool,
) -> None:  # fmt: skip
    """torch's own rule. Its corrections of the bias are differences of close numbers: they need float64."""
    steps = [x["step"].double() for x in state]
    adam(
        parameters, gradients, [x["exp_avg"] for x in state], [x["exp_avg_sq"] for x in state], [], steps,
        beta1=betas[0], beta2=betas[1], lr=rate, eps=eps, weight_decay=weight_decay, decoupled_weight_decay=decoupled,
        foreach=False, capturable=True, differentiable=False, fused=False, grad_scale=None, found_inf=None,
        has_complex=False, amsgrad=False, maximize=False,
    )  # fmt: skip
    for x, step in zip(state, steps, strict=True):
        x["step"].copy_(step)


def _sgd(
    parameters: list[Tensor], gradients: list[Tensor], state: list[Any], rate: Tensor,
    momentum: float, dampening: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """torch's own rule, at a rate of 1 from 0, because it takes no tensor as its rate."""
    found = [x.add(p, alpha=weight_decay) for p, x in zip(parameters, gradients, strict=True)]
    moves = [torch.zeros_like(p) for p in parameters]
    buffers = [x["momentum_buffer"] for x in state] if momentum else [None] * len(found)
    sgd(
        moves, found, buffers, lr=1.0, momentum=momentum, dampening=dampening, weight_decay=0.0, nesterov=nesterov,
        foreach=False, fused=False, maximize=False,
    )  # fmt: skip
    for p, move in zip(parameters, moves, strict=True):
        p.add_(rate * move)


# Optimizer -> its rule in a graph, and the settings that it takes besides the rate.
RULES: dict[type[Optimizer], tuple[Callable[..., None], tuple[str, ...]]] = {
    Adam: (_adam, ("betas", "eps", "weight_decay", "decoupled_weight_decay")),
    SGD: (_sgd, ("momentum", "dampening", "weight_decay", "nesterov")),
}


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])
