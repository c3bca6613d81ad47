"""Models and tokenizers: loading, checking, saving."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from policygrad.errors import UserError, ending, listed, one_line, shortened
from policygrad.files import add_metadata, check_directory, check_file, damaged, read_json
from policygrad.language.adapters import Adapter, base_of, merge, merged_weights, saved_adapter
from policygrad.language.adapters import add_adapter as add_adapter
from policygrad.language.policies import LanguagePolicy, ValueModel, causal, trunk
from policygrad.language.quantization import four_bits, settle

LAYERS = 10_000  # more than any model has; each would be built before its weights are missed
HEADS = 4  # of attention in the models that tasks bring, if nothing else is said


def small_llama(
    tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int, heads: int, *, context: int
) -> LlamaConfig:
    """The configuration of a small Llama, for the tasks that bring a model of their own.

    Raises UserError unless each head has the same even number of features, since positions turn pairs of them.
    """
    if heads < 1 or hidden % (2 * heads):
        fit = listed(str(x) for x in range(1, hidden) if hidden % (2 * x) == 0)
        raise UserError(f"heads is {heads}, and {hidden} features cannot be shared evenly: give one of {fit}")
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )


def located(name: str) -> str:
    """The name of a model; of a local directory its absolute path, which holds in every directory."""
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.isdir(path) else path


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, by path or hub id; padding on the left. Raises UserError."""
    name = located(name)
    with _one_line(name, "tokenizer"), quiet():
        _check_files(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer("a")  # some wrong settings show only in use
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
    base_model: str | None = None,
    trust: bool = False,
    dtype: str = "float32",
    attention: str | None = None,
    trust_remote_code: bool = False,
    kind: Any = AutoModelForCausalLM,
    what: str = "model",
    quantize: bool = False,
    compute: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> PreTrainedModel:
    """A causal language model by path or hub id. Raises UserError, also if some of its weights are missing.

    If the name is that of an adapter, the model is its base with the adapter merged into it. base_model: that base;
    trust: take the base that the adapter's file names. dtype: of the weights, or auto for that of the file. attention:
    sdpa, eager, flash_attention_2, ...; None: the model's default. kind: another auto class, for reward models and
    critics, where a missing head is made new. what: the word for it in messages. quantize: linear layers in 4 bits, on
    that device, which compute in that type (None: dtype); see quantization.four_bits.
    """
    name = located(name)
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"there is no type {shortened(dtype)} of weights: give float32, bfloat16, float16 or auto")
    adapters: list[tuple[str, Adapter]] = []  # an adapter's base may be another adapter
    while (adapter := _adapter_in(name, what)) is not None:
        adapters.append((name, adapter))
        name, base_model = located(base_of(name, adapter, base_model, trust)), None
        if name in [above for above, _ in adapters]:
            raise UserError(f"{ending(name)} is an adapter on itself: give a model as base_model")
    if base_model is not None:
        raise UserError(f"{ending(name)} is no adapter, and base_model is for one: leave base_model out")
    if quantize and adapters:
        raise UserError(
            f"{ending(adapters[0][0])} is an adapter, which is merged into its base, and weights in 4 bits cannot take "
            "it: give a whole model, or leave quantize out"
        )
    weights: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    if quantize:
        computed = compute if compute is not None or dtype == "auto" else weights
        options |= {"quantization_config": four_bits(computed), "device_map": {"": device}}
    with _one_line(name, what), quiet():
        model, info = kind.from_pretrained(
            name,
            dtype=weights,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,  # nothing is unpickled
            output_loading_info=True,
            **options,
        )
    if quantize:
        settle(model)
    missing = sorted(info["missing_keys"])
    others = f" and {len(missing) - 1} more" if missing[1:] else ""
    if missing and kind is AutoModelForCausalLM:
        raise UserError(
            f"{ending(name, 50)} has no weights for {ending(missing[0], 50)}{others}: "
            "give a whole causal language model"
        )
    for above, adapter in reversed(adapters):
        with _one_line(above, "adapter"):
            merge(model, adapter)
        model.name_or_path = above  # an adapter on top of this model belongs to both
    return model


def _adapter_in(name: str, what: str) -> Adapter | None:
    with _one_line(name, what), quiet():
        _check_files(name)
        return saved_adapter(name)


def _check_files(name: str) -> None:
    """Raise UserError for a local model with a file that cannot be one of a model. The hub's come by its client."""
    directory = Path(name)
    if not directory.is_dir():
        return
    check_directory(directory, Path(directory.anchor))  # the user named it: its links may lead to the hub's cache
    for path in (x for x in directory.glob("additional_chat_templates/*") if not x.is_dir()):
        check_file(path, Path(directory.anchor))
    path = directory / "config.json"
    config = read_json(path, Path(directory.anchor)) if path.is_file() else {}
    if not isinstance(config, dict):
        raise damaged(path, "it holds no object")
    for part in [config, *(x for x in config.values() if isinstance(x, dict))]:
        for key, x in part.items():
            if ("layer" in key or "expert" in key) and isinstance(x, int) and x > LAYERS:
                raise damaged(path, f"{key} is {x}")
            if key.endswith("_implementation") and isinstance(x, str) and "/" in x:
                raise damaged(path, f"{shortened(key)} is {shortened(x)}, which is code on the hub", "is not followed")


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
    if not all(isinstance(x, int) for x in named):
        raise UserError(
            f"the model's generation settings say that eos_token_id is {shortened(named)}: give numbers there"
        )
    return tuple(sorted({int(tokenizer.eos_token_id), *map(int, named)}))


def checkpoint_gradients(model: nn.Module) -> None:
    """Compute activations again in the backward pass instead of keeping them. Raises UserError if a model cannot."""
    inner = causal(model)
    options = {"use_reentrant": False}
    try:
        if hasattr(inner, "activation_checkpointing_enable"):  # the name since transformers 5
            inner.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise UserError(
            f"{type(inner).__name__} has no gradient checkpoints: leave gradient_checkpointing out"
        ) from error
    model.train()  # transformers checkpoints in training mode only; a policy has no dropout to turn on


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    metadata: dict[str, str] | None = None,
    *,
    merged: bool = False,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write both in the Hugging Face layout, for `from_pretrained`. Of a model with an adapter only the adapter, or,
    `merged`, a whole model with the adapter in its weights, which are copied for that.

    The files are written in a directory of their own and then replaced one by one, the weights last: a process that is
    killed leaves the old ones. metadata: written into the file of the weights; `files.read_metadata` reads it. weights:
    those of a model that is sharded over ranks, whole. Raises UserError if the directory cannot be written; what it
    held stays.
    """
    directory = Path(directory)
    fresh = directory / ".new"
    how: dict[str, Any] = {}
    if hasattr(model, "peft_config"):
        how = {"state_dict": merged_weights(model)} if merged else {"save_embedding_layers": False}  # asked of the hub
        model = causal(model) if merged else model
    try:
        with _written(directory), quiet():
            directory.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(fresh, ignore_errors=True)
            given = {} if weights is None else {"state_dict": weights}
            model.save_pretrained(fresh, **how, **given)  # type: ignore[operator]
            tokenizer.save_pretrained(fresh)
            (fresh / "README.md").unlink(missing_ok=True)  # peft's card, without content
            for path in fresh.glob("*.safetensors"):  # in any case, because safetensors makes its files private
                add_metadata(path, metadata or {})
            for path in sorted(fresh.rglob("*"), key=lambda path: (path.suffix == ".safetensors", path)):
                if path.is_dir():
                    (directory / path.relative_to(fresh)).mkdir(exist_ok=True)
                else:
                    os.replace(path, directory / path.relative_to(fresh))
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def save_critic(
    critic: ValueModel,
    path: Path | str,
    policy: LanguagePolicy,
    metadata: dict[str, str] | None = None,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a critic as safetensors, in one step. If it shares the policy's trunk, write its head alone.

    weights: those of a critic that is sharded over ranks, whole.
    """
    fresh = Path(f"{path}.new")
    with _written(path):
        if weights is None:
            safetensors.torch.save_model(_own(critic, policy), str(fresh))
        else:
            safetensors.torch.save_file(weights, str(fresh))
        add_metadata(fresh, metadata or {})
        os.replace(fresh, path)


def load_critic(critic: ValueModel, path: Path | str, policy: LanguagePolicy) -> None:
    """Read what save_critic wrote into a critic of the same kind."""
    try:
        check_file(Path(path), Path(path).parent)
        safetensors.torch.load_model(_own(critic, policy), str(path))
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        start, end = f"the critic in {ending(str(path))} cannot be read: ", "; give one of the same kind"
        raise UserError(start + one_line(error, 200 - len(start) - len(end)) + end) from error


def _own(critic: ValueModel, policy: LanguagePolicy) -> nn.Module:
    """The part of a critic that is not also the policy's."""
    return critic.head if critic.trunk is trunk(policy.model) else critic


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and advice, and the hub's client without a line for each try."""
    from huggingface_hub.utils import logging as of_hub
    from transformers.utils import logging

    level, level_of_hub, bars = logging.get_verbosity(), of_hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    of_hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        of_hub.set_verbosity(level_of_hub)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _written(place: Path | str) -> Iterator[None]:
    """A full disk, or another error of writing, in one line."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        said = getattr(error, "strerror", None) or one_line(error, 70)
        raise UserError(f"{ending(str(place))} cannot be written: {said}; what was saved before stays") from error


@contextlib.contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """Errors of from_pretrained, which fill a page, in one line."""
    local = os.path.isdir(name)
    if not local and (name.startswith((".", "/")) or os.path.exists(name)):
        raise UserError(f"there is no directory {ending(name, 80)} to load a {what} from: check the path")
    if local and not os.path.exists(os.path.join(name, "tokenizer_config.json")) and os.path.isdir(f"{name}/model"):
        raise UserError(f"{ending(name, 70)} is a run, and no {what}: give the model in it, {ending(name, 70)}/model")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the network, a configuration, a damaged file, ...
        if "ignore_mismatched_sizes" in str(error):  # transformers prints the shapes, and names its own option
            error = ValueError(f"its weights do not fit {'its config.json' if what == 'model' else f'a {what}'}")
        if not local and "couldn't connect" in str(error):
            said = f"there is no directory {ending(name)} to load a {what} from, and the hub cannot be reached"
            raise UserError(f"{said}: check the name and the network") from error
        advice = "give a whole one" if local else "give a directory or a hub id"
        start, end = f"no {what} could be loaded from {ending(name)!r}: ", f"; {advice}"
        raise UserError(start + one_line(error, 200 - len(start) - len(end)) + end) from error
