"""Save and load policies: tensors in policy.safetensors, the architecture in policy.json. Nothing is unpickled."""

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from policygrad.control import ObservationNormalizer, Policy
from policygrad.errors import UserError, one_line

FORMAT = 2  # 2: actions in the units of their bounds; critics with a scale


def save_policy(
    directory: Path | str, policy: nn.Module, critic: nn.Module | None, normalizer: ObservationNormalizer | None
) -> None:
    """Write the policy, its critic if it has one, and the statistics that normalize its observations.

    Each file is written under a temporary name and then renamed, so that a crash leaves the old file.
    """
    directory = Path(directory)
    tensors = {f"policy.{name}": x for name, x in policy.state_dict().items()}
    if critic is not None:
        tensors |= {f"critic.{name}": x for name, x in critic.state_dict().items()}
    if normalizer is not None:
        tensors |= {f"observations.{n}": torch.from_numpy(x) for n, x in normalizer.statistics.state_dict().items()}
    description = {
        "format": FORMAT,
        "policy": getattr(policy, "description", None),
        "class": f"{type(policy).__module__}:{type(policy).__qualname__}",
        "normalizes_observations": normalizer is not None,
    }
    _write_tensors(directory / "policy.safetensors", tensors)
    write_json(directory / "policy.json", description)


def save_tensors(path: Path, module: nn.Module) -> None:
    """Write a module's tensors atomically."""
    _write_tensors(path, module.state_dict())


def load_tensors(path: Path, module: nn.Module) -> None:
    """Load the tensors of save_tensors into a module of the same architecture. Raises UserError if that fails."""
    try:
        module.load_state_dict(load_file(path))
    except OSError as error:
        said = "No such file or directory" if isinstance(error, FileNotFoundError) else one_line(error)
        raise UserError(f"{path} cannot be read ({said}): give a run's directory"[:200]) from error
    except Exception as error:  # safetensors has its own exception for a truncated file
        raise UserError(f"{path} is damaged or of another policy: {one_line(error)}"[:200]) from error


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_name(path.name + ".new")
    # save_file would make the file readable by its owner only, whatever the umask
    temporary.write_bytes(save({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}))
    os.replace(temporary, path)


def load_policy(
    directory: Path | str, policy: nn.Module | None = None
) -> tuple[nn.Module, ObservationNormalizer | None]:
    """Load the policy of a run directory, and its frozen normalizer. policy: your own module to load the weights into.

    Raises UserError if the directory has no policy, or one that does not fit.
    """
    directory = Path(directory)
    try:
        description = json.loads((directory / "policy.json").read_text())
        tensors = load_file(directory / "policy.safetensors")
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or one_line(error)
        raise UserError(
            f"{directory} holds no policy that can be read ({said}): give a run's directory"[:200]
        ) from error
    except Exception as error:  # safetensors has its own exception for a truncated file
        raise UserError(f"{directory}/policy.safetensors is damaged: {one_line(error)}"[:200]) from error
    if not isinstance(description, dict):
        raise UserError(f"{directory}/policy.json is damaged: it describes no policy")
    if description.get("format") != FORMAT:
        raise UserError(f"{directory}/policy.json is of format {description.get('format')}, and this is {FORMAT}")
    missing = [name for name in ("policy", "class", "normalizes_observations") if name not in description]
    if missing:
        raise UserError(f"{directory}/policy.json is damaged: {missing[0]} is missing")
    if policy is None:
        if description["policy"] is None:
            raise UserError(
                f"the policy in {directory} is a {description['class']} of your own: load it from Python with "
                "load_policy(directory, policy)"
            )
        try:
            _check_size(description["policy"]["hidden"], tensors)
            policy = Policy.from_description(description["policy"])
        except Exception as error:  # Gymnasium, numpy and torch may raise anything here
            raise UserError(
                f"{directory}/policy.json is damaged: {type(error).__name__}: {one_line(error)}"[:200]
            ) from error
    try:
        policy.load_state_dict(_part(tensors, "policy."))
    except RuntimeError as error:
        raise UserError(f"the weights in {directory} do not fit the policy: {one_line(error)}"[:200]) from error
    normalizer = None
    if description["normalizes_observations"]:
        statistics = {name: x.numpy() for name, x in _part(tensors, "observations.").items()}
        try:
            normalizer = ObservationNormalizer(np.shape(statistics["mean"]))
            normalizer.statistics.load_state_dict(statistics)
        except KeyError as error:
            raise UserError(
                f"{directory}/policy.safetensors is damaged: policy.json says normalizes_observations, and "
                f"observations.{error.args[0]} is missing"
            ) from error
        normalizer.frozen = True
    return policy, normalizer


def load_critic(directory: Path, critic: nn.Module) -> bool:
    """Load the critic of a run directory into `critic`. False if the directory has none of this architecture."""
    tensors = _part(load_file(directory / "policy.safetensors"), "critic.")
    expected = {name: x.shape for name, x in critic.state_dict().items()}
    if {name: x.shape for name, x in tensors.items()} != expected:
        return False
    critic.load_state_dict(tensors)
    return True


def write_json(path: Path, content: Any) -> None:
    """Write JSON to a temporary file and rename it."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)


def _check_size(hidden: list[int], tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if the layers are larger than the saved tensors, before memory is allocated for them."""
    saved = sum(x.numel() for x in tensors.values())
    if any(inputs * outputs > saved for inputs, outputs in pairwise([1, *hidden])):
        raise ValueError(f"hidden is {hidden}, and policy.safetensors has {saved:,} numbers in all")


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
