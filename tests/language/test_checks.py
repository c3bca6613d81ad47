"""What is checked before a model is trained."""

from typing import Any

import pytest
import torch
import transformers

from language.conftest import BASE, PAD, VOCABULARY, every_architecture, tiny
from policygrad.errors import UserError
from policygrad.language.checks import check_scored_as_sampled
from policygrad.language.policies import LanguagePolicy
from policygrad.language.sampler import Prompts


def some_prompts() -> Prompts:
    rows = [torch.randint(2, VOCABULARY, (length,)).tolist() for length in (3, 7, 5)]
    return Prompts.of(["a", "b", "c"], rows, pad=PAD)


def recurrent() -> Any:
    """RecurrentGemma keeps the state of its recurrence in its modules."""
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
    kinds = {"lru_width": 16, "attention_window_size": 8, "block_types": ("recurrent", "recurrent", "attention")}
    model = transformers.AutoModelForCausalLM.from_config(transformers.RecurrentGemmaConfig(**(BASE | size | kinds)))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.eval()


@every_architecture
def test_every_architecture_passes(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        policy, some = LanguagePolicy(tiny(name, dtype=dtype), temperature=0.7), some_prompts()
        before = torch.get_rng_state()
        check_scored_as_sampled(policy, some, 20)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_state_in_the_modules_is_found() -> None:
    policy = LanguagePolicy(recurrent())
    with pytest.raises(
        UserError, match=r"RecurrentGemmaForCausalLM gives other log-probabilities .* by 0\.\d+ on"
    ) as raised:
        check_scored_as_sampled(policy, some_prompts(), 20)
    assert len(str(raised.value)) <= 200


def test_a_cache_that_lies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from policygrad.language import generation

    right = generation.positions
    monkeypatch.setattr(generation, "positions", lambda mask: 2 * right(mask))
    with pytest.raises(UserError, match="LlamaForCausalLM gives other log-probabilities"):
        check_scored_as_sampled(LanguagePolicy(tiny()), some_prompts(), 20)
