"""What can be set, with its default, meaning and bounds. No torch here: --help must be instant."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from policygrad.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every algorithm has."""

    steps: int = 1_000_000
    """Decisions to train on; the iteration that reaches them is the last."""
    seed: int = 0
    """Of the parameters, the actions, the minibatches and the environments."""
    stop_at_return: float = math.inf
    """Stop early once the mean return of the last 100 episodes reaches this."""
    num_envs: int = 8
    """Environments stepped together."""
    num_steps: int | None = 128
    """Steps of each environment in one rollout."""
    vectorization: Literal["auto", "sync", "async"] = "auto"
    """auto: the environment's own vectorised form, else sync; async: a process for each environment."""
    gamma: float = 0.99
    """Discount factor."""
    learning_rate: float = 3e-4
    """Of Adam."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """linear: down to 0 at the last step."""
    adam_epsilon: float = 1e-5
    """Added to Adam's denominator."""
    normalize_observations: bool = False
    """By running mean and standard deviation, saved with the policy."""
    scale_rewards: bool = False
    """By the running standard deviation of the discounted return."""
    hidden: tuple[int, ...] = (64, 64)
    """Sizes of the hidden layers, of policy and critic alike."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """Between the layers."""
    orthogonal: bool = True
    """Orthogonal initialisation, the policy's last layer small; else torch's own."""
    squash: bool = False
    """Squash Box actions onto their bounds by tanh; else clip them there."""
    state_dependent_std: bool = False
    """The Gaussian's standard deviation is an output of the network; else a parameter."""
    initial_log_std: float = 0.0
    """The Gaussian's first log standard deviation."""
    device: str = "cpu"
    """Where policy and critic live: cpu, cuda, cuda:1, mps."""
    threads: int = 1
    """Of torch on the CPU: small networks are fastest with one."""


@dataclass(frozen=True, kw_only=True)
class Reinforce(Options):
    """REINFORCE on whole episodes: log pi (G - b), with reward-to-go and a choice of baselines."""

    num_steps: int | None = None
    """Longest episode; None: the environment's own time limit."""
    learning_rate: float = 3e-3
    """Of Adam."""
    returns: Literal["reward_to_go", "trajectory_return"] = "reward_to_go"
    """What a decision is credited with: what came after it, or its whole episode's return."""
    baseline: Literal["none", "mean", "time_mean", "optimal", "value"] = "value"
    """Subtracted from the return: nothing, the other episodes' mean, their mean at that step, the constant of least
    variance, or a learned value."""
    discounted: bool = False
    """Weigh step t by gamma^t: the true gradient of the discounted return."""
    normalize_advantages: bool = False
    """Standardise the advantages over the batch."""
    entropy_coefficient: float = 0.0
    """Of the entropy in the objective."""
    max_grad_norm: float = math.inf
    """The gradient is scaled down to this norm."""
    critic_learning_rate: float = 1e-3
    """Of the learned value's Adam."""
    critic_epochs: int = 10
    """Passes over the batch for the learned value."""
    critic_minibatch_size: int = 256
    """Its minibatches."""


@dataclass(frozen=True, kw_only=True)
class ActorCritic(Options):
    """Advantage actor-critic (A2C): log pi A with a bootstrapped advantage, one gradient step a rollout."""

    num_steps: int | None = 16
    """Steps of each environment in one rollout."""
    learning_rate: float = 7e-4
    """Of Adam."""
    advantage: Literal["gae", "n_step", "monte_carlo"] = "gae"
    """gae: TD(lambda), with lam; n_step: with n; monte_carlo: TD(1)."""
    lam: float = 1.0
    """Lambda of gae: 0 is the one-step TD error, 1 Monte Carlo."""
    n: int = 5
    """Rewards counted by n_step before the critic takes over."""
    normalize_advantages: bool = False
    """Standardise the advantages over the batch."""
    entropy_coefficient: float = 0.0
    """Of the entropy in the objective."""
    value_coefficient: float = 0.5
    """Of the critic's squared error in the objective."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""


@dataclass(frozen=True, kw_only=True)
class OffPolicyActorCritic(Options):
    """Actor-critic that uses a rollout several times, corrected by V-trace (IMPALA)."""

    num_steps: int | None = 16
    """Steps of each environment in one rollout."""
    learning_rate: float = 7e-4
    """Of Adam."""
    epochs: int = 4
    """Gradient steps on each rollout, credit assigned afresh before each."""
    lam: float = 1.0
    """Factor of V-trace's trace weights."""
    rho_bar: float = 1.0
    """Bound of the ratio in V-trace's TD error: which policy's values are learned."""
    c_bar: float = 1.0
    """Bound of the ratio in V-trace's traces: how fast."""
    normalize_advantages: bool = False
    """Standardise the advantages over the batch."""
    entropy_coefficient: float = 0.0
    """Of the entropy in the objective."""
    value_coefficient: float = 0.5
    """Of the critic's squared error in the objective."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""


@dataclass(frozen=True, kw_only=True)
class NaturalOptions(Options):
    """What the methods of the natural gradient share. The learning rate is the critic's."""

    learning_rate: float = 1e-3
    """Of the critic's Adam."""
    lam: float = 0.95
    """Lambda of GAE."""
    normalize_advantages: bool = True
    """Standardise the advantages over the batch."""
    delta: float = 0.01
    """Radius of the trust region: KL(old, new) of a step."""
    damping: float = 0.1
    """Added to the diagonal of the Fisher matrix."""
    cg_iters: int = 10
    """Fisher-vector products of the conjugate gradient."""
    critic_epochs: int = 10
    """Passes over the rollout for the critic."""
    critic_minibatch_size: int = 128
    """The critic's minibatches."""


@dataclass(frozen=True, kw_only=True)
class TRPO(NaturalOptions):
    """Trust-region policy optimisation: the natural step inside KL(old, new) <= delta, with a line search."""

    backtracks: int = 10
    """Steps tried before the policy is left as it was."""
    shrink: float = 0.8
    """Factor from one try to the next."""


@dataclass(frozen=True, kw_only=True)
class NPG(NaturalOptions):
    """Natural policy gradient: theta + alpha F^-1 g, without a line search."""

    step_rule: Literal["kl_radius", "learning_rate"] = "kl_radius"
    """kl_radius: alpha = sqrt(2 delta / g.F^-1 g); learning_rate: a plain alpha."""
    natural_learning_rate: float = 0.1
    """alpha of the step rule learning_rate."""


@dataclass(frozen=True, kw_only=True)
class PPO(Options):
    """Proximal policy optimisation: the clipped surrogate, several epochs of minibatches; or a KL penalty; or both."""

    lam: float = 0.95
    """Lambda of GAE."""
    epochs: int = 10
    """Passes over a rollout."""
    minibatch_size: int = 64
    """Decisions in a gradient step."""
    clip: float = 0.2
    """The ratio is clipped to [1 - clip, 1 + clip]; inf clips nothing."""
    kl_coefficient: float = 0.0
    """First beta of the penalty beta KL(old, new); 0: no penalty."""
    kl_coefficient_target: float = math.inf
    """KL that beta adapts to; inf: beta stays."""
    target_kl: float = math.inf
    """The epochs end early once a minibatch's KL exceeds 1.5 times this."""
    entropy_coefficient: float = 0.0
    """Of the entropy in the objective."""
    value_coefficient: float = 0.5
    """Of the critic's squared error in the objective."""
    value_clip: float = math.inf
    """Clip the critic's change to this; inf: not at all."""
    dual_clip_bound: float = math.inf
    """Floor of the objective for bad actions, as a multiple of the advantage (> 1); inf: none."""
    advantage_normalization: Literal["minibatch", "batch", "none"] = "minibatch"
    """Where advantages are standardised."""
    max_grad_norm: float = 0.5
    """The gradient is scaled down to this norm."""


ALGORITHMS: dict[str, type[Options]] = {
    "reinforce": Reinforce,
    "actor_critic": ActorCritic,
    "off_policy_actor_critic": OffPolicyActorCritic,
    "npg": NPG,
    "trpo": TRPO,
    "ppo": PPO,
}
ALIASES = {"a2c": "actor_critic"}

# What else the options make of the algorithms: (name, how, what it is).
VARIANTS = (
    ("a2c", "actor_critic", "synchronous advantage actor-critic, by its usual name"),
    ("PPO with a KL penalty", "ppo --clip inf --kl-coefficient 1 --kl-coefficient-target 0.01", "adaptive beta"),
    ("PPO with both", "ppo --kl-coefficient 1 --kl-coefficient-target 0.01", "clipped and penalised"),
    ("PPO with dual clip", "ppo --dual-clip-bound 3", "a floor for bad actions that became likely"),
    ("natural gradient", "npg --step-rule learning_rate", "Kakade's plain learning rate along F^-1 g"),
    ("one-step actor-critic", "actor_critic --advantage n_step --n 1", "the TD error as the advantage"),
    ("true discounted gradient", "reinforce --discounted", "with the factor gamma^t that is usually dropped"),
)

UNIT = ("gamma", "lam")
FRACTION = ("shrink",)
COUNTS: tuple[str, ...] = (
    "steps",
    "num_envs",
    "num_steps",
    "epochs",
    "minibatch_size",
    "critic_epochs",
    "critic_minibatch_size",
)
COUNTS += ("backtracks", "cg_iters", "n", "threads")
POSITIVE: tuple[str, ...] = (
    "learning_rate",
    "critic_learning_rate",
    "natural_learning_rate",
    "adam_epsilon",
    "clip",
    "delta",
)
POSITIVE += ("target_kl", "kl_coefficient_target", "max_grad_norm", "value_clip", "rho_bar", "c_bar")
FINITE = ("learning_rate", "critic_learning_rate", "natural_learning_rate", "adam_epsilon", "initial_log_std", "delta")
NOT_NEGATIVE = ("damping", "kl_coefficient", "entropy_coefficient", "value_coefficient", "seed")


def algorithm_named(name: str) -> str:
    """The name of an algorithm in full. Raises UserError with the nearest names if there is none."""
    full = ALIASES.get(name.replace("-", "_"), name.replace("-", "_"))
    if full not in ALGORITHMS:
        raise UserError(f"unknown algorithm {name!r}: {nearest(name, [*ALGORITHMS, *ALIASES])}")
    return full


O = TypeVar("O")  # noqa: E741


def with_values(options: O, values: Mapping[str, Any], origin: str = "") -> O:
    """The options with some of them set. Raises UserError for an unknown one, and for a value of another type."""
    kinds: dict[str, Any] = {f.name: f.type for f in fields(options)}  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, x in values.items():
        if name not in kinds:
            raise UserError(f"{origin}{type(options).__name__} has no option {name!r}: {nearest(name, sorted(kinds))}")
        given[name] = tuple(x) if isinstance(x, list) else x
        if not _fits(given[name], kinds[name]):
            raise UserError(f"{origin}{name} is {x!r}: it must be {_said(kinds[name])}")
        given[name] = _plain(given[name], kinds[name])
    return replace(options, **given)  # type: ignore[type-var]


def _plain(x: Any, kind: Any) -> Any:
    """As JSON and torch know it: numpy's whole numbers and fractions become Python's."""
    if isinstance(x, tuple):
        return tuple(_plain(item, get_args(kind)[0]) for item in x)
    if isinstance(x, bool) or not isinstance(x, Real):
        return x
    return float(x) if kind is float or not isinstance(x, Integral) else int(x)


def check_bounds(
    values: Mapping[str, Any],
    *,
    positive: Collection[str] = (),
    counts: Collection[str] = (),
    not_negative: Collection[str] = (),
    unit: Collection[str] = (),
    fraction: Collection[str] = (),
) -> None:
    """Raise UserError for a number outside of the bounds of its name."""
    for name, x in values.items():
        if x is None or isinstance(x, str | bool | tuple):
            continue
        if not math.isfinite(x) and (math.isnan(x) or name in FINITE):
            raise UserError(f"{name} is {x}: it must be a finite number")
        for group, holds, bound in (
            (unit, 0 <= x <= 1, "between 0 and 1"),
            (fraction, 0 < x < 1, "more than 0 and less than 1"),
            (counts, x >= 1, "at least 1"),
            (positive, x > 0, "more than 0"),
            (not_negative, x >= 0, "0 or more"),
            (("dual_clip_bound",), x > 1, "more than 1"),
            (("seed",), x < 2**63, "less than 2**63"),
            (("threads",), x <= 1024, "at most 1024"),
        ):
            if name in group and not holds:
                raise UserError(f"{name} is {x}: it must be {bound}")


# Options that are read only under a choice made by another: (of which algorithms, option, the other, its values).
Reading = tuple[type, str, str, tuple[Any, ...]]
READ_UNDER: tuple[Reading, ...] = (
    (ActorCritic, "lam", "advantage", ("gae",)),
    (ActorCritic, "n", "advantage", ("n_step",)),
    (NPG, "delta", "step_rule", ("kl_radius",)),
    (NPG, "natural_learning_rate", "step_rule", ("learning_rate",)),
    (Reinforce, "critic_learning_rate", "baseline", ("value",)),
    (Reinforce, "critic_epochs", "baseline", ("value",)),
    (Reinforce, "critic_minibatch_size", "baseline", ("value",)),
)


def check_read(options: Any, defaults: Any, table: Collection[Reading] = READ_UNDER) -> None:
    """Raise UserError for an option that was set, away from its default or preset, where nothing will read it."""
    for kind, name, other, values in table:
        if not isinstance(options, kind) or getattr(options, name) == getattr(defaults, name):
            continue
        if getattr(options, other) not in values:
            raise UserError(
                f"{name} is read only where {other} is {' or '.join(map(str, values))}, and {other} is "
                f"{getattr(options, other)}: set that too, or leave {name} out"
            )


def validate(options: Options) -> None:
    """Raise UserError for a value that cannot be meant."""
    values = {f.name: getattr(options, f.name) for f in fields(options)}
    check_bounds(values, positive=POSITIVE, counts=COUNTS, not_negative=NOT_NEGATIVE, unit=UNIT, fraction=FRACTION)
    if options.num_steps is None and not isinstance(options, Reinforce):
        raise UserError(f"num_steps is None: {type(options).__name__} needs a number")
    if not all(isinstance(size, int) and size >= 1 for size in options.hidden):
        raise UserError(f"hidden is {options.hidden}: every layer has at least 1 unit")
    if getattr(options, "minibatch_size", 2) < 2 and getattr(options, "advantage_normalization", "") == "minibatch":
        raise UserError("minibatch_size is 1: one advantage cannot be standardised; use advantage_normalization batch")
    if isinstance(options, PPO) and options.kl_coefficient == 0 and math.isfinite(options.kl_coefficient_target):
        raise UserError("kl_coefficient_target adapts kl_coefficient, which is 0: set that too")
    if isinstance(options, Reinforce) and options.discounted and options.returns == "trajectory_return":
        raise UserError("discounted is for reward_to_go: a trajectory_return has gamma^t in it already")
    decisions = options.num_envs * (options.num_steps or math.inf)
    for name in ("minibatch_size", "critic_minibatch_size"):
        size = getattr(options, name, 0)
        # The critic's default is for rollouts of the usual size: of a smaller one it takes the whole.
        if size > decisions and not (name.startswith("critic") and size == getattr(type(options), name)):
            raise UserError(
                f"{name} is {size}, and a rollout has num_envs * num_steps = {decisions} decisions: "
                "lower the one or raise the other"
            )


def _fits(x: Any, kind: Any) -> bool:
    """Is x of the type that an option is annotated with? A whole number is a number, and True is neither."""
    if get_origin(kind) is Annotated:
        return _fits(x, get_args(kind)[0])
    if get_origin(kind) is Literal:
        return x in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(x, tuple) and all(_fits(item, get_args(kind)[0]) for item in x)
    if isinstance(kind, UnionType):
        return any(_fits(x, one) for one in get_args(kind))
    if kind in (int, float):
        return isinstance(x, Integral if kind is int else Real) and not isinstance(x, bool)
    return isinstance(x, kind)


def _said(kind: Any) -> str:
    """The type of an option, in words."""
    if get_origin(kind) is Annotated:
        return _said(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return f"a list, each entry {_said(get_args(kind)[0])}"
    if isinstance(kind, UnionType):
        return " or ".join(_said(one) for one in get_args(kind) if one is not type(None))
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}[kind]


def nearest(name: str, known: list[str]) -> str:
    """The end of an error message: the names that were perhaps meant, or all there are."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
