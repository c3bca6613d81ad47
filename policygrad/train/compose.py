"""Build the pieces of a method from its options, and put them together.

Each function here reads like the line of Python that a user would write.
"""

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from policygrad import advantages, ranks, returns, score, weights
from policygrad.advantages import standardize, standardize_alone, unnormalized
from policygrad.algorithms.actor_critic import ActorCriticObjective, actor_critic
from policygrad.algorithms.grpo import Anchor, Gain, GRPOObjective, Penalty, grpo, measured_in_steps
from policygrad.algorithms.ppo import PPOObjective, ppo
from policygrad.algorithms.reinforce import ReinforceObjective, reinforce
from policygrad.algorithms.trpo import SurrogateObjective, trpo
from policygrad.compiling import graph
from policygrad.credit import (
    Assign,
    baselined,
    bootstrapped,
    covariance_charged,
    covariance_thinned,
    demonstrated,
    discounted,
    grouped,
    high_entropy,
    imitating,
    selected,
    standardized,
    vtrace,
)
from policygrad.critics import (
    Fit,
    fit_critic,
    no_fit,
    optimal_baseline,
    optimal_token_baseline,
    start_value_baseline,
    value_baseline,
)
from policygrad.diagnostics import after_update
from policygrad.divergences import (
    AdaptiveCoefficient,
    AdaptiveEntropy,
    Divergence,
    absolute,
    at_action,
    binary_kl,
    binary_total_variation,
    k1,
    k2,
    k3,
    kl_from_old,
    over_actions,
    reweighted,
    squared_row,
    to_reference,
    total_variation,
)
from policygrad.errors import UserError
from policygrad.functions import load_function
from policygrad.guards import Guard
from policygrad.noise import NoiseMeter
from policygrad.objectives import (
    Filter,
    clipped_surrogate,
    clipped_weight,
    gamma_weight,
    sigmoid_gate,
    within_divergence,
    without_drifted,
)
from policygrad.rollout import Batch, Split, decisions, state_size
from policygrad.samplers import (
    Following,
    Gathered,
    InUnits,
    KLCharged,
    Mixed,
    Overlapped,
    Refreshed,
    Rescored,
    Sample,
    Together,
    WholeRows,
    WithoutFlatGroups,
)
from policygrad.symmetry import mirrored
from policygrad.train.keywords import Keywords
from policygrad.train.methods import KNOWN, method_named
from policygrad.train.options import (
    EPISODIC,
    WITHOUT_GRAPH,
    OptionError,
    has_critic,
    options_of,
    validate,
    with_rate,
    with_values,
)
from policygrad.turns import bootstrapped_by_turn, grouped_by_state
from policygrad.updates import (
    Beside,
    MasterWeights,
    MasterWeightsAdam,
    MasterWeightsAdamW,
    MasterWeightsMuon,
    MasterWeightsSGD,
    Metrics,
    Objective,
    Update,
    ascend,
    kl_radius,
    learning_rate,
    natural_step,
    trust_region_step,
)

COMPILE_PAYS = 30_000  # gradient steps: twice as many as save the time that a graph takes
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "token": weights.per_token, "row": weights.per_row, "episode": weights.per_episode, "budget": weights.per_budget,
}  # fmt: skip
RATIOS = {
    "token": score.token_ratio, "sequence": score.sequence_ratio, "sequence_token": score.sequence_token_ratio,
    "product": score.product_ratio,
}  # fmt: skip
GAINS: dict[str, Callable[..., Tensor]] = {
    "surrogate": clipped_surrogate, "weight": clipped_weight, "sigmoid": sigmoid_gate, "gamma": gamma_weight,
    "score": score.score,
}  # fmt: skip
RETURNS = {"reward_to_go": returns.reward_to_go, "trajectory_return": returns.trajectory_return}
BASELINES = {
    "none": advantages.no_baseline,
    "mean": advantages.mean_baseline,
    "time_mean": advantages.time_mean_baseline,
    "greedy": advantages.greedy_baseline,
    "length_weighted": advantages.length_weighted_mean,
}
GROUP_BASELINES = {
    "mean": advantages.group_mean, "leave_one_out": advantages.leave_one_out, "other_best": advantages.other_best,
}  # fmt: skip
GROUP_SCALES = {
    "std": advantages.group_scale, "none": advantages.unit_scale, "mean": advantages.mean_scale,
    "batch": advantages.batch_scale,
}  # fmt: skip
PENALTIES: dict[str, Penalty] = {
    "k3": lambda logp, logp_old, mask: k3(logp_old, logp), "absolute": absolute, "squared_row": squared_row,
}  # fmt: skip
FROM_OLD: dict[str, Callable[..., Tensor]] = {
    "binary_tv": binary_total_variation, "binary_kl": binary_kl, "tv": total_variation, "kl": kl_from_old,
}  # fmt: skip
DIVERGENCES: dict[str, Divergence] = {
    "straight_through": reweighted,
    "k1": partial(at_action, estimate=k1),
    "k2": partial(at_action, estimate=k2),
    "k3": partial(at_action, estimate=k3),
    "exact": over_actions,
}
OVER_ACTIONS = ("tv", "kl")  # divergences over all actions, for which a copy of the old policy is kept
LOOPS: dict[str, Callable[..., Iterator[Any]]] = {
    "reinforce": reinforce, "actor_critic": actor_critic, "surrogate": trpo, "ppo": ppo, "grpo": grpo,
    "clone": ppo,
}  # fmt: skip


@dataclass
class Learner:
    """The pieces of a method, with the optimizers and coefficients that change as it runs."""

    sample: Sample
    credit: Assign
    objective: Objective
    update: Update
    loop: Callable[..., Iterator[dict[str, Tensor | float]]]  # takes the four pieces above
    optimizers: list[Optimizer]
    coefficients: dict[str, AdaptiveCoefficient | AdaptiveEntropy]
    guard: Guard
    meter: NoiseMeter | None

    def __iter__(self) -> Iterator[dict[str, Tensor | float]]:
        return self.loop(self.sample, self.credit, self.objective, self.update)


def compose(
    options: Any,
    policy: nn.Module,
    critic: nn.Module | None,
    sample: Sample,
    reference: Callable[[], nn.Module] | None = None,
    due: Callable[[], bool] = lambda: True,
    demonstrations: Sample | None = None,
) -> Learner:
    """Compose the method that the options describe, for a policy, a critic and a sampler.

    reference: makes the frozen starting policy, if KL to it is charged. due: whether the metrics of the next iteration
    will be read; if not, metrics that cost extra are skipped. demonstrations: the sampler of those that are mixed in.
    """
    if critic is not None and state_size(critic) and not state_size(policy):
        raise UserError(
            "the critic has memory, and rows of a policy without one keep none: give memory to both, or neither"
        )
    if getattr(options, "kl_ref", "none") != "none" and state_size(policy) and options.credit not in EPISODIC:
        raise OptionError(
            "kl_ref",
            "kl_ref is to a policy with a memory of its own, unknown in the midst of episodes: take credit group, "
            "whose rows are whole episodes",
        )
    coefficients, anchor, anchored = coefficients_of(options), None, None
    if "kl_ref" in coefficients:
        assert reference is not None
        anchored = reference()
        if options.kl_ref == "loss":
            anchor = partial(to_reference, reference=anchored, divergence=DIVERGENCES[options.kl_ref_estimate])
    old = deepcopy(policy).requires_grad_(False) if getattr(options, "divergence_mask", "") in OVER_ACTIONS else None
    objective = objective_of(options, policy, critic, coefficients, anchor, old)
    beside = None if demonstrations is None else mixed_in(policy, demonstrations, options.mix_weight)
    update, optimizers = update_of(options, policy, getattr(objective, "critic", None), beside)
    guard = Guard(skip=options.on_nonfinite == "skip")
    mirror = getattr(options, "symmetry", None)
    if mirror is not None:
        if state_size(policy) and options.credit not in EPISODIC:
            said = "symmetry with memory needs rows that are whole episodes, before which the memory is empty"
            raise OptionError("symmetry", f"{said}: use credit group or reward_to_go, or leave symmetry out")
        update = mirrored(update, load_function(mirror, what="symmetry"))
    meter = NoiseMeter(due) if getattr(options, "gradient_noise", "off") == "exact" else None
    update = update if meter is None else meter(update)
    fit: Fit = no_fit
    if has_critic(options) and getattr(objective, "critic", None) is None:
        assert critic is not None
        fit, own = fit_of(options, policy, critic, sample, guard)
        optimizers += own
    every = wrapped(options, policy, sample, critic, anchored, coefficients, old)
    return Learner(
        every if demonstrations is None else Mixed(every, demonstrations),
        credit_of(options, policy, critic, sample, anchored),
        objective,
        guard(update),
        loop_of(options, fit, diagnosis(options, objective, due), sample, policy),
        optimizers,
        coefficients,
        guard,
        meter,
    )


def coefficients_of(options: Any) -> dict[str, Any]:
    """The coefficients that adapt, or may, by the name of their term."""
    found: dict[str, Any] = {}
    if getattr(options, "kl_ref", "none") != "none":
        found["kl_ref"] = AdaptiveCoefficient(options.kl_ref_coefficient, options.kl_ref_target)
    if getattr(options, "kl_old_coefficient", 0):
        found["kl_old"] = AdaptiveCoefficient(options.kl_old_coefficient, options.kl_old_target)
    if getattr(options, "entropy_target", None) is not None:
        rule = AdaptiveEntropy(options.entropy_target, options.entropy_step, options.entropy_coefficient)
        found["entropy"] = rule
    return found


def fit_of(
    options: Any, policy: nn.Module, critic: nn.Module, sample: Sample, guard: Guard
) -> tuple[Fit, list[Optimizer]]:
    """The fit of a critic of its own, and its optimizers. Raises UserError if it shares parameters with the policy."""
    if {p for p in critic.parameters() if p.requires_grad} & set(policy.parameters()):
        raise UserError(
            f"critic and policy share parameters, and {options.method} fits its critic alone, which would move the "
            "policy: give the critic a network of its own, or use ppo or actor_critic"
        )
    own = optimizers_of(options, [(critic, critic_rate(options))])
    fit = fit_critic(
        critic, own, epochs=options.critic_epochs,
        minibatch_size=rows_in(sample, policy, options.critic_minibatch_size),
        micro_batch=split_of(options, policy), compiled=compiles(options), varying=varies(options), guard=guard,
    )  # fmt: skip
    return fit, own


def assemble(
    method: str,
    policy: nn.Module,
    sample: Sample,
    *,
    critic: nn.Module | None = None,
    reference: nn.Module | None = None,
    world: str = "control",
    **values: Unpack[Keywords],
) -> Learner:
    """Build a method for your own modules: `pg.dapo(policy, sample)` is `assemble("dapo", policy, sample)`.

    Iterating the result trains and yields metrics. world: the source of the default options (control, language, exact).
    critic: required if the credit needs one. reference: the reference policy of the KL penalty, by default a copy of
    `policy`. values: any option of the method. Raises UserError for an invalid value or a missing critic.
    """
    defaults = options_of(method_named(method).name, world)()
    options = with_values(defaults, values)
    validate(options, defaults)
    options = with_rate(options)
    if getattr(options, "compile", "off") == "auto":  # how long the caller goes on is not known
        options = replace(options, compile="off")
    if has_critic(options) and critic is None:
        raise UserError(f"credit {options.credit} needs a critic: hand one in, or choose another credit")
    if getattr(options, "critic_warmup", 0):
        raise OptionError("critic_warmup", "critic_warmup counts the iterations of a run: use train, or leave it out")
    if getattr(options, "mix", None) is not None:
        raise OptionError("mix", "mix is read by a run: use train, or hand compose a sampler of demonstrations")
    if options.gamma is None and (options.credit != "group" or options.discounted):
        raise UserError("gamma is None, which is for train on an exact world: give the discount factor")
    return compose(options, policy, critic, sample, lambda: reference or deepcopy(policy).requires_grad_(False))


def credit_of(
    options: Any, policy: nn.Module, critic: nn.Module | None, sample: Any = None, reference: nn.Module | None = None
) -> Assign:
    """The credit from the options. reference: lets go of what it has gathered of its weights, if they are sharded."""
    assign = _credit_of(options, policy, critic, sample)
    if not getattr(options, "shard", False):
        return assign
    from policygrad.language.sharding import cut

    def lighter(rollout: Any) -> Any:
        credit = assign(rollout)
        cut(policy, critic, reference)
        return credit

    return lighter


def _credit_of(options: Any, policy: nn.Module, critic: nn.Module | None, sample: Any) -> Assign:
    if KNOWN[options.method].objective == "clone":
        return demonstrated
    gamma, micro_batch = options.gamma, split_of(options, policy)
    if options.credit == "group":
        compared = GROUP_BASELINES[options.group_baseline], GROUP_SCALES[options.group_scale]
        weight = getattr(options, "state_weight", 0.0)
        credit = grouped_by_state(*compared, gamma=gamma, weight=weight) if weight else grouped(*compared)
    elif options.credit in RETURNS:
        baselines: dict[str, Any] = {
            **BASELINES,
            "optimal": partial(optimal_baseline, policy=policy),
            "token": partial(optimal_token_baseline, policy=policy, micro_batch=micro_batch),
            "value": partial(value_baseline, critic=critic),  # type: ignore[arg-type]
            "start_value": partial(start_value_baseline, critic=critic),  # type: ignore[arg-type]
        }
        credit = baselined(partial(RETURNS[options.credit], gamma=gamma), baselines[options.baseline])
    elif options.credit == "vtrace":
        assert critic is not None
        bars = {"lam": options.lam, "rho_bar": options.rho_bar, "c_bar": options.c_bar}
        credit = vtrace(policy, critic, gamma=gamma, **bars, micro_batch=micro_batch)
    elif getattr(options, "turn_level", False):
        assert critic is not None
        credit = bootstrapped_by_turn(critic, gamma=gamma, lam=options.lam, micro_batch=micro_batch)
    else:
        assert critic is not None
        alpha, of_critic = getattr(options, "length_adaptive_lam", None), getattr(options, "critic_lam", None)
        estimates: dict[str, Callable[..., Tensor]] = {
            "gae": partial(advantages.gae, gamma=gamma, lam=options.lam)
            if alpha is None
            else partial(advantages.gae_by_length, gamma=gamma, alpha=alpha),
            "n_step": partial(advantages.n_step_advantage, gamma=gamma, n=options.n),
            "monte_carlo": partial(advantages.monte_carlo_advantage, gamma=gamma),
        }
        target = None if of_critic is None else partial(advantages.gae, gamma=gamma, lam=of_critic)
        target = target if options.credit == "gae" else None
        credit = bootstrapped(critic, estimates[options.credit], of_critic=target, micro_batch=micro_batch)
    if options.normalize_advantages == "batch":
        credit = standardized(credit)
    if getattr(options, "learn_from", "all") == "high_entropy":
        share = options.learn_from_share
        credit = selected(credit, partial(high_entropy, policy=policy, share=share, micro_batch=micro_batch))
    if getattr(options, "kl_old_share", 1.0) < 1:
        credit = covariance_charged(credit, share=options.kl_old_share)
    if getattr(options, "learn_from", "all") == "low_covariance":
        bounds = {"low": options.covariance_low, "high": options.covariance_high}
        credit = covariance_thinned(credit, share=options.covariance_share, **bounds)
    credit = discounted(credit, gamma) if options.discounted else credit
    positive = getattr(options, "positive_weight", 0.0)
    return imitating(credit, weight=positive, weights=average_of(options, sample)) if positive else credit


def objective_of(
    options: Any,
    policy: nn.Module,
    critic: nn.Module | None,
    coefficients: dict[str, Any] | None = None,
    anchor: Anchor | None = None,
    old: nn.Module | None = None,
) -> Objective:
    """The objective from the options. old: see filters_of."""
    coefficients = coefficients or {}
    critic = critic if has_critic(options) else None
    match KNOWN[options.method].objective:
        case "reinforce" | "clone":
            return ReinforceObjective(policy, entropy_coefficient=options.entropy_coefficient)
        case "actor_critic":
            return ActorCriticObjective(
                policy,
                critic,
                entropy_coefficient=options.entropy_coefficient,
                value_coefficient=options.value_coefficient,
            )
        case "surrogate":
            return SurrogateObjective(policy, ratio=RATIOS[options.ratio])
        case "ppo":
            return PPOObjective(
                policy,
                critic,
                clip=(options.clip_low, options.clip_high),
                penalty=coefficients.get("kl_old"),
                entropy_coefficient=options.entropy_coefficient,
                value_coefficient=options.value_coefficient,
                value_clip=options.value_clip,
                dual_clip=options.dual_clip,
            )
        case "grpo":
            return GRPOObjective(
                policy,
                ratio=RATIOS[options.ratio],
                gain=gain_of(options),
                clip=(options.clip_low, options.clip_high) if options.gain in ("surrogate", "weight") else None,
                token_clip=options.token_clip,
                dual_clip=options.dual_clip,
                filters=filters_of(options, old),
                anchor=anchor,
                coefficient=None if anchor is None else coefficients["kl_ref"],
                penalty=PENALTIES[options.kl_old_estimate] if "kl_old" in coefficients else None,
                penalty_coefficient=coefficients.get("kl_old"),
                entropy_coefficient=options.entropy_coefficient,
                entropy_bonus=coefficients.get("entropy"),
            )


def gain_of(options: Any) -> Gain:
    """The gain of GRPO's objective, with the constants that are its own."""
    gain = GAINS[options.gain]
    if options.gain == "sigmoid":
        return partial(gain, positive=options.sigmoid_positive, negative=options.sigmoid_negative)
    if options.gain == "gamma":
        positive = options.gamma_power_positive, options.gamma_rate_positive
        return partial(gain, positive=positive, negative=(options.gamma_power_negative, options.gamma_rate_negative))
    return gain


def filters_of(options: Any, old: nn.Module | None) -> list[Filter]:
    """Which decisions GRPO's objective learns from. old: a copy of the policy that sampled, if all actions count."""
    filters: list[Filter] = []
    if options.divergence_mask != "none":
        divergence = FROM_OLD[options.divergence_mask]
        if options.divergence_mask in OVER_ACTIONS:
            divergence = partial(divergence, old=old)
        filters.append(partial(within_divergence, divergence=divergence, bound=options.divergence_bound))
    if options.drift_bound < math.inf:
        filters.append(partial(without_drifted, bound=options.drift_bound))
    return filters


def mixed_in(policy: nn.Module, demonstrations: Sample, weight: float) -> Beside:
    """weight * the objective of `clone`, the mean log pi of the decisions of the next demonstrations."""
    objective = ReinforceObjective(policy)

    def weighed(batch: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = objective(batch)
        return weight * value, {"mix_log_probability": metrics["objective"]}

    def draw() -> tuple[Callable[[Batch], tuple[Tensor, Metrics]], Batch]:
        rollout = demonstrations(policy)
        return weighed, decisions(rollout, weights.per_token(rollout.mask), *demonstrated(rollout))

    return draw


def update_of(
    options: Any, policy: nn.Module, critic: nn.Module | None, beside: Beside | None = None
) -> tuple[Update, list[Optimizer]]:
    """The update from the options, and its optimizers. critic: a critic that shares the policy's optimizer. beside: see
    ascend."""
    trained = {p.dtype for p in policy.parameters() if p.requires_grad}
    if KNOWN[options.method].update != "ascend" and trained & {torch.float16, torch.bfloat16}:
        raise UserError(
            f"{options.method} solves for its step, and these weights are too coarse for it: make them float32 (of a "
            "language model by dtype, or train an adapter on them by lora_rank)"
        )
    if KNOWN[options.method].update == "trust_region":
        names = ("delta", "damping", "cg_iters", "backtracks", "shrink")
        return trust_region_step(**{name: getattr(options, name) for name in names}), []
    if KNOWN[options.method].update == "natural":
        rules = {
            "kl_radius": partial(kl_radius, delta=options.delta),
            "learning_rate": partial(learning_rate, rate=options.natural_learning_rate),
        }
        step_size = rules[options.step_rule]
        return natural_step(step_size=step_size, damping=options.damping, cg_iters=options.cg_iters), []
    parts = [(policy, options.learning_rate)] + ([] if critic is None else [(critic, critic_rate(options))])
    optimizers = optimizers_of(options, parts)
    limits = {"max_grad_norm": options.max_grad_norm, "micro_batch": split_of(options, policy)}
    return ascend(optimizers, **limits, beside=beside, compiled=compiles(options), varying=varies(options)), optimizers


def loop_of(
    options: Any, fit: Fit, diagnose: Callable[[Objective, Batch], Metrics], sample: Sample, policy: nn.Module
) -> Callable[..., Iterator[Any]]:
    """The method's loop, a partial that still takes sample, credit, objective and update."""
    named = KNOWN[options.method].objective
    loop = partial(LOOPS[named], weights=average_of(options, sample), fit=fit, diagnose=diagnose)
    if named == "clone":
        size = rows_in(sample, policy, options.minibatch_size)
        return partial(loop, epochs=1, minibatch_size=size, normalize=unnormalized)
    if named not in ("ppo", "grpo"):
        return partial(loop, epochs=getattr(options, "epochs", 1))
    normalize: Callable[..., Tensor] = standardize if options.normalize_advantages == "minibatch" else unnormalized
    if compiles(options) and normalize is standardize and ranks.size() == 1:  # sums over ranks have no graph
        normalize = graph(standardize_alone, standardize_alone, 2 * varies(options))
    return partial(
        loop,
        epochs=options.epochs,
        minibatch_size=rows_in(sample, policy, options.minibatch_size),
        target_kl=options.target_kl,
        normalize=normalize,
    )


def average_of(options: Any, sample: Any) -> Callable[[Tensor], Tensor]:
    """How the method averages decisions: mask -> weights."""
    if options.weights == "budget":
        return partial(weights.per_budget, limit=getattr(sample, "length", None))
    return WEIGHTS[options.weights]


def rows_in(sample: Any, policy: nn.Module, size: Any) -> Any:
    """The rows of a minibatch of `size` decisions, where rows are segments of a policy with memory; else `size`."""
    if size is None or not state_size(policy) or getattr(sample, "whole_episodes", True):
        return size
    return max(1, size // (sample.length // sample.pieces))


def diagnosis(options: Any, objective: Objective, due: Callable[[], bool]) -> Callable[[Objective, Batch], Metrics]:
    """The function that measures an update, for metrics and for an adaptive penalty."""
    named = KNOWN[options.method].objective
    penalty = getattr(objective, "penalty", None)
    reads = penalty is not None and penalty.adapts
    if (named == "grpo" and options.world == "language" and not reads) or named == "clone":
        return measured_in_steps  # another forward pass of a large model is expensive
    report = partial(after_update, micro_batch=split_of(options, objective.policy))
    return lambda objective, batch: report(objective, batch) if reads or due() else {}


def wrapped(
    options: Any,
    policy: nn.Module,
    sample: Sample,
    critic: nn.Module | None,
    reference: nn.Module | None,
    coefficients: dict[str, Any],
    old: nn.Module | None = None,
) -> Sample:
    """The sampler in the wrappers that the options require, in the required order."""
    micro_batch = split_of(options, policy)
    lag = getattr(options, "lag", 0) or int(getattr(options, "overlap", False))
    if lag and getattr(options, "samplers", None) is None:  # remote ones sample ahead by themselves
        sample = Overlapped(sample, lag)
    if ranks.size() > 1:
        sample = Together(sample)
    if has_critic(options) and hasattr(critic, "rescale") and not getattr(options, "scale_rewards", False):
        sample = InUnits(sample, critic)  # of the task's rewards: a KL is charged to every decision
    if getattr(options, "shard", False):
        from policygrad.language.sharding import whole

        sample = Gathered(sample, whole)
    if old is not None:
        sample = Following(sample, old)
    if reads_rows(options):
        sample = WholeRows(sample)
    if getattr(options, "credit", None) == "group" and options.sampling_rounds > 1:
        sample = WithoutFlatGroups(sample, options.sampling_rounds)
    if getattr(options, "old_logp", "sampled") == "recomputed":
        sample = Rescored(
            sample, options.importance_bound, micro_batch, ratio=RATIOS[options.importance_level],
            low=options.importance_low, drop=options.importance_outside == "drop",
            normalize=options.importance_normalized,
        )  # fmt: skip
    if reference is not None and options.reference_every is not None:
        sample = Refreshed(sample, reference, every=options.reference_every)
    if reference is not None and options.reference_decay is not None:
        sample = Refreshed(sample, reference, decay=options.reference_decay)
    if reference is not None and options.kl_ref == "reward":
        sample = KLCharged(sample, reference, coefficients["kl_ref"], micro_batch)
    return sample


def reads_rows(options: Any) -> bool:
    """Whether the objective looks at whole rows."""
    of_rows = getattr(options, "ratio", "token") != "token" or getattr(options, "drift_bound", math.inf) < math.inf
    return of_rows or getattr(options, "kl_old_estimate", "k3") == "squared_row"


def split_of(options: Any, policy: nn.Module) -> Split:
    """The rows computed at a time; a policy whose rows are of unequal length parts them itself."""
    rows, tokens = (getattr(options, name, None) for name in ("micro_batch", "micro_batch_tokens"))
    parts = getattr(policy, "parts", None)
    return rows if parts is None else partial(parts, rows=rows, tokens=tokens)


def compiles(options: Any) -> bool:
    """Whether gradient steps are compiled: a graph takes some seconds to make, and saves about a millisecond a step."""
    wanted = getattr(options, "compile", "off")
    if wanted != "auto":
        return wanted == "on"
    if options.optimizer in WITHOUT_GRAPH:
        return False
    if not hasattr(options, "credit"):  # how many decisions the demonstrations are is not known
        return False
    if getattr(options, "agents", "shared") == "separate":  # how many rows are whose differs from batch to batch
        return False
    if getattr(options, "memory", "none") != "none":  # a graph of every step of a row takes minutes to make
        return False
    steps = math.inf if options.steps is None else options.steps
    rollout = options.num_envs * (math.inf if options.credit in EPISODIC else getattr(options, "num_steps", math.inf))
    if options.iterations is not None and rollout == math.inf:  # how many decisions they are is not known
        return False
    decisions, updates = min(steps, (options.iterations or math.inf) * rollout), 0.0
    if getattr(options, "minibatch_size", None):
        updates += decisions * options.epochs / options.minibatch_size
    elif KNOWN[options.method].update == "ascend":
        updates += decisions * getattr(options, "epochs", 1) / rollout
    if has_critic(options) and hasattr(options, "critic_epochs"):
        updates += decisions * options.critic_epochs / options.critic_minibatch_size
    return COMPILE_PAYS <= updates < math.inf


def varies(options: Any) -> bool:
    """Whether rollouts have different numbers of steps: those of whole episodes have as many as the longest."""
    return options.world == "control" and getattr(options, "credit", None) in EPISODIC


def critic_rate(options: Any) -> float:
    """The learning rate of the critic's parameters."""
    rate = options.critic_learning_rate
    return options.learning_rate if rate is None else rate


def optimizers_of(options: Any, parts: list[tuple[nn.Module, float]]) -> list[Optimizer]:
    """The optimizer, with a learning rate for each module. Parameters shared by two modules use the first one's rate.

    Muon is for matrices that are no embeddings; AdamW takes the other parameters. Its rate is adjusted to the size of
    AdamW's steps (Liu et al. 2025, arXiv 2502.16982), so that one rate serves both.
    """
    groups: list[dict[str, Any]] = []
    taken, embeddings = set[nn.Parameter](), set[nn.Parameter]()
    for module, rate in parts:
        embeddings |= {p for x in module.modules() if isinstance(x, nn.Embedding) for p in x.parameters()}
        parameters = [p for p in module.parameters() if p.requires_grad and p not in taken]
        taken |= set(parameters)
        groups.append({"params": parameters, "lr": rate})
    if options.optimizer != "muon":
        return _made(options, options.optimizer, groups)
    matrices = {p for p in taken if p.ndim == 2} - embeddings

    def only(kept: set[nn.Parameter]) -> list[dict[str, Any]]:
        return [group | {"params": [p for p in group["params"] if p in kept]} for group in groups]

    return _made(options, "muon", only(matrices)) + _made(options, "adamw", only(taken - matrices))


def _made(options: Any, name: str, groups: list[dict[str, Any]]) -> list[Optimizer]:
    """The optimizer of a name for these groups of parameters; none if there are no parameters."""
    groups = [group for group in groups if group["params"]]
    if not groups:
        return []
    given = {"weight_decay": options.weight_decay}
    if name in ("adam", "adamw"):
        make = MasterWeightsAdam if name == "adam" else MasterWeightsAdamW
        return [make(groups, eps=options.adam_epsilon, fused=True, **given)]
    if name == "adamw_8bit":
        return [adamw_8bit(groups, eps=options.adam_epsilon, **given)]
    given |= {} if options.momentum is None else {"momentum": options.momentum}
    if name == "sgd":
        return [MasterWeightsSGD(groups, **given)]
    return [MasterWeightsMuon(groups, adjust_lr_fn="match_rms_adamw", **given)]


def adamw_8bit(params: Any, **options: Any) -> Optimizer:
    """AdamW on master weights with moments in 8 bits, by bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861).

    Each block of 256 numbers has its own scale. Parameters of fewer than 4,096 numbers keep moments in float32. Raises
    UserError if bitsandbytes is not installed.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise UserError("adamw_8bit needs bitsandbytes: pip install policygrad[quantize]") from error
    return type("MasterWeightsAdamW8bit", (MasterWeights, AdamW8bit), {})(params, **options)
