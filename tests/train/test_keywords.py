"""The options as keywords: exactly those of the table. Run as a script, this file writes keywords.py anew."""

import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import policygrad
from policygrad import Training
from policygrad.train.keywords import Arguments, Keywords
from policygrad.train.options import Options

FILE = Path(policygrad.__file__).parent / "train" / "keywords.py"
HEAD = '''"""The options of every method and world as keywords, so that editors and type checkers know them.

Written by `python tests/train/test_keywords.py` from options.py, which says what each means and where it applies.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict


class Keywords(TypedDict, total=False):
    """The options."""

'''
TAIL = '''

class Arguments(Keywords, total=False):
    """The options, and what else `train` takes."""

    out: Path | str | None
    preset: str | Path | None
    policy: Any
    critic: Any
    engine: Any
'''
# From Python these may be more than text.
IN_PYTHON = {
    **dict.fromkeys(["model", "tokenizer", "base_model", "start", "engine_python"], "str | Path | None"),
    **dict.fromkeys(["dataset", "evaluation_dataset", "reward", "demonstrations"], "Any"),
    **dict.fromkeys(["env_options", "template_variables"], "str | dict[str, Any] | None"),
    "columns": "str | dict[str, str] | Sequence[str]",
}
ARGUMENTS = {"critic", "engine"}  # of train and Training themselves


def written(kind: object) -> str:
    """A type as it stands in the source."""
    if get_origin(kind) is tuple:
        return f"{written(get_args(kind)[0])} | Sequence[{written(get_args(kind)[0])}]"
    text = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return text.replace("typing.", "").replace("'", '"')


def source() -> str:
    """keywords.py as it should be, but for its line breaks."""
    kinds = {f.name: get_type_hints(Options)[f.name] for f in fields(Options) if f.name not in ARGUMENTS}
    return HEAD + "".join(f"    {name}: {IN_PYTHON.get(name, written(kind))}\n" for name, kind in kinds.items()) + TAIL


def test_every_option_is_a_keyword_with_its_type() -> None:
    expected: dict[str, Any] = {}
    exec(source(), expected)
    for made in (Keywords, Arguments):
        assert get_type_hints(made) == get_type_hints(expected[made.__name__]), (
            "run: python tests/train/test_keywords.py"
        )


def test_train_and_training_take_the_same_arguments() -> None:
    named = {name for name, x in signature(Training).parameters.items() if x.kind is x.KEYWORD_ONLY}
    assert set(get_type_hints(Arguments)) == set(get_type_hints(Keywords)) | named - {"progress"}


if __name__ == "__main__":
    FILE.write_text(source())
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", FILE], check=True)
