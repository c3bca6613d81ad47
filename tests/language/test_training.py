"""The algorithms of control, on a language model, without a line of their own for it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from language.conftest import tiny
from policygrad.advantages import gae, mean_baseline, standardize
from policygrad.algorithms.actor_critic import actor_critic, off_policy_actor_critic
from policygrad.algorithms.grpo import grpo
from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.reinforce import reinforce
from policygrad.algorithms.trpo import npg, trpo
from policygrad.algorithms.variants import cispo, dapo, dr_grpo, gspo, reinforce_plus_plus, rloo
from policygrad.critics import fit_critic, value_baseline
from policygrad.divergences import AdaptiveCoefficient, at_action, k3, over_actions, reweighted, to_reference
from policygrad.language import arithmetic
from policygrad.language.data import columns_of, encode_prompts, left_padded
from policygrad.language.generation import Request
from policygrad.language.models import add_adapter, checkpoint_gradients
from policygrad.language.policies import LanguagePolicy, ValueModel, reference_of, trunk
from policygrad.language.rewards import Rewards
from policygrad.language.sampler import CompletionSampler, Prompts
from policygrad.rollout import Rollout
from policygrad.samplers import KLCharged, Rescored
from policygrad.updates import learning_rate, natural_step, trust_region_step

TOKENIZER = arithmetic.tokenizer()
PAD, END = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
Iterations = Iterator[dict[str, Any]]
Algorithm = Callable[[LanguagePolicy, Callable[[nn.Module], Rollout], float], Iterations]


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward of which hardly two are equal."""
    return [len(text) / 9 + sum(map(int, filter(str.isdigit, text))) / 100 for text in completions]


def prepared(examples: list[dict[str, Any]]) -> Prompts:
    tokens = left_padded(encode_prompts(examples, TOKENIZER, max_length=None), PAD)
    return Prompts([x["prompt"] for x in examples], *tokens, columns_of(examples))


def made_policy(eager: bool = False, **options: Any) -> LanguagePolicy:
    torch.manual_seed(0)
    model = arithmetic.model(hidden=16, layers=1)
    if eager:  # the other kinds of attention have no second derivative on a CPU
        model.set_attn_implementation("eager")
    return LanguagePolicy(model, **options)


def made_sampler(reward: Callable[..., list[float]] = digits, max_tokens: int = 8, **options: Any) -> CompletionSampler:
    request = Request(completions=4, max_tokens=max_tokens, stop=(END,), pad=PAD)
    prompts = prepared(arithmetic.problems(8, seed=0))
    options = {"prompts_per_rollout": 4} | options
    return CompletionSampler(prompts, TOKENIZER, Rewards([reward]), request, **options)


def adam(rate: float, *modules: nn.Module) -> torch.optim.Optimizer:
    """Over the modules' parameters, those that they share once."""
    return torch.optim.Adam([p for p in nn.ModuleList(modules).parameters() if p.requires_grad], lr=rate)


def relative(algorithm: Callable[..., Iterations], **options: Any) -> Algorithm:
    """A method without a critic."""
    return lambda policy, sample, rate: algorithm(policy, sample, adam(rate, policy), **options)


def anchored(divergence: Callable[..., Tensor], **options: Any) -> Algorithm:
    """GRPO with KL to the starting policy in its loss."""

    def iterations(policy: LanguagePolicy, sample: Callable[[nn.Module], Rollout], rate: float) -> Iterations:
        anchor = partial(to_reference, reference=reference_of(policy), divergence=divergence)
        coefficient = AdaptiveCoefficient(0.05)
        return grpo(policy, sample, adam(rate, policy), anchor=anchor, coefficient=coefficient, **options)

    return iterations


def with_critic(algorithm: Callable[..., Iterations], shared: bool = False, **options: Any) -> Algorithm:
    def iterations(policy: LanguagePolicy, sample: Callable[[nn.Module], Rollout], rate: float) -> Iterations:
        body = trunk(policy.model) if shared else trunk(made_policy().model)
        critic = ValueModel(body)
        return algorithm(policy, critic, sample, adam(rate, policy, critic), **options)

    return iterations


def rlhf_ppo(policy: LanguagePolicy, sample: Callable[[nn.Module], Rollout], rate: float) -> Iterations:
    """PPO with KL to the starting policy charged in the reward."""
    sample = KLCharged(sample, reference_of(policy), AdaptiveCoefficient(0.05, 0.1))
    return with_critic(ppo, **PPO)(policy, sample, rate)


def with_baseline(policy: LanguagePolicy, sample: Callable[[nn.Module], Rollout], rate: float) -> Iterations:
    critic = ValueModel(trunk(made_policy().model))
    fit = partial(fit_critic, critic=critic, optimizer=adam(rate, critic), epochs=2, minibatch_size=16)
    baseline = partial(value_baseline, critic=critic)
    return reinforce(policy, sample, adam(rate, policy), gamma=1.0, baseline=baseline, fit=fit, normalize=standardize)


def natural(algorithm: Callable[..., Iterations], **step: Any) -> Algorithm:
    def iterations(policy: LanguagePolicy, sample: Callable[[nn.Module], Rollout], rate: float) -> Iterations:
        critic = ValueModel(trunk(made_policy().model))
        fit = partial(fit_critic, critic=critic, optimizer=adam(rate, critic), epochs=2, minibatch_size=16)
        return algorithm(policy, critic, sample, fit, gamma=1.0, lam=1.0, **step)

    return iterations


PPO: dict[str, Any] = {"gamma": 1.0, "epochs": 2, "minibatch_size": 12}
DELTA = 0.01
METHODS: dict[str, Algorithm] = {
    "grpo": relative(grpo),
    "grpo, minibatches": relative(grpo, epochs=2, minibatch_size=8, entropy_coefficient=0.01),
    "grpo, micro-batches": relative(grpo, micro_batch=3),
    "grpo, exact KL": anchored(over_actions),
    "grpo, KL by k3": anchored(partial(at_action, estimate=k3), epochs=2, minibatch_size=8),
    "grpo, KL reweighted": anchored(reweighted, micro_batch=5),
    "rloo": relative(rloo),
    "dapo": relative(dapo, epochs=2),
    "gspo": relative(gspo, epochs=2),
    "cispo": relative(cispo, epochs=2),
    "dr_grpo": relative(dr_grpo),
    "reinforce++": relative(reinforce_plus_plus),
    "reinforce": with_baseline,
    "actor-critic": with_critic(actor_critic, advantages=partial(gae, lam=0.95), gamma=1.0, normalize=standardize),
    "off-policy actor-critic": with_critic(off_policy_actor_critic, epochs=2, gamma=1.0, normalize=standardize),
    "ppo, copied trunk": with_critic(ppo, **PPO),
    "ppo, shared trunk": with_critic(ppo, shared=True, **PPO),
    "ppo, micro-batches": with_critic(ppo, shared=True, **PPO, micro_batch=5),
    "ppo, KL in the reward": rlhf_ppo,
}
NATURAL: dict[str, Algorithm] = {
    "trpo": natural(trpo, step=partial(trust_region_step, delta=DELTA)),
    "npg": natural(npg),
    "npg, by a rate": natural(trpo, step=partial(natural_step, step_size=partial(learning_rate, rate=0.1))),
}
EVERY = METHODS | NATURAL
OF_CONTROL = ("reinforce", "actor-critic", "off-policy actor-critic")
# One of each kind.
LEARNING = {name: x for name, x in METHODS.items() if not name.startswith("grpo,") and "micro" not in name}
every_method = pytest.mark.parametrize("method", EVERY)


def parameters(policy: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in metrics.items()}


@every_method
def test_every_method_trains_a_language_model(method: str) -> None:
    policy, sampler = made_policy(eager=method in NATURAL), made_sampler()
    before = [parameters(policy)]
    iterations = EVERY[method](policy, sampler, 1e-2)
    for count, metrics in enumerate(islice(iterations, 2), 1):
        found = numbers(metrics)
        assert all(torch.tensor(x).isfinite() for x in found.values()), found
        assert found["completions"] == 16 * count
        assert found["gradient_norm"] > 0
        assert 0 < found["effective_sample_size"] <= 1 + 1e-6
        before.append(parameters(policy))
    assert before[-1].isfinite().all()
    assert all(not torch.equal(a, b) for a, b in pairwise(before))


@pytest.mark.parametrize("method", ["trpo", "npg"])
def test_the_natural_step_is_as_long_as_it_was_asked_to_be(method: str) -> None:
    policy = made_policy(eager=True)
    for metrics in islice(NATURAL[method](policy, made_sampler(), 1e-2), 3):
        found = numbers(metrics)
        assert found["improvement"] > 0
        if method == "trpo":
            assert found["accepted"] == 1
            assert 0.1 * DELTA < found["kl"] <= DELTA
        else:
            assert 0.1 * DELTA < found["kl"] < 3 * DELTA  # to second order, and with damping


def test_a_step_of_trpo_leads_back_if_it_cannot_be_taken() -> None:
    policy = made_policy(eager=True)
    before = parameters(policy)
    step = partial(trust_region_step, delta=DELTA, backtracks=0)
    found = numbers(next(natural(trpo, step=step)(policy, made_sampler(), 1e-2)))
    assert found["accepted"] == 0
    assert torch.equal(parameters(policy), before)


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        pytest.param(grpo, False, id="grpo"),
        pytest.param(grpo, True, id="grpo, adapter"),
        pytest.param(rloo, False, id="rloo"),
        pytest.param(dapo, False, id="dapo"),
        pytest.param(gspo, False, id="gspo"),
        pytest.param(cispo, False, id="cispo"),
        pytest.param(dr_grpo, False, id="dr_grpo"),
        pytest.param(reinforce_plus_plus, False, id="reinforce++"),
    ],
)
def test_the_ratio_is_1_on_the_first_minibatch(method: Callable[..., Iterations], adapter: bool) -> None:
    """With log-probabilities of the learner's own; dropout would show (PITFALLS, 21)."""
    model = tiny("gpt2", dropout=True, vocab_size=len(TOKENIZER))
    model = add_adapter(model, 2) if adapter else model
    checkpoint_gradients(model)
    policy = LanguagePolicy(model, temperature=0.8).train()
    iterations = method(policy, Rescored(made_sampler(), bound=0.0), adam(1e-2, policy))
    for metrics in islice(iterations, 2):
        found = numbers(metrics)
        assert found["kl"] < 1e-12
        assert found["effective_sample_size"] == pytest.approx(1, abs=1e-6)
        assert found["clip_fraction_low"] == found["clip_fraction_high"] == 0
        assert abs(found["mismatch_kl"]) < 1e-9
        assert found["gradient_norm"] > 0


def test_the_ratio_is_1_to_the_bit_when_the_rows_keep_their_order() -> None:
    policy = made_policy()
    rollout = Rescored(made_sampler(), bound=0.0)(policy)
    assert rollout.importance is None
    assert torch.equal(policy(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0), rollout.logp)


@pytest.mark.parametrize("method", [x for x in METHODS if x not in OF_CONTROL])
def test_where_nothing_counts_nothing_changes(method: str) -> None:
    """All completions were cut, and cut ones are masked: overlong filtering on a model that does not stop yet."""
    policy, sampler = made_policy(), made_sampler(cut="masked")
    sampler.request = replace(sampler.request, stop=())
    before = parameters(policy)
    found = numbers(next(METHODS[method](policy, sampler, 1e-2)))
    assert found["cut_fraction"] == 1
    assert torch.equal(parameters(policy), before)
    assert all(torch.tensor(x).isfinite() for x in found.values()), found


def seven(completions: list[str], **_: Any) -> list[float]:
    return [float(text == "7") for text in completions]


@pytest.mark.parametrize("method", LEARNING | NATURAL)
def test_every_method_raises_the_expected_reward(method: str) -> None:
    """One token a completion, the reward is for one of sixteen; its exact probability rises within 20 steps."""
    policy = made_policy(eager=method in NATURAL)
    sampler = made_sampler(seven, max_tokens=1, prompts_per_rollout=8)
    tokens, mask = sampler.prompts.tokens, sampler.prompts.mask
    wanted = TOKENIZER.convert_tokens_to_ids("7")

    def expected_reward() -> float:
        with torch.no_grad():
            logits = policy.model(input_ids=tokens, attention_mask=mask.long()).logits[:, -1]
            return logits.softmax(-1)[:, wanted].mean().item()

    before = expected_reward()
    assert before < 0.2
    iterations = islice(EVERY[method](policy, sampler, 3e-2), 20)
    assert any(expected_reward() > before + 0.3 for _ in iterations)


def log_probabilities_of_all(policy: LanguagePolicy, prompt: Tensor) -> Tensor:
    """log pi of every completion of at most two tokens [V, V], from the model's own logits; one that ends at once is in
    the column END of its row."""
    size = len(TOKENIZER)
    pairs = torch.cat([prompt.expand(size, -1), torch.arange(size).unsqueeze(1)], 1)
    logits = policy.model(input_ids=pairs).logits[:, -2:] / policy.temperature
    first, second = logits[0, 0].log_softmax(-1), logits[:, 1].log_softmax(-1)
    ended = torch.full((size,), -torch.inf).index_fill(0, torch.tensor(END), 0.0)
    return first.unsqueeze(1) + torch.where(torch.arange(size).unsqueeze(1) == END, ended, second)


@pytest.mark.parametrize(
    ("method", "beta"),
    [(rloo, 0.0), (rloo, 1.0), (partial(reinforce, gamma=1.0, baseline=mean_baseline), 0.5)],
    ids=["rloo", "rloo with KL", "reinforce with KL"],
)
def test_the_gradient_is_that_of_the_expected_reward(method: Callable[..., Iterations], beta: float) -> None:
    """grad (J - beta KL(pi, pi_ref)), by enumeration of all completions; the mean of some thousand samples is near."""
    policy = made_policy(temperature=0.8)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    reference, worth = reference_of(made_policy(temperature=0.8)), torch.rand(len(TOKENIZER), len(TOKENIZER))

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [worth[ids[0], ids[-1]].item() for ids in completion_ids]

    prompts = prepared([{"prompt": "12+7="}])
    request = Request(completions=500, max_tokens=2, stop=(END,), pad=PAD)
    sampler = CompletionSampler(prompts, TOKENIZER, Rewards([reward]), request, prompts_per_rollout=1)
    sample = KLCharged(sampler, reference, AdaptiveCoefficient(beta))
    unmoved = torch.optim.SGD(policy.parameters(), lr=0.0)
    iterations = method(policy, sample, unmoved, max_grad_norm=torch.inf)
    found = torch.stack([-flat(p.grad for p in policy.parameters()) for _ in islice(iterations, 12)]).mean(0)

    logp, logp_ref = (log_probabilities_of_all(x, prompts.tokens) for x in (policy, reference))
    possible = logp.isfinite()
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    value = (logp.exp() * (worth - beta * (logp - logp_ref.detach()).where(possible, 0.0))).where(possible, 0.0).sum()
    exact = flat(torch.autograd.grad(value, list(policy.parameters())))
    assert torch.cosine_similarity(found, exact, 0) > 0.97
    assert found.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)


def flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])
