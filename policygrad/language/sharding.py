"""Models whose weights are sharded over the ranks (FSDP2): each rank holds a part of every tensor.

A pass gathers one transformer block after another and lets it go again, so all ranks make the same passes (ranks.
as_often). Where they do not, as in sampling, all weights are gathered once, with `whole`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from policygrad import ranks
from policygrad.errors import UserError
from policygrad.language.policies import ValueModel


def shard(module: nn.Module, *, once_a_step: bool = False) -> None:
    """Shard a policy or a value model over the ranks, in place: each transformer block, and the rest as its root.

    The gradient of a rank's backward pass is then this rank's part of the sum over all ranks (torch takes the mean).
    once_a_step: gradients of micro-batches add up on each rank, whole, and are summed over the ranks after the last
    one (ranks.summed_with_last). With autocast to bfloat16, weights are gathered in it, which is half of what is sent,
    and computed with; each rank's part of them is float32, and so are sums of gradients. A critic's head stays float32.
    The parameters become DTensors, so an optimizer is made afterwards. Raises UserError for a model without blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (ranks.size(),))
    layers = blocks(module)
    if not layers:
        raise UserError("the model has no list of transformer blocks that could be sharded: leave shard out")
    computed = getattr(module, "autocast", None)
    mixed = MixedPrecisionPolicy(param_dtype=computed, reduce_dtype=computed and torch.float32)
    if computed is not None and isinstance(module, ValueModel):
        module.head.register_forward_hook(lambda head, given, value: value.clone())  # FSDP2 warns of views
        fully_shard(module.head, mesh=mesh)
    for part in (*layers, module):
        fully_shard(part, mesh=mesh, mp_policy=mixed)
    for part in _parts(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
        part.once_a_step = once_a_step
    with torch.no_grad():  # torch takes for the root what is called first
        module(torch.zeros(1, 2, dtype=torch.long, device=device))
    cut(module)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a model: the entries of its longest list of modules that is in no other list."""
    lists = [(name, x) for name, x in module.named_modules() if isinstance(x, nn.ModuleList)]
    outer = [x for name, x in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    return list(max(outer, key=lambda x: len(list(x)), default=nn.ModuleList()))


def is_sharded(module: nn.Module | None) -> bool:
    """Whether a module's parameters are shards."""
    return module is not None and bool(_parts(module))


@contextmanager
def whole(*modules: nn.Module) -> Iterator[None]:
    """All weights on every rank inside the block, for passes without gradient, of which each rank makes its own number.

    All ranks enter and leave it together. Modules that are not sharded are as they were.
    """
    parts = [part for module in modules for part in _parts(module)]
    roots = {id(module) for module in modules}
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(id(part) not in roots, recurse=False)


def cut(*modules: nn.Module | None) -> None:
    """Let go of what passes without gradient have gathered: a root keeps its weights, for a backward pass to come."""
    for module in modules:
        if module is not None and (parts := _parts(module)):
            parts[0].reshard()


def _parts(module: nn.Module) -> list[Any]:
    """The modules that are gathered together, the root first."""
    return [x for x in module.modules() if hasattr(x, "set_reshard_after_forward")]
