"""The sampler of completions: what a rollout holds, who is in a group, where the reward stands, and how it goes on."""

import io
import math
import statistics
from collections import Counter
from copy import copy, deepcopy
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from language.conftest import TOOL, gradients, one_by_one, with_tool
from policygrad.advantages import leave_one_out
from policygrad.credit import grouped
from policygrad.divergences import AdaptiveCoefficient
from policygrad.errors import UserError
from policygrad.language import arithmetic
from policygrad.language.completions import Completions, Engine, Request
from policygrad.language.data import left_padded, openings
from policygrad.language.generation import generate
from policygrad.language.policies import LanguagePolicy, Prefixes, ValueModel, reference_of
from policygrad.language.rewards import Rewards
from policygrad.language.sampler import CUTS, CompletionSampler, Prompts, answer, as_rollout, decoupled, request_of
from policygrad.language.tasks import prepared
from policygrad.rollout import Rollout, decisions
from policygrad.samplers import KLCharged, Rescored, WithoutFlatGroups
from policygrad.score import log_probabilities
from policygrad.train.compose import credit_of, objective_of
from policygrad.train.methods import METHODS
from policygrad.train.options import compares_groups, options_of
from policygrad.weights import per_budget, per_episode, per_row, per_token

TOKENIZER = arithmetic.tokenizer()
PAD, END = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
REQUEST = Request(completions=4, max_tokens=9, stop=(END,), pad=PAD)


PROBLEMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in [(5, 3), (99, 99), (1, 500), (70, 7), (8, 8)]]


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward of which hardly two are equal."""
    return [len(text) + sum(map(int, filter(str.isdigit, text))) / 100 for text in completions]


def made_policy(**options: Any) -> LanguagePolicy:
    """One that stops about once in nine tokens."""
    torch.manual_seed(0)
    model = arithmetic.model(hidden=16, layers=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else None
    return LanguagePolicy(model, temperature=1.2, **options)


def made(**options: Any) -> CompletionSampler:
    options = {"prompts": prepared(PROBLEMS, TOKENIZER), "judge": Rewards([digits]), "request": REQUEST} | options
    return CompletionSampler(tokenizer=TOKENIZER, **({"prompts_per_rollout": 3} | options))


def columns(rollout: Rollout) -> list[Tensor]:
    """Everything that a rollout holds."""
    found = [
        getattr(rollout, f.name) for f in fields(Rollout) if f.name not in ("obs", "metrics", "memoryless", "pieces")
    ]
    return [x for x in [*rollout.obs, *found] if x is not None]


def without_clock(rollout: Rollout) -> dict[str, float]:
    return {k: x for k, x in rollout.metrics.items() if k != "sampling_seconds"}


def equal(a: Rollout, b: Rollout) -> bool:
    return all(torch.equal(x, y) for x, y in zip(columns(a), columns(b), strict=True))


def test_a_rollout_holds_prompts_completions_and_what_they_are_worth() -> None:
    sampler, policy = made(), made_policy()
    rollout = sampler(policy)
    answers = sampler.last
    assert rollout.obs.prompt.shape == (12, 16), "the longest has 6 tokens"
    assert rollout.action.shape == rollout.logp.shape == rollout.reward.shape == rollout.mask.shape == (12, 9)
    assert torch.equal(rollout.action, rollout.obs.completion)
    assert torch.equal(rollout.mask, rollout.obs.completion_mask)
    assert torch.equal(rollout.action, answers.completions.tokens)
    assert rollout.final_obs is None
    assert rollout.importance is None
    assert not rollout.memoryless, "a token without its prefix is another state"
    for i, text in enumerate(answers.texts):
        length = int(rollout.mask[i].sum())
        assert rollout.mask[i].tolist() == [True] * length + [False] * (9 - length)
        assert rollout.reward[i].tolist() == [0] * (length - 1) + [answers.reward[i].item()] + [0] * (9 - length)
        assert rollout.terminated[i].nonzero().tolist() == [[length - 1]], "a cut completion terminates too"
        assert answers.reward[i].item() == pytest.approx(digits([text])[0])
    assert torch.equal(rollout.ended, rollout.terminated)
    assert answers.completions.cut.any()
    assert not answers.completions.cut.all()
    assert_close(log_probabilities(policy, rollout), rollout.logp, rtol=1e-5, atol=1e-5)
    assert_close(log_probabilities(policy, rollout, 5), rollout.logp, rtol=1e-5, atol=1e-5)


def test_the_completions_of_a_prompt_are_a_group() -> None:
    rollout = made()(made_policy())
    groups: dict[int, set[tuple[int, ...]]] = {}
    for number, prompt in zip(rollout.group.tolist(), rollout.obs.prompt.tolist(), strict=True):
        groups.setdefault(number, set()).add(tuple(prompt))
    assert [len(x) for x in groups.values()] == [1, 1, 1], "all rows of a group have one prompt"
    assert len(set.union(*groups.values())) == 3, "and each group its own"
    assert Counter(rollout.group.tolist()) == dict.fromkeys(groups, 4)


def test_a_text_has_neither_padding_nor_an_end() -> None:
    sampler = made()
    rollout = sampler(made_policy())
    for text, tokens, mask in zip(sampler.last.texts, rollout.action, rollout.mask, strict=True):
        kept = tokens[mask].tolist()
        expected = "".join(TOKENIZER.convert_ids_to_tokens([x for x in kept if x not in (PAD, END)]))
        assert text == expected
        assert "<" not in text


def test_prompts_are_kept_without_padding() -> None:
    """One long prompt costs its own length: 16,000 tokens among 4,000 prompts were 553 MB."""
    rows = [[2] * n for n in (3, 40, 1, 7)]
    prompts = Prompts.of("abcd", rows, {"answer": [0, 1, 2, 3]}, pad=PAD)
    assert len(prompts.tokens) == 51
    assert prompts.lengths.tolist() == [3, 40, 1, 7]
    some = prompts.take(torch.tensor([3, 0, 0]))
    assert (some.texts, some.columns, some.lengths.tolist()) == (["d", "a", "a"], {"answer": [3, 0, 0]}, [7, 3, 3])
    expected = left_padded([rows[3], rows[0], rows[0]], PAD, 16)
    assert all(torch.equal(x, y) for x, y in zip(some.padded(), expected, strict=True))
    assert [x.padded()[0].shape[1] for x in (prompts, prompts.take(torch.tensor([2])))] == [48, 16]


def test_a_rollout_is_as_wide_as_its_own_longest_prompt() -> None:
    numbers = {"prompt": "1" * 40 + "=", "answer": "1"}
    sampler, policy = made(prompts=prepared([*PROBLEMS, numbers], TOKENIZER), prompts_per_rollout=2), made_policy()
    rollouts = [sampler(policy) for _ in range(3)]
    assert sorted(x.obs.prompt.shape[1] for x in rollouts) == [16, 16, 48]
    joined = Rollout.join(rollouts)
    assert joined.obs.prompt.shape == (24, 48)
    assert_close(log_probabilities(policy, joined), joined.logp, rtol=1e-5, atol=1e-5)
    assert torch.equal(joined.action, torch.cat([x.action for x in rollouts]))


def test_data_sets_are_mixed_by_their_sizes_or_by_their_weights() -> None:
    sets = [0, 0, 0, 0, 0, 0, 1, 1, 2, 2]
    prompts = Prompts.of(list(range(10)), [[3]] * 10, {"answer": [""] * 10}, pad=PAD, origin=sets)

    def epochs(**options: Any) -> list[list[int]]:
        sampler = made(prompts=prompts, prompts_per_rollout=5, **options)
        seen = [x for _ in range(200) for x in sampler._next().texts]
        return [seen[i : i + 10] for i in range(0, len(seen), 10)]

    assert all(sorted(epoch) == list(range(10)) for epoch in epochs())
    weighted = epochs(dataset_weight=(0.5, 2.0, 2.5))
    for epoch in weighted:
        assert [sum(sets[x] == k for x in epoch) for k in range(3)] == [1, 4, 5]
        assert {6, 7, 8, 9} < set(epoch), "all of a small set come before one comes again"
    assert {x for epoch in weighted for x in epoch} == set(range(10)), "each of a large one comes in the end"
    uneven = epochs(dataset_weight=(1.0,) * 3)
    assert all(sorted(sum(sets[x] == k for x in epoch) for k in range(3)) == [3, 3, 4] for epoch in uneven)
    with pytest.raises(UserError, match=r"^a data set with a weight has no prompt to train on: hold out fewer"):
        made(prompts=prompts, dataset_weight=(1.0,) * 4)


def test_a_weighted_sampler_goes_on_bit_for_bit() -> None:
    prompts = Prompts.of(PROBLEMS, [[3]] * 5, {"answer": [""] * 5}, pad=PAD, origin=[0, 0, 0, 1, 1])
    first, again = (made(prompts=prompts, dataset_weight=(1.0, 3.0), seed=seed) for seed in (0, 9))
    first._next()
    again.load_state_dict(first.state_dict())
    assert [first._next().texts for _ in range(9)] == [again._next().texts for _ in range(9)]


def test_a_completion_that_ends_with_a_stop_text_is_not_cut() -> None:
    policy = made_policy()
    request = request_of(policy.model, TOKENIZER, 4, 9, stop_texts=("4", "12"))
    sampler, plain = made(request=request), made()
    rollout, whole = sampler(policy), plain(policy)
    stopped = 0
    for text, uncut, cut in zip(sampler.last.texts, plain.last.texts, sampler.last.completions.cut, strict=True):
        found = [uncut.index(x) + len(x) for x in ("4", "12") if x in uncut]
        assert text == uncut[: min(found, default=len(uncut))]
        assert not (found and cut)
        stopped += bool(found)
    assert stopped > 2
    assert_close(rollout.logp, whole.logp.where(rollout.mask, 0.0))  # of batches of other sizes: not to the bit
    assert sampler.last.completions.cut.any()


def test_the_shape_is_the_same_whatever_is_sampled() -> None:
    sampler, policy, shapes = made(prompts_per_rollout=1), made_policy(), set()
    lengths = set()
    for _ in range(10):
        rollout = sampler(policy)
        shapes.add(tuple(tuple(x.shape) for x in columns(rollout)))
        lengths |= {(int(rollout.obs.prompt_mask.sum(1).max()), int(rollout.mask.sum(1).max()))}
    assert len(shapes) == 1
    assert len(lengths) > 2


@pytest.mark.parametrize("per_rollout", [1, 2, 3, 5])
def test_each_prompt_comes_once_before_any_comes_again(per_rollout: int) -> None:
    sampler, policy = made(prompts_per_rollout=per_rollout), made_policy()
    seen = []
    for _ in range(10):
        sampler(policy)
        seen += sampler.last.prompts.texts[:: REQUEST.completions]
    everyone = {x["prompt"] for x in PROBLEMS}
    epochs = [seen[i : i + 5] for i in range(0, len(seen), 5)]
    assert all(set(epoch) == everyone for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1, "in another order each time"


def test_the_seed_decides_order_and_tokens() -> None:
    policy = made_policy()
    assert equal(made(seed=3)(policy), made(seed=3)(policy))
    assert not equal(made(seed=3)(policy), made(seed=4)(policy))
    orders = {tuple(x.prompts.texts) for seed in range(5) if (s := made(seed=seed))(policy) and (x := s.last)}
    assert len(orders) > 1


def cut_and_not(rollout: Rollout, sampler: CompletionSampler) -> tuple[Tensor, Tensor]:
    cut = sampler.last.completions.cut
    assert cut.any()
    assert not cut.all()
    return cut, rollout.obs.completion[cut]


def test_kept_a_cut_completion_is_rewarded_as_it_stands() -> None:
    sampler = made(cut="kept")
    rollout = sampler(made_policy())
    cut, tokens = cut_and_not(rollout, sampler)
    assert END not in tokens
    assert rollout.mask[cut].all()
    assert torch.equal(rollout.reward.sum(1), sampler.last.reward)


def test_penalized_it_is_rewarded_less() -> None:
    kept, less, policy = made(), made(cut="penalized", cut_penalty=2.5), made_policy()
    a, b = kept(policy), less(policy)
    cut, _ = cut_and_not(b, less)
    assert_close(a.reward.sum(1) - b.reward.sum(1), 2.5 * cut)
    assert torch.equal(a.reward != 0, b.reward != 0), "at the same token"
    assert torch.equal(a.mask, b.mask)
    assert a.metrics["reward"] == b.metrics["reward"], "what is reported is without it"


def test_masked_it_does_not_count_and_its_group_is_judged_without_it() -> None:
    sampler, policy = made(cut="masked", prompts_per_rollout=5), made_policy()
    rollout = sampler(policy)
    cut, _ = cut_and_not(rollout, sampler)
    assert not rollout.mask[cut].any()
    assert not rollout.obs.completion_mask[cut].any()
    assert rollout.mask[~cut].any(1).all()
    assert not rollout.reward[cut].any()
    assert not rollout.logp[cut].any()
    returns = rollout.reward.sum(1)
    advantage = returns - leave_one_out(returns, rollout.group)
    mixed = 0
    for i in (~cut).nonzero()[:, 0].tolist():
        others = [j for j in range(20) if j != i and j // 4 == i // 4 and not cut[j]]
        mixed += len(others) in (1, 2)
        expected = sampler.last.reward[others].mean() if others else torch.tensor(0.0)
        assert advantage[i] == pytest.approx((sampler.last.reward[i] - expected).item(), abs=1e-5)
    assert mixed, "there is a group with both"
    total = policy(rollout.obs).log_prob(rollout.action)[cut].sum()
    assert not gradients(total, policy).any()


GROUPED = [x for x in METHODS if compares_groups(options_of(x, "language")())]


@pytest.mark.parametrize("method", GROUPED)
@pytest.mark.parametrize("why", ["no reward applies", "cut"])
def test_what_does_not_count_leaves_the_credit_of_every_method(method: str, why: str) -> None:
    """Each advantage is that of a rollout without those rows, whatever it is compared with, group or batch."""

    def sparse(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 5 == 3 else 3.0 + x for i, x in enumerate(digits(completions))]

    judge = Rewards([sparse] if why == "no reward applies" else [digits])
    cut = "kept" if why == "no reward applies" else "masked"
    sampler = made(judge=judge, cut=cut, prompts_per_rollout=5, request=replace(REQUEST, max_tokens=24))
    policy = made_policy()
    rollout, options = sampler(policy), options_of(method, "language")()
    assign = credit_of(options, policy, None)
    keep = rollout.mask.any(1)
    assert 5 < int(keep.sum()) < 20
    found, wanted = assign(rollout).advantage[keep], assign(rollout.rows(keep.nonzero()[:, 0])).advantage
    mask = rollout.mask[keep]
    assert wanted.where(mask, 0.0).std() > 0
    assert_close(found.where(mask, 0.0), wanted.where(mask, 0.0), rtol=1e-4, atol=1e-5)


def test_what_becomes_of_a_cut_completion_has_three_names() -> None:
    with pytest.raises(UserError, match=r"^cut is 'mask': give kept, masked or penalized$"):
        made(cut="mask")


def test_too_few_prompts_are_said() -> None:
    made(prompts_per_rollout=5)
    with pytest.raises(UserError, match="5 prompts to train on, and a rollout takes 6"):
        made(prompts_per_rollout=6)


@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_sampler_is_stopped_and_goes_on_bit_for_bit(before: int) -> None:
    sampler, policy = made(prompts_per_rollout=2), made_policy()
    for _ in range(before):
        sampler(policy)
    file = io.BytesIO()
    state = sampler.state_dict()
    torch.save(state, file)
    expected = [sampler(policy) for _ in range(4)]
    file.seek(0)
    again = made(prompts_per_rollout=2, seed=99)
    again(policy)
    for kept in (torch.load(file), state):  # what is saved does not move with the sampler
        again.load_state_dict(kept)
        found = [again(policy) for _ in range(4)]
        assert all(map(equal, found, expected))
        assert list(map(without_clock, found)) == list(map(without_clock, expected))
    assert not equal(expected[0], expected[1])


def test_the_metrics_are_those_of_the_completions() -> None:
    def sparse(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 4 else 2.0 for i in range(len(completions))]

    def never(completions: list[str], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    sampler, policy = made(judge=Rewards([digits, sparse, never], [1.0, 0.5, 1.0])), made_policy()
    steps = 0
    for call in range(1, 4):
        rollout = sampler(policy)
        metrics, scores = rollout.metrics, rollout.reward.sum(1)
        steps += int(rollout.mask.sum())
        assert metrics["reward"] == pytest.approx(scores.mean().item())
        assert metrics["reward_std"] == pytest.approx(scores.std(correction=0).item(), rel=1e-5)
        assert metrics["length"] == pytest.approx(rollout.mask.sum(1).double().mean().item())
        assert metrics["cut_fraction"] == pytest.approx((~(rollout.action == END).any(1)).double().mean().item())
        assert metrics["reward/digits"] == pytest.approx(sum(digits(sampler.last.texts)) / 12)
        assert metrics["reward/sparse"] == 2
        assert "reward/never" not in metrics
        assert (metrics["steps"], metrics["completions"]) == (steps, 12 * call)
        assert metrics["epoch"] == pytest.approx(3 * call / 5)
        assert 0 < metrics["sampling_seconds"] < 60
    assert not any("/" in name for name in made()(policy).metrics), "one reward function is the reward"


def test_the_judge_is_given_everything_about_a_completion() -> None:
    given: dict[str, list[Any]] = {}

    def reward(**columns: list[Any]) -> list[float]:
        given.update(columns)
        return [0.0] * len(columns["completions"])

    rollout = made(judge=Rewards([reward]))(made_policy())
    columns = {"prompts", "completions", "answer", "completion_ids", "completion_mask", "completions_raw", "cut"}
    assert set(given) == columns
    sums = {x["prompt"]: x["answer"] for x in PROBLEMS}
    assert given["answer"] == [sums[prompt] for prompt in given["prompts"]]
    assert given["completion_ids"] == [x[m].tolist() for x, m in zip(rollout.action, rollout.mask, strict=True)]
    assert given["cut"] == [END not in ids for ids in given["completion_ids"]]
    assert given["completions"] == TOKENIZER.batch_decode(given["completion_ids"], skip_special_tokens=True)
    assert given["completions_raw"] == TOKENIZER.batch_decode(given["completion_ids"])
    assert any(text.endswith("<eos>") for text in given["completions_raw"])


def test_a_conversation_is_answered_by_the_assistant() -> None:
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    examples = [{"prompt": [{"role": "user", "content": x["prompt"]}], "answer": x["answer"]} for x in PROBLEMS]
    given: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        given.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(completions)

    sampler = made(prompts=prepared(examples, tokenizer), judge=Rewards([reward]))
    rollout = sampler(made_policy())
    assert equal(replace(rollout, reward=0 * rollout.reward), made(judge=Rewards([no_reward]))(made_policy()))
    for (prompt, completion), text in zip(given, sampler.last.texts, strict=True):
        assert prompt in [x["prompt"] for x in examples]
        assert completion == [{"role": "assistant", "content": text}]


HEADED = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>"
)


@pytest.mark.parametrize("opening", ["", "<think>\n", "<think></think>"])
def test_the_raw_text_has_what_the_template_wrote_into_the_turn(opening: str) -> None:
    tokenizer = deepcopy(TOKENIZER)
    tokenizer.chat_template = HEADED + opening + "{% endif %}"
    question = [{"role": "user", "content": "1+1="}]
    prompts: list[Any] = [question, "1+1=", [*question, {"role": "assistant", "content": "2"}], question]
    assert openings([{"prompt": x} for x in prompts], tokenizer) == [opening, "", "", opening]
    given: list[str] = []

    def reward(completions_raw: list[str], completion_ids: list[list[int]]) -> list[float]:
        given.extend(completions_raw)
        assert completions_raw == [opening + text for text in tokenizer.batch_decode(completion_ids)]
        return [0.0] * len(completions_raw)

    examples = [{"prompt": [{"role": "user", "content": x["prompt"]}]} for x in PROBLEMS]
    sampler = made(prompts=prepared(examples, tokenizer), judge=Rewards([reward]))
    sampler.tokenizer = tokenizer
    sampler(made_policy())
    assert len(given) == 12


# Rows without a reward.


def some(completions: list[str], **_: Any) -> list[float | None]:
    """None for about a third."""
    return [None if len(text) % 3 == 0 else x for text, x in zip(completions, digits(completions), strict=True)]


@pytest.mark.parametrize("cut", CUTS)
def test_a_row_without_a_reward_leaves_group_statistics_and_update(cut: str) -> None:
    options = {"judge": Rewards([some]), "request": replace(REQUEST, max_tokens=20), "prompts_per_rollout": 5}
    policy, sampler = made_policy(), made(**options, cut=cut, cut_penalty=0.5)
    rollout, done = sampler(policy), sampler.last.completions
    reward = sampler.last.reward
    none = reward.isnan()
    assert 0 < none.sum() < 20
    out = none | done.cut if cut == "masked" else none
    assert not rollout.mask[out].any()
    assert rollout.mask[~out].any(1).all()
    assert rollout.reward.isfinite().all()
    for i in range(20):
        same = (rollout.group == rollout.group[i]).nonzero()[:, 0].tolist()
        assert same == ([i] if out[i] else [j for j in range(20) if j // 4 == i // 4 and not out[j]])
    kept = rollout.rows((~out).nonzero()[:, 0])
    for average in (per_token, per_row, per_episode, per_budget):
        assert_close(average(rollout.mask)[~out], average(kept.mask))
    assert_close(grouped()(rollout).advantage[~out], grouped()(kept).advantage)
    metrics, judged = rollout.metrics, reward[~none].double()
    assert metrics["unjudged"] == pytest.approx(none.double().mean().item())
    assert metrics["masked"] == pytest.approx(out.double().mean().item())
    assert metrics["reward"] == pytest.approx(judged.mean().item())
    assert metrics["reward_std"] == pytest.approx(judged.std(correction=0).item())
    groups = [reward[[j for j in range(i, i + 4) if not out[j]]].double() for i in range(0, 20, 4)]
    spread = [x.std(correction=0).item() for x in groups if len(x)]
    assert metrics["group_std"] == pytest.approx(sum(spread) / len(spread))
    assert metrics["flat_groups"] == pytest.approx(sum(x == 0 for x in spread) / len(spread))
    assert [row["reward"] is None for row in sampler.last.rows()] == none.tolist()


def test_a_rollout_without_any_reward_is_refused() -> None:
    def never(completions: list[str], **_: Any) -> list[None]:
        return [None] * len(completions)

    with pytest.raises(UserError) as caught:
        made(judge=Rewards([never, never]))(made_policy())
    assert str(caught.value) == (
        "no reward applies to any of 12 completions: never, never-2 returned None for each; give the examples what it "
        "reads, such as `answer`, or another reward"
    )


def test_completions_that_repeat_their_prompt_are_counted() -> None:
    """An engine that answers two of four with the prompt."""

    def engine(policy: Any, prompt: Tensor, mask: Tensor, request: Request, generator: Any) -> Completions:
        done = generate(policy, prompt, mask, request, generator)
        tokens, kept = done.tokens.clone(), done.mask.clone()
        for i in range(0, len(tokens), 2):
            row = prompt[i // 4][mask[i // 4]]
            tokens[i], kept[i] = PAD, False
            tokens[i, : len(row)], kept[i, : len(row)] = row, True
        return replace(done, tokens=tokens, mask=kept)

    assert made(engine=engine)(made_policy()).metrics["prompt_repeats"] == 0.5
    assert made()(made_policy()).metrics["prompt_repeats"] == 0


def no_reward(completions: list[str], **_: Any) -> list[float]:
    return [0.0] * len(completions)


def test_answers_are_a_table() -> None:
    def half(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    sampler = made(judge=Rewards([digits, half]))
    rollout = sampler(made_policy())
    rows = sampler.last.rows()
    assert len(rows) == 12
    assert set(rows[0]) == {"prompt", "completion", "reward", "tokens", "cut", "digits", "half", "answer"}
    for i, row in enumerate(rows):
        assert row["tokens"] == rollout.mask[i].sum()
        assert row["reward"] == pytest.approx(rollout.reward[i].sum().item())
        assert (row["half"] is None) == bool(i % 2)
        assert row["cut"] == (END not in rollout.action[i])
    assert sampler.last.rows(2) == rows[:2]


def test_every_prompt_is_answered_greedily_for_an_evaluation() -> None:
    policy, prompts = made_policy(), prepared(PROBLEMS, TOKENIZER)
    request = replace(REQUEST, completions=1, greedy=True)
    found = [
        answer(policy, prompts, request, TOKENIZER, Rewards([digits]), torch.Generator().manual_seed(seed))
        for seed in range(2)
    ]
    assert found[0].prompts.texts == [x["prompt"] for x in PROBLEMS]
    assert found[0].texts == found[1].texts


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_that_an_engine_inserts_are_text_and_no_decisions(cut: str) -> None:
    given: dict[str, list[Any]] = {}

    def reward(**columns: list[Any]) -> list[float]:
        given.update(columns)
        return [1.0 + len(text) for text in columns["completions"]]

    policy = made_policy()
    sampler = made(
        engine=with_tool, judge=Rewards([reward]), cut=cut, cut_penalty=0.5, request=replace(REQUEST, max_tokens=10)
    )
    rollout = sampler(policy)
    answers = sampler.last
    done, width = answers.completions, rollout.mask.shape[1]
    counts = ~done.cut if cut == "masked" else torch.ones_like(done.cut)
    assert torch.equal(rollout.mask, done.mask & counts.unsqueeze(1))
    assert not rollout.memoryless
    assert done.cut.any()
    assert not done.cut.all()
    assert_close(rollout.logp, one_by_one(policy.model, rollout.obs, policy.temperature), rtol=1e-5, atol=1e-5)
    for micro_batch in (None, 5):
        assert_close(log_probabilities(policy, rollout, micro_batch), rollout.logp, rtol=1e-5, atol=1e-5)
    trailing = 0
    for i in range(len(rollout.mask)):
        last = int(done.mask[i].nonzero().max())
        assert rollout.terminated[i].nonzero().tolist() == [[last]]
        worth = answers.reward[i] - 0.5 * (cut == "penalized") * done.cut[i]
        assert rollout.reward[i].tolist() == [worth * counts[i] if t == last else 0 for t in range(width)]
        assert given["completion_ids"][i] == done.tokens[i, : last + 1].tolist()
        assert given["completions"][i] == TOKENIZER.decode(done.tokens[i, : last + 1], skip_special_tokens=True)
        assert answers.rows()[i]["tokens"] == done.mask[i].sum()
        assert not bool(done.mask[i].all())
        trailing += last < width - 1 and bool(done.cut[i])
    assert trailing, "there is a completion that was cut in the midst of inserted tokens"
    assert any(TOOL in ids for ids in given["completion_ids"])
    assert torch.equal(rollout.ended, rollout.terminated)
    assert rollout.metrics["steps"] == done.mask.sum()
    assert rollout.metrics["length"] == pytest.approx(done.mask.sum(1).double().mean().item())
    total, expected = (
        x.sum() for x in (policy(rollout.obs).log_prob(rollout.action), one_by_one(policy.model, rollout.obs, 1.2))
    )
    assert_close(gradients(total, policy), gradients(expected, policy), rtol=1e-3, atol=1e-4)


def test_an_engine_without_a_decision_in_a_row_gives_a_row_that_does_not_count() -> None:
    def engine(*arguments: Any) -> Completions:
        done = generate(*arguments)
        rows = torch.arange(len(done.mask)).unsqueeze(1) > 0
        return replace(done, mask=done.mask & rows, logp=done.logp * rows)

    sampler = made(engine=engine)
    rollout = sampler(made_policy())
    assert sampler.last.texts[0] == ""
    assert not rollout.mask[0].any()
    assert not rollout.reward[0].any()
    assert not rollout.ended[0].any()
    assert rollout.reward[1:].any(1).all()


def perturbed(by: float) -> Engine:
    """An engine whose log-probabilities are off."""

    def engine(policy: LanguagePolicy, prompt: Tensor, mask: Tensor, request: Request, generator: Any) -> Completions:
        done = generate(policy, prompt, mask, request, generator)
        return replace(done, logp=done.logp + by * torch.randn_like(done.logp))

    return engine


def test_an_engine_with_other_log_probabilities_is_corrected_for() -> None:
    policy = made_policy()
    plain, off = made(engine=perturbed(0.5)), Rescored(made(engine=perturbed(0.5)), bound=1.2)
    torch.manual_seed(1)
    theirs = plain(policy)
    torch.manual_seed(1)
    rollout = off(policy)
    mask, ours = rollout.mask, log_probabilities(policy, rollout)
    assert_close(rollout.logp, ours)
    assert not torch.allclose(theirs.logp, ours, atol=0.1)
    ratio = (ours - theirs.logp).exp()
    assert_close(rollout.importance[mask], ratio[mask].clamp(max=1.2))
    assert not rollout.importance[~mask].any()
    assert (rollout.importance[mask] < 0.9).any()
    assert rollout.metrics["importance_cut"] == pytest.approx((ratio[mask] > 1.2).double().mean().item())
    assert rollout.metrics["mismatch_ratio"] == pytest.approx(ratio[mask].mean().item(), rel=1e-5)
    assert rollout.metrics["mismatch_largest"] == pytest.approx(ratio[mask].max().item(), rel=1e-5)
    assert rollout.metrics["mismatch_kl"] == pytest.approx((ratio - 1 - ratio.log())[mask].mean().item(), rel=1e-4)


def test_the_engine_at_hand_needs_no_correction() -> None:
    policy = made_policy()
    rollout = Rescored(made(), bound=2.0)(policy)
    assert rollout.metrics["mismatch_kl"] < 1e-9
    assert rollout.metrics["mismatch_ratio"] == pytest.approx(1, abs=1e-5)
    assert rollout.metrics["importance_cut"] == 0
    assert_close(rollout.importance[rollout.mask], torch.ones(int(rollout.mask.sum())), rtol=1e-5, atol=1e-5)


class Bfloat16Engine:
    """Another engine, which holds the weights in bfloat16 and brings them up to date at every call."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.copy = deepcopy(policy).to(torch.bfloat16)

    def __call__(self, policy: LanguagePolicy, *arguments: Any) -> Completions:
        self.copy.load_state_dict(policy.state_dict())
        return generate(self.copy, *arguments)


def test_an_engine_in_bfloat16_is_a_little_off_and_follows_the_policy() -> None:
    policy = made_policy()
    sample = Rescored(made(engine=Bfloat16Engine(policy), prompts_per_rollout=5), bound=2.0)
    first = sample(policy)
    assert 1e-8 < first.metrics["mismatch_kl"] < 1e-2
    assert first.metrics["mismatch_ratio"] == pytest.approx(1, abs=0.05)
    assert (first.importance[first.mask] != 1).any()
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.2 * torch.randn_like(p))
    assert sample(policy).metrics["mismatch_kl"] < 1e-2
    stale = Rescored(made(engine=lambda _, *rest: generate(made_policy(), *rest)), bound=2.0)
    assert stale(policy).metrics["mismatch_kl"] > 0.05, "one that does not follow is seen"


@pytest.mark.parametrize("column", ["tokens", "logp", "mask", "cut"])
@pytest.mark.parametrize("wrong", [lambda x: x[:-1], lambda x: x[:, :-1] if x.dim() == 2 else x.unsqueeze(1)])
def test_an_engine_that_returns_other_shapes_is_told(column: str, wrong: Any) -> None:
    def engine(*arguments: Any) -> Completions:
        done = copy(generate(*arguments))
        vars(done)[column] = wrong(vars(done)[column])  # replace() would check, in a test run
        return done

    wanted = r"\(12,\)" if column == "cut" else r"\(12, 9\)"
    with pytest.raises(UserError, match=rf"the engine returned {column} of shape \(1[12],.*\): return {wanted}"):
        made(engine=engine)(made_policy())


def test_what_an_engine_leaves_behind_the_mask_changes_nothing() -> None:
    def engine(*arguments: Any) -> Completions:
        done = generate(*arguments)
        return replace(done, tokens=done.tokens.where(done.mask, 7), logp=done.logp.where(done.mask, math.nan))

    policy = made_policy()
    clean, spoiled = made()(policy), made(engine=engine)(policy)
    assert without_clock(clean) == without_clock(spoiled)
    assert torch.equal(clean.logp, spoiled.logp)
    assert torch.equal(clean.reward, spoiled.reward)
    assert_close(log_probabilities(policy, spoiled), log_probabilities(policy, clean), rtol=1e-6, atol=1e-6)


def test_the_wrappers_of_control_serve_here_too() -> None:
    policy = made_policy()
    reference = reference_of(policy)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p))
    plain = made()(policy)
    charged = KLCharged(made(), reference, AdaptiveCoefficient(0.5))(policy)
    expected = plain.reward - 0.5 * (plain.logp - log_probabilities(reference, plain))
    assert_close(charged.reward, expected.where(plain.mask, 0.0), rtol=1e-5, atol=1e-5)
    assert charged.metrics["kl_ref"] > 0

    def first_is_8(completions: list[str], **_: Any) -> list[float]:
        return [float(text.startswith("8")) for text in completions]

    rollouts = [
        WithoutFlatGroups(made(judge=Rewards([first_is_8]), prompts_per_rollout=1, seed=seed), rounds=100)(policy)
        for seed in range(2)
    ]
    assert all(0 < x.reward.sum() < 4 for x in rollouts)
    assert max(x.metrics["sampling_rounds"] for x in rollouts) > 1
    assert rollouts[0].obs.prompt.shape == plain.obs.prompt[:4].shape


def test_a_rollout_is_moved_whole() -> None:
    rollout = made()(made_policy())
    moved = rollout.to("meta")
    assert {x.device.type for x in columns(moved)} == {"meta"}


def test_rows_of_a_table_keep_their_order_in_a_rollout() -> None:
    sampler = made()
    sampler(made_policy())
    rollout = as_rollout(sampler.last, 4, "kept", 0.0, {})
    assert rollout.metrics == {}
    assert torch.equal(rollout.reward.sum(1), sampler.last.reward)


# Several rewards


def test_each_reward_is_standardized_in_its_group_before_they_are_added() -> None:
    """Number by number; a reward that is NaN, or that all of a group share, adds nothing."""
    nan = float("nan")
    parts = torch.tensor([[0.0, 100.0], [1.0, 300.0], [1.0, 200.0], [0.3, nan], [0.3, 5.0], [0.3, 7.0], [nan, nan],
                          [2.0, nan], [5.0, nan]])  # fmt: skip
    weights, wanted = (2.0, 0.5), []
    for first in (0, 3, 6):
        rows = parts[first : first + 3].tolist()
        for row in rows:
            known = [k for k in (0, 1) if not math.isnan(row[k])]
            total = 0.0
            for k in known:
                others = [x[k] for x in rows if not math.isnan(x[k])]
                spread = statistics.stdev(others) if len(others) > 1 else 0.0
                total += weights[k] * (row[k] - statistics.mean(others)) / spread if spread > 1e-9 else 0.0
            wanted.append(total if known else nan)
    assert_close(decoupled(parts, torch.tensor(weights), 3), torch.tensor(wanted), equal_nan=True)
    assert decoupled(parts, torch.tensor(weights), 3)[3] == 0


def test_decoupled_rewards_leave_out_what_does_not_count() -> None:
    """The group's mean and deviation are of the completions that count, as elsewhere."""

    def lengths(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    request = replace(REQUEST, max_tokens=24)
    sampler = made(judge=Rewards([lengths, digits]), cut="masked", decouple_rewards=True, request=request)
    rollout = sampler(made_policy())
    cut, parts = sampler.last.completions.cut, sampler.last.parts
    mixed = 0
    for i in (~cut).nonzero()[:, 0].tolist():
        others = [j for j in range(12) if j // 4 == i // 4 and not cut[j]]
        mixed += 1 < len(others) < 4
        wanted = 0.0
        for part in parts.values():
            known = part[others].tolist()
            spread = statistics.stdev(known) if len(known) > 1 else 0.0
            wanted += (part[i].item() - statistics.mean(known)) / spread if spread else 0.0
        assert rollout.reward[i].sum().item() == pytest.approx(wanted, abs=1e-5)
    assert mixed, "there is a group with both"


def test_decoupled_rewards_are_learned_from_and_the_metrics_are_of_those_there_were() -> None:
    def large(completions: list[str], **_: Any) -> list[float]:
        return [1000.0 * len(text) for text in completions]

    def small(completions: list[str], **_: Any) -> list[float]:
        return [float(text.count("1")) for text in completions]

    policy = made_policy()
    judge = Rewards([large, small], [1.0, 2.0])
    plain, apart = (made(judge=judge, decouple_rewards=x)(policy) for x in (False, True))
    assert without_clock(plain) == without_clock(apart)
    size = int((plain.group == plain.group[0]).sum())
    reward = apart.reward.sum(1)
    assert reward.abs().max() < 3 * math.sqrt(size)
    assert_close(reward.view(-1, size).mean(1), torch.zeros(len(reward) // size), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", CUTS)
def test_the_greedy_return_is_the_reward_of_each_prompts_most_likely_completion(cut: str) -> None:
    policy, plain = made_policy(), made(cut=cut)(made_policy())
    rollout = made(cut=cut, greedy=True)(policy)
    assert plain.greedy is None
    assert torch.equal(plain.action, rollout.action), "what is sampled is as it was"
    once = replace(REQUEST, completions=1, greedy=True)
    wanted = []
    for i in range(0, 12, 4):
        prompt, mask = rollout.obs.prompt[i : i + 1], rollout.obs.prompt_mask[i : i + 1]
        done = generate(policy, prompt, mask, once, torch.Generator())
        text = TOKENIZER.batch_decode(done.ids(), skip_special_tokens=True)
        of_cut = bool(done.cut[0])
        worth = digits(text)[0] - (of_cut and cut == "penalized")
        wanted += [0.0 if of_cut and cut == "masked" else worth] * 4
    assert rollout.greedy.tolist() == pytest.approx(wanted)
    assert "greedy_reward" in rollout.metrics


# Rewards by token


def by_token(completion_ids: list[list[int]], **_: Any) -> list[list[float] | None]:
    """Another number at each token, and none for every fifth completion."""
    return [
        None if i % 5 == 3 else [1 + token / 100 + t / 7 for t, token in enumerate(ids)]
        for i, ids in enumerate(completion_ids)
    ]


@pytest.mark.parametrize("cut", CUTS)
def test_a_reward_by_token_stands_at_its_token(cut: str) -> None:
    """In scalar loops: 2 times the one by token, 0.5 times the one of the whole at the last, and what a cut costs."""
    judge = Rewards([by_token, digits], [2.0, 0.5])
    sampler = made(judge=judge, cut=cut, cut_penalty=0.25, prompts_per_rollout=5)
    rollout = sampler(made_policy())
    assert sampler.last is not None
    done = sampler.last.completions
    ids = done.ids()
    each, whole = by_token(ids), digits(sampler.last.texts)
    totals = []
    for i, tokens in enumerate(ids):
        wanted = [2 * x for x in each[i] or [0.0] * len(tokens)]
        wanted[-1] += 0.5 * whole[i]
        totals.append(sum(wanted))
        wanted[-1] -= 0.25 * (cut == "penalized" and bool(done.cut[i]))
        if cut == "masked" and done.cut[i]:
            wanted = [0.0] * len(tokens)
        assert rollout.reward[i].tolist() == pytest.approx(wanted + [0.0] * (9 - len(tokens)), abs=1e-5)
    assert sampler.last.reward.tolist() == pytest.approx(totals, rel=1e-5)
    sums = [math.nan if x is None else sum(x) for x in each]
    assert sampler.last.parts["by_token"].tolist() == pytest.approx(sums, rel=1e-5, nan_ok=True)
    assert 0 < int(done.cut.sum()) < len(ids)
    later = [[sum(row[t:]) for t in range(9)] for row in rollout.reward.tolist()]
    options = options_of("reinforce", "language")(baseline="none")
    found = credit_of(options, made_policy(), None)(rollout).advantage
    assert_close(found.where(rollout.mask, 0.0), torch.tensor(later).where(rollout.mask, 0.0), rtol=1e-4, atol=1e-4)


def every_completion(length: int) -> list[list[int]]:
    """All that the tokenizer's words can say in `length` tokens, each up to its end-of-sequence token."""
    found: list[list[int]] = [[]]
    for _ in range(length):
        found = [[*x, y] for x in found if x[-1:] != [END] for y in range(len(TOKENIZER))] + [
            x for x in found if x[-1:] == [END]
        ]
    return found


@pytest.mark.parametrize(
    "values",
    [
        {"baseline": "none"},
        {"baseline": "none", "credit": "trajectory_return", "discounted": False},
        {"method": "actor_critic", "lam": 1.0},
        {"method": "ppo", "lam": 1.0, "normalize_advantages": "none"},
    ],
    ids=["reward_to_go", "trajectory_return", "gae", "ppo"],
)
def test_rewards_by_token_and_gamma_expect_the_gradient_of_their_objective(values: dict[str, Any]) -> None:
    """E over all completions of two prompts, as judged and credited here, against J = E[sum_t gamma^t r_t], float64."""
    gamma, all_of = 0.9, every_completion(2)
    torch.manual_seed(0)
    size: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "eos_token_id": END}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(TOKENIZER), initializer_range=0.2, **size))
    policy = LanguagePolicy(model.double(), temperature=1.2)  # all of it: a Llama has its norms in float32
    critic = ValueModel(deepcopy(model.transformer)).double()

    def engine(policy: LanguagePolicy, prompt: Tensor, mask: Tensor, request: Request, _: Any) -> Completions:
        rows = [[*x, *[PAD] * (2 - len(x))] for x in all_of] * len(prompt)
        own = torch.tensor([[t < len(x) for t in range(2)] for x in all_of] * len(prompt))
        tokens, cut = torch.tensor(rows), torch.tensor([END not in x for x in all_of] * len(prompt))
        logp = policy(Prefixes(*(x.repeat_interleave(len(all_of), 0) for x in (prompt, mask)), tokens, own)).log_prob(
            tokens
        )
        return Completions(tokens, logp.detach().where(own, 0.0), own, cut)

    def paid(prompt: str, tokens: list[int], t: int) -> float:
        return ((7 * tokens[t] + 3 * sum(tokens[:t]) + 5 * t + len(prompt)) % 16) / 16  # exact in float32

    def judge(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[paid(x, y, t) for t in range(len(y))] for x, y in zip(prompts, completion_ids, strict=True)]

    request = replace(REQUEST, completions=len(all_of), max_tokens=2)
    prompts = prepared(PROBLEMS[:2], TOKENIZER)
    rollout = made(judge=Rewards([judge]), prompts=prompts, request=request, prompts_per_rollout=2, engine=engine)(
        policy
    )
    assert rollout.reward.dtype == torch.float64
    options = replace(options_of(values.get("method", "reinforce"), "language")(), gamma=gamma,
                      **{"discounted": True, **{x: y for x, y in values.items() if x != "method"}})  # fmt: skip
    batch = decisions(rollout, per_episode(rollout.mask), *credit_of(options, policy, critic)(rollout))
    probability = rollout.logp.sum(1).exp()
    assert probability.view(2, -1).sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    batch = batch._replace(weight=probability.unsqueeze(1) * rollout.mask / 2)
    objective = objective_of(options, policy, None, {}, None)
    found = torch.autograd.grad(objective(batch)[0], list(policy.parameters()))

    worth = [sum(gamma**t * paid(problem["prompt"], y, t) for t in range(len(y))) for problem in PROBLEMS[:2]
             for y in all_of]  # fmt: skip
    logp = policy(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0).sum(1)
    exact = torch.autograd.grad((logp.exp() * torch.tensor(worth, dtype=torch.float64)).sum() / 2,
                                list(policy.parameters()))  # fmt: skip
    for x, y in zip(found, exact, strict=True):
        assert_close(x, y, rtol=0, atol=1e-12)
    assert max(float(x.abs().max()) for x in exact) > 1e-3


def test_the_sum_of_rewards_by_token_is_what_groups_compare() -> None:
    def sums(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if x is None else sum(x) for x in by_token(completion_ids)]

    rollouts = [made(judge=Rewards([f]), prompts_per_rollout=5)(made_policy()) for f in (by_token, sums)]
    first, second = (grouped()(x).advantage.where(x.mask, 0.0) for x in rollouts)
    assert_close(first, second, rtol=1e-4, atol=1e-4)
    assert torch.equal(rollouts[0].mask, rollouts[1].mask), "what has no reward leaves"
    assert not torch.equal(rollouts[0].reward, rollouts[1].reward)
    both = [
        made(judge=Rewards([f]), prompts_per_rollout=5, decouple_rewards=True)(made_policy()) for f in (by_token, sums)
    ]
    assert_close(both[0].reward, both[1].reward, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda rows: [rows[0][:-1], *rows[1:]],
            "returned .* numbers for sample 0, of .* tokens: return a list with a",
        ),
        (
            lambda rows: [*rows[:2], 1.0, *rows[3:]],
            "returned 1.0 for sample 2, of .* tokens: return a list with a number",
        ),
        (
            lambda rows: [rows[0], [*rows[1][:-1], math.nan], *rows[2:]],
            "returned nan for token .* of sample 1: return a",
        ),
        (
            lambda rows: [["a"] * len(rows[0]), *rows[1:]],
            "returned 'a' for token 0 of sample 0: return a finite number",
        ),
        (lambda rows: [[None] * len(rows[0]), *rows[1:]], "returned None for a token of sample 0: return 0 there"),
    ],
)
def test_a_reward_by_token_has_a_number_for_each(change: Any, said: str) -> None:
    def wrong(completion_ids: list[list[int]], **_: Any) -> Any:
        return change([[0.5] * len(ids) for ids in completion_ids])

    with pytest.raises(UserError, match=said) as raised:
        made(judge=Rewards([wrong]))(made_policy())
    assert len(str(raised.value)) <= 200


def test_tensors_and_arrays_are_rewards_by_token_too() -> None:
    ids, texts = [[1, 2], [3, 4]], ["ab", "cd"]
    rows = [[0.5, 1.0], [2.0, 3.0]]
    for made_of in (torch.tensor, np.array, lambda x: [torch.tensor(y) for y in x], lambda x: [np.array(y) for y in x]):
        reward, parts = Rewards([lambda _made=made_of, **_: _made(rows)])(texts, texts, {"completion_ids": ids})
        assert (reward.tolist(), next(iter(parts.values())).tolist()) == (rows, [1.5, 5.0])


def test_what_the_policy_did_not_say_has_no_reward() -> None:
    def own(completion_ids: list[list[int]], completion_mask: list[list[bool]], **_: Any) -> list[list[float]]:
        return [[float(x) for x in row] for row in completion_mask]

    rollout = made(judge=Rewards([own]), engine=with_tool)(made_policy())
    assert torch.equal(rollout.reward, rollout.mask.float())
    assert any(0 in row.tolist()[: int(row.nonzero().max())] for row in rollout.mask.int()), "there are holes"

    def everywhere(completion_ids: list[list[int]], **_: Any) -> list[list[float]]:
        return [[1.0] * len(ids) for ids in completion_ids]

    with pytest.raises(UserError, match=r"a reward by token is 1 at token .* which is not the policy's") as raised:
        made(judge=Rewards([everywhere]), engine=with_tool)(made_policy())
    assert len(str(raised.value)) <= 200
