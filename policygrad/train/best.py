"""The best policy of a run so far, which is kept in RUN/best."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from policygrad.files import write_json
from policygrad.train.run import Run

FOLDER = "best"


@dataclass
class Best:
    """The highest score so far: that of an evaluation, or in a run without evaluations that of its training.

    metric: the name of the score in metrics.jsonl; None: there is none yet. iteration and steps: of the policy that has
    it. waited: evaluations since then that did not reach it. written: whether RUN/best has this policy.
    """

    metric: str | None = None
    score: float = -math.inf
    iteration: int = 0
    steps: int = 0
    waited: int = 0
    written: bool = True

    def see(self, metric: str, score: float, iteration: int, steps: int) -> None:
        """Take a new score. That of another metric, such as the first whole episode's return, begins anew."""
        if metric != self.metric or score > self.score or math.isnan(self.score):
            self.metric, self.score, self.iteration, self.steps = metric, score, iteration, steps
            self.waited, self.written = 0, False
        else:
            self.waited += 1

    def summary(self) -> dict[str, Any] | None:
        """The best score for JSON."""
        if self.metric is None:
            return None
        return {name: x for name, x in asdict(self).items() if name not in ("waited", "written")}


def write_best(run: Run, directory: Path) -> None:
    """Write the current policy to RUN/best, which is a directory of a run like any other, to evaluate or begin from.

    Raises OSError, or a library's own exception.
    """
    place = directory / FOLDER
    place.mkdir(exist_ok=True)
    run.world.save(place, replace(run.stage, run="best"))
    write_json(place / "config.json", run.configuration())
