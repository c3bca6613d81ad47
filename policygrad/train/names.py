"""Names of a run that lead out of its directory: code to import, and files, models and data sets to read.

A run directory may come from anyone, so such a name is believed only if the user repeats it, or says so for all.
"""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from policygrad.errors import UserError, ending, shortened
from policygrad.train.worlds import OWN_TASKS, REASONING_GYM, is_conversation

# Options that hold such names, and their values that are names of this library's own.
NAMES: dict[str, tuple[Any, ...]] = {
    "start": (),
    "model": (),
    "base_model": (),
    "tokenizer": (),
    "teacher": (),
    "mix": (),
    "dataset": (),
    "evaluation_dataset": (),
    "critic": ("copy", "shared"),
    "reward": ("exact_match", "math_equal"),
    "tool": ("python",),
    "attention": ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"),
    "env_options": (),
    "demonstrations": (),
    "symmetry": (),
    "ray": ("auto",),
    "engine_python": (),
}
# What a run keeps itself, or needs in training alone, so that loading it does not read the name; a model is kept unless
# it is an adapter's base.
KEPT = (
    "start", "model", "base_model", "tokenizer", "teacher", "mix",
    "dataset", "evaluation_dataset", "demonstrations", "symmetry", "ray",
    "engine_python",
)  # fmt: skip
PATTERNS = ("format:", "overlong:")  # built-in rewards with arguments


def outside(kind: str, task: Any, options: Any, *, training: bool = False) -> dict[str, list[str]]:
    """The names that loading and evaluating a run follows out of its directory: option -> names.

    training: those that training it follows.
    """
    found: dict[str, list[str]] = {}
    if kind == "control" and isinstance(task, str) and ":" in task:
        found["environment"] = [task]
    if kind == "language" and is_conversation(task):
        if task not in OWN_TASKS and not task.startswith(REASONING_GYM):
            found["environment"] = [task]
    elif kind == "language" and training and task not in (None, *OWN_TASKS, "rows"):
        found["dataset"] = [task]
    adapter = getattr(options, "lora_rank", 0) > 0 and getattr(options, "save", "adapter") == "adapter"
    for name in NAMES:
        if name in KEPT and not training and not (adapter and name in ("start", "model", "base_model")):
            continue
        texts = [x for x in _texts(name, getattr(options, name, None)) if not _built_in(name, x)]
        if texts:
            found[name] = texts
    return found


def check_trusted(names: Mapping[str, list[str]]) -> None:
    """Raise UserError if there are names that the user has not repeated."""
    if names:
        said = ", ".join(f"{name} {shortened(ending(x, 56), 60)}" for name, texts in names.items() for x in texts)
        start, end = "the run names what is not its own, ", ": repeat that as an option, or give --trust (trust=True)"
        room = 200 - len(start) - len(end)
        raise UserError(start + (said if len(said) <= room else said[: room - 3] + "...") + end)


def resuming(directory: Path, kind: str, task: Any, options: Any) -> str:
    """The command that goes on with a run of one's own; for an environment without a name, the call in Python."""
    if kind == "control" and task is None:
        return f"policygrad.resume({str(directory)!r}, environment=...)"
    return f"policygrad resume {shlex.quote(str(directory))}{trusting(kind, task, options, training=True)}"


def trusting(kind: str, task: Any, options: Any, *, training: bool = False) -> str:
    """The flags that `policygrad eval` needs for a run of one's own; training: those of `policygrad resume`."""
    flags = [" --trust"] if outside(kind, task, options, training=training) else []
    return "".join(flags + ([" --trust-remote-code"] if getattr(options, "trust_remote_code", False) else []))


def located(options: Any) -> Any:
    """The options with every local path absolute, so that the run can be used from another directory."""
    values = {f.name: getattr(options, f.name) for f in fields(options) if f.name in NAMES and f.name != "env_options"}
    return replace(options, **{name: _absolute(name, x) for name, x in values.items()})


def absolute(name: str) -> str:
    """A path that exists, or the path of `path/file.py:function`, made absolute; any other name as it is."""
    place, colon, rest = name.rpartition(":")
    if place.endswith(".py") and rest.isidentifier():
        return absolute(place) + colon + rest
    path = os.path.expanduser(name)
    return os.path.abspath(path) if os.path.exists(path) else name


def _absolute(option: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_absolute(option, x) for x in value)
    return absolute(value) if isinstance(value, str) and value and not _built_in(option, value) else value


def _built_in(option: str, name: str) -> bool:
    """Whether a name is of this library's own, or in env_options a word that leads nowhere."""
    if option == "env_options":
        return not set(name) & set("/\\:.")
    return name in NAMES[option] or (option == "reward" and name.startswith(PATTERNS))


def _texts(option: str, value: Any) -> Iterator[str]:
    """All texts in an option's value."""
    if isinstance(value, str) and option == "env_options" and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for x in value.values() if isinstance(value, dict) else value:
            yield from _texts(option, x)
