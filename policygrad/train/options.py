"""Every option: one field with its default, its meaning, its bounds and the condition under which it is read.

`options_of(method, world)` is the dataclass of those that apply to a method on a world, with the defaults that it has
there. No torch here: --help must be instant.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, make_dataclass, replace
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from tyro.conf import arg

from policygrad.errors import UserError
from policygrad.train.methods import METHODS, Method, nearest


class OptionError(UserError):
    """An option has a value that cannot be meant. `option` is its name."""

    def __init__(self, option: str, message: str) -> None:
        super().__init__(message)
        self.option = option


class Bound(NamedTuple):
    """What a number must be, as a test and in words."""

    holds: Callable[[Any], bool]
    said: str


POSITIVE = Bound(lambda x: x > 0, "more than 0")
FINITE = Bound(lambda x: math.isfinite(x), "a finite number")
RATE = Bound(lambda x: 0 < x < math.inf, "more than 0 and finite")
NOT_NEGATIVE = Bound(lambda x: 0 <= x < math.inf, "0 or more and finite")
COUNT = Bound(lambda x: x >= 1, "at least 1")
TWO = Bound(lambda x: x >= 2, "at least 2")
UNIT = Bound(lambda x: 0 <= x <= 1, "between 0 and 1")
FRACTION = Bound(lambda x: 0 < x < 1, "more than 0 and less than 1")
SHARE = Bound(lambda x: 0 <= x < 1, "0 or more and less than 1")
ABOVE_1 = Bound(lambda x: x > 1, "more than 1")
SEED = Bound(lambda x: 0 <= x < 2**63, "0 or more and less than 2**63")
THREADS = Bound(lambda x: 1 <= x <= 1024, "between 1 and 1024")
SIZES = Bound(lambda x: all(size >= 1 for size in x), "at least 1 unit in every layer")

When = dict[str, tuple[Any, ...]]  # what must have one of these values: `world`, a field of the method, or an option
CONTROL: When = {"world": ("control",)}
LANGUAGE: When = {"world": ("language",)}
EPISODES: When = {"world": ("control", "exact")}
ASCEND: When = {"update": ("ascend",)}
NATURAL: When = {"update": ("natural", "trust_region")}
MINIBATCHES: When = {"objective": ("ppo", "grpo")}
BOOTSTRAPPED = ("gae", "n_step", "monte_carlo", "vtrace")
EPISODIC = ("reward_to_go", "trajectory_return", "group")  # credit for which a row must be a whole episode
RETURNS: When = {"credit": ("reward_to_go", "trajectory_return")}


def option(default: Any, help: str, bound: Any = None, **when: Any) -> Any:
    """A field of Options. `when`: it is read only where each of these has one of the values."""
    return field(default=default, metadata={"help": help, "bound": bound, "when": when})


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of all methods and worlds. The defaults of a method or a world are in methods.py."""

    # The run
    steps: int | None = option(None, "Decisions to train on; the iteration that reaches them is the last.", COUNT)
    iterations: int | None = option(None, "Rollouts to train on, whichever of the two comes first.", COUNT)
    seed: int = option(0, "Of everything that is random.", SEED)
    device: str = option("cpu", "Where policy and critic live: cpu, cuda, cuda:1, mps.")
    threads: int | None = option(None, "Of torch on the CPU: small networks are fastest with one; None: all.", THREADS)
    stop_at_return: float = option(
        math.inf, "Stop once the mean return of the last 100 episodes reaches this.", **CONTROL
    )
    evaluate_every: int = option(
        0, "Evaluate every so many iterations, on held-out prompts or exactly; 0: only before and after.", NOT_NEGATIVE,
        world=("language", "exact"),
    )  # fmt: skip
    evaluation_completions: int = option(4, "Of each held-out prompt.", COUNT, **LANGUAGE)

    # What is sampled: episodes
    num_envs: int = option(8, "Environments stepped together; rows of a rollout.", COUNT, **EPISODES)
    num_steps: int = option(128, "Steps of each environment in one rollout.", COUNT, **CONTROL, credit=BOOTSTRAPPED)
    episode_steps: int | None = option(
        None, "Longest episode, where rows are whole episodes; None: the task's own time limit.", COUNT, **EPISODES
    )
    group_size: int | None = option(
        None, "Episodes from the same start that are compared; None: all of the rollout.", TWO,
        **CONTROL, credit=("group",),
    )  # fmt: skip
    vectorization: Literal["auto", "sync", "async"] = option(
        "auto", "auto: the environment's own vectorized form, else sync; async: a process for each.", **CONTROL
    )
    normalize_observations: bool = option(
        False, "By running mean and standard deviation, saved with the policy.", **CONTROL
    )
    scale_rewards: bool = option(False, "By the running standard deviation of the discounted return.", **CONTROL)
    hidden: tuple[int, ...] = option(
        (64, 64), "Sizes of the hidden layers, of policy and critic alike.", SIZES, **CONTROL
    )
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = option("tanh", "Between the layers.", **CONTROL)
    orthogonal: bool = option(
        True, "Orthogonal initialization, the policy's last layer small; else torch's own.", **CONTROL
    )
    squash: bool = option(False, "Squash Box actions onto their bounds by tanh; else clip them there.", **CONTROL)
    state_dependent_std: bool = option(
        False, "The Gaussian's standard deviation is an output of the network; else a parameter.", **CONTROL
    )
    initial_log_std: float = option(0.0, "The Gaussian's first log standard deviation.", FINITE, **CONTROL)

    # What is sampled: completions
    model: str | None = option(
        None, "Any Hugging Face causal language model: a directory or a hub id; by default the task's own.", **LANGUAGE
    )
    tokenizer: str | None = option(None, "A directory or hub id; by default the model's.", **LANGUAGE)
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = option(
        "float32", "Of the weights; auto: that of the file.", **LANGUAGE
    )
    attention: str | None = option(
        None, "sdpa, eager, flash_attention_2, ...; by default the model's own choice.", **LANGUAGE
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.", **LANGUAGE)
    lora_rank: int = option(
        0, "Train only a LoRA adapter of this rank; the reference is then the model without it. 0: all weights.",
        NOT_NEGATIVE, **LANGUAGE,
    )  # fmt: skip
    lora_alpha: float | None = option(
        None, "The adapter's output is scaled by alpha / rank; 2 rank by default.", POSITIVE, **LANGUAGE
    )
    lora_targets: tuple[str, ...] = option(
        (), "Layers that get an adapter; by default all linear ones but the head. Repeatable.", **LANGUAGE
    )
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them.", **LANGUAGE)
    autocast: Literal["none", "bfloat16"] = option(
        "none", "Type of the arithmetic; weights stay as they are, log-probabilities are in float32.", **LANGUAGE
    )
    dataset: str | None = option(
        None, "Prompts: a JSON, JSONL, CSV or Parquet file, or a hub id, with a column `prompt`; the other columns go "
        "to the rewards.", **LANGUAGE,
    )  # fmt: skip
    split: str = option("train", "Of a data set that has several.", **LANGUAGE)
    held_out: int = option(128, "Examples kept from training to evaluate on; 0: none.", NOT_NEGATIVE, **LANGUAGE)
    max_prompt_tokens: int | None = option(None, "A longer prompt is refused.", COUNT, **LANGUAGE)
    reward: tuple[str, ...] = option(
        (), "exact_match, math_equal, format:REGEX, overlong:MAX,BUFFER, module:function, file.py:function, or a "
        "reward model's directory or hub id. Repeatable: the weighted sum.", **LANGUAGE,
    )  # fmt: skip
    reward_weight: tuple[float, ...] = option(
        (), "One for each reward, in the same order; 1 by default. Repeatable.", **LANGUAGE
    )
    reward_time_limit: float = option(
        60.0, "Seconds that a reward function may take for one batch.", POSITIVE, **LANGUAGE
    )
    overlong_fraction: float = option(
        0.0,
        "Soft overlong penalty: over this last share of max_tokens the reward sinks linearly by 1.",
        SHARE,
        **LANGUAGE,
    )
    prompts_per_rollout: int = option(16, "Different prompts in a rollout.", COUNT, **LANGUAGE)
    completions: int = option(8, "Of each prompt: its group.", COUNT, **LANGUAGE)
    max_tokens: int = option(256, "Of a completion; a longer one is cut.", COUNT, **LANGUAGE)
    temperature: float = option(1.0, "Part of the policy: it is sampled from and scored at this.", RATE, **LANGUAGE)
    cut: Literal["kept", "masked", "penalized"] = option(
        "kept",
        "Completions cut at max_tokens: rewarded as they are, left out of the update, or rewarded less.",
        **LANGUAGE,
    )
    cut_penalty: float = option(
        1.0, "Taken from the reward of a cut completion.", NOT_NEGATIVE, **LANGUAGE, cut=("penalized",)
    )
    old_logp: Literal["sampled", "recomputed"] = option(
        "sampled", "Log-probabilities of the old policy: as sampled, or computed again by the learner.", **LANGUAGE
    )
    importance_bound: float = option(
        2.0, "Weights old / sampled, truncated here, correct for the difference; 0: no correction.", NOT_NEGATIVE,
        **LANGUAGE, old_logp=("recomputed",),
    )  # fmt: skip
    sampling_rounds: int = option(
        1, "Dynamic sampling: up to so many rollouts to fill one with groups whose returns differ. 1: none.", COUNT,
        credit=("group",),
    )  # fmt: skip

    # Credit
    credit: Literal["gae", "n_step", "monte_carlo", "vtrace", "reward_to_go", "trajectory_return", "group"] = option(
        "gae", "What a decision is credited with: a critic's GAE, n-step, TD(1) or V-trace advantage; the return from "
        "it on or of its whole episode, minus a baseline; or its episode's return against its group's.",
    )  # fmt: skip
    gamma: float | None = option(0.99, "Discount factor; None: that of an exact world.", UNIT)
    lam: float = option(
        0.95, "Lambda of GAE and V-trace: 0 is the TD error, 1 is Monte Carlo.", UNIT, credit=("gae", "vtrace")
    )
    n: int = option(5, "Rewards counted before the critic takes over.", COUNT, credit=("n_step",))
    rho_bar: float = option(
        1.0,
        "Bound of the ratio in V-trace's TD error: which policy's values are learned.",
        POSITIVE,
        credit=("vtrace",),
    )
    c_bar: float = option(1.0, "Bound of the ratio in V-trace's traces: how fast.", POSITIVE, credit=("vtrace",))
    baseline: Literal["none", "mean", "time_mean", "optimal", "value"] = option(
        "value", "Subtracted from the return: nothing, the other episodes' mean, their mean at that step, the constant "
        "of least variance, or a learned value.", **RETURNS,
    )  # fmt: skip
    discounted: bool = option(
        False, "Weigh step t by gamma^t: the true gradient of the discounted return.",
        credit=("gae", "n_step", "monte_carlo", "vtrace", "reward_to_go", "group"),
    )  # fmt: skip
    group_baseline: Literal["mean", "leave_one_out"] = option(
        "mean", "Of a group: the mean of all its returns, or of the others'.", credit=("group",)
    )
    group_scale: Literal["std", "none"] = option(
        "std", "What the group's advantages are divided by.", credit=("group",)
    )
    normalize_advantages: Literal["none", "batch", "minibatch"] = option("none", "Where advantages are standardized.")
    weights: Literal["token", "row", "episode", "budget"] = option(
        "token", "How decisions are averaged: all alike; by row first; summed in a row; over a row's longest length."
    )

    # Objective
    entropy_coefficient: float = option(
        0.0, "Of the entropy in the objective.", NOT_NEGATIVE, objective=("reinforce", "actor_critic", "ppo", "grpo")
    )
    value_coefficient: float = option(
        0.5, "Of the critic's squared error in the objective.", NOT_NEGATIVE, objective=("actor_critic", "ppo"),
        credit=BOOTSTRAPPED,
    )  # fmt: skip
    value_clip: float = option(
        math.inf,
        "Clip the critic's change to this; inf: not at all.",
        POSITIVE,
        objective=("ppo",),
        credit=BOOTSTRAPPED,
    )
    ratio: Literal["token", "sequence"] = option(
        "token", "Of the new policy to the old: of each decision, or of the whole row.", objective=("grpo", "surrogate")
    )
    gain: Literal["surrogate", "weight"] = option(
        "surrogate",
        "Clip the surrogate, as PPO does, or only its weight, which keeps every gradient.",
        objective=("grpo",),
    )
    clip_low: float = option(
        0.2, "The ratio is clipped to [1 - clip_low, 1 + clip_high]; inf clips nothing.", POSITIVE, **MINIBATCHES
    )
    clip_high: float = option(0.2, "See clip_low.", POSITIVE, **MINIBATCHES)
    dual_clip: float = option(
        math.inf, "Floor of the objective for bad actions, as a multiple of the advantage; inf: none.", ABOVE_1,
        objective=("ppo",),
    )  # fmt: skip
    kl_old_coefficient: float = option(
        0.0, "First beta of the penalty beta KL(old, new); 0: no penalty.", NOT_NEGATIVE, objective=("ppo",)
    )
    kl_old_target: float = option(
        math.inf, "KL(old, new) of an update that beta adapts to; inf: beta stays.", POSITIVE, objective=("ppo",)
    )
    target_kl: float = option(
        math.inf,
        "The epochs end early once a minibatch's KL(old, new) exceeds 1.5 times this.",
        POSITIVE,
        **MINIBATCHES,
    )
    kl_ref: Literal["none", "reward", "loss"] = option(
        "none", "Where KL(pi, pi_ref) to the starting policy is charged; the loss is grpo's family's."
    )
    kl_ref_coefficient: float = option(0.04, "Its weight.", NOT_NEGATIVE, kl_ref=("reward", "loss"))
    kl_ref_target: float = option(
        math.inf,
        "KL(pi, pi_ref) by decision that the weight adapts to; inf: it stays.",
        POSITIVE,
        kl_ref=("reward", "loss"),
    )
    kl_ref_estimate: Literal["straight_through", "k1", "k2", "k3", "exact"] = option(
        "straight_through",
        "In the loss. straight_through and exact have the right gradient, k3 is as published, k1 has none.",
        objective=("grpo",), kl_ref=("loss",),
    )  # fmt: skip

    # Update
    learning_rate: float = option(
        3e-4, "Of the policy's Adam, and of the critic's where they share it.", RATE, **ASCEND
    )
    learning_rate_schedule: Literal["constant", "linear"] = option("constant", "linear: down to 0 at the end.")
    adam_epsilon: float = option(1e-5, "Added to Adam's denominator.", RATE)
    epochs: int = option(
        1, "Passes over a rollout, or steps on it with credit assigned afresh before each.", COUNT, **ASCEND,
    )  # fmt: skip
    minibatch_size: int | None = option(
        64, "Decisions of a gradient step; rows (completions) where the policy has memory. None: the whole rollout.",
        COUNT, **MINIBATCHES,
    )  # fmt: skip
    micro_batch: int | None = option(None, "Rows computed at a time: less memory, the same gradient.", COUNT, **ASCEND)
    max_grad_norm: float = option(math.inf, "The gradient is scaled down to this norm.", POSITIVE, **ASCEND)
    delta: float = option(
        0.01, "Radius of the trust region: KL(old, new) of a step.", RATE, **NATURAL, step_rule=("kl_radius",)
    )
    damping: float = option(0.1, "Added to the diagonal of the Fisher matrix.", NOT_NEGATIVE, **NATURAL)
    cg_iters: int = option(10, "Fisher-vector products of the conjugate gradient.", COUNT, **NATURAL)
    backtracks: int = option(10, "Steps tried before the policy is left as it was.", COUNT, update=("trust_region",))
    shrink: float = option(0.8, "Factor from one try to the next.", FRACTION, update=("trust_region",))
    step_rule: Literal["kl_radius", "learning_rate"] = option(
        "kl_radius", "kl_radius: alpha = sqrt(2 delta / g.F^-1 g); learning_rate: a plain alpha.", update=("natural",)
    )
    natural_learning_rate: float = option(
        0.1, "alpha of the step rule learning_rate.", RATE, update=("natural",), step_rule=("learning_rate",)
    )
    critic: str = option(
        "copy", "copy: the model's own copy with a value head; shared: a head on the policy's trunk; or a directory or "
        "hub id of another model with the same tokenizer.", **LANGUAGE,
    )  # fmt: skip
    critic_learning_rate: float | None = option(
        None, "Of the critic's Adam, of a shared trunk only the head's; None: the policy's.", RATE
    )
    critic_epochs: int = option(
        10,
        "Passes over the rollout for a critic that is fitted alone.",
        COUNT,
        objective=("reinforce", "surrogate", "grpo"),
    )
    critic_minibatch_size: int = option(128, "Its minibatches.", COUNT, objective=("reinforce", "surrogate", "grpo"))


def has_critic(options: Any) -> bool:
    """Does the credit need a critic?"""
    return options.credit in BOOTSTRAPPED or (options.credit != "group" and options.baseline == "value")


@cache
def options_of(method: str, world: str) -> type:
    """The dataclass of a method's options on a world, with the defaults that they have there."""
    named, hints = METHODS[method], get_type_hints(Options)
    given = defaults_of(named, world)
    made: list[tuple[str, Any, Field]] = []
    for f in fields(Options):
        if not _applies(f, named, world):
            continue
        made.append((f.name, hints[f.name], field(default=given.pop(f.name, f.default), metadata=f.metadata)))
    assert not given, f"{method} on {world} has no {', '.join(given)}"
    name = "".join(part.title() for part in method.split("_")) + "Options"
    kind = make_dataclass(name, made, frozen=True, kw_only=True)
    kind.__doc__ = named.summary
    kind.method, kind.world = method, world  # type: ignore[attr-defined]
    return kind


def defaults_of(method: Method, world: str) -> dict[str, Any]:
    """A method's defaults on a world where they are not the field's: the world's, then the method's."""
    known = {f.name for f in fields(Options) if _applies(f, method, world)}
    given = {**WORLDS[world], **method.defaults, **method.on.get(world, {})}
    return {name: x for name, x in given.items() if name in known}


# The defaults of a world, where they differ from the field's.
WORLDS: dict[str, dict[str, Any]] = {
    "control": {"steps": 1_000_000, "threads": 1},
    "exact": {
        "steps": 20_000,
        "gamma": None,
        "threads": 1,
        "num_envs": 32,
        "learning_rate": 0.05,
        "critic_learning_rate": 0.1,
    },
    "language": {
        "iterations": 200,
        "gamma": 1.0,
        "learning_rate": 1e-6,
        "critic_learning_rate": 1e-5,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "minibatch_size": None,
        "critic_epochs": 4,
        "critic_minibatch_size": 32,
    },
}


def for_command_line(kind: type) -> type:
    """The same dataclass with its help where tyro looks for it."""
    made = [(f.name, Annotated[f.type, arg(help=f.metadata["help"])], field(default=f.default)) for f in fields(kind)]
    return make_dataclass(kind.__name__, made, frozen=True, kw_only=True)


def with_values(options: Any, values: Mapping[str, Any], origin: str = "") -> Any:
    """The options with some of them set. Raises UserError for an unknown one, and for a value of another type."""
    kinds: dict[str, Any] = {f.name: f.type for f in fields(options)}
    given: dict[str, Any] = {}
    for name, x in values.items():
        if name not in kinds:
            raise OptionError(name, f"{origin}{options.method} has no option {name!r}{_why_not(name, options, kinds)}")
        given[name] = tuple(x) if isinstance(x, list) else x
        if not _fits(given[name], kinds[name]):
            raise OptionError(name, f"{origin}{name} is {_brief(x)}: it must be {_said(kinds[name])}")
        given[name] = _plain(given[name], kinds[name])
    return replace(options, **given)


def check_bounds(options: Any) -> None:
    """Raise OptionError for a value out of bounds."""
    for f in fields(options):
        x, bound = getattr(options, f.name), f.metadata["bound"]
        if isinstance(x, float) and math.isnan(x):
            raise OptionError(f.name, f"{f.name} is {x}: it must be a number")
        if bound is not None and x is not None and not bound.holds(x):
            raise OptionError(f.name, f"{f.name} is {str(x)[:60]}: it must be {bound.said}")


def validate(options: Any, defaults: Any) -> None:
    """Raise OptionError for a value out of bounds, one that nothing reads, and ones that do not go together.

    defaults: what the options are where the user says nothing, a preset's values among them.
    """
    check_bounds(options)
    for f in fields(options):
        if getattr(options, f.name) != getattr(defaults, f.name):
            _check_read(f, options)
    for name, message in _conflicts(options):
        raise OptionError(name, message)


def _check_read(f: Field, options: Any) -> None:
    """Raise OptionError for an option that was set where another choice leaves it unread."""
    for other, values in f.metadata["when"].items():
        if hasattr(options, other) and other not in ("world", "method") and getattr(options, other) not in values:
            raise OptionError(
                f.name,
                f"{f.name} is read only where {other} is {' or '.join(map(str, values))}, and {other} is "
                f"{getattr(options, other)}: set that too, or leave {f.name} out",
            )
    if (
        f.name == "gamma"
        and options.credit == "group"
        and not (options.discounted or getattr(options, "scale_rewards", False))
    ):
        raise OptionError(
            "gamma", "gamma is read only where a group's credit is discounted: set that too, or leave it out"
        )
    alone = f.name in ("critic_epochs", "critic_minibatch_size", "critic", "critic_learning_rate")
    if alone and not has_critic(options):
        raise OptionError(f.name, f"{f.name} is a critic's, and credit {options.credit} has none: leave it out")


def _conflicts(o: Any) -> Any:
    """(option, message) of values that do not go together."""
    method, world = METHODS[o.method], o.world
    if o.steps is None and o.iterations is None:
        yield "steps", "steps and iterations are both None: say how long to train"
    if method.objective not in ("ppo", "grpo") and o.normalize_advantages == "minibatch":
        yield "normalize_advantages", f"normalize_advantages is minibatch, and {o.method} has none: use batch or none"
    if getattr(o, "minibatch_size", None) == 1 and o.normalize_advantages == "minibatch":
        yield (
            "minibatch_size",
            "minibatch_size is 1: one advantage cannot be standardized; normalize_advantages batch can",
        )
    if getattr(o, "kl_old_coefficient", None) == 0 and math.isfinite(o.kl_old_target):
        yield "kl_old_target", "kl_old_target adapts kl_old_coefficient, which is 0: set that too"
    if o.kl_ref == "loss" and method.objective != "grpo":
        yield (
            "kl_ref",
            f"kl_ref is loss, and {o.method} has no such term: use kl_ref reward, or a method of grpo's family",
        )
    if o.credit == "trajectory_return" and o.discounted:
        yield "discounted", "discounted is for reward_to_go: a trajectory_return has gamma^t in it already"
    if o.gamma is None and world != "exact":
        yield "gamma", "gamma is None, and only an exact world has one of its own: give a number, such as 0.99"
    if world == "language":
        yield from _language_conflicts(o)
    else:
        rows = o.num_envs
        if world == "control" and o.credit not in EPISODIC and o.episode_steps is not None:
            yield (
                "episode_steps",
                f"episode_steps is for whole episodes, and credit {o.credit} takes segments: set num_steps",
            )
        if o.credit == "group" and rows < 2:
            yield "num_envs", f"num_envs is {rows}: {o.method} compares episodes; give at least 2"
        group = getattr(o, "group_size", None)
        if group is not None and rows % group:
            yield "group_size", f"group_size is {group}, which does not divide num_envs, {rows}"
        yield from _sizes(o)


def _language_conflicts(o: Any) -> Any:
    if o.credit == "group" and o.completions < 2:
        yield "completions", f"completions is 1: {o.method} compares the completions of a prompt; give at least 2"
    rows = o.prompts_per_rollout * o.completions
    if (getattr(o, "minibatch_size", None) or 0) > rows:
        yield (
            "minibatch_size",
            (
                f"minibatch_size is {o.minibatch_size}, and a rollout has prompts_per_rollout * completions = {rows} "
                "completions: lower the one or raise the other"
            ),
        )
    if o.reward_weight and len(o.reward_weight) != len(o.reward):
        yield (
            "reward_weight",
            (f"there are {len(o.reward)} rewards and {len(o.reward_weight)} weights: give one weight for each reward"),
        )
    if not o.lora_rank and (o.lora_targets or o.lora_alpha is not None):
        yield "lora_rank", "lora_targets and lora_alpha are of an adapter, and lora_rank is 0: set that too"
    if o.critic == "shared" and has_critic(o) and METHODS[o.method].objective not in ("ppo", "actor_critic"):
        yield "critic", f"critic is shared, and {o.method} fits its critic alone, which would move the policy: use copy"


def _sizes(o: Any) -> Any:
    """Minibatches larger than a rollout of segments; the length of whole episodes is not known yet."""
    if o.credit in EPISODIC or o.world == "exact":
        return
    decisions = o.num_envs * o.num_steps
    size = getattr(o, "minibatch_size", None) or 0
    default = {f.name: f.default for f in fields(o)}
    for name, x in (("minibatch_size", size), ("critic_minibatch_size", getattr(o, "critic_minibatch_size", 0))):
        # A critic's default is for rollouts of the usual size; of a smaller one it takes the whole.
        if x > decisions and not (name.startswith("critic") and x == default[name]):
            yield (
                name,
                (
                    f"{name} is {x}, and a rollout has num_envs * num_steps = {decisions} decisions: "
                    "lower the one or raise the other"
                ),
            )


def _applies(f: Field, method: Method, world: str) -> bool:
    """Can the option be read on this world and by this method, whatever the other options are?"""
    known = {"world": world, "objective": method.objective, "update": method.update}
    return all(known[name] in values for name, values in f.metadata["when"].items() if name in known)


def _why_not(name: str, options: Any, known: Mapping[str, Any]) -> str:
    """The end of a message about an option that does not apply here, or of a name that there is none of."""
    for f in fields(Options):
        if f.name == name and options.method in METHODS:
            when = f.metadata["when"]
            if "world" in when and options.world not in when["world"]:
                return f" on {options.world}: it is for {' and '.join(when['world'])}; leave it out"
            users = [m.name for m in METHODS.values() if _applies(f, m, options.world)]
            return f": it is for {', '.join(users)}; leave it out"
    return f": {nearest(name, sorted(known))}"


def _plain(x: Any, kind: Any) -> Any:
    """As JSON and torch know it: numpy's whole numbers and fractions become Python's."""
    if isinstance(x, tuple):
        return tuple(_plain(item, get_args(kind)[0]) for item in x)
    if isinstance(x, bool) or not isinstance(x, Real):
        return x
    fractional = kind is float or (isinstance(kind, UnionType) and float in get_args(kind))
    return float(x) if fractional or not isinstance(x, Integral) else int(x)


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


def _brief(x: Any) -> str:
    """A value in a message of one line."""
    said = repr(x)
    return said if len(said) <= 60 else f"{said[:57]}..."


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
    return {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[kind]
