"""Training a language model as a user would: from files on disk to a model that from_pretrained loads."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from policygrad.errors import UserError
from policygrad.language.generation import Completions, generate
from policygrad.runs.language.options import LANGUAGE
from policygrad.runs.language.run import LanguageRun, evaluate_language_run
from policygrad.runs.language.training import explanation, train_language


def parameters(run: LanguageRun) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_method_trains_and_reports(name: str, small: dict, tmp_path: Path) -> None:
    run = train_language(name, out=tmp_path / "run", **small)
    assert not torch.equal(parameters(run), torch.cat([p.detach().flatten() for p in tiny().parameters()]))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    reported = {"reward", "length", "cut_fraction", "entropy", "kl", "gradient_norm", "flat_groups", "group_std"}
    reported |= {"sampling_tokens_per_second", "learning_tokens_per_second", "effective_sample_size"}
    assert reported <= set(rows[-1])
    assert rows[-1]["steps"] > rows[0]["steps"] > 0
    assert run.before is not None
    assert run.after is not None
    for file in ("config.json", "curve.png", "samples.jsonl", "model/config.json", "model/README.md"):
        assert (tmp_path / "run" / file).is_file(), file


def test_the_saved_model_is_the_trained_one(small: dict, tmp_path: Path) -> None:
    run = train_language("grpo", out=tmp_path / "run", **small)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("12+34=", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, run.policy.model(tokens).logits)


def test_the_card_names_the_base_and_the_scores(small: dict, tmp_path: Path) -> None:
    run = train_language("dapo", out=tmp_path / "run", **small)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert run.after is not None
    for said in (f"base_model: {small['model']}", "# dapo on sums", f"after: {run.after.line()}", '"clip_high": 0.28'):
        assert said in card


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_is_evaluated_again_as_it_was(small: dict, tmp_path: Path, lora_rank: int) -> None:
    run = train_language("grpo", out=tmp_path / "run", **small, lora_rank=lora_rank)
    assert run.after is not None
    again = evaluate_language_run(str(tmp_path / "run"))
    assert again.rows == run.after.rows
    assert run.before is not None
    assert again.rows != run.before.rows


def test_an_adapter_alone_is_trained_and_saved(small: dict, tmp_path: Path) -> None:
    run = train_language("grpo", out=tmp_path / "run", **small, lora_rank=2)
    assert all("lora" in name for name, p in run.policy.named_parameters() if p.requires_grad)
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "run" / "model" / "model.safetensors").exists()
    base = dict(tiny().named_parameters())
    frozen = {n: p for n, p in run.policy.model.get_base_model().named_parameters() if "lora" not in n}  # type: ignore
    assert all(torch.equal(p, base[n.replace(".base_layer", "")]) for n, p in frozen.items())


def test_the_same_seed_gives_the_same_run(small: dict) -> None:
    first, again, other = (train_language("grpo", **small, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(parameters(first), parameters(again))
    assert not torch.equal(parameters(first), parameters(other))


def test_torchs_generator_is_left_alone(small: dict) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train_language("grpo", **small)
    assert torch.equal(torch.rand(3), expected)


# Options: each changes something


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grpo", {"temperature": 0.7}),
        ("grpo", {"kl": "none"}),
        ("grpo", {"kl": "reward"}),
        ("grpo", {"kl_coefficient": 1.0}),
        ("grpo", {"kl_estimate": "k1"}),
        ("grpo", {"kl_estimate": "k2"}),
        ("grpo", {"kl_estimate": "k3"}),
        ("grpo", {"kl_estimate": "exact"}),
        ("grpo", {"kl_target": 1e-6}),
        ("grpo", {"clip_low": 1e-4}),
        ("grpo", {"clip_high": 1e-4}),
        ("grpo", {"entropy_coefficient": 0.1}),
        ("grpo", {"epochs": 1}),
        ("grpo", {"minibatch_size": 8}),
        ("grpo", {"learning_rate": 1e-3}),
        ("grpo", {"learning_rate_schedule": "linear"}),
        ("grpo", {"adam_epsilon": 1e-2}),
        ("grpo", {"max_grad_norm": 1e-6, "adam_epsilon": 1e-5}),
        ("grpo", {"prompts_per_rollout": 3}),
        ("grpo", {"completions": 2}),
        ("grpo", {"max_tokens": 5}),
        ("grpo", {"cut": "masked"}),
        ("grpo", {"cut": "penalised"}),
        ("grpo", {"overlong_fraction": 0.9}),
        ("grpo", {"old_logp": "recomputed", "autocast": "bfloat16"}),
        ("grpo", {"autocast": "bfloat16"}),
        ("grpo", {"dtype": "bfloat16"}),
        ("grpo", {"lora_rank": 2}),
        ("grpo", {"held_out": 4}),
        ("grpo", {"iterations": 3}),
        ("ppo", {"critic": "shared"}),
        ("ppo", {"critic_learning_rate": 0.5}),
        ("ppo", {"gamma": 0.5}),
        ("ppo", {"lam": 0.0}),
        ("ppo", {"value_coefficient": 0.0}),
        ("ppo", {"value_clip": 1e-3}),
        ("ppo", {"normalize_advantages": False}),
        ("ppo", {"kl": "none"}),
        ("ppo", {"clip_low": 1e-4}),
        ("ppo", {"clip_high": 1e-4}),
        ("ppo", {"entropy_coefficient": 0.1}),
        ("ppo", {"epochs": 1}),
        ("ppo", {"minibatch_size": 4}),
    ],
    ids=str,
)
def test_an_option_changes_what_is_learned(name: str, change: dict, small: dict) -> None:
    base = {**small, "epochs": 2, "minibatch_size": 16, "prompts_per_rollout": 4, "completions": 4}
    base |= {"critic_learning_rate": 1e-2} if name == "ppo" else {}
    one, other = (train_language(name, **values) for values in (base, _consistent({**base, **change})))
    a, b = parameters(one), parameters(other)
    assert a.shape != b.shape or not torch.equal(a, b)


def test_dynamic_sampling_fills_the_rollout_with_groups_that_differ(small: dict, rewards: Path) -> None:
    small |= {"reward": (f"{rewards}:lucky",), "iterations": 1, "prompts_per_rollout": 2, "completions": 4}
    small |= {"minibatch_size": 8, "learning_rate": 1e-6, "seed": 1}
    one, more = (train_language("grpo", **small, sampling_rounds=rounds).metrics[-1] for rounds in (1, 16))
    assert one["flat_groups"] > 0
    assert more["sampling_rounds"] > 1
    assert more["gradient_norm"] > one["gradient_norm"]


def _consistent(values: dict) -> dict:
    rows = values["prompts_per_rollout"] * values["completions"]
    return {**values, "minibatch_size": min(values["minibatch_size"], rows)}


@pytest.mark.parametrize(
    "change", [{"micro_batch": 3}, {"gradient_checkpointing": True}, {"attention": "eager"}], ids=str
)
@pytest.mark.parametrize("name", ["grpo", "ppo", "rloo"])
def test_memory_savers_change_nothing_else(name: str, change: dict, small: dict) -> None:
    small |= {"learning_rate": 1e-4, "iterations": 1}
    one, other = train_language(name, **small), train_language(name, **small, **change)
    assert torch.allclose(parameters(one), parameters(other), atol=3e-6)


def test_lora_options_reach_the_adapter(small: dict) -> None:
    run = train_language("grpo", **small, lora_rank=3, lora_alpha=12.0, lora_targets=("q_proj",))
    trained = {name: p for name, p in run.policy.named_parameters() if p.requires_grad}
    assert all("q_proj" in name for name in trained)
    assert all(3 in p.shape for p in trained.values())
    assert run.policy.model.peft_config["default"].lora_alpha == 12.0  # type: ignore


def test_the_importance_bound_and_the_mismatch(small: dict) -> None:
    def other_engine(policy, prompt, prompt_mask, request, generator) -> Completions:  # type: ignore[no-untyped-def]
        done = generate(policy, prompt, prompt_mask, request, generator)
        return Completions(done.tokens, done.logp - 0.1 * done.mask, done.mask, done.cut)

    runs = [
        train_language("grpo", **small, engine=other_engine, old_logp="recomputed", importance_bound=bound)
        for bound in (0.0, 1.01, 2.0)
    ]
    assert [("importance_cut" in run.metrics[-1]) for run in runs] == [False, True, True]
    assert runs[1].metrics[-1]["importance_cut"] == pytest.approx(1)
    assert runs[1].metrics[-1]["mismatch_ratio"] == pytest.approx(torch.tensor(0.1).exp().item(), abs=1e-4)
    assert not torch.equal(parameters(runs[0]), parameters(runs[1]))


def test_rewards_add_up_by_their_weights(small: dict, rewards: Path) -> None:
    small |= {"reward": (f"{rewards}:sevens", f"{rewards}:short"), "reward_weight": (2.0, -1.0), "iterations": 1}
    row = train_language("grpo", **small).metrics[-1]
    assert row["reward"] == pytest.approx(2 * row["reward/sevens"] - row["reward/short"], abs=1e-6)


def test_a_critic_may_be_another_model(small: dict, model: Path, tmp_path: Path) -> None:
    tiny(hidden_size=8).save_pretrained(tmp_path / "smaller")
    tiny(vocab_size=12).save_pretrained(tmp_path / "other")
    row = train_language("ppo", **small, critic=str(tmp_path / "smaller")).metrics[-1]
    assert row["value_loss"] > 0
    with pytest.raises(UserError, match="embeddings for 12 tokens and the policy for 16"):
        train_language("ppo", **small, critic=str(tmp_path / "other"))


def test_evaluation_along_the_way(small: dict) -> None:
    run = train_language("grpo", **{**small, "iterations": 4}, evaluate_every=2, evaluation_completions=3)
    assert [row["completions"] for row in run.metrics if "held_out" in row] == [0, 32, 64]
    assert run.after is not None
    assert run.after.completions == 3
    assert run.after.prompts == 8


@pytest.mark.parametrize("completions", [0, -1])
def test_an_evaluation_of_no_completions_is_refused(completions: int, small: dict) -> None:
    run = train_language("grpo", **{**small, "iterations": 1})
    with pytest.raises(UserError, match=f"completions is {completions}: it must be at least 1"):
        run.evaluate(completions)


def test_conversations_are_answered_through_the_chat_template(small: dict, tmp_path: Path, rewards: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small["model"])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    path = tmp_path / "chats.jsonl"
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}"}]} for i in range(12)]
    path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    seen: list = []
    (tmp_path / "seen.py").write_text(
        "calls = []\ndef reward(prompts, completions, **_):\n"
        "    assert completions[0][0]['role'] == 'assistant'\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    small |= {"dataset": str(path), "tokenizer": str(tmp_path / "chat"), "reward": (f"{tmp_path}/seen.py:reward",)}
    run = train_language("grpo", **small)
    assert run.task.tokenizer.decode(run.task.train.tokens[-1], skip_special_tokens=True).endswith("=")
    assert seen == []


# Errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset": "/nowhere.jsonl"}, "nowhere.jsonl"),
        ({"model": "/nowhere"}, "no directory /nowhere"),
        ({"reward": ()}, "give --reward"),
        ({"max_tokens": 40}, "the model's context is 32"),
        ({"max_prompt_tokens": 3}, "the limit is 3"),
        ({"completions": 1}, "completions is 1: grpo compares"),
        ({"prompts_per_rollout": 64}, "there are 32 prompts to train on, and a rollout takes 64"),
        ({"reward_weight": (1.0, 2.0)}, "1 rewards and 2 weights"),
        ({"kl": "none", "kl_target": 0.1}, "kl_target is read only where kl is loss or reward, and kl is none"),
        ({"kl": "none", "kl_coefficient": 0.1}, "kl_coefficient is read only where kl is loss or reward"),
        ({"kl": "reward", "kl_estimate": "k1"}, "kl_estimate is read only where kl is loss, and kl is reward"),
        ({"importance_bound": 3.0}, "importance_bound is read only where old_logp is recomputed"),
        ({"lora_alpha": 2.0}, "lora_rank is 0"),
        ({"lora_rank": 2, "lora_targets": ("nothing",)}, "LoRA cannot be added"),
        ({"cut_penalty": 2.0}, "cut_penalty is read only where cut is penalised, and cut is kept"),
        ({"overlong_fraction": 1.0}, "overlong_fraction is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0: it must be more than 0"),
        ({"minibatch_size": 99}, "minibatch_size is 99"),
        ({"held_out": 40}, "40 of 40 examples cannot be held out"),
        ({"clip": 0.2}, "did you mean"),
        ({"device": "cuda:7"}, "device 'cuda:7' cannot be used"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_said_in_one_line(change: dict, said: str, small: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as caught:
        train_language("grpo", out=tmp_path / "run", **{**small, **change})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model(small: dict, tmp_path: Path) -> None:
    tiny(vocab_size=12).save_pretrained(tmp_path / "fewer")
    small |= {"model": str(tmp_path / "fewer"), "tokenizer": small["model"]}
    with pytest.raises(UserError, match="the tokenizer has 16 tokens and the model embeddings for 12"):
        train_language("grpo", **small)


def test_a_data_set_without_prompts_names_its_columns(small: dict, tmp_path: Path) -> None:
    path = tmp_path / "questions.csv"
    path.write_text("question,answer\n1+1,2\n")
    with pytest.raises(UserError, match=r"prompt.*question, answer"):
        train_language("grpo", **{**small, "dataset": str(path)})


def test_a_reward_that_raises_loses_nothing(small: dict, tmp_path: Path, rewards: Path) -> None:
    judge = tmp_path / "fickle.py"
    judge.write_text(
        "calls = []\ndef fickle(prompts, completions, **_):\n    calls.append(1)\n"
        "    if len(calls) > 3:\n        raise ValueError('no more')\n    return [float(len(c)) for c in completions]\n"
    )
    with pytest.raises(UserError, match=r"reward 'fickle' raised ValueError.*no more"):
        train_language("grpo", out=tmp_path / "run", **{**small, "iterations": 9, "reward": (f"{judge}:fickle",)})
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert not torch.equal(kept.lm_head.weight, tiny().lm_head.weight)


def test_nothing_is_overwritten(small: dict, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="nothing is overwritten"):
        train_language("grpo", out=tmp_path, **small)


def test_a_run_that_diverges_keeps_the_last_good_policy(small: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"training stopped in iteration \d+.*learning_rate"):
        train_language("grpo", out=tmp_path / "run", **{**small, "learning_rate": 1e30, "iterations": 9})
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(p.isfinite().all() for p in kept.parameters())


def test_a_loss_of_zero_is_explained() -> None:
    assert "groups were flat" in str(explanation([{"flat_groups": 1.0, "objective": 0.0}]))
    assert "advantages are centred" in str(explanation([{"flat_groups": 0.2, "objective": 1e-9}]))
    assert explanation([{"flat_groups": 0.2, "objective": 0.3}]) is None
