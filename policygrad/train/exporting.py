"""policygrad export: a policy as one graph, from an environment's observation to its action, for ONNX or torch.export.

The graph is what `run.act` computes: normalizer, network, mode of the distribution, and the way to the environment. It
is written only after it has given the same actions on 1,000 observations. With memory it also takes the state that the
policy had, and returns the next one.
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
from policygrad.control.acting import Certain, Mode
from policygrad.control.checks import stored_dtype
from policygrad.control.masks import random_masks
from policygrad.control.memory import Rows
from policygrad.control.separate import SeparatePolicies
from policygrad.control.spaces import Flat, FlatActions
from policygrad.control.tensors import normalized, to_environment
from policygrad.errors import Note, UserError, ending, listed, one_line, shortened, type_of
from policygrad.files import as_path, write_bytes
from policygrad.precision import without_autocast
from policygrad.rollout import state_size
from policygrad.train.run import Run, arithmetic

Format = Literal["onnx", "torch-export"]
SUFFIX = {"onnx": ".onnx", "torch-export": ".pt2"}
OBSERVATIONS = 1000  # on which the actions are compared
ROWS = 100  # of a policy with memory: they are so many rows of steps
TOLERANCE = 100 * torch.finfo(torch.float32).eps  # of a continuous action, relative to the larger of 1 and its size
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export(run: Run | Path | str, *, format: Format = "onnx", out: Path | str | None = None) -> Path:
    """Write a run's policy as one graph, and return the file; by default policy.onnx or policy.pt2 in its directory.

    run: a run on control, or its directory, which is data as for `Run.load`. The input `observation` [B, ...] is a
    batch of any size, in the shape and type of the observation space; composite observations are flattened before, as
    gymnasium.spaces.flatten does, and unsigned integers of more than 8 bits are int64. The output `action` [B, ...] is
    what the environment takes, in its type: the mode of the distribution, normalized and clipped as in `run.act`.

    A policy with memory has an input `state` and an output `next_state` [B, S] more: zeros are the empty memory, with
    which an episode starts, and each step takes what the one before returned.

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
    with arithmetic(run.world, run.options.threads), without_autocast(run.policy):
        content = _graph_in(format, run)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, content)
    except OSError as error:
        raise UserError(f"{ending(str(path), 80)} cannot be written ({error.strerror}): choose another file") from error
    return path


class Acting(nn.Module):
    """observation [B, ...], as the environment gives it -> action [B, ...], as the environment takes it.

    Of a policy with memory: (observation, state [B, S]) -> (action, next state).
    """

    mean: Tensor
    std: Tensor
    kept: Tensor | None

    def __init__(self, policy: nn.Module, normalizer: ObservationNormalizer | None, space: spaces.Space) -> None:
        super().__init__()
        self.mode, self.space, self.normalizes = Mode(policy), space, normalizer is not None
        self.remembers = state_size(policy) > 0
        kept = None if normalizer is None or normalizer.kept is None else torch.from_numpy(normalizer.kept)
        self.register_buffer("kept", kept)
        if normalizer is not None:
            self.register_buffer("mean", torch.from_numpy(normalizer.statistics.mean))
            self.register_buffer("std", torch.from_numpy(normalizer.statistics.var).sqrt())

    def forward(self, observation: Tensor, state: Tensor | None = None) -> Any:
        obs = normalized(observation, self.mean, self.std, self.kept) if self.normalizes else observation
        obs = (obs.to(torch.get_default_dtype()) if obs.is_floating_point() else obs).unsqueeze(1)
        if state is None:
            return self._taken(self.mode(obs))
        goes_on = torch.zeros_like(state[:, :1], dtype=torch.bool)  # an episode starts where the state is 0
        certain, after = self.mode.unrolled(Rows(obs, goes_on, state.unsqueeze(1), state[:, None, :0]))
        return self._taken(certain), after

    def _taken(self, certain: Certain) -> Tensor:
        return to_environment(certain.sample()[:, 0], certain.distribution, self.space)


def _around(run: Run) -> list[str]:
    """The wrappers around the environment, as far as they are known: the options', and those that have learned."""
    world: Any = run.world
    learned = [x.partition(".")[0] for x in world.learned() or {} if x.endswith(".count")]
    return list(dict.fromkeys([*(x.partition(":")[0] for x in run.options.wrap), *learned]))


def _graph_in(format: Format, run: Run) -> bytes:
    """The file's content, checked. Raises UserError. A policy that computes in bfloat16 becomes a graph of float32."""
    world: Any = run.world
    given = _inputs(run)
    make = _onnx if format == "onnx" else _torch_export
    try:
        with _tracing(), torch.no_grad():
            graph = (
                Acting(deepcopy(run.policy).cpu(), world.normalizer, world.action_space).eval().requires_grad_(False)
            )
            content, act = make(graph, [torch.from_numpy(x[:3]) for x in given], _described(run))
            found = [act(given), act([x[:1] for x in given])]
    except UserError:
        raise
    except Exception as error:  # of torch, onnxscript or onnxruntime
        name = type(error.__cause__ or error).__name__
        raise UserError(
            f"{type_of(run.policy)} cannot be exported to {format} ({name}: {_first_line(error)})"
        ) from error
    if len(given) > 1:
        taken, state = run.act(given[0], torch.from_numpy(given[1]).to(run.options.device))
        expected = [_as_array(taken, world.action_space), state.cpu().numpy()]
    else:
        expected = [_as_array(run.act(given[0]), world.action_space)]
    for outputs in found:
        for what, x, y in zip(("action", "state"), outputs, expected, strict=False):
            _check_same(x, y[: len(x)], format, what)
    return content


def _inputs(run: Run) -> list[np.ndarray]:
    """Observations, and with memory the states that a policy has after 0 to 9 steps of others, 100 rows of each."""
    obs = observations(run.world)
    if not state_size(run.policy):
        return [obs]
    state, found = run.policy.initial(ROWS), []
    for part in np.split(obs, len(obs) // len(state)):
        found.append(state.cpu().numpy())
        _, state = run.act(part[::-1].copy(), state)
    return [obs, np.concatenate(found)]


def _as_array(taken: Any, space: spaces.Space) -> np.ndarray:
    return space.vectors(taken) if isinstance(space, FlatActions) else np.asarray(taken)


def _check_same(found: np.ndarray, expected: np.ndarray, format: str, what: str) -> None:
    """Raise UserError unless the graph's actions, or its states, are those of the run."""
    refused = f"the graph of {format} is not the policy, and is not written: "
    if found.shape != expected.shape or found.dtype != expected.dtype:
        said = f"{found.dtype} {list(found.shape)} in place of {expected.dtype} {list(expected.shape)}"
        raise UserError(f"{refused}its {what} is {said}")
    if expected.dtype.kind == "f":
        wrong = ~(np.abs(found - expected) <= TOLERANCE * np.maximum(1, np.abs(expected)))
    else:
        wrong = found != expected
    count = int(wrong.reshape(len(wrong), -1).any(1).sum())
    if count:
        raise UserError(f"{refused}its {what} differs on {count:,} of {len(wrong):,} observations")


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


Made = tuple[bytes, Callable[[list[np.ndarray]], list[np.ndarray]]]
INPUTS, OUTPUTS = ("observation", "state"), ("action", "next_state")


def _shapes(example: list[Tensor]) -> dict[str, Any]:
    """The dimensions of the inputs that may be of any size."""
    batch = torch.export.Dim("batch")
    return {name: {0: batch} for name, _ in zip(INPUTS, example, strict=False)}


def _onnx(graph: nn.Module, example: list[Tensor], metadata: dict[str, str]) -> Made:
    import onnxruntime

    inputs, outputs = list(INPUTS[: len(example)]), list(OUTPUTS[: len(example)])
    names: dict[str, Any] = {"input_names": inputs, "output_names": outputs, "dynamic_shapes": _shapes(example)}
    program: Any = torch.onnx.export(graph, tuple(example), dynamo=True, verbose=False, **names)
    for node in program.model.graph.all_nodes():  # the lines of code that it comes from, with their paths here
        node.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    content = program.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return content, lambda given: session.run(outputs, dict(zip(inputs, given, strict=True)))


def _torch_export(graph: nn.Module, example: list[Tensor], metadata: dict[str, str]) -> Made:
    program = torch.export.export(graph, tuple(example), dynamic_shapes=_shapes(example))
    for module in program.graph_module.modules():  # the lines of code that it comes from, with their paths here
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={"policygrad.json": json.dumps(metadata)})
    again = torch.export.load(io.BytesIO(file.getvalue())).module()

    def act(given: list[np.ndarray]) -> list[np.ndarray]:
        found = again(*map(torch.from_numpy, given))
        return [x.numpy() for x in (found if isinstance(found, tuple) else (found,))]

    return file.getvalue(), act


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
