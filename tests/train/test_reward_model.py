"""Training a reward model as a user would: from a file of preferences to a reward that PPO is trained on."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import policygrad as pg
from policygrad.cli import main
from policygrad.errors import Kept, NonFiniteError, UserError
from policygrad.files import read_metadata
from policygrad.language import arithmetic, models
from policygrad.language.adapters import add_adapter
from policygrad.language.reward_models import RewardModel
from policygrad.train import recording, reward_model
from policygrad.train.reward_model import PairEvaluation, RewardModelRun, train_reward_model
from policygrad.updates import ascend


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge who likes sevens: forty pairs in a JSONL file."""
    path = tmp_path_factory.mktemp("preferences") / "sevens.jsonl"
    rows = [{"prompt": f"{i}+1=", "chosen": f"{i}7", "rejected": f"{i}{'2345689'[i % 7]}"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small(model: Path, preferences: Path) -> dict[str, Any]:
    """Options of a run that takes a fraction of a second."""
    return {
        "dataset": str(preferences),
        "model": str(model),
        "held_out": 8,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "threads": 1,
        "progress": False,
    }


def parameters(run: RewardModelRun) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.model.parameters()])


def test_it_learns_the_preference_and_says_how_well(small: dict) -> None:
    said: list[str] = []
    run = train_reward_model(**small, epochs=3, announce=said.append)
    assert run.before is not None
    assert run.after is not None
    assert run.before.accuracy < 0.9
    assert run.after.accuracy == 1.0
    assert run.after.margin > run.before.margin + 0.5
    assert run.after.log_likelihood > run.before.log_likelihood
    assert (run.pairs, run.after.pairs, len(run.metrics)) == (32, 8, 12)
    assert said[-2:] == [f"before: {run.before.line()}", f"after:  {run.after.line()}"]
    assert run.metrics[-1]["objective"] > run.metrics[0]["objective"]


def test_what_is_saved_is_what_was_trained(small: dict, tmp_path: Path) -> None:
    run = train_reward_model(**small, out=tmp_path / "kind")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "kind")
    assert loaded.config.num_labels == 1
    assert loaded.config.pad_token_id == AutoTokenizer.from_pretrained(tmp_path / "kind").pad_token_id
    prompts, completions = ["1+1=", "12+34="], ["7,7", "46"]
    again = RewardModel.load(str(tmp_path / "kind"), device="cpu", trust_remote_code=False)
    assert again(prompts, completions) == run.model(prompts, completions)
    card = (tmp_path / "kind" / "README.md").read_text()
    assert run.after is not None
    for words in (f"base_model: {small['model']}", "# A reward model of", f"after: {run.after.line()}", '"epochs": 1'):
        assert words in card


def test_micro_batches_change_nothing(small: dict) -> None:
    whole, parts = train_reward_model(**small), train_reward_model(**small, micro_batch=3)
    for a, b in zip(whole.metrics, parts.metrics, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert (parameters(whole) - parameters(parts)).norm() < 0.02 * (parameters(whole) - start(small)).norm()


def start(small: dict) -> torch.Tensor:
    return parameters(train_reward_model(**small | {"learning_rate": 1e-30}))


def test_the_learning_rate_falls_to_nothing(small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []

    def watched(optimizer: Any, **options: Any) -> Any:
        update = ascend(optimizer, **options)
        return lambda *step: rates.append(optimizer.param_groups[0]["lr"]) or update(*step)

    monkeypatch.setattr(reward_model, "ascend", watched)
    train_reward_model(**small | {"learning_rate": 1e-3})
    assert rates == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])


def test_the_same_seed_gives_the_same_model_and_leaves_torchs_generator_alone(small: dict) -> None:
    torch.manual_seed(5)
    first = train_reward_model(**small, seed=3)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(parameters(first), parameters(train_reward_model(**small, seed=3)))
    assert not torch.equal(parameters(first), parameters(train_reward_model(**small, seed=4)))


def test_training_goes_on_from_a_reward_model(small: dict, tmp_path: Path) -> None:
    first = train_reward_model(**small, epochs=3, out=tmp_path / "first")
    second = train_reward_model(**small | {"model": str(tmp_path / "first"), "learning_rate": 1e-6})
    assert second.before == first.after


def test_a_policy_is_trained_on_it(small: dict, prompts: Path, tmp_path: Path) -> None:
    """The whole of RLHF: preferences, reward model, PPO with its KL penalty."""
    train_reward_model(**small | {"learning_rate": 1e-2}, epochs=3, out=tmp_path / "sevens")
    run = pg.train(
        "ppo",
        model=small["model"],
        dataset=str(prompts),
        reward=(str(tmp_path / "sevens"),),
        iterations=6,
        prompts_per_rollout=16,
        completions=2,
        max_tokens=6,
        minibatch_size=16,
        held_out=8,
        learning_rate=1e-2,
        critic_learning_rate=1e-2,
        kl_ref_coefficient=0.01,
        threads=1,
        progress=False,
    )
    assert run.before is not None
    assert run.after is not None
    assert run.after.reward > run.before.reward + 0.3
    assert list(run.after.parts) == ["sevens"]
    assert run.metrics[-1]["kl_ref"] > run.metrics[1]["kl_ref"]


# The arithmetic task's own.


def test_arithmetic_preferences_are_of_right_answers() -> None:
    examples, _ = arithmetic.splits(400, 8, seed=0)
    pairs = arithmetic.preferences(examples, seed=0, errs=0.0)
    answers = {x["prompt"]: x["answer"] for x in examples}
    assert 100 < len(pairs) < 300
    for pair in pairs:
        right = arithmetic.right(
            [pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]], [answers[pair["prompt"]]] * 2
        )
        assert right == [1.0, 0.0]
    mistaken = arithmetic.preferences(examples, seed=0, errs=0.25)
    turned = [x != y for x, y in zip(pairs, mistaken, strict=True)]
    assert 0.15 < sum(turned) / len(turned) < 0.35
    assert all((x["chosen"] == y["rejected"]) == t for x, y, t in zip(pairs, mistaken, turned, strict=True))
    assert arithmetic.preferences(examples, seed=1, errs=0.0) != pairs


def test_arithmetic_needs_neither_data_nor_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The command, from nothing to a saved model; no problem that a policy is judged on is among the pairs."""
    models.save_model(arithmetic.model(16, 1), arithmetic.tokenizer(), tmp_path / "warm")
    warm = models.load_model(str(tmp_path / "warm"))
    seen: list[str] = []
    of_all = arithmetic.preferences
    monkeypatch.setattr(reward_model, "PROBLEMS", 200)
    monkeypatch.setattr(reward_model, "warm_model", lambda *_: warm)
    monkeypatch.setattr(arithmetic, "preferences", lambda x, **k: seen.extend(e["prompt"] for e in x) or of_all(x, **k))
    monkeypatch.chdir(tmp_path)
    for number in ("", "-2"):
        with pytest.raises(SystemExit) as stop:
            main(["reward-model", "--held-out", "16", "--threads", "1", "--json"])
        assert stop.value.code == 0
        summary = json.loads(capsys.readouterr().out)
        assert summary["model"] == f"runs/arithmetic/reward-model-seed0{number}"
        assert summary["after"]["pairs"] == 16
        assert summary["pairs"] > 50
        assert (tmp_path / summary["model"] / "model.safetensors").is_file()
    assert not {x["prompt"] for x in arithmetic.splits(8000, 128, seed=0)[1]} & set(seen)


def test_the_command_says_what_it_did(small: dict, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(
            ["reward-model", "--dataset", small["dataset"], "--model", small["model"], "--held-out", "8"]
            + ["--out", str(tmp_path / "out"), "--batch-size", "8", "--threads", "1"]
        )
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("before: accuracy ")
    assert lines[1].startswith("after:  accuracy ")
    assert lines[2].startswith(f"reward model of {small['dataset']}: 32 pairs, 4 updates in ")
    assert lines[3].startswith(
        f"model: {tmp_path}/out learned nothing that can be told from chance: on held-out pairs "
    )
    assert "--reward" not in lines[3], "after four updates it is not recommended"


def test_a_reward_model_is_recommended_if_it_learned_more_than_noise(small: dict) -> None:
    trained = train_reward_model(**small)
    for before, after, pairs, learned in (
        (0.5, 0.53, 256, False),  # two standard errors of chance are 0.0625
        (0.5, 0.60, 256, True),
        (0.5, 0.60, 40, False),
        (0.40, 0.53, 256, False),  # better than a start below chance, and no better than chance
        (0.90, 0.91, 256, False),
        (0.90, 0.97, 256, True),
        (0.5, 1.0, 8, True),
        (1.0, 1.0, 8, False),
        (0.5, 0.2, 256, False),
    ):
        scores = [PairEvaluation(x, 0.0, -0.7, pairs) for x in (before, after)]
        run = replace(trained, before=scores[0], after=scores[1], directory=Path("out"))
        assert run.learned() == run.summary()["learned"] == learned
        assert ("--reward out" in run.verdict()) == learned
        assert (f"was {before:.3f} and is {after:.3f}" in run.verdict()) == (not learned)


def test_the_default_rate_falls_with_the_width(small: dict) -> None:
    rates = []
    for options in ({"learning_rate": None}, {"learning_rate": 0.04 / 16}):  # the model's width is 16
        rates.append(parameters(train_reward_model(**small | options)))
    assert torch.equal(*rates)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_half_precision(small: dict, dtype: str) -> None:
    if dtype == "float16":
        with pytest.raises(UserError, match="weights in float16 cannot be trained"):
            train_reward_model(**small, dtype=dtype)
        return
    exact, coarse = (train_reward_model(**small | {"learning_rate": 1e-4}, dtype=x) for x in ("float32", dtype))
    assert {p.dtype for p in coarse.model.model.parameters()} == {torch.bfloat16}
    assert coarse.metrics[-1]["objective"] == pytest.approx(exact.metrics[-1]["objective"], abs=0.01)


# What is kept.


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), NonFiniteError("the gradient's norm is nan")])
def test_what_stops_training_leaves_the_model_before_it(
    small: dict, stop: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third of four updates: the directory holds the model after two, and says so."""

    def breaking(optimizer: Any, **options: Any) -> Any:
        update, calls = ascend(optimizer, **options), iter(range(9))

        def step(*arguments: Any) -> Any:
            if next(calls) == 2:
                raise stop
            return update(*arguments)

        return step

    monkeypatch.setattr(reward_model, "ascend", breaking)
    with pytest.raises((KeyboardInterrupt, UserError)) as raised:
        train_reward_model(**small, out=tmp_path / "kind")
    assert raised.value.__notes__ == [f"the reward model after 2 of 4 updates is kept in {tmp_path}/kind"]
    assert isinstance(raised.value.__notes__[0], Kept)
    metadata = read_metadata(tmp_path / "kind" / "model.safetensors")
    assert {"iteration": "2", "of": "4", "ended": "false"}.items() <= metadata.items()
    assert "Training has not ended: this is the reward model after 2 of 4" in (tmp_path / "kind/README.md").read_text()
    kept = RewardModel.load(str(tmp_path / "kind"))(["1+1="], ["2"])
    monkeypatch.setattr(reward_model, "ascend", ascend)
    assert kept != train_reward_model(**small).model(["1+1="], ["2"])


def test_the_model_is_saved_now_and_then_and_says_of_which_update_it_is(
    small: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str]] = []
    of_models = models.save_model
    monkeypatch.setattr(recording, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(recording, "SAVE_SHARE", math.inf)
    monkeypatch.setattr(
        models, "save_model", lambda *x: seen.append((x[3]["iteration"], x[3]["ended"])) or of_models(*x)
    )
    run = train_reward_model(**small, out=tmp_path / "kind")
    assert seen == [*((str(k), "false") for k in (1, 2, 3, 4)), ("4", "true")]
    assert run.summary()["ended"] is True
    assert read_metadata(tmp_path / "kind" / "model.safetensors")["ended"] == "true"


def test_nothing_is_said_to_be_kept_where_nothing_is(small: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(reward_model, "ascend", stop)
    with pytest.raises(KeyboardInterrupt) as raised:
        train_reward_model(**small)
    assert raised.value.__notes__ == ["nothing was saved"]


def test_training_starts_from_an_adapter_merged_into_its_base(small: dict, tmp_path: Path) -> None:
    base = models.load_model(small["model"])
    adapted = add_adapter(base, 2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    models.save_model(adapted, arithmetic.tokenizer(), tmp_path / "adapter")
    start = small | {"model": str(tmp_path / "adapter"), "learning_rate": 1e-30}
    with pytest.raises(UserError, match=r"is an adapter of .*: give that as base_model, or say trust"):
        train_reward_model(**start)
    found, plain = train_reward_model(**start, trust=True), train_reward_model(**small | {"learning_rate": 1e-30})
    expected = adapted.merge_and_unload().state_dict()
    ours, theirs = (x.model.model.state_dict() for x in (found, plain))
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(ours[name], expected[name])
    assert not torch.allclose(ours[name], theirs[name], atol=1e-3)


# What is refused.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0: it must be more than 0"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"center_coefficient": -1.0}, "center_coefficient is -1.0: it must be 0 or more"),
        ({"held_out": 40}, "40 of 40 examples cannot be held out: lower held_out, or give more examples"),
        (
            {"max_length": 5},
            "40 of 40 pairs are longer than 5 tokens, the first in row 0 with 7: raise max_length, or leave them",
        ),
        ({"model": None}, "there is no model to train on DATA: give --model, a directory or a hub id"),
        ({"model": "/nowhere"}, "there is no directory /nowhere to load a tokenizer from"),
        ({"dataset": "/nowhere.jsonl"}, "there is no file /nowhere.jsonl: check the path"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used: "),
        ({"learning_rate": 1e30}, "training stopped in update "),
        ({"shuffle": True}, "reward-model has no option 'shuffle': "),
    ],
)
def test_mistakes_are_said_in_one_line(small: dict, change: dict, message: str) -> None:
    with pytest.raises(UserError) as caught:
        train_reward_model(**small | change)
    assert str(caught.value).startswith(message.replace("DATA", small["dataset"]))
    assert "\n" not in str(caught.value)


def test_nothing_is_overwritten(small: dict, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(UserError, match=r"is not empty, and nothing is overwritten: choose another directory"):
        train_reward_model(**small, out=tmp_path)


def test_a_model_with_weights_missing(small: dict, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    models.save_model(tiny(), arithmetic.tokenizer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"has no weights for model.norm.weight: they would be random; give a whole model"
    ):
        train_reward_model(**small | {"model": str(tmp_path)})


def test_a_classifier_of_several_labels_is_no_start(small: dict, tmp_path: Path) -> None:
    config = tiny().config
    config.num_labels = 3
    models.save_model(AutoModelForSequenceClassification.from_config(config), arithmetic.tokenizer(), tmp_path)
    with pytest.raises(UserError, match=r"its weights do not fit a reward model; ") as caught:
        train_reward_model(**small | {"model": str(tmp_path)})
    assert "\n" not in str(caught.value)
