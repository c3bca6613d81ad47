"""Which options are worth tuning, and between which bounds. No torch here: --help shows them."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from policygrad.train.methods import KNOWN
from policygrad.train.options import CONTROL, EPISODIC, LANGUAGE, When, is_read, with_rate

ITERATIONS = 10  # that a trial has room for, however long its rollouts are


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, even on a scale: linear; log; near_one, the logarithm of 1 - x; whole numbers; or
    powers of 2. Fractions have three significant digits, so that a preset can be read.
    """

    low: int | float
    high: int | float
    scale: Literal["linear", "log", "near_one", "whole", "powers"] = "log"

    def __str__(self) -> str:
        said = {"log": " (log)", "near_one": " (log of 1 - x)", "powers": " (powers of 2)"}.get(self.scale, "")
        return f"{self.low:g} to {self.high:g}{said}"

    def label(self, name: str) -> str:
        """What is drawn for an option, as the study's database calls it."""
        return {"near_one": f"1 - {name}", "powers": f"log2 {name}"}.get(self.scale, name)

    def around(self, x: int | float) -> "Range":
        """The range, and a value outside of it. A logarithm has no 0."""
        inside = x > 0 or self.scale == "linear"
        return replace(self, low=min(self.low, x), high=max(self.high, x)) if inside else self

    def drawn(self, x: int | float) -> int | float:
        """The number that is drawn for a value x, or for the next one in the range."""
        x = min(max(x, self.low), self.high)
        return {"near_one": 1 - x, "powers": round(math.log2(x))}.get(self.scale, x)

    def value(self, drawn: int | float) -> int | float:
        """The value for a drawn number."""
        if self.scale in ("whole", "powers"):
            return int(2**drawn if self.scale == "powers" else drawn)
        short = float(f"{drawn:.3g}")
        return round(1 - short, 8) if self.scale == "near_one" else short

    def draw(self, trial: Any, name: str) -> None:
        """Draw a number for an option in Optuna's trial, or nothing if it has one."""
        low, high = sorted((self.drawn(self.low), self.drawn(self.high)))
        if self.scale in ("whole", "powers"):
            trial.suggest_int(self.label(name), low, high)
        else:
            trial.suggest_float(self.label(name), low, high, log=self.scale != "linear")


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return " or ".join(_said(x) for x in self.values)

    def label(self, name: str) -> str:
        """What is drawn for an option, as the study's database calls it."""
        return name

    def around(self, x: Any) -> "Choice":
        """The values, and one more."""
        return self if x in self.values else Choice((*self.values, x))

    def drawn(self, x: Any) -> str:
        """The text that is drawn for a value."""
        return _said(x)

    def value(self, drawn: str) -> Any:
        """The value for a drawn text."""
        return next(x for x in self.values if _said(x) == drawn)

    def draw(self, trial: Any, name: str) -> None:
        """Draw a value for an option in Optuna's trial, or none if it has one."""
        trial.suggest_categorical(name, [_said(x) for x in self.values])


def _said(x: Any) -> str:
    return " ".join(map(str, x)) if isinstance(x, tuple) else str(x)


WHOLE_MODEL: When = {**LANGUAGE, "lora_rank": (0,)}
EXACT: When = {"world": ("exact",)}
# The first line that applies to a run says how its option is tuned. Bounds are those of the field, as in RL Baselines3
# Zoo. An option is missing where its best value follows from another one (value_coefficient: Adam undoes it), or where
# it changes the task (temperature, episode_steps) or the cost alone (num_envs, where rows are segments).
TABLE: tuple[tuple[str, Range | Choice, When], ...] = (
    ("learning_rate", Range(1e-5, 1e-2), CONTROL),
    ("learning_rate", Range(1e-7, 1e-4), WHOLE_MODEL),
    ("learning_rate", Range(1e-5, 1e-3), LANGUAGE),
    ("learning_rate", Range(3e-3, 0.3), EXACT),
    ("natural_learning_rate", Range(0.01, 1.0), {}),
    ("delta", Range(1e-3, 0.1), {}),
    ("critic_learning_rate", Range(1e-4, 1e-2), CONTROL),
    ("critic_learning_rate", Range(1e-6, 1e-4), LANGUAGE),
    ("critic_learning_rate", Range(1e-2, 1.0), EXACT),
    ("gamma", Range(0.9, 0.9999, "near_one"), CONTROL),
    ("lam", Range(0.8, 1.0, "linear"), {}),
    ("n", Range(1, 32, "powers"), {}),
    ("num_steps", Range(16, 512, "powers"), CONTROL),
    ("num_envs", Range(4, 64, "powers"), {**CONTROL, "credit": EPISODIC, "group_size": (None,)}),
    ("minibatch_size", Range(32, 512, "powers"), CONTROL),
    ("epochs", Range(1, 20, "whole"), {**CONTROL, "objective": ("ppo", "grpo")}),
    ("epochs", Range(1, 4, "whole"), {**LANGUAGE, "objective": ("ppo", "grpo")}),
    ("epochs", Range(1, 8, "whole"), {"objective": ("actor_critic",), "credit": ("vtrace",)}),
    ("clip_low", Range(1e-4, 1e-2), {"ratio": ("sequence", "sequence_token")}),
    ("clip_low", Range(0.1, 0.4, "linear"), {}),
    ("clip_high", Range(1e-4, 1e-2), {"ratio": ("sequence", "sequence_token")}),
    ("clip_high", Range(0.1, 0.4, "linear"), {}),
    ("entropy_coefficient", Range(1e-8, 0.1), {"world": ("control", "exact")}),
    ("kl_old_target", Range(3e-3, 0.1), {}),
    ("kl_ref_coefficient", Range(1e-4, 0.3), {}),
    ("max_grad_norm", Range(0.3, 5.0), CONTROL),
    ("critic_epochs", Range(5, 30, "whole"), CONTROL),
    ("cg_iters", Range(5, 30, "whole"), CONTROL),
    ("hidden", Choice(((64, 64), (256, 256))), CONTROL),
    ("activation", Choice(("tanh", "relu")), CONTROL),
)


def searched(options: Any, fixed: Collection[str], *, own_network: bool = False) -> dict[str, Range | Choice]:
    """What is tuned of a run with these options, all but what is fixed. The options' own values are in the ranges.

    What is None, infinite (off), or a discount of 1 is a decision, and stays. own_network: the run makes no network.
    """
    options, apart = with_rate(options), {*fixed}
    if own_network or getattr(options, "start", None) is not None:
        apart |= {"hidden", "activation"}
    if options.iterations is not None:  # longer rollouts would be more training
        apart |= {"num_steps", "num_envs"}
    found: dict[str, Range | Choice] = {}
    known = {f.name for f in fields(options)} - apart
    for name, how, when in TABLE:
        if name not in known or name in found or not _applies(when, options) or not is_read(name, options):
            continue
        x = getattr(options, name)
        if x is None or x == math.inf or (name == "gamma" and x == 1):
            continue
        if name == "num_steps" and isinstance(how, Range):
            room = max(1, options.steps // (ITERATIONS * options.num_envs))
            how = replace(how, high=min(how.high, max(how.low, 2 ** int(math.log2(room)))))
        found[name] = how.around(x)
    return found


def _applies(when: When, options: Any) -> bool:
    known = {"world": options.world, "objective": KNOWN[options.method].objective}
    return all(known.get(x, getattr(options, x, None)) in values for x, values in when.items())


def settled(drawn: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """The drawn values, with a rollout of segments and its minibatches fitted to each other. options: of no trial."""
    values = dict(drawn)
    if options.world != "control" or getattr(options, "num_steps", None) is None or options.credit in EPISODIC:
        return values
    if "num_steps" in values:
        least = [getattr(options, x, None) for x in ("minibatch_size", "critic_minibatch_size") if x not in values]
        rows = -(-max((x or 0 for x in least), default=0) // options.num_envs)
        values["num_steps"] = max(values["num_steps"], min(rows, options.num_steps))
    if "minibatch_size" in values:
        rollout = options.num_envs * values.get("num_steps", options.num_steps)
        values["minibatch_size"] = min(values["minibatch_size"], rollout)
    return values
