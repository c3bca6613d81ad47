"""What a user of language models has on disk: a tiny real model with its tokenizer, prompts, and reward functions."""

import json
from pathlib import Path

from tiny_models import tiny

from policygrad.language import arithmetic, models

REWARD = """
def short(prompts, completions, **_):
    return [1.0 / (1 + len(text)) for text in completions]


def right(prompts, completions, answer, **_):
    return [float(text.endswith(wanted)) for text, wanted in zip(completions, answer)]


def lucky(prompts, completions, **_):
    return [float(text[:1] in ("7", "8")) for text in completions]


def sevens(prompts, completions, **_):
    return [text.count("7") / max(1, len(text)) for text in completions]


def broken(prompts, completions, **_):
    raise ValueError("no judge today")
"""


def write_model(directory: Path) -> Path:
    """The directory of the tiny model."""
    models.save_model(tiny(), arithmetic.tokenizer(), directory)
    return directory


def write_prompts(directory: Path) -> Path:
    """Forty problems in a JSONL file."""
    path = directory / "sums.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in arithmetic.problems(40, seed=0)))
    return path


def write_rewards(directory: Path) -> Path:
    """A file of reward functions."""
    path = directory / "mine.py"
    path.write_text(REWARD)
    return path


def write_all(place: Path) -> Path:
    """All of it, in the directories model, data and rewards of `place`."""
    for name, write in {"model": write_model, "data": write_prompts, "rewards": write_rewards}.items():
        (place / name).mkdir()
        write(place / name)
    return place
