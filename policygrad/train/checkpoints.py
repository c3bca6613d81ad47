"""Save and load policies: tensors in policy.safetensors, the architecture in policy.json. Nothing is unpickled."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from policygrad import ranks
from policygrad.control import ObservationNormalizer, Policy
from policygrad.control.encoders import measured
from policygrad.control.memory import measured_memory
from policygrad.control.separate import SeparatePolicies
from policygrad.control.spaces import kept_of, rebuild
from policygrad.control.wrappers import Learned
from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.files import damaged, read_json, read_tensors, write_bytes, write_json
from policygrad.train.hub import directory_of

# 2: actions in the units of their bounds; critics with a scale. 3: encoders, and the parts of a Dict.
# 4: memory, and the distribution of Box actions
FORMAT = 4
ENDINGS = {
    "unfinished": "has not ended",
    "ended": "ended",
    "stopped": "was stopped",
    "failed": "failed",
    "best": "had none better",
}


@dataclass(frozen=True)
class Stage:
    """How far training was when a policy was saved. It stands in the policy's own file, so the two cannot part."""

    iteration: int = 0  # the last whole one
    steps: int = 0
    run: str = "unfinished"  # one of ENDINGS
    partway: bool = False  # the policy has a part of the next iteration, too

    def metadata(self) -> dict[str, str]:
        """As the metadata of a safetensors file, which are texts."""
        return {name: str(x) for name, x in vars(self).items()}

    @classmethod
    def of(cls, metadata: dict[str, str], path: Path) -> "Stage":
        """The stage in a file's metadata. Raises UserError if it is not there or makes no sense."""
        iteration, steps, run, partway = (metadata.get(name, "") for name in ("iteration", "steps", "run", "partway"))
        counts = all(x.isdecimal() and x.isascii() and len(x) < 19 for x in (iteration, steps))
        if not counts or run not in ENDINGS or partway not in ("True", "False"):
            raise damaged(path, "it does not say of which iteration it is")
        return cls(int(iteration), int(steps), run, partway == "True")

    def policy(self) -> str:
        """The policy in words."""
        if self.partway:
            return f"policy from the middle of iteration {self.iteration + 1:,}"
        return f"policy of iteration {self.iteration:,} ({self.steps:,} steps)"

    def line(self) -> str:
        """The policy and its run in words."""
        return f"{self.policy()} of a run that {ENDINGS[self.run]}"


def save_policy(
    directory: Path | str,
    policy: nn.Module,
    critic: nn.Module | None,
    normalizer: ObservationNormalizer | None,
    stage: Stage | None = None,
    learned: Learned | None = None,
    environment: str | None = None,
) -> None:
    """Write the policy, its critic if it has one, and the statistics that normalize its observations, atomically.

    learned: what the environment's wrappers have learned. environment: its name, for a reader.
    """
    directory = Path(directory)
    tensors = {f"policy.{name}": x for name, x in policy.state_dict().items()}
    if critic is not None:
        tensors |= {f"critic.{name}": x for name, x in critic.state_dict().items()}
    if normalizer is not None:
        tensors |= {f"observations.{n}": torch.from_numpy(x) for n, x in normalizer.statistics.state_dict().items()}
    tensors |= {f"wrappers.{name}": torch.from_numpy(np.array(x)) for name, x in (learned or {}).items()}
    description = {
        "format": FORMAT,
        "policy": getattr(policy, "description", None),
        "class": f"{type(policy).__module__}:{type(policy).__qualname__}",
        "normalizes_observations": normalizer is not None,
        "environment": environment,
    }
    write_tensors(directory / "policy.safetensors", tensors, stage)
    write_json(directory / "policy.json", description)


def write_tensors(path: Path, tensors: dict[str, Tensor], stage: Stage | None = None) -> None:
    """Write tensors with the stage of their run, atomically."""
    # save_file would make the file readable by its owner only, whatever the umask
    content = save(
        {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()},
        None if stage is None else stage.metadata(),
    )
    write_bytes(path, content)


def load_tensors(path: Path, module: nn.Module) -> Stage:
    """Load the tensors of write_tensors into a module of the same architecture. Raises UserError if that fails."""
    tensors, metadata = read_tensors(path)
    fill(module, tensors, path)
    return Stage.of(metadata, path)


def fill(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load tensors of a file into a module. Raises UserError if they do not fit, in kind too: nothing is cast."""
    state = module.state_dict()
    other = [name for name, x in tensors.items() if name in state and _real(x) != _real(state[name])]
    try:
        if other:
            raise RuntimeError(f"{other[0][:60]!r} holds {tensors[other[0]].dtype}")
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise damaged(path, one_line(error), "has weights that do not fit the policy") from error


@dataclass
class Saved:
    """What a run directory holds of a policy, from one look at its files, which training may be replacing."""

    policy: nn.Module
    normalizer: ObservationNormalizer | None
    critic: dict[str, Tensor]
    learned: Learned  # by the wrappers of the environment
    environment: str  # its name
    metadata: dict[str, str]


def load_policy(
    directory: Path | str, policy: nn.Module | None = None
) -> tuple[nn.Module, ObservationNormalizer | None]:
    """Load the policy of a run directory, and its frozen normalizer. policy: your own module to load the weights into.

    Raises UserError if the directory has no policy, or one that does not fit.
    """
    saved = read_policy(directory_of(directory), policy)
    return saved.policy, saved.normalizer


def read_policy(directory: Path, policy: nn.Module | None = None) -> Saved:
    """As load_policy, with the rest of the files."""
    if not (directory / "policy.json").exists():
        raise UserError(f"{ending(str(directory), 80)} holds no policy: give a run's directory")
    path, weights = directory / "policy.json", directory / "policy.safetensors"
    description = read_json(path)
    tensors, metadata = read_tensors(weights)
    if not isinstance(description, dict):
        raise damaged(path, "it describes no policy")
    if description.get("format") != FORMAT:
        raise damaged(path, f"this is format {FORMAT}", f"is of format {shortened(description.get('format'), 20)}")
    missing = [name for name in ("policy", "class", "normalizes_observations") if name not in description]
    if missing:
        raise damaged(path, f"{missing[0]} is missing")
    if policy is None:
        if description["policy"] is None:
            raise UserError(
                f"the policy in {ending(str(directory), 50)} is a {ending(str(description['class']), 50)} of your own: "
                "load it from Python, with load(directory, policy=...)"
            )
        try:
            own = description["policy"]
            layers = [*own["hidden"], feature_count(own["action_space"])]
            encoded = own["observation_space"], own["encoder"], own["channels"], own["keys"]
            memory = {name: own[name] for name in ("memory", "memory_size", "memory_window")}
            check_size(*encoded, memory, layers, tensors)
            kind = SeparatePolicies if own.get("agents") == "separate" else Policy
            policy = kind.from_description(own)
        except Exception as error:  # Gymnasium, numpy and torch may raise anything here
            raise damaged(path, f"{type(error).__name__}: {one_line(error)}") from error
    fill(policy, part_of(tensors, "policy."), weights)
    normalizer = None
    if description["normalizes_observations"] is not False:
        statistics = {name: x.numpy() for name, x in part_of(tensors, "observations.").items()}
        known: Any = policy.observation_space if isinstance(policy, Policy | SeparatePolicies) else None
        try:
            normalizer = normalizer_of(statistics, None if known is None else known.shape)
            normalizer.kept = None if known is None else kept_of(known)
        except KeyError as error:
            said = f"policy.json says normalizes_observations, and observations.{error.args[0]} is missing"
            raise damaged(weights, said) from error
        except ValueError as error:
            raise damaged(weights, f"the statistics of observations make no sense: {error}") from error
    learned: Learned = {name: x.numpy() for name, x in part_of(tensors, "wrappers.").items()}
    environment = one_line(description.get("environment") or "your own", 40)
    return Saved(policy, normalizer, part_of(tensors, "critic."), learned, environment, metadata)


def normalizer_of(statistics: dict[str, np.ndarray], shape: tuple[int, ...] | None) -> ObservationNormalizer:
    """A frozen normalizer with these statistics. shape: that of an observation, if it is known."""
    mean, var, count = (statistics[name] for name in ("mean", "var", "count"))
    if any(x.dtype.kind != "f" for x in (mean, var, count)):
        raise ValueError("they are no real numbers")
    if mean.shape != var.shape or count.shape != () or (shape or mean.shape) != mean.shape or (var < 0).any():
        raise ValueError(f"mean {mean.shape}, var {var.shape}, count {count.shape}")
    normalizer = ObservationNormalizer(mean.shape)
    normalizer.statistics.load_state_dict(statistics)
    normalizer.frozen = True
    return normalizer


def finite(module: nn.Module) -> bool:
    """Are all parameters finite, or this rank's part of them? In one look."""
    own = [ranks.local(p.detach()) for p in module.parameters() if p.is_floating_point()]
    largest = torch._foreach_norm([x for x in own if x.numel()], math.inf)
    return bool(torch.stack([x.float() for x in largest]).isfinite().all())


def fits(module: nn.Module, tensors: dict[str, Tensor]) -> bool:
    """Whether the tensors are those of a module of this architecture."""
    shapes = [{name: (x.shape, _real(x)) for name, x in one.items()} for one in (tensors, module.state_dict())]
    return shapes[0] == shapes[1]


def _real(x: Tensor) -> Any:
    """The kind of a tensor's numbers: real ones of any precision are one kind."""
    return "real" if x.is_floating_point() else x.dtype


def check_size(
    space: dict[str, Any],
    encoder: str,
    channels: str,
    keys: Sequence[str],
    memory: dict[str, Any],
    layers: Sequence[int],
    tensors: dict[str, Tensor],
) -> None:
    """Raise ValueError if a network is larger than the saved tensors, before memory is allocated for it.

    space: a described one, of observations. memory: the options of one. layers: the sizes after both.
    """
    saved = sum(x.numel() for x in tensors.values())
    if feature_count(space) // 64 > saved:
        raise ValueError(f"observations have {feature_count(space):,} numbers, and policy.safetensors {saved:,} in all")
    weights, features = measured(rebuild(space), encoder, channels, keys)
    if weights > saved:
        raise ValueError(f"its encoder has {weights:,} weights, and policy.safetensors {saved:,} in all")
    weights, features = measured_memory(features, memory)
    if weights > saved:
        raise ValueError(f"its memory has {weights:,} weights, and policy.safetensors {saved:,} in all")
    sizes = [features, *layers]
    if any(inputs * outputs > saved for inputs, outputs in pairwise([1, *sizes])):
        raise ValueError(f"layers have {sizes} units, and policy.safetensors has {saved:,} numbers in all")


def feature_count(space: dict[str, Any]) -> int:
    """The numbers that a described space has as features or logits."""
    match space["kind"]:
        case "Flat" | "FlatActions":
            return feature_count(space["of"])
        case "Dict":
            return sum(feature_count(x) for _, x in space["of"])
        case "Tuple":
            return sum(feature_count(x) for x in space["of"])
        case "Discrete":
            return space["n"]
        case "MultiDiscrete":
            return int(np.sum(space["nvec"]))
    return math.prod(space["shape"])


def part_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names have this prefix, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
