"""What a run's metrics say in plain language: the known illnesses of policy-gradient training.

Each check is a function (Course) -> Finding or None. They compare the first quarter of a run with its last, and read
nothing but the metrics and the options. The thresholds are rules of thumb (docs/metrics.md).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from policygrad.train.reports import Row

LEAST = 8  # rows of a metric below which nothing is said of it
CLEAR = 3.0  # standard errors by which a metric has moved
SCORES = ("held_out", "evaluation", "expected_return", "return", "reward", "reward_per_step")  # the first that there is


class Finding(NamedTuple):
    """An illness, the metric whose curve shows it, what is seen, and what usually helps."""

    name: str
    metric: str
    seen: str
    advice: str

    def line(self) -> str:
        """In a sentence."""
        return f"{self.name}: {self.seen}. {self.advice}."


@dataclass(frozen=True)
class Course:
    """The metrics of a run, in order, and its options."""

    method: str
    world: str
    options: dict[str, Any]
    rows: Sequence[Row]

    def values(self, name: str) -> np.ndarray:
        """The values of a metric; empty if there are fewer than LEAST."""
        found = np.array([row[name] for row in self.rows if name in row], dtype=float)
        return found if len(found) >= LEAST else np.array([])

    def quarters(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of the first quarter of the rows and of the last."""
        found = self.values(name)
        size = max(2, len(found) // 4)
        return found[:size], found[-size:]

    def late(self, name: str) -> float:
        """The median of the second half; NaN if it is not known."""
        found = self.values(name)
        return float(np.median(found[len(found) // 2 :])) if len(found) else math.nan

    def moved(self, name: str) -> float:
        """The change of the mean from the first quarter to the last, in its standard errors; NaN if not known."""
        first, last = self.quarters(name)
        return _change(first, last) if len(first) else math.nan

    def score(self) -> str | None:
        """The name of the run's score."""
        return next((name for name in SCORES if len(self.values(name))), None)

    def option(self, name: str, default: float = math.inf) -> float:
        """A number among the options, which a file may have as "inf"."""
        try:
            return float(self.options.get(name, default))
        except (TypeError, ValueError):  # None, or what no run has written
            return default


def _change(first: np.ndarray, last: np.ndarray) -> float:
    """The difference of two means in its standard errors."""
    error = math.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last))
    change = float(last.mean() - first.mean())
    return change / error if error else math.copysign(math.inf, change) if change else 0.0


def findings(course: Course) -> list[Finding]:
    """Every illness that a run shows."""
    return [found for check in CHECKS if (found := check(course)) is not None]


def entropy_collapsed(course: Course) -> Finding | None:
    """The policy has become deterministic in the first half of the run, and the score has not risen since."""
    name = "action_std" if len(course.values("action_std")) else "entropy"
    entropy, score = course.values(name), course.score()
    if not len(entropy) or (name == "entropy" and entropy[0] < 0) or score is None:  # of a density: any number
        return None
    least = 0.02 if name == "action_std" else max(0.001, 0.05 * entropy[0])
    low = np.flatnonzero(entropy < least)
    if not len(low) or low[0] > len(entropy) / 2 or np.mean(entropy[low[0] :] < least) < 0.9:
        return None
    reached = course.values(score)
    since = reached[int(low[0] / len(entropy) * len(reached)) :]
    if len(since) >= 4 and _change(*np.array_split(since, 2)) > CLEAR:
        return None
    fell = f"fell from {entropy[0]:.3g} to {entropy[low[0]]:.2g} within {low[0] / len(entropy):.0%} of the run"
    said = fell if low[0] else f"is {np.median(entropy):.2g} from the first rows on"
    return Finding(
        "entropy collapsed", name, f"{name} {said}, and {score} has not risen since",
        "If the task is not solved, the policy stopped exploring: lower learning_rate, or raise entropy_coefficient",
    )  # fmt: skip


def score_fell(course: Course) -> Finding | None:
    """The score has lost more than half of what it had gained."""
    name = course.score()
    if name is None:
        return None
    reached = course.values(name)
    size = max(2, len(reached) // 8)
    parts = [reached[i : i + size] for i in range(0, len(reached) - size + 1, size)]
    best, last, first = max(parts, key=np.mean), reached[-size:], parts[0].mean()
    if best.mean() - last.mean() <= max(0.5 * (best.mean() - first), 0.1 * abs(best.mean())):
        return None
    if _change(last, best) <= CLEAR:
        return None
    return Finding(
        "the score fell", name, f"{name} was {best.mean():.4g} at its best, and is {last.mean():.4g} at the end",
        "Lower learning_rate or let it fall (learning_rate_schedule linear), or set target_kl",
    )  # fmt: skip


def steps_too_far(course: Course) -> Finding | None:
    """KL(old, new) far above its target, or above what any update of this kind should move."""
    late = course.late("kl_old")
    asked = min(course.option("target_kl"), course.option("kl_old_target"), course.option("delta"))
    limit = 2 * asked if asked < math.inf else 0.1
    if not late > limit:
        return None
    said = f"its target is {asked:g}" if asked < math.inf else "healthy updates move less than 0.05"
    return Finding(
        "updates go too far", "kl_old", f"KL(old, new) is {late:.2g} in the second half of the run, and {said}",
        "Lower learning_rate or epochs, or set target_kl",
    )  # fmt: skip


def nothing_moves(course: Course) -> Finding | None:
    """KL(old, new) measured after updates is 0: the policy does not change."""
    first, _ = course.quarters("kl_old")
    score = course.score()
    before_each_step = course.world == "language" and "clip_fraction" not in (course.rows[-1] if course.rows else {})
    if before_each_step or not len(first) or score is None or not course.late("kl_old") < 1e-7:
        return None
    if np.median(first) >= 1e-7 or course.moved(score) > CLEAR:
        return None
    return Finding(
        "nothing moves", "kl_old", f"KL(old, new) is {course.late('kl_old'):.1g}, and {score} does not rise",
        "Raise learning_rate, and look whether gradient_norm is 0",
    )  # fmt: skip


def critic_explains_nothing(course: Course) -> Finding | None:
    """The critic's values say no more about the returns than their mean does."""
    late = course.late("explained_variance")
    if not late < 0.05:
        return None
    return Finding(
        "the critic explains nothing", "explained_variance",
        f"explained_variance is {late:.2g} in the second half of the run; 1 is perfect, 0 is the mean alone",
        "Raise critic_learning_rate or the epochs of the critic, scale the rewards, or widen the network",
    )  # fmt: skip


def everything_clipped(course: Course) -> Finding | None:
    """Most ratios are outside the clip range, so most decisions have no gradient."""
    late = course.late("clip_fraction")
    if not late > 0.5:
        return None
    return Finding(
        "everything is clipped", "clip_fraction", f"{late:.0%} of the ratios are outside the clip range",
        "Lower learning_rate or epochs",
    )  # fmt: skip


def always_cut(course: Course) -> Finding | None:
    """Every episode has had the same length from the start: the time limit ends it and never the task."""
    lengths = course.values("length") if course.world == "control" else np.array([])
    if not len(lengths) or np.ptp(lengths) > 0 or lengths[0] <= 1:
        return None
    return Finding(
        "episodes are only ever truncated", "length",
        f"every episode has {lengths[0]:,.0f} steps, from the first to the last",
        "If the task should end by itself, look at its terminated; if not, this is as it should be",
    )  # fmt: skip


def groups_flat(course: Course) -> Finding | None:
    """The rewards of nearly all groups are equal, so that nothing tells their rows apart."""
    late = course.late("flat_groups")
    if not late > 0.9:
        return None
    return Finding(
        "all groups are flat", "flat_groups",
        f"in {late:.0%} of the groups all rewards are equal, and an equal group teaches nothing",
        "Take prompts that are neither too easy nor too hard, more completions, or sampling_rounds above 1",
    )  # fmt: skip


def part_falls(course: Course) -> Finding | None:
    """The reward rises while one of its parts, or a number that is watched, falls."""
    total = next((name for name in ("reward", "return") if len(course.values(name))), None)
    if total is None or not course.moved(total) > CLEAR:
        return None
    names = dict.fromkeys(name for row in course.rows for name in row if name.startswith(("reward/", "info/")))
    falling = [name for name in (*names, "success") if course.moved(name) < -CLEAR]
    if not falling:
        return None
    name = falling[0]
    first, last = (x.mean() for x in course.quarters(name))
    return Finding(
        "a part falls while the whole rises", name,
        f"{total} rose, and {name} fell from {first:.3g} to {last:.3g}",
        "The policy may be trading what is meant for what is paid: look at samples, and at the weights of the parts",
    )  # fmt: skip


def repeats_its_prompt(course: Course) -> Finding | None:
    """More and more completions repeat a piece of their prompt."""
    first, last = course.quarters("prompt_repeats")
    if not len(first) or last.mean() < 0.3 or last.mean() < first.mean() + 0.1:
        return None
    return Finding(
        "completions repeat their prompt", "prompt_repeats",
        f"{last.mean():.0%} of the completions repeat a piece of their prompt, {first.mean():.0%} at first",
        "The reward may be earned by copying: read samples.jsonl, and test the reward on such a text",
    )  # fmt: skip


def length_drifts(course: Course) -> Finding | None:
    """Completions become much longer or shorter while the score on held-out prompts does not rise."""
    first, last = course.quarters("length") if course.world == "language" else (np.array([]), np.array([]))
    judged = course.values("held_out")
    improved = len(judged) and judged[-1] > judged[0] + 0.02 * max(1.0, abs(judged[0]))
    if not len(first) or improved or not course.moved("reward") > CLEAR:
        return None
    share = last.mean() / max(first.mean(), 1e-9)
    if 1 / 1.5 < share < 1.5:
        return None
    return Finding(
        "length instead of answers", "length",
        f"the mean length went from {first.mean():.0f} to {last.mean():.0f} tokens and the reward rose, but not the "
        "score on held-out prompts",
        "The reward may pay for length: look at samples.jsonl, and at how the reward treats a long wrong answer",
    )  # fmt: skip


def memorizes(course: Course) -> Finding | None:
    """The reward of training rises clearly and the score on held-out prompts does not."""
    judged = course.values("held_out")
    if not len(judged) or not course.moved("reward") > CLEAR or course.moved("held_out") > 1.0:
        return None
    first, last = (x.mean() for x in course.quarters("held_out"))
    return Finding(
        "better in training alone", "held_out",
        f"the reward of training rose, and on held-out prompts it went from {first:.3g} to {last:.3g}",
        "There may be too few prompts, or the reward fits the training prompts only",
    )  # fmt: skip


def gradient_peaks(course: Course) -> Finding | None:
    """Single gradients are far larger than the usual one."""
    norms = course.values("gradient_norm")
    usual = float(np.median(norms)) if len(norms) else 0.0
    if not usual or norms.max() < 50 * usual:
        return None
    return Finding(
        "gradients peak", "gradient_norm", f"the largest gradient norm is {norms.max():.3g}, the usual one {usual:.3g}",
        "Lower max_grad_norm or learning_rate, or scale the rewards",
    )  # fmt: skip


def steps_refused(course: Course) -> Finding | None:
    """The line search finds no step most of the time."""
    found = course.values("accepted")
    if not len(found) or found.mean() > 0.5:
        return None
    return Finding(
        "steps are refused", "accepted", f"the line search took a step in {found.mean():.0%} of the iterations",
        "Raise cg_iters or damping, or take larger rollouts: the estimate of the gradient may be too noisy",
    )  # fmt: skip


def at_the_bounds(course: Course) -> Finding | None:
    """Most components of the actions are at a bound of the action space."""
    late = course.late("bound_fraction")
    if not late > 0.5:
        return None
    return Finding(
        "actions at their bounds", "bound_fraction", f"{late:.0%} of the components of the actions are at a bound",
        "Lower entropy_coefficient or initial_log_std; if bang-bang control solves the task, this is as it should be",
    )  # fmt: skip


CHECKS: list[Callable[[Course], Finding | None]] = [
    entropy_collapsed, score_fell, steps_too_far, nothing_moves, critic_explains_nothing, everything_clipped,
    always_cut, groups_flat, part_falls, repeats_its_prompt, length_drifts, memorizes, gradient_peaks, steps_refused,
    at_the_bounds,
]  # fmt: skip
