"""The row of a combination that somebody is about to train: `policygrad train compose`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from rich.console import Console

from policygrad.errors import UserError
from policygrad.train.options import Options
from policygrad.verify.command import estimator_table, exactly
from policygrad.verify.methods import method_rows, options_at
from policygrad.verify.settings import token_setting
from policygrad.verify.statistics import Finding, Section, judged

# The options of credit and objective, which stand together; the others say how long, how fast and on what it learns.
_NAMES = [f.name for f in fields(Options)]
ESTIMATOR = {
    name
    for name in _NAMES[_NAMES.index("credit") : _NAMES.index("learning_rate")]
    if name != "gamma" and not name.startswith("kl_ref")  # the world's own; and another objective
}


def findings(options: Any) -> list[Finding]:
    """What the estimator of these options expects on the world of tokens, on policy, off it, and in one iteration.

    Without the KL to a reference, which is another objective, and with a critic that is wrong everywhere.
    """
    with exactly():
        at = token_setting(0)
        plain = options_at(options.method, at)
        known = {f.name for f in fields(plain)} & {f.name for f in fields(options)} & ESTIMATOR  # of both worlds
        chosen = replace(plain, **{name: getattr(options, name) for name in known})
        found = judged(Section("tokens", method_rows(at, chosen), at.on_policy, at.gradient), 20_000)
    return [replace(f, name=f.name.removeprefix(f"{options.method}, ")) for f in found]


def shown(options: Any, anyway: bool) -> None:
    """Print the rows on standard error. Raises UserError if one is WRONG, and `anyway` is not said."""
    found = findings(options)
    Console(stderr=True, width=None if Console(stderr=True).is_terminal else 150).print(
        estimator_table("tokens", found)
    )
    wrong = [f.name for f in found if f.verdict == "WRONG"]
    if wrong and not anyway:
        raise UserError(
            f"{wrong[0]}, this combination does not expect what is written out for it (see its row): change it, or "
            "train with --anyway"
        )
