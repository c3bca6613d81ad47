"""`policygrad verify`: every estimator, method and update held against the closed form, as tables."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from policygrad.errors import UserError, shortened
from policygrad.functions import load_function
from policygrad.verify.control import control_rows, forbidding, harder_sections
from policygrad.verify.conversations import conversation_sections
from policygrad.verify.lag import lag_section
from policygrad.verify.losses import Loss, loss_checks, loss_rows
from policygrad.verify.memory import memory_sections
from policygrad.verify.methods import method_section
from policygrad.verify.options import VerifyOptions
from policygrad.verify.settings import NAMES, Setting, paid_by_token, setting_of, token_setting
from policygrad.verify.statistics import Finding, Section, judged
from policygrad.verify.tokens import paid_section, token_section
from policygrad.verify.updates import Check, update_checks
from policygrad.verify.user import Advantage, user_rows

# Their rows repeat those of the random world.
BRIEF = ("random, two episodes a row", "random, with holes", "random, cut rows with holes", "random, forbidden actions",
         "random, forbidden actions, methods", "random, hidden states", "random, GRU", "random, LSTM",
         "random, GRU, two episodes a row", "random, LSTM, two episodes a row", "random, lag", "chain", "bandit",
         "cliff", "tokens, paid by token")  # fmt: skip
SAMPLES = (1_000, 200_000)
STYLES = {"unbiased": "green", "biased": "yellow", "no closed form": "yellow", "WRONG": "bold red"}
LEGEND = """\
bias       of the expected estimate, over the size of the exact gradient; cosine: between the two
z          bias over the standard error at {samples:,} episodes (the mean of an unbiased sample has about 1)
variance   of the estimate from one episode; n: the number of episodes at which noise equals bias
biased     as its paper says, and by exactly as much: a row whose expectation is another is WRONG
no closed form: a method with an option that nothing here knows; it is measured, and held against nothing
Enumerated rows are exact to 1e-9. Sampled ones are tested by z along fixed directions, with Bonferroni's correction;
all together they raise a false alarm in fewer than 1 of 1,000 runs."""


@dataclass(frozen=True)
class Report:
    """All that was found."""

    findings: list[Finding]
    checks: list[Check]

    @property
    def wrong(self) -> int:
        return sum(f.verdict == "WRONG" for f in self.findings) + sum(not c.holds for c in self.checks)


def run(options: VerifyOptions) -> int:
    """Verify and print. Returns the exit code: 1 if anything is WRONG. Raises UserError for what can't be done."""
    start = time.perf_counter()
    named = options.estimator
    function = None if named is None else load_function(named, what="advantage function")
    loss = None if options.loss is None else load_function(options.loss, what="loss")
    report = verify(options, function, loss)
    seconds = time.perf_counter() - start
    if options.json:
        print(json.dumps(as_json(report, options, seconds)))
    else:
        print_report(report, options, seconds)
    return int(report.wrong > 0)


def verify(options: VerifyOptions, function: Advantage | None = None, loss: Loss | None = None) -> Report:
    """All findings, in float64 and with random numbers of their own: the caller's are left as they were."""
    if not SAMPLES[0] <= options.samples <= SAMPLES[1]:
        raise UserError(f"--samples is {shortened(options.samples)}: give {SAMPLES[0]:,} to {SAMPLES[1]:,}")
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {shortened(options.seed)}: it must be 0 or more and less than 2**63")
    with exactly(), torch.random.fork_rng(devices=[]), _progress() as advance:
        torch.manual_seed(options.seed)
        findings = []
        checks: list[Check] = []
        if loss is not None and options.loss is not None:
            if options.world not in ("all", "tokens"):
                raise UserError(f"--world is {options.world}, and a loss is of the world of tokens: leave it out")
            if function is not None:
                raise UserError("--estimator and --loss have tables of their own: ask for one at a time")
            at = token_setting(options.seed)
            advance("loss")
            section = Section("tokens", loss_rows(options.loss, loss, at), at.on_policy, at.gradient)
            return Report(judged(section, options.samples), loss_checks(options.loss, loss, at))
        for section in sections(options, function):
            advance(section.name)
            findings += judged(section, options.samples)
        advance("updates")
        checks = update_checks(options.seed) if options.world == "all" else []
    return Report(findings, checks)


def sections(options: VerifyOptions, function: Advantage | None = None) -> Iterator[Section]:
    """The worlds asked for, with their rows; a user's function is in each."""

    def with_user(at: Setting, section: Section) -> Section:
        if function is None or options.estimator is None:
            return section
        return replace(section, rows=section.rows + user_rows(options.estimator, function, at))

    for name in NAMES:
        if options.world in ("all", name):
            at = setting_of(name, options.samples, options.seed)
            yield with_user(at, Section(name, control_rows(at), at.on_policy, at.gradient))
            if name == "random":
                yield method_section(at)
                yield lag_section(at)
                yield from (with_user(*harder) for harder in harder_sections(options.seed))
                yield method_section(forbidding(options.seed))
                for at, section in memory_sections(options.seed):
                    yield with_user(at, section)
    if options.world in ("all", "tokens"):
        at = token_setting(options.seed)
        yield with_user(at, token_section(at))
        yield method_section(at)
        yield lag_section(at)
        at = paid_by_token(options.seed)
        yield with_user(at, paid_section(at))
    if options.world in ("all", "conversations"):
        yield from (with_user(*found) for found in conversation_sections(options.seed))


@contextmanager
def exactly() -> Iterator[None]:
    """Whatever is made without a dtype is float64, and one thread computes: arrays this small are slower on two."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


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
        shown = [f for f in rows if not brief or f in wrong or _is_users(f, options)]
        if shown:
            console.print(estimator_table(world, shown))
        if brief:
            right, more = len(rows) - len(wrong), f"policygrad verify --world {world.partition(',')[0]}"
            said = f"{right} of {len(rows)} rows as they should be ({more})"
            console.print(f"[bold]{world}[/bold], by {rows[0].method}: {said}\n")
    if report.checks:
        console.print(_check_table(report.checks, "updates" if options.loss is None else "what no loss may depend on"))
    total = len(report.findings) + len(report.checks)
    state = "[bold green]none WRONG" if report.wrong == 0 else f"[bold red]{report.wrong} WRONG"
    console.print(f"{total} rows in {seconds:.0f} s, {state}")
    console.print(LEGEND.format(samples=options.samples), style="dim")


def _is_users(finding: Finding, options: VerifyOptions) -> bool:
    named = options.estimator
    return named is not None and finding.name.startswith(f"{named.rpartition(':')[2]},")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None)


def estimator_table(world: str, findings: list[Finding]) -> Table:
    """The rows of a world."""
    table = _table(f"{world}, by {findings[0].method}")
    table.add_column("estimator", no_wrap=True)
    for name in ("bias", "cosine", "z", "variance", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=not sys.stdout.isatty())
    for f in findings:
        of = "" if f.of == "grad J" else f"  of {f.of}"
        numbers = (f"{f.relative_bias:.2g}", _number(f.cosine, ".4f"), _number(f.z, ".1f"), _number(f.variance, ".3g"))
        size = "-" if math.isinf(f.sample_size) or math.isnan(f.sample_size) else f"{f.sample_size:,.0f}"
        said = f.verdict if f.verdict != "biased" else f"biased: {f.reason}"
        style = STYLES[f.verdict]
        table.add_row(f"{f.name}[dim]{of}[/dim]", *numbers, size, f"[{style}]{said}[/{style}]")
    return table


def _check_table(checks: list[Check], title: str) -> Table:
    table = _table(title)
    for name in ("claim", "measured", "should be", "verdict"):
        table.add_column(name, justify="right" if name == "measured" else "left", no_wrap=True)
    for c in checks:
        style, said = ("green", "holds") if c.holds else ("bold red", "WRONG")
        table.add_row(c.name, f"{c.measured:.3g}", c.claim, f"[{style}]{said}[/{style}]")
    return table


def _number(x: float, form: str) -> str:
    return "-" if math.isnan(x) else format(x, form)
