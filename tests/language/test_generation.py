"""Sampling: what is drawn has the model's distribution, and the log-probability that the learner gives it."""

import contextlib
from collections import Counter
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import MambaConfig, MambaForCausalLM
from transformers.cache_utils import DynamicLayer

from language.conftest import END, PAD, RECURRENT, SLIDING, VOCABULARY, every_architecture, prompts, tiny
from policygrad.errors import UserError
from policygrad.language import decoding, generation
from policygrad.language.completions import Completions, Request
from policygrad.language.decoding import inverse_transform
from policygrad.language.generation import check_memory, generate
from policygrad.language.models import add_adapter, checkpoint_gradients
from policygrad.language.policies import LanguagePolicy, Prefixes

STOP = (END, 5, 7)  # any of which ends a completion
LENGTHS = (2, 6, 1, 4)


def sampled(
    policy: LanguagePolicy, lengths: tuple[int, ...] = LENGTHS, seed: int = 0, **request: Any
) -> tuple[Completions, Prefixes]:
    """Completions of prompts of these lengths, and both as the learner sees them."""
    request = {"completions": 3, "max_tokens": 7, "stop": STOP, "pad": PAD} | request
    prompt, mask = prompts(*lengths)
    done = generate(policy, prompt, mask, Request(**request), torch.Generator().manual_seed(seed))
    prompt, mask = (x.repeat_interleave(request["completions"], 0) for x in (prompt, mask))
    return done, Prefixes(prompt, mask, done.tokens, done.mask)


def argmax_again_and_again(model: nn.Module, prompt: Tensor, max_tokens: int, stop: tuple[int, ...]) -> list[int]:
    """The likeliest continuation of one prompt, without padding and without a cache."""
    row: list[int] = []
    while len(row) < max_tokens and not (row and row[-1] in stop):
        tokens = torch.cat([prompt, torch.tensor(row, dtype=torch.long)]).unsqueeze(0)
        row.append(int(model(input_ids=tokens, use_cache=False).logits[0, -1].argmax()))
    return row


@every_architecture
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_log_probabilities_are_the_learners(name: str, temperature: float) -> None:
    policy = LanguagePolicy(tiny(name), temperature=temperature)
    done, obs = sampled(policy, completions=8)
    assert done.cut.any()
    assert not done.cut.all()
    assert_close(done.logp, policy(obs).log_prob(done.tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "neox", "phi", "falcon"])
def test_in_float64_they_agree_to_rounding(name: str) -> None:
    policy = LanguagePolicy(tiny(name, dtype=torch.float64), temperature=1.7)
    done, obs = sampled(policy)
    assert done.logp.dtype == torch.float64
    assert_close(done.logp, policy(obs).log_prob(done.tokens), rtol=0, atol=1e-10)


@every_architecture
def test_greedy_is_the_argmax_again_and_again_without_a_cache(name: str) -> None:
    model = tiny(name)
    policy = LanguagePolicy(model, temperature=1.7)
    done, obs = sampled(policy, greedy=True, completions=2, max_tokens=9)
    for i, (prompt, seen) in enumerate(zip(obs.prompt, obs.prompt_mask, strict=True)):
        row = argmax_again_and_again(model, prompt[seen], 9, STOP)
        assert done.tokens[i, : len(row)].tolist() == row
        assert done.mask[i].sum() == len(row)
    assert len({tuple(row) for row in done.tokens.tolist()}) > 2, "a prompt has its own answer"
    assert_close(done.logp, policy(obs).log_prob(done.tokens), rtol=1e-5, atol=1e-5)


def test_the_completions_of_a_prompt_stand_side_by_side() -> None:
    """Each row is likely after its own prompt, whatever the order of the prompts."""
    policy = LanguagePolicy(tiny(), temperature=0.5)
    prompt, mask = prompts(*LENGTHS)
    request = Request(3, 5, (), PAD)
    done = generate(policy, prompt, mask, request, torch.Generator().manual_seed(0))
    for own in range(4):
        repeated = [x.repeat_interleave(3, 0).roll(3 * own, 0) for x in (prompt, mask)]
        with torch.no_grad():
            logp = policy(Prefixes(*repeated, done.tokens, done.mask)).log_prob(done.tokens)
        assert torch.allclose(logp, done.logp, atol=1e-5) == (own == 0)


@every_architecture
def test_a_completion_stops_at_any_stop_token_and_only_there(name: str) -> None:
    done, _ = sampled(LanguagePolicy(tiny(name), temperature=3.0), completions=12)
    assert done.tokens.shape == done.logp.shape == done.mask.shape == (48, 7)
    lasts = set()
    for tokens, logp, mask, cut in zip(done.tokens.tolist(), done.logp, done.mask, done.cut.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(tokens) if token in STOP), 7)
        assert mask.tolist() == [True] * length + [False] * (7 - length), "the stop token is a decision too"
        assert tokens[length:] == [PAD] * (7 - length)
        assert not logp[length:].any()
        assert (logp[:length] < 0).all()
        assert cut == (tokens[length - 1] not in STOP)
        lasts |= {tokens[length - 1]} & set(STOP)
    assert lasts == set(STOP)
    assert done.cut.any()


def test_a_stop_token_at_the_very_limit_is_no_cut() -> None:
    done, _ = sampled(LanguagePolicy(tiny(), temperature=3.0), completions=200, max_tokens=2)
    at_limit = done.mask[:, 1] & torch.isin(done.tokens[:, 1], torch.tensor(STOP))
    assert at_limit.any()
    assert not done.cut[at_limit].any()
    assert done.cut[done.mask[:, 1] & ~at_limit].all()


def test_padding_that_is_a_stop_token_is_no_decision() -> None:
    """Where a tokenizer has no token for padding, the end of sequence stands for it."""
    policy = LanguagePolicy(tiny(), temperature=3.0)
    prompt, mask = prompts(*LENGTHS)
    padded, ended = (
        generate(policy, prompt, mask, Request(12, 7, STOP, pad), torch.Generator().manual_seed(0))
        for pad in (PAD, END)
    )
    assert not padded.mask.all()
    assert torch.equal(padded.mask, ended.mask)
    assert torch.equal(padded.tokens[padded.mask], ended.tokens[ended.mask])
    assert (ended.tokens[~ended.mask] == END).all()
    assert torch.equal(padded.cut, ended.cut)


def test_without_stop_tokens_every_completion_is_cut() -> None:
    done, _ = sampled(LanguagePolicy(tiny(), temperature=3.0), stop=())
    assert done.mask.all()
    assert done.cut.all()


def test_sampling_ends_once_all_rows_have_ended() -> None:
    model, calls = tiny(), []
    policy = LanguagePolicy(model)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: calls.append(tuple(x[0].shape)))
    done, _ = sampled(policy, stop=tuple(range(VOCABULARY)), max_tokens=50)
    assert calls == [(4, 6)]
    assert done.tokens.shape == (12, 50), "the shape is the same all the same"
    assert done.mask.sum(1).tolist() == [1] * 12
    assert not done.cut.any()


def test_each_prompt_is_read_once() -> None:
    model, calls = tiny(), []
    policy = LanguagePolicy(model)
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: calls.append(tuple(x[0].shape)))
    sampled(policy, stop=(), max_tokens=4)
    assert calls == [(4, 6)] + [(12, 1)] * 3


@every_architecture
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_keys_and_values_are_written_in_place_and_only_what_is_written_is_attended_to(
    name: str, autocast: torch.dtype | None
) -> None:
    model, seen = tiny(name), []
    policy = LanguagePolicy(model, autocast=autocast)
    own_ways = SLIDING | RECURRENT | {"gpt_neo"}

    def look(_: nn.Module, __: Any, inputs: dict[str, Any], ___: Any) -> None:
        layers = inputs["past_key_values"].layers
        attending = [x for x in layers if getattr(x, "keys", None) is not None]
        seen.append([(type(x), x.keys.data_ptr(), x.keys.shape) for x in attending])

    model.base_model.register_forward_hook(look, with_kwargs=True)
    sampled(policy, max_tokens=4, stop=())
    kinds = {kind for row in seen[1:] for kind, *_ in row}
    assert DynamicLayer not in kinds
    assert name in own_ways or kinds == {decoding.Roomy}
    for first, second, third in zip(*seen[1:], strict=True):
        if first[0] is decoding.Roomy:
            assert first[1] == second[1] == third[1]
            assert [x[2][-2] for x in (first, second, third)] == [7, 8, 9]
            assert first[2][0] == 12


@every_architecture
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_rows_that_have_ended_are_taken_out_and_nothing_else_changes(
    name: str, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Mixtral's experts have no float64, and Gemma 2's attention makes NaN of padding in it.
    exact = autocast is None and name not in {"mixtral", "gemma2"}
    model = tiny(name, dtype=torch.float64 if exact else torch.float32)
    policy, computed = LanguagePolicy(model, temperature=3.0, autocast=autocast), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: computed.append(len(x[0])))
    results = []
    for kept in (0.0, 3 / 4, 0.999):
        monkeypatch.setattr(decoding, "KEPT", kept)
        computed.clear()
        torch.manual_seed(0)  # the same prompts
        results.append((sampled(policy, completions=8, max_tokens=9, stop=range(END, END + 12))[0], computed[1:]))
    (whole, all_rows), (some, fewer), (each, fewest) = results
    alive = [int(column.sum()) for column in whole.mask.T[1:] if column.any()]
    assert all_rows == [32] * len(alive)
    assert fewest == alive
    assert all(count <= n < count / 0.75 + 1 for n, count in zip(fewer, alive, strict=True))
    assert len(set(fewer)) > 1
    for other in (some, each):
        assert torch.equal(whole.tokens, other.tokens)
        assert torch.equal(whole.mask, other.mask)
        assert torch.equal(whole.cut, other.cut)
        assert_close(whole.logp, other.logp, rtol=0, atol=1e-9 if exact else 1e-5 if autocast is None else 0.1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
def test_under_autocast_the_log_probabilities_are_near_the_learners(name: str) -> None:
    model = tiny(name)
    policy = LanguagePolicy(model, autocast=torch.bfloat16)
    done, obs = sampled(policy)
    assert done.logp.dtype == torch.float32
    gap = (done.logp - policy(obs).log_prob(done.tokens))[done.mask].abs()
    assert gap.max() < 0.2
    assert gap.mean() < 0.03
    exact = LanguagePolicy(model)(obs).log_prob(done.tokens)
    assert (done.logp - exact)[done.mask].abs().mean() > 1e-3, "it is computed in bfloat16"


def test_the_seed_of_the_generator_decides() -> None:
    policy = LanguagePolicy(tiny(), temperature=2.0)
    prompt, mask = prompts(*LENGTHS)
    before = torch.get_rng_state()

    def tokens(generator: torch.Generator) -> Tensor:
        return generate(policy, prompt, mask, Request(3, 7, STOP, PAD), generator).tokens

    generator = torch.Generator().manual_seed(3)
    first, second = tokens(generator), tokens(generator)
    assert torch.equal(first, tokens(torch.Generator().manual_seed(3)))
    assert not torch.equal(first, second), "the generator goes on"
    assert not torch.equal(first, tokens(torch.Generator().manual_seed(4)))
    assert torch.equal(before, torch.get_rng_state()), "and no other is used"


@pytest.mark.parametrize("greedy", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 12, 99])
def test_the_rows_sampled_at_a_time_change_no_sample(rows: int, greedy: bool) -> None:
    model, batches = tiny(dtype=torch.float64), []
    policy = LanguagePolicy(model, temperature=2.0)
    prompt, mask = prompts(*LENGTHS)
    request = Request(3, 7, STOP, PAD, greedy)
    whole = generate(policy, prompt, mask, request, torch.Generator().manual_seed(0))
    model.get_input_embeddings().register_forward_pre_hook(lambda _, x: batches.append(len(x[0])))
    parts = generate(policy, prompt, mask, replace(request, micro_batch=rows), torch.Generator().manual_seed(0))
    assert max(batches) <= rows
    assert torch.equal(whole.tokens, parts.tokens)
    assert torch.equal(whole.mask, parts.mask)
    assert torch.equal(whole.cut, parts.cut)
    assert_close(whole.logp, parts.logp, rtol=0, atol=1e-9)


def test_a_completion_ends_with_a_text_that_several_tokens_make() -> None:
    """The text is found in what the tokens say together, however long the completion is."""
    policy, letters = LanguagePolicy(tiny(), temperature=5.0), "abcdefghijklmnopqrstuvw"
    prompt, mask = prompts(*LENGTHS)

    def decode(rows: list[list[int]]) -> list[str]:
        return ["".join(letters[token] for token in row) for row in rows]

    def sample(*texts: str) -> Completions:
        request = Request(50, 60, (), PAD, stop_texts=texts, decode=decode)
        return generate(policy, prompt, mask, request, torch.Generator().manual_seed(0))

    free, stopped = sample(), sample("dd", "fgh", "w")
    early = late = 0
    for uncut, ids, cut in zip(decode(free.tokens.tolist()), stopped.ids(), stopped.cut.tolist(), strict=True):
        ends = [uncut.index(x) + len(x) for x in ("dd", "fgh", "w") if x in uncut]
        assert decode([ids]) == [uncut[: min(ends, default=60)]]
        assert cut == (not ends)
        early, late = early + (min(ends, default=0) == 2), late + (min(ends, default=0) > 20)
    assert early
    assert late
    assert stopped.cut.any()


@pytest.mark.parametrize(("completions", "max_tokens"), [(10**9, 7), (3, 10**9), (10**9, 10**9), (10**5, 10**5)])
def test_what_does_not_fit_in_memory_is_refused_before_it_is_made(completions: int, max_tokens: int) -> None:
    policy = LanguagePolicy(tiny())
    with pytest.raises(UserError) as caught:
        sampled(policy, completions=completions, max_tokens=max_tokens)
    assert str(caught.value).startswith(f"{4 * completions:,} completions of {max_tokens:,} tokens need ")
    assert str(caught.value).endswith("lower max_tokens, completions or micro_batch")
    assert len(str(caught.value)) <= 200


def test_the_keys_and_values_of_the_rows_at_a_time_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 layers of 2 heads of 4 numbers, keys and values, in float32: 128 bytes a token."""
    policy, request = LanguagePolicy(tiny()), Request(4, 10, (), PAD)
    rollout = 2 * 4 * 10 * generation.BYTES
    for rows, cache in ((None, 8 * 30 * 128), (3, 3 * 30 * 128)):
        for there, fits in ((rollout + cache, True), (rollout + cache - 1, False)):
            monkeypatch.setattr(generation, "memory_of", lambda device, there=there: there)
            with contextlib.nullcontext() if fits else pytest.raises(UserError):
                check_memory(policy, 2, 20, replace(request, micro_batch=rows))


def test_greedy_draws_nothing() -> None:
    prompt, mask = prompts(2)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    generate(LanguagePolicy(tiny()), prompt, mask, Request(1, 3, STOP, PAD, greedy=True), generator)
    assert torch.equal(before, generator.get_state())


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_completions_have_the_models_distribution(name: str, temperature: float) -> None:
    """Counts of all completions of up to two tokens of five, by a chi-square test, for two prompts in one batch."""
    model, count = tiny(name, vocab_size=5), 20_000
    policy = LanguagePolicy(model, temperature=temperature)
    prompt, mask = torch.tensor([[PAD, PAD, 3], [4, 2, 3]]), torch.tensor([[0, 0, 1], [1, 1, 1]]).bool()
    done = generate(policy, prompt, mask, Request(count, 2, (END,), PAD), torch.Generator().manual_seed(0))
    for i in range(2):
        given = prompt[i][mask[i]]

        def following(*tokens: int, given: Tensor = given) -> Tensor:
            with torch.no_grad():
                logits = model(input_ids=torch.cat([given, torch.tensor(tokens, dtype=torch.long)])[None]).logits
            return (logits[0, -1].double() / temperature).softmax(-1)

        first = following()
        expected = {(END, PAD): first[END].item()}
        for a, b in product([0, 2, 3, 4], range(5)):
            expected[(a, b)] = (first[a] * following(a)[b]).item()
        assert sum(expected.values()) == pytest.approx(1)
        found = Counter(map(tuple, done.tokens[i * count : (i + 1) * count].tolist()))
        assert set(found) <= set(expected)
        likely = {x: p for x, p in expected.items() if count * p >= 5}
        assert len(likely) > 8
        square = sum((found[x] - count * p) ** 2 / (count * p) for x, p in likely.items())
        assert square < len(likely) + 5 * (2 * len(likely)) ** 0.5, "chi-square, its mean and 5 standard deviations"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 400])
def test_the_inverse_transform_gives_every_token_its_share(size: int) -> None:
    """Of N numbers evenly spread, exactly N p_v fall to token v; in order."""
    share = torch.randint(0, 4, (3, size), generator=torch.Generator().manual_seed(size))
    share[:, size // 2] += 1
    for row in share:
        count = int(row.sum())
        uniform = (torch.arange(count) + 0.5) / count
        token = inverse_transform((row / count).float().expand(count, -1), uniform.double())
        assert token.tolist() == torch.arange(size).repeat_interleave(row).tolist()


def test_the_inverse_transform_at_its_ends_and_of_what_is_impossible_or_rare() -> None:
    p = torch.zeros(2, 1000)
    p[:, [3, 998]] = torch.tensor([1e-30, 1.0])
    largest = 1 - torch.finfo(torch.float64).eps / 2
    assert inverse_transform(p, torch.tensor([0.0, largest], dtype=torch.float64)).tolist() == [3, 998]
    rare = torch.full((4, 1000), 1.0)
    rare[:, 7] = 1e-9  # no float32 number lies in its share
    near = torch.tensor([6.9, 7 - 1e-12, 7 + 0.5e-9, 7 + 2e-9], dtype=torch.float64) / (999 + 1e-9)
    assert inverse_transform(rare, near).tolist() == [6, 6, 7, 8]
    for u in torch.rand(50, 1, dtype=torch.float64):
        assert inverse_transform(torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0]]), u).item() in (1, 3)


def test_the_inverse_transform_of_what_is_not_a_number_is_a_token_all_the_same() -> None:
    """It is for the learner to stop at; an index beyond the vocabulary would end the process on a GPU."""
    token = inverse_transform(torch.full((2, 10), torch.nan), torch.tensor([0.0, 0.9], dtype=torch.float64))
    assert ((token >= 0) & (token < 10)).all()


def test_no_token_is_left_out() -> None:
    """Neither top-k nor top-p: at a high temperature every token of the vocabulary is drawn."""
    done, _ = sampled(LanguagePolicy(tiny(), temperature=20.0), (3,), completions=2000, max_tokens=1)
    assert set(done.tokens.flatten().tolist()) == set(range(VOCABULARY))


def test_a_low_temperature_is_nearly_greedy() -> None:
    torch.manual_seed(0)
    low, _ = sampled(LanguagePolicy(tiny(), temperature=1e-3))
    torch.manual_seed(0)
    greedy, _ = sampled(LanguagePolicy(tiny()), greedy=True)
    assert torch.equal(low.tokens, greedy.tokens)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize(("completions", "max_tokens", "lengths"), [(1, 1, (3,)), (1, 5, LENGTHS), (4, 1, (5, 5))])
def test_one_completion_or_one_token_or_one_prompt(
    name: str, completions: int, max_tokens: int, lengths: tuple[int, ...]
) -> None:
    policy = LanguagePolicy(tiny(name))
    done, obs = sampled(policy, lengths, completions=completions, max_tokens=max_tokens)
    assert done.tokens.shape == (len(lengths) * completions, max_tokens)
    assert done.mask[:, 0].all()
    assert_close(done.logp, policy(obs).log_prob(done.tokens), rtol=1e-5, atol=1e-5)


@every_architecture
def test_padding_on_the_left_of_every_prompt_changes_nothing(name: str) -> None:
    policy = LanguagePolicy(tiny(name), temperature=2.0)
    prompt, mask = prompts(*LENGTHS)
    wider = [nn.functional.pad(x, (5, 0)) for x in (prompt, mask)]
    request = Request(2, 6, STOP, PAD)
    a, b = (generate(policy, *x, request, torch.Generator().manual_seed(1)) for x in ((prompt, mask), wider))
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.logp, b.logp)


def test_what_stands_in_the_padding_of_a_prompt_changes_nothing() -> None:
    policy = LanguagePolicy(tiny(), temperature=2.0)
    prompt, mask = prompts(*LENGTHS)
    spoiled = torch.where(mask, prompt, 9)
    request = Request(2, 6, STOP, PAD)
    a, b = (generate(policy, x, mask, request, torch.Generator().manual_seed(1)) for x in (prompt, spoiled))
    assert torch.equal(a.tokens, b.tokens)
    assert_close(a.logp, b.logp, rtol=1e-6, atol=1e-6)


def test_an_adapter_takes_part() -> None:
    model = add_adapter(tiny(), 2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    policy = LanguagePolicy(model)
    done, obs = sampled(policy)
    assert_close(done.logp, policy(obs).log_prob(done.tokens), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(done.logp, LanguagePolicy(tiny())(obs).log_prob(done.tokens), atol=1e-2)


def test_a_model_in_training_with_checkpoints_is_sampled_and_goes_on_in_training() -> None:
    model = tiny("qwen2", dropout=True)
    policy = LanguagePolicy(model)
    checkpoint_gradients(model)
    done, obs = sampled(policy)
    assert model.training
    assert_close(done.logp, policy(obs).log_prob(done.tokens), rtol=1e-5, atol=1e-5)


def test_what_is_sampled_has_no_graph() -> None:
    done, _ = sampled(LanguagePolicy(tiny()))
    assert not done.logp.requires_grad


def test_a_model_without_a_cache_of_keys_and_values_is_refused() -> None:
    """Mamba takes its state under another name: each token would be drawn as if it were the first."""
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UserError, match=r"^MambaForCausalLM keeps no cache.*engine$"):
        sampled(LanguagePolicy(MambaForCausalLM(config)))


def test_the_tokens_of_a_completion_are_all_up_to_its_last_decision() -> None:
    tokens, mask = torch.arange(12).view(3, 4), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    done = Completions(tokens, torch.zeros(3, 4), mask, torch.ones(3, dtype=torch.bool))
    assert done.ids() == [[0, 1, 2], [4, 5], []]
