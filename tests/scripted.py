"""Runs whose learning is replaced by a script, so that a test knows which policy is which."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from policygrad.train import compose as composing
from policygrad.train import training as module


def replaced(monkeypatch: pytest.MonkeyPatch, loop: Callable[[nn.Module, nn.Module], Iterator[Any]]) -> None:
    """Put a loop of the test's own in the place of whatever the options ask for."""

    def compose(options: Any, policy: Any, critic: Any, *rest: Any) -> composing.Learner:
        learner = composing.compose(options, policy, critic, *rest)
        return dataclasses.replace(learner, loop=lambda *_: loop(policy, critic))

    monkeypatch.setattr(module, "compose", compose)


def fill(module: nn.Module, value: float) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(value)


def on_disk(directory: Path) -> set[float]:
    tensors = load_file(directory / "policy.safetensors")
    return {x for name, tensor in tensors.items() if name.startswith("policy.") for x in tensor.flatten().tolist()}
