"""Models and tokenizers: loading, checking, adapters, saving."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from policygrad.errors import UserError, ending, one_line, shortened
from policygrad.language.policies import LanguagePolicy, ValueModel, causal, trunk


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by path or hub id; padding on the left. Raises UserError."""
    name = os.path.expanduser(name)
    with _one_line(name, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {ending(name)} has no end-of-sequence token, so no completion could end: give another"
        )
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

    dtype: of the weights, or auto for that of the file. attention: sdpa, eager, flash_attention_2, ...; None: the
    model's default. kind: another auto class, for reward models and critics, where a missing head is made new.
    """
    name = os.path.expanduser(name)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"there is no type {shortened(dtype)} of weights: give float32, bfloat16, float16 or auto")
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
    others = f" and {len(missing) - 1} more" if missing[1:] else ""
    if missing and kind is AutoModelForCausalLM:
        raise UserError(
            f"{ending(name, 50)} has no weights for {ending(missing[0], 50)}{others}: "
            "give a whole causal language model"
        )
    return model


def check_pair(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Raise UserError if the model lacks a token of the tokenizer, or its context is shorter than `length`."""
    rows, words = len(model.get_input_embeddings().weight), len(tokenizer)  # type: ignore[arg-type]
    if words > rows:
        raise UserError(
            f"the tokenizer has {words:,} tokens and the model embeddings for {rows:,}: give the model's own tokenizer"
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length > context:
        raise UserError(
            f"the longest prompt and its completion have {length:,} tokens, and the model's context {context:,}: "
            "lower max_tokens, or leave long prompts out"
        )


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a completion: that of the tokenizer and those in the model's generation settings."""
    config = getattr(causal(model), "generation_config", None)
    named = getattr(config, "eos_token_id", None)
    named = named if isinstance(named, list) else [] if named is None else [named]
    return tuple(sorted({int(tokenizer.eos_token_id), *map(int, named)}))


def add_adapter(
    model: nn.Module, rank: int, *, alpha: float | None = None, targets: Sequence[str] | None = None
) -> nn.Module:
    """The model with a LoRA adapter on its linear layers (Hu et al. 2021, arXiv 2106.09685); only that is trained.

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
            return get_peft_model(model, config)
    except ValueError as error:
        said = one_line(error, 110)
        raise UserError(f"LoRA cannot be added: {said}; give lora_targets that the model has") from error


def checkpoint_gradients(model: nn.Module) -> None:
    """Compute activations again in the backward pass instead of keeping them."""
    inner = causal(model)
    options = {"use_reentrant": False}
    if hasattr(inner, "activation_checkpointing_enable"):  # the name since transformers 5
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    model.train()  # transformers checkpoints in training mode only; a policy has no dropout to turn on


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write both in the Hugging Face layout, for `from_pretrained`. Of a model with an adapter only the adapter."""
    with quiet():
        model.save_pretrained(directory, safe_serialization=True)  # type: ignore[operator]
        tokenizer.save_pretrained(directory)


def save_critic(critic: ValueModel, path: Path | str, policy: LanguagePolicy) -> None:
    """Write a critic as safetensors. If it shares the policy's trunk, write its head alone."""
    safetensors.torch.save_model(_own(critic, policy), str(path))


def load_critic(critic: ValueModel, path: Path | str, policy: LanguagePolicy) -> None:
    """Read what save_critic wrote into a critic of the same kind."""
    try:
        safetensors.torch.load_model(_own(critic, policy), str(path))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        start, end = f"the critic in {ending(str(path))} cannot be read: ", "; give one of the same kind"
        raise UserError(start + one_line(error, 200 - len(start) - len(end)) + end) from error


def _own(critic: ValueModel, policy: LanguagePolicy) -> nn.Module:
    """The part of a critic that is not also the policy's."""
    return critic.head if critic.trunk is trunk(policy.model) else critic


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
    """Errors of from_pretrained, which fill a page, in one line."""
    if name.startswith((".", "/")) and not os.path.isdir(name):
        raise UserError(f"there is no directory {ending(name, 80)} to load a {what} from: check the path")
    try:
        yield
    except RuntimeError:
        raise  # weights of wrong shapes: reward_models has a message for them
    except Exception as error:  # of the network, a configuration, a damaged file, ...
        advice = "give a whole one" if os.path.isdir(name) else "give a directory or a hub id"
        start, end = f"no {what} could be loaded from {ending(name)!r}: ", f"; {advice}"
        raise UserError(start + one_line(error, 200 - len(start) - len(end)) + end) from error
