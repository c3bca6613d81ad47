"""From options to a running algorithm on a language model: the pieces, put together as a user would."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
from torch import nn
from torch.optim import Adam
from transformers import AutoModel

from policygrad.advantages import standardize, unnormalized
from policygrad.algorithms import variants
from policygrad.algorithms.grpo import grpo
from policygrad.algorithms.ppo import ppo
from policygrad.divergences import (
    AdaptiveCoefficient,
    Divergence,
    at_action,
    k1,
    k2,
    k3,
    over_actions,
    reweighted,
    to_reference,
)
from policygrad.errors import UserError
from policygrad.language import models
from policygrad.language.policies import LanguagePolicy, ValueModel, reference_of, trunk
from policygrad.runs.language.options import (
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    RLOO,
    DrGRPO,
    LanguageOptions,
    LanguagePPO,
    ReinforcePlusPlus,
)
from policygrad.runs.learners import Learner
from policygrad.samplers import KLCharged, Rescored, Sample, WithoutFlatGroups
from policygrad.weights import per_token

METHODS: dict[type[LanguageOptions], Callable] = {
    GRPO: grpo,
    DrGRPO: variants.dr_grpo,
    DAPO: variants.dapo,
    GSPO: variants.gspo,
    CISPO: variants.cispo,
    RLOO: variants.rloo,
    ReinforcePlusPlus: variants.reinforce_plus_plus,
}
DIVERGENCES: dict[str, Divergence] = {
    "straight_through": reweighted,
    "k1": partial(at_action, estimate=k1),
    "k2": partial(at_action, estimate=k2),
    "k3": partial(at_action, estimate=k3),
    "exact": over_actions,
}


def build(options: LanguageOptions, policy: LanguagePolicy, sample: Sample) -> Learner:
    """The learner that the options describe. The policy must be untrained: it is its own reference."""
    coefficient = AdaptiveCoefficient(options.kl_coefficient, options.kl_target)
    reference = None if options.kl == "none" else reference_of(policy)
    if options.sampling_rounds > 1:
        sample = WithoutFlatGroups(sample, options.sampling_rounds)
    if options.old_logp == "recomputed":
        sample = Rescored(sample, options.importance_bound, options.micro_batch)
    if reference is not None and options.kl == "reward":
        sample = KLCharged(sample, reference, coefficient, options.micro_batch)
    if isinstance(options, LanguagePPO):
        learner = _ppo(options, policy, sample)
    else:
        assert isinstance(options, GRPO)
        learner = _grpo(options, policy, sample, reference, coefficient)
    learner.others |= {"sample": sample, "coefficient": coefficient}
    return learner


def _grpo(
    options: GRPO,
    policy: LanguagePolicy,
    sample: Sample,
    reference: nn.Module | None,
    coefficient: AdaptiveCoefficient,
) -> Learner:
    optimizer = _adam(options, [(policy, options.learning_rate)])
    anchor = None
    if reference is not None and options.kl == "loss":
        anchor = partial(to_reference, reference=reference, divergence=DIVERGENCES[options.kl_estimate])
    iterations = METHODS[type(options)](
        policy,
        sample,
        optimizer,
        clip=(options.clip_low, options.clip_high),
        anchor=anchor,
        coefficient=coefficient,
        entropy_coefficient=options.entropy_coefficient,
        epochs=options.epochs,
        minibatch_size=options.minibatch_size,
        micro_batch=options.micro_batch,
        max_grad_norm=options.max_grad_norm,
    )
    return Learner(iterations, [optimizer])


def _ppo(options: LanguagePPO, policy: LanguagePolicy, sample: Sample) -> Learner:
    critic = critic_of(policy, options)
    optimizer = _adam(options, [(policy, options.learning_rate), (critic, options.critic_learning_rate)])
    rows = options.prompts_per_rollout * options.completions
    iterations = ppo(
        policy,
        critic,
        sample,
        optimizer,
        gamma=options.gamma,
        lam=options.lam,
        epochs=options.epochs,
        minibatch_size=options.minibatch_size or rows,
        micro_batch=options.micro_batch,
        clip=(options.clip_low, options.clip_high),
        entropy_coefficient=options.entropy_coefficient,
        value_coefficient=options.value_coefficient,
        value_clip=options.value_clip,
        max_grad_norm=options.max_grad_norm,
        normalize_batch=standardize if options.normalize_advantages else unnormalized,
        normalize_minibatch=unnormalized,
        weights=per_token,
    )
    return Learner(iterations, [optimizer], {"critic": critic})


def critic_of(policy: LanguagePolicy, options: LanguagePPO) -> ValueModel:
    """The critic that the options name. Raises UserError for a model of another vocabulary."""
    autocast = torch.bfloat16 if options.autocast == "bfloat16" else None
    if options.critic == "shared":
        return ValueModel(trunk(policy.model), autocast=autocast)
    if options.critic == "copy":
        return ValueModel(deepcopy(trunk(policy.model)), autocast=autocast)
    other = models.load_model(
        options.critic,
        dtype=options.dtype,
        attention=options.attention,
        trust_remote_code=options.trust_remote_code,
        kind=AutoModel,  # no head: a reward model will do
    ).to(options.device)  # type: ignore[arg-type]
    mine, its = (len(x.get_input_embeddings().weight) for x in (trunk(policy.model), other))  # type: ignore
    if its < mine:
        raise UserError(
            f"the critic {options.critic} has embeddings for {its:,} tokens and the policy for {mine:,}: "
            "give one of the same tokenizer"
        )
    return ValueModel(other, autocast=autocast)


def _adam(options: LanguageOptions, parts: list[tuple[nn.Module, float]]) -> Adam:
    """Adam with a rate for each module; what two of them share is trained at the rate of the first."""
    groups, taken = [], set[nn.Parameter]()
    for module, rate in parts:
        parameters = [p for p in module.parameters() if p.requires_grad and p not in taken]
        taken |= set(parameters)
        groups.append({"params": parameters, "lr": rate})
    return Adam(groups, eps=options.adam_epsilon, fused=True)
