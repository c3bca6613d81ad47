"""Language: every method on a tiny model, its critic, and what a run directory holds."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import policygrad as pg
from policygrad.errors import UserError
from policygrad.language import models
from policygrad.language.evaluation import Evaluation
from policygrad.language.policies import trunk
from policygrad.train.options import OptionError
from policygrad.train.run import Run
from policygrad.train.worlds.language import verdict


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
    loaded = Run.load(tmp_path / "run")
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
    assert Run.load(tmp_path / "run").critic is None
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
    loaded = Run.load(tmp_path / "run")
    assert loaded.evaluate() == run.evaluate()
    assert loaded.evaluate(2, greedy=True).completions == 2


def test_an_adapter_is_saved_and_loaded(language: dict[str, Any], tmp_path: Path) -> None:
    run = pg.train("grpo", **language, lora_rank=2, learning_rate=1e-2, out=tmp_path / "run")
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()
    assert Run.load(tmp_path / "run").evaluate() == run.evaluate()


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


@pytest.mark.parametrize(
    ("change", "option", "said"),
    [
        ({"model": None}, "model", "there is no model to train on"),
        ({"reward": ()}, "reward", "nothing judges the completions"),
        ({"task": "arithmetic", "dataset": "x.jsonl"}, "dataset", "arithmetic makes its own problems"),
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
    with pytest.raises(UserError, match="no held-out examples to evaluate on"):
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
