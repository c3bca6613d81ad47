"""The picture of `verify`: bias against variance of every estimator, and three ways up the same hill.

python benchmarks/verify_picture.py [FILE]        writes docs/verify.png, or FILE
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor
from torch.optim import SGD

from policygrad.algorithms.trpo import SurrogateObjective
from policygrad.exact.closed_form import expected_return
from policygrad.exact.policies import SoftmaxPolicy
from policygrad.exact.worlds import two_states
from policygrad.updates import Update, ascend, learning_rate, natural_step, trust_region_step
from policygrad.verify.command import exactly, verify
from policygrad.verify.options import VerifyOptions
from policygrad.verify.statistics import Finding
from policygrad.verify.updates import exact_batch, identifiable

DOCS = Path(__file__).resolve().parent.parent / "docs"
WORLDS = ("random", "tokens")

# Families by the beginning of a row's name; what is of no family is of language.
FAMILIES = {
    "REINFORCE": ("#3B6FB6", "o"),
    "A2C": ("#E07B39", "s"),
    "V-trace": ("#3A9D5D", "^"),
    "surrogates": ("#7E57A8", "D"),
    "language": ("#C2384A", "v"),
}
SMALL, BODY, TITLE = 7.5, 10.5, 14
INK = "#222222"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, nargs="?", default=DOCS / "verify.png")
    file = parser.parse_args().file
    draw(file, [f for world in WORLDS for f in verify(VerifyOptions(world=world)).findings])  # type: ignore[arg-type]
    print(file)


def draw(path: Path, findings: Sequence[Finding]) -> None:
    """Write the figure."""
    figure = Figure(figsize=(19, 9.4), dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        1, 3, width_ratios=[0.62, 1.15, 1.45], wspace=0.0, left=0.045, right=0.955, top=0.9, bottom=0.08
    )
    inner = grid[0, 2].subgridspec(1, 2, width_ratios=[0.1, 1], wspace=0.0)
    strip = figure.add_subplot(grid[0, 0])
    bias_and_variance(strip, figure.add_subplot(grid[0, 1], sharey=strip), findings)
    with exactly():
        learning_paths(figure.add_subplot(inner[0, 1]))
    figure.savefig(path)


# Bias against variance


def bias_and_variance(strip: Axes, plane: Axes, findings: Sequence[Finding]) -> None:
    """Unbiased estimators in the strip, biased ones in the plane; both axes relative to the exact gradient's size."""
    worlds = {f.world for f in findings}
    shown = worlds & {"random", "tokens"} or worlds
    kept = [f for f in findings if f.world in shown and "grad J" in f.of and f.variance > 0]
    unbiased = _merged([f for f in kept if f.verdict == "unbiased"])
    biased = _merged([f for f in kept if f.verdict != "unbiased"])
    for axes in (strip, plane):
        axes.set_yscale("log")
        axes.grid(True, which="major", color="#E4E4E4", linewidth=0.7)
        axes.set_axisbelow(True)
    noise = [_noise(f) for f, _ in [*unbiased, *biased]]
    if noise:
        strip.set_ylim(min(noise) / 1.5, max(noise) * 1.6)
    strip.set_xlim(-0.12, 1)
    strip.set_xticks([0], ["0"])
    strip.set_facecolor("#F2F7F2")
    plane.set_xscale("log")
    plane.tick_params(axis="y", which="both", labelleft=False, left=False)
    strip.yaxis.set_major_formatter("{x:g}")
    strip.yaxis.set_minor_formatter("{x:g}")
    strip.tick_params(axis="y", which="both", labelsize=SMALL + 1)
    plane.set_xlim(1e-3, 2.2)
    strip.set_ylabel("variance of one episode  /  $|\\nabla J|^2$", fontsize=BODY)
    plane.set_xlabel("bias  /  $|\\nabla J|$", fontsize=BODY)
    strip.set_title("unbiased", fontsize=BODY, color="#3A7D44", loc="left")
    plane.set_title("biased, and by as much as the paper says", fontsize=BODY, color="#8A5A00", loc="left")
    strip.figure.text(0.045, 0.955, "What an estimator costs: bias and noise, against the exact gradient",
                      fontsize=TITLE, weight="bold", color=INK)  # fmt: skip
    for axes, rows in ((strip, unbiased), (plane, biased)):
        for f, _ in rows:
            color, marker = FAMILIES[_family(f)]
            x = 0.0 if axes is strip else f.relative_bias
            axes.scatter(x, _noise(f), s=46, c=color, marker=marker, edgecolor="white", linewidth=0.7, zorder=3)
    handles = [Line2D([], [], color=c, marker=m, linestyle="", label=n) for n, (c, m) in FAMILIES.items()]
    plane.legend(handles=handles, loc="lower left", fontsize=SMALL + 1, frameon=True, framealpha=0.95)
    _label_strip(strip, unbiased)
    _label_plane(plane, biased)


def _noise(finding: Finding) -> float:
    return finding.variance / finding.size**2


def _family(finding: Finding) -> str:
    if finding.world == "tokens":
        return "language"
    first = finding.name.partition(",")[0]
    return first if first in FAMILIES else "surrogates"


def _merged(findings: list[Finding]) -> list[tuple[Finding, str]]:
    """Rows of the same point become one, named after the first, with how many more there are."""
    points: dict[tuple[float, float], list[Finding]] = {}
    for f in findings:
        points.setdefault((float(f"{f.relative_bias:.3g}"), float(f"{_noise(f):.3g}")), []).append(f)
    return [(same[0], _short(same)) for same in points.values()]


def _short(same: list[Finding]) -> str:
    names = [f.name.removeprefix("REINFORCE, ").replace("gamma^t", "$\\gamma^t$") for f in same]
    return names[0] if len(names) == 1 else f"{names[0]}  (and {len(names) - 1} like it)"


def _label_strip(axes: Axes, rows: list[tuple[Finding, str]]) -> None:
    """Labels in a column beside the points, moved apart where points are close."""
    rows = sorted(rows, key=lambda row: _noise(row[0]))
    low, high = (math.log(y) for y in axes.get_ylim())
    gap = (high - low) / 52
    places: list[float] = []
    for f, _ in rows:
        places.append(max(math.log(_noise(f)), places[-1] + gap if places else -math.inf))
    spill = max(0.0, (places[-1] if places else low) - (high - gap))
    for (f, name), place in zip(rows, places, strict=True):
        y = math.exp(place - spill * (place - low) / (high - low))
        axes.plot([0.02, 0.1], [_noise(f), y], color="#BBBBBB", linewidth=0.6, zorder=1)
        axes.text(0.115, y, name, fontsize=SMALL, va="center", color=FAMILIES[_family(f)][0])


def _label_plane(axes: Axes, rows: list[tuple[Finding, str]]) -> None:
    """Each label at the first place around its point where it covers neither point nor label."""
    to_data = axes.transData.inverted().transform
    points = [axes.transData.transform((f.relative_bias, _noise(f))) for f, _ in rows]
    reach = axes.figure.dpi / 14
    taken: list[tuple[float, ...]] = [(x - reach, y - reach, x + reach, y + reach) for x, y in points]
    legend = axes.get_legend()
    if legend is not None:
        taken.append(tuple(legend.get_window_extent().padded(4).extents))
    frame = axes.get_window_extent()
    for (f, name), (x, y) in sorted(zip(rows, points, strict=True), key=lambda pair: -pair[1][1]):
        color = FAMILIES[_family(f)][0]
        text = axes.text(f.relative_bias, _noise(f), name, fontsize=SMALL, va="center", ha="left", color=color)
        extent = text.get_window_extent()
        for box in _around(x, y, extent.width, extent.height, 1.3 * reach):
            inside = frame.x0 + 4 < box[0] and box[2] < frame.x1 - 4 and frame.y0 < box[1] and box[3] < frame.y1
            if inside and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        middle = (box[1] + box[3]) / 2
        text.set_position(tuple(to_data((box[0], middle))))
        near = to_data((min(max(x, box[0]), box[2]), middle))
        axes.plot([f.relative_bias, near[0]], [_noise(f), near[1]], color="#BBBBBB", linewidth=0.6, zorder=1)


def _around(x: float, y: float, width: float, height: float, gap: float) -> list[tuple[float, float, float, float]]:
    boxes = []
    for far in range(14):
        for up in (0,) if far == 0 else (far, -far):
            bottom = y - height / 2 + up * height * 0.9
            for left in (x + gap, x - gap - width, x - width / 2):
                if far > 0 or left != x - width / 2:
                    boxes.append((left, bottom, left + width, bottom + height))
    return boxes


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return bool(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3])


# Learning paths


EXACT: dict[str, Any] = {"damping": 1e-8, "cg_iters": 10}
GAMMA, START = 0.9, (2.0, -2.0)
WINDOW = (-2.6, 6.9, -3.1, 8.4)
STEPS = 320


def learning_paths(axes: Axes) -> None:
    """Plain, natural and trust-region ascent from one start, over the contours of J of Kakade's two states."""
    low_x, high_x, low_y, high_y = WINDOW
    x, y = np.linspace(low_x, high_x, 101), np.linspace(low_y, high_y, 101)
    height = _height(torch.tensor(np.stack(np.meshgrid(x, y), -1)).flatten(0, 1)).reshape(len(y), len(x))
    filled = axes.contourf(x, y, height, levels=26, cmap="YlGnBu_r", alpha=0.92)
    axes.contour(x, y, height, levels=26, colors="white", linewidths=0.35, alpha=0.7)
    bar = axes.figure.colorbar(filled, ax=axes, pad=0.015, fraction=0.04, aspect=38)
    bar.set_label("$J(\\theta)$", fontsize=BODY)
    inset = axes.inset_axes((0.05, 0.06, 0.3, 0.22), facecolor="#FFFFFFEE")
    natural = natural_step(step_size=partial(learning_rate, rate=0.03), **EXACT)
    region = trust_region_step(delta=0.01, **EXACT)
    stretch = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    ways: list[tuple[str, Update | None, Tensor, str, str]] = [
        ("plain gradient", None, torch.eye(2), "#E4322B", "-"),
        ("plain gradient, $\\theta_2$ in thirds", None, stretch, "#E4322B", "--"),
        ("natural gradient", natural, torch.eye(2), "#FFB000", "-"),
        ("natural gradient, $\\theta_2$ in thirds", natural, stretch, "#6B4200", ":"),
        ("trust region (TRPO)", region, torch.eye(2), "#101010", "-"),
    ]
    for name, step, mix, color, style in ways:
        path = ascent(step, mix)
        reached = _height(torch.tensor(path))
        axes.plot(*path.T, style, color=color, linewidth=2.3, label=name, zorder=4 + (style == ":"))
        inset.plot(range(len(reached)), reached, style, color=color, linewidth=1.6)
        if style == "-":
            every = 1 if step is region else 10
            axes.plot(*path[::every].T, ".", color=color, markersize=8, zorder=5)
    axes.plot(*START, "*", color="white", markeredgecolor=INK, markersize=19, zorder=6)
    axes.annotate(
        "start", START, xytext=(-14, 10), textcoords="offset points", fontsize=BODY, ha="right", color="white"
    )
    axes.annotate("the plateau: staying where 1 is paid", (4.6, -2.3), fontsize=BODY, ha="center", color="white")
    axes.set_xlim(low_x, high_x)
    axes.set_ylim(low_y, high_y)
    axes.set_xlabel("$\\theta_1$: log-odds of staying in the first state, which pays 1", fontsize=BODY)
    axes.set_ylabel("$\\theta_2$: log-odds of staying in the second, which pays 2", fontsize=BODY)
    axes.legend(loc="upper right", fontsize=SMALL + 2, framealpha=0.95)
    inset.set_title("$J$ by steps", fontsize=SMALL + 2, color=INK, pad=3)
    inset.set_xlim(0, STEPS)
    inset.tick_params(labelsize=SMALL)
    inset.grid(True, color="#E4E4E4", linewidth=0.6)
    axes.set_title("dots every 10 steps, of the trust region every step", fontsize=BODY, color="#555555", loc="left")
    axes.figure.text(0.585, 0.955, "Three ways up one hill", fontsize=TITLE, weight="bold", color=INK)


def ascent(step: Update | None, mix: Tensor) -> np.ndarray:
    """theta after each step with exact advantages, theta = M theta' and theta' what is stepped: [STEPS + 1, 2].

    step: None is a plain one of rate 1.
    From where the policy is all but certain it stands still.
    """
    world = two_states(GAMMA)
    policy = SoftmaxPolicy(identifiable(2, 2) @ mix, torch.linalg.solve(mix, torch.tensor(START)))
    update, path = step or ascend(SGD(policy.parameters(), lr=1.0)), [mix @ policy.theta.detach()]
    for _ in range(STEPS):
        if float(path[-1].abs().max()) < 15:
            update(SurrogateObjective(policy), exact_batch(world, policy))
        path.append(mix @ policy.theta.detach())
    return torch.stack(path).numpy()


def _height(theta: Float[Tensor, "K 2"]) -> np.ndarray:
    """J at each of K pairs of parameters."""
    features, world = identifiable(2, 2), two_states(GAMMA)
    return torch.vmap(lambda pair: expected_return(world, (features @ pair).softmax(-1)))(theta).numpy()


if __name__ == "__main__":
    main()
