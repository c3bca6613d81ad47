"""Tuned settings: one file for each task, with a table of options for each method. A user's own file is data.

No torch here.
"""

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from policygrad.errors import UserError, ending, listed, one_line, shortened
from policygrad.train.methods import KNOWN, nearest
from policygrad.train.names import outside
from policygrad.train.options import OptionError, is_read, options_of, with_values
from policygrad.train.worlds import kind_of

FOLDER = files("policygrad") / "presets"
ANY = "any"  # the table of settings for every method
LARGEST = 2**16  # bytes of a user's own file


def names() -> list[str]:
    """The names of all presets: of a task ALE/Pong-v5 it is in the folder ALE."""
    return sorted(_named(FOLDER))


def _named(folder: Any, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _named(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".toml"):
            yield prefix + entry.name.removesuffix(".toml")


def load(name: str) -> dict[str, dict[str, Any]]:
    """A preset: method -> option -> value. Raises UserError for an unknown name or a damaged file.

    name: of a preset, or the path of a file of one's own, which ends in .toml or has a slash.
    """
    own = is_file(name)
    shown = f"the preset {ending(str(name), 60)}" + ("" if own else ".toml")
    if not own and name not in names():
        raise UserError(f"unknown preset {shortened(name)}: {nearest(str(name), names())} (or none, or FILE.toml)")
    try:
        table = tomllib.loads(_text(Path(name)) if own else (FOLDER / f"{name}.toml").read_text())
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{shown} cannot be read ({one_line(error, 80)}): mend it, or use none") from error
    for method, values in table.items():
        if method not in (*KNOWN, ANY) or not isinstance(values, dict):
            raise UserError(f"{shown} has {shortened(method)}, which is no table of a method: mend it")
    return table


def is_file(name: Any) -> bool:
    """Whether this is the path of a preset, and not its name."""
    return isinstance(name, str) and (name.endswith(".toml") or ("/" in name and name not in names()))


def _text(path: Path) -> str:
    """The text of a user's own file: a regular one, and no longer than presets are."""
    from policygrad.files import as_path, check_file  # with torch

    path = as_path(str(path)).expanduser().resolve()
    check_file(path, path.parent, LARGEST)
    return path.read_text(encoding="utf-8")


def write(path: Path, method: str, values: Mapping[str, Any], comment: str) -> None:
    """Write a preset of one method. Raises OSError."""
    from policygrad.files import write_bytes

    lines = [f"# {one_line(comment, 200)}", "", f"[{method}]", *(f"{x} = {_toml(y)}" for x, y in values.items())]
    write_bytes(path, "\n".join([*lines, ""]).encode())


def _toml(x: Any) -> str:
    """A value in TOML: a list, a text, or a number, of which infinity is one."""
    if isinstance(x, tuple):
        return f"[{', '.join(map(_toml, x))}]"
    return repr(x) if isinstance(x, float) else json.dumps(x, ensure_ascii=False).replace("\x7f", "\\u007f")


def choose(preset: Any, method: str, task: Any, values: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The preset of a run and its values: the named preset, none, or by default the preset of the task.

    values: the options that are set. The arithmetic task's preset applies only to its own model. Raises UserError if
    the named preset does not exist or has nothing for the method.
    """
    preset = str(preset) if isinstance(preset, Path) else preset
    if preset == "none":
        return None, {}
    if preset is not None:
        table = load(preset)
        if method not in table and ANY not in table:
            raise UserError(f"preset {preset} has no settings for {method}, only for {listed(table, 90)}; or use none")
        found = settings(table, method, kind_of(task, values))
        if is_file(preset):
            _check_data(preset, found, method, kind_of(task, values))
        return preset, found
    own = task.split(":")[-1] if isinstance(task, str) and not task.startswith("exact:") else None
    if own in names() and values.get("model") is None and {method, ANY} & set(table := load(own)):
        return own, settings(table, method, kind_of(task, values))
    return None, {}


def _check_data(preset: str, values: Mapping[str, Any], method: str, kind: str) -> None:
    """Raise UserError if a user's own file names code, or what is outside of it: such a name is given as an option."""
    options = with_values(options_of(method, kind)(), values, f"preset {ending(preset, 40)}: ")
    names = [*outside(kind, None, options, training=True), *({"trust", "trust_remote_code"} & values.keys())]
    for name in names:
        raise OptionError(
            name, f"preset {ending(preset, 60)} sets {name}, which leads out of it: give --{name.replace('_', '-')}"
        )


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
