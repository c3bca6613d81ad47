"""LoRA adapters (Hu et al. 2021, arXiv 2106.09685): made, loaded, and merged into their model."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn

from policygrad.errors import UserError, ending, listed, one_line
from policygrad.files import check_file, read_json

# Settings that change nothing about W + alpha / r B A. Any other one must be off.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others start by changing the model too


class Adapter(NamedTuple):
    """A saved adapter: its file of weights, its settings, and the model that it says it belongs to."""

    weights: Path
    settings: dict[str, Any]
    base: str | None


def add_adapter(
    model: nn.Module, rank: int, *, alpha: float | None = None, targets: Sequence[str] | None = None
) -> nn.Module:
    """The model with a LoRA adapter on its linear layers; only that is trained, in float32.

    alpha: the adapter's output is scaled by alpha / rank; 2 rank by default. targets: names of layers; by default all
    linear layers but the head. The adapter starts at zero, so the model's output does not change.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules="all-linear" if targets is None else list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():  # peft warns of its own settings, transformers of names that peft uses
            warnings.simplefilter("ignore")
            return get_peft_model(model, config)  # a float16 or bfloat16 model gets an adapter in float32
    except ValueError as error:
        if targets is None:
            raise UserError(f"LoRA cannot be added: {one_line(error, 110)}; give lora_targets") from error
        layers = {name.rpartition(".")[2] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
        raise UserError(
            f"the model has no layers {listed(targets)} for LoRA: give lora_targets of {listed(sorted(layers), 80)}"
        ) from error


def load_adapter(model: nn.Module, directory: Path) -> None:
    """Read the weights of an adapter into a model that add_adapter made with the same options.

    Only adapter_model.safetensors is read: no pickle, and no settings. Raises UserError if they do not fit.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = directory / "adapter_model.safetensors"
    start, end = f"{ending(str(directory))} holds no adapter that can be read (", "): give a run's directory"
    try:
        check_file(path, directory)
        weights = load_file(path)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        other = sorted(weights.keys() ^ expected.keys())
        if other:
            raise ValueError(f"of another model: {other[0]}")
        set_peft_model_state_dict(model, weights)
    except Exception as error:  # of many kinds: of a file that is damaged, or of another model
        raise UserError(start + one_line(error, 200 - len(start) - len(end)) + end) from error


def saved_adapter(name: str) -> Adapter | None:
    """The adapter in a directory or on the hub; None if that holds a whole model, or nothing. Raises ValueError."""
    from transformers.utils import cached_file
    from transformers.utils.peft_utils import find_adapter_config_file

    found = find_adapter_config_file(name)
    if found is None:
        return None
    settings = read_json(Path(found), Path(Path(found).anchor))
    if not isinstance(settings, dict):
        raise ValueError("its adapter_config.json holds no object")
    weights = cached_file(name, "adapter_model.safetensors", _raise_exceptions_for_missing_entries=False)
    if weights is None:
        raise ValueError("its adapter is no adapter_model.safetensors, and pickles are not read")
    base = settings.get("base_model_name_or_path")
    return Adapter(Path(weights), settings, base if isinstance(base, str) and base else None)


def base_of(name: str, adapter: Adapter, given: str | None, trust: bool) -> str:
    """The base model of an adapter: the one given, or, if the file is trusted, the one that it names."""
    if given is not None:
        return given
    if adapter.base is None:
        raise UserError(f"{ending(name)} is an adapter, and its file names no base model: give base_model")
    if not trust:
        raise UserError(
            f"{ending(name, 45)} is an adapter of {ending(adapter.base, 60)}, as its file says: "
            "give that as base_model, or say trust to follow the file"
        )
    return adapter.base


@torch.no_grad()
def merge(model: nn.Module, adapter: Adapter) -> None:
    """W <- W + (alpha / r) B A in every layer of a LoRA adapter, in place. Raises ValueError if it is of another kind.

    A: [r, inputs], B: [outputs, r]. The sum is taken in float32. alpha / sqrt(r) if the settings say use_rslora.
    """
    from transformers.pytorch_utils import Conv1D

    _check_plain(adapter.settings)
    modules = dict(model.named_modules())
    weights = load_file(adapter.weights)
    embedded = model.get_input_embeddings().weight  # type: ignore[operator]
    for name in sorted(weights):
        path, matrix = name.removeprefix("base_model.model.").rsplit(".lora_", 1) if ".lora_" in name else (name, "")
        layer: Any = modules.get(path, modules.get(path.removeprefix(f"{model.base_model_prefix}.")))
        if matrix not in ("A.weight", "B.weight") or not isinstance(layer, nn.Linear | Conv1D):
            raise ValueError(f"{name} is of no linear layer of the model: merge it by the program that made it")
        if layer.weight is embedded:
            raise ValueError(f"{path} is tied to the embeddings: merge it by the program that made it")
        if matrix == "A.weight":
            a, b = weights[name].float(), weights[name.replace("lora_A", "lora_B")].float()
            rank = len(a)
            scale = adapter.settings["lora_alpha"] / (math.sqrt(rank) if adapter.settings.get("use_rslora") else rank)
            change = scale * (b @ a).to(layer.weight.device)
            change = change.T if isinstance(layer, Conv1D) else change
            if change.shape != layer.weight.shape:
                raise ValueError(f"{path} has another shape than the adapter's")
            layer.weight.copy_(layer.weight.float() + change)


def check_mergeable(model: nn.Module) -> None:
    """Raise UserError if a layer under an adapter shares its weight with another, which merging would change too."""
    held, adapted = dict[int, str](), _adapted(model)
    for name, layer in model.get_base_model().named_modules():  # type: ignore[operator]
        weight = layer._parameters.get("weight")
        if weight is None:
            continue
        path = name.removesuffix(".base_layer")
        other = held.setdefault(weight.data_ptr(), path)
        if other != path and {path, other} & adapted.keys():
            raise UserError(
                f"{ending(path, 60)} and {ending(other, 60)} share their weight, and an adapter on one cannot be "
                "merged: give other lora_targets, or save the adapter"
            )


def weights_without(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights W of a model that add_adapter made, named as without an adapter."""
    found, adapted = {}, _adapted(model)
    for name, x in model.get_base_model().state_dict().items():  # type: ignore[operator]
        place = next((y for y in adapted if name.startswith(f"{y}.")), None)
        if place is None:
            found[name] = x
        elif name.startswith(f"{place}.base_layer."):
            found[name.replace(f"{place}.base_layer.", f"{place}.", 1)] = x
    return found


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a model that add_adapter made, W + (alpha / r) B A in each adapted layer, named as without one.

    The sum is taken in float32 and rounded to the type of W. The model stays as it is.
    """
    found, adapted = weights_without(model), _adapted(model)
    for place, layer in adapted.items():
        weight = layer.base_layer.weight
        change = layer.get_delta_weight(layer.active_adapters[0])
        found[f"{place}.weight"] = (weight.float() + change.float()).to(weight.dtype)
    return found


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that have an adapter, by their names without one."""
    from peft.tuners.lora import LoraLayer

    inner = model.get_base_model()  # type: ignore[operator]
    return {name: layer for name, layer in inner.named_modules() if isinstance(layer, LoraLayer)}


def _check_plain(settings: dict[str, Any]) -> None:
    """Raise ValueError for an adapter that is more than W + alpha / r B A."""
    alpha = settings.get("lora_alpha")
    if settings.get("peft_type") != "LORA" or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ValueError("it is no LoRA adapter")
    start = settings.get("init_lora_weights")
    used = [
        name for name, x in settings.items() if name not in WITHOUT_EFFECT and x not in (None, False, {}, [], "none")
    ]
    used += [] if start in STARTS else ["init_lora_weights"]
    if used:
        raise ValueError(f"its {used[0]} is {one_line(settings[used[0]], 30)}: merge it by the program that made it")
