"""Supervised fine-tuning: the tokens of completions, their gradient, and the run that it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from outcomes import parameters, untimed
from tiny_models import tiny
from torch.nn.functional import cross_entropy

import policygrad as pg
from policygrad.algorithms.reinforce import ReinforceObjective
from policygrad.credit import demonstrated as credit
from policygrad.errors import UserError
from policygrad.language import arithmetic, data
from policygrad.language.models import save_model
from policygrad.language.policies import LanguagePolicy
from policygrad.language.sampler import DemonstrationSampler, demonstrated
from policygrad.language.tasks import prepared
from policygrad.rollout import decisions
from policygrad.train.options import OptionError
from policygrad.weights import per_row, per_token

ROWS = [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a in range(4) for b in range(20)]
SMALL: dict[str, Any] = {
    "iterations": 2, "prompts_per_rollout": 4, "held_out": 4, "max_tokens": 8, "progress": False, "preset": "none",
    "threads": 1,
}  # fmt: skip
CHAT = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}<eos>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with the arithmetic task's characters."""
    place = tmp_path_factory.mktemp("model")
    save_model(tiny(), arithmetic.tokenizer(), place)
    return str(place)


def tokens(text: str) -> list[int]:
    return list(arithmetic.tokenizer()(text, add_special_tokens=False)["input_ids"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("weights", [per_token, per_row])
def test_the_gradient_is_that_of_transformers_own_loss(weights: Any) -> None:
    """By token over all rows, as transformers has it; by row it is the mean of the rows' own losses."""
    policy, examples = LanguagePolicy(tiny().double()), [ROWS[0], ROWS[19], ROWS[45]]
    prompts = prepared(examples, arithmetic.tokenizer(), max_tokens=8)
    rollout = demonstrated(prompts)
    batch = decisions(rollout, weights(rollout.mask), *credit(rollout))
    value, _ = ReinforceObjective(policy)(batch)
    rows = [tokens(x["prompt"]) + [*tokens(x["completion"]), 1] for x in examples]
    labels = [[-100] * len(tokens(x["prompt"])) + [*tokens(x["completion"]), 1] for x in examples]
    width = max(map(len, rows))

    def filled(lists: list[list[int]], x: int) -> torch.Tensor:
        return torch.tensor([row + [x] * (width - len(row)) for row in lists])

    def losses(index: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Of these rows: transformers' own loss, which is float32, and the same in float64."""
        seen, target = filled([[1] * len(row) for row in rows], 0)[index], filled(labels, -100)[index]
        out = policy.model(input_ids=filled(rows, 0)[index], attention_mask=seen, labels=target)
        return out.loss, cross_entropy(out.logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())

    parts = [losses(slice(None))] if weights is per_token else [losses(slice(i, i + 1)) for i in range(3)]
    theirs, exact = (torch.stack(x).mean() for x in zip(*parts, strict=True))
    assert value.item() == pytest.approx(-theirs.item(), rel=1e-6)
    assert value.item() == pytest.approx(-exact.item(), rel=1e-12)
    found = [torch.autograd.grad(x, list(policy.parameters()), retain_graph=True) for x in (value, -exact, -theirs)]
    for a, b, c in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-7)


def test_every_demonstration_comes_once_in_an_epoch_with_its_own_prompt() -> None:
    prompts = prepared(ROWS, arithmetic.tokenizer(), max_tokens=8)
    sample = DemonstrationSampler(prompts, 8, prompts_per_rollout=8, seed=3)
    seen = []
    for k in range(10):
        rollout = sample(torch.nn.Identity())
        decode = arithmetic.tokenizer().decode
        for prompt, mask, row, real in zip(*rollout.obs, strict=True):
            text, answer = decode(prompt[mask]), decode(row[real])
            assert answer == f"{sum(map(int, text[:-1].split('+')))}<eos>"
            seen.append(text)
        assert rollout.metrics["epoch"] == pytest.approx((k + 1) / 10)
        assert rollout.terminated.sum() == 8
        assert bool((rollout.terminated.int().argmax(1) == rollout.mask.sum(1) - 1).all())
    assert sorted(seen) == sorted(x["prompt"] for x in ROWS)
    assert sample.steps == sum(len(x["completion"]) + 1 for x in ROWS)


def chat() -> Any:
    tokenizer = arithmetic.tokenizer()
    tokenizer.chat_template = CHAT.replace("m['role'][0] + ':' + ", "").replace("a:", "")
    return tokenizer


def test_an_answer_in_a_conversation_is_what_the_template_writes_after_the_prompt() -> None:
    conversation = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "3"}]
    rows: list[dict[str, Any]] = [
        {"messages": conversation},
        {"prompt": conversation[:1], "completion": conversation[1:]},
        {"prompt": conversation[:1], "completion": "3"},
    ]
    for row in rows:
        examples = data.load_demonstrations([row])
        assert data.encode_completions(examples, chat()) == [[*tokens("3"), 1]]
        assert data.encode_prompts(examples, chat()) == [tokens("1+2=")]
    longer = [*conversation, {"role": "user", "content": "4+4="}, {"role": "assistant", "content": "8"}]
    examples = data.load_demonstrations([{"messages": longer}])
    assert data.encode_completions(examples, chat()) == [[*tokens("8"), 1]], "the last answer alone"


def test_a_completion_with_an_end_of_its_own_has_one_end() -> None:
    rows = [{"prompt": "1+1=", "completion": text} for text in ("2", "2<eos>")]
    assert data.encode_completions(rows, arithmetic.tokenizer()) == [[*tokens("2"), 1]] * 2


def test_a_template_that_writes_the_answer_elsewhere_is_refused() -> None:
    tokenizer = arithmetic.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages | length }}"
    examples = data.load_demonstrations([{"prompt": [{"role": "user", "content": "1"}], "completion": "2"}])
    with pytest.raises(UserError, match="cannot write the answer of row 0: it does not begin as its prompt does"):
        data.encode_completions(examples, tokenizer)


def test_a_model_learns_its_demonstrations_and_any_method_goes_on(model: str, tmp_path: Path) -> None:
    more = SMALL | {"iterations": 60, "prompts_per_rollout": 32, "learning_rate": 1e-2, "evaluate_every": 30}
    run = pg.clone(model=model, dataset=ROWS, out=tmp_path / "run", **more)
    assert run.before.log_probability < -2
    assert run.after.log_probability > -1.5
    assert run.after.accuracy is None
    judged = [row["log_probability"] for row in run.metrics if "log_probability" in row]
    assert judged[0] == run.before.log_probability
    assert judged[-1] == run.after.log_probability
    assert run.after.decisions == sum(len(x) + 1 for x in run.world.prompts.held_out.columns["completion"])
    loaded = pg.load(tmp_path / "run")
    assert torch.equal(parameters(loaded), parameters(run))
    with pytest.raises(UserError, match="nothing judges the completions of this run: give reward"):
        loaded.evaluate(1)
    assert pg.Run.load(tmp_path / "run", reward=("exact_match",)).evaluate(1).prompts == 4
    options = SMALL | {"completions": 2, "reward": "exact_match", "dataset": ROWS}
    with pg.Training("grpo", start=tmp_path / "run", **{x: y for x, y in options.items() if x != "progress"}) as after:
        assert torch.equal(parameters(after.run), parameters(run))


def test_an_adapter_is_cloned_into(model: str, tmp_path: Path) -> None:
    run = pg.clone(model=model, dataset=ROWS, lora_rank=2, out=tmp_path / "run", **SMALL)
    trained = [name for name, p in run.policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    assert run.options.learning_rate == 1e-4


def test_the_rate_of_a_whole_model_is_its_own(model: str) -> None:
    assert pg.clone(model=model, dataset=ROWS, **SMALL).options.learning_rate == 1e-5


def test_a_run_that_was_stopped_goes_on_bit_for_bit(model: str, tmp_path: Path) -> None:
    options: dict[str, Any] = SMALL | {"model": model, "dataset": ROWS, "checkpoint_every": 1, "learning_rate": 1e-3}
    whole = pg.clone(out=tmp_path / "whole", **(options | {"iterations": 4}))
    pg.clone(out=tmp_path / "part", **options)
    again = pg.resume(tmp_path / "part", iterations=2, dataset=ROWS, model=model, progress=False)
    assert torch.equal(parameters(whole), parameters(again))
    last, its = untimed(whole.metrics)[-1], untimed(again.metrics)[-1]
    assert last == its


def test_the_arithmetic_task_has_demonstrations_of_its_own() -> None:
    options = SMALL | {"max_tokens": 40}
    run = pg.clone("arithmetic", **options)
    assert run.metrics[-1]["completions"] == 8
    assert run.evaluate(1).prompts == 4


def test_micro_batches_have_the_same_gradient(model: str) -> None:
    options: dict[str, Any] = SMALL | {"learning_rate": 1e-3, "optimizer": "sgd"}
    whole, parts = (parameters(pg.clone(model=model, dataset=ROWS, **options, micro_batch=x)) for x in (None, 1))
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


WRONG: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
    ([{"prompt": "1", "answer": "2"}], {}, "row 0 has no column 'completion' or 'messages', only prompt, answer"),
    ([{"completion": "1"}], {}, "row 0 has no prompt"),
    ([{"prompt": "1", "completion": 2}], {}, "completion of row 0 is 2"),
    ([{"prompt": "1", "completion": [{"role": "assistant", "content": "2"}]}], {}, "a prompt of text and a comp"),
    ([{"prompt": [{"role": "user", "content": "1"}], "completion": [{"role": "user", "content": "2"}]}], {},
     "the completion of row 0 is not one message of the assistant"),
    ([{"messages": [{"role": "user", "content": "1"}]}], {}, "messages of row 0 do not end with an answer"),
    ([{"messages": "1"}], {}, "messages of row 0 do not end with an answer"),
    ([{"prompt": "1+1=", "completion": "123456789"}] * 8, {},
     "8 of 8 completions are longer than 8 tokens, the first in row 0 with 10: raise max_tokens, or set long_prompts"),
    ([{"prompt": "1", "completion": "2"}], {}, "cannot be held out"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "said"), WRONG)
def test_bad_rows_are_one_line(rows: Any, options: dict[str, Any], said: str, model: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        pg.clone(model=model, dataset=rows, **SMALL, **options)
    assert len(str(raised.value)) <= 200


def test_long_completions_can_be_left_out(model: str) -> None:
    rows = [*ROWS, {"prompt": "1+1=", "completion": "123456789"}]
    run = pg.clone(model=model, dataset=rows, long_prompts="drop", **SMALL)
    assert run.world.notes(run) == ["1 of 81 prompts were too long and were left out"]


def test_transitions_are_for_control_and_engines_for_sampling(model: str) -> None:
    with pytest.raises(OptionError, match="demonstrations' on language: it is for control"):
        pg.clone("arithmetic", "x.jsonl", **SMALL)
    with pytest.raises(UserError, match="give model alone"):
        pg.clone(model=model, dataset=ROWS, engine=print, **SMALL)
    with pytest.raises(OptionError, match="there is no model to train on"):
        pg.clone(dataset=ROWS, **SMALL)
    with pytest.raises(OptionError, match="minibatch_size is 5, and a rollout has prompts_per_rollout = 4"):
        pg.clone(model=model, dataset=ROWS, minibatch_size=5, **SMALL)
