"""Tiny models of many architectures, from their configuration classes: nothing is downloaded, nothing is mocked."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from policygrad.language.completions import Completions, Request
from policygrad.language.data import left_padded
from policygrad.language.policies import LanguagePolicy, Prefixes, ValueModel, trunk

VOCABULARY, HIDDEN, PAD, END = 23, 16, 0, 1
TOOL = 9  # the token that `with_tool` inserts

BASE = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END}
SIZE = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GPT = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
GROUPED = SIZE | {"intermediate_size": 24, "num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 8}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
# A window shorter than the rows; caps that bite. Of every model that has layers of two kinds there is one of each.
GEMMA = WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]}

# Configuration class, what makes it tiny, and all of its dropout.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
    "llama": ("Llama", GROUPED, {"attention_dropout": 0.5}),
    "qwen2": ("Qwen2", GROUPED, {"attention_dropout": 0.5}),
    "qwen3": ("Qwen3", WIDE, {"attention_dropout": 0.5}),
    "gpt2": ("GPT2", GPT, {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 4}, {"attention_dropout": 0.5}),
    "gemma2": ("Gemma2", GEMMA | {"final_logit_softcapping": 3.0}, {"attention_dropout": 0.5}),
    "gemma3": ("Gemma3Text", GEMMA, {"attention_dropout": 0.5}),
    "neox": ("GPTNeoX", SIZE | {"intermediate_size": 24}, {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    "phi": (
        "Phi",
        SIZE | {"intermediate_size": 24},
        {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5},
    ),
    "opt": (
        "OPT",
        SIZE | {"ffn_dim": 24, "word_embed_proj_dim": HIDDEN},
        {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    ),
    "falcon": (
        "Falcon",
        {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    ),
    "gpt_neo": (
        "GPTNeo",
        {
            "hidden_size": HIDDEN,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 64,
        },
        {"resid_dropout": 0.5, "embed_dropout": 0.5, "attention_dropout": 0.5},
    ),
    "granite": ("Granite", GROUPED | {"logits_scaling": 4.0}, {"attention_dropout": 0.5}),
    "mixtral": ("Mixtral", GROUPED | EXPERTS, {"attention_dropout": 0.5, "router_jitter_noise": 0.5}),
    "lfm2": ("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}, {}),
}
SLIDING = {"mistral", "gemma2", "gemma3"}
RECURRENT = {"lfm2"}
NOT_PLAIN = {"gemma2", "granite"}  # whose logits are more than a linear function of the last hidden state
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def tiny(name: str = "llama", *, dropout: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model of two layers whose distributions are far from uniform; the same weights with and without dropout."""
    kind, size, rates = ARCHITECTURES[name]
    config = getattr(transformers, kind + "Config")(**(BASE | size | (rates if dropout else {}) | options))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model.eval()


def prompts(*lengths: int) -> tuple[Tensor, Tensor]:
    """Prompts of these lengths, left-padded, without END, and where they are."""
    return left_padded([torch.randint(2, VOCABULARY, (n,)).tolist() for n in lengths], PAD)


def observed(prompt_lengths: tuple[int, ...] = (1, 5, 3, 6), lengths: tuple[int, ...] = (4, 1, 6, 0)) -> Prefixes:
    """Rows of ragged prompts and completions; in one of the latter no decision counts."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return Prefixes(*prompts(*prompt_lengths), torch.randint(2, VOCABULARY, mask.shape), mask)


def alone(model: PreTrainedModel, obs: Prefixes, temperature: float = 1.0) -> list[Tensor]:
    """log pi of each token after each prefix of every row, from the model's own logits, without padding: [t, V]."""
    rows = []
    for prompt, prompt_mask, completion, mask in zip(*obs, strict=True):
        prompt, completion = prompt[prompt_mask], completion[mask]
        logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
        rows.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
    return rows


def picked(obs: Prefixes, rows: list[Tensor]) -> Tensor:
    """log pi of the completions' tokens, [B, T], 0 behind the mask."""
    out = torch.zeros(obs.completion.shape, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row.gather(1, obs.completion[i, : len(row), None])[:, 0]
    return out


def with_holes() -> Prefixes:
    """Rows with inserted tokens before, between and after their decisions; the last row has no decision at all."""
    pattern = ["1100100", "0101111", "1000001", "0000000"]
    mask = torch.tensor([[x == "1" for x in row] for row in pattern])
    return Prefixes(*prompts(1, 5, 3, 6), torch.randint(2, VOCABULARY, mask.shape), mask)


def one_by_one(model: PreTrainedModel, obs: Prefixes, temperature: float = 1.0) -> Tensor:
    """log pi of each decision, [B, T], 0 elsewhere, from a pass of its own over all tokens before it, no padding."""
    columns = []
    for prompt, prompt_mask, completion, mask in zip(*obs, strict=True):
        found = [torch.zeros(()) for _ in mask]
        for t in mask.nonzero().flatten().tolist():
            row = torch.cat([prompt[prompt_mask], completion[:t]]).unsqueeze(0)
            found[t] = (model(input_ids=row).logits[0, -1] / temperature).log_softmax(-1)[completion[t]]
        columns.append(torch.stack(found))
    return torch.stack(columns)


@torch.no_grad()
def with_tool(
    policy: LanguagePolicy, prompt: Tensor, prompt_mask: Tensor, request: Request, generator: torch.Generator
) -> Completions:
    """An engine that samples each row by itself and inserts two tokens after every two, each row elsewhere."""
    rows = request.completions * len(prompt)
    tokens = torch.full((rows, request.max_tokens), request.pad)
    logp, mask = torch.zeros(tokens.shape), torch.zeros(tokens.shape, dtype=torch.bool)
    for i in range(rows):
        row = prompt[i // request.completions][prompt_mask[i // request.completions]]
        for t in range(request.max_tokens):
            following = (policy.model(input_ids=row.unsqueeze(0)).logits[0, -1] / policy.temperature).log_softmax(-1)
            token = torch.multinomial(following.exp(), 1, generator=generator)[0]
            mask[i, t] = (t + i) % 4 < 2
            tokens[i, t] = token if mask[i, t] else TOOL
            logp[i, t] = following[token] if mask[i, t] else 0.0
            if mask[i, t] and int(token) in request.stop:
                break
            row = torch.cat([row, tokens[i, t : t + 1]])
    ended = torch.isin(tokens, torch.tensor(list(request.stop))) & mask
    return Completions(tokens, logp, mask, ~ended.any(1))


def valued(model: nn.Module, **options: Any) -> ValueModel:
    """A critic whose head is not 0."""
    value = ValueModel(trunk(model), **options)
    nn.init.normal_(value.head.weight)
    nn.init.normal_(value.head.bias)
    return value


def gradients(value: Tensor, module: torch.nn.Module) -> Tensor:
    """All of a module's as one vector."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, wanted, materialize_grads=True)])


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that cannot be reached fails at once."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def number_of_calls() -> Callable[[torch.nn.Module], list[int]]:
    """(module) -> a list that grows by one with each forward pass."""

    def count(module: torch.nn.Module) -> list[int]:
        calls: list[int] = []
        module.register_forward_pre_hook(lambda *_: calls.append(1))
        return calls

    return count
