"""A language model as a policy: in a padded batch, in parts, in chunks, every row is scored as it is alone."""

import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from language.conftest import (
    ARCHITECTURES,
    NOT_PLAIN,
    PAD,
    VOCABULARY,
    alone,
    distance,
    every_architecture,
    gradients,
    observed,
    one_by_one,
    picked,
    prompts,
    tiny,
    valued,
    with_holes,
)
from policygrad.critics import bootstrap_values, both
from policygrad.divergences import kl
from policygrad.language.completions import Request
from policygrad.language.generation import generate
from policygrad.language.models import add_adapter, checkpoint_gradients
from policygrad.language.policies import (
    LanguagePolicy,
    Prefixes,
    ValueModel,
    can_share,
    evaluating,
    positions,
    prefixes,
    trunk,
    width,
    without_dropout,
)
from policygrad.objectives import clipped_surrogate
from policygrad.rollout import Batch, Rollout, Split
from policygrad.score import log_probabilities, token_ratio
from policygrad.updates import Objective, ascend
from policygrad.weights import average, per_budget, per_episode, per_row, per_token

# Which keep float64 all the way: the norms of the others compute in float32 inside.
DOUBLE = ["gpt2", "neox", "phi", "opt", "falcon"]
WITH_DROPOUT = [name for name, (*_, rates) in ARCHITECTURES.items() if rates]


@every_architecture
def test_a_padded_batch_gives_the_log_probabilities_of_single_rows(name: str) -> None:
    model, obs = tiny(name), observed()
    distribution = LanguagePolicy(model, temperature=0.6)(obs)
    rows = alone(model, obs, 0.6)
    assert distribution.batch_shape == (4, 6)
    assert_close(distribution.log_prob(obs.completion), picked(obs, rows), rtol=1e-5, atol=1e-5)
    for i, row in enumerate(rows):
        assert_close(distribution.logits[i, : len(row)], row, rtol=1e-5, atol=1e-5)
        assert_close(distribution.entropy()[i, : len(row)], -(row.exp() * row).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DOUBLE)
def test_in_float64_they_agree_to_rounding(name: str) -> None:
    model, obs = tiny(name, dtype=torch.float64), observed()
    found = LanguagePolicy(model, temperature=0.6)(obs).log_prob(obs.completion)
    assert found.dtype == torch.float64
    assert_close(found, picked(obs, alone(model, obs, 0.6)), rtol=0, atol=1e-10)


@every_architecture
def test_the_gradient_is_that_of_single_rows(name: str) -> None:
    model, obs = tiny(name), observed()
    by = torch.randn(obs.completion.shape)
    found = gradients((LanguagePolicy(model)(obs).log_prob(obs.completion) * by).sum(), model)
    expected = gradients((picked(obs, alone(model, obs)) * by).sum(), model)
    assert distance(found, expected) < 1e-5


@every_architecture
def test_rows_of_tokens_give_the_distribution_of_each_next_one(name: str) -> None:
    model, y = tiny(name), torch.randint(2, VOCABULARY, (3, 7))
    found = LanguagePolicy(model)(y[:, :-1]).log_prob(y[:, 1:])
    expected = model(input_ids=y).logits.log_softmax(-1)[:, :-1].gather(-1, y[:, 1:, None])[..., 0]
    assert found.shape == (3, 6)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_last_of_a_rows_tokens_has_a_distribution_too() -> None:
    model, y = tiny(), torch.randint(2, VOCABULARY, (2, 5))
    assert_close(LanguagePolicy(model)(y).logits, model(input_ids=y).logits.log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert prefixes(y[:, :1]).completion.shape == (2, 1)
    assert_close(LanguagePolicy(model)(y[:, :1]).logits, model(input_ids=y[:, :1]).logits.log_softmax(-1))


@every_architecture
def test_columns_of_padding_change_nothing(name: str) -> None:
    policy, obs = LanguagePolicy(tiny(name)), observed()
    wider = Prefixes(*(nn.functional.pad(x, (3, 0) if i < 2 else (0, 5)) for i, x in enumerate(obs)))
    found = policy(wider).log_prob(wider.completion)
    assert found.shape == (4, 11)
    assert torch.equal(found[:, :6], policy(obs).log_prob(obs.completion))
    assert not found[:, 6:].any()


@every_architecture
def test_columns_of_padding_are_not_computed(name: str) -> None:
    model, widths = tiny(name), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, tokens: widths.append(tokens[0].shape[1]))
    policy, obs = LanguagePolicy(model), observed((2, 4), (3, 1))
    wider = Prefixes(*(nn.functional.pad(x, (3, 0) if i < 2 else (0, 5)) for i, x in enumerate(obs)))
    widths.clear()
    policy(wider)
    assert widths == [max(2 + 3, 4 + 1) - 1]


@every_architecture
def test_garbage_behind_the_masks_changes_nothing(name: str) -> None:
    model, obs = tiny(name), observed()
    policy = LanguagePolicy(model)
    spoiled = Prefixes(
        torch.where(obs.prompt_mask, obs.prompt, torch.randint(2, VOCABULARY, obs.prompt.shape)),
        obs.prompt_mask,
        torch.where(obs.completion_mask, obs.completion, torch.randint(2, VOCABULARY, obs.completion.shape)),
        obs.completion_mask,
    )
    assert not torch.equal(spoiled.prompt, obs.prompt)
    assert not torch.equal(spoiled.completion, obs.completion)
    found, expected = (policy(x).log_prob(x.completion) for x in (spoiled, obs))
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not found[~obs.completion_mask].any()
    assert distance(gradients(found.sum(), model), gradients(expected.sum(), model)) < 1e-6


def test_what_stands_behind_the_mask_has_no_gradient() -> None:
    policy, obs = LanguagePolicy(tiny()), observed()
    distribution = policy(obs)
    behind = ~obs.completion_mask
    total = sum(x[behind].sum() for x in (distribution.log_prob(obs.completion), distribution.entropy()))
    assert not gradients(total, policy).any()


@every_architecture
def test_no_row_knows_of_the_others(name: str) -> None:
    policy, obs = LanguagePolicy(tiny(name)), observed()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Prefixes(*(x[order] for x in obs))
    found, expected = (policy(x).log_prob(x.completion) for x in (shuffled, obs))
    assert_close(found, expected[order], rtol=1e-6, atol=1e-6)


@every_architecture
def test_no_token_knows_of_those_after_it(name: str) -> None:
    policy, obs = LanguagePolicy(tiny(name)), observed((1, 5, 3), (6, 6, 6))
    later = obs._replace(completion=obs.completion.clone())
    later.completion[:, 3:] = torch.randint(2, VOCABULARY, (3, 3))
    a, b = (policy(x).logits for x in (obs, later))
    assert_close(a[:, :4], b[:, :4], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a[:, 4:], b[:, 4:], atol=1e-2)


@every_architecture
def test_a_token_that_is_no_decision_is_seen_by_those_after_it(name: str) -> None:
    """Such as the output of a tool between two decisions: every decision is scored as in its row alone."""
    model, obs = tiny(name), with_holes()
    policy, expected = LanguagePolicy(model, temperature=0.6), one_by_one(model, obs, 0.6)
    found = policy(obs).log_prob(obs.completion)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    by = torch.randn(found.shape)
    assert distance(gradients((found * by).sum(), model), gradients((expected * by).sum(), model)) < 1e-5
    other = obs._replace(completion=obs.completion.clone())
    other.completion[0, 2] = 2 + (obs.completion[0, 2] - 1) % (VOCABULARY - 2)  # an inserted token before a decision
    moved = policy(other).log_prob(obs.completion)
    assert not torch.isclose(moved[0, 4], found[0, 4])
    assert_close(moved[0, :2], found[0, :2], rtol=1e-6, atol=1e-6)


def test_inserted_tokens_are_no_decisions_in_parts_and_in_chunks_either() -> None:
    model = tiny(dtype=torch.float64)
    policy, obs = LanguagePolicy(model), with_holes()
    given = batch(policy, obs, per_token)
    whole = gradient_of(policy, given, None)
    assert whole.norm() > 1e-3
    assert distance(gradient_of(policy, given, 1), whole) < 1e-6
    assert distance(gradient_of(LanguagePolicy(model, chunk=2 * VOCABULARY), given, None), whole) < 1e-10


@every_architecture
def test_the_head_is_taken_for_plain_where_it_is(name: str) -> None:
    assert LanguagePolicy(tiny(name)).plain_head == (name not in NOT_PLAIN)


def test_a_cap_is_seen_before_it_bites() -> None:
    """The logits of a new model are so small that a cap at 30 leaves them as they are, to three digits."""
    config = tiny("gemma2", final_logit_softcapping=30.0).config
    model = AutoModelForCausalLM.from_config(config).eval()
    logits = model(input_ids=torch.tensor([[2, 3, 4]])).logits
    assert_close(30 * (logits / 30).atanh(), logits, rtol=1e-3, atol=1e-3)
    policy = LanguagePolicy(model)
    assert not policy.plain_head
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(300)  # as it may be once it is trained
    obs = observed()
    assert_close(policy(obs).log_prob(obs.completion), picked(obs, alone(model, obs)), rtol=0, atol=1e-4)


def test_asking_for_the_head_leaves_the_model_as_it_was() -> None:
    model = tiny("gpt2").train()
    before, y = deepcopy(model.state_dict()), torch.tensor([[2, 3, 4]])
    LanguagePolicy(model)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(model(input_ids=y).logits, tiny("gpt2")(input_ids=y).logits)


def test_an_adapter_on_the_head_is_part_of_the_policy() -> None:
    model = add_adapter(tiny("neox"), 2, targets=["lm_head", "query_key_value"])
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.5)
    policy, obs = LanguagePolicy(model), observed()
    assert not policy.plain_head
    found = policy(obs).log_prob(obs.completion)
    assert_close(found, picked(obs, alone(model, obs)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, picked(obs, alone(tiny("neox"), obs)), atol=1e-2)


def test_of_a_head_that_is_not_plain_only_the_completions_logits_are_computed() -> None:
    model, rows = tiny("gemma2"), []
    policy, obs = LanguagePolicy(model), observed((6, 6), (3, 2))
    model.get_output_embeddings().register_forward_hook(lambda _, __, out: rows.append(out.shape[1]))
    policy(obs)
    assert rows == [3]


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_without_dropout_a_policy_in_training_is_the_one_that_is_sampled(name: str) -> None:
    model = tiny(name, dropout=True).train()
    y = torch.randint(2, VOCABULARY, (3, 8))
    assert not torch.equal(model(input_ids=y).logits, model(input_ids=y).logits), "there is dropout to turn off"
    policy = LanguagePolicy(model).train()
    prompt, mask = prompts(2, 5, 3)
    done = generate(policy, prompt, mask, Request(2, 6, (), PAD), torch.Generator().manual_seed(0))
    obs = Prefixes(*(x.repeat_interleave(2, 0) for x in (prompt, mask)), done.tokens, done.mask)
    first, second = (policy(obs).log_prob(done.tokens) for _ in range(2))
    assert torch.equal(first, second)
    assert_close((first - done.logp).exp(), torch.ones(6, 6), rtol=1e-5, atol=1e-5)
    clean = LanguagePolicy(tiny(name))
    assert_close(first, clean(obs).log_prob(done.tokens), rtol=1e-6, atol=1e-6)
    assert model.training


def test_the_dropout_of_an_adapter_is_turned_off_too() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)
    y = torch.randint(2, VOCABULARY, (2, 5))
    assert not torch.equal(model.train()(input_ids=y).logits, model(input_ids=y).logits)
    policy = LanguagePolicy(model).train()
    assert torch.equal(policy(y).logits, policy(y).logits)


def test_dropout_is_turned_off_in_the_model_that_is_given() -> None:
    model = tiny("gpt2", dropout=True)
    assert without_dropout(model) is model
    assert {x.p for x in model.modules() if isinstance(x, nn.Dropout)} == {0.0}


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2"])
def test_in_bfloat16_it_is_near_the_policy_in_float32(name: str) -> None:
    model, obs = tiny(name), observed()
    exact, low = (LanguagePolicy(model, autocast=autocast)(obs) for autocast in (None, torch.bfloat16))
    a, b = (p.log_prob(obs.completion) for p in (exact, low))
    assert b.dtype == torch.float32
    assert not torch.equal(a, b), "the trunk was computed in bfloat16"
    assert_close(a, b, rtol=0.05, atol=0.1)
    assert kl(exact, low).max() < 1e-2
    ga, gb = (gradients(x.sum(), model) for x in (a, b))
    assert distance(gb, ga) < 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_weights_in_bfloat16_are_scored_in_float32(name: str) -> None:
    model, obs = tiny(name), observed()
    found = LanguagePolicy(deepcopy(model).to(torch.bfloat16))(obs).log_prob(obs.completion)
    assert found.dtype == torch.float32
    assert_close(found, LanguagePolicy(model)(obs).log_prob(obs.completion), rtol=0.1, atol=0.2)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "neox"])
def test_checkpointing_gives_the_same_gradient(name: str, number_of_calls: Callable[[nn.Module], list[int]]) -> None:
    obs, found = observed(), []
    for checkpointed in (False, True):
        model = tiny(name, dropout=True)
        policy = LanguagePolicy(model)
        if checkpointed:
            checkpoint_gradients(model)
        calls = number_of_calls(model.get_input_embeddings() if not checkpointed else _mlp(model))
        found.append(gradients(policy(obs).log_prob(obs.completion).sum(), model))
        assert len(calls) == (2 if checkpointed else 1), "a layer is computed again, where that was asked for"
    assert distance(found[1], found[0]) < 1e-6


def _mlp(model: nn.Module) -> nn.Module:
    return next(x for name, x in model.named_modules() if name.endswith("mlp"))


def batch(policy: LanguagePolicy, obs: Prefixes, weights: Callable[[Tensor], Tensor]) -> Batch:
    """What an algorithm makes of a rollout, with ratios on both sides of the clip."""
    with torch.no_grad():
        logp = policy(obs).log_prob(obs.completion)
    zero, mask = torch.zeros_like(logp), obs.completion_mask
    old = (logp + 0.3 * torch.randn_like(logp)).where(mask, 0.0)
    advantage = torch.randn_like(logp).where(mask, 0.0)
    return Batch(obs, obs.completion, old, mask, weights(mask).to(logp), advantage, zero, zero)


class ClippedWithEntropy(Objective):
    """The clipped surrogate and a bonus for entropy."""

    def __init__(self, policy: LanguagePolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        distribution = self.policy(batch.obs)
        logp = distribution.log_prob(batch.action)
        ratio = token_ratio(logp, batch.logp, batch.mask)
        value = average(clipped_surrogate(logp, ratio, batch.advantage, low=0.2, high=0.2), batch.weight)
        return value + 0.1 * average(distribution.entropy(), batch.weight), {"objective": value.detach()}


def gradient_of(policy: LanguagePolicy, given: Batch, micro_batch: Split) -> Tensor:
    """The gradient that `ascend` hands to the optimizer."""
    update = ascend(torch.optim.SGD(policy.parameters(), lr=0.0), micro_batch=micro_batch)
    update(ClippedWithEntropy(policy), given)
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize("weights", [per_row, per_token, per_episode, per_budget])
@pytest.mark.parametrize(("name", "limits"), [("gpt2", {}), ("gpt2", {"tokens": 13}), ("phi", {"rows": 1})])
def test_packed_rows_give_the_gradient_of_the_whole_batch(
    name: str, limits: dict[str, int], weights: Callable[[Tensor], Tensor]
) -> None:
    policy = LanguagePolicy(tiny(name, dtype=torch.float64), temperature=0.8)
    obs = observed((1, 5, 3, 6, 2, 4), (4, 1, 6, 0, 2, 3))
    given = batch(policy, obs, weights)
    whole = gradient_of(policy, given, None)
    split = partial(policy.parts, **limits)
    parts, metrics = split(obs)
    # A row takes its prompt and all of its tokens but the last one; without a decision, its prompt.
    equal = [[3], [5]] if limits == {"rows": 1} else [[3, 5]]
    assert [part.tolist() for part in parts] == [[2], *equal, [1], [0], [4]]
    assert 0 <= float(metrics["padding"]) <= 0.05
    assert distance(gradient_of(policy, given, split), whole) < 1e-12
    one_by_one = log_probabilities(policy, given, 1)
    assert_close(log_probabilities(policy, given, split), one_by_one, rtol=0, atol=1e-12)
    assert one_by_one.abs().sum(1).count_nonzero() == 5


@pytest.mark.parametrize("name", ["gpt2", "neox", "phi", "opt"])
@pytest.mark.parametrize("limits", [None, {}, {"tokens": 30}, {"rows": 2}])
def test_a_prompt_computed_once_gives_the_same_gradient(name: str, limits: dict[str, int] | None) -> None:
    model, computed = tiny(name, dtype=torch.float64), []
    policy = LanguagePolicy(model, temperature=0.8)
    obs = observed((5, 3, 6, 2), (4, 1, 6, 0))
    row = torch.tensor([0, 2, 1, 0, 0, 3, 2])
    repeated = Prefixes(obs.prompt[row], obs.prompt_mask[row], *observed((1,) * 7, (4, 1, 6, 0, 3, 5, 6))[2:])
    given = batch(policy, repeated, per_token)
    whole, logp = gradient_of(policy, given, None), policy(repeated).log_prob(repeated.completion)
    assert can_share(policy)
    policy.shared = True
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, tokens: computed.append(tuple(tokens[0].shape)))
    assert_close(policy(repeated).log_prob(repeated.completion), logp, rtol=0, atol=1e-12)
    assert computed == [(4, 6), (7, 5)], "each prompt once, and the completions but for their last token"
    split = None if limits is None else partial(policy.parts, **limits)
    assert distance(gradient_of(policy, given, split), whole) < 1e-12


def test_which_models_can_share_a_prompt() -> None:
    able = {name: can_share(LanguagePolicy(tiny(name))) for name in ("llama", "qwen2", "mistral", "gemma3", "lfm2")}
    assert able == {"llama": True, "qwen2": True, "mistral": False, "gemma3": False, "lfm2": False}
    model = tiny()
    checkpoint_gradients(model)
    assert not can_share(LanguagePolicy(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen2"])
@pytest.mark.parametrize("weights", [per_row, per_token])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_any_split_gives_the_gradient_of_the_whole_batch(
    name: str, weights: Callable[[Tensor], Tensor], micro_batch: int
) -> None:
    """TRL #3021, verl #3741: with rows of any length, and one that does not count at all."""
    policy = LanguagePolicy(tiny(name, dtype=torch.float64), temperature=0.8)
    given = batch(policy, observed((1, 5, 3, 6, 2), (4, 1, 6, 0, 2)), weights)
    whole = gradient_of(policy, given, None)
    assert whole.norm() > 1e-3
    assert distance(gradient_of(policy, given, micro_batch), whole) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("chunk", [1, 3 * VOCABULARY])
def test_a_head_in_chunks_gives_the_same_gradient(name: str, chunk: int) -> None:
    model = tiny(name, dtype=torch.float64)
    given = batch(LanguagePolicy(model), observed(), per_row)
    whole, chunked = (gradient_of(LanguagePolicy(model, chunk=x), given, None) for x in (2**24, chunk))
    assert LanguagePolicy(model, chunk=chunk)(given.obs).chunk == chunk
    assert distance(chunked, whole) < 1e-10


def test_tied_embeddings_have_one_gradient_from_both_ends() -> None:
    model = tiny("qwen2", tie_word_embeddings=True, dtype=torch.float64)
    obs = observed()
    weight = model.get_output_embeddings().weight
    assert weight is model.get_input_embeddings().weight
    for chunk in (2**24, VOCABULARY):
        (found,) = torch.autograd.grad(LanguagePolicy(model, chunk=chunk)(obs).log_prob(obs.completion).sum(), weight)
        (expected,) = torch.autograd.grad(picked(obs, alone(model, obs)).sum(), weight)
        assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_divergence_is_that_of_single_rows(name: str) -> None:
    obs, models = observed(), [tiny(name), tiny(name)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.add_(0.05 * torch.randn_like(p))
    found = kl(*(LanguagePolicy(model)(obs) for model in models))
    expected = torch.zeros_like(found)
    for i, (p, q) in enumerate(zip(*(alone(model, obs) for model in models), strict=True)):
        expected[i, : len(p)] = (p.exp() * (p - q)).sum(-1)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert expected.max() > 0.01


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_divergence_from_itself_has_a_second_derivative_with_eager_attention(name: str) -> None:
    """What a Fisher-vector product needs."""
    # Prompts of one length: transformers' eager attention turns padding into NaN in float64.
    obs = observed((4, 4, 4), (4, 1, 6))
    policy = LanguagePolicy(tiny(name, attn_implementation="eager", dtype=torch.float64))
    with torch.no_grad():
        old = deepcopy(policy(obs))
    first = torch.autograd.grad(kl(old, policy(obs)).sum(), list(policy.parameters()), create_graph=True)
    assert max(g.abs().max().item() for g in first) < 1e-6
    direction = [torch.randn_like(g) for g in first]
    slope = sum((g * v).sum() for g, v in zip(first, direction, strict=True))
    product = torch.autograd.grad(slope, list(policy.parameters()), materialize_grads=True)
    curvature = sum((x * v).sum() for x, v in zip(product, direction, strict=True))
    step = 1e-4
    moved = deepcopy(policy)
    with torch.no_grad():
        for p, v in zip(moved.parameters(), direction, strict=True):
            p.add_(step * v)
        assert 2 * kl(old, moved(obs)).sum().item() / step**2 == pytest.approx(curvature.item(), rel=0.02)


def trace() -> None:
    """Raises if the policy does not trace into one graph with fixed shapes."""
    policy, obs = LanguagePolicy(tiny("llama")), observed((1, 5, 3), (4, 1, 2))
    wider = Prefixes(*(nn.functional.pad(x, (3, 0) if i < 2 else (0, 2)) for i, x in enumerate(obs)))
    function = torch.compile(lambda obs: policy(obs).log_prob(obs.completion), fullgraph=True, backend="eager")
    for given in (wider, Prefixes(*(x.flip(0) for x in wider))):
        assert_close(function(given), policy(given).log_prob(given.completion), rtol=1e-5, atol=1e-5)


def test_it_traces_into_one_graph() -> None:
    # In a process of its own: the shape checks of the test run are no part of the graph.
    code = "import sys; sys.path.insert(0, 'tests'); from language.test_policies import trace; trace()"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_positions_count_from_the_first_token() -> None:
    seen = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert positions(seen).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_mode_ends_with_the_block(training: bool) -> None:
    model, seen = tiny().train(training), []
    model.register_forward_pre_hook(lambda *_: seen.append(model.training))
    with pytest.raises(IndexError), evaluating(model):
        model(input_ids=torch.tensor([[VOCABULARY]]))
    assert seen == [False]
    assert all(x.training == training for x in model.modules())


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        LanguagePolicy(tiny(), temperature=temperature)(observed())


# Values.


@every_architecture
def test_a_value_starts_at_0_and_has_the_shape_of_the_decisions(name: str) -> None:
    model, obs = tiny(name), observed()
    value = ValueModel(trunk(model))(obs)
    assert value.dtype == torch.float32
    assert torch.equal(value, torch.zeros(4, 6))
    assert ValueModel(trunk(model))(obs.completion).shape == (4, 6)


@every_architecture
def test_a_value_is_that_of_the_row_alone_and_0_behind_the_mask(name: str) -> None:
    model, obs = tiny(name), observed()
    critic = valued(model)
    found = critic(obs)
    for i, (prompt, prompt_mask, completion, mask) in enumerate(zip(*obs, strict=True)):
        row = torch.cat([prompt[prompt_mask], completion[mask]]).unsqueeze(0)
        hidden = model.base_model(input_ids=row).last_hidden_state[0, int(prompt_mask.sum()) - 1 : -1]
        assert_close(found[i, : len(hidden)], critic.head(hidden)[:, 0], rtol=1e-5, atol=1e-5)
        assert (found[i, : len(hidden)] != 0).all()
        assert not found[i, len(hidden) :].any()


@every_architecture
def test_the_value_of_a_decision_has_seen_the_inserted_tokens_before_it(name: str) -> None:
    model, obs = tiny(name), with_holes()
    critic = valued(model)
    found, expected = critic(obs), torch.zeros(obs.completion.shape)
    for i, t in obs.completion_mask.nonzero().tolist():
        row = torch.cat([obs.prompt[i][obs.prompt_mask[i]], obs.completion[i, :t]]).unsqueeze(0)
        expected[i, t] = critic.head(model.base_model(input_ids=row).last_hidden_state[0, -1])
    assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found != 0).sum() == obs.completion_mask.sum()
    by = torch.randn(found.shape)
    assert distance(gradients((found * by).sum(), critic), gradients((expected * by).sum(), critic)) < 1e-5


def test_a_value_knows_nothing_of_what_comes_after() -> None:
    critic, obs = valued(tiny()), observed((1, 5, 3), (6, 6, 6))
    later = obs._replace(completion=obs.completion.clone())
    later.completion[:, 3:] = torch.randint(2, VOCABULARY, (3, 3))
    a, b = critic(obs), critic(later)
    assert_close(a[:, :4], b[:, :4], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(a[:, 4:], b[:, 4:], atol=1e-3)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_shared_trunk_is_trained_by_both(adapter: bool) -> None:
    policy = LanguagePolicy(add_adapter(tiny(), 2) if adapter else tiny())
    critic, obs = valued(policy.model), observed()
    assert critic.trunk is trunk(policy.model)
    shared = [p for p in policy.parameters() if p.requires_grad and any(p is q for q in critic.parameters())]
    assert len(shared) == len([p for p in policy.parameters() if p.requires_grad]) - (not adapter)  # the policy's head
    for value in (policy(obs).log_prob(obs.completion).sum(), critic(obs).sum()):
        given = torch.autograd.grad(value, shared)
        assert all(g.isfinite().all() for g in given)
        assert any(g.any() for g in given)


@pytest.mark.parametrize("repeated", [False, True], ids=["prompts", "groups"])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_shared_trunk_is_computed_once_and_has_the_gradient_of_both(
    adapter: bool, repeated: bool, number_of_calls: Callable[[nn.Module], list[int]]
) -> None:
    policy = LanguagePolicy(add_adapter(tiny(), 2) if adapter else tiny(), shared=repeated)
    critic, obs = valued(policy.model), observed()
    if repeated:  # then the policy computes a prompt once for its completions, and the critic so with it
        obs = obs._replace(prompt=obs.prompt[[0, 0, 1, 1]], prompt_mask=obs.prompt_mask[[0, 0, 1, 1]])

    def total(distribution: Any, value: Tensor) -> Tensor:
        return distribution.log_prob(obs.completion).where(obs.completion_mask, 0).sum() + (value**2).sum()

    both_modules = nn.ModuleList([policy, critic])
    expected = gradients(total(policy(obs), critic(obs)), both_modules)
    calls = number_of_calls(critic.trunk)
    found = gradients(total(*both(policy, critic, obs)), both_modules)
    assert len(calls) == 1 + repeated  # prompts, then completions
    assert distance(found, expected) < 1e-5


def test_a_critic_of_another_trunk_or_arithmetic_computes_its_own() -> None:
    policy, obs = LanguagePolicy(tiny()), observed()
    for critic in (valued(deepcopy(trunk(policy.model))), valued(policy.model, autocast=torch.bfloat16)):
        distribution, value = both(policy, critic, obs)
        assert torch.equal(value, critic(obs))
        assert torch.equal(distribution.logits, policy(obs).logits)


def test_a_copied_trunk_is_trained_apart() -> None:
    policy, obs = LanguagePolicy(tiny()), observed()
    critic = valued(deepcopy(trunk(policy.model)))
    before = policy(obs).logits
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.05)
    critic(obs).sum().backward()
    optimizer.step()
    assert torch.equal(policy(obs).logits, before)
    assert all(p.grad is None for p in policy.parameters())
    assert critic.trunk.get_input_embeddings().weight.grad.any()


def test_another_model_of_the_same_vocabulary_may_be_the_critic() -> None:
    critic = valued(tiny("gpt2", n_embd=8))
    assert width(critic.trunk) == critic.head.in_features == 8
    assert critic(observed()).shape == (4, 6)


def test_a_critic_is_without_dropout() -> None:
    critic = valued(tiny("gpt2", dropout=True)).train()
    obs = observed()
    assert torch.equal(critic(obs), critic(obs))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_critic_in_bfloat16_is_near_and_in_float32(name: str) -> None:
    model, obs = tiny(name), observed()
    critic = valued(model)
    low = deepcopy(critic)
    low.autocast = torch.bfloat16
    halved = valued(deepcopy(model).to(torch.bfloat16))
    halved.head.load_state_dict(critic.head.state_dict())
    for other in (low, halved):
        found = other(obs)
        assert found.dtype == torch.float32
        assert not torch.equal(found, critic(obs))
        assert_close(found, critic(obs), rtol=0.05, atol=0.2)


def test_a_critic_bootstraps_a_rollout_of_completions() -> None:
    critic, obs = valued(tiny()), observed()
    mask, zero = obs.completion_mask, torch.zeros(4, 6)
    rollout = Rollout(obs, obs.completion, zero, zero, ~mask, ~mask, mask, torch.arange(4))
    value = bootstrap_values(critic, rollout)
    assert value.shape == (4, 7)
    assert torch.equal(value[:, :-1], critic(obs))
    assert not value[:, -1].any()


def test_a_critic_takes_its_width_from_what_the_trunk_returns() -> None:
    """OPT-350m projects its states down to the width of its embeddings; other models have no hidden_size at all."""
    model = tiny("opt", word_embed_proj_dim=8)
    critic = valued(model)
    assert (model.config.hidden_size, critic.head.in_features) == (16, 8)
    assert critic(observed()).shape == (4, 6)
