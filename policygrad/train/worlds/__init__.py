"""The worlds control, language and exact, behind one interface. No torch here: naming a world must be instant."""

from pathlib import Path
from typing import Any

from policygrad.errors import UserError

NO_PROMPTS = "there are no prompts to train on: give dataset, a file of prompts as the task, or the task arithmetic"
ROWS = "rows"  # the task of prompts that are handed in as rows of Python
PROMPTS = (".json", ".jsonl", ".csv", ".parquet")


def kind_of(task: Any, values: Any) -> str:
    """The world of a task: exact for `exact:NAME`, language for arithmetic or a data set of prompts, else control.

    values: the given options, by name; model or dataset means language. Raises UserError if nothing names a task.
    """
    if isinstance(task, str) and task.startswith("exact:"):
        return "exact"
    of_prompts = isinstance(task, str) and (task in ("arithmetic", ROWS) or Path(task).suffix in PROMPTS)
    if of_prompts or values.get("model") is not None or values.get("dataset") not in (None, ()):
        return "language"
    if task is None:
        raise UserError(
            "there is no task: name one right after the method (CartPole-v1, arithmetic, exact:chain), or give model "
            "and dataset"
        )
    return "control"


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
