"""Tuned settings: one file for each task, with a table of options for each method."""

import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.resources import files
from typing import Any

from policygrad.errors import UserError, listed, one_line, shortened
from policygrad.train.methods import METHODS, nearest
from policygrad.train.options import OptionError, is_read, options_of
from policygrad.train.worlds import kind_of

FOLDER = files("policygrad") / "presets"
ANY = "any"  # the table of settings for every method


def names() -> list[str]:
    """The names of all presets."""
    return sorted(entry.name.removesuffix(".toml") for entry in FOLDER.iterdir() if entry.name.endswith(".toml"))


def load(name: str) -> dict[str, dict[str, Any]]:
    """A preset: method -> option -> value. Raises UserError for an unknown name or a damaged file."""
    if name not in names():
        raise UserError(f"unknown preset {shortened(name)}: {nearest(str(name), names())} (or none)")
    try:
        table = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"the preset {name}.toml cannot be read ({one_line(error)}): mend it, or use none") from error
    for method, values in table.items():
        if method not in (*METHODS, ANY) or not isinstance(values, dict):
            raise UserError(f"the preset {name}.toml has {shortened(method)}, which is no table of a method: mend it")
    return table


def choose(preset: str | None, method: str, task: Any, values: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The preset of a run and its values: the named preset, none, or by default the preset of the task.

    values: the options that are set. The arithmetic task's preset applies only to its own model. Raises UserError if
    the named preset does not exist or has nothing for the method.
    """
    if preset == "none":
        return None, {}
    if preset is not None:
        table = load(preset)
        if method not in table and ANY not in table:
            raise UserError(f"preset {preset} has no settings for {method}, only for {listed(table, 90)}; or use none")
        return preset, settings(table, method, kind_of(task, values))
    own = task.split(":")[-1] if isinstance(task, str) and not task.startswith("exact:") else None
    if own in names() and values.get("model") is None and {method, ANY} & set(table := load(own)):
        return own, settings(table, method, kind_of(task, values))
    return None, {}


def settings(table: dict[str, dict[str, Any]], method: str, kind: str) -> dict[str, Any]:
    """A preset's values for a method: those for any method (if this one has the option), then those for this method."""
    known = {f.name for f in fields(options_of(method, kind))}
    return {name: x for name, x in table.get(ANY, {}).items() if name in known} | table.get(method, {})


def said(preset: str, tuned: Mapping[str, Any], options: Any) -> str:
    """A line that says which preset is used, and the run's values of its options, as far as they are read."""
    read = [name for name in tuned if is_read(name, options)]
    return f"preset {preset}: " + ", ".join(f"{name}={getattr(options, name)}" for name in read)


def passed_over(task: Any, environments: Any, method: str) -> str | None:
    """A line about a preset that is for the id of these environments, and not applied to an object or a function."""
    if isinstance(task, str) or environments is None:
        return None
    specs = [environments.spec]
    with suppress(Exception):  # a vector environment of another make may not know the call
        specs += environments.get_attr("spec")
    name = next((spec.id for spec in specs if spec is not None), None)
    if name not in names() or not {method, ANY} & set(load(name)):
        return None
    some = "" if callable(task) or hasattr(task, "num_envs") else ", with a function that makes the environment"
    return f'note: {name} has a preset, which is for its id and not used here: preset="{name}" uses it{some}'


@contextmanager
def blamed(preset: str | None, tuned: Mapping[str, Any], given: Collection[str]) -> Iterator[None]:
    """An error about an option says so if its value comes from the preset and not from the user.

    tuned: the preset's values. given: the options that the user sets.
    """
    try:
        yield
    except OptionError as error:
        name = error.option
        if preset is None or name not in tuned or name in given:
            raise
        said = f"{error} (preset {preset} sets {name}={tuned[name]}; preset none leaves it)"
        raise OptionError(name, said) from error
