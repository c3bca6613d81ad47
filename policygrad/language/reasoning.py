"""Problems of reasoning-gym (pip install policygrad[reasoning]) as an environment: one turn, and its own score."""

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

from policygrad.errors import UserError, one_line, shortened
from policygrad.language.conversations import Messages

COUNT = 1_000_000  # problems of a data set, each made when it is asked for
ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


@lru_cache(maxsize=16)
def _problems(name: str, config: tuple[tuple[str, Any], ...]) -> Any:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise UserError("reasoning_gym is not installed: pip install policygrad[reasoning]") from error
    try:
        return create_dataset(name, **{"seed": 0, "size": COUNT, **dict(config)})
    except Exception as error:
        said = one_line(error, 80) or type(error).__name__
        raise UserError(f"reasoning_gym makes no data set {shortened(name, 40)} ({said}): correct its name") from error


class ReasoningGym:
    """A problem of a data set of reasoning-gym: it asks, and scores the answer from 0 to 1.

    The answer is what stands in the last <answer> ... </answer>, or the whole text. config: options of the data set.

    Raises UserError if there is no such data set.
    """

    def __init__(self, name: str, **config: Any) -> None:
        self.problems = _problems(name, tuple(sorted(config.items())))

    def reset(self, seed: int) -> Messages:
        """The problem of that number, as the user's message."""
        self.problem = self.problems[seed]
        return [{"role": "user", "content": self.problem["question"]}]

    def step(self, text: str) -> tuple[Messages | None, float, bool]:
        """The score of the answer."""
        marked = ANSWER.findall(text)
        answer = marked[-1] if marked else text.strip()
        return None, float(self.problems.score_answer(answer, self.problem)), True


def reasoning_gym(name: str) -> Callable[[], ReasoningGym]:
    """What makes environments of a data set. Raises UserError if there is none of that name."""
    _problems(name, ())
    return partial(ReasoningGym, name)
