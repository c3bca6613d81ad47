"""Language: every method on a tiny model, its critic, and what a run directory holds."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import warnings
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from outcomes import parameters
from tiny_models import tiny

import policygrad as pg
from policygrad.errors import Note, UserError
from policygrad.language import arithmetic, models
from policygrad.language.completions import Completions
from policygrad.language.evaluation import Evaluation
from policygrad.language.generation import generate
from policygrad.language.policies import trunk
from policygrad.language.quantization import quantized
from policygrad.train import compose
from policygrad.train.options import OptionError
from policygrad.train.run import Run
from policygrad.train.training import Training
from policygrad.train.worlds.language import verdict

OTHERWISE = "the numbers may not be those of an unbroken run"


@pytest.mark.parametrize("method", ["reinforce", "a2c", "npg", "trpo", "ppo", "grpo", "gspo", "reinforce++"])
def test_every_kind_of_method_trains_a_model(method: str, language: dict[str, Any]) -> None:
    options = language | {"learning_rate": 1e-2} if method not in ("npg", "trpo") else language
    options = options | ({"minibatch_size": 8, "epochs": 1} if method == "ppo" else {})
    run = pg.train(method, **options)
    start = models.load_model(language["model"])
    ours = run.policy.model.state_dict()
    assert any(not torch.equal(x, ours[name]) for name, x in start.state_dict().items())
    assert run.before is not None
    assert run.evaluate().score == run.evaluate().score
    assert run.metrics[-1]["completions"] == 2 * 4 * options["completions"]


def critic_state(run: Run) -> dict[str, torch.Tensor]:
    assert run.critic is not None
    return run.critic.state_dict()


@pytest.mark.parametrize("kind", ["copy", "shared"])
@pytest.mark.parametrize("method", ["ppo", "a2c"])
def test_the_critic_is_saved_and_loaded(kind: str, method: str, language: dict[str, Any], tmp_path: Path) -> None:
    more = {"minibatch_size": 8} if method == "ppo" else {}
    run = pg.train(method, **language, **more, critic=kind, learning_rate=1e-2, out=tmp_path / "run")
    loaded = Run.load(tmp_path / "run", trust=True)
    ours, theirs = critic_state(run), critic_state(loaded)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for one in (run, loaded):
        assert (one.critic.trunk is trunk(one.policy.model)) == (kind == "shared")  # type: ignore[union-attr]
    assert loaded.evaluate() == run.evaluate()
    assert (tmp_path / "run" / "critic.safetensors").is_file()


def test_a_run_without_a_critic_has_none(language: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("grpo", **language, out=tmp_path / "run")
    assert run.critic is None
    assert Run.load(tmp_path / "run", trust=True).critic is None
    assert not (tmp_path / "run" / "critic.safetensors").exists()


def test_a_critic_that_is_fitted_alone_does_not_share_the_policys_trunk(language: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="critic is shared, and trpo fits its critic alone"):
        pg.train("trpo", **language, critic="shared")
    assert critic_state(pg.train("trpo", **language | {"iterations": 1}))
    with pytest.raises(OptionError, match="critic is a critic's, and credit group has none"):
        pg.train("ppo", **language, critic="shared", credit="group")


def test_a_critic_may_be_another_model_and_a_module_of_ones_own_is_refused(language: dict[str, Any]) -> None:
    run = pg.train("ppo", **language | {"iterations": 1}, minibatch_size=8, critic=language["model"])
    assert run.options.critic == language["model"]
    for own in ({"policy": torch.nn.Identity()}, {"critic": torch.nn.Identity()}):
        with pytest.raises(UserError, match="modules of your own are for control"):
            pg.train("ppo", **language, minibatch_size=8, **own)


def test_a_run_directory_is_a_hugging_face_model_with_a_card(language: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("grpo", **language, out=tmp_path / "run")
    model = models.load_model(str(tmp_path / "run" / "model"))
    ours = run.policy.model.state_dict()
    assert all(torch.equal(x, ours[name]) for name, x in model.state_dict().items())
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "# grpo on sums" in card
    assert "- before: " in card
    assert "- after: " in card
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "reward", "cut"} <= set(rows[0])
    loaded = Run.load(tmp_path / "run", trust=True)
    assert loaded.evaluate() == run.evaluate()
    assert loaded.evaluate(2, greedy=True).completions == 2


def test_an_adapter_is_saved_and_loaded(language: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("grpo", **language, lora_rank=2, learning_rate=1e-2, out=tmp_path / "run")
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    assert Run.load(tmp_path / "run", trust=True).evaluate() == run.evaluate()


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_merged_adapter_is_a_whole_model(method: str, language: dict[str, Any], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(language["model"], base)
    options = language | {"model": str(base), "learning_rate": 1e-2, "lora_rank": 2}
    options |= {"minibatch_size": 2} if method == "ppo" else {}
    run = pg.train(method, **options, save="merged", out=tmp_path / "run")
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    other = pg.train(method, **options)
    assert torch.equal(parameters(run), parameters(other)), "it is trained alike"
    longer = pg.resume(tmp_path / "run", trust=True, iterations=1, progress=False)
    more = pg.train(method, **options | {"iterations": options["iterations"] + 1})
    assert torch.equal(parameters(longer), parameters(more))
    shutil.rmtree(base)
    loaded = Run.load(tmp_path / "run", reward=language["reward"])  # and no base
    assert loaded.evaluate(greedy=True).score == longer.evaluate(greedy=True).score
    loaded.save(tmp_path / "again")
    rest = {name: x for name, x in language.items() if name != "model"}
    second = pg.Training("grpo", **rest, start=str(tmp_path / "again"))
    assert second.run.policy.model.num_parameters() == loaded.policy.model.get_base_model().num_parameters() - sum(
        p.numel() for p in loaded.policy.parameters() if p.requires_grad
    )
    tokens = torch.arange(12).view(2, 6) % 10
    with torch.no_grad():
        torch.testing.assert_close(
            second.run.policy.model(tokens).logits, longer.policy.model(tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_saving_merged_is_of_an_adapter(language: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="save merged is of an adapter, and lora_rank is 0"):
        pg.train("grpo", **language, save="merged")


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("grpo", {}, "quantize is of the model under an adapter, and lora_rank is 0"),
        ("grpo", {"lora_rank": 2, "save": "merged"}, "save merged adds the adapter to weights, which quantize rounds"),
        (
            "ppo",
            {"lora_rank": 2, "minibatch_size": 2},
            "critic copy would train a copy of weights in 4 bits: use shared",
        ),
    ],
)
def test_what_4_bits_cannot_do_is_refused(
    method: str, values: dict[str, Any], said: str, language: dict[str, Any]
) -> None:
    with pytest.raises(OptionError, match=said):
        pg.train(method, **language, quantize="4bit", **values)


def test_without_bitsandbytes_it_says_what_to_install(
    language: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == "bitsandbytes" else find(x))
    with pytest.raises(UserError, match=r"pip install policygrad\[quantize\]"):
        pg.train("grpo", **language, lora_rank=2, quantize="4bit")


def test_an_adapter_on_a_model_in_4_bits_is_trained_saved_and_loaded(language: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    values = language | {"lora_rank": 2, "learning_rate": 1e-2, "quantize": "4bit"}
    run = pg.train("grpo", **values, out=tmp_path / "run")
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    assert run.metrics[-1]["gradient_norm"] > 0
    again = Run.load(tmp_path / "run", trust=True)
    assert len(quantized(again.policy.model)) == 14
    assert again.evaluate() == run.evaluate()
    whole = pg.train("grpo", **values | {"quantize": "none"})
    assert not torch.equal(parameters(run), parameters(whole)), "of another base"


def test_the_gradient_is_differentiated_again_only_with_eager_attention(language: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="attention is sdpa, which has no second derivative: trpo needs eager"):
        pg.train("trpo", **language, attention="sdpa")


def test_an_engine_of_ones_own_samples(language: dict[str, Any]) -> None:
    from policygrad.language.generation import generate

    asked = []

    def engine(*arguments: Any, **options: Any) -> Any:
        asked.append(len(arguments))
        return generate(*arguments, **options)

    pg.train("grpo", **language, engine=engine)
    assert len(asked) >= 2


def test_an_engine_in_another_process_samples_and_may_be_killed(language: dict[str, Any], tmp_path: Path) -> None:
    """The same run with and without the engine's death; its samples are not those of the own engine."""
    options = language | {"learning_rate": 1e-2, "iterations": 3}
    own = pg.train("grpo", **options)
    plain = pg.train("grpo", **options, engine="transformers", out=tmp_path / "run")
    with pg.Training("grpo", **options, engine="transformers") as training:
        next(training)
        process = training.world.process
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.warns(Note, match="the transformers engine was ended by signal 9"):
            list(training)
    assert torch.equal(parameters(training.run), parameters(plain))
    assert not torch.equal(parameters(own), parameters(plain))
    assert process.process is None
    assert pg.load(tmp_path / "run", trust=True).evaluate().prompts == 8


def test_a_run_with_an_engine_goes_on_bit_for_bit_and_its_program_is_named_again(
    language: dict[str, Any], tmp_path: Path
) -> None:
    """A run directory says which program was the engine's, and may be anyone's."""
    options = language | {"learning_rate": 1e-2, "engine": "transformers", "engine_python": sys.executable}
    whole = pg.train("grpo", **options | {"iterations": 4})
    pg.train("grpo", **options | {"iterations": 2}, out=tmp_path / "run")
    repeated = {"model": options["model"], "dataset": options["task"], "reward": options["reward"]}
    with pytest.raises(UserError, match=r"the run names what is not its own, engine_python .*: repeat that"):
        pg.resume(tmp_path / "run", iterations=2, progress=False, **repeated)
    again = pg.resume(tmp_path / "run", iterations=2, progress=False, engine_python=sys.executable, **repeated)
    assert torch.equal(parameters(whole), parameters(again))


@pytest.mark.parametrize(
    ("change", "option", "said"),
    [
        ({"engine": "vllm"}, "engine_python", "engine is vllm, which needs an environment of its own: give engine_pyt"),
        ({"engine_python": "/x"}, "engine_python", "engine_python is read only where engine is vllm or transformers"),
        ({"engine_tolerance": 0.1}, "engine_tolerance", "engine_tolerance is read only where engine is vllm or trans"),
        # in bfloat16 the engine's head is, too, and the learner's is not
        (
            {"engine": "transformers", "engine_tolerance": 1e-12, "autocast": "bfloat16"},
            None,
            "engine and learner differ by",
        ),
        (
            {"engine_time_limit": 9.0},
            "engine_time_limit",
            "engine_time_limit is read only where engine is vllm or trans",
        ),
        (
            {"engine": "transformers", "engine_time_limit": 0.05},
            None,
            "did not answer within 0.05 s before it had start",
        ),
        ({"engine": "transformers", "engine_sleep": True}, "engine_sleep", "is read only where engine is vllm"),
        ({"engine": "transformers", "engine_adapter": "alone", "lora_rank": 2}, "engine_adapter", "is read only where"),
        (
            {"engine": "vllm", "engine_python": "/x", "engine_adapter": "alone"},
            "engine_adapter",
            "engine_adapter alone is of an adapter, and lora_rank is 0: set that too",
        ),
        ({"engine": "transformers", "lora_rank": 2, "quantize": "4bit"}, "engine", "would need the rounded weights"),
        ({"heads": 3}, "heads", "heads is of the model that a task brings, and there is another: leave heads out"),
        ({"engine": "transformers", "engine_python": "/x/python"}, None, "engine_python /x/python cannot be run"),
        ({"engine": "transformers", "shard": True}, "engine", "engine is 'transformers', and not with shard"),
    ],
    ids=str,
)
def test_an_engine_that_cannot_be_is_said(
    language: dict[str, Any], change: dict[str, Any], option: str | None, said: str
) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.train("grpo", **language | change)
    assert getattr(raised.value, "option", None) == option
    assert len(str(raised.value)) <= 200


@pytest.mark.parametrize(
    ("change", "option", "said"),
    [
        ({"model": None}, "model", "there is no model to train on"),
        ({"reward": ()}, "reward", "nothing judges the completions"),
        ({"task": "arithmetic", "dataset": "x.jsonl"}, "dataset", "arithmetic makes its own problems"),
        ({"task": None}, "dataset", "there are no prompts to train on: give dataset, a file of prompts as the task"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_is_missing_is_said(language: dict[str, Any], change: dict[str, Any], option: str, said: str) -> None:
    with pytest.raises(OptionError, match=said) as raised:
        pg.train("grpo", **language | change)
    assert raised.value.option == option
    assert len(str(raised.value)) <= 200


def test_without_held_out_examples_there_is_nothing_to_judge(language: dict[str, Any]) -> None:
    run = pg.train("grpo", **language | {"held_out": 0})
    assert run.before is run.after is None
    with pytest.raises(UserError, match="no examples were held out to evaluate on"):
        run.evaluate()
    with pytest.raises(UserError, match="completions is 0"):
        run.evaluate(0)


def test_the_default_rate_is_that_of_what_is_trained(language: dict[str, Any], tmp_path: Path) -> None:
    whole = pg.Training("grpo", **language | {"out": tmp_path / "run"})
    adapter = pg.Training("grpo", **language, lora_rank=2)
    for training, rate in ((whole, 1e-6), (adapter, 1e-4)):
        assert training.options.learning_rate == rate
        assert [group["lr"] for group in training.learner.optimizers[0].param_groups] == [rate]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["options"]["learning_rate"] == 1e-6
    assert pg.Training("grpo", **language, lora_rank=2, learning_rate=1e-6).options.learning_rate == 1e-6
    with pytest.raises(OptionError, match="learning_rate is None, which is for language models"):
        pg.Training("ppo", "CartPole-v1", learning_rate=None)


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_weights_in_bfloat16_have_master_copies(dtype: str, language: dict[str, Any], tmp_path: Path) -> None:
    start = models.load_model(language["model"], dtype="bfloat16")
    models.save_model(start, models.load_tokenizer(language["model"]), tmp_path / "start")
    training = pg.Training("grpo", **language | {"model": str(tmp_path / "start")}, dtype=dtype)
    list(training)
    state = training.learner.optimizers[0].state
    named = [(p, start.state_dict()[name]) for name, p in training.world.policy.model.named_parameters()]
    moved = torch.cat([(state[p]["master"] != before.float()).flatten() for p, before in named])
    assert moved.float().mean() > 0.95, "at the default rate, all but the few without a gradient"
    assert all(torch.equal(p, state[p]["master"].bfloat16()) for p, _ in named)


def test_float16_is_for_what_is_frozen(language: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="weights in float16 cannot be trained"):
        pg.train("grpo", **language, dtype="float16")
    with pytest.raises(UserError, match="trpo solves for its step"):
        pg.train("trpo", **language, dtype="bfloat16")
    run = pg.train("grpo", **language, dtype="float16", lora_rank=2)
    assert {(p.dtype, p.requires_grad) for p in run.policy.parameters()} == {
        (torch.float16, False),
        (torch.float32, True),
    }


def test_a_second_stage_trains_on_top_of_the_first(language: dict[str, Any], tmp_path: Path) -> None:
    first = pg.train("grpo", **language, lora_rank=2, learning_rate=1e-1, out=tmp_path / "first")
    folder = str(tmp_path / "first" / "model")
    with pytest.raises(UserError, match=r"is an adapter of .*: give that as base_model, or say trust"):
        pg.train("grpo", **language | {"model": folder})
    for options in ({"trust": True}, {"base_model": language["model"], "lora_rank": 2}):
        second = pg.Training("grpo", **language | {"model": folder} | options)
        assert second.run.before == first.after, "it starts where the first ended"


@pytest.mark.parametrize("name", ["tokenizer", "base_model"])
def test_what_is_of_ones_own_model_is_refused_without_one(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is of a model of your own"):
        pg.train("grpo", "arithmetic", **{name: "x"}, progress=False)


def test_the_memory_options_reach_policy_and_critic(language: dict[str, Any]) -> None:
    options = {"critic": language["model"], "gradient_checkpointing": True, "attention": "eager", "minibatch_size": 8}
    training = pg.Training("ppo", **language, **options, autocast="bfloat16")
    critic: Any = training.world.critic
    for model in (training.world.policy.model, critic.trunk):
        assert model.is_gradient_checkpointing
        assert model.training
        assert model.config._attn_implementation == "eager"
    assert training.world.policy.autocast == critic.autocast == torch.bfloat16


def test_the_verdict_compares_the_change_with_its_noise() -> None:
    def evaluation(*rewards: list[float | None]) -> Evaluation:
        made = Evaluation.__new__(Evaluation)  # the rows are all that counts
        made.rows, made.completions = [{"reward": x} for group in rewards for x in group], len(rewards[0])
        return made

    right, wrong, half = [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]
    start = evaluation(half, wrong, right, half)
    for after, said in (
        (start, r"changed by \+0.000, and the noise of that is 0.000: nothing"),
        (evaluation(right, wrong, right, half), r"changed by \+0.125, and the noise of that is 0.250: nothing"),
        (evaluation(wrong, [None, None], wrong, wrong), r"changed by -0.667.*: the policy is worse"),
    ):
        (note,) = verdict(start, after)
        assert re.search(said, note)
    assert verdict(start, evaluation(right, half, right, right)) == []


def lengths(completions: list[str]) -> list[float | None]:
    """None for one in about three."""
    return [None if len(text) % 3 == 0 else float(len(text)) for text in completions]


def test_a_reward_may_be_a_function_of_ones_own(language: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("grpo", **language | {"reward": [lengths, "format:.*"], "out": tmp_path / "run"})
    assert {"reward/lengths", "reward/format"} <= set(run.metrics[-1])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["reward"] == [f"{__name__}:lengths", "format:.*"]


def test_completions_without_a_reward_are_said(language: dict[str, Any]) -> None:
    run = pg.train("grpo", **language | {"reward": lengths})
    share = sum(row["unjudged"] for row in run.metrics[1:]) / 2
    assert 0 < share < 1
    note = f"no reward applied to {share:.1%} of the completions, and they were left out of the update"
    assert note in run.world.notes(run)


@pytest.mark.parametrize("method", ["grpo", "ppo", "rloo", "trpo", "reinforce"])
def test_rollouts_of_which_nothing_counts_are_said(method: str, language: dict[str, Any]) -> None:
    """Every completion of one token is cut."""
    sizes = {"minibatch_size": 8} if method == "ppo" else {}
    run = pg.train(method, **language | {"max_tokens": 1, "cut": "masked", "engine": never_ending, **sizes})
    rows = run.metrics[1:]
    assert [row["masked"] for row in rows] == [1.0, 1.0]
    assert all(math.isfinite(x) for row in rows for x in row.values())
    assert all(bool(p.isfinite().all()) for p in run.policy.parameters())
    assert any(note.startswith("in 100% of the iterations no completion counted") for note in run.world.notes(run))
    assert not any("flat" in note or "near 0" in note for note in run.world.notes(run))
    assert "no completion counts: nothing to learn" in run.world.status(rows[-1])


def never_ending(*arguments: Any) -> Completions:
    done = generate(*arguments)
    return replace(done, cut=torch.ones_like(done.cut))


def test_completions_that_repeat_their_prompt_are_said(language: dict[str, Any]) -> None:
    run = pg.train("grpo", **language | {"held_out": 0})
    run.metrics = [
        {"masked": 0.0, "unjudged": 0.0, "prompt_repeats": share, "reward": 1.0, "cut_fraction": 0.0}
        for share in (0.125, 0.75)
    ]
    note = (
        "75% of the completions of the last rollout repeat their prompt (12% of the first): read samples.jsonl, for "
        "the reward may be earned without an answer"
    )
    assert note in run.world.notes(run)
    run.metrics[-1]["prompt_repeats"] = 0.25
    assert not any("repeat" in note for note in run.world.notes(run))


# What a data set is, and what its prompts become.

CHAT = (
    "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{% if go is false %}+{% endif %}={% endif %}"
)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rollout_of(**options: Any) -> Any:
    """The prompts of a run that has not started."""
    return pg.Training("grpo", **options).world


def texts(world: Any) -> set[str]:
    return set(world.prompts.train.texts)


@pytest.fixture
def chat(tmp_path: Path, language: dict[str, Any]) -> dict[str, Any]:
    """The same, with a tokenizer that has a chat template."""
    tokenizer = arithmetic.tokenizer()
    tokenizer.chat_template = CHAT
    models.save_model(tiny(), tokenizer, tmp_path / "chat")
    return language | {"model": str(tmp_path / "chat"), "held_out": 0}


def test_data_may_be_a_file_a_path_rows_or_a_data_set(language: dict[str, Any]) -> None:
    path = language.pop("task")
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    expected = pg.train("grpo", **language, dataset=path).metrics
    one = language | {"reward": language["reward"][0]}
    handed = datasets.Dataset.from_list(rows)
    for data in (
        {"task": Path(path)},
        {"task": rows},
        {"task": handed},
        *({"dataset": x} for x in (Path(path), rows, handed)),
    ):
        found = pg.train("grpo", **one, **data)
        for row, wanted in zip(found.metrics, expected, strict=True):
            assert {k: x for k, x in row.items() if "second" not in k} == {
                k: x for k, x in wanted.items() if "second" not in k
            }
    assert list(found.configuration()["options"]["dataset"]) == []
    assert found.world.name == "rows"
    with pytest.raises(OptionError, match="are both data: give dataset for each set"):
        pg.train("grpo", **language, task=path, dataset=path)
    with pytest.raises(OptionError, match="are both data: give dataset for each set"):
        pg.train("grpo", **language, task=rows, dataset=path)


def test_prompts_that_are_too_long_are_named_by_their_row_or_dropped_and_counted(
    language: dict[str, Any], tmp_path: Path
) -> None:
    rows = [{"prompt": "1" * (12 if i in (17, 33) else 3), "answer": "1"} for i in range(40)]
    data = language | {"task": write(tmp_path / "a.jsonl", rows)}
    with pytest.raises(UserError) as caught:
        rollout_of(**data, max_prompt_tokens=8)
    assert str(caught.value) == (
        "2 of 40 prompts are longer than 8 tokens, the first in row 17 with 12: raise max_prompt_tokens, or set "
        "long_prompts to drop"
    )
    run = pg.train("grpo", **data, max_prompt_tokens=8, long_prompts="drop")
    assert (len(run.world.prompts.train), len(run.world.prompts.held_out)) == (30, 8)
    assert texts(run.world) == {"111"}
    assert run.world.notes(run)[0] == "2 of 40 prompts were too long and were left out"
    by_context = rollout_of(**data | {"max_tokens": 22}, long_prompts="drop")  # the model's context is 32
    assert by_context.dropped == ("2 of 40 prompts were too long and were left out",)
    assert rollout_of(**data, long_prompts="drop").dropped == ()
    other = {"evaluation_dataset": [{"prompt": "1+1=", "answer": "2"}, *rows[17:20]], "held_out": 128}
    long = pg.train("grpo", **data | other, max_prompt_tokens=8, long_prompts="drop").world.dropped
    assert long[1] == "1 of 4 evaluation prompts were too long and were left out"


def test_another_data_set_to_evaluate_on_has_its_own_split_and_columns(
    language: dict[str, Any], tmp_path: Path
) -> None:
    """By default its split is evaluation_split, and not the part of the training set that the run was trained on."""
    run = pg.train("grpo", **language | {"held_out": 2}, split="train[:8]", out=tmp_path / "run")
    directory = tmp_path / "other"
    directory.mkdir()
    for name in ("train", "test"):
        write(
            directory / f"{name}.jsonl", [{"question": f"{name[:1] == 't' and i}+1=", "answer": "1"} for i in range(12)]
        )
    given = {"trust": True, "dataset": str(directory), "columns": "prompt=question"}
    assert Run.load(tmp_path / "run", **given).evaluate(1).prompts == 12
    assert Run.load(tmp_path / "run", **given, split="train[:5]").evaluate(1).prompts == 5
    with pytest.raises(UserError, match="has no column 'prompt', only question, answer"):
        Run.load(tmp_path / "run", trust=True, dataset=str(directory))
    for alone in ({"split": "train"}, {"columns": ["prompt=question"]}):
        with pytest.raises(UserError, match="is of another data set to evaluate on, and there is none: give dataset"):
            Run.load(tmp_path / "run", trust=True, **alone)
    assert run.options.split == "train[:8]"


def test_the_notes_say_when_most_completions_were_cut(language: dict[str, Any]) -> None:
    run = pg.train("grpo", **language | {"max_tokens": 1})
    assert run.metrics[-1]["cut_fraction"] > 0.5
    assert any("of the last rollout were cut at max_tokens: raise it" in note for note in run.world.notes(run))


def test_a_run_is_no_model_and_its_message_names_the_model_in_it(language: dict[str, Any], tmp_path: Path) -> None:
    pg.train("grpo", **language, out=tmp_path / "run")
    for name in ("model", "reward", "critic"):
        given = language | {"minibatch_size": 8, name: str(tmp_path / "run")}
        with pytest.raises(UserError, match=r"run is a run, and no [a-z ]+: give the model in it, \S+/run/model$"):
            pg.train("ppo", **given)
    with pytest.raises(UserError, match=r"run/model is a run's model: give the run, \S+/run$"):
        Run.load(tmp_path / "run" / "model")


def test_an_overlong_penalty_that_can_never_apply_is_refused(language: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="starts at 20 tokens, and a completion has at most 20: lower its two numbers"):
        pg.train("grpo", **language | {"reward": "overlong:30,10", "max_tokens": 20})


def test_columns_a_system_prompt_and_template_variables(chat: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"question": f"{i}+", "answer": "1"} for i in range(6)]
    options = chat | {"task": write(tmp_path / "a.jsonl", rows), "columns": {"prompt": "question"}}
    assert texts(rollout_of(**options)) == {f"{i}+" for i in range(6)}

    def written(**more: Any) -> list[str]:
        world = rollout_of(**options, system_prompt="4:", **more)
        assert world.prompts.train.texts[0] == [
            {"role": "system", "content": "4:"},
            {"role": "user", "content": "0+"},
        ]
        tokens, mask = world.prompts.train.padded()
        return [world.prompts.tokenizer.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]

    assert written() == [f"4:{i}+=" for i in range(6)]
    assert written(template_variables={"go": False}) == [f"4:{i}++=" for i in range(6)]
    assert written(template_variables='{"go": true}') == written()
    with pytest.raises(OptionError, match=r"template_variables is .*: it must be a JSON object"):
        rollout_of(**options, template_variables="[1]")


def test_several_data_sets_are_mixed(language: dict[str, Any], tmp_path: Path) -> None:
    del language["task"]
    paths = [write(tmp_path / f"{x}.jsonl", [{"prompt": x, "answer": x}] * n) for x, n in (("1", 30), ("2", 10))]
    options = language | {"dataset": paths, "held_out": 0, "prompts_per_rollout": 8}

    def shares(**more: Any) -> list[int]:
        world = rollout_of(**options, **more)
        return [sum(world.sample._next().texts.count("2") for _ in range(5)) for _ in range(3)]

    assert rollout_of(**options).name == "1+2"
    assert shares() == [10, 10, 10]
    assert shares(dataset_weight=[1, 3]) == [30, 30, 30]
    with pytest.raises(OptionError, match="there are 2 data sets and 1 weights: give one weight for each"):
        rollout_of(**options, dataset_weight=1)


def test_weights_are_of_sets_of_any_kind(language: dict[str, Any]) -> None:
    del language["task"]
    sets = [[{"prompt": x, "answer": x}] * n for x, n in (("1", 30), ("2", 10))]
    options = language | {"held_out": 0, "prompts_per_rollout": 8}
    world = rollout_of(**options, dataset=sets, dataset_weight=[1, 3])
    assert sum(world.sample._next().texts.count("2") for _ in range(5)) == 30
    for data, weights, said in (
        (sets, [1], "there are 2 data sets and 1 weights: give one weight for each"),
        (sets[0], [1, 3], "dataset_weight is of several data sets, and there is one: leave it out"),
        (sets[0], 1, "there is one: leave it out"),
        (datasets.Dataset.from_list(sets[0]), 1, "there is one: leave it out"),
    ):
        with pytest.raises(OptionError, match=said):
            rollout_of(**options, dataset=data, dataset_weight=weights)


@pytest.mark.parametrize("form", ["rows", "dataset", "file"])
def test_a_column_that_a_reward_would_lose_is_refused(form: str, language: dict[str, Any], tmp_path: Path) -> None:
    del language["task"]
    rows = [{"prompt": str(i), "answer": "1", "cut": i} for i in range(40)]
    data = {"rows": rows, "dataset": datasets.Dataset.from_list(rows)}.get(form) or write(tmp_path / "d.jsonl", rows)
    seen = []

    def judge(completions: list[str], cut: list[bool], data_cut: list[int] | None = None) -> list[float]:
        seen.extend(data_cut or [])
        return [0.0] * len(cut)

    options = language | {"dataset": data, "held_out": 0}
    with pytest.raises(UserError, match=r"would not get the column 'cut' of the data.*data_cut=cut"):
        rollout_of(**options | {"reward": judge})
    rollout_of(**options)  # exact_match does not want it
    list(pg.Training("grpo", **options | {"reward": judge, "columns": {"data_cut": "cut"}}))
    assert seen


def test_an_evaluation_set_of_ones_own(language: dict[str, Any], tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}])
    del language["held_out"]
    run = pg.train("grpo", **language, evaluation_dataset=other, out=tmp_path / "run")
    assert len(run.world.prompts.train) == 40, "nothing is held out"
    assert run.world.prompts.held_out.texts == ["1+1=", "2+2="]
    assert Run.load(tmp_path / "run", trust=True).evaluate() == run.evaluate()
    assert rollout_of(**language, evaluation_dataset=[{"prompt": "7"}]).prompts.held_out.texts == ["7"]
    for wrong in ({"held_out": 3, "evaluation_dataset": other}, {"evaluation_split": "dev"}):
        with pytest.raises(
            OptionError, match=r"held_out is read only without|evaluation_split is of evaluation_dataset"
        ):
            rollout_of(**language, **wrong)


def test_a_stop_text_ends_completions(language: dict[str, Any]) -> None:
    run = pg.train("grpo", **language | {"max_tokens": 20}, stop=["7", "="])
    ended = [row["completion"] for row in run.world.last.rows if not row["cut"]]
    assert {text[-1] for text in ended if "7" in text or "=" in text} == {"7", "="}
    assert all(text.count("7") + text.count("=") <= 1 for text in ended)
    with pytest.raises(OptionError, match=r"stop is .*: it must be texts that are not empty"):
        rollout_of(**language, stop="")


def test_a_shared_prompt_changes_nothing_but_rounding(language: dict[str, Any]) -> None:
    runs = [pg.train("grpo", **language | {"iterations": 2}, shared_prompts=x) for x in ("off", "on", "auto")]
    assert [run.world.policy.shared for run in runs] == [False, True, True]
    for run in runs[1:]:
        for row, plain in zip(run.metrics[1:], runs[0].metrics[1:], strict=True):
            assert row["reward"] == plain["reward"]
            assert row["gradient_norm"] == pytest.approx(plain["gradient_norm"], rel=1e-4, abs=1e-6)
    with pytest.raises(OptionError, match="cannot compute a prompt once"):
        rollout_of(**language, shared_prompts="on", gradient_checkpointing=True)
    with pytest.warns(Note, match="it computes it for each of them"):
        rollout_of(**language, gradient_checkpointing=True)


def test_bfloat16_is_chosen_where_the_device_has_it(language: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, has in (("cpu", torch.bfloat16), ("meta", None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has is not None)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        with Training("grpo", **language, autocast="auto") as training:
            assert training.world.policy.autocast == has, name


@pytest.mark.parametrize(("limit", "rows"), [({"micro_batch": 3}, 3), ({"micro_batch_tokens": 40}, 2)])
def test_the_rows_at_a_time_change_no_completion(language: dict[str, Any], limit: dict[str, int], rows: int) -> None:
    whole, parts = (pg.train("grpo", **language | {"iterations": 1}, shared_prompts="off", **x) for x in ({}, limit))
    assert (whole.world.sample.request.micro_batch, parts.world.sample.request.micro_batch) == (None, rows)
    assert all(0 <= run.metrics[-1]["padding"] <= 0.05 for run in (whole, parts))
    for rows in (slice(0, 1), slice(1, 2)):
        assert [x["reward"] for x in whole.metrics[1:][rows]] == [x["reward"] for x in parts.metrics[1:][rows]]
    assert whole.before.rows == parts.before.rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": 10**9}, "4,000,000,000 completions of 6 tokens need "),
        ({"evaluation_completions": 10**9}, "1,000,000,000 completions of 6 tokens need "),
        ({"max_tokens": 10**9}, "the longest prompt and its completion have 1,000,000,0"),
        ({"prompts_per_rollout": 10**9}, "there are 32 prompts to train on, and a rollout takes 1000000000"),
    ],
    ids=str,
)
def test_sizes_beyond_memory_are_one_line(change: dict[str, Any], message: str, language: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        rollout_of(**language | change)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) <= 200


@pytest.mark.parametrize("option", ["columns", "system_prompt", "template_variables", "evaluation_dataset"])
def test_arithmetic_reads_no_options_of_other_data(option: str) -> None:
    value = "{}" if option == "template_variables" else "a=b"
    with pytest.raises(OptionError, match=f"arithmetic makes its own problems: leave {option} out"):
        pg.train("grpo", "arithmetic", **{option: value})


# A run's directory that someone has changed


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs `full`, with a critic, and `lora`."""
    place = tmp_path_factory.mktemp("runs")
    size: dict[str, Any] = {"iterations": 1, "prompts_per_rollout": 2, "completions": 2, "max_tokens": 3, "held_out": 2}
    size |= {"preset": "none", "progress": False}
    pg.train("ppo", "arithmetic", **size, minibatch_size=2, out=place / "full")
    pg.train("grpo", "arithmetic", **size, lora_rank=2, out=place / "lora")
    return place


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> Any:
        return Path.touch, (self.place,)


def changed(file: str, **values: Any) -> Any:
    """Change entries of a JSON file; options.NAME is one of the options."""

    def change(run: Path) -> None:
        content = json.loads((run / file).read_text())
        for name, x in values.items():
            inside, _, last = name.rpartition("__")
            (content[inside] if inside else content)[last] = x
        (run / file).write_text(json.dumps(content))

    return change


def replaced(file: str, content: str | bytes) -> Any:
    return lambda run: (run / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(file: str) -> Any:
    return lambda run: (run / file).write_bytes((run / file).read_bytes()[: (run / file).stat().st_size // 2])


def fifo(file: str) -> Any:
    return lambda run: ((run / file).unlink(missing_ok=True), os.mkfifo(run / file))


def linked(file: str) -> Any:
    return lambda run: ((run / file).unlink(missing_ok=True), (run / file).symlink_to(__file__))


def pickled(file: str, weights: str) -> Any:
    return lambda run: ((run / weights).unlink(), torch.save(Evil(run / "ran"), run / file))


DEEP = "[" * 10**5 + "]" * 10**5
WEIGHTS, ADAPTER = "model/model.safetensors", "model/adapter_model.safetensors"
DAMAGE: dict[str, tuple[str, Any]] = {
    "config deep": ("full", replaced("config.json", DEEP)),
    "config fifo": ("full", fifo("config.json")),
    "config link": ("full", linked("config.json")),
    "huge number": ("full", changed("config.json", options__max_tokens=10**18)),
    "a larger number": ("full", changed("config.json", options__max_tokens=10**400)),
    "half a character": ("full", changed("config.json", options__stop=["\ud800"])),
    "reward of a file": ("full", changed("config.json", options__reward=["evil.py:f"])),
    "reward of a module": ("full", changed("config.json", options__reward=["evil:f"])),
    "template deep": ("full", changed("config.json", options__template_variables=f'{{"a": {DEEP}}}')),
    "held out fifo": ("full", fifo("held_out.jsonl")),
    "held out link": ("full", linked("held_out.jsonl")),
    "held out half a character": ("full", replaced("held_out.jsonl", '{"prompt": "\\ud800", "answer": "1"}')),
    "held out number": ("full", replaced("held_out.jsonl", '{"prompt": 1}')),
    "weights cut": ("full", cut(WEIGHTS)),
    "weights fifo": ("full", fifo(WEIGHTS)),
    "weights link": ("full", linked(WEIGHTS)),
    "weights pickled": ("full", pickled("model/pytorch_model.bin", WEIGHTS)),
    "model of a kind": ("full", changed("model/config.json", model_type="evil")),
    "model of code": (
        "full",
        changed("model/config.json", auto_map={"AutoConfig": "evil.M"}, model_type="e"),
    ),
    "model of no size": ("full", changed("model/config.json", hidden_size="four")),
    "tokenizer deep": ("full", replaced("model/tokenizer.json", DEEP)),
    "tokenizer of a length": ("full", changed("model/tokenizer_config.json", model_max_length="x")),
    "critic cut": ("full", cut("critic.safetensors")),
    "critic fifo": ("full", fifo("critic.safetensors")),
    "adapter cut": ("lora", cut(ADAPTER)),
    "adapter pickled": ("lora", pickled("model/adapter_model.bin", ADAPTER)),
    "another rank": ("lora", changed("config.json", options__lora_rank=3)),
    "adapter fifo": ("lora", fifo("model/adapter_config.json")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_changed_run_is_one_line_and_nothing_of_it_runs(
    damage: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, change = DAMAGE[damage]
    run = tmp_path / "run"
    shutil.copytree(saved / kind, run)
    for place in (run, run / "model"):
        (place / "evil.py").write_text(f"open({str(run / 'ran')!r}, 'w')\nM = f = None\n")
    change(run)
    monkeypatch.chdir(run)
    with pytest.raises(UserError) as raised:
        pg.load(run).evaluate(1)
    assert len(str(raised.value)) <= 200
    assert "\n" not in str(raised.value)
    assert not (run / "ran").exists()


def taught_by(language: dict[str, Any], teacher: Path, **options: Any) -> dict[str, Any]:
    rest = {name: x for name, x in language.items() if name != "reward"}
    ours = {"kl_ref": "loss", "kl_ref_estimate": "exact", "kl_ref_coefficient": 1.0, "teacher": str(teacher)}
    return rest | ours | options


@pytest.fixture
def teacher(language: dict[str, Any], tmp_path: Path) -> Path:
    """Another model with the same tokens."""
    model = models.load_model(language["model"])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    models.save_model(model, models.load_tokenizer(language["model"]), tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_teacher_alone_is_learned_from(rank: int, language: dict[str, Any], teacher: Path) -> None:
    """The first KL is that of each token's distributions, summed by hand, at the prefixes that were sampled."""
    options = taught_by(language, teacher, iterations=12, learning_rate=3e-2, lora_rank=rank, weights="token")
    with Training("grpo", **options) as training:
        objective, by_hand = training.learner.objective, []
        plain, taught = objective.forward, objective.anchor.keywords["reference"]

        def seen(batch: Any) -> Any:
            with torch.no_grad():
                p, q = (x(batch.obs).logits.log_softmax(-1)[batch.mask].tolist() for x in (objective.policy, taught))
            each = [sum(math.exp(a) * (a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)]
            by_hand.append(sum(each) / len(each))
            return plain(batch)

        objective.forward = seen
        rows = list(training)
    assert [row["kl_ref"] for row in rows] == pytest.approx(by_hand, rel=1e-4)
    assert all(row["reward"] == 0 for row in rows)
    assert rows[-1]["kl_ref"] < (0.9 if rank else 0.7) * rows[0]["kl_ref"]
    assert not any(p.requires_grad for p in taught.parameters())


def test_a_teacher_beside_a_reward_and_in_it(language: dict[str, Any], teacher: Path) -> None:
    firsts = []
    for more in ({}, {"teacher": str(teacher)}):
        with Training("rloo", **language | {"kl_ref": "reward", "learning_rate": 1e-2} | more) as training:
            firsts.append(next(training))
    plain, taught = firsts
    assert plain["kl_ref"] < 1e-6
    assert taught["kl_ref"] > 1e-2
    assert plain["reward"] == taught["reward"] > 0, "the reward is not the teacher's"


def test_a_run_does_not_go_on_with_another_teacher(language: dict[str, Any], teacher: Path, tmp_path: Path) -> None:
    first = models.load_model(str(teacher))
    pg.train("grpo", **taught_by(language, teacher, iterations=1), out=tmp_path / "run")
    other = models.load_model(str(teacher))
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    words = models.load_tokenizer(str(teacher))
    models.save_model(other, words, teacher)
    with pytest.raises(UserError, match="the teacher is no longer what it was: put it back, or begin a new run"):
        pg.resume(tmp_path / "run", trust=True, iterations=1, progress=False)
    models.save_model(first, words, teacher)
    assert len(pg.resume(tmp_path / "run", trust=True, iterations=1, progress=False).metrics) == 3


@pytest.mark.parametrize("changed", ["training data", "data that is mixed in", None])
def test_a_run_that_goes_on_with_other_data_says_so(
    changed: str | None, language: dict[str, Any], tmp_path: Path
) -> None:
    prompts, mixed = tmp_path / "prompts.jsonl", tmp_path / "mixed.jsonl"
    prompts.write_text(Path(language["task"]).read_text())
    mixed.write_text("".join(json.dumps({"prompt": f"{i}+1=", "completion": f"{i + 1}"}) + "\n" for i in range(9)))
    options = language | {"task": str(prompts), "mix": str(mixed), "mix_rows": 2, "iterations": 1}
    pg.train("grpo", **options, out=tmp_path / "run")
    if changed is not None:
        path = prompts if changed == "training data" else mixed
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        name = next(x for x in rows[0] if x != "prompt")
        path.write_text("".join(json.dumps(row | {name: f"{row[name]}0"}) + "\n" for row in rows))
    with warnings.catch_warnings(record=True, action="always") as seen:
        pg.resume(tmp_path / "run", trust=True, iterations=1, progress=False)
    said = [str(x.message) for x in seen if "is no longer what it was" in str(x.message)]
    assert said == ([] if changed is None else [f"the {changed} is no longer what it was: {OTHERWISE}"])


def test_a_teacher_that_cannot_teach_is_refused_in_one_line(
    language: dict[str, Any], teacher: Path, tmp_path: Path
) -> None:
    models.save_model(tiny(vocab_size=24), models.load_tokenizer(language["model"]), tmp_path / "wide")
    for options, said in (
        (taught_by(language, tmp_path / "wide"), "other tokens than the policy: give a model of the same family"),
        (taught_by(language, tmp_path / "nowhere"), "nowhere"),
        (
            taught_by(language, teacher, kl_ref="none", kl_ref_estimate="straight_through", kl_ref_coefficient=0.04),
            "teacher is read only where kl_ref is reward or loss",
        ),
        (taught_by(language, teacher, reference_every=2), "a teacher stays as it is"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            pg.train("grpo", **options)
        assert len(str(raised.value)) <= 200


# Demonstrations mixed in


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """Demonstrations of two lengths."""
    rows = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}" + ", yes" * (i % 2)} for i in range(1, 5)]
    (tmp_path / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "shown.jsonl"


def stepped(method: str, **options: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """The change of all parameters in one step of plain gradient ascent of rate 1, in float64, and its metrics."""
    exact: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1.0, "max_grad_norm": math.inf, "iterations": 1}
    with Training(method, **options | exact) as training:
        policy = training.run.policy.double()
        before = torch.cat([p.detach().flatten().clone() for p in policy.parameters()])
        row = next(training)
        return torch.cat([p.detach().flatten() for p in policy.parameters()]) - before, row


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("method", ["grpo", "reinforce"])
def test_the_gradient_with_demonstrations_mixed_in_is_the_sum_of_two(
    method: str, micro_batch: int | None, language: dict[str, Any], shown: Path
) -> None:
    options = language | {"held_out": 0, "max_tokens": 12}
    alone, row = stepped(method, **options)
    rest = {name: x for name, x in options.items() if name not in ("task", "completions", "reward")}
    cloned, of_clone = stepped("clone", task=str(shown), **rest)
    more = {"mix": str(shown), "mix_weight": 0.3, "mix_rows": 4, "micro_batch": micro_batch}
    both, mixed = stepped(method, **options, **more)
    assert cloned.norm() > 0.1
    assert alone.norm() > 0.1
    torch.testing.assert_close(both, alone + 0.3 * cloned, rtol=1e-6, atol=1e-6)
    assert mixed["mix_log_probability"] == pytest.approx(of_clone["objective"], rel=1e-6)
    assert mixed["objective"] == pytest.approx(row["objective"], abs=1e-6), "the metrics are the rollout's"


def test_a_run_with_demonstrations_goes_on_bit_for_bit(language: dict[str, Any], shown: Path, tmp_path: Path) -> None:
    options = language | {"mix": str(shown), "mix_rows": 3, "learning_rate": 1e-2, "max_tokens": 12}
    whole = pg.train("grpo", **options | {"iterations": 3})
    pg.train("grpo", **options, out=tmp_path / "run")
    again = pg.resume(tmp_path / "run", trust=True, iterations=1, progress=False)
    assert torch.equal(parameters(whole), parameters(again))


def test_demonstrations_that_cannot_be_mixed_in_are_refused(language: dict[str, Any], shown: Path) -> None:
    for more, said in (
        ({"mix_weight": 0.5}, "mix_weight is of mix, which is None"),
        (
            {"mix": str(shown), "mix_rows": 5, "max_tokens": 12},
            "mix_rows is 5, and mix has 4 rows: lower it, or give more",
        ),
        ({"mix": language["task"], "mix_rows": 1}, "has no column 'completion' or 'messages'"),
        ({"mix": str(shown), "mix_rows": 1, "max_tokens": 2}, "4 of 4 completions are longer than 2 tokens"),
    ):
        with pytest.raises(UserError, match=said) as raised:
            pg.train("grpo", **language | more)
        assert len(str(raised.value)) <= 200


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_right_completions_are_imitated(method: str, language: dict[str, Any]) -> None:
    options = language | {"kl_ref": "none", "held_out": 0} | ({"minibatch_size": None} if method == "ppo" else {})
    options |= {"epochs": 1, "prompts_per_rollout": 8, "weights": "token", "max_tokens": 12, "seed": 1}
    plain, _ = stepped(method, **options)
    found, _ = stepped(method, **options, positive_weight=0.3)
    with Training(method, **options) as training:
        policy = training.run.policy.double()
        rollout = training.learner.sample(policy)
        right = (rollout.reward.sum(1) > 0).unsqueeze(1) & rollout.mask
        assert 0 < right.any(1).sum() < len(right)
        mean = policy(rollout.obs).log_prob(rollout.action)[right].mean()
        wanted = torch.cat([x.flatten() for x in torch.autograd.grad(mean, list(policy.parameters()))])
    torch.testing.assert_close(found - plain, 0.3 * wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(OptionError, match="positive_weight reads which rewards are above 0, and kl_ref reward charges"):
        pg.train(method, **options | {"kl_ref": "reward"}, positive_weight=0.3)


# Rollouts of an older policy


class Behind:
    """What Overlapped does, one after the other: a rollout of the policy of `lag` calls before."""

    def __init__(self, sample: Any, lag: int) -> None:
        self.sample, self.lag, self.versions = sample, lag, list[Any]()

    def __call__(self, policy: Any) -> Any:
        self.versions.append(deepcopy(policy))
        return self.sample(self.versions[max(0, len(self.versions) - 1 - self.lag)])


@pytest.mark.parametrize("more", [{}, {"old_logp": "recomputed"}, {"lora_rank": 2}], ids=str)
def test_a_lag_is_that_of_policies_sampled_from_in_turn(
    more: dict[str, Any], language: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = language | {"iterations": 5, "learning_rate": 1e-2} | more
    plain = pg.train("grpo", **options)
    assert torch.equal(parameters(plain), parameters(pg.train("grpo", **options, lag=0)))
    runs = [pg.train("grpo", **options, lag=2) for _ in range(2)]
    assert [row["policy_lag"] for row in runs[0].metrics[1:]] == [0, 1, 2, 2, 2]
    monkeypatch.setattr(compose, "Overlapped", Behind)
    behind = pg.train("grpo", **options, lag=2)
    for run in runs:
        assert torch.equal(parameters(run), parameters(behind))
    assert not torch.equal(parameters(plain), parameters(behind))


def test_a_run_with_a_lag_goes_on_bit_for_bit(language: dict[str, Any], tmp_path: Path) -> None:
    options = language | {"learning_rate": 1e-2, "lag": 2}
    whole = pg.train("grpo", **options | {"iterations": 6})
    pg.train("grpo", **options | {"iterations": 3}, out=tmp_path / "run")
    again = pg.resume(tmp_path / "run", trust=True, iterations=3, progress=False)
    assert torch.equal(parameters(whole), parameters(again))
    assert whole.metrics[-1]["steps"] == again.metrics[-1]["steps"]


def test_a_lag_that_nothing_corrects_for_is_refused(language: dict[str, Any]) -> None:
    for method, more, said in (
        ("reinforce", {}, "lag learns from a policy some updates old, and reinforce does not correct for that"),
        ("dapo", {}, "lag counts rollouts, of which sampling_rounds may take several"),
        (
            "dppo",
            {"divergence_mask": "tv"},
            "lag needs the policy that sampled, and divergence_mask reads the newest old one",
        ),
        ("grpo", {"profile": True}, "profile follows one thread"),
    ):
        with pytest.raises(OptionError, match=said) as raised:
            pg.train(method, **language, lag=1, **more)
        assert len(str(raised.value)) <= 200
