"""The global random generators of Python, NumPy and torch: a run has states of its own, which it swaps in and out."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

# ruff: noqa: NPY002 - the legacy generator is the global one


class Generators:
    """States of the global generators, determined by a seed.

    Environments, policies and rewards may draw from any of them, and the seed of a run determines all of its numbers.
    """

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.seed, self.device = seed, device
        self.torch = torch.Generator().manual_seed(seed).get_state()
        self.cuda: torch.Tensor | None = None  # until it is first used
        self.python = random.Random(seed).getstate()
        bits = np.random.MT19937(np.random.SeedSequence(seed))
        self.numpy: Any = np.random.RandomState(bits).get_state()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Use these states, and keep what becomes of them; restore the caller's afterwards."""
        on_cuda = self.device.startswith("cuda")
        outside: Any = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([self.device] if on_cuda else []):
            torch.set_rng_state(self.torch)
            random.setstate(self.python)
            np.random.set_state(self.numpy)
            if on_cuda and self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            elif on_cuda:
                torch.cuda.manual_seed(self.seed)
            try:
                yield
            finally:
                self.torch, self.python, self.numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
                if on_cuda:
                    self.cuda = torch.cuda.get_rng_state(self.device)
                random.setstate(outside[0])
                np.random.set_state(outside[1])

    def state_dict(self) -> dict[str, Any]:
        """The states as tensors and numbers."""
        _, (*key, position), normal = self.python
        _, words, at, has_normal, cached = self.numpy
        return {
            "torch": self.torch,
            "cuda": self.cuda,
            "python": {"key": torch.tensor(key), "position": position, "normal": normal},
            "numpy": {
                "key": torch.from_numpy(words.astype(np.int64)),
                "position": int(at),
                "has_normal": int(has_normal),
                "normal": float(cached),
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state_dict."""
        python, numpy = state["python"], state["numpy"]
        self.torch, self.cuda = state["torch"], state["cuda"]
        self.python = (3, (*python["key"].tolist(), python["position"]), python["normal"])
        words = numpy["key"].numpy().astype(np.uint32)
        self.numpy = ("MT19937", words, numpy["position"], numpy["has_normal"], numpy["normal"])
