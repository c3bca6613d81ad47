"""The row of a combination that somebody is about to train: `policygrad train compose`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from rich.console import Console

from policygrad.errors import UserError
from policygrad.verify.command import estimator_table, exactly
from policygrad.verify.methods import ONE_STEP, method_rows, options_at
from policygrad.verify.settings import token_setting
from policygrad.verify.statistics import Finding, Section, judged

# The options that make up the estimator; the others say how long, how fast and from what it learns.
ESTIMATOR = (
    "credit", "lam", "n", "rho_bar", "c_bar", "baseline", "discounted", "group_baseline", "group_scale",
    "normalize_advantages", "learn_from", "learn_from_share", "weights", "ratio", "gain", "clip_low", "clip_high",
    "sigmoid_positive", "sigmoid_negative", "gamma_power_positive", "gamma_power_negative", "gamma_rate_positive",
    "gamma_rate_negative", "token_clip", "dual_clip", "divergence_mask", "divergence_bound", "drift_bound",
    "kl_old_coefficient", "kl_old_estimate", "entropy_coefficient",
)  # fmt: skip


def findings(options: Any) -> list[Finding]:
    """What the estimator of these options expects on the world of tokens, on policy, off it, and in one iteration.

    Without the KL to a reference, which is another objective, and with a critic that is wrong everywhere.
    """
    with exactly():
        at = token_setting(0)
        plain = options_at(options.method, at)
        known = {f.name for f in fields(plain)} - ONE_STEP.keys()
        chosen = replace(plain, **{x: getattr(options, x) for x in ESTIMATOR if x in known and hasattr(options, x)})
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
            f"{wrong[0]} this combination does not expect what is written out for it (see its row): change it, or "
            "train with --anyway"
        )
