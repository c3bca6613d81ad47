"""The worlds: control, language and exact, behind one interface. No torch here: a task is named before work starts."""

from pathlib import Path
from typing import Any

from policygrad.errors import UserError

PROMPTS = (".json", ".jsonl", ".csv", ".parquet")


def kind_of(task: Any, values: Any) -> str:
    """Which world a task is of: `exact:NAME` exact, arithmetic or a data set of prompts language, all else control.

    values: the options set, by name; --model or --dataset mean language. Raises UserError if nothing names a task.
    """
    if isinstance(task, str) and task.startswith("exact:"):
        return "exact"
    of_prompts = isinstance(task, str) and (task == "arithmetic" or Path(task).suffix in PROMPTS)
    if of_prompts or values.get("model") is not None or values.get("dataset") is not None:
        return "language"
    if task is None:
        raise UserError("there is no task: name an environment, exact:chain, arithmetic, or give --model and --dataset")
    return "control"


def world_of(kind: str) -> Any:
    """The class of a world, imported when it is needed."""
    if kind == "exact":
        from policygrad.train.worlds.exact import ExactWorld

        return ExactWorld
    if kind == "language":
        from policygrad.train.worlds.language import LanguageWorld

        return LanguageWorld
    from policygrad.train.worlds.control import ControlWorld

    return ControlWorld
