"""The type in which a network computes. Its weights keep their own."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def has_bfloat16(device: torch.device | str) -> bool:
    """Whether the device computes in bfloat16 itself: Ampere and later, AMX or AVX512-BF16."""
    kind = torch.device(device)
    if kind.type == "cuda":
        return torch.cuda.get_device_capability(kind) >= (8, 0)
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return kind.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in known)


def autocast_to(wanted: str, device: torch.device | str) -> torch.dtype | None:
    """The type of the arithmetic: `bfloat16`; `auto`: it, where the device has it; else None, that of the weights."""
    return torch.bfloat16 if wanted == "bfloat16" or (wanted == "auto" and has_bfloat16(device)) else None


def precision(device: torch.device, dtype: torch.dtype | None) -> Any:
    """torch.autocast to a type inside the block; None: no autocast."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def computed_in(module: nn.Module) -> set[torch.dtype]:
    """The types of a module's weights, and of the arithmetic of those of its parts that have an `autocast`."""
    return {dtype for _, dtype in _under_autocast(module)} | {p.dtype for p in module.parameters()}


@contextmanager
def without_autocast(*modules: nn.Module) -> Iterator[None]:
    """Inside the block each part of the modules computes in the type of its weights."""
    kept = [found for module in modules for found in _under_autocast(module)]
    try:
        for part, _ in kept:
            part.autocast = None
        yield
    finally:
        for part, dtype in kept:
            part.autocast = dtype


def _under_autocast(module: nn.Module) -> list[tuple[Any, torch.dtype]]:
    """The parts whose `autocast` is a type; a user's own module may mean something else by the name."""
    found = [(part, getattr(part, "autocast", None)) for part in module.modules()]
    return [(part, dtype) for part, dtype in found if isinstance(dtype, torch.dtype)]
