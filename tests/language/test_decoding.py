"""Decoding over fixed shapes is decoding over keys that grow: the same tokens, log-probabilities and ends."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache

from language.conftest import ARCHITECTURES, END, PAD, RECURRENT, SLIDING, prompts, tiny
from policygrad.language import decoding, generation
from policygrad.language.completions import Completions, Request
from policygrad.language.decoding import Captured, Growing
from policygrad.language.policies import LanguagePolicy

OWN_MASK = {"gpt_neo"}  # made from the number of keys
FULL = [name for name in ARCHITECTURES if name not in SLIDING | RECURRENT | OWN_MASK]
LENGTHS = (2, 6, 1, 4)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several captures and several looks in a few tokens."""
    monkeypatch.setattr(decoding, "BLOCK", 3)
    monkeypatch.setattr(decoding.Captured, "every", 2)


def sampled(monkeypatch: pytest.MonkeyPatch, form: Any, policy: LanguagePolicy, **request: Any) -> Completions:
    """What a form of decoding makes of the same prompts and random numbers."""
    monkeypatch.setattr(generation, "form", lambda *_: form)
    given = {"completions": 3, "max_tokens": 11, "stop": (END, 5, 7), "pad": PAD} | request
    torch.manual_seed(0)
    return generation.generate(policy, *prompts(*LENGTHS), Request(**given), torch.Generator().manual_seed(0))


def compare(monkeypatch: pytest.MonkeyPatch, policy: LanguagePolicy, **request: Any) -> Completions:
    growing, captured = (sampled(monkeypatch, form, policy, **request) for form in (Growing, Captured))
    for field in fields(Completions):
        one, other = getattr(captured, field.name), getattr(growing, field.name)
        if field.name == "logp":
            assert_close(one, other, rtol=0, atol=1e-10 if one.dtype == torch.float64 else 1e-5)
        else:
            assert torch.equal(one, other), field.name
    return growing


@pytest.mark.parametrize("name", FULL)
def test_it_is_the_same_for_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float32 if name == "mixtral" else torch.float64  # its products of experts have no float64
    policy = LanguagePolicy(tiny(name, dtype=dtype), temperature=1.7)
    done = compare(monkeypatch, policy)
    lengths = done.mask.sum(1)
    assert lengths.max() > 3 * lengths.min(), "rows are dropped on the way"


@pytest.mark.parametrize("request_", [{"greedy": True}, {"stop": ()}, {"micro_batch": 5}, {"max_tokens": 1}])
def test_it_is_the_same_for_every_request(request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compare(monkeypatch, LanguagePolicy(tiny(dtype=torch.float64)), **request_)


def test_it_ends_at_stop_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(rows: list[list[int]]) -> list[str]:
        return ["".join(chr(97 + token) for token in row) for row in rows]

    policy = LanguagePolicy(tiny(dtype=torch.float64), temperature=3.0)
    texts = {"stop_texts": ("k", "cd", "lm"), "decode": decode, "completions": 20, "stop": ()}
    done = compare(monkeypatch, policy, **texts)
    assert not done.cut.all()


@pytest.mark.parametrize("name", [*sorted(SLIDING | RECURRENT | OWN_MASK), "llama"])
def test_layers_that_do_not_attend_to_all_keys_by_a_mask_grow(name: str) -> None:
    model = tiny(name)
    assert Captured.can(LanguagePolicy(model), DynamicCache(config=model.config)) == (name == "llama")


def test_attention_that_takes_no_mask_grows() -> None:
    policy = LanguagePolicy(tiny())
    policy.model.config._attn_implementation = "flash_attention_2"
    assert not Captured.can(policy, DynamicCache(config=policy.model.config))
