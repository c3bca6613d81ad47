"""From models, examples and reward functions to a task."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from language.conftest import tiny
from policygrad.errors import UserError
from policygrad.language import arithmetic
from policygrad.language.models import save_model
from policygrad.language.policies import LanguagePolicy, trunk
from policygrad.language.rewards import exact_match
from policygrad.language.tasks import critic_of, policy_of, prepared, reward_functions, task_of

TOKENIZER = arithmetic.tokenizer()
TRAIN, HELD_OUT = arithmetic.splits(6, 3, seed=0)
PROMPTS = prepared(TRAIN, TOKENIZER), prepared(HELD_OUT, TOKENIZER)
TOKENS = torch.tensor([[2, 9, 4]])


def test_prompts_are_prepared_with_their_columns() -> None:
    prompts = prepared(TRAIN, TOKENIZER)
    assert prompts.texts == [x["prompt"] for x in TRAIN]
    assert prompts.columns == {"answer": [x["answer"] for x in TRAIN]}
    for text, tokens, mask in zip(prompts.texts, *prompts.padded(), strict=True):
        assert TOKENIZER.decode(tokens[mask]) == text
        assert mask[-1]
    with pytest.raises(UserError, match=r"^6 of 6 prompts are longer than 3 tokens, the first in row 0 with"):
        prepared(TRAIN, TOKENIZER, 3)


def made(**options: Any) -> Any:
    options = {"max_tokens": 6, "functions": [arithmetic.right]} | options
    functions = options.pop("functions")
    return task_of("sums", arithmetic.model(16, 1), TOKENIZER, *PROMPTS, functions, **options)


def test_a_task_holds_its_policy_its_prompts_and_its_judges() -> None:
    task = made(temperature=0.7)
    assert task.name == "sums"
    assert task.policy.temperature == 0.7
    assert (len(task.train), len(task.held_out)) == (6, 3)
    assert task.judge is task.judge_held_out
    assert task.judge(["1+1="], [":2"], {"answer": ["2"]})[0].tolist() == [1.0]
    alone = task_of("sums", arithmetic.model(16, 1), TOKENIZER, PROMPTS[0], None, [arithmetic.right], max_tokens=6)
    assert alone.held_out is None


def test_only_the_judge_in_training_charges_for_length() -> None:
    task = made(overlong_fraction=0.5, reward_weight=(2.0,))
    columns = {"answer": ["2"] * 3, "completion_ids": [[0] * n for n in (3, 4, 6)]}
    texts = ["1+1="] * 3, [":2"] * 3
    assert task.judge(*texts, columns)[0].tolist() == pytest.approx([2.0, 2 - 1 / 3, 1.0])
    assert task.judge_held_out(*texts, columns)[0].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 60}, "context 64: lower max_tokens"),
        ({"reward_weight": (1.0, 2.0)}, "1 reward functions and 2 weights: give one each"),
        ({"functions": []}, "there is no reward function"),
    ],
)
def test_what_does_not_fit_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(**options)


def test_a_policy_has_what_it_was_asked_for() -> None:
    policy = policy_of(tiny(), temperature=0.5, autocast=torch.bfloat16, chunk=99, device="cpu")
    assert (policy.temperature, policy.autocast, policy.chunk) == (0.5, torch.bfloat16, 99)
    assert all(p.requires_grad for p in policy.parameters())
    plain = policy_of(tiny())
    assert (plain.temperature, plain.autocast, plain.chunk) == (1.0, None, LanguagePolicy(tiny()).chunk)


def test_a_policy_with_an_adapter_and_checkpoints() -> None:
    policy = policy_of(tiny(), lora_rank=3, lora_alpha=12.0, lora_targets=["q_proj"], gradient_checkpointing=True)
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    assert trained
    assert all("q_proj" in name and 3 in p.shape for name, p in trained.items())
    assert policy.model.peft_config["default"].lora_alpha == 12.0
    assert policy.model.get_base_model().is_gradient_checkpointing
    everywhere = policy_of(tiny(), lora_rank=1, lora_targets=[])
    assert any("v_proj" in name for name, p in everywhere.named_parameters() if p.requires_grad)


def test_a_critic_on_the_policys_trunk_or_on_a_copy_of_it() -> None:
    policy = policy_of(tiny())
    shared, copied = (critic_of(policy, kind, autocast=torch.bfloat16) for kind in ("shared", "copy"))
    assert shared.trunk is trunk(policy.model)
    ours, theirs = (dict(x.named_parameters()) for x in (shared.trunk, copied.trunk))
    assert all(torch.equal(ours[name], p) and ours[name] is not p for name, p in theirs.items())
    assert shared.autocast == copied.autocast == torch.bfloat16
    with torch.no_grad():
        nn.init.normal_(copied.head.weight)
    assert copied(TOKENS).dtype == torch.float32


def test_a_critic_may_be_another_model(tmp_path: Path) -> None:
    save_model(tiny(hidden_size=8), TOKENIZER, tmp_path / "smaller")
    save_model(tiny(vocab_size=12), TOKENIZER, tmp_path / "other")
    policy = policy_of(tiny())
    critic = critic_of(policy, str(tmp_path / "smaller"), dtype="bfloat16", attention="eager")
    assert critic.head.in_features == 8
    assert critic.trunk.dtype == torch.bfloat16
    assert critic.trunk.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="embeddings for 12 tokens and the policy for 23: give one with the same"):
        critic_of(policy, str(tmp_path / "other"))


def test_reward_functions_and_reward_models_by_name(tmp_path: Path, offline: None) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    save_model(LlamaForSequenceClassification(config), TOKENIZER, tmp_path / "judge")
    function, model = reward_functions(["exact_match", str(tmp_path / "judge")])
    assert function is exact_match
    assert model.__name__ == "judge"
    assert len(model(prompts=["1+1="], completions=["2"])) == 1
    with pytest.raises(
        UserError, match="there is no directory some-one/nowhere to load a reward model from, and the hub"
    ):
        reward_functions(["some-one/nowhere"])
    with pytest.raises(UserError, match=r"^there is no reward function 'math_equl': did you mean math_equal\?$"):
        reward_functions(["math_equl"])  # and not a model of the hub
    assert reward_functions([len, "exact_match"]) == [len, function]
