"""Reward models: the likelihood of a preference, scores without a trace of padding, and what cannot be loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from policygrad.errors import UserError
from policygrad.language import arithmetic
from policygrad.language.models import save_model
from policygrad.language.reward_models import (
    RewardModel,
    accuracy,
    as_batch,
    bradley_terry,
    centered,
    encode,
    encode_pairs,
    preference_objective,
    scores,
)
from policygrad.language.rewards import Rewards
from policygrad.rollout import micro_batches, minibatches

LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": LLAMA,
    "Qwen2": LLAMA | {"num_key_value_heads": 2},
    "Qwen3": LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "Mistral": LLAMA | {"num_key_value_heads": 2, "sliding_window": 4},
    "Gemma2": LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "GPTNeoX": LLAMA,
    "OPT": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 24,
        "word_embed_proj_dim": 16,
    },
}
PROMPTS = ["12+3=", "7+7=", "999+999=", "1+1="]
COMPLETIONS = ["2+3=5,1+0=1:15", "7+7=14:14", "9", "2"]
END = 1


def classifier(name: str = "Llama", **options: Any) -> Any:
    """A model of one label whose scores are far apart; its padding is token 0."""
    base = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": END, "num_labels": 1}
    base |= {"max_position_embeddings": 64} if name != "GPT2" else {}
    config = getattr(transformers, f"{name}Config")(**(base | DECODERS.get(name, LLAMA) | options))
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def tokenizer(pad: str = "<pad>", side: str = "left", template: str | None = None) -> PreTrainedTokenizerFast:
    made = arithmetic.tokenizer()
    made.pad_token, made.padding_side, made.chat_template = pad, side, template
    return made


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools\nhere') }}{% endif %}"
    "{{ m.content }}{{ ',' if m.role == 'user' else '<eos>' }}{% endfor %}"
)


def own_scores(model: Any, rows: Sequence[list[int]]) -> Tensor:
    """What the model's own class gives each row alone, with its own way to the end switched off."""
    model.eval()
    with torch.no_grad():
        padding, model.config.pad_token_id = model.config.pad_token_id, None
        alone = [model(input_ids=torch.tensor([row])).logits[0, 0] for row in rows]
        model.config.pad_token_id = padding
    return torch.stack(alone)


# The likelihood of a preference.


def test_bradley_terry_is_the_log_probability_of_the_choice(float64: None) -> None:
    chosen, rejected = torch.randn(50), torch.randn(50)
    strength = chosen.exp() / (chosen.exp() + rejected.exp())  # as Bradley and Terry wrote it
    assert_close(bradley_terry(chosen, rejected), strength.log())
    assert_close(bradley_terry(chosen, rejected).exp() + bradley_terry(rejected, chosen).exp(), torch.ones(50))


def test_bradley_terry_of_rewards_far_apart() -> None:
    chosen = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    gain = bradley_terry(chosen, torch.zeros(3))
    assert_close(gain, torch.tensor([0.0, -1e4, -0.6931472]))
    gain.sum().backward()
    assert_close(
        chosen.grad, torch.tensor([0.0, 1.0, 0.5])
    )  # sigma(r_rejected - r_chosen): nothing to learn, all, half


def test_only_the_difference_counts_but_for_the_centering() -> None:
    chosen, rejected = torch.randn(9), torch.randn(9)
    assert_close(bradley_terry(chosen + 5, rejected + 5), bradley_terry(chosen, rejected))
    assert_close(centered(chosen, -chosen), torch.zeros(9))
    assert_close(centered(chosen + 5, 5 - chosen), torch.full((9,), -100.0))


def test_accuracy_counts_a_tie_as_half() -> None:
    assert accuracy(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 4.0])).tolist() == [1.0, 0.5, 0.0]


# Scores.


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_scores_as_its_rows_alone_whatever_the_padding(name: str, pad: str, side: str) -> None:
    """Also where padding is the end of sequence: then a classifier's own class misses the end."""
    model = RewardModel(classifier(name), tokenizer(pad, side))
    assert model.head is not None
    rows = [encode(p, c, False, model.tokenizer) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert all(row[-1] == END for row in rows)
    expected = own_scores(model.model, rows)
    assert expected.std() > 0.05
    assert_close(torch.tensor(model(PROMPTS, COMPLETIONS)), expected, rtol=1e-4, atol=1e-5)
    assert_close(torch.tensor([model([p], [c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]), expected)


def test_the_classs_own_pooling_misses_an_end_that_is_also_padding() -> None:
    """Why there is a pooling of our own: transformers reads the state before the end."""
    model = RewardModel(classifier(), tokenizer("<eos>"))
    row = encode(PROMPTS[0], COMPLETIONS[0], False, model.tokenizer)
    with torch.no_grad():
        theirs = model.model.eval()(input_ids=torch.tensor([row])).logits[0, 0]
    assert_close(theirs, own_scores(model.model, [row[:-1]])[0])
    assert abs(theirs - own_scores(model.model, [row])[0]) > 1e-3


def test_an_encoders_score_is_its_own() -> None:
    model = RewardModel(classifier("Bert"), tokenizer())
    assert model.head is None
    rows = [encode(p, c, False, model.tokenizer) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert_close(torch.tensor(model(PROMPTS, COMPLETIONS)), own_scores(model.model, rows), rtol=1e-4, atol=1e-5)


def test_rows_are_scored_some_at_a_time_in_their_order() -> None:
    network, words = classifier(), tokenizer()
    whole, few = RewardModel(network, words)(PROMPTS, COMPLETIONS), RewardModel(network, words, rows=3)
    calls: list[int] = []
    network.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert_close(few(PROMPTS, COMPLETIONS), whole, rtol=1e-5, atol=1e-6)
    assert calls == [3, 1]


def test_dropout_changes_no_score_and_training_goes_on_with_it() -> None:
    network = classifier("GPT2", resid_pdrop=0.5).train()
    model = RewardModel(network, tokenizer())
    assert model(PROMPTS, COMPLETIONS) == model(PROMPTS, COMPLETIONS)
    assert network.training
    assert all(isinstance(x, float) for x in model(PROMPTS, COMPLETIONS))


def test_what_was_cut_is_scored_without_an_end() -> None:
    model = RewardModel(classifier(), tokenizer())
    cut = model(PROMPTS, COMPLETIONS, cut=[True, False, True, False])
    whole = model(PROMPTS, COMPLETIONS)
    assert [a == pytest.approx(b, abs=1e-5) for a, b in zip(cut, whole, strict=True)] == [False, True, False, True]
    rows = [model.tokenizer(PROMPTS[0] + COMPLETIONS[0]).input_ids]
    assert_close(cut[0], own_scores(model.model, rows)[0].item(), rtol=1e-4, atol=1e-5)


def test_it_is_a_reward_function_among_others() -> None:
    model = RewardModel(classifier(), tokenizer(), name="helpful")
    cut = [True, False, False, True]
    columns = {"completion_ids": [[1]] * 4, "cut": cut, "answer": ["1"] * 4}
    total, parts = Rewards([model, lambda completions: [1.0] * len(completions)], [0.5, 1.0])(
        PROMPTS, COMPLETIONS, columns
    )
    assert_close(parts["helpful"], torch.tensor(model(PROMPTS, COMPLETIONS, cut)))
    assert_close(total, 0.5 * parts["helpful"] + 1)
    assert model([], []) == []


# Text and conversations as tokens.


def test_text_is_ended_once_and_only_if_it_was_not_cut() -> None:
    words = tokenizer()
    ids = words("1+2=3").input_ids
    assert encode("1+2=", "3", False, words) == [*ids, END]
    assert encode("1+2=", "3", True, words) == ids
    assert encode("1+2=", "3<eos>", False, words) == [*ids, END]
    with pytest.raises(UserError, match=r"^a prompt and its completion are both empty: leave the row out"):
        encode("", "", True, words)


def test_a_conversation_is_written_by_the_template() -> None:
    words = tokenizer(template=TEMPLATE)
    prompt, answer = [{"role": "user", "content": "1+2="}], [{"role": "assistant", "content": "3"}]
    assert encode(prompt, answer, False, words) == words("1+2=,3<eos>").input_ids
    assert encode(prompt, answer, True, words) == words("1+2=,3").input_ids


def test_a_template_that_rewrites_a_message_has_its_way() -> None:
    words = tokenizer(template="{{ messages[0].content }}{{ messages[1].content | reverse | list | join }}<eos>")
    prompt, answer = [{"role": "user", "content": "1+2="}], [{"role": "assistant", "content": "34"}]
    assert encode(prompt, answer, True, words) == words("1+2=43<eos>").input_ids


@pytest.mark.parametrize(
    ("template", "role", "message"),
    [
        (None, "user", "the prompts are conversations, and the reward model's tokenizer has no chat template: "),
        (TEMPLATE, "tool", "the chat template cannot write a conversation: no tools here"),
    ],
)
def test_conversations_that_cannot_be_written(template: str | None, role: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        encode(
            [{"role": role, "content": "1"}],
            [{"role": "assistant", "content": "2"}],
            False,
            tokenizer(template=template),
        )
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_pairs_as_tokens() -> None:
    words = tokenizer()
    examples = [{"prompt": "1+2=", "chosen": "3", "rejected": "12"}]
    assert encode_pairs(examples, words, max_length=7) == [
        (words("1+2=3<eos>").input_ids, words("1+2=12<eos>").input_ids)
    ]
    with pytest.raises(
        UserError, match=r"^2 of 3 pairs are longer than 6 tokens, the first in row 1 with 7: raise max_l"
    ):
        encode_pairs([{**examples[0], "prompt": "1="}, *examples, *examples], words, max_length=6)


# The objective.


def pairs_of(model: RewardModel, count: int = 7) -> list:
    examples = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": f"{i}1,{i}"} for i in range(count)]
    return encode_pairs(examples, model.tokenizer, max_length=None)


def gradients(model: RewardModel, value: Tensor) -> Tensor:
    parts = torch.autograd.grad(value, list(model.model.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in parts])


def test_the_objective_is_the_mean_over_pairs(float64: None) -> None:
    model = RewardModel(classifier().double(), tokenizer())
    pairs = pairs_of(model)
    value, metrics = preference_objective(model, pairs, center_coefficient=0.1)(as_batch(7))
    chosen, rejected = (torch.stack([model.score([pair[k]])[0] for pair in pairs]) for k in (0, 1))
    assert_close(value, (bradley_terry(chosen, rejected) - 0.1 * (chosen + rejected) ** 2).mean(), check_dtype=False)
    assert_close(metrics["margin"], (chosen - rejected).mean(), check_dtype=False)
    assert_close(metrics["accuracy"], (chosen > rejected).double().mean(), check_dtype=False)
    assert all(not x.requires_grad for x in metrics.values())


@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_micro_batches_add_up_to_the_same_gradient(name: str, rows: int) -> None:
    model = RewardModel(classifier(name).eval(), tokenizer())
    batch, objective = as_batch(7), preference_objective(model, pairs_of(model), center_coefficient=0.1)
    whole = gradients(model, objective(batch)[0])
    parts = sum(share * gradients(model, objective(part)[0]) for share, part in micro_batches(batch, rows))
    assert whole.norm() > 1e-2
    assert_close(parts, whole, rtol=1e-3, atol=1e-5)


def test_what_fills_up_a_minibatch_has_no_part_in_it() -> None:
    model = RewardModel(classifier().eval(), tokenizer())
    pairs = pairs_of(model)
    objective, parts = preference_objective(model, pairs), list(minibatches(as_batch(7), 4))
    assert [len(part.obs) for part in parts] == [4, 4]
    both = torch.stack([objective(part)[0] for part in parts]).mean()
    assert_close(both, objective(as_batch(7))[0])


def test_the_likelihood_can_be_climbed_to_the_top() -> None:
    model = RewardModel(classifier(), tokenizer())
    pairs = pairs_of(model)
    objective, optimizer = preference_objective(model, pairs), torch.optim.Adam(model.model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (-objective(as_batch(7))[0]).backward()
        optimizer.step()
    chosen, rejected = scores(model, pairs)
    assert (chosen - rejected).min() > 2


# Loading.


def test_a_saved_model_loads_with_its_scores(tmp_path: Path) -> None:
    model = RewardModel(classifier(), tokenizer())
    save_model(model.model, model.tokenizer, tmp_path / "kind")
    loaded = RewardModel.load(str(tmp_path / "kind"), device="cpu", trust_remote_code=False)
    assert loaded.__name__ == "kind"
    assert loaded(PROMPTS, COMPLETIONS) == model(PROMPTS, COMPLETIONS)
    assert loaded.model.dtype == torch.float32


def test_another_padding_than_the_tokenizers_is_corrected() -> None:
    model = RewardModel(classifier(pad_token_id=None), tokenizer())
    assert model.model.config.pad_token_id == 0


def refused(directory: Path | str) -> str:
    with pytest.raises(UserError) as caught:
        RewardModel.load(str(directory), device="cpu", trust_remote_code=False)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 200
    return str(caught.value)


def test_what_is_no_reward_model(tmp_path: Path) -> None:
    save_model(arithmetic.model(16, 1), tokenizer(), tmp_path)
    assert refused(tmp_path).endswith(
        f"{tmp_path.name} is no reward model, since it has no score.weight: "
        "train one from it with policygrad reward-model --model"
    )


def test_a_classifier_of_several_labels(tmp_path: Path) -> None:
    save_model(classifier(num_labels=3), tokenizer(), tmp_path)
    assert refused(tmp_path) == f"{tmp_path.name} has 3 labels: give a reward model, which has one, the reward"


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_model(classifier(vocab_size=9), tokenizer(), tmp_path)
    assert refused(tmp_path).startswith("the tokenizer has 16 tokens and the model embeddings for 9: ")


def test_what_does_not_exist(offline: None) -> None:
    assert refused("/nowhere") == "there is no directory /nowhere to load a reward model from: check the path"
    start = "there is no directory runs/nowhere to load a reward model from, and the hub cannot be reached: "
    assert refused("runs/nowhere") == f"{start}check the name and the network"


def test_an_answer_beyond_the_models_context() -> None:
    model = RewardModel(classifier(), tokenizer())
    with pytest.raises(UserError, match=r"have 67 tokens, and the model's context 64: lower max_tokens"):
        model(["1+1="], ["1" * 62])
