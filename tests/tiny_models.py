"""Real models, so small that a run takes a fraction of a second."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny(**changes: object) -> LlamaForCausalLM:
    """Two layers of 16 units, over the arithmetic task's 16 tokens."""
    values = {
        "vocab_size": 16,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        **changes,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**values))
