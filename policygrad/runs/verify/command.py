"""`policygrad verify`: every estimator and update held against the closed form, as a table."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from policygrad.errors import UserError
from policygrad.exact.closed_form import state_value
from policygrad.exact.policies import TabularCritic
from policygrad.exact.tokens import OnPrefixes
from policygrad.runs.verify.control import (
    Setting,
    algorithm_rows,
    control_rows,
    exact_gradient,
    setting_of,
    time_limit_rows,
    two_episode_rows,
    two_whole_episode_rows,
)
from policygrad.runs.verify.options import VerifyOptions
from policygrad.runs.verify.statistics import Estimator, Experience, Finding, Moments, float64, judge, moments
from policygrad.runs.verify.tokens import TokenSetting, exact_reward_gradient, token_rows, token_setting
from policygrad.runs.verify.updates import Check, update_checks
from policygrad.runs.verify.user import Advantage, load_function, user_rows

CONTROL = ("random", "chain", "bandit", "cliff")
BRIEF = ("random, two episodes a row", "chain", "bandit", "cliff")  # they repeat the random world's rows
SAMPLES = (1_000, 200_000)
LEGEND = """\
bias       of the expected estimate, over the size of the exact gradient; cosine: between the two
z          bias over the standard error at {samples:,} episodes (the mean of an unbiased sample has about 1)
variance   of the estimate from one episode; n: the number of episodes at which noise equals bias
biased     as its paper says, and by exactly as much: a row whose expectation is another is WRONG
Enumerated rows are exact to 1e-9. Sampled ones are tested by z along fixed directions, with Bonferroni's correction;
all together they raise a false alarm in fewer than 1 of 1,000 runs."""


@dataclass(frozen=True)
class Section:
    """A world's rows, the policy and experience that they are measured on, and the gradient they are measured by."""

    world: str
    policy: nn.Module
    on_policy: Experience
    off_policy: Experience
    exact: Tensor
    rows: list[Estimator]
    measured: list[tuple[Estimator, Moments]]  # rows that came with their moments


@dataclass(frozen=True)
class Report:
    """All that was found."""

    findings: list[Finding]
    checks: list[Check]

    @property
    def wrong(self) -> int:
        return sum(f.verdict == "WRONG" for f in self.findings) + sum(not c.holds for c in self.checks)


def run(options: VerifyOptions) -> int:
    """Verify, print, draw. Returns the exit code: 1 if anything is WRONG. Raises UserError for what can't be done."""
    start = time.perf_counter()
    function = None if options.estimator is None else load_function(options.estimator)
    report = verify(options, function)
    seconds = time.perf_counter() - start
    if options.plot is not None:
        from policygrad.runs.verify.plot import draw  # matplotlib takes its time

        with _one_thread():
            draw(options.plot, report.findings)
    if options.json:
        print(json.dumps(as_json(report, options, seconds)))
    else:
        print_report(report, options, seconds)
    return int(report.wrong > 0)


def verify(options: VerifyOptions, function: Advantage | None = None) -> Report:
    """All findings, in float64 and with random numbers of their own: the caller's are left as they were."""
    if not SAMPLES[0] <= options.samples <= SAMPLES[1]:
        raise UserError(f"--samples is {options.samples}: give {SAMPLES[0]:,} to {SAMPLES[1]:,}")
    with _one_thread(), float64(), torch.random.fork_rng(devices=[]), _progress() as advance:
        torch.manual_seed(options.seed)
        findings = []
        for section in sections(options, function):
            advance(section.world)
            findings += judged(section, options.samples)
        advance("updates")
        checks = update_checks(options.seed) if options.world == "all" else []
    return Report(findings, checks)


def sections(options: VerifyOptions, function: Advantage | None = None) -> Iterator[Section]:
    """The worlds asked for, with their rows; a user's function is in each."""
    for name in CONTROL:
        if options.world in ("all", name):
            at = setting_of(name, options.samples, options.seed)
            ran = algorithm_rows(at) if at.on_policy.enumerated else []
            yield _control_section(at, control_rows(at), exact_gradient(at), options, function, ran)
            if name == "random":
                for cut in (time_limit_rows, two_episode_rows, two_whole_episode_rows):
                    yield _control_section(*cut(options.seed), options, function)
    if options.world in ("all", "tokens"):
        yield _token_section(token_setting(options.seed), options, function)


def _control_section(
    at: Setting,
    rows: list[Estimator],
    exact: Tensor,
    options: VerifyOptions,
    function: Advantage | None,
    measured: list[tuple[Estimator, Moments]] | None = None,
) -> Section:
    if function is not None and options.estimator is not None:
        value = state_value(at.world, at.probs)
        tables = {"exact": value, "zero": torch.zeros_like(value)} if at.horizon is None else {"exact": value}
        critics: dict[str, nn.Module] = {name: TabularCritic(table) for name, table in tables.items()}
        rows = rows + user_rows(options.estimator, function, at.on_policy, critics, at.world.gamma)
    return Section(at.name, at.policy, at.on_policy, at.off_policy, exact, rows, measured or [])


def _token_section(at: TokenSetting, options: VerifyOptions, function: Advantage | None) -> Section:
    rows = token_rows(at)
    if function is not None and options.estimator is not None:
        value = state_value(at.world, at.probs)
        tables = {"exact": value, "zero": torch.zeros_like(value)}
        critics: dict[str, nn.Module] = {n: OnPrefixes(at.tokens, TabularCritic(v)) for n, v in tables.items()}
        rows = rows + user_rows(options.estimator, function, at.on_policy, critics, at.world.gamma)
    return Section("tokens", at.policy, at.on_policy, at.off_policy, exact_reward_gradient(at), rows, [])


def judged(section: Section, samples: int) -> list[Finding]:
    """Every row of a section, measured and judged."""
    found = []
    for row in section.rows:
        experience = row.experience or (section.off_policy if row.off_policy else section.on_policy)
        found.append((row, moments(section.policy, row, experience)))
    found += section.measured
    return [judge(section.world, row, m, section.exact, samples, tests=len(found)) for row, m in found]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Arrays this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says which world is at work, where that is a terminal."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("verifying", total=None)
        yield lambda world: progress.update(task, description=f"verifying: {world}")


# What is said of it


def verdict(finding: Finding) -> str:
    """The verdict in words."""
    if finding.verdict != "biased":
        return finding.verdict
    return f"biased, as its paper says: {finding.reason}"


def as_json(report: Report, options: VerifyOptions, seconds: float) -> dict[str, object]:
    """One object; what is infinite or undefined is null."""

    def plain(row: dict[str, object]) -> dict[str, object]:
        return {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in row.items()}

    return {
        "world": options.world,
        "samples": options.samples,
        "seed": options.seed,
        "seconds": round(seconds, 2),
        "wrong": report.wrong,
        "estimators": [plain(asdict(f) | {"verdict": verdict(f)}) for f in report.findings],
        "updates": [plain(asdict(c)) for c in report.checks],
    }


def print_report(report: Report, options: VerifyOptions, seconds: float) -> None:
    """The tables. With --world all the worlds that repeat the rows of the random one are summed up in a line each."""
    console = Console() if sys.stdout.isatty() else Console(width=150)
    names = list(dict.fromkeys(f.world for f in report.findings))
    for world in names:
        rows = [f for f in report.findings if f.world == world]
        wrong = [f for f in rows if f.verdict == "WRONG"]
        brief = options.world == "all" and world in BRIEF
        shown = wrong if brief else rows
        shown += [f for f in rows if brief and options.estimator is not None and _is_users(f, options)]
        if shown:
            console.print(_estimator_table(world, shown, options))
        if brief:
            more = f"policygrad verify --world {world.partition(',')[0]}"
            console.print(f"[bold]{world}[/bold], by {rows[0].method}: {_count(rows, wrong)} ({more})\n")
    if report.checks:
        console.print(_update_table(report.checks))
    total = len(report.findings) + len(report.checks)
    state = "[bold green]none WRONG" if report.wrong == 0 else f"[bold red]{report.wrong} WRONG"
    console.print(f"{total} rows in {seconds:.0f} s, {state}")
    console.print(LEGEND.format(samples=options.samples), style="dim")


def _count(rows: list[Finding], wrong: list[Finding]) -> str:
    return f"{len(rows) - len(wrong)} of {len(rows)} rows as they should be"


def _is_users(finding: Finding, options: VerifyOptions) -> bool:
    return finding.name.startswith(str(options.estimator).rpartition(":")[2] + ",")


def _estimator_table(world: str, findings: list[Finding], options: VerifyOptions) -> Table:
    title = f"{world}, by {findings[0].method}"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)
    table.add_column("estimator", no_wrap=True)
    for name in ("bias", "cosine", "z", "variance", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=not sys.stdout.isatty())
    for f in findings:
        of = "" if f.of == "grad J" else f"  of {f.of}"
        style = {"unbiased": "green", "biased": "yellow", "WRONG": "bold red"}[f.verdict]
        numbers = (f"{f.relative_bias:.2g}", _number(f.cosine, ".4f"), _number(f.z, ".1f"), _number(f.variance, ".3g"))
        size = "-" if math.isinf(f.sample_size) or math.isnan(f.sample_size) else f"{f.sample_size:,.0f}"
        said = f.verdict if f.verdict != "biased" else f"biased: {f.reason}"
        table.add_row(f"{f.name}[dim]{of}[/dim]", *numbers, size, f"[{style}]{said}[/{style}]")
    return table


def _update_table(checks: list[Check]) -> Table:
    table = Table(title="updates", title_justify="left", title_style="bold", header_style="bold", box=None)
    for name, justify in (("claim", "left"), ("measured", "right"), ("should be", "left"), ("verdict", "left")):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for c in checks:
        style, said = ("green", "holds") if c.holds else ("bold red", "WRONG")
        table.add_row(c.name, f"{c.measured:.3g}", c.claim, f"[{style}]{said}[/{style}]")
    return table


def _number(x: float, form: str) -> str:
    return "-" if math.isnan(x) else format(x, form)
