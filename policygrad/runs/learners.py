"""From options to a running algorithm: one function each, which reads like the five lines that a user would write."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Adam

from policygrad.advantages import (
    gae,
    mean_baseline,
    monte_carlo_advantage,
    n_step_advantage,
    no_baseline,
    standardize,
    time_mean_baseline,
    unnormalized,
)
from policygrad.algorithms.actor_critic import actor_critic, off_policy_actor_critic
from policygrad.algorithms.ppo import ppo
from policygrad.algorithms.reinforce import reinforce
from policygrad.algorithms.trpo import npg, trpo
from policygrad.control import Sampler
from policygrad.critics import fit_critic, no_fit, optimal_baseline, value_baseline
from policygrad.divergences import AdaptiveCoefficient
from policygrad.returns import reward_to_go, trajectory_return
from policygrad.runs.options import (
    NPG,
    PPO,
    TRPO,
    ActorCritic,
    NaturalOptions,
    OffPolicyActorCritic,
    Options,
    Reinforce,
)
from policygrad.updates import kl_radius, learning_rate, natural_step, trust_region_step


@dataclass
class Learner:
    """A running algorithm, and the objects besides policy, critic and sampler that change as it runs."""

    iterations: Iterator[dict[str, Tensor | float]]
    optimizers: list[Adam]
    others: dict[str, Any] = field(default_factory=dict)


def build(options: Options, policy: nn.Module, critic: nn.Module, sampler: Sampler) -> Learner:
    """The learner that the options describe."""
    return BUILDERS[type(options)](options, policy, critic, sampler)


def _reinforce(options: Reinforce, policy: nn.Module, critic: nn.Module, sampler: Sampler) -> Learner:
    optimizer = _adam(options, options.learning_rate, policy)
    critic_optimizer = _adam(options, options.critic_learning_rate, critic)
    baselines: dict[str, Callable] = {
        "none": no_baseline,
        "mean": mean_baseline,
        "time_mean": time_mean_baseline,
        "optimal": partial(optimal_baseline, policy=policy),
        "value": partial(value_baseline, critic=critic),
    }
    iterations = reinforce(
        policy,
        sampler,
        optimizer,
        gamma=options.gamma,
        returns={"reward_to_go": reward_to_go, "trajectory_return": trajectory_return}[options.returns],
        baseline=baselines[options.baseline],
        fit=_fit(options, critic, critic_optimizer) if options.baseline == "value" else no_fit,
        discounted=options.discounted,
        entropy_coefficient=options.entropy_coefficient,
        normalize=standardize if options.normalize_advantages else unnormalized,
        max_grad_norm=options.max_grad_norm,
    )
    return Learner(iterations, [optimizer, critic_optimizer])


def _actor_critic(options: ActorCritic, policy: nn.Module, critic: nn.Module, sampler: Sampler) -> Learner:
    optimizer = _adam(options, options.learning_rate, policy, critic)
    advantages: dict[str, Callable] = {
        "gae": partial(gae, lam=options.lam),
        "n_step": partial(n_step_advantage, n=options.n),
        "monte_carlo": monte_carlo_advantage,
    }
    iterations = actor_critic(
        policy,
        critic,
        sampler,
        optimizer,
        gamma=options.gamma,
        advantages=advantages[options.advantage],
        entropy_coefficient=options.entropy_coefficient,
        value_coefficient=options.value_coefficient,
        normalize=standardize if options.normalize_advantages else unnormalized,
        max_grad_norm=options.max_grad_norm,
    )
    return Learner(iterations, [optimizer])


def _off_policy_actor_critic(
    options: OffPolicyActorCritic, policy: nn.Module, critic: nn.Module, sampler: Sampler
) -> Learner:
    optimizer = _adam(options, options.learning_rate, policy, critic)
    iterations = off_policy_actor_critic(
        policy,
        critic,
        sampler,
        optimizer,
        gamma=options.gamma,
        lam=options.lam,
        rho_bar=options.rho_bar,
        c_bar=options.c_bar,
        epochs=options.epochs,
        entropy_coefficient=options.entropy_coefficient,
        value_coefficient=options.value_coefficient,
        normalize=standardize if options.normalize_advantages else unnormalized,
        max_grad_norm=options.max_grad_norm,
    )
    return Learner(iterations, [optimizer])


def _npg(options: NPG, policy: nn.Module, critic: nn.Module, sampler: Sampler) -> Learner:
    rules = {
        "kl_radius": partial(kl_radius, delta=options.delta),
        "learning_rate": partial(learning_rate, rate=options.natural_learning_rate),
    }
    step = partial(natural_step, step_size=rules[options.step_rule], damping=options.damping, cg_iters=options.cg_iters)
    return _natural(partial(npg, step=step), options, policy, critic, sampler)


def _trpo(options: TRPO, policy: nn.Module, critic: nn.Module, sampler: Sampler) -> Learner:
    step = partial(
        trust_region_step,
        delta=options.delta,
        damping=options.damping,
        cg_iters=options.cg_iters,
        backtracks=options.backtracks,
        shrink=options.shrink,
    )
    return _natural(partial(trpo, step=step), options, policy, critic, sampler)


def _natural(
    algorithm: Callable, options: NaturalOptions, policy: nn.Module, critic: nn.Module, sampler: Sampler
) -> Learner:
    optimizer = _adam(options, options.learning_rate, critic)
    iterations = algorithm(
        policy,
        critic,
        sampler,
        _fit(options, critic, optimizer),
        gamma=options.gamma,
        lam=options.lam,
        normalize=standardize if options.normalize_advantages else unnormalized,
    )
    return Learner(iterations, [optimizer])


def _ppo(options: PPO, policy: nn.Module, critic: nn.Module, sampler: Sampler) -> Learner:
    optimizer = _adam(options, options.learning_rate, policy, critic)
    penalty = None
    if options.kl_coefficient > 0:
        penalty = AdaptiveCoefficient(options.kl_coefficient, options.kl_coefficient_target)
    where = options.advantage_normalization
    iterations = ppo(
        policy,
        critic,
        sampler,
        optimizer,
        gamma=options.gamma,
        lam=options.lam,
        epochs=options.epochs,
        minibatch_size=options.minibatch_size,
        clip=(options.clip, options.clip),
        penalty=penalty,
        target_kl=options.target_kl,
        entropy_coefficient=options.entropy_coefficient,
        value_coefficient=options.value_coefficient,
        value_clip=options.value_clip,
        dual_clip_bound=options.dual_clip_bound,
        max_grad_norm=options.max_grad_norm,
        normalize_batch=standardize if where == "batch" else unnormalized,
        normalize_minibatch=standardize if where == "minibatch" else unnormalized,
    )
    return Learner(iterations, [optimizer], {} if penalty is None else {"kl_coefficient": penalty})


BUILDERS: dict[type[Options], Callable[..., Learner]] = {
    Reinforce: _reinforce,
    ActorCritic: _actor_critic,
    OffPolicyActorCritic: _off_policy_actor_critic,
    NPG: _npg,
    TRPO: _trpo,
    PPO: _ppo,
}


def _adam(options: Options, rate: float, *modules: nn.Module) -> Adam:
    # A dict keeps their order and takes each once: policy and critic may share a trunk.
    parameters = dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad)
    return Adam(list(parameters), lr=rate, eps=options.adam_epsilon, fused=True)


def _fit(options: Any, critic: nn.Module, optimizer: Adam) -> Callable:
    return partial(
        fit_critic,
        critic=critic,
        optimizer=optimizer,
        epochs=options.critic_epochs,
        minibatch_size=options.critic_minibatch_size,
    )
