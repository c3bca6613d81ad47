"""A frozen model in 4 bits under a LoRA adapter, by bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv 2305.14314)."""

import importlib.util
from typing import Any

import torch
from torch import nn

from policygrad.errors import UserError


def four_bits(compute: torch.dtype | None) -> Any:
    """The settings by which transformers loads a model in 4 bits: NF4 codes, whose scales are quantized as well.

    A weight is a code of 16 quantiles of the normal distribution times the largest absolute value of its block of 64
    (arXiv 2305.14314, section 3); a layer multiplies by the weights that the codes stand for. The head and the
    embeddings stay as they are. compute: the type of that product; None: float32. Raises UserError if bitsandbytes is
    not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("quantize needs bitsandbytes: pip install policygrad[quantize]")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def settle(model: nn.Module) -> None:
    """Make a loaded 4-bit model one whose output is differentiable in its input, always, and whose state is plain.

    On some CPUs bitsandbytes packs the codes of a layer anew, in place, at the first pass without a gradient, for a
    kernel in bfloat16 that has no derivative: what is sampled then differs from what is scored, and adapters below
    learn nothing. That is turned off. And the state_dict holds the codes alone, not what reads them: nothing of it
    changes, and copies of the model load each other's.
    """
    for layer in quantized(model).values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        layer.register_state_dict_post_hook(_codes_alone)


def quantized(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that are in 4 bits, by name."""
    return {name: x for name, x in model.named_modules() if hasattr(x._parameters.get("weight"), "quant_state")}


def _codes_alone(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [x for x in state if x.startswith(f"{prefix}weight.")]:
        del state[name]
