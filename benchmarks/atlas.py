"""The atlas: every line of the table of methods on one world of tokens, as a table and as a picture.

    python benchmarks/atlas.py        # writes docs/atlas.md and docs/atlas.png

Two prompts, completions of at most three of three tokens, every one of them listed: what a method expects is a sum, and
so is its variance. Each method has its own defaults, the critics among them are wrong everywhere, and there is no
optimizer: the rows are those of `policygrad verify --world tokens`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from policygrad.train.methods import METHODS
from policygrad.train.options import options_of
from policygrad.verify.command import exactly
from policygrad.verify.lag import LAGS, STEP, lag_section
from policygrad.verify.methods import method_rows, options_at
from policygrad.verify.settings import Setting, setting_of, token_setting
from policygrad.verify.statistics import Moments, Row, moments

DOCS = Path(__file__).resolve().parent.parent / "docs"
INK, GRID = "#222222", "#DDDDDD"
COLORS = {"credit": "#3B6FB6", "objective": "#C2384A", "critic": "#3A9D5D", "both": "#7E57A8"}
SAID = {
    "critic": "a critic's credit, which is wrong here", "credit": "GRPO with another credit",
    "objective": "GRPO with another objective", "both": "both are others",
}  # fmt: skip
OF_CREDIT = ("credit", "baseline", "group_baseline", "group_scale", "normalize_advantages", "learn_from")
OF_OBJECTIVE = (
    "ratio", "gain", "clip_low", "clip_high", "token_clip", "dual_clip", "divergence_mask", "drift_bound",
    "kl_old_coefficient",
)  # fmt: skip


class Entry(NamedTuple):
    """A method, and what it expects on and off policy (the latter if it reads the ratio)."""

    name: str
    options: Any
    on: Point
    off: Point | None


class Point(NamedTuple):
    """An estimate of one batch: its direction and length beside grad J's, and the noise of one episode's share."""

    cosine: float
    length: float  # |E g| / |grad J|
    noise: float  # tr Cov of one episode, over |E g|^2
    bias: float  # |E g - grad J| / |grad J|
    variance: float  # tr Cov of one episode, over |grad J|^2
    verdict: str


def main() -> None:
    with exactly():
        at = token_setting(0)
        entries = [entry(name, at) for name in METHODS]
        distance = divergence(at)
        lags = by_lag(at) + by_lag(setting_of("random", 0, 0))
    draw(DOCS / "atlas.png", entries, distance)
    (DOCS / "atlas.md").write_text(page(entries, distance) + lag_table(lags))
    print(DOCS / "atlas.md")


def entry(name: str, at: Setting) -> Entry:
    rows = {row.name: row for row in method_rows(at, options_at(name, at))}
    off = rows.get(f"{name}, off policy")
    on = rows[f"{name}, on policy"]
    return Entry(name, options_at(name, at), point(on, at), None if off is None else point(off, at))


def point(row: Row, at: Setting) -> Point:
    found: Moments = moments(row, row.experience or at.on_policy)
    exact = at.gradient if row.exact is None else row.exact
    expected: Tensor = exact if row.expected is None else row.expected
    holds = float((found.mean - expected).abs().max()) < 1e-9
    unbiased = float((found.mean - exact).norm()) < 1e-9
    size, variance = float(found.mean.norm()), found.rows * float(found.covariance.trace())
    return Point(
        float(torch.cosine_similarity(found.mean, exact, dim=0)),
        size / float(exact.norm()),
        variance / size**2,
        float((found.mean - exact).norm() / exact.norm()),
        variance / float(exact.norm()) ** 2,
        "unbiased" if unbiased else "as written out" if holds else "WRONG",
    )


def divergence(at: Setting) -> float:
    """KL(old, new) of a token, the mean over those of the old policy."""
    rollout, probability = at.off_policy.rollout, at.off_policy.batches(1)[1]
    index = at.off_policy.batches(1)[0].flatten()
    kl = (at.probs_old * (at.probs_old / at.probs).log()).sum(-1)[at.states(rollout)].where(rollout.mask, 0.0)
    weight = probability.unsqueeze(1) * rollout.mask[index]
    return float((weight * kl[index]).sum() / weight.sum())


def by_lag(at: Setting) -> list[tuple[str, list[Point]]]:
    """Each correction of the world, and what it expects at every lag."""
    rows = lag_section(at).rows
    points = [point(row, at) for row in rows]
    return [(rows[i].name.partition(", lag ")[0], points[i : i + len(LAGS)]) for i in range(0, len(rows), len(LAGS))]


def kind(options: Any) -> str:
    """What a method exchanges."""
    if METHODS[options.method].objective != "grpo":
        return "critic" if options.credit in ("gae", "n_step", "vtrace") else "credit"
    plain, mine = vars(options_of("grpo", "exact")()), vars(options)
    credit = any(mine.get(x) != plain.get(x) for x in OF_CREDIT)
    objective = any(mine.get(x) != plain.get(x) for x in OF_OBJECTIVE)
    return "both" if credit and objective else "objective" if objective else "credit"


# The page


def credit_of(o: Any) -> str:
    if o.credit == "group":
        less = {
            "mean": "R - mean",
            "leave_one_out": "R - mean of the others",
            "other_best": "max R - max of the others",
        }
        over = {"std": " over std", "none": "", "mean": " over mean", "batch": " over the batch's std"}
        found = less[o.group_baseline] + over[o.group_scale]
    elif o.credit in ("reward_to_go", "trajectory_return"):
        less = {
            "none": "",
            "value": " - V",
            "start_value": " - V(x)",
            "greedy": " - R of the mode",
            "length_weighted": " - mean by length",
            "token": " - mean by score",
        }
        found = ("G" if o.credit == "reward_to_go" else "R") + less.get(o.baseline, f" - {o.baseline}")
    else:
        found = {"gae": f"GAE({o.lam:g})", "vtrace": "V-trace", "n_step": f"{o.n}-step"}[o.credit]
    found += ", standardized" if o.normalize_advantages == "batch" else ""
    where = {"all": "", "high_entropy": ", where entropy is high", "low_covariance": ", less where it covaries"}
    return found + where[getattr(o, "learn_from", "all")]


def objective_of(o: Any) -> str:
    named = METHODS[o.method].objective
    if named in ("reinforce", "actor_critic"):
        return "log pi A"
    if named == "surrogate":
        return "r A"
    r = {"token": "r", "sequence": "s", "sequence_token": "s by token", "product": "W"}[getattr(o, "ratio", "token")]
    low, high = getattr(o, "clip_low", math.inf), getattr(o, "clip_high", math.inf)
    clipped = f"clip({r}, {1 - low:g}, {1 + high:g})" if min(low, high) < math.inf else r
    found = {
        "surrogate": f"min({r} A, {clipped} A)" if clipped != r else f"{r} A",
        "weight": f"sg(min({r}, {1 + high:g})) A log pi",
        "sigmoid": f"4/tau sigmoid(tau ({r} - 1)) A",
        "gamma": f"sg({r}^k exp(c (1 - {r}))) A log pi",
        "score": "log pi A",
    }[getattr(o, "gain", "surrogate")]
    more = []
    if getattr(o, "token_clip", math.inf) < math.inf:
        more.append(f"tokens clipped to e^±{o.token_clip:g} first")
    if getattr(o, "dual_clip", math.inf) < math.inf:
        more.append(f"at least {o.dual_clip:g} A")
    if getattr(o, "divergence_mask", "none") != "none":
        more.append(f"where {o.divergence_mask} <= {o.divergence_bound:g}")
    if getattr(o, "drift_bound", math.inf) < math.inf:
        more.append(f"without bad rows of drift > {o.drift_bound:g}")
    if getattr(o, "kl_old_coefficient", 0.0):
        squared = f"- {o.kl_old_coefficient / 2:g} (log W)^2"
        charged = f"- {o.kl_old_coefficient:g} abs(log r) where it covaries most"
        more.append(squared if o.kl_old_estimate == "squared_row" else charged)
    if getattr(o, "entropy_target", None) is not None:
        more.append("+ c H, c by a target")
    return ", ".join([found, *more])


def page(entries: list[Entry], distance: float) -> str:
    lines = [
        "# The atlas of methods",
        "",
        "Every line of the table of methods with its own defaults, on one world where all completions are listed: two",
        "prompts, at most three of three tokens. `python benchmarks/atlas.py` makes this page and its picture;",
        "`policygrad verify --world tokens` has the same rows and more.",
        "",
        "- **cosine**: between the gradient that the method expects and grad J; 1.0000 is the direction of grad J.",
        "- **length**: of the expected gradient, in lengths of grad J. A learning rate makes up for it.",
        "- **noise**: the variance of one episode's share over the square of that length: so many episodes until the",
        "  signal is as large as the noise.",
        f"- **off policy**: the same for actions of an older policy, KL(old, new) {distance:.3f} nats a token.",
        "- Every expectation is one that is written out a second time, from the tables of the world: `=` says that the",
        "  method has it to 1e-9, `0` that it is grad J itself.",
        "- r is the ratio of a token, s the geometric mean over the completion, W the product. MaxRL is measured on",
        "  rewards of 0 and 1. Critics are wrong on purpose.",
        "",
        "![Direction and noise of every method](atlas.png)",
        "",
        "| method | credit A | objective | average | cosine | length | noise "
        "| off: cosine | length | noise | | paper |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for e in entries:
        numbers = [f"{e.on.cosine:.4f}", f"{e.on.length:.2f}", f"{e.on.noise:,.0f}"]
        numbers += (
            ["", "", ""] if e.off is None else [f"{e.off.cosine:.4f}", f"{e.off.length:.2f}", f"{e.off.noise:,.0f}"]
        )
        verdicts = {"unbiased": "0", "as written out": "=", "WRONG": "WRONG"}
        verdict = " ".join(verdicts[x.verdict] for x in (e.on, e.off) if x is not None)
        cells = [f"`{e.name}`", credit_of(e.options), objective_of(e.options), f"by {e.options.weights}"]
        lines.append("| " + " | ".join([*cells, *numbers, verdict, METHODS[e.name].source]) + " |")
    return "\n".join(lines) + "\n"


def lag_table(lags: list[tuple[str, list[Point]]]) -> str:
    """The second table: bias and variance of each correction by lag."""
    lines = [
        "",
        "## By lag",
        "",
        "With `--lag N` the policy that samples is N updates older than the one that learns. Here the updates are",
        f"exact: steps along grad J, each of which moves the policy by KL(old, new) = {STEP:g} nats a decision, so",
        "that lag N is at about N squared times that. Bias is |E g - grad J| / |grad J|, at the policy that learns,",
        "and after it the variance of one episode's share, over |grad J| squared. Without a lag each is its row on",
        "policy. Bounds are 0.9 and 1.2. The rows are of the world of tokens, with leave-one-out credit in groups of",
        "three; those with GAE, and V-trace with the exact critic, are of a world of control.",
        "",
        "| correction | " + " | ".join(f"lag {lag}" for lag in LAGS) + " |",
        "|---" * (1 + len(LAGS)) + "|",
    ]
    for name, points in lags:
        cells = [f"{0.0 if p.verdict == 'unbiased' else p.bias:.3f} ({p.variance:,.0f})" for p in points]
        wrong = " WRONG" if any(p.verdict == "WRONG" for p in points) else ""
        lines.append("| " + " | ".join([f"{name}{wrong}", *cells]) + " |")
    return "\n".join(lines) + "\n"


# The picture


def draw(path: Path, entries: list[Entry], distance: float) -> None:
    """Two panels; the names stand in a column beside each, in the order of the points, with a line to their point."""
    figure = Figure(figsize=(17, 8), dpi=120)
    FigureCanvasAgg(figure)
    left = figure.add_axes((0.05, 0.08, 0.3, 0.78))
    right = figure.add_axes((0.53, 0.08, 0.3, 0.78), sharex=left, sharey=left)
    for axes, side, title in (
        (left, "on", "on policy"),
        (right, "off", f"off policy: KL(old, new) is {distance:.3f} nats a token"),
    ):
        axes.set_xscale("symlog", linthresh=1e-3, linscale=0.4)
        axes.set_yscale("log")
        axes.set_xlim(-2e-4, 2.0)
        axes.set_ylim(6, 160)
        axes.set_yticks([10, 20, 50, 100], ["10", "20", "50", "100"])
        axes.grid(color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(title, fontsize=12, color=INK, loc="left")
        axes.set_xlabel("1 - cosine: how far the expected gradient points away from grad J", color=INK)
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
        shown = [(e, getattr(e, side)) for e in entries if getattr(e, side) is not None]
        shown.sort(key=lambda x: (x[1].noise, x[1].cosine))
        for place, (e, p) in enumerate(shown):
            away = 1 - p.cosine if 1 - p.cosine > 1e-9 else 0.0
            color = COLORS[kind(e.options)]
            axes.scatter(away, p.noise, s=34, color=color, zorder=3)
            axes.annotate(
                e.name,
                (away, p.noise),
                (1.04, (place + 0.5) / len(shown)),
                textcoords="axes fraction",
                fontsize=8.5,
                color=color,
                va="center",
                arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.4, "alpha": 0.6, "relpos": (0, 0.5)},
            )
    left.set_ylabel("noise: episodes until the expected gradient is as large as its noise", color=INK)
    for name, color in COLORS.items():
        left.scatter([], [], color=color, label=SAID[name])
    left.legend(loc="upper left", fontsize=8.5, frameon=False)
    figure.text(0.05, 0.94, "Every method on one world: where it points, and how noisy it is", fontsize=15, color=INK)
    figure.savefig(path)


if __name__ == "__main__":
    main()
