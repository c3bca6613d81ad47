"""Tuned settings, one file an environment: a table of options for each algorithm."""

import re
import tomllib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from policygrad.errors import UserError
from policygrad.runs.options import nearest

FOLDER = files("policygrad") / "presets"


def names() -> list[str]:
    """The presets there are."""
    return sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> dict[str, dict[str, Any]]:
    """A preset: algorithm -> option -> value. Raises UserError with the nearest names if there is none."""
    if name not in names():
        raise UserError(f"unknown preset {name!r}: {nearest(name, names())} (or none)")
    return tomllib.loads((FOLDER / f"{name}.toml").read_text())


def choose(preset: str | None, algorithm: str, environment: Any) -> tuple[str | None, dict[str, Any]]:
    """The preset that a run takes, and its values: the one named, none, or by default the environment's own.

    Raises UserError for a named preset that does not exist or has nothing for the algorithm.
    """
    if preset == "none":
        return None, {}
    if preset is not None:
        table = load(preset)
        if algorithm not in table:
            raise UserError(
                f"preset {preset} has no settings for {algorithm}, only for {', '.join(table)}; or use none"
            )
        return preset, table[algorithm]
    own = environment.split(":")[-1] if isinstance(environment, str) else None
    if own in names() and algorithm in (table := load(own)):
        return own, table[algorithm]
    return None, {}


def blamed(message: str, preset: str | None, tuned: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The end of an error message about values that are the preset's and not the user's; else nothing."""
    kept = [name for name, x in tuned.items() if values[name] == x]
    named = [name for name in kept if re.search(rf"\b{name} is {re.escape(str(values[name]))}(?!\w|\.\d)", message)]
    if not named:
        return ""
    said = ", ".join(f"{name}={tuned[name]}" for name in named)
    return f" (preset {preset} sets {said}; --preset none leaves {'it' if len(named) == 1 else 'them'})"
