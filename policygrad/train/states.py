"""The state of a run as tensors and JSON, and back: every type and every bit is kept. Nothing is unpickled."""

import math
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor


def encoded(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The state as JSON, and its tensors and arrays by name, which stand in the JSON for them.

    What JSON lacks is an object with one name that begins with `$`: tuples, queues, dicts whose keys are no texts,
    infinity, NaN and NumPy's numbers. Tensors that share their memory are kept once. Raises TypeError for anything
    else.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}

    def kept(x: Tensor, path: str) -> str:
        place = (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) if x.numel() else len(names)
        if place not in names:
            names[place] = path
            tensors[path] = x
        return names[place]

    def written(x: Any, path: str) -> Any:
        if x is None or type(x) in (bool, int, str):
            return x
        if type(x) is float:
            return x if math.isfinite(x) else {"$float": str(x)}
        if isinstance(x, Tensor):
            return {"$tensor": kept(x.detach(), path)}
        if isinstance(x, np.ndarray):
            arrays.append(np.array(x, order="C"))  # it lives until the tensors are written: its memory is its name
            return {"$array": kept(torch.from_numpy(arrays[-1]), path)}
        if isinstance(x, np.generic) and x.dtype.kind in "biuf":
            return {"$number": [x.dtype.str, written(x.item(), path)]}
        if isinstance(x, list | tuple | deque):
            entries = [written(entry, f"{path}/{i}") for i, entry in enumerate(x)]
            if isinstance(x, deque):
                return {"$deque": [x.maxlen, entries]}
            return entries if isinstance(x, list) else {"$tuple": entries}
        if isinstance(x, dict):
            if all(type(name) is str and not name.startswith("$") for name in x):
                return {name: written(entry, f"{path}/{name}") for name, entry in x.items()}
            return {"$dict": [[written(k, path), written(entry, f"{path}/{k}")] for k, entry in x.items()]}
        raise TypeError(f"{path} is {type(x).__name__}, which no checkpoint holds")

    arrays: list[np.ndarray] = []
    return written(state, ""), tensors


def decoded(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The state that was encoded. Raises KeyError, TypeError or ValueError for what `encoded` has not written."""
    if isinstance(tree, list):
        return [decoded(x, tensors) for x in tree]
    if not isinstance(tree, dict):
        return tree
    first: tuple[str, Any] = next(iter(tree.items()), ("", None))
    tag, content = first
    match tag:
        case "$float":
            return float(content)
        case "$tensor":
            return tensors[content].clone()  # in memory as torch lays it out, on which the last bits may depend
        case "$array":
            return tensors[content].numpy().copy()
        case "$number":
            kind, x = content
            return np.dtype(kind).type(decoded(x, tensors))
        case "$tuple":
            return tuple(decoded(content, tensors))
        case "$deque":
            return deque(decoded(content[1], tensors), content[0])
        case "$dict":
            return {decoded(k, tensors): decoded(x, tensors) for k, x in content}
    if tag.startswith("$"):
        raise ValueError(f"{tag} is unknown")
    return {name: decoded(x, tensors) for name, x in tree.items()}
