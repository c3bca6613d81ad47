"""policygrad export: a policy as one graph, from an environment's observation to its action, for ONNX or torch.export.

The graph is what `run.act` computes: normalizer, network, mode of the distribution, and the way to the environment. It
is written only after it has given the same actions on 1,000 observations.
"""

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Distribution

import policygrad
from policygrad.control import ObservationNormalizer
from policygrad.control.acting import Mode
from policygrad.control.checks import stored_dtype
from policygrad.control.masks import random_masks
from policygrad.control.separate import SeparatePolicies
from policygrad.control.spaces import Flat, FlatActions
from policygrad.control.tensors import normalized, to_environment
from policygrad.errors import Note, UserError, ending, listed, one_line, shortened, type_of
from policygrad.files import as_path, write_bytes
from policygrad.rollout import state_size
from policygrad.train.run import Run, arithmetic

Format = Literal["onnx", "torch-export"]
SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}
OBSERVATIONS = 1000  # on which the actions are compared
TOLERANCE = 100 * torch.finfo(torch.float32).eps  # of a continuous action, relative to the larger of 1 and its size
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(run: Run | Path | str, *, format: Format = "onnx", out: Path | str | None = None) -> Path:
    """Write a run's policy as one graph, and return the file; by default policy.onnx or policy.pt2 in its directory.

    run: a run on control, or its directory, which is data as for `Run.load`. The input `observation` [B, ...] is a
    batch of any size, in the shape and type of the observation space; composite observations are flattened before, as
    gymnasium.spaces.flatten does, and unsigned integers of more than 8 bits are int64. The output `action` [B, ...] is
    what the environment takes, in its type: the mode of the distribution, normalized and clipped as in `run.act`.

    The graph is checked to give the actions of `run.act` on 1,000 observations: exactly where they are whole numbers,
    else within 100 roundings of float32 (1.2e-5, relative to the larger of 1 and the action). Raises UserError if it
    does not, or cannot be made.
    """
    if format not in SUFFIX:
        raise UserError(f"format is {shortened(format, 30)}: it must be one of {', '.join(SUFFIX)}")
    run = run if isinstance(run, Run) else Run.load(run)
    if run.world.kind == "language":
        where = "RUN/model" if run.directory is None else f"{ending(str(run.directory), 60)}/model"
        raise UserError(f"a language model needs no export: {where} is in Hugging Face's layout already")
    if isinstance(run.policy, SeparatePolicies):
        raise UserError("export is of one policy, and this run has one for each agent: use policygrad.load and act")
    if run.world.kind == "control" and state_size(run.policy):
        raise UserError("export is of policies without memory, and this one has a state: use policygrad.load and act")
    if run.world.kind != "control":
        raise UserError(f"export is for control, and this run is on {run.world.name}: its policy is a table")
    if out is None and run.directory is None:
        raise UserError(f"the run has no directory: give out, a file such as policy{SUFFIX[format]}")
    path = as_path(out) if out is not None else Path(str(run.directory)) / f"policy{SUFFIX[format]}"
    if path.suffix != SUFFIX[format]:
        raise UserError(f"out is {ending(str(path), 60)}: a file of {format} ends in {SUFFIX[format]}")
    missing = [name for name in PACKAGES if find_spec(name) is None] if format == "onnx" else []
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed for ONNX: pip install policygrad[export]")
    if names := _around(run):
        said = f"the graph takes observations as the environment's wrappers give them ({listed(names, 80)})"
        warnings.warn(f"{said}, and its actions go to the outermost one", Note, stacklevel=2)
    with arithmetic(run.world, run.options.threads):
        content = _graph_in(format, run)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{ending(str(path), 80)} cannot be written ({error.strerror}): choose another file") from error
    return path


class Acting(nn.Module):
    """observation [B, ...], as the environment gives it -> action [B, ...], as the environment takes it."""

    mean: Tensor
    std: Tensor
    kept: Tensor | None

    def __init__(self, policy: nn.Module, normalizer: ObservationNormalizer | None, space: spaces.Space) -> None:
        super().__init__()
        self.mode, self.space, self.normalizes = Mode(policy), space, normalizer is not None
        kept = None if normalizer is None or normalizer.kept is None else torch.from_numpy(normalizer.kept)
        self.register_buffer("kept", kept)
        if normalizer is not None:
            self.register_buffer("mean", torch.from_numpy(normalizer.statistics.mean))
            self.register_buffer("std", torch.from_numpy(normalizer.statistics.var).sqrt())

    def forward(self, observation: Tensor) -> Tensor:
        obs = normalized(observation, self.mean, self.std, self.kept) if self.normalizes else observation
        obs = obs.to(torch.get_default_dtype()) if obs.is_floating_point() else obs
        certain = self.mode(obs.unsqueeze(1))
        return to_environment(certain.sample()[:, 0], certain.distribution, self.space)


def _around(run: Run) -> list[str]:
    """The wrappers around the environment, as far as they are known: the options', and those that have learned."""
    world: Any = run.world
    learned = [x.partition(".")[0] for x in world.learned() or {} if x.endswith(".count")]
    return list(dict.fromkeys([*(x.partition(":")[0] for x in run.options.wrap), *learned]))


def _graph_in(format: Format, run: Run) -> bytes:
    """The file's content, checked. Raises UserError."""
    world: Any = run.world
    obs = observations(world)
    make = _onnx if format == "onnx" else _torch_export
    try:
        with _tracing(), torch.no_grad():
            graph = (
                Acting(deepcopy(run.policy).cpu(), world.normalizer, world.action_space).eval().requires_grad_(False)
            )
            content, act = make(graph, torch.from_numpy(obs[:3]), _described(run))
            found = [act(obs), act(obs[:1])]
    except UserError:
        raise
    except Exception as error:  # of torch, onnxscript or onnxruntime
        name = type(error.__cause__ or error).__name__
        raise UserError(
            f"{type_of(run.policy)} cannot be exported to {format} ({name}: {_first_line(error)})"
        ) from error
    actions, taken = world.action_space, run.act(obs)
    expected = actions.vectors(taken) if isinstance(actions, FlatActions) else np.asarray(taken)
    for batch, actions in zip((expected, expected[:1]), found, strict=True):
        _check_same(actions, batch, format)
    return content


def _check_same(found: np.ndarray, expected: np.ndarray, format: str) -> None:
    """Raise UserError unless the graph's actions are those of the run."""
    refused = f"the graph of {format} is not the policy, and is not written: "
    if found.shape != expected.shape or found.dtype != expected.dtype:
        said = f"{found.dtype} {list(found.shape)} in place of {expected.dtype} {list(expected.shape)}"
        raise UserError(f"{refused}its actions are {said}")
    if expected.dtype.kind == "f":
        wrong = ~(np.abs(found - expected) <= TOLERANCE * np.maximum(1, np.abs(expected)))
    else:
        wrong = found != expected
    count = int(wrong.reshape(len(wrong), -1).any(1).sum())
    if count:
        raise UserError(f"{refused}its action differs on {count:,} of {len(wrong):,} observations")


def observations(world: Any, count: int = OBSERVATIONS) -> np.ndarray:
    """Observations [count, ...] of a world, in their type: around the normalizer's statistics, else around 0."""
    obs, space = _numbers(world.observation_space, world.normalizer, count), world.observation_space
    if isinstance(space, Flat) and space.mask is not None:
        obs[:, space.mask] = random_masks(count, world.action_space)
    return obs


def _numbers(space: Any, normalizer: ObservationNormalizer | None, count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    shape, dtype = (count, *(space.shape or ())), np.dtype(space.dtype)
    if isinstance(space, spaces.Discrete):
        return generator.integers(space.start, space.start + space.n, shape, dtype=np.int64)
    if dtype.kind == "f":
        mean, std = (0.0, 1.0) if normalizer is None else (normalizer.statistics.mean, normalizer.statistics.var**0.5)
        return np.clip(mean + 2 * std * generator.normal(size=shape), space.low, space.high).astype(dtype)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(dtype)
    low, high = (np.clip(np.asarray(x, np.float64), -(2.0**31), 2.0**31) for x in (space.low, space.high))
    drawn = np.floor(low + generator.random(shape) * (high - low + 1)).clip(low, high).astype(dtype)
    return drawn.astype(stored_dtype(dtype))


# The formats: (graph, an example, metadata) -> the file's content, and the function of numpy's arrays that it is


Made = tuple[bytes, Callable[[np.ndarray], np.ndarray]]


def _onnx(graph: nn.Module, example: Tensor, metadata: dict[str, str]) -> Made:
    import onnxruntime

    shapes = {"observation": {0: torch.export.Dim("batch")}}
    names: dict[str, Any] = {"input_names": ["observation"], "output_names": ["action"], "dynamic_shapes": shapes}
    program: Any = torch.onnx.export(graph, (example,), dynamo=True, verbose=False, **names)
    for node in program.model.graph.all_nodes():  # the lines of code that it comes from, with their paths here
        node.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    content = program.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda obs: session.run(["action"], {"observation": obs})[0]


def _torch_export(graph: nn.Module, example: Tensor, metadata: dict[str, str]) -> Made:
    shapes = {"observation": {0: torch.export.Dim("batch")}}
    program = torch.export.export(graph, (example,), dynamic_shapes=shapes)
    for module in program.graph_module.modules():  # the lines of code that it comes from, with their paths here
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"policygrad.json": json.dumps(metadata)})
    again = torch.export.load(io.BytesIO(file.getvalue())).module()
    return file.getvalue(), lambda obs: again(torch.from_numpy(obs)).numpy()


def _described(run: Run) -> dict[str, str]:
    """What a file says of itself."""
    world: Any = run.world
    return {
        "policygrad": policygrad.__version__,
        "method": run.method,
        "environment": world.name,
        "policy": run.stage.policy(),
        "observation": one_line(world.observation_space, 500),
        "action": one_line(world.action_space, 500),
    }


def _first_line(error: BaseException) -> str:
    return one_line(str(error.__cause__ or error).strip().partition("\n")[0], 80)


@contextmanager
def _tracing() -> Iterator[None]:
    """Keep what exporters print, log and warn about off the terminal, and distributions from looking at numbers."""
    before, said, validated = logging.root.manager.disable, io.StringIO(), Distribution._validate_args
    logging.disable(logging.CRITICAL)
    Distribution.set_default_validate_args(False)
    try:
        with redirect_stdout(said), redirect_stderr(said), warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
        Distribution.set_default_validate_args(validated)
