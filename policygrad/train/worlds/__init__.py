"""The worlds control, language and exact, behind one interface. No torch here: naming a world must be instant."""

from pathlib import Path
from typing import Any

from policygrad.errors import UserError

NO_PROMPTS = "there are no prompts to train on: give dataset, a file of prompts as the task, or the task arithmetic"
ROWS = "rows"  # the task of prompts that are handed in as rows of Python
PROMPTS = (".json", ".jsonl", ".csv", ".parquet")
OWN_TASKS = ("arithmetic", "lookup")  # of language models, which need no model of the user's
REASONING_GYM = "reasoning_gym:"  # before the name of one of its data sets
VERIFIERS = "verifiers:"  # before the name of one of its environments


def kind_of(task: Any, values: Any) -> str:
    """The world of a task: exact for `exact:NAME`, language for its own tasks or a data set of prompts, else control.

    values: the given options, by name; model, dataset, turns or tool mean language. Raises UserError if nothing names a
    task.
    """
    if isinstance(task, str) and task.startswith("exact:"):
        return "exact"
    of_prompts = isinstance(task, str) and (
        task in (*OWN_TASKS, ROWS) or Path(task).suffix in PROMPTS or task.startswith((REASONING_GYM, VERIFIERS))
    )
    if of_prompts or any(values.get(name) not in (None, ()) for name in ("model", "dataset", "turns", "tool")):
        return "language"
    if task is None:
        raise UserError(
            "there is no task: name one right after the method (CartPole-v1, arithmetic, exact:chain), or give model "
            "and dataset"
        )
    return "control"


def is_conversation(task: Any) -> bool:
    """Whether a task of language is an environment to talk to: lookup, reasoning_gym:, verifiers:, or module:Class."""
    if not isinstance(task, str) or task in (ROWS, "arithmetic"):
        return False
    place, _, name = task.rpartition(":")
    return (
        task == "lookup"
        or task.startswith(VERIFIERS)
        or (name.isidentifier() and (place.endswith(".py") or _is_module(place)))
    )


def _is_module(place: str) -> bool:
    return all(part.isidentifier() for part in place.split("."))


def world_of(kind: str, method: str) -> Any:
    """The class of a world for a method, imported on demand."""
    if method == "clone" and kind == "control":
        from policygrad.train.worlds.cloning import ClonedControl

        return ClonedControl
    if method == "clone" and kind == "language":
        from policygrad.train.worlds.language_cloning import ClonedLanguage

        return ClonedLanguage
    if kind == "exact":
        from policygrad.train.worlds.exact import ExactWorld

        return ExactWorld
    if kind == "language":
        from policygrad.train.worlds.language import LanguageWorld

        return LanguageWorld
    from policygrad.train.worlds.control import ControlWorld

    return ControlWorld
