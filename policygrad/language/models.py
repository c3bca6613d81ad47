"""Models and tokenizers: loaded, checked against each other, fitted with an adapter, saved."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policygrad.errors import UserError
from policygrad.language.policies import causal


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by path or hub id; padding on the left. Raises UserError."""
    name = os.path.expanduser(name)
    with _one_line(name, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no end-of-sequence token: a completion could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return tokenizer


def load_model(
    name: str,
    *,
    dtype: str = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
    kind: Any = AutoModelForCausalLM,
    **options: Any,
) -> PreTrainedModel:
    """A causal language model by path or hub id. Raises UserError, also if some of its weights are missing.

    dtype: of the weights, or auto for that of the file. attention: sdpa, eager, flash_attention_2, ... or the model's
    own. kind: another auto class, for reward models; then a head that is missing is a new one.
    """
    name = os.path.expanduser(name)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"there is no type {dtype!r} of weights: give float32, bfloat16, float16 or auto")
    with _one_line(name, "model"), quiet():
        model, info = kind.from_pretrained(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # nothing is unpickled
            output_loading_info=True,
            **options,
        )
    missing = sorted(info["missing_keys"])
    if missing and kind is AutoModelForCausalLM:
        raise UserError(
            f"{name} has no weights for {missing[0]}{f' and {len(missing) - 1} others' if missing[1:] else ''}: "
            "they would be random; give a whole causal language model"
        )
    return model


def check_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Raise UserError if the tokenizer has tokens that the model does not know, or rows are longer than its context."""
    rows, words = len(model.get_input_embeddings().weight), len(tokenizer)  # type: ignore[arg-type]
    if words > rows:
        raise UserError(
            f"the tokenizer has {words:,} tokens and the model embeddings for {rows:,}: they do not belong together; "
            "give the model's own tokenizer"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise UserError(
            f"the longest prompt and its completion are {length:,} tokens, and the model's context is {context:,}: "
            "lower max_tokens, or leave long prompts out"
        )


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion: the tokenizer's, and those that the model's generation settings name."""
    config = getattr(causal(model), "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    named = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(sorted({int(tokenizer.eos_token_id), *map(int, named)}))


def add_adapter(
    model: nn.Module, rank: int, *, alpha: float | None = None, targets: Sequence[str] | None = None
) -> nn.Module:
    """The model with LoRA of a rank on its linear layers (Hu et al. 2021, arXiv 2106.09685); only that is trained.

    alpha: the update is scaled by alpha / rank; 2 rank by default. targets: names of layers; all linear ones but the
    head by default. The adapter starts at zero: the model is what it was.
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
        with warnings.catch_warnings():  # of peft about what it sets itself, and about what transformers deprecates
            warnings.simplefilter("ignore")
            return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"LoRA cannot be added: {' '.join(str(error).split())[:200]}") from error


def checkpoint_gradients(model: nn.Module) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    inner = causal(model)
    options = {"use_reentrant": False}
    if hasattr(inner, "activation_checkpointing_enable"):  # the name since transformers 5
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()  # transformers heeds it in training mode only; there is no dropout to turn on


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """In the Hugging Face layout: `from_pretrained` loads it. Of a model with an adapter, the adapter alone."""
    with quiet():
        model.save_pretrained(directory, safe_serialization=True)  # type: ignore[operator]
        tokenizer.save_pretrained(directory)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and advice."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """What from_pretrained says over a page, in a line."""
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise UserError(f"there is no directory {name} to load a {what} from")
    try:
        yield
    except RuntimeError:
        raise  # weights of other shapes than the model's: reward_models words it
    except Exception as error:  # of many kinds: of the network, of a configuration, of a file that is damaged
        said = " ".join(str(error).split())
        places = "" if os.path.isdir(name) else ", neither as a directory nor as a hub id"
        raise UserError(f"no {what} could be loaded from {name!r}{places}: {said[:160]}") from error
