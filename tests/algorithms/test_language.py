"""Every method on a language model, without a line of its own for it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from language.conftest import tiny
from torch import Tensor, nn

import policygrad as pg
from policygrad.language import arithmetic
from policygrad.language.completions import Request
from policygrad.language.data import columns_of, encode_prompts
from policygrad.language.models import add_adapter, checkpoint_gradients
from policygrad.language.policies import LanguagePolicy, ValueModel, reference_of, trunk
from policygrad.language.rewards import Rewards
from policygrad.language.sampler import CompletionSampler, Prompts
from policygrad.rollout import decisions
from policygrad.samplers import Rescored, Sample
from policygrad.train.compose import Learner
from policygrad.train.methods import METHODS
from policygrad.train.options import has_critic, options_of
from policygrad.weights import per_episode

TOKENIZER = arithmetic.tokenizer()
PAD, END = TOKENIZER.pad_token_id, TOKENIZER.eos_token_id
NATURAL = ("npg", "trpo")
of_groups = [
    name
    for name, method in METHODS.items()
    if method.objective == "grpo" and not has_critic(options_of(name, "language")())
]
DELTA = 0.01

PPO: dict[str, Any] = {"epochs": 2, "minibatch_size": 12, "normalize_advantages": "minibatch", "kl_ref": "none"}
FITTED: dict[str, Any] = {"critic_epochs": 2, "critic_minibatch_size": 16, "critic_learning_rate": 1e-2}
ANCHORED: dict[str, Any] = {"kl_ref": "loss", "kl_ref_coefficient": 0.05}
# What is tried of the methods: (method, options). A shared trunk is the test's own word.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"kl_ref": "none"}),
    "grpo, minibatches": (
        "grpo",
        {"kl_ref": "none", "epochs": 2, "minibatch_size": 8, "entropy_coefficient": 0.01},
    ),
    "grpo, micro-batches": ("grpo", {"kl_ref": "none", "micro_batch": 3}),
    "grpo, exact KL": ("grpo", {**ANCHORED, "kl_ref_estimate": "exact"}),
    "grpo, KL by k3": ("grpo", {**ANCHORED, "kl_ref_estimate": "k3", "epochs": 2, "minibatch_size": 8}),
    "grpo, KL reweighted": ("grpo", {**ANCHORED, "micro_batch": 5}),
    "grpo, a critic's credit": ("grpo", {"kl_ref": "none", "credit": "gae", **FITTED}),
    "rloo": ("rloo", {}),
    "dapo": ("dapo", {"epochs": 2}),
    "gspo": ("gspo", {"epochs": 2, "clip_low": 0.2, "clip_high": 0.2}),
    "cispo": ("cispo", {"epochs": 2}),
    "dr_grpo": ("dr_grpo", {}),
    "reinforce++": ("reinforce_plus_plus", {}),
    "dppo": ("dppo", {"epochs": 2, "divergence_bound": 0.01}),
    "dppo, over the vocabulary": ("dppo", {"epochs": 2, "divergence_mask": "tv", "divergence_bound": 0.01}),
    "sapo": ("sapo", {"epochs": 2}),
    "gmpo": ("gmpo", {"epochs": 2, "token_clip": 0.01}),
    "gspo-token": ("gspo_token", {"epochs": 2, "clip_low": 0.2, "clip_high": 0.2}),
    "luspo": ("luspo", {"epochs": 2, "clip_low": 0.2, "clip_high": 0.2}),
    "vespo": ("vespo", {"epochs": 2}),
    "maxrl": ("maxrl", {}),
    "pass@k": ("pass_at_k", {}),
    "lite ppo": ("lite_ppo", {"epochs": 2}),
    "opo": ("opo", {}),
    "otb": ("otb", {}),
    "two-sided grpo": ("two_sided_grpo", {"epochs": 2, "dual_clip": 1.1}),
    "masked grpo": ("masked_grpo", {"epochs": 2, "drift_bound": 0.01, "kl_ref": "none"}),
    "forking tokens": ("forking_tokens", {"micro_batch": 3}),
    "adaptive entropy": ("skywork_or1", {"entropy_target": 100.0}),
    "clip-cov": ("clip_cov", {"epochs": 2, "covariance_low": 0.1}),
    "kl-cov": ("kl_cov", {"epochs": 2, "kl_old_share": 0.1}),
    "opmd": ("opmd", {"epochs": 2}),
    "dro": ("dro", {"epochs": 2, **FITTED}),
    "gdpo": ("gdpo", {}),
    "reinforce++ baseline": ("reinforce_plus_plus_baseline", {"kl_ref": "none"}),
    "remax": ("remax", {}),
    "vapo": ("ppo", {**PPO, "length_adaptive_lam": 0.5, "critic_lam": 1.0}),
    "reinforce": ("reinforce", {"baseline": "value", "normalize_advantages": "batch", **FITTED}),
    "actor-critic": ("actor_critic", {"lam": 0.95, "normalize_advantages": "batch"}),
    "off-policy actor-critic": ("off_policy_actor_critic", {"epochs": 2, "normalize_advantages": "batch"}),
    "ppo, copied trunk": ("ppo", PPO),
    "ppo, shared trunk": ("ppo", {**PPO, "critic": "shared"}),
    "ppo, micro-batches": ("ppo", {**PPO, "critic": "shared", "micro_batch": 5}),
    "ppo, KL in the reward": (
        "ppo",
        {**PPO, "kl_ref": "reward", "kl_ref_coefficient": 0.05, "kl_ref_target": 0.1},
    ),
    "ppo, no critic": ("ppo", {**PPO, "completions": 4, "credit": "group", "group_baseline": "leave_one_out"}),
    "trpo": ("trpo", {**FITTED, "delta": DELTA, "lam": 1.0}),
    "trpo, no critic": ("trpo", {"credit": "group", "delta": DELTA}),
    "npg": ("npg", {**FITTED, "delta": DELTA, "lam": 1.0}),
    "npg, by a rate": ("npg", {**FITTED, "step_rule": "learning_rate", "natural_learning_rate": 0.1}),
}
OF_CONTROL = ("reinforce", "actor-critic", "off-policy actor-critic")


def digits(completions: list[str], **_: Any) -> list[float]:
    """A reward of which hardly two are equal."""
    return [len(text) / 9 + sum(map(int, filter(str.isdigit, text))) / 100 for text in completions]


def prepared(examples: list[dict[str, Any]]) -> Prompts:
    rows = encode_prompts(examples, TOKENIZER)
    return Prompts.of([x["prompt"] for x in examples], rows, columns_of(examples), pad=PAD)


def made_policy(eager: bool = False, **options: Any) -> LanguagePolicy:
    torch.manual_seed(0)
    model = arithmetic.model(hidden=16, layers=1)
    if eager:  # the other kinds of attention have no second derivative on a CPU
        model.set_attn_implementation("eager")
    return LanguagePolicy(model, **options)


def made_sampler(reward: Callable[..., list[float]] = digits, max_tokens: int = 8, **options: Any) -> CompletionSampler:
    request = Request(completions=4, max_tokens=max_tokens, stop=(END,), pad=PAD)
    prompts = prepared(arithmetic.problems(8, seed=0))
    options = {"prompts_per_rollout": 4, "greedy": True} | options
    return CompletionSampler(prompts, TOKENIZER, Rewards([reward]), request, **options)


def of(method: str) -> LanguagePolicy:
    return made_policy(eager=method in NATURAL)


def learner(method: str, policy: LanguagePolicy, sample: Sample, rate: float = 1e-2, **values: Any) -> Learner:
    """The method on the policy, with the options' critic: a copy's trunk under a head, or the policy's own."""
    defaults = options_of(method, "language")()
    credit, baseline = values.get("credit", defaults.credit), values.get("baseline", getattr(defaults, "baseline", ""))
    critic = None
    if has_critic(replace(defaults, credit=credit, **({"baseline": baseline} if baseline else {}))):
        body = trunk(policy.model if values.get("critic") == "shared" else made_policy().model)
        critic = ValueModel(body)
        values.setdefault("critic_learning_rate", rate)
    if method not in NATURAL:
        values = {"learning_rate": rate, **values}
    return pg.assemble(
        method,
        policy,
        sample,
        critic=critic,
        reference=reference_of(policy),
        world="language",
        **{name: x for name, x in values.items() if name != "critic"},
    )


def case(name: str, policy: LanguagePolicy, sample: Sample, rate: float = 1e-2, **values: Any) -> Learner:
    method, options = CASES[name]
    return learner(method, policy, sample, rate, **options | values)


def parameters(policy: nn.Module) -> Tensor:
    return flat(p.detach() for p in policy.parameters())


def flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in metrics.items()}


def test_every_method_is_tried() -> None:
    assert {method for method, _ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", CASES)
def test_every_method_trains_a_language_model(name: str) -> None:
    policy = of(CASES[name][0])
    before = [parameters(policy)]
    for count, metrics in enumerate(islice(case(name, policy, made_sampler()), 2), 1):
        found = numbers(metrics)
        assert all(torch.tensor(x).isfinite() for x in found.values()), found
        assert found["completions"] == 16 * count
        assert found["gradient_norm"] > 0
        assert 0 < found["effective_sample_size"] <= 1 + 1e-6
        before.append(parameters(policy))
    assert before[-1].isfinite().all()
    assert all(not torch.equal(a, b) for a, b in pairwise(before))


@pytest.mark.parametrize("name", ["trpo", "trpo, no critic", "npg"])
def test_the_natural_step_is_as_long_as_it_was_asked_to_be(name: str) -> None:
    for metrics in islice(case(name, of("trpo"), made_sampler()), 3):
        found = numbers(metrics)
        assert found["improvement"] > 0
        if name != "npg":
            assert found["accepted"] == 1
            assert 0.1 * DELTA < found["kl_old"] <= DELTA
        else:
            assert 0.1 * DELTA < found["kl_old"] < 3 * DELTA  # to second order, and with damping


def test_a_step_of_trpo_leads_back_if_it_cannot_be_taken() -> None:
    policy = of("trpo")
    before = parameters(policy)
    found = numbers(next(iter(case("trpo", policy, made_sampler(seed=1), delta=50.0, backtracks=1))))
    assert found["accepted"] == 0
    assert torch.equal(parameters(policy), before)


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
@pytest.mark.parametrize("method", of_groups)
def test_the_ratio_is_1_on_the_first_minibatch(method: str, adapter: bool) -> None:
    """With log-probabilities of the learner's own; dropout would show (PITFALLS, 21)."""
    model = tiny("gpt2", dropout=True, vocab_size=len(TOKENIZER))
    model = add_adapter(model, 2) if adapter else model
    checkpoint_gradients(model)
    policy = LanguagePolicy(model, temperature=0.8).train()
    again = Rescored(made_sampler(), bound=0.0)
    for metrics in islice(learner(method, policy, again, kl_ref="none"), 2):
        found = numbers(metrics)
        assert found["kl_old"] < 1e-12
        assert found["effective_sample_size"] == pytest.approx(1, abs=1e-6)
        assert found.get("clip_fraction_low", 0) == found.get("clip_fraction_high", 0) == 0
        assert abs(found["mismatch_kl"]) < 1e-9
        assert found["gradient_norm"] > 0 or method == "pass_at_k", "of two that are best none is owed anything"


def test_the_ratio_is_1_to_the_bit_when_the_rows_keep_their_order() -> None:
    policy = made_policy()
    rollout = Rescored(made_sampler(), bound=0.0)(policy)
    assert rollout.importance is None
    assert torch.equal(policy(rollout.obs).log_prob(rollout.action).where(rollout.mask, 0.0), rollout.logp)


@pytest.mark.parametrize(("epochs", "passes"), [(1, 1), (3, 3)])
@pytest.mark.parametrize("method", [x for x in of_groups if x not in ("otb", "forking_tokens")])  # who ask it once more
def test_a_step_is_one_forward_pass_as_the_sampler_has_scored_its_tokens(method: str, epochs: int, passes: int) -> None:
    policy = made_policy()
    seen: list[bool] = []
    policy.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    batched = {"epochs": epochs} | ({"sampling_rounds": 1} if method == "dapo" else {})
    next(iter(learner(method, policy, made_sampler(), kl_ref="none", **batched)))
    assert seen == [True] * passes, "of the learner; the sampler calls no forward pass of the policy"


@pytest.mark.parametrize("name", [x for x in CASES if x not in OF_CONTROL and CASES[x][0] not in NATURAL])
def test_where_nothing_counts_nothing_changes(name: str) -> None:
    """All completions were cut, and cut ones are masked: overlong filtering on a model that does not stop yet."""
    policy, sampler = made_policy(), made_sampler(cut="masked")
    sampler.request = replace(sampler.request, stop=())
    before = parameters(policy)
    found = numbers(next(iter(case(name, policy, sampler))))
    assert found["cut_fraction"] == 1
    assert torch.equal(parameters(policy), before)
    assert all(torch.tensor(x).isfinite() for x in found.values()), found


def seven(completions: list[str], **_: Any) -> list[float]:
    return [float(text == "7") for text in completions]


@pytest.mark.parametrize("name", [x for x in CASES if not x.startswith("grpo,") and "micro" not in x])
def test_every_method_raises_the_expected_reward(name: str) -> None:
    """One token a completion, the reward is for one of sixteen; its exact probability rises within 20 steps."""
    policy = of(CASES[name][0])
    sampler = made_sampler(seven, max_tokens=1, prompts_per_rollout=8)
    tokens, mask = sampler.prompts.padded()
    wanted = TOKENIZER.convert_tokens_to_ids("7")

    def expected_reward() -> float:
        with torch.no_grad():
            logits = policy.model(input_ids=tokens, attention_mask=mask.long()).logits[:, -1]
            return logits.softmax(-1)[:, wanted].mean().item()

    before = expected_reward()
    assert before < 0.2
    assert any(expected_reward() > before + 0.3 for _ in islice(case(name, policy, sampler, 3e-2), 20))


# The gradient


def log_probabilities_of_all(policy: LanguagePolicy, prompt: Tensor) -> Tensor:
    """log pi of every completion of at most two tokens [V, V], from the model's own logits; one that ends at once is in
    the column END of its row."""
    size = len(TOKENIZER)
    pairs = torch.cat([prompt.expand(size, -1), torch.arange(size).unsqueeze(1)], 1)
    logits = policy.model(input_ids=pairs).logits[:, -2:] / policy.temperature
    first, second = logits[0, 0].log_softmax(-1), logits[:, 1].log_softmax(-1)
    ended = torch.full((size,), -torch.inf).index_fill(0, torch.tensor(END), 0.0)
    return first.unsqueeze(1) + torch.where(torch.arange(size).unsqueeze(1) == END, ended, second)


UNBIASED: dict[str, dict[str, Any]] = {
    "reinforce": {"baseline": "mean"},
    "actor_critic": {"lam": 1.0},
    "off_policy_actor_critic": {"lam": 1.0},
    "npg": {"lam": 1.0, "normalize_advantages": "none"},
    "trpo": {"lam": 1.0, "normalize_advantages": "none"},
    "ppo": {"lam": 1.0, "normalize_advantages": "none"},
    "reinforce_plus_plus": {"normalize_advantages": "none"},
    "remax": {},
    "dro": {},
    "clip_cov": {"group_scale": "none", "learn_from": "all"},
    "kl_cov": {"group_scale": "none"},
    "opo": {},
    "otb": {},
    "pass_at_k": {"group_baseline": "mean"},
    "maxrl": {"group_scale": "none"},
    "forking_tokens": {"group_scale": "none", "learn_from": "all"},
    "reinforce_plus_plus_baseline": {"normalize_advantages": "none"},
    "gdpo": {"normalize_advantages": "none"},
}


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_that_of_the_expected_reward(method: str, beta: float) -> None:
    """grad (J - beta KL(pi, pi_ref)), by enumeration of all completions; the mean of some thousand samples is near.

    Each method's own credit and objective, with what biases it on purpose left out: scales, and weights by token.
    """
    policy = made_policy(temperature=0.8)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    reference = reference_of(made_policy(temperature=0.8))
    worth = torch.rand(len(TOKENIZER), len(TOKENIZER)) - 0.5

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [worth[ids[0], ids[-1]].item() for ids in completion_ids]

    prompts = prepared([{"prompt": "12+7="}])
    request = Request(completions=1000, max_tokens=2, stop=(END,), pad=PAD)
    sampler = CompletionSampler(prompts, TOKENIZER, Rewards([reward]), request, prompts_per_rollout=1, greedy=True)
    plain = {"group_baseline": "leave_one_out", "group_scale": "none"} if method in of_groups else {}
    values = UNBIASED.get(method, plain)
    charged: dict[str, Any] = {"kl_ref": "reward", "kl_ref_coefficient": beta} if beta else {"kl_ref": "none"}
    critic = None
    if has_critic(options_of(method, "language")()) and "baseline" not in values:
        critic = ValueModel(trunk(made_policy().model))
    method_on_it = pg.assemble(
        method, policy, sampler, critic=critic, reference=reference, world="language", **values, **charged
    )
    own = list(policy.parameters())

    def sampled() -> Tensor:
        rollout = method_on_it.sample(policy)
        batch = decisions(rollout, per_episode(rollout.mask), *method_on_it.credit(rollout))
        return flat(torch.autograd.grad(method_on_it.objective(batch)[0], own))

    found = torch.stack([sampled() for _ in range(8)]).mean(0)
    logp, logp_ref = (log_probabilities_of_all(x, prompts.tokens.long().unsqueeze(0)) for x in (policy, reference))
    possible = logp.isfinite()
    assert logp.exp().sum().item() == pytest.approx(1, abs=1e-5)
    value = (logp.exp() * (worth - beta * (logp - logp_ref.detach()).where(possible, 0.0))).where(possible, 0.0).sum()
    exact = flat(torch.autograd.grad(value, own))
    assert torch.cosine_similarity(found, exact, 0) > 0.97
    assert found.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)


@pytest.mark.parametrize(
    ("method", "beta"), [("rloo", 0.0), ("rloo", 1.0), ("reinforce", 0.5)], ids=["rloo", "rloo, KL", "reinforce, KL"]
)
def test_the_loop_ascends_that_gradient(method: str, beta: float) -> None:
    """What its optimizer was given, weights and all, is the gradient of its own credit and objective."""
    policy = made_policy(temperature=0.8)
    values = {"baseline": "mean"} if method == "reinforce" else {}
    charged: dict[str, Any] = {"kl_ref": "reward", "kl_ref_coefficient": beta} if beta else {"kl_ref": "none"}
    unmoved = {"learning_rate": 1e-30, "max_grad_norm": torch.inf}
    made = [learner(method, policy, made_sampler(seed=3), **values, **charged, **unmoved) for _ in range(2)]
    next(iter(made[0]))
    given = -flat(p.grad for p in policy.parameters() if p.grad is not None)
    rollout = made[1].sample(policy)
    batch = decisions(rollout, per_episode(rollout.mask), *made[1].credit(rollout))
    expected = flat(torch.autograd.grad(made[1].objective(batch)[0], list(policy.parameters())))
    assert given.norm() > 0
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)
