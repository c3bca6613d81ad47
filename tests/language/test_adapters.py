"""Saved adapters: merged as peft merges them, followed only where the user says so, and never unpickled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel

from language.conftest import tiny
from policygrad.errors import UserError
from policygrad.language import arithmetic
from policygrad.language.adapters import add_adapter, load_adapter
from policygrad.language.models import load_model, save_model
from policygrad.language.policies import LanguagePolicy, reference_of

TOKENS = torch.tensor([[2, 9, 4, 4, 13, 7], [3, 3, 8, 22, 5, 2]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def adapted(base: Any, **options: Any) -> Any:
    """A model with an adapter that changes it."""
    model = add_adapter(base, 3, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tiny(request.param), arithmetic.tokenizer(), tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def first(base: Path) -> Path:
    """The directory of an adapter."""
    save_model(adapted(load_model(str(base))), arithmetic.tokenizer(), base.parent / "first")
    return base.parent / "first"


def test_the_merged_model_is_peft_s(base: Path, first: Path) -> None:
    from peft import PeftModel

    expected = PeftModel.from_pretrained(load_model(str(base)), str(first)).merge_and_unload()
    assert not torch.allclose(logits(expected), logits(load_model(str(base))), atol=1e-2)
    for options in ({"trust": True}, {"base_model": str(base)}):
        assert_close(logits(load_model(str(first), **options)), logits(expected), rtol=1e-5, atol=1e-5)


def test_the_square_root_of_the_rank_scales_where_the_settings_say_so(base: Path, first: Path) -> None:
    from peft import PeftModel

    _set(first, use_rslora=True)
    expected = PeftModel.from_pretrained(load_model(str(base)), str(first)).merge_and_unload()
    assert_close(logits(load_model(str(first), trust=True)), logits(expected), rtol=1e-5, atol=1e-5)


def test_a_second_stage_starts_from_the_first(base: Path, first: Path) -> None:
    """The reference is the merged model, and the third stage finds base, first and second."""
    start = load_model(str(first), trust=True)
    expected = logits(start)
    policy = LanguagePolicy(adapted(start))
    assert_close(reference_of(policy)(TOKENS).logits, expected.log_softmax(-1), rtol=1e-5, atol=1e-5)
    second = base.parent / "second"
    save_model(policy.model, arithmetic.tokenizer(), second)
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(first)
    assert_close(logits(load_model(str(second), trust=True)), logits(policy.model), rtol=1e-4, atol=1e-4)


def test_a_trunk_without_a_head_takes_the_adapter_too(base: Path, first: Path) -> None:
    whole = load_model(str(first), trust=True).base_model
    body = load_model(str(first), trust=True, kind=AutoModel)
    assert_close(body(TOKENS).last_hidden_state, whole(TOKENS).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_on_a_model_in_half_precision_is_float32(dtype: torch.dtype) -> None:
    trained = {p.dtype for p in add_adapter(tiny(dtype=dtype), 2).parameters() if p.requires_grad}
    assert trained == {torch.float32}


# What is refused.


def _set(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickled(directory: Path) -> None:
    weights = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(weights, directory / "adapter_model.bin")


def _more(name: str) -> Callable[[Path], None]:
    def add(directory: Path) -> None:
        path = directory / "adapter_model.safetensors"
        save_file({**load_file(path), name: torch.ones(3, 3)}, path)

    return add


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_pickled, "pickles are not read"),
        (_more("base_model.model.score.weight"), "score.weight is of no linear layer"),
        (_more("base_model.model.nowhere.lora_A.weight"), "nowhere.lora_A.weight is of no linear layer"),
        (lambda path: _set(path, use_dora=True), "its use_dora is True"),
        (lambda path: _set(path, alpha_pattern={"q_proj": 4}), "its alpha_pattern is"),
        (lambda path: _set(path, megatron_config={"x": 1}), "its megatron_config is"),
        (lambda path: _set(path, init_lora_weights="pissa"), "its init_lora_weights is pissa"),
        (lambda path: _set(path, lora_alpha="4"), "no LoRA adapter"),
        (lambda path: _set(path, peft_type="IA3"), "no LoRA adapter"),
        (lambda path: _set(path, base_model_name_or_path=str(path)), "is an adapter on itself"),
        (lambda path: _set(path, base_model_name_or_path=None), "names no base model: give base_model"),
        (lambda path: _set(path, base_model_name_or_path=[1]), "names no base model: give base_model"),
        (lambda path: (path / "adapter_config.json").write_text("[]"), "no object"),
    ],
)
@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_what_is_not_merged_is_said_in_one_line(
    damage: Callable[[Path], Any], said: str, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(first)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    with pytest.raises(UserError, match=said) as raised:
        load_model(str(first), trust=True)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_a_base_is_followed_only_if_the_user_says_so(base: Path, first: Path) -> None:
    with pytest.raises(
        UserError, match=r"is an adapter of .*base, as its file says: give that as base_model"
    ) as raised:
        load_model(str(first))
    assert len(str(raised.value)) <= 200
    with pytest.raises(UserError, match="is no adapter, and base_model is for one: leave base_model out"):
        load_model(str(base), base_model=str(base))


@pytest.mark.parametrize("base", ["llama"], indirect=True)
def test_the_weights_of_a_run_s_adapter_are_all_that_is_read_of_it(base: Path, first: Path) -> None:
    expected = logits(load_model(str(first), trust=True))
    (first / "adapter_config.json").write_text("{")
    model = add_adapter(load_model(str(base)), 3)
    load_adapter(model, first)
    assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    for damage, said in (
        (_more("base_model.model.x.lora_A.weight"), "of another model: base_model.model.x"),
        (_pickled, "holds no adapter that can be read"),
    ):
        damage(first)
        with pytest.raises(UserError, match=said) as raised:
            load_adapter(model, first)
        assert len(str(raised.value)) <= 200
