"""Models: loaded and saved without a bit lost, adapters, references, and saved critics."""

import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging

from language.conftest import every_architecture, gradients, tiny, valued
from policygrad.divergences import kl
from policygrad.errors import UserError
from policygrad.files import read_metadata
from policygrad.language import arithmetic
from policygrad.language.adapters import check_mergeable, load_adapter
from policygrad.language.models import (
    add_adapter,
    check_pair,
    checkpoint_gradients,
    load_critic,
    load_model,
    load_tokenizer,
    located,
    quiet,
    save_critic,
    save_model,
    stop_tokens,
)
from policygrad.language.policies import LanguagePolicy, reference_of

TOKENS = torch.tensor([[2, 9, 4, 4, 13, 7], [3, 3, 8, 22, 5, 2]])
saveable = pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "gemma2", "mistral"])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def saved(model: nn.Module, directory: Path) -> str:
    save_model(model, arithmetic.tokenizer(), directory)
    return str(directory)


def trained(module: nn.Module, obs: Any = TOKENS, steps: int = 3) -> None:
    """Move what is trained by some steps of gradient ascent."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (-module(obs).log_prob(TOKENS).sum()).backward()
        optimizer.step()


# Loading and saving.


@saveable
def test_a_saved_model_reloads_to_identical_logits(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    trained(LanguagePolicy(model))
    path = saved(model, tmp_path / "model")
    assert torch.equal(logits(load_model(path)), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(path)), logits(model))
    assert not torch.equal(logits(model), logits(tiny(name)))


def test_tied_embeddings_survive(tmp_path: Path) -> None:
    model = tiny("qwen2", tie_word_embeddings=True)
    again = load_model(saved(model, tmp_path))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert torch.equal(logits(again), logits(model))


def test_what_is_saved_is_safetensors_and_what_is_pickled_is_not_read(tmp_path: Path) -> None:
    path = saved(tiny(), tmp_path)
    assert {x.suffix for x in tmp_path.iterdir()} == {".json", ".safetensors"}
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_model(path)


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("auto", "float64")])
def test_the_type_of_the_weights_is_the_one_asked_for(dtype: str, expected: str, tmp_path: Path) -> None:
    path = saved(tiny(dtype=torch.float64), tmp_path)
    assert {p.dtype for p in load_model(path, dtype=dtype).parameters()} == {getattr(torch, expected)}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_asked_for(attention: str, tmp_path: Path) -> None:
    assert load_model(saved(tiny(), tmp_path), attention=attention).config._attn_implementation == attention


def test_another_kind_of_model_may_lack_its_head(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    path = saved(tiny(), tmp_path)
    model = load_model(path, kind=AutoModelForSequenceClassification, num_labels=1)
    assert isinstance(model, LlamaForSequenceClassification)
    assert model.score.weight.shape[0] == 1


def test_a_tokenizer_is_padded_on_the_left(tmp_path: Path) -> None:
    tokenizer = arithmetic.tokenizer()
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    batch = tokenizer(["12+", "3"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_the_end_stands_for_padding_where_there_is_none(tmp_path: Path) -> None:
    inner = arithmetic.tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


def test_a_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    saved(tiny(), tmp_path / "model")
    assert torch.equal(logits(load_model("~/model")), logits(tiny()))
    assert load_tokenizer("~/model").eos_token == "<eos>"


def _one_line(raised: pytest.ExceptionInfo[UserError]) -> bool:
    return "\n" not in str(raised.value) and len(str(raised.value)) <= 200


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "nowhere", "some-one/nowhere", "a b?"])
def test_what_is_not_there_is_said_in_one_line(load: Callable[[str], Any], name: str, offline: None) -> None:
    with pytest.raises(UserError, match="nowhere" if "nowhere" in name else "a b") as raised:
        load(name)
    assert _one_line(raised)


def test_an_empty_directory_is_said_in_one_line(tmp_path: Path) -> None:
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=tmp_path.name) as raised:
            load(str(tmp_path))
        assert _one_line(raised)
        assert "hub" not in str(raised.value), "it is a directory, if not a good one"


def _cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", _cut_in_half),
        ("config.json", lambda path: path.write_text("{")),
        ("config.json", lambda path: path.write_text(json.dumps({"model_type": "never_heard_of"}))),
        ("config.json", lambda path: path.write_text(json.dumps({"model_type": "t5"}))),
    ],
    ids=["cut file", "broken configuration", "unknown model", "no causal language model"],
)
def test_a_damaged_directory_is_said_in_one_line(file: str, damage: Callable[[Path], Any], tmp_path: Path) -> None:
    path = saved(tiny(), tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match=rf"no model could be loaded|{file} is damaged: ") as raised:
        load_model(path)
    assert _one_line(raised)


def _instead(content: bytes | str) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _setting(**changes: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        *((name, _pipe, "not a regular file") for name in ("config.json", "model.safetensors", "tokenizer.json")),
        *((name, _pipe, "not a regular file") for name in ("adapter_config.json", "chat_template.jinja")),
        *((name, _instead("[" * 100_000), "nested too deeply") for name in ("config.json", "tokenizer.json")),
        ("config.json", _instead('{"a":' * 900 + "1" + "}" * 900), "nested too deeply"),
        ("config.json", _instead("[1]"), "no object"),
        ("config.json", _instead(b"\xff\xfe"), "damaged"),
        ("config.json", lambda path: os.truncate(path, 65 * 2**20), "bytes"),
        ("config.json", _setting(hidden_size="16"), "hidden_size"),
        ("config.json", _setting(hidden_size=10**9), "do not fit its config"),
        ("config.json", _setting(vocab_size=10**10), "do not fit its config"),
        ("config.json", _setting(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        ("config.json", _setting(text_config={"num_experts": 10**9}), "num_experts is 1000000000"),
        ("config.json", _setting(attn_implementation="someone/kernel"), "code on the hub"),
        ("config.json", _setting(model_type=[1]), "no model could be loaded"),
        ("model.safetensors", _instead((2**62).to_bytes(8, "little") + b"{}"), "header"),
        ("model.safetensors", _instead((10**5).to_bytes(8, "little") + b"[" * 10**5), "header"),
        ("model.safetensors", _instead(b""), "header"),
        ("model.safetensors.index.json", _instead('{"weight_map": {"a": "../x.safetensors"}}'), "outside"),
        ("additional_chat_templates/x.jinja", lambda path: (path.parent.mkdir(), _pipe(path)), "not a regular file"),
    ],
)
def test_no_file_is_believed(file: str, damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    """One line each, at once: a pipe would be waited for, and a billion layers be built."""
    path = saved(tiny(), tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match=said) as raised:
        load_model(path)
    assert _one_line(raised)


def test_an_end_that_is_no_token_is_said() -> None:
    model = tiny()
    model.generation_config.eos_token_id = "x"
    with pytest.raises(UserError, match="eos_token_id is"):
        stop_tokens(model, arithmetic.tokenizer())


def test_a_model_is_known_by_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tiny(), tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert load_model("model").name_or_path == str(tmp_path / "model")
    assert located("someone/model") == "someone/model"
    adapted = add_adapter(load_model("model"), 1)
    assert adapted.peft_config["default"].base_model_name_or_path == str(tmp_path / "model")


# What a save leaves.


@pytest.mark.parametrize("adapter", [False, True])
def test_the_metadata_are_in_the_file_of_the_weights(adapter: bool, tmp_path: Path) -> None:
    model = add_adapter(tiny(), 2) if adapter else tiny()
    save_model(model, arithmetic.tokenizer(), tmp_path / "m", {"iteration": "7", "ended": "false"})
    path = tmp_path / "m" / ("adapter_model.safetensors" if adapter else "model.safetensors")
    assert read_metadata(path) == {"format": "pt", "iteration": "7", "ended": "false"}
    assert path.stat().st_mode == (tmp_path / "m" / "tokenizer.json").stat().st_mode, "no more private than the rest"
    assert int.from_bytes(path.read_bytes()[:8], "little") % 64 == 56, "tensors are aligned"
    assert not {x.name for x in (tmp_path / "m").iterdir()} & {".new", "README.md"}
    if not adapter:
        assert torch.equal(logits(load_model(str(tmp_path / "m"))), logits(model))


def test_a_save_that_fails_leaves_the_old_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are replaced one by one, the weights last, and nothing before all are written."""
    path = saved(tiny(), tmp_path / "m")
    before = {x.name: x.read_bytes() for x in (tmp_path / "m").iterdir()}
    other = tiny(vocab_size=30)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        with pytest.raises(UserError, match=r"cannot be written: No space left on device; what was saved before stays"):
            saved(other, tmp_path / "m")
    assert {x.name: x.read_bytes() for x in (tmp_path / "m").iterdir()} == before
    moved: list[str] = []
    replaced = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or replaced(a, b))
    saved(other, tmp_path / "m")
    assert moved[-1] == "model.safetensors"
    assert load_model(path).config.vocab_size == 30


@pytest.mark.parametrize("lost", [["model.layers.0.mlp.up_proj.weight"], ["lm_head.weight", "model.norm.weight"]])
def test_missing_weights_are_not_made_up(lost: list[str], tmp_path: Path) -> None:
    path = saved(tiny(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: x for k, x in weights.items() if k not in lost}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match=rf"{lost[0]}{' and 1 more' if lost[1:] else ''}: give a whole"):
        load_model(path)


@pytest.mark.parametrize("dtype", ["float23", "nn", "Float32"])
def test_a_type_that_is_none_is_named(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=dtype):
        load_model(saved(tiny(), tmp_path), dtype=dtype)


def test_an_attention_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no_such") as raised:
        load_model(saved(tiny(), tmp_path), attention="no_such")
    assert _one_line(raised)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    inner = arithmetic.tokenizer().backend_tokenizer
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="end-of-sequence"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_pair_that_does_not_fit_is_refused(name: str) -> None:
    tokenizer = arithmetic.tokenizer()
    check_pair(tiny(name), tokenizer, 64)
    check_pair(tiny(name, vocab_size=len(tokenizer)), tokenizer, 64)
    with pytest.raises(UserError, match="16 tokens and the model embeddings for 15"):
        check_pair(tiny(name, vocab_size=len(tokenizer) - 1), tokenizer, 5)
    with pytest.raises(UserError, match=r"have 65 tokens.* context 64"):
        check_pair(tiny(name), tokenizer, 65)


@pytest.mark.parametrize(
    ("named", "expected"), [(None, (1,)), (1, (1,)), (9, (1, 9)), ([9, 1, 4], (1, 4, 9)), ([], (1,))]
)
@pytest.mark.parametrize("adapter", [False, True])
def test_a_completion_ends_where_tokenizer_or_model_say_so(named: Any, expected: Any, adapter: bool) -> None:
    model = tiny()
    model.generation_config.eos_token_id = named
    assert stop_tokens(add_adapter(model, 1) if adapter else model, arithmetic.tokenizer()) == expected


def test_quiet_ends_with_the_block() -> None:
    logging.enable_progress_bar()
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    with pytest.raises(ZeroDivisionError), quiet():
        assert not logging.is_progress_bar_enabled() / 0
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_loading_and_saving_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = saved(add_adapter(tiny(), 1), tmp_path / "adapter")
    path = saved(tiny(), tmp_path / "model")
    load_model(path)
    load_tokenizer(path)
    assert capfd.readouterr() == ("", "")


# Adapters.


@every_architecture
def test_an_adapter_starts_as_the_model_that_it_is_added_to(name: str) -> None:
    model = add_adapter(tiny(name), 2)
    assert torch.equal(logits(model), logits(tiny(name)))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in n for n in names), "only the adapter is trained"
    assert not any("lm_head" in n or "embed" in n for n in names)


@every_architecture
def test_the_reference_of_an_adapter_is_the_base_bit_for_bit_after_training(name: str) -> None:
    base, model = LanguagePolicy(tiny(name)), add_adapter(tiny(name), 2)
    policy = LanguagePolicy(model)
    reference, before, y = reference_of(policy), logits(model), TOKENS
    trained(policy)
    assert torch.equal(reference(y).logits, base(y).logits)
    assert torch.equal(logits(model.get_base_model()), logits(model)), "and the adapter is on again"
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert kl(policy(y), reference(y)).max() > 1e-3
    assert {n for n, p in policy.named_parameters() if p.requires_grad and "lora_" not in n} == set()


def test_the_reference_of_an_adapter_holds_no_copy_and_has_no_gradient() -> None:
    policy = LanguagePolicy(add_adapter(tiny(), 2))
    reference = reference_of(policy)
    assert list(reference.parameters()) == []
    assert reference.state_dict() == {}
    assert not reference(TOKENS).log_prob(TOKENS).requires_grad
    for p in policy.parameters():
        p.requires_grad_()  # as after modules_to_save, or by hand
    assert not reference(TOKENS).log_prob(TOKENS).requires_grad
    trained_before = [n for n, p in policy.named_parameters() if p.requires_grad]
    p = policy(TOKENS)
    divergence = kl(p, reference(TOKENS)).sum()
    assert trained_before == [n for n, p in policy.named_parameters() if p.requires_grad]
    assert gradients(divergence + policy(TOKENS).log_prob(TOKENS).sum(), policy).any()


def test_the_reference_in_the_midst_of_an_objective_takes_no_gradient_away() -> None:
    """GRPO's anchor: the policy's graph is made, the adapter turned off and on, and then comes backward."""
    found = []
    for with_reference in (False, True):
        torch.manual_seed(0)
        policy = LanguagePolicy(add_adapter(tiny(), 2))
        trained(policy)
        checkpoint_gradients(policy.model)
        logp = policy(TOKENS).log_prob(TOKENS).sum()
        if with_reference:
            reference_of(policy)(TOKENS).log_prob(TOKENS)
        logp.backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    assert found[0].any()
    assert torch.equal(*found)


@every_architecture
def test_the_reference_of_a_whole_model_is_a_frozen_copy(name: str) -> None:
    policy = LanguagePolicy(tiny(name), temperature=0.7, autocast=None)
    reference = reference_of(policy)
    before = deepcopy(reference.state_dict())
    assert torch.equal(reference(TOKENS).logits, policy(TOKENS).logits)
    assert not any(p.requires_grad for p in reference.parameters())
    assert {p.data_ptr() for p in reference.parameters()}.isdisjoint(p.data_ptr() for p in policy.parameters())
    trained(policy)
    assert all(torch.equal(x, before[n]) for n, x in reference.state_dict().items())
    assert torch.equal(reference(TOKENS).logits, LanguagePolicy(tiny(name), temperature=0.7)(TOKENS).logits)
    assert kl(policy(TOKENS), reference(TOKENS)).max() > 1e-3
    assert all(p.requires_grad for p in policy.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_saved_adapter_reloads_to_identical_logits(name: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM, PeftModel

    base = saved(tiny(name), tmp_path / "base")
    model = add_adapter(load_model(base), 2)
    trained(LanguagePolicy(model))
    path = saved(model, tmp_path / "adapter")
    sizes = [(tmp_path / x).stat().st_size for x in ("adapter/adapter_model.safetensors", "base/model.safetensors")]
    assert sizes[0] < sizes[1], "the adapter alone"
    expected = logits(model)
    assert not torch.allclose(expected, logits(tiny(name)), atol=1e-2)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(path)), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(load_model(base), path)), expected)
    assert load_tokenizer(path).eos_token == "<eos>"
    again = add_adapter(load_model(base), 2)
    load_adapter(again, Path(path))
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merged_adapter_is_a_plain_model_with_the_same_logits(name: str, tmp_path: Path) -> None:
    model = add_adapter(tiny(name), 2)
    trained(LanguagePolicy(model))
    expected, before = logits(model), {name: x.clone() for name, x in model.state_dict().items()}
    save_model(model, arithmetic.tokenizer(), tmp_path / "whole", merged=True)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not [x for name, found in info.items() if "keys" in name for x in found]
    assert not hasattr(again, "peft_config")
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(again), logits(tiny(name)), atol=1e-2)
    now = model.state_dict()
    assert all(torch.equal(x, now[name]) for name, x in before.items()), "the model in training stays as it is"
    assert not list((tmp_path / "whole").glob("adapter*"))


def test_a_weight_that_two_layers_share_cannot_be_merged() -> None:
    model = add_adapter(tiny(), 2, targets=["lm_head"])
    head, embedded = model.get_base_model().lm_head.base_layer, model.get_base_model().get_input_embeddings()
    head.weight = embedded.weight
    with pytest.raises(UserError, match="share their weight, and an adapter on one cannot be merged"):
        check_mergeable(model)
    check_mergeable(add_adapter(tiny(), 2))


def test_alpha_is_twice_the_rank_unless_it_is_given() -> None:
    def scaling(**options: Any) -> float:
        model = add_adapter(tiny(), 4, **options)
        (layer,) = [m for n, m in model.named_modules() if n.endswith("layers.0.self_attn.q_proj")]
        assert layer.lora_A["default"].weight.shape[0] == 4
        return layer.scaling["default"]

    assert scaling() == 2
    assert scaling(alpha=2.0) == 0.5


def test_the_adapter_is_on_the_layers_that_are_named() -> None:
    names = {n.split(".lora_")[0].split(".")[-1] for n, _ in add_adapter(tiny(), 1).named_parameters() if "lora_" in n}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model = add_adapter(tiny(), 1, targets=["v_proj"])
    assert {n.split(".lora_")[0][-6:] for n, _ in model.named_parameters() if "lora_" in n} == {"v_proj"}


@pytest.mark.parametrize(
    ("rank", "targets", "said"),
    [
        (0, None, "LoRA cannot be added.*r"),
        (
            2,
            ["q", "no_such_layer"],
            "^the model has no layers q, no_such_layer for LoRA: give lora_targets of down_proj, ",
        ),
    ],
)
def test_an_adapter_that_cannot_be_is_said_in_one_line(rank: int, targets: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        add_adapter(tiny(), rank, targets=targets)
    assert _one_line(raised)


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpoints_need_no_gradient_of_the_embeddings(adapter: bool) -> None:
    """With LoRA nothing before the first adapter has a gradient: reentrant checkpoints would lose it all."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = add_adapter(tiny(), 2) if adapter else tiny()
        policy = LanguagePolicy(model)
        trained(policy)
        if checkpointed:
            checkpoint_gradients(model)
            assert model.training, "transformers heeds checkpoints in training only"
        found.append(gradients(policy(TOKENS).log_prob(TOKENS).sum(), policy))
    assert found[0].any()
    assert_close(found[1], found[0])


# Saved critics.


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_saved_critic_reloads_to_identical_values(shared: bool, adapter: bool, tmp_path: Path) -> None:
    policy = LanguagePolicy(add_adapter(tiny(), 2) if adapter else tiny())
    critic = valued(policy.model if shared else tiny("gpt2"))
    path = tmp_path / "critic.safetensors"
    save_critic(critic, path, policy)
    other = valued(policy.model if shared else deepcopy(critic.trunk))
    with torch.no_grad():
        for p in other.head.parameters() if shared else other.parameters():
            p.add_(1.0)
    assert not torch.equal(other(TOKENS), critic(TOKENS))
    load_critic(other, path, policy)
    assert torch.equal(other(TOKENS), critic(TOKENS))
    assert set(load_file(path)) == ({"weight", "bias"} if shared else set(critic.state_dict()))


def test_a_critic_of_another_kind_is_refused(tmp_path: Path) -> None:
    policy, path = LanguagePolicy(tiny()), tmp_path / "critic.safetensors"
    save_critic(valued(policy.model), path, policy)
    for critic, file in ((valued(tiny("gpt2")), path), (valued(policy.model), tmp_path / "nowhere")):
        with pytest.raises(UserError, match=r"cannot be read: .*; give one of the same kind") as raised:
            load_critic(critic, file, policy)
        assert _one_line(raised)
