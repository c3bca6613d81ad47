"""A base in 4 bits under an adapter, against a plain model of the weights that its codes stand for."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from torch import Tensor, nn
from torch.testing import assert_close

from policygrad.algorithms.grpo import GRPOObjective
from policygrad.errors import UserError
from policygrad.language import models
from policygrad.language.adapters import load_adapter
from policygrad.language.completions import Request
from policygrad.language.data import left_padded
from policygrad.language.generation import generate
from policygrad.language.policies import LanguagePolicy, Prefixes, causal, reference_of
from policygrad.language.quantization import quantized
from policygrad.language.tasks import policy_of
from policygrad.rollout import Batch

dequantize_4bit = pytest.importorskip("bitsandbytes").functional.dequantize_4bit

WIDE = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base")
    tiny(**WIDE).save_pretrained(directory)
    return directory


def loaded(saved: Path, **options: Any) -> Any:
    return models.load_model(str(saved), quantize=True, **options)


@torch.no_grad()
def dequantized(layer: Any) -> Tensor:
    """The weight [outputs, inputs] that a layer's codes stand for, float32."""
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def plain(base: nn.Module) -> nn.Module:
    """A model of float32 weights: those that the codes of another stand for."""
    model, layers = tiny(**WIDE), quantized(base)
    weights = {name: x for name, x in base.state_dict().items() if name.removesuffix(".weight") not in layers}
    model.load_state_dict(weights | {f"{name}.weight": dequantized(x) for name, x in layers.items()}, strict=True)
    return model


def with_adapter(model: nn.Module) -> LanguagePolicy:
    """A policy whose adapter is the same every time, and not 0."""
    policy = policy_of(model, lora_rank=4, temperature=1.3)
    torch.manual_seed(1)
    for p in policy.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.2)
    return policy


def some() -> tuple[Prefixes, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompt, mask = left_padded([[3, 4, 5], [6], [7, 8]], 0)
    tokens = torch.randint(16, (3, 5), generator=generator)
    return Prefixes(prompt, mask, tokens, torch.ones_like(tokens, dtype=torch.bool)), tokens


def test_all_linear_layers_but_the_head_are_in_4_bits_and_the_weights_are_near(saved: Path) -> None:
    base, whole = loaded(saved), tiny(**WIDE)
    layers = quantized(base)
    assert len(layers) == 2 * 7
    assert base.lm_head.weight.dtype == torch.float32
    for name, layer in layers.items():
        weight = whole.get_submodule(name).weight.detach()
        assert layer.weight.dtype == torch.uint8
        assert 0.02 < float((dequantized(layer) - weight).norm() / weight.norm()) < 0.12
        assert layer.weight.numel() == weight.numel() / 2


@pytest.mark.parametrize("sampled_before", [False, True], ids=["fresh", "after sampling"])
def test_it_is_the_plain_model_of_its_weights_and_so_are_the_gradients_of_its_adapter(
    sampled_before: bool, saved: Path
) -> None:
    """Also once it was asked without a gradient, where bitsandbytes may pack codes for another kernel."""
    base = loaded(saved)
    policies = [with_adapter(model) for model in (base, plain(base))]
    (obs, tokens), found = some(), []
    if sampled_before:
        with torch.no_grad():
            policies[0](obs).log_prob(tokens)
    for policy in policies:
        logp = policy(obs).log_prob(tokens)
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        weight = torch.linspace(-1, 1, logp.numel()).view_as(logp)
        gradients = torch.autograd.grad((weight * logp).sum(), list(trained.values()))
        found.append((logp.detach(), dict(zip(trained, gradients, strict=True))))
    (logp, mine), (expected, its) = found
    assert_close(logp, expected, rtol=0, atol=1e-5)
    assert mine.keys() == its.keys()
    assert len(mine) == 2 * 2 * 7
    assert all("lora_" in name for name in mine)
    for name, gradient in mine.items():
        assert_close(gradient, its[name], rtol=1e-4, atol=1e-5)
        assert gradient.norm() > 0, name


def test_tokens_are_scored_as_they_were_sampled_and_the_reference_is_the_base(saved: Path) -> None:
    policy = with_adapter(loaded(saved))
    prompt, mask = left_padded([[3, 4, 5], [6]], 0)
    done = generate(policy, prompt, mask, Request(4, 6, (1,), 0), torch.Generator().manual_seed(0))
    rows = torch.arange(2).repeat_interleave(4)
    obs = Prefixes(prompt[rows], mask[rows], done.tokens, done.mask)
    assert_close(policy(obs).log_prob(done.tokens).where(done.mask, 0.0), done.logp, rtol=0, atol=1e-5)
    bare = LanguagePolicy(plain(loaded(saved)), temperature=1.3)
    reference = reference_of(policy)(obs).log_prob(done.tokens)
    assert_close(reference, bare(obs).log_prob(done.tokens), rtol=0, atol=1e-5)


def test_a_gradient_step_moves_the_adapter_alone(saved: Path) -> None:
    policy = with_adapter(loaded(saved))
    before = {name: x.clone() for name, x in policy.named_parameters()}
    obs, tokens = some()
    mask = obs.completion_mask
    logp = policy(obs).log_prob(tokens).detach()
    nothing = torch.zeros_like(logp)
    advantage = torch.tensor([[1.0], [-1.0], [0.5]]).expand_as(logp)
    batch = Batch(obs, tokens, logp, mask, mask / mask.sum(), advantage, nothing, nothing)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    (-GRPOObjective(policy)(batch)[0]).backward()
    optimizer.step()
    moved = {name for name, x in policy.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if "lora_" in name}


def test_copies_load_each_others_state_which_is_codes_alone(saved: Path) -> None:
    policy = with_adapter(loaded(saved))
    copy = deepcopy(policy)
    with torch.no_grad():
        for p in copy.parameters():
            p.add_(1) if p.requires_grad else None
    copy.load_state_dict(policy.state_dict())
    assert policy.state_dict().keys() == {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    obs, tokens = some()
    assert torch.equal(copy(obs).log_prob(tokens), policy(obs).log_prob(tokens))


def test_a_saved_adapter_and_its_base_are_the_policy_again(saved: Path, tmp_path: Path) -> None:
    from policygrad.language.arithmetic import tokenizer

    policy = with_adapter(loaded(saved))
    models.save_model(policy.model, tokenizer(), tmp_path / "adapter")
    again = policy_of(loaded(saved), lora_rank=4, temperature=1.3)
    load_adapter(again.model, tmp_path / "adapter")
    obs, tokens = some()
    assert torch.equal(again(obs).log_prob(tokens), policy(obs).log_prob(tokens))
    whole = models.load_model(str(tmp_path / "adapter"), base_model=str(saved))  # merged into the whole weights
    assert not quantized(whole)
    with pytest.raises(UserError, match=r"is an adapter, which is merged .*leave quantize out"):
        loaded(tmp_path / "adapter", base_model=str(saved))


def test_the_base_takes_less_memory(saved: Path) -> None:
    def held(model: nn.Module) -> int:
        return sum(layer.weight.nbytes for _, layer in model.named_modules() if isinstance(layer, nn.Linear))

    base = loaded(saved)
    head = causal(base).lm_head.weight.nbytes
    assert (held(tiny(**WIDE)) - head) == 8 * (held(base) - head)
